"""Compiled dual semismooth Newton method for a diagonal Hessian with bounds: one batch of items.

With the bounds kept in the primal, ``x(mu) = clip((a - N'mu) / h, l, u)`` and the dual function

    g(mu) = sum_j (1/2 h_j x_j^2 - a_j x_j) + mu'(N x - b),       gradient r = N x - b,

is concave and piecewise quadratic; it is maximised over ``mu_i >= 0`` on the inequality rows. Its generalised Hessian
is ``-N F H^-1 N'`` with F the mask of variables strictly between their bounds.

Source: Li, Sun and Toh, "On the efficient computation of a generalized Jacobian of the projector over the Birkhoff
polytope" (2020) for the method; the choice of working rows, the proximal term and the line search were measured on
portfolio, simplex and Birkhoff problems (docs/performance.md).
"""

from __future__ import annotations

import numpy as np

from hsbackend._blas import dot
from hsbackend._parallel import compile_kernel, inline_kernel
from hsbackend.status import Status

_SOLVED = int(Status.SOLVED)
_INVALID = int(Status.INVALID_INPUT)
_NOT_CONVERGED = int(Status.NOT_CONVERGED)

#: A pivot below this fraction of its diagonal means a row that depends on earlier ones on the free variables.
_DEPENDENT = 1e-11


@inline_kernel
def _primal(columns, row_index, value, scale, h, a, low, high, mu, x):
    """Set ``x(mu)``; rows are scaled by ``scale``."""
    for j in range(x.shape[0]):
        t = a[j]
        for e in range(columns[j], columns[j + 1]):
            t -= value[e] * scale[row_index[e]] * mu[row_index[e]]
        t /= h[j]
        x[j] = min(max(t, low[j]), high[j])


@inline_kernel
def _residual(columns, row_index, value, scale, b, x, r):
    """Set ``r = S (N x - b)``, S the row scaling."""
    for i in range(r.shape[0]):
        r[i] = -b[i]
    for j in range(x.shape[0]):
        for e in range(columns[j], columns[j + 1]):
            r[row_index[e]] += value[e] * x[j]
    for i in range(r.shape[0]):
        r[i] *= scale[i]


@inline_kernel
def _dual_value(h, a, x, mu, r):
    total = 0.0
    for j in range(x.shape[0]):
        total += (0.5 * h[j] * x[j] - a[j]) * x[j]
    for i in range(mu.shape[0]):
        total += mu[i] * r[i]
    return total


@inline_kernel
def _assemble(columns, row_index, value, scale, h, free, schur):
    """Lower triangle of ``S N F H^-1 N' S``."""
    m = schur.shape[0]
    for i in range(m):
        for k in range(i + 1):
            schur[i, k] = 0.0
    for j in range(h.shape[0]):
        if free[j]:
            inverse = 1.0 / h[j]
            for e in range(columns[j], columns[j + 1]):
                i = row_index[e]
                v = value[e] * scale[i] * inverse
                for f in range(columns[j], e + 1):
                    k = row_index[f]
                    schur[i, k] += v * value[f] * scale[k]


@inline_kernel
def _cholesky(schur, wanted, ridge, order, factor):
    """Factor the wanted rows, leaving out those that depend on earlier ones; return how many are in ``order``."""
    m = schur.shape[0]
    k = 0
    for i in range(m):
        if not wanted[i]:
            continue
        row = factor[k]
        for j in range(k):
            row[j] = (schur[i, order[j]] - dot(row, factor[j], j)) / factor[j, j]
        pivot = schur[i, i] + ridge - dot(row, row, k)
        if pivot > _DEPENDENT * schur[i, i] and schur[i, i] > 0.0:
            row[k] = np.sqrt(pivot)
            order[k] = i
            k += 1
    return k


@inline_kernel
def _solve_factored(factor, k, t):
    for i in range(k):
        t[i] = (t[i] - dot(factor[i], t, i)) / factor[i, i]
    for i in range(k - 1, -1, -1):
        t[i] /= factor[i, i]
        for j in range(i):
            t[j] -= t[i] * factor[i, j]


@inline_kernel
def _optimality(mu, r, n_eq):
    """Natural residual: |r| on equalities, |min(mu, -r)| on inequalities."""
    worst = 0.0
    for i in range(mu.shape[0]):
        worst = max(worst, abs(r[i]) if i < n_eq else abs(min(mu[i], -r[i])))
    return worst


@compile_kernel
def newton_items(
    start, stop, step, columns, row_index, entries, hessian, linear, rhs, lower, upper, n_eq, tolerance, max_steps,
    support, active_tolerance, keep, primal, multipliers, status, steps, free_mask, side_rows, side, order, count,
    offset,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Solve items; return the flat storage of the Cholesky factors of this worker's faces.

    ``lower``, ``upper`` are (B, n) with infinities; ``side`` (B, n) gets 1 at the upper, -1 at the lower bound;
    ``multipliers`` holds the first guess.
    """
    n = linear.shape[1]
    m = rhs.shape[1]
    varying = 0 if entries.shape[0] == 1 else 1
    varying_h = 0 if hessian.shape[0] == 1 else 1
    mu = np.empty(m)
    trial = np.empty(m)
    r = np.empty(m)
    r_trial = np.empty(m)
    x_trial = np.empty(n)
    scale = np.empty(m)
    ones = np.ones(m)
    t = np.empty(m)
    direction = np.empty(m)
    wanted = np.empty(m, dtype=np.bool_)
    free = np.empty(n, dtype=np.bool_)
    was_free = np.empty(n, dtype=np.bool_)
    was_wanted = np.empty(m, dtype=np.bool_)
    schur = np.empty((m, m))
    factor = np.empty((m, m))
    rows = np.empty(m, dtype=np.int64)
    store = np.empty(1024)
    used = 0
    for b in range(start, stop, step):
        count[b] = 0
        value = entries[b * varying]
        h = hessian[b * varying_h]
        a = linear[b]
        low = lower[b]
        high = upper[b]
        x = primal[b]
        bad = False
        hopeless = False
        for j in range(n):
            if not np.isfinite(a[j]) or np.isnan(low[j]) or np.isnan(high[j]) or not np.isfinite(h[j]):
                bad = True
            elif not low[j] <= high[j] or not h[j] > 0.0 or low[j] == np.inf or high[j] == -np.inf:
                hopeless = True  # the active set says what is wrong
            was_free[j] = False
        for i in range(m):
            scale[i] = 0.0
            mu[i] = 0.0
            was_wanted[i] = False
            if np.isnan(rhs[b, i]):
                bad = True
            elif np.isinf(rhs[b, i]):
                hopeless = True
        for e in range(row_index.shape[0]):
            scale[row_index[e]] += value[e] * value[e]
        for i in range(m):
            if np.isnan(scale[i]):
                bad = True
            elif scale[i] == 0.0 or np.isinf(scale[i]):
                hopeless = True
            else:
                scale[i] = 1.0 / np.sqrt(scale[i])
        if bad or hopeless:
            status[b] = _INVALID if bad else _NOT_CONVERGED
            continue
        size = 1.0
        for i in range(m):
            size = max(size, abs(rhs[b, i]) * scale[i])
            guess = multipliers[b, i] / scale[i]
            mu[i] = guess if i < n_eq else max(guess, 0.0)

        outcome = _NOT_CONVERGED
        _primal(columns, row_index, value, scale, h, a, low, high, mu, x)
        _residual(columns, row_index, value, scale, rhs[b], x, r)
        taken = 0
        for _step in range(max_steps):
            taken += 1
            gap = _optimality(mu, r, n_eq)
            norm = 0.0
            for i in range(m):
                if i < n_eq or r[i] > 0.0 or mu[i] > 0.0:
                    norm = max(norm, abs(r[i]))
            same = True
            for j in range(n):
                free[j] = low[j] < x[j] < high[j]
                same = same and free[j] == was_free[j]
                was_free[j] = free[j]
            _assemble(columns, row_index, value, scale, h, free, schur)
            largest = 0.0
            for i in range(m):
                largest = max(largest, schur[i, i])

            # Finite termination: with the right sets one undamped step is exact.
            for i in range(m):
                wanted[i] = i < n_eq or mu[i] + r[i] > 0.0
                same = same and wanted[i] == was_wanted[i]
                was_wanted[i] = wanted[i]
            if same or gap <= 1e-6 * size:
                k = _cholesky(schur, wanted, 0.0, rows, factor)
                for i in range(m):
                    trial[i] = mu[i] if wanted[i] else 0.0
                _primal(columns, row_index, value, scale, h, a, low, high, trial, x_trial)
                _residual(columns, row_index, value, scale, rhs[b], x_trial, r_trial)
                for _refine in range(3):
                    for i in range(k):
                        t[i] = r_trial[rows[i]]
                    _solve_factored(factor, k, t)
                    for i in range(k):
                        trial[rows[i]] += t[i]
                    _primal(columns, row_index, value, scale, h, a, low, high, trial, x_trial)
                    _residual(columns, row_index, value, scale, rhs[b], x_trial, r_trial)
                    if _optimality(trial, r_trial, n_eq) <= 4e-16 * size:
                        break
                largest_mu = 0.0
                smallest_mu = 0.0
                for i in range(m):
                    largest_mu = max(largest_mu, abs(trial[i]))
                    if i >= n_eq:
                        smallest_mu = min(smallest_mu, trial[i])
                if smallest_mu >= -tolerance * (1.0 + largest_mu):
                    for i in range(n_eq, m):
                        trial[i] = max(trial[i], 0.0)
                    worst = 0.0
                    for i in range(m):
                        worst = max(worst, abs(r_trial[i]) if wanted[i] else max(r_trial[i], 0.0))
                    if worst <= tolerance * size:
                        for i in range(m):
                            mu[i] = trial[i]
                            r[i] = r_trial[i]
                        for j in range(n):
                            x[j] = x_trial[j]
                        outcome = _SOLVED
                        break

            # Working rows: those just above zero with slack move by a projected gradient step instead.
            margin = min(1e-3, norm)
            for i in range(m):
                wanted[i] = i < n_eq or mu[i] > margin or r[i] > 0.0
            ridge = 1e-10 * largest + 1e-4 * min(1.0, norm) * largest
            if largest == 0.0:
                ridge = 1.0
            for i in range(m):
                direction[i] = r[i] if not wanted[i] else 0.0
            for i in range(m):
                schur[i, i] += ridge
            k = _cholesky(schur, wanted, 0.0, rows, factor)
            for i in range(k):
                t[i] = r[rows[i]]
            _solve_factored(factor, k, t)
            for i in range(k):
                direction[rows[i]] = t[i]
            current = _dual_value(h, a, x, mu, r)
            length = 1.0
            for _search in range(40):
                predicted = 0.0
                for i in range(m):
                    trial[i] = mu[i] + length * direction[i]
                    if i >= n_eq:
                        trial[i] = max(trial[i], 0.0)
                    predicted += r[i] * (trial[i] - mu[i])
                _primal(columns, row_index, value, scale, h, a, low, high, trial, x_trial)
                _residual(columns, row_index, value, scale, rhs[b], x_trial, r_trial)
                reached = _dual_value(h, a, x_trial, trial, r_trial)
                if reached >= current + 1e-4 * predicted - 1e-14 * abs(current):
                    break
                length *= 0.5
            for i in range(m):
                mu[i] = trial[i]
                r[i] = r_trial[i]
            for j in range(n):
                x[j] = x_trial[j]
        steps[b] = taken
        status[b] = outcome
        if outcome != _SOLVED:
            continue
        for i in range(m):
            multipliers[b, i] = mu[i] * scale[i]
        if not keep:
            continue

        # The index set K of the HS-Jacobian.
        for j in range(n):
            side[b, j] = 0
            if support:
                z = a[j] - h[j] * x[j]
                for e in range(columns[j], columns[j + 1]):
                    z -= value[e] * multipliers[b, row_index[e]]
                if x[j] == high[j] and z > active_tolerance * (1.0 + abs(a[j])):
                    side[b, j] = 1
                elif x[j] == low[j] and z < -active_tolerance * (1.0 + abs(a[j])):
                    side[b, j] = -1
                elif low[j] == high[j]:
                    side[b, j] = 1
            elif high[j] < np.inf and high[j] - x[j] <= active_tolerance * (1.0 + abs(high[j])):
                side[b, j] = 1
            elif low[j] > -np.inf and x[j] - low[j] <= active_tolerance * (1.0 + abs(low[j])):
                side[b, j] = -1
            free_mask[b, j] = side[b, j] == 0
        largest_mu = 0.0
        for i in range(m):
            largest_mu = max(largest_mu, abs(mu[i]))
        for i in range(m):
            if i < n_eq:
                wanted[i] = True
            elif support:
                wanted[i] = mu[i] > active_tolerance * (1.0 + largest_mu)
            else:
                wanted[i] = r[i] >= -active_tolerance * size
            side_rows[b, i] = 1 if wanted[i] else 0
        _assemble(columns, row_index, value, ones, h, free_mask[b], schur)
        k = _cholesky(schur, wanted, 0.0, rows, factor)
        if used + k * k > store.shape[0]:
            larger = np.empty(2 * store.shape[0] + k * k)
            larger[:used] = store[:used]
            store = larger
        offset[b] = used
        for i in range(k):
            order[b, i] = rows[i]
            for j in range(k):
                store[used + j] = factor[i, j] if j <= i else 0.0
            used += k
        count[b] = k
    return store[:used].copy()
