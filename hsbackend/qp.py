"""Quadratic programs, directly: :func:`solve_qp` and the solution it returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hsbackend.families.family import Choice
from hsbackend.qp_operators import NAMES, Data, Settings, constant, find_active, solve, times
from hsbackend.status import InvalidOptionError

OnFailure = Literal["raise", "nan"]


@dataclass(frozen=True)
class Multipliers:
    """Multipliers of a quadratic program, ``Q x + q + A'eq + G'ineq - lower + upper = 0``.

    Attributes:
        eq: (..., p) of ``A x = b``, free.
        ineq: (..., m) of ``G x <= h``, non-negative.
        lower: (..., n) of ``x >= lower``, non-negative; zero without such a bound.
        upper: (..., n) of ``x <= upper``, non-negative; zero without such a bound.
    """

    eq: Tensor
    ineq: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Residuals:
    """How far a point is from satisfying the KKT conditions: infinity norms, absolute, float64.

    Attributes:
        primal: (...,) largest violation of a constraint.
        dual: (...,) ``|Q x + q + A'eq + G'ineq - lower + upper|``.
        complementarity: (...,) largest product of a slack and its multiplier.
    """

    primal: Tensor
    dual: Tensor
    complementarity: Tensor


@dataclass(frozen=True)
class ActiveSet:
    """Inequalities that hold with equality: the slack is below 1e-10, relative to the limits, or below the multiplier.

    Attributes:
        ineq: (..., m) bool.
        lower: (..., n) bool.
        upper: (..., n) bool.
    """

    ineq: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class QPSolution:
    """Solution of a quadratic program.

    Attributes:
        primal: (..., n) x, NaN where an item is not solved; differentiable.
        multipliers: differentiable too; NaN where an item is not solved.
        status: (...,) int8 codes of :class:`hsbackend.Status`.
    """

    primal: Tensor
    multipliers: Multipliers
    status: Tensor
    _data: Data = field(repr=False)
    _outputs: tuple[Tensor, ...] = field(repr=False)

    @property
    def residuals(self) -> Residuals:
        """Residuals of the KKT conditions, computed from the data when asked for; not differentiable."""
        data = Data(*(None if tensor is None else tensor.detach().to(torch.float64) for tensor in self._data.tensors))  # pyright: ignore[reportArgumentType]
        x, y, z, z_lower, z_upper = (tensor.detach() for tensor in self._outputs[:5])
        gradient = data.q + (x if data.Q is None else times(data.Q, x)) - z_lower + z_upper
        violations, products = [torch.zeros_like(x[:, :1])], [torch.zeros_like(x[:, :1])]
        if data.A is not None and data.b is not None:
            gradient = gradient + times(data.A.mT, y)
            violations.append((times(data.A, x) - data.b).abs())
        slacks: list[tuple[Tensor, Tensor]] = []
        if data.G is not None and data.h is not None:
            gradient = gradient + times(data.G.mT, z)
            slacks.append((data.h - times(data.G, x), z))
        if data.lower is not None:
            slacks.append((x - data.lower, z_lower))
        if data.upper is not None:
            slacks.append((data.upper - x, z_upper))
        for slack, multiplier in slacks:
            violations.append((-slack).clamp(min=0.0))
            products.append(torch.where(slack.isinf(), 0.0, slack * multiplier).abs())
        parts = (torch.cat(violations, dim=1), gradient, torch.cat(products, dim=1))
        return Residuals(*(part.abs().amax(1).reshape(self.status.shape) for part in parts))

    @property
    def active_set(self) -> ActiveSet:
        """Active inequalities, found when asked for."""
        masks = find_active(self._data, self._outputs, "active")
        return ActiveSet(*(mask.reshape(*self.status.shape, mask.shape[1]) for mask in masks))


def solve_qp(
    Q: Tensor,
    q: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    *,
    tolerance: float = 1e-9,
    jacobian: Choice = "active",
    on_failure: OnFailure = "raise",
) -> QPSolution:
    """Solve a batch of strictly convex quadratic programs, differentiably.

        minimise   1/2 x'Qx + q'x
        subject to A x = b,   G x <= h,   lower <= x <= upper

    Every tensor may have batch axes in front, which broadcast; one without is shared and its gradient is the sum over
    the batch. The computation is in float64 on the CPU; results have the dtype and device of ``q``.

    Args:
        Q: (..., n, n), symmetric (not checked: its gradient is symmetric too) and positive definite, at least on
            the null space of A; or (n,), the diagonal of a diagonal matrix.
        q: (..., n), floating point.
        A: (..., p, n), None without equalities. Dependent rows are fine.
        b: (..., p).
        G: (..., m, n), None without inequalities. Dependent rows are fine.
        h: (..., m); an entry ``inf`` means that there is no such row.
        lower: (..., n); an entry ``-inf`` means that there is no such bound. None for none at all.
        upper: (..., n); an entry ``inf`` means that there is no such bound. None for none at all.
        tolerance: largest accepted KKT residual, relative to the data.
        jacobian: which element of the Han-Sun set the derivative is, where there is more than one: ``"active"`` holds
            every row at its limit, ``"support"`` those with a positive multiplier.
        on_failure: ``"raise"``, or ``"nan"`` to return NaN for the items that fail. Under ``torch.func.vmap`` and
            ``torch.compile`` they are NaN in any case.

    Returns:
        The solution. ``primal`` and ``multipliers`` are differentiable in every tensor: by autograd of any order,
        ``torch.func`` transforms and, to first order in reverse mode, in compiled code.

    Raises:
        SolveError: if an item fails and ``on_failure="raise"``; the message names items (counted over the flattened
            batch axes) and conflicting rows. A ``Q`` that is not positive definite as described is reported as
            ``NOT_STRICTLY_CONVEX``: semidefinite programs are not supported.
        ValueError: if shapes do not fit.
        TypeError: if a tensor is not floating point.
        InvalidOptionError: if an option has an unknown value.
        UnsupportedProblemError: if the program is too large for the solvers.

    Notes:
        Cost: with ``M`` rows and bounds, ``n^3/3`` for the factor, ``M^2 n`` for the Gram matrix, once for shared data
        and per item otherwise, plus ``M k`` per step with ``k`` active rows; plain backward ``k^2``. Every other
        derivative factors a symmetric matrix of size ``n + p + m`` per item. At dependent active rows multipliers,
        and derivatives with respect to single entries of ``b``, ``h``, ``A``, ``G``, are not unique; one is returned.
        An item that fails contributes zero to gradients where its cotangents are zero, NaN where they are not.

    Source: implicit differentiation of the KKT conditions on the active face, Amos and Kolter, "OptNet" (2017); the
        choice of the face, Han and Sun (1997), see docs/theory.md.
    """
    given = dict(zip(NAMES, (Q, q, A, b, G, h, lower, upper), strict=True))
    return solve_given(given, (), tolerance, jacobian, on_failure)


def solve_given(
    given: Mapping[str, Tensor | None], kept: Collection[str], tolerance: float, jacobian: Choice, on_failure: OnFailure
) -> QPSolution:
    """Do what :func:`solve_qp` does.

    Args:
        given: its tensors by name.
        kept: names of data that stay the same from call to call: they are analysed and factored once, and again when
            their values change. Those that have batch axes or need a gradient do not count.
        tolerance: as there.
        jacobian: as there.
        on_failure: as there.
    """
    check_options(jacobian, on_failure)
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"`{name}` has dtype {tensor.dtype}, expected a floating-point dtype: call `.double()` on it"
            )
    quadratic, q = given["Q"], given["q"]
    if quadratic is None or q is None:
        raise ValueError("a program needs `Q` and `q`")
    if q.dim() == 0:
        raise ValueError("`q` has no axes, expected shape (..., n)")
    for rows, right in (("A", "b"), ("G", "h")):
        if (given[rows] is None) != (given[right] is None):
            there, missing = (rows, right) if given[right] is None else (right, rows)
            raise ValueError(f"`{there}` was given without `{missing}`: give both or neither")
    n = q.shape[-1]
    p, m = (0 if right is None else right.shape[-1] for right in (given["b"], given["h"]))
    shapes = dict.fromkeys(NAMES, (n,)) | {"A": (p, n), "b": (p,), "G": (m, n), "h": (m,)}
    if quadratic.dim() != 1:
        shapes["Q"] = (n, n)
    flat, batch = flatten(given, shapes)
    constants = tuple(
        name for name, tensor in given.items() if tensor is not None and name in kept and constant(tensor, shapes[name])
    )
    data = Data(
        *(tensor if tensor is None or name in constants else tensor.to(torch.float64) for name, tensor in flat.items())  # pyright: ignore[reportArgumentType]
    )
    outputs = solve(Settings(tolerance, jacobian, on_failure == "raise", constants), data)
    x, y, z, z_lower, z_upper = (
        tensor.reshape(*batch, tensor.shape[1]).to(dtype=q.dtype, device=q.device) for tensor in outputs[:5]
    )
    return QPSolution(x, Multipliers(y, z, z_lower, z_upper), outputs[5].reshape(batch), data, outputs)


def check_options(jacobian: str, on_failure: str) -> None:
    """Refuse unknown values of the two options every function here has."""
    for name, value, known in (
        ("jacobian", jacobian, ("active", "support")),
        ("on_failure", on_failure, ("raise", "nan")),
    ):
        if value not in known:
            raise InvalidOptionError(f"{name}={value!r} is unknown, expected {known[0]!r} or {known[1]!r}")


def flatten(
    tensors: Mapping[str, Tensor | None], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor | None], torch.Size]:
    """Broadcast the batch axes and make them one.

    Args:
        tensors: by name, for messages.
        shapes: the shape of one item of each.

    Returns:
        The tensors, (B, *shape) or (1, *shape) for those without batch axes longer than 1, and the batch shape.

    Raises:
        ValueError: if a shape does not fit.
    """
    axes: dict[str, torch.Size] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        front = tensor.dim() - len(shapes[name])
        if front < 0 or tuple(tensor.shape[front:]) != shapes[name]:
            wanted = ", ".join(["...", *map(str, shapes[name])])
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, expected ({wanted})")
        axes[name] = tensor.shape[:front]
    different: list[torch.Size] = []
    for front in axes.values():
        if front and front not in different:
            different.append(front)
    batch = different[0] if different else torch.Size()
    if len(different) > 1:
        try:
            batch = torch.broadcast_shapes(*different)
        except RuntimeError:
            found = ", ".join(f"`{name}` {tuple(front)}" for name, front in axes.items())
            raise ValueError(f"the batch axes do not broadcast: {found}") from None
    flat: dict[str, Tensor | None] = dict.fromkeys(tensors)
    for name, front in axes.items():
        tensor = tensors[name]
        assert tensor is not None
        if not front:
            flat[name] = tensor.unsqueeze(0)
        elif len(front) == 1 and (front == batch or front[0] == 1):
            flat[name] = tensor
        elif front.numel() == 1:
            flat[name] = tensor.reshape(1, *shapes[name])
        else:
            flat[name] = tensor.expand(*batch, *shapes[name]).reshape(batch.numel(), *shapes[name])
    return flat, batch
