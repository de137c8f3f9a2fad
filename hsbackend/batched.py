"""Products with small matrices, one per item or one for all: the few our algorithms need, on the caller's threads.

torch's batched products start its own thread team for every call; for matrices of order ten that costs more than the
arithmetic (docs/performance.md). Products with one shared matrix are a single large product and go to torch.
"""

from __future__ import annotations

import numpy as np
import torch

from hsbackend._blas import axpy, dot
from hsbackend._parallel import compile_kernel, for_each_item
from hsbackend.program import FloatArray

#: Multiply-adds from which a call into the library pays. It is faster per operation at every size, but it wakes a
#: second thread team, which costs milliseconds when the machine is busy (measured: docs/performance.md).
_LIBRARY_WORK = 2_000_000


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
    varying = 0 if matrices.shape[0] == 1 else 1
    k = matrices.shape[1]
    n = matrices.shape[2]
    for b in range(start, stop, step):
        matrix = matrices[b * varying]
        v = vectors[b]
        row = out[b]
        i = 0
        while i + 4 <= k:
            m0 = matrix[i]
            m1 = matrix[i + 1]
            m2 = matrix[i + 2]
            m3 = matrix[i + 3]
            for j in range(n):
                row[j] += v[i] * m0[j] + v[i + 1] * m1[j] + v[i + 2] * m2[j] + v[i + 3] * m3[j]
            i += 4
        while i < k:
            axpy(v[i], matrix[i], row, n)
            i += 1


@compile_kernel
def _weighted_gram(start, stop, step, matrices, first, weights, base, out):  # type: ignore[no-untyped-def]
    """``out[b] = M' diag(w[b]) M + base[b]``, M the columns of ``matrices[b]`` from ``first``; both triangles."""
    varying = 0 if matrices.shape[0] == 1 else 1
    varying_w = 0 if weights.shape[0] == 1 else 1
    varying_base = 0 if base.shape[0] == 1 else 1
    k = matrices.shape[1]
    n = matrices.shape[2] - first
    for b in range(start, stop, step):
        matrix = matrices[b * varying]
        w = weights[b * varying_w]
        for i in range(n):
            # Slices that begin at zero: the compiler vectorises only loops whose indices cannot be negative.
            row = out[b, i, i:]
            begin = first + i
            for j in range(n - i):
                row[j] = base[b * varying_base, i, i + j]
            p = 0
            while p + 4 <= k:
                a0 = matrix[p, begin] * w[p]
                a1 = matrix[p + 1, begin] * w[p + 1]
                a2 = matrix[p + 2, begin] * w[p + 2]
                a3 = matrix[p + 3, begin] * w[p + 3]
                m0 = matrix[p, begin:]
                m1 = matrix[p + 1, begin:]
                m2 = matrix[p + 2, begin:]
                m3 = matrix[p + 3, begin:]
                for j in range(n - i):
                    row[j] += a0 * m0[j] + a1 * m1[j] + a2 * m2[j] + a3 * m3[j]
                p += 4
            while p < k:
                axpy(matrix[p, begin] * w[p], matrix[p, begin:], row, n - i)
                p += 1
        for i in range(n):
            for j in range(i):
                out[b, i, j] = out[b, j, i]


def matmul(a: FloatArray, b: FloatArray) -> FloatArray:
    """Multiply (B, k) with one shared (k, n) matrix."""
    work = a.shape[0] * b.shape[0] * b.shape[1]
    if work >= _LIBRARY_WORK:
        return torch.matmul(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    out = np.zeros((a.shape[0], b.shape[1]))
    arguments = (np.ascontiguousarray(a), np.ascontiguousarray(b)[None], out)
    for_each_item(_vecmat, a.shape[0], float(b.size), *arguments)
    return out


def matvec(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    """Return ``M[b] v[b]``, (B, k), for matrices (1 or B, k, n) and vectors (B, n)."""
    if matrices.shape[0] == 1:
        return matmul(vectors, matrices[0].T)
    batch, k, n = matrices.shape
    out = np.empty((batch, k))
    for_each_item(_matvec, batch, float(k * n), matrices, np.ascontiguousarray(vectors), out)
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

    Without ``weights`` they are one, without ``base`` it is zero. The result has a leading dimension of 1 when no input
    differs between items, and may have it when equal weights make no difference.
    """
    count, k, n = matrices.shape
    if count * k * n * n / 2 >= _LIBRARY_WORK:
        return _library_gram(torch.from_numpy(matrices), weights, base)
    weights = np.ones((1, k)) if weights is None else weights
    base = np.zeros((1, n, n)) if base is None else base
    batch = max(count, weights.shape[0], base.shape[0])
    out = np.empty((batch, n, n))
    for_each_item(_weighted_gram, batch, k * n * n / 2.0, matrices, 0, weights, base, out)
    return out


def gram_of_columns(matrices: FloatArray, first: int) -> FloatArray:
    """Return ``M'M`` for M the columns of (B, k, .) matrices from ``first`` on."""
    batch, k, width = matrices.shape
    n = width - first
    if batch * k * n * n / 2 >= _LIBRARY_WORK:
        tall = torch.from_numpy(matrices)[:, :, first:]
        return torch.bmm(tall.transpose(1, 2), tall).numpy()
    out = np.empty((batch, n, n))
    arguments = (matrices, first, np.ones((1, k)), np.zeros((1, n, n)), out)
    for_each_item(_weighted_gram, batch, k * n * n / 2.0, *arguments)
    return out


def _library_gram(tall: torch.Tensor, weights: FloatArray | None, base: FloatArray | None) -> FloatArray:
    """The same with torch; equal weights, the usual case, cost no copy of the matrices."""
    factor = 1.0
    weighted = tall
    if weights is not None:
        first = float(weights.flat[0]) if weights.size else 1.0
        if np.all(weights == first):
            factor = first
        else:
            weighted = tall * torch.from_numpy(weights)[:, :, None]
    batch = max(weighted.shape[0], 1 if base is None else base.shape[0])
    tall, weighted = tall.expand(batch, -1, -1), weighted.expand(batch, -1, -1)
    if base is None or not base.any():
        square = torch.bmm(tall.transpose(1, 2), weighted)
        return (square if factor == 1.0 else square.mul_(factor)).numpy()
    start = torch.from_numpy(base).expand(batch, -1, -1)
    return torch.baddbmm(start, tall.transpose(1, 2), weighted, alpha=factor).contiguous().numpy()
