"""Tars and class folders as people have them: no traceback, and each member or file is used or counted.

FAULTS set tries 2,000 changed inputs of each kind (`make faults`); 50 otherwise.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import open_dataset
from pipeline.errors import ExpressError
from pipeline.write import index_existing
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from pipeline.write.sources.tars import expand
from tools import make_shards

many = settings(
    max_examples=2000 if "FAULTS" in os.environ else 50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def image(seed: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


IMAGES = [image(seed, kind) for seed, kind in enumerate(["JPEG"] * 6 + ["PNG", "GIF", "TIFF", "WEBP"])]
JUNK = [b"", b"no image", IMAGES[0][:200], b"\xff\xd8\xff", b"P6 1 1", b"II*\0" + b"\xff" * 40]
LABELS = [b"0", b"1", b"2\r\n", b" 1 ", b"\xef\xbb\xbf1", b"007", b"", b"-1", b"1.0", b"cat", b"9" * 5000, b"999999"]
LABELS += [b"2000000000", b"\xff\xfe1\0", "١".encode()]
OBJECTS = [b'{"label": 1}', b'{"label": "2"}', b"{}", b"[1]", b'{"label": null}', b'{"label": 1e400}', b"[" * 9999]
OBJECTS += [b'{"label": [1]}', b'\xef\xbb\xbf{"label": 0}', b'{"label": "\\ud800"}', b'{"label": true}', b"\xff"]
STEMS = [
    "s",
    "s.0",
    "s.1",
    "S",
    "a/s",
    "./s",
    ".s",
    "._s",
    ".h/s",
    "@eaDir/s",
    "__MACOSX/._s",
    "s\n",
    "ſ",
    "é",
    "e\u0301",
]
STEMS += ["s\udce9", "x" * 150, "/s", "../s", "s ", " ", "a b/c.d/s", "\x1b[31m"]
ENDS = [".jpg", ".JPG", ".jpeg", ".png", ".tif", ".jfif", "", ".", ".txt", ".cls", ".CLS", ".json", ".input.jpg"]
ENDS += [".output.cls", ".seg.png", ".npy", ".jpg.cls", ".cls.jpg"]
names = st.builds(str.__add__, st.sampled_from(STEMS), st.sampled_from(ENDS))
contents = st.sampled_from(IMAGES + JUNK + LABELS + OBJECTS)


@st.composite
def samples(draw) -> list[tuple[str, bytes]]:
    """Complete samples; some share a key, or have an invalid label."""
    members = []
    labels = LABELS[:6] if draw(st.booleans()) else LABELS
    for i in range(draw(st.integers(0, 5))):
        stem = draw(st.sampled_from([f"k{i}", f"k{i}", f"d/k{i}.05", f"k.{i}"]))
        members.append((f"{stem}{draw(st.sampled_from(ENDS[:6]))}", draw(st.sampled_from(IMAGES))))
        if draw(st.integers(0, 5)):
            members.append((f"{stem}.cls", draw(st.sampled_from(labels))))
        else:
            members.append((f"{stem}.json", draw(st.sampled_from(OBJECTS[:2] if labels != LABELS else OBJECTS))))
    return members


@st.composite
def tars(draw) -> bytes:
    members = draw(samples())
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(members)))
        what = draw(st.sampled_from(["insert", "repeat", "remove", "rename", "move", "swap content", "sort"]))
        if what == "insert":
            members.insert(at, (draw(names), draw(contents)))
        elif what == "sort":
            members.sort(key=lambda member: member[0].encode("utf-8", "surrogateescape"))
        elif at < len(members):
            name, data = members.pop(at)
            if what == "rename":
                members.insert(at, (draw(names), data))
            elif what == "swap content":
                members.insert(at, (name, draw(contents)))
            elif what != "remove":
                members.insert(draw(st.integers(0, len(members))), (name, data))
            if what == "repeat":
                members.insert(at, (name, data))
    return written(members, draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))


def written(members: list[tuple[str, bytes]], format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # the name is too long for USTAR
                continue
    return out.getvalue()


@st.composite
def damaged(draw, data: bytes) -> bytes:
    what = draw(st.sampled_from(["whole"] * 6 + ["cut", "flip", "zero"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if what == "cut":
        return data[:at]
    if what == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    return data[: at - at % 512] + bytes(512) + data[at - at % 512 + 512 :] if what == "zero" else data


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


def emptied(place: Path) -> Path:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return place


@many
@given(st.lists(tars().flatmap(damaged), min_size=1, max_size=2))
def test_each_member_of_a_tar_is_in_a_sample_or_counted(place, contents):
    paths = [emptied(place) / f"{i}.tar" for i in range(len(contents))]
    for path, data in zip(paths, contents):
        path.write_bytes(data)
    options = {"statistics_images": 3, "size": 8, "max_bad_fraction": 0.9, "workers": 1}
    try:
        splits = {"train": expand(f"{place}/*.tar")}
        _, passed_over = index_existing.index("x", splits, place, **options, progress=lambda tars: None)
    except ExpressError:
        return
    dataset = open_dataset(place)
    inside = {}
    for path in paths:
        with tarfile.open(path) as tar:
            inside |= {(path.name, m.offset_data): (m.name, tar.extractfile(m).read()) for m in tar if m.isreg()}
    used = 0
    split = dataset.split("train")
    for row in split.index:
        name, data = inside[split.shards[row["shard"]].name, int(row["offset"])]
        assert (data[:200], len(data)) != (JUNK[2], 200)
        key = name.rpartition("/")[0] + "/" + name.rpartition("/")[2].partition(".")[0]
        assert row["label"] in (0, 1, 2, 7, 999999), key
        used += 2
    for bad in dataset.manifest["quarantine"]:
        used += 1 if bad["image"].lower().endswith((".cls", ".json")) else 2
    used += sum(count for kind, (count, _) in passed_over.items() if kind != "empty tar")
    assert used == len(inside)


@st.composite
def trees(draw) -> dict[str, bytes]:
    """Class folders of files by path; None: a folder without any."""
    files: dict[str, bytes | None] = {}
    for name in draw(st.lists(st.sampled_from(["cat", "dog", "é", "e\u0301", "Cat", "n.1"]), min_size=1, unique=True)):
        files |= {f"{name}/{i}.jpg": draw(st.sampled_from(IMAGES)) for i in range(draw(st.integers(1, 3)))}
    for _ in range(draw(st.integers(0, 4))):
        folder = draw(
            st.sampled_from(["", "cat/", "dog/", "cat/deep/", "@eaDir/", "cat/.x/", "cat/__MACOSX/", "b\udce9/"])
        )
        litter = st.sampled_from(["Thumbs.db", "desktop.ini", ".DS_Store", "a.txt", "a.json", "a.md", "a.doc", "noext"])
        name = draw(litter | names.map(lambda name: name.replace("/", "_")))
        if name not in ("", ".", "..") and len(name) < 200:
            files[folder + name] = draw(contents)
    if draw(st.integers(0, 9)) == 0:
        files["empty"] = None
    return files


def plant(root: Path, files: dict[str, bytes | None]) -> None:
    for name, data in files.items():
        path = root / name
        (path if data is None else path.parent).mkdir(parents=True, exist_ok=True)
        if data is not None:
            path.write_bytes(data)


@many
@given(trees(), st.none() | trees(), st.sampled_from([0.0, 0.3]))
def test_each_file_of_a_class_folder_is_a_sample_or_counted(place, train, val, fraction):
    root = emptied(place)
    plant(root / "train", train)
    plant(root / "val", val or {})
    try:
        source = ImageFolder(root / "train", root / "val" if val else None, val_fraction=0 if val else fraction)
        written = build(Plan(source, Options(Encoding(size=8), max_bad_fraction=0.9)), root / "out", workers=1)
    except ExpressError:
        return
    samples = sum(split["samples"] for split in written["splits"].values())
    passed_over = sum(count for count, _ in source.passed_over.values())
    files = sum(len(files) for part in ("train", "val") for *_, files in os.walk(root / part))
    assert samples + len(written["quarantine"]) + passed_over == files
    assert len({unicodedata.normalize("NFC", name) for name in written["classes"]}) == len(written["classes"])


@many
@given(st.binary(max_size=30) | st.text(alphabet="ab \n\r\t\ufeffé", max_size=30).map(str.encode))
def test_a_file_of_class_names_gives_names_that_differ_or_one_line(place, content):
    (place / "names").write_bytes(content)
    try:
        found = make_shards.class_names(place / "names")
    except ExpressError:
        return
    assert all(name.strip() == name for name in found)
    assert all(found)
    assert len(set(found)) == len(found)
