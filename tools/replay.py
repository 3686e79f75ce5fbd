"""Trains up to one step of a run again and shows its numbers: loss, gradient norm, samples. The run is only read.

    python tools/replay.py runs/demo 40
    accelerate launch --multi_gpu --num_processes 8 tools/replay.py runs/seed 4711

It goes on from the newest checkpoint before that step, or from the start. With the run's own number of ranks, on the
same kind of machine, the numbers are the recorded ones to the last bit; with another number they are rounded otherwise.

Exit codes: 0 shown, 1 the loss is not the recorded one, 2 usage, 65 bad data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import dataclasses
import json
import math
import tempfile
from typing import Any

from pipeline.errors import CHECK_FAILED, ConfigError, DataError
from pipeline.files import write_json
from pipeline.settings import updated
from tools import cli

SHOWN = 5  # samples
CLOSE = 1e-3  # of a loss, between numbers of ranks


def main() -> None:
    p = cli.Parser(prog="replay.py", description=__doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    p.add_argument("step", type=int, metavar="STEP", help="counted from 1, as in metrics.jsonl and exit.json")
    p.add_argument("--shards", default="", metavar="DIR", help="where the run's data lie now (default: where they lay)")
    p.add_argument("--json", type=cli.new_file, metavar="FILE", help="write the numbers there, with all ids")
    args = p.parse_args()
    if args.step < 1:
        raise ConfigError(f"STEP {args.step}: steps count from 1")
    with tempfile.TemporaryDirectory() as scratch:
        replay(args, Path(scratch))


def replay(args: argparse.Namespace, scratch: Path) -> None:
    from train import again
    from train.checkpoint import Checkpoints
    from train.distributed import make_accelerator
    from train.preflight import open_alike
    from train.run_folder import RunFolder
    from train.trainer import Run

    described = read_run(args.run)
    saved = Checkpoints(args.run, keep=1).newest_before(args.step)
    config = configured(described, args.shards or described["shards"], scratch, resume=str(saved) if saved else "")
    dataset = open_alike(config)
    accelerator = make_accelerator(config)
    run = Run(config, accelerator, dataset, folder=RunFolder(Path(config.run.dir), private=True))
    if args.step > run.total_steps:
        raise ConfigError(f"STEP {args.step}: the run has {run.total_steps} steps")
    begun = run.state.step
    found = again.replay(run, args.step)
    if accelerator.is_main_process:
        names = [run.loader.describe(id_) for id_ in found.ids]
        epoch, within = divmod(args.step - 1, run.steps_per_epoch)
        print(f"step {args.step}: step {within + 1} of {run.steps_per_epoch} of epoch {epoch + 1}, after step {begun}")
        same = tell(args.run, args.step, found, described["ranks"] == accelerator.num_processes, names)
        if args.json:
            write_json(args.json, {"step": args.step, **dataclasses.asdict(found)})
    run.close()
    if accelerator.is_main_process and not same:
        sys.exit(CHECK_FAILED)


def read_run(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / "config.json").read_text())
        return {name: described[name] for name in ("config", "ranks", "shards")}
    except FileNotFoundError as err:
        raise DataError(f"{folder}: no run folder: it has no config.json") from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(f"{folder}/config.json: not of a run ({err})") from err


def configured(described: dict[str, Any], shards: str, scratch: Path, *, resume: str) -> Any:
    """The run's configuration; only where it reads from and writes to is another."""
    from train.config import Config

    here = {"data.shards": os.path.abspath(shards), "run.dir": str(scratch / "run"), "run.record_ids": False}
    return updated(updated(Config(), described["config"]), {**here, "resume": resume})


def tell(folder: Path, step: int, found: Any, same_ranks: bool, names: list[str]) -> bool:
    """Prints what was found; returns whether the loss is the recorded one, where there is one."""
    recorded = recorded_loss(folder, step)
    same, beside = True, "not recorded by itself"
    if recorded is not None:
        equal = found.loss == recorded or (math.isnan(found.loss) and math.isnan(recorded))
        same = equal or abs(found.loss - recorded) <= (0 if same_ranks else CLOSE * abs(recorded))
        beside = f"recorded {recorded:.9g}: {'equal' if equal else f'{found.loss - recorded:+.3g}'}"
    print(f"loss {found.loss:.9g} ({beside}), gradient norm {found.gradient_norm:.6g}")
    bad = [i for i, loss in enumerate(found.losses) if not math.isfinite(loss)]
    worst = bad or sorted(range(len(found.losses)), key=lambda i: -found.losses[i])
    print(f"samples {'whose loss is not finite' if bad else 'of the greatest loss'}:")
    for i in worst[:SHOWN]:
        print(f"  {found.losses[i]:.6g}  {names[i]}")
    return same


def recorded_loss(folder: Path, step: int) -> float | None:
    """The step's own loss: of a step that ended the run, that was left out, or, where each was recorded, of any."""
    ended = read_lines(folder / "exit.json", whole=True)
    if ended and "ids" in ended[0] and ended[0].get("step") == step:
        return float(ended[0]["loss"])
    lines = read_lines(folder / "metrics.jsonl")
    for line in lines:
        if line["kind"] == "left out" and line["bad_step"] == step:
            return float(line["loss"])
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    left_out = {line["bad_step"] for line in lines if line["kind"] == "left out"}
    alone = step == 1 or step - 1 in losses or step - 1 in left_out
    return losses.get(step) if alone else None


def read_lines(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """The JSON of each line, or of the whole file; nothing where there is none."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in ([text] if whole else text.splitlines())]
    except (OSError, ValueError):
        return []


if __name__ == "__main__":
    cli.run(main)
