"""How the loader ends, and how it handles failures in its threads and of its files."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from pipeline import AugmentConfig, DataError, Loader, LoaderConfig
from pipeline.read import checksum, kernels, portable, reader
from pipeline.read.checksum import crc32
from pipeline.read.truncate_jpeg import cut_short
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import Digits
from tests.conftest import ROOT, picture
from tests.pipeline.test_dali import jpeg, poisoned
from tests.pipeline.test_parity import dataset_of, encode

VIEW = AugmentConfig(resize=16, crop=12)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 small images."""
    rng = np.random.default_rng(0)
    images = [encode(picture(rng, *rng.integers(16, 40, 2)), "JPEG", quality=90) for _ in range(1000)]
    return dataset_of(images, tmp_path_factory.mktemp("thousand"))


@pytest.fixture(params=["portable", "dali-cpu"])
def backend(request) -> LoaderConfig:
    return LoaderConfig(backend=request.param)


@pytest.mark.parametrize("world", [1, 3, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 5))])
def test_evaluation_of_a_thousand_images_counts_a_thousand(thousand, world, backend):
    ids = []
    for rank in range(world):
        with Loader(
            thousand, batch=96, train=False, rank=rank, world=world, dtype="uint8", augment=VIEW, config=backend
        ) as loader:
            ids += [i for batch in loader for i in batch.ids.tolist()]
    assert len(ids) == len(set(ids)) == 1000


@pytest.mark.parametrize("close", ["close", "leave"])
def test_ctrl_c_ends_everything_at_once(thousand, backend, close):
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/pipeline/endless.py"), str(thousand), backend.backend, close],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(3):
        assert process.stdout.readline() == "batch\n", process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert "KeyboardInterrupt" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process of its session is left
    assert set(os.listdir("/dev/shm")) <= before


def take(loader, batches: int) -> None:
    for _ in range(batches):
        next(iter(loader))


def fail(*args, **kwargs):
    raise ZeroDivisionError("on purpose")


def test_an_exception_while_planning_reaches_the_caller(thousand, backend, monkeypatch):
    with Loader(thousand, batch=32, augment=VIEW, config=backend) as loader:
        next(iter(loader))
        monkeypatch.setattr(loader.plan, "step", fail)
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            take(loader, 40)


def test_an_exception_while_reading_reaches_the_caller(thousand, backend, monkeypatch):
    with Loader(thousand, batch=32, augment=VIEW, config=backend) as loader:
        monkeypatch.setattr(reader, "fetch_images", fail)  # in the threads that read ahead
        monkeypatch.setattr(portable, "fetch_images", fail)
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            next(iter(loader))


def test_what_the_fast_decoder_rejects_is_given_whole_to_pillow(thousand, monkeypatch):
    def crops(loader):
        return {i: image for batch in loader for i, image in zip(batch.ids.tolist(), batch.images.numpy())}

    make = lambda: Loader(thousand, batch=96, augment=VIEW, dtype="uint8", config=LoaderConfig("portable"))  # noqa: E731
    with make() as loader:
        expected = crops(loader)

    def reject(*args, **kwargs):
        raise ValueError("on purpose")

    for module in ("decode", "read.portable"):
        monkeypatch.setattr(f"pipeline.{module}.decode_jpeg", reject)
    with make() as loader:
        got = crops(loader)
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[i], expected[i]) for i in got)


def test_an_exception_while_decoding_reaches_the_caller_with_its_cause(thousand, monkeypatch):
    with Loader(thousand, batch=32, augment=VIEW, config=LoaderConfig("portable")) as loader:
        monkeypatch.setattr("pipeline.read.portable.decode_jpeg", fail)
        with pytest.raises(DataError, match=r"cannot be decoded .*on purpose") as caught:
            next(iter(loader))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        monkeypatch.undo()
        monkeypatch.setattr(loader._engine, "_crop", fail)
        with pytest.raises(ZeroDivisionError):
            next(iter(loader))
        monkeypatch.undo()


def test_memory_stays_as_it_is_over_20_epochs(thousand, backend):
    def resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    seen = []
    with Loader(thousand, batch=100, augment=VIEW, config=backend) as loader:
        for _ in range(20):
            for _batch in loader:
                pass
            seen.append(resident())
    assert seen[-1] - seen[4] < 8


class Waits(threading.local):
    """Replaces `resource` in the reader: `count` is how often this thread had to wait."""

    count = 0
    RUSAGE_THREAD = resource.RUSAGE_THREAD

    def getrusage(self, who: int) -> SimpleNamespace:
        return SimpleNamespace(ru_minflt=0, ru_nvcsw=self.count)


def test_slow_storage_is_read_ahead_by_many_threads_and_fast_storage_by_none(thousand, monkeypatch):
    fetch_images, together, waits = reader.fetch_images, threading.Barrier(32, timeout=60), Waits()
    waiting = iter(range(32))

    def slow_block(buffer, at, fds, *args):
        waits.count += sum(fd >= 0 for fd in fds)
        if threading.current_thread().name.startswith("express-read") and next(waiting, None) is not None:
            together.wait()  # passes once 32 threads read at the same time
        return fetch_images(buffer, at, fds, *args)

    def readers():
        return sum(t.name.startswith("express-read") for t in threading.enumerate())

    monkeypatch.setattr(reader, "resource", waits)
    with Loader(thousand, batch=128, augment=VIEW, config=LoaderConfig("portable")) as loader:
        assert len(list(loader)) == 7
        assert readers() == 0
    monkeypatch.setattr(portable, "fetch_images", slow_block)
    monkeypatch.setattr(reader, "fetch_images", slow_block)
    with Loader(thousand, batch=128, augment=VIEW, config=LoaderConfig("portable")) as loader:
        for epoch in range(2):  # from the second epoch on at the latest, the reader knows that storage is slow
            expected = loader.ids(epoch, 2).tolist()
            assert [b.ids.tolist() for b in loader][2] == expected
        assert readers() == 32
    assert next(waiting, None) is None


def test_a_shard_that_shrinks_under_the_decoding_threads_is_named_and_ends_no_process(thousand, tmp_path):
    root = shutil.copytree(thousand, tmp_path / "copy")
    with Loader(root, batch=32, augment=VIEW, config=LoaderConfig("portable")) as loader:
        next(iter(loader))
        os.truncate(root / "x.tar", 2000)
        with pytest.raises(DataError, match=r"x\.tar: sample .*: the shard ends before it"):
            take(loader, 40)


@njit
def compiled_crc32(data, start, size):
    return crc32(np.uint32(0), np.uintp(data.ctypes.data + start), np.uint32(size))


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3))
def test_the_checksum_in_compiled_code_is_zlibs(data, repeat):
    data = data * (1 + repeat * 7)
    whole = np.frombuffer(b"before" + data + b"after", np.uint8).copy()
    assert compiled_crc32(whole, 6, len(data)) == zlib.crc32(data)
    assert checksum.by_zlib(0, whole.ctypes.data + 6, len(data)) == zlib.crc32(data)


@settings(deadline=None)
@given(
    st.sampled_from([{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"restart_marker_rows": 1}]),
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=3),
    st.integers(0, 800),
)
def test_a_jpeg_cut_short_has_the_same_rows_and_a_damaged_one_harms_nobody(options, rows, damage, keep):
    image = encode(picture(np.random.default_rng(0), 40, 64), "JPEG", quality=90, **options)
    data = bytearray(image)
    for at, value in damage:
        data[at % len(data)] = value
    data = data[: len(data) - keep if damage else None]
    whole = np.frombuffer(b"before" + data + b"after", np.uint8).copy()
    out = whole[6 : 6 + len(data)]
    cut = cut_short(out, 40, 64, rows)
    assert whole.tobytes().startswith(b"before")
    assert whole.tobytes().endswith(b"after")
    if damage:
        return
    assert cut == ("progressive" not in options)
    if cut:
        whole = simplejpeg.decode_jpeg(image)
        top = simplejpeg.decode_jpeg(out, strict=False)
        assert top.shape == (rows, 40, 3)
        exact = rows if rows == 64 else rows - 4
        assert np.array_equal(top[: max(exact, 0)], whole[: max(exact, 0)])


@pytest.mark.parametrize("backend", ["portable", "dali-cpu"])
def test_a_jpeg_without_its_end_is_bad_though_the_crop_needs_only_rows_above_it(backend, tmp_path):
    view, whole = AugmentConfig(resize=64, crop=16), jpeg(64)
    root = poisoned(tmp_path, whole[: len(whole) * 9 // 10], side=64, count=8, at=3)
    with Loader(root, batch=8, train=False, augment=view, config=LoaderConfig(backend, max_bad_samples=1)) as loader:
        assert next(iter(loader)).ids.tolist() == [0, 1, 2, 4, 5, 6, 7]


WITHOUT_ZLIB_NG = """
import sys
sys.modules["zlib_ng"] = None
from pipeline.read import checksum
assert checksum._fastest() is checksum.by_zlib
from pipeline import AugmentConfig, Loader, LoaderConfig
with Loader(sys.argv[1], batch=4, augment=AugmentConfig(), config=LoaderConfig("portable")) as loader:
    assert len(list(loader)) == 3
"""


def test_without_zlib_ng_zlib_verifies(monkeypatch):
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    assert checksum._fastest() is checksum.by_zlib


@pytest.mark.slow
def test_without_zlib_ng_images_are_verified_all_the_same(shards):
    subprocess.run([sys.executable, "-c", WITHOUT_ZLIB_NG, str(shards["keep"])], cwd=ROOT, check=True)


@pytest.mark.parametrize("kind", ["keep", "raw"])
def test_a_changed_byte_is_found_in_the_threads_that_decode(shards, tmp_path, kind):
    root = tmp_path / "copy"
    if kind == "raw":
        build(Plan(Digits(side=20), Options(Encoding("raw", 20, square=True))), root, workers=1)
    else:
        shutil.copytree(shards["keep"], root)
    view = AugmentConfig(resize=20, crop=16)
    with Loader(root, batch=4, augment=view, config=LoaderConfig("portable")) as loader:
        expected = [batch.images for batch in loader]
        split, sample = loader.split, int(loader.ids(1, 0)[2])
        row = split.index[sample]
        with open(root / split.shards[row["shard"]].name, "r+b") as file:
            file.seek(row["offset"] + row["size"] - 9)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(DataError, match=rf"sample {sample} .*checksum"):
            take(loader, 800)
    assert all(images.float().std() > 0 for images in expected)


def test_machine_code_that_cannot_be_kept_is_made_anew(monkeypatch):
    from pipeline import jit

    real = jit.numba.njit

    def homeless(*args, cache=False, **kwargs):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **kwargs)

    monkeypatch.setattr(jit.numba, "njit", homeless)
    assert jit.compiled(lambda x: x + 1)(1) == 2
    assert kernels.triangle(0.0, 1.0, 4, 4, False).taps == 4
