"""The DALI backend, one graph for CPU and GPU: decodes what the plan names, at the place the plan names.

Nothing here is random, shuffles or reads a file: bytes and crops come from outside, through one external source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..errors import ConfigError, DataError
from .reader import ReadBatch
from .work import Output, Work

Stored = Literal["image", "raw"]


@dataclass(frozen=True)
class Graph:
    """All that the graph's shape depends on."""

    output: Output
    stored: Stored  # encoded images, or raw pixels
    resized: bool  # otherwise every crop is a plain copy of pixels
    whole: bool  # decode whole images and crop them then, instead of decoding the crop's region alone

    @property
    def device(self) -> int | None:
        """CUDA ordinal, or None: everything on the CPU."""
        return self.output.device.index if self.output.device.type == "cuda" else None

    def inputs(self, work: Work) -> tuple[Any, ...]:
        """What `pipeline`'s source hands over for one batch: an image, a crop and what to subtract for each row."""
        views, box = self.output.views, work.placement.box
        images: list[np.ndarray] = work.read.wait()
        width, height = (np.repeat(side, views) for side in (work.width, work.height))
        if self.stored == "raw":
            images = [image.reshape(h, w, 3) for image, h, w in zip(images, work.height, work.width, strict=True)]
        if views > 1:
            images = [image for image in images for _ in range(views)]
        mirror = work.placement.flip.astype(np.int32)
        if not self.resized:
            # DALI wants the position as a fraction of the room, and rounds: whole pixels come back exactly.
            x = box[:, 0] / np.maximum(width - self.output.crop, 1)
            y = box[:, 1] / np.maximum(height - self.output.crop, 1)
            return self._fed(images, x, y, mirror, work.mean)
        start = box[:, 1::-1]
        end = start + box[:, 3:1:-1]
        return self._fed(images, start, end, mirror, work.mean)

    def _fed(
        self, images: list[np.ndarray], a: np.ndarray, b: np.ndarray, mirror: np.ndarray, mean: np.ndarray
    ) -> tuple[Any, ...]:
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
                layout=["HWC" if self.stored == "raw" else "", "", "", "", ""][:inputs],
            )
            images = self._resampled(stored, a, b) if self.resized else self._cropped(stored, a, b)
            return self._normalised(images, mirror, mean[0] if mean else [0.0])

        pipeline = define()
        pipeline.build()
        return pipeline

    def why_not_decoded(self, image: np.ndarray) -> str | None:
        """Why this graph's decoder refuses an encoded image; None where it takes it. Builds a pipeline."""
        if self.stored == "raw":
            return None
        fn, _, pipeline_def = _dali()

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=1, num_threads=1, device_id=self.device, prefetch_queue_depth=1
        )
        def define() -> Any:
            return fn.decoders.image(fn.external_source(source=lambda: [image], batch=True), **self._decoding())

        try:
            define().run()
        except RuntimeError as err:
            lines = [line.strip() for line in str(err).splitlines() if "failure" in line or "rror:" in line]
            return lines[-1] if lines else "DALI refuses it"
        return None

    def _decoding(self) -> dict[str, Any]:
        _, types, _ = _dali()
        return {
            "device": "cpu" if self.device is None else "mixed",
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
            self._decoding.append(work)
            return self.graph.inputs(work)

        self._pipeline = self.graph.pipeline(feed, rows=self.rows, threads=self.threads, depth=self.depth)

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
        """A decoder's failure with the sample's name: DALI says neither which image nor where it is."""
        for work in self._decoding:
            for sample, image in zip(work.ids.tolist(), work.read.wait(), strict=True):
                if reason := self.graph.why_not_decoded(image):
                    return DataError(
                        f"{self._describe(sample)}: cannot be decoded ({reason});"
                        " shard the data again with --encode jpeg, or without this image"
                    )
        return err


def _dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia.dali import fn, pipeline_def, types  # type: ignore[attr-defined]
    except ImportError as err:
        raise ConfigError(
            f"loader.backend needs NVIDIA DALI ({err}); install it with pip install 'imagenet-express[dali-cu13]'"
            " (Linux; dali-cu12 for drivers before 580)"
        ) from err
    return fn, types, pipeline_def
