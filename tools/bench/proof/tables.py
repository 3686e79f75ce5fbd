"""The GPU tables of docs/results.md, made from the JSON of tools/gpu_proof.py."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.files import atomic_write
from tools.bench.harness import Json, markdown

BEGIN, END = "<!-- gpu tables: written by tools/gpu_proof.py --tables -->", "<!-- end of gpu tables -->"
NOT_MEASURED = "not measured"
BATCHES = (256, 1024)
CHECKS = {
    "preflight": "packages, compiler and decoders; pixels of the GPU against the CPU's",
    "tests": "tests marked `gpu`: a killed run's bits, two ranks' ids, and others",
}


def update(page: Path) -> None:
    """Rewrites the page's tables from results/gpu-*.json beside it. Raises ConfigError if it has no place for them."""
    text = updated(page.read_text(encoding="utf-8"), page.parent / "results", name=page.name)
    with atomic_write(page) as file:
        file.write(text.encode())


def updated(text: str, folder: Path, *, name: str) -> str:
    """`text` with the tables between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"--tables {name}: has no lines {BEGIN} and {END}; put both where the tables belong")
    return f"{before}{BEGIN}\n\n{tables(folder)}\n\n{END}{after}"


def tables(folder: Path) -> str:
    """Markdown. Steps that were not run, or only on a CPU, are "not measured"."""
    records = {
        path.stem.removeprefix("gpu-"): json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))
    }
    records = {name: record for name, record in records.items() if record["device"] != "cpu" and not record["tiny"]}
    # Also of a step that failed: what it has kept was measured.
    results = collections.defaultdict(dict, {name: record.get("result", {}) for name, record in records.items()})
    blocks = [machine(records), *(block(results) for block in (training, loader, layers, cifar)), checks(records)]
    return "\n\n".join(blocks)


def machine(records: Json) -> str:
    found = {_machine_of(record) for record in records.values()}
    return "\n".join(sorted(found)) if found else f"GPU: {NOT_MEASURED}."


def _machine_of(record: Json) -> str:
    e = record["environment"]
    packages = e.get("packages", {})
    dali = next((version for package, version in packages.items() if "dali" in package), "none")
    gpu = ", ".join(e.get("gpus", [])) or "GPU unknown"
    cores, python, commit = (e.get(name, "unknown") for name in ("cores", "python", "commit"))
    return f"{gpu}, {cores} cores, Python {python}, torch {packages.get('torch')}, DALI {dali}, commit {commit}."


def training(results: Json) -> str:
    columns = {"batch": "", "synthetic, img/s": ",.0f", "fed from shards, img/s": ",.0f", "fed of synthetic": ".2f"}
    columns |= {"waiting for data": ".1%", "GB": ".1f"}
    rows = []
    for batch in BATCHES:
        alone, both = results[f"train-{batch}"], results[f"fed-{batch}"]
        fed = both.get("fed", {})
        rates = [result.get("images_per_second") for result in (alone, fed)]
        fractions = [both.get("fed_of_synthetic"), fed.get("data_wait")]
        rows.append([f"{batch:,}", *rates, *fractions, alone.get("memory_gb")])
    return _table("Training", columns, rows, what=", preset `seed`, bf16")


def loader(results: Json) -> str:
    rows = []
    for cell in results["loader"].get("cells", []) + results["region"].get("cells", []):
        busy = [cell.get("gpu_percent"), cell.get("jpeg_engine_percent")]
        rates = [cell["error"], "", ""] if "error" in cell else [cell["images_per_second"], *busy]
        rows.append([f"`{cell['name']}`", *rates])
    columns = {"cell": "", "img/s": ",.0f", "GPU, %": ".0f", "JPEG engine, %": ".0f"}
    return _table("Loader alone", columns, rows)


def layers(results: Json) -> str:
    items = results["layers"].items()
    rows = [[name, item.get("error") or item["milliseconds"], item.get("times_copy", "")] for name, item in items]
    columns = {"layer or optimiser": "", "ms": ".3f", "times a copy of its input": ".2f"}
    return _table("Layers", columns, rows, what=" of 1,024 images, bf16, forward and backward")


def cifar(results: Json) -> str:
    rows = []
    for recipe in ("seed", "modern"):
        result = results[f"cifar-{recipe}"]
        seconds = [result.get("seconds_to", {}).get(level) for level in ("75%", "85%")]
        rows.append([f"`{recipe}`", *seconds, result.get("best_top1"), result.get("images_per_second")])
    columns = {"recipe": "", "s to 75 %": ".0f", "s to 85 %": ".0f", "best top-1": ".2%", "img/s": ",.0f"}
    measured = any(results[f"cifar-{recipe}"] for recipe in ("seed", "modern"))
    return _table("CIFAR-10 at full width", columns, rows if measured else [])


def checks(records: Json) -> str:
    rows = [[what, verdict(records.get(step))] for step, what in CHECKS.items()]
    others = {step: record for step, record in records.items() if step not in CHECKS and record["passed"] is False}
    rows += [[f"step `{step}`", verdict(record)] for step, record in others.items()]
    text = _table("Checks", {"check": "", "result": ""}, rows)
    pixels = [
        [name.removeprefix("pixels, "), *(values[column] for column in ("mean", "largest", "worst_tile_mean"))]
        for name, values in records.get("preflight", {}).get("result", {}).items()
        if name.startswith("pixels, ") and "error" not in values
    ]
    columns = {"decoder": "", "mean": "g", "largest": "g", "worst tile's mean": "g"}
    title = "\n\nGrey levels between the GPU's crops and the CPU's:\n\n"
    return text + (title + markdown(columns, pixels) if pixels else "")


def verdict(record: Json | None) -> str:
    """A step's outcome in a line."""
    if record is None or record["passed"] is None:
        return NOT_MEASURED
    return "passed" if record["passed"] else f"failed: {record['error'].splitlines()[-1]}"


def _table(title: str, columns: dict[str, str], rows: list[list[Any]], *, what: str = "") -> str:
    if not rows:
        return f"**{title}**: {NOT_MEASURED}."
    return f"**{title}**{what}:\n\n{markdown(columns, rows, missing=NOT_MEASURED)}"
