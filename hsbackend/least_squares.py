"""Least squares by products with A: :func:`lstsq` and the solution it returns.

What is solved and differentiated, and how: :mod:`hsbackend.lstsq_operator`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hsbackend.linear_maps import PreconditionedMap, StackedMap
from hsbackend.lsmr import Limits, StopReason
from hsbackend.lstsq_operator import (
    AdjointNotConvergedWarning,
    DerivativeLog,
    DerivativeSolve,
    OnFailure,
    Operator,
    Regime,
    failed,
    solve,
)
from hsbackend.lstsq_problem import Problem, read_damping, read_preconditioner, read_problem
from hsbackend.status import InvalidOptionError

__all__ = [
    "AdjointNotConvergedWarning",
    "DerivativeLog",
    "DerivativeSolve",
    "LstsqSolution",
    "Norms",
    "Regime",
    "StopReason",
    "lstsq",
]

#: Steps between two questions of the host whether all items have stopped, where a question waits for the device.
_CHECK_EVERY = 16


@dataclass(frozen=True)
class Norms:
    """Estimates of the iteration, float64, not differentiable.

    Attributes:
        residual: (...,) ``|(b - A x, damp (x - centre))|``.
        normal_residual: (...,) ``|A'(b - A x) - damp^2 (x - centre)|``.
        matrix: (...,) Frobenius norm of A, from below; with a preconditioner, damping per coordinate or a start that
            of the matrix iterated with.
        x: (...,) ``|x - centre|``; with a preconditioner that of ``P^-1 (x - centre)``.
    """

    residual: Tensor
    normal_residual: Tensor
    matrix: Tensor
    x: Tensor


@dataclass(frozen=True)
class LstsqSolution:
    """Solution of a least-squares problem.

    Attributes:
        x: tensor (..., n), or tree like ``x_like``; differentiable.
        stop_reason: (...,) int8, codes of :class:`StopReason`.
        iterations: (...,) int32.
        norms: estimates of the iteration.
        condition: (...,) float64, estimate of ``cond([A; damp I])`` from below.
        products: (...,) int64, products with A, the same number for all items because they are iterated together.
        transposed_products: (...,) int64, products with A'.
        derivatives: what derivatives have cost so far and why their solves stopped, filled in when they are computed.
    """

    x: Any
    stop_reason: Tensor
    iterations: Tensor
    norms: Norms
    condition: Tensor
    products: Tensor
    transposed_products: Tensor
    derivatives: DerivativeLog
    _residual: Callable[[], Any] = field(repr=False)

    @property
    def residual(self) -> Any:
        """``b - A x``, like b, by one product each time it is asked for; differentiable."""
        return self._residual()

    @property
    def converged(self) -> Tensor:
        """(...,) bool, whether the item is solved."""
        return ~failed(self.stop_reason)


def lstsq(
    A: Any,
    b: Any,
    *params: Any,
    x_like: Any = None,
    batch_dims: int = 0,
    damp: Any = 0.0,
    centre: Any = None,
    x0: Any = None,
    x0_in_row_space: bool = False,
    atol: float | None = None,
    btol: float | None = None,
    conlim: float | None = None,
    max_steps: int | None = None,
    check_every: int | None = None,
    compile_step: bool = False,
    preconditioner: Any = None,
    on_failure: OnFailure = "raise",
) -> LstsqSolution:
    """Solve a linear least-squares problem by products with A and A'; differentiable to any order.

        x = argmin_x |A x - b|^2 + |damp (x - centre)|^2

    Where the minimiser is not unique (only without damping), the one nearest to ``centre``: of minimum norm by default.

    Args:
        A: one of

            - a tensor (..., m, n), whose batch axes broadcast against those of b;
            - a sparse tensor (m, n), COO, CSR or CSC; its gradient is sparse, with the same pattern (torch cannot
              accumulate one of CSC layout in ``.grad``: ask ``torch.autograd.grad`` for it);
            - a ``scipy.sparse`` matrix, or on the CPU a ``scipy.sparse.linalg.LinearOperator``: constants;
            - a function ``matvec(x, *params)``, linear in x; the transpose is taken by ``torch.func.vjp``;
            - a pair of functions ``(matvec, vecmat)``, the second of ``(y, *params)`` for A'. That one is the transpose
              of the other is not checked.

            Functions are of torch operations, without side effects. Tensors they use besides their arguments are
            constants; ones that require a gradient are refused, outside of ``torch.func`` transforms.
        b: (..., m) float32 or float64; for functions a tensor of any shape or a tree of tensors.
        params: for functions, tensors or trees of tensors that A depends on; differentiable.
        x_like: for functions, a template for the tree, shapes and dtype of x; its values are not used. For a pair it
            may be left out at the price of a product with A'.
        batch_dims: for functions, how many first axes of every leaf of b and x are batch: one problem each.
        damp: lambda, not its square; differentiable. A number; a tensor that broadcasts against x, in which a last axis
            of length 1 means one number per item, (..., 1), and a longer one a number per coordinate, (n,) or
            (..., n); for trees a tree like x, or a tensor of the batch's shape. Zeros are allowed anywhere.
        centre: like x, or broadcasting against it; zero by default; differentiable.
        x0: where the iteration starts; like x. The solution does not depend on it, and no gradient goes to it. It
            saves steps, nothing else: an item starts there if all its coordinates are damped.
        x0_in_row_space: says that ``x0 - centre`` is in the range of A', as every solution for the same A and any x0
            is if A has full column rank. Then undamped items start there too; if it is not true, its part in the null
            space of A stays in x. (To remove that part costs as many steps as a start at zero.)
        atol: stop at ``|A'r| <= atol |A| |r|``, see :class:`StopReason`. 1e-10 by default in float64 and 1e-6 in
            float32: what the rest of a solve loses to a condition of 1e4 and 1e1. 0 for as far as the dtype allows.
        btol: stop at ``|r| <= btol |b| + atol |A| |x|``; the same defaults.
        conlim: stop when the condition estimate exceeds this; by default only at ``2/eps`` of the dtype.
        max_steps: most steps; ``max(4 min(m, n), 100)`` by default: rounding delays the end of ``min(m, n)`` steps.
        check_every: the host asks the device every so many steps whether all items have stopped; 16 by default, and
            always 1 on the CPU, where asking is free. Items stop at their own step whatever this is.
        compile_step: put everything in a step but the products through ``torch.compile``. The first call compiles.
        preconditioner: P, invertible and constant, roughly ``(A'A + damp^2)^(-1/2)``: the iteration is that for ``A P``
            and y, ``x = centre + P y``. A tensor that broadcasts against x is a diagonal; a function of something like
            x, or a pair of functions for P and P'. Without damping and where the minimiser is not unique, x is then
            the one of minimum ``|P^-1 (x - centre)|``. Damping is then stacked under A, and a derivative takes one
            more solve.
        on_failure: ``"raise"`` for an error when an item does not converge, ``"nan"`` for NaN in exactly those items,
            ``"keep"`` for the last iterate of those items.

    Returns:
        The solution; ``x`` and ``residual`` are differentiable in b, params, A, ``damp`` and ``centre``, in reverse
        and forward mode, repeatedly, and under ``torch.func.vmap``, ``grad``, ``jvp``.

    Raises:
        SolveError: with ``on_failure="raise"``, if an item does not converge; ``status`` has a code per item.
        TypeError: for dtypes other than float32 and float64, complex numbers, tensors of different dtypes or devices.
        ValueError: for shapes, trees or options that do not fit, or a function that is not linear or hides parameters.
        InvalidOptionError: for an unknown ``on_failure``.

    Warns:
        AdjointNotConvergedWarning: when a solve inside of a derivative does not converge.

    Notes:
        Cost: per step one product with A and one with A', plus about 5 n + 2 m multiply-adds; memory 5 n + 2 m. A
        function is called once more to check it, and once to record what A' is pulled back through. A backward pass
        takes one solve for A', and when A or ``damp`` needs a gradient a few products more; without damping one
        further solve if A has full rank, two if not, and with damping far below the singular values one
        (``derivatives`` says what it was). Solves of derivatives with one dense A start from a Cholesky factor where
        that costs less than the steps of the forward pass did (:mod:`hsbackend.lstsq_factor`). A failed item
        contributes zero to gradients where its cotangents are zero, NaN where they are not.

        Gradients for undamped problems hold for changes that keep the rank of A. Where it is not full, x is not a
        continuous function of A in other directions.

    Source: Fong and Saunders, "LSMR" (2011); Golub and Pereyra (1973) for the derivative; Roy, Hauberg and Kraemer,
        "Matrix-free least squares solvers" (2025). See docs/least-squares.md.
    """
    if torch.compiler.is_compiling():  # the graph of the caller ends here: this is a loop with an end that data decide
        untraced: Any = torch.compiler.disable(lstsq)
        return untraced(
            A, b, *params, x_like=x_like, batch_dims=batch_dims, damp=damp, centre=centre, x0=x0,
            x0_in_row_space=x0_in_row_space, atol=atol, btol=btol, conlim=conlim, max_steps=max_steps,
            check_every=check_every, compile_step=compile_step, preconditioner=preconditioner, on_failure=on_failure,
        )  # fmt: skip
    if on_failure not in ("raise", "nan", "keep"):
        raise InvalidOptionError(f"on_failure={on_failure!r} is unknown, expected 'raise', 'nan' or 'keep'")
    problem = read_problem(A, b, params, x_like, batch_dims)
    limits = _limits(problem, atol, btol, conlim, max_steps, check_every, compile_step)
    scalar, diagonal = read_damping(damp, problem)
    offset = None if centre is None else problem.vector(centre, "centre")
    start = None if x0 is None else problem.vector(x0, "x0").detach()
    n = problem.map.columns
    log = DerivativeLog()
    op = Operator(problem.map, False, limits, on_failure, "", log)
    parameters, rhs = problem.parameters, problem.b
    spent = problem.products
    if offset is not None:
        rhs = rhs - op.map.matvec(offset, parameters)
        spent += 1
        start = None if start is None else start - offset.detach()
    if start is not None and not x0_in_row_space:
        damped = torch.zeros_like(rhs[..., :1], dtype=torch.bool)
        if scalar is not None:
            damped = (scalar.detach() != 0.0).unsqueeze(-1)
        elif diagonal is not None:
            damped = (diagonal.detach() != 0.0).all(-1, keepdim=True)
        start = torch.where(damped, start, 0.0)
    if preconditioner is not None and scalar is not None:
        scalar, diagonal = None, scalar.unsqueeze(-1).expand(*problem.batch, n)
    if diagonal is not None:
        op = replace(op, map=StackedMap(op.map.rows + n, n, op.map))
        parameters = [diagonal, *parameters]
        rhs = torch.cat([rhs, rhs.new_zeros(*problem.batch, n)], -1)
    if preconditioner is None:
        z, reason, steps, figures = solve(op, rhs, scalar, start, parameters)
    else:
        apply, apply_transposed = read_preconditioner(preconditioner, problem)
        if start is not None:
            rhs = rhs - op.map.matvec(start, parameters)
            spent += 1
        inner = replace(op, map=PreconditionedMap(op.map.rows, n, op.map, apply, apply_transposed))
        y, reason, steps, figures = solve(inner, rhs, None, None, parameters)
        z = apply(y) if start is None else start + apply(y)
    x = z if offset is None else z + offset

    def residual() -> Any:
        return problem.y_tree.unflatten(problem.b - problem.map.matvec(x, problem.parameters))

    return LstsqSolution(
        x=problem.x_tree.unflatten(x),
        stop_reason=reason,
        iterations=steps,
        norms=Norms(figures[..., 0], figures[..., 1], figures[..., 2], figures[..., 4]),
        condition=figures[..., 3],
        products=figures[..., 5].to(torch.int64) + spent,
        transposed_products=figures[..., 6].to(torch.int64),
        derivatives=log,
        _residual=residual,
    )


def _limits(
    problem: Problem, atol: float | None, btol: float | None, conlim: float | None, max_steps: int | None,
    check_every: int | None, compile_step: bool,
) -> Limits:  # fmt: skip
    """Fill in the defaults and refuse what is out of range."""
    default = 1e-10 if problem.b.dtype == torch.float64 else 1e-6
    atol = default if atol is None else atol
    btol = default if btol is None else btol
    conlim = math.inf if conlim is None else conlim
    max_steps = max(4 * min(problem.map.rows, problem.map.columns), 100) if max_steps is None else max_steps
    check_every = _CHECK_EVERY if check_every is None else check_every
    for name, value in (("atol", atol), ("btol", btol)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value!r}, expected a finite number that is not negative")
    if not conlim > 1.0:
        raise ValueError(f"conlim={conlim!r}, expected a number above 1, or None for no limit but the dtype's")
    for name, value in (("max_steps", max_steps), ("check_every", check_every)):
        if value != int(value) or value < 1:
            raise ValueError(f"{name}={value!r}, expected a positive integer")
    return Limits(float(atol), float(btol), float(conlim), int(max_steps), int(check_every), bool(compile_step))
