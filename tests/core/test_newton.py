"""The semismooth Newton solver against the active set, on its own ground and where it has to hand over."""

from __future__ import annotations

import numpy as np
import pytest

from core_programs import box_program
from hsbackend.face import MixedFace
from hsbackend.plan import Plan
from hsbackend.route import SolverName
from hsbackend.solvers import semismooth_newton
from hsbackend.solvers.result import Options
from hsbackend.status import Status


def simplex(points: np.ndarray) -> np.ndarray:
    """Project on the probability simplex by sorting (Held, Wolfe, Crowder 1974)."""
    ordered = -np.sort(-points, axis=1)
    total = np.cumsum(ordered, axis=1) - 1.0
    index = np.arange(1, points.shape[1] + 1)
    last = np.sum(ordered - total / index > 0, axis=1)
    threshold = total[np.arange(len(points)), last - 1] / last
    return np.maximum(points - threshold[:, None], 0.0)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
@pytest.mark.parametrize("n", [1, 2, 7, 63, 500])
def test_simplex_against_sorting(n: int, scale: float) -> None:
    points = np.random.default_rng(n).normal(size=(9, n)) * scale
    plan = Plan(box_program(np.ones((1, n)), equalities=1), "semismooth_newton")
    limits = np.concatenate([np.ones(1), np.full(n, np.inf), np.zeros(n)])
    solution = plan.solve([-points, np.tile(limits, (9, 1))], Options())
    assert (solution.status == Status.SOLVED).all()
    np.testing.assert_allclose(solution.primal, simplex(points), atol=1e-13 * max(1.0, scale))


@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_doubly_stochastic_matrices(k: int) -> None:
    """Rows and columns sum to one (one row is dependent), against the active set; adjoint on every component."""
    rng = np.random.default_rng(k)
    rows = np.concatenate([np.kron(np.eye(k), np.ones((1, k))), np.kron(np.ones((1, k)), np.eye(k))])
    n = k * k
    limits = np.tile(np.concatenate([np.ones(2 * k), np.full(n, np.inf), np.zeros(n)]), (20, 1))
    program = box_program(rows, equalities=2 * k)
    fast, slow = Plan(program), Plan(program, "active_set")
    assert fast.route.solver == "semismooth_newton"
    points = rng.normal(size=(20, n)) * 2.0
    found, wanted = (plan.solve([-points, limits], Options()) for plan in (fast, slow))
    np.testing.assert_allclose(found.primal, wanted.primal, atol=1e-13)
    g = rng.normal(size=(20, n))
    np.testing.assert_allclose(
        fast.adjoint(found, g, None).primal, slow.adjoint(wanted, g, None).primal, atol=1e-11
    )  # fmt: skip


def test_items_newton_cannot_finish_go_to_the_active_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """With almost no steps allowed the answer and the derivative are still right."""
    monkeypatch.setattr(semismooth_newton, "MAX_STEPS", 2)
    points = np.random.default_rng(5).normal(size=(40, 12))
    plan = Plan(box_program(np.ones((1, 12)), equalities=1), "semismooth_newton")
    limits = np.tile(np.concatenate([np.ones(1), np.full(12, 0.4), np.zeros(12)]), (40, 1))
    rushed = plan.solve([-points, limits], Options())
    monkeypatch.undo()
    calm = plan.solve([-points, limits], Options())
    assert isinstance(rushed.face, MixedFace)
    assert (rushed.status == Status.SOLVED).all()
    np.testing.assert_allclose(rushed.primal, calm.primal, atol=1e-13)
    g = np.random.default_rng(6).normal(size=(40, 12))
    np.testing.assert_allclose(
        plan.adjoint(rushed, g, None).primal, plan.adjoint(calm, g, None).primal, atol=1e-12
    )  # fmt: skip


@pytest.mark.parametrize("solver", [None, "semismooth_newton"])
def test_infeasible_budget_is_reported_with_its_rows(solver: SolverName | None) -> None:
    """Four variables of at most 0.2 cannot sum to one."""
    plan = Plan(box_program(np.ones((1, 4)), equalities=1), solver)
    rhs = np.array([[1.0, *[0.5] * 4, *[0.0] * 4], [1.0, *[0.2] * 4, *[0.0] * 4]])
    solution = plan.solve([np.zeros((2, 4)), rhs], Options())
    assert list(solution.status) == [Status.SOLVED, Status.INFEASIBLE]
    assert set(solution.conflicts[1]) == {0, 1, 2, 3, 4}
