"""Cuts: every pixel of a cut is the whole image's, whatever the image, and what cannot be cut is decoded whole.

FAULTS set tries 20,000 damaged places, images and files (`make faults`); 60 otherwise.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from simplejpeg import decode_jpeg, encode_jpeg

from pipeline import AugmentConfig, Loader, LoaderConfig, cuts, huffman, verify
from pipeline.cut_jpeg import EXTRA, cut_jpeg
from pipeline.errors import ConfigError, DataError
from pipeline.huffman import SLACK
from pipeline.jpeg import HEADER, find_places, pack, read_header, unpack
from pipeline.manifest import Split, open_dataset
from pipeline.read import cutter
from pipeline.read.cutter import Cutter
from pipeline.read.fetch import ALL_ROWS, COLUMNS, HEIGHT, WIDTH, fetch_images
from pipeline.read.reader import Reader
from pipeline.resample import triangle
from pipeline.shards import Shard
from pipeline.storage import Folder
from pipeline.write import cuts as cuts_made
from pipeline.write.build import Options, Plan, build
from pipeline.write.cuts import make_cuts
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from tests.conftest import ROOT, picture
from tools import make_shards

EXAMPLES = 20_000 if "FAULTS" in os.environ else 60
CANARY = 0xA5


def cut(image: bytes, places: bytes, box: tuple[int, int, int, int]) -> tuple[bytes, list[int]]:
    """The cut and its place; nothing but the stated memory is written."""
    data, header, placed = np.frombuffer(bytearray(image), np.uint8), np.zeros(HEADER, np.int32), np.zeros(4, np.int64)
    memory, size, end = np.full(2 * len(data) + EXTRA + 64, CANARY, np.uint8), 2 * len(data) + EXTRA, 0
    if read_header(data, header):
        packed = np.frombuffer(bytearray(places + bytes(SLACK)), np.uint8)
        end = cut_jpeg(data, header, packed, np.array(box), sum(box) % 3 > 0, memory[:size], placed)
    assert (memory[size:] == CANARY).all()
    return memory[:end].tobytes(), placed.tolist()


def places_of(image: bytes) -> bytes:
    return pack(find_places(np.frombuffer(bytearray(image), np.uint8), np.zeros(HEADER, np.int32))).tobytes()


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


DAMAGED = {kind: encoded(3, 150, 90, kind, 85) for kind in ("420", "444", "Gray", "optimised")}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A copy with one to six other bytes, and one in three cut short."""
    changed = np.frombuffer(data, np.uint8).copy()
    changed[rng.integers(0, len(data), rng.integers(1, 7))] = rng.integers(0, 256)
    return changed[: rng.integers(1, len(data)) if rng.integers(3) == 0 else None].tobytes()


def cut_of_damaged(image: bytes, places: bytes) -> str:
    """How it ended. Nothing is read or written elsewhere; a cut that can be decoded has the size that is named."""
    made, (_, _, width, height) = cut(image, places, (20, 10, 100, 70))
    if not made:
        return "not cut"
    try:
        pixels = decode_jpeg(made, strict=True)
    except ValueError:
        return "rejected by the decoder"
    assert pixels.shape == (height, width, 3)
    return "cut"


@pytest.mark.parametrize("what", ["places", "images"])
def test_damaged_places_and_images_never_read_or_write_elsewhere(what):
    """With a right checksum too: see test_bounds_are_checked for the reads."""
    rng, ended = np.random.default_rng(0), collections.Counter()
    for i in range(EXAMPLES):
        image = [*DAMAGED.values()][i % len(DAMAGED)]
        if what == "places":
            ended[cut_of_damaged(image, damaged(places_of(image), rng))] += 1
        else:
            other = damaged(image, rng)
            ended[cut_of_damaged(other, places_of(image))] += 1
            ended[cut_of_damaged(other, places_of(other))] += 1
    print(f"damaged {what}:", dict(ended))
    assert ended["not cut"]
    assert ended["cut"]


@pytest.mark.skipif(
    not numba.config.BOUNDSCHECK, reason="machine code without checks: test_bounds_are_checked has them"
)
def test_a_read_elsewhere_is_an_error():
    with pytest.raises(IndexError):
        huffman.window(np.zeros(SLACK, np.uint8), 8)


@pytest.mark.slow
def test_bounds_are_checked(tmp_path):
    """The same with machine code that ends with an exception if it reads or writes outside of an array."""
    env = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-n0", __file__]
    done = subprocess.run(
        [*command, "-k", "elsewhere or borders or packed or byte_of_a_file"],
        env=env, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    assert list(tmp_path.rglob("jpeg.find_places*"))  # compiled for this test


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), *[st.integers(-(1 << 15), 1 << 15)] * 3), min_size=1, max_size=50))
def test_packed_places_are_the_same_again_and_no_others_fit(rows):
    places = np.array(rows, np.int64)
    places[:, 0] = np.cumsum(places[:, 0])
    packed = np.append(pack(places), np.zeros(SLACK, np.uint8))
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
    found = make_cuts(open_dataset(with_cuts), workers=1, check_one_in=1)
    assert {path.name: path.read_bytes() for path in with_cuts.iterdir() if path.name in made} == made
    assert sum(file["cut"] for file in found) == 24  # all but the progressive one
    assert verify.check(open_dataset(with_cuts, check_splits=False)).ok


def made_by(monkeypatch, *args: object) -> dict[str, bytes]:
    """The files that tools/make_shards.py writes into the folder that --out or the last argument names."""
    monkeypatch.setattr("sys.argv", ["make_shards.py", *map(str, args)])
    make_shards.main()
    return {path.name: path.read_bytes() for path in args[-1].iterdir() if path.is_file()}


@pytest.mark.parametrize("encode", ["keep", "jpeg"])
def test_sharding_makes_the_bytes_that_the_command_makes_later(encode, folder, tmp_path, monkeypatch):
    def sharded(*options: object) -> dict[str, bytes]:
        args = ("imagefolder", "--train", folder.parent / "in", "--val-fraction", 0.3, "--encode", encode, "--size", 64)
        return made_by(monkeypatch, *args, "--samples-per-shard", 5, *options)

    without = sharded("--workers", 1, "--no-cuts", "--out", tmp_path / "later")
    later = made_by(monkeypatch, "cuts", "--check-cuts", "all", tmp_path / "later")
    names = {"cuts.json", *(f"train-{i:06d}.cuts" for i in range(4)), *(f"val-{i:06d}.cuts" for i in range(2))}
    assert later.keys() - without.keys() == names
    assert all(later[name] == data for name, data in without.items())
    for workers in (1, 2):
        assert sharded("--workers", workers, "--out", tmp_path / str(workers)) == later
    for part in ("0/2", "1/2"):
        made = sharded("--workers", 1, "--shards", part, "--out", tmp_path / "slices")
    assert made.keys() & names == names - {"cuts.json"}
    assert sharded("--merge", "--out", tmp_path / "slices") == later
    # Slices without them, a merge that makes what is missing, and the same command on what is finished.
    sharded("--workers", 1, "--no-cuts", "--shards", "0:9", "--out", tmp_path / "mixed")
    assert sharded("--merge", "--out", tmp_path / "mixed") == later
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "mixed").iterdir())]
    assert sharded("--out", tmp_path / "mixed") == later
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "mixed").iterdir())] == before


def test_sharding_that_ends_before_any_file_is_published_makes_the_same_bytes_later(folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def sharded() -> dict[str, bytes]:
        source = ("imagefolder", "--train", folder.parent / "in", "--size", 64, "--samples-per-shard", 7)
        return made_by(monkeypatch, *source, "--workers", 1, "--out", tmp_path / "d")

    left, original = [0], Folder.publish

    def publish(self, name):
        left[0] -= 1
        if left[0] == 0:
            (self.path / f"{name}.partial").write_bytes(b"cut off")
            raise Killed
        return original(self, name)

    clean = sharded()
    monkeypatch.setattr(Folder, "publish", publish)
    for files in range(1, 24):  # plan; tar, idx, cuts and record of 4 shards; index, mean, info, manifest; cuts.json
        shutil.rmtree(tmp_path / "d")
        left[0] = files
        with contextlib.suppress(Killed):
            sharded()
        assert (left[0] == 0) == (files < 23)
        record = tmp_path / "d" / "cuts.json"
        assert not record.exists() or files == 23
        left[0] = 0
        assert sharded() == clean


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ((), True),
        (("--no-cuts",), False),
        (("--stats", "off"), False),
        (("--stats", "off", "--check", "header", "--cuts"), True),
        (("--encode", "raw"), False),
    ],
    ids=str,
)
def test_cuts_are_made_by_default_if_images_are_decoded_anyway(options, made, folder, tmp_path, monkeypatch):
    source = ("imagefolder", "--train", folder.parent / "in", "--size", 64, "--workers", 1)
    assert ("cuts.json" in made_by(monkeypatch, *source, *options, "--out", tmp_path / "d")) == made


def test_raw_pixels_have_no_cuts(folder, tmp_path, monkeypatch):
    source = ("imagefolder", "--train", folder.parent / "in", "--encode", "raw", "--cuts", "--out", tmp_path / "d")
    with pytest.raises(ConfigError, match="--cuts goes with --encode keep or jpeg"):
        made_by(monkeypatch, *source)
    assert not (tmp_path / "d").exists()


def test_existing_tars_get_cuts_if_asked(folder, tmp_path, monkeypatch):
    index = ("index", folder / "*.tar", "--statistics", 3, "--size", 64, "--workers", 1)
    assert "cuts.json" not in made_by(monkeypatch, *index, "--out", tmp_path / "without")
    later = made_by(monkeypatch, "cuts", tmp_path / "without")
    made = made_by(monkeypatch, *index, "--cuts", "--out", tmp_path / "with")
    assert made == later
    assert "train-000003.cuts" in made


@pytest.mark.parametrize("option", ["some", "all"])
def test_a_cut_with_other_pixels_is_left_out(option, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cuts_made, "is_exact", lambda *image: False)
    source = ("imagefolder", "--train", folder.parent / "in", "--size", 64, "--workers", 1, "--check-cuts", option)
    made_by(monkeypatch, *source, "--out", tmp_path / "d")
    dataset = open_dataset(tmp_path / "d")
    made = [path for path, _ in cuts.open_cuts(dataset, dataset.split("train"))]
    found = np.concatenate(list(map(cuts.table, made, dataset.split("train").shards)))["size"] > 0
    compared = dataset.split("train").index["crc32"] % {"some": 32, "all": 1}[option] == 0
    assert found.sum() == {"some": (~compared).sum() - 1, "all": 0}[option]  # the progressive one has none


def test_places_that_are_wrong_but_have_right_checksums_are_found_by_a_deep_check(with_cuts):
    dataset, path = open_dataset(with_cuts), with_cuts / "train-000001.cuts"
    split = dataset.split("train")
    rows = split.index[split.index["shard"] == 1]
    places = cuts.read(Folder(path.parent), path.name, split.shards[1], rows)
    places[2], places[3] = places[3], places[2]
    path.unlink()
    cuts_made.write_file(Folder(with_cuts), path.name, split.shards[1], rows, places)
    make_cuts(dataset, workers=1)
    assert verify.check(open_dataset(with_cuts, check_splits=False)).ok
    findings = verify.check(open_dataset(with_cuts, check_splits=False), deep=True).findings
    assert [(finding.check, finding.file) for finding in findings] == [("info", split.shards[1].name)] * 2
    assert "its cuts have wrong places; remove the shard's .cuts, and make it again with" in findings[0].what
    path.unlink()
    make_cuts(dataset, workers=1)
    assert verify.check(open_dataset(with_cuts, check_splits=False), deep=True).ok


def changed(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_of_a_file_of_cuts_changes_no_cut(with_cuts):
    """Its image is decoded whole, or all of the file if it is the header or the table that changed."""
    dataset, path = open_dataset(with_cuts), with_cuts / "train-000001.cuts"
    split, ids = dataset.split("train"), np.arange(7, 14)
    reader = Reader(split)
    block = reader.fetch(reader.read(ids), 0, len(ids), lambda block: fetch_images(*block, ALL_ROWS))
    pixels = np.tile([10, 10, 58, 58], (len(ids), 1))

    def all_cuts() -> list[bytes]:
        cutter = Cutter([path for path, _ in cuts.open_cuts(dataset, split)], split, reader)
        places = cutter.places(ids, block.rows, pixels)
        made = [cut.data.tobytes() for cut in cutter(block, places, pixels)]
        missed = reader.stages.take()["cuts_missed"]
        assert missed == sum(size > 0 and not cut for cut, size in zip(made, places[:, 1]))
        return made

    clean = all_cuts()
    assert all(clean)
    whole, rng, ended = path.read_bytes(), np.random.default_rng(0), collections.Counter()
    with open(path, "r+b", buffering=0) as file:
        for _ in range(EXAMPLES):
            at = int(rng.integers(0, len(whole)))
            os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << int(rng.integers(8))]), at)
            missed = [ours for ours, theirs in zip(all_cuts(), clean, strict=True) if ours != theirs]
            assert not any(missed)
            ended[f"{len(missed)} decoded whole"] += 1
            os.pwrite(file.fileno(), whole[at : at + 1], at)
    print("changed bytes of a file of cuts:", dict(ended))
    assert ended["1 decoded whole"]
    assert ended[f"{len(ids)} decoded whole"]
    assert not ended["0 decoded whole"]
    reader.close()


@pytest.mark.parametrize("backend", ["portable", "dali-cpu"])
def test_images_whose_places_are_lost_while_training_are_counted(backend, folder, with_cuts):
    config = LoaderConfig(backend, threads=2)
    with Loader(with_cuts, batch=5, dtype="uint8", augment=AugmentConfig(resize=64, crop=48), config=config) as loader:
        for path in with_cuts.glob("*.cuts"):
            path.unlink()
        images = [batch.images for _ in range(2) for batch in loader]
    assert loader.stats()["cuts_missed"] > 30
    assert loader.stats()["cuts_missed"] == 0
    for theirs, ours in zip(crops(folder, backend), images, strict=True):
        assert torch.equal(theirs, ours)


def test_a_rank_reads_the_tables_of_its_own_shards_when_it_needs_them(with_cuts, monkeypatch):
    read: set[str] = set()
    monkeypatch.setattr(cutter, "table", lambda path, shard: read.add(path.name) or cuts.table(path, shard))
    with Loader(with_cuts, batch=4, partitions=2, world=2, rank=1, augment=AugmentConfig(resize=64, crop=48)) as loader:
        assert not read
        assert loader.plan.held == range(12, 25)
        list(loader)
    assert read == {f"train-{number:06}.cuts" for number in (1, 2, 3)}


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
    report = verify.check(open_dataset(with_cuts, check_splits=False))
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


@pytest.mark.parametrize(
    ("size", "at", "is_cut"), [((256, 256), 20, False), ((256, 256), 16, True), ((341, 256), 20, True)]
)
def test_an_image_is_cut_if_the_crop_needs_less_than_four_fifths_of_its_mcus(size, at, is_cut, tmp_path):
    """A crop of 224 pixels needs 15 rows and columns of 16-pixel MCUs, or 14 if it begins with one."""
    shard, table = Shard("x.tar", 1, 0, "00" * 32), np.array([(0, 99, 7)], cuts.TABLE_DTYPE)
    (tmp_path / "x.cuts").write_bytes(cuts.header(shard) + bytes(99) + table.tobytes())
    cutter = Cutter([tmp_path / "x.cuts"], Split(tmp_path, "train", (shard,), "", "", 1), None)
    rows = np.zeros((1, len(COLUMNS)), np.int64)
    rows[0, [WIDTH, HEIGHT]] = size
    pixels = np.array([[at, at, at + 224, at + 224]])
    assert cutter.places(np.array([0]), rows, pixels)[0, 1] == (99 if is_cut else 0)
    cutter.close()


@settings(max_examples=1000)
@given(
    crop=st.integers(1, 60),
    length=st.integers(1, 500),
    box=st.tuples(st.floats(0, 1), st.floats(0.003, 1)),
    whole=st.booleans(),
)
def test_no_pixel_that_a_crop_is_made_of_is_cut_off(crop, length, box, whole):
    left, size = box[0] * (1 - box[1]) * length, box[1] * length
    left, size = (np.floor(left), np.ceil(size)) if whole else (left, size)
    taps = triangle(left / (size / crop), size / crop, length, crop, False)
    weights = taps.weights.reshape(crop, taps.taps)
    used = (taps.first[:, None] + np.arange(taps.taps))[weights != 0]
    first, _, last, _ = cutter.pixels_under(np.array([[[left, left, size, size]]]), crop)[0]
    assert first <= used.min() <= used.max() < last
