"""Exact projections on named sets for one point, in NumPy, by sorting or pooling: the truth for large sizes.

The QP reference (`reference`) forms dense matrices and stops being affordable near a thousand variables. These formulas
have no such limit, and `tests/comparisons/test_closed_forms.py` checks them against that reference where both exist.

    simplex        x = max(v - tau, 0)                     Held, Wolfe and Crowder 1974
    l1 ball        x = sign(v) simplex(|v|) outside        Duchi et al. 2008
    box + budget   x = clip(v - tau c, lower, upper)       continuous knapsack: bisection over sorted breakpoints
    monotone       pool adjacent violators                 Barlow et al. 1972

Each comes with the map g -> (dx/dv)'g, one line because the Jacobian is symmetric. Nothing here imports the code under
test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from hsbackend.comparisons.named_sets import Budget, L1Ball, Monotone, NamedSet, Simplex

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ClosedForm:
    """The projection `primal` (n,) of one point and `vjp(g)`, the product of its Jacobian with g (n,)."""

    primal: Array
    vjp: Callable[[Array], Array]


def has_closed_form(named_set: NamedSet | None) -> bool:
    """Say whether `project` knows the set."""
    return isinstance(named_set, Simplex | L1Ball | Budget | Monotone)


def project(named_set: NamedSet, v: Array) -> ClosedForm:
    """Project one point (n,).

    Raises:
        ValueError: there is no formula for this set.
    """
    match named_set:
        case Simplex(_, radius):
            return _simplex(v, radius)
        case L1Ball(_, radius):
            return _l1_ball(v, radius)
        case Budget():
            return _budget(v, named_set)
        case Monotone():
            return _monotone(v)
        case _:
            raise ValueError(f"no closed form for {named_set}, expected a simplex, l1 ball, budget or monotone set")


def _simplex(v: Array, radius: float) -> ClosedForm:
    descending = np.sort(v)[::-1]
    shifts = (np.cumsum(descending) - radius) / np.arange(1, v.size + 1)
    tau = shifts[np.flatnonzero(descending > shifts)[-1]]
    x = np.maximum(v - tau, 0.0)
    support = x > 0
    return ClosedForm(x, lambda g: np.where(support, g - g[support].mean(), 0.0))


def _l1_ball(v: Array, radius: float) -> ClosedForm:
    if np.abs(v).sum() <= radius:
        return ClosedForm(v.copy(), np.copy)
    signs = np.sign(v)
    inner = _simplex(np.abs(v), radius)
    return ClosedForm(signs * inner.primal, lambda g: signs * inner.vjp(signs * g))


def _budget(v: Array, budget: Budget) -> ClosedForm:
    c, lower, upper = budget.coefficients, budget.lower, budget.upper

    def spent(tau: float) -> float:
        return float(c @ np.clip(v - tau * c, lower, upper))

    # c'x falls with tau and is linear between neighbouring breakpoints; keep total between those of two neighbours.
    breakpoints = np.sort(np.concatenate([(v - upper) / c, (v - lower) / c]))
    left, right = 0, breakpoints.size - 1
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if spent(breakpoints[middle]) >= budget.total else (left, middle)
    inside = v - 0.5 * (breakpoints[left] + breakpoints[right]) * c
    free = (lower < inside) & (inside < upper)
    held = np.where(inside <= lower, lower, upper)
    a = np.where(free, c, 0.0)
    tau = (a @ v + c[~free] @ held[~free] - budget.total) / (a @ a)
    x = np.where(free, v - tau * c, held)
    return ClosedForm(x, lambda g: np.where(free, g - c * (a @ g) / (a @ a), 0.0))


def _monotone(v: Array) -> ClosedForm:
    x = np.empty_like(v)
    pool_adjacent_violators(np.ascontiguousarray(v)[None], x[None])
    block = np.cumsum(np.diff(x, prepend=x[0]) != 0)
    size = np.bincount(block)
    return ClosedForm(x, lambda g: (np.bincount(block, weights=g) / size)[block])


@numba.njit(cache=True)
def pool_adjacent_violators(points: Array, primal: Array) -> None:
    """Write the non-decreasing sequence nearest to each row of `points` (B, n) into `primal` (B, n)."""
    batch, n = points.shape
    total = np.empty(n)
    count = np.empty(n, dtype=np.int64)
    for i in range(batch):
        last = -1
        for j in range(n):
            last += 1
            total[last] = points[i, j]
            count[last] = 1
            while last > 0 and total[last - 1] * count[last] >= total[last] * count[last - 1]:
                total[last - 1] += total[last]
                count[last - 1] += count[last]
                last -= 1
        j = 0
        for block in range(last + 1):
            for _ in range(count[block]):
                primal[i, j] = total[block] / count[block]
                j += 1
