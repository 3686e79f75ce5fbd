"""Wrong pixels are found and named; right ones are not suspected."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
import torch

from pipeline import AugmentConfig, Loader, LoaderConfig
from pipeline.errors import BadSample, ConfigError
from pipeline.read import pixel_check
from pipeline.read.pixel_check import largest_tile_mean
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import Digits

BATCH = 256


@pytest.fixture(scope="module")
def digits_jpeg(tmp_path_factory):
    """1,797 digits of 36 pixels as JPEGs."""
    root = tmp_path_factory.mktemp("digits")
    build(Plan(Digits(side=36), Options(Encoding("jpeg", 36, quality=90))), root, workers=1)
    return root


def run(loader: Loader, steps: int) -> None:
    """Loads `steps` batches over several epochs, with pauses in which the checks run, as a network's steps would be."""
    done = 0
    while done < steps:
        for _ in loader:
            while loader._check._pool._work_queue.qsize() > 4:
                time.sleep(0.001)
            done += 1
            if done == steps:
                return


def corrupt(loader: Loader, share: float, seed: int = 0) -> list[int]:
    """Overwrites a block of 16 × 16 pixels in a fraction of the crops, like a decoder that reuses freed memory.
    Returns the list that the samples' ids are added to."""
    rng, next_batch, damaged = np.random.default_rng(seed), loader._engine.next, []

    def next_damaged():
        work, images = next_batch()
        for row in np.flatnonzero(rng.random(len(images)) < share).tolist():
            y, x = rng.integers(0, images.shape[-1] - 15, 2)
            images[row, :, y : y + 16, x : x + 16] = 255 - images[row, :, y : y + 16, x : x + 16]
            damaged.append(int(work.ids[row]))
        return work, images

    loader._engine.next = next_damaged
    return damaged


@pytest.mark.parametrize(("every", "steps"), [(5, 20), pytest.param(250, 1000, marks=pytest.mark.slow)])
def test_one_crop_in_a_hundred_that_is_damaged_is_found_within_1000_steps(every, steps, digits_jpeg, caplog):
    """1,024 crops are checked, which miss the damage with a chance of 0.99^1024 = 3e-5. A GPU's default is 250."""
    view = AugmentConfig(resize=36, crop=32)
    config = LoaderConfig("dali-cpu", verify_pixels=every)
    with Loader(digits_jpeg, batch=BATCH, dtype="uint8", augment=view, config=config) as loader:
        damaged = corrupt(loader, 0.01)
        with caplog.at_level(logging.WARNING):
            run(loader, steps)
        loader._check.close()
        stats, decoder = loader.stats(), loader.decoder()
    assert stats["pixels_different"] >= 1
    assert 0.99 ** stats["pixels_checked"] < 1e-4
    # No damaged crop passed the check: about 1 % of the checked ones were found.
    assert 1 <= stats["pixels_different"] <= 30
    line = caplog.records[0].getMessage()
    assert int(line.split("sample ")[1].split()[0]) in damaged
    assert f"dali-cpu ({decoder}) on cpu made other pixels than libjpeg-turbo" in line
    assert len(caplog.records) <= pixel_check.LOGGED


@pytest.mark.parametrize(("every", "steps"), [(2, 8), pytest.param(25, 98, marks=pytest.mark.slow)])
def test_no_false_alarm_in_the_checks_of_a_million_clean_crops(every, steps, digits_jpeg):
    """On a GPU, 4,000 crops of a million are checked; here more of fewer, for as many checks."""
    view = AugmentConfig(resize=36, crop=32)
    config = LoaderConfig("dali-cpu", verify_pixels=every)
    with Loader(digits_jpeg, batch=1024, dtype="uint8", augment=view, config=config) as loader:
        run(loader, steps)
        loader._check.close()
        stats = loader.stats()
    assert stats["pixels_different"] == 0
    assert stats["pixels_checked"] + loader._check.left_out > 3500


VIEWS = {
    "presized": AugmentConfig(),
    "resized": AugmentConfig(resize=144, crop=128),
    "random resized, mean and deviation": AugmentConfig(crop=96, scale_jitter=(0.1, 1.0), normalize="mean-std"),
    "colour": AugmentConfig(colour=0.1),
    "mean image": AugmentConfig(normalize="mean-image"),
}


@pytest.mark.parametrize("backend", ["dali-cpu", "portable"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_kind_of_crop_is_compared_in_grey_levels(shards, view, dtype, backend):
    if view == "colour" and dtype == "uint8":
        pytest.skip("uint8 batches hold plain pixels")
    config = LoaderConfig(backend, verify_pixels=1, verify_action="stop")
    found = []
    for damage in (0.0, 1.0):
        with Loader(
            shards["jpeg"], batch=4, dtype=dtype, channels_last=True, augment=VIEWS[view], config=config
        ) as loader:
            if damage:
                corrupt_all(loader)
            next(iter(loader))
            loader._check.close()
            found.append(loader.stats())
    assert [(stats["pixels_checked"], stats["pixels_different"]) for stats in found] == [(4, 0), (4, 4)]


def corrupt_all(loader: Loader) -> None:
    next_batch = loader._engine.next

    def next_damaged():
        work, images = next_batch()
        images[:, :, 20:40, 30:50] = images[:, :, 20:40, 30:50].flip(0, 3) // 2 + 60
        return work, images

    loader._engine.next = next_damaged


def test_ten_views_of_an_image_are_checked_one_at_a_time(shards):
    config = LoaderConfig("dali-cpu", verify_pixels=1)
    view = AugmentConfig(views=10)
    with Loader(shards["jpeg"], batch=4, train=False, augment=view, config=config) as loader:
        assert len(list(loader)) == 3
        loader._check.close()
        stats = loader.stats()
    assert (stats["pixels_checked"], stats["pixels_different"]) == (12, 0)


def test_stop_ends_the_iteration_with_the_sample_named(shards):
    config = LoaderConfig("dali-cpu", verify_pixels=1, verify_action="stop")
    with Loader(shards["jpeg"], batch=4, augment=AugmentConfig(), config=config) as loader:
        corrupt_all(loader)
        with pytest.raises(BadSample, match=r"\.tar: sample \d+ \(.*made other pixels than libjpeg-turbo, by \d+ grey"):
            run(loader, 10_000)


def test_cpus_check_nothing_unless_asked(shards):
    with Loader(shards["jpeg"], batch=4, augment=AugmentConfig(), config=LoaderConfig("dali-cpu")) as loader:
        next(iter(loader))
        assert not [name for name in loader.stats() if "pixels" in name]


def test_the_chosen_crops_are_a_function_of_the_coordinates(digits_jpeg):
    chosen = []
    for world in (1, 2):
        ids = set()
        for rank in range(world):
            config = LoaderConfig("portable", verify_pixels=10)
            view = AugmentConfig(resize=36, crop=32)
            with Loader(digits_jpeg, batch=64, rank=rank, world=world, augment=view, config=config) as loader:
                planned = loader.plan.steps(0, range(len(loader)), loader._reader.rows)
                ids |= set(planned.ids[planned.checked].tolist())
        chosen.append(ids)
    assert chosen[0] == chosen[1]
    assert 80 < len(chosen[0]) < 210


def test_what_cannot_be_checked_in_time_is_left_out_and_counted(shards, monkeypatch):
    monkeypatch.setattr(pixel_check, "WAITING", 0)
    config = LoaderConfig("dali-cpu", verify_pixels=1)
    with Loader(shards["jpeg"], batch=4, augment=AugmentConfig(), config=config) as loader:
        next(iter(loader))
        assert loader._check.left_out == 4


def test_a_tile_stands_out_where_a_mean_would_hide_it():
    difference = np.zeros((224, 224), np.float32)
    difference[40:48, 64:72] = 100
    assert difference.mean() < 0.2
    assert largest_tile_mean(difference) == 25
    assert largest_tile_mean(difference[:50, :70]) >= 25
    assert largest_tile_mean(np.full((3, 5), 7.0)) == 7
    assert largest_tile_mean(np.array([[0.0, np.nan]])) == np.inf


@pytest.mark.parametrize("bad", [{"verify_pixels": -2}, {"verify_action": "shout"}])
def test_other_settings_are_rejected_by_name(bad):
    with pytest.raises(ConfigError, match=rf"loader\.{next(iter(bad))}=.*(choose|must be)"):
        LoaderConfig(**bad)


def test_training_counts_the_checks_of_all_ranks_in_its_metrics(shards):
    from train.metrics import Meter

    class Two:
        num_processes, process_index, device = 2, 0, torch.device("cpu")

        def reduce(self, values, reduction):
            return values * 2 if reduction == "sum" else values

    config = LoaderConfig("dali-cpu", verify_pixels=1)
    with Loader(shards["jpeg"], batch=4, augment=AugmentConfig(), config=config) as loader:
        next(iter(loader))
        loader._check.close()
        meter = Meter(Two(), 4)
        meter.add(torch.tensor(1.0))
        metrics = meter.read(loader)
    assert (metrics["pixels_checked"], metrics["pixels_different"]) == (8, 0)
