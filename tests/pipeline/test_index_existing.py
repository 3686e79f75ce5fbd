"""WebDataset tars of other people: indexed in place, read like our own, rejected if they are damaged."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline import AugmentConfig, DataError, Loader, open_dataset
from pipeline.errors import ConfigError
from pipeline.write import index_existing
from pipeline.write.index_existing import looks_sorted
from pipeline.write.sources.tars import expand
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
    assert "note: no validation split, which training needs; --val names its tars" in done.stdout
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
    # The folder may hold the only copy of the tars.
    assert "holds a finished dataset already; choose another --out, or remove its manifest.json" in the_error(again)
    both = index(root / "set-train-*.tar", tmp_path / "both", "--val", root / "set-train-000[12].tar")
    assert both.returncode == 2
    assert f"{root}/set-train-0001.tar: is in both splits" in the_error(both)


def test_labels_may_come_from_json_and_class_names_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(4):
            tar.write({"__key__": f"k{i}", "jpg": jpeg(rng), "json": {"label": i % 2}})
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    shutil.copy(tmp_path / "a.tar", tmp_path / "b.tar")
    args = [tmp_path / "a.tar", tmp_path / "d", "--val", tmp_path / "b.tar", "--classes", tmp_path / "names.txt"]
    done = index(*args, "--size", 32)
    assert done.returncode == 0, done.stderr
    assert "note:" not in done.stdout
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


def tar_of(path, *members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def indexed(path, out, **options):
    """(labels, what was passed over, bad images) of a tar."""
    options = {"statistics_images": 2, "size": 16, "workers": 1} | options
    written, passed_over = index_existing.index("x", {"train": [path]}, out, **options, progress=lambda tars: None)
    counts = {kind: count for kind, (count, _) in passed_over.items()}
    return open_dataset(out).split("train").index["label"].tolist(), counts, written["quarantine"]


IMAGE = jpeg(np.random.default_rng(1))


def test_images_are_known_by_content_and_other_members_are_counted(tmp_path):
    kinds = {"JPG": "JPEG", "jfif": "JPEG", "tif": "TIFF", "gif": "GIF", "input.jpg": "JPEG", "05.png": "PNG"}
    rng, members = np.random.default_rng(0), [("README", b"hello"), ("d/._s0.jpg", b"x"), ("@eaDir/s0.jpg", IMAGE)]
    for label, (extension, kind) in enumerate(kinds.items()):
        ending = "output.cls" if extension == "input.jpg" else "cls"
        members += [(f"s{label}.{ending}", b"%d" % label), (f"s{label}.{extension}", jpeg(rng, kind))]
    members += [("s5.txt", b"a note"), ("s5.json", b"{}")]
    labels, counts, bad = indexed(tar_of(tmp_path / "a.tar", *members), tmp_path / "d")
    assert labels == [0, 1, 2, 3, 4, 5]
    assert counts == {"without extension": 1, "hidden": 1, ".jpg": 1, ".txt": 1, ".json": 1}
    assert bad == []


@pytest.mark.parametrize("extra", [("k.txt", b"hello"), ("k.npy", b"x"), ("k.tif", b"no image")])
def test_a_label_without_an_image_is_a_bad_image(tmp_path, extra):
    path = tar_of(tmp_path / "a.tar", ("k.cls", b"1"), extra, ("s.cls", b"0"), ("s.jpg", IMAGE))
    with pytest.raises(DataError, match=r"1 of 2 images cannot be used \(a.tar/k.cls: 0 images for this label"):
        indexed(path, tmp_path / "d")
    labels, counts, bad = indexed(path, tmp_path / "d", max_bad_fraction=0.5)
    assert (labels, sum(counts.values()), len(bad)) == ([0], 1, 1)


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (("cls", b"\xef\xbb\xbf1\r\n"), [1]),
        (("json", b'\xef\xbb\xbf{"label": "2"}'), [2]),
        (("cls", b""), "has an empty .cls"),
        (("cls", b"2000000000"), "the label 2000000000; class numbers from 0 to 999,999"),
        (("cls", b"9" * 5000), "the label '999"),
        (("cls", b"-1"), "the label -1"),
        (("json", b"{}"), "has no label"),
        (("json", b"[" * 10_000), "cannot be read as a label"),
        (("json", b'{"label": null}'), "the label 'None'"),
    ],
)
def test_labels_are_read_or_named_with_tar_and_sample(tmp_path, label, found):
    path = tar_of(tmp_path / "a.tar", (f"s.{label[0]}", label[1]), ("s.jpg", IMAGE))
    if isinstance(found, list):
        assert indexed(path, tmp_path / "d")[0] == found
    else:
        with pytest.raises(DataError, match=f"a.tar: sample 's' .*{found}"):
            indexed(path, tmp_path / "d")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["f.0.cls", "f.0.jpg", "f.1.cls", "f.1.jpg"], "a name up to its first dot, has 0.cls, 0.jpg, 1.cls, 1.jpg"),
        (["a.cls", "b.cls", "a.jpg", "b.jpg"], r"'a.cls' and 'a.jpg' are not adjacent.*tar --sort=name"),
        (["a.jpg", "b.jpg", "a.cls", "b.cls"], r"'a' has no label, .*has jpg; name one .cls, and sort the tar by name"),
    ],
)
def test_members_that_share_a_key_are_explained(tmp_path, names, message):
    path = tar_of(tmp_path / "a.tar", *[(name, b"0" if name.endswith("cls") else IMAGE) for name in names])
    with pytest.raises(DataError, match=message):
        indexed(path, tmp_path / "d")


def test_an_empty_tar_is_passed_over_but_not_all_of_a_split(tmp_path):
    whole, empty = tar_of(tmp_path / "a.tar", ("s.cls", b"0"), ("s.jpg", IMAGE)), tar_of(tmp_path / "b.tar")
    options = {"statistics_images": 2, "size": 16, "workers": 1, "progress": lambda tars: None}
    _, passed_over = index_existing.index("x", {"train": [whole, empty]}, tmp_path / "d", **options)
    assert passed_over == {"empty tar": (1, "b.tar")}
    assert [shard.name for shard in open_dataset(tmp_path / "d").split("train").shards] == ["../a.tar"]
    with pytest.raises(DataError, match="no usable image is left"):
        index_existing.index("x", {"train": [empty]}, tmp_path / "e", **options)


def test_patterns_name_what_the_shell_and_webdataset_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("t-00.tar", "t-01.tar", "d[1]/t-0.tar", "odd{.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tar_of(tmp_path / name)
    both = [Path("t-00.tar"), Path("t-01.tar")]
    for pattern in ("t-{00..01}.tar", "t-??.tar", "t-[0-9][01].tar", f"{tmp_path}/t-*.tar"):
        assert [path.name for path in expand(pattern)] == [path.name for path in both]
    monkeypatch.setenv("HOME", str(tmp_path))  # quoted, as the help asks for, a shell leaves the tilde
    assert [path.name for path in expand("~/t-{00..01}.tar")] == [path.name for path in both]
    assert expand("d[1]/t-*.tar") == expand("d[1]/t-0.tar") == [Path("d[1]/t-0.tar")]
    assert expand("odd{.tar") == [Path("odd{.tar")]
    for pattern in ("t-{00..01.tar", "t-00..01}.tar", "t-{0..999999999999}.tar"):
        with pytest.raises(ConfigError, match=r"write \{0000..1023\}"):
            expand(pattern)
    for pattern in ("", "x?", "t-{00..09}.tar", "t-*.tar.gz"):
        with pytest.raises(DataError, match="no such file"):
            expand(pattern)


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
        (lambda path: path.unlink(), "no such file"),
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
