"""One run from its configuration to its final figures: the step and its rhythm."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from model import AlexNet
from model.alexnet import count_parameters
from pipeline import cores
from pipeline.errors import CHECK_FAILED, DataError, ExpressError
from pipeline.files import write_json
from pipeline.manifest import Dataset, open_dataset
from pipeline.progress import Progress
from pipeline.read import draws, order
from pipeline.read.loader import Batch, Loader

from . import checkpoint, environment, preempt, resume, tracking, watchdog
from .agreement import Agreement, timeout_seconds
from .checkpoint import Saved
from .config import Config
from .finite import Finite
from .folder import RunFolder
from .meter import Meter
from .networks import compile_net, load_weights, make_net, set_training, without_dropout
from .optim import learning_rate, make_optimizer, set_learning_rate
from .preempt import Preempted, Stop
from .saving import Saver
from .validation import Result, evaluate

INIT = 1_000_000  # draw streams of training, away from the loader's
DATA, FORWARD, BACKWARD, EVALUATING, SAVING = range(len(watchdog.PHASES))
RANKS = 1 << 20  # a request to stop and the rank that has it travel as one number


class LossNotFinite(ExpressError):
    """A loss or a gradient became NaN or infinite. `step` is the first bad one, `ids` are its global batch."""

    code = 76

    def __init__(self, message: str, *, step: int, loss: float, ids: list[int] | None = None) -> None:
        super().__init__(message)
        self.step, self.loss, self.ids = step, loss, ids or []


class _RollBack(Exception):
    """To the last checkpoint, because of the bad numbers of `step`."""

    def __init__(self, step: int) -> None:
        self.step = step


class NotOverfitted(ExpressError):
    """A net that cannot learn a few images by heart."""

    code = CHECK_FAILED


@dataclass
class State:
    """All that changes while the loop runs, beside weights and optimiser."""

    step: int = 0  # steps done
    epoch: int = 0  # epochs done, their evaluation with them
    best_top1: float = 0.0
    best_step: int | None = None
    left_out: list[int] = field(default_factory=list)  # steps, counted from 1, that update nothing: bad numbers


class Run:
    """A run's parts, put together. `state` is public, so that the end can be told with its step."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        *,
        folder: RunFolder | None = None,
        stop: Stop | None = None,
        parent: int = 0,
    ) -> None:
        self.config, self.accelerator, self.path = config, accelerator, Path(config.run.dir)
        self.folder, self.stop, self.state = folder or RunFolder(self.path), stop or Stop(), State()
        self.agreement = Agreement(
            accelerator.num_processes, timeout_seconds=timeout_seconds(config.guard.hang_seconds)
        )
        self.precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        self.cores = take_cores(accelerator.device)
        self.dataset = open_dataset(config.data.shards)
        samples = config.overfit or self.dataset.split(config.data.train_split).samples
        order.check_batch(
            config.train.batch,
            samples=samples,
            world=accelerator.num_processes,
            partitions=config.data.partitions,
            field="train.batch",
        )
        self.loader, self.val_loader = (self._loader(self.dataset, train=t) for t in (True, False))
        self.steps_per_epoch = len(self.loader)
        self.total_steps = self.steps_per_epoch * config.train.epochs
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
        torch.manual_seed(draws.key(config.run.seed, INIT) >> 1)
        net = make_net(config.model, classes=len(self.dataset.classes), crop=config.augment.crop)
        if config.model.init and not saved:
            note = load_weights(net, Path(config.model.init))
            if note:
                self._say(note)
        if isinstance(net, AlexNet) and net.variant.crop != config.augment.crop and not net.variant.any_crop:
            made_for = f"model.name={config.model.name} is made for augment.crop={net.variant.crop}"
            self._say(f"{made_for}; at {config.augment.crop} it has {count_parameters(net):,} parameters")
        if config.overfit:
            without_dropout(net)
        # Channels last is what convolutions like best, on tensor cores and on the CPU alike.
        net = net.to(memory_format=torch.channels_last)
        # Before it is wrapped, in place: names of weights stay.
        self.compiled = compile_net(net, config.train.compile, accelerator.device)
        self.takes_rows = isinstance(net, AlexNet)
        self.net, self.optimizer = accelerator.prepare(net, make_optimizer(net, config.optim))
        self.bare = accelerator.unwrap_model(self.net)
        set_training(self.bare, config.model)
        policy = config.guard.on_bad_numbers
        self.finite = Finite(
            self.bare.parameters(),
            late=accelerator.device.type == "cuda" and policy == "stop",
            gradients=accelerator.scaler is None,
        )
        self.meter = Meter(accelerator, config.train.batch)
        if self._world > 1:
            self._settle_buckets()
        if saved:
            self._restore(saved)
            self._say(f"going on from {saved.path}: {self._done()} done")
        self._open_folder()
        self.record = tracking.Record(
            self.path,
            accelerator,
            resumed_at=self._resumed_at() if saved else (-1, -1),
            record_ids=config.run.record_ids,
        )
        self.record.write("start", self.state.step, {"ranks": accelerator.num_processes})
        self.watchdog = self._make_watchdog(parent)

    def _loader(self, dataset: Dataset, *, train: bool) -> Loader:
        c, a = self.config, self.accelerator
        return Loader(
            dataset,
            split=c.data.train_split if train else c.data.val_split,
            batch=c.train.batch if train else c.train.eval_batch,
            train=train,
            seed=c.run.seed,
            partitions=c.data.partitions,
            window=c.data.window,
            first=c.overfit,
            rank=a.process_index,
            world=a.num_processes,
            local_world=local_world(),
            device=a.device,
            channels_last=True,
            augment=c.augment,
            config=c.loader,
        )

    def _resumed_at(self) -> tuple[int, int]:
        """Steps and evaluations that records may tell of."""
        return self.state.step, self.state.epoch

    def _settle_buckets(self) -> None:
        """A pass over nothing, before the first step.

        After its first backward pass DDP orders its buckets anew. A resumed run has another first step, and would add
        up gradients in another order than an undisturbed one: at three and more ranks that gives other bits.
        """
        ids, crop = self.loader.ids(0, 0), self.config.augment.crop
        images = torch.zeros(len(ids), 3, crop, crop, device=self.accelerator.device)
        buffers = [b.clone() for b in self.bare.buffers()]
        logits = self.logits(images.to(memory_format=torch.channels_last), ids)
        self.accelerator.backward(logits.sum() * 0)
        self.optimizer.zero_grad()
        self._put_back(buffers)

    def _put_back(self, buffers: list[Tensor]) -> None:
        for buffer, before in zip(self.bare.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _open_folder(self) -> None:
        if self.accelerator.is_main_process:
            described = {
                "config": dataclasses.asdict(self.config),
                "shards": os.path.abspath(self.config.data.shards),
                "fingerprint": self.dataset.fingerprint,
                "ranks": self.accelerator.num_processes,
                "precision": self.accelerator.mixed_precision,
                "backend": self.loader.backend,
                "backend_reason": self.loader.backend_reason,
                "threads": self.cores,
                "compiled": self.compiled,
                "command": environment.command(),
                "environment": environment.describe(),
            }
            write_json(self.path / "config.json", described)
        self.accelerator.init_trackers("tensorboard")
        self.accelerator.wait_for_everyone()

    def _make_watchdog(self, parent: int) -> watchdog.Watchdog:
        a = self.accelerator
        return watchdog.Watchdog(
            self.path,
            a.process_index,
            a.num_processes,
            self.config.guard.hang_seconds,
            on_orphan=lambda: self.stop.request(preempt.ORPHAN),
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

    def _restore(self, saved: Saved) -> None:
        state = saved.state
        try:
            self.bare.load_state_dict(saved.model)
            checkpoint.restore_optimizer(self.optimizer, saved.optimizer)
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.state = State(**{f.name: state[f.name] for f in dataclasses.fields(State)})
            self.meter = Meter(self.accelerator, self.config.train.batch)
            self.meter.load_state_dict(state["meter"])
        except (KeyError, RuntimeError, TypeError, ValueError) as err:
            reason = str(err).splitlines()[0]
            raise DataError(f"{saved.path}: does not fit this net ({reason}); choose another --run.dir") from err
        self.loader.load_state_dict(state["loader"])

    def _done(self) -> str:
        steps = self.state.step - self.state.epoch * self.steps_per_epoch
        more = f" and {steps} of {self.steps_per_epoch} steps" if steps else ""
        return f"{self.state.epoch} of {self.config.train.epochs} epochs{more}"

    # Training

    def train(self) -> Result:
        """Trains the epochs that are left and evaluates after each; returns the last figures."""
        threads = self.loader.threads
        self.record.say(f"loader: {self.loader.backend} ({self.loader.backend_reason}), {threads} threads a rank")
        self.record.say(f"compiled: {self.compiled}")
        self._tick(DATA)
        self.watchdog.start()
        self.stop.running = True
        nothing = self.agreement.from_first(not self.checkpoints.all())
        if self.config.guard.on_bad_numbers == "rollback" and nothing:
            self._save()
        while True:
            try:
                result = self._train()
                break
            except _RollBack as back:
                self._roll_back(back.step)
        self._save_is_done()
        return result

    def _train(self) -> Result:
        result = None
        while self.state.epoch < self.config.train.epochs:
            if self.loader.state_dict()["epoch"] == self.state.epoch:  # else its evaluation alone is missing
                self._train_epoch()
            self._end_epoch()
            result = self._evaluate()
            if self.config.overfit:
                if result.top1 == 1:
                    return result
                continue
            self._save()
        if self.config.overfit:
            assert result is not None
            raise NotOverfitted(
                f"after {self.state.epoch} epochs {result.top1:.1%} of {self.config.overfit} images are right;"
                " try more train.epochs or another optim.lr, or look for a mistake in the net"
            )
        return result or self._count()

    def _train_epoch(self) -> None:
        c, state = self.config, self.state
        steps_left = self.steps_per_epoch - self.loader.state_dict()["step"]
        progress = Progress(
            f"epoch {state.epoch + 1}/{c.train.epochs}",
            steps_left * c.train.batch,
            enabled=self.accelerator.is_main_process,
        )
        self.loader.stats()
        self._tick(DATA)
        for batch in self.loader:
            stop = self.step(batch)
            note = ""
            if state.step % c.run.log_every == 0 and self.meter.steps:
                note = self._log()
            progress.update(c.train.batch, note or progress.note)
            within = state.step % self.steps_per_epoch  # at an epoch's end, evaluation comes before the checkpoint
            if stop:
                self._end_by(stop)
            if c.run.save_every and state.step % c.run.save_every == 0 and within:
                self._save()
            self._tick(DATA)
        progress.close()

    def _end_epoch(self) -> None:
        """What was not yet read of its losses is recorded, also where the run was stopped just before."""
        self._refuse_bad(self.finite.rest())
        if self.meter.steps:
            self._log()
        if self.meter.all_steps:
            metrics = self.meter.whole() | {"lr": self.rate(self.state.step - 1)}
            self.record.say(
                tracking.summary(self.state.epoch + 1, self.config.train.epochs, metrics, self.meter.seconds)
            )
        self.meter = Meter(self.accelerator, self.config.train.batch)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return learning_rate(
            self.config.optim, step=step, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps
        )

    def step(self, batch: Batch) -> int:
        """One step, with its update if its numbers allow; returns the request to stop that any rank has, or 0."""
        self._tick(FORWARD)
        set_learning_rate(self.optimizer, self.rate(self.state.step))
        number = self.state.step + 1
        ids = self.loader.ids(*self.coordinates(number))
        if number in self.state.left_out:  # by a roll-back
            stop, _, broken = self._agree(0)
        else:
            buffers = self._buffers()
            loss = F.cross_entropy(self.logits(batch.images, ids), batch.labels)
            self._tick(BACKWARD)  # where ranks wait for each other
            self.accelerator.backward(loss)
            stop, bad, broken = self._agree(self.finite.bad_step(number, loss))
            if bad:
                self._leave_out(bad, buffers)
            else:
                self.optimizer.step()
                self.meter.add(loss.detach())
            self.optimizer.zero_grad()
        self.state.step = number
        self.record.ids(number, ids)
        if broken:
            self.saver.refuse(number)
        return stop

    def _agree(self, bad: int) -> list[int]:
        """Of all ranks: the request to stop, the step with bad numbers, whether something could not be written."""
        return self.agreement.largest(self._asked_to_stop(), bad, self.saver.is_broken(self.record))

    def coordinates(self, number: int) -> tuple[int, int]:
        """(epoch, step), from 0, of the step that is the number'th of the run."""
        return divmod(number - 1, self.steps_per_epoch)

    def _asked_to_stop(self) -> int:
        if self.accelerator.is_main_process:
            self.stop.look_for_file(self.path)
        return self.stop.code * RANKS + self.accelerator.process_index if self.stop.code else 0

    def _end_by(self, stop: int) -> None:
        """All ranks are at the same step: saves, waits until that is on the disk, and ends."""
        reason = preempt.name(stop // RANKS)
        rank = f" at rank {stop % RANKS}" if stop // RANKS > preempt.FIRST_SIGNAL and self._world > 1 else ""
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

    # Bad numbers

    def _buffers(self) -> list[Tensor]:
        """What the forward pass itself changes, to be put back: a batch that is left out must not stay in averages."""
        return [b.clone() for b in self.bare.buffers()] if self.config.guard.on_bad_numbers == "skip" else []

    def _leave_out(self, bad: int, buffers: list[Tensor]) -> None:
        guard = self.config.guard
        if guard.on_bad_numbers == "stop":
            self._refuse_bad(bad)
        if len(self.state.left_out) >= guard.max_bad_steps:
            self._refuse_bad(bad, f"guard.max_bad_steps={guard.max_bad_steps} batches were left out before; ")
        if guard.on_bad_numbers == "rollback":
            raise _RollBack(bad)
        self.state.left_out.append(bad)
        self._put_back(buffers)
        loss = self._bad_loss()
        self.record.write("left out", bad, {"bad_step": bad, "loss": _text(loss), "ids": self.ids_of(bad)})
        self.record.say(f"step {bad}: {what_is_bad(loss)}; its update is left out")

    def _bad_loss(self) -> float:
        """The loss, over all ranks, of the step that was told of."""
        return float(self.accelerator.reduce(torch.as_tensor(self.finite.loss), "mean"))

    def ids_of(self, number: int) -> list[int]:
        """The whole global batch."""
        return [int(i) for i in self.loader.ids(*self.coordinates(number), whole=True)]

    def _refuse_bad(self, bad: int, why: str = "") -> None:
        bad = self.agreement.largest(bad)[0] if self.finite.late else bad
        if bad:
            loss = self._bad_loss()
            raise LossNotFinite(
                f"{what_is_bad(loss)} at step {bad}; {why}"
                f"tools/replay.py {self.path} {bad} shows it again; try a lower optim.lr than {self.config.optim.lr},"
                " or leave such batches out by --guard.on-bad-numbers skip or rollback",
                step=bad,
                loss=loss,
                ids=self.ids_of(bad),
            )

    def _roll_back(self, bad: int) -> None:
        """To the newest checkpoint, and from there again without the batch of step `bad`."""
        self.saver.settle()
        path = None
        if self.accelerator.is_main_process and (saved := self.checkpoints.newest()[0]):
            path = saved.path
            self.checkpoints.set_aside_after(saved.state["step"])
        path = self.agreement.from_first(path)
        if path is None:
            self._refuse_bad(bad, "there is no checkpoint to roll back to; ")
        left_out, loss = self.state.left_out, self._bad_loss()
        self.optimizer.zero_grad()
        self._restore(checkpoint.load(path))
        self.state.left_out = [*left_out, bad]
        self.record.rewind(*self._resumed_at())
        told = {"bad_step": bad, "loss": _text(loss), "ids": self.ids_of(bad)}
        self.record.write("left out", self.state.step, told)
        self.record.say(f"step {bad}: {what_is_bad(loss)}; back to step {self.state.step}, and on without that batch")

    # The step's parts

    def logits(self, images: Tensor, ids: np.ndarray) -> Tensor:
        """ids: the batch's, on the host; asking the device for them would wait for all it has to do."""
        seed, step = self.config.run.seed, self.state.step
        if self.takes_rows:  # masks from coordinates: the same at any world size
            rows = draws.bits(ids, seed=seed, epoch=step, stream=draws.DROPOUT)
            upper = torch.from_numpy((rows >> np.uint64(32)).astype(np.uint32).view(np.int32))
            logits: Tensor = self.net(images, upper.to(images.device, non_blocking=True))
            return logits
        # Other nets draw from torch's generator: set anew from coordinates, so that there is no state of it to save.
        torch.manual_seed(draws.key(seed, step, self.accelerator.process_index) >> 1)
        logits = self.net(images)
        return logits

    def _log(self) -> str:
        """Reads and records what was added up; returns it for the progress line."""
        metrics, rate = self.meter.read(self.loader), self.rate(self.state.step - 1)
        self.record.write("train", self.state.step, {"epoch": self.state.epoch + 1, **metrics, "lr": rate})
        return f"loss {metrics['loss']:.4f}, data wait {metrics['data_wait']:.0%}"

    def _evaluate(self) -> Result:
        """Of the epoch that was trained; then the epoch is done."""
        result = self._count()
        state = self.state
        if not math.isfinite(result.loss):  # never saved: a checkpoint of a broken net breaks what resumes from it
            raise LossNotFinite(
                f"the validation loss is {result.loss} at step {state.step};"
                f" try a lower optim.lr than {self.config.optim.lr}",
                step=state.step,
                loss=result.loss,
            )
        state.epoch += 1
        if state.best_step is None or result.top1 > state.best_top1:
            state.best_top1, state.best_step = result.top1, state.step
        self.record.write("val", state.step, {"epoch": state.epoch, **dataclasses.asdict(result)})
        return result

    def _count(self) -> Result:
        if self._world > 1:
            for buffer in self.bare.buffers():  # batch statistics are each rank's own; saved and judged are rank 0's
                dist.broadcast(buffer, 0)
        return evaluate(self.bare, self.val_loader, self.accelerator, between=self._between_evaluations)

    def _between_evaluations(self) -> None:
        """After each batch that all ranks have."""
        self._tick(EVALUATING)
        (stop,) = self.agreement.largest(self._asked_to_stop())
        if stop:
            self._end_by(stop)

    def _save(self) -> None:
        """Copies what is to be saved; it is written while training goes on."""
        self._tick(SAVING)
        self._refuse_bad(self.finite.rest())
        meter = self.meter.state_dict()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            self.saver.save(
                self.state.step,
                model=self.bare.state_dict(),
                optimizer=self.optimizer.state_dict(),
                state={
                    **dataclasses.asdict(self.state),
                    "loader": self.loader.state_dict(),
                    "meter": meter,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "config": resume.what_must_stay(self.config, self.dataset, precision=self.precision),
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


def what_is_bad(loss: float) -> str:
    return f"the loss is {loss:.6g}{', a gradient is not finite' if math.isfinite(loss) else ''}"


def _text(loss: float) -> float | str:
    """JSON knows no NaN."""
    return loss if math.isfinite(loss) else str(loss)


def local_world() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def take_cores(device: torch.device) -> dict[str, Any]:
    """Pins this rank to its share of the cores near its GPU, where those are known, and lets torch use all it has.

    Launchers set one thread a rank, which starves a CPU. Returns what was done, for the run folder.
    """
    ranks = local_world()
    shares = None
    if device.type == "cuda" and hasattr(os, "sched_setaffinity"):
        near = [_cores_near_gpu(gpu) for gpu in range(min(ranks, torch.cuda.device_count()))]
        shares = cores.divide(near, sorted(os.sched_getaffinity(0))) if len(near) == ranks else None
    if shares is not None:
        cores.pin(shares[int(os.environ.get("LOCAL_RANK", "0"))])
    threads = cores.threads_per_rank(ranks)
    torch.set_num_threads(threads)
    return {"ranks_on_this_machine": ranks, "threads_a_rank": threads, "pinned_to_cores": shares}


def _cores_near_gpu(gpu: int) -> list[int] | None:
    p: Any = torch.cuda.get_device_properties(gpu)
    return cores.near_device(f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0")
