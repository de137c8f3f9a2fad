"""Random programs with known answers: no wrong answer, whatever the structure, degeneracy or redundancy.

2,400 programs of three items each in CI; the seed of a failing program is in the assertion message.
"""

from __future__ import annotations

import numpy as np
import pytest

from generators import Case, random_case
from hsbackend.plan import Plan, Solution
from hsbackend.solvers.result import Options
from hsbackend.status import Status

BLOCK = 200


def kkt_residual(case: Case, solution: Solution, b: int) -> float:
    """Largest violation of the KKT conditions of one item, computed from the data alone, relative to their size."""
    hessian, linear, rows, rhs = case.item(b)
    x, nu = solution.primal[b], solution.multipliers[b]
    me = case.equalities
    slack = rhs - rows @ x
    parts = [
        hessian @ x + linear + rows.T @ nu,
        slack[:me],
        np.minimum(slack[me:], 0.0),
        np.minimum(nu[me:], 0.0),
        slack[me:] * nu[me:],
    ]
    size = 1.0 + np.abs(x).max() + np.abs(linear).max() + np.abs(rhs).max(initial=0.0) + np.abs(nu).max(initial=0.0)
    return max(float(np.abs(part).max(initial=0.0)) for part in parts) / size


def check(case: Case, solution: Solution, seed: int) -> None:
    """Assert that every item is right."""
    for b in range(case.shape[0]):
        if case.infeasible[b]:
            assert solution.status[b] == Status.INFEASIBLE, f"seed {seed} item {b}: {Status(solution.status[b]).name}"
            assert np.isnan(solution.primal[b]).all(), f"seed {seed} item {b}: a number for an infeasible item"
            continue
        assert solution.status[b] == Status.SOLVED, f"seed {seed} item {b}: {Status(solution.status[b]).name}"
        size = 1.0 + np.abs(case.primal[b]).max()
        error = np.abs(solution.primal[b] - case.primal[b]).max() / size
        assert error < 1e-8, f"seed {seed} item {b}: error {error:.1e}"
        residual = kkt_residual(case, solution, b)
        assert residual < 1e-9, f"seed {seed} item {b}: KKT residual {residual:.1e}"


@pytest.mark.parametrize("block", range(10))
def test_constant_and_varying_matrices(block: int) -> None:
    """Constant matrices are factored once, varying ones per item: both give the known answer."""
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        case = random_case(seed, infeasible=seed % 10 == 0)
        varying = len(case.hessian) > 1 or seed % 3 == 0
        free = frozenset("QqAb") if varying else frozenset("qb")
        plan = Plan(case.program(free))
        assert plan.route.polyhedral, f"seed {seed}: {plan.route.reason}"
        check(case, plan.solve(case.parameters(free), Options()), seed)


@pytest.mark.parametrize("solver", ["active_set", "reference"])
def test_every_solver(solver: str) -> None:
    """The general solvers agree with the known answer on problems Newton would take."""
    for seed in range(50_000, 50_000 + BLOCK):
        case = random_case(seed, per_item=False)
        plan = Plan(case.program(), solver)  # type: ignore[arg-type]
        check(case, plan.solve(case.parameters(), Options()), seed)


@pytest.mark.parametrize(
    ("seed", "infeasible"),
    [
        (218, False),  # a dependent row with a computed pivot of 3e-11: wrong sign of a multiplier
        (1_012_600, True),  # a full working set: a thirteenth row in twelve dimensions looked independent
    ],
)
def test_seeds_that_were_wrong_once(seed: int, infeasible: bool) -> None:
    """Programs that found a fault, kept."""
    case = random_case(seed, infeasible=infeasible)
    free = frozenset("QqAb") if len(case.hessian) > 1 else frozenset("qb")
    check(case, Plan(case.program(free)).solve(case.parameters(free), Options()), seed)


def test_single_items_equal_the_batch() -> None:
    """Item i of a batch is the same as item i alone: no item leaks into another."""
    for seed in range(60_000, 60_060):
        case = random_case(seed, infeasible=True)
        varying = len(case.hessian) > 1
        free = frozenset("QqAb") if varying else frozenset("qb")
        plan = Plan(case.program(free))
        whole = plan.solve(case.parameters(free), Options())
        for b in range(case.shape[0]):
            alone = [value[b : b + 1] if len(value) > 1 else value for value in case.parameters(free)]
            single = plan.solve(alone, Options())
            np.testing.assert_array_equal(single.status, whole.status[b : b + 1], err_msg=f"seed {seed}")
            np.testing.assert_allclose(single.primal[0], whole.primal[b], rtol=0, atol=1e-12, err_msg=f"seed {seed}")


@pytest.mark.nightly
def test_many_more() -> None:
    """The same, on 30,000 fresh seeds."""
    for seed in range(1_000_000, 1_030_000):
        case = random_case(seed, infeasible=seed % 10 == 0)
        free = frozenset("QqAb") if len(case.hessian) > 1 else frozenset("qb")
        check(case, Plan(case.program(free)).solve(case.parameters(free), Options()), seed)
