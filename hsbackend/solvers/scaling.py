"""Units in which the data of a problem have one size: ``x = D x'`` and every row times R, powers of two.

    H' = D H D,   a' = D a,   N' = R N D,   h' = R h,   lower' = lower / D,   upper' = upper / D

so that the largest entry of every row and column of ``[c H' N''; N' 0]`` is near one, where c makes the largest entry
of H' one: the unit of the objective says nothing about those of the variables. Nothing is rounded by it.

Source: Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices" (2001).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hsbackend.program import FloatArray, QPValues
from hsbackend.solvers.result import Result
from hsbackend.solvers.warm import WarmStart

_ROUNDS = 6
#: Ratio of the units of two columns, or of two rows, up to which data are left as they are.
_BALANCED = 32.0


def without_invalid(values: QPValues) -> tuple[QPValues, NDArray[np.bool_]]:
    """Return the problems with harmless numbers in the place of infinite ones and NaN, and which items have some."""
    batch = values.batch
    invalid = np.zeros(batch, dtype=bool)
    parts = {"hessian": values.hessian, "rhs_primal": values.rhs_primal, "rows": values.rows}
    limits = {"rhs_rows": values.rhs_rows, "lower": values.lower, "upper": values.upper}
    clean: dict[str, FloatArray] = {}
    for name, part in {**parts, **limits}.items():
        good = np.isfinite(part) if name in parts else ~np.isnan(part)
        if not good.all():
            clean[name] = np.where(good, part, 0.0)
            invalid |= np.broadcast_to(~np.all(good.reshape(part.shape[0], -1), axis=1), (batch,))
    return (replace(values, **clean) if clean else values), invalid


@dataclass(frozen=True)
class Scaling:
    """Units of a batch.

    Attributes:
        columns: (1 or B, n) D.
        rows: (1 or B, m) R.
    """

    columns: FloatArray
    rows: FloatArray

    @classmethod
    def of(cls, hessian: FloatArray, rows: FloatArray) -> Scaling | None:
        """Find the units; None where the data are balanced already.

        Args:
            hessian: (1 or B, n, n), or (1 or B, n) for a diagonal; finite.
            rows: (1 or B, m, n); finite.
        """
        count, n, m = max(len(hessian), len(rows)), rows.shape[2], rows.shape[1]
        columns, weights = np.ones((count, n)), np.ones((count, m))
        if not n:
            return None
        h, g = np.abs(hessian), np.abs(rows)
        for _ in range(_ROUNDS):
            scaled = g * weights[:, :, None] * columns[:, None, :]
            by_column = h * columns**2 if h.ndim == 2 else (h * columns[:, :, None]).max(axis=1) * columns
            cost = by_column.max(axis=1, keepdims=True)  # the unit of the objective is free
            by_column = by_column / np.where(cost > 0.0, cost, 1.0)
            by_column = np.maximum(by_column, scaled.max(axis=1, initial=0.0))
            by_row = scaled.max(axis=2, initial=0.0)
            columns = columns / np.sqrt(np.where(by_column > 0.0, by_column, 1.0))
            weights = weights / np.sqrt(np.where(by_row > 0.0, by_row, 1.0))
        largest = columns.max(axis=1, keepdims=True)
        columns, weights = columns / largest, weights * largest  # a common factor of the variables says nothing
        ratio = 1.0 / columns.min(axis=1)
        if m:
            some = np.where(g.any(axis=2), weights, np.nan)
            with np.errstate(all="ignore"):
                spread = np.fmax.reduce(some, axis=1) / np.fmin.reduce(some, axis=1)
            ratio = np.fmax(ratio, spread)
        if not np.any(ratio > _BALANCED):
            return None
        keep = (ratio > _BALANCED)[:, None]
        columns, weights = (np.exp2(np.rint(np.log2(np.where(keep, part, 1.0)))) for part in (columns, weights))
        return cls(columns, weights)

    def take(self, items: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Scaling:
        """Return the units of some items."""
        return Scaling(*(part if len(part) == 1 else part[items] for part in (self.columns, self.rows)))

    def matrices(self, hessian: FloatArray, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Write a Hessian, or its diagonal, and rows in these units."""
        columns, across = self.columns, self.columns[:, None, :]
        hessian = hessian * columns**2 if hessian.ndim == 2 else hessian * columns[:, :, None] * across
        return hessian, rows * self.rows[:, :, None] * across

    def apply(self, values: QPValues) -> QPValues:
        """Write problems in these units."""
        hessian, rows = self.matrices(values.hessian, values.rows)
        at = self.columns[:, values.bounded]
        return replace(
            values, hessian=hessian, rhs_primal=values.rhs_primal * self.columns, rows=rows,
            rhs_rows=values.rhs_rows * self.rows, lower=values.lower / at, upper=values.upper / at,
        )  # fmt: skip

    def start(self, warm: WarmStart | None) -> WarmStart | None:
        """Write first guesses in these units."""
        if warm is None:
            return None
        return replace(warm, primal=warm.primal / self.columns, multipliers=warm.multipliers / self.rows)

    def undo(self, values: QPValues, result: Result) -> Result:
        """Write a result in the units of the data; its face is left out."""
        at = self.columns[:, values.bounded]
        return replace(
            result, primal=result.primal * self.columns, rows=result.rows * self.rows, bounds=result.bounds / at,
            face=None,
        )  # fmt: skip

    def result(self, values: QPValues, result: Result) -> Result:
        """Write a result in these units; its face is left out."""
        at = self.columns[:, values.bounded]
        return replace(
            result, primal=result.primal / self.columns, rows=result.rows / self.rows, bounds=result.bounds * at,
            face=None,
        )  # fmt: skip
