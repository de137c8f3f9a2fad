"""Small programs for the tests of the core: q and b are parameters, the rest constant unless None."""

from __future__ import annotations

import numpy as np

from generators import Case
from hsbackend.program import Program


def dense_program(hessian: np.ndarray | None, rows: np.ndarray, equalities: int) -> Program:
    """Return a program with a constant Hessian, or with the Hessian as its first parameter."""
    n, m = rows.shape[1], rows.shape[0]
    free = frozenset("qb") if hessian is not None else frozenset("Qqb")
    matrix = np.eye(n) if hessian is None else hessian
    case = Case(
        matrix[None], np.zeros((1, n)), rows[None], np.zeros((1, m)), equalities, np.zeros((1, n)), np.zeros((1, m)),
        np.zeros(1, dtype=bool),
    )  # fmt: skip
    return case.program(free)


def box_program(rows: np.ndarray, equalities: int) -> Program:
    """Return a projection on a box with further rows: rows, then x <= upper, then -x <= -lower."""
    n = rows.shape[1]
    return dense_program(np.eye(n), np.concatenate([rows, np.eye(n), -np.eye(n)]), equalities)
