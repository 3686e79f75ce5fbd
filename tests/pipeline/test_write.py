"""The sharder: what it writes, that it writes the same bytes each time, and what it rejects."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import shutil
import socket
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import manifest, resample
from pipeline.decode import BadImage
from pipeline.errors import ConfigError, DataError, ExpressError
from pipeline.geometry import centre_offset, resized
from pipeline.shards import Sample, write_shard
from pipeline.storage import Folder
from pipeline.write import build as build_module
from pipeline.write import images, resize
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import Digits, ImageFolder
from pipeline.write.sources.base import PassedOver, UniqueKeys
from pipeline.write.sources.folders import files_of_images
from tests.conftest import picture


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def prepare(data: bytes, encoding: Encoding) -> images.Prepared:
    return images.prepare(data, encoding, resize.Totals.zeros(encoding.size))


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


samples = st.builds(
    Sample,
    st.from_regex(r"[a-zA-Z0-9_-]{1,90}", fullmatch=True),
    st.binary(max_size=1600),
    st.integers(-1, 21_841),
    st.just(3),
    st.just(4),
)


@settings(deadline=None)
@given(st.lists(samples, max_size=25, unique_by=lambda sample: sample.key), st.sampled_from(["jpg", "raw"]))
def test_a_shard_is_byte_for_byte_what_webdataset_writes(tmp_path_factory, samples, extension):
    path = tmp_path_factory.mktemp("shard") / "x.tar"
    write_shard(Folder(path.parent), path.name, samples, extension=extension)
    expected = io.BytesIO()
    with webdataset.TarWriter(expected, mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, "cls": str(sample.label).encode(), extension: sample.image})
    assert path.read_bytes() == expected.getvalue()


def blended(image: np.ndarray, length: int, resampled: int) -> np.ndarray:
    """Resamples axis 0 with the sharder's weights, in NumPy's integers."""
    x = resample.triangle(0.0, length / resampled, length, resampled, False)
    weights = (x.weights.reshape(resampled, x.taps) * resample.ONE).astype(np.int64)
    rows = image[np.minimum(x.first[:, None] + np.arange(x.taps), length - 1)].astype(np.int64)
    return (np.einsum("rt,rtwc->rwc", weights, rows) + resample.ONE // 2) // resample.ONE


@settings(deadline=None)
@example(164, 164, 287, 0)  # two grey levels at one value
@example(134, 2, 39, 5)  # at 50 of an image that is enlarged 20 times
@given(st.integers(1, 700), st.integers(1, 700), st.integers(8, 300), st.integers(0, 9))
def test_resizing_is_pillows_but_for_a_grey_level_and_exact_in_whole_numbers(width, height, short, seed):
    to = tuple(int(side) for side in resized(width, height, short))
    if max(to) > 3000:
        return
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pillows = np.asarray(Image.fromarray(image).resize(to, Image.Resampling.BILINEAR)).astype(int)
    expected = blended(blended(image, height, to[1]).swapaxes(0, 1), width, to[0]).swapaxes(0, 1)
    difference = np.abs(expected - pillows)
    assert difference.max() <= 2  # each direction may round to another side
    alike = max(1, to[0] / width)  # neighbours of an enlarged image, which round to the same side
    assert np.count_nonzero(difference > 1) <= alike * (2 + difference.size / 100_000)  # of noise, one in a million
    assert np.array_equal(resize.resize(image, short, square=False), expected)
    left, top = (int(centre_offset(side, short)) for side in to)
    square = resize.resize(image, short, square=True)
    assert np.array_equal(square, expected[top : top + short, left : left + short])


@settings(deadline=None)  # the first example compiles
@given(st.integers(1, 300), st.integers(0, 40), st.integers(0, 40), st.integers(0, 9))
def test_sums_are_numpys(side, more_lines, more_columns, seed):
    image = np.random.default_rng(seed).integers(0, 256, (side + more_lines, side + more_columns, 3), dtype=np.uint8)
    top, left = (int(centre_offset(length, side)) for length in image.shape[:2])
    wide = image[top : top + side, left : left + side].astype(np.int64)
    square = resize.centre(image, side)
    sums = resize.Totals.zeros(side)
    for _ in range(2):
        sums.add(square)
    products = np.einsum("hwi,hwj->ij", wide, wide)
    numbers, image_sum = sums
    assert numbers[:2].tolist() == [2, 2 * side * side]
    assert (numbers[2:5] == 2 * wide.sum((0, 1))).all()
    assert (numbers[5:] == 2 * products[np.triu_indices(3)]).all()
    assert (image_sum == 2 * wide.reshape(-1)).all()


def test_sums_of_many_white_images_overflow_nothing():
    white = resize.centre(np.full((8, 8, 3), 255, np.uint8), 8)
    sums = resize.Totals.zeros(8)
    for number in range(1, 800):
        sums.add(white)
        if number in (100, 257, 258):
            assert (sums.image == 255 * number).all()
    assert (sums.image == 255 * 799).all()
    assert (sums.numbers[2:5] == 255 * 799 * 64).all()


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
    for item in [*source.splits["val"]][:50] + [*source.splits["train"]][:50]:
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
def test_what_cannot_be_decoded_is_rejected_with_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        prepare(data, Encoding())


@given(st.integers(1, len(GOOD) - 3))
def test_a_jpeg_cut_anywhere_is_rejected(length):
    with pytest.raises(BadImage):
        prepare(GOOD[:length], Encoding())


def test_a_decompression_bomb_is_rejected_from_its_header():
    header = encoded(Image.new("1", (11_000, 11_000)), "PNG")
    assert len(header) < 200_000
    with pytest.raises(BadImage, match="11000×11000 pixels are over the limit"):
        prepare(header, Encoding())


def test_a_sliver_is_kept_as_it_is_but_not_blown_up():
    sliver = encoded(Image.new("RGB", (3000, 2)), "JPEG")
    assert prepare(sliver, Encoding()).width == 3000
    with pytest.raises(BadImage, match="3000×2 resized would be 384000×256"):
        prepare(sliver, Encoding("jpeg", 256, square=True))


def test_statistics_are_those_of_the_training_pixels(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "a").mkdir(parents=True)
    read = []
    for i in range(4):
        image = Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8))
        data = encoded(image, "JPEG", quality=95)
        (tmp_path / "in" / "a" / f"{i}.jpg").write_bytes(data)
        read.append(np.asarray(Image.open(io.BytesIO(data)))[4:36].reshape(-1, 3))
    written = build(Plan(ImageFolder(tmp_path / "in"), Options()), tmp_path / "out", workers=1)
    expected = np.concatenate(read).astype(float)
    assert written["statistics"]["mean"] == pytest.approx(expected.mean(0).tolist())
    assert written["statistics"]["std"] == pytest.approx(expected.std(0).tolist())


def test_mean_image_and_principal_colours_are_those_of_the_squares(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "a").mkdir(parents=True)
    squares = []
    for i in range(3):
        data = encoded(picture(rng, 90 + i, 70), "JPEG", quality=95)
        (tmp_path / "in" / "a" / f"{i}.jpg").write_bytes(data)
        image = np.asarray(Image.open(io.BytesIO(data)))
        square = resize.resize(image, 32, square=True)
        squares.append(square.astype(float))
    build(Plan(ImageFolder(tmp_path / "in"), Options(Encoding(size=32))), tmp_path / "out", workers=1)
    dataset = manifest.open_dataset(tmp_path / "out")
    assert np.allclose(dataset.mean_image, np.mean(squares, 0), atol=1e-4)
    covariance = np.cov(np.concatenate([square.reshape(-1, 3) for square in squares]).T, bias=True)
    assert np.allclose(dataset.covariance, covariance)
    statistics = dataset.manifest["statistics"]
    for value, vector in zip(statistics["eigenvalues"], statistics["eigenvectors"]):
        assert np.allclose(covariance @ vector, np.array(value) * vector, atol=1e-5)
        assert max(vector, key=abs) > 0


def test_without_statistics_there_are_none_and_a_normalisation_that_needs_them_says_so(tmp_path, image_folder):
    for check in ("full", "header"):
        options = Options(stats=False, check=check)
        build(Plan(ImageFolder(image_folder / "train"), options), tmp_path / check, workers=1)
        dataset = manifest.open_dataset(tmp_path / check)
        assert dataset.manifest["statistics"] == {}
        with pytest.raises(DataError, match="its manifest has no mean; shard the data again, with statistics"):
            assert dataset.mean
    full, header = folder_bytes(tmp_path / "full"), folder_bytes(tmp_path / "header")
    assert {n: b for n, b in full.items() if n != "manifest.json"} == {
        n: b for n, b in header.items() if n != "manifest.json"
    }
    with pytest.raises(ConfigError, match="check=header goes with encode=keep and stats off"):
        Options(check="header")


@pytest.mark.parametrize("stats", [True, False])
def test_a_jpeg_cut_or_damaged_is_rejected_with_and_without_statistics(stats):
    totals = resize.Totals.zeros(256) if stats else None
    assert images.prepare(GOOD, Encoding(), totals).image == GOOD
    for length in range(1, len(GOOD) - 2, 97):
        with pytest.raises(BadImage):
            images.prepare(GOOD[:length], Encoding(), totals)


def test_a_part_of_each_class_is_held_out_by_name_alone(tmp_path, image_folder):
    for root in (tmp_path / "a", tmp_path / "b"):
        shutil.copytree(image_folder / "train", root)
    first, second = (ImageFolder(root, val_fraction=0.34) for root in (tmp_path / "a", tmp_path / "b"))
    assert list(first.splits["val"]) == list(second.splits["val"])
    assert np.bincount(first.splits["val"].labels).tolist() == [2, 2]
    assert {item.key for item in (*first.splits["val"], *first.splits["train"])} == {
        item.key for item in ImageFolder(tmp_path / "a").splits["train"]
    }
    with pytest.raises(DataError, match="no class is large enough"):
        ImageFolder(tmp_path / "a", val_fraction=0.01)


@pytest.mark.parametrize("kind", ["keep", "jpeg", "raw"])
@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "I;16", "CMYK", "LA"])
def test_a_single_pixel_of_any_kind_is_an_image(kind, mode):
    image = Image.new(mode, (1, 1))
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    prepared = prepare(data, Encoding(kind, 16))
    assert prepared.converted
    assert (prepared.width, prepared.height) == ((1, 1) if kind == "keep" else (16, 16))


def test_the_first_frame_of_an_animation_is_the_image():
    frames = [Image.new("P", (20, 20), colour) for colour in (3, 200)]
    frames[0].putpalette([i for colour in range(256) for i in (colour, 0, 0)])
    frames[1].putpalette([i for colour in range(256) for i in (0, colour, 0)])
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    stored = np.asarray(Image.open(io.BytesIO(prepare(data, Encoding()).image)))
    assert stored[..., 1].max() < 20


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    for kind, size in (("keep", (40, 20)), ("jpeg", (32, 16))):
        prepared = prepare(data, Encoding(kind, 16))
        assert (prepared.width, prepared.height) == size


@given(st.lists(st.text(min_size=0, max_size=120), max_size=30))
def test_keys_are_unique_ascii_without_dots_and_fit_ustar(names):
    keys = list(map(UniqueKeys(), names))
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
    (folder / "notes.doc").write_text("hello")
    (folder / "cut.jpg").write_bytes(GOOD[:500])
    plan = Plan(ImageFolder(tmp_path / "in"), Options())
    with pytest.raises(DataError, match=r"2 of 3 images cannot be used.*a/cut.jpg.*a/notes.doc: not an image"):
        build(plan, tmp_path / "out", workers=1)
    with pytest.raises(DataError, match="its sharding never finished"):
        manifest.open_dataset(tmp_path / "out")
    allowed = Plan(plan.source, Options(max_bad_fraction=0.7))
    written = build(allowed, tmp_path / "out", workers=1)
    assert len(written["quarantine"]) == 2
    assert written["splits"]["train"]["samples"] == 1


def test_removing_a_bad_image_continues_the_sharding(tmp_path, monkeypatch):
    """Shards whose images stay the same are kept; the rest and the bytes are those of a fresh sharding."""
    source, options = tmp_path / "in", Options(samples_per_shard=3)
    for name in ("cat", "dog"):
        (source / name).mkdir(parents=True)
        for i in range(7):
            (source / name / f"{i}.jpg").write_bytes(encoded(picture(np.random.default_rng(i), 40, 40), "JPEG"))
    plan = Plan(ImageFolder(source), options)
    bad = source / plan.tasks[2].items[1].where.removeprefix("train/")
    whole = bad.read_bytes()
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 14 images cannot be used"):
        build(plan, tmp_path / "out", workers=1)
    bad.unlink()
    made, plan = [], Plan(ImageFolder(source), options)
    monkeypatch.setattr(
        build_module,
        "write_shard",
        lambda folder, name, *a, **k: made.append(name) or write_shard(folder, name, *a, **k),
    )
    build(plan, tmp_path / "out", workers=1)
    assert made == [task.name for task in plan.tasks[2:]]
    build(plan, tmp_path / "fresh", workers=1)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")
    assert manifest.open_dataset(tmp_path / "out").split("train").samples == 13
    bad.write_bytes(whole)
    with pytest.raises(ConfigError, match=rf"of other images; this run would have 1 more \(train/{key(bad)}\); remove"):
        build(Plan(ImageFolder(source), options), tmp_path / "out", workers=1)


def key(image: Path) -> str:
    return f"{image.parent.name}_{image.stem}"


def test_images_that_differ_from_a_finished_dataset_are_named(tmp_path):
    """Also those that were left out, which no tar holds; if only a label differs, both hashes are reported."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(5):
            image = picture(np.random.default_rng(i + 10 * label), 40, 40)
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(encoded(image, "JPEG"))
    cat, dog = tmp_path / "in" / "cat", tmp_path / "in" / "dog"
    (cat / "2.jpg").write_bytes(b"no image")
    options = Options(samples_per_shard=3, max_bad_fraction=0.2)
    build(Plan(ImageFolder(tmp_path / "in"), options), tmp_path / "out", workers=1)

    def differences() -> str:
        with pytest.raises(ConfigError) as raised:
            build(Plan(ImageFolder(tmp_path / "in"), options), tmp_path / "out", workers=1)
        return str(raised.value).partition("finished dataset ")[2]

    (cat / "2.jpg").unlink()
    cure = "remove it, or choose another --out"
    assert differences() == f"of other images; this run would have 1 fewer (train/cat/2.jpg); {cure}"
    (cat / "2.jpg").write_bytes(b"no image")
    (dog / "0.jpg").rename(dog / "new.jpg")
    (dog / "1.jpg").unlink()
    both = "1 more (train/dog_new), 2 fewer (train/dog_0, train/dog_1)"
    assert differences() == f"of other images; this run would have {both}; {cure}"


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
    build(plan, tmp_path, workers=1)
    with pytest.raises(ConfigError, match=r"holds a finished dataset with options\.seed=0, but this one has 1;"):
        build(Plan(Digits(side=8), Options(seed=1)), tmp_path, workers=1)
    assert folder_bytes(tmp_path) == before


def test_a_manifest_whose_plan_is_none_of_ours_is_one_line(image_folder, tmp_path):
    plan = Plan(ImageFolder(image_folder / "val"), Options())
    written = build(plan, tmp_path, workers=1)
    for planned in ({"plan": 3}, {"plan": {}, "quarantine": None}, {"plan": {"options": []}}):
        manifest.write_manifest(Folder(tmp_path), written | planned)
        with pytest.raises(ExpressError, match=r"its plan cannot be read|holds a finished dataset with dataset=None"):
            build(plan, tmp_path, workers=1)


def test_a_class_whose_images_are_all_bad_is_an_error(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(GOOD if name == "cat" or i == 2 else GOOD[:300])
    options = Options(max_bad_fraction=0.9)
    bad = tmp_path / "in" / "dog" / "2.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match="dog: no image of this class can be used; remove the class, or repair"):
        build(Plan(ImageFolder(tmp_path / "in"), options), tmp_path / "out", workers=1)
    bad.write_bytes(GOOD)
    shutil.rmtree(tmp_path / "out" / "parts")
    written = build(Plan(ImageFolder(tmp_path / "in"), options), tmp_path / "out", workers=1)
    assert (written["splits"]["train"]["samples"], len(written["quarantine"])) == (4, 2)


def test_pixel_limit_is_our_own():
    assert Image.MAX_IMAGE_PIXELS is None


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


def test_a_name_that_is_not_utf_8_is_rejected_before_anything_is_written(tmp_path):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(GOOD)
    with pytest.raises(DataError, match="the name is not UTF-8; rename it"):
        ImageFolder(tmp_path / "in")


def test_many_equal_names_take_no_time():
    started = time.process_time()
    assert len(set(map(UniqueKeys(), ["图片.jpg"] * 200_000))) == 200_000
    assert time.process_time() - started < 60  # under a second; hours if each name were compared with each other


def stray(jpeg: bytes) -> bytes:
    """The same picture with three bytes between its first two segments."""
    end = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:end] + b"\0\1\2" + jpeg[end:]


def test_a_jpeg_with_stray_bytes_is_converted_since_dali_rejects_it():
    assert prepare(GOOD, Encoding()).converted is None
    prepared = prepare(stray(GOOD), Encoding())
    assert prepared.converted == "JPEG with stray bytes"
    assert prepare(prepared.image, Encoding()).converted is None


def test_links_are_followed_once_and_hidden_folders_are_not_images(tmp_path):
    folder, other = tmp_path / "in" / "a", tmp_path / "other"
    for path in (folder / ".ipynb_checkpoints", folder / "deep", other):
        path.mkdir(parents=True)
    for path in (folder / "1.jpg", folder / ".ipynb_checkpoints" / "1.jpg", folder / "deep" / "2.jpg", other / "3.jpg"):
        path.write_bytes(GOOD)
    (folder / "more").symlink_to(other)
    (folder / "deep" / "circle").symlink_to(folder)
    (tmp_path / "in" / "b").mkdir()
    (tmp_path / "in" / "b" / "4.jpg").write_bytes(GOOD)
    (folder / "above").symlink_to("..")  # holds the other classes
    where = [item.where for item in ImageFolder(tmp_path / "in").splits["train"]]
    assert where == ["train/a/1.jpg", "train/a/deep/2.jpg", "train/a/more/3.jpg", "train/b/4.jpg"]


def test_folders_may_be_nested_deeper_than_functions(tmp_path):
    deepest = tmp_path / "/".join(["d"] * 200)
    deepest.mkdir(parents=True)
    (deepest / "a.jpg").write_bytes(GOOD)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert list(files_of_images(tmp_path, PassedOver())) == [str(deepest / "a.jpg")]
    finally:
        sys.setrecursionlimit(before)


def test_litter_is_passed_over_and_counted_and_nothing_else(tmp_path):
    for name in ("a/1.jpg", "a/note.jpg.txt", "a/real.txt", "b/x", "a/@eaDir/1.jpg", "a/@eaDir/2/3.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"a cat" if name.startswith("a/note") else GOOD)
    for name in ("Thumbs.db", "a/thumbs.DB", "a/desktop.ini", "b/.DS_Store", "b/._x", "b/n.csv", "labels.csv"):
        (tmp_path / "in" / name).write_text("litter")
    (tmp_path / "in" / "__MACOSX").mkdir()
    (tmp_path / "in" / "__MACOSX" / "._a").write_text("litter")
    os.mkfifo(tmp_path / "in" / "b" / "pipe.txt")
    source = ImageFolder(tmp_path / "in")
    assert [item.where for item in source.splits["train"]] == ["train/a/1.jpg", "train/a/real.txt", "train/b/x"]
    assert {kind: count for kind, (count, _) in source.passed_over.items()} == {
        "Thumbs.db": 1, "thumbs.DB": 1, "desktop.ini": 1, "hidden": 2, "@eaDir": 2, "__MACOSX": 1,
        ".txt": 2, ".csv": 1, "outside the class folders": 1,
    }  # fmt: skip
    (tmp_path / "in" / "c").mkdir()
    (tmp_path / "in" / "c" / "note.md").write_text("no image")
    with pytest.raises(DataError, match="in/c: no image in this class folder"):
        ImageFolder(tmp_path / "in")


def test_two_spellings_of_a_class_are_one_and_kept_as_found(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for name in (f"t/{decomposed}/1.jpg", "t/zoo/1.jpg", f"v/{composed}/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(GOOD)
    source = ImageFolder(tmp_path / "t", tmp_path / "v")
    assert source.classes == [decomposed, "zoo"]
    assert source.splits["val"][0].label == 0
    assert source.splits["val"][0].where == f"val/{composed}/1.jpg"
    (tmp_path / "t" / composed).mkdir()
    with pytest.raises(DataError, match=r"'cafe\\u0301' and 'caf\\xe9' are one name in two Unicode spellings"):
        ImageFolder(tmp_path / "t")


def test_pipes_and_dangling_links_are_listed_and_not_waited_for(tmp_path, monkeypatch):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(GOOD)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    for loop in (folder / "loop.jpg", tmp_path / "in" / "loop"):
        loop.symlink_to(loop.name)
    with monkeypatch.context() as within, socket.socket(socket.AF_UNIX) as server:
        within.chdir(folder)  # a path of a socket is short
        server.bind("socket.jpg")
    source = ImageFolder(tmp_path / "in")
    assert source.passed_over == {"outside the class folders": (1, f"{tmp_path}/in/loop")}
    plan = Plan(source, Options())
    listed = ".*".join(f"{name}.jpg: neither a file" for name in ("gone", "loop", "pipe", "socket"))
    with pytest.raises(DataError, match=f"4 of 5 .*{listed}"):
        build(plan, tmp_path / "out", workers=1)
