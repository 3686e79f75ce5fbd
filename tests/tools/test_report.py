"""The pages of tools/report.py and tools/check_shards.py, as a browser shows them, and what trainers keep for them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline import Loader, open_dataset
from pipeline.errors import CHECK_FAILED, DONE, NON_FINITE, PREEMPTED
from pipeline.read.augment import AugmentConfig
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from tests.browser import Browser
from tests.conftest import ROOT, SHARED, picture, run_here, run_tool
from tools import check_shards, report
from train import exit_report
from train.run_folder import read_json
from train.showcase import CROP_BYTES, EPOCHS, IMAGES, in_every_epoch

PAGE_BYTES = 15_000_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run of three epochs, with averaged weights."""
    return shutil.copytree(trained, tmp_path / "digits run")


def pages(*runs: Path, page: Path | None = None) -> str:
    """The text of the page about runs, written in this process."""
    page = page or runs[0] / "report.html"
    read = [report.read(run) for run in runs]
    report.write_page(page, "report.html", runs=read, plots=[report.plot(title, read) for title in report.ON_PAGE])
    return page.read_text()


PLOTS = """
  const plots = [...document.querySelectorAll(".plot")], frame = () => new Promise(requestAnimationFrame);
  const drawn = plot => plot.querySelector(".main-svg .trace path, .main-svg .point path");
"""
# Scrolls to each plot, since it is drawn only then.
LOOKED = (
    f"(async () => {{ {PLOTS}"
    + """
  const pictures = [...document.images];
  for (const plot of plots) { plot.scrollIntoView({ behavior: "instant" }); await frame(); await frame(); }
  return {
    scroll: document.documentElement.scrollWidth - innerWidth,
    pictures: pictures.length,
    empty: pictures.filter(i => !i.complete || !i.naturalWidth || !i.getBoundingClientRect().width).map(i => i.alt),
    plots: plots.length,
    undrawn: plots.filter(plot => !drawn(plot)).map(plot => plot.innerText),
  };
})()"""
)
# Waits until the plots in view are drawn. How many plots are drawn then.
IN_VIEW = (
    f"(async () => {{ {PLOTS}"
    + """
  const view = plots.filter(plot => plot.getBoundingClientRect().top < innerHeight);
  while (!view.every(drawn)) await frame();
  return plots.filter(drawn).length;
})()"""
)


# In pixels: of each plot, and of the place for it.
PLOT_WIDTHS = """dispatchEvent(new Event("%s")), [...document.querySelectorAll(".plot > div")].map(place =>
  [place.querySelector(".main-svg"), place].map(one => one.getBoundingClientRect().width))"""


PHONE, WIDE = (360, False), (1920, True)  # pixels, and whether the theme is dark


def check(browser: Browser, page: Path, *, pictures: int, plots: int, screens: tuple = (PHONE, WIDE)) -> None:
    for width, dark in screens:
        browser.open(page, width=width, dark=dark)
        found = browser.value(LOOKED)
        assert browser.errors() == [], width
        assert browser.requests(page) == []
        assert found["scroll"] <= 0, width
        assert found["empty"] == found["undrawn"] == []
        assert found["pictures"] >= pictures
        assert found["plots"] == plots


# In a browser


def test_a_run_s_page_is_whole_on_a_phone_and_on_a_wide_screen(browser, run):
    text = pages(run)
    assert len(text) < PAGE_BYTES
    kernels = len(read_json(run / "showcase.json", cure="")["kernels"])
    check(browser, run / "report.html", pictures=kernels + IMAGES * EPOCHS + IMAGES, plots=6)
    verdicts = re.findall(r'<dd class="(\w+)">(.*?)</dd>', text)
    assert [level for level, _ in verdicts[:1]] == ["good"]
    assert "top-1" in verdicts[0][1]
    # The themes and the keyboard
    assert browser.value("document.getElementById('theme').click(), document.documentElement.dataset.theme") == "light"
    assert browser.value("document.querySelector('.skip').focus(), document.activeElement.hash") == "#main"
    # Printing draws the plots that nobody has scrolled to
    browser.open(run / "report.html", width=1920)
    assert 0 < browser.value(IN_VIEW) < 6
    printed = browser("Page.printToPDF", printBackground=False)
    assert len(base64.b64decode(printed["data"])) > 50_000
    on_paper, on_screen = (browser.value(PLOT_WIDTHS % event) for event in ("beforeprint", "afterprint"))
    assert on_paper[0][1] < 704 < on_screen[0][1]
    assert all(abs(drawn - place) <= 1 for drawn, place in on_paper + on_screen), (on_paper, on_screen)


@pytest.mark.slow
def test_the_page_of_a_run_on_photographs_is_whole(browser, tmp_path):
    archive = SHARED / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive.name} is not here; set IMAGENET_EXPRESS_DATA to the folder that holds it")
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.fullmatch(r"train/\w+/00[0-4]\d.jpg|test/\w+/000\d.jpg", member.name):
                tar.extract(member, tmp_path, filter="data")
    source = ImageFolder(tmp_path / "train", tmp_path / "test", "cifar10")
    build(Plan(source, Options(Encoding(size=32))), tmp_path / "shards", workers=1)
    options = ["--augment.flip", "--train.epochs", 3, "--model.width", 0.125, "--run.dir", tmp_path / "run"]
    done = run_tool("train/run.py", "demo", "--data.shards", tmp_path / "shards", *options)
    assert done.returncode == 0, done.stderr
    pages(tmp_path / "run")  # on a busy machine the run's own page may have been late
    check(browser, tmp_path / "run/report.html", pictures=12 + IMAGES * EPOCHS + IMAGES, plots=6)


def test_the_page_of_shards_is_whole_on_a_phone_and_on_a_wide_screen(browser, odd_shards, tmp_path):
    done = run_tool("tools/check_shards.py", odd_shards, "--html", tmp_path / "page.html", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert f"page: {tmp_path / 'page.html'}" in done.stdout
    check(browser, tmp_path / "page.html", pictures=4 + open_dataset(odd_shards).split("train").samples, plots=4)
    ticks = browser.value("[...document.querySelectorAll('.xtick text')].map(tick => tick.textContent)")
    assert {"cat", "<i>dog"} <= set(ticks)


@pytest.mark.slow
def test_a_page_of_a_hundred_epochs_and_a_thousand_classes_is_small_and_opens_at_once(run, tmp_path):
    large(run, epochs=100, classes=1000, crop=224)
    text = pages(run)
    assert len(text) < PAGE_BYTES
    assert "top-1 99.00 % in epoch 99;" in text  # the first of the best, whose weights are kept
    # Processor time of all that the page's thread does until what is in view is drawn. The profile is new: in its first
    # page a browser also compiles plotly.
    seconds = []
    with Browser(tmp_path / "profile") as fresh:
        fresh("Performance.disable")
        fresh("Performance.enable", timeDomain="threadTicks")
        for _ in range(3):
            fresh.open(run / "report.html", width=1920)
            assert 0 < fresh.value(IN_VIEW) < 6
            metrics = {one["name"]: one["value"] for one in fresh("Performance.getMetrics")["metrics"]}
            seconds.append(metrics["TaskDuration"])
        assert 0.1 < min(seconds) <= max(seconds) < 2, seconds
        found = fresh.value(LOOKED)
    assert found["empty"] == found["undrawn"] == []


def large(run: Path, *, epochs: int, classes: int, crop: int) -> None:
    """Makes a run look like one of ImageNet's, with pictures of noise, which nothing compresses."""
    lines = []
    for epoch in range(1, epochs + 1):
        for step in range((epoch - 1) * 10_000 + 20, epoch * 10_000 + 1, 20):
            lines.append({
                "kind": "train", "step": step, "time": step / 10, "epoch": epoch, "loss": 7 / epoch + step % 7 / 10,
                "images_per_second": 1000 + step % 100, "data_wait": 0.01, "lr": 0.01, "memory_gb": 2.5,
            })  # fmt: skip
        values = {
            "loss": 2 + 5 / epoch,
            "top1": 1 - 1 / min(epoch + 1, epochs),
            "top5": 1 - 0.5 / (epoch + 1),
            "images": 50_000,
        }
        lines.append({"kind": "val", "step": epoch * 10_000, "time": epoch * 1000 + 50, "epoch": epoch, **values})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = read_json(run / "showcase.json", cure="")
    noise = np.random.default_rng(0).integers(0, 256, (crop, crop, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    names = [f"class {number} " + "x" * 300 for number in range(classes)]
    shown |= {"classes": names, "counts": [1300] * classes}
    for one in (*shown["crops"], *shown["predictions"]):
        one["png"] = base64.b64encode(file.getvalue()).decode()
    (run / "showcase.json").write_text(json.dumps(shown))


# Runs of all kinds


def test_names_cannot_become_tags_and_long_ones_are_cut(run):
    path = run / "showcase.json"
    shown = read_json(path, cure="")
    evil = "<script>alert(1)</script>"
    shown["classes"] = [evil, "n" * 300, *shown["classes"][2:]]
    for one in (*shown["crops"], *shown["predictions"]):
        one["label"] = 0
    for one in shown["predictions"]:
        one["best"] = [[0, 1], [0.5, 0.25]]
    shown["confusions"] = [{"class": evil, "taken_for": "n" * 300, "count": 1, "images": 2}]
    path.write_text(json.dumps(shown))
    config = read_json(run / "config.json", cure="")
    config["command"] = evil
    (run / "config.json").write_text(json.dumps(config))
    evil_run = shutil.copytree(run, run.with_name("<b>run & co"))
    text = pages(run, evil_run, page=run / "page.html")
    assert evil not in text
    assert "<b>run" not in text
    assert "n" * 100 not in text
    assert text.count("&lt;script&gt;") > 10


def changed(run: Path, what: str) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {"empty": [], "no validation": ["start", "train"], "in progress": ["start", "train", "val"]}
    if what in kept:
        lines = [line for line in lines if line["kind"] in kept[what]]
        (run / "exit.json").unlink()
    if what in ("empty", "no validation", "of an earlier version"):
        (run / "showcase.json").unlink()
    if what == "exited with 76":
        values = {"code": 76, "reason": "the loss is nan at step 9 <here>", "step": 9}
        (run / "exit.json").write_text(json.dumps(values))
        lines.append({"kind": "left out", "step": 9, "time": 1.0, "bad_step": 9, "loss": "nan", "ids": [1]})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("no validation", "not evaluated yet; the training loss went from"),
        ("in progress", "it is still running, or was killed: there is no exit.json"),
        ("exited with 76", "exit code 76 at step 9: the loss is nan at step 9 &lt;here&gt;"),
        ("of an earlier version", "all is done"),
    ],
)
def test_each_run_has_a_page(run, what, shown):
    changed(run, what)
    done = run_tool("tools/report.py", run)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"report:      {run / 'report.html'}\n" in done.stdout
    text = (run / "report.html").read_text()
    assert shown in text
    assert ("Validation images" in text) == (what in ("in progress", "exited with 76"))
    assert ("1 steps with non-finite numbers" in text) == (what == "exited with 76")
    assert (run / "curves.png").is_file()


def test_an_empty_run_and_what_is_damaged_are_one_line(run, monkeypatch, capsys):
    (run / "showcase.json").write_text("{")
    code, line = run_here(report.main, monkeypatch, capsys, run)
    assert (code, "showcase.json: cannot be read as JSON" in line) == (65, True)
    changed(run, "empty")
    code, line = run_here(report.main, monkeypatch, capsys, run)
    assert (code, "no epoch was finished yet" in line) == (65, True)
    (run / "metrics.jsonl").unlink()
    code, line = run_here(report.main, monkeypatch, capsys, run)
    assert (code, "metrics.jsonl: No such file or directory; name the folder of a run" in line) == (65, True)


def test_a_page_is_written_at_every_end_and_never_changes_the_exit_code(run, monkeypatch):
    page, trainer = run / "report.html", SimpleNamespace(showcase=SimpleNamespace(writes=True))
    trainer.folder = SimpleNamespace(path=run)
    monkeypatch.setattr(exit_report, "PAGE_SECONDS", 300)
    for code in (DONE, CHECK_FAILED, PREEMPTED, NON_FINITE):
        page.unlink()
        ended = exit_report.ExitReport(code, trainer=trainer)
        ended.write_page()
        assert page.is_file()
        assert ended.code == code
    page.unlink()
    monkeypatch.setattr(exit_report, "PAGE_SECONDS", 0.01)
    ended.write_page()
    monkeypatch.setattr(exit_report, "PAGE_SECONDS", 300)
    (run / "showcase.json").write_text("{")
    ended.write_page()
    assert not page.exists()
    assert ended.code == NON_FINITE


def test_two_runs_are_compared_in_one_page(browser, run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "a <b>b")
    config = read_json(other / "config.json", cure="")
    config["config"]["model"]["name"], config["config"]["optim"]["lr"] = "another", 0.5
    (other / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py", str(run), "a <b>b"])
    report.main()
    text = (tmp_path / "report.html").read_text().replace("<wbr>", "")
    rows = re.findall(r'<tr( class="differs")?><th scope="row">([\w.]+)</th><td>(.*?)</td><td>(.*?)</td>', text)
    differ = {name: (a, b) for mark, name, a, b in rows if mark}
    assert differ.keys() == {"model.name", "optim.lr"}
    assert differ["optim.lr"][1] == "0.5"
    assert len(rows) > 80
    assert text.count('"of": "digits run"') == 8  # loss and accuracy of training, validation and averaged weights …
    check(browser, tmp_path / "report.html", pictures=2 * IMAGES, plots=7, screens=(PHONE,))
    legend = browser.value("[...document.querySelectorAll('.legendtext')].map(text => text.textContent)")
    assert {"digits run: training", "a <b>b: training"} <= set(legend)


def test_curves_keep_their_peaks():
    values = np.random.default_rng(0).normal(size=54_321)
    values[33_333], values[44_444] = 99, -99
    kept = report.reduced(values)
    assert len(kept) <= report.POINTS
    assert kept == sorted(kept)
    assert {33_333, 44_444} <= set(kept)
    assert report.reduced(np.array([3.0, 1, 2])) == [0, 1, 2]


# What the trainer keeps


def test_crops_are_the_pixels_that_the_loader_delivers(run, digits):
    shown, config = (read_json(run / name, cure="") for name in ("showcase.json", "config.json"))
    augment = AugmentConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in config["config"]["augment"].items()}
    )
    batch = config["config"]["train"]["batch"]
    plain = Loader(digits, batch=batch, augment=augment, dtype="uint8")
    fed = Loader(digits, batch=batch, augment=augment, channels_last=True)
    assert {crop["epoch"] for crop in shown["crops"]} == {1, 2, 3}
    images = {(crop["id"], crop["epoch"]) for crop in shown["crops"]}
    assert images == {(id, epoch) for id, _ in images for epoch in (1, 2, 3)}
    assert len(shown["crops"]) == len(images) == IMAGES * EPOCHS
    text = pages(run)
    pngs = {}
    with plain, fed:
        for crop in shown["crops"]:
            at = {"epoch": crop["epoch"] - 1, "step": (crop["step"] - 1) % len(fed)}
            delivered = []
            for loader in (plain, fed):
                loader.load_state_dict(at)
                found = next(iter(loader))
                delivered.append(found.images[found.ids.tolist().index(crop["id"])])
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(crop["png"]))))
            assert np.array_equal(pixels, delivered[0].numpy().transpose(1, 2, 0))
            assert crop["sha256"] == hashlib.sha256(delivered[1].numpy().tobytes()).hexdigest()
            (tag,) = re.findall(rf'<img[^>]* data-id="{crop["id"]}" data-epoch="{crop["epoch"]}"[^>]*>', text)
            assert f'src="data:image/png;base64,{crop["png"]}"' in tag
            assert f'data-sha256="{crop["sha256"]}"' in tag
            pngs[crop["png"]] = crop["id"]
    assert len(pngs) > IMAGES  # epochs differ


def test_crops_of_a_rank_are_of_images_that_it_gets_in_each_epoch(digits):
    for world in (1, 2):
        with Loader(
            digits, batch=128, rank=world - 1, world=world, augment=AugmentConfig(resize=36, crop=32)
        ) as loader:
            chosen = in_every_epoch(loader)
            assert len(chosen) == len(set(chosen.tolist())) == IMAGES
            for epoch in range(EPOCHS):
                seen = np.concatenate([loader.ids(epoch, step) for step in range(len(loader))])
                assert set(chosen.tolist()) <= set(seen.tolist())
            loader.augment = AugmentConfig(resize=2000, crop=1000)
            assert len(in_every_epoch(loader)) == CROP_BYTES // (EPOCHS * 4_000_000)


def test_what_is_kept_agrees_with_the_evaluation(run, digits):
    shown = read_json(run / "showcase.json", cure="")
    last = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val" in line["kind"]]
    assert shown["epoch"] == 3
    dataset = open_dataset(digits)
    assert sum(shown["counts"]) == dataset.split("train").samples
    assert shown["medians"]["width"] == 36
    right = sum(one["best"][0][0] == one["label"] for one in shown["predictions"])
    assert right >= len(shown["predictions"]) * last[-1]["top1"] - 3
    wrong = round((1 - last[0 if last[-1]["kind"] == "val" else -1]["top1"]) * dataset.split("val").samples)
    assert 0 < sum(one["count"] for one in shown["confusions"]) <= max(wrong, 1)
    for one in shown["predictions"]:
        chances = one["best"][1]
        assert chances == sorted(chances, reverse=True)
        assert 0.3 < sum(chances) <= 1.001
    assert shown["towers"] == 1
    assert (run / "showcase.json").stat().st_size < 20e6


def test_tensorboard_gets_kernels_and_crops(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(run.rglob("events.out*")).parent), {"images": 0})
    events.Reload()
    images = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    assert {tag: len(found) for tag, found in images.items()} == {"kernels": 3, "crops": 3}


def test_a_run_with_a_report_computes_what_one_without_computes(few_digits, tmp_path):
    args = ["demo", "--data.shards", few_digits, "--train.epochs", 2, "--model.width", 0.0625, "--run.log-every", 1]
    kept = []
    for name, option in (("with", []), ("without", ["--run.no-report"])):
        run = tmp_path / name
        if name == "with":
            run.mkdir()
            (run / "stop").touch()
            done = run_tool("train/run.py", *args, "--run.dir", run)
            assert done.returncode == PREEMPTED, done.stderr
            assert "exit code 75 at step 1: stopped by the file" in pages(run)
        done = run_tool("train/run.py", *args, "--run.dir", run, *option)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("val top1=")
        assert [(run / file).exists() for file in ("report.html", "showcase.json")] == [name == "with"] * 2
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights = sorted(run.glob("checkpoints/step-*/model.safetensors"))[-2:]
        losses = [(line["step"], line["loss"]) for line in lines if line["kind"] != "start"]
        kept.append([losses, [path.read_bytes() for path in weights]])
        assert len(kept[-1][1]) == 2
    assert kept[0] == kept[1]


# Shards


@pytest.fixture(scope="module")
def odd_shards(tmp_path_factory) -> Path:
    """Two classes of four and five images: a duplicate with another label, a PNG, and one that is no image."""
    root = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(1)
    for name in ("cat", "<i>dog"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(4):
            picture(rng, 48, 40).save(root / "images" / name / f"{number}.jpg")
    shutil.copy(root / "images/cat/0.jpg", root / "images/<i>dog/0.jpg")
    picture(rng, 64, 40).save(root / "images/cat/odd.png")
    (root / "images/cat/bad.jpg").write_bytes(b"no image")
    source = ImageFolder(root / "images", val_fraction=0.25)
    build(Plan(source, Options(max_bad_fraction=0.5)), root / "shards", workers=1)
    return root / "shards"


def test_the_page_of_shards_shows_what_was_converted_left_out_and_twice(odd_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_shards.py", str(odd_shards), "--html", str(tmp_path / "page.html")])
    check_shards.main()
    text = (tmp_path / "page.html").read_text()
    assert "<i>dog" not in text
    assert "Images converted: 1, left out: 1." in text
    assert "train/cat/bad.jpg" in text
    converted = re.search(r'<img src="data:image/jpeg;base64,([^"]+)" alt="train/cat/odd.png"', text)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(converted[1]))))
    assert shown.shape == (40, 64, 3)
    assert "Groups of images with equal bytes: 1." in text
    copies = re.search(r'<section id="duplicates">(.*?)</section>', text, re.DOTALL)[1]
    first, second = re.findall(r'<img src="([^"]+)"', copies)
    assert first == second
    assert "cat" in copies
    assert "&lt;i&gt;dog" in copies


def test_a_damaged_set_has_a_page_that_names_the_damage(odd_shards, tmp_path, monkeypatch):
    root = shutil.copytree(odd_shards, tmp_path / "copy")
    tar = next(root.glob("*-train-*.tar"))
    data = bytearray(tar.read_bytes())
    data[700:] = bytes(len(data) - 700)
    tar.write_bytes(data)
    monkeypatch.setattr("sys.argv", ["check_shards.py", str(root), "--html", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit) as end:
        check_shards.main()
    assert end.value.code == 1
    text = (tmp_path / "page.html").read_text()
    assert "What is wrong" in text
    assert f'<th scope="row">{tar.name}</th>' in text
    tar.unlink()
    with pytest.raises(SystemExit) as end:
        check_shards.main()
    assert end.value.code == 1
    assert "the shard is missing" in (tmp_path / "page.html").read_text()


def test_templates_are_in_the_image():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "!tools" in ignored
    assert {path.name for path in (ROOT / "tools/templates").iterdir()} == {
        "card.md",
        "page.html",
        "predict.html",
        "report.html",
        "shards.html",
    }
