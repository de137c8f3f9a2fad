"""Primal-dual interior-point method for convex quadratic programs: linear programs, singular H, large and sparse rows.

One item, with ``C x <= d`` for the inequality rows and the limits of the variables and a slack s for each of them, is

    minimise 1/2 x'Hx - a'x   subject to   E x = e,   C x + s = d,   s >= 0    (multipliers y free, z >= 0).

It is solved in these steps.

1. Fixed variables, infinite limits and empty rows are taken out, H and the rows are equilibrated (Ruiz) by powers of
   two, which rounds nothing, and the cost is scaled to one.
2. Mehrotra's predictor-corrector steps. Every step solves

       [H  E'   C'  ] [dx]   [r1]
       [E  0    0   ] [dy] = [r2]
       [C  0  -S/Z  ] [dz]   [r3]

   with ``H + rho I, -rho I, -(S/Z + rho I)`` on the diagonal and iterative refinement. That is a Newton step of the
   proximal method of multipliers, centred where it starts: it moves no solution, and a singular H and dependent rows
   are normal input. rho falls with the residuals. Dense items: Cholesky factors of
   ``H + rho I + C'(S/Z + rho I)^-1 C + E'E`` and of the Schur complement of E (adding ``E'E`` changes nothing on
   ``E x = e`` and keeps the first matrix regular where H is not). Sparse items: one sparse LU of the quasi-definite
   matrix, whose pattern and ordering are found once.
3. The active rows are those with a multiplier above the slack. On this face the KKT system is solved again, refined
   against the matrix without rho; wrong signs correct the face. The point that satisfies the KKT conditions best is
   returned.
4. Infeasibility is claimed with a Farkas combination (E'y + C'z = 0, z >= 0, e'y + d'z < 0), unboundedness with a ray
   (H r = 0, E r = 0, C r <= 0, a'r > 0) and a feasible point, each verified against the data. Candidates are the
   diverging iterates, and for items without an optimum the projection of ``(-e, -d)``, or of a, onto these cones.

Source: Mehrotra, "On the implementation of a primal-dual interior point method" (1992); Friedlander and Orban, "A
primal-dual regularized interior-point method for convex quadratic programs" (2012); Schwan, Jiang, Kuhn and Jones,
"PIQP: a proximal interior-point quadratic programming solver" (2023), whose code (BSD) was not used; Ruiz, "A scaling
algorithm to equilibrate both rows and columns norms in matrices" (2001).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.linalg import blas, lapack, lstsq
from scipy.sparse.linalg import lsmr, splu

from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers._verify_kernels import GLOBAL, LEAST, LIMITS
from hsbackend.solvers.result import Options, Result
from hsbackend.status import Status

Mask = NDArray[np.bool_]

#: Steps of one item at the most; 5 to 25 are usual.
_STEPS = 150
#: Relative residuals, in scaled units, at which the steps end; the second one when the face is not found at the first.
_ACCURACY = (1e-10, 1e-13)
#: Regularisation of the scaled system: at first, and in the end.
_REGULARISATION = (1e-5, 1e-10)
#: Slacks and multipliers are kept above this.
_POSITIVE = 1e-60
#: Negative curvature, relative to the largest entry, that is rounding (as in the semidefinite solver).
_NEGATIVE = 1e-10
#: Items with more variables and a smaller share of non-zeros than this go to sparse factors.
_SPARSE_SIZE, _SPARSE_SHARE = 300, 0.15
#: One operation of the sparse factorisation costs as much as this many of the dense one (measured on one core: SuperLU
#: takes 1e9 of them in a second, OpenBLAS 1e10).
_SPARSE_COST = 10.0
#: A combination of rows or a direction of length one is near a certificate when it misses one by less than this.
_NEAR = 1e-2
#: How often the face is corrected.
_CORRECTIONS = 10
#: A Farkas combination excludes points up to this multiple of its limits; curvature and violation of a ray.
_REACH, _RAY = 1e9, 1e-12


@dataclass(frozen=True)
class Problem:
    """One quadratic program, ``minimise 1/2 x'Hx - a'x`` subject to rows and limits.

    Attributes:
        hessian: (n, n) H, symmetric; an array or a scipy sparse matrix.
        linear: (n,) a.
        rows: (m, n) N, equalities first; an array or a scipy sparse matrix.
        num_equalities: number of equality rows.
        rhs: (m,) right-hand side; inf where an inequality row has no limit.
        bounded: (nb,) variables with limits, each once.
        lower: (nb,), may hold -inf.
        upper: (nb,), may hold inf.
    """

    hessian: Any
    linear: FloatArray
    rows: Any
    num_equalities: int
    rhs: FloatArray
    bounded: IndexArray
    lower: FloatArray
    upper: FloatArray


@dataclass(frozen=True)
class Solution:
    """Outcome of one problem.

    Attributes:
        status: SOLVED, or why not.
        primal: (n,), NaN where not solved.
        rows: (m,) multipliers; for an infeasible problem the Farkas combination; otherwise NaN.
        bounds: (nb,) the same for the limits, positive at the upper one. For crossing limits: 1, and zero elsewhere.
        steps: interior-point steps.
        residual: largest relative violation of the KKT conditions, as the other solvers measure it.
        ray: (n,) for an unbounded problem: a direction of descent without end; otherwise None.
    """

    status: Status
    primal: FloatArray
    rows: FloatArray
    bounds: FloatArray
    steps: int
    residual: float
    ray: FloatArray | None = None


def _failed(problem: Problem, status: Status, steps: int = 0) -> Solution:
    x, rows, bounds = (np.full(size, np.nan) for size in (len(problem.linear), len(problem.rhs), len(problem.bounded)))
    return Solution(status, x, rows, bounds, steps, np.inf)


def solve(values: QPValues, options: Options) -> Result:
    """Solve a batch of convex quadratic programs, one item after the other.

    Solves ``minimise 1/2 x'Hx - a'x`` subject to ``N x = h`` (the first rows), ``N x <= h``, ``lower <= x_j <= upper``
    for H positive semidefinite, zero included, and any rows: dependent, duplicated, redundant, empty.

    Args:
        values: the problems; ``proximal`` is not read.
        options: ``tolerance`` is the largest accepted KKT residual; nothing else is read.

    Returns:
        Result without a face (:func:`active_sides` gives the sides to build one from). Which of several optima is
        returned is not specified. Where an item is infeasible, rows and bounds hold the Farkas combination;
        in bounds, limits that cross are marked with 1.

    Notes:
        A step costs ``m n^2 + n^3 / 3`` operations for dense items, one sparse LU for sparse ones; 5 to 25 steps are
        usual. Memory: a few copies of the data of one item. Items are independent: none sees the numbers of another.
    """
    batch = values.batch
    result = Result.failed(values, Status.NOT_CONVERGED)
    shared: _Matrices | None = None
    for b in range(batch):
        if shared is None or values.hessian.shape[0] > 1 or values.rows.shape[0] > 1:
            hessian = values.hessian[b if values.hessian.shape[0] > 1 else 0]
            rows = values.rows[b if values.rows.shape[0] > 1 else 0]
            shared = _Matrices.build(_square(hessian), rows)
        problem = Problem(
            shared.hessian, values.rhs_primal[b], shared.rows, values.num_equalities, values.rhs_rows[b],
            values.bounded, values.lower[b], values.upper[b],
        )  # fmt: skip
        found = _solve(problem, shared, options.tolerance)
        result.primal[b], result.rows[b], result.bounds[b] = found.primal, found.rows, found.bounds
        result.status[b], result.steps[b] = int(found.status), found.steps
    return result


def _square(hessian: FloatArray) -> Any:
    """Return a Hessian given by its diagonal as a matrix."""
    if hessian.ndim == 2:
        return hessian
    return sp.diags_array(hessian) if len(hessian) else np.zeros((0, 0))


def solve_problem(problem: Problem, options: Options) -> Solution:
    """Solve one problem, whose matrices may be sparse; as :func:`solve`, and with the ray of an unbounded one."""
    matrices = _Matrices.build(problem.hessian, problem.rows)
    return _solve(replace(problem, hessian=matrices.hessian, rows=matrices.rows), matrices, options.tolerance)


def active_sides(
    values: QPValues, primal: FloatArray, rows: FloatArray, bounds: FloatArray
) -> tuple[IndexArray, IndexArray]:
    """Read the active rows and bounds off a solution: those whose multiplier is larger than their slack.

    Both are scaled: multipliers by ``|N_i| / (1 + |a|)``, slacks by ``1 / (|N_i| (1 + |x|))``.

    Args:
        values: the problems.
        primal: (B, n).
        rows: (B, m) multipliers.
        bounds: (B, nb) signed multipliers, positive at the upper limit.

    Returns:
        Sides of the rows (B, m), 0 or 1, equalities 1, and of the bounds (B, nb), -1 at the lower limit, 1 at the upper
        one, 0 between them. Items without a solution (NaN) have no active side but their equalities.
    """
    size_dual = 1.0 + np.abs(values.rhs_primal).max(axis=1, initial=0.0)[:, None]
    size_primal = 1.0 + np.abs(primal).max(axis=1, initial=0.0)[:, None]
    norms = np.linalg.norm(values.rows, axis=2)
    norms = np.where(norms > 0.0, norms, 1.0)
    product = (values.rows @ primal[:, :, None])[:, :, 0]
    slack = (values.rhs_rows - product) / (norms * size_primal)
    side_rows = (rows * norms / size_dual > np.maximum(slack, 0.0)).astype(np.int64)
    side_rows[:, : values.num_equalities] = 1
    at = primal[:, values.bounded]
    above = bounds / size_dual > np.maximum(values.upper - at, 0.0) / size_primal
    below = -bounds / size_dual > np.maximum(at - values.lower, 0.0) / size_primal
    side_bounds = above.astype(np.int64) - (below & ~above)
    fixed = (values.lower == values.upper) & np.isfinite(at)
    return side_rows, np.where(fixed & (side_bounds == 0), 1, side_bounds)


# --- data -------------------------------------------------------------------------------------------------------------


def _largest(vector: FloatArray) -> float:
    return float(np.abs(vector).max(initial=0.0))


def _power_of_two(scale: FloatArray) -> FloatArray:
    """Round scales to powers of two, so that scaling and unscaling are exact."""
    return np.exp2(np.clip(np.rint(np.log2(scale)), -60, 60))


@dataclass(frozen=True)
class _Matrices:
    """H and N of one or more items, as they came and equilibrated.

    Attributes:
        hessian: (n, n), array or csc.
        rows: (m, n), array or csr.
        finite: whether both are.
        convex: whether H is positive semidefinite up to rounding.
        empty: (m,) whether a row of N has no entry.
        columns: (n,) scale D of the variables, ``x = D x'``.
        weights: (m,) scale R of the rows.
    """

    hessian: Any
    rows: Any
    finite: bool
    convex: bool
    empty: Mask
    columns: FloatArray
    weights: FloatArray

    @classmethod
    def build(cls, hessian: Any, rows: Any) -> _Matrices:
        """Choose dense or sparse storage, equilibrate, and look for negative curvature."""
        m, n = rows.shape
        entries = sum(int(part.nnz if sp.issparse(part) else np.count_nonzero(part)) for part in (hessian, rows))
        if n > _SPARSE_SIZE and entries < _SPARSE_SHARE * n * (n + m):
            hessian, rows = sp.csc_array(hessian), sp.csr_array(rows)
            finite = bool(np.isfinite(hessian.data).all() and np.isfinite(rows.data).all())
        else:
            hessian, rows = (part.toarray() if sp.issparse(part) else part for part in (hessian, rows))
            finite = bool(np.isfinite(hessian).all() and np.isfinite(rows).all())
        if not finite:
            return cls(hessian, rows, False, True, np.zeros(m, dtype=bool), np.ones(n), np.ones(m))
        sizes = abs(hessian), abs(rows)
        empty = _row_norms(rows, np.ones(n)) == 0.0
        return cls(hessian, rows, True, _convex(hessian), empty, *_equilibrate(*sizes))


def _convex(hessian: Any) -> bool:
    """Whether a symmetric matrix is positive semidefinite: whether it has a Cholesky factor after a tiny shift."""
    n = hessian.shape[0]
    if sp.issparse(hessian):
        largest = _largest(hessian.data)
        if not largest:
            return True
        shifted = sp.csc_array(hessian + _NEGATIVE * largest * sp.eye_array(n))
        try:
            factor = splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        except RuntimeError:  # a zero pivot
            return False
        # Pivots off the diagonal are taken only where the diagonal is zero.
        return bool(np.array_equal(factor.perm_r, factor.perm_c) and np.all(factor.U.diagonal() > 0.0))
    largest = _largest(hessian)
    if not largest:
        return True
    shifted = np.array(hessian, order="F")
    np.einsum("ii->i", shifted)[:] += _NEGATIVE * largest
    return lapack.dpotrf(shifted, lower=1, overwrite_a=1, clean=0)[1] == 0


def _equilibrate(hessian: Any, rows: Any) -> tuple[FloatArray, FloatArray]:
    """Return scales D (n,) and R (m,), powers of two: the largest entries of [DHD, DN'R; RND, 0] are near one."""
    m, n = rows.shape
    columns, weights = np.ones(n), np.ones(m)
    if not n:
        return columns, weights

    def largest(matrix: Any, axis: int) -> FloatArray:
        if sp.issparse(matrix):
            return matrix.max(axis=axis).toarray().ravel() if matrix.shape[axis] else np.zeros(matrix.shape[1 - axis])
        return matrix.max(axis=axis, initial=0.0)

    for _ in range(12):
        if sp.issparse(rows):
            left, up = sp.diags_array(columns), sp.diags_array(weights)
            h, g = sp.csc_array(left @ hessian @ left), sp.csr_array(up @ rows @ left)
        else:
            h, g = columns[:, None] * hessian * columns, weights[:, None] * rows * columns
        by_column, by_row = np.maximum(largest(h, 0), largest(g, 0)), largest(g, 1)
        by_column[by_column == 0.0] = 1.0
        by_row[by_row == 0.0] = 1.0
        both = np.concatenate([by_column, by_row])
        if both.max() <= 4.0 and both.min() >= 0.25:
            break
        columns, weights = columns / np.sqrt(by_column), weights / np.sqrt(by_row)
    return _power_of_two(columns), _power_of_two(weights)


@dataclass(frozen=True)
class _Scaled:
    """One item without fixed variables, empty rows and infinite limits, in scaled units.

    Attributes:
        hessian: (n, n) H.
        linear: (n,) a.
        equalities: (me, n) E.
        rhs: (me,) e.
        general: (mi, n) the inequality rows G; C holds them, the lower limits (as ``-x <= -l``) and the upper ones.
        at_lower: variables with a lower limit.
        at_upper: variables with an upper limit.
        limits: (mi + lower + upper,) d.
    """

    hessian: Any
    linear: FloatArray
    equalities: Any
    rhs: FloatArray
    general: Any
    at_lower: IndexArray
    at_upper: IndexArray
    limits: FloatArray

    def apply(self, x: FloatArray) -> FloatArray:
        """Return C x."""
        return np.concatenate([self.general @ x, -x[self.at_lower], x[self.at_upper]])

    def combine(self, z: FloatArray) -> FloatArray:
        """Return C'z."""
        mi, split = self.general.shape[0], self.general.shape[0] + len(self.at_lower)
        total = self.general.T @ z[:mi]
        total[self.at_lower] -= z[mi:split]
        total[self.at_upper] += z[split:]
        return total

    def on_diagonal(self, w: FloatArray) -> FloatArray:
        """Return the part of the limits in the diagonal of ``C' diag(w) C``."""
        mi, split = self.general.shape[0], self.general.shape[0] + len(self.at_lower)
        total = np.zeros(len(self.linear))
        total[self.at_lower] += w[mi:split]
        total[self.at_upper] += w[split:]
        return total


class _Item:
    """One problem, its scaled form, and the ways between them.

    Attributes:
        problem: the data.
        scaled: what the steps work on.
    """

    def __init__(self, problem: Problem, matrices: _Matrices) -> None:
        """Take out what is decided, and scale the rest; limits must not cross."""
        n, me = len(problem.linear), problem.num_equalities
        self.problem = problem
        lower, upper = np.full(n, -np.inf), np.full(n, np.inf)
        lower[problem.bounded], upper[problem.bounded] = problem.lower, problem.upper
        fixed = lower == upper
        self.free = np.flatnonzero(~fixed)
        self.start = np.where(fixed, lower, 0.0)
        empty = matrices.empty
        every = np.arange(len(problem.rhs))
        self.kept_equalities = np.flatnonzero((every < me) & ~empty)
        self.kept_general = np.flatnonzero((every >= me) & ~empty & (problem.rhs < np.inf))
        columns, weights = matrices.columns[self.free], matrices.weights
        rhs, linear = problem.rhs, problem.linear
        if fixed.any():
            rhs = rhs - problem.rows @ self.start
            linear = linear - problem.hessian @ self.start
        hessian = problem.hessian
        if len(self.free) < n:
            hessian = hessian[self.free][:, self.free]
        hessian = _scale(columns, hessian, columns)
        linear = columns * linear[self.free]
        entries = hessian.data if sp.issparse(hessian) else hessian
        size = max(_largest(linear), _largest(entries))
        self.cost = float(_power_of_two(np.array(1.0 / size))) if size > 0.0 else 1.0
        self.columns, self.weights, self.units = columns, weights, matrices.columns

        def rows(index: IndexArray) -> Any:
            if len(self.free) == n and len(index) and index[-1] - index[0] + 1 == len(index):
                return _scale(weights[index], problem.rows[index[0] : index[-1] + 1], columns)
            return _scale(weights[index], problem.rows[index][:, self.free], columns)

        at_lower = np.flatnonzero(np.isfinite(lower[self.free]))
        at_upper = np.flatnonzero(np.isfinite(upper[self.free]))
        inside_lower, inside_upper = lower[self.free] / columns, upper[self.free] / columns
        equal, general = self.kept_equalities, self.kept_general
        self.scaled = _Scaled(
            hessian * self.cost, linear * self.cost, rows(equal), weights[equal] * rhs[equal],
            rows(general), at_lower, at_upper,
            np.concatenate([weights[general] * rhs[general], -inside_lower[at_lower], inside_upper[at_upper]]),
        )  # fmt: skip

    def primal(self, x: FloatArray) -> FloatArray:
        """Return the point (n,) of the data."""
        full = self.start.copy()
        full[self.free] = self.columns * x
        return full

    def multipliers(self, x: FloatArray | None, y: FloatArray, z: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the multipliers of the rows (m,) and bounds (nb,); without x, of a combination of rows alone."""
        problem, item = self.problem, self.scaled
        mi, split = len(self.kept_general), len(self.kept_general) + len(item.at_lower)
        rows = np.zeros(len(problem.rhs))
        rows[self.kept_equalities] = self.weights[self.kept_equalities] * y / self.cost
        rows[self.kept_general] = self.weights[self.kept_general] * z[:mi] / self.cost
        full = np.zeros(len(problem.linear))
        full[self.free[item.at_lower]] -= z[mi:split] / (self.cost * self.columns[item.at_lower])
        full[self.free[item.at_upper]] += z[split:] / (self.cost * self.columns[item.at_upper])
        if len(self.free) < len(full):  # fixed variables take what is left
            rest = -(problem.rows.T @ rows)
            if x is not None:
                rest += problem.linear - problem.hessian @ self.primal(x)
            fixed = np.ones(len(full), dtype=bool)
            fixed[self.free] = False
            full[fixed] = rest[fixed]
        return rows, full[problem.bounded]


def _row_norms(rows: Any, units: FloatArray) -> FloatArray:
    """Return the largest entry of each row, in units of the variables."""
    if sp.issparse(rows):
        return (
            abs(rows @ sp.diags_array(units)).max(axis=1).toarray().ravel()
            if rows.shape[1]
            else np.zeros(rows.shape[0])
        )
    return np.abs(rows * units).max(axis=1, initial=0.0)


def _scale(left: FloatArray, matrix: Any, right: FloatArray) -> Any:
    """Return diag(left) matrix diag(right), as csr where it is sparse."""
    if sp.issparse(matrix):
        return sp.csr_array(sp.diags_array(left) @ matrix @ sp.diags_array(right)) if min(matrix.shape) else matrix
    return np.ascontiguousarray(left[:, None] * matrix * right)


def kkt_residual(problem: Problem, primal: FloatArray, rows: FloatArray, bounds: FloatArray) -> float:
    """Return the largest relative violation of the KKT conditions of one problem, NaN where a number is NaN.

    The measure of :mod:`hsbackend.solvers._verify_kernels`, for matrices that may be sparse.
    """
    me, at = problem.num_equalities, primal[problem.bounded]
    hessian, normals = abs(problem.hessian), abs(problem.rows)
    diagonal = problem.hessian.diagonal()
    curved = diagonal > 0.0
    units = np.where(curved, 1.0 / np.sqrt(np.where(curved, diagonal, 1.0)), 0.0)
    if not curved.all():
        size, plain = _row_largest(problem.rows, units), _row_largest(problem.rows, np.ones(len(units)))
        size = np.where(size > 0.0, size, plain)
        column = _row_largest(problem.rows.T, np.where(size > 0.0, 1.0 / np.where(size > 0.0, size, 1.0), 0.0))
        units = np.where(curved, units, 1.0 / np.where(column > 0.0, column, 1.0))
    limit = np.where(np.isfinite(problem.rhs), np.abs(problem.rhs), 0.0)
    length = _row_largest(problem.rows, units)
    curvature = float(np.max(np.maximum(diagonal, 0.0) * units**2, initial=0.0))
    plain, stiffness = _row_largest(problem.rows, np.ones(len(units))), float(np.max(diagonal, initial=0.0))
    there = length > 0.0
    reach = max(LEAST, _largest(primal / units), LIMITS * _largest(limit[there] / length[there]))
    largest, away = max(LEAST, _largest(primal)), _largest(limit[there] / plain[there])
    if curvature > 0.0:
        reach = max(reach, LIMITS * _largest(problem.linear * units) / curvature)
        away = max(away, _largest(problem.linear) / stiffness)
    for sides in (problem.lower, problem.upper):
        finite = np.where(np.isfinite(sides), sides, 0.0)
        reach = max(reach, LIMITS * _largest(finite / units[problem.bounded]))
        away = max(away, _largest(finite))
    largest = max(largest, LIMITS * away)
    stationarity = problem.hessian @ primal - problem.linear + problem.rows.T @ rows
    terms = hessian @ np.abs(primal) + np.abs(problem.linear) + normals.T @ np.abs(rows)
    np.add.at(stationarity, problem.bounded, bounds)
    np.add.at(terms, problem.bounded, np.abs(bounds))
    if not np.isfinite(stationarity).all():
        return np.nan
    force = max(LEAST, curvature * reach, _largest(terms * units))
    terms = terms + GLOBAL * np.minimum(force / units, max(LEAST, stiffness * LIMITS * away, _largest(terms)))
    gap = problem.rows @ primal - problem.rhs
    size = normals @ np.abs(primal) + limit + GLOBAL * np.minimum(reach * length, largest * plain)
    pull = np.abs(rows) * _row_largest(problem.rows, 1.0 / np.where(terms > 0.0, terms, np.inf))
    violation = _ratio(np.abs(gap), size)
    inner = np.arange(len(gap)) >= me
    violation = np.where(inner & (gap <= 0.0), np.where(rows > 0.0, np.minimum(violation, pull), 0.0), violation)
    wrong = np.where(inner & (rows < 0.0), pull, 0.0)
    force = _ratio(np.abs(bounds), terms[problem.bounded])
    outside = np.zeros(len(bounds))
    for past, pushed in ((at - problem.upper, bounds > 0.0), (problem.lower - at, bounds < 0.0)):
        scale = 2.0 * np.abs(at) + np.abs(past)
        amount = _ratio(np.abs(past), scale + GLOBAL * np.minimum(reach * units[problem.bounded], largest))
        amount = np.where(np.isfinite(past), amount, np.inf)
        outside = np.maximum(outside, np.where(past > 0.0, amount, np.where(pushed, np.minimum(amount, force), 0.0)))
    parts = (_ratio(np.abs(stationarity), terms), violation, wrong, outside)
    return max(_largest(part) for part in parts)


def _ratio(amount: FloatArray, size: FloatArray) -> FloatArray:
    """Divide; zero over zero is zero."""
    finite = np.where(np.isfinite(amount), amount, 0.0)
    return np.where(amount > 0.0, finite / np.where(size > 0.0, size, np.finfo(np.float64).tiny), 0.0)


def _row_largest(matrix: Any, weights: FloatArray) -> FloatArray:
    """Return the largest entry ``|matrix_ij| weights_j`` of every row."""
    if not matrix.shape[1]:
        return np.zeros(matrix.shape[0])
    weighted = abs(matrix @ sp.diags_array(weights)) if sp.issparse(matrix) else np.abs(matrix) * weights
    largest = weighted.max(axis=1)
    return np.asarray(largest.todense()).ravel() if sp.issparse(largest) else np.asarray(largest)


class _DenseSystem:
    """Quasi-definite system of a dense item: Cholesky factor of ``H + C'WC + E'E``, then the Schur complement of E."""

    def __init__(self, item: _Scaled) -> None:
        """Prepare what does not change between steps."""
        self.item = item
        self.base = np.array(item.hessian, order="F")
        if item.equalities.shape[0]:
            self.base += item.equalities.T @ item.equalities
        self.weighted = np.empty_like(item.general)
        self.across = np.asfortranarray(item.equalities.T)

    def factor(self, t: FloatArray, rho: float, delta: float) -> bool:
        """Factor for the slack-to-multiplier ratios t; False if rounding makes the matrix indefinite."""
        item = self.item
        self.w, self.delta = 1.0 / (t + delta), delta
        mi, me = item.general.shape[0], item.equalities.shape[0]
        matrix = self.base.copy(order="F")
        if not len(matrix):
            return True
        if mi:
            np.multiply(item.general, np.sqrt(self.w[:mi])[:, None], out=self.weighted)
            matrix = blas.dsyrk(1.0, self.weighted.T, beta=1.0, c=matrix, lower=1, overwrite_c=1)
        np.einsum("ii->i", matrix)[:] += item.on_diagonal(self.w) + rho
        self.lower, info = lapack.dpotrf(matrix, lower=1, overwrite_a=1, clean=0)
        if info or not np.isfinite(self.lower[-1, -1]):
            return False
        if me:
            self.half = blas.dtrsm(1.0, self.lower, self.across, lower=1)
            schur = blas.dsyrk(1.0 - delta, self.half, trans=1, lower=1)
            np.einsum("ii->i", schur)[:] += delta
            self.schur, info = lapack.dpotrf(schur, lower=1, overwrite_a=1, clean=0)
        return info == 0

    def solve(self, r1: FloatArray, r2: FloatArray, r3: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return (dx, dy, dz)."""
        item = self.item
        if not len(r1):
            return r1, -r2 / self.delta, -self.w * r3
        right = r1 + item.combine(self.w * r3)
        if not len(r2):
            dx, dy = lapack.dpotrs(self.lower, right, lower=1)[0], r2
        else:
            right = blas.dtrsv(self.lower, right + item.equalities.T @ r2, lower=1)
            dy = lapack.dpotrs(self.schur, self.half.T @ right - r2, lower=1)[0]
            dx = blas.dtrsv(self.lower, right - (1.0 - self.delta) * (self.half @ dy), lower=1, trans=1)
        return dx, dy, self.w * (item.apply(dx) - r3)


class _SparseSystem:
    """Quasi-definite system of a sparse item: a sparse LU without pivoting, its pattern and ordering found once."""

    def __init__(self, item: _Scaled) -> None:
        """Order once; only the diagonal changes between steps."""
        self.item = item
        e, g = item.equalities, item.general
        self.sizes = n, me, mi = len(item.linear), e.shape[0], g.shape[0]
        # A first diagonal of ones keeps every place in the pattern.
        blocks = [
            [item.hessian + sp.eye_array(n), e.T, g.T],
            [e, -sp.eye_array(me), None],
            [g, None, -sp.eye_array(mi)],
        ]
        keep = [0, *([1] if me else []), *([2] if mi else [])]
        matrix = sp.csc_array(sp.block_array([[blocks[i][j] for j in keep] for i in keep], format="csc"))
        order = np.argsort(self._lu(matrix, "MMD_AT_PLUS_A").perm_c)
        self.order = order
        self.matrix = sp.csc_array(matrix[order][:, order])
        self.matrix.sort_indices()
        columns = np.repeat(np.arange(n + me + mi), np.diff(self.matrix.indptr))
        self.places = np.flatnonzero(self.matrix.indices == columns)
        self.fixed = np.concatenate([item.hessian.diagonal(), np.zeros(me + mi)])
        lower = self._lu(self.matrix, "NATURAL").L
        self.work = float(np.sum(np.diff(lower.indptr).astype(np.float64) ** 2))

    @staticmethod
    def _lu(matrix: Any, ordering: str) -> Any:
        return splu(matrix, permc_spec=ordering, diag_pivot_thresh=0.0, options={"SymmetricMode": True})

    def factor(self, t: FloatArray, rho: float, delta: float) -> bool:
        """Factor for the slack-to-multiplier ratios t; False for a zero pivot."""
        n, me, mi = self.sizes
        self.w = 1.0 / (t + delta)
        diagonal = self.fixed.copy()
        diagonal[:n] += self.item.on_diagonal(self.w) + rho
        diagonal[n : n + me] = -delta
        diagonal[n + me :] = -(t[:mi] + delta)
        self.matrix.data[self.places] = diagonal[self.order]
        try:
            self.lu = self._lu(self.matrix, "NATURAL")
        except RuntimeError:
            return False
        return True

    def solve(self, r1: FloatArray, r2: FloatArray, r3: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return (dx, dy, dz)."""
        n, me, mi = self.sizes
        of_limits = self.w * r3
        of_limits[:mi] = 0.0
        right = np.concatenate([r1 + self.item.combine(of_limits), r2, r3[:mi]])
        solution = np.empty_like(right)
        solution[self.order] = self.lu.solve(right[self.order])
        dx, dy = solution[:n], solution[n : n + me]
        dz = self.w * (self.item.apply(dx) - r3)
        dz[:mi] = solution[n + me :]
        return dx, dy, dz


def _system(item: _Scaled) -> _DenseSystem | _SparseSystem:
    """Choose the factorisation; a sparse item whose factors fill in is cheaper as a dense one."""
    if not sp.issparse(item.general):
        return _DenseSystem(item)
    system = None
    n, me, mi = len(item.linear), item.equalities.shape[0], item.general.shape[0]
    if n:
        with suppress(RuntimeError):  # a zero pivot
            system = _SparseSystem(item)
    dense = n * n * (mi + n / 3.0) + n * me * (n + me)
    too_large = n * (n + me + mi) > 1e8
    if system is not None and (too_large or _SPARSE_COST * system.work < dense):
        return system
    return _DenseSystem(replace(item, hessian=item.hessian.toarray(), equalities=item.equalities.toarray(),
                                general=item.general.toarray()))  # fmt: skip


def _newton(
    system: _DenseSystem | _SparseSystem, t: FloatArray, r1: FloatArray, r2: FloatArray, r3: FloatArray,
    shift: float, accuracy: float, most: int,
) -> tuple[FloatArray, FloatArray, FloatArray, float]:  # fmt: skip
    """Solve the Newton system by refinement; return dx, dy, dz and the relative error.

    Args:
        system: factored, with any regularisation.
        t: ratios of slacks to multipliers.
        r1: right-hand side of the stationarity.
        r2: right-hand side of the equalities.
        r3: right-hand side of the inequalities.
        shift: regularisation of the matrix that the refinement aims at; 0 for the matrix itself.
        accuracy: relative error at which the refinement ends.
        most: refinements.
    """
    item = system.item
    size = max(_largest(r1), _largest(r2), _largest(r3))

    def residuals(dx: FloatArray, dy: FloatArray, dz: FloatArray) -> tuple[Any, ...]:
        e1 = r1 - (item.hessian @ dx + item.equalities.T @ dy + item.combine(dz))
        e2, e3 = r2 - item.equalities @ dx, r3 - item.apply(dx) + t * dz
        if shift:
            e1, e2, e3 = e1 - shift * dx, e2 + shift * dy, e3 + shift * dz
        error = max(_largest(e1), _largest(e2), _largest(e3))
        return e1, e2, e3, error if np.isfinite(error) else np.inf

    step = system.solve(r1, r2, r3)
    left = residuals(*step)
    for _ in range(most):
        if left[3] <= accuracy * size:
            break
        more = system.solve(*left[:3])
        refined = tuple(old + new for old, new in zip(step, more, strict=True))
        after = residuals(*refined)
        if not after[3] < left[3]:
            break
        slow = after[3] > 0.5 * left[3]
        step, left = refined, after
        if slow:
            break
    return step[0], step[1], step[2], left[3] / size if size else 0.0


# --- steps ------------------------------------------------------------------------------------------------------------


def _longest(values: FloatArray, step: FloatArray) -> float:
    """Return the longest step up to 1 that keeps positive numbers from falling below zero."""
    return 1.0 / max(float((-step / values).max(initial=0.0)), 1.0)


class _Steps:
    """The predictor-corrector steps of one item.

    Attributes:
        x, y, z, s: the best point so far: variables, multipliers, slacks.
        count: steps taken.
        regularisation: the smallest one that the factorisation has been found to take.
    """

    def __init__(self, item: _Scaled) -> None:
        """Start at the least-squares point, its slacks and multipliers shifted to be positive."""
        self.item, self.system, self.count = item, _system(item), 0
        self.regularisation = _REGULARISATION[1]
        self.separate = not (item.hessian.nnz if sp.issparse(item.hessian) else item.hessian.any())
        t = np.ones(len(item.limits))
        self._factor(t, _REGULARISATION[0])
        x, y, z, _ = _newton(self.system, t, item.linear, item.rhs, item.limits, self.amount, 1e-8, 2)
        s = -z
        self.x, self.y = x, y
        self.s = s if s.min(initial=1.0) > 0.0 else s + (1.0 - s.min())
        self.z = z if z.min(initial=1.0) > 0.0 else z + (1.0 - z.min())
        self.tried = np.inf

    def _factor(self, t: FloatArray, wanted: float) -> bool:
        """Factor with the wanted regularisation, or with more where rounding asks for it."""
        amount = max(wanted, self.regularisation)
        while amount < 10.0:
            if self.system.factor(t, amount, amount):
                self.amount = amount
                return True
            amount = self.regularisation = 10.0 * amount
        return False

    def run(self, accuracy: float, certificate: Callable[[FloatArray, FloatArray, FloatArray], bool]) -> bool:
        """Take steps until the relative residuals are below ``accuracy``.

        Args:
            accuracy: in scaled units.
            certificate: called with (x, y, z) when the iterates look as if there were no optimum; True ends the steps.

        Returns:
            Whether the accuracy was reached; if not, the point is the best one seen.
        """
        item = self.item
        x, y, z, s = self.x, self.y, self.z, self.s
        p, best, since = len(s), np.inf, 0
        while True:
            hx, forces = item.hessian @ x, item.equalities.T @ y + item.combine(z)
            ex, cx = item.equalities @ x, item.apply(x)
            rd, rp, rc = item.linear - hx - forces, item.rhs - ex, item.limits - cx - s
            gap, objective = float(s @ z), 0.5 * float(x @ hx) - float(item.linear @ x)
            error = max(
                _largest(rd) / (1.0 + max(_largest(hx), _largest(forces))),
                max(_largest(rp), _largest(rc)) / (1.0 + max(_largest(ex), _largest(cx))),
                gap / (1.0 + abs(objective)),
            )
            if not np.isfinite(error):
                return False
            since += 1
            if error < 0.9 * best:
                best, since = error, 0
                self.x, self.y, self.z, self.s = x, y, z, s
            if error <= accuracy:
                return True
            if self.count >= _STEPS or since > 15:
                return False
            if self._looks_divergent(x, hx, y, z, forces) and certificate(x, y, z):
                return False
            self.count += 1
            mu, missed = gap / max(p, 1), max(_largest(rd), _largest(rp), _largest(rc))
            t = s / z
            if not self._factor(t, min(_REGULARISATION[0], max(_REGULARISATION[1], 1e-2 * mu, 1e-2 * missed))):
                return False
            shift = self.amount
            fine = 1e-10 if error > 1e-6 else 1e-12
            dx, dy, dz, _ = _newton(self.system, t, rd, rp, rc + s, shift, 1e-4 if p else fine, 2 if p else 5)
            # Not ``rc - C dx``: the regularisation is in there, and large beside a small slack.
            ds = -s - t * dz
            if p:
                primal, dual = _longest(s, ds), _longest(z, dz)
                if not self.separate:
                    primal = dual = min(primal, dual)
                after = float((s + primal * ds) @ (z + dual * dz)) / p
                centre = (max(after, 0.0) / mu) ** 3 * mu
                target = centre - s * z - ds * dz
                predicted = min(primal, dual)
                dx, dy, dz, _ = _newton(self.system, t, rd, rp, rc - target / z, shift, fine, 5)
                ds = target / z - t * dz
                if min(_longest(s, ds), _longest(z, dz)) < 0.1 * min(predicted, 0.5):
                    # The second-order term is wrong where the first step is cut short: centre instead.
                    target = max(centre, 0.3 * mu) - s * z
                    dx, dy, dz, _ = _newton(self.system, t, rd, rp, rc - target / z, shift, fine, 5)
                    ds = target / z - t * dz
            back = max(0.99, 1.0 - mu) if mu < 1.0 else 0.99
            primal, dual = back * _longest(s, ds / back), back * _longest(z, dz / back)
            if not self.separate:
                primal = dual = min(primal, dual)
            x, y = x + primal * dx, y + dual * dy
            # Rounding, or underflow, must not bring a slack or a multiplier to zero.
            s, z = np.maximum(s + primal * ds, _POSITIVE), np.maximum(z + dual * dz, _POSITIVE)

    def _looks_divergent(self, x: FloatArray, hx: FloatArray, y: FloatArray, z: FloatArray, forces: FloatArray) -> bool:
        """Whether x or (y, z) is nearly a certificate, and a better one than when this was last asked."""
        item = self.item
        value, descent = -float(item.rhs @ y + item.limits @ z), float(item.linear @ x)
        signs = [np.inf]
        if value > 0.0:
            signs.append(_largest(forces) / value)
        if descent > 0.0:
            beyond = max(_largest(item.equalities @ x), float(item.apply(x).max(initial=0.0)))
            signs.append(max(_largest(hx), beyond) / descent)
        found = min(signs) < min(1e-4, 0.01 * self.tried)
        if found:
            self.tried = min(signs)
        return found


# --- the face ---------------------------------------------------------------------------------------------------------


def _face_step(item: _Scaled, r1: FloatArray, r2: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """Solve the KKT system of equalities alone; by least squares where the factorisation is not accurate."""
    size, m = len(r1), len(r2)
    if not size:
        return r1, np.zeros(m)
    system, empty = _system(item), np.zeros(0)
    found = None
    error = np.inf
    for amount in (1e-10, 1e-8):
        if system.factor(empty, amount, amount):
            dx, dy, _, error = _newton(system, empty, r1, r2, empty, 0.0, 1e-16, 8)
            found = dx, dy
        if error < 1e-6:
            return found
    if size + m > 700:
        return found
    hessian, normals = (part.toarray() if sp.issparse(part) else part for part in (item.hessian, item.equalities))
    system = np.block([[hessian, normals.T], [normals, np.zeros((m, m))]])
    solution = _least_squares(system, np.concatenate([r1, r2]))
    return solution[:size], solution[size:]


def _least_squares(matrix: Any, target: FloatArray) -> FloatArray:
    """Return the least-squares solution of least norm, refined once."""
    if not min(matrix.shape):
        return np.zeros(matrix.shape[1])
    if sp.issparse(matrix):
        accuracy: dict[str, Any] = {"atol": 1e-15, "btol": 1e-15, "conlim": 0.0, "maxiter": 4 * min(matrix.shape) + 100}
        solution = lsmr(matrix, target, **accuracy)[0]
        return solution + lsmr(matrix, target - matrix @ solution, **accuracy)[0]

    def solve(right: FloatArray) -> FloatArray:
        return lstsq(matrix, right, cond=1e-11, check_finite=False, lapack_driver="gelsy")[0]

    solution = solve(target)
    return solution + solve(target - matrix @ solution)


def _on_face(
    item: _Scaled, steps: _Steps, measure: Callable[[FloatArray, FloatArray, FloatArray], float]
) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """Solve again on the face of the active rows, correct the face by wrong signs, and return the best point."""
    x, y, z = steps.x, steps.y, steps.z
    mi, lower = item.general.shape[0], len(item.at_lower)
    active = z > steps.s
    best = x, y, z, measure(x, y, z)
    # Multipliers of rows off the face are zero: rounding there is not a multiplier.
    for _ in range(_CORRECTIONS):
        z = np.where(active, z, 0.0)
        both = np.isin(item.at_lower, item.at_upper[active[mi + lower :]])
        active[mi : mi + lower] &= ~both
        down, up = active[mi : mi + lower], active[mi + lower :]
        x = x.copy()
        x[item.at_lower[down]] = -item.limits[mi : mi + lower][down]
        x[item.at_upper[up]] = item.limits[mi + lower :][up]
        free = np.ones(len(x), dtype=bool)
        free[item.at_lower[down]] = free[item.at_upper[up]] = False
        places, tight = np.flatnonzero(free), np.flatnonzero(active[:mi])
        normals = item.general[tight]
        stack = sp.vstack if sp.issparse(normals) else np.concatenate
        face = stack([item.equalities, normals]) if len(tight) else item.equalities
        face = sp.csr_array(face) if sp.issparse(face) else face
        general = np.zeros(mi)
        general[tight] = z[tight]
        r1 = item.linear - item.hessian @ x - item.equalities.T @ y - item.general.T @ general
        r2 = np.concatenate([item.rhs - item.equalities @ x, item.limits[tight] - normals @ x])
        none = np.zeros(0, dtype=np.int64)
        sub = _Scaled(
            item.hessian[places][:, places], r1[places], face[:, places], r2,
            item.general[:0][:, places], none, none, np.zeros(0),
        )  # fmt: skip
        found = _face_step(sub, r1[places], r2)
        if found is None or not (np.isfinite(found[0]).all() and np.isfinite(found[1]).all()):
            break
        x[places] += found[0]
        y = y + found[1][: len(y)]
        general[tight] += found[1][len(y) :]
        pull = item.linear - item.hessian @ x - item.equalities.T @ y - item.general.T @ general
        z = np.concatenate([general, np.where(down, -pull[item.at_lower], 0.0), np.where(up, pull[item.at_upper], 0.0)])
        slack = item.limits - item.apply(x)
        positive = np.maximum(z, 0.0)
        reached = measure(x, y, positive)
        if reached < best[3]:
            best = x, y, positive, reached
        wrong = active & (z < -1e-14 * (1.0 + _largest(z)))
        wrong |= ~active & (slack < -1e-14 * (1.0 + _largest(x) + np.abs(item.limits)))
        if not wrong.any() or reached <= 1e-15:
            break
        active = active ^ wrong
    return best


# --- no optimum -------------------------------------------------------------------------------------------------------


def is_farkas(problem: Problem, rows: FloatArray, bounds: FloatArray, columns: FloatArray | None = None) -> bool:
    """Whether a combination of rows and limits shows that a problem has no feasible point.

    With r the sum of the combined normals and v the combination of the right-hand sides, every feasible point has
    ``r'x <= v``. Asked for are v < 0, by more than rounding, and r so small that a point with ``r'x <= v`` would be
    1e9 times as far away as the limits in the combination.

    Args:
        problem: the data.
        rows: (m,) weights, at least 0 for inequality rows.
        bounds: (nb,) weights, positive for the upper limit, negative for the lower one.
        columns: (n,) units of the variables; ones by default.
    """
    me = problem.num_equalities
    units = np.ones(len(problem.linear)) if columns is None else columns
    limit = np.where(bounds > 0.0, problem.upper, problem.lower)
    used, held = rows != 0.0, bounds != 0.0
    limits = np.concatenate([problem.rhs[used], limit[held]])
    weights = np.concatenate([rows[used], bounds[held]])
    if not (len(weights) and np.isfinite(limits).all() and np.isfinite(weights).all() and np.all(rows[me:] >= 0.0)):
        return False
    total = problem.rows.T @ rows
    np.add.at(total, problem.bounded, bounds)
    value, size = float(limits @ weights), float(np.abs(limits * weights).sum())
    norms = _row_norms(problem.rows, units)[used]
    far = max(
        _largest(problem.rhs[used] / np.where(norms > 0.0, norms, np.inf)),
        _largest(limit[held] / units[problem.bounded[held]]),
    )
    return value < -1e-9 * size and float(np.abs(units * total).sum()) * _REACH * far <= -value


def proves_infeasible(values: QPValues, result: Result, item: int) -> bool:
    """Whether the multipliers of one item are a Farkas combination (:func:`is_farkas`) of its rows and limits."""
    rows, bounds = result.rows[item].copy(), result.bounds[item]
    if not (np.isfinite(rows).all() and np.isfinite(bounds).all()):
        return False
    matrix = values.rows[item if len(values.rows) > 1 else 0]
    rows[values.num_equalities :] = np.maximum(rows[values.num_equalities :], 0.0)
    problem = Problem(
        None, values.rhs_primal[item], matrix, values.num_equalities, values.rhs_rows[item], values.bounded,
        values.lower[item], values.upper[item],
    )  # fmt: skip
    return is_farkas(problem, rows, bounds)


def is_ray(problem: Problem, ray: FloatArray, columns: FloatArray | None = None) -> bool:
    """Whether the objective falls without end along a ray that no row and no limit ends.

    Curvature and violations are zero up to 1e-12 of their terms, and the descent is more than rounding.

    Args:
        problem: the data.
        ray: (n,) direction.
        columns: (n,) units of the variables; ones by default.
    """
    units = np.ones(len(ray)) if columns is None else columns
    size = _largest(ray / units)
    if not size > 0.0 or not np.isfinite(size):
        return False
    curved, moved = problem.hessian @ ray, problem.rows @ ray
    moved[problem.num_equalities :] = np.maximum(moved[problem.num_equalities :], 0.0)
    at, linear = ray[problem.bounded], units * problem.linear
    return bool(
        np.all(np.abs(curved) <= _RAY * size * _row_norms(problem.hessian, units))
        and np.all((np.abs(moved) <= _RAY * size * _row_norms(problem.rows, units)) | (problem.rhs == np.inf))
        and not np.any((at > 0.0) & (problem.upper < np.inf))
        and not np.any((at < 0.0) & (problem.lower > -np.inf))
        and float(problem.linear @ ray) > 1e-7 * float(np.linalg.norm(linear) * np.linalg.norm(ray / units))
    )


def _farkas(item: _Item, y: FloatArray, z: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """Turn multipliers into a Farkas combination, verified against the data; None if they are not near one."""
    scaled = item.scaled
    mi, n = scaled.general.shape[0], len(scaled.linear)
    y, general = y.copy(), np.maximum(z[:mi], 0.0)
    size = max(_largest(y), _largest(z))
    if not size > 0.0 or not np.isfinite(size):
        return None
    y, general = y / size, np.where(general > 1e-9 * size, general / size, 0.0)
    can_lower, can_upper = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    can_lower[scaled.at_lower] = can_upper[scaled.at_upper] = True
    loose = np.zeros(n, dtype=bool)
    for _ in range(6):
        # What the limits can hold, they hold; the rest is taken out of the combination.
        pull = scaled.equalities.T @ y + scaled.general.T @ general
        loose |= ((pull > 0.0) & ~can_lower) | ((pull < 0.0) & ~can_upper)
        held = np.concatenate(
            [general, np.maximum(pull[scaled.at_lower], 0.0), np.maximum(-pull[scaled.at_upper], 0.0)]
        )
        found = item.multipliers(None, y, held)
        if is_farkas(item.problem, *found, item.units):
            return found
        if _largest(pull[loose]) > _NEAR:
            return None
        support = np.flatnonzero(general)
        normals = scaled.general[support][:, loose]
        stacked = sp.vstack if sp.issparse(normals) else np.concatenate
        step = _least_squares(stacked([scaled.equalities[:, loose], normals]).T, -pull[loose])
        y = y + step[: len(y)]
        general[support] = np.maximum(general[support] + step[len(y) :], 0.0)
    return None


def _ray(item: _Item, x: FloatArray) -> FloatArray | None:
    """Turn a point far away into a ray, verified against the data; None if it is not near one."""
    scaled = item.scaled
    size = _largest(x)
    if not size > 0.0 or not np.isfinite(size):
        return None
    ray = x / size
    held, tight = np.zeros(len(x), dtype=bool), np.zeros(scaled.general.shape[0], dtype=bool)
    for _ in range(6):
        held[scaled.at_lower] |= ray[scaled.at_lower] < 1e-9
        held[scaled.at_upper] |= ray[scaled.at_upper] > -1e-9
        ray = np.where(held, 0.0, ray)
        full = np.zeros(len(item.problem.linear))
        full[item.free] = item.columns * ray
        if is_ray(item.problem, full, item.units):
            return full / np.abs(full).max()
        tight |= scaled.general @ ray > -1e-9
        parts = [scaled.hessian[:, ~held], scaled.equalities[:, ~held], scaled.general[tight][:, ~held]]
        matrix = (sp.vstack if sp.issparse(parts[0]) else np.concatenate)(parts)
        missed = matrix @ ray[~held]
        if _largest(missed) > _NEAR:
            return None
        ray[~held] -= _least_squares(matrix, missed)
    return None


def _projections(item: _Item, which: str) -> tuple[FloatArray, ...] | None:
    """Project onto the cone of Farkas combinations ("farkas") or of rays ("ray"); None unless that is a certificate."""
    scaled = item.scaled
    n, me = len(scaled.linear), scaled.equalities.shape[0]
    sparse = sp.issparse(scaled.general)
    stack = sp.vstack if sparse else np.concatenate
    if which == "ray":
        size = _largest(scaled.linear)
        if not size:
            return None
        lower, upper = np.full(n, -np.inf), np.full(n, np.inf)
        lower[scaled.at_lower], upper[scaled.at_upper] = 0.0, 0.0
        rows, equalities = stack([scaled.hessian, scaled.equalities, scaled.general]), n + me
        target, count = scaled.linear / size, n
    else:
        limits = np.concatenate([scaled.rhs, scaled.limits])
        size, count = _largest(limits), len(limits)
        if not size:
            return None
        units = sp.eye_array(n, format="csr")
        parts = [scaled.equalities, scaled.general]
        for sign, at in ((-1.0, scaled.at_lower), (1.0, scaled.at_upper)):
            parts.append(sign * (units[at] if sparse else np.eye(n)[at]))
        rows, equalities = stack(parts).T, n
        lower, upper = np.where(np.arange(count) < me, -np.inf, 0.0), np.full(count, np.inf)
        target = -limits / size
    identity = sp.eye_array(count, format="csc") if sparse else np.eye(count)
    cone = Problem(
        identity, target, rows, equalities, np.zeros(rows.shape[0]), np.arange(count, dtype=np.int64), lower, upper
    )
    matrices = _Matrices.build(cone.hessian, cone.rows)
    cone = replace(cone, hessian=matrices.hessian, rows=matrices.rows)
    found, _, _ = _optimum(_Item(cone, matrices), lambda x, y, z: False)
    if not np.isfinite(found.primal).all():
        return None
    if which == "ray":
        ray = _ray(item, found.primal)
        return None if ray is None else (ray,)
    return _farkas(item, found.primal[:me], found.primal[me:])


# --- one problem ------------------------------------------------------------------------------------------------------


def _contradiction(problem: Problem, empty: Mask) -> tuple[FloatArray, FloatArray] | None:
    """Return what is infeasible at sight: limits that cross or are out of reach, an empty row that does not hold."""
    rows, bounds = np.zeros(len(problem.rhs)), np.zeros(len(problem.bounded))
    crossing = (problem.lower > problem.upper) | (problem.lower == np.inf) | (problem.upper == -np.inf)
    if crossing.any():
        bounds[np.flatnonzero(crossing)[0]] = 1.0
        return rows, bounds
    me = problem.num_equalities
    violation = -problem.rhs
    violation[:me] = np.abs(violation[:me])
    impossible = (violation > 1e-9) & empty
    impossible[me:] |= problem.rhs[me:] == -np.inf
    if impossible.any():
        place = np.flatnonzero(impossible)[0]
        rows[place] = -np.sign(problem.rhs[place])
        return rows, bounds
    return None


def _optimum(
    item: _Item, certificate: Callable[[FloatArray, FloatArray, FloatArray], bool], tolerance: float = 1e-9
) -> tuple[Solution, FloatArray, bool]:
    """Run the steps and solve on the face; return the best point found, whatever it is worth, and the scaled x."""
    problem, scaled = item.problem, item.scaled
    steps = _Steps(scaled)

    def measure(x: FloatArray, y: FloatArray, z: FloatArray) -> float:
        found = kkt_residual(problem, item.primal(x), *item.multipliers(x, y, z))
        return found if found == found else np.inf

    stopped = False

    def stop(x: FloatArray, y: FloatArray, z: FloatArray) -> bool:
        nonlocal stopped
        stopped = certificate(x, y, z)
        return stopped

    best = steps.x, steps.y, steps.z, np.inf
    for accuracy in _ACCURACY:
        reached = steps.run(accuracy, stop)
        if stopped:
            break
        found = _on_face(scaled, steps, measure)
        if found[3] < best[3]:
            best = found
        if best[3] <= 1e-3 * tolerance or not reached:
            break
    x, y, z, residual = best
    rows, bounds = item.multipliers(x, y, z)
    return Solution(Status.NOT_CONVERGED, item.primal(x), rows, bounds, steps.count, residual), x, stopped


@np.errstate(all="ignore")  # what overflows or is undefined is looked at, and fails
def _solve(problem: Problem, matrices: _Matrices, tolerance: float) -> Solution:
    """Solve one problem stored as its ``matrices`` are."""
    me = problem.num_equalities
    limits = problem.lower, problem.upper, problem.rhs
    known = matrices.finite and np.isfinite(problem.linear).all() and np.isfinite(problem.rhs[:me]).all()
    if not known or any(np.isnan(part).any() for part in limits):
        return _failed(problem, Status.INVALID_INPUT)
    if not matrices.convex:
        return _failed(problem, Status.NOT_STRICTLY_CONVEX)
    contradiction = _contradiction(problem, matrices.empty)
    if contradiction is not None:
        return replace(_failed(problem, Status.INFEASIBLE), rows=contradiction[0], bounds=contradiction[1])
    item = _Item(problem, matrices)
    farkas: tuple[FloatArray, ...] | None = None
    ray: FloatArray | None = None

    def certificate(x: FloatArray, y: FloatArray, z: FloatArray) -> bool:
        nonlocal farkas, ray
        farkas = _farkas(item, y, z)
        ray = _ray(item, x) if farkas is None else None
        return farkas is not None or ray is not None

    found, _, _ = _optimum(item, certificate, tolerance)
    if farkas is None and ray is None:
        if found.residual <= tolerance:
            return replace(found, status=Status.SOLVED)
        if found.residual <= 1e-7:  # nearly optimal, so there is no certificate to look for
            return _failed(problem, Status.NOT_CONVERGED, found.steps)
        farkas = _projections(item, "farkas")
    if farkas is not None:
        return replace(_failed(problem, Status.INFEASIBLE, found.steps), rows=farkas[0], bounds=farkas[1])
    if ray is None:
        projected = _projections(item, "ray")
        if projected is None:
            return _failed(problem, Status.NOT_CONVERGED, found.steps)
        (ray,) = projected
    # A ray says that the objective has no end if there is a feasible point: look for one of small norm.
    curvature = matrices.columns**-2.0
    hessian = sp.csc_array(sp.diags_array(curvature)) if sp.issparse(problem.hessian) else np.diag(curvature)
    nearest = replace(problem, hessian=hessian, linear=np.zeros(len(problem.linear)))
    feasible = _solve(nearest, replace(matrices, hessian=hessian, convex=True), max(tolerance, 1e-9))
    steps = found.steps + feasible.steps
    if feasible.status == Status.SOLVED:
        return replace(_failed(problem, Status.UNBOUNDED, steps), ray=ray)
    return replace(feasible, steps=steps)
