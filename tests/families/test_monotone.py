"""Monotone chains: against the twin, the KKT conditions and closed forms, on ties above all."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from hsbackend.families import monotone, monotone_naive
from hsbackend.families.family import FamilySolution
from hsbackend.status import Status, UnsupportedProblemError

EPS = np.finfo(np.float64).eps
KINDS = ["normal", "integers", "increasing", "decreasing", "staircase"]
CHOICES = ["active", "support"]


def draw(kind: str, batch: int, n: int, seed: int, weighted: bool = False) -> tuple[Any, Any, Any]:
    """Return points, weights and limits of every kind: open, closed, equal, beyond everything."""
    rng = np.random.default_rng([seed, n, KINDS.index(kind)])
    points = rng.normal(size=(batch, n))
    limits = np.sort(rng.normal(size=(batch, 2)), axis=1)
    if kind == "increasing":
        points = np.sort(points, axis=1)
    elif kind == "decreasing":
        points = -np.sort(points, axis=1)
    elif kind != "normal":  # sums of such numbers are exact, and ties are everywhere
        points = rng.integers(-2, 3, size=(batch, n)).astype(float)
        limits = np.sort(rng.integers(-2, 3, size=(batch, 2)), axis=1).astype(float)
        if kind == "staircase":
            points = points / 2 + np.arange(n) / 2
    limits[rng.random(batch) < 0.3, 0] = -np.inf
    limits[rng.random(batch) < 0.3, 1] = np.inf
    weight = 2.0 ** rng.integers(-2, 3, size=(batch, n)) if weighted else None
    return points, weight, limits


def solve(points: np.ndarray, weight: np.ndarray | None, limits: np.ndarray, choice: Any = "active") -> FamilySolution:
    return monotone.solve(points, weight, None, limits, None, None, (points.shape[1],), choice)


def tensor(values: np.ndarray | None) -> Any:
    return None if values is None else torch.from_numpy(values)


def chain_multipliers(points: np.ndarray, weight: np.ndarray | None, found: FamilySolution) -> np.ndarray:
    """Return what stationarity says the multipliers of the chain are, and last what is left of it, (B, n)."""
    h = np.ones_like(points) if weight is None else weight
    force = h * (points - found.primal)
    force[:, 0] -= found.multipliers[:, 0]
    force[:, -1] -= found.multipliers[:, 1]
    return force.cumsum(axis=1)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_everything_against_the_twin(n: int, kind: str, weighted: bool, choice: Any) -> None:
    for scale in (1.0, 1e9, 1e-9):
        points, weight, limits = draw(kind, 8, n, 0, weighted)
        points, limits = points * scale, limits * scale
        found = solve(points, weight, limits, choice)
        primal, nu, face, status = monotone_naive.solve(
            tensor(points), tensor(weight), None, tensor(limits), None, None, (n,), choice
        )  # fmt: skip
        assert (found.status == Status.SOLVED).all()
        np.testing.assert_array_equal(found.status, status.numpy())
        np.testing.assert_allclose(found.primal, primal.numpy(), rtol=0.0, atol=1e-14 * scale * n)
        np.testing.assert_allclose(found.multipliers, nu.numpy(), rtol=0.0, atol=1e-13 * scale * n)
        np.testing.assert_array_equal(found.face, face.numpy())

        rng = np.random.default_rng(1)
        sides = rng.normal(size=points.shape), rng.normal(size=(8, 2)), rng.normal(size=points.shape)
        ours = monotone.kkt(found.face, found.primal, weight, None, *sides, (n,))
        theirs = monotone_naive.kkt(
            face, primal, tensor(weight), None, *[tensor(side) for side in sides], (n,)
        )  # fmt: skip
        for mine, other in zip((ours.primal, ours.rows, ours.bounds), theirs, strict=True):
            np.testing.assert_allclose(mine, other.numpy(), rtol=0.0, atol=1e-12 * n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 10, 63, 1000])
def test_optimality(n: int, kind: str) -> None:
    points, weight, limits = draw(kind, 20, n, 2, weighted=True)
    found = solve(points, weight, limits)
    x, low, high = found.primal, limits[:, :1], limits[:, 1:]
    assert (found.status == Status.SOLVED).all()
    assert (np.diff(x, axis=1) >= 0.0).all()
    assert ((x >= low) & (x <= high)).all()
    assert (found.multipliers[:, 0] <= 0.0).all()
    assert (found.multipliers[:, 1] >= 0.0).all()
    rounding = 1e-13 * (weight * (np.abs(points) + np.abs(x))).sum(axis=1, keepdims=True)
    z = chain_multipliers(points, weight, found)
    assert (np.abs(z[:, -1:]) <= rounding).all()
    assert (z >= -rounding).all()
    assert (np.abs(z[:, :-1] * np.diff(x, axis=1)) <= rounding * (1.0 + np.abs(x).max())).all()
    assert (np.abs(found.multipliers[:, 0]) * (x[:, 0] > limits[:, 0]) <= rounding[:, 0]).all()
    assert (np.abs(found.multipliers[:, 1]) * (x[:, -1] < limits[:, 1]) <= rounding[:, 0]).all()


def test_known_answers() -> None:
    points = np.array([[3.0, 1.0, 2.0, 5.0, 4.0]])
    found = solve(points, None, np.array([[-np.inf, np.inf]]))
    np.testing.assert_allclose(found.primal, [[2.0, 2.0, 2.0, 4.5, 4.5]])
    np.testing.assert_array_equal(found.face, [[0, 0, 0, 1, 1, 0, 0]])
    found = solve(points, None, np.array([[2.5, 4.0]]))
    np.testing.assert_allclose(found.primal, [[2.5, 2.5, 2.5, 4.0, 4.0]])
    np.testing.assert_allclose(found.multipliers, [[-1.5, 1.0]])
    np.testing.assert_array_equal(found.face, [[0, 0, 0, 1, 1, 1, 1]])
    found = solve(points, np.array([[1.0, 3.0, 1.0, 1.0, 1.0]]), np.array([[-np.inf, np.inf]]))
    np.testing.assert_allclose(found.primal, [[1.5, 1.5, 2.0, 4.5, 4.5]])


def test_long_chains_against_a_plain_loop() -> None:
    """Pool adjacent violators on Fractions of the data, exact."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        point = 1e6 + rng.normal(size=400).cumsum() * (-1.0) ** seed
        blocks: list[list[Any]] = []
        for value in point:
            blocks.append([Fraction(value), 1])
            while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
                total, count = blocks.pop()
                blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
        wanted = np.concatenate([np.full(count, float(total / count)) for total, count in blocks])
        found = solve(point[None], None, np.array([[-np.inf, np.inf]])).primal[0]
        np.testing.assert_allclose(found, wanted, rtol=2 * EPS)


@pytest.mark.parametrize("n", [7, 64])
def test_invariants_of_a_projection(n: int) -> None:
    rng = np.random.default_rng(n)
    points, other = 2.0 * rng.normal(size=(2, 30, n))
    limits = np.array([[-0.5, 0.8]])
    x, y = solve(points, None, limits).primal, solve(other, None, limits).primal
    np.testing.assert_array_equal(solve(x, None, limits).primal, x)
    assert (np.linalg.norm(x - y, axis=1) <= np.linalg.norm(points - other, axis=1) * (1.0 + 1e-14)).all()
    assert (((points - x) * (y - x)).sum(1) <= 1e-12).all()
    np.testing.assert_allclose(solve(points + 3.0, None, limits + 3.0).primal, x + 3.0, atol=1e-14)
    mirrored = solve(np.ascontiguousarray(-points[:, ::-1]), None, -limits[:, ::-1])
    np.testing.assert_allclose(-mirrored.primal[:, ::-1], x, atol=1e-15)
    weights = np.full((1, n), 2.5)
    np.testing.assert_allclose(solve(points, weights, limits).primal, x, atol=1e-15)


# Faces


@pytest.mark.parametrize("kind", KINDS)
def test_faces_lie_between_support_and_active_set(kind: str) -> None:
    points, weight, limits = draw(kind, 200, 9, 3, weighted=True)
    for choice in CHOICES:
        found = solve(points, weight, limits, choice)
        x, blocks = found.primal, found.face[:, :-2]
        at_low, at_high = found.face[:, -2] != 0, found.face[:, -1] != 0
        rounding = 1e-13 * (weight * (np.abs(points) + np.abs(x))).sum(axis=1)
        tied = np.diff(blocks, axis=1) == 0
        assert (blocks[:, 0] == 0).all()
        assert np.isin(np.diff(blocks, axis=1), [0, 1]).all()
        assert (np.abs(np.diff(x, axis=1))[tied] <= 1e-13).all()
        assert (np.abs(x[:, 0] - limits[:, 0])[at_low] <= 1e-13).all()
        assert (np.abs(x[:, -1] - limits[:, 1])[at_high] <= 1e-13).all()
        assert tied[chain_multipliers(points, weight, found)[:, :-1] > rounding[:, None]].all()
        assert at_low[-found.multipliers[:, 0] > rounding].all()
        assert at_high[found.multipliers[:, 1] > rounding].all()
        if choice == "active":
            assert tied[np.diff(x, axis=1) == 0.0].all()
            assert at_low[x[:, 0] == limits[:, 0]].all()
            assert at_high[x[:, -1] == limits[:, 1]].all()


def test_choices_differ_where_a_tight_row_has_no_multiplier() -> None:
    points = np.array([[0.0, 0.0, 1.0, 0.5, 1.5, 2.0]])
    limits = np.array([[0.0, 2.0]])
    np.testing.assert_array_equal(solve(points, None, limits, "active").face, [[0, 0, 1, 1, 2, 3, 1, 1]])
    np.testing.assert_array_equal(solve(points, None, limits, "support").face, [[0, 1, 2, 2, 3, 4, 0, 0]])
    # pulled below by the first two only: the third sits at the bound by itself
    points = np.array([[-1.0, -1.0, 0.0, 1.0]])
    np.testing.assert_array_equal(solve(points, None, limits, "active").face, [[0, 0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(solve(points, None, limits, "support").face, [[0, 0, 1, 2, 1, 0]])


def test_equal_limits_are_one_block_held_twice() -> None:
    """With multipliers that are valid: the chain pulls neither way with a negative one."""
    points = np.array([[3.0, -1.0, 4.0], [0.0, 0.0, 0.0], [-5.0, 2.0, 1.0]])
    for choice in CHOICES:
        found = solve(points, None, np.array([[1.0, 1.0]]), choice)
        np.testing.assert_array_equal(found.primal, np.ones((3, 3)))
        np.testing.assert_array_equal(found.face, [[0, 0, 0, 1, 1]] * 3)
        z = chain_multipliers(points, None, found)
        np.testing.assert_allclose(z[:, -1], 0.0, atol=1e-15)
        assert (z >= 0.0).all()
        assert (found.multipliers * [-1.0, 1.0] >= 0.0).all()
        out = monotone.kkt(found.face, found.primal, None, None, points, np.array([[2.0, 9.0]] * 3), None, (3,))
        np.testing.assert_array_equal(out.primal, np.full((3, 3), 2.0))
        np.testing.assert_allclose(out.rows, np.stack([points.sum(1) - 6.0, np.zeros(3)], axis=1))


# KKT solve on a face


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_kkt_is_symmetric_and_linear(choice: Any, kind: str) -> None:
    points, weight, limits = draw(kind, 30, 8, 4, weighted=True)
    found = solve(points, weight, limits, choice)
    rng = np.random.default_rng(5)
    active = found.face[:, -2:].copy()
    active[(active.sum(1) == 2) & (found.face[:, 0] == found.face[:, 7]), 1] = 0  # held twice: by the first row

    def apply(g: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = monotone.kkt(found.face, found.primal, weight, None, g, r, None, (8,))
        assert not out.bounds.any()
        return out.primal, out.rows

    g1, g2 = rng.normal(size=(2, *points.shape))
    r1, r2 = rng.normal(size=(2, 30, 2)) * active
    (u1, w1), (u2, w2) = apply(g1, r1), apply(g2, r2)
    np.testing.assert_allclose((g1 * u2).sum(1) + (r1 * w2).sum(1), (g2 * u1).sum(1) + (r2 * w1).sum(1), atol=1e-12)
    u, w = apply(2.0 * g1 - 3.0 * g2, 2.0 * r1 - 3.0 * r2)
    np.testing.assert_allclose(u, 2.0 * u1 - 3.0 * u2, atol=1e-13)
    np.testing.assert_allclose(w, 2.0 * w1 - 3.0 * w2, atol=1e-12)
    np.testing.assert_array_equal(apply(g1, r1 + (active == 0))[0], u1)  # rows that do not hold are not read


@pytest.mark.parametrize("weighted", [False, True])
def test_kkt_is_the_derivative(weighted: bool) -> None:
    """Central differences in v, h and the limits where nothing is near its kink."""
    rng = np.random.default_rng(6)
    n = 8
    points = rng.normal(size=(200, n))
    weight = rng.uniform(0.5, 2.0, size=points.shape) if weighted else np.ones_like(points)
    limits = np.tile([[-0.4, 0.5]], (200, 1))
    found = solve(points, weight, limits)
    z = chain_multipliers(points, weight, found)[:, :-1]
    x = np.concatenate([limits[:, :1], found.primal, limits[:, 1:]], axis=1)
    multipliers = np.concatenate([-found.multipliers[:, :1], z, found.multipliers[:, 1:]], axis=1)
    clear = np.maximum(np.diff(x, axis=1), multipliers).min(axis=1) > 1e-3
    assert clear.sum() > 50
    d_point, d_weight = rng.normal(size=(2, *points.shape))
    d_limits = rng.normal(size=limits.shape)
    g = weight * d_point + d_weight * (points - found.primal)
    tangent = monotone.kkt(found.face, found.primal, weight, None, g, d_limits, None, (n,))
    step = 1e-5
    ahead, behind = (
        solve(points + s * d_point, weight + s * d_weight, limits + s * d_limits) for s in (step, -step)
    )  # fmt: skip
    np.testing.assert_allclose(
        tangent.primal[clear], ((ahead.primal - behind.primal) / (2 * step))[clear], atol=1e-8
    )  # fmt: skip
    np.testing.assert_allclose(
        tangent.rows[clear], ((ahead.multipliers - behind.multipliers) / (2 * step))[clear], atol=1e-8
    )  # fmt: skip


# Batches, failures, data types


def test_bad_items_are_named_and_touch_nobody() -> None:
    rng = np.random.default_rng(7)
    points, weight = rng.normal(size=(16, 6)), rng.uniform(0.5, 2.0, size=(16, 6))
    limits = np.tile([[-0.5, 0.5]], (16, 1))
    points[1, 3], points[3, 0] = np.nan, np.inf
    weight[5, 2], weight[7, 1] = 0.0, np.nan
    limits[9, 0], limits[11], limits[13], limits[15] = np.nan, [1.0, 0.0], [np.inf, np.inf], [1.0, -np.inf]
    bad = [Status.INVALID_INPUT] * 5 + [Status.INFEASIBLE] * 3
    status = [code for wrong in bad for code in (int(Status.SOLVED), int(wrong))]
    before = points.copy(), weight.copy(), limits.copy()
    found = solve(points, weight, limits)
    np.testing.assert_array_equal(found.status, status)
    for item, code in enumerate(status):
        if code == Status.SOLVED:
            alone = solve(points[[item]], weight[[item]], limits[[item]])
            np.testing.assert_array_equal(found.primal[item], alone.primal[0])
            np.testing.assert_array_equal(found.multipliers[item], alone.multipliers[0])
            np.testing.assert_array_equal(found.face[item], alone.face[0])
        else:
            assert np.isnan(found.primal[item]).all()
            assert np.isnan(found.multipliers[item]).all()
            assert not found.face[item].any()
    for now, then in zip((points, weight, limits), before, strict=True):
        np.testing.assert_array_equal(now, then)
    out = monotone.kkt(found.face, found.primal, weight, None, np.ones((16, 6)), np.ones((16, 2)), None, (6,))
    assert np.isfinite(out.primal).all()
    assert np.isfinite(out.rows).all()


def test_limits_that_contradict_each_other_by_rounding_are_equal() -> None:
    low, high = 0.1 + 0.2, 0.3
    found = solve(np.zeros((1, 3)), None, np.array([[low, high]]))
    assert found.status[0] == Status.SOLVED
    np.testing.assert_allclose(found.primal, 0.3)
    np.testing.assert_array_equal(found.face, [[0, 0, 0, 1, 1]])
    single = np.array([[0.3 * (1.0 + 1e-6), 0.3]], dtype=np.float32)
    assert solve(np.zeros((1, 3), dtype=np.float32), None, single).status[0] == Status.SOLVED
    assert solve(np.zeros((1, 3)), None, single.astype(float)).status[0] == Status.INFEASIBLE


def test_shared_data_equals_repeated_data() -> None:
    rng = np.random.default_rng(8)
    points, weight, limits = rng.normal(size=(9, 5)), rng.uniform(0.5, 2.0, size=(1, 5)), np.array([[-0.5, 0.5]])
    one, many = solve(points, weight, limits), solve(points, np.repeat(weight, 9, 0), np.repeat(limits, 9, 0))
    np.testing.assert_array_equal(one.primal, many.primal)
    np.testing.assert_array_equal(one.face, many.face)
    found = monotone.kkt(one.face, one.primal, weight, None, points, None, None, (5,))
    again = monotone.kkt(one.face, one.primal, np.repeat(weight, 9, 0), None, points, None, None, (5,))
    np.testing.assert_array_equal(found.primal, again.primal)


def test_threads_do_not_change_a_bit() -> None:
    points, weight, limits = draw("normal", 400, 100, 9, weighted=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = solve(points, weight, limits)
        torch.set_num_threads(3)
        together = solve(points, weight, limits)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(alone.primal, together.primal)
    np.testing.assert_array_equal(alone.face, together.face)


def test_an_empty_batch_stays_empty() -> None:
    found = solve(np.empty((0, 6)), None, np.zeros((1, 2)))
    assert found.primal.shape == (0, 6)
    assert found.multipliers.shape == (0, 2)
    assert found.face.shape == (0, 8)
    assert monotone.kkt(found.face, found.primal, None, None, np.empty((0, 6)), None, None, (6,)).rows.shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_double_precision_rounded(kind: str) -> None:
    points, weight, limits = (value.astype(np.float32) for value in draw(kind, 40, 12, 10, weighted=True))
    one = solve(points, weight, limits)
    other = solve(points.astype(float), weight.astype(float), limits.astype(float))
    assert one.primal.dtype == one.multipliers.dtype == np.float32
    np.testing.assert_array_equal(one.primal, other.primal.astype(np.float32))
    np.testing.assert_array_equal(one.face, other.face)


def test_data_of_other_families_is_refused() -> None:
    point, limits = np.zeros((1, 4)), np.zeros((1, 2))
    with pytest.raises(UnsupportedProblemError, match="monotone chain"):
        monotone.solve(point, None, np.ones((1, 4)), limits, None, None, (4,), "active")
    with pytest.raises(UnsupportedProblemError, match="monotone chain"):
        monotone.solve(point, None, None, limits, None, point, (4,), "active")
