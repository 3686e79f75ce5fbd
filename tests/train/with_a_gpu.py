"""Runs a script of ours on CPUs, where `auto` chooses a backend as on GPUs: with_a_gpu.py SCRIPT ...

FREE: the bytes that are free on the GPU of each rank.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402 (the path comes first)

from pipeline.read import resident  # noqa: E402
from train import build  # noqa: E402

untouched, free = build.reason_for_memory, os.environ["FREE"].split()


def with_gpu(config, stepper, *more):
    accelerator = SimpleNamespace(device=torch.device("cuda:0"), no_sync=stepper.accelerator.no_sync)
    return untouched(
        config,
        SimpleNamespace(
            net=stepper.net, bare=stepper.bare, settle_buckets=stepper.settle_buckets, accelerator=accelerator
        ),
        *more,
    )


build.reason_for_memory = with_gpu
resident.free_memory = lambda device, ranks: int(free[int(os.environ["RANK"])])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
