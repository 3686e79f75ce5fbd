"""The nets: their sizes, their initialisation, and the seed's own code beside ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import AlexNet, ModelConfig
from model.alexnet import count_parameters


def meta(config: ModelConfig, *, classes: int, crop: int) -> AlexNet:
    with torch.device("meta"):
        return AlexNet(config, classes=classes, crop=crop)


class SeedsNet(nn.Module):
    """The seed's layers, as its document lists them."""

    def __init__(self) -> None:
        super().__init__()
        lrn = lambda: nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)  # noqa: E731
        sizes = [(3, 96, 11, 4, 2), (96, 256, 5, 1, 2), (256, 384, 3, 1, 1), (384, 384, 3, 1, 1), (384, 256, 3, 1, 1)]
        conv = [nn.Conv2d(*size) for size in sizes]
        relu, pool = (lambda: nn.ReLU(inplace=True)), (lambda: nn.MaxPool2d(kernel_size=3, stride=2))
        self.AlexNet_model = nn.Sequential(
            conv[0], relu(), lrn(), pool(),
            conv[1], relu(), lrn(), pool(),
            conv[2], relu(), conv[3], relu(), conv[4], relu(), pool(),
            nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 4096), relu(),
            nn.Dropout(0.5), nn.Linear(4096, 4096), relu(),
            nn.Linear(4096, 1000),
        )  # fmt: skip

    def forward(self, x):
        return self.AlexNet_model(x)


def test_the_seeds_net_has_its_parameters():
    assert count_parameters(meta(ModelConfig("seed"), classes=1000, crop=224)) == 62_378_344


def test_outputs_and_gradients_equal_those_of_the_seeds_own_net():
    torch.manual_seed(0)
    # In float64, where no maximum of a pool is decided by rounding.
    theirs, ours = (n.double().eval() for n in (SeedsNet(), AlexNet(ModelConfig("seed"), classes=1000, crop=224)))
    ours.load_state_dict({k.replace("AlexNet_model", "layers"): v for k, v in theirs.state_dict().items()})
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64) * 3
    results = []
    for net in (theirs, ours):
        logits = net(images)
        nn.functional.cross_entropy(logits, torch.tensor([999])).backward()
        results.append((logits, [p.grad for p in net.parameters()]))
    (a, grads_a), (b, grads_b) = results
    torch.testing.assert_close(a, b)
    for x, y in zip(grads_a, grads_b):
        assert (x - y).norm() <= 1e-9 * x.norm()


def test_the_papers_initialisation():
    torch.manual_seed(0)
    net = AlexNet(ModelConfig("seed"), classes=1000, crop=224)
    weighted = [m for m in net.layers if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [m.bias.unique().tolist() for m in weighted] == [[b] for b in (0, 1, 0, 1, 1, 1, 1, 0)]
    for m in weighted:
        assert m.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert abs(m.weight.mean().item()) < 3e-4


def test_he_initialisation_keeps_the_signal_at_any_width_and_starts_undecided():
    torch.manual_seed(0)
    for width in (0.25, 1.0):
        net = AlexNet(ModelConfig("small", width=width, weight_init="he"), classes=10, crop=32).eval()
        images = torch.randn(64, 3, 32, 32)
        assert 0.2 < net.layers[:-1](images).std() < 5
        assert not net(images).any()


@pytest.mark.parametrize("lrn", [True, False])
@pytest.mark.parametrize("crop", [24, 32, 48])
def test_the_small_net_takes_any_crop_that_survives_its_pools(crop, lrn):
    net = AlexNet(ModelConfig("small", width=0.1, lrn=lrn), classes=7, crop=crop)
    assert net(torch.randn(3, 3, crop, crop)).shape == (3, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig("resnet"), "model.name=resnet: choose one of seed, small"),
        (lambda: ModelConfig(width=0), "model.width=0"),
        (lambda: ModelConfig(dropout=1.0), "model.dropout=1.0"),
        (lambda: ModelConfig(weight_init="zero"), "model.weight_init=zero"),
        (lambda: meta(ModelConfig("seed"), classes=1000, crop=32), "augment.crop=32 is too small for model.name=seed"),
        (lambda: meta(ModelConfig("small"), classes=0, crop=32), "classes=0"),
    ],
)
def test_impossible_nets_are_refused_by_field_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
