"""How a process of a run begins: its device, its precision, its ranks."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration

from pipeline.errors import ConfigError

from .agreement import timeout_seconds
from .config import Config


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate's part: devices, precision, processes. Refuses a launch whose ranks do not know of each other."""
    precision = {"launcher": None, "fp32": "no"}.get(config.train.precision, config.train.precision)
    handlers: list[Any] = []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:  # one process joins no group
        backend = None if config.run.ddp_backend == "auto" else config.run.ddp_backend
        timeout = datetime.timedelta(seconds=timeout_seconds(config.guard.hang_seconds))
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with="tensorboard",
            project_config=ProjectConfiguration(config.run.dir, logging_dir=config.run.dir),
            kwargs_handlers=handlers,
        )
    except ValueError as err:
        chosen = f"train.precision={config.train.precision}, run.ddp_backend={config.run.ddp_backend}"
        raise ConfigError(f"{chosen}: {err}") from err
    if world != accelerator.num_processes:
        raise ConfigError(
            f"WORLD_SIZE={world} but Accelerate runs {accelerator.num_processes} process: each rank would train alone;"
            f" on CPUs use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {world} train/run.py …"
        )
    return accelerator
