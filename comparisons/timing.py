"""Timing: forward and backward apart, contestants taking turns, medians with quantiles.

Times are wall-clock milliseconds of one call on the whole batch.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsbackend.comparisons.problems import BenchmarkProblem

# At least 3, or a median means little; at most 50, because the quantiles no longer move.
_MIN_REPETITIONS = 3
_MAX_REPETITIONS = 50
# Calls longer than this are timed once: nothing that is compared with them is near enough for noise to matter.
_LONG_CALL_MS = 10_000.0


@dataclass(frozen=True)
class Call:
    """One forward and one backward pass: results and times."""

    primal: Tensor
    gradients: tuple[Tensor | None, ...]
    forward_ms: float
    backward_ms: float

    @property
    def total_ms(self) -> float:
        """Forward plus backward."""
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class Staged:
    """One call, ready to run, for contestants that work on arrays of another library than torch.

    What converts between the libraries happens before and after the clock: `passed = forward()` and
    `gradient = backward(passed)` are timed, `results(passed, gradient)` returns the primal (B, n) and the gradients as
    tensors. A solve function that has a method `stage(inputs, cotangent) -> Staged` is called this way.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]
    results: Callable[[Any, Any], tuple[Tensor, tuple[Tensor | None, ...]]]


@dataclass(frozen=True)
class Spread:
    """Median and 20 % and 80 % quantiles of repeated times."""

    median_ms: float
    q20_ms: float
    q80_ms: float


@dataclass(frozen=True)
class Timing:
    """The times of one contestant on one problem."""

    forward: Spread
    backward: Spread
    total: Spread
    repetitions: int


def call_once(solve: Callable[..., Tensor], problem: BenchmarkProblem, cotangent: Tensor) -> Call:
    """Solve the batch and pull `cotangent` back to the differentiated parameters, timing both.

    The inputs are fresh leaves, made before the clock starts; the garbage collector rests while it runs.
    """
    staged = _stage(solve, problem, cotangent)
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        _synchronise(cotangent)
        start_s = time.perf_counter()
        passed = staged.forward()
        _synchronise(cotangent)
        middle_s = time.perf_counter()
        gradient = staged.backward(passed)
        _synchronise(cotangent)
        end_s = time.perf_counter()
    finally:
        if gc_was_enabled:
            gc.enable()
    primal, gradients = staged.results(passed, gradient)
    return Call(primal, gradients, 1e3 * (middle_s - start_s), 1e3 * (end_s - middle_s))


def _stage(solve: Callable[..., Tensor], problem: BenchmarkProblem, cotangent: Tensor) -> Staged:
    """Return the call as the solve function stages it, else as autograd runs it."""
    inputs = problem.inputs()
    stage = getattr(solve, "stage", None)
    if stage is not None:
        return stage(inputs, cotangent)
    wanted = [inputs[i] for i in problem.differentiated()]
    return Staged(
        forward=lambda: solve(*inputs),
        backward=lambda primal: torch.autograd.grad(primal, wanted, cotangent, allow_unused=True),
        results=lambda primal, gradients: (primal.detach(), gradients),
    )


def _synchronise(tensor: Tensor) -> None:
    """Wait for the device, so that the clock sees finished work."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def repetitions_for(call_ms: float, budget_s: float) -> int:
    """Return how often to repeat a call of `call_ms` within `budget_s`: between 3 and 50 times, a long call once."""
    if call_ms > _LONG_CALL_MS:
        return 1
    return int(np.clip(1e3 * budget_s / max(call_ms, 1e-3), _MIN_REPETITIONS, _MAX_REPETITIONS))


def take_turns(repetitions: dict[str, int]) -> list[str]:
    """Return the order of calls: everybody's repetitions spread evenly over the whole, so that drift hits all alike.

    Consecutive rounds start with another contestant, so that nobody always follows the same one.
    """
    rounds = max(repetitions.values(), default=0)
    order: list[str] = []
    names = list(repetitions)
    for r in range(rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            count = repetitions[name]
            if (r + 1) * count // rounds > r * count // rounds:
                order.append(name)
    return order


def summarise(calls: list[tuple[float, float]]) -> Timing:
    """Summarise (forward_ms, backward_ms) pairs."""
    times = np.array(calls)
    return Timing(
        forward=_spread(times[:, 0]),
        backward=_spread(times[:, 1]),
        total=_spread(times.sum(axis=1)),
        repetitions=len(calls),
    )


def _spread(times_ms: np.ndarray) -> Spread:
    q20_ms, median_ms, q80_ms = np.quantile(times_ms, [0.2, 0.5, 0.8])
    return Spread(float(median_ms), float(q20_ms), float(q80_ms))
