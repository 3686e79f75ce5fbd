"""Loading and training on a CUDA device. Marked gpu."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import AlexNet, ModelConfig
from pipeline import AugmentConfig, Loader, LoaderConfig
from pipeline.shards import file_sha256
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
VIEW = AugmentConfig(resize=256, crop=224)


def batches(root, backend: str, **kwargs):
    device = "cuda:0" if backend == "dali-gpu" else "cpu"
    with Loader(root, batch=4, seed=9, device=device, augment=VIEW, config=LoaderConfig(backend), **kwargs) as loader:
        return [tuple(field.cpu() for field in batch) for batch in loader]


@pytest.mark.parametrize("data", ["keep", "jpeg"])
def test_gpu_and_cpu_backends_give_the_same_samples_and_nearly_the_same_pixels(shards, data):
    cpu, gpu = (batches(shards[data], backend, dtype="uint8") for backend in ("dali-cpu", "dali-gpu"))
    assert len(cpu) == len(gpu) == 3
    for (x, labels, ids), (y, labels_, ids_) in zip(cpu, gpu):
        assert torch.equal(labels, labels_)
        assert torch.equal(ids, ids_)
        difference = np.abs(x.numpy().astype(int) - y.numpy().astype(int))
        assert difference.mean() < 1.5


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("view", [{"crop": 32}, {"crop": 28, "resize": 30}, {"crop": 32, "scale_jitter": (0.1, 1.0)}])
def test_images_in_the_gpu_s_memory_have_the_cpu_s_pixels(few_digits, train, view):
    """Equal if nothing is resized; otherwise taps in float64 may be rounded differently at one value in 10,000."""
    augment, found = AugmentConfig(**{"resize": 36} | view), []
    for backend, device in (("portable", "cpu"), ("resident", "cuda:0")):
        options = {"batch": 32, "device": device, "dtype": "uint8", "train": train, "augment": augment}
        with Loader(few_digits, config=LoaderConfig(backend), **options) as loader:
            found.append([(batch.images.cpu().int(), batch.ids) for batch in loader])
    for (x, ids), (y, ids_) in zip(*found, strict=True):
        assert torch.equal(ids, ids_)
        difference = (x - y).abs()
        assert difference.max() <= (view != {"crop": 32} and (train or "resize" in view))
        assert (difference > 0).float().mean() <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_batches_arrive_on_the_device_in_the_format_asked_for(shards, dtype):
    with Loader(shards["jpeg"], batch=4, device="cuda:0", dtype=dtype, channels_last=True, augment=VIEW) as loader:
        assert loader.backend == "dali-gpu"
        kept = [batch.images for batch in loader]
        copies = [images.clone() for images in kept]
        for _ in loader:
            pass
    for images, copy in zip(kept, copies):
        assert images.device == torch.device("cuda:0")
        assert images.dtype is getattr(torch, dtype)
        assert images.shape == (4, 3, 224, 224)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, copy)  # DALI does not reuse memory that it has handed over


def test_restoring_in_mid_epoch_gives_the_same_rest(shards):
    whole = batches(shards["jpeg"], "dali-gpu", dtype="uint8")
    with Loader(shards["jpeg"], batch=4, seed=9, device="cuda:0", dtype="uint8", augment=VIEW) as loader:
        loader.load_state_dict({"epoch": 0, "step": 1})
        rest = [batch.ids.cpu() for batch in loader]
    assert [ids.tolist() for ids in rest] == [ids.tolist() for _, _, ids in whole[1:]]


def test_evaluation_counts_each_sample_once_on_the_gpu(shards):
    ids = []
    for rank in range(3):
        with Loader(shards["jpeg"], batch=6, train=False, rank=rank, world=3, device="cuda:0", augment=VIEW) as loader:
            ids += [i for batch in loader for i in batch.ids.tolist()]
    assert ids == list(range(12))


@pytest.mark.parametrize(
    ("precision", "asked", "backend"),
    [("fp32", "auto", "resident"), ("bf16", "dali-gpu", "dali-gpu"), ("fp16", "dali-gpu", "dali-gpu")],
)
def test_the_demo_learns_on_the_gpu(digits, tmp_path, precision, asked, backend):
    command = [sys.executable, str(ROOT / "train" / "run.py"), "demo", "--data.shards", str(digits)]
    command += ["--run.dir", str(tmp_path / "run"), "--train.epochs", "8", "--train.precision", precision]
    command += ["--loader.backend", asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["top1"] > 0.9
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["backend"] == backend


@pytest.mark.parametrize("preset", ["modern", "torchvision"])
def test_nets_with_adaptive_pooling_train_deterministically(shards, tmp_path, preset):
    command = [sys.executable, str(ROOT / "train" / "run.py"), preset, "--data.shards", str(shards["jpeg"])]
    command += ["--run.dir", str(tmp_path / "run"), "--train.batch", "4", "--limit-steps", "2", "--run.deterministic"]
    command += ["--run.trackers", "--train.crop-sizes", "--train.crop-until", "--train.compile", "off"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_a_compiled_net_has_the_gradients_of_an_eager_one():
    torch.manual_seed(0)
    net = AlexNet(ModelConfig("original", width=0.125, dropout=0, weight_init="torch"), classes=10, crop=64).cuda()
    images, labels = torch.randn(8, 3, 64, 64, device="cuda"), torch.arange(8, device="cuda")
    gradients = []
    for form in (net, torch.compile(net)):
        net.zero_grad()
        F.cross_entropy(form(images), labels).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert eager.norm() > 0
        assert (eager - compiled).norm() <= 1e-2 * eager.norm()


# Runs that are killed, and runs of two ranks, against an undisturbed one

STEPS, SAVED_AT = 60, 7  # a GPU may take 20 steps before a kill arrives


def demo(digits: Path, run: Path, **env: str) -> subprocess.Popen[bytes]:
    """The demo, deterministic and with every step recorded, so that runs can be compared."""
    command = [sys.executable, str(ROOT / "train" / "run.py"), "demo", "--data.shards", str(digits)]
    command += ["--run.dir", str(run), "--limit-steps", str(STEPS), "--train.epochs", "3", "--run.trackers"]
    command += ["--optim.lr", "0.01", "--optim.warmup-epochs", "0", "--run.log-every", "1", "--run.record-ids"]
    command += ["--run.save-every", str(SAVED_AT), "--run.ddp-backend", "gloo", "--run.deterministic"]
    with open(run.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd="/", env=os.environ | env)


def ended_well(process: subprocess.Popen[bytes], run: Path) -> None:
    assert process.wait(120) == 0, run.with_suffix(".log").read_text()


def losses(run: Path) -> list[float]:
    """The losses by step, without a line that a kill has cut."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def ids(run: Path) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for path in sorted((run / "ids").glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(line["ids"])
    return steps


def weights(run: Path) -> list[str]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return [file_sha256(newest / f"{name}.safetensors") for name in ("model", "optimizer")]


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    ended_well(demo(digits, run), run)
    return run


def test_a_killed_run_and_the_same_command_give_the_bits_of_an_undisturbed_run(digits, undisturbed, tmp_path):
    run = tmp_path / "killed"
    process = demo(digits, run)
    saved = run / "checkpoints" / f"step-{SAVED_AT:08d}"
    while process.poll() is None and not (saved.is_dir() and len(losses(run)) >= SAVED_AT + 3):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses(run)) < STEPS, "the run had ended before the kill arrived"
    ended_well(demo(digits, run), run)
    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)


def test_two_ranks_on_one_device_see_the_ids_and_nearly_the_losses_of_one(digits, undisturbed, tmp_path):
    """Each rank has local rank 0, as on a machine of its own: Accelerate and DDP choose the device by it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = tmp_path / "two-ranks"
    ranks = [demo(digits, run, **group, RANK=str(rank)) for rank in range(2)]
    try:
        for process in ranks:
            ended_well(process, run)
    finally:
        for process in ranks:
            process.kill()
    assert ids(run) == ids(undisturbed)
    np.testing.assert_allclose(losses(run)[:20], losses(undisturbed)[:20], rtol=0.02)
