"""The reader: bytes by offset, with verified checksums."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from zlib_ng import zlib_ng

from pipeline import manifest
from pipeline.errors import DataError, StorageError
from pipeline.read import byte_source, fetch, reader
from pipeline.read.fetch import ALL_ROWS, COLUMNS, SIZE, Rows, fetch_images
from pipeline.read.reader import Reader
from pipeline.shards import INDEX_DTYPE
from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import ImageFolder


@pytest.fixture
def split(shards, tmp_path):
    copy = shutil.copytree(shards["keep"], tmp_path / "copy")
    return manifest.open_dataset(copy).split("train")


def test_batches_in_flight_do_not_disturb_each_other_and_buffers_are_reused(split):
    r = Reader(split, threads=4, always_ahead=True)
    rng = np.random.default_rng(0)
    buffers = set()
    for _ in range(20):
        asked = [rng.permutation(12)[:7] for _ in range(3)]
        batches = [r.read(ids) for ids in asked]
        for ids, batch in zip(asked, batches):
            batch.wait()
            for sample, image in zip(ids, batch.images()):
                assert zlib_ng.crc32(image) == split.index["crc32"][sample]
        for batch in batches:
            buffers.add(batch.buffer.ctypes.data)
    assert len(buffers) < 15
    r.close()


@pytest.mark.parametrize("most", [1, 100])
def test_images_lie_in_rows_with_zeros_behind_them_or_one_behind_the_other(split, monkeypatch, most):
    monkeypatch.setattr(reader, "MOST_ROOM", most)
    r = Reader(split, threads=2, always_ahead=True)
    for ids in (np.arange(8), np.arange(8)[::-1], np.arange(4)):  # buffers are reused, with an older batch's bytes
        batch = r.read(ids)
        batch.wait()
        images = [r.stored(sample).tobytes() for sample in ids]
        room = max(map(len, images)) if most > 1 else 0
        assert batch.room == room
        assert batch.buffer.tobytes() == b"".join(image.ljust(room, b"\0") for image in images)
        assert list(map(bytes, batch.images())) == images
    r.close()


def test_one_flipped_bit_is_found_and_the_sample_named(split):
    row = split.index[3]
    path = split.root / split.shards[row["shard"]].name
    data = bytearray(path.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 4
    path.write_bytes(data)
    r = Reader(split, always_ahead=True)
    with pytest.raises(DataError, match=rf"{path.name}: sample 3 \('(cat|dog)_\d'\) at byte {row['offset']}.*checksum"):
        r.read(np.array([1, 3])).wait()
    r.read(np.array([1, 2])).wait()
    r.close()
    careless = Reader(split, verify=False, always_ahead=True)
    careless.read(np.array([3])).wait()
    careless.close()


def test_a_shard_that_shrinks_or_goes_away_during_training_is_named(split):
    paths = [split.root / shard.name for shard in split.shards]
    paths[0].write_bytes(paths[0].read_bytes()[:600])
    paths[1].unlink()
    r = Reader(split, always_ahead=True)
    of_shard = [int(np.flatnonzero(split.index["shard"] == s)[-1]) for s in (0, 1, 2)]
    with pytest.raises(DataError, match="the shard ends before it"):
        r.read(np.array(of_shard[:1])).wait()
    with pytest.raises(StorageError, match=f"{paths[1].name}: cannot be opened: No such file"):
        r.read(np.array(of_shard[1:2])).wait()
    r.read(np.array(of_shard[2:])).wait()
    r.close()


def test_more_shards_than_may_be_open_are_read_all_the_same(split, monkeypatch):
    monkeypatch.setattr(byte_source, "MAX_OPEN", 2)
    r = Reader(split, threads=3, always_ahead=True)
    for _ in range(10):
        r.read(np.arange(12)).wait()
    direct = Reader(split)
    block = direct.fetch(direct.read(np.arange(12)), 0, 12, lambda block: fetch_images(*block, ALL_ROWS))
    for at, size, sample in zip(block.at, block.rows[:, SIZE], range(12)):
        assert zlib_ng.crc32(block.buffer[at : at + size]) == split.index["crc32"][sample]
    direct.close()

    def shards_open():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        found = [os.readlink(link) for link in links if os.path.islink(link)]
        return sum(path.startswith(f"{split.root}/") and path.endswith(".tar") for path in found)

    assert shards_open() <= 2
    r.close()
    assert shards_open() == 0


MANY_SHARDS = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 64))
import numpy as np
from pipeline.manifest import open_dataset
from pipeline.read.reader import Reader
split = open_dataset(sys.argv[1]).split("train")
readers = [Reader(split, threads=8, always_ahead=True) for _ in range(2)]
ids = np.arange(split.samples)
batches = [reader.read(ids) for _ in range(8) for reader in readers]
print(sum(batch.wait() or len(batch.images()) for batch in batches))
taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(64 - len(os.listdir("/proc/self/fd")) + 1)]
print(sum(len(readers[0].stored(int(i))) > 0 for i in ids))
"""


def test_a_set_of_many_shards_is_read_with_few_open_files(tmp_path):
    for i in range(100):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / str(i % 2) / f"{i}.png")
    build(Plan(ImageFolder(tmp_path / "images"), Options(samples_per_shard=1)), tmp_path / "shards", workers=1)
    command = [sys.executable, "-c", MANY_SHARDS, str(tmp_path / "shards")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["1600", "100"], done.stderr


def test_rows_are_the_index_however_they_are_asked_for_and_hold_no_copy_of_it(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    index = np.zeros(5000, INDEX_DTYPE)
    for name in INDEX_DTYPE.names or ():
        limits = np.iinfo(INDEX_DTYPE[name])
        index[name] = rng.integers(limits.min, min(int(limits.max), 2**62), len(index))
    np.save(tmp_path / "index.npy", index)
    wanted = np.stack([index[name].astype(np.int64) for name in COLUMNS], axis=1)
    tracemalloc.start()
    rows = Rows(np.lib.format.open_memmap(tmp_path / "index.npy", mode="r"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    ids = rng.integers(0, len(index), 300)
    for at in (ids, 7, slice(3, 9), ids[:0]):
        assert rows[at].dtype == np.int64
        assert np.array_equal(rows[at], wanted[at])
    monkeypatch.setattr(fetch, "MAPPED", 0)
    rows = Rows(np.lib.format.open_memmap(tmp_path / "index.npy", mode="r"))
    for at in (ids, 7, ids[:0]):
        assert np.array_equal(rows[at], wanted[at])
    os.truncate(tmp_path / "index.npy", (tmp_path / "index.npy").stat().st_size - 1)
    assert np.array_equal(rows[4998], wanted[4998])
    with pytest.raises(StorageError, match=r"index\.npy: its end is missing, or cannot be read; copy it again"):
        rows[np.array([7, 4999])]
