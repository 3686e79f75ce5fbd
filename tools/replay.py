"""Repeats a run up to one step and prints its numbers: loss, gradient norm, samples. The run is only read.

    python tools/replay.py runs/demo 40
    accelerate launch --config_file docker/accelerate/8gpu.yaml tools/replay.py runs/seed 4711

It resumes from the newest checkpoint before that step, or starts from scratch. With the run's own number of ranks, on
the same kind of machine, the numbers are the recorded ones to the last bit; with another number, rounding differs.

Exit codes: 0 printed, 1 the loss is not the recorded one, 2 usage, 65 bad data.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import math
import tempfile
from typing import Any

from pipeline.errors import CHECK_FAILED, ConfigError, DataError
from pipeline.files import Json, read_object, write_json
from pipeline.settings import updated
from pipeline.storage import absolute
from tools import cli
from train.run_folder import EXIT, RunFolder, read_config, read_metrics

SHOWN = 5  # samples
CLOSE = 1e-3  # of a loss, between numbers of ranks


def main() -> None:
    p = cli.Parser(description=__doc__)
    p.path("run", "RUN", "the run folder")
    p.add_argument("step", type=int, metavar="STEP", help="counted from 1, as in metrics.jsonl and exit.json")
    p.option("shards", "", "where the run's data lie now (default: where they lay)", metavar="DIR")
    p.files(json="write the numbers there, with all ids")
    args = p.parse_args()
    if args.step < 1:
        raise ConfigError(f"STEP {args.step}: steps count from 1")
    with tempfile.TemporaryDirectory() as scratch:
        replay(args, Path(scratch))


def replay(args: argparse.Namespace, scratch: Path) -> None:
    from train.build import build_trainer
    from train.checkpoint import Checkpoints
    from train.config import Config
    from train.signals import Stop

    described = read_config(args.run, "config", "ranks", "shards")
    saved, _ = Checkpoints(args.run, keep=1).newest(before=args.step)
    here = {
        "data.shards": absolute(args.shards or described["shards"]),
        "run.dir": str(scratch / "run"),
        "run.record_ids": False,
        "resume": str(saved.path) if saved else "",
    }
    config = updated(updated(Config(), described["config"]), here)
    run = build_trainer(config, folder=RunFolder(Path(config.run.dir), private=True), stop=Stop())
    if args.step > run.total_steps:
        raise ConfigError(f"STEP {args.step}: the run has {run.total_steps} steps")
    begun = run.state.step
    found = measured(run, args.step, args.run)
    same = True
    if run.accelerator.is_main_process:
        epoch, within = divmod(args.step - 1, run.steps_per_epoch)
        print(f"step {args.step}: step {within + 1} of {run.steps_per_epoch} of epoch {epoch + 1}, after step {begun}")
        same = report(
            found,
            recorded_loss(args.run, args.step),
            list(map(run.loader.describe, found["ids"])),
            same_ranks=described["ranks"] == run.accelerator.num_processes,
        )
        if args.json:
            write_json(args.json, {"step": args.step, **found})
    run.close()
    if not same:
        sys.exit(CHECK_FAILED)


def measured(run: Any, step: int, folder: Path) -> Json:
    """Trains up to `step`, counted from 1, and returns its numbers in place of an update; all ranks together.

    folder: of the recorded run, whose evaluations may have lowered the rate.
    """
    import torch

    state = run.state
    evaluations = read_metrics(folder)["val"] if run.optim.schedule == "plateau" else []
    top1 = {line["epoch"]: line["top1"] for line in evaluations}
    while True:
        while state.epoch < run.loader.state_dict()["epoch"]:
            state.epoch += 1
            if state.epoch in top1 and not state.epoch % run.config.train.eval_every:
                state.plateau.see(top1[state.epoch], run.optim)
        run.enter_epoch()
        for batch in run.loader:  # an epoch
            if run.state.step + 1 < step:
                run.step(batch)
                continue
            run.loader.bad.share(run.agreement.from_all)
            losses = run.stepper.backward(batch, step=step - 1)
            gradients = [p.grad for p in run.stepper.bare.parameters() if p.grad is not None]
            return {
                "ids": run.ids_of(step),
                "loss": float(run.accelerator.reduce(losses.mean(), "mean")),
                "gradient_norm": float(torch.nn.utils.get_total_norm(gradients)),
                "losses": run.accelerator.gather(losses.float()).tolist(),
            }


def report(found: Json, recorded: float | None, names: list[str], *, same_ranks: bool) -> bool:
    """Prints what was measured; returns whether the loss is the recorded one, if there is one."""
    loss, losses = found["loss"], found["losses"]
    same, beside = True, "not recorded by itself"
    if recorded is not None:
        equal = loss == recorded or (math.isnan(loss) and math.isnan(recorded))
        same = equal or math.isclose(loss, recorded, rel_tol=0 if same_ranks else CLOSE)
        beside = f"recorded {recorded:.9g}: {'equal' if equal else f'{loss - recorded:+.3g}'}"
    print(f"loss {loss:.9g} ({beside}), gradient norm {found['gradient_norm']:.6g}")
    bad = [i for i, one in enumerate(losses) if not math.isfinite(one)]
    worst = bad or sorted(range(len(losses)), key=lambda i: -losses[i])
    print(f"samples {'whose loss is not finite' if bad else 'of the greatest loss'}:")
    for i in worst[:SHOWN]:
        print(f"  {losses[i]:.6g}  {names[i]}")
    return same


def recorded_loss(folder: Path, step: int) -> float | None:
    """The step's own loss: for a step that ended the run or was skipped, or if the previous step is recorded too."""
    try:
        ended = read_object(folder / EXIT)
        if "ids" in ended and ended.get("step") == step:
            return float(ended["loss"])
        lines = read_metrics(folder)
    except DataError:
        return None
    left_out = {line["bad_step"]: float(line["loss"]) for line in lines["left out"]}
    losses = {line["step"]: line["loss"] for line in lines["train"]} | left_out
    alone = step == 1 or step - 1 in losses
    return losses.get(step) if alone or step in left_out else None


if __name__ == "__main__":
    cli.run(main, ranks=True)
