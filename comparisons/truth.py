"""What a problem's answers are judged by: the QP reference where that is affordable, closed forms on a sample beyond.

- Up to 1,024 variables: the reference of `reference`, with KKT residuals. Above: `closed_forms`, without.
- Up to 1,024 items: all of them. Above: the first 64, since every item is drawn and solved alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsbackend.comparisons.closed_forms import has_closed_form, project
from hsbackend.comparisons.judge import Verdict, judge, judge_projection
from hsbackend.comparisons.problems import BenchmarkProblem
from hsbackend.comparisons.reference import Reference, compute_reference

LARGEST_QP = 1024
LARGEST_BATCH = 1024
SAMPLE = 64

Array = NDArray[np.float64]


class Truth(Protocol):
    """Knows the answer to one problem.

    Attributes:
        cotangent: (B, n), what the judged call has to pull back: the problem's own, with zeros in items whose gradient
            is not unique.
    """

    @property
    def cotangent(self) -> Tensor: ...

    def verdict(self, primal: Array, gradients: dict[str, Array]) -> Verdict:
        """Judge a returned primal (B, n) and the gradients, by parameter, for `cotangent`."""
        ...


def find_truth(problem: BenchmarkProblem) -> Truth:
    """Return the truth about a problem.

    Raises:
        ValueError: the problem is too large for the QP reference and its set has no closed form.
    """
    sample = problem if problem.batch <= LARGEST_BATCH else problem.head(SAMPLE)
    size = problem.cotangent.shape[1]
    truth: Truth
    if size <= LARGEST_QP:
        truth = _QPTruth(sample, compute_reference(sample))
    elif has_closed_form(problem.named_set):
        truth = _ClosedFormTruth(sample)
    else:
        raise ValueError(
            f"{problem.name} has {size} variables, more than the {LARGEST_QP} the QP reference is meant for, and no "
            "closed form"
        )
    return truth if sample is problem else _SampleTruth(problem, sample.batch, truth)


@dataclass(frozen=True)
class _QPTruth:
    """The reference of a QP, item by item."""

    problem: BenchmarkProblem
    reference: Reference

    @property
    def cotangent(self) -> Tensor:
        return self.reference.cotangent

    def verdict(self, primal: Array, gradients: dict[str, Array]) -> Verdict:
        return judge(self.problem, self.reference, primal, gradients)


class _ClosedFormTruth:
    """Projections by formula; the points are drawn from a continuous distribution, so every gradient is unique."""

    def __init__(self, problem: BenchmarkProblem) -> None:
        (point,) = problem.parameters
        if problem.named_set is None:
            raise ValueError(f"{problem.name} names no set")
        forms = [project(problem.named_set, v) for v in point.value.cpu().numpy()]
        self.cotangent = problem.cotangent
        self._name = point.name
        self._primal = np.stack([form.primal for form in forms])
        self._gradient = np.stack([form.vjp(g) for form, g in zip(forms, problem.cotangent.cpu().numpy(), strict=True)])

    def verdict(self, primal: Array, gradients: dict[str, Array]) -> Verdict:
        return judge_projection(self._name, self._primal, self._gradient, primal, gradients[self._name])


class _SampleTruth:
    """The truth about the first items, asked about all of them."""

    def __init__(self, problem: BenchmarkProblem, items: int, truth: Truth) -> None:
        self.cotangent = torch.cat([truth.cotangent, problem.cotangent[items:]])
        self._items = items
        self._truth = truth

    def verdict(self, primal: Array, gradients: dict[str, Array]) -> Verdict:
        head = {name: gradient[: self._items] for name, gradient in gradients.items()}
        return self._truth.verdict(primal[: self._items], head)
