"""The JAX layer of cvxpylayers with our solver: the torch layer's values and gradients."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from layer_harness import assert_close, make_layer, run
from model_table import TABLE, truth

from oracles import TightSolver

jax = pytest.importorskip("jax", reason="the JAX layer needs jax, an optional dependency (extra `jax`)")

import jax.numpy as jnp  # noqa: E402

from hsbackend import HSBackend, SolveError  # noqa: E402

NAMES = [
    "sum_squares_simplex",
    "half_sum_squares_minus_linear",
    "quad_form_parameter",
    "least_squares_parameter",
    "bound_parameters",
    "everything_a_parameter",
    "birkhoff",
    "symmetric_variable",
    "symmetric_parameter",
    "several_variables",
    "dual_of_equality",
    "dual_of_inequality",
    "scalar_variable",
    "nothing_batched",
    "no_constraint",
    "quantile_regression",
    "optimal_transport_marginals",
    "dynamic_programming_step",
    "dual_of_linear_program",
    "dual_of_singular_hessian",
]


@pytest.fixture(autouse=True)
def _double_precision():
    """jax works in float32 unless told otherwise; leave it as it was for whoever comes next."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def _jax_layer(problem, parameters, variables, **options):
    from cvxpylayers.jax import CvxpyLayer

    return CvxpyLayer(problem, parameters, variables, solver=HSBackend(**options))


def _run_jax(layer, values, cotangents):
    values = [jnp.asarray(v) for v in values]

    def loss(*params):
        return sum(jnp.sum(c * out) for c, out in zip(cotangents, layer(*params), strict=True))

    return layer(*values), jax.grad(loss, argnums=tuple(range(len(values))))(*values)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_oracle_and_with_torch(name):
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    outputs, gradients = _run_jax(_jax_layer(problem, parameters, variables), point.values, point.cotangents)
    problem, parameters, variables, _ = TABLE[name].build()
    torch_layer = make_layer("stock", problem, parameters, variables)
    torch_outputs, torch_gradients = run(torch_layer, point.values, point.cotangents)
    for out, torch_out, expected in zip(outputs, torch_outputs, point.outputs, strict=True):
        assert out.dtype == jnp.float64
        assert_close(out, expected, 1e-8, 1e-2, f"seed {point.seed}")
        assert_close(out, torch_out, 1e-12, 1e-2, f"seed {point.seed}")
    for gradient, torch_gradient in zip(gradients, torch_gradients, strict=True):
        assert gradient.dtype == jnp.float64
        assert_close(gradient, torch_gradient, 1e-12, 1e-2, f"seed {point.seed}")


def _simplex():
    x, y = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0]), [y], [x]


def test_value_and_grad():
    layer = _jax_layer(*_simplex())
    value, gradient = jax.value_and_grad(lambda y: layer(y)[0][0])(jnp.array([0.8, 0.4, -1.0]))
    assert_close(value, np.array(0.7), 1e-12, 1.0)
    assert_close(gradient, np.array([0.5, -0.5, 0.0]), 1e-12, 1.0)


def test_single_precision():
    jax.config.update("jax_enable_x64", False)
    layer = _jax_layer(*_simplex())
    value, gradient = jax.value_and_grad(lambda y: layer(y)[0][0])(jnp.array([0.8, 0.4, -1.0]))
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.float32)
    assert_close(value, np.array(0.7), 1e-6, 1.0)
    assert_close(gradient, np.array([0.5, -0.5, 0.0]), 1e-6, 1.0)


def test_jacobian_row_by_row():
    """One backward pass per output."""
    layer = _jax_layer(*_simplex())
    rows = [jax.grad(lambda y, i=i: layer(y)[0][i])(jnp.array([0.8, 0.4, -1.0])) for i in range(3)]
    assert_close(jnp.stack(rows), np.array([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]]), 1e-12, 1.0)


def test_infeasible_items():
    x, y, cap = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0, x <= cap])
    values = [jnp.array([[0.8, 0.4, -1.0], [0.0, 0.0, 0.0]]), jnp.array([0.6, 0.1])]
    with pytest.raises(SolveError, match="item 1: infeasible"):
        _jax_layer(problem, [y, cap], [x])(*values)
    (out,) = _jax_layer(problem, [y, cap], [x], on_failure="nan")(*values)
    assert_close(out[0], np.array([0.6, 0.4, 0.0]), 1e-10, 1.0)
    assert np.isnan(np.asarray(out[1])).all()


def test_second_order_cone_goes_to_the_fallback():
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm(x) <= 1])
    layer = _jax_layer(problem, [y], [x])
    point = jnp.array([2.0, 0.0, 0.0])
    assert_close(layer(point)[0], np.array([1.0, 0.0, 0.0]), 1e-3, 1.0)
    assert_close(jax.grad(lambda v: layer(v)[0][1])(point), np.array([0.0, 0.5, 0.0]), 1e-3, 1.0)


def test_one_backend_serves_torch_and_jax():
    from cvxpylayers.jax import CvxpyLayer as JaxLayer
    from cvxpylayers.torch import CvxpyLayer as TorchLayer

    backend = HSBackend()
    jax_layer, torch_layer = JaxLayer(*_simplex(), solver=backend), TorchLayer(*_simplex(), solver=backend)
    point = np.array([0.8, 0.4, -1.0])
    expected = TightSolver(*_simplex()).solve([point]).outputs[0]
    assert_close(torch_layer(torch.tensor(point))[0], expected, 1e-10, 1.0)
    assert_close(jax_layer(jnp.asarray(point))[0], expected, 1e-10, 1.0)
