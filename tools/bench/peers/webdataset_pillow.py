"""webdataset and Pillow in a DataLoader's worker processes, on the same shards, as webdataset's examples do it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import webdataset
from torchvision.transforms import v2

from tools.bench.peers.common import arguments, measure


def main() -> None:
    a = arguments()
    torch.set_num_threads(1)
    manifest = json.loads((a.data / "manifest.json").read_text())
    tars = [str(a.data / shard["name"]) for shard in manifest["splits"]["train"]["shards"]]
    presized = manifest["options"]["encoding"]["kind"] == "jpeg"
    resize = [] if presized else [v2.Resize(256)]
    view = v2.Compose([*resize, v2.RandomCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    data = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), resampled=True)
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(view, int)
    )
    loader = torch.utils.data.DataLoader(data, batch_size=a.batch, num_workers=a.threads)
    stream = iter(loader)
    measure(lambda: len(next(stream)[0]), a.seconds)


if __name__ == "__main__":
    main()
