"""The DALI backend, one graph for CPU and GPU: decodes the planned images and makes the planned crops.

It draws no random numbers, does not shuffle and reads no file: bytes and crops arrive through one external source.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ..decode import BadImage, decode, open_image
from .backend import Engine, Held, Setup, Work, check_raw_sizes, undecodable
from .cutter import Cut, pixels_under
from .dali_decoder import ANY_JPEG, Decoder, load_dali
from .fetch import HEIGHT, WIDTH, not_plain_jpegs

CUT_A_TASK = 64  # images per cutting task: a task costs 15 µs


class Graph:
    """The settings that determine the graph, and the methods that build it."""

    def __init__(self, setup: Setup) -> None:
        plan, config, device = setup.plan, setup.config, setup.output.device
        self.output, self.raw = setup.output, setup.raw
        self.most_crops, self.depth = setup.most_crops, config.prefetch_batches
        self.cut = bool(setup.cutter)  # some images are cuts, whose memory is not pinned
        self.decoder = Decoder(device.index if device.type == "cuda" else None, config.hw_decoder_load, setup.threads)
        short_sides = np.minimum(plan.split.column("width"), plan.split.column("height"))
        jittered = plan.train and plan.augment.scale_jitter is not None
        # If not, every crop is a plain copy of pixels.
        self.resized = jittered or bool((short_sides != plan.augment.resize).any())
        # Decode whole images and then crop them, instead of decoding only the crop's region.
        self.whole = device.type == "cuda" if config.decode == "auto" else config.decode == "whole"

    def inputs(self, work: Work, images: list[memoryview]) -> tuple[Any, ...]:
        """Returns a batch's inputs of `pipeline`: each crop's image, place, mirror flag and values to subtract."""
        left, top, wide, high = np.moveaxis(work.box, 2, 0)
        if self.resized:  # corners of the box, as (y, x); with left and right swapped, resampling mirrors at no cost
            start, end = left + wide * work.flip, left + wide * ~work.flip
            place = [np.stack([top, start], axis=2), np.stack([top + high, end], axis=2)]
        else:
            # DALI takes the position as a fraction of (size - crop) and rounds: whole pixels are restored exactly.
            room = np.maximum(work.rows[:, [WIDTH, HEIGHT]] - self.output.crop, 1)
            place = [left / room[:, :1], top / room[:, 1:]]
        first, second = (each.astype(np.float32).reshape(-1, *each.shape[2:]) for each in place)
        mirror = work.flip.reshape(-1) & (not self.resized)
        fed = (self._stored(work, images), first, second, mirror.astype(np.int32))
        return fed if self.output.dtype == "uint8" else (*fed, work.mean.reshape(-1, 3))

    def _stored(self, work: Work, images: list[memoryview]) -> Any:
        """Returns the stored images as the pipeline's input, one for each crop, without a copy.

        images: [] if they are the rows of the reader's buffer, which costs 0.1 µs per image. From a list of arrays,
        DALI would make and check tensors in Python, 6 µs per image: making the list of tensors here takes 3 µs.
        """
        from nvidia.dali.tensors import TensorCPU, TensorListCPU

        pinned = self.decoder.device is not None and not self.cut  # as the reader's buffers
        layout = "HWC" if self.raw else ""
        shapes = work.rows[:, [HEIGHT, WIDTH]].tolist() if self.raw else []
        if not images:
            shape = (*shapes[0], 3) if self.raw else (work.read.room,)
            return TensorListCPU(work.read.buffer.reshape(-1, *shape), layout, pinned)
        if self.raw:
            images = [image.cast("B", (h, w, 3)) for image, (h, w) in zip(images, shapes, strict=True)]
        tensors = [TensorCPU(image, layout, pinned) for image in images]
        if self.output.views > 1:
            tensors = [each for each in tensors for _ in range(self.output.views)]
        return TensorListCPU(tensors, layout, False)

    def pipeline(self, source: Callable[[], tuple[Any, ...]]) -> Any:
        """A DALI pipeline. `source` returns `inputs(…)` of the next batch."""
        fn, types, pipeline_def = load_dali()
        crops_ndim = 1 if self.resized else 0

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=self.most_crops,
            num_threads=self.decoder.threads,
            device_id=self.decoder.device,
            prefetch_queue_depth=self.depth,
        )
        def define() -> Any:
            inputs = 4 if self.output.dtype == "uint8" else 5
            stored, a, b, mirror, *mean = fn.external_source(
                source=source,
                num_outputs=inputs,
                batch=True,
                no_copy=True,  # the loader keeps the bytes until the batch comes out
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.FLOAT][:inputs],
                ndim=[3 if self.raw else 1, crops_ndim, crops_ndim, 0, 1][:inputs],
            )
            return self._crops(stored, a, b, mirror, mean[0] if mean else [0.0])

        return define()

    def _crops(self, stored: Any, a: Any, b: Any, mirror: Any, mean: Any) -> Any:
        """The graph after the external source: from stored images to delivered crops."""
        fn, types, _ = load_dali()
        output, decoding = self.output, self.decoder.options()
        size = (output.crop, output.crop)
        where = {"crop": size, "crop_pos_x": a, "crop_pos_y": b}
        if self.resized:
            # Only the crop's source region is resampled. It equals cropping the whole resized image to rounding (one
            # grey level at one pixel in 2,000) and takes a fifth to a quarter less time, with decoding.
            whole = self._on_device(stored) if self.raw else fn.decoders.image(stored, **decoding)
            region = {"size": size, "roi_start": a, "roi_end": b}
            crops = fn.resize(whole, **region, interp_type=types.INTERP_LINEAR, antialias=True)
        elif self.raw:  # cropped on the CPU, so that only needed pixels are copied
            crops = self._on_device(fn.crop(stored, **where))
        elif self.whole:
            crops = fn.crop(fn.decoders.image(stored, **decoding), **where)
        else:  # decoders.image_slice, which takes corners, ends the process by SIGSEGV on damaged JPEGs (DALI 2.4.0)
            crops = fn.decoders.image_crop(stored, **where, **decoding)
        return fn.crop_mirror_normalize(
            crops,
            mirror=mirror,
            mean=mean,
            std=[1.0] if output.dtype == "uint8" else list(output.std),
            # DALI makes no bfloat16: float32 until the end
            dtype={"uint8": types.UINT8, "float16": types.FLOAT16}.get(output.dtype, types.FLOAT),
            output_layout="HWC" if output.channels_last else "CHW",
        )

    def _on_device(self, pixels: Any) -> Any:
        return pixels if self.decoder.device is None else pixels.gpu()


class Dali(Engine):
    """See backend.Engine."""

    def __init__(self, setup: Setup) -> None:
        self.graph, self._reader = Graph(setup), setup.reader
        self._decoding: deque[tuple[Work, list[memoryview]]] = deque()
        self._cutter, self._cutting = setup.cutter, deque[tuple[Work, list[Future[list[Cut]]]]]()
        self._pool = setup.pool
        self._spent = Held()
        self._pipeline: Any = None
        load_dali()

    def start(self, source: Callable[[], Work]) -> None:
        def feed() -> tuple[Any, ...]:
            while len(self._cutting) <= bool(self._cutter):  # one batch is cut while the one before it is decoded
                self._cutting.append(self._cut(source()))
            work, cuts = self._cutting.popleft()
            images = self._acceptable(work)
            self._decoding.append((work, images))
            return self.graph.inputs(_replaced(work, images, [cut for task in cuts for cut in task.result()]), images)

        self._pipeline = self.graph.pipeline(feed)

    def _cut(self, work: Work) -> tuple[Work, list[Future[list[Cut]]]]:
        def cut(a: int, b: int) -> list[Cut]:
            assert self._cutter
            rows, pixels = work.rows[a:b], pixels_under(work.box[a:b], self.graph.output.crop)
            places = self._cutter.places(work.ids[a:b], rows, pixels)
            block = self._reader.fetch(work.read, a, b, lambda _: 0)
            return self._cutter(block, places, pixels, keep=True)

        starts = range(0, len(work.ids), CUT_A_TASK) if self._cutter else ()
        return work, [self._pool.submit(cut, a, min(a + CUT_A_TASK, len(work.ids))) for a in starts]

    def _acceptable(self, work: Work) -> list[memoryview]:
        """Returns the stored images in forms that DALI decodes to the reference pixels; [] if it can take the rows of
        the reader's buffer. Raises BadSample.

        DALI 2.4.0 parses the headers of a batch in threads, and ends the process by SIGSEGV if one of a large batch is
        bad: seen at 1,024 images. The search for images other than plain JPEGs runs without the GIL.
        """
        work.read.wait()
        if self.graph.raw:
            check_raw_sizes(work, 0, len(work.ids), self._reader)
            odd, rows = [], (work.rows[:, [WIDTH, HEIGHT]] == work.rows[0, [WIDTH, HEIGHT]]).all()
        else:
            odd = np.flatnonzero(not_plain_jpegs(work.read.buffer, work.read.at, work.read.rows)).tolist()
            rows = not odd
        if rows and work.read.room and not self._cutter and self.graph.output.views == 1:
            return []
        images = work.read.images()
        for i in odd:
            width, height = work.rows[i, [WIDTH, HEIGHT]].tolist()
            try:
                images[i] = _acceptable(images[i], (width, height))
            except BadImage as err:
                raise undecodable(work, i, err, self._reader) from err
        return images

    def next(self) -> tuple[Work, torch.Tensor]:
        output, on_gpu = self.graph.output, self.graph.decoder.device is not None
        # On the consumer's stream DALI's output needs no host synchronisation.
        stream = (torch.cuda.current_stream(output.device),) if on_gpu else ()
        try:
            (images,) = self._pipeline.run(*stream)
        except RuntimeError as err:
            raise self._explain(err) from err
        work, stored = self._decoding.popleft()
        pixels = torch.utils.dlpack.from_dlpack(images.as_tensor())  # no copy: DALI gives this memory away
        if on_gpu:
            # The batch was returned before it is decoded; the consumer's stream reaches this point after decoding.
            self._spent.hold((work.read, stored), output.device)
        if output.channels_last:
            pixels = pixels.permute(0, 3, 1, 2)
        return work, pixels.to(getattr(torch, output.dtype))

    def stop(self) -> None:
        self._pipeline = None  # its threads must end before their input buffers are freed
        wait([task for _, cuts in self._cutting for task in cuts if not task.cancel()])
        self._cutting.clear()
        self._decoding.clear()
        if self.graph.decoder.device is not None:  # it may still read the memory of batches that DALI has delivered
            torch.cuda.synchronize(self.graph.output.device)
        self._spent = Held()

    def decoder(self) -> str:
        return "none: pixels are stored" if self.graph.raw else self.graph.decoder.describe()

    def _explain(self, err: RuntimeError) -> Exception:
        """Returns an error that names the first sample which the decoder rejects; `err` itself if it rejects none.

        The batch that failed is the oldest one: batches are delivered in order.
        """
        decoder = self.graph.decoder
        if not self._decoding or self.graph.raw or decoder.first_rejected([ANY_JPEG]):
            return err
        work, images = self._decoding[0]
        found = decoder.first_rejected(images or work.read.images())
        return undecodable(work, *found, self._reader) if found else err


def _replaced(work: Work, images: list[memoryview], cuts: list[Cut]) -> Work:
    """Returns the batch with cuts in place of the images that were cut, and with the cuts' sizes and boxes."""
    chosen = [i for i, cut in enumerate(cuts) if len(cut.data)]
    if not chosen:
        return work
    rows, box, placed = work.rows.copy(), work.box.copy(), np.array([cuts[i][1:] for i in chosen])
    rows[np.ix_(chosen, [WIDTH, HEIGHT])] = placed[:, 2:]
    box[chosen, :, :2] -= placed[:, None, :2]
    for i in chosen:
        images[i] = cuts[i].data.data
    return work._replace(rows=rows, box=box)


def _acceptable(image: memoryview, size: tuple[int, int]) -> memoryview:
    """Returns the image itself if DALI decodes its format to the reference pixels (a test compares them), else a PPM.

    DALI rounds 16 bits to 8 (we truncate), rejects some WebP with metadata, and decodes TIFF, JPEG 2000 and CMYK
    differently or not at all. A PNG whose chunks are damaged may end the process, see Dali._acceptable.
    """
    opened = open_image(image)
    png = opened.format == "PNG" and image[24] <= 8  # bits a channel
    webp = opened.format == "WEBP" and bytes(image[12:16]) != b"VP8X"
    with suppress(Exception):  # the parsers of both raise many kinds
        if (png or webp) and opened.size == size:
            opened.verify()
            return image
    return memoryview(b"P6 %d %d 255\n" % size + decode(image, size=size).tobytes())
