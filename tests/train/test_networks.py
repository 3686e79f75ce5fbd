"""Which nets train, from which weights, frozen and compiled."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from model import AlexNet, ModelConfig
from pipeline import AugmentConfig, Loader
from pipeline.errors import ConfigError, DataError
from tests.conftest import the_error
from tests.train.test_run import alone, metrics
from train.config import OptimConfig
from train.networks import compile_net, create_net, load_weights, read_weights
from train.optim import make_optimizer, set_learning_rate

SMALL = ModelConfig("small", width=0.1)


def small(classes: int = 10) -> nn.Module:
    return create_net(SMALL, classes=classes, crop=32)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if torch.equal(a[name], b[name])]


@pytest.mark.parametrize("kind", ["pth", "wrapped", "ddp", "safetensors"])
def test_weights_come_from_every_usual_file(kind, tmp_path):
    given = small().state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(given, path)
    elif kind == "ddp":
        torch.save({f"module.{name}": w for name, w in given.items()}, path)
    else:
        torch.save({"state_dict": given} if kind == "wrapped" else given, path)
    net = small()
    assert load_weights(net, path) is None
    assert equal(net.state_dict(), given) == list(given)


def test_another_number_of_classes_gets_a_new_output_layer(tmp_path):
    torch.save(small(classes=7).state_dict(), tmp_path / "seven.pth")
    net = small(classes=10)
    before = {name: w.clone() for name, w in net.state_dict().items()}
    note = load_weights(net, tmp_path / "seven.pth")
    assert note == f"{tmp_path / 'seven.pth'} is of 7 classes: the output layer classifier.fc8 is new, with 10"
    after = net.state_dict()
    assert torch.equal(after["classifier.fc8.weight"], before["classifier.fc8.weight"])
    assert after["classifier.fc8.weight"].shape[0] == 10
    assert not torch.equal(after["features.conv1.weight"], before["features.conv1.weight"])


def test_other_classes_get_a_new_output_layer_even_if_they_are_as_many(tmp_path):
    path = tmp_path / "ten.pth"
    torch.save(small().state_dict(), path)
    net = small()
    head = net.state_dict()["classifier.fc8.weight"].clone()
    assert load_weights(net, path, other_classes=True).endswith(
        "is of 10 other classes: the output layer classifier.fc8 is new, with 10"
    )
    assert torch.equal(net.state_dict()["classifier.fc8.weight"], head)
    assert load_weights(net, path) is None
    assert not torch.equal(net.state_dict()["classifier.fc8.weight"], head)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_file_that_would_run_something_runs_nothing(how, tmp_path):
    path, touched = tmp_path / "weights.pth", tmp_path / "touched"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(touched)))
    else:
        torch.save({"weight": Payload(touched)}, path)
    with pytest.raises(DataError, match=r"weights.pth: .*; nothing of it was run"):
        load_weights(small(), path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "damaged, or more than weights"),
        (b"hello", "damaged, or more than weights"),
        ([1, 2], "holds no state_dict"),
        ({"lr": 0.1}, "holds no state_dict"),
        ("narrower", r"features.conv1.weight is \(\d+, 3, 5, 5\) but this net has"),
        ("missing", "has no features.conv2.weight"),
        ("more", "has extra, which this net has not"),
    ],
)
def test_what_does_not_fit_is_named(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    weights = small().state_dict()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "narrower":
        torch.save(AlexNet(ModelConfig("small", width=0.05), classes=10, crop=32).state_dict(), path)
    elif content == "missing":
        torch.save({n: w for n, w in weights.items() if n != "features.conv2.weight"}, path)
    elif content == "more":
        torch.save(weights | {"extra": torch.zeros(1)}, path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(DataError, match=message):
        load_weights(small(), path)


def test_frozen_features_keep_weights_and_statistics():
    config = ModelConfig("modern", width=0.1, norm="bn", init="weights.pth", freeze="features")
    net = create_net(config, classes=10, crop=64)
    with torch.no_grad():
        nn.init.normal_(list(net.in_order())[-1].weight)
    optimizer = make_optimizer(net, OptimConfig(lr=0.1, weight_decay=0.1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.randn(8, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    moved = set(before) - set(equal(net.state_dict(), before))
    assert moved == {name for name in before if name.startswith("classifier.")}


def test_of_other_nets_all_but_the_last_layer_is_frozen():
    net = create_net(ModelConfig("torchvision:resnet18", init="x", freeze="features"), classes=3, crop=64)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    assert not net.bn1.training


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("torchvision:vit_b_16", marks=pytest.mark.slow),
        "torchvision:swin_t",
        "timm:mobilenetv3_small_050",
    ],
)
def test_what_no_layer_holds_is_frozen_too_and_statistics_of_any_kind_stay(name):
    config = ModelConfig(name, init="x", freeze="features")
    net = create_net(config, classes=3, crop=224)
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    before = {n: b.clone() for n, b in net.named_buffers()}
    assert net(torch.randn(2, 3, 224, 224)).requires_grad
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


def test_both_output_layers_of_a_distilled_net_are_made_anew(tmp_path):
    name = "timm:deit_tiny_distilled_patch16_224"
    config = ModelConfig(name, init="x", freeze="features")
    torch.save(create_net(ModelConfig(name), classes=5, crop=224).state_dict(), tmp_path / "w.pth")
    net = create_net(config, classes=3, crop=224)
    assert "is new, with 3" in load_weights(net, tmp_path / "w.pth")
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def weights_with(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return small().state_dict() | {name.replace("__", "."): w for name, w in changed.items()}


HEAD = "classifier__fc8__"
ODD = {
    "columns": (weights_with(**{f"{HEAD}weight": torch.zeros(10, 3)}), "fc8.weight is"),
    "one dimension": (weights_with(**{f"{HEAD}weight": torch.zeros(10)}), "fc8.weight is"),
    "no dimension": (weights_with(**{f"{HEAD}weight": torch.tensor(1.0)}), "fc8.weight is"),
    "no class": (weights_with(**{f"{HEAD}weight": torch.zeros(0, 409)}), "fc8.weight is"),
    "bias of others": (weights_with(**{f"{HEAD}weight": torch.zeros(7, 409)}), "fc8.weight is"),
    "whole numbers": ({n: w.to(torch.int8) for n, w in weights_with().items()}, "is of torch.int8 but"),
    "complex": ({n: w.to(torch.complex64) for n, w in weights_with().items()}, "is no plain tensor of numbers"),
    "meta": ({n: w.to("meta") for n, w in weights_with().items()}, "is no plain tensor of numbers"),
    "sparse": ({n: w.to_sparse() for n, w in weights_with().items()}, "is no plain tensor of numbers"),
    "nan": (weights_with(**{f"{HEAD}bias": torch.full((10,), torch.nan)}), "fc8.bias holds NaN or infinity"),
    "twice": (weights_with(**{f"module__{HEAD}bias": torch.zeros(10)}), "holds weights twice"),
    "steering": (weights_with(**{"a\nb\x1b[1m": torch.zeros(1)}), r"has a\\nb, which this net has not"),
}


@pytest.mark.parametrize("kind", ODD)
def test_weights_that_are_none_of_this_net_are_rejected_in_one_line(kind, tmp_path):
    content, message = ODD[kind]
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=message) as caught:
        load_weights(small(), tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=60), st.booleans())
def test_bytes_of_any_kind_are_rejected_in_one_line(tmp_path_factory, content, as_pickle):
    path = tmp_path_factory.mktemp("any") / "w.pth"
    path.write_bytes(b"\x80\x02" * as_pickle + content)
    with pytest.raises(DataError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


EVIL = [b"\x80\x02.", b"\x80\x02RRR.", b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.", b"\x80\x02cposix\nsystem\n."]


@pytest.mark.parametrize("content", EVIL)
def test_pickles_that_break_their_reader_are_rejected_in_one_line(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(DataError, match="nothing of it was run"):
        read_weights(tmp_path / "w.pth")


def test_a_compressed_file_is_rejected_before_it_can_fill_the_memory(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as source, zipfile.ZipFile(tmp_path / "z.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="is compressed"):
        read_weights(tmp_path / "z.pth")


def test_biases_follow_the_variant_or_the_weights():
    net = AlexNet(ModelConfig("original", width=0.125), classes=10, crop=67)
    config = OptimConfig(lr=0.1, weight_decay=5e-4)
    weights, biases = make_optimizer(net, config).param_groups
    assert (weights["lr"], weights["weight_decay"], biases["lr"], biases["weight_decay"]) == (0.1, 5e-4, 0.2, 0)
    optimizer = make_optimizer(net, OptimConfig(lr=0.1, weight_decay=5e-4, biases="weights"))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 5e-4)] * 2
    optimizer = make_optimizer(net, config)
    set_learning_rate(optimizer, 0.01)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.02]


@pytest.mark.parametrize(
    ("name", "crop", "message"),
    [
        ("torchvision:resnet51", 64, r"no classifier 'resnet51' \(did you mean resnet50\?\)"),
        ("torchvision:raft_large", 64, "no classifier"),
        ("timm:nothing", 64, "timm has no classifier"),
        ("keras:vgg16", 64, "choose torchvision:NAME or timm:NAME"),
        ("torchvision:vit_b_16", 64, "augment.crop=64 does not suit model.name=torchvision:vit_b_16"),
    ],
)
def test_other_nets_that_cannot_be_are_rejected(name, crop, message):
    with pytest.raises(ConfigError, match=message):
        create_net(ModelConfig(name), classes=10, crop=crop)


@pytest.mark.parametrize("name", ["torchvision:googlenet", "torchvision:mobilenet_v3_small", "timm:resnet18"])
def test_other_libraries_nets_give_logits_in_training(name):
    net = create_net(ModelConfig(name), classes=7, crop=96)
    assert net.training
    assert net(torch.randn(2, 3, 96, 96)).shape == (2, 7)


FAST = ["--train.epochs", 1, "--augment.resize", 32, "--train.batch", 256, "--run.log-every", 1]


def test_another_net_trains_through_the_same_loop_and_its_weights_start_the_next(digits, tmp_path):
    net = ["--model.name", "torchvision:shufflenet_v2_x0_5", "--model.weight-init", "variant", "--model.width", 1]
    args = ["demo", "--data.shards", digits, *FAST, "--train.batch", 64, "--optim.warmup-epochs", 0, *net]
    done = alone(*args, "--run.dir", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(tmp_path / "first", "train")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    (folder,) = (tmp_path / "first" / "checkpoints").glob("step-*")
    tuned = ["--model.init", folder, "--model.freeze", "features", "--run.dir", tmp_path / "second"]
    done = alone(*args, *tuned)
    assert done.returncode == 0, done.stderr
    weights = [torch_load(run) for run in (tmp_path / "first", tmp_path / "second")]
    assert set(weights[0]) - set(equal(*weights)) == {"fc.weight", "fc.bias"}


def torch_load(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (folder,) = (run / "checkpoints").glob("step-*")
    return load_file(folder / "model.safetensors")


VARIANT_CROPS = {"seed": 64, "paper": 64, "original": 64, "caffe": 67, "torchvision": 64, "modern": 64, "small": 32}


@pytest.mark.parametrize(
    "name",
    [name if name == "paper" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANT_CROPS],
)
def test_every_variant_learns_64_images_by_heart(name, digits, tmp_path):
    net = ["--model.name", name, "--model.width", 0.125, "--model.weight-init", "he"]
    args = ["demo", "--data.shards", digits, "--overfit", 64, *net, "--augment.resize", 72]
    done = alone(*args, "--augment.crop", VARIANT_CROPS[name], "--run.dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "val top1=1.0000 top5=1.0000 images=64"
    assert not (tmp_path / "checkpoints").exists()


def test_a_net_that_cannot_learn_fails_the_check(digits, tmp_path):
    args = ["demo", "--model.width", 0.125, "--data.shards", digits, "--overfit", 16, "--optim.lr", 0]
    done = alone(*args, "--run.dir", tmp_path, "--limit-steps", 20)
    assert done.returncode == 1
    assert "of 16 images are right" in the_error(done)


@pytest.mark.parametrize("how", ["norm", "model"])
def test_without_a_compiler_nothing_is_compiled_and_the_reason_is_returned(how, monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    net = small()
    with config.patch({"cpp.cxx": (None, "/nonexistent/c++")}):
        done = compile_net(net, how, torch.device("cpu"))
    assert done.startswith("nothing: torch.compile does not work here (")
    net(torch.zeros(1, 3, 32, 32)).sum().backward()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["norm", "model"])
def test_without_a_compiler_a_line_says_so_and_training_continues(how, few_digits, tmp_path):
    broken = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    args = ["demo", "--data.shards", few_digits, *FAST, "--train.compile", how, "--run.dir", tmp_path / "run"]
    done = alone(*args, **broken)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("compiled: ")]
    assert len(said) == 1
    assert said[0].startswith("compiled: nothing: torch.compile does not work here (")


@pytest.mark.parametrize(
    ("version", "world", "done"),
    [
        ("2.14.1", 2, "the model"),
        ("2.11.0+cu130", 1, "the model"),
        (
            "2.11.0+cu130",
            2,
            "response normalisation: a whole model on several ranks needs torch 2.14 or newer, not 2.11",
        ),
    ],
)
def test_whole_models_on_several_ranks_are_compiled_from_torch_2_14_on(compiler, monkeypatch, version, world, done):
    monkeypatch.setattr(torch, "__version__", version)
    assert compile_net(small(), "model", torch.device("cpu"), world=world).startswith(done)


def test_auto_compiles_the_norms_on_a_cpu(compiler):
    net = small()
    assert compile_net(net, "auto", torch.device("cpu")) == "response normalisation"
    assert all(m.compiled for m in net.modules() if hasattr(m, "compiled"))
    assert compile_net(small(), "off", torch.device("cpu")) == "nothing"


def losses_in_parts(digits: Path, parts: int) -> list[float]:
    """50 steps of the demo net in float64 at lr 0.01, each batch in equal parts whose gradients are averaged."""
    torch.manual_seed(0)
    net = create_net(ModelConfig("small", width=0.25, weight_init="he"), classes=10, crop=32).double()
    optimizer = make_optimizer(net, OptimConfig(lr=0.01))
    losses: list[float] = []
    augment = AugmentConfig(resize=36, crop=32, flip=False, normalize="mean-std")
    with Loader(digits, batch=64, augment=augment) as loader:
        while len(losses) < 50:
            for images, labels, ids in loader:
                rows = (ids * 2654435761 + len(losses)).to(torch.int32)
                set_learning_rate(optimizer, 0.01 * min(1, (len(losses) + 1) / 66))
                loss = 0.0
                for x, y, r in zip(images.double().chunk(parts), labels.chunk(parts), rows.chunk(parts)):
                    part = nn.functional.cross_entropy(net(x, r), y) / parts
                    part.backward()
                    loss += part.item()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss)
                if len(losses) == 50:
                    break
    return losses


@pytest.mark.slow
def test_in_float64_a_batch_in_parts_is_the_batch_at_the_rate_where_float32_is_not(digits):
    one, two = (losses_in_parts(digits, parts) for parts in (1, 2))
    assert one[-1] < one[0] - 0.5
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-12
