"""The table of cvxpy programs: each row builds a problem, its parameters, what to return, and draws parameter values.

A row is a function returning (problem, parameters, variables, draw); `draw(rng)` returns one array per parameter, with
a leading batch axis of length `BATCH` where the parameter is per item and without where it is shared. Rows are rebuilt
for every use, because a stock layer changes the problem it is given.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cvxpy as cp
import numpy as np

from oracles import DegeneratePoint, TightSolver

BATCH = 3
TABLE: dict[str, Program] = {}


@dataclass(frozen=True)
class Program:
    """One row.

    `polyhedral` None: may go to the fallback. `judge` builds an equivalent program the oracle can read.
    `stock_refuses`: the stock layer with any solver that takes a quadratic objective calls the problem not DPP.
    `insensitive`: indices of parameters the solution does not depend on, so that their gradient is zero.
    """

    name: str
    build: Callable
    polyhedral: bool | None
    judge: Callable
    stock_refuses: bool
    insensitive: tuple[int, ...]


@dataclass(frozen=True)
class Truth:
    """Parameter values, the cotangents of the test's loss, and what the oracle says about both."""

    seed: int
    values: tuple[np.ndarray, ...]
    cotangents: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    gradients: tuple[np.ndarray, ...]


def row(function=None, *, polyhedral=True, judge=None, stock_refuses=False, insensitive=()):
    """Register a row of the table under the name of its function."""

    def register(build):
        program = Program(build.__name__, build, polyhedral, judge or build, stock_refuses, insensitive)
        TABLE[program.name] = program
        return build

    return register if function is None else register(function)


@cache
def truth(name):
    """Draw values for a row until the point is worth testing, then solve and differentiate it.

    Worth testing: every item has a strict-complementarity margin, and no gradient is zero without reason (on a vertex
    of the simplex any Jacobian would pass).
    """
    program = TABLE[name]
    problem, parameters, variables, draw = program.judge()
    solver = TightSolver(problem, parameters, variables)
    first = zlib.crc32(name.encode()) % 100_000
    for seed in range(first, first + 50):
        rng = np.random.default_rng(seed)
        values = tuple(np.asarray(v, dtype=float) for v in draw(rng))
        batched = [v.ndim > p.ndim for v, p in zip(values, parameters, strict=True)]
        count = BATCH if any(batched) else 1
        try:
            items = [
                solver.solve([v[i] if is_batched else v for v, is_batched in zip(values, batched, strict=True)])
                for i in range(count)
            ]
        except DegeneratePoint:
            continue
        outputs = tuple(np.stack([item.outputs[k] for item in items]) for k in range(len(variables)))
        cotangents = tuple(rng.standard_normal(out.shape) for out in outputs)
        per_item = [item.vjp([c[i] for c in cotangents]) for i, item in enumerate(items)]
        gradients = tuple(
            np.stack([g[j] for g in per_item]) if is_batched else sum(g[j] for g in per_item)
            for j, is_batched in enumerate(batched)
        )
        if any(np.abs(g).max() < 1e-3 for j, g in enumerate(gradients) if j not in program.insensitive):
            continue
        if not any(batched):
            outputs, cotangents = tuple(o[0] for o in outputs), tuple(c[0] for c in cotangents)
        return Truth(seed, values, cotangents, outputs, gradients)
    raise AssertionError(f"{name}: no point worth testing among 50 draws")


def is_symmetric(parameter):
    """Whether cvxpy keeps only the upper triangle of the parameter."""
    return any(parameter.attributes.get(a) for a in ("symmetric", "PSD", "NSD"))


# --- shorthand for draws


def _constant(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def _points(n, scale=1.0):
    return lambda rng: [scale * rng.standard_normal((BATCH, n))]


def _simplex(x):
    return [x >= 0, cp.sum(x) == 1]


def _vector(n=5):
    return cp.Variable(n, name="x"), cp.Parameter(n, name="y")


_POSITIVE_DEFINITE = _constant(1, 5, 5) @ _constant(1, 5, 5).T / 5 + 0.5 * np.eye(5)


# --- spellings of the objective


@row
def sum_squares_simplex():
    x, y = _vector()
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), _simplex(x)), [y], [x], _points(5)


@row
def half_sum_squares_minus_linear():
    x, y = _vector()
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) - y @ x), _simplex(x)), [y], [x], _points(5)


@row
def sum_of_squares():
    x, y = _vector()
    return cp.Problem(cp.Minimize(cp.sum(cp.square(x - y))), _simplex(x)), [y], [x], _points(5)


@row
def quad_over_lin():
    x, y = _vector()
    return cp.Problem(cp.Minimize(cp.quad_over_lin(x - y, 2.0)), _simplex(x)), [y], [x], _points(5)


@row
def quad_form_constant():
    x, y = _vector()
    return cp.Problem(cp.Minimize(cp.quad_form(x, _POSITIVE_DEFINITE) - y @ x), _simplex(x)), [y], [x], _points(5)


def _metric_distance(spelled_as_quad_form):
    def build():
        x, y = _vector()
        if spelled_as_quad_form:
            distance = cp.quad_form(x - y, _POSITIVE_DEFINITE)
        else:
            distance = cp.sum_squares(np.linalg.cholesky(_POSITIVE_DEFINITE).T @ (x - y))
        return cp.Problem(cp.Minimize(distance), _simplex(x)), [y], [x], _points(5)

    return build


@row(judge=_metric_distance(False), stock_refuses=True)
def quad_form_of_difference():
    """Not DPP for solvers with a quadratic objective; our layer gives the argument a variable of its own."""
    return _metric_distance(True)()


def _excess(spelled_as_quad_form):
    def build():
        x, y = _vector()
        matrix = np.abs(_POSITIVE_DEFINITE)
        if spelled_as_quad_form:
            return (
                cp.Problem(cp.Minimize(cp.quad_form(cp.pos(x - y), matrix) - cp.sum(x)), [x <= 2]),
                [y],
                [x],
                _points(5),
            )
        t = cp.Variable(5)
        constraints = [x <= 2, t >= x - y, t >= 0]
        return cp.Problem(cp.Minimize(cp.quad_form(t, matrix) - cp.sum(x)), constraints), [y], [x], _points(5)

    return build


@row(polyhedral=None, judge=_excess(False), stock_refuses=True)
def quad_form_of_positive_parts():
    """DPP for diffcp, which makes it a second-order cone; the argument is not affine and cannot be named."""
    return _excess(True)()


@row
def metric_distance():
    return _metric_distance(False)()


@row
def transposed_product():
    x, y = _vector()
    return cp.Problem(cp.Minimize(x.T @ _POSITIVE_DEFINITE @ x - y @ x), _simplex(x)), [y], [x], _points(5)


def _positive_definite(rng, n, *batch):
    # Eigenvalues above 1, so that the oracle may step by one in any entry.
    factor = rng.standard_normal((*batch, n, n))
    return 0.3 * factor @ np.swapaxes(factor, -1, -2) + 2.5 * np.eye(n)


@row
def quad_form_parameter():
    x, y = _vector(4)
    P = cp.Parameter((4, 4), PSD=True, name="P")
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) - y @ x), _simplex(x))
    return problem, [P, y], [x], lambda rng: [_positive_definite(rng, 4, BATCH), 3 * rng.standard_normal((BATCH, 4))]


@row
def quad_form_parameter_shared():
    x, y = _vector(4)
    P = cp.Parameter((4, 4), PSD=True, name="P")
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) - y @ x), [x >= 0])
    return problem, [y, P], [x], lambda rng: [3 * rng.standard_normal((BATCH, 4)), _positive_definite(rng, 4)]


@row
def least_squares_constant():
    x, y = _vector(4)
    y = cp.Parameter(6, name="y")
    return cp.Problem(cp.Minimize(cp.sum_squares(_constant(2, 6, 4) @ x - y)), [x >= 0]), [y], [x], _points(6)


@row
def least_squares_parameter():
    """The matrix is shared by the batch: its gradient is the sum over the items."""
    x, y, R = cp.Variable(4), cp.Parameter(6), cp.Parameter((6, 4))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ x - y)), _simplex(x))
    return problem, [R, y], [x], lambda rng: [rng.standard_normal((6, 4)), rng.standard_normal((BATCH, 6))]


@row
def least_squares_parameter_batched():
    x, y, R = cp.Variable(4), cp.Parameter(6), cp.Parameter((6, 4))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ x - y)), [x >= 0, x <= 0.5])
    return problem, [R, y], [x], lambda rng: [rng.standard_normal((BATCH, 6, 4)), rng.standard_normal((BATCH, 6))]


@row
def weighted_squares():
    x, y = _vector()
    weights = np.array([0.5, 1.0, 2.0, 4.0, 0.1])
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(weights, cp.square(x - y)))), _simplex(x))
    return problem, [y], [x], _points(5)


@row
def weighted_squares_parameter():
    x, y = _vector()
    w = cp.Parameter(5, nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(w, cp.square(x))) - y @ x), _simplex(x))
    return problem, [w, y], [x], lambda rng: [rng.uniform(0.5, 2.0, 5), rng.standard_normal((BATCH, 5))]


@row
def objective_of_many_terms():
    x, y = _vector()
    c = cp.Parameter(5)
    objective = cp.sum_squares(x - y) + 0.1 * cp.sum_squares(x) + c @ x + 3.0
    draw = lambda rng: [rng.standard_normal((BATCH, 5)), rng.standard_normal(5)]  # noqa: E731
    return cp.Problem(cp.Minimize(objective), _simplex(x)), [y, c], [x], draw


@row
def ridge_scalar_parameter():
    x, y, R = cp.Variable(4), cp.Parameter(6), _constant(3, 6, 4)
    weight = cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ x - y) + weight * cp.sum_squares(x)), [x >= 0])
    return problem, [y, weight], [x], lambda rng: [rng.standard_normal((BATCH, 6)), rng.uniform(0.5, 2.0, BATCH)]


def _distance(squared):
    def build():
        x, y = _vector()
        distance = cp.sum_squares(x - y) if squared else cp.norm(x - y)
        return cp.Problem(cp.Minimize(distance), _simplex(x)), [y], [x], _points(5)

    return build


@row(judge=_distance(squared=True))
def norm_unsquared():
    return _distance(squared=False)()


@row
def objective_huge():
    x, y = _vector()
    return cp.Problem(cp.Minimize(1e6 * cp.sum_squares(x - y)), _simplex(x)), [y], [x], _points(5)


@row
def objective_tiny():
    x, y = _vector()
    return cp.Problem(cp.Minimize(1e-6 * cp.sum_squares(x - y)), _simplex(x)), [y], [x], _points(5)


@row
def maximize_concave():
    x, y = _vector()
    return cp.Problem(cp.Maximize(y @ x - cp.sum_squares(x)), _simplex(x)), [y], [x], _points(5)


@row
def portfolio():
    x, mu = cp.Variable(6), cp.Parameter(6)
    factors = _constant(4, 3, 6)
    risk = cp.sum_squares(factors @ x) + cp.sum(cp.multiply(np.linspace(0.5, 1.5, 6), cp.square(x)))
    sectors = np.array([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    constraints = [cp.sum(x) == 1, x >= 0, x <= 0.4, sectors @ x <= 0.6]
    return cp.Problem(cp.Maximize(mu @ x - 0.5 * risk), constraints), [mu], [x], _points(6)


@row
def lasso():
    x, y, R = cp.Variable(4), cp.Parameter(6), _constant(5, 6, 4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ x - y) + 0.8 * cp.norm1(x)))
    return problem, [y], [x], _points(6)


@row(insensitive=(0,))
def linear_program():
    x, c, h = cp.Variable(4), cp.Parameter(4), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0, x <= h])
    return problem, [c, h], [x], lambda rng: [rng.standard_normal((BATCH, 4)), rng.uniform(0.3, 0.6, (BATCH, 4))]


@row
def cost_on_some_variables():
    """Curvature on x, only a price on z: the Hessian is singular and stays so."""
    x, z, y, price = cp.Variable(3), cp.Variable(2), cp.Parameter(3), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + price @ z), [cp.sum(x) + cp.sum(z) == 1, z >= 0, x >= 0])
    draw = lambda rng: [rng.standard_normal((BATCH, 3)), rng.uniform(0.1, 1.0, (BATCH, 2))]  # noqa: E731
    return problem, [y, price], [x, z], draw


@row
def maximum_in_objective():
    x, y = _vector()
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y) + cp.max(x))), [y], [x], _points(5)


@row
def huber_loss():
    x, y = cp.Variable(3), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(_constant(17, 6, 3) @ x - y, 0.5)) + cp.sum_squares(x)))
    return problem, [y], [x], _points(6)


@row
def total_variation():
    x, y = _vector()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + 0.4 * cp.norm1(cp.diff(x))))
    return problem, [y], [x], _points(5)


@row
def median():
    x, y = cp.Variable(), cp.Parameter(5)
    return cp.Problem(cp.Minimize(cp.norm1(y - x))), [y], [x], _points(5)


@row
def elastic_net():
    x, y, lasso_weight, ridge_weight = (
        cp.Variable(4),
        cp.Parameter(6),
        cp.Parameter(nonneg=True),
        cp.Parameter(nonneg=True),
    )
    loss = cp.sum_squares(_constant(21, 6, 4) @ x - y)
    problem = cp.Problem(cp.Minimize(loss + lasso_weight * cp.norm1(x) + ridge_weight * cp.sum_squares(x)))
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 6)), rng.uniform(0.3, 0.8, BATCH), rng.uniform(0.1, 1.0, BATCH)
    ]  # fmt: skip
    return problem, [y, lasso_weight, ridge_weight], [x], draw


@row
def control_with_a_singular_input_cost():
    """Q is zero in u: only y == fx + B @ u and the bounds hold it."""
    y, u = cp.Variable(3), cp.Variable(2)
    fx, B, root = cp.Parameter(3), cp.Parameter((3, 2)), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(root @ y) + np.ones(3) @ y), [y == fx + B @ u, u <= 1, u >= -1])
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 3)), rng.standard_normal((BATCH, 3, 2)), rng.standard_normal((BATCH, 3, 3))
    ]  # fmt: skip
    return problem, [fx, B, root], [y, u], draw


# --- spellings of bounds


def _bounded(variable, constraints):
    """Distance to y on the hyperplane sum(x) == 1 with the bounds under test."""
    y = cp.Parameter(5, name="y")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(variable - y)), [cp.sum(variable) == 1, *constraints])
    return problem, [y], [variable], _points(5)


@row
def bound_rows():
    x = cp.Variable(5)
    return _bounded(x, [x >= 0])


@row
def bound_nonneg_attribute():
    return _bounded(cp.Variable(5, nonneg=True), [])


@row
def bound_nonpos_attribute():
    x, y = cp.Variable(5, nonpos=True), cp.Parameter(5)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == -1]), [y], [x], _points(5)


@row
def bound_bounds_attribute():
    return _bounded(cp.Variable(5, bounds=[0, 0.6]), [])


@row
def bound_bounds_attribute_one_sided():
    return _bounded(cp.Variable(5, bounds=[None, np.array([0.1, 0.2, 0.3, 0.4, 0.5])]), [])


@row
def bound_identity_matrix():
    x = cp.Variable(5)
    return _bounded(x, [np.eye(5) @ x >= 0])


@row
def bound_scaled():
    x = cp.Variable(5)
    return _bounded(x, [2 * x >= 0])


@row
def bound_negated():
    x = cp.Variable(5)
    return _bounded(x, [-x <= 0])


@row
def bound_two_sided():
    x = cp.Variable(5)
    return _bounded(x, [np.full(5, -0.2) <= x, x <= np.array([0.3, 0.4, 0.5, 0.6, 0.7])])


@row
def bound_parameters():
    x, y, lower, upper = cp.Variable(5), cp.Parameter(5), cp.Parameter(5), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= lower, x <= upper])

    def draw(rng):
        return [rng.standard_normal((BATCH, 5)), -rng.uniform(0.1, 0.4, 5), rng.uniform(0.3, 0.6, (BATCH, 5))]

    return problem, [y, lower, upper], [x], draw


@row
def bound_several_on_one():
    x = cp.Variable(5)
    return _bounded(x, [x >= 0, x >= -1, x[0] <= 0.5, x[0] <= 0.4, x <= 1, x[1:3] <= 0.45, x[1] >= 0.05])


@row
def bound_fixed_variable():
    x, y = _vector()
    constraints = [x[0] == y[0], x[1:] >= 0, cp.sum(x) == 1]
    draw = lambda rng: [0.5 * rng.standard_normal((BATCH, 5))]  # noqa: E731
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y], [x], draw


@row
def bound_coefficient_parameter():
    """One row is an upper bound, a lower bound or nothing, as the sign of its coefficient says."""
    x, y, s = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [s * x[0] <= 1, cp.sum(x) == 1])
    points = np.array([[2.0, 1.0, -1.0], [2.0, 1.0, -1.0], [-2.0, 1.0, -1.0]])
    draw = lambda rng: [points + 0.1 * rng.standard_normal((BATCH, 3)), np.array([1.0, 0.0, -3.0])]  # noqa: E731
    return problem, [y, s], [x], draw


@row
def bound_scalar_on_some():
    x = cp.Variable(5)
    return _bounded(x, [x[::2] >= 0, x[4] <= 0.3])


# --- spellings of equalities, inequalities


@row
def inequality_constant_matrix():
    x, y, h = cp.Variable(4), cp.Parameter(4), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [_constant(6, 6, 4) @ x <= h])
    return problem, [y, h], [x], lambda rng: [2 * rng.standard_normal((BATCH, 4)), rng.uniform(0.2, 1.0, (BATCH, 6))]


@row
def inequality_reversed():
    x, y, h = cp.Variable(4), cp.Parameter(4), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [-h <= _constant(6, 6, 4) @ x, x[0] + x[1] - 0.5 <= 0])
    return problem, [y, h], [x], lambda rng: [2 * rng.standard_normal((BATCH, 4)), rng.uniform(0.2, 1.0, 6)]


@row
def equality_moved_left():
    x, y = _vector()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) - 1 == 0, x >= 0])
    return problem, [y], [x], _points(5)


@row
def equality_as_two_inequalities():
    x, y = _vector()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) <= 1, cp.sum(x) >= 1, x >= 0])
    return problem, [y], [x], _points(5)


@row
def equality_only():
    x, y, b = cp.Variable(5), cp.Parameter(5), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [_constant(7, 2, 5) @ x == b])
    return problem, [y, b], [x], lambda rng: [rng.standard_normal((BATCH, 5)), rng.standard_normal((BATCH, 2))]


@row
def no_constraint():
    x, y = cp.Variable(4), cp.Parameter(6)
    return cp.Problem(cp.Minimize(cp.sum_squares(_constant(8, 6, 4) @ x - y))), [y], [x], _points(6)


@row
def no_rows():
    """Not even the rows that define auxiliary variables: the canonical form has no constraint matrix."""
    x, y = _vector()
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) - y @ x)), [y], [x], _points(5)


@row
def monotone():
    x, y = _vector()
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x[:-1] <= x[1:]]), [y], [x], _points(5)


@row
def affine_in_parameter():
    x, y, t = cp.Variable(4), cp.Parameter(4), cp.Parameter(4)
    constraints = [x <= 2 * t + 1, cp.sum(x) == cp.sum(t) - 0.5]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - 3 * y + 1)), constraints)
    return problem, [y, t], [x], lambda rng: [rng.standard_normal((BATCH, 4)), rng.uniform(-0.3, 0.3, (BATCH, 4))]


@row
def parameter_in_objective_and_constraint():
    x, y = _vector()
    constraints = [x >= 0, x <= 0.3 + 0.2 * y, cp.sum(x) <= 1]
    draw = lambda rng: [rng.uniform(-1.0, 1.0, (BATCH, 5))]  # noqa: E731
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y], [x], draw


@row
def inequality_parameter_matrix():
    """The parameter enters the constraint matrix."""
    x, y, G = cp.Variable(4), cp.Parameter(4), cp.Parameter((3, 4))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [G @ x <= 0.5])
    return problem, [y, G], [x], lambda rng: [2 * rng.standard_normal((BATCH, 4)), rng.standard_normal((BATCH, 3, 4))]


@row
def inequality_parameter_matrix_shared():
    x, y, G = cp.Variable(4), cp.Parameter(4), cp.Parameter((3, 4))
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) - y @ x), [G @ x <= 0.5, x >= -1])
    return problem, [G, y], [x], lambda rng: [rng.standard_normal((3, 4)), 2 * rng.standard_normal((BATCH, 4))]


@row
def everything_a_parameter():
    n = 4
    x, q = cp.Variable(n), cp.Parameter(n)
    root = cp.Parameter((n, n))
    A, b, G, h = cp.Parameter((1, n)), cp.Parameter(1), cp.Parameter((4, n)), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x), [A @ x == b, G @ x <= h])

    def draw(rng):
        return [
            rng.standard_normal((BATCH, n, n)) + 2 * np.eye(n),
            2 * rng.standard_normal((BATCH, n)),
            rng.standard_normal((BATCH, 1, n)),
            0.2 * rng.standard_normal((BATCH, 1)),
            rng.standard_normal((BATCH, 4, n)),
            rng.uniform(0.5, 1.0, (BATCH, 4)),
        ]

    return problem, [root, q, A, b, G, h], [x], draw


@row
def weighted_budget_parameter():
    x, y, a = cp.Variable(5), cp.Parameter(5), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [a @ x == 1, x >= 0])
    return problem, [y, a], [x], lambda rng: [rng.standard_normal((BATCH, 5)), rng.uniform(0.5, 2.0, 5)]


# --- polyhedral constraints in disguise


def _ball(constraint_of, scale=1.0):
    x, y = _vector()
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [constraint_of(x)]), [y], [x], _points(5, scale)


@row
def norm1_ball():
    return _ball(lambda x: cp.norm1(x) <= 1)


@row
def norm_inf_ball():
    return _ball(lambda x: cp.norm_inf(x) <= 0.5)


@row
def abs_bound():
    return _ball(lambda x: cp.abs(x) <= 0.5)


@row
def max_bound():
    return _ball(lambda x: cp.max(x) <= 0.3)


@row
def turnover():
    x, y, held = cp.Variable(5), cp.Parameter(5), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0, cp.norm1(x - held) <= 0.5])
    return problem, [y, held], [x], lambda rng: [rng.standard_normal((BATCH, 5)), rng.dirichlet(np.ones(5), BATCH)]


@row
def sum_of_positive_parts():
    return _ball(lambda x: cp.sum(cp.pos(x)) <= 1)


# --- matrices, scalars, many variables


@row
def birkhoff():
    X, M = cp.Variable((3, 3)), cp.Parameter((3, 3))
    constraints = [X >= 0, cp.sum(X, axis=0) == 1, cp.sum(X, axis=1) == 1]
    draw = lambda rng: [0.6 * rng.standard_normal((BATCH, 3, 3))]  # noqa: E731
    return cp.Problem(cp.Minimize(cp.sum_squares(X - M)), constraints), [M], [X], draw


@row
def transport():
    X, M, r, c = cp.Variable((3, 4), nonneg=True), cp.Parameter((3, 4)), cp.Parameter(3), cp.Parameter(3)
    constraints = [cp.sum(X, axis=1) == r, cp.sum(X, axis=0)[:3] == c]

    def draw(rng):
        shape = (BATCH, 3)
        return [0.5 * rng.standard_normal((BATCH, 3, 4)), rng.uniform(0.5, 0.8, shape), rng.uniform(0.2, 0.4, shape)]

    return cp.Problem(cp.Minimize(cp.sum_squares(X - M)), constraints), [M, r, c], [X], draw


@row
def transport_redundant():
    """One of the seven marginal rows depends on the others, at every value of the parameter."""
    X, M, r = cp.Variable((3, 4), nonneg=True), cp.Parameter((3, 4)), cp.Parameter(3)
    split = np.random.default_rng(9).dirichlet(np.ones(4), 3).T
    constraints = [cp.sum(X, axis=1) == r, cp.sum(X, axis=0) == split @ r]
    draw = lambda rng: [0.5 * rng.standard_normal((BATCH, 3, 4)), rng.uniform(0.5, 1.5, (BATCH, 3))]  # noqa: E731
    return cp.Problem(cp.Minimize(cp.sum_squares(X - M)), constraints), [M, r], [X], draw


@row
def symmetric_variable():
    X, M = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3))
    draw = lambda rng: [rng.standard_normal((BATCH, 3, 3))]  # noqa: E731
    return cp.Problem(cp.Minimize(cp.sum_squares(X - M)), [X >= 0, cp.sum(X) == 1]), [M], [X], draw


@row
def matrix_least_squares():
    X, A, Y = cp.Variable((3, 2)), cp.Parameter((4, 3)), cp.Parameter((4, 2))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ X - Y)), [X >= 0, cp.sum(X, axis=0) == 1])
    return problem, [A, Y], [X], lambda rng: [rng.standard_normal((4, 3)), rng.standard_normal((BATCH, 4, 2))]


@row
def symmetric_parameter():
    X, S = cp.Variable((3, 3)), cp.Parameter((3, 3), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X) - cp.sum(cp.multiply(S, X))), [X <= 0.3, cp.sum(X) == 1])

    def draw(rng):
        full = rng.standard_normal((BATCH, 3, 3))
        return [full + np.swapaxes(full, 1, 2)]

    return problem, [S], [X], draw


@row
def scalar_variable():
    t, s, low = cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(t - s)), [t >= low])
    draw = lambda rng: [np.array([-1.0, 0.5, 2.0]) + 0.1 * rng.standard_normal(BATCH), 0.1]  # noqa: E731
    return problem, [s, low], [t], draw


@row
def several_variables():
    """Returned in an order that is neither the problem's nor the alphabet's."""
    x, z, t = cp.Variable(3, name="x"), cp.Variable((2, 2), name="z"), cp.Variable(name="t")
    a, b = cp.Parameter(3), cp.Parameter((2, 2))
    objective = cp.sum_squares(x - a) + 2 * cp.sum_squares(z - b) + cp.square(t)
    constraints = [x >= 0, cp.sum(x) + cp.sum(z) == t, z <= 0.5, t <= 0.8]
    draw = lambda rng: [rng.standard_normal((BATCH, 2, 2)), rng.standard_normal((BATCH, 3))]  # noqa: E731
    return cp.Problem(cp.Minimize(objective), constraints), [b, a], [z, t, x], draw


@row
def definition_with_parameter_coefficient():
    """A row that would define t, were it not for a coefficient that changes from item to item."""
    x, t, y, s = cp.Variable(3), cp.Variable(3), cp.Parameter(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(t) + cp.sum_squares(x)), [s * t == x - y, x >= 0])
    return problem, [y, s], [x, t], lambda rng: [rng.standard_normal((BATCH, 3)), np.array([1.0, 2.0, -0.3])]


@row
def variable_not_returned():
    x, z, y = cp.Variable(4), cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + cp.sum_squares(z)), [x + z >= 0.2, cp.sum(x) <= 1])
    return problem, [y], [x], _points(4)


@row
def defined_variable():
    """An auxiliary variable the user introduced by hand."""
    x, r, y, R = cp.Variable(4), cp.Variable(6), cp.Parameter(6), _constant(10, 6, 4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(r)), [r == R @ x - y, x >= 0, cp.sum(x) == 1])
    return problem, [y], [x, r], _points(6)


@row
def column_vectors():
    x, y, G = cp.Variable((4, 1)), cp.Parameter((4, 1)), cp.Parameter((3, 4))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [G @ x <= 0.5, cp.sum(x) == 0.3])
    return problem, [y, G], [x], lambda rng: [2 * rng.standard_normal((BATCH, 4, 1)), rng.standard_normal((3, 4))]


@row
def transposed_matrices():
    X, M, B = cp.Variable((2, 3)), cp.Parameter((3, 2)), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X.T - M)), [X @ B <= 0.4, cp.trace(X[:, :2]) == 0.1])
    return problem, [M, B], [X], lambda rng: [rng.standard_normal((BATCH, 3, 2)), rng.standard_normal((BATCH, 3, 3))]


@row
def cumulative_sum():
    x, y, limit = cp.Variable(5), cp.Parameter(5), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.cumsum(x) <= limit, x >= -1])
    return problem, [y, limit], [x], lambda rng: [rng.standard_normal((BATCH, 5)), rng.uniform(0.2, 0.5, BATCH)]


@row
def convolution():
    x, y, kernel = cp.Variable(4), cp.Parameter(5), np.array([1.5, -0.5])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(cp.convolve(kernel, x) - y)), [x >= 0])
    return problem, [y], [x], _points(5)


@row
def nothing_batched():
    x, y = _vector()
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), _simplex(x)), [y], [x], lambda rng: [rng.standard_normal(5)]


# --- duals


@row
def dual_of_equality():
    x, y = _vector()
    budget = cp.sum(x) == 1
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0, budget])
    return problem, [y], [x, budget.dual_variables[0]], _points(5)


@row
def dual_of_inequality():
    x, y, h, G = cp.Variable(4), cp.Parameter(4), cp.Parameter(5), _constant(11, 5, 4)
    rows = G @ x <= h
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) - y @ x), [rows, x >= -2])
    draw = lambda rng: [2 * rng.standard_normal((BATCH, 4)), rng.uniform(0.2, 1.0, (BATCH, 5))]  # noqa: E731
    return problem, [y, h], [rows.dual_variables[0], x], draw


@row
def dual_of_bounds():
    x, y = _vector()
    low, high, budget = x >= 0, x <= 0.45, cp.sum(x) == 1
    duals = [c.dual_variables[0] for c in (high, low, budget)]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [low, high, budget])
    return problem, [y], duals, _points(5)


@row
def dual_of_reversed_rows():
    x, y, b = cp.Variable(4), cp.Parameter(4), cp.Parameter(2)
    rows, tie = 0.5 * np.ones(3) >= _constant(12, 3, 4) @ x, b == _constant(13, 2, 4) @ x
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [rows, tie])
    draw = lambda rng: [0.2 * rng.standard_normal((BATCH, 2)), 2 * rng.standard_normal((BATCH, 4))]  # noqa: E731
    return problem, [b, y], [rows.dual_variables[0], tie.dual_variables[0]], draw


@row
def dual_of_maximize():
    x, y = _vector()
    budget, cap = cp.sum(x) == 1, x <= 0.4
    problem = cp.Problem(cp.Maximize(y @ x - cp.sum_squares(x)), [budget, cap])
    return problem, [y], [budget.dual_variables[0], cap.dual_variables[0]], _points(5)


@row
def dual_of_scaled_rows():
    x, y = _vector()
    budget, low = 3 * cp.sum(x) == 3, 2 * x >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [budget, low])
    return problem, [y], [budget.dual_variables[0], low.dual_variables[0]], _points(5)


@row
def dual_with_parameter_matrix():
    x, y, G = cp.Variable(4), cp.Parameter(4), cp.Parameter((3, 4))
    rows = G @ x <= 0.5
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [rows])
    draw = lambda rng: [2 * rng.standard_normal((BATCH, 4)), rng.standard_normal((BATCH, 3, 4))]  # noqa: E731
    return problem, [y, G], [x, rows.dual_variables[0]], draw


@row
def dual_with_everything_a_parameter():
    x, q, root = cp.Variable(4), cp.Parameter(4), cp.Parameter((4, 4))
    A, b, G, h = cp.Parameter((1, 4)), cp.Parameter(1), cp.Parameter((3, 4)), cp.Parameter(3)
    tie, rows = A @ x == b, G @ x <= h
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x), [rows, tie])

    def draw(rng):
        return [
            rng.standard_normal((4, 4)) + 2 * np.eye(4),
            2 * rng.standard_normal((BATCH, 4)),
            rng.standard_normal((BATCH, 1, 4)),
            0.2 * rng.standard_normal((BATCH, 1)),
            rng.standard_normal((BATCH, 3, 4)),
            rng.uniform(0.1, 0.3, 3),
        ]

    return problem, [root, q, A, b, G, h], [x, tie.dual_variables[0], rows.dual_variables[0]], draw


@row
def dual_of_fixed_variable():
    x, y = _vector()
    fixed, low = x[0] == y[0], x[1:] >= 0
    draw = lambda rng: [0.5 * rng.standard_normal((BATCH, 5))]  # noqa: E731
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - 2 * y)), [fixed, low, cp.sum(x) == 1])
    return problem, [y], [low.dual_variables[0], fixed.dual_variables[0]], draw


@row
def dual_with_quad_form_parameter():
    x, y = _vector(4)
    P, rows = cp.Parameter((4, 4), PSD=True), x <= 0.2
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) - y @ x), [rows])
    draw = lambda rng: [_positive_definite(rng, 4, BATCH), 3 * rng.standard_normal((BATCH, 4))]  # noqa: E731
    return problem, [P, y], [rows.dual_variables[0], x], draw


@row
def dual_of_matrix_rows():
    X, M = cp.Variable((3, 2)), cp.Parameter((3, 2))
    columns, low = cp.sum(X, axis=0) == 1, X >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - M)), [columns, low])
    draw = lambda rng: [rng.standard_normal((BATCH, 3, 2))]  # noqa: E731
    return problem, [M], [low.dual_variables[0], columns.dual_variables[0]], draw


@row
def dual_of_definition():
    """The multiplier of a row that presolve removes as the definition of a variable."""
    x, r, y, R = cp.Variable(4), cp.Variable(6), cp.Parameter(6), _constant(14, 6, 4)
    definition = r == R @ x - y
    problem = cp.Problem(cp.Minimize(cp.sum_squares(r)), [definition, x >= 0])
    return problem, [y], [definition.dual_variables[0]], _points(6)


# --- degenerate rows, normal input


@row
def rows_duplicated():
    x, y, h, G = cp.Variable(4), cp.Parameter(4), cp.Parameter(5), _constant(15, 5, 4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [G @ x <= h, G @ x <= h, 2 * (G @ x) <= 2 * h])
    return problem, [y, h], [x], lambda rng: [2 * rng.standard_normal((BATCH, 4)), rng.uniform(0.2, 1.0, (BATCH, 5))]


@row
def rows_redundant():
    x, y = _vector()
    constraints = [x >= 0, cp.sum(x) == 1, x <= 1.5, cp.sum(x) <= 4, x[0] + x[1] <= 3]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y], [x], _points(5)


@row
def rows_dependent_equalities():
    x, y = _vector()
    constraints = [cp.sum(x) == 1, 2 * cp.sum(x) == 2, x[0] + x[1] == 0.5, x[2] + x[3] + x[4] == 0.5, x >= 0]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y], [x], _points(5)


@row
def rows_dependent_active():
    """Three active rows in the plane of two: the multipliers are not unique, the point and its derivative are."""
    x, y = cp.Variable(2), cp.Parameter(2)
    constraints = [x[0] <= 0.5, x[1] <= 0.5, cp.sum(x) <= 1]
    draw = lambda rng: [rng.uniform(1.5, 2.0, (BATCH, 2)) * np.array([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])]  # noqa: E731
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y], [x], draw


@row
def rows_empty():
    x, y = _vector()
    matrix = np.vstack([np.zeros(5), np.ones(5), np.zeros(5)])
    constraints = [0 * x <= 1, matrix @ x <= np.array([1.0, 1.0, 0.0]), np.zeros((1, 5)) @ x == 0, x >= 0]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y], [x], _points(5)


@row(insensitive=(0,))
def rows_fix_everything():
    """As many independent equalities as variables: the objective has no say, the gradient comes from b alone."""
    x, y, b = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [(_constant(16, 3, 3) + 2 * np.eye(3)) @ x == b])
    return problem, [y, b], [x], lambda rng: [rng.standard_normal((BATCH, 3)), rng.standard_normal((BATCH, 3))]


@row
def nothing_active():
    x, y = _vector()
    draw = lambda rng: [rng.uniform(0.2, 0.8, (BATCH, 5))]  # noqa: E731
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0, x <= 1]), [y], [x], draw
