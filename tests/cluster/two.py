"""Two hosts of one run: two launchers, on this machine's loopback or in network namespaces joined by a veth pair."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

from tests.conftest import ROOT
from tests.faults.job import SCRIPT, Job

CONFIG = ROOT / "docker" / "accelerate" / "2x8.yaml"


def a_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def machines(rank: int, *, address: str, port: int, per_host: int = 1) -> tuple[str, ...]:
    """`accelerate launch` as in docs/cluster.md: the same on each host except for its rank."""
    return (
        "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", str(2 * per_host),
        "--machine_rank", str(rank), "--main_process_ip", address, "--main_process_port", str(port),
        "--mixed_precision", "no", "--dynamo_backend", "no",
    )  # fmt: skip


class Hosts:
    """Namespaces a and b with 10.213.77.1 and .2, each with a hostname and an /etc/hosts of its own; needs root.

    Both hosts see the machine's files, which serve as shared storage.
    """

    names = ("ie-a", "ie-b")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spaces = [f"{name}-{os.getpid()}" for name in self.names]
        self.links = [f"ie{end}{os.getpid() % 100_000}" for end in "ab"]

    def __enter__(self) -> Hosts:
        # As Debian has it: a host's own name is that of its loopback.
        own = "".join(f"127.0.1.1 {name}\n" for name in self.names)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{own}")
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        try:
            for space in self.spaces:
                ip("netns", "add", space)
            first, second = self.links
            ip("link", "add", first, "netns", self.spaces[0], "type", "veth", "peer", "name", second, "netns",
               self.spaces[1])  # fmt: skip
            for i, (space, link) in enumerate(zip(self.spaces, self.links)):
                ip("-n", space, "address", "add", f"{self.address(i)}/30", "dev", link)
                ip("-n", space, "link", "set", "lo", "up")
                ip("-n", space, "link", "set", link, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", space)

    def address(self, host: int) -> str:
        return f"10.213.77.{host + 1}"

    def prefix(self, host: int) -> tuple[str, ...]:
        """The command prefix that runs a command on a host."""
        own = " && ".join(
            [
                f"hostname {self.names[host]}",
                f"mount --bind {self.folder}/hosts /etc/hosts",
                f"mount --bind {self.folder}/resolv.conf /etc/resolv.conf",
                'exec "$@"',
            ]
        )
        enter = ("nsenter", f"--net=/run/netns/{self.spaces[host]}")
        # One core for each host, as on two machines: sums are equal if each rank has as many threads as on one host.
        cores = sorted(os.sched_getaffinity(0))
        enter = (*enter, "taskset", "--cpu-list", str(cores[host % len(cores)]))
        return (*enter, "unshare", "--uts", "--mount", "sh", "-c", own, "sh")

    def link(self, state: str) -> None:
        """up, or down: packets are lost without an error."""
        ip("-n", self.spaces[1], "link", "set", self.links[1], state)

    def start(
        self,
        folder: Path,
        *args: object,
        port: int,
        others: dict[int, list] | None = None,
        scripts: dict[int, Path] | None = None,
        folders: dict[int, Path] | None = None,
    ) -> list[Job]:
        """A job on each host. others, scripts, folders: arguments, programs and run folders of one host alone."""
        both = []
        for host in range(2):
            more, script = (others or {}).get(host, []), (scripts or {}).get(host, SCRIPT)
            launcher = machines(host, address=self.address(0), port=port)
            own = (folders or {}).get(host, folder)
            both.append(Job(own, *args, *more, ranks=2, launcher=launcher, prefix=self.prefix(host), script=script))
        return both


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)
