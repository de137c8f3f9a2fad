"""Maps from parameters to data, and the batched products, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from generators import random_case
from hsbackend import batched
from hsbackend.differentiate import Call, Layer, Output, SolveFunction
from hsbackend.plan import Plan
from hsbackend.program import AffineMap, MatrixEntries
from hsbackend.solvers.result import Options


@pytest.mark.parametrize("counts", [(1, 1), (4, 1), (1, 4), (4, 4)], ids=str)
def test_an_affine_map_is_its_matrix(counts: tuple[int, int]) -> None:
    """Shared and batched parameters in any mixture; entries with several terms, one term, none."""
    rng = np.random.default_rng(0)
    sizes = (5, 3)
    dense = rng.normal(size=(9, 9)) * (rng.random((9, 9)) < 0.3)
    dense[0] = 0.0
    values = [rng.normal(size=(count, size)) for count, size in zip(counts, sizes, strict=True)]
    batch = max(counts)
    whole = np.concatenate([np.broadcast_to(v, (batch, v.shape[1])) for v in values] + [np.ones((batch, 1))], axis=1)
    result = AffineMap(sp.csr_array(dense), sizes).evaluate(values, batch)
    np.testing.assert_allclose(result, whole @ dense.T, atol=1e-14)


def test_the_identity_is_not_copied_and_not_written_to() -> None:
    size = 6
    plain = AffineMap(sp.csr_array(np.eye(size, size + 1)), (size,))
    parameter = np.random.default_rng(0).normal(size=(3, size))
    assert plain.evaluate([parameter], 3) is parameter
    scaled = AffineMap(sp.csr_array(2.0 * np.eye(size, size + 1)), (size,))
    assert scaled.identity is None
    assert AffineMap(sp.csr_array(np.eye(size, size + 1)[::-1]), (size,)).identity is None
    assert plain.evaluate([parameter[:1]], 3).shape == (3, size)
    for seed in range(20):
        case = random_case(seed, per_item=True)
        data = case.parameters(frozenset("QqAb"))
        before = [value.copy() for value in data]
        plan = Plan(case.program(frozenset("QqAb")))
        solution = plan.solve(data, Options())
        plan.adjoint(solution, np.ones(case.primal.shape), None)
        for old, new in zip(before, data, strict=True):
            np.testing.assert_array_equal(old, new)


def test_changing_a_parameter_in_place_before_the_backward_pass_is_refused() -> None:
    case = random_case(4, per_item=True)
    n = case.shape[1]
    free = frozenset("QqAb")
    layer = Layer(Plan(case.program(free)), [Output("primal", np.arange(n), (n,))])
    data = [torch.tensor(value) for value in case.parameters(free)]
    data[1].requires_grad_()
    (x,) = SolveFunction.apply(layer, Call(Options(), "raise"), (True,) * 4, torch.float64, *data)
    data[0].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_equal_places_add_up() -> None:
    entries = MatrixEntries(
        (2, 2), np.array([0, 0, 1]), np.array([1, 1, 0]), AffineMap(sp.csr_array(np.eye(3, 4)), (3,))
    )  # fmt: skip
    np.testing.assert_array_equal(entries.dense([np.array([[1.0, 2.0, 5.0]])]), [[[0, 3], [5, 0]]])


def test_a_map_of_the_wrong_width_says_so() -> None:
    with pytest.raises(ValueError, match="the map has 3 columns, expected 5"):
        AffineMap(sp.csr_array((2, 3)), (4,))


@pytest.mark.parametrize(("batch", "k", "n"), [(1, 1, 1), (3, 5, 7), (6, 13, 4), (2, 0, 3), (40, 33, 21)])
def test_products_against_numpy(batch: int, k: int, n: int) -> None:
    rng = np.random.default_rng(batch)
    for count in {1, batch}:
        m = rng.normal(size=(count, k, n))
        v, x = rng.normal(size=(batch, k)), rng.normal(size=(batch, n))
        w, base = rng.uniform(size=(batch, k)), rng.normal(size=(1, n, n))
        base = base + base.transpose(0, 2, 1)
        full = np.broadcast_to(m, (batch, k, n))
        np.testing.assert_allclose(batched.vecmat(v, m), np.einsum("bk,bkn->bn", v, full), atol=1e-12)
        np.testing.assert_allclose(batched.matvec(m, x), np.einsum("bkn,bn->bk", full, x), atol=1e-12)
        wanted = np.einsum("bkn,bk,bkp->bnp", full, w, full) + base
        found = batched.weighted_gram(m, w, base)
        np.testing.assert_allclose(np.broadcast_to(found, wanted.shape), wanted, atol=1e-12)
        equal = batched.weighted_gram(m, np.full((1, k), 2.0))
        np.testing.assert_allclose(equal, 2.0 * np.einsum("bkn,bkp->bnp", m, m), atol=1e-12)
        if n > 1:
            tail = m[:, :, 1:]
            np.testing.assert_allclose(
                batched.gram_of_columns(np.ascontiguousarray(m), 1), np.einsum("bkn,bkp->bnp", tail, tail), atol=1e-12
            )
