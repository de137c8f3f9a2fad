"""Presolve: what is eliminated, and that nothing of the answer is lost."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from generators import random_case
from hsbackend.plan import Plan
from hsbackend.program import AffineMap, MatrixEntries, Program
from hsbackend.reduce import eliminate_varying, find_bounds, reduce_constant
from hsbackend.solvers.result import Options
from hsbackend.status import Status


def constant(values: np.ndarray, sizes: tuple[int, ...]) -> AffineMap:
    """Return a map without parameters."""
    values = np.asarray(values, dtype=float).ravel()
    width = sum(sizes) + 1
    place = (np.arange(values.size), np.full(values.size, width - 1))
    return AffineMap(sp.csr_array((values, place), shape=(values.size, width)), sizes)


def sparse(matrix: np.ndarray, sizes: tuple[int, ...]) -> MatrixEntries:
    """Return the non-zeros of a constant matrix."""
    rows, columns = np.nonzero(matrix)
    return MatrixEntries(
        matrix.shape, rows.astype(np.int64), columns.astype(np.int64), constant(matrix[rows, columns], sizes)
    )


def square_of_residual(r: np.ndarray, y: np.ndarray, parameter: bool) -> Program:
    """``minimise 1/2 ||t||^2, R x - t = y, x >= 0`` in the order (x, t); R is a parameter or a constant."""
    k, n = r.shape
    sizes = (k * n,) if parameter else ()
    full = np.concatenate([np.concatenate([r, -np.eye(k)], axis=1), np.eye(n, n + k) * -1.0])
    matrix = sparse(full, sizes)
    if parameter:
        grid = np.indices((k, n)).reshape(2, -1)
        extra = np.concatenate([-np.eye(k), np.zeros((n, k))]), np.concatenate([np.zeros((k, n)), -np.eye(n)])
        rest = sparse(np.concatenate([extra[1], extra[0]], axis=1), sizes)
        moving = sp.csr_array((np.ones(k * n), (np.arange(k * n), np.arange(k * n))), shape=(k * n, k * n + 1))
        matrix = MatrixEntries(
            full.shape,
            np.concatenate([grid[0], rest.rows]),
            np.concatenate([grid[1], rest.columns]),
            AffineMap(sp.vstack([moving, sp.csr_array(rest.values.matrix)]), sizes),
        )
    quadratic = np.zeros((n + k, n + k))
    quadratic[n:, n:] = np.eye(k)
    return Program(
        n + k, k, sparse(quadratic, sizes), constant(np.zeros(n + k), sizes), matrix,
        constant(np.concatenate([y, np.zeros(n)]), sizes), np.arange(n + k) < n,
        tuple(f"row {i}" for i in range(k + n)),
    )  # fmt: skip


@pytest.mark.parametrize("parameter", [False, True], ids=["constant R", "parameter R"])
def test_the_square_of_a_residual_comes_back_as_a_quadratic(parameter: bool) -> None:
    rng = np.random.default_rng(0)
    r, y = rng.normal(size=(6, 4)), rng.normal(size=6)
    program = square_of_residual(r, y, parameter)
    reduced, steps = reduce_constant(program)
    if parameter:
        assert not steps
        last = eliminate_varying(reduced)
        assert last is not None
        assert len(last.gone) == 6
        assert last.remaining.num_variables == 4
    else:
        assert [len(step.gone) for step in steps] == [6]
        np.testing.assert_allclose(reduced.quadratic.dense([])[0], r.T @ r, atol=1e-14)
    solution = Plan(program).solve([r.reshape(1, -1)] if parameter else [], Options())
    assert solution.status[0] == Status.SOLVED
    x, t = solution.primal[0, :4], solution.primal[0, 4:]
    gradient = r.T @ (r @ x - y)
    np.testing.assert_allclose(t, r @ x - y, atol=1e-13)
    assert x.min() >= -1e-15
    np.testing.assert_allclose(np.minimum(x, gradient), 0.0, atol=1e-13)
    # Stationarity in the full program, multipliers of the eliminated rows included.
    matrix = np.concatenate([np.concatenate([r, -np.eye(6)], axis=1), -np.eye(4, 10)])
    cost = np.concatenate([np.zeros(4), t])
    np.testing.assert_allclose(cost + matrix.T @ solution.multipliers[0], 0.0, atol=1e-12)


def test_a_diagonal_hessian_is_not_filled() -> None:
    """``1'x = 1`` defines any of its variables, but eliminating one would make Q dense without need."""
    n = 5
    sizes = ()
    rows = np.ones((1, n))
    program = Program(
        n, 1, sparse(np.eye(n), sizes), constant(np.zeros(n), sizes), sparse(rows, sizes), constant(np.ones(1), sizes),
        np.ones(n, dtype=bool), ("row 0",),
    )  # fmt: skip
    reduced, steps = reduce_constant(program)
    assert not steps
    assert reduced.num_variables == n
    np.testing.assert_allclose(Plan(program).solve([], Options()).primal, np.full((1, n), 0.2), atol=1e-15)


def test_the_tightest_of_several_bounds_counts_and_gets_the_multiplier() -> None:
    """x <= 3, 2x <= 1, -x <= 4, x <= b with b per item; pulled upwards."""
    sizes = (1,)
    rows = np.array([[1.0], [2.0], [-1.0], [1.0]])
    rhs = AffineMap(sp.csr_array(np.array([[0, 3.0], [0, 1.0], [0, 4.0], [1.0, 0]])), sizes)
    program = Program(
        1, 0, sparse(np.eye(1), sizes), constant(np.array([-9.0]), sizes), sparse(rows, sizes), rhs,
        np.ones(1, dtype=bool), tuple("abcd"),
    )  # fmt: skip
    bounds = find_bounds(program)
    assert list(bounds.variables) == [0]
    assert not bounds.plain
    solution = Plan(program).solve([np.array([[2.0], [0.25]])], Options())
    np.testing.assert_allclose(solution.primal, [[0.5], [0.25]])
    np.testing.assert_allclose(solution.multipliers, [[0, 4.25, 0, 0], [0, 0, 0, 8.75]])


def test_crossing_bounds_are_named() -> None:
    sizes = (1,)
    rows = np.array([[1.0], [-1.0]])
    rhs = AffineMap(sp.csr_array(np.array([[1.0, 0.0], [0.0, 0.0]])), sizes)  # 0 <= x <= b
    program = Program(
        1, 0, sparse(np.eye(1), sizes), constant(np.zeros(1), sizes), sparse(rows, sizes), rhs, np.ones(1, dtype=bool),
        ("above", "below"),
    )  # fmt: skip
    solution = Plan(program).solve([np.array([[1.0], [-1.0]])], Options())
    assert list(solution.status) == [Status.SOLVED, Status.INFEASIBLE]
    assert solution.conflicts == {1: [0, 1]}


@pytest.mark.parametrize("seed", range(25))
def test_rows_may_be_permuted_and_scaled(seed: int) -> None:
    """The answer does not depend on the order of the inequality rows or on positive factors."""
    case = random_case(seed, per_item=False)
    rng = np.random.default_rng(seed)
    me, m = case.equalities, case.shape[2]
    order = np.concatenate([rng.permutation(me), me + rng.permutation(m - me)]).astype(int)
    factor = rng.uniform(0.2, 5.0, m)
    plain = Plan(case.program()).solve(case.parameters(), Options())
    case.rows = case.rows[:, order] * factor[None, :, None]
    case.rhs = case.rhs[:, order] * factor
    other = Plan(case.program()).solve(case.parameters(), Options())
    np.testing.assert_allclose(other.primal, plain.primal, atol=1e-9)
