"""The face of a solved quadratic program and its derivative, in torch operations.

At a solution, with N the equality rows, the rows of the face K and the held coordinates
(:mod:`hsbackend.differentiate`), M the KKT matrix and O the projector on its null space,

    M = [Q  N']     u = M^+ [g]         cotangents:  q: -u,  rhs: w,  N: -(nu u' + w x'),  Q: -1/2 (u x' + x u')
        [N  0 ]     w       [r]         tangent:     g = -(q' + Q'x + N''nu),  r = rhs' - N'x

Where the optimum is not unique, O is not zero on x. The solution is the optimum of least norm, x = M^+ (-q, rhs), and
turns with the null space of Q and N: with ``c = M^+ (x, 0)`` and a = O g,

    tangent, further part:      O (Q'c_x + N''c_w)
    cotangents, further part:   Q: 1/2 (a c_x' + c_x a'),  N: c_w a'

(the derivative of a pseudo-inverse, :mod:`hsbackend.pseudo_inverse`; docs/theory.md, section 10). What is written here
can be differentiated again, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsbackend.families.family import Choice
from hsbackend.pseudo_inverse import pseudo_inverse
from hsbackend.qp_program import NAMES, Data, Settings

#: A row or bound is active when its slack is below this, relative to the data: the default of the solvers.
ACTIVE = 1e-10
_MATRICES = ("Q", "A", "G")


def _finite(tensor: Tensor) -> Tensor:
    """Replace what failed items and absent limits hold, NaN and infinity, by zero."""
    return torch.nan_to_num(tensor.to(torch.float64), 0.0, 0.0, 0.0)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix-vector products of a batch; a diagonal has one dimension less."""
    return matrix * vector if matrix.dim() == vector.dim() else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def find_active(data: Data, outputs: Sequence[Tensor], choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows of G, lower and upper bounds are in K: masks (B, m), (B, n), (B, n).

    For ``"active"`` those whose slack is zero to rounding, or smaller than the multiplier. For ``"support"`` it is the
    solver that knows: which rows hold a point depends on the multiplier found, and on the selection among the optima.
    """
    x, _, z, z_lower, z_upper = (tensor.detach() for tensor in outputs[:5])
    unit = outputs[6]
    if choice == "support":
        held = outputs[8].split([z.shape[1], x.shape[1], x.shape[1]], dim=1)
        return held[0], held[1], held[2]

    def member(slack: Tensor, limit: Tensor, multiplier: Tensor) -> Tensor:
        near = slack <= ACTIVE * (unit + torch.where(limit.isinf(), 0.0, limit).abs())
        return (multiplier > slack) | near

    rows = torch.zeros_like(z, dtype=torch.bool)
    if data.G is not None and data.h is not None:
        normals, h = data.G.detach().to(torch.float64), data.h.detach().to(torch.float64)
        length = torch.linalg.vector_norm(normals, dim=-1)
        length = torch.where(length > 0.0, length, 1.0)
        rows = member((h - times(normals, x)) / length, h / length, z * length)
    below = above = torch.zeros_like(x, dtype=torch.bool)
    if data.lower is not None:
        lower = data.lower.detach().to(torch.float64)
        below = member(x - lower, lower, z_lower)
    if data.upper is not None:
        upper = data.upper.detach().to(torch.float64)
        above = member(upper - x, upper, z_upper)
    return rows, below, above


def _side(data: Data, outputs: Sequence[Tensor], choice: Choice) -> tuple[Tensor, Tensor]:
    """Return which rows of G are in K, (B, m) 0 or 1, and the side at which coordinates are held, (B, n) -1, 0 or 1."""
    rows, below, above = find_active(data, outputs, choice)
    x, z_lower, z_upper = outputs[0].detach(), outputs[3].detach(), outputs[4].detach()
    if data.lower is not None and data.upper is not None:
        # It cannot move, whatever the multiplier.
        above = above | ((data.lower.detach() == data.upper.detach()) & (x == x))
    side = torch.where(below & ~(above & (z_upper > z_lower)), -1.0, torch.where(above, 1.0, 0.0))
    return rows.to(x.dtype), side.to(x.dtype)


@dataclass(frozen=True)
class Face:
    """A solution and its face: what every derivative starts from; NaN and infinities are zero.

    Attributes:
        hessian: (B, n, n) Q.
        normals: (B, p + m, n) the equality rows, and the other rows where they are in K.
        equalities: p.
        x: (B, n).
        multipliers: of A, G, lower and upper.
        rows: (B, m) 1 for the rows in K.
        side: (B, n) -1, 0 or 1: the bound at which a coordinate is held.
        failed: (B,) items without a solution.
        inverse: (B, n + p + m, n + p + m) M^+; held coordinates and rows outside of K are taken out of it.
        null: (B, n, n) the projector on the directions in which the optimum is not unique.
    """

    hessian: Tensor
    normals: Tensor
    equalities: int
    x: Tensor
    multipliers: Sequence[Tensor]
    rows: Tensor
    side: Tensor
    failed: Tensor
    inverse: Tensor
    null: Tensor

    @classmethod
    def of(cls, settings: Settings, data: Data, outputs: Sequence[Tensor]) -> Face:
        """Find the face of a solution."""
        n, p, _ = data.sizes
        x = outputs[0]
        rows, side = _side(data, outputs, settings.jacobian)
        batch = x.shape[0]
        parts = [rows.unsqueeze(-1) * _finite(data.G)] if data.G is not None else []
        if data.A is not None:
            parts.insert(0, _finite(data.A).expand(batch, p, n))
        normals = torch.cat([x.new_zeros(batch, 0, n), *parts], dim=1)
        hessian = _finite(data.hessian(settings))
        hessian = (torch.diag_embed(hessian) if hessian.dim() == 2 else hessian).expand(batch, n, n)
        held = side.abs()
        free = 1.0 - held
        inner = free.unsqueeze(-1) * hessian * free.unsqueeze(-2) + torch.diag_embed(held)
        outer = normals * free.unsqueeze(-2)
        corner = torch.diag_embed(torch.cat([rows.new_zeros(batch, p), 1.0 - rows], dim=1))
        matrix = torch.cat([torch.cat([inner, outer.mT], dim=2), torch.cat([outer, corner], dim=2)], dim=1)
        inverse, null = pseudo_inverse(matrix)
        multipliers = [_finite(value) for value in outputs[1:5]]
        return cls(hessian, normals, p, _finite(x), multipliers, rows, side, x[:, 0].isnan(), inverse, null[:, :n, :n])

    @property
    def free(self) -> Tensor:
        """(B, n) 1 for the coordinates that are not held."""
        return 1.0 - self.side.abs()

    def solve(
        self, g: Tensor, r_eq: Tensor | None, r_ineq: Tensor | None, r_bound: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Solve the KKT system of the module docstring; held coordinates are taken out of it first."""
        free, held = self.free, self.side.abs()
        zero = torch.zeros_like(self.multipliers[0])
        right = torch.cat(
            [
                zero if r_eq is None else r_eq.expand(zero.shape),
                torch.zeros_like(self.rows) if r_ineq is None else self.rows * r_ineq,
            ],
            dim=1,
        )
        fixed = torch.zeros_like(g) if r_bound is None else held * r_bound
        rhs = torch.cat([free * (g - times(self.hessian, fixed)), right - times(self.normals, fixed)], dim=1)
        z = times(self.inverse, rhs)
        # A failed item has no derivative: zero where nobody asks for it, NaN where somebody does.
        asked = ((g != 0.0).any(1) | (right != 0.0).any(1) | (fixed != 0.0).any(1)) & self.failed
        z = z + torch.where(asked, torch.nan, 0.0).to(z.dtype).unsqueeze(-1)
        u, w_eq, w_ineq = self._parts(z)
        u = free * u + fixed
        bounds = held * (g - times(self.hessian, u) - times(self.normals.mT, torch.cat([w_eq, w_ineq], dim=1)))
        return u, w_eq, w_ineq, bounds

    def turning(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_x, and c_w on A and on G (module docstring)."""
        n = self.x.shape[1]
        return self._parts(times(self.inverse[:, :, :n], self.free * self.x))

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split a vector into the part of x, of A, and of G, zero outside of K."""
        sizes = [self.x.shape[1], self.equalities, self.rows.shape[1]]
        x, eq, ineq = z.split(sizes, dim=1)
        return x, eq, self.rows * ineq


def tangent(
    settings: Settings, data: Data, outputs: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the tangents of x and of the multipliers of A, G, lower and upper."""
    d_quadratic, d_linear, d_a, d_b, d_g, d_h, d_lower, d_upper = tangents
    face = Face.of(settings, data, outputs)
    x, (y, z, _, _) = face.x, face.multipliers
    g = torch.zeros_like(x)
    if d_quadratic is not None:
        g = g - times(d_quadratic, x)
    if d_linear is not None:
        g = g - d_linear
    right: list[Tensor | None] = [d_b, d_h]
    for index, (d_rows, multiplier) in enumerate(((d_a, y), (d_g, z))):
        if d_rows is not None:
            g = g - times(d_rows.mT, multiplier)
            known, moved = right[index], times(d_rows, x)
            right[index] = -moved if known is None else known - moved
    below, above = (face.side < 0.0).to(x.dtype), (face.side > 0.0).to(x.dtype)
    bound = None
    for d_limit, mask in ((d_lower, below), (d_upper, above)):
        if d_limit is not None:
            bound = mask * d_limit if bound is None else bound + mask * d_limit
    u, w_eq, w_ineq, w_bound = face.solve(g, right[0], right[1], bound)
    if d_quadratic is not None or d_a is not None or d_g is not None:
        c, c_eq, c_ineq = face.turning()
        turned = torch.zeros_like(x) if d_quadratic is None else times(d_quadratic, c)
        for d_rows, part in ((d_a, c_eq), (d_g, c_ineq)):
            if d_rows is not None:
                turned = turned + times(d_rows.mT, part)
        u = u + times(face.null, face.free * turned)
    return u, w_eq, w_ineq, -below * w_bound, above * w_bound


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _symmetric(a: Tensor, b: Tensor, diagonal: bool) -> Tensor:
    """Return ``1/2 (a b' + b a')``, or its diagonal."""
    return a * b if diagonal else 0.5 * (_outer(a, b) + _outer(b, a))


def _gathered(data: Data, needs: Sequence[bool], rules: Sequence[Callable[[], Tensor]]) -> list[Tensor | None]:
    """Evaluate the rules of the cotangents that are needed, and sum over the batch what is shared."""
    found: list[Tensor | None] = []
    for rule, tensor, need in zip(rules, data.tensors, needs, strict=True):
        value = rule() if need and tensor is not None else None
        if value is not None and tensor is not None and tensor.shape[0] == 1 and value.shape[0] != 1:
            value = value.sum(0, keepdim=True)
        found.append(value)
    return found


def _turned(face: Face, data: Data, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the further part of the cotangents of Q, A and G."""
    c, c_eq, c_ineq = face.turning()
    a = times(face.null, face.free * g)
    return _symmetric(a, c, data.diagonal), _outer(c_eq, a), _outer(c_ineq, a)


def cotangent(
    settings: Settings,
    data: Data,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the cotangents of the data."""
    if all(value is None for value in cotangents):
        return [None] * len(NAMES)
    g, g_y, g_z, g_lower, g_upper = cotangents
    face = Face.of(settings, data, outputs)
    x, (y, z, _, _) = face.x, face.multipliers
    below, above = (face.side < 0.0).to(x.dtype), (face.side > 0.0).to(x.dtype)
    bound = None
    for g_limit, mask in ((g_lower, -below), (g_upper, above)):
        if g_limit is not None:
            bound = mask * g_limit if bound is None else bound + mask * g_limit
    u, w_eq, w_ineq, w_bound = face.solve(torch.zeros_like(x) if g is None else g, g_y, g_z, bound)
    further: Sequence[Tensor | float] = (0.0, 0.0, 0.0)
    if g is not None and any(need for name, need in zip(NAMES, needs, strict=True) if name in _MATRICES):
        further = _turned(face, data, g)
    in_q, in_a, in_g = further
    return _gathered(data, needs, (
        lambda: in_q - _symmetric(u, x, data.diagonal), lambda: -u, lambda: in_a - _outer(y, u) - _outer(w_eq, x),
        lambda: w_eq, lambda: in_g - _outer(z, u) - _outer(w_ineq, x), lambda: w_ineq, lambda: below * w_bound,
        lambda: above * w_bound,
    ))  # fmt: skip
