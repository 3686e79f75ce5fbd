"""Runs a script of ours with gradients scaled as Accelerate scales them for fp16 on a GPU: scaled.py SCRIPT ...

The scale is too large at first, and grows every six steps. INFINITE=1 makes each gradient infinite, and ends the run
after seven of them.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402 (the path comes first)

from train import distributed, trainer  # noqa: E402
from train.step import Stepper  # noqa: E402

untouched, backward = distributed.make_accelerator, Stepper.backward


def with_scaler(config):
    accelerator = untouched(config)
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=6)
    return accelerator


def infinite(self, *args, **more):
    loss = backward(self, *args, **more)
    next(self.bare.parameters()).grad.fill_(float("inf"))
    return loss


distributed.check_scaler = lambda accelerator: None
distributed.make_accelerator = with_scaler
if "INFINITE" in os.environ:
    Stepper.backward = infinite
    trainer.MOST_OVERFLOWS = 7
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
