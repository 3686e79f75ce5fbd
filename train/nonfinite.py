"""A loss or gradient that is NaN or infinite: stop, or leave the update out. All ranks together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import ExpressError

if TYPE_CHECKING:
    from .trainer import Run
from collections.abc import Callable, Iterable

from pipeline.read.backend import HostCopy


class Finite:
    """Checks each step's loss and gradients.

    late: report a step exactly one step later, on every rank, after its update. A check at once would wait for the
    step's backward pass, and the device would then wait for the host: a fifth to a third of a step on a fast GPU
    (estimated, not measured). gradients: False if a loss scaler checks them and handles infinite ones. copy: how the
    numbers of a late report reach the host.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        late: bool,
        gradients: bool = True,
        copy: Callable[[Tensor], HostCopy] = HostCopy,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad] if gradients else []
        self.late, self._copy = late, copy
        self.loss = 0.0  # of the step that was reported last
        self._before: tuple[int, HostCopy] | None = None

    def bad_step(self, step: int, loss: Tensor) -> int:
        """The number of `step`, counted from 1, if it was bad, otherwise 0; if late, of the step before."""
        now = torch.stack([self._is_bad(loss).float(), loss.detach().float()])
        if not self.late:
            return self._report(step, now.tolist())
        before, self._before = self._before, (step, self._copy(now))
        return self._report(before[0], before[1].read().tolist()) if before else 0

    def rest(self) -> int:
        """The last step's number if it was bad and is not reported yet, otherwise 0."""
        before, self._before = self._before, None
        return self._report(before[0], before[1].read().tolist()) if before else 0

    def _report(self, step: int, values: list[float]) -> int:
        bad, self.loss = values
        return step if bad else 0

    def _is_bad(self, loss: Tensor) -> Tensor:
        bad = ~torch.isfinite(loss.detach())
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            # One number for all gradients: NaN and infinity survive every sum.
            bad = bad | ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        return bad


class LossNotFinite(ExpressError):
    """A loss or a gradient became NaN or infinite. `step` is the first bad one, `ids` are its global batch."""

    code = 76

    def __init__(self, message: str, *, step: int, loss: float, ids: list[int] | None = None) -> None:
        super().__init__(message)
        self.step, self.loss, self.ids = step, loss, ids or []


class BadNumbers:
    """What a run does about them, as guard.on_bad_numbers says."""

    def __init__(self, run: Run) -> None:
        self.run, self.guard = run, run.config.guard

    def buffers(self) -> list[Tensor] | None:
        """To be put back if the step that follows is left out."""
        return self.run.stepper.buffers() if self.guard.on_bad_numbers == "skip" else None

    def meet(self, bad: int, buffers: list[Tensor] | None) -> None:
        """Step `bad` is left out, or raises LossNotFinite."""
        left_out = self.run.state.left_out
        if self.guard.on_bad_numbers == "stop":
            self.refuse(bad)
        if len(left_out) >= self.guard.max_bad_steps:
            self.refuse(bad, f"guard.max_bad_steps={self.guard.max_bad_steps} batches were left out before; ")
        assert buffers is not None
        left_out.append(bad)
        self.run.stepper.put_back(buffers)
        self._tell(bad, self._loss(), bad, "its update is left out")

    def refuse(self, bad: int, why: str = "") -> None:
        """Raises LossNotFinite where a step, of this rank or, told late, of any, was bad."""
        run = self.run
        bad = run.agreement.largest(bad)[0] if run.finite.late else bad
        if bad:
            loss = self._loss()
            raise LossNotFinite(
                f"{what_is_bad(loss)} at step {bad}; {why}"
                f"tools/replay.py {run.path} {bad} shows it again; try a lower optim.lr than {run.config.optim.lr},"
                " or leave such batches out by --guard.on-bad-numbers skip",
                step=bad,
                loss=loss,
                ids=run.ids_of(bad),
            )

    def _tell(self, bad: int, loss: float, at: int, what: str) -> None:
        run = self.run
        run.record.write("left out", at, {"bad_step": bad, "loss": _text(loss), "ids": run.ids_of(bad)})
        run.record.say(f"step {bad}: {what_is_bad(loss)}; {what}")

    def _loss(self) -> float:
        """Over all ranks, of the step that was told of."""
        loss = torch.tensor(self.run.finite.loss, device=self.run.accelerator.device)  # NCCL takes no host tensors
        return float(self.run.accelerator.reduce(loss, "mean"))


def what_is_bad(loss: float) -> str:
    return f"the loss is {loss:.6g}{', a gradient is not finite' if math.isfinite(loss) else ''}"


def _text(loss: float) -> float | str:
    """JSON knows no NaN."""
    return loss if math.isfinite(loss) else str(loss)
