"""The documentation names files, links, flags and targets that exist, and its examples work."""

from __future__ import annotations

import io
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from pipeline import AugmentConfig, Loader, LoaderConfig, open_dataset
from pipeline.read import make_backend
from pipeline.settings import declared
from pipeline.write import sources
from tests.conftest import ROOT
from tools import make_shards
from train import cli, presets
from train.config import Config

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
REMOVED = {"regularize.mixup"}  # of an earlier commit's command


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes from headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_a_docstring_begins_with_a_verb_or_a_noun():
    for path in (ROOT / top for top in ("docker", "model", "pipeline", "tests", "tools", "train")):
        for file in path.rglob("*.py"):
            openings = re.findall(r'^ *"""((?:What|Of|Where) .*)', file.read_text(encoding="utf-8"), re.MULTILINE)
            assert not openings, file


@pytest.mark.parametrize("page", PAGES)
def test_files_flags_and_targets_exist(page):
    text = PAGES[page]
    for path in re.findall(r"(?<![\w./-])((?:pipeline|model|train|tools|docker|tests|docs)/[\w./*-]*\w)", text):
        assert list(ROOT.glob(path)) or (ROOT / f"{path}.py").is_file(), path
    fields = {name.replace("_", "-") for name in declared(Config)} | {"data.split"}  # tools/evaluate.py's
    for flag in re.findall(r"--([a-z]+\.[a-z0-9-]*[a-z0-9])", text):
        group, _, field = flag.partition(".")
        assert f"{group}.{field.removeprefix('no-')}" in fields or flag in REMOVED, flag
    assert not re.search(r"--no-[a-z]+\.|--[a-z]+\.[a-z-]+ (yes|no)(?![\w-])", text)  # the form is --loader.no-verify
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= targets


def test_the_architecture_names_functions_of_the_files_beside_them():
    rows = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, | and )?)+)", PAGES["docs/architecture.md"])
    assert len(rows) > 5
    for file, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.MULTILINE), (
                file,
                name,
            )


def test_the_recipe_for_each_kind_of_images_is_one_that_the_command_line_takes():
    recipes = re.findall(r"^\|[^|]+\| `([a-z]+ ?[^`]*)`", PAGES["docs/own-images.md"], re.MULTILINE)
    assert [recipe.split()[0] for recipe in recipes] == ["finetune", "demo", "modern", "modern"]
    for recipe in recipes:
        cli.parse([*recipe.split(), "--data.shards", "x"])


def test_the_script_that_reads_an_image_by_the_index_works(digits, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    names: dict[str, bytes] = {}
    exec(PAGES["docs/shards.md"].split("```python\n")[1].split("```")[0], names)
    with Image.open(io.BytesIO(names["jpeg"])) as image:
        assert image.size == (36, 36)


# The examples of CONTRIBUTING.md


@pytest.fixture
def examples() -> list[str]:
    return [block.split("```")[0] for block in PAGES["CONTRIBUTING.md"].split("```python\n")[1:]]


def module(code: str, package: str) -> types.ModuleType:
    made = types.ModuleType(f"{package}.example")
    made.__package__ = package
    sys.modules[made.__name__] = made  # dataclass looks modules up there
    exec(code, vars(made))
    return made


def test_the_source_of_the_example_is_sharded(examples, image_folder, tmp_path, monkeypatch):
    listed = module(examples[0], "pipeline.write.sources").Listed
    monkeypatch.setitem(sources.SOURCES, "listed", listed)
    images = sorted(image_folder.glob("train/*/*.jpg"))
    (tmp_path / "images.txt").write_text("".join(f"{image},{image.parent.name}\n" for image in images))
    out = tmp_path / "out"
    argv = ["make_shards.py", "listed", "--file", str(tmp_path / "images.txt"), "--out", str(out), "--encode", "jpeg"]
    monkeypatch.setattr(sys, "argv", argv)
    make_shards.main()
    dataset = open_dataset(out)
    assert dataset.classes == ["cat", "dog"]
    assert np.bincount(dataset.split("train").index["label"]).tolist() == [6, 6]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("options", [{"dtype": "uint8"}, {"dtype": "float32"}, {"train": False, "split": "val"}])
def test_the_backend_of_the_example_gives_the_portable_pixels(examples, shards, options, channels_last, monkeypatch):
    view = AugmentConfig(resize=64, crop=56, views=1 if options.get("train", True) else 10)

    def crops() -> dict[int, np.ndarray]:
        with Loader(
            shards["jpeg"],
            batch=4,
            augment=view,
            channels_last=channels_last,
            config=LoaderConfig("portable"),
            **options,
        ) as loader:
            return {
                i: image.numpy().astype(float) for batch in loader for i, image in zip(batch.ids.tolist(), batch.images)
            }

    wanted = crops()
    backend = module(examples[1], "pipeline.read").Pillow
    monkeypatch.setattr(make_backend, "make", lambda name, setup: backend(setup))
    got = crops()
    assert got.keys() == wanted.keys()
    assert max(np.abs(got[i] - wanted[i]).max() for i in wanted) <= 1.01


def test_the_preset_of_the_example_is_listed(examples, monkeypatch):
    made = dict(vars(presets))
    exec(examples[2], made)
    assert made["paper_cosine"]().optim.schedule == "cosine"
    what, expected, hours = cli.summary(made["paper_cosine"].__doc__)
    assert (what, expected[:8], hours) == (
        "The paper's net with a cosine schedule.",
        "Expected",
        "Hours: not measured.",
    )
