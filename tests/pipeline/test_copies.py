"""Copies of whole shards on a local disk: the right ids and pixels at any size, after kills, and beside other files."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import AugmentConfig, ConfigError, DataError, Loader, LoaderConfig, StorageError, open_dataset
from pipeline.read import order, reader, shard_cache
from pipeline.read.byte_source import LocalShards
from pipeline.read.config import DataConfig
from pipeline.storage import Copies, file_size
from pipeline.write.build import build
from pipeline.write.plan import Options, Plan
from tests.conftest import ROOT, FewDigits, once
from tests.faults.test_damage import tmpfs
from tests.pipeline.test_bad_samples import damage
from tests.pipeline.web_server import WebServer, serving

pytest.importorskip("obstore", reason="pip install -e '.[test]'")

VIEW = AugmentConfig(resize=36, crop=32)
USERS = "0" * 64 + ".txt"


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Path:
    """356 training images in 18 shards, and 90 for validation in 5."""
    options = Options(samples_per_shard=20)
    return once(tmp_path_factory, "many", lambda out: build(Plan(FewDigits(side=36), options), out, workers=1))


@pytest.fixture
def web(many, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(many) as server:
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder for copies, with a file of the user's in it."""
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / USERS).write_text("mine")
    return tmp_path / "copies"


def copied(server: WebServer, folder: Path, *, size: float = float("inf"), wait: bool = True):
    return open_dataset(server.url, allow_http=True, copies=Copies(folder, size, wait))


def batches(dataset, *, epochs: int = 2, backend: str = "portable", **options) -> list[tuple[list[int], torch.Tensor]]:
    settings = {"batch": 16, "seed": 3, "dtype": "uint8", "augment": VIEW, "window": 3}
    with Loader(dataset, config=LoaderConfig(backend), **settings | options) as loader:
        return [(batch.ids.tolist(), batch.images.clone()) for _ in range(epochs) for batch in loader]


def assert_same(found, wanted) -> None:
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(found, wanted, strict=True))


def whole(folder: Path) -> dict[str, int]:
    """The sizes of the whole copies, by their names, with which their bytes are compared."""
    found = {path.stem: path.read_bytes() for path in folder.glob("*.tar")}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in found.items())
    assert (folder / USERS).read_text() == "mine"
    return {name: len(data) for name, data in found.items()}


def sizes(root: Path, split: str = "train") -> dict[str, int]:
    return {shard.sha256: shard.bytes for shard in open_dataset(root).split(split).shards}


def bytes_sent(server: WebServer) -> int:
    return sum(end - start for _, start, end in server.ranges())


# What is delivered and requested


@pytest.mark.parametrize("backend", ["portable", "dali-cpu"])
def test_an_epoch_copies_each_shard_once_and_the_next_run_requests_none(many, web, folder, backend):
    wanted = batches(many)
    for requested in (sum(sizes(many).values()), 0):
        assert_same(batches(copied(web, folder), backend=backend), wanted)
        assert (whole(folder), bytes_sent(web)) == (sizes(many), requested)
        web.log.clear()


@pytest.mark.parametrize("shards", [0.5, 1, 4, 10, 17])
def test_a_folder_smaller_than_the_set_or_than_a_shard_works(many, web, folder, shards, monkeypatch):
    """Within its limit: sizes are looked at whenever a copy was made."""
    limit, held = shards * max(sizes(many).values()), []
    copy = shard_cache.ShardCache._copy
    # By shard: a copy that gets its name meanwhile is listed by both.
    taken = lambda: sum({path.name[:64]: file_size(path) or 0 for path in folder.glob("*[lr]")}.values())  # noqa: E731
    monkeypatch.setattr(shard_cache.ShardCache, "_copy", lambda *args: [copy(*args), held.append(taken())])
    settings = {"batch": 16, "seed": 3, "dtype": "uint8", "augment": VIEW, "window": 3}
    with Loader(copied(web, folder, size=limit), config=LoaderConfig("portable"), **settings) as loader:
        assert_same([(b.ids.tolist(), b.images.clone()) for _ in range(2) for b in loader], batches(many))
        deadline = time.monotonic() + 60
        while len({*folder.glob("*.tar")}) != int(shards) or any(folder.glob("*.partial")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert max(held, default=0) <= limit
    assert len(whole(folder)) == int(shards)
    if shards >= 10:  # three windows: nothing is fetched twice in an epoch
        assert bytes_sent(web) <= 2 * 1.05 * sum(sizes(many).values())


@pytest.mark.parametrize("partitions", [1, 2])
def test_two_ranks_share_the_copies(many, web, folder, partitions):
    options = {"world": 2, "partitions": partitions}
    wanted = [batches(many, rank=rank, **options) for rank in range(2)]
    found = [None, None]

    def run(rank: int) -> None:
        found[rank] = batches(copied(web, folder), rank=rank, **options)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        assert_same(found[rank], wanted[rank])
    assert bytes_sent(web) == sum(sizes(many).values())


def test_a_copy_that_gets_its_name_while_the_folder_is_listed_is_not_fetched_again(many, web, folder, monkeypatch):
    batches(copied(web, folder))
    before, listed = bytes_sent(web), shard_cache.ShardCache._files
    stale = iter([({}, set())])  # as if all were still named as parts, and no longer locked
    monkeypatch.setattr(shard_cache.ShardCache, "_files", lambda cache: next(stale, None) or listed(cache))
    assert_same(batches(copied(web, folder)), batches(many))
    assert bytes_sent(web) == before
    assert not list(folder.glob("*.partial"))


def test_evaluation_uses_copies_and_spares_those_of_training(many, web, folder):
    assert_same(batches(copied(web, folder), epochs=1), batches(many, epochs=1))
    assert_same(batches(copied(web, folder), split="val", epochs=1), batches(many, split="val", epochs=1))
    assert whole(folder) == sizes(many) | sizes(many, "val")


@pytest.mark.parametrize("fault", ["cut", "503", "wrong"])
def test_requests_that_fail_change_nothing(many, web, folder, fault):
    failing = (5, 8) if fault == "wrong" else range(0, 1000, 3)
    web.fault = lambda number, name: fault if name.endswith(".tar") and number in failing else ""
    assert_same(batches(copied(web, folder)), batches(many))
    assert whole(folder) == sizes(many)


def test_a_shard_that_stays_wrong_is_not_copied_and_its_image_is_named(many, web, folder, tmp_path, caplog):
    web.folder = shutil.copytree(many, tmp_path / "served")
    damage(web.folder, [7])
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 7 at byte \d+: .* fetched 3 times"):
        batches(copied(web, folder))
    assert any("train-000000.tar: its sha256 is not the manifest's" in line for line in caplog.messages)


def test_a_shard_that_cannot_be_read_is_asked_for_once_and_ends_the_epoch(many, web, folder, tmp_path):
    web.folder = shutil.copytree(many, tmp_path / "served")
    with Loader(copied(web, folder), batch=16, seed=3, augment=VIEW, window=3) as loader:
        last = loader.split.shards[int(np.argmax(loader.plan.steps_until(0, 0)))]
        (web.folder / last.name).unlink()
        next(iter(loader))
        deadline = time.monotonic() + 60
        while len(whole(folder)) < 17 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert sum("range" in headers for headers in web.rejected) == 1  # the other one is for cuts.json
        with pytest.raises(DataError, match=f"{re.escape(last.name)}: there is no such object"):
            for _ in loader:
                pass


def test_what_was_copied_before_a_kill_is_kept_and_compared(many, web, folder):
    first, second = list(sizes(many).items())[:2]
    right = (many / open_dataset(many).split("train").shards[0].name).read_bytes()
    (folder / f"{first[0]}.{first[1]}.partial").write_bytes(right[: first[1] // 2])
    (folder / f"{second[0]}.{second[1]}.partial").write_bytes(bytes(second[1] // 2))  # after a power cut
    assert_same(batches(copied(web, folder)), batches(many))
    assert whole(folder) == sizes(many)
    assert bytes_sent(web) == sum(sizes(many).values()) - first[1] // 2 + second[1] // 2
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("backend", ["portable", "dali-cpu", "resident"])
@pytest.mark.parametrize("size", [0.5, 1], ids=["truncated", "damaged"])
@pytest.mark.parametrize("remote", [True, False], ids=["url", "folder"])
def test_a_damaged_copy_is_replaced(many, web, folder, caplog, remote, size, backend):
    for name, bytes_ in list(sizes(many).items())[:3]:
        (folder / f"{name}.tar").write_bytes(bytes(int(size * bytes_)))
    dataset = copied(web, folder) if remote else open_dataset(many, copies=Copies(folder))
    assert_same(batches(dataset, backend=backend), batches(many, backend=backend))
    assert sum(line.endswith(".tar: a damaged copy of a shard; deleted") for line in caplog.messages) == 3


@pytest.mark.parametrize("remote", [True, False], ids=["url", "folder"])
def test_a_folder_of_copies_that_disappears_ends_no_run(many, web, folder, caplog, remote, monkeypatch):
    wanted, size = batches(many), 6 * max(sizes(many).values())
    monkeypatch.setattr(reader, "COPIES_ASKED", 1)
    dataset = copied(web, folder, size=size) if remote else open_dataset(many, copies=Copies(folder, size))
    found, settings = [], {"batch": 16, "seed": 3, "dtype": "uint8", "augment": VIEW, "window": 3}
    with Loader(dataset, config=LoaderConfig("portable"), **settings) as loader:
        for _ in range(2):
            for batch in loader:
                found.append((batch.ids.tolist(), batch.images.clone()))
                if len(found) == 1:
                    folder.rename(folder.with_name("elsewhere"))
    assert_same(found, wanted)
    lines = [line for line in caplog.messages if "no more shards" in line]
    assert lines == [f"{folder}: No such file or directory; no more shards are copied"]


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_is_reported_and_the_rest_is_read_from_the_source(many, web, tmp_path, caplog, wait):
    with tmpfs(tmp_path / "small", "256k") as small:
        assert_same(batches(copied(web, small, wait=wait)), batches(many))
        assert 0 < len(list(small.glob("*.tar"))) < 18
    lines = [line for line in caplog.messages if "No space left on device" in line]
    assert lines == [f"{small}: No space left on device; no more shards are copied"]


# Staging


def test_a_staged_set_trains_before_it_is_copied_and_then_needs_no_source(many, folder, tmp_path, monkeypatch):
    source = shutil.copytree(many, tmp_path / "slow")
    go, read = threading.Event(), LocalShards.read

    def slow(self, shard, start, end):
        if end - start > 30_000:  # a piece of a shard, not an image
            go.wait(60)
        return read(self, shard, start, end)

    monkeypatch.setattr(LocalShards, "read", slow)
    wanted = batches(many, epochs=4)
    with Loader(
        open_dataset(source, copies=Copies(folder, wait=False)), batch=16, seed=3, dtype="uint8", augment=VIEW, window=3
    ) as loader:
        assert loader.cost == f"shards are copied to {folder}"
        found = [(batch.ids.tolist(), batch.images.clone()) for batch in loader]
        assert whole(folder) == {}
        go.set()
        deadline = time.monotonic() + 60
        while whole(folder) != sizes(many) and time.monotonic() < deadline:
            time.sleep(0.01)
        for path in source.glob("*.tar"):
            path.unlink()
        found += [(batch.ids.tolist(), batch.images.clone()) for _ in range(3) for batch in loader]
    assert_same(found, wanted)


def test_window_0_says_what_it_costs_and_staged_sets_have_windows(many, web, folder):
    for dataset in (copied(web, folder), open_dataset(many, copies=Copies(folder, wait=False))):
        with Loader(dataset, batch=16, augment=VIEW, window=0) as loader:
            assert loader.cost.endswith("with window=0 all are read all the time, from their source until copied")
        with Loader(dataset, batch=16, augment=VIEW) as loader:
            assert (loader.plan.window, "window=0" in loader.cost) == (16, False)
    assert_same(batches(copied(web, folder), window=0), batches(many, window=0))


def test_a_sample_is_named_while_only_a_copy_of_its_shard_exists(many, folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(many, source)
    with Loader(open_dataset(source, copies=Copies(folder)), batch=16, augment=VIEW, window=3) as loader:
        next(iter(loader))
        shard = loader.split.shards[0]
        assert loader.describe(0).startswith(f"{source / shard.name}: sample 0 ('")
        (source / shard.name).unlink()
        assert loader.describe(0) == f"{source / shard.name}: sample 0 at byte {loader.split.index[0]['offset']}"


def test_settings_of_copies(many, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.cache and data\.stage: name one of them"):
        DataConfig(str(many), cache="a", stage="b")
    with pytest.raises(ConfigError, match=r"data\.cache_size: name the folder of the copies too, by data\.cache"):
        DataConfig(str(many), cache_size=2, stage="b")
    assert DataConfig(str(many), stage="b").open().copies == Copies(Path("b"), wait=False)
    assert DataConfig(str(many), stage="~/b").open().copies == Copies(Path.home() / "b", wait=False)
    assert DataConfig(str(many), cache="a", cache_size=2).open().copies == Copies(Path("a"), 2e9)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"^{tmp_path}/file/copies: cannot hold copies of shards: Not a directory"):
        Loader(open_dataset(many, copies=Copies(tmp_path / "file" / "copies")), batch=4, augment=VIEW)


def test_two_shards_of_the_same_bytes_share_a_copy(many, web, folder, monkeypatch):
    monkeypatch.setattr(shard_cache, "LOCK_SECONDS", 0.1)
    web.fault = lambda number, name: "delay"
    with Loader(copied(web, folder), batch=16, augment=VIEW, window=3) as loader:
        cache = loader._reader.cache
        first, second, *rest = cache._shards
        cache._shards = (first, dataclasses.replace(second, sha256=first.sha256, bytes=first.bytes), *rest)
        cache._copies[1], cache._partial[1] = cache._copies[0], cache._partial[0]
        assert cache.request(loader.plan, 0, 0, needed=(0, 1)) == {0, 1}
        assert [cache.wait(0), cache.wait(1)] == [True, True]


def test_a_closed_loader_holds_no_file_of_the_source(many, folder):
    loader = Loader(open_dataset(many, copies=Copies(folder)), batch=16, augment=VIEW, window=3)
    for _ in loader:
        pass
    loader.close()
    held = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    assert not [path for path in held if path.startswith((f"{many}/", f"{folder}/")) and ".tar" in path]


# The plan


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda counts: sum(counts) >= 12),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_the_steps_of_a_shard_are_those_of_its_samples(counts, partitions, window, epoch):
    settings = {"batch": 6, "partitions": partitions, "window": window, "seed": 1, "epoch": epoch}
    first, last = order.shard_steps(np.cumsum(counts), **settings)
    shard = np.repeat(np.arange(len(counts)), counts)[order.epoch_order(np.cumsum(counts), **settings)].reshape(-1, 6)
    for number in range(len(counts)):
        steps = np.flatnonzero((shard == number).any(axis=1))
        if len(steps):  # a group's images are shuffled, so a shard's first may come later
            assert first[number] <= steps[0]
            assert last[number] >= steps[-1]


KILLED = """
import sys
from pathlib import Path
from pipeline import AugmentConfig, Loader, open_dataset
from pipeline.storage import Copies
view = AugmentConfig(resize=36, crop=32)
data = open_dataset(sys.argv[1], allow_http=True, copies=Copies(Path(sys.argv[2]), float(sys.argv[3])))
with Loader(data, batch=16, augment=view, window=3) as loader:
    print("ready", flush=True)
    for _ in range(3):
        for _ in loader:
            pass
"""


@pytest.mark.slow
def test_after_kills_at_random_moments_the_copies_are_right(many, web, folder):
    web.fault = lambda number, name: "delay" if number % 2 else ""
    limit, random_ = 6 * max(sizes(many).values()), random.Random(5)
    for _ in range(10):
        command = [sys.executable, "-c", KILLED, web.url, str(folder), str(limit)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(random_.uniform(0, 1))
        process.kill()
        process.wait()
        whole(folder)
    assert_same(batches(copied(web, folder, size=limit)), batches(many))
    assert sum(whole(folder).values()) <= limit
