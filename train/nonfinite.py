"""Detects a loss or gradient that is NaN or infinite, without waiting for the device."""

import math
from collections import deque
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.errors import NON_FINITE, ExpressError
from pipeline.read.backend import HostCopy


class Finite:
    """Checks each step's loss and the gradients of `parameters`, which are none if a loss scaler handles infinities.

    late: report a step exactly one step later, on every rank, after its update. An immediate check would wait for the
    step's backward pass, and the device would then wait for the host: a fifth to a third of a step on a fast GPU
    (estimated, not measured).
    """

    def __init__(self, parameters: Iterable[Tensor], *, late: bool) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.late = late
        self.loss = 0.0  # of the step that was reported last
        self._unread: deque[tuple[int, HostCopy]] = deque()  # steps that are not reported yet

    def bad_step(self, step: int, loss: Tensor) -> int:
        """Returns `step`, counted from 1, if it was bad, otherwise 0; with `late`, the same for the previous step."""
        bad = ~torch.isfinite(loss)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            # One number for all gradients: NaN and infinity survive every sum.
            bad = bad | ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        self._unread.append((step, HostCopy(torch.stack([bad.float(), loss.float()]))))
        return self.rest(unread=self.late)

    def rest(self, *, unread: int = 0) -> int:
        """Reports the oldest unread step: its number if it was bad, otherwise 0. unread: steps that may stay unread."""
        if len(self._unread) <= unread:
            return 0
        step, numbers = self._unread.popleft()
        bad, self.loss = numbers.read().tolist()
        return step if bad else 0

    def mean_loss(self, accelerator: Accelerator) -> float:
        """The mean over all ranks of the loss of the last reported step: a collective call."""
        # NCCL takes no host tensors
        return float(accelerator.reduce(torch.tensor(self.loss, device=accelerator.device), "mean"))


class LossNotFinite(ExpressError):
    """A loss or a gradient is NaN or infinite. facts: the first such step, and its global batch, if it was trained."""

    code, together = NON_FINITE, True


def describe(loss: float) -> str:
    return f"the loss is {loss:.6g}{', a gradient is not finite' if math.isfinite(loss) else ''}"
