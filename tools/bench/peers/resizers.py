"""Who decodes, resizes to a short side of 256 and encodes as JPEG fastest, on one thread; equal work, equal quality."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

SHORT, QUALITY, SECONDS = 256, 90, 4.0


def ours() -> Callable[[bytes], object]:
    from pipeline.write import pixels
    from pipeline.write.images import Encoding, Preparer

    pixels.prepare()
    return Preparer(Encoding("jpeg", SHORT, quality=QUALITY), measure=False)


def pillow() -> Callable[[bytes], object]:
    from PIL import Image

    def work(data: bytes) -> object:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        short = min(image.size)
        size = (image.width * SHORT // short, image.height * SHORT // short)
        out = io.BytesIO()
        image.resize(size, Image.Resampling.BILINEAR).save(out, "JPEG", quality=QUALITY)
        return out.getvalue()

    return work


def torchvision() -> Callable[[bytes], object]:
    import torch
    from torch.nn.functional import interpolate
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

    torch.set_num_threads(1)

    def work(data: bytes) -> object:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        short = min(image.shape[1:])
        size = [image.shape[1] * SHORT // short, image.shape[2] * SHORT // short]
        # uint8 and channels-last: torch's vectorised path.
        resized = interpolate(
            image[None].contiguous(memory_format=torch.channels_last), size, mode="bilinear", antialias=True
        )
        return encode_jpeg(resized[0].contiguous(), quality=QUALITY)

    return work


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("kind", choices=("ours", "pillow", "torchvision"))
    p.add_argument("--images", type=Path, required=True)
    a = p.parse_args()
    work = {"ours": ours, "pillow": pillow, "torchvision": torchvision}[a.kind]()
    images = [path.read_bytes() for path in sorted(a.images.glob("*/*"))]
    for data in images[:20]:
        work(data)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        work(images[done % len(images)])
        done += 1
    print(json.dumps({"images": done, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
