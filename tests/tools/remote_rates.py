"""Rates of shards at a URL and of their copies, beside those of a local folder: IMAGES.tar FILE.json.

The loader has one thread on core 0. The web server runs on core 1, waits before each response and lets some requests
fail. Then a consumer takes 70 % of the local rate, and the time is measured in which it waits for data. Each loader
reads two epochs in turn, of which the second counts: the images of its first steps were fetched in the one before it,
as those of the next epoch are fetched meanwhile.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import statistics
import sys
import tarfile
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402 (the path comes first)

from pipeline import AugmentConfig, Copies, Loader, LoaderConfig, open_dataset  # noqa: E402
from pipeline.write.build import build  # noqa: E402
from pipeline.write.plan import Options, Plan  # noqa: E402
from pipeline.write.sources.folders import ImageFolder  # noqa: E402
from tools.bench import data  # noqa: E402
from train import environment  # noqa: E402

DELAY, FAILING = 0.1, 0.01  # seconds; of the requests
ROUNDS, BATCH, SHARD, WINDOW, PACE, COPIES_OF_EACH = 21, 128, 128, 16, 0.7, 4


def serve(folder: Path, port, sent) -> None:
    os.sched_setaffinity(0, {1})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            return

        def do_GET(self) -> None:
            path, asked = folder / self.path.lstrip("/"), self.headers.get("Range")
            time.sleep(DELAY)
            if not path.is_file():  # cuts.json
                self.send_error(404)
                return
            failed = random.random() < FAILING
            size = 0 if failed else path.stat().st_size
            start, end = map(int, asked.removeprefix("bytes=").split("-")) if asked else (0, size - 1)
            end = min(end + 1, size)
            self.send_response(503 if failed else 206 if asked else 200)
            self.send_header("Content-Length", str(max(0, end - start)))
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("ETag", f'"{size}"')
            self.end_headers()
            self.wfile.flush()
            if not failed:
                sent.value += end - start
                with open(path, "rb") as file:
                    while start < end:
                        start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

    class Server(ThreadingHTTPServer):
        request_queue_size, daemon_threads = 512, True

    server = Server(("127.0.0.1", 0), Handler)
    port.value = server.server_port
    server.serve_forever()


def epoch(loader: Loader, rate: float = 0) -> tuple[float, float, float]:
    """(images a second, of processor time too, fraction of the time spent waiting) of an epoch, at most at `rate`."""
    began, cpu, images = time.perf_counter(), time.process_time(), 0
    loader.stats()
    for batch in loader:
        images += len(batch.ids)
        if rate:
            time.sleep(max(0.0, images / rate - (time.perf_counter() - began)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return images / seconds, images / cpu, loader.stats()["wait_seconds"] / seconds


def main() -> None:
    images, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        with tarfile.open(images) as tar:
            tar.extractall(root / "images", filter="data")
        for path in sorted((root / "images").glob("*/*")):
            for number in range(1, COPIES_OF_EACH):
                os.link(path, path.with_name(f"{number}-{path.name}"))
        options = Options(data.ENCODINGS["jpeg"], samples_per_shard=SHARD)
        build(Plan(ImageFolder(root / "images"), options), root / "set", workers=2)
        fork = get_context("fork")
        port, sent = fork.Value("i", 0), fork.Value("q", 0)
        server = fork.Process(target=serve, args=(root / "set", port, sent), daemon=True)
        server.start()
        while not port.value:
            time.sleep(0.01)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        os.sched_setaffinity(0, {0})
        torch.set_num_threads(1)
        url = {"root": f"http://127.0.0.1:{port.value}", "allow_http": True}
        opened = {"local": {"root": root / "set"}, "url": url, "copies": url | {"copies": Copies(root / "copies")}}
        options = {"batch": BATCH, "window": WINDOW, "augment": AugmentConfig(resize=256, crop=224)}
        loaders = {
            name: Loader(open_dataset(**each), config=LoaderConfig("portable", threads=1), **options)
            for name, each in opened.items()
        }
        for loader in loaders.values():
            epoch(loader)
        found, paced = ({name: [] for name in loaders} for _ in range(2))
        before = sent.value
        for _ in range(ROUNDS):
            for name, loader in loaders.items():
                epoch(loader)
                found[name].append(epoch(loader))
        size = sum(shard.bytes for shard in loaders["url"].split.shards)
        of_set = (sent.value - before) / size / (2 * ROUNDS)
        local = statistics.median(rate for rate, *_ in found["local"])
        for _ in range(ROUNDS // 3):
            for name, loader in loaders.items():
                epoch(loader, PACE * local)
                paced[name].append(epoch(loader, PACE * local)[2])
        for loader in loaders.values():
            loader.close()
        server.kill()
    ratios = {
        name: {
            what: statistics.median(ours[i] / theirs[i] for ours, theirs in zip(found[name], found["local"]))
            for i, what in enumerate(("rate", "rate_per_cpu"))
        }
        | {"waiting_when_paced": statistics.median(paced[name])}
        for name in found
    }
    command = shlex.join(["python", "tests/tools/remote_rates.py", images.name, out.name])
    content = {"what": "a loader at a URL and from copies, beside a local folder; medians of paired rounds"}
    content |= {"command": command, "environment": environment.describe(), "bytes_of_set_sent_an_epoch": of_set}
    out.write_text(json.dumps(content | {"medians": ratios, "rounds": found, "waiting": paced}, indent=1) + "\n")
    print(json.dumps(ratios, indent=1), of_set)


if __name__ == "__main__":
    main()
