"""The cores that this process may use, and how the ranks of a machine divide them."""

import os
from collections.abc import Sequence
from pathlib import Path

_pinned = False  # whether this process's cores are this rank's alone


def usable_cores() -> int:
    """The number of cores in the process's affinity, limited by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(cgroup_quota() or cores)))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float | None:
    """Returns the CPU quota of this process's control groups, in cores; None without a limit."""
    quotas = []
    for line in _read(process).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mount, names = root, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, names = root / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        for folder in (Path(path), *Path(path).parents):
            numbers = [n for name in names for n in _read(mount / str(folder).lstrip("/") / name).split()]
            if len(numbers) == 2 and all(map(str.isdigit, numbers)):  # not "max" or -1: no limit
                quotas.append(int(numbers[0]) / int(numbers[1]))
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def threads_per_rank(local_world: int) -> int:
    """The number of usable cores divided by the machine's ranks; all of them if the process is pinned to its own."""
    return usable_cores() if _pinned else max(1, usable_cores() // local_world)


def near_device(pci: str, devices: Path = Path("/sys/bus/pci/devices")) -> list[int] | None:
    """The cores of the NUMA node that a PCI device ("0000:3b:00.0") is attached to; None if it is not reported."""
    if _read(devices / pci.lower() / "numa_node") in ("", "-1"):
        return None
    mask = int(_read(devices / pci.lower() / "local_cpus").replace(",", "") or "0", 16)  # a bit for each core
    return [core for core in range(mask.bit_length()) if mask >> core & 1] or None


def divide(near: Sequence[Sequence[int] | None], allowed: Sequence[int]) -> list[list[int]] | None:
    """Returns each local rank's cores: the allowed cores near its device, divided among the ranks near the same cores.

    near: for each local rank, the cores near its device. Returns None if any of them is unknown or too few are allowed.
    """
    groups = [tuple(sorted(set(cores or ()) & set(allowed))) for cores in near]
    shares = []
    for rank, group in enumerate(groups):
        part, parts = groups[:rank].count(group), groups.count(group)
        mine = list(group[part * len(group) // parts : (part + 1) * len(group) // parts])
        if not mine:
            return None
        shares.append(mine)
    return shares


def pin(cores: Sequence[int]) -> None:
    """Pins this process, and all threads that it starts from now on, to `cores`, which no other rank uses."""
    global _pinned
    os.sched_setaffinity(0, cores)
    _pinned = True
