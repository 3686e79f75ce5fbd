"""Local response normalisation against torch's own and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.lrn import local_response_norm, spatial_response_norm


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("channels", [1, 3, 7, 33])
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


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="towers=2: 3 channels"):
        local_response_norm(torch.zeros(1, 3, 2, 2), size=5, alpha=1.0, beta=0.75, k=2.0, towers=2)


def test_an_even_window_is_refused():
    with pytest.raises(ValueError, match="size=4: must be odd"):
        local_response_norm(torch.zeros(1, 3, 2, 2), size=4, alpha=1.0, beta=0.75, k=2.0)


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 3), (2, 0, 3, 3)])
def test_nothing_in_is_nothing_out(shape):
    x = torch.zeros(shape)
    assert local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0).shape == shape
    assert spatial_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0).shape == shape


def test_a_second_derivative_is_refused_and_not_silently_another_one():
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    y = local_response_norm(x, size=5, alpha=0.5, beta=0.75, k=2.0)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
