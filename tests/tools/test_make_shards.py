"""tools/make_shards.py and tools/report.py as people start them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import ConfigError, DataError, open_dataset
from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import ImageFolder
from pipeline.write.sources.base import few_images
from tests.conftest import ROOT, run_tool, the_error
from tools import make_shards, report

MAKE = "tools/make_shards.py"


def test_digits_become_a_dataset(tmp_path):
    done = run_tool(MAKE, "digits", "--out", tmp_path / "d", "--side", 16, "--samples-per-shard", 500, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "train: 1,438 images in 3 shards" in done.stdout
    dataset = open_dataset(tmp_path / "d")
    assert dataset.split("val").samples == 359
    assert dataset.classes == list("0123456789")


def test_a_folder_of_images_becomes_a_dataset(image_folder, tmp_path):
    done = run_tool(
        MAKE, "imagefolder", "--train", image_folder / "train", "--val", image_folder / "val", "--out", tmp_path / "d",
        "--encode", "jpeg", "--size", 64, "--square", "--quality", 80, "--seed", 3, "--name", "pets",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "d")
    for split in dataset.splits.values():
        assert set(split.index["width"]) == set(split.index["height"]) == {64}
    assert (tmp_path / "d" / "pets-val-000000.tar").is_file()


def test_a_killed_sharding_leaves_no_process_and_no_dataset_and_can_be_run_again(tmp_path):
    out = tmp_path / "d"
    args = [sys.executable, str(ROOT / MAKE), "digits", "--out", str(out), "--side", "250", "--samples-per-shard", "90"]
    process = subprocess.Popen([*args, "--workers", "2"], stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(out.glob("*.tar")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    while in_session(process.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    assert subprocess.run(args, capture_output=True).returncode == 0
    clean = tmp_path / "clean"
    assert subprocess.run([str(clean) if a == str(out) else a for a in args], capture_output=True).returncode == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in clean.iterdir()}


def in_session(session: int) -> list[int]:
    """Living processes of a session that we started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def bad_folder(image_folder, tmp_path, kind):
    root = shutil.copytree(image_folder, tmp_path / "in")
    if kind == "empty class":
        (root / "train" / "emu").mkdir()
    elif kind == "text":
        (root / "train" / "cat" / "notes.doc").write_text("hello")
    elif kind == "cut":
        path = root / "train" / "cat" / "0.jpg"
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "foreign class":
        (root / "val" / "cat").rename(root / "val" / "gnu")
    elif kind == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
        (root / "train" / "0.jpg").write_bytes(b"")
    return root


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty class", "in/train/emu: no image in this class folder; fill or remove it"),
        ("text", "1 of 17 images cannot be used (train/cat/notes.doc: not an image that Pillow reads)"),
        ("cut", "train/cat/0.jpg: damaged or truncated image"),
        ("foreign class", "in/val/gnu: this class is not among those of"),
        ("no classes", "in/train: no class folders"),
    ],
)
def test_bad_input_is_one_line_with_code_65_and_leaves_no_dataset(image_folder, tmp_path, kind, message):
    root = bad_folder(image_folder, tmp_path, kind)
    done = run_tool(MAKE, "imagefolder", "--train", root / "train", "--val", root / "val", "--out", tmp_path / "d")
    assert done.returncode == 65
    assert message in the_error(done)
    assert not (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digits"], "the following arguments are required: --out"),
        (["cifar", "--out", "x"], "argument SOURCE: invalid choice: 'cifar'"),
        (
            ["digits", "--out", "x", "--size", "0"],
            "size=0: must be a number of at least 8",
        ),
        (["digits", "--out", "x", "--quality", "200"], "quality=200"),
        (["digits", "--out", "x", "--square"], "square goes with encode=jpeg"),
        (["digits", "--out", "x", "--samples-per-shard", "0"], "samples_per_shard=0"),
        (["digits", "--out", "x", "--workers", "-1"], "--workers -1"),
        (["digits", "--out", "x", "--side", "2"], "--side 2"),
    ],
)
def test_wrong_usage_is_one_line_with_code_2(args, message):
    done = run_tool(MAKE, *args)
    assert done.returncode == 2
    assert message in the_error(done)


def test_places_that_overlap_are_rejected_before_anything_is_written(image_folder, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "in")
    train, before = root / "train", sorted(root.rglob("*"))
    for val, out, message in (
        (root / "val", train / "shards", f"{train}/shards: lies in {train}, whose folders are classes"),
        (root / "val", train, f"{train}: lies in {train}, whose folders are classes"),
        (train, tmp_path / "d", f"{train}: is both --train and --val"),
    ):
        done = run_tool(MAKE, "imagefolder", "--train", train, "--val", val, "--out", out)
        assert done.returncode == 2
        assert message in the_error(done)
    assert sorted(root.rglob("*")) == before
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("\ufeffcat\r\ndog\r\n", ["cat", "dog"]),
        ("great cat\ndog\n\n \n", ["great cat", "dog"]),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat\ndog\ncat\n", "lines 1 and 3 are both 'cat'"),
        ("caf\u00e9\ncafe\u0301\n", "lines 1 and 2 are both"),
        ("", "line 1 is empty"),
        (b"caf\xe9", "cannot be read .*; name a file in UTF-8"),
        (None, "cannot be read .*No such file.*; name a file in UTF-8"),
    ],
)
def test_a_file_of_class_names_is_read_as_editors_write_it(tmp_path, content, found):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(found, list):
        assert make_shards.class_names(tmp_path / "names.txt") == found
    else:
        with pytest.raises(DataError, match=found):
            make_shards.class_names(tmp_path / "names.txt")


def test_a_folder_that_cannot_be_written_is_named_with_code_74(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = run_tool(MAKE, "digits", "--out", tmp_path / "file" / "d")
    assert done.returncode == 74
    assert f"{tmp_path / 'file'}" in the_error(done)


def test_report_draws_the_curves_and_says_where_everything_is(tmp_path):
    lines = []
    for epoch in (1, 2, 3):
        train = {"kind": "train", "step": epoch * 10, "epoch": epoch, "loss": 2 / epoch}
        val = {
            "kind": "val",
            "step": epoch * 10,
            "epoch": epoch,
            "loss": 1,
            "top1": epoch / 4,
            "top5": 1.0,
            "images": 7,
        }
        lines += [json.dumps(train), json.dumps(val)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    done = run_tool("tools/report.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best: top-1 75.00% on 7 validation images in epoch 3" in done.stdout
    (tmp_path / "checkpoints").mkdir()  # the best that was saved, which evaluate.py takes, although another was better
    (tmp_path / "checkpoints" / "best").write_text("step-00000020\n")
    done = run_tool("tools/report.py", tmp_path)
    assert "best: top-1 50.00% on 7 validation images in epoch 2" in done.stdout
    assert f"checkpoints: {tmp_path / 'checkpoints' / 'step-00000020'}\n" in done.stdout
    from PIL import Image

    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1200, 480)
        assert len(picture.convert("L").getcolors(256)) > 20  # something is drawn


def test_curves_have_a_title_whole_epochs_a_best_mark_and_one_colour_a_split(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    val = [{"step": 10 * n, "epoch": n, "loss": 1, "top1": n / 4, "top5": n / 3} for n in (1, 2)]
    lines = {"train": [{**line, "loss": 2} for line in val], "val": val, "val of average": val}
    report.draw_curves(lines, val[1], tmp_path / "curves.png")
    loss, accuracy = plt.gcf().axes
    assert loss.get_title() == accuracy.get_title() == tmp_path.name
    assert all(tick == round(tick) for tick in (*loss.get_xticks(), *accuracy.get_xticks()))
    colour = {line.get_label(): line.get_color() for axes in (loss, accuracy) for line in axes.lines}
    of_validation = {colour[name] for name in colour if name.startswith("validation")}
    assert len(of_validation) == 1
    assert len({*of_validation, colour["training"], colour["best: 50.00% in epoch 2"]}) == 3
    best = accuracy.lines[-1]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([2], [0.5])
    assert len(accuracy.lines) == 4
    folder = tmp_path / os.fsdecode(b"run\xe9")  # matplotlib draws no name that is not UTF-8
    folder.mkdir()
    report.draw_curves(lines | {"val": [line | {"top5": 1} for line in val]}, val[1], folder / "curves.png")
    assert "validation top-5" not in [line.get_label() for line in plt.gcf().axes[1].lines]
    monkeypatch.undo()
    plt.close("all")


def test_classes_that_can_hardly_be_learnt_or_measured_are_noted(image_folder, tmp_path):
    train = shutil.copytree(image_folder / "train", tmp_path / "train")
    shutil.copytree(train / "cat", train / "ant")
    for image in sorted((train / "ant").iterdir())[1:]:
        image.unlink()
    sources = [ImageFolder(train), ImageFolder(train, val_fraction=0.3)]
    one = "one training image in 1 of the classes, such as ant"
    assert [list(few_images(source)) for source in sources] == [
        ["no validation split, which training needs; --val names one, --val-fraction 0.1 holds one out", one],
        [one, "no validation image in 1 of the classes, such as ant"],
    ]
    assert list(few_images(ImageFolder(image_folder / "train", image_folder / "val"))) == []
    for split in ("test", "train"):  # one folder too high
        shutil.copytree(image_folder / "train", tmp_path / "all" / split)
    assert next(few_images(ImageFolder(tmp_path / "all"))).startswith("classes are named as splits are; pass")


def test_another_split_of_finished_shards_is_named_by_its_option(image_folder, tmp_path):
    build(Plan(ImageFolder(image_folder / "train"), Options()), tmp_path, workers=1)
    with pytest.raises(ConfigError, match=r"with source.val_fraction=None, but this one has 0.2"):
        build(Plan(ImageFolder(image_folder / "train", val_fraction=0.2), Options()), tmp_path, workers=1)


def test_report_rejects_what_is_no_run(tmp_path):
    done = run_tool("tools/report.py", tmp_path)
    assert done.returncode == 65
    assert "name the folder of a run" in the_error(done)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step"')
    done = run_tool("tools/report.py", tmp_path)
    assert done.returncode == 65
    assert "metrics.jsonl:1: not a record of a run" in the_error(done)
