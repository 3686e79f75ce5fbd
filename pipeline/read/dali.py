"""The DALI backend, one graph for CPU and GPU: decodes what the plan names, at the place the plan names.

Nothing here is random, shuffles or reads a file: bytes and crops come from outside, through one external source.
"""

from __future__ import annotations

import ctypes
import io
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError
from .backend import Output, Work, check_raw_sizes, undecodable
from .reader import ReadBatch

Stored = Literal["image", "raw"]


def _any_jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    return out.getvalue()


ANY_JPEG = _any_jpeg()
FORMATS = {"PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"}  # that DALI decodes beside JPEG, by Pillow's names


@dataclass(frozen=True)
class Graph:
    """All that the graph's shape depends on."""

    output: Output
    stored: Stored  # encoded images, or raw pixels
    resized: bool  # otherwise every crop is a plain copy of pixels
    whole: bool  # decode whole images and crop them then, instead of decoding the crop's region alone
    hw_decoder_load: float = 0.65  # fraction of a batch's JPEGs for the hardware decoder of a GPU that has one

    @property
    def device(self) -> int | None:
        """CUDA ordinal, or None: everything on the CPU."""
        return self.output.device.index if self.output.device.type == "cuda" else None

    def inputs(self, work: Work) -> tuple[Any, ...]:
        """What `pipeline`'s source hands over for one batch: an image, a crop and what to subtract for each row."""
        views, box = self.output.views, work.placement.box
        width, height = (np.repeat(side, views) for side in (work.width, work.height))
        images = self.fed(work.read.wait(), work.width.tolist(), work.height.tolist())
        mirror = work.placement.flip.astype(np.int32)
        if not self.resized:
            # DALI wants the position as a fraction of the room, and rounds: whole pixels come back exactly.
            x = box[:, 0] / np.maximum(width - self.output.crop, 1)
            y = box[:, 1] / np.maximum(height - self.output.crop, 1)
            return self._fed(images, x, y, mirror, work.mean)
        start = box[:, 1::-1]
        end = start + box[:, 3:1:-1]
        return self._fed(images, start, end, mirror, work.mean)

    def fed(self, images: list[memoryview], width: list[int], height: list[int]) -> Any:
        """The stored images as the pipeline takes them, one for each crop, without a copy.

        Given a list of arrays, DALI makes and checks a tensor of each in Python, for 6 µs an image: making the list of
        tensors here takes 3 µs.
        """
        tensor, tensor_list = _tensors()
        pinned = self.device is not None  # as the reader's buffers
        if self.stored == "raw":
            layout, shapes = "HWC", zip(images, height, width, strict=True)
            tensors = [tensor(image.cast("B", (h, w, 3)), layout, pinned) for image, h, w in shapes]
        else:
            layout, tensors = "", [tensor(image, "", pinned) for image in images]
        if self.output.views > 1:
            tensors = [each for each in tensors for _ in range(self.output.views)]
        return tensor_list(tensors, layout, False)

    def _fed(self, images: Any, a: np.ndarray, b: np.ndarray, mirror: np.ndarray, mean: np.ndarray) -> tuple[Any, ...]:
        fed = (images, a.astype(np.float32), b.astype(np.float32), mirror)
        return fed if self.output.dtype == "uint8" else (*fed, mean)

    def pipeline(self, source: Callable[[], tuple[Any, ...]], *, rows: int, threads: int, depth: int) -> Any:
        """A built DALI pipeline. `source` returns `inputs(…)` of the next batch, of at most `rows` crops."""
        fn, types, pipeline_def = _dali()
        crops_ndim = 1 if self.resized else 0

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=rows, num_threads=threads, device_id=self.device, prefetch_queue_depth=depth
        )
        def define() -> Any:
            inputs = 4 if self.output.dtype == "uint8" else 5
            stored, a, b, mirror, *mean = fn.external_source(
                source=source,
                num_outputs=inputs,
                batch=True,
                no_copy=True,  # the loader keeps the bytes until the batch comes out
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.FLOAT][:inputs],
                ndim=[3 if self.stored == "raw" else 1, crops_ndim, crops_ndim, 0, 1][:inputs],
            )
            images = self._resampled(stored, a, b) if self.resized else self._cropped(stored, a, b)
            return self._normalised(images, mirror, mean[0] if mean else [0.0])

        pipeline = define()
        pipeline.build()
        return pipeline

    def why_not_decoded(self, images: list[memoryview], *, threads: int = 1) -> str | None:
        """Why this graph's decoder rejects one of the encoded images; None if it takes all. Builds a pipeline."""
        if self.stored == "raw":
            return None
        try:
            self._decoded(images, threads=threads)
        except RuntimeError as err:
            lines = [line.strip() for line in str(err).splitlines() if "failure" in line or "rror:" in line]
            return lines[-1] if lines else "DALI rejects it"
        return None

    def _decoded(self, images: list[memoryview], *, threads: int = 1) -> Any:
        """The pipeline that has decoded the images. Raises RuntimeError."""
        fn, _, pipeline_def = _dali()
        arrays = [np.frombuffer(image, np.uint8) for image in images]

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=len(arrays), num_threads=threads, device_id=self.device, prefetch_queue_depth=1
        )
        def define() -> Any:
            return fn.decoders.image(fn.external_source(source=lambda: arrays, batch=True), **self._decoding())

        pipeline = define()
        pipeline.run()
        return pipeline

    def first_not_decoded(self, images: list[memoryview], *, named: int | None, threads: int) -> tuple[int, str] | None:
        """The number of an image that this graph's decoder rejects, and why; None if it takes all.

        named: the one that DALI's own message names. A pipeline is of no use after an error, and building one is
        slow: halving the batch finds one image in 1,024 with 11 of them, which decode each image once or so.
        """
        if named is not None and named < len(images) and (reason := self.why_not_decoded([images[named]])):
            return named, reason
        first, count = 0, len(images)
        reason = self.why_not_decoded(images, threads=threads)
        while reason and count > 1:
            half = count // 2
            upper = self.why_not_decoded(images[first : first + half], threads=threads)
            first, count = (first, half) if upper else (first + half, count - half)
            reason = upper or (self.why_not_decoded([images[first]]) if count == 1 else reason)
        return (first, reason) if reason else None

    def decoder(self) -> str:
        """One line: which decoder works, and what stands in the way of a faster one."""
        if self.device is None or self.stored == "raw":
            return "none: pixels are stored" if self.stored == "raw" else "libjpeg-turbo, by DALI"
        if reason := self.why_not_decoded([memoryview(ANY_JPEG)]):
            return f"none: DALI does not decode a JPEG here ({reason})"
        pipeline = self._decoded([memoryview(ANY_JPEG)])  # keeps the libraries loaded, which go with the last pipeline
        found = decoder_facts()
        del pipeline
        line = f"nvJPEG {found['nvjpeg'] or 'of an unknown version'}, hardware decoder load {self.hw_decoder_load:g}"
        if found["libnvcuvid"]:
            return f"{line}, libnvcuvid loads"
        return (
            f"{line}, but libnvcuvid does not load: no hardware decoder;"
            " a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )

    def _decoding(self) -> dict[str, Any]:
        _, types, _ = _dali()
        on_gpu = {"device": "mixed", "hw_decoder_load": self.hw_decoder_load}
        return {
            **({"device": "cpu"} if self.device is None else on_gpu),
            "output_type": types.RGB,
            "adjust_orientation": False,  # ImageNet is used without EXIF rotation everywhere
            "jpeg_fancy_upsampling": True,  # as libjpeg and Pillow: equal pixels on the CPU, at no measurable cost
        }

    def _cropped(self, stored: Any, x: Any, y: Any) -> Any:
        fn, _, _ = _dali()
        where = {"crop": (self.output.crop, self.output.crop), "crop_pos_x": x, "crop_pos_y": y}
        if self.stored == "raw":  # cut on the CPU: what is not needed does not travel
            return self._on_device(fn.crop(stored, **where))
        if self.whole:
            return fn.crop(fn.decoders.image(stored, **self._decoding()), **where)
        return fn.decoders.image_crop(stored, **where, **self._decoding())

    def _resampled(self, stored: Any, start: Any, end: Any) -> Any:
        fn, types, _ = _dali()
        raw = self.stored == "raw"
        # Only the crop's source region is resampled. It equals cropping the whole resized image to rounding (one grey
        # level at one pixel in 2,000) and takes a fifth to a quarter less time, with decoding.
        return fn.resize(
            self._on_device(stored) if raw else fn.decoders.image(stored, **self._decoding()),
            size=(self.output.crop, self.output.crop),
            roi_start=start,
            roi_end=end,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )

    def _on_device(self, pixels: Any) -> Any:
        return pixels if self.device is None else pixels.gpu()

    def _normalised(self, images: Any, mirror: Any, mean: Any) -> Any:
        fn, types, _ = _dali()
        raw = self.output.dtype == "uint8"
        dtypes = {"uint8": types.UINT8, "float16": types.FLOAT16}  # DALI makes no bfloat16: float32 until the end
        return fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=mean,
            std=[1.0] if raw else list(self.output.std),
            dtype=dtypes.get(self.output.dtype, types.FLOAT),
            output_layout="HWC" if self.output.channels_last else "CHW",
        )


class Dali:
    """See work.Engine. rows: crops of the largest batch. describe: a sample's name for a message."""

    def __init__(self, graph: Graph, *, rows: int, threads: int, depth: int, describe: Callable[[int], str]) -> None:
        self.graph, self.rows, self.threads, self.depth, self._describe = graph, rows, threads, depth, describe
        self._decoding: deque[Work] = deque()
        self._spent: deque[tuple[torch.cuda.Event, ReadBatch]] = deque()
        self._pipeline: Any = None
        _dali()

    def start(self, source: Callable[[], Work]) -> None:
        def feed() -> tuple[Any, ...]:
            work = source()
            self._check_headers(work)
            self._decoding.append(work)
            return self.graph.inputs(work)

        self._pipeline = self.graph.pipeline(feed, rows=self.rows, threads=self.threads, depth=self.depth)

    def _check_headers(self, work: Work) -> None:
        """Raises BadSample for an image whose header DALI cannot take.

        DALI 2.4.0 parses the headers of a batch in threads, and ends the process by SIGSEGV if one of a large batch is
        bad: seen at 1,024 images. This check runs without the GIL.
        """
        images = work.read.wait()
        if self.graph.stored == "raw":
            return check_raw_sizes(work, 0, len(work.ids), self._describe)
        for i in work.read.not_plain_jpegs(work.width, work.height).tolist():
            if reason := self._why_not_taken(images[i], (int(work.width[i]), int(work.height[i]))):
                raise undecodable(work, i, reason, self._describe)

    def _why_not_taken(self, image: memoryview, size: tuple[int, int]) -> str | None:
        try:
            with Image.open(io.BytesIO(image)) as opened:
                found, kind = opened.size, opened.format
        except Exception as err:  # Pillow's parsers raise whatever they like
            return str(err)
        if found != size:
            return f"{found[0]}×{found[1]} pixels, but the index says {size[0]}×{size[1]}"
        if kind == "JPEG":  # as good as never: one that breaks rules which Pillow does not check
            return self.graph.why_not_decoded([image])
        return None if kind in FORMATS else f"DALI does not decode {kind}"

    def next(self) -> tuple[Work, torch.Tensor]:
        try:
            (images,) = self._pipeline.run(*self._stream())
        except RuntimeError as err:
            raise self._explain(err) from err
        work = self._decoding.popleft()
        pixels = torch.utils.dlpack.from_dlpack(images.as_tensor())  # no copy: DALI gives this memory away
        self._retire(work.read)
        if self.graph.output.channels_last:
            pixels = pixels.permute(0, 3, 1, 2)
        return work, pixels.to(getattr(torch, self.graph.output.dtype))

    def stop(self) -> None:
        self._pipeline = None  # its threads end before the buffers they decode from may go
        self._decoding.clear()
        self._spent.clear()

    def close(self) -> None:
        pass

    def decoder(self) -> str:
        return self.graph.decoder()

    def _stream(self) -> tuple[Any, ...]:
        # On the consumer's stream DALI's output needs no host synchronisation.
        return () if self.graph.device is None else (torch.cuda.current_stream(self.graph.output.device),)

    def _retire(self, read: ReadBatch) -> None:
        """Gives a decoded batch's bytes back for reuse: at once on the CPU, after its decoding on a GPU."""
        if self.graph.device is None:
            read.release()
            return
        # The batch was returned before it was decoded; what the consumer's stream reaches now comes after that.
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.graph.output.device))
        self._spent.append((event, read))
        while self._spent and self._spent[0][0].query():  # type: ignore[no-untyped-call]
            self._spent.popleft()[1].release()

    def _explain(self, err: RuntimeError) -> Exception:
        """A decoder's failure with the sample's name, which DALI gives for truncated scans alone, as a number.

        The batch that failed is the oldest one: batches come out in order. Returns `err` itself if no image is at
        fault: DALI then rejects any.
        """
        if not self._decoding or self.graph.why_not_decoded([memoryview(ANY_JPEG)]):
            return err
        work = self._decoding[0]
        number = re.search(r"sample #(\d+)", str(err))
        named = int(number[1]) // self.graph.output.views if number else None
        found = self.graph.first_not_decoded(work.read.wait(), named=named, threads=self.threads)
        return undecodable(work, *found, self._describe) if found else err


def decoder_facts() -> dict[str, Any]:
    """Of this process, while there is a pipeline that has decoded something: {"nvjpeg": version or None, "libnvjpeg":
    file name or None, "libnvcuvid": whether it loads}. nvJPEG reaches the hardware JPEG decoder through libnvcuvid."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        mapped = ""
    # torchvision's wheel holds a copy, libnvjpeg.<hash>.so.13: if it is loaded first, DALI decodes with that one.
    paths = re.findall(r"(/\S*/libnvjpeg\.(?:\w+\.)?so[.\d]*)$", mapped, flags=re.MULTILINE)
    return {
        "nvjpeg": _nvjpeg_version(paths[0]) if paths else None,
        "libnvjpeg": os.path.basename(paths[0]) if paths else None,
        "libnvcuvid": _loads("libnvcuvid.so.1"),
    }


def _nvjpeg_version(path: str) -> str | None:
    part = ctypes.c_int()
    parts = []
    for number in range(3):  # major, minor, patch: libraryPropertyType_t
        if ctypes.CDLL(path).nvjpegGetProperty(number, ctypes.byref(part)):
            return None
        parts.append(str(part.value))
    return ".".join(parts)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia.dali import fn, pipeline_def, types  # type: ignore[attr-defined]
    except ImportError as err:
        raise ConfigError(
            f"loader.backend needs NVIDIA DALI ({err}); install it with pip install 'imagenet-express[dali-cu13]'"
            " (Linux; dali-cu12 for drivers before 580)"
        ) from err
    return fn, types, pipeline_def


def _tensors() -> tuple[Any, Any]:
    from nvidia.dali import tensors

    return tensors.TensorCPU, tensors.TensorListCPU
