"""The Hessian seen through the constraint rows: what a dual method and its face need to know of ``H``.

For rows ``N`` (M, n) a metric answers two questions for a whole batch,

    free:    x0 = argmin 1/2 x'Hx - a'x,  values N x0,
    finish:  x = x0 - H^-1 N'lam,

and gives the Gram matrix ``D = N H^-1 N'`` once. :class:`SharedMetric` serves data that all items share: it
eliminates the equality rows for good, with the inverse of the KKT matrix

    [H E'] [x ]   [a]        x  = Z a + Y h
    [E 0 ] [nu] = [h]        nu = Y'a + S h

built by the null-space method (``Z = V (V'HV)^-1 V'``, V a basis of null(E); Nocedal and Wright 2006, 16.2), so
dependent equality rows and an ``H`` that is singular outside null(E) are normal input, and ``nu`` has minimal norm.
:class:`ItemMetric` serves data that differ between items: one Cholesky factor per item.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hsbackend._blas import axpy, dot
from hsbackend._parallel import compile_kernel, for_each_item
from hsbackend.batched import gram_of_columns, matmul
from hsbackend.program import FloatArray, IndexArray
from hsbackend.status import Status

_INVALID = int(Status.INVALID_INPUT)
_NOT_CONVEX = int(Status.NOT_STRICTLY_CONVEX)
#: Pivots below this fraction of the diagonal mean a Hessian that is not positive definite in float64.
_SINGULAR = 1e-13
#: Pivots below this fraction of the diagonal may be rounding.
_SUSPECT = 1e-9
#: Singular values of the unit-norm equality rows below this fraction of the largest mean dependent rows.
_RANK = 1e-11


class SharedMetric:
    """One Hessian and one set of rows for all items.

    Args:
        hessian: (n, n).
        equalities: (me, n).
        rows: (M, n) inequality rows, bounds among them.
        proximal: (ns,) variables of proximal steps.

    Attributes:
        convex: False when H is not positive definite on null(E); nothing else is valid then.
        gram: (1, M, M).
        proximal_rows: (1, M, ns) ``N Z`` on the proximal variables.
        proximal_block: (1, ns, ns) ``Z`` on the proximal variables.
        inconsistency: (me, me) projector whose product with h must vanish for the equalities to hold.
        num_equalities: equality rows left in the Gram matrix: none.
        rank: rank of the Gram matrix at most, the dimension of null(E).
    """

    num_equalities = 0

    def __init__(self, hessian: FloatArray, equalities: FloatArray, rows: FloatArray, proximal: IndexArray) -> None:
        """Factor once."""
        n, me = hessian.shape[0], equalities.shape[0]
        size = np.linalg.norm(equalities, axis=1)
        self._row_scale = np.where(size > 0.0, 1.0 / np.where(size > 0.0, size, 1.0), 1.0)
        if me:
            left, singular, right = np.linalg.svd(equalities * self._row_scale[:, None], full_matrices=True)
            rank = int(np.sum(singular > _RANK * float(singular.max(initial=0.0))))
            null = right[rank:].T
            self.inconsistency = np.eye(me) - left[:, :rank] @ left[:, :rank].T
            if rank == me:
                pseudo = (right[:rank].T / singular) @ left.T * self._row_scale
            else:  # rows are dependent: the pseudo-inverse in the given scaling makes nu minimal
                pseudo = np.linalg.pinv(equalities, rcond=_RANK)
        else:
            null = np.eye(n)
            pseudo = np.zeros((n, 0))
            self.inconsistency = np.zeros((0, 0))
        self.rank = int(null.shape[1])
        inner = null.T @ hessian @ null
        inner = 0.5 * (inner + inner.T)
        self.convex = True
        z = np.zeros((n, n))
        if null.shape[1]:
            # Rounding in H is curvature of its own where null(E) has next to none.
            spread = max(np.abs(np.diag(inner)).max(), 0.1 * np.abs(hessian).max())
            try:
                factor = np.linalg.cholesky(inner)
            except np.linalg.LinAlgError:
                factor = np.zeros_like(inner)
            singular_up_to_rounding = not np.linalg.eigvalsh(inner)[0] > _SINGULAR * spread
            if singular_up_to_rounding or not np.diag(factor).min() ** 2 > _SINGULAR * spread:
                self.convex = False
                return
            half = np.linalg.solve(factor, null.T)
            z = half.T @ half
        self.inverse = z
        self.range = pseudo - z @ (hessian @ pseudo)  # Y
        self.schur = -pseudo.T @ hessian @ self.range  # S
        self.equalities = equalities
        self.rows_inverse = rows @ z
        self.rows = rows
        self._columns: FloatArray = np.ascontiguousarray(rows.T)
        self._range_rows: FloatArray = np.ascontiguousarray(self.range.T)
        self._schur_rows: FloatArray = np.ascontiguousarray(self.schur.T)
        self.proximal_rows: FloatArray = np.ascontiguousarray(self.rows_inverse[:, proximal])[None]
        self.proximal_block: FloatArray = np.ascontiguousarray(z[np.ix_(proximal, proximal)])[None]
        self.gram: FloatArray = (self.rows_inverse @ rows.T)[None]
        self.gram = 0.5 * (self.gram + self.gram.transpose(0, 2, 1))
        # A row of null(E)' that vanishes up to rounding must look like a zero row.
        size = np.einsum("ij,ij->i", rows, rows) * max(float(np.abs(np.diag(z)).max(initial=0.0)), 1e-300)
        tiny = np.diag(self.gram[0]) <= 1e-14 * size
        self.gram[:, tiny, :] = 0.0
        self.gram[:, :, tiny] = 0.0

    def inconsistent(self, rhs_equalities: FloatArray) -> FloatArray:
        """Return (B,) how far the equalities are from having a common solution, relative to the data."""
        if not self.inconsistency.size:
            return np.zeros(rhs_equalities.shape[0])
        scaled = rhs_equalities * self._row_scale
        gap = np.abs(matmul(scaled, self.inconsistency)).max(axis=1)  # a projector is symmetric
        return gap / (1.0 + np.abs(scaled).max(axis=1))

    def free(self, rhs_primal: FloatArray, rhs_equalities: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the minimiser under the equalities alone (B, n) and its row values (B, M)."""
        point = matmul(rhs_primal, self.inverse)
        if self.equalities.shape[0]:
            point += matmul(rhs_equalities, self._range_rows)
        return point, matmul(point, self._columns)

    def finish(
        self, point: FloatArray, multipliers: FloatArray, rhs_primal: FloatArray, rhs_equalities: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return x (B, n) and the multipliers of the equalities (B, me)."""
        primal = point - matmul(multipliers, self.rows_inverse) if multipliers.shape[1] else point
        if not self.equalities.shape[0]:
            return primal, np.zeros((point.shape[0], 0))
        pushed = rhs_primal - matmul(multipliers, self.rows)
        dual = matmul(pushed, self.range)
        dual += matmul(rhs_equalities, self._schur_rows)
        return primal, dual


@compile_kernel
def _eliminate(start, stop, step, hessian, rows, units, work, status):  # type: ignore[no-untyped-def]
    """Turn ``[H | N' e_units]`` into ``[U | U^-T (N' e_units)]`` with ``H = U'U``; shared inputs have length 1.

    One sweep of Gaussian elimination by rows, four earlier rows at a time: a pass over the target for four updates.
    """
    n = hessian.shape[1]
    m = rows.shape[1]
    width = work.shape[2]
    varying = 0 if hessian.shape[0] == 1 else 1
    varying_rows = 0 if rows.shape[0] == 1 else 1
    for b in range(start, stop, step):
        matrix = hessian[b * varying]
        normals = rows[b * varying_rows]
        w = work[b]
        limit = 0.0
        for i in range(n):
            limit = max(limit, abs(matrix[i, i]))
        for i in range(n):
            target = w[i]
            for j in range(i):
                target[j] = 0.0
            for j in range(i, n):
                target[j] = matrix[i, j]
            for k in range(m):
                target[n + k] = normals[k, i]
            for k in range(n + m, width):
                target[k] = 1.0 if units[k - n - m] == i else 0.0
            # Slices that begin at zero: the compiler vectorises only loops whose indices cannot be negative.
            tail = target[i:]
            length = width - i
            p = 0
            while p + 4 <= i:
                c0 = w[p, i]
                c1 = w[p + 1, i]
                c2 = w[p + 2, i]
                c3 = w[p + 3, i]
                r0 = w[p, i:]
                r1 = w[p + 1, i:]
                r2 = w[p + 2, i:]
                r3 = w[p + 3, i:]
                for j in range(length):
                    tail[j] -= c0 * r0[j] + c1 * r1[j] + c2 * r2[j] + c3 * r3[j]
                p += 4
            while p < i:
                axpy(-w[p, i], w[p, i:], tail, length)
                p += 1
            pivot = target[i]
            if not pivot > _SINGULAR * limit:
                status[b] = _INVALID if np.isnan(pivot) else _NOT_CONVEX
                break
            inverse = 1.0 / np.sqrt(pivot)
            for j in range(length):
                tail[j] *= inverse
        if status[b] != 0:  # leave harmless numbers behind
            for i in range(n):
                for j in range(width):
                    w[i, j] = 0.0
                w[i, i] = 1.0


@compile_kernel
def _forward_substitution(start, stop, step, work, rhs, point, values):  # type: ignore[no-untyped-def]
    """``point = U^-T rhs`` and ``values = X' point``, X the columns of ``work`` behind U."""
    n = rhs.shape[1]
    total = values.shape[1]
    for b in range(start, stop, step):
        y = point[b]
        v = values[b]
        for i in range(n):
            y[i] = rhs[b, i]
        for k in range(total):
            v[k] = 0.0
        for i in range(n):
            row = work[b, i]
            y[i] /= row[i]
            axpy(-y[i], row[i + 1 :], y[i + 1 :], n - i - 1)
            axpy(y[i], row[n:], v, total)


@compile_kernel
def _back_substitution(start, stop, step, work, point, multipliers, primal):  # type: ignore[no-untyped-def]
    """``primal = U^-1 (point - X multipliers)``."""
    n = point.shape[1]
    total = multipliers.shape[1]
    for b in range(start, stop, step):
        x = primal[b]
        for i in range(n - 1, -1, -1):
            row = work[b, i]
            t = point[b, i] - dot(row[n:], multipliers[b], total) - dot(row[i + 1 :], x[i + 1 :], n - i - 1)
            x[i] = t / row[i]


class ItemMetric:
    """One Hessian or one set of rows per item.

    Args:
        hessian: (1 or B, n, n).
        rows: (1 or B, m, n), equality rows first.
        bounded: (nb,) variables whose unit rows follow.
        proximal: (ns,) variables of proximal steps.
        batch: B.
        num_equalities: number of equality rows; they stay in the Gram matrix.

    Attributes:
        status: (B,) INVALID_INPUT or NOT_STRICTLY_CONVEX where the Hessian has no Cholesky factor.
        gram: (B, m + nb, m + nb).
        rank: rank of each Gram matrix at most, n.
        proximal_rows: (B, m + nb, ns) ``N H^-1`` on the proximal variables.
        proximal_block: (B, ns, ns) ``H^-1`` on the proximal variables.
    """

    def __init__(
        self,
        hessian: FloatArray,
        rows: FloatArray,
        bounded: IndexArray,
        proximal: IndexArray,
        batch: int,
        num_equalities: int,
    ) -> None:
        """Factor every item."""
        n, total = hessian.shape[1], rows.shape[1] + len(bounded)
        self.num_equalities = num_equalities
        self.status = np.zeros(batch, dtype=np.int8)
        self.rank = int(n)
        # [U | U^-T N' | U^-T e_bounded | U^-T e_proximal]: one Gram matrix of the columns behind U holds what the rows
        # and the proximal steps need.
        self._work = np.empty((batch, n, n + total + len(proximal)))
        arguments: tuple[Any, ...] = (hessian, rows, np.concatenate([bounded, proximal]), self._work, self.status)
        for_each_item(_eliminate, batch, n * n * (n / 6.0 + total / 2.0), *arguments)
        self._look_again(hessian)
        whole = gram_of_columns(self._work, n)
        self.gram: FloatArray = np.ascontiguousarray(whole[:, :total, :total])
        self.proximal_rows: FloatArray = np.ascontiguousarray(whole[:, :total, total:])
        self.proximal_block: FloatArray = np.ascontiguousarray(whole[:, total:, total:])

    def _look_again(self, hessian: FloatArray) -> None:
        """Find Hessians that are singular up to rounding: their last pivot is rounding, of any size."""
        n = hessian.shape[1]
        if not n:
            return
        pivots = np.einsum("bii->bi", self._work[:, :, :n]).min(axis=1) ** 2
        largest = np.abs(np.einsum("bii->bi", hessian)).max(axis=1)
        items = np.flatnonzero((self.status == 0) & (pivots < _SUSPECT * largest))
        for item in items:
            own = hessian[item if hessian.shape[0] > 1 else 0]
            if not np.linalg.eigvalsh(own)[0] > _SINGULAR * np.abs(own).max():
                self.status[item] = _NOT_CONVEX

    def free(self, rhs_primal: FloatArray, rhs_equalities: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return ``U^-T a`` (B, n) and the row values (B, M); the equalities are ordinary rows here."""
        (batch, n), total = rhs_primal.shape, self.gram.shape[1]
        point = np.empty((batch, n))
        values = np.empty((batch, total))
        arguments = (self._work, rhs_primal, point, values)
        for_each_item(_forward_substitution, batch, float(n * (n / 2 + total)), *arguments)
        return point, values

    def finish(
        self, point: FloatArray, multipliers: FloatArray, rhs_primal: FloatArray, rhs_equalities: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return x (B, n) and no equality multipliers: they are among ``multipliers``."""
        (batch, n), total = point.shape, self.gram.shape[1]
        primal = np.empty((batch, n))
        arguments = (self._work, point, multipliers, primal)
        for_each_item(_back_substitution, batch, float(n * (n / 2 + total)), *arguments)
        return primal, np.zeros((batch, 0))


Metric = SharedMetric | ItemMetric
