"""Multipliers of least norm where active rows are dependent.

At a solution x with active rows N_I (equalities and bounds among them) the multipliers form the polyhedron

    { w :  N_I'w = a - H x,   w_i >= 0 on inequalities },

one point exactly when the rows are independent. Otherwise the solvers end at some vertex of it, which depends on the
way they took; this module replaces that vertex by the point of least norm, which depends on the data alone, and the
face by one whose multipliers are of least norm as well. The point and the primal part of the face stay. Rows that a
solver cannot tell from dependent ones, but the face can, come out as the independent rows that they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hsbackend.batched import matvec
from hsbackend.face import Face, KKTSolution, LeastNormFace, Mask, MixedFace
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers import active_set, interior_point
from hsbackend.solvers.result import Options, Result
from hsbackend.status import Status

#: Multipliers of the wrong sign up to this, relative to the largest, are rounding.
_NEGATIVE = 1e-11
#: KKT residual that is as good as any.
_RESIDUAL = 1e-11
#: Distance from a row, relative to its terms, that is rounding; a hundred times that with more than so many variables.
_ROUNDING, _SMALL = 1e-14, 100
#: Rows that are taken out of a face at the most because their multiplier has the wrong sign.
_DROPS = 10


def refine(values: QPValues, options: Options, result: Result, read: Mask | None = None) -> Result:
    """Choose the multipliers of least norm in the items whose active rows are dependent.

    Where rows are only nearly dependent, the point moves to where all of them hold.

    Args:
        values: the problems.
        options: which rows belong to the face.
        result: the solver's; its arrays are overwritten in those items.
        read: (n,) variables whose norm selects among the optima, all by default.

    Returns:
        The result with a face that knows about the dependence; unchanged without a face.
    """
    if result.face is None:
        return result
    chosen = result.face.dependent
    selecting = _selecting(result.face, values.batch)
    if selecting.any():
        chosen = chosen | (selecting & _beside(values, result.face, result.primal))
    chosen = chosen & (result.status == Status.SOLVED) & ~_settled(result.face, values.batch)
    items = np.flatnonzero(chosen).astype(np.int64)
    if not len(items):
        return result
    part, before = values.take(items), result.take(items)
    read = np.ones(values.num_variables, dtype=bool) if read is None else read
    face = LeastNormFace(part, result.face.active_rows[items], result.face.active_bounds[items], read)
    old = active_set.residuals(part, before.primal, before.rows, before.bounds)[2]
    beside = _beside(part, face, before.primal)
    if not options.multipliers and (face.dependent & ~beside).all():  # nobody reads them: what matters is the face
        return _with_face(result, face, items)
    found = _unsigned(part, face)
    signs = _Signs.of(part, face)
    # Where the tolerance is near, no digit is given away.
    limit = np.maximum(np.minimum(10.0 * old, 0.1 * options.tolerance), np.maximum(old, _RESIDUAL))
    wrong = signs.wrong(found)
    settled = _drop_wrong(part, face, signs, found, wrong & (beside | ~face.dependent), limit)
    projected = face.dependent & wrong & options.multipliers
    for b in np.flatnonzero(projected):
        projected[b] = _project(part, options, int(b), face, found, float(limit[b]))
    # Of the rows that a solver calls dependent some may be only nearly so: one point lies on all of them, which the
    # solver cannot see, and these multipliers belong to it.
    moves = (beside | ~face.dependent) & (~wrong | settled | projected)
    primal = np.where(moves[:, None], found.primal, before.primal)
    rows, bounds = signs.clipped(found)
    new = active_set.residuals(part, primal, rows, bounds)[2]
    keep = np.flatnonzero((face.dependent | ~wrong | settled) & (new <= limit))
    result.primal[items[keep]], result.rows[items[keep]] = primal[keep], rows[keep]
    result.bounds[items[keep]] = bounds[keep]
    return _with_face(result, face, items)


def _selecting(face: Face, batch: int) -> Mask:
    """Return (B,) which items have a face that can tell nearly dependent rows apart, and a point found elsewhere."""
    if isinstance(face, MixedFace):
        found = _selecting(face.first, batch)
        found[face.items] = _selecting(face.second, len(face.items))
        return found
    return np.full(batch, isinstance(face, LeastNormFace))


def _settled(face: Face, batch: int) -> Mask:
    """Return (B,) which items have the multipliers of least norm already."""
    if isinstance(face, MixedFace):
        found = _settled(face.first, batch).copy()
        found[face.items] = _settled(face.second, len(face.items))
        return found
    if isinstance(face, LeastNormFace) and face.known is not None:
        return face.known.settled
    return np.zeros(batch, dtype=bool)


def _beside(values: QPValues, face: Face, primal: FloatArray) -> Mask:
    """Return (B,) whether a point misses an active row by more than rounding."""
    active = face.active_rows != 0
    limits = np.where(active, values.rhs_rows, 0.0)
    terms = matvec(np.abs(values.rows), np.abs(primal)) + np.abs(limits)
    rounding = _ROUNDING if values.num_variables <= _SMALL else 100.0 * _ROUNDING
    return (active & (np.abs(matvec(values.rows, primal) - limits) > rounding * terms)).any(axis=1)


@dataclass(frozen=True)
class _Signs:
    """Which multipliers of a batch have to be non-negative, and on which side.

    Attributes:
        rows: (m,) whether a row is an inequality.
        bounds: (B, nb) 1 at an active upper limit, -1 at a lower one, 0 where both coincide or neither is active.
    """

    rows: Mask
    bounds: FloatArray

    @classmethod
    def of(cls, values: QPValues, face: LeastNormFace) -> _Signs:
        """Read them off the problems and the active sides."""
        inequality = np.arange(values.rhs_rows.shape[1]) >= values.num_equalities
        return cls(inequality, np.where(values.lower == values.upper, 0.0, face.active_bounds))

    def pushing(self, found: KKTSolution) -> FloatArray:
        """Return (B, m + nb) the multipliers that must not be negative, zero in the place of the others."""
        return np.concatenate([np.where(self.rows, found.rows, 0.0), found.bounds * self.bounds], axis=1)

    def wrong(self, found: KKTSolution) -> Mask:
        """Return (B,) whether a multiplier has the wrong sign by more than rounding."""
        pushing = self.pushing(found)
        return pushing.min(axis=1, initial=0.0) < -_NEGATIVE * np.abs(pushing).max(axis=1, initial=0.0)

    def clipped(self, found: KKTSolution) -> tuple[FloatArray, FloatArray]:
        """Return the multipliers with zeros in the place of those of the wrong sign."""
        rows = np.where(~self.rows | (found.rows > 0.0), found.rows, 0.0)
        return rows, np.where((self.bounds == 0.0) | (found.bounds * self.bounds > 0.0), found.bounds, 0.0)


def _drop_wrong(
    values: QPValues, face: LeastNormFace, signs: _Signs, found: KKTSolution, wrong: Mask, limit: FloatArray
) -> Mask:
    """Solve again without the row of the most negative multiplier, until no sign is wrong.

    The multiplier of a row that is active but does not push is zero, and comes out with any sign where the row is
    nearly dependent on others: its error grows with the square of the condition. Without that row the same point is
    found to full accuracy.

    Args:
        values: the problems.
        face: all active rows.
        signs: of their multipliers.
        found: point and multipliers on the face; overwritten where this succeeds.
        wrong: (B,) items to look at.
        limit: (B,) largest residual that is accepted.

    Returns:
        (B,) the items that now have multipliers of the right sign.
    """
    settled = np.zeros(values.batch, dtype=bool)
    items = np.flatnonzero(wrong).astype(np.int64)
    rows, bounds = face.active_rows[items].copy(), face.active_bounds[items].copy()
    pushing = signs.pushing(found)[items]
    for _ in range(_DROPS):
        if not len(items):
            break
        worst = pushing.argmin(axis=1)
        m, every = rows.shape[1], np.arange(len(items))
        general = worst < m
        rows[every[general], worst[general]] = 0
        bounds[every[~general], worst[~general] - m] = 0
        part = values.take(items)
        smaller = LeastNormFace(part, rows, bounds, face.read)
        there = _Signs.of(part, smaller)
        again = _unsigned(part, smaller)
        residual = active_set.residuals(part, again.primal, *there.clipped(again))[2]
        bad = there.wrong(again)
        good = ~bad & (residual <= limit[items])
        for old, new in ((found.primal, again.primal), (found.rows, again.rows), (found.bounds, again.bounds)):
            old[items[good]] = new[good]
        settled[items[good]] = True
        items, rows, bounds, pushing = items[bad], rows[bad], bounds[bad], there.pushing(again)[bad]
    return settled


def _with_face(result: Result, face: LeastNormFace, items: IndexArray) -> Result:
    """Put the face of some items in the place of the solver's."""
    if result.face is None:
        return result
    # A face of that kind gives multipliers of least norm already.
    other = np.flatnonzero(~_selecting(result.face, len(result.status))[items]).astype(np.int64)
    if not len(other):
        return result
    if len(other) < len(items):
        face = LeastNormFace(face.values.take(other), face.active_rows[other], face.active_bounds[other], face.read)
        items = items[other]
    return replace(result, face=face if len(items) == len(result.status) else MixedFace(result.face, face, items))


def _unsigned(values: QPValues, face: LeastNormFace) -> KKTSolution:
    """Solve for the point on all active rows and its multipliers of least norm, of any sign."""
    sides = face.active_bounds
    limits = np.where(sides > 0, values.upper, np.where(sides < 0, values.lower, 0.0))
    found = face.kkt_solve(values.rhs_primal, np.where(face.active_rows != 0, values.rhs_rows, 0.0), limits)
    # Nearly dependent rows: a step of refinement gains as many digits as the square of the condition leaves.
    stationarity, gaps, _ = active_set.residuals(values, found.primal, found.rows, found.bounds)
    beyond = np.where(sides != 0, found.primal[:, values.bounded] - limits, 0.0)
    step = face.kkt_solve(-stationarity, -np.where(np.isfinite(gaps), gaps, 0.0), -beyond)
    return KKTSolution(found.primal + step.primal, found.rows + step.rows, found.bounds + step.bounds)


def _project(part: QPValues, options: Options, b: int, face: LeastNormFace, found: KKTSolution, limit: float) -> bool:
    """Find the multipliers of least norm of one item among those of the right sign.

    Args:
        part: the problems.
        options: tolerances.
        b: the item.
        face: all active rows.
        found: point and multipliers, some of the wrong sign; overwritten where this succeeds.
        limit: largest residual that is accepted.

    Returns:
        Whether it succeeds.
    """
    multipliers = _among_signed(part, options, b, face, found)
    if multipliers is None:
        return False
    one = part.take(np.array([b]))
    # The multiplier of a bound is what the rows leave of its component, however small beside the others.
    nothing, held = np.zeros((1, len(part.bounded))), face.active_bounds[b] != 0
    left = -active_set.residuals(one, found.primal[b][None], multipliers[0][None], nothing)[0][:, part.bounded]
    hessian = np.abs(one.hessian[0])
    curved = hessian * np.abs(found.primal[b]) if one.diagonal else hessian @ np.abs(found.primal[b])
    terms = np.abs(one.rhs_primal[0]) + curved + np.abs(multipliers[0]) @ np.abs(one.rows[0])
    bounds = np.where(held & (np.abs(left[0]) > _ROUNDING * terms[part.bounded]), left[0], 0.0)
    right = (part.lower[b] == part.upper[b]) | (bounds * face.active_bounds[b] > 0.0)
    multipliers = multipliers[0], np.where(right, bounds, 0.0)
    there = KKTSolution(found.primal[b][None], multipliers[0][None], multipliers[1][None])
    inequality = np.arange(part.rhs_rows.shape[1]) >= part.num_equalities
    free = inequality & (multipliers[0] == 0.0)
    sides = np.where((multipliers[1] != 0.0) | (part.lower[b] == part.upper[b]), face.active_bounds[b], 0)
    support = LeastNormFace(one, np.where(free, 0, face.active_rows[b])[None], sides[None], face.read)
    # On the rows that push the same multipliers come out to full accuracy.
    signs = _Signs.of(one, support)
    polished = _unsigned(one, support)
    if not signs.wrong(polished)[0]:
        residual = active_set.residuals(one, polished.primal, *signs.clipped(polished))[2]
        if residual[0] <= limit:
            there = polished
    found.primal[b], found.rows[b], found.bounds[b] = there.primal[0], there.rows[0], there.bounds[0]
    return True


def _among_signed(
    part: QPValues, options: Options, b: int, face: LeastNormFace, start: KKTSolution
) -> tuple[FloatArray, FloatArray] | None:
    """Project zero onto the multipliers of the right sign of one item; None if that fails."""
    at, bound_at = np.flatnonzero(face.active_rows[b]), np.flatnonzero(face.active_bounds[b])
    n = part.num_variables
    normals = np.zeros((len(at) + len(bound_at), n))
    normals[: len(at)] = part.rows[b if part.rows.shape[0] > 1 else 0][at]
    side = face.active_bounds[b, bound_at].astype(np.float64)
    normals[np.arange(len(at), len(normals)), part.bounded[bound_at]] = side
    target = normals.T @ np.concatenate([start.rows[b, at], start.bounds[b, bound_at] * side])
    signed = np.concatenate([at >= part.num_equalities, part.lower[b, bound_at] != part.upper[b, bound_at]])
    restricted = np.flatnonzero(signed).astype(np.int64)
    problem = QPValues(
        np.ones((1, len(normals))), np.zeros((1, len(normals))), np.ascontiguousarray(normals.T)[None], n, target[None],
        restricted, np.zeros((1, len(restricted))), np.full((1, len(restricted)), np.inf), np.zeros(0, dtype=np.int64),
    )  # fmt: skip
    # The answer is judged by what it does to the problem, not by this.
    settings = replace(options, keep_face=True, jacobian="active", tolerance=1e-6)
    found = active_set.verify(problem, settings, active_set.solve(problem, settings))
    if found.status[0] != Status.SOLVED:
        found = interior_point.solve(problem, settings)
    if found.status[0] != Status.SOLVED:
        return None
    w = found.primal[0]
    _, at_zero = interior_point.active_sides(problem, found.primal, found.rows, found.bounds)
    w[restricted] = np.where(at_zero[0] != 0, 0.0, np.maximum(w[restricted], 0.0))
    rows, bounds = np.zeros(part.rhs_rows.shape[1]), np.zeros(len(part.bounded))
    rows[at], bounds[bound_at] = w[: len(at)], w[len(at) :] * side
    return rows, bounds
