"""The GPU tables of docs/results.md, made from the JSON of tools/gpu_proof.py."""

import collections
import json
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.files import atomic_write
from pipeline.settings import flatten
from tools.bench.harness import Json, table

BEGIN, END = "<!-- gpu tables: written by tools/gpu_proof.py --tables -->", "<!-- end of gpu tables -->"
NOT_MEASURED = "not measured"
TRAINING = {  # of each column, the field, by the name of its step
    "synthetic, img/s": "train-{}.images_per_second",
    "fed from shards, img/s": "fed-{}.fed.images_per_second",
    "fed of synthetic": "fed-{}.fed_of_synthetic",
    "waiting for data": "fed-{}.fed.data_wait",
    "GB": "train-{}.memory_gb",
}
CIFAR = {
    "s to 75%": "cifar-{}.seconds_to.75%",
    "s to 85%": "cifar-{}.seconds_to.85%",
    "best top-1": "cifar-{}.best_top1",
    "img/s": "cifar-{}.images_per_second",
}
PIXELS = ("mean", "largest", "worst_tile_mean")
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
    records = {}
    for path in sorted(folder.glob("gpu-*.json")):
        record = json.loads(path.read_text())
        if record["device"] != "cpu" and not record["tiny"]:
            records[record["step"]] = record
    # Includes failed steps: the results that they kept were measured.
    results = collections.defaultdict(dict, {name: record.get("result", {}) for name, record in records.items()})
    blocks = [machine(records), *(block(results) for block in (training, loader, layers, cifar)), checks(records)]
    return "\n\n".join(blocks)


def machine(records: Json) -> str:
    found = {_machine_of(record["environment"]) for record in records.values()}
    return "\n".join(sorted(found)) or f"GPU: {NOT_MEASURED}."


def _machine_of(e: Json) -> str:
    if "error" in e:
        return f"GPU unknown: {e['error']}."
    dali = next((version for package, version in e["packages"].items() if "dali" in package), "none")
    versions = f"Python {e['python']}, torch {e['packages'].get('torch')}, DALI {dali}, commit {e['commit']}"
    return f"{', '.join(e['gpus'])}, {e['cores']} cores, {versions}."


def training(results: Json) -> str:
    rows = [{"batch": f"{batch:,}"} | columns(results, TRAINING, batch) for batch in (256, 1024)]
    return _table("Training", rows, what=", preset `seed`, bf16")


def loader(results: Json) -> str:
    rows = [
        {
            "cell": f"`{cell['name']}`",
            "img/s": cell.get("error", cell.get("images_per_second")),
            "GPU, %": cell.get("gpu_percent"),
            "JPEG engine, %": cell.get("jpeg_engine_percent"),
        }
        for step in ("loader", "region")
        for cell in results[step].get("cells", [])
    ]
    return _table("Loader alone", rows)


def layers(results: Json) -> str:
    found, rows = results["layers"], []
    for name, item in found.items():
        own, copy = (found.get(key, {}).get("milliseconds") for key in (name, f"{name.split()[0]} copy"))
        times = own / copy if own and copy else "–"
        rows.append({"layer or optimiser": name, "ms": item.get("error", own), "times a copy of its input": times})
    return _table("Layers", rows, what=" of 1,024 images, bf16, forward and backward")


def cifar(results: Json) -> str:
    rows = [{"recipe": f"`{recipe}`"} | columns(results, CIFAR, recipe) for recipe in ("seed", "modern")]
    return _table("CIFAR-10 at full width", rows if results["cifar-seed"] or results["cifar-modern"] else [])


def columns(results: Json, fields: dict[str, str], of: object) -> Json:
    """Returns one row: the fields of the steps whose names end with `of`; None for a field that was not measured."""
    flat = flatten(results)
    return {column: flat.get(field.format(of)) for column, field in fields.items()}


def checks(records: Json) -> str:
    others = {step for step, record in records.items() if record["passed"] is False} - CHECKS.keys()
    steps = CHECKS | {step: f"step `{step}`" for step in sorted(others)}
    rows = [{"check": what, "result": verdict(records.get(step))} for step, what in steps.items()]
    pixels = [
        {"decoder": name.removeprefix("pixels, "), **{field: values[field] for field in PIXELS}}
        for name, values in records.get("preflight", {}).get("result", {}).items()
        if name.startswith("pixels, ") and "error" not in values
    ]
    grey = f"\n\nGrey levels between the GPU's crops and the CPU's:\n\n{table(pixels)}" if pixels else ""
    return _table("Checks", rows) + grey


def verdict(record: Json | None) -> str:
    """A step's outcome in a line."""
    if record is None or record["passed"] is None:
        return NOT_MEASURED
    return "passed" if record["passed"] else f"failed: {record['error'].splitlines()[-1]}"


def _table(title: str, rows: list[Json], *, what: str = "") -> str:
    return f"**{title}**{what}:\n\n{table(rows, missing=NOT_MEASURED)}" if rows else f"**{title}**: {NOT_MEASURED}."
