"""DALI's own readers.webdataset on the same shards, set up as its users do: buffer shuffle, DALI's random operators."""

from __future__ import annotations

from collections.abc import Iterator

from nvidia.dali import fn, pipeline_def, types

from tools.bench.peers.webdataset_pillow import tars_of

NORMALISED = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "dtype": types.FLOAT}
BYTES = {"mean": [0.0], "std": [1.0], "dtype": types.UINT8}


def batches(data: str, batch: int, threads: int, dtype: str) -> Iterator[int]:
    tars, presized = tars_of(data)

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar[: -len("tar")] + "idx" for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=256,
            name="reader",
        )
        position = {f"crop_pos_{axis}": fn.random.uniform(range=(0.0, 1.0)) for axis in "xy"}
        if presized:
            images = fn.decoders.image_crop(encoded, crop=(224, 224), output_type=types.RGB, **position)
        else:
            images = fn.decoders.image(encoded, output_type=types.RGB)
            images = fn.crop(fn.resize(images, resize_shorter=256, antialias=True), crop=(224, 224), **position)
        how = BYTES if dtype == "uint8" else NORMALISED
        return fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), output_layout="CHW", **how)

    pipe = pipeline()
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield len(images)
