# pyright: reportMissingParameterType=false
"""Compiled check of the KKT conditions against the data."""

from __future__ import annotations

import numpy as np

from hsbackend._blas import axpy
from hsbackend._parallel import compile_kernel, inline_kernel

#: A residual is compared with its own terms and with this fraction of the largest ones, in balanced units.
GLOBAL = 1e-2
#: Limits, and the optimum without them, count as a size of the point to this extent: they may be far away.
LIMITS = 1e-5
#: Size of a point, and of a force, where the data know none: a solution zero may be zero up to rounding.
LEAST = 1e-10


@inline_kernel
def _units(H, diagonal, N, units):
    """Set units of the variables in which the columns are comparable.

    ``1 / sqrt(H_jj)``, and where there is no curvature the inverse of the largest entry of the column in rows that are
    balanced by their other entries.
    """
    n, m = units.shape[0], N.shape[0]
    flat = 0
    for j in range(n):
        curvature = H[0, j] if diagonal else H[j, j]
        units[j] = 1.0 / np.sqrt(curvature) if curvature > 0.0 else 0.0
        flat += units[j] == 0.0
    if flat == 0:
        return
    column = np.zeros(n)
    for i in range(m):
        row = N[i]
        size, plain = 0.0, 0.0
        for j in range(n):
            size = max(size, abs(row[j]) * units[j])
            plain = max(plain, abs(row[j]))
        size = size if size > 0.0 else plain
        if size > 0.0:
            for j in range(n):
                column[j] = max(column[j], abs(row[j]) / size)
    for j in range(n):
        if units[j] == 0.0:
            units[j] = 1.0 / column[j] if column[j] > 0.0 else 1.0


@compile_kernel
def kkt_residuals(
    start, stop, step, hessian, diagonal, linear, rows, rhs, n_eq, bounded, lower, upper, primal, row_multipliers,
    bound_multipliers, stationarity, gaps, worst,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Set stationarity and the gaps ``N x - h`` of every item, and ``worst``, the largest relative residual.

    ``hessian`` (1 or B, n, n), or (1 or B, 1, n) for a diagonal. Every component is compared with the sum of the
    magnitudes of its own terms, plus 1e-2 of the largest such sum, in balanced units or in those of the data, whichever
    is less: of stationarity
    ``|a_j| + sum |H_jl x_l| + sum |N_ij w_i|``, of a row ``|h_i| + sum |N_ij x_j|``. A multiplier is measured by what
    it contributes to stationarity. Of the slack and the multiplier of an inequality the smaller one counts.
    """
    n = primal.shape[1]
    m = rhs.shape[1]
    varying_h = 0 if hessian.shape[0] == 1 else 1
    varying = 0 if rows.shape[0] == 1 else 1
    D, terms, size = np.empty(n), np.empty(n), np.empty(m)
    for b in range(start, stop, step):
        x = primal[b]
        residual = stationarity[b]
        matrix = hessian[b * varying_h]
        normals = rows[b * varying]
        _units(matrix, diagonal, normals, D)
        # Sizes of the point, the curvature and the limits, in balanced units and in those of the data.
        reach, curvature, largest, stiffness, away = LEAST, 0.0, LEAST, 0.0, 0.0
        for j in range(n):
            reach = max(reach, abs(x[j]) / D[j])
            largest = max(largest, abs(x[j]))
            stiff = matrix[0, j] if diagonal else matrix[j, j]
            curvature, stiffness = max(curvature, stiff * D[j] * D[j]), max(stiffness, stiff)
            if diagonal:
                residual[j] = matrix[0, j] * x[j]
                terms[j] = abs(residual[j])
            else:
                row = matrix[j]
                value, total = 0.0, 0.0
                for l in range(n):
                    value += row[l] * x[l]
                    total += abs(row[l] * x[l])
                residual[j], terms[j] = value, total
            residual[j] -= linear[b, j]
            terms[j] += abs(linear[b, j])
        for j in range(n):
            if curvature > 0.0:
                reach = max(reach, LIMITS * abs(linear[b, j]) * D[j] / curvature)
                away = max(away, abs(linear[b, j]) / stiffness)
        for i in range(m):
            row = normals[i]
            value, total, length, plain = 0.0, 0.0, 0.0, 0.0
            for j in range(n):
                value += row[j] * x[j]
                total += abs(row[j] * x[j])
                length = max(length, abs(row[j]) * D[j])
                plain = max(plain, abs(row[j]))
            nu = row_multipliers[b, i]
            if nu != 0.0:
                axpy(nu, row, residual, n)
                for j in range(n):
                    terms[j] += abs(nu * row[j])
            gaps[b, i] = value - rhs[b, i]
            limit = abs(rhs[b, i]) if abs(rhs[b, i]) < 1e300 else 0.0
            size[i] = total + limit
            if length > 0.0:
                reach = max(reach, LIMITS * limit / length)
                away = max(away, limit / plain)
        for i in range(bounded.shape[0]):
            j = bounded[i]
            residual[j] += bound_multipliers[b, i]
            terms[j] += abs(bound_multipliers[b, i])
            for limit in (lower[b, i], upper[b, i]):
                if abs(limit) < 1e300:
                    reach = max(reach, LIMITS * abs(limit) / D[j])
                    away = max(away, abs(limit))
        largest = max(largest, LIMITS * away)
        force, plain_force = max(curvature * reach, LEAST), max(stiffness * LIMITS * away, LEAST)
        for j in range(n):
            force = max(force, terms[j] * D[j])
            plain_force = max(plain_force, terms[j])
        found = 0.0
        invalid = False
        for j in range(n):
            terms[j] += GLOBAL * min(force / D[j], plain_force)
            if not np.isfinite(residual[j]):
                invalid = True
            elif residual[j] != 0.0:
                found = max(found, abs(residual[j]) / terms[j])
        for i in range(m):
            row = normals[i]
            nu, gap = row_multipliers[b, i], gaps[b, i]
            if i >= n_eq and gap <= 0.0 and nu == 0.0:
                continue
            length, plain = 0.0, 0.0
            for j in range(n):
                length = max(length, abs(row[j]) * D[j])
                plain = max(plain, abs(row[j]))
            scale = size[i] + GLOBAL * min(reach * length, largest * plain)
            relative = abs(gap) / scale if gap != 0.0 else 0.0
            if i >= n_eq and (nu < 0.0 or gap < 0.0):
                pull = 0.0
                for j in range(n):
                    if row[j] != 0.0:
                        pull = max(pull, abs(nu * row[j]) / terms[j])
                if nu < 0.0:
                    found = max(found, pull)
                    relative = relative if gap > 0.0 else 0.0
                else:
                    relative = min(relative, pull)
            found = max(found, relative)
        for i in range(bounded.shape[0]):
            j = bounded[i]
            mu = bound_multipliers[b, i]
            pull = abs(mu) / terms[j] if mu != 0.0 else 0.0
            above, below = x[j] - upper[b, i], lower[b, i] - x[j]
            gap = above if mu > 0.0 else (below if mu < 0.0 else 0.0)  # zero where the multiplier says it should be
            violated = above > 0.0 or below > 0.0
            if violated:
                gap = max(above, below)
            if gap != 0.0:
                floor = GLOBAL * min(reach * D[j], largest)
                relative = abs(gap) / (abs(x[j]) + abs(x[j]) + abs(gap) + floor)
                found = max(found, relative if violated else min(relative, pull))
        worst[b] = np.nan if invalid else found  # NaN must not pass as small
