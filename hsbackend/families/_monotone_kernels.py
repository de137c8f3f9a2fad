"""Compiled projections onto monotone chains with bounds (isotonic regression), and the KKT solve on their faces.

    minimise  1/2 sum_j h_j (x_j - v_j)^2   subject to   low <= x_1 <= ... <= x_n <= high

has the solution ``x = clip(y, low, high)`` with y the solution without bounds: constant on blocks, the weighted mean of
v on each. Pooling adjacent violators with a stack finds the blocks in O(n); a second pass takes the means again around
the first ones, so that long sums cost no digits, and pools what is left to rounding.

The multiplier of ``x_i <= x_{i+1}`` is ``z_i = sum_{j <= i} h_j (v_j - x_j)`` over the block; it tells the rows of the
chain that hold by force from those that happen to be tight.

Sources: Ayer, Brunk, Ewing, Reid and Silverman, "An empirical distribution function for sampling with incomplete
information" (1955); Best and Chakravarti, "Active set algorithms for isotonic regression" (1990).
"""

from __future__ import annotations

import numpy as np

from hsbackend._parallel import compile_kernel, inline_kernel
from hsbackend.status import Status

_SOLVED = int(Status.SOLVED)
_INFEASIBLE = int(Status.INFEASIBLE)
_INVALID = int(Status.INVALID_INPUT)

#: Two numbers are "equal to rounding" within this fraction of the data they come from: 16 eps of float64.
_ROUNDING = 16.0 * 2.220446049250313e-16


@inline_kernel
def _all_finite(values):
    total = 0.0
    for i in range(values.shape[0]):
        total += 0.0 * values[i]
    return total == 0.0


@inline_kernel
def _pool(v, h, level, mass, size, begin):
    """Fill the blocks: mean, weight, weighted mean of ``|v|``, first coordinate. Return how many there are.

    ``level`` increases strictly; ``begin`` has one entry more than there are blocks.
    """
    n = v.shape[0]
    count = 0
    # The last block stays out of the arrays. Sums, not means: s/m >= t/w without a division.
    total = h[0] * v[0]
    weight = np.float64(h[0])
    first = 0
    for i in range(1, n):
        value = h[i] * v[i]
        if total * h[i] >= value * weight:
            total += value
            weight += h[i]
            while count > 0 and level[count - 1] * weight >= total * mass[count - 1]:
                count -= 1
                total += level[count]
                weight += mass[count]
                first = begin[count]
        else:
            level[count] = total
            mass[count] = weight
            begin[count] = first
            count += 1
            total = value
            weight = h[i]
            first = i
    level[count] = total
    mass[count] = weight
    begin[count] = first
    count += 1
    begin[count] = n
    kept = 0
    for k in range(count):
        first = begin[k]
        last = begin[k + 1]
        weight = mass[k]
        mean = np.float64(v[first])
        spread = abs(mean)
        if last - first > 1:
            mean = level[k] / weight
            rest = 0.0
            spread = 0.0
            for i in range(first, last):
                rest += h[i] * (v[i] - mean)
                spread += h[i] * abs(v[i])
            mean += rest / weight
            spread /= weight
        while kept > 0 and level[kept - 1] >= mean:
            kept -= 1
            weight += mass[kept]
            share = mass[kept] / weight
            mean += share * (level[kept] - mean)
            spread += share * (size[kept] - spread)
            first = begin[kept]
        level[kept] = mean
        mass[kept] = weight
        size[kept] = spread
        begin[kept] = first
        kept += 1
    begin[kept] = n
    return kept


@inline_kernel
def _forced_forward(v, h, value, first, last, tie):
    """Tie ``first ... last - 1``, all at ``value``, where sums from the left are positive to rounding."""
    z = 0.0
    scale = 0.0
    for i in range(first, last - 1):
        z += h[i] * (v[i] - value)
        scale += h[i] * (abs(v[i]) + abs(value))
        tie[i] = z > _ROUNDING * scale


@inline_kernel
def _forced_backward(v, h, value, first, last, tie):
    """Tie ``first ... last - 1``, all at ``value``, where sums from the right are negative to rounding."""
    z = 0.0
    scale = 0.0
    for i in range(last - 1, first, -1):
        z += h[i] * (value - v[i])
        scale += h[i] * (abs(v[i]) + abs(value))
        tie[i - 1] = z > _ROUNDING * scale


@compile_kernel
def monotone_items(
    start, stop, step, point, weight, rhs, support, allowance, primal, multipliers, face, status
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Project; ``allowance`` is the relative amount by which ``low`` may exceed ``high``."""
    n = point.shape[1]
    weighted = weight.shape[1] > 0
    weight_varies = 1 if weight.shape[0] > 1 else 0
    rhs_varies = 1 if rhs.shape[0] > 1 else 0
    h = np.ones(n)
    level = np.empty(n)
    mass = np.empty(n)
    size = np.empty(n)
    begin = np.empty(n + 1, dtype=np.int64)
    tie = np.empty(n, dtype=np.bool_)
    for b in range(start, stop, step):
        v = point[b]
        x = primal[b]
        blocks = face[b]
        low = np.float64(rhs[b * rhs_varies, 0])
        high = np.float64(rhs[b * rhs_varies, 1])
        outcome = _SOLVED
        if np.isnan(low) or np.isnan(high):
            outcome = _INVALID
        elif low == np.inf or high == -np.inf:
            outcome = _INFEASIBLE
        elif low > high:
            if low - high > allowance * max(abs(low), abs(high)):
                outcome = _INFEASIBLE
            low = high = 0.5 * (low + high)
        if weighted:
            given = weight[b * weight_varies]
            for i in range(n):
                h[i] = given[i]
                if not (h[i] > 0.0 and h[i] < np.inf):
                    outcome = _INVALID
        if not _all_finite(v):
            outcome = _INVALID
        status[b] = outcome
        if outcome != _SOLVED:
            for i in range(n):
                x[i] = np.nan
            for i in range(n + 2):
                blocks[i] = 0
            multipliers[b, 0] = np.nan
            multipliers[b, 1] = np.nan
            continue

        count = _pool(v, h, level, mass, size, begin)
        # Blocks at or beyond the bounds: the first `below` and those from `above` on.
        below = 0
        above = count
        size_low = abs(low) if low > -np.inf else 0.0
        size_high = abs(high) if high < np.inf else 0.0
        if support:
            while below < count and level[below] < low:
                below += 1
            while above > 0 and level[above - 1] > high:
                above -= 1
        else:
            while below < count and level[below] - low <= _ROUNDING * (size[below] + size_low):
                below += 1
            while above > 0 and high - level[above - 1] <= _ROUNDING * (size[above - 1] + size_high):
                above -= 1

        if high - low <= _ROUNDING * (size_low + size_high) or below > above:
            # low == high to rounding: one block, held twice. Of the multipliers, the pair nearest to zero for which
            # those of the chain rows are not negative.
            pulled = 0.0
            least = 0.0
            for k in range(count):
                value = min(max(level[k], low), high)
                for i in range(begin[k], begin[k + 1]):
                    x[i] = value
                    blocks[i] = 0
                    pulled += h[i] * (v[i] - value)
                    least = min(least, pulled)
            multipliers[b, 0] = least
            multipliers[b, 1] = pulled - least
            blocks[n] = 1
            blocks[n + 1] = 1
            continue

        nu_low = 0.0
        nu_high = 0.0
        scale_low = 0.0
        scale_high = 0.0
        for k in range(below):
            nu_low += mass[k] * min(level[k] - low, 0.0)
            scale_low += mass[k] * (size[k] + size_low)
        for k in range(above, count):
            nu_high += mass[k] * max(level[k] - high, 0.0)
            scale_high += mass[k] * (size[k] + size_high)
        at_low = below > 0
        at_high = above < count
        block = 0
        if support:
            if -nu_low <= _ROUNDING * scale_low:
                nu_low = 0.0
                at_low = False
            if nu_high <= _ROUNDING * scale_high:
                nu_high = 0.0
                at_high = False
            _forced_backward(v, h, low, 0, begin[below], tie)
            for k in range(below, above):
                _forced_forward(v, h, level[k], begin[k], begin[k + 1], tie)
            _forced_forward(v, h, high, begin[above], n, tie)
            for k in range(max(below, 1), min(above + 1, count)):
                tie[begin[k] - 1] = False
            for k in range(count):
                value = min(max(level[k], low), high)
                for i in range(begin[k], begin[k + 1]):
                    x[i] = value
                    blocks[i] = block
                    block += 0 if tie[i] else 1
        else:
            for k in range(count):
                if k in (below, above):
                    block += 1 if k > 0 else 0
                elif below < k < above:
                    block += 0 if level[k] - level[k - 1] <= _ROUNDING * (size[k] + size[k - 1]) else 1
                value = min(max(level[k], low), high)
                for i in range(begin[k], begin[k + 1]):
                    x[i] = value
                    blocks[i] = block
        multipliers[b, 0] = nu_low
        multipliers[b, 1] = nu_high
        blocks[n] = 1 if at_low else 0
        blocks[n + 1] = 1 if at_high else 0


@compile_kernel
def monotone_kkt_items(start, stop, step, face, weight, rhs_primal, rhs_rows, u, w, wb):  # type: ignore[no-untyped-def]
    """Average over free blocks, put held ones at r."""
    n = rhs_primal.shape[1]
    weighted = weight.shape[1] > 0
    weight_varies = 1 if weight.shape[0] > 1 else 0
    with_rows = rhs_rows.shape[1] > 0
    for b in range(start, stop, step):
        blocks = face[b]
        g = rhs_primal[b]
        h = weight[b * weight_varies]
        w[b, 0] = 0.0
        w[b, 1] = 0.0
        first = 0
        while first < n:
            last = first
            total = 0.0
            mass = 0.0
            name = blocks[first]
            if weighted:
                while last < n and blocks[last] == name:
                    total += g[last]
                    mass += h[last]
                    last += 1
            else:
                while last < n and blocks[last] == name:
                    total += g[last]
                    last += 1
                mass = np.float64(last - first)
            # A weight that is not positive belongs to an item that failed.
            value = total / mass if mass > 0.0 else 0.0
            row = -1
            if first == 0 and blocks[n] != 0:
                row = 0
            elif last == n and blocks[n + 1] != 0:
                row = 1
            if row >= 0:
                value = np.float64(rhs_rows[b, row]) if with_rows else 0.0
                w[b, row] = total - mass * value
            for i in range(first, last):
                u[b, i] = value
                wb[b, i] = 0.0
            first = last
