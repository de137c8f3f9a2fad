"""Outcomes of a solve, one per batch item, and the errors the library raises.

An outcome is a value: solvers return an array of :class:`Status` codes, shape ``(B,)``, and nobody
raises for a single item until the caller asked for it (``on_failure="raise"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Status(IntEnum):
    """Outcome of one batch item. The docstring of a member is what the user should know about it."""

    SOLVED = 0
    """The returned point satisfies the KKT conditions within the requested tolerance."""
    INFEASIBLE = 1
    """No point satisfies the constraints; the conflicting rows are in the error message."""
    UNBOUNDED = 2
    """The objective decreases without bound on the feasible set."""
    INVALID_INPUT = 3
    """A parameter of this item holds NaN, or an infinity where a finite number is needed."""
    NOT_CONVERGED = 4
    """The requested tolerance was not reached: check the conditioning of the data or loosen ``tolerance``."""
    NOT_STRICTLY_CONVEX = 5
    """The Hessian of this item has negative curvature, or is singular and the solver asked for cannot take that."""
    CLOSEST = 6
    """Infeasible; the returned point solves the closest feasible problem (``on_failure="closest"``)."""

    @property
    def sentence(self) -> str:
        """Say in words what happened, in lower case, ready for ``item 3: ...``."""
        return _SENTENCES[self]


#: A message names this many conflicting rows at the most.
_MOST_ROWS = 6
#: And this many items.
NAMED_ITEMS = 10
_SENTENCES = {
    Status.SOLVED: "solved",
    Status.INFEASIBLE: "infeasible",
    Status.UNBOUNDED: "unbounded",
    Status.INVALID_INPUT: "the parameters hold NaN or infinity",
    Status.NOT_CONVERGED: "the requested tolerance was not reached; check the scaling of the data or loosen tolerance",
    Status.NOT_STRICTLY_CONVEX: (
        "the Hessian is not positive semidefinite, or not positive definite for the solver asked for"
    ),
    Status.CLOSEST: "infeasible, solved with the limits of the closest feasible problem",
}


class HSBackendError(Exception):
    """Base class of every error raised by hsbackend."""


class SolveError(HSBackendError, RuntimeError):
    """Some items of a batch have no solution.

    Attributes:
        status: ``(B,)`` int8 array of :class:`Status` codes of the whole batch.
    """

    def __init__(self, message: str, status: NDArray[np.int8]) -> None:
        """Keep the message and the status of every item."""
        super().__init__(message)
        self.status = status


class UnsupportedProblemError(HSBackendError, ValueError):
    """The problem is outside the class a solver was asked to handle; the message names what rules it out."""


class InvalidOptionError(HSBackendError, ValueError):
    """An option has an unknown name or a value outside its range; the message lists what is possible."""


def failure_message(status: NDArray[np.int8], conflicts: Mapping[int, Sequence[str]]) -> str:
    """Describe the failing items of a batch.

    Args:
        status: (B,) codes.
        conflicts: for infeasible items, the names of the rows that cannot hold together; for unbounded ones, the names
            of the variables that run off.

    Returns:
        ``"2 of 8 items failed: item 3: infeasible, row 4 and row 9 conflict; item 5: ..."``, ten items at most.
    """
    failing = np.flatnonzero((status != Status.SOLVED) & (status != Status.CLOSEST))
    parts: list[str] = []
    for item in failing[:NAMED_ITEMS]:
        text = f"item {item}: {Status(int(status[item])).sentence}"
        unbounded = status[item] == Status.UNBOUNDED
        rows = list(conflicts.get(int(item), ()))
        if len(rows) > _MOST_ROWS:
            rows = [
                *rows[: _MOST_ROWS - 1],
                f"{len(rows) - _MOST_ROWS + 1} more {'' if unbounded else 'rows'}".rstrip(),
            ]
        if len(rows) == 1:
            text += f", {rows[0]} {'runs off to infinity' if unbounded else 'cannot hold'}"
        elif rows:
            text += f", {', '.join(rows[:-1])} and {rows[-1]} {'run off to infinity' if unbounded else 'conflict'}"
        parts.append(text)
    more = f"; and {len(failing) - NAMED_ITEMS} more" if len(failing) > NAMED_ITEMS else ""
    return f"{len(failing)} of {len(status)} items failed: {'; '.join(parts)}{more}"
