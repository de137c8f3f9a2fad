"""When the failures of device computations become errors.

On the CPU a status is there as soon as the call returns, and failing items raise at once. On a device the status is
known to the device only, and to ask for it is to wait for everything before it. So there are three ways to check:

    "async"   ask for the answer, do not wait: an error is raised by a later call, once the answer has arrived
    "sync"    wait, and raise at once, as on the CPU
    "never"   do not ask

In every case the failing items are NaN. While a CUDA graph is captured nothing is asked.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from hsbackend.status import InvalidOptionError, SolveError, failure_message

Check = Literal["async", "sync", "never"]
_MODES: Final[tuple[str, ...]] = get_args(Check)
_mode: ContextVar[Check] = ContextVar("hsbackend_check", default="async")


class _Arrival(Protocol):
    """What :class:`torch.cuda.Event` offers of itself here."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class _Question(NamedTuple):
    """A status on its way.

    Attributes:
        status: (B,) int8 on the device.
        failed: () bool in main memory, valid when ``arrival`` has come.
        arrival: the event.
    """

    status: Tensor
    failed: Tensor
    arrival: _Arrival


class _Asked(threading.local):
    """The questions of a thread, oldest first; an error belongs to the thread that called."""

    def __init__(self) -> None:
        self.questions: deque[_Question] = deque()


_asked = _Asked()


@contextmanager
def checking(mode: Check) -> Generator[None]:
    """Choose when failing items of computations on a CUDA device raise, inside a ``with`` block.

        with hsbackend.checking("sync"):
            x = hsbackend.project(v.cuda(), polyhedron)

    Args:
        mode: ``"async"``, the default: never wait for the device; a :class:`hsbackend.SolveError` comes from a later
            call that finds the answer there, or from :func:`raise_failures`. ``"sync"``: wait and raise at once.
            ``"never"``: do not raise. It concerns calls with ``on_failure="raise"``; the items are NaN in any case.

    Raises:
        InvalidOptionError: if the mode has another name.

    Notes:
        Holds for the calling thread and asyncio task. On the CPU it changes nothing: there errors are raised at once.
    """
    if mode not in _MODES:
        raise InvalidOptionError(f"mode={mode!r}, expected one of {', '.join(map(repr, _MODES))}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def raise_failures() -> None:
    """Wait for the answers that ``checking("async")`` has asked for so far, and raise for failed items.

    Raises:
        SolveError: for the first call of this thread that had failing items; ``status`` is that call's.

    Notes:
        Synchronises with the device if something is outstanding. All questions are forgotten, also when it raises.
    """
    questions, _asked.questions = _asked.questions, deque()
    for question in questions:
        question.arrival.synchronize()
    for question in questions:
        if bool(question.failed):
            _raise(question.status, "an earlier call on the device: ")


def check(status: Tensor) -> None:
    """Raise for failing items of a device computation in the way that was chosen.

    Args:
        status: (B,) int8 on the device.

    Raises:
        SolveError: see :func:`checking`.
    """
    mode = _mode.get()
    if mode == "never" or torch.cuda.is_current_stream_capturing():
        return
    if mode == "sync":
        if bool(status.any()):
            _raise(status, "")
        return
    _collect()
    with torch.cuda.device(status.device):
        failed = torch.empty((), dtype=torch.bool, pin_memory=True)
        failed.copy_(status.any(), non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
    _asked.questions.append(_Question(status, failed, arrival))


def _collect() -> None:
    """Look at the answers that have arrived."""
    questions = _asked.questions
    while questions and questions[0].arrival.query():
        question = questions.popleft()
        if bool(question.failed):
            _raise(question.status, "an earlier call on the device: ")


def _raise(status: Tensor, prefix: str) -> None:
    codes: np.ndarray[tuple[int, ...], np.dtype[np.int8]] = status.cpu().numpy()
    raise SolveError(prefix + failure_message(codes, {}), codes)
