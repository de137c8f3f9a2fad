"""Contestants and comparisons shared by the adapter tests."""

from __future__ import annotations

import numpy as np
import torch
from cvxpylayers.torch import CvxpyLayer as StockLayer

LAYERS = ("ours", "stock")


def make_layer(kind, problem, parameters, variables, **options):
    """Build our layer, or the stock layer with our solver; `options` are HSBackend's."""
    # Imported here so that the oracle's own tests run without hsbackend.
    from hsbackend import HSBackend
    from hsbackend.adapters.cvxpylayers import CvxpyLayer

    layer = CvxpyLayer if kind == "ours" else StockLayer
    gp = options.pop("gp", False)
    return layer(problem, parameters, variables, solver=HSBackend(**options), gp=gp)


def diffcp_layer(problem, parameters, variables, **keywords):
    """The stock layer as it comes, solving with Clarabel at a tight tolerance."""
    arguments = {"solve_method": "Clarabel", "tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
    return StockLayer(problem, parameters, variables, solver_args=arguments, **keywords)


def tensors(values, dtype=torch.float64, requires_grad=True):
    """Fresh leaf tensors."""
    return [torch.tensor(np.asarray(v), dtype=dtype).requires_grad_(requires_grad) for v in values]


def run(layer, values, cotangents, dtype=torch.float64, **keywords):
    """Return the outputs of the layer and the gradients of sum_k <cotangents[k], outputs[k]>."""
    params = tensors(values, dtype)
    outputs = layer(*params, **keywords)
    loss = sum((torch.as_tensor(c, dtype=out.dtype) * out).sum() for c, out in zip(cotangents, outputs, strict=True))
    # A parameter whose gradient is None has been cut from the graph: that is an error here, never a zero.
    gradients = torch.autograd.grad(loss, params)
    return outputs, gradients


def assert_close(actual, expected, relative, floor, what=""):
    """Compare shape, then finiteness, then the largest difference divided by max(size of `expected`, `floor`)."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite: {actual}"
    error = np.abs(actual - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), floor)
    assert error <= relative, f"{what}: relative error {error:.2e} exceeds {relative:.0e}\n{actual}\n{expected}"
