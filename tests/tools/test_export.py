"""tools/export.py: exported files give the predictions of their source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from model import AlexNet, ModelConfig
from pipeline.read.augment import AugmentConfig
from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import Digits
from pipeline.write.sources.base import Items
from tests.conftest import run_here, run_tool, the_error
from tools import export, predict
from train.checkpoint import AVERAGE, MODEL, Checkpoints, verified
from train.classifier import open_classifier, recorded
from train.cli import parse
from train.model_card import Card
from train.networks import read_weights

EXPORT = "tools/export.py"


class Seed(nn.Module):
    """The seed's AlexNet, written from its table of layers."""

    def __init__(self) -> None:
        super().__init__()
        norm = lambda: nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)  # noqa: E731
        convolutions = [
            *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        ]
        connected = [nn.Flatten(), nn.Dropout(0.5), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(0.5)]
        self.AlexNet_model = nn.Sequential(
            *convolutions, *connected, nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.AlexNet_model(x)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The run as safetensors and as ONNX with one name, and so with one card."""
    root = tmp_path_factory.mktemp("exported")
    for kind in ("safetensors", "onnx"):
        done = run_tool(EXPORT, trained, root / f"net.{kind}")
        assert done.returncode == 0, done.stderr
        assert "predicts as" in done.stdout
    return root


def test_safetensors_hold_the_weights_bit_for_bit_and_their_card(trained, exported):
    saved = Checkpoints(trained, keep=1)
    best = saved.folder / (saved.folder / "best").read_text().strip()
    verified(best)
    with safe_open(exported / "net.safetensors", "pt") as file, safe_open(best / AVERAGE, "pt") as source:
        assert set(file.keys()) == set(source.keys())
        for name in file.keys():  # noqa: SIM118
            ours, theirs = file.get_tensor(name), source.get_tensor(name)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), name
        card = json.loads(file.metadata()["card"])
    assert card == json.loads((exported / "net.json").read_text())
    assert card["inputs"]["fingerprint"] == json.loads((trained / "config.json").read_text())["fingerprint"]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["kind"] == "val of average" and line["step"] == card["weights"]["step"]][-1]
    assert card["accuracy"][0]["top1"] == own["top1"]
    assert card["accuracy"][0]["command"].startswith("train/run.py demo")
    assert (exported / "net.safetensors").stat().st_mode == (exported / "net.json").stat().st_mode
    shown = (exported / "net.md").read_text()
    assert f"{own['top1']:.2%}" in shown
    assert card["inputs"]["fingerprint"][:16] in shown


def test_onnx_answers_as_torch_for_any_number_of_images(trained, exported):
    model = open_classifier(trained)
    session = onnxruntime.InferenceSession(exported / "net.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    for n in (1, 3, 64):
        images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) * 2
        with torch.no_grad():
            ours = model.net(images)
        theirs = session.run(["logits"], {"images": images.numpy()})[0]
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4)


def test_the_same_five_from_run_checkpoint_safetensors_and_onnx(trained, exported, image_folder, tmp_path):
    sources = [trained, trained / "checkpoints" / (trained / "checkpoints" / "best").read_text().strip()]
    answers = []
    for i, source in enumerate([*sources, exported / "net.safetensors", exported / "net.onnx"]):
        done = run_tool("tools/predict.py", source, image_folder / "val", "--json", tmp_path / f"{i}.json")
        assert done.returncode == 0, done.stderr
        answers.append(json.loads((tmp_path / f"{i}.json").read_text())["answers"])
    assert len(answers[0]) == 4
    for found in answers[1:]:
        for ours, theirs in zip(answers[0], found, strict=True):
            assert [b["class"] for b in ours["best"]] == [b["class"] for b in theirs["best"]]
            for a, b in zip(ours["best"], theirs["best"], strict=True):
                assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("seed", ("pth",)),
        pytest.param("torchvision", ("pth", "safetensors", "onnx"), marks=pytest.mark.slow),
    ],
)
def test_pth_loads_where_its_layers_come_from(name, kinds, image_folder, tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(num_classes=1000) if name == "torchvision" else Seed()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    flags = [tmp_path / "theirs.pth", "--preset", name, "--images", image_folder]
    for kind in kinds:
        done = run_tool(EXPORT, *flags, tmp_path / f"ours.{kind}")
        assert done.returncode == 0, done.stderr
    with torch.device("meta"):  # without the time for random weights
        again = torchvision.models.alexnet(num_classes=1000) if name == "torchvision" else Seed()
    again.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), assign=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert torch.equal(again.eval()(images), expected)
        ours = open_classifier(tmp_path / "ours.pth").net(images)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    five = []
    for kind in kinds if len(kinds) > 1 else ():
        done = run_tool(
            "tools/predict.py", tmp_path / f"ours.{kind}", image_folder / "val", "--json", tmp_path / "p.json"
        )
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "p.json").read_text())["answers"]
        five.append([[b["class"] for b in answer["best"]] for answer in found])
    assert all(answers == five[0] for answers in five)


@pytest.mark.parametrize(
    ("name", "switch", "said"),
    [
        ("small", {}, "which have other layers"),
        ("torchvision", {"width": 0.25}, "model.width=0.25: .pth is for torchvision's own class, which has 1.0"),
        pytest.param(
            "seed",
            {"activation": "tanh"},
            "model.activation=tanh: .pth is for seed's own class, which has relu",
            marks=pytest.mark.slow,
        ),
        ("seed", {}, "10 classes and augment.crop=224: the seed's class is for 1000 and 224"),
    ],
)
def test_pth_of_other_nets_is_rejected_with_the_reason(name, switch, said, image_folder, tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    crop = 32 if name == "small" else 224
    config = ModelConfig(name, **switch)
    card = Card(config, AugmentConfig(crop=crop, statistics="imagenet"), None, {"classes": 10})
    with torch.device("meta"):
        net = AlexNet(config, classes=10, crop=crop)
    weights = {weight: torch.zeros(value.shape) for weight, value in net.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors", {"card": json.dumps(card.as_json())})
    flags = [tmp_path / "a.safetensors", tmp_path / "b.pth", "--images", image_folder]
    code, error = run_here(export.main, monkeypatch, capsys, *flags)
    assert said in error
    assert code == 2
    assert not list(tmp_path.glob("b*"))


def test_what_stands_is_not_written_over_unasked(trained, exported, tmp_path):
    done = run_tool(EXPORT, trained, exported / "net.onnx")
    assert "exists already" in the_error(done)
    assert done.returncode == 2
    (tmp_path / "net.json").write_text('{"something": "else"}')
    done = run_tool(EXPORT, trained, tmp_path / "net.safetensors")
    assert "net.json: exists already, of something else" in the_error(done)
    done = run_tool(EXPORT, trained, "--raw", exported / "net.pth")
    assert done.returncode == 2
    done = run_tool(EXPORT, trained, tmp_path / "net.safetensors", "--force")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "net.json").read_text())["format"] == "imagenet-express model card"


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("net.bin", [], "choose a name that ends with .safetensors, .onnx, .pth"),
        ("none/net.onnx", [], "there is no folder"),
        ("net.onnx", ["--evaluation", "{root}/card.json"], "name what evaluate.py --json has written"),
        ("net.onnx", ["--images", "{root}/none"], "none: No such file"),
    ],
)
def test_what_cannot_be_exported_is_one_line(trained, tmp_path, out, options, said, monkeypatch, capsys):
    (tmp_path / "card.json").write_text("{}")
    flags = [trained, tmp_path / out, *(o.format(root=tmp_path) for o in options)]
    _, error = run_here(export.main, monkeypatch, capsys, *flags)
    assert said in error
    assert not list(tmp_path.glob("net*"))


def test_what_is_damaged_is_named_and_not_read(exported, image_folder, tmp_path, monkeypatch, capsys):
    images = image_folder / "val"
    for kind, said in (("onnx", "cannot be read as ONNX"), ("safetensors", "cannot be read as weights")):
        whole = (exported / f"net.{kind}").read_bytes()
        for length in (50_000, 3, 0):
            (tmp_path / f"cut.{kind}").write_bytes(whole[:length])
            code, error = run_here(predict.main, monkeypatch, capsys, tmp_path / f"cut.{kind}", images)
            assert code == 65
            assert f"cut.{kind}: " in error
            assert said in error or length < 50_000
    for size, header in (((1 << 64) - 1, b"{}"), (1 << 62, b"{}"), (200_000, b"[" * 200_000), (2, b"[]"), (2, b"\xff")):
        (tmp_path / "header.safetensors").write_bytes(size.to_bytes(8, "little") + header)
        code, error = run_here(predict.main, monkeypatch, capsys, tmp_path / "header.safetensors", images)
        assert code == 65
        assert "header.safetensors: not a whole safetensors file: its header cannot be read (" in error
    other = json.loads((exported / "net.json").read_text())
    other["model"]["width"] = 0.5
    torch.save({"features.conv1.weight": torch.zeros(1)}, tmp_path / "a.pth")
    (tmp_path / "a.json").write_text(json.dumps(other))
    code, error = run_here(predict.main, monkeypatch, capsys, tmp_path / "a.pth", images)
    assert code == 65
    assert "its card is of other weights" in error


@pytest.mark.parametrize(
    ("name", "kind"), [("small", "An AlexNet"), ("torchvision:resnet50", "A net of another library")]
)
def test_a_card_names_the_kind_of_net(name, kind, tmp_path):
    card = Card(ModelConfig(name), AugmentConfig(), None, {"classes": 10})
    assert f"\n{kind}, `{name}`, of imagenet-express.\n" in as_markdown(card, tmp_path)


def as_markdown(card: Card, folder: Path) -> str:
    return export.write_cards(card, folder / "net.safetensors")[1].read_text()


@pytest.mark.parametrize("measured", [True, False])
def test_a_card_of_five_classes_leaves_out_top5(measured, tmp_path):
    row = {"split": "val", "images": 1000, "views": 1, "top1": 0.5, "top5": 0.75, "command": "evaluate"}

    def table(classes: int) -> list[str]:
        card = Card(ModelConfig("small"), AugmentConfig(), None, {"classes": classes}, accuracy=[row] * measured)
        return [line for line in as_markdown(card, tmp_path).splitlines() if line.startswith("|")]

    assert table(6) == [
        "| accuracy on | images | views | top-1 | top-5 | measured by |",
        "| --- | --- | --- | --- | --- | --- |",
        "| val | 1,000 | 1 | 50.00% | 75.00% | `evaluate` |" if measured else "| not measured | | | | | |",
    ]
    assert table(5) == [
        "| accuracy on | images | views | top-1 | measured by |",
        "| --- | --- | --- | --- | --- |",
        "| val | 1,000 | 1 | 50.00% | `evaluate` |" if measured else "| not measured | | | | |",
    ]


def test_a_card_tells_of_evaluations(trained, few_digits, tmp_path):
    flags = ["--data.shards", few_digits, "--views", 10, "--json", tmp_path / "e.json"]
    done = run_tool("tools/evaluate.py", trained, *flags)
    assert done.returncode == 0, done.stderr
    done = run_tool(EXPORT, trained, tmp_path / "net.safetensors", "--evaluation", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "net.json").read_text())["accuracy"]
    assert [row["views"] for row in rows] == [1, 10]
    assert rows[1]["command"].startswith("tools/evaluate.py ")


def test_fine_tuning_takes_net_and_view_from_what_records_them(trained, exported, tmp_path):
    torch.save(Seed().state_dict(), tmp_path / "foreign.pth")
    (tmp_path / "wider.json").write_text('{"model": {"width": 0.5}}')

    def tuned(*flags: object):
        return parse(["finetune", "--data.shards", "x", "--model.init", *map(str, flags)])

    for weights in (trained, exported / "net.safetensors"):
        config = tuned(weights)
        assert (config.model.name, config.model.width, config.model.init) == ("small", 0.125, str(weights))
        augment = config.augment
        assert (augment.resize, augment.crop, augment.statistics, augment.flip) == (36, 32, "dataset", True)
        assert (tuned(weights, "--augment.crop", 28).augment.crop, config.optim.schedule) == (28, "cosine")
        assert tuned(weights, "--config", tmp_path / "wider.json").model.width == 0.5
        assert recorded(weights)[1].classes == tuple(map(str, range(10)))
    best = Checkpoints(trained, keep=1).folder / (trained / "checkpoints" / "best").read_text().strip()
    own = load_file(best / MODEL)
    assert all(torch.equal(own[name], weight) for name, weight in read_weights(trained).items())
    foreign = tuned(tmp_path / "foreign.pth")
    assert (foreign.model.name, foreign.augment.crop, foreign.augment.statistics) == ("torchvision", 224, "imagenet")


def test_fine_tuning_on_other_classes_starts_with_a_new_output_layer(trained, tmp_path):
    source = Digits(side=36)
    source.classes = [f"number {name}" for name in source.classes]
    source.splits = {name: Items(list(items)[:64]) for name, items in source.splits.items()}
    build(Plan(source, Options()), tmp_path / "shards", workers=1)
    args = ["finetune", "--data.shards", tmp_path / "shards", "--model.init", trained, "--run.dir", tmp_path / "run"]
    done = run_tool("train/run.py", *args, "--train.epochs", 2, "--train.compile", "off")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"{trained} is of 10 other classes: the output layer classifier.fc8 is new, with 10" in lines
    size = "short side 36 (median), resized to 36, crop 32"
    assert f"data: 64 training and 64 validation images of 10 classes, {size}" in lines
    assert re.search(r"^net: small, \d\d\d,\d\d\d weights$", done.stdout, re.MULTILINE)
    assert "warning" not in done.stdout
