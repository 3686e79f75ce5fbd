"""Samples that are found to be damaged while they are read: replaced in training, left out in evaluation, limited."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import AugmentConfig, Loader, LoaderConfig, open_dataset
from pipeline.errors import BadSample, DataError
from pipeline.read.fetch import OFFSET, fetch_images
from tests.conftest import picture
from tests.pipeline.test_parity import dataset_of, encode

VIEW = AugmentConfig(resize=32, crop=24)
SAMPLES, BATCH = 40, 4


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> Path:
    """40 images of several sizes, of one short side, so that the pixels of all backends are equal."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32 + i)[:: 1 - i % 2 * 2] for i in range(SAMPLES)]
    images = [encode(picture(rng, *size), "JPEG", quality=90) for size in sizes]
    return dataset_of(images, tmp_path_factory.mktemp("forty"))


@pytest.fixture(params=["portable", "dali-cpu"])
def backend(request) -> str:
    return request.param


def damage(root: Path, samples: Iterable[int], how: str = "flip", split: str = "train") -> None:
    """Flips a bit of each sample, or zeros its header, or cuts the shard within the first of them."""
    of = open_dataset(root).split(split)
    for sample in samples:
        row = of.index[sample]
        path, offset = root / of.shards[row["shard"]].name, int(row["offset"])
        if how == "end":
            os.truncate(path, offset + 9)
            return
        data = bytearray(path.read_bytes())
        if how == "header":
            data[offset : offset + 300] = bytes(300)
        data[offset + 300] ^= 1
        path.write_bytes(data)


def loader(shards: object, backend: str = "portable", limit: int = SAMPLES, **options) -> Loader:
    at = {"augment": VIEW, "batch": BATCH, "dtype": "uint8", "split": "train"} | options
    verify = at.pop("verify", True)
    return Loader(shards, config=LoaderConfig(backend, max_bad_samples=limit, verify=verify, threads=2), **at)


def epochs(made: Loader, count: int = 2) -> list[tuple[list[int], torch.Tensor]]:
    """The ids and pixels of each batch."""
    return [(batch.ids.tolist(), batch.images) for _ in range(count) for batch in made]


def replaced(ids: Iterable[int], bad: set[int], partition: range) -> list[int]:
    """The rule, plainly."""
    chosen = []
    for sample in ids:
        while sample in bad:
            sample = partition.start + (sample + 1 - partition.start) % len(partition)
        chosen.append(int(sample))
    return chosen


def expected(root: Path, bad: set[int], *, count: int = 2, **options) -> list[tuple[list[int], torch.Tensor]]:
    """The same by the rule, from whole shards: each image as an epoch of its own draws it, the bad ones replaced."""
    with loader(root, limit=0, **options) as whole:
        found, parts = [], [whole.plan.partition(i) for i in range(SAMPLES)]
        for epoch in range(count):
            order_of_all = [whole.ids(epoch, step) for step in range(len(whole))]
            images = {}
            # The pixels of a sample depend on seed, epoch and id alone, so any loader that sees all of them will do.
            with loader(root, limit=0, **options | {"batch": options.get("partitions", 1)}) as all_of_them:
                all_of_them.load_state_dict(all_of_them.state_dict() | {"epoch": epoch})
                images = {i: x for b in all_of_them for i, x in zip(b.ids.tolist(), b.images)}
            for ids in order_of_all:
                chosen = [replaced([i], bad, parts[i])[0] for i in ids.tolist()]
                found.append((chosen, torch.stack([images[i] for i in chosen])))
    return found


def assert_same(found, wanted) -> None:
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("bad", "how"), [({7}, "flip"), ({7, 8, 39}, "flip"), ({38, 39, 0}, "header"), (set(range(30, 40)), "end")]
)
def test_a_bad_sample_is_replaced_by_the_next_good_one_of_its_partition(forty, tmp_path, backend, bad, how, caplog):
    options = {"partitions": 2} if how == "flip" else {}
    dataset = open_dataset(shutil.copytree(forty, tmp_path / "bad"))
    with loader(dataset, backend, verify=how != "header", **options) as made, caplog.at_level(logging.WARNING):
        damage(tmp_path / "bad", sorted(bad), how)
        assert_same(epochs(made), expected(forty, bad, **options))
        assert made.bad.found.keys() == bad
    assert sum("bad sample" in line for line in caplog.messages) == len(bad)  # each is named once
    assert all(any(f"sample {i} " in line for line in caplog.messages) for i in bad)


@pytest.mark.parametrize("partitions", [1, 3, 7, 40])
def test_partitions_are_those_of_the_order(forty, partitions):
    with loader(forty, partitions=partitions, batch=SAMPLES // partitions * partitions) as made:
        slices = np.split(made.ids(0, 0), partitions)
        found = [{made.plan.partition(i) for i in ids.tolist()} for ids in slices]
        assert sum(len(part) for (part,) in found) == SAMPLES
        assert all(set(ids.tolist()) <= set(part) for ids, (part,) in zip(slices, found))


@pytest.mark.parametrize("known", [False, True])
def test_every_rank_and_every_resumption_reads_the_same(forty, tmp_path, backend, known, monkeypatch):
    """known: the state holds the bad samples, which are not read again then."""
    bad = {0, 11, 12, 13, 39}
    dataset = open_dataset(shutil.copytree(forty, tmp_path / "bad"))
    damage(tmp_path / "bad", bad)
    wanted = expected(forty, bad)
    state = {"bad": sorted(bad) if known else []}
    for step in range(0, 2 * SAMPLES // BATCH, 3):
        at = state | dict(zip(("epoch", "step"), divmod(step, SAMPLES // BATCH)))
        ranks = []
        for rank in (0, 1):
            with loader(dataset, backend, rank=rank, world=2) as made:
                made.load_state_dict(at)
                if known:
                    monkeypatch.setattr(made._reader, "stored", lambda sample: 1 / 0)  # called for a bad one alone
                ranks.append(epochs(made, 2 - at["epoch"]))
                assert not known or made.state_dict()["bad"] == sorted(bad)
        both = [(a + b, torch.cat([x, y])) for (a, x), (b, y) in zip(*ranks, strict=True)]
        assert_same(both, wanted[step:])


def test_too_many_bad_samples_end_it_by_name_and_again_until_they_are_repaired(forty, tmp_path, backend):
    root = shutil.copytree(forty, tmp_path / "bad")
    damage(root, [5, 6, 7])
    with loader(root, backend, limit=2) as made:
        for _ in range(2):
            with pytest.raises(
                DataError, match=r"^3 bad samples, more than loader.max_bad_samples=2: 5, 6, 7; .*sample"
            ):
                epochs(made)
        at = made.state_dict()
        damage(root, [i for i in (5, 6, 7) if i not in made.bad.found])
        wanted = expected(forty, set(made.bad.found))
        assert_same(epochs(made), wanted[at["epoch"] * 10 + at["step"] :])
    with loader(root, backend, limit=0) as made, pytest.raises(BadSample, match=r"x.tar: sample \d .*checksum"):
        epochs(made)
    with (
        loader(root, backend, limit=1) as made,
        pytest.raises(DataError, match=r"^2 bad samples, more than .*=1: \d, \d$"),
    ):
        made.load_state_dict(at)


@pytest.mark.parametrize("train", [True, False])
def test_a_partition_without_a_good_sample_is_an_error(forty, tmp_path, backend, train):
    root = shutil.copytree(forty, tmp_path / "bad")
    damage(root, range(20, 40) if train else range(40))
    of = "20" if train else "40"
    which = "samples 20 to 39" if train else "samples 0 to 39"
    with (
        loader(root, backend, train=train, partitions=2) as made,
        pytest.raises(DataError, match=f"^{of} bad samples, and {which}, a whole partition, are among them: 2?0, "),
    ):
        epochs(made)


def test_ranks_that_count_together_raise_together_after_a_batch_of_the_right_form(forty, tmp_path, backend):
    root = shutil.copytree(forty, tmp_path / "bad")
    damage(root, range(10, 40))
    with loader(root, backend, limit=3, dtype="float32") as one, loader(root, backend, limit=3, seed=1) as other:
        one.bad.together = other.bad.together = True
        for _step in range(2):
            images, labels, ids = next(iter(one))
            assert images.shape == (BATCH, 3, 24, 24)
            assert labels.tolist() == ids.tolist()
            if one.bad.error():
                break
        assert len(one.bad.found) == 4
        other.bad.found[17] = "of another rank"
        gathered = [dict(one.bad.found), dict(other.bad.found)]
        for each in (one, other):
            with pytest.raises(DataError, match=r"^\d bad samples, more than loader.max_bad_samples=3") as caught:
                each.bad.share(lambda mine: gathered)
            assert caught.value.together


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_leaves_bad_samples_out_and_replaces_none(forty, tmp_path, backend, world, views):
    bad, view = {0, 3, 4, 5, 6, 7, 26, 39}, AugmentConfig(resize=32, crop=24, views=views)
    root = shutil.copytree(forty, tmp_path / "bad")
    damage(root, bad)
    options = {"train": False, "augment": view}
    with loader(forty, limit=0, **options) as whole:
        images = {i: x for ids, batch in epochs(whole, 1) for i, x in zip(ids, batch)}
    all_seen = []
    for rank in range(world):
        seen = []
        with loader(root, backend, rank=rank, world=world, **options) as made:
            for ids, batch in epochs(made):
                assert len(batch) == len(ids)
                assert all(torch.equal(x, images[i]) for i, x in zip(ids, batch))
                seen += ids
            assert [i for step in range(len(made)) for i in made.ids(0, step).tolist()] == seen[-len(seen) // 2 :]
        all_seen += seen
    assert sorted(all_seen) == sorted(2 * [i for i in range(SAMPLES) if i not in bad])


def test_a_checksum_that_is_right_when_it_is_read_again_is_no_bad_sample(forty, backend, monkeypatch):
    """Each image's bytes are wrong once."""
    wanted, seen = expected(forty, set(), count=1), set()

    def once(stored):
        def first_wrong(buffer, at, fds, rows, verify, needed):
            new = [i for i in range(len(at)) if int(rows[i, OFFSET]) not in seen and fds[i] >= 0]
            seen.update(int(rows[i, OFFSET]) for i in new)
            return new[0] if new else stored(buffer, at, fds, rows, verify, needed)

        return first_wrong

    for module in ("reader", "portable"):
        monkeypatch.setattr(f"pipeline.read.{module}.fetch_images", once(fetch_images))
    with loader(forty, backend, limit=0) as made:
        assert_same(epochs(made, 1), wanted)
    assert len(seen) == SAMPLES
