"""LSMR (Fong and Saunders 2011) for a batch of problems: values only, no calculus.

    min_x |A x - b|^2 + damp^2 |x|^2

by products with A and A'. Golub-Kahan bidiagonalisation, two orthogonalisations of the bidiagonal matrix, and the
estimates of ``|r|``, ``|A'r - damp^2 x|``, ``|A|`` (Frobenius) and ``cond(A)`` that come for nothing from the
rotations. Started at zero the iterates stay in the range of A', so that the limit is the solution of minimum norm.

Vectors are (..., m) and (..., n), every leading axis is batch; an item that has stopped is frozen. Scalars are kept in
float64 whatever the vectors are. There are two loops: one of pure functions of tensors, for any device, each of which
``torch.compile`` takes whole and which the host asks for the end only now and then; and one for main memory, in place
and with compiled scalars (:mod:`hsbackend._lsmr_kernels`), which asks at every step because that costs nothing there.

Source: D. C.-L. Fong and M. Saunders, "LSMR: An iterative algorithm for sparse least-squares problems", SIAM J. Sci.
Comput. 33 (2011), algorithm and sections 3.1 to 3.5 for the estimates and the stopping rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsbackend import _lsmr_kernels as kernels

Product = Callable[[Tensor], Tensor]


class StopReason(IntEnum):
    """Why the iteration of one item ended. Codes 0 to 7 are those of SciPy's ``lsmr``.

    ``r = b - A x``; with damping ``r`` and A stand for the augmented ``(b - A x, -damp x)`` and ``[A; damp I]``.

    ==== ======================= ========= ============================================================================
    code name                    converged meaning
    ==== ======================= ========= ============================================================================
    0    ``ZERO``                yes       ``A'b = 0`` (also ``b = 0``): x = 0, or the start, is the solution
    1    ``RESIDUAL``            yes       ``A x = b`` as far as asked: ``|r| <= btol |b| + atol |A| |x|``
    2    ``NORMAL_RESIDUAL``     yes       least squares as far as asked: ``|A'r| <= atol |A| |r|``
    3    ``CONDITION``           no        the estimate of ``cond(A)`` exceeds ``conlim``
    4    ``RESIDUAL_LIMIT``      yes       as 1, as far as the dtype allows
    5    ``NORMAL_LIMIT``        yes       as 2, as far as the dtype allows
    6    ``CONDITION_LIMIT``     no        ``cond(A)`` is too large for the dtype
    7    ``MAX_STEPS``           no        ``max_steps`` were made before any of the above
    8    ``INVALID_INPUT``       no        the right-hand side, ``damp``, or a product with A holds NaN or infinity
    ==== ======================= ========= ============================================================================
    """

    ZERO = 0
    RESIDUAL = 1
    NORMAL_RESIDUAL = 2
    CONDITION = 3
    RESIDUAL_LIMIT = 4
    NORMAL_LIMIT = 5
    CONDITION_LIMIT = 6
    MAX_STEPS = 7
    INVALID_INPUT = 8

    @property
    def converged(self) -> bool:
        """Whether the item is solved."""
        return self not in NOT_CONVERGED

    @property
    def sentence(self) -> str:
        """Say in words what happened, in lower case."""
        return _SENTENCES[self]


#: Reasons after which x is not a solution.
NOT_CONVERGED = (
    StopReason.CONDITION,
    StopReason.CONDITION_LIMIT,
    StopReason.MAX_STEPS,
    StopReason.INVALID_INPUT,
)
_SENTENCES = {
    StopReason.ZERO: "zero is the solution",
    StopReason.RESIDUAL: "the equations hold within the tolerances",
    StopReason.NORMAL_RESIDUAL: "the normal equations hold within the tolerance",
    StopReason.CONDITION: "the condition estimate exceeds conlim; damp, precondition, or raise conlim",
    StopReason.RESIDUAL_LIMIT: "the equations hold as far as the dtype allows",
    StopReason.NORMAL_LIMIT: "the normal equations hold as far as the dtype allows",
    StopReason.CONDITION_LIMIT: "the condition estimate is too large for the dtype; damp or precondition",
    StopReason.MAX_STEPS: "max_steps were not enough; raise it, loosen atol and btol, damp, or precondition",
    StopReason.INVALID_INPUT: "b, damp, or a product with A holds NaN or infinity",
}


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        atol: of ``|A'r| / (|A| |r|)``.
        btol: of ``|r| / |b|``.
        conlim: largest estimate of the condition number; infinity for no limit but that of the dtype.
        max_steps: most steps.
        check_every: the host asks every so many steps whether all items have stopped. The items themselves
            stop at their own step whatever this is. The loop for main memory asks at every step.
        compiled: take the loop of pure functions, through ``torch.compile``.
    """

    atol: float
    btol: float
    conlim: float
    max_steps: int
    check_every: int
    compiled: bool = False


class Outcome(NamedTuple):
    """What :func:`lsmr` returns. The norms are the estimates of the iteration, (...,) float64.

    Attributes:
        x: (..., n).
        stop_reason: (...,) int8.
        steps: (...,) int32.
        norm_residual: ``|r|`` of the augmented residual.
        norm_normal_residual: ``|A'r - damp^2 x|``.
        norm_matrix: ``|A|``, Frobenius, from below.
        condition: of ``[A; damp I]``, from below.
        norm_x: ``|x|``.
        products: number of products with A.
        transposed_products: number of products with A'.
    """

    x: Tensor
    stop_reason: Tensor
    steps: Tensor
    norm_residual: Tensor
    norm_normal_residual: Tensor
    norm_matrix: Tensor
    condition: Tensor
    norm_x: Tensor
    products: int
    transposed_products: int


class Figures(NamedTuple):
    """What is reported of an item, as it was when it stopped; (...,) float64."""

    norm_residual: Tensor
    norm_normal_residual: Tensor
    norm_matrix: Tensor
    condition: Tensor
    norm_x: Tensor


class Scalars(NamedTuple):
    """The scalars carried from step to step, (...,) float64; names of the paper."""

    alpha: Tensor
    alphabar: Tensor
    zeta: Tensor
    zetabar: Tensor
    rho: Tensor
    rhobar: Tensor
    cbar: Tensor
    sbar: Tensor
    betadd: Tensor
    betad: Tensor
    rhodold: Tensor
    tautildeold: Tensor
    thetatilde: Tensor
    d: Tensor
    norm_matrix_squared: Tensor
    largest: Tensor
    smallest: Tensor


class State(NamedTuple):
    """Everything that changes from step to step; tensors of constant shape.

    Attributes:
        u: (..., m), of norm one, or zero.
        v: (..., n), of norm one, or zero.
        h: (..., n).
        hbar: (..., n).
        x: (..., n).
        scalars: of the rotations.
        figures: of the last step that counted.
        reason: (...,) float64 code, -1 for items that go on.
        steps: (...,) int32.
    """

    u: Tensor
    v: Tensor
    h: Tensor
    hbar: Tensor
    x: Tensor
    scalars: Scalars
    figures: Figures
    reason: Tensor
    steps: Tensor


def _norm(vector: Tensor) -> Tensor:
    """Return the Euclidean norm of the last axis in float64."""
    return torch.linalg.vector_norm(vector, dim=-1).double()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; zero where the denominator is zero."""
    return torch.where(denominator == 0.0, 0.0, numerator / denominator)


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c, s, r with ``[c s; -s c] [a; b] = [r; 0]``."""
    r = torch.hypot(a, b)
    zero = r == 0.0
    safe = torch.where(zero, 1.0, r)
    return torch.where(zero, 1.0, a / safe), b / safe, r


def _column(scalar: Tensor, like: Tensor) -> Tensor:
    """Return (...,) scalars as (..., 1) in the dtype of the vectors."""
    return scalar.to(like.dtype).unsqueeze(-1)


def _normalised(vector: Tensor, norm: Tensor) -> Tensor:
    """Divide by the norm; an item whose norm is zero or not finite goes on with zeros, which no product makes NaN."""
    good = torch.isfinite(norm) & (norm > 0.0)
    scaled = vector * _column(1.0 / torch.where(good, norm, 1.0), vector)
    return torch.where(good.unsqueeze(-1), scaled, 0.0)


def next_vector(product: Tensor, factor: Tensor, old: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``product - factor old``, normalised, and its norm: one half of a step of the bidiagonalisation."""
    vector = product - _column(factor, product) * old
    norm = _norm(vector)
    return _normalised(vector, torch.where(going, norm, 0.0)), norm


def _rotate(
    at: Scalars, alpha: Tensor, beta: Tensor, damp: Tensor | None, first: bool
) -> tuple[Scalars, Tensor, Tensor, Tensor, Figures]:
    """Do the rotations of one step.

    Args:
        at: scalars of the step before.
        alpha: alpha_{k+1}.
        beta: beta_{k+1}.
        damp: damping, None for zero.
        first: whether this is step one, whose singular value estimate does not count yet.

    Returns:
        The next scalars; the factors of ``hbar = h - f hbar``, ``x += g hbar``, ``h = v - e h``; the figures without
        ``norm_x``.
    """
    betaacute, d = at.betadd, at.d
    alphahat = at.alphabar
    if damp is not None:
        chat, shat, alphahat = _rotation(at.alphabar, damp)
        betaacute = chat * at.betadd
        betacheck = shat * at.betadd
        d = d + betacheck * betacheck
    c, s, rho = _rotation(alphahat, beta)
    thetanew, alphabar = s * alpha, c * alpha
    thetabar, rhotemp = at.sbar * rho, at.cbar * rho
    cbar, sbar, rhobar = _rotation(rhotemp, thetanew)
    zeta, zetabar = cbar * at.zetabar, -sbar * at.zetabar
    f = _ratio(thetabar * rho, at.rho * at.rhobar)
    g = _ratio(zeta, rho * rhobar)
    e = _ratio(thetanew, rho)

    betahat, betadd = c * betaacute, -s * betaacute
    ctilde, stilde, rhotilde = _rotation(at.rhodold, thetabar)
    thetatilde, rhodold = stilde * rhobar, ctilde * rhobar
    betad = ctilde * betahat - stilde * at.betad
    tautildeold = _ratio(at.zeta - at.thetatilde * at.tautildeold, rhotilde)
    taud = _ratio(zeta - thetatilde * tautildeold, rhodold)
    norm_residual = torch.sqrt(d + (betad - taud) ** 2 + betadd * betadd)

    squared = at.norm_matrix_squared + beta * beta
    largest = torch.maximum(at.largest, at.rhobar)
    smallest = at.smallest if first else torch.minimum(at.smallest, at.rhobar)
    condition = torch.maximum(largest, rhotemp) / torch.minimum(smallest, rhotemp)
    scalars = Scalars(
        alpha, alphabar, zeta, zetabar, rho, rhobar, cbar, sbar, betadd, betad, rhodold, tautildeold, thetatilde, d,
        squared + alpha * alpha, largest, smallest,
    )  # fmt: skip
    figures = Figures(norm_residual, zetabar.abs(), torch.sqrt(squared), condition, norm_residual)
    return scalars, f, g, e, figures


#: Codes in the order of the tests in :func:`_decide`, as numbers: torch.compile does not know enumerations.
_LATER_WINS = tuple(float(code) for code in (6, 5, 4, 3, 2, 1, 8))


def _decide(found: Figures, norm_rhs: Tensor, atol: float, btol: float, conlim: float, unit: float) -> Tensor:
    """Return the stop reason of each item after a step, -1 to go on; the first that holds in the order 8, 1, ... 6."""
    safe = torch.where(norm_rhs == 0.0, 1.0, norm_rhs)
    test1 = found.norm_residual / safe
    size = found.norm_matrix * found.norm_residual
    test2 = torch.where(size == 0.0, torch.inf, found.norm_normal_residual / torch.where(size == 0.0, 1.0, size))
    growth = found.norm_matrix * found.norm_x / safe
    reason = torch.full_like(test1, -1.0)
    holds = (
        found.condition * unit >= 1.0,
        test2 <= unit,
        test1 / (1.0 + growth) <= unit,
        found.condition >= conlim,
        test2 <= atol,
        test1 <= btol + atol * growth,
        ~torch.isfinite(found.norm_residual + found.norm_normal_residual),
    )
    for held, code in zip(holds, _LATER_WINS, strict=True):
        reason = torch.where(held, code, reason)
    return reason


def finish_step(
    at: State, u: Tensor, v: Tensor, beta: Tensor, alpha: Tensor, damp: Tensor | None, norm_rhs: Tensor,
    atol: float, btol: float, conlim: float, unit: float, first: bool,
) -> State:  # fmt: skip
    """Rotate, update x, decide who stops: what is left of a step after its two products."""
    going = at.reason < 0.0
    scalars, f, g, e, found = _rotate(at.scalars, alpha, beta, damp, first)
    hbar = at.h - _column(f, u) * at.hbar
    x = torch.where(going.unsqueeze(-1), at.x + _column(torch.where(torch.isfinite(g), g, 0.0), u) * hbar, at.x)
    h = v - _column(e, u) * at.h
    found = found._replace(norm_x=_norm(x))
    reason = torch.where(going, _decide(found, norm_rhs, atol, btol, conlim, unit), at.reason)
    figures = Figures(*(torch.where(going, new, old) for new, old in zip(found, at.figures, strict=True)))
    return State(u, v, h, hbar, x, scalars, figures, reason, torch.where(going, at.steps + 1, at.steps))


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def _whole(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """Return the function, through ``torch.compile`` if asked for; that is done once per process."""
    if not compiled:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, fullgraph=True, dynamic=False)
    return _compiled[function]


def _iterate(
    matvec: Product, vecmat: Product, at: State, damp: Tensor | None, norm_rhs: Tensor, limits: Limits, unit: float
) -> tuple[State, int]:
    """Step until all items have stopped; pure functions of tensors."""
    half, rest = _whole(next_vector, limits.compiled), _whole(finish_step, limits.compiled)
    done = 0
    for step in range(1, limits.max_steps + 1):
        if (step - 1) % limits.check_every == 0 and bool((at.reason >= 0.0).all()):
            break
        going = at.reason < 0.0
        u, beta = half(matvec(at.v), at.scalars.alpha, at.u, going)
        v, alpha = half(vecmat(u), beta, at.v, going)
        at = rest(at, u, v, beta, alpha, damp, norm_rhs, limits.atol, limits.btol, limits.conlim, unit, step == 1)
        done = step
    return at, done


def _iterate_in_place(
    matvec: Product, vecmat: Product, at: State, damp: Tensor | None, norm_rhs: Tensor, limits: Limits, unit: float
) -> tuple[State, int]:
    """Do what :func:`_iterate` does, in main memory."""
    batch, size = at.reason.shape, at.reason.numel()
    dtype = at.u.dtype
    u, v, h, hbar, x = (
        vector.reshape(size, vector.shape[-1]).contiguous() for vector in (at.u, at.v, at.h, at.hbar, at.x)
    )
    u_shaped, v_shaped = u.view(at.u.shape), v.view(at.v.shape)
    s = at.scalars
    rows = (
        s.alpha, torch.zeros_like(s.alpha), s.alphabar, s.zeta, s.zetabar, s.rho, s.rhobar, s.cbar, s.sbar, s.betadd,
        s.betad, s.rhodold, s.tautildeold, s.thetatilde, s.d, s.norm_matrix_squared, s.largest, s.smallest,
    )  # fmt: skip
    state = torch.stack([row.reshape(size) for row in rows]).numpy()
    figures = torch.stack([row.reshape(size) for row in at.figures]).numpy()
    reason = at.reason.reshape(size).to(torch.int8).numpy()
    steps = at.steps.reshape(size).numpy()
    damped = damp is not None
    damping = np.zeros(0) if damp is None else damp.reshape(size).contiguous().numpy()
    norm_rhs_values = norm_rhs.reshape(size).contiguous().numpy()
    factors_tensor = torch.zeros(7, size, 1, dtype=dtype)
    factors = factors_tensor.numpy()[..., 0]
    factors[0] = -state[0]
    minus_alpha, over_beta, minus_beta, over_alpha, minus_f, g, minus_e = factors_tensor
    norm_tensor = torch.zeros(size, dtype=dtype)
    norm = norm_tensor.numpy()
    done = 0
    going = int((reason < 0).sum())
    while going and done < limits.max_steps:
        done += 1
        u.mul_(minus_alpha).add_(matvec(v_shaped).reshape(u.shape))
        torch.linalg.vector_norm(u, dim=-1, out=norm_tensor)
        if kernels.take_beta(norm, state, factors, reason):
            u.masked_fill_(~torch.isfinite(norm_tensor).unsqueeze(-1), 0.0)
        u.mul_(over_beta)
        v.mul_(minus_beta).add_(vecmat(u_shaped).reshape(v.shape))
        torch.linalg.vector_norm(v, dim=-1, out=norm_tensor)
        if kernels.take_alpha(norm, state, factors, reason, figures, damping, damped, done == 1):
            v.masked_fill_(~torch.isfinite(norm_tensor).unsqueeze(-1), 0.0)
        v.mul_(over_alpha)
        hbar.mul_(minus_f).add_(h)
        x.addcmul_(g, hbar)
        h.mul_(minus_e).add_(v)
        torch.linalg.vector_norm(x, dim=-1, out=norm_tensor)
        going = kernels.decide(
            done, norm, norm_rhs_values, figures, reason, steps, limits.atol, limits.btol, limits.conlim, unit
        )
    found = Figures(*(torch.from_numpy(row).reshape(batch) for row in figures))
    return at._replace(
        x=x.view(at.x.shape), figures=found, reason=torch.from_numpy(reason).reshape(batch).double(),
        steps=torch.from_numpy(steps).reshape(batch),
    ), done  # fmt: skip


def lsmr(
    matvec: Product,
    vecmat: Product,
    rhs: Tensor,
    damp: Tensor | None,
    limits: Limits,
    *,
    columns: int,
    start: Tensor | None = None,
    norm_rhs: Tensor | None = None,
    in_place: bool | None = None,
) -> Outcome:
    """Minimise ``|A d - rhs|^2 + damp^2 |d|^2`` and return ``start + d``.

    Args:
        matvec: (..., n) to (..., m).
        vecmat: (..., m) to (..., n).
        rhs: (..., m) float32 or float64.
        damp: (...,) float64, None for zero.
        limits: when to stop.
        columns: n.
        start: (..., n), zero if None. ``rhs`` has to be the residual of it.
        norm_rhs: (...,) ``|b|`` in the stopping rule; that of ``rhs`` if None.
        in_place: which loop; by default the one in place for tensors in main memory unless ``limits.compiled``.

    Returns:
        The outcome; x is NaN in items of ``INVALID_INPUT``.
    """
    unit = torch.finfo(rhs.dtype).eps / 2.0
    beta = _norm(rhs)
    bad = ~torch.isfinite(beta)
    if damp is not None:
        bad = bad | ~torch.isfinite(damp)
        damp = torch.where(bad, 0.0, damp.double())
    beta = torch.where(bad, 0.0, beta)
    norm_b = beta if norm_rhs is None else norm_rhs.double()
    x = rhs.new_zeros(*rhs.shape[:-1], columns) if start is None else start.clone(memory_format=torch.contiguous_format)
    u = _normalised(rhs, beta)
    transposed = 0
    v = torch.zeros_like(x)
    if bool((beta > 0.0).any()):
        v = vecmat(u)
        transposed = 1
    alpha = _norm(v)
    bad = bad | ~torch.isfinite(alpha)
    alpha = torch.where(bad, 0.0, alpha)
    v = _normalised(v, alpha)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    scalars = Scalars(
        alpha=alpha, alphabar=alpha, zeta=zero, zetabar=alpha * beta, rho=one, rhobar=one, cbar=one, sbar=zero,
        betadd=beta, betad=zero, rhodold=one, tautildeold=zero, thetatilde=zero, d=zero,
        norm_matrix_squared=alpha * alpha, largest=zero, smallest=torch.full_like(alpha, torch.inf),
    )  # fmt: skip
    figures = Figures(beta, alpha * beta, alpha, one, _norm(x))
    reason = torch.where(bad, float(StopReason.INVALID_INPUT), torch.where(alpha * beta == 0.0, 0.0, -1.0))
    steps = torch.zeros_like(reason, dtype=torch.int32)
    at = State(u, v, v.clone(), torch.zeros_like(v), x, scalars, figures, reason, steps)
    if in_place is None:
        in_place = rhs.device.type == "cpu" and not limits.compiled
    at, done = (_iterate_in_place if in_place else _iterate)(matvec, vecmat, at, damp, norm_b, limits, unit)
    reason = torch.where(at.reason < 0.0, float(StopReason.MAX_STEPS), at.reason)
    x = torch.where((reason == StopReason.INVALID_INPUT).unsqueeze(-1), torch.nan, at.x)
    return Outcome(x, reason.to(torch.int8), at.steps.to(torch.int32), *at.figures, done, transposed + done)
