"""Images that a table labels: Kaggle's ImageNet, Tiny ImageNet, CSV and Parquet."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, ExpressError
from pipeline.manifest import open_dataset
from pipeline.shards import sample_keys
from pipeline.write.build import Options, Plan, build
from pipeline.write.sources.hub import HubParquet
from pipeline.write.sources.imagenet import ImageNet2012
from pipeline.write.sources.tables import CSV, Kaggle, Table, TinyImageNet
from tests.conftest import picture
from tests.pipeline.archives import WNIDS, Mini

BOX = "10 20 30 40"


def image(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    picture(rng, 40, 40).save(out, "JPEG")
    return out.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def kaggle(root: Path, solution: dict[str, str] | None = None, **files: bytes) -> Path:
    """Two training images of each class, a validation image of each in reversed order, a test image."""
    rng, images = np.random.default_rng(0), "ILSVRC/Data/CLS-LOC"
    found = {f"{images}/train/{wnid}/{wnid}_{i}.JPEG": image(rng) for wnid in WNIDS for i in range(2)}
    found |= {f"{images}/val/ILSVRC2012_val_0000000{i}.JPEG": image(rng) for i in range(5)}
    found |= {f"{images}/test/ILSVRC2012_test_00000001.JPEG": image(rng)}
    labels = {f"ILSVRC2012_val_0000000{i}": f"{wnid} {BOX} {wnid} {BOX} " for i, wnid in enumerate(reversed(WNIDS))}
    rows = labels | (solution or {})
    table = "ImageId,PredictionString\n" + "".join(f"{name},{boxes}\n" for name, boxes in rows.items() if boxes)
    names = "".join(f"{wnid} a thing, such as {wnid}\n" for wnid in WNIDS)
    return write(root, found | files | {"LOC_val_solution.csv": table, "LOC_synset_mapping.txt": names})


def tiny(root: Path, annotations: str = "") -> Path:
    rng = np.random.default_rng(0)
    found = {f"train/{wnid}/images/{wnid}_{i}.JPEG": image(rng) for wnid in WNIDS for i in range(2)}
    found |= {f"train/{wnid}/{wnid}_boxes.txt": f"{wnid}_0.JPEG\t0\t0\t9\t9\n" for wnid in WNIDS}
    found |= {f"val/images/val_{i}.JPEG": image(rng) for i in range(5)} | {"test/images/test_0.JPEG": image(rng)}
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(reversed(WNIDS))]
    words = "".join(f"{wnid}\ta thing, such as {wnid}\n" for wnid in [*WNIDS, "n00001740"])
    listed = {"val/val_annotations.txt": "".join(lines) + annotations, "words.txt": words}
    return write(root, found | listed)


@pytest.mark.parametrize(("make", "source"), [(kaggle, Kaggle), (tiny, TinyImageNet)])
def test_imagenets_in_folders_have_the_official_labels_and_every_image_once(tmp_path, make, source):
    root = make(tmp_path / "in")
    written = build(Plan(source(root), Options(samples_per_shard=4)), tmp_path / "out", workers=1)
    assert written["classes"] == sorted(WNIDS)
    assert written["class_names"] == [f"a thing, such as {wnid}" for wnid in sorted(WNIDS)]
    dataset = open_dataset(tmp_path / "out")
    val, train, test = (dataset.split(name) for name in ("val", "train", "test"))
    keys = [key for shard in val.shards for key in sample_keys(val.root / shard.name, _offsets(val, shard))]
    label_of = dict(zip(keys, val.index["label"].tolist()))
    numbers = {key: len(WNIDS) - 1 - int(key[-1]) for key in keys}  # the solution has them in reversed order
    assert label_of == numbers
    assert sorted(train.index["label"].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert test.index["label"].tolist() == [-1]


def _offsets(split, shard):
    number = split.shards.index(shard)
    return split.index["offset"][split.index["shard"] == number].tolist()


def test_kaggles_labels_and_keys_are_those_of_the_archives(tmp_path):
    archives = Mini(tmp_path / "archives", 2012)
    mine, theirs = Kaggle(kaggle(tmp_path / "in")), ImageNet2012(archives.root)
    assert mine.classes == theirs.classes
    assert all(item.key.startswith(mine.classes[item.label] + "_") for item in mine.splits["train"])
    assert all(item.key.startswith(theirs.classes[item.label] + "_") for item in theirs.splits["train"])


FAULTS = {
    "two labels": ({"ILSVRC2012_val_00000001": f"{WNIDS[0]} {BOX} {WNIDS[1]} {BOX}"}, r"line 3: .* has the labels"),
    "another class": ({"ILSVRC2012_val_00000001": f"n09999999 {BOX}"}, r"line 3: 'n09999999' is none of the 5 "),
    "no label": ({"ILSVRC2012_val_00000001": " "}, r"line 3: no 'PredictionString'"),
    "no file": ({"ILSVRC2012_val_00000009": f"{WNIDS[0]} {BOX}"}, r"line 7: no file .*val_00000009\.JPEG"),
    "no row": ({"ILSVRC2012_val_00000001": ""}, r"no row for .*val_00000001\.JPEG"),
}


@pytest.mark.parametrize(("solution", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_in_kaggles_table_is_named_with_its_row(tmp_path, solution, words):
    with pytest.raises(DataError, match=r"LOC_val_solution\.csv: " + words):
        Kaggle(kaggle(tmp_path, solution))


def test_a_folder_that_begins_with_another_class_is_not_taken_for_imagenet(tmp_path):
    extra = {"ILSVRC/Data/CLS-LOC/train/n00000001/x.JPEG": image(np.random.default_rng(0))}
    with pytest.raises(DataError, match="the first class is n00000001, but ImageNet has n01440764"):
        Kaggle(kaggle(tmp_path, **extra))


def test_tiny_imagenets_annotation_of_a_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"val_annotations\.txt: line 6: no file .*val_7\.JPEG"):
        TinyImageNet(tiny(tmp_path, f"val_7.JPEG\t{WNIDS[0]}\t0\t0\t1\t1\n"))


def table(root: Path, rows: list[tuple], kind: str, columns: tuple[str, ...] = ("path", "label")) -> Path:
    """A file of these rows, and the images that they name."""
    rng = np.random.default_rng(0)
    write(root, {str(row[0]): image(rng) for row in rows if row[0] and "missing" not in str(row[0])})
    path = root / f"list.{kind}"
    if kind == "csv":
        lines = [",".join("" if field is None else str(field) for field in row) for row in [columns, *rows]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        import pyarrow

        data = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        parquet.write_table(pyarrow.table(data), path)
    return path


KINDS = ["csv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_labels_by_name_and_whole_numbers_sort_as_numbers(tmp_path, kind):
    names = CSV(table(tmp_path / "a", [("b/1.jpg", "dog"), ("1.jpg", "cat"), ("2.jpg", "dog")], kind))
    assert names.classes == ["cat", "dog"]
    assert [(item.key, item.label) for item in names.splits["train"]] == [("b_1", 1), ("_1", 0), ("_2", 1)]
    numbered = CSV(table(tmp_path / "b", [("1.jpg", 10), ("2.jpg", 9), ("3.jpg", 9)], kind))
    assert (numbered.classes, numbered.class_ids) == (["9", "10"], [9, 10])
    assert [item.label for item in numbered.splits["train"]] == [1, 0, 0]


def test_a_table_is_sharded_with_a_validation_table_or_a_fraction(tmp_path):
    train = table(tmp_path / "train", [(f"{i}.jpg", "ab"[i % 2]) for i in range(8)], "csv")
    val = table(tmp_path / "val", [("0.jpg", "b")], "csv")
    build(Plan(CSV(train, val), Options()), tmp_path / "out", workers=1)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.classes == ["a", "b"]
    assert (dataset.split("train").samples, dataset.split("val").index["label"].tolist()) == (8, [1])
    (tmp_path / "absolute.csv").write_text(f"path,label\n{tmp_path}/train/0.jpg,a\n")
    source = CSV(tmp_path / "absolute.csv")
    assert source.read(source.splits["train"][0]) == (tmp_path / "train" / "0.jpg").read_bytes()
    held = CSV(train, val_fraction=0.25, root=tmp_path / "train")
    assert {split: len(items) for split, items in held.splits.items()} == {"train": 6, "val": 2}
    assert all(held.read(item) == (tmp_path / "train" / item.where.split("/")[1]).read_bytes()
               for items in held.splits.values() for item in items)  # fmt: skip


ROWS = {
    "no label": ([("1.jpg", "a"), ("2.jpg", None)], "(line 3|row 2): no 'label'"),
    "no image": ([("1.jpg", "a"), (None, "a")], "(line 3|row 2): no 'path'"),
    "two labels": ([("1.jpg", "a"), ("1.jpg", "b")], r"(line 3|row 2): 1\.jpg has another label than in an earlier"),
    "no file": ([("1.jpg", "a"), ("missing.jpg", "a")], r"(line 3|row 2): no file .*missing\.jpg"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "words"), ROWS.values(), ids=ROWS)
def test_what_is_wrong_in_a_table_is_named_with_its_row(tmp_path, kind, rows, words):
    with pytest.raises(DataError, match=rf"list\.{kind}: {words}"):
        CSV(table(tmp_path, rows, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_the_columns_or_cut_short_is_one_line(tmp_path, kind):
    path = table(tmp_path, [("1.jpg", "a")], kind, columns=("file", "class"))
    words = {"csv": r"behind line 0: .*\['file', 'class'\], one must be", "parquet": "row 1: no"}[kind]
    with pytest.raises(DataError, match=rf"list\.{kind}: {words} 'path'"):
        CSV(path)
    path = table(tmp_path, [(f"{i}.jpg", "a") for i in range(50)], kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b'\xff"')
    with pytest.raises(ExpressError, match=rf"list\.{kind}: behind (line|row) \d+: cannot be read"):
        CSV(path)
    path.unlink()
    with pytest.raises(ExpressError, match=rf"list\.{kind}: behind (line|row) 0: cannot be read"):
        CSV(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_rows_is_an_error_for_each_split(tmp_path, kind):
    empty = table(tmp_path, [], kind)
    some = table(tmp_path / "some", [("1.jpg", "a")], kind)
    for given in ((empty,), (some, empty)):
        with pytest.raises(DataError, match=rf"list\.{kind}: has no images"):
            CSV(*given)


def test_a_column_that_is_there_twice_and_a_path_in_two_spellings_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"behind line 0: .*one must be 'path'"):
        CSV(table(tmp_path, [("1.jpg", "a", "2.jpg")], "csv", columns=("path", "label", "path")))
    with pytest.raises(DataError, match=r"line 3: a/\.\./1\.jpg has another label than in an earlier row"):
        CSV(table(tmp_path, [("1.jpg", "a"), ("a/../1.jpg", "b")], "csv"))


def test_an_unquoted_comma_and_a_class_without_training_are_named(tmp_path):
    with pytest.raises(DataError, match="line 2: more fields than columns; quote"):
        CSV(table(tmp_path, [("1.jpg", "a,b")], "csv"))
    train = table(tmp_path / "t", [("1.jpg", "a")], "csv")
    with pytest.raises(DataError, match="line 2: 'b' is none of the 1 training classes"):
        CSV(train, table(tmp_path / "v", [("1.jpg", "b")], "csv"))


def test_a_damaged_page_of_parquet_is_named_with_the_rows_before_it(tmp_path):
    path = table(tmp_path, [(f"{i:04}.jpg", f"class {i % 7}") for i in range(40)], "parquet")
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)  # the first page, not the footer
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"list\.parquet: behind row 0: cannot be read"):
        CSV(path)


HUB = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}}


def hub(path: Path, rows: list[tuple], columns: tuple[str, str] = ("image", "label"), group: int = 3) -> Path:
    """An image dataset as the Hub has it."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    made = pyarrow.table({name: [row[i] for row in rows] for i, name in enumerate(columns)})
    made = made.replace_schema_metadata({b"huggingface": json.dumps(HUB)})
    parquet.write_table(made, path, row_group_size=group)
    return path


def hub_rows(count: int, seed: int = 0) -> list[tuple]:
    rng = np.random.default_rng(seed)
    return [({"bytes": image(rng), "path": f"{i}.jpg"}, i % 3) for i in range(count)]


def test_parquet_files_of_the_hub_are_sharded_with_names_and_unpacked_once(tmp_path, monkeypatch):
    wanted = [hub_rows(8, seed) for seed in range(2)]
    for number, rows in enumerate(wanted):
        hub(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", rows)
    hub(tmp_path / "data" / "test.parquet", hub_rows(4, 2))
    options = {"val": str(tmp_path / "data" / "test.parquet"), "unpack": tmp_path / "unpacked"}
    pattern = str(tmp_path / "data" / "train-*.parquet")
    source = HubParquet(pattern, **options)
    build(Plan(source, Options()), tmp_path / "out", workers=1)
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.classes, dataset.class_names) == (["0", "1", "2"], ["cat", "dog", "eel"])
    assert (dataset.split("val").samples, dataset.manifest["source"]["kind"]) == (4, "hf-parquet")
    expected = {f"train-0000{n}-of-00002_{i:07}": row for n, rows in enumerate(wanted) for i, row in enumerate(rows)}
    found = {item.key: ({"bytes": source.read(item)}, item.label) for item in source.splits["train"]}
    assert {key: (image["bytes"], label) for key, (image, label) in found.items()} == {
        key: (image["bytes"], label) for key, (image, label) in expected.items()
    }

    def never(self):
        raise AssertionError(self.path)

    monkeypatch.setattr(Table, "rows", never)
    assert HubParquet(pattern, **options).splits["train"].digest() == source.splits["train"].digest()
    hub(tmp_path / "data" / "test.parquet", hub_rows(5, 3))  # changed: read again
    with pytest.raises(AssertionError, match=r"test\.parquet"):
        HubParquet(pattern, **options)


HUB_FAULTS = {
    "no image": (lambda rows: [*rows, ({"bytes": None, "path": "x"}, 1)], r"row 5: no bytes of an image in 'image'"),
    "no label": (lambda rows: [*rows, (rows[0][0], None)], r"row 5: no class number in 'label'"),
    "a negative label": (lambda rows: [*rows, (rows[0][0], -1)], r"row 5: no class number in 'label'"),
}


@pytest.mark.parametrize(("spoil", "words"), HUB_FAULTS.values(), ids=HUB_FAULTS)
def test_what_is_wrong_in_a_parquet_file_of_the_hub_is_named_and_no_tar_is_left(tmp_path, spoil, words):
    path = hub(tmp_path / "a.parquet", spoil(hub_rows(4)))
    with pytest.raises(DataError, match=rf"a\.parquet: {words}"):
        HubParquet(str(path), unpack=tmp_path / "unpacked")
    assert not [file for file in (tmp_path / "unpacked").rglob("*") if file.is_file()]


def test_other_columns_of_the_hub_are_named_and_damage_is_one_line(tmp_path):
    path = hub(tmp_path / "a.parquet", hub_rows(9), ("img", "fine_label"))
    with pytest.raises(DataError, match=r"row 1: no bytes of an image in 'image'; --image-column names another"):
        HubParquet(str(path), unpack=tmp_path / "unpacked")
    source = HubParquet(str(path), unpack=tmp_path / "unpacked", image_column="img", label_column="fine_label")
    assert (len(source.splits["train"]), source.class_names) == (9, None)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: behind row 0: cannot be read"):
        HubParquet(str(path), unpack=tmp_path / "unpacked")
    page = hub(tmp_path / "b.parquet", hub_rows(9))
    data = bytearray(page.read_bytes())
    data[4:200] = bytes(196)
    page.write_bytes(data)
    with pytest.raises(DataError, match=r"b\.parquet: behind row 0: cannot be read"):
        HubParquet(str(page), unpack=tmp_path / "unpacked")
    train, other = hub(tmp_path / "c.parquet", hub_rows(2)), hub(tmp_path / "d.parquet", hub_rows(3))
    with pytest.raises(DataError, match=r"val/d\.tar/d_0000002\.jpg: '2' is none of the 2 training classes"):
        HubParquet(str(train), val=str(other), unpack=tmp_path / "unpacked")
