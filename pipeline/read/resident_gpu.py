"""The resident backend's kernel for GPUs: one pass from the images in memory to a finished batch.

A program writes BLOCK values of one crop. If the batch is resampled, taps are computed as in resample.py, in float64:
products of the rounded weights and grey levels have 23 bits, so float32 sums are exact in any order.
"""

# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

import math

import numpy as np
import torch
import triton
import triton.language as tl
from numpy import ndarray
from torch import Tensor

from ..resample import ONE
from .backend import Output, Work, to_device

BLOCK, BLOCK_RESIZED = 1024, 256  # resampling takes more registers per value
COLUMNS = tl.constexpr(12)  # of a crop's row: image, left, top, width, height, flip, mean and scale of each channel
UNIT = tl.constexpr(float(ONE))
WHOLE = tl.constexpr(1.5 * 2.0**52)  # adding and subtracting it rounds a double to a whole number, half to even


@triton.jit
def _height(at, length, centre, scale):
    """The height of the filter's triangle at source pixels `at`; 0 beyond the image."""
    spread = tl.maximum(scale, 1.0)
    return tl.where(at < length, tl.maximum(1.0 - tl.abs((at - centre + 0.5) * (1.0 / spread)), 0.0), 0.0)


@triton.jit
def _taps(place, scale, offset, length, TAPS: tl.constexpr):
    """The first source pixel of resampled pixels `place`, their centre, and the factor from heights to weights."""
    spread = tl.maximum(scale, 1.0)
    centre = (offset / scale + place + 0.5) * scale
    low = tl.minimum(tl.maximum((centre - spread + 0.5).to(tl.int32), 0), length - 1)
    total = centre * 0.0
    for k in range(TAPS):
        total += _height(low + k, length, centre, scale)
    return low, centre, UNIT / total


@triton.jit
def _weight(at, length, centre, factor, scale):
    return ((_height(at, length, centre, scale) * factor + WHOLE - WHOLE) / UNIT).to(tl.float32)


@triton.jit
def _gather(
    pixels, crops, out, height, width, SIDE: tl.constexpr, NORMAL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < 3 * SIDE * SIDE
    channel, x, y = at % 3, at // 3 % SIDE, at // (3 * SIDE)
    crop = crops + number * COLUMNS
    left, top = tl.load(crop + 1), tl.load(crop + 2)
    x = tl.where(tl.load(crop + 5) != 0, SIDE - 1 - x, x)
    image = pixels + tl.load(crop).to(tl.int64) * (3 * height * width) + channel
    if TAPS == 0:
        source = (top.to(tl.int32) + y) * width + left.to(tl.int32) + x
        value = tl.load(image + 3 * source, mask=inside, other=0).to(tl.float32)
    else:
        x_scale, y_scale = tl.load(crop + 3) / SIDE, tl.load(crop + 4) / SIDE
        x_low, x_centre, x_factor = _taps(x, x_scale, left, width, TAPS)
        y_low, y_centre, y_factor = _taps(y, y_scale, top, height, TAPS)
        value = tl.full([BLOCK], 0.5, tl.float32)
        for i in range(TAPS):
            column = image + 3 * tl.minimum(x_low + i, width - 1)
            line = tl.full([BLOCK], 0.5, tl.float32)
            for j in range(TAPS):
                source = tl.minimum(y_low + j, height - 1) * width
                grey = tl.load(column + 3 * source, mask=inside, other=0).to(tl.float32)
                line += grey * _weight(y_low + j, height, y_centre, y_factor, y_scale)
            value += line.to(tl.int32).to(tl.float32) * _weight(x_low + i, width, x_centre, x_factor, x_scale)
        value = value.to(tl.int32).to(tl.float32)
    if NORMAL:
        mean, scale = tl.load(crop + 6 + channel), tl.load(crop + 9 + channel)
        value = (value - mean.to(tl.float32)) * scale.to(tl.float32)
    tl.store(out + number * (3 * SIDE * SIDE) + at, value.to(out.dtype.element_ty), mask=inside)


def gather(pixels: Tensor, numbers: ndarray, work: Work, output: Output) -> Tensor:
    """Makes (n · views, 3, crop, crop). pixels: (images, height, width, 3) uint8. numbers: (n,) indices in it."""
    side, box = output.crop, work.box
    crops = np.empty((*work.flip.shape, COLUMNS.value))
    crops[..., 0], crops[..., 1:5], crops[..., 5] = numbers[:, None], box, work.flip
    crops[..., 6:9], crops[..., 9:] = work.mean, 1 / np.array(output.std)
    out = torch.empty((work.flip.size, side, side, 3), dtype=getattr(torch, output.dtype), device=pixels.device)
    taps, block = 0, BLOCK
    if (box[..., 2:] != side).any():  # otherwise places are whole pixels
        taps, block = math.ceil(2 * max(box[..., 2:].max() / side, 1)), BLOCK_RESIZED
    with torch.cuda.device_of(pixels):
        _gather[work.flip.size, triton.cdiv(3 * side * side, block)](
            pixels, to_device(crops, pixels.device), out, *pixels.shape[1:3], SIDE=side,
            NORMAL=output.dtype != "uint8", TAPS=taps, BLOCK=block,
            enable_fp_fusion=False,  # multiply-adds would round otherwise than the CPU
        )  # fmt: skip
    images = out.permute(0, 3, 1, 2)
    return images if output.channels_last else images.contiguous()
