"""Machine code that is kept between processes belongs to the right module and version."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest

from pipeline import jit
from tests.conftest import ROOT

LOOKS = """
import sys, types
name, root = sys.argv[1:]
package = types.ModuleType("imagenet_express")
package.__path__ = [root]  # as an editable installation has it
sys.modules["imagenet_express"] = package
if name == "pipeline":
    sys.path.insert(0, root)
import importlib
import numpy as np
fetch = importlib.import_module(f"{name}.read.fetch")
print(fetch.not_plain_jpegs(np.zeros(1, np.uint8), np.zeros(1, np.int64), np.ones((1, 7), np.int64)).tolist())
print(sum(fetch.not_plain_jpegs.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_tools_and_own_scripts_share_a_checkout_and_a_changed_function_is_compiled(tmp_path):
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "pipeline", root / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))

    def looks(name):
        command = [sys.executable, "-c", LOOKS, name, str(root)]
        env = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "PYTHONPATH")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert looks("pipeline") == ["[True]", "0"]
    assert looks("pipeline") == ["[True]", "1"]
    assert looks("imagenet_express.pipeline") == ["[True]", "0"]
    assert looks("pipeline") == ["[True]", "1"]
    module = root / "pipeline/read/truncate_jpeg.py"
    text = module.read_text()
    changed = text.replace("return 0, 0", "return 1, 0")
    assert changed != text
    module.write_text(changed)
    assert looks("pipeline") == ["[False]", "0"]
    kept = [path.name.rpartition("-")[0] for path in (root / "pipeline/__pycache__").glob("*pipeline-*")]
    assert sorted(kept) == ["imagenet_express.pipeline", "pipeline"]


def test_a_user_without_a_home_compiles_for_each_start(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1 << 20)  # a number that has no name, as in containers
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(jit.NUMBA, "CACHE_DIR", "")
    monkeypatch.setattr(jit, "_cache_folder", jit._cache_folder.__wrapped__)
    assert jit.compiled(lambda x: x + 1)(1) == 2


def test_a_cache_elsewhere_leaves_the_checkouts_own_alone_and_a_new_version_replaces_it(monkeypatch, tmp_path):
    kept = tmp_path / "__pycache__" / f"{jit.__package__}-0123456789abcdef"
    kept.mkdir(parents=True)
    monkeypatch.setattr(jit, "PACKAGE", tmp_path)
    for folder in (str(tmp_path / "elsewhere"), ""):
        monkeypatch.setattr(jit.NUMBA, "CACHE_DIR", folder)
        jit._cache_folder.__wrapped__()
        assert kept.exists() == bool(folder)


def squared(x):
    return x * x


def one_more(x):
    return inner(x) + 1


def compiles(barrier, results):
    """Puts how often this process compiled a function, and the one that it calls."""
    global inner  # where compiled code looks for it
    inner, outer = jit.compiled(squared), jit.compiled(one_more)
    barrier.wait()
    assert outer(3) == 10
    results.put([sum(each.stats.cache_misses.values()) for each in (inner, outer)])


def test_of_processes_that_start_together_one_compiles(monkeypatch, tmp_path):
    monkeypatch.setattr(jit.NUMBA, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "_cache_folder", lambda: str(tmp_path))
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(3), fork.Queue()
    processes = [fork.Process(target=compiles, args=(barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    counts = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert counts == [[0, 0], [0, 0], [1, 1]]
