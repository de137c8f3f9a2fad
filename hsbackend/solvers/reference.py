"""Reference solver: plain NumPy, one item at a time, the truth the tests judge the others by.

The strictly convex problem becomes a least-distance problem in the metric of the Hessian,

    minimise ||s||^2 subject to C s >= f,

whose dual is a non-negative least-squares problem: with ``E = [C'; f']`` and ``e = (0, ..., 0, 1)`` let
``r = E z - e`` for the minimiser ``z >= 0`` of ``||E z - e||``; then ``s = -r[:n] / r[n]``, and the constraints are
incompatible exactly when r = 0 (Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23). SciPy's
``nnls`` solves it, in balanced units. The active rows found there are polished by a dense least-squares solve of the
KKT system, and the derivative uses that dense system too: no shortcut is shared with the fast solvers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from hsbackend.face import DenseFace
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers.result import Options, Result
from hsbackend.solvers.scaling import Scaling, without_invalid
from hsbackend.status import Status


@dataclass(frozen=True)
class _Item:
    hessian: FloatArray
    linear: FloatArray
    equalities: FloatArray
    rhs_equalities: FloatArray
    inequalities: FloatArray
    rhs_inequalities: FloatArray


def _dense_item(values: QPValues, b: int) -> _Item:
    """Write one item with every limit as a row ``G x <= h``: general rows, upper bounds, lower bounds."""

    def pick(array: FloatArray) -> FloatArray:
        return array[b if array.shape[0] > 1 else 0]

    hessian = pick(values.hessian)
    if values.diagonal:
        hessian = np.diag(hessian)
    rows = pick(values.rows)
    me = values.num_equalities
    units = np.eye(values.num_variables)[values.bounded]
    return _Item(
        hessian,
        values.rhs_primal[b],
        rows[:me],
        values.rhs_rows[b, :me],
        np.concatenate([rows[me:], units, -units]),
        np.concatenate([values.rhs_rows[b, me:], values.upper[b], -values.lower[b]]),
    )


def _active_rows(c: FloatArray, f: FloatArray) -> IndexArray | None:
    """Return the rows that push at the shortest s with ``c s >= f``; None if there is no such s."""
    if not np.any(f > 1e-13 * (1.0 + np.abs(f).max(initial=0.0))):
        return np.zeros(0, dtype=np.int64)
    # r[n] = -1 / (1 + ||s||^2) with s in units of the scale: make that unit comparable with the distance.
    weights, reach = np.zeros(len(f)), 0.0
    for scale in float(np.abs(f).max()) * np.array([1.0, 1e2, 1e4, 1e6]):
        stacked = np.concatenate([c.T, f[None] / scale])
        target = np.zeros(len(stacked))
        target[-1] = 1.0
        weights, _ = nnls(stacked, target, maxiter=50 * (len(f) + c.shape[1]))
        reach = -float((stacked @ weights - target)[-1])
        if reach > 1e-4:
            break
    if not reach > 1e-10:
        return None
    return np.flatnonzero(weights > 1e-12 * weights.max(initial=0.0)).astype(np.int64)


def _solve_item(item: _Item) -> tuple[Status, FloatArray, FloatArray, FloatArray]:
    """Return status, x, equality multipliers and inequality multipliers of one item."""
    n = len(item.linear)
    nothing = np.full(n, np.nan), np.zeros(len(item.rhs_equalities)), np.zeros(len(item.rhs_inequalities))
    everything = (item.hessian, item.linear, item.equalities, item.rhs_equalities, item.inequalities)
    if not all(np.all(np.isfinite(array)) for array in everything) or np.isnan(item.rhs_inequalities).any():
        return Status.INVALID_INPUT, *nothing
    if np.any(item.rhs_inequalities == -np.inf):
        return Status.INFEASIBLE, *nothing
    finite = np.flatnonzero(item.rhs_inequalities < np.inf)
    g, h = item.inequalities[finite], item.rhs_inequalities[finite]
    # x = particular + basis @ y removes the equalities.
    particular, *_ = np.linalg.lstsq(item.equalities, item.rhs_equalities, rcond=None)
    gap = item.equalities @ particular - item.rhs_equalities
    if np.abs(gap).max(initial=0.0) > 1e-8 * (1.0 + np.abs(item.rhs_equalities).max(initial=0.0)):
        return Status.INFEASIBLE, *nothing
    _, singular, right = np.linalg.svd(item.equalities, full_matrices=True)
    basis = right[int(np.sum(singular > 1e-11 * max(1.0, singular.max(initial=0.0)))) :].T
    inner = basis.T @ item.hessian @ basis
    if basis.shape[1]:
        try:
            lower = np.linalg.cholesky(inner)
        except np.linalg.LinAlgError:
            return Status.NOT_STRICTLY_CONVEX, *nothing
        centre = np.linalg.solve(inner, basis.T @ (item.linear - item.hessian @ particular))
        # s = L'(y - centre): C s >= f is  -G basis L^-T s >= G (particular + basis centre) - h.
        start = particular + basis @ centre
        c = -np.linalg.solve(lower, (g @ basis).T).T
    else:
        start, c = particular, np.zeros((len(h), 0))
    size = np.linalg.norm(g, axis=1)
    norm = np.where(size > 0.0, 1.0 / np.where(size > 0.0, size, 1.0), 1.0)
    c, f = np.asarray(c * norm[:, None]), np.asarray((g @ start - h) * norm)
    # Rows that the equalities determine (or that are empty) are conditions on the data alone.
    decided = np.linalg.norm(c, axis=1) <= 1e-12 * (1.0 + np.abs(c).max(initial=0.0))
    if np.any(f[decided] > 1e-8 * (1.0 + np.abs(start).max(initial=0.0))):
        return Status.INFEASIBLE, *nothing
    finite, g, h, norm = finite[~decided], g[~decided], h[~decided], norm[~decided]
    c, f = c[~decided], f[~decided]
    # Rows that all meet in one point may contradict each other by rounding: then they hold up to rounding.
    terms = (np.abs(g) @ np.abs(start) + np.abs(h)) * norm
    c, f = np.asarray(c, dtype=np.float64), np.asarray(f, dtype=np.float64)
    active = _active_rows(c, f)
    if active is None:
        active = _active_rows(c, np.asarray(f - 1e-9 * terms, dtype=np.float64))
    if active is None:
        return Status.INFEASIBLE, *nothing
    # Polish on the active rows.
    normals = np.concatenate([item.equalities, g[active]])
    m = len(normals)
    system = np.block([[item.hessian, normals.T], [normals, np.zeros((m, m))]])
    right_side = np.concatenate([item.linear, item.rhs_equalities, h[active]])
    solution, *_ = np.linalg.lstsq(system, right_side, rcond=1e-13)
    x, nu = solution[:n], solution[n:]
    multipliers = np.zeros(len(item.rhs_inequalities))
    multipliers[finite[active]] = nu[len(item.equalities) :]
    worst = max(
        float(np.abs(system @ solution - right_side).max(initial=0.0)),
        float(np.maximum((g @ x - h) * norm, 0.0).max(initial=0.0)),
        float(np.maximum(-multipliers, 0.0).max(initial=0.0)),
    )
    outcome = Status.SOLVED if worst <= 1e-8 * (1.0 + np.abs(solution).max(initial=0.0)) else Status.NOT_CONVERGED
    equality = np.asarray(nu[: len(item.equalities)], dtype=np.float64)
    return outcome, np.asarray(x, dtype=np.float64), equality, multipliers


def solve(values: QPValues, options: Options) -> Result:
    """Solve every item of a batch; arguments and result as for the fast solvers, cost O(B (n + m)^3)."""
    values, invalid = without_invalid(values)
    scaling = Scaling.of(values.hessian, values.rows)
    if scaling is None:
        result = _solve(values, options)
    else:
        found = _solve(scaling.apply(values), options)
        face = found.face
        result = scaling.undo(values, found)
        if face is not None:
            result = replace(result, face=DenseFace(values, face.active_rows, face.active_bounds))
    result.status[invalid] = Status.INVALID_INPUT
    return result


def _solve(values: QPValues, options: Options) -> Result:
    """Solve every item in the units of its data."""
    batch, n = values.batch, values.num_variables
    m, nb, me = values.rhs_rows.shape[1], len(values.bounded), values.num_equalities
    primal, rows, bounds = np.full((batch, n), np.nan), np.zeros((batch, m)), np.zeros((batch, nb))
    status = np.zeros(batch, dtype=np.int8)
    side_rows = np.zeros((batch, m), dtype=np.int64)
    side_bounds = np.zeros((batch, nb), dtype=np.int64)
    tolerance = options.active_tolerance
    for b in range(batch):
        item = _dense_item(values, b)
        outcome, x, equality, inequality = _solve_item(item)
        status[b] = outcome
        if outcome != Status.SOLVED:
            continue
        primal[b] = x
        split = m - me
        rows[b, :me], rows[b, me:] = equality, inequality[:split]
        upper, lower = inequality[split : split + nb], inequality[split + nb :]
        bounds[b] = upper - lower
        if options.jacobian == "support":
            member = inequality > tolerance * (1.0 + np.abs(inequality).max(initial=0.0))
        else:
            slack = item.rhs_inequalities - item.inequalities @ x
            member = slack <= tolerance * 10.0 * (1.0 + np.where(np.isfinite(slack), np.abs(slack), 0.0))
            member |= inequality > 0.0
        side_rows[b, :me] = 1
        side_rows[b, me:] = member[:split]
        side_bounds[b] = np.where(member[split : split + nb], 1, np.where(member[split + nb :], -1, 0))
    face = DenseFace(values, side_rows, side_bounds) if options.keep_face else None
    return Result(primal, rows, bounds, status, np.zeros(batch, dtype=np.int64), face)
