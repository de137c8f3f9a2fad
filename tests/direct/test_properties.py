"""Laws of the public functions on generated data (Hypothesis): half-integers, so ties and dependent rows are exact.

Every property runs on 60 examples, the same in every run; `pytest -m nightly` runs 2,000 others each time, and prints
how to reproduce what fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from hsbackend import Polyhedron, Status, functional, hs_jvp, hs_vjp, project, solve_qp
from hsbackend.nn import QP, Projection
from hsbackend.qp import QPSolution

# torch itself scripts its forward-mode formulas.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

D = torch.float64
_COMMON = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
_SAME = settings(_COMMON, derandomize=True)
_OTHERS = settings(_COMMON, print_blob=True)


def law(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """Make a test of a function of generated arguments."""

    def decorate(function: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.nightly)])
        def test(examples: int) -> None:
            profile = settings(_SAME if examples == 60 else _OTHERS, max_examples=examples)
            profile(given(*strategies)(function))()

        test.__doc__ = function.__doc__
        return test

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def halves(low: int = -4, high: int = 4) -> st.SearchStrategy[float]:
    """Return half-integers between low/2 and high/2."""
    return st.integers(low, high).map(lambda k: k / 2)


@st.composite
def tensors(draw: st.DrawFn, *shape: int, low: int = -4, high: int = 4) -> Tensor:
    """Return a tensor of half-integers."""
    size = math.prod(shape)
    return torch.tensor(draw(st.lists(halves(low, high), min_size=size, max_size=size)), dtype=D).reshape(shape)


@st.composite
def points(draw: st.DrawFn, *shape: int) -> Tensor:
    """Return a tensor of half-integers, or one of any floats up to 8."""
    if draw(st.booleans()):
        return draw(tensors(*shape, low=-8, high=8))
    size = math.prod(shape)
    values = st.floats(-8.0, 8.0, allow_nan=False)
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=D).reshape(shape)


@st.composite
def limits(draw: st.DrawFn, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds around a point: equal, tight on one side, wide, or infinite."""
    sides: list[Tensor] = []
    for sign, infinity in ((-1.0, -math.inf), (1.0, math.inf)):
        gaps = [draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0, math.inf])) for _ in range(inside.numel())]
        gap = torch.tensor(gaps, dtype=D).reshape(inside.shape)
        sides.append(torch.where(gap.isinf(), infinity, inside + sign * gap))
    return sides[0], sides[1]


@st.composite
def rows(draw: st.DrawFn, count: int, n: int) -> Tensor:
    """Return rows of which some are zero, copies, negatives or sums of those before."""
    made: list[Tensor] = []
    for _ in range(count):
        kind = draw(st.sampled_from(["new", "new", "new", "copy", "twice", "negative", "sum", "zero"]))
        if kind == "zero":
            made.append(torch.zeros(n, dtype=D))
        elif kind == "new" or not made:
            made.append(draw(tensors(n)))
        else:
            row = made[draw(st.integers(0, len(made) - 1))]
            other = made[draw(st.integers(0, len(made) - 1))]
            made.append({"copy": row, "twice": 2.0 * row, "negative": -row, "sum": row + other}[kind])
    return torch.stack(made) if made else torch.zeros(0, n, dtype=D)


# ---------------------------------------------------------------------------------------------------------------------
# Sets
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A set that is not empty; `make(t)` is t times the set, for t > 0."""

    name: str
    make: Callable[[float], Polyhedron] = field(repr=False)
    event: tuple[int, ...]
    told: tuple[Any, ...]

    @property
    def polyhedron(self) -> Polyhedron:
        return self.make(1.0)


def _maybe(value: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.just(value))


def _times(t: float, value: Any) -> Any:
    return None if value is None else t * value


def _box(draw: st.DrawFn, n: int) -> Drawn:
    lower, upper = draw(limits(draw(tensors(n))))
    return Drawn("box", lambda t: Polyhedron.box(t * lower, t * upper), (n,), (lower, upper))


def _linf(draw: st.DrawFn, n: int) -> Drawn:
    radius = draw(halves(0, 4))
    return Drawn("linf_ball", lambda t: Polyhedron.linf_ball(n, t * radius), (n,), (radius,))


def _halfspace(draw: st.DrawFn, n: int) -> Drawn:
    a, slack = draw(tensors(n)), draw(halves(0, 3))
    b = a @ draw(tensors(n)) + slack
    return Drawn("halfspace", lambda t: Polyhedron.halfspace(a, t * b), (n,), (a, b))


def _hyperplane(draw: st.DrawFn, n: int) -> Drawn:
    a = draw(tensors(n))
    b = a @ draw(tensors(n))
    return Drawn("hyperplane", lambda t: Polyhedron.hyperplane(a, t * b), (n,), (a, b))


def _affine(draw: st.DrawFn, n: int) -> Drawn:
    A = draw(rows(draw(st.integers(1, 3)), n))
    b = A @ draw(tensors(n))
    return Drawn("affine", lambda t: Polyhedron.affine(A, t * b), (n,), (A, b))


def _simplex(draw: st.DrawFn, n: int) -> Drawn:
    radius = draw(halves(0, 4))
    return Drawn("simplex", lambda t: Polyhedron.simplex(n, t * radius), (n,), (radius,))


def _capped(draw: st.DrawFn, n: int) -> Drawn:
    cap = draw(tensors(n, low=0, high=4))
    radius = float(cap.sum()) * draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    return Drawn("capped_simplex", lambda t: Polyhedron.capped_simplex(n, t * radius, t * cap), (n,), (radius, cap))


def _budget(draw: st.DrawFn, n: int) -> Drawn:
    inside = draw(tensors(n))
    lower, upper = draw(limits(inside))
    c = draw(_maybe(draw(tensors(n))))
    level = float(inside.sum() if c is None else c @ inside)
    kind = draw(st.sampled_from(["equals", "at_most", "at_least", "between"]))
    below, above = level - draw(halves(0, 2)), level + draw(halves(0, 2))
    sides = {
        "equals": {"equals": level},
        "at_most": {"at_most": above},
        "at_least": {"at_least": below},
        "between": {"at_most": above, "at_least": below},
    }[kind]

    def make(t: float) -> Polyhedron:
        return Polyhedron.budget(n, c, **{k: t * v for k, v in sides.items()}, lower=t * lower, upper=t * upper)

    return Drawn("budget", make, (n,), (c, sides, lower, upper))


def _l1(draw: st.DrawFn, n: int) -> Drawn:
    radius = draw(halves(0, 6))
    return Drawn("l1_ball", lambda t: Polyhedron.l1_ball(n, t * radius), (n,), (radius,))


def _weighted_l1(draw: st.DrawFn, n: int) -> Drawn:
    weights, radius = draw(tensors(n, low=1, high=4)), draw(halves(0, 6))
    return Drawn(
        "weighted_l1_ball", lambda t: Polyhedron.weighted_l1_ball(weights, t * radius), (n,), (weights, radius)
    )


def _transport(draw: st.DrawFn, n: int) -> Drawn:
    k1, k2 = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    plan = draw(tensors(k1, k2, low=0, high=3))
    r, c = plan.sum(1), plan.sum(0)
    return Drawn("transport", lambda t: Polyhedron.transport(t * r, t * c), (k1, k2), (r, c))


def _monotone(draw: st.DrawFn, n: int) -> Drawn:
    lower = draw(_maybe(draw(halves())))
    upper = draw(_maybe((lower or 0.0) + draw(halves(0, 4))))
    increasing = draw(st.booleans())
    return Drawn(
        "monotone", lambda t: Polyhedron.monotone(n, increasing, _times(t, lower), _times(t, upper)), (n,),
        (increasing, lower, upper),
    )  # fmt: skip


def _order(draw: st.DrawFn, n: int) -> Drawn:
    index = st.integers(0, n - 1)
    edges = draw(st.lists(st.tuples(index, index), max_size=5))
    return Drawn("order", lambda t: Polyhedron.order(n, edges), (n,), (edges,))


def _box_affine(draw: st.DrawFn, n: int) -> Drawn:
    inside = draw(tensors(n))
    lower, upper = draw(limits(inside))
    A = draw(rows(draw(st.integers(1, 3)), n))
    b = A @ inside
    return Drawn(
        "box_intersect_affine", lambda t: Polyhedron.box_intersect_affine(t * lower, t * upper, A, t * b), (n,),
        (lower, upper, A, b),
    )  # fmt: skip


def _general(draw: st.DrawFn, n: int) -> Drawn:
    inside = draw(tensors(n))
    lower, upper = draw(limits(inside))
    A = draw(rows(draw(st.integers(0, 2)), n))
    G = draw(rows(draw(st.integers(0, 4)), n))
    slack = torch.tensor([draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, math.inf])) for _ in G], dtype=D)
    b, h = A @ inside, G @ inside + slack

    def make(t: float) -> Polyhedron:
        return Polyhedron(A, t * b, G, t * h, t * lower, t * upper)

    return Drawn("polyhedron", make, (n,), (A, b, G, h, lower, upper))


def _product(draw: st.DrawFn, n: int) -> Drawn:
    kinds = (_box, _simplex, _monotone, _budget, _capped)
    parts = [draw(st.sampled_from(kinds))(draw, draw(st.integers(1, 2))) for _ in range(draw(st.integers(1, 3)))]
    size = sum(part.event[0] for part in parts)
    return Drawn("product", lambda t: Polyhedron.product(*(p.make(t) for p in parts)), (size,), tuple(parts))


_L1 = (_l1, _weighted_l1)
_KINDS = (
    _box, _linf, _halfspace, _hyperplane, _affine, _simplex, _capped, _budget, *_L1, _transport, _monotone, _order,
    _box_affine, _general, _product,
)  # fmt: skip
_WITH_ROWS = tuple(kind for kind in _KINDS if kind not in _L1)


@st.composite
def sets(draw: st.DrawFn, kinds: tuple[Callable[[st.DrawFn, int], Drawn], ...] = _KINDS) -> Drawn:
    return draw(st.sampled_from(kinds))(draw, draw(st.integers(1, 4)))


@st.composite
def projections(
    draw: st.DrawFn, kinds: tuple[Callable[[st.DrawFn, int], Drawn], ...] = _KINDS
) -> tuple[Drawn, Tensor, Tensor | None]:
    """Return a set, two points (2, *event) and a metric."""
    drawn = draw(sets(kinds))
    weight = draw(_maybe(draw(tensors(*drawn.event, low=1, high=4))))
    return drawn, draw(points(2, *drawn.event)), weight


def violation(drawn: Drawn, x: Tensor) -> Tensor:
    """Return the largest violation of points (..., *event), from the definition of the set."""
    flat = x.flatten(-len(drawn.event))
    if drawn.name in ("l1_ball", "weighted_l1_ball"):
        weights = drawn.told[0] if drawn.name == "weighted_l1_ball" else 1.0
        return ((weights * flat.abs()).sum(-1) - drawn.told[-1]).clamp(min=0.0)
    found = drawn.polyhedron.general()
    parts = [torch.zeros_like(flat[..., :1])]
    if found.A is not None:
        parts.append((flat @ found.A.mT - found.b).abs())
    if found.G is not None:
        parts.append((flat @ found.G.mT - found.h).clamp(min=0.0))
    if found.lower is not None:
        parts.append((found.lower - flat).clamp(min=0.0))
    if found.upper is not None:
        parts.append((flat - found.upper).clamp(min=0.0))
    return torch.cat(parts, -1).amax(-1)


def dot(weight: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products (B,) in the metric of points (B, *event)."""
    return (a * b if weight is None else weight * a * b).flatten(1).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Projections
# ---------------------------------------------------------------------------------------------------------------------


@law(projections())
def test_a_projection_is_feasible_idempotent_and_optimal(case: tuple[Drawn, Tensor, Tensor | None]) -> None:
    """<H (v - x), y - x> <= 0 for every y of the set; tried with the other point's projection and their mean."""
    drawn, v, weight = case
    x = project(v, drawn.polyhedron, weight=weight)
    assert x.shape == v.shape
    assert float(violation(drawn, x).max()) < 1e-8
    again = project(x, drawn.polyhedron, weight=weight)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-8)
    others = (x.flip(0), 0.5 * (x + x.flip(0)), project(-v, drawn.polyhedron, weight=weight))
    for y in others:
        assert float(dot(weight, v - x, y - x).max()) < 1e-7


@law(projections())
def test_a_projection_is_not_expansive(case: tuple[Drawn, Tensor, Tensor | None]) -> None:
    """Firmly: |x - y|^2 <= <v - w, x - y> in the metric."""
    drawn, v, weight = case
    x = project(v, drawn.polyhedron, weight=weight)
    moved, step = x - x.flip(0), v - v.flip(0)
    assert float((dot(weight, moved, moved) - dot(weight, step, moved)).max()) < 1e-7


@law(projections(), st.sampled_from([0.25, 2.0, 1024.0]))
def test_a_projection_scales_with_its_set(case: tuple[Drawn, Tensor, Tensor | None], t: float) -> None:
    drawn, v, weight = case
    x = project(v, drawn.polyhedron, weight=weight)
    torch.testing.assert_close(project(t * v, drawn.make(t), weight=weight), t * x, rtol=0, atol=t * 1e-8)


@law(projections(_WITH_ROWS), st.data())
def test_a_named_set_is_its_rows_and_moves_with_them(
    case: tuple[Drawn, Tensor, Tensor | None], data: st.DataObject
) -> None:
    """Projecting v + a on C + a gives x + a; with a = 0 it is the general solver against the algorithm of the set."""
    drawn, v, weight = case
    flat, metric = v.flatten(1), None if weight is None else weight.flatten()
    x = project(v, drawn.polyhedron, weight=weight).flatten(1)
    a = data.draw(tensors(flat.shape[1])) * data.draw(st.sampled_from([0.0, 1.0]))
    A, b, G, h, lower, upper = drawn.polyhedron.general()
    moved = Polyhedron(
        A, b if A is None else b + A.to(D) @ a, G, h if G is None else h + G.to(D) @ a,
        -math.inf if lower is None else lower + a, math.inf if upper is None else upper + a,
    )  # fmt: skip
    assume(any(part is not None for part in (A, G, lower, upper)))
    torch.testing.assert_close(project(flat + a, moved, weight=metric), x + a, rtol=0, atol=1e-7)


@law(projections(), st.sampled_from(["active", "support"]), st.data())
def test_the_two_products_with_the_jacobian_are_adjoint(
    case: tuple[Drawn, Tensor, Tensor | None], jacobian: Any, data: st.DataObject
) -> None:
    """<u, M d> = <M'u, d>; linear in both; eager backward is the same product; H M is symmetric and M is idempotent."""
    drawn, v, weight = case
    P = drawn.polyhedron
    u, d = data.draw(tensors(*v.shape)), data.draw(tensors(*v.shape))
    forward = hs_jvp(v, P, d, weight=weight, jacobian=jacobian)
    backward = hs_vjp(v, P, u, weight=weight, jacobian=jacobian)
    torch.testing.assert_close(dot(None, u, forward), dot(None, backward, d), rtol=0, atol=1e-8)
    combined = hs_vjp(v, P, 2.0 * u - d, weight=weight, jacobian=jacobian)
    other = hs_vjp(v, P, d, weight=weight, jacobian=jacobian)
    torch.testing.assert_close(combined, 2.0 * backward - other, rtol=0, atol=1e-8)
    twice = hs_jvp(v, P, forward, weight=weight, jacobian=jacobian)
    torch.testing.assert_close(twice, forward, rtol=0, atol=1e-8)
    leaf = v.clone().requires_grad_()
    eager = torch.autograd.grad(project(leaf, P, weight=weight, jacobian=jacobian), leaf, u)[0]
    torch.testing.assert_close(eager, backward, rtol=0, atol=1e-8)
    symmetric = hs_jvp(v, P, u, weight=weight, jacobian=jacobian)
    torch.testing.assert_close(dot(weight, u, forward), dot(weight, symmetric, d), rtol=0, atol=1e-8)


@law(projections(), st.sampled_from([(0,), (1,), (3,), (2, 2), (0, 2)]))
def test_items_of_a_batch_do_not_see_each_other(
    case: tuple[Drawn, Tensor, Tensor | None], batch: tuple[int, ...]
) -> None:
    drawn, v, weight = case
    many = torch.stack([(index + 1.0) * v[index % 2] for index in range(math.prod(batch))] or [v[0]])
    many = many[: math.prod(batch)].reshape(*batch, *drawn.event).requires_grad_()
    found = project(many, drawn.polyhedron, weight=weight)
    assert found.shape == many.shape
    (gradient,) = torch.autograd.grad(found.square().sum(), many)
    assert gradient.shape == many.shape
    for index in np.ndindex(*batch):
        item = many.detach()[index].requires_grad_()
        x = project(item, drawn.polyhedron, weight=weight)
        torch.testing.assert_close(found[index], x, rtol=0, atol=1e-9)
        torch.testing.assert_close(gradient[index], torch.autograd.grad(x.square().sum(), item)[0], rtol=0, atol=1e-8)


@law(projections(), st.booleans())
def test_the_module_is_the_function(case: tuple[Drawn, Tensor, Tensor | None], single: bool) -> None:
    drawn, v, weight = case
    wanted = project(v, drawn.polyhedron, weight=weight)
    module = Projection(drawn.polyhedron, weight=weight)
    torch.testing.assert_close(module(v), wanted, rtol=0, atol=1e-9)
    if single:
        found = module.float()(v.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)


@law(st.data(), st.integers(1, 4), halves(0, 4), st.sampled_from(["simplex", "l1_ball", "budget"]))
def test_a_masked_entry_is_an_absent_one(data: st.DataObject, n: int, radius: float, kind: str) -> None:
    """v_j = -inf on a bound from below gives that bound; on an l1 ball there is none, and the item fails."""
    v = data.draw(points(n + 1))
    place = data.draw(st.integers(0, n))
    masked = v.clone()
    masked[place] = -math.inf
    kept = [j for j in range(n + 1) if j != place]
    if kind == "l1_ball":
        found = project(torch.stack([masked, v]), Polyhedron.l1_ball(n + 1, radius), on_failure="nan")
        assert bool(found[0].isnan().all()) or radius == 0.0
        torch.testing.assert_close(found[1], project(v, Polyhedron.l1_ball(n + 1, radius)), rtol=0, atol=1e-9)
        return

    def make(k: int) -> Polyhedron:
        return Polyhedron.simplex(k, radius) if kind == "simplex" else Polyhedron.budget(k, at_most=radius)

    found = project(masked, make(n + 1))
    assert float(found[place]) == 0.0
    torch.testing.assert_close(found[kept], project(v[kept], make(n)), rtol=0, atol=1e-9)


@law(projections(), st.data())
def test_an_item_that_is_not_a_number_fails_alone(
    case: tuple[Drawn, Tensor, Tensor | None], data: st.DataObject
) -> None:
    """NaN in a point fails its item and no other; its gradient is that of the others, and zero for itself."""
    drawn, v, weight = case
    broken = v.clone()
    broken[1].view(-1)[data.draw(st.integers(0, v[0].numel() - 1))] = math.nan
    broken.requires_grad_()
    found = project(broken, drawn.polyhedron, weight=weight, on_failure="nan")
    assert bool(found[1].isnan().all())
    torch.testing.assert_close(found[0], project(v, drawn.polyhedron, weight=weight)[0], rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(found[0].sum(), broken)
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[1].any())


@st.composite
def along(draw: st.DrawFn) -> tuple[str, Callable[..., Tensor], Polyhedron, int]:
    """Return a function of a tensor and an axis, and its set."""
    n = draw(st.integers(1, 4))
    radius = draw(halves(0, 4))
    low, gap = draw(halves()), draw(halves(0, 4))
    a = draw(tensors(n))
    b = float(a @ draw(tensors(n)))
    options: dict[str, tuple[Callable[..., Tensor], Polyhedron]] = {
        "simplex": (lambda x, **o: functional.simplex(x, radius, **o), Polyhedron.simplex(n, radius)),
        "l1_ball": (lambda x, **o: functional.l1_ball(x, radius, **o), Polyhedron.l1_ball(n, radius)),
        "linf_ball": (lambda x, **o: functional.linf_ball(x, radius, **o), Polyhedron.linf_ball(n, radius)),
        "box": (lambda x, **o: functional.box(x, low, low + gap, **o), Polyhedron.box(low, low + gap, n)),
        "capped_simplex": (
            lambda x, **o: functional.capped_simplex(x, 0.5 * n * radius, radius, **o),
            Polyhedron.capped_simplex(n, 0.5 * n * radius, radius),
        ),
        "halfspace": (lambda x, **o: functional.halfspace(x, a, b, **o), Polyhedron.halfspace(a, b)),
        "hyperplane": (lambda x, **o: functional.hyperplane(x, a, b, **o), Polyhedron.hyperplane(a, b)),
        "monotone": (
            lambda x, **o: functional.monotone(x, True, low, low + gap, **o),
            Polyhedron.monotone(n, True, low, low + gap),
        ),
        "budget": (
            lambda x, **o: functional.budget(x, a, at_most=b, lower=None, **o),
            Polyhedron.budget(n, a, at_most=b, lower=None),
        ),
    }
    name = draw(st.sampled_from(sorted(options)))
    return name, *options[name], n


@law(along(), st.sampled_from([(0, 1), (1, 1), (-1, 2), (-2, 2), (0, 3), (1, 3), (-3, 3)]), st.booleans(), st.data())
def test_functions_take_any_axis_and_dtype(
    case: tuple[str, Callable[..., Tensor], Polyhedron, int], axis: tuple[int, int], single: bool, data: st.DataObject
) -> None:
    _, function, P, n = case
    dim, axes = axis
    if axes == 1:
        dim = 0
    shape = [2, 3, 2][:axes]
    shape[dim] = n
    x = data.draw(tensors(*shape, low=-8, high=8))
    weight = data.draw(_maybe(data.draw(tensors(*shape, low=1, high=4))))
    moved = None if weight is None else weight.movedim(dim, -1)
    wanted = project(x.movedim(dim, -1), P, weight=moved).movedim(-1, dim)
    torch.testing.assert_close(function(x, dim=dim, weight=weight), wanted, rtol=0, atol=1e-12)
    if single:
        found = function(x.float(), dim=dim, weight=None if weight is None else weight.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Quadratic programs
# ---------------------------------------------------------------------------------------------------------------------

Program = dict[str, Tensor]
_ORDER = ("Q", "q", "A", "b", "G", "h", "lower", "upper")


@st.composite
def programs(draw: st.DrawFn, singular: bool = False) -> Program:
    """Return a program without batch axes that has a solution.

    Strictly convex, or of a Hessian of any rank with bounds on all sides.
    """
    n = draw(st.integers(1, 4))
    root = draw(tensors(draw(st.integers(0, n)) if singular else n, n, low=-2, high=2))
    Q = root.mT @ root + (0.0 if singular else draw(st.sampled_from([0.5, 1.0]))) * torch.eye(n, dtype=D)
    if draw(st.booleans()):
        Q = Q.diagonal().clone()
    inside = draw(tensors(n))
    lower, upper = draw(limits(inside))
    if singular:
        lower, upper = lower.clamp(min=-6.0), upper.clamp(max=6.0)
    A = draw(rows(draw(st.integers(0, 2)), n))
    G = draw(rows(draw(st.integers(0, 5)), n))
    slack = torch.tensor([draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, math.inf])) for _ in G], dtype=D)
    q = draw(tensors(n, low=-8, high=8))
    given_data = {
        "Q": Q, "q": q, "A": A, "b": A @ inside, "G": G, "h": G @ inside + slack, "lower": lower, "upper": upper
    }  # fmt: skip
    for pair in (("A", "b"), ("G", "h"), ("lower",), ("upper",)):
        if draw(st.integers(0, 3)) == 0 and not (singular and len(pair) == 1):
            given_data = {name: tensor for name, tensor in given_data.items() if name not in pair}
    return given_data


def kkt_residual(program: Program, solution: QPSolution) -> float:
    """Return the largest violation of the KKT conditions of one item, from their definition."""
    x, z = solution.primal.detach(), solution.multipliers
    Q = program["Q"]
    dual = (Q * x if Q.dim() == 1 else Q @ x) + program["q"] - z.lower + z.upper
    worst = [torch.zeros(1, dtype=D)]
    slacks: list[tuple[Tensor, Tensor]] = []
    if "A" in program:
        dual = dual + program["A"].mT @ z.eq
        worst.append((program["A"] @ x - program["b"]).abs())
    if "G" in program:
        dual = dual + program["G"].mT @ z.ineq
        slacks.append((program["h"] - program["G"] @ x, z.ineq))
    if "lower" in program:
        slacks.append((x - program["lower"], z.lower))
    if "upper" in program:
        slacks.append((program["upper"] - x, z.upper))
    for slack, multiplier in slacks:
        product = torch.where(slack.isinf(), multiplier, slack * multiplier)
        worst += [(-slack).clamp(min=0.0), (-multiplier).clamp(min=0.0), product.abs()]
    largest = torch.cat([dual.abs(), *worst]).max()
    return float("inf") if torch.isnan(largest) else float(largest)


def objective(program: Program, x: Tensor) -> float:
    """Return 1/2 x'Qx + q'x."""
    Q = program["Q"]
    return float(0.5 * x @ (Q * x if Q.dim() == 1 else Q @ x) + program["q"] @ x)


def is_empty(program: Program) -> bool:
    """Say whether the constraints exclude each other, by an independent linear program."""
    free = torch.full_like(program["q"], math.inf)
    lower, upper = program.get("lower", -free), program.get("upper", free)
    keep = program["h"].isfinite() if "G" in program else torch.zeros(0, dtype=torch.bool)
    has_rows, has_equations = bool(keep.any()), "A" in program and len(program["A"]) > 0
    found = linprog(
        np.zeros(free.numel()),
        A_ub=program["G"][keep].numpy() if has_rows else None,
        b_ub=program["h"][keep].numpy() if has_rows else None,
        A_eq=program["A"].numpy() if has_equations else None,
        b_eq=program["b"].numpy() if has_equations else None,
        bounds=torch.stack([lower, upper], dim=1).numpy(),
    )
    return found.status == 2


@law(programs())
def test_a_strictly_convex_program_is_solved(program: Program) -> None:
    solution = solve_qp(**program)
    assert int(solution.status) == Status.SOLVED
    assert kkt_residual(program, solution) < 1e-8
    residuals = solution.residuals
    assert float(max(residuals.primal, residuals.dual, residuals.complementarity)) < 1e-8


@law(programs(), st.data())
def test_the_status_is_the_truth(program: Program, data: st.DataObject) -> None:
    """Limits moved at random: solved means KKT, infeasible means that an independent solver says so too."""
    for name in ("b", "h", "upper"):
        if name in program:
            program[name] = program[name] + data.draw(tensors(*program[name].shape, low=-3, high=0))
    solution = solve_qp(**program, on_failure="nan")
    if int(solution.status) == Status.SOLVED:
        assert kkt_residual(program, solution) < 1e-8
    else:
        assert int(solution.status) == Status.INFEASIBLE
        assert bool(solution.primal.isnan().all())
        assert is_empty(program)
    closest = solve_qp(**program, on_failure="closest")
    if int(solution.status) == Status.SOLVED:
        torch.testing.assert_close(closest.primal, solution.primal, rtol=0, atol=1e-9)
    else:
        assert int(closest.status) == Status.CLOSEST
        assert bool(closest.primal.isfinite().all())


def _dense(program: Program) -> Program:
    """Write a diagonal out, so that variables can be exchanged in one way only."""
    Q = program["Q"]
    return {**program, "Q": torch.diag(Q) if Q.dim() == 1 else Q}


def _changed(program: Program, data: st.DataObject) -> tuple[Program, list[int]]:
    """Return the same program told differently, and the order of its variables."""
    changed = _dense(program)
    n = changed["q"].numel()
    for rows_name, limits_name, factors in (("A", "b", (-2.0, 0.25, 8.0)), ("G", "h", (0.25, 1.0, 8.0))):
        if rows_name not in changed or not len(changed[rows_name]):
            continue
        m = len(changed[rows_name])
        scale = torch.tensor([data.draw(st.sampled_from(factors)) for _ in range(m)], dtype=D)
        kept = [*data.draw(st.permutations(range(m))), *data.draw(st.lists(st.integers(0, m - 1), max_size=2))]
        changed[rows_name] = (scale[:, None] * changed[rows_name])[kept]
        changed[limits_name] = (scale * changed[limits_name])[kept]
    if "upper" in changed and data.draw(st.booleans()):
        # The upper bounds once more, as rows.
        eye, upper = torch.eye(n, dtype=D), changed["upper"]
        changed["G"] = torch.cat([changed["G"], eye]) if "G" in changed else eye
        changed["h"] = torch.cat([changed["h"], upper]) if "h" in changed else upper
    order = list(data.draw(st.permutations(range(n))))
    for name in changed.keys() & {"q", "lower", "upper"}:
        changed[name] = changed[name][order]
    for name in changed.keys() & {"A", "G"}:
        changed[name] = changed[name][:, order]
    changed["Q"] = changed["Q"][order][:, order]
    return changed, order


@law(programs(), st.data())
def test_the_solution_is_that_of_the_set_and_not_of_its_words(program: Program, data: st.DataObject) -> None:
    """Rows scaled, exchanged and repeated, bounds written as rows, variables exchanged: the same x and the same P_K."""
    changed, order = _changed(program, data)
    cotangent = data.draw(tensors(len(order)))
    found: list[tuple[Tensor, Tensor]] = []
    for told, g in ((_dense(program), cotangent), (changed, cotangent[order])):
        q = told["q"].clone().requires_grad_()
        solution = solve_qp(**{**told, "q": q})
        found.append((solution.primal.detach(), torch.autograd.grad(solution.primal, q, g)[0]))
    torch.testing.assert_close(found[1][0], found[0][0][order], rtol=0, atol=1e-8)
    torch.testing.assert_close(found[1][1], found[0][1][order], rtol=0, atol=1e-7)


@law(programs(), st.data())
def test_a_batch_is_its_items(program: Program, data: st.DataObject) -> None:
    """What varies over the batch, what is shared and how many items there are makes no difference to an item."""
    program = _dense(program)  # a diagonal has no batch axes
    batch = data.draw(st.integers(0, 3))
    varying = data.draw(st.sets(st.sampled_from(sorted(program))))
    shift = data.draw(tensors(max(batch, 1), program["q"].numel()))[:batch]
    many = {name: t.expand(batch, *t.shape).clone() if name in varying else t for name, t in program.items()}
    many["q"] = (program["q"] + shift).requires_grad_()
    solution = solve_qp(**many)
    assert solution.primal.shape == many["q"].shape
    assert solution.status.shape == (batch,)
    (gradient,) = torch.autograd.grad(solution.primal.square().sum(), many["q"])
    for item in range(batch):
        q = many["q"][item].detach().requires_grad_()
        alone = solve_qp(**{**program, "q": q})
        torch.testing.assert_close(solution.primal[item], alone.primal, rtol=0, atol=1e-9)
        wanted = torch.autograd.grad(alone.primal.square().sum(), q)[0]
        torch.testing.assert_close(gradient[item], wanted, rtol=0, atol=1e-7)


def _as_function(program: Program, jacobian: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the primal as a function of all finite data."""
    names = [name for name in program if bool(program[name].isfinite().all())]

    def function(*moved: Tensor) -> Tensor:
        data = {**program, **dict(zip(names, moved, strict=True))}
        if data["Q"].dim() == 2:
            data["Q"] = 0.5 * (data["Q"] + data["Q"].mT)
        return solve_qp(**data, jacobian=jacobian).primal

    return function, tuple(program[name] for name in names)


@law(programs(), st.sampled_from(["active", "support"]), st.data())
def test_products_with_the_derivative_of_a_program_are_adjoint(
    program: Program, jacobian: Any, data: st.DataObject
) -> None:
    """<u, J t> = <J'u, t> for all data at once; J' is linear; eager backward is the same for q."""
    function, leaves = _as_function(program, jacobian)
    tangents = tuple(data.draw(tensors(*leaf.shape)) for leaf in leaves)
    u, other = data.draw(tensors(*program["q"].shape)), data.draw(tensors(*program["q"].shape))
    _, forward = torch.func.jvp(function, leaves, tangents)
    _, pull_back = torch.func.vjp(function, *leaves)
    backward, second, combined = pull_back(u), pull_back(other), pull_back(2.0 * u - other)
    size = 1.0 + sum(float(part.abs().sum()) for part in (*backward, *second))
    right = sum((one * t).sum() for one, t in zip(backward, tangents, strict=True))
    torch.testing.assert_close((u * forward).sum(), right, rtol=0, atol=1e-8 * size)
    for one, two, both in zip(backward, second, combined, strict=True):
        torch.testing.assert_close(both, 2.0 * one - two, rtol=0, atol=1e-8 * size)
    q = program["q"].clone().requires_grad_()
    eager = torch.autograd.grad(solve_qp(**{**program, "q": q}, jacobian=jacobian).primal, q, u)[0]
    torch.testing.assert_close(
        eager, torch.func.vjp(lambda q: function(*_with(leaves, program, q)), q)[1](u)[0].detach()
    )


def _with(leaves: tuple[Tensor, ...], program: Program, q: Tensor) -> tuple[Tensor, ...]:
    """Replace the linear term."""
    return tuple(q if leaf is program["q"] else leaf for leaf in leaves)


@law(programs(), st.booleans())
def test_the_program_module_is_the_function(program: Program, single: bool) -> None:
    wanted = solve_qp(**program)
    module = QP(**{name: tensor for name, tensor in program.items() if name != "q"})
    found = module(program["q"])
    torch.testing.assert_close(found.primal, wanted.primal, rtol=0, atol=1e-9)
    if single:
        found = module.float()(program["q"].float())
        assert found.primal.dtype == torch.float32
        torch.testing.assert_close(found.primal.double(), wanted.primal, rtol=0, atol=1e-5)


@law(programs(), st.data())
def test_a_smoothed_program_is_the_one_with_the_term(program: Program, data: st.DataObject) -> None:
    smoothing = data.draw(st.sampled_from([0.25, 1.0]))
    centre = data.draw(tensors(*program["q"].shape))
    dense = _dense(program)
    with_term = {
        **dense,
        "Q": dense["Q"] + smoothing * torch.eye(centre.numel(), dtype=D),
        "q": program["q"] - smoothing * centre,
    }
    found = solve_qp(**program, smoothing=smoothing, smoothing_centre=centre)
    torch.testing.assert_close(found.primal, solve_qp(**with_term).primal, rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Semidefinite and linear programs
# ---------------------------------------------------------------------------------------------------------------------


@law(programs(singular=True), st.data())
def test_a_convex_program_is_solved_and_its_optimum_is_that_of_least_norm(
    program: Program, data: st.DataObject
) -> None:
    """KKT; and a strictly convex term 1e-4/2 |x|^2 neither makes the objective worse by more than its size nor finds
    an optimum of smaller norm.
    """
    solution = solve_qp(**program)
    assert int(solution.status) == Status.SOLVED
    assert kkt_residual(program, solution) < 1e-7
    x = solution.primal
    near = solve_qp(**program, smoothing=1e-4).primal
    assert objective(program, near) >= objective(program, x) - 1e-7
    assert float(near.norm()) <= float(x.norm()) + 1e-6
    changed, order = _changed(program, data)
    torch.testing.assert_close(solve_qp(**changed).primal, x[order], rtol=0, atol=1e-6)


@law(programs(singular=True), st.data())
def test_a_batch_of_convex_programs_is_its_items(program: Program, data: st.DataObject) -> None:
    shift = data.draw(tensors(2, program["q"].numel()))
    solution = solve_qp(**{**program, "q": program["q"] + shift})
    for item in range(2):
        alone = solve_qp(**{**program, "q": program["q"] + shift[item]})
        torch.testing.assert_close(solution.primal[item], alone.primal, rtol=0, atol=1e-7)


@law(programs(singular=True), st.data())
def test_backward_through_a_convex_program_is_finite_and_linear(program: Program, data: st.DataObject) -> None:
    q = program["q"].clone().requires_grad_()
    x = solve_qp(**{**program, "q": q}).primal
    u, other = data.draw(tensors(*q.shape)), data.draw(tensors(*q.shape))
    one, two, both = (torch.autograd.grad(x, q, g, retain_graph=True)[0] for g in (u, other, 2.0 * u - other))
    assert bool(one.isfinite().all())
    torch.testing.assert_close(both, 2.0 * one - two, rtol=0, atol=1e-7)
    # Minus dx/dq is symmetric and positive semidefinite.
    torch.testing.assert_close((one * other).sum(), (two * u).sum(), rtol=0, atol=1e-7)
    assert float((one * u).sum()) <= 1e-7
