"""webdataset and Pillow in a DataLoader's worker processes, on the same shards, as webdataset's examples do it."""

import json
from collections.abc import Iterator
from pathlib import Path


def tars_of(shards: str) -> tuple[list[str], bool]:
    """The training split's tars, and whether their images have been resized."""
    manifest = json.loads(Path(shards, "manifest.json").read_text())
    tars = [str(Path(shards, shard["name"])) for shard in manifest["splits"]["train"]["shards"]]
    return tars, manifest["options"]["encoding"]["kind"] == "jpeg"


def batches(images: str, shards: str, batch: int, threads: int) -> Iterator[int]:
    import torch
    import webdataset
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    tars, presized = tars_of(shards)
    resize = [] if presized else [v2.Resize(256)]
    view = v2.Compose([*resize, v2.RandomCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), resampled=True)
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(view, int)
    )
    for crops, _ in torch.utils.data.DataLoader(samples, batch_size=batch, num_workers=threads):
        yield len(crops)
