"""Writers of other libraries, in an environment of their own: images in class folders, whose bytes they keep.

Each as its documentation shows it, which for webdataset and MosaicML means one writer a process.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

A_SHARD = 1000  # images; MosaicML and LitData count bytes: 64 MB, MosaicML's default and LitData's example

Sample = tuple[str, int]  # path, class


def webdataset(part: int, samples: list[Sample], out: str) -> None:
    from webdataset import ShardWriter

    with ShardWriter(f"{out}/{part}-%06d.tar", maxcount=A_SHARD, verbose=0) as writer:
        for number, (path, label) in enumerate(samples):
            writer.write({"__key__": f"{part}{number:08}", "jpg": Path(path).read_bytes(), "cls": label})


def read(sample: Sample) -> dict[str, object]:
    path, label = sample
    return {"image": Path(path).read_bytes(), "class": label}


def mosaicml(part: int, samples: list[Sample], out: str) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=f"{out}/{part}", columns={"image": "bytes", "class": "int"}) as writer:
        for sample in samples:
            writer.write(read(sample))


def merged(out: str) -> None:
    from streaming.base.util import merge_index

    merge_index(out)


def in_processes(
    write: Callable[..., None], finish: Callable[[str], None], samples: list[Sample], out: str, workers: int
) -> Iterator[int]:
    with get_context("fork").Pool(workers) as pool:
        pool.map(abs, range(workers))  # the processes start before the clock does
        yield 0
        pool.starmap(write, [(part, samples[part::workers], out) for part in range(workers)])
        finish(out)
        yield len(samples)


def litdata(samples: list[Sample], out: str, workers: int) -> Iterator[int]:
    from litdata import optimize

    yield 0
    optimize(fn=read, inputs=samples, output_dir=out, chunk_bytes="64MB", num_workers=workers)
    yield len(samples)


WRITERS: dict[str, Callable[[list[Sample], str, int], Iterator[int]]] = {
    "webdataset": partial(in_processes, webdataset, lambda out: None),
    "mosaicml": partial(in_processes, mosaicml, merged),
    "litdata": litdata,
}


def measure(name: str, images: str, out: str, workers: int) -> Iterator[int]:
    paths = sorted(Path(images).glob("*/*"))
    number_of = {name: number for number, name in enumerate(sorted({path.parent.name for path in paths}))}
    Path(out).mkdir()
    yield from WRITERS[name]([(str(path), number_of[path.parent.name]) for path in paths], out, workers)
    shutil.rmtree(out)
