"""The real loader on real files: what it delivers, in what order, and how it ends."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import threading
from concurrent.futures import wait

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipeline import (
    AugmentConfig,
    ConfigError,
    DataError,
    Loader,
    LoaderConfig,
    LoaderDataset,
    StorageError,
    open_dataset,
)
from pipeline.geometry import resized
from pipeline.manifest import Statistics
from pipeline.read.augment import IMAGENET_STATISTICS, place

VIEW = AugmentConfig(resize=256, crop=224)


@pytest.fixture(params=["portable", "dali-cpu"])
def backend(request) -> LoaderConfig:
    return LoaderConfig(backend=request.param)


def reference(root, split: str, sample: int, view: AugmentConfig, *, seed: int, epoch: int, train: bool) -> np.ndarray:
    """(crop, crop, 3), by Pillow, one image at a time: simple code as a reference."""
    s = open_dataset(root).split(split)
    row = s.index[sample]
    data = (s.root / s.shards[row["shard"]].name).read_bytes()[row["offset"] : row["offset"] + row["size"]]
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box, flip = place(view, np.array([sample]), np.array([image.size]), seed=seed, epoch=epoch, train=train)
    width, height = resized(*image.size, view.resize)
    left, top = round(box[0, 0, 0] * width / image.width), round(box[0, 0, 1] * height / image.height)
    image = image.resize((int(width), int(height)), Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + view.crop, top + view.crop))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip[0, 0] else image).astype(int)


def differences(root, split, view, *, config, train, epoch=0):
    """Differences in grey levels between the loader's crops and the reference's, one row per image."""
    out = []
    with Loader(root, split=split, batch=4, train=train, seed=9, dtype="uint8", augment=view, config=config) as loader:
        if epoch:
            loader.load_state_dict({"epoch": epoch, "step": 0})
        for images, _, ids in loader:
            for image, sample in zip(images, ids.tolist()):
                theirs = reference(root, split, sample, view, seed=9, epoch=epoch, train=train)
                out.append(np.abs(image.permute(1, 2, 0).numpy().astype(int) - theirs))
    return np.stack(out)


@pytest.mark.parametrize(
    ("train", "square"),
    [(True, False), (False, True), *(pytest.param(each, each, marks=pytest.mark.slow) for each in (True, False))],
)
def test_presized_crops_are_pillows_to_the_last_bit(shards, train, square, backend):
    view = AugmentConfig(resize=256, crop=224, square=square)
    assert differences(shards["jpeg"], "train", view, config=backend, train=train, epoch=2).max() == 0


@pytest.mark.parametrize("train", [True, False])
def test_resized_crops_are_pillows_within_a_grey_level(shards, train, backend):
    d = differences(shards["keep"], "train", VIEW, config=backend, train=train)
    assert d.mean((1, 2, 3)).max() <= 1
    assert d.max() <= 6
    small = AugmentConfig(resize=40, crop=32, square=False)
    assert differences(shards["keep"], "train", small, config=backend, train=train).mean((1, 2, 3)).max() <= 1


@pytest.mark.slow
def test_real_imagenet_images_match_pillow(imagenet_sample, tmp_path, backend):
    from pipeline.write.build import Options, Plan, build
    from pipeline.write.images import Encoding
    from pipeline.write.sources import ImageFolder

    for name, encoding, limit in (("keep", Encoding(), 1.0), ("jpeg", Encoding("jpeg"), 0.0)):
        build(Plan(ImageFolder(imagenet_sample), Options(encoding)), tmp_path / name, workers=2)
        assert differences(tmp_path / name, "train", VIEW, config=backend, train=True).mean((1, 2, 3)).max() <= limit


def test_labels_and_normalisation(shards, backend):
    dataset = open_dataset(shards["jpeg"])
    index = dataset.split("train").index
    for statistics, normalize, mean, std in (
        ("dataset", "mean", dataset.mean, (1, 1, 1)),
        ("dataset", "mean-std", dataset.mean, dataset.std),
        ("imagenet", "mean-std", IMAGENET_STATISTICS.mean, IMAGENET_STATISTICS.std),
    ):
        view = AugmentConfig(statistics=statistics, normalize=normalize)
        raw = Loader(dataset, batch=4, dtype="uint8", augment=view, config=backend)
        ready = Loader(dataset, batch=4, augment=view, channels_last=True, config=backend)
        for a, b in zip(raw, ready):
            assert a.labels.tolist() == index["label"][a.ids.numpy()].tolist()
            assert b.images.is_contiguous(memory_format=torch.channels_last)
            mean_, std_ = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
            torch.testing.assert_close(b.images, (a.images.float() - mean_) / std_, atol=1e-4, rtol=1e-5)
        raw.close()
        ready.close()


def test_restoring_at_every_step_gives_the_same_rest(shards, backend):
    make = lambda: Loader(shards["jpeg"], batch=3, seed=4, dtype="uint8", augment=VIEW, config=backend)  # noqa: E731
    with make() as loader:
        states, batches = [loader.state_dict()], []
        for _ in range(2):
            for batch in loader:
                batches.append(batch)
                states.append(loader.state_dict())  # what was prefetched does not count
    assert [(s["epoch"], s["step"]) for s in states] == [(i // 4, i % 4) for i in range(9)]
    for start, state in enumerate(states[:-1]):
        with make() as loader:
            loader.load_state_dict(state)
            rest = list(loader) + (list(loader) if state["epoch"] == 0 else [])
        assert len(rest) == len(batches) - start
        for mine, theirs in zip(rest, batches[start:]):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_going_back_while_batches_are_in_flight_is_exact(shards, backend):
    with Loader(shards["jpeg"], batch=3, dtype="uint8", augment=VIEW, config=backend) as loader:
        first = next(iter(loader))
        state = loader.state_dict()
        second = next(iter(loader))
        loader.load_state_dict(state)
        again = next(iter(loader))
        assert torch.equal(second.images, again.images)
        loader.load_state_dict({"epoch": 0, "step": 0})
        assert torch.equal(first.images, next(iter(loader)).images)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_together_see_what_one_rank_sees(shards, world, backend):
    make = lambda rank, world: Loader(  # noqa: E731
        shards["jpeg"], batch=6, seed=1, rank=rank, world=world, dtype="uint8", augment=VIEW, config=backend
    )
    with make(0, 1) as one:
        expected = list(one)
    loaders = [make(rank, world) for rank in range(world)]
    for step, parts in enumerate(zip(*loaders)):
        for field in (0, 1, 2):
            assert torch.equal(torch.cat([p[field] for p in parts]), expected[step][field])
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize(
    ("split", "asked", "train"),
    [("train", {}, True), ("val", {}, False), ("val", {"train": True}, True), ("train", {"train": False}, False)],
)
def test_only_the_training_split_is_shuffled_unless_asked_otherwise(shards, split, asked, train):
    with Loader(shards["jpeg"], split=split, batch=3, augment=VIEW, **asked) as loader:
        ids = [i for batch in loader for i in batch.ids.tolist()]
    stored = list(range(12 if split == "train" else 4))
    if train:
        assert ids != stored[: len(ids)]
        assert len(set(ids)) == len(ids) == len(stored) // 3 * 3
    else:
        assert ids == stored


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_evaluation_counts_each_sample_once(shards, world, batch, backend):
    ids, sizes = [], []
    for rank in range(world):
        with Loader(
            shards["jpeg"],
            split="train",
            batch=batch,
            train=False,
            rank=rank,
            world=world,
            augment=VIEW,
            config=backend,
        ) as loader:
            got = [b.ids.tolist() for b in loader]
            assert len(got) == len(loader)
        ids += [i for part in got for i in part]
        sizes.append(sum(map(len, got)))
    assert ids == list(range(12))
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_can_be_repeated(shards, backend):
    with Loader(shards["jpeg"], split="val", batch=3, train=False, augment=VIEW, config=backend) as loader:
        once, twice = ([b.images for b in loader] for _ in range(2))
        assert torch.equal(torch.cat(once), torch.cat(twice))


def test_a_delivered_batch_stays_as_it_is(shards, backend):
    with Loader(shards["jpeg"], batch=2, dtype="uint8", augment=VIEW, config=backend) as loader:
        kept, copies = [], []
        for _ in range(4):
            for batch in loader:
                kept.append(batch.images)
                copies.append(batch.images.clone())
        assert all(torch.equal(a, b) for a, b in zip(kept, copies))


def test_batches_that_lay_ready_and_bytes_that_went_to_a_device_are_counted(shards):
    config = LoaderConfig("portable", prefetch_batches=3)
    with Loader(shards["jpeg"], batch=4, augment=VIEW, config=config) as loader:
        assert (loader.stats()["copy_bytes"], loader.stats().get("queued", 0)) == (0, 0)
        next(batches := iter(loader))
        wait([task for job in loader._engine._jobs for task in job.tasks])
        next(batches)
        stats = loader.stats()
        assert (stats["queued"], stats["copy_bytes"]) == (3, 0)  # none lay ready for the first
    with Loader(shards["jpeg"], batch=4, device="meta", augment=VIEW, config=config) as loader:
        next(iter(loader))
        stats = loader.stats()
        assert stats["copy_seconds"] > 0
        assert stats["copy_bytes"] == 4 * 3 * 224 * 224  # bytes: normalised on the device


def test_changed_bytes_reach_the_caller_as_an_error_that_names_the_sample(shards, tmp_path, backend):
    root = shutil.copytree(shards["jpeg"], tmp_path / "copy")
    row = open_dataset(root).split("train").index[7]
    path = root / f"pets-train-{row['shard']:06d}.tar"
    data = bytearray(path.read_bytes())
    data[row["offset"] + 200] ^= 1
    path.write_bytes(data)
    with (
        Loader(root, batch=3, augment=VIEW, config=backend) as loader,
        pytest.raises(DataError, match=r"sample 7 .*checksum"),
    ):
        list(loader)


def test_an_image_that_no_decoder_takes_is_named(shards, tmp_path, backend):
    root = shutil.copytree(shards["jpeg"], tmp_path / "copy")
    row = open_dataset(root).split("train").index[7]
    path = root / f"pets-train-{row['shard']:06d}.tar"
    data = bytearray(path.read_bytes())
    data[row["offset"] : row["offset"] + 400] = bytes(400)
    path.write_bytes(data)
    config = LoaderConfig(backend.backend, verify=False)
    with (
        Loader(root, batch=3, augment=VIEW, config=config) as loader,
        pytest.raises(DataError, match=r"sample 7 .*decode"),
    ):
        list(loader)


def test_closing_leaves_no_thread_and_no_file_open(shards, backend):
    def threads_and_files():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def once():
        loader = Loader(shards["jpeg"], batch=3, augment=VIEW, config=backend)
        next(iter(loader))
        loader.close()
        loader.close()
        with pytest.raises(ConfigError, match="closed"):
            next(iter(loader))

    once()  # files and threads that libraries open once remain
    before = threads_and_files()
    for _ in range(3):
        once()
    assert threads_and_files() == before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch": 5, "world": 2}, "batch=5 does not divide over 2 ranks"),
        ({"batch": 13}, "batch=13 is more than the 12 training samples"),
        ({"batch": 0, "train": False}, "batch=0"),
        ({"batch": 4, "rank": 2, "world": 2}, "rank=2 of world=2"),
        ({"batch": 4, "config": LoaderConfig(backend="dali-gpu")}, "dali-gpu needs a CUDA device, not cpu"),
    ],
)
def test_impossible_loaders_are_rejected(shards, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        Loader(shards["jpeg"], **kwargs)


def test_a_state_outside_the_epoch_is_rejected(shards):
    rejected = pytest.raises(ConfigError, match="epoch=0 step=4: an epoch has 4 steps")
    with Loader(shards["jpeg"], batch=3, augment=VIEW) as loader, rejected:
        loader.load_state_dict({"epoch": 0, "step": 4})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 5}, "seed=5 but the loader's state is of seed=0"),
        ({"batch": 6}, "batch=6 but the loader's state is of batch=3"),
        ({"window": 1}, "window=1 but the loader's state is of window=0"),
        ({"partitions": 3}, "partitions=3 but the loader's state is of partitions=1"),
        ({"shards": "keep"}, "fingerprint=.* but the loader's state is of fingerprint="),
    ],
)
def test_a_state_of_another_order_is_rejected_with_both_values(shards, other, message):
    with Loader(shards["jpeg"], batch=3, augment=VIEW) as loader:
        state = json.loads(json.dumps(loader.state_dict()))
    kwargs = {"batch": 3} | other
    root = shards[kwargs.pop("shards", "jpeg")]
    with Loader(root, augment=VIEW, **kwargs) as loader, pytest.raises(ConfigError, match=message):
        loader.load_state_dict(state)


def test_a_state_resumes_at_another_world_size(shards):
    with Loader(shards["jpeg"], batch=6, augment=VIEW) as loader:
        first = next(iter(loader))
        state = loader.state_dict()
        rest = list(loader)
    loaders = [Loader(shards["jpeg"], batch=6, rank=r, world=2, augment=VIEW) for r in range(2)]
    for loader in loaders:
        loader.load_state_dict(state)
    parts = [torch.cat([batch.ids for batch in step]) for step in zip(*loaders)]
    assert [p.tolist() for p in parts] == [b.ids.tolist() for b in rest]
    assert not set(parts[0].tolist()) & set(first.ids.tolist())
    for loader in loaders:
        loader.close()


def batches_of(loader, *, epochs):
    for _ in range(epochs):
        yield from loader


def test_ids_over_changing_world_sizes_are_those_of_one_rank(shards, backend):
    """4 → 2 → 1 → 4 ranks: each loader stops within an epoch, and the next one gets its state as JSON."""
    make = lambda rank, world: Loader(  # noqa: E731
        shards["jpeg"], batch=4, seed=3, partitions=4, rank=rank, world=world, augment=VIEW, config=backend
    )
    with make(0, 1) as one:
        expected = [batch.ids.tolist() for _ in range(3) for batch in one]
    state, got = json.dumps({"epoch": 0, "step": 0}), []
    for world, steps in ((4, 2), (2, 2), (1, 1), (4, 4)):
        loaders = [make(rank, world) for rank in range(world)]
        streams = []
        for loader in loaders:
            loader.load_state_dict(json.loads(state))
            streams.append(batches_of(loader, epochs=3))
        for _ in range(steps):
            got.append([i for stream in streams for i in next(stream).ids.tolist()])
        states = {json.dumps(loader.state_dict()) for loader in loaders}
        assert len(states) == 1
        state = states.pop()
        for loader in loaders:
            loader.close()
    assert got == expected


@pytest.mark.parametrize(("partitions", "window"), [(1, 1), (3, 0), (3, 2)])
def test_partitions_and_windows_see_each_sample_once(shards, partitions, window):
    with Loader(shards["jpeg"], batch=3, partitions=partitions, window=window, augment=VIEW) as loader:
        ids = [i for batch in loader for i in batch.ids.tolist()]
    assert sorted(ids) == list(range(12))


def test_worker_processes_are_rejected(shards):
    with Loader(shards["jpeg"], batch=3, augment=VIEW) as loader:
        assert len(list(DataLoader(LoaderDataset(loader), batch_size=None))) == 4
        with pytest.raises(ConfigError, match="num_workers must be 0"):
            list(DataLoader(LoaderDataset(loader), batch_size=None, num_workers=1))


def test_after_an_error_the_same_batch_comes_again_and_not_the_next(shards, tmp_path, backend):
    root = shutil.copytree(shards["jpeg"], tmp_path / "copy")
    with Loader(root, batch=2, augment=VIEW, config=backend) as loader:
        expected = [loader.ids(0, step).tolist() for step in range(6)]
        for name in os.listdir(root):
            if name.endswith(".tar"):
                os.rename(root / name, root / f"{name}.away")
        with pytest.raises(StorageError, match="cannot be opened"):
            next(iter(loader))
        assert loader.state_dict()["step"] == 0
        for name in os.listdir(root):
            if name.endswith(".away"):
                os.rename(root / name, root / name.removesuffix(".away"))
        assert [batch.ids.tolist() for batch in loader] == expected


def test_an_image_that_pillow_takes_and_dali_rejects_gets_pillows_pixels(tmp_path):
    from pipeline import manifest
    from pipeline.shards import Sample, write_array, write_shard
    from pipeline.storage import Folder

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(out, "JPEG")
    good = out.getvalue()
    end = 4 + int.from_bytes(good[4:6], "big")
    images = [good, good[:end] + b"\0\1\2" + good[end:], good]
    shard, rows = write_shard(
        Folder(tmp_path), "x.tar", (Sample(f"s{i}", image, 0, 64, 64) for i, image in enumerate(images))
    )
    split = manifest.split_record([shard], "x.npy", write_array(Folder(tmp_path), "x.npy", rows))
    statistics = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    manifest.write_manifest(Folder(tmp_path), {"classes": ["c"], "splits": {"train": split}, "statistics": statistics})
    view = AugmentConfig(resize=64, crop=32)
    seen = []
    for backend in ("dali-cpu", "portable"):
        with Loader(tmp_path, batch=3, dtype="uint8", augment=view, config=LoaderConfig(backend)) as loader:
            (batch,) = list(loader)
            seen.append(dict(zip(batch.ids.tolist(), batch.images)))
    assert all(torch.equal(seen[0][i], seen[1][i]) for i in range(3))


@pytest.mark.parametrize("state", [{}, {"epoch": 1}])
def test_half_a_state_is_rejected(shards, state):
    rejected = pytest.raises(ConfigError, match="epoch and step are missing")
    with Loader(shards["jpeg"], batch=3, augment=VIEW) as loader, rejected:
        loader.load_state_dict(state)


def test_an_unknown_dtype_is_rejected(shards):
    with pytest.raises(ConfigError, match="dtype='int8': choose one of uint8, float32, float16"):
        Loader(shards["jpeg"], batch=3, dtype="int8")


def test_after_an_error_behind_the_decoder_the_same_batch_comes_again(shards, backend, monkeypatch):
    with Loader(shards["jpeg"], batch=3, augment=VIEW, config=backend) as loader:
        expected = [loader.ids(0, step).tolist() for step in range(4)]
        assert next(iter(loader)).ids.tolist() == expected[0]
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.read.loader.to_device", lambda *_: bytearray(-1))
            with pytest.raises(ValueError, match="negative"):
                next(iter(loader))
        assert loader.state_dict()["step"] == 1
        assert [batch.ids.tolist() for batch in loader] == expected[1:]


def test_a_rejected_state_changes_nothing(shards):
    with Loader(shards["jpeg"], batch=3, augment=VIEW, config=LoaderConfig(max_bad_samples=1)) as loader:
        next(iter(loader))
        before, order = loader.state_dict(), loader.ids(1, 0).tolist()
        of = before["of"]
        for state, error in (
            ({"epoch": 0, "step": 0, "of": of | {"window": 1, "seed": 5}}, ConfigError),
            ({"epoch": 0, "step": 9, "of": of | {"window": 1}}, ConfigError),
            ({"epoch": 0, "step": 2.5}, TypeError),
            ({"epoch": 0, "step": 0, "of": of | {"window": 1}, "bad": [1, 2]}, DataError),
        ):
            with pytest.raises(error):
                loader.load_state_dict(state)
            assert (loader.state_dict(), loader.ids(1, 0).tolist()) == (before, order)
        assert len(list(loader)) == 3
        assert not loader.bad.found


def test_a_rank_without_samples_takes_its_own_state(shards):
    with Loader(shards["jpeg"], batch=13, train=False, rank=0, world=13, augment=VIEW) as loader:
        assert len(loader) == 0
        loader.load_state_dict(loader.state_dict())
        assert list(loader) == []


def test_ids_are_the_caller_s_own(shards):
    with Loader(shards["jpeg"], batch=3, augment=VIEW) as loader:
        expected = loader.ids(0, 0).tolist()
        loader.ids(0, 0)[:] = 0
        assert next(iter(loader)).ids.tolist() == expected


def test_an_evaluation_through_a_dataloader_begins_at_the_start(shards):
    """As Lightning, which evaluates a few batches before it trains."""
    with Loader(shards["jpeg"], batch=3, train=False, augment=VIEW) as loader:
        batches = DataLoader(LoaderDataset(loader), batch_size=None)
        next(iter(batches))
        assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(12))


def test_a_loader_of_another_process_is_rejected(shards):
    with Loader(shards["jpeg"], batch=3, augment=VIEW) as loader:
        next(iter(loader))
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                next(iter(loader))
            except BaseException as err:
                os.write(write, f"{type(err).__name__}: {err}".encode())
            os._exit(0)
        assert os.read(read, 200).startswith(b"ConfigError: this loader is of another process")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        assert len(list(loader)) == 3


def test_numbers_may_be_numpy_s(shards):
    with Loader(shards["jpeg"], batch=np.int64(3), seed=np.int64(7), augment=VIEW) as loader:
        state = json.loads(json.dumps(loader.state_dict()))
    with Loader(shards["jpeg"], batch=3, seed=7, augment=VIEW) as loader:
        loader.load_state_dict(state)


def test_a_channel_that_never_varies_is_not_divided(shards, backend):
    found = []
    for deviation in (0.0, 1.0):
        statistics = Statistics(mean=(9.0, 9.0, 9.0), std=(deviation, 2.0, 2.0))
        options = {"augment": AugmentConfig(normalize="mean-std"), "config": backend, "statistics": statistics}
        with Loader(shards["jpeg"], batch=3, **options) as loader:
            found.append(next(iter(loader)).images)
    assert torch.equal(*found)


def test_a_dataset_is_found_after_the_process_went_elsewhere(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(shards["jpeg"].parent)
    with Loader(shards["jpeg"].name, batch=3, augment=VIEW) as loader:
        monkeypatch.chdir(tmp_path)
        assert len(list(loader)) == 4
