"""The command line: which settings it makes, and which errors it reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError, ExpressError
from pipeline.settings import IN_HELP, MAY_CHANGE, PER_HOST, flatten, marked, updated
from tests.conftest import ROOT
from train.cli import _first_sentence, parse, summary
from train.config import RESUME_NEWEST, Config
from train.presets import DESCRIPTIONS, PRESETS, advice
from train.resume import check_same_run, invariants


def parsed(*argv: str):
    return parse(list(argv))


def test_flags_override_the_preset_and_nothing_else():
    before = flatten(PRESETS["demo"])
    config = parsed("demo", "--data.shards", "x", "--train.batch=32", "--augment.flip", "--optim.lr", "0.5")
    after = flatten(config)
    assert {k: v for k, v in after.items() if before[k] != v} == {
        "data.shards": "x",
        "train.batch": 32,
        "augment.flip": True,
        "optim.lr": 0.5,
        "run.dir": "runs/demo",
    }


def test_a_bare_resume_means_the_newest():
    assert parsed("demo", "--data.shards", "x", "--resume").resume == RESUME_NEWEST
    assert parsed("demo", "--resume", "--data.shards", "x").resume == RESUME_NEWEST
    assert parsed("demo", "--resume", "runs/a/checkpoints/step-00000003", "--data.shards", "x").resume.endswith("3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dmeo"], r"unknown preset 'dmeo' \(did you mean demo\?\); presets: demo, seed, paper"),
        (["demo", "--train.bach", "3"], r"unknown field --train.bach \(did you mean train.batch\?\)"),
        (["demo", "--train.batch", "many"], r"--train.batch: invalid literal for int\(\) with base 10: 'many'"),
        (["demo", "--data.shards", "x", "stray"], "stray"),
        (["demo"], "data.shards is not set"),
        (["demo", "--data.shards", "https://me:secret@h/x"], "^https://h/x: leave user, password"),
        (["demo", "--data.shards", "x", "--data.stage", "s3://x"], "^data.cache and data.stage are folders"),
        (["demo", "--data.shards", "https://h/x?sig=secret"], "^https://h/x: leave user, password"),
        (["demo", "--data.shards", "x", "--run.dir", ""], "run.dir is empty"),
        (["demo", "--data.shards", "x", "--run.dir="], "run.dir is empty"),
        (["demo", "--data.shards", "x", "--train.batch", "0"], "train.batch=0: must be a number of at least 1"),
        (["demo", "--data.shards", "x", "--train.epochs", "-1"], "train.epochs=-1"),
        (["demo", "--data.shards", "x", "--optim.lr", "nan"], "optim.lr=nan"),
        (["demo", "--data.shards", "x", "--optim.lr", "inf"], "optim.lr=inf"),
        (
            ["demo", "--data.shards", "x", "--loader.threads", "100000"],
            "loader.threads=100000: must be .* at most 1024",
        ),
        (["demo", "--data.shards", "x", "--optim.momentum", "1"], "optim.momentum=1.0: must be .* below 1"),
        (["demo", "--data.shards", "x", "--model.width", "0"], "model.width=0"),
        (["demo", "--data.shards", "x", "--augment.crop", "64"], "augment.crop=64 is larger than augment.resize=36"),
        (["demo", "--data.shards", "x", "--loader.backend", "magic"], "loader.backend"),
        (["demo", "--data.shards", "x", "--run.log-every", "0"], "run.log_every=0"),
        (["demo", "--data.shards", "x", "--train.accumulate", "0"], "train.accumulate=0"),
        (["demo", "--data.shards", "x", "--train.eval-every", "0"], "train.eval_every=0"),
        (["demo", "--data.shards", "x", "--train.stop-at", "75"], "train.stop_at=75.0: must be .* at most 1"),
        (["demo", "--data.shards", "x", "--train.precision", "fp8"], "train.precision"),
        (["demo", "--data.shards", "x", "--train.compress", "int8"], "train.compress"),
        (["demo", "--data.shards", "x", "--train.colour-epochs", "-1"], "train.colour_epochs=-1"),
        (["demo", "--data.shards", "x", "--train.conv1-epochs", "-1"], "train.conv1_epochs=-1"),
        (["demo", "--data.shards", "x", "--train.crop-sizes", "16"], "train.crop_until=none: give one epoch for each"),
        (
            ["modern", "--data.shards", "x", "--train.crop-sizes", "64", "32", "--train.crop-until", "1", "2"],
            "train.crop_sizes=64 32: must be sizes that rise, all below augment.crop=224",
        ),
        (
            ["modern", "--data.shards", "x", "--augment.crop", "64"],
            "all below augment.crop=64; or add --augment.resize 72 --train.crop-sizes --train.crop-until$",
        ),
        (["finetune", "--data.shards", "x"], "finetune: name trained weights by --model.init"),
        (
            ["modern", "--data.shards", "x", "--train.crop-until", "5", "5", "6"],
            "crop_until=5 5 6: must be epochs that",
        ),
        (["modern", "--data.shards", "x", "--model.name", "seed", "--model.norm", "lrn"], "model.name=seed takes one"),
        (["modern", "--data.shards", "x", "--augment.normalize", "mean-image"], "mean-image is of one size"),
        (["demo", "--data.shards", "x", "--regularize.ema", "-1"], "regularize.ema=-1"),
        (["demo", "--data.shards", "x", "--regularize.ema", "1"], "regularize.ema=1.0: must be .* below 1"),
        (["demo", "--data.shards", "x", "--regularize.label-smoothing", "1"], "regularize.label_smoothing=1.0"),
        (["demo", "--data.shards", "x", "--run.trackers", "tensorbord"], r"unknown \(did you mean tensorboard\?\)"),
        (["demo", "--data.shards", "x", "--run.trackers", "aim"], "run.trackers=aim: is not installed"),
        (["demo", "--data.shards", "x", "--limit-steps", "-1"], "limit_steps=-1"),
        (
            ["demo", "--data.shards", "x", "--run.dir", "caf\udce9"],
            "run.dir=caf.: the name is not UTF-8; choose another",
        ),
        (["demo", "--data.shards", "x", "--profile", "5000"], "profile=5000: .*at most 1000; choose steps"),
    ],
)
def test_what_cannot_be_is_rejected_in_one_line(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


def test_long_help_lists_every_field_and_short_help_the_usual_ones(capsys):
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            parsed("demo", flag)
        assert not caught.value.code
        texts[flag] = capsys.readouterr().out
    for name in flatten(PRESETS["demo"]):
        assert "--" + name.replace("_", "-") in texts["--help-all"]
    assert len(texts["--help"].splitlines()) < 40  # a screen
    for name in marked(Config, IN_HELP):
        assert f"--{name.replace('_', '-')} " in texts["--help"]
    assert DESCRIPTIONS["demo"].splitlines()[0] in texts["--help"]
    assert re.search(r"--run.dir +runs/demo$", texts["--help"], re.MULTILINE)


def test_crops_of_one_size_are_what_the_message_says():
    extra = ["--augment.crop", "64", "--augment.resize", "72", "--train.crop-sizes", "--train.crop-until"]
    config = parsed("modern", "--data.shards", "x", *extra)
    assert (config.augment.crop, config.augment.resize, config.train.crop_sizes) == (64, 72, ())


def few_photos(*flags: str, images: int = 400, short_side: int = 32, weights: int = 1000) -> list[str]:
    config = parsed(*flags, "--data.shards", "x")
    return advice(config, images=images, short_side=short_side, weights=weights)


def test_enlarged_images_and_few_of_them_are_warned_of_with_flags_that_help():
    (enlarged,) = few_photos("seed")
    assert (
        "enlarged 8.0 times; at their own size: --model.name small --augment.resize 36 --augment.crop 32 (" in enlarged
    )
    flags = enlarged.partition("size: ")[2].partition(" (")[0].split()
    assert few_photos("seed", *flags) == []
    (enlarged,) = few_photos("modern", short_side=64)
    flags = enlarged.partition("size: ")[2].partition(" (")[0].split()
    assert flags[:2] == ["--model.name", "modern"]
    assert few_photos("modern", *flags, short_side=64) == []
    (enlarged,) = few_photos("seed", "--model.name", "torchvision:resnet18")
    assert "size: --augment.resize 36 " in enlarged
    (few,) = few_photos("demo", weights=1_900_000)
    assert "400 images are few for 1,900,000 weights; start from trained ones: finetune --model.init" in few
    assert few_photos("demo", weights=1_900_000, images=1438) == []  # make demo
    assert few_photos("finetune", "--model.init", "x", weights=1_900_000) == []


def test_the_list_tells_of_every_preset_what_to_expect_and_what_was_not_measured(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--list")
    assert not caught.value.code
    text = capsys.readouterr().out
    for name, description in DESCRIPTIONS.items():
        what, expected, hours = summary(description)
        assert f"{name} " in text
        assert f" {what}\n" in text
        assert f" {expected}\n" in text
        assert hours in text.splitlines()[-1] or f" {hours}\n" in text
        assert (expected[:8], hours[:6]) == ("Expected", "Hours:"), name
        assert "train/run.py " + name in description or name == "demo"
    assert "6 of tanh at 0.01 (docs/results.md).\n" in text  # the second line of an expectation


def test_settings_that_change_nothing_of_what_is_trained_may_change_and_places_and_threads_are_a_hosts_own():
    fixed = set(flatten(Config())) - set(marked(Config, MAY_CHANGE))
    assert {name.split(".")[0] for name in fixed} == {
        *("data", "train", "optim", "regularize", "model", "augment", "run", "overfit")
    }
    assert {name for name in fixed if name.startswith(("data.", "run."))} == {
        *("data.train_split", "data.val_split", "data.partitions", "data.window", "run.seed", "run.deterministic")
    }
    changing = {"train.accumulate", "train.epochs", "train.eval_batch", "train.stop_at"}
    assert {name for name in marked(Config, MAY_CHANGE) if name.startswith("train.")} == changing
    assert set(marked(Config, PER_HOST)) == {
        *("data.shards", "data.allow_http", "data.fetch_memory", "data.cache", "data.cache_size", "data.stage"),
        *("run.dir", "resume"),
        *(f"loader.{name}" for name in ("threads", "read_threads", "prefetch_batches", "verify", "resident_memory")),
    }


@pytest.mark.parametrize(
    "preset", [name if name in ("demo", "modern") else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_what_print_writes_config_takes_back(preset, capsys, tmp_path):
    file = tmp_path / "settings.json"
    flags = ["--data.shards", "x", "--optim.lr", "0.123", "--augment.flip", "--run.dir", "runs/x", "--model.init", "x"]
    with pytest.raises(SystemExit):
        parsed(preset, *flags, "--print")
    file.write_text(capsys.readouterr().out)
    wanted = parsed(preset, *flags)
    assert parsed(preset, "--config", str(file)) == wanted
    assert parsed("--config", str(file)) == wanted
    assert parsed("demo", f"--config={file}") == wanted  # a file with all fields replaces the whole preset
    assert parsed(preset, "--config", str(file), "--optim.lr", "0.5").optim.lr == 0.5  # flags override files
    file.write_text(json.dumps({"config": {"optim": {"lr": 0.7}}, "ranks": 2}))  # as in a run folder
    assert parsed(preset, *flags[:2], *flags[-2:], "--config", str(file)).optim.lr == 0.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"cannot be read \(Expecting property name.*\); name a JSON file"),
        ("[1]", "holds no object of fields"),
        ('{"optim": {"lrr": 1}}', r"unknown field optim.lrr \(did you mean optim.lr\?\)"),
        ('{"optim": {"lr": "much"}}', "could not convert string to float: 'much'"),
        ('{"optim": {"lr": -1}}', "optim.lr=-1"),
        ('{"train": {"batch": 1.5}}', "invalid literal for int"),
        ('{"augment": {"flip": "maybe"}}', "maybe"),
        ('{"optim": 3}', "optim is a group of fields, such as optim.name"),
        ('{"optim": {"lr": true}}', "optim.lr=true: give a value"),
        ('{"optim": {"lr": null}}', "optim.lr=null: give a value"),
        ('{"augment": {"flip": 1}}', "augment.flip=1: give true or false"),
        ("[" * 100_000, "cannot be read"),
        ('{"optim": {"lr": 1, "name": "sgd", "lr": 2}}', r"cannot be read \('lr' is given twice\)"),
    ],
)
def test_a_bad_file_is_rejected_in_one_line(text, message, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(ExpressError, match=message) as caught:
        parsed("demo", "--data.shards", "x", "--config", str(file))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_may_say_what_flags_may(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(
        '{"model": {"name": "torchvision:resnet18"}, "run": {"dir": "-x"}, "augment": {"scale_jitter": null}}'
    )
    config = parsed("demo", "--data.shards", "x", "--config", str(file))
    assert (config.model.name, config.model.width, config.run.dir) == ("torchvision:resnet18", 1.0, "-x")
    file.write_text('{"augment": {"flip": true, "square": false}, "profile": 3, "train": {"crop_sizes": []}}')
    config = parsed("demo", "--data.shards", "x", "--config", str(file))
    assert (config.augment.flip, config.augment.square, config.profile) == (True, False, 3)


def test_epochs_that_a_run_does_not_reach_are_reported_or_rejected():
    with pytest.raises(ConfigError, match=r"train.crop_until=25 45 65, train.epochs=30: augment.crop=224 would never"):
        parsed("modern", "--data.shards", "x", "--train.epochs", "30")
    assert not PRESETS["original"].behind_the_end()
    config = parsed("original", "--data.shards", "x", "--train.epochs", "60")
    assert config.behind_the_end() == [
        "optim.milestones 79: the run has 60 epochs",
        "train.colour_epochs 67: the run has 60 epochs",
        "train.conv1_epochs 72: the run has 60 epochs",
    ]
    config = parsed("demo", "--data.shards", "x", "--train.epochs", "1")
    assert "optim.lr is not reached" in config.behind_the_end()[0]


def test_overfitting_takes_no_rates_of_layers_and_no_parts():
    config = parsed("large-batch", "--data.shards", "x", "--overfit", "16", "--train.accumulate", "4")
    assert (config.optim.name, config.train.accumulate, config.train.batch) == ("sgd", 1, 16)


def test_the_parsers_error_is_one_line_with_and_without_a_frame():
    framed = "╭─ Title ───╮\n│ '--a' is  │\n│ wrong.    │\n│ ───────── │\n│ more      │\n╰───────────╯\n"
    plain = "Title\n---------\n'--a' is\nwrong.\n---------\nmore\n"
    assert _first_sentence(framed) == _first_sentence(plain) == "'--a' is wrong."


def test_no_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--config: name a JSON file"):
        parsed("demo", "--config", "--data.shards", "x")
    with pytest.raises(DataError, match=r"--config /nowhere.json: cannot be read \(.*No such file"):
        parsed("demo", "--config", "/nowhere.json")


def test_crops_grow_and_colours_and_resizing_follow():
    config = parsed("modern", "--data.shards", "x", "--train.epochs", "9", "--train.crop-until", "2", "4", "6")
    seen = [config.augment_at(epoch) for epoch in range(9)]
    assert [a.crop for a in seen] == [128, 128, 160, 160, 192, 192, 224, 224, 224]
    assert [a.resize for a in seen] == [146, 146, 183, 183, 219, 219, 256, 256, 256]
    assert seen[-1] is config.augment
    original = parsed("original", "--data.shards", "x")
    assert [original.augment_at(epoch).colour for epoch in (0, 66, 67, 92)] == [0.1, 0.1, 0, 0]


def test_a_preset_is_changed_to_another_schedule_by_one_flag():
    assert parsed("caffe", "--data.shards", "x", "--optim.schedule", "cosine").optim.schedule == "cosine"


@pytest.mark.parametrize("saved", [{"regularize": {"mixup": 0.4}}, {"model": {"lrn_alpha": "sum"}}])
def test_a_removed_field_is_ignored_at_its_default_and_rejected_by_name_at_another_value(saved):
    old = {"regularize": {"mixup": 0.0, "cutmix": 0.0, "ema": 0.5}, "model": {"lrn_alpha": "variant", "width": 0.5}}
    config = updated(Config(), old)
    assert (config.regularize.ema, config.model.width) == (0.5, 0.5)
    ((name, value),) = next(iter(saved.values())).items()
    with pytest.raises(ConfigError, match=f"{name}={value} is no longer supported"):
        updated(Config(), saved)


def test_a_checkpoint_made_before_fields_were_removed_and_added_resumes():
    class Saved:
        path = Path("runs/a/checkpoints/step-00000007")

    class Data:
        fingerprint = "f"

    config = Config()
    fixed = invariants(flatten(config), Data, precision="fp32")
    before = {k: v for k, v in fixed.items() if k != "optim.nesterov"}  # as if that field were new
    before |= {"regularize.mixup": 0.0, "regularize.cutmix": 0.0, "model.lrn_alpha": "variant"}
    Saved.state = {"config": before}
    check_same_run(fixed, Saved)
    for other, message in (
        ({"regularize.mixup": 0.4}, "step-00000007: regularize.mixup=0.4 is no longer supported"),
        ({"optim.nesterov": True}, "optim.nesterov=False but it was True"),
    ):
        Saved.state = {"config": before | other}
        with pytest.raises(ConfigError, match=message):
            check_same_run(fixed, Saved)


def test_help_and_usage_errors_need_not_wait_for_torch():
    code = "import sys, train.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
