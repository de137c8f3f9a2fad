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

#: From this order on one large library product per item beats our loop (measured: docs/performance.md).
_LIBRARY_ORDER = 48
#: Multiply-adds of a shared product below which our loop beats a call into the library.
_SMALL_PRODUCT = 40_000


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
    """``out[b] = v[b] M[b]``; ``out`` comes zeroed."""
    varying = 0 if matrices.shape[0] == 1 else 1
    n = matrices.shape[2]
    for b in range(start, stop, step):
        matrix = matrices[b * varying]
        for i in range(matrices.shape[1]):
            if vectors[b, i] != 0.0:
                axpy(vectors[b, i], matrix[i], out[b], n)


@compile_kernel
def _weighted_gram(start, stop, step, matrices, weights, base, out):  # type: ignore[no-untyped-def]
    """``out[b] = M[b]' diag(w[b]) M[b] + base[b]``, four rows of M at a time, both triangles."""
    varying = 0 if matrices.shape[0] == 1 else 1
    varying_w = 0 if weights.shape[0] == 1 else 1
    varying_base = 0 if base.shape[0] == 1 else 1
    k = matrices.shape[1]
    n = matrices.shape[2]
    for b in range(start, stop, step):
        matrix = matrices[b * varying]
        w = weights[b * varying_w]
        for i in range(n):
            row = out[b, i]
            for j in range(i, n):
                row[j] = base[b * varying_base, i, j]
            p = 0
            while p + 4 <= k:
                a0 = matrix[p, i] * w[p]
                a1 = matrix[p + 1, i] * w[p + 1]
                a2 = matrix[p + 2, i] * w[p + 2]
                a3 = matrix[p + 3, i] * w[p + 3]
                m0 = matrix[p]
                m1 = matrix[p + 1]
                m2 = matrix[p + 2]
                m3 = matrix[p + 3]
                for j in range(i, n):
                    row[j] += a0 * m0[j] + a1 * m1[j] + a2 * m2[j] + a3 * m3[j]
                p += 4
            while p < k:
                a0 = matrix[p, i] * w[p]
                m0 = matrix[p]
                for j in range(i, n):
                    row[j] += a0 * m0[j]
                p += 1
        for i in range(n):
            for j in range(i):
                out[b, i, j] = out[b, j, i]


def matmul(a: FloatArray, b: FloatArray) -> FloatArray:
    """Multiply (B, k) with one shared (k, n) matrix."""
    if a.shape[0] * b.shape[0] * b.shape[1] < _SMALL_PRODUCT:
        return a @ b
    return torch.matmul(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def matvec(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    """Return ``M[b] v[b]``, (B, k), for matrices (1 or B, k, n) and vectors (B, n)."""
    if matrices.shape[0] == 1:
        return matmul(vectors, np.ascontiguousarray(matrices[0].T))
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


def weighted_gram(matrices: FloatArray, weights: FloatArray, base: FloatArray) -> FloatArray:
    """Return ``M' diag(w) M + base`` for matrices (1 or B, k, n), weights (1 or B, k), base (1 or B, n, n)."""
    _, k, n = matrices.shape
    batch = max(matrices.shape[0], weights.shape[0], base.shape[0])
    if n >= _LIBRARY_ORDER:
        tall = torch.from_numpy(matrices)
        weighted = tall * torch.from_numpy(weights)[:, :, None]
        square = torch.matmul(tall.transpose(1, 2), weighted)
        return np.ascontiguousarray((square + torch.from_numpy(base)).numpy())
    out = np.empty((batch, n, n))
    for_each_item(_weighted_gram, batch, k * n * n / 2.0, matrices, weights, base, out)
    return out
