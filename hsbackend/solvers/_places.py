"""Where the columns and rows of independent blocks lie in the program, and how numbers get there and back.

A group of G alike blocks becomes a batch of ``B G`` items. Its columns are a selection of the program's, its rows the
program's up to scale, each perhaps expressed by several parallel rows of which one counts on the active side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.solvers.result import Result
from hsbackend.status import Status
from hsbackend.structure import Group

#: Equal rows may contradict each other by this much, relative to the right-hand side: rounding of their scaling.
_CONSISTENT = 1e-9


@dataclass(frozen=True)
class Limits:
    """Bounds of the reduced program that no parameter moves.

    Attributes:
        lower, upper: (nb,) their values; meaningless where they vary.
        lower_varies, upper_varies: (nb,).
    """

    lower: FloatArray
    upper: FloatArray
    lower_varies: NDArray[np.bool_]
    upper_varies: NDArray[np.bool_]


@dataclass(frozen=True)
class Structure:
    """What the adaptors need to know about the reduced program, constant between calls.

    Attributes:
        num_variables, num_equalities: its size.
        bounded: (nb,) bounded variables, increasing.
        limits: its constant bounds.
        rhs_varies, rhs_constant: (m,) of the rows that are not bounds.
        pattern: (m, n) boolean scipy matrix.
        diagonal: whether the Hessian is diagonal.
        flat: (n,) variables without curvature.
        constant_matrices: whether neither Hessian nor rows depend on parameters.
    """

    num_variables: int
    num_equalities: int
    bounded: IndexArray
    limits: Limits
    rhs_varies: NDArray[np.bool_]
    rhs_constant: FloatArray
    pattern: Any
    diagonal: bool
    flat: NDArray[np.bool_]
    constant_matrices: bool


class Columns:
    """Where the variables of a group lie in the program, and their bounds."""

    def __init__(self, group: Group, num_variables: int, bounded: IndexArray, limits: Limits) -> None:
        self.count, self.size = group.variables.shape
        self.index = group.variables.ravel()
        self._whole = np.array_equal(self.index, np.arange(num_variables))
        bounded_at = np.full(num_variables, -1, dtype=np.int64)
        bounded_at[bounded] = np.arange(len(bounded))
        position = bounded_at[self.index]
        self.has = np.flatnonzero(position >= 0)
        self.position = position[self.has]
        self._all_bounds = np.array_equal(self.position, np.arange(len(bounded))) and len(self.has) == len(self.index)
        self._lower = self._constant(limits.lower, limits.lower_varies, limits.upper, limits.upper_varies, -np.inf)
        self._upper = self._constant(limits.upper, limits.upper_varies, limits.lower, limits.lower_varies, np.inf)

    def _constant(
        self, values: FloatArray, varies: NDArray[np.bool_], others: FloatArray, others_vary: NDArray[np.bool_],
        fill: float,
    ) -> FloatArray | None:  # fmt: skip
        """Return constant limits (G, n); None when they vary or may cross the other side."""
        at = self.position
        if varies[at].any() or (~others_vary[at] & ((values[at] - others[at]) * np.sign(fill) < 0.0)).any():
            return None
        found = np.full(len(self.index), fill)
        found[self.has] = values[at]
        return found.reshape(self.count, self.size)

    def take(self, array: FloatArray) -> FloatArray:
        """Return (B G, n) of (B, all)."""
        picked = array if self._whole else array[:, self.index]
        return np.ascontiguousarray(picked).reshape(-1, self.size)

    def put(self, part: FloatArray, out: FloatArray) -> None:
        """Write (B G, n) into (B, all)."""
        out[:, slice(None) if self._whole else self.index] = part.reshape(out.shape[0], -1)

    def take_bounds(self, array: FloatArray) -> FloatArray:
        """Return (B G, n) of an array on the bounded variables, zero elsewhere."""
        if self._all_bounds:
            return array.reshape(-1, self.size)
        out = np.zeros((array.shape[0], len(self.index)))
        out[:, self.has] = array[:, self.position]
        return out.reshape(-1, self.size)

    def put_bounds(self, part: NDArray[Any], out: NDArray[Any]) -> None:
        """Write (B G, n) into an array on the bounded variables."""
        flat = part.reshape(out.shape[0], -1)
        if self._all_bounds:
            out[...] = flat
        else:
            out[:, self.position] = flat[:, self.has]

    def repeat(self, constant: FloatArray, batch: int) -> FloatArray:
        """Return constants (G, n) as (1, n) where the blocks agree, or (B G, n)."""
        if self.count == 1 or bool(np.all(constant == constant[0])):
            return np.ascontiguousarray(constant[:1])
        return np.tile(constant, (batch, 1))

    def _limits(self, constant: FloatArray | None, values: FloatArray, fill: float) -> FloatArray | None:
        if constant is not None:
            return None if np.all(constant == fill) else self.repeat(constant, values.shape[0])
        if self._all_bounds:
            return values.reshape(-1, self.size)
        out = np.full((values.shape[0], len(self.index)), fill)
        out[:, self.has] = values[:, self.position]
        return out.reshape(-1, self.size)

    def limits(self, values: QPValues) -> tuple[FloatArray | None, FloatArray | None]:
        """Return lower and upper limits, (1 or B G, n) or None where there are none."""
        return self._limits(self._lower, values.lower, -np.inf), self._limits(self._upper, values.upper, np.inf)

    def hessian(self, values: QPValues) -> tuple[float, FloatArray | None]:
        """Return the diagonal Hessian as ``factor * weight``, weight (1 or B G, n) or None for ones."""
        diagonal = values.hessian if values.diagonal else np.einsum("bii->bi", values.hessian)
        picked = diagonal[:, self.index]
        if picked.shape[0] > 1:
            return 1.0, np.ascontiguousarray(picked).reshape(-1, self.size)
        first = float(picked[0, 0])
        if first > 0.0 and np.all(picked == first):
            return first, None
        return 1.0, self.repeat(picked.reshape(self.count, self.size), values.batch)


class Rows:
    """The rows of a group's family among those of the program: parallel candidates, scaled."""

    def __init__(self, group: Group, num_equalities: int) -> None:
        self.count, self.size, self.width = group.rows.shape
        self.rows = group.rows
        self.scale = group.scale
        self.equality = (group.rows >= 0) & (group.rows < num_equalities)
        self.plain = self.width == 1
        self._upward = self.equality | ((group.rows >= 0) & (group.scale > 0.0))
        self._downward = self.equality | ((group.rows >= 0) & (group.scale < 0.0))
        self._simple_up = self.plain and bool(self._upward.all())
        self._simple_down = self.plain and bool(self._downward.all())

    def ratio(self, rhs: FloatArray) -> FloatArray:
        """Return right-hand sides in units of the family's rows, (B, G, C, R)."""
        return rhs[:, np.maximum(self.rows, 0).ravel()].reshape(-1, *self.rows.shape) / self.scale

    def interval(self, rhs: FloatArray) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
        """Return low and high (B G, C) of every row, and which items (B G,) have rows that contradict each other."""
        ratio = self.ratio(rhs)
        shape = (-1, self.size)
        if self.plain:
            high = ratio[..., 0] if self._simple_up else np.where(self._upward, ratio, np.inf)[..., 0]
            low = ratio[..., 0] if self._simple_down else np.where(self._downward, ratio, -np.inf)[..., 0]
        else:
            high = np.where(self._upward, ratio, np.inf).min(axis=3)
            low = np.where(self._downward, ratio, -np.inf).max(axis=3)
        high, low = high.reshape(shape), low.reshape(shape)
        if self.plain:
            return low, high, np.zeros(len(low), dtype=bool)
        crossing = low > high
        close = crossing & (low - high <= _CONSISTENT * (1.0 + np.abs(np.where(crossing, high, 0.0))))
        middle = np.where(close, 0.5 * (low + high), 0.0)
        return np.where(close, middle, low), np.where(close, middle, high), np.any(crossing & ~close, axis=1)

    def choose(self, rhs: FloatArray, side: NDArray[Any]) -> IndexArray | None:
        """Return for each row of the family the candidate (B, G, C) that holds it on its active side; None if plain."""
        if self.plain:
            return None
        ratio = self.ratio(rhs)
        up = np.where(self._upward, ratio, np.inf).argmin(axis=3)
        down = np.where(self._downward, ratio, -np.inf).argmax(axis=3)
        return np.where(side.reshape(up.shape) < 0, down, up)

    def put(self, part: FloatArray, chosen: IndexArray | None, out: FloatArray) -> None:
        """Write multipliers (B G, C) of the family's rows to the rows of the program."""
        batch = out.shape[0]
        if chosen is None:
            out[:, self.rows.ravel()] = part.reshape(batch, -1) / self.scale.ravel()
            return
        item, g, c = np.indices(chosen.shape)
        out[item, self.rows[g, c, chosen]] = part.reshape(chosen.shape) / self.scale[g, c, chosen]

    def take(self, rhs: FloatArray, chosen: IndexArray | None) -> FloatArray:
        """Return a right-hand side (B G, C) on the rows chosen."""
        ratio = self.ratio(rhs)
        picked = ratio[..., 0] if chosen is None else np.take_along_axis(ratio, chosen[..., None], axis=3)[..., 0]
        return np.ascontiguousarray(picked).reshape(-1, self.size)


def merge_status(status: NDArray[np.int8], result: Result) -> None:
    """Carry the status (B G,) of blocks to their items: invalid input first, any other failure as NOT_CONVERGED."""
    if not status.any():
        return
    blocks = status.reshape(len(result.status), -1)
    failed = (blocks != Status.SOLVED).any(axis=1)
    invalid = (blocks == Status.INVALID_INPUT).any(axis=1)
    result.status[failed & (result.status == Status.SOLVED)] = Status.NOT_CONVERGED
    result.status[invalid] = Status.INVALID_INPUT
