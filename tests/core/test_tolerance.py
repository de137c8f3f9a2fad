"""What SOLVED promises: residuals that units cannot hide, points that no certificate contradicts."""

from __future__ import annotations

import numpy as np
import pytest

from core_programs import dense_program
from hsbackend.plan import Plan
from hsbackend.program import QPValues
from hsbackend.solvers import active_set, interior_point, semidefinite
from hsbackend.solvers.result import Options
from hsbackend.status import Status


def problem(
    hessian: np.ndarray, linear: np.ndarray, rows: np.ndarray, rhs: np.ndarray, lower: float = -np.inf
) -> QPValues:
    """Write one item ``1/2 x'Hx - a'x``, ``rows x <= rhs``, with a lower limit for the first variable."""
    none = np.zeros(0, dtype=np.int64)
    return QPValues(
        hessian[None], linear[None], rows.reshape(1, -1, len(linear)), 0, rhs[None], np.zeros(1, dtype=np.int64),
        np.full((1, 1), lower), np.full((1, 1), np.inf), none,
    )  # fmt: skip


def residual(values: QPValues, x: np.ndarray, rows: np.ndarray, bound: float = 0.0) -> float:
    found = active_set.residuals(values, x[None], rows[None], np.full((1, 1), bound))
    return float(found[2][0])


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
def test_a_variable_without_curvature_is_no_excuse(length: float) -> None:
    """Its cost is not balanced by anything; its unit is unknown, and must not make it small."""
    hessian = np.diag([1.0, 2.0, 0.0]) / length**2
    linear = np.array([3.0, 2.0, 1e-3]) / length
    values = problem(hessian, linear, np.zeros((0, 3)), np.zeros(0))
    assert residual(values, np.array([3.0, 1.0, 2.0]) * length, np.zeros(0)) > 1e-2


@pytest.mark.parametrize("tiny", [1e-4, 1e-9])
def test_the_optimum_without_rows_is_no_size(tiny: float) -> None:
    """A row missed by 1e-6 of its terms, with a curvature so small that without rows x would be at 1 / tiny."""
    rows = np.array([[1.0, 1.0], [-1.0, -1.0]])
    values = problem(tiny * np.eye(2), np.array([1.0, 1.0]), rows, np.array([3.0, -3.0 - 1e-6]))
    x = np.array([1.5, 1.5])
    assert residual(values, x, np.array([1.0 - 1.5 * tiny, 0.0])) > 5e-9


@pytest.mark.parametrize("seed", range(20))
def test_the_measure_and_its_sparse_twin_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = 5, 6
    columns = 10.0 ** rng.uniform(-3, 3, n)
    root = rng.standard_normal((3, n)) * (rng.random(n) < 0.7) / columns
    rows = rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.6) / columns
    rhs = np.where(rng.random(m) < 0.2, np.inf, rng.standard_normal(m))
    x, nu = rng.standard_normal(n) * columns, rng.standard_normal(m) * (rng.random(m) < 0.5)
    nu[~np.isfinite(rhs)] = 0.0
    values = problem(root.T @ root, rng.standard_normal(n) / columns, rows, rhs, lower=-1.0)
    item = interior_point.Problem(
        values.hessian[0], values.rhs_primal[0], rows, 0, rhs, values.bounded, values.lower[0], values.upper[0]
    )
    expected = interior_point.kkt_residual(item, x, nu, np.array([-0.5]))
    assert residual(values, x, nu, -0.5) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
@pytest.mark.parametrize(("gap", "status"), [(1e-6, Status.INFEASIBLE), (1e-14, Status.SOLVED)])
def test_limits_that_cross(unit: float, gap: float, status: Status) -> None:
    """Of one variable, in any unit: by a part in a million it is a contradiction, by rounding it is a point."""
    rows = np.array([[1.0, 0.0], [-1.0, 0.0]])
    plan = Plan(dense_program(np.eye(2) / unit**2, rows, equalities=0))
    limits = np.array([2.0, -2.0 * (1.0 + gap)]) * unit
    for options in (Options(), Options(multipliers=False)):
        found = plan.solve([np.array([[1.0, 1.0]]) / unit, limits[None]], options)
        assert found.status[0] == status
        if status == Status.INFEASIBLE:
            assert found.conflicts[0] == [0, 1]
            assert np.isnan(found.primal).all()
        else:
            np.testing.assert_allclose(found.primal[0], [2.0 * unit, -unit], rtol=1e-12)


def test_points_and_multipliers_that_run_away() -> None:
    """A long way along a flat direction, and multipliers that cancel: seen; what is merely large: not."""
    hessian, rows = np.diag([1.0, 0.0, 1.0]), np.array([[1.0, 0.0, 1.0], [-1.0, 0.0, -1.0]])
    values = problem(hessian, np.ones(3), rows, np.array([1.0, 1.0]))

    def away(x: list[float], nu: list[float]) -> bool:
        return bool(semidefinite.runs_away(values, np.array([x]), np.array([nu]), np.zeros((1, 1)))[0])

    assert away([1.0, 1e6, 0.0], [0.0, 0.0])
    assert away([1.0, 1.0, 0.0], [1e9, 1e9])
    assert not away([1e6, 1e6, 0.0], [0.0, 0.0])
    assert not away([1.0, 1.0, 0.0], [1e9, 1.0])


@pytest.mark.parametrize("multipliers", [True, False])
def test_nearly_dependent_rows_beside_dependent_ones(multipliers: bool) -> None:
    """The projection onto the point where rows that differ by 1e-6 meet; one of them is there three times."""
    tilt = 2.0**-20
    rows = np.array([[1.0, 1.0, 0.0], [1.0, 1.0 + tilt, tilt], [2.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    known, nu = np.array([1.0, -2.0, 3.0]), np.array([1.25, 2.0, 0.5, 0.0, 1.0])
    plan = Plan(dense_program(np.eye(3), rows, equalities=0))
    cost = -known - nu @ rows
    found = plan.solve([cost[None], (rows @ known)[None]], Options(multipliers=multipliers))
    assert found.status[0] == Status.SOLVED
    np.testing.assert_allclose(found.primal[0], known, atol=1e-9)
