"""Compiled check of the KKT conditions against the data."""

from __future__ import annotations

from hsbackend._blas import axpy, dot
from hsbackend._parallel import compile_kernel, inline_kernel


@inline_kernel
def natural(gap, multiplier):
    """Violation of ``gap <= 0, multiplier >= 0, gap * multiplier = 0``: the gap, or the multiplier where it is smaller.

    A multiplier that is zero up to rounding must not turn an inactive row into a violated one.
    """
    if gap > 0.0:
        return gap
    return max(gap, -multiplier) if multiplier > 0.0 else 0.0


@compile_kernel
def kkt_residuals(
    start, stop, step, hessian, diagonal, linear, rows, rhs, n_eq, bounded, lower, upper, primal, row_multipliers,
    bound_multipliers, stationarity, violation, outside, worst,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Set the signed residuals of every item and ``worst``, the largest relative one.

    ``hessian`` (1 or B, n, n), or (1 or B, 1, n) for a diagonal. Stationarity is relative to the linear term,
    violations to the point and the limit, wrong signs of multipliers to the linear term.
    """
    n = primal.shape[1]
    m = rhs.shape[1]
    varying_h = 0 if hessian.shape[0] == 1 else 1
    varying = 0 if rows.shape[0] == 1 else 1
    for b in range(start, stop, step):
        x = primal[b]
        residual = stationarity[b]
        matrix = hessian[b * varying_h]
        normals = rows[b * varying]
        size_dual = 1.0
        size_primal = 1.0
        for j in range(n):
            size_dual = max(size_dual, 1.0 + abs(linear[b, j]))
            size_primal = max(size_primal, 1.0 + abs(x[j]))
            value = matrix[0, j] * x[j] if diagonal else dot(matrix[j], x, n)
            residual[j] = value - linear[b, j]
        largest = 0.0
        for i in range(m):
            gap = dot(normals[i], x, n) - rhs[b, i]
            nu = row_multipliers[b, i]
            if nu != 0.0:
                axpy(nu, normals[i], residual, n)
            if i >= n_eq:
                gap = natural(gap, nu)
                largest = max(largest, -nu / size_dual)
            violation[b, i] = gap
            limit = abs(rhs[b, i]) if abs(rhs[b, i]) < 1e300 else 0.0
            largest = max(largest, abs(gap) / (size_primal + limit))
        for i in range(bounded.shape[0]):
            j = bounded[i]
            mu = bound_multipliers[b, i]
            residual[j] += mu
            outside[b, i] = natural(x[j] - upper[b, i], mu) - natural(lower[b, i] - x[j], -mu)
            largest = max(largest, abs(outside[b, i]) / size_primal)
        for j in range(n):
            largest = max(largest, abs(residual[j]) / size_dual)
            if residual[j] != residual[j]:
                largest = residual[j]  # NaN must not pass as small
                break
        worst[b] = largest
