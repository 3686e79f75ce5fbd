"""Nothing exists until its manifest says so; what differs from it is named."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline import manifest
from pipeline.errors import DataError


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards["keep"], tmp_path / "copy")


def rejected(root, message):
    with pytest.raises(DataError, match=message) as caught:
        manifest.open_dataset(root)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_an_unfinished_one_are_told_apart(copy, tmp_path):
    rejected(tmp_path / "nowhere", "nowhere: no such shard folder; make one with tools/make_shards.py")
    (copy / "manifest.json").unlink()
    rejected(copy, "its sharding never finished")


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
        rejected(copy, "not a manifest")


def test_equal_content_has_an_equal_fingerprint_wherever_it_lies(copy, shards):
    assert manifest.open_dataset(copy).fingerprint == manifest.open_dataset(shards["keep"]).fingerprint
    assert manifest.open_dataset(copy).fingerprint != manifest.open_dataset(shards["jpeg"]).fingerprint


def test_a_split_that_is_not_there_is_named(shards):
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        manifest.open_dataset(shards["keep"]).split("test")
