# pyright: reportMissingParameterType=false
"""Compiled check of the KKT conditions of one sparse program against its data.

The measure of :mod:`hsbackend.solvers._verify_kernels`, with rows and columns by their entries.
"""

from __future__ import annotations

import numpy as np

from hsbackend._parallel import compile_kernel, inline_kernel

#: As in ``_verify_kernels``, whose values these must be (a test compares the two).
GLOBAL, LIMITS, LEAST = 1e-2, 1e-5, 1e-10


@inline_kernel
def _units(curvature, indptr, indices, value, units):
    flat = 0
    n, m = units.shape[0], indptr.shape[0] - 1
    for j in range(n):
        units[j] = 1.0 / np.sqrt(curvature[j]) if curvature[j] > 0.0 else 0.0
        flat += units[j] == 0.0
    if flat == 0:
        return
    column = np.zeros(n)
    for i in range(m):
        size, plain = 0.0, 0.0
        for e in range(indptr[i], indptr[i + 1]):
            size = max(size, abs(value[e]) * units[indices[e]])
            plain = max(plain, abs(value[e]))
        size = size if size > 0.0 else plain
        if size > 0.0:
            for e in range(indptr[i], indptr[i + 1]):
                column[indices[e]] = max(column[indices[e]], abs(value[e]) / size)
    for j in range(n):
        if units[j] == 0.0:
            units[j] = 1.0 / column[j] if column[j] > 0.0 else 1.0


@compile_kernel
def kkt_residual(
    h_ptr, h_index, h_value, curvature, indptr, indices, value, n_eq, linear, rhs, lower, upper, x, nu, bounds
):
    """Return the largest relative violation of the KKT conditions, NaN where something is not finite."""
    n, m = x.shape[0], nu.shape[0]
    D, residual, terms = np.empty(n), np.empty(n), np.empty(n)
    gap, size = np.empty(m), np.empty(m)
    _units(curvature, indptr, indices, value, D)
    # Sizes of the point, the curvature and the limits, in balanced units and in those of the data.
    reach, curved, largest, stiffness, away = LEAST, 0.0, LEAST, 0.0, 0.0
    for j in range(n):
        reach = max(reach, abs(x[j]) / D[j])
        largest = max(largest, abs(x[j]))
        total, product = 0.0, 0.0
        for e in range(h_ptr[j], h_ptr[j + 1]):
            term = h_value[e] * x[h_index[e]]
            product += term
            total += abs(term)
        residual[j] = product - linear[j] + bounds[j]
        terms[j] = total + abs(linear[j]) + abs(bounds[j])
        curved, stiffness = max(curved, curvature[j] * D[j] * D[j]), max(stiffness, curvature[j])
        for limit in (lower[j], upper[j]):
            if abs(limit) < 1e300:
                reach = max(reach, LIMITS * abs(limit) / D[j])
                away = max(away, abs(limit))
    if curved > 0.0:
        for j in range(n):
            reach = max(reach, LIMITS * abs(linear[j]) * D[j] / curved)
            away = max(away, abs(linear[j]) / stiffness)
    for i in range(m):
        product, total, length, plain = 0.0, 0.0, 0.0, 0.0
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            term = value[e] * x[j]
            product += term
            total += abs(term)
            length = max(length, abs(value[e]) * D[j])
            plain = max(plain, abs(value[e]))
            if nu[i] != 0.0:
                residual[j] += nu[i] * value[e]
                terms[j] += abs(nu[i] * value[e])
        gap[i] = product - rhs[i]
        limit = abs(rhs[i]) if abs(rhs[i]) < 1e300 else 0.0
        size[i] = total + limit
        if length > 0.0:
            reach = max(reach, LIMITS * limit / length)
            away = max(away, limit / plain)
    largest = max(largest, LIMITS * away)
    force, plain_force = max(curved * reach, LEAST), max(stiffness * LIMITS * away, LEAST)
    for j in range(n):
        force = max(force, terms[j] * D[j])
        plain_force = max(plain_force, terms[j])
    found = 0.0
    for j in range(n):
        terms[j] += GLOBAL * min(force / D[j], plain_force)
        if not np.isfinite(residual[j]) or not np.isfinite(x[j]):
            return np.nan
        if residual[j] != 0.0:
            found = max(found, abs(residual[j]) / terms[j])
    for i in range(m):
        if np.isnan(gap[i]) or not np.isfinite(nu[i]):
            return np.nan
        if i >= n_eq and gap[i] <= 0.0 and nu[i] == 0.0:
            continue
        length, plain = 0.0, 0.0
        for e in range(indptr[i], indptr[i + 1]):
            length = max(length, abs(value[e]) * D[indices[e]])
            plain = max(plain, abs(value[e]))
        scale = size[i] + GLOBAL * min(reach * length, largest * plain)
        relative = abs(gap[i]) / scale if gap[i] != 0.0 else 0.0
        if i >= n_eq and (nu[i] < 0.0 or gap[i] < 0.0):
            pull = 0.0
            for e in range(indptr[i], indptr[i + 1]):
                if value[e] != 0.0:
                    pull = max(pull, abs(nu[i] * value[e]) / terms[indices[e]])
            if nu[i] < 0.0:
                found = max(found, pull)
                relative = relative if gap[i] > 0.0 else 0.0
            else:
                relative = min(relative, pull)
        found = max(found, relative)
    for j in range(n):
        pull = abs(bounds[j]) / terms[j] if bounds[j] != 0.0 else 0.0
        above, below = x[j] - upper[j], lower[j] - x[j]
        distance = above if bounds[j] > 0.0 else (below if bounds[j] < 0.0 else 0.0)
        violated = above > 0.0 or below > 0.0
        if violated:
            distance = max(above, below)
        if np.isinf(distance):  # a multiplier of a limit that is not there
            found = max(found, pull)
        elif distance != 0.0:
            floor = GLOBAL * min(reach * D[j], largest)
            relative = abs(distance) / (abs(x[j]) + abs(x[j]) + abs(distance) + floor)
            found = max(found, relative if violated else min(relative, pull))
    return found


@compile_kernel
def factor_entries(indptr, indices, most):
    """Return the number of entries of the Cholesky factor of a symmetric pattern in its own order, or ``most + 1``.

    ``indptr``, ``indices`` hold both triangles. Rows of the factor are walked through the elimination tree, so that
    the cost is the number of entries.
    """
    size = indptr.shape[0] - 1
    parent, mark = np.full(size, -1, dtype=np.int64), np.full(size, -1, dtype=np.int64)
    total = size
    for k in range(size):
        mark[k] = k
        for e in range(indptr[k], indptr[k + 1]):
            i = indices[e]
            if i >= k:
                continue
            while mark[i] != k:
                if parent[i] == -1:
                    parent[i] = k
                mark[i] = k
                total += 1
                i = parent[i]
        if total > most:
            return most + 1
    return total
