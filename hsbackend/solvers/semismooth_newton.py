"""Batched dual semismooth Newton method for a diagonal Hessian with bounds and a moderate number of other rows.

Flies where hundreds of bounds are active (simplex, box with a budget, portfolio, doubly stochastic matrices), because
bounds cost nothing there; items it has not finished in ``MAX_STEPS`` steps go to the active set, which must not fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp

from hsbackend._parallel import for_each_item, gather
from hsbackend.face import BoxFace, Face
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers import active_set
from hsbackend.solvers._newton_kernels import newton_items
from hsbackend.solvers.result import Options, Result
from hsbackend.solvers.warm import WarmStart
from hsbackend.status import Status

#: Items that need more are degenerate, infeasible or ill-conditioned; measured: portfolio and simplex need at most 12.
MAX_STEPS = 30


class NewtonSetup:
    """Column structure of the rows, found once.

    Args:
        pattern: (m, n) boolean scipy matrix of the entries that can be non-zero.
        bounded: (nb,) variables with limits.
    """

    def __init__(self, pattern: Any, bounded: IndexArray) -> None:
        """Compress by columns."""
        csc = sp.csc_array(pattern)
        csc.sort_indices()
        self.columns: IndexArray = csc.indptr.astype(np.int64)
        self.row_index: IndexArray = csc.indices.astype(np.int64)
        self.column_index: IndexArray = np.repeat(np.arange(csc.shape[1]), np.diff(csc.indptr)).astype(np.int64)
        self.bounded = bounded
        self.bounded_at: IndexArray = np.full(csc.shape[1], -1, dtype=np.int64)
        self.bounded_at[bounded] = np.arange(len(bounded))
        self._entries: FloatArray | None = None

    @property
    def work(self) -> float:
        """Multiply-adds of one assembly of the Newton matrix."""
        return float(np.sum(np.diff(self.columns).astype(np.float64) ** 2) / 2)

    def entries(self, rows: FloatArray, constant: bool) -> FloatArray:
        """Return the entries of N in column order, (1 or B, nnz)."""
        if not constant:
            return np.ascontiguousarray(rows[:, self.row_index, self.column_index])
        if self._entries is None:
            self._entries = np.ascontiguousarray(rows[:, self.row_index, self.column_index])
        return self._entries


def solve(
    values: QPValues,
    options: Options,
    setup: NewtonSetup,
    constant_rows: bool,
    gram_setup: Callable[[], active_set.GramSetup | None],
    warm: WarmStart | None = None,
) -> Result:
    """Solve a batch of problems with a positive diagonal Hessian.

    Args:
        values: the problems; ``values.hessian`` is (1 or B, n).
        options: tolerances and what to keep.
        setup: column structure of the rows.
        constant_rows: whether ``values.rows`` is the same in every call.
        gram_setup: gives the active set's constant data when an item has to go there.
        warm: first guesses, one per item.
    """
    batch, n = values.batch, values.num_variables
    m = values.rhs_rows.shape[1]
    entries = setup.entries(values.rows, constant_rows)
    lower = np.full((batch, n), -np.inf)
    upper = np.full((batch, n), np.inf)
    lower[:, values.bounded] = values.lower
    upper[:, values.bounded] = values.upper
    primal = np.empty((batch, n))
    multipliers = np.zeros((batch, m)) if warm is None else warm.multipliers.copy()
    status = np.zeros(batch, dtype=np.int8)
    steps = np.zeros(batch, dtype=np.int64)
    free = np.zeros((batch, n), dtype=bool)
    side = np.zeros((batch, n), dtype=np.int64)
    side_rows = np.zeros((batch, m), dtype=np.int64)
    order = np.zeros((batch, m), dtype=np.int64)
    count = np.zeros(batch, dtype=np.int64)
    offset = np.zeros(batch, dtype=np.int64)
    arguments: tuple[Any, ...] = (
        setup.columns, setup.row_index, entries, values.hessian, values.rhs_primal, values.rhs_rows, lower, upper,
        values.num_equalities, options.inner_tolerance, MAX_STEPS, options.jacobian == "support",
        options.active_tolerance, options.keep_face, primal, multipliers, status, steps, free, side_rows, side,
        order, count, offset,
    )  # fmt: skip
    work = 10.0 * (setup.work + 4 * len(setup.row_index) + 8 * n)
    stores = for_each_item(newton_items, batch, work, *arguments)

    failed = status != Status.SOLVED
    primal[failed] = 0.0  # of no use, and perhaps not finite
    gradient = values.rhs_primal - values.hessian * primal
    filled = np.flatnonzero(np.diff(setup.columns))
    if len(filled):
        gradient[:, filled] -= np.add.reduceat(entries * multipliers[:, setup.row_index], setup.columns[filled], axis=1)
    bound_multipliers = np.ascontiguousarray(gradient[:, values.bounded])
    side_bounds = np.ascontiguousarray(side[:, values.bounded])
    at_limit = (primal[:, values.bounded] == values.lower) | (primal[:, values.bounded] == values.upper)
    bound_multipliers[~at_limit] = 0.0
    face: Face | None = None
    if options.keep_face:
        face = BoxFace(
            setup.columns, setup.row_index, entries, values.hessian, free, setup.bounded_at,
            gather(stores, offset), offset, order, count, side_rows, side_bounds,
        )  # fmt: skip
    result = Result(primal, multipliers, bound_multipliers, status, steps, face)
    return active_set.finish(values, options, result, gram_setup)
