"""Independent truth for the adapter tests: a tight conic solve, and implicit differentiation of its KKT system.

Nothing here imports hsbackend. A program is canonicalised by cvxpy for CLARABEL,

    minimise 1/2 x'Px + q'x   subject to   A x + s = b,   s = 0 on equality rows, s >= 0 on the others   (multipliers z)

and solved at the tightest tolerance CLARABEL attains. The rows with z_i > s_i are the active face; there the solution
is refined with one dense solve, and differentiated:

    [P  N'] [dx]   [-(dP x + dq + dA' z)]
    [N  0 ] [dz] = [ db_N - dA_N x      ]         N = A on the active rows

DPP makes the data affine in the parameters, so data(theta + e) - data(theta) is its derivative without truncation
error. Before anything is returned the oracle checks itself: KKT residuals of the refined point, strict complementarity,
uniqueness of what is asked for, and solvability of the differentiated system. A badly chosen test point is an
`OracleError`, not a wrong truth.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cvxpy as cp
import numpy as np
from cvxpy.utilities import scopes
from scipy.sparse import csc_array

_TOLERANCES = (1e-12, 1e-11, 1e-10, 1e-9)
# The least s_i + z_i at which the active set read off an interior-point solution, accurate to about 1e-8, is certain.
MIN_MARGIN = 1e-4


class OracleError(Exception):
    """The oracle cannot vouch for an answer: change the program or the point, not the tolerance."""


class DegeneratePoint(OracleError):
    """Strict complementarity does not hold with a margin: draw another point."""


@dataclass(frozen=True)
class ItemTruth:
    """One solved item: `outputs` as asked for, and `jacobians[k][j]` of shape outputs[k].shape + parameter j's."""

    outputs: tuple[np.ndarray, ...]
    jacobians: tuple[tuple[np.ndarray, ...], ...]
    margin: float
    kkt_residual: float

    def vjp(self, cotangents):
        """Gradients of sum_k <cotangents[k], outputs[k]> with respect to each parameter."""
        return tuple(
            sum(np.tensordot(c, row[j], axes=np.ndim(c)) for c, row in zip(cotangents, self.jacobians, strict=True))
            for j in range(len(self.jacobians[0]))
        )


@dataclass(frozen=True)
class _Data:
    """The canonical program with its objective divided by `scale`, and what cvxpy needs to find the way back."""

    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray
    n_eq: int
    scale: float
    raw: dict[str, Any]
    chain: Any
    inverse_data: Any


class TightSolver:
    """Solve and differentiate one cvxpy program at many parameter values.

    `variables` may hold variables of the problem and dual variables of constraints (`constraint.dual_variables[0]`).
    """

    def __init__(self, problem, parameters, variables):
        self.problem = problem
        self.parameters = list(parameters)
        self.variables = list(variables)
        # A parametric quad_form is DPP for solvers with a quadratic objective, but only inside this scope.
        self._scope = nullcontext if problem.is_dpp() else scopes.quad_form_dpp_scope

    def solve(self, values):
        """Solve and differentiate at `values`, one array per parameter."""
        values = [np.array(v, dtype=float) for v in values]
        data = self._canonicalise(values)
        x, z, active, system = _solve_and_refine(data)
        residual, margin = _kkt_residual(data, x, z), _margin(data, x, z)
        if residual > 1e-9:
            raise OracleError(f"KKT residual {residual:.1e} after refinement")
        if margin < MIN_MARGIN:
            raise DegeneratePoint(f"strict-complementarity margin {margin:.1e} is below {MIN_MARGIN:.0e}")
        self._check_unique(data, system, active)

        outputs = self._recover(data, x, z)
        self._check_recovery(outputs)
        columns = [[np.zeros(out.shape + v.shape) for v in values] for out in outputs]
        for j, parameter in enumerate(self.parameters):
            for index, direction in _directions(parameter):
                stepped = [v + direction if i == j else v for i, v in enumerate(values)]
                tangent = _differentiate(system, active, data, self._canonicalise(stepped, data.scale), x, z)
                for k, derivative in enumerate(self._recover(data, *tangent)):
                    columns[k][j][(..., *index)] = derivative
        return ItemTruth(outputs, tuple(tuple(row) for row in columns), margin, residual)

    def values_only(self, values):
        """Solve at `values`, without any check of the point."""
        data = self._canonicalise(values)
        x, z, *_ = _solve_and_refine(data)
        return self._recover(data, x, z)

    def _canonicalise(self, values, scale=None):
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.value = value
        with self._scope():
            raw, chain, inverse_data = self.problem.get_problem_data(cp.CLARABEL, solver_opts={})
        dims = raw["dims"]
        if dims.soc or dims.psd or dims.exp or dims.p3d:
            raise OracleError(f"not a quadratic program: {dims}")
        q = raw["c"].copy()
        P = raw["P"].toarray() if raw.get("P") is not None else np.zeros((q.size, q.size))
        if scale is None:
            scale = float(max(np.abs(q).max(initial=0.0), np.abs(P).max(initial=0.0))) or 1.0
        A, b = raw["A"].toarray(), raw["b"].copy()
        return _Data(P / scale, q / scale, A, b, dims.zero, scale, raw, chain, inverse_data)

    def _recover(self, data, x, z):
        """Map canonical (x, z) to the values of `variables`, linearly, so that it maps derivatives too.

        Duals go through cvxpy's own inversion; primals do not, because that one clips a variable to its attributes.
        """
        raw = SimpleNamespace(x=x, z=data.scale * z, status="Solved", obj_val=0.0, iterations=0, solve_time=0.0)
        self.problem.unpack(data.chain.invert(raw, data.inverse_data))
        lowered = data.chain.compose_var_id_map()
        primal = {v.id for v in self.problem.variables()}
        values = []
        for variable in self.variables:
            if variable.id not in primal:
                values.append(np.array(variable.value, dtype=float).reshape(variable.shape))
                continue
            start = data.raw["param_prob"].var_id_to_col[lowered.get(variable.id, [variable.id])[0]]
            if variable.attributes["symmetric"]:
                rows, columns = np.triu_indices(variable.shape[0])
                value = np.zeros(variable.shape)
                value[rows, columns] = value[columns, rows] = x[start : start + rows.size]
            else:
                value = x[start : start + variable.size].reshape(variable.shape, order="F")
            values.append(value)
        return tuple(values)

    def _check_recovery(self, outputs):
        """Compare with the values cvxpy has just put into the variables."""
        for variable, value in zip(self.variables, outputs, strict=True):
            difference = np.abs(value - variable.value).max(initial=0.0)
            if difference > 1e-9 * max(1.0, np.abs(value).max(initial=0.0)):
                raise OracleError(f"{variable} was recovered wrongly, by {difference:.1e}")

    def _check_unique(self, data, system, active):
        """Refuse to judge an output that moves along the null space of the KKT system on the face."""
        n = data.q.size
        _, singular, vt = np.linalg.svd(system)
        for null in vt[singular <= 1e-10 * singular.max(initial=1.0)]:
            dz = np.zeros(data.b.size)
            dz[active] = null[n:]
            for variable, value in zip(self.variables, self._recover(data, null[:n], dz), strict=True):
                if np.abs(value).max(initial=0.0) > 1e-8 * data.scale:
                    raise OracleError(f"the optimal value of {variable} is not unique")


def _directions(parameter):
    """Unit changes of a parameter, each with the index it is stored at.

    A symmetric parameter moves in pairs, stored in the upper triangle, as cvxpylayers does. cvxpy refuses a value that
    is not PSD, so give a PSD parameter with eigenvalues above 1.
    """
    symmetric = any(parameter.attributes.get(a) for a in ("symmetric", "PSD", "NSD"))
    for index in np.ndindex(parameter.shape):
        if symmetric and index[0] > index[1]:
            continue
        direction = np.zeros(parameter.shape)
        direction[index] = 1.0
        if symmetric:
            direction[index[::-1]] = 1.0
        yield index, direction


def _solve_and_refine(data):
    """Solve tightly, then solve the KKT system on the active face exactly; return (x, z, active rows, KKT matrix)."""
    x, s, z = _solve_clarabel(data)
    active = np.flatnonzero((np.arange(z.size) < data.n_eq) | (z > s))
    N = data.A[active]
    system = np.block([[data.P, N.T], [N, np.zeros((active.size, active.size))]])
    point = np.concatenate([x, z[active]])
    target = np.concatenate([-data.q, data.b[active]])
    for _ in range(3):
        point = point + _lstsq(system, target - system @ point)
    z = np.zeros(z.size)
    z[active] = point[x.size :]
    return point[: x.size], z, active, system


def _solve_clarabel(data):
    """Solve at the tightest tolerance attained; return (x, s, z)."""
    raw = data.raw | {"c": data.q, "P": csc_array(data.P)}
    for tolerance in _TOLERANCES:
        options = {"tol_gap_abs": tolerance, "tol_gap_rel": tolerance, "tol_feas": tolerance, "max_iter": 500}
        solution = data.chain.solver.solve_via_data(raw, warm_start=False, verbose=False, solver_opts=options)
        if str(solution.status) == "Solved":
            return np.array(solution.x), np.array(solution.s), np.array(solution.z)
    raise OracleError(f"CLARABEL ends with status {solution.status}")


def _lstsq(system, target):
    return np.linalg.lstsq(system, target, rcond=1e-12)[0] if system.size else np.zeros(system.shape[1])


def _differentiate(system, active, data, stepped, x, z):
    """Derivative of (x, z) as the data move from `data` to `stepped`."""
    dA = stepped.A - data.A
    db = stepped.b - data.b
    stationarity = (stepped.P - data.P) @ x + (stepped.q - data.q) + dA.T @ z
    target = np.concatenate([-stationarity, (db - dA @ x)[active]])
    tangent = _lstsq(system, target)
    tangent = tangent + _lstsq(system, target - system @ tangent)
    mismatch = np.abs(system @ tangent - target).max(initial=0.0)
    if mismatch > 1e-9 * max(1.0, np.abs(target).max(initial=0.0)):
        raise OracleError(f"the solution is not differentiable here: linearised KKT system violated by {mismatch:.1e}")
    dz = np.zeros(z.size)
    dz[active] = tangent[x.size :]
    return tangent[: x.size], dz


def _kkt_residual(data, x, z):
    """Largest violation of stationarity, feasibility, sign and complementarity, for an objective of size one."""
    slack, n_eq = data.b - data.A @ x, data.n_eq
    parts = (
        data.P @ x + data.q + data.A.T @ z,
        slack[:n_eq],
        np.minimum(slack[n_eq:], 0.0),
        np.minimum(z[n_eq:], 0.0),
        np.minimum(np.abs(slack[n_eq:]), np.abs(z[n_eq:])),
    )
    size = max(1.0, np.abs(x).max(initial=0.0), np.abs(z).max(initial=0.0))
    return float(max(np.abs(part).max(initial=0.0) for part in parts)) / size


def _margin(data, x, z):
    """Least slack + multiplier over inequality rows scaled to unit norm; empty rows do not count."""
    norms = np.linalg.norm(data.A[data.n_eq :], axis=1)
    rows = norms > 0
    slack = (data.b - data.A @ x)[data.n_eq :]
    return float(np.min(slack[rows] / norms[rows] + z[data.n_eq :][rows] * norms[rows], initial=np.inf))


def solve_tight(problem, parameters, values, variables=None):
    """Solve and differentiate one item; `variables` defaults to the problem's. See `TightSolver`."""
    return TightSolver(problem, parameters, problem.variables() if variables is None else variables).solve(values)


def central_differences(solver, values, parameter, direction, step=1e-5):
    """Directional derivative of every output by central differences of the tight solve: a check on the oracle."""
    sides = []
    for sign in (1.0, -1.0):
        moved = [np.array(v, dtype=float) for v in values]
        moved[parameter] = moved[parameter] + sign * step * direction
        sides.append(solver.values_only(moved))
    return tuple((plus - minus) / (2.0 * step) for plus, minus in zip(*sides, strict=True))
