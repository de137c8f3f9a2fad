"""What the table cannot say about published models: vertices, several optima, problems without constraints, routing."""

import copy
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer as StockLayer
from layer_harness import LAYERS, assert_close, make_layer, run, tensors
from model_table import TABLE, truth

from hsbackend import HSBackend, SolveError, UnsupportedProblemError
from hsbackend.adapters.cvxpylayers import CvxpyLayer, enabled

LINEAR_PROGRAMS = [
    "median",
    "least_absolute_deviations",
    "least_largest_deviation",
    "quantile_regression",
    "quantile_regression_as_maximum",
    "sparse_support_vectors",
    "newsvendor",
    "conditional_value_at_risk",
    "shortest_path",
    "flow_of_least_cost",
    "optimal_transport",
    "assignment",
    "linear_program_on_the_simplex",
    "fractional_knapsack",
    "game_as_maximum_of_a_minimum",
    "game_by_epigraph",
    "largest_ball",
]
SEMIDEFINITE = [
    "cost_on_some_variables",
    "support_vectors",
    "support_vectors_with_slacks",
    "control_with_a_singular_input_cost",
    "dynamic_programming_step",
]
# Rows with parameters that do not move what is returned, by index.
INSENSITIVE = {name: TABLE[name].insensitive for name in TABLE if TABLE[name].insensitive}


def _solver_of(kind, layer):
    """Who reports about the last call: our layer itself, or the backend behind the stock layer."""
    return layer if kind == "ours" else layer.ctx.solver


@pytest.mark.parametrize("name", LINEAR_PROGRAMS)
def test_linear_programs_are_called_so(name):
    problem, parameters, variables, _ = TABLE[name].build()
    report = make_layer("ours", problem, parameters, variables, fallback="error").explain()
    assert "linear program" in report.reason, str(report)


@pytest.mark.parametrize("name", SEMIDEFINITE)
def test_semidefinite_hessians_are_called_so(name):
    problem, parameters, variables, _ = TABLE[name].build()
    report = make_layer("ours", problem, parameters, variables, fallback="error").explain()
    assert "semidefinite" in report.reason, str(report)


@pytest.mark.parametrize("name", ["monotone_regression_by_the_norm", "norm_unsquared"])
def test_the_norm_of_a_distance_is_a_projection(name):
    problem, parameters, variables, _ = TABLE[name].build()
    report = make_layer("ours", problem, parameters, variables, fallback="error").explain()
    assert report.solver == "families", str(report)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", INSENSITIVE)
def test_what_does_not_move_the_solution_has_no_gradient(kind, name):
    """Prices do not move a vertex, right-hand sides do not move its multipliers: their gradient is zero to rounding."""
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    _, gradients = run(make_layer(kind, problem, parameters, variables), point.values, point.cotangents)
    for index in INSENSITIVE[name]:
        assert np.abs(np.asarray(gradients[index])).max() <= 1e-12, f"seed {point.seed}, parameter {index}"


# --- several optima


def _median():
    """Of four points: every number between the second and the third."""
    x, y = cp.Variable(), cp.Parameter(4)
    return cp.Problem(cp.Minimize(cp.norm1(y - x))), [y], [x]


POINTS = np.array([[1.0, 2.0, 4.0, 7.0], [-7.0, -4.0, -2.0, -1.0], [-3.0, -1.0, 2.0, 3.0], [1.0, 3.0, 3.0, 5.0]])


@pytest.mark.parametrize("kind", LAYERS)
def test_the_optimum_of_least_norm_and_its_gradient(kind):
    layer = make_layer(kind, *_median())
    (out,), (gradient,) = run(layer, [POINTS[:3]], [np.ones(3)])
    assert_close(out, np.array([2.0, -2.0, 0.0]), 1e-10, 1.0)
    assert_close(gradient, np.array([[0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]]), 1e-10, 1.0)


def _solve(matrix, vector):
    """The solution of least norm, as a torch expression."""
    return (torch.linalg.pinv(matrix) @ vector.unsqueeze(-1)).squeeze(-1)


def _without_cost():
    x, a, b = cp.Variable(4), cp.Parameter((2, 4)), cp.Parameter(2)
    return cp.Problem(cp.Minimize(cp.sum(0 * x)), [a @ x == b]), [a, b], [x], _solve


def _wide_least_squares():
    x, a, b = cp.Variable(4), cp.Parameter((2, 4)), cp.Parameter(2)
    return cp.Problem(cp.Minimize(cp.sum_squares(a @ x - b))), [a, b], [x], _solve


def _wide_least_absolute_deviations():
    x, a, b = cp.Variable(4), cp.Parameter((2, 4)), cp.Parameter(2)
    return cp.Problem(cp.Minimize(cp.norm1(a @ x - b))), [a, b], [x], _solve


def _constant_cost_beside_parameters():
    """The cost is eliminated once and for all, and can be zero where the equation holds."""
    row = np.array([[1.0, -0.5, 2.0, 0.3]])
    x, a, b = cp.Variable(4), cp.Parameter((1, 4)), cp.Parameter(1)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(row @ x - 1.0)), [a @ x == b])

    def exact(a, b):
        rows = torch.cat([torch.tensor(row).expand(len(a), 1, 4), a], dim=1)
        return _solve(rows, torch.cat([torch.ones(len(a), 1, dtype=torch.float64), b], dim=1))

    return problem, [a, b], [x], exact


def _along_a_price():
    """As much of a'x as is allowed, without equations."""
    x, a, b = cp.Variable(4), cp.Parameter(4), cp.Parameter(1)
    return cp.Problem(cp.Maximize(a @ x), [a @ x <= b]), [a, b], [x], lambda a, b: _solve(a.unsqueeze(1), b)


def _held_by_a_floor():
    """Nothing costs anything, but x would like to be smaller than the floor allows."""
    x, a, b = cp.Variable(4), cp.Parameter(4), cp.Parameter(1)
    problem = cp.Problem(cp.Minimize(cp.sum(0 * x)), [a @ x >= cp.abs(b)])
    return problem, [a, b], [x], lambda a, b: _solve(a.unsqueeze(1), b.abs())


def _hidden_variable():
    """What is not returned takes what it can: x of least norm with (I - s s'/|s|^2)(a x - b) = 0."""
    x, y = cp.Variable(4), cp.Variable()
    a, b, s = cp.Parameter((2, 4)), cp.Parameter(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum(0 * x)), [a @ x + cp.multiply(s, y) == b])

    def exact(a, b, s):
        across = torch.stack([-s[:, 1], s[:, 0]], dim=1).unsqueeze(1)
        return _solve(across @ a, (across @ b.unsqueeze(-1)).squeeze(-1))

    return problem, [a, b, s], [x], exact


TURNING = (
    _without_cost,
    _wide_least_squares,
    _wide_least_absolute_deviations,
    _constant_cost_beside_parameters,
    _along_a_price,
    _held_by_a_floor,
    _hidden_variable,
)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("model", TURNING)
def test_the_optimum_of_least_norm_turns_with_the_matrices(kind, model):
    """In closed form: the gradient of a parameter in a matrix, also where the item is not moved by anything else."""
    problem, parameters, variables, exact = model()
    layer = make_layer(kind, problem, parameters, variables, fallback="error")
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(3, *parameter.shape)) for parameter in parameters]
    cotangent = rng.normal(size=(3, 4))
    (out,), gradients = run(layer, values, [cotangent])
    assert _solver_of(kind, layer).non_unique.tolist() == [True] * 3
    wanted = tensors(values)
    expected = exact(*wanted)
    assert_close(out, expected, 1e-9, 1.0)
    for one, other in zip(gradients, torch.autograd.grad(expected, wanted, torch.tensor(cotangent)), strict=True):
        assert_close(one, other, 1e-8, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_turns_with_one_matrix_for_all_items(kind):
    """A parameter given once for a batch gets the sum."""
    problem, parameters, variables, exact = _without_cost()
    layer = make_layer(kind, problem, parameters, variables, fallback="error")
    rng = np.random.default_rng(1)
    values = [rng.normal(size=(2, 4)), rng.normal(size=(3, 2))]
    cotangent = rng.normal(size=(3, 4))
    _, gradients = run(layer, values, [cotangent])
    wanted = tensors(values)
    expected = exact(wanted[0].expand(3, 2, 4), wanted[1])
    for one, other in zip(gradients, torch.autograd.grad(expected, wanted, torch.tensor(cotangent)), strict=True):
        assert_close(one, other, 1e-9, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_says_which_items_have_other_optima(kind):
    layer = make_layer(kind, *_median())
    assert _solver_of(kind, layer).non_unique is None
    layer(*tensors([POINTS]))
    found = _solver_of(kind, layer).non_unique
    assert found.dtype == torch.bool
    assert found.tolist() == [True, True, True, False]
    layer(*tensors([POINTS[3]]))
    assert _solver_of(kind, layer).non_unique.tolist() == [False]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_strictly_convex_program_has_one_optimum(kind):
    point = truth("sum_squares_simplex")
    problem, parameters, variables, _ = TABLE["sum_squares_simplex"].build()
    layer = make_layer(kind, problem, parameters, variables)
    layer(*tensors(point.values))
    assert _solver_of(kind, layer).non_unique.tolist() == [False] * len(point.values[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_diffcp_does_not_say_whether_there_are_others(kind):
    x, y = cp.Variable(3), cp.Parameter(3)
    layer = make_layer(kind, cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm(x) <= 1]), [y], [x])
    layer(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    assert _solver_of(kind, layer).non_unique is None


def test_an_item_without_solution_has_no_other_optima():
    x, c, cap = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1, x <= cap])
    layer = make_layer("stock", problem, [c, cap], [x], on_failure="nan")
    (out,) = layer(*tensors([np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([1.0, 0.1])]))
    assert_close(out[0], np.array([0.5, 0.5]), 1e-10, 1.0)
    assert out[1].isnan().all()
    assert layer.ctx.solver.non_unique.tolist() == [True, False]


@pytest.mark.parametrize("kind", LAYERS)
def test_unbounded_linear_program(kind):
    x, c = cp.Variable(2), cp.Parameter(2)
    layer = make_layer(kind, cp.Problem(cp.Minimize(c @ x), [x >= 0]), [c], [x])
    with pytest.raises(SolveError, match=r"item 1: .*unbounded"):
        layer(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))


# --- problems that cvxpy refuses SCS and DIFFCP


def _quantile():
    w, y = cp.Variable(2), cp.Parameter(9)
    residual = y - np.random.default_rng(0).standard_normal((9, 2)) @ w
    return cp.Problem(cp.Minimize(cp.sum(0.9 * cp.pos(residual) + 0.1 * cp.neg(residual)))), [y], [w]


def test_the_default_backend_refuses_a_problem_without_constraints():
    """Why the canonical form is not asked for in SCS's name. If cvxpy takes it one day, nothing here is needed."""
    with pytest.raises(cp.error.SolverError, match="cannot solve this problem"):
        StockLayer(*_quantile())


def test_an_enabled_stock_layer_takes_it():
    with enabled():
        layer = StockLayer(*_quantile())
    assert isinstance(layer, CvxpyLayer)
    assert layer.explain().polyhedral


@pytest.mark.parametrize(
    "name", ["quantile_regression", "quad_form_of_difference", "quad_form_with_both_arguments_parameters"]
)
def test_the_problem_is_left_as_it_was(name):
    """Objective, constraints and caches are the user's; `problem.solve()` finds the point afterwards."""
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    objective, constraints, text, key = problem.objective, list(problem.constraints), str(problem), problem._cache.key
    layer = make_layer("ours", problem, parameters, variables)
    outputs = layer(*tensors(point.values))
    assert problem.objective is objective
    assert all(now is then for now, then in zip(problem.constraints, constraints, strict=True))
    assert str(problem) == text
    assert problem._cache.key == key
    for parameter, value in zip(parameters, point.values, strict=True):
        parameter.value = value[0]
    problem.solve(solver=cp.CLARABEL, ignore_dpp=True)  # the quadratic forms are not DPP for cvxpy
    for variable, out in zip(variables, outputs, strict=True):
        assert_close(variable.value, out[0], 1e-4, 1.0)


def test_the_problem_still_solves_after_a_stock_layer():
    """Our canonical form has a name of its own in the problem's cache: another solver starts anew."""
    problem, parameters, variables = _quantile()
    values = np.random.default_rng(1).standard_normal(9)
    (out,) = make_layer("stock", problem, parameters, variables)(torch.tensor(values))
    parameters[0].value = values
    for solver in (cp.CLARABEL, cp.OSQP):
        problem.solve(solver=solver)
        assert_close(variables[0].value, out, 1e-6, 1.0, solver)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_without_constraints(how):
    layer = CvxpyLayer(*_quantile())
    values = torch.randn(3, 9, dtype=torch.float64)
    assert torch.equal(how(layer)(values)[0], layer(values)[0])


# --- quadratic forms around a parameter


def test_maximising_a_concave_form_around_a_parameter():
    """The sign of the form, a factor in front and a second form in the same objective survive the rewriting."""
    x, y, z = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    P, N = np.diag([1.0, 2.0, 3.0]), -np.diag([0.5, 0.5, 1.0])
    objective = -2 * cp.quad_form(x - y, P) + cp.quad_form(z - x, N) + cp.sum(x)
    layer = make_layer("ours", cp.Problem(cp.Maximize(objective), [x >= -9]), [y, z], [x], fallback="error")
    weights, others = 4 * np.diag(P), -2 * np.diag(N)
    ys, zs = np.random.default_rng(2).standard_normal((2, 4, 3))
    (out,), (by_y, by_z) = run(layer, [ys, zs], [np.ones((4, 3))])
    assert_close(out, (weights * ys + others * zs + 1) / (weights + others), 1e-12, 1.0)
    assert_close(by_y, np.tile(weights / (weights + others), (4, 1)), 1e-12, 1.0)
    assert_close(by_z, np.tile(others / (weights + others), (4, 1)), 1e-12, 1.0)


def test_an_argument_that_is_not_affine_cannot_be_named():
    """Such a form goes to diffcp, and the report says so."""
    problem, parameters, variables, _ = TABLE["quad_form_of_positive_parts"].build()
    report = make_layer("ours", problem, parameters, variables).explain()
    assert report.solver == "diffcp"
    assert "not affine" in report.reason
    problem, parameters, variables, _ = TABLE["quad_form_of_positive_parts"].build()
    with pytest.raises(UnsupportedProblemError, match="not affine"):
        make_layer("ours", problem, parameters, variables, fallback="error")


def test_duals_beside_a_named_argument():
    """The rows the rewriting adds come after those of the user: multipliers keep their places."""
    x, y = cp.Variable(3), cp.Parameter(3)
    low, total = x >= 0, cp.sum(x) == 1
    duals = [total.dual_variables[0], low.dual_variables[0]]
    problem = cp.Problem(cp.Minimize(cp.quad_form(x - y, np.eye(3))), [low, total])
    outputs = make_layer("ours", problem, [y], duals)(torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64))
    # x = (0.7, 0.3, 0): 2 (x - y) + nu - z = 0.
    assert_close(outputs[0], np.array(0.2), 1e-12, 1.0)
    assert_close(outputs[1], np.array([0.0, 0.0, 2.2]), 1e-12, 1.0)


def test_only_the_backend_of_a_stock_layer_keeps_its_report():
    """A backend given to our layer carries options; the layer itself has the report of its calls."""
    backend = HSBackend()
    layer = CvxpyLayer(*_median(), solver=backend)
    layer(*tensors([POINTS]))
    assert layer.non_unique.tolist() == [True, True, True, False]
    assert backend.non_unique is None
