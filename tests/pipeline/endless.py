"""Loads epochs until it is interrupted: SHARDS BACKEND close|leave; `leave` ends without closing the loader."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipeline import AugmentConfig, Loader, LoaderConfig  # noqa: E402 (the path comes first)

loader = Loader(sys.argv[1], batch=32, augment=AugmentConfig(resize=16, crop=12), config=LoaderConfig(sys.argv[2]))
try:
    while True:
        for _ in loader:
            print("batch", flush=True)
except KeyboardInterrupt:
    if sys.argv[3] == "close":
        loader.close()
    raise
