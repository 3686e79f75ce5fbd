"""Runs a script of this repository with a fault at one step of one rank: PLANT=WHAT:RANK:STEP, steps from 1.

WHAT: late, before the script starts; nan; sleep, for good; busy, some seconds within one call into C, as a long
backward pass; sides, which prints the sides of every step's images; evaluation, whose begin sends SIGTERM. A rank of -1
means all. sleep and busy make a file named `planted` in the run folder when they begin.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from train import loop  # noqa: E402 (the path comes first)
from train.step import Stepper  # noqa: E402

what, rank, planted = os.environ["PLANT"].split(":")
if what == "late" and rank == os.environ["RANK"]:
    time.sleep(0.6)
untouched, evaluate = Stepper.logits, loop.evaluate


def faulty(self, images, ids, *, step, part=0):
    logits = untouched(self, images, ids, step=step, part=part)
    if what == "sides":
        print(f"step {step + 1} sees {images.shape[2]} x {images.shape[3]}", flush=True)
    if step + 1 != int(planted) or int(rank) not in (-1, self.accelerator.process_index):
        return logits
    if what in ("sleep", "busy"):
        (Path(sys.argv[sys.argv.index("--run.dir") + 1]) / "planted").touch()
    if what == "sleep":
        time.sleep(600)
    if what == "busy":
        begun = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000)
        seconds = time.monotonic() - begun
        # Four seconds: longer than the time within which signals count as one
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(200_000 * 4 / seconds))
        return logits
    return logits * float("nan")


def stopped(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*args, **options)


Stepper.logits = faulty
if what == "evaluation":
    loop.evaluate = stopped
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
