"""Programs that are not polyhedral: our two entrances give what stock cvxpylayers gives, and can be told to refuse."""

import re
from functools import cache

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer as StockLayer
from layer_harness import LAYERS, assert_close, diffcp_layer, make_layer, run

import hsbackend

BATCH = 3
# The reference is the stock layer with Clarabel at 1e-10. The stock layer's default (SCS) is up to 4e-4 away from it in
# these programs, its gradients up to 2e-4: that is the solver tolerance meant by "gives what the stock layer gives".
VALUE, GRADIENT = 1e-3, 1e-3


def second_order():
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm(x) <= 1])
    return problem, [y], [x], lambda rng: [2 * rng.standard_normal((BATCH, 3)) + np.array([1.5, 0, 0])]


def second_order_with_dual():
    x, y = cp.Variable(3), cp.Parameter(3)
    ball, budget = cp.norm(x) <= 1, cp.sum(x) == 0.5
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + 2.0), [ball, budget])
    draw = lambda rng: [2 * rng.standard_normal((BATCH, 3)) + np.array([1.5, 0, 0])]  # noqa: E731
    return problem, [y], [x, budget.dual_variables[0]], draw


def robust_portfolio():
    """Linear objective, second-order cone of four rows, a shared and a batched parameter."""
    x, mu, scale = cp.Variable(4), cp.Parameter(4), cp.Parameter(nonneg=True)
    root = np.random.default_rng(1).standard_normal((3, 4))
    constraints = [cp.sum(x) == 1, x >= 0, cp.norm(root @ x) <= scale]
    draw = lambda rng: [rng.standard_normal((BATCH, 4)), 1.2]  # noqa: E731
    return cp.Problem(cp.Maximize(mu @ x - 0.1 * cp.sum_squares(x)), constraints), [mu, scale], [x], draw


def exponential():
    """Entropy-regularised choice: the answer is a softmax."""
    x, y = cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Maximize(y @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    return problem, [y], [x], lambda rng: [rng.standard_normal((BATCH, 4))]


def exponential_with_squares():
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.log_sum_exp(x) <= 1, x >= -1])
    return problem, [y], [x], lambda rng: [rng.standard_normal((BATCH, 3)) + 0.5]


def semidefinite():
    X, M = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - M)), [X >> 0])

    def draw(rng):
        full = rng.standard_normal((BATCH, 3, 3))
        return [full + np.swapaxes(full, 1, 2)]

    return problem, [M], [X], draw


PROGRAMS = {
    f.__name__: f
    for f in (
        second_order,
        second_order_with_dual,
        robust_portfolio,
        exponential,
        exponential_with_squares,
        semidefinite,
    )
}
CONES = {
    "second_order": "second-order cone of dimension 4",
    "robust_portfolio": "second-order cone of dimension 4",
    "exponential": "exponential cone",
    "exponential_with_squares": "exponential cone",
    "semidefinite": "(semidefinite|PSD) cone",
}


def _data(name):
    *_, draw = PROGRAMS[name]()
    rng = np.random.default_rng(0)
    values = draw(rng)
    shapes = [(BATCH, *v.shape) for v in PROGRAMS[name]()[2]]
    return values, [rng.standard_normal(shape) for shape in shapes]


@cache
def _stock(name):
    problem, parameters, variables, _ = PROGRAMS[name]()
    return run(diffcp_layer(problem, parameters, variables), *_data(name))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_gives_what_the_stock_layer_gives(kind, name):
    problem, parameters, variables, _ = PROGRAMS[name]()
    outputs, gradients = run(make_layer(kind, problem, parameters, variables), *_data(name))
    expected_outputs, expected_gradients = _stock(name)
    for out, expected in zip(outputs, expected_outputs, strict=True):
        assert_close(out, expected, VALUE, 1.0, "value")
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected, GRADIENT, 1.0, "gradient")


@pytest.mark.parametrize("kind", LAYERS)
def test_second_order_against_its_closed_form(kind):
    """Projection on the unit ball: y / |y|, with Jacobian (I - u u') / |y|."""
    problem, parameters, variables, _ = second_order()
    (points,), (cotangent,) = _data("second_order")
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    assert (norms > 1).all()
    units = points / norms
    expected = (cotangent - units * (units * cotangent).sum(1, keepdims=True)) / norms
    (out,), (gradient,) = run(make_layer(kind, problem, parameters, variables), [points], [cotangent])
    assert_close(out, units, VALUE, 1.0)
    assert_close(gradient, expected, GRADIENT, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_exponential_against_its_closed_form(kind):
    problem, parameters, variables, _ = exponential()
    (points,), (cotangent,) = _data("exponential")
    weights = np.exp(points) / np.exp(points).sum(1, keepdims=True)
    expected = weights * (cotangent - (weights * cotangent).sum(1, keepdims=True))
    (out,), (gradient,) = run(make_layer(kind, problem, parameters, variables), [points], [cotangent])
    assert_close(out, weights, VALUE, 1.0)
    assert_close(gradient, expected, GRADIENT, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_a_batch_axis(kind):
    problem, parameters, variables, _ = second_order()
    (points,), (cotangent,) = _data("second_order")
    (out,), (gradient,) = run(make_layer(kind, problem, parameters, variables), [points[0]], [cotangent[0]])
    (expected,), (expected_gradient,) = _stock("second_order")
    assert_close(out, expected[0], VALUE, 1.0)
    assert_close(gradient, expected_gradient[0], GRADIENT, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_gradients(kind):
    problem, parameters, variables, _ = second_order()
    (points,), _ = _data("second_order")
    with torch.no_grad():
        (out,) = make_layer(kind, problem, parameters, variables)(torch.tensor(points))
    assert_close(out, _stock("second_order")[0][0], VALUE, 1.0)


def test_float32_through_the_fallback():
    problem, parameters, variables, _ = second_order()
    layer = make_layer("ours", problem, parameters, variables)
    (out,), (gradient,) = run(layer, *_data("second_order"), dtype=torch.float32)
    assert (out.dtype, gradient.dtype) == (torch.float32, torch.float32)
    assert_close(out, _stock("second_order")[0][0], VALUE, 1.0)
    assert_close(gradient, _stock("second_order")[1][0], GRADIENT, 1.0)


# --- a norm that looks like the whole objective, and is not


def _norm(extra, returned=("x",)):
    """Minimise a norm in company of something that forbids squaring it."""
    x, t, y = cp.Variable(3, name="x"), cp.Variable(name="t"), cp.Parameter(3)
    budget = cp.sum(x) == 1
    objective, constraints = cp.norm(x - y), [x >= 0, budget]
    if extra == "linear":
        objective = objective + np.array([0.5, 0.0, -0.5]) @ x
    elif extra == "second-norm":
        objective = objective + cp.norm(x + y - 1)
    elif extra == "own-epigraph":
        objective, constraints = t, [*constraints, objective <= t]
    elif extra == "own-epigraph-tied":
        objective, constraints = t, [*constraints, objective <= t, t + x[0] >= 2.5]
    elif extra == "squares":
        objective = objective + 0.3 * cp.sum_squares(x)
    elif extra == "scaled":
        objective = 3.0 * objective + 1.0
    elif extra == "maximize":
        objective = -objective
    else:
        assert extra == "nothing"
    known = {"x": x, "t": t, "dual": budget.dual_variables[0]}
    sense = cp.Maximize if extra == "maximize" else cp.Minimize
    return cp.Problem(sense(objective), constraints), [y], [known[name] for name in returned]


NORMS = {
    "nothing": ("x", "dual"),
    "linear": ("x", "dual"),
    "second-norm": ("x",),
    "own-epigraph": ("x", "t", "dual"),
    "own-epigraph-tied": ("t", "x"),
    "squares": ("x", "dual"),
    "scaled": ("x", "dual"),
    "maximize": ("x", "dual"),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("extra", NORMS)
def test_norm_in_company(kind, extra):
    """The minimiser, the value of the norm itself and the multipliers are those of the norm, not of its square."""
    values = [np.array([[1.2, 0.4, -0.3], [0.9, 1.1, 0.2], [-0.4, 0.8, 1.5]])]
    rng = np.random.default_rng(0)
    problem, parameters, variables = _norm(extra, NORMS[extra])
    cotangents = [rng.standard_normal((3, *v.shape)) for v in variables]
    expected_outputs, expected = run(diffcp_layer(problem, parameters, variables), values, cotangents)
    outputs, gradients = run(make_layer(kind, *_norm(extra, NORMS[extra])), values, cotangents)
    for out, value in zip(outputs, expected_outputs, strict=True):
        assert_close(out, value, VALUE, 1.0, "value")
    for gradient, value in zip(gradients, expected, strict=True):
        assert_close(gradient, value, GRADIENT, 1.0, "gradient")


@pytest.mark.parametrize("kind", LAYERS)
def test_norm_of_zero(kind):
    """The point lies in the set: the norm has a kink there, the projection does not."""
    layer = make_layer(kind, *_norm("nothing"))
    point, cotangent = np.array([0.2, 0.3, 0.5]), np.array([1.0, 2.0, -1.0])
    (out,), (gradient,) = run(layer, [point], [cotangent])
    assert_close(out, point, 1e-8, 1.0)
    assert_close(gradient, cotangent - cotangent.mean(), 1e-6, 1.0)


# --- items without a solution


def _ball():
    x, y, radius = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm(x) <= radius, cp.sum(x) == 1])
    return problem, [y, radius], [x]


@pytest.mark.parametrize("kind", LAYERS)
def test_infeasible_item_of_a_cone_program(kind):
    """Named by default; NaN in that item only on request."""
    values = [torch.tensor([[1.0, 0.2, 0.1], [1.0, 0.2, 0.1]]).double(), torch.tensor([1.0, 0.2]).double()]
    with pytest.raises(hsbackend.SolveError, match="item 1"):
        make_layer(kind, *_ball())(*values)
    (out,) = make_layer(kind, *_ball(), on_failure="nan")(*values)
    (alone,) = make_layer(kind, *_ball())(*(v[:1] for v in values))
    assert_close(out[:1], alone, VALUE, 1.0)
    assert out[1].isnan().all()


# --- power cones: diffcp 1.1.9 solves them, and cannot differentiate them


def _power():
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.PowCone3D(x[0], x[1], x[2], 0.3)])
    return problem, [y], [x]


@pytest.mark.parametrize("kind", LAYERS)
def test_power_cone_value(kind):
    problem, (y,), (x,) = _power()
    y.value = np.array([0.6, 1.4, 3.0])
    problem.solve(solver=cp.CLARABEL)
    (out,) = make_layer(kind, *_power())(torch.tensor(y.value))
    assert_close(out, x.value, VALUE, 1.0)


@pytest.mark.parametrize("kind", ["diffcp", *LAYERS])
def test_power_cone_gradient_is_an_error_never_a_number(kind):
    """The first id records what the stock layer does: the day it passes, ours must give a gradient too."""
    layer = StockLayer(*_power()) if kind == "diffcp" else make_layer(kind, *_power())
    y = torch.tensor([0.6, 1.4, 3.0], dtype=torch.float64, requires_grad=True)
    with pytest.raises((ValueError, RuntimeError), match=r"broadcast|power cone"):
        layer(y)[0].sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_power_cone_is_named(kind):
    with pytest.raises(hsbackend.UnsupportedProblemError, match="power cone"):
        make_layer(kind, *_power(), fallback="error")


# --- geometric programs


def _geometric():
    """The example of the cvxpylayers README."""
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a, b, c = (cp.Parameter(pos=True, value=v) for v in (2.0, 1.0, 0.5))
    objective = cp.Minimize(1 / (x * y * z))
    constraints = [a * (x * y + x * z + y * z) <= b, x >= y**c]
    return cp.Problem(objective, constraints), [a, b, c], [x, y, z]


GEOMETRIC_VALUES = [np.array([2.0, 1.5]), np.array([1.0, 1.2]), np.array([0.5, 0.6])]


@pytest.mark.parametrize("kind", LAYERS)
def test_geometric_program(kind):
    cotangents = list(np.random.default_rng(0).standard_normal((3, 2)))
    expected_outputs, expected = run(diffcp_layer(*_geometric(), gp=True), GEOMETRIC_VALUES, cotangents)
    outputs, gradients = run(make_layer(kind, *_geometric(), gp=True), GEOMETRIC_VALUES, cotangents)
    for out, value in zip(outputs, expected_outputs, strict=True):
        assert_close(out, value, VALUE, 1.0)
    for gradient, value in zip(gradients, expected, strict=True):
        assert_close(gradient, value, GRADIENT, 1.0)


@pytest.mark.parametrize("objective", ["quad_form", "linear"])
def test_ellipsoid_around_a_parameter(objective):
    """The stock layer takes the form around p with its own backend, not with one that keeps quadratic objectives."""
    x, y, p, matrix = cp.Variable(3), cp.Parameter(3), cp.Parameter(3), np.diag([1.0, 2.0, 0.5]) + 0.1
    cost = cp.quad_form(x - y, np.eye(3)) if objective == "quad_form" else y @ x
    problem = cp.Problem(cp.Minimize(cost), [cp.quad_form(x - p, matrix) <= 1])
    rng = np.random.default_rng(0)
    values = [2 * rng.standard_normal((BATCH, 3)) + 2, rng.standard_normal((BATCH, 3))]
    cotangents = [rng.standard_normal((BATCH, 3))]
    layer = make_layer("ours", problem, [y, p], [x])
    assert "in a constraint" in layer.explain().reason
    outputs, gradients = run(layer, values, cotangents)
    expected_outputs, expected_gradients = run(diffcp_layer(problem, [y, p], [x]), values, cotangents)
    assert_close(outputs[0], expected_outputs[0], VALUE, 1.0)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected, GRADIENT, 1.0)


# --- the report, and refusing


@pytest.mark.parametrize("name", CONES)
def test_report_names_the_first_cone(name):
    problem, parameters, variables, _ = PROGRAMS[name]()
    report = make_layer("ours", problem, parameters, variables).explain()
    assert not report.polyhedral
    assert re.search(CONES[name], report.reason), report.reason
    assert "diffcp" in str(report).lower()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", CONES)
def test_refuses_when_told_to(kind, name):
    problem, parameters, variables, _ = PROGRAMS[name]()
    with pytest.raises(hsbackend.UnsupportedProblemError, match=CONES[name]):
        make_layer(kind, problem, parameters, variables, fallback="error")


@pytest.mark.parametrize("kind", LAYERS)
def test_refusing_does_not_touch_a_polyhedral_program(kind):
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0])
    layer = make_layer(kind, problem, [y], [x], fallback="error")
    (out,) = layer(torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64))
    assert_close(out, np.array([0.7, 0.3, 0.0]), 1e-10, 1.0)


def test_unsupported_is_one_of_our_errors():
    assert issubclass(hsbackend.UnsupportedProblemError, hsbackend.HSBackendError)
