"""Projections that torch operations express: boxes, one row, affine sets.

    box          x = max(lower, min(v, upper))
    half-space   x = v - max(a'v - b, 0) / (a'H^-1 a) H^-1 a        hyperplane: without the max
    affine       x = v - A^+ (A v - b)

They differentiate to any order, map and compile by themselves. At a tie the choice of K decides which branch is taken:
``"active"`` the constraint, ``"support"`` the point.

An item's numbers have the same bits whatever the batch around it and the number of threads, and so have its gradients.
Two habits of torch are in the way: a matrix product rounds differently with another number of rows, and one long sum is
cut into as many pieces as there are threads. Products are therefore written as sums, and long sums cut in fixed places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsbackend import checks
from hsbackend.families.family import Choice
from hsbackend.operators import on_device, outer_tangents, transforms_active, values_only
from hsbackend.status import SolveError, Status, failure_message


class Asked(NamedTuple):
    """What a projection is asked for.

    Attributes:
        jacobian: which K of the Han-Sun set.
        strict: whether failing items raise.
    """

    jacobian: Choice
    strict: bool


class _MarkFailed(torch.autograd.Function):
    """Raise for failing items, or make them NaN with the gradient of a failed item: zero, NaN where it is asked for."""

    @staticmethod
    def forward(x: Tensor, v: Tensor, status: Tensor, strict: bool) -> Tensor:
        """(..., n), (..., n) and (...,); v is there to receive the NaN."""
        failed = status != 0
        if strict and on_device(status):
            checks.check(status.reshape(-1))
        elif strict and bool(failed.any()):
            codes = status.reshape(-1).cpu().numpy()
            raise SolveError(failure_message(codes, {}), codes)
        return torch.where(failed.unsqueeze(-1), torch.nan, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Remember who failed."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Pass the cotangent on."""
        cotangent = cotangents[0]
        if cotangent is None:
            return None, None, None, None
        poison = _poison(cotangent, ctx.saved_tensors[0])
        return cotangent + poison, poison, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Pass the tangent on."""
        with outer_tangents():
            known = [tangent for tangent in tangents[:2] if tangent is not None]
            result = torch.zeros_like(known[0]) if tangents[0] is None else tangents[0]
            return sum((_poison(tangent, ctx.saved_tensors[0]) for tangent in known), result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Move the mapped axis to the front; failing items are NaN."""
        x, v, status = (
            (tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)).expand(
                info.batch_size, *(tensor.shape if dim is None else tensor.movedim(dim, 0).shape[1:])
            )
            for tensor, dim in zip(inputs[:3], in_dims[:3], strict=True)
        )
        return _MarkFailed.apply(x, v, status, False), 0


def _poison(value: Tensor, status: Tensor) -> Tensor:
    """Return NaN for failed items with a non-zero value, zero elsewhere."""
    asked = (status != 0) & (value != 0.0).any(-1)
    return torch.where(asked, torch.nan, 0.0).to(value.dtype).unsqueeze(-1).expand(value.shape)


def settle(x: Tensor, v: Tensor, invalid: Tensor, infeasible: Tensor, asked: Asked) -> Tensor:
    """Do as asked with failing items.

    Args:
        x: (..., n) the projection.
        v: the point, broadcasts to the shape of x.
        invalid: (...,) or () which items have invalid data.
        infeasible: (...,) or () which items have no solution.
        asked: options.
    """
    failed = invalid | infeasible
    if torch.compiler.is_compiling():
        return torch.where(failed.unsqueeze(-1), torch.nan, x)
    if not on_device(x) and not transforms_active() and not bool(failed.any()):  # to ask a device is to wait for it
        return x
    status = torch.where(invalid, int(Status.INVALID_INPUT), torch.where(infeasible, int(Status.INFEASIBLE), 0))
    codes = status.to(torch.int8).expand(x.shape[:-1])
    return _MarkFailed.apply(x, v.expand(x.shape), codes, asked.strict)


def _allowance(like: Tensor) -> float:
    """Relative amount by which constraints may contradict each other through rounding, as in the families."""
    return 1e-9 if like.dtype == torch.float64 else 1e-5


#: Longest sum that torch never cuts: half of what it gives to one thread.
_LONGEST = 16_384
#: Entries of a matrix that are multiplied with every item at a time; bounds the memory of :func:`_product`.
_ENTRIES = 4_096


def _sum(value: Tensor) -> Tensor:
    """Sum over the last axis, long ones piece by piece."""
    n = value.shape[-1]
    if n <= _LONGEST:
        return value.sum(-1)
    padded = torch.nn.functional.pad(value, (0, -n % _LONGEST))
    return _sum(padded.unflatten(-1, (-1, _LONGEST)).sum(-1))


def _along(value: Tensor, like: Tensor) -> Tensor:
    """Repeat (...) along a last axis of the length of another tensor's; the derivative is :func:`_sum`."""
    n = like.shape[-1]
    if n <= _LONGEST:
        return value.unsqueeze(-1)
    pieces = _along(value, torch.empty(-(-n // _LONGEST), device="meta")).expand(*value.shape, -(-n // _LONGEST))
    return pieces.unsqueeze(-1).expand(*pieces.shape, _LONGEST).flatten(-2)[..., :n]


def _product(matrix: Tensor, value: Tensor) -> Tensor:
    """Return ``M v``, (..., r), for a constant (r, c) matrix and (..., c)."""
    step = max(1, _ENTRIES // max(1, matrix.shape[1]))
    found = [_sum(value.unsqueeze(-2) * rows) for rows in matrix.split(step)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def clip(v: Tensor, lower: Tensor | None, upper: Tensor | None, asked: Asked) -> Tensor:
    """Project on a box; a coordinate whose bounds agree is held, by the upper one.

    Args:
        v: (..., n).
        lower: (..., n) or (..., 1), None for none.
        upper: (..., n) or (..., 1), None for none.
        asked: options.
    """
    hold = asked.jacobian == "active"
    x = v
    if lower is not None:
        x = torch.where(x <= lower if hold else x < lower, lower, x)
    if upper is not None:
        above = x >= upper if hold else x > upper
        if lower is not None:
            above = above | (lower >= upper)
        x = torch.where(above, upper, x)
    invalid = ~x.isfinite().all(-1) | v.isnan().any(-1)  # a bound may hide a NaN in the point
    infeasible = torch.zeros((), dtype=torch.bool, device=v.device)
    if lower is not None and upper is not None:
        infeasible = (lower - upper > _allowance(v) * (1.0 + upper.abs())).any(-1)
    for bound in (lower, upper):  # NaN in a bound passes no comparison
        if bound is not None:
            invalid = invalid | bound.isnan().any(-1)
    return settle(x, v, invalid, infeasible, asked)


def step_to_row(v: Tensor, a: Tensor, b: Tensor, weight: Tensor | None, equation: bool, asked: Asked) -> Tensor:
    """Project on a hyperplane or a half-space.

    A second step removes what rounding left of the first; that one has no derivative.

    Args:
        v: (..., n).
        a: (..., n).
        b: (...,).
        weight: (..., n), None for ones.
        equation: whether the row is an equation.
        asked: options.
    """
    direction = a if weight is None else a / weight
    length = _sum(a * direction)
    products = a * v
    excess = _sum(products) - b
    empty = length == 0.0
    if not equation:
        # Whether the row is active is decided to rounding, as in the families.
        size = _sum(products.abs()) + torch.where(b.isinf(), 0.0, b).abs()
        margin = 16.0 * torch.finfo(v.dtype).eps * size.detach()
        active = excess >= -margin if asked.jacobian == "active" else excess > margin
        excess = torch.where(active, excess, 0.0)
    else:
        active = ~empty
    divisor = torch.where(empty, 1.0, length)
    x = v - _along(torch.where(empty, 0.0, excess) / divisor, v) * direction
    left = torch.where(active & ~empty, _sum(a * x) - b, 0.0) / divisor
    x = x - (left.unsqueeze(-1) * direction).detach()
    infeasible = empty & (excess.abs() > _allowance(v) * (1.0 + b.abs()))
    invalid = ~x.isfinite().all(-1)
    if weight is not None:
        invalid = invalid | ~(weight > 0.0).all(-1)
    return settle(x, v, invalid, infeasible, asked)


def step_to_affine(v: Tensor, A: Tensor, b: Tensor, pseudo: Tensor, outside: Tensor, asked: Asked) -> Tensor:
    """Project on an affine set, with a second step as for one row.

    Args:
        v: (..., n).
        A: (p, n).
        b: (..., p).
        pseudo: (n, p) A^+.
        outside: (p, p) ``I - A A^+``, which an attainable b is in the null space of.
        asked: options.
    """
    x = v - _product(pseudo, _product(A, v) - b)
    x = x - _product(pseudo, _product(A, x) - b).detach()
    gap = _product(outside, b).abs().amax(-1)
    infeasible = gap > _allowance(v) * (1.0 + b.abs().amax(-1))
    return settle(x, v, ~x.isfinite().all(-1), infeasible, asked)


def pseudo_inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A^+`` (n, p) and ``I - A A^+`` (p, p) in float64; dependent rows do not count."""
    exact = A.to(torch.float64)
    if values_only() and not torch.compiler.is_compiling() and exact.device.type == "cpu":
        pseudo = torch.from_numpy(np.linalg.pinv(exact.numpy(), rcond=1e-11))  # does not ask torch for its threads
    else:
        pseudo = torch.linalg.pinv(exact, rtol=1e-11)
    return pseudo, torch.eye(A.shape[-2], dtype=torch.float64, device=A.device) - exact @ pseudo
