"""Projection onto the weighted l1 ball, and the KKT solve on its face.

    minimise   1/2 sum_j h_j (x_j - v_j)^2    subject to   sum_j c_j |x_j| <= r,        c > 0.

With ``y = |x|`` this is a budget (:mod:`hsbackend.families.budget`) on ``|v|`` with ``y >= 0``, and ``x = sign(v) y``
(Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient projections onto the l1-ball for learning in high dimensions",
2008). On a face with signs s the row is ``c_j s_j``. The compiled loops are in ``_budget_kernels``; ``l1_naive`` is the
twin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsbackend._parallel import for_each_item
from hsbackend.families._budget_kernels import l1_items, l1_kkt
from hsbackend.families.family import ALLOWANCE, Choice, FamilyKKT, FamilySolution, Values, present
from hsbackend.status import UnsupportedProblemError


def solve(
    point: Values, weight: Values | None, coefficients: Values | None, rhs: Values,
    lower: Values | None, upper: Values | None, shape: tuple[int, ...], choice: Choice,
) -> FamilySolution:  # fmt: skip
    """Project on ``{sum_j c_j |x_j| <= r}``.

    Args:
        point: (B, n) v, finite.
        weight: (1 or B, n) h > 0, None for ones.
        coefficients: (1 or B, n) c > 0, None for ones.
        rhs: (1 or B, 1) r >= 0; a negative r is infeasible.
        lower: None.
        upper: None.
        shape: (n,).
        choice: which K of the Han-Sun set the face holds; it also decides for a point on the sphere with multiplier
            zero, where "active" has the row tight and "support" has it slack.

    Returns:
        One multiplier nu >= 0 per item. The face is int8 (B, n + 1): per coordinate the sign of x, last the row: 1
        tight, and then coordinates of sign 0 are held at zero; 0 slack, and then every coordinate is free. With
        "active" a coordinate within rounding of zero has sign 0, with "support" one that just reaches zero, without a
        multiplier of its own, keeps the sign of v.

    Raises:
        UnsupportedProblemError: if bounds are given.
    """
    if lower is not None or upper is not None:
        raise UnsupportedProblemError(
            "bounds were given with the l1 ball, which is projected on without; pass None for `lower` and `upper`"
        )
    batch, n = point.shape
    dtype = point.dtype
    out = FamilySolution.empty(point, 1, n + 1, np.int8)
    work = (4.0 if weight is None and coefficients is None else 15.0) * n
    for_each_item(
        l1_items, batch, work, point, present(weight, dtype), present(coefficients, dtype), present(rhs, dtype),
        choice == "support", ALLOWANCE[dtype], out.primal, out.multipliers, out.face, out.status,
    )  # fmt: skip
    return out


def kkt(
    face: NDArray[Any], primal: Values, weight: Values | None, coefficients: Values | None,
    rhs_primal: Values, rhs_rows: Values | None, rhs_bounds: Values | None, shape: tuple[int, ...],
) -> FamilyKKT:  # fmt: skip
    """Solve the KKT system on a face, with the row ``(c_j sign(x_j))_j``.

    Args:
        face: (B, n + 1) from :func:`solve`; the signs are read from it.
        primal: not used.
        weight: as in :func:`solve`.
        coefficients: as in :func:`solve`.
        rhs_primal: (B, n) g.
        rhs_rows: (B, 1) r, None for zero; ignored where the row is slack.
        rhs_bounds: (B, n) r of coordinates held at zero, None for zero; ignored elsewhere.
        shape: (n,).

    Returns:
        u, w and wb; w = 0 where the row is tight and every coordinate is held.
    """
    batch, n = rhs_primal.shape
    dtype = rhs_primal.dtype
    out = FamilyKKT.empty(rhs_primal, 1)
    for_each_item(
        l1_kkt, batch, 2.0 * n, face, present(weight, dtype), present(coefficients, dtype),
        np.ascontiguousarray(rhs_primal), present(rhs_rows, dtype), present(rhs_bounds, dtype), out.primal, out.rows,
        out.bounds,
    )  # fmt: skip
    return out
