"""Single images as a loader would show them to a net in evaluation: the same crops by the same kernel."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from ..manifest import Statistics
from .augment import AugmentConfig, place
from .kernels import Cropper
from .loader import mean_image_crop


class Viewer:
    """Cuts and normalises decoded images, one at a time: their centre, or ten views where augment.views is 10."""

    def __init__(self, augment: AugmentConfig, statistics: Statistics) -> None:
        self.augment = augment
        self._cropper = Cropper(augment.crop, dtype="float32", packed=False)
        self._cropper.compile(raw=False)
        self._image: np.ndarray | None = None
        mean, std = statistics.mean, statistics.std if augment.normalize == "mean-std" else (1.0, 1.0, 1.0)
        if augment.normalize == "mean-image":
            if statistics.mean_image is None:
                raise ConfigError("augment.normalize=mean-image: the statistics hold no mean image")
            self._image, mean = mean_image_crop(statistics.mean_image, augment), (0.0, 0.0, 0.0)
        self._mean = np.tile(np.array(mean, np.float32), augment.views)
        self._scale = (1 / np.array(std, np.float64)).astype(np.float32)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(views, 3, crop, crop) float32. pixels: (height, width, 3) uint8, RGB."""
        height, width, _ = pixels.shape
        ids, size = np.zeros(1, np.int64), (np.array([width]), np.array([height]))
        placement = place(self.augment, ids, *size, seed=0, epoch=0, train=False)
        views, crop = self.augment.views, self.augment.crop
        out = np.empty(views * 3 * crop * crop, np.float32)
        flat, box = np.ascontiguousarray(pixels).reshape(-1), placement.box.reshape(-1)
        for number in range(views):
            self._cropper(flat, width, height, out, number, box, placement.flip, self._mean, self._scale)
        crops = out.reshape(views, 3, crop, crop)
        return crops if self._image is None else crops - self._image
