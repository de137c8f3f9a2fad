"""What every family of polyhedra offers: a projection and the KKT solve on its face.

A family is the problem

    minimise   1/2 sum_j h_j (x_j - v_j)^2
    subject to x in C(c, rhs, lower, upper)

for one shape of set C. Its solution has a *face*: integers that say which coordinates are held where and which rows are
active. On a face the KKT system

    [H  N'] [u]   [g]
    [N  0 ] [w] = [r]        N: the family's rows, and one row e_j' per held coordinate (multiplier ``wb_j``)

is solved in closed form, and that one operation is the tangent, the cotangent and the refinement (docs/theory.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

#: float32 or float64, the same for every array of a call.
Values = NDArray[Any]
Choice = Literal["active", "support"]

#: Relative amount by which constraints may contradict each other before an item counts as infeasible.
ALLOWANCE: Final = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-5}
_ABSENT: Final = {dtype: np.empty((1, 0), dtype) for dtype in ALLOWANCE}


def present(values: Values | None, dtype: np.dtype[Any]) -> Values:
    """Return contiguous values, or the array of shape (1, 0) that stands for None in kernels."""
    return _ABSENT[dtype] if values is None else np.ascontiguousarray(values)


@dataclass(frozen=True)
class FamilySolution:
    """Projections of a batch of points.

    Attributes:
        primal: (B, n) x in the dtype of the point, NaN where an item has no solution.
        multipliers: (B, m) of the family's rows, with ``h_j (x_j - v_j) + (N'nu)_j = 0`` on free coordinates; NaN where
            an item has no solution.
        face: (B, k) integers, meaning by family; zero where an item has no solution.
        status: (B,) int8 codes of :class:`hsbackend.status.Status`.
    """

    primal: Values
    multipliers: Values
    face: NDArray[Any]
    status: NDArray[np.int8]

    @classmethod
    def empty(
        cls, point: Values, rows: int, face_width: int, face_dtype: type[np.signedinteger[Any]]
    ) -> FamilySolution:
        """Return arrays to be filled, for points (B, n)."""
        batch = len(point)
        return cls(
            np.empty(point.shape, point.dtype), np.empty((batch, rows), point.dtype),
            np.empty((batch, face_width), face_dtype), np.empty(batch, np.int8),
        )  # fmt: skip


@dataclass(frozen=True)
class FamilyKKT:
    """Solution of the KKT system on a face.

    Attributes:
        primal: (B, n) u.
        rows: (B, m) w, zero on rows that are not active.
        bounds: (B, n) wb, zero on coordinates that are not held.
    """

    primal: Values
    rows: Values
    bounds: Values

    @classmethod
    def empty(cls, rhs_primal: Values, rows: int) -> FamilyKKT:
        """Return arrays to be filled, for right-hand sides (B, n)."""
        shape, dtype = rhs_primal.shape, rhs_primal.dtype
        return cls(np.empty(shape, dtype), np.empty((shape[0], rows), dtype), np.empty(shape, dtype))


class Family(Protocol):
    """The two functions of a family module. A leading dimension of 1 means "the same for every item"."""

    def solve(
        self, point: Values, weight: Values | None, coefficients: Values | None, rhs: Values,
        lower: Values | None, upper: Values | None, shape: tuple[int, ...], choice: Choice,
    ) -> FamilySolution:  # fmt: skip
        """Project.

        Args:
            point: (B, n) v, C-contiguous.
            weight: (1 or B, n) h > 0, None for ones.
            coefficients: (1 or B, n) c, None for ones; only families with a weighted row use them.
            rhs: (1 or B, p) right-hand sides, meaning by family.
            lower: (1 or B, n), None for -inf; only families with bounds use them.
            upper: (1 or B, n), None for inf.
            shape: (n,), or (k1, k2) with ``k1 k2 = n`` for matrix families.
            choice: which K of the Han-Sun set the face holds: every active row, or those with a multiplier.
        """
        ...

    def kkt(
        self, face: NDArray[Any], primal: Values, weight: Values | None, coefficients: Values | None,
        rhs_primal: Values, rhs_rows: Values | None, rhs_bounds: Values | None, shape: tuple[int, ...],
    ) -> FamilyKKT:  # fmt: skip
        """Solve the KKT system of the module docstring.

        Args:
            face: (B, k) from :meth:`solve`.
            primal: (B, n) from :meth:`solve`; only its signs are used, and only by the l1 ball.
            weight: as in :meth:`solve`.
            coefficients: as in :meth:`solve`.
            rhs_primal: (B, n) g.
            rhs_rows: (B, m) r, None for zero; entries of inactive rows are ignored.
            rhs_bounds: (B, n) r on held coordinates, None for zero; entries of free coordinates are ignored.
            shape: as in :meth:`solve`.
        """
        ...
