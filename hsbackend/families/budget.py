"""Projection onto a box with one row, the simplex among them, and the KKT solve on its face.

    minimise   1/2 sum_j h_j (x_j - v_j)^2    subject to   lower <= x <= upper,   low <= c'x <= high.

The solution is ``x = clip(v - nu c/h, lower, upper)``; the multiplier nu of the row is the root of a piecewise linear
function, found by Newton's method inside a bracket and corrected on the free coordinates. O(n) per step, no sorting;
typically three to six steps.

On a face with free coordinates F and the row active,

    w = (sum_F c_j g_j / h_j + sum_held c_j r_j - r) / sum_F c_j^2 / h_j,        u_F = (g - c w)_F / h_F.

Sources: Michelot (1986); Cominetti, Mascarenhas and Silva (2014). The compiled loops, with full references, are in
``_budget_kernels``; ``budget_naive`` is the twin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsbackend._parallel import for_each_item
from hsbackend.families._budget_kernels import budget_items, budget_kkt
from hsbackend.families.family import ALLOWANCE, Choice, FamilyKKT, FamilySolution, Values, present


def solve(
    point: Values, weight: Values | None, coefficients: Values | None, rhs: Values,
    lower: Values | None, upper: Values | None, shape: tuple[int, ...], choice: Choice,
) -> FamilySolution:  # fmt: skip
    """Project on ``{lower <= x <= upper, low <= c'x <= high}``.

    Args:
        point: (B, n) v. Entries -inf are allowed where ``lower`` is finite (x is there), inf where ``upper`` is.
        weight: (1 or B, n) h > 0, None for ones.
        coefficients: (1 or B, n) c, of any sign, zeros too; None for ones.
        rhs: (1 or B, 2) low and high, -inf and inf for an open side; equal numbers make an equation.
        lower: (1 or B, n), None or -inf where there is none.
        upper: (1 or B, n), None or inf where there is none.
        shape: (n,).
        choice: which K of the Han-Sun set the face holds.

    Returns:
        One multiplier per item, positive where the high side holds x back, negative for the low side. At a vertex,
        where it is not unique, the value nearest to zero. The face is int8 (B, n + 1): per coordinate 0 free, 1 held at
        upper (also where both bounds agree), -1 held at lower; last the row: 0 slack, 1 held at high, -1 held at low,
        for an equation the sign of the multiplier, 1 if zero. "Held" is decided to rounding, within 16 eps of the
        data.
    """
    batch, n = point.shape
    dtype = point.dtype
    out = FamilySolution.empty(point, 1, n + 1, np.int8)
    work = (4.0 if weight is None and coefficients is None and upper is None else 15.0) * n
    for_each_item(
        budget_items, batch, work, point, present(weight, dtype), present(coefficients, dtype),
        present(rhs, dtype), present(lower, dtype), present(upper, dtype), choice == "support", ALLOWANCE[dtype],
        out.primal, out.multipliers, out.face, out.status,
    )  # fmt: skip
    return out


def kkt(
    face: NDArray[Any], primal: Values, weight: Values | None, coefficients: Values | None,
    rhs_primal: Values, rhs_rows: Values | None, rhs_bounds: Values | None, shape: tuple[int, ...],
) -> FamilyKKT:  # fmt: skip
    """Solve the KKT system on a face.

    Args:
        face: (B, n + 1) from :func:`solve`.
        primal: not used.
        weight: as in :func:`solve`.
        coefficients: as in :func:`solve`.
        rhs_primal: (B, n) g.
        rhs_rows: (B, 1) r, None for zero; ignored where the row is slack.
        rhs_bounds: (B, n) r of held coordinates, None for zero; ignored on free coordinates.
        shape: (n,).

    Returns:
        u, w and wb. Where the row is active and no free coordinate is in it, the row says nothing new and w = 0.
    """
    batch, n = rhs_primal.shape
    dtype = rhs_primal.dtype
    out = FamilyKKT.empty(rhs_primal, 1)
    for_each_item(
        budget_kkt, batch, 2.0 * n, face, present(weight, dtype), present(coefficients, dtype),
        np.ascontiguousarray(rhs_primal), present(rhs_rows, dtype), present(rhs_bounds, dtype), out.primal, out.rows,
        out.bounds,
    )  # fmt: skip
    return out
