"""tools/predict.py: the predictions of an evaluation, for any image; a broken image does not affect the others."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from pipeline.manifest import open_dataset
from tests.conftest import ROOT, run_here, run_tool
from tools import predict

PREDICT = "tools/predict.py"


@pytest.fixture(scope="module")
def pictures(few_digits, tmp_path_factory):
    """The first eight validation images as files, by key."""
    root, split = tmp_path_factory.mktemp("pictures"), open_dataset(few_digits).split("val")
    for row, key in zip(split.index[:8], split.keys(), strict=False):
        data = (few_digits / split.shards[row["shard"]].name).read_bytes()
        (root / f"{key}.jpg").write_bytes(data[int(row["offset"]) :][: int(row["size"])])
    return root


@pytest.mark.parametrize("views", [1, 10])
def test_a_file_is_answered_as_in_its_shards(trained, few_digits, pictures, tmp_path, views):
    flags = ["--views", views, "--precision", "fp32"]
    done = run_tool("tools/evaluate.py", trained, "--data.shards", few_digits, *flags, "--csv", tmp_path / "all.csv")
    assert done.returncode == 0, done.stderr
    rows = {row["key"]: row for row in csv.DictReader((tmp_path / "all.csv").read_text().splitlines())}
    done = run_tool(PREDICT, trained, pictures, "--views", views, "--json", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "p.json").read_text())["answers"]
    assert len(answers) == 8
    for answer in answers:
        row = rows[re.search(r"(\w+)\.jpg", answer["image"])[1]]
        for i, best in enumerate(answer["best"], 1):
            assert best["class"] == row[f"answer{i}"]
            assert best["probability"] == pytest.approx(float(row[f"probability{i}"]), abs=1e-5)


def test_any_kind_of_image_is_read_and_one_comes_by_standard_input(trained, pictures, tmp_path):
    first = sorted(pictures.iterdir())[0]
    image = Image.open(first).convert("RGB")
    for suffix in ("png", "bmp", "tiff", "webp"):
        image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    image.convert("RGBA").save(tmp_path / "b.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(tmp_path / "c.gif")
    done = run_tool(PREDICT, trained, tmp_path, "--json", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "p.json").read_text())["answers"]
    assert len(answers) == 6
    assert len({json.dumps(a["best"]) for a in answers if "/a." in a["image"]}) == 1
    assert len({a["best"][0]["class"] for a in answers}) == 1
    argv = [sys.executable, str(ROOT / PREDICT), str(trained), "-"]
    piped = subprocess.run(argv, input=(tmp_path / "a.png").read_bytes(), capture_output=True)
    shown = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert piped.stdout.decode().splitlines()[1:] == shown[:5]


def test_a_broken_image_costs_no_other_its_answer(trained, pictures, tmp_path):
    whole = sorted(pictures.iterdir())[0]
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    page = tmp_path / "page.html"
    done = run_tool(PREDICT, trained, whole, tmp_path / "cut.jpg", tmp_path / "text.png", "gone.jpg", "--html", page)
    assert done.returncode == 65
    lines = done.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines[:3]] == [f"{tmp_path}/cut.jpg", f"{tmp_path}/text.png", "gone.jpg"]
    assert lines[3] == "error: 3 of 4 images cannot be read; the others are classified"
    assert len(lines) == 4
    assert done.stdout.splitlines()[0] == str(whole)
    assert len([line for line in done.stdout.splitlines() if line.startswith("  ")]) == 5
    assert page.read_text().count("<figure>") == 1


def test_the_page_shows_names_as_text_and_needs_nothing_else(trained, pictures, tmp_path):
    odd = tmp_path / '<b>&".jpg'
    odd.write_bytes(sorted(pictures.iterdir())[0].read_bytes())
    done = run_tool(PREDICT, trained, odd, pictures, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 9
    assert page.count('src="data:image/jpeg;base64,') == 9
    assert "://" not in page
    assert str(escape(str(odd))) in page
    assert "<b>&" not in page
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%\"", page)]
    assert len(widths) == 45
    assert np.array(widths).reshape(9, 5).sum(1).max() <= 100.1


def test_a_name_cannot_steer_the_terminal_and_a_closed_pipe_is_no_error(trained, pictures, tmp_path):
    (tmp_path / "a\x1b[31mb\nc.png").write_text("no picture")
    (tmp_path / "d\x1b.jpg").write_bytes(sorted(pictures.iterdir())[0].read_bytes())
    done = run_tool(PREDICT, trained, tmp_path)
    assert len(done.stderr.splitlines()) == 2
    assert "\x1b" not in done.stderr + done.stdout
    assert "a\\x1b[31mb\\nc.png: not an image" in done.stderr
    read, write = os.pipe()
    os.close(read)
    piped = run_tool(PREDICT, trained, pictures, stdout=write, stderr=subprocess.PIPE, capture_output=False)
    os.close(write)
    assert piped.stderr == ""
    assert piped.returncode in (0, 141)


@pytest.mark.parametrize(
    ("images", "code", "said"),
    [
        (["{empty}"], 65, "holds no image"),
        (["-", "-"], 2, "standard input holds one image"),
    ],
)
def test_what_holds_no_image_is_one_line(trained, tmp_path, images, code, said, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    flags = [trained, *(i.format(empty=tmp_path / "empty") for i in images)]
    found, error = run_here(predict.main, monkeypatch, capsys, *flags)
    assert said in error
    assert found == code


def test_a_folder_is_searched_as_make_shards_does(tmp_path, capsys):
    for name in ("p/0.jpg", "p/sub/1.JPEG", "p/.ipynb_checkpoints/0.jpg", "p/noext", "p/x.jfif", "p/._0.jpg", "real/5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "p" / "readme.txt").write_text("no image")
    (tmp_path / "p" / "link").symlink_to("../real")
    os.mkfifo(tmp_path / "p" / "pipe.jpg")
    found = predict.image_files([str(tmp_path / "p")])
    names = ["0.jpg", "link/5", "noext", "sub/1.JPEG", "x.jfif"]
    assert found == [f"{tmp_path}/p/{name}" for name in names]
    shown = capsys.readouterr().err.strip().removeprefix("passed over: ").split(", ")
    assert {kind.partition(" (")[0] for kind in shown} == {"2 hidden", "1 .txt", "1 pipes and devices"}
    assert f"1 .txt ({tmp_path}/p/readme.txt)" in shown
    assert predict.image_files([""]) == [""]  # a shell's variable that is not set: not the working directory
