"""One quadratic program with sparse data, and the check of its KKT conditions.

    minimise 1/2 x'Hx - a'x   subject to   N x = h (first num_equalities rows), N x <= h, lower <= x <= upper

as in :class:`hsbackend.program.QPValues`, for one item, with memory O(n + nonzeros). Vectors have one axis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from hsbackend._sparse_kernels import kkt_residual
from hsbackend.program import FloatArray, IndexArray


def compressed(matrix: Any) -> Any:
    """Return a matrix as a csr array with sorted columns and 32-bit indices, which is what the kernels are made for."""
    csr = sp.csr_array(matrix, dtype=np.float64)
    csr.sum_duplicates()
    for name in ("indptr", "indices"):
        setattr(csr, name, getattr(csr, name).astype(np.int32, copy=False))
    return csr


@dataclass(frozen=True)
class SparseValues:
    """Numbers of one sparse program.

    Attributes:
        hessian: (n,) diagonal of H, or (n, n) scipy csr array with both triangles.
        rhs_primal: (n,) the vector a = -q.
        rows: (m, n) scipy csr array N; every place at most once.
        num_equalities: number of equality rows, which come first.
        rhs_rows: (m,) the vector h; inf on an inequality row means that there is no such row.
        lower: (n,), may hold -inf.
        upper: (n,), may hold inf.
    """

    hessian: Any
    rhs_primal: FloatArray
    rows: Any
    num_equalities: int
    rhs_rows: FloatArray
    lower: FloatArray
    upper: FloatArray

    @property
    def num_variables(self) -> int:
        """Number of variables n."""
        return len(self.rhs_primal)

    @property
    def num_rows(self) -> int:
        """Number of rows m."""
        return len(self.rhs_rows)

    @property
    def diagonal(self) -> bool:
        """Whether H is given by its diagonal."""
        return isinstance(self.hessian, np.ndarray)

    @cached_property
    def curvature(self) -> FloatArray:
        """(n,) the diagonal of H."""
        return self.hessian if self.diagonal else np.asarray(self.hessian.diagonal(), dtype=np.float64)

    @cached_property
    def hessian_matrix(self) -> Any:
        """H as a csr array."""
        return compressed(sp.diags_array(self.hessian)) if self.diagonal else self.hessian

    @cached_property
    def row_numbers(self) -> IndexArray:
        """(nnz,) the row of every entry of N."""
        return np.repeat(np.arange(self.num_rows), np.diff(self.rows.indptr))

    def times_hessian(self, x: FloatArray) -> FloatArray:
        """Return ``H x``."""
        return self.hessian * x if self.diagonal else self.hessian @ x

    def residual(self, primal: FloatArray, rows: FloatArray, bounds: FloatArray) -> float:
        """Return the largest relative violation of the KKT conditions, NaN where a number is not finite.

        The measure is that of the dense solvers (:mod:`hsbackend.solvers._verify_kernels`): every component is
        compared with the sum of the magnitudes of its own terms and 1e-2 of the largest such sum, in balanced units.

        Args:
            primal: (n,) x.
            rows: (m,) multipliers of the rows.
            bounds: (n,) signed multipliers of the bounds, positive at the upper one.
        """
        matrix, normals = self.hessian_matrix, self.rows
        return float(
            kkt_residual(
                matrix.indptr, matrix.indices, matrix.data, np.ascontiguousarray(self.curvature),
                normals.indptr, normals.indices, normals.data, self.num_equalities, self.rhs_primal, self.rhs_rows,
                self.lower, self.upper, primal, rows, bounds,
            )
        )  # fmt: skip

    def without_rows(self, keep: NDArray[np.bool_]) -> SparseValues:
        """Return the program with some of its rows."""
        index = np.flatnonzero(keep)
        equalities = int(np.count_nonzero(keep[: self.num_equalities]))
        return replace(
            self, rows=compressed(self.rows[index]), num_equalities=equalities, rhs_rows=self.rhs_rows[index]
        )
