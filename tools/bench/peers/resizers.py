"""Who decodes, resizes to a short side of 256 and encodes as JPEG fastest, on one thread; equal work, equal quality."""

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

SHORT, QUALITY = 256, 90


def ours() -> Callable[[bytes], object]:
    from pipeline.write import resize
    from pipeline.write.images import Encoding, Preparer

    resize.prepare()
    return Preparer(Encoding("jpeg", SHORT, quality=QUALITY), measure=False)


def pillow() -> Callable[[bytes], object]:
    from PIL import Image

    def work(data: bytes) -> object:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        size = [side * SHORT // min(image.size) for side in image.size]
        out = io.BytesIO()
        image.resize(size, Image.Resampling.BILINEAR).save(out, "JPEG", quality=QUALITY)
        return out

    return work


def torchvision() -> Callable[[bytes], object]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
    from torchvision.transforms.v2.functional import resize

    torch.set_num_threads(1)

    def work(data: bytes) -> object:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return encode_jpeg(resize(image, [SHORT], antialias=True).contiguous(), quality=QUALITY)

    return work


RESIZERS = {"ours": ours, "Pillow": pillow, "Pillow-SIMD": pillow, "torchvision.io": torchvision}


def batches(name: str, images: str) -> Iterator[int]:
    work = RESIZERS[name]()
    for data in itertools.cycle([path.read_bytes() for path in sorted(Path(images).glob("*/*"))]):
        work(data)
        yield 1
