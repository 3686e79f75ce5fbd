"""The sharder: what it writes, that it writes the same again, and what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import manifest
from pipeline.errors import ConfigError, DataError
from pipeline.write import images
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import BadImage, Encoding, prepare
from pipeline.write.sources import Digits, ImageFolder, unique_keys


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_every_sample_is_read_back_by_index_by_webdataset_and_by_tarfile(shards, image_folder):
    dataset = manifest.open_dataset(shards["keep"])
    originals = {p.read_bytes() for p in image_folder.glob("*/*/*.jpg")}
    seen = 0
    for split in dataset.splits.values():
        for number, shard in enumerate(split.shards):
            path = split.root / shard.name
            with tarfile.open(path) as tar:
                members = {m.offset_data: m for m in tar.getmembers()}
                assert all(m.mtime == 0 and not m.pax_headers for m in members.values())
            rows = split.index[split.index["shard"] == number]
            plain = list(webdataset.WebDataset(str(path), shardshuffle=False))
            assert len(rows) == len(plain) == shard.samples
            for row, sample in zip(rows, plain):
                data = path.read_bytes()[row["offset"] : row["offset"] + row["size"]]
                assert data == sample["jpg"]
                assert data in originals  # keep keeps
                assert zlib.crc32(data) == row["crc32"]
                assert int(sample["cls"]) == row["label"]
                assert members[row["offset"]].name == sample["__key__"] + ".jpg"
                assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"])
                seen += 1
    assert seen == len(originals) == 16


def test_labels_are_those_of_the_class_folders(shards, image_folder):
    dataset = manifest.open_dataset(shards["keep"])
    assert dataset.classes == ["cat", "dog"]
    for name, split in dataset.splits.items():
        for number, shard in enumerate(split.shards):
            path = split.root / shard.name
            for row in split.index[split.index["shard"] == number]:
                data = path.read_bytes()[row["offset"] : row["offset"] + row["size"]]
                folder = image_folder / name / dataset.classes[row["label"]]
                assert data in {p.read_bytes() for p in folder.iterdir()}


def test_dali_index_lists_every_member_at_its_place(shards):
    for path in shards["jpeg"].glob("*.tar"):
        header, *lines = path.with_suffix(".idx").read_text().splitlines()
        assert header == f"v1.2 {len(lines)}"
        with tarfile.open(path) as tar:
            members = {m.name: (m.offset_data, m.size) for m in tar.getmembers()}
        for line in lines:
            fields = line.split()
            for ext, offset, size, name in (fields[:4], fields[4:]):
                assert members[name] == (int(offset), int(size))
                assert name.endswith("." + ext)


def test_the_manifest_says_what_is_there(shards):
    root = shards["jpeg"]
    content = json.loads((root / "manifest.json").read_text())
    for split in content["splits"].values():
        for shard in split["shards"]:
            data = (root / shard["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    info = json.loads((root / "_info.json").read_text())["splits"]
    assert info["train"]["num_samples"] == 12
    assert info["train"]["shard_lengths"] == [5, 5, 2]
    assert info["val"]["filenames"] == ["pets-val-000000.tar"]


@pytest.mark.parametrize("encoding", [Encoding(), Encoding("jpeg", 64, True, 80)])
def test_same_input_gives_same_bytes_with_any_number_of_workers(tmp_path, image_folder, encoding):
    plan = Plan(ImageFolder(image_folder / "train", image_folder / "val"), Options(encoding, samples_per_shard=3))
    for workers in (1, 2, 4):
        build(plan, tmp_path / str(workers), workers=workers)
    one = folder_bytes(tmp_path / "1")
    assert one == folder_bytes(tmp_path / "2") == folder_bytes(tmp_path / "4")


def test_the_seed_shuffles_over_all_shards(tmp_path):
    keys = []
    for seed in (0, 1):
        plan = Plan(Digits(side=8), Options(seed=seed))
        keys.append([item.key for task in plan.tasks if task.split == "train" for item in task.items])
    assert sorted(keys[0]) == sorted(keys[1])
    assert sum(a == b for a, b in zip(*keys)) < 20
    labels = [item.label for item in Plan(Digits(side=8), Options()).tasks[0].items]
    assert len(set(labels[:150])) == 10


def test_digits_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    source = Digits(side=8)
    for item in source.splits["val"][:50] + source.splits["train"][:50]:
        i = int(item.where)
        assert item.label == sklearn.target[i]
        decoded = np.asarray(Image.open(io.BytesIO(source.read(item)))).astype(float)
        assert np.abs(decoded - sklearn.images[i] * 255 / 16).max() < 24  # a JPEG of hard edges
    assert len(source.splits["val"]) == 359
    assert len(source.splits["train"]) == 1438


def test_jpeg_encoding_resizes_to_the_short_side_and_crops_the_square():
    data = encoded(Image.new("RGB", (500, 300), (10, 200, 90)), "JPEG")
    for square, size in ((False, (426, 256)), (True, (256, 256))):
        prepared = prepare(data, Encoding("jpeg", 256, square))
        assert (prepared.width, prepared.height) == size
        stored = Image.open(io.BytesIO(prepared.image))
        assert stored.size == size
        assert "progressive" not in stored.info
        assert stored.layer[0][1:3] == (2, 2)  # 4:2:0


@pytest.mark.parametrize(
    ("image", "kind", "was"),
    [
        (Image.new("RGB", (9, 7), (200, 10, 10)), "PNG", "PNG RGB"),
        (Image.new("RGBA", (9, 7), (200, 10, 10, 255)), "PNG", "PNG RGBA"),
        (Image.new("CMYK", (9, 7), (0, 240, 240, 50)), "JPEG", "JPEG CMYK"),
        (Image.new("P", (9, 7)), "GIF", "GIF P"),
    ],
)
def test_what_is_no_rgb_jpeg_is_converted_and_said(image, kind, was):
    prepared = prepare(encoded(image, kind), Encoding())
    assert prepared.converted == was
    stored = Image.open(io.BytesIO(prepared.image))
    assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (9, 7))
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(np.asarray(stored).astype(int) - expected).max() <= 6


def test_16_bit_grey_keeps_its_brightness():
    grey = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    stored = Image.open(io.BytesIO(prepare(encoded(grey, "PNG"), Encoding()).image))
    assert abs(int(np.asarray(stored).mean()) - 128) <= 1


GOOD = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is text, not a picture", "not an image"),
        (GOOD[: len(GOOD) // 2], "damaged or truncated"),
        (GOOD[:30], "not an image|damaged"),
    ],
)
def test_what_cannot_be_decoded_is_refused_with_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        prepare(data, Encoding())


@given(st.integers(1, len(GOOD) - 3))
def test_a_jpeg_cut_anywhere_is_refused(length):
    with pytest.raises(BadImage):
        prepare(GOOD[:length], Encoding())


def test_a_decompression_bomb_is_refused_from_its_header():
    header = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(header) < 200_000
    with pytest.raises(BadImage, match="30000×30000 pixels are over the limit"):
        prepare(header, Encoding())


def test_a_sliver_is_kept_as_it_is_but_not_blown_up():
    sliver = encoded(Image.new("RGB", (3000, 2)), "JPEG")
    assert prepare(sliver, Encoding()).width == 3000
    with pytest.raises(BadImage, match="3000×2 resized would be 384000×256"):
        prepare(sliver, Encoding("jpeg", 256, square=True))


def test_statistics_are_those_of_the_training_pixels(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "a").mkdir(parents=True)
    pixels = []
    for i in range(4):
        image = Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8))
        data = encoded(image, "JPEG", quality=95)
        (tmp_path / "in" / "a" / f"{i}.jpg").write_bytes(data)
        pixels.append(np.asarray(Image.open(io.BytesIO(data)))[4:36].reshape(-1, 3))
    written = build(Plan(ImageFolder(tmp_path / "in"), Options()), tmp_path / "out", workers=1)
    expected = np.concatenate(pixels).astype(float)
    assert written["statistics"]["mean"] == pytest.approx(expected.mean(0).tolist())
    assert written["statistics"]["std"] == pytest.approx(expected.std(0).tolist())


@given(st.lists(st.text(min_size=0, max_size=120), max_size=30))
def test_keys_are_unique_ascii_without_dots_and_fit_ustar(names):
    keys = unique_keys(names)
    assert len({key.lower() for key in keys}) == len(names)
    for key in keys:
        assert key.isascii()
        assert key
        assert not set("./ ") & set(key)
        assert len(key) + len(".jpg") <= 100


def test_similar_file_names_stay_distinct_samples(tmp_path):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    for name in ("x.1.jpg", "x.2.jpg", "x 1.jpg", "X_1.jpg", "ü.jpg"):
        (folder / name).write_bytes(GOOD)
    build(Plan(ImageFolder(tmp_path / "in"), Options()), tmp_path / "out", workers=1)
    found = list(webdataset.WebDataset(str(tmp_path / "out" / "imagefolder-train-000000.tar"), shardshuffle=False))
    assert len(found) == 5


def test_bad_images_are_all_listed_and_nothing_is_published(tmp_path):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (folder / "good.jpg").write_bytes(GOOD)
    (folder / "notes.txt").write_text("hello")
    (folder / "cut.jpg").write_bytes(GOOD[:500])
    plan = Plan(ImageFolder(tmp_path / "in"), Options())
    with pytest.raises(DataError, match=r"2 of 3 images cannot be used.*a/cut.jpg.*a/notes.txt: not an image"):
        build(plan, tmp_path / "out", workers=1)
    with pytest.raises(DataError, match="its sharding never finished"):
        manifest.open_dataset(tmp_path / "out")
    allowed = Plan(plan.source, Options(max_bad_fraction=0.7))
    written = build(allowed, tmp_path / "out", workers=1)
    assert len(written["quarantine"]) == 2
    assert written["splits"]["train"]["samples"] == 1


def test_a_finished_dataset_and_foreign_files_are_never_overwritten(tmp_path):
    plan = Plan(Digits(side=8), Options())
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis.tex, which is none of ours"):
        build(plan, tmp_path, workers=1)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "digits-train-000009.tar.partial").write_text("of a killed run")
    build(plan, tmp_path, workers=1)
    assert not list(tmp_path.glob("*.partial"))
    before = folder_bytes(tmp_path)
    with pytest.raises(ConfigError, match="holds a finished dataset already"):
        build(plan, tmp_path, workers=1)
    assert folder_bytes(tmp_path) == before


def test_pixel_limit_is_our_own():
    assert images.Image.MAX_IMAGE_PIXELS is None


def test_only_names_that_we_would_write_are_cleared_away(tmp_path):
    (tmp_path / "digits-backup.tar").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds digits-backup\.tar, which is none of ours"):
        build(Plan(Digits(side=8), Options()), tmp_path, workers=1)
    assert (tmp_path / "digits-backup.tar").read_text() == "years of work"


def test_a_shard_that_lost_all_its_images_leaves_a_dataset_that_opens(tmp_path):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(GOOD)
    (folder / "bad.jpg").write_bytes(GOOD[:300])
    plan = Plan(ImageFolder(tmp_path / "in"), Options(samples_per_shard=1, max_bad_fraction=0.5))
    build(plan, tmp_path / "out", workers=1)
    split = manifest.open_dataset(tmp_path / "out").split("train")
    assert split.samples == 5
    assert sorted(shard.samples for shard in split.shards) == [0, 1, 1, 1, 1, 1]


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(GOOD)
    with pytest.raises(DataError, match="the name is not UTF-8; rename it"):
        ImageFolder(tmp_path / "in")


def test_many_equal_names_take_no_time():
    started = time.process_time()
    assert len(set(unique_keys(["图片.jpg"] * 200_000))) == 200_000
    assert time.process_time() - started < 5


def stray(jpeg: bytes) -> bytes:
    """The same picture with three bytes between its first two segments."""
    end = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:end] + b"\0\1\2" + jpeg[end:]


def test_a_jpeg_with_stray_bytes_is_converted_since_dali_refuses_it():
    assert prepare(GOOD, Encoding()).converted is None
    prepared = prepare(stray(GOOD), Encoding())
    assert prepared.converted == "JPEG RGB with stray bytes"
    assert prepare(prepared.image, Encoding()).converted is None


def test_links_are_followed_once_and_hidden_folders_are_not_images(tmp_path):
    folder, other = tmp_path / "in" / "a", tmp_path / "other"
    for path in (folder / ".ipynb_checkpoints", folder / "deep", other):
        path.mkdir(parents=True)
    for path in (folder / "1.jpg", folder / ".ipynb_checkpoints" / "1.jpg", folder / "deep" / "2.jpg", other / "3.jpg"):
        path.write_bytes(GOOD)
    (folder / "more").symlink_to(other)
    (folder / "deep" / "circle").symlink_to(folder)
    where = [item.where for item in ImageFolder(tmp_path / "in").splits["train"]]
    assert where == ["train/a/1.jpg", "train/a/deep/2.jpg", "train/a/more/3.jpg"]


def test_pipes_and_dangling_links_are_listed_and_not_waited_for(tmp_path):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(GOOD)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    plan = Plan(ImageFolder(tmp_path / "in"), Options())
    with pytest.raises(DataError, match=r"2 of 3 .*gone.jpg: neither a file.*pipe.jpg: neither a file"):
        build(plan, tmp_path / "out", workers=1)
