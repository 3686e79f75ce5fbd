"""Whether a step's numbers can be used: its loss and all gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Finite:
    """Looks at each step's loss and gradients.

    late: tell of a step one step later, so that a device is never waited for while it has work to do; the update of
    that step has then been made. gradients: False where a loss scaler looks at them and infinite ones are its business.
    """

    def __init__(self, parameters: Iterable[Tensor], *, late: bool, gradients: bool = True) -> None:
        self.parameters = [p for p in parameters if p.requires_grad] if gradients else []
        self.late = late
        self.loss: Tensor | float = 0.0  # of the step that was told of
        self._before: tuple[int, Tensor, Tensor] | None = None

    def bad_step(self, step: int, loss: Tensor) -> int:
        """Of `step`, counted from 1, or late of the one before: its number if it was bad, else 0."""
        now = (step, self._is_bad(loss), loss.detach())
        if not self.late:
            return self._tell(now)
        before, self._before = self._before, now
        return self._tell(before)

    def rest(self) -> int:
        """The last step, if it was bad and not told of."""
        before, self._before = self._before, None
        return self._tell(before)

    def _tell(self, told: tuple[int, Tensor, Tensor] | None) -> int:
        if told is None:
            return 0
        number, bad, self.loss = told
        return number if bool(bad) else 0

    def _is_bad(self, loss: Tensor) -> Tensor:
        bad = ~torch.isfinite(loss.detach())
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            # One number of all gradients: NaN and infinity survive every sum.
            bad = bad | ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        return bad
