"""What docs/theory.md and docs/families.md state, tested: membership, the chain rule along paths, kinks, formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from hsbackend import operators
from hsbackend.polyhedron import Polyhedron, hs_jacobian, hs_jvp, project
from named_polyhedra import (
    BY_NAME,
    ENTRIES,
    Entry,
    Explicit,
    Params,
    Rows,
    active_rows,
    explicit,
    flatten,
    multipliers,
    projector,
)

# Forward mode makes torch import decompositions of its own, which still use what it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")

Choice = Literal["active", "support"]
CHOICES: tuple[Choice, ...] = ("active", "support")
NAMES = tuple(entry.name for entry in ENTRIES)
WITH_KINKS = tuple(entry.name for entry in ENTRIES if not entry.smooth)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from spreading small matrices over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(entry: Entry, seed: int, lattice: bool) -> tuple[Params, Tensor]:
    """Return parameters and a point."""
    rng = np.random.default_rng([seed, len(entry.name), lattice])
    params = entry.params(rng, lattice)
    v = rng.integers(-2, 3, size=entry.event).astype(float) if lattice else 1.5 * rng.normal(size=entry.event)
    return params, torch.tensor(v)


def located(entry: Entry, params: Params, v: Tensor) -> tuple[np.ndarray, np.ndarray, Explicit]:
    """Project, and find the active rows and their multipliers from scratch."""
    x = flatten(entry, project(v, entry.make(params))).numpy()
    point = flatten(entry, v).numpy()
    return point, x, explicit(entry.rows(params), point, x, None, 1e-9)


def force_of(normals: np.ndarray, equalities: int, force: np.ndarray) -> float:
    """Return what no multipliers on these rows can explain of a force."""
    return multipliers(normals, equalities, force)[1]


def assert_member(jacobian: np.ndarray, here: Explicit, force: np.ndarray) -> None:
    """Assert that a matrix is ``P_K`` for an admissible K: the largest candidate is the rows it annihilates."""
    annihilated = np.abs(here.active @ jacobian).max(axis=1, initial=0.0) < 1e-8
    assert annihilated[: here.equalities].all(), "an equation is not in K"
    normals = here.active[annihilated]
    np.testing.assert_allclose(jacobian, projector(normals), atol=1e-8, err_msg="not a projector on rows of a face")
    size = 1.0 + np.abs(force).max(initial=0.0)
    assert force_of(normals, here.equalities, force) <= 1e-9 * size, "K does not contain the support of a multiplier"


# ----------------------------------------------------------------------------------------------------------------------
# (a) Elements of the Han-Sun set
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lattice", [False, True], ids=["generic", "lattice"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_jacobian_is_the_projector_on_a_face(name: str, choice: Choice, lattice: bool) -> None:
    """Symmetric, idempotent, annihilates the normals of K; with "active" it is P_K of all active rows."""
    entry = BY_NAME[name]
    for seed in range(12):
        params, v = draw(entry, seed, lattice)
        jacobian = hs_jacobian(v, entry.make(params), jacobian=choice).numpy()
        point, x, here = located(entry, params, v)
        np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-10)
        np.testing.assert_allclose(jacobian @ jacobian, jacobian, atol=1e-10)
        assert_member(jacobian, here, point - x)
        if choice == "active":
            np.testing.assert_allclose(jacobian, projector(here.active), atol=1e-9)
            assert np.abs(here.active @ jacobian).max(initial=0.0) < 1e-9


def random_polyhedron(seed: int) -> tuple[Polyhedron, Rows, np.ndarray]:
    """Return a polyhedron with duplicated, scaled, summed and empty rows, and a point that projects on many of them."""
    rng = np.random.default_rng([seed, 31])
    n = int(rng.integers(2, 7))
    lattice = rng.random() < 0.6
    x = rng.integers(-2, 3, n).astype(float) if lattice else rng.normal(size=n)

    def normals(count: int) -> np.ndarray:
        return rng.integers(-1, 2, size=(count, n)).astype(float) if lattice else rng.normal(size=(count, n))

    G = normals(int(rng.integers(2, 2 * n)))
    G = np.concatenate([G, G[:1], 3.0 * G[1:2], G[:1] + G[-1:], np.zeros((1, n))])
    A = normals(1)
    A = np.concatenate([A, -2.0 * A]) if rng.random() < 0.5 else A
    slack = rng.choice([0.0, 0.0, 1.0], size=len(G))
    force = G.T @ np.where(slack == 0.0, rng.choice([0.0, 0.7], size=len(G)), 0.0) + A.T @ rng.normal(size=len(A))
    A_, b, G_, h = (torch.tensor(value) for value in (A, A @ x, G, G @ x + slack))
    return Polyhedron(A_, b, G_, h), Rows(torch.cat([A_, G_]), torch.cat([b, h]), len(A)), x + force


@pytest.mark.parametrize("choice", CHOICES)
def test_jacobian_of_polyhedra_with_dependent_rows(choice: Choice) -> None:
    """The same for random polyhedra whose rows are duplicated, scaled, sums of others, or empty."""
    degenerate = 0
    for seed in range(60):
        polyhedron, rows, v = random_polyhedron(seed)
        point = torch.tensor(v)
        x = project(point, polyhedron).numpy()
        here = explicit(rows, v, x, None, 1e-9)
        degenerate += here.degenerate
        jacobian = hs_jacobian(point, polyhedron, jacobian=choice).numpy()
        np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-9)
        np.testing.assert_allclose(jacobian @ jacobian, jacobian, atol=1e-9)
        assert_member(jacobian, here, v - x)
        if choice == "active":
            np.testing.assert_allclose(jacobian, projector(here.active), atol=1e-8)
    assert degenerate >= 10


@pytest.mark.parametrize("name", NAMES)
def test_active_is_below_support(name: str) -> None:
    """More rows, smaller null space: the difference of the two matrices is positive semidefinite."""
    entry = BY_NAME[name]
    differ = 0
    for seed in range(60):
        if differ == 3:
            return
        params, v = draw(entry, seed, True)
        few, many = (hs_jacobian(v, entry.make(params), jacobian=choice).numpy() for choice in CHOICES)
        assert np.linalg.eigvalsh(many - few).min() > -1e-9
        differ += np.abs(many - few).max() > 0.1
    assert differ > 0 or entry.smooth


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_jacobian_in_a_metric(name: str, choice: Choice) -> None:
    """``J J = J``, ``h J`` symmetric, ``N J = 0``, and J is that of the Euclidean problem in scaled coordinates."""
    entry = BY_NAME[name]
    for seed in range(4):
        params, v = draw(entry, seed, False)
        h = np.random.default_rng(seed).uniform(0.3, 3.0, size=entry.event)
        weight = torch.tensor(h)
        jacobian = hs_jacobian(v, entry.make(params), weight=weight, jacobian=choice).numpy()
        x = flatten(entry, project(v, entry.make(params), weight=weight)).numpy()
        here = explicit(entry.rows(params), flatten(entry, v).numpy(), x, h.ravel(), 1e-9)
        np.testing.assert_allclose(jacobian @ jacobian, jacobian, atol=1e-10)
        np.testing.assert_allclose(h.ravel()[:, None] * jacobian, (h.ravel()[:, None] * jacobian).T, atol=1e-10)
        np.testing.assert_allclose(jacobian, projector(here.active, h.ravel()), atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# (b) The chain rule along curves
# ----------------------------------------------------------------------------------------------------------------------


class Path:
    """A piecewise linear path of points and right-hand sides; matrices stay where they are."""

    def __init__(self, entry: Entry, corners: list[tuple[Params, Tensor]]) -> None:
        """Take the corners, all with the same matrices."""
        self.entry = entry
        self.fixed = {name: value for name, value in corners[0][0].items() if entry.degree[name] == 0}
        moving = [name for name in corners[0][0] if name not in self.fixed]
        self.corners = {name: torch.stack([params[name] for params, _ in corners]) for name in moving}
        self.corners["v"] = torch.stack([v for _, v in corners])

    def at(self, segment: Tensor, t: Tensor) -> tuple[Params, Tensor]:
        """Return parameters and points at ``t`` (T,) of segments (T,)."""
        found = {}
        for name, corners in self.corners.items():
            start, step = corners[segment], corners[segment + 1] - corners[segment]
            step = torch.where(start.isinf(), 0.0, step)
            found[name] = start + t.reshape(-1, *[1] * (start.dim() - 1)) * step
        v = found.pop("v")
        return {**found, **self.fixed}, v

    def tangent(self, segment: Tensor, t: Tensor, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, ``J gamma'`` and the mask of active rows."""

        def function(time: Tensor) -> Tensor:
            params, v = self.at(segment, time)
            return flatten(self.entry, project(v, self.entry.make(params), jacobian=choice))

        x, moved = torch.func.jvp(function, (t,), (torch.ones_like(t),))
        mask = active_rows(self.entry.rows(self.at(segment, t)[0]), x, 1e-9)
        return x, moved, mask


def random_path(entry: Entry, seed: int, lattice: bool, corners: int) -> Path:
    """Draw a path; where matrices are parameters the set moves by scaling and translation."""
    rng = np.random.default_rng([seed, 7, len(entry.name), lattice])
    first = entry.params(rng, lattice)
    matrices = any(entry.degree[name] == 0 for name in first)
    found: list[tuple[Params, Tensor]] = []
    for _ in range(corners):
        params = first
        if matrices:
            factor = float(rng.choice([0.5, 1.0, 2.0])) if lattice else float(rng.uniform(0.5, 2.0))
            shift = torch.tensor(rng.integers(-1, 2, entry.n).astype(float) if lattice else rng.normal(size=entry.n))
            params = translated(entry.scaled(first, factor), shift)
        else:
            params = entry.params(rng, lattice)
        v = rng.integers(-3, 4, size=entry.event).astype(float) if lattice else 3.0 * rng.normal(size=entry.event)
        found.append((params, torch.tensor(v)))
    return Path(entry, found)


def translated(params: Params, shift: Tensor) -> Params:
    """Move the set where its parameters can say so."""
    found = dict(params)
    for rows, right in (
        ("A", ("b",)),
        ("G", ("h",)),
        ("a", ("b",)),
        ("coefficients", ("equals", "at_most", "at_least")),
    ):
        for name in right:
            if rows in params and name in params:
                found[name] = params[name] + params[rows] @ shift
    for name in ("lower", "upper"):
        if name in params:
            found[name] = params[name] + shift
    return found if "weights" not in params else params


def integrate(path: Path, segments: int, choice: Choice) -> tuple[Tensor, int]:
    """Return the integral of ``J gamma'`` over every segment, and how many pieces were found.

    The points of a segment where the active rows and the Jacobian are two given things form an interval, because
    ``T_K`` of docs/theory.md is convex: equal at both ends means equal between. What is not equal is bisected.
    """
    segment = torch.arange(segments).repeat_interleave(16)
    left = torch.arange(16.0, dtype=torch.float64).repeat(segments) / 16.0
    right = left + 1.0 / 16.0
    total = torch.zeros(segments, path.entry.n, dtype=torch.float64)
    pieces = 0
    _, low, low_mask = path.tangent(segment, left, choice)
    _, high, high_mask = path.tangent(segment, right, choice)
    for _ in range(40):
        same = (low_mask == high_mask).all(-1) & ((low - high).abs().amax(-1) <= 1e-8 * (1.0 + low.abs().amax(-1)))
        total.index_add_(0, segment[same], (right - left)[same].unsqueeze(-1) * low[same])
        segment, left, right = segment[~same], left[~same], right[~same]
        low, high, low_mask, high_mask = low[~same], high[~same], low_mask[~same], high_mask[~same]
        if not len(segment):
            break
        pieces = max(pieces, len(segment))
        middle = 0.5 * (left + right)
        _, inner, inner_mask = path.tangent(segment, middle, choice)
        segment = torch.cat([segment, segment])
        left, right = torch.cat([left, middle]), torch.cat([middle, right])
        low, high = torch.cat([low, inner]), torch.cat([inner, high])
        low_mask, high_mask = torch.cat([low_mask, inner_mask]), torch.cat([inner_mask, high_mask])
    return total, pieces


@pytest.mark.parametrize("lattice", [False, True], ids=["generic", "lattice"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_chain_rule_along_paths(name: str, choice: Choice, lattice: bool) -> None:
    """The integral of ``J gamma'`` is the change of the projection, over every segment: point, radii, bounds, sums."""
    entry = BY_NAME[name]
    segments = 5
    path = random_path(entry, 3, lattice, segments + 1)
    total, pieces = integrate(path, segments, choice)
    ends = torch.arange(segments)
    start, _, _ = path.tangent(ends, torch.zeros(segments, dtype=torch.float64), choice)
    stop, _, _ = path.tangent(ends, torch.ones(segments, dtype=torch.float64), choice)
    size = 1.0 + float(path.corners["v"].abs().max())
    # The general solvers see a row as active within 1e-10 of its limit: that far a crossing may be off.
    tolerance = 1e-8 if entry.general else 1e-9
    np.testing.assert_allclose(total.numpy(), (stop - start).numpy(), atol=tolerance * size, rtol=0.0)
    assert pieces >= 2 or entry.smooth, "the path crosses hardly any face"


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", WITH_KINKS)
def test_chain_rule_inside_of_kinks(name: str, choice: Choice) -> None:
    """A path along which some active rows have no multiplier all the time: both choices still give its derivative."""
    entry = BY_NAME[name]
    tested = 0
    for seed in range(30):
        params, v = draw(entry, seed, False)
        rng = np.random.default_rng(seed)
        _, x, here = located(entry, params, v)
        rows = entry.rows(params)
        count = len(here.active) - here.equalities
        direction = projector(here.active) @ rng.normal(size=entry.n)
        if count == 0 or np.abs(direction).max() < 1e-6:
            continue
        # Half of the way to the next row, on the face; the force comes from some of the active rows, and grows.
        room = rows.d.numpy() - rows.N.numpy() @ x
        speed = rows.N.numpy() @ direction
        ahead = (speed > 1e-9) & np.isfinite(room) & (room > 1e-7)
        direction *= min(1.0, float((0.5 * room[ahead] / speed[ahead]).min(initial=1.0)))
        strong = rng.random(len(here.active)) < 0.5
        strong[here.equalities + int(rng.integers(count))] = False
        force, growth = (here.active.T @ (strong * rng.uniform(0.5, 1.0, len(strong))) for _ in range(2))
        for t in (0.0, 0.3, 0.8):
            point = torch.tensor(x + t * direction + force + t * growth).reshape(entry.event)
            tangent = torch.tensor(direction + growth).reshape(entry.event)
            moved = flatten(entry, hs_jvp(point, entry.make(params), tangent, jacobian=choice))
            np.testing.assert_allclose(moved.numpy(), direction, atol=1e-8)
        tested += 1
    assert tested >= 3


# ----------------------------------------------------------------------------------------------------------------------
# (c) Kinks: one-sided derivatives
# ----------------------------------------------------------------------------------------------------------------------


def one_sided(entry: Entry, params: Params, v: np.ndarray, x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return the derivative of the projection in a direction, exact: it is linear on a short enough step."""
    step = 1e-5
    moved = project(torch.tensor(v + step * d).reshape(entry.event), entry.make(params))
    return (flatten(entry, moved).numpy() - x) / step


def with_one_weak_row(entry: Entry, seed: int) -> tuple[Params, np.ndarray, np.ndarray] | None:
    """Return a point where one active inequality has no multiplier and multipliers are unique, None if not found."""
    params, v = draw(entry, seed, False)
    point, x, here = located(entry, params, v)
    if "l1_ball" in entry.name:
        return _weak_in_ball(params, point, x)
    equal = here.active[: here.equalities]
    count = len(here.active) - here.equalities
    rank = np.linalg.matrix_rank(here.active, 1e-9) - (np.linalg.matrix_rank(equal, 1e-9) if len(equal) else 0)
    if count == 0 or rank < count:
        return None
    z, _ = multipliers(here.active, here.equalities, point - x)
    weak = here.equalities + int(np.random.default_rng(seed).integers(count))
    z[weak] = 0.0
    return params, x + here.active.T @ z, x


def _weak_in_ball(params: Params, v: np.ndarray, x: np.ndarray) -> tuple[Params, np.ndarray, np.ndarray] | None:
    """The same for an l1 ball: a coordinate that just reaches zero."""
    zero, other = np.flatnonzero(x == 0.0), np.flatnonzero(x != 0.0)
    if not len(zero) or not len(other):
        return None
    c = params["weights"].numpy() if "weights" in params else np.ones(len(x))
    nu = (abs(v[other[0]]) - abs(x[other[0]])) / c[other[0]]
    if nu <= 1e-6:
        return None
    moved = v.copy()
    moved[zero[0]] = np.sign(v[zero[0]]) * nu * c[zero[0]]
    return params, moved, x


@pytest.mark.parametrize("name", WITH_KINKS)
def test_one_sided_derivatives_at_one_weakly_active_row(name: str) -> None:
    """There the limit set has two elements: every one-sided derivative is J_active d or J_support d, and both occur."""
    entry = BY_NAME[name]
    tested = 0
    for seed in range(40):
        found = with_one_weak_row(entry, seed)
        if found is None:
            continue
        params, v, x = found
        rng = np.random.default_rng(seed)
        few, many = (
            hs_jacobian(torch.tensor(v).reshape(entry.event), entry.make(params), jacobian=choice).numpy()
            for choice in CHOICES
        )
        assert np.linalg.matrix_rank(many, 1e-6) == np.linalg.matrix_rank(few, 1e-6) + 1
        occurred = set()
        for d in rng.normal(size=(4, entry.n)):
            for sign in (1.0, -1.0):
                quotient = one_sided(entry, params, v, x, sign * d)
                misses = [np.abs(quotient - sign * jacobian @ d).max() for jacobian in (few, many)]
                assert min(misses) < 1e-8, f"seed {seed}: {misses}"
                occurred.add(int(np.argmin(misses)))
        assert occurred == {0, 1}
        tested += 1
        if tested == 6:
            return
    assert tested >= 2


@pytest.mark.parametrize("name", WITH_KINKS)
def test_limit_set_at_several_weakly_active_rows(name: str) -> None:
    """Enumerate every admissible K: both choices are among the P_K, and so are all one-sided derivatives."""
    entry = BY_NAME[name]
    tested = 0
    for seed in range(200):
        params, v = draw(entry, seed, True)
        point, x, here = located(entry, params, v)
        inequalities = np.arange(here.equalities, len(here.active))
        if not here.degenerate or len(inequalities) > 8:
            continue
        size = 1.0 + np.abs(point).max()
        limit_set: list[np.ndarray] = []
        for count in range(len(inequalities) + 1):
            for chosen in combinations(inequalities, count):
                normals = here.active[[*range(here.equalities), *chosen]]
                if force_of(normals, here.equalities, point - x) <= 1e-9 * size:
                    limit_set.append(projector(normals))
        assert len(limit_set) >= 2
        for choice in CHOICES:
            jacobian = hs_jacobian(v, entry.make(params), jacobian=choice).numpy()
            assert min(np.abs(jacobian - element).max() for element in limit_set) < 1e-9, choice
        for d in np.random.default_rng(seed).normal(size=(6, entry.n)):
            quotient = one_sided(entry, params, point, x, d)
            assert min(np.abs(quotient - element @ d).max() for element in limit_set) < 1e-8
        tested += 1
        if tested == 4:
            return
    assert tested >= 2


# ----------------------------------------------------------------------------------------------------------------------
# (d) The formulas of docs/families.md, by number
# ----------------------------------------------------------------------------------------------------------------------


def gradients(
    make: Callable[..., Polyhedron], v: np.ndarray, weight: np.ndarray | None, g: np.ndarray, **params: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the projection and the gradients of ``g'x``, by name; "v" and "weight" among them."""
    leaves = {"v": v, "weight": weight, **params}
    tensors = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in leaves.items()
        if value is not None
    }
    x = project(tensors["v"], make(**{name: tensors[name] for name in params}), weight=tensors.get("weight"))
    found = torch.autograd.grad((torch.tensor(g) * x).sum(), list(tensors.values()), allow_unused=True)
    zeros = [
        np.zeros(tensor.shape) if value is None else value.numpy()
        for tensor, value in zip(tensors.values(), found, strict=True)
    ]
    return x.detach().numpy(), dict(zip(tensors, zeros, strict=True))


def sample(seed: int, n: int = 7) -> tuple[np.random.Generator, np.ndarray, np.ndarray, np.ndarray]:
    """Return a generator, a point, a weight and a cotangent."""
    rng = np.random.default_rng([seed, 99])
    return rng, 1.5 * rng.normal(size=n), rng.uniform(0.4, 2.0, size=n), rng.normal(size=n)


SEEDS = pytest.mark.parametrize("seed", range(6))
close = np.testing.assert_allclose
NEAR = {"atol": 1e-10, "rtol": 1e-9}


@SEEDS
def test_formulas_5_and_6_box(seed: int) -> None:
    _, v, weight, g = sample(seed)
    lower, upper = np.full(7, -0.6), np.full(7, 0.8)
    x, found = gradients(lambda lower, upper: Polyhedron.box(lower, upper), v, weight, g, lower=lower, upper=upper)
    close(x, np.clip(v, lower, upper), **NEAR)
    free = (x > lower) & (x < upper)
    close(found["v"], np.diag(free.astype(float)) @ g, **NEAR)
    close(found["lower"], np.where(x == lower, g, 0.0), **NEAR)
    close(found["upper"], np.where(x == upper, g, 0.0), **NEAR)
    x, found = gradients(lambda radius: Polyhedron.linf_ball(7, radius), v, None, g, radius=np.asarray(0.7))
    close(x, np.clip(v, -0.7, 0.7), **NEAR)
    close(found["radius"], g[x == 0.7].sum() - g[x == -0.7].sum(), **NEAR)


@SEEDS
@pytest.mark.parametrize("equation", [False, True], ids=["halfspace", "hyperplane"])
def test_formulas_7_to_9_one_row(seed: int, equation: bool) -> None:
    rng, v, h, g = sample(seed)
    a, b = rng.normal(size=7), np.asarray(rng.normal())
    make = Polyhedron.hyperplane if equation else Polyhedron.halfspace
    x, found = gradients(make, v, h, g, a=a, b=b)
    S = (a * a / h).sum()
    nu = (a @ v - b) / S
    active = equation or nu >= 0.0
    nu = nu if active else 0.0
    close(x, v - nu * a / h, **NEAR)
    jacobian = np.eye(7) - np.outer(a / h, a) / S * active
    polyhedron = make(torch.tensor(a), torch.tensor(b))
    close(hs_jacobian(torch.tensor(v), polyhedron, weight=torch.tensor(h)).numpy(), jacobian, **NEAR)
    w = (a * g / h).sum() / S * active
    u = (g - a * w) / h
    close(found["v"], h * u, **NEAR)
    close(found["weight"], u * (v - x), **NEAR)
    close(found["b"], w, **NEAR)
    close(found["a"], -(nu * u + w * x), **NEAR)


def bisect(phi: Callable[[float], float], target: float) -> float:
    """Return a root of a nonincreasing function."""
    low, high = -1e3, 1e3
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if phi(middle) > target else (low, middle)
    return 0.5 * (low + high)


@SEEDS
@pytest.mark.parametrize("side", ["equals", "at_most", "at_least", "slack"])
def test_formulas_10_to_14_budget(seed: int, side: str) -> None:
    rng, v, h, g = sample(seed)
    c = rng.normal(size=7)
    c[2] = 0.0
    lower, upper = np.full(7, -0.7), np.full(7, 0.9)
    level = c @ np.clip(v, lower, upper)
    middle = c @ rng.uniform(lower, upper)
    numbers = {
        "equals": {"equals": middle}, "at_most": {"at_most": level - 0.4}, "at_least": {"at_least": level + 0.4},
        "slack": {"at_most": level + 0.4, "at_least": level - 0.4},
    }[side]  # fmt: skip

    def make(**params: Tensor) -> Polyhedron:
        return Polyhedron.budget(7, params.pop("c"), **params)

    sides = {name: np.asarray(value) for name, value in numbers.items()}
    x, found = gradients(make, v, h, g, c=c, lower=lower, upper=upper, **sides)

    def x_of(tau: float) -> np.ndarray:
        return np.clip(v - tau * c / h, lower, upper)

    target = next(iter(numbers.values()))
    nu = 0.0 if side == "slack" else bisect(lambda tau: float(c @ x_of(tau)), float(target))
    assert {"equals": True, "at_most": nu > 0.0, "at_least": nu < 0.0, "slack": True}[side]
    close(x, x_of(nu), **NEAR)
    free = (x > lower) & (x < upper)
    F = np.diag(free.astype(float))
    S = (free * c * c / h).sum() if side != "slack" else np.inf
    jacobian = F - np.outer(F @ (c / h), F @ c) / S
    given = {name: torch.tensor(value) for name, value in {"lower": lower, "upper": upper, **numbers}.items()}
    polyhedron = Polyhedron.budget(7, torch.tensor(c), **given)
    close(hs_jacobian(torch.tensor(v), polyhedron, weight=torch.tensor(h)).numpy(), jacobian, **NEAR)
    w = (free * c * g / h).sum() / S
    u = free * (g - c * w) / h
    close(found["v"], h * u, **NEAR)
    close(found["weight"], u * (v - x), **NEAR)
    close(found["c"], -(nu * u + w * x), **NEAR)
    for name in numbers:
        close(found[name], w, **NEAR)
    close(found["lower"], np.where(x == lower, g - c * w, 0.0), **NEAR)
    close(found["upper"], np.where(x == upper, g - c * w, 0.0), **NEAR)


@SEEDS
def test_formulas_12_and_13_budget_kkt(seed: int) -> None:
    """The whole system (3), with right-hand sides of the row and of held coordinates."""
    rng, v, h, g = sample(seed)
    c, lower, upper = rng.normal(size=7), np.full(7, -0.7), np.full(7, 0.9)
    rhs = np.full(2, c @ rng.uniform(lower, upper))
    t, r = rng.normal(size=7), rng.normal()
    row = [torch.tensor(value).reshape(1, -1) for value in (v, h, c, rhs, lower, upper)]
    x, nu, face, _ = operators.solve("budget", *row, (7,), "active", True)
    u, w, beta = (
        value[0].numpy()
        for value in operators.kkt(
            "budget",
            face,
            x,
            row[1],
            row[2],
            torch.tensor(g)[None],
            torch.tensor([[r]], dtype=torch.float64),
            torch.tensor(t)[None],
            (7,),
        )
    )
    free = face[0, :7].numpy() == 0
    S = (c * c / h)[free].sum()
    close(w[0], ((c * g / h)[free].sum() + (c * t)[~free].sum() - r) / S, **NEAR)
    close(u, np.where(free, (g - c * w[0]) / h, t), **NEAR)
    close(beta, np.where(free, 0.0, g - h * t - c * w[0]), **NEAR)
    force = h * (x[0].numpy() - v) + c * float(nu)
    assert np.abs(force[free]).max(initial=0.0) < 1e-10  # (2)
    held = face[0, :7].numpy()
    assert (held * -force >= -1e-10).all()  # beta = -force: not negative at upper bounds, not positive at lower ones


@SEEDS
def test_simplex_formula(seed: int) -> None:
    """The case of (11) with a name of its own."""
    _, v, _, g = sample(seed)
    x, found = gradients(lambda radius: Polyhedron.simplex(7, radius), v, None, g, radius=np.asarray(1.3))
    s = (x > 0.0).astype(float)
    close(found["v"], (np.diag(s) - np.outer(s, s) / (s @ s)) @ g, **NEAR)
    close(found["radius"], s @ g / (s @ s), **NEAR)


def test_budget_at_a_vertex() -> None:
    """No free coordinate in the row: w = 0, the gradient goes to the bounds, and nu is nearest to zero."""
    v = torch.tensor([[3.0, 2.0, -4.0]], dtype=torch.float64)
    upper = torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64)
    rhs = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros_like(v)
    x, nu, face, _ = operators.solve("budget", v, None, None, rhs, zero, upper, (3,), "active", True)
    close(x[0].numpy(), [0.5, 0.5, 0.0])
    close(nu.numpy(), [[0.0]])  # any multiplier between -4 and 1.5 will do
    g = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    u, w, beta = operators.kkt("budget", face, x, None, None, g, None, None, (3,))
    close(u.numpy(), np.zeros((1, 3)))
    close(w.numpy(), [[0.0]])
    close(beta.numpy(), g.numpy())


@SEEDS
def test_formulas_15_to_18_l1_ball(seed: int) -> None:
    rng, v, h, g = sample(seed)
    c, r = rng.uniform(0.5, 2.0, size=7), np.asarray(2.0)
    x, found = gradients(lambda c, r: Polyhedron.weighted_l1_ball(c, r), v, h, g, c=c, r=r)

    def x_of(nu: float) -> np.ndarray:
        return np.sign(v) * np.maximum(np.abs(v) - nu * c / h, 0.0)

    assert c @ np.abs(v) > r
    nu = bisect(lambda tau: float(c @ np.abs(x_of(tau))), float(r))
    close(x, x_of(nu), **NEAR)
    s = np.sign(x)
    S = (c * c * s * s / h).sum()
    jacobian = np.diag(np.abs(s)) - np.outer(c * s / h, c * s) / S
    polyhedron = Polyhedron.weighted_l1_ball(torch.tensor(c), torch.tensor(r))
    close(hs_jacobian(torch.tensor(v), polyhedron, weight=torch.tensor(h)).numpy(), jacobian, **NEAR)
    w = (c * s * g / h).sum() / S
    u = np.abs(s) * (g - c * s * w) / h
    close(found["v"], h * u, **NEAR)
    close(found["weight"], u * (v - x), **NEAR)
    close(found["r"], w, **NEAR)
    close(found["c"], -s * (nu * u + w * x), **NEAR)


def test_l1_ball_at_its_tip_and_inside() -> None:
    v = torch.tensor([0.3, -0.2], dtype=torch.float64)
    close(hs_jacobian(v, Polyhedron.l1_ball(2, 1.0)).numpy(), np.eye(2))
    for choice in CHOICES:
        close(hs_jacobian(v, Polyhedron.l1_ball(2, 0.0), jacobian=choice).numpy(), np.zeros((2, 2)))
    on = torch.tensor([0.5, -0.5], dtype=torch.float64)
    close(hs_jacobian(on, Polyhedron.l1_ball(2, 1.0)).numpy(), [[0.5, 0.5], [0.5, 0.5]])
    close(hs_jacobian(on, Polyhedron.l1_ball(2, 1.0), jacobian="support").numpy(), np.eye(2))


@SEEDS
def test_formulas_19_to_22_monotone(seed: int) -> None:
    _, v, h, g = sample(seed)
    low, high = -0.5, 0.4
    x, found = gradients(
        lambda low, high: Polyhedron.monotone(7, lower=low, upper=high), v, h, g,
        low=np.asarray(low), high=np.asarray(high),
    )  # fmt: skip
    n = len(v)

    def mean(i: int, k: int) -> float:
        return (h * v)[i : k + 1].sum() / h[i : k + 1].sum()

    isotonic = np.array([max(min(mean(i, k) for k in range(j, n)) for i in range(j + 1)) for j in range(n)])
    close(x, np.clip(isotonic, low, high), **NEAR)

    jacobian, pulled = np.zeros((n, n)), np.zeros(n)
    z = np.zeros(n - 1)
    nu = {low: 0.0, high: 0.0}
    for value in np.unique(np.round(x, 12)):
        block = np.abs(x - value) < 1e-11
        held = next((bound for bound in nu if abs(value - bound) < 1e-11), None)
        if held is None:
            jacobian[np.ix_(block, block)] = h[block] / h[block].sum()
            pulled[block] = g[block].sum() / h[block].sum()
            sums = np.cumsum((h * (v - x))[block])
            z[np.flatnonzero(block)[:-1]] = sums[:-1]
        else:
            nu[held] = (h * (v - x))[block].sum()
    polyhedron = Polyhedron.monotone(n, lower=low, upper=high)
    close(hs_jacobian(torch.tensor(v), polyhedron, weight=torch.tensor(h)).numpy(), jacobian, **NEAR)
    close(found["v"], h * pulled, **NEAR)
    close(found["weight"], pulled * (v - x), **NEAR)
    close(found["low"], g[x == low].sum(), **NEAR)
    close(found["high"], g[x == high].sum(), **NEAR)
    assert (z >= -1e-12).all()
    assert nu[low] <= 0.0 <= nu[high]
    rhs = torch.tensor([[low, high]], dtype=torch.float64)
    rows = [torch.tensor(value)[None] for value in (v, h)]
    _, multiplier, _, _ = operators.solve("monotone", *rows, None, rhs, None, None, (n,), "active", True)
    close(multiplier[0].numpy(), [nu[low], nu[high]], **NEAR)


@SEEDS
def test_formulas_23_to_25_transport(seed: int) -> None:
    rng = np.random.default_rng([seed, 98])
    k1, k2 = 3, 4
    v, h, g = rng.normal(size=(k1, k2)), rng.uniform(0.4, 2.0, size=(k1, k2)), rng.normal(size=(k1, k2))
    plan = rng.exponential(size=(k1, k2))
    p, q = plan.sum(1), plan.sum(0)
    x, found = gradients(Polyhedron.transport, v, h, g, r=p, c=q)
    rhs = torch.tensor(np.concatenate([p, q]))[None]
    flat = [torch.tensor(value).reshape(1, -1) for value in (v, h)]
    _, nu, _, _ = operators.solve("transport", *flat, None, rhs, None, None, (k1, k2), "active", True)
    a, b = nu[0, :k1].numpy(), nu[0, k1:].numpy()
    close(a.sum(), b.sum(), **NEAR)
    close(x, np.maximum(v - (a[:, None] + b) / h, 0.0), **NEAR)
    free = x > 0.0

    def solve(G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        M = np.where(free, 1.0 / h, 0.0)
        matrix = np.block([[np.diag(M.sum(1)), M], [M.T, np.diag(M.sum(0))]])
        right = np.concatenate([(M * G).sum(1), (M * G).sum(0)])
        w = np.linalg.pinv(matrix, rcond=1e-11) @ right
        return M * (G - w[:k1, None] - w[k1:]), w

    U, w = solve(g)
    close(found["v"], h * U, **NEAR)
    close(found["weight"], U * (v - x), **NEAR)
    close(found["r"], w[:k1], **NEAR)
    close(found["c"], w[k1:], **NEAR)
    d = rng.normal(size=(k1, k2))
    polyhedron = Polyhedron.transport(torch.tensor(p), torch.tensor(q))
    moved = hs_jvp(torch.tensor(v), polyhedron, torch.tensor(d), weight=torch.tensor(h))
    close(moved.numpy(), solve(h * d)[0], **NEAR)


def test_marginals_of_components() -> None:
    """Where the support falls apart, the null vectors are (1, -1) of every component, and least norm is taken."""
    v = torch.eye(3, dtype=torch.float64) * 5.0
    r, c = (
        torch.ones(3, dtype=torch.float64, requires_grad=True),
        torch.ones(3, dtype=torch.float64, requires_grad=True),
    )
    x = project(v, Polyhedron.transport(r, c))
    close(x.detach().numpy(), np.eye(3))
    g = torch.tensor([[1.0, 9.0, 9.0], [9.0, 2.0, 9.0], [9.0, 9.0, 3.0]], dtype=torch.float64)
    d_r, d_c = torch.autograd.grad((g * x).sum(), (r, c))
    close(d_r.numpy(), [0.5, 1.0, 1.5], **NEAR)  # the pair (i, i) can only move both its sums: half of g_ii to each
    close(d_c.numpy(), [0.5, 1.0, 1.5], **NEAR)


@SEEDS
def test_formula_26_affine(seed: int) -> None:
    rng, v, h, _ = sample(seed)
    A = rng.normal(size=(2, 7))
    A = np.concatenate([A, A.sum(0, keepdims=True)])
    b = A @ rng.normal(size=7)
    wanted = v - (A.T / h[:, None]) @ np.linalg.pinv(A / h @ A.T, rcond=1e-11) @ (A @ v - b)
    found = project(torch.tensor(v), Polyhedron.affine(torch.tensor(A), torch.tensor(b)), weight=torch.tensor(h))
    close(found.numpy(), wanted, **NEAR)


@SEEDS
def test_formulas_27_to_29_box_with_rows(seed: int) -> None:
    rng, v, h, g = sample(seed)
    lower, upper = np.full(7, -0.7), np.full(7, 0.9)
    inside = rng.uniform(lower, upper)
    A, G = rng.normal(size=(1, 7)), rng.normal(size=(2, 7))
    b, d = A @ inside, G @ inside
    params = {"A": A, "b": b, "G": G, "h": d, "lower": lower, "upper": upper}
    x, found = gradients(Polyhedron, v, h, g, **params)
    on = d - G @ x < 1e-9
    N = np.concatenate([A, G[on]])
    free = (x > lower + 1e-12) & (x < upper - 1e-12)
    F, H = np.diag(free.astype(float)), np.diag(1.0 / h)
    gram = np.linalg.pinv(N @ F @ H @ N.T, rcond=1e-11)
    jacobian = F - F @ H @ N.T @ gram @ N @ F
    polyhedron = Polyhedron(**{name: torch.tensor(value) for name, value in params.items()})
    close(hs_jacobian(torch.tensor(v), polyhedron, weight=torch.tensor(h)).numpy(), jacobian, atol=1e-9)
    w = gram @ N @ F @ H @ g
    u = F @ H @ (g - N.T @ w)
    close(found["v"], h * u, atol=1e-9)
    close(np.concatenate([found["b"], found["h"][on]]), w, atol=1e-9)
    close(found["h"][~on], 0.0)
    rest = g - N.T @ w
    close(found["lower"], np.where(~free & (x < 0.0), rest, 0.0), atol=1e-9)
    close(found["upper"], np.where(~free & (x > 0.0), rest, 0.0), atol=1e-9)
    nu = np.linalg.lstsq(N[:, free].T, (h * (v - x))[free], rcond=None)[0]
    close(np.concatenate([found["A"], found["G"][on]]), -(np.outer(nu, u) + np.outer(w, x)), atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# Higher derivatives (docs/theory.md, section 8)
# ----------------------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("dependent", [False, True], ids=["independent", "dependent"])
def test_the_kkt_operator_is_closed_under_differentiation(seed: int, dependent: bool) -> None:
    """Formulas (5) and (6) of docs/theory.md against differences of a dense pseudo-inverse; dependent rows stay."""
    rng = np.random.default_rng([seed, 97])
    n = 5
    N, d_N = rng.normal(size=(2, 2, n))
    if dependent:
        N, d_N = np.concatenate([N, N[:1]]), np.zeros((3, n))
    root, d_root = rng.normal(size=(2, n, n))
    Q, d_Q = root @ root.T + np.eye(n), d_root + d_root.T
    r, d_r, g = rng.normal(size=(3, n + len(N)))

    def z(step: float) -> np.ndarray:
        rows = N + step * d_N
        matrix = np.block([[Q + step * d_Q, rows.T], [rows, np.zeros((len(N), len(N)))]])
        return np.linalg.pinv(matrix, rcond=1e-11) @ np.stack([r + step * d_r, g], axis=1)

    here, p = z(0.0).T
    d_M = np.block([[d_Q, d_N.T], [d_N, np.zeros((len(N), len(N)))]])
    M = np.block([[Q, N.T], [N, np.zeros((len(N), len(N)))]])
    tangent = np.linalg.pinv(M, rcond=1e-11) @ (d_r - d_M @ here)  # (5)
    close(tangent, (z(1e-6) - z(-1e-6))[:, 0] / 2e-6, atol=1e-5 * np.abs(here).max(), rtol=1e-6)
    close(g @ tangent, p @ d_r - np.sum(np.outer(p, here) * d_M), atol=1e-9, rtol=1e-9)  # (6)
    in_Q = -0.5 * (np.outer(p[:n], here[:n]) + np.outer(here[:n], p[:n]))
    in_N = -(np.outer(p[n:], here[:n]) + np.outer(here[n:], p[:n]))
    close(g @ tangent, p @ d_r + np.sum(in_Q * d_Q) + np.sum(in_N * d_N), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["simplex", "l1_ball", "transport", "monotone_bounded", "polyhedron_fixed"])
def test_second_derivatives_of_a_loss_are_those_of_the_face(name: str) -> None:
    """x is linear on a face, so the Hessian of L(x(v)) is ``J' L'' J``: nothing is missing, nothing added."""
    entry = BY_NAME[name]
    params, v = draw(entry, 5, False)
    rng = np.random.default_rng(5)
    curvature = torch.tensor(rng.normal(size=(entry.n, entry.n)))
    polyhedron = entry.make(params)

    def loss(point: Tensor) -> Tensor:
        x = project(point.reshape(entry.event), polyhedron).reshape(-1)
        return 0.5 * x @ curvature @ x

    jacobian = hs_jacobian(v, polyhedron)
    wanted = jacobian.T @ (0.5 * (curvature + curvature.T)) @ jacobian
    for hessian in (torch.func.hessian(loss)(v.reshape(-1)), torch.autograd.functional.hessian(loss, v.reshape(-1))):
        close(hessian.numpy(), wanted.numpy(), atol=1e-9)
