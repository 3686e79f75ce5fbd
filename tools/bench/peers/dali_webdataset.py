"""DALI's own readers.webdataset on the same shards, set up as its users do: buffer shuffle, DALI's random operators."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from nvidia.dali import fn, pipeline_def, types

from tools.bench.peers.common import arguments, measure


def main() -> None:
    a = arguments()
    manifest = json.loads((a.data / "manifest.json").read_text())
    tars = [str(a.data / shard["name"]) for shard in manifest["splits"]["train"]["shards"]]
    presized = manifest["options"]["encoding"]["kind"] == "jpeg"
    gpu = a.device.startswith("cuda")
    decoding = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB}

    @pipeline_def(batch_size=a.batch, num_threads=a.threads, device_id=0 if gpu else None)
    def pipeline():
        encoded, _ = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar[: -len("tar")] + "idx" for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=256,
            name="reader",
        )
        where = {"crop_pos_x": fn.random.uniform(range=(0.0, 1.0)), "crop_pos_y": fn.random.uniform(range=(0.0, 1.0))}
        if presized:
            images = fn.decoders.image_crop(encoded, crop=(224, 224), **where, **decoding)
        else:
            images = fn.resize(fn.decoders.image(encoded, **decoding), resize_shorter=256, antialias=True)
            images = fn.crop(images, crop=(224, 224), **where)
        return fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=[0.0] if a.dtype == "uint8" else [123.675, 116.28, 103.53],
            std=[1.0] if a.dtype == "uint8" else [58.395, 57.12, 57.375],
            dtype=types.UINT8 if a.dtype == "uint8" else types.FLOAT,
            output_layout="CHW",
        )

    pipe = pipeline()
    pipe.build()

    def next_batch() -> int:
        (images,) = pipe.run()
        return len(images)

    measure(next_batch, a.seconds)


if __name__ == "__main__":
    main()
