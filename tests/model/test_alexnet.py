"""The nets: sizes, options, and comparison with the code of their sources."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import alexnet as torchvisions

from model import AlexNet, ModelConfig
from model.alexnet import main
from model.lrn import LocalResponseNorm, local_response_norm, spatial_response_norm
from model.summary import count_parameters
from model.variants import VARIANTS
from tests.tools.test_export import Seed
from train.config import OptimConfig
from train.optim import param_groups


def meta(config: ModelConfig, *, classes: int = 1000, crop: int = 0) -> AlexNet:
    with torch.device("meta"):
        return AlexNet(config, classes=classes, crop=crop or VARIANTS[config.name].crop)


COUNTS = {
    "seed": 62_378_344,
    "paper": 60_965_224,
    "original": 60_965_224,
    "caffe": 60_965_224,
    "torchvision": 61_100_840,
    "modern": 62_378_344,
}


@pytest.mark.parametrize("name", COUNTS)
def test_each_variant_has_its_sources_parameters(name):
    assert count_parameters(meta(ModelConfig(name))) == COUNTS[name]


@pytest.mark.parametrize(("name", "theirs"), [("seed", Seed), ("torchvision", torchvisions)])
def test_weights_go_both_ways_strictly_and_outputs_and_gradients_are_equal(name, theirs):
    torch.manual_seed(0)
    with torch.device("meta"):
        theirs, ours = theirs(), AlexNet(ModelConfig(name), classes=1000, crop=224)
    # In float64: rounding decides no maximum of a pool.
    theirs, ours = (net.double().to_empty(device="cpu").eval() for net in (theirs, ours))
    for parameter in ours.parameters():
        nn.init.uniform_(parameter, -0.02, 0.02)
    for giver, taker in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            next(giver.parameters()).add_(0.01)  # so that each direction carries something
        taker.load_state_dict(giver.state_dict(), strict=True)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64) * 3
    results = []
    for net in (theirs, ours):
        logits = net(images)
        F.cross_entropy(logits, torch.tensor([999])).backward()
        results.append((logits, [p.grad for p in net.parameters()]))
    (a, grads_a), (b, grads_b) = results
    torch.testing.assert_close(a, b)
    for x, y in zip(grads_a, grads_b, strict=True):
        assert (x - y).norm() <= 1e-9 * x.norm()


class Towers(nn.Module):
    """The two GPUs of 2012: two nets that read each other's channels at conv3 and in the fully connected layers.

    With a quarter of their channels: the comparison needs no more.
    """

    def __init__(self, original: bool) -> None:
        super().__init__()
        self.original = original
        conv = lambda i, o, k, **kw: nn.ModuleList(nn.Conv2d(i, o // 2, k, **kw) for _ in "ab")  # noqa: E731
        self.conv1, self.conv2 = conv(3, 24, 11, stride=4), conv(12, 64, 5, padding=2)
        self.conv3, self.conv4 = conv(64, 96, 3, padding=1), conv(48, 96, 3, padding=1)
        self.conv5 = conv(48, 64, 3, padding=1)
        self.fc6 = nn.ModuleList(nn.Linear(2304, 512) for _ in "ab")
        self.fc7 = nn.ModuleList(nn.Linear(1024, 512) for _ in "ab")
        self.fc8 = nn.Linear(1024, 1000)

    def forward(self, x):
        pool = lambda x: F.max_pool2d(x, 3, 2)  # noqa: E731
        own = lambda x: F.local_response_norm(x, 5, 1e-4, 0.75, 2.0)  # noqa: E731
        x = F.pad(x, (0, 3, 0, 3))
        a, b = (conv(x) for conv in self.conv1)
        if self.original:
            a, b = (pool(own(t)).relu() for t in (a, b))
            a, b = (own(conv(t).relu()) for conv, t in zip(self.conv2, (a, b)))
            a, b = (pool(spatially(t)) for t in (a, b))
        else:  # over all maps, alpha on the sum
            a, b = F.local_response_norm(torch.cat([a, b], 1).relu(), 5, 5e-4, 0.75, 2.0).chunk(2, 1)
            a, b = (conv(pool(t)).relu() for conv, t in zip(self.conv2, (a, b)))
            a, b = F.local_response_norm(torch.cat([a, b], 1), 5, 5e-4, 0.75, 2.0).chunk(2, 1)
            a, b = pool(a), pool(b)
        both = torch.cat([a, b], 1)
        a, b = (conv(both).relu() for conv in self.conv3)
        a, b = (conv(t).relu() for conv, t in zip(self.conv4, (a, b)))
        a, b = (pool(conv(t).relu()).flatten(1) for conv, t in zip(self.conv5, (a, b)))
        for layer in (self.fc6, self.fc7):
            both = torch.cat([a, b], 1)
            a, b = (fc(both).relu() for fc in layer)
        return self.fc8(torch.cat([a, b], 1))


def spatially(x):
    """The original's second norm, by torch's own pooling: the mean over 5 × 5 pixels, zeros beyond the edges."""
    return x / (1 + 1e-3 * F.avg_pool2d(x * x, 5, 1, 2)).pow(0.75)


@pytest.mark.parametrize("name", ["paper", "original"])
def test_towers_as_groups_equal_two_separate_towers(name):
    torch.manual_seed(0)
    ours = AlexNet(ModelConfig(name, width=0.25, weight_init="torch"), classes=1000, crop=224).double().eval()
    theirs = Towers(name == "original").double()
    weights = {}
    for key, value in ours.state_dict().items():
        layer, kind = key.split(".")[1:]
        if layer == "fc8":
            weights[f"fc8.{kind}"] = value
        else:
            halves = value.chunk(2)
            weights |= {f"{layer}.0.{kind}": halves[0], f"{layer}.1.{kind}": halves[1]}
    theirs.load_state_dict(weights)
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    grads = []
    outputs = []
    for net in (ours, theirs):
        logits = net(images)
        logits.square().sum().backward()
        outputs.append(logits)
        grads.append({n: p.grad for n, p in net.named_parameters()})
    torch.testing.assert_close(*outputs)
    for key, grad in grads[0].items():
        layer, kind = key.split(".")[1:]
        other = (
            grads[1][f"fc8.{kind}"]
            if layer == "fc8"
            else torch.cat([grads[1][f"{layer}.0.{kind}"], grads[1][f"{layer}.1.{kind}"]])
        )
        assert (grad - other).norm() <= 1e-9 * grad.norm(), key


def test_conv1_of_the_paper_is_that_of_224_pixels_with_55_places():
    """Each of the 55 windows starts 4 pixels after the one before; the last one extends 3 pixels beyond the image."""
    net = AlexNet(ModelConfig("paper", weight_init="torch"), classes=1000, crop=224)
    image = torch.randn(1, 3, 224, 224)
    out = net.features.conv1(net.features.pad1(image))
    assert out.shape == (1, 96, 55, 55)
    windows = F.conv2d(image, net.features.conv1.weight, net.features.conv1.bias, stride=4)
    torch.testing.assert_close(out[:, :, :54, :54], windows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "stds", "biases"),
    [
        ("paper", [0.01] * 8, [0, 1, 0, 1, 1, 1, 1, 0]),
        ("original", [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
        ("caffe", [0.01] * 5 + [0.005, 0.005, 0.01], [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]),
    ],
)
def test_each_variants_own_initialisation(name, stds, biases):
    torch.manual_seed(0)
    net = AlexNet(ModelConfig(name, width=0.5), classes=1000, crop=VARIANTS[name].crop)
    weighted = [m for m in net.in_order() if isinstance(m, nn.Conv2d | nn.Linear)]
    for m, std, bias in zip(weighted, stds, biases, strict=True):
        assert (m.bias == bias).all()
        assert m.weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(m.weight.mean().item()) < 0.03 * std


def test_biases_learn_twice_as_fast_and_do_not_decay_where_the_source_does_so():
    for name, scales in (("original", (2, 0)), ("caffe", (2, 0)), ("paper", (1, 1)), ("seed", (1, 1))):
        variant = VARIANTS[name]
        assert (variant.bias_lr, variant.bias_decay) == scales
    net = meta(ModelConfig("original"))
    weights, biases = param_groups(net, OptimConfig(weight_decay=0.1))
    assert (len(weights["params"]), len(biases["params"])) == (8, 8)
    assert all(p.dim() == 1 for p in biases["params"])
    assert [(g["lr_scale"], g["weight_decay"]) for g in (weights, biases)] == [(1, 0.1), (2, 0)]


def test_he_initialisation_keeps_the_signal_at_any_width_and_starts_undecided():
    torch.manual_seed(0)
    for width in (0.25, 1.0):
        net = AlexNet(ModelConfig("small", width=width, weight_init="he"), classes=10, crop=32).eval()
        x = images = torch.randn(64, 3, 32, 32)
        for layer in list(net.in_order())[:-1]:
            x = layer(x)
        assert 0.2 < x.std() < 5
        assert not net(images).any()


@pytest.mark.parametrize("norm", ["lrn", "none"])
@pytest.mark.parametrize("crop", [24, 32, 48])
def test_the_small_net_takes_any_crop_that_survives_its_pools(crop, norm):
    net = AlexNet(ModelConfig("small", width=0.1, norm=norm), classes=7, crop=crop)
    assert net(torch.randn(3, 3, crop, crop)).shape == (3, 7)


@pytest.mark.parametrize("norm", ["lrn", "bn"])
@pytest.mark.parametrize("crop", [64, 130, 224, 320])
def test_modern_takes_any_size(crop, norm):
    net = AlexNet(ModelConfig("modern", width=0.1, norm=norm), classes=7, crop=crop)
    assert net(torch.randn(2, 3, crop, crop)).shape == (2, 7)


def shapes(net):
    return {name: tuple(p.shape) for name, p in net.named_parameters()}


def test_the_papers_experiments_are_switches():
    paper = ModelConfig("paper")
    kinds = lambda config: [type(m).__name__ for m in meta(config).in_order()]  # noqa: E731
    assert kinds(paper).count("ReLU") == 7
    assert kinds(replace(paper, activation="tanh")).count("Tanh") == 7
    assert kinds(replace(paper, activation="sigmoid")).count("Sigmoid") == 7
    assert kinds(paper).count("LocalResponseNorm") == 2
    assert kinds(replace(paper, norm="none")).count("LocalResponseNorm") == 0
    assert kinds(ModelConfig("original", norm="none")).count("SpatialResponseNorm") == 0
    pools = [
        m.kernel_size for m in meta(replace(paper, overlapping_pool=False)).in_order() if isinstance(m, nn.MaxPool2d)
    ]
    assert pools == [2, 2, 2]
    assert shapes(meta(replace(paper, overlapping_pool=False))) == shapes(meta(paper))
    assert shapes(meta(replace(paper, towers=1)))["features.conv2.weight"] == (256, 96, 5, 5)
    assert shapes(meta(ModelConfig("seed", towers=2)))["AlexNet_model.4.weight"] == (256, 48, 5, 5)
    assert shapes(meta(paper, classes=7))["classifier.fc8.weight"] == (7, 4096)
    assert shapes(meta(replace(paper, width=0.5)))["classifier.fc7.weight"] == (2048, 2048)
    assert [m.p for m in meta(replace(paper, dropout=0.3)).in_order() if hasattr(m, "p")] == [0.3, 0.3]


@pytest.mark.parametrize("dropped", ["conv1", "conv2", "conv3", "conv4", "conv5"])
@pytest.mark.parametrize("name", ["paper", "original", "caffe", "torchvision", "seed", "modern"])
def test_any_convolution_can_be_left_out(name, dropped):
    config = ModelConfig(name, width=0.125, drop=(dropped,), weight_init="variant")
    net = AlexNet(config, classes=5, crop=VARIANTS[name].crop)
    convolutions = [m for m in net.in_order() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 4
    assert len([m for m in net.in_order() if isinstance(m, nn.ReLU)]) == 6
    assert net(torch.randn(1, 3, VARIANTS[name].crop, VARIANTS[name].crop)).shape == (1, 5)


@pytest.mark.parametrize("name", ["modern", "torchvision"])
def test_a_side_that_already_fits_is_not_pooled_again(name):
    """Adaptive pooling has no deterministic backward pass on a GPU."""

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    net = AlexNet(ModelConfig(name, width=0.125), classes=5, crop=VARIANTS[name].crop).eval()
    for side, pooled in ((VARIANTS[name].crop, False), (VARIANTS[name].crop + 64, True)):
        x, seen = torch.randn(2, 3, side, side), []
        with torch.no_grad(), Ops():
            ours = net(x)
        assert any("adaptive_avg_pool" in op for op in seen) == pooled
        plain = copy.deepcopy(net)
        (pool,) = (m for m in plain.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
        pool.forward = lambda x: F.adaptive_avg_pool2d(x, 6)
        torch.testing.assert_close(ours, plain(x), rtol=0, atol=0)


def test_alpha_weighs_the_sum_in_the_paper_and_the_mean_in_its_code():
    def alphas(name):
        return {m.options["alpha"] for m in meta(ModelConfig(name)).modules() if isinstance(m, LocalResponseNorm)}

    assert (alphas("paper"), alphas("original")) == ({5e-4}, {1e-4})


def test_towers_of_the_norms_do_not_see_each_other():
    x = torch.randn(2, 8, 3, 3)
    both = local_response_norm(x, size=5, alpha=0.5, beta=0.75, k=2, towers=2)
    apart = [F.local_response_norm(t, 5, 0.5, 0.75, 2.0) for t in x.chunk(2, 1)]
    torch.testing.assert_close(both, torch.cat(apart, 1))
    torch.testing.assert_close(spatial_response_norm(x, size=5, alpha=1e-3, beta=0.75, k=1), spatially(x))


def test_a_printed_net_shows_the_settings_of_its_norms_and_dropout():
    text = str(meta(ModelConfig("paper")))
    assert "LocalResponseNorm(size=5, alpha=" in text
    assert "Dropout(p=0.5, layer=6)" in text


def test_the_layer_table_is_printed(capsys):
    assert not main(["paper"])
    shown = capsys.readouterr().out
    assert "60,965,224 parameters, 659,272 neurons, 724,406,816 multiply-adds" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert re.search(r" 96 × 55 × 55 +34,944 +105,415,200 +11$", lines["features.conv1"])
    assert lines["features.conv5"].endswith(" 163")


@pytest.mark.slow
def test_the_module_is_run_without_a_warning():
    argv = [sys.executable, "-W", "error", "-m", "model.alexnet", "paper"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "60,965,224 parameters" in done.stdout
    assert done.stderr == ""


def test_an_impossible_table_is_one_line(capsys):
    assert main(["seed", "--crop", "32"]) == 2
    assert capsys.readouterr().err.startswith("error: augment.crop=32 is too small")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig("resnet"), "model.name=resnet: choose one of seed, paper"),
        (lambda: ModelConfig(width=0), "model.width=0"),
        (lambda: ModelConfig(dropout=1.0), "model.dropout=1.0"),
        (lambda: ModelConfig(weight_init="zero"), "model.weight_init=zero"),
        (lambda: ModelConfig(norm="layer"), "model.norm=layer"),
        (lambda: ModelConfig(activation="gelu"), "model.activation=gelu"),
        (lambda: ModelConfig(drop=("conv6",)), "model.drop=conv6"),
        (lambda: ModelConfig(drop=("fc6",)), "model.drop=fc6"),
        (lambda: ModelConfig(towers=-1), "model.towers=-1"),
        (lambda: ModelConfig(freeze="features"), "model.freeze=features"),
        (lambda: ModelConfig("torchvision:resnet50", width=0.5), "model.width=0.5: model.name=torchvision:resnet50"),
        (lambda: meta(ModelConfig("seed"), crop=32), "augment.crop=32 is too small for model.name=seed"),
        (lambda: meta(ModelConfig("paper"), crop=8), "augment.crop=8 is too small for model.name=paper"),
        (lambda: meta(ModelConfig("small"), classes=0, crop=32), "classes=0"),
        (lambda: meta(ModelConfig("paper", towers=5)), "model.towers=5: the 96 channels of conv2 do not divide"),
        (
            lambda: meta(ModelConfig("original", width=0.01)),
            "model.towers=2: the 1 channels of a norm at model.width=0.01 do not divide",
        ),
        (lambda: meta(ModelConfig("seed", norm="bn")), "model.norm=bn: model.name=seed has no place for it"),
        (lambda: meta(ModelConfig("torchvision", norm="lrn")), "model.norm=lrn: model.name=torchvision"),
    ],
)
def test_impossible_nets_are_rejected_by_field_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
