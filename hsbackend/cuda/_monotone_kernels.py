"""Triton kernels of monotone chains; the method is that of ``families/_monotone_kernels``, one lane per chain.

Pooling adjacent violators is sequential along a chain and independent between chains, so a lane pools a chain and a
warp pools 32, each lane at its own place: O(n) operations per chain. (The min-max formula would use all lanes for one
chain, at O(n^2) operations; it is faster for single chains of some hundred coordinates only.) A lane keeps its stack of
blocks in device memory, entry k of chain b at ``k stack_stride + b``: neighbours write neighbouring words while they
are in step.

A lane reads back what it wrote itself and nothing else, which needs no barrier as long as one lane has one chain:
programs are one warp with 32 chains.
"""

import triton
import triton.language as tl

_SOLVED = tl.constexpr(0)
_INFEASIBLE = tl.constexpr(1)
_INVALID = tl.constexpr(3)

_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
#: See families/_monotone_kernels.
_ROUNDING = tl.constexpr(2.0**-48)


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def _value_and_weight(point, weight, chain, i, mask, point_stride, weight_stride, WEIGHTED: tl.constexpr):
    v = tl.load(point + chain * point_stride + i, mask=mask, other=0.0).to(tl.float64)
    h = tl.full(v.shape, 1.0, tl.float64)
    if WEIGHTED:
        h = tl.load(weight + chain * weight_stride + i, mask=mask, other=1.0).to(tl.float64)
    return v, h


@triton.jit
def monotone_solve(
    point, weight, rhs, primal, multipliers, faces, statuses, level, mass, size, begin,
    batch, n, point_stride, weight_stride, rhs_stride, stack_stride, allowance,
    WEIGHTED: tl.constexpr, SUPPORT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Project chains on ``{low <= x_1 <= ... <= x_n <= high}``.

    point (B, n), rhs (1 or B, 2), primal (B, n), multipliers (B, 2), faces (B, n + 2) int32, statuses (B,) int8. The
    stack: level, mass, size (n, stack_stride) float64 and begin (n + 1, stack_stride) int32; mean or, at first, sum of
    a block, its weight, its weighted mean of ``|v|``, its first coordinate.
    """
    chain = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    lane_in = chain < batch
    zero = tl.zeros((LANES,), tl.float64)
    nothing = tl.zeros((LANES,), tl.int32)
    wide = tl.zeros((LANES,), tl.int64)
    stride = wide + stack_stride
    length = nothing + n
    low = tl.load(rhs + chain * rhs_stride, mask=lane_in, other=0.0).to(tl.float64)
    high = tl.load(rhs + chain * rhs_stride + 1, mask=lane_in, other=0.0).to(tl.float64)
    invalid = (low != low) | (high != high)
    nowhere = (low == _INF) | (high == -_INF)
    crossed = ~invalid & ~nowhere & (low > high)
    nowhere = nowhere | (crossed & (low - high > allowance * tl.maximum(tl.abs(low), tl.abs(high))))
    middle = 0.5 * (low + high)
    low = tl.where(crossed, middle, low)
    high = tl.where(crossed, middle, high)
    i = 0
    while i < n:
        v, h = _value_and_weight(point, weight, chain, i, lane_in, point_stride, weight_stride, WEIGHTED)
        invalid = invalid | ~(tl.abs(v) < _INF) | ~((h > 0.0) & (h < _INF))
        i += 1
    status = tl.where(invalid, _INVALID, tl.where(nowhere, _INFEASIBLE, _SOLVED))
    fine = lane_in & (status == _SOLVED)

    # Pool. The last block stays out of the stack. Sums, not means: s/m >= t/w without a division.
    v, h = _value_and_weight(point, weight, chain, 0, fine, point_stride, weight_stride, WEIGHTED)
    total = h * v
    weight_now = h
    first = nothing
    count = nothing
    at = nothing + 1
    popping = at < 0
    working = fine
    while _any(working):
        reading = working & ~popping & (at < length)
        v, h = _value_and_weight(point, weight, chain, at, reading, point_stride, weight_stride, WEIGHTED)
        value = h * v
        absorbs = reading & (total * h >= value * weight_now)
        pushes = reading & ~absorbs
        place = count.to(tl.int64) * stride + chain
        tl.store(level + place, total, mask=pushes)
        tl.store(mass + place, weight_now, mask=pushes)
        tl.store(begin + place, first, mask=pushes)
        looking = working & popping & (count > 0)
        place = (count - 1).to(tl.int64) * stride + chain
        other = tl.load(level + place, mask=looking, other=0.0)
        other_weight = tl.load(mass + place, mask=looking, other=1.0)
        other_first = tl.load(begin + place, mask=looking, other=0)
        pops = looking & (other * weight_now >= total * other_weight)
        total = tl.where(pushes, value, total + tl.where(absorbs, value, 0.0) + tl.where(pops, other, 0.0))
        grown = weight_now + tl.where(absorbs, h, 0.0) + tl.where(pops, other_weight, 0.0)
        weight_now = tl.where(pushes, h, grown)
        first = tl.where(pushes, at, tl.where(pops, other_first, first))
        count = count + pushes.to(tl.int32) - pops.to(tl.int32)
        at = at + reading.to(tl.int32)
        popping = absorbs | pops
        working = working & (popping | (at < length))
    place = count.to(tl.int64) * stride + chain
    tl.store(level + place, total, mask=fine)
    tl.store(mass + place, weight_now, mask=fine)
    tl.store(begin + place, first, mask=fine)
    count = count + 1
    tl.store(begin + count.to(tl.int64) * stride + chain, length, mask=fine)

    # Again around the first means, so that long sums cost no digits; and pool what is left to rounding.
    block = nothing
    kept = nothing
    at = nothing
    first = nothing
    weight_now = tl.load(mass + chain, mask=fine, other=1.0)
    centre = tl.load(level + chain, mask=fine, other=0.0) / weight_now
    last = tl.load(begin + stride + chain, mask=fine, other=0)
    single = last - first == 1
    rest = zero
    spread = zero
    mean = zero
    merging = at < 0
    working = fine
    while _any(working):
        reading = working & ~merging
        v, h = _value_and_weight(point, weight, chain, at, reading, point_stride, weight_stride, WEIGHTED)
        rest = tl.where(reading, rest + h * (v - centre), rest)
        spread = tl.where(reading, spread + h * tl.abs(v), spread)
        at = at + reading.to(tl.int32)
        ends = reading & (at == last)
        mean = tl.where(ends, tl.where(single, v, centre + rest / weight_now), mean)
        spread = tl.where(ends, tl.where(single, tl.abs(v), spread / weight_now), spread)
        looking = (ends | merging) & (kept > 0)
        place = (kept - 1).to(tl.int64) * stride + chain
        other = tl.load(level + place, mask=looking, other=-_INF)
        pops = looking & (other >= mean)
        other_weight = tl.load(mass + place, mask=pops, other=0.0)
        other_size = tl.load(size + place, mask=pops, other=0.0)
        other_first = tl.load(begin + place, mask=pops, other=0)
        grown = weight_now + other_weight
        share = tl.where(pops, other_weight / grown, 0.0)
        mean = tl.where(pops, mean + share * (other - mean), mean)
        spread = tl.where(pops, spread + share * (other_size - spread), spread)
        weight_now = tl.where(pops, grown, weight_now)
        first = tl.where(pops, other_first, first)
        kept = kept - pops.to(tl.int32)
        writes = (ends | merging) & ~pops
        place = kept.to(tl.int64) * stride + chain
        tl.store(level + place, mean, mask=writes)
        tl.store(mass + place, weight_now, mask=writes)
        tl.store(size + place, spread, mask=writes)
        tl.store(begin + place, first, mask=writes)
        kept = kept + writes.to(tl.int32)
        merging = pops
        block = block + writes.to(tl.int32)
        working = working & ~(writes & (block == count))
        goes_on = writes & working
        place = block.to(tl.int64) * stride + chain
        weight_now = tl.where(goes_on, tl.load(mass + place, mask=goes_on, other=1.0), weight_now)
        centre = tl.where(goes_on, tl.load(level + place, mask=goes_on, other=0.0) / weight_now, centre)
        first = tl.where(goes_on, last, first)
        last = tl.where(goes_on, tl.load(begin + stride + place, mask=goes_on, other=0), last)
        single = tl.where(goes_on, last - first == 1, single)
        rest = tl.where(goes_on, 0.0, rest)
        spread = tl.where(goes_on, 0.0, spread)
    count = tl.where(fine, kept, 1)
    tl.store(begin + count.to(tl.int64) * stride + chain, length, mask=fine)

    # Blocks at or beyond the bounds: the first `below` and those from `above` on.
    size_low = tl.where(low > -_INF, tl.abs(low), 0.0)
    size_high = tl.where(high < _INF, tl.abs(high), 0.0)
    below = nothing
    above = count
    nu_low = zero
    nu_high = zero
    scale_low = zero
    scale_high = zero
    working = fine
    while _any(working):
        place = below.to(tl.int64) * stride + chain
        mean = tl.load(level + place, mask=working, other=0.0)
        spread = tl.load(size + place, mask=working, other=0.0)
        weight_now = tl.load(mass + place, mask=working, other=0.0)
        if SUPPORT:
            working = working & (mean < low)
        else:
            working = working & (mean - low <= _ROUNDING * (spread + size_low))
        nu_low = tl.where(working, nu_low + weight_now * tl.minimum(mean - low, 0.0), nu_low)
        scale_low = tl.where(working, scale_low + weight_now * (spread + size_low), scale_low)
        below = below + working.to(tl.int32)
        working = working & (below < count)
    working = fine
    while _any(working):
        place = (above - 1).to(tl.int64) * stride + chain
        mean = tl.load(level + place, mask=working, other=0.0)
        spread = tl.load(size + place, mask=working, other=0.0)
        weight_now = tl.load(mass + place, mask=working, other=0.0)
        if SUPPORT:
            working = working & (mean > high)
        else:
            working = working & (high - mean <= _ROUNDING * (spread + size_high))
        nu_high = tl.where(working, nu_high + weight_now * tl.maximum(mean - high, 0.0), nu_high)
        scale_high = tl.where(working, scale_high + weight_now * (spread + size_high), scale_high)
        above = above - working.to(tl.int32)
        working = working & (above > 0)
    # low == high to rounding: one block, held twice.
    twice = fine & ((high - low <= _ROUNDING * (size_low + size_high)) | (below > above))
    at_low = below > 0
    at_high = above < count
    if SUPPORT:
        strong = -nu_low > _ROUNDING * scale_low
        at_low = at_low & strong
        nu_low = tl.where(strong, nu_low, 0.0)
        strong = nu_high > _ROUNDING * scale_high
        at_high = at_high & strong
        nu_high = tl.where(strong, nu_high, 0.0)
    begin_low = tl.load(begin + below.to(tl.int64) * stride + chain, mask=fine & (below > 0), other=0)
    begin_high = tl.load(begin + above.to(tl.int64) * stride + chain, mask=fine, other=n)
    width = wide + (n + 2)
    if SUPPORT:
        # What is held at low is tied where sums from the right are positive; kept in the face for the pass below.
        z = zero
        scale = zero
        i = n - 1
        while i > 0:
            held = fine & (begin_low > i)
            v, h = _value_and_weight(point, weight, chain, i, held, point_stride, weight_stride, WEIGHTED)
            z = tl.where(held, z + h * (low - v), z)
            scale = tl.where(held, scale + h * (tl.abs(v) + tl.abs(low)), scale)
            tl.store(faces + chain * width + (i - 1), (z > _ROUNDING * scale).to(tl.int32), mask=held)
            i -= 1

    block = nothing - 1
    name = nothing
    last = nothing
    level_now = zero
    size_now = zero
    z = zero
    scale = zero
    pulled = zero
    least = zero
    tied = nothing > 0
    i = 0
    while i < n:
        starts = fine & (last == i)
        block = block + starts.to(tl.int32)
        place = block.to(tl.int64) * stride + chain
        level_before = level_now
        size_before = size_now
        level_now = tl.where(starts, tl.load(level + place, mask=starts, other=0.0), level_now)
        size_now = tl.where(starts, tl.load(size + place, mask=starts, other=0.0), size_now)
        last = tl.where(starts, tl.load(begin + stride + place, mask=starts, other=0), last)
        value = tl.minimum(tl.maximum(level_now, low), high)
        v, h = _value_and_weight(point, weight, chain, i, fine, point_stride, weight_stride, WEIGHTED)
        pulled = pulled + h * (v - value)
        least = tl.minimum(least, pulled)
        if SUPPORT:
            name = name + ((nothing + i > 0) & ~tied).to(tl.int32)
            in_low = begin_low > i
            in_high = begin_high <= i
            target = tl.where(in_low, low, tl.where(in_high, high, level_now))
            anew = tl.where(in_high, begin_high == i, starts)
            z = tl.where(anew, 0.0, z) + h * (v - target)
            scale = tl.where(anew, 0.0, scale) + h * (tl.abs(v) + tl.abs(target))
            goes_on = tl.where(in_high, length, last) > i + 1
            kept_tie = tl.load(faces + chain * width + i, mask=fine & (begin_low > i + 1), other=0) != 0
            tied = tl.where(in_low, (begin_low > i + 1) & kept_tie, goes_on & (z > _ROUNDING * scale))
        else:
            near = level_now - level_before <= _ROUNDING * (size_now + size_before)
            edge = (block == below) | (block == above)
            free = (block > below) & (block < above) & ~near
            name = name + (starts & (block > 0) & (edge | free)).to(tl.int32)
        x = tl.where(fine, value, _NAN)
        tl.store(primal + chain * n + i, x.to(primal.dtype.element_ty), mask=lane_in)
        tl.store(faces + chain * width + i, tl.where(fine & ~twice, name, 0), mask=lane_in)
        i += 1
    nu_low = tl.where(twice, least, nu_low)
    nu_high = tl.where(twice, pulled - least, nu_high)
    nu_low = tl.where(fine, nu_low, _NAN)
    nu_high = tl.where(fine, nu_high, _NAN)
    tl.store(multipliers + chain * 2, nu_low.to(multipliers.dtype.element_ty), mask=lane_in)
    tl.store(multipliers + chain * 2 + 1, nu_high.to(multipliers.dtype.element_ty), mask=lane_in)
    tl.store(faces + chain * width + n, (fine & (twice | at_low)).to(tl.int32), mask=lane_in)
    tl.store(faces + chain * width + n + 1, (fine & (twice | at_high)).to(tl.int32), mask=lane_in)
    tl.store(statuses + chain, status.to(tl.int8), mask=lane_in)


@triton.jit
def monotone_kkt(
    face, primal, weight, rhs_primal, rhs_rows, u, w, wb,
    batch, n, primal_stride, weight_stride, g_stride, rows_stride,
    WEIGHTED: tl.constexpr, WITH_ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Average over free blocks, put held ones at r: a lane reads a block, then writes it.

    An item whose primal is NaN failed: its result is zero, or NaN where its right-hand side is not zero.
    """
    chain = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    lane_in = chain < batch
    zero = tl.zeros((LANES,), tl.float64)
    nothing = tl.zeros((LANES,), tl.int32)
    length = nothing + n
    width = tl.zeros((LANES,), tl.int64) + (n + 2)
    sample = tl.load(primal + chain * primal_stride, mask=lane_in, other=0.0)
    failed = sample != sample
    at_low = tl.load(face + chain * width + n, mask=lane_in, other=0) != 0
    at_high = tl.load(face + chain * width + n + 1, mask=lane_in, other=0) != 0
    r_low = zero
    r_high = zero
    if WITH_ROWS:
        r_low = tl.load(rhs_rows + chain * rows_stride, mask=lane_in, other=0.0).to(tl.float64)
        r_high = tl.load(rhs_rows + chain * rows_stride + 1, mask=lane_in, other=0.0).to(tl.float64)
    asked = (r_low != 0.0) | (r_high != 0.0)
    w_low = zero
    w_high = zero
    first = nothing
    read = nothing
    written = nothing
    name = nothing
    total = zero
    mass = zero
    value = zero
    writing = nothing > 0
    working = lane_in
    while _any(working):
        reading = working & ~writing & (read < length)
        name_here = tl.load(face + chain * width + read, mask=reading, other=-1)
        name = tl.where(reading & (read == first), name_here, name)
        same = reading & (name_here == name)
        g = tl.load(rhs_primal + chain * g_stride + read, mask=same, other=0.0).to(tl.float64)
        h = tl.full((LANES,), 1.0, tl.float64)
        if WEIGHTED:
            h = tl.load(weight + chain * weight_stride + read, mask=same, other=1.0).to(tl.float64)
        asked = asked | (same & (g != 0.0))
        total = tl.where(same, total + g, total)
        mass = tl.where(same, mass + h, mass)
        read = read + same.to(tl.int32)
        ends = working & ~writing & ~(same & (read < length))
        low_here = ends & (first == 0) & at_low
        high_here = ends & ~low_here & (read == length) & at_high
        mean = tl.where(mass > 0.0, total / tl.where(mass > 0.0, mass, 1.0), 0.0)
        value = tl.where(ends, tl.where(low_here, r_low, tl.where(high_here, r_high, mean)), value)
        w_low = tl.where(low_here, total - mass * value, w_low)
        w_high = tl.where(high_here, total - mass * value, w_high)
        writing = writing | ends
        puts = working & writing & (written < read)
        x = tl.where(failed, tl.where(asked, _NAN, 0.0), value)
        tl.store(u + chain * n + written, x.to(u.dtype.element_ty), mask=puts)
        x = tl.where(failed & asked, _NAN, zero)
        tl.store(wb + chain * n + written, x.to(wb.dtype.element_ty), mask=puts)
        written = written + puts.to(tl.int32)
        finished = writing & (written == read)
        first = tl.where(finished, read, first)
        total = tl.where(finished, 0.0, total)
        mass = tl.where(finished, 0.0, mass)
        writing = writing & ~finished
        working = working & (written < length)
    w_low = tl.where(failed, tl.where(asked, _NAN, 0.0), w_low)
    w_high = tl.where(failed, tl.where(asked, _NAN, 0.0), w_high)
    tl.store(w + chain * 2, w_low.to(w.dtype.element_ty), mask=lane_in)
    tl.store(w + chain * 2 + 1, w_high.to(w.dtype.element_ty), mask=lane_in)
