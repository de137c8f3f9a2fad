"""The interior-point method: right answers by other solvers' judgement, verified certificates, independent items.

Residuals and certificates are computed here from the data, never by the code under test.
"""

from __future__ import annotations

import time
from dataclasses import replace

import clarabel
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import linprog

from generators import SemidefiniteCase, random_case, semidefinite_case
from hsbackend.face import DenseFace
from hsbackend.program import QPValues
from hsbackend.solvers import active_set, interior_point, reference
from hsbackend.solvers.interior_point import Problem, active_sides, is_farkas, is_ray
from hsbackend.solvers.result import Options
from hsbackend.status import Status

NONE = np.zeros(0, dtype=np.int64)


def as_values(case) -> QPValues:
    """Write a generated case as values; its bounds stay singleton rows."""
    batch, *_ = case.shape
    return QPValues(
        case.hessian, -case.linear, case.rows, case.equalities, case.rhs, NONE, np.zeros((batch, 0)),
        np.zeros((batch, 0)), NONE,
    )  # fmt: skip


def as_problem(values: QPValues, b: int = 0) -> Problem:
    hessian = values.hessian[b if len(values.hessian) > 1 else 0]
    return Problem(
        np.diag(hessian) if values.diagonal else hessian, values.rhs_primal[b],
        values.rows[b if len(values.rows) > 1 else 0], values.num_equalities, values.rhs_rows[b], values.bounded,
        values.lower[b], values.upper[b],
    )  # fmt: skip


def as_values_of_one(problem: Problem) -> QPValues:
    return QPValues(
        problem.hessian[None], problem.linear[None], problem.rows[None], problem.num_equalities, problem.rhs[None],
        problem.bounded, problem.lower[None], problem.upper[None], NONE,
    )  # fmt: skip


def violation(problem: Problem, x: np.ndarray, rows: np.ndarray, bounds: np.ndarray) -> float:
    """Largest violation of the KKT conditions relative to their largest term; complementarity as a minimum."""
    me = problem.num_equalities
    pull = problem.rows.T @ rows
    pull[problem.bounded] += bounds
    curved = problem.hessian @ x
    force = 1.0 + max(np.abs(part).max(initial=0.0) for part in (curved, problem.linear, pull))
    size = 1.0 + np.abs(x).max(initial=0.0)
    slack = problem.rhs - problem.rows @ x
    finite = np.isfinite(problem.rhs)
    limit = size + np.where(finite, np.abs(problem.rhs), 0.0)
    at = x[problem.bounded]
    pairs = [
        (slack[me:] / limit[me:], rows[me:] / force),
        ((problem.upper - at) / size, np.maximum(bounds, 0.0) / force),
        ((at - problem.lower) / size, np.maximum(-bounds, 0.0) / force),
    ]
    parts = [np.abs(curved - problem.linear + pull) / force, np.abs(slack[:me]) / limit[:me]]
    parts += [np.abs(np.minimum(gap, multiplier)) for gap, multiplier in pairs]
    return max(float(part.max(initial=0.0)) for part in parts)


def objective(problem: Problem, x: np.ndarray) -> float:
    return float(0.5 * x @ (problem.hessian @ x) - problem.linear @ x)


def random_problem(
    seed: int, n: int, m: int, me: int = 0, rank: int | None = None, degenerate: float = 0.3, box: bool = True
) -> tuple[Problem, np.ndarray]:
    """Build a problem around a point and its multipliers; return both. Half of the limits are infinite."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n if rank is None else rank, n))
    hessian = root.T @ root / n + (0.1 * np.eye(n) if rank is None else 0.0)
    rows, x = rng.normal(size=(m, n)), rng.normal(size=n)
    slack = np.where(rng.random(m) < degenerate, 0.0, rng.uniform(0.1, 1.0, m))
    slack[:me] = 0.0
    nu = np.where((slack == 0.0) & (rng.random(m) < 0.7), rng.uniform(0.1, 1.0, m), 0.0)
    nu[:me] = rng.normal(size=me)
    bounded = np.sort(rng.permutation(n)[: n // 2]) if box else NONE
    nb = len(bounded)
    lower = x[bounded] - np.where(rng.random(nb) < degenerate, 0.0, rng.uniform(0.1, 1.0, nb))
    upper = x[bounded] + np.where(rng.random(nb) < degenerate, 0.0, rng.uniform(0.1, 1.0, nb))
    lower[rng.random(nb) < 0.5], upper[rng.random(nb) < 0.5] = -np.inf, np.inf
    mu = np.where(upper == x[bounded], rng.random(nb), 0.0) - np.where(lower == x[bounded], rng.random(nb), 0.0)
    linear = hessian @ x + rows.T @ nu
    linear[bounded] += mu
    return Problem(hessian, linear, rows, me, rows @ x + slack, bounded, lower, upper), x


def scaled(problem: Problem, x: np.ndarray, seed: int, decades: float) -> tuple[Problem, np.ndarray]:
    """Measure variables and rows in random units from 10^-decades to 10^decades."""
    rng = np.random.default_rng([seed, 2])
    units = 10.0 ** rng.uniform(-decades, decades, len(x))
    weights = 10.0 ** rng.uniform(-decades, decades, len(problem.rhs))
    at = units[problem.bounded]
    changed = replace(
        problem, hessian=problem.hessian * units[:, None] * units, linear=problem.linear * units,
        rows=problem.rows * units * weights[:, None], rhs=problem.rhs * weights, lower=problem.lower / at,
        upper=problem.upper / at,
    )  # fmt: skip
    return changed, x / units


def assert_farkas(problem: Problem, rows: np.ndarray, bounds: np.ndarray) -> None:
    """The combination has no normal left, and asks for something negative to be at least zero."""
    limit = np.where(bounds > 0.0, problem.upper, problem.lower)
    used, held = rows != 0.0, bounds != 0.0
    total = problem.rows.T @ rows
    total[problem.bounded] += bounds
    value = problem.rhs[used] @ rows[used] + limit[held] @ bounds[held]
    weight = np.abs(problem.rhs[used] * rows[used]).sum() + np.abs(limit[held] * bounds[held]).sum()
    assert np.all(rows[problem.num_equalities :] >= 0.0)
    assert value < -1e-8 * weight
    assert np.abs(total).max() <= 1e-9 * -value


def assert_ray(problem: Problem, ray: np.ndarray) -> None:
    """The objective falls along the ray, which leaves no row and no limit and has no curvature."""
    ray = ray / np.linalg.norm(ray)
    moved, me = problem.rows @ ray, problem.num_equalities
    assert problem.linear @ ray > 1e-6
    assert np.abs(problem.hessian @ ray).max() <= 1e-10
    assert np.abs(moved[:me]).max(initial=0.0) <= 1e-10
    assert np.all((moved[me:] <= 1e-10) | (problem.rhs[me:] == np.inf))
    assert np.all((ray[problem.bounded] <= 0.0) | (problem.upper == np.inf))
    assert np.all((ray[problem.bounded] >= 0.0) | (problem.lower == -np.inf))


# --- against other solvers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_strictly_convex_problems_have_the_solution_and_multipliers_of_the_other_solvers(seed: int) -> None:
    case = random_case(seed, strict=True)
    values = as_values(case)
    result = interior_point.solve(values, Options())
    assert np.all(result.status == Status.SOLVED)
    others = [reference.solve(values, Options()), active_set.solve(values, Options())]
    for other in others:
        assert np.all(other.status == Status.SOLVED)
        np.testing.assert_allclose(result.primal, other.primal, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(result.rows, other.rows, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(result.primal, case.primal, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_signed_multipliers_of_bounds_agree_with_the_active_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(3, 30)), int(rng.integers(1, 10))
    root = rng.normal(size=(n, n))
    values = QPValues(
        (root.T @ root / n + 0.1 * np.eye(n))[None], 3.0 * rng.normal(size=(2, n)), rng.normal(size=(1, m, n)), 1,
        np.abs(rng.normal(size=(2, m))), np.arange(n), np.full((2, n), -0.5), np.full((2, n), 0.4), NONE,
    )  # fmt: skip
    result, other = interior_point.solve(values, Options()), active_set.solve(values, Options())
    assert np.all(result.status == Status.SOLVED)
    assert np.any(result.bounds > 0.0)
    assert np.any(result.bounds < 0.0)
    np.testing.assert_allclose(result.primal, other.primal, atol=1e-10)
    np.testing.assert_allclose(result.rows, other.rows, atol=1e-8)
    np.testing.assert_allclose(result.bounds, other.bounds, atol=1e-8)
    diagonal = replace(values, hessian=np.einsum("bii->bi", values.hessian).copy())
    result, other = interior_point.solve(diagonal, Options()), active_set.solve(diagonal, Options())
    np.testing.assert_allclose(result.primal, other.primal, atol=1e-10)


def linear_program(seed: int) -> Problem:
    problem, _ = random_problem(seed, 5 + seed % 30, 3 + seed % 40, min(seed % 5, 3), rank=0)
    rng = np.random.default_rng([seed, 1])
    if seed % 5 == 1:  # usually unbounded
        problem = replace(problem, linear=problem.linear + rng.normal(size=len(problem.linear)))
    if seed % 5 == 2:  # infeasible: a row and its opposite, too far apart
        row, limit = problem.rows[-1:], problem.rhs[-1]
        problem = replace(problem, rows=np.concatenate([problem.rows, -row]), rhs=np.append(problem.rhs, -limit - 0.5))
    return problem


@pytest.mark.parametrize("seed", range(60))
def test_linear_programs_end_as_highs_says(seed: int) -> None:
    problem = linear_program(seed)
    n, me = len(problem.linear), problem.num_equalities
    limits = np.stack([np.full(n, -np.inf), np.full(n, np.inf)], axis=1)
    limits[problem.bounded, 0], limits[problem.bounded, 1] = problem.lower, problem.upper
    rows, rhs = problem.rows, problem.rhs
    truth = linprog(
        -problem.linear, A_ub=rows[me:], b_ub=rhs[me:], A_eq=rows[:me], b_eq=rhs[:me], bounds=limits, method="highs"
    )
    found = interior_point.solve_problem(problem, Options())
    assert found.status == {0: Status.SOLVED, 2: Status.INFEASIBLE, 3: Status.UNBOUNDED}[truth.status]
    if found.status == Status.SOLVED:
        assert violation(problem, found.primal, found.rows, found.bounds) <= 1e-12
        assert objective(problem, found.primal) == pytest.approx(truth.fun, rel=1e-9, abs=1e-9)
    elif found.status == Status.INFEASIBLE:
        assert_farkas(problem, found.rows, found.bounds)
    else:
        assert found.ray is not None
        assert_ray(problem, found.ray)


def test_the_linear_programs_above_are_of_every_kind() -> None:
    outcomes = {interior_point.solve_problem(linear_program(seed), Options()).status for seed in range(30)}
    assert outcomes == {Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED}


@pytest.mark.parametrize("seed", range(15))
def test_semidefinite_problems_have_the_value_clarabel_finds(seed: int) -> None:
    n = 5 + 2 * seed
    problem, x = random_problem(seed, n, n, 2, rank=n // 3)
    units = np.eye(n)[problem.bounded]
    upper, lower = np.isfinite(problem.upper), np.isfinite(problem.lower)
    rows = np.concatenate([problem.rows, units[upper], -units[lower]])
    rhs = np.concatenate([problem.rhs, problem.upper[upper], -problem.lower[lower]])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    cones = [clarabel.ZeroConeT(2), clarabel.NonnegativeConeT(len(rhs) - 2)]
    quadratic = sp.csc_matrix(np.triu(problem.hessian))
    other = clarabel.DefaultSolver(quadratic, -problem.linear, sp.csc_matrix(rows), rhs, cones, settings).solve()
    assert str(other.status) == "Solved"
    found = interior_point.solve_problem(problem, Options())
    assert found.status == Status.SOLVED
    assert violation(problem, found.primal, found.rows, found.bounds) <= 1e-12
    assert objective(problem, found.primal) == pytest.approx(other.obj_val, rel=1e-7, abs=1e-7)
    assert objective(problem, found.primal) == pytest.approx(objective(problem, x), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("block", range(4))
def test_degenerate_items_are_never_wrong(block: int) -> None:
    """Any rank from 0 up, dependent, duplicated and empty rows, infeasible and unbounded items in one batch."""
    for seed in range(60 * block, 60 * block + 60):
        case = semidefinite_case(seed) if seed % 2 else random_case(seed, infeasible=seed % 8 == 0)
        values = as_values(case)
        result = interior_point.solve(values, Options())
        for b in range(case.shape[0]):
            problem = as_problem(values, b)
            unbounded = isinstance(case, SemidefiniteCase) and case.unbounded[b]
            label = f"seed {seed} item {b}: {Status(int(result.status[b])).name}"
            if case.infeasible[b]:
                assert result.status[b] == Status.INFEASIBLE, label
                assert_farkas(problem, result.rows[b], result.bounds[b])
            elif unbounded:
                assert result.status[b] == Status.UNBOUNDED, label
                found = interior_point.solve_problem(problem, Options())
                assert found.ray is not None
                assert_ray(problem, found.ray)
            else:
                assert result.status[b] == Status.SOLVED, label
                assert violation(problem, result.primal[b], result.rows[b], result.bounds[b]) <= 1e-11, label
                value, known = objective(problem, result.primal[b]), objective(problem, case.primal[b])
                assert value == pytest.approx(known, rel=1e-9, abs=1e-9), label


# --- kinds of data ------------------------------------------------------------------------------------------------


def test_dependent_equalities() -> None:
    problem, x = random_problem(3, 8, 3, 3, box=False)
    rows = np.concatenate([problem.rows, problem.rows[:1] + problem.rows[1:2], 2.0 * problem.rows[2:]])
    rhs = rows @ x
    several = replace(problem, rows=rows, rhs=rhs, num_equalities=5)
    found, alone = (interior_point.solve_problem(part, Options()) for part in (several, problem))
    assert found.status == Status.SOLVED
    np.testing.assert_allclose(found.primal, alone.primal, atol=1e-12)
    np.testing.assert_allclose(rows.T @ found.rows, problem.rows.T @ alone.rows, atol=1e-10)
    rhs = rhs.copy()
    rhs[3] += 1e-3
    contradiction = replace(several, rhs=rhs)
    found = interior_point.solve_problem(contradiction, Options())
    assert found.status == Status.INFEASIBLE
    assert_farkas(contradiction, found.rows, found.bounds)


@pytest.mark.parametrize("rank", [None, 0, 4])
def test_fixed_variables_take_what_is_left_of_the_gradient(rank: int | None) -> None:
    problem, x = random_problem(7, 10, 12, 2, rank=rank)
    bounded = np.arange(10)
    lower, upper = np.full(10, -5.0), np.full(10, 5.0)
    lower[:4] = upper[:4] = x[:4]
    # The gradient of a known optimum, and on top what only the fixed variables can hold.
    gradient = problem.linear + np.array([1.7, -1.0, 0.4, 2.0] + [0.0] * 6)
    problem = replace(problem, linear=gradient, bounded=bounded, lower=lower, upper=upper)
    found = interior_point.solve_problem(problem, Options())
    assert found.status == Status.SOLVED
    np.testing.assert_array_equal(found.primal[:4], x[:4])
    assert np.abs(found.bounds[:4]).max() > 1e-3
    assert violation(problem, found.primal, found.rows, found.bounds) <= 1e-12
    everything = replace(problem, lower=x, upper=x)
    found = interior_point.solve_problem(everything, Options())
    assert found.status == Status.SOLVED
    np.testing.assert_array_equal(found.primal, x)
    outside = replace(everything, lower=x + 1.0, upper=x + 1.0)
    found = interior_point.solve_problem(outside, Options())
    assert found.status == Status.INFEASIBLE
    assert_farkas(outside, found.rows, found.bounds)


def test_limits_that_are_infinite_and_rows_that_are_empty_change_nothing() -> None:
    problem, _ = random_problem(11, 6, 8, 1)
    alone = interior_point.solve_problem(problem, Options())
    rows = np.concatenate([problem.rows, np.zeros((2, 6)), np.ones((1, 6))])
    more = replace(problem, rows=rows, rhs=np.concatenate([problem.rhs, [0.0, 3.0, np.inf]]))
    found = interior_point.solve_problem(more, Options())
    assert found.status == Status.SOLVED
    np.testing.assert_allclose(found.primal, alone.primal, atol=1e-12)
    np.testing.assert_array_equal(found.rows[-3:], 0.0)


def test_problems_without_rows_or_limits_or_variables() -> None:
    problem, x = random_problem(2, 5, 0, box=False)
    found = interior_point.solve_problem(problem, Options())
    assert found.status == Status.SOLVED
    np.testing.assert_allclose(found.primal, x, atol=1e-12)
    nothing = Problem(
        np.zeros((0, 0)), np.zeros(0), np.zeros((2, 0)), 1, np.array([0.0, 1.0]), NONE, *2 * [np.zeros(0)]
    )
    found = interior_point.solve_problem(nothing, Options())
    assert found.status == Status.SOLVED
    assert found.primal.shape == (0,)
    found = interior_point.solve_problem(replace(nothing, rhs=np.array([1.0, 1.0])), Options())
    assert found.status == Status.INFEASIBLE
    empty = as_values_of_one(problem).take(NONE)
    assert interior_point.solve(empty, Options()).primal.shape == (0, 5)


def test_rows_no_point_can_meet_are_named() -> None:
    problem, _ = random_problem(2, 4, 3, box=False)
    bounded, limit = np.arange(4), np.full(4, np.inf)
    crossing = replace(problem, bounded=bounded, lower=np.array([0.0, 0.0, 2.0, 0.0]), upper=np.ones(4))
    found = interior_point.solve_problem(crossing, Options())
    assert found.status == Status.INFEASIBLE
    np.testing.assert_array_equal(found.bounds, [0.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(found.rows, 0.0)
    empty = replace(problem, rows=np.concatenate([problem.rows, np.zeros((1, 4))]), rhs=np.append(problem.rhs, -1.0))
    found = interior_point.solve_problem(empty, Options())
    assert found.status == Status.INFEASIBLE
    np.testing.assert_array_equal(found.rows, [0.0, 0.0, 0.0, 1.0])
    for change in ({"rhs": np.append(problem.rhs[:-1], -np.inf)}, {"bounded": bounded, "lower": limit, "upper": limit}):
        assert interior_point.solve_problem(replace(problem, **change), Options()).status == Status.INFEASIBLE


@pytest.mark.parametrize("rank", [None, 0, 5])
@pytest.mark.parametrize("seed", range(8))
def test_badly_scaled_data(seed: int, rank: int | None) -> None:
    """Units of variables and rows from 1e-3 to 1e3: entries of the rows from 1e-6 to 1e6."""
    problem, x = random_problem(seed, 15, 20, 3, rank=rank)
    problem, x = scaled(problem, x, seed, 3.0)
    found = interior_point.solve_problem(problem, Options())
    assert found.status == Status.SOLVED
    assert violation(problem, found.primal, found.rows, found.bounds) <= 1e-12
    assert objective(problem, found.primal) == pytest.approx(objective(problem, x), rel=1e-9)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("part", ["cost", "limits"])
def test_large_and_small_costs_and_limits(part: str, factor: float) -> None:
    problem, _ = random_problem(5, 12, 20, 2, degenerate=0.1)
    alone = interior_point.solve_problem(problem, Options())
    if part == "cost":
        problem = replace(problem, hessian=factor * problem.hessian, linear=factor * problem.linear)
        multiple = 1.0
    else:
        linear, rhs = factor * problem.linear, factor * problem.rhs
        problem = replace(problem, linear=linear, rhs=rhs, lower=factor * problem.lower, upper=factor * problem.upper)
        multiple = factor
    found = interior_point.solve_problem(problem, Options())
    assert found.status == Status.SOLVED
    np.testing.assert_allclose(found.primal, multiple * alone.primal, rtol=1e-8, atol=1e-8 * multiple)
    np.testing.assert_allclose(found.rows, factor * alone.rows, rtol=1e-7, atol=1e-7 * factor)


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 0, 150])
def test_dense_with_500_variables(rank: int | None) -> None:
    problem, x = random_problem(1, 500, 400, 50, rank=rank)
    found = interior_point.solve_problem(problem, Options())
    assert found.status == Status.SOLVED
    assert violation(problem, found.primal, found.rows, found.bounds) <= 1e-12
    assert objective(problem, found.primal) == pytest.approx(objective(problem, x), rel=1e-10)


def sparse_problem(seed: int, n: int, m: int, me: int, quadratic: bool = True) -> tuple[Problem, np.ndarray]:
    """Rows with four neighbouring entries, half of the variables without curvature of their own."""
    rng = np.random.default_rng(seed)
    places = (np.repeat(rng.integers(0, n, m), 4) + rng.integers(0, 8, 4 * m)) % n
    rows = sp.csr_array((rng.normal(size=4 * m), (np.repeat(np.arange(m), 4), places)), shape=(m, n))
    steps = sp.eye_array(n) - sp.eye_array(n, k=1)
    hessian = sp.diags_array((rng.random(n) < 0.5).astype(float)) + 0.1 * steps.T @ steps
    hessian = sp.csc_array(hessian if quadratic else sp.csc_array((n, n)))
    x = rng.normal(size=n)
    slack = np.where(rng.random(m) < 0.3, 0.0, rng.uniform(0.1, 1.0, m))
    slack[:me] = 0.0
    nu = np.where(slack == 0.0, rng.random(m), 0.0)
    nu[:me] = rng.normal(size=me)
    lower = x - np.where(rng.random(n) < 0.2, 0.0, rng.uniform(0.1, 1.0, n))
    mu = -np.where(lower == x, rng.random(n), 0.0)
    linear = hessian @ x + rows.T @ nu + mu
    return Problem(hessian, linear, rows, me, rows @ x + slack, np.arange(n), lower, np.full(n, np.inf)), x


def test_sparse_with_2000_variables() -> None:
    problem, x = sparse_problem(0, 2000, 4000, 200)
    began = time.perf_counter()
    found = interior_point.solve_problem(problem, Options())
    assert time.perf_counter() - began < 20.0
    assert found.status == Status.SOLVED
    assert violation(problem, found.primal, found.rows, found.bounds) <= 1e-12
    assert objective(problem, found.primal) == pytest.approx(objective(problem, x), rel=1e-10)


@pytest.mark.parametrize("quadratic", [True, False])
def test_sparse_and_dense_systems_give_the_same(quadratic: bool) -> None:
    problem, x = sparse_problem(1, 320, 500, 20, quadratic)
    matrices = interior_point._Matrices.build(problem.hessian, problem.rows)
    assert isinstance(
        interior_point._system(interior_point._Item(problem, matrices).scaled), interior_point._SparseSystem
    )
    sparse = interior_point.solve_problem(problem, Options())
    filled = replace(problem, hessian=problem.hessian.toarray(), rows=problem.rows.toarray())
    small = replace(filled, rows=filled.rows + 1e-300)  # no zero left: dense storage, the same numbers
    dense = interior_point.solve_problem(small, Options())
    through_values = interior_point.solve(as_values_of_one(filled), Options())
    for found in (sparse, dense):
        assert found.status == Status.SOLVED
        assert violation(problem, found.primal, found.rows, found.bounds) <= 1e-12
        assert objective(problem, found.primal) == pytest.approx(objective(problem, x), rel=1e-10)
    np.testing.assert_array_equal(through_values.primal[0], sparse.primal)
    if quadratic:
        np.testing.assert_allclose(sparse.primal, dense.primal, atol=1e-8)


def test_sparse_matrices_whose_factors_fill_in_are_solved_as_dense_ones() -> None:
    rng = np.random.default_rng(0)
    n, m, me = 320, 300, 20
    rows = sp.random_array((m, n), density=0.1, rng=rng, data_sampler=rng.standard_normal, format="csr")
    x = rng.normal(size=n)
    slack = np.where(np.arange(m) < 100, 0.0, 1.0)
    linear = x + rows.T @ np.where(slack == 0.0, 1.0, 0.0)
    nothing = np.zeros(0)
    problem = Problem(sp.eye_array(n, format="csc"), linear, rows, me, rows @ x + slack, NONE, nothing, nothing)
    matrices = interior_point._Matrices.build(problem.hessian, problem.rows)
    assert sp.issparse(matrices.rows)
    assert isinstance(
        interior_point._system(interior_point._Item(problem, matrices).scaled), interior_point._DenseSystem
    )
    found = interior_point.solve_problem(problem, Options())
    assert found.status == Status.SOLVED
    np.testing.assert_allclose(found.primal, x, atol=1e-11)


def test_sparse_problems_without_an_optimum() -> None:
    problem, _ = sparse_problem(2, 400, 300, 20)
    rows, rhs = (
        sp.csr_array(sp.vstack([problem.rows, -problem.rows[[250]]])),
        np.append(problem.rhs, -problem.rhs[250] - 1),
    )
    infeasible = replace(problem, rows=rows, rhs=rhs)
    found = interior_point.solve_problem(infeasible, Options())
    assert found.status == Status.INFEASIBLE
    assert_farkas(infeasible, found.rows, found.bounds)
    # A variable that only relaxes rows, and is paid for.
    column = sp.csr_array(-np.abs(np.random.default_rng(0).normal(size=(300, 1))) * (np.arange(300) >= 20)[:, None])
    unbounded = Problem(
        sp.csc_array(sp.block_diag([problem.hessian, sp.csc_array((1, 1))])), np.append(problem.linear, 1.0),
        sp.csr_array(sp.hstack([problem.rows, column])), 20, problem.rhs, problem.bounded, problem.lower, problem.upper,
    )  # fmt: skip
    found = interior_point.solve_problem(unbounded, Options())
    assert found.status == Status.UNBOUNDED
    assert found.ray is not None
    assert_ray(unbounded, found.ray)
    indefinite = replace(problem, hessian=sp.csc_array(problem.hessian - 0.5 * sp.eye_array(400)))
    assert interior_point.solve_problem(indefinite, Options()).status == Status.NOT_STRICTLY_CONVEX


# --- items of a batch ---------------------------------------------------------------------------------------------


def mixed_batch(shared: bool) -> QPValues:
    """Items: solvable, infeasible, unbounded, NaN, solvable, and, where matrices are per item, indefinite."""
    rng = np.random.default_rng(4)
    n, count = 5, 6
    hessian = np.diag([1.0, 2.0, 1.0, 0.5, 0.0])
    rows = np.concatenate([rng.normal(size=(4, n)), -np.eye(n)[4:]])
    rows[:4, 4] = -np.abs(rows[:4, 4])
    rows[1] = -rows[0]
    linear = rng.normal(size=(count, n))
    linear[:, 4] = -20.0
    rhs = np.tile([1.0, 1.0, 2.0, 3.0, 0.0], (count, 1)) + 0.1 * rng.random((count, 5))
    rows[1, 4] = -rows[0, 4]
    rhs[1, 1] = -2.0  # with row 0: at most 1 and at least 2
    linear[2, 4] = 20.0
    rows[:2, 4] = 0.0
    linear[3, 1] = np.nan
    hessians, normals = (np.tile(part, (1 if shared else count, 1, 1)) for part in (hessian, rows))
    if not shared:
        hessians[5, 0, 0] = -1.0
    bounded = np.array([1])
    lower, upper = np.full((count, 1), -3.0), np.full((count, 1), np.inf)
    return QPValues(hessians, linear, normals, 0, rhs, bounded, lower, upper, NONE)


@pytest.mark.parametrize("shared", [True, False])
def test_items_of_every_outcome_in_one_batch(shared: bool) -> None:
    values = mixed_batch(shared)
    result = interior_point.solve(values, Options())
    last = Status.SOLVED if shared else Status.NOT_STRICTLY_CONVEX
    expected = [
        Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED, Status.INVALID_INPUT, Status.SOLVED, last,
    ]  # fmt: skip
    np.testing.assert_array_equal(result.status, expected)
    assert result.face is None
    assert_farkas(as_problem(values, 1), result.rows[1], result.bounds[1])
    ray = interior_point.solve_problem(as_problem(values, 2), Options()).ray
    assert ray is not None
    assert_ray(as_problem(values, 2), ray)
    for b, status in enumerate(expected):
        assert np.isnan(result.primal[b]).all() == (status != Status.SOLVED)
        if status == Status.SOLVED:
            assert violation(as_problem(values, b), result.primal[b], result.rows[b], result.bounds[b]) <= 1e-13
        alone = interior_point.solve(values.take(np.array([b])), Options())
        for name in ("primal", "rows", "bounds", "status", "steps"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(result, name)[b])


@pytest.mark.parametrize("name", ["hessian", "rhs_primal", "rows", "rhs_rows", "lower", "upper"])
def test_nan_is_the_fault_of_the_input_of_its_item(name: str) -> None:
    problems = [random_problem(seed, 6, 5, 1) for seed in (0, 1)]
    first = as_values_of_one(problems[0][0])
    values = QPValues(
        np.tile(first.hessian, (2, 1, 1)), np.tile(first.rhs_primal, (2, 1)), np.tile(first.rows, (2, 1, 1)), 1,
        np.tile(first.rhs_rows, (2, 1)), first.bounded, np.tile(first.lower, (2, 1)), np.tile(first.upper, (2, 1)),
        NONE,
    )  # fmt: skip
    getattr(values, name)[0].ravel()[-1:] = np.nan
    if getattr(values, name)[0].ndim == 2:
        getattr(values, name)[0, -1, -1] = np.nan
    result = interior_point.solve(values, Options())
    np.testing.assert_array_equal(result.status, [Status.INVALID_INPUT, Status.SOLVED])
    np.testing.assert_array_equal(result.primal[1], interior_point.solve(first, Options()).primal[0])
    assert np.isnan(result.primal[0]).all()


def test_infinite_numbers_where_finite_ones_are_needed() -> None:
    problem, _ = random_problem(0, 6, 5, 1)
    for change in (
        {"linear": np.full(6, np.inf)}, {"rhs": np.full(5, np.inf)}, {"rows": np.full((5, 6), np.inf)},
    ):  # fmt: skip
        assert interior_point.solve_problem(replace(problem, **change), Options()).status == Status.INVALID_INPUT


def test_an_accuracy_out_of_reach_is_reported() -> None:
    problem, _ = random_problem(0, 30, 40, 3)
    found = interior_point.solve_problem(problem, Options(tolerance=1e-19))
    assert found.status == Status.NOT_CONVERGED
    assert np.isnan(found.primal).all()
    assert interior_point.solve_problem(problem, Options(tolerance=1e-12)).status == Status.SOLVED


# --- sides and certificates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_active_sides_are_those_of_the_reference(seed: int) -> None:
    values = as_values(random_case(seed, strict=True))
    result = interior_point.solve(values, Options())
    side_rows, side_bounds = active_sides(values, result.primal, result.rows, result.bounds)
    face = reference.solve(values, Options()).face
    assert isinstance(face, DenseFace)
    assert side_rows.dtype == side_bounds.dtype == np.int64
    np.testing.assert_array_equal(side_rows, face.active_rows)


def test_active_sides_of_bounds_and_of_failed_items() -> None:
    values = QPValues(
        np.ones((1, 4)), np.array([[-2.0, 2.0, 0.0, 1.0]] * 2), np.zeros((1, 1, 4)), 1, np.zeros((2, 1)), np.arange(4),
        np.array([[-1.0, -1.0, -1.0, 3.0]] * 2), np.array([[1.0, 1.0, 1.0, 3.0]] * 2), NONE,
    )  # fmt: skip
    result = interior_point.solve(values, Options())
    np.testing.assert_allclose(result.primal[0], [-1.0, 1.0, 0.0, 3.0], atol=1e-14)
    np.testing.assert_allclose(result.bounds[0], [-1.0, 1.0, 0.0, -2.0], atol=1e-13)
    result.primal[1] = result.rows[1] = result.bounds[1] = np.nan
    side_rows, side_bounds = active_sides(values, result.primal, result.rows, result.bounds)
    np.testing.assert_array_equal(side_bounds, [[-1, 1, 0, -1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(side_rows, [[1], [1]])
    # A face built from them solves the KKT system of the item.
    face = DenseFace(values, side_rows, side_bounds)
    moved = face.kkt_solve(np.ones((2, 4)), np.zeros((2, 1)), np.zeros((2, 4))).primal
    np.testing.assert_allclose(moved[0], [0.0, 0.0, 1.0, 0.0], atol=1e-14)


def test_what_is_not_a_certificate_is_refused() -> None:
    # x <= 1 and -x <= -2 conflict; every y is free to grow.
    rows = np.array([[1.0, 0.0], [-1.0, 0.0]])
    problem = Problem(
        np.diag([1.0, 0.0]), np.array([0.0, 1.0]), rows, 0, np.array([1.0, -2.0]), NONE, *2 * [np.zeros(0)]
    )
    nothing = np.zeros(0)
    assert is_farkas(problem, np.array([2.0, 2.0]), nothing)
    assert not is_farkas(problem, np.array([2.0, 2.0 + 1e-6]), nothing)  # a normal is left
    assert not is_farkas(problem, np.array([-2.0, -2.0]), nothing)
    assert not is_farkas(problem, np.zeros(2), nothing)
    assert not is_farkas(replace(problem, rhs=np.array([2.0, -2.0])), np.array([2.0, 2.0]), nothing)
    assert not is_farkas(problem, np.array([np.nan, 2.0]), nothing)
    assert is_ray(problem, np.array([0.0, 3.0]))
    for ray in ([0.0, -1.0], [1e-3, 1.0], [0.0, 0.0], [np.nan, 1.0]):
        assert not is_ray(problem, np.array(ray))
    limited = replace(problem, bounded=np.array([1]), lower=np.array([-np.inf]), upper=np.array([1e9]))
    assert not is_ray(limited, np.array([0.0, 1.0]))
    assert not is_ray(replace(problem, hessian=np.diag([1.0, 1e-3])), np.array([0.0, 1.0]))
    # Conflict and ray: infeasible, not unbounded.
    assert interior_point.solve_problem(problem, Options()).status == Status.INFEASIBLE
