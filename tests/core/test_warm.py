"""Warm starts: the same answer as from nothing, in fewer steps, and never across structures."""

from __future__ import annotations

import numpy as np
import pytest

from core_programs import dense_program
from generators import random_case, semidefinite_case
from hsbackend.plan import Plan, Solution
from hsbackend.program import FloatArray
from hsbackend.solvers.result import Options
from hsbackend.status import Status

KEEP = Options(keep_warm=True)


def same(first: Solution, second: Solution) -> None:
    np.testing.assert_array_equal(first.status, second.status)
    for a, b in ((first.primal, second.primal), (first.multipliers, second.multipliers)):
        np.testing.assert_allclose(a, b, atol=1e-9 * (1.0 + np.nan_to_num(np.abs(b)).max(initial=0.0)))


@pytest.mark.parametrize("generator", [random_case, semidefinite_case])
def test_the_answer_is_that_of_a_cold_start(generator) -> None:
    """From the same data, from moved data, in another order and from another batch size."""
    rng = np.random.default_rng(0)
    steps = np.zeros(2)
    for seed in range(80):
        case = generator(seed)
        plan = Plan(case.program(frozenset("qb")) if len(case.hessian) == 1 else case.program(frozenset("QqAb")))
        free = frozenset("qb") if len(case.hessian) == 1 else frozenset("QqAb")
        data = case.parameters(free)
        cold = plan.solve(data, KEEP)
        again = plan.solve(data, KEEP, cold.warm)
        same(again, cold)
        solved = cold.status == Status.SOLVED
        steps += cold.steps[solved].sum(), again.steps[solved].sum()
        order = rng.permutation(case.shape[0])
        same(plan.solve([part[order] if len(part) > 1 else part for part in data], KEEP, cold.warm),
             plan.solve([part[order] if len(part) > 1 else part for part in data], KEEP))  # fmt: skip
        single = [part[:1] for part in data]
        same(plan.solve(single, KEEP, cold.warm), plan.solve(single, KEEP))
        if cold.status[0] == Status.SOLVED:
            same(plan.solve(data, KEEP, plan.solve(single, KEEP).warm), cold)
    assert steps[1] < 0.6 * steps[0]


def test_newton_takes_fewer_steps() -> None:
    rng = np.random.default_rng(1)
    n, batch = 60, 32
    rows = np.concatenate([np.ones((1, n)), np.kron(np.eye(6), np.ones((1, 10))), -np.eye(n), np.eye(n)])
    rhs = np.tile(np.concatenate([[1.0], np.full(6, 0.25), np.zeros(n), np.full(n, 0.1)]), (batch, 1))
    plan = Plan(dense_program(np.diag(rng.uniform(0.5, 1.5, n)), rows, 1), "semismooth_newton")
    linear = rng.normal(size=(batch, n))
    before = plan.solve([linear, rhs], KEEP)
    moved: list[FloatArray] = [linear + 1e-3 * rng.normal(size=linear.shape), rhs]
    cold, warm = plan.solve(moved, KEEP), plan.solve(moved, KEEP, before.warm)
    same(warm, cold)
    assert warm.steps.sum() < 0.7 * cold.steps.sum()


def test_the_nearest_item_is_found() -> None:
    rng = np.random.default_rng(2)
    n = 12
    plan = Plan(dense_program(np.eye(n) + 0.1, np.concatenate([-np.eye(n), np.ones((1, n))]), 0))
    linear, rhs = rng.normal(size=(20, n)), np.tile(np.concatenate([np.zeros(n), [1.0]]), (20, 1))
    before = plan.solve([linear, rhs], KEEP)
    order = rng.permutation(20)[:7]
    assert before.warm is not None
    found = plan.solve([linear[order], rhs[order]], KEEP, before.warm)
    np.testing.assert_allclose(found.primal, before.primal[order], atol=1e-12)
    assert found.steps.max() <= 1  # nothing to do but to see that it is optimal


def test_another_structure_is_ignored() -> None:
    small = Plan(dense_program(np.eye(3), -np.eye(3), 0)).solve([np.ones((2, 3)), np.zeros((2, 3))], KEEP)
    large = Plan(dense_program(np.eye(4) + 0.1, np.concatenate([-np.eye(4), np.ones((1, 4))]), 0))
    data = [np.ones((2, 4)), np.tile([0.0, 0, 0, 0, 1], (2, 1))]
    same(large.solve(data, KEEP, small.warm), large.solve(data, KEEP))


def test_nothing_is_kept_unless_asked_for() -> None:
    solution = Plan(dense_program(np.eye(3), -np.eye(3), 0)).solve([np.ones((2, 3)), np.zeros((2, 3))], Options())
    assert solution.warm is None
