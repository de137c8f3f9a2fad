"""When failures on a device become errors; the device is played by an event that comes when it is told to."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import hsbackend
from hsbackend import checks
from hsbackend.status import InvalidOptionError, SolveError, UnsupportedProblemError


class Event:
    """An arrival."""

    def __init__(self) -> None:
        self.here = False
        self.waited = 0

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.here = True
        self.waited += 1


def ask(status: list[int]) -> Event:
    event = Event()
    codes = torch.tensor(status, dtype=torch.int8)
    checks._asked.questions.append(checks._Question(codes, codes.any(), event))
    return event


@pytest.fixture(autouse=True)
def nothing_outstanding(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    checks._asked.questions.clear()
    yield
    checks._asked.questions.clear()


def test_answers_that_have_not_arrived_are_not_waited_for() -> None:
    event = ask([0, 1])
    checks._collect()
    assert len(checks._asked.questions) == 1
    assert event.waited == 0
    event.here = True
    with pytest.raises(SolveError, match="an earlier call on the device: 1 of 2 items failed: item 1") as caught:
        checks._collect()
    np.testing.assert_array_equal(caught.value.status, [0, 1])
    checks._collect()


def test_raise_failures_waits_and_forgets() -> None:
    events = [ask([0, 0]), ask([3]), ask([1])]
    with pytest.raises(SolveError, match="NaN or infinity"):
        hsbackend.raise_failures()
    assert [event.waited for event in events] == [1, 1, 1]
    hsbackend.raise_failures()


def test_modes() -> None:
    failing = torch.tensor([0, 1], dtype=torch.int8)
    with hsbackend.checking("sync"), pytest.raises(SolveError, match=r"^1 of 2 items failed"):
        checks.check(failing)
    with hsbackend.checking("never"):
        checks.check(failing)
    assert not checks._asked.questions
    with pytest.raises(InvalidOptionError, match="mode='later', expected one of 'async', 'sync', 'never'"):
        hsbackend.checking("later").__enter__()  # type: ignore[arg-type]


def test_nothing_is_asked_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with hsbackend.checking("sync"):
        checks.check(torch.tensor([1], dtype=torch.int8))


def test_triton_is_imported_by_nobody_without_a_device() -> None:
    """Not by the package, not by a projection on the CPU."""
    code = (
        "import sys, torch, hsbackend; x = hsbackend.project(torch.ones(2, 3), hsbackend.Polyhedron.simplex(3));"
        "print([name for name in sys.modules if name.partition('.')[0] == 'triton' or name == 'hsbackend.cuda'])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"


def test_without_triton_the_message_says_what_to_do(monkeypatch) -> None:
    from hsbackend.cuda import dispatch

    dispatch._module.cache_clear()
    for name in [name for name in sys.modules if name.startswith("hsbackend.cuda.") or name == "triton"]:
        if name != "hsbackend.cuda.dispatch":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedProblemError, match="pip install triton"):
        dispatch.solve("budget", torch.ones(1, 3), None, None, torch.ones(1, 2), None, None, (3,), "active")


@pytest.mark.parametrize(
    ("family", "shape", "place"),
    [
        ("budget", (8192,), "kernel"), ("budget", (8193,), "torch"), ("l1", (9000,), "torch"),
        ("monotone", (10**6,), "kernel"),
        ("transport", (64, 64), "kernel"), ("transport", (4, 65), "torch"),
    ],
)  # fmt: skip
def test_sizes_choose_the_path(family: str, shape: tuple[int, ...], place: str) -> None:
    from hsbackend.cuda import dispatch

    assert dispatch.where_solved(family, shape) == place
