"""Large sparse programs: time, memory and error of one forward and backward pass, for one item.

    minimise   1/2 x'Qx - y'x      (Q = I: the projection of y)
    subject to A x = b,   G x <= h,   lower <= x <= upper

y is the parameter; everything else is constant. Every contestant runs in a process of its own, so that its peak memory
is its own and it can be stopped. The judge knows the solution: the direct result, whose KKT conditions and adjoint
conditions it checks itself in the data.
"""

from __future__ import annotations

import csv
import gc
import importlib
import multiprocessing
import resource
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from hsbackend.comparisons.environment import Environment, describe_environment
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.tables import align, markdown_table

FloatArray = NDArray[np.float64]

#: Variables; (name of the size for the report, n).
QUICK_SIZES, SIZES = (1_000,), (20_000, 200_000, 1_000_000)
#: The stock solvers are asked up to this size; beyond it they do not fit or do not end.
STOCK_LIMIT = 20_000
#: A pass that takes longer than this is not repeated.
_REPEATED_S = 5.0
_REPETITIONS = 5


@dataclass(frozen=True)
class LargeProblem:
    """One program; ``rows`` holds the equalities first."""

    family: str
    hessian: Any
    point: FloatArray
    rows: Any
    equalities: int
    rhs: FloatArray
    lower: FloatArray
    upper: FloatArray
    cotangent: FloatArray

    @property
    def projection(self) -> bool:
        """Whether Q is the identity."""
        return self.hessian is None


def _random(n: int, rng: np.random.Generator) -> LargeProblem:
    """n/4 random rows of 5 entries, half of them through a point of the box; box [0, 1]."""
    m = n // 4
    place = np.repeat(np.arange(m), 5), rng.integers(0, n, 5 * m)
    rows = sp.csr_array((rng.standard_normal(5 * m), place), shape=(m, n))
    inside = rng.uniform(0.0, 1.0, n)
    rhs = rows @ inside + rng.random(m) * (rng.random(m) < 0.5)
    point = inside + rng.standard_normal(n)
    return LargeProblem("random", None, point, rows, 0, rhs, np.zeros(n), np.ones(n), rng.standard_normal(n))


def _chain(n: int, rng: np.random.Generator) -> LargeProblem:
    """Signals of bounded slope, |x_i - x_i+1| <= 0.05: a random walk with noise."""
    step = sp.diags_array([np.ones(n - 1), -np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n))
    rows = sp.csr_array(sp.vstack([step, -step]))
    point = np.cumsum(0.1 * rng.standard_normal(n)) + 0.3 * rng.standard_normal(n)
    free = np.full(n, np.inf)
    return LargeProblem(
        "chain", None, point, rows, 0, np.full(2 * (n - 1), 0.05), -free, free, rng.standard_normal(n)
    )  # fmt: skip


def _flow(n: int, rng: np.random.Generator) -> LargeProblem:
    """Flows on a random graph of n edges and n/4 nodes: conservation at every node, capacities [0, 1]."""
    m = n // 4
    start = rng.integers(0, m, n)
    end = (start + rng.integers(1, m, n)) % m
    place = np.concatenate([start, end]), np.tile(np.arange(n), 2)
    rows = sp.csr_array((np.concatenate([np.ones(n), -np.ones(n)]), place), shape=(m, n))
    inside = rng.uniform(0.0, 1.0, n)
    point = inside + 0.5 * rng.standard_normal(n)
    return LargeProblem("flow", None, point, rows, m, rows @ inside, np.zeros(n), np.ones(n), rng.standard_normal(n))


def _smooth(n: int, rng: np.random.Generator) -> LargeProblem:
    """A QP with Q = I + 10 D'D (D differences), budgets on windows of 8 at every fourth place, box [-1, 1]."""
    step = sp.diags_array([np.ones(n - 1), -np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n))
    hessian = sp.csr_array(sp.eye_array(n) + 10.0 * step.T @ step)
    m = (n - 8) // 4
    columns = (4 * np.arange(m)[:, None] + np.arange(8)).ravel()
    rows = sp.csr_array((np.ones(8 * m), (np.repeat(np.arange(m), 8), columns)), shape=(m, n))
    point = 2.0 * rng.standard_normal(n)
    ones = np.ones(n)
    return LargeProblem("smooth", hessian, point, rows, 0, np.full(m, 0.5), -ones, ones, rng.standard_normal(n))


FAMILIES: dict[str, Callable[[int, np.random.Generator], LargeProblem]] = {
    "random": _random, "chain": _chain, "flow": _flow, "smooth": _smooth,
}  # fmt: skip


def make(family: str, n: int, seed: int) -> LargeProblem:
    """Build a problem of a family from its seed."""
    return FAMILIES[family](n, np.random.default_rng([seed, n]))


# ----------------------------------------------------------------------------------------------------------------------
# Contestants
# ----------------------------------------------------------------------------------------------------------------------

#: A pass: y -> (x, gradient of cotangent'x with respect to y, forward seconds, backward seconds, what else is known).
Pass = Callable[[], tuple[FloatArray, FloatArray, float, float, dict[str, FloatArray]]]


def _direct(problem: LargeProblem) -> Pass:
    """solve_qp with sparse matrices."""
    from hsbackend import solve_qp

    n, p = len(problem.point), problem.equalities
    hessian = torch.ones(n, dtype=torch.float64) if problem.projection else problem.hessian
    equal = None if not p else problem.rows[:p]
    below = None if p == len(problem.rhs) else problem.rows[p:]
    b = None if equal is None else torch.from_numpy(problem.rhs[:p])
    h = None if below is None else torch.from_numpy(problem.rhs[p:])
    lower, upper = torch.from_numpy(problem.lower), torch.from_numpy(problem.upper)
    cotangent = torch.from_numpy(problem.cotangent)

    def run() -> Any:
        y = torch.from_numpy(problem.point).clone().requires_grad_()
        begin = time.perf_counter()
        found = solve_qp(hessian, -y, equal, b, below, h, lower, upper)
        middle = time.perf_counter()
        (gradient,) = torch.autograd.grad(found.primal, y, cotangent)
        end = time.perf_counter()
        parts = found.multipliers
        nu = torch.cat([parts.eq, parts.ineq]).detach().numpy()
        bounds = (parts.upper - parts.lower).detach().numpy()
        held = found.active_set
        known = {
            "multipliers": nu, "bounds": bounds, "rows": held.ineq.numpy(),
            "fixed": (held.lower | held.upper).numpy(),
        }  # fmt: skip
        return found.primal.detach().numpy(), gradient.numpy(), middle - begin, end - middle, known

    return run


def _layer(problem: LargeProblem, kind: str) -> Pass:
    """A cvxpylayers layer of the same problem; bounds as ``2 x >= 2 l``, because stock MOREAU drops ``x >= l``."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer as StockLayer

    from hsbackend.adapters.cvxpylayers import CvxpyLayer, HSBackend

    n, p = len(problem.point), problem.equalities
    x, y = cp.Variable(n), cp.Parameter(n)
    constraints: list[cp.Constraint] = []
    if p:
        constraints.append(problem.rows[:p] @ x == problem.rhs[:p])
    if p < len(problem.rhs):
        constraints.append(problem.rows[p:] @ x <= problem.rhs[p:])
    if np.isfinite(problem.lower).all():
        constraints += [2 * x >= 2 * problem.lower, 2 * x <= 2 * problem.upper]
    if problem.projection:
        objective = cp.Minimize(0.5 * cp.sum_squares(x - y))
    else:
        objective = cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(problem.hessian)) - y @ x)
    whole = cp.Problem(objective, constraints)
    if kind == "layer":
        layer = CvxpyLayer(whole, [y], [x])
    else:
        solver = HSBackend() if kind == "stock+HSBackend" else kind
        layer = StockLayer(whole, [y], [x], solver=solver)
    cotangent = torch.from_numpy(problem.cotangent)

    def run() -> Any:
        value = torch.from_numpy(problem.point).clone().requires_grad_()
        begin = time.perf_counter()
        (found,) = layer(value)
        middle = time.perf_counter()
        (gradient,) = torch.autograd.grad(found, value, cotangent.to(found.dtype))
        return found.detach().numpy(), gradient.numpy(), middle - begin, time.perf_counter() - middle, {}

    return run


CONTESTANTS: dict[str, tuple[bool, Callable[[LargeProblem], Pass]]] = {
    "solve_qp": (True, _direct),
    "layer": (True, lambda problem: _layer(problem, "layer")),
    "stock+HSBackend": (True, lambda problem: _layer(problem, "stock+HSBackend")),
    "stock DIFFCP": (False, lambda problem: _layer(problem, "DIFFCP")),
    "stock MOREAU": (False, lambda problem: _layer(problem, "MOREAU")),
}


# ----------------------------------------------------------------------------------------------------------------------
# Judge
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class LargeRow:
    """What one contestant did with one problem.

    Attributes:
        family: of the problem.
        variables: n.
        rows: number of rows.
        nonzeros: entries of the rows.
        contestant: name.
        outcome: empty, or why there are no numbers.
        setup_s: building the layer.
        forward_s: median.
        backward_s: median.
        violation: largest violation of a constraint.
        kkt: largest residual of stationarity, constraints and complementarity, relative to the largest terms; for
            contestants without multipliers NaN.
        error: largest difference of x from the certified solution.
        gradient: largest difference of the gradient from the certified one, relative to its largest entry.
        peak_gib: resident memory at its peak, libraries included.
    """

    family: str
    variables: int
    rows: int
    nonzeros: int
    contestant: str
    outcome: str = ""
    setup_s: float = np.nan
    forward_s: float = np.nan
    backward_s: float = np.nan
    violation: float = np.nan
    kkt: float = np.nan
    error: float = np.nan
    gradient: float = np.nan
    peak_gib: float = np.nan


def violation(problem: LargeProblem, x: FloatArray) -> float:
    """Return the largest violation of a constraint."""
    gap = problem.rows @ x - problem.rhs
    gap[: problem.equalities] = np.abs(gap[: problem.equalities])
    return float(max(gap.max(initial=0.0), (problem.lower - x).max(initial=0.0), (x - problem.upper).max(initial=0.0)))


def kkt_residual(problem: LargeProblem, x: FloatArray, nu: FloatArray, bounds: FloatArray) -> float:
    """Return the largest residual of the KKT conditions, relative to the largest terms of each."""
    p = problem.equalities
    product = x if problem.projection else problem.hessian @ x
    pull = problem.rows.T @ nu
    stationarity = np.abs(product - problem.point + pull + bounds).max()
    stationarity /= max(np.abs(part).max(initial=0.0) for part in (product, problem.point, pull, bounds))
    gap = problem.rows @ x - problem.rhs
    size = np.abs(problem.rhs).max(initial=0.0) + np.abs(x).max()
    force = max(np.abs(nu).max(initial=0.0), np.abs(bounds).max(), 1e-300)
    room = np.where(bounds > 0.0, problem.upper - x, np.where(bounds < 0.0, x - problem.lower, 0.0))
    slackness = max(np.abs(gap[p:] * nu[p:]).max(initial=0.0), np.abs(room * bounds).max()) / (size * force)
    wrong = max(0.0, float((-nu[p:]).max(initial=0.0))) / force
    return float(max(stationarity, violation(problem, x) / size, slackness, wrong))


def adjoint_residual(problem: LargeProblem, gradient: FloatArray, known: dict[str, FloatArray]) -> float:
    """Return how far a gradient u is from solving the adjoint system: u on the face, g - Qu normal to it."""
    held = np.concatenate([np.ones(problem.equalities, dtype=bool), known["rows"].astype(bool)])
    free = ~known["fixed"].astype(bool)
    normals = problem.rows[np.flatnonzero(held)]
    on_face = max(np.abs(normals @ gradient).max(initial=0.0), np.abs(gradient[~free]).max(initial=0.0))
    product = gradient if problem.projection else problem.hessian @ gradient
    rest = (problem.cotangent - product)[free]
    transposed = normals.T.tocsr()[np.flatnonzero(free)]
    w = sp.linalg.lsqr(transposed, rest, atol=1e-13, btol=1e-13, iter_lim=3000)[0]
    return float(max(on_face, np.abs(rest - transposed @ w).max(initial=0.0)) / np.abs(problem.cotangent).max())


def _measure(family: str, n: int, seed: int, name: str, quick: bool, folder: str, connection: Any) -> None:
    """Run one contestant in this process and send what it did."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answer: dict[str, Any] = {}
    try:
        problem = make(family, n, seed)
        for module in ("hsbackend.qp", "hsbackend.adapters.cvxpylayers")[: 1 if name == "solve_qp" else 2]:
            importlib.import_module(module)
        begin = time.perf_counter()
        run = CONTESTANTS[name][1](problem)
        answer["setup_s"] = time.perf_counter() - begin
        x, gradient, forward, backward, known = run()  # compiles
        times = [(forward, backward)]
        if forward + backward < _REPEATED_S:
            gc.collect()
            times = []
            for _ in range(1 if quick else _REPETITIONS):
                x, gradient, forward, backward, known = run()
                times.append((forward, backward))
        answer["forward_s"] = statistics.median(each[0] for each in times)
        answer["backward_s"] = statistics.median(each[1] for each in times)
        np.savez(Path(folder) / f"{name}.npz", x=x, gradient=gradient, **known)
    except Exception as error:  # a contestant that fails keeps its row
        answer["outcome"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:100]
        answer["trace"] = traceback.format_exc()
    answer["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    connection.send(answer)


def measure(family: str, n: int, seed: int, name: str, quick: bool, limit_s: float, folder: Path) -> LargeRow:
    """Measure one contestant on one problem, in a process of its own, and judge it.

    The certified solution is what ``solve_qp`` left in ``folder``; it has to be measured first.
    """
    problem = make(family, n, seed)
    row = LargeRow(family, n, len(problem.rhs), int(problem.rows.nnz), name)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(family, n, seed, name, quick, str(folder), send))
    process.start()
    send.close()
    answer: dict[str, Any] = {"outcome": f"not finished in {limit_s:g} s"}
    if receive.poll(limit_s):
        try:
            answer = receive.recv()
        except EOFError:
            answer = {"outcome": "the process ended (out of memory?)"}
    else:
        process.kill()
    process.join()
    answer.pop("trace", None)
    for key, value in answer.items():
        setattr(row, key, value)
    if not row.outcome:
        _judge(problem, row, folder)
    return row


def _judge(problem: LargeProblem, row: LargeRow, folder: Path) -> None:
    found = np.load(folder / f"{row.contestant}.npz")
    x, gradient = np.asarray(found["x"], dtype=np.float64), np.asarray(found["gradient"], dtype=np.float64)
    row.violation = violation(problem, x)
    if "multipliers" in found:
        row.kkt = kkt_residual(problem, x, found["multipliers"], found["bounds"])
        row.error = 0.0
        row.gradient = adjoint_residual(problem, gradient, dict(found))
        return
    reference = folder / "solve_qp.npz"
    if reference.exists():
        certified = np.load(reference)
        row.error = float(np.abs(x - certified["x"]).max())
        size = float(np.abs(certified["gradient"]).max())
        row.gradient = float(np.abs(gradient - certified["gradient"]).max()) / size


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class LargeReport:
    """All rows, and how they came about."""

    environment: Environment
    command: str
    limit_s: float
    rows: list[LargeRow] = field(default_factory=list)


def run_large(
    *, families: Sequence[str], sizes: Sequence[int], contestants: Sequence[str], seed: int, quick: bool,
    limit_s: float, command: str, folder: Path,
) -> LargeReport:  # fmt: skip
    """Measure everything.

    Raises:
        ValueError: if a family or a contestant is unknown.
    """
    for kind, asked, known in (("family", families, FAMILIES), ("contestant", contestants, CONTESTANTS)):
        for name in asked:
            if name not in known:
                raise ValueError(f"unknown {kind} {name!r}, expected one of: {', '.join(known)}")
    report = LargeReport(describe_environment(torch.device("cpu")), command, limit_s)
    names = [name for name in CONTESTANTS if name in contestants]
    progress = Progress(len(families) * len(sizes) * len(names))
    folder.mkdir(parents=True, exist_ok=True)
    for n in sizes:
        for family in families:
            for path in folder.glob("*.npz"):
                path.unlink()
            progress.stage(f"{family} n={n:,}")
            for name in names:
                progress.advance(name)
                if n > STOCK_LIMIT and not CONTESTANTS[name][0]:
                    problem = make(family, n, seed)
                    shape = len(problem.rhs), int(problem.rows.nnz)
                    report.rows.append(LargeRow(family, n, *shape, name, outcome=f"not asked above {STOCK_LIMIT:,}"))
                    continue
                report.rows.append(measure(family, n, seed, name, quick, limit_s, folder))
    for path in folder.glob("*.npz"):
        path.unlink()
    progress.close()
    return report


def _seconds(value: float) -> str:
    if np.isnan(value):
        return ""
    return f"{1e3 * value:.1f} ms" if value < 1.0 else f"{value:.1f} s"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.0e}"


def _table(rows: Sequence[LargeRow]) -> list[list[str]]:
    cells = [[
        "problem", "contestant", "set-up", "forward", "backward", "both", "violation", "KKT", "x", "gradient", "GiB",
    ]]  # fmt: skip
    for row in rows:
        name = f"{row.family} n={row.variables:,} rows={row.rows:,} nnz={row.nonzeros:,}"
        if row.outcome:
            cells.append([name, f"{row.contestant}: {row.outcome}", *[""] * 8, _memory(row)])
            continue
        times = row.setup_s, row.forward_s, row.backward_s, row.forward_s + row.backward_s
        judged = row.violation, row.kkt, row.error, row.gradient
        cells.append([name, row.contestant, *map(_seconds, times), *map(_number, judged), _memory(row)])
    return cells


def _memory(row: LargeRow) -> str:
    return "" if np.isnan(row.peak_gib) else f"{row.peak_gib:.2f}"


def screen_text(report: LargeReport) -> str:
    """Return the table for a terminal."""
    return align(_table(report.rows))


def markdown_text(report: LargeReport) -> str:
    """Return the report as Markdown."""
    environment = report.environment
    families = "\n".join(f"- **{name}**: {make.__doc__}" for name, make in FAMILIES.items())
    return f"""# Large sparse programs, measured

One item, forward and backward (gradient with respect to the point y). Written by

    {report.command}

{environment.date}, commit {environment.commit}, {environment.cpu}, {environment.cores} cores, one thread for torch.
{environment.versions_text}.

{families}

{markdown_table(_table(report.rows))}

- **both** is forward plus backward, the median of {_REPETITIONS} passes after one that compiles; of one pass where it
  takes more than {_REPEATED_S:g} s. Every contestant runs in its own process, which is stopped after
  {report.limit_s:g} s; **GiB** is its peak of resident memory, about 0.4 GiB of libraries included.
- **KKT**: largest residual of stationarity, constraints, signs and complementarity, relative to the largest terms of
  each, where multipliers are returned. That of `solve_qp` certifies its x; **x** of the others is the largest
  difference from it.
- **gradient**: of `solve_qp` the residual of the adjoint system on its face (judged with SciPy's LSQR); of the others
  the difference from it, relative to its largest entry. At degenerate points other elements of the Han-Sun set are
  right too.
- Bounds are written `2 x >= 2 l`, because the stock layer with MOREAU drops `x >= l`.
"""


def write_report(report: LargeReport, folder: Path) -> tuple[Path, Path]:
    """Write the report as Markdown and its rows as CSV; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text, table = folder / "benchmarks-sparse.md", folder / "benchmarks-sparse.csv"
    text.write_text(markdown_text(report))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(report.rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in report.rows)
    return text, table
