"""The resident backend: the portable backend's pixels, from memory; what a rank holds; what does not fit."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch

from pipeline import AugmentConfig, ConfigError, DataError, Loader, LoaderConfig, open_dataset
from pipeline.read import remote_reader, resident
from pipeline.read.backend import works
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from tests.conftest import picture
from tests.pipeline.test_parity import dataset_of, encode
from tests.pipeline.web_server import serving

RESIDENT = LoaderConfig("resident")
VIEWS = {
    "crop": AugmentConfig(resize=64, crop=56, colour=0.1, normalize="mean-std"),
    "resized": AugmentConfig(resize=48, crop=40),
    "random resized": AugmentConfig(resize=64, crop=56, scale_jitter=(0.08, 1.0)),
    "ten views": AugmentConfig(resize=64, crop=40, views=10),
    "mean image": AugmentConfig(resize=64, crop=56, normalize="mean-image"),
}


@pytest.fixture(autouse=True)
def _nothing_in_memory(monkeypatch):
    """Whatever an earlier test's loaders hold."""
    monkeypatch.setattr(resident, "_known", WeakValueDictionary())


@pytest.fixture(scope="module")
def square(tmp_path_factory, image_folder) -> dict[str, Path]:
    """The images of two classes, 12 and 4, as 64×64 pixels."""
    source = ImageFolder(image_folder / "train", image_folder / "val", "pets")
    out = {}
    for kind in ("raw", "jpeg"):
        out[kind] = tmp_path_factory.mktemp(kind)
        options = Options(Encoding(kind, size=64, square=True), samples_per_shard=5)
        build(Plan(source, options), out[kind], workers=1)
    return out


def batches(root, config=RESIDENT, *, epochs=2, state=None, **options):
    with Loader(root, config=config, **{"batch": 4, "seed": 3} | options) as loader:
        if state:
            loader.load_state_dict(state)
        return [batch for _ in range(epochs) for batch in loader]


def assert_same(found, wanted) -> None:
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(mine, theirs))


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("view", VIEWS)
def test_batches_are_the_portable_backends_bit_for_bit(square, kind, split, view):
    options = {"split": split, "augment": VIEWS[view], "channels_last": True}
    portable = batches(square[kind], LoaderConfig("portable"), **options)
    assert_same(batches(square[kind], **options), portable)


@pytest.mark.parametrize(("dtype", "channels_last"), [("uint8", False), ("float32", False), ("bfloat16", True)])
def test_every_type_and_layout_is_the_portable_backends(square, dtype, channels_last):
    options = {"dtype": dtype, "channels_last": channels_last, "augment": VIEWS["resized"]}
    assert_same(batches(square["raw"], **options), batches(square["raw"], LoaderConfig("portable"), **options))


def test_images_that_are_not_square_qualify_if_all_have_one_size(tmp_path):
    images = [encode(picture(np.random.default_rng(i), 80, 60), "JPEG") for i in range(7)]
    root, view = dataset_of(images, tmp_path), AugmentConfig(resize=60, crop=50, square=False)
    options = {"batch": 3, "augment": view}
    assert_same(batches(root, **options), batches(root, LoaderConfig("portable"), **options))


def test_restoring_at_every_step_gives_the_same_rest(square):
    view = VIEWS["random resized"]
    with Loader(square["jpeg"], batch=4, augment=view, config=RESIDENT) as loader:
        states, wanted = [loader.state_dict()], []
        for batch in loader:
            wanted.append(batch)
            states.append(loader.state_dict())
    for step, state in enumerate(states[:-1]):
        assert_same(batches(square["jpeg"], state=state, epochs=1, seed=0, augment=view), wanted[step:])


@pytest.mark.parametrize(("partitions", "world"), [(1, 1), (4, 1), (4, 2), (4, 4), (1, 2), (2, 4), (3, 6)])
def test_a_rank_holds_its_partitions_and_the_ids_stay(square, partitions, world):
    split, found, held = open_dataset(square["raw"]).split("train"), [], []
    for rank in range(world):
        options = {"partitions": partitions, "rank": rank, "world": world, "augment": VIEWS["crop"], "batch": 12}
        with Loader(square["raw"], config=RESIDENT, **options) as loader:
            ids = np.concatenate([batch.ids.numpy() for _ in range(3) for batch in loader])
            assert loader._engine._images.pixels.shape == (len(loader.plan.held), 64, 64, 3)
            assert set(ids.tolist()) <= set(loader.plan.held)
            found.append(ids.reshape(3, -1))
            held.append(len(loader.plan.held))
    assert max(held) == split.samples * max(1, partitions // world) // partitions
    one = Loader(square["raw"], partitions=partitions, batch=12, augment=VIEWS["crop"])
    with one:
        assert np.concatenate(found, axis=1).tolist() == [one.ids(epoch, 0).tolist() for epoch in range(3)]


@pytest.mark.parametrize("world", [1, 3, 6])
def test_evaluation_holds_each_image_once_over_the_ranks(square, world):
    seen, held = [], 0
    for rank in range(world):
        options = {"split": "val", "rank": rank, "world": world, "augment": VIEWS["crop"]}
        with Loader(square["raw"], batch=2 * world, config=RESIDENT, **options) as loader:
            seen += [sample for batch in loader for sample in batch.ids.tolist()]
            held += len(loader.plan.held)
    assert seen == list(range(4))
    assert held == 4


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The splits that were loaded, in order."""
    splits, load = [], resident.Resident._loaded
    monkeypatch.setattr(resident.Resident, "_loaded", lambda s: splits.append(s._plan.split.name) or load(s))
    return splits


def test_images_are_loaded_once_also_for_a_loader_with_other_crops(square, loaded):
    with Loader(square["raw"], batch=4, split="val", augment=VIEWS["crop"], config=RESIDENT) as val:
        loader = Loader(square["raw"], batch=4, augment=VIEWS["crop"], config=RESIDENT)
        assert loaded == []
        loader.load()
        list(val)
        assert loaded == ["train", "val"]
        list(loader)
        for view in ("resized", "ten views"):  # as a run replaces its loader
            loader.close()
            loader = Loader(square["raw"], batch=4, augment=VIEWS[view], config=RESIDENT)
            list(loader)
        list(val)
        loader.close()
    assert loaded == ["train", "val"]


def test_loading_is_reported_by_the_first_rank_with_images_per_second(square, capsys):
    for rank in (0, 1):
        batches(square["raw"], rank=rank, world=2, augment=VIEWS["crop"], partitions=2)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(" img, ")[0] for line in lines] == ["loading train: 6/6"][rank:]
        assert all("img/s" in line for line in lines)


@pytest.mark.parametrize(("verify", "message"), [(True, r"sample 7 .*checksum"), (False, r"sample 7 .*decoded")])
def test_a_damaged_image_is_named_when_it_is_loaded(square, tmp_path, verify, message):
    root = shutil.copytree(square["jpeg"], tmp_path / "copy")
    row = open_dataset(root).split("train").index[7]
    path = root / f"pets-train-{row['shard']:06d}.tar"
    data = bytearray(path.read_bytes())
    data[row["offset"] : row["offset"] + 400] = bytes(400)
    path.write_bytes(data)
    config = LoaderConfig("resident", verify=verify)
    with Loader(root, batch=4, augment=VIEWS["crop"], config=config) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=message):
                loader.load()


def test_shards_at_a_url_are_fetched_once(square, tmp_path, monkeypatch):
    pytest.importorskip("obstore")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wanted = batches(square["jpeg"], augment=VIEWS["crop"], window=2)
    with serving(shutil.copytree(square["jpeg"], tmp_path / "served")) as server:
        dataset = open_dataset(server.url, allow_http=True)
        fetched, get = [], remote_reader.RemoteReader._get
        monkeypatch.setattr(remote_reader.RemoteReader, "_get", lambda s, *at: fetched.append(at) or get(s, *at))
        assert_same(batches(dataset, augment=VIEWS["crop"], window=2), wanted)
    assert [shard for shard, *_ in fetched] == [0, 1, 2]  # in stored order, no image twice


# What is rejected


def test_images_of_several_sizes_are_rejected_with_the_command_that_makes_one(shards):
    message = (
        r"the images of the split train are 256 to \d+ pixels wide and 256 to \d+ high, .*make_shards.py .*"
        r"--size 256 --square, or use --loader.backend auto"
    )
    with pytest.raises(ConfigError, match=message):
        Loader(shards["jpeg"], batch=4, config=RESIDENT)


IMAGE = 64 * 64 * 3


def rejection(root, monkeypatch, *, free: float, **options) -> str:
    """The message if so many images' bytes are free, of which 0.8 may be used."""
    monkeypatch.setattr(resident, "free_memory", lambda *_: int(free * IMAGE))
    with pytest.raises(ConfigError) as err:
        Loader(root, batch=4, config=RESIDENT, augment=VIEWS["crop"], **options)
    return str(err.value)


def test_what_does_not_fit_is_rejected_with_the_numbers_and_the_partitions_that_fit(square, monkeypatch, loaded):
    ours = rejection(square["raw"], monkeypatch, free=14, rank=1, world=2)
    assert ours == (
        "loader.backend=resident: a rank's images take 0.000147 GB, but only 0.000138 GB of cpu may be used"
        " (loader.resident_memory=0.8 of the 0.000172 GB that are free); use --data.partitions 2, or"
        " --loader.backend auto"
    )
    Loader(square["raw"], batch=4, config=RESIDENT, augment=VIEWS["crop"], world=2, partitions=2).close()
    more = rejection(square["raw"], monkeypatch, free=6.5)
    assert "use 3 ranks with --data.partitions 3, or --loader.backend auto" in more
    assert loaded == []


def test_smaller_images_are_suggested_if_they_would_fit(square, monkeypatch):
    monkeypatch.setattr(resident, "SMALL", 32)
    assert "shards made with --size 32" in rejection(square["raw"], monkeypatch, free=4)
    assert "--size" not in rejection(square["raw"], monkeypatch, free=3)


def test_both_splits_count_before_one_is_loaded(square, monkeypatch, loaded):
    monkeypatch.setattr(resident, "free_memory", lambda *_: 19 * IMAGE)  # 0.8 of it is room for 15.2 of 16
    with Loader(square["raw"], split="val", batch=4, config=RESIDENT, augment=VIEWS["crop"]):
        assert "0.000197 GB" in rejection(square["raw"], monkeypatch, free=19)
        monkeypatch.setattr(resident, "free_memory", lambda *_: 20 * IMAGE)
        with Loader(square["raw"], batch=4, config=RESIDENT, augment=VIEWS["crop"]) as loader:
            assert "decoded once and take 0.000197 GB of cpu" in loader.decoder()
    assert loaded == []


def test_the_ranks_of_a_machine_share_its_memory():
    one, four = (resident.free_memory(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert 0.7 < one / four / 4 < 1.4


# The kernel for GPUs, run by Triton's interpreter


@pytest.fixture(scope="module")
def gather():
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.find_spec("pipeline.read.resident_gpu")
        module = importlib.util.module_from_spec(spec)  # another process's import of it may be compiled
        spec.loader.exec_module(module)
        yield module.gather


@pytest.mark.parametrize(
    ("view", "train", "dtype"),
    [
        ("crop", True, "float16"),
        ("crop", True, "float32"),
        ("crop", False, "float32"),
        ("mean image", True, "uint8"),
        ("random resized", True, "uint8"),
        ("random resized", True, "float16"),
        ("resized", False, "uint8"),
        ("ten views", False, "uint8"),
    ],
)
def test_the_kernels_crops_are_the_cpu_s(square, gather, view, train, dtype):
    options = {"dtype": dtype, "channels_last": dtype != "uint8", "augment": VIEWS[view], "train": train}
    with Loader(square["raw"], batch=4, config=RESIDENT, **options) as loader:
        wanted, engine, images = next(iter(loader)).images, loader._engine, loader._engine._images
        loader.load_state_dict({"epoch": 0, "step": 0})
        work = next(works(loader.plan, loader._reader, 0, 0, ahead=0))
        found = gather(images.pixels, images.numbers(work.ids), work, engine.output)
        if loader._mean_image is not None:
            found = found - loader._mean_image
    assert found.dtype == getattr(torch, dtype) or view == "mean image"
    assert torch.equal(found.view_as(wanted), wanted)


def test_bad_samples_are_replaced_at_the_steps_of_the_portable_backend(square, tmp_path):
    root = shutil.copytree(square["jpeg"], tmp_path / "copy")
    for split, sample in (("train", 7), ("train", 2), ("val", 1)):
        row = open_dataset(root).split(split).index[sample]
        path = root / f"pets-{split}-{row['shard']:06d}.tar"
        data = bytearray(path.read_bytes())
        data[row["offset"] + 200] ^= 1
        path.write_bytes(data)
    for options in (
        {"partitions": 2},
        {"partitions": 2, "rank": 1, "world": 2},
        {"split": "val"},
        {"split": "val", "world": 2},
    ):
        ours, theirs = (
            batches(root, LoaderConfig(backend, max_bad_samples=2), augment=VIEWS["crop"], **options)
            for backend in ("resident", "portable")
        )
        assert_same(ours, theirs)
