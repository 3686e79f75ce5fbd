"""The sources of the image: the lock, the context, the Dockerfile, launch configurations, what a host lends."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from train import environment

tomllib = pytest.importorskip("tomllib", reason="the image and its lock are of Python 3.11")

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
LINUX = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "extra": "",
         "platform_system": "Linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython",
         "implementation_name": "cpython", "os_name": "posix"}  # fmt: skip
DALI = ("cu13", "cu12")

# The lock


def locked(*names: str) -> dict[str, str]:
    text = "".join((DOCKER / f"requirements{name}.txt").read_text() for name in names)
    return dict(re.findall(r"^(\S+)==(\S+)", text, flags=re.MULTILINE))


def pinned() -> dict[str, str]:
    """The lines of constraints.txt that apply on Python 3.11."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate(LINUX)]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in wanted}


PARTS = ["", "-torch", "-dali-cu13", "-dali-cu12", "-build"]


def test_the_lock_has_the_versions_of_the_constraints():
    constraints = pinned()
    both = locked(*PARTS).keys() & constraints.keys()
    assert len(both) > 50
    assert {name: locked(*PARTS)[name] for name in both} == {name: constraints[name] for name in both}


@pytest.mark.parametrize("dali", ["none", *DALI])
def test_the_lock_covers_the_project_s_dependencies_and_theirs(dali):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = [] if dali == "none" else project["optional-dependencies"][f"dali-{dali}"]
    have = locked("", "-torch", *([] if dali == "none" else [f"-dali-{dali}"]))
    for wanted in map(Requirement, project["dependencies"] + extra):
        assert have[canonicalize_name(wanted.name)] in wanted.specifier, wanted
    # Installed with --no-deps: the list must contain all dependencies.
    for name, version in have.items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # not the DALI that is installed here
        for wanted in map(Requirement, installed.requires or []) if installed.version == version else ():
            if wanted.marker is None or wanted.marker.evaluate(LINUX):
                assert have[canonicalize_name(wanted.name)] in wanted.specifier, f"{name} needs {wanted}"


def test_the_lock_is_by_hash_and_names_no_index():
    for file in DOCKER.glob("requirements*.txt"):
        header, *lines = file.read_text().splitlines()
        assert "docker/lock.py" in header
        names = [line for line in lines if not line.startswith("    --hash=sha256:")]
        assert names
        for line in names:
            assert re.fullmatch(r"[\w.-]+==[\w.]+ \\", line), line
        assert "://" not in file.read_text()


# The context


def in_context(path: str) -> bool:
    """As Docker reads .dockerignore: the last pattern that matches the path or a folder above it decides."""
    kept, parts = True, path.split("/")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            matches = any(fnmatch(part, pattern[3:]) for part in parts)
        else:
            depth = pattern.count("/") + 1
            matches = fnmatch("/".join(parts[:depth]), pattern) and len(parts) >= depth
        if matches:
            kept = line.startswith("!")
    return kept


def test_the_context_is_the_source_and_nothing_else():
    outside = (
        ".git/config", ".venv/bin/python", "runs/demo/config.json", "shards/digits/manifest.json", "tests/conftest.py",
        "build/image/root", "data/x.tar", ".env", "docs/docker.md", "docker/slurm/node.sh", "docker/lock.py",
        "train/__pycache__/run.cpython-311.pyc", "pipeline/read/__pycache__/jpeg.nbi",
    )  # fmt: skip
    assert [path for path in outside if in_context(path)] == []
    ours = [p for top in ("pipeline", "model", "train", "tools") for p in (ROOT / top).rglob("*.py")]
    ours += [*DOCKER.glob("accelerate/*.yaml"), *DOCKER.glob("requirements*.txt"), DOCKER / "entrypoint.sh"]
    ours += [DOCKER / "check_compiler.py", DOCKER / "healthcheck.py"]
    ours += [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]
    assert [p for p in ours if not in_context(str(p.relative_to(ROOT)))] == []
    size = sum(p.stat().st_size for top in ("pipeline", "model", "train", "tools") for p in (ROOT / top).rglob("*")
               if p.is_file() and in_context(str(p.relative_to(ROOT))))  # fmt: skip
    assert size < 4e6


# The Dockerfile


def test_the_image_runs_as_a_numbered_user_under_tini_with_a_health_check():
    last = DOCKERFILE.split("\nFROM ")[-1]
    assert re.findall(r"^USER (.*)$", last, flags=re.MULTILINE) == ["1000:1000"]
    assert re.search(
        r'^ENTRYPOINT \["/usr/bin/tini", "--", "/opt/imagenet-express/docker/entrypoint.sh"\]$', last, re.M
    )
    assert "HEALTHCHECK" in last
    for label in ("title", "description", "version", "revision", "source", "licenses"):
        assert f"org.opencontainers.image.{label}=" in last


def test_the_image_has_a_checked_compiler_that_the_argument_COMPILER_leaves_out():
    last = DOCKERFILE.split("\nFROM ")[-1]
    (step,) = re.findall(r"^ARG COMPILER=1\n(?:#.*\n)*(RUN (?:.*\\\n)*.*\n)", last, flags=re.MULTILINE)
    before, after = (re.sub(r"#.*", "", text) for text in last.split(step))
    assert "requirements-torch.txt" in before  # Triton and its headers are there when it is checked
    assert not re.search(r"\b(gcc|g\+\+|make|build-essential|\S+-dev)\b", before + after)
    condition, *commands = [line.strip().removesuffix("\\").strip() for line in step.splitlines()[3:]]
    assert condition == 'if [ "${COMPILER}" = 1 ]; then'
    assert "&& apt-get install -y --no-install-recommends gcc g++ libc6-dev" in commands
    assert '&& { [ -e "$headers" ] || apt-get install -y --no-install-recommends python3-dev; }' in commands
    assert commands[-2:] == ["&& /opt/venv/bin/python -B /build/check_compiler.py;", "fi"]


def check_compiler(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    bare = {"TRITON_HOME": str(folder), "TMPDIR": str(folder), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-B", str(DOCKER / "check_compiler.py")]
    return subprocess.run(command, env=bare | env, capture_output=True, text=True)


HAS_COMPILER = shutil.which("gcc") and shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(not HAS_COMPILER, reason="needs gcc, g++ and Python.h")
def test_the_compiler_check_passes_with_gcc_and_gxx_and_fails_without_gxx(tmp_path):
    assert "Triton compiles and loads a module in C and in C++" in check_compiler(tmp_path).stdout
    assert "FileNotFoundError" in check_compiler(tmp_path, CXX="/nowhere/g++").stderr
    assert list(tmp_path.iterdir()) == []


def test_the_compiler_check_fails_without_a_compiler(tmp_path):
    done = check_compiler(tmp_path, PATH="")
    assert done.returncode == 1
    assert "Failed to find C compiler" in done.stderr


def test_the_image_asks_for_the_hardware_decoder_and_any_user_can_write_triton_s_cache():
    env = dict(re.findall(r"\b([A-Z_]+)=(\S+)", DOCKERFILE.split("\nENV ")[-1]))
    assert env["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"
    assert env["TRITON_HOME"] == env["XDG_CACHE_HOME"] == "/tmp/cache"


def test_every_argument_is_explained_and_no_base_floats():
    header = DOCKERFILE.split("\nARG ")[0]
    for name in set(re.findall(r"^ARG (\w+)", DOCKERFILE, flags=re.MULTILINE)):
        assert re.search(rf"^# .*\b{name}\b", header, flags=re.MULTILINE), name
    assert ":latest" not in DOCKERFILE
    assert re.search(r"^ARG BASE=python:3\.11-slim-bookworm$", DOCKERFILE, flags=re.MULTILINE)


def test_an_image_s_records_name_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("IMAGENET_EXPRESS_COMMIT", "0123456789ab")
    assert environment.git_commit() == "0123456789ab"
    monkeypatch.setenv("IMAGENET_EXPRESS_COMMIT", "")
    assert environment.git_commit() is None


# Launch configurations


@pytest.mark.parametrize(
    ("name", "machines", "processes", "cpu", "precision"),
    [("cpu2", 1, 2, True, "no"), ("1gpu", 1, 1, False, "bf16"), ("8gpu", 1, 8, False, "bf16"),
     ("2x8", 2, 16, False, "bf16")],
)  # fmt: skip
def test_accelerate_reads_its_configurations(name, machines, processes, cpu, precision):
    config = load_config_from_file(str(DOCKER / "accelerate" / f"{name}.yaml"))
    got = (config.num_machines, config.num_processes, config.use_cpu, config.mixed_precision)
    assert got == (machines, processes, cpu, precision)
    assert config.distributed_type.value == ("NO" if processes == 1 else "MULTI_GPU")
    # c10d would find the first machine by comparing its host names with the address; static uses the rank.
    assert config.rdzv_backend == "static"


def test_there_is_a_test_of_each_configuration():
    assert {p.stem for p in (DOCKER / "accelerate").iterdir()} == {"cpu2", "1gpu", "8gpu", "2x8"}


# What a host lends


def lend(out: Path, **env: str) -> dict[str, str]:
    """The result of tests/docker/lend.py on a host that has only `env`."""
    out.mkdir()
    plain = {"PATH": str(Path(sys.executable).parent), "HOME": str(out), "XDG_CONFIG_DIRS": str(out)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docker" / "lend.py"), str(out)], env=plain | env, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return {file.name: file.read_text() for file in out.iterdir() if file.is_file()}


def test_a_host_lends_its_indexes_and_certificates_by_neutral_names(tmp_path):
    (tmp_path / "ca.pem").write_text("a certificate\n")
    conf = tmp_path / "pip.conf"
    conf.write_text(
        "[global]\nindex-url = https://user:secret@packages.example/simple\nfind-links = /srv/wheels\n"
        f"extra-index-url = file:///srv/index/simple\ncert = {tmp_path}/ca.pem\nno-color = true\n"
    )
    lent = lend(tmp_path / "out", PIP_CONFIG_FILE=str(conf))
    folders = lent["folders"].split()
    assert set(lent["pip_conf"].splitlines()) == {
        "[global]",
        "index-url = https://user:secret@packages.example/simple",
        f"find-links = /run/lent/{folders.index('/srv/wheels')}",
        f"extra-index-url = file:///run/lent/{folders.index('/srv/index')}/simple",
        "cert = /run/secrets/ca",
    }
    assert len(folders) == 2
    assert lent["words"].split() == ["/srv/index", "/srv/wheels", "packages.example"]
    assert lent["ca"] == "a certificate\n"


def test_a_host_without_configuration_lends_nothing(tmp_path):
    lent = lend(tmp_path / "out", PIP_CONFIG_FILE=os.devnull)
    assert set(lent) == {"pip_conf", "apt_conf", "apt_sources", "mirror", "folders", "words", "ca"}
    assert not any(lent.values())
