"""The GPU proof: a step that hangs, dies or runs out of time costs only its own result; and the results' tables."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline import LoaderConfig, open_dataset
from pipeline.errors import ConfigError, ExpressError
from tests.conftest import ROOT
from tools.bench import harness
from tools.bench.cells import CELLS
from tools.bench.proof import grid, tables, training
from tools.bench.proof.base import Proof
from tools.bench.proof.data import enlarged, pictures, shards_of
from tools.bench.proof.preflight import differences
from tools.bench.proof.steps import GPU_TESTS, STEPS

# The script with other steps in its registry. `left`: a process that a step started and did not end.
PLANTED = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tools import cli, gpu_proof
from tools.bench.proof.steps import STEPS, Step

here = Path(__file__).parent

def hang(proof):
    (here / "hanging").write_text(str(os.getpid()))
    time.sleep(600)

def die(proof):
    proof.keep({{"rate": 7}})
    (here / "left").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def reject(proof):
    proof.keep({{"rate": 8}})
    raise ValueError("no such thing")

STEPS.clear()
STEPS |= {{
    "hang": Step(hang, "A", float(os.environ.get("HANG_SECONDS", "2"))),
    "die": Step(die, "A", 60),
    "reject": Step(reject, "A", 60),
    "fine": Step(lambda proof: {{"limit": proof.limit_seconds}}, "A", 60),
    "fed": Step(lambda proof: {{}}, "B", 60, "images"),
}}
gpu_proof.environment.describe = lambda: {{"gpus": [], "cores": 2}}
cli.run(gpu_proof.main)
"""


@pytest.fixture
def planted(tmp_path) -> list[str]:
    """The command line of the script with planted steps."""
    (tmp_path / "planted.py").write_text(PLANTED)
    return [sys.executable, str(tmp_path / "planted.py"), "--device", "cpu", "--out", str(tmp_path / "out")]


def answers(folder: Path) -> dict[str, dict]:
    return {path.stem.removeprefix("gpu-"): json.loads(path.read_text()) for path in folder.glob("gpu-*.json")}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_a_step_that_hangs_or_dies_costs_only_its_own_answer(planted, tmp_path):
    done = subprocess.run(planted, capture_output=True, text=True)
    assert done.returncode == 1
    assert "3 of 5 steps failed or had no time left: hang, die, reject" in done.stderr
    found = answers(tmp_path / "out")
    assert {name: record["passed"] for name, record in found.items()} == {
        "hang": False, "die": False, "reject": False, "fine": True, "fed": None,
    }  # fmt: skip
    assert found["hang"]["error"] == "took longer than its limit of 2 s"
    assert found["die"]["error"] == "was ended by SIGSEGV"
    assert found["die"]["output_tail"] == ["last words"]
    assert found["die"]["result"] == {"rate": 7}  # what it had measured until then
    assert found["reject"]["error"] == "ValueError: no such thing"
    assert found["reject"]["result"] == {"rate": 8}
    assert found["fed"]["skipped"] == "needs --shards or --images"
    assert all(record["environment"] == {"gpus": [], "cores": 2} for record in found.values())
    assert not is_running(int((tmp_path / "left").read_text()))


def test_steps_for_which_no_time_is_left_are_skipped_and_leave_earlier_answers_alone(planted, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gpu-die.json").write_text('{"passed": true}')
    done = subprocess.run([*planted, "--deadline", "0"], capture_output=True, text=True)
    assert done.returncode == 1
    found = answers(tmp_path / "out")
    assert found["fine"]["skipped"] == "no time left"
    assert found["die"] == {"passed": True}
    assert "fine: skipped: no time left" in done.stdout


def test_a_step_gets_no_more_time_than_is_left(planted, tmp_path):
    done = subprocess.run([*planted, "--steps", "fine", "--deadline", "30"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path / "out")["fine"]["result"]["limit"] < 30


def test_a_step_ends_with_the_script(planted, tmp_path):
    script = subprocess.Popen(
        [*planted, "--steps", "hang"], env=os.environ | {"HANG_SECONDS": "600", "TMPDIR": str(tmp_path)}
    )
    hanging = tmp_path / "hanging"
    while not (hanging.is_file() and hanging.read_text()):
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(signal.SIGKILL)
    script.wait()
    deadline = time.monotonic() + 300
    while is_running(int(hanging.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_machine_without_a_gpu_is_named_before_any_step(planted, tmp_path):
    command = [word if word != "cpu" else "cuda:0" for word in planted]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--device cuda:0: no CUDA device here" in done.stderr
    assert not answers(tmp_path / "out")


MISSING = (
    "torch", "torchvision", "accelerate", "numba", "simplejpeg", "nvidia", "tyro", "tensorboard", "matplotlib", "scipy",
    "sklearn", "webdataset", "PIL", "zlib_ng", "tqdm", "safetensors",
)  # fmt: skip


def test_the_script_starts_where_every_package_but_numpy_is_missing():
    code = f"import sys; sys.modules.update(dict.fromkeys({MISSING!r})); import tools.gpu_proof"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_begins_with_what_to_paste():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "gpu_proof.py"), "-h"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[2].strip().startswith("python tools/gpu_proof.py --steps A")
    assert len(lines) <= 45


# The registries


def test_cells_have_unique_names_valid_options_and_those_that_may_crash_come_last():
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)
    assert [cell.alone for cell in CELLS] == sorted(cell.alone for cell in CELLS)
    for cell in CELLS:
        assert isinstance(cell.config, LoaderConfig)
    region = [cell for cell in CELLS if cell.config.backend == "dali-gpu" and cell.config.decode == "region"]
    assert region
    assert all(cell.alone for cell in region)


@pytest.mark.parametrize("alone", [False, True])
def test_a_cell_that_kills_its_process_costs_no_cell_of_another(tmp_path, monkeypatch, alone):
    proof = Proof("cpu", True, tmp_path)
    cells = [cell.name for cell in CELLS if "cpu" in cell.devices and cell.alone == alone]

    def command(calls: list[str]) -> str:
        dies = json.loads(calls[0])["name"] == cells[0]
        line = json.dumps({"images": 100, "seconds": 2.0, "ended": 9.0})
        return f"import os; print({line!r}, flush=True); {dies} and os.kill(os.getpid(), 11)"

    def process(argv: list[str], **options) -> subprocess.Popen:
        return started([sys.executable, "-c", command(argv[3:])], **options)

    started = harness.process
    monkeypatch.setattr(harness, "process", process)
    monkeypatch.setattr(grid, "shards_of", lambda *_: tmp_path)
    monkeypatch.setattr(grid, "enlarged", lambda *_: tmp_path)
    found = grid.measured(proof, alone=alone)
    assert [cell["name"] for cell in found] == cells
    assert found[0]["images_per_second"] == 50.0
    if not alone:
        errors = [cell.get("error") for cell in found]
        assert errors == [
            None,
            *["its process was ended by SIGSEGV"] * 2,
            None,
            *["its process exited with code 0"] * 2,
        ]


def test_limits_of_each_command_leave_room_for_its_first_steps():
    for command, seconds in (("A", 300), ("B", 240)):
        assert max(step.limit_seconds for step in STEPS.values() if step.command == command) < seconds


def test_the_tests_marked_gpu_are_in_the_file_that_the_step_runs():
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"pytest\.mark\.gpu", path.read_text())]
    assert marked == [ROOT / GPU_TESTS]


# Functions that steps use


def test_an_enlarged_index_repeats_the_images_and_evaluates_few(tmp_path):
    shards = pictures(Proof("cpu", True, tmp_path), classes=3, count=40)
    dataset = open_dataset(enlarged(Proof("cpu", True, tmp_path), shards, "large"))
    assert dataset.split("train").samples == 1_281_167
    assert dataset.split("val").samples == 32
    assert set(dataset.split("train").index["label"].tolist()) == {0, 1, 2}
    assert dataset.encoding == "keep"


def test_raw_shards_are_made_of_the_images_in_the_jpeg_shards(shards, tmp_path):
    (tmp_path / "jpeg").symlink_to(shards["jpeg"])
    raw = open_dataset(shards_of(Proof("cpu", False, tmp_path / "scratch", shards=tmp_path), "raw"))
    assert raw.encoding == "raw"
    train = open_dataset(shards["jpeg"]).split("train")
    assert sorted(raw.split("train").index["label"]) == sorted(train.index["label"])


def test_a_wrong_block_of_pixels_is_an_error_and_a_grey_level_is_none():
    expected = torch.full((2, 3, 64, 64), 100, dtype=torch.uint8)
    right = differences([(expected, expected + 1)])
    assert right["mean"] == right["largest"] == 1
    images = expected.clone()
    images[1, :, 16:32, 32:48] = 0
    with pytest.raises(ExpressError, match="a tile differs by 100"):
        differences([(expected, images)])


@pytest.mark.parametrize(("engine", "percent"), [("41", 41), ("[N/A]", None)])
def test_utilisation_is_the_median_between_two_times(tmp_path, monkeypatch, engine, percent):
    asked = []
    monkeypatch.setattr(grid, "nvidia_smi", lambda *words: asked.append(words) or [f"63, {engine}"])
    with grid.utilisation(Proof("cuda:1", True, tmp_path)) as busy:
        began = time.time()
        while len(asked) < 2:
            time.sleep(0.05)
        assert busy(began, time.time()) == {"gpu_percent": 63, "jpeg_engine_percent": percent}
        assert busy(0, 1) == {"gpu_percent": None, "jpeg_engine_percent": None}
    assert asked[0][-2:] == ("-i", "1")


def test_seconds_to_an_accuracy_count_from_the_start_and_take_the_better_weights(tmp_path):
    lines = [
        {"kind": "start", "step": 0, "time": 100.0},
        {"kind": "train", "step": 10, "time": 104.0, "images_per_second": 50.0},
        {"kind": "val", "step": 10, "time": 105.0, "epoch": 1, "top1": 0.6},
        {"kind": "val of average", "step": 10, "time": 106.0, "epoch": 1, "top1": 0.8},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "val", "top1": 0.9')  # cut by a kill
    found = training.times_to((0.75, 0.85), tmp_path)
    assert found["seconds_to"] == {"75%": 6.0, "85%": None}
    assert (found["best_top1"], found["epochs"], found["images_per_second"]) == (0.8, 1, 50.0)


def test_training_on_noise_is_measured_once_in_a_walk(tmp_path):
    proof = Proof("cpu", True, tmp_path)
    assert proof.earlier("train-256") is None
    (tmp_path / "train-256.json").write_text('{"result": {"batch": 2}}')  # kept by a step that did not end
    assert proof.earlier("train-256") is None
    (tmp_path / "train-256.json").write_text('{"passed": true, "result": {"batch": 2}}')
    assert proof.earlier("train-256") == {"batch": 2}


# Tables


def record(step: str, result: dict, **more) -> str:
    described = {"gpus": ["GPU X"], "cores": 16, "python": "3.12.1", "commit": "abc", "packages": {"torch": "2.11.0"}}
    common = {"step": step, "passed": True, "device": "cuda:0", "tiny": False, "environment": described}
    return json.dumps(common | {"result": result} | more)


SPEED = {"batch": 256, "images_per_second": 23456.7, "data_wait": 0.0312, "memory_gb": 3.21}
PAGE = f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\nrest\n"


def test_tables_are_made_of_what_was_measured_on_a_gpu(tmp_path):
    cell = {"name": "jpeg-portable", "images_per_second": 12345.6, "gpu_percent": 3.0, "jpeg_engine_percent": None}
    crashed = {"name": "jpeg-dali-gpu-region-1", "error": "its process was ended by SIGSEGV"}
    for step, result, more in (
        ("train-256", SPEED, {}),
        ("fed-256", {"fed": SPEED | {"images_per_second": 20000.0}, "fed_of_synthetic": 0.853}, {}),
        ("loader", {"cells": [cell]}, {}),
        ("region", {"cells": [crashed]}, {}),
        ("cifar-seed", {"seconds_to": {"75%": 41.2, "85%": None}, "best_top1": 0.79, "images_per_second": 9e4}, {}),
        (
            "layers",
            {
                "lrn1 copy": {"milliseconds": 0.5},
                "lrn1 eager": {"milliseconds": 1.25},
                "pool": {"error": "E: x"},
            },
            {},
        ),
        ("tests", {}, {"passed": False, "error": "RunError: line\nother bits"}),
        ("profile", {}, {"passed": False, "error": "was ended by SIGSEGV"}),
        ("train-1024", SPEED, {"tiny": True}),
        ("fed-1024", {"fed": SPEED}, {"device": "cpu"}),
    ):
        (tmp_path / f"gpu-{step}.json").write_text(record(step, result, **more))
    text = tables.updated(PAGE, tmp_path, name="page.md")
    assert text.startswith("# Title\n\n" + tables.BEGIN)
    assert text.endswith(tables.END + "\nrest\n")
    assert "old" not in text
    for line in (
        "GPU X, 16 cores, Python 3.12.1, torch 2.11.0, DALI none, commit abc.",
        "| 256 | 23,457 | 20,000 | 0.853 | 0.0312 | 3.21 |",
        "| 1,024 | not measured | not measured | not measured | not measured | not measured |",
        "| `jpeg-portable` | 12,346 | 3 | not measured |",
        "| lrn1 eager | 1.25 | 2.5 |",
        "| pool | E: x | – |",
        "| `jpeg-dali-gpu-region-1` | its process was ended by SIGSEGV | not measured | not measured |",
        "| `seed` | 41.2 | not measured | 0.79 | 90,000 |",
        "| `modern` | not measured | not measured | not measured | not measured |",
        "| tests marked `gpu`: a killed run's bits, two ranks' ids, and others | failed: other bits |",
        "| packages, compiler and decoders; pixels of the GPU against the CPU's | not measured |",
        "| step `profile` | failed: was ended by SIGSEGV |",
    ):
        assert line in text.splitlines(), line


def test_without_answers_the_tables_say_not_measured(tmp_path):
    text = tables.updated(PAGE, tmp_path, name="page.md")
    assert text.count("not measured") >= 5
    assert not any(character.isdigit() for line in text.splitlines() if "img/s |" in line for character in line)
    with pytest.raises(ConfigError, match=r"--tables page\.md: has no lines"):
        tables.updated("# Title\n", tmp_path, name="page.md")


def test_the_committed_page_is_what_the_command_writes():
    page = ROOT / "docs" / "results.md"
    assert tables.updated(page.read_text(), page.parent / "results", name=page.name) == page.read_text()
