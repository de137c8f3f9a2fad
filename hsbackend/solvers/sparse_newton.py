"""Dual semismooth Newton method for one sparse program with a positive diagonal Hessian.

Bounds stay in the primal, so that the dual has one variable per row; it is maximised by proximal steps, each by a few
semismooth Newton steps whose linear systems conjugate gradients solve. No factorisation: memory O(n + nonzeros) and any
number of rows. The proximal term keeps the steps bounded where the multipliers are not unique (more active rows and
bounds than variables); what the right sets are is found after finitely many steps, and the last step on them is exact.

Source: Li, Sun and Toh (2020), see :mod:`hsbackend._sparse_newton_kernels`; Rockafellar, "Augmented Lagrangians
and applications of the proximal point algorithm in convex programming" (1976) for the outer steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsbackend._sparse_newton_kernels import newton
from hsbackend.program import FloatArray
from hsbackend.sparse_program import SparseValues

#: Newton steps; 20 to 80 are usual, more where multipliers are not unique.
MAX_STEPS = 300
#: Products with ``N N'`` per linear system.
MAX_PRODUCTS = 2000


@dataclass(frozen=True)
class NewtonOutcome:
    """What the method ended with.

    Attributes:
        solved: whether the residual of the rows is at rounding.
        primal: (n,) x.
        rows: (m,) multipliers.
        drift: (m,) the direction in which the multipliers moved last; without a feasible point it becomes a Farkas
            combination of the rows.
        steps: Newton steps.
        products: products with ``N N'``.
    """

    solved: bool
    primal: FloatArray
    rows: FloatArray
    drift: FloatArray
    steps: int
    products: int


def solve(values: SparseValues, tolerance: float, start: FloatArray | None = None) -> NewtonOutcome:
    """Solve ``minimise 1/2 x'Hx - a'x`` subject to sparse rows and bounds, H diagonal and positive.

    Args:
        values: the program; its rows have an entry each, its numbers are finite, infinite bounds apart.
        tolerance: natural residual of the rows at which the method ends, relative to their terms.
        start: (m,) first guess of the multipliers.
    """
    rows, h = values.rows, values.hessian
    squares = np.zeros(values.num_rows)
    np.add.at(squares, values.row_numbers, rows.data**2 / h[rows.indices])
    scale = 1.0 / np.sqrt(squares)
    entries = rows.data * scale[values.row_numbers]
    mu = np.zeros(values.num_rows) if start is None else start / scale
    mu[values.num_equalities :] = np.maximum(mu[values.num_equalities :], 0.0)
    x, residual, drift = np.empty(values.num_variables), np.empty(values.num_rows), np.zeros(values.num_rows)
    counts = np.zeros(2, dtype=np.int64)
    solved = newton(
        rows.indptr, rows.indices, entries, h, values.rhs_primal, values.rhs_rows * scale, values.lower, values.upper,
        values.num_equalities, tolerance, MAX_STEPS, MAX_PRODUCTS, mu, x, residual, drift, counts,
    )  # fmt: skip
    return NewtonOutcome(bool(solved), x, mu * scale, drift * scale, int(counts[0]), int(counts[1]))
