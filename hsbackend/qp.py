"""Quadratic programs, directly: :func:`solve_qp` and the solution it returns."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hsbackend import closest, sparse_qp
from hsbackend.families.family import Choice
from hsbackend.qp_face import find_active, times
from hsbackend.qp_operators import certificates, solve
from hsbackend.qp_program import NAMES, Data, Settings, constant
from hsbackend.status import InvalidOptionError, Status

OnFailure = Literal["raise", "nan", "closest"]


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
class Shift:
    """How far limits had to move: ``A x = b + eq``, ``G x <= h + ineq``, ``lower - lower <= x <= upper + upper``.

    Attributes:
        eq: (..., p).
        ineq: (..., m), non-negative.
        lower: (..., n), non-negative.
        upper: (..., n), non-negative.
    """

    eq: Tensor
    ineq: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Certificates:
    """Why items have no optimum; zero for other items, and where no certificate passed its check.

    For an infeasible item (Farkas' lemma), ``A'eq + G'ineq - lower + upper = 0`` with ``eq`` free and the others
    non-negative, and ``b'eq + h'ineq - lower bounds'lower + upper bounds'upper < 0``. For an unbounded one a direction
    ``ray`` with ``Q ray = 0``, ``A ray = 0``, ``G ray <= 0``, no bound in the way, and ``q'ray < 0``. Of infinity norm
    1, float64.

    Attributes:
        eq: (..., p).
        ineq: (..., m).
        lower: (..., n).
        upper: (..., n).
        ray: (..., n).
    """

    eq: Tensor
    ineq: Tensor
    lower: Tensor
    upper: Tensor
    ray: Tensor


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
        primal: (..., n) x, NaN where an item is not solved; differentiable. Where the optimum is not unique, the one of
            least Euclidean norm.
        multipliers: differentiable too; NaN where an item is not solved.
        status: (...,) int8 codes of :class:`hsbackend.Status`.
        non_unique: (...,) bool, whether there are other optima.
        shift: how far the limits of infeasible items were moved (``on_failure="closest"``), zero for all others;
            differentiable.
    """

    primal: Tensor
    multipliers: Multipliers
    status: Tensor
    non_unique: Tensor
    shift: Shift
    _settings: Settings = field(repr=False)
    _data: Data | sparse_qp.SparseData = field(repr=False)
    _outputs: tuple[Tensor, ...] = field(repr=False)
    _sparse: sparse_qp.Call | None = field(repr=False, default=None)

    @property
    def residuals(self) -> Residuals:
        """Residuals of the KKT conditions, computed from the data when asked for; not differentiable.

        Of the regularised problem where there is ``smoothing``; with shifted limits for items of status ``CLOSEST``,
        whose multipliers of shifted rows are those of equations.
        """
        if self._sparse is not None or isinstance(self._data, sparse_qp.SparseData):
            assert self._sparse is not None
            parts = sparse_qp.residuals(self._sparse, self._outputs)
            return Residuals(*(part.reshape(self.status.shape).to(self.status.device) for part in parts))
        data = Data(*(None if tensor is None else tensor.detach().to(torch.float64) for tensor in self._data.tensors))  # pyright: ignore[reportArgumentType]
        x, y, z, z_lower, z_upper = (tensor.detach() for tensor in self._outputs[:5])
        gradient = data.q + times(data.hessian(self._settings), x) - z_lower + z_upper
        s_eq, s_ineq, s_lower, s_upper = (
            part.detach().to(torch.float64).reshape(len(x), part.shape[-1])
            for part in (self.shift.eq, self.shift.ineq, self.shift.lower, self.shift.upper)
        )
        violations, products = [torch.zeros_like(x[:, :1])], [torch.zeros_like(x[:, :1])]
        if data.A is not None and data.b is not None:
            gradient = gradient + times(data.A.mT, y)
            violations.append((times(data.A, x) - data.b - s_eq).abs())
        slacks: list[tuple[Tensor, Tensor]] = []
        if data.G is not None and data.h is not None:
            gradient = gradient + times(data.G.mT, z)
            slacks.append((data.h + s_ineq - times(data.G, x), z))
        if data.lower is not None:
            slacks.append((x - data.lower + s_lower, z_lower))
        if data.upper is not None:
            slacks.append((data.upper + s_upper - x, z_upper))
        for slack, multiplier in slacks:
            violations.append((-slack).clamp(min=0.0))
            products.append(torch.where(slack.isinf(), 0.0, slack * multiplier).abs())
        parts = (torch.cat(violations, dim=1), gradient, torch.cat(products, dim=1))
        return Residuals(*(part.abs().amax(1).reshape(self.status.shape) for part in parts))

    @property
    def active_set(self) -> ActiveSet:
        """Active inequalities, found when asked for; rows and bounds that were shifted are active."""
        if self._sparse is not None or isinstance(self._data, sparse_qp.SparseData):
            assert self._sparse is not None
            masks = sparse_qp.active(self._sparse)
            shape, device = self.status.shape, self.status.device
            return ActiveSet(*(mask.reshape(*shape, mask.shape[1]).to(device) for mask in masks))
        masks = find_active(self._data, self._outputs, "active")
        moved = (self.shift.ineq, self.shift.lower, self.shift.upper)
        return ActiveSet(*(mask.reshape(part.shape) | (part > 0.0) for mask, part in zip(masks, moved, strict=True)))

    @property
    def certificates(self) -> Certificates:
        """Why items have no optimum, found when asked for: failing items are solved again, and a linear program each.

        Also for items of status ``CLOSEST``, which are infeasible.
        """
        if self._sparse is not None or isinstance(self._data, sparse_qp.SparseData):
            assert self._sparse is not None
            found = sparse_qp.certificates(self._sparse)
            shape, device = self.status.shape, self.status.device
            return Certificates(*(part.reshape(*shape, part.shape[1]).to(device) for part in found))
        data = Data(*(None if tensor is None else tensor.detach() for tensor in self._data.tensors))  # pyright: ignore[reportArgumentType]
        codes = self.status.reshape(-1).cpu().numpy()
        items = np.flatnonzero(np.isin(codes, (Status.INFEASIBLE, Status.UNBOUNDED, Status.CLOSEST)))
        n, p, m = data.sizes
        parts = [torch.zeros(len(codes), size, dtype=torch.float64) for size in (p, m, n, n, n)]
        for item, found in certificates(self._settings, data, items).items():
            for part, values in zip(parts[-len(found) :] if len(found) == 1 else parts, found, strict=False):
                part[item] = torch.from_numpy(values)
        return Certificates(*(part.reshape(*self.status.shape, part.shape[1]).to(self.status.device) for part in parts))


def solve_qp(
    Q: Any,
    q: Tensor,
    A: Any = None,
    b: Tensor | None = None,
    G: Any = None,
    h: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    *,
    tolerance: float = 1e-9,
    jacobian: Choice = "active",
    on_failure: OnFailure = "raise",
    smoothing: float | Tensor = 0.0,
    smoothing_centre: Tensor | None = None,
) -> QPSolution:
    """Solve a batch of convex quadratic or linear programs, differentiably.

        minimise   1/2 x'Qx + q'x  (+ smoothing/2 |x - smoothing_centre|^2)
        subject to A x = b,   G x <= h,   lower <= x <= upper

    Every tensor may have batch axes in front, which broadcast; one without is shared and its gradient is the sum over
    the batch. The computation is in float64 on the CPU; results have the dtype and device of ``q``.

    Args:
        Q: (..., n, n), symmetric (not checked: its gradient is symmetric too) and positive semidefinite, at least on
            the null space of A; or (n,), the diagonal of a diagonal matrix; None for a linear program. Sparse: see
            Notes.
        q: (..., n), floating point.
        A: (..., p, n), None without equalities. Dependent rows are fine. Sparse: see Notes.
        b: (..., p).
        G: (..., m, n), None without inequalities. Dependent rows are fine. Sparse: see Notes.
        h: (..., m); an entry ``inf`` means that there is no such row.
        lower: (..., n); an entry ``-inf`` means that there is no such bound. None for none at all.
        upper: (..., n); an entry ``inf`` means that there is no such bound. None for none at all.
        tolerance: largest accepted KKT residual, relative to the data.
        jacobian: which element of the Han-Sun set the derivative is, where there is more than one: ``"active"`` holds
            every row at its limit, ``"support"`` those with a positive multiplier, and those that hold the optimum of
            least norm.
        on_failure: ``"raise"``; ``"nan"`` to return NaN for the items that fail; or ``"closest"`` to solve infeasible
            items with the limits of the closest feasible problem: shifted by the ``shift`` of least Euclidean norm for
            which a point exists, ``A x = b + s_b, G x <= h + s_h, lower - s_l <= x <= upper + s_u`` with ``s_h, s_l,
            s_u >= 0``. Their status is ``CLOSEST``; other failures raise. Under ``torch.func.vmap`` and
            ``torch.compile`` failing items are NaN in any case.
        smoothing: (...,) tensor or float, non-negative. A linear program at a vertex has derivative zero in its cost;
            with a term ``smoothing/2 |x - smoothing_centre|^2`` it has one, and what is returned is the exact solution
            and derivative of the problem with that term. It moves x by O(smoothing) as a rule; for a linear program
            not at all once it is small enough, and then the derivative is zero again.
        smoothing_centre: (..., n), None for zero.

    Returns:
        The solution. ``primal``, ``multipliers`` and ``shift`` are differentiable in every tensor: by autograd of any
        order, ``torch.func`` transforms and, to first order in reverse mode, in compiled code.

    Raises:
        SolveError: if an item fails and ``on_failure="raise"``; the message names items (counted over the flattened
            batch axes), conflicting rows, and variables that run off in an unbounded problem. With ``"closest"`` if an
            item fails that is not infeasible.
        ValueError: if shapes do not fit or ``smoothing`` is a negative number.
        TypeError: if a tensor is not floating point.
        InvalidOptionError: if an option has an unknown value.
        UnsupportedProblemError: if the program is too large for the solvers.

    Notes:
        Cost: with ``M`` rows and bounds, ``n^3/3`` for the factor, ``M^2 n`` for the Gram matrix, once for shared data
        and per item otherwise, plus ``M k`` per step with ``k`` active rows; plain backward ``k^2``. Every other
        derivative factors a symmetric matrix of size ``n + p + m`` per item. Linear programs and singular Q cost a few
        of these. An infeasible item costs a second program in ``p + m + 2n`` variables and a third like the first.
        Its limits that are 1e8 times above all its other data are not shifted.

        Where the optimum is not unique, its derivative is that of the optimum of least norm along changes of the data
        that keep the set of optima consistent (docs/theory.md, section 10).

        Multipliers, and derivatives with respect to single entries of ``b``, ``h``, ``A``, ``G``, are unique where the
        active rows are independent. Where they are dependent one choice is returned: a multiplier that satisfies the
        KKT conditions, not always that of least norm; and derivatives that are exact along changes that keep the
        rows consistent, of least norm unless in a first-order backward pass in eager mode. The multipliers of an item
        of status ``CLOSEST`` are never unique: those of shifted rows are multipliers of equations, of any sign, to
        which multiples of the shift may be added.

        An item that fails contributes zero to gradients where its cotangents are zero, NaN where they are not.

        *Sparse programs.* Where Q, A or G is a sparse torch tensor (coordinate, compressed row or compressed column
        storage) or a scipy sparse matrix (a constant), the program goes to solvers whose memory is O(n + nonzeros)
        as long as no factor is needed (docs/large-sparse.md). Such matrices have no batch axes; items are solved one
        after the other; gradients of sparse tensors are sparse, one per stored entry; derivatives are of first order,
        in reverse or forward mode; and ``on_failure="closest"`` is refused.

    Source: implicit differentiation of the KKT conditions on the active face, Amos and Kolter, "OptNet" (2017); the
        choice of the face, Han and Sun (1997); smoothing by a quadratic term, Wilder, Dilkina and Tambe, "Melding the
        data-decisions pipeline" (2019). See docs/theory.md.
    """
    given = dict(zip(NAMES, (Q, q, A, b, G, h, lower, upper), strict=True))
    return solve_given(given, (), tolerance, jacobian, on_failure, smoothing, smoothing_centre)


def solve_given(
    given: Mapping[str, Any], kept: Collection[str], tolerance: float, jacobian: Choice,
    on_failure: OnFailure, smoothing: float | Tensor = 0.0, smoothing_centre: Tensor | None = None,
) -> QPSolution:  # fmt: skip
    """Do what :func:`solve_qp` does.

    Args:
        given: its tensors by name.
        kept: names of data that stay the same from call to call: they are analysed and factored once, and again when
            their values change. Those that have batch axes or need a gradient do not count.
        tolerance: as there.
        jacobian: as there.
        on_failure: as there.
        smoothing: as there.
        smoothing_centre: as there.
    """
    check_options(jacobian, on_failure)
    check_smoothing(smoothing)
    if any(sparse_qp.is_sparse(given[name]) for name in ("Q", "A", "G")):
        return solve_sparse(given, tolerance, jacobian, on_failure, smoothing, smoothing_centre)
    weight = smoothing if isinstance(smoothing, Tensor) else None
    everything = {**given, "smoothing": weight, "smoothing_centre": smoothing_centre}
    for name, tensor in everything.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"`{name}` has dtype {tensor.dtype}, expected a floating-point dtype: call `.double()` on it"
            )
    quadratic, q = given["Q"], given["q"]
    if q is None:
        raise ValueError("a program needs `q`, its linear term (zeros if it has none)")
    if q.dim() == 0:
        raise ValueError("`q` has no axes, expected shape (..., n)")
    for rows, right in (("A", "b"), ("G", "h")):
        if (given[rows] is None) != (given[right] is None):
            there, missing = (rows, right) if given[right] is None else (right, rows)
            raise ValueError(f"`{there}` was given without `{missing}`: give both or neither")
    n = q.shape[-1]
    p, m = (0 if right is None else right.shape[-1] for right in (given["b"], given["h"]))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(NAMES, (n,)) | {"A": (p, n), "b": (p,), "G": (m, n), "h": (m,)}
    shapes |= {"smoothing": (), "smoothing_centre": (n,)}
    if quadratic is not None and quadratic.dim() != 1:
        shapes["Q"] = (n, n)
    flat, batch = flatten(everything, shapes)
    weight, centre = flat.pop("smoothing"), flat.pop("smoothing_centre")
    fixed = weight is None
    if fixed and smoothing:
        weight = torch.full((1,), float(smoothing), dtype=torch.float64, device=q.device)
    constants = {
        name for name, tensor in given.items() if tensor is not None and name in kept and constant(tensor, shapes[name])
    }
    if weight is not None:
        flat["Q"], flat["q"] = _smoothed(flat["Q"], flat["q"], weight.to(torch.float64), centre)
        if centre is not None:
            constants.discard("q")
        if not fixed:
            constants.discard("Q")
        elif quadratic is None and kept:
            constants.add("Q")
    if flat["Q"] is not None and flat["Q"].dim() == 2 and "Q" not in constants:
        # A presolve that does not know which entries are zero could take a variable out of the selection by norm.
        constants -= {"A", "b"}
    data = Data(
        *(tensor if tensor is None or name in constants else tensor.to(torch.float64) for name, tensor in flat.items())  # pyright: ignore[reportArgumentType]
    )
    rescue = on_failure == "closest"
    once = tuple(name for name, tensor in given.items() if tensor is not None and tensor.dim() == len(shapes[name]))
    if weight is not None and weight.dim() and weight.numel() != 1:
        once = tuple(name for name in once if name != "Q")
    kept_names = tuple(name for name in NAMES if name in constants)
    settings = Settings(tolerance, jacobian, on_failure != "nan", kept_names, once=once)
    if rescue:
        outputs, shift = closest.solve(settings, data)
    else:
        outputs = solve(settings, data)
        shift = (torch.zeros_like(part.detach()) for part in (outputs[1], outputs[2], outputs[3], outputs[4]))
    x, y, z, z_lower, z_upper, *moved = (
        tensor.reshape(*batch, tensor.shape[1]).to(dtype=q.dtype, device=q.device) for tensor in (*outputs[:5], *shift)
    )
    status, non_unique = (outputs[place].reshape(batch) for place in (5, 7))
    multipliers = Multipliers(y, z, z_lower, z_upper)
    return QPSolution(x, multipliers, status, non_unique, Shift(*moved), settings, data, outputs)


def solve_sparse(
    given: Mapping[str, Any], tolerance: float, jacobian: Choice, on_failure: OnFailure,
    smoothing: float | Tensor = 0.0, smoothing_centre: Tensor | None = None, diagonal: Tensor | None = None,
) -> QPSolution:  # fmt: skip
    """Do what :func:`solve_given` does for programs with sparse matrices.

    Args:
        given: the data of :func:`solve_qp` by name.
        tolerance: as there.
        jacobian: as there.
        on_failure: as there, ``"closest"`` left out.
        smoothing: as there.
        smoothing_centre: as there.
        diagonal: (..., n) a diagonal Hessian in the place of Q; may have batch axes.
    """
    if on_failure == "closest":
        raise InvalidOptionError('on_failure="closest" is not there for sparse programs: use "raise" or "nan"')
    quadratic, q = given["Q"], given["q"]
    if q is None:
        raise ValueError("a program needs `q`, its linear term (zeros if it has none)")
    n = q.shape[-1]
    if isinstance(quadratic, Tensor) and quadratic.dim() == 1:
        diagonal, quadratic = quadratic, None
    matrices: dict[str, sparse_qp.Nonzeros | None] = {}
    for name, right in (("Q", None), ("A", "b"), ("G", "h")):
        matrix = quadratic if name == "Q" else given[name]
        if right is not None and (matrix is None) != (given[right] is None):
            there, missing = (name, right) if given[right] is None else (right, name)
            raise ValueError(f"`{there}` was given without `{missing}`: give both or neither")
        found = None if matrix is None else sparse_qp.Nonzeros.of(name, matrix)
        if found is not None and (found.shape[1] != n or (name == "Q" and found.shape[0] != n)):
            wanted = f"({n}, {n})" if name == "Q" else f"(rows, {n})"
            raise ValueError(f"`{name}` has shape {found.shape}, expected {wanted}")
        matrices[name] = found
    if matrices["Q"] is not None:
        matrices["Q"].check_symmetric("Q")
    structure = sparse_qp.Structure(n, matrices["Q"], matrices["A"], matrices["G"])
    _, p, m = structure.sizes
    weight = smoothing if isinstance(smoothing, Tensor) else None
    vectors = {
        "diagonal": diagonal, "q": q, "b": given["b"], "h": given["h"], "lower": given["lower"],
        "upper": given["upper"], "smoothing": weight, "smoothing_centre": smoothing_centre,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(vectors, (n,)) | {"b": (p,), "h": (m,), "smoothing": ()}
    for name, tensor in vectors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"`{name}` has dtype {tensor.dtype}, expected a floating-point dtype: call `.double()` on it"
            )
    flat, batch = flatten(vectors, shapes)
    weight, centre = flat.pop("smoothing"), flat.pop("smoothing_centre")
    if weight is None and not isinstance(smoothing, Tensor) and smoothing:
        weight = torch.full((1,), smoothing, dtype=torch.float64, device=q.device)
    if weight is not None:
        flat["diagonal"], flat["q"] = _smoothed(flat["diagonal"], flat["q"], weight.to(torch.float64), centre)
    linear = flat["q"]
    assert linear is not None
    values = {name: None if part is None else part.values for name, part in matrices.items()}
    data = sparse_qp.SparseData(
        structure, values["Q"], flat["diagonal"], linear, values["A"], flat["b"], values["G"], flat["h"],
        flat["lower"], flat["upper"],
    )  # fmt: skip
    outputs, call = sparse_qp.solve(data, batch.numel(), tolerance, jacobian, on_failure == "raise")
    x, y, z, z_lower, z_upper = (
        tensor.reshape(*batch, tensor.shape[1]).to(dtype=q.dtype, device=q.device) for tensor in outputs[:5]
    )
    status = outputs[5].reshape(batch).to(q.device)
    shift = Shift(*(torch.zeros_like(part.detach()) for part in (y, z, z_lower, z_upper)))
    settings = Settings(tolerance, jacobian, on_failure != "nan")
    unique = sparse_qp.non_unique(call).reshape(batch).to(q.device)
    return QPSolution(
        x, Multipliers(y, z, z_lower, z_upper), status, unique, shift, settings, data, outputs, call
    )  # fmt: skip


def _smoothed(Q: Tensor | None, q: Tensor | None, weight: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the Hessian and the linear term with the term ``weight/2 |x - centre|^2`` added."""
    assert q is not None
    n = q.shape[-1]
    ones = torch.ones(n, dtype=torch.float64, device=q.device)
    dense = Q is not None and Q.dim() == 3
    term = weight[:, None, None] * torch.diag_embed(ones) if dense else weight.unsqueeze(-1) * ones
    linear = q.to(torch.float64)
    if centre is not None:
        linear = linear - weight.unsqueeze(-1) * centre.to(torch.float64)
    return term if Q is None else Q.to(torch.float64) + term, linear


def check_smoothing(smoothing: float | Tensor) -> None:
    """Refuse a negative number."""
    if not isinstance(smoothing, Tensor) and not (0.0 <= smoothing < math.inf):
        raise ValueError(f"smoothing={smoothing!r}, expected a finite number that is not negative, or a tensor of them")


def check_options(jacobian: str, on_failure: str) -> None:
    """Refuse unknown values of the two options every function here has."""
    for name, value, known in (
        ("jacobian", jacobian, ("active", "support")),
        ("on_failure", on_failure, ("raise", "nan", "closest")),
    ):
        if value not in known:
            expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise InvalidOptionError(f"{name}={value!r} is unknown, expected {expected}")


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
