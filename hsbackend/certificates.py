"""Why a problem has no solution, in numbers that anybody can check.

    A x = b, G x <= h has no solution       if and only if   N'y = 0, y >= 0 on the rows of G, (b, h)'y < 0  has one
    1/2 x'Qx + q'x is unbounded below there  if and only if   Q d = 0, A d = 0, G d <= 0, q'd < 0             has one

and there is a feasible point in the second case. Both are linear programs over a box, which SciPy's HiGHS solves; what
it returns is checked against the data before it is given to anybody.

Source: Farkas' lemma; Boyd and Vandenberghe, "Convex Optimization" (2004), section 5.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from hsbackend.program import FloatArray

Mask = NDArray[np.bool_]

#: What counts as zero, relative to the terms of a sum, and what as more than rounding.
_ZERO, _SOME = 1e-12, 1e-9
#: Variables up to which the null space of the equations of a ray is computed.
_DENSE = 500
#: Rounds of balancing.
_ROUNDS = 8
#: Curvature along a ray must be nothing but rounding: a small one ends the descent somewhere.
_FLAT = 4e-15


def _candidates(cost: FloatArray, equal: Any, below: Any, free: Mask) -> Iterator[FloatArray]:
    """Yield vectors v with ``cost'v < 0``, ``equal v = 0`` and ``below v <= 0``, non-negative where they are not free.

    First the shortest one of cost -1, in the norm 1: what it costs to be so short may be very little, and HiGHS sees
    violations of 1e-7 at most, which are small beside a long vector. Then the cheapest one in a box.
    """
    identity = sp.csc_array(sp.eye_array(len(cost)))
    both = sp.csr_array(sp.hstack([identity, -identity[:, free]]))  # v = both w, w >= 0
    equal, below = sp.csr_array(equal), sp.csr_array(below)
    row = sp.csr_array(cost[None])
    arguments: dict[str, Any] = {"method": "highs"}
    long = arguments | {"A_eq": sp.vstack([equal, row]) @ both, "b_eq": np.append(np.zeros(equal.shape[0]), -1.0)}
    if below.shape[0]:
        arguments |= {"A_ub": below, "b_ub": np.zeros(below.shape[0])}
        long |= {"A_ub": below @ both, "b_ub": np.zeros(below.shape[0])}
    found: Any = linprog(np.ones(both.shape[1]), **long)
    if found.status == 0:
        yield np.asarray(both @ found.x, dtype=np.float64) / max(float(found.x.max()), 1e-300)
    if equal.shape[0]:
        arguments |= {"A_eq": equal, "b_eq": np.zeros(equal.shape[0])}
    found = linprog(cost, bounds=[(-1.0 if one else 0.0, 1.0) for one in free], **arguments)
    if found.x is not None and found.fun < -1e-9:
        yield np.asarray(found.x, dtype=np.float64)


def _largest(matrix: Any) -> FloatArray:
    """Return the largest entry of every row; one where there is none."""
    matrix = sp.csr_array(matrix)
    size = np.asarray(abs(matrix).max(axis=1).todense()).ravel() if matrix.shape[1] else np.zeros(matrix.shape[0])
    return np.where(size > 0.0, size, 1.0)


def _unit_rows(matrix: Any) -> Any:
    """Return the rows divided by their largest entry."""
    return sp.csr_array(sp.diags_array(1.0 / _largest(matrix)) @ matrix)


def _balanced(matrix: Any) -> tuple[Any, FloatArray, FloatArray]:
    """Return R M D with largest entries near one in all rows and columns, and R and D, powers of two (Ruiz, 2001)."""
    rows, columns = np.ones(matrix.shape[0]), np.ones(matrix.shape[1])
    for _ in range(_ROUNDS):
        scaled = sp.csr_array(sp.diags_array(rows) @ matrix @ sp.diags_array(columns))
        by_row, by_column = _largest(scaled), _largest(scaled.T)
        rows, columns = rows / np.sqrt(by_row), columns / np.sqrt(by_column)
    rows, columns = np.exp2(np.rint(np.log2(rows))), np.exp2(np.rint(np.log2(columns)))
    return sp.csr_array(sp.diags_array(rows) @ matrix @ sp.diags_array(columns)), rows, columns


def _polish(matrix: Any, vector: FloatArray) -> FloatArray:
    """Return the nearest vector with the same zeros and ``matrix vector = 0``: HiGHS stops at 1e-7."""
    used = np.flatnonzero(vector)
    block = sp.csr_array(matrix)[:, used].toarray()
    polished = vector.copy()
    for _ in range(2):
        step, *_ = np.linalg.lstsq(block, block @ polished[used], rcond=1e-12)
        polished[used] -= step
    return polished


def _rays(linear: FloatArray, equal: Any, below: Any) -> Iterator[FloatArray]:
    """Yield candidates for a ray, first those in the null space of the equations: small curvature is not in the way."""
    n = len(linear)
    if n <= _DENSE:
        _, singular, right = np.linalg.svd(sp.csr_array(equal).toarray(), full_matrices=True)
        basis = right[int(np.sum(singular > _ZERO * singular.max(initial=0.0))) :].T
        if basis.shape[1]:
            inside, nothing = sp.csr_array(below @ basis), np.zeros((0, basis.shape[1]))
            for found in _candidates(basis.T @ linear, nothing, inside, np.ones(basis.shape[1], dtype=bool)):
                yield basis @ found
    yield from _candidates(linear, equal, below, np.ones(n, dtype=bool))


def _vanishes(matrix: Any, vector: FloatArray, zero: float = _ZERO) -> bool:
    """Whether a product is zero, relative to its terms."""
    terms = abs(sp.csr_array(matrix)) @ np.abs(vector)
    return bool(np.all(np.abs(matrix @ vector) <= zero * np.maximum(terms, np.abs(vector).max(initial=0.0) * 1e-9)))


def farkas(matrix: Any, rhs: FloatArray, num_equalities: int, zero: float = _ZERO) -> FloatArray | None:
    """Find multipliers that show that ``A x = b, G x <= h`` has no solution.

    Args:
        matrix: (m, n) dense or sparse, equalities first.
        rhs: (m,); infinite where there is no such row.
        num_equalities: number of equality rows.
        zero: what counts as zero, relative to the terms of a sum.

    Returns:
        (m,) y with ``matrix'y = 0`` and ``rhs'y < 0``, non-negative on inequalities, largest entry 1; None if there is
        no such y that passes the check.
    """
    there = np.isfinite(rhs)
    if not there.any():
        return None
    scaled, weights, _ = _balanced(sp.csr_array(matrix)[there])
    limits = rhs[there] * weights
    unit = float(np.abs(limits).max(initial=0.0))
    equality = (np.arange(len(rhs)) < num_equalities)[there]
    if not unit > 0.0:
        return None
    nothing = np.zeros((0, len(limits)))
    for found in _candidates(limits / unit, scaled.T, nothing, equality):
        found = _polish(scaled.T, np.where(np.abs(found) <= _SOME, 0.0, found))
        if np.any(found[~equality] < 0.0):  # a multiplier that was nothing but rounding
            found = _polish(scaled.T, np.where(~equality & (found <= 1e-7), 0.0, found))
        fits = bool(np.all(found[~equality] >= 0.0)) and _vanishes(scaled.T, found, zero)
        if fits and limits @ found < -_SOME * (np.abs(limits) @ np.abs(found)):
            y = np.zeros(len(rhs))
            y[there] = found * weights
            return y / np.abs(y).max()
    return None


def ray(
    quadratic: Any, linear: FloatArray, matrix: Any, rhs: FloatArray, num_equalities: int, zero: float = _ZERO
) -> FloatArray | None:
    """Find a direction along which the objective falls for ever.

    Args:
        quadratic: (n, n) dense or sparse, positive semidefinite.
        linear: (n,) q.
        matrix: (m, n) dense or sparse, equalities first.
        rhs: (m,); infinite where there is no such row.
        num_equalities: number of equality rows.
        zero: what counts as zero, relative to the terms of a sum; of curvature only rounding does.

    Returns:
        (n,) d with ``Q d = 0, A d = 0, G d <= 0, q'd < 0``, largest entry 1; None if there is no such d that passes the
        check.
    """
    there = np.isfinite(rhs)
    equality = (np.arange(len(rhs)) < num_equalities)[there]
    curvature = sp.csr_array(quadratic)
    curvature = curvature[np.asarray(abs(curvature).sum(axis=1)).ravel() > 0.0]
    count = curvature.shape[0]
    scaled, _, columns = _balanced(sp.vstack([curvature, sp.csr_array(matrix)[there]]))
    untouched = (np.asarray(abs(scaled).sum(axis=0)).ravel() == 0.0) & (linear != 0.0)
    columns[untouched] = 1.0 / np.abs(linear[untouched])
    linear = linear * columns
    curvature, scaled = _unit_rows(scaled[:count]), _unit_rows(scaled[count:])
    equal = sp.vstack([curvature, scaled[equality]])
    below = scaled[~equality]
    size = float(np.abs(linear).max(initial=0.0))
    if not size > 0.0:
        return None
    for found in _rays(linear / size, equal, below):
        found = np.where(np.abs(found) <= _SOME, 0.0, found)
        tight = below @ found > -_SOME * (abs(below) @ np.abs(found))
        found = _polish(sp.vstack([equal, below[tight]]), found)
        rising = below @ found > zero * (abs(below) @ np.abs(found))
        if (
            _vanishes(equal, found, zero)
            and _vanishes(curvature, found, _FLAT)
            and not rising.any()
            and linear @ found < -_SOME * (np.abs(linear) @ np.abs(found))
        ):
            found = found * columns
            return found / np.abs(found).max()
    return None
