"""One run from its configuration to its final figures: the step and its rhythm."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from model import AlexNet
from pipeline import cores
from pipeline.errors import CHECK_FAILED, ConfigError, ExpressError
from pipeline.files import write_json
from pipeline.manifest import Dataset, open_dataset
from pipeline.progress import Progress
from pipeline.read import draws, order
from pipeline.read.loader import Batch, Loader

from . import checkpoint, environment, tracking
from .config import RESUME_NEWEST, Config, flatten
from .networks import compile_net, load_weights, make_net, set_training, without_dropout
from .optim import learning_rate, make_optimizer, set_learning_rate
from .validation import Result, evaluate

INIT = 1_000_000  # draw streams of training, away from the loader's
# A changed value of these would go on with another run: another net, other crops, another order.
FIXED_ON_RESUME = (
    "optim.",
    "train.precision",
    "model.",
    "augment.",
    "train.batch",
    "data.train_split",
    "data.partitions",
    "data.window",
    "run.seed",
)


class LossNotFinite(ExpressError):
    """The loss became NaN or infinite."""

    code = 76


class NotOverfitted(ExpressError):
    """A net that cannot learn a few images by heart."""

    code = CHECK_FAILED


@dataclass
class State:
    """All that changes while the loop runs, beside weights and optimiser."""

    step: int = 0  # optimiser steps done
    epoch: int = 0  # epochs done
    best_top1: float = 0.0


class Run:
    """A run's parts, put together. `state` is public, so that the end can be told with its step."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, Path(config.run.dir)
        self.state = State()
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
        resume_from = self._resume_from()
        torch.manual_seed(draws.key(config.run.seed, INIT) >> 1)
        net = make_net(config.model, classes=len(self.dataset.classes), crop=config.augment.crop)
        if config.model.init and not resume_from:
            note = load_weights(net, Path(config.model.init))
            if note and accelerator.is_main_process:
                print(note, flush=True)
        if config.overfit:
            without_dropout(net)
        # Channels last is what convolutions like best, on tensor cores and on the CPU alike.
        net = net.to(memory_format=torch.channels_last)
        # Before it is wrapped, in place: names of weights stay.
        self.compiled = compile_net(net, config.train.compile, accelerator.device)
        self.takes_rows = isinstance(net, AlexNet)
        self.net, self.optimizer = accelerator.prepare(net, make_optimizer(net, config.optim))
        set_training(accelerator.unwrap_model(self.net), config.model)
        self.checkpoints = checkpoint.Checkpoints(self.folder, keep=config.run.keep_checkpoints)
        if resume_from:
            self._restore(resume_from)
        self._open_folder()
        self.record = tracking.Record(
            self.folder, accelerator, resumed_at=self.state.step, record_ids=config.run.record_ids
        )
        self.record.write("start", self.state.step, {"ranks": accelerator.num_processes})

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

    def _open_folder(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            described = {
                "config": dataclasses.asdict(self.config),
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
            write_json(self.folder / "config.json", described)
        self.accelerator.init_trackers("tensorboard")
        self.accelerator.wait_for_everyone()

    # Resuming

    def _resume_from(self) -> Path | None:
        """The checkpoint to go on from. Refuses to start anew where a run is kept already."""
        resume = self.config.resume
        kept = checkpoint.Checkpoints(self.folder, keep=1)
        newest = kept.newest()
        if resume and resume != RESUME_NEWEST:
            named = Path(resume)
            # Going back would leave two runs' checkpoints in one folder, and the next resume would take the old one's.
            if later := kept.whole_after(named):
                raise ConfigError(
                    f"--resume {named}: {self.folder} goes on to {later[-1].name};"
                    " to branch off an earlier checkpoint, choose another --run.dir"
                )
            return named
        if newest and not resume:
            raise ConfigError(
                f"{self.folder}: holds a run already ({newest.name}); go on with it by --resume,"
                " or choose another --run.dir"
            )
        if resume and not newest:
            raise ConfigError(f"{self.folder}: no checkpoint to resume from; start without --resume")
        return newest

    def _restore(self, path: Path) -> None:
        model, optimizer, state = checkpoint.load(path)
        self._refuse_other_run(path, state)
        self.accelerator.unwrap_model(self.net).load_state_dict(model)
        checkpoint.restore_optimizer(self.optimizer, optimizer)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.state = State(state["step"], state["epoch"], state["best_top1"])
        if self.state.epoch < self.config.train.epochs:
            self.loader.load_state_dict(state["loader"])
        if self.accelerator.is_main_process:
            print(f"resuming from {path}: {self._done()} done", flush=True)

    def _done(self) -> str:
        steps = self.state.step - self.state.epoch * self.steps_per_epoch
        more = f" and {steps} of {self.steps_per_epoch} steps" if steps else ""
        return f"{self.state.epoch} of {self.config.train.epochs} epochs{more}"

    def _refuse_other_run(self, path: Path, state: dict[str, Any]) -> None:
        saved, now = state["config"], self._fixed()
        for name in sorted(saved.keys() | now.keys()):
            if saved.get(name) != now.get(name):
                raise ConfigError(
                    f"{name}={now.get(name)} but {path} was trained with {saved.get(name)};"
                    " resume with that value, or start a new run"
                )

    def _fixed(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        flat = flatten(self.config)
        fixed = {k: v for k, v in flat.items() if k.startswith(FIXED_ON_RESUME)}
        if self.config.optim.schedule != "constant":
            fixed["train.epochs"] = self.config.train.epochs  # the rate of every step depends on the last one
        return fixed | {"the dataset's fingerprint": self.dataset.fingerprint}

    # Training

    def train(self) -> Result:
        """Trains the epochs that are left and evaluates after each; returns the last figures."""
        result = None
        threads = self.loader.threads
        self.record.say(f"loader: {self.loader.backend} ({self.loader.backend_reason}), {threads} threads a rank")
        self.record.say(f"compiled: {self.compiled}")
        while self.state.epoch < self.config.train.epochs:
            self._train_epoch()
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
        return result or evaluate(self.accelerator.unwrap_model(self.net), self.val_loader, self.accelerator)

    def _train_epoch(self) -> None:
        c, state, number = self.config, self.state, self.state.epoch + 1
        steps_left = self.steps_per_epoch - self.loader.state_dict()["step"]
        progress = Progress(
            f"epoch {number}/{c.train.epochs}",
            steps_left * c.train.batch,
            enabled=self.accelerator.is_main_process,
        )
        meter = Meter(self.accelerator, c.train.batch)
        self.loader.stats()
        for batch in self.loader:
            rate = learning_rate(
                c.optim, step=state.step, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps
            )
            loss = self._step(batch, rate)
            state.step += 1
            meter.add(loss)
            self.record.ids(state.step, batch.ids)
            note = ""
            if state.step % c.run.log_every == 0:
                note = self._log(meter.read(self.loader), rate, number)
            progress.update(c.train.batch, note or progress.note)
            within = state.step % self.steps_per_epoch  # at an epoch's end, evaluation comes before the checkpoint
            if c.run.save_every and state.step % c.run.save_every == 0 and within:
                self._refuse_not_finite("loss", float(self.accelerator.reduce(loss, "mean")))
                self._save()
        progress.close()
        state.epoch = number
        if meter.steps:
            self._log(meter.read(self.loader), rate, number)
        self.record.say(tracking.summary(number, c.train.epochs, meter.whole() | {"lr": rate}, meter.seconds))

    def _step(self, batch: Batch, rate: float) -> Tensor:
        """One optimiser step; returns this rank's mean loss, on the device and unread."""
        set_learning_rate(self.optimizer, rate)
        loss = F.cross_entropy(self._logits(batch), batch.labels)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _logits(self, batch: Batch) -> Tensor:
        seed, step = self.config.run.seed, self.state.step
        if self.takes_rows:  # masks from coordinates: the same at any world size
            rows = draws.bits(batch.ids.cpu().numpy(), seed=seed, epoch=step, stream=draws.DROPOUT)
            upper = torch.from_numpy((rows >> np.uint64(32)).astype(np.uint32).view(np.int32))
            logits: Tensor = self.net(batch.images, upper.to(batch.images.device, non_blocking=True))
            return logits
        # Other nets draw from torch's generator: set anew from coordinates, so that there is no state of it to save.
        torch.manual_seed(draws.key(seed, step, self.accelerator.process_index) >> 1)
        logits = self.net(batch.images)
        return logits

    def _log(self, metrics: dict[str, float], rate: float, epoch: int) -> str:
        self._refuse_not_finite("loss", metrics["loss"])
        self.record.write("train", self.state.step, {"epoch": epoch, **metrics, "lr": rate})
        return f"loss {metrics['loss']:.4f}, data wait {metrics['data_wait']:.0%}"

    def _refuse_not_finite(self, what: str, value: float) -> None:
        """Before anything is recorded or saved: a checkpoint of a broken net would only break what resumes from it."""
        if not math.isfinite(value):
            raise LossNotFinite(
                f"the {what} is {value} at step {self.state.step};"
                f" start anew with a lower optim.lr than {self.config.optim.lr}"
            )

    def _evaluate(self) -> Result:
        result = evaluate(self.accelerator.unwrap_model(self.net), self.val_loader, self.accelerator)
        self._refuse_not_finite("validation loss", result.loss)
        self.state.best_top1 = max(self.state.best_top1, result.top1)
        self.record.write("val", self.state.step, {"epoch": self.state.epoch, **dataclasses.asdict(result)})
        return result

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            self.checkpoints.save(
                self.state.step,
                model=self.accelerator.unwrap_model(self.net).state_dict(),
                optimizer=self.optimizer.state_dict(),
                state={
                    "epoch": self.state.epoch,
                    "best_top1": self.state.best_top1,
                    "loader": self.loader.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "config": self._fixed(),
                },
            )
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.loader.close()
        self.val_loader.close()
        self.record.close()


class Meter:
    """Loss, rate and waiting since the last reading, and over the whole epoch. Reading it waits for the device."""

    def __init__(self, accelerator: Accelerator, batch: int) -> None:
        self.accelerator, self.batch = accelerator, batch
        self.started = self.last = time.perf_counter()
        self.steps = self.all_steps = 0
        self.loss: Tensor | float = 0.0
        self.all_loss = self.all_wait = 0.0

    def add(self, loss: Tensor) -> None:
        self.loss = self.loss + loss
        self.steps += 1

    def read(self, loader: Loader) -> dict[str, float]:
        """Means over the steps since the last reading; the loss over all ranks. The one host-device synchronisation."""
        loss = float(self.accelerator.reduce(self.loss / self.steps, "mean"))
        now, wait = time.perf_counter(), loader.stats()["wait_seconds"]
        metrics = self._metrics(loss, self.steps, now - self.last, wait)
        self.all_loss, self.all_wait = self.all_loss + loss * self.steps, self.all_wait + wait
        self.all_steps, self.steps, self.loss, self.last = self.all_steps + self.steps, 0, 0.0, now
        return metrics

    @property
    def seconds(self) -> float:
        return self.last - self.started

    def whole(self) -> dict[str, float]:
        """The same over all readings."""
        return self._metrics(self.all_loss / self.all_steps, self.all_steps, self.seconds, self.all_wait)

    def _metrics(self, loss: float, steps: int, seconds: float, wait: float) -> dict[str, float]:
        return {"loss": loss, "images_per_second": steps * self.batch / seconds, "data_wait": wait / seconds}


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
