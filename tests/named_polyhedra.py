"""The named polyhedra as a table: how each is made, and the same set written out row by row, from scratch.

What a test needs to judge a projection without the library: every row of every set, the multipliers by non-negative
least squares, and the projection on a given set of active rows as a dense, differentiable formula with pseudo-inverses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product as every_combination
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from hsbackend.polyhedron import Polyhedron

Params = dict[str, Tensor]


class Rows(NamedTuple):
    """``N x = d`` in the first ``equalities`` rows, ``N x <= d`` in the others; entries of d may be infinite there."""

    N: Tensor  # (..., m, n)
    d: Tensor  # (..., m)
    equalities: int


@dataclass(frozen=True)
class Entry:
    """A named polyhedron.

    Attributes:
        name: readable id.
        event: shape of a point.
        make: the polyhedron of some parameters.
        rows: the same set as rows on flattened coordinates; differentiable, batch axes of the parameters in front.
        draw: random parameters of one item from a generator; the second argument asks for small integers (ties).
        degree: how each parameter scales with the set: 1 for right-hand sides and bounds, 0 for coefficients.
        masked: flattened coordinates that may be -inf, or the reason why there are none.
        smooth: why there are no degenerate points, empty if there are.
        general: whether the general solvers do the work, in float64 and to their tolerance.
    """

    name: str
    event: tuple[int, ...]
    make: Callable[[Params], Polyhedron]
    rows: Callable[[Params], Rows]
    draw: Callable[[np.random.Generator, bool], dict[str, np.ndarray]]
    degree: Mapping[str, int]
    masked: tuple[int, ...] | str
    smooth: str = ""
    general: bool = False

    @property
    def n(self) -> int:
        """Number of coordinates."""
        return prod(self.event)

    def params(self, rng: np.random.Generator, lattice: bool, batch: tuple[int, ...] = ()) -> Params:
        """Draw parameters with batch axes."""
        drawn = [self.draw(rng, lattice) for _ in range(prod(batch))] or [self.draw(rng, lattice)]
        return {
            name: torch.tensor(np.stack([item[name] for item in drawn])[: prod(batch)]).reshape(
                (*batch, *np.shape(drawn[0][name]))
            )
            for name in drawn[0]
        }

    def scaled(self, params: Params, factor: float) -> Params:
        """Return the parameters of ``factor`` times the set."""
        return {name: value * factor ** self.degree[name] for name, value in params.items()}

    def tangent(self, params: Params, generator: torch.Generator) -> Params:
        """Return a random direction of the parameters; marginals keep equal sums, infinite bounds stay."""
        drawn = {
            name: torch.where(
                value.isinf(), 0.0, torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            )
            for name, value in params.items()
        }
        if "r" in drawn and "c" in drawn:
            drawn["c"] = drawn["c"] + (drawn["r"].sum(-1) - drawn["c"].sum(-1)).unsqueeze(-1) / drawn["c"].shape[-1]
        return drawn


# ----------------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------------


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype)


def _stack(*blocks: tuple[Tensor, Tensor], equalities: int = 0) -> Rows:
    """Put blocks (N, d) below each other; batch axes broadcast."""
    batch = torch.broadcast_shapes(*(N.shape[:-2] for N, _ in blocks), *(d.shape[:-1] for _, d in blocks))
    N = torch.cat([N.expand(*batch, *N.shape[-2:]) for N, _ in blocks], dim=-2)
    d = torch.cat([d.expand(*batch, d.shape[-1]) for _, d in blocks], dim=-1)
    return Rows(N, d, equalities)


def _below(lower: Tensor) -> tuple[Tensor, Tensor]:
    return -_eye(lower.shape[-1], lower), -lower


def _above(upper: Tensor) -> tuple[Tensor, Tensor]:
    return _eye(upper.shape[-1], upper), upper


def _every(value: Tensor, n: int) -> Tensor:
    return value.unsqueeze(-1).expand(*value.shape, n)


def _one(c: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return c.unsqueeze(-2), value.unsqueeze(-1)


def _chain(n: int, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    eye = torch.eye(n, dtype=torch.float64)
    return sign * (eye[:-1] - eye[1:]), torch.zeros(n - 1, dtype=torch.float64)


def _signs(n: int) -> Tensor:
    return torch.tensor(list(every_combination((1.0, -1.0), repeat=n)), dtype=torch.float64)


def _ball(c: Tensor, radius: Tensor) -> Rows:
    """Every sign pattern: 2^n rows."""
    patterns = _signs(c.shape[-1]).to(c.dtype)
    return _stack((patterns * c.unsqueeze(-2), _every(radius, len(patterns))))


def _marginals(r: Tensor, c: Tensor) -> Rows:
    k1, k2 = r.shape[-1], c.shape[-1]
    rows = torch.kron(_eye(k1, r), torch.ones(1, k2, dtype=r.dtype))
    columns = torch.kron(torch.ones(1, k1, dtype=r.dtype), _eye(k2, r))
    zeros = torch.zeros(k1 * k2, dtype=r.dtype)
    return _stack((rows, r), (columns, c), _below(zeros), equalities=k1 + k2)


def _edges(n: int, edges: tuple[tuple[int, int], ...]) -> Rows:
    N = torch.zeros(len(edges), n, dtype=torch.float64)
    for row, (i, j) in enumerate(edges):
        N[row, i], N[row, j] = 1.0, -1.0
    return Rows(N, torch.zeros(len(edges), dtype=torch.float64), 0)


def _side_by_side(*sets: Rows) -> Rows:
    """Rows of a product; equalities first."""
    n = sum(rows.N.shape[-1] for rows in sets)
    parts: list[list[tuple[Tensor, Tensor]]] = [[], []]
    begin = 0
    for rows in sets:
        size = rows.N.shape[-1]
        wide = torch.nn.functional.pad(rows.N, (begin, n - begin - size))
        parts[0].append((wide[..., : rows.equalities, :], rows.d[..., : rows.equalities]))
        parts[1].append((wide[..., rows.equalities :, :], rows.d[..., rows.equalities :]))
        begin += size
    return _stack(*parts[0], *parts[1], equalities=sum(rows.equalities for rows in sets))


# ----------------------------------------------------------------------------------------------------------------------
# Parameters
# ----------------------------------------------------------------------------------------------------------------------

_WIDTH = 5
_FIXED = np.random.default_rng(20)
#: Rows that do not change: two equations, and inequalities of which one comes twice and one is a sum of two others.
_FIXED_A = torch.tensor(_FIXED.integers(-2, 3, size=(2, _WIDTH)).astype(float))
_FIXED_G = torch.tensor(_FIXED.integers(-1, 2, size=(4, _WIDTH)).astype(float))
_FIXED_G = torch.cat([_FIXED_G, _FIXED_G[:1], _FIXED_G[1:2] + _FIXED_G[2:3]])
_NO_BOUND = "a coordinate has no lower bound to fall on"
_NO_INFINITY = "the general solvers take finite points"


def _number(rng: np.random.Generator, lattice: bool, low: int = 1, high: int = 3) -> np.ndarray:
    return np.asarray(float(rng.integers(low, high + 1)) if lattice else rng.uniform(low, high))


def _vector(rng: np.random.Generator, lattice: bool, *shape: int) -> np.ndarray:
    return rng.integers(-2, 3, size=shape).astype(float) if lattice else rng.normal(size=shape)


def _weights(rng: np.random.Generator, lattice: bool, n: int) -> np.ndarray:
    return rng.choice([0.5, 1.0, 2.0], size=n) if lattice else rng.uniform(0.3, 2.0, size=n)


def _bounds(rng: np.random.Generator, lattice: bool, n: int) -> dict[str, np.ndarray]:
    lower = -_number(rng, lattice, 0, 2) - rng.integers(0, 2, size=n)
    return {"lower": lower, "upper": lower + _number(rng, lattice, 1, 2) + rng.integers(0, 2, size=n)}


def _inside(rng: np.random.Generator, lattice: bool, bounds: dict[str, np.ndarray]) -> np.ndarray:
    """Return a point between the bounds."""
    share = rng.choice([0.0, 0.5, 1.0], size=bounds["lower"].shape) if lattice else rng.random(bounds["lower"].shape)
    return bounds["lower"] + share * (bounds["upper"] - bounds["lower"])


def _draw_box(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    bounds = _bounds(rng, lattice, _WIDTH)
    bounds["lower"][-1] = -np.inf
    bounds["upper"][-2] = np.inf
    return bounds


def _draw_row(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    a = _vector(rng, lattice, _WIDTH)
    a[0] = 1.0  # never zero
    return {"a": a, "b": _number(rng, lattice, -1, 1)}


def _draw_affine(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    A = _vector(rng, lattice, 2, _WIDTH)
    A[:, :2] = np.eye(2)
    if lattice:
        A = np.concatenate([A, A.sum(axis=0, keepdims=True)])
    return {"A": A, "b": A @ _vector(rng, lattice, _WIDTH)}


def _draw_capped(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    cap = rng.choice([0.5, 1.0], size=_WIDTH) if lattice else rng.uniform(0.3, 1.0, size=_WIDTH)
    radius = rng.choice([1.0, 2.0]) if lattice else rng.uniform(0.3, 1.1)
    return {"radius": np.asarray(radius), "cap": cap}


def _draw_budget(*names: str) -> Callable[[np.random.Generator, bool], dict[str, np.ndarray]]:
    def draw(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
        bounds = _bounds(rng, lattice, _WIDTH)
        c = _vector(rng, lattice, _WIDTH)
        c[1] = 0.0
        level = np.asarray(c @ _inside(rng, lattice, bounds))
        if names == ("at_most",):
            bounds["upper"] = np.full(_WIDTH, np.inf)
        gap = _number(rng, lattice, 0, 1)
        sides = {"equals": level, "at_most": level, "at_least": level - gap}
        return {"coefficients": c, **{name: sides[name] for name in names}, **bounds}

    return draw


def _draw_transport(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    plan = rng.integers(0, 3, size=(3, 4)).astype(float) if lattice else rng.exponential(size=(3, 4))
    plan[0, 0] += 1.0
    plan[1, 2] = 0.0  # so that this entry may be forbidden
    return {"r": plan.sum(axis=1), "c": plan.sum(axis=0)}


def _draw_interval(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    lower = -_number(rng, lattice, 0, 1)
    return {"lower": lower, "upper": lower + _number(rng, lattice, 1, 2)}


def _draw_box_affine(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    bounds = _bounds(rng, lattice, _WIDTH)
    A = _vector(rng, lattice, 2, _WIDTH)
    A[:, :2] = np.eye(2)
    return {**bounds, "A": A, "b": A @ _inside(rng, lattice, bounds)}


def _draw_general(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    bounds = _bounds(rng, lattice, _WIDTH)
    x = _inside(rng, lattice, bounds)
    G = _vector(rng, lattice, 4, _WIDTH)
    if lattice:
        G[3] = G[0]
    slack = rng.choice([0.0, 1.0], size=4) if lattice else rng.uniform(0.0, 0.5, size=4)
    A = _vector(rng, lattice, 1, _WIDTH)
    A[0, 0] = 1.0
    return {"A": A, "b": A @ x, "G": G, "h": G @ x + slack, **bounds}


def _draw_fixed(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    """Draw multiples of 1/1024, which float32 adds without rounding: rows that are equal stay equal in both dtypes."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.round(1024.0 * values) / 1024.0

    bounds = {name: rounded(value) for name, value in _bounds(rng, lattice, _WIDTH).items()}
    x = rounded(_inside(rng, lattice, bounds))
    slack = rng.choice([0.0, 1.0], size=4) if lattice else rounded(rng.uniform(0.0, 0.5, size=4))
    h = np.concatenate([slack, slack[:1], slack[1:2] + slack[2:3]]) + _FIXED_G.numpy() @ x
    return {"b": _FIXED_A.numpy() @ x, "h": h, **bounds}


def _draw_nothing(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    return {}


def _draw_radius(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    return {"radius": _number(rng, lattice, 1, 3)}


def _draw_weighted_ball(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    return {"weights": _weights(rng, lattice, 4), "radius": _number(rng, lattice, 1, 3)}


def _draw_product(rng: np.random.Generator, lattice: bool) -> dict[str, np.ndarray]:
    interval = _draw_interval(rng, lattice)
    return {"radius": _number(rng, lattice), "ball": _number(rng, lattice, 1, 2), **interval}


def _make_product(p: Params) -> Polyhedron:
    return Polyhedron.product(
        Polyhedron.simplex(3, p["radius"]), Polyhedron.monotone(3, lower=p["lower"], upper=p["upper"]),
        Polyhedron.l1_ball(2, p["ball"]), Polyhedron.box(p["lower"].unsqueeze(-1).expand(*p["lower"].shape, 2), None),
    )  # fmt: skip


def _simplex_rows(n: int, radius: Tensor) -> Rows:
    zeros = torch.zeros(n, dtype=radius.dtype)
    return _stack(_one(torch.ones(n, dtype=radius.dtype), radius), _below(zeros), equalities=1)


def _monotone_rows(n: int, p: Params, sign: float) -> Rows:
    N, d = _chain(n, sign)
    return _stack(
        (N.to(p["lower"].dtype), d.to(p["lower"].dtype)), _below(_every(p["lower"], n)), _above(_every(p["upper"], n))
    )


def _product_rows(p: Params) -> Rows:
    return _side_by_side(
        _simplex_rows(3, p["radius"]), _monotone_rows(3, p, 1.0),
        _ball(torch.ones(2, dtype=p["ball"].dtype), p["ball"]), _stack(_below(_every(p["lower"], 2))),
    )  # fmt: skip


_CHAINS = ((0, 2), (2, 4), (3, 1))
_TREE = ((0, 1), (0, 2), (2, 3), (2, 4))
_HALF = {"coefficients": 0, "weights": 0, "a": 0, "A": 0, "G": 0}
_DEGREE = {
    **_HALF, **dict.fromkeys(("b", "h", "lower", "upper", "radius", "ball", "cap", "r", "c"), 1),
    **dict.fromkeys(("equals", "at_most", "at_least"), 1),
}  # fmt: skip
_ALL = tuple(range(_WIDTH))

ENTRIES = (
    Entry(
        "box", (_WIDTH,), lambda p: Polyhedron.box(p["lower"], p["upper"]),
        lambda p: _stack(_below(p["lower"]), _above(p["upper"])), _draw_box, _DEGREE, _ALL[:-1],
    ),
    Entry(
        "linf_ball", (_WIDTH,), lambda p: Polyhedron.linf_ball(_WIDTH, p["radius"]),
        lambda p: _stack(_below(-_every(p["radius"], _WIDTH)), _above(_every(p["radius"], _WIDTH))),
        _draw_radius, _DEGREE, _ALL,
    ),
    Entry(
        "halfspace", (_WIDTH,), lambda p: Polyhedron.halfspace(p["a"], p["b"]),
        lambda p: _stack(_one(p["a"], p["b"])), _draw_row, _DEGREE, _NO_BOUND,
    ),
    Entry(
        "hyperplane", (_WIDTH,), lambda p: Polyhedron.hyperplane(p["a"], p["b"]),
        lambda p: _stack(_one(p["a"], p["b"]), equalities=1), _draw_row, _DEGREE, _NO_BOUND,
        smooth="the projection on a hyperplane is affine",
    ),
    Entry(
        "affine", (_WIDTH,), lambda p: Polyhedron.affine(p["A"], p["b"]),
        lambda p: _stack((p["A"], p["b"]), equalities=p["b"].shape[-1]), _draw_affine, _DEGREE, _NO_BOUND,
        smooth="the projection on an affine set is affine", general=True,
    ),
    Entry(
        "affine_fixed", (_WIDTH,), lambda p: Polyhedron.affine(_FIXED_A.to(p["b"].dtype), p["b"]),
        lambda p: _stack((_FIXED_A.to(p["b"].dtype), p["b"]), equalities=2),
        lambda rng, lattice: {"b": _vector(rng, lattice, 2)}, _DEGREE, _NO_BOUND,
        smooth="the projection on an affine set is affine", general=True,
    ),
    Entry(
        "simplex", (_WIDTH,), lambda p: Polyhedron.simplex(_WIDTH, p["radius"]),
        lambda p: _simplex_rows(_WIDTH, p["radius"]), _draw_radius, _DEGREE, _ALL[1:],
    ),
    Entry(
        "capped_simplex", (_WIDTH,), lambda p: Polyhedron.capped_simplex(_WIDTH, p["radius"], p["cap"]),
        lambda p: _stack(
            _one(torch.ones_like(p["cap"]), p["radius"]), _below(torch.zeros_like(p["cap"])), _above(p["cap"]),
            equalities=1,
        ),
        _draw_capped, _DEGREE, (3,),
    ),
    Entry(
        "budget_equation", (_WIDTH,), lambda p: Polyhedron.budget(_WIDTH, **p),
        lambda p: _stack(
            _one(p["coefficients"], p["equals"]), _below(p["lower"]), _above(p["upper"]), equalities=1
        ),
        _draw_budget("equals"), _DEGREE, (1,),
    ),
    Entry(
        "budget_at_most", (_WIDTH,), lambda p: Polyhedron.budget(_WIDTH, **p),
        lambda p: _stack(_one(p["coefficients"], p["at_most"]), _below(p["lower"])),
        _draw_budget("at_most"), _DEGREE, (1,),
    ),
    Entry(
        "budget_two_sided", (_WIDTH,), lambda p: Polyhedron.budget(_WIDTH, **p),
        lambda p: _stack(
            _one(p["coefficients"], p["at_most"]), _one(-p["coefficients"], -p["at_least"]), _below(p["lower"]),
            _above(p["upper"]),
        ),
        _draw_budget("at_most", "at_least"), _DEGREE, (1,),
    ),
    Entry(
        "l1_ball", (4,), lambda p: Polyhedron.l1_ball(4, p["radius"]),
        lambda p: _ball(torch.ones(4, dtype=p["radius"].dtype), p["radius"]), _draw_radius, _DEGREE, _NO_BOUND,
    ),
    Entry(
        "weighted_l1_ball", (4,), lambda p: Polyhedron.weighted_l1_ball(p["weights"], p["radius"]),
        lambda p: _ball(p["weights"], p["radius"]), _draw_weighted_ball, _DEGREE, _NO_BOUND,
    ),
    Entry(
        "transport", (3, 4), lambda p: Polyhedron.transport(p["r"], p["c"]), lambda p: _marginals(p["r"], p["c"]),
        _draw_transport, _DEGREE, (6,),
    ),
    Entry(
        "birkhoff", (3, 3), lambda p: Polyhedron.birkhoff(3),
        lambda p: _marginals(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)),
        _draw_nothing, _DEGREE, (4,),
    ),
    Entry(
        "monotone", (_WIDTH,), lambda p: Polyhedron.monotone(_WIDTH), lambda p: _stack(_chain(_WIDTH)),
        _draw_nothing, _DEGREE, _NO_BOUND,
    ),
    Entry(
        "monotone_bounded", (_WIDTH,),
        lambda p: Polyhedron.monotone(_WIDTH, increasing=False, lower=p["lower"], upper=p["upper"]),
        lambda p: _monotone_rows(_WIDTH, p, -1.0), _draw_interval, _DEGREE, "a chain takes finite points",
    ),
    Entry(
        "order_chains", (_WIDTH,), lambda p: Polyhedron.order(_WIDTH, _CHAINS), lambda p: _edges(_WIDTH, _CHAINS),
        _draw_nothing, _DEGREE, _NO_BOUND,
    ),
    Entry(
        "order_tree", (_WIDTH,), lambda p: Polyhedron.order(_WIDTH, _TREE), lambda p: _edges(_WIDTH, _TREE),
        _draw_nothing, _DEGREE, _NO_BOUND, general=True,
    ),
    Entry(
        "box_intersect_affine", (_WIDTH,),
        lambda p: Polyhedron.box_intersect_affine(p["lower"], p["upper"], p["A"], p["b"]),
        lambda p: _stack((p["A"], p["b"]), _below(p["lower"]), _above(p["upper"]), equalities=2),
        _draw_box_affine, _DEGREE, _NO_INFINITY, general=True,
    ),
    Entry(
        "polyhedron", (_WIDTH,), lambda p: Polyhedron(**p),
        lambda p: _stack((p["A"], p["b"]), (p["G"], p["h"]), _below(p["lower"]), _above(p["upper"]), equalities=1),
        _draw_general, _DEGREE, _NO_INFINITY, general=True,
    ),
    Entry(
        "polyhedron_fixed", (_WIDTH,),
        lambda p: Polyhedron(
            _FIXED_A.to(p["b"].dtype), p["b"], _FIXED_G.to(p["b"].dtype), p["h"], p["lower"], p["upper"]
        ),
        lambda p: _stack(
            (_FIXED_A.to(p["b"].dtype), p["b"]), (_FIXED_G.to(p["b"].dtype), p["h"]), _below(p["lower"]),
            _above(p["upper"]), equalities=2,
        ),
        _draw_fixed, _DEGREE, _NO_INFINITY, general=True,
    ),
    Entry(
        "product", (10,), _make_product, _product_rows, _draw_product, _DEGREE, (1, 2, 8, 9),
    ),
)  # fmt: skip
BY_NAME = {entry.name: entry for entry in ENTRIES}


# ----------------------------------------------------------------------------------------------------------------------
# Judging
# ----------------------------------------------------------------------------------------------------------------------


def flatten(entry: Entry, value: Tensor) -> Tensor:
    """Return points (..., n)."""
    return value.flatten(-2) if len(entry.event) == 2 else value


def slacks(rows: Rows, x: Tensor) -> Tensor:
    """Return ``d - N x`` of the inequalities, (..., m)."""
    found = rows.d - (rows.N @ x.unsqueeze(-1)).squeeze(-1)
    return found[..., rows.equalities :]


def active_rows(rows: Rows, x: Tensor, tolerance: float) -> Tensor:
    """Return the mask (..., m) of equalities and of inequalities with a slack of at most the tolerance."""
    near = slacks(rows, x) <= tolerance
    return torch.cat([near.new_ones(*near.shape[:-1], rows.equalities), near], dim=-1)


def on_face(rows: Rows, mask: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
    """Project v on the affine set of the rows in the mask, in the metric of the weight; dense and differentiable.

    ``x = v - H^-1 N'(N H^-1 N')^+ (N v - d)``, formula (2) of docs/theory.md with ``q = -H v``.
    """
    keep = mask.to(v.dtype)
    N = rows.N * keep.unsqueeze(-1)
    d = torch.where(mask, rows.d, 0.0)
    scaled = N if weight is None else N / weight.unsqueeze(-2)
    # Rows of unit length, so that the threshold of the pseudo-inverse means an angle.
    length = N.detach().square().sum(-1, keepdim=True).sqrt()
    unit = 1.0 / torch.where(length == 0.0, 1.0, length)
    gram = torch.linalg.pinv(unit * (N @ scaled.mT) * unit.mT, rtol=1e-9, hermitian=True)
    excess = (N @ v.unsqueeze(-1)).squeeze(-1) - d
    step = scaled.mT @ (unit * (gram @ (unit * excess.unsqueeze(-1))))
    return v - step.squeeze(-1)


def projector(N: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Return the Jacobian ``I - H^-1 N'(N H^-1 N')^+ N`` for one item."""
    root = np.ones(N.shape[1]) if weight is None else np.sqrt(weight)
    scaled = N / root
    inner = np.eye(N.shape[1]) - np.linalg.pinv(scaled, rcond=1e-9) @ scaled
    return inner * root / root[:, None]


def multipliers(rows: np.ndarray, equalities: int, force: np.ndarray) -> tuple[np.ndarray, float]:
    """Return multipliers with ``rows'z = force``, not negative on inequalities, and what is left of the force.

    Args:
        rows: (k, n), equalities first.
        equalities: how many.
        force: (n,) ``h (v - x)``.
    """
    size = np.abs(force).max(initial=0.0)
    if size == 0.0 or len(rows) == 0:
        return np.zeros(len(rows)), float(size)
    lengths = np.maximum(np.linalg.norm(rows, axis=1), 1e-300)
    unit = rows / lengths[:, None]
    columns = np.concatenate([unit, -unit[:equalities]]).T
    found, rest = nnls(columns, force / size, maxiter=100 * columns.shape[1])
    z = found[: len(rows)].copy()
    z[:equalities] -= found[len(rows) :]
    return z * size / lengths, float(rest * size)


@dataclass(frozen=True)
class Explicit:
    """One item of a set at one point, in numpy.

    Attributes:
        active: (k, n) active rows, equalities first.
        equalities: how many of them.
        supported: (k,) whether some multiplier is positive; equalities are.
        unsettled: ``|h (v - x) - N'z|``, zero at a projection.
    """

    active: np.ndarray
    equalities: int
    supported: np.ndarray
    unsettled: float

    @property
    def degenerate(self) -> bool:
        """Whether the choice of K matters."""
        rank = [
            np.linalg.matrix_rank(rows, 1e-9) if len(rows) else 0 for rows in (self.active, self.active[self.supported])
        ]
        return rank[0] != rank[1]


def explicit(rows: Rows, v: np.ndarray, x: np.ndarray, weight: np.ndarray | None, tolerance: float) -> Explicit:
    """Find active rows and multipliers of one item; rows without batch axes."""
    mask = active_rows(rows, torch.tensor(x), tolerance).numpy()
    active = rows.N.numpy()[mask]
    force = (v - x) * (1.0 if weight is None else weight)
    z, unsettled = multipliers(active, rows.equalities, force)
    supported = z > 1e-8 * np.abs(force).max(initial=1e-300)
    supported[: rows.equalities] = True
    return Explicit(active, rows.equalities, supported, unsettled)
