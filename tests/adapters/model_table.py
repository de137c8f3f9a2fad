"""Rows of the table in the forms that published models use: regression, portfolios, control, flows, games, duals.

Importing this module completes the table of :mod:`program_table`. Most of these programs have a singular Hessian or
none at all.
"""

import cvxpy as cp
import numpy as np
from program_table import BATCH, TABLE, is_symmetric, row, truth

__all__ = ["TABLE", "is_symmetric", "truth"]


def _constant(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def _simplex(x):
    return [x >= 0, cp.sum(x) == 1]


def _normal(*shapes):
    """One array of standard normal numbers per shape, with the batch axis in front."""
    return lambda rng: [rng.standard_normal((BATCH, *shape)) for shape in shapes]


# --- regression with piecewise-linear losses


@row
def median_of_columns():
    x, Y = cp.Variable((1, 3)), cp.Parameter((5, 3))
    return cp.Problem(cp.Minimize(cp.sum(cp.abs(Y - np.ones((5, 1)) @ x)))), [Y], [x], _normal((5, 3))


@row
def least_absolute_deviations():
    x, X, y = cp.Variable(3), cp.Parameter((8, 3)), cp.Parameter(8)
    return cp.Problem(cp.Minimize(cp.norm1(y - X @ x))), [X, y], [x], _normal((8, 3), (8,))


@row
def least_largest_deviation():
    x, X, y = cp.Variable(3), cp.Parameter((8, 3)), cp.Parameter(8)
    return cp.Problem(cp.Minimize(cp.norm_inf(X @ x - y))), [X, y], [x], _normal((8, 3), (8,))


def _quantile(loss):
    w, intercept, y = cp.Variable(2), cp.Variable(), cp.Parameter(9)
    residual = y - _constant(30, 9, 2) @ w - intercept
    return cp.Problem(cp.Minimize(loss(residual))), [y], [w, intercept], _normal((9,))


@row
def quantile_regression():
    """No constraint of the user's: cvxpy refuses SCS such a problem."""
    return _quantile(lambda r: cp.sum(0.9 * cp.pos(r) + 0.1 * cp.neg(r)))


@row
def quantile_regression_as_maximum():
    return _quantile(lambda r: cp.sum(cp.maximum(0.85 * r, -0.15 * r)) / 9)


@row
def quantile_regression_as_tilted_abs():
    return _quantile(lambda r: 0.5 * cp.norm1(r) + 0.23 * cp.sum(r))


@row(insensitive=(2,))
def quantile_level_a_parameter():
    """The pinball loss is `level r + neg(r)`; r is a variable, so that the level may multiply it."""
    w, r, X, y, level = cp.Variable(2), cp.Variable(9), cp.Parameter((9, 2)), cp.Parameter(9), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(level * cp.sum(r) + cp.sum(cp.neg(r))), [r == y - X @ w])
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 9, 2)), rng.standard_normal((BATCH, 9)), rng.uniform(0.31, 0.69, BATCH)
    ]  # fmt: skip
    return problem, [X, y, level], [w], draw


@row
def ridge_of_absolute_losses():
    w, X, y, weight = cp.Variable(3), cp.Parameter((7, 3)), cp.Parameter(7), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.norm1(X @ w - y) + weight * cp.sum_squares(w)))
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 7, 3)), rng.standard_normal((BATCH, 7)), rng.uniform(0.5, 2.0, BATCH)
    ]  # fmt: skip
    return problem, [X, y, weight], [w], draw


@row
def huber_regression():
    """Nothing but the loss: its Hessian is singular on the epigraph, and X is a parameter."""
    w, X, y = cp.Variable(3), cp.Parameter((8, 3)), cp.Parameter(8)
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(X @ w - y, 0.7)))), [X, y], [w], _normal((8, 3), (8,))


@row
def lasso_everything_a_parameter():
    w, X, y, weight = cp.Variable(4), cp.Parameter((6, 4)), cp.Parameter(6), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(X @ w - y) + weight * cp.norm1(w)))
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 6, 4)), rng.standard_normal((BATCH, 6)), rng.uniform(0.2, 0.6, BATCH)
    ]  # fmt: skip
    return problem, [X, y, weight], [w], draw


@row
def elastic_net_everything_a_parameter():
    w, X, y = cp.Variable(4), cp.Parameter((6, 4)), cp.Parameter(6)
    lasso_weight, ridge_weight = cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    penalty = lasso_weight * cp.norm1(w) + ridge_weight * cp.sum_squares(w)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X @ w - y) / 6 + penalty))
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((6, 4)), rng.standard_normal((BATCH, 6)), rng.uniform(0.05, 0.2), rng.uniform(0.1, 1.0)
    ]  # fmt: skip
    return problem, [X, y, lasso_weight, ridge_weight], [w], draw


@row
def largest_of_groups():
    """The sum over groups of the largest absolute value."""
    W, Y, weight = cp.Variable((3, 2)), cp.Parameter((3, 2)), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(W - Y) + weight * cp.sum(cp.max(cp.abs(W), axis=1))))
    draw = lambda rng: [rng.standard_normal((BATCH, 3, 2)), rng.uniform(0.3, 0.8, BATCH)]  # noqa: E731
    return problem, [Y, weight], [W], draw


@row
def group_of_absolute_values():
    """One bound per group on the sum of its absolute values."""
    W, Y, limits = cp.Variable((3, 2)), cp.Parameter((3, 2)), cp.Parameter(3, nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(W - Y)), [cp.sum(cp.abs(W), axis=1) <= limits])
    draw = lambda rng: [rng.standard_normal((BATCH, 3, 2)), rng.uniform(0.3, 0.8, (BATCH, 3))]  # noqa: E731
    return problem, [Y, limits], [W], draw


# --- classification


@row
def support_vectors():
    """The labels times the data are the parameter; the intercept has no curvature."""
    w, b, X, labels = cp.Variable(2), cp.Variable(), cp.Parameter((8, 2)), np.array([1.0, -1] * 4)
    loss = cp.sum(cp.pos(1 - cp.multiply(labels, X @ w + b))) / 8
    draw = lambda rng: [rng.standard_normal((BATCH, 8, 2)) + 0.5 * labels[:, None]]  # noqa: E731
    return cp.Problem(cp.Minimize(loss + 0.05 * cp.sum_squares(w))), [X], [w, b], draw


@row
def support_vectors_with_slacks():
    w, b, slack = cp.Variable(2), cp.Variable(), cp.Variable(8, nonneg=True)
    X, cost, labels = cp.Parameter((8, 2)), cp.Parameter(nonneg=True), np.array([1.0, -1] * 4)
    rows = [cp.multiply(labels, X @ w + b) >= 1 - slack]
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(w) + cost * cp.sum(slack)), rows)
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 8, 2)) + 0.5 * labels[:, None], rng.uniform(0.5, 2.0, BATCH)
    ]  # fmt: skip
    return problem, [X, cost], [w, b, slack], draw


@row
def support_vectors_dual():
    """The dual of the same: the kernel's factor is the parameter, and it has fewer columns than rows."""
    a, Z, labels = cp.Variable(6), cp.Parameter((6, 2)), np.array([1.0, -1] * 3)
    Zt = cp.Variable(2)
    problem = cp.Problem(
        cp.Maximize(cp.sum(a) - 0.5 * cp.sum_squares(Zt)), [Zt == Z.T @ a, a >= 0, a <= 1, labels @ a == 0]
    )
    draw = lambda rng: [rng.standard_normal((BATCH, 6, 2)) + 0.3]  # noqa: E731
    return problem, [Z], [Zt], draw


@row(insensitive=(1,))
def sparse_support_vectors():
    """Hinge loss and an absolute-value penalty: a linear program."""
    w, X, weight, labels = cp.Variable(3), cp.Parameter((8, 3)), cp.Parameter(nonneg=True), np.array([1.0, -1] * 4)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.pos(1 - cp.multiply(labels, X @ w))) / 8 + weight * cp.norm1(w)))
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 8, 3)) + 0.5 * labels[:, None], rng.uniform(0.02, 0.1, BATCH)
    ]  # fmt: skip
    return problem, [X, weight], [w], draw


# --- smoothing and shape constraints


def _monotone(squared):
    def build():
        x, y = cp.Variable(6), cp.Parameter(6)
        distance = cp.sum_squares(y - x) if squared else cp.norm2(y - x)
        return cp.Problem(cp.Minimize(distance), [cp.diff(x) >= 0]), [y], [x], _normal((6,))

    return build


@row(judge=_monotone(squared=True))
def monotone_regression_by_the_norm():
    """A second-order cone for cvxpy; the minimiser is that of the square."""
    return _monotone(squared=False)()


def _monotone_features(squared):
    def build():
        w, X, y = cp.Variable(3), cp.Parameter((7, 3)), cp.Parameter(7)
        distance = cp.sum_squares(X @ w - y) if squared else 2 * cp.norm(X @ w - y, 2) + 1
        return cp.Problem(cp.Minimize(distance), [cp.diff(w) >= 0]), [X, y], [w], _normal((7, 3), (7,))

    return build


@row(judge=_monotone_features(squared=True))
def monotone_coefficients_by_the_norm():
    return _monotone_features(squared=False)()


@row
def total_variation_weight_a_parameter():
    x, y, weight = cp.Variable(6), cp.Parameter(6), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - y) + weight * cp.tv(x)))
    draw = lambda rng: [rng.standard_normal((BATCH, 6)), rng.uniform(0.2, 0.5, BATCH)]  # noqa: E731
    return problem, [y, weight], [x], draw


@row
def trend_filter():
    x, y, weight = cp.Variable(7), cp.Parameter(7), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + weight * cp.norm1(cp.diff(x, 2))))
    draw = lambda rng: [rng.standard_normal((BATCH, 7)), rng.uniform(0.2, 0.5)]  # noqa: E731
    return problem, [y, weight], [x], draw


@row
def smoothing_through_data():
    """Curvature in the differences only, and equalities only."""
    x, y = cp.Variable(8), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(cp.diff(x, 2))), [x[np.array([0, 3, 6])] == y])
    return problem, [y], [x], _normal((3,))


@row
def smoothing_with_weights():
    """Parameters in the quadratic, of squares of a variable and of squares of its differences."""
    x, p, k, q = cp.Variable(5), cp.Parameter(5, nonneg=True), cp.Parameter(nonneg=True), cp.Parameter(5)
    objective = cp.sum(cp.multiply(p, cp.square(x))) + k * cp.sum(cp.square(cp.diff(x))) + q @ x
    draw = lambda rng: [  # noqa: E731
        rng.uniform(0.5, 2.0, (BATCH, 5)), rng.uniform(0.5, 2.0, BATCH), 2 * rng.standard_normal((BATCH, 5))
    ]  # fmt: skip
    return cp.Problem(cp.Minimize(objective), [x >= -0.5, cp.sum(x) == 0.3]), [p, k, q], [x], draw


@row
def smoothing_with_singular_weights():
    """Only the differences carry a parametric weight: the Hessian is singular, the sum of x is held by a row."""
    x, k, q = cp.Variable(5), cp.Parameter(4, nonneg=True), cp.Parameter(5)
    objective = cp.sum(cp.multiply(k, cp.square(cp.diff(x)))) + q @ x
    draw = lambda rng: [rng.uniform(0.5, 2.0, (BATCH, 4)), rng.standard_normal((BATCH, 5))]  # noqa: E731
    return cp.Problem(cp.Minimize(objective), [x <= 1, cp.sum(x) == 1]), [k, q], [x], draw


# --- portfolios and costs


@row
def portfolio_with_leverage():
    w, mu = cp.Variable(6), cp.Parameter(6)
    risk = 0.4 * cp.sum_squares(_constant(31, 3, 6) @ w) + 0.4 * cp.sum_squares(w)
    constraints = [cp.sum(w) == 1, cp.norm(w, 1) <= 1.5, cp.norm(w, "inf") <= 0.5]
    return cp.Problem(cp.Maximize(mu @ w - risk), constraints), [mu], [w], _normal((6,))


@row
def portfolio_with_turnover():
    w, mu, held, root = cp.Variable(5), cp.Parameter(5), cp.Parameter(5), cp.Parameter((5, 5))
    constraints = [cp.sum(w) == 1, cp.norm(w, 1) <= 1.6, cp.norm(w, "inf") <= 0.5, cp.norm(w - held, 1) <= 0.7]
    problem = cp.Problem(cp.Maximize(mu @ w - 0.5 * cp.sum_squares(root @ w)), constraints)

    def draw(rng):
        roots = 0.3 * rng.standard_normal((BATCH, 5, 5)) + np.eye(5)
        return [rng.standard_normal((BATCH, 5)), 0.4 * rng.dirichlet(np.ones(5), BATCH) + 0.12, roots]

    return problem, [mu, held, root], [w], draw


@row
def portfolio_with_costs():
    """Costs of trades and of short positions, each with its own price."""
    w, u, mu, held = cp.Variable(5), cp.Variable(5), cp.Parameter(5), cp.Parameter(5)
    kappa, s = cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    costs = kappa * cp.sum(cp.abs(u)) + s * cp.sum(cp.neg(w))
    problem = cp.Problem(
        cp.Maximize(mu @ w - costs - cp.sum_squares(_constant(32, 5, 5) @ w)), [w == held + u, cp.sum(u) == 0]
    )
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 5)), rng.standard_normal((BATCH, 5)) / 3,
        rng.uniform(0.05, 0.2, BATCH), rng.uniform(0.05, 0.2, BATCH),
    ]  # fmt: skip
    return problem, [mu, held, kappa, s], [w, u], draw


@row(insensitive=(1, 2))
def newsvendor():
    """Piecewise-linear losses with parametric prices; a linear program, so that prices move nothing."""
    q, demand, over, under = cp.Variable(4), cp.Parameter(4), cp.Parameter(4, nonneg=True), cp.Parameter(4, nonneg=True)
    gap = cp.Variable(4)
    losses = cp.multiply(over, cp.pos(gap)) + cp.multiply(under, cp.neg(gap))
    problem = cp.Problem(cp.Minimize(cp.sum(losses)), [gap == q - demand, q >= 0, cp.sum(q) <= 2.0])
    draw = lambda rng: [  # noqa: E731
        rng.uniform(0.3, 1.5, (BATCH, 4)), rng.uniform(0.5, 2.0, (BATCH, 4)), rng.uniform(0.5, 2.0, (BATCH, 4))
    ]  # fmt: skip
    return problem, [demand, over, under], [q], draw


@row
def newsvendor_with_probabilities():
    """One order against a discrete demand: predicted probabilities weigh linear and quadratic costs."""
    z, short, left = cp.Variable(), cp.Variable(5, nonneg=True), cp.Variable(5, nonneg=True)
    p, demand = cp.Parameter(5, nonneg=True), np.array([0.1, 0.2, 0.5, 1.0, 2.0])
    losses = 4 * short + cp.square(short) + 2 * left + 0.5 * cp.square(left)
    problem = cp.Problem(
        cp.Minimize(z + 0.1 * cp.square(z) + cp.sum(cp.multiply(p, losses))),
        [short >= demand - z, left >= z - demand],
    )
    return problem, [p], [z], lambda rng: [0.8 * rng.dirichlet(np.ones(5), BATCH) + 0.04]


@row
def conditional_value_at_risk():
    """The mean of the worst fifth of ten scenarios, which are the parameter: a linear program."""
    w, level, R, target = cp.Variable(4), cp.Variable(), cp.Parameter((10, 4)), cp.Parameter()
    risk = level + cp.sum(cp.pos(-R @ w - level)) / 2
    problem = cp.Problem(cp.Minimize(risk), [w >= 0, cp.sum(w) == 1, cp.sum(R @ w) >= 10 * target])
    draw = lambda rng: [0.3 + rng.standard_normal((BATCH, 10, 4)), rng.uniform(-0.1, 0.3, BATCH)]  # noqa: E731
    return problem, [R, target], [w], draw


@row
def largest_of_affine_functions():
    x, A, b, target = cp.Variable(3), cp.Parameter((5, 3)), cp.Parameter(5), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.max(A @ x + b) + 0.5 * cp.sum_squares(x - target)))
    return problem, [A, b, target], [x], _normal((5, 3), (5,), (3,))


@row
def sum_of_maxima():
    x, c, target = cp.Variable(4), cp.Parameter(4, nonneg=True), cp.Parameter(4)
    z = cp.Variable(4)
    losses = cp.sum(cp.multiply(c, cp.maximum(z, -0.5 * z, 3 * z - 1)))
    problem = cp.Problem(cp.Minimize(losses + cp.sum_squares(x)), [z == x - target])
    draw = lambda rng: [rng.uniform(0.5, 2.0, (BATCH, 4)), rng.standard_normal((BATCH, 4))]  # noqa: E731
    return problem, [c, target], [x], draw


@row
def scheduling_with_ramps():
    """Generation against a forecast: under- and over-production have prices, ramps have limits."""
    g, d, under, over = cp.Variable(6), cp.Parameter(6), cp.Parameter(6, nonneg=True), cp.Parameter(6, nonneg=True)
    gap = cp.Variable(6)
    cost = cp.sum(cp.multiply(under, cp.neg(gap)) + cp.multiply(over, cp.pos(gap))) + 0.5 * cp.sum_squares(g - d)
    problem = cp.Problem(cp.Minimize(cost), [gap == g - d, cp.abs(cp.diff(g)) <= 0.4])
    draw = lambda rng: [  # noqa: E731
        rng.uniform(0.0, 2.0, (BATCH, 6)), rng.uniform(0.5, 2.0, (BATCH, 6)), rng.uniform(0.1, 0.4, (BATCH, 6))
    ]  # fmt: skip
    return problem, [d, under, over], [g], draw


# --- control


def _drive(horizon, limits, parametric):
    """Model predictive control of a double integrator; only the first input is returned."""
    states = [cp.Variable(2) for _ in range(horizon)]
    inputs = [cp.Variable(1) for _ in range(horizon)]
    start = cp.Parameter(2)
    A, B = np.array([[1.0, 0.3], [0.0, 1.0]]), np.array([[0.0], [0.3]])
    parameters = [start]
    draw = lambda rng: [rng.uniform(0.5, 1.0, (BATCH, 2)) * rng.choice([-1.0, 1.0], (BATCH, 2))]  # noqa: E731
    if parametric:
        first, second = cp.Parameter((2, 2)), cp.Parameter((2, 1))
        parameters += [first, second]
        start_draw, a, b = draw, A, B
        draw = lambda rng: [  # noqa: E731
            *start_draw(rng), a + 0.05 * rng.standard_normal((BATCH, 2, 2)), b + 0.05 * rng.standard_normal((2, 1))
        ]  # fmt: skip
        A, B = first, second
    cost, constraints, before = 0, [], start
    for state, control in zip(states, inputs, strict=True):
        cost += cp.sum_squares(np.diag([1.0, 0.3]) @ state) + 0.1 * cp.sum_squares(control)
        constraints.append(state == A @ before + B @ control)
        constraints += limits(state, control)
        before = state
    return cp.Problem(cp.Minimize(cost), constraints), parameters, [inputs[0]], draw


@row
def control_unbounded():
    """The linear-quadratic regulator: equalities only."""
    return _drive(7, lambda state, control: [], parametric=False)


@row
def control_with_limits():
    return _drive(7, lambda state, control: [cp.abs(control) <= 2, state[1] <= 0.55, state[1] >= -0.55], False)


@row
def control_with_system_parameters():
    """`A @ x0` would be a product of parameters: x0 is a variable held by a row."""
    horizon = 6
    x, u = cp.Variable((2, horizon + 1)), cp.Variable((1, horizon))
    start, A, B = cp.Parameter(2), cp.Parameter((2, 2)), cp.Parameter((2, 1))
    constraints = [x[:, 0] == start, x[:, 1:] == A @ x[:, :-1] + B @ u, cp.abs(u) <= 1.5, x[1, 1:] >= -0.8]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x[:, 1:]) + 0.1 * cp.sum_squares(u)), constraints)

    def draw(rng):
        a = np.array([[1.0, 0.3], [0.0, 1.0]]) + 0.05 * rng.standard_normal((BATCH, 2, 2))
        b = np.array([[0.0], [0.3]]) + 0.05 * rng.standard_normal((2, 1))
        return [rng.uniform(0.5, 1.0, (BATCH, 2)) * rng.choice([-1.0, 1.0], (BATCH, 2)), a, b]

    return problem, [start, A, B], [u, x], draw


@row
def control_first_input():
    """Only the first input is a variable of its own, and only it is returned."""
    horizon = 6
    x, first, rest = cp.Variable((2, horizon + 1)), cp.Variable(1), cp.Variable((1, horizon - 1))
    start, A, B = cp.Parameter(2), cp.Parameter((2, 2)), np.array([[0.05], [0.3]])
    constraints = [
        x[:, 0] == start,
        x[:, 1] == A @ x[:, 0] + B @ first,
        x[:, 2:] == A @ x[:, 1:-1] + B @ rest,
        cp.abs(rest) <= 1.5,
        x[1, 1:] >= -0.5,
    ]
    cost = cp.sum_squares(x[:, 1:]) + 0.1 * cp.sum_squares(rest) + 0.1 * cp.sum_squares(first)

    def draw(rng):
        a = np.array([[1.0, 0.3], [0.0, 1.0]]) + 0.05 * rng.standard_normal((BATCH, 2, 2))
        return [rng.uniform(0.5, 1.0, (BATCH, 2)) * rng.choice([-1.0, 1.0], (BATCH, 2)), a]

    return cp.Problem(cp.Minimize(cost), constraints), [start, A], [first], draw


@row
def control_by_absolute_values():
    """Costs of the inputs by absolute value with a parametric price: a semidefinite Hessian."""
    x, u, start, price = cp.Variable((2, 5)), cp.Variable((1, 4)), cp.Parameter(2), cp.Parameter(nonneg=True)
    A, B = np.array([[1.0, 0.3], [0.0, 1.0]]), np.array([[0.05], [0.3]])
    constraints = [x[:, 0] == start, x[:, 1:] == A @ x[:, :-1] + B @ u, cp.abs(u) <= 1]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + price * cp.sum(cp.abs(u))), constraints)
    draw = lambda rng: [rng.standard_normal((BATCH, 2)), rng.uniform(0.05, 0.2, BATCH)]  # noqa: E731
    return problem, [start, price], [u], draw


@row
def dynamic_programming_step():
    """A quadratic value function of the next state, given by its root and a linear term."""
    y, u, fx, B = cp.Variable(3), cp.Variable(2), cp.Parameter(3), cp.Parameter((3, 2))
    P_sqrt, q = cp.Parameter((3, 3)), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(P_sqrt @ y) + q @ y), [y == fx + B @ u, u <= 0.5, u >= -0.5])
    return problem, [P_sqrt, q, fx, B], [u], _normal((3, 3), (3,), (3,), (3, 2))


@row
def dynamic_programming_step_more_inputs_than_states():
    """The next state is unique, the input is not, and only the state is returned."""
    y, u, fx, B = cp.Variable(2), cp.Variable(4), cp.Parameter(2), cp.Parameter((2, 4))
    P_sqrt, q = cp.Parameter((2, 2)), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(P_sqrt @ y) + q @ y), [y == fx + B @ u, u <= 0.1, u >= -0.1])
    return problem, [P_sqrt, q, fx, B], [y], _normal((2, 2), (2,), (2,), (2, 4))


# --- linear programs on graphs

_ARCS = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5), (0, 5)]


def _incidence(nodes, arcs):
    matrix = np.zeros((nodes, len(arcs)))
    for k, (tail, head) in enumerate(arcs):
        matrix[tail, k], matrix[head, k] = 1.0, -1.0
    return matrix


@row(insensitive=(0,))
def shortest_path():
    """Flow conservation at every node, one row of which is redundant."""
    f, c = cp.Variable(10, nonneg=True), cp.Parameter(10)
    problem = cp.Problem(cp.Minimize(c @ f), [_incidence(6, _ARCS) @ f == np.array([1.0, 0, 0, 0, 0, -1])])
    return problem, [c], [f], lambda rng: [rng.uniform(0.5, 1.5, (BATCH, 10)) + np.array([0.0] * 9 + [2.0])]


@row(insensitive=(0,))
def flow_of_least_cost():
    f, c, supply, capacity = cp.Variable(10, nonneg=True), cp.Parameter(10), cp.Parameter(5), cp.Parameter(10)
    constraints = [_incidence(6, _ARCS)[:5] @ f == supply, f <= capacity]
    draw = lambda rng: [  # noqa: E731
        rng.uniform(0.5, 1.5, (BATCH, 10)), rng.uniform(0.1, 0.5, (BATCH, 5)), rng.uniform(0.6, 1.2, 10)
    ]  # fmt: skip
    return cp.Problem(cp.Minimize(c @ f), constraints), [c, supply, capacity], [f], draw


@row(insensitive=(0,))
def optimal_transport():
    """One marginal row depends on the others, at every value of the parameter."""
    T, C, r = cp.Variable((3, 4), nonneg=True), cp.Parameter((3, 4)), cp.Parameter(3)
    split = np.random.default_rng(33).dirichlet(np.ones(4), 3).T
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.multiply(C, T))), [cp.sum(T, axis=1) == r, cp.sum(T, axis=0) == split @ r]
    )
    draw = lambda rng: [rng.uniform(0.0, 1.0, (BATCH, 3, 4)), rng.uniform(0.5, 1.5, (BATCH, 3))]  # noqa: E731
    return problem, [C, r], [T], draw


@row(insensitive=(0,))
def optimal_transport_marginals():
    T, C, r, c = cp.Variable((3, 4)), cp.Parameter((3, 4)), cp.Parameter(3), cp.Parameter(3)
    constraints = [T >= 0, cp.sum(T, axis=1) == r, cp.sum(T[:, :3], axis=0) == c]
    draw = lambda rng: [  # noqa: E731
        rng.uniform(0.0, 1.0, (BATCH, 3, 4)), rng.uniform(0.5, 0.8, (BATCH, 3)), rng.uniform(0.2, 0.4, (BATCH, 3))
    ]  # fmt: skip
    return cp.Problem(cp.Minimize(cp.trace(C.T @ T)), constraints), [C, r, c], [T], draw


@row(insensitive=(0,))
def assignment():
    """A vertex of the Birkhoff polytope: many more rows hold than are needed."""
    X, C = cp.Variable((3, 3), nonneg=True), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Maximize(cp.sum(cp.multiply(C, X))), [cp.sum(X, axis=0) == 1, cp.sum(X, axis=1) == 1])
    return problem, [C], [X], _normal((3, 3))


@row(insensitive=(0,))
def linear_program_on_the_simplex():
    x, c, budget = cp.Variable(5), cp.Parameter(5), cp.Parameter()
    problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == budget])
    return problem, [c, budget], [x], lambda rng: [rng.standard_normal((BATCH, 5)), rng.uniform(0.5, 1.5, BATCH)]


@row(insensitive=(0,))
def linear_program_everything_a_parameter():
    x, c = cp.Variable(3), cp.Parameter(3)
    A, b, G, h = cp.Parameter((1, 3)), cp.Parameter(1), cp.Parameter((4, 3)), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(c @ x), [A @ x == b, G @ x <= h, cp.norm_inf(x) <= 3])
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 3)), rng.standard_normal((BATCH, 1, 3)), 0.2 * rng.standard_normal((BATCH, 1)),
        rng.standard_normal((BATCH, 4, 3)), rng.uniform(0.5, 1.0, (BATCH, 4)),
    ]  # fmt: skip
    return problem, [c, A, b, G, h], [x], draw


@row(insensitive=(0,))
def fractional_knapsack():
    x, value, weight, room = cp.Variable(6), cp.Parameter(6), cp.Parameter(6), cp.Parameter()
    problem = cp.Problem(cp.Maximize(value @ x), [x >= 0, x <= 1, weight @ x <= room])
    draw = lambda rng: [  # noqa: E731
        rng.uniform(0.5, 1.5, (BATCH, 6)), rng.uniform(0.5, 1.5, (BATCH, 6)), rng.uniform(1.5, 3.0, BATCH)
    ]  # fmt: skip
    return problem, [value, weight, room], [x], draw


# --- games, epigraphs, products of parameters


def _game(spelled):
    """A matrix game; the matrix is shifted so that every strategy of the row player is worth considering."""
    x, A = cp.Variable(3), cp.Parameter((3, 3))
    objective, constraints = spelled(x, A)
    draw = lambda rng: [np.eye(3) * rng.uniform(1, 2, (BATCH, 3, 1)) + 0.2 * rng.standard_normal((BATCH, 3, 3))]  # noqa: E731
    return cp.Problem(objective, [x >= 0, cp.sum(x) == 1, *constraints]), [A], [x], draw


@row
def game_as_maximum_of_a_minimum():
    return _game(lambda x, A: (cp.Maximize(cp.min(A @ x)), []))


@row
def game_as_minimum_of_a_maximum():
    return _game(lambda x, A: (cp.Minimize(cp.max(A.T @ x)), []))


@row
def game_by_epigraph():
    t = cp.Variable()
    return _game(lambda x, A: (cp.Maximize(t), [A @ x >= t]))


@row
def game_with_its_duals():
    """The multipliers are the strategy of the other player."""
    x, t, A = cp.Variable(3), cp.Variable(), cp.Parameter((3, 3))
    rows, total = A @ x >= t, cp.sum(x) == 1
    draw = lambda rng: [np.eye(3) * rng.uniform(1, 2, (BATCH, 3, 1)) + 0.2 * rng.standard_normal((BATCH, 3, 3))]  # noqa: E731
    problem = cp.Problem(cp.Maximize(t), [x >= 0, total, rows])
    return problem, [A], [rows.dual_variables[0], total.dual_variables[0], t], draw


@row
def fair_allocation():
    """Maximise the least utility and, a little, a strictly concave rest."""
    x, gain = cp.Variable(4), cp.Parameter((4, 4))
    objective = cp.min(gain @ x) - 0.1 * cp.sum_squares(x)
    draw = lambda rng: [rng.uniform(0.0, 1.0, (BATCH, 4, 4)) + np.eye(4)]  # noqa: E731
    return cp.Problem(cp.Maximize(objective), [x >= 0, cp.sum(x) <= 2]), [gain], [x], draw


@row
def largest_ball():
    """The Chebyshev centre of a polytope with parametric offsets."""
    c, r, h, G = (
        cp.Variable(2),
        cp.Variable(),
        cp.Parameter(5),
        np.array([[1, 0.1], [0, 1], [-1, -0.8], [1, 1.5], [-1, 0.2]]),
    )
    problem = cp.Problem(cp.Maximize(r), [G @ c + r * np.linalg.norm(G, axis=1) <= h])
    return problem, [h], [c, r], lambda rng: [rng.uniform(0.5, 1.5, (BATCH, 5))]


@row
def product_of_two_parameters():
    """A variable equal to one parameter stands for it where another parameter multiplies it."""
    x, held, y, W, s = cp.Variable(4), cp.Variable(4), cp.Parameter(4), cp.Parameter(4), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [held == W, x <= s * held, cp.sum(x) == 0.2])
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 4)), rng.uniform(0.3, 0.6, (BATCH, 4)), rng.uniform(0.5, 1.5, BATCH)
    ]  # fmt: skip
    return problem, [y, W, s], [x], draw


@row
def product_of_two_parameters_in_the_objective():
    """Matrices: the copy of W is what the second factor multiplies, and there is no inequality."""
    x, copy, W, v, y = cp.Variable(3), cp.Variable((3, 2)), cp.Parameter((3, 2)), cp.Parameter(2), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - copy @ v) + cp.norm1(x - y)), [copy == W])
    return problem, [W, v, y], [x], _normal((3, 2), (2,), (3,))


def _around(name_the_argument):
    def build():
        x, y, P = cp.Variable(4), cp.Parameter(4), cp.Parameter((4, 4), PSD=True)
        constraints = _simplex(x)
        if name_the_argument:
            t = cp.Variable(4)
            distance, constraints = cp.quad_form(t, P), [*constraints, t == x - y]
        else:
            distance = cp.quad_form(x - y, P)

        def draw(rng):
            factor = rng.standard_normal((BATCH, 4, 4))
            return [rng.standard_normal((BATCH, 4)), 0.3 * factor @ np.swapaxes(factor, 1, 2) + 2.5 * np.eye(4)]

        return cp.Problem(cp.Minimize(distance + cp.sum(x[:2])), constraints), [y, P], [x], draw

    return build


@row(judge=_around(True), stock_refuses=True)
def quad_form_with_both_arguments_parameters():
    """Not DPP by any of cvxpy's rules; our layer gives the argument a variable of its own."""
    return _around(False)()


# --- multipliers of linear programs and of singular Hessians


@row(insensitive=(1, 2))
def dual_of_linear_program():
    """Multipliers are the vertex of the dual program: prices move them, right-hand sides do not."""
    x, c, h, b = cp.Variable(4), cp.Parameter(4), cp.Parameter(4), cp.Parameter()
    total, cap, low = cp.sum(x) == b, x <= h, x >= 0
    duals = [total.dual_variables[0], cap.dual_variables[0], low.dual_variables[0]]
    problem = cp.Problem(cp.Minimize(c @ x), [total, cap, low])
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 4)), rng.uniform(0.3, 0.6, (BATCH, 4)), rng.uniform(0.9, 1.1, BATCH)
    ]  # fmt: skip
    return problem, [c, h, b], duals, draw


@row(insensitive=(1,))
def dual_of_linear_program_maximised():
    x, c, h, G = cp.Variable(3), cp.Parameter(3), cp.Parameter(5), _constant(35, 5, 3)
    rows, low, high = h >= G @ x, x >= -2, x <= 2
    duals = [rows.dual_variables[0], low.dual_variables[0], high.dual_variables[0]]
    draw = lambda rng: [rng.standard_normal((BATCH, 3)), rng.uniform(0.5, 1.0, (BATCH, 5))]  # noqa: E731
    return cp.Problem(cp.Maximize(c @ x), [rows, low, high]), [c, h], duals, draw


@row
def dual_of_linear_program_everything_a_parameter():
    """The point moves with b, h and the matrices, the multipliers with c and the matrices."""
    x, c = cp.Variable(3), cp.Parameter(3)
    A, b, G, h = cp.Parameter((1, 3)), cp.Parameter(1), cp.Parameter((4, 3)), cp.Parameter(4)
    tie, rows, box = A @ x == b, G @ x <= h, cp.norm_inf(x) <= 3
    problem = cp.Problem(cp.Minimize(c @ x), [tie, rows, box])
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 3)), rng.standard_normal((BATCH, 1, 3)), 0.2 * rng.standard_normal((BATCH, 1)),
        rng.standard_normal((BATCH, 4, 3)), rng.uniform(0.5, 1.0, (BATCH, 4)),
    ]  # fmt: skip
    return problem, [c, A, b, G, h], [x, rows.dual_variables[0], tie.dual_variables[0], box.dual_variables[0]], draw


@row(insensitive=(1,))
def dual_of_flow():
    """Prices of the nodes, with one node as the reference."""
    f, c, supply = cp.Variable(10, nonneg=True), cp.Parameter(10), cp.Parameter(5)
    nodes, capacity = _incidence(6, _ARCS)[:5] @ f == supply, f <= 0.9
    draw = lambda rng: [rng.uniform(0.5, 1.5, (BATCH, 10)), rng.uniform(0.1, 0.4, (BATCH, 5))]  # noqa: E731
    problem = cp.Problem(cp.Minimize(c @ f), [nodes, capacity])
    return problem, [c, supply], [nodes.dual_variables[0], capacity.dual_variables[0]], draw


@row
def dual_of_norm_balls():
    """One number each: the price of the radius."""
    x, y, r, s = cp.Variable(5), cp.Parameter(5), cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    one, largest = cp.norm1(x) <= r, cp.norm_inf(x) <= s
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [one, largest])
    draw = lambda rng: [  # noqa: E731
        2 * rng.standard_normal((BATCH, 5)), rng.uniform(1.0, 1.5, BATCH), rng.uniform(0.4, 0.6, BATCH)
    ]  # fmt: skip
    return problem, [y, r, s], [one.dual_variables[0], largest.dual_variables[0], x], draw


@row
def dual_of_norm_ball_of_a_linear_program():
    """The dual norm: the multiplier of `norm1(x) <= r` is the largest absolute price."""
    x, c, r = cp.Variable(5), cp.Parameter(5), cp.Parameter(nonneg=True)
    ball = cp.norm1(x) <= r
    draw = lambda rng: [rng.standard_normal((BATCH, 5)), rng.uniform(1.0, 1.5, BATCH)]  # noqa: E731
    return cp.Problem(cp.Minimize(c @ x), [ball]), [c, r], [ball.dual_variables[0], x], draw


@row
def dual_of_singular_hessian():
    """Curvature on two of four variables; every kind of row."""
    x, root, q = cp.Variable(4), cp.Parameter((2, 4)), cp.Parameter(4)
    b, h = cp.Parameter(), cp.Parameter(3)
    tie, rows, low, high = cp.sum(x) == b, _constant(36, 3, 4) @ x <= h, x >= -1, x <= 1.5
    duals = [c.dual_variables[0] for c in (high, low, rows, tie)]
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x), [tie, rows, low, high])
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 2, 4)), rng.standard_normal((BATCH, 4)),
        rng.uniform(-0.5, 0.5, BATCH), rng.uniform(0.3, 1.0, (BATCH, 3)),
    ]  # fmt: skip
    return problem, [root, q, b, h], [*duals, x], draw


@row
def dual_of_dynamics():
    """The price of the state: the multiplier of `y == fx + B @ u`."""
    y, u, fx, B, q = cp.Variable(3), cp.Variable(2), cp.Parameter(3), cp.Parameter((3, 2)), cp.Parameter(3)
    dynamics, low, high = y == fx + B @ u, u >= -0.5, u <= 0.5
    problem = cp.Problem(cp.Minimize(cp.sum_squares(_constant(37, 3, 3) @ y) + q @ y), [dynamics, low, high])
    duals = [dynamics.dual_variables[0], low.dual_variables[0], high.dual_variables[0]]
    return problem, [fx, B, q], duals, _normal((3,), (3, 2), (3,))


@row
def dual_of_fitted_residuals():
    """The multiplier of the residuals' definition is the slope of the loss, between -1 and 1."""
    w, r, X, y = cp.Variable(2), cp.Variable(7), cp.Parameter((7, 2)), cp.Parameter(7)
    definition = r == X @ w - y
    problem = cp.Problem(cp.Minimize(cp.norm1(r)), [definition])
    return problem, [X, y], [definition.dual_variables[0], w], _normal((7, 2), (7,))


@row
def dual_of_support_vectors():
    """The multipliers of the margins are the weights of the support vectors."""
    w, b, slack = cp.Variable(2), cp.Variable(), cp.Variable(8)
    X, cost, labels = cp.Parameter((8, 2)), cp.Parameter(nonneg=True), np.array([1.0, -1] * 4)
    margins, positive = cp.multiply(labels, X @ w + b) >= 1 - slack, slack >= 0
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(w) + cost * cp.sum(slack)), [margins, positive])
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 8, 2)) + 0.5 * labels[:, None], rng.uniform(0.5, 2.0, BATCH)
    ]  # fmt: skip
    return problem, [X, cost], [margins.dual_variables[0], positive.dual_variables[0]], draw


@row(insensitive=(1,))
def dual_of_transport():
    """Matrix rows; the marginals that are left out make the prices unique."""
    T, C, r = cp.Variable((3, 4)), cp.Parameter((3, 4)), cp.Parameter(3)
    rows, columns, low = cp.sum(T, axis=1) == r, cp.sum(T[:, :3], axis=0) == 0.4, T >= 0
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(C, T))), [rows, columns, low])
    duals = [rows.dual_variables[0], columns.dual_variables[0], low.dual_variables[0]]
    draw = lambda rng: [rng.uniform(0.0, 1.0, (BATCH, 3, 4)), rng.uniform(0.5, 0.8, (BATCH, 3))]  # noqa: E731
    return problem, [C, r], duals, draw


@row
def dual_of_constraint_classes():
    """Constraints given as membership in a cone, with the sign cvxpy gives their multipliers."""
    x, y, h, b = cp.Variable(4), cp.Parameter(4), cp.Parameter(3), cp.Parameter()
    inside, zero, most = cp.NonNeg(h - _constant(38, 3, 4) @ x), cp.Zero(cp.sum(x) - b), cp.NonNeg(0.6 - x)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x[:2] - y[:2]) + y[2:] @ x[2:]), [inside, zero, most, x >= -1])
    duals = [inside.dual_variables[0], zero.dual_variables[0], most.dual_variables[0]]
    draw = lambda rng: [  # noqa: E731
        rng.standard_normal((BATCH, 4)), rng.uniform(0.3, 1.0, (BATCH, 3)), rng.uniform(-0.5, 0.5, BATCH)
    ]  # fmt: skip
    return problem, [y, h, b], [*duals, x], draw


@row
def dual_of_absolute_rows():
    """`abs(x) <= r` entry by entry, and the largest entry: multipliers of rows that have epigraph variables."""
    x, y, r, top = cp.Variable(4), cp.Parameter(4), cp.Parameter(4, nonneg=True), cp.Parameter()
    rows, largest = cp.abs(x) <= r, cp.max(x) <= top
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [rows, largest])
    draw = lambda rng: [  # noqa: E731
        2 * rng.standard_normal((BATCH, 4)), rng.uniform(0.5, 1.0, (BATCH, 4)), rng.uniform(0.2, 0.4, BATCH)
    ]  # fmt: skip
    return problem, [y, r, top], [rows.dual_variables[0], largest.dual_variables[0]], draw
