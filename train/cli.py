"""The command line of train/run.py: preset < --config < flags. Every error names the field and its value."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro

from model import ModelConfig
from pipeline.errors import ConfigError, DataError

from .config import RESUME_NEWEST, Config, did_you_mean, flatten, overfitting

NULLABLE = ("augment.scale_jitter",)
SHORT = (
    "data.shards", "data.val_split", "train.epochs", "train.batch", "train.accumulate", "train.precision",
    "train.compile", "optim.lr", "optim.weight_decay", "optim.schedule", "optim.warmup_epochs", "model.name",
    "model.width", "augment.resize", "augment.crop", "loader.backend", "run.dir", "run.save_every", "resume",
    "limit_steps", "overfit", "profile",
)  # fmt: skip


def parse(argv: list[str], presets: dict[str, Config], *, prog: str, told: dict[str, str] | None = None) -> Config:
    """The configuration that `argv` asks for: a preset or --config FILE first, then flags.

    told: what each preset says of itself. Raises ConfigError; exits where it only prints.
    """
    told = told or {}
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(presets, prog))
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--list":
        print(table(presets, told))
        raise SystemExit(0)
    named = not argv[0].startswith("--config")
    preset = argv[0] if named else ""
    if named and preset not in presets:
        raise ConfigError(f"unknown preset {preset!r}{did_you_mean(preset, presets)}; presets: {', '.join(presets)}")
    flags, file = _take_config(argv[named:])
    base = presets.get(preset, Config())
    if {"-h", "--help"} & set(flags):
        print(_short_help(preset, base, told.get(preset, ""), prog))
        raise SystemExit(0)
    printing, flags = "--print" in flags, [f.replace("--help-all", "--help") for f in flags if f != "--print"]
    if file:
        base = _read_config(file, base, prog=prog)
        preset = preset or file.stem
    flags = _expand_resume(flags)
    _refuse_unknown(flags, base)
    config = _tyro(flags, _for_net_of(flags, base), prog=f"{prog} {preset}")
    if not config.run.dir:
        folder = f"runs/{preset}-overfit" if config.overfit else f"runs/{preset}"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder))
    if printing:
        print(json.dumps(dataclasses.asdict(config), indent=1))
        raise SystemExit(0)
    if not config.data.shards:
        raise ConfigError("data.shards is not set; name a folder made by tools/make_shards.py with --data.shards DIR")
    return overfitting(config) if config.overfit else config


# What is printed


def _usage(presets: dict[str, Config], prog: str) -> str:
    return (
        f"usage: accelerate launch {prog} PRESET --data.shards DIR [--group.field VALUE ...]\n\n"
        f"presets: {', '.join(presets)}\n"
        f"python {prog} --list              what each is, and what to expect of it\n"
        f"python {prog} PRESET --help       its most used fields; --help-all: every field\n"
        f"python {prog} PRESET --print      its configuration as JSON, which --config FILE takes back"
    )


def table(presets: dict[str, Config], told: dict[str, str]) -> str:
    """A row for each preset: what it is, what to expect, on what and how long."""
    rows = []
    for name in presets:
        what, facts = describe(told.get(name, ""))
        rows.append(f"{name:<12} {what}")
        rows += [f"{'':<12} {fact}" for fact in facts]
    return "\n".join(rows)


def describe(docstring: str) -> tuple[str, list[str]]:
    """A preset's first sentence, and its "Expected: …" and "Hours: …"."""
    paragraphs = [" ".join(p.split()) for p in docstring.strip().split("\n\n")]
    lines = [" ".join(line.split()) for line in docstring.strip().splitlines()]
    return paragraphs[0], [line for line in lines if line.startswith(("Expected", "Hours"))]


def _short_help(preset: str, config: Config, told: str, prog: str) -> str:
    flat = flatten(config)
    lines = [f"usage: accelerate launch {prog} {preset or '--config FILE'} --data.shards DIR [--group.field VALUE ...]"]
    lines += ["", *(line.strip() for line in told.strip().splitlines()), ""]
    lines += [f"  --{name.replace('_', '-'):<24} {_shown(flat[name])}" for name in SHORT]
    return "\n".join([*lines, "", f"all {len(flat)} fields, explained: --help-all; as JSON: --print"])


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) or "(none)"


# What is read


def _take_config(flags: list[str]) -> tuple[list[str], Path | None]:
    """The flags without --config, and its file."""
    rest: list[str] = []
    file = None
    waiting = iter(flags)
    for flag in waiting:
        if flag == "--config":
            file = next(waiting, "")
        elif flag.startswith("--config="):
            file = flag.partition("=")[2]
        else:
            rest.append(flag)
            continue
        if not file or file.startswith("--"):
            raise ConfigError("--config: name a JSON file, as PRESET --print writes it")
    return rest, Path(file) if file else None


def _read_config(file: Path, base: Config, *, prog: str) -> Config:
    """`base` with the values of a JSON file: of --print, or a run folder's config.json."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise DataError(f"--config {file}: no such file") from err
    except (OSError, ValueError, RecursionError) as err:
        raise DataError(f"--config {file}: cannot be read as JSON ({err})") from err
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        raise DataError(f"--config {file}: holds no object of fields")
    flags: list[str] = []
    try:
        for name, value in _leaves(values).items():
            flags += _as_flags(name, value, base)
        return _tyro(flags, _for_net_of(flags, base), prog=prog)
    except ConfigError as err:
        raise ConfigError(f"--config {file}: {err}") from err


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _as_flags(name: str, value: Any, base: Config) -> list[str]:
    known = flatten(base)
    if name not in known:
        if any(field.startswith(name + ".") for field in known):
            raise ConfigError(f"{name}={json.dumps(value)}: is a group of fields, in braces")
        raise ConfigError(f"unknown field {name}{did_you_mean(name, known)}")
    flag, is_bool = "--" + name.replace("_", "-"), isinstance(known[name], bool)
    if is_bool != isinstance(value, bool) or (value is None and name not in NULLABLE):
        wanted = "true or false" if is_bool else "a value"
        raise ConfigError(f"{name}={json.dumps(value)}: give {wanted}")
    if is_bool:
        *group, last = flag.removeprefix("--").split(".")
        return ["--" + ".".join([*group, last if value else f"no-{last}"])]
    if value is None or isinstance(value, list):
        return [flag, *map(str, value if value is not None else [None])]
    return [f"{flag}={value}"]  # in one, so that it may begin with a dash


def _expand_resume(flags: list[str]) -> list[str]:
    """A bare --resume means the newest checkpoint; the command line library knows no optional values."""
    out = []
    for flag, following in zip_longest(flags, flags[1:], fillvalue="--"):
        out.append(flag)
        if flag == "--resume" and following.startswith("--"):
            out.append(RESUME_NEWEST)
    return out


def _refuse_unknown(flags: list[str], preset: Config) -> None:
    """Names an unknown field before the parser does, with the nearest known one."""
    known = flatten(preset)
    negations = [re.sub(r"([^.]+)$", r"no_\1", name) for name, value in known.items() if isinstance(value, bool)]
    names = {*known, *negations, "help"}
    for flag in flags:
        name = flag[2:].split("=")[0].replace("-", "_")
        if flag.startswith("--") and name not in names:
            raise ConfigError(f"unknown field {flag.split('=')[0]}{did_you_mean(name, names)}")


def _for_net_of(flags: list[str], preset: Config) -> Config:
    """Where a flag asks for another library's net, without the preset's switches of an AlexNet."""
    for flag, following in zip_longest(flags, flags[1:], fillvalue=""):
        name, _, value = flag.partition("=")
        if name == "--model.name" and ":" in (value or following):
            return dataclasses.replace(preset, model=ModelConfig())
    return preset


class _Box(io.StringIO):
    """What tyro prints into; it draws frames of dashes where it is told of no encoding."""

    encoding = "utf-8"


def _tyro(flags: list[str], preset: Config, *, prog: str) -> Config:
    printed = _Box()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Config, default=preset, args=flags, prog=prog)
    except ValueError as err:  # of packages that know no ConfigError of ours
        raise ConfigError(str(err)) from err
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(_first_sentence(printed.getvalue())) from end


def _first_sentence(box: str) -> str:
    """What stands between the frame's top and its first rule, on one line."""
    lines = []
    for line in box.splitlines():
        text = line.strip("│ ")
        if text.startswith("─"):
            break
        if not line.startswith("╭"):
            lines.append(text)
    return " ".join(lines) or box.strip()
