"""The DALI graph, one for CPU and GPU: decodes what the plan names, at the place the plan names.

Nothing here is random, shuffles or reads a file: bytes and crops come from outside, through one external source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ConfigError
from .augment import Placement

PixelType = Literal["uint8", "float32", "float16"]


@dataclass(frozen=True)
class Graph:
    """All that the graph's shape depends on."""

    crop: int
    presized: bool  # every stored image has the resize's short side already
    mean: tuple[float, ...]  # grey levels; unused for uint8
    std: tuple[float, ...]
    dtype: PixelType
    channels_last: bool
    device: int | None  # CUDA ordinal, or None: everything on the CPU

    def inputs(
        self, images: list[np.ndarray], place: Placement, width: np.ndarray, height: np.ndarray
    ) -> tuple[Any, ...]:
        """What `pipeline`'s source hands over for one batch: n encoded images and n crops."""
        mirror = place.flip.astype(np.int32)
        if self.presized:
            # DALI wants the position as a fraction of the room, and rounds: whole pixels come back exactly.
            x = place.left / np.maximum(place.width - self.crop, 1)
            y = place.top / np.maximum(place.height - self.crop, 1)
            return images, x.astype(np.float32), y.astype(np.float32), mirror
        return images, *place.source_box(width, height, self.crop), mirror

    def pipeline(self, source: Callable[[], tuple[Any, ...]], *, batch: int, threads: int, depth: int) -> Any:
        """A built DALI pipeline. `source` returns `inputs(…)` of the next batch, of at most `batch` images."""
        fn, types, pipeline_def = _dali()
        crops_ndim = 0 if self.presized else 1

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=batch, num_threads=threads, device_id=self.device, prefetch_queue_depth=depth
        )
        def define() -> Any:
            encoded, a, b, mirror = fn.external_source(
                source=source,
                num_outputs=4,
                batch=True,
                no_copy=True,  # the loader keeps the bytes until the batch comes out
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32],
                ndim=[1, crops_ndim, crops_ndim, 0],
            )
            images = self._presized(encoded, a, b) if self.presized else self._resized(encoded, a, b)
            return self._normalised(images, mirror)

        pipeline = define()
        pipeline.build()
        return pipeline

    def why_not_decoded(self, image: np.ndarray) -> str | None:
        """Why this graph's decoder refuses an encoded image; None where it takes it. Builds a pipeline."""
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

    def _presized(self, encoded: Any, x: Any, y: Any) -> Any:
        fn, _, _ = _dali()
        return fn.decoders.image_crop(
            encoded, crop=(self.crop, self.crop), crop_pos_x=x, crop_pos_y=y, **self._decoding()
        )

    def _resized(self, encoded: Any, start: Any, end: Any) -> Any:
        fn, types, _ = _dali()
        # Only the crop's source region is resampled. It equals cropping the whole resized image to rounding (one grey
        # level at one pixel in 2,000) and takes a fifth to a quarter less time, with decoding.
        return fn.resize(
            fn.decoders.image(encoded, **self._decoding()),
            size=(self.crop, self.crop),
            roi_start=start,
            roi_end=end,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )

    def _normalised(self, images: Any, mirror: Any) -> Any:
        fn, types, _ = _dali()
        raw = self.dtype == "uint8"
        return fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=[0.0] if raw else list(self.mean),
            std=[1.0] if raw else list(self.std),
            dtype={"uint8": types.UINT8, "float32": types.FLOAT, "float16": types.FLOAT16}[self.dtype],
            output_layout="HWC" if self.channels_last else "CHW",
        )


def _dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia.dali import fn, pipeline_def, types  # type: ignore[attr-defined]
    except ImportError as err:
        raise ConfigError(
            f"loader.backend needs NVIDIA DALI ({err}); install it with pip install 'imagenet-express[dali-cu13]'"
            " (Linux; dali-cu12 for drivers before 580)"
        ) from err
    return fn, types, pipeline_def
