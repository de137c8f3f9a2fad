"""Launch of the kernels of :mod:`hsbackend.families.monotone`: chains of any length, one lane each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from hsbackend.cuda._launch import empty, launch, rows_of
from hsbackend.cuda._monotone_kernels import monotone_kkt, monotone_solve
from hsbackend.families.family import Choice

if TYPE_CHECKING:
    from torch import Tensor

#: Chains of a program: one per lane of its one warp, which is what lets a lane keep a stack in device memory.
LANES: Final = 32
_ALLOWANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-5}


def _prepare(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[list[Any], list[int]]:
    pairs = [rows_of(tensor, like) for tensor in tensors]
    return [values for values, _ in pairs], [stride for _, stride in pairs]


def solve(
    point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, shape: tuple[int, ...], choice: Choice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project; arguments and results as in :func:`hsbackend.families.monotone.solve`. Needs 28 bytes per entry."""
    batch, n = point.shape
    primal, multipliers = empty((batch, n), point.dtype, point), empty((batch, 2), point.dtype, point)
    face, status = empty((batch, n + 2), torch.int32, point), empty((batch,), torch.int8, point)
    if batch == 0:
        return primal, multipliers, face, status
    tensors, strides = _prepare((point, weight, rhs), point)
    programs = -(-batch // LANES)
    stack_stride = programs * LANES
    stack = [empty((n, stack_stride), torch.float64, point) for _ in range(3)]
    launch(
        monotone_solve, programs, *tensors, primal, multipliers, face, status,
        *stack, empty((n + 1, stack_stride), torch.int32, point),
        batch, n, *strides, stack_stride, _ALLOWANCE[point.dtype],
        WEIGHTED=weight is not None, SUPPORT=choice == "support", LANES=LANES, num_warps=1, num_stages=1,
    )  # fmt: skip
    return primal, multipliers, face, status


def kkt(
    face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs_primal: Tensor,
    rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve on a face; arguments and results as in :func:`hsbackend.families.monotone.kkt`."""
    batch, n = rhs_primal.shape
    u, wb = empty((batch, n), primal.dtype, primal), empty((batch, n), primal.dtype, primal)
    w = empty((batch, 2), primal.dtype, primal)
    if batch == 0:
        return u, w, wb
    tensors, strides = _prepare((primal, weight, rhs_primal, rhs_rows), primal)
    launch(
        monotone_kkt, -(-batch // LANES), face.contiguous(), *tensors, u, w, wb, batch, n, *strides,
        WEIGHTED=weight is not None, WITH_ROWS=rhs_rows is not None, LANES=LANES, num_warps=1, num_stages=1,
    )  # fmt: skip
    return u, w, wb
