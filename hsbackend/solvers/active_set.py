"""Batched dual active-set method in Gram space: finite, exact, never wrong on a solvable strictly convex problem.

The mathematics of one item is in :mod:`hsbackend.solvers._gram_kernels`; this module runs it over a batch. Auxiliary
variables without curvature (epigraph variables of norm-1, norm-inf, max, abs) are handled by proximal steps:
``H + delta I`` on them is factored and the item is solved repeatedly from the last point, warm-started with the last
working set. The outer loop ends when the point repeats, after a handful of steps because the working set settles.

Source: Goldfarb and Idnani, "A numerically stable dual method for solving strictly convex quadratic programs" (1983);
two-sided rows and the proximal loop follow Arnstrom, Bemporad and Axehill, "A dual active-set solver for embedded
quadratic programming using recursive LDL' updates" (2022), whose code (MIT) was not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsbackend._parallel import for_each_item, gather
from hsbackend.face import BlockFace, BoxFace, GramFace, MixedFace
from hsbackend.metric import ItemMetric, Metric, SharedMetric
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.route import DENSE_LIMIT
from hsbackend.solvers._gram_kernels import normalise, solve_items
from hsbackend.solvers._verify_kernels import kkt_residuals
from hsbackend.solvers.result import Options, Result
from hsbackend.solvers.warm import WarmStart
from hsbackend.status import Status

#: Weight of the proximal term relative to the largest curvature. Small weights converge in fewer outer steps but
#: put numbers of size 1/weight into the Gram matrix; 1e-4 keeps twelve digits (measured on epigraph fuzz problems).
PROXIMAL_WEIGHT = 1e-4


#: Residual, relative to the tolerance, above which a point that cannot be refined any further is looked at again: it is
#: what an infeasible or unbounded problem that is nearly solvable has to offer, too.
_POOR = 1e-3


def _proximal_weight(hessian: FloatArray) -> FloatArray:
    """Return the proximal weight of each Hessian, (1 or B,); an item never sees the numbers of another."""
    largest = np.abs(np.einsum("bii->bi", hessian)).max(axis=1, initial=0.0)
    return np.where(np.isfinite(largest) & (largest > 0.0), PROXIMAL_WEIGHT * largest, PROXIMAL_WEIGHT)


class GramSetup:
    """What the active-set solver keeps between calls for constant ``H`` and ``N``: one metric, one scaled Gram matrix.

    Args:
        hessian: (1, n, n) or (1, n).
        rows: (1, m, n), equalities first.
        num_equalities: number of equality rows.
        bounded: (nb,) variables with limits.
        proximal: (ns,) variables of proximal steps.
    """

    def __init__(self, hessian: FloatArray, rows: FloatArray, num_equalities: int, bounded: IndexArray,
                 proximal: IndexArray) -> None:  # fmt: skip
        """Factor once."""
        n = hessian.shape[-1]
        dense = np.diag(hessian[0]) if hessian.ndim == 2 else hessian[0]
        self.weight = _proximal_weight(dense[None])
        if len(proximal):
            dense = dense.copy()
            dense[proximal, proximal] += self.weight[0]
        units = np.zeros((len(bounded), n))
        units[np.arange(len(bounded)), bounded] = 1.0
        inequalities = np.concatenate([rows[0, num_equalities:], units])
        self.metric = SharedMetric(dense, np.ascontiguousarray(rows[0, :num_equalities]), inequalities, proximal)
        if self.metric.convex:
            self.gram = self.metric.gram
            self.scale = np.empty(self.gram.shape[:2])
            for_each_item(normalise, 1, 1.0, self.gram, self.scale)


def solve(
    values: QPValues, options: Options, setup: GramSetup | None = None, warm: WarmStart | None = None,
) -> Result:  # fmt: skip
    """Solve a batch of strictly convex quadratic programs.

    Args:
        values: the problems.
        options: tolerances and what to keep.
        setup: factored constant data, for ``values.shared``; made here when none is given.
        warm: first guesses, one per item (:meth:`~hsbackend.solvers.warm.WarmStart.match`).

    Returns:
        Result with multipliers in the sign convention of :mod:`hsbackend.program` and signed bound multipliers
        (positive at the upper limit).
    """
    batch, n = values.batch, values.num_variables
    m, n_eq = values.rows.shape[1], values.num_equalities
    shared = values.shared
    status = np.zeros(batch, dtype=np.int8)
    metric: Metric
    if shared:
        if setup is None:
            setup = GramSetup(values.hessian, values.rows, n_eq, values.bounded, values.proximal)
        metric = setup.metric
        if not metric.convex:
            return Result.failed(values, Status.NOT_STRICTLY_CONVEX)
        gram, scale, weights = setup.gram, setup.scale, setup.weight
        eliminated = n_eq
        status[metric.inconsistent(values.rhs_rows[:, :n_eq]) > 1e-8] = Status.INFEASIBLE
    else:
        dense = values.hessian
        if values.diagonal:
            dense = np.zeros((dense.shape[0], n, n))
            dense[:, np.arange(n), np.arange(n)] = values.hessian
        weights = _proximal_weight(dense)
        if len(values.proximal):
            dense = dense.copy()
            dense[:, values.proximal, values.proximal] += weights[:, None]
        metric = ItemMetric(np.ascontiguousarray(dense), values.rows, values.bounded, values.proximal, batch, n_eq)
        status = metric.status
        gram = metric.gram
        scale = np.empty(gram.shape[:2])
        for_each_item(normalise, batch, float(gram.shape[1] ** 2), gram, scale)
        eliminated = 0

    rhs_equalities = np.ascontiguousarray(values.rhs_rows[:, :eliminated])
    point, base = metric.free(values.rhs_primal, rhs_equalities)
    total = base.shape[1]
    left = m - eliminated
    upper = np.concatenate([values.rhs_rows[:, eliminated:], values.upper], axis=1)
    lower = np.full((batch, total), -np.inf)
    lower[:, left:] = values.lower
    equal = n_eq - eliminated
    lower[:, :equal] = upper[:, :equal]

    ns = len(values.proximal)
    if ns and not shared:
        origin, _ = metric.finish(point, np.zeros((batch, total)), values.rhs_primal, rhs_equalities)
    else:
        origin = point
    prox_origin = np.ascontiguousarray(origin[:, values.proximal])
    prox_point = np.zeros((batch, ns))
    multipliers = np.zeros((batch, total))
    steps = np.zeros(batch, dtype=np.int64)
    working = np.zeros((batch, total), dtype=np.int64)
    side = np.zeros((batch, total), dtype=np.int64)
    count = np.zeros(batch, dtype=np.int64)
    offset = np.zeros(batch, dtype=np.int64)
    warm_side, warm_point = side, prox_point
    if warm is not None:
        warm_side = np.concatenate([warm.rows[:, eliminated:], warm.bounds], axis=1)
        warm_point = np.ascontiguousarray(warm.primal[:, values.proximal])
    arguments: tuple[Any, ...] = (
        gram, scale, base, lower, upper, equal, metric.rank, options.inner_tolerance, 50 + 10 * (total + n),
        options.jacobian == "support", options.active_tolerance, options.keep_face, weights,
        metric.proximal_rows, metric.proximal_block, prox_origin, prox_point, warm is not None, warm_side.copy(),
        warm_point.copy(),
        status, multipliers, steps, working, side, count, offset,
    )  # fmt: skip
    stores = for_each_item(solve_items, batch, 8.0 * total * (10 + total), *arguments)

    rhs_primal = values.rhs_primal
    if ns:
        rhs_primal = rhs_primal.copy()
        rhs_primal[:, values.proximal] += weights[:, None] * prox_point
        point, _ = metric.free(rhs_primal, rhs_equalities)
    primal, equalities = metric.finish(point, multipliers, rhs_primal, rhs_equalities)
    rows = np.concatenate([equalities, multipliers[:, :left]], axis=1)
    face = None
    if options.keep_face:
        inverse = gather(stores, offset)
        face = GramFace(
            metric, gram, scale, working, count, offset, inverse, side, n_eq, m, values.proximal, weights
        )  # fmt: skip
    return Result(primal, rows, np.ascontiguousarray(multipliers[:, left:]), status, steps, face)


def finish(values: QPValues, options: Options, result: Result, gram_setup: Callable[[], GramSetup | None]) -> Result:
    """Solve the items that another solver reports as NOT_CONVERGED, unless the problem is too large for this one.

    Args:
        values: the problems.
        options: tolerances and what to keep.
        result: of the other solver; its arrays are overwritten in those items.
        gram_setup: gives the constant data when an item has to be solved.
    """
    unfinished = np.flatnonzero(result.status == Status.NOT_CONVERGED).astype(np.int64)
    size = values.num_variables + values.rhs_rows.shape[1] + len(values.bounded)
    if not len(unfinished) or size > DENSE_LIMIT:
        return result
    left = values.take(unfinished)
    rest = verify(left, options, solve(left, options, gram_setup()))
    result.put(unfinished, rest)
    if rest.delicate is not None:
        delicate = np.zeros(values.batch, dtype=bool) if result.delicate is None else result.delicate
        delicate[unfinished] = rest.delicate
        result = replace(result, delicate=delicate)
    if isinstance(result.face, BoxFace | BlockFace) and rest.face is not None:
        return replace(result, face=MixedFace(result.face, rest.face, unfinished))
    return result


def residuals(
    values: QPValues, primal: FloatArray, rows: FloatArray, bounds: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return stationarity (B, n), the gaps ``N x - h`` (B, m), and the largest relative KKT residual (B,)."""
    stationarity, gaps, worst = np.empty(primal.shape), np.empty(rows.shape), np.empty(values.batch)
    hessian = values.hessian[:, None, :] if values.diagonal else values.hessian
    work = float(2 * hessian[0].size + 4 * values.rows[0].size)
    for_each_item(
        kkt_residuals, values.batch, work, hessian, values.diagonal, values.rhs_primal, values.rows, values.rhs_rows,
        values.num_equalities, values.bounded, values.lower, values.upper, primal, rows, bounds, stationarity, gaps,
        worst,
    )  # fmt: skip
    return stationarity, gaps, worst


def verify(
    values: QPValues, options: Options, result: Result, good: float = 1e-4,
    among: NDArray[np.bool_] | None = None,
) -> Result:  # fmt: skip
    """Check the KKT conditions against the data themselves, refine where needed, and mark what still fails.

    The solver works with the Gram matrix; an ill-conditioned Hessian can make a solution that is exact there
    inaccurate here. The residual is that of :mod:`hsbackend.solvers._verify_kernels`, componentwise; a refinement puts
    all rows of the face at their limits.

    Args:
        values: the problems.
        options: tolerances.
        result: overwritten where it is refined.
        good: residual, relative to the tolerance, up to which nothing is refined.
        among: (B,) the items to look at, all by default.
    """
    solved = result.status == Status.SOLVED
    if among is not None:
        solved &= among
    stationarity, gaps, worst = residuals(values, result.primal, result.rows, result.bounds)
    for _ in range(2):
        # Near the tolerance a refinement is cheap insurance; further away it is needed.
        poor = np.flatnonzero(solved & ~(worst <= good * options.tolerance))
        if not len(poor) or result.face is None:
            break
        side = result.face.active_bounds
        limits = np.where(side > 0, values.upper, np.where(side < 0, values.lower, 0.0))
        beyond = np.where(side != 0, result.primal[:, values.bounded] - limits, 0.0)
        correction = result.face.kkt_solve(-stationarity, -np.where(np.isfinite(gaps), gaps, 0.0), -beyond)
        primal = result.primal + correction.primal
        rows, bounds = result.rows + correction.rows, result.bounds + correction.bounds
        stationarity_after, gaps_after, after = residuals(values, primal, rows, bounds)
        # A face with nearly dependent rows may answer rounding with large multipliers of the wrong sign: keep what
        # helps.
        better = poor[after[poor] < worst[poor]]
        result.primal[better], result.rows[better], result.bounds[better] = primal[better], rows[better], bounds[better]
        stationarity[better], gaps[better] = stationarity_after[better], gaps_after[better]
        worst[better] = after[better]
    result.status[solved & ~(worst <= options.tolerance)] = Status.NOT_CONVERGED
    poor = solved & (worst > _POOR * options.tolerance)
    if poor.any():
        result = replace(result, delicate=poor if result.delicate is None else poor | result.delicate)
    return result
