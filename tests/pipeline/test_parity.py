"""One plan, several backends: they give the same pixels for images of every kind."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import AugmentConfig, Loader, LoaderConfig, manifest, open_dataset
from pipeline.geometry import centre_offset, resized
from pipeline.read.augment import colour_shift
from pipeline.read.backend import to_device
from pipeline.shards import Sample, write_array, write_shard
from pipeline.storage import Folder
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.resize import resize
from pipeline.write.sources import ImageFolder
from tests.conftest import picture

BACKENDS = ["portable", "dali-cpu"]
SIZES = [(256, 256), (341, 256), (256, 400)]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


KINDS = {
    "4:2:0": lambda i: encode(i, "JPEG", quality=90, subsampling="4:2:0"),
    "4:2:2": lambda i: encode(i, "JPEG", quality=90, subsampling="4:2:2"),
    "4:4:4": lambda i: encode(i, "JPEG", quality=90, subsampling="4:4:4"),
    "4:2:0, restart markers": lambda i: encode(i, "JPEG", quality=90, subsampling="4:2:0", restart_marker_rows=1),
    "progressive": lambda i: encode(i, "JPEG", quality=90, progressive=True),
    "optimised": lambda i: encode(i, "JPEG", quality=60, optimize=True),
    "grey": lambda i: encode(i.convert("L"), "JPEG", quality=90),
    "CMYK": lambda i: encode(i.convert("CMYK"), "JPEG", quality=90),
    "EXIF-rotated": lambda i: encode(i, "JPEG", quality=90, exif=exif(6)),
    "PNG": lambda i: encode(i, "PNG"),
    "grey PNG": lambda i: encode(i.convert("L"), "PNG"),
}


def dataset_of(images: list[bytes], root, **statistics):
    """A dataset that holds exactly these bytes, valid or not."""
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    samples = (Sample(f"s{i}", image, i, *size) for i, (image, size) in enumerate(zip(images, sizes)))
    shard, rows = write_shard(Folder(root), "x.tar", samples)
    split = manifest.split_record([shard], "x.npy", write_array(Folder(root), "x.npy", rows))
    measured = {"mean": [120.0, 110.0, 100.0], "std": [60.0, 59.0, 58.0]} | statistics
    content = {"classes": [str(i) for i in range(len(images))], "splits": {"train": split}, "statistics": measured}
    manifest.write_manifest(Folder(root), content)
    return root


def crops(root, view, backend, *, train, epoch=0, dtype="uint8", seed=3) -> dict[int, np.ndarray]:
    """Sample id → (…, 3, crop, crop) as int or float, from the real loader."""
    config = LoaderConfig(backend=backend)
    with Loader(root, batch=4, train=train, seed=seed, dtype=dtype, augment=view, config=config) as loader:
        if epoch:
            loader.load_state_dict({"epoch": epoch, "step": 0})
        return {
            sample: image.numpy().astype(int if dtype == "uint8" else np.float32)
            for batch in loader
            for sample, image in zip(batch.ids.tolist(), batch.images)
        }


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, tmp_path_factory):
    rng = np.random.default_rng(7)
    images = [KINDS[request.param](picture(rng, *size)) for size in SIZES + SIZES[:1]]
    return images, dataset_of(images, tmp_path_factory.mktemp("kind"))


OTHERS = [("dali-cpu", False), ("portable", True)]


@pytest.mark.parametrize(
    ("backend", "train"),  # dali-cpu's crops are compared with those of portable, too
    [("dali-cpu", True), ("portable", False), *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)],
)
def test_presized_images_of_every_kind_are_pillows_to_the_last_bit(kind, backend, train):
    images, root = kind
    view = AugmentConfig(resize=256, crop=224, flip=False)
    got = crops(root, view, backend, train=train)
    reference = crops(root, view, "portable", train=train)
    for sample, crop in got.items():
        whole = np.asarray(Image.open(io.BytesIO(images[sample])).convert("RGB")).astype(int)
        assert np.array_equal(crop, reference[sample])
        places = [(y, x) for y in range(whole.shape[0] - 223) for x in range(whole.shape[1] - 223)]
        corner = crop[:, 0, 0]
        assert any(
            np.array_equal(whole[y, x], corner)
            and np.array_equal(whole[y : y + 224, x : x + 224].transpose(2, 0, 1), crop)
            for y, x in places
        )


SHRUNK, RANDOM = AugmentConfig(resize=144, crop=128), AugmentConfig(crop=96, scale_jitter=(0.1, 1.0))


@pytest.mark.parametrize(
    ("backend", "view"),
    [
        ("portable", RANDOM),
        ("dali-cpu", SHRUNK),
        pytest.param("portable", SHRUNK, marks=pytest.mark.slow),
        pytest.param("dali-cpu", RANDOM, marks=pytest.mark.slow),
    ],
)
def test_resized_images_of_every_kind_agree_within_a_grey_level(kind, backend, view):
    """Compares with Pillow's resize of the same box, downscaled and (small random rectangles) upscaled."""
    from pipeline.read.augment import place

    images, root = kind
    for epoch in range(3):
        for sample, crop in crops(root, view, backend, train=True, epoch=epoch).items():
            image = Image.open(io.BytesIO(images[sample])).convert("RGB")
            box, flip = place(view, np.array([sample]), np.array([image.size]), seed=3, epoch=epoch, train=True)
            left, top, width, height = box[0, 0]
            corners = (left, top, min(left + width, image.width), min(top + height, image.height))
            theirs = image.resize((view.crop, view.crop), Image.Resampling.BILINEAR, box=corners)
            theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip[0, 0] else theirs
            difference = np.abs(crop - np.asarray(theirs).astype(int).transpose(2, 0, 1))
            assert difference.mean() <= 1
            assert difference.max() <= 8


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    crop=st.integers(1, 40),
    more=st.integers(0, 8),
    square=st.booleans(),
    grey=st.booleans(),
)
def test_any_size_of_image_and_crop_is_cropped_as_pillow_would(
    tmp_path_factory, width, height, crop, more, square, grey
):
    image = picture(np.random.default_rng(width * 100 + height), width, height)
    image = image.convert("L") if grey else image
    root = dataset_of([encode(image, "JPEG", quality=95)] * 4, tmp_path_factory.mktemp("any"))
    view = AugmentConfig(resize=crop + more, crop=crop, square=square)
    stored = Image.open(io.BytesIO(encode(image, "JPEG", quality=95))).convert("RGB")
    w, h = (int(side) for side in resized(width, height, view.resize))
    left, top = int(centre_offset(w, crop)), int(centre_offset(h, crop))
    theirs = stored.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + crop, top + crop))
    ours = crops(root, view, "portable", train=False)[0]
    difference = np.abs(ours - np.asarray(theirs).astype(int).transpose(2, 0, 1))
    assert difference.max() <= 2  # two at a few values of one image in 1,700: Pillow rounds after the columns
    assert (difference == 2).sum() <= 3 + difference.size / 100


def test_the_loader_resizes_to_the_bytes_that_the_sharder_would_store(tmp_path):
    """The integer resampler gives Pillow's pixels within a grey level, and the same ones on every processor."""
    stored = encode(picture(np.random.default_rng(5), 217, 181), "JPEG", quality=95)
    root = dataset_of([stored] * 4, tmp_path)
    view = AugmentConfig(resize=96, crop=80)
    ours = crops(root, view, "portable", train=False)[0].transpose(1, 2, 0)
    image = Image.open(io.BytesIO(stored)).convert("RGB")
    assert np.array_equal(ours, resize(np.asarray(image), 96, square=True)[8:88, 8:88])
    width, height = (int(side) for side in resized(*image.size, 96))
    left, top = int(centre_offset(width, 80)), int(centre_offset(height, 80))
    pillows = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 80, top + 80))
    assert np.abs(ours - np.asarray(pillows).astype(int)).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_shards_are_cropped_to_the_last_bit_of_what_was_stored(image_folder, tmp_path, backend):
    source = ImageFolder(image_folder / "train", image_folder / "val", "pets")
    build(Plan(source, Options(Encoding("raw", size=64), samples_per_shard=5)), tmp_path, workers=1)
    split = open_dataset(tmp_path).split("train")
    view = AugmentConfig(resize=64, crop=48)
    got, reference = (crops(tmp_path, view, b, train=True) for b in (backend, "portable"))
    for sample, crop in got.items():
        assert np.array_equal(crop, reference[sample])
    for sample, crop in crops(tmp_path, view, backend, train=False).items():
        row = split.index[sample]
        data = (split.root / split.shards[row["shard"]].name).read_bytes()
        pixels = np.frombuffer(data, np.uint8, row["size"], row["offset"]).reshape(row["height"], row["width"], 3)
        top, left = (int(centre_offset(int(side), 48)) for side in pixels.shape[:2])
        assert np.array_equal(crop, pixels[top : top + 48, left : left + 48].transpose(2, 0, 1))
    resized_view = AugmentConfig(crop=40, scale_jitter=(0.3, 0.9))
    a, b = (crops(tmp_path, resized_view, name, train=True) for name in (backend, "portable"))
    assert max(np.abs(a[s] - b[s]).mean() for s in a) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_views_are_corners_and_centre_and_their_mirrors(shards, backend):
    one = crops(shards["jpeg"], AugmentConfig(), backend, train=False)
    ten = crops(shards["jpeg"], AugmentConfig(views=10), backend, train=False)
    split = open_dataset(shards["jpeg"]).split("train")
    for sample, views in ten.items():
        assert views.shape == (10, 3, 224, 224)
        assert np.array_equal(views[4], one[sample])
        assert np.array_equal(views[5:], views[:5, :, :, ::-1])
        row = split.index[sample]
        data = (split.root / split.shards[row["shard"]].name).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
        y, x = (int(centre_offset(side, 256)) for side in whole.shape[1:])
        for view, (top, left) in zip(views, [(y, x), (y, x + 32), (y + 32, x), (y + 32, x + 32)]):
            assert np.array_equal(view, whole[:, top : top + 224, left : left + 224])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["eigenvalue", "deviation"])
def test_colours_are_shifted_by_the_plan_on_every_backend(shards, backend, by):
    dataset = open_dataset(shards["jpeg"])
    plain = AugmentConfig(flip=False)
    coloured = AugmentConfig(flip=False, colour=0.1, colour_by=by)
    before, after = (crops(shards["jpeg"], v, backend, train=True, dtype="float32") for v in (plain, coloured))
    for sample in before:
        shift = colour_shift(coloured, np.array([sample]), dataset.covariance, seed=3, epoch=0)[0]
        assert np.abs(after[sample] - before[sample] - shift[:, None, None]).max() < 1e-3
    assert np.array_equal(
        crops(shards["jpeg"], coloured, backend, train=False, dtype="float32")[0],
        crops(shards["jpeg"], plain, backend, train=False, dtype="float32")[0],
    )


def test_the_colour_shift_has_the_papers_distribution():
    """Shifts are along the covariance's eigenvectors, with standard deviation 0.1 λ or 0.1 √λ of pixels in [0, 1]."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(3, 3)) * 40
    covariance = factor @ factor.T
    values, axes = np.linalg.eigh(covariance / 255**2)
    for by, expected in (("eigenvalue", values), ("deviation", np.sqrt(values))):
        config = AugmentConfig(colour=0.1, colour_by=by)
        shift = colour_shift(config, np.arange(40_000), covariance, seed=1, epoch=2) / 255
        along = shift @ axes
        assert np.allclose(along.std(0), 0.1 * expected, rtol=0.03)
        assert np.abs(along.mean(0)).max() < 0.003
        assert np.abs(np.corrcoef(along.T) - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_image_is_subtracted_pixel_by_pixel(shards, backend):
    dataset = open_dataset(shards["jpeg"])
    raw = crops(shards["jpeg"], AugmentConfig(), backend, train=True)
    view = AugmentConfig(normalize="mean-image")
    mean = dataset.mean_image[16:240, 16:240].transpose(2, 0, 1)
    for sample, image in crops(shards["jpeg"], view, backend, train=True, dtype="float32").items():
        assert np.abs(image - (raw[sample] - mean)).max() < 1e-3
    with Loader(shards["jpeg"], batch=4, dtype="bfloat16", augment=view, config=LoaderConfig(backend)) as loader:
        assert next(iter(loader)).images.dtype is torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_type_and_layout_holds_the_same_values(shards, backend, dtype, channels_last):
    view = AugmentConfig(normalize="mean-std")
    make = lambda **kw: Loader(shards["keep"], batch=4, augment=view, config=LoaderConfig(backend), **kw)  # noqa: E731
    with make() as plain, make(dtype=dtype, channels_last=channels_last) as other:
        for a, b in zip(plain, other):
            assert b.images.dtype is getattr(torch, dtype)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert b.images.is_contiguous(memory_format=layout)
            torch.testing.assert_close(b.images.float(), a.images, rtol=1e-2, atol=1e-2)


OTHERS = [pytest.param(encoding, marks=pytest.mark.slow) for encoding in (Encoding(), Encoding("raw", size=128))]


@pytest.mark.parametrize("encoding", [Encoding("jpeg"), *OTHERS], ids=lambda e: e.kind)
def test_64_real_images_agree_and_resume_at_every_step(imagenet_sample, tmp_path, encoding):
    build(Plan(ImageFolder(imagenet_sample), Options(encoding, samples_per_shard=10)), tmp_path, workers=2)
    view = AugmentConfig(resize=encoding.size, crop=encoding.size * 7 // 8)
    batches = {}
    for backend in BACKENDS:
        make = lambda: Loader(  # noqa: E731
            tmp_path,
            batch=16,
            seed=2,
            dtype="uint8",
            augment=view,
            config=LoaderConfig(backend),  # noqa: B023
        )
        with make() as loader:
            states, batches[backend] = [], []
            for _ in range(2):
                states.append(loader.state_dict())
                for batch in loader:
                    batches[backend].append(batch)
                    states.append(loader.state_dict())
                states.pop()
        for start, state in enumerate(states):
            with make() as loader:
                loader.load_state_dict(state)
                rest = [batch for _ in range(2 - state["epoch"]) for batch in loader]
            assert len(rest) == 8 - start
            for mine, theirs in zip(rest, batches[backend][start:]):
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    for a, b in zip(*batches.values()):
        assert torch.equal(a.ids, b.ids)
        difference = (a.images.int() - b.images.int()).abs().float().mean((1, 2, 3))
        assert difference.max() <= (0 if encoding.kind != "keep" else 1)


class FullSize(TorchDispatchMode):
    """Records the operations that make a tensor of a whole batch's size, with the types of what they read."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.elements:
            read = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.numel() >= self.elements]
            self.seen.append((func.overloadpacket.__name__, read))
        return out


@pytest.mark.parametrize("colour", [0.0, 0.1])
def test_the_mean_image_is_subtracted_from_uint8_in_one_pass_in_the_images_own_layout(shards, colour):
    view = AugmentConfig(normalize="mean-image", colour=colour)
    with Loader(shards["jpeg"], batch=4, augment=view, channels_last=True) as loader:
        assert loader._mean_image.is_contiguous(memory_format=torch.channels_last)
        with FullSize(4 * 3 * 224 * 224) as ops:
            images = next(iter(loader)).images
    assert images.is_contiguous(memory_format=torch.channels_last)
    made = [seen for seen in ops.seen if seen[0] not in ("permute", "detach", "alias", "lift_fresh", "view")]
    first = ("sub", [torch.uint8])
    assert made == ([first, ("sub_", [torch.float32])] if colour else [first])


def test_what_goes_to_a_gpu_goes_through_pinned_memory_without_waiting(monkeypatch):
    calls = []

    class Pinned:
        def to(self, device, *, non_blocking):
            calls.append((device, non_blocking))

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: Pinned())
    gpu = torch.device("cuda:0")
    to_device(np.zeros(3, np.float32), gpu)
    assert calls == [(gpu, True)]
    assert to_device(np.ones(3, np.float32), torch.device("cpu")).tolist() == [1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", [AugmentConfig(), AugmentConfig(normalize="mean-std"), AugmentConfig(colour=0.1)])
def test_float16_pixels_are_within_one_ulp_of_float32_pixels_in_bf16_and_fp16(shards, backend, view):
    """A half-precision net rounds its input anyway: float16 and float32 pixels must give it equal values."""
    make = lambda dtype: Loader(  # noqa: E731
        shards["jpeg"], batch=4, dtype=dtype, augment=view, config=LoaderConfig(backend)
    )
    with make("float32") as wide, make("float16") as half:
        for a, b in zip(wide, half):
            assert torch.equal(a.images < 0, b.images < 0)
            for theirs, ours in ((a.images.bfloat16(), b.images.bfloat16()), (a.images.half(), b.images)):
                ulps = theirs.view(torch.int16).int() - ours.view(torch.int16).int()
                assert ulps.abs().max() <= 1
