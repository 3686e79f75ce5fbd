"""Checks the values in a manifest.json and an index, which are untrusted input."""

from collections.abc import Iterator

from numpy import ndarray

from .files import Json
from .shards import Shard
from .tar import BLOCK

EXISTING = "existing webdataset tars"  # the kind of a source whose tars are not copied to the manifest's folder


def check_types(manifest: Json) -> None:
    """Raises ValueError, or whatever exception a wrong type causes, for values that the sharder never writes."""
    classes, statistics = manifest["classes"], manifest["statistics"]
    numbers = [statistics[name] for name in ("mean", "std") if name in statistics] + statistics.get("covariance", [])
    for name, values, kind in (
        ("classes", classes, str),
        ("class_names", manifest.get("class_names", classes), str),
        ("class_ids", manifest.get("class_ids", [0] * len(classes)), int),
    ):
        if type(values) is not list or len(values) != len(classes) or {type(value) for value in values} != {kind}:
            raise ValueError(f"{name} are not a list with one {kind.__name__} for each class")
    for values in numbers:
        if len(values) != 3 or not all(type(value) in (int, float) and abs(value) < 1e9 for value in values):
            raise ValueError("statistics are not three numbers")
    if len(statistics.get("covariance", [0] * 3)) != 3:
        raise ValueError("the covariance is not three rows")
    files = [(split["index"], split["index_sha256"]) for split in manifest["splits"].values()]
    if "mean_image" in statistics:
        files.append((statistics["mean_image"]["file"], statistics["mean_image"].get("sha256", "0")))
    for name, sha256 in files:
        _check_name(name)
        int(sha256, 16)  # must be hexadecimal: the name of a file, for remote shards
    manifest.get("options", {}).get("encoding", {}).get("kind")


def checked_shards(manifest: Json, split: Json) -> tuple[Shard, ...]:
    shards = tuple(Shard(**shard) for shard in split["shards"])
    for shard in shards:
        _check_name(shard.name, elsewhere=manifest.get("source", {}).get("kind") == EXISTING)
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in (shard.samples, shard.bytes)):
            raise ValueError(f"{shard.name} has {shard.samples!r} samples in {shard.bytes!r} bytes")
    if not shards or sum(shard.samples for shard in shards) != split["samples"]:
        raise ValueError(f"{split['samples']!r} samples in {len(shards)} shards")
    return shards


def bounds(index: ndarray, sizes: ndarray, classes: int) -> Iterator[tuple[str, ndarray]]:
    """Yields (field, whether each sample's value is possible): compiled code trusts the index. sizes: of all shards."""
    yield "shard", index["shard"] < len(sizes)
    yield "label", (index["label"] >= -1) & (index["label"] < classes)
    yield "width", index["width"] > 0
    yield "height", index["height"] > 0
    room = sizes[index["shard"]]
    yield "size", index["size"] <= room
    yield "offset", (index["offset"] >= BLOCK) & (index["offset"] <= room - index["size"])


def _check_name(name: str, *, elsewhere: bool = False) -> None:
    """elsewhere: the name may be a relative path that leaves the folder."""
    parts = name.split("/")
    lengths = [len(part.encode()) for part in parts]
    if not 0 < min(lengths) <= max(lengths) < 256 or "\0" in name or (len(parts) > 1 and not elsewhere):
        raise ValueError(f"{name!r} names no file of the folder")
