"""The synthetic backend: planned ids and labels, noise for pixels, storage left alone."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from pipeline import AugmentConfig, Loader, LoaderConfig, StorageError, open_dataset
from pipeline.read.config import choose_backend

VIEW = AugmentConfig(resize=256, crop=224)
SYNTHETIC = LoaderConfig("synthetic")


def coordinates(root, config: LoaderConfig, **kwargs) -> list[tuple[list[int], list[int]]]:
    with Loader(root, batch=6, seed=3, augment=VIEW, config=config, **kwargs) as loader:
        return [(b.ids.tolist(), b.labels.tolist()) for _ in range(2) for b in loader]


@pytest.mark.parametrize("kwargs", [{}, {"rank": 1, "world": 2}, {"train": False, "split": "val"}])
def test_ids_and_labels_are_those_of_a_backend_that_decodes(shards, kwargs):
    assert coordinates(shards["jpeg"], SYNTHETIC, **kwargs) == coordinates(shards["jpeg"], LoaderConfig(), **kwargs)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16", "bfloat16"])
def test_pixels_are_noise_in_the_form_asked_for(shards, dtype, channels_last):
    options = {"dtype": dtype, "channels_last": channels_last, "augment": VIEW, "config": SYNTHETIC}
    with Loader(shards["jpeg"], batch=3, **options) as loader:
        first, second, *_ = loader
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert first.images.shape == (3, 3, 224, 224)
    assert first.images.dtype is getattr(torch, dtype)
    assert first.images.is_contiguous(memory_format=layout)
    assert first.images.float().std() > 0.9
    assert not torch.equal(first.images, second.images)


def test_ten_views_and_the_mean_image_are_taken_too(shards):
    view = AugmentConfig(resize=256, crop=224, views=10, normalize="mean-image")
    with Loader(shards["jpeg"], split="val", batch=3, train=False, augment=view, config=SYNTHETIC) as loader:
        assert [len(batch.images) for batch in loader] == [3, 1]  # the last batch is short
        batch = next(iter(loader))
    assert batch.images.shape == (3, 10, 3, 224, 224)
    assert batch.images.dtype is torch.float32
    assert batch.images.mean().abs() < 30  # uniform noise minus the mean image


def test_no_byte_of_a_shard_is_read(shards, tmp_path):
    shutil.copytree(shards["jpeg"], tmp_path / "shards")
    dataset = open_dataset(tmp_path / "shards")
    for shard in dataset.split("train").shards:
        os.remove(dataset.root / shard.name)  # a reader that opens it now raises
    with Loader(dataset, batch=3, augment=VIEW, config=SYNTHETIC) as loader:
        assert len(list(loader)) == 4
    with Loader(dataset, batch=3, augment=VIEW) as loader, pytest.raises(StorageError):
        list(loader)


def test_noise_is_not_compared_with_the_stored_images(shards):
    config = LoaderConfig("synthetic", verify_pixels=1, verify_action="stop")
    with Loader(shards["jpeg"], batch=3, augment=VIEW, config=config) as loader:
        for _ in range(3):
            list(loader)
        assert "pixels_different" not in loader.stats()


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_auto_never_chooses_it(device):
    assert choose_backend("auto", torch.device(device))[0] != "synthetic"
