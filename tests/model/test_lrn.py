"""Local response normalisation against torch's own and against finite differences."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from model import lrn
from model.lrn import LocalResponseNorm, local_response_norm, spatial_response_norm


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_gradients_by_formula_are_those_by_differences(size, beta):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    f = lambda x: local_response_norm(x, size=size, alpha=0.7, beta=beta, k=1.5)  # noqa: E731
    assert torch.autograd.gradcheck(f, x)


@pytest.mark.parametrize("channels", [1, 2, 7, 96])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_and_backward_equal_torchs(channels, memory_format):
    torch.manual_seed(0)
    x = (torch.randn(3, channels, 6, 5) * 40).to(memory_format=memory_format)
    grad = torch.randn_like(x)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ours = local_response_norm(a, size=5, alpha=1e-2, beta=0.75, k=2.0)
    theirs = F.local_response_norm(b, 5, 1e-2, 0.75, 2.0)
    ours.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(ours, theirs)
    assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    x = (torch.randn(2, 16, 4, 4) * 100).to(dtype)
    ours = local_response_norm(x, size=5, alpha=1.0, beta=0.75, k=2.0)
    assert ours.dtype is dtype
    exact = F.local_response_norm(x.double(), 5, 1.0, 0.75, 2.0)
    assert (ours.double() - exact).norm() <= 1e-2 * exact.norm()


def by_the_formula(x, grad, *, size, alpha, beta, k):
    """(y, dx) in float64 NumPy, one channel after another: Krizhevsky et al. 2012, section 3.3, and its derivative."""
    channels, half = x.shape[1], size // 2
    windows = [slice(max(0, i - half), min(channels, i + half + 1)) for i in range(channels)]
    scale = np.stack([k + alpha / size * (x[:, w] ** 2).sum(1) for w in windows], axis=1)
    direct = grad * scale**-beta
    inner = grad * x * scale ** (-beta - 1)
    through = np.stack([inner[:, w].sum(1) for w in windows], axis=1)
    return x * scale**-beta, direct - 2 * alpha / size * beta * x * through


def norms(*channels: int, sizes: tuple[int, ...], compiled: bool) -> list[tuple[int, int, bool]]:
    return [(each, size, compiled) for each in channels for size in sizes]


@pytest.mark.parametrize(
    ("channels", "size", "compiled"),
    [
        *norms(1, 3, 7, 33, sizes=(3, 5, 7), compiled=False),
        *norms(3, 33, sizes=(5,), compiled=True),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in norms(1, 3, 7, 33, sizes=(3, 7), compiled=True) + norms(1, 7, sizes=(5,), compiled=True)
        ),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_is_the_formula_in_float64(dtype, tolerance, channels, size, compiled, request):
    if compiled:
        request.getfixturevalue("compiler")
    torch.manual_seed(channels * size)
    x, grad = ((torch.randn(2, channels, 5, 6) * 20).to(dtype) for _ in range(2))
    x.requires_grad_()
    # alpha so large that the neighbours matter
    settings = {"size": size, "alpha": 1e-2, "beta": 0.75, "k": 2.0}
    y = local_response_norm(x, **settings, compiled=compiled)
    y.backward(grad)
    assert y.dtype is x.grad.dtype is dtype
    expected = by_the_formula(x.detach().double().numpy(), grad.double().numpy(), **settings)
    for ours, exact in zip((y.detach(), x.grad), expected, strict=True):
        assert np.linalg.norm(ours.double().numpy() - exact) <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("towers", [1, 2])
def test_the_memory_format_stays(towers, compiler):
    x = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    for compiled in (False, True):
        y = local_response_norm(x, size=5, alpha=1e-2, beta=0.75, k=2.0, towers=towers, compiled=compiled)
        assert y.is_contiguous(memory_format=torch.channels_last)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_spatial_gradients_by_formula_are_those_by_differences(size):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spatial_response_norm(x, size=size, alpha=0.7, beta=0.75, k=1.5), x)


def test_channels_that_do_not_divide_are_rejected():
    with pytest.raises(ValueError, match="towers=2: 3 channels"):
        local_response_norm(torch.zeros(1, 3, 2, 2), size=5, alpha=1.0, beta=0.75, k=2.0, towers=2)


def test_an_even_window_is_rejected():
    with pytest.raises(ValueError, match="size=4: must be odd"):
        local_response_norm(torch.zeros(1, 3, 2, 2), size=4, alpha=1.0, beta=0.75, k=2.0)


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 3), (2, 0, 3, 3)])
def test_nothing_in_is_nothing_out(shape):
    x = torch.zeros(shape)
    assert local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0).shape == shape
    assert spatial_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0).shape == shape


def test_a_second_derivative_is_rejected_and_not_silently_another_one():
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    y = local_response_norm(x, size=5, alpha=0.5, beta=0.75, k=2.0)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


# The form that saves the scale and the form that recomputes it

SETTINGS = {"alpha": 1e-2, "beta": 0.75, "k": 2.0}  # alpha so large that the neighbours matter


def both_forms(form, x, grad):
    """[(y, dx)] of the form that saves the scale and of the one that recomputes it."""
    results = []
    for save_scale in (True, False):
        own = x.clone().requires_grad_()
        y = form(own, save_scale=save_scale)
        y.backward(grad)
        results.append((y.detach(), own.grad))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("beta", [0.75, 0.5])
@pytest.mark.parametrize(("channels", "size", "towers"), [(16, 5, 1), (24, 5, 2), (7, 3, 1), (3, 7, 1), (8, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_recomputing_the_scale_gives_the_same_bits(dtype, beta, channels, size, towers, memory_format):
    torch.manual_seed(0)
    x, grad = ((torch.randn(2, channels, 5, 6) * 20).to(dtype).to(memory_format=memory_format) for _ in "ab")
    settings = {**SETTINGS, "beta": beta, "size": size}
    forms = [
        lambda x, save_scale: local_response_norm(x, **settings, towers=towers, save_scale=save_scale),
        lambda x, save_scale: spatial_response_norm(x, **settings, save_scale=save_scale),
    ]
    for form in forms:
        (y, dx), (y_, dx_) = both_forms(form, x, grad)
        assert torch.equal(y, y_)
        assert torch.equal(dx, dx_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "towers"), [(16, 1), (24, 2)])
def test_recomputing_the_scale_in_compiled_functions_gives_the_same_bits(dtype, channels, towers, compiler):
    torch.manual_seed(0)
    x, grad = ((torch.randn(2, channels, 5, 6) * 20).to(dtype).to(memory_format=torch.channels_last) for _ in "ab")
    forms = [
        lambda x, save_scale: local_response_norm(
            x, size=5, **SETTINGS, towers=towers, compiled=True, save_scale=save_scale
        ),
        lambda x, save_scale: spatial_response_norm(x, size=3, **SETTINGS, compiled=True, save_scale=save_scale),
    ]
    for form in forms:
        (y, dx), (y_, dx_) = both_forms(form, x, grad)
        assert torch.equal(y, y_)
        assert torch.equal(dx, dx_)


def saved_by(form, x):
    """The tensors that the forward pass of `form` saves for the backward pass."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        form(x)
    return saved


@pytest.mark.parametrize("norm", [local_response_norm, spatial_response_norm])
def test_the_form_that_recomputes_saves_its_input_alone(norm):
    x = torch.randn(2, 8, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    one, two = (saved_by(partial(norm, size=5, **SETTINGS, save_scale=save), x) for save in (False, True))
    assert [t.dtype for t in one] == [torch.bfloat16]
    assert [t.dtype for t in two] == [torch.bfloat16, torch.float32]


def test_the_form_follows_the_device_unless_it_is_named(monkeypatch):
    assert lrn.saves_scale(torch.device("cpu"))
    assert not lrn.saves_scale(torch.device("cuda"))
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    assert len(saved_by(LocalResponseNorm(size=5, **SETTINGS), x)) == 2
    monkeypatch.setattr(lrn, "saves_scale", lambda device: False)
    assert len(saved_by(LocalResponseNorm(size=5, **SETTINGS), x)) == 1


@pytest.mark.parametrize("save_scale", [True, False])
def test_a_compiled_model_has_the_gradients_of_an_eager_one(save_scale, compiler):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 16, 3)
    images = torch.randn(2, 3, 9, 9)

    def model(images):
        y = local_response_norm(net(images).relu(), size=5, **SETTINGS, save_scale=save_scale)
        return F.max_pool2d(y, 3, 2)

    gradients = []
    for form in (model, torch.compile(model)):
        net.zero_grad()
        form(images).square().sum().backward()
        gradients.append(net.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def graph_of(x, save_scale):
    """The graph that torch.compile traces of a norm and a pool, and the values that its partitioner saves for the
    backward pass."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    traced, saved = [], []

    def forward(graph, inputs):
        saved.extend(node.meta["val"] for node in graph.graph.output_node().args[0][1:])
        return make_boxed_func(graph.forward)

    partitioned = aot_autograd(fw_compiler=forward, partition_fn=min_cut_rematerialization_partition)

    def backend(graph, inputs):
        traced.append(graph)
        return partitioned(graph, inputs)

    def model(x):
        return F.max_pool2d(local_response_norm(x, size=5, **SETTINGS, save_scale=save_scale), 3, 2)

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    return traced[0], saved


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch.compile marks what to recompute since torch 2.12")
def test_a_compiled_model_that_recomputes_saves_the_input_alone():
    x = torch.randn(2, 16, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    assert torch.float32 not in {t.dtype for t in graph_of(x, False)[1]}
    assert torch.float32 in {t.dtype for t in graph_of(x, True)[1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_scale", [True, False])
def test_no_cast_to_the_same_dtype_is_traced(dtype, save_scale):
    """Such a cast returns its input, and torch 2.11 then differentiates the wrong one: gradients are zero."""
    graph, _ = graph_of(torch.randn(2, 16, 5, 6, dtype=dtype, requires_grad=True), save_scale)
    casts = [
        node
        for module in graph.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_method" and node.target in ("to", "float")
    ]
    assert casts or dtype is torch.float32
    for node in casts:
        assert node.args[0].meta["example_value"].dtype is not node.meta["example_value"].dtype
