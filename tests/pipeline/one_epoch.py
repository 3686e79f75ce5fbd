"""Loads an epoch of training and of evaluation: SHARDS BACKEND verify|trust.

Prints as JSON the bad samples, a checksum of each image of evaluation, and the most memory that was in use.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipeline import AugmentConfig, Loader, LoaderConfig, open_dataset  # noqa: E402 (the path comes first)

shards, backend, verify = sys.argv[1:]
dataset = open_dataset(shards)
config = LoaderConfig(backend, verify=verify == "verify", max_bad_samples=dataset.split("train").samples, threads=2)
view = AugmentConfig(resize=64, crop=56)
found: dict[str, object] = {"bad": {}}
for train in (False, True):
    with Loader(dataset, batch=32, train=train, dtype="uint8", augment=view, config=config) as loader:
        images = {
            i: zlib.crc32(image.numpy()) for batch in loader for i, image in zip(batch.ids.tolist(), batch.images)
        }
        found |= {} if train else {"images": images}
        found["bad"] |= {i: reason.split(": ", 2)[2] for i, reason in loader.bad.found.items()}
with open("/proc/self/status") as status:
    found["peak_mb"] = next(int(line.split()[1]) / 1e3 for line in status if line.startswith("VmHWM"))
print(json.dumps(found))
