"""Workers return results in order, and end at once if a task fails, a worker is killed or the caller stops."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from pipeline import pool
from pipeline.errors import ConfigError, StorageError


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks(tmp_path, workers):
    def slow_first(number):
        time.sleep(0.2 * (number == 0))
        return number, os.getpid()

    with pool.run(slow_first, range(9), workers=workers, place=tmp_path) as results:
        found = list(results)
    assert [number for number, _ in found] == list(range(9))
    assert (os.getpid() in {process for _, process in found}) == (workers == 1)


def test_a_failed_task_ends_the_others_at_once_even_while_they_send_large_results(tmp_path):
    def work(number):
        if number == 1:
            raise ZeroDivisionError("on purpose")
        if number == 2:
            try:
                (tmp_path / "begun").touch()
                time.sleep(600)
            finally:
                (tmp_path / "ended").touch()
        return np.zeros(1 << 22)

    started = time.monotonic()
    with (
        pytest.raises(ZeroDivisionError, match="on purpose"),
        pool.run(work, range(40), workers=3, place=tmp_path) as results,
    ):
        list(results)
    assert time.monotonic() - started < 200
    assert (tmp_path / "begun").exists() == (tmp_path / "ended").exists()


def test_a_killed_worker_is_named_with_the_cure(tmp_path):
    def work(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with (
        pytest.raises(StorageError, match=rf"{tmp_path}: a worker was killed.*use fewer --workers"),
        pool.run(work, range(5), workers=2, place=tmp_path) as results,
    ):
        list(results)


def interrupted_after_one(results):
    next(results)
    raise KeyboardInterrupt


def test_a_caller_that_stops_early_does_not_wait_for_the_rest(tmp_path):
    started = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        pool.run(lambda number: time.sleep(600 * number), range(50), workers=2, place=tmp_path) as results,
    ):
        interrupted_after_one(results)
    assert time.monotonic() - started < 200


def test_a_function_apart_ends_with_its_caller_and_is_named_if_it_is_killed(tmp_path):
    assert pool.apart(os.getpid, place=tmp_path) != os.getpid()
    with pytest.raises(StorageError, match=rf"{tmp_path}: a worker was killed"):
        pool.apart(lambda: os.kill(os.getpid(), signal.SIGKILL), place=tmp_path)
    started = time.monotonic()
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pool.apart(lambda: time.sleep(600), place=tmp_path)
    assert time.monotonic() - started < 200


def test_workers_are_counted(monkeypatch):
    monkeypatch.setattr(pool, "usable_cores", lambda: 7)
    assert (pool.worker_count(0), pool.worker_count(3)) == (7, 3)
    with pytest.raises(ConfigError, match="--workers -1: must not be negative"):
        pool.worker_count(-1)
