"""The box with one row: against its twin, against rational arithmetic, at degenerate points, and item by item."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from hsbackend.families import budget, budget_naive
from hsbackend.families.family import Choice, FamilySolution
from hsbackend.status import Status

INF = np.inf
CHOICES: tuple[Choice, ...] = ("active", "support")


def tensors(*values: np.ndarray | None) -> list[Any]:
    """Return torch tensors of copies, None for None."""
    return [None if value is None else torch.tensor(value) for value in values]


def solve(
    point: Any, rhs: Any, lower: Any = None, upper: Any = None, weight: Any = None, coefficients: Any = None,
    choice: Choice = "active",
) -> FamilySolution:  # fmt: skip
    """Project, with what most tests leave out last and lists allowed."""
    point = np.atleast_2d(np.asarray(point, dtype=None if hasattr(point, "dtype") else float))
    others = [
        None if value is None else np.atleast_2d(np.asarray(value, dtype=point.dtype))
        for value in (weight, coefficients, rhs, lower, upper)
    ]
    return budget.solve(point, *others, (point.shape[1],), choice)  # type: ignore[arg-type]


def take(value: np.ndarray | None, b: int) -> np.ndarray | None:
    """Return the row of item b, keeping the axis."""
    return None if value is None else value[b : b + 1] if len(value) > 1 else value


def feasible_row(rng: np.random.Generator, kind: str, value: np.ndarray) -> np.ndarray:
    """Return low and high (B, 2) around the value (B,) of a feasible point."""
    below, above = rng.exponential(size=(2, len(value)))
    limits = {
        "equality": (value, value),
        "at most": (np.full_like(value, -INF), value),
        "at least": (value, np.full_like(value, INF)),
        "slab": (value - 0.1 * below, value + 0.1 * above),
        "slack": (value - 1e3, value + 1e3),
        "absent": (np.full_like(value, -INF), np.full_like(value, INF)),
    }[kind]
    return np.stack(limits, axis=1)


def random_bounds(rng: np.random.Generator, kind: str, size: tuple[int, int]) -> tuple[Any, Any]:
    """Return lower and upper, some infinite, some equal."""
    lower, upper = -rng.exponential(size=size), rng.exponential(size=size)
    if kind == "none":
        return None, None
    if kind == "simplex":
        return np.zeros((1, size[1])), None
    if kind == "capped":
        return np.zeros((1, size[1])), upper
    if kind == "mixed":
        lower[rng.random(size) < 0.3] = -INF
        upper[rng.random(size) < 0.3] = INF
        fixed = rng.random(size) < 0.2
        lower[fixed] = upper[fixed] = 0.25
    return lower, upper


def random_problem(seed: int, row: str, bounds: str, weight: str, coefficients: str, batch: int = 4) -> dict[str, Any]:
    """Return the arguments of ``solve`` but for the choice; "none", "shared" or "batched" weight and coefficients."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    count = {"none": 0, "shared": 1, "batched": batch}
    h = np.exp(rng.normal(size=(count[weight], n))) if weight != "none" else None
    c = rng.normal(size=(count[coefficients], n)) if coefficients != "none" else None
    if c is not None:
        c[rng.random(c.shape) < 0.2] = 0.0
    lower, upper = random_bounds(rng, bounds, (batch, n) if bounds == "mixed" else (1, n))
    inside = rng.normal(size=(batch, n))
    inside = np.clip(inside, -INF if lower is None else lower, INF if upper is None else upper)
    value = np.sum(inside if c is None else c * inside, axis=1)
    point = 2.0 * rng.normal(size=(batch, n))
    rhs = feasible_row(rng, row, value)
    return {
        "point": point, "weight": h, "coefficients": c, "rhs": rhs, "lower": lower, "upper": upper, "shape": (n,)
    }  # fmt: skip


def grid_problem(seed: int, batch: int = 6) -> dict[str, Any]:
    """Return a problem of small multiples of 1/2: ties everywhere."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 8))
    point = rng.integers(-3, 4, size=(batch, n)) / 2.0
    c = rng.choice([-1.0, 0.0, 1.0, 2.0], size=(1, n)) if rng.random() < 0.5 else None
    lower, upper = -rng.integers(0, 3, size=(batch, n)) / 2.0, rng.integers(0, 3, size=(batch, n)) / 2.0
    lower[rng.random(lower.shape) < 0.3] = -INF
    upper[rng.random(upper.shape) < 0.3] = INF
    if rng.random() < 0.3:
        lower, upper = np.zeros((1, n)), None
    inside = np.clip(rng.integers(-2, 3, size=(batch, n)) / 2.0, lower, INF if upper is None else upper)
    value = np.sum(inside if c is None else c * inside, axis=1)
    rhs = feasible_row(rng, rng.choice(["equality", "at most", "at least"]), value)
    return {
        "point": point, "weight": None, "coefficients": c, "rhs": rhs, "lower": lower, "upper": upper, "shape": (n,)
    }  # fmt: skip


def check_against_twin(problem: dict[str, Any], choice: Choice, relative: float, absolute: float) -> FamilySolution:
    """Compare solution and face, then the KKT solve on the face."""
    point, shape = problem["point"], problem["shape"]
    data = [problem[name] for name in ("point", "weight", "coefficients", "rhs", "lower", "upper")]
    found = budget.solve(**problem, choice=choice)
    wanted = budget_naive.solve(*tensors(*data), shape, choice)
    np.testing.assert_array_equal(found.status, wanted.status)
    np.testing.assert_allclose(found.primal, wanted.primal, rtol=relative, atol=absolute)
    np.testing.assert_allclose(found.multipliers, wanted.multipliers, rtol=10 * relative, atol=10 * absolute)
    np.testing.assert_array_equal(found.face, wanted.face)

    rng = np.random.default_rng(0)
    g, bound = (rng.normal(size=point.shape).astype(point.dtype) for _ in range(2))
    r = rng.normal(size=(len(point), 1)).astype(point.dtype)
    system = (found.face, found.primal, problem["weight"], problem["coefficients"], g, r, bound)
    fast = budget.kkt(*system, shape)
    slow = budget_naive.kkt(*tensors(*system), shape)
    np.testing.assert_allclose(fast.primal, slow.primal, rtol=100 * relative, atol=100 * absolute)
    np.testing.assert_allclose(fast.rows, slow.rows, rtol=100 * relative, atol=100 * absolute)
    np.testing.assert_allclose(fast.bounds, slow.bounds, rtol=100 * relative, atol=100 * absolute)
    return found


# The twin


@pytest.mark.parametrize("coefficients", ["none", "shared", "batched"])
@pytest.mark.parametrize("weight", ["none", "shared", "batched"])
@pytest.mark.parametrize("bounds", ["none", "simplex", "capped", "mixed"])
@pytest.mark.parametrize("row", ["equality", "at most", "at least", "slab", "slack", "absent"])
def test_twin(row: str, bounds: str, weight: str, coefficients: str) -> None:
    for seed in range(3):
        problem = random_problem(seed, row, bounds, weight, coefficients)
        for choice in CHOICES:
            found = check_against_twin(problem, choice, 1e-11, 1e-12)
            assert (found.status == Status.SOLVED).all()


@pytest.mark.parametrize("bounds", ["none", "simplex", "capped", "mixed"])
@pytest.mark.parametrize("row", ["equality", "at most", "at least", "slab", "slack", "absent"])
def test_twin_on_float32(row: str, bounds: str) -> None:
    """Data are rounded once and computed with in double, so the twin differs by the last store only."""
    for seed in range(20, 24):
        problem = random_problem(seed, row, bounds, "shared", "batched")
        for name, value in problem.items():
            problem[name] = value.astype(np.float32) if isinstance(value, np.ndarray) else value
        for choice in CHOICES:
            found = check_against_twin(problem, choice, 1e-6, 1e-6)
            assert found.primal.dtype == found.multipliers.dtype == np.float32
            kkt = budget.kkt(
                found.face, found.primal, None, None, problem["point"], None, None, problem["shape"]
            )  # fmt: skip
            assert kkt.primal.dtype == kkt.rows.dtype == kkt.bounds.dtype == np.float32


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("seed", range(60))
def test_twin_where_everything_is_tied(seed: int, choice: Choice) -> None:
    check_against_twin(grid_problem(seed), choice, 1e-13, 1e-13)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1000, 2000))
def test_twin_at_length(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row = str(rng.choice(["equality", "at most", "at least", "slab", "slack", "absent"]))
    bounds = str(rng.choice(["none", "simplex", "capped", "mixed"]))
    weight, coefficients = (str(rng.choice(["none", "shared", "batched"])) for _ in range(2))
    for choice in CHOICES:
        check_against_twin(random_problem(seed, row, bounds, weight, coefficients), choice, 1e-10, 1e-11)
        check_against_twin(grid_problem(seed), choice, 1e-13, 1e-13)


# Rational arithmetic


def exact(v: Any, h: Any, c: Any, lower: Any, upper: Any, target: float) -> tuple[list[Fraction], Fraction]:
    """Return x and tau of the problem with ``c'x = target``, in rational arithmetic on the given doubles."""
    v, h, c = ([Fraction(float(t)) for t in value] for value in (v, h, c))
    box = [
        (None if np.isinf(a) else Fraction(float(a)), None if np.isinf(b) else Fraction(float(b)))
        for a, b in zip(lower, upper, strict=True)
    ]

    def primal(tau: Fraction) -> list[Fraction]:
        x = []
        for vj, hj, cj, (a, b) in zip(v, h, c, box, strict=True):
            t = vj - tau * cj / hj
            t = t if a is None else max(t, a)
            x.append(t if b is None else min(t, b))
        return x

    def row(tau: Fraction) -> Fraction:
        return sum((cj * xj for cj, xj in zip(c, primal(tau), strict=True)), Fraction(0)) - Fraction(target)

    edges = {
        (vj - bound) * hj / cj
        for vj, hj, cj, bounds in zip(v, h, c, box, strict=True)
        for bound in bounds
        if bound is not None and cj != 0
    }
    edges = sorted(edges) or [Fraction(0)]
    edges = [edges[0] - 1, *edges, edges[-1] + 1]
    first, last = 0, len(edges) - 1  # the residual is nonincreasing: halve the list
    while last - first > 1:
        middle = (first + last) // 2
        if row(edges[middle]) > 0:
            first = middle
        else:
            last = middle
    begin, end = row(edges[first]), row(edges[last])
    tau = edges[last] if begin == end else edges[first] + begin * (edges[last] - edges[first]) / (begin - end)
    return primal(tau), tau


def error(x: np.ndarray, wanted: list[Fraction]) -> float:
    """Return the largest difference, without rounding."""
    return float(max(abs(Fraction(float(a)) - b) for a, b in zip(x, wanted, strict=True)))


def row_error(x: np.ndarray, c: np.ndarray, target: float) -> float:
    """Return ``|c'x - target|``, without rounding."""
    value = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, c, strict=True)), Fraction(0))
    return float(abs(value - Fraction(target)))


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e9])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_simplex_is_exact_far_from_the_origin(n: int, offset: float) -> None:
    rng = np.random.default_rng(n)
    point = offset + rng.normal(size=(20, n))
    found = solve(point, [1.0, 1.0], lower=np.zeros(n))
    for v, x, nu in zip(point, found.primal, found.multipliers[:, 0], strict=True):
        wanted, tau = exact(v, np.ones(n), np.ones(n), np.zeros(n), np.full(n, INF), 1.0)
        assert error(x, wanted) <= 1e-15
        assert row_error(x, np.ones(n), 1.0) <= 1e-15
        assert abs(nu - float(tau)) <= 1e-15 * max(1.0, abs(offset))


@pytest.mark.parametrize("scale", [1.0, 1e9, 1e-9])
@pytest.mark.parametrize("offset", [0.0, 1e9, -1e9])
@pytest.mark.parametrize("seed", range(12))
def test_general_budget_is_exact_at_every_scale(seed: int, offset: float, scale: float) -> None:
    """Everything multiplied by the scale, then the point moved along c/h, which moves tau and leaves x alone."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 25))
    c, h = rng.normal(size=n), np.exp(rng.normal(size=n))
    lower, upper = -rng.exponential(size=n) * scale, rng.exponential(size=n) * scale
    lower[rng.random(n) < 0.3] = -INF
    upper[rng.random(n) < 0.3] = INF
    target = float(c @ np.clip(rng.normal(size=n) * scale, lower, upper))
    point = rng.normal(size=n) * scale + offset * c / h
    found = solve(point, [target, target], lower, upper, h, c)
    assert found.status[0] == Status.SOLVED
    wanted, tau = exact(point, h, c, lower, upper, target)
    size = max(float(abs(x)) for x in wanted)
    assert error(found.primal[0], wanted) <= 1e-13 * size
    assert row_error(found.primal[0], c, target) <= 1e-14 * (abs(c) @ abs(found.primal[0]) + abs(target))
    if (found.face[0, :n] == 0).any():
        assert abs(found.multipliers[0, 0] - float(tau)) <= 1e-13 * (abs(float(tau)) + size)


@pytest.mark.parametrize("seed", range(20))
def test_weights_and_coefficients_of_twelve_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 25))
    h, c = 10.0 ** rng.uniform(-6, 6, size=n), 10.0 ** rng.uniform(-6, 6, size=n) * rng.choice([-1.0, 1.0], size=n)
    point, upper = rng.normal(size=n), rng.exponential(size=n)
    target = float(c @ (rng.random(n) * upper))
    found = solve(point, [target, target], np.zeros(n), upper, h, c)
    wanted, _tau = exact(point, h, c, np.zeros(n), upper, target)
    assert error(found.primal[0], wanted) <= 1e-14
    assert row_error(found.primal[0], c, target) <= 1e-14 * (abs(c) @ found.primal[0] + abs(target))


def staircase(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps far apart: between them the row does not change, and Newton's method has no slope."""
    return 100.0 * rng.normal(size=n), np.full(n, 1.1 / n), 1.0


def masked(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Entries ruled out by a large negative number."""
    return np.where(rng.random(n) < 0.5, -1e30, rng.normal(size=n)), np.full(n, 4.0 / n), 1.0


def geometric(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Distances over many orders: sets of free coordinates that shrink one by one."""
    return -np.exp2(-30.0 * np.arange(n) / n), np.full(n, INF), 1.0


def heavy(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Outliers on both sides, and the largest entries wanted."""
    return 10.0 * rng.standard_cauchy(size=n), np.ones(n), 0.25 * n


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("problem", [staircase, masked, geometric, heavy])
@pytest.mark.parametrize("n", [10, 64, 200])
def test_hard_searches(n: int, problem: Any, weighted: bool) -> None:
    rng = np.random.default_rng(n)
    point, upper, target = problem(rng, n)
    h = np.exp(3.0 * rng.normal(size=n)) if weighted else None
    found = solve(point, [target, target], np.zeros(n), upper, h)
    assert found.status[0] == Status.SOLVED
    wanted, _tau = exact(point, np.ones(n) if h is None else h, np.ones(n), np.zeros(n), upper, target)
    assert error(found.primal[0], wanted) <= 1e-13 * target
    assert row_error(found.primal[0], np.ones(n), target) <= 1e-14 * target


def test_large_problem() -> None:
    """Sums of 100,000 terms; the second item has them all equal, which makes rounding errors add up."""
    n = 100_000
    point = np.stack([np.random.default_rng(0).normal(size=n), np.full(n, 0.1)])
    for upper in (None, np.full(n, 0.3)):
        found = solve(point, [1.0, 1.0], np.zeros(n), upper)
        for x in found.primal:
            assert row_error(x, np.ones(n), 1.0) <= 1e-12
        np.testing.assert_allclose(found.primal[1], 1.0 / n, rtol=1e-12)


# The face


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("seed", range(60))
def test_face_lies_between_the_multipliers_and_the_active_rows(seed: int, choice: Choice) -> None:
    """``supp(multiplier) <= K <= active``, with multipliers that satisfy the KKT conditions."""
    problems = [grid_problem(seed), random_problem(seed, "slab", "mixed", "shared", "shared")]
    for problem in problems:
        found = budget.solve(**problem, choice=choice)
        for b, status in enumerate(found.status):
            if status != Status.SOLVED:
                continue
            v, x, n = problem["point"][b], found.primal[b], problem["shape"][0]
            defaults = {"weight": 1.0, "coefficients": 1.0, "lower": -INF, "upper": INF}
            h, c, lower, upper = (
                np.full(n, default) if problem[name] is None else take(problem[name], b)[0]  # type: ignore[index]
                for name, default in defaults.items()
            )
            low, high = problem["rhs"][b]
            nu, held, row = found.multipliers[b, 0], found.face[b, :n], found.face[b, n]
            z = h * (v - x) - c * nu  # of the bounds: positive at the upper one
            noise = 1e-13 * (1.0 + h * abs(v) + abs(c * nu))
            assert (x[held == 1] >= upper[held == 1] - 1e-14).all()
            assert (x[held == -1] <= lower[held == -1] + 1e-14).all()
            assert (abs(z[held == 0]) <= noise[held == 0]).all()
            free_sign = lower == upper
            assert (z[(held == 1) & ~free_sign] >= -noise[(held == 1) & ~free_sign]).all()
            assert (z[held == -1] <= noise[held == -1]).all()
            at_bound = (x == lower) | (x == upper)
            if choice == "active":
                assert (held[at_bound] != 0).all()
            else:
                assert (abs(z[(held != 0) & ~free_sign]) > 0.0).all()
            value = c @ x
            assert low - 1e-13 <= value <= high + 1e-13
            if low == high:
                assert row == (1 if nu >= 0 else -1) or abs(nu) <= 1e-14
            elif row == 0:
                assert nu == 0.0
                assert choice == "support" or low < value < high
            else:
                assert abs(value - (high if row == 1 else low)) <= 1e-13
                assert row * nu >= 0.0
                assert choice == "active" or nu != 0.0


def test_choice_at_a_point_of_the_set() -> None:
    """The example of docs/theory.md: the third bound is active without a multiplier."""
    point = [0.5, 0.5, 0.0]
    active = solve(point, [1.0, 1.0], np.zeros(3), choice="active")
    support = solve(point, [1.0, 1.0], np.zeros(3), choice="support")
    np.testing.assert_array_equal(active.face, [[0, 0, -1, 1]])
    np.testing.assert_array_equal(support.face, [[0, 0, 0, 1]])
    g = np.array([[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        budget.kkt(active.face, active.primal, None, None, g, None, None, (3,)).primal, [[0.5, -0.5, 0.0]]
    )  # fmt: skip
    np.testing.assert_allclose(
        budget.kkt(support.face, support.primal, None, None, g, None, None, (3,)).primal, [[2 / 3, -1 / 3, -1 / 3]]
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_projecting_twice_holds_the_same_coordinates(seed: int) -> None:
    """Where the sum of the first projection is off by a rounding, the second has a multiplier of that size."""
    rng = np.random.default_rng(seed)
    n = 30
    point, upper = rng.normal(size=(50, n)), np.full(n, 0.3)
    for weight in (None, np.exp(rng.normal(size=n))):
        for cap in (None, upper):
            first = solve(point, [1.0, 1.0], np.zeros(n), cap, weight)
            second = solve(first.primal, [1.0, 1.0], np.zeros(n), cap, weight)
            np.testing.assert_allclose(second.primal, first.primal, rtol=0, atol=1e-15)
            np.testing.assert_array_equal(second.face[:, :n], first.face[:, :n])


def test_row_that_is_just_active() -> None:
    point = [[0.25, 0.75], [-0.25, 0.25], [0.5, 0.25]]
    rhs = [-0.5, 1.0]
    np.testing.assert_array_equal(solve(point, rhs).face[:, 2], [1, 0, 0])
    np.testing.assert_array_equal(solve(point, rhs, choice="support").face[:, 2], [0, 0, 0])
    np.testing.assert_array_equal(solve(point, [0.0, 1.0]).face[:, 2], [1, -1, 0])
    # Violated by a rounding: corrected, and a row only for "active".
    nearly = solve(np.array([[0.1] * 3]) + 2e-16, [-INF, 0.30000000000000004], choice="support")
    assert nearly.face[0, 3] == 0
    assert nearly.multipliers[0, 0] == 0.0


@pytest.mark.parametrize(
    ("point", "rhs", "lower", "upper", "nu"),
    [
        ([3.0, -3.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], 0.0),  # any nu in [-3, 2]
        ([3.0, 2.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], 2.0),  # x = (1, 0), any nu in [2, 2]
        ([5.0, 2.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], 2.0),  # [2, 4]
        ([-2.0, -5.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], -3.0),  # [-5, -3]
        ([3.0, 2.0], [0.0, 0.0], [0.0, 0.0], None, 3.0),  # [3, inf)
        ([-3.0, -2.0], [0.0, 0.0], [0.0, 0.0], None, 0.0),  # [-2, inf)
        ([3.0, 2.0], [-INF, 0.0], [0.0, 0.0], None, 3.0),
        ([0.1, 0.2], [2.0, 2.0], [0.0, 0.0], [1.0, 1.0], -0.9),  # (-inf, -0.9]
        ([4.0, 7.0], [3.0, 3.0], [1.0, 2.0], [1.0, 2.0], 0.0),  # one point only
    ],
)
@pytest.mark.parametrize("choice", CHOICES)
def test_vertices(point: Any, rhs: Any, lower: Any, upper: Any, nu: float, choice: Choice) -> None:
    """The multiplier nearest to zero; no free coordinate under "active", and then u = 0 and w = 0."""
    found = solve(point, rhs, lower, upper, choice=choice)
    assert found.multipliers[0, 0] == pytest.approx(nu, abs=1e-14)
    assert found.face[0, 2] == (-1 if nu < 0 else 1)
    if choice == "active":
        assert (found.face[0, :2] != 0).all()
        kkt = budget.kkt(found.face, found.primal, None, None, np.ones((1, 2)), np.ones((1, 1)), None, (2,))
        np.testing.assert_array_equal(kkt.primal, [[0.0, 0.0]])
        np.testing.assert_array_equal(kkt.rows, [[0.0]])
        np.testing.assert_array_equal(kkt.bounds, [[1.0, 1.0]])


def test_fixed_coordinates_count_as_held_at_upper() -> None:
    for choice in CHOICES:
        found = solve([0.0, 5.0, -5.0], [2.0, 2.0], [0.5, -INF, 0.0], [0.5, INF, 0.0], choice=choice)
        np.testing.assert_array_equal(found.face, [[1, 0, 1, 1]])
        np.testing.assert_allclose(found.primal, [[0.5, 1.5, 0.0]])


def test_coordinates_outside_the_row() -> None:
    """With c_j = 0 a coordinate is clipped and nothing else; with c = 0 the row is a condition on nothing."""
    found = solve([2.0, -3.0, 0.3], [0.5, 0.5], [-1.0, -1.0, 0.0], [1.0, 1.0, 1.0], coefficients=[0.0, 0.0, 2.0])
    np.testing.assert_allclose(found.primal, [[1.0, -1.0, 0.25]], rtol=1e-15)
    empty = solve([2.0, -3.0], [[0.0, 0.0], [1.0, 1.0]], coefficients=[0.0, 0.0], lower=None)
    assert empty.status[0] == Status.SOLVED
    both = solve([[2.0, -3.0]] * 2, [[0.0, 0.0], [1.0, 1.0]], coefficients=[0.0, 0.0])
    np.testing.assert_array_equal(both.status, [Status.SOLVED, Status.INFEASIBLE])
    np.testing.assert_array_equal(both.primal[0], [2.0, -3.0])


# Infinite entries, failures, batches


def test_minus_infinity_on_the_simplex() -> None:
    point = np.array([[0.3, -INF, 0.1, -INF, 2.0], [-INF, -INF, -INF, 0.0, -INF], [0.3, 0.2, 0.1, -INF, -INF]])
    for choice in CHOICES:
        for weight in (None, np.ones(5)):
            found = solve(point, [1.0, 1.0], np.zeros(5), weight=weight, choice=choice)
            assert (found.status == Status.SOLVED).all()
            for v, x, face in zip(point, found.primal, found.face, strict=True):
                kept = np.isfinite(v)
                alone = solve(v[kept], [1.0, 1.0], np.zeros(kept.sum()), choice=choice)
                np.testing.assert_allclose(x[kept], alone.primal[0], rtol=0, atol=1e-15)
                np.testing.assert_array_equal(x[~kept], 0.0)
                np.testing.assert_array_equal(face[:5][~kept], -1)
                np.testing.assert_array_equal(face[:5][kept], alone.face[0, :-1])


def test_infinite_entries_elsewhere() -> None:
    found = solve([[INF, 0.0, 0.1], [-INF, 0.0, 0.1]], [1.0, 1.0], [-1.0, -INF, 0.0], [0.5, INF, INF])
    np.testing.assert_allclose(found.primal, [[0.5, 0.2, 0.3], [-1.0, 0.95, 1.05]], rtol=1e-15)
    np.testing.assert_array_equal(found.face[:, 0], [1, -1])
    no_room = solve([[-INF, -INF]], [1.0, 1.0], [0.0, 0.0])
    assert no_room.status[0] == Status.INFEASIBLE
    np.testing.assert_array_equal(
        solve([[INF, 0.0], [0.0, -INF]], [1.0, 1.0], [0.0, -INF]).status, [Status.INVALID_INPUT] * 2
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"point": [np.nan, 0.0]}, Status.INVALID_INPUT),
        ({"rhs": [np.nan, 1.0]}, Status.INVALID_INPUT),
        ({"rhs": [1.0, np.nan]}, Status.INVALID_INPUT),
        ({"lower": [np.nan, 0.0]}, Status.INVALID_INPUT),
        ({"upper": [1.0, np.nan]}, Status.INVALID_INPUT),
        ({"weight": [1.0, 0.0]}, Status.INVALID_INPUT),
        ({"weight": [1.0, -1.0]}, Status.INVALID_INPUT),
        ({"weight": [1.0, np.nan]}, Status.INVALID_INPUT),
        ({"weight": [1.0, INF]}, Status.INVALID_INPUT),
        ({"coefficients": [1.0, np.nan]}, Status.INVALID_INPUT),
        ({"coefficients": [1.0, INF]}, Status.INVALID_INPUT),
        ({"lower": [0.0, INF]}, Status.INVALID_INPUT),
        ({"upper": [-INF, 1.0]}, Status.INVALID_INPUT),
        ({"lower": [0.0, 2.0], "upper": [1.0, 1.0]}, Status.INFEASIBLE),
        ({"rhs": [-2.0, -1.0]}, Status.INFEASIBLE),
        ({"rhs": [5.0, INF]}, Status.INFEASIBLE),
        ({"rhs": [1.0, 0.5]}, Status.INFEASIBLE),
        ({"rhs": [INF, INF]}, Status.INFEASIBLE),
        ({"rhs": [-INF, -INF]}, Status.INFEASIBLE),
    ],
)
def test_failures_stay_with_their_item(changed: dict[str, list[float]], status: Status) -> None:
    """The neighbours of a failed item are bit for bit what they are alone."""
    base = {
        "point": [0.7, 0.9], "rhs": [1.0, 1.0], "lower": [0.0, 0.0], "upper": [1.0, 2.0], "weight": [1.0, 1.5],
        "coefficients": [1.0, 1.25],
    }  # fmt: skip
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
    kkt = budget.kkt(found.face, found.primal, batch["weight"], batch["coefficients"], g, g[:, :1], g, (2,))
    wanted = budget.kkt(
        alone.face, alone.primal, batch["weight"][:1], batch["coefficients"][:1], g[:1], g[:1, :1], g[:1], (2,)
    )  # fmt: skip
    assert all(np.isfinite(part).all() for part in (kkt.primal, kkt.rows, kkt.bounds))
    np.testing.assert_array_equal(kkt.primal[[0, 2]], wanted.primal[[0, 0]])
    np.testing.assert_array_equal(kkt.bounds[[0, 2]], wanted.bounds[[0, 0]])


def test_failures_on_the_simplex() -> None:
    point = np.array([[0.7, 0.9], [np.nan, 0.0], [0.1, INF], [0.7, 0.9], [0.1, 0.1]])
    rhs = np.array([[1.0, 1.0]] * 4 + [[-1.0, -1.0]])
    found = solve(point, rhs, np.zeros((1, 2)))
    invalid = Status.INVALID_INPUT
    np.testing.assert_array_equal(found.status, [Status.SOLVED, invalid, invalid, Status.SOLVED, Status.INFEASIBLE])
    np.testing.assert_array_equal(found.primal[3], found.primal[0])
    np.testing.assert_allclose(found.primal[0], [0.4, 0.6], rtol=1e-15)
    assert np.isnan(found.primal[[1, 2, 4]]).all()


@pytest.mark.parametrize(("dtype", "gap"), [(np.float64, 1e-10), (np.float32, 1e-6)])
def test_rounding_does_not_make_a_problem_infeasible(dtype: Any, gap: float) -> None:
    """Ten times 0.1 is the only point with sum one."""
    tenth, zero = np.full((1, 10), 0.1, dtype), np.zeros((1, 10), dtype)
    point = np.random.default_rng(0).normal(size=(4, 10)).astype(dtype)
    for rhs in ([1.0 + gap, 1.0 + gap], [1.0 + gap, INF]):
        found = solve(point, rhs, zero, tenth)
        assert (found.status == Status.SOLVED).all()
        np.testing.assert_array_equal(found.primal, np.repeat(tenth, 4, axis=0))
        np.testing.assert_array_equal(found.face[:, :10], 1)
    assert solve(point, [-INF, -gap], zero, tenth).status[0] == Status.INFEASIBLE  # nothing but zeros to round
    assert solve(point, [1.0 + 1e4 * gap, 2.0], zero, tenth).status[0] == Status.INFEASIBLE
    assert solve(point, [1.0, 1.0 - gap], zero).status[0] == Status.SOLVED
    crossed = solve(point[:1, :1], [0.0, 1.0], [[dtype(0.5 + 0.5 * gap)]], [[dtype(0.5)]])
    assert crossed.status[0] == Status.SOLVED
    assert crossed.face[0, 0] == 1


def test_sum_of_bounds_that_is_one_to_rounding() -> None:
    """In float64 ten times 0.1 is one and 6e-17: a vertex for every purpose."""
    point = np.random.default_rng(0).normal(size=(4, 10))
    found = solve(point, [1.0, 1.0], np.zeros(10), np.full(10, 0.1))
    np.testing.assert_allclose(found.primal, 0.1, rtol=0, atol=1e-16)
    np.testing.assert_array_equal(found.face[:, :10], 1)
    np.testing.assert_array_equal(found.multipliers[:, 0], np.minimum(0.0, (point - 0.1).min(axis=1)))


@pytest.mark.parametrize("weight", [None, np.ones((1, 4))])
def test_empty_batch(weight: np.ndarray | None) -> None:
    for lower in (np.zeros((1, 4)), np.zeros((0, 4))):
        found = budget.solve(np.zeros((0, 4)), weight, None, np.ones((0, 2)), lower, None, (4,), "active")
        assert found.primal.shape == (0, 4)
        assert found.multipliers.shape == (0, 1)
        assert found.face.shape == (0, 5)
        assert found.status.shape == (0,)
    kkt = budget.kkt(found.face, found.primal, weight, None, np.zeros((0, 4)), None, None, (4,))
    assert kkt.primal.shape == kkt.bounds.shape == (0, 4)
    assert kkt.rows.shape == (0, 1)


def test_one_coordinate() -> None:
    found = solve([[5.0], [-5.0], [0.5]], [1.0, 1.0], [0.0])
    np.testing.assert_array_equal(found.primal, [[1.0], [1.0], [1.0]])
    np.testing.assert_array_equal(found.multipliers, [[4.0], [-6.0], [-0.5]])
    np.testing.assert_array_equal(solve([5.0], [-INF, 3.0], coefficients=[-1.0]).primal, [[5.0]])
    np.testing.assert_array_equal(solve([5.0], [-INF, -6.0], coefficients=[-1.0], weight=[2.0]).primal, [[6.0]])


@pytest.mark.parametrize("bounds", ["simplex", "mixed"])
def test_items_do_not_depend_on_the_batch(bounds: str) -> None:
    problem = random_problem(5, "slab", bounds, "none", "none", batch=37)
    whole = budget.solve(**problem, choice="active")
    for b in range(37):
        item = {name: value if name == "shape" else take(value, b) for name, value in problem.items()}
        alone = budget.solve(**item, choice="active")  # type: ignore[arg-type]
        np.testing.assert_array_equal(alone.primal[0], whole.primal[b])
        np.testing.assert_array_equal(alone.face[0], whole.face[b])


def test_threads_give_the_same_bits() -> None:
    before = torch.get_num_threads()
    point = np.random.default_rng(0).normal(size=(60, 400))
    problem = (point, None, None, np.ones((1, 2)), np.zeros((1, 400)), np.full((1, 400), 0.02), (400,), "active")
    try:
        torch.set_num_threads(1)
        alone = budget.solve(*problem)
        torch.set_num_threads(3)
        together = budget.solve(*problem)
        again = budget.solve(*problem)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(alone.primal, together.primal)
    np.testing.assert_array_equal(alone.primal, again.primal)


def test_inputs_of_any_layout_are_read_and_never_written() -> None:
    rng = np.random.default_rng(3)
    point = rng.normal(size=(4, 6))
    weight, upper = np.exp(rng.normal(size=(6, 4))).T, rng.exponential(size=(4, 12))[:, ::2]
    rhs = np.broadcast_to(np.array([0.5]), (4, 2))
    values = (point, weight, None, rhs, np.zeros((1, 6)), upper)
    copies = [None if value is None else np.array(value) for value in values]
    found = budget.solve(*values, (6,), "active")  # type: ignore[arg-type]
    wanted = budget.solve(*copies, (6,), "active")  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.primal, wanted.primal)
    for value, copy in zip(values, copies, strict=True):
        if value is not None:
            np.testing.assert_array_equal(value, copy)


# The KKT solve


def random_face(seed: int, weight: str, coefficients: str) -> dict[str, Any]:
    """Return a face with rows active and slack, and its metric."""
    problem = random_problem(seed, "slab", "mixed", weight, coefficients, batch=6)
    problem["rhs"][::2] = [-INF, INF]
    found = budget.solve(**problem, choice="active")
    metric = {name: problem[name] for name in ("weight", "coefficients", "shape")}
    return {"face": found.face, "primal": found.primal, **metric}


@pytest.mark.parametrize("weight", ["none", "shared", "batched"])
@pytest.mark.parametrize("coefficients", ["none", "shared", "batched"])
@pytest.mark.parametrize("seed", range(4))
def test_kkt_is_symmetric_and_linear(seed: int, weight: str, coefficients: str) -> None:
    face = random_face(seed, weight, coefficients)
    rng = np.random.default_rng(seed)
    n, on_row, held = face["shape"][0], face["face"][:, -1:] != 0, face["face"][:, :-1] != 0
    one, two = (
        (rng.normal(size=(6, n)), rng.normal(size=(6, 1)) * on_row, rng.normal(size=(6, n)) * held) for _ in range(2)
    )

    def apply(g: np.ndarray, r: np.ndarray, bound: np.ndarray) -> np.ndarray:
        kkt = budget.kkt(rhs_primal=g, rhs_rows=r, rhs_bounds=bound, **face)
        return np.concatenate([kkt.primal, kkt.rows, kkt.bounds], axis=1)

    first, second = apply(*one), apply(*two)
    np.testing.assert_allclose(
        np.sum(np.concatenate(one, axis=1) * second, axis=1), np.sum(np.concatenate(two, axis=1) * first, axis=1),
        rtol=1e-11, atol=1e-11,
    )  # fmt: skip
    mixed = apply(*(2.0 * a - 3.0 * b for a, b in zip(one, two, strict=True)))
    np.testing.assert_allclose(mixed, 2.0 * first - 3.0 * second, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("weight", ["none", "shared"])
def test_kkt_ignores_what_is_not_in_the_face(weight: str) -> None:
    face = random_face(2, weight, weight)
    rng = np.random.default_rng(0)
    n, on_row, held = face["shape"][0], face["face"][:, -1:] != 0, face["face"][:, :-1] != 0
    assert on_row.any()
    assert not on_row.all()
    g, r, bound = rng.normal(size=(6, n)), rng.normal(size=(6, 1)), rng.normal(size=(6, n))
    clean = budget.kkt(rhs_primal=g, rhs_rows=r, rhs_bounds=bound, **face)
    noisy = budget.kkt(
        rhs_primal=g, rhs_rows=np.where(on_row, r, np.nan), rhs_bounds=np.where(held, bound, np.nan), **face
    )  # fmt: skip
    absent = budget.kkt(rhs_primal=g, rhs_rows=None, rhs_bounds=None, **face)
    zero = budget.kkt(rhs_primal=g, rhs_rows=0.0 * r, rhs_bounds=0.0 * bound, **face)
    for name in ("primal", "rows", "bounds"):
        np.testing.assert_array_equal(getattr(clean, name), getattr(noisy, name))
        np.testing.assert_array_equal(getattr(absent, name), getattr(zero, name))
    np.testing.assert_array_equal(clean.rows[~on_row], 0.0)
    np.testing.assert_array_equal(clean.bounds[~held], 0.0)
    np.testing.assert_array_equal(clean.primal[held], bound[held])


@pytest.mark.parametrize("row", ["equality", "at most", "slab", "absent"])
@pytest.mark.parametrize("seed", range(5))
def test_kkt_is_the_derivative_in_all_data(seed: int, row: str) -> None:
    """Against central differences of the solution in v, h, c, rhs, lower and upper at once."""
    problem = random_problem(seed, row, "mixed", "batched", "batched")
    rng = np.random.default_rng(seed)
    names = ("point", "weight", "coefficients", "rhs", "lower", "upper")
    tangents = {name: rng.normal(size=problem[name].shape) for name in names}
    fixed = problem["lower"] == problem["upper"]
    tangents["upper"][fixed] = tangents["lower"][fixed]
    if row == "equality":
        tangents["rhs"][:, 1] = tangents["rhs"][:, 0]
    found = budget.solve(**problem, choice="active")
    step = 1e-6
    ahead, behind = (
        budget.solve(**{k: v + s * tangents[k] if k in tangents else v for k, v in problem.items()}, choice="active")
        for s in (step, -step)
    )
    # Off its kinks the face is constant around the point; other items are left out.
    smooth = (found.face == ahead.face).all(axis=1) & (found.face == behind.face).all(axis=1)
    held = found.face[:, :-1]
    vertex = (found.face[:, -1] != 0) & ~((held == 0) & (problem["coefficients"] != 0)).any(axis=1)
    smooth &= ~vertex
    assert smooth.any()
    h, c, x, nu = problem["weight"], problem["coefficients"], found.primal, found.multipliers
    side = np.where(found.face[:, -1:] == 1, tangents["rhs"][:, 1:], tangents["rhs"][:, :1])
    kkt = budget.kkt(
        found.face, x, h, c,
        h * tangents["point"] + tangents["weight"] * (problem["point"] - x) - tangents["coefficients"] * nu,
        side - np.sum(tangents["coefficients"] * x, axis=1, keepdims=True),
        np.where(held == 1, tangents["upper"], tangents["lower"]), problem["shape"],
    )  # fmt: skip
    slope = (ahead.primal - behind.primal) / (2 * step)
    np.testing.assert_allclose(kkt.primal[smooth], slope[smooth], rtol=1e-6, atol=1e-7)
    slope = (ahead.multipliers - behind.multipliers) / (2 * step)
    np.testing.assert_allclose(kkt.rows[smooth], slope[smooth], rtol=1e-6, atol=1e-6)
