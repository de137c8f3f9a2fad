"""Transport polytopes: against the twin, the KKT conditions and closed forms, on degenerate points above all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from hsbackend.families import transport, transport_naive
from hsbackend.families.family import FamilySolution
from hsbackend.status import Status, UnsupportedProblemError

EPS = np.finfo(np.float64).eps
SIZES = [(1, 1), (1, 4), (3, 1), (2, 2), (3, 3), (4, 4), (2, 5), (5, 3)]
KINDS = ["normal", "wide", "weights", "integers", "scaled integers", "permutation", "constant", "corner", "marginals",
         "zero marginals", "grid", "blocks", "tied weights"]  # fmt: skip


def draw(kind: str, batch: int, k1: int, k2: int, seed: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Return points, weights and marginals, with equal sums of rows and columns; most kinds have ties everywhere."""
    rng = np.random.default_rng([seed, k1, k2, KINDS.index(kind)])
    points = rng.normal(size=(batch, k1, k2))
    weight = None
    rows = np.ones((batch, k1))
    columns = np.full((batch, k2), k1 / k2)
    if kind == "wide":
        points *= 10.0 ** rng.integers(0, 10, size=(batch, 1, 1))
    elif kind == "weights":
        weight = 10.0 ** rng.uniform(-3, 3, size=(batch, k1 * k2))
        points *= 3.0
    elif kind in ("integers", "scaled integers", "tied weights"):
        points = rng.integers(0, 3, size=points.shape).astype(float)
        if kind == "scaled integers":
            points *= 10.0 ** rng.integers(-9, 10, size=(batch, 1, 1))
        elif kind == "tied weights":
            weight = 2.0 ** rng.integers(-3, 4, size=(batch, k1 * k2))
    elif kind == "permutation":
        k = max(k1, k2)
        points = np.stack([np.eye(k)[rng.permutation(k)][:k1, :k2] for _ in range(batch)])
        points *= 10.0 ** rng.integers(-2, 10, size=(batch, 1, 1))
    elif kind == "constant":
        points = 0.0 * points + 10.0 * rng.normal(size=(batch, 1, 1))
    elif kind == "corner":  # on a face of the set, with multipliers that are zero or not
        k = max(k1, k2)
        inside = sum(np.stack([np.eye(k)[rng.permutation(k)][:k1, :k2] for _ in range(batch)]) for _ in range(2)) / 2
        points = inside - rng.integers(0, 2, size=points.shape) * (inside == 0)
        points = points + rng.integers(-2, 3, size=(batch, k1, 1)) + rng.integers(-2, 3, size=(batch, 1, k2))
        rows, columns = inside.sum(2), inside.sum(1)
    elif kind == "marginals":
        rows = 10.0 ** rng.uniform(-6, 2, size=(batch, k1))
        columns = 10.0 ** rng.uniform(-6, 2, size=(batch, k2))
        columns *= rows.sum(1, keepdims=True) / columns.sum(1, keepdims=True)
    elif kind == "zero marginals":
        rows = rng.integers(0, 3, size=(batch, k1)).astype(float)
        columns = np.stack([rng.multinomial(int(r.sum()), np.full(k2, 1.0 / k2)) for r in rows]).astype(float)
    elif kind == "grid":  # transport on a line, next to a linear program
        points = -((rng.random((batch, k1, 1)) - rng.random((batch, 1, k2))) ** 2)
        points *= 10.0 ** rng.integers(0, 8, size=(batch, 1, 1))
    elif kind == "blocks":
        points = np.where((np.arange(k1)[:, None] + np.arange(k2)) % 2 == 0, 3.0, -3.0) + 0.0 * points
    return np.ascontiguousarray(points.reshape(batch, -1)), weight, np.concatenate([rows, columns], axis=1)


def solve(
    points: np.ndarray, weight: np.ndarray | None, rhs: np.ndarray, shape: tuple[int, int], choice: Any = "active"
) -> FamilySolution:
    return transport.solve(points, weight, None, rhs, None, None, shape, choice)


def tensor(values: np.ndarray | None) -> Any:
    return None if values is None else torch.from_numpy(values)


def incidence(k1: int, k2: int) -> np.ndarray:
    """Return the rows of the marginals, (k1 + k2, k1 k2)."""
    return np.concatenate([np.kron(np.eye(k1), np.ones((1, k2))), np.kron(np.ones((1, k1)), np.eye(k2))])


def residuals(
    points: np.ndarray, weight: np.ndarray | None, rhs: np.ndarray, found: FamilySolution, shape: tuple[int, int]
) -> tuple[float, float]:
    """Return the largest relative violation of the marginals, and of stationarity, measured as a change of V."""
    rows = incidence(*shape)
    h = np.ones_like(points) if weight is None else np.broadcast_to(weight, points.shape)
    x, nu = found.primal, found.multipliers
    feasibility = np.abs(x @ rows.T - rhs).max(axis=1) / np.maximum(rhs.max(axis=1), 1e-300)
    z = (h * (x - points) + nu @ rows) / h
    size = (np.abs(points) + np.abs(nu) @ rows / h).max(axis=1) + rhs.max(axis=1) + 1e-300
    stationarity = np.where(x > 0.0, np.abs(z), np.maximum(-z, 0.0)).max(axis=1) / size
    assert (x >= 0.0).all()
    return float(feasibility.max()), float(stationarity.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SIZES)
def test_value_and_kkt_against_the_twin(shape: tuple[int, int], kind: str) -> None:
    points, weight, rhs = draw(kind, 6, *shape, seed=0)
    found = solve(points, weight, rhs, shape)
    primal, nu, face, status = transport_naive.solve(
        tensor(points), tensor(weight), None, tensor(rhs), None, None, shape, "active"
    )  # fmt: skip
    assert (found.status == Status.SOLVED).all()
    assert (status.numpy() == Status.SOLVED).all()
    size = np.abs(points).max(axis=1, keepdims=True) + rhs.max(axis=1, keepdims=True)
    np.testing.assert_allclose(found.primal / size, primal.numpy() / size, rtol=0.0, atol=1e-11)
    if kind in ("normal", "weights"):  # faces are unique where the free entries connect all rows and columns
        np.testing.assert_array_equal(found.face, face.numpy())
        ranks = [np.linalg.matrix_rank(incidence(*shape)[:, free]) for free in found.face != 0]
        connected = np.array(ranks) == sum(shape) - 1
        error = np.abs(found.multipliers - nu.numpy())[connected].max(axis=1, initial=0.0)
        assert (error <= 1e-10 * np.abs(nu.numpy())[connected].max(axis=1, initial=0.0)).all()

    rng = np.random.default_rng(1)
    for choice in ("active", "support"):
        face = solve(points, weight, rhs, shape, choice).face
        sides = rng.normal(size=points.shape), rng.normal(size=rhs.shape), rng.normal(size=points.shape)
        ours = transport.kkt(face, found.primal, weight, None, *sides, shape)
        theirs = transport_naive.kkt(
            tensor(face), tensor(found.primal), tensor(weight), None, *[tensor(side) for side in sides], shape
        )  # fmt: skip
        for mine, other in zip((ours.primal, ours.rows, ours.bounds), theirs, strict=True):
            np.testing.assert_allclose(mine, other.numpy(), rtol=1e-9, atol=1e-9 * max(1.0, np.abs(mine).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "shape"), [(300, (2, 2)), (300, (4, 4)), (100, (3, 7)), (20, (16, 16)), (8, (10, 31)), (4, (32, 32))]
)
def test_every_item_is_solved_to_rounding(batch: int, shape: tuple[int, int], kind: str) -> None:
    for seed in range(2):
        points, weight, rhs = draw(kind, batch, *shape, seed=seed)
        found = solve(points, weight, rhs, shape)
        assert (found.status == Status.SOLVED).all()
        feasibility, stationarity = residuals(points, weight, rhs, found, shape)
        assert feasibility < 1e-13
        assert stationarity < 1e-13
        k1 = shape[0]
        balance = found.multipliers[:, :k1].sum(1) - found.multipliers[:, k1:].sum(1)
        assert (np.abs(balance) <= 1e-12 * np.abs(found.multipliers).sum(1)).all()


@pytest.mark.parametrize("seed", range(3))
def test_weights_over_twelve_orders_are_solved_on_the_path(seed: int) -> None:
    """Newton's method alone zigzags here."""
    rng = np.random.default_rng(seed)
    points = 3.0 * rng.normal(size=(60, 256))
    weight = 10.0 ** rng.uniform(-6, 6, size=points.shape)
    rhs = np.ones((60, 32))
    found = solve(points, weight, rhs, (16, 16))
    assert (found.status == Status.SOLVED).all()
    feasibility, stationarity = residuals(points, weight, rhs, found, (16, 16))
    assert feasibility < 1e-13
    assert stationarity < 1e-10


def test_two_by_two_has_a_closed_form() -> None:
    points = np.random.default_rng(0).normal(size=(50, 4)) * 2.0
    t = np.clip(0.5 + (points @ [1.0, -1.0, -1.0, 1.0]) / 4.0, 0.0, 1.0)
    found = solve(points, None, np.ones((1, 4)), (2, 2)).primal
    np.testing.assert_allclose(found, np.stack([t, 1.0 - t, 1.0 - t, t], axis=1), atol=1e-15)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_one_row_is_its_marginals(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    sums = rng.random((7, 5))
    total = sums.sum(1, keepdims=True)
    rhs = np.concatenate([total, sums] if shape[0] == 1 else [sums, total], axis=1)
    found = solve(rng.normal(size=(7, 5)) * 10.0, None, rhs, shape)
    np.testing.assert_allclose(found.primal, sums, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("shape", [(4, 4), (5, 8)])
def test_invariants_of_a_projection(shape: tuple[int, int]) -> None:
    k1, k2 = shape
    rng = np.random.default_rng(3)
    points, other = rng.normal(size=(2, 20, k1 * k2))
    rhs = np.concatenate([np.ones(k1), np.full(k2, k1 / k2)])[None]
    x, y = solve(points, None, rhs, shape).primal, solve(other, None, rhs, shape).primal
    np.testing.assert_allclose(solve(x, None, rhs, shape).primal, x, atol=1e-14)
    assert (np.linalg.norm(x - y, axis=1) <= np.linalg.norm(points - other, axis=1) * (1.0 + 1e-12)).all()
    assert (((points - x) * (y - x)).sum(1) <= 1e-12).all()
    # what is added to whole rows and columns is projected away
    moved = points.reshape(20, k1, k2) + 1e3 * rng.normal(size=(20, k1, 1)) + 1e3 * rng.normal(size=(20, 1, k2))
    np.testing.assert_allclose(solve(moved.reshape(20, -1), None, rhs, shape).primal, x, atol=1e-11)
    transposed = np.ascontiguousarray(points.reshape(20, k1, k2).transpose(0, 2, 1)).reshape(20, -1)
    swapped = np.concatenate([rhs[:, k1:], rhs[:, :k1]], axis=1)
    found = solve(transposed, None, swapped, (k2, k1)).primal.reshape(20, k2, k1).transpose(0, 2, 1)
    np.testing.assert_allclose(found.reshape(20, -1), x, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e9])
def test_scaling_everything_scales_the_answer(scale: float) -> None:
    points, _, rhs = draw("normal", 20, 5, 5, seed=4)
    one, other = solve(points, None, rhs, (5, 5)), solve(points * scale, None, rhs * scale, (5, 5))
    np.testing.assert_allclose(other.primal / scale, one.primal, atol=1e-14)
    np.testing.assert_allclose(other.multipliers / scale, one.multipliers, atol=1e-13)
    np.testing.assert_array_equal(other.face, one.face)


def test_sums_hold_to_rounding_where_points_are_a_billion_times_larger() -> None:
    rng = np.random.default_rng(5)
    points = 1e9 * rng.normal(size=(50, 36))
    x = solve(points, None, np.ones((1, 12)), (6, 6)).primal
    np.testing.assert_allclose(x @ incidence(6, 6).T, 1.0, rtol=0.0, atol=1e-14)
    for gain, plan in zip(points.reshape(50, 6, 6), x.reshape(50, 6, 6), strict=True):
        best = linear_sum_assignment(gain, maximize=True)  # what the projection tends to as V grows
        np.testing.assert_allclose(plan[best], 1.0, atol=1e-14)


# Faces


@pytest.mark.parametrize("kind", KINDS)
def test_faces_lie_between_support_and_active_set(kind: str) -> None:
    points, weight, rhs = draw(kind, 100, 4, 4, seed=6)
    h = np.ones_like(points) if weight is None else weight
    for choice in ("active", "support"):
        found = solve(points, weight, rhs, (4, 4), choice)
        z = h * (found.primal - points) + found.multipliers @ incidence(4, 4)
        size = np.abs(points) + (np.abs(found.multipliers) @ incidence(4, 4)) / h
        rounding = 64 * EPS * np.broadcast_to(size.max(axis=1, keepdims=True), points.shape)
        held = found.face == 0
        assert set(np.unique(found.face)) <= {0, 1}
        assert (found.primal <= rounding)[held].all()  # K <= active
        assert held[z / h > rounding].all()  # supp(z) <= K
        assert held[found.primal == 0.0].all() or choice == "support"


def test_choices_differ_where_a_held_entry_has_no_multiplier() -> None:
    """A permutation matrix lies in the set: no multiplier anywhere."""
    point = np.eye(3)[[2, 0, 1]].reshape(1, 9)
    assert solve(point, None, np.ones((1, 6)), (3, 3), "active").face.sum() == 3
    assert solve(point, None, np.ones((1, 6)), (3, 3), "support").face.sum() == 9


# KKT solve on a face


def test_kkt_solves_its_system() -> None:
    for kind in KINDS:
        points, weight, rhs = draw(kind, 10, 4, 3, seed=7)
        found = solve(points, weight, rhs, (4, 3))
        rng = np.random.default_rng(8)
        h = np.ones_like(points) if weight is None else weight
        rows = incidence(4, 3)
        g, wanted = rng.normal(size=(2, *points.shape))
        free = found.face != 0
        # a right-hand side that some u meets: u = wanted
        solution = transport.kkt(found.face, found.primal, weight, None, g, wanted @ rows.T, wanted, (4, 3))
        scale = max(1.0, np.abs(solution.rows).max())
        np.testing.assert_allclose(solution.primal @ rows.T, wanted @ rows.T, atol=1e-10 * scale)
        np.testing.assert_allclose(
            h * solution.primal + solution.rows @ rows + solution.bounds, g, atol=1e-10 * scale * h.max()
        )  # fmt: skip
        np.testing.assert_array_equal(solution.primal[~free], wanted[~free])
        assert not solution.bounds[free].any()


@pytest.mark.parametrize("kind", KINDS)
def test_kkt_is_symmetric_and_linear(kind: str) -> None:
    points, weight, rhs = draw(kind, 8, 5, 4, seed=9)
    found = solve(points, weight, rhs, (5, 4))
    rng = np.random.default_rng(10)
    held = found.face == 0

    def sides() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return rng.normal(size=points.shape), rng.normal(size=rhs.shape), rng.normal(size=points.shape) * held

    def apply(side: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        out = transport.kkt(found.face, found.primal, weight, None, *side, (5, 4))
        return out.primal, out.rows, out.bounds

    def inner(x: tuple[np.ndarray, ...], y: tuple[np.ndarray, ...]) -> np.ndarray:
        return sum((a * b).sum(1) for a, b in zip(x, y, strict=True))  # pyright: ignore[reportReturnType]

    one, two = sides(), sides()
    of_one, of_two = apply(one), apply(two)
    size = sum(np.abs(a).sum(1) for a in (*of_one, *of_two))
    assert (np.abs(inner(one, of_two) - inner(of_one, two)) <= 1e-11 * size).all()
    both = apply(tuple(2.0 * a - 3.0 * b for a, b in zip(one, two, strict=True)))  # pyright: ignore[reportArgumentType]
    for a, b, c in zip(of_one, of_two, both, strict=True):
        assert (np.abs(2.0 * a - 3.0 * b - c).max(1) <= 1e-11 * size).all()


def test_absent_sides_are_zero() -> None:
    points, _, rhs = draw("normal", 5, 3, 4, seed=11)
    found = solve(points, None, rhs, (3, 4))
    short = transport.kkt(found.face, found.primal, None, None, points, None, None, (3, 4))
    long = transport.kkt(
        found.face, found.primal, np.ones((1, 12)), None, points, np.zeros_like(rhs), np.zeros_like(points), (3, 4)
    )  # fmt: skip
    np.testing.assert_allclose(short.primal, long.primal, atol=1e-15)
    np.testing.assert_allclose(short.rows, long.rows, atol=1e-15)
    np.testing.assert_allclose(short.bounds, long.bounds, atol=1e-15)


def test_a_right_hand_side_no_component_meets_is_the_nearest_one_it_meets() -> None:
    """At a permutation every free entry is a component: row i and column j have to agree on one number."""
    point = np.eye(2).reshape(1, 4)
    face = solve(point, None, np.ones((1, 4)), (2, 2)).face
    rows = np.array([[1.0, 2.0, 5.0, 7.0]])
    found = transport.kkt(face, point, None, None, np.zeros((1, 4)), rows, None, (2, 2))
    np.testing.assert_allclose(found.primal, [[3.0, 0.0, 0.0, 4.5]])


@pytest.mark.parametrize("weighted", [False, True])
def test_kkt_is_the_derivative(weighted: bool) -> None:
    """Central differences in V, h and the marginals where nothing is near its kink."""
    rng = np.random.default_rng(12)
    shape, rows = (4, 5), incidence(4, 5)
    points = rng.normal(size=(60, 20))
    weight = rng.uniform(0.5, 2.0, size=points.shape) if weighted else np.ones_like(points)
    rhs = np.concatenate([np.full((60, 4), 1.25), np.ones((60, 5))], axis=1) + 0.1 * rng.random(size=(60, 20)) @ rows.T
    found = solve(points, weight, rhs, shape)
    z = weight * (found.primal - points) + found.multipliers @ rows
    clear = np.maximum(found.primal, z).min(axis=1) > 1e-3
    assert clear.sum() > 20
    d_point, d_weight, inside = rng.normal(size=(3, *points.shape))
    d_rhs = inside @ rows.T
    g = weight * d_point + d_weight * (points - found.primal)
    tangent = transport.kkt(found.face, found.primal, weight, None, g, d_rhs, None, shape)
    step = 1e-5
    ahead, behind = (
        solve(points + s * d_point, weight + s * d_weight, rhs + s * d_rhs, shape) for s in (step, -step)
    )  # fmt: skip
    np.testing.assert_allclose(
        tangent.primal[clear], ((ahead.primal - behind.primal) / (2 * step))[clear], atol=1e-6
    )  # fmt: skip
    np.testing.assert_allclose(
        tangent.rows[clear], ((ahead.multipliers - behind.multipliers) / (2 * step))[clear], atol=1e-6
    )  # fmt: skip


# Batches, failures, data types


def test_forbidden_entries_are_absent() -> None:
    """Minus infinity is the limit of large negative numbers, and a solution may just exist."""
    rng = np.random.default_rng(13)
    points = rng.normal(size=(30, 16))
    allowed = rng.random((30, 16)) < 0.4
    allowed.reshape(30, 4, 4)[:, np.arange(4), [1, 2, 3, 0]] = True
    forbidden = np.where(allowed, points, -np.inf)
    found = solve(forbidden, None, np.ones((1, 8)), (4, 4))
    limit = solve(np.where(allowed, points, -1e4), None, np.ones((1, 8)), (4, 4))
    primal, _, _, status = transport_naive.solve(
        tensor(forbidden), None, None, torch.ones(1, 8), None, None, (4, 4), "active"
    )  # fmt: skip
    assert (found.status == Status.SOLVED).all()
    assert (status.numpy() == Status.SOLVED).all()
    assert not found.primal[~allowed].any()
    assert not found.face[~allowed].any()
    np.testing.assert_allclose(found.primal, limit.primal, atol=1e-11)
    np.testing.assert_allclose(found.primal, primal.numpy(), atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_forbidden_entries_that_leave_nothing_are_infeasible(scale: float) -> None:
    """By Hall's theorem: maximum flow decides."""
    rng = np.random.default_rng(14)
    k = 5
    points = scale * rng.normal(size=(200, k * k))
    points[rng.random(points.shape) < 0.55] = -np.inf
    found = solve(points, None, 0.1 * np.ones((1, 2 * k)), (k, k))
    solvable = []
    for point in points.reshape(-1, k, k):
        capacity = np.zeros((2 * k + 2, 2 * k + 2), dtype=np.int32)
        capacity[0, 1 : k + 1] = capacity[k + 1 : -1, -1] = 1
        capacity[1 : k + 1, k + 1 : -1] = point > -np.inf
        solvable.append(maximum_flow(csr_array(capacity), 0, 2 * k + 1).flow_value == k)
    assert 0.2 < np.mean(solvable) < 0.8
    np.testing.assert_array_equal(found.status, np.where(solvable, Status.SOLVED, Status.INFEASIBLE))


def spoiled() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Return a batch in which every second item has something wrong, and the status each item should get."""
    rng = np.random.default_rng(15)
    points, weight = rng.normal(size=(16, 16)), rng.uniform(0.5, 2.0, size=(16, 16))
    rhs = np.ones((16, 8))
    points[1, 3], points[3, 0] = np.nan, np.inf
    weight[5, 2], weight[7, 1], weight[9, 0] = 0.0, np.nan, np.inf
    rhs[11, 0], rhs[13, 5], rhs[15] = np.nan, 1.5, [2.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    bad = [Status.INVALID_INPUT] * 6 + [Status.INFEASIBLE] * 2
    return points, weight, rhs, [code for status in bad for code in (int(Status.SOLVED), int(status))]


def test_bad_items_are_named_and_touch_nobody() -> None:
    points, weight, rhs, status = spoiled()
    before = points.copy(), weight.copy(), rhs.copy()
    found = solve(points, weight, rhs, (4, 4))
    np.testing.assert_array_equal(found.status, status)
    for item, code in enumerate(status):
        if code == Status.SOLVED:
            alone = solve(points[[item]], weight[[item]], rhs[[item]], (4, 4))
            np.testing.assert_array_equal(found.primal[item], alone.primal[0])
            np.testing.assert_array_equal(found.multipliers[item], alone.multipliers[0])
            np.testing.assert_array_equal(found.face[item], alone.face[0])
        else:
            assert np.isnan(found.primal[item]).all()
            assert np.isnan(found.multipliers[item]).all()
            assert not found.face[item].any()
    for now, then in zip((points, weight, rhs), before, strict=True):
        np.testing.assert_array_equal(now, then)
    sides = np.ones_like(points), np.ones_like(rhs), np.ones_like(points)
    out = transport.kkt(found.face, found.primal, weight, None, *sides, (4, 4))
    assert np.isfinite(out.primal).all()
    assert np.isfinite(out.rows).all()
    assert np.isfinite(out.bounds).all()


def test_shared_data_equals_repeated_data() -> None:
    rng = np.random.default_rng(16)
    points, weight, rhs = rng.normal(size=(9, 12)), rng.uniform(0.5, 2.0, size=(1, 12)), np.ones((1, 7))
    rhs[:, :3] = 4.0 / 3.0
    one = solve(points, weight, rhs, (3, 4))
    many = solve(points, np.repeat(weight, 9, 0), np.repeat(rhs, 9, 0), (3, 4))
    np.testing.assert_array_equal(one.primal, many.primal)
    found = transport.kkt(one.face, one.primal, weight, None, points, None, None, (3, 4))
    again = transport.kkt(one.face, one.primal, np.repeat(weight, 9, 0), None, points, None, None, (3, 4))
    np.testing.assert_array_equal(found.primal, again.primal)


def test_threads_do_not_change_a_bit() -> None:
    points, _, rhs = draw("normal", 400, 6, 6, seed=17)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = solve(points, None, rhs, (6, 6))
        torch.set_num_threads(3)
        together = solve(points, None, rhs, (6, 6))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(alone.primal, together.primal)
    np.testing.assert_array_equal(alone.multipliers, together.multipliers)


def test_an_empty_batch_stays_empty() -> None:
    found = solve(np.empty((0, 6)), None, np.ones((1, 5)), (2, 3))
    assert found.primal.shape == (0, 6)
    assert found.multipliers.shape == (0, 5)
    out = transport.kkt(found.face, found.primal, None, None, np.empty((0, 6)), None, None, (2, 3))
    assert out.rows.shape == (0, 5)


@pytest.mark.parametrize("kind", ["normal", "weights", "permutation", "zero marginals"])
def test_single_precision_is_double_precision_rounded(kind: str) -> None:
    points, weight, rhs = draw(kind, 40, 4, 4, seed=18)
    narrow = [None if value is None else value.astype(np.float32) for value in (points, weight, rhs)]
    wide = [None if value is None else value.astype(np.float64) for value in narrow]
    one, other = solve(*narrow, (4, 4)), solve(*wide, (4, 4))  # pyright: ignore[reportArgumentType]
    assert one.primal.dtype == one.multipliers.dtype == np.float32
    assert (one.status == Status.SOLVED).all()
    np.testing.assert_array_equal(one.primal, other.primal.astype(np.float32))
    np.testing.assert_array_equal(one.face, other.face)


def test_sums_that_differ_by_rounding_are_equal() -> None:
    rhs = np.array([[0.1 * 3] * 3 + [0.3, 0.3, 0.3]])
    assert solve(np.eye(3).reshape(1, 9), None, rhs, (3, 3)).status[0] == Status.SOLVED
    single = (rhs * (1.0 + np.array([[1e-6] * 3 + [0.0] * 3]))).astype(np.float32)
    assert solve(np.eye(3, dtype=np.float32).reshape(1, 9), None, single, (3, 3)).status[0] == Status.SOLVED
    assert solve(np.eye(3).reshape(1, 9), None, single.astype(float), (3, 3)).status[0] == Status.INFEASIBLE


def test_data_of_other_families_is_refused() -> None:
    point, rhs = np.zeros((1, 4)), np.ones((1, 4))
    with pytest.raises(UnsupportedProblemError, match="transport polytope"):
        transport.solve(point, None, np.ones((1, 4)), rhs, None, None, (2, 2), "active")
    with pytest.raises(UnsupportedProblemError, match="transport polytope"):
        transport.solve(point, None, None, rhs, point, None, (2, 2), "active")
