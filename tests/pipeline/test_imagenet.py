"""ImageNet's own archives, in miniature: every label equals that which the archives were made with."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline import manifest
from pipeline.errors import DataError
from pipeline.storage import Folder
from pipeline.write.build import Options, Plan, build
from pipeline.write.sources.imagenet import VERIFIED, ImageNet2010, ImageNet2012
from tests.conftest import run_tool, the_error
from tests.pipeline import archives
from tests.pipeline.archives import WNIDS, Mini, tar_of

MAKE = "tools/make_shards.py"


@pytest.fixture(scope="module", params=[2010, 2012])
def mini(request, tmp_path_factory) -> tuple[int, Mini]:
    return request.param, Mini(tmp_path_factory.mktemp("archives"), request.param)


def source(mini: Mini, year: int, **options) -> ImageNet2012:
    return {2010: ImageNet2010, 2012: ImageNet2012}[year](mini.root, **options)


def test_every_image_has_its_label_and_its_bytes(mini, tmp_path):
    year, made = mini
    build(Plan(source(made, year), Options(samples_per_shard=8)), tmp_path, workers=2)
    dataset = manifest.open_dataset(tmp_path)
    assert dataset.classes == WNIDS
    assert dataset.manifest["class_names"][0] == "n01440764, a thing"
    seen = {}
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                seen[member.name] = tar.extractfile(member).read()
    converted = {entry["image"].partition("/")[2] for entry in dataset.manifest["converted"]}
    assert 1 <= len(converted) <= 2  # the CMYK and the PNG, if no patch replaced it
    for name, label in made.labels.items():
        key = name.removesuffix(".JPEG")
        assert int(seen.pop(f"{key}.cls")) == label
        stored = seen.pop(f"{key}.jpg")
        if name not in converted:
            assert stored == made.data[name]
        else:
            expected = np.asarray(Image.open(io.BytesIO(made.data[name])).convert("RGB")).astype(int)
            assert (
                np.abs(np.asarray(Image.open(io.BytesIO(stored))).astype(int) - expected).mean() < 8
            )  # chroma is halved
    assert not seen
    test = 7 if year == 2010 else 4
    splits = {name: split.samples for name, split in dataset.splits.items()}
    assert splits == {"train": len(made.data) - 11 - test, "val": 11, "test": test}


def test_labels_of_the_index_are_those_of_the_tars(mini, tmp_path):
    year, made = mini
    build(Plan(source(made, year), Options()), tmp_path, workers=1)
    for name, split in manifest.open_dataset(tmp_path).splits.items():
        prefix = "n0" if name == "train" else f"ILSVRC{year}_{name}_"
        expected = sorted(label for file, label in made.labels.items() if file.startswith(prefix))
        assert sorted(split.index["label"].tolist()) == expected


@pytest.mark.parametrize("what", ["train", "val", "devkit"])
def test_a_missing_archive_is_named(tmp_path, what):
    made = Mini(tmp_path, 2012)
    (path,) = [p for p in tmp_path.iterdir() if what in p.name]
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: missing; download it"):
        source(made, 2012)


def test_a_missing_class_is_named(tmp_path):
    made = Mini(tmp_path, 2012, missing="n02084071")
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar: 1 of 5 classes are missing, n02084071 first"):
        source(made, 2012)


def test_counts_are_the_kits(tmp_path):
    made = Mini(tmp_path, 2012)
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar") as tar:
        inner = {m.name: tar.extractfile(m).read() for m in tar}
    with tarfile.open(fileobj=io.BytesIO(inner["n01440764.tar"])) as tar:
        images = {m.name: tar.extractfile(m).read() for m in tar}
    images.popitem()
    inner["n01440764.tar"] = tar_of(images, order=np.random.default_rng(0))
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner, order=np.random.default_rng(0)))
    with pytest.raises(DataError, match=rf"n01440764 has {len(images)} images, but the kit counts {len(images) + 1}"):
        source(made, 2012)
    assert len(source(made, 2012, counts=False).splits["train"]) == len(made.data) - 11 - 4 - 1


def test_a_label_too_few_and_a_foreign_one_are_named(tmp_path):
    made = Mini(tmp_path, 2010)
    path = tmp_path / "ILSVRC2010_test_ground_truth.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match=r"ILSVRC2010_images_test\.tar: holds 7 images, but there are 6 labels"):
        source(made, 2010)
    path.write_text("\n".join([*lines[:-1], "1001"]))
    with pytest.raises(DataError, match=r"ground_truth\.txt: line 7 is '1001', no class of"):
        source(made, 2010)


def test_a_first_class_that_is_not_imagenets_is_rejected(tmp_path, monkeypatch):
    renamed = ["n01500000" if wnid == "n01440764" else wnid for wnid in WNIDS]
    monkeypatch.setattr(archives, "ID_OF", dict(zip(renamed, archives.ID_OF.values())))
    monkeypatch.setattr(archives, "WNIDS", renamed)
    made = Mini(tmp_path, 2012)
    with pytest.raises(DataError, match="its first class is n01443537, but ImageNet 2012 has n01440764"):
        source(made, 2012)


@pytest.mark.parametrize("damage", [b"", b"not a gzip", None])
def test_a_damaged_kit_is_named(tmp_path, damage):
    made = Mini(tmp_path, 2012)
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(DataError, match=r"devkit_t12\.tar\.gz: (damaged|holds no data/meta\.mat)"):
        source(made, 2012)


def test_md5_sums_are_compared_and_the_file_named(tmp_path):
    Mini(tmp_path / "in", 2012)
    args = (MAKE, "imagenet2012", "--src", tmp_path / "in", "--out", tmp_path / "out")
    done = run_tool(*args)
    assert done.returncode == 65
    assert "ILSVRC2012_img_train.tar: md5 " in done.stderr.splitlines()[-1]
    assert "or pass --no-md5" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = run_tool(*args, "--no-md5")
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout


def test_md5_sums_that_agree_are_remembered(tmp_path, monkeypatch):
    made = source(Mini(tmp_path, 2012), 2012, md5=True)
    made.sums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in made.sums}
    made.verify(Folder(tmp_path))
    assert json.loads((tmp_path / VERIFIED).read_text()).keys() == made.sums.keys()
    monkeypatch.setattr(hashlib, "md5", None)  # not needed again
    made.verify(Folder(tmp_path))


def test_2012_without_the_test_archive_has_no_test_split(tmp_path):
    made = Mini(tmp_path, 2012, test=False)
    assert set(source(made, 2012).splits) == {"train", "val"}


def test_a_shrunken_archive_is_bad_images_and_no_crash(tmp_path):
    made = source(Mini(tmp_path, 2012), 2012)
    with open(tmp_path / "ILSVRC2012_img_val.tar", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(DataError, match=r"val/ILSVRC2012_val_0000000\d.JPEG: ILSVRC2012_img_val.tar ends before it"):
        build(Plan(made, Options()), tmp_path / "out", workers=1)


def test_a_folder_without_archives_is_one_line(tmp_path):
    done = run_tool(MAKE, "imagenet2010", "--src", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 65
    assert "ILSVRC2010_devkit-1.0.tar.gz: missing" in the_error(done)
