"""All that a result depends on beside the code: hardware, versions, commit and command, for every record we keep."""

import os
import platform
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.cores import usable_cores
from pipeline.errors import ConfigError
from pipeline.files import Json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "accelerate", "webdataset", "pillow", "numpy",
    "simplejpeg", "numba",
)  # fmt: skip
LAUNCHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")  # numbers, set for each rank


def describe() -> Json:
    """Hardware and versions, without anything that names the machine."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: v for name in PACKAGES if (v := version(name))},
        "commit": git_commit(),
    }


def check_launch() -> None:
    """Removes empty launcher variables, which torch and Accelerate would parse as numbers.

    Raises ConfigError for values that no launcher sets. It removes these too: the error is reported by one process.
    """
    for name, value in list(os.environ.items()):
        if not value.strip() and name.startswith((*LAUNCHERS, "MASTER_", "ACCELERATE_")):
            del os.environ[name]
    given = {name: os.environ[name] for name in LAUNCHERS if name in os.environ}
    number = {name: int(text) if text.isdecimal() else -1 for name, text in given.items()}
    world = number.get("WORLD_SIZE", 1)
    sizes = {"RANK": world, "LOCAL_RANK": number.get("LOCAL_WORLD_SIZE", world), "MASTER_PORT": 1 << 16}
    if not all(0 <= number.get(name, 0) < size for name, size in sizes.items()):
        for name in given:
            del os.environ[name]
        shown = " ".join(f"{name}={text}" for name, text in given.items())
        raise ConfigError(f"{shown}: no launcher sets that; unset {' '.join(given)}, or use accelerate launch")


def launched(name: str, default: int = 0) -> int:
    """A number that launchers set for each rank, such as RANK; `default` for a process that was started alone."""
    return int(os.environ.get(name, default))


def world_size() -> int:
    return launched("WORLD_SIZE", 1)


def memory_gb(device: Any) -> float:
    """Peak memory so far, in GB: of tensors on the GPU, or of this process."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def command() -> str:
    """The command line, with the program's path relative to the repository, without the launcher's own options."""
    program = os.path.abspath(sys.argv[0])
    inside = os.path.relpath(program, ROOT)
    launcher = "accelerate launch " if "ACCELERATE_MIXED_PRECISION" in os.environ else ""
    return launcher + shlex.join([os.path.basename(program) if inside.startswith("..") else inside, *sys.argv[1:]])


def git_commit() -> str | None:
    """The commit, with "-dirty" if files differ from it; outside a checkout, the one recorded in the image, or None."""
    try:
        ask = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("IMAGENET_EXPRESS_COMMIT") or None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
