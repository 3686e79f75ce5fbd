"""How many cores this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Those of the process's affinity where the system knows one: containers and job schedulers narrow it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
