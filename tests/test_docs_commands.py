"""Every command of README.md, CONTRIBUTING.md and docs/ runs, in the order of its page, or NOT_RUN gives the reason.

Each page is one shell, in a folder with this checkout's files and what `make demo` leaves. `.venv` is activated if the
page does not do it itself, as README.md says. GIVEN, BEFORE, CHANGED, FEWER and NARROW hold all that differs from what
a reader types. The programs of .venv/bin are forks of the fork server; with REAL_PROCESSES=1 they are real starts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import ImageFolder
from tests import fork_server
from tests.conftest import ROOT, picture
from tests.pipeline.archives import Mini
from tools import evaluate, make_shards
from tools.bench.__main__ import make_parser as bench_parser
from train import cli

PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text()
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
}
# Of a fence. sh: commands. console: a command after "$ ", and what it prints. py: a part of a Python file.
LANGUAGES = {"sh", "console", "python", "py", "text", "yaml"}
MARKED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$|`([^`]+)`", re.MULTILINE | re.DOTALL)
PROGRAMS = "python3?|make|accelerate|torchrun|pip|docker|source|export|sbatch|srun|scancel|curl|find|touch"
INLINE = re.compile(rf"(\w+=\S+ )*({PROGRAMS}) \S|\S+/\S+\.sh\b")
NAMES = {"accelerate launch", "python train/run.py"}  # not commands

NOT_RUN = {
    "make setup": "installs packages; .ci/run",
    "make demo": "the state in which the pages begin; .ci/run",
    "make test": "is this suite; .ci/run",
    "make test-all": "is this suite; .ci/run",
    "make docs-test": "is this suite; .ci/run",
    "make faults": "this suite at more length, for an hour",
    "FAULTS=1 python -m pytest tests/faults/test_inputs.py": "this suite at more length",
    "python -m pytest tests/pipeline/test_order.py": "is in this suite",
    "python tests/limits.py": "reads git's files; .ci/run",
    "make format": "changes files",
    "python tools/make_shards.py listed": "needs the example's code; tests/test_docs.py",
    "make netns-test": "needs root and iproute2; is a suite of its own",
    "make slurm-test": "needs root and Slurm; is a suite of its own",
    "make ray-test": "installs Ray; is a suite of its own",
    "python tools/make_shards.py imagenet2012 --src /data/archives --out /data/shards --executor ray": (
        "needs Ray; tests/pipeline/test_ray.py"
    ),
    "make simd": "replaces Pillow, and needs a compiler and headers",
    "make accuracy": "needs CIFAR-10 and two hours; tests/tools/test_bench.py",
    "make gpu-proof": "needs a GPU, or minutes without one; .ci/run",
    "python tools/gpu_proof.py --steps": "needs a GPU; tests/tools/test_gpu_proof.py",
    "python tests/tools/explain_pairs.py": "takes minutes; its parts: tests/tools/test_explain.py",
    "git worktree add --detach ../before 702004f": "needs the history of this repository",
    "python tests/tools/cuts_pairs.py": "takes a quarter of an hour; tests/pipeline/test_cuts.py",
    "python tests/tools/remote_rates.py": "takes minutes; tests/pipeline/test_remote.py, tests/pipeline/test_copies.py",
    "python tools/bench": "takes minutes to hours; tests/tools/test_bench.py, tests/test_environments.py",
    "accelerate launch --config_file docker/accelerate/8gpu.yaml": "needs eight GPUs; tests/docker/test_image_files.py",
    "accelerate launch --config_file docker/accelerate/2x8.yaml": "needs two hosts; tests/cluster/test_netns.py",
    "torchrun --nnodes=1:4": "needs four hosts; tests/faults/test_stops.py",
    "torchrun --standalone --nproc_per_node 2 script.py": "tests/test_packaging.py",
    "python train/run.py seed --data.shards s3://bucket/imagenet": "needs S3; tests/pipeline/test_remote.py",
    "python tools/make_shards.py imagenet2012 --src /data/archives --out s3://bucket/imagenet": (
        "needs S3; tests/pipeline/test_bucket.py"
    ),
    "python train/run.py seed --data.shards /nfs/imagenet": "needs network storage; tests/pipeline/test_copies.py",
    "make image": "needs Docker; tests/docker/build_image.sh",
    "tests/docker/build_image.sh": "needs root and a network",
    "docker": "needs Docker; tests/docker/test_entrypoint.py runs the same commands without it",
    "python3 /opt/imagenet-express/tools/report.py": "is in the image",
    "sbatch": "needs Slurm; tests/slurm/test_cluster.py",
    "srun": "needs Slurm; tests/slurm/test_cluster.py",
    "scancel": "needs Slurm; tests/slurm/test_cluster.py",
    "docker/slurm/shard.sh": "needs Slurm; tests/slurm/test_scripts.py",
    "pip install": "needs a network; tests/test_packaging.py installs the wheel",
    "python tools/export.py runs/torchvision alexnet.pth": "needs a net at full size; tests/tools/test_export.py",
}

# Files that a page takes for granted, by the fixture `things`
GIVEN = {
    "README.md": {"photos": "photos", "data/archives": "archives", "tars": "tars"},
    "docs/cuts.md": {"shards/imagenet": "few"},
    "docs/evaluate.md": {
        "data/shards": "few", "photos": "photos",
        "runs/paper": "run", "runs/a": "run", "runs/b": "run", "runs/c": "run",
    },
    "docs/gpu-proof.md": {"all": "photos", "some": "photos"},
    "docs/model.md": {"data/shards": "tiny"},
    "docs/own-images.md": {
        "photos": "photos", "base/train": "photos", "base/val": "photos", "photo.jpg": "photo", "runs/other": "run",
    },
    "docs/recipes.md": {"data/shards": "tiny"},
    "docs/resident.md": {"images/train": "photos", "images/val": "photos"},
    "docs/results.md": {"cifar10/train": "photos", "cifar10/test": "photos", "sample": "few"},
    "docs/shards.md": {"data/archives": "archives"},
}  # fmt: skip
BEFORE = {"docs/evaluate.md": ["python tools/export.py runs/demo alexnet.safetensors"]}

# What is replaced in the commands of a page, or of all pages
CHANGED = {
    "": {"/data/": "data/", "imagenet2012 ": "imagenet2012 --no-md5 "},  # the archives are small ones of our own
    "README.md": {
        "WEIGHTS": "runs/demo",
        "{0000..1023}.tar' --out /data/shards": "{0000..0001}.tar' --out /data/indexed",  # a second way to shards
        "…": "demo --data.shards shards/digits --run.dir $(mktemp -d runs/XXXX)",
    },
    "docs/evaluate.md": {  # no network
        "curl -s https://example.org/cat.jpg": "cat photos/cat/0.jpg",
        "predict.py paper.onnx -": "predict.py alexnet.safetensors -",
    },
    "docs/model.md": {"resnet50": "resnet18"},  # less work
    "docs/failures.md": {"RUN STEP": "runs/demo 40"},
    "docs/own-images.md": {"weights='DEFAULT'": "weights=None", "pretrained=True": "pretrained=False"},  # no network
    "docs/slurm.md": {"RUN/": "runs/demo/"},
}
FEWER = " --limit-steps 1 --train.batch 4 --train.compile off"  # of each training
NARROW = " --model.width 0.0625 --model.weight-init he"  # of each AlexNet from scratch


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a page, on one line and without its comment, and the lines that the page shows it to print."""
    for language, block, inline in MARKED.findall(PAGES[page]):
        lines = re.sub(r"\\\n *", "", block).splitlines()
        if language == "sh":
            yield from ((line.partition(" # ")[0].strip(), []) for line in lines)
        elif language == "console":
            shown = [re.sub(r" +<- .*", "", line) for line in lines[1:]]
            yield lines[0].removeprefix("$ "), shown[: next(i for i, line in enumerate(shown) if "…" in line)]
        elif INLINE.match(span := " ".join(inline.split())) and span not in NAMES:
            yield span, []


def not_run(command: str) -> bool:
    return any(f"{command} ".startswith(f"{listed} ") for listed in NOT_RUN)


EVERY = [command for page in PAGES for command, _ in commands(page)]


def changed(page: str, command: str) -> str:
    for old, new in (CHANGED.get(page, {}) | CHANGED[""]).items():
        command = command.replace(old, new)
    if "train/run.py" in command and not re.search("--(help|list|print)", command):
        command += FEWER + NARROW * ("finetune" not in command and "--model.name" not in command)
    return command


def test_every_block_names_its_language():
    for page, text in PAGES.items():
        fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
        assert set(fences[::2]) <= LANGUAGES, page
        assert set(fences[1::2]) <= {""}, page
        for language, block, _ in MARKED.findall(text):
            assert language != "text" or not any(INLINE.match(line.strip()) for line in block.splitlines()), page


def test_the_tables_hold_what_the_pages_have():
    assert len(EVERY) > 80
    for listed, reason in NOT_RUN.items():
        assert any(f"{command} ".startswith(f"{listed} ") for command in EVERY), listed
        for path in re.findall(r"(?:tests|\.ci)/[\w./]+", reason):
            assert (ROOT / path).is_file(), path
    for page, changes in CHANGED.items():
        text = " ".join(command for command, _ in commands(page)) if page else " ".join(EVERY)
        for old in changes:
            assert old in text, (page, old)


OPTIONS = {
    r"train/run\.py|train\.sbatch|:0\.1\.0 train": cli.parse,
    r"tools/bench": lambda argv: bench_parser().parse_args(argv),
    r"make_shards\.py|:0\.1\.0 shard|--(?= imagenet)": lambda argv: make_shards.parser().parse_args(argv),
    r"tools/evaluate\.py|:0\.1\.0 evaluate": lambda argv: evaluate.parser().parse_args(argv),
}


def test_what_is_not_run_has_options_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = 0
    for command in filter(not_run, EVERY):
        for script, parse in OPTIONS.items():
            if (found := re.search(rf"({script}) ([a-z-].*)", command)) and "listed" not in command:
                parse(found[2].replace("…", "--data.shards SHARDS").split())
                parsed += 1
    assert parsed >= 15


@pytest.fixture(scope="module")
def things(tmp_path_factory, digits, few_digits, trained) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("things")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "photos" / name).mkdir(parents=True)
        for number in range(10):
            picture(rng, 48, 40).save(root / "photos" / name / f"{number}.jpg")
    Mini(root / "archives", 2012)
    (root / "tars").mkdir()
    for number, tar in enumerate([*few_digits.glob("*.tar")][:2]):
        shutil.copy(tar, root / "tars" / f"train-{number:04d}.tar")
    build(Plan(ImageFolder(root / "photos", val_fraction=0.2), Options()), root / "tiny", workers=1)
    made = {name: root / name for name in ("photos", "archives", "tars", "tiny")}
    return made | {"photo": root / "photos/cat/0.jpg", "digits": digits, "few": few_digits, "run": trained}


def checkout(root: Path, things: dict[str, Path], given: dict[str, str]) -> None:
    """A clone after `make demo`, with all that the page takes for granted. Commands change a copy."""
    for name in ("pipeline", "model", "train", "tools", "docker", "tests", "Makefile", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", root / "docs")
    for path, name in {"shards/digits": "digits", "runs/demo": "run", **given}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if things[name].is_dir():
            shutil.copytree(things[name], root / path)
        else:
            shutil.copy(things[name], root / path)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"export PATH={programs}:$PATH\n")
    fork_server.write_programs(programs, "python", "accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if not all(not_run(c) for c, _ in commands(page))])
def test_every_command_of_a_page_works(page, things, tmp_path):
    checkout(tmp_path, things, GIVEN.get(page, {}))
    activate = "source .venv/bin/activate"
    todo = [(command, shown) for command, shown in commands(page) if not not_run(command)]
    todo = [(command, []) for command in BEFORE.get(page, [])] + todo
    if (activate, []) not in todo:
        todo.insert(0, (activate, []))
    script = "".join(f"{changed(page, command)}\nprintf '\\n@@ %s\\n' $?\n" for command, _ in todo)
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=env | {"PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = re.findall(r"(.*?)\n@@ (\d+)\n", done.stdout, re.DOTALL)
    for (command, shown), (output, code) in zip(todo, found):
        what = f"{changed(page, command)}\nended with {code}:\n{output}"
        assert (code == "0") != bool(shown), what  # what a page shows are errors
        assert shown or "Traceback" not in output, what
        assert all(line in output for line in shown), what
    assert len(found) == len(todo), done.stdout
