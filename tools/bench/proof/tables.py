"""The GPU tables of docs/results.md, made from the JSON of tools/gpu_proof.py."""

from __future__ import annotations

import json
from pathlib import Path

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
    blocks = [machine(records), training(records), loader(records), layers(records), cifar(records), checks(records)]
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


def training(records: Json) -> str:
    rows = []
    for batch in BATCHES:
        alone, both = _result(records, f"train-{batch}"), _result(records, f"fed-{batch}")
        fed = both.get("fed", {})
        rates = [_number(result, "images_per_second") for result in (alone, fed)]
        fractions = [_number(both, "fed_of_synthetic", ".2f"), _number(fed, "data_wait", ".1%")]
        rows.append([f"{batch:,}", *rates, *fractions, _number(alone, "memory_gb", ".1f")])
    header = ["batch", "synthetic, img/s", "fed from shards, img/s", "fed of synthetic", "waiting for data", "GB"]
    return "**Training**, preset `seed`, bf16:\n\n" + markdown(header, rows)


def loader(records: Json) -> str:
    cells = _result(records, "loader").get("cells", []) + _result(records, "region").get("cells", [])
    columns = ("images_per_second", "gpu_percent", "jpeg_engine_percent")
    rows = [
        [f"`{cell['name']}`", *([cell["error"], "", ""] if "error" in cell else (_number(cell, c) for c in columns))]
        for cell in cells
    ]
    return _table("Loader alone", ["cell", "img/s", "GPU, %", "JPEG engine, %"], rows)


def layers(records: Json) -> str:
    rows = []
    for name, item in _result(records, "layers").items():
        times = f"{item['times_copy']:.2f}" if "times_copy" in item else ""
        rows.append([name, item.get("error") or _number(item, "milliseconds", ".3f"), times])
    header = ["layer or optimiser", "ms", "times a copy of its input"]
    return _table("Layers", header, rows, what=" of 1,024 images, bf16, forward and backward")


def cifar(records: Json) -> str:
    found = {recipe: _result(records, f"cifar-{recipe}") for recipe in ("seed", "modern")}
    rows = []
    for recipe, result in found.items():
        seconds = [_number(result.get("seconds_to", {}), level, ".0f") for level in ("75%", "85%")]
        accuracy, rate = _number(result, "best_top1", ".2%"), _number(result, "images_per_second")
        rows.append([f"`{recipe}`", *seconds, accuracy, rate])
    header = ["recipe", "s to 75 %", "s to 85 %", "best top-1", "img/s"]
    return _table("CIFAR-10 at full width", header, rows if any(found.values()) else [])


def checks(records: Json) -> str:
    rows = [[what, verdict(records.get(step))] for step, what in CHECKS.items()]
    others = {step: record for step, record in records.items() if step not in CHECKS and record["passed"] is False}
    rows += [[f"step `{step}`", verdict(record)] for step, record in others.items()]
    lines = ["**Checks**:\n", markdown(["check", "result"], rows, left=2)]
    columns = ("mean", "largest", "worst_tile_mean")
    pixels = [
        [name.removeprefix("pixels, "), *(_number(values, column, "g") for column in columns)]
        for name, values in _result(records, "preflight").items()
        if name.startswith("pixels, ") and "error" not in values
    ]
    if pixels:
        lines.append("\nGrey levels between the GPU's crops and the CPU's:\n")
        lines.append(markdown(["decoder", "mean", "largest", "worst tile's mean"], pixels))
    return "\n".join(lines)


def verdict(record: Json | None) -> str:
    """A step's outcome in a line."""
    if record is None or record["passed"] is None:
        return NOT_MEASURED
    return "passed" if record["passed"] else f"failed: {record['error'].splitlines()[-1]}"


def _result(records: Json, step: str) -> Json:
    """Also of a step that failed: what it has kept was measured."""
    return records.get(step, {}).get("result", {})


def _number(values: Json, name: str, form: str = ",.0f") -> str:
    value = values.get(name)
    return NOT_MEASURED if value is None else format(value, form)


def _table(title: str, header: list[str], rows: list[list[str]], *, what: str = "") -> str:
    return f"**{title}**{what}:\n\n{markdown(header, rows)}" if rows else f"**{title}**: {NOT_MEASURED}."
