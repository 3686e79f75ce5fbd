"""Cuts: every pixel of a cut is the whole image's, whatever the image, and what cannot be cut is decoded whole.

FAULTS set tries 20,000 damaged places and images (`make faults`); 60 otherwise.
"""

from __future__ import annotations

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from simplejpeg import decode_jpeg, encode_jpeg

from pipeline import AugmentConfig, Loader, LoaderConfig, cuts, verify
from pipeline.cut_jpeg import EXTRA, cut_jpeg
from pipeline.errors import ConfigError, DataError
from pipeline.huffman import SLACK
from pipeline.jpeg import HEADER, find_places, pack, read_header, unpack
from pipeline.manifest import open_dataset
from pipeline.write.build import Options, Plan, build
from pipeline.write.cuts import make_cuts
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from tests.conftest import picture
from tools import make_shards

EXAMPLES = 20_000 if "FAULTS" in os.environ else 60
CANARY = 0xA5


def cut(image: bytes, places: bytes, box: tuple[int, int, int, int]) -> tuple[bytes, list[int]]:
    """The cut and its place; nothing but the stated memory is written."""
    data, header, placed = np.frombuffer(bytearray(image), np.uint8), np.zeros(HEADER, np.int32), np.zeros(4, np.int64)
    memory, size, end = np.full(2 * len(data) + EXTRA + 64, CANARY, np.uint8), 2 * len(data) + EXTRA, 0
    if read_header(data, header):
        packed = np.frombuffer(bytearray(places + bytes(SLACK)), np.uint8)
        end = cut_jpeg(data, header, packed, np.array(box), memory[:size], placed)
    assert (memory[size:] == CANARY).all()
    return memory[:end].tobytes(), placed.tolist()


def places_of(image: bytes) -> bytes:
    return pack(find_places(np.frombuffer(bytearray(image), np.uint8), np.zeros(HEADER, np.int32)))


def encoded(seed: int, width: int, height: int, kind: str, quality: int) -> bytes:
    pixels = np.asarray(picture(np.random.default_rng(seed), width, height).convert("RGB"))
    if kind == "optimised":  # codes for those categories alone that the image has
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", optimize=True, quality=quality)
        return file.getvalue()
    colours = "GRAY" if kind == "Gray" else "RGB"
    return encode_jpeg(
        np.ascontiguousarray(pixels[..., :1]) if kind == "Gray" else pixels,
        quality=quality,
        colorspace=colours,
        colorsubsampling=kind,
    )


def assert_equal(image: bytes, places: bytes, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    data, (x, y, width, height) = cut(image, places, box)
    assert data
    pixels = decode_jpeg(data, strict=True)
    assert pixels.shape == (height, width, 3)
    assert np.array_equal(
        pixels[top - y : bottom - y, left - x : right - x], decode_jpeg(image)[top:bottom, left:right]
    )
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(theirs, pixels)


@settings(max_examples=max(EXAMPLES // 10, 60), deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from(["444", "422", "420", "440", "Gray", "optimised"]),
    st.sampled_from([30, 75, 90, 100]),
    st.data(),
)
def test_a_cut_has_the_pixels_of_the_whole_image(seed, size, kind, quality, data):
    image = encoded(seed, *size, kind, quality)
    places = places_of(image)
    assert len(places)
    for _ in range(4):
        left, top = (data.draw(st.integers(0, length - 1)) for length in size)
        right, bottom = (data.draw(st.integers(at + 1, length)) for at, length in zip((left, top), size, strict=True))
        assert_equal(image, places, (left, top, right, bottom))


@pytest.mark.parametrize("kind", ["444", "422", "420", "440", "Gray", "optimised"])
def test_borders_and_single_pixels(kind):
    """Every corner, and every pixel beside the border of an MCU; 17 to 20 pixels leave a last column of 1 to 4."""
    for width, height in ((17, 20), (33, 18), (130, 65), (64, 64)):
        image = encoded(1, width, height, kind, 80)
        places = places_of(image)
        for x in {0, 1, 14, 15, 16, 17, 63, 64, 65, width - 2, width - 1}:
            for y in {0, 7, 8, 15, 16, height - 1}:
                if 0 <= x < width and y < height:
                    assert_equal(image, places, (x, y, x + 1, y + 1))


def saved(**options: object) -> bytes:
    file = io.BytesIO()
    image = picture(np.random.default_rng(0), 90, 70)
    image.convert(options.pop("mode", "RGB")).save(file, "JPEG", **options)
    return file.getvalue()


ODD = {
    "progressive": saved(progressive=True),
    "CMYK": saved(mode="CMYK"),
    "restart markers": saved(restart_marker_blocks=2),
    "4:1:1": encoded(0, 90, 70, "411", 80),
    "cut short": saved()[:-400],
    "no end": saved()[:-2],
    "stray bytes at the end": saved()[:-2] + b"\0\0\0\xff\xd9",
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", ODD)
def test_other_images_have_no_places(kind):
    assert not len(places_of(ODD[kind]))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from(["420", "444", "optimised"]), st.data())
def test_damaged_places_and_images_never_read_or_write_elsewhere(kind, data):
    """With a right checksum too: what comes out decodes to the size that is named, or is rejected, or is none."""
    image = encoded(3, 150, 90, kind, 85)
    places, bytes_ = bytearray(places_of(image)), bytearray(image)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged = data.draw(st.sampled_from([places, bytes_]))
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    size = data.draw(st.integers(1, len(places)))
    cut(bytes(bytes_), bytes(places[: size if data.draw(st.booleans()) else len(places)]), (20, 10, 100, 70))
    places_of(bytes(bytes_))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), *[st.integers(-(1 << 15), 1 << 15)] * 3), min_size=1, max_size=50))
def test_packed_places_are_the_same_again_and_no_others_fit(rows):
    places = np.array(rows, np.int64)
    places[:, 0] = np.cumsum(places[:, 0])
    packed = np.frombuffer(pack(places) + bytes(SLACK), np.uint8)
    found = np.zeros_like(places)
    assert unpack(packed, found)
    assert np.array_equal(found, places)
    assert not unpack(packed[:-1], found)
    assert not unpack(packed, np.zeros((len(places) + 3, 4), np.int64))


# Data sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of `jpeg` shards with odd images among them."""
    root = tmp_path_factory.mktemp("cuts")
    for label, name in enumerate(("cat", "dog")):
        (root / "in" / name).mkdir(parents=True)
        for i in range(12):
            image = encoded(100 * label + i, 90 + 13 * i, 170 - 7 * i, ("420", "444", "optimised")[i % 3], 90)
            (root / "in" / name / f"{i}.jpg").write_bytes(image)
    (root / "in" / "cat" / "progressive.jpg").write_bytes(ODD["progressive"])
    options = Options(Encoding("keep", size=64), samples_per_shard=7)
    build(Plan(ImageFolder(root / "in"), options), root / "shards", workers=1)
    return root / "shards"


@pytest.fixture
def with_cuts(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "with")
    make_cuts(open_dataset(out), workers=2)
    return out


def crops(shards, backend="portable", **augment) -> list[torch.Tensor]:
    chosen, config = {"resize": 64, "crop": 48} | augment, LoaderConfig(backend, threads=2)
    train = chosen.get("views") != 10
    with Loader(shards, batch=5, dtype="uint8", train=train, augment=AugmentConfig(**chosen), config=config) as loader:
        return [batch.images for _ in range(2) for batch in loader]


@pytest.mark.parametrize(
    "augment",
    [{}, {"square": False}, {"scale_jitter": (0.05, 0.5)}, {"views": 10}, {"resize": 20, "crop": 1}],
    ids=str,
)
def test_batches_are_the_same_with_cuts_and_without(augment, folder, with_cuts, monkeypatch):
    from pipeline.read import portable

    calls = []
    original = portable.Portable._cut
    monkeypatch.setattr(portable.Portable, "_cut", lambda *a: calls.append(original(*a) is not None) or original(*a))
    for theirs, ours in zip(crops(folder, **augment), crops(with_cuts, **augment), strict=True):
        assert torch.equal(theirs, ours)
    assert any(calls) or augment.get("views") == 10


@pytest.mark.parametrize("augment", [{}, {"scale_jitter": (0.05, 0.5)}], ids=str)
def test_dali_gets_the_cuts_and_makes_the_same_crops(augment, folder, with_cuts, monkeypatch):
    """Boxes of resized crops are moved to the cut, in floats: a grey level at a few pixels. Copied crops are equal."""
    from pipeline.read import dali

    sizes = []
    original = dali._replaced
    monkeypatch.setattr(dali, "_replaced", lambda *a: sizes.extend(len(c.data) for c in a[2]) or original(*a))
    batches = zip(crops(folder, "dali-cpu", **augment), crops(with_cuts, "dali-cpu", **augment), strict=True)
    differences = torch.cat([(ours.int() - theirs.int()).abs().flatten() for theirs, ours in batches])
    assert sum(size > 0 for size in sizes) > len(sizes) / 2
    assert differences.max() <= 1
    assert (differences > 0).float().mean() < 1e-3


def test_cuts_change_nothing_else_and_are_the_same_bytes_each_time(folder, with_cuts):
    for path in folder.iterdir():
        assert (with_cuts / path.name).read_bytes() == path.read_bytes()
    made = {path.name: path.read_bytes() for path in with_cuts.iterdir() if path.name not in os.listdir(folder)}
    assert sorted(made) == ["cuts.json", *(f"train-{i:06d}.cuts" for i in range(4))]
    (with_cuts / "cuts.json").unlink()
    (with_cuts / "train-000002.cuts").write_bytes(made["train-000001.cuts"])
    (with_cuts / "train-000001.cuts.partial").write_bytes(b"of a killed run")
    found = make_cuts(open_dataset(with_cuts), workers=1, check_all=True)
    assert {path.name: path.read_bytes() for path in with_cuts.iterdir() if path.name in made} == made
    assert sum(file["cut"] for file in found) == 24  # all but the progressive one
    assert verify.check(with_cuts).ok


def changed(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("fault", ["entry", "table", "header", "short", "missing", "json", "other"])
def test_damaged_cuts_are_named_and_cost_no_pixel(fault, folder, with_cuts, caplog):
    path, record = with_cuts / "train-000001.cuts", with_cuts / "cuts.json"
    if fault in ("entry", "table", "header"):
        changed(path, {"entry": 60, "table": -1, "header": 20}[fault])
    elif fault == "short":
        path.write_bytes(path.read_bytes()[:-5])
    elif fault == "missing":
        path.unlink()
    elif fault == "json":
        record.write_text("{")
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprint": "0"}))
    report = verify.check(with_cuts)
    assert [finding.check for finding in report.findings] == ["info"]
    for theirs, ours in zip(crops(folder), crops(with_cuts), strict=True):
        assert torch.equal(theirs, ours)
    assert ("tools/make_shards.py cuts" in caplog.text) == (fault not in ("entry", "table"))


def test_an_image_that_changed_is_named_and_nothing_is_published(with_cuts):
    for path in with_cuts.glob("*.cuts"):
        path.unlink()
    dataset = open_dataset(with_cuts)
    changed(with_cuts / dataset.split("train").shards[1].name, int(dataset.split("train").index["offset"][8]) + 300)
    with pytest.raises(DataError, match=r"train-000001.tar: changed at byte \d+; copy the shard again"):
        make_cuts(dataset, workers=1)
    assert [path.name for path in with_cuts.glob("*.cuts*")] == ["train-000000.cuts"]


def test_the_command(folder, with_cuts, tmp_path, capsys, monkeypatch):
    shutil.copytree(folder, tmp_path / "again")
    monkeypatch.setattr("sys.argv", ["make_shards.py", "cuts", str(tmp_path / "again"), "--check-cuts", "all"])
    make_shards.main()
    assert "24 of 25 images can be cut" in capsys.readouterr().out
    assert (tmp_path / "again" / "train-000003.cuts").read_bytes() == (with_cuts / "train-000003.cuts").read_bytes()
    raw = Options(Encoding("raw", size=16))
    build(Plan(ImageFolder(folder.parent / "in"), raw), tmp_path / "raw", workers=1)
    monkeypatch.setattr("sys.argv", ["make_shards.py", "cuts", str(tmp_path / "raw")])
    with pytest.raises(ConfigError, match="its images are raw pixels; cuts are for JPEGs"):
        make_shards.main()
    assert isinstance(cuts.CURE, str)
