"""The face of a singular Hessian: its compiled factorisation against the formula with dense pseudo-inverses."""

from __future__ import annotations

import numpy as np
import pytest

from hsbackend.face import LeastNormFace
from hsbackend.program import QPValues


def formula(hessian, normals, weights, g, r):
    """Return u and w of the docstring of ``LeastNormFace``, M the diagonal matrix of the weights."""
    n = len(hessian)
    pseudo = np.linalg.pinv(normals, rcond=1e-10) if len(normals) else np.zeros((n, 0))
    rank = np.linalg.matrix_rank(normals, 1e-9) if len(normals) else 0
    basis = np.linalg.svd(normals, full_matrices=True)[2][rank:].T if len(normals) else np.eye(n)
    inner = basis.T @ hessian @ basis
    inner[np.abs(inner) < 1e-12] = 0.0
    curvature, vectors = np.linalg.eigh(inner)
    null = basis @ vectors[:, curvature <= 1e-11 * np.abs(np.diag(hessian)).max(initial=1e-300)]
    seen = weights[:, None] * null
    seen[np.abs(seen) < 1e-12] = 0.0
    select = np.eye(n) - null @ np.linalg.pinv(seen, rcond=1e-10) @ np.diag(weights)
    inverse = basis @ np.linalg.pinv(inner, rcond=1e-11, hermitian=True) @ basis.T
    point = pseudo @ r
    point = point + inverse @ (select.T @ g - hessian @ point)
    return select @ point, pseudo.T @ (select.T @ g - hessian @ point)


@pytest.mark.parametrize("spread", [0, 9])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_least_norm_face_against_the_formula(diagonal: bool, shared: bool, every: bool, spread: int) -> None:
    """Also with columns in other units, 2^-spread to 2^spread, where the formula is taken in units that fit."""
    rng = np.random.default_rng([diagonal, shared, every])
    ranks = set()
    for trial in range(60):
        batch, n, m = 3, int(rng.integers(1, 9)), int(rng.integers(0, 7))
        bounded = np.sort(rng.choice(n, int(rng.integers(0, n + 1)), replace=False)).astype(np.int64)
        own = 1 if shared else batch
        root = rng.normal(size=(own, n, int(rng.integers(0, n + 1))))
        hessian = root @ root.transpose(0, 2, 1)
        if diagonal:
            hessian = rng.uniform(0.5, 2.0, (own, n)) * (rng.random((own, n)) < 0.6)
        rows = rng.normal(size=(own, m, n)) * (rng.random((own, m, n)) < 0.8)
        if m > 3 and trial % 2:  # dependent ones
            rows[:, 1], rows[:, 3] = 2.0 * rows[:, 0], rows[:, 0] - 3.0 * rows[:, 2]
        units = 2.0 ** rng.integers(-spread, spread + 1, size=n)  # x = units * (what the formula sees)
        read = np.ones(n, dtype=bool) if every else rng.random(n) < 0.7
        none = np.zeros((batch, len(bounded)))
        values = QPValues(
            hessian / units**2 if diagonal else hessian / units[:, None] / units, np.zeros((batch, n)), rows / units, 0,
            np.zeros((batch, m)), bounded, none, none, np.zeros(0, dtype=np.int64),
        )  # fmt: skip
        side_rows = (rng.random((batch, m)) < 0.6).astype(np.int64)
        side_bounds = rng.integers(-1, 2, size=none.shape).astype(np.int64)
        face = LeastNormFace(values, side_rows, side_bounds, read)
        g, r, r_bounds = rng.normal(size=(batch, n)) * read, rng.normal(size=(batch, m)), rng.normal(size=none.shape)
        found = face.kkt_solve(g / units, r, r_bounds * units[bounded])
        for b in range(batch):
            item = hessian[0 if shared else b]
            active, at = np.flatnonzero(side_rows[b]), np.flatnonzero(side_bounds[b])
            normals = np.concatenate([rows[0 if shared else b][active], np.eye(n)[bounded[at]]])
            right = np.concatenate([r[b, active], r_bounds[b, at]])
            dependence = len(normals) - np.linalg.matrix_rank(normals) if len(normals) else 0
            ranks.add(dependence)
            if dependence and spread:
                continue  # least squares and least norm depend on the units
            u, w = formula(np.diag(item) if diagonal else item, normals, read * units, g[b], right)
            mine = np.concatenate([found.rows[b, active], found.bounds[b, at] * units[bounded[at]]])
            error = np.abs(found.primal[b] / units - u)[read].max(initial=0.0)
            assert error <= 1e-8 * (1.0 + np.abs(u).max(initial=0.0)) * 4.0**spread
            np.testing.assert_allclose(mine, w, atol=1e-8 * (1.0 + np.abs(w).max(initial=0.0)) * 4.0**spread)
        assert not found.rows[side_rows == 0].any()
        assert not found.bounds[side_bounds == 0].any()
    assert len(ranks) > 1  # dependent rows were among them


def test_least_norm_face_keeps_invalid_items_apart() -> None:
    hessian = np.stack([np.eye(3), np.full((3, 3), np.nan)])
    none, empty = np.zeros(0, dtype=np.int64), np.zeros((2, 0))
    values = QPValues(hessian, np.zeros((2, 3)), np.ones((1, 1, 3)), 1, np.ones((2, 1)), none, empty, empty, none)
    face = LeastNormFace(
        values, np.ones((2, 1), dtype=np.int64), np.zeros((2, 0), dtype=np.int64), np.ones(3, dtype=bool)
    )
    found = face.kkt_solve(np.zeros((2, 3)), np.ones((2, 1)), empty)
    np.testing.assert_allclose(found.primal[0], 1.0 / 3.0)
    assert np.isnan(found.primal[1]).all()
    assert list(face.free_directions()) == [0, 0]
