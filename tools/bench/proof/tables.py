"""The GPU tables of docs/results.md, made from the JSON of tools/gpu_proof.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.files import atomic_write

BEGIN, END = "<!-- gpu tables: written by tools/gpu_proof.py --tables -->", "<!-- end of gpu tables -->"
NOT_MEASURED = "not measured"
BATCHES = (256, 1024)
CHECKS = {
    "preflight": "packages, compiler and decoders; pixels of the GPU against the CPU's",
    "resume": "killed and started again under `--run.deterministic`: the same bits",
    "ranks": "two ranks on one GPU: the same ids",
    "tests": "tests marked `gpu`",
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


def machine(records: dict[str, Any]) -> str:
    found = {_machine_of(record) for record in records.values()}
    return "\n".join(sorted(found)) if found else f"GPU: {NOT_MEASURED}."


def _machine_of(record: dict[str, Any]) -> str:
    e = record["environment"]
    packages = e.get("packages", {})
    dali = next((version for package, version in packages.items() if "dali" in package), "none")
    gpu = ", ".join(e.get("gpus", [])) or "GPU unknown"
    cores, python, commit = (e.get(name, "unknown") for name in ("cores", "python", "commit"))
    return f"{gpu}, {cores} cores, Python {python}, torch {packages.get('torch')}, DALI {dali}, commit {commit}."


def training(records: dict[str, Any]) -> str:
    rows = []
    for batch in BATCHES:
        alone, both = _result(records, f"train-{batch}"), _result(records, f"fed-{batch}")
        fed = both.get("fed", {})
        rows.append(
            [
                f"{batch:,}",
                _number(alone, "images_per_second"),
                _number(fed, "images_per_second"),
                _number(both, "fed_of_synthetic", ".2f"),
                _number(fed, "data_wait", ".1%"),
                _number(alone, "memory_gb", ".1f"),
            ]
        )
    header = ["batch", "synthetic, img/s", "fed from shards, img/s", "fed of synthetic", "waiting for data", "GB"]
    return "**Training**, preset `seed`, bf16:\n\n" + table(header, rows, left=1)


def loader(records: dict[str, Any]) -> str:
    cells = _result(records, "loader").get("cells", []) + _result(records, "region").get("cells", [])
    if not cells:
        return f"**Loader alone**: {NOT_MEASURED}."
    columns = ("images_per_second", "gpu_percent", "jpeg_engine_percent")
    rows = [
        [f"`{cell['name']}`", *([cell["error"], "", ""] if "error" in cell else (_number(cell, c) for c in columns))]
        for cell in cells
    ]
    return "**Loader alone**:\n\n" + table(["cell", "img/s", "GPU, %", "JPEG engine, %"], rows, left=1)


def layers(records: dict[str, Any]) -> str:
    rows = [[f"`{name}`", format(value, ",.4g")] for name, value in _numbers(_result(records, "layers"))]
    return "**Layers**:\n\n" + table(["what", "value"], rows, left=1) if rows else f"**Layers**: {NOT_MEASURED}."


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of nested objects and lists, each by its path; an item of a list by its name, if it has one."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name} {key}".strip())
    elif isinstance(value, list):
        for number, item in enumerate(value):
            own = item.get("name", number) if isinstance(item, dict) else number
            yield from _numbers(item, f"{name} {own}".strip())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def cifar(records: dict[str, Any]) -> str:
    found = {recipe: _result(records, f"cifar-{recipe}") for recipe in ("seed", "modern")}
    if not any(found.values()):
        return f"**CIFAR-10 at full width**: {NOT_MEASURED}."
    rows = []
    for recipe, result in found.items():
        seconds = result.get("seconds_to", {})
        rows.append(
            [
                f"`{recipe}`",
                *(_number(seconds, level, ".0f") for level in ("75%", "85%")),
                _number(result, "best_top1", ".2%"),
                _number(result, "images_per_second"),
            ]
        )
    return "**CIFAR-10 at full width**:\n\n" + table(
        ["recipe", "s to 75 %", "s to 85 %", "best top-1", "img/s"], rows, left=1
    )


def checks(records: dict[str, Any]) -> str:
    rows = [[what, _verdict(records.get(step))] for step, what in CHECKS.items()]
    others = {step: record for step, record in records.items() if step not in CHECKS and record["passed"] is False}
    rows += [[f"step `{step}`", _verdict(record)] for step, record in others.items()]
    lines = ["**Checks**:\n", table(["check", "result"], rows, left=2)]
    pixels = {
        name.removeprefix("pixels, "): values
        for name, values in _result(records, "preflight").items()
        if name.startswith("pixels, ") and "error" not in values
    }
    if pixels:
        columns = ("mean", "largest", "worst_tile_mean")
        rows = [[how, *(_number(values, column, "g") for column in columns)] for how, values in pixels.items()]
        header = ["decoder", "mean", "largest", "worst tile's mean"]
        lines += ["\nGrey levels between the GPU's crops and the CPU's:\n", table(header, rows, left=1)]
    return "\n".join(lines)


def _verdict(record: dict[str, Any] | None) -> str:
    if record is None or record["passed"] is None:
        return NOT_MEASURED
    return "passed" if record["passed"] else f"failed: {record['error'].splitlines()[-1]}"


def _result(records: dict[str, Any], step: str) -> dict[str, Any]:
    """Also of a step that failed: what it has kept was measured."""
    result: dict[str, Any] = records.get(step, {}).get("result", {})
    return result


def _number(values: dict[str, Any], name: str, form: str = ",.0f") -> str:
    value = values.get(name)
    return NOT_MEASURED if value is None else format(value, form)


def table(header: list[str], rows: Iterable[list[str]], *, left: int) -> str:
    """left: how many columns hold text; the others hold numbers."""
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rules, *rows))
