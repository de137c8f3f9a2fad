# pyright: reportMissingParameterType=false
"""Compiled interior-point steps on one sparse item: the mathematics of :mod:`hsbackend.solvers.compiled_interior`.

One item, in scaled units, is

    minimise 1/2 x'Hx - a'x   subject to   E x = e,   C x + s = d,   s >= 0    (multipliers y free, z >= 0)

The rows of N are those of E, then the inequality rows of C. The other rows of C are the limits of single variables:
``-x_j <= -lower_j`` for j in ``at_lower``, then ``x_j <= upper_j`` for j in ``at_upper``; they are never stored.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from hsbackend._parallel import inline_kernel
from hsbackend.solvers._ldl_kernels import factorise, substitute

#: The pattern of H (all of it, by rows), of N (by rows), and of the KKT matrix and its factor. ``of_h``, ``of_n`` and
#: ``of_diagonal`` are the places of entries in the upper triangle of the KKT matrix, -1 for those in the lower one;
#: ``place`` is where each variable and row went, ``sign`` the sign of the pivot there.
Pattern = namedtuple(
    "Pattern",
    "n me m h_ptr h_col n_ptr n_col of_h of_n of_diagonal k_ptr k_row l_ptr l_row w_ptr w_col place sign",
)
#: Numbers of one scaled item: entries of H and N, a, the right-hand sides of the rows, the limits d of all of C, and
#: which variables are fixed and which rows do not exist.
Item = namedtuple("Item", "p h nv a rhs d at_lower at_upper fixed absent")
#: The KKT matrix, its factor and room to work.
Factor = namedtuple("Factor", "k lower pivots work filled right")

#: What the regularisation of a variable or a row that takes no part becomes.
_HUGE = 1e40
_STEPS = 80
_POSITIVE = 1e-60
_REGULARISATION_FIRST, _REGULARISATION_LAST = 1e-5, 1e-10


@inline_kernel
def times_h(pattern, h, x, out):
    """Set ``out = H x``."""
    for j in range(pattern.n):
        value = 0.0
        for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
            value += h[p] * x[pattern.h_col[p]]
        out[j] = value


@inline_kernel
def times_c(pattern, item, x, ex, cx):
    """Set ``ex = E x`` and ``cx = C x``."""
    me = pattern.me
    for i in range(pattern.m):
        value = 0.0
        for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
            value += item.nv[p] * x[pattern.n_col[p]]
        if i < me:
            ex[i] = value
        else:
            cx[i - me] = value
    place = pattern.m - me
    for j in item.at_lower:
        cx[place] = -x[j]
        place += 1
    for j in item.at_upper:
        cx[place] = x[j]
        place += 1


@inline_kernel
def _add_forces(pattern, item, y, z, out):
    """Add ``E'y + C'z`` to ``out``."""
    me = pattern.me
    for i in range(pattern.m):
        value = y[i] if i < me else z[i - me]
        if value != 0.0:
            for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
                out[pattern.n_col[p]] += value * item.nv[p]
    place = pattern.m - me
    for j in item.at_lower:
        out[j] -= z[place]
        place += 1
    for j in item.at_upper:
        out[j] += z[place]
        place += 1


@inline_kernel
def norm_inf(vector):
    value = 0.0
    for entry in vector:
        value = max(value, abs(entry))
    return value


@inline_kernel
def _assemble(pattern, item, factor, t, delta):
    """Write the KKT matrix for the slack-to-multiplier ratios t and the regularisation delta."""
    n, me, m = pattern.n, pattern.me, pattern.m
    mi = m - me
    for j in range(n):
        factor.right[j] = delta
    place = mi
    for j in item.at_lower:
        factor.right[j] += 1.0 / (t[place] + delta)
        place += 1
    for j in item.at_upper:
        factor.right[j] += 1.0 / (t[place] + delta)
        place += 1
    k = factor.k
    for j in range(n):
        if item.fixed[j]:
            factor.right[j] = _HUGE
        k[pattern.of_diagonal[j]] = factor.right[j]
        for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
            if pattern.h_col[p] == j:
                k[pattern.of_diagonal[j]] += item.h[p]
            elif pattern.of_h[p] >= 0:
                k[pattern.of_h[p]] = item.h[p]
    for i in range(m):
        if item.absent[i]:
            k[pattern.of_diagonal[n + i]] = -_HUGE
        else:
            k[pattern.of_diagonal[n + i]] = -(delta if i < me else t[i - me] + delta)
        for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
            k[pattern.of_n[p]] = item.nv[p]


@inline_kernel
def _factorise(pattern, factor, delta):
    """Factor the matrix; return how many pivots had to be replaced."""
    return factorise(
        pattern.k_ptr, pattern.k_row, factor.k, pattern.l_ptr, pattern.l_row, pattern.w_ptr, pattern.w_col,
        pattern.sign, 0.1 * delta, factor.lower, factor.pivots, factor.work, factor.filled,
    )  # fmt: skip


@inline_kernel
def factor_kkt(pattern, item, factor, t, delta):
    """Write and factor the matrix; return how many pivots had to be replaced."""
    _assemble(pattern, item, factor, t, delta)
    return _factorise(pattern, factor, delta)


@inline_kernel
def _substitute(pattern, item, factor, t, delta, r1, r2, r3, dx, dy, dz):
    """Solve with the factor for (dx, dy, dz)."""
    n, me, m = pattern.n, pattern.me, pattern.m
    mi = m - me
    right, at = factor.right, pattern.place
    for j in range(n):
        dx[j] = r1[j]
    place = mi
    for j in item.at_lower:
        dx[j] -= r3[place] / (t[place] + delta)
        place += 1
    for j in item.at_upper:
        dx[j] += r3[place] / (t[place] + delta)
        place += 1
    for j in range(n):
        right[at[j]] = 0.0 if item.fixed[j] else dx[j]
    for i in range(m):
        value = r2[i] if i < me else r3[i - me]
        right[at[n + i]] = 0.0 if item.absent[i] else value
    substitute(pattern.l_ptr, pattern.l_row, factor.lower, factor.pivots, right)
    for j in range(n):
        dx[j] = right[at[j]]
    for i in range(m):
        if i < me:
            dy[i] = right[at[n + i]]
        else:
            dz[i - me] = right[at[n + i]]
    place = mi
    for j in item.at_lower:
        dz[place] = (-dx[j] - r3[place]) / (t[place] + delta)
        place += 1
    for j in item.at_upper:
        dz[place] = (dx[j] - r3[place]) / (t[place] + delta)
        place += 1


@inline_kernel
def _left(pattern, item, t, shift, r1, r2, r3, dx, dy, dz, e1, e2, e3):
    """Set what a step leaves of the right-hand side of the Newton system; return its largest entry."""
    n, me, m = pattern.n, pattern.me, pattern.m
    times_h(pattern, item.h, dx, e1)
    _add_forces(pattern, item, dy, dz, e1)
    worst = 0.0
    for j in range(n):
        e1[j] = 0.0 if item.fixed[j] else r1[j] - e1[j] - shift * dx[j]
        worst = max(worst, abs(e1[j]))
    times_c(pattern, item, dx, e2, e3)
    for i in range(me):
        e2[i] = 0.0 if item.absent[i] else r2[i] - e2[i] + shift * dy[i]
        worst = max(worst, abs(e2[i]))
    for i in range(item.p):
        if i < m - me and item.absent[me + i]:
            e3[i] = 0.0
        else:
            e3[i] = r3[i] - e3[i] + (t[i] + shift) * dz[i]
        worst = max(worst, abs(e3[i]))
    return worst if np.isfinite(worst) else np.inf


@inline_kernel
def newton(pattern, item, factor, t, delta, shift, r1, r2, r3, dx, dy, dz, room, accuracy, most):
    """Solve the Newton system, refined against the matrix with ``shift`` in the place of ``delta``.

    Returns:
        The relative error.
    """
    e1, e2, e3, fx, fy, fz = room
    size = max(norm_inf(r1), norm_inf(r2), norm_inf(r3))
    _substitute(pattern, item, factor, t, delta, r1, r2, r3, dx, dy, dz)
    error = _left(pattern, item, t, shift, r1, r2, r3, dx, dy, dz, e1, e2, e3)
    for _ in range(most):
        if error <= accuracy * size:
            break
        _substitute(pattern, item, factor, t, delta, e1, e2, e3, fx, fy, fz)
        dx += fx
        dy += fy
        dz += fz
        after = _left(pattern, item, t, shift, r1, r2, r3, dx, dy, dz, e1, e2, e3)
        if not after < error:
            dx -= fx
            dy -= fy
            dz -= fz
            break
        slow = after > 0.5 * error
        error = after
        if slow:
            break
    return error / size if size > 0.0 else 0.0


@inline_kernel
def _longest(values, step):
    """Return the longest step up to 1 that keeps positive numbers from falling below zero."""
    worst = 1.0
    for i in range(values.shape[0]):
        worst = max(worst, -step[i] / values[i])
    return 1.0 / worst


@inline_kernel
def make_room(pattern, item):
    n, me = pattern.n, pattern.me
    return np.empty(n), np.empty(me), np.empty(item.p), np.empty(n), np.empty(me), np.empty(item.p)


@inline_kernel
def take_steps(pattern, item, factor, accuracy, x, y, z, s):
    """Take predictor-corrector steps from (x, y, z, s), in place, to the relative accuracy; return how many.

    Negative if it was not reached: the best point is there all the same.
    """
    n, me, m, p = pattern.n, pattern.me, pattern.m, item.p
    mi = m - me
    hx, forces, ex, cx = np.empty(n), np.empty(n), np.empty(me), np.empty(p)
    rd, rp, rc = np.empty(n), np.empty(me), np.empty(p)
    dx, dy, dz, ds, t, r3 = np.empty(n), np.empty(me), np.empty(p), np.empty(p), np.empty(p), np.empty(p)
    bx, by, bz, bs = x.copy(), y.copy(), z.copy(), s.copy()
    room = make_room(pattern, item)
    linear = True
    for entry in item.h:
        linear = linear and entry == 0.0
    best, since, count, floor = np.inf, 0, 0, _REGULARISATION_LAST
    live = 0
    for i in range(p):
        live += not (i < mi and item.absent[me + i])
    reached = False
    while True:
        times_h(pattern, item.h, x, hx)
        forces[:] = 0.0
        _add_forces(pattern, item, y, z, forces)
        times_c(pattern, item, x, ex, cx)
        gap, objective, worst_d, worst_p = 0.0, 0.0, 0.0, 0.0
        largest_d, largest_p = 0.0, 0.0
        for j in range(n):
            rd[j] = 0.0 if item.fixed[j] else item.a[j] - hx[j] - forces[j]
            worst_d = max(worst_d, abs(rd[j]))
            if not item.fixed[j]:
                largest_d = max(largest_d, abs(hx[j]), abs(forces[j]))
            objective += x[j] * (0.5 * hx[j] - item.a[j])
        for i in range(me):
            rp[i] = 0.0 if item.absent[i] else item.rhs[i] - ex[i]
            worst_p = max(worst_p, abs(rp[i]))
            largest_p = max(largest_p, abs(ex[i]))
        for i in range(p):
            if i < mi and item.absent[me + i]:
                rc[i] = 0.0
                continue
            rc[i] = item.d[i] - cx[i] - s[i]
            worst_p = max(worst_p, abs(rc[i]))
            largest_p = max(largest_p, abs(cx[i]))
            gap += s[i] * z[i]
        error = max(worst_d / (1.0 + largest_d), worst_p / (1.0 + largest_p), gap / (1.0 + abs(objective)))
        if not np.isfinite(error):
            break
        since += 1
        if error < 0.9 * best:
            best, since = error, 0
            bx[:] = x
            by[:] = y
            bz[:] = z
            bs[:] = s
        if error <= accuracy:
            reached = True
            break
        if count >= _STEPS or since > 10:
            break
        count += 1
        mu = gap / max(live, 1)
        missed = max(worst_d, worst_p)
        for i in range(p):
            t[i] = s[i] / z[i]
        delta = max(floor, min(_REGULARISATION_FIRST, max(_REGULARISATION_LAST, 1e-2 * mu, 1e-2 * missed)))
        while factor_kkt(pattern, item, factor, t, delta) > 0 and delta < 1e-3:
            delta = floor = 10.0 * delta
        fine = 1e-10 if error > 1e-6 else 1e-12
        for i in range(p):
            r3[i] = 0.0 if i < mi and item.absent[me + i] else rc[i] + s[i]
        if live > 0:
            newton(pattern, item, factor, t, delta, delta, rd, rp, r3, dx, dy, dz, room, 1e-4, 2)
        else:
            newton(pattern, item, factor, t, delta, delta, rd, rp, r3, dx, dy, dz, room, fine, 5)
        for i in range(p):
            ds[i] = -s[i] - t[i] * dz[i]
            if i < mi and item.absent[me + i]:
                ds[i] = dz[i] = 0.0
        primal, dual = _longest(s, ds), _longest(z, dz)
        if live > 0:
            if not linear:
                primal = dual = min(primal, dual)
            after = 0.0
            for i in range(p):
                if not (i < mi and item.absent[me + i]):
                    after += (s[i] + primal * ds[i]) * (z[i] + dual * dz[i])
            after /= live
            centre = (max(after, 0.0) / mu) ** 3 * mu
            predicted = min(primal, dual)
            for attempt in range(2):
                for i in range(p):
                    # The second-order term is wrong where the first step is cut short: then centre instead.
                    target = centre - ds[i] * dz[i] if attempt == 0 else max(centre, 0.3 * mu)
                    ds[i] = (target - s[i] * z[i]) / z[i]
                    r3[i] = 0.0 if i < mi and item.absent[me + i] else rc[i] - ds[i]
                newton(pattern, item, factor, t, delta, delta, rd, rp, r3, dx, dy, dz, room, fine, 4)
                for i in range(p):
                    ds[i] -= t[i] * dz[i]
                    if i < mi and item.absent[me + i]:
                        ds[i] = dz[i] = 0.0
                primal, dual = _longest(s, ds), _longest(z, dz)
                if min(primal, dual) >= 0.1 * min(predicted, 0.5):
                    break
        back = max(0.99, 1.0 - mu) if mu < 1.0 else 0.99
        worst_s, worst_z = back, back
        for i in range(p):
            worst_s = max(worst_s, -ds[i] / s[i])
            worst_z = max(worst_z, -dz[i] / z[i])
        primal, dual = back / worst_s, back / worst_z
        if not linear:
            primal = dual = min(primal, dual)
        for j in range(n):
            x[j] += primal * dx[j]
        for i in range(me):
            y[i] += dual * dy[i]
        for i in range(p):
            # Rounding, or underflow, must not bring a slack or a multiplier to zero.
            s[i] = max(s[i] + primal * ds[i], _POSITIVE)
            z[i] = max(z[i] + dual * dz[i], _POSITIVE)
    x[:] = bx
    y[:] = by
    z[:] = bz
    s[:] = bs
    return count if reached else -1 - count


@inline_kernel
def _with_unit_equalities(pattern, item, factor, t, delta):
    """Write and factor the matrix with -1 on the diagonal of the equalities; return whether no pivot was replaced."""
    _assemble(pattern, item, factor, t, delta)
    for i in range(pattern.me):
        factor.k[pattern.of_diagonal[pattern.n + i]] = -_HUGE if item.absent[i] else -1.0
    return _factorise(pattern, factor, delta) == 0


@inline_kernel
def convex(pattern, item, factor):
    """Whether H + E'E has no negative curvature up to rounding, so that H has none where the equalities hold."""
    simple = True
    for j in range(pattern.n):
        for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
            simple = simple and (item.h[p] >= 0.0 if pattern.h_col[p] == j else item.h[p] == 0.0)
    return simple or _with_unit_equalities(pattern, item, factor, np.full(item.p, _HUGE), 1e-9)


@inline_kernel
def set_start(pattern, item, factor, x, y, z, s):
    """Set the least-squares point, its slacks and multipliers shifted to be positive."""
    t = np.ones(item.p)
    right = item.d.copy()
    for i in range(pattern.m - pattern.me):
        if item.absent[pattern.me + i]:
            right[i] = 0.0
    room = make_room(pattern, item)
    delta = _REGULARISATION_FIRST
    factor_kkt(pattern, item, factor, t, delta)
    newton(pattern, item, factor, t, delta, delta, item.a, item.rhs, right, x, y, z, room, 1e-8, 2)
    low_s, low_z = 1.0, 1.0
    for i in range(item.p):
        if i < pattern.m - pattern.me and item.absent[pattern.me + i]:
            z[i] = -1.0
        low_s, low_z = min(low_s, -z[i]), min(low_z, z[i])
    for i in range(item.p):
        s[i] = -z[i] if low_s > 0.0 else -z[i] + (1.0 - low_s)
        z[i] = z[i] if low_z > 0.0 else z[i] + (1.0 - low_z)
        if i < pattern.m - pattern.me and item.absent[pattern.me + i]:
            s[i] = z[i] = 1.0


@inline_kernel
def face_point(pattern, item, factor, active, x, y, z):
    """Solve the KKT system with the active rows at their limits and the others without a multiplier, in place.

    Returns:
        The relative error of the step; NaN never.
    """
    n, me, p = pattern.n, pattern.me, item.p
    r1, r2, r3, t = np.empty(n), np.empty(me), np.empty(p), np.empty(p)
    dx, dy, dz = np.empty(n), np.empty(me), np.empty(p)
    room = make_room(pattern, item)
    for i in range(p):
        t[i] = 0.0 if active[i] else _HUGE
        if not active[i]:
            z[i] = 0.0
    error = np.inf
    for delta in (1e-9, 1e-8, 1e-7, 1e-6):
        # A pivot that rounding made useless is felt by all that follow; the last attempt lives with it.
        if factor_kkt(pattern, item, factor, t, delta) > 0 and delta < 1e-6:
            continue
        times_h(pattern, item.h, x, r1)
        _add_forces(pattern, item, y, z, r1)
        for j in range(n):
            r1[j] = 0.0 if item.fixed[j] else item.a[j] - r1[j]
        times_c(pattern, item, x, r2, r3)
        for i in range(me):
            r2[i] = 0.0 if item.absent[i] else item.rhs[i] - r2[i]
        for i in range(p):
            r3[i] = item.d[i] - r3[i] if active[i] else 0.0
        error = newton(pattern, item, factor, t, delta, 0.0, r1, r2, r3, dx, dy, dz, room, 1e-16, 8)
        if not np.isfinite(error):
            error = np.inf
            continue
        x += dx
        y += dy
        for i in range(p):
            if active[i]:
                z[i] += dz[i]
        if error < 1e-6:
            break
    return error


@inline_kernel
def null_parts(pattern, item, factor, active, read):
    """Look for null vectors of the KKT matrix ``[H, N'; N, 0]`` of the active rows: directions, sums of rows.

    Inverse iteration with ``J = diag(I, -I)``: ``(K + rho J) v+ = rho J v`` keeps the null vectors, and multiplies what
    belongs to a curvature or a squared singular value c by about ``rho / c``.

    Returns:
        Whether surely no direction that is read is a null vector, no direction at all, and no combination of rows.
    """
    n, me, p = pattern.n, pattern.me, item.p
    t = np.empty(p)
    r1, r2, r3, u, v, w = np.empty(n), np.empty(me), np.empty(p), np.empty(n), np.empty(me), np.empty(p)
    room = make_room(pattern, item)
    for i in range(p):
        t[i] = 0.0 if active[i] else _HUGE
    for rho in (1e-8, 1e-7, 1e-6):
        # Dependent rows cancel in the pivots: what is left of rho there has to be more than rounding.
        if factor_kkt(pattern, item, factor, t, rho) > 0:
            continue
        state = np.uint64(88172645463325252)
        for k in range(n + me + p):
            # xorshift: the same numbers for every item
            state ^= state << np.uint64(13)
            state ^= state >> np.uint64(7)
            state ^= state << np.uint64(17)
            value = float(state >> np.uint64(11)) / 4503599627370496.0 - 1.0
            if k < n:
                u[k] = 0.0 if item.fixed[k] else value
            elif k < n + me:
                v[k - n] = 0.0 if item.absent[k - n] else value
            else:
                w[k - n - me] = value if active[k - n - me] else 0.0
        error = 0.0
        for _ in range(4):
            for j in range(n):
                r1[j] = rho * u[j]
            for i in range(me):
                r2[i] = -rho * v[i]
            for i in range(p):
                r3[i] = -rho * w[i] if active[i] else 0.0
            error = max(error, newton(pattern, item, factor, t, rho, rho, r1, r2, r3, u, v, w, room, 1e-11, 8))
            if not error <= 1e-8:
                break
        if not error <= 1e-8:
            continue
        seen, direction, combination = 0.0, 0.0, 0.0
        for j in range(n):
            direction += u[j] * u[j]
            seen += u[j] * u[j] if read[j] else 0.0
        for i in range(me):
            combination += v[i] * v[i]
        for i in range(p):
            if active[i]:
                combination += w[i] * w[i]
        return seen < 1e-12, direction < 1e-12, combination < 1e-12
    return False, False, False


@inline_kernel
def on_rows(pattern, nv, x, rhs, sides):
    """Whether a point lies on the active rows up to rounding."""
    rounding = 1e-14 if pattern.n <= 100 else 1e-12
    for i in range(pattern.m):
        if sides[i] != 0:
            value, total = 0.0, 0.0
            for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
                entry = nv[p] * x[pattern.n_col[p]]
                value += entry
                total += abs(entry)
            if abs(value - rhs[i]) > rounding * (total + abs(rhs[i])):
                return False
    return True


@inline_kernel
def least_norm_multipliers(pattern, item, factor, face, units, target, y, z):
    """Set the multipliers of least norm among those of the right sign that combine the active rows to ``target``.

    ``minimise 1/2 (y, z)'U(y, z)  subject to  E'y + C'z = target,  z >= 0`` and zero off the face, U the squares of the
    units. Its solution is ``y = U^-1 E p, z = max(0, U^-1 C p)``, found by Newton steps on p: the KKT matrix without H
    and with U in the place of the slack-to-multiplier ratios, for the rows that push.

    Returns:
        Whether the signs settled and the combination is exact up to rounding.
    """
    n, me, p = pattern.n, pattern.me, item.p
    # The equalities have units of their own, which the factorisation has no place for: they are scaled instead.
    scaled = item.nv.copy()
    for i in range(me):
        for q in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
            scaled[q] = item.nv[q] / np.sqrt(units[i])
    none = np.zeros(item.h.shape[0])
    flat = Item(p, none, scaled, item.a, item.rhs, item.d, item.at_lower, item.at_upper, item.fixed, item.absent)
    t, pushing = np.empty(p), face.copy()
    v, r2, r3 = np.empty(n), np.zeros(me), np.zeros(p)
    r1 = np.empty(n)
    ex, cx = np.empty(me), np.empty(p)
    size = max(norm_inf(target), 1e-300)
    delta = 1e-9
    for _ in range(20):
        for i in range(p):
            t[i] = units[me + i] if pushing[i] else _HUGE
        # Proximal steps on p, and 1 in the place of the units of the equalities: both by refinement with shift 0.
        if not _with_unit_equalities(pattern, flat, factor, t, delta):
            return False
        v[:] = 0.0
        y[:] = 0.0
        z[:] = 0.0
        dy, dz, dv = np.empty(me), np.empty(p), np.empty(n)
        previous = np.inf
        for _ in range(12):
            r1[:] = 0.0
            _add_forces(pattern, flat, y, z, r1)
            worst = 0.0
            for j in range(n):
                r1[j] = 0.0 if item.fixed[j] else target[j] - r1[j]
                worst = max(worst, abs(r1[j]))
            times_c(pattern, flat, v, ex, cx)
            for i in range(me):
                r2[i] = 0.0 if item.absent[i] else y[i] - ex[i]
                worst = max(worst, abs(r2[i]))
            for i in range(p):
                r3[i] = units[me + i] * z[i] - cx[i] if pushing[i] else 0.0
            if worst <= 1e-16 * size or not worst < 0.9 * previous:
                break
            previous = worst
            _substitute(pattern, flat, factor, t, delta, r1, r2, r3, dv, dy, dz)
            for j in range(n):
                v[j] += dv[j]
            for i in range(me):
                y[i] += 0.0 if item.absent[i] else dy[i]
            for i in range(p):
                if pushing[i]:
                    z[i] += dz[i]
        times_c(pattern, flat, v, ex, cx)
        largest, changed = 0.0, False
        for i in range(p):
            largest = max(largest, abs(z[i]) * np.sqrt(units[me + i]))
        for i in range(p):
            if face[i]:
                push = cx[i] > 1e-13 * largest * np.sqrt(units[me + i])
                drop = z[i] * np.sqrt(units[me + i]) < -1e-13 * largest
                if (pushing[i] and drop) or (not pushing[i] and push):
                    pushing[i] = not pushing[i]
                    changed = True
        if not changed:
            exact = worst <= 1e-12 * size
            for i in range(me):
                y[i] /= np.sqrt(units[i])
            for i in range(p):
                z[i] = max(z[i], 0.0)
            return exact
    return False


@inline_kernel
def equilibrate(pattern, h, nv, columns, weights):
    """Set scales of the variables and rows, powers of two, by which the largest entries become about one (Ruiz)."""
    n, m = pattern.n, pattern.m
    columns[:] = 1.0
    weights[:] = 1.0
    by_column, by_row = np.empty(n), np.empty(m)
    for _ in range(10):
        by_column[:] = 0.0
        lowest, highest = np.inf, 0.0
        for j in range(n):
            for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
                by_column[j] = max(by_column[j], abs(h[p]) * columns[j] * columns[pattern.h_col[p]])
        for i in range(m):
            by_row[i] = 0.0
            for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
                j = pattern.n_col[p]
                entry = abs(nv[p]) * weights[i] * columns[j]
                by_row[i] = max(by_row[i], entry)
                by_column[j] = max(by_column[j], entry)
            if by_row[i] > 0.0:
                lowest, highest = min(lowest, by_row[i]), max(highest, by_row[i])
        for j in range(n):
            if by_column[j] > 0.0:
                lowest, highest = min(lowest, by_column[j]), max(highest, by_column[j])
        if highest <= 4.0 and lowest >= 0.25:
            break
        for j in range(n):
            if by_column[j] > 0.0:
                columns[j] /= np.sqrt(by_column[j])
        for i in range(m):
            if by_row[i] > 0.0:
                weights[i] /= np.sqrt(by_row[i])
    for j in range(n):
        columns[j] = power_of_two(columns[j])
    for i in range(m):
        weights[i] = power_of_two(weights[i])


@inline_kernel
def power_of_two(value):
    return 2.0 ** min(max(np.rint(np.log2(value)), -60.0), 60.0)
