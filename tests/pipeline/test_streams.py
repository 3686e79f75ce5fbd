"""Programs whose standard streams are closed, cannot encode a character, or have lost their reader."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PRINTS = """
import sys
from pipeline import streams
streams.prepare(outlive_readers={outlive})
print("3 × 4 caf\\udce9")
print("read:", len(sys.stdin.read()), file=sys.stderr)
files = [open({path!r}, "w") for _ in range(3)]
print("last", flush=True)
"""
CLOSED = {"stdin": 0, "stdout": 1, "stderr": 2}


def run(path, *, outlive=True, close=(), encoding="utf-8", **options):
    def close_some():
        for number in close:
            os.close(number)

    script = PRINTS.format(outlive=outlive, path=str(path))
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, stdin=subprocess.DEVNULL, env=env, preexec_fn=close_some, **options)


@pytest.mark.parametrize("names", [["stdin"], ["stdout"], ["stderr"], ["stdout", "stderr"], list(CLOSED)])
def test_a_closed_stream_is_nowhere_and_no_file_takes_its_place(tmp_path, names):
    done = run(tmp_path / "file", close=[CLOSED[name] for name in names])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b""
    assert (b"last" in done.stdout) == ("stdout" not in names)
    assert (b"read: 0" in done.stderr) == ("stderr" not in names)


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", rb"3 \xd7 4 caf\udce9"), ("latin-1", b"3 \xd7 4 caf\\udce9"), ("utf-8", "3 × 4 caf\\udce9".encode())],
)
def test_what_an_encoding_lacks_is_escaped(tmp_path, encoding, printed):
    assert run(tmp_path / "file", encoding=encoding).stdout.splitlines() == [printed, b"last"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_ends_only_programs_that_want_it(tmp_path, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    read, write = os.pipe()
    os.close(read)
    assert run(tmp_path / "file", stdout=write, stderr=write).returncode == 0
    done = run(tmp_path / "file", outlive=False, stdout=write)
    assert b"BrokenPipeError" in done.stderr
    os.close(write)


def test_a_full_disk_ends_only_programs_whose_output_is_their_work(tmp_path):
    with open("/dev/full", "w") as full:
        assert run(tmp_path / "file", stdout=full, stderr=full).returncode == 0
        assert b"No space left" in run(tmp_path / "file", outlive=False, stdout=full).stderr


TOOLS = sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text())
FAST = ("tools/make_shards.py", "tools/evaluate.py", "train/run.py")  # the others: here, slow; test_environments.py


@pytest.mark.parametrize(
    "tool", [*FAST, *(pytest.param(tool, marks=pytest.mark.slow) for tool in TOOLS if tool not in FAST)]
)
def test_help_into_a_pipe_that_ends_early_is_silent(tool):
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(ROOT / tool), "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env)
    os.close(write)
    assert done.returncode in (0, 141)  # argparse may drop the error
    assert done.stderr == b""


@pytest.mark.parametrize(("chosen", "used"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_of_a_training_sleep_while_they_wait_unless_chosen_otherwise(chosen, used):
    """Read when torch is loaded, which the start must not do before."""
    script = "import os, sys, train.run; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | chosen
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == f"{used} False\n", done.stderr


@pytest.mark.parametrize(
    ("tool", "missing", "printed"),
    [
        ("tools/make_shards.py", "numpy", ""),
        ("tools/make_shards.py", "PIL", ""),
        ("train/run.py", "numpy", ""),
        ("train/run.py", "tyro", ""),
        # Printed before torch is imported, which takes seconds
        ("train/run.py", "torch", "network small, data none, run folder runs/demo\n"),
    ],
)
def test_a_python_without_the_packages_says_what_to_start(tmp_path, tool, missing, printed):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError(name={missing!r})\n")
    argv = ["demo", "--data.shards", "none"] if tool == "train/run.py" else ["digits", "--out", str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / tool), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    wanted = f"error: {sys.executable} has no package '{missing}'; start it with .venv/bin/python"
    assert (done.returncode, done.stderr[: len(wanted)], done.stderr.count("\n")) == (1, wanted, 1)
    assert done.stdout == printed
