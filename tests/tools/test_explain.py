"""`tools/bench loader --explain`: its verdict in staged cases, and its errors."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import ImageFolder
from tests.conftest import ROOT, picture

sys.path.append(str(ROOT))
from tools.bench import __main__ as bench
from tools.bench import explain, harness, loader
from tools.bench.explain import Stage

READ, DECODE, ASSEMBLE = Stage(90_000.0, 2e-5), Stage(1000.0, 2e-3), Stage(400_000.0, 2e-6)


@pytest.fixture
def explained(tmp_path, monkeypatch, capsys):
    """Its report on shards on a machine of two cores, and its record."""
    monkeypatch.setattr(explain, "usable_cores", lambda: 2)

    def run(shards, *options: object, threads: int = 2, batch: int = 128) -> tuple[str, dict]:
        argv = ["loader", "--explain", shards, "--seconds", 0.1, "--rounds", 1, "--threads", threads, "--batch", batch]
        args = bench.make_parser().parse_args([str(word) for word in (*argv, *options, "--json", tmp_path / "x.json")])
        loader.run(args, harness.Record(args, "x"), tmp_path)
        return capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())

    return run


def test_a_step_that_takes_less_than_the_loader_gives_is_the_limit(explained, few_digits):
    shown, found = explained(few_digits, "--step-rate", 1)
    assert found["limit"] == "step"
    assert "limit: the training step\nadvice: nothing to do: the loader is faster\n" in shown
    assert "not measured: dali-cpu, dali-gpu and resident" in shown
    stages = {row["stage"]: row for row in found["stages"]}
    assert stages.keys() == {"read, not cached", "read, cached", "decode and crop", "assemble", "step"}
    assert stages["step"]["img/s"] == 1
    assert 0 < found["predicted"] < min(stages["decode and crop"]["img/s"], stages["read, cached"]["img/s"])


@pytest.mark.slow
def test_fewer_threads_than_cores_are_the_limit(explained, few_digits):
    shown, found = explained(few_digits, "--step-rate", 1e9, threads=1)
    assert found["limit"] == "threads"
    assert "too few threads: 1, of 2 cores" in shown
    assert f"--loader.threads 2: up to {2 * found['predicted']:,.0f} img/s; the step takes" in shown


@pytest.mark.slow
def test_large_originals_are_slow_to_decode(explained, tmp_path):
    for i in range(8):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        picture(np.random.default_rng(i), 1500, 1200).save(tmp_path / "images" / str(i % 2) / f"{i}.jpg")
    build(Plan(ImageFolder(tmp_path / "images"), Options()), tmp_path / "shards", workers=1)
    shown, found = explained(tmp_path / "shards", batch=8)
    assert found["limit"] == "decode"
    assert "more cores for each GPU, or shards with --encode jpeg" in shown


@pytest.mark.slow
def test_storage_that_makes_reads_wait_is_the_limit(explained, few_digits, monkeypatch):
    fetch_images, waited = explain.reads.fetch_images, 0.05

    def late(buffer, at, fds, *others):
        for _ in range((fds >= 0).sum()):
            time.sleep(waited)
        return fetch_images(buffer, at, fds, *others)

    monkeypatch.setattr(explain.reads, "fetch_images", late)
    shown, found = explained(few_digits, batch=32)
    assert found["limit"] == "storage"
    assert "--data.stage DIR" in shown
    (assemble,) = (row for row in found["stages"] if row["stage"] == "assemble")
    assert assemble["img/s"] > 4 * 32 / waited  # it reads nothing
    assert 32 / waited * 0.2 < found["predicted"] < 32 / waited * 1.1  # 32 reads in flight


def test_the_prediction_adds_what_one_thread_does_in_turn_and_not_what_overlaps():
    many = {"threads": 2, "cores": 2}
    rate, limit = explain.predicted(READ, DECODE, ASSEMBLE, **many)
    assert (rate, limit) == (pytest.approx(1 / (1 / 90_000 + 1 / 1000 + 1e-6)), "decode")
    flying = Stage(600.0, 1e-4, True)
    assert explain.predicted(flying, DECODE, ASSEMBLE, **many) == (600, "storage")
    fast = flying._replace(rate=5000.0)
    assert explain.predicted(fast, DECODE, ASSEMBLE, **many)[0] == pytest.approx(1 / (1 / 1000 + 1.02e-4 / 2))
    assert explain.predicted(READ, DECODE, ASSEMBLE, threads=2, cores=4) == (
        pytest.approx(1 / (1 / 90_000 + 1 / 1000)), "threads",
    )  # fmt: skip
    assert explain.predicted(READ, Stage(200_000.0, 1e-5), ASSEMBLE, **many)[1] == "read"
    assert explain.predicted(READ, DECODE, Stage(500.0, 1e-4), **many) == (500, "assemble")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "by --images, or your shards by --explain"),
        (["--explain", "x", "--images", "x"], "by --images, or your shards by --explain"),
        (["--explain", "x", "--step-rate", "-1"], "--step-rate -1: choose 0"),
        (["--explain", "x", "--step-rate", "nan"], "--step-rate nan: choose 0"),
        (["--explain", "s3://bucket/x"], "measures files, not URLs"),
    ],
)
def test_what_cannot_be_explained_is_an_error_of_usage(options, message, tmp_path):
    args = bench.make_parser().parse_args(["loader", *options])
    with pytest.raises(ConfigError, match=message):
        loader.run(args, None, tmp_path)
