"""A real Slurm of two nodes on this machine, in a temporary folder; nothing in /etc changes."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.conftest import ROOT

PACKAGES = ("slurmctld", "slurmd", "munge", "slurm-client")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "taskset")
NODES = ("n1", "n2")
SLURMD_TIMEOUT = 10  # seconds until a silent node counts as lost

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits as long as a credential is good, two minutes by default; less than six seconds does not count.
AuthInfo=socket={root}/munge/socket,cred_expire=6
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={timeout}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MpiDefault=none
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that a cluster lacks; empty if it can start."""
    found = [] if os.geteuid() == 0 else ["root"]
    return found + [name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]


class Cluster:
    """Two nodes, each on its own core if there are two; `folder` holds all files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours = {"EXPRESS_ROOT": str(ROOT), "EXPRESS_PYTHON": sys.executable}
        path = os.environ["PATH"] + ":/usr/sbin"
        self.env = os.environ | ours | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        self._daemons: dict[str, subprocess.Popen] = {}

    # From start to end

    def start(self) -> None:
        for name in ("munge", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        config = CONFIG.format(host=socket.gethostname(), ports=free_ports(3), root=self.folder, timeout=SLURMD_TIMEOUT)
        (self.folder / "slurm.conf").write_text(config)
        self._start_munge()
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.states() == ["idle", "idle"], seconds=60, what=self.tell)

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{name}={munge / name}" for name in ("socket", "log-file", "pid-file", "seed-file")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *files)
        wait_until(lambda: (munge / "socket").exists(), seconds=20, what=self.tell)

    def start_node(self, node: str) -> None:
        """Starts a node; its daemon and all processes that it starts share one core."""
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[NODES.index(node) % len(cores)]
        self._daemon(node, "-D", "-N", node, program="slurmd", core=str(mine))

    def _daemon(self, name: str, *args: str, program: str = "", core: str = "") -> None:
        path = shutil.which(program or name, path=self.env["PATH"])
        assert path
        # Before the daemon starts: it keeps threads, and setting a running process's cores sets its first thread's.
        pinned = ["taskset", "--cpu-list", core] if core else []
        with open(self.folder / f"{name}.out", "a") as out:
            self._daemons[name] = subprocess.Popen(
                [*pinned, path, *args], stdout=out, stderr=out, env=self.env, cwd="/"
            )

    def end(self) -> None:
        """Kills every process by its pid, jobs first."""
        family = self._steps()
        for process in [*family, *(psutil.Process(d.pid) for d in self._daemons.values() if d.poll() is None)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for daemon in self._daemons.values():
            daemon.wait()

    def _steps(self, node: str = "") -> list[psutil.Process]:
        """slurmstepd and its descendants, of one node or all: the processes that have our configuration."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") != self.env["SLURM_CONF"] or process.pid == os.getpid():
                    continue
                if process.pid in {d.pid for d in self._daemons.values()}:
                    continue
                if not node or process.environ().get("SLURMD_NODENAME") == node:
                    found.append(process)
        return found

    def lose(self, node: str) -> None:
        """Kills the daemon and all that it started before they can report it, as a power cut would."""
        daemon = psutil.Process(self._daemons.pop(node).pid)
        family = [daemon, *self._stepds(node), *daemon.children(recursive=True), *self._steps(node)]
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    act(process)
        daemon.wait()

    def _stepds(self, node: str) -> list[psutil.Process]:
        """The parents of the node's tasks."""
        parents = set()
        for process in self._steps(node):
            with contextlib.suppress(psutil.Error):
                parents |= {p for p in process.parents() if p.name() == "slurmstepd"}
        return list(parents)

    # Commands

    def call(self, *args: object) -> str:
        done = subprocess.run(list(map(str, args)), capture_output=True, text=True, env=self.env, cwd=self.folder)
        assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self) -> list[str]:
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], capture_output=True, text=True, env=self.env)
        return done.stdout.split()

    def tell(self) -> str:
        """The last lines of the daemons' logs."""
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in logs)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[[], bool], *, seconds: float, what: Callable[[], str], each: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds\n{what()}"
        time.sleep(each)


class BatchJob:
    """A training job of docker/slurm/train.sbatch on both nodes."""

    def __init__(
        self, cluster: Cluster, run: Path, *args: object, env: dict[str, str] | None = None, **options
    ) -> None:
        self.cluster, self.run, self.log = cluster, run, run.with_name(f"{run.name}.log")
        chosen = {"nodes": 2, "output": self.log, **options}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
        env = cluster.env | (env or {})
        argv = ["sbatch", "--parsable", *flags, ROOT / "docker/slurm/train.sbatch", *args, "--run.dir", run]
        done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, env=env, cwd=cluster.folder)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    @property
    def facts(self) -> dict[str, str]:
        return facts(self.cluster, self.id)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], bool], *, seconds: float = 120, each: float = 0.02) -> None:
        wait_until(condition, seconds=seconds, what=lambda: f"{self.facts}\n{self.said}", each=each)

    def wait(self, *, seconds: float = 180) -> int:
        """Waits for the job's final state and returns its exit code."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.facts["JobState"] in over, seconds=seconds, each=0.5)
        return int(self.facts["ExitCode"].split(":")[0])

    @property
    def restarts(self) -> int:
        return int(self.facts["Restarts"])

    def ranks(self) -> list[psutil.Process]:
        """The processes that a launcher has started, and so given a rank."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                if env.get("SLURM_JOB_ID") == self.id and "LOCAL_RANK" in env:
                    found.append(process)
        return found


def facts(cluster: Cluster, job: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", cluster.call("scontrol", "show", "job", "-o", job)))


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster that ends with the block, even if a signal ends the process."""
    cluster = Cluster(folder)
    before = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()
        signal.signal(signal.SIGTERM, before)
