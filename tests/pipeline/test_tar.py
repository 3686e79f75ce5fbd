"""Tars of other people: read as tarfile reads them, and rejected if they are damaged or unsafe."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.tar import BLOCK, members

names = st.from_regex(r"[a-z]{1,40}(/[a-zé_]{1,90}){0,2}\.(jpg|cls)", fullmatch=True)
contents = st.binary(max_size=1500)


def written(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def found(path: Path, *where: int) -> dict[str, bytes]:
    data = path.read_bytes()
    return {m.name: data[m.offset : m.offset + m.size] for m in members(path, *where)}


@settings(deadline=None)
@given(
    st.dictionaries(names, contents, max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from([0, 1.25]),
)
def test_what_tarfile_wrote_is_read_in_every_format_and_inside_another_tar(tmp_path_factory, files, format, mtime):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    inner = written(files, format, mtime)
    path.write_bytes(inner)
    assert found(path) == files
    path.write_bytes(b"?" * BLOCK + inner + b"?" * BLOCK)
    assert found(path, BLOCK, len(inner)) == files


def with_size(size: int) -> bytes:
    info = tarfile.TarInfo("0.jpg")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


FILES = {f"{i}.jpg": bytes([i + 1]) * 700 for i in range(5)}
WHOLE = written(FILES)  # a header and two blocks each


@pytest.mark.parametrize(
    ("name", "damaged", "message"),
    [
        ("cut at a member's end", WHOLE[: 6 * BLOCK], "byte 3072: cut short: no end mark"),
        ("cut in a header", WHOLE[: 6 * BLOCK + 100], "byte 3072: cut short: no end mark"),
        ("cut in a member", WHOLE[: 7 * BLOCK + 100], "byte 3072: cut short within '2.jpg'"),
        ("flipped header bit", WHOLE[:3075] + bytes([WHOLE[3075] ^ 1]) + WHOLE[3076:], "byte 3072: not a tar header"),
        ("zeroed hole", WHOLE[:3072] + bytes(BLOCK) + WHOLE[3584:], "byte 3072: an end mark, but more behind it"),
        ("no tar at all", b"hello" * 500, "byte 0: not an uncompressed tar"),
        ("empty", b"", "byte 0: cut short"),
        ("gzip", gzip.compress(WHOLE), "byte 0: not an uncompressed tar; it is compressed by gzip; .*gzip -dc"),
        ("xz", lzma.compress(WHOLE), "byte 0: not an uncompressed tar; it is compressed by xz"),
        ("bzip2", bz2.compress(WHOLE), "byte 0: not an uncompressed tar; it is compressed by bzip2"),
        ("zstd", b"\x28\xb5\x2f\xfd" + b"?" * 600, "byte 0: not an uncompressed tar; it is compressed by zstd"),
        ("lzma", lzma.compress(WHOLE, lzma.FORMAT_ALONE), "byte 0: not an .*; it is compressed by lzma; .*lzma -dc"),
        ("7-Zip", b"7z\xbc\xaf\x27\x1c" + WHOLE, "byte 0: not an .*; it is a 7-Zip archive; write its files"),
        ("web page", b"\n <!doctype html>" + b" " * 600, "byte 0: not an .*; it is a web page"),
        ("server's error", b'{"error": 404}', "byte 0: not an .*; it is JSON"),
        ("Parquet", b"PAR1" + WHOLE, "byte 0: not an uncompressed tar, or damaged"),
        ("Git LFS", b"version https://git-lfs.github.com/spec/v1", "byte 0: .* a pointer of Git LFS"),
        ("joined", WHOLE + WHOLE, "byte 7680: an end mark, but more behind it.*name each by itself"),
        ("negative size", with_size(-512), "byte 0: '0.jpg' of -512 bytes"),
    ],
)
def test_damage_is_found_and_its_place_named(tmp_path, name, damaged, message):
    path = tmp_path / "x.tar"
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"x\.tar: at {message}"):
        list(members(path))


@given(st.integers(0, 5 * 3 * BLOCK - 1), st.integers(0, 7))
def test_a_flipped_bit_is_found_unless_it_is_in_a_member(tmp_path_factory, byte, bit):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    data = bytearray(WHOLE)
    data[byte] ^= 1 << bit
    path.write_bytes(data)
    at = byte % (3 * BLOCK)
    try:
        names = [m.name for m in members(path)]
    except DataError:
        assert at < BLOCK
    else:  # a blank for a leading zero, or behind the number, is the same checksum
        assert names == list(FILES)
        assert at >= BLOCK or at in (148, 154, 155)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "/etc/passwd"}, "the unsafe name '/etc/passwd'"),
        ({"name": "a/../../b"}, r"the unsafe name 'a/\.\./\.\./b'"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a symbolic link"),
        ({"type": tarfile.LNKTYPE, "linkname": "0.jpg"}, "is a hard link"),
        ({"type": tarfile.CHRTYPE}, "is a device"),
        ({"type": tarfile.FIFOTYPE}, "is a pipe"),
        ({"name": "twice.jpg"}, r"a second 'twice\.jpg'"),
    ],
)
def test_unsafe_members_are_rejected(tmp_path, change, message):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("twice.jpg"))
        info = tarfile.TarInfo("odd")
        for name, value in change.items():
            setattr(info, name, value)
        tar.addfile(info)
    with pytest.raises(DataError, match=message):
        list(members(tmp_path / "x.tar"))


def test_folders_are_passed_over(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "1.jpg").write_bytes(b"image")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "in", "./in")
    assert found(tmp_path / "x.tar") == {"./in/deep/1.jpg": b"image"}
