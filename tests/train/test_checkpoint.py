"""Checkpoints are restored bit for bit, or rejected."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import DataError
from pipeline.shards import file_sha256
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


STATE = {"epoch": 2, "best_top1": 0.5, "best_step": 12, "config": {}, "loader": {}}


def save(checkpoints: Checkpoints, step: int, **state) -> Path:
    net, optimizer = trained()
    checkpoints.save(step, model=net.state_dict(), optimizer=optimizer.state_dict(), state=STATE | state)
    checkpoints.wait()
    return checkpoints.path(step)


@pytest.fixture
def saved(tmp_path):
    return save(Checkpoints(tmp_path, keep=3), 12)


def test_everything_comes_back_bit_for_bit(saved):
    net, optimizer = trained()
    found = checkpoint.load(saved)
    assert found.state == STATE | {"step": 12}
    for name, value in net.state_dict().items():
        assert torch.equal(found.model[name], value)
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    other.load_state_dict(found.model)
    restored = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    checkpoint.restore_optimizer(restored, found.optimizer)
    before, after = optimizer.state_dict()["state"], restored.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[i]["momentum_buffer"], after[i]["momentum_buffer"]) for i in before)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=6))
def test_safetensors_are_written_whole_whatever_their_types_and_shapes(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    torch.manual_seed(0)
    written = {f"layer.{i}": (torch.randn(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(tensors)}
    checkpoint.write_tensors(path, written)
    read = load_file(path)
    assert read.keys() == written.keys()
    for name, value in written.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


def test_any_damaged_or_missing_file_is_rejected_by_name(saved, tmp_path):
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        copy = shutil.copytree(saved, tmp_path / "copy")
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is damaged"):
            checkpoint.load(copy)
        (copy / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing"):
            checkpoint.load(copy)
        shutil.rmtree(copy)
    (saved / "record.json").unlink()
    with pytest.raises(DataError, match=r"record\.json is missing"):
        checkpoint.load(saved)
    with pytest.raises(DataError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nowhere")


def test_the_last_k_and_the_best_are_kept_and_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, best in ((1, 1), (2, 2), (30, 2), (40, 2), (50, 2)):
        save(checkpoints, step, best_step=best)
    folder = tmp_path / "checkpoints"
    kept = ["step-00000002", "step-00000040", "step-00000050"]
    assert sorted(p.name for p in folder.iterdir()) == ["best", "latest", *kept]
    assert (folder / "latest").read_text() == "step-00000050\n"
    assert (folder / "best").read_text() == "step-00000002\n"
    found, damaged = checkpoints.newest()
    assert found.path == folder / "step-00000050"
    assert not damaged
    save(checkpoints, 60, best_step=60)
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000050", "step-00000060"]


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step-00000009.partial").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() == (None, [])
    path = save(checkpoints, 9)
    checkpoint.load(path)
    assert not list(path.parent.glob("*.partial"))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_pickle_under_any_name_is_not_executed(saved):
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (saved / name).write_bytes(pickle.dumps(Bomb()))
        record = json.loads((saved / "record.json").read_text())
        record[name] = file_sha256(saved / name)
        (saved / "record.json").write_text(json.dumps(record))
        with pytest.raises(DataError, match="cannot be read"):
            checkpoint.load(saved)


def test_a_whole_checkpoint_is_never_overwritten_and_a_damaged_one_is_put_aside_until_a_later_is_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    path = save(checkpoints, 5)
    before = checkpoint.load(path).model["0.bias"]
    net, optimizer = trained()
    nn.init.constant_(net[0].bias, 3.0)
    checkpoints.save(5, model=net.state_dict(), optimizer=optimizer.state_dict(), state=STATE)
    checkpoints.wait()
    assert torch.equal(checkpoint.load(path).model["0.bias"], before)
    (path / "state.json").unlink()
    checkpoints.set_aside_after(4)
    assert checkpoints.all() == []
    aside = path.with_name("step-00000005.damaged")
    assert aside.is_dir()
    save(checkpoints, 4)
    assert aside.is_dir()
    save(checkpoints, 5)
    assert not aside.exists()


def test_files_are_readable_by_the_group(saved):
    expected = (saved / "record.json").stat().st_mode
    assert {p.stat().st_mode for p in saved.iterdir()} == {expected}


def test_what_is_saved_is_what_was_given_however_it_changes_meanwhile(tmp_path, monkeypatch):
    net, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, keep=3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    go = threading.Event()
    publish = checkpoints._publish
    monkeypatch.setattr(checkpoints, "_publish", lambda *args: (go.wait(10), publish(*args)))
    checkpoints.save(7, model=net.state_dict(), optimizer=optimizer.state_dict(), state=STATE)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    go.set()
    checkpoints.wait()
    found = checkpoint.load(checkpoints.path(7)).model
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_a_full_disk_is_reported_when_asked_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=3)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(checkpoints, 5)
    assert not checkpoints.failed
    assert checkpoints.newest() == (None, [])
    assert not list((tmp_path / "checkpoints").iterdir())  # incomplete files were deleted
    assert checkpoint.load(save(checkpoints, 6)).state["step"] == 6


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_momenta_of_a_channels_last_net_come_back_in_its_own_format(make, tmp_path):
    def trained(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            images = torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last)
            net(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
        momentum = {"momentum": 0.9} if make is torch.optim.SGD else {}
        return net, make(net.parameters(), lr=0.1, fused=True, **momentum)

    net, optimizer = fresh()
    trained(net, optimizer, range(3))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, model=net.state_dict(), optimizer=optimizer.state_dict(), state=STATE)
    checkpoints.wait()
    trained(net, optimizer, range(3, 6))
    saved, _ = checkpoints.newest()
    other, again = fresh()
    other.load_state_dict(saved.model)
    checkpoint.restore_optimizer(again, saved.optimizer)
    trained(other, again, range(3, 6))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
