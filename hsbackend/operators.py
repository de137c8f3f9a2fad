"""The families as PyTorch operators: two primitives whose derivatives are again these two.

``solve`` projects and returns the face; ``kkt`` solves the KKT system on a face
(:mod:`hsbackend.families.family`),

    [H  N'] [u]   [g]
    [N  0 ] [w] = [r]        z = (u, w, wb) = M^+ (g, r, rb),

which is linear and self-adjoint in ``(g, r, rb)``. With ``s = sign(x)`` for the l1 ball and 1 otherwise,
differentiating the KKT conditions on a fixed face gives

    solve, tangent:    (x', nu') = kkt(h v' + h'(v - x) - c' s nu,  r' - c'(s x),  bounds')
    solve, cotangent:  (u, w, wb) = kkt(g, g_nu, 0);  v: h u,  h: u (v - x),  c: -s (nu u + w x),  rhs: w,  bounds: wb
    kkt, tangent:      z' = M^+ (rhs' - M'z),   M'z = (h' u + c' s w,  c'(s u),  0)
    kkt, cotangent:    (p, p_w, p_wb) = kkt(g_u, g_w, g_wb);  rhs: themselves,  h: -p u,  c: -s (p_w u + p w)

(implicit differentiation; the solution operator of the system is the HS-Jacobian, docs/theory.md).
The formulas stand once, in differentiable torch operations, and are used by two wrappings: a
:class:`torch.autograd.Function` for eager mode (double backward, forward mode, ``torch.func`` transforms) and a custom
operator for ``torch.compile``, which traces custom operators but no Function that has a forward-mode rule. CUDA tensors
stay on their device (:mod:`hsbackend.cuda`); those of any other device but the CPU are moved there and back.

Tensors are (B, n), or (1, n) where one value serves every item; the gradient of such a shared one is the sum over the
batch. An item without a solution is NaN; its gradient is zero where its cotangents are zero, NaN where they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from hsbackend import checks
from hsbackend.families.family import Choice, Family, FamilySolution, Values
from hsbackend.status import SolveError, failure_message

#: Whether a ``torch.func`` transform is running: the question torch itself asks before it calls a Function.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]


def dual_level_open() -> bool:
    """Whether tensors may carry tangents (:mod:`torch.autograd.forward_ad`)."""
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def outer_tangents() -> AbstractContextManager[Any]:
    """Keep the tangents of outer transforms in the body of a ``jvp``.

    torch turns forward mode off while it calls a ``jvp``, and a jvp of a jvp would lose its outer tangent without a
    word. The price: what was saved carries the inner tangent too, see :func:`primals`.
    """
    return forward_ad._set_fwd_grad_enabled(True)  # pyright: ignore[reportPrivateUsage]


def primals(saved: Sequence[Tensor | None]) -> list[Any]:
    """Return saved tensors without the tangent that the ``jvp`` is about to use."""
    return [
        forward_ad.unpack_dual(tensor).primal if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in saved
    ]


def values_only() -> bool:
    """Whether nobody records or transforms what is computed now, so that kernels may be called directly."""
    return not (torch.is_grad_enabled() or transforms_active() or dual_level_open())


@dataclass(frozen=True)
class Layout:
    """Shapes and meaning of what a family returns.

    Attributes:
        rows: number of rows m, from the shape of one item.
        face_width: number of integers in a face.
        face_dtype: their type.
        sided: whether the right-hand side is (low, high) of one row, of which the face names the active one.
        signed: whether the row is ``c_j sign(x_j)`` instead of ``c_j``.
    """

    rows: Callable[[Sequence[int]], int]
    face_width: Callable[[Sequence[int]], int]
    face_dtype: torch.dtype
    sided: bool = False
    signed: bool = False


#: The families and what the modules of these names in :mod:`hsbackend.families` return.
LAYOUTS = {
    "budget": Layout(lambda _: 1, lambda shape: shape[0] + 1, torch.int8, sided=True),
    "l1": Layout(lambda _: 1, lambda shape: shape[0] + 1, torch.int8, signed=True),
    "monotone": Layout(lambda _: 2, lambda shape: shape[0] + 2, torch.int32),
    "transport": Layout(lambda shape: shape[0] + shape[1], lambda shape: shape[0] * shape[1], torch.int8),
}
_modules: dict[str, Family] = {}


def _family(name: str) -> Family:
    """Import a family when it is first used."""
    if name not in _modules:
        _modules[name] = cast("Family", import_module(f"hsbackend.families.{name}"))
    return _modules[name]


def on_device(tensor: Tensor) -> bool:
    """Whether a tensor is computed where it is: on a CUDA device."""
    return tensor.is_cuda


def _device() -> Any:
    """Import the device's side of the families when it is first used."""
    return import_module("hsbackend.cuda.dispatch")


def _array(tensor: Tensor) -> Values:
    """Return the values as a contiguous array in main memory."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).numpy()


def _optional(tensor: Tensor | None) -> Values | None:
    return None if tensor is None else _array(tensor)


def _tensors(like: Tensor, *arrays: Values) -> tuple[Tensor, ...]:
    found = tuple(torch.from_numpy(array) for array in arrays)
    return found if like.device.type == "cpu" else tuple(tensor.to(like.device) for tensor in found)


def _solve_values(
    family: str, point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, shape: Sequence[int], choice: str, strict: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Call the kernel; raise for failing items if ``strict``, on a device as :func:`hsbackend.checking` says."""
    if on_device(point):
        there = _device().solve(family, point, weight, coefficients, rhs, lower, upper, shape, choice)
        if strict:
            checks.check(there[3])
        return there
    found: FamilySolution = _family(family).solve(
        _array(point), _optional(weight), _optional(coefficients), _array(rhs), _optional(lower), _optional(upper),
        tuple(shape), cast("Choice", choice),
    )  # fmt: skip
    if strict and found.status.any():
        raise SolveError(failure_message(found.status, {}), found.status)
    return _tensors(point, found.primal, found.multipliers, found.face, found.status)


def _kkt_values(
    family: str, face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs_primal: Tensor,
    rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Call the kernel; failed items come out zero, or NaN where their right-hand side is not zero."""
    if on_device(primal):
        return _device().kkt(family, face, primal, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds, shape)
    x = _array(primal)
    sides = [_array(rhs_primal), _optional(rhs_rows), _optional(rhs_bounds)]
    failed = np.isnan(x[:, 0])
    poisoned = failed
    any_failed = bool(failed.any())
    if any_failed:
        poisoned = np.zeros_like(failed)
        for index, side in enumerate(sides):
            if side is not None:
                poisoned |= failed & (side != 0.0).any(axis=1)
                sides[index] = np.where(failed[:, None], side.dtype.type(0.0), side)
    found = _family(family).kkt(
        _array(face), x, _optional(weight), _optional(coefficients), cast("Values", sides[0]), sides[1], sides[2],
        tuple(shape),
    )  # fmt: skip
    if any_failed:
        for array in (found.primal, found.rows, found.bounds):
            array[failed] = 0.0
            array[poisoned] = np.nan
    return _tensors(primal, found.primal, found.rows, found.bounds)


# ----------------------------------------------------------------------------------------------------------------------
# The formulas of the module docstring. `kkt` is the primitive of the wrapping that asks.
# ----------------------------------------------------------------------------------------------------------------------

KKT = Callable[..., tuple[Tensor, ...]]


def _sum_shared(value: Tensor, shared: bool) -> Tensor:
    """Sum over the batch if the operand is shared by it."""
    return value.sum(0, keepdim=True) if shared and value.shape[0] != 1 else value


def _finite(value: Tensor) -> Tensor:
    """Replace NaN of failed items and infinities of masked entries, which a zero must cancel, by zero."""
    return torch.nan_to_num(value, 0.0, 0.0, 0.0)


def _signs(family: str, face: Tensor, shape: Sequence[int], value: Tensor) -> Tensor:
    """Multiply by s: the signs in the face of an l1 ball, one otherwise."""
    return face[:, : shape[0]].to(value.dtype) * value if LAYOUTS[family].signed else value


def _rhs_to_rows(family: str, face: Tensor, d_rhs: Tensor) -> Tensor:
    """Pick the tangent of the active side of each row."""
    if not LAYOUTS[family].sided:
        return d_rhs.expand(face.shape[0], d_rhs.shape[1])
    side = face[:, -1:]
    zero = d_rhs.new_zeros(())
    return torch.where(side > 0, d_rhs[:, 1:], torch.where(side < 0, d_rhs[:, :1], zero))


def _rows_to_rhs(family: str, face: Tensor, w: Tensor) -> Tensor:
    """The transpose of :func:`_rhs_to_rows`; products, not selections, so that NaN of failed items stays."""
    if not LAYOUTS[family].sided:
        return w
    side = face[:, -1:]
    return torch.cat([w * (side < 0), w * (side > 0)], dim=1)


@dataclass(slots=True)
class _Point:
    """Operands and solution of a ``solve``, as saved for its derivative; what is not needed may be None."""

    family: str
    shape: tuple[int, ...]
    point: Tensor | None
    weight: Tensor | None
    coefficients: Tensor | None
    primal: Tensor
    multipliers: Tensor | None
    face: Tensor

    def kkt(self, kkt: KKT, g: Tensor, r: Tensor | None, rb: Tensor | None) -> tuple[Tensor, ...]:
        """Solve the KKT system on this face."""
        return kkt(self.family, self.face, self.primal, self.weight, self.coefficients, g, r, rb, self.shape)

    def signs(self, value: Tensor) -> Tensor:
        """Multiply by s."""
        return _signs(self.family, self.face, self.shape, value)

    def step(self) -> Tensor:
        """Return ``v - x``, zero where it is infinite."""
        assert self.point is not None
        return _finite(self.point - self.primal)

    def row_multiplier(self) -> Tensor:
        """Return nu of the one row."""
        assert self.multipliers is not None
        return _finite(self.multipliers)


def _solve_tangent(
    kkt: KKT, at: _Point, d_point: Tensor | None, d_weight: Tensor | None, d_coefficients: Tensor | None,
    d_rhs: Tensor | None, d_lower: Tensor | None, d_upper: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    x = at.primal
    g = torch.zeros_like(x)
    if d_point is not None:
        g = g + (d_point if at.weight is None else at.weight * d_point)
    if d_weight is not None:
        g = g + d_weight * at.step()
    r = None if d_rhs is None else _rhs_to_rows(at.family, at.face, d_rhs)
    if d_coefficients is not None:
        g = g - d_coefficients * at.signs(at.row_multiplier())
        moved = (d_coefficients * at.signs(_finite(x))).sum(1, keepdim=True)
        r = -moved if r is None else r - moved
    rb = None
    if d_lower is not None or d_upper is not None:
        side = at.face[:, : x.shape[1]]
        zero = x.new_zeros(())
        below = zero if d_lower is None else torch.where(side < 0, d_lower, zero)
        rb = below if d_upper is None else torch.where(side > 0, d_upper, below)
    return at.kkt(kkt, g, r, rb)[:2]


def _solve_cotangent(
    kkt: KKT, at: _Point, shared: Sequence[bool], needs: Sequence[bool], g: Tensor | None, g_nu: Tensor | None
) -> list[Tensor | None]:
    """Return the cotangents of (point, weight, coefficients, rhs, lower, upper)."""
    found: list[Tensor | None] = [None] * 6
    if g is None and g_nu is None:
        return found
    u, w, wb = at.kkt(kkt, torch.zeros_like(at.primal) if g is None else g, g_nu, None)
    if needs[0]:
        # A failed item may have a weight of NaN; its u is zero, or NaN already.
        found[0] = u if at.weight is None else _finite(at.weight) * u
    if needs[1]:
        found[1] = u * at.step()
    if needs[2]:
        found[2] = -at.signs(at.row_multiplier() * u + w * _finite(at.primal))
    if needs[3]:
        found[3] = _rows_to_rhs(at.family, at.face, w)
    if needs[4] or needs[5]:
        side = at.face[:, : u.shape[1]]
        found[4] = wb * (side < 0) if needs[4] else None
        found[5] = wb * (side > 0) if needs[5] else None
    return [
        None if value is None else _sum_shared(value, together) for value, together in zip(found, shared, strict=True)
    ]


def _kkt_tangent(
    kkt: KKT, at: _Point, z: Sequence[Tensor], d_weight: Tensor | None, d_coefficients: Tensor | None,
    d_rhs_primal: Tensor | None, d_rhs_rows: Tensor | None, d_rhs_bounds: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    u, w = z[0], z[1]
    g = torch.zeros_like(u) if d_rhs_primal is None else d_rhs_primal
    r = d_rhs_rows
    if d_weight is not None:
        g = g - d_weight * u
    if d_coefficients is not None:
        g = g - d_coefficients * at.signs(w)
        moved = (d_coefficients * at.signs(u)).sum(1, keepdim=True)
        r = -moved if r is None else r - moved
    return at.kkt(kkt, g, r, d_rhs_bounds)


def _kkt_cotangent(
    kkt: KKT, at: _Point, z: Sequence[Tensor], shared: Sequence[bool], needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """Return the cotangents of (weight, coefficients, rhs_primal, rhs_rows, rhs_bounds)."""
    if all(cotangent is None for cotangent in cotangents):
        return [None] * 5
    u, w = z[0], z[1]
    g = cotangents[0]
    p, p_w, p_wb = at.kkt(kkt, torch.zeros_like(u) if g is None else g, cotangents[1], cotangents[2])
    weight = _sum_shared(-p * u, shared[0]) if needs[0] else None
    coefficients = _sum_shared(-at.signs(p_w * u + p * w), shared[1]) if needs[1] else None
    return [weight, coefficients, p if needs[2] else None, p_w if needs[3] else None, p_wb if needs[4] else None]


# ----------------------------------------------------------------------------------------------------------------------
# Eager mode. The plain classes save a signature binding per call (25 us); the others serve the torch.func transforms.
# ----------------------------------------------------------------------------------------------------------------------


def fold(size: int, tensors: Sequence[Tensor | None], in_dims: Sequence[int | None]) -> list[Tensor | None]:
    """Fold the axis of a vmap into the batch axis.

    Operands whose batch axis has length 1 and that are not mapped stay as they are: one value for every item.

    Args:
        size: length of the mapped axis.
        tensors: operands, (B, ...) or (1, ...) apart from the mapped axis.
        in_dims: the mapped axis of each, None where there is none.
    """
    moved = [
        tensor if tensor is None or dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    batches = [
        tensor.shape[0 if dim is None else 1] for tensor, dim in zip(moved, in_dims, strict=True) if tensor is not None
    ]
    batch = next((length for length in batches if length != 1), 1)
    folded: list[Tensor | None] = []
    for tensor, dim in zip(moved, in_dims, strict=True):
        if tensor is None or (dim is None and tensor.shape[0] == 1 and batch * size != 1):
            folded.append(tensor)
            continue
        whole = tensor if dim is not None else tensor.unsqueeze(0)
        folded.append(whole.expand(size, batch, *whole.shape[2:]).reshape(size * batch, *whole.shape[2:]))
    return folded


def unfold(size: int, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give the axis of a vmap back, in front."""
    return tuple(output.reshape(size, output.shape[0] // size, *output.shape[1:]) for output in outputs)


def _whole(point: Tensor | None, size: int, dim: int | None) -> tuple[Tensor | None, int | None]:
    """Map an operand that every kernel wants in full length, whatever is mapped."""
    if point is None or dim is not None:
        return point, dim
    return point.unsqueeze(0).expand(size, *point.shape), 0


def _save_solve(
    ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor], needs: Sequence[bool], everything: bool
) -> None:
    """Keep what the derivative needs; the point only for a weight's, so that it may change in place otherwise."""
    family, point, weight, coefficients, rhs, lower, upper, shape = inputs[:8]
    primal, multipliers, face, status = outputs
    ctx.mark_non_differentiable(face, status)
    ctx.set_materialize_grads(False)
    ctx.constants = (family, tuple(shape))
    ctx.shared = [
        operand is not None and operand.shape[0] == 1 for operand in (point, weight, coefficients, rhs, lower, upper)
    ]
    saved = (
        point if everything or needs[2] else None, weight, coefficients, primal,
        multipliers if everything or needs[3] else None, face,
    )  # fmt: skip
    ctx.save_for_backward(*saved)
    if everything:
        ctx.save_for_forward(*saved)


def _solve_backward(ctx: Any, kkt: KKT, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    at = _Point(*ctx.constants, *ctx.saved_tensors)
    return _solve_cotangent(kkt, at, ctx.shared, ctx.needs_input_grad[1:7], cotangents[0], cotangents[1])


def _save_kkt(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor], everything: bool) -> None:
    family, face, primal, weight, coefficients = inputs[:5]
    ctx.set_materialize_grads(False)
    ctx.constants = (family, tuple(inputs[8]))
    ctx.shared = [operand is not None and operand.shape[0] == 1 for operand in (weight, coefficients)]
    saved = (weight, coefficients, primal, face, outputs[0], outputs[1])
    ctx.save_for_backward(*saved)
    if everything:
        ctx.save_for_forward(*saved)


def _saved_kkt(ctx: Any, saved: Sequence[Any]) -> tuple[_Point, tuple[Tensor, Tensor]]:
    weight, coefficients, primal, face, u, w = saved
    family, shape = ctx.constants
    return _Point(family, shape, None, weight, coefficients, primal, None, face), (u, w)


def _kkt_backward(ctx: Any, kkt: KKT, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    at, z = _saved_kkt(ctx, ctx.saved_tensors)
    return _kkt_cotangent(kkt, at, z, ctx.shared, ctx.needs_input_grad[3:8], cotangents)


def _backward_kkt(cotangents: Sequence[Tensor | None]) -> KKT:
    """Return the primitive for a backward pass: the bare kernel where nobody differentiates again."""
    if any(cotangent is not None and is_legacy_batchedtensor(cotangent) for cotangent in cotangents):
        return cast(
            "KKT", _kkt_op
        )  # torch.autograd.grad(is_grads_batched=True): its old vmap wants a registered operator
    return _kkt_values if values_only() else kkt


class _Solve(torch.autograd.Function):
    """``solve`` outside of transforms."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """Arguments of :func:`solve`, in order."""
        outputs = _solve_values(*inputs)
        _save_solve(ctx, inputs, outputs, ctx.needs_input_grad, dual_level_open())
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        return (None, *_solve_backward(ctx, _backward_kkt(cotangents), cotangents), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        at = _Point(*ctx.constants, *ctx.saved_tensors)
        return (*_solve_tangent(kkt, at, *tangents[1:7]), None, None)


class _SolveTransformed(torch.autograd.Function):
    """``solve`` inside of ``torch.func`` transforms."""

    backward = _Solve.backward

    @staticmethod
    def forward(
        family: str, point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor,
        lower: Tensor | None, upper: Tensor | None, shape: tuple[int, ...], choice: str, strict: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Arguments of :func:`solve`, in order."""
        return _solve_values(family, point, weight, coefficients, rhs, lower, upper, shape, choice, strict)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save for both modes: a transform may ask for either."""
        _save_solve(ctx, inputs, output, (), True)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        with outer_tangents():
            at = _Point(*ctx.constants, *primals(ctx.saved_tensors))
            return (*_solve_tangent(kkt, at, *tangents[1:7]), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped axis into the batch; failing items are NaN."""
        outputs = _solve_mapped(partial(solve, strict=False), info.batch_size, in_dims, inputs[:9])
        return outputs, (0,) * 4


class _KKT(torch.autograd.Function):
    """``kkt`` outside of transforms."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """Arguments of :func:`kkt`, in order."""
        outputs = _kkt_values(*inputs)
        _save_kkt(ctx, inputs, outputs, dual_level_open())
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        return (None, None, None, *_kkt_backward(ctx, _backward_kkt(cotangents), cotangents), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        at, z = _saved_kkt(ctx, ctx.saved_tensors)
        return _kkt_tangent(kkt, at, z, *tangents[3:8])


class _KKTTransformed(torch.autograd.Function):
    """``kkt`` inside of ``torch.func`` transforms."""

    backward = _KKT.backward

    @staticmethod
    def forward(
        family: str, face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None,
        rhs_primal: Tensor, rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Arguments of :func:`kkt`, in order."""
        return _kkt_values(family, face, primal, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save for both modes: a transform may ask for either."""
        _save_kkt(ctx, inputs, output, True)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        with outer_tangents():
            at, z = _saved_kkt(ctx, primals(ctx.saved_tensors))
            return _kkt_tangent(kkt, at, z, *tangents[3:8])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped axis into the batch."""
        return _kkt_mapped(kkt, info.batch_size, in_dims, inputs), (0,) * 3


def _solve_mapped(call: KKT, size: int, dims: Sequence[Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call with the mapped axis folded into the batch; the point is wanted whole, parameters may be shared."""
    point, dim = _whole(inputs[1], size, dims[1])
    operands = fold(size, [point, *inputs[2:7]], [dim, *dims[2:7]])
    return unfold(size, call(inputs[0], *operands, *inputs[7:9]))


def _kkt_mapped(call: KKT, size: int, dims: Sequence[Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call with the mapped axis folded into the batch; only weight and coefficients may be shared."""
    whole = [_whole(inputs[index], size, dims[index]) for index in (1, 2, 5, 6, 7)]
    (face, face_dim), (primal, primal_dim), *sides = whole
    operands = fold(
        size,
        [face, primal, inputs[3], inputs[4], *(tensor for tensor, _ in sides)],
        [face_dim, primal_dim, dims[3], dims[4], *(dim for _, dim in sides)],
    )
    return unfold(size, call(inputs[0], *operands, inputs[8]))


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile: the same as custom operators.
# ----------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("hsbackend::family_solve", mutates_args=())
def _solve_op(
    family: str, point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, shape: Sequence[int], choice: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (family, point, weight, coefficients, rhs, lower, upper, shape, choice)
    primal, multipliers, face, status = _solve_values(*inputs, False)
    return primal, multipliers, face, status


@torch.library.custom_op("hsbackend::family_kkt", mutates_args=())
def _kkt_op(
    family: str, face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs_primal: Tensor,
    rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    u, w, wb = _kkt_values(family, face, primal, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds, shape)
    return u, w, wb


@_solve_op.register_fake
def _(
    family: str, point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, shape: Sequence[int], choice: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, layout = point.shape[0], LAYOUTS[family]
    return (
        point.new_empty(point.shape),
        point.new_empty(batch, layout.rows(shape)),
        point.new_empty(batch, layout.face_width(shape), dtype=layout.face_dtype),
        point.new_empty(batch, dtype=torch.int8),
    )


@_kkt_op.register_fake
def _(
    family: str, face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs_primal: Tensor,
    rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = primal.new_empty(primal.shape[0], LAYOUTS[family].rows(shape))
    return primal.new_empty(primal.shape), rows, primal.new_empty(primal.shape)


def _solve_op_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_solve(ctx, inputs, output, ctx.needs_input_grad, False)


def _solve_op_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    return (None, *_solve_backward(ctx, cast("KKT", _kkt_op), cotangents), None, None)


def _kkt_op_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_kkt(ctx, inputs, output, False)


def _kkt_op_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    return (None, None, None, *_kkt_backward(ctx, cast("KKT", _kkt_op), cotangents), None)


_solve_op.register_autograd(_solve_op_backward, setup_context=_solve_op_setup)
_kkt_op.register_autograd(_kkt_op_backward, setup_context=_kkt_op_setup)


@_solve_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _solve_mapped(cast("KKT", _solve_op), info.batch_size, in_dims, inputs), (0,) * 4


@_kkt_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _kkt_mapped(cast("KKT", _kkt_op), info.batch_size, in_dims, inputs), (0,) * 3


# ----------------------------------------------------------------------------------------------------------------------
# The primitives.
# ----------------------------------------------------------------------------------------------------------------------


def solve(
    family: str, point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, shape: tuple[int, ...], choice: str, strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project with a family; differentiable in every tensor.

    Args:
        family: a key of :data:`LAYOUTS`.
        point: (B, n) v, float32 or float64; the other tensors have its dtype and device.
        weight: (1 or B, n) h, None for ones.
        coefficients: (1 or B, n) c, None for ones.
        rhs: (1 or B, p), meaning by family.
        lower: (1 or B, n), None for none.
        upper: (1 or B, n), None for none.
        shape: shape of one item.
        choice: ``"active"`` or ``"support"``, the K of the face.
        strict: raise for failing items, on a CUDA device as :func:`hsbackend.checking` says; not possible under
            ``vmap`` and ``torch.compile``, where they are NaN.

    Returns:
        primal (B, n), multipliers (B, m), face (B, k), status (B,); the last two are integers.

    Raises:
        SolveError: if ``strict`` and an item has no solution.
    """
    if torch.compiler.is_compiling():
        return _solve_op(family, point, weight, coefficients, rhs, lower, upper, shape, choice)
    inputs = (family, point, weight, coefficients, rhs, lower, upper, shape, choice, strict)
    if values_only():
        primal, multipliers, face, status = _solve_values(*inputs)
        return primal, multipliers, face, status
    return (_SolveTransformed if transforms_active() else _Solve).apply(*inputs)


def kkt(
    family: str, face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs_primal: Tensor,
    rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve the KKT system on a face; differentiable in weight, coefficients and right-hand sides.

    Args:
        family: a key of :data:`LAYOUTS`.
        face: (B, k) from :func:`solve`.
        primal: (B, n) from :func:`solve`; NaN marks failed items.
        weight: as in :func:`solve`.
        coefficients: as in :func:`solve`.
        rhs_primal: (B, n) g.
        rhs_rows: (B, m) r, None for zero.
        rhs_bounds: (B, n), None for zero.
        shape: shape of one item.

    Returns:
        u (B, n), w (B, m), wb (B, n).
    """
    inputs = (family, face, primal, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds, shape)
    if torch.compiler.is_compiling():
        return _kkt_op(*inputs)
    return (_KKTTransformed if transforms_active() else _KKT).apply(*inputs)
