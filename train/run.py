"""Trains an AlexNet on shards.

    python train/run.py demo --data.shards shards/digits
    accelerate launch --config_file docker/accelerate/8gpu.yaml train/run.py seed --data.shards /data/shards

The same command again resumes from the newest checkpoint that verifies. SIGTERM, SIGUSR1, SIGINT, SIGHUP (unless
nohup ignores it) or a file named `stop` in the run folder: saves at the next step and exits with 75.

The last line on success: val top1=… top5=… images=… (fractions, and how many images were counted).
Exit codes of each process, and in exit.json: 0 done, 1 a check failed or a rank was lost, 2 usage, 65 bad data,
74 I/O failed or disk full, 75 stopped and saved, 76 non-finite loss or gradients, 77 hang.
"""

import os
import sys
from functools import partial
from pathlib import Path

if not __package__:  # started as a file: the packages lie beside this folder, not inside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline import streams
from pipeline.errors import CHECK_FAILED, DONE, HANG, leave
from train.environment import check_launch, launched
from train.exit_report import ExitReport
from train.run_folder import RunFolder
from train.signals import Stop, heed_no_more

# Threads that wait sleep: if they spin, they take cores from other work and from the threads that they wait for
# (docs/results.md). Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
PARENT = os.getppid()  # the launcher, if there is one; it may have ended before the run is built


def main(argv: list[str]) -> int:
    """Returns the process's exit code."""
    stop, report = Stop(), ExitReport()
    stop.install()
    try:
        with report:
            check_launch()
            # Imported here and below: a mistyped preset is reported before torch is loaded.
            from train.cli import parse

            config = parse(argv)
            folder = RunFolder(Path(config.run.dir))
            report.config, report.folder = config, folder
            if not launched("RANK"):  # before torch is imported and compiles, which can take half a minute
                print(f"network {config.model.name}, data {config.data.shards}, run folder {config.run.dir}")

            from train.build import build_trainer
            from train.loop import train

            run = build_trainer(config, folder=folder, stop=stop)
            report.trainer = run
            if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
                run.watchdog.parent = PARENT  # a launcher, which outlives the run; a shell need not
            run.watchdog.on_hang = partial(report.write, HANG)
            stop.at_second = partial(report.write, CHECK_FAILED)
            result = train(run)
            run.close()
            if run.accelerator.is_main_process:
                folder.write_exit(code=DONE, reason="done", step=run.state.step)
                print(result)
    finally:
        heed_no_more()
    report.write_page()
    return report.code


if __name__ == "__main__":
    streams.prepare(outlive_readers=True)
    try:
        leave(main(sys.argv[1:]))
    except KeyboardInterrupt:  # a second time
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
