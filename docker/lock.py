#!/usr/bin/env python3
"""Writes docker/requirements*.txt: what the image installs, with hashes, for Python 3.11 on Linux x86-64.

    pip install uv && python3 docker/lock.py

Versions are those of constraints.txt; uv adds what it does not name. In parts, because an image may take another torch
or another DALI: each file is complete together with requirements.txt, and installed without looking for dependencies.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILE = (
    "uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url",
    "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--constraints", "constraints.txt",
)  # fmt: skip
TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")
DALI = ("cu13", "cu12")
# Pillow-SIMD is a fork of Pillow: nothing depends on it by name. pybind11 and setuptools are what it is built with.
BUILD = "setuptools\npybind11\n"
SIMD = "pillow-simd\n"

Blocks = dict[str, str]  # name → its line and its hashes


def main() -> None:
    whole = compiled("pyproject.toml")
    torch = {name: block for name, block in whole.items() if TORCH.fullmatch(name)}
    write("requirements.txt", "all but torch, DALI and what only they need", without(whole, torch))
    write("requirements-torch.txt", "torch with CUDA", torch)
    for version in DALI:
        more = without(compiled("pyproject.toml", "--extra", f"dali-{version}"), whole)
        write(f"requirements-dali-{version}.txt", f"DALI for CUDA {version[2:]}", more)
    write("requirements-build.txt", "what builds wheels; not in the image", compiled("-", given=BUILD))
    write("requirements-pillow-simd.txt", "Pillow-SIMD's source", compiled("-", given=SIMD))


def compiled(*arguments: str, given: str = "") -> Blocks:
    done = subprocess.run([*COMPILE, *arguments], input=given, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"error: uv: {done.stderr.strip()}")
    blocks = re.findall(r"^(\S+?)==(?:.*\\\n)*.*\n", done.stdout, flags=re.MULTILINE)
    texts = re.split(r"^(?=\S)", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(blocks, texts, strict=True))


def without(blocks: Blocks, others: Blocks) -> Blocks:
    return {name: block for name, block in blocks.items() if name not in others}


def write(name: str, what: str, blocks: Blocks) -> None:
    header = f"# Of the image: {what}. Made by docker/lock.py (pip install uv); do not edit.\n"
    (ROOT / "docker" / name).write_text(header + "".join(blocks.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
