"""Sharding on a Ray cluster: the bytes of a local run, whatever is lost. `make ray-test` installs Ray first."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import Folder
from pipeline.write import ray_pool
from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import Digits
from pipeline.write.sources.base import Item
from tests.cluster.two import Hosts, a_port
from tests.conftest import ROOT, run_here
from tools import make_shards

OPTIONS = Options(samples_per_shard=100, stats=False)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of a core each, on this machine."""
    pytest.importorskip("ray", reason="make ray-test installs it")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wanted")
    build(Plan(Digits(), OPTIONS), out, workers=1)
    return out


@dataclass
class Faulty(Digits):
    """Digits whose reading goes wrong at one image: `fault` says how, and `done` is a file that shows it has."""

    fault: str = ""
    done: Path = Path()

    def read(self, item: Item) -> bytes:
        if item.where == "700":
            if self.fault == "disk":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self.fault == "killed" and not self.done.exists():
                self.done.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "not there" and self._is_second_node():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return super().read(item)

    def _is_second_node(self) -> bool:
        import ray

        return ray.is_initialized() and ray.get_runtime_context().get_node_id() == self.done.name


def shard(source: Digits, out: Path, address: str) -> None:
    run = partial(ray_pool.run, source=source, address=address)
    build(Plan(source, OPTIONS), out, workers=2, run=run)


def assert_same(found: Path, wanted: Path) -> None:
    names = sorted(os.listdir(wanted))
    assert sorted(os.listdir(found)) == names
    assert filecmp.cmpfiles(found, wanted, names, shallow=False)[1:] == ([], [])


def test_a_cluster_makes_the_same_bytes_though_a_worker_is_killed(cluster, wanted, tmp_path):
    shard(Faulty(fault="killed", done=tmp_path / "done"), tmp_path / "out", cluster.address)
    assert (tmp_path / "done").exists()
    assert_same(tmp_path / "out", wanted)


def test_a_node_that_does_not_see_the_images_is_named_before_any_shard_is_made(cluster, tmp_path):
    second = cluster.list_all_nodes()[1].node_id
    with pytest.raises(StorageError, match=r"node .+: the source's 0 cannot be read; mount it there"):
        shard(Faulty(fault="not there", done=Path(second)), tmp_path, cluster.address)
    assert not list(tmp_path.glob("*.tar"))


def test_a_folder_that_a_node_does_not_see_is_named(tmp_path):
    place = Folder(tmp_path / "x")
    assert ray_pool._missing_there(Digits(), None, place) == f"{place} is not visible"
    assert ray_pool._missing_there(Digits(), Item("k", 0, "0"), Folder(tmp_path)) == ""


def test_what_fails_on_each_retry_is_the_error_of_a_local_run(cluster, tmp_path):
    with pytest.raises(StorageError, match="Input/output error; solve that, and run it again to resume"):
        shard(Faulty(fault="disk"), tmp_path / "out", cluster.address)


def test_a_driver_that_is_killed_leaves_what_the_next_one_completes(cluster, wanted, tmp_path):
    command = [sys.executable, "tools/make_shards.py", "digits", "--side", "40", "--out", str(tmp_path / "out")]
    command += ["--samples-per-shard", "100", "--stats", "off", "--executor", "ray", "--ray-address", cluster.address]
    driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert list((tmp_path / "out").glob("*.tar"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same(tmp_path / "out", wanted)


def test_without_ray_it_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["digits", "--out", tmp_path / "out", "--executor", "ray"]
    code, line = run_here(make_shards.main, monkeypatch, capsys, *command)
    assert (code, line) == (2, "error: --executor ray: Ray is missing; pip install '.[ray]'")


def test_without_a_cluster_it_is_one_line(monkeypatch, capsys, tmp_path):
    pytest.importorskip("ray", reason="make ray-test installs it")
    command = ["digits", "--out", tmp_path / "out", "--executor", "ray", "--ray-address", "127.0.0.1:1"]
    code, line = run_here(make_shards.main, monkeypatch, capsys, *command)
    assert code == 2
    assert line.startswith("error: --ray-address 127.0.0.1:1: no cluster (")


# Two machines: network namespaces, each with its own mount at Ray's folder, and a bucket as --out.

HEAD = """
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
{env} {bin}/python -m moto.server --host {head} --port {s3} >/dev/null 2>&1 &
{env} {bin}/ray start --head --node-ip-address {head} --port {port} --num-cpus 1 --include-dashboard false --block \
    >/dev/null 2>&1 &
{env} {bin}/python {script} {head}:{port} http://{head}:{s3} {out} {options}
"""
SECOND = """
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
until {bin}/python -c 'import socket; socket.create_connection(("{head}", {port}), 1)' 2>/dev/null; do sleep 0.2; done
{env} exec {bin}/ray start --address {head}:{port} --node-ip-address {second} --num-cpus 1 --block
"""
DRIVER = """
import subprocess, sys, time
from pathlib import Path
import boto3, ray
address, server, out, *options = sys.argv[1:]
ray.init(address, logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 60
while sum(node["Alive"] for node in ray.nodes()) < 2 and time.monotonic() < deadline:
    time.sleep(0.1)
ray.shutdown()
client = boto3.client("s3", endpoint_url=server)
client.create_bucket(Bucket="box")
command = ["tools/make_shards.py", "digits", "--side", "40", "--out", "s3://box/set", "--allow-http", *options]
run = subprocess.run([sys.executable, *command, "--executor", "ray", "--ray-address", address])
for entry in client.list_objects_v2(Bucket="box").get("Contents", []):
    client.download_file("box", entry["Key"], str(Path(out) / entry["Key"].removeprefix("set/").replace("/", "_")))
sys.exit(run.returncode)
"""


def on_two_machines(tmp_path: Path, *, second_sees: bool) -> tuple[int, str, Path]:
    """Exit code and output of a sharding whose bucket the second node may see, and the folder of what it wrote."""
    pytest.importorskip("ray", reason="make ray-test installs it")
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    work = Path(tempfile.mkdtemp())
    try:
        (out := work / "out").mkdir()
        (work / "driver.py").write_text(DRIVER)
        with Hosts(work) as hosts:
            head, second = hosts.address(0), hosts.address(1)
            s3, port = a_port(), a_port()
            env = (
                f"AWS_ENDPOINT_URL=http://{head}:{s3} AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_REGION=us-east-1"
            )
            values = {"bin": Path(sys.executable).parent, "head": head, "second": second, "port": port, "s3": s3}
            values |= {"script": work / "driver.py", "out": out, "options": "--samples-per-shard 100 --stats off"}
            elsewhere = env if second_sees else env.replace(f":{s3}", f":{a_port()}")
            scripts = [HEAD.format(env=env, **values), SECOND.format(env=elsewhere, **values)]
            # With the first process of such a namespace, all others of it end.
            alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
            commands = [[*hosts.prefix(i), *alone, script] for i, script in enumerate(scripts)]
            with open(work / "log", "w+") as log:
                node = subprocess.Popen(commands[1], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    code = subprocess.run(commands[0], cwd=ROOT, stdout=log, stderr=log, timeout=180).returncode
                finally:
                    node.kill()
                    node.wait()
                log.seek(0)
                kept = shutil.copytree(out, tmp_path / "found")
                return code, log.read(), kept
    finally:
        shutil.rmtree(work)


def test_two_machines_shard_into_a_bucket(wanted, tmp_path):
    code, text, found = on_two_machines(tmp_path, second_sees=True)
    assert code == 0, text
    assert_same(found, wanted)


def test_a_machine_that_does_not_see_the_bucket_is_named(tmp_path):
    code, text, found = on_two_machines(tmp_path, second_sees=False)
    assert code == 74, text
    assert "error: node ie-b: s3://box/set/: cannot be listed, tried for " in text
    assert "; mount it there, or leave the node out" in text
    assert [path.name for path in found.iterdir()] == ["parts_plan.json"]
