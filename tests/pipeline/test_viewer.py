"""The viewer prepares a single image as the loader does; its normalisation survives saving to a file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline import Loader, open_dataset
from pipeline.decode import BadImage, decode
from pipeline.errors import ConfigError
from pipeline.manifest import Statistics
from pipeline.read.augment import AugmentConfig
from pipeline.read.portable import Viewer
from train.model_card import Inputs

SEEN = [
    {"normalize": "mean"},
    {"normalize": "mean-std", "statistics": "imagenet"},
    {"normalize": "mean-image"},
    {"normalize": "mean-std", "square": False},
]


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("seen", SEEN, ids=lambda seen: "-".join(map(str, seen.values())))
@pytest.mark.parametrize("encoding", ["keep", "jpeg"])
def test_a_single_image_is_seen_as_in_its_shards(shards, encoding, seen, views):
    dataset, augment = open_dataset(shards[encoding]), AugmentConfig(views=views, **seen)
    known = Inputs.of(dataset, augment)
    again = Inputs.from_json(json.loads(json.dumps(known.as_json())))
    assert again.as_json() == known.as_json()
    viewer, split = Viewer(augment, again.statistics), dataset.split("val")
    with Loader(dataset, batch=3, split="val", train=False, augment=augment) as loader:
        images = np.concatenate([batch.images.numpy() for batch in loader]).reshape(-1, views, 3, 224, 224)
    for row, expected in zip(split.index, images, strict=True):
        with open(dataset.root / split.shards[row["shard"]].name, "rb") as file:
            file.seek(int(row["offset"]))
            pixels = decode(file.read(int(row["size"])))
        np.testing.assert_allclose(viewer(pixels), expected, rtol=0, atol=1e-5)


def test_statistics_without_a_mean_image_are_rejected():
    with pytest.raises(ConfigError, match="hold no mean image"):
        Viewer(AugmentConfig(normalize="mean-image"), Statistics((0, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0" + bytes(40)])
def test_what_is_no_image_is_named(data):
    with pytest.raises(BadImage):
        decode(data)
