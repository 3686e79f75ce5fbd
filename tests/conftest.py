"""Real files for the tests: the embedded digits as shards, photograph-like JPEGs, and shared data if present."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import Digits, ImageFolder
from pipeline.write.sources.base import Items
from tests import fork_server
from tools import cli

subprocess.Popen = fork_server.Popen
# A test must pass on a slow processor and beside other work.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("IMAGENET_EXPRESS_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # the workers inherit its address
        fork_server.start()
    elif signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by `pytest &`: processes would ignore Ctrl-C too
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slowest files first, so that no worker starts one at the end."""
    first = [
        "train/test_run",
        "tools/test_gpu",
        "test_docs_c",
        "train",
        "faults",
        "tools",
        "cluster",
        "docker",
        "test_p",
        "test_e",
    ]
    items.sort(key=lambda item: next((i for i, name in enumerate(first) if f"tests/{name}" in item.nodeid), len(first)))


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder for all tests of this run, made by the worker that needs it first; tests that change files copy it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.whole").exists():
            make(root / name)
            (root / f"{name}.whole").touch()
    return root / name


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The embedded digits, sharded as make demo does."""
    return once(tmp_path_factory, "digits", lambda out: build(Plan(Digits(side=36), Options()), out, workers=1))


class FewDigits(Digits):
    """A quarter of the digits: 356 for training, 90 for validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.splits = {name: Items(list(items)[: {"train": 356}.get(name, 90)]) for name, items in self.splits.items()}


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory) -> Path:
    return once(tmp_path_factory, "few-digits", lambda out: build(Plan(FewDigits(side=36), Options()), out, workers=1))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digits) -> Path:
    """A run that classifies most digits correctly, with averaged weights beside its own."""

    def train(run: Path) -> None:
        args = ["demo", "--data.shards", digits, "--train.epochs", 3, "--regularize.ema", 0.9, "--run.dir", run]
        done = run_tool("train/run.py", *args, "--model.width", 0.125)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "demo", train)


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An image of smooth colours with some noise: it compresses and resizes like a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.integers(-12, 13, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


SIZES = [(300, 400), (400, 300), (256, 256), (256, 300), (333, 256), (257, 511), (500, 375), (180, 240)]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """train/ and val/ of two classes, 12 and 4 images, of many sizes and JPEG kinds."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    kinds = [
        {"subsampling": "4:2:0"},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"progressive": True},
    ]
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = picture(rng, *SIZES[(i + label) % len(SIZES)])
                if i == 4:
                    image = image.convert("L")
                image.save(folder / f"{i}.jpg", quality=92, **kinds[i % len(kinds)])
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory, image_folder) -> dict[str, Path]:
    """The same images kept as they are, and as JPEGs of short side 256."""
    source = ImageFolder(image_folder / "train", image_folder / "val", "pets")
    encodings = {"keep": Encoding(), "jpeg": Encoding("jpeg", size=256)}
    out = {}
    for name, encoding in encodings.items():
        out[name] = tmp_path_factory.mktemp(name)
        build(Plan(source, Options(encoding, samples_per_shard=5)), out[name], workers=1)
    return out


@pytest.fixture(scope="session")
def imagenet_sample(tmp_path_factory) -> Path:
    """64 real ImageNet images as an ImageFolder; skips if the shared data is missing."""
    return real_images(tmp_path_factory.mktemp("imagenet"), 64)


def real_images(root: Path, count: int) -> Path:
    archive = SHARED / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip("imagenet-sample.tar is not here; set IMAGENET_EXPRESS_DATA to the folder that holds it")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile()][:count]
        tar.extractall(root, members=members, filter="data")
    return root


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips if torch.compile does not work: it needs a C++ compiler."""
    import torch

    from train.networks import no_compiler

    if reason := no_compiler(torch.device("cpu")):
        pytest.skip(f"torch.compile does not work here: {reason}")


def run_tool(*args: object, **kwargs) -> subprocess.CompletedProcess[str]:
    """Runs a script of the repository in a process of its own, from a foreign folder."""
    command = [sys.executable, str(ROOT / str(args[0])), *map(str, args[1:])]
    return subprocess.run(command, **{"capture_output": True, "text": True, "cwd": "/"} | kwargs)


def run_here(main, monkeypatch, capsys, *args: object) -> tuple[int, str]:
    """Runs a tool's `main` in this process, without importing torch again; returns its exit code and its error line."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return int(end.value.code or 0), lines[0]


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed tool left on stderr."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: "), done.stderr
    return lines[0]
