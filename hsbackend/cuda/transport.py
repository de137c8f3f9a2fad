"""Launch of the kernels of :mod:`hsbackend.families.transport`.

Matrices of up to :data:`LARGEST` lines a side stay in registers: many per program where they are small.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

from hsbackend.cuda._launch import empty, launch, next_power, rows_of
from hsbackend.cuda._transport_kernels import transport_kkt, transport_solve
from hsbackend.families.family import Choice

if TYPE_CHECKING:
    from torch import Tensor

#: Most rows or columns of a matrix that a program holds.
LARGEST: Final = 64
#: Entries of a program's tile where matrices are small.
_TILE: Final = 256
_ALLOWANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-5}


def tile_of(shape: tuple[int, ...]) -> dict[str, int]:
    """Return matrices per tile, its rows and columns, and warps; the same for every batch."""
    r, c = next_power(max(shape)), next_power(min(shape))
    m = max(1, _TILE // (r * c))
    return {"M": m, "R": r, "C": c, "num_warps": max(1, m * r * c // 256)}


def needs_ones(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether ones are handed over where there are no weights.

    Without, Triton 3.6 fails on these tiles (layout conversions around loops), found by compiling every tile.
    """
    return dtype == torch.float64 and min(shape) > 8


@cache
def _ones(n: int, device: torch.device) -> Tensor:
    return torch.ones((1, n), dtype=torch.float64, device=device)


def layout_of(shape: tuple[int, ...]) -> dict[str, int]:
    """Return rows, columns, their strides in an item and where their multipliers begin; rows are the longer side."""
    k1, k2 = shape
    names = ("rows", "columns", "row_stride", "column_stride", "row_first", "column_first")
    values = (k2, k1, 1, k2, k1, 0) if k1 < k2 else (k1, k2, k2, 1, 0, k1)
    return dict(zip(names, values, strict=True))


def _prepare(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[list[Any], list[int]]:
    pairs = [rows_of(tensor, like) for tensor in tensors]
    return [values for values, _ in pairs], [stride for _, stride in pairs]


def solve(
    point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, shape: tuple[int, ...], choice: Choice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project; arguments and results as in :func:`hsbackend.families.transport.solve`."""
    batch, n = point.shape
    m = shape[0] + shape[1]
    primal, multipliers = empty((batch, n), point.dtype, point), empty((batch, m), point.dtype, point)
    face, status = empty((batch, n), torch.int8, point), empty((batch,), torch.int8, point)
    if batch == 0:
        return primal, multipliers, face, status
    ones = weight is None and needs_ones(shape, point.dtype)
    tensors, strides = _prepare((point, _ones(n, point.device) if ones else weight, rhs), point)
    options = tile_of(shape)
    launch(
        transport_solve, -(-batch // options["M"]), *tensors, primal, multipliers, face, status, batch, *strides,
        _ALLOWANCE[point.dtype], WEIGHTED=weight is not None or ones, ONES=ones, SUPPORT=choice == "support",
        **layout_of(shape), **options,
    )  # fmt: skip
    return primal, multipliers, face, status


def kkt(
    face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs_primal: Tensor,
    rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve on a face; arguments and results as in :func:`hsbackend.families.transport.kkt`."""
    batch, n = rhs_primal.shape
    u, wb = empty((batch, n), primal.dtype, primal), empty((batch, n), primal.dtype, primal)
    w = empty((batch, shape[0] + shape[1]), primal.dtype, primal)
    if batch == 0:
        return u, w, wb
    tensors, strides = _prepare((primal, weight, rhs_primal, rhs_rows, rhs_bounds), primal)
    options = tile_of(shape)
    launch(
        transport_kkt, -(-batch // options["M"]), face.contiguous(), *tensors, u, w, wb, batch, *strides,
        WEIGHTED=weight is not None, WITH_ROWS=rhs_rows is not None,
        WITH_BOUNDS=rhs_bounds is not None, **layout_of(shape), **options,
    )  # fmt: skip
    return u, w, wb
