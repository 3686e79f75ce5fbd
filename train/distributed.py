"""How a process of a run begins: its device, its precision, its ranks."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DDPCommunicationHookType, ProjectConfiguration

from pipeline import cores
from pipeline.errors import ConfigError

from .agreement import timeout_seconds
from .config import Config


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate's part: devices, precision, processes. Refuses a launch whose ranks do not know of each other."""
    precision = {"launcher": None, "fp32": "no", "tf32": "no"}.get(config.train.precision, config.train.precision)
    if config.train.precision == "tf32" and not torch.cuda.is_available():
        raise ConfigError("train.precision=tf32: needs an NVIDIA GPU; choose fp32 or bf16")
    handlers: list[Any] = []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:  # one process joins no group
        backend = None if config.run.ddp_backend == "auto" else config.run.ddp_backend
        timeout = datetime.timedelta(seconds=timeout_seconds(config.guard.hang_seconds))
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
        # Views: a gradient lies where it is sent from, which spares a copy and the memory of all weights.
        hook = DDPCommunicationHookType({"none": "no"}.get(config.train.compress, config.train.compress))
        handlers.append(DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook))
    torch.backends.cudnn.benchmark = not config.run.deterministic  # batches are all of one size
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=list(config.run.trackers),
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
    set_products(config.train.precision)
    refuse_unscaled(accelerator)
    if (parts := accelerator.gradient_accumulation_steps) != 1:  # it would divide what is divided already
        raise ConfigError(f"the launcher's gradient_accumulation_steps={parts}: use --train.accumulate {parts} instead")
    return accelerator


def make_plain_accelerator(precision: str) -> Accelerator:
    """For what only evaluates: device and processes, and fp32 or bf16 whatever the launcher says."""
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision))
    set_products(precision)
    return accelerator


def refuse_unscaled(accelerator: Accelerator) -> None:
    """Accelerate takes fp16 on a CPU for fp32 without a word."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("train.precision=fp16: a CPU has neither fp16 nor a loss scaler; choose bf16 or fp32")


def set_products(precision: str) -> None:
    """How precise float32 products are on NVIDIA GPUs. torch's own default rounds in convolutions and not elsewhere,
    and Accelerate's depends on the launcher's compiler: to be called when it has set its own."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def resolved_precision(config: Config, accelerator: Accelerator) -> str:
    """What train.precision came to, with the launcher's word."""
    if config.train.precision == "tf32":
        return "tf32"
    precision: str = accelerator.mixed_precision
    return {"no": "fp32"}.get(precision, precision)


def local_world() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def take_cores(device: torch.device) -> dict[str, Any]:
    """Pins this rank to its share of the cores near its GPU, where those are known, and lets torch use all it has.

    Launchers set one thread a rank, which starves a CPU. Returns what was done, for the run folder.
    """
    ranks = local_world()
    shares = None
    if device.type == "cuda" and hasattr(os, "sched_setaffinity"):
        near = [_cores_near_gpu(gpu) for gpu in range(min(ranks, torch.cuda.device_count()))]
        shares = cores.divide(near, sorted(os.sched_getaffinity(0))) if len(near) == ranks else None
    if shares is not None:
        cores.pin(shares[int(os.environ.get("LOCAL_RANK", "0"))])
    threads = cores.threads_per_rank(ranks)
    torch.set_num_threads(threads)
    return {"ranks_on_this_machine": ranks, "threads_a_rank": threads, "pinned_to_cores": shares}


def _cores_near_gpu(gpu: int) -> list[int] | None:
    p: Any = torch.cuda.get_device_properties(gpu)
    return cores.near_device(f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0")
