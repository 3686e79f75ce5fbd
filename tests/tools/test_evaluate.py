"""tools/evaluate.py against a plain implementation, at any number of ranks, and ImageNet's submission."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy.io import loadmat
from torch import nn

from model import AlexNet, ModelConfig
from pipeline.manifest import open_dataset
from pipeline.read.augment import AugmentConfig
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from pipeline.write.sources.imagenet import ImageNet2012
from tests.conftest import ROOT, real_images, run_here, run_tool, the_error
from tests.faults.job import PLANTED
from tests.pipeline.archives import ID_OF, Mini
from tests.pipeline.test_bad_samples import damage
from tools import evaluate
from train.classifier import Classifier
from train.evaluation import Predictions, bootstrap, mean_scores, summary
from train.model_card import Card, Inputs

EVALUATE = "tools/evaluate.py"
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """200 real images as JPEGs of short side 256; their labels are arbitrary."""
    found = sorted(real_images(tmp_path_factory.mktemp("images"), 200).rglob("*.JPEG"))
    assert len(found) == 200
    root, out = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("real")
    for i, path in enumerate(found):
        for split in ("train", "val"):
            folder = root / split / f"class{i % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.name)
    source = ImageFolder(root / "train", root / "val", "real")
    build(Plan(source, Options(Encoding("jpeg", size=256), samples_per_shard=70)), out, workers=2)
    return out


def a_net(seed: int, augment: AugmentConfig, dataset, name: str = "torchvision") -> Classifier:
    """A narrow net with probabilities as distinct as a trained net's: its logits differ by about 17."""
    torch.manual_seed(seed)
    net = AlexNet(ModelConfig(name, width=0.125, weight_init="torch"), classes=10, crop=224).eval()
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(600 if augment.normalize == "mean-std" else 20)
    card = Card(net.config, augment, Inputs.of(dataset, augment), {"classes": 10})
    return Classifier(Path(f"net{seed}"), net, card)


def plainly(models: list[Classifier], dataset, views: int) -> np.ndarray:
    """(n, 10) float64 probabilities: one image at a time, by Pillow and torch alone."""
    split, answers = dataset.split("val"), []
    mean_image = np.load(next(dataset.root.glob("*mean*.npy")))
    for row in split.index:
        with open(dataset.root / split.shards[row["shard"]].name, "rb") as file:
            file.seek(int(row["offset"]))
            image = Image.open(io.BytesIO(file.read(int(row["size"])))).convert("RGB")
        w, h = image.size
        assert min(w, h) == 256
        x, y = round((w - 224) / 2), round((h - 224) / 2)
        corners = [(x, y)]
        if views == 10:
            left, top = round((w - 256) / 2), round((h - 256) / 2)
            corners = [(left, top), (left + 32, top), (left, top + 32), (left + 32, top + 32), (x, y)]
        crops = [np.asarray(image.crop((a, b, a + 224, b + 224))).astype(np.float32) for a, b in corners]
        crops += [crop[:, ::-1] for crop in crops] if views == 10 else []
        probabilities = []
        for model in models:
            if model.card.augment.normalize == "mean-std":
                seen = [(crop - np.array(MEAN, np.float32)) / np.array(STD, np.float32) for crop in crops]
            else:
                seen = [crop - mean_image[16:240, 16:240] for crop in crops]
            with torch.no_grad():
                logits = model.net(torch.from_numpy(np.stack(seen).transpose(0, 3, 1, 2).copy()))
            probabilities += list(logits.double().softmax(1).numpy())
        answers.append(np.mean(probabilities, 0))
    return np.array(answers)


@pytest.mark.parametrize(
    ("views", "nets"), [(1, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 3), (10, 2)))]
)
def test_probabilities_are_those_of_a_plain_implementation(real, views, nets):
    dataset = open_dataset(real)
    seen = [AugmentConfig(normalize="mean-std", statistics="imagenet"), AugmentConfig(normalize="mean-image")]
    names = ["torchvision", "paper", "torchvision"]
    models = [a_net(i, seen[i % 2], dataset, names[i]) for i in range(nets)]
    args = Namespace(views=views, split="val", batch=64, max_bad=0, submission=None)
    found = evaluate.predicted(models, dataset, args, Accelerator(cpu=True))
    expected = plainly(models, dataset, views)
    assert np.ptp(expected, 1).mean() > 0.05  # probabilities differ enough to show an error
    labels = dataset.split("val").index["label"].astype(int)
    assert (found.labels == labels).all()
    np.testing.assert_allclose(found.probabilities, -np.sort(-expected, 1)[:, :5], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, found.best, 1), found.probabilities, rtol=0, atol=1e-5)
    own = np.take_along_axis(expected, labels[:, None], 1)[:, 0]
    np.testing.assert_allclose(np.exp(-found.losses), own, rtol=0, atol=1e-5)
    clear = np.abs(np.delete(expected - own[:, None], 0, 1)).min(1) > 1e-5  # ranks of near ties may differ
    ranks = (expected >= own[:, None]).sum(1) - 1
    assert (found.ranks == ranks)[clear].all()


def launched(*argv: object, ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    multi = ["--multi_gpu", "--main_process_port", "0"] if ranks > 1 else []
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *multi, "--num_processes", str(ranks), *fixed]
    env = os.environ | ({"ACCELERATE_USE_CPU": "true"} if ranks > 1 else {}) | variables
    return subprocess.run([*launch, *map(str, argv)], capture_output=True, text=True, cwd="/", env=env)


def test_what_all_ranks_find_wrong_is_printed_once_even_if_local_rank_0_is_late():
    wrong = ["/nowhere", "--data.shards", "/nowhere"]
    done = launched(PLANTED, ROOT / EVALUATE, *wrong, ranks=2, PLANT="late:0:0")
    assert done.stderr.count("error: ") == 1
    assert "\nerror: /nowhere: no such shard folder" in f"\n{done.stderr}"
    one = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    done = run_tool(EVALUATE, *wrong, env=os.environ | one)
    assert (done.returncode, done.stderr) == (65, "")


@pytest.mark.parametrize("worlds", [(1, 2), pytest.param((1, 3), marks=pytest.mark.slow)])
def test_the_same_integers_at_1_2_and_3_ranks_and_in_training(worlds, trained, digits, tmp_path):
    """Neither two ranks, three ranks nor batches of 50 divide 359 images evenly."""
    results = []
    for ranks in worlds:
        flags = ["--data.shards", digits, "--batch", 50, "--json", tmp_path / f"{ranks}.json", "--checkpoint", "latest"]
        done = launched(ROOT / EVALUATE, trained, *flags, "--csv", tmp_path / f"{ranks}.csv", ranks=ranks)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    for found in results:
        for name in ("images", "correct", "by_class", "confusions", "top1", "top5"):
            assert found[name] == results[0][name]
        assert found["loss"] == pytest.approx(results[0]["loss"], abs=1e-6)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["kind"] == "val of average"][-1]
    for name in ("top1", "top5"):
        assert round(own[name] * 359) == results[0]["correct"][name]
    assert own["loss"] == pytest.approx(results[0]["loss"], abs=1e-5)
    raw = launched(
        ROOT / EVALUATE,
        trained,
        "--data.shards",
        digits,
        "--raw",
        "--checkpoint",
        "latest",
        "--json",
        tmp_path / "raw.json",
    )
    own = [line for line in lines if line["kind"] == "val"][-1]
    assert json.loads((tmp_path / "raw.json").read_text())["correct"]["top1"] == round(own["top1"] * 359)
    assert "averaged" not in raw.stdout
    assert "359 images of 10 classes" in raw.stdout
    rows = list(csv.DictReader((tmp_path / f"{worlds[-1]}.csv").read_text().splitlines()))
    assert sum(row["label"] == row["answer1"] for row in rows) == results[0]["correct"]["top1"]
    assert len({row["key"] for row in rows}) == 359


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_images_are_left_out_up_to_a_limit_over_all_ranks(ranks, trained, digits, tmp_path):
    """Each batch of a rank has two images; one is empty, and one image is of rank 1."""
    root = shutil.copytree(digits, tmp_path / "digits")
    bad = [4, 5, 30, 300]
    damage(root, bad, split="val")
    files = ["--csv", tmp_path / "b.csv", "--json", tmp_path / "b.json"]
    command = [ROOT / EVALUATE, trained, "--batch", 2 * ranks, "--data.shards"]
    done = launched(*command, root, *files, "--loader.max-bad-samples", 4, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "val: 355 of 359 images of 10 classes" in done.stdout
    assert sum("bad sample" in line for line in done.stderr.splitlines()) == 4
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["images"], found["bad_samples"]) == (355, 4)
    few = launched(*command, root, "--loader.max-bad-samples", 3, ranks=ranks)
    assert few.returncode != 0
    errors = [line for line in few.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "4 bad samples, more than loader.max_bad_samples=3: 4, 5, 30, 300; " in errors[0]
    assert launched(*command, digits, "--csv", tmp_path / "all.csv").returncode == 0
    whole, rows = ([line.split(",")[:3] for line in (tmp_path / name).open()] for name in ("all.csv", "b.csv"))
    assert rows == [row for i, row in enumerate(whole) if i - 1 not in bad]


def test_a_submission_has_the_official_order_and_numbers(tmp_path):
    mini = Mini(tmp_path / "archives", 2012)
    source = ImageNet2012(tmp_path / "archives")
    build(Plan(source, Options()), tmp_path / "shards", workers=1)
    dataset = open_dataset(tmp_path / "shards")
    torch.manual_seed(1)
    net = AlexNet(ModelConfig("small", width=0.125, weight_init="torch"), classes=5, crop=32)
    augment = AugmentConfig(resize=36, crop=32)
    card = Card(net.config, augment, Inputs.of(dataset, augment), {"classes": 5})
    weights = tmp_path / "net.safetensors"
    save_file(net.state_dict(), weights, {"card": json.dumps(card.as_json())})
    flags = [weights, "--data.shards", dataset.root, "--data.split", "test"]
    done = run_tool(EVALUATE, *flags, "--submission", tmp_path / "sub.txt", "--csv", tmp_path / "all.csv")
    assert done.returncode == 0, done.stderr
    # Numbers from the kit and predictions from the CSV: neither from the code that wrote the submission.
    with tarfile.open(tmp_path / "archives" / "ILSVRC2012_devkit_t12.tar.gz") as kit:
        member = next(m for m in kit.getmembers() if m.name.endswith("meta.mat"))
        synsets = loadmat(io.BytesIO(kit.extractfile(member).read()), squeeze_me=True)["synsets"]
    number = {str(s["WNID"]): int(s["ILSVRC2012_ID"]) for s in synsets}
    assert {wnid: number[wnid] for wnid in ID_OF} == ID_OF
    assert sorted(ID_OF, key=number.__getitem__) != sorted(ID_OF)
    rows = {row["key"]: row for row in csv.DictReader((tmp_path / "all.csv").read_text().splitlines())}
    names = sorted(n for n in mini.labels if "_test_" in n)
    lines = (tmp_path / "sub.txt").read_text().splitlines()
    assert len(lines) == len(names) == 4
    for line, name in zip(lines, names, strict=True):
        row = rows[name.removesuffix(".JPEG")]
        assert row["label"] == ""
        assert line.split() == [str(number[row[f"answer{i}"]]) for i in range(1, 6)]
    for files in ([], ["--csv", tmp_path / "x.csv", "--json", tmp_path / "x.json"]):
        assert "test has no labels; --submission" in the_error(run_tool(EVALUATE, *flags, *files))
    assert "no test image" in the_error(run_tool(EVALUATE, weights, "--data.shards", dataset.root, "--submission", "x"))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(0, 9))
def test_a_summary_counts_each_image_once(ranks, seed):
    generator = np.random.default_rng(seed)
    n, ranks = len(ranks), np.array(ranks)
    labels = generator.integers(0, 13, n)
    best = np.array([generator.permutation(13)[:5] for _ in range(n)])
    best[:, 0] = np.where(ranks < 1, labels, (labels + 1) % 13)
    classes = [f"c{i}" for i in range(13)]
    found = summary(Predictions(labels, ranks, ranks / 3, best, best / 99, np.arange(n)), classes, resamples=20)
    assert found["correct"] == {"top1": int((ranks == 0).sum()), "top5": int((ranks < 5).sum())}
    assert sum(row["images"] for row in found["by_class"]) == n
    assert sum(row["top1"] for row in found["by_class"]) == found["correct"]["top1"]
    assert sum(row["count"] for row in found["confusions"]) <= n - found["correct"]["top1"]
    for name, (low, high) in found["interval_95"].items():
        assert low <= found[name] + 1e-9 or math.isclose(low, found[name]), name
        assert low <= high


def test_intervals_are_the_binomial_ones_where_those_are_known():
    """A fraction p of n images has the standard deviation sqrt(p (1 - p) / n); 95 % lie within 1.96 of these."""
    hits = np.arange(4000) < 3000
    low, high = bootstrap({"top1": hits}, resamples=2000)["top1"]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 4000)
    assert low == pytest.approx(0.75 - half, abs=half / 10)
    assert high == pytest.approx(0.75 + half, abs=half / 10)


def test_intervals_are_percentiles_of_resampled_means():
    generator = np.random.default_rng(5)
    values = {"top1": generator.random(500) < 0.6, "loss": generator.gamma(2, size=500)}
    means = [[v[drawn].mean() for v in values.values()] for drawn in generator.integers(0, 500, (3000, 500))]
    found = bootstrap(values, resamples=3000)
    expected = np.percentile(means, [2.5, 97.5], axis=0).T
    np.testing.assert_allclose(list(found.values()), expected, rtol=0.01)
    assert bootstrap(values, resamples=3000) == found
    assert bootstrap(values, resamples=0) == {}


def test_a_mean_of_probabilities_keeps_what_float32_would_make_equal():
    far = torch.tensor([[0.0, -150.0, -200.0]])
    order = mean_scores([far, far])[0].argsort(descending=True).tolist()
    assert order == [0, 1, 2]
    assert far.softmax(1)[0, 1] == far.softmax(1)[0, 2] == 0
    apart = mean_scores([torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]])]).exp()
    expected = (torch.tensor([1.0, 0.0]).softmax(0) + torch.tensor([-2.0, 0.0]).softmax(0)) / 2
    torch.testing.assert_close(apart[0], expected)


@pytest.mark.parametrize(
    ("models", "options", "code", "said"),
    [
        (["nowhere"], [], 65, "nowhere: no such file"),
        (["{digits}"], [], 65, "neither a run nor a checkpoint"),
        (["{trained}"], ["--data.split", "test"], 65, "no split 'test'"),
        (["{trained}"], ["--batch", "0"], 2, "--batch 0: at least 1"),
        (["{trained}"], ["--preset", "seed"], 2, "records its net; leave it out"),
        (["{pth}"], [], 2, "has no model card; name its net by --preset"),
        ([str(ROOT / "docs" / "seven.png")], [], 65, "seven.png: damaged, or more than weights; nothing of it was run"),
        (["{pth}"], ["--preset", "sead"], 2, "choose one of demo, seed"),
        (["{pth}"], ["--preset", "torchvision"], 65, "holds no output layer of --preset torchvision"),
        (["{pth}"], ["--preset", "fig1"], 65, "it is not of --preset fig1"),
        (["{pth}"], ["--preset", "demo"], 65, "predicts 7 classes, but"),
        (["{trained}", "nowhere"], [], 65, "nowhere: no such file"),
        (["{broken}"], [], 65, "broken.safetensors: not a whole safetensors file"),
        (["{trained}"], ["--view", "10"], 2, "unrecognized arguments: --view 10"),  # no abbreviations
        (["{trained}"], ["--json", "."], 2, "argument --json: . is a folder"),
        (["{trained}"], ["--csv", "nowhere/x.csv"], 2, "argument --csv: there is no folder nowhere"),
        (["{trained}"], ["--submission", "out.txt"], 65, "no official class numbers"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    trained, digits, tmp_path, models, options, code, said, monkeypatch, capsys
):
    pth, broken = tmp_path / "small.pth", tmp_path / "broken.safetensors"
    torch.save(AlexNet(ModelConfig("small", width=0.25), classes=7, crop=32).state_dict(), pth)
    broken.write_bytes(b"\x90\0\0")
    paths = [m.format(trained=trained, digits=digits, pth=pth, broken=broken) for m in models]
    found, error = run_here(evaluate.main, monkeypatch, capsys, *paths, "--data.shards", digits, *options)
    assert said in error
    assert found == code


def test_a_file_that_could_not_be_written_in_the_end_is_rejected_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    tmp_path.chmod(0o500)
    user = os.getuid()
    os.setreuid(user or 65534, -1)  # access(2) looks at the real user: root may write anywhere
    try:
        for name in ("x.csv", "file/x.csv"):
            found, error = run_here(
                evaluate.main, monkeypatch, capsys, "RUN", "--data.shards", "S", "--csv", str(tmp_path / name)
            )
            assert (found, "that you may write to" in error) == (2, True)
    finally:
        os.setreuid(user, -1)


def test_other_classes_of_the_same_number_are_rejected(trained, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "abcdefghij":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    source = ImageFolder(tmp_path / "train", tmp_path / "val", "letters")
    build(Plan(source, Options()), tmp_path / "shards", workers=1)
    done = run_tool(EVALUATE, trained, "--data.shards", tmp_path / "shards")
    assert "its class 0 is 0, but" in the_error(done)
    assert done.returncode == 65


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True)])
def test_top5_is_shown_if_it_says_anything(classes, shown, monkeypatch, capsys):
    names = [str(number) for number in range(classes)]
    found = {"images": 9, "top1": 0.5, "top5": 1.0, "loss": 1.0, "interval_95": {}, "correct": {}, "confusions": []}
    monkeypatch.setattr("train.evaluation.summary", lambda *_, **__: found)
    args = Namespace(views=1, shards="s", split="val", resamples=0, json=None)
    dataset = Namespace(classes=names, class_names=names, split=lambda name: Namespace(index=range(9)))
    evaluate.report(None, [], dataset, args, "fp32")
    assert ("top-5   100.00%" in capsys.readouterr().out) is shown
