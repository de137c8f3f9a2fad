"""Twin of :mod:`hsbackend.families.monotone` in plain PyTorch, float64: slow and obviously right.

    x_i = clip( max_{s <= i} min_{t >= i} mean_h(v_s ... v_t), low, high )

in O(n^2) memory (the min-max formula of isotonic regression; Barlow, Bartholomew, Bremner and Brunk, "Statistical
Inference under Order Restrictions", 1972). The KKT solve on a face writes the rows out and takes a pseudo-inverse.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hsbackend.families.family import Choice
from hsbackend.status import Status

#: What counts as equal, relative to the data of an item: far above rounding, far below what random data decides.
_TOLERANCE = 1e-12


def solve(
    point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor,
    lower: Tensor | None, upper: Tensor | None, shape: tuple[int, ...], choice: Choice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project; return primal, multipliers, face and status as :func:`monotone.solve` does."""
    batch, n = point.shape
    v = point.double()
    h = torch.ones_like(v) if weight is None else weight.double().expand(batch, n)
    limits = rhs.double().expand(batch, 2)
    primal = torch.full((batch, n), torch.nan, dtype=torch.float64)
    multipliers = torch.full((batch, 2), torch.nan, dtype=torch.float64)
    face = torch.zeros((batch, n + 2), dtype=torch.int32)
    status = torch.empty(batch, dtype=torch.int8)
    unbounded = _isotonic(v, h)
    for b in range(batch):
        low, high = limits[b]
        if not (v[b].isfinite().all() and h[b].isfinite().all() and (h[b] > 0).all()) or limits[b].isnan().any():
            status[b] = Status.INVALID_INPUT
            continue
        if low > high or low == torch.inf or high == -torch.inf:
            status[b] = Status.INFEASIBLE
            continue
        status[b] = Status.SOLVED
        primal[b] = unbounded[b].clamp(low, high)
        multipliers[b], face[b] = _multipliers_and_face(v[b], h[b], primal[b], low, high, choice)
    return primal, multipliers, face, status


def kkt(
    face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None,
    rhs_primal: Tensor, rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Build and pseudo-invert the KKT matrix of every item; return u, w and wb as :func:`monotone.kkt` does."""
    batch, n = rhs_primal.shape
    h = torch.ones(batch, n) if weight is None else weight.expand(batch, n)
    u, w = torch.zeros(batch, n, dtype=torch.float64), torch.zeros(batch, 2, dtype=torch.float64)
    identity = torch.eye(n, dtype=torch.float64)
    for b in range(batch):
        blocks, at_low, at_high = face[b, :n], bool(face[b, n]), bool(face[b, n + 1])
        tied = (blocks[1:] == blocks[:-1]).nonzero().flatten()
        rows, rhs, held = [identity[i] - identity[i + 1] for i in tied.tolist()], [0.0] * len(tied), []
        r = torch.zeros(2) if rhs_rows is None else rhs_rows[b]
        if at_low:
            held.append((0, len(rows)))
            rows.append(identity[0])
            rhs.append(float(r[0]))
        if at_high and not (at_low and blocks[0] == blocks[-1]):
            held.append((1, len(rows)))
            rows.append(identity[n - 1])
            rhs.append(float(r[1]))
        matrix = torch.stack(rows) if rows else torch.zeros(0, n, dtype=torch.float64)
        zero = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        system = torch.cat([torch.cat([h[b].double().diag(), matrix.T], 1), torch.cat([matrix, zero], 1)])
        right = torch.cat([rhs_primal[b].double(), torch.tensor(rhs, dtype=torch.float64)])
        solution = torch.linalg.pinv(system) @ right
        u[b] = solution[:n]
        for row, place in held:
            w[b, row] = solution[n + place]
    return u, w, torch.zeros_like(u)


def _isotonic(v: Tensor, h: Tensor) -> Tensor:
    """Evaluate the min-max formula, (B, n)."""
    n = v.shape[1]
    upper = torch.ones(n, n, dtype=torch.bool).triu()  # [s, t] with s <= t
    masses = torch.where(upper, h[:, None], 0.0).cumsum(2)
    sums = torch.where(upper, (h * v)[:, None], 0.0).cumsum(2)
    means = torch.where(upper, sums / masses, torch.inf)
    least = means.flip(2).cummin(2).values.flip(2)  # [s, i]: min over t >= i
    return torch.where(upper, least, -torch.inf).amax(1)


def _multipliers_and_face(
    v: Tensor, h: Tensor, x: Tensor, low: Tensor, high: Tensor, choice: Choice
) -> tuple[Tensor, Tensor]:
    """Cut x into runs of equal value and look at the forces in them."""
    n = len(v)
    force = h * (v - x)
    if low == high:  # one block, held twice; multipliers of the chain that are not negative, and nearest to zero
        least = force.cumsum(0).min().clamp(max=0.0)
        face = torch.cat([torch.zeros(n), torch.ones(2)]).int()
        return torch.stack([least, force.sum() - least]), face
    size = _TOLERANCE * (v.abs().max() + 1e-300)
    cuts = (x[1:] - x[:-1] > size).nonzero().flatten() + 1
    ends = [0, *cuts.tolist(), n]
    at_low, at_high = bool(x[0] - low <= size), bool(high - x[-1] <= size)
    nu_low = force[: ends[1]].sum().clamp(max=0.0) if at_low else torch.zeros(())
    nu_high = force[ends[-2] :].sum().clamp(min=0.0) if at_high else torch.zeros(())
    tied = torch.ones(n - 1, dtype=torch.bool)
    tied[cuts - 1] = False
    if choice == "support":
        for first, last in pairwise(ends):
            pull = nu_low if first == 0 else torch.zeros(())  # z_i = sum_{j <= i} h_j (v_j - x_j) - nu_low
            tied[first : last - 1] &= (force[first : last - 1].cumsum(0) - pull) > size * h.sum()
        at_low, at_high = bool(-nu_low > size * h.sum()), bool(nu_high > size * h.sum())
    blocks = torch.cat([torch.zeros(1), (~tied).cumsum(0)])
    return torch.stack([nu_low, nu_high]), torch.cat([blocks, torch.tensor([at_low, at_high])]).int()
