"""One decoder: sharder, statistics, backends, check and predict get equal pixels of whatever Pillow can write."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from functools import cache, partial

import numpy as np
import pytest
from PIL import Image

from pipeline import AugmentConfig, Loader, LoaderConfig, open_dataset, verify
from pipeline.decode import MAX_PIXELS, BadImage, Scratch, decode, image_size
from pipeline.errors import DataError
from pipeline.geometry import centre_offset
from pipeline.write.images import Encoding, prepare
from pipeline.write.index_existing import index
from tests.conftest import picture
from tools import predict

WIDTH, HEIGHT, CROP = 52, 44, 36
FORMATS = ("AVIF", "BMP", "DDS", "GIF", "ICO", "IM", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA",
           "TIFF", "WEBP")  # fmt: skip
MODES = ("1", "L", "LA", "La", "P", "P, transparent", "PA", "RGB", "RGB, transparent", "RGBA", "RGBa", "RGBX", "CMYK",
         "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "I;16L", "F")  # fmt: skip
LOSSLESS = {"BMP", "DDS", "IM", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF"}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    if "append_images" in options:
        options["append_images"] = [more.copy() for more in options["append_images"]]
    image.copy().save(out, kind, **options)  # copies: saving leaves settings of its encoder behind
    return out.getvalue()


@cache
def base() -> Image.Image:
    return picture(np.random.default_rng(0), WIDTH, HEIGHT)


@cache
def grey16() -> np.ndarray:
    low = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint16)
    return np.asarray(base().convert("L")).astype(np.uint16) * 256 + low


def of_mode(mode: str) -> Image.Image:
    alpha = picture(np.random.default_rng(2), WIDTH, HEIGHT).convert("L")
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (WIDTH, HEIGHT), grey16().astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode == "I":
        return Image.fromarray(grey16().astype(np.int32))
    if mode == "F":
        return Image.fromarray(grey16().astype(np.float32) / 65535)
    if mode[0] in "LP" and mode[1:] in ("A", "a"):
        return Image.merge("LA", (base().convert("L"), alpha)).convert(mode)
    image = base().convert(mode.split(",")[0])
    if mode.endswith("transparent"):
        image.info["transparency"] = bytes(range(256)) if image.mode == "P" else (1, 2, 3)
    if mode in ("RGBA", "RGBa"):
        image = base().convert("RGBA")
        image.putalpha(alpha)
    return image.convert(mode) if mode == "RGBa" else image


def expected(image: Image.Image, kind: str) -> np.ndarray | None:
    """The pixels that a lossless format must return; None if it is not defined which they are."""
    # Pillow 12 stores the 32 bits of PNG and ICO as 16; Pillow 13 does not store them
    if image.mode == "F" or (image.mode == "I" and kind not in ("PPM", "PNG", "ICO")):
        return None
    if image.mode[0] == "I":
        return np.stack([grey16() >> 8] * 3, -1).astype(np.uint8)
    return np.asarray(image.convert("RGB"))


def png(pixels: np.ndarray, colour: int, bits: int, *chunks: tuple[bytes, bytes], interlaced: bool = False) -> bytes:
    """A PNG of a kind that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    data = b""
    for x, y, dx, dy in passes if interlaced else [(0, 0, 1, 1)]:
        for row in pixels[y::dy, x::dx]:
            digits = "".join(f"{value:0{bits}b}" for value in row.reshape(-1).tolist())
            digits += "0" * (-len(digits) % 8)
            data += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, colour, 0, 0, interlaced)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff12(values: np.ndarray) -> bytes:
    height, width = values.shape
    digits = "".join("".join(f"{value:012b}" for value in row) for row in values.tolist())
    data = int(digits, 2).to_bytes(len(digits) // 8, "big")
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 12 * 9 + 4), (277, 1),
            (278, height), (279, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def by_hand() -> dict[str, tuple[bytes, np.ndarray | None]]:
    """Name → (file, its pixels; None: they need only be the same for all decoders)."""
    rng, turned, orientation = np.random.default_rng(3), base().rotate(180), Image.Exif()
    orientation[0x0112] = 6
    colours, wide = np.asarray(base()), rng.integers(0, 65536, (HEIGHT, WIDTH, 4))
    palette = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    few = rng.integers(0, 16, (HEIGHT, WIDTH))
    jpeg = saved(base(), "JPEG")
    end = 4 + int.from_bytes(jpeg[4:6], "big")
    scan = jpeg.index(b"\xff\xda")
    grey = expected(of_mode("I;16"), "PNG")
    shot = np.asarray(Image.open(io.BytesIO(jpeg)))
    return {
        "16-bit RGB PNG": (png(wide[..., :3], 2, 16), wide[..., :3] >> 8),
        "16-bit RGBA PNG": (png(wide, 6, 16), wide[..., :3] >> 8),
        "16-bit LA PNG": (png(wide[..., :2], 4, 16), np.stack([wide[..., 0] >> 8] * 3, -1)),
        "4-bit grey PNG": (png(few, 0, 4), np.stack([few * 17] * 3, -1)),
        "4-bit palette PNG": (png(few, 3, 4, (b"PLTE", palette.tobytes())), palette[few]),
        "interlaced PNG": (png(colours, 2, 8, interlaced=True), colours),
        "PNG with a gamma": (png(colours, 2, 8, (b"gAMA", struct.pack(">I", 100_000))), colours),
        "16-bit PPM": (b"P6 %d %d 65535\n" % (WIDTH, HEIGHT) + wide[..., :3].astype(">u2").tobytes(), None),
        "12-bit TIFF": (tiff12(grey16() >> 4), grey),
        "LZW TIFF": (saved(base(), "TIFF", compression="tiff_lzw"), colours),
        "16-bit deflated TIFF": (saved(of_mode("I;16"), "TIFF", compression="tiff_deflate"), grey),
        "turned JPEG": (saved(base(), "JPEG", exif=orientation), shot),
        "turned PNG": (saved(base(), "PNG", exif=orientation), colours),
        "turned TIFF": (saved(base(), "TIFF", exif=orientation), np.rot90(colours, -1)),  # Pillow turns it
        "turned WebP": (saved(base(), "WEBP", exif=orientation, lossless=True), colours),
        "RGB JPEG without YCbCr": (saved(base(), "JPEG", keep_rgb=True), None),
        "progressive JPEG": (saved(base(), "JPEG", progressive=True), None),
        "MPO": (saved(base(), "MPO", save_all=True, append_images=[turned]), shot),
        "JPEG with stray bytes": (jpeg[:end] + b"\0\1\2" + jpeg[end:], shot),
        "JPEG with stray bytes before its scan": (jpeg[:scan] + b"\0\1\2" + jpeg[scan:], shot),
        "JPEG with fill bytes": (jpeg[:end] + b"\xff" * 9 + jpeg[end:], shot),
        "lossless WebP": (saved(base(), "WEBP", lossless=True), colours),
        "animated WebP": (saved(base(), "WEBP", save_all=True, append_images=[turned], lossless=True), colours),
        "animated PNG": (saved(base(), "PNG", save_all=True, append_images=[turned]), colours),
        "animated GIF": (saved(base(), "GIF", save_all=True, append_images=[turned]), None),
        "two-page TIFF": (saved(base(), "TIFF", save_all=True, append_images=[turned]), colours),
        "lossy JPEG 2000": (saved(base(), "JPEG2000", irreversible=True, quality_layers=[20]), None),
    }  # fmt: skip


def of_format(kind: str) -> tuple[dict[str, tuple[bytes, np.ndarray | None]], dict[str, bytes]]:
    """All that Pillow can write in a format, with defined pixels and without."""
    good, bad = {}, {}
    for mode in MODES:
        image = of_mode(mode)
        options = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
        options |= {"sizes": [(WIDTH, HEIGHT)]} if kind == "ICO" else {}
        try:
            data = saved(image, kind, **options)
            Image.open(io.BytesIO(data)).load()  # Pillow 12 does not read the TIFFs of YCbCr that it writes
        except (OSError, ValueError, KeyError, TypeError):
            continue
        wanted = expected(image, kind)
        if kind in ("AVIF", "GIF", "WEBP") and image.mode[0] in "IF":
            continue  # Pillow itself clips what it stores here
        if wanted is None:
            bad[mode] = data
        else:
            good[mode] = data, wanted if kind in LOSSLESS else None
    return good, bad


def tar_of(files: dict[str, bytes], path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, data in enumerate(files.values()):
            for extension, content in (("cls", str(i).encode()), ("png", data)):
                info = tarfile.TarInfo(f"s{i}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def centre(pixels: np.ndarray, side: int) -> np.ndarray:
    top, left = (int(centre_offset(length, side)) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize("kind", [*FORMATS, "by hand"])
def test_every_mode_of_every_format_has_the_same_pixels_everywhere(kind, tmp_path):
    images, bad = (by_hand(), {}) if kind == "by hand" else of_format(kind)
    assert images
    seen = {}
    for name, (data, wanted) in images.items():
        seen[name] = decode(data)
        assert image_size(data) == seen[name].shape[1::-1], name
        if wanted is not None:
            assert np.array_equal(seen[name], wanted), name
        else:
            grey = np.asarray(base().convert("L")).astype(int)
            if "16-bit" not in name:
                assert abs(seen[name].mean() - grey.mean()) < 25, name
        raw = prepare(data, Encoding("raw", size=min(seen[name].shape[:2])))
        assert raw.image == seen[name].tobytes(), name
        (tmp_path / "one").write_bytes(data)
        assert np.array_equal(predict.decoded(str(tmp_path / "one")), seen[name]), name
    tar_of({name: data for name, (data, _) in images.items()}, tmp_path / "t.tar")
    index("t", {"train": [tmp_path / "t.tar"]}, tmp_path / "d", size=HEIGHT, workers=1, progress=lambda _: None)
    dataset = open_dataset(tmp_path / "d")
    squares = np.concatenate([centre(pixels, HEIGHT).reshape(-1, 3) for pixels in seen.values()])
    assert dataset.mean == pytest.approx(squares.mean(0).tolist())
    report = verify.check(open_dataset(tmp_path / "d", check_splits=False), deep=True)
    assert report.ok, report.findings
    for view in (AugmentConfig(resize=HEIGHT, crop=CROP), AugmentConfig(crop=CROP, resize=CROP + 3)):
        crops = {}
        for backend in ("portable", "dali-cpu"):
            config = LoaderConfig(backend, verify_pixels=1)
            with Loader(dataset, batch=16, train=False, dtype="uint8", augment=view, config=config) as loader:
                crops[backend] = np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in loader])
            stats = loader.stats()
            counts = stats["pixels_checked"], stats["pixels_different"], loader._check.left_out
            assert counts == (len(seen), 0, 0)
        for i, (name, pixels) in enumerate(seen.items()):
            ours, dalis = (crops[backend][i].astype(int) for backend in ("portable", "dali-cpu"))
            if view.resize == HEIGHT:
                assert np.array_equal(ours, centre(pixels, CROP)), name
                assert np.array_equal(dalis, ours), name
            else:  # their resizers differ by rounding
                assert np.abs(dalis - ours).mean() < 1, name
    for name, data in bad.items():
        for reject in (decode, image_size, partial(prepare, encoding=Encoding())):
            with pytest.raises(BadImage, match=r"have no fixed white; save it with 8 or 16 bits a channel"):
                reject(data)
        tar_of({name: data}, tmp_path / "bad.tar")
        with pytest.raises(DataError, match=r"bad\.tar/s0\.png: .*no fixed white"):
            index("t", {"train": [tmp_path / "bad.tar"]}, tmp_path / "e", workers=1, progress=lambda _: None)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG", "TIFF", pytest.param("JPEG2000", marks=pytest.mark.slow)])
def test_images_over_the_limit_are_rejected_from_their_headers_when_tars_are_indexed(kind, tmp_path):
    side = 10_016
    data = saved(Image.new("1" if kind != "JPEG2000" else "L", (side, side)), kind)
    assert side * side > MAX_PIXELS
    tar_of({"small": saved(base(), "PNG"), "huge": data}, tmp_path / "t.tar")
    with pytest.raises(DataError, match=r"1 of 2 .*s1\.png: 10016×10016 pixels are over the limit of 100,000,000"):
        index("t", {"train": [tmp_path / "t.tar"]}, tmp_path / "d", workers=1, progress=lambda _: None)
    with pytest.raises(BadImage, match="over the limit"):
        decode(data)


def test_a_file_of_another_size_than_the_index_says_fills_no_memory():
    for data in (saved(base(), "JPEG"), saved(base(), "PNG")):
        with pytest.raises(BadImage, match=rf"{WIDTH}×{HEIGHT} pixels, but the index says 3×3"):
            decode(data, size=(3, 3))


def test_rows_are_never_aligned_for_stores_past_the_caches():
    memory = Scratch()
    assert all(memory(size).ctypes.data % 2 for size in (1, 3 * 240 * 240, 3 * 500 * 375))
