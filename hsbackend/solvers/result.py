"""What goes into a solver and what comes out, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hsbackend.face import Face
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.status import Status


@dataclass(frozen=True)
class Options:
    """Accuracy and outputs of a solve.

    Attributes:
        tolerance: largest accepted KKT residual relative to the data; items above it are NOT_CONVERGED.
        jacobian: ``"active"`` (K = all rows at their limit) or ``"support"`` (K = rows with a multiplier).
        active_tolerance: rows this close to their limit, relative to ``1 + |limit|`` and measured in the norm of the
            Hessian, count as active for ``jacobian="active"``.
        keep_face: whether the caller will differentiate.
        multipliers: whether the caller will read the multipliers.
        keep_warm: whether the caller will start another solve from this one.
    """

    tolerance: float = 1e-9
    jacobian: Literal["active", "support"] = "active"
    active_tolerance: float = 1e-10
    keep_face: bool = True
    multipliers: bool = True
    keep_warm: bool = False

    @property
    def inner_tolerance(self) -> float:
        """Violation at which the solvers stop; far below ``tolerance`` because the last step is exact anyway."""
        return min(1e-12, self.tolerance)


@dataclass(frozen=True)
class Result:
    """Solutions of a batch.

    Attributes:
        primal: (B, n), NaN where an item is not solved.
        rows: (B, m) multipliers of the general rows; for an infeasible item the Farkas combination.
        bounds: (B, nb) signed multipliers of the bounds, positive at the upper limit.
        status: (B,) int8 codes of :class:`~hsbackend.status.Status`.
        steps: (B,) iterations.
        face: None when it was not asked for.
        non_unique: (B,) whether a variable that is read has more than one optimal value; None for "nowhere".
        delicate: (B,) whether the item needed other units or another solver; None for "nowhere".
    """

    primal: FloatArray
    rows: FloatArray
    bounds: FloatArray
    status: NDArray[np.int8]
    steps: IndexArray
    face: Face | None
    non_unique: NDArray[np.bool_] | None = None
    delicate: NDArray[np.bool_] | None = None

    @classmethod
    def failed(cls, values: QPValues, status: Status) -> Result:
        """Return a result in which every item has the same failure."""
        batch = values.batch
        return cls(
            np.full((batch, values.num_variables), np.nan),
            np.full((batch, values.rows.shape[1]), np.nan),
            np.full((batch, len(values.bounded)), np.nan),
            np.full(batch, int(status), dtype=np.int8),
            np.zeros(batch, dtype=np.int64),
            None,
        )

    def take(self, items: IndexArray) -> Result:
        """Return the results of some items, without a face."""
        return Result(
            self.primal[items], self.rows[items], self.bounds[items], self.status[items], self.steps[items], None
        )

    def put(self, items: IndexArray, found: Result) -> None:
        """Overwrite the numbers of some items, in place; steps add up."""
        self.primal[items], self.rows[items], self.bounds[items] = found.primal, found.rows, found.bounds
        self.status[items] = found.status
        self.steps[items] += found.steps
