"""Products with small matrices, one per item or one for all: the few our algorithms need, on the caller's threads.

An item's result has the same bits whatever the batch around it and the number of threads: every entry is one sum in the
order of its terms, and how the work is cut depends on the shapes of the matrices alone. A library promises neither (its
rounding changes with the number of rows), and its own thread team costs more than small products (docs/performance.md).
"""

from __future__ import annotations

import numpy as np

from hsbackend._blas import dot
from hsbackend._parallel import compile_kernel, for_each_item
from hsbackend.program import FloatArray

#: Rows and columns of a matrix that are used for every item before the next ones are: what stays in a core's cache.
_PANEL_ROWS, _PANEL_COLUMNS = 32, 256


@compile_kernel
def _matvec(start, stop, step, matrices, vectors, out):  # type: ignore[no-untyped-def]
    """``out[b] = M[b] v[b]``."""
    varying = 0 if matrices.shape[0] == 1 else 1
    n = matrices.shape[2]
    for b in range(start, stop, step):
        matrix = matrices[b * varying]
        for i in range(matrices.shape[1]):
            out[b, i] = dot(matrix[i], vectors[b], n)


@compile_kernel
def _vecmat(start, stop, step, vectors, matrices, out):  # type: ignore[no-untyped-def]
    """``out[b] = v[b] M[b]``, four rows of M at a time; ``out`` comes zeroed."""
    # Each sum is written term by term: with one multiplication to every addition there is one way to fuse them, and
    # _vecmat_fours has the same bits.
    varying = 0 if matrices.shape[0] == 1 else 1
    k = matrices.shape[1]
    n = matrices.shape[2]
    for b in range(start, stop, step):
        matrix = matrices[b * varying]
        v = vectors[b]
        row = out[b]
        p = 0
        while p + 4 <= k:
            a0, a1, a2, a3 = v[p], v[p + 1], v[p + 2], v[p + 3]
            m0, m1, m2, m3 = matrix[p], matrix[p + 1], matrix[p + 2], matrix[p + 3]
            for j in range(n):
                row[j] = (((row[j] + a0 * m0[j]) + a1 * m1[j]) + a2 * m2[j]) + a3 * m3[j]
            p += 4
        while p < k:
            a0 = v[p]
            m0 = matrix[p]
            for j in range(n):
                row[j] = row[j] + a0 * m0[j]
            p += 1


@compile_kernel
def _vecmat_fours(start, stop, step, vectors, matrix, panel_rows, panel_columns, out):  # type: ignore[no-untyped-def]
    """``out[b] = v[b] M`` for the items 4 g to 4 g + 3 of every group g; ``out`` comes zeroed."""
    k, n = matrix.shape
    for left in range(0, n, panel_columns):
        right = min(left + panel_columns, n)
        width = right - left
        for top in range(0, k, panel_rows):
            bottom = min(top + panel_rows, k)
            for group in range(start, stop, step):
                b = 4 * group
                v0, v1, v2, v3 = vectors[b], vectors[b + 1], vectors[b + 2], vectors[b + 3]
                r0, r1, r2, r3 = out[b, left:], out[b + 1, left:], out[b + 2, left:], out[b + 3, left:]
                p = top
                while p + 4 <= bottom:
                    a00, a01, a02, a03 = v0[p], v0[p + 1], v0[p + 2], v0[p + 3]
                    a10, a11, a12, a13 = v1[p], v1[p + 1], v1[p + 2], v1[p + 3]
                    a20, a21, a22, a23 = v2[p], v2[p + 1], v2[p + 2], v2[p + 3]
                    a30, a31, a32, a33 = v3[p], v3[p + 1], v3[p + 2], v3[p + 3]
                    m0, m1, m2, m3 = matrix[p, left:], matrix[p + 1, left:], matrix[p + 2, left:], matrix[p + 3, left:]
                    for j in range(width):
                        x0, x1, x2, x3 = m0[j], m1[j], m2[j], m3[j]
                        r0[j] = (((r0[j] + a00 * x0) + a01 * x1) + a02 * x2) + a03 * x3
                        r1[j] = (((r1[j] + a10 * x0) + a11 * x1) + a12 * x2) + a13 * x3
                        r2[j] = (((r2[j] + a20 * x0) + a21 * x1) + a22 * x2) + a23 * x3
                        r3[j] = (((r3[j] + a30 * x0) + a31 * x1) + a32 * x2) + a33 * x3
                    p += 4
                while p < bottom:
                    a00, a10, a20, a30 = v0[p], v1[p], v2[p], v3[p]
                    m0 = matrix[p, left:]
                    for j in range(width):
                        x0 = m0[j]
                        r0[j] = r0[j] + a00 * x0
                        r1[j] = r1[j] + a10 * x0
                        r2[j] = r2[j] + a20 * x0
                        r3[j] = r3[j] + a30 * x0
                    p += 1


@compile_kernel
def _weighted_gram(start, stop, step, matrices, first, weights, base, panel_rows, out):  # type: ignore[no-untyped-def]
    """``out[b] = M' diag(w[b]) M + base[b]``, M the columns of ``matrices[b]`` from ``first``; both triangles."""
    varying = 0 if matrices.shape[0] == 1 else 1
    varying_w = 0 if weights.shape[0] == 1 else 1
    varying_base = 0 if base.shape[0] == 1 else 1
    k = matrices.shape[1]
    n = matrices.shape[2] - first
    for b in range(start, stop, step):
        matrix = matrices[b * varying]
        w = weights[b * varying_w]
        square = out[b]
        for i in range(n):
            for j in range(n):
                square[i, j] = base[b * varying_base, i, j]
        for top in range(0, k, panel_rows):
            bottom = min(top + panel_rows, k)
            # Four rows of the result and four of the matrix at a time: a pass over eight rows for sixteen updates. The
            # slices begin at zero: the compiler vectorises only loops whose indices cannot be negative.
            i = 0
            while i + 4 <= n:
                begin = first + i
                width = n - i
                r0, r1, r2, r3 = square[i, i:], square[i + 1, i:], square[i + 2, i:], square[i + 3, i:]
                p = top
                while p + 4 <= bottom:
                    m0, m1, m2, m3 = (
                        matrix[p, begin:],
                        matrix[p + 1, begin:],
                        matrix[p + 2, begin:],
                        matrix[p + 3, begin:],
                    )
                    w0, w1, w2, w3 = w[p], w[p + 1], w[p + 2], w[p + 3]
                    a00, a01, a02, a03 = w0 * m0[0], w1 * m1[0], w2 * m2[0], w3 * m3[0]
                    a10, a11, a12, a13 = w0 * m0[1], w1 * m1[1], w2 * m2[1], w3 * m3[1]
                    a20, a21, a22, a23 = w0 * m0[2], w1 * m1[2], w2 * m2[2], w3 * m3[2]
                    a30, a31, a32, a33 = w0 * m0[3], w1 * m1[3], w2 * m2[3], w3 * m3[3]
                    for j in range(width):
                        x0, x1, x2, x3 = m0[j], m1[j], m2[j], m3[j]
                        r0[j] = (((r0[j] + a00 * x0) + a01 * x1) + a02 * x2) + a03 * x3
                        r1[j] = (((r1[j] + a10 * x0) + a11 * x1) + a12 * x2) + a13 * x3
                        r2[j] = (((r2[j] + a20 * x0) + a21 * x1) + a22 * x2) + a23 * x3
                        r3[j] = (((r3[j] + a30 * x0) + a31 * x1) + a32 * x2) + a33 * x3
                    p += 4
                while p < bottom:
                    m0 = matrix[p, begin:]
                    a00, a10, a20, a30 = w[p] * m0[0], w[p] * m0[1], w[p] * m0[2], w[p] * m0[3]
                    for j in range(width):
                        x0 = m0[j]
                        r0[j] = r0[j] + a00 * x0
                        r1[j] = r1[j] + a10 * x0
                        r2[j] = r2[j] + a20 * x0
                        r3[j] = r3[j] + a30 * x0
                    p += 1
                i += 4
            while i < n:
                r0 = square[i, i:]
                for p in range(top, bottom):
                    m0 = matrix[p, first + i :]
                    a00 = w[p] * m0[0]
                    for j in range(n - i):
                        r0[j] = r0[j] + a00 * m0[j]
                i += 1
        for i in range(n):
            for j in range(i):
                square[i, j] = square[j, i]


def matmul(a: FloatArray, b: FloatArray) -> FloatArray:
    """Multiply (B, k) with one shared (k, n) matrix."""
    batch, shape = a.shape[0], b.shape
    out = np.zeros((batch, shape[1]))
    vectors, matrix = np.ascontiguousarray(a), np.ascontiguousarray(b)
    fours = batch // 4
    if fours:
        for_each_item(_vecmat_fours, fours, 4.0 * b.size, vectors, matrix, _PANEL_ROWS, _PANEL_COLUMNS, out)
    if 4 * fours < batch:
        rest = 4 * fours
        for_each_item(_vecmat, batch - rest, float(b.size), vectors[rest:], matrix[None], out[rest:])
    return out


def matvec(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    """Return ``M[b] v[b]``, (B, k), for matrices (1 or B, k, n) and vectors (B, n)."""
    batch, (_, k, n) = vectors.shape[0], matrices.shape
    out = np.empty((batch, k))
    arguments = (np.ascontiguousarray(matrices), np.ascontiguousarray(vectors), out)
    for_each_item(_matvec, batch, float(k * n), *arguments)
    return out


def vecmat(vectors: FloatArray, matrices: FloatArray) -> FloatArray:
    """Return ``v[b] M[b]``, (B, n), for vectors (B, k) and matrices (1 or B, k, n)."""
    if matrices.shape[0] == 1:
        return matmul(vectors, matrices[0])
    batch, k, n = matrices.shape
    out = np.zeros((batch, n))
    for_each_item(_vecmat, batch, float(k * n), np.ascontiguousarray(vectors), matrices, out)
    return out


def weighted_gram(
    matrices: FloatArray, weights: FloatArray | None = None, base: FloatArray | None = None
) -> FloatArray:
    """Return ``M' diag(w) M + base`` for matrices (1 or B, k, n), weights (1 or B, k), base (1 or B, n, n).

    Without ``weights`` they are one, without ``base`` it is zero; ``base`` is symmetric. The result has a leading
    dimension of 1 when no input differs between items.
    """
    count, k, n = matrices.shape
    weights = np.ones((1, k)) if weights is None else weights
    base = np.zeros((1, n, n)) if base is None else base
    batch = max(count, weights.shape[0], base.shape[0])
    out = np.empty((batch, n, n))
    for_each_item(_weighted_gram, batch, k * n * n / 2.0, matrices, 0, weights, base, _PANEL_ROWS, out)
    return out


def gram_of_columns(matrices: FloatArray, first: int) -> FloatArray:
    """Return ``M'M`` for M the columns of (B, k, .) matrices from ``first`` on."""
    batch, k, width = matrices.shape
    n = width - first
    out = np.empty((batch, n, n))
    arguments = (matrices, first, np.ones((1, k)), np.zeros((1, n, n)), _PANEL_ROWS, out)
    for_each_item(_weighted_gram, batch, k * n * n / 2.0, *arguments)
    return out
