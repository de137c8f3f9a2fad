"""Which code computes a family on the device: a Triton kernel, or torch operations beyond the sizes of the kernels.

    family      kernel                                     beyond
    budget, l1  solve: n <= 8192; kkt: any n               bracketing and Newton's method in torch operations
    monotone    any n                                      -
    transport   max(k1, k2) <= 64                          semismooth Newton in torch operations

Both give what :mod:`hsbackend.families` gives, as tensors on the device of the point, and none waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from hsbackend.families.family import Choice
from hsbackend.status import UnsupportedProblemError

if TYPE_CHECKING:
    from torch import Tensor

#: Largest sizes of the kernels.
LONGEST_ROW = 8192
LARGEST_MATRIX = 64


@cache
def _module(name: str) -> ModuleType:
    """Import a module of kernels when it is first used, and Triton with it."""
    try:
        return import_module(f"hsbackend.cuda.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise UnsupportedProblemError(
            "CUDA tensors are projected by Triton kernels, and Triton is not installed: pip install triton, or move "
            "the tensors to the CPU"
        ) from error


def where_solved(family: str, shape: Sequence[int]) -> str:
    """Return ``"kernel"`` or ``"torch"``: what projects items of this shape on the device."""
    largest = max(shape)
    beyond = largest > LARGEST_MATRIX if family == "transport" else family != "monotone" and largest > LONGEST_ROW
    return "torch" if beyond else "kernel"


def solve(
    family: str, point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor, lower: Tensor | None,
    upper: Tensor | None, shape: Sequence[int], choice: Choice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project on the device; arguments and results as in :class:`hsbackend.families.family.Family`."""
    tensors = (point.detach(), weight, coefficients, rhs, lower, upper)
    size = tuple(shape)
    if where_solved(family, size) == "torch":
        large = import_module("hsbackend.cuda.large")
        if family == "transport":
            return large.transport(point.detach(), weight, rhs, size, choice)
        return large.budget(*tensors, choice, l1=family == "l1")
    if family == "l1":
        return _module("budget").solve(*tensors, size, choice, l1=True)
    return _module(family).solve(*tensors, size, choice)


def kkt(
    family: str, face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs_primal: Tensor,
    rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Solve on a face; an item whose primal is NaN is zero, or NaN where its right-hand side is not zero."""
    tensors = (face, primal, weight, coefficients, rhs_primal, rhs_rows, rhs_bounds)
    size = tuple(shape)
    if family == "transport" and where_solved(family, size) == "torch":
        return import_module("hsbackend.cuda.large").transport_kkt(
            face, primal, weight, rhs_primal, rhs_rows, rhs_bounds, size
        )
    if family == "l1":
        return _module("budget").kkt(*tensors, size, l1=True)
    return _module(family).kkt(*tensors, size)
