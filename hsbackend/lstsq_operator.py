"""Least squares by products with A, as a differentiable operator.

    x = argmin_x |A x - b|^2 + damp^2 |x|^2          damp = 0: of minimum norm among the minimisers

A depends on parameters theta and is given by its products (:mod:`hsbackend.linear_maps`); LSMR solves
(:mod:`hsbackend.lsmr`). The derivative is made of products and of the same operator for A and for A', so that it can be
differentiated again, to any order.

**Derivation.** Write ``L(A, b)`` for the solution and let ``g = dL/dx``. The normal equations are

    A'r = damp^2 x,    r = b - A x                                                                               (1)

*damp > 0.* Differentiate (1) with ``H = A'A + damp^2 I``:

    H x' = A'(b' - A* x) + A*' r - 2 damp damp' x         (A*: tangent of A)                                       (2)

With ``w = H^-1 g``, ``<g, x'>`` is ``<A w, b' - A* x> + <A* w, r> - 2 damp damp' <w, x>``. The push-through identity
gives ``A w = A H^-1 g = (A A' + damp^2 I)^-1 A g``, which is the damped least-squares solution for A':

    p = L(A', g),    u = g - A'p = g - A'A w = damp^2 w                                                            (3)

    dL/db = p,    dL/dtheta = d_theta[<r, A w> - <p, A x>],    dL/ddamp = -2 damp <w, x>                           (4)

where d_theta differentiates A alone. One solve; w comes from (3).

*damp = 0, rank locally constant.* Golub and Pereyra (1973): for ``x = A^+ b``

    x' = A^+ (b' - A* x) + (A'A)^+ A*' r + (I - A^+ A) A*' A^+' x                                                  (5)

With ``w = (A'A)^+ g = A^+ p``, ``u = g - A'p = (I - A^+ A) g``, ``y = A^+' x = L(A', x)``:

    dL/dtheta = d_theta[<r, A w> + <y, A u> - <p, A x>]                                                            (6)

Full column rank: u = 0; full row rank: r = 0. Three solves.

**One rule for both.** ``w = w0 + L(A, p - A w0)``, exact for any w0 in case of ``damp = 0`` and w0 in the range of A',
and a correction of w0 when ``damp > 0``: for ``w0 = u/damp^2`` the bracket is zero but for rounding. Items whose
right-hand side is zero cost nothing, so that the operator is called with zeros where there is nothing to solve.

*Damping of every coordinate* is ``K = [A; diag(d)]`` without damping, (6). If no d_j is zero then ``u = 0``, and the
lower part of ``p = K w`` is ``d w``: again no second solve. For K' the same holds with the roles of r and u, w and y
exchanged.

*Centre.* ``min |A x - b|^2 + damp^2 |x - c|^2`` is ``x = c + L(A, b - A c)``.

Source: Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate" (1973); Fong and Saunders, "LSMR" (2011); the idea of a matrix-free differentiable solver: Roy, Hauberg and
Kraemer, "Matrix-free least squares solvers" (2025), whose summary of the rule has the sign of (4) reversed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from hsbackend.linear_maps import DenseMap, LinearMap, StackedMap
from hsbackend.lsmr import NOT_CONVERGED, Limits, Outcome, StopReason, lsmr
from hsbackend.lstsq_factor import Factor, factor, worth_it
from hsbackend.lstsq_factor import start as begin
from hsbackend.operators import outer_tangents, primals, transforms_active, values_only
from hsbackend.status import NAMED_ITEMS, SolveError, Status

OnFailure = Literal["raise", "nan", "keep"]
#: A difference is not used where it has lost more than this factor against the terms it enters: two digits, which the
#: further solve costs too (measured, docs/least-squares.md).
_DIGITS = 100.0


class AdjointNotConvergedWarning(UserWarning):
    """A solve inside of a derivative of :func:`lstsq` did not converge: the derivative is not to be trusted."""


@dataclass(frozen=True)
class DerivativeSolve:
    """One solve inside of a derivative.

    Attributes:
        solves_for: ``"p"``, ``"w"``, ``"y"`` of the rule, ``"r"`` for the residual once more, or ``"tangent"``.
        stop_reason: (...,) int8, codes of :class:`StopReason`.
        iterations: (...,) int32; zero where the right-hand side is zero, for instance where w came without a solve.
        products: number of products with A.
        transposed_products: number of products with A'.
        factored: whether it started from a factor of the Gram matrix (dense A, :mod:`hsbackend.lstsq_factor`).
    """

    solves_for: str
    stop_reason: Tensor = field(repr=False)
    iterations: Tensor = field(repr=False)
    products: int
    transposed_products: int
    factored: bool

    @property
    def converged(self) -> bool:
        """Whether every item converged."""
        return not bool(failed(self.stop_reason).any())


@dataclass(frozen=True)
class Regime:
    """Where a backward pass needed a further solve.

    Attributes:
        w_by_solve: (...,) bool; elsewhere w is ``u/damp^2``, or it is not needed because the equations hold.
        y_by_solve: (...,) bool; a solve for y, or in damped items for ``r/damp^2``.
    """

    w_by_solve: Tensor
    y_by_solve: Tensor


@dataclass
class DerivativeLog:
    """What the derivatives of one solution have cost so far, filled in when they are computed.

    Attributes:
        solves: every solve, in order.
        regimes: of every backward pass that differentiates A or ``damp``, outside of ``torch.func`` transforms.
        products: of all solves and of the rule itself, with A.
        transposed_products: the same with A'.
        steps: (...,) of the solution itself, by which the cost of a solve is judged.
        factor: of the Gram matrix of a dense A, once a derivative has made it.
    """

    solves: list[DerivativeSolve] = field(default_factory=list)
    regimes: list[Regime] = field(default_factory=list)
    products: int = 0
    transposed_products: int = 0
    steps: Tensor | None = field(default=None, repr=False)
    factor: Factor | None = field(default=None, repr=False)

    @property
    def converged(self) -> bool:
        """Whether every solve converged."""
        return all(solve.converged for solve in self.solves)

    def clear(self) -> None:
        """Forget everything so far."""
        self.solves.clear()
        self.regimes.clear()
        self.factor = None
        self.products = self.transposed_products = 0


def failed(reason: Tensor) -> Tensor:
    """Return whether x is not a solution, for codes of :class:`StopReason`."""
    found = torch.zeros_like(reason, dtype=torch.bool)
    for code in NOT_CONVERGED:
        found = found | (reason == code)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The primitive: values.
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """What a solve is, apart from its tensors.

    Attributes:
        map: A.
        transposed: whether A' takes the place of A.
        limits: when to stop.
        on_failure: what to do with items that do not converge.
        solves_for: empty for the solution, else the vector of the rule.
        log: where solves of derivatives are noted.
    """

    map: LinearMap
    transposed: bool
    limits: Limits
    on_failure: OnFailure
    solves_for: str
    log: DerivativeLog

    def derived(self, solves_for: str, transpose: bool) -> Operator:
        """Return the operator of a solve inside of a derivative."""
        return replace(self, transposed=self.transposed != transpose, on_failure="keep", solves_for=solves_for)

    @property
    def columns(self) -> int:
        """Length of the solution."""
        return self.map.rows if self.transposed else self.map.columns

    def times(self, x: Tensor, parameters: Sequence[Tensor], transpose: bool = False) -> Tensor:
        """Return ``A x`` or ``A'x`` in differentiable operations, where A is what this operator inverts."""
        if self.transposed != transpose:
            self.log.transposed_products += 1
            return self.map.vecmat(x, parameters)
        self.log.products += 1
        return self.map.matvec(x, parameters)


def _values(
    op: Operator, rhs: Tensor, damp: Tensor | None, start: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve; return x, stop reasons, steps, and (..., 7) figures: five of the outcome, products with A, with A'."""
    example = rhs.new_zeros(()).expand(*rhs.shape[:-1], op.map.columns)
    matvec, vecmat = op.map.products(parameters, example)
    extra = 1 if op.map.pulls_back else 0
    if op.transposed:
        matvec, vecmat = vecmat, matvec
    begun = _begin(op, rhs, damp, parameters) if op.solves_for else None
    found = _run(op, matvec, vecmat, rhs, damp, start if begun is None else begun)
    products, transposed = found.products, found.transposed_products
    if begun is not None:
        transposed += 1  # of the start, whatever the shape
    if op.transposed:
        products, transposed = transposed, products
    products += extra
    unsolved = failed(found.stop_reason)
    x = found.x
    if op.solves_for:
        op.log.products += products
        op.log.transposed_products += transposed
        op.log.solves.append(
            DerivativeSolve(op.solves_for, found.stop_reason, found.steps, products, transposed, begun is not None)
        )
        if bool(unsolved.any()):
            warnings.warn(
                f"the solve for {op.solves_for} in a derivative of lstsq did not converge: "
                f"{_failures(found.stop_reason)}",
                AdjointNotConvergedWarning,
                stacklevel=2,
            )
    else:
        op.log.steps = found.steps
    if op.on_failure == "raise" and bool(unsolved.any()):
        invalid = found.stop_reason == StopReason.INVALID_INPUT
        status = torch.where(invalid, int(Status.INVALID_INPUT), int(Status.NOT_CONVERGED))
        codes = torch.where(unsolved, status, int(Status.SOLVED)).reshape(-1).cpu().numpy().astype(np.int8)
        raise SolveError(_failures(found.stop_reason), codes)
    if op.on_failure == "nan":
        x = torch.where(unsolved.unsqueeze(-1), torch.nan, x)
    counts = torch.tensor([products, transposed], dtype=torch.float64, device=x.device)
    figures = torch.stack(
        [found.norm_residual, found.norm_normal_residual, found.norm_matrix, found.condition, found.norm_x], -1
    )
    return x, found.stop_reason, found.steps, torch.cat([figures, counts.expand(*figures.shape[:-1], 2)], -1)


def _begin(op: Operator, rhs: Tensor, damp: Tensor | None, parameters: Sequence[Tensor]) -> Tensor | None:
    """Return a start by a factor, where A is one dense matrix and that costs less than the steps it saves."""
    log = op.log
    if not isinstance(op.map, DenseMap) or log.steps is None or parameters[0].shape[:-2].numel() != 1:
        return None
    if (damp is not None and damp.numel() != 1) or parameters[0].is_inference() or log.steps.numel() == 0:
        return None
    if not worth_it(op.map.rows, op.map.columns, int(log.steps.max())):
        return None
    matrix = parameters[0].detach().reshape(op.map.rows, op.map.columns)
    log.factor = factor(matrix, 0.0 if damp is None else float(damp), log.factor)
    if log.factor.cholesky is None:
        return None
    return begin(matrix, log.factor.cholesky, rhs, op.transposed)


def _run(
    op: Operator,
    matvec: Callable[[Tensor], Tensor],
    vecmat: Callable[[Tensor], Tensor],
    rhs: Tensor,
    damp: Tensor | None,
    start: Tensor | None,
) -> Outcome:
    """Call the iteration; a start makes it one for the shifted system ``[A; damp I] d = [b - A x0; -damp x0]``."""
    if start is None:
        return lsmr(matvec, vecmat, rhs, damp, op.limits, columns=op.columns)
    rows = rhs.shape[-1]
    norm = torch.linalg.vector_norm(rhs, dim=-1)
    shifted = rhs - matvec(start)
    if damp is None:
        found = lsmr(matvec, vecmat, shifted, None, op.limits, columns=op.columns, start=start, norm_rhs=norm)
    else:
        factor = damp.unsqueeze(-1)
        found = lsmr(
            lambda d: torch.cat([matvec(d), factor * d], -1),
            lambda y: vecmat(y[..., :rows]) + factor * y[..., rows:],
            torch.cat([shifted, -factor * start], -1),
            None,
            op.limits,
            columns=op.columns,
            start=start,
            norm_rhs=norm,
        )
    return found._replace(products=found.products + 1)


def _failures(reason: Tensor) -> str:
    """Name the items that did not converge and why."""
    codes = reason.reshape(-1).tolist()
    failing = [(item, StopReason(code)) for item, code in enumerate(codes) if not StopReason(code).converged]
    parts = [f"item {item}: {code.name}, {code.sentence}" for item, code in failing[:NAMED_ITEMS]]
    more = f"; and {len(failing) - NAMED_ITEMS} more" if len(failing) > NAMED_ITEMS else ""
    return f"{len(failing)} of {len(codes)} items failed: {'; '.join(parts)}{more}"


# ----------------------------------------------------------------------------------------------------------------------
# The rule of the module docstring.
# ----------------------------------------------------------------------------------------------------------------------


def solve(
    op: Operator, rhs: Tensor, damp: Tensor | None, start: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what :func:`_values` returns, differentiable in ``rhs``, ``damp`` and the parameters."""
    return _Lstsq.apply(op, rhs, damp, start, *parameters)  # pyright: ignore[reportReturnType]


def _some(mask: Tensor) -> bool:
    """Whether an item is marked; yes inside of a transform, where nobody can look."""
    return transforms_active() or bool(mask.any())


def _norm(vector: Tensor) -> Tensor:
    """Return the Euclidean norm of the last axis, (..., 1); for decisions, not for derivatives."""
    return torch.linalg.vector_norm(vector.detach(), dim=-1, keepdim=True)


class _Point(NamedTuple):
    """A problem and its solution.

    Attributes:
        op: the problem apart from its tensors.
        rhs: (..., m).
        damp: (...,), None for none.
        parameters: of the map.
        x: (..., n) the solution.
        reason: (...,) its stop reason.
        regular: (..., 1) items in which every coordinate is damped.
        square: (..., 1) ``damp^2``, one in other items; None without ``damp``.
        d: (..., n) diagonal of a stacked map, one in other items; None for other maps.
    """

    op: Operator
    rhs: Tensor
    damp: Tensor | None
    parameters: Sequence[Tensor]
    x: Tensor
    reason: Tensor
    regular: Tensor
    square: Tensor | None
    d: Tensor | None

    @staticmethod
    def of(
        op: Operator, rhs: Tensor, damp: Tensor | None, parameters: Sequence[Tensor], x: Tensor, reason: Tensor
    ) -> _Point:
        """Find out what is damped."""
        square = d = None
        if damp is not None:
            regular = (damp != 0.0).unsqueeze(-1)
            square = torch.where(regular, damp.unsqueeze(-1) ** 2, 1.0)
        elif isinstance(op.map, StackedMap):
            regular = (parameters[0] != 0.0).all(-1, keepdim=True)
            d = torch.where(regular, parameters[0], 1.0)
        else:
            regular = torch.zeros_like(reason, dtype=torch.bool).unsqueeze(-1)
        return _Point(op, rhs, damp, parameters, x, reason, regular, square, d)

    def times(self, x: Tensor) -> Tensor:
        """Return ``A x``."""
        return self.op.times(x, self.parameters)

    def times_transposed(self, y: Tensor) -> Tensor:
        """Return ``A'y``."""
        return self.op.times(y, self.parameters, transpose=True)

    def solve(self, solves_for: str, rhs: Tensor, transpose: bool = False) -> tuple[Tensor, Tensor]:
        """Return ``L(A, rhs)`` or ``L(A', rhs)`` and the stop reasons."""
        found = solve(self.op.derived(solves_for, transpose), rhs, self.damp, None, self.parameters)
        return found[0], found[1]

    def corrected(
        self, solves_for: str, guess: Tensor | None, image: Tensor, wanted: Tensor, transpose: bool
    ) -> Tensor | None:
        """Return ``guess + L(A, image - A guess)`` in the items wanted, ``guess`` in the others; None is zero."""
        if not _some(wanted):
            return guess
        if guess is None:
            return self.solve(solves_for, torch.where(wanted, image, 0.0), transpose)[0]
        times = self.times_transposed if transpose else self.times
        return guess + self.solve(solves_for, torch.where(wanted, image - times(guess), 0.0), transpose)[0]

    def lower(self, stacked: Tensor) -> Tensor:
        """Return ``z`` for ``(A z, d z)``: zero in items that are not regular."""
        assert self.d is not None
        return torch.where(self.regular, stacked[..., -self.d.shape[-1] :] / self.d, 0.0)


def _equations_hold(reason: Tensor) -> Tensor:
    """Return (..., 1): whether the residual of a solve was zero as far as asked."""
    return ((reason == StopReason.RESIDUAL) | (reason == StopReason.RESIDUAL_LIMIT)).unsqueeze(-1)


def _cotangents(at: _Point, g: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return the cotangents of rhs, damp and the parameters; None where not wanted."""
    op, regular = at.op, at.regular
    # An item without a solution contributes zero where its cotangent is zero, NaN where it is not.
    unsolved = ~torch.isfinite(at.x.detach()).all(-1, keepdim=True)
    poisoned = unsolved & (g.detach() != 0.0).any(-1, keepdim=True)
    g = torch.where(unsolved, 0.0, g)
    p, p_reason = at.solve("p", g, transpose=True)
    found: list[Tensor | None] = [torch.where(poisoned, torch.nan, p), *(None for _ in wanted[1:])]
    if not any(wanted[1:]):
        return found
    x = torch.where(unsolved, 0.0, at.x)
    r = torch.where(unsolved, 0.0, at.rhs - at.times(x))
    u = g - at.times_transposed(p)

    # Which items need a solve for w and for y (or, damped, for v = r / damp^2).
    solve_w = solve_y = ~regular
    if values_only():
        # Nobody differentiates this: what is zero as far as asked may be left out with all its factors.
        solve_w = solve_w & ~_equations_hold(at.reason) & (r != 0.0).any(-1, keepdim=True)
        solve_y = solve_y & ~_equations_hold(p_reason) & (u != 0.0).any(-1, keepdim=True)
    w = y = by_v = None
    if at.square is not None:
        w = torch.where(regular, u / at.square, 0.0)
        y = torch.where(regular, r / at.square, 0.0)
        correct_w, correct_v, by_v = _cancelled(at, g, p, u, r, x, params=any(wanted[2:]), damp=wanted[1])
        solve_w, solve_y = solve_w | correct_w, solve_y | correct_v
    elif at.d is not None and not op.transposed:
        w = at.lower(p)
        smallest = at.d.detach().abs().amin(-1, keepdim=True)
        size = _norm(p) * _norm(x) + _norm(r) * _norm(w)
        solve_w = solve_w | regular & (_norm(r) * _norm(p) > _DIGITS * smallest * size)
        lost = regular & (_norm(at.rhs) * _norm(w) > _DIGITS * size)
        if _some(lost):  # K'r = 0: what is in the range of K is error
            r = r - at.times(at.solve("r", torch.where(lost, r, 0.0))[0])
    elif at.d is not None:
        y = at.lower(x)
        smallest = at.d.detach().abs().amin(-1, keepdim=True)
        size = _norm(p) * _norm(x) + _norm(u) * _norm(y)
        solve_y = solve_y | regular & (_norm(u) * _norm(x) > _DIGITS * smallest * size)
    w = at.corrected("w", w, p, solve_w, False)
    if any(wanted[2:]) or (by_v is not None and _some(by_v)):
        y = at.corrected("y", y, x, solve_y, True)
    if wanted[1]:
        assert at.damp is not None
        assert w is not None
        product = torch.linalg.vecdot(w, x)
        if y is not None and by_v is not None:
            product = torch.where(by_v.squeeze(-1), torch.linalg.vecdot(p, y), product)
        found[1] = torch.where(poisoned.squeeze(-1), torch.nan, -2.0 * at.damp * product)
    if any(wanted[2:]):
        if at.square is not None:
            assert y is not None
            # damp^2 v is r with the digits that b - A x has lost.
            r = torch.where(solve_y & regular, at.square * y, r)
            y = None if not _some(~regular) else torch.where(regular, 0.0, y)
        terms = [(-p, torch.where(poisoned, torch.nan, x))]
        if w is not None:
            terms.append((r, w))
        if y is not None:
            terms.append((y, u))
        if op.transposed:
            terms = [(right, left) for left, right in terms]
        op.log.products += len(terms)
        found[2:] = op.map.pull(at.parameters, terms, wanted[2:])
    if not transforms_active():
        op.log.regimes.append(Regime(solve_w.squeeze(-1), solve_y.squeeze(-1)))
    return found


def _cancelled(
    at: _Point, g: Tensor, p: Tensor, u: Tensor, r: Tensor, x: Tensor, params: bool, damp: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for damped items what ``u = g - A'p`` and ``r = b - A x`` have lost too many digits for.

    Their errors are about ``tol |g|`` and ``tol |b|``. In ``<r, A* w>`` these become ``tol |r| |g| / damp^2`` and
    ``tol |b| |u| / damp^2``, to be compared with ``|p| |x| + |r| |u| / damp^2``, the size of the terms themselves.

    ``<w, x>`` is ``<u, x> / damp^2``, and ``<p, r> / damp^2`` because ``A w = p`` and ``x = A'v``; the product of the
    smaller vectors has the smaller error. Of w only the part in the range of A' counts, whose norm is
    ``|p|^2 / |A'p|`` at least.

    Returns:
        (..., 1) bool: whether w is to be solved for, whether v, and whether ``<w, x>`` is to be taken as ``<p, v>``.
    """
    assert at.square is not None
    norm_b, norm_g, norm_p, norm_u, norm_r, norm_x = map(_norm, (at.rhs, g, p, u, r, x))
    square = at.square.detach()
    correct_w = correct_v = by_v = torch.zeros_like(at.regular)
    if params:
        size = square * norm_p * norm_x + norm_r * norm_u
        correct_w, correct_v = norm_r * norm_g > _DIGITS * size, norm_b * norm_u > _DIGITS * size
    if damp:
        by_v = at.regular & (norm_p * norm_r < norm_u * norm_x)
        size, pulled = square * norm_p**2 * norm_x, _norm(g - u)
        correct_w = correct_w | ~by_v & (norm_g * norm_x * pulled > _DIGITS * size)
        correct_v = correct_v | by_v & (norm_b * norm_p * pulled > _DIGITS * size)
    return at.regular & correct_w, at.regular & correct_v, by_v


def _tangent(at: _Point, d_rhs: Tensor | None, d_damp: Tensor | None, d_parameters: Sequence[Tensor | None]) -> Tensor:
    """Return the tangent of x: ``c + L(A, b' - A* x + (p - A c))``, c what is known of ``H^-1 f`` and ``A*'y``.

    Here ``f = A*'r - 2 damp damp' x`` and ``p = L(A', f)``. All corrections share the last solve.
    """
    op, x, regular = at.op, at.x, at.regular
    rhs = torch.zeros_like(at.rhs) if d_rhs is None else d_rhs
    turned = any(tangent is not None for tangent in d_parameters)
    if not turned and d_damp is None:
        return at.solve("tangent", rhs)[0]
    push, push_transposed = op.map.push, op.map.push_transposed
    if op.transposed:
        push, push_transposed = push_transposed, push
    f = c = torch.zeros_like(x)
    if turned:
        r = at.rhs - at.times(x)
        y = None
        solve_y = ~regular
        if at.square is not None:
            y = torch.where(regular, r / at.square, 0.0)
            solve_y = solve_y | regular & (_norm(at.rhs) > _DIGITS * _norm(r))
        elif at.d is not None and op.transposed:
            y = at.lower(x)
        y = at.corrected("y", y, x, solve_y, True)
        y = torch.zeros_like(r) if y is None else y
        if at.square is not None:
            r = torch.where(solve_y & regular, at.square * y, r)
            y = torch.where(regular, 0.0, y)
        if at.d is not None and op.transposed:
            r = torch.where(regular, 0.0, r)  # full row rank
        op.log.products += 1
        op.log.transposed_products += 2
        rhs = rhs - push(x, at.parameters, d_parameters)
        f = push_transposed(r, at.parameters, d_parameters)
        c = push_transposed(y, at.parameters, d_parameters)
    if d_damp is not None:
        assert at.damp is not None
        f = f - 2.0 * (at.damp * d_damp).unsqueeze(-1) * x
    p, _ = at.solve("p", f, transpose=True)
    if at.square is not None:
        c = c + torch.where(regular, (f - at.times_transposed(p)) / at.square, 0.0)
    elif at.d is not None and not op.transposed:
        c = c + at.lower(p)
    return c + at.solve("tangent", rhs + p - at.times(c))[0]


class _Lstsq(torch.autograd.Function):
    """The primitive in eager mode and inside of ``torch.func`` transforms."""

    @staticmethod
    def forward(
        op: Operator, rhs: Tensor, damp: Tensor | None, start: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of :func:`solve`, in order."""
        return _values(op, rhs, damp, start, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save for both modes."""
        op, rhs, damp, _, *parameters = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.op = op
        saved = (rhs, damp, output[0], output[1], *parameters)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        rhs, damp, x, reason, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if cotangents[0] is None:
            return (None,) * len(needs)
        if is_legacy_batchedtensor(cotangents[0]):
            raise RuntimeError(
                "lstsq cannot take batched cotangents of torch.autograd (is_grads_batched=True, vectorize=True): use "
                "torch.func.jacrev or torch.func.vmap"
            )
        at = _Point.of(ctx.op, rhs, damp, parameters, x, reason)
        found = _cotangents(at, cotangents[0], (needs[1], needs[2], *needs[4:]))
        return (None, found[0] if needs[1] else None, found[1], None, *found[2:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        with outer_tangents():
            rhs, damp, x, reason, *parameters = primals(ctx.saved_tensors)
            at = _Point.of(ctx.op, rhs, damp, parameters, x, reason)
            d_parameters = [t if p.is_floating_point() else None for t, p in zip(tangents[4:], parameters, strict=True)]
            return _tangent(at, tangents[1], tangents[2], d_parameters), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Put the mapped axis in front of the batch axes."""
        op, rhs, damp, start, *parameters = inputs
        size = info.batch_size

        def whole(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        batch_dims = rhs.dim() - (1 if in_dims[1] is None else 2)
        found, moved = op.map.mapped(parameters, in_dims[4:], size, batch_dims)
        rhs, damp, start = (whole(inputs[place], in_dims[place]) for place in (1, 2, 3))
        assert rhs is not None
        return solve(replace(op, map=found), rhs, damp, start, moved), (0, 0, 0, 0)
