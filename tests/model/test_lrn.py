"""Local response normalisation against torch's own and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.lrn import local_response_norm


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


def test_an_even_window_is_refused():
    with pytest.raises(ValueError, match="size=4: must be odd"):
        local_response_norm(torch.zeros(1, 3, 2, 2), size=4, alpha=1.0, beta=0.75, k=2.0)
