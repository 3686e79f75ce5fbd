"""WebDataset tars of other people: indexed where they lie, read like our own, refused where they are damaged."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline import AugmentConfig, DataError, Loader, open_dataset
from pipeline.write.index_existing import looks_sorted
from tests.conftest import picture, run_tool, the_error

MAKE = "tools/make_shards.py"


def jpeg(rng, kind="JPEG") -> bytes:
    out = io.BytesIO()
    picture(rng, int(rng.integers(60, 120)), int(rng.integers(60, 120))).save(out, kind)
    return out.getvalue()


@pytest.fixture
def tars(tmp_path):
    """Three tars as webdataset itself writes them, with PAX headers, folders in keys, and PNGs among the JPEGs."""
    rng = np.random.default_rng(0)
    images = {}
    for number in range(3):
        with webdataset.TarWriter(str(tmp_path / f"set-train-{number:04d}.tar")) as tar:
            for i in range(7):
                key, label = f"folder/im{number}_{i}", int(rng.integers(0, 4)) if (number, i) != (0, 0) else 3
                extension = "png" if i == 3 else "jpg"
                data = jpeg(rng, "PNG" if i == 3 else "JPEG")
                tar.write({"__key__": key, extension: data, "cls": label, "json": {"label": label, "note": "x"}})
                images[data] = label
    return tmp_path, images


def index(pattern, out, *args):
    return run_tool(MAKE, "index", pattern, "--out", out, *args)


@pytest.mark.parametrize("apart", [False, True])
def test_existing_tars_are_read_without_being_copied(tars, tmp_path, apart):
    root, images = tars
    before = {p: p.read_bytes() for p in root.glob("*.tar")}
    out = tmp_path / "elsewhere" / "d" if apart else root
    done = index(root / "set-train-{0000..0002}.tar", out, "--size", 48)
    assert done.returncode == 0, done.stderr
    assert "train: 21 images in 3 shards" in done.stdout
    assert "warning" not in done.stderr
    assert {p: p.read_bytes() for p in root.glob("*.tar")} == before
    assert not list(tmp_path.glob("elsewhere/**/*.tar"))
    dataset = open_dataset(out)
    assert dataset.classes == ["0", "1", "2", "3"]
    split = dataset.split("train")
    for row in split.index:
        data = (split.root / split.shards[row["shard"]].name).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert images[data] == row["label"]
        assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"])
    with Loader(out, batch=7, augment=AugmentConfig(resize=48, crop=32)) as loader:
        ids = [i for batch in loader for i in batch.ids.tolist()]
    assert sorted(ids) == list(range(21))
    if apart:
        deep = run_tool("tools/check_shards.py", out, "--deep")  # it also reads them with webdataset
        assert deep.returncode == 0, deep.stdout + deep.stderr
    again = index(root / "set-train-*.tar", out)
    assert again.returncode == 2
    assert "holds a finished dataset already" in the_error(again)


def test_labels_may_come_from_json_and_class_names_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(4):
            tar.write({"__key__": f"k{i}", "jpg": jpeg(rng), "json": {"label": i % 2}})
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    args = [tmp_path / "a.tar", tmp_path / "d", "--val", tmp_path / "a.tar", "--classes", tmp_path / "names.txt"]
    done = index(*args, "--size", 32)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "d")
    assert dataset.classes == ["tench", "goldfish"]
    assert dataset.split("val").index["label"].tolist() == [0, 1, 0, 1]


def test_sets_that_are_stored_class_after_class_are_warned_of(tmp_path):
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(40):
            tar.write({"__key__": f"k{i}", "jpg": jpeg(rng), "cls": i // 10})
    done = index(tmp_path / "a.tar", tmp_path / "d", "--size", 32)
    assert done.returncode == 0, done.stderr
    assert "warning: the samples of train are stored class after class" in done.stderr
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["stored_order"]["train"] == "class after class"
    mixed = rng.integers(0, 10, 1000)
    assert looks_sorted(np.sort(mixed))
    assert not looks_sorted(mixed)
    assert not looks_sorted(np.zeros(1000, int))


def broken_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken_header(path):
    with tarfile.open(path) as tar:
        at = [m for m in tar.getmembers() if m.isfile()][5].offset_data - 512
    data = bytearray(path.read_bytes())
    data[at + 10] ^= 0xFF
    path.write_bytes(data)


def without_labels(path):
    with webdataset.TarWriter(str(path)) as tar:
        tar.write({"__key__": "k", "jpg": jpeg(np.random.default_rng(0))})


def with_a_text_label(path):
    with webdataset.TarWriter(str(path)) as tar:
        tar.write({"__key__": "k", "jpg": jpeg(np.random.default_rng(0)), "json": {"label": "cat"}})


def with_a_bad_image(path):
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        tar.write({"__key__": "k", "jpg": b"no image", "cls": b"0"})


def without_samples(path):
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        tar.write({"__key__": "k", "txt": b"hello"})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (broken_cut, "cut short"),
        (broken_header, "not a tar header"),
        (lambda path: path.write_bytes(b"x" * 3000), "at byte 0: not an uncompressed tar"),
        (without_labels, "sample 'k' has no label"),
        (with_a_text_label, "sample 'k' has the label 'cat'"),
        (with_a_bad_image, "1 of 15 images cannot be used.*k.jpg: not an image"),
        (without_samples, "holds no samples"),
        (lambda path: path.unlink(), "no such tar"),
    ],
)
def test_what_cannot_be_indexed_is_one_line_and_no_dataset(tars, tmp_path, break_it, message):
    import re

    root, _ = tars
    break_it(root / "set-train-0001.tar")
    done = index(root / "set-train-{0000..0002}.tar", tmp_path / "d")
    assert done.returncode == 65
    assert re.search(message, the_error(done))
    assert "set-train-0001.tar" in the_error(done)
    assert not (tmp_path / "d" / "manifest.json").exists()
    with pytest.raises(DataError):
        open_dataset(tmp_path / "d")
