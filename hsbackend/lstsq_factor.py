"""A start for the solves of a derivative with one dense matrix: by the Cholesky factor of its smaller Gram matrix.

    G = A'A + damp^2 I (tall):   L(A, b) = G^-1 A'b,      L(A', g) = A G^-1 g
    H = A A' + damp^2 I (wide):  L(A, b) = A'H^-1 b,      L(A', g) = H^-1 A g

LSMR goes on from there and decides whether this is a solution: a step or two in well-conditioned problems, more where
the squared condition has cost digits. The start is in the row space, so that the minimum norm is kept; a Gram matrix
that is nearly singular is not used.

A factor takes ``max(m, n) min(m, n)^2`` multiply-adds at the speed of matrix products, a step two matrix-vector
products at the speed of memory. Which is less is known in a backward pass: the forward pass has counted its steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: A step is worth this many rows of the smaller side. Measured on one core with 2000 x 500 and 4000 x 1000 matrices:
#: matrix products are about 12 times as fast per multiply-add as matrix-vector products, of which a step has two.
_ROWS_PER_STEP = 24
#: Smallest eigenvalue of the Gram matrix, relative to its trace, that is taken for full rank: 1e-5 in singular values.
_FULL_RANK = 1e-10


class Factor(NamedTuple):
    """A factored Gram matrix.

    Attributes:
        key: what it was made of.
        cholesky: (k, k) lower, None where the Gram matrix is (nearly) singular.
    """

    key: tuple[object, ...]
    cholesky: Tensor | None


def worth_it(rows: int, columns: int, steps: int) -> bool:
    """Whether a factor costs less than a solve of so many steps."""
    return min(rows, columns) < _ROWS_PER_STEP * steps


def factor(matrix: Tensor, damp: float, known: Factor | None) -> Factor:
    """Factor the smaller Gram matrix of (m, n), if it is not the one that is known."""
    key = (matrix.data_ptr(), matrix._version, tuple(matrix.shape), matrix.dtype, damp)
    if known is not None and known.key == key:
        return known
    gram = matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT
    gram.diagonal().add_(damp**2)
    cholesky, info = torch.linalg.cholesky_ex(gram)
    if bool(info != 0):
        return Factor(key, None)
    # Inverse iteration: from above, and within a small factor after three steps from a vector of no special kind.
    vector = torch.linspace(1.0, 2.0, len(gram), dtype=gram.dtype, device=gram.device).cos_().unsqueeze(-1)
    for _ in range(3):
        vector = torch.cholesky_solve(vector / torch.linalg.vector_norm(vector), cholesky)
    smallest = 1.0 / torch.linalg.vector_norm(vector)
    enough = max(_FULL_RANK, 100.0 * torch.finfo(gram.dtype).eps)
    return Factor(key, cholesky if bool(smallest > enough * gram.trace()) else None)


def start(matrix: Tensor, cholesky: Tensor, rhs: Tensor, transposed: bool) -> Tensor:
    """Return ``L(A, rhs)``, or ``L(A', rhs)``, for (..., m) or (..., n)."""

    def solved(vectors: Tensor) -> Tensor:
        flat = vectors.reshape(vectors.shape[:-1].numel(), vectors.shape[-1])
        return torch.cholesky_solve(flat.mT, cholesky).mT.reshape(vectors.shape)

    tall = matrix.shape[0] >= matrix.shape[1]
    if transposed:
        return solved(rhs) @ matrix.mT if tall else solved(rhs @ matrix.mT)
    return solved(rhs @ matrix) if tall else solved(rhs) @ matrix
