"""Scheduling and summaries of timed calls; no assertion depends on how fast anything is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from hsbackend.comparisons.problems import make_problem
from hsbackend.comparisons.timing import Staged, call_once, repetitions_for, summarise, take_turns


def test_everybody_gets_the_repetitions_asked_for_spread_over_the_rounds() -> None:
    repetitions = {"slow": 3, "medium": 10, "fast": 30}
    order = take_turns(repetitions)
    assert Counter(order) == repetitions
    slow = [i for i, name in enumerate(order) if name == "slow"]
    thirds = [int(3 * i / len(order)) for i in slow]
    assert thirds == [0, 1, 2]


def test_nobody_always_goes_first() -> None:
    order = take_turns({"a": 4, "b": 4})
    assert {order[i] for i in range(0, 8, 2)} == {"a", "b"}


@pytest.mark.parametrize(("call_ms", "expected"), [(20_000.0, 1), (4000.0, 3), (100.0, 30), (0.01, 50), (0.0, 50)])
def test_slow_calls_are_repeated_less_often(call_ms: float, expected: int) -> None:
    assert repetitions_for(call_ms, budget_s=3.0) == expected


def test_summary_is_median_and_quantiles() -> None:
    timing = summarise([(1.0, 10.0), (2.0, 20.0), (3.0, 30.0), (4.0, 40.0), (5.0, 50.0), (100.0, 0.0)])
    assert timing.forward.median_ms == 3.5
    assert timing.forward.q20_ms == 2.0
    assert timing.backward.q80_ms == 40.0
    assert timing.total.median_ms == 38.5
    assert timing.repetitions == 6


def test_call_returns_what_autograd_returns() -> None:
    problem = make_problem("simplex-n50", quick=True)
    call = call_once(lambda y: 3.0 * y, problem, problem.cotangent)
    assert torch.equal(call.primal, 3.0 * problem.parameters[0].value)
    assert torch.equal(call.gradients[0], 3.0 * problem.cotangent)
    assert not call.primal.requires_grad


class _Doubling:
    """x = 2 v by hand, in lists of NumPy arrays, staged."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def stage(self, inputs: tuple[Tensor, ...], cotangent: Tensor) -> Staged:
        self.calls.append("stage")
        point, pulled = inputs[0].detach().numpy(), cotangent.numpy()

        def forward() -> object:
            self.calls.append("forward")
            return 2.0 * point

        def backward(passed: object) -> object:
            self.calls.append("backward")
            return 2.0 * pulled

        def results(passed, gradient) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            self.calls.append("results")
            return torch.from_numpy(passed), (torch.from_numpy(gradient),)

        return Staged(forward, backward, results)


def test_staged_call_converts_outside_the_passes() -> None:
    problem = make_problem("simplex-n50", quick=True)
    solve = _Doubling()
    call = call_once(solve, problem, problem.cotangent)
    assert solve.calls == ["stage", "forward", "backward", "results"]
    assert torch.equal(call.primal, 2.0 * problem.parameters[0].value)
    assert torch.equal(call.gradients[0], 2.0 * problem.cotangent)
