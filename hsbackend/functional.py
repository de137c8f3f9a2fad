"""Projections as functions of a tensor along an axis, like ``torch.softmax``.

Each is :func:`hsbackend.project` with the set made on the way: any axis, negative ones too, any strides, any batch
axes. What describes the set is a float or a tensor. With *batch* the axes of x without ``dim``, in their order, a
tensor of one number per item has shape (*batch*) or one that broadcasts to it; a tensor of one number per coordinate
has as many axes as x, laid out like x, or is (n,). The keyword arguments ``weight`` (one number per coordinate),
``jacobian`` and ``on_failure`` are those of :func:`hsbackend.project` (``"closest"`` is for sets given by rows), and so
are what is returned, what is raised and what can be differentiated. :class:`hsbackend.Polyhedron` describes the sets,
their cost and sources.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from hsbackend.families.family import Choice
from hsbackend.polyhedron import Polyhedron, project
from hsbackend.qp import OnFailure

Number = float | Tensor


class Options(TypedDict, total=False):
    """Keyword arguments of :func:`hsbackend.project`."""

    weight: Tensor | None
    jacobian: Choice
    on_failure: OnFailure


def simplex(x: Tensor, radius: Number = 1.0, dim: int = -1, **options: Unpack[Options]) -> Tensor:
    """Project on ``{y >= 0, sum y = radius}`` along an axis (sparsemax for radius 1).

    Args:
        x: floating point.
        radius: one number per item.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if a radius is negative or x holds NaN.
    """
    if isinstance(radius, Tensor):
        return _along(x, Polyhedron.simplex(x.shape[dim], radius), dim, options)
    return _along(x, _kept("simplex", x.shape[dim], float(radius)), dim, options)


def capped_simplex(
    x: Tensor, radius: Number = 1.0, cap: Number = 1.0, dim: int = -1, **options: Unpack[Options]
) -> Tensor:
    """Project on ``{0 <= y <= cap, sum y = radius}`` along an axis.

    Args:
        x: floating point.
        radius: one number per item.
        cap: one number per coordinate.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if the caps do not reach the radius or x holds NaN.
    """
    if isinstance(radius, Tensor) or isinstance(cap, Tensor):
        return _along(x, Polyhedron.capped_simplex(x.shape[dim], radius, _last(cap, x, dim)), dim, options)
    return _along(x, _kept("capped_simplex", x.shape[dim], float(radius), float(cap)), dim, options)


def budget(
    x: Tensor, coefficients: Tensor | None = None, equals: Number | None = None, at_most: Number | None = None,
    at_least: Number | None = None, lower: Number | None = 0.0, upper: Number | None = None, dim: int = -1,
    **options: Unpack[Options],
) -> Tensor:  # fmt: skip
    """Project on ``{lower <= y <= upper, at_least <= c'y <= at_most}`` or ``c'y = equals`` along an axis.

    Args:
        x: floating point.
        coefficients: c, one number per coordinate; None for ones.
        equals: one number per item; excludes the next two.
        at_most: one number per item.
        at_least: one number per item.
        lower: one number per coordinate, None for none.
        upper: one number per coordinate, None for none.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if the set is empty or x holds NaN.
        ValueError: if no side of the budget is given, or ``equals`` together with another.
    """
    coefficients, lower, upper = (_last(value, x, dim) for value in (coefficients, lower, upper))
    polyhedron = Polyhedron.budget(x.shape[dim], coefficients, equals, at_most, at_least, lower, upper)
    return _along(x, polyhedron, dim, options)


def l1_ball(x: Tensor, radius: Number = 1.0, dim: int = -1, **options: Unpack[Options]) -> Tensor:
    """Project on ``{sum |y| <= radius}`` along an axis.

    Args:
        x: floating point.
        radius: one number per item.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if a radius is negative or x holds NaN.
    """
    if isinstance(radius, Tensor):
        return _along(x, Polyhedron.l1_ball(x.shape[dim], radius), dim, options)
    return _along(x, _kept("l1_ball", x.shape[dim], float(radius)), dim, options)


def weighted_l1_ball(
    x: Tensor, weights: Tensor, radius: Number = 1.0, dim: int = -1, **options: Unpack[Options]
) -> Tensor:
    """Project on ``{sum w |y| <= radius}`` along an axis.

    Args:
        x: floating point.
        weights: w > 0, one number per coordinate.
        radius: one number per item.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if a radius is negative or x holds NaN.
    """
    return _along(x, Polyhedron.weighted_l1_ball(_last(weights, x, dim), radius), dim, options)


def linf_ball(x: Tensor, radius: Number = 1.0, dim: int = -1, **options: Unpack[Options]) -> Tensor:
    """Project on ``{max |y| <= radius}`` along an axis.

    Args:
        x: floating point.
        radius: one number per item.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if a radius is negative or x holds NaN.
    """
    if isinstance(radius, Tensor):
        return _along(x, Polyhedron.linf_ball(x.shape[dim], radius), dim, options)
    return _along(x, _kept("linf_ball", x.shape[dim], float(radius)), dim, options)


def box(x: Tensor, lower: Number | None, upper: Number | None, dim: int = -1, **options: Unpack[Options]) -> Tensor:
    """Project on ``{lower <= y <= upper}``; the axis only says what one item is.

    Args:
        x: floating point.
        lower: one number per coordinate, None for none.
        upper: one number per coordinate, None for none.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if bounds cross or x holds NaN.
    """
    return _along(x, Polyhedron.box(_last(lower, x, dim), _last(upper, x, dim), x.shape[dim]), dim, options)


def halfspace(x: Tensor, a: Tensor, b: Number, dim: int = -1, **options: Unpack[Options]) -> Tensor:
    """Project on ``{a'y <= b}`` along an axis.

    Args:
        x: floating point.
        a: one number per coordinate.
        b: one number per item.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if the set is empty or x holds NaN.
    """
    return _along(x, Polyhedron.halfspace(_last(a, x, dim), b), dim, options)


def hyperplane(x: Tensor, a: Tensor, b: Number, dim: int = -1, **options: Unpack[Options]) -> Tensor:
    """Project on ``{a'y = b}`` along an axis.

    Args:
        x: floating point.
        a: one number per coordinate.
        b: one number per item.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if the set is empty or x holds NaN.
    """
    return _along(x, Polyhedron.hyperplane(_last(a, x, dim), b), dim, options)


def affine(x: Tensor, A: Tensor, b: Tensor, dim: int = -1, **options: Unpack[Options]) -> Tensor:
    """Project on ``{A y = b}`` along an axis.

    Args:
        x: floating point.
        A: (..., p, n); batch axes as for one number per item.
        b: (..., p).
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if the set is empty or x holds NaN.

    Notes:
        The pseudo-inverse of A is computed in every call: make a :class:`hsbackend.Polyhedron` once where A stays.
    """
    return _along(x, Polyhedron.affine(A, b), dim, options)


def monotone(
    x: Tensor, increasing: bool = True, lower: Number | None = None, upper: Number | None = None, dim: int = -1,
    **options: Unpack[Options],
) -> Tensor:  # fmt: skip
    """Project on ``{lower <= y_1 <= ... <= y_n <= upper}`` along an axis (isotonic regression).

    Args:
        x: floating point.
        increasing: False for the opposite order.
        lower: one number per item, None for none.
        upper: one number per item, None for none.
        dim: the axis.
        options: see the module.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if bounds cross or x holds NaN.
    """
    if lower is None and upper is None:
        return _along(x, _kept("monotone", x.shape[dim], increasing), dim, options)
    return _along(x, Polyhedron.monotone(x.shape[dim], increasing, lower, upper), dim, options)


def birkhoff(x: Tensor, dim: tuple[int, int] = (-2, -1), **options: Unpack[Options]) -> Tensor:
    """Project on doubly stochastic matrices along two axes of equal length.

    Args:
        x: floating point.
        dim: the axes.
        options: see the module; a ``weight`` is laid out like x or a (k, k) matrix.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if x holds NaN.
        ValueError: if the axes have different lengths.
    """
    return _along_both(x, _kept("birkhoff", x.shape[dim[0]]), dim, options)


def transport(x: Tensor, r: Tensor, c: Tensor, dim: tuple[int, int] = (-2, -1), **options: Unpack[Options]) -> Tensor:
    """Project on ``{Y >= 0, Y 1 = r, Y'1 = c}`` along two axes.

    Args:
        x: floating point.
        r: (..., k1), batch axes as for one number per item.
        c: (..., k2).
        dim: the axes of length k1 and k2.
        options: see the module; a ``weight`` is laid out like x or a (k1, k2) matrix.

    Returns:
        The projection, of the shape and dtype of x.

    Raises:
        SolveError: if the set is empty or x holds NaN.
    """
    return _along_both(x, Polyhedron.transport(r, c), dim, options)


@lru_cache(maxsize=256)
def _made(name: str, n: int, numbers: tuple[float, ...]) -> Polyhedron:
    return getattr(Polyhedron, name)(n, *numbers)


def _kept(name: str, n: int, *numbers: float) -> Polyhedron:
    """Return a set described by numbers alone, made once."""
    if torch.compiler.is_compiling():
        return getattr(Polyhedron, name)(n, *numbers)
    return _made(name, n, numbers)


def _last(value: Any, x: Tensor, dim: int) -> Any:
    """Move the axis of a tensor laid out like x to the end."""
    return value.movedim(dim, -1) if isinstance(value, Tensor) and value.dim() == x.dim() else value


def _along(x: Tensor, polyhedron: Polyhedron, dim: int, options: Options) -> Tensor:
    """Project along one axis."""
    if dim in (-1, x.dim() - 1):
        return project(x, polyhedron, **options)
    weight = options.get("weight")
    if weight is not None:
        options = {**options, "weight": _last(weight, x, dim)}
    return project(x.movedim(dim, -1), polyhedron, **options).movedim(-1, dim)


def _along_both(x: Tensor, polyhedron: Polyhedron, dim: tuple[int, int], options: Options) -> Tensor:
    """Project along two axes."""
    weight = options.get("weight")
    if weight is not None and weight.dim() == x.dim():
        options = {**options, "weight": weight.movedim(dim, (-2, -1))}
    return project(x.movedim(dim, (-2, -1)), polyhedron, **options).movedim((-2, -1), dim)
