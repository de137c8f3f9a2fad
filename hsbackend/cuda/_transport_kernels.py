"""Triton kernels of transport polytopes; the method is that of ``families/_transport_kernels``.

A program holds whole matrices in registers, ``[M, R, C]`` in float64: many where they are small, one from 32 x 32 on.
Every quantity of a row is ``[M, R]``, of a column ``[M, C]``, of an item ``[M]``. R, the rows that are eliminated, is
the longer side. All items of a program step together until the last is done. Entries that are not there (behind the
end of a matrix, forbidden, in a line that sums to zero) have ``T = -inf``: never free, in no sum.

Loops over the columns of a graph pick one row out of ``[M, C, C]`` with a mask, because registers cannot be indexed.
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
#: See families/_transport_kernels, whose numbers these are.
_ROUNDING = tl.constexpr(2.0**-48)
_OPEN = tl.constexpr(1e-290)
_FAR = tl.constexpr(1024.0)
_PATIENCE = tl.constexpr(30)
_STALLED = tl.constexpr(10)


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def _any_of(mask):
    """Whether any entry of [M, C] is true, per item."""
    return tl.max(mask.to(tl.int32), axis=1) > 0


@triton.jit
def _column_sums(table):
    return tl.sum(tl.maximum(table, 0.0), axis=1)


@triton.jit
def _balance_rows(table, inverse, supply, active, columns: tl.constexpr):
    """Move the multiplier of every active row until the row sums to its supply; return T and how far, [M, R].

    The sum of a row is convex and decreasing in its multiplier: Newton's method is monotone after one step.
    """
    shift = tl.zeros_like(supply)
    slope_before = shift - 1.0
    excess_before = shift
    steps = 0
    while (tl.max(tl.max(active.to(tl.int32), axis=1), axis=0) > 0) & (steps < columns + 8):
        slope = tl.sum(tl.where(table > 0.0, inverse, 0.0), axis=2)
        excess = tl.sum(tl.maximum(table, 0.0), axis=2) - supply
        done = tl.abs(excess) <= 2.0 * _EPS * supply
        done = done | ((slope == slope_before) & (tl.abs(excess) >= 0.5 * tl.abs(excess_before)))  # rounding
        active = active & ~(done & (slope > 0.0))
        move = excess / tl.where(slope > 0.0, slope, 1.0)
        empty = active & (slope <= 0.0)
        if tl.max(tl.max(empty.to(tl.int32), axis=1), axis=0) > 0:
            # Nothing is free: let the entry nearest to zero carry the row.
            distance = table / inverse
            nearest = tl.max(distance, axis=2)
            share = tl.where(distance == nearest[:, :, None], 1.0 / inverse, _INF)
            move = tl.where(empty, nearest - supply * tl.min(share, axis=2), move)
        move = tl.where(active & (tl.abs(move) < _INF), move, 0.0)
        table = table - move[:, :, None] * inverse
        shift = shift + move
        slope_before = slope
        excess_before = excess
        steps += 1
    return table, shift


@triton.jit
def _conductances(table, inverse, rows: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Column graph of the entries ``T > 0``, [M, C, C] with a meaningless diagonal; and ``degree = M 1``, [M, R]."""
    mask = tl.where(table > 0.0, inverse, 0.0)
    degree = tl.sum(mask, axis=2)
    share = mask / tl.where(degree > 0.0, degree, 1.0)[:, :, None]
    index = tl.arange(0, R)[None, :, None]
    graph = tl.zeros((table.shape[0], C, C), tl.float64)
    for i in range(0, rows):
        one = index == i
        left = tl.sum(tl.where(one, mask, 0.0), axis=1)
        right = tl.sum(tl.where(one, share, 0.0), axis=1)
        graph = graph + left[:, :, None] * right[:, None, :]
    return mask, graph, degree


@triton.jit
def _row_of(graph, k, C: tl.constexpr):
    """Entries ``j > k`` of row k, [M, C]."""
    index = tl.arange(0, C)
    row = tl.sum(tl.where((index == k)[None, :, None], graph, 0.0), axis=1)
    return tl.where((index > k)[None, :], row, 0.0)


@triton.jit
def _factor(graph, y, columns: tl.constexpr, C: tl.constexpr):
    """Eliminate one column after the other (star-mesh transforms) and carry the right-hand side along.

    Returns graph, pivots and y. A zero pivot ends a component, and y is there the sum over the component.
    """
    index = tl.arange(0, C)[None, :]
    pivot = tl.zeros_like(y)
    for k in range(0, columns):
        row = _row_of(graph, k, C)
        total = tl.sum(row, axis=1)[:, None]
        share = row / tl.where(total > 0.0, total, 1.0)
        graph = graph + share[:, :, None] * row[:, None, :]
        y = y + share * tl.sum(tl.where(index == k, y, 0.0), axis=1)[:, None]
        pivot = tl.where(index == k, total, pivot)
    return graph, pivot, y


@triton.jit
def _backward(graph, pivot, y, columns: tl.constexpr, C: tl.constexpr):
    """Second half of the solve; the last column of a component gets 0."""
    index = tl.arange(0, C)[None, :]
    d = tl.zeros_like(y)
    for back in range(0, columns):
        k = columns - 1 - back
        total = tl.sum(tl.where(index == k, y, 0.0) + _row_of(graph, k, C) * d, axis=1)[:, None]
        d = tl.where((index == k) & (pivot > 0.0), total / tl.where(pivot > 0.0, pivot, 1.0), d)
    return d


@triton.jit
def _connect(
    table, inverse, a, b, joining, pivot, y, rounding, column_in, rows: tl.constexpr, columns: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Move multipliers along shortest paths from components with a surplus to those with a deficit; open the paths.

    Lengths are slacks, free entries have none; y holds a component's surplus where the pivot is zero. Returns T, a, b
    and the largest surplus that has no way to a deficit, [M].
    """
    free = table > 0.0
    gap = tl.where(free, 0.0, -table / inverse)
    root = column_in & (pivot <= 0.0)
    to_column = tl.where(root & (y < -rounding[:, None]), 0.0, _INF).to(tl.float64)
    to_row = tl.min(gap + to_column[:, None, :], axis=2)
    changed = joining
    # A `for` with a guard: Triton 3.6 fails on nested `while` loops around reductions (layout conversions).
    for _round in range(0, rows + columns):
        if _any(changed):
            through = tl.min(tl.where(free, to_row[:, :, None], _INF), axis=1)
            nearer = tl.minimum(to_column, through)
            changed = joining & _any_of(nearer < to_column)
            to_column = nearer
            to_row = tl.min(gap + to_column[:, None, :], axis=2)
    surplus = root & (y > rounding[:, None])
    stuck = tl.max(tl.where(surplus & (to_column == _INF), y, 0.0), axis=1)
    farthest = tl.max(tl.where(surplus & (to_column < _INF), to_column, 0.0), axis=1)[:, None]
    reached = joining[:, None] & (to_row <= farthest)
    length = gap + to_column[:, None, :]
    index = tl.arange(0, C)[None, None, :]
    first = tl.min(tl.where((length == to_row[:, :, None]) & ~free, index, C), axis=2)
    opens = reached[:, :, None] & (index == first[:, :, None])
    to_row = tl.where(joining[:, None], tl.minimum(to_row, farthest), 0.0)
    to_column = tl.where(joining[:, None], tl.minimum(to_column, farthest), 0.0)
    moved = tl.minimum(table + (to_row[:, :, None] - to_column[:, None, :]) * inverse, 0.0)
    table = tl.where(free, table, tl.where(opens, _OPEN, moved))
    return table, a - to_row, b + to_column, tl.where(joining, stuck, 0.0)


@triton.jit
def _first_change(table, inverse, lean, d, rounding, R: tl.constexpr, C: tl.constexpr):
    """Move T along (lean, d) until an entry changes between free and held, and change it; return T and how far, [M]."""
    slant = lean[:, :, None] + d[:, None, :]
    rate = -slant * inverse
    # What only carries rounding stays as it is, or ties would go to and fro.
    size = tl.abs(lean)[:, :, None] + tl.abs(d)[:, None, :]
    noise = 1e-13 * size * inverse + rounding[:, None, None]
    free = table > 0.0
    changes = ((rate < -noise) & free) | ((rate > noise) & ~free)
    at = tl.where(changes, -table / tl.where(changes, rate, 1.0), _INF)
    length = tl.min(tl.min(at, axis=2), axis=1)
    index = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    first = tl.min(tl.min(tl.where(at == length[:, None, None], index[None, :, :], R * C), axis=2), axis=1)
    hit = length < 1.0
    length = tl.minimum(length, 1.0)
    one = hit[:, None, None] & (index[None, :, :] == first[:, None, None])
    moved = table - length[:, None, None] * slant * inverse
    moved = tl.where(free, tl.maximum(moved, _OPEN), tl.minimum(moved, 0.0))
    moved = tl.where(one, tl.where(free, 0.0, _OPEN), moved)
    return moved, length


@triton.jit
def _start(table, inverse, supply, demand, row_used, column_used):
    """Ignore ``X >= 0``: one pass, exact for unit weights. Return T, a, b and whether every line has an entry."""
    there = table > -_INF
    slope = tl.sum(tl.where(there, inverse, 0.0), axis=2)
    excess = tl.sum(tl.where(there, table, 0.0), axis=2) - supply
    complete = ~_any_of(row_used & (slope == 0.0))
    a = tl.where(slope > 0.0, excess / tl.where(slope > 0.0, slope, 1.0), 0.0)
    table = table - a[:, :, None] * inverse
    slope = tl.sum(tl.where(there, inverse, 0.0), axis=1)
    excess = tl.sum(tl.where(there, table, 0.0), axis=1) - demand
    complete = complete & ~_any_of(column_used & (slope == 0.0))
    b = tl.where(slope > 0.0, excess / tl.where(slope > 0.0, slope, 1.0), 0.0)
    return table - b[:, None, :] * inverse, a, b, complete


@triton.jit
def _newton(
    table, inverse, supply, demand, row_used, column_used, a, b, active, patience, allowance,
    rows: tl.constexpr, columns: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Solve the active items from the start in T; return T, a, b and outcomes."""
    total = tl.sum(supply, axis=1)
    scale = tl.maximum(tl.max(supply, axis=1), tl.max(demand, axis=1))
    rounding = 16.0 * _EPS * total
    good = 16.0 * _EPS * scale
    bearable = 4.0 * rounding
    norm_before = tl.full(total.shape, _INF, tl.float64)
    length = tl.full(total.shape, 1.0, tl.float64)
    stalled = tl.zeros(total.shape, tl.int32)
    status = tl.full(total.shape, _SOLVED, tl.int32)
    unbalanced = active
    step = 0
    most = 1000 + 20 * (rows + columns)
    while _any(active):
        if _any(unbalanced & active):
            table, moved = _balance_rows(table, inverse, supply, row_used & (unbalanced & active)[:, None], columns)
            a = a + moved
        residual = _column_sums(table) - demand
        norm = tl.max(tl.abs(residual), axis=1)
        slow = (norm > 0.5 * norm_before) & (length == 1.0)
        stalled = tl.where(slow, stalled + (norm <= bearable).to(tl.int32), 0)
        norm_before = tl.where(active, norm, norm_before)
        active = active & ~((norm <= good) | (stalled == _STALLED))
        late = active & (step >= most)
        status = tl.where(late & (norm > bearable), _NOT_CONVERGED, status)
        active = active & ~late
        following = step >= patience
        if _any(active):
            # Which components are out of balance? Join them until none is.
            joining = active
            mask, graph, degree = _conductances(table, inverse, rows, R, C)
            lean = tl.zeros_like(a)
            pivot = residual
            y = residual
            rounds = 0
            while _any(joining):
                mask, graph, degree = _conductances(table, inverse, rows, R, C)
                y = residual
                if following:  # rows are balanced to rounding only
                    lean = tl.where(row_used, tl.sum(tl.maximum(table, 0.0), axis=2) - supply, 0.0)
                    y = y - tl.sum(mask * (lean / tl.where(degree > 0.0, degree, 1.0))[:, :, None], axis=1)
                graph, pivot, y = _factor(graph, y, columns, C)
                surplus = column_used & (pivot <= 0.0) & (tl.abs(y) > rounding[:, None])
                joining = joining & _any_of(surplus)
                if _any(joining):
                    table, a, b, stuck = _connect(
                        table, inverse, a, b, joining, pivot, y, rounding, column_used, rows, columns, C
                    )  # fmt: skip
                    lost = joining & (stuck > allowance * total)
                    status = tl.where(lost, _INFEASIBLE, status)
                    active = active & ~lost
                    # The data is balanced to rounding only, and so is the result.
                    rounding = tl.where(stuck > 0.0, tl.maximum(rounding, 2.0 * stuck), rounding)
                    bearable = tl.where(stuck > 0.0, tl.maximum(bearable, 4.0 * stuck), bearable)
                    rounds += 1
                    joining = joining & active & (rounds < columns + 2)
            d = _backward(graph, pivot, y, columns, C)
            d = tl.where(active[:, None], d, 0.0)
            lean = lean - tl.sum(mask * d[:, None, :], axis=2)
            lean = tl.where(active[:, None] & (degree > 0.0), lean / tl.where(degree > 0.0, degree, 1.0), 0.0)
            if following:
                moved, length = _first_change(table, inverse, lean, d, 64.0 * good / 16.0, R, C)
                table = tl.where(active[:, None, None], moved, table)
                a = a + tl.where(active, length, 0.0)[:, None] * lean
                b = b + tl.where(active, length, 0.0)[:, None] * d
                bare = row_used & (tl.max((table > 0.0).to(tl.int32), axis=2) == 0)
                unbalanced = (length == 1.0) | _any_of(bare)  # a supply of the size of a rounding
            else:
                slope_start = tl.sum(residual * d, axis=1)
                searching = active
                length = tl.full(total.shape, 1.0, tl.float64)
                near = tl.zeros(total.shape, tl.float64)
                slope_near = slope_start
                far = near
                slope_far = near
                trial = table
                a_trial = a
                search = 0
                # Again `for` loops with guards, in two levels because one trial is the rule.
                for _many in range(0, 6):
                    if _any(searching):
                        for _few in range(0, 10):
                            if _any(searching):
                                slant = lean[:, :, None] + d[:, None, :]
                                part = table - length[:, None, None] * slant * inverse
                                part, moved = _balance_rows(
                                    part, inverse, supply, row_used & searching[:, None], columns
                                )
                                trial = tl.where(searching[:, None, None], part, trial)
                                a_trial = tl.where(searching[:, None], a + length[:, None] * lean + moved, a_trial)
                                ahead = _column_sums(part) - demand
                                slope = tl.sum(ahead * d, axis=1)
                                # The dual is convex: descent all the way while the slope is positive; a full step
                                # may be short, but a shortened one must not be.
                                too_far = (slope < -0.1 * slope_start) & (tl.max(tl.abs(ahead), axis=1) > good)
                                too_near = ~too_far & (slope > 0.5 * slope_start) & (far > 0.0)
                                far = tl.where(searching & too_far, length, far)
                                slope_far = tl.where(searching & too_far, slope, slope_far)
                                near = tl.where(searching & too_near, length, near)
                                slope_near = tl.where(searching & too_near, slope, slope_near)
                                search += 1
                                searching = searching & (too_far | too_near) & (far - near > 4.0 * _EPS * far)
                                drop = slope_near - slope_far
                                ratio = slope_near / tl.where(drop != 0.0, drop, 1.0)
                                if search % 3 == 0:
                                    ratio = tl.full(total.shape, 0.5, tl.float64)
                                ratio = tl.minimum(tl.maximum(ratio, 0.02), 0.98)
                                length = tl.where(searching, near + (far - near) * ratio, length)
                table = tl.where(active[:, None, None], trial, table)
                a = tl.where(active[:, None], a_trial, a)
                b = b + tl.where(active, length, 0.0)[:, None] * d
                unbalanced = unbalanced & (total < 0.0)
        step += 1
    return table, a, b, status


@triton.jit
def transport_solve(
    point, weight, rhs, primal, multipliers, faces, statuses,
    batch, point_stride, weight_stride, rhs_stride, allowance,
    rows: tl.constexpr, columns: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    row_first: tl.constexpr, column_first: tl.constexpr, WEIGHTED: tl.constexpr, ONES: tl.constexpr,
    SUPPORT: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Project matrices on ``{X >= 0, X 1 = r, X'1 = c}``.

    point (B, k1 k2), rhs (1 or B, k1 + k2), primal (B, k1 k2), multipliers (B, k1 + k2), faces (B, k1 k2) int8, and
    statuses (B,) int8. Entry (i, j) of the item as seen here, ``rows >= columns``, is number ``i row_stride + j
    column_stride``.
    """
    n = rows * columns
    m = rows + columns
    item = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    i = tl.arange(0, R)
    j = tl.arange(0, C)
    in_batch = item < batch
    row_in = in_batch[:, None] & (i < rows)[None, :]
    column_in = in_batch[:, None] & (j < columns)[None, :]
    inside = row_in[:, :, None] & column_in[:, None, :]
    entry = (i * row_stride)[None, :, None] + (j * column_stride)[None, None, :]
    v = tl.load(point + (item * point_stride)[:, None, None] + entry, mask=inside, other=-_INF).to(tl.float64)
    inverse = tl.full((M, R, C), 1.0, tl.float64)
    h = inverse
    invalid = (v != v) | (v == _INF)
    if WEIGHTED:
        at = weight + (item * weight_stride)[:, None, None] + entry
        h = tl.load(at, mask=inside, other=1.0).to(tl.float64)
        good = (h > 0.0) & (h < _INF)
        invalid = invalid | ~good
        h = tl.where(good, h, 1.0)
        inverse = 1.0 / h
    at = rhs + (item * rhs_stride)[:, None]
    supply = tl.load(at + (row_first + i)[None, :], mask=row_in, other=0.0).to(tl.float64)
    demand = tl.load(at + (column_first + j)[None, :], mask=column_in, other=0.0).to(tl.float64)
    bad = tl.max(tl.max(invalid.to(tl.int32), axis=2), axis=1) > 0
    bad = bad | ~(tl.max(tl.abs(supply), axis=1) < _INF) | ~(tl.max(tl.abs(demand), axis=1) < _INF)
    bad = bad | _any_of(supply != supply) | _any_of(demand != demand)
    supply = tl.where(bad[:, None], 0.0, supply)
    demand = tl.where(bad[:, None], 0.0, demand)
    largest = tl.maximum(tl.maximum(tl.max(supply, axis=1), tl.max(demand, axis=1)), 0.0)
    smallest = tl.minimum(tl.min(supply, axis=1), tl.min(demand, axis=1))
    row_used = supply > 0.0
    column_used = demand > 0.0
    supply = tl.maximum(supply, 0.0)
    demand = tl.maximum(demand, 0.0)
    supplied = tl.sum(supply, axis=1)
    demanded = tl.sum(demand, axis=1)
    status = tl.where(bad, _INVALID, _SOLVED)
    off = smallest < -allowance * largest
    off = off | (tl.abs(supplied - demanded) > allowance * tl.maximum(supplied, demanded))
    status = tl.where(~bad & off, _INFEASIBLE, status)
    differ = supplied != demanded  # to rounding: meet in the middle
    middle = 0.5 * (supplied + demanded)
    supply = tl.where(differ[:, None], supply * (middle / tl.where(supplied > 0.0, supplied, 1.0))[:, None], supply)
    demand = tl.where(differ[:, None], demand * (middle / tl.where(demanded > 0.0, demanded, 1.0))[:, None], demand)
    used = row_used[:, :, None] & column_used[:, None, :]
    any_used = _any_of(row_used) & _any_of(column_used)

    active = in_batch & (status == _SOLVED) & any_used
    size = tl.max(tl.max(tl.where(v > -_INF, tl.abs(v), 0.0), axis=2), axis=1)
    far = size > _FAR * largest
    if WEIGHTED and not ONES:
        far = in_batch
    table, a, b, complete = _start(tl.where(used, v, -_INF), inverse, supply, demand, row_used, column_used)
    a = tl.where(row_used, a, 0.0)
    b = tl.where(column_used, b, 0.0)
    status = tl.where(active & ~complete, _INFEASIBLE, status)
    active = active & complete
    # With weights the way may lead through multipliers far larger than those it ends at: start again there, on the
    # path, which makes no detours. Where V is far larger than the marginals, every move of T on the way rounds like
    # V: start again where the moves still to come are small.
    patience = _PATIENCE + rows + columns
    attempt = 0
    while _any(active):
        moved, a_new, b_new, found = _newton(
            table, inverse, supply, demand, row_used, column_used, a, b, active, patience, allowance, rows, columns,
            R, C,
        )  # fmt: skip
        table = tl.where(active[:, None, None], moved, table)
        a = tl.where(active[:, None] & row_used, a_new, a)
        b = tl.where(active[:, None] & column_used, b_new, b)
        status = tl.where(active, found, status)
        active = active & (status == _SOLVED) & far & (attempt == 0)
        # V - (a + b), the sum with its rounding (Knuth's two-sum).
        both = a[:, :, None] + b[:, None, :]
        first = both - a[:, :, None]
        rest = (a[:, :, None] - (both - first)) + (b[:, None, :] - first)
        again = (tl.where(used, v, -_INF) - both * inverse) - rest * inverse
        table = tl.where(active[:, None, None], again, table)
        if WEIGHTED and not ONES:
            patience = 0
        attempt += 1
    fine = status == _SOLVED

    # Lines that sum to zero were left out: the least multipliers that hold their entries at zero.
    left_out = v * h
    over = (column_used | ~any_used[:, None]) & column_in
    least = tl.max(tl.where(over[:, None, :] & inside, left_out - b[:, None, :], -_INF), axis=2)
    a = tl.where(row_used, a, tl.where(least > -_INF, least, 0.0))
    least = tl.max(tl.where(inside, left_out - a[:, :, None], -_INF), axis=1)
    b = tl.where(column_used | ~any_used[:, None], b, tl.where(least > -_INF, least, 0.0))
    a = tl.where(row_in, a, 0.0)
    b = tl.where(column_in, b, 0.0)
    # (1, -1) is always free: the multipliers of least norm.
    shift = (tl.sum(a, axis=1) - tl.sum(b, axis=1)) / m
    a = a - shift[:, None]
    b = b + shift[:, None]

    both = (a[:, :, None] + b[:, None, :]) * inverse
    t = tl.where(used, table, v - both)
    band = _ROUNDING * (tl.abs(v) + (tl.abs(a)[:, :, None] + tl.abs(b)[:, None, :]) * inverse)
    if SUPPORT:
        free = t >= -band
    else:
        free = t > band
    face = (free & (v > -_INF) & fine[:, None, None]).to(tl.int8)
    x = tl.where(fine[:, None, None], tl.where(used & (t > _OPEN), t, 0.0), _NAN)
    at = (item * n)[:, None, None] + entry
    tl.store(primal + at, x.to(primal.dtype.element_ty), mask=inside)
    tl.store(faces + at, face, mask=inside)
    at = multipliers + (item * m)[:, None]
    a = tl.where(fine[:, None], a, _NAN)
    b = tl.where(fine[:, None], b, _NAN)
    tl.store(at + (row_first + i)[None, :], a.to(multipliers.dtype.element_ty), mask=row_in)
    tl.store(at + (column_first + j)[None, :], b.to(multipliers.dtype.element_ty), mask=column_in)
    tl.store(statuses + item, status.to(tl.int8), mask=in_batch)


@triton.jit
def _labels(graph, pivot, columns: tl.constexpr, C: tl.constexpr):
    """Name every column's component after its last column, [M, C]."""
    index = tl.arange(0, C)[None, :]
    label = index + tl.zeros(pivot.shape, tl.int32)
    for back in range(0, columns):
        k = columns - 1 - back
        row = _row_of(graph, k, C)
        neighbour = tl.max(tl.where(row > 0.0, label, -1), axis=1)[:, None]
        label = tl.where((index == k) & (pivot > 0.0), neighbour, label)
    return label


@triton.jit
def transport_kkt(
    face, primal, weight, rhs_primal, rhs_rows, rhs_bounds, u, w, wb,
    batch, primal_stride, weight_stride, g_stride, rows_stride, bounds_stride,
    rows: tl.constexpr, columns: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    row_first: tl.constexpr, column_first: tl.constexpr, WEIGHTED: tl.constexpr, WITH_ROWS: tl.constexpr,
    WITH_BOUNDS: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Solve ``[Diag(M1) M; M' Diag(M'1)] (a, b) = N H^-1 g - r`` on the free entries, component by component.

    An item whose primal is NaN failed: its result is zero, or NaN where its right-hand side is not zero.
    """
    n = rows * columns
    m = rows + columns
    item = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    i = tl.arange(0, R)
    j = tl.arange(0, C)
    in_batch = item < batch
    row_in = in_batch[:, None] & (i < rows)[None, :]
    column_in = in_batch[:, None] & (j < columns)[None, :]
    inside = row_in[:, :, None] & column_in[:, None, :]
    entry = (i * row_stride)[None, :, None] + (j * column_stride)[None, None, :]
    free = tl.load(face + (item * n)[:, None, None] + entry, mask=inside, other=0) != 0
    g = tl.load(rhs_primal + (item * g_stride)[:, None, None] + entry, mask=inside, other=0.0).to(tl.float64)
    sample = tl.load(primal + item * primal_stride, mask=in_batch, other=0.0)
    failed = sample != sample
    h = tl.full((M, R, C), 1.0, tl.float64)
    inverse = h
    if WEIGHTED:
        at = weight + (item * weight_stride)[:, None, None] + entry
        h = tl.load(at, mask=inside, other=1.0).to(tl.float64)
        good = (h > 0.0) & (h < _INF)  # those of a failed item may be anything
        h = tl.where(good, h, 1.0)
        inverse = 1.0 / h
    asked = tl.max(tl.max((g != 0.0).to(tl.int32), axis=2), axis=1)
    fixed = tl.zeros_like(g)
    if WITH_BOUNDS:
        at = rhs_bounds + (item * bounds_stride)[:, None, None] + entry
        fixed = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        asked = tl.maximum(asked, tl.max(tl.max((fixed != 0.0).to(tl.int32), axis=2), axis=1))
    carried = tl.where(free, g * inverse, fixed)
    load_rows = tl.sum(carried, axis=2)
    load_columns = tl.sum(carried, axis=1)
    if WITH_ROWS:
        at = rhs_rows + (item * rows_stride)[:, None]
        r = tl.load(at + (row_first + i)[None, :], mask=row_in, other=0.0).to(tl.float64)
        c = tl.load(at + (column_first + j)[None, :], mask=column_in, other=0.0).to(tl.float64)
        asked = tl.maximum(asked, (_any_of(r != 0.0) | _any_of(c != 0.0)).to(tl.int32))
        load_rows = load_rows - r
        load_columns = load_columns - c
    bad = failed & (asked > 0)
    load_rows = tl.where(failed[:, None], 0.0, load_rows)
    load_columns = tl.where(failed[:, None], 0.0, load_columns)

    mask, graph, degree = _conductances(tl.where(free, 1.0, -1.0), inverse, rows, R, C)
    graph, pivot, _y = _factor(graph, tl.zeros_like(load_columns), columns, C)
    label = _labels(graph, pivot, columns, C)
    part = tl.max(tl.where(free, label[:, None, :], -1), axis=2)  # component of a row, -1 without a free entry
    active = part >= 0

    # The right-hand side sums to zero over a component but for rounding, or an inconsistent r: project.
    # [M, name, column] and [M, row, name]: who belongs to whom.
    of_column = ((j[None, :, None] == label[:, None, :]) & column_in[:, None, :]).to(tl.float64)
    of_row = (part[:, :, None] == j[None, None, :]).to(tl.float64)
    members = tl.sum(of_column, axis=2) + tl.sum(of_row, axis=1)
    members = tl.where(members > 0.0, members, 1.0)
    gap = tl.sum(of_column * load_columns[:, None, :], axis=2) - tl.sum(of_row * load_rows[:, :, None], axis=1)
    mean = gap / members
    load_rows = tl.where(active, load_rows + tl.sum(of_row * mean[:, None, :], axis=2), 0.0)
    load_columns = load_columns - tl.sum(of_column * mean[:, :, None], axis=1)
    divisor = tl.where(active, degree, 1.0)
    y = load_columns - tl.sum(mask * (load_rows / divisor)[:, :, None], axis=1)
    # The graph is factored: carry y along once more.
    index = j[None, :]
    for k in range(0, columns):
        row = _row_of(graph, k, C)
        total = tl.sum(row, axis=1)[:, None]
        y = y + row / tl.where(total > 0.0, total, 1.0) * tl.sum(tl.where(index == k, y, 0.0), axis=1)[:, None]
    b = _backward(graph, pivot, y, columns, C)
    a = tl.where(active, (load_rows - tl.sum(mask * b[:, None, :], axis=2)) / divisor, 0.0)
    # Least norm: (1, -1) on a component changes nothing.
    gap = tl.sum(of_row * a[:, :, None], axis=1) - tl.sum(of_column * b[:, None, :], axis=2)
    mean = gap / members
    a = tl.where(active, a - tl.sum(of_row * mean[:, None, :], axis=2), 0.0)
    b = b + tl.sum(of_column * mean[:, :, None], axis=1)

    rest = g - a[:, :, None] - b[:, None, :]
    x = tl.where(free, rest * inverse, fixed)
    force = tl.where(free, 0.0, rest - h * fixed)
    poison = tl.where(bad, _NAN, 0.0)
    x = tl.where(failed[:, None, None], poison[:, None, None], x)
    force = tl.where(failed[:, None, None], poison[:, None, None], force)
    a = tl.where(failed[:, None], poison[:, None], a)
    b = tl.where(failed[:, None], poison[:, None], b)
    at = (item * n)[:, None, None] + entry
    tl.store(u + at, x.to(u.dtype.element_ty), mask=inside)
    tl.store(wb + at, force.to(wb.dtype.element_ty), mask=inside)
    at = w + (item * m)[:, None]
    tl.store(at + (row_first + i)[None, :], a.to(w.dtype.element_ty), mask=row_in)
    tl.store(at + (column_first + j)[None, :], b.to(w.dtype.element_ty), mask=column_in)
