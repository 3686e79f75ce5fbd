"""One run from its configuration to its final figures: the rhythm of its steps."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from pipeline.errors import CHECK_FAILED, DataError, ExpressError
from pipeline.files import write_json
from pipeline.manifest import Dataset
from pipeline.progress import Progress, clock
from pipeline.read.augment import AugmentConfig
from pipeline.read.loader import Batch, Loader

from . import build, checkpoint, distributed, environment, metrics, resume, signals, watchdog
from .checkpoint import Saved
from .config import Config, augment_at, behind_the_end
from .distributed import Agreement, take_cores, timeout_seconds
from .evaluation import Evaluation, Result, evaluate
from .metrics import Meter
from .model_card import Inputs
from .nonfinite import BadNumbers, Finite, LossNotFinite
from .optim import Plateau, learning_rate, scaled_to_batch, set_learning_rate
from .profiling import Profile
from .run_folder import RunFolder
from .saving import Saver
from .signals import Preempted, Stop

DATA, FORWARD, BACKWARD, EVALUATING, SAVING = range(len(watchdog.PHASES))
MOST_OVERFLOWS = 60  # in a row: the scale has fallen from 2^16 to 2^-44, and gradients are infinite for another reason
RANKS = 1 << 20  # a request to stop and the rank that has it travel as one number


class NotOverfitted(ExpressError):
    """A net that cannot learn a few images by heart."""

    code = CHECK_FAILED


@dataclass
class State:
    """All that changes while the loop runs, beside weights and optimiser."""

    step: int = 0  # steps done
    epoch: int = 0  # epochs done, their evaluation with them
    updates: int = 0  # steps that moved the weights
    overflows: int = 0  # steps that the loss scaler skipped: the schedule waits for them
    rate: float = 0.0  # of the last step
    best_top1: float = 0.0
    best_step: int | None = None
    left_out: list[int] = field(default_factory=list)  # steps, counted from 1, that update nothing: bad numbers
    plateau: Plateau = field(default_factory=Plateau)

    @classmethod
    def saved(cls, state: dict[str, Any]) -> State:
        values = {f.name: state[f.name] for f in dataclasses.fields(cls)}
        return cls(**{**values, "plateau": Plateau(**values["plateau"])})


class Run:
    """A run's parts, put together. `state` is public, so that the end can be told with its step."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        dataset: Dataset,
        *,
        folder: RunFolder | None = None,
        stop: Stop | None = None,
        parent: int = 0,
    ) -> None:
        self.config, self.accelerator, self.path = config, accelerator, Path(config.run.dir)
        self.folder, self.stop, self.state = folder or RunFolder(self.path), stop or Stop(), State()
        self.optim = scaled_to_batch(config.optim, config.train.batch)
        self.agreement = Agreement(self._world, timeout_seconds=timeout_seconds(config.guard.hang_seconds))
        self.precision = distributed.resolved_precision(config, accelerator)
        self.cores = take_cores(accelerator.device)
        self.dataset = dataset
        samples = config.overfit or self.dataset.split(config.data.train_split).samples
        build.check_batch(config, samples=samples, world=self._world)
        self.loader, self.val_loader = self._train_loader(0), self._loader(train=False, augment=config.augment)
        self.steps_per_epoch = len(self.loader)
        self.total_steps = self.steps_per_epoch * config.train.epochs
        net = build.make_net(config, classes=len(self.dataset.classes), say=self._say)
        self.checkpoints = checkpoint.Checkpoints(self.path, keep=config.run.keep_checkpoints)
        self.saver = Saver(self.checkpoints, self.agreement, on_error=config.guard.on_save_error)
        saved = resume.choose(
            config,
            self.dataset,
            folder=self.folder,
            checkpoints=self.checkpoints,
            agreement=self.agreement,
            first=accelerator.is_main_process,
            precision=self.precision,
            steps_per_epoch=self.steps_per_epoch,
        )
        if config.model.init and not saved:
            build.start_from(net, config.model.init, say=self._say)
        self.stepper, self.compiled = build.make_stepper(net, config, accelerator, self.optim)
        if self._world > 1:
            dtype = getattr(torch, self.loader.dtype)
            self.stepper.settle_buckets(self.loader.ids(0, 0), crop=self.loader.augment.crop, dtype=dtype)
        self.finite = Finite(
            self.bare.parameters(),
            late=accelerator.device.type == "cuda" and config.guard.on_bad_numbers == "stop",
            gradients=accelerator.scaler is None,
        )
        self.bad_numbers = BadNumbers(self)
        self._overflows_on_end = 0
        self.meter = Meter(accelerator, config.train.batch)
        if saved:
            self.restore(saved)
            self._say(f"going on from {saved.path}: {self._done()} done")
        self._open_folder()
        self.record = metrics.Record(
            self.path,
            accelerator,
            resumed_at=self.resumed_at() if saved else (-1, -1),
            record_ids=config.run.record_ids,
        )
        self.record.write("start", self.state.step, {"ranks": self._world})
        profiles = config.profile and accelerator.is_main_process
        self.profile = Profile(self.path, config.profile, accelerator.device) if profiles else None
        self.watchdog = self._make_watchdog(parent)

    # Its parts

    @property
    def bare(self) -> nn.Module:
        return self.stepper.bare

    def _train_loader(self, epoch: int) -> Loader:
        return self._loader(train=True, augment=augment_at(self.config, epoch))

    def _loader(self, *, train: bool, augment: AugmentConfig) -> Loader:
        return build.make_loader(self.config, self.dataset, self.accelerator, train=train, augment=augment)

    def _open_folder(self) -> None:
        if self.accelerator.is_main_process:
            described = {
                "config": dataclasses.asdict(self.config),
                "shards": os.path.abspath(self.config.data.shards),
                "fingerprint": self.dataset.fingerprint,
                "ranks": self.accelerator.num_processes,
                "precision": self.precision,
                "backend": self.loader.backend,
                "backend_reason": self.loader.backend_reason,
                "threads": self.cores,
                "compiled": self.compiled,
                "command": environment.command(),
                "environment": environment.describe(),
            }
            write_json(self.path / "config.json", described)
            Inputs.of(self.dataset, self.config.augment).write(self.path)
        metrics.start(self.accelerator, self.config)
        self.accelerator.wait_for_everyone()

    def _make_watchdog(self, parent: int) -> watchdog.Watchdog:
        a = self.accelerator
        return watchdog.Watchdog(
            self.path,
            a.process_index,
            a.num_processes,
            self.config.guard.hang_seconds,
            on_orphan=lambda: self.stop.request(signals.ORPHAN),
            on_hang=self._told_of_hang,
            parent=parent if watchdog.is_launched() else 0,
        )

    def _told_of_hang(self, reason: str) -> None:
        """From the watchdog's thread, before the process ends."""
        print(f"error: [rank {self.accelerator.process_index}] {reason}", file=sys.stderr, flush=True)
        self.folder.write_end(code=watchdog.CODE, reason=reason, step=self.state.step)

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            print(line, flush=True)

    # Resuming

    def restore(self, saved: Saved) -> None:
        """All as it was when `saved` was saved. Raises DataError for a checkpoint of another net."""
        state, average = saved.state, self.stepper.average
        try:
            self.bare.load_state_dict(saved.model)
            checkpoint.restore_optimizer(self.stepper.optimizer, saved.optimizer)
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.state = State.saved(state)
            if average:
                average.net.load_state_dict(saved.average)
                average.updates = self.state.updates
            self.meter = Meter(self.accelerator, self.config.train.batch)
            self.meter.load_state_dict(state["meter"])
        except (LookupError, RuntimeError, TypeError, ValueError) as err:
            reason = str(err).splitlines()[0]
            raise DataError(f"{saved.path}: does not fit this net ({reason}); choose another --run.dir") from err
        self.loader.load_state_dict(state["loader"])

    def resumed_at(self) -> tuple[int, int]:
        """Steps and evaluations that records may tell of."""
        return self.state.step, self.state.epoch

    def _done(self) -> str:
        steps = self.state.step - self.state.epoch * self.steps_per_epoch
        more = f" and {steps} of {self.steps_per_epoch} steps" if steps else ""
        return f"{self.state.epoch} of {self.config.train.epochs} epochs{more}"

    # Training

    def train(self) -> Evaluation:
        """Trains what is left and evaluates as train.eval_every says; returns the last figures."""
        self._say_what_is_done()
        self._tick(DATA)
        self.watchdog.start()
        self.stop.running = True
        result = self._train()
        self._save_is_done()
        if self.profile:
            self._say(self.profile.cut_short())
        return result

    def _say_what_is_done(self) -> None:
        c, threads = self.config, self.loader.threads
        self.record.say(f"loader: {self.loader.backend} ({self.loader.backend_reason}), {threads} threads a rank")
        self.record.say(f"decoder: {self.loader.decoder()}")
        self.record.say(f"compiled: {self.compiled}")
        for note in behind_the_end(c):
            self.record.say(note)
        if c.optim.scale_lr != "none":
            share = f"{c.train.batch} / {c.optim.base_batch}"
            self.record.say(f"optim.lr: {c.optim.lr:g} × {share} = {self.optim.lr:g}")

    def _train(self) -> Evaluation:
        result = None
        while not self._is_over():
            if not self._evaluation_is_missing():
                self._train_epoch()
            self._end_epoch()
            if self.state.step % self.steps_per_epoch:  # limit_steps lies within an epoch
                result = None
                break
            result = self._finish_epoch()
            if not self.config.overfit:
                self._save()
            elif result and result.best.top1 == 1:
                return result
        if self.config.overfit:
            self._refuse_overfit(result)
        return result or self._last_figures()

    def _is_over(self) -> bool:
        """Whether there is nothing left to train."""
        c, state = self.config, self.state
        reached = c.train.stop_at and state.best_step is not None and state.best_top1 >= c.train.stop_at
        limited = self._at_limit() and not self._evaluation_is_missing()
        return bool(state.epoch >= c.train.epochs or reached or limited)

    def _evaluation_is_missing(self) -> bool:
        """Whether an epoch was trained and stopped before its evaluation was over."""
        return bool(self.loader.state_dict()["epoch"] > self.state.epoch)

    def _at_limit(self) -> bool:
        return bool(self.config.limit_steps and self.state.step >= self.config.limit_steps)

    def _refuse_overfit(self, result: Evaluation | None) -> None:
        top1 = (result or self._count()).weights.top1
        raise NotOverfitted(
            f"after {self.state.epoch} epochs {top1:.1%} of {self.config.overfit} images are right;"
            " try more train.epochs or another optim.lr, or look for a mistake in the net"
        )

    def _last_figures(self) -> Evaluation:
        """Of a run that ends within an epoch, by limit_steps, or that was over when it began."""
        within = self.state.step % self.steps_per_epoch
        if within:
            self._save()
        result = self._count()
        if within:
            self._record_evaluation(result, epoch=self.state.epoch + 1)
        return result

    def enter_epoch(self) -> None:
        """The loader as the epoch that it is in wants it: crops may grow, colours be left alone."""
        state = self.loader.state_dict()
        augment = augment_at(self.config, state["epoch"])
        if augment != self.loader.augment:
            self.loader.close()
            self.loader = self._train_loader(state["epoch"])
            self.loader.load_state_dict(state)

    def _train_epoch(self) -> None:
        c, state = self.config, self.state
        self.enter_epoch()
        steps_left = self.steps_per_epoch - self.loader.state_dict()["step"]
        progress = Progress(
            f"epoch {state.epoch + 1}/{c.train.epochs}",
            steps_left * c.train.batch,
            enabled=self.accelerator.is_main_process,
        )
        self.loader.stats()
        self._ask_for_data()
        for batch in self.loader:
            stop = self._profiled_step(batch) if self.profile else self.step(batch)
            note = ""
            if state.step % c.run.log_every == 0 and self.meter.steps:
                note = self._log()
            progress.update(c.train.batch, note or progress.note)
            within = state.step % self.steps_per_epoch  # at an epoch's end, evaluation comes before the checkpoint
            if stop:
                self._end_by(stop)
            if self._at_limit():
                break
            if c.run.save_every and state.step % c.run.save_every == 0 and within:
                self._save()
            self._ask_for_data()
        progress.close()
        if self.profile and (told := self.profile.epoch_ends()):
            self._say(told)
            self.profile = None

    def _ask_for_data(self) -> None:
        self._tick(DATA)
        if self.profile:
            self.profile.asks()

    def _end_epoch(self) -> None:
        """What was not yet read of its losses is recorded, also where the run was stopped just before."""
        self.bad_numbers.refuse(self.finite.rest())
        if self.meter.steps:
            self._log()
        if self.meter.all_steps:
            means = self.meter.whole() | {"lr": self.state.rate}
            within = self.state.step % self.steps_per_epoch  # where limit_steps ends
            part = f", {within} of {self.steps_per_epoch} steps" if within else ""
            label = f"epoch {self.state.epoch + 1}/{self.config.train.epochs}{part}"
            self.record.say(metrics.summary(label, means, self.meter.seconds))
        self.meter = Meter(self.accelerator, self.config.train.batch)

    def step(self, batch: Batch) -> int:
        """One step, with its update if its numbers allow; returns the request to stop that any rank has, or 0."""
        self._tick(FORWARD)
        state, stepper = self.state, self.stepper
        self._set_rate()
        number = state.step + 1
        ids = self.loader.ids(*self.coordinates(number))
        buffers = self.bad_numbers.buffers()
        # The backward pass is where ranks wait for each other.
        loss, _ = stepper.backward(batch, ids, step=state.step, between=lambda: self._tick(BACKWARD))
        stop, bad, broken = self._agree(self.finite.bad_step(number, loss))
        if bad:
            self.bad_numbers.meet(bad, buffers)
        else:
            self._update()
            self.meter.add(loss)
        stepper.clear()
        state.step = number
        self.record.ids(number, ids)
        if broken:
            self.saver.refuse(number)
        return stop

    def _profiled_step(self, batch: Batch) -> int:
        assert self.profile is not None
        self.profile.begins()
        stop = self.step(batch)
        if table := self.profile.ends():
            self._say(table)
            self.profile = None
        return stop

    def _set_rate(self) -> None:
        """Of the step that comes; the schedule waits for those that the loss scaler skipped."""
        state = self.state
        state.rate = learning_rate(
            self.optim,
            step=state.step - state.overflows,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            drops=state.plateau.drops,
        )
        frozen_from = self.config.train.conv1_epochs
        freeze_first = bool(frozen_from) and state.step >= frozen_from * self.steps_per_epoch
        set_learning_rate(self.stepper.optimizer, state.rate, freeze_first=freeze_first)

    def _update(self) -> None:
        moved = self.stepper.update()
        self.state.updates += moved
        self.state.overflows += not moved
        self._overflows_on_end = 0 if moved else self._overflows_on_end + 1
        if self._overflows_on_end == MOST_OVERFLOWS:
            self.bad_numbers.refuse(self.state.step + 1)

    def _agree(self, bad: int) -> list[int]:
        """Of all ranks: the request to stop, the step with bad numbers, whether something could not be written."""
        return self.agreement.largest(self._asked_to_stop(), bad, self.saver.is_broken(self.record))

    def coordinates(self, number: int) -> tuple[int, int]:
        """(epoch, step), from 0, of the step that is the number'th of the run."""
        return divmod(number - 1, self.steps_per_epoch)

    def ids_of(self, number: int) -> list[int]:
        """The whole global batch."""
        return [int(i) for i in self.loader.ids(*self.coordinates(number), whole=True)]

    def _asked_to_stop(self) -> int:
        if self.accelerator.is_main_process:
            self.stop.look_for_file(self.path)
        return self.stop.code * RANKS + self.accelerator.process_index if self.stop.code else 0

    def _end_by(self, stop: int) -> None:
        """All ranks are at the same step: saves, waits until that is on the disk, and ends."""
        reason = signals.name(stop // RANKS)
        rank = f" at rank {stop % RANKS}" if stop // RANKS > signals.FIRST_SIGNAL and self._world > 1 else ""
        self._save()
        self._save_is_done()
        self.stop.done()
        if self.accelerator.is_main_process:
            self.folder.write_end(code=Preempted.code, reason=f"stopped by {reason}{rank}", step=self.state.step)
        self.agreement.largest(0)  # a rank that ends early makes launchers end the others
        raise Preempted(
            f"stopped by {reason}{rank}; step {self.state.step} is saved, and the same command goes on from there"
        )

    @property
    def _world(self) -> int:
        return int(self.accelerator.num_processes)

    def _tick(self, phase: int) -> None:
        self.watchdog.tick(self.state.step, phase)

    def _log(self) -> str:
        """Reads and records what was added up; returns it for the progress line."""
        state = self.state
        means = self.meter.read(self.loader)
        steps_a_second = means["images_per_second"] / self.config.train.batch
        memory = environment.memory_gb(self.accelerator.device)
        told: dict[str, Any] = {"epoch": state.epoch + 1, **means, "lr": state.rate, "memory_gb": memory}
        if self.accelerator.scaler is not None:
            told["overflows"] = state.overflows
        self.record.write("train", state.step, told)
        left = (self._last_step() - state.step) / steps_a_second
        return (
            f"step {state.step:,}/{self._last_step():,}, loss {means['loss']:.4f}, lr {state.rate:.3g},"
            f" data wait {means['data_wait']:.0%}, {memory:.1f} GB, run ends in {clock(left)}"
        )

    def _last_step(self) -> int:
        return min(self.total_steps, self.config.limit_steps or self.total_steps)

    # Evaluating and saving

    def _finish_epoch(self) -> Evaluation | None:
        """Evaluates the epoch that was trained, where that is due; then the epoch is done."""
        state, train = self.state, self.config.train
        number = state.epoch + 1
        on_schedule = number % train.eval_every == 0
        is_due = on_schedule or number >= train.epochs
        if not is_due and not self._at_limit():
            state.epoch = number
            return None
        result = self._count()
        if not math.isfinite(result.weights.loss):  # never saved: a broken net breaks what resumes from it
            raise LossNotFinite(
                f"the validation loss of epoch {number} is {result.weights.loss:.6g}; nothing of it is saved; try a"
                f" lower optim.lr than {self.config.optim.lr}",
                step=state.step,
                loss=result.weights.loss,
            )
        state.epoch = number
        # What limit_steps alone asks for must not change the run that goes on after it.
        if is_due and (state.best_step is None or result.best.top1 > state.best_top1):
            state.best_top1, state.best_step = result.best.top1, state.step
        if self.optim.schedule == "plateau" and on_schedule and state.plateau.see(result.weights.top1, self.optim):
            self.record.say(f"top-1 has stalled: the learning rate falls to {state.rate * self.optim.factor:.4g}")
        self._record_evaluation(result, epoch=number)
        return result

    def _record_evaluation(self, result: Evaluation, *, epoch: int) -> None:
        step = self.state.step
        self.record.write("val", step, {"epoch": epoch, **dataclasses.asdict(result.weights)})
        if result.average:
            self.record.write("val of average", step, {"epoch": epoch, **dataclasses.asdict(result.average)})

    def _count(self) -> Evaluation:
        average = self.stepper.average
        return Evaluation(self._count_of(self.bare), self._count_of(average.net) if average else None)

    def _count_of(self, net: nn.Module) -> Result:
        if self._world > 1:
            for buffer in net.buffers():  # batch statistics are each rank's own; saved and judged are rank 0's
                dist.broadcast(buffer, 0)
        return evaluate(net, self.val_loader, self.accelerator, between=self._between_evaluations)

    def _between_evaluations(self) -> None:
        """After each batch that all ranks have."""
        self._tick(EVALUATING)
        (stop,) = self.agreement.largest(self._asked_to_stop())
        if stop:
            self._end_by(stop)

    def _save(self) -> None:
        """Copies what is to be saved; it is written while training goes on."""
        self._tick(SAVING)
        self.bad_numbers.refuse(self.finite.rest())
        meter = self.meter.state_dict()
        if self.accelerator.is_main_process:
            scaler, average = self.accelerator.scaler, self.stepper.average
            self.saver.save(
                self.state.step,
                model=self.bare.state_dict(),
                optimizer=self.stepper.optimizer.state_dict(),
                average=average.net.state_dict() if average else {},
                state={
                    **dataclasses.asdict(self.state),
                    "loader": self.loader.state_dict(),
                    "meter": meter,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "config": resume.resume_invariants(self.config, self.dataset, precision=self.precision),
                    "epochs": self.config.train.epochs,
                    "ranks": self._world,
                },
            )

    def _save_is_done(self) -> None:
        """Waits, at all ranks, for what is being written."""
        self._tick(SAVING)
        self.saver.finish(self.state.step)

    def close(self) -> None:
        self.watchdog.close()
        self.loader.close()
        self.val_loader.close()
        self.record.close()
