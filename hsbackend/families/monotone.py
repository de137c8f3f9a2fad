"""Monotone chains with bounds (isotonic regression): projection and the KKT solve on a face.

    minimise  1/2 sum_j h_j (x_j - v_j)^2   subject to   low <= x_1 <= x_2 <= ... <= x_n <= high

The solution is constant on blocks: the weighted mean of v, clipped. Two rows have multipliers: ``x_1 >= low`` with
``nu_0 = sum h (v - x) <= 0`` over the first block if it is held there, and ``x_n <= high`` with ``nu_1 >= 0``, the same
over the last; the rows of the chain have none here. A face is the blocks and whether the first and the last are held:

    u = sum g / sum h over a free block,   u = r_0, w_0 = sum (g - h r_0) over a held first block, and so on.

Method and sources: :mod:`hsbackend.families._monotone_kernels`; ``monotone_naive`` is the twin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsbackend._parallel import for_each_item
from hsbackend.families._monotone_kernels import monotone_items, monotone_kkt_items
from hsbackend.families.family import ALLOWANCE, Choice, FamilyKKT, FamilySolution, Values, present
from hsbackend.status import UnsupportedProblemError


def solve(
    point: Values, weight: Values | None, coefficients: Values | None, rhs: Values,
    lower: Values | None, upper: Values | None, shape: tuple[int, ...], choice: Choice,
) -> FamilySolution:  # fmt: skip
    """Project onto ``{low <= x_1 <= ... <= x_n <= high}``.

    Args:
        point: (B, n) v, finite.
        weight: (1 or B, n) h > 0, None for ones.
        coefficients: None.
        rhs: (1 or B, 2) low and high, infinities allowed.
        lower: None.
        upper: None.
        shape: (n,).
        choice: "active" makes neighbours of equal value one block and holds a block that touches a bound; "support"
            ties and holds only what a positive multiplier ties and holds.

    Returns:
        Multipliers (B, 2) of ``x_1 >= low`` (never positive) and ``x_n <= high`` (never negative). The face is int32
        (B, n + 2): block of each coordinate from 0 upwards, then whether the first block is held at low and the last
        at high. With low == high there is one block, held twice.

    Raises:
        UnsupportedProblemError: coefficients or bounds per coordinate were given.

    Notes:
        O(n).
    """
    if coefficients is not None or lower is not None or upper is not None:
        raise UnsupportedProblemError(
            "coefficients or bounds per coordinate were given with a monotone chain; pass None, its bounds are `rhs`"
        )
    batch, n = point.shape
    dtype = point.dtype
    out = FamilySolution.empty(point, 2, n + 2, np.int32)
    for_each_item(
        monotone_items, batch, 20.0 * n, point, present(weight, dtype), present(rhs, dtype), choice == "support",
        ALLOWANCE[dtype], out.primal, out.multipliers, out.face, out.status,
    )  # fmt: skip
    return out


def kkt(
    face: NDArray[Any], primal: Values, weight: Values | None, coefficients: Values | None,
    rhs_primal: Values, rhs_rows: Values | None, rhs_bounds: Values | None, shape: tuple[int, ...],
) -> FamilyKKT:  # fmt: skip
    """Solve the KKT system on a face.

    Args:
        face: (B, n + 2) from :func:`solve`.
        primal: not used.
        weight: as in :func:`solve`.
        coefficients: None.
        rhs_primal: (B, n) g.
        rhs_rows: (B, 2) r, None for zero; entries of rows that do not hold are ignored. A block held twice uses the
            first.
        rhs_bounds: ignored, no coordinate has a bound of its own.
        shape: (n,).

    Returns:
        ``bounds`` is zero.
    """
    batch, n = rhs_primal.shape
    dtype = rhs_primal.dtype
    out = FamilyKKT.empty(rhs_primal, 2)
    for_each_item(
        monotone_kkt_items, batch, 5.0 * n, face, present(weight, dtype), np.ascontiguousarray(rhs_primal),
        present(rhs_rows, dtype), out.primal, out.rows,
        out.bounds,
    )  # fmt: skip
    return out
