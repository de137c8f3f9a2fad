"""Solve independent blocks apart: families by their own algorithms, the rest by the general solvers.

A group of G alike blocks becomes a batch of ``B G`` items. The columns and rows of a block are those of its family up
to order, sign, scale and shift; this module carries right-hand sides and solutions across, in both directions and by
the same linear maps for the solution and for the KKT system on its face. Items a family cannot solve (infeasible ones,
first of all) are solved again as a whole by the active set, which can say why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hsbackend.face import BlockFace, Face, FacePart, KKTSolution, MixedFace
from hsbackend.families import budget, l1, monotone, transport
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.route import DENSE_LIMIT, newton_wins
from hsbackend.solvers import active_set, semismooth_newton
from hsbackend.solvers.result import Options, Result
from hsbackend.status import Status
from hsbackend.structure import Group

#: Equal rows may contradict each other by this much, relative to the right-hand side: rounding of their scaling.
_CONSISTENT = 1e-9


@dataclass(frozen=True)
class Limits:
    """Bounds of the reduced program that no parameter moves.

    Attributes:
        lower, upper: (nb,) their values; meaningless where they vary.
        lower_varies, upper_varies: (nb,).
    """

    lower: FloatArray
    upper: FloatArray
    lower_varies: NDArray[np.bool_]
    upper_varies: NDArray[np.bool_]


class _Columns:
    """Where the variables of a group lie in the program, and their bounds."""

    def __init__(self, group: Group, num_variables: int, bounded: IndexArray, limits: Limits) -> None:
        self.count, self.size = group.variables.shape
        self.index = group.variables.ravel()
        self._whole = np.array_equal(self.index, np.arange(num_variables))
        bounded_at = np.full(num_variables, -1, dtype=np.int64)
        bounded_at[bounded] = np.arange(len(bounded))
        position = bounded_at[self.index]
        self.has = np.flatnonzero(position >= 0)
        self.position = position[self.has]
        self._all_bounds = np.array_equal(self.position, np.arange(len(bounded))) and len(self.has) == len(self.index)
        self._lower = self._constant(limits.lower, limits.lower_varies, limits.upper, limits.upper_varies, -np.inf)
        self._upper = self._constant(limits.upper, limits.upper_varies, limits.lower, limits.lower_varies, np.inf)

    def _constant(
        self, values: FloatArray, varies: NDArray[np.bool_], others: FloatArray, others_vary: NDArray[np.bool_],
        fill: float,
    ) -> FloatArray | None:  # fmt: skip
        """Return constant limits (G, n); None when they vary or may cross the other side."""
        at = self.position
        if varies[at].any() or (~others_vary[at] & ((values[at] - others[at]) * np.sign(fill) < 0.0)).any():
            return None
        found = np.full(len(self.index), fill)
        found[self.has] = values[at]
        return found.reshape(self.count, self.size)

    def take(self, array: FloatArray) -> FloatArray:
        """Return (B G, n) of (B, all)."""
        picked = array if self._whole else array[:, self.index]
        return np.ascontiguousarray(picked).reshape(-1, self.size)

    def put(self, part: FloatArray, out: FloatArray) -> None:
        """Write (B G, n) into (B, all)."""
        out[:, slice(None) if self._whole else self.index] = part.reshape(out.shape[0], -1)

    def take_bounds(self, array: FloatArray) -> FloatArray:
        """Return (B G, n) of an array on the bounded variables, zero elsewhere."""
        if self._all_bounds:
            return array.reshape(-1, self.size)
        out = np.zeros((array.shape[0], len(self.index)))
        out[:, self.has] = array[:, self.position]
        return out.reshape(-1, self.size)

    def put_bounds(self, part: NDArray[Any], out: NDArray[Any]) -> None:
        """Write (B G, n) into an array on the bounded variables."""
        flat = part.reshape(out.shape[0], -1)
        if self._all_bounds:
            out[...] = flat
        else:
            out[:, self.position] = flat[:, self.has]

    def repeat(self, constant: FloatArray, batch: int) -> FloatArray:
        """Return constants (G, n) as (1, n) where the blocks agree, or (B G, n)."""
        if self.count == 1 or bool(np.all(constant == constant[0])):
            return np.ascontiguousarray(constant[:1])
        return np.tile(constant, (batch, 1))

    def _limits(self, constant: FloatArray | None, values: FloatArray, fill: float) -> FloatArray | None:
        if constant is not None:
            return None if np.all(constant == fill) else self.repeat(constant, values.shape[0])
        if self._all_bounds:
            return values.reshape(-1, self.size)
        out = np.full((values.shape[0], len(self.index)), fill)
        out[:, self.has] = values[:, self.position]
        return out.reshape(-1, self.size)

    def limits(self, values: QPValues) -> tuple[FloatArray | None, FloatArray | None]:
        """Return lower and upper limits, (1 or B G, n) or None where there are none."""
        return self._limits(self._lower, values.lower, -np.inf), self._limits(self._upper, values.upper, np.inf)

    def hessian(self, values: QPValues) -> tuple[float, FloatArray | None]:
        """Return the diagonal Hessian as ``factor * weight``, weight (1 or B G, n) or None for ones."""
        diagonal = values.hessian if values.diagonal else np.einsum("bii->bi", values.hessian)
        picked = diagonal[:, self.index]
        if picked.shape[0] > 1:
            return 1.0, np.ascontiguousarray(picked).reshape(-1, self.size)
        first = float(picked[0, 0])
        if first > 0.0 and np.all(picked == first):
            return first, None
        return 1.0, self.repeat(picked.reshape(self.count, self.size), values.batch)


class _Rows:
    """The rows of a group's family among those of the program: parallel candidates, scaled."""

    def __init__(self, group: Group, num_equalities: int) -> None:
        self.count, self.size, self.width = group.rows.shape
        self.rows = group.rows
        self.scale = group.scale
        self.equality = (group.rows >= 0) & (group.rows < num_equalities)
        self.plain = self.width == 1
        self._upward = self.equality | ((group.rows >= 0) & (group.scale > 0.0))
        self._downward = self.equality | ((group.rows >= 0) & (group.scale < 0.0))
        self._simple_up = self.plain and bool(self._upward.all())
        self._simple_down = self.plain and bool(self._downward.all())

    def ratio(self, rhs: FloatArray) -> FloatArray:
        """Return right-hand sides in units of the family's rows, (B, G, C, R)."""
        return rhs[:, np.maximum(self.rows, 0).ravel()].reshape(-1, *self.rows.shape) / self.scale

    def interval(self, rhs: FloatArray) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
        """Return low and high (B G, C) of every row, and which items (B G,) have rows that contradict each other."""
        ratio = self.ratio(rhs)
        shape = (-1, self.size)
        if self.plain:
            high = ratio[..., 0] if self._simple_up else np.where(self._upward, ratio, np.inf)[..., 0]
            low = ratio[..., 0] if self._simple_down else np.where(self._downward, ratio, -np.inf)[..., 0]
        else:
            high = np.where(self._upward, ratio, np.inf).min(axis=3)
            low = np.where(self._downward, ratio, -np.inf).max(axis=3)
        high, low = high.reshape(shape), low.reshape(shape)
        if self.plain:
            return low, high, np.zeros(len(low), dtype=bool)
        crossing = low > high
        close = crossing & (low - high <= _CONSISTENT * (1.0 + np.abs(np.where(crossing, high, 0.0))))
        middle = np.where(close, 0.5 * (low + high), 0.0)
        return np.where(close, middle, low), np.where(close, middle, high), np.any(crossing & ~close, axis=1)

    def choose(self, rhs: FloatArray, side: NDArray[Any]) -> IndexArray | None:
        """Return for each row of the family the candidate (B, G, C) that holds it on its active side; None if plain."""
        if self.plain:
            return None
        ratio = self.ratio(rhs)
        up = np.where(self._upward, ratio, np.inf).argmin(axis=3)
        down = np.where(self._downward, ratio, -np.inf).argmax(axis=3)
        return np.where(side.reshape(up.shape) < 0, down, up)

    def put(self, part: FloatArray, chosen: IndexArray | None, out: FloatArray) -> None:
        """Write multipliers (B G, C) of the family's rows to the rows of the program."""
        batch = out.shape[0]
        if chosen is None:
            out[:, self.rows.ravel()] = part.reshape(batch, -1) / self.scale.ravel()
            return
        item, g, c = np.indices(chosen.shape)
        out[item, self.rows[g, c, chosen]] = part.reshape(chosen.shape) / self.scale[g, c, chosen]

    def take(self, rhs: FloatArray, chosen: IndexArray | None) -> FloatArray:
        """Return a right-hand side (B G, C) on the rows chosen."""
        ratio = self.ratio(rhs)
        picked = ratio[..., 0] if chosen is None else np.take_along_axis(ratio, chosen[..., None], axis=3)[..., 0]
        return np.ascontiguousarray(picked).reshape(-1, self.size)


def _chain(steps: FloatArray) -> FloatArray:
    """Return the offsets E with ``E_1 = 0`` and ``E_(i+1) = E_i + steps_i``."""
    out = np.zeros((steps.shape[0], steps.shape[1] + 1))
    np.cumsum(steps, axis=1, out=out[:, 1:])
    return out


class _Part(Protocol):
    """A group prepared for repeated solves."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        """Fill in the group's places of a result (status: where the group fails) and return its part of the face."""
        ...


class _Family:
    """What the adaptors of the four families share."""

    def __init__(self, group: Group, structure: Structure) -> None:
        self.group = group
        self.columns = _Columns(group, structure.num_variables, structure.bounded, structure.limits)
        self.rows = _Rows(group, structure.num_equalities)
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

    def merge_status(
        self, status: NDArray[np.int8], wrong: NDArray[np.bool_] | None, weight: FloatArray | None, result: Result
    ) -> None:
        """Carry the status of the blocks to their items: invalid input first, then any other failure."""
        if wrong is not None and wrong.any():
            status = np.where((status == Status.SOLVED) & wrong, np.int8(Status.INFEASIBLE), status)
        if not status.any():
            return
        if weight is not None:  # a Hessian that is not positive is not the input's fault; the active set says so
            flat = np.broadcast_to((weight <= 0.0).any(axis=1), status.shape)
            status = np.where(flat & (status == Status.INVALID_INPUT), np.int8(Status.NOT_STRICTLY_CONVEX), status)
        worst = status.reshape(len(result.status), -1)
        failed = (worst != Status.SOLVED).any(axis=1)
        invalid = (worst == Status.INVALID_INPUT).any(axis=1)
        result.status[failed & (result.status == Status.SOLVED)] = Status.NOT_CONVERGED
        result.status[invalid] = Status.INVALID_INPUT


class _Budget(_Family):
    """``lower <= x <= upper`` and at most one row."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        columns, rows = self.columns, self.rows
        factor, weight = columns.hessian(values)
        linear = columns.take(values.rhs_primal)
        point = linear / factor if weight is None else linear / weight
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
        self.merge_status(found.status, wrong, weight, result)
        columns.put(found.primal, result.primal)
        side = found.face[:, :-1]
        row_side = found.face[:, -1]
        nu = factor * found.multipliers
        chosen = None
        if rows.size:
            chosen = rows.choose(values.rhs_rows, row_side)
            rows.put(nu, chosen, result.rows)
        if len(columns.has):
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


class _Monotone(_Family):
    """A chain ``x_i - x_(i+1) <= d_i`` with a limit at each end; shifted to ``y_1 <= ... <= y_n``."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        columns, rows = self.columns, self.rows
        n = columns.size
        factor, weight = columns.hessian(values)
        linear = columns.take(values.rhs_primal)
        point = linear / factor if weight is None else linear / weight
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
        self.merge_status(found.status, None, weight, result)
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


class _Transport(_Family):
    """``X >= lower`` with given row and column sums, shifted to ``lower = 0``."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        columns, rows = self.columns, self.rows
        k1, k2 = self.group.shape
        factor, weight = columns.hessian(values)
        linear = columns.take(values.rhs_primal)
        point = linear / factor if weight is None else linear / weight
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
        self.merge_status(found.status, wrong, weight, result)
        primal = found.primal + lower if shifted else found.primal
        columns.put(primal, result.primal)
        chosen = rows.choose(values.rhs_rows, np.ones((len(point), k1 + k2)))
        nu = factor * found.multipliers
        rows.put(nu, chosen, result.rows)
        held = found.face == 0
        curvature = factor if weight is None else weight

        def on_entries(ab: FloatArray) -> FloatArray:
            return (ab[:, :k1, None] + ab[:, None, k1:]).reshape(-1, k1 * k2)

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


class _L1(_Family):
    """``sum_j w_j t_j <= r, |x_j - y_j| <= k_j t_j``: a weighted l1 ball around y, with t recovered afterwards."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        columns, rows = self.columns, self.rows
        group = self.group
        n = columns.size
        epigraph = group.auxiliary.ravel()
        assert group.coefficients is not None
        assert group.factor is not None
        k = np.tile(group.factor, (values.batch, 1))
        weights = columns.repeat(group.coefficients, values.batch)
        factor, weight = columns.hessian(values)
        linear = columns.take(values.rhs_primal)
        point = linear / factor if weight is None else linear / weight
        _, limits, _ = rows.interval(values.rhs_rows)
        radius = np.ascontiguousarray(limits[:, :1])
        centre = 0.5 * (limits[:, 1 : 1 + n] - limits[:, 1 + n :])
        family_weights = None if np.all(weights == 1.0) else weights
        found = l1.solve(point - centre, weight, family_weights, radius, None, None, (n,), options.jacobian)
        self.merge_status(found.status, None, weight, result)
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


class _General:
    """Alike blocks without a family: a batch for one of the general solvers."""

    def __init__(self, group: Group, structure: Structure) -> None:
        self.columns = _Columns(group, structure.num_variables, structure.bounded, structure.limits)
        self.rows = group.rows[:, :, 0]
        self.num_equalities = int(np.sum(self.rows[0] < structure.num_equalities)) if self.rows.size else 0
        local = {int(j): i for i, j in enumerate(group.variables[0])}
        self.bounded = np.array([local[int(j)] for j in structure.bounded if int(j) in local], dtype=np.int64)
        self._bounded_at = np.array(
            [
                [int(np.searchsorted(structure.bounded, j)) for j in variables[self.bounded]]
                for variables in group.variables
            ],
            dtype=np.int64,
        ).reshape(group.count, -1)
        self.proximal = np.array([i for i, j in enumerate(group.variables[0]) if structure.flat[j]], dtype=np.int64)
        self.variables = group.variables
        pattern = structure.pattern[self.rows[0]][:, group.variables[0]]
        diagonal = structure.diagonal and not len(self.proximal)
        self.newton: semismooth_newton.NewtonSetup | None = None
        if diagonal and len(self.bounded) and newton_wins(pattern):
            self.newton = semismooth_newton.NewtonSetup(pattern, self.bounded)
        self._constant = structure.constant_matrices
        self._gram: active_set.GramSetup | None = None

    def _values(self, values: QPValues) -> QPValues:
        count, n = self.variables.shape
        m = self.rows.shape[1]

        def fold(picked: FloatArray, trailing: tuple[int, ...]) -> FloatArray:
            """Fold (1 or B, G, ...) into (1 or B G, ...)."""
            if picked.shape[0] == 1 and values.batch != 1:
                if count == 1 or bool(np.all(picked[0] == picked[0, 0])):
                    return np.ascontiguousarray(picked[:, 0])
                picked = np.broadcast_to(picked, (values.batch, *picked.shape[1:]))
            return np.ascontiguousarray(picked).reshape(picked.shape[0] * count, *trailing)

        variables = self.variables
        if values.diagonal:
            hessian = fold(values.hessian[:, variables], (n,))
        else:
            hessian = fold(values.hessian[:, variables[:, :, None], variables[:, None, :]], (n, n))
        rows = fold(values.rows[:, self.rows[:, :, None], variables[:, None, :]], (m, n))
        batch = values.batch * count
        return QPValues(
            hessian, self.columns.take(values.rhs_primal), rows, self.num_equalities,
            np.ascontiguousarray(values.rhs_rows[:, self.rows.ravel()]).reshape(batch, m), self.bounded,
            np.ascontiguousarray(values.lower[:, self._bounded_at.ravel()]).reshape(batch, -1),
            np.ascontiguousarray(values.upper[:, self._bounded_at.ravel()]).reshape(batch, -1), self.proximal,
        )  # fmt: skip

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        own = self._values(values)
        shared = own.hessian.shape[0] == 1 and own.rows.shape[0] == 1

        def gram() -> active_set.GramSetup | None:
            if not (self._constant and shared):
                return None
            if self._gram is None:
                self._gram = active_set.GramSetup(
                    own.hessian, own.rows, self.num_equalities, self.bounded, self.proximal
                )
            return self._gram

        if self.newton is not None:
            found = semismooth_newton.solve(own, options, self.newton, False, gram)
        else:
            found = active_set.verify(own, options, active_set.solve(own, options, gram()))
        count = self.columns.count
        status = found.status.reshape(-1, count)
        worst = status.max(axis=1, initial=0)
        mixed = (status != Status.SOLVED).any(axis=1)
        np.copyto(result.status, np.where(mixed & (worst != Status.INVALID_INPUT), Status.NOT_CONVERGED, worst),
                  where=mixed & (result.status == Status.SOLVED), casting="unsafe")  # fmt: skip
        at = self._bounded_at.ravel()
        self.columns.put(found.primal, result.primal)
        result.rows[:, self.rows.ravel()] = found.rows.reshape(values.batch, -1)
        result.bounds[:, at] = found.bounds.reshape(values.batch, -1)
        face = found.face

        def kkt(g: FloatArray, r: FloatArray, r_bounds: FloatArray, out: KKTSolution) -> None:
            batch = g.shape[0]
            assert face is not None
            solved = face.kkt_solve(
                self.columns.take(g),
                np.ascontiguousarray(r[:, self.rows.ravel()]).reshape(batch * count, -1),
                np.ascontiguousarray(r_bounds[:, at]).reshape(batch * count, -1),
            )
            self.columns.put(solved.primal, out.primal)
            out.rows[:, self.rows.ravel()] = solved.rows.reshape(batch, -1)
            out.bounds[:, at] = solved.bounds.reshape(batch, -1)

        def sides(row_sides: IndexArray, bound_sides: IndexArray) -> None:
            assert face is not None
            row_sides[:, self.rows.ravel()] = face.active_rows.reshape(values.batch, -1)
            bound_sides[:, at] = face.active_bounds.reshape(values.batch, -1)

        return FacePart(kkt, sides)


@dataclass(frozen=True)
class Structure:
    """What the adaptors need to know about the reduced program, constant between calls.

    Attributes:
        num_variables, num_equalities: its size.
        bounded: (nb,) bounded variables, increasing.
        limits: its constant bounds.
        rhs_varies, rhs_constant: (m,) of the rows that are not bounds.
        pattern: (m, n) boolean scipy matrix.
        diagonal: whether the Hessian is diagonal.
        flat: (n,) variables without curvature.
        constant_matrices: whether neither Hessian nor rows depend on parameters.
    """

    num_variables: int
    num_equalities: int
    bounded: IndexArray
    limits: Limits
    rhs_varies: NDArray[np.bool_]
    rhs_constant: FloatArray
    pattern: Any
    diagonal: bool
    flat: NDArray[np.bool_]
    constant_matrices: bool


_ADAPTORS: dict[str, Callable[[Group, Structure], _Part]] = {
    "budget": _Budget,
    "monotone": _Monotone,
    "transport": _Transport,
    "l1": _L1,
    "general": _General,
}


class BlockSetup:
    """The groups of a program, prepared for repeated solves.

    Args:
        groups: from :func:`hsbackend.structure.find_groups`.
        structure: the reduced program's constants.
    """

    def __init__(self, groups: tuple[Group, ...], structure: Structure) -> None:
        """Prepare every group."""
        self.parts: list[_Part] = [_ADAPTORS[group.family](group, structure) for group in groups]


def solve(
    values: QPValues,
    options: Options,
    setup: BlockSetup,
    gram_setup: Callable[[], active_set.GramSetup | None],
) -> Result:
    """Solve a batch block by block.

    Args:
        values: the problems.
        options: tolerances and what to keep.
        setup: the prepared groups.
        gram_setup: gives the active set's constant data when an item has to be solved as a whole.
    """
    batch, n = values.batch, values.num_variables
    m = values.rhs_rows.shape[1]
    result = Result(
        np.empty((batch, n)), np.zeros((batch, m)), np.zeros((batch, len(values.bounded))),
        np.zeros(batch, dtype=np.int8), np.ones(batch, dtype=np.int64), None,
    )  # fmt: skip
    parts = [part.solve(values, options, result) for part in setup.parts]
    # A family may take -inf for "not this one"; in a program it is a cost without an optimum.
    result.status[~np.isfinite(values.rhs_primal).all(axis=1)] = Status.INVALID_INPUT
    face: Face | None = BlockFace((batch, n, m, len(values.bounded)), parts) if options.keep_face else None
    result = replace(result, face=face)
    unfinished = np.flatnonzero(result.status == Status.NOT_CONVERGED).astype(np.int64)
    if not len(unfinished) or n + m + len(values.bounded) > DENSE_LIMIT:
        return result
    left = values.take(unfinished)
    rest = active_set.verify(left, options, active_set.solve(left, options, gram_setup()))
    result.primal[unfinished] = rest.primal
    result.rows[unfinished] = rest.rows
    result.bounds[unfinished] = rest.bounds
    result.status[unfinished] = rest.status
    result.steps[unfinished] += rest.steps
    if face is not None and rest.face is not None:
        face = MixedFace(face, rest.face, unfinished)
    return replace(result, face=face)
