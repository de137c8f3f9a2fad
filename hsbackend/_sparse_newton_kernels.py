# pyright: reportMissingParameterType=false
"""Compiled dual semismooth Newton method for one sparse program with a positive diagonal Hessian.

With the bounds kept in the primal, ``x(mu) = clip((a - N'mu) / h, l, u)`` and the dual function

    g(mu) = sum_j (1/2 h_j x_j^2 - a_j x_j) + mu'(N x - b),       gradient r = N x - b,

is maximised over ``mu_i >= 0`` on the inequality rows by proximal steps: ``g(mu) - rho/2 |mu - c|^2`` is maximised by
Newton steps until that is nearly done, then c follows and rho falls. A Newton step solves
``(N_W F H^-1 N_W' + rho) d = r_W``, F the mask of variables strictly between their bounds and W the working rows, by
conjugate gradients on the rows and columns that are left: memory O(nnz), and a step costs products with them. Rows
arrive scaled to a unit diagonal of ``N H^-1 N'``.

Source: Li, Sun and Toh, "On the efficient computation of a generalized Jacobian of the projector over the Birkhoff
polytope" (2020); the choice of working rows is that of :mod:`hsbackend.solvers._newton_kernels`.
"""

from __future__ import annotations

import numpy as np

from hsbackend._parallel import compile_kernel, inline_kernel


@inline_kernel
def primal_of(indptr, indices, value, h, a, b, low, high, mu, x):
    """Set ``x(mu)``; return the dual function, ``min_x 1/2 x'Hx - (a - N'mu)'x - mu'b`` over the box."""
    for j in range(x.shape[0]):
        x[j] = a[j]
    for i in range(mu.shape[0]):
        w = mu[i]
        if w != 0.0:
            for e in range(indptr[i], indptr[i + 1]):
                x[indices[e]] -= value[e] * w
    total = 0.0
    for j in range(x.shape[0]):
        t = x[j]
        x[j] = min(max(t / h[j], low[j]), high[j])
        total += (0.5 * h[j] * x[j] - t) * x[j]
    for i in range(mu.shape[0]):
        total -= mu[i] * b[i]
    return total


@inline_kernel
def residual_of(indptr, indices, value, b, x, r):
    """Set ``r = N x - b``."""
    for i in range(r.shape[0]):
        total = 0.0
        for e in range(indptr[i], indptr[i + 1]):
            total += value[e] * x[indices[e]]
        r[i] = total - b[i]


@inline_kernel
def _optimality(mu, r, n_eq):
    worst = 0.0
    for i in range(mu.shape[0]):
        worst = max(worst, abs(r[i]) if i < n_eq else abs(min(mu[i], -r[i])))
    return worst


@inline_kernel
def compress(indptr, indices, value, h, wanted, free, place, out_ptr, out_index, out_value, rows, diagonal):
    """Copy the wanted rows and free columns, divided by ``sqrt(h)``; return how many rows and columns there are.

    ``rows`` gets the numbers of the rows that have an entry left, ``diagonal`` their squared lengths; ``place`` (n,) is
    scratch.
    """
    columns = 0
    for j in range(free.shape[0]):
        place[j] = -1
        if free[j]:
            place[j] = columns
            columns += 1
    k = 0
    used = 0
    out_ptr[0] = 0
    for i in range(wanted.shape[0]):
        if not wanted[i]:
            continue
        total = 0.0
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            if place[j] >= 0:
                v = value[e] / np.sqrt(h[j])
                out_index[used] = place[j]
                out_value[used] = v
                total += v * v
                used += 1
        if total > 0.0:
            rows[k] = i
            diagonal[k] = total
            k += 1
            out_ptr[k] = used
        else:
            used = out_ptr[k]
    return k, columns


@inline_kernel
def conjugate_gradients(ptr, index, value, k, columns, diagonal, ridge, rhs, d, tolerance, max_steps, work, t):
    """Solve ``(C C' + ridge) d = rhs`` with Jacobi preconditioning; return steps.

    Ends where the residual, in units of the diagonal, has fallen by ``tolerance``, or where rounding stops it. Start is
    zero, so that d is in the range of a singular matrix. ``work`` (3, >= k), ``t`` (>= columns).
    """
    res, p, best = work[0], work[1], work[2]
    rho = 0.0
    for i in range(k):
        d[i] = 0.0
        best[i] = 0.0
        res[i] = rhs[i]
        z = res[i] / (diagonal[i] + ridge)
        p[i] = z
        rho += z * res[i]
    goal = tolerance * tolerance * rho
    least = rho
    since = 0
    steps = 0
    if not rho > 0.0:
        return 0
    for _step in range(max_steps):
        for j in range(columns):
            t[j] = 0.0
        for i in range(k):
            w = p[i]
            for e in range(ptr[i], ptr[i + 1]):
                t[index[e]] += value[e] * w
        # p'(C C' + ridge) p, and the product itself in a second pass over the rows.
        curvature = 0.0
        for j in range(columns):
            curvature += t[j] * t[j]
        for i in range(k):
            curvature += ridge * p[i] * p[i]
        if not curvature > 0.0:
            break
        steps += 1
        alpha = rho / curvature
        new = 0.0
        for i in range(k):
            total = ridge * p[i]
            for e in range(ptr[i], ptr[i + 1]):
                total += value[e] * t[index[e]]
            d[i] += alpha * p[i]
            res[i] -= alpha * total
            new += res[i] * res[i] / (diagonal[i] + ridge)
        if not np.isfinite(new):
            break
        if new < least:
            least = new
            since = 0
            for i in range(k):
                best[i] = d[i]
        else:
            since += 1
        if new <= goal or since > 200:
            break
        beta = new / rho
        rho = new
        for i in range(k):
            p[i] = res[i] / (diagonal[i] + ridge) + beta * p[i]
    for i in range(k):
        d[i] = best[i]
    return steps


@compile_kernel
def newton(
    indptr, indices, value, h, a, b, low, high, n_eq, tolerance, max_steps, max_products, mu, x, r, drift, counts
):  # fmt: skip
    """Maximise the dual from ``mu``; return whether the natural residual fell below ``tolerance`` times the data.

    Sets ``mu``, ``x`` and ``r``, and ``drift`` (m,) to the last proximal step of the multipliers; ``counts`` (2,) gets
    Newton steps and products with ``N N'``.
    """
    m, n = r.shape[0], x.shape[0]
    trial, r_trial, x_trial = np.empty(m), np.empty(m), np.empty(n)
    best_mu, best_gap = mu.copy(), np.inf
    direction = np.empty(m)
    wanted, was_wanted = np.zeros(m, dtype=np.bool_), np.zeros(m, dtype=np.bool_)
    free, was_free = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
    place = np.empty(n, dtype=np.int64)
    ptr = np.empty(m + 1, dtype=np.int64)
    index, entries = np.empty(indices.shape[0], dtype=indices.dtype), np.empty(value.shape[0])
    rows, diagonal = np.empty(m, dtype=np.int64), np.empty(m)
    work, t, s, right = np.empty((3, m)), np.empty(n), np.empty(m), np.empty(m)
    size = 1e-10
    for i in range(m):
        size = max(size, abs(b[i]))
    current = primal_of(indptr, indices, value, h, a, b, low, high, mu, x)
    residual_of(indptr, indices, value, b, x, r)
    for i in range(m):
        total = 0.0
        for e in range(indptr[i], indptr[i + 1]):
            total += abs(value[e] * x[indices[e]])
        size = max(size, total)
    solved = False
    products = 0
    rho = 0.1
    centre, grad = mu.copy(), np.empty(m)
    for _step in range(max_steps):
        counts[0] = _step + 1
        gap = _optimality(mu, r, n_eq)
        if gap <= best_gap:
            best_gap = gap
            best_mu[:] = mu
        norm = 0.0
        for i in range(m):
            if i < n_eq or r[i] > 0.0 or mu[i] > 0.0:
                norm = max(norm, abs(r[i]))
        same = True
        for j in range(n):
            free[j] = low[j] < x[j] < high[j]
            same = same and free[j] == was_free[j]
            was_free[j] = free[j]
        # Finite termination: with the right sets one undamped step is exact.
        for i in range(m):
            wanted[i] = i < n_eq or mu[i] + r[i] > 0.0
            same = same and wanted[i] == was_wanted[i]
            was_wanted[i] = wanted[i]
        if same or gap <= 1e-5 * size:
            k, columns = compress(
                indptr, indices, value, h, wanted, free, place, ptr, index, entries, rows, diagonal
            )  # fmt: skip
            for i in range(m):
                trial[i] = mu[i] if wanted[i] else 0.0
            primal_of(indptr, indices, value, h, a, b, low, high, trial, x_trial)
            residual_of(indptr, indices, value, b, x_trial, r_trial)
            last = np.inf
            for _refine in range(4):
                for i in range(k):
                    right[i] = r_trial[rows[i]]
                products += conjugate_gradients(
                    ptr, index, entries, k, columns, diagonal, 0.0, right, s, 1e-9, max_products, work, t
                )
                for i in range(k):
                    trial[rows[i]] += s[i]
                primal_of(indptr, indices, value, h, a, b, low, high, trial, x_trial)
                residual_of(indptr, indices, value, b, x_trial, r_trial)
                worst = 0.0
                for i in range(m):
                    worst = max(worst, abs(r_trial[i]) if wanted[i] else max(r_trial[i], 0.0))
                if worst <= 1e-15 * size or not worst < 0.3 * last:
                    break
                last = worst
            largest_mu, smallest_mu = 0.0, 0.0
            for i in range(m):
                largest_mu = max(largest_mu, abs(trial[i]))
                if i >= n_eq:
                    smallest_mu = min(smallest_mu, trial[i])
            if smallest_mu >= -tolerance * largest_mu:
                for i in range(n_eq, m):
                    trial[i] = max(trial[i], 0.0)
                primal_of(indptr, indices, value, h, a, b, low, high, trial, x_trial)
                residual_of(indptr, indices, value, b, x_trial, r_trial)
                worst = 0.0
                for i in range(m):
                    worst = max(worst, abs(r_trial[i]) if wanted[i] else max(r_trial[i], 0.0))
                if worst <= tolerance * size:
                    mu[:] = trial
                    x[:] = x_trial
                    r[:] = r_trial
                    solved = True
                    break
        # One Newton step on the dual with the proximal term; the centre follows when the sub-problem is nearly solved.
        moved, inner, norm = 0.0, 0.0, 0.0
        for i in range(m):
            moved = max(moved, rho * abs(mu[i] - centre[i]))
            g = r[i] - rho * (mu[i] - centre[i])
            inner = max(inner, abs(g) if i < n_eq else abs(min(mu[i], -g)))
        if inner <= 0.3 * moved or inner <= tolerance * size:
            for i in range(m):
                drift[i] = mu[i] - centre[i]
            centre[:] = mu
            rho = max(rho * 0.3, 1e-8)
        for i in range(m):
            grad[i] = r[i] - rho * (mu[i] - centre[i])
            if i < n_eq or grad[i] > 0.0 or mu[i] > 0.0:
                norm = max(norm, abs(grad[i]))
        margin = min(1e-3, norm)
        for i in range(m):
            wanted[i] = i < n_eq or mu[i] > margin or grad[i] > 0.0
            direction[i] = grad[i] / (rho if wanted[i] else 1.0)
        k, columns = compress(indptr, indices, value, h, wanted, free, place, ptr, index, entries, rows, diagonal)
        for i in range(k):
            right[i] = grad[rows[i]]
        products += conjugate_gradients(
            ptr, index, entries, k, columns, diagonal, rho, right, s, max(1e-9, min(1e-2, norm / size)),
            max_products, work, t,
        )  # fmt: skip
        for i in range(k):
            direction[rows[i]] = s[i]
        before = current
        for i in range(m):
            before -= 0.5 * rho * (mu[i] - centre[i]) ** 2
        length = 1.0
        for _search in range(40):
            predicted = 0.0
            reached = 0.0
            for i in range(m):
                trial[i] = mu[i] + length * direction[i]
                if i >= n_eq:
                    trial[i] = max(trial[i], 0.0)
                predicted += grad[i] * (trial[i] - mu[i])
                reached -= 0.5 * rho * (trial[i] - centre[i]) ** 2
            current = primal_of(indptr, indices, value, h, a, b, low, high, trial, x_trial)
            reached += current
            if reached >= before + 1e-4 * predicted - 1e-14 * abs(before):
                break
            length *= 0.5
        mu[:] = trial
        x[:] = x_trial
        residual_of(indptr, indices, value, b, x, r)
        if products > 20 * max_products:
            break
    if not solved:
        mu[:] = best_mu
        primal_of(indptr, indices, value, h, a, b, low, high, mu, x)
        residual_of(indptr, indices, value, b, x, r)
    counts[1] = products
    return solved


@compile_kernel
def face_solve(
    indptr, indices, value, h, held, free, rhs_primal, rhs_rows, tolerance, max_products, u, w, counts
):  # fmt: skip
    """Solve ``H u + N'w = g`` on the free variables, ``N u = r`` on the held rows; return the residual left.

    ``u`` arrives with the values of the variables that are not free, ``w`` gets zero outside the held rows. The
    residual is relative, in units of the diagonal of ``N F H^-1 N'``; ``counts`` (1,) gets the products.
    """
    m, n = w.shape[0], u.shape[0]
    place = np.empty(n, dtype=np.int64)
    ptr = np.empty(m + 1, dtype=np.int64)
    index, entries = np.empty(indices.shape[0], dtype=indices.dtype), np.empty(value.shape[0])
    rows, diagonal = np.empty(m, dtype=np.int64), np.empty(m)
    work, t, s, right = np.empty((3, m)), np.empty(n), np.empty(m), np.empty(m)
    k, columns = compress(indptr, indices, value, h, held, free, place, ptr, index, entries, rows, diagonal)
    for i in range(m):
        w[i] = 0.0
    first, last = 0.0, np.inf
    for _refine in range(4):
        # u from w, then what the rows miss.
        for j in range(n):
            if free[j]:
                u[j] = rhs_primal[j]
        for i in range(m):
            if w[i] != 0.0:
                for e in range(indptr[i], indptr[i + 1]):
                    if free[indices[e]]:
                        u[indices[e]] -= value[e] * w[i]
        for j in range(n):
            if free[j]:
                u[j] /= h[j]
        error, terms = 0.0, 0.0
        for q in range(k):
            i = rows[q]
            total, size = -rhs_rows[i], abs(rhs_rows[i])
            for e in range(indptr[i], indptr[i + 1]):
                term = value[e] * u[indices[e]]
                total += term
                size += abs(term)
            right[q] = total
            unit = 1.0 / np.sqrt(diagonal[q])
            error = max(error, abs(total) * unit)
            terms = max(terms, size * unit)
        first = max(first, terms)
        if error <= tolerance * first or not error < 0.3 * last:
            last = min(last, error)
            break
        last = error
        counts[0] += conjugate_gradients(
            ptr, index, entries, k, columns, diagonal, 0.0, right, s, 1e-9, max_products, work, t
        )
        for q in range(k):
            w[rows[q]] += s[q]
    return last / first if first > 0.0 else 0.0
