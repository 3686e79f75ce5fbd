"""Distributes work over a Ray cluster, as pipeline/pool.py does over processes."""

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..decode import BadImage
from ..errors import ConfigError, ExpressError, StorageError
from ..pool import Result, Task
from ..storage import Folder
from .sources.base import Item, Source

CONNECT_SECONDS = 10.0
RETRIES = 3  # of a task whose worker was lost, or that could not read or write


@contextmanager
def run(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    place: Folder,
    source: Source,
    address: str,
) -> Iterator[Iterator[Result]]:
    """Opens an iterator over function(task) for each task, in order, on any node of a Ray cluster.

    address: of the cluster; "": that of the environment, or else `workers` on this machine. Checks first that each node
    can read the source's images and see `place`. Raises StorageError if a node cannot, or if workers are lost
    repeatedly; ConfigError without Ray or its cluster.
    """
    ray = _connected(address or os.environ.get("RAY_ADDRESS", ""), workers)
    try:
        shared = ray.put(function)  # once: it holds the plan. Before an image is read: open files cannot be sent
        _check_nodes(ray, source, place)
        call = ray.remote(max_retries=RETRIES, retry_exceptions=[OSError], scheduling_strategy="SPREAD")(_call)
        yield map(ray.get, [call.remote(shared, task) for task in tasks])
    except ray.exceptions.RayTaskError as err:
        raise err.cause from err
    except ray.exceptions.RayError as err:
        raise StorageError(f"{place}: Ray: {str(err).splitlines()[0]}") from err
    finally:
        ray.shutdown()


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    return function(task)


def _connected(address: str, workers: int) -> Any:
    try:
        import ray
    except ImportError as err:
        raise ConfigError("--executor ray: Ray is missing; pip install '.[ray]'") from err
    try:
        if host := re.fullmatch(r"(.+):(\d+)", address):
            socket.create_connection((host[1], int(host[2])), CONNECT_SECONDS).close()  # Ray itself tries for minutes
        ray.init(
            address or "local",
            logging_level="ERROR",
            log_to_driver=False,
            **({} if address else {"num_cpus": workers, "include_dashboard": False}),
        )
    except (OSError, ValueError, RuntimeError) as err:
        raise ConfigError(f"--ray-address {address}: no cluster ({err}); start one with `ray start --head`") from err
    return ray


def _check_nodes(ray: Any, source: Source, place: Folder) -> None:
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    nodes, shared = [node for node in ray.nodes() if node["Alive"]], ray.put(source)
    items = (item for items in source.splits.values() for item in items)
    readable = next((item for item in items if _read(source, item)), None)
    look = ray.remote(num_cpus=0)(_missing_there)
    missing = [
        look.options(scheduling_strategy=pinned(node["NodeID"], soft=False)).remote(shared, readable, place)
        for node in nodes
    ]
    for node, what in zip(nodes, ray.get(missing)):
        if what:
            raise StorageError(f"node {node['NodeManagerHostname']}: {what}; mount it there, or leave the node out")


def _read(source: Source, item: Item) -> bool:
    try:
        return bool(source.read(item))
    except (BadImage, OSError):
        return False


def _missing_there(source: Source, item: Item | None, place: Folder) -> str:
    try:
        if not place.is_visible():
            return f"{place} is not visible"
    except ExpressError as err:
        return str(err)
    return "" if item is None or _read(source, item) else f"the source's {item.where} cannot be read"
