"""The families beyond the sizes of the kernels: torch operations, run on the CPU here, against the CPU kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hsbackend.cuda import large
from hsbackend.families import budget, l1, transport


def tensors(*values: Any) -> list[Any]:
    return [None if value is None else torch.tensor(value) for value in values]


@pytest.mark.parametrize("choice", ["active", "support"])
@pytest.mark.parametrize("kind", ["simplex", "capped", "weighted", "far", "l1"])
def test_budget(kind: str, choice: Any) -> None:
    rng = np.random.default_rng(0)
    batch, n = 3, 9000
    v = rng.normal(size=(batch, n)) * (1e6 if kind == "far" else 1.0)
    h = np.exp(rng.normal(size=(1, n))) if kind == "weighted" else None
    c = rng.normal(size=(1, n)) if kind == "weighted" else None
    lower = None if kind == "l1" else np.zeros((1, n))
    upper = np.full((1, n), 0.01) if kind in ("capped", "weighted") else None
    rhs = np.full((1, 1), 5.0) if kind == "l1" else np.array([[1.0, 1.0]])
    found = large.budget(*tensors(v, h, c, rhs, lower, upper), choice, l1=kind == "l1")
    wanted = (l1 if kind == "l1" else budget).solve(v, h, c, rhs, lower, upper, (n,), choice)
    np.testing.assert_array_equal(found[3], wanted.status)
    np.testing.assert_array_equal(found[2], wanted.face)
    np.testing.assert_allclose(found[0], wanted.primal, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1], wanted.multipliers, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (20, 30), (70, 66)])
def test_transport(shape: tuple[int, int], weighted: bool) -> None:
    rng = np.random.default_rng(1)
    n, m = shape[0] * shape[1], sum(shape)
    v = rng.normal(size=(2, n))
    h = np.exp(rng.normal(size=(2, n))) if weighted else None
    rhs = np.concatenate([np.full((1, shape[0]), shape[1]), np.full((1, shape[1]), shape[0])], 1) / 2.0
    found = large.transport(*tensors(v, h, rhs), shape, "active")
    wanted = transport.solve(v, h, None, rhs, None, None, shape, "active")
    np.testing.assert_array_equal(found[3], wanted.status)
    np.testing.assert_array_equal(found[2], wanted.face)
    np.testing.assert_allclose(found[0], wanted.primal, rtol=0, atol=1e-12 * shape[1])
    np.testing.assert_allclose(found[1], wanted.multipliers, rtol=0, atol=1e-11 * shape[1])
    g, r, rb = rng.normal(size=(2, n)), rng.normal(size=(2, m)), rng.normal(size=(2, n))
    mine = large.transport_kkt(found[2], found[0], *tensors(h, g, r, rb), shape)
    theirs = transport.kkt(wanted.face, wanted.primal, h, None, g, r, rb, shape)
    for part, other in zip(mine, (theirs.primal, theirs.rows, theirs.bounds), strict=True):
        np.testing.assert_allclose(part, other, rtol=0, atol=1e-10)


def test_components_of_a_face_are_solved_one_by_one() -> None:
    """The identity as a face: one component per entry, and a right-hand side that none of them meets."""
    face = np.eye(3, dtype=np.int8).reshape(1, 9)
    x = np.eye(3).reshape(1, 9)
    rng = np.random.default_rng(2)
    g, r = rng.normal(size=(1, 9)), rng.normal(size=(1, 6))
    mine = large.transport_kkt(*tensors(face, x, None, g, r, None), (3, 3))
    theirs = transport.kkt(face, x, None, None, g, r, None, (3, 3))
    for part, other in zip(mine, (theirs.primal, theirs.rows, theirs.bounds), strict=True):
        np.testing.assert_allclose(part, other, rtol=0, atol=1e-13)


def test_failures() -> None:
    v = np.ones((4, 6))
    v[1, 0] = np.nan
    v[3] = -np.inf
    rhs = np.repeat([[1.0, 1.0, 1.0, 1.5, 1.5]], 4, axis=0)
    rhs[2, 0] = 2.0
    status = large.transport(*tensors(v, None, rhs), (3, 2), "active")[3]
    assert status.tolist() == [0, 3, 1, 1]
