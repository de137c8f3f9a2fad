"""Run problems x contestants: judge first, then time those that answered."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from hsbackend.comparisons.contestants import Contestant, Kind, Solve, route_of
from hsbackend.comparisons.judge import Verdict
from hsbackend.comparisons.problems import BenchmarkProblem
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.results import Row
from hsbackend.comparisons.timing import Call, call_once, repetitions_for, summarise, take_turns
from hsbackend.comparisons.truth import Truth, find_truth

_LONGEST_NOTE = 240
# "package.SomeError: message", up to the next empty line.
_ERROR_IN_TRACEBACK = re.compile(r"^[\w.]*(?:Error|Exception): .*(?:\n.+)*", re.MULTILINE)


def run_speed(
    problems: Sequence[BenchmarkProblem],
    contestants: Sequence[Contestant],
    *,
    device: torch.device,
    budget_s: float,
    progress: Progress,
) -> list[Row]:
    """Compare every contestant on every problem.

    For each problem: find the truth; set up and call every contestant once, which is judged; call once more to
    warm up; then repeat in turns, each as often as fits in `budget_s`.

    Args:
        problems: on the CPU; moved to `device` for the contestants.
        contestants: a failure of one is a row with an error text and disturbs nobody else.
        device: where the contestants run.
        budget_s: time to spend on repetitions, per contestant and problem.
        progress: takes `steps_of(problems, contestants)` steps.

    Returns:
        One row per problem and contestant, in that order, without contestants that do not accept the problem.
    """
    rows: list[Row] = []
    with _float64_default(), warnings.catch_warnings():
        # Timed calls must not pay for the printing of warnings; the judged call records them in the row's notes.
        warnings.simplefilter("ignore")
        _import_packages(problems, contestants)
        for problem in problems:
            progress.stage(problem.name)
            rows.extend(_run_problem(problem, contestants, device, budget_s, progress))
    return rows


def steps_of(problems: Sequence[BenchmarkProblem], contestants: Sequence[Contestant]) -> int:
    """Return the number of progress steps: per problem the truth, and two per contestant."""
    return sum(1 + 2 * len(_accepted(contestants, problem)) for problem in problems)


def _accepted(contestants: Sequence[Contestant], problem: BenchmarkProblem) -> list[Contestant]:
    return [c for c in contestants if c.accepts(problem)]


@contextmanager
def _float64_default() -> Iterator[None]:
    """Make float64 torch's default dtype: QPLayer allocates its gradients in the default dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _import_packages(problems: Sequence[BenchmarkProblem], contestants: Sequence[Contestant]) -> None:
    """Set every contestant up once and forget it, so that importing packages is nobody's set-up time."""
    for contestant in contestants:
        problem = next((p for p in problems if contestant.accepts(p)), None)
        # The same error comes again when the contestant is judged, and is reported there.
        with suppress(Exception):
            if problem is not None:
                contestant.setup(problem)


def _run_problem(
    problem: BenchmarkProblem,
    contestants: Sequence[Contestant],
    device: torch.device,
    budget_s: float,
    progress: Progress,
) -> list[Row]:
    """Return the rows of one problem."""
    progress.advance("reference")
    truth = find_truth(problem)
    on_device = problem.to(device)
    rows: dict[str, Row] = {}
    solves: dict[str, Solve] = {}
    repetitions: dict[str, int] = {}
    for contestant in _accepted(contestants, problem):
        progress.advance(f"{contestant.name}: judging")
        row, solve, warm_call_ms = _judge_contestant(on_device, contestant, truth)
        rows[contestant.name] = row
        if solve is not None:
            solves[contestant.name] = solve
            repetitions[contestant.name] = repetitions_for(warm_call_ms, budget_s)
    # Contestants that failed have used up one of their two steps.
    progress.advance("timing", len(rows) - len(solves))

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in solves}
    for name in take_turns(repetitions):
        if rows[name].error is not None:
            continue
        try:
            call = call_once(solves[name], on_device, on_device.cotangent)
        except Exception as error:
            rows[name] = replace(rows[name], error=describe_error(error))
            continue
        times[name].append((call.forward_ms, call.backward_ms))
        is_finished = len(times[name]) == repetitions[name]
        progress.advance(f"{name}: timing", 1 if is_finished else 0)
    for name, calls in times.items():
        if rows[name].error is None:
            rows[name] = replace(rows[name], timing=summarise(calls))
    return list(rows.values())


def _judge_contestant(
    problem: BenchmarkProblem, contestant: Contestant, truth: Truth
) -> tuple[Row, Solve | None, float]:
    """Return the judged row, the solve function if it may be timed, and the time of a warm call in ms."""
    row = Row(problem.name, contestant.name, contestant.is_ours, contestant.is_diffcp, contestant.kind)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Meant for the authors of packages, not for those who read a comparison.
            warnings.simplefilter("ignore", DeprecationWarning)
            start_s = time.perf_counter()
            solve = contestant.setup(problem)
            row = replace(row, setup_ms=1e3 * (time.perf_counter() - start_s))
            # The gradients of shared parameters are sums over the batch, so degenerate items get a zero cotangent here.
            first = call_once(solve, problem, truth.cotangent.to(problem.cotangent.device))
        row = replace(row, first_call_ms=first.total_ms, notes=_distinct([str(w.message) for w in caught]))
        if contestant.kind is not Kind.FLOOR:
            row = replace(
                row, verdict=_judge_call(problem, truth, first), route=route_of(getattr(solve, "layer", None))
            )
        warm = call_once(solve, problem, problem.cotangent)
    except Exception as error:
        return replace(row, error=describe_error(error)), None, 0.0
    return row, solve, warm.total_ms


def _judge_call(problem: BenchmarkProblem, truth: Truth, call: Call) -> Verdict:
    """Judge the primal and the gradients of a call; a gradient that is None is a gradient of zero."""
    gradients = {}
    for position, gradient in zip(problem.differentiated(), call.gradients, strict=True):
        parameter = problem.parameters[position]
        tensor = torch.zeros_like(parameter.value) if gradient is None else gradient
        gradients[parameter.name] = tensor.cpu().numpy()
    return truth.verdict(call.primal.cpu().numpy(), gradients)


def _distinct(messages: Sequence[str]) -> tuple[str, ...]:
    """Return each message once, shortened to a line."""
    return tuple(dict.fromkeys(" ".join(message.split())[:_LONGEST_NOTE] for message in messages))


def describe_error(error: Exception) -> str:
    """Return type and message of an error in one line; a missing package names the extra that brings it.

    Of a message that is a traceback only its last error is told: what it is about, and no paths of this machine.
    """
    message = str(error)
    told = list(_ERROR_IN_TRACEBACK.finditer(message))
    if "Traceback (most recent call last)" in message and told:
        message = told[-1].group()
    text = f"{type(error).__name__}: {' '.join(message.split())}"[:_LONGEST_NOTE]
    if isinstance(error, ImportError):
        text += ' (pip install "hsbackend[compare]")'
    return text
