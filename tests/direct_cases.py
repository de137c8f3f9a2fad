"""Every kind of set with tensors to differentiate, for the tests of the direct interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsbackend import Polyhedron as P

N = 5


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _uniform(low: float, high: float, *shape: int, seed: int) -> Tensor:
    drawn = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * drawn


@dataclass(frozen=True)
class Case:
    """A set made of tensors, all of them differentiable; some have a batch axis of 2.

    ``weight_matters`` is False for sets whose projection is the same in every diagonal metric.
    """

    make: Callable[..., P]
    tensors: tuple[Tensor, ...]
    event: tuple[int, ...] = (N,)
    weight_matters: bool = True

    def point(self, *batch: int, seed: int = 0) -> Tensor:
        """Draw a point, outside of the set as a rule."""
        return 1.5 * _normal(*batch, *self.event, seed=1000 + seed)

    def weight(self) -> Tensor:
        """Draw a metric."""
        return _uniform(0.5, 2.0, *self.event, seed=7)

    def polyhedron(self) -> P:
        """Make the set."""
        return self.make(*self.tensors)


def _sums(r: Tensor, c: Tensor) -> P:
    return P.transport(r * (c.sum(-1) / r.sum(-1)).unsqueeze(-1), c)


_ZERO = torch.zeros(2, dtype=torch.float64)
_ONE = torch.ones((), dtype=torch.float64)
_ROWS, _OTHER = _normal(2, N, seed=3), _normal(2, N, seed=17)
CASES = {
    "box": Case(P.box, (_uniform(-1.0, -0.2, N, seed=1), _uniform(0.2, 1.0, 2, N, seed=2)), weight_matters=False),
    "linf_ball": Case(lambda r: P.linf_ball(N, r), (torch.tensor([0.4, 0.9]).double(),), weight_matters=False),
    "halfspace": Case(P.halfspace, (_normal(N, seed=1), torch.tensor([-2.0, -1.0]).double())),
    "hyperplane": Case(P.hyperplane, (_normal(2, N, seed=1), 0.3 * _ONE)),
    "affine": Case(lambda b: P.affine(_ROWS, b), (_normal(2, seed=4),)),
    "affine_rows": Case(P.affine, (_ROWS, _normal(2, 2, seed=4))),
    "simplex": Case(lambda r: P.simplex(N, r), (torch.tensor([0.7, 2.0]).double(),)),
    "capped_simplex": Case(lambda r, u: P.capped_simplex(N, r, u), (1.3 * _ONE, _uniform(0.3, 0.8, 2, N, seed=5))),
    "budget": Case(
        lambda c, b, l, u: P.budget(N, c, at_most=b, lower=l, upper=u),
        (_uniform(0.5, 2.0, N, seed=6), torch.tensor([-0.5, 0.2]).double(), _uniform(-1.0, 0.0, N, seed=7),
         _uniform(0.5, 1.0, N, seed=8)),
    ),
    "budget_between": Case(
        lambda low, high: P.budget(N, at_least=low, at_most=high, lower=None), (-0.2 * _ONE, 0.3 * _ONE)
    ),
    "l1_ball": Case(lambda r: P.l1_ball(N, r), (torch.tensor([0.8, 1.7]).double(),)),
    "weighted_l1_ball": Case(P.weighted_l1_ball, (_uniform(0.5, 2.0, N, seed=9), 1.1 * _ONE)),
    "monotone": Case(lambda l, u: P.monotone(N, True, l, u), (-0.6 * _ONE, torch.tensor([0.5, 0.8]).double())),
    "decreasing": Case(lambda u: P.monotone(N, False, upper=u), (0.4 * _ONE,)),
    "transport": Case(_sums, (_uniform(1.0, 2.0, 2, seed=10), _uniform(1.0, 2.0, 2, 3, seed=11)), (2, 3)),
    "birkhoff": Case(lambda: P.birkhoff(3), (), (3, 3)),
    "order": Case(lambda: P.order(N, [(3, 0), (0, 2), (4, 1)]), ()),
    "order_general": Case(lambda: P.order(N, [(3, 0), (3, 2), (4, 1)]), ()),
    "box_intersect_affine": Case(
        lambda l, b: P.box_intersect_affine(l, 1.0, _ROWS, b), (-torch.ones(N).double(), 0.2 * _normal(2, seed=12))
    ),
    "box_intersect_row": Case(
        lambda A, b: P.box_intersect_affine(0.0, None, A, b),
        (_uniform(0.5, 1.5, 1, N, seed=13), torch.ones(1, dtype=torch.float64)),
    ),
    "product": Case(
        lambda r, u: P.product(P.simplex(2, r), P.box(-1.0, u), P.monotone(2)),
        (torch.tensor([0.7, 2.0]).double(), torch.ones(1, dtype=torch.float64)),
    ),
    "polyhedron": Case(
        lambda G, h, u: P(G=G, h=h, lower=-1.0, upper=u),
        (_normal(3, N, seed=14), _uniform(-0.5, 0.5, 2, 3, seed=15), _uniform(0.2, 1.0, N, seed=16)),
    ),
    "polyhedron_fixed": Case(lambda b: P(_ROWS, b, _OTHER, _ZERO), (_normal(2, seed=18),)),
}  # fmt: skip
#: Those that cannot be written as rows.
NO_ROWS = ("l1_ball", "weighted_l1_ball")
