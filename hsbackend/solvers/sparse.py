"""Solve one sparse program: choose the method, check what it returns, read off the active set.

A positive diagonal Hessian goes to the dual semismooth Newton method, which needs products only; a positive definite
one to the primal-dual active set method with sparse factors. Everything else, and what these leave unsolved, goes to
the interior-point method (:mod:`hsbackend.solvers.interior_point`), as long as factors are expected to fit. Solutions
are checked against the data; infeasibility and unboundedness are claimed with a certificate that was checked too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import reverse_cuthill_mckee

from hsbackend import certificates
from hsbackend._sparse_kernels import factor_entries
from hsbackend.program import FloatArray, IndexArray
from hsbackend.solvers import interior_point, sparse_active_set, sparse_newton
from hsbackend.solvers.result import Options
from hsbackend.sparse_face import FaceSolveError, SparseFace
from hsbackend.sparse_program import SparseValues, compressed
from hsbackend.status import Status

#: Movements below this, relative to the point, are rounding.
_UNIQUE = 1e-7
#: Variables and rows up to which a failure is explained by linear programs.
_EXPLAINED = 3000
#: Variables and rows up to which a full factor fits (half of 30,000^2 numbers are 3.6 GB), and entries of larger ones.
_ANY_FACTOR, _FACTOR_ENTRIES = 30_000, 400_000_000


@dataclass(frozen=True)
class SparseResult:
    """Outcome of one sparse program.

    Attributes:
        status: SOLVED, or why not.
        primal: (n,) x, zero where not solved.
        rows: (m,) multipliers; for an infeasible program a Farkas combination.
        bounds: (n,) signed multipliers of the bounds, positive at the upper one; the same.
        ray: (n,) for an unbounded program a direction of descent without end, else None.
        steps: steps of the methods.
        face: the active face.
        method: ``"newton"``, ``"active set"`` or ``"interior"``.
        non_unique: whether there are other optima; the one of least norm is returned.
    """

    status: Status
    primal: FloatArray
    rows: FloatArray
    bounds: FloatArray
    ray: FloatArray | None
    steps: int
    face: SparseFace
    method: str
    non_unique: bool = False


def solve(values: SparseValues, options: Options, start: FloatArray | None = None) -> SparseResult:
    """Solve one program.

    Args:
        values: the program.
        options: accuracy, and which K.
        start: (m,) first guess of the multipliers.
    """
    early = _contradiction(values)
    if early is not None:
        return early
    found: SparseResult | None = None
    steps = 0
    if values.diagonal and bool(np.any(values.hessian < 0.0)):
        return _failed(values, Status.NOT_STRICTLY_CONVEX)
    if values.diagonal and bool(np.all(values.hessian > 0.0)):
        found = _by_newton(values, options, start)
        steps = found.steps
        if found.status in (Status.SOLVED, Status.INFEASIBLE):
            return found
    if factor_fits(values):
        found = _by_active_set(values, options) if not values.diagonal else None
        found = found or _by_interior_point(values, options)
        found = replace(found, steps=found.steps + steps)
    if found is None or found.status == Status.NOT_CONVERGED:
        return _explain(values) or found or _failed(values, Status.NOT_CONVERGED)
    return found


def factor_fits(values: SparseValues) -> bool:
    """Whether a sparse factor of the KKT matrix fits into memory.

    Up to a size any factor does. Beyond it the entries of a factor are counted in the order of Cuthill and McKee,
    which is good for chains and bands and bad for the rest: what fits in this order fits in that of the solver.
    """
    n, m = values.num_variables, values.num_rows
    if n + m <= _ANY_FACTOR:
        return True
    system = sp.csr_array(sp.block_array([[values.hessian_matrix, values.rows.T], [values.rows, None]], format="csr"))
    if system.nnz > _FACTOR_ENTRIES // 4:
        return False
    system.data[:] = 1.0
    order = reverse_cuthill_mckee(sp.csr_matrix(system), symmetric_mode=True)
    system = sp.csr_array(system[order][:, order])
    return int(factor_entries(system.indptr, system.indices, _FACTOR_ENTRIES)) <= _FACTOR_ENTRIES


def _explain(values: SparseValues) -> SparseResult | None:
    """Look for a certificate where no method found a solution; in small programs only, by linear programs."""
    n, m = values.num_variables, values.num_rows
    if n + m > _EXPLAINED:
        return None
    above, below = np.flatnonzero(np.isfinite(values.upper)), np.flatnonzero(np.isfinite(values.lower))
    unit = sp.eye_array(n, format="csr")
    rows = sp.csr_array(sp.vstack([values.rows, unit[above], -unit[below]]))
    limits = np.concatenate([values.rhs_rows, values.upper[above], -values.lower[below]])
    y = certificates.farkas(rows, limits, values.num_equalities)
    if y is not None:
        bounds = np.zeros(n)
        bounds[above] += y[m : m + len(above)]
        bounds[below] -= y[m + len(above) :]
        return _failed(values, Status.INFEASIBLE, y[:m], bounds)
    ray = certificates.ray(values.hessian_matrix, -values.rhs_primal, rows, limits, values.num_equalities)
    return None if ray is None else _failed(values, Status.UNBOUNDED, ray=ray)


def _failed(
    values: SparseValues, status: Status, rows: FloatArray | None = None, bounds: FloatArray | None = None,
    steps: int = 0, method: str = "newton", ray: FloatArray | None = None,
) -> SparseResult:  # fmt: skip
    n, m = values.num_variables, values.num_rows
    return SparseResult(
        status, np.zeros(n), np.zeros(m) if rows is None else rows, np.zeros(n) if bounds is None else bounds, ray,
        steps, SparseFace(values, np.arange(m) < values.num_equalities, np.zeros(n, dtype=np.int64)), method,
    )  # fmt: skip


def _contradiction(values: SparseValues) -> SparseResult | None:
    """Find NaN, crossing bounds and empty rows that cannot hold."""
    me = values.num_equalities
    matrix = () if values.diagonal else (values.hessian.data,)
    finite = (values.rhs_primal, values.rows.data, values.rhs_rows[:me], *matrix, values.curvature)
    if not all(np.isfinite(part).all() for part in finite):
        return _failed(values, Status.INVALID_INPUT)
    if any(np.isnan(part).any() for part in (values.lower, values.upper, values.rhs_rows)):
        return _failed(values, Status.INVALID_INPUT)
    crossing = np.flatnonzero((values.lower > values.upper) | (values.lower == np.inf) | (values.upper == -np.inf))
    if len(crossing):
        bounds = np.zeros(values.num_variables)
        bounds[crossing[0]] = 1.0
        return _failed(values, Status.INFEASIBLE, bounds=bounds)
    empty = ~(_row_norms(values) > 0.0)
    wrong = empty & np.where(np.arange(values.num_rows) < me, values.rhs_rows != 0.0, values.rhs_rows < 0.0)
    wrong |= values.rhs_rows == -np.inf
    if wrong.any():
        rows = np.zeros(values.num_rows)
        first = int(np.flatnonzero(wrong)[0])
        rows[first] = 1.0 if values.rhs_rows[first] < 0.0 else -1.0
        return _failed(values, Status.INFEASIBLE, rows=rows)
    return None


def _row_norms(values: SparseValues) -> FloatArray:
    """(m,) largest entry of every row."""
    largest = np.zeros(values.num_rows)
    filled = np.flatnonzero(np.diff(values.rows.indptr))
    if len(filled):
        largest[filled] = np.maximum.reduceat(np.abs(values.rows.data), values.rows.indptr[filled])
    return largest


def _pull(values: SparseValues, primal: FloatArray, rows: FloatArray) -> FloatArray:
    """(n,) ``a - Hx - N'nu``, what the bounds have to hold."""
    return values.rhs_primal - values.times_hessian(primal) - values.rows.T @ rows


def _by_newton(values: SparseValues, options: Options, start: FloatArray | None) -> SparseResult:
    me = values.num_equalities
    used = (_row_norms(values) > 0.0) & (values.rhs_rows < np.inf)
    part = values if used.all() else values.without_rows(used)
    found = sparse_newton.solve(part, options.inner_tolerance, None if start is None else start[used])

    def spread(on_part: FloatArray) -> FloatArray:
        whole = np.zeros(values.num_rows)
        whole[used] = on_part
        return whole

    x, nu = found.primal, spread(found.rows)
    bounds = np.where((x <= values.lower) | (x >= values.upper), _pull(values, x, nu), 0.0)
    if values.residual(x, nu, bounds) <= options.tolerance:
        sides = active_sides(values, x, nu, bounds, options)
        return SparseResult(Status.SOLVED, x, nu, bounds, None, found.steps, SparseFace(values, *sides), "newton")
    drift = spread(found.drift)
    drift[me:] = np.maximum(drift[me:], 0.0)
    farkas = _as_farkas(values, drift)
    if farkas is not None:
        return _failed(values, Status.INFEASIBLE, *farkas, steps=found.steps)
    return _failed(values, Status.NOT_CONVERGED, steps=found.steps)


def _problem(values: SparseValues) -> tuple[interior_point.Problem, IndexArray]:
    bounded = np.flatnonzero(np.isfinite(values.lower) | np.isfinite(values.upper)).astype(np.int64)
    problem = interior_point.Problem(
        sp.csc_array(values.hessian_matrix), values.rhs_primal, values.rows, values.num_equalities, values.rhs_rows,
        bounded, values.lower[bounded], values.upper[bounded],
    )  # fmt: skip
    return problem, bounded


def _as_farkas(values: SparseValues, rows: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """Complete weights of the rows by weights of the bounds, if together they show that there is no feasible point."""
    largest = float(np.abs(rows).max(initial=0.0))
    if not 0.0 < largest < np.inf:
        return None
    rows = rows / largest
    rows[np.abs(rows) < 1e-9] = 0.0
    total = values.rows.T @ rows
    bounds = np.where(total > 0.0, np.where(np.isfinite(values.lower), -total, 0.0), 0.0)
    bounds = np.where(total < 0.0, np.where(np.isfinite(values.upper), -total, 0.0), bounds)
    problem, bounded = _problem(values)
    return (rows, bounds) if interior_point.is_farkas(problem, rows, bounds[bounded]) else None


def _by_active_set(values: SparseValues, options: Options) -> SparseResult | None:
    if not _positive_definite(values):
        return None
    found = sparse_active_set.solve(values)
    if found is None or not values.residual(found.primal, found.rows, found.bounds) <= options.tolerance:
        return None
    sides = active_sides(values, found.primal, found.rows, found.bounds, options)
    same = np.array_equal(sides[0], found.face.rows) and np.array_equal(sides[1], found.face.bounds)
    face = found.face if same else SparseFace(values, *sides)
    x, nu, bounds = found.primal, found.rows, found.bounds
    return SparseResult(Status.SOLVED, x, nu, bounds, None, found.steps, face, "active set")


def _by_interior_point(values: SparseValues, options: Options) -> SparseResult:
    problem, bounded = _problem(values)
    found = interior_point.solve_problem(problem, options)
    n = values.num_variables
    bounds = np.zeros(n)
    if found.status == Status.INFEASIBLE:
        bounds[bounded] = found.bounds
        return _failed(values, found.status, found.rows, bounds, found.steps, "interior")
    if found.status != Status.SOLVED:
        return _failed(values, found.status, steps=found.steps, method="interior", ray=found.ray)
    bounds[bounded] = found.bounds
    if not values.residual(found.primal, found.rows, bounds) <= options.tolerance:
        return _failed(values, Status.NOT_CONVERGED, steps=found.steps, method="interior")
    sides = active_sides(values, found.primal, found.rows, bounds, options)
    face = SparseFace(values, *sides)
    result = SparseResult(Status.SOLVED, found.primal, found.rows, bounds, None, found.steps, face, "interior")
    return result if _positive_definite(values) else _select(values, result, options)


def _positive_definite(values: SparseValues) -> bool:
    """Whether H is positive definite at sight: a positive diagonal that dominates its rows."""
    if values.diagonal:
        return bool(np.all(values.hessian > 0.0))
    others = np.asarray(abs(values.hessian).sum(axis=1)).ravel() - np.abs(values.curvature)
    return bool(np.all(values.curvature > others * (1.0 + 1e-9)))


def _select(values: SparseValues, found: SparseResult, options: Options) -> SparseResult:
    """Choose the optimum of least norm where there are several, and say that there are.

    The optima are the feasible points with the same ``H x`` that keep the rows and bounds with a multiplier tight. A
    program of its own, with the identity as Hessian, projects on them: the origin for the choice, and points on both
    sides of it to see whether there is more than one.
    """
    options_support = replace(options, jacobian="support")
    held, side = active_sides(values, found.primal, found.rows, found.bounds, options_support)
    face = SparseFace(values, held, side)
    probe = np.random.default_rng(0).standard_normal(values.num_variables)
    try:
        direction = face.along(probe)
    except FaceSolveError:
        return found
    if np.abs(direction).max(initial=0.0) <= _UNIQUE * np.abs(probe).max(initial=0.0):
        return found
    x = found.primal
    n = len(x)
    if values.diagonal:
        fixed, curved = (side != 0) | (values.hessian > 0.0), sp.csr_array((0, n))
    else:
        fixed, curved = side != 0, values.hessian
    product = values.rows @ x
    rows = compressed(sp.vstack([curved, values.rows[np.flatnonzero(held)], values.rows[np.flatnonzero(~held)]]))
    optima = SparseValues(
        np.ones(n), np.zeros(n), rows, curved.shape[0] + int(held.sum()),
        np.concatenate([curved @ x, product[held], np.maximum(values.rhs_rows, product)[~held]]),
        np.where(fixed, x, np.minimum(values.lower, x)), np.where(fixed, x, np.maximum(values.upper, x)),
    )  # fmt: skip

    def nearest(point: FloatArray) -> SparseResult:
        return _by_newton(replace(optima, rhs_primal=point), options_support, None)

    chosen = nearest(np.zeros(n))
    if chosen.status != Status.SOLVED or not (
        values.residual(chosen.primal, found.rows, found.bounds) <= options.tolerance
    ):
        return replace(found, non_unique=True)
    size = float(np.abs(x).max(initial=0.0)) or 1.0
    direction *= size / np.abs(direction).max()

    def moves(point: FloatArray) -> bool:
        return bool(np.abs(point - chosen.primal).max(initial=0.0) > _UNIQUE * size)

    several = moves(x)
    for sign in (1.0, -1.0):
        if not several:
            other = nearest(chosen.primal + sign * direction)
            several = other.status == Status.SOLVED and moves(other.primal)
    # What holds the chosen point: rows with a multiplier, and those that hold it among the optima.
    if options.jacobian == "active":
        held, side = active_sides(values, chosen.primal, found.rows, found.bounds, options)
    else:
        again = np.zeros(values.num_rows, dtype=bool)
        again[np.concatenate([np.flatnonzero(held), np.flatnonzero(~held)])] = chosen.face.rows[curved.shape[0] :]
        held = held | again
        side = np.where((side == 0) & ~fixed, chosen.face.bounds, side)
    face = SparseFace(values, held, side, selected=True)
    return replace(found, primal=chosen.primal, face=face, non_unique=several, steps=found.steps + chosen.steps)


def active_sides(
    values: SparseValues, primal: FloatArray, rows: FloatArray, bounds: FloatArray, options: Options
) -> tuple[NDArray[np.bool_], IndexArray]:
    """Read off the index set K: all rows and bounds at their limit, or those with a multiplier.

    Slacks and multipliers are measured in units in which the Hessian has a diagonal of ones, relative to the largest
    ones.
    """
    curvature = values.curvature
    units = 1.0 / np.sqrt(np.where(curvature > 0.0, curvature, 1.0))
    reach = float(np.abs(primal / units).max(initial=0.0)) or 1.0
    entries = np.abs(values.rows.data) * units[values.rows.indices]
    length = np.zeros(values.num_rows)
    filled = np.flatnonzero(np.diff(values.rows.indptr))
    if len(filled):
        length[filled] = np.maximum.reduceat(entries, values.rows.indptr[filled])
    weight = rows * length
    force = float(max(np.abs(values.rhs_primal * units).max(initial=0.0), np.abs(weight).max(initial=0.0))) or 1.0
    tolerance = options.active_tolerance
    slack = values.rhs_rows - values.rows @ primal
    inside = np.where(np.isfinite(slack), slack, np.inf)
    size = length * reach
    held = weight > tolerance * force
    held &= weight * reach * length > np.maximum(inside, 0.0) * force
    at_upper = bounds * units > tolerance * force
    at_lower = -bounds * units > tolerance * force
    if options.jacobian == "active":
        limit = np.where(np.isfinite(values.rhs_rows), np.abs(values.rhs_rows), 0.0)
        held |= inside <= tolerance * (size + limit)
        above, below = values.upper - primal, primal - values.lower
        room = tolerance * (np.abs(primal) + reach * units)
        at_upper |= above <= room
        at_lower |= (below <= room) & ~at_upper
    held[: values.num_equalities] = True
    side = np.where(at_upper, 1, np.where(at_lower, -1, 0))
    side[values.lower == values.upper] = 1
    return held, side.astype(np.int64)
