"""What all processes of a run must have in common, compared before they join: data, configuration, code and versions.

Each rank tells rank 0 through the launcher's store; rank 0 compares, and either all go on or all end with one line
that names the host and what differs there. Nothing was written yet, and no collective waits for a rank that is not
coming. Costs two messages a rank.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import BAD_DATA, CHECK_FAILED, IO_FAILED, USAGE, ExpressError
from pipeline.manifest import Dataset, open_dataset
from pipeline.settings import PER_HOST, flatten, marked

from . import environment
from .config import Config
from .signals import heed_no_more

START_SECONDS = 600.0  # for all ranks to come: the first start of a host reads torch from a slow disk
NOTICE_SECONDS = 20.0
ACK_SECONDS = 10.0  # that rank 0, whose launcher may hold the store, waits until the others know why it ends
FINGERPRINT = "the dataset's fingerprint"
CURE = "start the same command, with the same versions and shards, on every host"


class Unlike(ExpressError):
    """Ranks that cannot make one run; the same at all of them."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


def open_alike(config: Config) -> Dataset:
    """The run's dataset, once it is known that all ranks mean the same run. Raises ExpressError, the same at all."""
    if _alone():
        return open_dataset(config.data.shards)
    name_interface()
    dataset, told = None, _who()
    try:
        dataset = open_dataset(config.data.shards)
        told["facts"] = facts(config, dataset)
    except ExpressError as err:
        told |= {"error": str(err), "code": err.code}
    except OSError as err:
        told |= {"error": f"{err.filename or config.data.shards}: {err.strerror or err}", "code": IO_FAILED}
    _meet(told)
    assert dataset is not None  # an error of this rank is everybody's
    return dataset


def tell_refusal(err: ExpressError) -> None:
    """For a rank whose command line was refused: other hosts, whose own may be sound, must not wait for it."""
    if _alone() or _world() == int(os.environ.get("LOCAL_WORLD_SIZE", _world())):
        return  # one host's ranks read the same line and end by themselves
    with contextlib.suppress(Exception):  # its own line says all; this only spares the others a long wait
        _meet(_who() | {"error": str(err), "code": err.code, "leaves": True})


def facts(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What decides which numbers a rank computes, by the name it is known by."""
    packages = environment.PACKAGES
    return {
        FINGERPRINT: dataset.fingerprint,
        "imagenet-express": environment.version("imagenet-express"),
        "the code of pipeline, model and train": code_digest(),
        "python": platform.python_version(),
        **{name: environment.version(name) for name in packages},
        "the launcher's --mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "ACCELERATE_USE_CPU": os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"),
        **{name: value for name, value in flatten(config).items() if name not in marked(Config, PER_HOST)},
    }


def code_digest() -> str:
    """Of all that a run executes of ours, whether or not it was committed."""
    digest = hashlib.sha256()
    for package in ("model", "pipeline", "train"):
        for path in sorted((environment.ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(environment.ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def verdict(told: list[dict[str, Any]]) -> tuple[int, str]:
    """(0, "") where all ranks tell the same, or the exit code and a line. told: by rank."""
    errors = {(rank["error"], rank["code"]) for rank in told if "error" in rank}
    if errors and len(errors) == 1 and all("error" in rank for rank in told):
        reason, code = errors.pop()
        return code, reason
    if errors:
        first = next(rank for rank in told if "error" in rank)
        return first["code"], f"{_name(first, told)}: {first['error']}"
    others = [rank for rank in told if rank["facts"] != told[0]["facts"]]
    if not others:
        return 0, ""
    ours, theirs = told[0]["facts"], others[0]["facts"]
    names = [n for n in dict.fromkeys([*ours, *theirs]) if ours.get(n) != theirs.get(n)]
    shown = "; ".join(f"{n}={theirs.get(n)} but {ours.get(n)}" for n in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    hosts = len({rank["host"] for rank in others} - {others[0]["host"]})
    also = f" (as {hosts} other host{'s' if hosts > 1 else ''})" if hosts else ""
    code = BAD_DATA if names == [FINGERPRINT] else USAGE
    return code, f"{_name(others[0], told)} differs from {_name(told[0], told)}{also}: {shown}{more}; {CURE}"


def _name(rank: dict[str, Any], told: list[dict[str, Any]]) -> str:
    """A host; with the rank where that host's others tell something else, or two hosts have one name."""
    alike = [r for r in told if r["host"] == rank["host"]]
    apart = any({**r, "rank": 0} != {**rank, "rank": 0} for r in alike)
    return f"rank {rank['rank']} of host {rank['host']}" if apart else f"host {rank['host']}"


# The exchange


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _alone() -> bool:
    """One process, or none that could be found: what is wrong with such a launch is told where it is made."""
    return _world() == 1 or "MASTER_ADDR" not in os.environ or "RANK" not in os.environ


def _who() -> dict[str, Any]:
    return {"rank": int(os.environ["RANK"]), "host": socket.gethostname()}


def _meet(told: dict[str, Any]) -> None:
    """Rank 0 hears all and answers. Raises Unlike at all ranks where they differ; one that leaves does not listen."""
    import torch.distributed

    dist: Any = torch.distributed
    rank, world = told["rank"], _world()
    # Of this start: torchrun's restarts may find the store that the last one used.
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE")
    prefix = "/".join(["imagenet-express", *(os.environ.get(name, "") for name in names)])
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=START_SECONDS)))
        own = dist.PrefixStore(prefix, store)
        _keep.append(store)  # rank 0 may be its server, which the process group will find again
        own.set(f"rank-{rank}", json.dumps(told))
        if rank == 0:
            code, reason = verdict([json.loads(_awaited(own, f"rank-{r}", f"rank {r}")) for r in range(world)])
            if code:  # whoever reads it ends, and launchers then end the other ranks
                heed_no_more()
            own.set("verdict", json.dumps([code, reason]))
            if code:
                _wait_for_readers(own, world)
        elif told.get("leaves"):
            return
        else:
            code, reason = json.loads(_awaited(own, "verdict", "rank 0"))
            if code:
                heed_no_more()
            own.set(f"read-{rank}", "")
    except dist.DistError as err:
        first = str(err).splitlines()[0]
        raise Unlike(f"rank {rank} lost the others before the start; their own lines say why ({first})", 1) from err
    if code:
        raise Unlike(reason, code)


_keep: list[Any] = []


def _awaited(store: Any, key: str, who: str) -> bytes:
    """A key's value; waits in portions, so that a signal is heard."""
    begun, told = time.monotonic(), False
    while not store.check([key]):
        waited = time.monotonic() - begun
        if waited > START_SECONDS:
            raise Unlike(f"{who} of {_world()} did not start within {START_SECONDS:.0f} seconds", CHECK_FAILED)
        if waited > NOTICE_SECONDS and not told:
            print(f"waiting for {who} of {_world()} to start", file=sys.stderr, flush=True)
            told = True
        time.sleep(min(0.02 + waited / 20, 1.0))
    value: bytes = store.get(key)
    return value


def _wait_for_readers(store: Any, world: int) -> None:
    def known(rank: int) -> bool:
        return bool(store.check([f"read-{rank}"])) or "leaves" in json.loads(store.get(f"rank-{rank}"))

    _until(lambda: all(known(rank) for rank in range(1, world)), seconds=ACK_SECONDS)


def _until(condition: Callable[[], bool], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# What they share


def sees(path: Path, text: str, *, seconds: float = 35.0) -> bool:
    """Whether a file that another host has written can be read here. NFS may take half a minute to show it."""

    def there() -> bool:
        try:
            return path.read_text() == text
        except OSError:
            return False

    return _until(there, seconds=seconds)


def name_interface() -> None:
    """Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that leads to rank 0's host, on several hosts.

    A variable that is set stays. Gloo would take the interface of the host's own name, on many machines the loopback;
    NCCL the first one it finds, which another host may not reach. If only gloo's is set, NCCL gets the same interface.
    """
    if _world() <= int(os.environ.get("LOCAL_WORLD_SIZE", _world())):
        return
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    name = name or interface_to(os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "1")))
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault(
            "NCCL_SOCKET_IFNAME", f"={name}"
        )  # "=": NCCL takes a plain name as a prefix, eth1 of eth10


SIOCGIFADDR = 0x8915


def interface_to(host: str, port: int) -> str | None:
    """The interface whose IPv4 address packets to `host` leave from; None where that is the loopback or unknown."""
    with contextlib.suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl

        probe.connect((host, port))  # sends nothing
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address and not address.startswith("127."):
                    return name
    return None
