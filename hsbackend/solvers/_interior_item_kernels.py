# pyright: reportMissingParameterType=false
"""Compiled loops of :mod:`hsbackend.solvers.compiled_interior` over the items of a batch."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from hsbackend._parallel import compile_kernel, inline_kernel
from hsbackend._sparse_kernels import kkt_residual
from hsbackend.solvers._interior_kernels import (
    Factor,
    Item,
    convex,
    equilibrate,
    face_point,
    factor_kkt,
    least_norm_multipliers,
    make_room,
    newton,
    norm_inf,
    null_parts,
    on_rows,
    power_of_two,
    set_start,
    take_steps,
    times_c,
    times_h,
)

#: One item in the units of the data: entries of H and N, the diagonal of H, the right-hand sides, limits of all
#: variables, and which variables are fixed by them and which rows do not exist.
_Data = namedtuple("_Data", "h nv curvature a rhs low high fixed absent")
#: The units of a scaled item: x = columns * x', rows times weights, cost times cost.
_Units = namedtuple("_Units", "columns weights cost")
#: Multipliers in the units of the data: of the rows, and, signed, of the limits of all variables.
_Multipliers = namedtuple("_Multipliers", "nu mu")

#: How often the face is corrected by wrong signs.
_CORRECTIONS = 6
#: Outcomes.
FAILED, SOLVED, SOLVED_UNIQUE = 0, 1, 2


@inline_kernel
def _load(pattern, matrix, diagonal, normals, a, rhs, bounded, lower, upper):
    """Return an item, and whether its numbers are finite and its limits do not cross."""
    n, me, m = pattern.n, pattern.me, pattern.m
    h, nv = np.empty(pattern.h_col.shape[0]), np.empty(pattern.n_col.shape[0])
    low, high, curvature = np.full(n, -np.inf), np.full(n, np.inf), np.zeros(n)
    fixed, absent = np.zeros(n, dtype=np.bool_), np.zeros(m, dtype=np.bool_)
    valid = True
    for j in range(n):
        for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
            h[p] = matrix[0, j] if diagonal else matrix[j, pattern.h_col[p]]
            valid = valid and np.isfinite(h[p])
            if pattern.h_col[p] == j:
                curvature[j] = h[p]
        valid = valid and np.isfinite(a[j])
    for i in range(m):
        empty = True
        for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
            nv[p] = normals[i, pattern.n_col[p]]
            valid = valid and np.isfinite(nv[p])
            empty = empty and nv[p] == 0.0
        if empty:
            valid = valid and (rhs[i] == 0.0 or (i >= me and rhs[i] > 0.0))
        absent[i] = empty or rhs[i] == np.inf
        valid = valid and rhs[i] > -np.inf and (i >= me or rhs[i] < np.inf)
    for i in range(bounded.shape[0]):
        j = bounded[i]
        low[j], high[j] = lower[i], upper[i]
        fixed[j] = low[j] == high[j]
        valid = valid and low[j] <= high[j] and low[j] < np.inf and high[j] > -np.inf
    return _Data(h, nv, curvature, a, rhs, low, high, fixed, absent), valid


@inline_kernel
def _scale(pattern, data):
    """Return an item in scaled units, fixed variables taken out, and the units."""
    n, me, m = pattern.n, pattern.me, pattern.m
    columns, weights = np.empty(n), np.empty(m)
    equilibrate(pattern, data.h, data.nv, columns, weights)
    a, right, held, curved = data.a.copy(), data.rhs.copy(), np.empty(n), np.empty(n)
    count_lower, count_upper = 0, 0
    for j in range(n):
        held[j] = data.low[j] if data.fixed[j] else 0.0
        count_lower += data.low[j] > -np.inf and not data.fixed[j]
        count_upper += data.high[j] < np.inf and not data.fixed[j]
    if data.fixed.any():
        times_h(pattern, data.h, held, curved)
        a -= curved
        for i in range(m):
            for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
                right[i] -= data.nv[p] * held[pattern.n_col[p]]
    h, nv = np.empty(data.h.shape[0]), np.empty(data.nv.shape[0])
    size = 0.0
    for j in range(n):
        a[j] *= columns[j]
        size = max(size, 0.0 if data.fixed[j] else abs(a[j]))
        for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
            h[p] = data.h[p] * columns[j] * columns[pattern.h_col[p]]
            size = max(size, abs(h[p]))
    cost = power_of_two(1.0 / size) if size > 0.0 else 1.0
    h *= cost
    a *= cost
    for i in range(m):
        right[i] *= weights[i]
        for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
            nv[p] = data.nv[p] * weights[i] * columns[pattern.n_col[p]]
    at_lower, at_upper = np.empty(count_lower, dtype=np.int64), np.empty(count_upper, dtype=np.int64)
    mi = m - me
    limits = np.empty(mi + count_lower + count_upper)
    limits[:mi] = right[me:]
    lower, upper = 0, 0
    for j in range(n):
        if data.low[j] > -np.inf and not data.fixed[j]:
            at_lower[lower] = j
            limits[mi + lower] = -data.low[j] / columns[j]
            lower += 1
        if data.high[j] < np.inf and not data.fixed[j]:
            at_upper[upper] = j
            limits[mi + count_lower + upper] = data.high[j] / columns[j]
            upper += 1
    item = Item(limits.shape[0], h, nv, a, right[:me].copy(), limits, at_lower, at_upper, data.fixed, data.absent)
    return item, _Units(columns, weights, cost)


@inline_kernel
def _make_factor(pattern):
    size = pattern.n + pattern.m
    return Factor(
        np.empty(pattern.k_row.shape[0]), np.empty(pattern.l_row.shape[0]), np.empty(size), np.empty(size),
        np.empty(size, dtype=np.int64), np.empty(size),
    )  # fmt: skip


@inline_kernel
def _measure(pattern, data, x, multipliers):
    """Return the largest relative residual of the KKT conditions in the data; infinite for NaN."""
    found = kkt_residual(
        pattern.h_ptr, pattern.h_col, data.h, data.curvature, pattern.n_ptr, pattern.n_col, data.nv, pattern.me, data.a,
        data.rhs, data.low, data.high, x, multipliers.nu, multipliers.mu,
    )  # fmt: skip
    return found if np.isfinite(found) else np.inf


@inline_kernel
def _to_data(pattern, data, item, units, x, y, z, multipliers):
    """Set the multipliers of a point x (n,), in the units of the data, from scaled ones; those below zero are zero."""
    me, mi = pattern.me, pattern.m - pattern.me
    nu, mu = multipliers.nu, multipliers.mu
    for i in range(pattern.m):
        value = y[i] if i < me else max(z[i - me], 0.0)
        nu[i] = 0.0 if item.absent[i] else units.weights[i] * value / units.cost
    mu[:] = 0.0
    place = mi
    for j in item.at_lower:
        mu[j] -= max(z[place], 0.0) / (units.cost * units.columns[j])
        place += 1
    for j in item.at_upper:
        mu[j] += max(z[place], 0.0) / (units.cost * units.columns[j])
        place += 1
    if data.fixed.any():  # fixed variables take what is left
        rest = np.empty(pattern.n)
        times_h(pattern, data.h, x, rest)
        for i in range(pattern.m):
            for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
                rest[pattern.n_col[p]] += data.nv[p] * nu[i]
        for j in range(pattern.n):
            if data.fixed[j]:
                mu[j] = data.a[j] - rest[j]


@inline_kernel
def _on_face(pattern, data, item, units, factor, bounded, x, y, z, s, multipliers, best, found):
    """Solve on the face of the rows with ``z > s``, correct it by wrong signs, and keep the best point in ``found``.

    Returns:
        The residual of the best point, which may be the one that came in.
    """
    me = pattern.me
    mi, count_lower = pattern.m - me, item.at_lower.shape[0]
    primal, rows, bounds = found
    active = np.zeros(item.p, dtype=np.bool_)
    point, ex, cx = np.empty(pattern.n), np.empty(me), np.empty(item.p)
    for i in range(item.p):
        active[i] = z[i] > s[i] and not (i < mi and item.absent[me + i])
    fx, fy, fz = x.copy(), y.copy(), np.where(active, z, 0.0)
    for _ in range(_CORRECTIONS + 1):
        if not np.isfinite(face_point(pattern, item, factor, active, fx, fy, fz)):
            break
        for j in range(pattern.n):
            point[j] = data.low[j] if data.fixed[j] else units.columns[j] * fx[j]
        # Exact limits where they hold.
        for i in range(count_lower):
            if active[mi + i]:
                point[item.at_lower[i]] = data.low[item.at_lower[i]]
        for i in range(item.at_upper.shape[0]):
            if active[mi + count_lower + i]:
                point[item.at_upper[i]] = data.high[item.at_upper[i]]
        _to_data(pattern, data, item, units, point, fy, fz, multipliers)
        reached = _measure(pattern, data, point, multipliers)
        if reached < best:
            best = reached
            primal[:] = point
            rows[:] = multipliers.nu
            for i in range(bounded.shape[0]):
                bounds[i] = multipliers.mu[bounded[i]]
        if reached <= 1e-15:
            break
        times_c(pattern, item, fx, ex, cx)
        size_z, size_x, wrong = norm_inf(fz), norm_inf(fx), 0
        for i in range(item.p):
            if i < mi and item.absent[me + i]:
                continue
            if active[i]:
                turn = fz[i] < -1e-14 * (1.0 + size_z)
            else:
                turn = item.d[i] - cx[i] < -1e-14 * (1.0 + size_x + abs(item.d[i]))
            if turn:
                active[i] = not active[i]
                wrong += 1
        if wrong == 0:
            break
    return best


@inline_kernel
def _sides(
    pattern, data, bounded, lower, upper, hold, active_tolerance, primal, rows, bounds, side_rows, side_bounds, has,
    has_bound,
):  # fmt: skip
    """Set the sides of K, and which rows and bounds have a multiplier: the others of K are at their limit."""
    me = pattern.me
    size, cost, curvature = norm_inf(primal), norm_inf(data.a), norm_inf(data.h)
    tiny = max(1e-9 * cost, 1e-12 * curvature * (1.0 + size))
    if cost == 0.0 and curvature == 0.0:
        tiny = np.inf
    allowed = active_tolerance * (1.0 + size)
    for i in range(pattern.m):
        norm, value = 0.0, 0.0
        for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
            norm += data.nv[p] * data.nv[p]
            value += data.nv[p] * primal[pattern.n_col[p]]
        norm = np.sqrt(norm)
        has[i] = i < me or abs(rows[i]) * norm > tiny
        side_rows[i] = 1 if has[i] else 0
        if hold and not has[i] and not data.absent[i]:
            limit = active_tolerance * abs(data.rhs[i]) + allowed * norm
            side_rows[i] = 1 if data.rhs[i] - value <= limit else 0
    for i in range(bounded.shape[0]):
        value, at = bounds[i], primal[bounded[i]]
        has_bound[i] = abs(value) > tiny
        side = (1 if value > 0.0 else -1) if has_bound[i] else 0
        if side == 0 and (hold or lower[i] == upper[i]):
            if upper[i] < np.inf and upper[i] - at <= allowed + active_tolerance * abs(upper[i]):
                side = 1
            elif lower[i] > -np.inf and at - lower[i] <= allowed + active_tolerance * abs(lower[i]):
                side = -1
        side_bounds[i] = side


@inline_kernel
def _face_of(pattern, item, bound_at, side_rows, side_bounds):
    """Return the inequality rows and limits of the scaled item that belong to the sides."""
    mi, count_lower = pattern.m - pattern.me, item.at_lower.shape[0]
    face = np.zeros(item.p, dtype=np.bool_)
    for i in range(mi):
        face[i] = side_rows[pattern.me + i] != 0 and not item.absent[pattern.me + i]
    for i in range(count_lower):
        face[mi + i] = side_bounds[bound_at[item.at_lower[i]]] < 0
    for i in range(item.at_upper.shape[0]):
        face[mi + count_lower + i] = side_bounds[bound_at[item.at_upper[i]]] > 0
    return face


@inline_kernel
def _settle(
    pattern, data, item, units, factor, bounded, face, limit, primal, rows, bounds, side_rows, multipliers
):  # fmt: skip
    """Choose the multipliers of least norm, if the point lies on the face up to rounding; return whether it worked."""
    if data.fixed.any() or not on_rows(pattern, data.nv, primal, data.rhs, side_rows):
        return False
    m, count_lower = pattern.m, item.at_lower.shape[0]
    size, scaled, forces = np.empty(pattern.me + item.p), np.empty(pattern.n), np.empty(pattern.n)
    for i in range(m):
        size[i] = units.weights[i] ** 2
    for i in range(count_lower):
        size[m + i] = units.columns[item.at_lower[i]] ** -2.0
    for i in range(item.at_upper.shape[0]):
        size[m + count_lower + i] = units.columns[item.at_upper[i]] ** -2.0
    scaled[:] = primal / units.columns
    times_h(pattern, item.h, scaled, forces)
    forces[:] = item.a - forces
    y, z = np.empty(pattern.me), np.empty(item.p)
    if not least_norm_multipliers(pattern, item, factor, face, size, forces, y, z):
        return False
    _to_data(pattern, data, item, units, primal, y, z, multipliers)
    if not _measure(pattern, data, primal, multipliers) <= limit:
        return False
    rows[:] = multipliers.nu
    for i in range(bounded.shape[0]):
        bounds[i] = multipliers.mu[bounded[i]]
    return True


@compile_kernel
def solve_items(
    start, stop, step, pattern, hessian, diagonal, linear, rows, rhs, bounded, lower, upper, read, tolerance, hold,
    active_tolerance, primal, row_multipliers, bound_multipliers, outcome, regular, independent, settled, steps,
    side_rows, side_bounds,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Solve the items ``start, start + step, ...``.

    ``hessian`` (1 or B, n, n), or (1 or B, 1, n) for a diagonal, ``rows`` (1 or B, m, n): entries outside of the
    pattern are zero. ``hold`` puts all rows at their limit into the sides, otherwise those with a multiplier.
    ``outcome`` says which came out, and which are surely unique; ``regular`` whose KKT matrix on the face surely has no
    null vector, ``independent`` whose active rows have none, ``settled`` whose active rows may be dependent, but have
    the multipliers of least norm.
    """
    n, me, nb = pattern.n, pattern.me, bounded.shape[0]
    bound_at = np.full(n, -1, dtype=np.int64)
    for i in range(nb):
        bound_at[bounded[i]] = i
    factor, multipliers = _make_factor(pattern), _Multipliers(np.empty(pattern.m), np.empty(n))
    has, has_bound = np.empty(pattern.m, dtype=np.bool_), np.empty(nb, dtype=np.bool_)
    for b in range(start, stop, step):
        outcome[b] = FAILED
        matrix = hessian[b if hessian.shape[0] > 1 else 0]
        normals = rows[b if rows.shape[0] > 1 else 0]
        data, valid = _load(pattern, matrix, diagonal, normals, linear[b], rhs[b], bounded, lower[b], upper[b])
        if not valid:
            continue
        item, units = _scale(pattern, data)
        if not convex(pattern, item, factor):
            continue
        x, y, z, s = np.zeros(n), np.zeros(me), np.empty(item.p), np.empty(item.p)
        set_start(pattern, item, factor, x, y, z, s)
        best = np.inf
        found = primal[b], row_multipliers[b], bound_multipliers[b]
        for accuracy in (1e-9, 1e-12):
            taken = take_steps(pattern, item, factor, accuracy, x, y, z, s)
            steps[b] += taken if taken >= 0 else -1 - taken
            best = _on_face(pattern, data, item, units, factor, bounded, x, y, z, s, multipliers, best, found)
            if best <= 1e-4 * tolerance or taken < 0:
                break
        if not best <= tolerance:
            continue
        outcome[b] = SOLVED
        _sides(
            pattern, data, bounded, lower[b], upper[b], hold, active_tolerance, primal[b], row_multipliers[b],
            bound_multipliers[b], side_rows[b], side_bounds[b], has, has_bound,
        )  # fmt: skip
        face = _face_of(pattern, item, bound_at, side_rows[b], side_bounds[b])
        unique, regular[b], independent[b] = null_parts(pattern, item, factor, face, read)
        independent[b] = independent[b] and not data.absent[:me].any()  # an empty row depends on anything
        regular[b] = regular[b] and independent[b]
        if unique:
            support = _face_of(pattern, item, bound_at, has, np.where(has_bound, side_bounds[b], 0))
            if (support != face).any():
                unique = null_parts(pattern, item, factor, support, read)[0]
        if hold and not independent[b]:
            settled[b] = _settle(
                pattern, data, item, units, factor, bounded, face, max(10.0 * best, 1e-11), primal[b],
                row_multipliers[b], bound_multipliers[b], side_rows[b], multipliers,
            )  # fmt: skip
        if unique:
            outcome[b] = SOLVED_UNIQUE


@compile_kernel
def settle_items(
    start, stop, step, pattern, hessian, diagonal, linear, rows, rhs, bounded, lower, upper, items, primal,
    row_multipliers, bound_multipliers, side_rows, side_bounds, settled,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Choose the multipliers of least norm on the faces of the given items; ``settled`` says where that worked."""
    n, nb = pattern.n, bounded.shape[0]
    bound_at = np.full(n, -1, dtype=np.int64)
    for i in range(nb):
        bound_at[bounded[i]] = i
    factor, multipliers = _make_factor(pattern), _Multipliers(np.empty(pattern.m), np.empty(n))
    for place in range(start, stop, step):
        b = items[place]
        matrix = hessian[b if hessian.shape[0] > 1 else 0]
        normals = rows[b if rows.shape[0] > 1 else 0]
        data, valid = _load(pattern, matrix, diagonal, normals, linear[b], rhs[b], bounded, lower[b], upper[b])
        if not valid:
            continue
        item, units = _scale(pattern, data)
        face = _face_of(pattern, item, bound_at, side_rows[b], side_bounds[b])
        settled[b] = _settle(
            pattern, data, item, units, factor, bounded, face, 1e-11, primal[b], row_multipliers[b],
            bound_multipliers[b], side_rows[b], multipliers,
        )  # fmt: skip


@compile_kernel
def kkt_items(
    start, stop, step, pattern, hessian, diagonal, rows, bounded, side_rows, side_bounds, items, rhs_primal, rhs_rows,
    rhs_bounds, primal, row_multipliers, bound_multipliers, done,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Solve the KKT systems on the faces of the given items; ``done`` says where the refinement converged."""
    n, me, m, nb = pattern.n, pattern.me, pattern.m, bounded.shape[0]
    mi, size = m - me, n + m
    h, nv = np.empty(pattern.h_col.shape[0]), np.empty(pattern.n_col.shape[0])
    columns, weights, held = np.empty(n), np.empty(m), np.empty(n)
    none = np.empty(0, dtype=np.int64)
    factor = Factor(
        np.empty(pattern.k_row.shape[0]), np.empty(pattern.l_row.shape[0]), np.empty(size), np.empty(size),
        np.empty(size, dtype=np.int64), np.empty(size),
    )  # fmt: skip
    r1, r2, r3, t = np.empty(n), np.empty(me), np.empty(mi), np.empty(mi)
    x, y, z, fixed = np.empty(n), np.empty(me), np.empty(mi), np.empty(n, dtype=np.bool_)
    for place in range(start, stop, step):
        b = items[place]
        matrix = hessian[b if hessian.shape[0] > 1 else 0]
        normals = rows[b if rows.shape[0] > 1 else 0]
        for j in range(n):
            held[j], fixed[j] = 0.0, False
            for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
                l = pattern.h_col[p]
                h[p] = matrix[j, l] if not diagonal else (matrix[0, j] if l == j else 0.0)
        for i in range(m):
            for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
                nv[p] = normals[i, pattern.n_col[p]]
        for i in range(nb):
            if side_bounds[b, i] != 0:
                fixed[bounded[i]] = True
                held[bounded[i]] = rhs_bounds[b, i]
        equilibrate(pattern, h, nv, columns, weights)
        times_h(pattern, h, held, r1)
        absent = np.zeros(m, dtype=np.bool_)
        for j in range(n):
            r1[j] = columns[j] * (rhs_primal[b, j] - r1[j])
        for i in range(m):
            value = rhs_rows[b, i] if side_rows[b, i] != 0 else 0.0
            for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
                if side_rows[b, i] != 0:
                    value -= nv[p] * held[pattern.n_col[p]]
                nv[p] *= weights[i] * columns[pattern.n_col[p]]
            absent[i] = side_rows[b, i] == 0
            if i < me:
                r2[i] = weights[i] * value
            else:
                r3[i - me], t[i - me] = weights[i] * value, 0.0
        for j in range(n):
            for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
                h[p] *= columns[j] * columns[pattern.h_col[p]]
            if fixed[j]:
                r1[j] = 0.0
        item = Item(mi, h, nv, r1, r2, r3, none, none, fixed, absent)
        room = make_room(pattern, item)
        error = np.inf
        for delta in (1e-10, 1e-8, 1e-6):
            if factor_kkt(pattern, item, factor, t, delta) > 0:
                continue
            error = newton(pattern, item, factor, t, delta, 0.0, r1, r2, r3, x, y, z, room, 1e-16, 12)
            if error <= 1e-11:
                break
        done[b] = error <= 1e-11
        for j in range(n):
            primal[b, j] = held[j] if fixed[j] else columns[j] * x[j]
        for i in range(m):
            value = y[i] if i < me else z[i - me]
            row_multipliers[b, i] = 0.0 if absent[i] else weights[i] * value
        # What the held variables leave of their row of the system is the multiplier of their bound.
        for i in range(nb):
            j = bounded[i]
            bound_multipliers[b, i] = 0.0
            if side_bounds[b, i] != 0:
                value = rhs_primal[b, j]
                for p in range(pattern.h_ptr[j], pattern.h_ptr[j + 1]):
                    l = pattern.h_col[p]
                    value -= h[p] / (columns[j] * columns[l]) * primal[b, l]
                held[j] = value
        for i in range(m):
            if not absent[i]:
                for p in range(pattern.n_ptr[i], pattern.n_ptr[i + 1]):
                    j = pattern.n_col[p]
                    if fixed[j]:
                        held[j] -= nv[p] / (weights[i] * columns[j]) * row_multipliers[b, i]
        for i in range(nb):
            if side_bounds[b, i] != 0:
                bound_multipliers[b, i] = held[bounded[i]]
