"""Primal-dual interior-point method in compiled code, for items whose KKT matrix has a sparse factor, or is small.

The steps are those of :mod:`hsbackend.solvers.interior_point`: Mehrotra's predictor-corrector with the regularisation
of the proximal method of multipliers, then the KKT system on the face of the active rows, refined against the matrix
without regularisation, whose point is measured in the data. What is different:

- The KKT matrix ``[H + B, N'; N, -T]`` (B the limits of the variables, T the slack-to-multiplier ratios of the
  inequality rows) has an ``LDL'`` factor in every order (:mod:`._ldl_kernels`). Pattern and ordering are found once per
  pattern, and kept. An item has the pattern of its own entries, so it is solved alike in every batch.
- An optimum counts as unique, and its active rows as independent, when inverse iteration finds no null vector of the
  KKT matrix of the rows that have a multiplier. Doubt is left to the caller, and so is every item that does not come
  out: this module proves nothing.
- Of a linear program with several optima the one of least norm is the solution of ``q'x + eps/2 |x|^2`` for every eps
  that is small enough. Whether it was is seen: the point satisfies the KKT conditions of the linear program with the
  multipliers found before.

Cost per item: 5 to 25 factorisations, each the sum of the squared column counts of L.

Source: as there; for the optimum of least norm, Mangasarian and Meyer, "Nonlinear perturbation of linear programs"
(1979).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import splu

from hsbackend._parallel import compile_kernel, for_each_item
from hsbackend.face import KKTSolution, KnownSystems, LeastNormFace
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers import active_set
from hsbackend.solvers._interior_item_kernels import FAILED, SOLVED_UNIQUE, kkt_items, settle_items, solve_items
from hsbackend.solvers._interior_kernels import Pattern
from hsbackend.solvers._ldl_kernels import elimination_tree, row_patterns
from hsbackend.solvers.result import Options, Result
from hsbackend.status import Status

Mask = NDArray[np.bool_]

#: Patterns kept ready by one program.
KEPT = 32
#: Weights of the quadratic term that selects among the optima of a linear program, relative to its cost: the larger
#: one gives the more accurate point, the smaller one is small enough more often.
_SELECTION = 1e-1, 1e-3
#: Seconds per unit of work of a factorisation, and per entry of the matrices and the factor in all that a step does
#: besides (docs/performance.md).
_PER_WORK, _PER_ENTRY = 6e-10, 1.5e-8
#: A point that moved more than this, relative to its size, is another one.
_MOVED = 1e-6


@dataclass(frozen=True)
class Setup:
    """A pattern, in an order that keeps the factor sparse.

    Attributes:
        pattern: for the kernels.
        work: sum of the squared column counts of the factor, about twice its multiply-adds.
    """

    pattern: Pattern
    work: float

    @property
    def seconds(self) -> float:
        """Rough time of a factorisation."""
        pattern = self.pattern
        entries = len(pattern.l_row) + len(pattern.h_col) + len(pattern.n_col)
        return _PER_WORK * self.work + _PER_ENTRY * entries

    @classmethod
    def of(cls, hessian: Mask, rows: Mask, num_equalities: int) -> Setup:
        """Order a pattern.

        Args:
            hessian: (n, n) or, of a diagonal, (n,) the places of H.
            rows: (m, n) the places of N.
            num_equalities: rows that are equalities.
        """
        m, n = rows.shape
        # The diagonal is in the pattern, entries or not.
        quadratic = sp.csr_array(
            np.eye(n, dtype=bool) if hessian.ndim == 1 else hessian | hessian.T | np.eye(n, dtype=bool)
        )
        normals = sp.csr_array(rows)
        size = n + m
        # Numbers for which every leading block is regular; the ordering depends on the pattern alone.
        ones = sp.block_array([[1e-3 * quadratic.astype(float), normals.T.astype(float)],
                               [normals.astype(float), None]]) if m else 1e-3 * quadratic.astype(float)  # fmt: skip
        shifted = sp.csc_array(ones + sp.diags_array(np.repeat([1e6, -1e6], [n, m])))
        factor = splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        place = factor.perm_c.astype(np.int64)
        h_row = np.repeat(np.arange(n), np.diff(quadratic.indptr))
        n_row = np.repeat(np.arange(m), np.diff(normals.indptr))
        of_h, h_places = place[h_row], place[quadratic.indices]
        of_n, n_places = place[n + n_row], place[normals.indices]
        upper = of_h < h_places
        row = np.concatenate([of_h[upper], np.minimum(of_n, n_places), place])
        column = np.concatenate([h_places[upper], np.maximum(of_n, n_places), place])
        by_column = np.lexsort((row, column))
        at = np.empty(len(row), dtype=np.int64)
        at[by_column] = np.arange(len(row))
        k_ptr = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=size))]).astype(np.int64)
        k_row = row[by_column].astype(np.int64)
        h_entry = np.full(len(h_row), -1, dtype=np.int64)
        count = int(upper.sum())
        h_entry[upper] = at[:count]
        parent, columns, by_row = (np.empty(size, dtype=np.int64) for _ in range(3))
        _tree(k_ptr, k_row, parent, columns, by_row)
        l_ptr = np.concatenate([[0], np.cumsum(columns)]).astype(np.int64)
        w_ptr = np.concatenate([[0], np.cumsum(by_row)]).astype(np.int64)
        l_row, w_col = np.empty(l_ptr[-1], dtype=np.int64), np.empty(w_ptr[-1], dtype=np.int64)
        _fill(k_ptr, k_row, parent, l_ptr, w_ptr, w_col, l_row)
        sign = np.empty(size)
        sign[place] = np.repeat([1.0, -1.0], [n, m])
        pattern = Pattern(
            n, num_equalities, m,
            quadratic.indptr.astype(np.int64), quadratic.indices.astype(np.int64),
            normals.indptr.astype(np.int64), normals.indices.astype(np.int64),
            h_entry, at[count : count + len(n_row)], at[count + len(n_row) :],
            k_ptr, k_row, l_ptr, l_row, w_ptr, w_col, place, sign,
        )  # fmt: skip
        return cls(pattern, float(np.sum(columns.astype(np.float64) ** 2)))


@compile_kernel
def _tree(k_ptr, k_row, parent, by_column, by_row):  # type: ignore[no-untyped-def]
    elimination_tree(k_ptr, k_row, parent, by_column, by_row)


@compile_kernel
def _fill(k_ptr, k_row, parent, l_ptr, w_ptr, w_col, l_row):  # type: ignore[no-untyped-def]
    row_patterns(k_ptr, k_row, parent, w_ptr, w_col)
    filled = l_ptr[:-1].copy()
    for k in range(len(parent)):
        for q in range(w_ptr[k], w_ptr[k + 1]):
            i = w_col[q]
            l_row[filled[i]] = k
            filled[i] += 1


class Setups:
    """The patterns of the items of one program, found again by comparison."""

    def __init__(self) -> None:
        """Begin without any."""
        self._known: OrderedDict[bytes, Setup] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Setups], tuple[()]]:
        """Copies and pickles begin without any."""
        return Setups, ()

    def _get(self, hessian: Mask, rows: Mask, num_equalities: int) -> Setup:
        key = np.packbits(hessian).tobytes() + np.packbits(rows).tobytes()
        with self._lock:
            found = self._known.pop(key, None)
        found = Setup.of(hessian, rows, num_equalities) if found is None else found
        with self._lock:
            self._known[key] = found
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return found

    def of(self, values: QPValues) -> list[tuple[IndexArray | None, Setup]]:
        """Return the patterns of a batch, each with the items that have it; None for all of them."""
        hessian, rows = values.hessian != 0.0, values.rows != 0.0  # NaN is an entry
        count = max(len(hessian), len(rows))
        first = self._get(hessian[0], rows[0], values.num_equalities)
        if count == 1:
            return [(None, first)]
        same = np.ones(count, dtype=bool)
        for part in (hessian, rows):
            if len(part) > 1:
                same &= (part == part[0]).reshape(count, -1).all(axis=1)
        if same.all():
            return [(None, first)]
        found: dict[int, tuple[Setup, list[int]]] = {}
        for b in range(count):
            setup = first
            if not same[b]:
                pair = hessian[b if len(hessian) > 1 else 0], rows[b if len(rows) > 1 else 0]
                setup = self._get(*pair, values.num_equalities)
            found.setdefault(id(setup), (setup, []))[1].append(b)
        return [(np.array(items, dtype=np.int64), setup) for setup, items in found.values()]


def solve(values: QPValues, options: Options, read: Mask, setup: Setup) -> tuple[Result, Mask]:
    """Solve a batch.

    Args:
        values: the problems.
        options: tolerance, which K to keep.
        read: (n,) variables whose uniqueness matters.
        setup: a pattern that covers the problems.

    Returns:
        The result, with the status NOT_CONVERGED for items that did not come out, and which items did with an optimum
        that is surely unique.
    """
    result = Result.failed(values, Status.NOT_CONVERGED)
    batch, m = values.batch, values.rows.shape[1]
    outcome = np.zeros(batch, dtype=np.int64)
    regular, independent, settled = (np.zeros(batch, dtype=bool) for _ in range(3))
    side_rows = np.zeros((batch, m), dtype=np.int64)
    side_bounds = np.zeros((batch, len(values.bounded)), dtype=np.int64)
    for_each_item(
        solve_items, batch, 20.0 * setup.work, setup.pattern,
        values.hessian[:, None, :] if values.diagonal else values.hessian, values.diagonal, values.rhs_primal,
        values.rows, values.rhs_rows, values.bounded, values.lower, values.upper, read, options.tolerance,
        options.jacobian == "active", options.active_tolerance, result.primal, result.rows, result.bounds, outcome,
        regular, independent, settled, result.steps, side_rows, side_bounds,
    )  # fmt: skip
    failed = outcome == FAILED
    for part in (result.primal, result.rows, result.bounds):
        part[failed] = np.nan
    result.status[~failed] = Status.SOLVED
    systems = KnownSystems(regular, independent, settled, partial(_solve_systems, values, [(regular, setup)]))
    face = LeastNormFace(values, side_rows, side_bounds, read, systems)
    return replace(result, face=face), outcome == SOLVED_UNIQUE


#: Items and the pattern that covers them; the masks may change until the solution is handed out.
_Covered = list[tuple[Mask, Setup]]


def _solve_systems(
    values: QPValues, covered: _Covered, active_rows: IndexArray, active_bounds: IndexArray, rhs_primal: FloatArray,
    rhs_rows: FloatArray, rhs_bounds: FloatArray,
) -> tuple[KKTSolution, Mask]:  # fmt: skip
    """Solve the KKT systems on the faces of some items; see :class:`~hsbackend.face.KnownSystems`."""
    out = KKTSolution(np.empty(rhs_primal.shape), np.empty(rhs_rows.shape), np.empty(rhs_bounds.shape))
    done = np.zeros(len(rhs_primal), dtype=bool)
    hessian = values.hessian[:, None, :] if values.diagonal else values.hessian
    for which, setup in covered:
        items = np.flatnonzero(which).astype(np.int64)
        if len(items):
            for_each_item(
                kkt_items, len(items), 4.0 * setup.work, setup.pattern, hessian, values.diagonal, values.rows,
                values.bounded, active_rows, active_bounds, items, rhs_primal, rhs_rows, rhs_bounds, out.primal,
                out.rows, out.bounds, done,
            )  # fmt: skip
    return out, done


def select(values: QPValues, options: Options, read: Mask, setup: Setup, result: Result, items: IndexArray) -> Mask:
    """Move some items, linear programs with several optima, to the optimum of least norm.

    Args:
        values: the problems.
        options: as in :func:`solve`.
        read: (n,) variables whose norm selects.
        setup: as in :func:`solve`.
        result: of :func:`solve`; points and faces of the items that move are overwritten.
        items: the items; without curvature.

    Returns:
        (B,) which items moved: they have several optima, and the point is the one of least norm.
    """
    moved = np.zeros(values.batch, dtype=bool)
    face = result.face
    assert isinstance(face, LeastNormFace)
    assert face.known is not None
    for relative in _SELECTION:
        left = items[~moved[items]]
        if not len(left):
            break
        part, before = values.take(left), result.take(left)
        cost = np.abs(part.rhs_primal).max(axis=1, initial=0.0)
        size = np.abs(before.primal[:, read]).max(axis=1, initial=0.0)
        weight = relative * np.where(cost > 0.0, cost, 1.0) / np.where(size > 0.0, size, 1.0)
        curved = replace(part, hessian=np.where(read, weight[:, None], 0.0))
        found, _ = solve(curved, options, read, setup)
        assert isinstance(found.face, LeastNormFace)
        worst = active_set.residuals(part, found.primal, before.rows, before.bounds)[2]
        change = np.abs(found.primal - before.primal)[:, read].max(axis=1, initial=0.0)
        good = (found.status == Status.SOLVED) & (worst <= 1e-2 * options.tolerance) & (change > _MOVED * (1.0 + size))
        into = left[good]
        result.primal[into] = found.primal[good]
        face.active_rows[into], face.active_bounds[into] = found.face.active_rows[good], found.face.active_bounds[good]
        # Along the optima nothing holds the point but its norm.
        face.known.regular[into] = face.known.independent[into] = face.known.settled[into] = False
        moved[into] = True
    chosen = np.flatnonzero(moved).astype(np.int64)
    if len(chosen) and options.jacobian == "active":
        hessian = values.hessian[:, None, :] if values.diagonal else values.hessian
        for_each_item(
            settle_items, len(chosen), 4.0 * setup.work, setup.pattern, hessian, values.diagonal, values.rhs_primal,
            values.rows, values.rhs_rows, values.bounded, values.lower, values.upper, chosen, result.primal,
            result.rows, result.bounds, face.active_rows, face.active_bounds, face.known.settled,
        )  # fmt: skip
    return moved


class Collected:
    """The results of items with several patterns, put together.

    Args:
        values: the problems of the batch.
        read: as in :func:`solve`.
    """

    def __init__(self, values: QPValues, read: Mask) -> None:
        """Begin with nothing solved."""
        batch = values.batch
        rows = np.zeros((batch, values.rows.shape[1]), dtype=np.int64)
        bounds = np.zeros((batch, len(values.bounded)), dtype=np.int64)
        self._covered: _Covered = []
        regular, independent, settled = (np.zeros(batch, dtype=bool) for _ in range(3))
        self._known = KnownSystems(regular, independent, settled, partial(_solve_systems, values, self._covered))
        self._face = LeastNormFace(values, rows, bounds, read, self._known)
        self.result = replace(Result.failed(values, Status.NOT_CONVERGED), face=self._face)

    def put(self, items: IndexArray, found: Result, setup: Setup) -> None:
        """Put in the results of some items, as :func:`solve` returned them."""
        self.result.put(items, found)
        face = found.face
        assert isinstance(face, LeastNormFace)
        assert face.known is not None
        self._face.active_rows[items], self._face.active_bounds[items] = face.active_rows, face.active_bounds
        self._known.regular[items], self._known.independent[items] = face.known.regular, face.known.independent
        self._known.settled[items] = face.known.settled
        mask = np.zeros(len(self._known.regular), dtype=bool)
        mask[items] = face.known.regular
        self._covered.append((mask, setup))
