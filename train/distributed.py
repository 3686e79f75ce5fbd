"""Devices, precision and processes, and every collective of a run."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DDPCommunicationHookType, ProjectConfiguration

from pipeline import cores
from pipeline.errors import ConfigError, ExpressError, StorageError, first_line
from pipeline.files import Json

from .config import Config
from .environment import launched, world_size

# Accelerate's names for our precisions and hooks, if they differ
NAMES = {"launcher": None, "fp32": "no", "tf32": "no", "none": "no"}


def make_accelerator(config: Config) -> Accelerator:
    """Makes the Accelerator, after `check_launch`. Raises ConfigError if ranks do not form one process group."""
    train, run = config.train, config.run
    precision = NAMES.get(train.precision, train.precision)
    if train.precision == "tf32" and not torch.cuda.is_available():
        raise ConfigError("train.precision=tf32: needs an NVIDIA GPU; choose fp32 or bf16")
    handlers = list[Any]()
    world = world_size()
    if world > 1:  # one process joins no group
        group = InitProcessGroupKwargs(
            backend=None if run.ddp_backend == "auto" else run.ddp_backend,
            timeout=patience(config.guard.hang_seconds),
        )
        # Views: gradients are stored in DDP's buffers, which saves a copy and memory of the weights' size.
        hook = DDPCommunicationHookType(NAMES.get(train.compress, train.compress))
        handlers = [group, DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)]
    torch.backends.cudnn.benchmark = not run.deterministic  # batches are all of one size
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = _accelerator(
        f"train.precision={train.precision}, run.ddp_backend={run.ddp_backend}",
        mixed_precision=precision,
        log_with=list(run.trackers),
        project_config=ProjectConfiguration(run.dir, logging_dir=run.dir),
        kwargs_handlers=handlers,
    )
    if world != accelerator.num_processes:
        raise ConfigError(
            f"WORLD_SIZE={world} but Accelerate runs {accelerator.num_processes} process: each rank would train alone;"
            " on CPUs use ACCELERATE_USE_CPU=true accelerate launch --config_file docker/accelerate/cpu2.yaml"
            f" --num_processes {world} train/run.py …"
        )
    set_products(train.precision)
    check_scaler(accelerator)
    if (parts := accelerator.gradient_accumulation_steps) != 1:  # it would divide the loss a second time
        raise ConfigError(f"the launcher's gradient_accumulation_steps={parts}: use --train.accumulate {parts} instead")
    return accelerator


def _accelerator(chosen: str, **options: Any) -> Accelerator:
    """Makes an Accelerator. Raises ConfigError for options, or the launcher's environment, that Accelerate rejects."""
    try:
        return Accelerator(**options)
    except (ValueError, ImportError) as err:
        asked = [f", {name}={value}" for name, value in os.environ.items() if name.startswith("ACCELERATE_USE_")]
        raise ConfigError(f"{chosen}{''.join(asked)}: {first_line(err)}") from err


def make_plain_accelerator(precision: str) -> Accelerator:
    """Makes an Accelerator for evaluation: fp32 or bf16, whatever the launcher sets. Call it after `check_launch`."""
    accelerator = _accelerator(f"--precision {precision}", mixed_precision=NAMES.get(precision, precision))
    set_products(precision)
    return accelerator


def check_scaler(accelerator: Accelerator) -> None:
    """Raises ConfigError for fp16 on a CPU, which Accelerate silently treats as fp32."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("train.precision=fp16: a CPU has neither fp16 nor a loss scaler; choose bf16 or fp32")


def set_products(precision: str) -> None:
    """Sets the precision of float32 products on NVIDIA GPUs. Call it after Accelerate, which sets it too.

    torch's default is TF32 in convolutions only; Accelerate's depends on the launcher's compiler setting.
    """
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def resolved_precision(precision: str, accelerator: Accelerator) -> str:
    """Returns the precision in use: train.precision, or what the launcher has set."""
    mixed = accelerator.mixed_precision
    return "tf32" if precision == "tf32" else {"no": "fp32"}.get(mixed, mixed)


def take_cores(device: torch.device) -> Json:
    """Pins this rank to its fraction of the cores near its GPU, if they are known, and lets torch use all of these.

    Launchers set one thread per rank, too few for training on a CPU. Returns a description for config.json.
    """
    ranks = launched("LOCAL_WORLD_SIZE", 1)
    shares = None
    if device.type == "cuda":
        gpus = (torch.cuda.get_device_properties(gpu) for gpu in range(min(ranks, torch.cuda.device_count())))
        near = [
            cores.near_device(f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0")  # type: ignore[attr-defined]
            for p in gpus
        ]
        shares = cores.divide(near, sorted(os.sched_getaffinity(0))) if len(near) == ranks else None
    if shares is not None:
        cores.pin(shares[launched("LOCAL_RANK")])
    threads = cores.threads_per_rank(ranks)
    torch.set_num_threads(threads)
    return {"ranks_on_this_machine": ranks, "threads_a_rank": threads, "pinned_to_cores": shares}


class Agreement:
    """Exchanges small values between the ranks' hosts, without waiting for the devices' queued work.

    A call costs 0.2 ms between processes on one machine. timeout: how long a rank waits for another. first: whether
    this is rank 0.
    """

    def __init__(self, accelerator: Accelerator, timeout: datetime.timedelta) -> None:
        self.first = accelerator.is_main_process
        several = accelerator.num_processes > 1
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks; for flags: whether any rank has raised it."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def from_all(self, value: Any) -> list[Any]:
        """Returns the list of all ranks' values, by rank, at every rank (all-gather)."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def alike(self, path: object) -> Iterator[None]:
        """If the block raises an ExpressError or OSError at any rank, all ranks raise the first rank's error.

        path: for errors that name no file.
        """
        error = None
        try:
            yield
        except (ExpressError, OSError) as err:
            error = StorageError.of(err, path)
        for first in filter(None, self.from_all(error)):
            raise first


def patience(hang_seconds: float) -> datetime.timedelta:
    """The timeout of collectives: longer than the watchdog's, which can name the cause. hang_seconds=0: a year."""
    return datetime.timedelta(seconds=max(1800.0, 20 * hang_seconds) if hang_seconds else 365 * 86400.0)
