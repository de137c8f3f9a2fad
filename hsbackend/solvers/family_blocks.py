"""Blocks of a named family inside a program: the family's columns and rows are the program's up to order and scale.

Each class carries right-hand sides and solutions of one family across, in both directions and by the same linear maps
for the solution and for the KKT system on its face. Shifts (a lower bound that is not zero, gaps in a chain, the centre
of a ball) are particular solutions subtracted before and added after.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsbackend.face import FacePart, KKTSolution
from hsbackend.families import budget, l1, monotone, transport
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers._places import Columns, Rows, Structure, merge_status
from hsbackend.solvers.result import Options, Result
from hsbackend.status import Status
from hsbackend.structure import Group


def _chain(steps: FloatArray) -> FloatArray:
    """Return the offsets E with ``E_1 = 0`` and ``E_(i+1) = E_i + steps_i``."""
    out = np.zeros((steps.shape[0], steps.shape[1] + 1))
    np.cumsum(steps, axis=1, out=out[:, 1:])
    return out


class _Family:
    """What the adaptors of the four families share."""

    def __init__(self, group: Group, structure: Structure) -> None:
        self.group = group
        self.columns = Columns(group, structure.num_variables, structure.bounded, structure.limits)
        self.rows = Rows(group, structure.num_equalities)
        self.level = bool(len(group.rows.ravel())) and not (
            structure.rhs_varies[group.rows.ravel()].any() or structure.rhs_constant[group.rows.ravel()].any()
        )

    def coefficients(self, values: QPValues) -> FloatArray | None:
        """Return the entries of the family's weighted row, (1 or B G, n), None for ones."""
        if self.group.varying:
            picked = values.rows[:, self.group.rows[:, 0, 0][:, None], self.group.variables]
            if picked.shape[0] == 1:
                return self.columns.repeat(picked[0], values.batch)
            return np.ascontiguousarray(picked).reshape(-1, self.columns.size)
        if self.group.coefficients is None:
            return None
        return self.columns.repeat(self.group.coefficients, values.batch)

    def report(
        self, status: NDArray[np.int8], wrong: NDArray[np.bool_] | None, weight: FloatArray | None, result: Result
    ) -> None:
        """Carry the status of the blocks to their items: invalid input first, then any other failure."""
        if wrong is not None and wrong.any():
            status = np.where((status == Status.SOLVED) & wrong, np.int8(Status.INFEASIBLE), status)
        if (
            weight is not None and status.any()
        ):  # a Hessian that is not positive is not the input's fault; the active set says so
            flat = np.broadcast_to((weight <= 0.0).any(axis=1), status.shape)
            status = np.where(flat & (status == Status.INVALID_INPUT), np.int8(Status.NOT_STRICTLY_CONVEX), status)
        merge_status(status, result)


def _unconstrained(linear: FloatArray, factor: float, weight: FloatArray | None) -> FloatArray:
    """Return the minimiser without rows; a weight of zero has a status, not a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return linear / factor if weight is None else linear / weight


class BudgetBlocks(_Family):
    """``lower <= x <= upper`` and at most one row."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        """Solve the blocks; as every part of :mod:`hsbackend.solvers.blocks` does."""
        columns, rows = self.columns, self.rows
        factor, weight = columns.hessian(values)
        linear = columns.take(values.rhs_primal)
        point = _unconstrained(linear, factor, weight)
        coefficients = self.coefficients(values)
        lower, upper = columns.limits(values)
        wrong = None
        if rows.size:
            low, high, wrong = rows.interval(values.rhs_rows)
            rhs = np.concatenate([low, high], axis=1)
        else:
            rhs = np.array([[-np.inf, np.inf]])
        shape = (columns.size,)
        found = budget.solve(point, weight, coefficients, rhs, lower, upper, shape, options.jacobian)
        self.report(found.status, wrong, weight, result)
        columns.put(found.primal, result.primal)
        side = found.face[:, :-1]
        row_side = found.face[:, -1]
        nu = factor * found.multipliers
        chosen = None
        if rows.size:
            chosen = rows.choose(values.rhs_rows, row_side)
            rows.put(nu, chosen, result.rows)
        if options.multipliers and len(columns.has):
            curvature = factor if weight is None else weight
            gradient = linear - curvature * found.primal
            if rows.size:
                gradient -= nu if coefficients is None else nu * coefficients
            columns.put_bounds(np.where(side != 0, gradient, 0.0), result.bounds)

        def kkt(g: FloatArray, r: FloatArray, r_bounds: FloatArray, out: KKTSolution) -> None:
            rhs_rows = rows.take(r, chosen) if rows.size else None
            rhs_bounds = columns.take_bounds(r_bounds) if len(columns.has) else None
            target = columns.take(g) if factor == 1.0 else columns.take(g) / factor
            solved = budget.kkt(found.face, found.primal, weight, coefficients, target, rhs_rows, rhs_bounds, shape)
            columns.put(solved.primal, out.primal)
            if rows.size:
                rows.put(factor * solved.rows, chosen, out.rows)
            columns.put_bounds(factor * solved.bounds, out.bounds)

        def sides(row_sides: IndexArray, bound_sides: IndexArray) -> None:
            columns.put_bounds(side, bound_sides)
            if rows.size:
                active = np.zeros(row_sides.shape)
                rows.put(np.abs(np.sign(row_side.astype(np.float64)))[:, None], chosen, active)
                np.copyto(row_sides, 1, where=active != 0.0)

        return FacePart(kkt, sides)


class MonotoneBlocks(_Family):
    """A chain ``x_i - x_(i+1) <= d_i`` with a limit at each end; shifted to ``y_1 <= ... <= y_n``."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        """Solve the blocks; as every part of :mod:`hsbackend.solvers.blocks` does."""
        columns, rows = self.columns, self.rows
        n = columns.size
        factor, weight = columns.hessian(values)
        linear = columns.take(values.rhs_primal)
        point = _unconstrained(linear, factor, weight)
        if rows.plain and self.level:
            offset, steps = None, None
        else:
            _, steps, _ = rows.interval(values.rhs_rows)
            offset = _chain(steps)
            point = point + offset
        lower, upper = columns.limits(values)
        items = len(point)
        rhs = np.empty((items, 2))
        rhs[:, 0] = -np.inf if lower is None or not self.group.ends[0] else lower[:, 0]
        rhs[:, 1] = np.inf if upper is None or not self.group.ends[1] else upper[:, -1]
        if offset is not None:
            rhs[:, 1] += offset[:, -1]
        found = monotone.solve(point, weight, None, rhs, None, None, (n,), options.jacobian)
        self.report(found.status, None, weight, result)
        primal = found.primal if offset is None else found.primal - offset
        columns.put(primal, result.primal)
        curvature = factor if weight is None else weight
        block = found.face[:, :n]
        tied = block[:, 1:] == block[:, :-1]
        ones = np.ones((items, n - 1), dtype=np.int64)
        chosen = rows.choose(values.rhs_rows, ones)

        def chain_multipliers(gradient: FloatArray, ends: FloatArray) -> FloatArray:
            gradient = gradient.copy()
            gradient[:, 0] -= ends[:, 0]
            return np.where(tied, np.cumsum(gradient, axis=1)[:, :-1], 0.0)

        def put_ends(ends: NDArray[Any], out: NDArray[Any]) -> None:
            at_bounds = np.zeros((items, n), dtype=ends.dtype)
            at_bounds[:, 0] = ends[:, 0]
            at_bounds[:, -1] += ends[:, 1]
            columns.put_bounds(at_bounds, out)

        nu = factor * found.multipliers
        rows.put(np.maximum(chain_multipliers(linear - curvature * primal, nu), 0.0), chosen, result.rows)
        put_ends(nu, result.bounds)
        held = found.face[:, n:].astype(np.int64) * np.array([[-1, 1]])
        both = (held[:, 0] != 0) & (held[:, 1] != 0) & (block[:, 0] == block[:, -1])
        held[both, 1] = 0  # one block between equal limits: the lower one holds it

        def kkt(g: FloatArray, r: FloatArray, r_bounds: FloatArray, out: KKTSolution) -> None:
            target = columns.take(g)
            steps = np.where(tied, rows.take(r, chosen), 0.0)
            shift = _chain(steps) if steps.any() else None
            at_bounds = columns.take_bounds(r_bounds)
            ends = at_bounds[:, [0, -1]]
            moved = target / factor
            if shift is not None:
                moved = (target + curvature * shift) / factor
                ends[:, 1] += shift[:, -1]
            solved = monotone.kkt(found.face, found.primal, weight, None, moved, ends, None, (n,))
            u = solved.primal if shift is None else solved.primal - shift
            w = factor * solved.rows
            columns.put(u, out.primal)
            rows.put(chain_multipliers(target - curvature * u, w), chosen, out.rows)
            put_ends(w, out.bounds)

        def sides(row_sides: IndexArray, bound_sides: IndexArray) -> None:
            active = np.zeros(row_sides.shape)
            rows.put(tied.astype(np.float64), chosen, active)
            np.copyto(row_sides, 1, where=active != 0.0)
            put_ends(held, bound_sides)

        return FacePart(kkt, sides)


class TransportBlocks(_Family):
    """``X >= lower`` with given row and column sums, shifted to ``lower = 0``."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        """Solve the blocks; as every part of :mod:`hsbackend.solvers.blocks` does."""
        columns, rows = self.columns, self.rows
        k1, k2 = self.group.shape
        factor, weight = columns.hessian(values)
        linear = columns.take(values.rhs_primal)
        point = _unconstrained(linear, factor, weight)
        low, rhs, wrong = rows.interval(values.rhs_rows)
        del low
        lower, _ = columns.limits(values)
        assert lower is not None
        shifted = bool(lower.any())
        if shifted:
            point = point - lower
            floor = lower.reshape(-1, k1, k2)
            rhs = rhs - np.concatenate([floor.sum(axis=2), floor.sum(axis=1)], axis=1)
        found = transport.solve(point, weight, None, rhs, None, None, (k1, k2), options.jacobian)
        self.report(found.status, wrong, weight, result)
        primal = found.primal + lower if shifted else found.primal
        columns.put(primal, result.primal)
        chosen = rows.choose(values.rhs_rows, np.ones((len(point), k1 + k2)))
        nu = factor * found.multipliers
        rows.put(nu, chosen, result.rows)
        held = found.face == 0
        curvature = factor if weight is None else weight

        def on_entries(ab: FloatArray) -> FloatArray:
            return (ab[:, :k1, None] + ab[:, None, k1:]).reshape(-1, k1 * k2)

        if options.multipliers:
            gradient = linear - curvature * primal - on_entries(nu)
            columns.put_bounds(np.where(held, np.minimum(gradient, 0.0), 0.0), result.bounds)

        def kkt(g: FloatArray, r: FloatArray, r_bounds: FloatArray, out: KKTSolution) -> None:
            target = columns.take(g) if factor == 1.0 else columns.take(g) / factor
            rhs_bounds = columns.take_bounds(r_bounds)
            solved = transport.kkt(
                found.face, found.primal, weight, None, target, rows.take(r, chosen), rhs_bounds, (k1, k2)
            )
            columns.put(solved.primal, out.primal)
            rows.put(factor * solved.rows, chosen, out.rows)
            columns.put_bounds(factor * solved.bounds, out.bounds)

        def sides(row_sides: IndexArray, bound_sides: IndexArray) -> None:
            active = np.zeros(row_sides.shape)
            rows.put(np.ones((len(point), k1 + k2)), chosen, active)
            np.copyto(row_sides, 1, where=active != 0.0)
            columns.put_bounds(-held.astype(np.int64), bound_sides)

        return FacePart(kkt, sides)


class L1Blocks(_Family):
    """``sum_j w_j t_j <= r, |x_j - y_j| <= k_j t_j``: a weighted l1 ball around y, with t recovered afterwards."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        """Solve the blocks; as every part of :mod:`hsbackend.solvers.blocks` does."""
        columns, rows = self.columns, self.rows
        group = self.group
        n = columns.size
        epigraph = group.auxiliary.ravel()
        assert group.coefficients is not None
        assert group.factor is not None
        k = columns.repeat(group.factor, values.batch)
        weights = columns.repeat(group.coefficients, values.batch)
        factor, weight = columns.hessian(values)
        linear = columns.take(values.rhs_primal)
        point = _unconstrained(linear, factor, weight)
        _, limits, _ = rows.interval(values.rhs_rows)
        radius = np.ascontiguousarray(limits[:, :1])
        centre = 0.5 * (limits[:, 1 : 1 + n] - limits[:, 1 + n :])
        family_weights = None if np.all(weights == 1.0) else weights
        found = l1.solve(point - centre, weight, family_weights, radius, None, None, (n,), options.jacobian)
        self.report(found.status, None, weight, result)
        primal = found.primal + centre
        columns.put(primal, result.primal)
        result.primal[:, epigraph] = (np.abs(found.primal) / k).reshape(values.batch, -1)
        tight = found.face[:, -1:] != 0
        sign = found.face[:, :-1].astype(np.float64)
        pinned = tight & (sign == 0.0)
        sign = np.where(~pinned & (sign == 0.0), 1.0, sign)
        curvature = factor if weight is None else weight

        def pair(total: FloatArray, difference: FloatArray) -> FloatArray:
            """Split the sum of a pair's multipliers: by the difference where x is held, to one side elsewhere."""
            above = np.where(pinned, 0.5 * (total + difference), np.where(sign > 0.0, total, 0.0))
            below = np.where(pinned, 0.5 * (total - difference), np.where(sign < 0.0, total, 0.0))
            return np.concatenate([above, below], axis=1)

        nu = factor * found.multipliers
        pairs = np.maximum(pair(nu * weights, linear - curvature * primal), 0.0)
        rows.put(np.concatenate([nu, pairs], axis=1), None, result.rows)

        def kkt(g: FloatArray, r: FloatArray, r_bounds: FloatArray, out: KKTSolution) -> None:
            del r_bounds
            rhs = rows.take(r, None)
            above, below = rhs[:, 1 : 1 + n], rhs[:, 1 + n :]
            on_epigraph = g[:, epigraph].reshape(-1, n) / k  # g_t / k
            # On the support the pair's active row says k u_t = s u_x - rho; where x is held both rows do.
            slope = np.where(sign > 0.0, above, below)
            moved = np.where(pinned, 0.5 * (above + below), slope)
            total = rhs[:, :1] + (weights * moved).sum(axis=1, keepdims=True)
            rhs_bounds = np.where(pinned, 0.5 * (above - below), 0.0)
            target = columns.take(g)
            effective = target + np.where(pinned, 0.0, sign * on_epigraph)
            solved = l1.kkt(
                found.face, found.primal, weight, family_weights, effective / factor, total, rhs_bounds, (n,)
            )
            u, w = solved.primal, factor * solved.rows
            columns.put(u, out.primal)
            u_t = np.where(pinned, -0.5 * (above + below), sign * u - slope) / k
            out.primal[:, epigraph] = u_t.reshape(values.batch, -1)
            both = pair(weights * w - on_epigraph, target - curvature * u)
            rows.put(np.concatenate([w, both], axis=1), None, out.rows)

        def sides(row_sides: IndexArray, bound_sides: IndexArray) -> None:
            del bound_sides
            one = np.ones_like(sign)
            active = np.zeros(row_sides.shape)
            rows.put(np.concatenate([tight.astype(np.float64), pair(one, 0.0 * one)], axis=1), None, active)
            np.copyto(row_sides, 1, where=active != 0.0)

        return FacePart(kkt, sides)
