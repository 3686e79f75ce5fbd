#!/usr/bin/env python3
"""This host's package sources, for a build of the image: indexes, mirrors, proxies and certificates.

    python3 tests/docker/lend.py FOLDER

Writes pip_conf, apt_conf, apt_sources and ca, which build_image.sh hands to the build as secrets; folders, which it
mounts as /run/lent/0, 1 and so on; mirror, of debootstrap; and words, which must not be found in the image. A host
without configuration of its own leaves all of them empty.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

PIP = {"index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "timeout", "default-timeout"}
APT = re.compile(r'^Acquire::(https?::\S*(Proxy|CaInfo)\S*|Check-Valid-Until|Check-Date) "[^"]+";$', re.IGNORECASE)
SUITE = "bookworm"  # the base image's release; sources of another release do not fit it
CA = "/run/secrets/ca"
OFFICIAL = ".debian.org"


class Lent:
    def __init__(self) -> None:
        self.folders: list[str] = []
        self.words: set[str] = set()
        self.ca = ""

    def place(self, value: str) -> str:
        """A pip option's value for the build, which sees local folders under other paths."""
        return " ".join(self._place(word) for word in value.split())

    def _place(self, word: str) -> str:
        scheme, path = ("file://", word[7:]) if word.startswith("file://") else ("", word)
        if not path.startswith("/"):
            self.note(word)
            return word
        # The pages of an index link to files beside it: ../../files/...
        folder = str(Path(path).parent) if Path(path).name == "simple" else path.rstrip("/")
        if folder not in self.folders:
            self.folders.append(folder)
        self.words.add(folder)
        return f"{scheme}/run/lent/{self.folders.index(folder)}{path.rstrip('/')[len(folder) :]}"

    def note(self, url: str) -> None:
        host = urlsplit(url).hostname
        if host and not host.endswith(OFFICIAL):
            self.words.add(host)


def main() -> None:
    out, lent = Path(sys.argv[1]), Lent()
    pip, (apt_conf, apt_sources) = pip_conf(lent), (apt(lent), sources(lent))
    mirrors = [line.split()[1] for line in apt_sources if line.split()[2] == SUITE]
    if apt_sources:
        apt_conf += ['Dir::Etc::SourceList "/run/secrets/apt_sources";', 'Dir::Etc::SourceParts "/dev/null";']
    lines = {
        "pip_conf": ["[global]", *pip] if pip else [],
        "apt_conf": apt_conf,
        "apt_sources": apt_sources,
        "mirror": mirrors[:1],
        "folders": lent.folders,
        "words": sorted(lent.words),
    }
    for name, content in lines.items():
        (out / name).write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    (out / "ca").write_bytes(Path(lent.ca).read_bytes() if lent.ca else b"")


def pip_conf(lent: Lent) -> list[str]:
    options: dict[str, str] = {}
    for line in lines_of("python3", "-m", "pip", "config", "list"):
        section, _, value = line.partition("=")
        options.setdefault(
            section.rpartition(".")[2], ast.literal_eval(value)
        )  # ":env:" sorts first: it has the highest priority
    for host in options.get("trusted-host", "").split():
        lent.note(f"//{host}")
    lent.ca = options.get("cert") or os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE") or ""
    lines = [f"{name} = {lent.place(value)}" for name, value in options.items() if name in PIP and value]
    return [*lines, f"cert = {CA}"] if lent.ca else lines


def apt(lent: Lent) -> list[str]:
    lines = [line for line in lines_of("apt-config", "dump", "Acquire") if APT.match(line)]
    for line in lines:
        lent.note(line.split('"')[1])
    return [re.sub(r'CaInfo "[^"]+"', f'CaInfo "{CA}"', line) for line in lines]


def sources(lent: Lent) -> list[str]:
    """This host's own mirrors; none if it uses Debian's, as the base does."""
    wanted = ("--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages")
    lines = sorted({line for line in lines_of("apt-get", "indextargets", *wanted) if f" {SUITE}" in line})
    if all((urlsplit(line.split()[0]).hostname or "").endswith(OFFICIAL) for line in lines):
        return []
    for line in lines:
        lent.note(line.split()[0])
    return [f"deb {line}" for line in lines]


def lines_of(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []  # not installed on this host
    return done.stdout.splitlines()


if __name__ == "__main__":
    main()
