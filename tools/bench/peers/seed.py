"""The seed's loader: torchvision's ImageFolder and a DataLoader of two workers, on the original files."""

from collections.abc import Iterator

from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def batches(images: str, shards: str, batch: int, threads: int) -> Iterator[int]:
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
    folder = datasets.ImageFolder(images, view)
    loader = DataLoader(folder, batch_size=batch, shuffle=True, num_workers=threads, persistent_workers=True)
    while True:
        for crops, _ in loader:
            yield len(crops)
