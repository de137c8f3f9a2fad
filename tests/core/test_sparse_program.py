"""The check of one sparse program is that of the dense solvers, and the memory of a factor is counted right."""

import numpy as np
import pytest
import scipy.sparse as sp

from hsbackend._sparse_kernels import factor_entries
from hsbackend.program import QPValues
from hsbackend.solvers import active_set
from hsbackend.sparse_program import SparseValues, compressed


def random_values(rng: np.random.Generator, kind: str) -> tuple[SparseValues, QPValues]:
    n, m, me = 9, 7, 3
    rows = rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.4) * 10.0 ** rng.integers(-2, 3, m)[:, None]
    root = rng.standard_normal((n, n)) * (rng.random((n, n)) < 0.3)
    diagonal = rng.random(n) * 10.0 ** rng.integers(-2, 3, n)
    if kind == "flat":
        diagonal[: n // 2] = 0.0
    matrix = root @ root.T if kind == "matrix" else np.diag(diagonal)
    linear, rhs = rng.standard_normal(n), rng.standard_normal(m)
    rhs[-1] = np.inf
    lower, upper = rng.random(n) - 2.0, rng.random(n) + 1.0
    lower[0], upper[1] = -np.inf, np.inf
    hessian = compressed(matrix) if kind == "matrix" else diagonal
    sparse = SparseValues(hessian, linear, compressed(rows), me, rhs, lower, upper)
    none = np.zeros(0, dtype=np.int64)
    dense = QPValues(
        matrix[None], linear[None], rows[None], me, rhs[None], np.arange(n), lower[None], upper[None], none
    )  # fmt: skip
    return sparse, dense


@pytest.mark.parametrize("kind", ["diagonal", "flat", "matrix"])
@pytest.mark.parametrize("seed", range(8))
def test_the_residual_is_that_of_the_dense_check(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sparse, dense = random_values(rng, kind)
    x, nu = rng.standard_normal(sparse.num_variables), rng.standard_normal(sparse.num_rows)
    nu[-1] = 0.0
    bounds = np.where(rng.random(len(x)) < 0.5, rng.standard_normal(len(x)), 0.0)
    bounds[:2] = 0.0
    wanted = active_set.residuals(dense, x[None], nu[None], bounds[None])[2][0]
    assert sparse.residual(x, nu, bounds) == pytest.approx(wanted, rel=1e-12)


def test_nan_does_not_pass() -> None:
    sparse, _ = random_values(np.random.default_rng(0), "diagonal")
    zeros = np.zeros(sparse.num_variables), np.zeros(sparse.num_rows), np.zeros(sparse.num_variables)
    for place in range(3):
        point = [part.copy() for part in zeros]
        point[place][0] = np.nan
        assert np.isnan(sparse.residual(*point))


def test_a_multiplier_of_an_absent_limit_is_a_violation() -> None:
    nothing, one = compressed(sp.csr_array((0, 1))), np.ones(1)
    values = SparseValues(one, one, nothing, 0, np.zeros(0), -np.inf * one, np.inf * one)
    assert values.residual(np.zeros(1), np.zeros(0), np.ones(1)) > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_factor_entries_are_those_of_a_cholesky_factor(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pattern = rng.random((25, 25)) < 0.08
    pattern = pattern | pattern.T | np.eye(25, dtype=bool)
    filled = pattern.copy()
    for k in range(25):  # elimination, symbolically
        below = np.flatnonzero(filled[k + 1 :, k]) + k + 1
        filled[np.ix_(below, below)] = True
    matrix = sp.csr_array(pattern.astype(float))
    count = int(np.tril(filled).sum())
    assert factor_entries(matrix.indptr, matrix.indices, 10_000) == count
    assert factor_entries(matrix.indptr, matrix.indices, 30) == 31
