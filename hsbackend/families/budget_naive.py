"""Twin of :mod:`hsbackend.families.budget` in plain PyTorch: sort the breakpoints, solve on the piece with the root.

    phi(tau) = c'clip(v - tau c/h, lower, upper)

is linear between neighbours in the list of all ``h_j (v_j - lower_j) / c_j`` and ``h_j (v_j - upper_j) / c_j``. One
item at a time, in float64, by the definitions: slow and obviously right for data of ordinary scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hsbackend.families.family import Choice
from hsbackend.status import Status

ROUNDING = 16 * torch.finfo(torch.float64).eps
ALLOWANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class NaiveSolution(NamedTuple):
    """What :class:`hsbackend.families.family.FamilySolution` holds, as float64 tensors."""

    primal: Tensor
    multipliers: Tensor
    face: Tensor
    status: Tensor


class NaiveKKT(NamedTuple):
    """What :class:`hsbackend.families.family.FamilyKKT` holds, as float64 tensors."""

    primal: Tensor
    rows: Tensor
    bounds: Tensor


class Item(NamedTuple):
    """One item, None replaced: v, h, c, lower, upper (n,), low and high."""

    v: Tensor
    h: Tensor
    c: Tensor
    lower: Tensor
    upper: Tensor
    low: float
    high: float


def item_of(values: Tensor | None, b: int, n: int, default: float) -> Tensor:
    """Return the row of item b in float64, or a row of defaults."""
    if values is None:
        return torch.full((n,), default, dtype=torch.float64)
    return values[b if len(values) > 1 else 0].double()


def solve(
    point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor,
    lower: Tensor | None, upper: Tensor | None, shape: tuple[int, ...], choice: Choice,
) -> NaiveSolution:  # fmt: skip
    """Project as :func:`hsbackend.families.budget.solve` does."""
    batch, n = point.shape
    primal = torch.full((batch, n), torch.nan, dtype=torch.float64)
    multipliers = torch.full((batch, 1), torch.nan, dtype=torch.float64)
    face = torch.zeros((batch, n + 1), dtype=torch.int8)
    status = torch.zeros(batch, dtype=torch.int8)
    for b in range(batch):
        low, high = item_of(rhs, b, 2, 0.0).tolist()
        item = Item(
            point[b].double(), item_of(weight, b, n, 1.0), item_of(coefficients, b, n, 1.0),
            item_of(lower, b, n, -torch.inf), item_of(upper, b, n, torch.inf), low, high,
        )  # fmt: skip
        item, status[b] = inspect(item, ALLOWANCE[point.dtype])
        if status[b] == Status.SOLVED:
            primal[b], multipliers[b, 0], face[b] = project(item, choice)
    return NaiveSolution(primal, multipliers, face, status)


def extremes(item: Item) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of every ``c_j x_j``; an infinite ``v_j`` fixes x_j at its bound."""
    lowest = torch.where(item.v == torch.inf, item.upper, item.lower)
    highest = torch.where(item.v == -torch.inf, item.lower, item.upper)
    both = torch.stack([item.c * lowest, item.c * highest])
    both[:, item.c == 0] = 0.0
    return both.amin(0), both.amax(0)


def inspect(item: Item, allowance: float) -> tuple[Item, Status]:
    """Check the data; clamp right-hand sides that miss the range of ``c'x`` by no more than the allowance."""
    v, h, c, lower, upper, low, high = item
    numbers = torch.cat([v, h, c, lower, upper, torch.tensor([low, high], dtype=torch.float64)])
    if numbers.isnan().any() or not ((h > 0) & h.isfinite() & c.isfinite()).all():
        return item, Status.INVALID_INPUT
    if (lower == torch.inf).any() or (upper == -torch.inf).any():
        return item, Status.INVALID_INPUT
    if ((v == -torch.inf) & lower.isinf()).any() or ((v == torch.inf) & upper.isinf()).any():
        return item, Status.INVALID_INPUT
    if high == -torch.inf or low == torch.inf or (lower - upper > allowance * (lower.abs() + upper.abs())).any():
        return item, Status.INFEASIBLE
    least, most = extremes(item)
    bottom, top = float(least.sum()), float(most.sum())
    if low > high:
        if low - high > allowance * (abs(low) + abs(high)):
            return item, Status.INFEASIBLE
        low = high
    if bottom - high > allowance * (float(least.abs().sum()) + abs(high)):
        return item, Status.INFEASIBLE
    if low - top > allowance * (float(most.abs().sum()) + abs(low)):
        return item, Status.INFEASIBLE
    equality = low == high
    high = max(high, bottom)
    low = min(low, top)
    if equality:
        low = high = min(high, top)
    return item._replace(low=low, high=high), Status.SOLVED


def primal_of(item: Item, tau: float) -> Tensor:
    """Return ``clip(v - tau c/h, lower, upper)``."""
    return torch.minimum(torch.maximum(item.v - tau * item.c / item.h, item.lower), item.upper)


def row_of(item: Item, tau: float) -> float:
    """Return ``phi(tau)``."""
    return float((item.c * primal_of(item, tau)).sum())


def root_of(item: Item, target: float) -> float:
    """Return a tau with ``phi(tau) = target``."""
    slopes = item.c / item.h
    edges = torch.cat([(item.v - item.lower) / slopes, (item.v - item.upper) / slopes])
    edges = edges[edges.isfinite()].unique().tolist()  # sorted; no edges where c = 0
    if not edges:
        edges = [0.0]
    values = [row_of(item, edge) for edge in edges]
    right = next((k for k, value in enumerate(values) if value <= target), len(edges))
    if right == 0:
        inside = edges[0] - 1.0
    elif right == len(edges):
        inside = edges[-1] + 1.0
    else:
        inside = 0.5 * (edges[right - 1] + edges[right])
    t = item.v - inside * slopes
    slope = float((item.c * slopes)[(t > item.lower) & (t < item.upper)].sum())
    if slope == 0.0:  # phi jumps over the target by rounding only
        return edges[min(right, len(edges) - 1)]
    tau = inside + (row_of(item, inside) - target) / slope
    return tau + (row_of(item, tau) - target) / slope  # once more, in case `inside` was far away


def noise_of(item: Item, tau: float, target: float) -> float:
    """Return what of tau is rounding: that of the row, divided by the slope of phi; 0 at a vertex."""
    t = item.v - tau * item.c / item.h
    slope = float((item.c**2 / item.h)[(t > item.lower) & (t < item.upper)].sum())
    size = float((item.c * primal_of(item, tau)).abs().sum()) + abs(target)
    return ROUNDING * size / slope if slope > 0 else 0.0


def nearest_bounds(item: Item, tau: float, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return distances to the bounds at tau, before clipping, and what of each is rounding; noise is that of tau."""
    shift = tau * item.c / item.h
    t = item.v - shift
    spread = noise * (item.c / item.h).abs()
    size = item.v.abs().clamp(max=1e300) + shift.abs()
    lower_noise = ROUNDING * (size + item.lower.abs().clamp(max=1e300)) + spread
    upper_noise = ROUNDING * (size + item.upper.abs().clamp(max=1e300)) + spread
    return t - item.lower, item.upper - t, lower_noise, upper_noise


def coordinates_face(item: Item, tau: float, noise: float, choice: Choice) -> Tensor:
    """Return -1, 0, 1 per coordinate: at or beyond its bound to rounding ("active"), or surely beyond ("support")."""
    above, below, lower_noise, upper_noise = nearest_bounds(item, tau, noise)
    at_lower = above <= lower_noise if choice == "active" else above < -lower_noise
    at_upper = below <= upper_noise if choice == "active" else below < -upper_noise
    face = torch.zeros(len(item.v), dtype=torch.int8)
    face[at_lower & (above < below)] = -1
    face[at_upper & (below <= above)] = 1
    face[item.lower >= item.upper] = 1
    return face


def vertex_multiplier(item: Item, x: Tensor, tau: float) -> float:
    """Return the multiplier nearest to zero with which x, at a bound everywhere, is optimal.

    ``h (x - v) + c nu + z = 0`` with ``z <= 0`` at the lower and ``z >= 0`` at the upper bound.
    """
    least, most = -torch.inf, torch.inf
    for j in range(len(x)):
        if item.c[j] == 0 or item.lower[j] >= item.upper[j]:
            continue
        at_upper = item.upper[j] - x[j] < x[j] - item.lower[j]
        bound = item.upper[j] if at_upper else item.lower[j]
        limit = float(item.h[j] * (item.v[j] - bound) / item.c[j])
        if bool(at_upper) == bool(item.c[j] > 0):
            most = min(most, limit)
        else:
            least = max(least, limit)
    return tau if least > most else min(max(0.0, least), most)


def project(item: Item, choice: Choice) -> tuple[Tensor, float, Tensor]:
    """Return x, nu and the face of a feasible item."""
    equality = item.low == item.high
    value = row_of(item, 0.0)
    size = float((item.c * primal_of(item, 0.0)).abs().sum())
    tau = 0.0
    if equality or value > item.high:
        tau = root_of(item, item.high)
    elif value < item.low:
        tau = root_of(item, item.low)
    if not equality:
        tau = max(tau, 0.0) if value > item.high else min(tau, 0.0)
    x = primal_of(item, tau)
    noise = noise_of(item, tau, item.high if tau > 0 or equality else item.low) if equality or tau != 0.0 else 0.0

    to_high = abs(value - item.high) <= ROUNDING * (size + abs(item.high)) and abs(item.high) < torch.inf
    to_low = abs(value - item.low) <= ROUNDING * (size + abs(item.low)) and abs(item.low) < torch.inf
    if equality:
        row = -1 if tau < -noise else 1
    elif tau != 0.0:
        row = -1 if tau < 0 else 1
    elif to_high and (not to_low or item.high - value <= value - item.low):
        row = 1
    else:
        row = -1 if to_low else 0
    in_row = (item.c != 0) & (item.lower < item.upper)
    if (equality or tau != 0.0) and (coordinates_face(item, tau, noise, "active")[in_row] != 0).all():
        tau, noise = vertex_multiplier(item, x, tau), 0.0
        row = (1 if tau >= 0 else -1) if equality else row
    if not equality and choice == "support" and (tau == 0.0 or to_high or to_low):
        tau, row = 0.0, 0
    face = torch.cat([coordinates_face(item, tau, noise, choice), torch.tensor([row], dtype=torch.int8)])
    return x, tau, face


def dense_kkt(h: Tensor, rows: Tensor, g: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least-norm solution (u, w) of ``[H N'; N 0] (u, w) = (g, r)``."""
    n, k = len(h), len(rows)
    matrix = torch.zeros((n + k, n + k), dtype=torch.float64)
    matrix[:n, :n] = torch.diag(h)
    matrix[:n, n:] = rows.T
    matrix[n:, :n] = rows
    solution = torch.linalg.pinv(matrix) @ torch.cat([g, r])
    return solution[:n], solution[n:]


def kkt_item(held: Tensor, normal: Tensor | None, h: Tensor, g: Tensor, r: float, r_bound: Tensor) -> NaiveKKT:
    """Solve on one face: held (n,) bool, the row's normal or None where it is slack."""
    n = len(h)
    units = torch.eye(n, dtype=torch.float64)[held]
    # Where no free coordinate is in the row, it is a combination of the bounds: dropped, with multiplier zero.
    in_face = normal is not None and bool((normal[~held] != 0).any())
    if normal is not None and in_face:
        rows = torch.cat([normal[None], units])
        u, w = dense_kkt(h, rows, g, torch.cat([torch.tensor([r], dtype=torch.float64), r_bound[held]]))
    else:
        u, w = dense_kkt(h, units, g, r_bound[held])
    bounds = torch.zeros(n, dtype=torch.float64)
    bounds[held] = w[1:] if in_face else w
    return NaiveKKT(u, w[:1] if in_face else torch.zeros(1, dtype=torch.float64), bounds)


def stack(items: list[NaiveKKT], n: int) -> NaiveKKT:
    """Stack items, none being allowed."""
    if not items:
        return NaiveKKT(*(torch.zeros((0, k), dtype=torch.float64) for k in (n, 1, n)))
    return NaiveKKT(*(torch.stack(parts) for parts in zip(*items, strict=True)))


def kkt(
    face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None,
    rhs_primal: Tensor, rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...],
) -> NaiveKKT:  # fmt: skip
    """Solve as :func:`hsbackend.families.budget.kkt` does."""
    batch, n = rhs_primal.shape
    items: list[NaiveKKT] = []
    for b in range(batch):
        normal = item_of(coefficients, b, n, 1.0) if face[b, n] != 0 else None
        r = 0.0 if rhs_rows is None else float(rhs_rows[b, 0])
        h, g, r_bound = item_of(weight, b, n, 1.0), rhs_primal[b].double(), item_of(rhs_bounds, b, n, 0.0)
        items.append(kkt_item(face[b, :n] != 0, normal, h, g, r, r_bound))
    return stack(items, n)
