"""What training needs to know of all images: sums in whole numbers, exact in any order and over any workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write
from ..shards import file_sha256
from .images import Measured


class Statistics:
    """Of the images' centre squares of `size` pixels, in grey levels."""

    def __init__(self, size: int) -> None:
        self.images = self.pixels = 0
        self.sum_image = np.zeros((size, size, 3), np.int64)
        self.sums = np.zeros(3, np.int64)
        self.products = np.zeros((3, 3), np.int64)  # of each pair of channels

    def add(self, measured: Measured) -> None:
        self.images += 1
        self.sum_image += measured.square
        self.pixels += len(measured.pixels)
        values = measured.pixels.astype(np.float64)  # products of a square stay far below 2^53: exact, and by BLAS
        self.sums += values.sum(0).astype(np.int64)
        self.products += (values.T @ values).astype(np.int64)

    def merge(self, other: Statistics) -> None:
        self.images += other.images
        self.sum_image += other.sum_image
        self.pixels += other.pixels
        self.sums += other.sums
        self.products += other.products

    def publish(self, folder: Path, name: str) -> dict[str, Any]:
        """Writes the mean image as `name` and returns all else for the manifest, with the file's sha256."""
        mean = self.sums / self.pixels
        covariance = self.products / self.pixels - np.outer(mean, mean)
        with atomic_write(folder / name) as file:
            np.save(file, (self.sum_image / self.images).astype(np.float32), allow_pickle=False)
        return {
            "mean": mean.tolist(),
            "std": np.sqrt(np.diag(covariance)).tolist(),
            "covariance": covariance.tolist(),
            "mean_image": {"file": name, "sha256": file_sha256(folder / name)},
        }
