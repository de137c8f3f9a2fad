"""The l1 ball: against its twin, against sorting, at degenerate points, and item by item."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from hsbackend.families import l1, l1_naive
from hsbackend.families.family import Choice, FamilySolution
from hsbackend.status import Status, UnsupportedProblemError

INF = np.inf
CHOICES: tuple[Choice, ...] = ("active", "support")


def solve(
    point: Any, radius: Any, weight: Any = None, coefficients: Any = None, choice: Choice = "active"
) -> FamilySolution:
    """Project; lists are allowed, and one radius for all."""
    point = np.atleast_2d(np.asarray(point, dtype=None if hasattr(point, "dtype") else float))
    others = [
        None if value is None else np.atleast_2d(np.asarray(value, point.dtype)) for value in (weight, coefficients)
    ]
    rhs = np.asarray(radius, dtype=point.dtype).reshape(-1, 1)
    return l1.solve(point, *others, rhs, None, None, (point.shape[1],), choice)  # type: ignore[arg-type]


def tensors(*values: np.ndarray | None) -> list[Any]:
    """Return torch tensors of copies, None for None."""
    return [None if value is None else torch.tensor(value) for value in values]


def take(value: np.ndarray | None, b: int) -> np.ndarray | None:
    """Return the row of item b, keeping the axis."""
    return None if value is None else value[b : b + 1] if len(value) > 1 else value


def by_sorting(point: np.ndarray, radius: float) -> np.ndarray:
    """Project one point (Duchi and others 2008, figure 1)."""
    if np.abs(point).sum() <= radius:
        return point
    ordered = -np.sort(-np.abs(point))
    total = np.cumsum(ordered) - radius
    last = np.flatnonzero(ordered * np.arange(1, len(point) + 1) > total)[-1]
    return np.sign(point) * np.maximum(np.abs(point) - total[last] / (last + 1), 0.0)


def random_problem(seed: int, weight: str, coefficients: str, batch: int = 6) -> dict[str, Any]:
    """Return the arguments of ``solve`` but for the choice; points inside and outside of the ball."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    count = {"none": 0, "shared": 1, "batched": batch}
    h, c = (np.exp(rng.normal(size=(count[kind], n))) if kind != "none" else None for kind in (weight, coefficients))
    point = rng.normal(size=(batch, n))
    value = np.sum(np.abs(point) if c is None else c * np.abs(point), axis=1, keepdims=True)
    radius = value * rng.uniform(0.05, 1.3, size=(batch, 1))
    return {
        "point": point, "weight": h, "coefficients": c, "rhs": radius, "lower": None, "upper": None, "shape": (n,)
    }  # fmt: skip


def grid_problem(seed: int, batch: int = 6) -> dict[str, Any]:
    """Return a problem of small multiples of 1/2: zeros, ties, points on the sphere, radius zero."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    point = rng.integers(-3, 4, size=(batch, n)) / 2.0
    c = rng.choice([1.0, 2.0], size=(1, n)) if rng.random() < 0.5 else None
    radius = rng.integers(0, 5, size=(batch, 1)) / 2.0
    return {
        "point": point, "weight": None, "coefficients": c, "rhs": radius, "lower": None, "upper": None, "shape": (n,)
    }  # fmt: skip


def check_against_twin(problem: dict[str, Any], choice: Choice, relative: float, absolute: float) -> FamilySolution:
    """Compare solution and face, then the KKT solve on the face."""
    point, shape = problem["point"], problem["shape"]
    data = [problem[name] for name in ("point", "weight", "coefficients", "rhs")]
    found = l1.solve(**problem, choice=choice)
    wanted = l1_naive.solve(*tensors(*data), None, None, shape, choice)
    np.testing.assert_array_equal(found.status, wanted.status)
    np.testing.assert_allclose(found.primal, wanted.primal, rtol=relative, atol=absolute)
    np.testing.assert_allclose(found.multipliers, wanted.multipliers, rtol=10 * relative, atol=10 * absolute)
    np.testing.assert_array_equal(found.face, wanted.face)

    rng = np.random.default_rng(0)
    g, bound = (rng.normal(size=point.shape).astype(point.dtype) for _ in range(2))
    r = rng.normal(size=(len(point), 1)).astype(point.dtype)
    system = (found.face, found.primal, problem["weight"], problem["coefficients"], g, r, bound)
    fast = l1.kkt(*system, shape)
    slow = l1_naive.kkt(*tensors(*system), shape)
    np.testing.assert_allclose(fast.primal, slow.primal, rtol=100 * relative, atol=100 * absolute)
    np.testing.assert_allclose(fast.rows, slow.rows, rtol=100 * relative, atol=100 * absolute)
    np.testing.assert_allclose(fast.bounds, slow.bounds, rtol=100 * relative, atol=100 * absolute)
    return found


# The twin, and sorting


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("coefficients", ["none", "shared", "batched"])
@pytest.mark.parametrize("weight", ["none", "shared", "batched"])
@pytest.mark.parametrize("seed", range(4))
def test_twin(seed: int, weight: str, coefficients: str, choice: Choice) -> None:
    found = check_against_twin(random_problem(seed, weight, coefficients), choice, 1e-12, 1e-13)
    assert (found.status == Status.SOLVED).all()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["none", "shared"])
def test_twin_on_float32(kind: str, choice: Choice) -> None:
    problem = random_problem(11, kind, kind)
    for name, value in problem.items():
        problem[name] = value.astype(np.float32) if isinstance(value, np.ndarray) else value
    found = check_against_twin(problem, choice, 1e-6, 1e-6)
    assert found.primal.dtype == found.multipliers.dtype == np.float32


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("seed", range(60))
def test_twin_where_everything_is_tied(seed: int, choice: Choice) -> None:
    check_against_twin(grid_problem(seed), choice, 1e-14, 1e-14)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("n", [1, 2, 7, 63, 500])
def test_sorting(n: int, scale: float) -> None:
    point = np.random.default_rng(n).normal(size=(9, n)) * scale
    for radius in (0.3 * scale, 0.5 * n * scale):
        found = solve(point, radius)
        wanted = np.stack([by_sorting(v, radius) for v in point])
        np.testing.assert_allclose(found.primal, wanted, rtol=0, atol=1e-14 * n * scale)
        assert (np.abs(found.primal).sum(axis=1) <= radius * (1 + 1e-15 * n)).all()


@pytest.mark.parametrize("coefficients", [None, 2.0])
def test_exact_far_from_the_ball(coefficients: float | None) -> None:
    """Large entries of both signs that differ by ones, radius one, in rational arithmetic."""
    rng = np.random.default_rng(0)
    n = 12
    point = (1e9 + rng.normal(size=(10, n))) * rng.choice([-1.0, 1.0], size=(10, n))
    c = None if coefficients is None else np.full(n, coefficients)
    found = solve(point, 1.0, coefficients=c)
    radius = Fraction(1) / Fraction(coefficients or 1.0)
    for v, x in zip(point, found.primal, strict=True):
        ordered = sorted((abs(Fraction(float(t))) for t in v), reverse=True)
        taus = [(sum(ordered[: k + 1]) - radius) / (k + 1) for k in range(n)]
        tau = taus[max(k for k in range(n) if ordered[k] > taus[k])]
        for vj, xj in zip(v, x, strict=True):
            wanted = max(abs(Fraction(float(vj))) - tau, Fraction(0)) * (1 if vj > 0 else -1)
            assert abs(Fraction(float(xj)) - wanted) <= Fraction(1, 10**15)
        assert abs(sum(abs(Fraction(float(t))) for t in x) - radius) <= Fraction(1, 10**15)


# The face


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("seed", range(40))
def test_face_and_optimality(seed: int, choice: Choice) -> None:
    """``h(v - x) = nu c s`` on free coordinates, ``|h v| <= nu c`` on held ones."""
    for problem in (grid_problem(seed), random_problem(seed, "batched", "batched")):
        found = l1.solve(**problem, choice=choice)
        v, x, nu = problem["point"], found.primal, found.multipliers
        n = problem["shape"][0]
        h, c = (np.ones((1, n)) if problem[name] is None else problem[name] for name in ("weight", "coefficients"))
        sign, tight = found.face[:, :n], found.face[:, n:] != 0
        value = np.sum(c * np.abs(x), axis=1, keepdims=True)
        assert (value <= problem["rhs"] + 1e-13).all()
        assert (np.abs(value - problem["rhs"])[tight] <= 1e-13).all()
        assert (nu >= 0.0).all()
        assert (nu[~tight] == 0.0).all()
        np.testing.assert_array_equal(x[~tight[:, 0]], v[~tight[:, 0]])
        clear = np.abs(x) > 1e-14  # and not zero to rounding
        np.testing.assert_array_equal(np.sign(x)[clear], sign[clear])
        held = tight & (sign == 0)
        rest = h * (v - x)
        np.testing.assert_allclose(rest[~held], (nu * c * sign)[~held], rtol=0, atol=1e-12)
        assert not clear[held].any()
        assert (np.abs(rest) <= nu * c + 1e-12)[held].all()
        on_sphere = value >= problem["rhs"] - 1e-14
        if choice == "active":
            np.testing.assert_array_equal(tight, on_sphere)
            assert (sign[tight[:, 0]] != 0)[x[tight[:, 0]] == 0.0].sum() == 0
        else:
            np.testing.assert_array_equal(tight, nu > 0.0)
            assert (np.abs(rest) < nu * c)[held].all()


def test_choice_on_the_sphere() -> None:
    point = [0.5, -0.25, 0.0]
    active, support = (solve(point, 0.75, choice=choice) for choice in CHOICES)
    np.testing.assert_array_equal(active.primal, [point])
    np.testing.assert_array_equal(support.primal, [point])
    np.testing.assert_array_equal(active.face, [[1, -1, 0, 1]])
    np.testing.assert_array_equal(support.face, [[1, -1, 0, 0]])
    g = np.array([[1.0, 2.0, 3.0]])
    inside = l1.kkt(support.face, support.primal, None, None, g, np.ones((1, 1)), g, (3,))
    np.testing.assert_array_equal(inside.primal, g)
    np.testing.assert_array_equal(inside.bounds, 0.0)
    on_it = l1.kkt(active.face, active.primal, None, None, g, None, None, (3,))
    np.testing.assert_allclose(on_it.primal, [[1.5, 1.5, 0.0]])
    np.testing.assert_allclose(on_it.rows, [[-0.5]])
    np.testing.assert_allclose(on_it.bounds, [[0.0, 0.0, 3.0]])


def test_coordinate_that_just_reaches_zero() -> None:
    """tau = 1: the second coordinate is zero without a multiplier of its own, and keeps its sign under "support"."""
    for choice, sign in (("active", 0), ("support", -1)):
        found = solve([2.0, -1.0, 0.5], 1.0, choice=choice)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.primal, [[1.0, 0.0, 0.0]])
        np.testing.assert_array_equal(found.face, [[1, sign, 0, 1]])


def test_radius_zero() -> None:
    found = solve([[3.0, -1.0], [0.0, 0.0]], 0.0, weight=[2.0, 1.0], coefficients=[1.0, 4.0])
    np.testing.assert_array_equal(found.primal, 0.0)
    np.testing.assert_array_equal(found.multipliers, [[6.0], [0.0]])
    np.testing.assert_array_equal(found.face, [[0, 0, 1], [0, 0, 1]])
    kkt = l1.kkt(found.face, found.primal, None, None, np.ones((2, 2)), np.ones((2, 1)), None, (2,))
    np.testing.assert_array_equal(kkt.primal, 0.0)
    np.testing.assert_array_equal(kkt.rows, 0.0)


def test_infinite_radius() -> None:
    for weight in (None, [1.0, 2.0]):
        found = solve([3.0, -1.0], INF, weight)
        np.testing.assert_array_equal(found.primal, [[3.0, -1.0]])
        np.testing.assert_array_equal(found.face, [[1, -1, 0]])


@pytest.mark.parametrize("seed", range(5))
def test_projecting_twice_holds_the_same_coordinates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    point = rng.normal(size=(50, 30))
    for weight in (None, np.exp(rng.normal(size=30))):
        first = solve(point, 1.0, weight)
        second = solve(first.primal, 1.0, weight)
        np.testing.assert_allclose(second.primal, first.primal, rtol=0, atol=1e-15)
        np.testing.assert_array_equal(second.face, first.face)


# Failures, batches


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"point": [np.nan, 0.0]}, Status.INVALID_INPUT),
        ({"point": [INF, 0.0]}, Status.INVALID_INPUT),
        ({"point": [1.0, -INF]}, Status.INVALID_INPUT),
        ({"radius": [np.nan]}, Status.INVALID_INPUT),
        ({"radius": [-1.0]}, Status.INFEASIBLE),
        ({"radius": [-INF]}, Status.INFEASIBLE),
        ({"weight": [1.0, 0.0]}, Status.INVALID_INPUT),
        ({"weight": [1.0, np.nan]}, Status.INVALID_INPUT),
        ({"coefficients": [1.0, 0.0]}, Status.INVALID_INPUT),
        ({"coefficients": [1.0, -1.0]}, Status.INVALID_INPUT),
        ({"coefficients": [np.nan, 1.0]}, Status.INVALID_INPUT),
        ({"coefficients": [INF, 1.0]}, Status.INVALID_INPUT),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_failures_stay_with_their_item(changed: dict[str, list[float]], status: Status, plain: bool) -> None:
    """The neighbours of a failed item are bit for bit what they are alone."""
    base = {"point": [0.7, -0.9], "radius": [1.0], "weight": [1.0, 1.5], "coefficients": [1.0, 1.25]}
    if plain:
        base = {name: value for name, value in base.items() if name in ("point", "radius", *changed)}
    bad = base | changed
    batch = {name: np.array([base[name], bad[name], base[name]]) for name in base}
    found = solve(**batch)
    alone = solve(**{name: np.array([value]) for name, value in base.items()})
    np.testing.assert_array_equal(found.status, [Status.SOLVED, status, Status.SOLVED])
    assert np.isnan(found.primal[1]).all()
    assert np.isnan(found.multipliers[1]).all()
    np.testing.assert_array_equal(found.face[1], 0)
    for b in (0, 2):
        np.testing.assert_array_equal(found.primal[b], alone.primal[0])
        np.testing.assert_array_equal(found.multipliers[b], alone.multipliers[0])
        np.testing.assert_array_equal(found.face[b], alone.face[0])
    g = np.ones((3, 2))
    kkt = l1.kkt(found.face, found.primal, batch.get("weight"), batch.get("coefficients"), g, g[:, :1], g, (2,))
    assert all(np.isfinite(part).all() for part in (kkt.primal, kkt.rows, kkt.bounds))


def test_bounds_are_refused() -> None:
    point, bound = np.zeros((1, 2)), np.ones((1, 2))
    with pytest.raises(UnsupportedProblemError, match="pass None for `lower` and `upper`"):
        l1.solve(point, None, None, np.ones((1, 1)), None, bound, (2,), "active")
    with pytest.raises(UnsupportedProblemError, match="bounds were given"):
        l1.solve(point, None, None, np.ones((1, 1)), bound, None, (2,), "active")


@pytest.mark.parametrize("weight", [None, np.ones((1, 4)), np.ones((0, 4))])
def test_empty_batch(weight: np.ndarray | None) -> None:
    found = l1.solve(np.zeros((0, 4)), weight, None, np.ones((0, 1)), None, None, (4,), "active")
    assert found.primal.shape == (0, 4)
    assert found.face.shape == (0, 5)
    kkt = l1.kkt(found.face, found.primal, weight, None, np.zeros((0, 4)), None, None, (4,))
    assert kkt.primal.shape == kkt.bounds.shape == (0, 4)
    assert kkt.rows.shape == (0, 1)


def test_one_coordinate() -> None:
    found = solve([[5.0], [-5.0], [0.5], [0.0]], 1.0)
    np.testing.assert_array_equal(found.primal, [[1.0], [-1.0], [0.5], [0.0]])
    np.testing.assert_array_equal(found.multipliers, [[4.0], [4.0], [0.0], [0.0]])
    np.testing.assert_array_equal(found.face, [[1, 1], [-1, 1], [1, 0], [0, 0]])


@pytest.mark.parametrize("kind", ["none", "batched"])
def test_items_do_not_depend_on_the_batch(kind: str) -> None:
    problem = random_problem(5, kind, kind, batch=37)
    whole = l1.solve(**problem, choice="active")
    for b in range(37):
        item = {name: value if name == "shape" else take(value, b) for name, value in problem.items()}
        alone = l1.solve(**item, choice="active")  # type: ignore[arg-type]
        np.testing.assert_array_equal(alone.primal[0], whole.primal[b])
        np.testing.assert_array_equal(alone.face[0], whole.face[b])


def test_inputs_are_not_written() -> None:
    problem = random_problem(3, "batched", "shared")
    copies = {name: np.array(value) for name, value in problem.items() if isinstance(value, np.ndarray)}
    found = l1.solve(**problem, choice="active")
    l1.kkt(
        found.face, found.primal, problem["weight"], None, problem["point"], None, problem["point"], problem["shape"]
    )
    for name, copy in copies.items():
        np.testing.assert_array_equal(problem[name], copy)


# The KKT solve


@pytest.mark.parametrize("weight", ["none", "shared", "batched"])
@pytest.mark.parametrize("coefficients", ["none", "shared", "batched"])
@pytest.mark.parametrize("seed", range(3))
def test_kkt_is_symmetric_and_linear(seed: int, weight: str, coefficients: str) -> None:
    problem = random_problem(seed, weight, coefficients)
    found = l1.solve(**problem, choice="active")
    face = (found.face, found.primal, problem["weight"], problem["coefficients"])
    rng = np.random.default_rng(seed)
    n, tight = problem["shape"][0], found.face[:, -1:] != 0
    held = (found.face[:, :-1] == 0) & tight
    one, two = (
        (rng.normal(size=(6, n)), rng.normal(size=(6, 1)) * tight, rng.normal(size=(6, n)) * held) for _ in range(2)
    )

    def apply(g: np.ndarray, r: np.ndarray, bound: np.ndarray) -> np.ndarray:
        kkt = l1.kkt(*face, g, r, bound, (n,))
        return np.concatenate([kkt.primal, kkt.rows, kkt.bounds], axis=1)

    first, second = apply(*one), apply(*two)
    np.testing.assert_allclose(
        np.sum(np.concatenate(one, axis=1) * second, axis=1), np.sum(np.concatenate(two, axis=1) * first, axis=1),
        rtol=1e-11, atol=1e-11,
    )  # fmt: skip
    mixed = apply(*(2.0 * a - 3.0 * b for a, b in zip(one, two, strict=True)))
    np.testing.assert_allclose(mixed, 2.0 * first - 3.0 * second, rtol=1e-11, atol=1e-11)
    # Right-hand sides of what is not in the face are not looked at.
    noisy = l1.kkt(*face, one[0], np.where(tight, one[1], np.nan), np.where(held, one[2], np.nan), (n,))
    np.testing.assert_array_equal(np.concatenate([noisy.primal, noisy.rows, noisy.bounds], axis=1), first)


@pytest.mark.parametrize("seed", range(8))
def test_kkt_is_the_derivative_in_all_data(seed: int) -> None:
    """Against central differences of the solution in v, h, c and r at once."""
    problem = random_problem(seed, "batched", "batched")
    rng = np.random.default_rng(seed)
    tangents = {name: rng.normal(size=problem[name].shape) for name in ("point", "weight", "coefficients", "rhs")}
    found = l1.solve(**problem, choice="active")
    step = 1e-6
    ahead, behind = (
        l1.solve(**{k: v + s * tangents[k] if k in tangents else v for k, v in problem.items()}, choice="active")
        for s in (step, -step)
    )
    smooth = (found.face == ahead.face).all(axis=1) & (found.face == behind.face).all(axis=1)
    assert smooth.any()
    h, x, nu, sign = problem["weight"], found.primal, found.multipliers, np.sign(found.primal)
    kkt = l1.kkt(
        found.face, x, h, problem["coefficients"],
        h * tangents["point"] + tangents["weight"] * (problem["point"] - x) - tangents["coefficients"] * sign * nu,
        tangents["rhs"] - np.sum(tangents["coefficients"] * sign * x, axis=1, keepdims=True), None, problem["shape"],
    )  # fmt: skip
    slope = (ahead.primal - behind.primal) / (2 * step)
    np.testing.assert_allclose(kkt.primal[smooth], slope[smooth], rtol=1e-6, atol=1e-7)
    slope = (ahead.multipliers - behind.multipliers) / (2 * step)
    np.testing.assert_allclose(kkt.rows[smooth], slope[smooth], rtol=1e-6, atol=1e-6)
