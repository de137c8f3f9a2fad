"""The families beyond the sizes of the kernels: batched torch operations, on whatever device the tensors are.

A fixed number of steps with masks for the items that are done, because to leave a loop early is to wait for the device;
an exact step at the end. The contracts are those of :mod:`hsbackend.families`, in float64 inside.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from hsbackend.families.family import Choice
from hsbackend.status import Status

_ROUNDING: Final = 2.0**-48
_EPS: Final = 2.0**-52
_ALLOWANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-5}
_HUGE: Final = 1e300
_INF: Final = torch.inf
#: Steps of a search in a bracket: every second one halves it from the eighth on, down to rounding.
_SEARCH_STEPS: Final = 150
#: Searches, each from the end of the one before; the second has little left to do.
_SEARCHES: Final = 4
#: Newton steps on transport polytopes, and trials of each line search.
_NEWTON_STEPS: Final = 60
_TRIALS: Final = 12


class _Rows(NamedTuple):
    """Points, weights, coefficients, slopes ``a = c/h`` and bounds, (B, n) each, float64."""

    v: Tensor
    h: Tensor
    c: Tensor
    a: Tensor
    lower: Tensor
    upper: Tensor

    def primal(self, d: Tensor, s: Tensor) -> Tensor:
        """Return ``clip(d - s a, lower, upper)``."""
        return torch.minimum(torch.maximum(d - s[:, None] * self.a, self.lower), self.upper)

    def free(self, t: Tensor) -> Tensor:
        """Return which coordinates are between their bounds."""
        return (t > self.lower) & (t < self.upper)

    def value(self, d: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``c'x``, minus its derivative and the size of its terms."""
        t = d - s[:, None] * self.a
        p = self.c * torch.minimum(torch.maximum(t, self.lower), self.upper)
        return p.sum(1), torch.where(self.free(t), self.c * self.a, 0.0).sum(1), p.abs().sum(1)

    def shifted(self, tau: Tensor) -> Tensor:
        """Return ``v - tau c/h`` with the rounding of the product (Dekker) and of the quotient put back."""
        product = tau[:, None] * self.c
        below = _product_error(tau[:, None].expand_as(self.c), self.c, product)
        quotient = tau[:, None] * self.a
        back = quotient * self.h
        rest = ((product - back) - _product_error(quotient, self.h, back)) + below
        return (self.v - quotient) - torch.where(rest.isfinite(), rest, 0.0) / self.h

    def beyond_flat(self, d: Tensor, s: Tensor, upwards: Tensor) -> tuple[Tensor, Tensor]:
        """Return the end of the flat piece around s and minus the slope behind it, 0 if the piece has no end."""
        direction = torch.where(upwards, 1.0, -1.0).double()
        outward = direction[:, None] * self.a
        distance = d - torch.where(outward > 0.0, self.upper, self.lower)
        on_it = ((distance - s[:, None] * self.a) * outward >= 0.0) & (outward != 0.0) & (self.lower < self.upper)
        at = torch.maximum(direction[:, None] * (distance / self.a), (direction * s)[:, None])
        at = torch.where(on_it & (at < _INF), at, _INF)
        nearest = at.amin(1)
        there = (at == nearest[:, None]) & (at < _INF)
        return direction * nearest, torch.where(there, self.c * self.a, 0.0).sum(1)


def _product_error(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """Return ``a b - product`` exactly (Dekker), zero where it overflows."""
    high_a, high_b = a * 134217729.0, b * 134217729.0
    high_a, high_b = high_a - (high_a - a), high_b - (high_b - b)
    low_a, low_b = a - high_a, b - high_b
    error = low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b)
    return torch.where(error.isfinite(), error, 0.0)


def _search(rows: _Rows, target: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find tau with ``c'x(tau) = target``; return d, shift, s, gap, slope and size as the kernel's search does."""
    shift, s = start, torch.zeros_like(start)
    noise = _EPS * (1.0 + 0.0625 * rows.v.shape[1] ** 0.5)
    d, gap, slope, size = rows.v, s, s, s
    for again in range(_SEARCHES):
        if again:
            shift, s = shift + s, torch.zeros_like(s)
        d = rows.shifted(shift)
        low, high = torch.full_like(s, -_INF), torch.full_like(s, _INF)
        gap_low, gap_high = torch.zeros_like(s), torch.zeros_like(s)
        done = torch.zeros_like(s, dtype=torch.bool)
        for taken in range(_SEARCH_STEPS if not again else _SEARCH_STEPS // 3):
            value, slope_now, size_now = rows.value(d, s)
            slope, size = torch.where(done, slope, slope_now), torch.where(done, size, size_now)
            gap = torch.where(done, gap, value - target)
            there = gap.abs() <= noise * (size + target.abs() + s.abs() * slope)
            right = gap > 0.0
            low, gap_low = torch.where(right, s, low), torch.where(right, gap, gap_low)
            high, gap_high = torch.where(right, high, s), torch.where(right, gap_high, gap)
            edge, beyond = rows.beyond_flat(d, s, right)
            flat = slope <= 0.0
            there = there | (flat & (beyond == 0.0))  # an extreme point of the box
            trial = torch.where(flat, edge + gap / torch.where(beyond > 0.0, beyond, 1.0), s + gap / slope)
            if taken >= 8:
                one_sided = low.isinf() | high.isinf()
                trial = torch.where(one_sided, s + (trial - s) * 2.0 ** (taken - 7), trial)
                if taken % 2 == 0:
                    trial = torch.where(one_sided, trial, low + 0.5 * (high - low))
            inside = (low < trial) & (trial < high)
            secant = low + (high - low) * (gap_low / (gap_low - gap_high))
            trial = torch.where(inside, trial, secant)
            there = there | ~((low < trial) & (trial < high))  # or the bracket holds no further number
            done = done | there
            s = torch.where(done, s, trial)
    return d, shift, s, gap, slope, size


def _whole(values: Tensor | None, like: Tensor, default: float) -> Tensor:
    if values is None:
        return torch.full_like(like, default)
    return values.detach().double().expand(like.shape)


def budget(
    point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, choice: Choice, l1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project on a box with one row, or on the l1 ball, as :mod:`hsbackend.families.budget` and ``l1`` do."""
    batch, _ = point.shape
    given = point.double()
    v = given.abs() if l1 else given
    h, c = _whole(weight, v, 1.0), _whole(coefficients, v, 1.0)
    rows = _Rows(v, h, c, c / h, _whole(lower, v, 0.0 if l1 else -_INF), _whole(upper, v, _INF))
    limits = rhs.detach().double().expand(batch, rhs.shape[1])
    high = limits[:, -1]
    low = torch.full_like(high, -_INF) if l1 else limits[:, 0]
    status = _inspect(rows, low, high, _ALLOWANCE[point.dtype], l1)

    equality = low >= high
    value, _, size = rows.value(v, torch.zeros_like(high))
    above, below = ~equality & (value > high), ~equality & (value < low)
    weak = above & (value - high <= _ROUNDING * (size + high.abs()))
    weak = weak | (below & (low - value <= _ROUNDING * (size + low.abs())))
    searching = equality | above | below
    target = torch.where((status == 0) & searching, torch.where(below, low, high), 0.0)
    total = torch.where(c == 0.0, 0.0, c * v).sum(1) - target
    start = total / (c * rows.a).sum(1)
    start = torch.where(start.isfinite() & equality, start, 0.0)
    d, shift, s, gap, slope, size = _search(rows, target, start)
    divisor = torch.where(slope > 0.0, slope, 1.0)
    correction = torch.where(searching & (slope > 0.0), gap / divisor, 0.0)
    noise = torch.where(searching & (slope > 0.0), _ROUNDING * (size + target.abs()) / divisor, 0.0)
    tau = shift + (s + correction)
    status = torch.where((status == 0) & searching & ~tau.isfinite(), int(Status.NOT_CONVERGED), status)
    tau = torch.where(above, tau.clamp(min=0.0), torch.where(below, tau.clamp(max=0.0), tau))
    tau = torch.where(searching, tau, 0.0)
    d, s = torch.where(searching[:, None], d, v), torch.where(searching, s, 0.0)

    t = d - s[:, None] * rows.a
    moved = t - correction[:, None] * rows.a
    x = torch.minimum(torch.maximum(torch.where(rows.free(t), moved, t), rows.lower), rows.upper)
    # Nothing else says whether a search with a fixed number of steps has found anything.
    missed = ((c * x).sum(1) - target).abs() > 2.0 * _ALLOWANCE[point.dtype] * ((c * x).abs().sum(1) + target.abs())
    status = torch.where((status == 0) & searching & missed, int(Status.NOT_CONVERGED), status)
    sign = -1.0 if choice == "support" else 1.0
    face, off = _face(rows, moved, tau, noise, sign)
    vertex = searching & ~off.any(1)
    tau = torch.where(vertex, _vertex_multiplier(rows, x, tau), tau)
    noise = torch.where(vertex, 0.0, noise)
    face = torch.where(vertex[:, None], _face(rows, rows.shifted(tau), tau, noise, sign)[0], face)
    side = torch.where(equality, torch.where(tau < -noise, -1, 1), torch.where(below, -1, 1))
    if choice == "support":
        slack = ~equality & (weak | (tau == 0.0))
        tau = torch.where(slack, 0.0, tau)
        side = torch.where(slack | ~searching, 0, side)
    else:
        value, size = (c * x).sum(1), (c * x).abs().sum(1)
        to_high = torch.where(value >= high - _ROUNDING * (size + high.abs()), high - value, _INF)
        to_low = torch.where(value <= low + _ROUNDING * (size + low.abs()), value - low, _INF)
        at = torch.where((to_high < _INF) & (to_high <= to_low), 1, torch.where(to_low < _INF, -1, 0))
        side = torch.where(searching, side, at)
    if l1:
        face = torch.where((side != 0)[:, None] & (face != 0), 0, given.sign().nan_to_num().to(torch.int64))
        x = torch.where(given < 0.0, 0.0 - x, x)
    solved = status == 0
    whole = torch.cat([face, side[:, None]], 1)
    return (
        torch.where(solved[:, None], x, torch.nan).to(point.dtype),
        torch.where(solved, tau, torch.nan)[:, None].to(point.dtype),
        torch.where(solved[:, None], whole, 0).to(torch.int8),
        status.to(torch.int8),
    )


def _inspect(rows: _Rows, low: Tensor, high: Tensor, allowance: float, l1: bool) -> Tensor:
    """Return the status of the data, (B,)."""
    v, h, c, _, lower, upper = rows
    valid = (h > 0.0) & h.isfinite() & c.isfinite() & (lower < _INF) & (upper > -_INF)
    valid = valid & ((v > -_INF) | ((v == -_INF) & (lower > -_INF))) & ((v < _INF) | ((v == _INF) & (upper < _INF)))
    if l1:
        valid = valid & (c > 0.0)
    p = torch.where(c == 0.0, 0.0, c * torch.where(v == _INF, upper, lower))
    q = torch.where(c == 0.0, 0.0, c * torch.where(v == -_INF, lower, upper))
    least, most = torch.minimum(p, q), torch.maximum(p, q)
    empty = (lower - upper > allowance * (lower.abs() + upper.abs())).any(1) | (high == -_INF) | (low == _INF)
    empty = empty | ((low >= high) & (low - high > allowance * (low.abs() + high.abs())))
    empty = empty | (least.sum(1) - high > allowance * (least.abs().sum(1) + high.abs()))
    empty = empty | (low - most.sum(1) > allowance * (most.abs().sum(1) + low.abs()))
    invalid = ~valid.all(1) | low.isnan() | high.isnan()
    return torch.where(invalid, int(Status.INVALID_INPUT), torch.where(empty, int(Status.INFEASIBLE), 0))


def _face(rows: _Rows, t: Tensor, tau: Tensor, noise: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Return where coordinates are held, and which of the row's are off their bounds beyond rounding."""
    v, _, c, a, lower, upper = rows
    size = v.abs().clamp(max=_HUGE) + (tau[:, None] * a).abs()
    spread = (noise[:, None] * a).abs() + 1e-300
    to_lower, to_upper = t - lower, upper - t
    allowed_lower = _ROUNDING * (size + lower.abs().clamp(max=_HUGE)) + spread
    allowed_upper = _ROUNDING * (size + upper.abs().clamp(max=_HUGE)) + spread
    fixed = lower >= upper
    at_upper = ((to_upper <= sign * allowed_upper) & (to_upper <= to_lower)) | fixed
    at_lower = (to_lower <= sign * allowed_lower) & (to_lower < to_upper)
    off = (to_lower > allowed_lower) & (to_upper > allowed_upper) & (c != 0.0) & ~fixed
    return torch.where(at_upper, 1, torch.where(at_lower, -1, 0)), off


def _vertex_multiplier(rows: _Rows, x: Tensor, tau: Tensor) -> Tensor:
    """Return the multiplier nearest to zero for which x, at bounds everywhere, is the solution."""
    v, _, _, a, lower, upper = rows
    at_upper = upper - x < x - lower
    limit = (v - torch.where(at_upper, upper, lower)) / torch.where(a == 0.0, 1.0, a)
    used = (a != 0.0) & (lower < upper)
    rising = at_upper == (a > 0.0)
    most = torch.where(used & rising, limit, _INF).amin(1)
    least = torch.where(used & ~rising, limit, -_INF).amax(1)
    return torch.where(least > most, tau, torch.minimum(least.clamp(min=0.0), most))


# Transport. Unknowns are (a, b); the Newton matrix is that of the free entries, with a small multiple of the identity
# for the null vectors of its components.


def _system(mask: Tensor) -> Tensor:
    """Return ``[Diag(M 1) M; M' Diag(M'1)]``, (B, m, m)."""
    sums = torch.cat([mask.sum(2), mask.sum(1)], 1)
    k1 = mask.shape[1]
    matrix = torch.diag_embed(sums)
    matrix[:, :k1, k1:] = mask
    matrix[:, k1:, :k1] = mask.mT
    return matrix


def _solve_system(matrix: Tensor, right: Tensor, damping: Tensor) -> Tensor:
    """Solve with a multiple of the identity added; one refinement."""
    damped = matrix + damping[:, None, None] * torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    factor, _ = torch.linalg.cholesky_ex(damped)
    found = torch.cholesky_solve(right[:, :, None], factor)
    found = found + torch.cholesky_solve(right[:, :, None] - damped @ found, factor)
    return found[:, :, 0]


def transport(
    point: Tensor, weight: Tensor | None, rhs: Tensor, shape: tuple[int, ...], choice: Choice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Project on a transport polytope as :mod:`hsbackend.families.transport` does, by a semismooth Newton method.

    A polytope that only forbidden entries make empty is ``NOT_CONVERGED`` here, as are items the steps do not suffice
    for; the kernels tell the two apart.
    """
    batch, (k1, k2) = len(point), shape
    v = point.double().reshape(batch, k1, k2)
    h = _whole(weight, point.double(), 1.0).reshape(batch, k1, k2)
    marginals = rhs.detach().double().expand(batch, k1 + k2)
    allowance = _ALLOWANCE[point.dtype]
    invalid = ((v.isnan() | (v == _INF)).any(2).any(1)) | ~((h > 0.0) & h.isfinite()).all(2).all(1)
    invalid = invalid | ~marginals.isfinite().all(1)
    r, c = marginals[:, :k1].clamp(min=0.0), marginals[:, k1:].clamp(min=0.0)
    supplied, demanded = r.sum(1), c.sum(1)
    largest = torch.maximum(r.amax(1), c.amax(1))
    off = (marginals.amin(1) < -allowance * largest) | (
        (supplied - demanded).abs() > allowance * torch.maximum(supplied, demanded)
    )
    middle = 0.5 * (supplied + demanded)
    balanced = (r * (middle / supplied)[:, None], c * (middle / demanded)[:, None])
    target = torch.cat(balanced, 1).nan_to_num(0.0, 0.0, 0.0)
    used = (target[:, :k1, None] > 0.0) & (target[:, None, k1:] > 0.0) & (v > -_INF)
    lines = target > 0.0
    missing = lines & (torch.cat([used.sum(2), used.sum(1)], 1) == 0)
    inverse = 1.0 / h
    scale = largest.clamp(min=1e-300)

    def entries(y: Tensor) -> Tensor:
        return torch.where(used, v - (y[:, :k1, None] + y[:, None, k1:]) * inverse, -_INF)

    def residual(table: Tensor) -> Tensor:
        x = table.clamp(min=0.0)
        return torch.cat([x.sum(2), x.sum(1)], 1) - target

    # The affine start of unit weights: balance rows, then columns.
    start = torch.where(used, inverse, 0.0)
    there = torch.where(used, v, 0.0)
    a = ((there.sum(2) - target[:, :k1]) / start.sum(2)).nan_to_num(0.0, 0.0, 0.0)
    rest = torch.where(used, v - a[:, :, None] * inverse, 0.0)
    b = ((rest.sum(1) - target[:, k1:]) / start.sum(1)).nan_to_num(0.0, 0.0, 0.0)
    y = torch.where(lines, torch.cat([a, b], 1), 0.0)
    done = invalid | off | missing.any(1)
    for _ in range(_NEWTON_STEPS):
        table = entries(y)
        gap = residual(table)
        norm = gap.abs().amax(1)
        done = done | (norm <= 8.0 * _EPS * scale)
        mask = torch.where(table > 0.0, inverse, 0.0)
        matrix = _system(mask)
        size = matrix.diagonal(dim1=1, dim2=2).amax(1)
        step = _solve_system(matrix, gap, 1e-12 * size.clamp(min=1e-300) + 1e-4 * size * (norm / scale).clamp(max=1.0))
        step = torch.where(lines, step, 0.0).nan_to_num(0.0, 0.0, 0.0)
        # The dual is convex and its derivative along the step known at every trial: bisection on its sign.
        slope = (gap * step).sum(1)
        length, near, far = torch.ones_like(norm), torch.zeros_like(norm), torch.full_like(norm, _INF)
        for _trial in range(_TRIALS):
            ahead = (residual(entries(y + length[:, None] * step)) * step).sum(1)
            too_far = ahead < -0.1 * slope
            too_near = ~too_far & (ahead > 0.5 * slope)
            far = torch.where(too_far, length, far)
            near = torch.where(too_near, length, near)
            wider = torch.where(far.isinf(), 2.0 * length, 0.5 * (near + far))
            length = torch.where(too_far | too_near, wider, length)
        y = torch.where(done[:, None], y, y + length[:, None] * step)
    table = entries(y)
    norm = residual(table).abs().amax(1)
    status = torch.where(norm > 1e-11 * scale, int(Status.NOT_CONVERGED), 0)
    status = torch.where(off | missing.any(1), int(Status.INFEASIBLE), status)
    status = torch.where(invalid, int(Status.INVALID_INPUT), status)

    # Lines that sum to zero were left out: the least multipliers that hold their entries at zero.
    left_out = torch.where(v > -_INF, v * h, -_INF)
    over = lines[:, None, k1:] | ~lines.any(1)[:, None, None]
    least = torch.where(over, left_out - y[:, None, k1:], -_INF).amax(2)
    a = torch.where(lines[:, :k1], y[:, :k1], torch.where(least > -_INF, least, 0.0))
    least = (left_out - a[:, :, None]).amax(1)
    b = torch.where(lines[:, k1:] | ~lines.any(1)[:, None], y[:, k1:], torch.where(least > -_INF, least, 0.0))
    shift = (a.sum(1) - b.sum(1)) / (k1 + k2)
    a, b = a - shift[:, None], b + shift[:, None]
    both = a[:, :, None] + b[:, None, :]
    t = torch.where(used, table, v - both * inverse)
    band = _ROUNDING * (v.abs() + (a.abs()[:, :, None] + b.abs()[:, None, :]) * inverse)
    free = (t >= -band if choice == "support" else t > band) & (v > -_INF)
    solved = status == 0
    x = torch.where(used, t.clamp(min=0.0), 0.0)
    return (
        torch.where(solved[:, None], x.flatten(1), torch.nan).to(point.dtype),
        torch.where(solved[:, None], torch.cat([a, b], 1), torch.nan).to(point.dtype),
        (free.flatten(1) & solved[:, None]).to(torch.int8),
        status.to(torch.int8),
    )


def transport_kkt(
    face: Tensor, primal: Tensor, weight: Tensor | None, rhs_primal: Tensor, rhs_rows: Tensor | None,
    rhs_bounds: Tensor | None, shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve on a face as :func:`hsbackend.families.transport.kkt` does.

    The null space of the system is spanned by (1, -1) on the components of the free entries; their projector comes
    from labels that spread along free entries, as many times as a path may be long at worst, doubling.
    """
    batch, (k1, k2) = len(face), shape
    m = k1 + k2
    free = (face != 0).reshape(batch, k1, k2)
    g = rhs_primal.double().reshape(batch, k1, k2)
    h = _whole(weight, rhs_primal.double(), 1.0).reshape(batch, k1, k2)
    h = torch.where((h > 0.0) & h.isfinite(), h, 1.0)
    fixed = torch.zeros_like(g) if rhs_bounds is None else rhs_bounds.double().reshape(batch, k1, k2)
    mask = torch.where(free, 1.0 / h, 0.0)
    carried = torch.where(free, g / h, fixed)
    load = torch.cat([carried.sum(2), carried.sum(1)], 1)
    if rhs_rows is not None:
        load = load - rhs_rows.double()
    failed = primal.reshape(batch, -1)[:, 0].isnan()
    asked = (rhs_primal != 0.0).any(1)
    for side in (rhs_rows, rhs_bounds):
        if side is not None:
            asked = asked | (side != 0.0).any(1)
    load = torch.where(failed[:, None], 0.0, load)
    # together[i, j]: lines i and j are in one component; squared until paths of any length are in.
    together = torch.eye(m, dtype=torch.float64, device=face.device).repeat(batch, 1, 1)
    together[:, :k1, k1:] = free.double()
    together[:, k1:, :k1] = free.double().mT
    for _ in range(max(1, (m - 1).bit_length())):
        together = (together @ together > 0.0).double()
    signs = torch.ones(m, dtype=torch.float64, device=face.device)
    signs[k1:] = -1.0
    # The projector on the null space.
    outer = signs[:, None] * signs[None, :] * together / together.sum(2, keepdim=True)
    load = load - (outer @ load[:, :, None])[:, :, 0]
    matrix = _system(mask)
    size = matrix.diagonal(dim1=1, dim2=2)
    # Adding the projector makes the matrix regular and changes nothing on its range; bare lines are in it too.
    whole = matrix + outer * size.amax(1).clamp(min=1e-300)[:, None, None]
    factor, _ = torch.linalg.cholesky_ex(whole)
    found = torch.cholesky_solve(load[:, :, None], factor)
    found = found + torch.cholesky_solve(load[:, :, None] - whole @ found, factor)
    y = (found - outer @ found)[:, :, 0]
    rest = g - y[:, :k1, None] - y[:, None, k1:]
    u = torch.where(free, rest / h, fixed).flatten(1)
    wb = torch.where(free, 0.0, rest - h * fixed).flatten(1)
    poison = torch.where(asked, torch.nan, 0.0)[:, None]
    found_all = (torch.where(failed[:, None], poison, part) for part in (u, y, wb))
    u, y, wb = (part.to(primal.dtype) for part in found_all)
    return u, y, wb
