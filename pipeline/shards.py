"""The shard format: a USTAR tar that webdataset reads, DALI's .idx beside it, and one array index per split.

A sample is two members, `<key>.cls` (ASCII label) and `<key>.jpg` (or `.raw`), in this order. Everything a loader needs
to fetch a sample is in the array index, a NumPy array of INDEX_DTYPE: 28 bytes per sample, 36 MB for ImageNet, opened
by mmap.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from .errors import DataError
from .storage import Folder
from .tar import BLOCK, RECORD, Member, padded

try:
    from zlib_ng.zlib_ng import crc32 as crc32  # 2 µs for a JPEG of side 256
except ImportError:  # no wheel for this platform
    from zlib import crc32 as crc32  # the same polynomial at a thirteenth of the speed

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")  # extensions, by preference if a sample has several
LABELS = ("cls", "json")

# Width and height are part of the index, so that a crop is planned in whole pixels before the image is decoded.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in its tar
        ("size", "<u4"),  # bytes
        ("shard", "<u4"),  # position in the manifest's list of shards
        ("label", "<i4"),  # 0-based
        ("crc32", "<u4"),  # of the image's bytes
        ("width", "<u2"),  # pixels, as stored
        ("height", "<u2"),
    ]
)


class Sample(NamedTuple):
    """One labelled image on its way into a shard."""

    key: str
    image: bytes
    label: int
    width: int
    height: int


@dataclass(frozen=True)
class Shard:
    """The manifest's record of one tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


@lru_cache(1)
def _blank_header() -> tuple[bytes, int]:
    """A member's header as webdataset's TarWriter(mtime=0) writes it, without name and size, and its byte sum."""
    info = tarfile.TarInfo("")
    info.mode, info.uname, info.gname = 0o444, "bigdata", "bigdata"
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = bytes(12)  # size
    header[148:156] = b" " * 8  # the checksum counts as blanks
    return bytes(header), sum(header)


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a member, with nothing but name and size set."""
    blank, total = _blank_header()
    encoded, digits = name.encode("ascii"), b"%011o" % size
    assert len(encoded) <= 100
    checksum = b"%06o\0 " % (total + sum(encoded) + sum(digits))
    return encoded.ljust(100, b"\0") + blank[100:124] + digits + blank[135:148] + checksum + blank[156:]


def write_shard(
    folder: Folder, name: str, samples: Iterable[Sample], *, extension: str = "jpg"
) -> tuple[Shard, ndarray]:
    """Writes the tar `name` and its DALI index; both appear whole or not at all.

    The bytes are those of webdataset's TarWriter(mtime=0, encoder=False). Returns the shard's record and its rows of
    the array index, (n,) INDEX_DTYPE with 0 as shard.
    """
    rows, stored, digest, at = [], [], hashlib.sha256(), 0
    with folder.publish(name) as file:

        def write(*parts: bytes) -> None:
            for part in parts:
                digest.update(part)
                file.write(part)

        for s in samples:
            text, size = str(s.label).encode(), len(s.image)
            label = Member(f"{s.key}.cls", at + BLOCK, len(text))
            image = Member(f"{s.key}.{extension}", label.offset + padded(label.size) + BLOCK, size)
            head = tar_header(label.name, label.size) + text.ljust(padded(label.size), b"\0")
            at = image.offset + padded(size)
            write(head + tar_header(image.name, size), s.image, bytes(padded(size) - size))
            rows.append((image.offset, size, 0, s.label, crc32(s.image), s.width, s.height))
            stored.append((label, image))
        end = -(-(at + 2 * BLOCK) // RECORD) * RECORD
        write(bytes(end - at))
    folder.write(dali_index_name(name), "".join(f"{line}\n" for line in dali_index(stored)).encode())
    return Shard(name, len(rows), end, digest.hexdigest()), np.array(rows, dtype=INDEX_DTYPE)


def dali_index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".idx"


def dali_index(samples: Sequence[Iterable[Member]]) -> list[str]:
    """The lines of DALI's index: a header, then each sample's members."""
    return [f"v1.2 {len(samples)}"] + [
        " ".join(f"{split_name(m.name)[1]} {m.offset} {m.size} {m.name}" for m in sample) for sample in samples
    ]


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member, as in webdataset: the key ends at the first dot after the folder."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def label_name(extensions: Collection[str], kinds: Sequence[str] = LABELS) -> str:
    """Returns the extension of a sample's label: cls, or the only one like output.cls; else json alike; else ""."""
    for kind in kinds:
        if found := [name for name in extensions if name.rpartition(".")[2] == kind]:
            return kind if kind in found else found[0] if len(found) == 1 else ""
    return ""


def label_text(fields: Mapping[str, bytes], kinds: Sequence[str] = LABELS) -> str:
    """The label in a sample's members by extension. Raises DataError, with the reason, if there is none."""
    name = label_name(fields, kinds)
    try:
        label = json.loads(fields[name])["label"] if name.endswith("json") else fields[name].decode("utf-8-sig")
    except KeyError as err:
        raise DataError("has no label: neither .cls nor .json with a 'label'") from err
    except (ValueError, TypeError, RecursionError) as err:
        raise DataError(f"has a .{name} that cannot be read as a label") from err
    if text := str(label).strip():
        return text
    raise DataError(f"has an empty .{name}")


def class_number(text: str) -> int:
    """Returns the class that a label's text names; -1: unknown. Raises DataError with the reason."""
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise DataError(f"has the label {text[:40]!r}; class numbers from 0 are read")
    return int(text)


def write_array(folder: Folder, name: str, array: ndarray) -> str:
    """Publishes an array as .npy; returns the file's sha256."""
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    folder.write(name, data.getbuffer())
    return hashlib.sha256(data.getbuffer()).hexdigest()


def file_sha256(path: Path) -> str:
    return file_digest(path, hashlib.sha256())


def file_digest(path: Path, digest: Any, progress: Callable[[int], None] = lambda count: None) -> str:
    """Returns the file's hex digest. progress: called with the number of bytes of each chunk read."""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def read_array(path: Path, what: str, *, sha256: str) -> ndarray:
    """Returns the array of an .npy file as a read-only memory map; unpickles nothing.

    what: names the array in errors. Raises DataError if the file is missing, has another sha256 or is not an array.
    """
    if not path.is_file():
        raise DataError(f"{path}: the {what} is missing; copy it again or shard the data again")
    if file_sha256(path) != sha256:
        raise DataError(f"{path}: the {what} is damaged (its sha256 differs); copy it again or shard the data again")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as err:  # NumPy parses the header as Python, which raises many kinds
        raise DataError(f"{path}: cannot be read as an array ({err}); shard the data again") from err


def sample_keys(path: Path, offsets: Iterable[int]) -> list[str]:
    """The keys of the samples whose images start at `offsets`, from their tar headers."""
    keys = []
    with open(path, "rb") as file:
        for offset in offsets:
            file.seek(offset - BLOCK)
            keys.append(split_name(file.read(100).split(b"\0")[0].decode(errors="replace"))[0])
    return keys
