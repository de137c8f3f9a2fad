"""Why a problem has no solution, in numbers that anybody can check.

    A x = b, G x <= h has no solution       if and only if   N'y = 0, y >= 0 on the rows of G, (b, h)'y < 0  has one
    1/2 x'Qx + q'x is unbounded below there  if and only if   Q d = 0, A d = 0, G d <= 0, q'd < 0             has one

and there is a feasible point in the second case. Both are linear programs over a box, which SciPy's HiGHS solves; what
it returns is checked against the data before it is given to anybody.

Source: Farkas' lemma; Boyd and Vandenberghe, "Convex Optimization" (2004), section 5.8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from hsbackend.program import FloatArray

#: What counts as zero, relative to the terms of a sum, and what as more than rounding.
_ZERO, _SOME = 1e-12, 1e-9
#: Curvature along a ray must be nothing but rounding: a small one ends the descent somewhere.
_FLAT = 4e-15


def _solve(cost: FloatArray, equal: Any, below: Any, box: list[tuple[float, float]]) -> FloatArray | None:
    """Minimise over a box; None when nothing better than zero is found."""
    arguments: dict[str, Any] = {"bounds": box, "method": "highs"}
    if equal is not None and equal.shape[0]:
        arguments |= {"A_eq": equal, "b_eq": np.zeros(equal.shape[0])}
    if below is not None and below.shape[0]:
        arguments |= {"A_ub": below, "b_ub": np.zeros(below.shape[0])}
    found: Any = linprog(cost, **arguments)
    return None if found.x is None or not found.fun < -1e-9 else np.asarray(found.x, dtype=np.float64)


def _unit_rows(matrix: Any) -> tuple[Any, FloatArray]:
    """Return the rows divided by their largest entry, and the divisors; empty rows have divisor one."""
    matrix = sp.csr_array(matrix)
    size = np.asarray(abs(matrix).max(axis=1).todense()).ravel() if matrix.shape[1] else np.zeros(matrix.shape[0])
    size = np.where(size > 0.0, size, 1.0)
    return sp.csr_array(sp.diags_array(1.0 / size) @ matrix), size


def _polish(matrix: Any, vector: FloatArray) -> FloatArray:
    """Return the nearest vector with the same zeros and ``matrix vector = 0``: HiGHS stops at 1e-7."""
    used = np.flatnonzero(vector)
    block = sp.csr_array(matrix)[:, used].toarray()
    polished = vector.copy()
    for _ in range(2):
        step, *_ = np.linalg.lstsq(block, block @ polished[used], rcond=1e-12)
        polished[used] -= step
    return polished


def _vanishes(matrix: Any, vector: FloatArray, zero: float = _ZERO) -> bool:
    """Whether a product is zero, relative to its terms."""
    terms = abs(sp.csr_array(matrix)) @ np.abs(vector)
    return bool(np.all(np.abs(matrix @ vector) <= zero * np.maximum(terms, np.abs(vector).max(initial=0.0) * 1e-9)))


def farkas(matrix: Any, rhs: FloatArray, num_equalities: int) -> FloatArray | None:
    """Find multipliers that show that ``A x = b, G x <= h`` has no solution.

    Args:
        matrix: (m, n) dense or sparse, equalities first.
        rhs: (m,); infinite where there is no such row.
        num_equalities: number of equality rows.

    Returns:
        (m,) y with ``matrix'y = 0`` and ``rhs'y < 0``, non-negative on inequalities, largest entry 1; None if there is
        no such y that passes the check.
    """
    matrix = sp.csr_array(matrix)
    there = np.isfinite(rhs)
    if not there.any():
        return None
    scaled, size = _unit_rows(matrix[there])
    limits = rhs[there] / size
    unit = float(np.abs(limits).max(initial=0.0))
    equality = (np.arange(len(rhs)) < num_equalities)[there]
    box = [(-1.0, 1.0) if equal else (0.0, 1.0) for equal in equality]
    found = _solve(limits / unit if unit > 0.0 else limits, _unit_rows(scaled.T)[0], None, box)
    if found is None:
        return None
    found = _polish(scaled.T, np.where(np.abs(found) <= _SOME, 0.0, found))
    fits = bool(np.all(found[~equality] >= 0.0)) and _vanishes(scaled.T, found)
    if not fits or not limits @ found < -_SOME * (np.abs(limits) @ np.abs(found)):
        return None
    y = np.zeros(len(rhs))
    y[there] = found / size
    return y / np.abs(y).max()


def ray(quadratic: Any, linear: FloatArray, matrix: Any, rhs: FloatArray, num_equalities: int) -> FloatArray | None:
    """Find a direction along which the objective falls for ever.

    Args:
        quadratic: (n, n) dense or sparse, positive semidefinite.
        linear: (n,) q.
        matrix: (m, n) dense or sparse, equalities first.
        rhs: (m,); infinite where there is no such row.
        num_equalities: number of equality rows.

    Returns:
        (n,) d with ``Q d = 0, A d = 0, G d <= 0, q'd < 0``, largest entry 1; None if there is no such d that passes the
        check.
    """
    scaled, _ = _unit_rows(sp.csr_array(matrix)[np.isfinite(rhs)])
    equality = (np.arange(len(rhs)) < num_equalities)[np.isfinite(rhs)]
    curvature, _ = _unit_rows(quadratic)
    curvature = curvature[np.asarray(abs(curvature).sum(axis=1)).ravel() > 0.0]
    equal = sp.vstack([curvature, scaled[equality]])
    below = scaled[~equality]
    size = float(np.abs(linear).max(initial=0.0))
    if not size > 0.0:
        return None
    found = _solve(linear / size, equal, below, [(-1.0, 1.0)] * len(linear))
    if found is None:
        return None
    found = np.where(np.abs(found) <= _SOME, 0.0, found)
    tight = below @ found > -_SOME * (abs(below) @ np.abs(found))
    found = _polish(sp.vstack([equal, below[tight]]), found)
    rising = below @ found > _ZERO * (abs(below) @ np.abs(found))
    if (
        not _vanishes(equal, found)
        or not _vanishes(curvature, found, _FLAT)
        or rising.any()
        or not linear @ found < -_SOME * (np.abs(linear) @ np.abs(found))
    ):
        return None
    return found / np.abs(found).max()
