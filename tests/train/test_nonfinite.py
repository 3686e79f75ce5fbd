"""Non-finite numbers are found without the host waiting for the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.read import backend
from pipeline.read.backend import HostCopy
from train.nonfinite import Finite


class Stream:
    """A fake device: queued work runs in order, when something synchronises with it."""

    def __init__(self) -> None:
        self.queued: list = []
        self.done = 0

    def put(self, work) -> int:
        self.queued.append(work)
        return len(self.queued)

    def synchronize(self, until: int) -> None:
        for work in self.queued[self.done : until]:
            work()
        self.done = max(self.done, until)


class FakeCopy:
    """HostCopy on the fake device: the values arrive when the stream reaches the event."""

    stream: Stream

    def __init__(self, values: Tensor) -> None:
        self.host = torch.full(values.shape, -1.0)
        self.stream.put(lambda: self.host.copy_(values))
        self.event = len(self.stream.queued)

    def read(self) -> Tensor:
        self.stream.synchronize(self.event)
        return self.host


@pytest.fixture
def stream(monkeypatch):
    """A stream on which tensors may be read only through an event."""
    FakeCopy.stream = Stream()

    def waits(*_):
        raise AssertionError("this waits for everything that the device has to do")

    monkeypatch.setattr("train.nonfinite.HostCopy", FakeCopy)
    for name in ("__bool__", "__float__", "__int__", "item"):
        monkeypatch.setattr(Tensor, name, waits)
    return FakeCopy.stream


def losses(*values: float) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


def test_a_late_check_never_waits_for_the_step_that_was_just_queued(stream):
    weight = torch.nn.Parameter(torch.ones(3))
    check = Finite([weight], late=True)
    for step, loss in enumerate(losses(1.0, 2.0, 3.0, 4.0), 1):
        weight.grad = torch.ones(3)
        backward = stream.put(lambda: None)  # this step's work is queued and has not run
        assert check.bad_step(step, loss) == 0
        assert stream.done < backward


@pytest.mark.parametrize("bad_in", ["loss", "gradient"])
def test_each_step_is_reported_exactly_one_step_late_with_its_own_loss(stream, bad_in):
    weight = torch.nn.Parameter(torch.ones(3))
    check = Finite([weight], late=True)
    reported = []
    for step, value in enumerate((1.0, 2.0, float("nan") if bad_in == "loss" else 3.0, 4.0, 5.0), 1):
        weight.grad = torch.full((3,), float("inf") if bad_in == "gradient" and step == 3 else 1.0)
        reported.append((check.bad_step(step, torch.tensor(value)), check.loss))
    assert [bad for bad, _ in reported] == [0, 0, 0, 3, 0]
    assert repr([loss for _, loss in reported[1:]]) == repr([1.0, 2.0, float("nan") if bad_in == "loss" else 3.0, 4.0])
    assert (check.rest(), check.loss) == (0, 5.0)
    assert check.rest() == 0


def test_the_last_step_is_reported_by_rest(stream):
    check = Finite([], late=True)
    assert check.bad_step(1, torch.tensor(float("inf"))) == 0
    assert (check.rest(), check.loss) == (1, float("inf"))


def test_numbers_travel_to_pinned_memory_without_blocking_and_are_read_behind_an_event(monkeypatch):
    calls = []

    class Event:
        def __init__(self, stream):
            calls.append(f"record on the stream of {stream}")

        def synchronize(self):
            calls.append("synchronize")

    class Pinned:
        def copy_(self, values, *, non_blocking):
            calls.append(("copy", non_blocking))

    def empty(shape, *, dtype, device, pin_memory):
        calls.append(("pinned", device, pin_memory))
        return Pinned()

    monkeypatch.setattr(backend.torch, "empty", empty)
    stream_of = lambda device: SimpleNamespace(record_event=lambda: Event(device.type))  # noqa: E731
    monkeypatch.setattr(backend.torch.cuda, "current_stream", stream_of)
    device = SimpleNamespace(type="cuda")
    copy = HostCopy(SimpleNamespace(shape=(2,), dtype=torch.float32, device=device))
    assert calls == [("pinned", "cpu", True), ("copy", True), "record on the stream of cuda"]
    assert isinstance(copy.read(), Pinned)
    assert calls[3:] == ["synchronize"]


def test_without_delay_a_step_is_reported_at_once():
    check = Finite([], late=False)
    assert [check.bad_step(step, loss) for step, loss in enumerate(losses(1.0, float("nan"), 2.0), 1)] == [0, 2, 0]
