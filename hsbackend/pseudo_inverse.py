"""The pseudo-inverse of a symmetric matrix, differentiable to any order.

    M^+,   O = I - M M^+      (the orthogonal projector on the null space of M)

For changes of M that keep its rank both are differentiable, and the derivative is made of nothing but the two:

    (M^+)' = -M^+ M' M^+ + M^+ M^+ M' O + O M' M^+ M^+,        O' = -M^+ M' O - O M' M^+

(Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", 1973). M is symmetric, so the cotangent of M is the same expression in the cotangents of M^+ and O. Where M
is not singular O is exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from hsbackend.operators import outer_tangents, primals

#: Eigenvalues of an equilibrated matrix below this fraction of the largest are zero: for the KKT matrix of a face the
#: squared sine at which the solvers call a row dependent.
_RANK = 1e-11


def _values(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return M^+ and O; the rank is that of the equilibrated matrix, so that units do not decide it."""
    scale = matrix.new_ones(matrix.shape[:-1])
    for _ in range(3):  # Ruiz (2001): the largest entry of every row tends to one
        largest = (scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2)).abs().amax(-1)
        scale = scale / torch.where(largest > 0.0, largest, 1.0).sqrt()
    values, vectors = torch.linalg.eigh(scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2))
    size = values.abs()
    kept = size > _RANK * size.amax(-1, keepdim=True)
    vectors = scale.unsqueeze(-1) * vectors
    inverse = (vectors * (kept / torch.where(kept, values, 1.0)).unsqueeze(-2)) @ vectors.mT
    if bool(kept.all()):
        return inverse, torch.zeros_like(inverse)
    # A generalised inverse so far; between projectors on the range of M it is M^+.
    basis = torch.linalg.svd(vectors * (~kept).unsqueeze(-2))[0]
    dimension = (~kept).sum(-1, keepdim=True)
    basis = basis * (torch.arange(matrix.shape[-1], device=matrix.device) < dimension).unsqueeze(-2)
    null = basis @ basis.mT
    inverse = inverse - null @ inverse
    return inverse - inverse @ null, null


def _rule(inverse: Tensor, null: Tensor, d_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tangents of M^+ and O for one of M."""
    turned = inverse @ inverse @ d_matrix @ null
    turned = turned + null @ d_matrix @ inverse @ inverse
    d_null = -(inverse @ d_matrix @ null) - null @ d_matrix @ inverse
    return turned - inverse @ d_matrix @ inverse, d_null


def _pullback(inverse: Tensor, null: Tensor, g_inverse: Tensor | None, g_null: Tensor | None) -> Tensor | None:
    """Return the cotangent of M."""
    found = None if g_inverse is None else _rule(inverse, null, g_inverse)[0]
    if g_null is None:
        return found
    other = _rule(inverse, null, g_null)[1]
    return other if found is None else found + other


@torch.library.custom_op("hsbackend::pseudo_inverse", mutates_args=())
def _pseudo_inverse_op(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return _values(matrix)


@_pseudo_inverse_op.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape), matrix.new_empty(matrix.shape)


class _PseudoInverse(torch.autograd.Function):
    """The two matrices in eager mode and inside of ``torch.func`` transforms."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        """(..., k, k); the operator also stands for the values that are traced and not computed."""
        return _pseudo_inverse_op(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Save for both modes."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Tensor | None:
        """Apply the rule of the module docstring."""
        inverse, null = ctx.saved_tensors
        return _pullback(inverse, null, cotangents[0], cotangents[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        """Apply the rule of the module docstring."""
        with outer_tangents():
            inverse, null = primals(ctx.saved_tensors)
            return _rule(inverse, null, tangents[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Map over the axes in front."""
        return _PseudoInverse.apply(inputs[0].movedim(in_dims[0], 0)), (0, 0)


def _pseudo_inverse_setup(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _pseudo_inverse_backward(ctx: Any, g_inverse: Tensor | None, g_null: Tensor | None) -> Tensor | None:
    inverse, null = ctx.saved_tensors
    return _pullback(inverse, null, g_inverse, g_null)


_pseudo_inverse_op.register_autograd(_pseudo_inverse_backward, setup_context=_pseudo_inverse_setup)


@_pseudo_inverse_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], matrix: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    return _pseudo_inverse_op(matrix.movedim(in_dims[0], 0)), (0, 0)


def pseudo_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``M^+`` and ``I - M M^+`` for symmetric matrices (..., k, k); differentiable to any order.

    The derivative keeps the rank: directions in which dependent rows would become independent do not count.
    """
    if torch.compiler.is_compiling() or is_legacy_batchedtensor(matrix):
        return _pseudo_inverse_op(matrix)
    return _PseudoInverse.apply(matrix)
