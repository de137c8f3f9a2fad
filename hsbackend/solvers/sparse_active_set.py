"""Primal-dual active set method for one sparse program with a positive definite Hessian that is not diagonal.

Rows and bounds are guessed active or not, the KKT system on this face is solved by one sparse factorisation, and the
guess is corrected by all wrong signs at once: a row is active where ``w_i + c (N x - h)_i > 0``. This is a semismooth
Newton method for the KKT conditions. It ends after few steps or not at all: where a guess comes back, or the limit of
steps is reached, the interior-point method takes over. What it ends with is exact, and its last factor is that of the
face.

Source: Hintermueller, Ito and Kunisch, "The primal-dual active set strategy as a semismooth Newton method" (2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsbackend.program import FloatArray
from hsbackend.sparse_face import FaceSolveError, SparseFace
from hsbackend.sparse_program import SparseValues

#: Steps; 5 to 20 are usual where the method works at all.
MAX_STEPS = 40


@dataclass(frozen=True)
class ActiveSetOutcome:
    """A point whose signs are all right.

    Attributes:
        primal: (n,) x.
        rows: (m,) multipliers.
        bounds: (n,) signed multipliers of the bounds.
        face: on which it was found.
        steps: factorisations.
    """

    primal: FloatArray
    rows: FloatArray
    bounds: FloatArray
    face: SparseFace
    steps: int


def solve(values: SparseValues) -> ActiveSetOutcome | None:
    """Solve ``minimise 1/2 x'Hx - a'x`` subject to rows and bounds; None where the method does not end.

    Args:
        values: the program; its numbers are finite, absent limits apart, and ``lower <= upper``.
    """
    me = values.num_equalities
    equality = np.arange(values.num_rows) < me
    finite = np.isfinite(values.rhs_rows)
    right = np.where(finite, values.rhs_rows, 0.0)
    fixed = values.lower == values.upper
    # Units in which a slack times the curvature is a force, as in a projection.
    curvature = values.curvature
    weight = np.zeros(values.num_rows)
    np.add.at(weight, values.row_numbers, values.rows.data**2 / curvature[values.rows.indices])
    weight = np.where(weight > 0.0, 1.0 / np.where(weight > 0.0, weight, 1.0), 0.0)
    held, side = equality.copy(), np.where(fixed, 1, 0)
    seen: set[int] = set()
    for step in range(1, MAX_STEPS + 1):
        key = hash((held.tobytes(), side.astype(np.int8).tobytes()))
        if key in seen:
            return None
        seen.add(key)
        limits = np.where(side > 0, values.upper, np.where(side < 0, values.lower, 0.0))
        face = SparseFace(values, held, side)
        try:
            x, nu, pull = face.kkt_solve(values.rhs_primal, right, limits)
        except (FaceSolveError, RuntimeError):
            return None
        slack = values.rows @ x - values.rhs_rows
        new_held = equality | (finite & (nu + weight * np.where(finite, slack, 0.0) > 0.0))
        above, below = pull + curvature * (x - values.upper) > 0.0, pull + curvature * (x - values.lower) < 0.0
        new_side = np.where(fixed | above, 1, np.where(below, -1, 0))
        if np.array_equal(new_held, held) and np.array_equal(new_side, side):
            nu[me:] = np.maximum(nu[me:], 0.0)
            return ActiveSetOutcome(x, nu, pull, face, step)
        held, side = new_held, new_side
    return None
