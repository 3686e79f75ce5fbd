"""The start of a run's process."""

from __future__ import annotations

import dataclasses
import os
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from train import loop, signals
from train.config import Config, RunConfig
from train.distributed import make_accelerator, make_plain_accelerator
from train.environment import LAUNCHERS, check_launch
from train.exit_report import ExitReport


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_looks_for_the_fastest_kernels_unless_a_run_is_deterministic(tmp_path, monkeypatch, deterministic):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    config = RunConfig(dir=str(tmp_path), deterministic=deterministic, trackers=())
    make_accelerator(dataclasses.replace(Config(), run=config))
    assert torch.backends.cudnn.benchmark is not deterministic


ALONE = dict.fromkeys(LAUNCHERS, "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, ""),
        ({"MASTER_ADDR": "", "ACCELERATE_MIXED_PRECISION": " "}, ""),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}, ""),
        ({"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, ""),
        ({"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "7"}, ""),  # srun: one node, or not known
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: no launcher sets that; unset WORLD_SIZE, or use accelerate launch"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: "),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: "),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "WORLD_SIZE=2 RANK=-1: no launcher sets that; unset WORLD_SIZE RANK"),
        ({"RANK": "3"}, "RANK=3: "),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE=2 RANK=2: "),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: "),
        (
            {"WORLD_SIZE": "8", "RANK": "4", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"},
            "WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 RANK=4 LOCAL_RANK=4: ",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "70000"}, "WORLD_SIZE=2 RANK=0 MASTER_PORT=70000: "),
    ],
)
def test_empty_variables_of_launchers_are_unset_and_impossible_ones_named(monkeypatch, capsys, variables, message):
    for name, value in (ALONE | variables).items():
        monkeypatch.setenv(name, value)
    given = {name: value for name, value in variables.items() if value.strip()}
    if not message:
        check_launch()
        assert {name: os.environ[name] for name in ALONE | variables if name in os.environ} == given
        return
    monkeypatch.setattr(signals, "heed_no_more", lambda: None)
    with ExitReport() as report:
        check_launch()
    assert report.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not any(name in os.environ for name in LAUNCHERS)


def test_what_accelerate_cannot_do_is_an_error_that_names_who_asked(tmp_path, monkeypatch):
    for name, value in (ALONE | {"ACCELERATE_USE_DEEPSPEED": "true"}).items():
        monkeypatch.setenv(name, value)
    check_launch()
    for make in (
        lambda: make_plain_accelerator("fp32"),
        lambda: make_accelerator(Config(run=RunConfig(str(tmp_path)))),
    ):
        with pytest.raises(ConfigError, match=r"ACCELERATE_USE_DEEPSPEED=true.*: DeepSpeed is not installed"):
            make()


@pytest.mark.parametrize("classes", [1, 2])
def test_a_set_of_one_class_is_warned_of(classes):
    trainer = MagicMock(config=Config())
    trainer.loader.dataset.classes = ["cat", "dog"][:classes]
    trainer.loader.split.column.return_value, trainer.loader.split.samples = np.full(1, 256), 1
    trainer.val_loader.samples, trainer.stepper.bare = 1, torch.nn.Linear(1, 1)
    loop.begin(trainer)
    logged = [call.args[0] for call in trainer.record.log.call_args_list]
    assert ("warning: the set has one class, so top-1 is always 1" in logged) == (classes == 1)


def test_the_text_of_a_signals_handler_holds_nothing_of_the_run():
    """signal.signal() makes the text of the handler that it replaces: that of the trainer's tensors took a second."""
    assert "at_second" not in repr(signals.Stop()._interrupt)
