"""Shows on a GPU what no other machine can; each step writes its JSON at once, so that an early end leaves answers.

    python tools/gpu_proof.py --out docs/results
    python tools/gpu_proof.py --device cpu --tiny        the same steps without a GPU, to try them out

Steps: tests marked gpu; loader rate for keep and jpeg; the training step, synthetic and fed; two ranks on one device;
a kill and the same command again; what checkpoints cost.
Exit codes: 0 all steps passed, 1 a step failed (the others ran all the same), 2 usage, 65 bad data.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from model import AlexNet, ModelConfig
from pipeline import AugmentConfig, Loader
from pipeline.cores import usable_cores
from pipeline.errors import ConfigError, ExpressError
from pipeline.files import write_json
from pipeline.shards import file_sha256
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import Digits, ImageFolder
from tools import cli
from tools.bench import saves as bench_saves
from tools.bench import train as bench_train
from tools.bench.loader import unpacked
from train import environment

IMAGENET_SIZE = (500, 375)


@dataclass
class Proof:
    """What the steps share."""

    device: torch.device
    tiny: bool
    out: Path
    scratch: Path
    images: Path

    @property
    def batch(self) -> int:
        return 16 if self.tiny else 256

    @property
    def seconds(self) -> float:
        return 1.0 if self.tiny else 8.0

    @property
    def precision(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    def shards(self, encoding: str) -> Path:
        """The images sharded as keep or jpeg, made when first asked for."""
        folder = self.scratch / encoding
        if not folder.exists():
            options = Options(Encoding("jpeg") if encoding == "jpeg" else Encoding(), samples_per_shard=250)
            build(Plan(ImageFolder(self.images), options), folder, workers=usable_cores())
        return folder

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def tests(proof: Proof) -> dict[str, Any]:
    """pytest -m gpu; without a GPU they skip, and their reasons stand in the output."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise ExpressError("\n".join(lines[-30:]))
    return {"summary": lines[-1]}


def loader_rates(proof: Proof) -> dict[str, Any]:
    """Images a second out of the loader alone, for keep and jpeg shards."""
    command = [sys.executable, str(ROOT / "tools" / "bench" / "peers" / "ours.py")]
    fixed = ["--batch", str(proof.batch), "--seconds", str(proof.seconds), "--device", str(proof.device)]
    fixed += ["--threads", str(usable_cores()), "--dtype", "float16" if proof.device.type == "cuda" else "float32"]
    rates: dict[str, Any] = {}
    for data in ("keep", "jpeg"):
        runs = []
        for _ in range(1 if proof.tiny else 3):
            done = subprocess.run([*command, "--data", str(proof.shards(data)), *fixed], capture_output=True, text=True)
            if done.returncode:
                raise ExpressError(done.stderr.strip().splitlines()[-1])
            result = json.loads(done.stdout.splitlines()[-1])
            runs.append(round(result["images"] / result["seconds"], 1))
        rates[data] = {"images_per_second": statistics.median(runs), "runs": runs}
    return rates


def training_step(proof: Proof) -> dict[str, Any]:
    """The seed's AlexNet at full size: images a second from one batch held on the device, and from the loader."""
    with Loader(
        proof.shards("jpeg"), batch=proof.batch, device=proof.device, channels_last=True, augment=AugmentConfig()
    ) as loader:
        classes = len(loader.dataset.classes)
        net = AlexNet(ModelConfig("seed"), classes=classes, crop=224).to(proof.device)
        net = net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def step(images: torch.Tensor, labels: torch.Tensor) -> None:
            with torch.autocast(proof.device.type, torch.bfloat16, enabled=proof.precision == "bf16"):
                loss = F.cross_entropy(net(images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def endless():
            while True:
                yield from loader

        stream = endless()
        held = next(stream)
        synthetic = rate(proof, lambda: step(held.images, held.labels))
        fed = rate(proof, lambda: step(*next(stream)[:2]))
    return {
        "net": "seed",
        "precision": proof.precision,
        "batch": proof.batch,
        "synthetic": round(synthetic, 1),
        "fed": round(fed, 1),
        "fed_share": round(fed / synthetic, 3),
    }


def training_table(proof: Proof) -> dict[str, Any]:
    """tools/bench train: steps on synthetic images beside the seed's own net, and each layer's share."""
    batch, seconds, rounds = (2, 0.01, 1) if proof.tiny else (512, 2.0, 3)
    result = bench_train.measure(str(proof.device), batch=batch, seconds=seconds, rounds=rounds, few=proof.tiny)
    print(result.pop("table"), flush=True)
    return result


def rate(proof: Proof, step: Callable[[], None]) -> float:
    """Images a second of `step`, after a warm-up."""
    for _ in range(1 if proof.tiny else 10):
        step()
    proof.synchronize()
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < proof.seconds:
        step()
        steps += 1
        if steps % 10 == 0:
            proof.synchronize()  # so that the clock is not asked about steps that are only queued
    proof.synchronize()
    return steps * proof.batch / (time.perf_counter() - started)


def two_ranks(proof: Proof) -> dict[str, Any]:
    """Two ranks on the one device, joined by gloo, see the ids and nearly the losses of one rank."""
    shards = proof.scratch / "digits"
    build(Plan(Digits(), Options()), shards, workers=1)
    runs = {ranks: proof.scratch / f"ranks-{ranks}" for ranks in (1, 2)}
    for ranks, run in runs.items():
        launch(proof, shards, run, ranks=ranks)
    ids = {ranks: recorded_ids(run) for ranks, run in runs.items()}
    losses = {ranks: recorded_losses(run) for ranks, run in runs.items()}
    if ids[1] != ids[2]:
        raise ExpressError("one rank and two ranks saw different ids")
    difference = max(abs(a - b) for a, b in zip(losses[1][:20], losses[2][:20], strict=True))
    return {"steps": len(ids[1]), "ids": "equal", "largest_loss_difference_in_20_steps": difference}


def launch(proof: Proof, shards: Path, run: Path, *, ranks: int) -> None:
    """One epoch of the digits by `ranks` processes, each told that it is a machine of its own.

    So every one has local rank 0 and takes the one device: Accelerate's barrier and DDP go by the local rank, whatever
    the device is called. Raises ExpressError where one of them fails.
    """
    on_cpu = proof.device.type == "cpu"
    env = os.environ | ({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--dynamo_backend", "no", "--mixed_precision", "no"]
    command += ["--num_machines", str(ranks), "--num_processes", str(ranks)]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())] if ranks > 1 else []
    command += ["--multi_gpu"] if ranks > 1 else []
    script = [str(ROOT / "train" / "run.py"), "demo", "--data.shards", str(shards), "--run.dir", str(run)]
    script += ["--train.epochs", "1", "--model.dropout", "0", "--optim.lr", "0.01", "--run.log-every", "1"]
    script += ["--run.record-ids", "--run.ddp-backend", "gloo"]
    started = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), *script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, words in zip(started, said):
        if process.returncode:
            raise ExpressError("\n".join(words.decode(errors="replace").strip().splitlines()[-15:]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def recorded_ids(run: Path) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for path in sorted((run / "ids").glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(line["ids"])
    return steps


def recorded_losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def resume(proof: Proof) -> dict[str, Any]:
    """A deterministic run that is killed between two saves, and the same command again, against one left alone."""
    shards = proof.scratch / "digits"
    if not shards.is_dir():
        build(Plan(Digits(side=36), Options()), shards, workers=1)
    runs = {kind: proof.scratch / f"resume-{kind}" for kind in ("whole", "killed")}
    killed_at = train_until(proof, shards, runs["killed"], step=10)
    for run in runs.values():
        train_until(proof, shards, run)
    found = {kind: (recorded_losses(run), weights_of(run)) for kind, run in runs.items()}
    if found["whole"] != found["killed"]:
        pairs = zip(found["whole"][0], found["killed"][0], strict=True)
        first = next((i + 1 for i, (a, b) in enumerate(pairs) if a != b), None)
        raise ExpressError(f"killed after step {killed_at}: not the undisturbed run's bits, from step {first} on")
    return {"killed_after_step": killed_at, "steps": len(found["whole"][0]), "weights_and_losses": "equal"}


def train_until(proof: Proof, shards: Path, run: Path, *, step: int = 0) -> int:
    """One epoch of the digits, deterministic; killed once `step` is recorded. Returns the last recorded step."""
    env = os.environ | ({"ACCELERATE_USE_CPU": "true"} if proof.device.type == "cpu" else {})
    command = [sys.executable, str(ROOT / "train" / "run.py"), "demo", "--data.shards", str(shards)]
    command += ["--run.dir", str(run), "--train.epochs", "1", "--run.log-every", "1", "--run.save-every", "7"]
    command += ["--run.deterministic"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    while step and process.poll() is None and not (run / "checkpoints" / "step-00000007").is_dir():
        time.sleep(0.001)
    while step and process.poll() is None and len(recorded_losses(run)) < step:
        time.sleep(0.001)
    if step:
        process.kill()
    said = process.communicate(timeout=300)[1].decode(errors="replace")
    if not step and process.returncode:
        raise ExpressError("\n".join(said.strip().splitlines()[-15:]))
    return len(recorded_losses(run))


def weights_of(run: Path) -> list[str]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return [file_sha256(newest / f"{name}.safetensors") for name in ("model", "optimizer")]


def save_costs(proof: Proof) -> dict[str, Any]:
    """What checkpoints cost: tools/bench saves, here."""
    few = argparse.Namespace(
        blocks=1 if proof.tiny else 5, seconds=proof.seconds, batch=proof.batch, device=str(proof.device)
    )
    folder = proof.scratch / "saves"
    nets = ["demo"] if proof.tiny else list(bench_saves.NETS)
    return {"results": [bench_saves.measure(name, few, folder / name) for name in nets]}


STEPS = {
    "tests": tests,
    "loader": loader_rates,
    "step": training_step,
    "ranks": two_ranks,
    "train": training_table,
    "resume": resume,
    "saves": save_costs,
}


def made_images(folder: Path, count: int) -> Path:
    """Pictures of ImageNet's usual size, where no real ones were given: good for trying out, not for figures."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize(IMAGENET_SIZE, Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
        path = folder / f"class{i % 8}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
    return folder


def run_step(name: str, proof: Proof, data: str) -> bool:
    """Runs one step and writes gpu-NAME.json, whatever its end."""
    started = time.monotonic()
    try:
        result: dict[str, Any] = {"passed": True, "result": STEPS[name](proof)}
    except Exception as err:  # whatever it is, the later steps still have answers to give
        result = {"passed": False, "error": f"{type(err).__name__}: {err}"}
    described = {
        "step": name,
        "device": str(proof.device),
        "tiny": proof.tiny,
        "data": data,
        "seconds": round(time.monotonic() - started, 1),
        "command": environment.command(),
        "environment": environment.describe(),
    }
    write_json(proof.out / f"gpu-{name}.json", described | result)
    told = result["result"] if result["passed"] else f"FAILED: {result['error']}"
    print(f"{name} ({described['seconds']} s): {told}", flush=True)
    return result["passed"]


def main() -> None:
    p = cli.Parser(prog="gpu_proof.py", description=__doc__)
    p.add_argument("--device", default="cuda:0", help="(%(default)s)")
    p.add_argument("--tiny", action="store_true", help="a few images and seconds: to see it run, not for figures")
    p.add_argument("--images", type=Path, help="class folders of JPEGs or a tar of them (default: made ones)")
    p.add_argument("--out", type=Path, default=Path("runs/gpu-proof"), help="where the JSON goes (%(default)s)")
    p.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="(all)")
    args = p.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: no CUDA device here; --device cpu --tiny walks the same steps")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="imagenet-express-") as name:
        scratch = Path(name)
        if args.images:
            images, data = unpacked(args.images, scratch / "images"), args.images.name
        else:
            images, data = made_images(scratch / "images", 32 if args.tiny else 1024), "made pictures"
        proof = Proof(torch.device(args.device), args.tiny, args.out, scratch, images)
        passed = [run_step(step, proof, data) for step in args.steps]
    if not all(passed):
        raise ExpressError(f"{passed.count(False)} of {len(passed)} steps failed; see the JSON in {args.out}")


if __name__ == "__main__":
    cli.run(main)
