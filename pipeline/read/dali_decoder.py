"""DALI's image decoder: its options, which images it rejects, and why it does not use a GPU's hardware decoder."""

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from simplejpeg import encode_jpeg

from ..errors import ConfigError

ANY_JPEG = memoryview(encode_jpeg(np.zeros((16, 16, 3), np.uint8), colorsubsampling="420"))


@dataclass(frozen=True)
class Decoder:
    """device: CUDA ordinal; None: CPU. hw_decoder_load: fraction of a batch's JPEGs for the hardware decoder of a GPU
    that has one. threads: CPU threads."""

    device: int | None
    hw_decoder_load: float = 0.65
    threads: int = 1

    def options(self) -> dict[str, Any]:
        """Arguments of all decoding operators."""
        _, types, _ = load_dali()
        return {
            "device": "cpu" if self.device is None else "mixed",
            "hw_decoder_load": self.hw_decoder_load,  # for mixed
            "output_type": types.RGB,
            "adjust_orientation": False,  # ImageNet is used without EXIF rotation everywhere
            "jpeg_fancy_upsampling": True,  # as in libjpeg and Pillow: equal pixels on the CPU, at no measurable cost
        }

    def decoding(self, images: list[memoryview]) -> Any:
        """A pipeline whose each run() decodes one of the encoded images. It raises RuntimeError for one it rejects."""
        fn, _, pipeline_def = load_dali()

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=1, num_threads=self.threads, device_id=self.device, prefetch_queue_depth=1
        )
        def define() -> Any:
            encoded = fn.external_source(source=(np.frombuffer(image, np.uint8) for image in images), batch=False)
            return fn.decoders.image(encoded, **self.options())

        return define()

    def first_rejected(self, images: list[memoryview]) -> tuple[int, str] | None:
        """Returns the index of the first image that it rejects, and the reason; None if it accepts all.

        Images are decoded one by one, since DALI does not always name the one that fails, and a pipeline cannot be used
        after an error: 1,024 ImageNet images take 1.4 s.
        """
        pipeline = self.decoding(images)
        for number in range(len(images)):
            try:
                pipeline.run()
            except RuntimeError as err:
                lines = [line.strip() for line in str(err).splitlines() if "failure" in line or "rror:" in line]
                return number, lines[-1] if lines else "DALI rejects it"
        return None

    def describe(self) -> str:
        """Returns one line: which decoder is in use, and why a faster one is not."""
        if self.device is None:
            return "libjpeg-turbo, by DALI"
        if rejected := self.first_rejected([ANY_JPEG]):
            return f"none: DALI does not decode a JPEG here ({rejected[1]})"
        found = self.facts()
        line = f"nvJPEG {found['nvjpeg'] or 'of an unknown version'}, hardware decoder load {self.hw_decoder_load:g}"
        if found["libnvcuvid"]:
            return f"{line}, libnvcuvid loads"
        return (
            f"{line}, but libnvcuvid does not load: no hardware decoder;"
            " a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )

    def facts(self) -> dict[str, Any]:
        """The libraries of this process while it decodes: {"nvjpeg": version or None, "libnvjpeg": file name or None,
        "libnvcuvid": whether it loads}. nvJPEG needs libnvcuvid for the hardware decoder. Raises RuntimeError."""
        pipeline = self.decoding([ANY_JPEG])  # the libraries go with the last pipeline
        pipeline.run()
        mapped = Path("/proc/self/maps").read_text()
        # torchvision's wheel holds a copy, libnvjpeg.<hash>.so.13: if it is loaded first, DALI decodes with that one.
        paths = re.findall(r"(/\S*/libnvjpeg\.(?:\w+\.)?so[.\d]*)$", mapped, flags=re.MULTILINE)
        return {
            "nvjpeg": _nvjpeg_version(paths[0]) if paths else None,
            "libnvjpeg": os.path.basename(paths[0]) if paths else None,
            "libnvcuvid": _loads("libnvcuvid.so.1"),
        }


def _nvjpeg_version(path: str) -> str | None:
    library, part = ctypes.CDLL(path), ctypes.c_int()
    # Major, minor and patch: libraryPropertyType_t
    parts = [str(part.value) for number in range(3) if not library.nvjpegGetProperty(number, ctypes.byref(part))]
    return ".".join(parts) or None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def load_dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia.dali import fn, pipeline_def, types  # type: ignore[attr-defined]
    except ImportError as err:
        raise ConfigError(
            f"loader.backend needs NVIDIA DALI ({err}); install it with pip install 'imagenet-express[dali-cu13]'"
            " (Linux; dali-cu12 for drivers before 580)"
        ) from err
    return fn, types, pipeline_def
