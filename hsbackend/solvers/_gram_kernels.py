"""Compiled dual active-set method in Gram space: one item, rows with two limits.

The problem, seen through its rows only (Goldfarb and Idnani 1983, dual form). With a positive definite
Hessian ``H``, rows ``N`` (m, n), ``D = N H^-1 N'`` (m, m) and ``d = N x0`` the row values at the minimiser
without the rows, the row values at multipliers ``lam`` are ``v = d - D lam`` and the problem is to find

    lower <= v <= upper,   lam_i > 0 only where v_i = upper_i,   lam_i < 0 only where v_i = lower_i.

Rows are scaled to ``D_ii = 1`` before they come here, so that ``v`` is measured in the norm of ``H`` and a
pivot of the bordering is a squared sine. The inverse of ``D`` on the working set is explicit: bordering
adds a row, its inverse operation removes one, both in O(k^2) without triangular solves.
"""

from __future__ import annotations

import numpy as np

from hsbackend._blas import axpy, dot
from hsbackend._parallel import compile_kernel, inline_kernel
from hsbackend.status import Status

# Numba freezes these as constants.
_SOLVED = int(Status.SOLVED)
_INFEASIBLE = int(Status.INFEASIBLE)
_INVALID = int(Status.INVALID_INPUT)
_NOT_CONVERGED = int(Status.NOT_CONVERGED)
_UNBOUNDED = int(Status.UNBOUNDED)

#: A row whose part outside the working set has a squared sine below this is dependent on the working set.
#: 1e-11 leaves a factor 1e5 above rounding of a unit diagonal; measured on the fuzz generator of the tests.
_DEPENDENT = 1e-11
#: Working-set changes after which the inverse is built anew.
_REFRESH = 100
#: Below this the squared sine is computed again with a refined projection.
_CLOSE = 1e-4
#: A weakly active row joins the face only above this: the derivative would amplify rounding by its inverse.
_WEAKLY_DEPENDENT = 1e-9
#: Rows violated by less than this, relative to the data, are satisfied when they depend on the working set.
_CONSISTENT = 1e-9


@inline_kernel
def border(inverse, k, r, pivot):
    """Extend the inverse of a (k, k) matrix by one row: ``r = inverse @ column``, ``pivot`` the Schur complement."""
    for i in range(k):
        axpy(r[i] / pivot, r, inverse[i], k)
        inverse[i, k] = -r[i] / pivot
        inverse[k, i] = -r[i] / pivot
    inverse[k, k] = 1.0 / pivot


@inline_kernel
def unborder(inverse, k, working, j):
    """Remove position ``j`` from a (k, k) inverse and from the working set; the last row takes its place."""
    last = k - 1
    if j != last:
        for i in range(k):
            inverse[i, j], inverse[i, last] = inverse[i, last], inverse[i, j]
        for i in range(k):
            inverse[j, i], inverse[last, i] = inverse[last, i], inverse[j, i]
        working[j] = working[last]
    pivot = inverse[last, last]
    for i in range(last):
        axpy(-inverse[i, last] / pivot, inverse[last], inverse[i], last)


@inline_kernel
def outside_part(gram, inverse, working, k, rank, p, r, scratch):
    """Set ``r = inverse @ D_Wp`` and return the Schur complement ``D_pp - D_pW r``, zero once W has full rank."""
    for i in range(k):
        r[i] = 0.0
    row = gram[p]
    for i in range(k):
        axpy(row[working[i]], inverse[i], r, k)
    pivot = row[p]
    for i in range(k):
        pivot -= row[working[i]] * r[i]
    if pivot < _CLOSE:
        # Cancellation: whether the row is dependent decides everything that follows, so look again. One step of
        # iterative refinement on D_WW r = D_Wp, with the correction applied where it belongs.
        for i in range(k):
            residual = row[working[i]]
            for j in range(k):
                residual -= gram[working[i], working[j]] * r[j]
            scratch[i] = residual
        for i in range(k):
            axpy(scratch[i], inverse[i], r, k)
        pivot = row[p]
        for i in range(k):
            pivot -= row[working[i]] * r[i]
    return pivot if k < rank else 0.0


@inline_kernel
def _recompute(gram, base, lower, upper, m, working, k, lam, values, side, inverse, r):
    """Refine the multipliers of the working set against freshly computed row values; return the residual."""
    residual = np.inf
    for sweep in range(4):
        for i in range(m):
            values[i] = base[i]
        for i in range(k):
            axpy(-lam[working[i]], gram[working[i]], values, m)
        worst = 0.0
        for i in range(k):
            w = working[i]
            target = upper[w] if side[w] > 0 else lower[w]
            r[i] = values[w] - target
            worst = max(worst, abs(r[i]))
        if not worst < residual * 0.5:
            return worst
        residual = worst
        if sweep == 3 or worst == 0.0:
            return worst
        for i in range(k):
            lam[working[i]] += dot(inverse[i], r, k)
    return residual


@inline_kernel
def _rebuild(gram, working, k, rank, inverse, side, lam, r, scratch):
    """Recompute the inverse from the Gram matrix; rows that turn out dependent leave. Return the new count."""
    kept = 0
    for i in range(k):
        p = working[i]
        pivot = outside_part(gram, inverse, working, kept, rank, p, r, scratch)
        if pivot > _DEPENDENT:
            border(inverse, kept, r, pivot)
            working[kept] = p
            kept += 1
        else:
            side[p] = 0
            lam[p] = 0.0
    return kept


@inline_kernel
def _drop_wrong_signs(base, lower, upper, n_eq, working, k, lam, side, inverse, gram, r):
    """Make a proposed working set dual feasible: solve on it, drop the worst wrong sign, repeat."""
    while k > 0:
        for i in range(k):
            w = working[i]
            r[i] = base[w] - (upper[w] if side[w] > 0 else lower[w])
        worst = 0.0
        at = -1
        for i in range(k):
            w = working[i]
            lam[w] = dot(inverse[i], r, k)
            if w >= n_eq and lower[w] < upper[w] and lam[w] * side[w] < worst:
                worst = lam[w] * side[w]
                at = i
        if at < 0:
            break
        lam[working[at]] = 0.0
        side[working[at]] = 0
        unborder(inverse, k, working, at)
        k -= 1
    return k


@inline_kernel
def active_set(
    gram, base, lower, upper, n_eq, k, rank, max_steps, tolerance, working, side, lam, values, inverse, r, scratch
):
    """Solve one item; on entry ``working[:k]`` with its ``inverse`` is a guess, on exit the optimal working set.

    Args:
        gram: (m, m), unit diagonal, or a zero row where the row does not depend on x.
        base: (m,) the row values d without multipliers.
        lower: (m,) lower limits, may be -inf.
        upper: (m,) upper limits, may be inf. The first ``n_eq`` rows are equalities (lower == upper).
        n_eq: number of equality rows.
        k: size of the guess.
        rank: rank of the rows at most; a working set of this size has no independent row outside.
        max_steps: bound on the number of working set changes.
        tolerance: violations up to ``tolerance * (1 + |limit|)`` plus rounding are accepted.
        working: (m,) int, out: the working set in the order of ``inverse``.
        side: (m,) int, in and out: 1 at upper, -1 at lower, 0 free; zero outside the guess.
        lam: (m,) out: multipliers; at an infeasible item the Farkas combination of rows instead.
        values: (m,) out: row values.
        inverse: (m, m) in and out: inverse of the Gram matrix on the working set.
        r: (m,) scratch.
        scratch: (m,) scratch.

    Returns:
        (status, k, steps).
    """
    m = base.shape[0]
    largest = 0.0
    for i in range(m):
        largest = max(largest, abs(base[i]))
    rounding = 2e-15 * largest
    steps = 0
    k = _drop_wrong_signs(base, lower, upper, n_eq, working, k, lam, side, inverse, gram, r)
    for i in range(m):
        values[i] = base[i]
    for i in range(k):
        axpy(-lam[working[i]], gram[working[i]], values, m)

    for p in range(n_eq):
        if side[p] != 0:
            continue
        gap = values[p] - upper[p]
        pivot = outside_part(gram, inverse, working, k, rank, p, r, scratch)
        if pivot <= _DEPENDENT:
            if abs(gap) > _CONSISTENT * (1.0 + abs(upper[p])) + 100.0 * rounding:
                return _conflict(lam, m, working, k, p, r, 1.0), k, steps
            continue
        t = gap / pivot
        lam[p] += t
        for i in range(k):
            lam[working[i]] -= t * r[i]
            axpy(t * r[i], gram[working[i]], values, m)
        axpy(-t, gram[p], values, m)
        border(inverse, k, r, pivot)
        working[k] = p
        side[p] = 1
        k += 1
        steps += 1
    if k > 0:
        _recompute(gram, base, lower, upper, m, working, k, lam, values, side, inverse, r)

    checks = 0
    fresh = steps
    while steps < max_steps:
        if steps - fresh >= _REFRESH:
            # A long walk of bordering and removing rows wears the inverse out: build it anew.
            fresh = steps
            k = _rebuild(gram, working, k, rank, inverse, side, lam, r, scratch)
            k = _drop_wrong_signs(base, lower, upper, n_eq, working, k, lam, side, inverse, gram, r)
            for i in range(m):
                values[i] = base[i]
            for i in range(k):
                axpy(-lam[working[i]], gram[working[i]], values, m)
        # Most violated row.
        p = -1
        worst = 0.0
        for i in range(n_eq, m):
            if side[i] == 0:
                over = values[i] - upper[i]
                under = lower[i] - values[i]
                if over > worst and over > tolerance * (1.0 + abs(upper[i])) + rounding:
                    worst = over
                    p = i
                elif under > worst and under > tolerance * (1.0 + abs(lower[i])) + rounding:
                    worst = under
                    p = i
        if p < 0:
            # Optimal up to rounding: refine, and look again with clean numbers.
            residual = _recompute(gram, base, lower, upper, m, working, k, lam, values, side, inverse, r)
            if not np.isfinite(residual):
                return _NOT_CONVERGED, k, steps
            if residual > 10.0 * tolerance * (1.0 + largest) and checks < 3:
                k = _rebuild(gram, working, k, rank, inverse, side, lam, r, scratch)
                residual = _recompute(gram, base, lower, upper, m, working, k, lam, values, side, inverse, r)
            checks += 1
            again = False
            for i in range(n_eq, m):
                if side[i] == 2:  # left out as consistent with an older working set: judge it anew
                    side[i] = 0
            if checks <= 6:
                for i in range(n_eq, m):
                    if side[i] == 0 and (
                        values[i] - upper[i] > tolerance * (1.0 + abs(upper[i])) + rounding
                        or lower[i] - values[i] > tolerance * (1.0 + abs(lower[i])) + rounding
                    ):
                        again = True
                wrong = 0.0
                for i in range(k):
                    w = working[i]
                    if w >= n_eq and lower[w] < upper[w]:
                        wrong = min(wrong, lam[w] * side[w])
                if wrong < -tolerance * (1.0 + largest):
                    k = _drop_wrong_signs(base, lower, upper, n_eq, working, k, lam, side, inverse, gram, r)
                    for i in range(m):
                        values[i] = base[i]
                    for i in range(k):
                        axpy(-lam[working[i]], gram[working[i]], values, m)
                    again = True
            if not again:
                return _SOLVED, k, steps
            steps += 1
            continue

        sign = 1.0 if values[p] > upper[p] else -1.0
        target = upper[p] if sign > 0.0 else lower[p]
        while True:
            steps += 1
            pivot = outside_part(gram, inverse, working, k, rank, p, r, scratch)
            # Longest step that keeps the multipliers of the inequalities on their side.
            blocking = -1
            longest = np.inf
            for i in range(k):
                w = working[i]
                if w >= n_eq:
                    slope = sign * r[i] * side[w]
                    if slope > 0.0:
                        ratio = max(lam[w] * side[w], 0.0) / slope
                        if ratio < longest:
                            longest = ratio
                            blocking = i
            full = np.inf
            if pivot > _DEPENDENT:
                full = sign * (values[p] - target) / pivot
            elif abs(values[p] - target) <= _CONSISTENT * (1.0 + abs(target)) + 100.0 * rounding:
                # Depends on the working set and holds up to rounding: leave it out for good.
                side[p] = 2
                lam[p] = 0.0
                break
            if full == np.inf and longest == np.inf:
                return _conflict(lam, m, working, k, p, r, sign), k, steps
            t = min(full, longest)
            lam[p] += sign * t
            for i in range(k):
                lam[working[i]] -= sign * t * r[i]
            if pivot > _DEPENDENT:
                for i in range(k):
                    axpy(sign * t * r[i], gram[working[i]], values, m)
                axpy(-sign * t, gram[p], values, m)
            if full <= longest:
                border(inverse, k, r, pivot)
                working[k] = p
                side[p] = 1 if sign > 0.0 else -1
                k += 1
                break
            lam[working[blocking]] = 0.0
            side[working[blocking]] = 0
            unborder(inverse, k, working, blocking)
            k -= 1
            if steps >= max_steps:
                break
    return _NOT_CONVERGED, k, steps


@inline_kernel
def _conflict(lam, m, working, k, p, r, sign):
    """Leave the Farkas combination ``N_p - sum r_i N_i = 0`` in ``lam``."""
    for i in range(m):
        lam[i] = 0.0
    for i in range(k):
        if abs(r[i]) > 1e-7:
            lam[working[i]] = -sign * r[i]
    lam[p] = sign
    return _INFEASIBLE


@inline_kernel
def choose_face(
    gram, lower, upper, n_eq, k, rank, support, active_tolerance, working, side, lam, values, inverse, r, scratch
):
    """Turn the final working set into the index set K of the HS-Jacobian; return its size.

    ``support`` False: add every row at a limit (K = I(x)); dependent ones get a side, but no place in the working set.
    ``support`` True: keep the equalities and the rows with a non-zero multiplier (K = supp(z)).
    """
    m = values.shape[0]
    if support:
        i = 0
        largest = 0.0
        for j in range(k):
            largest = max(largest, abs(lam[working[j]]))
        while i < k:
            w = working[i]
            if w >= n_eq and lower[w] < upper[w] and abs(lam[w]) <= active_tolerance * (1.0 + largest):
                side[w] = 0
                unborder(inverse, k, working, i)
                k -= 1
            else:
                i += 1
    for p in range(n_eq, m):
        # Limits that coincide leave no room: such a row is in K whatever its multiplier.
        if (side[p] == 0 or side[p] == 2) and (not support or lower[p] == upper[p]):
            at_upper = upper[p] < np.inf and upper[p] - values[p] <= active_tolerance * (1.0 + abs(upper[p]))
            at_lower = lower[p] > -np.inf and values[p] - lower[p] <= active_tolerance * (1.0 + abs(lower[p]))
            if at_upper or at_lower:
                side[p] = 1 if at_upper else -1
                pivot = outside_part(gram, inverse, working, k, rank, p, r, scratch)
                if pivot > _WEAKLY_DEPENDENT:
                    border(inverse, k, r, pivot)
                    working[k] = p
                    k += 1
    return k


@compile_kernel
def normalise(start, stop, step, gram, scale):  # type: ignore[no-untyped-def]
    """Scale rows and columns to a unit diagonal; rows without extent become zero."""
    m = gram.shape[1]
    for b in range(start, stop, step):
        for i in range(m):
            scale[b, i] = 1.0 / np.sqrt(gram[b, i, i]) if gram[b, i, i] > 0.0 else 0.0
        s = scale[b]
        for i in range(m):
            row = gram[b, i]
            own = s[i]
            for j in range(m):
                row[j] *= own * s[j]


@compile_kernel
def solve_items(
    start, stop, step, gram, scale, base, lower, upper, n_eq, rank, tolerance, max_steps, support, active_tolerance,
    keep, prox_weight, prox_rows, prox_block, prox_origin, prox_point, warm, warm_side, warm_point,
    status, multipliers, steps, working, side, count, offset,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Solve items; return the flat storage of the inverses of this worker's items."""
    m = base.shape[1]
    ns = prox_origin.shape[1]
    varying = 0 if gram.shape[0] == 1 else 1
    varying_weight = 0 if prox_weight.shape[0] == 1 else 1
    inverse = np.empty((m, m))
    r = np.empty(m)
    scratch = np.empty(m)
    lam = np.empty(m)
    values = np.empty(m)
    d = np.empty(m)
    shifted = np.empty(m)
    low = np.empty(m)
    high = np.empty(m)
    work = np.empty(m, dtype=np.int64)
    where = np.empty(m, dtype=np.int64)
    new_point = np.empty(ns)
    store = np.empty(1024)
    used = 0
    for b in range(start, stop, step):
        count[b] = 0
        if status[b] != _SOLVED:
            continue
        matrix = gram[b * varying]
        s = scale[b * varying]
        weight = prox_weight[b * varying_weight]
        bad = False
        for i in range(m):
            # A row without extent is a condition on the data alone: keep it in its own units.
            unit = s[i] if s[i] > 0.0 else 1.0
            d[i] = base[b, i] * unit
            low[i] = lower[b, i] * unit
            high[i] = upper[b, i] * unit
            lam[i] = 0.0
            where[i] = 0
            if not np.isfinite(d[i]) or np.isnan(low[i]) or np.isnan(high[i]):
                bad = True
        if bad:
            status[b] = _INVALID
            continue
        k = 0
        if warm:
            for p in range(m):
                usable = (warm_side[b, p] > 0 and high[p] < np.inf) or (warm_side[b, p] < 0 and low[p] > -np.inf)
                if usable or p < n_eq:
                    pivot = outside_part(matrix, inverse, work, k, rank, p, r, scratch)
                    if pivot > _DEPENDENT:
                        border(inverse, k, r, pivot)
                        work[k] = p
                        where[p] = 1 if (warm_side[b, p] > 0 or p < n_eq) else -1
                        k += 1
        for i in range(ns):
            prox_point[b, i] = warm_point[b, i] if warm else 0.0
        total = 0
        previous = np.inf
        outcome = _NOT_CONVERGED
        for _outer in range(200 if ns > 0 else 1):
            for i in range(m):
                shifted[i] = d[i]
                if ns > 0:
                    unit = s[i] if s[i] > 0.0 else 1.0
                    shifted[i] += weight * unit * dot(prox_rows[b * varying, i], prox_point[b], ns)
            outcome, k, taken = active_set(
                matrix,
                shifted,
                low,
                high,
                n_eq,
                k,
                rank,
                max_steps,
                tolerance,
                work,
                where,
                lam,
                values,
                inverse,
                r,
                scratch,
            )
            total += taken
            if ns == 0 or outcome != _SOLVED:
                break
            change = 0.0
            largest = 0.0
            for i in range(ns):
                new_point[i] = prox_origin[b, i] + weight * dot(prox_block[b * varying, i], prox_point[b], ns)
            for j in range(k):
                w = work[j]
                axpy(-lam[w] * s[w], prox_rows[b * varying, w], new_point, ns)
            for i in range(ns):
                change = max(change, abs(new_point[i] - prox_point[b, i]))
                largest = max(largest, abs(new_point[i]))
                prox_point[b, i] = new_point[i]
            # Converged, or down to the rounding in numbers of size 1/weight: the refinement on the face does the rest,
            # and the check against the data has the last word.
            if change <= 1e-10 * (1.0 + largest) or (change <= 1e-6 * (1.0 + largest) and change > 0.5 * previous):
                break
            # A point that moves on by equal steps, without end, follows a direction in which the objective falls.
            outcome = _UNBOUNDED if change > 0.999 * previous and change > 1e-6 * (1.0 + largest) else _NOT_CONVERGED
            previous = change
            for i in range(n_eq, m):
                if where[i] == 2:
                    where[i] = 0
        steps[b] = total
        status[b] = outcome
        if outcome != _SOLVED:
            for i in range(m):  # an infeasible item leaves its Farkas combination here
                multipliers[b, i] = lam[i] * (s[i] if s[i] > 0.0 else 1.0)
            continue
        for i in range(k):
            multipliers[b, work[i]] = lam[work[i]] * s[work[i]]
        if keep:
            k = choose_face(
                matrix,
                low,
                high,
                n_eq,
                k,
                rank,
                support,
                active_tolerance,
                work,
                where,
                lam,
                values,
                inverse,
                r,
                scratch,
            )
            if used + k * k > store.shape[0]:
                larger = np.empty(2 * store.shape[0] + k * k)
                larger[:used] = store[:used]
                store = larger
            offset[b] = used
            for i in range(k):
                store[used : used + k] = inverse[i, :k]
                used += k
        count[b] = k
        for i in range(k):
            working[b, i] = work[i]
        for i in range(m):
            side[b, i] = where[i] if where[i] != 2 else 0  # 2: dependent and consistent
            if i < n_eq and side[b, i] == 0:
                side[b, i] = 1  # in K whatever the working set says of it
    return store[:used].copy()
