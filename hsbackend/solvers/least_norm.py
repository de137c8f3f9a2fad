"""Multipliers of least norm where active rows are dependent.

At a solution x with active rows N_I (equalities and bounds among them) the multipliers form the polyhedron

    { w :  N_I'w = a - H x,   w_i >= 0 on inequalities },

one point exactly when the rows are independent. Otherwise the solvers end at some vertex of it, which depends on the
way they took; this module replaces that vertex by the point of least norm, which depends on the data alone, and the
face by one whose multipliers are of least norm as well. The point and the primal part of the face stay. Rows that a
solver cannot tell from dependent ones, but the face can, come out as the independent rows that they are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hsbackend.face import KKTSolution, LeastNormFace, Mask, MixedFace
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers import active_set, interior_point
from hsbackend.solvers.result import Options, Result
from hsbackend.status import Status

#: Multipliers of the wrong sign up to this, relative to the largest, are rounding.
_NEGATIVE = 1e-11
#: KKT residual that is as good as any.
_RESIDUAL = 1e-11


def refine(values: QPValues, options: Options, result: Result, read: Mask | None = None) -> Result:
    """Choose the multipliers of least norm in the items whose active rows are dependent.

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
    items = np.flatnonzero(result.face.dependent & (result.status == Status.SOLVED)).astype(np.int64)
    if not len(items):
        return result
    part, before = values.take(items), result.take(items)
    read = np.ones(values.num_variables, dtype=bool) if read is None else read
    face = LeastNormFace(part, result.face.active_rows[items], result.face.active_bounds[items], read)
    if not options.multipliers and face.dependent.all():  # nobody reads them: what matters is the face
        return _with_face(result, face, items)
    found = _unsigned(part, face)
    equality = np.arange(values.rhs_rows.shape[1]) < values.num_equalities
    fixed = part.lower == part.upper
    pushing = np.concatenate(
        [np.where(equality, 0.0, found.rows), np.where(fixed, 0.0, found.bounds * face.active_bounds)], axis=1
    )
    wrong = pushing.min(axis=1, initial=0.0) < -_NEGATIVE * np.abs(pushing).max(axis=1, initial=0.0)
    rows = np.where(equality | (found.rows > 0.0), found.rows, 0.0)
    bounds = np.where(fixed | (found.bounds * face.active_bounds > 0.0), found.bounds, 0.0)
    for b in np.flatnonzero(wrong & face.dependent & options.multipliers):
        projected = _project(part, options, int(b), face, found)
        if projected is not None:
            rows[b], bounds[b] = projected
    # What a solver calls dependent may be only nearly so: then one point lies on all rows, which it cannot see.
    primal = np.where((face.dependent | wrong)[:, None], before.primal, found.primal)
    old = active_set.residuals(part, before.primal, before.rows, before.bounds)[2]
    new = active_set.residuals(part, primal, rows, bounds)[2]
    keep = np.flatnonzero((face.dependent | ~wrong) & (new <= np.maximum(10.0 * old, _RESIDUAL)))
    result.primal[items[keep]], result.rows[items[keep]] = primal[keep], rows[keep]
    result.bounds[items[keep]] = bounds[keep]
    return _with_face(result, face, items)


def _with_face(result: Result, face: LeastNormFace, items: IndexArray) -> Result:
    """Put the face of some items in the place of the solver's."""
    if isinstance(result.face, LeastNormFace) or result.face is None:
        return result  # it gives multipliers of least norm already
    return replace(result, face=face if len(items) == len(result.status) else MixedFace(result.face, face, items))


def _unsigned(values: QPValues, face: LeastNormFace) -> KKTSolution:
    """Solve for the multipliers of least norm, of any sign."""
    sides = face.active_bounds
    limits = np.where(sides > 0, values.upper, np.where(sides < 0, values.lower, 0.0))
    return face.kkt_solve(values.rhs_primal, np.where(face.active_rows != 0, values.rhs_rows, 0.0), limits)


def _project(
    part: QPValues, options: Options, b: int, face: LeastNormFace, start: KKTSolution
) -> tuple[FloatArray, FloatArray] | None:
    """Find the multipliers of least norm of one item among those of the right sign; None if that fails."""
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
