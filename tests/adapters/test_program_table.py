"""Every program of the table, through our layer and through the stock layer: value and gradient against the oracle."""

from functools import cache

import numpy as np
import pytest
import torch
from layer_harness import LAYERS, assert_close, make_layer, run
from model_table import TABLE, is_symmetric, truth

# Relative to the size of the quantity.
VALUE, GRADIENT = 1e-8, 1e-6
# A row that goes to diffcp is as accurate as the stock layer (SCS at its defaults): on the rows that may go there the
# stock layer's own errors are up to 5e-4 in value and 6e-4 in gradient.
FALLBACK_VALUE, FALLBACK_GRADIENT = 5e-4, 1e-3

CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in LAYERS
    for name, program in TABLE.items()
    if not (kind == "stock" and program.stock_refuses)
]
POLYHEDRAL = [name for name, program in TABLE.items() if program.polyhedral]


@cache
def _layer(kind, name):
    problem, parameters, variables, _ = TABLE[name].build()
    return make_layer(kind, problem, parameters, variables)


@cache
def _result(kind, name):
    point = truth(name)
    return run(_layer(kind, name), point.values, point.cotangents)


@cache
def _is_routed(name):
    return _layer("ours", name).explain().polyhedral


def _symmetrised(gradient, parameter):
    """Either triangle may carry the gradient of a symmetric parameter: only the sum of the two means anything."""
    if not is_symmetric(parameter):
        return np.asarray(gradient)
    return np.asarray(gradient) + np.swapaxes(np.asarray(gradient), -1, -2)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_value(kind, name):
    point = truth(name)
    outputs, _ = _result(kind, name)
    assert len(outputs) == len(point.outputs)
    tolerance = VALUE if _is_routed(name) else FALLBACK_VALUE
    for k, (out, expected) in enumerate(zip(outputs, point.outputs, strict=True)):
        assert out.dtype == torch.float64
        assert_close(out, expected, tolerance, 1e-2, f"seed {point.seed}, output {k}")


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_gradient(kind, name):
    point = truth(name)
    _, gradients = _result(kind, name)
    parameters = TABLE[name].build()[1]
    tolerance = GRADIENT if _is_routed(name) else FALLBACK_GRADIENT
    for j, (gradient, expected) in enumerate(zip(gradients, point.gradients, strict=True)):
        assert gradient.dtype == torch.float64
        actual, expected = (_symmetrised(g, parameters[j]) for g in (gradient, expected))
        assert_close(actual, expected, tolerance, 1e-2, f"seed {point.seed}, parameter {j}")


@pytest.mark.parametrize("name", POLYHEDRAL)
def test_routes(name):
    """What must be recognised is recognised, and the report says what happened to it."""
    report = _layer("ours", name).explain()
    assert report.polyhedral, str(report)
    assert report.solver
    assert report.reason in str(report)
    assert report.solver in str(report)


@pytest.mark.parametrize("name", [name for name in TABLE if name not in POLYHEDRAL])
def test_says_why_it_does_not_route(name):
    """A program that may go to the fallback either routes or names what rules it out."""
    report = _layer("ours", name).explain()
    assert report.polyhedral or "diffcp" in str(report).lower(), str(report)
    assert report.reason


@pytest.mark.parametrize("name", POLYHEDRAL)
def test_item_in_a_batch_equals_item_alone(name):
    """The last item, given without a batch axis: same values, same gradients, one axis less."""
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    if all(v.ndim == p.ndim for v, p in zip(point.values, parameters, strict=True)):
        # The table has the opposite case: nothing is batched. Give it a batch instead.
        batch_values = [np.stack([v, v]) for v in point.values]
        outputs, gradients = run(
            make_layer("ours", problem, parameters, variables),
            batch_values,
            [np.stack([c, c]) for c in point.cotangents],
        )
        alone, expected = [o[1] for o in outputs], point.outputs
        alone_gradients, expected_gradients = [g[1] for g in gradients], point.gradients
    else:
        layer = make_layer("ours", problem, parameters, variables)
        values = [v[-1] if v.ndim > p.ndim else v for v, p in zip(point.values, parameters, strict=True)]
        alone, alone_gradients = run(layer, values, [c[-1] for c in point.cotangents])
        outputs, gradients = _result("ours", name)
        expected = [o[-1] for o in outputs]
        batched = [v.ndim > p.ndim for v, p in zip(point.values, parameters, strict=True)]
        # The gradient of a shared parameter is a sum over the batch: nothing to compare one item with.
        alone_gradients = [g for g, is_batched in zip(alone_gradients, batched, strict=True) if is_batched]
        expected_gradients = [g[-1] for g, is_batched in zip(gradients, batched, strict=True) if is_batched]
    for out, value in zip(alone, expected, strict=True):
        assert_close(out, value, 1e-10, 1e-2, f"seed {point.seed}")
    for gradient, value in zip(alone_gradients, expected_gradients, strict=True):
        assert_close(gradient, value, 1e-9, 1e-2, f"seed {point.seed}")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["sum_squares_simplex", "everything_a_parameter", "birkhoff", "scalar_variable"])
def test_batch_of_one_keeps_its_axis(kind, name):
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    values = [v[:1] if v.ndim > p.ndim else v for v, p in zip(point.values, parameters, strict=True)]
    layer = make_layer(kind, problem, parameters, variables)
    outputs, gradients = run(layer, values, [c[:1] for c in point.cotangents])
    for out, expected in zip(outputs, point.outputs, strict=True):
        assert_close(out, expected[:1], VALUE, 1e-2, f"seed {point.seed}")
    for gradient, value in zip(gradients, values, strict=True):
        assert gradient.shape == value.shape


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "name",
    [
        "sum_squares_simplex", "everything_a_parameter", "birkhoff", "portfolio", "dual_of_inequality", "monotone",
        "quantile_regression", "optimal_transport_marginals", "control_with_limits", "dual_of_linear_program",
    ],
)  # fmt: skip
def test_float32(kind, name):
    """Single precision in, single precision out; of the stock layer, which computes in float64, only the gradients."""
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    layer = make_layer(kind, problem, parameters, variables)
    outputs, gradients = run(layer, point.values, point.cotangents, dtype=torch.float32)
    for out, expected in zip(outputs, point.outputs, strict=True):
        if kind == "ours":
            assert out.dtype == torch.float32
        assert_close(out, expected, 1e-5, 1.0, f"seed {point.seed}")
    for gradient, expected in zip(gradients, point.gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected, 1e-4, 1.0, f"seed {point.seed}")


def test_shared_gradient_is_the_sum_over_the_batch():
    """Without the oracle: a shared matrix against the same matrix repeated per item."""
    point = truth("least_squares_parameter")
    matrix, points = point.values
    problem, parameters, variables, _ = TABLE["least_squares_parameter"].build()
    layer = make_layer("ours", problem, parameters, variables)
    _, (shared, _) = run(layer, [matrix, points], point.cotangents)
    _, (repeated, _) = run(layer, [np.broadcast_to(matrix, (len(points), *matrix.shape)), points], point.cotangents)
    assert_close(shared, repeated.sum(0), 1e-12, 1e-2)


def test_stock_layer_refuses_a_quad_form_of_a_parameter():
    """The host's own check, for every solver with a quadratic objective; our layer takes the program."""
    problem, parameters, variables, _ = TABLE["quad_form_of_difference"].build()
    with pytest.raises(ValueError, match="DPP"):
        make_layer("stock", problem, parameters, variables)


@pytest.mark.parametrize("kind", LAYERS)
def test_symmetric_gradient_lies_where_cvxpylayers_puts_it(kind):
    """Code that reads the gradient of a symmetric parameter finds it in the upper triangle, as before the swap."""
    point = truth("symmetric_parameter")
    _, (gradient,) = _result(kind, "symmetric_parameter")
    assert_close(gradient, point.gradients[0], GRADIENT, 1e-2, f"seed {point.seed}")
