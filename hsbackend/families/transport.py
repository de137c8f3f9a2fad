"""Transport polytopes, the doubly stochastic matrices among them: projection and the KKT solve on a face.

    minimise  1/2 sum_ij h_ij (X_ij - V_ij)^2   subject to  X >= 0,  X 1 = rhs[:k1],  X'1 = rhs[k1:]

    X = max(V - (a_i + b_j)/h_ij, 0),   nu = (a, b)

A face says which entries are free; on it, with M_ij = 1/h_ij on free entries and 0 elsewhere,

    [Diag(M 1)  M; M'  Diag(M'1)] [a; b] = [(M*g) 1 - r_1; (M*g)'1 - r_2],    u = M * (g - a 1' - 1 b'),

which is singular, with one null vector (1, -1) per connected component of the free entries; (a, b) is the solution of
least norm.

Method and sources: :mod:`hsbackend.families._transport_kernels`; ``transport_naive`` is the twin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsbackend._parallel import for_each_item
from hsbackend.families._transport_kernels import transport_items, transport_kkt_items
from hsbackend.families.family import ALLOWANCE, Choice, FamilyKKT, FamilySolution, Values, present
from hsbackend.status import UnsupportedProblemError


def solve(
    point: Values, weight: Values | None, coefficients: Values | None, rhs: Values,
    lower: Values | None, upper: Values | None, shape: tuple[int, ...], choice: Choice,
) -> FamilySolution:  # fmt: skip
    """Project onto ``{X >= 0, X 1 = rhs[:k1], X'1 = rhs[k1:]}``.

    Args:
        point: (B, k1 k2) V by rows; ``-inf`` forbids an entry.
        weight: (1 or B, k1 k2) h > 0, None for ones.
        coefficients: None.
        rhs: (1 or B, k1 + k2) row sums, then column sums.
        lower: None.
        upper: None.
        shape: (k1, k2).
        choice: "active" holds the entries that are zero, "support" those with a positive multiplier.

    Returns:
        Multipliers (a, b) with ``sum a = sum b``; face int8 (B, k1 k2), 1 free, 0 held at zero.

    Raises:
        UnsupportedProblemError: coefficients or bounds were given.

    Notes:
        About ten Newton steps of ``k1 k2 min(k1, k2)`` multiply-adds at most, less as the support gets sparse. Sums of
        marginals that differ by rounding are both moved to their mean.
    """
    if coefficients is not None or lower is not None or upper is not None:
        raise UnsupportedProblemError(
            "coefficients or bounds were given with a transport polytope, which has X >= 0 only; pass None"
        )
    k1, k2 = shape
    batch = len(point)
    dtype = point.dtype
    out = FamilySolution.empty(point, k1 + k2, k1 * k2, np.int8)
    for_each_item(
        transport_items, batch, 40.0 * k1 * k2 + 5.0 * k1 * k2 * min(k1, k2), point, present(weight, dtype),
        present(rhs, dtype), k1, k2, choice == "support", ALLOWANCE[dtype], out.primal, out.multipliers,
        out.face, out.status,
    )  # fmt: skip
    return out


def kkt(
    face: NDArray[Any], primal: Values, weight: Values | None, coefficients: Values | None,
    rhs_primal: Values, rhs_rows: Values | None, rhs_bounds: Values | None, shape: tuple[int, ...],
) -> FamilyKKT:  # fmt: skip
    """Solve the KKT system on a face.

    Args:
        face: (B, k1 k2) from :func:`solve`.
        primal: not used.
        weight: as in :func:`solve`.
        coefficients: None.
        rhs_primal: (B, k1 k2) g.
        rhs_rows: (B, k1 + k2) r, None for zero. Where a component of the free entries cannot meet it (its rows and its
            columns ask for different sums) the nearest r it can meet is used.
        rhs_bounds: (B, k1 k2), None for zero; read on held entries.
        shape: (k1, k2).

    Returns:
        ``rows`` is the (a, b) of least norm.
    """
    k1, k2 = shape
    batch = len(rhs_primal)
    dtype = rhs_primal.dtype
    out = FamilyKKT.empty(rhs_primal, k1 + k2)
    for_each_item(
        transport_kkt_items, batch, 30.0 * k1 * k2 + 0.5 * k1 * k2 * min(k1, k2), face, present(weight, dtype),
        np.ascontiguousarray(rhs_primal), present(rhs_rows, dtype), present(rhs_bounds, dtype), k1, k2,
        out.primal, out.rows, out.bounds,
    )  # fmt: skip
    return out
