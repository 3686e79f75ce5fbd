"""Distributes work over forked processes. A worker inherits its input; only its results are sent."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from .cores import usable_cores
from .errors import ConfigError, StorageError

STOP = signal.SIGUSR1

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def run(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int, place: object
) -> Iterator[Iterator[Result]]:
    """Opens an iterator over function(task) for each task, in order; runs in this process if one worker is enough.

    If the block or a task raises, the workers end at once. Raises StorageError, which names `place`, if a worker was
    killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield map(function, tasks)
        return
    with _forked(function, tasks, workers=workers, place=place) as results:
        yield results


@contextmanager
def _forked(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int, place: object
) -> Iterator[Iterator[Result]]:
    """As `run`, but always in other processes."""
    others = set(active_children())
    fork = get_context("fork")  # the function is inherited: sending ImageNet's plan would cost 100 MB
    with ProcessPoolExecutor(workers, mp_context=fork, initializer=_follow_parent, initargs=(function,)) as pool:
        # The signal would kill a worker that has no handler yet: it is blocked until the worker has one.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {STOP})
        try:
            results = pool.map(_call, tasks)  # forks
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield results
        except BrokenProcessPool as err:
            raise StorageError(
                f"{place}: a worker was killed, perhaps for want of memory; use fewer --workers"
            ) from err
        except BaseException:
            for worker in set(active_children()) - others:
                if worker.pid and worker.is_alive():
                    os.kill(worker.pid, STOP)
            pool.shutdown(cancel_futures=True)  # waits until the workers have removed their half-written files
            raise


def apart(function: Callable[[], Result], *, place: object) -> Result:
    """Calls function() in a forked process, so that its threads cannot break later forks. Raises as `run` does."""
    with _forked(lambda _: function(), [None], workers=1, place=place) as results:
        return next(results)


def worker_count(chosen: int) -> int:
    """The value of --workers; 0 means one for each usable core."""
    if chosen < 0:
        raise ConfigError(f"--workers {chosen}: must not be negative")
    return chosen or usable_cores()


class _Worker:
    """The state of a forked process."""

    function: Callable[[Any], Any]
    working = stopped = False


def _follow_parent(function: Callable[[Any], Any]) -> None:
    """Leaves Ctrl-C to the parent, and exits if the parent was killed, which the executor would not notice."""
    _Worker.function = staticmethod(function)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(STOP, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STOP})
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _stop(*_: object) -> None:
    """Ends the task, so that its half-written files are removed, but not while a result is being sent: the parent would
    wait forever for the rest of that result."""
    _Worker.stopped = True
    if _Worker.working:
        raise SystemExit


def _call(task: Any) -> Any:
    try:
        _Worker.working = True
        return None if _Worker.stopped else _Worker.function(task)
    except SystemExit:
        return None
    finally:
        _Worker.working = False
