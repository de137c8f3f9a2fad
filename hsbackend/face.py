"""The active face of a solution and its KKT solve: the HS-Jacobian lives here.

The Han-Sun set at a solution holds, for every index set K with supp(multipliers) <= K <= active rows, the
solution operator of the KKT system on the face

    [H  N'] [u]   [g]
    [N  0 ] [w] = [r]       N the equality rows and the rows of K,

in the Euclidean case with r = 0 the orthogonal projector onto null(N). A face offers this one operation for a
whole batch, with the factorisation the forward solve ended with. The forward solution itself is the case
``(g, r) = (-q, h_K)``, the adjoint of the layer the case of the incoming gradients, the tangent the case of
differentiated data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hsbackend._face_kernels import apply_inverse, box_kkt
from hsbackend._least_norm_kernels import DEPENDENT, SEEN, factor_items, solve_items
from hsbackend._parallel import for_each_item, gather
from hsbackend.metric import Metric
from hsbackend.program import FloatArray, IndexArray, QPValues

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class KKTSolution:
    """Solution of a KKT system on a face.

    Attributes:
        primal: (B, n) u.
        rows: (B, m) the part of w that belongs to the general rows, zero outside K.
        bounds: (B, nb) the part that belongs to the bounded variables, zero outside K.
    """

    primal: FloatArray
    rows: FloatArray
    bounds: FloatArray


@dataclass(frozen=True)
class GramFace:
    """Face of a solution found in Gram space: a working set and the inverse of its Gram matrix.

    Attributes:
        metric: the Hessian seen through the rows.
        gram: (1 or B, M, M) Gram matrix of the rows in this metric, scaled to a unit diagonal.
        scale: (1 or B, M) the scaling.
        working: (B, M) working set, the first ``count`` entries.
        count: (B,).
        offset: (B,) where the (count, count) inverse of an item begins in ``inverse``.
        inverse: flat storage of the inverses.
        side: (B, M) 1 where the upper limit is active, -1 where the lower one is, 0 otherwise.
        num_equalities: equality rows of the program; the metric may have eliminated them.
        num_rows: general rows of the program, equalities included.
        proximal: variables without curvature.
        proximal_weight: (1 or B,) the weight their proximal steps use.
    """

    metric: Metric
    gram: FloatArray
    scale: FloatArray
    working: IndexArray
    count: IndexArray
    offset: IndexArray
    inverse: FloatArray
    side: IndexArray
    num_equalities: int
    num_rows: int
    proximal: IndexArray
    proximal_weight: FloatArray

    def kkt_solve(self, rhs_primal: FloatArray, rhs_rows: FloatArray, rhs_bounds: FloatArray) -> KKTSolution:
        """Solve the KKT system of the module docstring.

        Args:
            rhs_primal: (B, n) g.
            rhs_rows: (B, m) r on the general rows; entries outside K are ignored.
            rhs_bounds: (B, nb) r on the bounded variables.
        """
        eliminated = self.num_equalities - self.metric.num_equalities
        rhs_equalities = np.ascontiguousarray(rhs_rows[:, :eliminated])
        target = np.concatenate([rhs_rows[:, eliminated:], rhs_bounds], axis=1)
        solution = self._solve(rhs_primal, rhs_equalities, target)
        if len(self.proximal):
            # (H + delta I) is what was factored: u <- solve(g + delta u) contracts by delta / (lambda + delta),
            # lambda the least curvature on the face (proximal point iteration on a fixed face).
            # Every item stops by itself: what it takes has nothing to do with its neighbours.
            weight = self.proximal_weight[:, None]
            previous = np.full(len(rhs_primal), np.inf)
            moving = np.ones(len(rhs_primal), dtype=bool)
            for _ in range(100):
                before = solution.primal[:, self.proximal]
                shifted = rhs_primal.copy()
                shifted[:, self.proximal] += weight * before
                found = self._solve(shifted, rhs_equalities, target)
                solution.primal[moving] = found.primal[moving]
                solution.rows[moving] = found.rows[moving]
                solution.bounds[moving] = found.bounds[moving]
                difference = np.abs(solution.primal[:, self.proximal] - before)
                change = np.where(np.isfinite(difference), difference, 0.0).max(axis=1, initial=0.0)
                size = np.where(np.isfinite(before), np.abs(before), 0.0).max(axis=1, initial=0.0)
                # Converged, or down to rounding.
                moving &= (change > 1e-14 * (1.0 + size)) & (change < 0.5 * previous)
                if not moving.any():
                    break
                previous = change
        return solution

    def _solve(self, rhs_primal: FloatArray, rhs_equalities: FloatArray, target: FloatArray) -> KKTSolution:
        point, values = self.metric.free(rhs_primal, rhs_equalities)
        batch, total = values.shape
        out = np.zeros((batch, total))
        width = int(self.count.max(initial=0))
        arguments = (values, target, self.gram, self.scale, self.working, self.count, self.offset, self.inverse, out)
        for_each_item(apply_inverse, batch, float(3 * width * width), *arguments, np.empty((batch, 2, width)))
        primal, equalities = self.metric.finish(point, out, rhs_primal, rhs_equalities)
        left = self.num_rows - equalities.shape[1]
        rows = np.concatenate([equalities, out[:, :left]], axis=1)
        return KKTSolution(primal, rows, np.ascontiguousarray(out[:, left:]))

    @property
    def dependent(self) -> Mask:
        """(B,) whether active rows were left out of the working set, beyond eliminated equalities."""
        return np.count_nonzero(self.side, axis=1) > self.count

    @property
    def active_rows(self) -> IndexArray:
        """(B, m) side of the general rows in K; equalities count as 1."""
        eliminated = self.num_equalities - self.metric.num_equalities
        ones = np.ones((self.side.shape[0], eliminated), dtype=np.int64)
        return np.concatenate([ones, self.side[:, : self.num_rows - eliminated]], axis=1)

    @property
    def active_bounds(self) -> IndexArray:
        """(B, nb) side of the bounds in K."""
        eliminated = self.num_equalities - self.metric.num_equalities
        return self.side[:, self.num_rows - eliminated :]


@dataclass(frozen=True)
class BoxFace:
    """Face for a diagonal Hessian with bounds: free variables and a Cholesky factor on the active rows.

    With F the mask of free variables, the Schur complement on the active rows is ``N F H^-1 N'``; rows that depend
    on earlier ones were left out of it.

    Attributes:
        columns, row_index, entries: N by columns (compressed), entries (1 or B, nnz).
        hessian: (1 or B, n) diagonal.
        free: (B, n) bool.
        bounded: (nb,) bounded variables; ``bounded_at`` (n,) their position or -1.
        factor, offset, order, count: ragged Cholesky factors and the rows they belong to.
        side_rows: (B, m); side_bounds: (B, nb).
    """

    columns: IndexArray
    row_index: IndexArray
    entries: FloatArray
    hessian: FloatArray
    free: Mask
    bounded_at: IndexArray
    factor: FloatArray
    offset: IndexArray
    order: IndexArray
    count: IndexArray
    side_rows: IndexArray
    side_bounds: IndexArray

    def kkt_solve(self, rhs_primal: FloatArray, rhs_rows: FloatArray, rhs_bounds: FloatArray) -> KKTSolution:
        """Solve the KKT system of the module docstring; arguments as in :meth:`GramFace.kkt_solve`."""
        batch, n = rhs_primal.shape
        m = rhs_rows.shape[1]
        u, w = np.empty((batch, n)), np.empty((batch, m))
        w_bound = np.zeros(rhs_bounds.shape)
        width = int(self.count.max(initial=0))
        structure = (self.columns, self.row_index, self.entries, self.hessian, self.free, self.bounded_at)
        factors = (self.factor, self.offset, self.order, self.count)
        work = float(width * width + 4 * n + 2 * self.entries.shape[1])
        out = (u, w, w_bound, np.empty((batch, max(width, 1))))
        for_each_item(box_kkt, batch, work, *structure, *factors, rhs_primal, rhs_rows, rhs_bounds, *out)
        return KKTSolution(u, w, w_bound)

    @property
    def dependent(self) -> Mask:
        """(B,) whether active rows depend on others and on the bounds."""
        return np.count_nonzero(self.side_rows, axis=1) > self.count

    @property
    def active_rows(self) -> IndexArray:
        """(B, m) side of the general rows in K."""
        return self.side_rows

    @property
    def active_bounds(self) -> IndexArray:
        """(B, nb) side of the bounds in K."""
        return self.side_bounds


@dataclass(frozen=True)
class FacePart:
    """The face of one group of independent blocks.

    Attributes:
        kkt: ``kkt(rhs_primal, rhs_rows, rhs_bounds, out)`` writes the group's places of a KKT solution; arrays are
            those of the whole program.
        sides: ``sides(rows, bounds)`` writes the sides of the group's active rows and bounds.
    """

    kkt: Callable[[FloatArray, FloatArray, FloatArray, KKTSolution], None]
    sides: Callable[[IndexArray, IndexArray], None]


class BlockFace:
    """Face of a program made of independent blocks: the KKT system falls apart with it.

    Args:
        shape: (B, n, m, nb).
        parts: one per group of blocks; together they cover every variable, row and bound.
    """

    def __init__(self, shape: tuple[int, int, int, int], parts: Sequence[FacePart]) -> None:
        """Keep the parts."""
        self._shape = shape
        self._parts = tuple(parts)

    def kkt_solve(self, rhs_primal: FloatArray, rhs_rows: FloatArray, rhs_bounds: FloatArray) -> KKTSolution:
        """Solve the KKT system of the module docstring; arguments as in :meth:`GramFace.kkt_solve`."""
        out = KKTSolution(np.empty(rhs_primal.shape), np.zeros(rhs_rows.shape), np.zeros(rhs_bounds.shape))
        for part in self._parts:
            part.kkt(rhs_primal, rhs_rows, rhs_bounds, out)
        return out

    @property
    def dependent(self) -> Mask:
        """(B,) False: the blocks see to dependent rows themselves."""
        return np.zeros(self._shape[0], dtype=bool)

    @cached_property
    def _sides(self) -> tuple[IndexArray, IndexArray]:
        batch, _, m, bounded = self._shape
        rows, bounds = np.zeros((batch, m), dtype=np.int64), np.zeros((batch, bounded), dtype=np.int64)
        for part in self._parts:
            part.sides(rows, bounds)
        return rows, bounds

    @property
    def active_rows(self) -> IndexArray:
        """(B, m) side of the general rows in K."""
        return self._sides[0]

    @property
    def active_bounds(self) -> IndexArray:
        """(B, nb) side of the bounds in K."""
        return self._sides[1]


@dataclass(frozen=True)
class MixedFace:
    """Faces of a batch of which some items were solved by another solver.

    Attributes:
        first: face of the whole batch, without content for the items of ``second``.
        second: face of the other items.
        items: (k,) the items ``second`` holds.
    """

    first: Face
    second: Face
    items: IndexArray

    def kkt_solve(self, rhs_primal: FloatArray, rhs_rows: FloatArray, rhs_bounds: FloatArray) -> KKTSolution:
        """Solve the KKT system of the module docstring; arguments as in :meth:`GramFace.kkt_solve`."""
        whole = self.first.kkt_solve(rhs_primal, rhs_rows, rhs_bounds)
        part = self.second.kkt_solve(
            np.ascontiguousarray(rhs_primal[self.items]),
            np.ascontiguousarray(rhs_rows[self.items]),
            np.ascontiguousarray(rhs_bounds[self.items]),
        )
        whole.primal[self.items] = part.primal
        whole.rows[self.items] = part.rows
        whole.bounds[self.items] = part.bounds
        return whole

    @property
    def dependent(self) -> Mask:
        """(B,) whether active rows are dependent."""
        found = self.first.dependent.copy()
        found[self.items] = self.second.dependent
        return found

    @property
    def active_rows(self) -> IndexArray:
        """(B, m) side of the general rows in K."""
        sides = self.first.active_rows.copy()
        sides[self.items] = self.second.active_rows
        return sides

    @property
    def active_bounds(self) -> IndexArray:
        """(B, nb) side of the bounds in K."""
        sides = self.first.active_bounds.copy()
        sides[self.items] = self.second.active_bounds
        return sides


@dataclass(frozen=True)
class DenseFace:
    """Face of the reference solver: the KKT matrix itself, solved by dense least squares, item by item.

    The minimal-norm solution of the (possibly singular) system is the pseudo-inverse in the definition of the
    HS-Jacobian, written down literally.

    Attributes:
        values: the problems.
        active_rows: (B, m) side of the general rows in K.
        active_bounds: (B, nb) side of the bounds in K.
    """

    values: QPValues
    active_rows: IndexArray
    active_bounds: IndexArray

    @property
    def dependent(self) -> Mask:
        """(B,) False: least squares gives the multipliers of least norm."""
        return np.zeros(self.values.batch, dtype=bool)

    def kkt_solve(self, rhs_primal: FloatArray, rhs_rows: FloatArray, rhs_bounds: FloatArray) -> KKTSolution:
        """Solve the KKT system of the module docstring; arguments as in :meth:`GramFace.kkt_solve`."""
        batch, n = rhs_primal.shape
        u, w, w_bounds = np.zeros(rhs_primal.shape), np.zeros(rhs_rows.shape), np.zeros(rhs_bounds.shape)
        for b in range(batch):
            hessian = self.values.hessian[b if self.values.hessian.shape[0] > 1 else 0]
            hessian = np.diag(hessian) if self.values.diagonal else hessian
            rows = np.flatnonzero(self.active_rows[b])
            at = np.flatnonzero(self.active_bounds[b])
            general = self.values.rows[b if self.values.rows.shape[0] > 1 else 0][rows]
            normals = np.concatenate([general, np.eye(n)[self.values.bounded[at]]])
            m = len(normals)
            system = np.block([[hessian, normals.T], [normals, np.zeros((m, m))]])
            target = np.concatenate([rhs_primal[b], rhs_rows[b, rows], rhs_bounds[b, at]])
            solution, *_ = np.linalg.lstsq(system, target, rcond=1e-12)
            u[b] = solution[:n]
            w[b, rows] = solution[n : n + len(rows)]
            w_bounds[b, at] = solution[n + len(rows) :]
        return KKTSolution(u, w, w_bounds)


#: Relative to the length of a row, to the largest curvature and to the length of a null direction: remainder of an
#: active row, curvature on the face, and part of a null direction that is read, below which each counts as zero.
_RANK, _CURVATURE, _SEEN = 1e-10, 1e-12, 1e-9
#: Variables from which on a Cholesky factorisation of LAPACK is worth trying before the face is factored.
_LARGE = 100


@dataclass(frozen=True)
class KnownSystems:
    """What a solver found out about the KKT matrices ``[H, N'; N, 0]`` of a face.

    Attributes:
        regular: (B,) items whose matrix surely has no null vector.
        independent: (B,) items whose active rows surely are independent.
        settled: (B,) items whose active rows may be dependent, but whose multipliers are those of least norm already.
        solve: ``solve(active_rows, active_bounds, rhs_primal, rhs_rows, rhs_bounds)`` solves the systems of the regular
            items; it returns the solutions, and (B,) which items it solved.
    """

    regular: Mask
    independent: Mask
    settled: Mask
    solve: Callable[[IndexArray, IndexArray, FloatArray, FloatArray, FloatArray], tuple[KKTSolution, Mask]]


@dataclass(frozen=True)
class LeastNormFace:
    """Face of a problem whose Hessian may be singular on it: the selection of least norm among the optima.

    On the face ``N x = d`` the optima of a semidefinite Hessian form an affine set; the selection is its point of least
    norm in the variables that are read. With Z a basis of null(N), ``P0 = Z (Z'HZ)^+ Z'``, Z0 a basis of the null
    space of H on the face, M the mask of the variables that are read and ``R = I - Z0 (M Z0)^+ M``, its derivative is

        u = R (u0),   u0 = N^+ r + P0 (R'g - H N^+ r),   w = N^+' (R'g - H u0),

    for M = I the limit of ``H + eps I`` as eps falls to 0, with directions in which nothing holds the optimum dropped.
    Multipliers w of dependent rows are those of least norm. Dense, factored at the first use:
    ``2 f^2 (k + f)`` operations per item for f free variables and k active rows, ``O(n (n + k))`` per solve.

    Attributes:
        values: the problems.
        active_rows: (B, m) side of the general rows in K.
        active_bounds: (B, nb) side of the bounds in K.
        read: (n,) variables whose norm selects among the optima.
        known: what the solver found out about it, if anything.
    """

    values: QPValues
    active_rows: IndexArray
    active_bounds: IndexArray
    read: Mask
    known: KnownSystems | None = None

    def _factor(self, rank: float, curvature: float) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the problem and the factors as the kernels want them."""
        values = self.values
        batch, n, m = values.batch, values.num_variables, values.rows.shape[1]
        hessian = values.hessian[:, None, :] if values.diagonal else values.hessian
        problem = (hessian, values.diagonal, values.rows, values.bounded)
        units, order, length = np.ones((batch, n)), np.zeros((batch, m), dtype=np.int64), np.zeros((batch, m))
        pivots, sizes = np.zeros((batch, n), dtype=np.int64), np.zeros((batch, 6), dtype=np.int64)
        offset = np.zeros(batch, dtype=np.int64)
        sides = (self.active_rows, self.active_bounds, self.read, rank, curvature, _SEEN)
        arguments = (*problem, *sides, units, order, length, pivots, sizes, offset)
        stores = for_each_item(factor_items, batch, float(2 * n * n * (n + m)), *arguments)
        return problem, (units, order, length, pivots, sizes, offset, gather(stores, offset))

    @cached_property
    def _factors(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return self._factor(_RANK, _CURVATURE)

    def free_directions(self, rank: float = _RANK, curvature: float = _CURVATURE) -> IndexArray:
        """Count, per item, the directions of the face that are read and in which nothing holds the optimum.

        Args:
            rank: remainder below which an active row counts as dependent, relative to its length.
            curvature: below which a direction counts as flat, relative to the largest.
        """
        if self.known is not None and self.known.regular.all():
            return np.zeros(self.values.batch, dtype=np.int64)
        default = (rank, curvature) == (_RANK, _CURVATURE)
        _, (*_, sizes, _, _) = self._factors if default else self._factor(rank, curvature)
        return sizes[:, SEEN]

    @property
    def dependent(self) -> Mask:
        """(B,) whether active rows are dependent; the face gives the multipliers of least norm in any case."""
        if self.known is not None:
            found = self.known.settled.copy()
            left = np.flatnonzero(~(found | self.known.independent)).astype(np.int64)
            if len(left):
                found[left] = self._of(left).dependent
            return found
        if self.values.num_variables > _LARGE and "_factors" not in self.__dict__:
            batch = self.values.batch
            if all(self._surely_independent(b) for b in range(batch)):
                return np.zeros(batch, dtype=bool)
        return self._factors[1][4][:, DEPENDENT] > 0

    def _surely_independent(self, b: int) -> bool:
        """Whether the Gram matrix of the active rows on the free variables is well conditioned: one Cholesky factor."""
        values, rows = self.values, self.active_rows[b] != 0
        free = np.ones(values.num_variables, dtype=bool)
        free[values.bounded[self.active_bounds[b] != 0]] = False
        normals = values.rows[b if len(values.rows) > 1 else 0][rows]
        length = np.linalg.norm(normals, axis=1, keepdims=True)
        unit = normals[:, free] / np.where(length > 0.0, length, 1.0)
        gram = unit @ unit.T
        gram[np.diag_indices(len(gram))] -= 1e-8
        try:
            np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            return False
        return True

    def _of(self, items: IndexArray) -> LeastNormFace:
        """Return the face of some items, of which nothing is known."""
        return LeastNormFace(self.values.take(items), self.active_rows[items], self.active_bounds[items], self.read)

    def replaced(self, rows: IndexArray, bounds: IndexArray) -> tuple[Face, IndexArray]:
        """Return the face with other sides, and the items in which they differ: only those are factored again."""
        changed = (rows != self.active_rows).any(axis=1) | (bounds != self.active_bounds).any(axis=1)
        items = np.flatnonzero(changed).astype(np.int64)
        if not len(items):
            return self, items
        if len(items) == self.values.batch:
            return LeastNormFace(self.values, rows, bounds, self.read), items
        return MixedFace(
            self, LeastNormFace(self.values.take(items), rows[items], bounds[items], self.read), items
        ), items

    def kkt_solve(self, rhs_primal: FloatArray, rhs_rows: FloatArray, rhs_bounds: FloatArray) -> KKTSolution:
        """Solve the KKT system of the class docstring; arguments as in :meth:`GramFace.kkt_solve`."""
        if self.known is not None and self.known.regular.any():
            found, done = self.known.solve(self.active_rows, self.active_bounds, rhs_primal, rhs_rows, rhs_bounds)
            left = np.flatnonzero(~done).astype(np.int64)
            if len(left):
                other = self._of(left).kkt_solve(rhs_primal[left], rhs_rows[left], rhs_bounds[left])
                found.primal[left], found.rows[left], found.bounds[left] = other.primal, other.rows, other.bounds
            return found
        problem, factors = self._factors
        batch, n = rhs_primal.shape
        out = (np.empty((batch, n)), np.empty(rhs_rows.shape), np.empty(rhs_bounds.shape))
        right = (rhs_primal, rhs_rows, rhs_bounds)
        work = float(4 * n * (n + rhs_rows.shape[1]))
        for_each_item(solve_items, batch, work, *problem, self.active_bounds, *factors, *right, *out)
        return KKTSolution(*out)


Face = GramFace | BoxFace | BlockFace | MixedFace | DenseFace | LeastNormFace
