"""Every tool's --help fits a screen and begins with a command that works when pasted, and that the README shows."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools import cli

LINES = 40
# In this order: export rejects a file that exists already. bench and gpu_proof take minutes; other tests run them.
TOOLS = ["make_shards", "check_shards", "report", "replay", "evaluate", "predict", "export"]


def helped(tool: str) -> list[str]:
    argv = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_no_tool_is_left_out():
    files = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__", "cli", "gpu_proof", "page"}
    assert files == set(TOOLS)


@pytest.mark.slow
def test_help_begins_with_what_works_and_stands_in_the_readme(trained, digits, tmp_path):
    """Pastes the commands into a folder with the results of `make demo`."""
    for name, target in (("tools", ROOT / "tools"), ("docs", ROOT / "docs")):
        (tmp_path / name).symlink_to(target)
    for folder, name, target in (("runs", "demo", trained), ("shards", "digits", digits)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).symlink_to(target)
    readme = (ROOT / "README.md").read_text()
    for tool in TOOLS:
        lines = helped(tool)
        assert len(lines) <= LINES, tool
        example = lines[2].strip()
        assert example.startswith(f"python tools/{tool}.py "), lines[:4]
        assert example in readme
        argv = [sys.executable, *shlex.split(example)[1:]]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, f"{example}: {done.stderr}"
        assert done.stdout


def test_a_file_to_write_takes_the_place_of_no_device_and_goes_through_a_link(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # stands for /dev/stdout: root could replace that
    with pytest.raises(argparse.ArgumentTypeError, match="pipe is a folder, a device or a pipe; name a file"):
        cli.new_file(str(tmp_path / "pipe"))
    (tmp_path / "link").symlink_to("result.json")
    assert cli.new_file(str(tmp_path / "link")) == tmp_path / "result.json"
