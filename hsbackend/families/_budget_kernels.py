"""Compiled projections onto a box with one row, and onto the l1 ball, and the KKT solves on their faces.

    x(tau) = clip(v - tau c/h, lower, upper),      phi(tau) = c'x(tau),

phi is piecewise linear and nonincreasing; tau is the multiplier of the row where ``phi(tau) = target``. Newton's method
on phi is finite where it is convex (the simplex), and kept inside a bracket where it is not.

To be right to the last digits of x also where tau is many orders larger, points are shifted by a first tau, the search
goes on from there, and what is left of the row's residual is spread over the free coordinates.

Sources: Michelot, "A finite algorithm for finding the projection of a point onto the canonical simplex" (1986);
Cominetti, Mascarenhas and Silva, "A Newton's method for the continuous quadratic knapsack problem" (2014).
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from hsbackend._parallel import compile_kernel, inline_kernel
from hsbackend.status import Status

_SOLVED = int(Status.SOLVED)
_INFEASIBLE = int(Status.INFEASIBLE)
_INVALID = int(Status.INVALID_INPUT)
_NOT_CONVERGED = int(Status.NOT_CONVERGED)
_TO_DO = -1

_EPS = 2.220446049250313e-16
#: Something is "at its bound to rounding" within this fraction of the data it comes from: 16 eps of float64. For a
#: coordinate these are v_j, its bound and tau c_j/h_j, the last with the rounding of tau itself.
_ROUNDING = 16.0 * _EPS
#: Keeps strict and weak comparisons apart when everything is zero.
_TINY = 1e-300
#: Stands for the size of an infinite value in a tolerance.
_HUGE = 1e300
#: Newton steps before the bracket is halved (or the step doubled) every time; typical solves take 3 to 6.
_PATIENCE = 8
#: Shifts of the point by the tau found so far. One is enough but where tau was first sought many orders too far out.
_MOST_SHIFTS = 30
#: Enough to halve a bracket down to rounding: 2 x 64 and some.
_MOST_STEPS = 150


@intrinsic
def _multiply_add(_context, a, b, c):
    """Return ``a b + c`` with one rounding."""

    def generate(_context, builder, _signature, arguments):
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


# `inline_kernel` lets sums be reordered, which makes them fast; where the order carries the accuracy, as in
# `(y - shift) - s`, functions are compiled by `compile_kernel`, which does not.

# Simplex {x >= 0, low <= 1'x <= high}, unit weights


@inline_kernel
def _largest_and_sum(y):
    # Eight chains of their own: one chain of maxima would wait for itself, and may not be reordered (NaN).
    a = b = c = d = e = f = g = h = -np.inf
    n = y.shape[0]
    whole = n - n % 8
    for j in range(0, whole, 8):
        a = y[j] if y[j] > a else a
        b = y[j + 1] if y[j + 1] > b else b
        c = y[j + 2] if y[j + 2] > c else c
        d = y[j + 3] if y[j + 3] > d else d
        e = y[j + 4] if y[j + 4] > e else e
        f = y[j + 5] if y[j + 5] > f else f
        g = y[j + 6] if y[j + 6] > g else g
        h = y[j + 7] if y[j + 7] > h else h
    largest = max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h)))
    for j in range(whole, n):
        largest = y[j] if y[j] > largest else largest
    total = 0.0
    for j in range(n):
        total += y[j]
    return np.float64(largest), total


@compile_kernel
def _difference(y, shift):
    return y - shift


@inline_kernel
def _above(y, shift, s):
    """Sum and number of the positive ``(y - shift) - s``."""
    total = 0.0
    count = 0
    for j in range(y.shape[0]):
        t = _difference(y[j], shift) - s
        total += max(t, 0.0)
        count += t > 0.0
    return total, count


# The correction is for coordinates that are free: at a kink it would set others free, and the row be missed by more.


@compile_kernel
def _simplex_primal(y, shift, s, correction, x):
    for j in range(y.shape[0]):
        t = (y[j] - shift) - s
        x[j] = max(t - correction, 0.0) if t > 0.0 else 0.0


@compile_kernel
def _simplex_face(y, shift, s, correction, tau, noise, sign, face):
    """Write -1 where a coordinate is held; return how many are positive beyond rounding. ``noise`` is that of tau."""
    interior = 0
    for j in range(y.shape[0]):
        t = ((y[j] - shift) - s) - correction
        allowed = _ROUNDING * (min(abs(y[j]), _HUGE) + abs(tau)) + (noise + _TINY)
        face[j] = -1 if t <= sign * allowed else 0
        interior += t > allowed
    return interior


@inline_kernel
def _simplex_item(y, low, high, support, nu, face):
    """Project y on the simplex, x being left to the caller as ``((y - shift) - s) - correction``.

    Returns shift, s, correction and whether it is solved; if not, the general method has to say what is the matter.
    """
    n = y.shape[0]
    largest, total = _largest_and_sum(y)
    if not (low <= high and total < np.inf and largest > -np.inf):
        return 0.0, 0.0, 0.0, False
    sign = -1.0 if support else 1.0
    target = high
    row = 1
    weak = False  # violated by no more than rounding
    if low < high:
        positive, _count = _above(y, 0.0, 0.0)
        if positive > high:
            weak = positive - high <= _ROUNDING * (positive + abs(high))
        elif positive < low:
            target = low
            row = -1
            weak = low - positive <= _ROUNDING * (positive + abs(low))
        else:
            _simplex_face(y, 0.0, 0.0, 0.0, 0.0, 0.0, sign, face)
            nu[0] = 0.0
            face[n] = 0
            if not support:
                face[n] = _row_at(positive, positive, low, high)
            return 0.0, 0.0, 0.0, True
    if not 0.0 < target < np.inf:
        return 0.0, 0.0, 0.0, False

    # Both starts are left of the root, phi is convex: the sets of positive coordinates shrink until they repeat. (The
    # second may be right of it by rounding; the step from there lands left.)
    s = max(-target, (total - target) / n - largest)
    if not s < 0.0:
        s = -target
    last = -1
    count = 0
    value = 0.0
    step = 0.0
    for taken in range(_MOST_STEPS):
        value, count = _above(y, largest, s)
        step = (value - target) / max(count, 1)
        if count == last or (taken > 1 and step <= 0.0):
            break
        if taken == _MOST_STEPS - 1 or count == 0:
            return 0.0, 0.0, 0.0, False
        last = count
        s += step
    tau = largest + (s + step)
    noise = _ROUNDING * (value + target) / max(count, 1)
    if low < high:
        tau = max(tau, 0.0) if row == 1 else min(tau, 0.0)
    elif tau < -noise:
        row = -1
    interior = _simplex_face(y, largest, s, step, tau, noise, sign, face)
    if interior == 0:
        return 0.0, 0.0, 0.0, False  # a vertex to rounding: the multiplier is a choice
    if weak and support:
        tau = 0.0
        row = 0
    nu[0] = tau
    face[n] = row
    return largest, s, step, True


# One row and a box


@inline_kernel
def _row_at(value, size, low, high):
    """Return on which side the row is active to rounding at a point that satisfies it: 1 high, -1 low, 0 none."""
    to_high = high - value if value >= high - _ROUNDING * (size + abs(high)) else np.inf
    to_low = value - low if value <= low + _ROUNDING * (size + abs(low)) else np.inf
    if to_high < np.inf and to_high <= to_low:
        return 1
    return -1 if to_low < np.inf else 0


# A branch around loops makes Numba count references on every call, which costs more than the loops do at n = 50: unit
# and general weights have functions of their own.


@inline_kernel
def _unit_value(d, lower, upper, s):
    """Return ``1'x``, minus its derivative and ``sum |x_j|`` at ``x = clip(d - s, lower, upper)``."""
    value = 0.0
    size = 0.0
    slope = 0.0
    for j in range(d.shape[0]):
        t = d[j] - s
        x = min(max(t, lower[j]), upper[j])
        value += x
        size += abs(x)
        slope += 1.0 if (t > lower[j]) & (t < upper[j]) else 0.0
    return value, slope, size


@inline_kernel
def _value(d, c, a, lower, upper, s):
    """Return ``c'x``, minus its derivative and ``sum |c_j x_j|`` at ``x = clip(d - s a, lower, upper)``."""
    value = 0.0
    size = 0.0
    slope = 0.0
    for j in range(d.shape[0]):
        t = d[j] - s * a[j]
        p = c[j] * min(max(t, lower[j]), upper[j])
        value += p
        size += abs(p)
        slope += c[j] * a[j] if (t > lower[j]) & (t < upper[j]) else 0.0
    return value, slope, size


@inline_kernel
def _write_edges(d, a, lower, upper, s, direction, edges):
    """Write ``-direction e``, with e where a coordinate leaves its bound as s goes that way; -inf where it does not."""
    for j in range(d.shape[0]):
        outward = direction * a[j]
        bound = upper[j] if outward > 0.0 else lower[j]
        distance = d[j] - bound
        # By the side on which the coordinate is, not by where the edge is: they may differ by rounding.
        on_it = (distance - s * a[j]) * outward >= 0.0
        at = max(direction * np.divide(distance, a[j]), direction * s)
        edges[j] = -at if on_it & (at < np.inf) & (outward != 0.0) & (lower[j] < upper[j]) else -np.inf


@inline_kernel
def _slope_from(edges, edge, c, a):
    slope = 0.0
    for j in range(edges.shape[0]):
        slope += c[j] * a[j] if edges[j] == edge else 0.0
    return slope


@inline_kernel
def _beyond_flat(d, c, a, lower, upper, s, upwards, edges):
    """Return the end of the flat piece around s and minus the slope behind it, 0 if the piece has no end."""
    direction = 1.0 if upwards else -1.0
    _write_edges(d, a, lower, upper, s, direction, edges)
    nearest, _total = _largest_and_sum(edges)
    if nearest == -np.inf:
        return s, 0.0
    return -direction * nearest, _slope_from(edges, nearest, c, a)


@inline_kernel
def _search(d, c, a, lower, upper, unit, target, s, edges):
    """Find s with ``c'x(s) = target``; return s, the residual, minus the slope, the size, and whether it is found."""
    low = -np.inf
    high = np.inf
    gap_low = 0.0
    gap_high = 0.0
    gap = 0.0
    slope = 0.0
    size = 0.0
    noise = _EPS * (1.0 + 0.0625 * np.sqrt(d.shape[0]))
    for taken in range(_MOST_STEPS):
        if unit:
            value, slope, size = _unit_value(d, lower, upper, s)
        else:
            value, slope, size = _value(d, c, a, lower, upper, s)
        gap = value - target
        if abs(gap) <= noise * (size + abs(target) + abs(s) * slope):
            return s, gap, slope, size, True
        if gap > 0.0:
            low = s
            gap_low = gap
        else:
            high = s
            gap_high = gap
        if slope > 0.0:
            trial = s + gap / slope
        else:
            edge, beyond = _beyond_flat(d, c, a, lower, upper, s, gap > 0.0, edges)
            if beyond == 0.0:
                return s, gap, 0.0, size, True  # an extreme point of the box
            trial = edge + gap / beyond
        if taken >= _PATIENCE:
            if low == -np.inf or high == np.inf:
                trial = s + (trial - s) * 2.0 ** (taken - _PATIENCE + 1)
            elif taken % 2 == 0:
                trial = low + 0.5 * (high - low)
        if not low < trial < high:
            trial = low + (high - low) * (gap_low / (gap_low - gap_high))  # secant
            if not low < trial < high:
                return s, gap, slope, size, True  # the bracket holds no further number
        s = trial
    return s, gap, slope, size, False


@compile_kernel
def _unit_shift(v, tau, d):
    for j in range(v.shape[0]):
        d[j] = v[j] - tau


@compile_kernel
def _shift(v, c, a, h, tau, d):
    """Set ``d = v - tau c/h`` to full relative accuracy."""
    for j in range(v.shape[0]):
        product = tau * c[j]
        below = _multiply_add(tau, c[j], -product)
        quotient = tau * a[j]
        rest = _multiply_add(-quotient, h[j], product) + below
        d[j] = (v[j] - quotient) - np.divide(rest, h[j])


@compile_kernel
def _box_primal(d, a, lower, upper, s, correction, x):
    for j in range(d.shape[0]):
        t = d[j] - s * a[j]
        t -= correction * a[j] if (t > lower[j]) & (t < upper[j]) else 0.0
        x[j] = min(max(t, lower[j]), upper[j])


@compile_kernel
def _box_face(v, d, c, a, lower, upper, s, correction, tau, noise, sign, face):
    """Write where coordinates are held; return how many of the row's are off their bounds beyond rounding."""
    interior = 0
    for j in range(v.shape[0]):
        t = (d[j] - s * a[j]) - correction * a[j]
        size = min(abs(v[j]), _HUGE) + abs(tau * a[j])
        spread = noise * abs(a[j]) + _TINY
        to_lower = t - lower[j]
        to_upper = upper[j] - t
        allowed_lower = _ROUNDING * (size + min(abs(lower[j]), _HUGE)) + spread
        allowed_upper = _ROUNDING * (size + min(abs(upper[j]), _HUGE)) + spread
        fixed = lower[j] >= upper[j]
        at_upper = (to_upper <= sign * allowed_upper) & (to_upper <= to_lower) | fixed
        at_lower = (to_lower <= sign * allowed_lower) & (to_lower < to_upper)
        face[j] = 1 if at_upper else (-1 if at_lower else 0)
        off = (to_lower > allowed_lower) & (to_upper > allowed_upper) & (c[j] != 0.0)
        interior += 1 if off & (not fixed) else 0
    return interior


@inline_kernel
def _vertex_multiplier(v, c, a, lower, upper, x, tau):
    """Return the multiplier nearest to zero for which x, at bounds everywhere, is the solution."""
    least = -np.inf
    most = np.inf
    for j in range(v.shape[0]):
        if a[j] == 0.0 or not lower[j] < upper[j]:
            continue
        at_upper = upper[j] - x[j] < x[j] - lower[j]
        limit = (v[j] - (upper[j] if at_upper else lower[j])) / a[j]
        if at_upper == (a[j] > 0.0):
            most = min(most, limit)
        else:
            least = max(least, limit)
    if least > most:
        return tau
    return min(max(0.0, least), most)


@inline_kernel
def _inspect(v, c, h, lower, upper, allowance):
    """Return whether the data are numbers, whether the box is empty, and the range of ``c'x`` with its sizes."""
    valid = True
    empty = False
    bottom = 0.0
    top = 0.0
    bottom_size = 0.0
    top_size = 0.0
    for j in range(v.shape[0]):
        valid &= (h[j] > 0.0) & (h[j] < np.inf) & (abs(c[j]) < np.inf)
        valid &= (lower[j] < np.inf) & (upper[j] > -np.inf)
        valid &= (v[j] > -np.inf) | ((v[j] == -np.inf) & (lower[j] > -np.inf))
        valid &= (v[j] < np.inf) | ((v[j] == np.inf) & (upper[j] < np.inf))
        empty |= lower[j] - upper[j] > allowance * (abs(lower[j]) + abs(upper[j]))
        least = upper[j] if v[j] == np.inf else lower[j]
        most = lower[j] if v[j] == -np.inf else upper[j]
        p = 0.0 if c[j] == 0.0 else c[j] * least
        q = 0.0 if c[j] == 0.0 else c[j] * most
        bottom += min(p, q)
        top += max(p, q)
        bottom_size += abs(min(p, q))
        top_size += abs(max(p, q))
    return valid, empty, bottom, top, bottom_size, top_size


@inline_kernel
def _start(v, c, a, target):
    """Return the tau of the row alone, the box forgotten; 0 if there is none."""
    total = -target
    slope = 0.0
    for j in range(v.shape[0]):
        total += c[j] * v[j]
        slope += c[j] * a[j]
    return total / slope if slope > 0.0 and abs(total) < np.inf else 0.0


@inline_kernel
def _settled(s, shift, slope, size):
    """Say whether subtracting ``s c/h`` from the shifted point costs no accuracy; the numbers 1e-2 and 1e-8 are ample.

    With free coordinates: it is small beside them. Without: the shift has tau to half the digits, enough to know on
    which side of their bounds coordinates are. And there is nothing to gain where s is the rounding of the shift.
    """
    if abs(s) <= 4.0 * _EPS * abs(shift):
        return True
    return abs(s) * slope <= 1e-2 * size if slope > 0.0 else abs(s) <= 1e-8 * abs(shift)


@inline_kernel
def _box_item(v, c, a, h, lower, upper, unit, low, high, support, allowance, d, edges, x, nu, face):
    """Project one item; return its status."""
    n = v.shape[0]
    valid, empty, bottom, top, bottom_size, top_size = _inspect(v, c, h, lower, upper, allowance)
    if not valid or np.isnan(low) or np.isnan(high):
        return _INVALID
    if empty or high == -np.inf or low == np.inf:
        return _INFEASIBLE
    equality = low >= high
    if (equality and low - high > allowance * (abs(low) + abs(high))) or (
        bottom - high > allowance * (bottom_size + abs(high)) or low - top > allowance * (top_size + abs(low))
    ):
        return _INFEASIBLE
    # A target that the box misses by rounding needs no care: the search for it ends at the extreme point.

    sign = -1.0 if support else 1.0
    target = high
    row = 1
    weak = False  # violated by no more than rounding
    s = 0.0
    if equality:
        s = _start(v, c, a, target)
    else:
        value, slope, size = _value(v, c, a, lower, upper, 0.0)
        if value > high:
            weak = value - high <= _ROUNDING * (size + abs(high))
        elif value < low:
            target = low
            row = -1
            weak = low - value <= _ROUNDING * (size + abs(low))
        else:
            _box_primal(v, a, lower, upper, 0.0, 0.0, x)
            _box_face(v, v, c, a, lower, upper, 0.0, 0.0, 0.0, 0.0, sign, face)
            nu[0] = 0.0
            face[n] = 0
            if not support:
                face[n] = _row_at(value, size, low, high)
            return _SOLVED

    shift = 0.0
    gap = 0.0
    slope = 0.0
    size = 0.0
    _unit_shift(v, shift, d)
    for taken in range(_MOST_SHIFTS):
        s, gap, slope, size, found = _search(d, c, a, lower, upper, unit, target, s, edges)
        if not found or taken == _MOST_SHIFTS - 1:
            return _NOT_CONVERGED
        if _settled(s, shift, slope, size + abs(target)):
            break
        shift += s
        s = 0.0
        if unit:
            _unit_shift(v, shift, d)
        else:
            _shift(v, c, a, h, shift, d)
    correction = gap / slope if slope > 0.0 else 0.0
    noise = _ROUNDING * (size + abs(target)) / slope if slope > 0.0 else 0.0
    tau = shift + (s + correction)
    if not np.isfinite(tau):
        return _NOT_CONVERGED  # data near the largest numbers
    if not equality:
        tau = max(tau, 0.0) if row == 1 else min(tau, 0.0)
    _box_primal(d, a, lower, upper, s, correction, x)
    interior = _box_face(v, d, c, a, lower, upper, s, correction, tau, noise, sign, face)
    if interior == 0:
        tau = _vertex_multiplier(v, c, a, lower, upper, x, tau)
        noise = 0.0
        _shift(v, c, a, h, tau, d)
        _box_face(v, d, c, a, lower, upper, 0.0, 0.0, tau, noise, sign, face)
    if support and not equality and (weak or tau == 0.0):
        tau = 0.0
        row = 0
    elif equality:
        row = -1 if tau < -noise else 1
    nu[0] = tau
    face[n] = row
    return _SOLVED


# Batches


@inline_kernel
def _fill(source, b, target):
    """Copy the row of item b, if there is one."""
    if source.shape[1] > 0:
        row = source[b if source.shape[0] > 1 else 0]
        for j in range(target.shape[0]):
            target[j] = row[j]


@inline_kernel
def _all_equal(source, b, number):
    """Say whether the row of item b holds this number only."""
    row = source[b if source.shape[0] > 1 else 0]
    other = 0
    for j in range(row.shape[0]):
        other += row[j] != number
    return other == 0


@inline_kernel
def _rows_of_ones(n):
    """Return eight work arrays."""
    if n < 4096:
        return np.ones(n), np.ones(n), np.ones(n), np.ones(n), np.ones(n), np.ones(n), np.ones(n), np.ones(n)
    # The allocator keeps one large block for the next call; several it gives back, and new pages are slow. Small rows
    # are apart because they share a count of references otherwise, which costs 0.1 us per item.
    block = np.ones((8, n))
    return block[0], block[1], block[2], block[3], block[4], block[5], block[6], block[7]


@inline_kernel
def _divide(c, h, a):
    for j in range(a.shape[0]):
        a[j] = np.divide(c[j], h[j])  # invalid weights are found later; `/` would raise at zero


@inline_kernel
def _fail(x, nu, face):
    for j in range(x.shape[0]):
        x[j] = np.nan
    nu[0] = np.nan
    for j in range(face.shape[0]):
        face[j] = 0


@inline_kernel
def _simplex_items(start, stop, step, point, rhs, lower, upper, support, primal, multipliers, face, status):
    """Project the items whose box is ``x >= 0``; return how many are left to do."""
    left = 0
    for b in range(start, stop, step):
        limits = rhs[b if rhs.shape[0] > 1 else 0]
        solved = lower.shape[0] == 1 or _all_equal(lower, b, 0.0)
        solved = solved and (upper.shape[0] == 1 or _all_equal(upper, b, np.inf))
        if solved:
            shift, s, correction, solved = _simplex_item(
                point[b], np.float64(limits[0]), np.float64(limits[1]), support, multipliers[b], face[b]
            )  # fmt: skip
            if solved:
                _simplex_primal(point[b], shift, s, correction, primal[b])
        status[b] = _SOLVED if solved else _TO_DO
        left += not solved
    return left


@compile_kernel
def budget_items(
    start, stop, step, point, weight, coefficients, rhs, lower, upper, support, allowance,
    primal, multipliers, face, status,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Project items on ``{lower <= x <= upper, low <= c'x <= high}``; arrays of shape (1, 0) are absent."""
    if start >= stop:
        return  # an empty batch has no row that items could share
    n = point.shape[1]
    unit = weight.shape[1] == 0 and coefficients.shape[1] == 0
    simplex = unit and lower.shape[1] > 0
    simplex = simplex and (lower.shape[0] > 1 or _all_equal(lower, 0, 0.0))
    simplex = simplex and (upper.shape[0] > 1 or _all_equal(upper, 0, np.inf))
    if simplex:
        if _simplex_items(start, stop, step, point, rhs, lower, upper, support, primal, multipliers, face, status) == 0:
            return  # before the arrays below exist: a large simplex would mostly wait for their pages
    else:
        status[start:stop:step] = _TO_DO
    v, d, edges, h, c, a, least, most = _rows_of_ones(n)
    least[:] = -np.inf
    most[:] = np.inf
    _fill(weight, 0, h)
    _fill(coefficients, 0, c)
    _divide(c, h, a)
    _fill(lower, 0, least)
    _fill(upper, 0, most)
    for b in range(start, stop, step):
        if status[b] != _TO_DO:
            continue
        if weight.shape[0] > 1 or coefficients.shape[0] > 1:
            _fill(weight, b, h)
            _fill(coefficients, b, c)
            _divide(c, h, a)
        if lower.shape[0] > 1:
            _fill(lower, b, least)
        if upper.shape[0] > 1:
            _fill(upper, b, most)
        _fill(point, b, v)
        limits = rhs[b if rhs.shape[0] > 1 else 0]
        low = np.float64(limits[0])
        high = np.float64(limits[1])
        status[b] = _box_item(
            v, c, a, h, least, most, unit, low, high, support, allowance, d, edges,
            primal[b], multipliers[b], face[b],
        )  # fmt: skip
        if status[b] != _SOLVED:
            _fail(primal[b], multipliers[b], face[b])


@inline_kernel
def _absolute(v, y):
    for j in range(v.shape[0]):
        y[j] = abs(v[j])


@inline_kernel
def _restore_signs(v, x):
    """Turn the projection x of ``|v|`` into that of v."""
    for j in range(v.shape[0]):
        x[j] = 0.0 - x[j] if v[j] < 0.0 else x[j]


@compile_kernel
def _l1_primal(v, shift, s, correction, x):
    for j in range(v.shape[0]):
        t = (abs(v[j]) - shift) - s
        t = max(t - correction, 0.0) if t > 0.0 else 0.0
        x[j] = 0.0 - t if v[j] < 0.0 else t


@inline_kernel
def _l1_face(v, tight, face):
    """Turn the face of ``|v|`` into the signs of the coordinates that are not held."""
    for j in range(v.shape[0]):
        sign = (v[j] > 0.0) - (v[j] < 0.0)
        face[j] = 0 if tight & (face[j] != 0) else sign


@inline_kernel
def _unit_l1_items(start, stop, step, point, rhs, support, primal, multipliers, face, status):
    """Project on unweighted balls; return how many items are left to do."""
    left = 0
    for b in range(start, stop, step):
        radius = np.float64(rhs[b if rhs.shape[0] > 1 else 0, 0])
        _absolute(point[b], primal[b])
        shift, s, correction, solved = _simplex_item(primal[b], -np.inf, radius, support, multipliers[b], face[b])
        if solved:
            _l1_primal(point[b], shift, s, correction, primal[b])
            _l1_face(point[b], face[b, point.shape[1]] != 0, face[b])
        status[b] = _SOLVED if solved else _TO_DO
        left += not solved
    return left


@compile_kernel
def l1_items(
    start, stop, step, point, weight, coefficients, rhs, support, allowance, primal, multipliers, face, status
):  # type: ignore[no-untyped-def]
    """Project items on ``{sum_j c_j |x_j| <= r}``; arrays of shape (1, 0) are absent."""
    if start >= stop:
        return  # an empty batch has no row that items could share
    n = point.shape[1]
    unit = weight.shape[1] == 0 and coefficients.shape[1] == 0
    if unit:
        if _unit_l1_items(start, stop, step, point, rhs, support, primal, multipliers, face, status) == 0:
            return
    else:
        status[start:stop:step] = _TO_DO
    v, d, edges, h, c, a, zeros, infinities = _rows_of_ones(n)
    zeros[:] = 0.0
    infinities[:] = np.inf
    _fill(weight, 0, h)
    _fill(coefficients, 0, c)
    _divide(c, h, a)
    for b in range(start, stop, step):
        if status[b] != _TO_DO:
            continue
        if weight.shape[0] > 1 or coefficients.shape[0] > 1:
            _fill(weight, b, h)
            _fill(coefficients, b, c)
            _divide(c, h, a)
        radius = np.float64(rhs[b if rhs.shape[0] > 1 else 0, 0])
        _absolute(point[b], v)
        status[b] = _box_item(
            v, c, a, h, zeros, infinities, unit, -np.inf, radius, support, allowance, d, edges,
            primal[b], multipliers[b], face[b],
        )  # fmt: skip
        for j in range(n):
            if not c[j] > 0.0:
                status[b] = _INVALID
        if status[b] == _SOLVED:
            _restore_signs(point[b], primal[b])
            _l1_face(point[b], face[b, n] != 0, face[b])
        else:
            _fail(primal[b], multipliers[b], face[b])


# KKT solves


@inline_kernel
def _invert(h, inverse):
    """Invert weights; those of a failed item may be anything, and become zero."""
    for j in range(h.shape[0]):
        inverse[j] = np.divide(1.0, h[j]) if (h[j] > 0.0) & (h[j] < np.inf) else 0.0


# Held coordinates bring their right-hand side in u, which is overwritten on the free ones.


@inline_kernel
def _unit_multiplier(held, g, r, u):
    total = -r
    count = 0
    for j in range(g.shape[0]):
        total += g[j] if held[j] == 0 else u[j]
        count += held[j] == 0
    return total / count if count > 0 else 0.0


@inline_kernel
def _unit_kkt(held, g, w, u, wb):
    for j in range(g.shape[0]):
        rest = g[j] - w
        wb[j] = 0.0 if held[j] == 0 else rest - u[j]
        u[j] = rest if held[j] == 0 else u[j]


@inline_kernel
def _multiplier(held, normal, inverse, g, r, u):
    total = -r
    slope = 0.0
    for j in range(g.shape[0]):
        q = normal[j] * inverse[j]
        total += q * g[j] if held[j] == 0 else normal[j] * u[j]
        slope += q * normal[j] if held[j] == 0 else 0.0
    return total / slope if slope > 0.0 else 0.0


@inline_kernel
def _kkt(held, normal, h, inverse, g, w, u, wb):
    for j in range(g.shape[0]):
        rest = g[j] - w * normal[j]
        wb[j] = 0.0 if held[j] == 0 else rest - h[j] * u[j]
        u[j] = rest * inverse[j] if held[j] == 0 else u[j]


@inline_kernel
def _no_row_kkt(held, h, inverse, g, u, wb):
    # A loop of its own, because the coefficients of a failed item may be NaN and its face has no row.
    for j in range(g.shape[0]):
        wb[j] = 0.0 if held[j] == 0 else g[j] - h[j] * u[j]
        u[j] = g[j] * inverse[j] if held[j] == 0 else u[j]


@inline_kernel
def _set_bounds(rhs_bounds, b, u):
    if rhs_bounds.shape[1] > 0:
        _fill(rhs_bounds, b, u)
    else:
        for j in range(u.shape[0]):
            u[j] = 0.0


@compile_kernel
def budget_kkt(start, stop, step, face, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds, primal, rows, bounds):  # type: ignore[no-untyped-def]
    """Solve the KKT systems of budget faces; arrays of shape (1, 0) are absent."""
    if start >= stop:
        return
    n = rhs_primal.shape[1]
    unit = weight.shape[1] == 0 and coefficients.shape[1] == 0
    work = np.ones((3, 0 if unit else n))
    h, c, inverse = work[0], work[1], work[2]
    _fill(weight, 0, h)
    _fill(coefficients, 0, c)
    _invert(h, inverse)
    for b in range(start, stop, step):
        if weight.shape[0] > 1:
            _fill(weight, b, h)
            _invert(h, inverse)
        if coefficients.shape[0] > 1:
            _fill(coefficients, b, c)
        held = face[b]
        g = rhs_primal[b]
        u = primal[b]
        wb = bounds[b]
        _set_bounds(rhs_bounds, b, u)
        w = 0.0
        active = held[n] != 0
        r = np.float64(rhs_rows[b, 0]) if active and rhs_rows.shape[1] > 0 else 0.0
        if unit:
            if active:
                w = _unit_multiplier(held, g, r, u)
            _unit_kkt(held, g, w, u, wb)
        elif active:
            w = _multiplier(held, c, inverse, g, r, u)
            _kkt(held, c, h, inverse, g, w, u, wb)
        else:
            _no_row_kkt(held, h, inverse, g, u, wb)
        rows[b, 0] = w


@inline_kernel
def _l1_normal(c, sign, normal, held):
    for j in range(normal.shape[0]):
        normal[j] = c[j] * sign[j]
        held[j] = sign[j] == 0


@compile_kernel
def l1_kkt(start, stop, step, face, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds, primal, rows, bounds):  # type: ignore[no-untyped-def]
    """Solve the KKT systems of faces of the l1 ball; arrays of shape (1, 0) are absent."""
    if start >= stop:
        return
    n = rhs_primal.shape[1]
    work = np.ones((4, n))
    h, c, inverse, normal = work[0], work[1], work[2], work[3]
    held = np.empty(n, dtype=np.int8)
    _fill(weight, 0, h)
    _fill(coefficients, 0, c)
    _invert(h, inverse)
    for b in range(start, stop, step):
        if weight.shape[0] > 1:
            _fill(weight, b, h)
            _invert(h, inverse)
        if coefficients.shape[0] > 1:
            _fill(coefficients, b, c)
        g = rhs_primal[b]
        u = primal[b]
        w = 0.0
        _set_bounds(rhs_bounds, b, u)
        if face[b, n] != 0:
            _l1_normal(c, face[b], normal, held)
            r = np.float64(rhs_rows[b, 0]) if rhs_rows.shape[1] > 0 else 0.0
            w = _multiplier(held, normal, inverse, g, r, u)
            _kkt(held, normal, h, inverse, g, w, u, bounds[b])
        else:
            held[:] = 0  # inside the ball every coordinate is free
            _no_row_kkt(held, h, inverse, g, u, bounds[b])
        rows[b, 0] = w
