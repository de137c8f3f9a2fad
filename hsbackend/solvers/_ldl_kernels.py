# pyright: reportMissingParameterType=false
"""Compiled factor ``L D L'`` of a sparse quasi-definite matrix whose pattern and ordering are known.

The matrix is ``K``, of size N, in its elimination order: its upper triangle by columns (``k_ptr, k_row, k``). The
pattern of L is given twice: by columns (``l_ptr, l_row``, the diagonal of ones left out), which is how it is stored,
and by rows (``w_ptr, w_col``, columns in an order in which each comes after those that change it), which is how it is
made. Every diagonal entry has a known sign, because a quasi-definite matrix has an ``LDL'`` factor in every order.

Source: Davis, "Algorithm 849: a concise sparse Cholesky factorization package" (2005), the up-looking method;
Vanderbei, "Symmetric quasi-definite matrices" (1995).
"""

from __future__ import annotations

import numpy as np

from hsbackend._parallel import inline_kernel


@inline_kernel
def row_patterns(k_ptr, k_row, parent, w_ptr, w_col):
    """Fill ``w_col`` with the columns of every row of L, in the order in which the factorisation visits them."""
    size = parent.shape[0]
    mark = np.full(size, -1, dtype=np.int64)
    path = np.empty(size, dtype=np.int64)
    for k in range(size):
        mark[k] = k
        place = w_ptr[k + 1]
        for p in range(k_ptr[k], k_ptr[k + 1]):
            i, length = k_row[p], 0
            while mark[i] != k:
                path[length] = i
                mark[i] = k
                length += 1
                i = parent[i]
            while length > 0:
                length -= 1
                place -= 1
                w_col[place] = path[length]


@inline_kernel
def elimination_tree(k_ptr, k_row, parent, by_column, by_row):
    """Set the elimination tree and the number of entries of L, diagonal left out, in every column and every row."""
    size = parent.shape[0]
    mark = np.full(size, -1, dtype=np.int64)
    for k in range(size):
        parent[k] = -1
        by_column[k] = by_row[k] = 0
        mark[k] = k
        for p in range(k_ptr[k], k_ptr[k + 1]):
            i = k_row[p]
            while mark[i] != k:
                if parent[i] == -1:
                    parent[i] = k
                by_column[i] += 1
                by_row[k] += 1
                mark[i] = k
                i = parent[i]


@inline_kernel
def factorise(k_ptr, k_row, k, l_ptr, l_row, w_ptr, w_col, sign, least, lower, pivots, work, filled):
    """Factor; a pivot below ``least`` or of the wrong sign becomes ``least`` with the right one.

    Returns:
        The number of pivots replaced.
    """
    size, replaced = sign.shape[0], 0
    for j in range(size):
        work[j] = 0.0
        filled[j] = l_ptr[j]
    for j in range(size):
        for p in range(k_ptr[j], k_ptr[j + 1]):
            work[k_row[p]] += k[p]
        pivot = work[j]
        work[j] = 0.0
        for q in range(w_ptr[j], w_ptr[j + 1]):
            i = w_col[q]
            value = work[i]
            work[i] = 0.0
            end = filled[i]
            for p in range(l_ptr[i], end):
                work[l_row[p]] -= lower[p] * value
            entry = value / pivots[i]
            pivot -= entry * value
            lower[end] = entry
            filled[i] = end + 1
        if not pivot * sign[j] > least:
            pivot = least * sign[j]
            replaced += 1
        pivots[j] = pivot
    return replaced


@inline_kernel
def substitute(l_ptr, l_row, lower, pivots, x):
    """Solve ``L D L' x = right-hand side`` in place."""
    size = pivots.shape[0]
    for j in range(size):
        value = x[j]
        if value != 0.0:
            for p in range(l_ptr[j], l_ptr[j + 1]):
                x[l_row[p]] -= lower[p] * value
    for back in range(size):
        j = size - 1 - back
        value = x[j] / pivots[j]
        for p in range(l_ptr[j], l_ptr[j + 1]):
            value -= lower[p] * x[l_row[p]]
        x[j] = value
