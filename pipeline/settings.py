"""Metadata of configuration fields, declared in their types, and the functions that use it.

    batch: InHelp[Positive] = 128
    dir: PerHost[str] = ""

Type aliases such as `Positive` hold bounds; `MayChange`, `PerHost` and `InHelp` hold the rest. A group of fields is a
dataclass NAMEConfig; a declaration on a group holds for all its fields. Flat names are those of flags: "train.batch".
"""

import dataclasses
import difflib
import math
from collections.abc import Collection
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError
from .files import Json

T = TypeVar("T")
MAY_CHANGE, PER_HOST, IN_HELP = "may change on resume", "may differ between hosts", "in the short help"
MayChange = Annotated[T, MAY_CHANGE]
PerHost = Annotated[T, MAY_CHANGE, PER_HOST]
InHelp = Annotated[T, IN_HELP]


class Bounds(NamedTuple):
    """Limits of a number: ≥, >, ≤ and <. Infinity and NaN are never inside. choose: advice for the message."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
    choose: str = ""

    def __contains__(self, value: Any) -> bool:
        return bool(self.ge <= value <= self.le and self.gt < value < self.lt)

    def __str__(self) -> str:
        limits = [
            f"{word} {limit:g}"
            for word, limit in zip(("of at least", "above", "at most", "below"), self[:4])
            if math.isfinite(limit)
        ]
        return f"must be a number {', '.join(limits)}" + (f"; choose {self.choose}" if self.choose else "")


Positive = Annotated[int, Bounds(ge=1)]
NonNegative = Annotated[int, Bounds(ge=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
Fraction = Annotated[float, Bounds(ge=0, le=1)]
PositiveFraction = Annotated[float, Bounds(gt=0, le=1)]
BelowOne = Annotated[float, Bounds(ge=0, lt=1)]


@cache
def declared(config: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns {flat name: (type, its declarations)} for all fields, including those of groups."""
    found = dict[str, tuple[Any, tuple[Any, ...]]]()
    for name, hint in get_type_hints(config, include_extras=True).items():
        kind, marks = (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
        inner = declared(kind) if dataclasses.is_dataclass(kind) else {}  # type: ignore[arg-type]
        found |= {f"{name}.{n}": (k, marks + m) for n, (k, m) in inner.items()} or {name: (kind, marks)}
    return found


def marked(config: type, mark: str) -> list[str]:
    """Flat names of the fields that declare `mark`."""
    return [name for name, (_, marks) in declared(config).items() if mark in marks]


def validate(config: Any) -> None:
    """Raises ConfigError if one of the group's own fields is not one of its choices or is out of its bounds."""
    group = type(config).__name__.removesuffix("Config").lower()
    fields = declared(type(config))  # type: ignore[arg-type]
    for name, value in vars(config).items():
        kind, marks = fields.get(name, (None, ()))
        full = f"{group}.{name}".lstrip(".")
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ConfigError(f"{full}={value}: choose one of {', '.join(map(str, get_args(kind)))}")
        for bounds in marks:
            if isinstance(bounds, Bounds) and value not in bounds:
                raise ConfigError(f"{full}={value}: {bounds}")


def flatten(values: Any, name: str = "") -> Json:
    """{"train.batch": 128, …} of nested dataclasses or dicts; values as JSON returns them."""
    inside = vars(values) if dataclasses.is_dataclass(values) else values
    if not isinstance(inside, dict):
        return {name: list(inside) if isinstance(inside, tuple) else inside}
    flat = Json()
    for inner, value in inside.items():
        flat |= flatten(value, f"{name}.{inner}".lstrip("."))
    return flat


def updated(config: T, values: Json) -> T:
    """Returns `config` with `values`, flat or nested, from JSON. Ignores unknown names, such as other versions' fields.

    Raises ConfigError if they set a removed field.
    """
    flat = flatten(values)
    check_removed(flat, "configuration")
    changes = Json()
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            group = f"{name}."
            changes[name] = updated(value, {n.removeprefix(group): v for n, v in flat.items() if n.startswith(group)})
        elif name in flat:
            changes[name] = tuple(flat[name]) if isinstance(flat[name], list) else flat[name]
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


# Removed fields, with the values that had no effect. Older checkpoints and model cards hold them.
REMOVED = {"regularize.mixup": 0.0, "regularize.cutmix": 0.0, "model.lrn_alpha": "variant"}


def check_removed(saved: Json, source: str) -> None:
    """Raises ConfigError if saved values, by flat name, set a removed field to a value that had an effect."""
    for name, unused in REMOVED.items():
        if (value := saved.get(name, unused)) != unused:
            raise ConfigError(
                f"{source}: {name}={value} is no longer supported; use the version of imagenet-express that made it"
            )


def did_you_mean(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
