"""Routing: which solver, and the reason in words."""

from __future__ import annotations

import numpy as np
import pytest

from core_programs import box_program, dense_program
from hsbackend.plan import Plan
from hsbackend.solvers.result import Options
from hsbackend.status import Status


def test_box_and_a_budget_are_a_family() -> None:
    route = Plan(box_program(np.ones((1, 6)), equalities=1)).route
    assert route.solver == "families"
    assert "recognised box with a budget (6)" in str(route)


def test_a_box_and_two_rows_go_to_newton() -> None:
    route = Plan(box_program(np.array([[1.0] * 6, [1.0, 2.0] * 3]), equalities=1)).route
    assert route.solver == "semismooth_newton"
    assert route.polyhedral
    assert "12 singleton rows became bounds on 6 variables" in str(route)


def test_a_dense_hessian_goes_to_the_active_set() -> None:
    hessian = np.eye(4) + 0.1
    route = Plan(dense_program(hessian, np.ones((2, 4)), equalities=1)).route
    assert route.solver == "active_set"
    assert "1 equality row and 1 inequality row left" in str(route)


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (np.diag([1.0, -1.0, 1.0]), "negative diagonal entry"),
        (np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "negative curvature"),
        (np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), "negative curvature"),
    ],
)
def test_what_is_not_convex_is_refused_with_the_reason(hessian: np.ndarray, reason: str) -> None:
    route = Plan(dense_program(hessian, np.ones((1, 3)), equalities=0)).route
    assert route.solver == "diffcp"
    assert not route.polyhedral
    assert reason in route.reason
    assert "not handled" in str(route)


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (np.zeros((3, 3)), "linear program, 1 rows and bounds"),
        (np.diag([1.0, 0.0, 1.0]), "semidefinite Hessian"),
        (np.ones((3, 3)), "semidefinite Hessian"),
    ],
)
def test_a_semidefinite_hessian_is_solved_by_proximal_steps(hessian: np.ndarray, reason: str) -> None:
    route = Plan(dense_program(hessian, np.ones((1, 3)), equalities=0)).route
    assert route.solver == "active_set"
    assert reason in route.reason
    assert "the one of least norm" in str(route)
    assert Plan(dense_program(hessian, np.ones((1, 3)), equalities=0), "reference").route.solver == "diffcp"


def test_a_hessian_that_is_singular_outside_the_equalities_is_welcome() -> None:
    """Q = diag(1, 0), x0 - x1 = 1: strictly convex on the line."""
    plan = Plan(dense_program(np.array([[1.0, 0.5], [0.5, 0.0]]), np.array([[1.0, -1.0]]), equalities=1))
    assert plan.route.solver == "active_set"
    solution = plan.solve([np.zeros((1, 2)), np.ones((1, 1))], Options())
    # minimise 1/2 x0^2 + 1/2 x0 x1 with x1 = x0 - 1: x0 = 1/4
    np.testing.assert_allclose(solution.primal, [[0.25, -0.75]], atol=1e-14)


def test_a_requested_solver_is_never_replaced() -> None:
    program = dense_program(np.eye(3) + 0.1, np.ones((1, 3)), equalities=0)
    route = Plan(program, "semismooth_newton").route
    assert route.solver == "diffcp"
    assert "needs a diagonal Hessian" in route.reason
    assert Plan(box_program(np.ones((1, 4)), equalities=1), "active_set").route.solver == "active_set"
    assert Plan(box_program(np.ones((1, 4)), equalities=1), "families").route.solver == "families"
    route = Plan(box_program(np.array([[1.0] * 6, [1.0, 2.0] * 3]), equalities=1), "families").route
    assert route.solver == "diffcp"
    assert "families was requested" in route.reason


def test_a_hessian_that_depends_on_a_parameter_may_be_singular_for_one_item() -> None:
    program = dense_program(None, np.ones((1, 2)), equalities=0)
    hessian = np.stack([np.eye(2), np.ones((2, 2)), 2 * np.eye(2), np.diag([1.0, -1.0])])
    data = [hessian.reshape(4, -1), np.ones((4, 2)), np.full((4, 1), 5.0)]
    solution = Plan(program).solve(data, Options())
    assert list(solution.status) == [Status.SOLVED] * 3 + [Status.NOT_STRICTLY_CONVEX]
    assert list(solution.non_unique) == [False, True, False, False]
    np.testing.assert_allclose(solution.primal[[0, 2]], [[-1, -1], [-0.5, -0.5]], atol=1e-14)
    np.testing.assert_allclose(solution.primal[1], [-0.5, -0.5], atol=1e-10)
    assert np.isnan(solution.primal[3]).all()
