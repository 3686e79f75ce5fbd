"""Every tool in the environments that people have: the right result or one clear line, and never a traceback."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import SOURCES, ImageFolder
from tests import fork_server
from tests.conftest import ROOT, picture
from tests.pipeline import test_tables
from tests.pipeline.archives import Mini

TRAIN = ["train/run.py", "demo", "--data.shards", "shards", "--train.epochs", 1, "--train.batch", 32]
TRAIN += ["--model.width", 0.05, "--loader.threads", 1]
SHARD = ["--workers", 2, "--stats", "off", "--out", "out"]
NOBODY = 65534


class Tool(NamedTuple):
    """A command that is run in a folder of the fixture `place`, and the file that it writes there."""

    command: list
    writes: str


TOOLS = {
    "digits": Tool(["tools/make_shards.py", "digits", *SHARD], "out/manifest.json"),
    "imagefolder": Tool(
        ["tools/make_shards.py", "imagefolder", "--train", "images", "--val-fraction", 0.25, *SHARD],
        "out/manifest.json",
    ),
    "index": Tool(
        ["tools/make_shards.py", "index", "shards/*-train-*.tar", "--workers", 2, "--out", "out"], "out/manifest.json"
    ),
    "imagenet2012": Tool(
        ["tools/make_shards.py", "imagenet2012", "--src", "2012", "--no-md5", *SHARD], "out/manifest.json"
    ),
    "imagenet2010": Tool(["tools/make_shards.py", "imagenet2010", "--src", "2010", *SHARD], "out/manifest.json"),
    "kaggle": Tool(["tools/make_shards.py", "kaggle", "--src", "of-kaggle", *SHARD], "out/manifest.json"),
    "tiny-imagenet": Tool(["tools/make_shards.py", "tiny-imagenet", "--src", "of-tiny", *SHARD], "out/manifest.json"),
    "webdataset": Tool(["tools/make_shards.py", "webdataset", "--train", "shards/*.tar", *SHARD], "out/manifest.json"),
    "csv": Tool(["tools/make_shards.py", "csv", "--train", "list.csv", *SHARD], "out/manifest.json"),
    "hf-parquet": Tool(
        ["tools/make_shards.py", "hf-parquet", "--train", "of-hub.parquet", "--unpack", "unpacked", *SHARD],
        "out/manifest.json",
    ),
    "check_shards": Tool(["tools/check_shards.py", "shards", "--deep", "--workers", 2, "--json", "out"], "out"),
    "train": Tool([*TRAIN, "--run.dir", "out"], "out/checkpoints/best"),
    "evaluate": Tool(["tools/evaluate.py", "run", "--data.shards", "shards", "--json", "out"], "out"),
    "predict": Tool(["tools/predict.py", "run", "images", "--html", "out"], "out"),
    "export": Tool(["tools/export.py", "run", "out.safetensors", "--data.shards", "shards"], "out.safetensors"),
    "report": Tool(["tools/report.py", "run"], "run/curves.png"),
    "replay": Tool(["tools/replay.py", "run", 2, "--shards", "shards", "--json", "out"], "out"),
    "bench": Tool(["tools/bench/__main__.py", "order", "--rounds", 1, "--json", "out"], "out"),
    "gpu_proof": Tool(
        ["tools/gpu_proof.py", "--device", "cpu", "--steps", "cifar-seed", "--out", "out"], "out/gpu-cifar-seed.json"
    ),
}
NOT_UTF8 = os.fsdecode(b"\xff")
FIRST = "ascii, 128 files, no stdin, in \\xff"
ENVIRONMENTS: dict[str, dict] = {
    FIRST: {"encoding": "ascii", "files": 128, "closed": [0]},
    "nobody, no streams": {"user": NOBODY, "closed": [0, 1, 2]},
    "head": {},
}
ALONE: dict[str, dict] = {
    "ascii": {"encoding": "ascii"},
    "128 files": {"files": 128},
    "no stdin": {"closed": [0]},
    "no stdout": {"closed": [1]},
    "no stderr": {"closed": [2]},
    "nobody": {"user": NOBODY},
    "all names in \\xff": {},
}
INPUTS = ("images", "shards", "run", "2010", "2012", "of-kaggle", "of-tiny", "list.csv", "of-hub.parquet")
PER_CLASS = 90  # three quarters of all are more shards than files may be open


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """images/ of two classes, whose names are not ASCII, shards/ and a run/ made of them, and ImageNet's archives."""
    root = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name in ("naïve", "雪"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            picture(rng, 40, 40).save(root / "images" / name / f"{number}.jpg")
    source = ImageFolder(root / "images", val_fraction=0.25)
    build(Plan(source, Options(samples_per_shard=1)), root / "shards", workers=1)
    for year in (2010, 2012):
        Mini(root / str(year), year)
    test_tables.kaggle(root / "of-kaggle")
    test_tables.tiny(root / "of-tiny")
    test_tables.hub(root / "of-hub.parquet", test_tables.hub_rows(40))
    labels = ((name, path) for name in ("naïve", "雪") for path in sorted((root / "images" / name).iterdir()))
    rows = "".join(f"{path.relative_to(root)},{name}\n" for name, path in labels)
    (root / "list.csv").write_text(f"path,label\n{rows}", encoding="utf-8")
    code, errors = run(root, [*TRAIN, "--run.no-report", "--run.dir", "run"])
    assert code == 0, errors
    return root


def run(folder: Path, command: list, *, only_first_line: bool = False, **environment) -> tuple[int, str]:
    """The exit code and the errors."""
    script, *args = command
    argv = [sys.executable, str(ROOT / "tests" / "in_environment.py"), json.dumps(environment), str(ROOT / script)]
    process = subprocess.Popen([*argv, *map(str, args)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if only_first_line:
        process.stdout.readline()
        process.stdout.close()
    _, errors = process.communicate(timeout=500)
    return process.returncode, errors.decode()


def test_no_tool_and_no_source_is_left_out():
    scripts = {path.name for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()}
    assert {Path(tool.command[0]).name for tool in TOOLS.values()} == scripts | {"run.py", "__main__.py"}
    assert {*SOURCES, "index"} == {tool.command[1] for tool in TOOLS.values() if "make_shards" in tool.command[0]}


def chosen() -> Iterator[Any]:
    """Each tool in each environment. Slow: environments one by one, and what another source of make_shards shows."""
    for environment, tool in itertools.product(ENVIRONMENTS | ALONE, TOOLS):
        repeats = (
            tool in ("digits", "index", "imagenet2010", "kaggle", "tiny-imagenet", "csv", "webdataset", "hf-parquet")
            and environment != FIRST
        )
        marks = [pytest.mark.slow] * (repeats or environment in ALONE)
        yield pytest.param(environment, tool, marks=marks)


@pytest.mark.parametrize(("environment", "tool"), [*chosen()])
def test_a_tool_does_its_work_in_any_environment(environment, tool, place):
    options, (command, writes) = (ENVIRONMENTS | ALONE)[environment], TOOLS[tool]
    if "user" in options and os.getuid():
        pytest.skip("only root can become another user")
    folder = place / f"{NOT_UTF8 * ('xff' in environment)}{[*ENVIRONMENTS, *ALONE].index(environment)} {tool}"
    folder.mkdir()
    for name in INPUTS:
        (folder / name).symlink_to(place / name)
    if writes.startswith("run/"):
        (folder / "run").unlink()
        shutil.copytree(place / "run", folder / "run")
    if "user" in options:
        for path in (folder, folder / "run"):
            os.chown(path, NOBODY, NOBODY)
    if environment.startswith("all names"):
        command = [folder / word if str(word).startswith((*INPUTS, "out")) else word for word in command]
    # As another user also without what the fork server has imported, and compiled as root
    real = environment == "nobody" and tool in ("train", "imagefolder")
    with fork_server.real_processes() if real else contextlib.nullcontext():
        code, errors = run(folder, command, only_first_line=environment == "head", **options)
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    if environment.startswith("all names") and tool == "train":
        assert (code, errors.count("\n")) == (2, 1)
        assert errors.endswith("the name is not UTF-8; choose another --run.dir\n")
        return
    assert code == 0 or (environment == "head" and tool != "train" and code == 141), errors
    assert code or (folder / writes).stat().st_size
