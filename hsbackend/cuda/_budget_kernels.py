"""Triton kernels of a box with one row and of the l1 ball; the method is that of ``families/_budget_kernels``.

A program holds whole rows in registers, ``[ROWS, BLOCK]`` in float64; every quantity of a row is a vector ``[ROWS]``.
All rows of a program step together, each with its own bracket, until the last is done. Columns behind the end of a
row have ``lower = 0`` and ``v = -inf`` (``upper = 0`` where there is one): held at zero, in no sum.
"""

import triton
import triton.language as tl

_SOLVED = tl.constexpr(0)
_INFEASIBLE = tl.constexpr(1)
_INVALID = tl.constexpr(3)
_NOT_CONVERGED = tl.constexpr(4)

_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_EPS = tl.constexpr(2.0**-52)
#: See families/_budget_kernels, whose numbers these are.
_ROUNDING = tl.constexpr(2.0**-48)
_TINY = tl.constexpr(1e-300)
_HUGE = tl.constexpr(1e300)
_PATIENCE = tl.constexpr(8)
_MOST_SHIFTS = tl.constexpr(30)
_MOST_STEPS = tl.constexpr(150)


@triton.jit
def _sum(value):
    return tl.sum(value, axis=1)


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def _clip(t, lower, upper, CAPPED: tl.constexpr):
    x = tl.maximum(t, lower)
    if CAPPED:
        x = tl.minimum(x, upper)
    return x


@triton.jit
def _is_free(t, lower, upper, CAPPED: tl.constexpr):
    free = t > lower
    if CAPPED:
        free = free & (t < upper)
    return free


@triton.jit
def _times(s, a, UNIT: tl.constexpr):
    """``s a`` as a tile that broadcasts, [ROWS, 1] where a is one."""
    if UNIT:
        return s[:, None]
    else:
        return s[:, None] * a


@triton.jit
def _value(d, c, a, lower, upper, s, UNIT: tl.constexpr, CAPPED: tl.constexpr):
    """``c'x``, minus its derivative and ``sum |c_j x_j|`` at ``x = clip(d - s a, lower, upper)``, each [ROWS]."""
    t = d - _times(s, a, UNIT)
    p = _clip(t, lower, upper, CAPPED)
    free = _is_free(t, lower, upper, CAPPED)
    if UNIT:
        return _sum(p), _sum(free.to(tl.float64)), _sum(tl.abs(p))
    else:
        p = p * c
        return _sum(p), _sum(tl.where(free, c * a, 0.0)), _sum(tl.abs(p))


@triton.jit
def _shifted(v, c, a, h, tau, UNIT: tl.constexpr, WEIGHTED: tl.constexpr):
    """``v - tau c/h`` to full relative accuracy."""
    if UNIT:
        return v - tau[:, None]
    else:
        product = tau[:, None] * c
        below = tl.fma(tau[:, None] + 0.0 * c, c, -product)
        if WEIGHTED:
            quotient = tau[:, None] * a
            rest = tl.fma(-quotient, h, product) + below
            return (v - quotient) - rest / h
        else:
            return (v - product) - below


@triton.jit
def _beyond_flat(d, c, a, lower, upper, s, upwards, UNIT: tl.constexpr, CAPPED: tl.constexpr):
    """The end of the flat piece around s and minus the slope behind it, 0 if the piece has no end; each [ROWS]."""
    direction = tl.where(upwards, 1.0, -1.0).to(tl.float64)
    outward = _times(direction, a, UNIT)
    bound = lower
    if CAPPED:
        bound = tl.where(outward > 0.0, upper, lower)
    else:
        bound = tl.where(outward > 0.0, _INF, lower)
    distance = d - bound
    # By the side on which the coordinate is, not by where the edge is: they may differ by rounding.
    on_it = (distance - _times(s, a, UNIT)) * outward >= 0.0
    at = direction[:, None] * distance
    if not UNIT:
        at = at / tl.where(a == 0.0, 1.0, a)
        on_it = on_it & (a != 0.0)
    at = tl.maximum(at, (direction * s)[:, None])
    if CAPPED:
        on_it = on_it & (lower < upper)
    at = tl.where(on_it & (at < _INF), at, _INF)
    nearest = tl.min(at, axis=1)
    there = (at == nearest[:, None]) & (at < _INF)
    if UNIT:
        slope = _sum(there.to(tl.float64))
    else:
        slope = _sum(tl.where(there, c * a, 0.0))
    return direction * nearest, slope


@triton.jit
def _search(
    v, c, a, h, lower, upper, target, start, active, n,
    UNIT: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Find tau with ``c'x(tau) = target`` for the active rows.

    Returns d, the point less a first tau; that tau; what is left of it; the residual, minus the slope and the size
    there, and whether it is found.
    """
    shift = start
    d = _shifted(v, c, a, h, shift, UNIT, WEIGHTED)
    s = tl.zeros_like(target)
    low = s - _INF
    high = s + _INF
    gap_low = s
    gap_high = s
    gap = s
    slope = s
    size = s
    taken = tl.zeros(target.shape, tl.int32)
    shifts = taken
    found = taken > 0
    noise = _EPS * (1.0 + 0.0625 * tl.sqrt(n.to(tl.float64)))
    while _any(active):
        value, slope_now, size_now = _value(d, c, a, lower, upper, s, UNIT, CAPPED)
        slope = tl.where(active, slope_now, slope)
        size = tl.where(active, size_now, size)
        gap = tl.where(active, value - target, gap)
        there = tl.abs(gap) <= noise * (size + tl.abs(target) + tl.abs(s) * slope)
        right = gap > 0.0
        low = tl.where(right, s, low)
        gap_low = tl.where(right, gap, gap_low)
        high = tl.where(right, high, s)
        gap_high = tl.where(right, gap_high, gap)
        trial = s + gap / tl.where(slope > 0.0, slope, 1.0)
        flat = active & ~there & (slope <= 0.0)
        if _any(flat):
            edge, beyond = _beyond_flat(d, c, a, lower, upper, s, right, UNIT, CAPPED)
            there = there | (flat & (beyond == 0.0))  # an extreme point of the box
            trial = tl.where(flat, edge + gap / tl.where(beyond > 0.0, beyond, 1.0), trial)
        late = taken >= _PATIENCE
        one_sided = (low == -_INF) | (high == _INF)
        longer = s + (trial - s) * tl.exp2((taken - (_PATIENCE - 1)).to(tl.float64))
        trial = tl.where(late & one_sided, longer, trial)
        trial = tl.where(late & ~one_sided & (taken % 2 == 0), low + 0.5 * (high - low), trial)
        inside = (low < trial) & (trial < high)
        drop = gap_low - gap_high
        secant = low + (high - low) * (gap_low / tl.where(drop > 0.0, drop, 1.0))
        trial = tl.where(inside, trial, secant)
        there = there | ~((low < trial) & (trial < high))  # or the bracket holds no further number
        # Subtracting s c/h from the shifted point must cost no accuracy (`_settled` of the CPU kernels).
        whole = size + tl.abs(target)
        settled = tl.where(slope > 0.0, tl.abs(s) * slope <= 1e-2 * whole, tl.abs(s) <= 1e-8 * tl.abs(shift))
        settled = settled | (tl.abs(s) <= 4.0 * _EPS * tl.abs(shift))
        found = found | (active & there & settled)
        again = active & there & ~settled
        if _any(again):
            shift = tl.where(again, shift + s, shift)
            d = tl.where(again[:, None], _shifted(v, c, a, h, shift, UNIT, WEIGHTED), d)
        taken = tl.where(again, 0, taken + 1)
        shifts = tl.where(again, shifts + 1, shifts)
        active = active & ~found & (taken < _MOST_STEPS) & (shifts < _MOST_SHIFTS)
        s = tl.where(active, tl.where(again, 0.0, trial), s)
        low = tl.where(again, -_INF, low)
        high = tl.where(again, _INF, high)
    return d, shift, s, gap, slope, size, found


@triton.jit
def _row_at(value, size, low, high):
    """On which side the row is active to rounding at a point that satisfies it: 1 high, -1 low, 0 none."""
    to_high = tl.where(value >= high - _ROUNDING * (size + tl.abs(high)), high - value, _INF)
    to_low = tl.where(value <= low + _ROUNDING * (size + tl.abs(low)), value - low, _INF)
    at_high = (to_high < _INF) & (to_high <= to_low)
    return tl.where(at_high, 1, tl.where(to_low < _INF, -1, 0))


@triton.jit
def _face(v, t, c, a, lower, upper, tau, noise, sign, UNIT: tl.constexpr, CAPPED: tl.constexpr):
    """Where coordinates are held; and which are off their bounds beyond rounding and in the row."""
    size = tl.minimum(tl.abs(v), _HUGE) + tl.abs(_times(tau, a, UNIT))
    spread = tl.abs(_times(noise, a, UNIT)) + _TINY
    to_lower = t - lower
    allowed = _ROUNDING * (size + tl.minimum(tl.abs(lower), _HUGE)) + spread
    off = to_lower > allowed
    if CAPPED:
        to_upper = upper - t
        allowed_upper = _ROUNDING * (size + tl.minimum(tl.abs(upper), _HUGE)) + spread
        fixed = lower >= upper
        at_upper = ((to_upper <= sign * allowed_upper) & (to_upper <= to_lower)) | fixed
        at_lower = (to_lower <= sign * allowed) & (to_lower < to_upper)
        face = tl.where(at_upper, 1, tl.where(at_lower, -1, 0))
        off = off & (to_upper > allowed_upper) & ~fixed
    else:
        face = tl.where((to_lower <= sign * allowed) & (to_lower < _INF), -1, 0)
    if not UNIT:
        off = off & (c != 0.0)
    return face, off


@triton.jit
def _vertex_multiplier(v, c, a, lower, upper, x, tau, inside, UNIT: tl.constexpr, CAPPED: tl.constexpr):
    """The multiplier nearest to zero for which x, at bounds everywhere, is the solution."""
    if CAPPED:
        at_upper = upper - x < x - lower
        bound = tl.where(at_upper, upper, lower)
        used = inside & (lower < upper)
    else:
        at_upper = lower == _INF
        bound = lower
        used = inside
    limit = v - bound
    if UNIT:
        rising = at_upper
    else:
        limit = limit / tl.where(a == 0.0, 1.0, a)
        rising = at_upper == (a > 0.0)
        used = used & (a != 0.0)
    most = tl.min(tl.where(used & rising, limit, _INF), axis=1)
    least = tl.max(tl.where(used & ~rising, limit, -_INF), axis=1)
    return tl.where(least > most, tau, tl.minimum(tl.maximum(0.0, least), most))


@triton.jit
def budget_solve(
    point, weight, coefficients, rhs, lower_bounds, upper_bounds, primal, multipliers, faces, statuses,
    batch, n, point_stride, weight_stride, coefficients_stride, rhs_stride, lower_stride, upper_stride, allowance,
    WEIGHTED: tl.constexpr, WITH_COEFFICIENTS: tl.constexpr, WITH_LOWER: tl.constexpr, CAPPED: tl.constexpr,
    L1: tl.constexpr, SUPPORT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Project rows on ``{lower <= x <= upper, low <= c'x <= high}``, or with L1 on ``{c'|x| <= high}``.

    point (B, n); rhs (1 or B, 2), with L1 (1 or B, 1); primal (B, n), multipliers (B, 1), faces (B, n + 1) int8,
    statuses (B,) int8. A stride of 0 shares one row.
    """
    UNIT: tl.constexpr = not (WEIGHTED or WITH_COEFFICIENTS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_batch = row < batch
    inside = in_batch[:, None] & (column < n)[None, :]
    given = tl.load(point + row[:, None] * point_stride + column[None, :], mask=inside, other=0.0).to(tl.float64)
    v = tl.abs(given) if L1 else given
    if CAPPED:
        at = upper_bounds + row[:, None] * upper_stride + column[None, :]
        upper = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    else:
        v = tl.where(inside, v, -_INF)
        upper = v
    if WITH_LOWER:
        at = lower_bounds + row[:, None] * lower_stride + column[None, :]
        lower = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    elif L1:
        lower = tl.zeros_like(v)
    else:
        lower = tl.where(inside, -_INF, 0.0).to(tl.float64)
    c = v
    h = v
    a = v
    if not UNIT:
        c = tl.where(inside, 1.0, 0.0).to(tl.float64)
        if WITH_COEFFICIENTS:
            at = coefficients + row[:, None] * coefficients_stride + column[None, :]
            c = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        a = c
        if WEIGHTED:
            at = weight + row[:, None] * weight_stride + column[None, :]
            h = tl.load(at, mask=inside, other=1.0).to(tl.float64)
            a = c / tl.where(h == 0.0, 1.0, h)
    if L1:
        high = tl.load(rhs + row * rhs_stride, mask=in_batch, other=0.0).to(tl.float64)
        low = tl.full(high.shape, -_INF, tl.float64)
    else:
        low = tl.load(rhs + row * rhs_stride, mask=in_batch, other=0.0).to(tl.float64)
        high = tl.load(rhs + row * rhs_stride + 1, mask=in_batch, other=0.0).to(tl.float64)

    # Are the data numbers, is the box empty, does c'x reach its limits on it?
    valid = (lower < _INF) & ((v > -_INF) | ((v == -_INF) & (lower > -_INF)))
    if CAPPED:
        valid = valid & (upper > -_INF) & ((v < _INF) | ((v == _INF) & (upper < _INF)))
        empty = lower - upper > allowance * (tl.abs(lower) + tl.abs(upper))
        least = tl.where(v == _INF, upper, lower)
        most = tl.where(v == -_INF, lower, upper)
    else:
        valid = valid & (v < _INF)
        empty = v == _INF
        least = lower
        most = tl.where((v == -_INF) | ~inside, lower, _INF)
    if UNIT:
        p = least
        q = most
    else:
        valid = valid & (tl.abs(c) < _INF)
        if WEIGHTED:
            valid = valid & (h > 0.0) & (h < _INF)
        if L1:
            valid = valid & ((c > 0.0) | ~inside)
        p = tl.where(c == 0.0, 0.0, c * least)
        q = tl.where(c == 0.0, 0.0, c * most)
    smaller = tl.minimum(p, q)
    larger = tl.maximum(p, q)
    bottom = _sum(smaller)
    top = _sum(larger)
    invalid = (tl.min(valid.to(tl.int32), axis=1) == 0) | (low != low) | (high != high)
    infeasible = (tl.max(empty.to(tl.int32), axis=1) > 0) | (high == -_INF) | (low == _INF)
    equality = low >= high
    infeasible = infeasible | (equality & (low - high > allowance * (tl.abs(low) + tl.abs(high))))
    infeasible = infeasible | (bottom - high > allowance * (_sum(tl.abs(smaller)) + tl.abs(high)))
    infeasible = infeasible | (low - top > allowance * (_sum(tl.abs(larger)) + tl.abs(low)))
    status = tl.where(invalid, _INVALID, tl.where(infeasible, _INFEASIBLE, _SOLVED))
    fine = status == _SOLVED

    zero = tl.zeros(row.shape, tl.float64)
    value, slope, size = _value(v, c, a, lower, upper, zero, UNIT, CAPPED)
    above = ~equality & (value > high)
    below = ~equality & (value < low)
    weak = above & (value - high <= _ROUNDING * (size + tl.abs(high)))
    weak = weak | (below & (low - value <= _ROUNDING * (size + tl.abs(low))))
    searching = equality | above | below
    target = tl.where(fine & searching, tl.where(below, low, high), 0.0)
    start = zero
    if UNIT:
        # The root is right of both: of the row without the box, and of where the largest would take what the bounds of
        # the others leave.
        total = _sum(tl.where(inside, v, 0.0)) - target
        start = total / n.to(tl.float64)
        if not CAPPED:
            start = tl.maximum(start, tl.max(tl.where(inside, v - lower, -_INF), axis=1) - (target - bottom))
        start = tl.where((tl.abs(start) < _INF) & searching, start, 0.0)
    else:
        total = _sum(tl.where(c == 0.0, 0.0, c * v)) - target
        whole = _sum(c * a)
        there = (whole > 0.0) & (tl.abs(total) < _INF) & equality
        start = tl.where(there, total / tl.where(whole > 0.0, whole, 1.0), 0.0)
    d, shift, s, gap, slope, size, found = _search(
        v, c, a, h, lower, upper, target, start, fine & searching & in_batch, n, UNIT, WEIGHTED, CAPPED
    )  # fmt: skip
    divisor = tl.where(slope > 0.0, slope, 1.0)
    correction = tl.where(slope > 0.0, gap / divisor, 0.0)
    noise = tl.where(slope > 0.0, _ROUNDING * (size + tl.abs(target)) / divisor, 0.0)
    tau = shift + (s + correction)
    status = tl.where(fine & searching & ~(found & (tl.abs(tau) < _INF)), _NOT_CONVERGED, status)
    tau = tl.where(above, tl.maximum(tau, 0.0), tl.where(below, tl.minimum(tau, 0.0), tau))
    tau = tl.where(searching, tau, 0.0)
    noise = tl.where(searching, noise, 0.0)
    correction = tl.where(searching, correction, 0.0)

    if SUPPORT:
        sign = -1.0
    else:
        sign = 1.0
    t = d - _times(s, a, UNIT)
    # The correction is for free coordinates: at a kink it would set others free, and the row be missed by more.
    moved = t - _times(correction, a, UNIT)
    x = _clip(tl.where(_is_free(t, lower, upper, CAPPED), moved, t), lower, upper, CAPPED)
    face, off = _face(v, moved, c, a, lower, upper, tau, noise, sign, UNIT, CAPPED)
    vertex = searching & fine & in_batch & (tl.max((off & inside).to(tl.int32), axis=1) == 0)
    if _any(vertex):
        tau = tl.where(vertex, _vertex_multiplier(v, c, a, lower, upper, x, tau, inside, UNIT, CAPPED), tau)
        noise = tl.where(vertex, 0.0, noise)
        at_vertex = _shifted(v, c, a, h, tau, UNIT, WEIGHTED)
        other, _off = _face(v, at_vertex, c, a, lower, upper, tau, noise, sign, UNIT, CAPPED)
        face = tl.where(vertex[:, None], other, face)
    side = tl.where(below, -1, 1)
    side = tl.where(equality, tl.where(tau < -noise, -1, 1), side)
    if SUPPORT:
        slack = ~equality & (weak | (tau == 0.0))
        tau = tl.where(slack, 0.0, tau)
        side = tl.where(slack | ~searching, 0, side)
    else:
        side = tl.where(searching, side, _row_at(value, _sum(tl.abs(x) if UNIT else tl.abs(c * x)), low, high))
    fine = status == _SOLVED
    if L1:
        sign_of_point = (given > 0.0).to(tl.int32) - (given < 0.0).to(tl.int32)
        face = tl.where((side != 0)[:, None] & (face != 0), 0, sign_of_point)
        x = tl.where(given < 0.0, 0.0 - x, x)
    x = tl.where(fine[:, None], x, _NAN)
    face = tl.where(fine[:, None], face, 0)
    tl.store(primal + row[:, None] * n + column[None, :], x.to(primal.dtype.element_ty), mask=inside)
    tl.store(faces + row[:, None] * (n + 1) + column[None, :], face.to(tl.int8), mask=inside)
    tl.store(faces + row * (n + 1) + n, tl.where(fine, side, 0).to(tl.int8), mask=in_batch)
    tl.store(multipliers + row, tl.where(fine, tau, _NAN).to(multipliers.dtype.element_ty), mask=in_batch)
    tl.store(statuses + row, status.to(tl.int8), mask=in_batch)


@triton.jit
def _kkt_tile(
    face, weight, coefficients, rhs_primal, rhs_bounds, row, column, inside, n, tight,
    weight_stride, coefficients_stride, g_stride, bounds_stride,
    WEIGHTED: tl.constexpr, WITH_COEFFICIENTS: tl.constexpr, WITH_BOUNDS: tl.constexpr, L1: tl.constexpr,
):  # fmt: skip
    """Return g, h, 1/h, the row's normal, the right-hand side of held coordinates and which are held, a tile each."""
    held = tl.load(face + row[:, None] * (n + 1) + column[None, :], mask=inside, other=0)
    g = tl.load(rhs_primal + row[:, None] * g_stride + column[None, :], mask=inside, other=0.0).to(tl.float64)
    normal = tl.where(inside, 1.0, 0.0).to(tl.float64)
    if WITH_COEFFICIENTS:
        at = coefficients + row[:, None] * coefficients_stride + column[None, :]
        normal = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    if L1:
        normal = normal * held.to(tl.float64)
        is_held = (held == 0) & tight[:, None]
    else:
        is_held = held != 0
    h = tl.full(g.shape, 1.0, tl.float64)
    inverse = h
    if WEIGHTED:
        h = tl.load(weight + row[:, None] * weight_stride + column[None, :], mask=inside, other=1.0).to(tl.float64)
        good = (h > 0.0) & (h < _INF)  # those of a failed item may be anything
        inverse = tl.where(good, 1.0 / tl.where(good, h, 1.0), 0.0)
    fixed = tl.zeros_like(g)
    if WITH_BOUNDS:
        at = rhs_bounds + row[:, None] * bounds_stride + column[None, :]
        fixed = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    return g, h, inverse, normal, fixed, is_held


@triton.jit
def budget_kkt(
    face, primal, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds, u, w, wb,
    batch, n, primal_stride, weight_stride, coefficients_stride, g_stride, rows_stride, bounds_stride,
    WEIGHTED: tl.constexpr, WITH_COEFFICIENTS: tl.constexpr, WITH_ROWS: tl.constexpr, WITH_BOUNDS: tl.constexpr,
    L1: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Solve the KKT systems of faces; rows of any length, tile by tile, once in registers where SINGLE.

    An item whose primal is NaN failed: its result is zero, or NaN where its right-hand side is not zero.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = row < batch
    tight = tl.load(face + row * (n + 1) + n, mask=in_batch, other=0) != 0
    first = tl.load(primal + row * primal_stride, mask=in_batch, other=0.0)
    failed = first != first
    r = tl.zeros(row.shape, tl.float64)
    if WITH_ROWS:
        r = tl.load(rhs_rows + row * rows_stride, mask=in_batch, other=0.0).to(tl.float64)
    total = tl.where(tight, -r, 0.0)
    slope = tl.zeros_like(total)
    asked = (r != 0.0).to(tl.int32)
    if SINGLE:
        column = tl.arange(0, BLOCK)
        inside = in_batch[:, None] & (column < n)[None, :]
        g, h, inverse, normal, fixed, held = _kkt_tile(
            face, weight, coefficients, rhs_primal, rhs_bounds, row, column, inside, n, tight,
            weight_stride, coefficients_stride, g_stride, bounds_stride, WEIGHTED, WITH_COEFFICIENTS, WITH_BOUNDS, L1,
        )  # fmt: skip
        total += _sum(tl.where(held, normal * fixed, normal * inverse * g))
        slope += _sum(tl.where(held, 0.0, normal * inverse * normal))
        asked = tl.maximum(asked, tl.max(((g != 0.0) | (fixed != 0.0)).to(tl.int32), axis=1))
    else:
        begin = 0
        while begin < n:
            column = begin + tl.arange(0, BLOCK)
            inside = in_batch[:, None] & (column < n)[None, :]
            g, h, inverse, normal, fixed, held = _kkt_tile(
                face, weight, coefficients, rhs_primal, rhs_bounds, row, column, inside, n, tight,
                weight_stride, coefficients_stride, g_stride, bounds_stride, WEIGHTED, WITH_COEFFICIENTS, WITH_BOUNDS,
                L1,
            )  # fmt: skip
            total += _sum(tl.where(held, normal * fixed, normal * inverse * g))
            slope += _sum(tl.where(held, 0.0, normal * inverse * normal))
            asked = tl.maximum(asked, tl.max(((g != 0.0) | (fixed != 0.0)).to(tl.int32), axis=1))
            begin += BLOCK
    used = tight & (slope > 0.0) & ~failed
    multiplier = tl.where(used, total / tl.where(used, slope, 1.0), 0.0)
    bad = tl.where(asked > 0, _NAN, 0.0)
    tl.store(w + row, tl.where(failed, bad, multiplier).to(w.dtype.element_ty), mask=in_batch)
    if SINGLE:
        rest = g - tl.where(used[:, None], multiplier[:, None] * normal, 0.0)
        x = tl.where(held, fixed, rest * inverse)
        force = tl.where(held, rest - h * fixed, 0.0)
        x = tl.where(failed[:, None], bad[:, None], x)
        force = tl.where(failed[:, None], bad[:, None], force)
        tl.store(u + row[:, None] * n + column[None, :], x.to(u.dtype.element_ty), mask=inside)
        tl.store(wb + row[:, None] * n + column[None, :], force.to(wb.dtype.element_ty), mask=inside)
    else:
        begin = 0
        while begin < n:
            column = begin + tl.arange(0, BLOCK)
            inside = in_batch[:, None] & (column < n)[None, :]
            g, h, inverse, normal, fixed, held = _kkt_tile(
                face, weight, coefficients, rhs_primal, rhs_bounds, row, column, inside, n, tight,
                weight_stride, coefficients_stride, g_stride, bounds_stride, WEIGHTED, WITH_COEFFICIENTS, WITH_BOUNDS,
                L1,
            )  # fmt: skip
            rest = g - tl.where(used[:, None], multiplier[:, None] * normal, 0.0)
            x = tl.where(held, fixed, rest * inverse)
            force = tl.where(held, rest - h * fixed, 0.0)
            x = tl.where(failed[:, None], bad[:, None], x)
            force = tl.where(failed[:, None], bad[:, None], force)
            tl.store(u + row[:, None] * n + column[None, :], x.to(u.dtype.element_ty), mask=inside)
            tl.store(wb + row[:, None] * n + column[None, :], force.to(wb.dtype.element_ty), mask=inside)
            begin += BLOCK
