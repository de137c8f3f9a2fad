"""Names and parameters of the sets that specialised code can project on, apart from any library's spelling of them.

A problem that carries one says: the primal is the Euclidean projection of its only parameter, the point, on this set.
`tests/comparisons/test_families_suite.py` checks that the set, the cvxpy model and the matrices are the same problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Simplex:
    """{x >= 0, sum(x) = radius}, x (n,)."""

    n: int
    radius: float


@dataclass(frozen=True)
class Budget:
    """{lower <= x <= upper, coefficients'x = total}, coefficients (n,) positive: a continuous knapsack."""

    coefficients: Array
    total: float
    lower: float
    upper: float


@dataclass(frozen=True)
class L1Ball:
    """{sum(|x|) <= radius}, x (n,)."""

    n: int
    radius: float


@dataclass(frozen=True)
class Birkhoff:
    """{X >= 0, X 1 = 1, X'1 = 1}, X (side, side): doubly stochastic matrices."""

    side: int


@dataclass(frozen=True)
class Monotone:
    """{x_1 <= x_2 <= ... <= x_n}."""

    n: int


@dataclass(frozen=True)
class BoxWithRows:
    """{A x = b, G x <= h, lower <= x <= upper}: no name of its own, but few rows."""

    A: Array
    b: Array
    G: Array
    h: Array
    lower: Array
    upper: Array


NamedSet = Simplex | Budget | L1Ball | Birkhoff | Monotone | BoxWithRows
