"""Run QP contestants on instances, in a process with one thread: judged first, then timed, with a time limit.

Most solvers have no time limit, or check it too rarely, so they run in a process that can be ended; the process also
keeps everybody at one thread. The order of contestants rotates from instance to instance.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.qp_contestants import Prepared, QPContestant, Request, contestants_named, layout
from hsbackend.comparisons.qp_families import FAMILIES, Key, QPInstance
from hsbackend.comparisons.qp_judge import NO_ANSWER, Accuracy, Answer, judge_answer
from hsbackend.comparisons.speed import describe_error

_MAX_REPETITIONS = 30
# A call longer than this is timed once: it warms up within itself.
_LONG_CALL_S = 2.0
# Importing packages and converting an instance, outside the clock.
_PREPARATION_S = 300.0
# What the process gets on top of the time limit to end a solve itself.
_GRACE_S = 2.0
# hsbackend compiles its kernels at the first call after an installation; that call is not timed.
_COMPILATION_S = 120.0

TIME_LIMIT = "time limit"
LEFT_OUT = "left out after a time limit"


@dataclass(frozen=True)
class Measured:
    """One answer per instance, the median time of a solve of all of them together, and how many it is the median of."""

    answers: list[Answer]
    seconds: float
    repetitions: int


class Failure(Exception):
    """A contestant that did not answer; the message says why."""


@dataclass(frozen=True)
class QPRow:
    """One contestant on one instance.

    Attributes:
        key: of the instance.
        contestant: its name.
        rows: of the instance.
        variables: of the instance.
        is_linear: whether the instance is.
        accuracy: relative residuals, infinite without an answer.
        time_ms: median; None without an answer.
        repetitions: how many times it is the median of.
        status: in the words of the solver, or why there is no answer.
        claims: whether the solver says that it solved the instance.
        limit_ms: time limit, which is also what a failure counts.
    """

    key: Key
    contestant: str
    rows: int
    variables: int
    is_linear: bool
    accuracy: Accuracy
    time_ms: float | None
    repetitions: int
    status: str
    claims: bool
    limit_ms: float

    def is_solved(self, tolerance: float) -> bool:
        """Whether all residuals are within the tolerance and the time within the limit."""
        return self.time_ms is not None and self.time_ms <= self.limit_ms and self.accuracy.worst <= tolerance

    def counted_ms(self, tolerance: float) -> float:
        """The time, or the time limit for a failure."""
        return self.time_ms if self.time_ms is not None and self.is_solved(tolerance) else self.limit_ms


Measure = Callable[[QPContestant, Sequence[Key]], Measured]


def run_families(
    keys: Sequence[Key],
    contestants: Sequence[QPContestant],
    measure: Measure,
    *,
    limit_s: float,
    deadline_s: float,
    progress: Progress,
) -> tuple[list[QPRow], list[Key]]:
    """Run all contestants on all instances, from small to large.

    A contestant that exceeds the time limit is left out of the family's remaining and larger instances, which count
    as failures.

    Args:
        keys: see `keys_of`.
        contestants: who takes part.
        measure: `Worker.measure`; raises `Failure`.
        limit_s: time limit per instance.
        deadline_s: after so many seconds no further family and size is begun.
        progress: takes one step per family and size.

    Returns:
        The rows, and the instances that were not run because the time was up.
    """
    rows: list[QPRow] = []
    slow: set[tuple[str, str]] = set()
    groups = _groups(keys)
    start_s = time.monotonic()
    for place, group in enumerate(groups):
        if time.monotonic() - start_s > deadline_s:
            return rows, [key for later in groups[place:] for key in later]
        progress.stage(f"{group[0].family}, size {group[0].size}")
        instances = [key.make() for key in group]
        layouts = {layout(instance) for instance in instances}
        for number, (key, instance) in enumerate(zip(group, instances, strict=True)):
            for contestant in _rotated(contestants, place + number):
                if contestant.is_batched or (contestant.linear_only and not instance.is_linear):
                    continue
                rows += _measured_rows(contestant, [key], [instance], measure, slow, limit_s)
        for contestant in contestants:
            if contestant.is_batched and len(group) > 1 and len(layouts) == 1:
                rows += _measured_rows(contestant, group, instances, measure, slow, limit_s)
        progress.advance(group[0].family)
    return rows, []


def _groups(keys: Sequence[Key]) -> list[list[Key]]:
    """Return the keys by family and size, in their order."""
    groups: dict[tuple[int, str], list[Key]] = {}
    for key in keys:
        groups.setdefault((key.size, key.family), []).append(key)
    return list(groups.values())


def steps_of_families(keys: Sequence[Key]) -> int:
    """Return the number of progress steps."""
    return len(_groups(keys))


def _rotated(contestants: Sequence[QPContestant], by: int) -> list[QPContestant]:
    first = by % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def _measured_rows(
    contestant: QPContestant,
    keys: Sequence[Key],
    instances: Sequence[QPInstance],
    measure: Measure,
    slow: set[tuple[str, str]],
    limit_s: float,
) -> list[QPRow]:
    """Return the rows of one call; note in `slow` who exceeded the time limit in which family."""
    place = (contestant.name, keys[0].family)
    measured, reason = None, LEFT_OUT
    if place not in slow:
        try:
            measured = measure(contestant, keys)
        except Failure as failure:
            reason = str(failure)
    time_ms = None if measured is None else 1e3 * measured.seconds / len(keys)
    if reason == TIME_LIMIT or (time_ms is not None and time_ms > 1e3 * limit_s):
        slow.add(place)
    rows: list[QPRow] = []
    for i, (key, instance) in enumerate(zip(keys, instances, strict=True)):
        answer = None if measured is None else measured.answers[i]
        m, n = instance.shape
        rows.append(
            QPRow(
                key=key,
                contestant=contestant.name,
                rows=m,
                variables=n,
                is_linear=instance.is_linear,
                accuracy=NO_ANSWER if answer is None else judge_answer(instance, answer),
                time_ms=time_ms,
                repetitions=0 if measured is None else measured.repetitions,
                status=reason if answer is None else answer.status,
                claims=answer is not None and answer.claims,
                limit_ms=1e3 * limit_s,
            )
        )
    return rows


@dataclass
class Worker:
    """A process that solves instances; it is ended and replaced when a solve exceeds the time limit.

    Attributes:
        request: what is asked of every solver.
        budget_s: time to spend on repetitions of one call.
        grace_s: on top of the time limit, before the process is ended.
        compilation_s: on top of that for the first call of contestants that compile.
    """

    request: Request
    budget_s: float
    grace_s: float = _GRACE_S
    compilation_s: float = _COMPILATION_S
    _process: Any = field(default=None, repr=False)
    _connection: Any = field(default=None, repr=False)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None

    def measure(self, contestant: QPContestant, keys: Sequence[Key]) -> Measured:
        """Solve the instances in one call, once for the answer and then for the time.

        Raises:
            Failure: with `TIME_LIMIT`, with the error of the contestant, or when the process died.
        """
        if self._process is None:
            self._start()
        limit_s = self.request.limit_s * len(keys)
        allowed_s = limit_s + self.grace_s + (self.compilation_s if contestant.is_ours else 0.0)
        self._connection.send((contestant.name, tuple(keys), self.request, self.budget_s))
        self._receive(_PREPARATION_S, "preparation takes too long")
        answers, first_s = self._receive(allowed_s, TIME_LIMIT)
        times_s = self._receive(self.budget_s + 2.0 * allowed_s, TIME_LIMIT)
        return Measured(answers, float(np.median(times_s)) if times_s else first_s, len(times_s) or 1)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _one_thread():
            self._process.start()
        theirs.close()

    def _receive(self, timeout_s: float, late: str) -> Any:
        """Return what the process says next."""
        try:
            if not self._connection.poll(timeout_s):
                self.stop()
                raise Failure(late)
            is_error, content = self._connection.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise Failure("the process of the solver died") from error
        if is_error:
            raise Failure(content)
        return content


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Set the environment from which the process to be started takes its number of threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Any) -> None:
    """Answer requests until the other end closes: prepared, then answers and time, then the times of repetitions."""
    # Some solvers print whatever they are told.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    compilations = _Compilations()
    logging.getLogger("hsbackend").addHandler(compilations)
    keys: tuple[Key, ...] = ()
    instances: list[QPInstance] = []
    while True:
        try:
            name, wanted, request, budget_s = connection.recv()
        except EOFError:
            return
        try:
            if wanted != keys:
                keys, instances = wanted, [key.make() for key in wanted]
            (contestant,) = contestants_named([name])
            prepared = contestant.prepare(instances, request)
            connection.send((False, None))
            passed, first_s = _timed(prepared)
            connection.send((False, (prepared.answers(passed), first_s)))
            count = repetitions_of(first_s, budget_s, has_compiled=compilations.are_new())
            connection.send((False, [_timed(prepared)[1] for _ in range(count)]))
        except Exception as error:
            connection.send((True, describe_error(error)))


class _Compilations(logging.Handler):
    """Notices that hsbackend compiled something for longer than a second, which it logs."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1

    def are_new(self) -> bool:
        """Say whether there were any since this was asked last."""
        count, self._count = self._count, 0
        return count > 0


def repetitions_of(first_s: float, budget_s: float, *, has_compiled: bool) -> int:
    """Return how often to repeat: once at the least where the first call is short or compiled something."""
    if first_s > _LONG_CALL_S and not has_compiled:
        return 0
    return int(np.clip(budget_s / max(first_s, 1e-6), 1, _MAX_REPETITIONS))


def _timed(prepared: Prepared) -> tuple[Any, float]:
    """Return what a solve returns and the seconds it took; the garbage collector rests."""
    gc.disable()
    try:
        start_s = time.perf_counter()
        passed = prepared.solve()
        return passed, time.perf_counter() - start_s
    finally:
        gc.enable()


def accepted_families(names: Sequence[str] | None) -> list[str]:
    """Return the families named, all for None.

    Raises:
        ValueError: a name is not known; the message lists those that are.
    """
    unknown = [name for name in names or () if name not in FAMILIES]
    if unknown:
        raise ValueError(f"unknown family {', '.join(unknown)}, expected some of: {', '.join(FAMILIES)}")
    return list(FAMILIES) if names is None else [name for name in FAMILIES if name in names]
