"""Checkpoints come back bit for bit, or are refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from pipeline.errors import DataError
from train import checkpoint
from train.checkpoint import Checkpoints


def trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        net(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


@pytest.fixture
def saved(tmp_path):
    net, optimizer = trained()
    path = Checkpoints(tmp_path, keep=3).save(
        12, model=net.state_dict(), optimizer=optimizer.state_dict(), state={"epoch": 2}
    )
    return path


def test_everything_comes_back_bit_for_bit(saved):
    net, optimizer = trained()
    model, state_of_optimizer, state = checkpoint.load(saved)
    assert state == {"epoch": 2, "step": 12}
    for name, value in net.state_dict().items():
        assert torch.equal(model[name], value)
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    other.load_state_dict(model)
    restored = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    checkpoint.restore_optimizer(restored, state_of_optimizer)
    for a, b in zip(optimizer.state_dict()["state"].values(), restored.state_dict()["state"].values()):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_any_damaged_or_missing_file_is_refused_by_name(saved, tmp_path):
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        copy = shutil.copytree(saved, tmp_path / "copy")
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is damaged"):
            checkpoint.load(copy)
        (copy / name).unlink()
        with pytest.raises(DataError, match="not a whole checkpoint"):
            checkpoint.load(copy)
        shutil.rmtree(copy)
    (saved / "record.json").unlink()
    with pytest.raises(DataError, match="not a whole checkpoint"):
        checkpoint.load(saved)
    with pytest.raises(DataError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nowhere")


def test_only_the_last_k_are_kept_and_latest_names_the_newest(tmp_path):
    net, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 30):
        checkpoints.save(step, model=net.state_dict(), optimizer=optimizer.state_dict(), state={})
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000002", "step-00000030"]
    assert (folder / "latest").read_text() == "step-00000030\n"
    assert checkpoints.newest() == folder / "step-00000030"


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step-00000009.partial").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    net, optimizer = trained()
    path = checkpoints.save(9, model=net.state_dict(), optimizer=optimizer.state_dict(), state={})
    checkpoint.verify(path)
    assert not list(path.parent.glob("*.partial"))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_pickle_under_any_name_is_not_executed(saved):
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (saved / name).write_bytes(pickle.dumps(Bomb()))
        record = json.loads((saved / "record.json").read_text())
        record[name] = checkpoint.file_sha256(saved / name)
        (saved / "record.json").write_text(json.dumps(record))
        with pytest.raises(DataError, match="cannot be read"):
            checkpoint.load(saved)


def test_saving_a_step_again_replaces_it_and_files_are_readable_by_the_group(tmp_path):
    net, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, keep=3)
    for value in (1.0, 2.0):
        nn.init.constant_(net[0].bias, value)
        path = checkpoints.save(5, model=net.state_dict(), optimizer=optimizer.state_dict(), state={})
    assert checkpoint.load(path)[0]["0.bias"].unique().tolist() == [2.0]
    expected = (path / "state.json").stat().st_mode
    assert {p.stat().st_mode for p in path.iterdir()} == {expected}


def test_a_full_disk_is_an_error_of_the_system_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    net, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, keep=3)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(5, model=net.state_dict(), optimizer=optimizer.state_dict(), state={})
    assert checkpoints.newest() is None
    assert not list((tmp_path / "checkpoints").iterdir())  # what was half written does not keep the disk full
