"""Detection through cvxpy: spellings of every family that must be recognised, and near-misses that must not be.

Every row is also solved: the answer and the gradients are those of the general active-set solver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import pytest
import torch

from hsbackend.adapters.cvxpylayers import CvxpyLayer, HSBackend

N = 5
W = np.array([0.5, 1.0, 2.0, 1.5, 3.0])


@dataclass
class Model:
    """The pieces a spelling puts together, fresh for every test."""

    def __post_init__(self) -> None:
        self.x = cp.Variable(N)
        self.positive = cp.Variable(N, nonneg=True)
        self.y = cp.Parameter(N)
        self.r = cp.Parameter(nonneg=True)
        self.a = cp.Parameter(N)
        self.M = cp.Variable((3, 4))
        self.T = cp.Variable((4, 3))
        self.Y = cp.Parameter((3, 4))
        self.rows = cp.Parameter(3)
        self.columns = cp.Parameter(4)
        self.S = cp.Variable((3, 3))
        self.Z = cp.Parameter((3, 3))
        self.near = cp.Minimize(cp.sum_squares(self.x - self.y))
        self.near_matrix = cp.Minimize(cp.sum_squares(self.M - self.Y))
        self.near_square = cp.Minimize(cp.sum_squares(self.S - self.Z))

    def values(self, problem: cp.Problem) -> tuple[list[cp.Parameter], list[torch.Tensor]]:
        """Return the problem's parameters and a batch of values that keep it feasible."""
        generator = torch.Generator().manual_seed(3)
        found, values = problem.parameters(), []
        for parameter in found:
            drawn = torch.randn(6, *parameter.shape, dtype=torch.float64, generator=generator)
            if parameter is self.r:
                drawn = 0.5 + drawn.abs()
            if parameter is self.rows:
                drawn = torch.full((6, 3), 4.0, dtype=torch.float64)
            if parameter is self.columns:
                drawn = torch.full((6, 4), 3.0, dtype=torch.float64)
            values.append(drawn.requires_grad_())
        return found, values


Spelling = Callable[[Model], tuple[cp.Minimize, list[cp.Constraint], list[cp.Variable]]]


def _x(m: Model, *constraints: cp.Constraint, objective: cp.Minimize | None = None) -> tuple:
    return objective or m.near, list(constraints), [m.x]


def _stochastic(m: Model, *more: cp.Constraint) -> tuple:
    return m.near_square, [cp.sum(m.S, axis=1) == 1, cp.sum(m.S, axis=0) == 1, m.S >= 0, *more], [m.S]


RECOGNISED: dict[str, tuple[str, Spelling]] = {
    "simplex": ("simplex (5)", lambda m: _x(m, cp.sum(m.x) == 1, m.x >= 0)),
    "simplex, quadratic and linear term": (
        "simplex (5)",
        lambda m: _x(m, cp.sum(m.x) == 1, m.x >= 0, objective=cp.Minimize(0.5 * cp.sum_squares(m.x) - m.y @ m.x)),
    ),
    "simplex, quad_form": (
        "simplex (5)",
        lambda m: _x(m, cp.sum(m.x) == 1, m.x >= 0, objective=cp.Minimize(cp.quad_form(m.x, np.diag(W)) - m.y @ m.x)),
    ),
    "simplex, weights": (
        "simplex (5)",
        lambda m: _x(
            m, cp.sum(m.x) == 1, m.x >= 0, objective=cp.Minimize(cp.sum_squares(cp.multiply(W, m.x - m.y)))
        ),
    ),
    "simplex, scaled rows": ("simplex (5)", lambda m: _x(m, -3 * cp.sum(m.x) == -3, -2 * m.x <= 0)),
    "simplex, a sign attribute": (
        "simplex (5)",
        lambda m: (cp.Minimize(cp.sum_squares(m.positive - m.y)), [np.ones(N) @ m.positive == m.r], [m.positive]),
    ),
    "simplex, the distance": ("simplex (5)", lambda m: _x(m, cp.sum(m.x) == 1, m.x >= 0,
                                                           objective=cp.Minimize(cp.norm(m.x - m.y)))),
    "simplex, said twice": (
        "simplex (5)",
        lambda m: _x(m, cp.sum(m.x) == 1, 2 * cp.sum(m.x) == 2, m.x >= 0, 3 * m.x >= 0),
    ),
    "simplex, radius a parameter": ("simplex (5)", lambda m: _x(m, cp.sum(m.x) == m.r, m.x >= 0)),
    "capped simplex": ("capped simplex (5)", lambda m: _x(m, cp.sum(m.x) == 2, m.x >= 0, m.x <= 1)),
    "box": ("box (5)", lambda m: _x(m, m.x >= -0.5, m.x <= m.r)),
    "norm-inf ball": ("box (5)", lambda m: _x(m, cp.norm_inf(m.x) <= m.r)),
    "bounded largest entry": ("box (5)", lambda m: _x(m, cp.max(m.x) <= 0.2)),
    "no constraint": ("free variables (5)", lambda m: _x(m)),
    "budget, at most": ("box with a budget (5)", lambda m: _x(m, cp.sum(m.x) <= 1, m.x >= 0)),
    "budget, two limits": (
        "box with a budget (5)",
        lambda m: _x(m, cp.sum(m.x) <= 1, 2 * cp.sum(m.x) >= 1, m.x >= 0),
    ),
    "budget, a weaker copy": (
        "box with a budget (5)",
        lambda m: _x(m, cp.sum(m.x) <= 1, 2 * cp.sum(m.x) <= 3, m.x >= 0),
    ),
    "budget, prices a parameter": ("box with a budget (5)", lambda m: _x(m, m.a @ m.x <= 1, m.x >= -1, m.x <= 1)),
    "half-space": ("half-space (5)", lambda m: _x(m, W @ m.x <= -1)),
    "hyperplane": ("hyperplane (5)", lambda m: _x(m, W @ m.x == m.r)),
    "l1 ball": ("l1 ball (5)", lambda m: _x(m, cp.norm1(m.x) <= 1)),
    "l1 ball, sum of abs": ("l1 ball (5)", lambda m: _x(m, cp.sum(cp.abs(m.x)) <= m.r)),
    "l1 ball, weighted": ("l1 ball (5)", lambda m: _x(m, cp.norm1(cp.multiply(W, m.x)) <= m.r)),
    "l1 ball, around a parameter": (
        "l1 ball (5)",
        lambda m: _x(m, cp.norm1(m.x - m.y) <= 1, objective=cp.Minimize(cp.sum_squares(m.x) - m.a @ m.x)),
    ),
    "monotone": ("monotone chain (5)", lambda m: _x(m, cp.diff(m.x) >= 0)),
    "monotone, decreasing in a box": ("monotone chain (5)", lambda m: _x(m, m.x[1:] <= m.x[:-1], m.x >= 0, m.x <= 1)),
    "monotone, limits at the ends": (
        "monotone chain (5)",
        lambda m: _x(m, m.x[:-1] <= m.x[1:], m.x[0] >= -m.r, m.x[-1] <= m.r),
    ),
    "monotone, gaps": ("monotone chain (5)", lambda m: _x(m, m.x[1:] - m.x[:-1] >= 0.1 * m.a[1:])),
    "transport": (
        "transport polytope (3 x 4)",
        lambda m: (m.near_matrix, [cp.sum(m.M, axis=1) == m.rows, cp.sum(m.M, axis=0) == m.columns, m.M >= 0], [m.M]),
    ),
    "transport, transposed variable": (
        "transport polytope",
        lambda m: (
            cp.Minimize(cp.sum_squares(m.T.T - m.Y)),
            [cp.sum(m.T, axis=0) == m.rows, cp.sum(m.T, axis=1) == m.columns, m.T >= 0],
            [m.T],
        ),
    ),
    "Birkhoff": ("transport polytope (3 x 3)", _stochastic),
    "Birkhoff, products with ones": (
        "transport polytope (3 x 3)",
        lambda m: (m.near_square, [m.S @ np.ones(3) == 1, 2 * np.ones(3) @ m.S == 2, m.S >= 0], [m.S]),
    ),
    "Birkhoff, redundant caps": ("transport polytope (3 x 3)", lambda m: _stochastic(m, m.S <= 1)),
    "rows of a stochastic matrix": (
        "3 x simplex (4)",
        lambda m: (m.near_matrix, [cp.sum(m.M, axis=1) == 1, m.M >= 0], [m.M]),
    ),
    "columns of a stochastic matrix": (
        "4 x simplex (3)",
        lambda m: (m.near_matrix, [cp.sum(m.M, axis=0) == 1, m.M >= 0], [m.M]),
    ),
    "two families": (
        "simplex (5), 4 x monotone chain (3)",
        lambda m: (
            cp.Minimize(cp.sum_squares(m.x - m.y) + cp.sum_squares(m.M - m.Y)),
            [cp.sum(m.x) == 1, m.x >= 0, cp.diff(m.M, axis=0) >= 0],
            [m.x, m.M],
        ),
    ),
    "a family beside a general block": (
        "general block",
        lambda m: (
            cp.Minimize(cp.sum_squares(m.x - m.y) + cp.sum_squares(m.M - m.Y)),
            [m.x[0] + m.x[1] <= 0, m.x[1] - 2 * m.x[2] <= 0, m.x >= -1, m.M >= 0],
            [m.x, m.M],
        ),
    ),
    "alike general blocks": (
        "4 x general block (3)",
        lambda m: (
            m.near_matrix,
            [m.M[0] + m.M[1] <= 0.1, m.M[1] + 2 * m.M[2] <= 0.2, m.M >= -1],
            [m.M],
        ),
    ),
}  # fmt: skip

NEAR_MISSES: dict[str, tuple[str, Spelling]] = {
    "simplex and one more row": (
        "semismooth_newton", lambda m: _x(m, cp.sum(m.x) == 1, m.x >= 0, m.x[0] + m.x[1] <= 0.5)
    ),
    "simplex in another metric": (
        "active_set",
        lambda m: _x(m, cp.sum(m.x) == 1, m.x >= 0,
                     objective=cp.Minimize(cp.quad_form(m.x, np.eye(N) + 0.1) - m.y @ m.x)),
    ),
    "chain with a limit in the middle": ("semismooth_newton", lambda m: _x(m, cp.diff(m.x) >= 0, m.x[2] >= m.r)),
    "chain with limits that differ": ("semismooth_newton", lambda m: _x(m, cp.diff(m.x) >= 0, m.x <= W)),
    "chain with gaps in a box": ("semismooth_newton", lambda m: _x(m, m.x[1:] - m.x[:-1] >= 0.1, m.x >= 0)),
    "chain with a shortcut": ("active_set", lambda m: _x(m, cp.diff(m.x) >= 0, m.x[0] + 0.5 <= m.x[4])),
    "chain with unequal entries": ("active_set", lambda m: _x(m, m.x[:-1] <= 2 * m.x[1:])),
    "Birkhoff and one more row": ("semismooth_newton", lambda m: _stochastic(m, m.S[0, 0] <= m.S[1, 1])),
    "Birkhoff with binding caps": ("semismooth_newton", lambda m: _stochastic(m, m.S <= 0.5)),
    "doubly substochastic": (
        "semismooth_newton",
        lambda m: (m.near_square, [cp.sum(m.S, axis=1) <= 1, cp.sum(m.S, axis=0) <= 1, m.S >= 0], [m.S]),
    ),
    "transport with weights in the sums": (
        "semismooth_newton",
        lambda m: (
            m.near_square, [m.S @ np.array([1.0, 2.0, 1.0]) == 1, cp.sum(m.S, axis=0) == 0.75, m.S >= 0], [m.S],
        ),
    ),
    "l1 ball in a box": ("active_set", lambda m: _x(m, cp.norm1(m.x) <= 1, m.x <= 0.3)),
    "l1 ball and a penalty": (
        "active_set",
        lambda m: _x(m, cp.norm1(m.x) <= 1, objective=cp.Minimize(cp.sum_squares(m.x - m.y) + 0.1 * cp.norm1(m.x))),
    ),
    "l1 ball with its epigraph returned": (
        "active_set",
        lambda m: (m.near, [m.x <= m.positive, -m.x <= m.positive, cp.sum(m.positive) <= 1], [m.x, m.positive]),
    ),
    "two rows with parameters": (
        "semismooth_newton", lambda m: _x(m, m.a @ m.x <= 1, 2 * m.a @ m.x >= -1, m.x >= -1, m.x <= 1)
    ),
    "second-order cone": ("diffcp", lambda m: _x(m, cp.norm(m.x) <= 1)),
}  # fmt: skip


def _layer(spelling: Spelling, backend: HSBackend | None = None) -> tuple[CvxpyLayer, list[torch.Tensor]]:
    model = Model()
    objective, constraints, variables = spelling(model)
    problem = cp.Problem(objective, constraints)
    parameters, values = model.values(problem)
    return CvxpyLayer(problem, parameters, variables, solver=backend), values


def _agree_with_the_active_set(spelling: Spelling) -> None:
    layer, values = _layer(spelling)
    general, _ = _layer(spelling, HSBackend(solver="active_set", fallback="error"))
    generator = torch.Generator().manual_seed(4)
    results = []
    for candidate in (layer, general):
        found = candidate(*values)
        cotangents = [
            torch.randn(value.shape, dtype=torch.float64, generator=generator.manual_seed(4)) for value in found
        ]
        gradients = torch.autograd.grad(found, values, cotangents)
        results.append((found, gradients))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-9)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", RECOGNISED)
def test_spellings_are_recognised(name: str) -> None:
    label, spelling = RECOGNISED[name]
    layer, _ = _layer(spelling)
    assert layer.explain().solver == "families", str(layer.explain())
    assert label in layer.explain().reason
    _agree_with_the_active_set(spelling)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_go_to_the_next_more_general_solver(name: str) -> None:
    solver, spelling = NEAR_MISSES[name]
    layer, _ = _layer(spelling)
    assert layer.explain().solver == solver, str(layer.explain())
    if solver != "diffcp":
        _agree_with_the_active_set(spelling)


def test_inside_the_l1_ball_nothing_is_held() -> None:
    """At x = 0 the epigraph form has active rows, the ball has none: the Jacobian is the identity."""
    layer, _ = _layer(RECOGNISED["l1 ball"][1])
    (jacobian,) = torch.autograd.functional.jacobian(lambda y: layer(y), torch.zeros(N, dtype=torch.float64))
    torch.testing.assert_close(jacobian, torch.eye(N, dtype=torch.float64), rtol=0.0, atol=1e-14)
