"""The judge: measures what a contestant returned against the reference, by formulas of its own.

It sees numbers only: the returned primal and the gradients for a given cotangent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from hsbackend.comparisons.problems import BenchmarkProblem
from hsbackend.comparisons.reference import ItemQP, Reference, kkt_residual

# An item is solved when it is feasible and agrees with the reference to this, relative to max(1, |.|).
SUCCESS_TOLERANCE = 1e-6
# Gradients of a correct contestant agree to this. An accurate primal is not enough: diffcp solves its adjoint system by
# LSQR and QPLayer a regularised one, and both end between 1e-6 and 1e-3 on most of the suite.
GRADIENT_TOLERANCE = 1e-3
# The same solution with fewer digits, as opposed to another point: lets less accurate peers keep their time. SCS at
# its default accuracy of 1e-4 leaves 1e-3 to 1e-2 in the primal, a dropped bound 1e-1 and more.
ROUGH_TOLERANCE = 1e-2
ROUGH_GRADIENT_TOLERANCE = 0.1

Array = NDArray[np.float64]


class Grade(Enum):
    """What an answer is worth."""

    CORRECT = "correct"
    """Every item within SUCCESS_TOLERANCE, every gradient within GRADIENT_TOLERANCE."""
    ROUGH = "rough"
    """Every item within ROUGH_TOLERANCE, the typical gradient within ROUGH_GRADIENT_TOLERANCE: fewer digits."""
    WRONG = "wrong"
    """Some item is another point, or the gradients are those of something else."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of one contestant on one problem.

    Attributes:
        success_rate: fraction of items that are solved, in [0, 1].
        primal_residual: worst violation of a constraint (rows of inequalities and bounds of unit length), absolute;
            None where the truth is a closed form.
        kkt_residual: worst residual of the KKT conditions at the returned primal with the reference's multipliers;
            None where the truth is a closed form.
        primal_error: worst distance to the reference primal, infinity norm relative to max(1, |reference|).
        gradient_error: per parameter, the largest relative error over judged items, see `gradient_errors`.
        typical_gradient_error: of the worst parameter, see the function of that name.
        judged_items: how many items had a unique gradient to compare with.
        batch: B.
        grade: what this amounts to.
    """

    success_rate: float
    primal_residual: float | None
    kkt_residual: float | None
    primal_error: float
    gradient_error: dict[str, float]
    typical_gradient_error: float
    judged_items: int
    batch: int
    grade: Grade

    @property
    def worst_gradient_error(self) -> float:
        """The largest of `gradient_error`; 0 when no gradient was compared."""
        return max(self.gradient_error.values(), default=0.0)


def primal_residual(item: ItemQP, x: Array) -> float:
    """Return the largest violation of A x = b and C x <= d, absolute, infinity norm."""
    equality = np.abs(item.A @ x - item.b).max(initial=0.0)
    inequality = np.maximum(item.C @ x - item.d, 0.0).max(initial=0.0)
    return float(np.maximum(equality, inequality))


def gradient_errors(returned: Array, expected: Array, *, batched: bool) -> Array:
    """Return the relative error of a gradient, (B,) for batched parameters, (1,) for shared ones.

    error_i = |returned_i - expected_i|_inf / max(|expected_i|_inf, mean_j |expected_j|_inf)

    The mean keeps items whose gradient is zero, such as a projection that ends in a vertex, from dividing by nothing.
    """
    difference, size = _difference_and_size(returned, expected, batched=batched)
    scale = np.maximum(size, size.mean())
    errors = np.divide(difference, scale, out=np.where(difference > 0, np.inf, 0.0), where=scale > 0)
    return np.where(np.isnan(difference), np.inf, errors)


def typical_gradient_error(returned: Array, expected: Array, *, batched: bool) -> float:
    """Return the median of |returned_i - expected_i|_inf / |expected_i|_inf over items with a gradient worth the name.

    A gradient that is wrong by a factor shows here as that factor, whatever the sizes of the others.
    """
    difference, size = _difference_and_size(returned, expected, batched=batched)
    # Below a thousandth of the mean a gradient is zero up to rounding, and its relative error says nothing.
    counted = size > 1e-3 * size.mean()
    if not counted.any():
        return 0.0
    ratio = float(np.median(difference[counted] / size[counted]))
    return float("inf") if np.isnan(ratio) else ratio


def _difference_and_size(returned: Array, expected: Array, *, batched: bool) -> tuple[Array, Array]:
    """Return |returned_i - expected_i|_inf and |expected_i|_inf per item; a shared parameter is one item."""
    if returned.shape != expected.shape:
        raise ValueError(f"gradient has shape {returned.shape}, expected {expected.shape}")
    rows = expected.shape[0] if batched else 1
    size = np.abs(expected).reshape(rows, -1).max(axis=1)
    return np.abs(returned - expected).reshape(rows, -1).max(axis=1), size


def judge(problem: BenchmarkProblem, reference: Reference, primal: Array, gradients: dict[str, Array]) -> Verdict:
    """Judge a returned primal (B, n) and the gradients for `reference.cotangent`.

    Args:
        problem: what was asked.
        reference: from `compute_reference(problem)`.
        primal: (B, n).
        gradients: per differentiated parameter, its shape; sums over the batch for shared parameters.

    Raises:
        ValueError: a shape is not the reference's.
    """
    if primal.shape != reference.primal.shape:
        raise ValueError(f"primal has shape {primal.shape}, expected {reference.primal.shape}")
    residuals = np.array([primal_residual(item, x) for item, x in zip(reference.items, primal, strict=True)])
    optimality = np.array(
        [
            kkt_residual(item, x, solution.y, solution.z)
            for item, x, solution in zip(reference.items, primal, reference.solutions, strict=True)
        ]
    )
    errors = _primal_errors(primal, reference.primal)
    limits = np.array([max(1.0, np.abs(np.concatenate([item.b, item.d])).max(initial=0.0)) for item in reference.items])
    # A NaN compares false, so an item that is not a number is not solved.
    solved = (errors <= SUCCESS_TOLERANCE) & (residuals <= SUCCESS_TOLERANCE * limits)
    roughly_solved = (errors <= ROUGH_TOLERANCE) & (residuals <= ROUGH_TOLERANCE * limits)

    gradient_error: dict[str, float] = {}
    typical: list[float] = []
    judged = reference.is_judged
    if judged.any():
        for i in problem.differentiated():
            parameter = problem.parameters[i]
            returned, expected = gradients[parameter.name], reference.gradients[parameter.name]
            if parameter.batched and returned.shape == expected.shape:
                returned, expected = returned[judged], expected[judged]
            errors_by_item = gradient_errors(returned, expected, batched=parameter.batched)
            gradient_error[parameter.name] = float(errors_by_item.max())
            typical.append(typical_gradient_error(returned, expected, batched=parameter.batched))
    worst_typical = max(typical, default=0.0)
    return Verdict(
        success_rate=float(solved.mean()),
        primal_residual=_worst(residuals),
        kkt_residual=_worst(optimality),
        primal_error=_worst(errors),
        gradient_error=gradient_error,
        typical_gradient_error=worst_typical,
        judged_items=int(judged.sum()),
        batch=problem.batch,
        grade=_grade(solved, roughly_solved, max(gradient_error.values(), default=0.0), worst_typical),
    )


def judge_projection(name: str, expected: Array, expected_gradient: Array, primal: Array, gradient: Array) -> Verdict:
    """Judge a returned primal (B, n) and the gradient of one batched parameter by known answers alone.

    Raises:
        ValueError: a shape is not that of the answer.
    """
    if primal.shape != expected.shape:
        raise ValueError(f"primal has shape {primal.shape}, expected {expected.shape}")
    errors = _primal_errors(primal, expected)
    solved, roughly_solved = errors <= SUCCESS_TOLERANCE, errors <= ROUGH_TOLERANCE
    worst = float(gradient_errors(gradient, expected_gradient, batched=True).max())
    typical = typical_gradient_error(gradient, expected_gradient, batched=True)
    return Verdict(
        success_rate=float(solved.mean()),
        primal_residual=None,
        kkt_residual=None,
        primal_error=_worst(errors),
        gradient_error={name: worst},
        typical_gradient_error=typical,
        judged_items=expected.shape[0],
        batch=expected.shape[0],
        grade=_grade(solved, roughly_solved, worst, typical),
    )


def _primal_errors(primal: Array, expected: Array) -> Array:
    """Return |primal_i - expected_i|_inf / max(1, |expected_i|_inf), (B,)."""
    return np.abs(primal - expected).max(axis=1) / np.maximum(1.0, np.abs(expected).max(axis=1))


def _grade(
    solved: NDArray[np.bool_], roughly_solved: NDArray[np.bool_], worst_gradient_error: float, worst_typical: float
) -> Grade:
    """Return the grade, see `Grade`."""
    if solved.all() and worst_gradient_error <= GRADIENT_TOLERANCE:
        return Grade.CORRECT
    if roughly_solved.all() and worst_typical <= ROUGH_GRADIENT_TOLERANCE:
        return Grade.ROUGH
    return Grade.WRONG


def _worst(values: Array) -> float:
    """Return the maximum, infinity if anything is not a number."""
    return float("inf") if np.isnan(values).any() else float(values.max(initial=0.0))
