"""The contestants of the comparison of QP solvers: each turns arrays into an answer, none knows how it is judged.

`contestant.prepare(instances)` converts to the format the solver wants, outside the clock, and returns a `Prepared`:
`solve()` is timed, from arrays to the end of the solve including all set-up, and `answers(passed)` converts back,
outside the clock again. Optional packages are imported inside, so that a missing package costs one row.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from hsbackend.comparisons.qp_families import QPInstance
from hsbackend.comparisons.qp_judge import Answer

Array = NDArray[np.float64]

# What ProxQP takes as no limit.
_PROXQP_INFINITY = 1e20
# Of OSQP; its default of 4,000 is for moderate accuracy.
_OSQP_ITERATIONS = 100_000
# Of the accuracy, for those whose own criteria, normalised differently, stop a little short of what the judge asks on
# some instances in a hundred; with a tenth nearly all of them pass, in about the same time.
_TENTH = 0.1
# Of DAQP, whose default is 10,000: the time limit is what should end it.
_DAQP_ITERATIONS = 1_000_000
_DAQP_WEIGHT = 1e-2


@dataclass(frozen=True)
class Prepared:
    """A solve that is ready to run; see the top of this file."""

    solve: Callable[[], Any]
    answers: Callable[[Any], list[Answer]]


@dataclass(frozen=True)
class Request:
    """What everybody is asked for: tolerance, absolute and relative, and a time limit in seconds per instance."""

    accuracy: float
    limit_s: float


@dataclass(frozen=True)
class QPContestant:
    """One solver with one interface.

    Attributes:
        name: used on the command line and in the tables.
        package: what its version is that of, as pip calls it.
        description: interface and settings.
        prepare: `prepare(instances, request)`; one instance unless `is_batched`.
        is_ours: whether it is hsbackend.
        is_batched: whether it takes all instances of a size at once; they must agree in shape.
        linear_only: whether it takes part in linear programs only.
    """

    name: str
    package: str
    description: str
    prepare: Callable[[Sequence[QPInstance], Request], Prepared]
    is_ours: bool = False
    is_batched: bool = False
    linear_only: bool = False

    @property
    def version(self) -> str:
        """Version of its package, "not installed" without one."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"


class RowSplit:
    """The rows of an instance as equalities A x = b and one-sided inequalities G x <= h, and the way back.

    A row with two different limits becomes two inequalities; limits that are infinite disappear.
    """

    def __init__(self, instance: QPInstance) -> None:
        rows = sp.csr_matrix(instance.A)
        low, high = instance.low, instance.high
        equal = low == high
        self.m = low.size
        self.at_equal = np.flatnonzero(equal)
        self.at_high = np.flatnonzero(~equal & np.isfinite(high))
        self.at_low = np.flatnonzero(~equal & np.isfinite(low))
        self.A, self.b = rows[self.at_equal], low[self.at_equal]
        self.G = sp.csr_matrix(sp.vstack([rows[self.at_high], -rows[self.at_low]]))
        self.h = np.concatenate([high[self.at_high], -low[self.at_low]])

    def multipliers(self, equality: Array, inequality: Array) -> Array:
        """Return (m,) multipliers of the rows from those of A x = b and G x <= h."""
        y = np.zeros(self.m)
        y[self.at_equal] = equality
        count = self.at_high.size
        y[self.at_high] += inequality[:count]
        y[self.at_low] -= inequality[count:]
        return y


class RowGroups:
    """The rows of an instance as equalities A x = b and two-sided inequalities, and the way back."""

    def __init__(self, instance: QPInstance) -> None:
        rows = sp.csr_matrix(instance.A)
        equal = instance.low == instance.high
        self.m = equal.size
        self.at_equal, self.at_other = np.flatnonzero(equal), np.flatnonzero(~equal)
        self.A, self.b = rows[self.at_equal], instance.low[self.at_equal]
        self.C, self.low, self.high = rows[self.at_other], instance.low[self.at_other], instance.high[self.at_other]

    def multipliers(self, equality: Array, inequality: Array) -> Array:
        """Return (m,) multipliers of the rows."""
        y = np.zeros(self.m)
        y[self.at_equal] = equality
        y[self.at_other] = inequality
        return y


def bounds_as_rows(instance: QPInstance) -> tuple[sp.csc_matrix, Array, Array, NDArray[np.intp]]:
    """Return (rows, low, high, bounded): the rows, then those of the identity for variables with a finite bound."""
    bounded = np.flatnonzero(np.isfinite(instance.lower) | np.isfinite(instance.upper))
    eye = sp.csr_matrix(sp.eye(instance.q.size, format="csr"))[bounded]
    rows = sp.csc_matrix(sp.vstack([instance.A, eye]))
    low = np.concatenate([instance.low, instance.lower[bounded]])
    high = np.concatenate([instance.high, instance.upper[bounded]])
    return rows, low, high, bounded


def _split_bounds(multipliers: Array, instance: QPInstance, bounded: NDArray[np.intp]) -> tuple[Array, Array]:
    """Return (y, w) from multipliers of `bounds_as_rows`."""
    w = np.zeros(instance.q.size)
    w[bounded] = multipliers[instance.low.size :]
    return multipliers[: instance.low.size], w


def _dense(matrix: sp.spmatrix, order: str = "C") -> Array:
    return np.asarray(matrix.toarray(order=order), dtype=np.float64)


def _is_diagonal(matrix: sp.csc_matrix) -> bool:
    coordinates = matrix.tocoo()
    return bool((coordinates.row == coordinates.col).all())


def _hsbackend(instances: Sequence[QPInstance], request: Request) -> Prepared:
    """Prepare one instance, or several as one batch, for `hsbackend.solve_qp`.

    A diagonal P that the batch shares is given as its diagonal; rows with two limits that differ are given twice.
    """
    import torch

    import hsbackend

    torch.set_num_threads(1)
    splits = [RowSplit(instance) for instance in instances]

    def tensor(arrays: Sequence[Array]) -> torch.Tensor:
        # What all instances share is given once, as that function wants it.
        is_shared = all(np.array_equal(array, arrays[0]) for array in arrays[1:])
        return torch.from_numpy(np.ascontiguousarray(arrays[0] if is_shared else np.stack(arrays)))

    diagonals = [instance.P.diagonal() for instance in instances]
    # A vector is the diagonal of a matrix that all instances share.
    as_vector = all(_is_diagonal(i.P) for i in instances) and all(np.array_equal(d, diagonals[0]) for d in diagonals)
    # An axis for the batch even where everything is shared.
    data = {
        "Q": tensor(diagonals if as_vector else [_dense(instance.P) for instance in instances]),
        "q": torch.from_numpy(np.stack([instance.q for instance in instances])),
    }
    if splits[0].b.size:
        data |= {"A": tensor([_dense(split.A) for split in splits]), "b": tensor([split.b for split in splits])}
    if splits[0].h.size:
        data |= {"G": tensor([_dense(split.G) for split in splits]), "h": tensor([split.h for split in splits])}
    if any(np.isfinite(instance.lower).any() for instance in instances):
        data["lower"] = tensor([instance.lower for instance in instances])
    if any(np.isfinite(instance.upper).any() for instance in instances):
        data["upper"] = tensor([instance.upper for instance in instances])

    def solve() -> Any:
        return hsbackend.solve_qp(**data, tolerance=request.accuracy, on_failure="nan")

    def answers(solution: Any) -> list[Answer]:
        given = solution.multipliers
        parts = [solution.primal, given.eq, given.ineq, given.lower, given.upper, solution.status]
        found: list[Answer] = []
        for split, x, y, z, z_lower, z_upper, code in zip(splits, *(part.numpy() for part in parts), strict=True):
            status = hsbackend.Status(int(code))
            solved = status is hsbackend.Status.SOLVED
            found.append(Answer(x, split.multipliers(y, z), z_upper - z_lower, status.name.lower(), solved))
        return found

    return Prepared(solve, answers)


def _clarabel(instances: Sequence[QPInstance], request: Request) -> Prepared:
    """Prepare for Clarabel: zero cone, then non-negative cone; bounds as rows."""
    import clarabel

    (instance,) = instances
    rows, low, high, bounded = bounds_as_rows(instance)
    split = RowSplit(QPInstance(instance.P, instance.q, rows, low, high, instance.lower, instance.upper))
    quadratic = sp.csc_matrix(sp.triu(instance.P, format="csc"))
    matrix = sp.csc_matrix(sp.vstack([split.A, split.G]))
    right = np.concatenate([split.b, split.h])
    cones = [clarabel.ZeroConeT(split.b.size), clarabel.NonnegativeConeT(split.h.size)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    settings.time_limit = request.limit_s
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = _TENTH * request.accuracy

    def answers(solution: Any) -> list[Answer]:
        z = np.asarray(solution.z)
        y, w = _split_bounds(split.multipliers(z[: split.b.size], z[split.b.size :]), instance, bounded)
        status = str(solution.status)
        return [Answer(np.asarray(solution.x), y, w, status, status == "Solved")]

    return Prepared(
        lambda: clarabel.DefaultSolver(quadratic, instance.q, matrix, right, cones, settings).solve(), answers
    )


def _osqp(instances: Sequence[QPInstance], request: Request) -> Prepared:
    """Prepare for OSQP: two-sided rows, bounds among them."""
    import osqp

    (instance,) = instances
    rows, low, high, bounded = bounds_as_rows(instance)
    quadratic = sp.csc_matrix(sp.triu(instance.P, format="csc"))
    settings = {
        "eps_abs": request.accuracy,
        "eps_rel": request.accuracy,
        "max_iter": _OSQP_ITERATIONS,
        "time_limit": request.limit_s,
        "polishing": True,
        "verbose": False,
    }

    def solve() -> Any:
        solver = osqp.OSQP(algebra="builtin")
        solver.setup(quadratic, instance.q, rows, low, high, **settings)
        return solver.solve(raise_error=False)

    def answers(result: Any) -> list[Answer]:
        y, w = _split_bounds(np.asarray(result.y), instance, bounded)
        return [Answer(np.asarray(result.x), y, w, str(result.info.status), result.info.status == "solved")]

    return Prepared(solve, answers)


def _piqp(instances: Sequence[QPInstance], request: Request, *, dense: bool) -> Prepared:
    """Prepare for PIQP: equalities, two-sided inequalities and bounds; dense matrices in column order or CSC."""
    import piqp

    (instance,) = instances
    groups = RowGroups(instance)

    def matrix(rows: sp.spmatrix) -> Any:
        return _dense(rows, "F") if dense else sp.csc_matrix(rows)

    data = (
        matrix(instance.P),
        instance.q,
        matrix(groups.A),
        groups.b,
        matrix(groups.C),
        groups.low,
        groups.high,
        instance.lower,
        instance.upper,
    )

    def solve() -> Any:
        solver = piqp.DenseSolver() if dense else piqp.SparseSolver()
        settings = solver.settings
        settings.eps_abs = settings.eps_rel = _TENTH * request.accuracy
        settings.eps_duality_gap_abs = settings.eps_duality_gap_rel = _TENTH * request.accuracy
        solver.setup(*data)
        return solver, solver.solve()

    def answers(passed: Any) -> list[Answer]:
        solver, status = passed
        result = solver.result
        y = groups.multipliers(np.asarray(result.y), np.asarray(result.z_u) - np.asarray(result.z_l))
        w = np.asarray(result.z_bu) - np.asarray(result.z_bl)
        name = str(status).rpartition(".")[2]
        return [Answer(np.array(result.x), y, w, name, status == piqp.PIQP_SOLVED)]

    return Prepared(solve, answers)


def _daqp(instances: Sequence[QPInstance], request: Request) -> Prepared:
    """Prepare for DAQP: dense two-sided rows, bounds of all variables first, infinite ones included."""
    import daqp

    (instance,) = instances
    n = instance.q.size
    quadratic, rows = _dense(instance.P), _dense(instance.A)
    high = np.concatenate([instance.upper, instance.high])
    low = np.concatenate([instance.lower, instance.low])
    sense = np.where(low == high, 5, 0).astype(np.int32)
    settings = {
        "primal_tol": request.accuracy,
        # A negative value lets it decide whether proximal iterations are needed; its default of 1e-6 for their weight
        # calls most of the linear programs infeasible.
        "eps_prox": -_DAQP_WEIGHT,
        "eta_prox": request.accuracy,
        "iter_limit": _DAQP_ITERATIONS,
        "time_limit": request.limit_s,
    }

    def answers(passed: Any) -> list[Answer]:
        x, _, code, info = passed
        multipliers = np.asarray(info["lam"])
        return [Answer(np.asarray(x), multipliers[n:], multipliers[:n], f"exitflag {code}", code == 1)]

    return Prepared(lambda: daqp.solve(quadratic, instance.q, rows, high, low, sense, **settings), answers)


def _proxqp(instances: Sequence[QPInstance], request: Request, *, dense: bool) -> Prepared:
    """Prepare for ProxQP: equalities and two-sided inequalities; bounds apart (dense) or as rows (sparse)."""
    import proxsuite

    (instance,) = instances
    n = instance.q.size
    given, bounded = instance, np.zeros(0, dtype=np.intp)
    if not dense:
        rows, low, high, bounded = bounds_as_rows(instance)
        given = QPInstance(instance.P, instance.q, rows, low, high, instance.lower, instance.upper)
    groups = RowGroups(given)
    low, high = (np.clip(v, -_PROXQP_INFINITY, _PROXQP_INFINITY) for v in (groups.low, groups.high))
    backend = proxsuite.proxqp.dense if dense else proxsuite.proxqp.sparse
    has_bounds = dense and bool(np.isfinite(instance.lower).any() or np.isfinite(instance.upper).any())

    def matrix(rows: sp.spmatrix) -> Any:
        return _dense(rows) if dense else sp.csc_matrix(rows)

    data: list[Any] = [matrix(instance.P), instance.q, matrix(groups.A), groups.b, matrix(groups.C), low, high]
    if has_bounds:
        data += [np.clip(v, -_PROXQP_INFINITY, _PROXQP_INFINITY) for v in (instance.lower, instance.upper)]
    options: dict[str, Any] = {}
    if dense:
        kind = backend.HessianType
        hessian = kind.Zero if instance.is_linear else kind.Diagonal if _is_diagonal(instance.P) else kind.Dense
        options = {"box_constraints": has_bounds, "hessian_type": hessian}

    def solve() -> Any:
        qp = backend.QP(n, groups.b.size, low.size, **options)
        settings = qp.settings
        settings.eps_abs, settings.eps_rel = _TENTH * request.accuracy, 0.0
        settings.check_duality_gap = True
        settings.eps_duality_gap_abs = settings.eps_duality_gap_rel = _TENTH * request.accuracy
        qp.init(*data)
        qp.solve()
        return qp

    def answers(qp: Any) -> list[Answer]:
        z = np.array(qp.results.z)
        y = groups.multipliers(np.array(qp.results.y), z[: low.size])
        w = z[low.size :] if has_bounds else np.zeros(n)
        if not dense:
            y, w = _split_bounds(y, instance, bounded)
        status = qp.results.info.status
        claims = status == proxsuite.proxqp.QPSolverOutput.PROXQP_SOLVED
        return [Answer(np.array(qp.results.x), y, w, str(status).rpartition(".")[2], claims)]

    return Prepared(solve, answers)


def _highs(instances: Sequence[QPInstance], request: Request) -> Prepared:
    """Prepare for HiGHS: column-wise rows, lower triangle of P column by column; it chooses the method."""
    import highspy

    (instance,) = instances
    m, n = instance.shape
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, m
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = instance.q, instance.lower, instance.upper
    lp.row_lower_, lp.row_upper_ = instance.low, instance.high
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = instance.A.indptr, instance.A.indices
    lp.a_matrix_.value_ = instance.A.data
    model = highspy.HighsModel()
    model.lp_ = lp
    if not instance.is_linear:
        lower = sp.csc_matrix(sp.tril(instance.P, format="csc"))
        lower.sort_indices()
        hessian = highspy.HighsHessian()
        hessian.dim_, hessian.format_ = n, highspy.HessianFormat.kTriangular
        hessian.start_, hessian.index_, hessian.value_ = lower.indptr, lower.indices, lower.data
        model.hessian_ = hessian
    options = {
        "output_flag": False,
        "threads": 1,
        "time_limit": request.limit_s,
        "primal_feasibility_tolerance": max(request.accuracy, 1e-10),
        "dual_feasibility_tolerance": max(request.accuracy, 1e-10),
        # Its default of 1e-7 is what the dual residual of a quadratic program would stay at.
        "qp_regularization_value": 1e-3 * request.accuracy,
    }

    def solve() -> Any:
        solver = highspy.Highs()
        for name, value in options.items():
            solver.setOptionValue(name, value)
        solver.passModel(model)
        solver.run()
        return solver

    def answers(solver: Any) -> list[Answer]:
        solution, status = solver.getSolution(), solver.getModelStatus()
        x, y, w = (np.array(part) for part in (solution.col_value, solution.row_dual, solution.col_dual))
        if not solution.dual_valid:
            y, w = np.full(m, np.nan), np.full(n, np.nan)
        # Its duals are the derivatives of the optimum in the limits.
        claims = status == highspy.HighsModelStatus.kOptimal
        return [Answer(x, -y, -w, solver.modelStatusToString(status), claims)]

    return Prepared(solve, answers)


def _linprog(instances: Sequence[QPInstance], request: Request) -> Prepared:
    """Prepare for scipy.optimize.linprog: equalities, one-sided inequalities, bounds."""
    from scipy.optimize import linprog

    (instance,) = instances
    split = RowSplit(instance)
    bounds = np.column_stack([instance.lower, instance.upper])
    options = {
        "primal_feasibility_tolerance": max(request.accuracy, 1e-10),
        "dual_feasibility_tolerance": max(request.accuracy, 1e-10),
        "time_limit": request.limit_s,
    }
    A, G = sp.csc_matrix(split.A), sp.csc_matrix(split.G)

    def solve() -> Any:
        return linprog(
            instance.q,
            A_ub=G if split.h.size else None,
            b_ub=split.h if split.h.size else None,
            A_eq=A if split.b.size else None,
            b_eq=split.b if split.b.size else None,
            bounds=bounds,
            method="highs",
            options=options,
        )

    def answers(result: Any) -> list[Answer]:
        if result.x is None:
            m, n = instance.shape
            return [Answer(np.full(n, np.nan), np.full(m, np.nan), np.full(n, np.nan), result.message, False)]
        # Its marginals are the derivatives of the optimum in the limits.
        y = split.multipliers(-result.eqlin.marginals, -result.ineqlin.marginals)
        w = -result.lower.marginals - result.upper.marginals
        return [Answer(np.asarray(result.x), y, w, f"status {result.status}", result.status == 0)]

    return Prepared(solve, answers)


def layout(instance: QPInstance) -> tuple[int, ...]:
    """Return what must agree for a batch: variables, equalities, one-sided inequalities, whether P is diagonal."""
    split = RowSplit(instance)
    return instance.q.size, split.b.size, split.h.size, int(_is_diagonal(instance.P))


def _with(function: Callable[..., Prepared], *, dense: bool) -> Callable[[Sequence[QPInstance], Request], Prepared]:
    return lambda instances, request: function(instances, request, dense=dense)


_OURS = (
    "hsbackend.solve_qp on dense float64 tensors (a shared diagonal P as a vector), tolerance = accuracy, no gradients"
)

CONTESTANTS: tuple[QPContestant, ...] = (
    QPContestant("hsbackend", "hsbackend", f"{_OURS}; one call per instance", _hsbackend, is_ours=True),
    QPContestant(
        "hsbackend-batched",
        "hsbackend",
        f"{_OURS}; all instances of a family and size in one call where their shapes agree, time per instance",
        _hsbackend,
        is_ours=True,
        is_batched=True,
    ),
    QPContestant(
        "clarabel",
        "clarabel",
        "sparse interior point; tol_gap_abs, tol_gap_rel, tol_feas = accuracy / 10, time_limit, max_threads 1",
        _clarabel,
    ),
    QPContestant(
        "osqp",
        "osqp",
        f"sparse ADMM; eps_abs, eps_rel = accuracy, polishing, max_iter {_OSQP_ITERATIONS:,}, time_limit",
        _osqp,
    ),
    QPContestant(
        "piqp-dense",
        "piqp",
        "proximal interior point, dense; eps_abs, eps_rel, eps_duality_gap_abs, eps_duality_gap_rel = accuracy / 10",
        _with(_piqp, dense=True),
    ),
    QPContestant("piqp-sparse", "piqp", "the same, sparse (CSC)", _with(_piqp, dense=False)),
    QPContestant(
        "daqp",
        "daqp",
        "dense dual active set, proximal iterations where P is singular (it detects that itself) with weight "
        f"{_DAQP_WEIGHT:g}; primal_tol, eta_prox = accuracy, dual_tol 1e-12 (default), "
        f"iter_limit {_DAQP_ITERATIONS:,}, time_limit",
        _daqp,
    ),
    QPContestant(
        "proxqp-dense",
        "proxsuite",
        "proximal augmented Lagrangian, dense, Hessian type told; eps_abs = accuracy / 10, eps_rel 0 (default), "
        "check_duality_gap with eps_duality_gap_abs, eps_duality_gap_rel = accuracy / 10",
        _with(_proxqp, dense=True),
    ),
    QPContestant("proxqp-sparse", "proxsuite", "the same, sparse (CSC)", _with(_proxqp, dense=False)),
    QPContestant(
        "highs",
        "highspy",
        "highspy: simplex for linear programs, active set for quadratic ones (its choice); "
        "primal_feasibility_tolerance, dual_feasibility_tolerance = accuracy, "
        "qp_regularization_value = accuracy / 1000, threads 1, time_limit",
        _highs,
    ),
    QPContestant(
        "linprog",
        "scipy",
        "scipy.optimize.linprog, method highs, tolerances as for highs; linear programs only",
        _linprog,
        linear_only=True,
    ),
)


def contestants_named(names: Sequence[str] | None) -> tuple[QPContestant, ...]:
    """Return the contestants named, in the order of the table; all for None.

    Raises:
        ValueError: a name is not known; the message lists those that are.
    """
    known = [contestant.name for contestant in CONTESTANTS]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"unknown contestant {', '.join(unknown)}, expected some of: {', '.join(known)}")
    return tuple(c for c in CONTESTANTS if names is None or c.name in names)
