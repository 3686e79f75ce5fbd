"""DALI's own readers.webdataset on the same shards, set up as its users do: buffer shuffle, DALI's random operators."""

from collections.abc import Iterator

from nvidia.dali import fn, pipeline_def, types

from tools.bench.peers.webdataset_pillow import tars_of


def batches(images: str, shards: str, batch: int, threads: int) -> Iterator[int]:
    tars, presized = tars_of(shards)

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix("tar") + "idx" for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=256,
        )
        position = {f"crop_pos_{axis}": fn.random.uniform(range=(0.0, 1.0)) for axis in "xy"}
        if presized:
            crops = fn.decoders.image_crop(encoded, crop=(224, 224), output_type=types.RGB, **position)
        else:
            resized = fn.resize(fn.decoders.image(encoded, output_type=types.RGB), resize_shorter=256, antialias=True)
            crops = fn.crop(resized, crop=(224, 224), **position)
        return fn.crop_mirror_normalize(crops, dtype=types.UINT8, mirror=fn.random.coin_flip())

    pipe = pipeline()
    pipe.build()
    while True:
        (crops,) = pipe.run()
        yield len(crops)
