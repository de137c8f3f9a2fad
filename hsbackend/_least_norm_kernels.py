# pyright: reportMissingParameterType=false
"""Compiled null-space method on a face with a singular Hessian: factor once, solve often.

One item in units D that balance its columns (powers of two), with F the free variables, X those at an active bound, and
the active rows scaled to unit norm:

    N_F = L [Q1' ; 0]                      Householder, the row of largest remainder first; r rows are independent
    Z'H_FF Z = C'C                         Cholesky of rank s, largest pivot first, Z the last d = |F| - r columns of Q
    W, U                                   R = I - W U' moves along the d - s null directions of H on the face to the
                                           point of least norm in the variables that are read
    E                                      orthonormal basis of the combinations of active rows that vanish (e of them)

What it is for is in :class:`hsbackend.face.LeastNormFace`.
"""

from __future__ import annotations

import numpy as np

from hsbackend._blas import axpy, dot
from hsbackend._parallel import compile_kernel, inline_kernel

#: Columns of ``sizes``: |F|, active rows k, r (-1 for invalid data), s, null directions that move what is read, e.
FREE, ROWS, RANK, CURVED, SEEN, DEPENDENT = 0, 1, 2, 3, 4, 5
#: Ratio of the units of two columns up to which they are left as they are.
_BALANCED = 32.0


@inline_kernel
def _orthonormalise(basis, count, size):
    """Make row ``count`` of a basis orthogonal to the rows before it and of length one."""
    row = basis[count]
    for _ in range(2):
        for i in range(count):
            axpy(-dot(basis[i], row, size), basis[i], row, size)
        length = np.sqrt(dot(row, row, size))
        for j in range(size):
            row[j] /= length


@inline_kernel
def _factor_rows(A, k, nf, tolerance, order, length, Qt):
    """Reduce the rows of A to lower trapezoidal form by reflections, collected in Qt; return the rank."""
    for i in range(nf):
        for j in range(nf):
            Qt[i, j] = 0.0
        Qt[i, i] = 1.0
    remainder = np.empty(k)
    for i in range(k):
        remainder[i] = dot(A[i], A[i], nf)
    v, s = np.empty(nf), np.empty(nf)
    rank = 0
    while rank < min(k, nf):
        p = rank
        for i in range(rank + 1, k):
            if remainder[i] > remainder[p]:
                p = i
        size = np.sqrt(remainder[p])
        if not size > tolerance:
            break
        if p != rank:
            for j in range(nf):
                A[p, j], A[rank, j] = A[rank, j], A[p, j]
            order[p], order[rank] = order[rank], order[p]
            length[p], length[rank] = length[rank], length[p]
            remainder[p] = remainder[rank]
        left = nf - rank
        head = A[rank, rank]
        beta = -size if head >= 0.0 else size
        for j in range(left):
            v[j] = A[rank, rank + j]
            A[rank, rank + j] = 0.0
        v[0] -= beta
        A[rank, rank] = beta
        factor = 2.0 / dot(v, v, left)
        for i in range(rank + 1, k):
            part = A[i, rank:]
            axpy(-factor * dot(v, part, left), v, part, left)
            remainder[i] = dot(A[i, rank + 1 :], A[i, rank + 1 :], left - 1)
        for j in range(nf):
            s[j] = 0.0
        for i in range(left):
            axpy(v[i], Qt[rank + i], s, nf)
        for i in range(left):
            axpy(-factor * v[i], s, Qt[rank + i], nf)
        rank += 1
    return rank


@inline_kernel
def _factor_curvature(M, d, tolerance, pivots):
    """Overwrite M (d, d) by the upper trapezoidal C of the pivoted Cholesky factorisation; return the rank."""
    for i in range(d):
        pivots[i] = i
    for j in range(d):
        p = j
        for i in range(j + 1, d):
            if M[i, i] > M[p, p]:
                p = i
        if not M[p, p] > tolerance:
            return j
        if p != j:
            for i in range(d):
                M[i, j], M[i, p] = M[i, p], M[i, j]
            for i in range(d):
                M[j, i], M[p, i] = M[p, i], M[j, i]
            pivots[j], pivots[p] = pivots[p], pivots[j]
        root = np.sqrt(M[j, j])
        for i in range(j, d):
            M[j, i] /= root
        row = M[j, j + 1 :]
        for i in range(j + 1, d):
            axpy(-M[j, i], row, M[i, j + 1 :], d - j - 1)
    return d


@inline_kernel
def _balance(H, diagonal, N, order, k, units):
    """Set ``units`` (n,) so that columns of ``[DHD, DN'; ND, 0]`` with rows of N balanced have entries of like size.

    Ruiz (2001), three rounds, as powers of two; one where the data are balanced already. H counts in a unit of cost in
    which its largest entry is one.
    """
    n = units.shape[0]
    column, row = np.empty(n), np.ones(k)
    for j in range(n):
        units[j] = 1.0
    for _ in range(3):
        for i in range(k):
            size = 0.0
            values = N[order[i]]
            for j in range(n):
                size = max(size, abs(values[j]) * units[j])
            row[i] = 1.0 / size if size > 0.0 else 0.0
        for j in range(n):
            column[j] = abs(H[0, j]) * units[j] if diagonal else 0.0
        if not diagonal:
            for i in range(n):
                values = H[i]
                for j in range(n):
                    column[j] = max(column[j], abs(values[j]) * units[i])
        cost = 0.0  # the unit of the objective is free
        for j in range(n):
            cost = max(cost, column[j] * units[j])
        if cost > 0.0:
            for j in range(n):
                column[j] /= cost
        for i in range(k):
            values = N[order[i]]
            for j in range(n):
                column[j] = max(column[j], abs(values[j]) * row[i])
        for j in range(n):
            column[j] *= units[j]
            if column[j] > 0.0:
                units[j] /= np.sqrt(column[j])
    largest, smallest = 0.0, np.inf
    for j in range(n):
        largest, smallest = max(largest, units[j]), min(smallest, units[j])
    for j in range(n):
        units[j] = 2.0 ** np.rint(np.log2(units[j] / largest)) if largest > _BALANCED * smallest else 1.0


@compile_kernel
def factor_items(
    start, stop, step, hessian, diagonal, rows, bounded, side_rows, side_bounds, read, rank_tolerance,
    curvature_tolerance, seen_tolerance, units, order, length, pivots, sizes, offset,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Factor the faces of the items; returns the storage of this worker, item b from ``offset[b]`` on.

    Tolerances are relative: to the length of a row, to the largest curvature, to the length of a null direction.
    """
    n, m = rows.shape[2], rows.shape[1]
    store = np.empty(1024)
    used = 0
    free = np.empty(n, dtype=np.int64)
    fixed = np.empty(n, dtype=np.bool_)
    for b in range(start, stop, step):
        H = hessian[b if hessian.shape[0] > 1 else 0]
        N = rows[b if rows.shape[0] > 1 else 0]
        offset[b] = used
        for j in range(n):
            fixed[j] = False
        for i in range(bounded.shape[0]):
            if side_bounds[b, i] != 0:
                fixed[bounded[i]] = True
        nf = 0
        for j in range(n):
            if not fixed[j]:
                free[nf] = j
                nf += 1
        valid = True
        for j in range(n):
            valid &= np.isfinite(H[0, j] if diagonal else H[j, j])
        if not diagonal:
            for i in range(n):
                for j in range(n):
                    valid &= np.isfinite(H[i, j])
        k = 0
        for i in range(m):
            if side_rows[b, i] != 0:
                size = 0.0
                for j in range(n):
                    size = max(size, abs(N[i, j]))
                    valid &= np.isfinite(N[i, j])
                if size > 0.0:
                    order[b, k] = i
                    k += 1
        sizes[b, FREE], sizes[b, ROWS], sizes[b, RANK] = nf, k, -1
        if not valid:
            continue
        D = units[b]
        _balance(H, diagonal, N, order[b], k, D)
        largest = 0.0
        for j in range(n):
            largest = max(largest, abs(H[0, j] if diagonal else H[j, j]) * D[j] * D[j])
        A = np.empty((k, nf))
        for i in range(k):
            row = N[order[b, i]]
            scale = 0.0
            for j in range(n):
                scale = max(scale, abs(row[j]) * D[j])
            total = 0.0
            for j in range(n):
                total += (row[j] * D[j] / scale) ** 2
            length[b, i] = scale * np.sqrt(total)
            for j in range(nf):
                A[i, j] = row[free[j]] * D[free[j]] / length[b, i]
        Qt = np.empty((nf, nf))
        rank = _factor_rows(A, k, nf, rank_tolerance, order[b], length[b], Qt)

        # Curvature on the null space of the rows.
        d = nf - rank
        C = np.zeros((d, d))
        curved = 0
        if d > 0 and largest > 0.0:
            T = np.zeros((d, nf))
            for i in range(d):
                z, t = Qt[rank + i], T[i]
                if diagonal:
                    for j in range(nf):
                        t[j] = z[j] * H[0, free[j]] * D[free[j]]
                elif nf == n:
                    for j in range(nf):
                        axpy(z[j] * D[j], H[j], t, nf)
                else:
                    for j in range(nf):
                        h = H[free[j]]
                        weight = z[j] * D[free[j]]
                        for l in range(nf):
                            t[l] += weight * h[free[l]]
                for j in range(nf):
                    t[j] *= D[free[j]]
            for i in range(d):
                for j in range(i + 1):
                    C[i, j] = dot(T[i], Qt[rank + j], nf)
                    C[j, i] = C[i, j]
            curved = _factor_curvature(C, d, curvature_tolerance * largest, pivots[b])
        else:
            for i in range(d):
                pivots[b, i] = i

        # Directions in which nothing holds the optimum, and how they are seen by the variables that are read.
        none = d - curved
        null = np.zeros((none, nf))
        y = np.empty(d)
        for c in range(none):
            for i in range(curved - 1, -1, -1):
                total = C[i, curved + c]
                for j in range(i + 1, curved):
                    total += C[i, j] * y[j]
                y[i] = -total / C[i, i]
            for i in range(curved):
                axpy(y[i], Qt[rank + pivots[b, i]], null[c], nf)
            axpy(1.0, Qt[rank + pivots[b, curved + c]], null[c], nf)
            _orthonormalise(null, c, nf)
        seen = 0
        moves, sees = null.copy(), null.copy()
        if none > 0:
            every = True
            for j in range(nf):
                every &= read[free[j]] and D[free[j]] == 1.0
            if every:
                seen = none
            else:
                # Lengths are those of the data, not of the balanced units.
                for c in range(none):
                    for j in range(nf):
                        null[c, j] *= D[free[j]]
                    _orthonormalise(null, c, nf)
                masked = null.copy()
                for j in range(nf):
                    if not read[free[j]]:
                        masked[:, j] = 0.0
                # Where a direction moves nothing that is read, it is the whole norm that decides.
                left, singular, right = np.linalg.svd(masked, full_matrices=False)
                for c in range(none):
                    for j in range(nf):
                        moves[c, j] = 0.0
                for i in range(singular.shape[0]):
                    for c in range(none):
                        axpy(left[c, i], null[c], moves[i], nf)
                    visible = singular[i] > seen_tolerance
                    seen += visible
                    for j in range(nf):
                        unit = D[free[j]]
                        if visible:
                            sees[i, j] = right[i, j] * unit if read[free[j]] else 0.0
                            moves[i, j] /= singular[i] * unit
                        else:
                            sees[i, j] = moves[i, j] * unit
                            moves[i, j] /= unit

        # Combinations of the active rows, bounds included, that vanish.
        dependent = k - rank
        wide = k + n - nf
        E = np.zeros((dependent, wide))
        for c in range(dependent):
            combination = E[c]
            combination[rank + c] = 1.0
            for i in range(rank - 1, -1, -1):
                total = A[rank + c, i]
                for j in range(i + 1, rank):
                    total += A[j, i] * combination[j]
                combination[i] = -total / A[i, i]
            for i in range(k):
                combination[i] /= length[b, i]
            at = k
            for j in range(n):
                if fixed[j]:
                    total = 0.0
                    for i in range(rank):
                        total += N[order[b, i], j] * combination[i]
                    total += N[order[b, rank + c], j] * combination[rank + c]
                    combination[at] = -total
                    at += 1
            _orthonormalise(E, c, wide)

        sizes[b, RANK], sizes[b, CURVED], sizes[b, SEEN], sizes[b, DEPENDENT] = rank, curved, seen, dependent
        need = nf * nf + k * rank + curved * d + 2 * none * nf + dependent * wide
        if used + need > store.shape[0]:
            larger = np.empty(2 * (used + need))
            larger[:used] = store[:used]
            store = larger
        at = used
        for i in range(nf):
            store[at : at + nf] = Qt[i]
            at += nf
        for i in range(k):
            store[at : at + rank] = A[i, :rank]
            at += rank
        for i in range(curved):
            store[at : at + d] = C[i]
            at += d
        for i in range(none):
            store[at : at + nf] = moves[i]
            at += nf
        for i in range(none):
            store[at : at + nf] = sees[i]
            at += nf
        for i in range(dependent):
            store[at : at + wide] = E[i]
            at += wide
        used = at
    return store[:used].copy()


@inline_kernel
def _without(E, count, wide, w):
    """Remove the part of w (wide,) that lies in the span of the orthonormal rows of E."""
    for i in range(count):
        axpy(-dot(E[i], w, wide), E[i], w, wide)


@compile_kernel
def solve_items(
    start, stop, step, hessian, diagonal, rows, bounded, side_bounds, units, order, length, pivots, sizes, offset,
    store, rhs_primal, rhs_rows, rhs_bounds, u, w, w_bounds,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Solve the KKT systems of the items on their faces, with one step of refinement; entries outside K are zero."""
    n = rows.shape[2]
    free, fixed = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    position = np.empty(n, dtype=np.int64)  # of the bound of a variable
    g, product, x = np.empty(n), np.empty(n), np.empty(n)
    for b in range(start, stop, step):
        k, rank, curved, dependent = sizes[b, ROWS], sizes[b, RANK], sizes[b, CURVED], sizes[b, DEPENDENT]
        if rank < 0:
            u[b] = np.nan
            w[b] = np.nan
            w_bounds[b] = np.nan
            continue
        H = hessian[b if hessian.shape[0] > 1 else 0]
        N = rows[b if rows.shape[0] > 1 else 0]
        for j in range(n):
            position[j] = -1
        for i in range(bounded.shape[0]):
            if side_bounds[b, i] != 0:
                position[bounded[i]] = i
        D = units[b]
        nf = nx = 0
        for j in range(n):
            if position[j] < 0:
                free[nf] = j
                nf += 1
            else:
                fixed[nx] = j
                nx += 1
        d, none, wide = nf - rank, nf - rank - curved, k + nx
        at = offset[b]
        Qt = store[at : at + nf * nf].reshape(nf, nf)
        at += nf * nf
        L = store[at : at + k * rank].reshape(k, rank)
        at += k * rank
        C = store[at : at + curved * d].reshape(curved, d)
        at += curved * d
        moves = store[at : at + none * nf].reshape(none, nf)
        at += none * nf
        sees = store[at : at + none * nf].reshape(none, nf)
        at += none * nf
        E = store[at : at + dependent * wide].reshape(dependent, wide)

        right, pull, y = np.empty(wide), np.empty(nf), np.empty(max(nf, 1))
        found, multipliers = np.zeros(n), np.zeros(wide)
        for again in range(2):
            # Right-hand side: what the data ask for, then what is missing.
            for j in range(n):
                g[j] = rhs_primal[b, j]
            for i in range(k):
                right[i] = rhs_rows[b, order[b, i]]
            for i in range(nx):
                right[k + i] = rhs_bounds[b, position[fixed[i]]]
            if again:
                for i in range(n):
                    g[i] -= H[0, i] * found[i] if diagonal else dot(H[i], found, n)
                for i in range(k):
                    axpy(-multipliers[i], N[order[b, i]], g, n)
                    right[i] -= dot(N[order[b, i]], found, n)
                for i in range(nx):
                    g[fixed[i]] -= multipliers[k + i]
                    right[k + i] -= found[fixed[i]]
            _without(E, dependent, wide, right)

            # A point on the face.
            for j in range(n):
                x[j] = 0.0
            for i in range(nx):
                x[fixed[i]] = right[k + i]
            for i in range(rank):
                y[i] = (right[i] - dot(N[order[b, i]], x, n)) / length[b, i]
                y[i] = (y[i] - dot(L[i], y, i)) / L[i, i]
            for j in range(nf):
                pull[j] = 0.0
            for i in range(rank):
                axpy(y[i], Qt[i], pull, nf)
            for j in range(nf):
                x[free[j]] = pull[j] * D[free[j]]

            # The move along the face to where it is stationary, and to the selected optimum.
            for i in range(n):
                product[i] = H[0, i] * x[i] if diagonal else dot(H[i], x, n)
            for j in range(nf):
                pull[j] = (g[free[j]] - product[free[j]]) * D[free[j]]
            for i in range(none):
                axpy(-dot(moves[i], pull, nf), sees[i], pull, nf)
            for i in range(curved):
                y[i] = dot(Qt[rank + pivots[b, i]], pull, nf)
            for i in range(curved):
                y[i] /= C[i, i]
                for j in range(i + 1, curved):
                    y[j] -= C[i, j] * y[i]
            for i in range(curved - 1, -1, -1):
                total = y[i]
                for j in range(i + 1, curved):
                    total -= C[i, j] * y[j]
                y[i] = total / C[i, i]
            for j in range(nf):
                pull[j] = x[free[j]] / D[free[j]]
            for i in range(curved):
                axpy(y[i], Qt[rank + pivots[b, i]], pull, nf)
            for i in range(none):
                axpy(-dot(sees[i], pull, nf), moves[i], pull, nf)
            for j in range(nf):
                x[free[j]] = pull[j] * D[free[j]]

            # Multipliers from what is left of the gradient.
            for i in range(n):
                product[i] = g[i] - (H[0, i] * x[i] if diagonal else dot(H[i], x, n))
            for j in range(nf):
                pull[j] = product[free[j]] * D[free[j]]
            for i in range(none):
                axpy(-dot(moves[i], pull, nf), sees[i], pull, nf)
            for i in range(rank):
                y[i] = dot(Qt[i], pull, nf)
            for i in range(wide):
                right[i] = 0.0
            for i in range(rank - 1, -1, -1):
                y[i] /= L[i, i]
                axpy(-y[i], L[i], y, i)
                right[i] = y[i] / length[b, i]
            for i in range(rank):
                axpy(-right[i], N[order[b, i]], product, n)
            for i in range(nx):
                right[k + i] = product[fixed[i]]
            _without(E, dependent, wide, right)
            for j in range(n):
                found[j] += x[j]
            for i in range(wide):
                multipliers[i] += right[i]
        u[b] = found
        for i in range(w.shape[1]):
            w[b, i] = 0.0
        for i in range(k):
            w[b, order[b, i]] = multipliers[i]
        for i in range(w_bounds.shape[1]):
            w_bounds[b, i] = 0.0
        for i in range(nx):
            w_bounds[b, position[fixed[i]]] = multipliers[k + i]
