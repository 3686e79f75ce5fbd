"""A dataset exists only with its manifest; files that differ from it are named.

FAULTS=50 makes 2,000 changes of manifests and as many of indices (`make faults`); 50 otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import manifest, verify
from pipeline.errors import DataError
from pipeline.manifest_values import EXISTING


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards["keep"], tmp_path / "copy")


def rejected(root, message):
    with pytest.raises(DataError, match=message) as caught:
        manifest.open_dataset(root)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_an_unfinished_one_are_distinguished(copy, tmp_path):
    rejected(tmp_path / "nowhere", "nowhere: no such shard folder; make one with tools/make_shards.py")
    (copy / "manifest.json").unlink()
    (copy / "parts").mkdir()
    rejected(copy, "its sharding never finished")


def test_class_folders_are_no_shards_and_the_command_that_makes_some_is_shown(image_folder):
    make = "holds folders, not shards; run python tools/make_shards.py imagefolder"
    root, train = image_folder, image_folder / "train"
    rejected(root, f"{make} --train {root}/train --val {root}/val --out SHARDS")
    rejected(train, f"{make} --train {train} --val-fraction 0.1 --out SHARDS")


def test_a_missing_and_a_cut_shard_are_named(copy):
    path = copy / "pets-train-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    rejected(copy, rf"pets-train-000001.tar: {len(data) - 1} bytes, {len(data)} in the manifest")
    path.unlink()
    rejected(copy, "pets-train-000001.tar: the shard is missing")


def test_a_changed_index_is_named(copy):
    path = copy / "pets-train.index.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    rejected(copy, "pets-train.index.npy: the index is damaged")


def test_an_edited_or_foreign_manifest_is_rejected(copy):
    path = copy / "manifest.json"
    original = json.loads(path.read_text())
    path.write_text(json.dumps(original | {"classes": ["dog", "cat"]}))
    rejected(copy, "changed since it was written")
    path.write_text(json.dumps(original | {"version": 99}))
    rejected(copy, "version 99, but this program reads imagenet-express version 1")
    for text in ("{", "[]", '{"format": 1}', "null"):
        path.write_text(text)
        rejected(copy, "no manifest of")


def test_equal_content_has_an_equal_fingerprint_wherever_it_lies(copy, shards):
    assert manifest.open_dataset(copy).fingerprint == manifest.open_dataset(shards["keep"]).fingerprint
    assert manifest.open_dataset(copy).fingerprint != manifest.open_dataset(shards["jpeg"]).fingerprint


def test_a_split_that_is_not_there_is_named(shards):
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        manifest.open_dataset(shards["keep"]).split("test")


# Manifests and indices with right checksums and values that no sharding writes


def tampered(root, change=lambda content: None, index=None, split="train"):
    """Publishes a changed manifest, and a changed index, with fingerprints and checksums that fit."""
    path = root / "manifest.json"
    content = json.loads(path.read_text())
    if index is not None:
        name = content["splits"][split]["index"]
        (root / name).write_bytes(index)
        content["splits"][split]["index_sha256"] = hashlib.sha256(index).hexdigest()
    change(content)
    content["fingerprint"] = manifest.fingerprint(content)
    path.write_text(json.dumps(content))


def at(*path, value):
    """A change of the manifest's value at a path of keys."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at(*SHARD, "name", value="../x.tar"), "'../x.tar' names no file of the folder"),
        (at(*SHARD, "name", value="/etc/passwd"), "'/etc/passwd' names no file of the folder"),
        (at(*SHARD, "name", value=""), "'' names no file of the folder"),
        (at(*SHARD, "name", value="a\0b"), "names no file of the folder"),
        (at(*SHARD, "name", value="x" * 300), "names no file of the folder"),
        (at(*SHARD, "name", value=5), "no manifest of"),
        (at(*SHARD, "bytes", value=2**70), "samples in 1180591620717411303424 bytes"),
        (at(*SHARD, "samples", value=-5), "-5 samples"),
        (at(*SHARD, "samples", value="5"), "'5' samples"),
        (at(*SHARD, "more", value=1), "more"),
        (at("splits", "train", "shards", value=[]), "samples in 0 shards"),
        (at("splits", "train", "samples", value=1), "1 samples in 3 shards"),
        (at("splits", "train", "index", value="/dev/zero"), "'/dev/zero' names no file of the folder"),
        (at("splits", "train", "index", value="a/../b.npy"), "'a/../b.npy' names no file of the folder"),
        (at("splits", value=[]), "no manifest of"),
        (at("classes", value=[]), "classes are not a list with one str for each class"),
        (at("classes", value=[1, 2]), "classes are not a list"),
        (at("classes", value="ab"), "classes are not a list"),
        (at("classes", value=["one"]), "class_names are not a list"),
        (at("class_names", value=["one"]), "class_names are not a list"),
        (at("class_ids", value=["1", "2"]), "class_ids are not a list with one int"),
        (at("statistics", "mean", value=[1, 2]), "not three numbers"),
        (at("statistics", "mean", value=[1, 2, float("nan")]), "not three numbers"),
        (at("statistics", "std", value=[1, 2, "3"]), "not three numbers"),
        (at("statistics", "covariance", value=[[1, 2, 3]]), "the covariance is not three rows"),
        (at("statistics", "mean_image", "file", value="/etc/passwd"), "'/etc/passwd' names no file of the folder"),
        (at("statistics", "mean_image", value=7), "no manifest of"),
        (at("options", value=[]), "no manifest of"),
    ],
)  # fmt: skip
def test_a_manifest_whose_values_nobody_wrote_is_rejected_when_it_is_opened(copy, change, message):
    tampered(copy, change)
    rejected(copy, rf"manifest\.json: .*{message}")


def test_tars_that_were_indexed_where_they_lie_may_lie_elsewhere_but_under_no_absolute_name(copy):
    (copy.parent / "apart").mkdir()
    for name in ("/etc/passwd", "a//b.tar"):
        tampered(copy, at("source", value={"kind": EXISTING}))
        tampered(copy, at(*SHARD, "name", value=name))
        rejected(copy, "names no file of the folder")
    name = (copy / "pets-train-000000.tar").rename(copy.parent / "apart" / "x.tar").name
    tampered(copy, at(*SHARD, "name", value=f"../apart/{name}"))
    assert manifest.open_dataset(copy).split("train").samples == 12


def saved(array, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def rows(root) -> np.ndarray:
    return np.load(root / "pets-train.index.npy")


@pytest.mark.parametrize(
    ("name", "value"),
    [("offset", 2**63 + 5), ("offset", 2**64 - 1), ("offset", 0), ("offset", 10**9), ("size", 2**32 - 1),
     ("shard", 3), ("shard", 2**32 - 1), ("label", 2), ("label", 2**31 - 1), ("label", -2), ("width", 0),
     ("height", 0)],
)  # fmt: skip
def test_an_index_out_of_bounds_is_rejected_when_it_is_opened_and_named_by_a_check(copy, name, value):
    index = rows(copy)
    index[name][4] = value
    tampered(copy, index=saved(index))
    rejected(copy, rf"pets-train.index.npy: sample 4 has {name} {value}, out of bounds")
    found = verify.check(manifest.open_dataset(copy, check_splits=False)).findings
    assert [(f.check, f.file) for f in found] == [("index", "pets-train.index.npy")]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("fired",)


@pytest.mark.parametrize(
    "index",
    [
        lambda rows: saved(np.array([Bomb()] * 12, object), allow_pickle=True),
        lambda rows: saved(rows.astype([(n, object) for n in rows.dtype.names]), allow_pickle=True),
        lambda rows: saved(rows.view("u1")),
        lambda rows: saved(rows.reshape(3, 4)),
        lambda rows: saved(np.zeros((), rows.dtype)),
        lambda rows: saved(rows)[:-9],
        lambda rows: saved(rows)[:40],
        lambda rows: saved(rows).replace(b"(12,)", b"(9**9999,)"),
        lambda rows: saved(rows).replace(b"(12,)", b"(-12,)"),
        lambda rows: saved(rows).replace(b"{'descr'", b"((((((((((("),
        lambda rows: b"",
        lambda rows: pickle.dumps(Bomb()),
        lambda rows: b"PK\3\4" + bytes(100),
    ],
)
def test_an_index_of_anything_else_is_rejected_and_nothing_is_unpickled(copy, index, monkeypatch):
    monkeypatch.chdir(copy)
    tampered(copy, index=index(rows(copy)))
    rejected(copy, "pets-train.index.npy: (cannot be read as an array|index of another format)")
    assert not (copy / "fired").exists()


def test_a_mean_image_of_anything_else_is_rejected(copy):
    path = next(copy.glob("*mean*"))
    for data in (saved(np.array([Bomb()]), allow_pickle=True), saved(np.zeros((4, 5, 3), np.float32)), b"", b"PK\3\4"):
        path.write_bytes(data)
        tampered(copy, at("statistics", "mean_image", "sha256", value=hashlib.sha256(data).hexdigest()))
        with pytest.raises(DataError, match=r"cannot be read as an array|no mean image, but"):
            manifest.open_dataset(copy).mean_image  # noqa: B018


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.sampled_from(["../x.tar", "/etc/passwd", "a/b", ".", "", "x" * 5000, "raw", "keep", EXISTING]),
    st.lists(st.integers(-5, 5), max_size=4), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
EXAMPLES = 40 * int(os.environ.get("FAULTS", 0)) or 50


def paths(value, path=()):
    """The path of keys to every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield (*path, key)
        yield from paths(child, (*path, key))


def read_all(root) -> None:
    """Opens a dataset and reads all that the loader and the tools read."""
    dataset = manifest.open_dataset(root)
    assert len(dataset.classes) == len(dataset.class_names) > 0
    statistics = dataset.manifest["statistics"]
    for name in ("mean", "std", "covariance", "mean_image"):
        if name in statistics:
            assert np.isfinite(getattr(dataset, name)).all()
    for split in dataset.splits.values():
        assert len(split.index) == split.samples == len(split.keys())
        sizes = np.array([(root / shard.name).stat().st_size for shard in split.shards])
        assert (split.index["offset"].astype(object) + split.index["size"] <= sizes[split.index["shard"]]).all()
        assert ((split.index["label"] >= -1) & (split.index["label"] < len(dataset.classes))).all()
    verify.check(manifest.open_dataset(root, check_splits=False))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_any_change_of_a_manifest_is_a_data_error_or_reads_within_bounds(shards, tmp_path_factory, data):
    root = shutil.copytree(shards["keep"], tmp_path_factory.mktemp("m") / "copy")
    content = json.loads((root / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(sorted(paths(content), key=str)))
        inside = content
        for key in path:
            inside = inside[key]
        if data.draw(st.integers(0, 3)):
            inside[last] = data.draw(JUNK)
        elif isinstance(inside, dict):
            del inside[last]
    with contextlib.suppress(DataError):
        with contextlib.suppress(TypeError, AttributeError, UnicodeEncodeError):
            content["fingerprint"] = manifest.fingerprint(content)
        (root / "manifest.json").write_text(json.dumps(content))
        read_all(root)
    shutil.rmtree(root)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_any_change_of_an_index_is_a_data_error_or_reads_within_bounds(shards, tmp_path_factory, data):
    root = shutil.copytree(shards["keep"], tmp_path_factory.mktemp("i") / "copy")
    index = rows(root)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(index.dtype.names))
        bounds = np.iinfo(index.dtype[name])
        near = st.integers(-2, 2).map(lambda more: int(index[name][0]) + more)
        value = data.draw(st.integers(int(bounds.min), int(bounds.max)) | near)
        index[name][data.draw(st.integers(0, 11))] = max(bounds.min, min(bounds.max, value))
        content = saved(index)
    else:
        changed = bytearray(saved(index))
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, 300))] = data.draw(st.integers(0, 255))
        content = bytes(changed)
    with contextlib.suppress(DataError):
        tampered(root, index=content)
        read_all(root)
    shutil.rmtree(root)
