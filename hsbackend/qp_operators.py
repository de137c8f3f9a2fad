"""Quadratic programs as PyTorch operators, for any combination of given data.

The solvers of the library do the work (:mod:`hsbackend.plan`) on the program that :mod:`hsbackend.qp_program` writes. A
plain backward pass uses the factorisation that the solver ended with. Everything else (double backward, forward mode,
``torch.func`` transforms, ``torch.compile``) uses the same formulas written in torch operations
(:mod:`hsbackend.qp_face`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from hsbackend.operators import fold, outer_tangents, primals, transforms_active, unfold, values_only
from hsbackend.plan import Solution
from hsbackend.program import FloatArray, IndexArray
from hsbackend.qp_face import cotangent, tangent
from hsbackend.qp_program import CACHE, NAMES, Data, Prepared, Settings, as_array
from hsbackend.solvers.result import Options
from hsbackend.status import SolveError, Status, failure_message

#: Those of the data that scale with the solution.
_LIMITS = ("q", "b", "h", "lower", "upper")
#: Data between this and its inverse are solved as they are.
_SMALL = 1e-2
#: Limits this far above all other data stand for none.
HUGE = 1e8
#: Limits up to this are usual ones.
USUAL = 1e2
#: What :func:`solve` returns, in this order.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _largest(array: FloatArray) -> FloatArray:
    """Return the largest finite magnitude of each item, (B, 1)."""
    size = np.abs(array)
    finite = np.isfinite(size)
    return np.max(size if finite.all() else np.where(finite, size, 0.0), axis=1, initial=0.0, keepdims=True)


def _unit(arrays: Mapping[str, FloatArray]) -> FloatArray:
    """Return the size of the limits of each item, or of q where all of them are zero, (B, 1) or (1, 1).

    It is a power of two, and 1 for data around 1. Solvers know absolute tolerances; with limits t b and linear term t q
    the solution is t x, so data of another size are brought to size 1 first, without a rounding error.
    """
    found = np.zeros((1, 1))
    for name in _LIMITS[1:]:
        if name in arrays:
            found = np.maximum(found, _largest(arrays[name]))
    if not found.all():
        found = np.where(found > 0.0, found, _largest(arrays["q"]))
    unusual = (found > 0.0) & ((found < _SMALL) | (found > 1.0 / _SMALL))
    if not unusual.any():
        return np.ones((1, 1))
    large = found > 1.0 / _SMALL
    if large.any():
        found = np.where(large, _typical(arrays), found)
        unusual = (found > 0.0) & ((found < _SMALL) | (found > 1.0 / _SMALL))
    return np.where(unusual, np.exp2(np.floor(np.log2(np.where(unusual, found, 1.0)))), 1.0)


def _typical(arrays: Mapping[str, FloatArray]) -> FloatArray:
    """Return the size of the limits without inequalities and bounds that stand for none, such as 1e20, (B, 1).

    Those are far above all other data: against them a contradiction among the others would be rounding.
    """
    batch = max(len(arrays[name]) for name in _LIMITS if name in arrays)
    equal = _largest(arrays["b"]) if "b" in arrays else np.zeros((1, 1))
    limits = [np.abs(arrays[name]) for name in ("h", "lower", "upper") if name in arrays]
    sizes = np.concatenate(
        [np.zeros((batch, 1)), *(np.broadcast_to(limit, (batch, limit.shape[1])) for limit in limits)], 1
    )
    there = np.isfinite(sizes) & (sizes > 0.0)
    usual = np.max(np.where(there & (sizes <= USUAL), sizes, 0.0), axis=1, keepdims=True)
    least = np.min(np.where(there, sizes, np.inf), axis=1, keepdims=True)
    reference = np.maximum(np.maximum(equal, _largest(arrays["q"])), usual)
    reference = np.where(reference > 0.0, reference, np.where(np.isfinite(least), least, 0.0))
    kept = np.max(np.where(there & (sizes <= HUGE * reference), sizes, 0.0), axis=1, keepdims=True)
    found = np.maximum(equal, kept)
    return np.where(found > 0.0, found, reference)


@dataclass
class _Solved:
    """What a plain backward pass needs.

    Attributes:
        prepared: the program.
        solution: its solution.
        scale: (B, 1) or (1, 1) what limits and q were divided by, None for 1.
    """

    prepared: Prepared
    solution: Solution
    scale: FloatArray | None

    def pullback(
        self, cotangents: Sequence[Tensor | None], wanted: Mapping[str, bool], shared: Mapping[str, bool]
    ) -> dict[str, FloatArray | None]:
        """Return the gradients of the parameters by name."""
        arrays = [None if cotangent is None else as_array(cotangent) for cotangent in cotangents]
        if self.scale is None:
            return self.prepared.pullback(self.solution, arrays, wanted, shared)
        arrays = [None if array is None else array * self.scale for array in arrays]
        whole = len(self.scale) > 1
        single = {name: shared[name] and not (whole and name in _LIMITS) for name in NAMES}
        found = self.prepared.pullback(self.solution, arrays, wanted, single)
        for name in _LIMITS:
            gradient = found.get(name)
            if gradient is not None:
                gradient = gradient / (self.scale if gradient.ndim == 2 else self.scale[0])
                found[name] = gradient.sum(axis=0) if shared[name] and not single[name] else gradient
        return found


def _names(prepared: Prepared, solution: Solution) -> dict[int, list[str]]:
    """Return what a message names: the rows of an infeasible item that conflict, the variables that run off."""
    return prepared.layer.conflicts(solution) | prepared.ray_names(solution)


def _solve_values(settings: Settings, data: Data) -> tuple[tuple[Tensor, ...], _Solved | None]:
    """Solve; return what :func:`solve` does, and what a plain backward pass needs."""
    n, p, m = data.sizes
    batch = data.batch
    if batch == 0:
        new = data.q.new_empty
        parts = (new(0, n), new(0, p), new(0, m), new(0, n), new(0, n), new(0, dtype=torch.int8), new(0, 1))
        return (*parts, new(0, dtype=torch.bool), new(0, m + 2 * n, dtype=torch.bool)), None
    tensors = {name: tensor for name, tensor in zip(NAMES, data.tensors, strict=True) if tensor is not None}
    arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
    unit = _unit(arrays)
    scaled = bool((unit != 1.0).any())
    constants = settings.constants
    if scaled:
        constants = tuple(name for name in constants if name not in _LIMITS)
        arrays |= {name: arrays[name] / unit for name in _LIMITS if name in arrays}
    structure = data.structure(settings, constants)
    places = tuple(tensors[name].data_ptr() for name in structure.constants)
    prepared = CACHE.get(structure, places, {name: arrays[name] for name in structure.constants})
    parameters = [arrays[name].reshape(len(arrays[name]), structure.size(name)) for name in structure.parameters]
    options = Options(settings.tolerance, settings.jacobian)
    batched = [name not in settings.once for name in structure.parameters]
    solution = prepared.layer.solve(parameters, options, "nan", None, batched)
    if settings.strict and np.any(solution.status != Status.SOLVED):
        raise SolveError(failure_message(solution.status, _names(prepared, solution)), solution.status)
    found = prepared.outputs(solution)
    if scaled:
        found = [array * unit for array in found]
    rest = (solution.status, unit.repeat(batch // len(unit), 0), solution.non_unique)
    outputs = [torch.from_numpy(array) for array in (*found, *rest)]
    held = prepared.active(solution) if settings.jacobian == "support" else np.zeros((batch, m + 2 * n), dtype=bool)
    outputs.append(torch.from_numpy(held))
    if data.q.device.type != "cpu":
        outputs = [output.to(data.q.device) for output in outputs]
    return tuple(outputs), _Solved(prepared, solution, unit if scaled else None)


def _solved_again(settings: Settings, data: Data, items: IndexArray) -> _Solved | None:
    """Solve some items for what their solution says; None without items."""
    if not len(items):
        return None
    return _solve_values(replace(settings, strict=False), data.take(torch.from_numpy(items)))[1]


def certificates(settings: Settings, data: Data, items: IndexArray) -> dict[int, list[FloatArray]]:
    """Return what shows that items have no optimum (:meth:`Prepared.certificate`), where it is known."""
    found: dict[int, list[FloatArray]] = {}
    solved = _solved_again(settings, data, items)
    if solved is not None:
        for place, item in enumerate(items):
            certificate = solved.prepared.certificate(solved.solution, place)
            if certificate is not None:
                found[int(item)] = certificate
    return found


def names(settings: Settings, data: Data, items: IndexArray) -> dict[int, list[str]]:
    """Return what a message about failing items names."""
    solved = _solved_again(settings, data, items)
    found = {} if solved is None else _names(solved.prepared, solved.solution)
    return {int(items[place]): words for place, words in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Wrappings: as in hsbackend.operators
# ----------------------------------------------------------------------------------------------------------------------


def _save(ctx: Any, settings: Settings, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(*outputs[5:])
    ctx.set_materialize_grads(False)
    ctx.settings = settings
    ctx.save_for_backward(*tensors, *outputs)
    ctx.save_for_forward(*tensors, *outputs)


def _saved(ctx: Any, tensors: Sequence[Any] | None = None) -> tuple[Settings, Data, Sequence[Tensor]]:
    saved = ctx.saved_tensors if tensors is None else tensors
    return ctx.settings, Data(*saved[:8]), saved[8:]


class _Solve(torch.autograd.Function):
    """The program outside of transforms."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Tensors in the order of ``NAMES``."""
        outputs, ctx.solved = _solve_values(settings, Data(*tensors))  # pyright: ignore[reportArgumentType]
        _save(ctx, settings, tensors, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Use the solver's own factorisation unless somebody differentiates again."""
        settings, data, outputs = _saved(ctx)  # raises if a tensor was changed in place since the forward pass
        given, needs = cotangents[:5], ctx.needs_input_grad[1:]
        batched = any(cotangent is not None and is_legacy_batchedtensor(cotangent) for cotangent in given)
        if ctx.solved is None or batched or not values_only():
            return (None, *cotangent(settings, data, outputs, needs, given))
        shared = {
            name: tensor is not None and tensor.shape[0] == 1 for name, tensor in zip(NAMES, data.tensors, strict=True)
        }
        gradients = ctx.solved.pullback(given, dict(zip(NAMES, needs, strict=True)), shared)
        found: list[Tensor | None] = []
        for name, tensor in zip(NAMES, data.tensors, strict=True):
            gradient = gradients.get(name)
            found.append(
                None
                if gradient is None or tensor is None
                else torch.from_numpy(gradient).reshape(tensor.shape).to(tensor.device)
            )
        return (None, *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        return (*tangent(*_saved(ctx), tangents[1:]), None, None, None, None)


class _SolveTransformed(torch.autograd.Function):
    """The program inside of ``torch.func`` transforms."""

    @staticmethod
    def forward(
        settings: Settings, Q: Tensor | None, q: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None,
        h: Tensor | None, lower: Tensor | None, upper: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Tensors in the order of ``NAMES``."""
        return _solve_values(settings, Data(Q, q, A, b, G, h, lower, upper))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save for both modes: a transform may ask for either."""
        _save(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        with outer_tangents():
            return (*tangent(*_saved(ctx, primals(ctx.saved_tensors)), tangents[1:]), None, None, None, None)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        return (None, *cotangent(*_saved(ctx), ctx.needs_input_grad[1:], cotangents[:5]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped axis into the batch; a mapped constant becomes a parameter, failing items are NaN."""
        return _mapped(inputs[0], info.batch_size, in_dims[1:], inputs[1:]), (0,) * 9


def _mapped(settings: Settings, size: int, dims: Sequence[Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Solve with the mapped axis folded into the batch; what is mapped is no constant."""
    constants = tuple(name for name, dim in zip(NAMES, dims, strict=True) if dim is None and name in settings.constants)
    tensors = [
        tensor if tensor is None or name in constants else tensor.to(torch.float64)
        for name, tensor in zip(NAMES, fold(size, inputs, dims), strict=True)
    ]
    outputs = solve(replace(settings, strict=False, constants=constants), Data(*tensors))  # pyright: ignore[reportArgumentType]
    return unfold(size, outputs)


@torch.library.custom_op("hsbackend::qp_solve", mutates_args=())
def _solve_op(
    tolerance: float, jacobian: str, constants: str, identity: bool, Q: Tensor | None, q: Tensor, A: Tensor | None,
    b: Tensor | None, G: Tensor | None, h: Tensor | None, lower: Tensor | None, upper: Tensor | None,
) -> Outputs:  # fmt: skip
    data = Data(Q, q, A, b, G, h, lower, upper)
    return _as_outputs(_solve_values(_settings(tolerance, jacobian, constants, identity), data)[0])


def _as_outputs(outputs: Sequence[Tensor]) -> Outputs:
    x, y, z, z_lower, z_upper, status, unit, non_unique, held = outputs
    return x, y, z, z_lower, z_upper, status, unit, non_unique, held


def _settings(tolerance: float, jacobian: str, constants: str, identity: bool) -> Settings:
    """Return the settings from what an operator can be given; it cannot raise."""
    choice = "support" if jacobian == "support" else "active"
    return Settings(tolerance, choice, False, tuple(constants.split()), identity)


@_solve_op.register_fake
def _(
    tolerance: float, jacobian: str, constants: str, identity: bool, Q: Tensor | None, q: Tensor, A: Tensor | None,
    b: Tensor | None, G: Tensor | None, h: Tensor | None, lower: Tensor | None, upper: Tensor | None,
) -> Outputs:  # fmt: skip
    data = Data(Q, q, A, b, G, h, lower, upper)
    n, p, m = data.sizes
    batch = data.batch
    return (
        q.new_empty(batch, n), q.new_empty(batch, p), q.new_empty(batch, m), q.new_empty(batch, n),
        q.new_empty(batch, n), q.new_empty(batch, dtype=torch.int8), q.new_empty(batch, 1),
        q.new_empty(batch, dtype=torch.bool), q.new_empty(batch, m + 2 * n, dtype=torch.bool),
    )  # fmt: skip


def _solve_op_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tolerance, jacobian, constants, identity, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.settings = _settings(tolerance, jacobian, constants, identity)
    ctx.save_for_backward(*tensors, *output)


def _solve_op_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    return (None, None, None, None, *cotangent(*_saved(ctx), ctx.needs_input_grad[4:], cotangents[:5]))


_solve_op.register_autograd(_solve_op_backward, setup_context=_solve_op_setup)


@_solve_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _mapped(_settings(*inputs[:4]), info.batch_size, in_dims[4:], inputs[4:]), (0,) * 9


def solve(settings: Settings, data: Data) -> Outputs:
    """Solve a batch of programs; differentiable in every tensor that is not a constant.

    Returns:
        x (B, n), the multipliers of A (B, p), G (B, m), lower (B, n) and upper (B, n), the status (B,), the unit (B, 1)
        in which tolerances are measured, whether there are other optima (B,), and, for ``jacobian="support"``, the
        rows of G, lower and upper bounds in the solver's K (B, m + 2n).

    Raises:
        SolveError: if ``settings.strict`` and an item has no solution; under ``vmap`` and ``torch.compile`` it is NaN.
        UnsupportedProblemError: if no solver of the library takes the program.
    """
    if torch.compiler.is_compiling():
        constants = " ".join(settings.constants)
        return _solve_op(settings.tolerance, settings.jacobian, constants, settings.identity, *data.tensors)
    if transforms_active():
        return _SolveTransformed.apply(settings, *data.tensors)
    if values_only():
        return _as_outputs(_solve_values(settings, data)[0])
    return _Solve.apply(settings, *data.tensors)
