"""WebDataset tars as a source: sharded once more."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.manifest import open_dataset
from pipeline.shards import crc32
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import WebDataset
from tests.conftest import picture


def image(seed: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    picture(np.random.default_rng(seed), 48, 40).save(out, kind)
    return out.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


LABELS = {
    "cls": lambda label: {"cls": str(label).encode()},
    "json": lambda label: {"json": json.dumps({"label": label, "width": 48}).encode()},
    "txt": lambda label: {"txt": f"{('cat', 'dog', 'eel')[label]}\n".encode()},
    "cls, with a caption": lambda label: {"cls": str(label).encode(), "txt": b"a photo"},
}


@pytest.mark.parametrize("kind", LABELS)
def test_tars_are_sharded_once_more_with_every_sample_and_its_label(tmp_path, kind):
    wanted = {}
    for number in range(3):
        files = {}
        for i in range(4):
            label, extension = (number + i) % 3, ("jpg", "jpeg", "png", "webp")[i]
            kind_of = {"png": "PNG", "webp": "WEBP"}.get(extension, "JPEG")
            data = image(10 * number + i, kind_of)
            files |= {f"a/{number}{i}.{name}": value for name, value in LABELS[kind](label).items()}
            files[f"a/{number}{i}.{extension}"] = data
            wanted[f"a_{number}{i}"] = (label, data if extension in ("jpg", "jpeg") else None)
        tar(tmp_path / f"in-{number}.tar", files)
    source = WebDataset(str(tmp_path / "in-{0..2}.tar"), val=str(tmp_path / "in-0.tar"))
    assert source.classes == (["cat", "dog", "eel"] if kind == "txt" else ["0", "1", "2"])
    build(Plan(source, Options(Encoding("keep"), samples_per_shard=5)), tmp_path / "out", workers=1)
    dataset = open_dataset(tmp_path / "out")
    found = {item.key: item for item in source.splits["train"]}
    assert {key: item.label for key, item in found.items()} == {key: label for key, (label, _) in wanted.items()}
    kept = [crc32(np.frombuffer(data, np.uint8)) for _, data in wanted.values() if data]
    index = dataset.split("train").index
    assert set(kept) <= set(index["crc32"].tolist())
    assert (len(index), dataset.split("val").samples) == (12, 4)
    assert sorted(index["label"].tolist()) == sorted(label for label, _ in wanted.values())


def test_a_fraction_of_each_class_is_held_out_for_validation(tmp_path):
    samples = {f"{i}.{name}": value for i in range(12) for name, value in (("cls", b"%d" % (i % 3)), ("jpg", image(i)))}
    splits = WebDataset(str(tar(tmp_path / "a.tar", samples)), val_fraction=0.25).splits
    assert sorted(item.label for item in splits["val"]) == [0, 1, 2]
    assert sorted(item.key for items in splits.values() for item in items) == sorted(map(str, range(12)))


def test_more_tars_than_files_may_be_open_are_read(tmp_path):
    for number in range(70):
        tar(tmp_path / f"{number:02}.tar", {"x.cls": b"0", "x.jpg": image(number)})
    source = WebDataset(str(tmp_path / "*.tar"))
    for _ in range(2):
        assert [source.read(item) for item in source.splits["train"]] == [image(number) for number in range(70)]
    fds = list(Path("/proc/self/fd").iterdir())
    assert sum(str(fd.resolve()).startswith(str(tmp_path)) for fd in fds if fd.exists()) <= 32


def test_members_of_no_sample_are_counted_and_wrong_labels_named(tmp_path):
    whole = {"a.cls": b"0", "a.jpg": image(0), "notes.md": b"text", "b.cls": b"1"}
    source = WebDataset(str(tar(tmp_path / "a.tar", whole)))
    assert source.passed_over["members of no sample"][0] == 2
    for files, words in (
        ({"a.jpg": image(0)}, "sample 'a' has no label"),
        ({"a.jpg": image(0), "a.txt": b" \n"}, r"sample 'a' has an empty \.txt"),
        ({"a.jpg": image(0), "a.json": b"{}"}, "sample 'a' has no label"),
    ):
        with pytest.raises(DataError, match=words):
            WebDataset(str(tar(tmp_path / "bad.tar", files)))
    other = tar(tmp_path / "val.tar", {"a.jpg": image(0), "a.cls": b"7"})
    with pytest.raises(DataError, match=r"val/val\.tar/a\.jpg: '7' is none of the 1 training classes"):
        WebDataset(str(tmp_path / "a.tar"), str(other))
