"""The components of a run, and one step of it. loop.py decides when to step, evaluate and save."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from accelerate import Accelerator
from torch import Tensor

from pipeline.files import Json
from pipeline.progress import Progress
from pipeline.read.loader import Batch, Loader

from . import nonfinite
from .background_saves import Saver
from .config import Config
from .distributed import Agreement
from .metrics import Meter, Record
from .nonfinite import Finite, LossNotFinite
from .optim import Plateau, learning_rate, set_learning_rate
from .profiling import Profile
from .run_folder import RunFolder
from .showcase import Showcase
from .signals import Stop
from .step import Stepper
from .watchdog import BACKWARD, FORWARD, Watchdog

MOST_OVERFLOWS = 60  # in a row: the scale has fallen from 2^16 to 2^-44, and gradients are infinite for another reason


@dataclass
class TrainState:
    """The state that changes from step to step, except weights and optimiser. Checkpoints store each field by name."""

    step: int = 0  # steps done
    epoch: int = 0  # epochs done, including their evaluation
    updates: int = 0  # steps that moved the weights
    overflows: int = 0  # steps that the loss scaler skipped; the schedule does not count them
    rate: float = 0.0  # learning rate of the last step
    best_top1: float = 0.0
    best_step: int | None = None
    left_out: list[int] = field(default_factory=list)  # steps, counted from 1, without an update: not finite
    plateau: Plateau = field(default_factory=Plateau)


@dataclass
class Trainer:
    """The components of a run, made by `build_trainer`.

    fixed: the settings that a run must have in common with its checkpoints. make_loader: makes a training loader with
    the given `augment`. optim: config.optim, its rates scaled to the batch.
    """

    config: Config
    fixed: Json
    accelerator: Accelerator
    loader: Loader
    make_loader: Callable[..., Loader]
    val_loader: Loader
    stepper: Stepper
    state: TrainState
    finite: Finite
    meter: Meter
    agreement: Agreement
    saver: Saver
    record: Record
    folder: RunFolder
    stop: Stop
    watchdog: Watchdog
    profile: Profile
    showcase: Showcase
    progress: Progress | None = None
    _overflows_in_a_row: int = 0

    def __post_init__(self) -> None:
        self.optim = self.config.scaled_optim()
        self.steps_per_epoch = len(self.loader)
        self.total_steps = self.steps_per_epoch * self.config.train.epochs
        self.last_step = min(self.total_steps, self.config.limit_steps or self.total_steps)
        self.loader.bad.together = self.val_loader.bad.together = True

    @property
    def within_epoch(self) -> int:
        """Steps done in the current epoch; 0 at its end."""
        return self.state.step % self.steps_per_epoch

    @property
    def at_limit(self) -> bool:
        return 0 < self.config.limit_steps <= self.state.step

    @property
    def evaluation_is_missing(self) -> bool:
        """Whether an epoch was trained, and the run stopped before its evaluation was over."""
        return self.loader.state_dict()["epoch"] > self.state.epoch

    def tick(self, phase: str) -> None:
        self.watchdog.tick(self.state.step, phase)

    def ids_of(self, number: int) -> list[int]:
        """The global batch of the run's step `number`, counted from 1."""
        return self.loader.ids(*divmod(number - 1, self.steps_per_epoch), whole=True).tolist()

    def enter_epoch(self) -> None:
        """Replaces the loader if its current epoch has other crop sizes or colour shifts."""
        at = self.loader.state_dict()
        augment = self.config.augment_at(at["epoch"])
        if augment != self.loader.augment:
            self.loader.close()
            self.loader = self.make_loader(augment=augment)
            self.loader.bad.together = True
            self.loader.load_state_dict(at)

    def step(self, batch: Batch) -> int:
        """Runs one step, with an update if loss and gradients are finite; returns any rank's request to stop, or 0."""
        self.tick(FORWARD)
        self._set_rate()
        state, number, skips = self.state, self.state.step + 1, self.config.guard.on_bad_numbers == "skip"
        buffers = self.stepper.buffers() if skips else []
        # The backward pass is where ranks wait for each other.
        loss = self.stepper.backward(batch, step=state.step, between=lambda: self.tick(BACKWARD)).mean()
        bad, broken = self.finite.bad_step(number, loss), self.saver.is_broken(self.record)
        stop, bad, broken, found = self.agreement.largest(self.stop_request(), bad, broken, self.loader.bad.unshared)
        if found:
            self.loader.bad.share(self.agreement.from_all)
        if bad:
            self._leave_out(bad, buffers)
        else:
            self._update()
            self.meter.add(loss)
        self.stepper.optimizer.zero_grad()
        state.step = number
        self.record.ids(number, batch.ids)
        if broken:
            self.saver.raise_failure(number)
        return stop

    def _set_rate(self) -> None:
        """Sets the rate of the coming step."""
        state = self.state
        state.rate = learning_rate(
            self.optim,
            step=state.step - state.overflows,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            drops=state.plateau.drops,
        )
        set_learning_rate(
            self.stepper.optimizer,
            state.rate,
            freeze_first=0 < self.config.train.conv1_epochs * self.steps_per_epoch <= state.step,
        )

    def _update(self) -> None:
        moved = self.stepper.update(self.state.updates + 1)
        self.state.updates += moved
        self.state.overflows += not moved
        self._overflows_in_a_row = 0 if moved else self._overflows_in_a_row + 1
        if self._overflows_in_a_row == MOST_OVERFLOWS:
            self.raise_if_bad(self.state.step + 1)

    def _leave_out(self, bad: int, buffers: list[Tensor]) -> None:
        """Skips the update of step `bad` if guard.on_bad_numbers allows it; otherwise raises LossNotFinite."""
        guard, left_out = self.config.guard, self.state.left_out
        if guard.on_bad_numbers == "stop":
            self.raise_if_bad(bad)
        if len(left_out) >= guard.max_bad_steps:
            self.raise_if_bad(bad, f"guard.max_bad_steps={guard.max_bad_steps} batches were left out before; ")
        left_out.append(bad)
        self.stepper.put_back(buffers)
        loss = self.finite.mean_loss(self.accelerator)
        as_json = loss if math.isfinite(loss) else str(loss)  # JSON has no NaN
        self.record.write("left out", bad, {"bad_step": bad, "loss": as_json, "ids": self.ids_of(bad)})
        self.record.log(f"step {bad}: {nonfinite.describe(loss)}; its update is left out")

    def raise_if_bad(self, bad: int, why: str = "") -> None:
        """Raises LossNotFinite, at all ranks, if any rank has a bad step. bad: this rank's bad step; 0: none."""
        bad = self.agreement.largest(bad)[0] if self.finite.late else bad
        if bad:
            loss = self.finite.mean_loss(self.accelerator)
            raise LossNotFinite(
                f"{nonfinite.describe(loss)} at step {bad}; {why}tools/replay.py {self.folder.path} {bad} shows it"
                f" again; try a lower optim.lr than {self.config.optim.lr}, or leave such batches out by"
                " --guard.on-bad-numbers skip",
                facts={"step": bad, "loss": repr(loss), "ids": self.ids_of(bad)},
            )

    def stop_request(self) -> int:
        """Returns this rank's request to stop, encoded as one number; 0: none."""
        if self.accelerator.is_main_process:
            self.stop.look_for_file(self.folder.path)
        return self.stop.encoded(self.accelerator.process_index)

    def close(self) -> None:
        self.watchdog.close()
        self.loader.close()
        self.val_loader.close()
        self.record.close()
