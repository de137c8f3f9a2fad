"""The judge of quadratic programs: how well a point and its multipliers satisfy the optimality conditions.

It sees the original data and the returned numbers, nothing else. With multipliers y of the rows and w of the bounds,
positive where an upper limit holds and negative where a lower one does, the conditions are

    low <= A x <= high,  lower <= x <= upper                          (primal)
    P x + q + A'y + w = 0,  y and w zero where their limit is infinite (dual)
    x'Px + q'x + S(y, w) = 0                                          (gap)
    S(y, w) = high'y+ + low'y- + upper'w+ + lower'w-

Residuals are relative to 1 + the largest of the terms that should cancel, as in the termination criterion of Stellato
et al., "OSQP" (2020), section 3.4, with equal absolute and relative tolerance; its gap is that of OSQP 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsbackend.comparisons.qp_families import QPInstance

# The accuracy asked for, and what many would still call solved.
TOLERANCES = (1e-9, 1e-6)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What a contestant returned.

    Attributes:
        x: (n,).
        y: (m,) multipliers of the rows, positive at upper limits.
        w: (n,) multipliers of the bounds, likewise.
        status: in the words of the solver.
        claims: whether the solver says that this is a solution.
    """

    x: Array
    y: Array
    w: Array
    status: str
    claims: bool


@dataclass(frozen=True)
class Accuracy:
    """Relative residuals, infinite where a number is missing."""

    primal: float
    dual: float
    gap: float

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.primal, self.dual, self.gap)


NO_ANSWER = Accuracy(np.inf, np.inf, np.inf)


def judge_answer(instance: QPInstance, answer: Answer) -> Accuracy:
    """Return the relative residuals of an answer.

    Multipliers that push against an infinite limit are taken as zero, so that they show in the dual residual.

    Raises:
        ValueError: a shape does not fit the instance.
    """
    m, n = instance.shape
    for name, values, size in (("x", answer.x, n), ("y", answer.y, m), ("w", answer.w, n)):
        if values.shape != (size,):
            raise ValueError(f"{name} has shape {values.shape}, expected ({size},)")
    if not all(np.isfinite(values).all() for values in (answer.x, answer.y, answer.w)):
        return NO_ANSWER
    x = answer.x
    y = _admissible(answer.y, instance.low, instance.high)
    w = _admissible(answer.w, instance.lower, instance.upper)
    Ax, Px, Aty = instance.A @ x, instance.P @ x, instance.A.T @ y

    # Bounds are rows of the identity here; each limit that exists has its value and the nearest allowed one as terms.
    low, high = np.append(instance.low, instance.lower), np.append(instance.high, instance.upper)
    limited = np.isfinite(low) | np.isfinite(high)
    values = np.append(Ax, x)[limited]
    nearest = np.clip(values, low[limited], high[limited])
    primal = _relative(values - nearest, values, nearest)
    dual = _relative(Px + instance.q + Aty + w, Px, instance.q, Aty, w)
    quadratic, linear = float(x @ Px), float(instance.q @ x)
    support = _support(y, instance.low, instance.high) + _support(w, instance.lower, instance.upper)
    gap = abs(quadratic + linear + support) / (1.0 + max(abs(quadratic), abs(linear), abs(support)))
    return Accuracy(primal, dual, gap)


def _admissible(multipliers: Array, low: Array, high: Array) -> Array:
    """Return the multipliers with those of infinite limits set to zero."""
    least = np.where(np.isfinite(low), -np.inf, 0.0)
    most = np.where(np.isfinite(high), np.inf, 0.0)
    return np.clip(multipliers, least, most)


def _support(multipliers: Array, low: Array, high: Array) -> float:
    """Return high'y+ + low'y-; zero times an infinite limit is zero."""
    limits = np.where(multipliers > 0.0, high, low)
    used = multipliers != 0.0
    return float(multipliers[used] @ limits[used])


def _relative(residual: Array, *terms: Array) -> float:
    """Return |residual|_inf / (1 + the largest |term|_inf)."""
    largest = max((float(np.abs(term).max(initial=0.0)) for term in terms), default=0.0)
    return float(np.abs(residual).max(initial=0.0)) / (1.0 + largest)
