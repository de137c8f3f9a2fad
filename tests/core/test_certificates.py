"""Certificates of infeasible and unbounded programs: they exist, they hold in the data, and nobody else gets one."""

from __future__ import annotations

import numpy as np
import pytest

from core_programs import dense_program
from generators import semidefinite_case
from hsbackend import certificates
from hsbackend.plan import Plan
from hsbackend.solvers.result import Options
from hsbackend.status import Status


def test_every_failing_item_of_the_generator_has_a_certificate() -> None:
    seen = {Status.INFEASIBLE: 0, Status.UNBOUNDED: 0}
    for seed in range(120):
        case = semidefinite_case(seed)
        free = frozenset("QqAb") if len(case.hessian) > 1 or seed % 4 == 0 else frozenset("qb")
        solution = Plan(case.program(free)).solve(case.parameters(free), Options())
        found = solution.certificates
        for b in range(case.shape[0]):
            status = Status(int(solution.status[b]))
            hessian, linear, rows, rhs = case.item(b)
            if status not in seen:
                assert b not in found
                continue
            seen[status] += 1
            vector = found[b]
            assert np.abs(vector).max() == pytest.approx(1.0)
            if status == Status.INFEASIBLE:
                np.testing.assert_allclose(rows.T @ vector, 0.0, atol=1e-8 * np.abs(rows).max())
                assert (vector[case.equalities :] >= 0.0).all()
                assert rhs @ vector < 0.0
            else:
                np.testing.assert_allclose(hessian @ vector, 0.0, atol=1e-8 * max(1.0, np.abs(hessian).max()))
                np.testing.assert_allclose(
                    rows[: case.equalities] @ vector, 0.0, atol=1e-8 * np.abs(rows).max(initial=1.0)
                )
                assert (rows[case.equalities :] @ vector <= 1e-8).all()
                assert linear @ vector < 0.0
    assert min(seen.values()) > 10


@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e8])
def test_crossing_bounds_and_other_units(factor: float) -> None:
    """x <= 1 and -2 x <= -4 cannot hold together: 2 (x) + (-2 x) = 0 <= 2 - 4."""
    rows, rhs = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]]), factor * np.array([1.0, -4.0, 7.0])
    solution = Plan(dense_program(np.eye(2), rows, 0)).solve([np.zeros((1, 2)), rhs[None]], Options())
    assert solution.status[0] == Status.INFEASIBLE
    np.testing.assert_allclose(solution.certificates[0], [1.0, 0.5, 0.0], atol=1e-12)


def test_what_has_a_solution_has_no_certificate() -> None:
    rows, rhs = np.array([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), np.array([1.0, 0.0, 0.0])
    assert certificates.farkas(rows, rhs, 1) is None
    assert certificates.ray(np.zeros((2, 2)), np.array([1.0, -1.0]), rows, rhs, 1) is None
    ray = certificates.ray(np.zeros((2, 2)), np.array([1.0, -1.0]), rows, np.array([np.inf, 0.0, 0.0]), 0)
    np.testing.assert_allclose(ray, [0.0, 1.0], atol=1e-12)
    assert certificates.farkas(np.zeros((0, 2)), np.zeros(0), 0) is None


@pytest.mark.parametrize("gap", [-1e-6, 1e-6])
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_thin_sets_in_mixed_units(gap: float, unit: float) -> None:
    """3 <= x + y / unit <= 3 + gap, written with rows 1e8 apart: HiGHS alone sees gaps from 1e-7 on."""
    row = np.array([1.0, 1.0 / unit])
    matrix, rhs = np.array([1e4 * row, -1e-4 * row, [0.0, 1.0]]), np.array([1e4 * (3.0 + gap), -3e-4, 5.0 * unit])
    found = certificates.farkas(matrix, rhs, 0)
    if gap > 0.0:
        assert found is None
        return
    assert found is not None
    assert (found >= 0.0).all()
    np.testing.assert_allclose(found @ matrix, 0.0, atol=1e-15 * np.abs(found @ np.abs(matrix)).max())
    assert found @ rhs < 0.0


@pytest.mark.parametrize("curvature", [0.0, 1e-13])
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_gentle_slopes_in_mixed_units(curvature: float, unit: float) -> None:
    """A slope of 1e-6 beside one of 3 has no end, unless there is any curvature."""
    hessian = np.diag([2.0, curvature, 0.0]) / np.outer([1.0, unit, 1.0], [1.0, unit, 1.0])
    linear = np.array([-3.0, -1e-6 / unit, 1.0])
    matrix, rhs = np.array([[1.0, 0.0, -1.0], [0.0, 0.0, -1.0]]), np.zeros(2)
    found = certificates.ray(hessian, linear, matrix, rhs, 0)
    if curvature > 0.0:
        assert found is None
        return
    assert found is not None
    np.testing.assert_allclose(found, [0.0, 1.0, 0.0], atol=1e-15)
