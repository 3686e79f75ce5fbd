"""What training needs to know of all images: sums in whole numbers, exact in any order and over any workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write
from ..shards import file_sha256
from .pixels import Sums


class Statistics:
    """Of the images' centre squares of `size` pixels, in grey levels."""

    def __init__(self, size: int) -> None:
        self.size, self.images, self.pixels = size, 0, 0
        self.sum_image = np.zeros(3 * size * size, np.int64)
        self.sums = np.zeros(3, np.int64)
        self.products = np.zeros(6, np.int64)  # rr, rg, rb, gg, gb, bb

    def add(self, sums: Sums) -> None:
        self.images += sums.images
        self.pixels += sums.pixels
        self.sum_image += sums.image
        self.sums += sums.channels
        self.products += sums.products

    def publish(self, folder: Path, name: str) -> dict[str, Any]:
        """Writes the mean image as `name` and returns all else for the manifest, with the file's sha256."""
        mean = self.sums / self.pixels
        rr, rg, rb, gg, gb, bb = self.products / self.pixels
        covariance = np.array([[rr, rg, rb], [rg, gg, gb], [rb, gb, bb]]) - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(covariance)
        vectors *= np.sign(vectors[np.abs(vectors).argmax(0), [0, 1, 2]])  # either direction is one; this is ours
        mean_image = (self.sum_image / self.images).reshape(self.size, self.size, 3)
        with atomic_write(folder / name) as file:
            np.save(file, mean_image.astype(np.float32), allow_pickle=False)
        return {
            "mean": mean.tolist(),
            "std": np.sqrt(np.diag(covariance)).tolist(),
            "covariance": covariance.tolist(),
            "eigenvalues": values.round(9).tolist(),  # the last digits depend on the machine's linear algebra
            "eigenvectors": vectors.T.round(9).tolist(),  # each a row, of unit length, in the order of the values
            "mean_image": {"file": name, "sha256": file_sha256(folder / name)},
        }
