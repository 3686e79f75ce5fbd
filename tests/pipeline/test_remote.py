"""Shards at URLs: the right ids and pixels from servers that fail, or a clear error. Loopback only."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import AugmentConfig, ConfigError, DataError, Loader, LoaderConfig, StorageError, cuts, open_dataset
from pipeline.manifest import Split
from pipeline.read import cutter as cutter_module
from pipeline.read import stages
from pipeline.read.fetch import COLUMNS, OFFSET, SHARD, SIZE, Rows
from pipeline.read.plan import Plan
from pipeline.shards import Shard
from pipeline.storage import absolute, check_url
from pipeline.write.cuts import make_cuts
from tests.conftest import ROOT, run_here, run_tool
from tests.pipeline.conftest import CANARY
from tests.pipeline.test_bad_samples import damage
from tests.pipeline.web_server import WebServer, serving
from tools import evaluate

pytest.importorskip("obstore", reason="pip install -e '.[test]'")

from pipeline import remote
from pipeline.read import reader, remote_reader
from pipeline.read.remote_reader import chunks, expected_requests, requests, shards_of_a_chunk

VIEW = AugmentConfig(resize=256, crop=224)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "AT_OPENING", 1.0)
    monkeypatch.setattr(remote, "PATIENCE", 5.0)
    monkeypatch.setattr(remote, "REJECTED", 0.3)


@pytest.fixture
def web(shards, tmp_path):
    with serving(shutil.copytree(shards["jpeg"], tmp_path / "served")) as server:
        yield server


def opened(server: WebServer, **options):
    return open_dataset(server.url, allow_http=True, **options)


def two_epochs(dataset, *, backend: str = "portable", **options) -> list[tuple[list[int], torch.Tensor]]:
    settings = {"batch": 4, "seed": 3, "dtype": "uint8", "augment": VIEW, "config": LoaderConfig(backend=backend)}
    with Loader(dataset, **settings | options) as loader:
        return [(batch.ids.tolist(), batch.images.clone()) for _ in range(2) for batch in loader]


def assert_same(found, wanted) -> None:
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(found, wanted, strict=True))


# What is delivered


@pytest.mark.parametrize("backend", ["portable", "dali-cpu"])
@pytest.mark.parametrize("memory", [0.1, 2000])
def test_a_web_server_gives_the_ids_and_pixels_of_a_folder(shards, web, backend, memory):
    wanted = two_epochs(shards["jpeg"], backend=backend, window=2)
    assert_same(two_epochs(opened(web, fetch_memory=memory), backend=backend, window=2), wanted)


@pytest.mark.parametrize("fault", ["cut", "delay", "503", "wrong"])
def test_requests_that_fail_change_no_id_and_no_pixel(shards, web, fault):
    failing = (6, 9) if fault == "wrong" else range(0, 1000, 3)
    web.fault = lambda number, name: fault if name.endswith(".tar") and number in failing else ""
    assert_same(two_epochs(opened(web, fetch_memory=0.1)), two_epochs(shards["jpeg"], window=16))


def test_bad_samples_are_replaced_as_in_a_folder(web, caplog):
    """A request that fails, or whose bytes are right the second time, makes no other sample bad."""
    damage(web.folder, [7, 8])
    options = {"config": LoaderConfig("portable", max_bad_samples=2), "window": 2}
    wanted = two_epochs(web.folder, **options)
    web.fault = lambda number, name: (
        {0: "503", 1: "wrong at first"}.get(number % 4, "") if name.endswith(".tar") else ""
    )
    assert_same(two_epochs(opened(web, fetch_memory=0.1), **options), wanted)
    assert not {i for ids, _ in wanted for i in ids} & {7, 8}
    assert sum("bad sample" in line for line in caplog.messages) == 4


def test_evaluation_sees_each_sample_once_over_ranks(web):
    dataset, ids = opened(web), []
    for rank in range(3):
        with Loader(dataset, split="val", batch=3, augment=VIEW, rank=rank, world=3) as loader:
            ids += [id_ for batch in loader for id_ in batch.ids.tolist()]
    assert ids == list(range(4))


def test_a_file_url_is_the_folder(shards, web):
    assert_same(two_epochs(f"file://{shards['jpeg']}"), two_epochs(shards["jpeg"], window=0))
    assert absolute("file://localhost/a%20b") == "/a b"
    assert absolute("file://a/b?c") == os.path.abspath("a/b?c")


def test_a_loader_resumes_at_every_step_wherever_the_shards_are(shards, web):
    wanted = two_epochs(shards["jpeg"], window=1)
    with Loader(shards["jpeg"], batch=4, seed=3, dtype="uint8", augment=VIEW, window=1) as local:
        states = [local.state_dict() for _ in local]
    with Loader(opened(web), batch=4, seed=3, dtype="uint8", augment=VIEW) as loader:
        for step, state in enumerate(states):
            loader.load_state_dict(state)
            assert loader.state_dict()["of"]["window"] == 1  # the state's, not the default of 16
            found = [(batch.ids.tolist(), batch.images.clone()) for batch in loader]
            assert_same(found, wanted[3:] if step == 2 else wanted[step + 1 : 3])


def test_the_mean_image_comes_along_and_ranks_learn_what_makes_fewer_requests(shards, web):
    view = dataclasses.replace(VIEW, normalize="mean-image")
    wanted = two_epochs(shards["jpeg"], window=16, augment=view, dtype="float32")
    assert_same(two_epochs(opened(web), augment=view, dtype="float32"), wanted)
    settings = {"batch": 4, "augment": VIEW, "world": 2}
    with Loader(opened(web), **settings) as alone, Loader(opened(web), partitions=2, **settings) as apart:
        assert alone.cost.endswith("over all ranks; --data.partitions 2 makes fewer")
        assert apart.cost.endswith("over all ranks")
        assert f"remote: {web.url}, window=16; an epoch takes about 9 requests" in alone.cost
    with Loader(opened(web, fetch_memory=0.1), batch=4, augment=VIEW) as poor:
        memory = float(re.fullmatch(r".*; --data.fetch-memory (\d+) makes fewer", poor.cost)[1])
        size = sum(shard.bytes for shard in poor.split.shards)
        assert memory == pytest.approx(16 / 7 * size / 1e6, abs=1)
    with Loader(shards["jpeg"], batch=4, augment=VIEW) as local:
        assert (local.cost, local.state_dict()["of"]["window"]) == ("", 0)


@contextmanager
def hub(storage: WebServer, commit: str):
    """A Hub with the dataset me/pets, whose files another server holds: (its URL, the headers of each request)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            return

        def do_GET(self) -> None:
            requests.append((self.path, self.headers.get("Authorization")))
            resolved = f"/datasets/me/pets/resolve/{commit}/in/it/"
            body = json.dumps({"sha": commit}).encode()
            if self.path.startswith(resolved):
                self.send_response(302)
                self.send_header("Location", f"{storage.url}/{self.path.removeprefix(resolved)}")
                body = b""
            else:
                self.send_response(200 if self.path == "/api/datasets/me/pets/revision/main" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def test_the_hub_gives_the_ids_and_pixels_of_a_folder_pinned_to_a_commit_and_its_storage_gets_no_token(
    shards, web, monkeypatch
):
    commit = "0123456789" * 4
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with hub(web, commit) as (url, requests):
        monkeypatch.setenv("HF_ENDPOINT", url)
        dataset = open_dataset("hf://datasets/me/pets/in/it", allow_http=True)
        assert str(dataset.remote) == f"hf://datasets/me/pets@{commit}/in/it"
        assert_same(two_epochs(dataset, window=2), two_epochs(shards["jpeg"], window=2))
        assert {token for _, token in requests} == {f"Bearer {CANARY}"}
        assert [path for path, _ in requests if commit not in path] == ["/api/datasets/me/pets/revision/main"]
        assert "range" in web.headers
        assert "authorization" not in web.headers
        for wrong in ("datasets/me/dogs/in/it", "datasets/me/pets@gone/in/it"):
            with pytest.raises(DataError, match=f"^hf://{wrong}: the Hub has no such dataset or revision"):
                open_dataset(f"hf://{wrong}", allow_http=True)
        with pytest.raises(ConfigError, match="write hf://datasets/OWNER/NAME/FOLDER"):
            open_dataset("hf://me/pets", allow_http=True)


# What is requested


@pytest.mark.parametrize("backend", ["portable", "dali-cpu"])
def test_cuts_at_a_url_are_fetched_beside_the_images(shards, web, backend, tmp_path):
    """Images whose places have not come yet, and all if they cannot be fetched, are decoded whole."""
    settings = {"backend": backend, "augment": AugmentConfig(resize=256, crop=64), "window": 2}
    wanted = two_epochs(shards["jpeg"], **settings)
    make_cuts(open_dataset(web.folder), workers=1)
    for fault, name in itertools.product(("403", "503", "delay", ""), ("cuts.json", ".cuts")):
        web.fault = lambda number, file, fault=fault, name=name: fault if file.endswith(name) else ""
        assert_same(two_epochs(opened(web), **settings), wanted)
    for fault in ("503", ""):
        web.fault = lambda number, file, fault=fault: fault if file.endswith(".cuts") else ""
        shutil.rmtree(tmp_path / "cache")
        config = LoaderConfig(backend)
        with Loader(opened(web), batch=4, augment=settings["augment"], config=config) as loader:
            stats = [(len(list(loader)), loader.stats())[1] for _ in range(20)]
        missed = [each["cuts_missed"] for each in stats]
        assert all(missed) if fault else missed[0] and not missed[-1]
        assert all(each["cut_seconds"] and each["cut_bytes"] for each in stats)


def test_records_of_cuts_that_could_write_elsewhere_or_end_a_run_are_not_used(web, tmp_path, caplog):
    make_cuts(open_dataset(web.folder), workers=1)
    path = web.folder / "cuts.json"
    record = json.loads(path.read_text())
    for file in record["splits"]["train"]:
        file["sha256"] = f"../{tmp_path.name}-elsewhere"
    for text in (json.dumps(record), "[" * 100_000):
        path.write_text(text)
        caplog.clear()
        two_epochs(opened(web))
        assert f"{web.url}/cuts.json cannot be read" in caplog.text
    assert {found.parent for found in tmp_path.rglob("*.cuts")} == {web.folder}


def test_shards_with_the_same_bytes_share_a_copy_of_their_cuts(web):
    make_cuts(open_dataset(web.folder), workers=1)
    path = web.folder / "cuts.json"
    record = json.loads(path.read_text())
    for file in record["splits"]["train"]:
        file["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    dataset = opened(web)
    assert len(cuts.open_cuts(dataset, dataset.split("train"))) == len(dataset.split("train").shards)


def test_files_of_cuts_are_requested_once_by_any_number_of_threads_and_not_after_closing(web, caplog, monkeypatch):
    make_cuts(open_dataset(web.folder), workers=1)
    web.fault = lambda number, file: "503" if file.endswith(".cuts") else ""
    dataset = opened(web)
    split = dataset.split("train")
    reader = remote_reader.RemoteReader(split)
    cutter, ids = cutter_module.open_cutter(dataset, split, reader), np.arange(4)
    asked, read = [], cutter._read
    monkeypatch.setattr(cutter, "_read", lambda shard: (asked.append(shard), read(shard)))
    rows, pixels = Rows(split.index)[ids], np.tile([0, 0, 8, 8], (4, 1))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: cutter.places(ids, rows, pixels), range(50)))
    assert len(asked) == len(set(asked))
    started = time.monotonic()
    reader.close()
    cutter.close()
    cutter._pool.shutdown(wait=True)
    assert time.monotonic() - started < 15  # a retry would take up to 30 s
    assert "cannot be read, tried" not in caplog.text


def test_opening_makes_no_request_for_a_shard_and_takes_an_index_once(web):
    indices = [split.index_name for split in opened(web).splits.values()]
    assert [name for name, _, _ in web.log] == ["manifest.json", *indices]
    opened(web)
    assert [name for name, _, _ in web.log[len(indices) + 1 :]] == ["manifest.json"]


def test_the_bytes_of_each_stage_are_counted(shards, web, monkeypatch):
    monkeypatch.setattr(reader, "WAITS_A_READ", float("inf"))  # a busy machine's disk seems slow: it is read ahead then
    for dataset in (opened(web), open_dataset(shards["jpeg"])):
        with Loader(dataset, batch=4, augment=VIEW, config=LoaderConfig("portable", prefetch_batches=1)) as loader:
            size, requested = int(loader.split.column("size").sum()), sum(end - start for _, start, end in web.ranges())
            for _ in loader:
                pass
            sums = loader._reader.stages._sums
            for _ in range(60):
                time.sleep(0.5)  # the next epoch's first batch; a function may be compiled first
                if loader.split.remote or sums["decode_bytes"] == sums["read_bytes"]:
                    break
            stats = loader.stats()
            assert size <= stats["decode_bytes"] <= 2 * size
            assert stats["decode_bytes"] == stats["read_bytes"] or loader.split.remote
            requested = sum(end - start for _, start, end in web.ranges()) - requested
            assert stats["fetch_bytes"] == requested
            assert bool(requested) == bool(loader.split.remote)
            assert all(stats[f"{name}_seconds"] > 0 for name in stages.NAMES if stats[f"{name}_bytes"])
            assert not any(value for name, value in loader._reader.stages.take().items())


def test_a_damaged_copy_of_an_index_is_replaced(web, tmp_path):
    opened(web)
    for path in (tmp_path / "cache").rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:-1])
    assert opened(web).split("train").samples == 12


def test_an_epoch_takes_each_shard_about_once_in_few_requests(web):
    dataset = opened(web)
    size = sum(shard.bytes for shard in dataset.split("train").shards)
    with Loader(dataset, batch=4, augment=VIEW, config=LoaderConfig(prefetch_batches=1)) as loader:
        iterator = iter(loader)
        next(iterator)
        # An epoch of 300 kB is one chunk, and the next epoch's is fetched while it is used.
        deadline = time.monotonic() + 20
        while len(web.ranges()) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
    ranges = web.ranges()
    assert len(ranges) == 6
    # Both epochs' requests may come in any order.
    assert sorted(name for name, _, _ in ranges) == sorted([shard.name for shard in loader.split.shards] * 2)
    assert sum(end - start for _, start, end in ranges) <= 2 * 1.05 * size
    assert loader.split.remote is not None


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=40),
    st.integers(0, 100),
    st.integers(1, 300),
    st.randoms(),
)
def test_each_image_lies_in_its_request_and_requests_hold_no_large_gap(images, gap, most, random):
    rows = np.zeros((len(images), len(COLUMNS)), np.int64)
    ends: dict[int, int] = {}
    for i, (shard, size) in enumerate(images):
        start = ends.get(shard, 0) + random.randrange(0, 120)
        rows[i, [SHARD, OFFSET, SIZE]] = shard, start, size
        ends[shard] = start + size
    random.shuffle(order := list(range(len(images))))
    rows = rows[order]
    found, of_image = requests(rows, gap=gap, most=most)
    shard, start, end = found[of_image].T
    assert (shard == rows[:, SHARD]).all()
    assert (start <= rows[:, OFFSET]).all()
    assert (end >= rows[:, OFFSET] + rows[:, SIZE]).all()
    first_use = [int(np.flatnonzero(of_image == number)[0]) for number in range(len(found))]
    assert first_use == sorted(first_use)
    for number, (_, start, end) in enumerate(found.tolist()):
        mine = rows[of_image == number]
        mine = mine[np.argsort(mine[:, OFFSET])]
        assert (start, end) == (mine[0, OFFSET], mine[-1, OFFSET] + mine[-1, SIZE])
        assert end - start <= most + mine[-1, SIZE]
        assert (mine[1:, OFFSET] - (mine[:-1, OFFSET] + mine[:-1, SIZE]) <= gap).all()
    if most > 40 * 180:  # nothing is split for its size: neighbours of one shard are further apart than the gap
        for one, two in itertools.pairwise(sorted(found.tolist())):
            assert one[0] != two[0] or two[1] - one[2] > gap


def test_chunks_hold_whole_steps_of_one_epoch_up_to_the_limit():
    rows = np.zeros((100, len(COLUMNS)), np.int64)
    rows[:, SIZE], rows[:, SHARD] = np.arange(1, 101), np.arange(100) // 25
    steps = [((epoch, step), np.arange(step * 10, step * 10 + 10)) for epoch in range(3) for step in range(10)]
    for limit, shards in ((64 * 60, 4), (64 * 60, 1), (10**6, 4), (10**6, 2)):
        found = list(
            itertools.takewhile(lambda chunk: chunk.steps[0][0] < 2, chunks(steps, rows, limit=limit, shards=shards))
        )
        assert [step for chunk in found for step in chunk.steps] == [step for step, _ in steps[:20]]
        assert np.concatenate([ids for chunk in found for ids in chunk.ids]).tolist() == list(range(100)) * 2
        assert (len(found[0].steps) == 1) == (limit < 10**6)
        for chunk in found:
            ids = np.concatenate(chunk.ids)
            assert len({epoch for epoch, _ in chunk.steps}) == 1
            assert len(chunk.steps) == 1 or rows[ids, SIZE].sum() <= limit
            assert len(set(rows[ids, SHARD].tolist())) <= max(shards, 2 * (len(chunk.steps) == 1))


@pytest.mark.parametrize(("partitions", "world", "window"), [(1, 1, 16), (2, 2, 16), (1, 2, 16), (4, 2, 16), (1, 1, 0)])
@pytest.mark.parametrize("megabytes", [50, 450])
def test_the_formula_of_requests_counts_those_of_an_epoch(partitions, world, window, megabytes):
    """1,024 shards of 100 images of 128 KiB: a window of 16 holds 212 MB."""
    shards, each, size, apart = 1024, 100, 131_072, 2_048
    rows = np.zeros((shards * each, len(COLUMNS)), np.int64)
    rows[:, SHARD], place = np.divmod(np.arange(len(rows)), each)
    rows[:, OFFSET], rows[:, SIZE] = place * (size + apart), size
    records = tuple(Shard(f"{i}.tar", each, each * (size + apart), "") for i in range(shards))
    split, limit = Split(Path(), "train", records, "", "", 2), megabytes * 1_000_000
    count = fetched = 0
    for rank in range(world):
        settings = {"partitions": partitions, "world": world, "window": window, "rank": rank, "seed": 0, "batch": 256}
        unused = {"augment": VIEW, "mean": np.zeros(3), "covariance": None, "check_every": 0}
        plan = Plan(split=split, train=True, first=0, **settings, **unused)
        steps = ((at, plan.ids(*at)) for at in plan.coordinates(0, 0))
        for chunk in chunks(steps, rows, limit=limit, shards=shards_of_a_chunk(plan, limit=limit)):
            if chunk.steps[0][0] == 0:  # begins with small chunks
                continue
            if chunk.steps[0][0] == 2:
                break
            found, _ = requests(rows[np.concatenate(chunk.ids)])
            count, fetched = count + len(found), fetched + int((found[:, 2] - found[:, 1]).sum())
    total = sum(shard.bytes for shard in records)
    assert count == pytest.approx(expected_requests(plan, limit=limit), rel=0.1, abs=0.01 * len(rows))
    assert fetched <= total


@pytest.mark.parametrize("backend", ["portable", "dali-cpu"])
def test_what_is_fetched_ahead_stays_within_the_memory(web, monkeypatch, backend):
    begin, taken, most = remote_reader.RemoteReader._begin, remote_reader.RemoteReader._taken, [0]

    def slow(*task):
        time.sleep(0.02)
        taken(*task)

    def watched(self, ids, rows):
        ahead = [sample for chunk in self._chunks for sample in chunk] + ids.tolist()
        most[0] = max(most[0], int(sizes[ahead].sum()))
        begin(self, ids, rows)

    monkeypatch.setattr(remote_reader.RemoteReader, "_taken", slow)
    monkeypatch.setattr(remote_reader.RemoteReader, "_begin", watched)
    dataset = opened(web, fetch_memory=0.4)
    sizes = np.array(dataset.split("train").index["size"])
    two_epochs(dataset, batch=1, backend=backend)
    assert 100_000 < most[0] <= 400_000


# What fails


def test_a_sample_that_stays_wrong_is_named_after_three_fetches(web):
    web.fault = lambda number, name: "wrong" if name.endswith(".tar") else ""
    with pytest.raises(DataError, match=r"/data/.*\.tar: sample \d+ at byte \d+: .*\(checksum\), fetched 3 times"):
        two_epochs(opened(web))


def test_a_lost_source_is_an_error_with_its_url_within_the_patience(web, monkeypatch):
    dataset = opened(web)
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    web.fault = lambda number, name: "503"
    started = time.monotonic()
    with pytest.raises(
        StorageError, match=rf"{web.url}/.*\.tar: cannot be read, tried for \d+ s: status code: 503"
    ) as err:
        two_epochs(dataset)
    assert err.value.code == 74
    assert time.monotonic() - started < 60  # 180 s unless it is changed


def test_a_server_that_does_not_run_is_an_error(tmp_path):
    with pytest.raises(StorageError, match=r"http://127.0.0.1:9/x/manifest.json: cannot be read, .*: no connection"):
        open_dataset("http://127.0.0.1:9/x", allow_http=True)


def test_a_server_that_ignores_ranges_is_an_error_at_once(web):
    dataset = opened(web)
    web.fault = lambda number, name: "whole"
    with pytest.raises(StorageError, match="the server ignores Range"):
        two_epochs(dataset)


def test_a_shard_that_is_replaced_cut_or_missing_is_named(web):
    dataset = opened(web)
    path = web.folder / dataset.split("train").shards[0].name
    with Loader(dataset, batch=4, augment=VIEW) as loader:
        list(loader)
        data = path.read_bytes()
        (web.folder / "new").write_bytes(data[:-1] + b"x")
        (web.folder / "new").replace(path)  # the loader reads ahead meanwhile
        with pytest.raises(DataError, match=f"{path.name}: was replaced while it was in use"):
            list(itertools.chain.from_iterable([loader] * 9))  # some tiny epochs were fetched ahead
    path.write_bytes(data[:-512])
    with pytest.raises(DataError, match=f"{path.name}: {len(data) - 512} bytes, {len(data)} in the manifest"):
        two_epochs(opened(web))
    path.write_bytes(data[:600])
    with pytest.raises(DataError, match=f"{path.name}: (ends before |600 bytes)"):
        two_epochs(opened(web))
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: there is no such object"):
        two_epochs(opened(web))


def test_a_wrong_index_at_a_url_is_named_by_its_url(web):
    index = next(web.folder.glob("*train*.npy"))
    index.write_bytes(index.read_bytes()[:-28])
    with pytest.raises(DataError, match=f"{web.url}/{index.name}: its bytes are not those in the manifest"):
        opened(web)


def test_a_url_that_is_no_data_set_is_one_line(web):
    with pytest.raises(DataError, match=f"{web.url}/elsewhere/manifest.json: there is no such object"):
        open_dataset(f"{web.url}/elsewhere", allow_http=True)
    (web.folder / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=f"{web.url}/manifest.json: cannot be read .* it is no manifest"):
        opened(web)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/x", "http://example.org/x: is not encrypted; .* --data.allow-http"),
        (f"https://me:{CANARY}@example.org/x", "https://example.org/x: leave user, password, \\?, # and .. out"),
        (f"https://example.org/x?sig={CANARY}", "https://example.org/x: leave user, password, \\?, # and .. out"),
        (f"s3://KEY:S/{CANARY}@box/x", "s3://box/x: leave user, password"),
        (f"https://me:p[{CANARY}@example.org:80/x", "https://example.org:80/x: leave user, password"),
        (f"https://example.org\uff0fx?sig={CANARY}", "x: names no bucket or server; write https://NAME/FOLDER"),
        ("HTTPS://example.org/x", "HTTPS://example.org/x: begin it with"),
        (
            "ftp://example.org/x",
            "ftp://example.org/x: begin it with s3://, gs://, az://, hf://, https://, or name a folder",
        ),
    ],
)
def test_urls_that_cannot_work_or_hold_secrets_are_rejected_without_them(url, message):
    with pytest.raises(ConfigError, match=message) as err:
        open_dataset(url)
    assert CANARY not in str(err.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://[fd00::1]:9000/box/x@v1",
        "https://host/a//b@c",
        "s3://box/a//b:c@d",
        "hf://datasets/me/x@v1/y",
        "s3://b/@",
    ],
)
def test_a_path_may_contain_what_separates_a_password_elsewhere(url):
    check_url(url, allow_http=True)


@pytest.mark.parametrize("profile", ["mine", ""])
def test_credentials_come_from_the_profile_or_are_not_sent(web, tmp_path, monkeypatch, profile):
    (tmp_path / "credentials").write_text(f"[mine]\naws_access_key_id = MYKEY\naws_secret_access_key = {CANARY}\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url.removesuffix("/data"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE" if profile else "AWS_SKIP_SIGNATURE", profile or "true")
    web.fault = lambda number, name: "403"
    with pytest.raises(StorageError, match="status code: 403 Forbidden; check the credentials") as err:
        open_dataset("s3://data", allow_http=True)
    assert ("Credential=MYKEY/" in web.rejected[0], "Credential" in web.rejected[0]) == (bool(profile), bool(profile))
    assert CANARY not in web.rejected[0] + str(err.value)
    monkeypatch.setenv("AWS_PROFILE", "of-nobody")
    with pytest.raises(ConfigError, match="AWS_PROFILE=of-nobody: gives no credentials"):
        open_dataset("s3://data", allow_http=True)
    with pytest.raises(ConfigError, match="az://box/x: settings in the environment are missing or wrong"):
        open_dataset("az://box/x")


def test_what_needs_the_shards_themselves_asks_for_a_copy_at_once(web, tmp_path, monkeypatch, capsys):
    asked = ("no-model", "--data.shards", web.url, "--data.allow-http", "--csv", tmp_path / "predictions.csv")
    code, line = run_here(evaluate.main, monkeypatch, capsys, *asked)
    assert (code, web.ranges()) == (2, [])
    assert line == f"error: {web.url}: the keys of samples are in the shards; copy them to this machine"


def test_closing_a_loader_does_not_wait_for_a_server_that_fails(web):
    dataset = opened(web)
    web.fault = lambda number, name: "503"
    loader = Loader(dataset, batch=4, augment=VIEW)
    with pytest.raises(StorageError):
        next(iter(loader))
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 3


def test_no_url_no_obstore():
    code = "import sys, pipeline.read.loader, train.config; sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# S3 and training


def test_s3_gives_the_ids_and_pixels_of_a_folder(shards, bucket):
    url = bucket(shards["keep"], "pets")
    with pytest.raises(StorageError, match=r"manifest.json: cannot be read, .* is not encrypted; .* --data.allow-http"):
        open_dataset(url)
    assert_same(two_epochs(open_dataset(url, allow_http=True)), two_epochs(shards["keep"], window=16))
    name = open_dataset(shards["keep"]).split("val").shards[0].name
    bucket.client.delete_object(Bucket="pets", Key=f"some/where/{name}")
    with pytest.raises(DataError, match=f"{url}/{name}: the shard is missing"):
        open_dataset(url, allow_http=True)


def test_training_from_s3_equals_training_from_a_folder_and_resumes_there(few_digits, bucket, tmp_path):
    url, local, moved = bucket(few_digits, "digits"), tmp_path / "local", tmp_path / "moved"
    fixed = ("--train.batch", 32, "--model.width", 0.125, "--loader.backend", "portable")
    text = train(few_digits, "--run.dir", local, "--data.window", 16, "--train.epochs", 2, *fixed)
    text += train(url, "--run.dir", moved, "--train.epochs", 1, *fixed)
    assert f"remote: {url}, window=16; an epoch takes about" in text
    assert json.loads((moved / "config.json").read_text())["shards"] == url
    text += train(few_digits, "--run.dir", moved, "--train.epochs", 2, *fixed)  # keeps the stored window
    assert json.loads((moved / "config.json").read_text())["config"]["data"]["window"] == 16
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((run / "checkpoints" / "step-00000022" / file).read_bytes() for run in (moved, local))
        assert ours == theirs
    assert_no_canary(text, tmp_path)


def test_a_source_that_is_lost_ends_a_run_with_74_and_no_secret_is_shown(few_digits, bucket, tmp_path, monkeypatch):
    with serving(few_digits) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.removesuffix("/data"))
        server.fault = lambda number, name: "403" if name.endswith(".tar") else ""
        printed = train("s3://data", "--run.dir", tmp_path / "run", code=74)
        assert CANARY in server.rejected[0]  # the answer held what must not be shown
    assert "error: s3://data/digits-train-000000.tar: cannot be read, tried for" in printed
    assert "status code: 403 Forbidden; check the credentials" in printed
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (record["code"], "s3://data/digits-train-000000.tar" in record["reason"]) == (74, True)
    assert_no_canary(printed, tmp_path)


def train(shards: object, *args: object, code: int = 0) -> str:
    """The output of a run."""
    done = run_tool("train/run.py", "demo", "--data.shards", shards, "--data.allow-http", *args)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def assert_no_canary(text: str, folder: Path) -> None:
    assert CANARY not in text
    for path in folder.rglob("*"):
        assert CANARY.encode() not in (path.read_bytes() if path.is_file() else b""), path
