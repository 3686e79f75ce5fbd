"""The DALI backend's graph and failures, as far as a CPU can show them."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from pipeline import AugmentConfig, Loader, LoaderConfig, manifest
from pipeline.decode import decode
from pipeline.errors import BadSample, ConfigError
from pipeline.read import buffers, dali_decoder
from pipeline.read.dali import Dali, _acceptable
from pipeline.read.dali_decoder import Decoder
from pipeline.shards import Sample, write_array, write_shard
from pipeline.storage import Folder
from tests.conftest import ROOT, picture
from tests.pipeline.test_parity import encode

VIEW = AugmentConfig(resize=32, crop=24)


# What is decoded, and by which decoder


@pytest.mark.parametrize(
    ("backend", "decode", "whole"),
    [("dali-gpu", "auto", True), ("dali-gpu", "region", False), ("dali-gpu", "whole", True),
     ("dali-cpu", "auto", False), ("dali-cpu", "region", False), ("dali-cpu", "whole", True)],
)  # fmt: skip
def test_a_gpu_decodes_whole_images_unless_asked_for_regions(shards, backend, decode, whole):
    device = "cuda:0" if backend == "dali-gpu" else "cpu"
    config = LoaderConfig(backend, decode=decode, hw_decoder_load=0.9)
    with Loader(shards["jpeg"], batch=4, device=device, config=config) as loader:
        assert loader._engine.graph.whole is whole
        assert loader._engine.graph.decoder.hw_decoder_load == 0.9


def test_on_a_gpu_bytes_are_read_into_pinned_memory_and_one_crop_in_250_is_checked(shards, monkeypatch):
    pinned = []

    def buffer(size, **kwargs):
        pinned.append(kwargs["pinned"])
        return np.empty(size, np.uint8)

    monkeypatch.setattr(buffers, "new_buffer", buffer)
    for device, backend in (("cuda:0", "dali-gpu"), ("cpu", "dali-cpu")):
        with Loader(shards["jpeg"], batch=4, device=device, config=LoaderConfig(backend)) as loader:
            loader._reader.read(np.arange(4)).wait()
            assert loader.plan.check_every == (250 if device == "cuda:0" else 0)
    assert pinned == [True, False]


def test_the_hardware_decoders_load_is_given_to_decoders():
    on_gpu, on_cpu = (Decoder(device, 0.9).options() for device in (0, None))
    assert (on_gpu["device"], on_gpu["hw_decoder_load"]) == ("mixed", 0.9)
    assert on_cpu == on_gpu | {"device": "cpu"}  # it ignores the load


@pytest.mark.parametrize("bad", [{"decode": "half"}, {"hw_decoder_load": -0.1}, {"hw_decoder_load": 1.5}])
def test_other_values_are_rejected_by_name(bad):
    with pytest.raises(ConfigError, match=rf"loader\.{next(iter(bad))}=.*(choose|must be)"):
        LoaderConfig(**bad)


def test_the_decoder_in_use_is_named_with_what_is_missing(monkeypatch):
    decoder = Decoder(0, 0.9)
    monkeypatch.setattr(Decoder, "first_rejected", lambda *_: None)
    for libnvcuvid, ending in (
        (True, "hardware decoder load 0.9, libnvcuvid loads"),
        (False, "libnvcuvid does not load: no hardware decoder; a container needs "
                "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"),
    ):  # fmt: skip
        found = {"nvjpeg": "13.3.2", "libnvjpeg": "libnvjpeg.so.13", "libnvcuvid": libnvcuvid}
        monkeypatch.setattr(Decoder, "facts", lambda _, found=found: found)
        assert decoder.describe().startswith("nvJPEG 13.3.2, ")
        assert decoder.describe().endswith(ending)


def test_nvjpegs_version_is_read_from_the_library_that_is_mapped(shards):
    with Loader(shards["jpeg"], batch=4, config=LoaderConfig("dali-cpu"), augment=AugmentConfig()) as loader:
        next(iter(loader))
        assert loader.decoder() == "libjpeg-turbo, by DALI"
        found = Decoder(None).facts()
    # torchvision's own copy, under another name, if an earlier test has imported torchvision.
    assert re.fullmatch(r"libnvjpeg\.(\w+\.)?so\.\d+.*", found["libnvjpeg"])
    assert int(found["nvjpeg"].split(".")[0]) >= 12
    assert found["libnvcuvid"] is dali_decoder._loads("libnvcuvid.so.1")


@pytest.mark.slow
def test_torchvisions_copy_of_nvjpeg_is_seen_when_it_is_the_one_that_dali_uses(shards):
    code = (
        "import sys, torchvision.io; from pipeline.read import dali_decoder;"
        "from pipeline import AugmentConfig, Loader, LoaderConfig;"
        "loader = Loader(sys.argv[1], batch=4, config=LoaderConfig('dali-cpu'), augment=AugmentConfig());"
        "next(iter(loader)); print(dali_decoder.Decoder(None).facts()['nvjpeg'])"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code, shards["jpeg"]], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(seen.stdout.split(".")[0]) >= 12


# Which image makes a batch fail


def jpeg(side: int = 32) -> bytes:
    return encode(picture(np.random.default_rng(0), side, side), "JPEG", quality=90)


PNG = encode(picture(np.random.default_rng(0), 32, 32), "PNG")


POISON = {
    "truncated": lambda: jpeg()[: len(jpeg()) * 2 // 3],
    "bad header": lambda: jpeg()[:20] + b"\xff" * 40 + jpeg()[60:],
    "half of a PNG": lambda: PNG[: len(PNG) // 2],
    "text": lambda: b"<html>not found</html>" * 40,
}


def poisoned(root, poison: bytes, *, count: int, at: int, side: int = 32):
    images = [jpeg(side)] * count
    images[at] = poison
    samples = (Sample(f"s{i}", image, 0, side, side) for i, image in enumerate(images))
    shard, rows = write_shard(Folder(root), "x.tar", samples)
    split = manifest.split_record([shard], "x.npy", write_array(Folder(root), "x.npy", rows))
    statistics = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    manifest.write_manifest(Folder(root), {"classes": ["c"], "splits": {"train": split}, "statistics": statistics})
    return root


@pytest.mark.parametrize(
    ("place", "views"),
    [
        ("first", 1),
        ("last", 10),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("first", 10), ("last", 1))),
    ],
)
@pytest.mark.parametrize("kind", list(POISON))
def test_the_image_that_a_batch_of_1024_fails_by_is_named_by_two_pipelines(tmp_path, monkeypatch, kind, place, views):
    at = 0 if place == "first" else 1023
    root, built, build = poisoned(tmp_path, POISON[kind](), count=1024, at=at), [], Decoder.decoding

    def counted(self, images):
        built.append(len(images))
        return build(self, images)

    monkeypatch.setattr(Decoder, "decoding", counted)
    view = AugmentConfig(resize=32, crop=24, views=views)
    with Loader(root, batch=1024, train=False, augment=view, config=LoaderConfig("dali-cpu")) as loader:
        with pytest.raises(BadSample, match=rf"x\.tar: sample {at} \('s{at}'\) .*cannot be decoded") as caught:
            next(iter(loader))
        assert caught.value.sample == at
    assert len(built) in (0, 2)  # none for an image that Pillow rejects


def test_dali_gets_a_png_only_with_all_its_chunks():
    """In a batch of 64 and more, DALI 2.4.0 may end the process by SIGSEGV for one without its last chunk."""
    given = _acceptable(memoryview(PNG), (32, 32))
    assert given.obj is PNG
    without_its_end = _acceptable(memoryview(PNG[:-12]), (32, 32))  # whose pixels are whole: the portable backend's too
    assert without_its_end.tobytes() == b"P6 32 32 255\n" + decode(PNG).tobytes()


@pytest.mark.parametrize(
    ("odd", "in_rows"),
    [(jpeg(), True), (jpeg() + b"more", True), (PNG, False), (jpeg()[: len(jpeg()) * 19 // 20], None)],
    ids=["whole", "bytes behind the end", "another format", "cut short"],
)
def test_dali_gets_the_rows_of_one_array_if_each_image_is_a_jpeg_with_its_end(tmp_path, monkeypatch, odd, in_rows):
    """DALI accepts this JPEG without its last twentieth if zeros follow, as they do in rows."""
    given, acceptable = [], Dali._acceptable
    monkeypatch.setattr(Dali, "_acceptable", lambda *args: given.append(acceptable(*args)) or given[-1])
    root = poisoned(tmp_path, odd, count=8, at=3)
    view = AugmentConfig(resize=32, crop=32)
    with Loader(root, batch=8, train=False, augment=view, config=LoaderConfig("dali-cpu"), dtype="uint8") as loader:
        if in_rows is None:
            with pytest.raises(BadSample, match=r"sample 3 \('s3'\) .*cannot be decoded"):
                next(iter(loader))
        else:
            images = next(iter(loader)).images
            assert odd is PNG or (images == images[0]).all()
            assert images[0].float().std() > 1
            assert (given[0] == []) is in_rows


@pytest.mark.parametrize("at", [0, 1, 500, 1022, 1023])
def test_an_image_that_dali_does_not_name_is_found(at):
    images, decoder = [memoryview(jpeg())] * 1024, Decoder(None, threads=2)
    assert decoder.first_rejected(images) is None
    images[at] = memoryview(POISON["truncated"]())
    assert decoder.first_rejected(images)[0] == at


def test_a_failure_that_no_image_causes_is_not_blamed_on_one(shards, monkeypatch):
    """Behaves as a GPU whose driver has failed: DALI then rejects every image."""
    with Loader(shards["jpeg"], batch=4, augment=AugmentConfig(), config=LoaderConfig("dali-cpu")) as loader:
        next(iter(loader))
        monkeypatch.setattr(Decoder, "first_rejected", lambda *_: (0, "CUDA error"))
        err = RuntimeError("CUDA error: an illegal memory access was encountered")
        assert loader._engine._explain(err) is err
