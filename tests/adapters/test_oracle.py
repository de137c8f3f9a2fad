"""The oracle that judges the table is itself judged: by finite differences and by stock cvxpylayers."""

import cvxpy as cp
import numpy as np
import pytest
from layer_harness import assert_close, diffcp_layer, run
from model_table import TABLE, is_symmetric, truth

from oracles import DegeneratePoint, OracleError, TightSolver, central_differences, solve_tight

_UNCONSTRAINED = "cvxpy refuses DIFFCP a problem that has neither constraints nor cones"
# Rows the stock layer cannot judge; central differences do.
STOCK_CANNOT = {
    "quad_form_parameter": "diffcp takes no parametric quad_form",
    "quad_form_parameter_shared": "diffcp takes no parametric quad_form",
    "dual_with_quad_form_parameter": "diffcp takes no parametric quad_form",
    "quad_form_with_both_arguments_parameters": "diffcp takes no parametric quad_form",
    "least_largest_deviation": _UNCONSTRAINED,
    "quantile_regression": _UNCONSTRAINED,
    "quantile_regression_as_maximum": _UNCONSTRAINED,
    "objective_huge": "diffcp's gradient is wrong in the first digit when the objective is scaled by 1e6",
    "objective_tiny": "diffcp's point is wrong in the third digit when the objective is scaled by 1e-6",
}


@pytest.mark.parametrize("name", TABLE)
def test_agrees_with_central_differences(name):
    """One random direction in every parameter of the first item: value 1e-10 / step 1e-5 bounds the accuracy."""
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].judge()
    solver = TightSolver(problem, parameters, variables)
    item = [v[0] if v.ndim > p.ndim else v for v, p in zip(point.values, parameters, strict=True)]
    solved = solver.solve(item)
    rng = np.random.default_rng(point.seed)
    for j, parameter in enumerate(parameters):
        direction = rng.standard_normal(parameter.shape)
        mask = np.ones(parameter.shape)
        if is_symmetric(parameter):
            direction = direction + direction.T
            mask = np.triu(mask)
        numerical = central_differences(solver, item, j, direction)
        for k, difference in enumerate(numerical):
            exact = np.tensordot(solved.jacobians[k][j], mask * direction, axes=parameter.ndim)
            assert_close(exact, difference, 1e-5, 1e-2, f"seed {point.seed}, parameter {j}, output {k}")


@pytest.mark.parametrize("name", [n for n in TABLE if n not in STOCK_CANNOT])
def test_agrees_with_stock_cvxpylayers(name):
    """Same signs, axes and sums as the stock layer, to the accuracy of its derivative."""
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    outputs, gradients = run(diffcp_layer(problem, parameters, variables), point.values, point.cotangents)
    for k, out in enumerate(outputs):
        assert_close(out, point.outputs[k], 1e-4, 1.0, f"seed {point.seed}, output {k}")
    for j, gradient in enumerate(gradients):
        assert_close(gradient, point.gradients[j], 1e-3, 0.1, f"seed {point.seed}, parameter {j}")


def _simplex():
    x, y = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0]), y, x


def test_refuses_a_degenerate_point():
    """The third coordinate is zero and its multiplier is zero."""
    problem, y, x = _simplex()
    with pytest.raises(DegeneratePoint, match="margin"):
        solve_tight(problem, [y], [np.array([0.5, 0.5, 0.0])], [x])


def test_refuses_an_output_that_is_not_unique():
    """The multipliers of an equality written twice can be shared out at will."""
    x, y = cp.Variable(3), cp.Parameter(3)
    once, twice = cp.sum(x) == 1, cp.sum(x) == 1
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [once, twice])
    with pytest.raises(OracleError, match="not unique"):
        solve_tight(problem, [y], [np.zeros(3)], [once.dual_variables[0]])


def test_refuses_an_infeasible_problem():
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 1, cp.sum(x) <= 2])
    with pytest.raises(OracleError, match="Infeasible"):
        solve_tight(problem, [y], [np.zeros(3)], [x])


def test_refuses_a_cone_program():
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm(x) <= 1])
    with pytest.raises(OracleError, match="not a quadratic program"):
        solve_tight(problem, [y], [np.zeros(3)], [x])


def test_knows_the_projection_on_the_simplex():
    """A closed form: subtract 0.1 from the first two entries, the third is zero."""
    problem, y, x = _simplex()
    solved = solve_tight(problem, [y], [np.array([0.8, 0.4, -1.0])], [x])
    assert_close(solved.outputs[0], np.array([0.7, 0.3, 0.0]), 1e-14, 1.0)
    assert_close(solved.jacobians[0][0], np.array([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]]), 1e-14, 1.0)
