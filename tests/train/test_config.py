"""The command line: what it sets, and how it refuses."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from train.config import RESUME_NEWEST, flatten, parse
from train.presets import PRESETS


def parsed(*argv: str):
    return parse(list(argv), PRESETS, prog="train/run.py")


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
        (["dmeo"], r"unknown preset 'dmeo' \(did you mean demo\?\); presets: demo, seed"),
        (["demo", "--train.bach", "3"], r"unknown field --train.bach \(did you mean train.batch\?\)"),
        (["demo", "--train.batch", "many"], r"--train.batch: invalid literal for int\(\) with base 10: 'many'"),
        (["demo", "--data.shards", "x", "stray"], "stray"),
        (["demo"], "data.shards is not set"),
        (["demo", "--data.shards", "x", "--train.batch", "0"], "train.batch=0: must be a number of at least 1"),
        (["demo", "--data.shards", "x", "--train.epochs", "-1"], "train.epochs=-1"),
        (["demo", "--data.shards", "x", "--optim.lr", "nan"], "optim.lr=nan"),
        (["demo", "--data.shards", "x", "--optim.lr", "inf"], "optim.lr=inf"),
        (["demo", "--data.shards", "x", "--loader.threads", "100000"], "loader.threads=100000: choose 0 to 1024"),
        (["demo", "--data.shards", "x", "--optim.momentum", "1"], "optim.momentum=1.0: must be below 1"),
        (["demo", "--data.shards", "x", "--model.width", "0"], "model.width=0"),
        (["demo", "--data.shards", "x", "--augment.crop", "64"], "augment.crop=64 is larger than augment.resize=36"),
        (["demo", "--data.shards", "x", "--loader.backend", "magic"], "loader.backend"),
        (["demo", "--data.shards", "x", "--run.log-every", "0"], "run.log_every=0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("demo", "--help")
    assert not caught.value.code
    text = capsys.readouterr().out
    for name in flatten(PRESETS["demo"]):
        assert "--" + name.replace("_", "-") in text
