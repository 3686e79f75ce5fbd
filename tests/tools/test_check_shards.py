"""tools/check_shards.py finds every kind of damage and names it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline import Loader, LoaderConfig, manifest, open_dataset
from pipeline.errors import DataError
from pipeline.shards import INDEX_DTYPE, Shard, crc32, file_sha256, write_array
from pipeline.storage import Folder
from pipeline.tar import members
from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import Digits, ImageFolder
from tests.conftest import run_tool, the_error

CHECK = "tools/check_shards.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    build(Plan(Digits(side=20), Options(samples_per_shard=300)), out, workers=1)
    return out


def test_a_whole_dataset_passes_and_its_histogram_is_written(whole, tmp_path):
    done = run_tool(CHECK, whole, "--deep", "--json", tmp_path / "check.json", "--workers", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: 1,438 samples in 5 shards" in done.stdout
    assert "wrong" not in done.stdout
    assert re.search("ok +samples as webdataset itself reads them", done.stdout)
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["ok"]
    assert sum(written["splits"]["val"]["histogram"]) == 359


def damaged(whole, tmp_path, kind):
    """(a copy with one kind of damage, the damaged shard, the message that the check must print)."""
    root = shutil.copytree(whole, tmp_path / "copy")
    path = sorted(root.glob("digits-train-*.tar"))[1]
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    third, image = members[4], members[5]
    data = bytearray(path.read_bytes())
    if kind == "cut at a member boundary":
        data = data[: third.offset]
        said = f"at byte {third.offset}: cut short"
    elif kind == "cut in a header":
        data = data[: third.offset + 77]
        said = f"at byte {third.offset}: cut short"
    elif kind == "flipped header bit":
        data[third.offset + 3] ^= 16
        said = f"at byte {third.offset}: not a tar header"
    elif kind == "flipped data bit":
        data[image.offset_data + image.size // 2] ^= 1
        said = f"{image.name} at byte {image.offset_data}: its bytes changed"
    elif kind == "zeroed hole":
        data[third.offset : third.offset + 4096] = bytes(4096)
        said = f"at byte {third.offset}: an end mark, but more behind it"
    path.write_bytes(data)
    return root, path.name, said


KINDS = ["cut at a member boundary", "cut in a header", "flipped header bit", "flipped data bit", "zeroed hole"]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_a_tar_is_found_and_named(whole, tmp_path, kind):
    root, shard, said = damaged(whole, tmp_path, kind)
    done = run_tool(CHECK, root, "--json", tmp_path / "check.json")
    assert done.returncode == 1
    assert f"{shard}: {said}" in done.stdout
    assert "sha256" in {finding["check"] for finding in json.loads((tmp_path / "check.json").read_text())["findings"]}


@pytest.mark.parametrize("kind", KINDS)
def test_training_rejects_damage_of_size_at_opening_and_changed_bytes_at_their_first_read(whole, tmp_path, kind):
    root, shard, _ = damaged(whole, tmp_path, kind)
    if kind.startswith("cut"):
        with pytest.raises(DataError, match=rf"{shard}: \d+ bytes, \d+ in the manifest"):
            open_dataset(root)
        return
    with Loader(root, batch=64, config=LoaderConfig("portable")) as loader:
        if kind == "flipped header bit":  # offsets come from the index: no header is read
            assert len(list(loader)) == 22
        else:
            with pytest.raises(DataError, match=rf"{shard}: sample \d+ .*checksum"):
                list(loader)


def test_other_damage_is_found_too(whole, tmp_path):
    root = shutil.copytree(whole, tmp_path / "copy")
    shards = sorted(path.name for path in root.glob("*-train-*.tar"))
    (root / shards[0]).unlink()
    (root / shards[2]).with_suffix(".idx").write_text("v1.2 0\n")
    (root / "digits-mean.npy").write_bytes(b"")
    (root / "_info.json").write_text("{}")
    shutil.copy(root / shards[1], root / "left.tar")
    with tarfile.open(root / shards[3]) as tar:
        label = next(m for m in tar if m.name.endswith(".cls"))
    with open(root / shards[3], "r+b") as file:
        file.seek(label.offset_data)
        byte = file.read(1)
        file.seek(label.offset_data)
        file.write(b"7" if byte != b"7" else b"8")
    done = run_tool(CHECK, root)
    assert done.returncode == 1
    for said in (
        f"{shards[0]}: the shard is missing",
        f"{shards[2]}: {shards[2][:-3]}idx does not name",
        "digits-mean.npy: ",
        "_info.json: differs from the manifest",
        "left.tar: the manifest does not name it",
        f"{shards[3]}: {label.name} has b'",
    ):
        assert said in done.stdout


def test_an_undecodable_image_is_found_when_asked_for(image_folder, tmp_path):
    """A dataset with right checksums and a broken image, which only decoding finds."""
    root = shutil.copytree(image_folder, tmp_path / "in")
    path = root / "train" / "cat" / "0.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    plan = Plan(ImageFolder(root / "train"), Options(stats=False, check="header"))
    build(plan, tmp_path / "out", workers=1)
    assert run_tool(CHECK, tmp_path / "out").returncode == 0
    done = run_tool(CHECK, tmp_path / "out", "--deep")
    assert done.returncode == 1
    assert "cat_0.jpg at byte" in done.stdout
    assert "cannot be decoded" in done.stdout


def in_another_order(names: list[str]) -> list[str]:
    """Both labels before both images: webdataset reads them as four samples."""
    return [names[0], names[2], names[1], names[3], *names[4:]]


def under_another_key(names: list[str]) -> list[str]:
    """A label that belongs to no image."""
    return ["other.cls", *names[1:]]


@pytest.mark.parametrize("change", [in_another_order, under_another_key])
def test_a_set_that_webdataset_reads_differently_is_found(whole, tmp_path, change):
    """Index, sizes and checksums agree with the tar: only reading it with webdataset shows the difference."""
    with tarfile.open(sorted(whole.glob("*-val-*.tar"))[0]) as tar:
        stored = {m.name: tar.extractfile(m).read() for m in tar.getmembers()[:6]}
    images = [data for name, data in stored.items() if name.endswith("jpg")]
    renamed = dict(zip(change(list(stored)), [stored.get(name, b"0") for name in change(list(stored))]))
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in renamed.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = []
    for member in members(path):
        if member.name.endswith("jpg"):
            label = int(stored[member.name.replace("jpg", "cls")])
            rows.append((member.offset, member.size, 0, label, crc32(stored[member.name]), 20, 20))
    folder = Folder(tmp_path)
    shard = Shard("x.tar", len(images), path.stat().st_size, file_sha256(path))
    name = write_array(folder, "x.npy", np.array(rows, INDEX_DTYPE))
    splits = {"train": manifest.split_record([shard], "x.npy", name)}
    manifest.write_manifest(folder, {"classes": list("0123456789"), "splits": splits, "statistics": {}})
    assert run_tool(CHECK, tmp_path).returncode == 0
    done = run_tool(CHECK, tmp_path, "--deep")
    assert done.returncode == 1
    assert "x.tar: webdataset reads " in done.stdout
    assert re.search("1 wrong +samples as webdataset itself reads them", done.stdout)


def test_duplicates_are_counted_within_and_across_splits(image_folder, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "in")
    shutil.copy(root / "train" / "cat" / "0.jpg", root / "train" / "dog" / "again.jpg")
    shutil.copy(root / "train" / "cat" / "1.jpg", root / "val" / "cat" / "again.jpg")
    build(Plan(ImageFolder(root / "train", root / "val"), Options()), tmp_path / "out", workers=1)
    done = run_tool(CHECK, tmp_path / "out")
    assert done.returncode == 0
    assert "1 groups of equal images within a split, 1 across splits, 1 with different labels" in done.stdout


def test_what_is_no_dataset_is_one_line(tmp_path):
    done = run_tool(CHECK, tmp_path)
    assert done.returncode == 65
    assert "its sharding never finished" in the_error(done)


def test_plain_webdataset_reads_every_sample_with_its_label(whole):
    shards = sorted(map(str, whole.glob("*-train-*.tar")))
    expected = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for m in tar:
                key, kind = m.name.split(".")
                expected.setdefault(key, {})[kind] = tar.extractfile(m).read()
    read = [(s["__key__"], s["cls"], len(s["jpg"])) for s in webdataset.WebDataset(shards, shardshuffle=False)]
    assert {key: (label, size) for key, label, size in read} == {
        key: (of["cls"], len(of["jpg"])) for key, of in expected.items()
    }
    assert len(read) == 1438


def test_timm_reads_every_sample_with_its_label(whole):
    readers = pytest.importorskip("timm.data.readers", reason="timm is not installed")
    read = []
    for split in ("train", "val"):
        reader = readers.create_reader("wds/", str(whole), split=split, is_training=False, batch_size=1)
        read += [[split, str(label), hashlib.sha256(image.tobytes()).hexdigest()] for image, label in reader]
    expected = []
    for split in ("train", "val"):
        for path in whole.glob(f"*-{split}-*.tar"):
            with tarfile.open(path) as tar:
                labels, images = {}, {}
                for m in tar:
                    key, kind = m.name.split(".")
                    (labels if kind == "cls" else images)[key] = tar.extractfile(m).read()
            for key, data in images.items():
                pixels = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
                expected.append([split, labels[key].decode(), hashlib.sha256(pixels).hexdigest()])
    assert sorted(read) == sorted(expected)
