"""What one solve leaves for the next: active sets, multipliers and points, found again by item or by similarity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers.result import Result
from hsbackend.status import Status

#: Multiply-adds that the search for the nearest earlier item may cost; beyond it items are taken in turn.
_SEARCH = 200_000_000


@dataclass(frozen=True)
class WarmStart:
    """Solved problems of one structure, as first guesses for others; never changes an answer.

    Attributes:
        key: (P, n + m) right-hand sides of the problems.
        rows: (P, m) sides of the active rows.
        bounds: (P, nb) sides of the active bounds.
        multipliers: (P, m) of the general rows.
        primal: (P, n) solutions.
        items: (P,) position in the batch they came from.
        batch: size of that batch.
    """

    key: FloatArray
    rows: IndexArray
    bounds: IndexArray
    multipliers: FloatArray
    primal: FloatArray
    items: IndexArray
    batch: int

    @classmethod
    def of(cls, values: QPValues, result: Result) -> WarmStart | None:
        """Keep the solved items of a batch; None without any, or without a face."""
        items = np.flatnonzero(result.status == Status.SOLVED).astype(np.int64)
        if result.face is None or not len(items):
            return None
        sides = (result.face.active_rows[items], result.face.active_bounds[items])
        return cls(_key(values)[items], *sides, result.rows[items], result.primal[items], items, values.batch)

    def match(self, values: QPValues) -> WarmStart | None:
        """Choose one earlier problem for every item.

        In a batch of the same size an item begins where the item of its place ended; otherwise, and where that one had
        no solution, where the item with the nearest right-hand sides ended. None when the structure is another one.
        """
        key = _key(values)
        fits = key.shape[1] == self.key.shape[1] and values.rhs_rows.shape[1] == self.rows.shape[1]
        if not fits or len(values.bounded) != self.bounds.shape[1]:
            return None
        chosen = np.full(values.batch, -1, dtype=np.int64)
        if values.batch == self.batch:
            chosen[self.items] = np.arange(len(self.items))
        lost = np.flatnonzero(chosen < 0)
        if len(lost) * self.key.size > _SEARCH:
            chosen[lost] = lost % len(self.items)
        elif len(lost):
            # |k - p|^2 without the part that is the same for every p.
            distance = (self.key**2).sum(axis=1) - 2.0 * np.nan_to_num(key[lost]) @ self.key.T
            chosen[lost] = np.argmin(distance, axis=1)
        return WarmStart(
            key, self.rows[chosen], self.bounds[chosen], self.multipliers[chosen], self.primal[chosen],
            np.arange(values.batch), values.batch,
        )  # fmt: skip


def _key(values: QPValues) -> FloatArray:
    """Return what tells items apart: their right-hand sides, without infinities."""
    return np.nan_to_num(np.concatenate([values.rhs_primal, values.rhs_rows], axis=1), posinf=0.0, neginf=0.0)
