#!/usr/bin/env python3
"""Checks whether the training in this container is alive: 0 healthy, 1 not, with one line that gives the reason.

    HEALTHCHECK CMD ["python3", "/opt/imagenet-express/docker/healthcheck.py"]
    livenessProbe: {exec: {command: [python3, /opt/imagenet-express/docker/healthcheck.py, --begin, "1800"]},
                    periodSeconds: 30, timeoutSeconds: 10}

Each rank writes heartbeat/rank-NNNNN.json into the run folder at least every ten seconds, also while it saves; the
latest one of this host counts. If one rank hangs while others run, the watchdog ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path

# Written by docker/entrypoint.sh when it starts a training: its time and the run folder.
STATE = os.environ.get("IMAGENET_EXPRESS_STATE") or str(Path(tempfile.gettempdir()) / "imagenet-express.run")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--age", type=float, default=60, help="seconds that the youngest beat may be old (%(default)s)")
    p.add_argument("--begin", type=float, default=600, help="seconds until there must be one (%(default)s)")
    args = p.parse_args()
    try:
        started, folder = Path(STATE).read_text(encoding="utf-8").rstrip("\n").split(" ", 1)
    except (OSError, ValueError):
        print("healthy: no training was started here")
        return 0
    now = time.time()
    beats = [t for t in ours(Path(folder)) if t >= float(started) - 1]  # older ones are of an earlier start
    since = now - (max(beats) if beats else float(started))
    healthy = since <= (args.age if beats else args.begin)
    what = "the youngest heartbeat is of" if beats else "training has not begun; started"
    print(f"{'healthy' if healthy else 'unhealthy'}: {what} {since:.0f} s ago ({folder})")
    return 0 if healthy else 1


def ours(folder: Path) -> list[float]:
    """The times of the latest heartbeats of this host's ranks."""
    times = []
    for path in folder.glob("heartbeat/rank-*.json"):
        try:
            beat = json.loads(path.read_text(encoding="utf-8"))
            if beat["host"] == socket.gethostname():
                times.append(float(beat["time"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being replaced, or cleared by a new start
    return times


if __name__ == "__main__":
    raise SystemExit(main())
