"""The command line of train/run.py: preset < --config < flags. Every error names the field and its value."""

import argparse
import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args

import tyro

from model import ModelConfig
from pipeline.errors import ConfigError, DataError, reading
from pipeline.files import Json
from pipeline.settings import IN_HELP, declared, did_you_mean, flatten, marked, updated
from pipeline.storage import absolute, check_url, is_url

from .config import RESUME_NEWEST, Config
from .presets import DESCRIPTIONS, FINETUNE, PRESETS, overfitting

PROG = "train/run.py"
USAGE = f"""\
usage: python {PROG} PRESET --data.shards DIR [--group.field VALUE ...]

presets: {", ".join(PRESETS)}
python {PROG} --list              what each is, and what to expect of it
python {PROG} PRESET --help       its most used fields; --help-all: every field
python {PROG} PRESET --print      its configuration as JSON, which --config FILE takes back"""


def parse(argv: list[str]) -> Config:
    """The configuration that `argv` asks for: a preset or --config FILE first, then flags.

    Raises ConfigError or DataError; exits after --help, --list and --print.
    """
    if not argv or argv[0] in ("-h", "--help"):
        _print_and_exit(USAGE, code=0 if argv else 2)
    if argv[0] == "--list":
        _print_and_exit(table())
    preset = "" if argv[0].startswith("--config") else argv[0]
    if preset and preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}; presets: {', '.join(PRESETS)}")
    ours, flags = _take_own_options(argv[bool(preset) :])
    base = PRESETS.get(preset, Config())
    if ours.help:
        _print_and_exit(_short_help(preset, base))
    config = _configured(base, ours.config, flags)
    if preset == FINETUNE:
        if not config.model.init:
            raise ConfigError(
                f"{preset}: name trained weights by --model.init, such as a run folder (docs/own-images.md)"
            )
        config = _configured(_as_trained(base, Path(config.model.init)), ours.config, flags)
    preset = preset or ours.config.stem
    if not config.run.dir:
        if any(flag.startswith("--run.dir") for flag in flags):  # of a shell's variable that is not set
            raise ConfigError("run.dir is empty; name a folder, or leave --run.dir out")
        config = updated(config, {"run.dir": f"runs/{preset}{'-overfit' if config.overfit else ''}"})
    try:
        config.run.dir.encode()
    except UnicodeEncodeError as err:  # TensorBoard's writer would fail, later
        raise ConfigError(f"run.dir={config.run.dir}: the name is not UTF-8; choose another --run.dir") from err
    if ours.print:
        _print_and_exit(json.dumps(dataclasses.asdict(config), indent=1))
    if not config.data.shards:
        raise ConfigError("data.shards is not set; name a folder made by tools/make_shards.py with --data.shards DIR")
    if is_url(absolute(config.data.shards)):
        check_url(config.data.shards, allow_http=True)  # before it is printed: it might hold credentials
    return overfitting(config) if config.overfit else config


def _configured(base: Config, file: Path | None, flags: list[str]) -> Config:
    """`base`, changed by a --config file and then by flags."""
    return _tyro(flags, _read_config(file, base) if file else base)


def _as_trained(base: Config, weights: Path) -> Config:
    """Returns `base` with net, image size and normalisation as recorded with the weights."""
    from .classifier import recorded  # imports torch: wrong flags are reported before

    view = ("augment.resize", "augment.crop", "augment.normalize", "augment.statistics")
    return updated(
        base,
        {
            name: value
            for name, value in recorded(weights)[0].items()
            if name in view or (name.startswith("model.") and name != "model.freeze")
        },
    )


def _take_own_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options that are not fields, and the flags for tyro; --resume gets a value, since tyro needs one."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    p.add_argument("--config", type=Path)
    p.add_argument("--print", action="store_true")
    p.add_argument("-h", "--help", action="store_true")
    p.add_argument("--help-all", action="store_true")
    p.add_argument("--resume", nargs="?", const=RESUME_NEWEST)
    try:
        ours, flags = p.parse_known_args(argv)
    except argparse.ArgumentError as err:
        raise ConfigError("--config: name a JSON file, as PRESET --print writes it") from err
    resume = [] if ours.resume is None else [f"--resume={ours.resume}"]
    return ours, [*flags, *resume, *["--help"] * ours.help_all]


# Output


def _print_and_exit(text: str, *, code: int = 0) -> NoReturn:
    print(text)
    raise SystemExit(code)


def table() -> str:
    """A row for each preset: what it is, what to expect, on what and how long."""
    rows = []
    for name, description in DESCRIPTIONS.items():
        what, *facts = summary(description)
        rows += [f"{name:<12} {what}", *(f"{'':<12} {fact}" for fact in facts)]
    return "\n".join(rows)


def summary(description: str) -> list[str]:
    """The first line of a preset's docstring, its "Expected …" to the end, and its "Hours: …"."""
    found = re.match(r"(.+?)\n.*^\s*(Expected.*)^\s*(Hours.*?)$", description, re.DOTALL | re.MULTILINE)
    assert found is not None, description
    return [" ".join(text.split()) for text in found.groups()]


def _short_help(preset: str, config: Config) -> str:
    flat = flatten(config) | {"run.dir": f"runs/{preset or 'FILE'}"}
    lines = [f"usage: python {PROG} {preset or '--config FILE'} --data.shards DIR [--group.field VALUE ...]"]
    lines += ["", *DESCRIPTIONS.get(preset, "").splitlines(), ""]
    lines += [f"  --{name.replace('_', '-'):<24} {str(flat[name]) or '(none)'}" for name in marked(Config, IN_HELP)]
    return "\n".join([*lines, "", f"all {len(flat)} fields, explained: --help-all; as JSON: --print"])


# Input


def _read_config(file: Path, base: Config) -> Config:
    """`base` with the values of a JSON file: of --print, or a run folder's config.json."""
    with reading(f"--config {file}:", "name a JSON file, as PRESET --print writes it", OSError):
        # UTF-8 or UTF-16, with or without a byte order mark
        values = json.loads(file.read_bytes(), object_pairs_hook=_distinct)
    if not isinstance(values, dict):
        raise DataError(f"--config {file}: holds no object of fields")
    if isinstance(values.get("config"), dict):
        values = values["config"]
    try:
        flags = [flag for name, value in flatten(values).items() for flag in _as_flags(name, value)]
        return _tyro(flags, base, config=(tyro.conf.FlagConversionOff,))
    except ConfigError as err:
        raise ConfigError(f"--config {file}: {err}") from err


def _distinct(pairs: list[tuple[str, Any]]) -> Json:
    """Raises ValueError for a name that is given twice, of which JSON's reader would take the last."""
    values = Json()
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} is given twice")
        values[name] = value
    return values


def _as_flags(name: str, value: Any) -> list[str]:
    kind, flag = _kind_of(name), "--" + name.replace("_", "-")
    if (kind is bool) != isinstance(value, bool) or (value is None and NoneType not in get_args(kind)):
        wanted = "true or false" if kind is bool else "a value"
        raise ConfigError(f"{name}={json.dumps(value)}: give {wanted}")
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]  # one argument, so that the value may begin with a dash


def _kind_of(name: str, shown: str = "") -> Any:
    """Returns a field's type. Raises ConfigError, with the nearest known name, for an unknown field."""
    fields = declared(Config)
    if name in fields:
        return fields[name][0]
    if inside := [field for field in fields if field.startswith(name + ".")]:
        raise ConfigError(f"{shown or name} is a group of fields, such as {inside[0]}")
    raise ConfigError(f"unknown field {shown or name}{did_you_mean(name, fields)}")


def _tyro(flags: list[str], base: Config, **options: Any) -> Config:
    for flag in flags:
        if flag.startswith("--") and flag != "--help":
            _kind_of(re.sub(r"\bno_", "", flag[2:].partition("=")[0].replace("-", "_")), flag.partition("=")[0])
    if re.search(r"--model\.name[ =]\S*:", " ".join(flags)):  # another library's net has no switches of an AlexNet
        base = dataclasses.replace(base, model=ModelConfig())
    printed = _Box()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Config, prog=PROG, default=base, args=flags, **options)
    except ValueError as err:  # of packages that do not import ConfigError
        raise ConfigError(str(err)) from err
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(_first_sentence(printed.getvalue())) from end


class _Box(io.StringIO):
    """A stream for tyro's messages: without an encoding it draws frames of dashes."""

    encoding = "utf-8"


def _first_sentence(box: str) -> str:
    """The text between the title and the next rule, on one line; with or without a frame, as the locale allows."""
    sections = re.split(r"^[│ ]*[─-]{3,}.*$", box, flags=re.MULTILINE)
    body = sections[0].partition("\n")[2].strip() or sections[1 % len(sections)]
    return " ".join(line.strip("│ ") for line in body.splitlines()).strip()
