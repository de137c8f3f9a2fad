"""The default backend for what is not polyhedral: diffcp on the canonical values.

diffcp takes no quadratic objective, so ``1/2 x'Px`` moves into a second-order cone: with ``P = F'F`` and a new
variable s

    minimise q'x + s   subject to   (s + 1, sqrt(2) F x, s - 1) in the second-order cone   <=>   s >= 1/2 x'Px.

P enters the optimality conditions through ``P x + q`` only, hence ``dL/dP = 1/2 (dL/dq x' + x dL/dq')``: F need not be
differentiated.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffcp
import numpy as np
import scipy.sparse as sp
import torch
from diffcp.cone_program import SolverError

from hsbackend.adapters._canonical import Canonical
from hsbackend.program import FloatArray
from hsbackend.status import Status

#: Options diffcp and its solvers take; everything else is a mistake of the caller.
DIFFCP_OPTIONS = frozenset(
    {
        "solve_method", "mode", "n_jobs_forward", "n_jobs_backward", "raise_on_error", "verbose", "eps", "eps_abs",
        "eps_rel", "eps_infeas", "max_iters", "acceleration_lookback", "acceleration_interval", "scale", "normalize",
        "alpha", "rho_x", "adaptive_scale", "time_limit_secs", "warm_starts", "tol_gap_abs", "tol_gap_rel", "tol_feas",
        "max_iter", "use_indirect", "gpu",
    }
)  # fmt: skip


def _root(matrix: FloatArray) -> FloatArray:
    """Return F with F'F = P for a positive semidefinite P."""
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    keep = values > 1e-13 * max(float(values.max(initial=0.0)), 1e-300)
    return np.sqrt(values[keep])[:, None] * vectors[:, keep].T


class ConicProgram:
    """A canonical form solved by diffcp, item by item.

    Args:
        canonical: the canonical form; only its structure is used.
    """

    def __init__(self, canonical: Canonical) -> None:
        """Find the variables with curvature and the cones in diffcp's notation."""
        self._canonical = canonical
        self._curved = np.unique(np.concatenate([canonical.quadratic_rows, canonical.quadratic_columns]))
        cones = canonical.cones
        self._first = cones["zero"] + cones["nonneg"]
        self._base = {
            "z": cones["zero"], "l": cones["nonneg"], "s": cones["psd"], "ep": cones["exp"], "p": cones["p3d"],
        }  # fmt: skip
        n = canonical.num_variables
        self._inside = np.flatnonzero(canonical.column_index < n)
        self._offset = np.flatnonzero(canonical.column_index == n)

    def _item(self, p: FloatArray | None, q: FloatArray, a: FloatArray) -> tuple[Any, FloatArray, FloatArray, Any]:
        """Return A, b, c and the cones of one item."""
        form = self._canonical
        n, m = form.num_variables, form.num_rows
        rows, columns = form.row_index[self._inside], form.column_index[self._inside]
        b = np.zeros(m)
        b[form.row_index[self._offset]] = a[self._offset]
        values = -a[self._inside]
        curved = self._curved
        if p is None or not len(curved):
            matrix = sp.csc_array((values, (rows, columns)), shape=(m, n))
            return matrix, b, q[:n].copy(), {**self._base, "q": form.cones["soc"]}
        dense = np.zeros((n, n))
        np.add.at(dense, (form.quadratic_rows, form.quadratic_columns), p)
        root = np.sqrt(2.0) * _root(dense[np.ix_(curved, curved)])
        k = len(root)
        first = self._first
        moved = np.where(rows >= first, rows + k + 2, rows)
        block_rows, block_columns = np.nonzero(np.ones_like(root, dtype=bool))
        all_rows = np.concatenate([moved, first + 1 + block_rows, [first, first + k + 1]])
        all_columns = np.concatenate([columns, curved[block_columns], [n, n]])
        all_values = np.concatenate([values, -root.ravel(), [-1.0, -1.0]])
        matrix = sp.csc_array((all_values, (all_rows, all_columns)), shape=(m + k + 2, n + 1))
        ones = np.concatenate([[1.0], np.zeros(k), [-1.0]])
        return (
            matrix,
            np.concatenate([b[:first], ones, b[first:]]),
            np.concatenate([q[:n], [1.0]]),
            {**self._base, "q": [k + 2, *form.cones["soc"]]},
        )

    def solve(
        self, p: FloatArray | None, q: FloatArray, a: FloatArray, arguments: dict[str, Any]
    ) -> tuple[FloatArray, FloatArray, Any, Any]:
        """Solve a batch.

        Args:
            p: (B, nnzP) the host's values of P, or None.
            q: (B, n + 1) those of q.
            a: (B, nnz) those of [C d].
            arguments: options of diffcp.

        Returns:
            primal (B, n), dual (B, m), status (B,) and what :meth:`derivative` needs.
        """
        form = self._canonical
        batch, n, m = q.shape[0], form.num_variables, form.num_rows
        primal, dual = np.full((batch, n), np.nan), np.full((batch, m), np.nan)
        status = np.zeros(batch, dtype=np.int8)
        items = [self._item(None if p is None else p[i], q[i], a[i]) for i in range(batch)]
        finite = [all(np.all(np.isfinite(part)) for part in (item[0].data, item[1], item[2])) for item in items]
        good = [i for i in range(batch) if finite[i]]
        status[[i for i in range(batch) if not finite[i]]] = Status.INVALID_INPUT
        adjoints: list[Any] = [None] * batch
        for i, found in zip(good, _solve_items([items[i] for i in good], arguments), strict=True):
            if isinstance(found, Status):
                status[i] = found
                continue
            x, y, adjoints[i] = found
            first, extra = self._first, len(y) - m
            primal[i] = x[:n]
            dual[i] = np.concatenate([y[:first], y[first + extra :]])
        return primal, dual, status, (items, adjoints, primal, p is not None)

    def derivative(
        self, grad_primal: FloatArray, grad_dual: FloatArray, state: Any
    ) -> tuple[FloatArray | None, FloatArray, FloatArray]:
        """Return the gradients of the host's values, in the shapes :meth:`solve` took them."""
        items, adjoints, primal, quadratic = state
        form = self._canonical
        batch, n, m = len(items), form.num_variables, form.num_rows
        d_p = np.zeros((batch, len(form.quadratic_rows))) if quadratic else None
        d_q = np.zeros((batch, n + 1))
        d_a = np.zeros((batch, len(form.row_index)))
        for i, (matrix, b, _, _) in enumerate(items):
            if adjoints[i] is None:
                if grad_primal[i].any() or grad_dual[i].any():
                    d_q[i] = np.nan
                    d_a[i] = np.nan
                continue
            first, extra = self._first, len(b) - m
            dx = np.zeros(matrix.shape[1])
            dx[:n] = grad_primal[i]
            dy = np.concatenate([grad_dual[i, :first], np.zeros(extra), grad_dual[i, first:]])
            d_matrix, d_b, d_c = adjoints[i](dx, dy, np.zeros(len(b)))
            rows = form.row_index[self._inside]
            moved = np.where(rows >= first, rows + extra, rows)
            d_a[i, self._inside] = -np.asarray(sp.csr_array(d_matrix)[moved, form.column_index[self._inside]]).ravel()
            rows = form.row_index[self._offset]
            d_a[i, self._offset] = d_b[np.where(rows >= first, rows + extra, rows)]
            d_q[i, :n] = d_c[:n]
            if d_p is not None:
                r, c = form.quadratic_rows, form.quadratic_columns
                d_p[i] = 0.5 * (d_c[r] * primal[i, c] + primal[i, r] * d_c[c])
        return d_p, d_q, d_a


def _solve_one(item: Any, arguments: dict[str, Any]) -> Any:
    matrix, b, c, cones = item
    try:
        x, y, s, _, adjoint = diffcp.solve_and_derivative(sp.csc_matrix(matrix), b, c, cones, **arguments)
    except SolverError as error:
        text = str(error).lower()
        if "unbounded" in text or "dual infeasible" in text:
            return Status.UNBOUNDED
        return Status.INFEASIBLE if "infeasible" in text else Status.NOT_CONVERGED
    if str(arguments.get("solve_method", "")).upper() != "CLARABEL":
        return x, y, adjoint
    # diffcp hands over whatever Clarabel ends with, certificates of infeasibility included: look for ourselves.
    gap = abs(float(c @ x + b @ y))
    residual = float(np.abs(matrix @ x + s - b).max(initial=0.0))
    if not (gap <= 1e-2 * (1.0 + abs(float(c @ x))) and residual <= 1e-2 * (1.0 + np.abs(b).max(initial=0.0))):
        return Status.NOT_CONVERGED
    return x, y, adjoint


def _solve_items(items: list[Any], arguments: dict[str, Any]) -> list[Any]:
    """Solve by diffcp: (x, y, adjoint) per item, or the status of an item that has no solution.

    Without options of the caller SCS is asked for 1e-8 instead of its own 1e-4. (Clarabel would be more accurate, but
    diffcp 1.1.9 does not look at its status.)
    """
    arguments = arguments or {"solve_method": "SCS", "eps": 1e-8}
    options = {key: value for key, value in arguments.items() if not key.startswith("n_jobs")}
    workers = arguments.get("n_jobs_forward", -1)
    workers = torch.get_num_threads() if workers < 1 else workers
    if workers == 1 or len(items) < 2:
        return [_solve_one(item, options) for item in items]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(lambda item: _solve_one(item, options), items))
