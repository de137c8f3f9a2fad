"""Linear programs and semidefinite Hessians: no wrong answer, the least-norm optimum, and whether there are others.

The judge is not the solver: stationarity of the least-norm point is a non-negative least-squares problem, a second
optimum a linear program for HiGHS.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog, nnls

from core_programs import dense_program
from generators import SemidefiniteCase, semidefinite_case
from hsbackend.plan import Plan, Solution
from hsbackend.solvers.result import Options
from hsbackend.status import Status

EVERY_RUN, NIGHTLY, BLOCK = 400, 6000, 100


def kkt_residual(case: SemidefiniteCase, solution: Solution, b: int) -> float:
    """Largest violation of the KKT conditions of one item, relative to the data."""
    hessian, linear, rows, rhs = case.item(b)
    x, nu, me = solution.primal[b], solution.multipliers[b], case.equalities
    slack = rhs - rows @ x
    parts = [
        hessian @ x + linear + rows.T @ nu, slack[:me], np.minimum(slack[me:], 0.0), np.minimum(nu[me:], 0.0),
        slack[me:] * nu[me:],
    ]  # fmt: skip
    size = 1.0 + np.abs(x).max() + np.abs(linear).max() + np.abs(rhs).max(initial=0.0) + np.abs(nu).max(initial=0.0)
    return max(float(np.abs(part).max(initial=0.0)) for part in parts) / size


def distance_from_least_norm(case: SemidefiniteCase, x: np.ndarray, b: int) -> float:
    """Distance of -x from the normal cone, at x, of the set of optima: zero exactly for the least-norm optimum."""
    hessian, _, rows, rhs = case.item(b)
    tight = (np.arange(len(rhs)) < case.equalities) | (case.multipliers[b] > 0.0)
    weak = ~tight & (np.abs(rhs - rows @ x) <= 1e-8 * (1.0 + np.abs(rhs)))
    lines = np.concatenate([hessian, rows[tight]])
    columns = np.concatenate([lines, -lines, rows[weak]]).T
    if not columns.size:
        return float(np.linalg.norm(x))
    return float(nnls(columns, -x, maxiter=100 * columns.shape[1])[1])


def has_other_optima(case: SemidefiniteCase, b: int) -> bool:
    """Whether the known optimum is one of several, decided by a linear program over the directions between them."""
    hessian, _, rows, rhs = case.item(b)
    tight = (np.arange(len(rhs)) < case.equalities) | (case.multipliers[b] > 0.0)
    weak = ~tight & (np.abs(rhs - rows @ case.primal[b]) <= 1e-9)
    lines = np.concatenate([hessian, rows[tight]])
    n = len(hessian)
    for sign in (1.0, -1.0):
        # A direction d != 0 of the cone has v'd != 0 for almost every v.
        v = sign * np.random.default_rng(b).normal(size=n)
        inequality = {"A_ub": rows[weak], "b_ub": np.zeros(weak.sum())} if weak.any() else {}
        found = linprog(-v, A_eq=lines, b_eq=np.zeros(len(lines)), bounds=[(-1, 1)] * n, **inequality)
        if -found.fun > 1e-6:
            return True
    return False


def check(seed: int) -> tuple[int, int]:
    """Solve one case and assert that every item is right; return how many items are solved, how many not unique."""
    case = semidefinite_case(seed)
    free = frozenset("QqAb") if len(case.hessian) > 1 or seed % 4 == 0 else frozenset("qb")
    plan = Plan(case.program(free))
    assert plan.route.polyhedral, f"seed {seed}: {plan.route}"
    solution = plan.solve(case.parameters(free), Options())
    solved = several = 0
    for b in range(case.shape[0]):
        label = f"seed {seed} item {b}: {Status(int(solution.status[b])).name}"
        if case.infeasible[b] or case.unbounded[b]:
            wanted = Status.INFEASIBLE if case.infeasible[b] else Status.UNBOUNDED
            assert solution.status[b] == wanted, label
            assert np.isnan(solution.primal[b]).all(), label
            continue
        assert solution.status[b] == Status.SOLVED, label
        residual = kkt_residual(case, solution, b)
        assert residual < 1e-9, f"{label}, KKT residual {residual:.1e}"
        distance = distance_from_least_norm(case, solution.primal[b], b)
        assert distance < 1e-7 * (1.0 + np.abs(case.primal[b]).max()), f"{label}, {distance:.1e} from least norm"
        others = has_other_optima(case, b)
        assert solution.non_unique[b] == others, f"{label}, non_unique {solution.non_unique[b]}, truth {others}"
        if not others:
            error = np.abs(solution.primal[b] - case.primal[b]).max() / (1.0 + np.abs(case.primal[b]).max())
            assert error < 1e-8, f"{label}, error {error:.1e}"
        solved, several = solved + 1, several + int(others)
    return solved, several


@pytest.mark.parametrize("first", range(0, EVERY_RUN, BLOCK))
def test_semidefinite_programs(first: int) -> None:
    found = np.array([check(seed) for seed in range(first, first + BLOCK)]).sum(axis=0)
    assert found[1] > 0.1 * found[0]
    assert found[1] < 0.9 * found[0]


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(100_000, 100_000 + NIGHTLY, BLOCK))
def test_many_more_semidefinite_programs(first: int) -> None:
    for seed in range(first, first + BLOCK):
        check(seed)


def test_a_linear_program_at_a_vertex_has_no_derivative_in_its_cost() -> None:
    """On the simplex: a vertex, an edge and the whole set are optimal; the budget is shared evenly among the optima."""
    rows = np.concatenate([np.ones((1, 4)), -np.eye(4)])
    plan = Plan(dense_program(np.zeros((4, 4)), rows, 1))
    costs = np.array([[1.0, 2, 3, 4], [0, 0, 1, 1], [0, 0, 0, 0]])
    solution = plan.solve([costs, np.tile([1.0, 0, 0, 0, 0], (3, 1))], Options())
    expected = [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4]
    np.testing.assert_allclose(solution.primal, expected, atol=1e-11)
    assert list(solution.non_unique) == [False, True, True]
    adjoint = plan.adjoint(solution, np.eye(4)[:3], None)
    np.testing.assert_allclose(adjoint.primal, 0.0, atol=1e-14)
    np.testing.assert_allclose(adjoint.rows[:, 0], [1.0, 0.5, 0.25], atol=1e-12)
