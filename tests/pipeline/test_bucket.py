"""Sharding to an object store: the bytes of a local run, whole or not there. Loopback only."""

from __future__ import annotations

import http.client
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from pipeline import AugmentConfig, DataError, Loader, LoaderConfig, open_dataset
from pipeline.errors import ConfigError
from pipeline.storage import Folder, folder_at
from pipeline.write import build
from pipeline.write.plan import Options, Plan
from pipeline.write.sources import Digits
from tests.conftest import ROOT
from tests.pipeline.conftest import CANARY
from tests.pipeline.test_tables import hub, hub_rows
from tests.pipeline.test_tars import image, tar
from tests.pipeline.web_server import serving

pytest.importorskip("obstore", reason="pip install -e '.[test]'")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def box(bucket):
    """An empty bucket of a name of its own: (client, name)."""
    name = f"box-{random.randrange(1 << 60)}"
    bucket.client.create_bucket(Bucket=name)
    return bucket.client, name


def objects(box) -> dict[str, bytes]:
    client, name = box
    found = {}
    for key in (each["Key"] for each in client.list_objects_v2(Bucket=name).get("Contents", ())):
        with suppress(client.exceptions.NoSuchKey):  # a killed run's last request removed it
            found[key] = client.get_object(Bucket=name, Key=key)["Body"].read()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(out: object, *more: object) -> list[str]:
    return ["digits", "--out", str(out), "--samples-per-shard", "100", "--workers", "2", *map(str, more)]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    subprocess.run([sys.executable, "tools/make_shards.py", *command(out)], cwd=ROOT, check=True, capture_output=True)
    return out


def in_process(*options: object) -> tuple[int, str]:
    """Exit code and output of make_shards.py."""
    run = subprocess.run(
        [sys.executable, "tools/make_shards.py", *map(str, options)], cwd=ROOT, capture_output=True, text=True
    )
    assert CANARY not in run.stdout + run.stderr
    return run.returncode, run.stdout + run.stderr


@contextmanager
def failing(server: str) -> Iterator[str]:
    """The URL of a proxy before a server that answers every seventh request by 503, and breaks every ninth off."""
    numbers = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            return

        def forward(self) -> None:
            number, size = next(numbers), int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size // 2 if number % 9 == 8 else size)
            if number % 9 == 8:
                self.close_connection = True
                return
            if number % 7 == 6:
                self.send_error(503)
                return
            connection = http.client.HTTPConnection(urlsplit(server).netloc)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()
    proxy.server_close()


def test_a_bucket_gets_the_bytes_of_a_local_run_and_is_trained_from(box, wanted):
    url = f"s3://{box[1]}"
    assert in_process(*command(url, "--allow-http"))[0] == 0
    assert objects(box) == files(wanted)
    batches = []
    for dataset in (open_dataset(url, allow_http=True), open_dataset(wanted)):
        options = {"batch": 64, "window": 3, "dtype": "uint8", "augment": AugmentConfig(resize=64, crop=32)}
        with Loader(dataset, config=LoaderConfig("portable"), **options) as loader:
            batches.append([(batch.ids.tolist(), batch.images.clone()) for batch in loader])
    assert all(ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) for ours, theirs in zip(*batches, strict=True))


def test_what_is_whole_is_not_made_again_and_another_plan_is_rejected(box, wanted):
    client, name = box
    url, whole = f"s3://{name}/a/b", {f"a/b/{file}": data for file, data in files(wanted).items()}
    for part in (0, 1):
        code, text = in_process(*command(url, "--allow-http", "--shards", f"{part}/2"))
        assert (code, "with all of them there, run --merge" in text) == (0, True)
        assert not [key for key in objects(box) if key.endswith("manifest.json")]
        with pytest.raises(DataError, match=r"manifest.json: there is no such object"):
            open_dataset(url, allow_http=True)
    made = {key: client.head_object(Bucket=name, Key=key)["LastModified"] for key in objects(box)}
    code, text = in_process(*command(url, "--allow-http", "--seed", 1))
    assert code == 2
    assert f"error: {url}: holds an unfinished sharding with options.seed=0, but this one has 1" in text
    assert in_process(*command(url, "--allow-http", "--merge"))[0] == 0
    assert objects(box) == whole
    assert all(client.head_object(Bucket=name, Key=key)["LastModified"] == made[key] for key in whole if key in made)
    assert in_process(*command(url, "--allow-http"))[0] == 0
    assert objects(box) == whole
    code, text = in_process(*command(url, "--allow-http", "--seed", 1))
    assert (code, f"error: {url}: holds a finished dataset with options.seed=0" in text) == (2, True)


def test_cuts_that_are_lost_are_made_again_from_the_bucket(box, wanted):
    client, name = box
    assert in_process(*command(f"s3://{name}", "--allow-http"))[0] == 0
    client.delete_object(Bucket=name, Key="train-000002.cuts")
    client.delete_object(Bucket=name, Key="cuts.json")
    code, text = in_process("cuts", f"s3://{name}", "--allow-http", "--workers", 2)
    assert (code, "images can be cut" in text) == (0, True)
    assert objects(box) == files(wanted)


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_only_whole_objects_and_is_continued(box, wanted):
    client, name = box
    url, whole, rng, unfinished = f"s3://{name}", files(wanted), random.Random(0), 0
    full = [sys.executable, "tools/make_shards.py", *command(url, "--allow-http")]
    for _ in range(5):
        enough = len(objects(box)) + rng.randrange(1, 20)
        run = subprocess.Popen(full, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and client.list_objects_v2(Bucket=name)["KeyCount"] < enough:
            time.sleep(0.002)
        run.kill()
        run.wait()
        time.sleep(0.7)  # its workers see that it is gone
        found = objects(box)
        unfinished += "manifest.json" not in found
        assert all(key.startswith("parts/") or data == whole[key] for key, data in found.items())
    assert unfinished > 2
    assert in_process(*command(url, "--allow-http"))[0] == 0
    assert objects(box) == whole


@pytest.mark.slow
def test_requests_that_fail_are_made_again(box, wanted, s3, monkeypatch):
    with failing(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert in_process(*command(f"s3://{box[1]}", "--allow-http"))[0] == 0
    assert objects(box) == files(wanted)


def test_of_two_plans_the_first_keeps_the_other_out(box):
    places = [folder_at(f"s3://{box[1]}", allow_http=True) for _ in range(2)]
    for number, place in enumerate(places):
        place.create("parts/plan.json", b"%d" % number)
    assert [place.read("parts/plan.json") for place in places] == [b"0", b"0"]
    assert (places[0].names(), places[0].size("parts/plan.json"), places[0].size("x")) == (["parts"], 1, None)
    places[1].remove("parts")
    places[1].remove("x")
    assert objects(box) == {}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["digits", "--out", "s3://", "--dry-run"], 2, "s3://: names no bucket or server; write s3://NAME/FOLDER"),
        (["digits", "--out", "s3://[x"], 2, "s3://[x: names no bucket or server"),
        (
            ["digits", "--out", f"https://me:{CANARY}@host/x"],
            2,
            "https://host/x: leave user, password, ?, # and .. out",
        ),
        (["index", "x.tar", "--out", f"s3://me:{CANARY}@box"], 2, "s3://box: leave user, password"),
        (["webdataset", "--train", f"https://me:{CANARY}@h/{{x", "--out", "x"], 2, "https://h/{x: leave user"),
        (
            ["webdataset", "--train", "https://h/../../x.tar", "--out", "x", "--fetch", "x"],
            2,
            "https://h/../../x.tar: leave",
        ),
        (["webdataset", "--train", f"https://me:{CANARY}@h/x.tar", "--out", "x"], 2, "https://h/x.tar: leave user"),
        (
            ["webdataset", "--train", f"https://h/x.tar?sig={CANARY}", "--out", "x", "--fetch", "y"],
            2,
            "https://h/x.tar: ",
        ),
        (["digits", "--out", "https://host/x"], 2, "https://host/x: shards are written to a folder, or to s3://"),
        (["index", "x.tar", "--out", "s3://box"], 2, "s3://box: index writes into a folder; name one"),
        (["digits", "--out", "s3://a-bucket-that-is-not-there"], 74, "s3://a-bucket-that-is-not-there/: cannot be"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(bucket, options, code, message):
    found, text = in_process(*options, "--allow-http")
    assert found == code
    assert text.splitlines()[-1].startswith(f"error: {message}")


def test_two_runs_of_one_plan_at_the_same_time_both_end_well(box, wanted):
    full = [sys.executable, "tools/make_shards.py", *command(f"s3://{box[1]}", "--allow-http")]
    runs = [subprocess.Popen(full, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0), ("", 0)]
    assert objects(box) == files(wanted)


def test_a_plan_that_begins_when_another_one_ends_is_rejected(wanted, monkeypatch):
    listed = iter([[]])  # before the manifest was written
    names = Folder.names
    monkeypatch.setattr(Folder, "names", lambda self, *below: next(listed, None) or names(self, *below))
    plan = Plan(Digits(), Options(samples_per_shard=100, seed=1))
    copy = shutil.copytree(wanted, wanted.parent / "copy")
    monkeypatch.setattr(build, "_missing", None)  # it is not asked
    with pytest.raises(ConfigError, match=r"holds a finished dataset with options.seed=0, but this one has 1"):
        build._begin(plan, Folder(copy), range(9))


def test_objects_of_others_are_kept_and_those_of_consoles_are_no_hindrance(box, tmp_path, wanted):
    client, name = box
    client.put_object(Bucket=name, Key="x/parts/mine.jpg", Body=b"mine")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.jpg").touch()
    for place in (f"s3://{name}/x", tmp_path):
        code, text = in_process(*command(place, "--allow-http"))
        assert (code, f"error: {place}: holds parts/mine.jpg, which is none of ours" in text) == (2, True)
    assert (objects(box), (tmp_path / "parts" / "mine.jpg").exists()) == ({"x/parts/mine.jpg": b"mine"}, True)
    markers = {"y/": b"", "y/parts/": b""}
    for key in markers:
        client.put_object(Bucket=name, Key=key)
    assert in_process(*command(f"s3://{name}/y", "--allow-http"))[0] == 0
    found = {key.removeprefix("y/"): data for key, data in objects(box).items() if key[0] == "y" and key not in markers}
    assert found == files(wanted)


def test_a_plan_that_is_no_json_is_one_line(box):
    box[0].put_object(Bucket=box[1], Key="parts/plan.json", Body=b"<html>")
    code, text = in_process(*command(f"s3://{box[1]}", "--allow-http"))
    assert (code, f"error: s3://{box[1]}/parts/plan.json cannot be read" in text) == (65, True)


def test_other_images_than_those_of_a_finished_bucket_are_rejected(box, tmp_path):
    for i in range(4):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i))
    options = ["imagefolder", "--train", tmp_path / "in", "--out", f"s3://{box[1]}", "--allow-http"]
    assert in_process(*options)[0] == 0
    path.unlink()
    path.with_name("1b.jpg").write_bytes(image(9))
    code, text = in_process(*options)
    assert (code, "holds a finished dataset of other images; this run would have others; remove it" in text) == (
        2,
        True,
    )


def test_a_bucket_without_obstore_names_the_package(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['obstore'] = None\n")
    run = subprocess.run(
        [sys.executable, "tools/make_shards.py", *command("s3://box")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (run.returncode, "pip install 'imagenet-express[remote]'" in run.stderr) == (2, True)


def test_tars_and_parquet_files_at_a_url_are_sharded_from_copies_that_are_made_once(tmp_path):
    (tmp_path / "at" / "a").mkdir(parents=True)
    for folder, number in (("", 0), ("", 1), ("a", 0)):  # two of one name
        content = {}
        for i in range(3):
            content |= {f"{folder}{number}{i}.cls": b"%d" % i, f"{folder}{number}{i}.jpg": image(7 * number + i)}
        tar(tmp_path / "at" / folder / f"{number}.tar", content)
    hub(tmp_path / "at" / "train.parquet", hub_rows(6))
    with serving(tmp_path / "at") as server:
        server.url += "/"
        places = {
            "url": (server.url, ["--allow-http", "--fetch", tmp_path / "copies"]),
            "local": (f"{tmp_path}/at/", []),
        }
        for run, (name, (place, more)) in itertools.product(("first", "again"), places.items()):
            server.log.clear()
            for kind, train, val in (("webdataset", "{0..1}.tar", "a/0.tar"), ("hf-parquet", "train.parquet", "")):
                out = tmp_path / f"{kind}-{name}-{run}"
                options = [kind, "--train", place + train, "--out", out, "--workers", 2, *more]
                options += (
                    ["--val", place + val] if val else ["--val-fraction", 0.5, "--unpack", out.with_suffix(".tars")]
                )
                code, text = in_process(*options)
                assert code == 0, text
                assert files(out) == files(tmp_path / f"{kind}-url-first")
            assert sorted(each[0] for each in server.log if each[1:] != (0, 1)) == (
                ["0.tar", "1.tar", "a/0.tar", "train.parquet"] if (run, name) == ("first", "url") else []
            )
        code, text = in_process("webdataset", "--train", f"{server.url}0.tar", "--out", tmp_path / "x", "--allow-http")
        assert (code, "name a folder for copies of its files, by --fetch DIR" in text) == (2, True)
        missing = ["webdataset", "--train", f"{server.url}9.tar", "--out", tmp_path / "x", *places["url"][1]]
        code, text = in_process(*missing)
        assert (code, f"error: {server.url}9.tar: there is no such object" in text) == (65, True)
