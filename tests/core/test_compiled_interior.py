"""The compiled interior-point method: right where it says so, and honest about what it knows.

Residuals, ranks and least-norm multipliers are computed here from the data, never by the code under test.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from generators import random_case, semidefinite_case
from hsbackend.face import LeastNormFace
from hsbackend.program import QPValues
from hsbackend.solvers import active_set, compiled_interior, reference
from hsbackend.solvers._interior_item_kernels import SOLVED
from hsbackend.solvers.compiled_interior import Setups
from hsbackend.solvers.result import Options, Result
from hsbackend.status import Status

NONE = np.zeros(0, dtype=np.int64)


def as_values(case, bounds: bool = True) -> QPValues:
    """Write a generated case as values; with limits -1 and 1 for its first variable."""
    batch, *_ = case.shape
    bounded = np.arange(1 if bounds else 0)
    room = np.ones((batch, len(bounded)))
    return QPValues(
        case.hessian, -case.linear, case.rows, case.equalities, case.rhs, bounded, -3.0 * room, 3.0 * room, NONE
    )


def run(values: QPValues, options: Options | None = None) -> tuple[Result, np.ndarray]:
    """Solve, item by item where the patterns differ."""
    options = Options() if options is None else options
    read = np.ones(values.num_variables, dtype=bool)
    collected = compiled_interior.Collected(values, read)
    unique = np.zeros(values.batch, dtype=bool)
    for items, setup in Setups().of(values):
        items = np.arange(values.batch) if items is None else items
        found, sure = compiled_interior.solve(values.take(items), options, read, setup)
        collected.put(items, found, setup)
        unique[items] = sure
    return collected.result, unique


def dense(values: QPValues, b: int) -> tuple[np.ndarray, np.ndarray]:
    """Return H and N of one item."""
    hessian = values.hessian[b if len(values.hessian) > 1 else 0]
    return np.diag(hessian) if values.diagonal else hessian, values.rows[b if len(values.rows) > 1 else 0]


def least_singular_value(matrix: np.ndarray) -> float:
    """Of unit rows; infinite without columns, zero with more columns than rows."""
    if not matrix.shape[1]:
        return np.inf
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    values = np.linalg.svd(matrix / np.where(length > 0.0, length, 1.0), compute_uv=False)
    return 0.0 if len(matrix) < matrix.shape[1] else float(values.min())


CASES = [(kind, seed) for kind in (random_case, semidefinite_case) for seed in range(60)]


def test_random_programs() -> None:
    """What it solves is optimal; what it knows about uniqueness and independence agrees with singular values."""
    seen = dict.fromkeys(("solved", "unique", "regular", "dependent", "settled", "not unique"), 0)
    for kind, seed in CASES:
        values = as_values(kind(seed))
        result, unique = run(values)
        face = result.face
        assert isinstance(face, LeastNormFace)
        assert face.known is not None
        for b in np.flatnonzero(result.status == Status.SOLVED):
            label = f"{kind.__name__} {seed} item {b}"
            hessian, rows = dense(values, b)
            x, nu, mu, me = result.primal[b], result.rows[b], result.bounds[b], values.num_equalities
            at = x[values.bounded]
            force = hessian @ x - values.rhs_primal[b] + rows.T @ nu
            force[values.bounded] += mu
            slack, room = values.rhs_rows[b] - rows @ x, np.minimum(values.upper[b] - at, at - values.lower[b])
            size = 1.0 + max(np.abs(part).max(initial=0.0) for part in (x, nu, mu, values.rhs_primal[b], hessian))
            parts = [force, slack[:me], np.minimum(slack, 0.0), np.minimum(nu[me:], 0.0), np.minimum(room, 0.0)]
            parts += [np.minimum(slack[me:], nu[me:]), np.minimum(room, np.abs(mu))]
            worst = max(np.abs(part).max(initial=0.0) for part in parts)
            assert worst < 1e-8 * size**2, f"{label}: {worst:.1e}"
            held, bound = face.active_rows[b] != 0, face.active_bounds[b] != 0
            units = np.eye(len(x))[values.bounded]
            pushing = (nu * np.linalg.norm(rows, axis=1) > 1e-6 * size) | (np.arange(len(nu)) < me)
            support = np.concatenate([hessian / max(np.abs(hessian).max(), 1e-300), rows[pushing]])
            support = np.concatenate([support, units[np.abs(mu) > 1e-6 * size]])
            if unique[b]:
                assert least_singular_value(support) > 1e-10, label
            active = np.concatenate([rows[held], units[bound]])
            if face.known.independent[b]:
                assert least_singular_value(active.T) > 1e-10 or not len(active), label
            if face.known.settled[b]:
                normals = np.concatenate([rows[held], units[bound] * face.active_bounds[b, bound][:, None]])
                w = np.concatenate([nu[held], mu[bound] * face.active_bounds[b, bound]])
                free = np.concatenate([np.flatnonzero(held) < me, np.zeros(bound.sum(), dtype=bool)])
                assert distance_from_least_norm(normals, free, w) < 1e-7 * size, label
            seen["solved"] += 1
            seen["unique"] += unique[b]
            seen["not unique"] += not unique[b]
            seen["regular"] += face.known.regular[b]
            seen["dependent"] += not face.known.independent[b]
            seen["settled"] += face.known.settled[b]
    assert seen["solved"] > 200
    assert min(seen.values()) > 20, seen


def distance_from_least_norm(normals: np.ndarray, free: np.ndarray, w: np.ndarray) -> float:
    """w is the multiplier of least norm when ``w = N p`` where w pushes or is free, and ``N p <= 0`` elsewhere."""
    pushing = free | (w > 1e-9 * (1.0 + np.abs(w).max(initial=0.0)))
    p = np.linalg.lstsq(normals[pushing], w[pushing], rcond=1e-12)[0] if pushing.any() else np.zeros(normals.shape[1])
    if pushing.all():
        return float(np.abs(normals @ p - w).max(initial=0.0))
    # p may move where the pushing rows do not see it.
    _, values, right = np.linalg.svd(normals[pushing], full_matrices=True)
    basis = right[int((values > 1e-10 * values.max(initial=0.0)).sum()) :].T
    others = normals[~pushing]
    if basis.shape[1]:
        found = lsq_linear(
            np.concatenate([others @ basis, -np.eye(len(others))], axis=1), -others @ p,
            bounds=(np.r_[np.full(basis.shape[1], -np.inf), np.full(len(others), -np.inf)],
                    np.r_[np.full(basis.shape[1], np.inf), np.zeros(len(others))]), tol=1e-14, method="bvls",
        )  # fmt: skip
        rest = float(np.sqrt(2.0 * found.cost))
    else:
        rest = float(np.maximum(others @ p, 0.0).max(initial=0.0))
    return max(rest, float(np.abs(normals[pushing] @ p - w[pushing]).max(initial=0.0)))


def test_against_the_reference() -> None:
    compared = 0
    for seed in range(60):
        values = as_values(random_case(seed), bounds=False)
        found, _ = run(values)
        truth = active_set.verify(values, Options(), reference.solve(values, Options()))
        both = (found.status == Status.SOLVED) & (truth.status == Status.SOLVED)
        compared += both.sum()
        size = 1.0 + np.abs(truth.primal[both]).max(initial=0.0)
        np.testing.assert_allclose(found.primal[both], truth.primal[both], atol=1e-9 * size)
        assert not (found.status[truth.status == Status.INFEASIBLE] == Status.SOLVED).any()
    assert compared > 100


def test_kkt_systems() -> None:
    """On regular faces its own factor solves the system; elsewhere the dense face does."""
    rng = np.random.default_rng(0)
    regular = 0
    for kind, seed in CASES:
        values = as_values(kind(seed))
        result, _ = run(values)
        face = result.face
        assert isinstance(face, LeastNormFace)
        assert face.known is not None
        g, r = rng.standard_normal((values.batch, values.num_variables)), rng.standard_normal(values.rhs_rows.shape)
        s = rng.standard_normal((values.batch, len(values.bounded)))
        found = face.kkt_solve(g, r, s)
        for b in np.flatnonzero(face.known.regular & (result.status == Status.SOLVED)):
            hessian, rows = dense(values, b)
            held, bound = face.active_rows[b] != 0, face.active_bounds[b] != 0
            normals = np.concatenate([rows[held], np.eye(len(hessian))[values.bounded[bound]]])
            matrix = np.block([[hessian, normals.T], [normals, np.zeros((len(normals), len(normals)))]])
            truth = np.linalg.solve(matrix, np.concatenate([g[b], r[b, held], s[b, bound]]))
            n, k = len(hessian), int(held.sum())
            size = 1e-9 * np.linalg.cond(matrix) ** 0.5 * (1.0 + np.abs(truth).max())
            np.testing.assert_allclose(found.primal[b], truth[:n], atol=size)
            np.testing.assert_allclose(found.rows[b, held], truth[n : n + k], atol=size)
            np.testing.assert_allclose(found.bounds[b, bound], truth[n + k :], atol=size)
            assert not found.rows[b, ~held].any()
            assert not found.bounds[b, ~bound].any()
            regular += 1
    assert regular > 100


@pytest.mark.parametrize(
    ("hessian", "rhs", "reason"),
    [
        ([1.0, -1.0], [1.0, 1.0], "negative curvature"),
        ([1.0, 1.0], [np.nan, 1.0], "NaN"),
        ([1.0, 1.0], [1.0, -3.0], "no feasible point"),
        ([0.0, 1.0], [np.inf, np.inf], "unbounded"),
    ],
)
def test_what_has_no_solution_does_not_come_out(hessian: list[float], rhs: list[float], reason: str) -> None:
    rows = np.array([[[1.0, 1.0], [-1.0, -1.0]]])
    values = QPValues(
        np.diag(hessian)[None], np.array([[1.0, 0.5]]), rows, 0, np.array([rhs]), NONE, np.zeros((1, 0)),
        np.zeros((1, 0)), NONE,
    )  # fmt: skip
    result, unique = run(values)
    assert result.status[0] == Status.NOT_CONVERGED, reason
    assert np.isnan(result.primal).all()
    assert not unique.any()


def test_an_item_alone_and_in_a_batch() -> None:
    """The same bits, also beside items with other patterns."""
    rng = np.random.default_rng(3)
    batch, n, m = 6, 8, 5
    rows = rng.standard_normal((batch, m, n)) * (rng.random((batch, m, n)) < 0.5)
    factor = rng.standard_normal((batch, n, 4))
    values = QPValues(
        factor @ factor.mT, rng.standard_normal((batch, n)), rows, 1, 1.0 + rng.random((batch, m)), np.arange(n),
        np.full((batch, n), -2.0), np.full((batch, n), 2.0), NONE,
    )  # fmt: skip
    values.rhs_rows[:, 0] = 0.0
    whole, unique = run(values)
    assert (whole.status == Status.SOLVED).sum() >= 4
    for b in range(batch):
        alone, sure = run(values.take(np.array([b])))
        for one, all_of_them in (
            (alone.primal, whole.primal), (alone.rows, whole.rows), (alone.bounds, whole.bounds), (sure, unique)
        ):  # fmt: skip
            np.testing.assert_array_equal(one[0], all_of_them[b])


def test_the_optimum_of_least_norm_of_a_linear_program() -> None:
    """Minimise x1 over the unit box around (0, 2, 0, ...): x2 and x3 are free on it; the least ones are 1 and 0."""
    values = QPValues(
        np.zeros((1, 3)), np.array([[-1.0, 0.0, 0.0]]), np.zeros((1, 0, 3)), 0, np.zeros((1, 0)), np.arange(3),
        np.array([[-1.0, 1.0, -1.0]]), np.array([[1.0, 3.0, 2.0]]), NONE,
    )  # fmt: skip
    read = np.ones(3, dtype=bool)
    ((_, setup),) = Setups().of(values)
    result, unique = compiled_interior.solve(values, Options(), read, setup)
    assert result.status[0] == Status.SOLVED
    assert not unique[0]
    assert compiled_interior.select(values, Options(), read, setup, result, np.array([0])).all()
    np.testing.assert_allclose(result.primal, [[-1.0, 1.0, 0.0]], atol=1e-12)
    assert result.face is not None
    np.testing.assert_array_equal(result.face.active_bounds, [[-1, -1, 0]])


def test_patterns_are_found_again_and_copies_begin_without() -> None:
    values = as_values(random_case(1))
    setups = Setups()
    first, again = setups.of(values), setups.of(values)
    assert [setup for _, setup in first] == [setup for _, setup in again]
    assert all(one is other for (_, one), (_, other) in zip(first, again, strict=True))
    for copied in (copy.deepcopy(setups), pickle.loads(pickle.dumps(setups))):
        ((_, setup), *_) = copied.of(values)
        assert setup is not first[0][1]
        np.testing.assert_array_equal(setup.pattern.l_row, first[0][1].pattern.l_row)
    assert SOLVED == 1
