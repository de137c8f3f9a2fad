"""The closest feasible problem: a quadratic program whose constraints contradict each other, with its limits shifted.

    minimise   1/2 |s|^2
    subject to A x = b + s_b,   G x <= h + s_h,   lower - s_l <= x <= upper + s_u,   s_h, s_l, s_u >= 0

has one solution s, zero where the constraints are consistent. Its multipliers are s itself, and its dual is a strictly
convex program in s alone, the projection of ``-(b, h, -lower, upper)`` onto the cone of Farkas multipliers,

    minimise   1/2 |s|^2 + b's_b + h's_h - lower's_l + upper's_u
    subject to A's_b + G's_h - s_l + s_u = 0,   s_h, s_l, s_u >= 0,

which is what is solved. Then the program is solved with the shifted limits. Every point that satisfies them holds the
shifted rows with equality (a multiplier is positive there), so these become equations and nothing depends on rounding.
Both steps are differentiable programs; autograd composes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsbackend import qp_operators
from hsbackend.operators import transforms_active
from hsbackend.qp_operators import Outputs
from hsbackend.qp_program import Data, Settings
from hsbackend.status import SolveError, Status, failure_message

#: A shift below this, relative to the largest one of its item, is rounding.
_SHIFTED = 1e-10


class Shift(NamedTuple):
    """The shift of the limits.

    Attributes:
        eq: (B, p) s_b.
        ineq: (B, m) s_h.
        lower: (B, n) s_l.
        upper: (B, n) s_u.
    """

    eq: Tensor
    ineq: Tensor
    lower: Tensor
    upper: Tensor


def _limit(tensor: Tensor | None, batch: int, size: int, none: float, like: Tensor) -> Tensor:
    """Return a limit (batch, size) in float64, infinite where there is none."""
    if tensor is None:
        return torch.full((batch, size), none, dtype=torch.float64, device=like.device)
    return tensor.to(torch.float64).expand(batch, size)


def _far(limits: Sequence[Tensor], q: Tensor) -> Tensor:
    """Return which limits stand for none because they are far above all other data, (B, p + m + 2n).

    They would be rounding errors for the others. If one of them matters after all, the second step is infeasible.
    """
    equal, *rest = (limit.detach().abs() for limit in limits)
    sizes = torch.cat(rest, dim=1)
    there = sizes.isfinite() & (sizes > 0.0)
    known = torch.where(there & (sizes <= qp_operators.USUAL), sizes, 0.0)
    linear = q.detach().to(torch.float64).abs().expand(len(sizes), q.shape[1])
    reference = torch.cat([known, equal, linear], dim=1).amax(1, keepdim=True)
    least = torch.where(there, sizes, math.inf).amin(1, keepdim=True)
    reference = torch.where(reference > 0.0, reference, least)
    return torch.cat([torch.zeros_like(equal, dtype=torch.bool), sizes > qp_operators.HUGE * reference], dim=1)


def find_shift(settings: Settings, data: Data) -> tuple[Shift, Tensor]:
    """Return the shift of least norm of every item, and the mask (B,) of those for which it was found."""
    n, p, m = data.sizes
    batch, like = data.batch, data.q
    limits = [_limit(data.b, batch, p, 0.0, like), _limit(data.h, batch, m, math.inf, like)]
    limits += [_limit(data.lower, batch, n, -math.inf, like), _limit(data.upper, batch, n, math.inf, like)]
    absent = torch.cat([limit.isinf() for limit in limits], dim=1) | _far(limits, data.q)
    parts = zip(limits, absent.split([p, m, n, n], dim=1), strict=True)
    b, h, lower, upper = (torch.where(gone, 0.0, limit) for limit, gone in parts)
    unit = torch.eye(n, dtype=torch.float64, device=like.device).unsqueeze(0)
    columns = [-unit, unit]
    for matrix in (data.G, data.A):
        if matrix is not None:
            columns.insert(0, matrix.to(torch.float64).mT)
    rows = torch.cat([column.expand(batch, n, column.shape[2]) for column in columns], dim=2)
    total = p + m + 2 * n
    least = torch.zeros(1, total, dtype=torch.float64, device=like.device)
    least[:, :p] = -math.inf
    most = torch.where(absent, 0.0, math.inf).to(torch.float64)
    dual = Data(None, torch.cat([b, h, -lower, upper], 1), rows, b.new_zeros(1, n), None, None, least, most)
    found = qp_operators.solve(Settings(min(settings.tolerance, 1e-9), strict=False, identity=True), dual)
    s, status = found[0], found[5]
    size = s.detach().abs().amax(1, keepdim=True)
    s = torch.where(s.detach().abs() > _SHIFTED * size, s, 0.0)
    return Shift(*s.split([p, m, n, n], dim=1)), status == int(Status.SOLVED)


def _shifted(data: Data, shift: Shift) -> Data:
    """Return the programs with shifted limits; rows that were shifted are equations."""
    n, p, _ = data.sizes
    batch, like = data.batch, data.q
    normals, right = data.A, data.b
    if normals is not None and right is not None:
        right = right + shift.eq
    h = data.h
    if data.G is not None and h is not None:
        moved = shift.ineq > 0.0
        extra = torch.where(moved.unsqueeze(-1), data.G.to(torch.float64), 0.0)
        limit = torch.where(moved, h + shift.ineq, 0.0)
        h = torch.where(moved, math.inf, h)
        none = extra.new_zeros(batch, 0, n)
        normals = torch.cat([none if normals is None else normals.expand(batch, p, n), extra], dim=1)
        right = torch.cat([limit[:, :0] if right is None else right.expand(batch, p), limit], dim=1)
    lower = _limit(data.lower, batch, n, -math.inf, like)
    upper = _limit(data.upper, batch, n, math.inf, like)
    from_below, from_above = shift.lower > 0.0, shift.upper > 0.0
    held = torch.where(from_below, lower - shift.lower, upper + shift.upper)
    lower, upper = (torch.where(from_below | from_above, held, bound) for bound in (lower, upper))
    return Data(data.Q, data.q, normals, right, data.G, h, lower, upper)


def _closest(settings: Settings, data: Data) -> tuple[Outputs, Shift, Data]:
    """Solve the closest feasible problem of every item."""
    p = data.sizes[1]
    shift, found = find_shift(settings, data)
    moved = _shifted(data, shift)
    constants = tuple(name for name in settings.constants if name in ("Q", "q", "G"))
    outputs = qp_operators.solve(replace(settings, strict=False, constants=constants), moved)
    x, y, z, z_lower, z_upper, status, *rest = outputs
    status = torch.where(found, status, int(Status.NOT_CONVERGED)).to(torch.int8)
    failed = (status != int(Status.SOLVED)).unsqueeze(1)
    status = torch.where(failed[:, 0], status, int(Status.CLOSEST)).to(torch.int8)
    if data.G is not None:
        z = z + y[:, p:]  # one of the two is zero
    # A held coordinate has its multiplier at the bound that was shifted.
    force = z_upper - z_lower
    from_below, from_above = shift.lower > 0.0, shift.upper > 0.0
    z_lower, z_upper = (
        torch.where(from_below & ~from_above, -force, torch.where(from_above & ~from_below, 0.0, z_lower)),
        torch.where(from_above & ~from_below, force, torch.where(from_below & ~from_above, 0.0, z_upper)),
    )
    parts = (torch.where(failed, torch.nan, part) for part in (x, y[:, :p], z, z_lower, z_upper))
    shift = Shift(*(torch.where(failed, torch.nan, part) for part in shift))
    return (*parts, status, *rest), shift, moved  # pyright: ignore[reportReturnType]


def solve(settings: Settings, data: Data) -> tuple[Outputs, Shift]:
    """Solve a batch of programs, infeasible ones with the limits of the closest feasible problem.

    Returns:
        What :func:`hsbackend.qp_operators.solve` does, with the status ``CLOSEST`` where limits were shifted; and the
        shift, zero elsewhere. The multipliers of shifted rows are those of equations.

    Raises:
        SolveError: if ``settings.strict`` and an item has no solution for another reason than contradicting limits;
            under ``vmap`` and ``torch.compile`` it is NaN.
    """
    n, p, m = data.sizes
    outputs = qp_operators.solve(replace(settings, strict=False), data)
    status = outputs[5]
    infeasible = status == int(Status.INFEASIBLE)
    batch = outputs[0].shape[0]
    if torch.compiler.is_compiling() or transforms_active():  # which items fail is not known here: do all, and choose
        other, shift, _ = _closest(settings, data)
        mixed = [
            torch.where(infeasible.reshape(-1, *[1] * (one.dim() - 1)), two, one)
            for one, two in zip(outputs, other, strict=True)
        ]
        shift = Shift(*(torch.where(infeasible.unsqueeze(1), part, 0.0) for part in shift))
        return (*mixed,), shift  # pyright: ignore[reportReturnType]
    items = torch.nonzero(infeasible)[:, 0]
    zero = _zero(data)
    shift = Shift(*(zero.expand(batch, size) for size in (p, m, n, n)))
    moved = None
    if len(items):
        other, found, moved = _closest(settings, data.take(items))
        outputs = tuple(one.index_copy(0, items, two) for one, two in zip(outputs, other, strict=True))
        shift = Shift(*(one.index_copy(0, items, two) for one, two in zip(shift, found, strict=True)))
    if settings.strict:
        _raise(settings, data, outputs[5], items, moved)
    return outputs, shift  # pyright: ignore[reportReturnType]


def _zero(data: Data) -> Tensor:
    """Return a zero that depends on the data, so that a loss on a shift has a gradient where nothing is shifted."""
    zero = torch.zeros((), dtype=torch.float64, device=data.q.device)
    for tensor in (data.A, data.b, data.G, data.h, data.lower, data.upper):
        if tensor is not None and tensor.requires_grad:
            zero = zero + torch.where(torch.zeros_like(tensor, dtype=torch.bool), tensor, 0.0).sum()
    return zero


def _raise(settings: Settings, data: Data, status: Tensor, items: Tensor, moved: Data | None) -> None:
    """Raise for items that failed for another reason than contradicting limits."""
    codes = status.cpu().numpy()
    failed = ~np.isin(codes, (Status.SOLVED, Status.CLOSEST))
    if not failed.any():
        return
    places = items.cpu().numpy()
    words = qp_operators.names(settings, data, np.setdiff1d(np.flatnonzero(failed), places))
    if moved is not None:
        again = np.flatnonzero(failed[places])
        further = qp_operators.names(replace(settings, constants=()), moved, again)
        words |= {int(places[item]): named for item, named in further.items()}
    raise SolveError(failure_message(codes, words), codes)
