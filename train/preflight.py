"""Checks that all ranks of a run have the same data, configuration, code and versions, before they form a group.

Each rank sends its facts to rank 0 through the launcher's store. Rank 0 compares them; then all ranks continue, or all
exit with one line that names the host and what differs there. Nothing has been written at that point, and no collective
waits for a missing rank. Costs two messages per rank.
"""

import datetime
import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import BAD_DATA, USAGE, ExpressError, StorageError, first_line
from pipeline.files import Json, read_object
from pipeline.manifest import Dataset
from pipeline.settings import PER_HOST, flatten, marked

from . import environment
from .config import Config
from .environment import launched, world_size
from .signals import heed_no_more

START_SECONDS = 600.0  # time for all ranks to start: on a host's first start, torch is read from a slow disk
NOTICE_SECONDS = 20.0
ACK_SECONDS = 10.0  # rank 0, whose launcher may hold the store, waits this long for the others to read the verdict
SHARED_SECONDS = 35.0
FINGERPRINT = "the dataset's fingerprint"
CURE = "start the same command, with the same versions and shards, on every host"


def open_alike(config: Config) -> Dataset:
    """Opens the dataset and checks that all ranks start the same run. Raises ExpressError, the same at all ranks."""
    if _alone():
        return config.data.open()
    name_interface()
    dataset, found = None, Json()
    try:
        dataset = config.data.open()
        found["facts"] = facts(config, dataset)
    except (ExpressError, OSError) as err:
        known = StorageError.of(err, config.data.shards)
        found |= {"error": str(known), "code": known.code}
    _meet(found)
    assert dataset is not None  # otherwise _meet has raised
    return dataset


def report_rejection(err: ExpressError) -> None:
    """Reports to the other hosts, whose command lines may be valid, that this rank was rejected and will not join."""
    if _alone() or not _several_hosts():
        return  # the ranks of one host read the same line
    with suppress(Exception):  # only spares the others a long wait; this rank's own line says all
        _meet({"error": str(err), "code": err.code, "leaves": True})


def facts(config: Config, dataset: Dataset) -> Json:
    """Returns everything that determines the numbers a rank computes, by the names used in messages."""
    return {
        FINGERPRINT: dataset.fingerprint,
        "imagenet-express": environment.version("imagenet-express"),
        "the code of pipeline, model and train": code_digest(),
        "python": platform.python_version(),
        **{name: environment.version(name) for name in environment.PACKAGES},
        "the launcher's --mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "ACCELERATE_USE_CPU": os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"),
        **{name: value for name, value in flatten(config).items() if name not in marked(Config, PER_HOST)},
    }


def code_digest() -> str:
    """A hash of all our code that a run executes, committed or not."""
    digest = hashlib.sha256()
    for package in ("model", "pipeline", "train"):
        for path in sorted((environment.ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(environment.ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def verdict(ranks: list[Json]) -> tuple[int, str]:
    """(0, "") if all ranks' facts are equal, otherwise an exit code and a line. ranks: what each has found, by rank."""
    failed = [rank for rank in ranks if "error" in rank]
    if failed:
        alike = len(failed) == len(ranks) and len({rank["error"] for rank in failed}) == 1
        return failed[0]["code"], f"{'' if alike else _name(failed[0], ranks) + ': '}{failed[0]['error']}"
    ours = ranks[0]["facts"]
    others = [rank for rank in ranks if rank["facts"] != ours]
    if not others:
        return 0, ""
    theirs = others[0]["facts"]
    names = [n for n in dict.fromkeys([*ours, *theirs]) if ours.get(n) != theirs.get(n)]
    shown = "; ".join(f"{n}={theirs.get(n)} but {ours.get(n)}" for n in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    hosts = len({rank["host"] for rank in others}) - 1
    also = f" (as {hosts} other host{'s' if hosts > 1 else ''})" if hosts else ""
    code = BAD_DATA if names == [FINGERPRINT] else USAGE
    return code, f"{_name(others[0], ranks)} differs from {_name(ranks[0], ranks)}{also}: {shown}{more}; {CURE}"


def _name(rank: Json, ranks: list[Json]) -> str:
    """Returns the host's name, with the rank if ranks on this host, or hosts of this name, have different facts."""
    same_host = [r for r in ranks if r["host"] == rank["host"]]
    apart = any({**r, "rank": 0} != {**rank, "rank": 0} for r in same_host)
    return f"rank {rank['rank']} of host {rank['host']}" if apart else f"host {rank['host']}"


# The exchange


def _alone() -> bool:
    """Whether there is only one process, or no connection to the others, which make_accelerator reports."""
    return world_size() == 1 or not {"MASTER_ADDR", "RANK"} <= os.environ.keys()


def _several_hosts() -> bool:
    return world_size() > launched("LOCAL_WORLD_SIZE", world_size())


def _meet(found: Json) -> None:
    """Exchanges facts: rank 0 reads each rank's and publishes its verdict. Raises ExpressError if they differ."""
    import torch.distributed

    dist: Any = torch.distributed
    rank, world, (code, reason) = launched("RANK"), world_size(), (0, "")
    found |= {"rank": rank, "host": socket.gethostname()}
    # A new key for each start: after a restart by torchrun the store still holds the previous keys.
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE")
    prefix = "/".join(["imagenet-express", *(os.environ.get(name, "") for name in names)])
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=START_SECONDS)))
        own = dist.PrefixStore(prefix, store)
        _keep.append(store)  # rank 0 may be its server, which the process group will find again
        own.set(f"rank-{rank}", json.dumps(found))
        if rank == 0:
            code, reason = verdict([_awaited(own, f"rank-{r}", f"rank {r}") for r in range(world)])
        elif not found.get("leaves"):
            code, reason = _awaited(own, "verdict", "rank 0")
        if code:
            heed_no_more()  # a rank that reads the verdict exits, and launchers then signal the other ranks
        if rank:
            own.add("read", 1)
        else:
            own.set("verdict", json.dumps([code, reason]))
            if code:  # this process may hold the store
                _until(lambda: own.add("read", 0) == world - 1, seconds=ACK_SECONDS)
    except dist.DistError as err:
        raise ExpressError(
            f"rank {rank} lost the others before the start; their own lines say why ({first_line(err)})"
        ) from err
    if code:
        raise ExpressError(reason, code=code)


_keep: list[Any] = []


def _awaited(store: Any, key: str, who: str) -> Any:
    """Waits for a key's value, in short sleeps, so that signals are handled."""

    if not _until(lambda: store.check([key]), seconds=NOTICE_SECONDS):
        print(f"waiting for {who} of {world_size()} to start", file=sys.stderr)
        if not _until(lambda: store.check([key]), seconds=START_SECONDS - NOTICE_SECONDS):
            raise ExpressError(f"{who} of {world_size()} did not start within {START_SECONDS:.0f} seconds")
    return json.loads(store.get(key))


def _until(condition: Callable[[], bool], *, seconds: float) -> bool:
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        if waited > seconds:
            return False
        time.sleep(min(0.02 + waited / 20, 1.0))
    return True


# The hosts' shared storage and network


def sees(path: Path, values: Json) -> bool:
    """Whether this host can read `values`, which another host wrote to `path`. NFS may take half a minute."""
    return _until(lambda: read_object(path) == values, seconds=SHARED_SECONDS)


def name_interface() -> None:
    """Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if unset, to the interface that leads to rank 0's host.

    Only for several hosts. By default, gloo uses the interface of the host's own name, often the loopback, and NCCL the
    first one it finds, which other hosts may not reach. If only gloo's is set, NCCL gets the same interface. Debian
    gives a host's own name the address 127.0.1.1, so rank 0's host takes the interface of its default route.
    """
    if not _several_hosts():
        return
    if name := (
        os.environ.get("GLOO_SOCKET_IFNAME")
        or interface_to(os.environ["MASTER_ADDR"], launched("MASTER_PORT", 1))
        or interface_to("192.0.2.1", 1)  # no host has this address (RFC 5737)
    ):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # "=": NCCL takes a plain name for a prefix, and eth1 for eth10 too.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def interface_to(host: str, port: int) -> str | None:
    """Returns the network interface used for packets to `host`; None if it is the loopback or unknown."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        address = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(a.address == address for a in addresses) and not address.startswith("127."):
                return name
    return None
