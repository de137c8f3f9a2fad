"""Twin of :mod:`hsbackend.families.l1` in plain PyTorch: the budget's twin on ``|v|``, and dense KKT matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from hsbackend.families import budget_naive
from hsbackend.families.budget_naive import NaiveKKT, NaiveSolution, item_of, kkt_item, stack
from hsbackend.families.family import Choice
from hsbackend.status import Status


def solve(
    point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor,
    lower: Tensor | None, upper: Tensor | None, shape: tuple[int, ...], choice: Choice,
) -> NaiveSolution:  # fmt: skip
    """Project as :func:`hsbackend.families.l1.solve` does; lower and upper are None."""
    batch, n = point.shape
    rows = torch.stack([torch.full_like(rhs[:, 0], -torch.inf), rhs[:, 0]], dim=1)
    absolute = budget_naive.solve(
        point.abs(), weight, coefficients, rows, torch.zeros_like(point[:1]), None, shape, choice
    )
    primal, multipliers, face, status = absolute
    for b in range(batch):
        if not (item_of(coefficients, b, n, 1.0) > 0).all():
            status[b] = Status.INVALID_INPUT
        if status[b] != Status.SOLVED:
            primal[b] = torch.nan
            multipliers[b] = torch.nan
            face[b] = 0
            continue
        sign = point[b].double().sign()
        primal[b] *= sign
        held = (face[b, :n] != 0) if face[b, n] != 0 else torch.zeros(n, dtype=torch.bool)
        face[b, :n] = torch.where(held, 0, sign).to(torch.int8)
    return NaiveSolution(primal, multipliers, face, status)


def kkt(
    face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None,
    rhs_primal: Tensor, rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...],
) -> NaiveKKT:  # fmt: skip
    """Solve as :func:`hsbackend.families.l1.kkt` does."""
    batch, n = rhs_primal.shape
    items: list[NaiveKKT] = []
    for b in range(batch):
        tight = bool(face[b, n] != 0)
        held = (face[b, :n] == 0) & tight
        normal = item_of(coefficients, b, n, 1.0) * face[b, :n] if tight else None
        r = 0.0 if rhs_rows is None else float(rhs_rows[b, 0])
        h, g, r_bound = item_of(weight, b, n, 1.0), rhs_primal[b].double(), item_of(rhs_bounds, b, n, 0.0)
        items.append(kkt_item(held, normal, h, g, r, r_bound))
    return stack(items, n)
