"""Pictures for a report, kept in the run folder: training crops, kernels, predictions and confusions.

Rank 0 rewrites the file at each evaluation, at most 20 MB. It changes nothing that the run computes, and ignores a full
disk, which checkpoints and metrics report. Pictures are PNGs, in base64.
"""

import base64
import contextlib
import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import StorageError
from pipeline.files import Json, read_object, write_json
from pipeline.read.augment import normalisation
from pipeline.read.loader import Batch, Loader

from .evaluation import best_classes, confusions
from .run_folder import SHOWCASE

EPOCHS = 3  # epochs whose crops of the same images are kept
IMAGES = 12
CROP_BYTES = 15_000_000  # of all crops
SIDE = 256  # of a validation image's thumbnail


class Showcase:
    """on: whether anything is kept. step: of the checkpoint from which the run resumes; -1: none."""

    def __init__(self, run: Path, accelerator: Accelerator, *, on: bool, step: int) -> None:
        self.path, self.accelerator, self.on = run / SHOWCASE, accelerator, on
        self.writes = on and accelerator.is_main_process
        self._crops = [crop for crop in read_object(self.path).get("crops", []) if crop["step"] <= step]
        self._pixels: list[np.ndarray] = []  # of the crops since the last evaluation
        self._chosen: np.ndarray | None = None

    def keep_crops(self, batch: Batch, loader: Loader, *, epoch: int, step: int) -> None:
        """Keeps the chosen images of a batch, as the loader delivered them. epoch: from 0; step: from 1."""
        if not self.writes or epoch >= EPOCHS:
            return
        if self._chosen is None:
            self._chosen = in_every_epoch(loader)
        for row in np.flatnonzero(np.isin(batch.ids.numpy(), self._chosen)).tolist():
            image = batch.images[row].cpu()
            self._pixels.append(as_pixels(image, loader))
            self._crops.append(
                {
                    "epoch": epoch + 1,
                    "step": step,
                    "id": int(batch.ids[row]),
                    "label": int(batch.labels[row]),
                    "sha256": hashlib.sha256(image.numpy().tobytes()).hexdigest(),
                    "png": png(self._pixels[-1]),
                }
            )

    def begin(self) -> None:
        """Discards the predictions of another net, or of an evaluation that was stopped."""
        self._seen: list[Tensor] = []
        self._predictions: list[Json] = []

    def see(self, batch: Batch, logits: Tensor, loader: Loader) -> None:
        """Keeps the predictions for a batch of the validation images."""
        if not self.on:
            return
        self._seen.append(torch.stack([batch.labels, logits.argmax(1)]))
        every = -(-loader.samples // self.accelerator.num_processes // IMAGES)  # rank 0 has the first ids
        for row in np.flatnonzero(batch.ids.numpy() % every == 0).tolist() if self.writes else ():
            best = [found[0].tolist() for found in best_classes(logits[row, None])]
            picture = png(as_pixels(batch.images[row], loader), side=SIDE)
            self._predictions.append({"label": int(batch.labels[row]), "best": best, "png": picture})

    def store(self, net: nn.Module, loader: Loader, *, epoch: int, step: int) -> None:
        """Writes the pictures, with the predictions of the last evaluated net. Collective. loader: for training."""
        if not self.on:
            return
        labels, best = np.concatenate(gather_object([seen.cpu().numpy() for seen in self._seen]), axis=1)
        if not self.writes:
            return
        names, index, sheets = loader.dataset.class_names, loader.split.index, {"kernels": kernels(net)}
        shown = {
            "epoch": epoch,
            "classes": names,
            "counts": np.bincount(index["label"] + 1, minlength=len(names) + 1)[1:].tolist(),
            "medians": {name: int(np.median(index[name])) for name in ("width", "height", "size")},
            "confusions": confusions(labels, best, names),
            "predictions": self._predictions,
            "kernels": [png(kernel) for kernel in sheets["kernels"]],
            "towers": getattr(net, "towers", 1),
            "crops": self._crops,
        }
        if self._pixels:
            size = len(self._pixels[-1])  # it may have grown since the last evaluation
            sheets["crops"], self._pixels = np.stack([one for one in self._pixels if len(one) == size]), []
        with contextlib.suppress(OSError, StorageError):
            write_json(self.path, shown)
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images(sheets, step=step, dataformats="NHWC")


def in_every_epoch(loader: Loader) -> np.ndarray:
    """Returns ids that this rank gets in each of the first EPOCHS epochs, in the order of the first."""
    third, second, first = (
        np.concatenate([loader.ids(epoch, step) for step in range(len(loader))]) for epoch in reversed(range(EPOCHS))
    )
    common = first[np.isin(first, second) & np.isin(first, third)]
    # At the worst, 4 bytes in base64 for 3 of pixels
    return np.asarray(common[: min(IMAGES, CROP_BYTES // (EPOCHS * 4 * loader.augment.crop**2))])


def as_pixels(image: Tensor, loader: Loader) -> np.ndarray:
    """(crop, crop, 3) uint8: an image as the net gets it, without its normalisation."""
    normal = normalisation(loader.augment, loader.dataset)
    zero = normal.mean[:, None, None] if normal.image is None else normal.image
    grey = image.float().cpu().numpy() * np.reshape(normal.std, (3, 1, 1)) + zero
    return grey.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def kernels(net: nn.Module) -> np.ndarray:
    """(n, side, side, 3) uint8: those of the first convolution that sees RGB, as in Krizhevsky et al. 2012, figure 3.

    A kernel's least weight is black, its greatest white.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            weights = module.weight.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
            weights = weights - weights.min((1, 2, 3), keepdims=True)
            return np.asarray(255 * weights / weights.max((1, 2, 3), keepdims=True).clip(1e-12), np.uint8)
    return np.empty(0)


def png(pixels: np.ndarray, *, side: int = 1 << 16) -> str:
    """Returns a PNG in base64. side: largest side; a larger picture is scaled down."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
