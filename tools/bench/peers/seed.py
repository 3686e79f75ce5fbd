"""The seed's loader: torchvision's ImageFolder and a DataLoader of two workers, on the original files."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torchvision import datasets, transforms

from tools.bench.peers.common import arguments, measure


def main() -> None:
    a = arguments()
    view = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(256),
            transforms.RandomCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(a.data), view),
        batch_size=a.batch,
        shuffle=True,
        num_workers=a.threads,
        persistent_workers=True,
    )

    def batches():
        while True:
            for images, _ in loader:
                yield len(images)

    stream = batches()
    measure(lambda: next(stream), a.seconds)


if __name__ == "__main__":
    main()
