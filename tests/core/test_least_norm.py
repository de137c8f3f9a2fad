"""Multipliers where active rows are dependent: of least norm, of the right sign, whatever solver was used."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import nnls

from core_programs import dense_program
from generators import random_case
from hsbackend.plan import Plan
from hsbackend.program import QPValues
from hsbackend.solvers import active_set, least_norm
from hsbackend.solvers.result import Options
from hsbackend.status import Status


def distance_from_least_norm(normals: np.ndarray, free: np.ndarray, w: np.ndarray) -> float:
    """Least norm in {N'w = c, w >= 0 where not free}: w = N v + t with t >= 0 on the zeros of what is not free."""
    zero = ~free & (w <= 0.0)
    columns = np.concatenate([normals, -normals, np.eye(len(w))[:, zero]], axis=1)
    return float(nnls(columns, w, maxiter=100 * columns.shape[1])[1]) / (1.0 + float(np.linalg.norm(w)))


def active_rows(rows, rhs, x, equalities):
    slack = np.abs(rhs - rows @ x)
    return (np.arange(len(rhs)) < equalities) | (slack <= 1e-9 * (1.0 + np.abs(rhs)))


@pytest.mark.parametrize("boxed", [False, True])
def test_random_programs(boxed: bool) -> None:
    """Dependent rows, per item and shared; ``boxed`` adds bounds through the solution on some sides."""
    dependent, rng = 0, np.random.default_rng(boxed)
    for seed in range(150):
        case = random_case(seed)
        batch, n, _ = case.shape
        bounded = np.arange(n if boxed else 0)
        room = rng.integers(0, 2, size=(2, batch, len(bounded))).astype(float)
        lower, upper = case.primal[:, bounded] - room[0], case.primal[:, bounded] + room[1]
        values = QPValues(
            case.hessian,
            -case.linear,
            case.rows,
            case.equalities,
            case.rhs,
            bounded,
            lower,
            upper,
            np.zeros(0, dtype=int),
        )
        found = active_set.verify(values, Options(), active_set.solve(values, Options()))
        found = least_norm.refine(values, Options(), found)
        for b in np.flatnonzero(found.status == Status.SOLVED):
            _, _, rows, rhs = case.item(int(b))
            held = active_rows(rows, rhs, found.primal[b], case.equalities)
            side = (room[1, b] == 0.0).astype(float) - ((room[0, b] == 0.0) & (room[1, b] > 0.0))
            at = np.flatnonzero(side)
            normals = np.concatenate([rows[held], np.eye(n)[bounded[at]] * side[at, None]])
            if np.linalg.matrix_rank(normals) == len(normals):
                continue
            w = np.concatenate([found.rows[b, held], found.bounds[b, at] * side[at]])
            free = np.concatenate([np.flatnonzero(held) < case.equalities, lower[b, at] == upper[b, at]])
            assert not found.rows[b, ~held].any()
            assert (w[~free] >= 0.0).all()
            distance = distance_from_least_norm(normals, free, w)
            assert distance < 1e-8, f"seed {seed} item {b}: {distance:.1e}"
            dependent += 1
    assert dependent > 100


@pytest.mark.parametrize("solver", ["active_set", "semismooth_newton"])
def test_a_row_written_twice_shares_its_multiplier(solver: str) -> None:
    """Projection of (2, 1) onto x1 + x2 <= 1, written once and twice as long: 1 = w1 + 2 w2, least norm (0.2, 0.4)."""
    rows = np.array([[1.0, 1.0], [2.0, 2.0], [-1.0, 0.0], [0.0, -1.0]])
    plan = Plan(dense_program(np.eye(2), rows, 0), solver)  # type: ignore[arg-type]
    assert plan.route.solver == solver
    solution = plan.solve([-np.array([[2.0, 1.0]]), np.array([[1.0, 2.0, 0.0, 0.0]])], Options())
    np.testing.assert_allclose(solution.primal, [[1.0, 0.0]], atol=1e-12)
    # x2 = 0 is active as well, with multiplier zero: it may take part.
    w = solution.multipliers[0]
    held = np.array([True, True, False, True])
    assert distance_from_least_norm(rows[held], np.zeros(3, dtype=bool), w[held]) < 1e-9
    np.testing.assert_allclose(w, [0.2, 0.4, 0.0, 0.0], atol=1e-9)


def test_the_sign_decides() -> None:
    """x1 <= 0, x1 + e x2 <= 0, x1 - e x2 <= 0 ...: the unsigned point of least norm has a negative entry here."""
    rows = np.array([[1.0, 0.0], [1.0, 1.0], [3.0, 2.0]])
    normal = 1.0 * rows[0] + 0.05 * rows[1]
    unsigned = np.linalg.pinv(rows.T) @ normal
    assert unsigned.min() < -0.01
    solution = Plan(dense_program(np.eye(2), rows, 0)).solve([-normal[None], np.zeros((1, 3))], Options())
    np.testing.assert_allclose(solution.primal, 0.0, atol=1e-12)
    w = solution.multipliers[0]
    np.testing.assert_allclose(rows.T @ w, normal, atol=1e-10)
    assert (w >= 0.0).all()
    assert distance_from_least_norm(rows, np.zeros(3, dtype=bool), w) < 1e-9


@pytest.mark.parametrize("decades", range(2, 8))
def test_nearly_equal_rows_are_two_rows(decades: int) -> None:
    """Two active rows that differ by 10^-decades, both with multiplier 1.

    A change of the limits by one rounding moves the point by 10^decades of it, and the multipliers by its square.
    """
    rows = np.array([[1.0, 0.5, 0.0], [1.0, 0.5 + 10.0**-decades, 0.0]])
    point = np.ones((1, 3))
    solution = Plan(dense_program(np.eye(3), rows, 0)).solve(
        [-point - rows.sum(axis=0), (rows @ point[0])[None]], Options()
    )
    condition = 10.0**decades
    np.testing.assert_allclose(solution.primal, point, atol=1e-14 * condition)
    np.testing.assert_allclose(solution.multipliers, [[1.0, 1.0]], atol=1e-15 * condition**2)
    plan = Plan(dense_program(np.eye(3), rows, 0))
    adjoint = plan.adjoint(solution, np.array([[0.0, 1.0, 0.0]]), None)
    np.testing.assert_allclose(adjoint.primal, 0.0, atol=1e-15 * condition**2)
