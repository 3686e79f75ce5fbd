"""Imports: their directions inside the repository, and from a wheel in a foreign directory."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.write.sources import Digits
from tests import limits
from tests.conftest import ROOT

PACKAGES = ("pipeline", "model", "train", "tools")
# Which packages of ours each package may import.
ALLOWED = {
    "pipeline": {"pipeline"},
    "model": {"model"},
    "train": {"train", "pipeline", "model"},
    "tools": set(PACKAGES),
}


def imports(path: Path) -> set[str]:
    """The absolute names of all imports of a file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction(package):
    for path in sources(package):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in PACKAGES or top in ALLOWED[package], f"{path} imports {name}"


def test_the_model_knows_torch_alone():
    for path in sources("model"):
        third_party = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        assert third_party <= {"torch", "model", "__future__"}, path


def test_torch_and_dali_stay_in_their_rooms():
    rooms = {
        "backend.py", "buffers.py", "config.py", "dali.py", "dali_decoder.py", "loader.py", "make_backend.py",
        "pixel_check.py", "portable.py", "resident.py", "resident_gpu.py", "synthetic.py", "torch_dataset.py",
    }  # fmt: skip
    for path in sources("pipeline"):
        tops = {n.split(".")[0] for n in imports(path)}
        assert path.name in rooms or not tops & {"torch", "nvidia"}, path


def test_reading_and_writing_know_the_format_and_not_each_other():
    for ours, other in (("read", "write"), ("write", "read")):
        for path in (ROOT / "pipeline" / ours).rglob("*.py"):
            assert not any(name.startswith(f"pipeline.{other}") for name in imports(path)), path


def test_nothing_imports_the_entry_points():
    for package in PACKAGES:
        for path in sources(package):
            entry = {n for n in imports(path) if n == "train.run" or n.startswith("train.run.")}
            assert not entry, path
            if package != "tools":
                assert not any(n.split(".")[0] == "tools" for n in imports(path)), path


def test_no_file_hides_a_module_of_the_standard_library():
    """Python puts a script's folder first on sys.path."""
    for folder in ("train", "tools", "tools/bench"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem not in sys.stdlib_module_names or path.stem.startswith("__"), path


SMALL = {
    "model/a.py": '"""A docstring."""\n\nfrom .b import f  # a comment\n\nclass A:\n    """Another."""\n    x = 1\n',
    "model/b.py": "import os\n\n\ndef f():\n    from .c import g\n\n    return g\n",
    "model/c.py": "from model import a\n",
}


def test_limits_count_code_and_name_what_exceeds_them():
    report, exceeded = limits.check(SMALL)
    assert exceeded == []
    assert limits.count_tokens(SMALL["model/a.py"]) == 11  # from . b import f, class A :, x = 1
    assert f"product           29 tokens, of {limits.PRODUCT_TOKENS:,} at most" in report
    methods = "".join(f"    def m{i}(self): ...\n" for i in range(16))
    large = {
        "train/large.py": f"class Large:\n{methods}" + "\n" * 300,
        "tools/bench/x.py": "x = [" + "1," * 12_000 + "]",
    }
    _, exceeded = limits.check(SMALL | large)
    assert exceeded == [
        "train/large.py: 317 lines, more than 300",
        "train/large.py: Large: 16 methods, more than 15",
        f"tools/bench: 24,004 tokens, more than {limits.BENCHMARK_TOKENS:,}",
    ]


def test_an_import_circle_is_found_unless_a_function_breaks_it():
    assert "import circles: none" in limits.check(SMALL)[0]
    direct = SMALL | {"model/b.py": "if 1:\n    from . import c\n\n\ndef f(): ...\n"}
    _, exceeded = limits.check(direct)
    (error,) = exceeded
    circle = error.removeprefix("import circle: ").split(" → ")
    assert "".join(name[-1] for name in circle) in ("abca", "bcab", "cabc")


USE = """
import imagenet_express.pipeline, sys
from imagenet_express.pipeline import Loader, AugmentConfig
from imagenet_express.model import AlexNet, ModelConfig
assert imagenet_express.pipeline.__file__.startswith(sys.argv[-1]), imagenet_express.pipeline.__file__
loader = Loader(sys.argv[1], batch=64, augment=AugmentConfig(resize=36, crop=32))
net = AlexNet(ModelConfig("small", width=0.1), classes=len(loader.dataset.classes), crop=32)
images, labels, ids = next(iter(loader))
print(tuple(net(images).shape), len(set(ids.tolist())))
loader.close()
from imagenet_express.pipeline.write.sources import Digits
assert len(Digits().splits["val"]) == 359
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Runs Python in a foreign directory with our wheel installed, without the repository on its path."""
    tmp_path = tmp_path_factory.mktemp("wheel")
    tree = tmp_path / "tree"
    for name in ("pipeline", "model"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(wheel, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    site, foreign = tmp_path / "site", tmp_path / "elsewhere"
    foreign.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(built)], check=True, capture_output=True)

    def run(code: str, *args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *args, str(site)],
            capture_output=True,
            text=True,
            cwd=foreign,
            # NUMBA_OPT: the inner loops are compiled for this process alone, in two thirds of the time
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "NUMBA_OPT": "0"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def scripts(shards: Path) -> list[str]:
    """Those of docs/own-script.md, for these shards."""
    text = (ROOT / "docs" / "own-script.md").read_text().replace("SHARDS", str(shards))
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


def test_a_wheel_and_the_script_of_the_readme_work_in_a_foreign_directory(elsewhere, few_digits):
    """One process runs both, each with names of its own: loading torch and compiling takes longer than they do."""
    readme = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    changed = {"/data/shards": str(few_digits), "256, device": "16, device", "cuda": "cpu", "range(90)": "range(1)"}
    for old, new in {**changed, "...": "break"}.items():
        assert old in readme
        readme = readme.replace(old, new)
    code = f"for script in {[USE, readme]!r}: exec(script, {{'__name__': '__main__'}})"
    assert elsewhere(code, str(few_digits)).splitlines()[0] == "(64, 10) 64"


@pytest.mark.slow
def test_the_scripts_of_the_documentation_work_in_a_foreign_directory(elsewhere, digits):
    plain, transforms, _, adapter, _ = scripts(digits)
    code = f"for script in {[plain, transforms, adapter]!r}: exec(script, {{'__name__': '__main__'}})"
    *_, last, shown, adapted = elsewhere(code, str(digits)).splitlines()
    assert last.startswith("epoch 1: loss ")
    assert "next {'epoch': 2, 'step': 0, " in last
    assert float(last.split("top-1 ")[1].split(",")[0]) > 0.15  # of ten classes; nan if it diverges
    assert len(plain.strip().splitlines()) <= 24
    found = re.fullmatch(r"sample digit(\d+) is a (\d), mixed targets 1\.0", shown)
    assert found is not None, shown
    everyone = {key: label for items in Digits().splits.values() for key, label, *_ in items}
    assert everyone[f"digit{found[1]}"] == int(found[2])
    assert adapted.startswith("22 batches, next {'epoch': 1, 'step': 0, ")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed; pip install lightning")
def test_the_script_for_lightning_runs_as_it_stands(elsewhere, digits):
    last = elsewhere(scripts(digits)[4], str(digits)).splitlines()[-1]
    assert float(last.removeprefix("top-1 ")) > 0.3


@pytest.mark.slow
def test_the_script_of_two_ranks_runs_as_it_stands(elsewhere, digits):
    launched = f"""
import pathlib
from torch.distributed.run import main
pathlib.Path("script.py").write_text({scripts(digits)[2]!r})
main(["--standalone", "--nproc_per_node", "2", "script.py"])
"""
    assert re.fullmatch(r"top-1 0\.\d+ of 359 images", elsewhere(launched).splitlines()[-1])
