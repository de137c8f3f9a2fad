"""Launch of the kernels of :mod:`hsbackend.families.budget` and :mod:`hsbackend.families.l1`.

Rows of up to :data:`LONGEST` coordinates stay in registers: one read of the data, one write of the results, whatever
the number of Newton steps; short rows share a program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from hsbackend.cuda._budget_kernels import budget_kkt, budget_solve
from hsbackend.cuda._launch import empty, launch, next_power, rows_of
from hsbackend.families.family import Choice

if TYPE_CHECKING:
    from torch import Tensor

#: Longest row a program holds.
LONGEST: Final = 8192
#: Entries of a program's tile where rows are short, 4 per thread: with more, the state of the rows spills.
_TILE: Final = 256
_ALLOWANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-5}


def tile_of(n: int) -> dict[str, int]:
    """Return rows and columns of a tile, and warps; the same for every batch, or sums would round differently."""
    block = next_power(min(n, LONGEST))
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": 16 if block > 4096 else min(8, rows * block // 128)}


def solve(
    point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, shape: tuple[int, ...], choice: Choice, l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project; arguments and results as in :func:`hsbackend.families.budget.solve`, with ``l1`` as in ``l1.solve``."""
    batch, n = point.shape
    primal, multipliers = empty((batch, n), point.dtype, point), empty((batch, 1), point.dtype, point)
    face, status = empty((batch, n + 1), torch.int8, point), empty((batch,), torch.int8, point)
    if batch == 0:
        return primal, multipliers, face, status
    tensors: list[Any] = []
    strides: list[int] = []
    for tensor in (point, weight, coefficients, rhs, lower, upper):
        values, stride = rows_of(tensor, point)
        tensors.append(values)
        strides.append(stride)
    options = tile_of(n)
    launch(
        budget_solve, -(-batch // options["ROWS"]), *tensors, primal, multipliers, face, status, batch, n, *strides,
        _ALLOWANCE[point.dtype],
        WEIGHTED=weight is not None, WITH_COEFFICIENTS=coefficients is not None, WITH_LOWER=lower is not None,
        CAPPED=upper is not None, L1=l1, SUPPORT=choice == "support", **options,
    )  # fmt: skip
    return primal, multipliers, face, status


def kkt(
    face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs_primal: Tensor,
    rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...], l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve on a face; as :func:`hsbackend.families.budget.kkt`, with ``l1`` as ``l1.kkt``; rows of any length."""
    batch, n = rhs_primal.shape
    u, wb = empty((batch, n), primal.dtype, primal), empty((batch, n), primal.dtype, primal)
    w = empty((batch, 1), primal.dtype, primal)
    if batch == 0:
        return u, w, wb
    tensors: list[Any] = []
    strides: list[int] = []
    for tensor in (primal, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds):
        values, stride = rows_of(tensor, primal)
        tensors.append(values)
        strides.append(stride)
    options = tile_of(n)
    launch(
        budget_kkt, -(-batch // options["ROWS"]), face.contiguous(), *tensors, u, w, wb, batch, n, *strides,
        WEIGHTED=weight is not None, WITH_COEFFICIENTS=coefficients is not None, WITH_ROWS=rhs_rows is not None,
        WITH_BOUNDS=rhs_bounds is not None, L1=l1, SINGLE=n <= LONGEST, **options,
    )  # fmt: skip
    return u, w, wb
