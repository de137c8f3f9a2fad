"""`enable`, `disable` and `enabled`: existing code that names no solver goes through HS, and back."""

import cvxpy as cp
import cvxpylayers.torch
import diffcp
import numpy as np
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer as CvxpyLayerImportedBefore
from layer_harness import assert_close

import hsbackend


@pytest.fixture(autouse=True)
def _always_disabled_afterwards():
    hsbackend.disable()
    yield
    hsbackend.disable()


@pytest.fixture
def diffcp_calls(monkeypatch):
    """Count the solves that reach diffcp."""
    calls = []
    for name in ("solve_and_derivative_batch", "solve_only_batch", "solve_and_derivative", "solve_only"):
        original = getattr(diffcp, name)

        def counted(*args, _original=original, **keywords):
            calls.append(1)
            return _original(*args, **keywords)

        monkeypatch.setattr(diffcp, name, counted)
    return calls


def _simplex():
    x, y = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0]), [y], [x]


def _project(layer):
    y = torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64, requires_grad=True)
    (out,) = layer(y)
    (gradient,) = torch.autograd.grad(out[0], y)
    return out, gradient


def _assert_exact(layer):
    out, gradient = _project(layer)
    assert_close(out, np.array([0.7, 0.3, 0.0]), 1e-12, 1.0)
    assert_close(gradient, np.array([0.5, -0.5, 0.0]), 1e-12, 1.0)


def test_enabled_for_a_block(diffcp_calls):
    with hsbackend.enabled():
        layer = cvxpylayers.torch.CvxpyLayer(*_simplex())
        _assert_exact(layer)
    assert not diffcp_calls
    _project(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert diffcp_calls


def test_layer_built_inside_stays_after_the_block(diffcp_calls):
    with hsbackend.enabled():
        layer = cvxpylayers.torch.CvxpyLayer(*_simplex())
    _assert_exact(layer)
    assert not diffcp_calls


def test_enable_and_disable(diffcp_calls):
    hsbackend.enable()
    _assert_exact(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert not diffcp_calls
    hsbackend.disable()
    _project(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert diffcp_calls


def test_reaches_a_class_imported_before(diffcp_calls):
    """`from cvxpylayers.torch import CvxpyLayer` at the top of a module is existing code too."""
    with hsbackend.enabled():
        _assert_exact(CvxpyLayerImportedBefore(*_simplex()))
    assert not diffcp_calls


def test_keywords_of_the_stock_class_keep_working():
    problem, parameters, variables = _simplex()
    with hsbackend.enabled():
        layer = cvxpylayers.torch.CvxpyLayer(problem, parameters=parameters, variables=variables, verbose=False)
        assert isinstance(layer, torch.nn.Module)
        assert isinstance(layer, CvxpyLayerImportedBefore)
        _assert_exact(layer)


def test_a_named_solver_is_left_alone(diffcp_calls):
    with hsbackend.enabled():
        _project(cvxpylayers.torch.CvxpyLayer(*_simplex(), solver="DIFFCP"))
    assert diffcp_calls


def test_solver_none_spelled_out_counts_as_unnamed(diffcp_calls):
    with hsbackend.enabled():
        _assert_exact(cvxpylayers.torch.CvxpyLayer(*_simplex(), solver=None))
    assert not diffcp_calls


def test_programs_that_are_not_polyhedral_still_work(diffcp_calls):
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm(x) <= 1])
    with hsbackend.enabled():
        (out,) = cvxpylayers.torch.CvxpyLayer(problem, [y], [x])(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    assert_close(out, np.array([1.0, 0.0, 0.0]), 1e-3, 1.0)
    assert diffcp_calls


def test_a_subclass_keeps_its_own_forward(diffcp_calls):
    class Scaled(cvxpylayers.torch.CvxpyLayer):
        def forward(self, *params, **keywords):
            return tuple(2 * out for out in super().forward(*params, **keywords))

    with hsbackend.enabled():
        (out,) = Scaled(*_simplex())(torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64))
    assert_close(out, np.array([1.4, 0.6, 0.0]), 1e-12, 1.0)
    assert not diffcp_calls


def test_twice_is_once(diffcp_calls):
    hsbackend.enable()
    hsbackend.enable()
    _assert_exact(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert not diffcp_calls
    hsbackend.disable()
    _project(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert diffcp_calls


def test_disable_without_enable_changes_nothing(diffcp_calls):
    hsbackend.disable()
    _project(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert diffcp_calls


def test_blocks_nest(diffcp_calls):
    with hsbackend.enabled():
        with hsbackend.enabled():
            _assert_exact(cvxpylayers.torch.CvxpyLayer(*_simplex()))
        _assert_exact(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert not diffcp_calls
    _project(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert diffcp_calls


def test_block_inside_enable_leaves_it_enabled(diffcp_calls):
    hsbackend.enable()
    with hsbackend.enabled():
        pass
    _assert_exact(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert not diffcp_calls


def test_an_exception_ends_the_block_too(diffcp_calls):
    with pytest.raises(KeyError), hsbackend.enabled():
        raise KeyError
    _project(cvxpylayers.torch.CvxpyLayer(*_simplex()))
    assert diffcp_calls
