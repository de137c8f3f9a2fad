"""Convex quadratic and linear programs whose answer is known exactly, and the judge of what a solver says about them.

    minimise 1/2 x'Qx + q'x   subject to   A x = b,  G x <= h,  l <= x <= u       (Q positive semidefinite or zero)

x, the active rows and the multipliers are chosen first; q, b, h, l, u follow from the KKT conditions. Every number has
few mantissa bits and every scale is a power of two, so nothing is rounded on the way (:func:`exact_product` insists):
the answer solves the problem in the floating-point data, not a neighbour of it. Infeasible items come with a Farkas
certificate, unbounded ones with a ray, just as exact.

Only integers and exact sums are drawn and computed, so a seed gives the same problem on every machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import linprog

from hsbackend.program import AffineMap, MatrixEntries, Program
from hsbackend.status import Status

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

#: Largest accepted KKT residual, relative to the terms of each row and component. The library promises 1e-9 relative to
#: its own measure of the data; the factor ten is for the difference between the two measures.
TOLERANCE = 1e-8
#: The check of ``non_unique`` is skipped where a change of the problem below this would change the truth.
UNIQUENESS_MARGIN = 1e-6
#: Below this, in the units in which a problem is drawn, the sizes that residuals are compared with do not fall: where
#: every term is zero, an error of 1e-12 of a unit is rounding.
_FLOOR = 1e-4
#: Decades from which on a knob counts as extreme: there, and only there, NOT_CONVERGED is accepted now and then.
EXTREME = 6


class NotExactError(Exception):
    """The drawn numbers have too many bits for an exact product."""


@dataclass(frozen=True)
class Knobs:
    """What kind of problem was drawn.

    Decades are powers of ten, 0 where the effect is absent.

    Attributes:
        items: size of the batch.
        variables: n.
        hessian: kind of Q.
        rank: rank of Q, 0 for a linear program.
        curvature_spread: decades between the curvatures of Q.
        tiny_curvature: decades by which Q is smaller than the rest of the problem.
        numbers: of what kind the entries are.
        density: share of non-zero entries.
        bounds: share of variables with bounds.
        redundant: number of duplicated, scaled, summed and empty rows.
        near_dependent: decades of the difference of a row from another one.
        active: share of active rows, or "vertex" for n of them.
        weak: share of the active rows with a zero multiplier.
        small_multipliers: decades by which some multipliers are smaller.
        nearly_active: decades by which some slacks are smaller.
        row_spread, column_spread: decades of the scales of rows and columns.
        cost_unit, length_unit: decades of the units of the objective and of x.
        per_item: whether Q, A and G differ between items.
        parameters: whether Q, A and G are parameters though all items share them.
        fate: what happens to item 0: "solved", "infeasible", "nearly infeasible" (thin, but feasible) or "unbounded".
        margin: decades of the margin by which item 0 is infeasible, feasible or unbounded.
    """

    items: int
    variables: int
    hessian: str
    rank: int
    curvature_spread: int
    tiny_curvature: int
    numbers: str
    density: float
    bounds: float
    redundant: int
    near_dependent: int
    active: float | str
    weak: float
    small_multipliers: int
    nearly_active: int
    row_spread: int
    column_spread: int
    cost_unit: int
    length_unit: int
    per_item: bool
    parameters: bool
    fate: str
    margin: int

    @property
    def extreme(self) -> bool:
        """Whether a knob is in the extreme range."""
        spreads = (
            self.curvature_spread, self.tiny_curvature, self.near_dependent, self.small_multipliers,
            self.nearly_active, self.row_spread, 2 * self.column_spread, self.cost_unit, 2 * self.length_unit,
            self.margin,
        )  # fmt: skip
        return max(abs(value) for value in spreads) >= EXTREME


def _power(decades: float) -> float:
    """Return the power of two next to ``10 ** decades``."""
    return 2.0 ** round(decades * 3.3219280948873623)


def _granularity(array: Array) -> float:
    """Return the largest power of two that divides every entry; infinity when all are zero."""
    entries = array[(array != 0.0) & np.isfinite(array)]
    if not entries.size:
        return np.inf
    mantissa, exponent = np.frexp(entries)
    whole = (mantissa * 2.0**53).astype(np.int64)
    low = (whole & -whole).astype(np.float64)
    return float(np.ldexp(low, exponent - 53).min())


def exact_product(left: Array, right: Array) -> Array:
    """Return ``left @ right`` if every partial sum is a floating-point number in any order, else raise."""
    unit = _granularity(left) * _granularity(right)
    if np.isfinite(unit) and np.any(np.abs(left) @ np.abs(right) > unit * 2.0**53):
        raise NotExactError
    return left @ right


def exact_sum(*terms: Array) -> Array:
    """Return the sum of the terms if no order of summation rounds, else raise."""
    unit = min(_granularity(term) for term in terms)
    if np.isfinite(unit) and np.any(sum(np.abs(term) for term in terms) > unit * 2.0**53):
        raise NotExactError
    return np.sum(terms, axis=0)


@dataclass(frozen=True)
class KnownCase:
    """A batch of problems of one structure, with the answers.

    Rows are ordered: equalities, inequalities, bounds as rows with one entry. The arrays are in the units in which the
    problem was drawn, where its numbers are about one except for what the knobs say; the solver sees
    :attr:`hessian`, :attr:`linear`, :attr:`rows` and :attr:`rhs`, in the units given by the scales.

    Attributes:
        seed: everything follows from it.
        knobs: what was drawn.
        drawn_hessian: (1 or B, n, n).
        drawn_linear: (B, n).
        drawn_rows: (1 or B, m, n).
        drawn_rhs: (B, m), may hold inf in the rows that are bounds.
        drawn_primal: (B, n), an optimum, for unbounded items a feasible point, for infeasible ones nothing.
        drawn_multipliers: (B, m) optimal multipliers, for infeasible items the Farkas certificate.
        equalities: number of equalities.
        num_bounds: number of rows at the end that are bounds.
        row_scale: (m,) powers of two.
        column_scale: (n,) powers of two; the solver's x is the drawn one times this.
        cost_scale: power of two.
        fate: (B,) the status each item has to end in.
        ray: (n,) direction of an unbounded item, zero when there is none.
    """

    seed: int
    knobs: Knobs
    drawn_hessian: Array
    drawn_linear: Array
    drawn_rows: Array
    drawn_rhs: Array
    drawn_primal: Array
    drawn_multipliers: Array
    equalities: int
    num_bounds: int
    row_scale: Array
    column_scale: Array
    cost_scale: float
    fate: NDArray[np.int64]
    ray: Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (B, n, m)."""
        return (*self.drawn_linear.shape, self.drawn_rhs.shape[1])

    @cached_property
    def hessian(self) -> Array:
        """(1 or B, n, n) as the solver sees it."""
        return self.drawn_hessian * (self.cost_scale / self.column_scale[:, None] / self.column_scale)

    @cached_property
    def linear(self) -> Array:
        """(B, n) as the solver sees it."""
        return self.drawn_linear * (self.cost_scale / self.column_scale)

    @cached_property
    def rows(self) -> Array:
        """(1 or B, m, n) as the solver sees it."""
        return self.drawn_rows * (self.row_scale[:, None] / self.column_scale)

    @cached_property
    def rhs(self) -> Array:
        """(B, m) as the solver sees it."""
        return self.drawn_rhs * self.row_scale

    @property
    def primal(self) -> Array:
        """(B, n) the known optimum as the solver sees it."""
        return self.drawn_primal * self.column_scale

    @property
    def multipliers(self) -> Array:
        """(B, m) the known multipliers as the solver sees them."""
        return self.drawn_multipliers * (self.cost_scale / self.row_scale)

    def item(self, b: int) -> tuple[Array, Array, Array, Array]:
        """Return Q, q, rows and right-hand side of one item, in drawn units."""
        hessian = self.drawn_hessian[b if len(self.drawn_hessian) > 1 else 0]
        rows = self.drawn_rows[b if len(self.drawn_rows) > 1 else 0]
        return hessian, self.drawn_linear[b], rows, self.drawn_rhs[b]

    @property
    def free_matrices(self) -> bool:
        """Whether Q and the rows that are no bounds are parameters of the program."""
        return self.knobs.per_item or self.knobs.parameters

    def program(self) -> Program:
        """Write it as a program with parameters q and b, before them Q and the general rows where these are free."""
        _, n, m = self.shape
        general = m - self.num_bounds
        sizes = ((n * n, general * n) if self.free_matrices else ()) + (n, m)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        width = int(starts[-1]) + 1

        def parameter(index: int) -> sp.csr_array:
            size = sizes[index]
            places = (np.arange(size), starts[index] + np.arange(size))
            return sp.csr_array((np.ones(size), places), shape=(size, width))

        def constant(values: Array) -> sp.csr_array:
            places = (np.arange(values.size), np.full(values.size, width - 1))
            return sp.csr_array((values, places), shape=(values.size, width))

        def entries(shape: tuple[int, int], index: int, values: Array, varying: int) -> MatrixEntries:
            """Write a matrix: its first rows are a parameter, of the others the non-zeros are constants."""
            fixed = np.argwhere(values[varying:])
            places = [np.indices((varying, n)).reshape(2, -1), fixed.T + np.array([[varying], [0]])]
            maps = [constant(values[varying:][tuple(fixed.T)])]
            if varying:
                maps.insert(0, parameter(index))
            rows, columns = np.concatenate(places, axis=1).astype(np.int64)
            return MatrixEntries(shape, rows, columns, AffineMap(sp.vstack(maps), sizes))

        free = self.free_matrices
        return Program(
            n, self.equalities,
            entries((n, n), 0, self.hessian[0], n if free else 0),
            AffineMap(parameter(len(sizes) - 2), sizes),
            entries((m, n), 1, self.rows[0], general if free else 0),
            AffineMap(parameter(len(sizes) - 1), sizes), np.ones(n, dtype=bool), tuple(f"row {i}" for i in range(m)),
        )  # fmt: skip

    def parameters(self) -> list[Array]:
        """Return the values of the parameters of :meth:`program`."""
        general = self.rows[:, : self.shape[2] - self.num_bounds]
        data = ([self.hessian, general] if self.free_matrices else []) + [self.linear, self.rhs]
        return [np.ascontiguousarray(values.reshape(len(values), -1)) for values in data]

    @property
    def strictly_convex(self) -> bool:
        """Whether Q is positive definite."""
        return self.knobs.rank == self.knobs.variables


def _draw_knobs(rng: np.random.Generator) -> Knobs:
    """Draw what kind of problem it is; about every second one has a knob in the extreme range."""

    def pick(*options: float | str, weights: tuple[int, ...] | None = None) -> float | str:
        repeated = options if weights is None else tuple(np.repeat(np.array(options, dtype=object), weights))
        return repeated[int(rng.integers(len(repeated)))]

    def rarely(share: int, *decades: int) -> int:
        """Draw one of the decades in one of ``share`` cases."""
        chosen = decades[int(rng.integers(len(decades)))]
        return chosen if rng.integers(share) == 0 else 0

    size = int(rng.integers(200))
    limit = 6 if size < 80 else 12 if size < 160 else 24 if size < 190 else 40 if size < 199 else 120
    n = int(rng.integers(max(1, limit // 3), limit + 1)) if limit > 6 else int(rng.integers(1, limit + 1))
    hessian = str(pick("zero", "identity", "diagonal", "factor", "ridge", "block", weights=(4, 1, 2, 4, 3, 2)))
    if hessian == "zero":
        rank = 0
    elif hessian in ("identity", "ridge"):
        rank = n
    else:
        rank = n if rng.integers(3) == 0 else int(rng.integers(0, n + 1))
    rows = columns = cost = length = 0
    scaling = str(pick("none", "rows", "columns", "cost", "length", "mixed", weights=(8, 1, 1, 1, 1, 2)))
    if scaling == "rows":
        rows = int(pick(1, 3, 8))
    elif scaling == "columns":
        columns = int(pick(1, 2, 4))
    elif scaling == "cost":
        cost = int(pick(-8, -3, 3, 8))
    elif scaling == "length":
        length = int(pick(-4, -2, 2, 4))
    elif scaling == "mixed":
        rows, columns, cost, length = int(pick(1, 3)), int(pick(1, 2)), int(pick(-2, 2)), int(pick(-1, 1))
    tiny = 0 if rank == 0 else rarely(12, 3, 5, 8)
    spread = 0 if tiny or rank == 0 or hessian == "identity" else rarely(4, 2, 4, 8)
    near = 0 if tiny or spread else rarely(8, 2, 4, 6, 8)
    fate = str(pick("solved", "infeasible", "nearly infeasible", "unbounded", weights=(14, 3, 2, 3)))
    if fate == "unbounded" and rank == n:
        fate = "solved"
    margin = 0 if fate == "solved" else int(pick(0, 3, 6))
    return Knobs(
        items=int(rng.integers(1, 5)) if n <= 40 else 1,
        variables=n,
        hessian=hessian,
        rank=rank,
        curvature_spread=spread,
        tiny_curvature=tiny,
        numbers=str(pick("signs", "integers", "fractions")),
        density=float(pick(0.3, 0.6, 1.0)),
        bounds=float(pick(0.0, 0.3, 1.0)),
        redundant=int(rng.integers(1, 6)) if rng.integers(3) == 0 else 0,
        near_dependent=near,
        active=pick(0.0, 0.2, 0.5, 0.8, 1.0, "vertex"),
        weak=float(pick(0.0, 0.3, 1.0, weights=(3, 3, 1))),
        small_multipliers=rarely(12, 3, 6),
        nearly_active=rarely(12, 3, 6, 8),
        row_spread=rows,
        column_spread=columns,
        cost_unit=cost,
        length_unit=length,
        per_item=bool(rng.integers(5) == 0),
        parameters=bool(rng.integers(5) == 0),
        fate=fate,
        margin=margin,
    )


@dataclass
class _Drawing:
    """One attempt at the numbers of a problem; ``bits`` is lowered when they turn out too many to be exact."""

    rng: np.random.Generator
    knobs: Knobs
    bits: int

    def entries(self, *shape: int, density: float | None = None) -> Array:
        """Draw matrix entries of the kind the knobs ask for."""
        numbers = self.knobs.numbers if self.bits else "signs"
        if numbers == "signs":
            values = self.rng.integers(-1, 2, shape).astype(np.float64)
        elif numbers == "integers":
            values = self.rng.integers(-3, 4, shape).astype(np.float64)
        else:
            values = self.rng.integers(-64, 65, shape) / 2.0 ** min(5, self.bits)
        share = self.knobs.density if density is None else density
        return values * (self.rng.integers(0, 1000, shape) < 1000 * share)

    def one_of(self, *options: float) -> float:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, share: float, *shape: int) -> Mask:
        return self.rng.integers(0, 1000, shape) < round(1000 * share)

    def curvatures(self, count: int) -> Array:
        """Draw square roots of curvatures, spread over the decades asked for, the largest about one."""
        spread = self.knobs.curvature_spread / 2.0
        roots = np.array([_power(-spread * self.rng.integers(0, 9) / 8.0) for _ in range(count)])
        if count > 1 and spread:
            roots[:2] = 1.0, _power(-spread)
        return roots

    def hessian(self, ray: Array, pivot: int) -> Array:
        """Draw Q of the rank asked for, with Q ray = 0."""
        knobs, n, rank = self.knobs, self.knobs.variables, self.knobs.rank
        scale = _power(-knobs.tiny_curvature)
        moved = np.flatnonzero(ray)
        if knobs.hessian == "identity":
            return scale * self.one_of(0.125, 1.0, 2.0) * np.eye(n)
        if knobs.hessian == "diagonal":
            diagonal = np.zeros(n)
            places = self.rng.permutation(n)[:rank]
            diagonal[places] = self.curvatures(rank) ** 2 * self.rng.integers(1, 8, rank)
            diagonal[moved] = 0.0
            return scale * np.diag(diagonal)
        if knobs.hessian == "ridge" or (rank == n and not len(moved)):
            root = self.curvatures(n)[:, None] * self.entries(n, n)
            ridge = _power(-knobs.curvature_spread) * self.rng.integers(1, 8, n) / 8.0
            return scale * exact_sum(exact_product(root.T, root), np.diag(ridge))
        root = self.entries(rank, n)
        if knobs.hessian == "block":
            root[:, self.rng.permutation(n)[: n - rank]] = 0.0
        if len(moved):
            root[:, pivot] = 0.0
            root[:, pivot] = -ray[pivot] * exact_product(root, ray)
        root *= self.curvatures(rank)[:, None]
        return scale * exact_product(root.T, root)

    def normals(self, count: int, ray: Array, pivot: int, equal: bool) -> Array:
        """Draw rows along whose normals the ray does not leave the feasible set."""
        rows = self.entries(count, self.knobs.variables)
        if ray.any():
            if equal:
                rows[:, pivot] = 0.0
                rows[:, pivot] = -ray[pivot] * exact_product(rows, ray)
            else:
                rows[exact_product(rows, ray) > 0.0] *= -1.0
        return rows


def _draw(seed: int, knobs: Knobs, rng: np.random.Generator, bits: int) -> KnownCase:
    """Draw the numbers."""
    draw = _Drawing(rng, knobs, bits)
    batch, n = knobs.items, knobs.variables
    count = batch if knobs.per_item else 1

    # A direction in which nothing limits the problem, for items that are unbounded; its entry at the pivot is +-1.
    ray, pivot = np.zeros(n), int(rng.integers(n))
    if knobs.fate == "unbounded":
        ray = rng.integers(-1, 2, n) * draw.chance(draw.one_of(0.0, 0.3, 0.7), n)
        ray = ray.astype(np.float64)
        ray[pivot] = draw.one_of(-1.0, 1.0)

    hessian = np.stack([draw.hessian(ray, pivot) for _ in range(count)])
    me = int(rng.integers(0, n // 2 + 1)) if rng.integers(2) else 0
    mi = int(rng.integers(0, 2 * n + 2)) if rng.integers(5) else 0
    equal = np.stack([draw.normals(me, ray, pivot, equal=True) for _ in range(count)])
    general = np.stack([draw.normals(mi, ray, pivot, equal=False) for _ in range(count)])

    # Redundant rows: copies, multiples, sums, empty ones, and rows that differ from another by very little.
    for k in range(knobs.redundant + (1 if knobs.near_dependent else 0)):
        kind = int(rng.integers(4)) if k < knobs.redundant else 4
        to_equal = bool(rng.integers(3) == 0) and me > 0
        old = equal if to_equal else general
        if not old.shape[1]:
            continue
        i, j = rng.integers(0, old.shape[1], 2)
        if kind == 4:
            change = draw.normals(1, ray, pivot, equal=to_equal)[0] * _power(-knobs.near_dependent)
            new = exact_sum(old[:, i], np.broadcast_to(change, old[:, i].shape))
        else:
            new = [old[:, i], 3.0 * old[:, i], exact_sum(old[:, i], old[:, j]), 0.0 * old[:, i]][kind]
        if to_equal:
            equal = np.concatenate([equal, new[:, None]], axis=1)
        else:
            general = np.concatenate([general, new[:, None]], axis=1)
    me, mi = equal.shape[1], general.shape[1]

    # Bounds: which variables have which; the ray keeps away from them.
    kind = rng.integers(0, 4, n)  # lower, upper, both, both and equal
    kind[(kind == 3) & draw.chance(0.6, n)] = 2
    bounded = draw.chance(knobs.bounds, n)
    has_lower = bounded & (kind != 1) & (ray >= 0.0)
    has_upper = bounded & (kind != 0) & (ray <= 0.0)
    fixed = has_lower & has_upper & (kind == 3)
    uppers, lowers = np.flatnonzero(has_upper), np.flatnonzero(has_lower)
    limits = np.concatenate([np.eye(n)[uppers], -np.eye(n)[lowers]])
    nb = len(limits)
    limit_variable = np.concatenate([uppers, lowers])
    # Some bounds are infinite in some items.
    absent = (
        draw.chance(0.3, batch, nb) & ~fixed[limit_variable] if rng.integers(4) == 0 else np.zeros((batch, nb), bool)
    )

    # A Farkas certificate: multipliers of some rows, and one more row that makes their combination vanish.
    certificate = np.zeros(me + mi + 1 + nb)
    farkas = knobs.fate in ("infeasible", "nearly infeasible")
    if farkas:
        chosen = rng.permutation(me + mi + nb)[: int(rng.integers(1, 5))]
        chosen = np.where(chosen < me + mi, chosen, chosen + 1)
        certificate[chosen] = rng.integers(1, 4, len(chosen))
        certificate[:me] *= rng.integers(0, 2, me) * 2 - 1
        places = certificate[me + mi + 1 :] > 0.0
        absent[:, places] = False
        everything = np.concatenate([equal, general, np.zeros((count, 1, n)), np.tile(limits, (count, 1, 1))], axis=1)
        closing = np.stack([-exact_product(certificate, matrix) for matrix in everything])
        certificate[me + mi] = 1.0
        general = np.concatenate([general, closing[:, None]], axis=1)
        mi += 1
    else:
        certificate = np.delete(certificate, me + mi)
    rows = np.concatenate([equal, general, np.tile(limits, (count, 1, 1))], axis=1)
    m = rows.shape[1]
    pinned = np.zeros(m, dtype=bool)  # both bounds of a variable that are equal
    pinned[me + mi :] = fixed[limit_variable]

    # The answers, item by item.
    whole = knobs.numbers != "fractions" or not bits
    primal = np.zeros((batch, n))
    multipliers, rhs, linear = np.zeros((batch, m)), np.zeros((batch, m)), np.zeros((batch, n))
    fate = np.full(batch, int(Status.SOLVED))
    for b in range(batch):
        matrix, curvature = rows[b % count], hessian[b % count]
        primal[b] = rng.integers(-3, 4, n) if whole else rng.integers(-64, 65, n) / 2.0 ** min(5, bits)
        if knobs.active == "vertex":
            wanted = np.zeros(m, dtype=bool)
            wanted[me + rng.permutation(m - me)[: max(0, n - me)]] = True
        else:
            wanted = draw.chance(float(knobs.active), m)
        wanted |= pinned
        wanted[me + mi :] &= ~absent[b]
        wanted[:me] = True
        slack = rng.integers(1, 17, m) / 8.0
        if knobs.nearly_active:
            slack[draw.chance(0.3, m)] *= _power(-knobs.nearly_active)
        slack[wanted] = 0.0
        special = b == 0
        if special and knobs.fate == "nearly infeasible":
            # All rows of the certificate together leave as much room as one of them has slack: the margin.
            involved = np.flatnonzero(certificate)
            inequalities = involved[involved >= me]
            slack[inequalities] = 0.0
            opened = int(inequalities[rng.integers(len(inequalities))])
            slack[opened] = _power(-knobs.margin) if not pinned[opened] else 0.0
        pushing = (slack == 0.0) & ~draw.chance(knobs.weak, m)
        force = rng.integers(1, 9, m) / 4.0
        if knobs.small_multipliers:
            force[draw.chance(0.3, m)] *= _power(-knobs.small_multipliers)
        multipliers[b, me:] = np.where(pushing, force, 0.0)[me:]
        multipliers[b, :me] = np.where(draw.chance(0.8, me), rng.integers(-8, 9, me) / 4.0, 0.0)
        rhs[b] = exact_sum(exact_product(matrix, primal[b]), slack)
        rhs[b, me + mi :][absent[b]] = np.inf
        linear[b] = -exact_sum(exact_product(curvature, primal[b]), exact_product(multipliers[b], matrix))
        if special and knobs.fate == "infeasible":
            fate[b] = int(Status.INFEASIBLE)
            others = np.delete(np.arange(m), me + mi - 1)
            finite = np.where(np.isfinite(rhs[b]), rhs[b], 0.0)
            total = exact_product(certificate[others], finite[others])
            rhs[b, me + mi - 1] = exact_sum(-total, np.asarray(-_power(-knobs.margin)))
            primal[b], multipliers[b] = np.nan, certificate
        elif special and knobs.fate == "unbounded":
            fate[b] = int(Status.UNBOUNDED)
            slope = exact_sum(exact_product(linear[b], ray), np.asarray(_power(-knobs.margin)))
            linear[b, pivot] = exact_sum(linear[b, pivot], -ray[pivot] * slope)

    def scales(size: int, decades: int) -> Array:
        return np.array([_power(decades * k / 8.0) for k in rng.integers(-8, 9, size)])

    return KnownCase(
        seed, knobs, hessian, linear, rows, rhs, primal, multipliers, me, nb,
        scales(m, knobs.row_spread), scales(n, knobs.column_spread) * _power(knobs.length_unit),
        _power(knobs.cost_unit), fate, ray,
    )  # fmt: skip


def known_case(seed: int) -> KnownCase:
    """Generate a case; everything follows from the seed."""
    knobs = _draw_knobs(np.random.default_rng([seed, 0]))
    modest = replace(knobs, small_multipliers=0, nearly_active=0)
    for attempt, (wish, bits) in enumerate(((knobs, 5), (knobs, 3), (knobs, 0), (modest, 0))):
        try:
            return _draw(seed, wish, np.random.default_rng([seed, 1 + attempt]), bits)
        except NotExactError:
            continue
    raise NotExactError(f"seed {seed}: {knobs}")


def describe(seed: int) -> str:
    """Say in words what a seed stands for."""
    case = known_case(seed)
    batch, n, m = case.shape
    fates = ", ".join(Status(int(code)).name for code in case.fate)
    knobs = ", ".join(f"{name}={value}" for name, value in asdict(case.knobs).items() if value not in (0, False))
    return (
        f"seed {seed}: {batch} items, {n} variables, {case.equalities} equalities, "
        f"{m - case.equalities - case.num_bounds} inequalities, {case.num_bounds} bounds\n"
        f"  to end as {fates}\n  {knobs}\n  {'extreme' if case.knobs.extreme else 'ordinary'}"
    )


_PRIME = 2**31 - 1


def exact_rank(matrix: Array) -> int:
    """Return the rank, computed in whole numbers modulo a prime: no rounding, wrong once in about a billion."""
    unit = _granularity(matrix)
    if not np.isfinite(unit):
        return 0
    # Row by row, so that rows of very different size still fit in 63 bits.
    scaled = [row / _granularity(row) for row in matrix if row.any()]
    if any(np.abs(row).max() >= 2.0**62 for row in scaled):
        work = np.array([[int(entry) % _PRIME for entry in row] for row in scaled], dtype=np.int64)
    else:
        work = np.array(scaled).astype(np.int64) % _PRIME
    rank = 0
    for column in range(work.shape[1]):
        found = np.flatnonzero(work[rank:, column])
        if not len(found):
            continue
        pivot = rank + int(found[0])
        work[[rank, pivot]] = work[[pivot, rank]]
        work[rank] = work[rank] * pow(int(work[rank, column]), _PRIME - 2, _PRIME) % _PRIME
        below = work[rank + 1 :]
        below -= below[:, column, None] * work[rank] % _PRIME
        below %= _PRIME
        rank += 1
        if rank == work.shape[0]:
            break
    return rank


def _unit_rows(matrix: Array) -> Array:
    size = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(size > 0.0, size, 1.0)


@dataclass(frozen=True)
class _Directions:
    """The directions between optima of one item: ``lines d = 0``, ``weak d <= 0``, and rows further away."""

    lines: Array
    firm: Array
    weak: Array
    faint: Array
    rest: Array
    room: Array


def _directions(case: KnownCase, b: int) -> _Directions:
    hessian, _, rows, rhs = case.item(b)
    multipliers, finite = case.drawn_multipliers[b], np.isfinite(rhs)
    slack = np.where(finite, rhs, 0.0) - rows @ case.drawn_primal[b]
    is_equal = np.arange(len(rhs)) < case.equalities
    tight = is_equal | (multipliers > 0.0)
    faint = tight & ~is_equal & (multipliers < UNIQUENESS_MARGIN * np.abs(multipliers).max(initial=0.0))
    weak = ~tight & finite & (slack == 0.0)
    rest = ~tight & finite & (slack > 0.0)
    size = np.linalg.norm(rows, axis=1)
    room = slack / np.where(size > 0.0, size, 1.0)
    scaled = hessian / max(float(np.abs(hessian).max()), float(np.finfo(np.float64).tiny))
    return _Directions(
        np.concatenate([hessian, rows[tight]]),
        np.concatenate([scaled, _unit_rows(rows[tight & ~faint])]),
        rows[weak],
        _unit_rows(rows[faint]),
        _unit_rows(rows[rest]),
        room[rest],
    )


_LP = {"primal_feasibility_tolerance": 1e-9, "dual_feasibility_tolerance": 1e-9}


def _surely_short(firm: Array, sided: Array) -> bool:
    """Whether no direction d with ``|firm d| <= 1e-3`` and ``sided d <= 1e-3`` is longer than 10.

    Write ``d = V y + W z`` with V the right singular vectors of ``firm`` (k rows) whose singular value is below 1e-2,
    W the others. Then ``1e-2 |z| <= |firm d| <= 1e-3 sqrt(k)``, and every entry of y lies between two linear programs:
    together these bound the length of all directions, not only of those that a chosen cost happens to see. A program
    that HiGHS does not solve proves nothing.
    """
    k, n = firm.shape
    _, singular, right = np.linalg.svd(firm, full_matrices=True) if k else (None, np.zeros(0), np.eye(n))
    flat = right[int(np.sum(singular >= 1e-2)) :]
    total = 0.01 * k
    rows, limits = np.concatenate([sided, firm, -firm]), np.full(len(sided) + 2 * k, 1e-3)
    for direction in flat:
        widest = 0.0
        for sign in (-1.0, 1.0):
            found = linprog(
                sign * direction, A_ub=rows, b_ub=limits, bounds=[(-1e3, 1e3)] * n, method="highs", options=_LP
            )
            if found.status != 0:
                return False
            widest = max(widest, -float(found.fun))
        total += widest**2
        if total > 100.0:
            return False
    return True


def _longest(lines: Array, rows: Array, limits: Array) -> tuple[float, Array]:
    """Look for a long direction d with ``lines d = 0``, ``rows d <= limits``, in a box of 1; HiGHS, two costs."""
    n = lines.shape[1]
    cost = np.random.default_rng(n).integers(64, 128, n) / 128.0
    cost[::2] *= -1.0
    best, direction = 0.0, np.zeros(n)
    equal = {"A_eq": lines, "b_eq": np.zeros(len(lines))} if len(lines) else {}
    for sign in (-1.0, 1.0):
        found = linprog(
            sign * cost, A_ub=rows, b_ub=limits, **equal, bounds=[(-1.0, 1.0)] * n, method="highs", options=_LP
        )
        if found.status == 0 and -found.fun > best:
            best, direction = float(-found.fun), np.asarray(found.x)
    return best, direction


def _soft(case: KnownCase, b: int) -> bool:
    """Whether a change of the costs by UNIQUENESS_MARGIN can move the optimum by about its own size."""
    hessian, linear, rows, _ = case.item(b)
    curvature = np.sort(np.linalg.eigvalsh(hessian))[len(linear) - exact_rank(hessian) :]
    if not len(curvature):
        return False
    nu = np.abs(case.drawn_multipliers[b])
    force = max(float(np.abs(linear).max()), float((nu * np.abs(rows).max(axis=1, initial=0.0)).max(initial=0.0)))
    return float(curvature[0]) * (1.0 + float(np.abs(case.drawn_primal[b]).max())) < UNIQUENESS_MARGIN * force


def is_unique(case: KnownCase, b: int) -> bool | None:
    """Whether the known optimum of an item is the only one; None where that hangs on less than UNIQUENESS_MARGIN.

    The optima are the feasible points x + d with ``Q d = 0``, ``A d = 0`` and ``G d = 0`` in the rows with a positive
    multiplier (Mangasarian, 1988). Unique with a margin: no direction of length one violates these by less than the
    margin. Not unique with a margin: a direction exists in exact arithmetic and can be followed for a length of 1e-3.

    Rows that are active but do not push end directions only where the optimum is. Where a curvature is so small beside
    the costs that a change of these by less than the margin moves the optimum off such rows, they prove nothing.
    """
    if case.knobs.near_dependent > 6:  # two rows that differ by less than the margin
        return None
    way = _directions(case, b)
    n = way.lines.shape[1]
    if way.firm.shape[0] >= n and np.linalg.svd(way.firm, compute_uv=False)[-1] > UNIQUENESS_MARGIN:
        return True
    weak = _unit_rows(way.weak)
    sided = np.concatenate([weak, way.faint])
    # In a box of 1e3 with violations of 1e-3: nothing longer than 10 means nothing of length 1 below 1e-4.
    if len(sided) and not _soft(case, b) and _surely_short(way.firm, sided):
        return True
    rank = exact_rank(np.concatenate([way.lines, way.weak]))
    lines = _unit_rows(way.lines)
    rows = np.concatenate([weak, way.rest])
    length, direction = _longest(lines, rows, np.concatenate([np.zeros(len(weak)), way.room]))
    if length < 1e-3:
        return None
    if rank < n:
        return False
    kept = way.weak[np.abs(weak @ direction) < 1e-7]
    return False if exact_rank(np.concatenate([way.lines, kept])) < n else None


def condition(case: KnownCase, b: int) -> float:
    """Return the condition of the KKT system at the answer, the worse of all active and of the pushing rows."""
    hessian, _, rows, rhs = case.item(b)
    finite = np.isfinite(rhs)
    slack = np.where(finite, rhs, 0.0) - rows @ case.drawn_primal[b]
    pushing = (np.arange(len(rhs)) < case.equalities) | (case.drawn_multipliers[b] > 0.0)
    active = pushing | (finite & (slack == 0.0))
    worst = 1.0
    for chosen in (pushing, active):
        normals = _unit_rows(rows[chosen])
        k = len(normals)
        system = np.block([[hessian, normals.T], [normals, np.zeros((k, k))]])
        values = np.linalg.svd(system, compute_uv=False)
        values = values[values > 1e-13 * values[0]] if values[0] > 0.0 else np.ones(1)
        worst = max(worst, float(max(1.0, values[0]) / values[-1]))
    return worst


@dataclass(frozen=True)
class Verdict:
    """What the judge says about one item.

    Attributes:
        complaints: what is wrong, empty when nothing is.
        not_converged: the solver gave up, and said so.
        unique: what is known about the uniqueness of the optimum, None for nothing certain.
    """

    complaints: tuple[str, ...]
    not_converged: bool = False
    unique: bool | None = None


def _within_tolerance(case: KnownCase, b: int, x: Array, multipliers: Array) -> bool:
    """Whether a point satisfies the KKT conditions to 1e-9, every sum relative to its own terms (docs/numerics.md).

    A problem without a solution by a margin of 1e-6 has neighbours within 1e-9 that have one, far away: a solver that
    returns it keeps what it promises.
    """
    hessian = case.hessian[b if len(case.hessian) > 1 else 0]
    rows, rhs, linear = case.rows[b if len(case.rows) > 1 else 0], case.rhs[b], case.linear[b]
    present = np.isfinite(rhs)
    rows, rhs, nu = rows[present], rhs[present], multipliers[present]
    inner = np.flatnonzero(present) >= case.equalities
    gap = rows @ x - rhs
    row_terms = np.abs(rows) @ np.abs(x) + np.abs(rhs)
    row_terms = row_terms + 0.01 * np.abs(rows).max(axis=1, initial=0.0) * np.abs(x).max()
    terms = np.abs(hessian) @ np.abs(x) + np.abs(linear) + np.abs(nu) @ np.abs(rows)
    terms = terms + 0.01 * terms.max()
    stationary = np.all(np.abs(hessian @ x + linear + nu @ rows) <= 1e-9 * terms)
    feasible = np.all(np.where(inner, gap, np.abs(gap)) <= 1e-9 * row_terms)
    signs = np.all(nu[inner] >= 0.0)
    pull = (np.abs(rows * nu[:, None]) / np.where(terms > 0.0, terms, np.inf)).max(axis=1, initial=0.0)
    complementary = np.all((pull <= 1e-9) | (np.abs(gap) <= 1e-9 * row_terms) | ~inner)
    return bool(stationary and feasible and signs and complementary)


def judge(
    case: KnownCase, b: int, status: int, x: Array, multipliers: Array, non_unique: bool | None = None
) -> Verdict:
    """Judge what a solver says about one item.

    Everything is measured in the units in which the problem was drawn: rows and columns that were scaled by a power of
    ten are scaled back, so that every residual is relative to its own row or component.

    Args:
        case: the problem.
        b: the item.
        status: the solver's status.
        x: (n,) the solver's optimum.
        multipliers: (m,) the solver's multipliers, ``Q x + q + rows' nu = 0``.
        non_unique: what the solver says about other optima, None when it says nothing.
    """
    wanted, told = Status(int(case.fate[b])), Status(status)
    if told == Status.NOT_CONVERGED:
        return Verdict((), not_converged=True)
    thin = case.knobs.margin >= 6 and told == Status.SOLVED and wanted != Status.SOLVED
    if thin and _within_tolerance(case, b, x, multipliers):
        return Verdict(())
    if told != wanted:
        return Verdict((f"status {told.name}, truth {wanted.name}",))
    if told != Status.SOLVED:
        clean = bool(np.isnan(x).all()) and bool(np.isnan(multipliers).all())
        return Verdict(() if clean else ("numbers in an item that failed",))
    if not (np.isfinite(x).all() and np.isfinite(multipliers).all()):
        return Verdict(("NaN or infinity in a solved item",))
    hessian, linear, rows, rhs = case.item(b)
    me, known, known_nu = case.equalities, case.drawn_primal[b], case.drawn_multipliers[b]
    x = x / case.column_scale
    nu = multipliers * case.row_scale / case.cost_scale
    complaints: list[str] = []

    def check(what: str, value: float, limit: float) -> None:
        if not value <= limit:
            complaints.append(f"{what} {value:.1e} > {limit:.1e}")

    present = np.isfinite(rhs)
    limits = np.where(present, rhs, 0.0)
    x_size = max(float(np.abs(x).max()), float(np.abs(known).max()), _FLOOR)
    nu_size = max(float(np.abs(nu).max(initial=0.0)), float(np.abs(known_nu).max(initial=0.0)))
    row_size = np.abs(rows).sum(axis=1) * x_size + np.abs(limits) + _FLOOR
    # Multipliers are as large as the costs they balance, even where they are all zero: errors are relative to that.
    cost = np.abs(hessian).sum(axis=1) * x_size + np.abs(linear)
    force = max(float(cost.max()), nu_size, _FLOOR)
    cost = cost + np.abs(nu) @ np.abs(rows) + np.abs(rows).max(axis=0, initial=0.0) * force + _FLOOR
    slack = limits - rows @ x
    violation = np.where(present, -slack, 0.0)
    violation[:me] = np.abs(slack[:me])
    check("primal residual", float((violation / row_size).max(initial=0.0)), TOLERANCE)
    check("stationarity", float((np.abs(hessian @ x + linear + nu @ rows) / cost).max()), TOLERANCE)
    check("sign of a multiplier", float((-nu[me:] / force).max(initial=0.0)), TOLERANCE)
    check("multiplier of an infinite limit", float((np.abs(nu[~present]) / force).max(initial=0.0)), TOLERANCE)
    products = np.abs(slack * nu)[present & (np.arange(len(rhs)) >= me)]
    sizes = row_size[present & (np.arange(len(rhs)) >= me)] * force
    check("complementarity", float((products / sizes).max(initial=0.0)), TOLERANCE)

    def objective(point: Array) -> float:
        return float(0.5 * point @ hessian @ point + linear @ point)

    terms = float(cost.sum()) * x_size + float(row_size.sum()) * nu_size
    check("objective", abs(objective(x) - objective(known)), TOLERANCE * terms)
    unique = is_unique(case, b)
    if unique:
        error = float(np.abs(x - known).max()) / (1.0 + float(np.abs(known).max()))
        check("distance from the known optimum", error, 0.1 * TOLERANCE * condition(case, b))
    if non_unique is not None and unique is not None and non_unique == unique:
        complaints.append(f"non_unique {non_unique}, but the optimum is {'' if unique else 'not '}unique")
    return Verdict(tuple(complaints), unique=unique)
