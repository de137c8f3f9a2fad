"""The judge's own answers: primal, multipliers and gradients of a batch of QPs, from NumPy, SciPy and Clarabel alone.

Each item is solved by Clarabel at tight tolerance, the active rows K are read off (multiplier > slack), and the KKT
system on K is solved to machine precision. Gradients follow from implicit differentiation of that system:

    [Q  N'] [u]   [g]
    [N  0 ] [w] = [0],   N = [A; rows of K],  nu the multipliers of N,  g = dL/dx

    dL/dq = -u,  dL/d(right-hand side of row i) = w_i,  dL/dN = -(nu u' + w x'),  dL/dQ = -1/2 (u x' + x u')

Nothing here imports the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import clarabel
import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsbackend.comparisons.problems import BenchmarkProblem, QPData

# Below this margin (rows normalised to unit length) a point counts as degenerate and its gradient is not judged: a
# solver with residual 1e-8 can then still tell active from inactive rows.
MARGIN_TOLERANCE = 1e-6
# What the polished reference must reach, absolute, to be called a reference; typical values are 1e-15.
RESIDUAL_TOLERANCE = 1e-10
# Three orders below the accuracy asked of the contestants; the polish does the rest.
_CLARABEL_TOLERANCE = 1e-12
_POLISH_ROUNDS = 10

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ItemQP:
    """One QP in NumPy: min 1/2 x'Qx + q'x s.t. A x = b, C x <= d, rows of C (general rows and bounds) of unit length.

    `row_norms` (m,) undoes the normalisation; `n_general` rows come from G, then `lower_at` and `upper_at` name the
    variables that have a finite bound.
    """

    Q: Array
    q: Array
    A: Array
    b: Array
    C: Array
    d: Array
    row_norms: Array
    n_general: int
    lower_at: NDArray[np.intp]
    upper_at: NDArray[np.intp]


@dataclass(frozen=True)
class ItemSolution:
    """Primal `x` (n,), multipliers `y` (p,) and `z` (m,) of the unit rows, and what they are worth."""

    x: Array
    y: Array
    z: Array
    active_set: NDArray[np.bool_]
    strict_complementarity_margin: float
    kkt_residual: float
    rows_independent: bool


@dataclass(frozen=True)
class Reference:
    """The reference for one benchmark problem.

    Attributes:
        items: the QPs in NumPy.
        solutions: their solutions.
        primal: (B, n).
        strict_complementarity_margin: (B,), min over unit inequality rows of slack + multiplier.
        kkt_residual: (B,), of the reference itself.
        is_judged: (B,) bool, items whose gradient is unique and known.
        cotangent: (B, n), the problem's cotangent with zeros where `is_judged` is False, so that gradients of shared
            parameters, sums over the batch, contain judged items only.
        gradients: per differentiated parameter, its shape.
    """

    items: tuple[ItemQP, ...]
    solutions: tuple[ItemSolution, ...]
    primal: Array
    strict_complementarity_margin: Array
    kkt_residual: Array
    is_judged: NDArray[np.bool_]
    cotangent: Tensor
    gradients: dict[str, Array]


def items_of(qp: QPData) -> tuple[ItemQP, ...]:
    """Split a batch into NumPy items: bounds become rows, inequality rows get unit length, infinite rows go."""
    batch, n = qp.q.shape
    return tuple(_item(qp, i, n) for i in range(batch))


def _item(qp: QPData, i: int, n: int) -> ItemQP:
    """Return item i; empty blocks have zero rows."""

    def block(tensor: Tensor | None, *shape: int) -> Array:
        return np.zeros(shape) if tensor is None else tensor[i].detach().cpu().numpy().astype(np.float64, copy=False)

    general, limit = block(qp.G, 0, n), block(qp.h, 0)
    lower = np.full(n, -np.inf) if qp.lower is None else block(qp.lower)
    upper = np.full(n, np.inf) if qp.upper is None else block(qp.upper)
    lower_at, upper_at = np.flatnonzero(np.isfinite(lower)), np.flatnonzero(np.isfinite(upper))
    eye = np.eye(n)
    row_norms = np.concatenate([np.linalg.norm(general, axis=1), np.ones(lower_at.size + upper_at.size)])
    rows = np.vstack([general, -eye[lower_at], eye[upper_at]])
    limits = np.concatenate([limit, -lower[lower_at], upper[upper_at]])
    return ItemQP(
        Q=block(qp.Q),
        q=block(qp.q),
        A=block(qp.A, 0, n),
        b=block(qp.b, 0),
        C=rows / row_norms[:, None],
        d=limits / row_norms,
        row_norms=row_norms,
        n_general=general.shape[0],
        lower_at=lower_at,
        upper_at=upper_at,
    )


def kkt_residual(item: ItemQP, x: Array, y: Array, z: Array) -> float:
    """Return the largest of stationarity, infeasibility, negative multiplier and |z_i slack_i|; NaN propagates."""
    slack = item.d - item.C @ x
    parts = (
        item.Q @ x + item.q + item.A.T @ y + item.C.T @ z,
        item.A @ x - item.b,
        np.minimum(slack, 0.0),
        np.minimum(z, 0.0),
        z * slack,
    )
    return float(np.abs(np.concatenate(parts)).max(initial=0.0))


def solve_item(item: ItemQP) -> ItemSolution:
    """Solve one QP to machine precision: Clarabel, then the KKT system on the active rows."""
    x, y, z = _clarabel(item)
    slack = item.d - item.C @ x
    active = z > slack
    independent = True
    for _ in range(_POLISH_ROUNDS):
        x, y, z, independent = _polish(item, x, y, z, active)
        slack = item.d - item.C @ x
        corrected = np.where(active, z > -RESIDUAL_TOLERANCE, slack < -RESIDUAL_TOLERANCE)
        if np.array_equal(corrected, active):
            break
        active = corrected
    slack = item.d - item.C @ x
    return ItemSolution(
        x=x,
        y=y,
        z=z,
        active_set=active,
        strict_complementarity_margin=float((slack + z).min(initial=np.inf)),
        kkt_residual=kkt_residual(item, x, y, z),
        rows_independent=independent,
    )


def _clarabel(item: ItemQP) -> tuple[Array, Array, Array]:
    """Return Clarabel's (x, y, z); an interior point, so z is strictly complementary wherever that is possible."""
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = _CLARABEL_TOLERANCE
    n_eq = item.b.size
    cones = [clarabel.ZeroConeT(n_eq), clarabel.NonnegativeConeT(item.d.size)]
    rows = sp.csc_matrix(np.vstack([item.A, item.C]))
    quadratic = sp.csc_matrix(np.triu(item.Q))
    limits = np.concatenate([item.b, item.d])
    solution = clarabel.DefaultSolver(quadratic, item.q, rows, limits, cones, settings).solve()
    multipliers = np.asarray(solution.z)
    return np.asarray(solution.x), multipliers[:n_eq], multipliers[n_eq:]


def _polish(item: ItemQP, x: Array, y: Array, z: Array, active: NDArray[np.bool_]) -> tuple[Array, Array, Array, bool]:
    """Correct (x, y, z) to satisfy the KKT system on the active rows; say whether those rows are independent.

    The correction has least norm: with dependent rows the multipliers stay next to Clarabel's, which lie in the
    interior of the set of multipliers, where the least-norm multipliers may be negative.
    """
    n, n_eq = item.q.size, item.b.size
    z = np.where(active, z, 0.0)
    independent = True
    # The second pass removes the rounding of the first.
    for _ in range(2):
        stationarity = -(item.Q @ x + item.q + item.A.T @ y + item.C.T @ z)
        feasibility = np.concatenate([item.b - item.A @ x, (item.d - item.C @ x)[active]])
        step, independent = solve_kkt(item, active, stationarity, feasibility)
        x, y = x + step[:n], y + step[n : n + n_eq]
        z[active] += step[n + n_eq :]
    return x, y, z, independent


def solve_kkt(item: ItemQP, active: NDArray[np.bool_], g: Array, r: Array) -> tuple[Array, bool]:
    """Solve [Q N'; N 0] (u, w) = (g, r) with N = [A; active rows of C]; say whether the rows are independent.

    Active bounds name their variable's value, so they are eliminated: with F the free and H the held variables, M the
    rows that are not bounds and s the sign of a bound's row,

        u_H = s r_bounds,   [Q_FF M_F'; M_F 0] (u_F, w) = (g_F - Q_FH u_H, r_M - M_H u_H),   least squares,
        w_bounds = s (g_H - (Q u + M'w)_H)
    """
    general, bounds = active[: item.n_general], active[item.n_general :]
    rows = np.vstack([item.A, item.C[: item.n_general][general]])
    n, n_rows = item.q.size, rows.shape[0]
    sign = np.concatenate([-np.ones(item.lower_at.size), np.ones(item.upper_at.size)])[bounds]
    # Where both bounds of a variable are active the second row depends on the first and gets no multiplier.
    held, first = np.unique(np.concatenate([item.lower_at, item.upper_at])[bounds], return_index=True)
    free = np.ones(n, dtype=bool)
    free[held] = False

    u = np.zeros(n)
    u[held] = sign[first] * r[n_rows:][first]
    matrix = np.block([[item.Q[np.ix_(free, free)], rows[:, free].T], [rows[:, free], np.zeros((n_rows, n_rows))]])
    right_side = np.concatenate([g[free] - item.Q[np.ix_(free, held)] @ u[held], r[:n_rows] - rows[:, held] @ u[held]])
    reduced, rank = _least_squares(matrix, right_side)
    u[free] = reduced[: n - held.size]
    w = reduced[n - held.size :]
    w_bounds = np.zeros(sign.size)
    w_bounds[first] = sign[first] * (g - item.Q @ u - rows.T @ w)[held]
    return np.concatenate([u, w, w_bounds]), rank == matrix.shape[0] and held.size == sign.size


def _least_squares(matrix: Array, right_side: Array) -> tuple[Array, int]:
    """Return the least-norm solution and the rank; 1e-12 relative separates dependent rows from merely similar ones."""
    if right_side.size == 0:
        return right_side, 0
    solution, _, rank, _ = scipy.linalg.lstsq(matrix, right_side, cond=1e-12, lapack_driver="gelsy")
    return solution, int(rank)


def compute_reference(problem: BenchmarkProblem) -> Reference:
    """Compute the reference primal and gradients of a benchmark problem, item by item, in float64.

    Gradients of the QP's matrices are carried to the problem's parameters by differentiating `problem.qp_data`, the
    problem's own definition. Gradients of shared parameters are sums over the batch.
    """
    inputs = problem.inputs()
    qp = problem.qp_data(*inputs)
    items = items_of(qp)
    solutions = tuple(solve_item(item) for item in items)
    # With dependent active rows a change of a row or of its right-hand side may leave the problem infeasible, so the
    # gradient exists only where those are constant.
    rows_vary = any(t is not None and t.requires_grad for t in (qp.A, qp.b, qp.G, qp.h, qp.lower, qp.upper))
    margin = np.array([s.strict_complementarity_margin for s in solutions])
    residual = np.array([s.kkt_residual for s in solutions])
    independent = np.array([s.rows_independent for s in solutions])
    is_judged = (margin > MARGIN_TOLERANCE) & (residual < RESIDUAL_TOLERANCE) & (independent | (not rows_vary))
    cotangent = problem.cotangent * torch.from_numpy(is_judged).to(problem.cotangent.device)[:, None]
    gradients = _parameter_gradients(problem, inputs, qp, items, solutions, cotangent)
    return Reference(
        items=items,
        solutions=solutions,
        primal=np.stack([s.x for s in solutions]),
        strict_complementarity_margin=margin,
        kkt_residual=residual,
        is_judged=is_judged,
        cotangent=cotangent,
        gradients=gradients,
    )


def _parameter_gradients(
    problem: BenchmarkProblem,
    inputs: tuple[Tensor, ...],
    qp: QPData,
    items: tuple[ItemQP, ...],
    solutions: tuple[ItemSolution, ...],
    cotangent: Tensor,
) -> dict[str, Array]:
    """Return dL/d(parameter) by pulling the gradients of the QP's matrices back through `qp_data`."""
    varying = [
        field.name for field in fields(qp) if (tensor := getattr(qp, field.name)) is not None and tensor.requires_grad
    ]
    per_item = [
        _item_gradients(item, solution, g, varying)
        for item, solution, g in zip(items, solutions, cotangent.cpu().numpy(), strict=True)
    ]
    outputs = [getattr(qp, name) for name in varying]
    output_gradients = [
        torch.from_numpy(np.stack([gradients[name] for gradients in per_item])).to(output.device)
        for name, output in zip(varying, outputs, strict=True)
    ]
    positions = problem.differentiated()
    gradients = torch.autograd.grad(outputs, [inputs[i] for i in positions], output_gradients)
    return {problem.parameters[i].name: g.cpu().numpy() for i, g in zip(positions, gradients, strict=True)}


def _item_gradients(item: ItemQP, solution: ItemSolution, cotangent: Array, wanted: Sequence[str]) -> dict[str, Array]:
    """Return dL/d(part) of one item for the wanted parts of `QPData`, by the formulas at the top of this file."""
    n, n_eq = item.q.size, item.b.size
    active = solution.active_set
    adjoint, _ = solve_kkt(item, active, cotangent, np.zeros(n_eq + int(active.sum())))
    u, w_eq = adjoint[:n], adjoint[n : n + n_eq]
    # Back from unit rows to the rows as given: both multipliers scale by 1 / norm.
    w_ineq = np.zeros(item.d.size)
    w_ineq[active] = adjoint[n + n_eq :]
    w_ineq = w_ineq / item.row_norms
    z = solution.z / item.row_norms
    x = solution.x
    m, n_lower = item.n_general, item.lower_at.size
    lower, upper = np.zeros(n), np.zeros(n)
    # The lower bound is the row -x <= -l, hence the sign.
    lower[item.lower_at] = -w_ineq[m : m + n_lower]
    upper[item.upper_at] = w_ineq[m + n_lower :]
    # Called only for what is wanted: Q, A and G are large.
    formulas: dict[str, Callable[[], Array]] = {
        "Q": lambda: -0.5 * (np.outer(u, x) + np.outer(x, u)),
        "q": lambda: -u,
        "A": lambda: -(np.outer(solution.y, u) + np.outer(w_eq, x)),
        "b": lambda: w_eq,
        "G": lambda: -(np.outer(z[:m], u) + np.outer(w_ineq[:m], x)),
        "h": lambda: w_ineq[:m],
        "lower": lambda: lower,
        "upper": lambda: upper,
    }
    return {name: formulas[name]() for name in wanted}
