"""Reads the members of a tar strictly: raises an error for damage, truncation and unsafe names; tarfile stops silently.

The standard library's tarfile decodes headers; the walk from header to header is our own.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import DataError

BLOCK = 512  # size of a header; members are padded to a multiple of it
RECORD = 20 * BLOCK  # a tar's size is a multiple of this
_ZEROS = bytes(BLOCK)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_NO_MEMBERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"V")
_MAX_HEADER = 1 << 20  # bytes of an extended header, which only holds names
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
AFRESH = "write the tar with the files themselves, such as by tar --dereference --hard-dereference"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"]\0\0": "lzma",
    b"(\xb5/\xfd": "zstd",
    b'\x04"M\x18': "lz4",
    b"\x1f\x9d": "compress",
}
_NO_TARS = {  # first bytes of other kinds of files that users name .tar
    **{magic: f"compressed by {name}; decompress it first ({name} -dc)" for magic, name in _COMPRESSED.items()},
    b"PK": "a ZIP archive; write its files into a tar",
    b"7z\xbc\xaf": "a 7-Zip archive; write its files into a tar",
    b"Rar!": "a RAR archive; write its files into a tar",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the tar itself (git lfs pull)",
    b"<": "a web page or XML; download the tar itself",
    b"{": "JSON, such as a server's error; download the tar itself",
}


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # of its first byte in the outermost file
    size: int


def padded(size: int) -> int:
    """The bytes that a file of `size` bytes occupies in a tar."""
    return -(-size // BLOCK) * BLOCK


def members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Yields the files in an uncompressed tar, in order; with start and size, in a tar that is a member of another tar.

    Raises DataError for a damaged header, for a member that does not fit, is a link or a device, or has an unsafe or
    repeated name, and if the end mark is missing.
    """
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size if size is None else start + size
        try:
            yield from _walk(file.fileno(), start, end)
        except _Damage as err:
            raise DataError(f"{path}: at byte {err}") from err


class _Damage(Exception):
    """Damage in a tar: the position in bytes, what is wrong there, and the cure."""

    def __init__(self, at: int, what: str, cure: str = "download or copy it again") -> None:
        super().__init__(f"{at}: {what}; {cure}")


def _header(fd: int, at: int, start: int, end: int) -> tarfile.TarInfo | None:
    """The header at byte `at`; None for the end mark."""
    header = os.pread(fd, BLOCK, at)
    if header == _ZEROS:
        return None
    what = "cut short: no end mark"
    if len(header) == BLOCK and at + BLOCK <= end:
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as err:
            what = f"not a tar header ({err})" if at > start else f"not an uncompressed tar, or damaged ({err})"
    known = next((kind for magic, kind in _NO_TARS.items() if at == start and header.lstrip().startswith(magic)), None)
    raise _Damage(at, "not an uncompressed tar", f"it is {known}") if known else _Damage(at, what)


def _walk(fd: int, at: int, end: int) -> Iterator[Member]:
    seen = set[str]()
    start = at
    name, length = None, None  # from a header before the member's own
    while info := _header(fd, at, start, end):
        offset = at + BLOCK
        taken = length if length is not None and info.type in _FILES else info.size
        if offset + taken > end:
            raise _Damage(at, f"cut short within {info.name!r}")
        if taken < 0 or (info.type in _NO_MEMBERS and taken > _MAX_HEADER):
            raise _Damage(at, f"{info.name!r} of {taken:,} bytes")
        if info.type in _NO_MEMBERS:
            data = os.pread(fd, info.size, offset)
            if info.type == tarfile.XHDTYPE:
                pax = _pax(at, data)
                name, length = pax.get("path", name), int(pax["size"]) if "size" in pax else length
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type in _FILES or info.type == tarfile.DIRTYPE:
            name = name or info.name
            _check_name(at, name)
            if info.type == tarfile.DIRTYPE:
                taken = 0
            elif name in seen:
                raise _Damage(at, f"a second {name!r}", "write the tar with each file once")
            else:
                seen.add(name)
                yield Member(name, offset, taken)
            name = length = None
        else:
            what = _KINDS.get(info.type, f"of the unknown kind {info.type!r}")
            raise _Damage(at, f"{name or info.name!r} is {what}", AFRESH)
        at = offset + padded(taken)
    _check_padding(fd, at, end)


def _pax(at: int, data: bytes) -> dict[str, str]:
    """Returns an extended header's records by key; each is stored as "length key=value" and a line feed."""
    records = {}
    try:
        while data:
            length = int(data.split(b" ", 1)[0])
            key, value = data[:length].split(b" ", 1)[1].removesuffix(b"\n").split(b"=", 1)
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
            data = data[length:] if length > 0 else b"?"
        int(records.get("size", 0))
    except (ValueError, IndexError) as err:
        raise _Damage(at, "an extended header that cannot be read") from err
    return records


def _check_name(at: int, name: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or not name.strip("/"):
        raise _Damage(at, f"the unsafe name {name!r}", "write the tar with names that begin in its folder")


def _check_padding(fd: int, at: int, end: int) -> None:
    """After the end mark only padding may follow: a hole in the middle looks like the end."""
    mark = at
    while at < end:
        part = os.pread(fd, min(1 << 20, end - at), at)
        if part.count(0) != len(part):
            cure = "download or copy it again, or, if several tars were joined, name each by itself"
            raise _Damage(mark, "an end mark, but more behind it", cure)
        if not part:
            break
        at += len(part)
    if end - mark < BLOCK:
        raise _Damage(mark, "cut short: no end mark")
