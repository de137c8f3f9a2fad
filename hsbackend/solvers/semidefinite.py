"""Linear programs and semidefinite Hessians: one optimum, and the selection of least norm among the optima.

An item is solved in three steps, each of which can be checked against the data.

1. The active set with proximal steps (:mod:`hsbackend.solvers.active_set`), on the variables without curvature where
   that makes ``H + delta I_S`` positive definite on null(E), on all variables otherwise. The KKT conditions are checked
   against the data, and a poor answer is refined on its face.
2. What that did not solve goes to the interior-point method (:mod:`hsbackend.solvers.interior_point`): it solves the
   item or shows with a certificate that there is no optimum.
3. With a multiplier (y, z) of an optimum x, the optima are the feasible points x + d with ``H d = 0, E d = 0`` and
   ``N_supp d = 0``, N_supp the rows with a positive multiplier. Where they differ in the variables that are read, the
   one of least norm in them is found by a second, strictly convex problem in a basis of these directions.

Source of the characterisation of the optima: Mangasarian, "A simple characterization of solution sets of convex
programs" (1988). The proximal point iteration: Rockafellar (1976).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hsbackend.batched import matvec, vecmat
from hsbackend.face import GramFace, LeastNormFace
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers import active_set, interior_point
from hsbackend.solvers.result import Options, Result
from hsbackend.solvers.scaling import Scaling, without_invalid
from hsbackend.solvers.warm import WarmStart
from hsbackend.status import Status

#: Variables up to which faces are factored without a second thought.
_SMALL = 100
#: Residual, relative to the tolerance, above which a point is refined on its face.
_REFINE = 1e-6
#: Negative curvature, relative to the largest, that is rounding.
_NEGATIVE = 1e-10
#: Multipliers below this, relative to the cost, are zero.
_MULTIPLIER = 1e-9
#: Slacks below this, relative to the limit and the point, are zero.
_SLACK = 1e-9
#: Remainder of a unit row, and curvature relative to the largest, above which nobody looks for a second optimum.
_CERTAIN_RANK, _CERTAIN_CURVATURE = 1e-3, 1e-6
#: Singular values of ``[H; N]`` (unit rows) below this are zero.
_RANK = 1e-11
#: Part of a direction across a unit row above which the row is touched, at least.
_TOUCHED = 1e-10
#: Ratio of what a point gains on the data to its length, below which it is nearly a ray; squared for multipliers.
_AWAY = 1e-3
#: Length of the projection of a unit vector onto a cone above which the cone is not zero.
_RAY = 1e-7

Mask = NDArray[np.bool_]


class SemidefiniteSetup:
    """What is kept between calls for constant ``H`` and ``N``.

    Args:
        hessian: (1, n, n) or (1, n).
        rows: (1, m, n), equalities first.
        num_equalities: number of equality rows.
        bounded: (nb,) variables with limits.
        flat: (ns,) variables without curvature.

    Attributes:
        scaling: units in which the problem is solved; None for those of the data.
        convex: whether the Hessian is positive semidefinite.
        proximal: variables of proximal steps.
        gram: the constant data of the active set.
    """

    def __init__(
        self, hessian: FloatArray, rows: FloatArray, num_equalities: int, bounded: IndexArray, flat: IndexArray
    ) -> None:
        """Factor once."""
        self.scaling = Scaling.of(hessian, rows)
        if self.scaling is not None:
            hessian, rows = self.scaling.matrices(hessian, rows)
        self.convex = bool(_convex(hessian).all())
        every = np.arange(hessian.shape[-1], dtype=np.int64)
        self.proximal = flat if len(flat) else every
        if not self.convex:
            return
        self.gram = active_set.GramSetup(hessian, rows, num_equalities, bounded, self.proximal)
        if not self.gram.metric.convex and len(self.proximal) < len(every):
            self.proximal = every
            self.gram = active_set.GramSetup(hessian, rows, num_equalities, bounded, every)


def _convex(hessian: FloatArray) -> Mask:
    """Return (1 or B,) whether each Hessian is positive semidefinite; NaN counts as such and is found later."""
    if hessian.ndim == 2:
        largest = np.abs(hessian).max(axis=1, initial=0.0)
        return ~(hessian.min(axis=1, initial=0.0) < -_NEGATIVE * largest)
    harmless = np.where(np.isfinite(hessian), hessian, 0.0)
    size = np.abs(harmless).max(axis=(1, 2), initial=0.0)
    least = np.linalg.eigvalsh(harmless).min(axis=1, initial=0.0)
    return ~(least < -_NEGATIVE * size)


def nearly_singular(hessian: FloatArray) -> Mask:
    """Return (1 or B,) whether each Hessian (1 or B, n, n) has curvature that may be nothing but rounding."""
    harmless = np.where(np.isfinite(hessian), hessian, 0.0)
    eigenvalues = np.linalg.eigvalsh(harmless)
    return eigenvalues.min(axis=1, initial=np.inf) <= 1e-9 * np.abs(harmless).max(axis=(1, 2), initial=0.0)


def solve(
    values: QPValues, options: Options, read: Mask, setup: SemidefiniteSetup | None = None,
    warm: WarmStart | None = None, start: Result | None = None,
) -> Result:  # fmt: skip
    """Solve a batch of problems with a positive semidefinite Hessian.

    Args:
        values: the problems.
        options: tolerances and what to keep.
        read: (n,) variables that somebody reads; their norm selects among the optima.
        setup: factored constant data; only for Hessian and rows shared by the batch.
        warm: first guesses, one per item.
        start: what another solver found; its failures are left to the interior-point method alone.

    Returns:
        Result with ``non_unique``, and a :class:`~hsbackend.face.LeastNormFace`.
    """
    values, invalid = without_invalid(values)
    scaling = Scaling.of(values.hessian, values.rows) if setup is None else setup.scaling
    if scaling is None:
        result = _solve(values, options, read, None, setup, warm, start)
    else:
        result = _solve(values, options, read, scaling, setup, warm, start)
        face = result.face
        result = scaling.undo(values, result)
        if face is not None:
            result = replace(result, face=LeastNormFace(values, face.active_rows, face.active_bounds, read))
        result = replace(result, delicate=np.ones(values.batch, dtype=bool))
    result.status[invalid] = Status.INVALID_INPUT
    return result


def _solve(
    given: QPValues, options: Options, read: Mask, scaling: Scaling | None, setup: SemidefiniteSetup | None,
    warm: WarmStart | None, start: Result | None,
) -> Result:  # fmt: skip
    """Solve in balanced units, in which the result is returned; the norm is measured in those of the data."""
    values, units = given, np.ones((1, given.num_variables))
    if scaling is not None:
        values, units, warm = scaling.apply(given), scaling.columns, scaling.start(warm)
    result = _optimum(values, options, read, setup, warm, start)
    face = result.face
    if not isinstance(face, LeastNormFace):  # every item failed before there was a face
        return result
    result, rescued = _rescue(given, values, options, scaling, result)
    face = result.face
    assert isinstance(face, LeastNormFace)
    non_unique = np.zeros(values.batch, dtype=bool)
    rows, bounds = face.active_rows.copy(), face.active_bounds.copy()
    if options.jacobian == "active":
        _hold_active(values, options, result, rows, bounds)
    for b in np.flatnonzero(_doubtful(values, result, read)):
        found = _Item(values, int(b)).select(result, options, units[b if len(units) > 1 else 0], read)
        if found is not None:
            non_unique[b], result.primal[b], rows[b], bounds[b] = found
    final, changed = face.replaced(rows, bounds)
    rescued[changed] = True
    if rescued.any():  # on the final K the point is what the data say, not how it was found
        good = _REFINE if values.num_variables <= _SMALL else 1e-4
        result = active_set.verify(values, options, replace(result, face=final), good, rescued)
    away = runs_away(values, result.primal, result.rows, result.bounds)
    if away.any():
        result = replace(result, delicate=away if result.delicate is None else away | result.delicate)
    return replace(result, face=final if options.keep_face else None, non_unique=non_unique)


def _hold_active(
    values: QPValues, options: Options, result: Result, side_rows: IndexArray, side_bounds: IndexArray
) -> None:
    """Put the rows at their limit into K; the proximal steps saw them before the point was refined."""
    size = np.abs(result.primal).max(axis=1, keepdims=True, initial=0.0)
    length = np.linalg.norm(values.rows, axis=2)
    length = np.where(length > 0.0, length, 1.0)
    allowed = options.active_tolerance * (1.0 + size)

    def held(slack: FloatArray, limit: FloatArray, length: FloatArray) -> Mask:
        limit = np.where(np.isfinite(limit), np.abs(limit), 0.0)
        return (slack <= options.active_tolerance * limit + allowed * length) & solved

    solved = (result.status == Status.SOLVED)[:, None]
    rows = held(values.rhs_rows - matvec(values.rows, result.primal), values.rhs_rows, length)
    at = result.primal[:, values.bounded]
    ones = np.ones((1, len(values.bounded)))
    upper, lower = held(values.upper - at, values.upper, ones), held(at - values.lower, values.lower, ones)
    side_rows[rows & (side_rows == 0)] = 1
    more = (upper | lower) & (side_bounds == 0)
    side_bounds[more] = np.where(upper, 1, -1)[more]


def _optimum(
    values: QPValues, options: Options, read: Mask, setup: SemidefiniteSetup | None, warm: WarmStart | None,
    start: Result | None,
) -> Result:  # fmt: skip
    """Find one optimum of every item, or the reason why there is none."""
    if start is not None:  # the interior-point method looks at the curvature itself
        return replace(start, face=_no_face(values, read))
    every = np.arange(values.num_variables, dtype=np.int64)
    convex = _convex(values.hessian) if setup is None else np.array([setup.convex])
    if convex.shape[0] == 1 and not convex[0]:
        return Result.failed(values, Status.NOT_STRICTLY_CONVEX)
    flat = values.proximal if setup is None else setup.proximal
    enough = 0 < len(flat) < len(every)
    first = replace(values, proximal=flat if enough else every)
    result = _proximal(first, options, read, setup and setup.gram, warm)
    convex = np.broadcast_to(convex, (values.batch,))
    result.status[~convex & (result.status != Status.INVALID_INPUT)] = Status.NOT_STRICTLY_CONVEX
    result.status[convex & (result.status == Status.NOT_STRICTLY_CONVEX)] = Status.NOT_CONVERGED
    return result


def _rescue(
    given: QPValues, values: QPValues, options: Options, scaling: Scaling | None, result: Result
) -> tuple[Result, Mask]:
    """Give what is not solved to the interior-point method, in the units of the data: it has its own.

    Returns:
        The result, and which items (B,) that solved.
    """
    face = result.face
    failed = np.isin(result.status, [Status.NOT_CONVERGED, Status.UNBOUNDED, Status.INFEASIBLE])
    left = np.flatnonzero(failed).astype(np.int64)
    if not len(left) or not isinstance(face, LeastNormFace):
        return result, np.zeros(values.batch, dtype=bool)
    part = given.take(left)
    found = interior_point.solve(part, options)
    sides = interior_point.active_sides(part, found.primal, found.rows, found.bounds)
    if scaling is not None:
        found = scaling.take(left).result(part, found)
    result.put(left, found)
    rows, bounds = face.active_rows.copy(), face.active_bounds.copy()
    rows[left], bounds[left] = sides
    delicate = failed if result.delicate is None else failed | result.delicate
    result = replace(result, face=replace(face, active_rows=rows, active_bounds=bounds), delicate=delicate)
    return result, failed & (result.status == Status.SOLVED)


def runs_away(values: QPValues, primal: FloatArray, rows: FloatArray, bounds: FloatArray) -> Mask:
    """Return (B,) whether points or multipliers are nearly certificates that there is no optimum.

    So long a point that ``H x``, ``E x`` and what it gains on limits are small beside it is nearly a ray; multipliers
    so large that ``N'w`` is small beside them are nearly a Farkas combination. A residual relative to its terms is
    small there whatever the problem.

    Args:
        values: the problems.
        primal: (B, n) points.
        rows: (B, m) multipliers of the rows.
        bounds: (B, nb) multipliers of the limits.
    """
    scaling = Scaling.of(values.hessian, values.rows)
    if scaling is not None:
        values = scaling.apply(values)
        primal, rows = primal / scaling.columns, rows / scaling.rows
        bounds = bounds * scaling.columns[:, values.bounded]
    me, length = values.num_equalities, np.abs(values.rows).max(axis=2, initial=0.0)
    curved = values.hessian * primal if values.diagonal else matvec(values.hessian, primal)
    stiffness = np.abs(values.hessian).reshape(len(values.hessian), -1).max(axis=1, initial=0.0)
    moved = matvec(values.rows, primal)
    moved[:, me:] = np.where(np.isfinite(values.rhs_rows[:, me:]), np.maximum(moved[:, me:], 0.0), 0.0)
    at = primal[:, values.bounded]
    beyond = np.maximum(np.where(values.upper < np.inf, at, 0.0), np.where(values.lower > -np.inf, -at, 0.0))
    size = np.abs(primal).max(axis=1, initial=0.0)[:, None]
    ray = (np.abs(curved) <= _AWAY * stiffness[:, None] * size).all(axis=1) & (size[:, 0] > 0.0)
    ray &= (np.abs(moved) <= _AWAY * length * size).all(axis=1) & (beyond <= _AWAY * size).all(axis=1)
    pull = vecmat(rows, values.rows)
    pull[:, values.bounded] += bounds
    force = np.maximum(np.abs(rows * length).max(axis=1, initial=0.0), np.abs(bounds).max(axis=1, initial=0.0))
    return ray | ((np.abs(pull).max(axis=1, initial=0.0) <= _AWAY**2 * force) & (force > 0.0))


def _no_face(values: QPValues, read: Mask) -> LeastNormFace:
    rows = np.zeros((values.batch, values.rows.shape[1]), dtype=np.int64)
    return LeastNormFace(values, rows, np.zeros((values.batch, len(values.bounded)), dtype=np.int64), read)


def _proximal(
    values: QPValues, options: Options, read: Mask, gram: active_set.GramSetup | None, warm: WarmStart | None
) -> Result:
    """Run the proximal loop and check its answer against the data; its face is a LeastNormFace without selection."""
    cost, size = _units(values)
    scaled = replace(
        values,
        rhs_primal=values.rhs_primal / cost[:, None],
        rhs_rows=values.rhs_rows / size[:, None],
        lower=values.lower / size[:, None],
        upper=values.upper / size[:, None],
    )
    if warm is not None:
        warm = replace(warm, primal=warm.primal / size[:, None])
    result = active_set.solve(scaled, replace(options, keep_face=True), gram, warm)
    result.primal[:] *= size[:, None]
    result.rows[:] *= cost[:, None]
    result.bounds[:] *= cost[:, None]
    free = ~values.hessian.any(axis=tuple(range(1, values.hessian.ndim))) & ~values.rhs_primal.any(axis=1)
    result.rows[free] = 0.0  # what holds a feasible point without any cost is rounding
    result.bounds[free] = 0.0
    face = _no_face(values, read)
    if isinstance(result.face, GramFace):
        face = replace(face, active_rows=result.face.active_rows.copy(), active_bounds=result.face.active_bounds.copy())
    return active_set.verify(values, options, replace(result, face=face), _REFINE)


def _units(values: QPValues) -> tuple[FloatArray, FloatArray]:
    """Return units (B,) of cost and of length that make the numbers of a linear program about one; one elsewhere."""
    linear = ~values.hessian.any(axis=tuple(range(1, values.hessian.ndim)))
    cost = np.abs(values.rhs_primal).max(axis=1, initial=0.0)
    limits = np.abs(np.concatenate([values.rhs_rows, values.lower, values.upper], axis=1))
    size = np.where(np.isfinite(limits), limits, 0.0).max(axis=1, initial=0.0)
    found: list[FloatArray] = []
    for unit in (cost, size):
        found.append(np.where(linear & np.isfinite(unit) & (unit > 0.0), unit, 1.0))
    return found[0], found[1]


def _support(values: QPValues, result: Result) -> tuple[Mask, Mask]:
    """Return the rows (B, m) and bounds (B, nb) with a multiplier; equalities are among them."""
    sizes = np.linalg.norm(values.rows, axis=2)
    cost, curvature = np.abs(values.rhs_primal).max(axis=1, initial=0.0), np.abs(values.hessian)
    curvature = curvature.reshape(len(curvature), -1).max(axis=1, initial=0.0)
    tiny = _negligible(cost, curvature, np.abs(result.primal).max(axis=1, initial=0.0))[:, None]
    rows = np.abs(result.rows) * sizes > tiny
    rows[:, : values.num_equalities] = True
    return rows, (np.abs(result.bounds) > tiny) | (values.lower == values.upper)


def _negligible(cost: FloatArray, curvature: FloatArray, size: FloatArray) -> FloatArray:
    """Return the size below which a multiplier is rounding; without any cost every one of them is."""
    return np.where(
        (cost > 0.0) | (curvature > 0.0),
        np.maximum(_MULTIPLIER * cost, 1e-3 * _MULTIPLIER * curvature * (1.0 + size)),
        np.inf,
    )


def _doubtful(values: QPValues, result: Result, read: Mask) -> Mask:
    """Return the solved items (B,) that may have more than one optimum: a cheap test with a wide margin."""
    rows, bounds = _support(values, result)
    solved = result.status == Status.SOLVED
    if values.num_variables > _SMALL:
        return np.array(
            [bool(solved[b]) and not _surely_unique(values, rows[b], bounds[b], b) for b in range(len(solved))]
        )
    support = LeastNormFace(values, rows.astype(np.int64), bounds.astype(np.int64), read)
    return solved & (support.free_directions(_CERTAIN_RANK, _CERTAIN_CURVATURE) > 0)


def _surely_unique(values: QPValues, rows: Mask, bounds: Mask, b: int) -> bool:
    """Whether ``H/|H| + N'N`` (unit rows with a multiplier) has no eigenvalue near zero: one Cholesky factorisation."""
    hessian = values.hessian[b if len(values.hessian) > 1 else 0]
    total = np.diag(hessian) if values.diagonal else hessian.copy()
    largest = float(np.abs(np.diag(total)).max(initial=0.0))
    total = total / largest if largest > 0.0 else total
    normals = values.rows[b if len(values.rows) > 1 else 0][rows]
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    unit = normals / np.where(length > 0.0, length, 1.0)
    total += unit.T @ unit
    total[values.bounded, values.bounded] += bounds
    total[np.diag_indices(len(total))] -= _CERTAIN_CURVATURE
    try:
        np.linalg.cholesky(total)
    except np.linalg.LinAlgError:
        return False
    return True


class _Item:
    """One item, written with unit-norm rows ``G x <= h``: general rows, upper bounds, lower bounds."""

    def __init__(self, values: QPValues, b: int) -> None:
        hessian = values.hessian[b if values.hessian.shape[0] > 1 else 0]
        self.hessian = np.diag(hessian) if values.diagonal else hessian
        self.linear = -values.rhs_primal[b]
        general = values.rows[b if values.rows.shape[0] > 1 else 0]
        n, me = len(self.linear), values.num_equalities
        units = np.zeros((len(values.bounded), n))
        units[np.arange(len(units)), values.bounded] = 1.0
        rows = np.concatenate([general, units, -units])
        size = np.linalg.norm(rows, axis=1)
        self.scale = 1.0 / np.where(size > 0.0, size, 1.0)
        self.normals = rows * self.scale[:, None]
        self.limits = np.concatenate([values.rhs_rows[b], values.upper[b], -values.lower[b]]) * self.scale
        self.equality = np.arange(len(rows)) < me
        self.split = values.rhs_rows.shape[1], len(values.bounded)
        self.b = b
        largest = float(np.abs(np.diag(self.hessian)).max(initial=0.0))
        self.curvature = self.hessian / largest if largest > 0.0 else np.zeros((0, n))

    def _directions(self, tight: Mask) -> tuple[FloatArray, float]:
        """Return the directions without curvature along which the tight rows stay tight.

        Returns:
            An orthonormal basis in the columns, and the size of the rounding errors in it: rounding over the least
            singular value that is not zero.
        """
        stacked = np.concatenate([self.curvature, self.normals[tight]])
        if not len(stacked):
            return np.eye(len(self.linear)), _TOUCHED
        _, singular, right = np.linalg.svd(stacked, full_matrices=True)
        largest = float(singular.max(initial=0.0))
        rank = int(np.sum(singular > _RANK * largest))
        least = float(singular[rank - 1]) if rank else largest
        return right[rank:].T, max(_TOUCHED, 1e-14 * largest / least) if least > 0.0 else _TOUCHED

    def select(
        self, result: Result, options: Options, units: FloatArray, read: Mask
    ) -> tuple[bool, FloatArray, IndexArray, IndexArray] | None:
        """Choose among the optima.

        Args:
            result: one optimum of every item.
            options: tolerances, and which K to keep.
            units: (n,) of the variables; the norm that decides is that of the data.
            read: (n,) the variables whose norm decides.

        Returns:
            Whether the variables that are read have more than one optimal value, the chosen point, and the sides of
            its active rows and bounds; None when there is nothing to choose.
        """
        b, (m, nb) = self.b, self.split
        x = result.primal[b]
        multipliers = np.concatenate(
            [result.rows[b], np.maximum(result.bounds[b], 0.0), np.maximum(-result.bounds[b], 0.0)]
        )
        pull = np.abs(multipliers) / self.scale
        cost, curvature = np.abs(self.linear).max(initial=0.0), np.abs(self.hessian).max(initial=0.0)
        support = (pull > _negligible(cost, curvature, np.abs(x).max(initial=0.0))) | self.equality
        plain, rounding = self._directions(support)
        if not np.abs(plain[read]).max(initial=0.0) > 1e-8:
            return None
        basis = _orthonormal(units[:, None] * plain)
        seen, basis = basis[read], basis / units[:, None]
        slack = self.limits - self.normals @ x
        room = _SLACK * (1.0 + np.where(np.isfinite(self.limits), np.abs(self.limits), 0.0) + np.abs(x).max())
        slack = np.where(np.abs(slack) <= room, 0.0, np.maximum(slack, 0.0))
        others = np.flatnonzero(~support & np.isfinite(slack))
        across = self.normals[others] @ plain
        touched = np.abs(across).max(axis=1, initial=0.0) > rounding
        others, across = others[touched], np.where(np.abs(across) > rounding, across, 0.0)[touched]
        rows = self.normals[others] @ basis
        rows = np.where(np.abs(rows) > rounding * np.linalg.norm(basis, axis=0), rows, 0.0)
        size = np.abs(rows).max(axis=1, initial=0.0)
        size = np.where(size > 0.0, size, 1.0)
        rows /= size[:, None]
        step, pushing = _least_norm(seen, (units * x)[read], rows, slack[others] / size, options)
        primal = x
        if step is not None:
            primal = x + basis @ step
            if self._worse(primal, slack, support):
                primal, pushing = x, np.zeros(len(others), dtype=bool)
        size = 1.0 + float(np.abs(units * x)[read].max(initial=0.0))
        moved = float(np.abs(units * (primal - x))[read].max(initial=0.0)) > 1e-7 * size
        weak = across[slack[others] <= room[others]]
        several = moved or _has_part(weak, plain[read])
        # K: the rows at their limit, or those that hold the point as an optimum or as the chosen one among the optima.
        gap = np.abs(self.limits - self.normals @ primal)
        held = support.copy()
        held[others[pushing]] = True
        if options.jacobian == "active":
            held |= np.isfinite(gap) & (gap <= 0.1 * room)
        side_rows = held[:m].astype(np.int64)
        side_bounds = np.where(held[m : m + nb], 1, np.where(held[m + nb :], -1, 0)).astype(np.int64)
        return several, primal, side_rows, side_bounds

    def _worse(self, primal: FloatArray, slack: FloatArray, support: Mask) -> bool:
        """Whether a point near the optima violates a row by more than rounding."""
        gap = self.normals @ primal - self.limits
        allowed = 1e-9 * (1.0 + np.where(np.isfinite(self.limits), np.abs(self.limits), 0.0) + np.abs(primal).max())
        return bool(np.any(gap > allowed) or np.any(np.abs(gap[support]) > allowed[support]))


def _orthonormal(columns: FloatArray) -> FloatArray:
    """Return an orthonormal basis of the span of independent columns, accurate in every row whatever its size."""
    basis = columns.copy()
    for j in range(basis.shape[1]):
        for _ in range(2):
            basis[:, j] -= basis[:, :j] @ (basis[:, :j].T @ basis[:, j])
            basis[:, j] /= np.linalg.norm(basis[:, j])
    return basis


def _problem(hessian: FloatArray, rhs_primal: FloatArray, rows: FloatArray, rhs: FloatArray) -> QPValues:
    """Write ``1/2 y'Hy - a'y, rows y <= rhs`` for a batch of linear terms."""
    batch, n = rhs_primal.shape
    nothing = np.zeros(0, dtype=np.int64)
    empty = np.zeros((batch, 0))
    singular = bool(np.linalg.eigvalsh(hessian)[0] <= 1e-10) if n else False
    proximal = np.arange(n, dtype=np.int64) if singular else nothing
    return QPValues(
        np.ascontiguousarray(hessian)[None], np.ascontiguousarray(rhs_primal), np.ascontiguousarray(rows)[None], 0,
        np.tile(rhs, (batch, 1)), nothing, empty, empty, proximal,
    )  # fmt: skip


def _least_norm(
    seen: FloatArray, point: FloatArray, rows: FloatArray, slack: FloatArray, options: Options
) -> tuple[FloatArray | None, Mask]:
    """Minimise ``|point + seen y|`` subject to ``rows y <= slack``; return y and the rows that push."""
    values = _problem(seen.T @ seen, -(seen.T @ point)[None], rows, slack)
    strict = replace(options, keep_face=True, multipliers=True, tolerance=1e-9)
    found = active_set.solve(values, strict)
    if len(values.proximal) and isinstance(found.face, GramFace):
        every = np.ones(values.num_variables, dtype=bool)
        found = replace(found, face=LeastNormFace(values, found.face.active_rows, found.face.active_bounds, every))
    found = active_set.verify(values, strict, found)
    if found.status[0] != Status.SOLVED:
        return None, np.zeros(len(rows), dtype=bool)
    size = max(float(np.abs(seen.T @ point).max(initial=0.0)), 1e-300)
    return found.primal[0], found.rows[0] * np.linalg.norm(rows, axis=1) > _MULTIPLIER * size


def _project_onto_cone(rows: FloatArray, points: FloatArray) -> FloatArray:
    """Project points (B, p) onto ``{y: rows y <= 0}``; the rows have unit norm before they are restricted."""
    kept = rows[np.abs(rows).max(axis=1, initial=0.0) > 1e-10]
    values = _problem(np.eye(points.shape[1]), points, kept, np.zeros(len(kept)))
    found = active_set.solve(values, Options(keep_face=False))
    return np.where((found.status == Status.SOLVED)[:, None], found.primal, 0.0)


def _has_part(weak: FloatArray, seen: FloatArray) -> bool:
    """Whether the cone ``{y: weak y <= 0}`` holds a y with ``seen y != 0``."""
    _, singular, right = np.linalg.svd(seen, full_matrices=False)
    directions = right[singular > 1e-8]
    if not len(weak) or not len(directions):
        return bool(len(directions))
    # y has a part there exactly when y'v > 0 for v = a direction or its opposite: when v does not project to zero.
    projected = _project_onto_cone(weak, np.concatenate([directions, -directions]))
    return bool(np.any(np.linalg.norm(projected, axis=1) > _RAY))
