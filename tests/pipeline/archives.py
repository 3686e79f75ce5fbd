"""Miniature ImageNet archives in the original format: tars of tars, SciPy's development kits, shuffled orders."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.conftest import picture

WNIDS = ["n01440764", "n01443537", "n02084071", "n03770679", "n04254680"]
# Not in the order of the WordNet ids; the inner nodes of the hierarchy have the numbers after these.
ID_OF = {"n01440764": 4, "n01443537": 1, "n02084071": 5, "n03770679": 2, "n04254680": 3}


def jpeg(rng: np.random.Generator, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    picture(rng, *rng.integers(40, 90, 2).tolist()).convert(mode).save(out, kind, quality=90)
    return out.getvalue()


def tar_of(files: dict[str, bytes], *, order: np.random.Generator, format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    names = list(files)
    order.shuffle(names)
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(files[name]), 1_300_000_000
            tar.addfile(info, io.BytesIO(files[name]))
    return out.getvalue()


def kit(year: int, counts: dict[str, int], val_ids: list[int]) -> bytes:
    """A development kit: meta.mat and the ids of the validation images."""
    rows = [(ID_OF[w], w, f"{w}, a thing", "gloss", 0, [], 0, counts[w]) for w in sorted(WNIDS, key=ID_OF.__getitem__)]
    rows.append((len(WNIDS) + 1, "n00001740", "entity", "gloss", 2, [1, 2], 3, 0))
    fields = [f"ILSVRC{year}_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    dtype = [(name, object) for name in (*fields, "num_train_images")]
    synsets = np.zeros((len(rows), 1), dtype)
    for i, row in enumerate(rows):
        synsets[i, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    top = "ILSVRC2012_devkit_t12" if year == 2012 else "devkit-1.0"
    files = {
        f"{top}/readme.txt": b"read me",
        f"{top}/data/meta.mat": meta.getvalue(),
        f"{top}/data/ILSVRC{year}_validation_ground_truth.txt": "".join(f"{i}\n" for i in val_ids).encode(),
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Mini:
    """Written archives. labels: file name → expected class, computed without the code under test."""

    def __init__(self, root: Path, year: int, *, seed: int = 0, missing: str | None = None, test: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.root, self.labels, self.data = root, dict[str, int](), dict[str, bytes]()
        root.mkdir(parents=True, exist_ok=True)
        prefix = f"ILSVRC{year}_img" if year == 2012 else f"ILSVRC{year}_images"
        counts = {wnid: int(rng.integers(3, 7)) for wnid in WNIDS}
        classes = {}
        for wnid in WNIDS:
            images = {}
            for n in rng.choice(30_000, counts[wnid], replace=False).tolist():
                odd = {0: ("CMYK", "JPEG"), 1: ("RGB", "PNG"), 2: ("L", "JPEG")}.get(
                    len(self.data) + len(images), ("RGB", "JPEG")
                )
                images[f"{wnid}_{n}.JPEG"] = jpeg(rng, *odd)
            self._remember(images, [WNIDS.index(wnid)] * len(images))
            classes[f"{wnid}.tar"] = tar_of(images, order=rng)
        if missing:
            del classes[f"{missing}.tar"]
        (root / f"{prefix}_train.tar").write_bytes(tar_of(classes, order=rng))
        by_id = {number: WNIDS.index(wnid) for wnid, number in ID_OF.items()}
        self.val_ids = rng.integers(1, len(WNIDS) + 1, 11).tolist()
        self._others(f"{prefix}_val.tar", f"ILSVRC{year}_val_", [by_id[i] for i in self.val_ids], rng, year)
        name = "ILSVRC2012_devkit_t12.tar.gz" if year == 2012 else "ILSVRC2010_devkit-1.0.tar.gz"
        (root / name).write_bytes(kit(year, counts, self.val_ids))
        if year == 2010:
            ids = rng.integers(1, len(WNIDS) + 1, 7).tolist()
            self._others(f"{prefix}_test.tar", "ILSVRC2010_test_", [by_id[i] for i in ids], rng, year)
            (root / "ILSVRC2010_test_ground_truth.txt").write_text("".join(f"{i}\n" for i in ids))
            patched = sorted(self.data)[3], "ILSVRC2010_val_00000002.JPEG"
            patches = {f"patch_images/{n.split('_')[1]}/{n}": jpeg(rng) for n in patched}
            self.data |= {name.rpartition("/")[2]: data for name, data in patches.items()}
            (root / "patch_images.tar").write_bytes(tar_of(patches, order=rng))
        elif test:
            self._others(f"{prefix}_test_v10102019.tar", "ILSVRC2012_test_", [-1] * 4, rng, year)

    def _others(self, archive: str, prefix: str, labels: list[int], rng: np.random.Generator, year: int) -> None:
        folder = "val/" if year == 2010 else ""
        images = {f"{folder}{prefix}{n:08d}.JPEG": jpeg(rng) for n in range(1, len(labels) + 1)}
        self._remember({name.removeprefix(folder): data for name, data in images.items()}, labels)
        (self.root / archive).write_bytes(tar_of(images, order=rng))

    def _remember(self, images: dict[str, bytes], labels: list[int]) -> None:
        self.data |= images
        self.labels |= dict(zip(images, labels))
