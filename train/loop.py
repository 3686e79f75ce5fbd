"""The training loop: `train` takes a run from its first batch to its last figures."""

import contextlib
import dataclasses
import math
import shlex
from collections.abc import Iterator

import numpy as np
from accelerate.utils import broadcast

from model.summary import count_parameters
from pipeline.errors import ExpressError
from pipeline.progress import Progress, clock
from pipeline.read import stages
from pipeline.read.loader import Batch

from . import environment, signals
from .evaluation import BEST, Evaluation, evaluate
from .metrics import Meter
from .nonfinite import LossNotFinite
from .presets import advice
from .signals import Preempted
from .trainer import Trainer
from .watchdog import DATA, EVALUATING, SAVING

SLOW = 0.05  # fraction of time waiting for data above which the log line shows what the loader's threads do


def train(t: Trainer) -> Evaluation:
    """Trains the remaining steps, evaluates every train.eval_every epochs, and saves; returns the last evaluation.

    Raises Preempted after a request to stop, once the step is saved; LossNotFinite; StorageError; ExpressError if
    --overfit fails.
    """
    state, c, result = t.state, t.config, None
    begin(t)
    while not is_over(t):
        for batch in rest_of_epoch(t):
            t.showcase.keep_crops(batch, t.loader, epoch=state.epoch, step=state.step + 1)
            with t.profile.step():
                stop = t.step(batch)
            if state.step % c.run.log_every == 0 and t.meter.steps:
                log(t)
            if stop:
                save_and_stop(t, stop)
            if t.at_limit:
                break
            if c.run.save_every and state.step % c.run.save_every == 0 and t.within_epoch:
                save(t)  # the checkpoint of an epoch's last step comes after its evaluation
        end_epoch(t)
        if t.within_epoch:  # limit_steps ends within an epoch
            result = None
            break
        result = evaluate_epoch(t)
        if not c.overfit:
            save(t)
        elif result and result.best.top1 == 1:
            break
    result = result or last_figures(t)
    if c.overfit and result.best.top1 < 1:
        raise ExpressError(
            f"after {state.epoch} epochs {result.weights.top1:.1%} of {c.overfit} images are right;"
            " try more train.epochs or another optim.lr, or look for a mistake in the net"
        )
    finish_saving(t)
    t.profile.end_run()
    if state.best_step is not None and not c.overfit:
        log_best(t, state.best_step)
    return result


def log_best(t: Trainer, step: int) -> None:
    """Logs the best epoch, its checkpoint and what to do with it."""
    data = t.config.data
    split = [] if data.val_split == "val" else ["--data.split", data.val_split]
    options = shlex.join([str(t.folder.path), "--data.shards", data.shards, *split])
    epoch, path = step // t.steps_per_epoch, t.saver.checkpoints.path(step)
    t.record.log(f"best: top-1 {t.state.best_top1:.2%} in epoch {epoch}, {path}")
    t.record.log(f"next: python tools/evaluate.py {options}")


def begin(t: Trainer) -> None:
    """Logs what the run uses, and starts to watch for hangs and requests to stop."""
    c, loader = t.config, t.loader
    side = int(np.median(np.minimum(loader.split.column("width"), loader.split.column("height"))))
    weights, classes = count_parameters(t.stepper.bare), len(loader.dataset.classes)
    for line in (
        f"data: {loader.split.samples:,} training and {t.val_loader.samples:,} validation images of {classes:,}"
        f" classes, short side {side} (median), resized to {c.augment.resize}, crop {c.augment.crop}",
        f"net: {c.model.name}, {weights:,} weights",
        f"loader: {loader.backend} ({loader.backend_reason}), {loader.threads} threads a rank",
        f"decoder: {loader.decoder()}",
        *filter(None, [loader.cost]),
        f"compiled: {t.stepper.compiled}",
        *c.behind_the_end(),
        *["warning: the set has one class, so top-1 is always 1"] * (classes == 1),
        *advice(c, images=loader.split.samples, short_side=side, weights=weights),
    ):
        t.record.log(line)
    if c.optim.scale_lr != "none":
        t.record.log(f"optim.lr: {c.optim.lr:g} × {c.train.batch} / {c.optim.base_batch} = {t.optim.lr:g}")
    t.loader.load()
    t.val_loader.load()
    t.tick(DATA)
    t.watchdog.start()
    t.stop.running = True


def is_over(t: Trainer) -> bool:
    """Whether nothing is left to train or to evaluate."""
    train, state = t.config.train, t.state
    reached = 0 < train.stop_at <= state.best_top1
    return state.epoch >= train.epochs or reached or (t.at_limit and not t.evaluation_is_missing)


def rest_of_epoch(t: Trainer) -> Iterator[Batch]:
    """Yields the remaining batches of the epoch; none if only its evaluation is missing."""
    if t.evaluation_is_missing:
        return
    t.enter_epoch()
    train = t.config.train
    left = (t.steps_per_epoch - t.loader.state_dict()["step"]) * train.batch
    epoch = f"epoch {t.state.epoch + 1}/{train.epochs}"
    t.progress = Progress(epoch, left, enabled=t.accelerator.is_main_process)
    t.loader.stats()  # resets the counters
    t.meter.begin()
    wait_for_data(t)
    for batch in t.loader:
        yield batch
        t.progress.update(train.batch, t.progress.note)
        wait_for_data(t)


def wait_for_data(t: Trainer) -> None:
    t.tick(DATA)
    t.profile.waits()


def end_epoch(t: Trainer) -> None:
    """Logs losses that were not read yet, including those restored by a resumed run, and the epoch's means."""
    if t.progress:
        t.progress.close()
    t.profile.end_epoch()
    t.raise_if_bad(t.finite.rest())
    if t.meter.steps:
        log(t)
    if t.meter.all_steps:
        part = f", {t.within_epoch} of {t.steps_per_epoch} steps" if t.within_epoch else ""
        means = t.meter.whole()
        t.record.log(
            f"epoch {t.state.epoch + 1}/{t.config.train.epochs}{part}: loss {means['loss']:.4f}, lr {t.state.rate:.4g},"
            f" {means['images_per_second']:,.0f} img/s, waiting for data {means['data_wait']:.0%},"
            f" {clock(means['seconds'])}"
        )
    t.meter = Meter(t.accelerator, t.config.train.batch)


def log(t: Trainer) -> None:
    """Records the means since the last reading. Only here does the host wait for the device."""
    state, means = t.state, t.meter.read(t.loader) | {"bad_samples": len(t.loader.bad.found)}
    means |= {"lr": state.rate, "memory_gb": environment.memory_gb(t.accelerator.device)}
    if t.accelerator.scaler is not None:
        means["overflows"] = state.overflows
    t.record.write("train", state.step, {"epoch": state.epoch + 1, **means})
    busy = f" ({stages.shares(means)})" if means["data_wait"] > SLOW else ""
    queue = f", queue {means['queue_depth']:.1f}" if "queue_depth" in means else ""
    left = (t.last_step - state.step) / (means["images_per_second"] / t.config.train.batch)
    if t.progress:
        t.progress.note = (
            f"loss {means['loss']:.4f}, lr {state.rate:.3g}, wait {means['data_wait']:.0%}{busy}{queue},"
            f" {means['memory_gb']:.1f} GB, run ends in {clock(left)}"
        )


def evaluate_epoch(t: Trainer) -> Evaluation | None:
    """Evaluates after an epoch, if it is due by train.eval_every, and counts the epoch as done."""
    state, number = t.state, t.state.epoch + 1
    on_schedule = number % t.config.train.eval_every == 0
    is_due = on_schedule or number >= t.config.train.epochs
    if not is_due and not t.at_limit:
        state.epoch = number
        return None
    result = count(t)
    if not math.isfinite(result.weights.loss):  # never saved: a run that resumed from it could not recover
        raise LossNotFinite(
            f"the validation loss of epoch {number} is {result.weights.loss:.6g}; nothing of it is saved; try a lower"
            f" optim.lr than {t.config.optim.lr}",
            facts={"step": state.step},
        )
    state.epoch = number
    # An evaluation that only limit_steps asks for must not change the run that resumes after it.
    if is_due and (state.best_step is None or result.best.top1 > state.best_top1):
        state.best_top1, state.best_step = result.best.top1, state.step
    if t.optim.schedule == "plateau" and on_schedule and state.plateau.see(result.weights.top1, t.optim):
        t.record.log(f"top-1 has stalled: the learning rate falls to {state.rate * t.optim.factor:.4g}")
    record_evaluation(t, result, epoch=number)
    return result


def count(t: Trainer) -> Evaluation:
    """Evaluates the net, and the average of its weights if there is one."""

    def after_each_batch() -> None:
        t.tick(EVALUATING)
        stop, found = t.agreement.largest(t.stop_request(), bad.unshared)
        if found:
            bad.share(t.agreement.from_all)
        if stop:
            save_and_stop(t, stop)

    results, bad = [], t.val_loader.bad
    for net in t.stepper.nets:
        broadcast([*net.buffers()])  # batch statistics differ between ranks; rank 0's are evaluated and saved
        t.showcase.begin()
        results.append(evaluate(net, t.val_loader, t.accelerator, between=after_each_batch, see=t.showcase.see))
        bad.share(t.agreement.from_all)  # those of the last batch, which some ranks do not have
    return Evaluation(*results)


def record_evaluation(t: Trainer, evaluation: Evaluation, *, epoch: int) -> None:
    t.showcase.store(t.stepper.bare, t.loader, epoch=epoch, step=t.state.step)
    for kind, result in zip(("val", "val of average"), evaluation):
        if result:
            t.record.write(kind, t.state.step, {"epoch": epoch, **result._asdict()})
            top5 = f", top-5 {result.top5:.2%}" if len(t.loader.dataset.classes) > BEST else ""
            done = f"epoch {epoch}/{t.config.train.epochs}"
            t.record.log(f"{done}: {kind} top-1 {result.top1:.2%}{top5}, loss {result.loss:.4f}")


def last_figures(t: Trainer) -> Evaluation:
    """Evaluates a run that ends within an epoch, by limit_steps, or that was over before it began."""
    if t.within_epoch:
        save(t)
    result = count(t)
    if t.within_epoch:
        record_evaluation(t, result, epoch=t.state.epoch + 1)
    return result


def save(t: Trainer) -> None:
    """Copies the state to save; the copy is written while training continues."""
    t.tick(SAVING)
    t.raise_if_bad(t.finite.rest())
    meter, scaler, average = t.meter.state_dict(), t.accelerator.scaler, t.stepper.average
    if t.accelerator.is_main_process:
        t.saver.save(
            t.state.step,
            model=t.stepper.bare.state_dict(),
            optimizer=t.stepper.optimizer.state_dict(),
            average={} if average is None else average.state_dict(),
            state={
                **dataclasses.asdict(t.state),
                "loader": t.loader.state_dict(),
                "val_bad": sorted(t.val_loader.bad.found),
                "meter": meter,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "config": t.fixed,
                "epochs": t.config.train.epochs,
                "ranks": t.accelerator.num_processes,
            },
        )


def finish_saving(t: Trainer) -> None:
    """Waits, at all ranks, until the last checkpoint is on the disk. Raises StorageError."""
    t.tick(SAVING)
    t.saver.finish(t.state.step)


def save_and_stop(t: Trainer, stop: int) -> None:
    """Saves, waits until the checkpoint is on the disk, and raises Preempted; all ranks are at the same step."""
    save(t)
    finish_saving(t)
    reason = f"stopped by {signals.describe(stop, world=t.accelerator.num_processes)}"
    if t.accelerator.is_main_process:
        with contextlib.suppress(OSError):  # the next run must not stop because of it
            (t.folder.path / signals.STOP_FILE).unlink()
        t.folder.write_exit(code=Preempted.code, reason=reason, step=t.state.step)
    t.agreement.largest(0)  # a rank that ends early makes launchers end the others
    raise Preempted(f"{reason}; step {t.state.step} is saved, and the same command resumes from there")
