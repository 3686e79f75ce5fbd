"""Damaged images and shards, made from a seed: noticed if checksums are verified, and harmless in any case."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import AugmentConfig, Loader, LoaderConfig, manifest, open_dataset
from pipeline.errors import DataError
from pipeline.shards import Sample, write_array, write_shard
from pipeline.storage import Folder
from pipeline.verify import check
from tests import fork_server
from tests.conftest import ROOT, picture
from tests.pipeline.test_parity import encode

SCRIPT = ROOT / "tests" / "pipeline" / "one_epoch.py"
KINDS = [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"progressive": True}, {"restart_marker_rows": 1}, {}]


def mutated(data: bytes, rng: np.random.Generator, *, same_size: bool = True, head: int = 600) -> bytes:
    """Another image or tar. Bits or bytes differ, or a stretch is zeros, 0xFF, noise or bytes from elsewhere in it.

    Unless it has the same size, it may be cut, or bytes inserted. Half of the changes are in the first `head` bytes.
    """
    changed = np.frombuffer(data, np.uint8).copy()
    at = rng.integers(0, len(data) if rng.integers(2) else min(head, len(data)), rng.integers(1, 9))
    a, length = int(at[0]), int(rng.integers(1, 300))
    where = slice(a, min(a + length, len(data)))
    what = rng.integers(6 if same_size else 8)
    if what == 0:
        changed[at] ^= np.uint8(1) << rng.integers(0, 8, len(at), np.uint8)
    elif what == 1:
        changed[at] = rng.integers(0, 256, len(at))
    elif what == 2:
        changed[where] = rng.choice([0, 0xFF])
    elif what == 3:
        changed[where] = rng.integers(0, 256, where.stop - a)
    elif what == 4:
        changed[where] = np.roll(changed, rng.integers(1, len(data)))[where]
    elif what == 5:
        changed[at] = 0xFF  # a marker begins
    elif what == 6:
        changed = changed[:a]
    else:
        changed = np.concatenate([changed[:a], rng.integers(0, 256, length, np.uint8), changed[a:]])
    return changed.tobytes() if changed.tobytes() != data else mutated(data, rng, same_size=same_size, head=head)


def written(root: Path, images: list[bytes], sizes: list[tuple[int, int]]) -> Path:
    """Shards that hold these bytes, whatever they are."""
    root.mkdir()
    samples = (Sample(f"s{i}", image, i, *size) for i, (image, size) in enumerate(zip(images, sizes, strict=True)))
    shard, rows = write_shard(Folder(root), "x.tar", samples)
    split = manifest.split_record([shard], "x.npy", write_array(Folder(root), "x.npy", rows))
    content = {"classes": [str(i) for i in range(len(images))], "splits": {"train": split}}
    manifest.write_manifest(Folder(root), content | {"statistics": {"mean": [120.0] * 3, "std": [60.0] * 3}})
    return root


def whole_images(count: int) -> tuple[list[bytes], list[tuple[int, int]]]:
    rng = np.random.default_rng(0)
    sizes = [(64, 64 + int(more))[:: rng.choice([1, -1])] for more in rng.integers(0, 60, count)]
    return [encode(picture(rng, *size), "JPEG", quality=90, **KINDS[i % 5]) for i, size in enumerate(sizes)], sizes


def one_epoch(root: Path, backend: str, verify: str, *, real: bool) -> dict:
    """real: in a process that nothing else was loaded into, and that compiles no code, which takes 130 MB: the second.

    One arena: memory that is freed is used again.
    """
    argv, env = [sys.executable, str(SCRIPT), str(root), backend, verify], os.environ | {"MALLOC_ARENA_MAX": "1"}
    with fork_server.real_processes() if real else contextlib.nullcontext():
        for _ in range(2 if real else 1):
            done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=env)
            assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["portable", "dali-cpu"])
def test_damaged_images_are_noticed_or_harmless(backend, count, tmp_path):
    """Every second image is damaged, in one data set after sharding, in the other before."""
    rng, real = np.random.default_rng(1), count > 40
    images, sizes = whole_images(2 * count)
    bad = set(range(0, 2 * count, 2))
    whole = one_epoch(written(tmp_path / "whole", images, sizes), backend, "verify", real=real)
    assert len(whole["images"]) == 2 * count
    before = [mutated(image, rng, same_size=False) if i in bad else image for i, image in enumerate(images)]
    after = shutil.copytree(tmp_path / "whole", tmp_path / "after")
    with open(after / "x.tar", "r+b") as file:
        for i in bad:
            file.seek(int(open_dataset(after).split("train").index["offset"][i]))
            file.write(mutated(images[i], rng))
    runs = [(after, "verify"), (after, "trust"), (written(tmp_path / "before", before, sizes), "verify")]
    for root, verify in runs:
        found = one_epoch(root, backend, verify, real=real)
        noticed = set(map(int, found["bad"]))
        assert noticed <= bad  # no whole image is taken for a damaged one
        if (root, verify) == runs[0]:
            assert noticed == bad
            assert all("checksum" in reason for reason in found["bad"].values())
        assert all(found["images"][i] == crc for i, crc in whole["images"].items() if int(i) not in bad)
        assert found["peak_mb"] <= 1.1 * whole["peak_mb"]


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_damaged_shards_are_noticed_and_no_other_pixels_come_out(count, tmp_path):
    """The loader reads no header of a tar: damage there is noticed by the check of the shards alone."""
    rng, view = np.random.default_rng(2), AugmentConfig(resize=64, crop=56)
    root = written(tmp_path / "whole", *whole_images(12))

    def pixels(shards: object, backend: str) -> dict[int, np.ndarray]:
        config = LoaderConfig(backend, max_bad_samples=11, threads=2)
        with Loader(shards, batch=4, train=False, dtype="uint8", split="train", augment=view, config=config) as loader:
            found = {i: x for b in loader for i, x in zip(b.ids.tolist(), b.images.numpy())}
            assert found.keys() | loader.bad.found.keys() == set(range(12))
            assert not found.keys() & loader.bad.found.keys()
            return found

    whole, data = pixels(root, "portable"), (root / "x.tar").read_bytes()
    index, noticed = open_dataset(root).split("train").index, 0
    for number in range(count):
        changed = mutated(data, rng, same_size=number % 5 > 0, head=len(data))
        hit = {
            i
            for i, row in enumerate(index)
            if (at := int(row["offset"])) + row["size"] > len(changed)
            or changed[at : at + row["size"]] != data[at : at + row["size"]]
        }
        for backend in ("portable", "dali-cpu"):
            opened = open_dataset(root)
            (root / "x.tar").write_bytes(changed)
            if len(hit) == 12:
                with pytest.raises(DataError, match=r"^12 bad samples"):
                    pixels(opened, backend)
            else:
                found = pixels(opened, backend)
                assert found.keys() == whole.keys() - hit
                assert all(np.array_equal(x, whole[i]) for i, x in found.items())
            noticed += bool(hit)
            assert not check(open_dataset(root, check_splits=False)).ok
            (root / "x.tar").write_bytes(data)
    assert noticed > count
