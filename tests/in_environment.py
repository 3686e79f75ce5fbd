"""Runs a script of this repository in an environment that people have: python tests/in_environment.py JSON SCRIPT ARG…

JSON: {"encoding": of the standard streams, "closed": [numbers of streams], "files": how many may be open, "user": its
number}; each may be missing.
A fork of the server (fork_server.py) becomes what a start in that environment would have made of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import sys
from pathlib import Path

CAP_DAC_READ_SEARCH = 2
CAPABILITY_VERSION_3 = 0x20080522
PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 8, 47, 2


def enter(*, encoding: str = "", closed: tuple[int, ...] = (), files: int = 0, user: int = 0) -> None:
    if encoding:
        os.environ["PYTHONIOENCODING"] = encoding  # of processes that the script starts
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number in closed:
            os.close(number)
            setattr(sys, name, None)
        elif encoding:
            errors = "backslashreplace" if name == "stderr" else "strict"
            getattr(sys, name).reconfigure(encoding=encoding, errors=errors)
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if user:
        become(user)
        os.environ["HOME"] = "/nonexistent"  # as /etc/passwd has it for nobody


def become(user: int) -> None:
    """Another user, who may read all files, wherever Python and the checkout lie, and write none but their own."""
    libc = ctypes.CDLL(None, use_errno=True)
    check = [libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)]
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    only = 1 << CAP_DAC_READ_SEARCH
    check.append(libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3), (ctypes.c_uint32 * 6)(only, only, only)))
    # For the programs that it starts
    check.append(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0))
    assert not any(check), os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    options, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    enter(**options)
    runpy.run_path(sys.argv[0], run_name="__main__")
