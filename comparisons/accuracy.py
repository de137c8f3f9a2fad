"""Which accuracy is attained, by data type, conditioning and scale: problems whose answers are known exactly.

    minimise 1/2 x'Qx + q'x   subject to   A x = b,  G x <= h

x, the active rows and the multipliers are chosen, q = -Qx - A'y - G'z and the limits follow from them, rounded once.
The answer of the rounded data, and its derivative, solve the KKT system of the same active rows; it is solved in
integers (Bareiss), so that nothing here comes from the code under test and no conditioning reaches the truth.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import null_space  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from hsbackend.comparisons.environment import Environment, describe_environment
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.tables import align, markdown_table
from hsbackend.qp import solve_qp
from hsbackend.solvers._verify_kernels import GLOBAL
from hsbackend.status import Status

FloatArray = NDArray[np.float64]
Long = NDArray[np.longdouble]

#: Fraction of the largest terms with which items are judged here; not more than the library's own.
_SHARE = 1e-4
#: Results are rounded to their data type when they are returned; an item may miss the tolerance by this.
_ROUNDING = {torch.float64: 0.0, torch.float32: 2.0**-23}
_DTYPES = (torch.float64, torch.float32)
#: Rounding of the data can release one of two nearly parallel rows: active sets that are tried, by what is left out.
_DROPPED: tuple[tuple[int, ...], ...] = ((), (0,), (1,))


@dataclass(frozen=True)
class Size:
    """Variables, equations, inequalities, how many of these are active, and items."""

    n: int
    p: int
    m: int
    active: int
    batch: int


FULL, QUICK = Size(20, 2, 40, 4, 32), Size(6, 1, 10, 2, 4)


@dataclass(frozen=True)
class Programs:
    """A batch of programs; the first ``active`` inequalities are the active ones.

    Attributes:
        Q: (B, n, n), None for a linear program.
        q: (B, n).
        A: (B, p, n).
        b: (B, p).
        G: (B, m, n).
        h: (B, m).
        active: active inequalities.
        units: (n,) sizes of the variables, in which errors are measured.
        feasible: whether there is an answer.
    """

    Q: FloatArray | None
    q: FloatArray
    A: FloatArray
    b: FloatArray
    G: FloatArray
    h: FloatArray
    active: int
    units: FloatArray
    feasible: bool = True

    def rounded(self, dtype: torch.dtype) -> Programs:
        """Return the programs with data that the type can hold."""
        if dtype == torch.float64:
            return self
        Q = None if self.Q is None else _single(self.Q)
        q, A, b, G, h = (_single(part) for part in (self.q, self.A, self.b, self.G, self.h))
        return replace(self, Q=Q, q=q, A=A, b=b, G=G, h=h)

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Return the arguments of `solve_qp`."""
        parts = (self.Q, self.q, self.A, self.b, self.G, self.h)
        return [None if part is None else torch.from_numpy(part).to(dtype) for part in parts]


def _single(part: FloatArray) -> FloatArray:
    return part.astype(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Case:
    """A kind of problem: how the eigenvalues, rows and units of `make` differ from the plain ones.

    Attributes:
        name: of the row.
        condition: largest eigenvalue of Q, which is one, by the smallest.
        scale: factor of all data.
        mixed: the variables have units from ``10^-mixed`` to ``10^mixed``.
        parallel: two active rows differ by this, relative to their length; zero for no such rows.
        gap: two opposite rows leave this width, and are infeasible where it is negative; zero for no such rows.
        rank: of Q as a share of n; zero for a linear program with a vertex for its optimum.
        tolerance: asked for instead of the common one.
    """

    name: str
    condition: float = 10.0
    scale: float = 1.0
    mixed: float = 0.0
    parallel: float = 0.0
    gap: float = 0.0
    rank: float = 1.0
    tolerance: float | None = None


CASES = (
    Case("condition 1", condition=1.0),
    Case("condition 1e4", condition=1e4),
    Case("condition 1e8", condition=1e8),
    Case("condition 1e12", condition=1e12),
    Case("condition 1e14", condition=1e14),
    Case("data times 1e-8", scale=1e-8),
    Case("data times 1e8", scale=1e8),
    Case("columns 1e-4 to 1e4", mixed=4.0),
    Case("rows differ by 1e-4", parallel=1e-4),
    Case("rows differ by 1e-5", parallel=1e-5),
    Case("rows differ by 1e-6", parallel=1e-6),
    Case("rows differ by 1e-6, tolerance 1e-13", parallel=1e-6, tolerance=1e-13),
    Case("rows differ by 1e-8", parallel=1e-8),
    Case("rows differ by 1e-10", parallel=1e-10),
    Case("LP vertex", rank=0.0),
    Case("Q of half rank", rank=0.5),
    Case("nearly infeasible, 1e-6", gap=1e-6),
    Case("infeasible by 1e-6", gap=-1e-6),
)
#: Cases in which float64 attains rounding: nothing is ill-conditioned but the units.
WELL_CONDITIONED = (
    "condition 1",
    "data times 1e-8",
    "data times 1e8",
    "columns 1e-4 to 1e4",
    "nearly infeasible, 1e-6",
)


def make(case: Case, size: Size, seed: int) -> Programs:
    """Choose answers and make programs that have them, in extended precision, rounded to float64 at the end."""
    rng = np.random.default_rng(seed)
    n, p, m, batch = size.n, size.p, size.m, size.batch
    rank = round(case.rank * n)
    # As many active rows as the missing curvature needs; at a vertex all of them.
    active = max(size.active, n - rank - p + (2 if 0 < rank < n else 0))

    def normal(*shape: int) -> Long:
        return rng.standard_normal(shape).astype(np.longdouble)

    eigenvalues = np.zeros(n)
    eigenvalues[:rank] = np.logspace(0.0, -np.log10(case.condition), rank)
    bases = np.linalg.qr(rng.standard_normal((batch, n, n)))[0].astype(np.longdouble)
    Q = (bases * eigenvalues) @ bases.swapaxes(1, 2)
    A, G = normal(batch, p, n) / np.sqrt(n), normal(batch, m, n) / np.sqrt(n)
    if case.parallel:
        G[:, 1] = G[:, 0] + case.parallel * normal(batch, n) / np.sqrt(n)
    if case.gap:
        G[:, active] = -G[:, 0]
    x, y = normal(batch, n), normal(batch, p)
    z = np.zeros((batch, m), dtype=np.longdouble)
    z[:, :active] = rng.uniform(0.5, 2.0, (batch, active))
    slack = rng.uniform(0.5, 2.0, (batch, m)).astype(np.longdouble)
    slack[:, :active] = 0.0
    if case.gap:
        slack[:, active] = case.gap
    units = 10.0 ** np.linspace(-case.mixed, case.mixed, n)
    # In units D of the variables the data are D^-1 Q D^-1, A D^-1 and G D^-1.
    Q, A, G, x = Q / (units[:, None] * units), A / units, G / units, x * units
    q = -(_times(Q, x) + _times(A.swapaxes(1, 2), y) + _times(G.swapaxes(1, 2), z))
    Q, q, A, b, G, h = (
        (case.scale * part).astype(np.float64) for part in (Q, q, A, _times(A, x), G, _times(G, x) + slack)
    )
    Q = 0.5 * (Q + Q.swapaxes(1, 2))
    return Programs(Q if rank else None, q, A, b, G, h, active, units, case.gap >= 0.0)


def _times(matrix: Long, vector: Long) -> Long:
    return (matrix * vector[:, None, :]).sum(axis=2)


def solve_exactly(matrix: FloatArray, right: FloatArray) -> FloatArray | None:
    """Solve ``matrix X = right`` in integers and round the result once; None for a singular matrix.

    Floating-point numbers are integers times a power of two. Fraction-free elimination, every division without a
    remainder; ``N^3 / 2`` steps with integers of up to N times the digits of the data.

    Source: Bareiss, "Sylvester's identity and multistep integer-preserving Gaussian elimination" (1968).
    """
    size = len(matrix)
    rows = np.empty((size, size + right.shape[1]), dtype=object)
    for i, row in enumerate(np.concatenate([matrix, right], axis=1)):
        ratios = [float(value).as_integer_ratio() for value in row]
        common = max(below for _, below in ratios)
        rows[i] = [above * (common // below) for above, below in ratios]
    previous = 1
    for k in range(size):
        pivots = [i for i in range(k, size) if rows[i, k] != 0]
        if not pivots:
            return None
        rows[[k, pivots[0]]] = rows[[pivots[0], k]]
        pivot, left = rows[k, k], rows[k, k + 1 :]
        for i in range(size):
            if i != k:
                rows[i, k + 1 :] = (pivot * rows[i, k + 1 :] - rows[i, k] * left) // previous
        previous = pivot
    # Every row has become previous * x_i = right-hand side; integers of any size are divided with one rounding.
    return np.array([[value / previous for value in row[size:]] for row in rows], dtype=np.float64)


@dataclass(frozen=True)
class Truth:
    """Exact answers, rounded once.

    Attributes:
        known: (B,) whether the optimum of these data was found: signs, slacks, and curvature on the null space of A.
        x: (B, n).
        y: (B, p).
        z: (B, m).
        gradient: (B, n) dL/dq for the cotangent dL/dx that was given.
    """

    known: NDArray[np.bool_]
    x: FloatArray
    y: FloatArray
    z: FloatArray
    gradient: FloatArray


def find_truth(programs: Programs, cotangent: FloatArray) -> Truth:
    """Solve the KKT system of the active rows, and its adjoint, in integers; check signs, slacks and curvature."""
    batch, n = programs.q.shape
    p, m, active = programs.A.shape[1], programs.G.shape[1], programs.active
    x, y, z, gradient = (np.zeros((batch, width)) for width in (n, p, m, n))
    truth = Truth(np.zeros(batch, dtype=bool), x, y, z, gradient)
    if not programs.feasible:
        return truth
    for i in range(batch):
        Q = np.zeros((n, n)) if programs.Q is None else programs.Q[i]
        Z = np.asarray(null_space(programs.A[i] * programs.units))
        curvature = np.linalg.eigvalsh(Z.T @ (Q * programs.units[:, None] * programs.units) @ Z)
        if curvature.min(initial=np.inf) < -4e-16 * n * np.abs(curvature).max(initial=0.0):
            continue
        for dropped in _DROPPED:
            held = np.setdiff1d(np.arange(active), dropped)
            k = p + len(held)
            N = np.concatenate([programs.A[i], programs.G[i, held]])
            matrix = np.block([[Q, N.T], [N, np.zeros((k, k))]])
            right = np.zeros((n + k, 2))
            right[:, 0] = np.concatenate([-programs.q[i], programs.b[i], programs.h[i, held]])
            right[:n, 1] = cotangent[i]
            found = solve_exactly(matrix, right)
            if found is None:
                continue
            slack = np.delete(programs.h[i] - programs.G[i] @ found[:n, 0], held)
            if (found[n + p :, 0] > 0.0).all() and (slack > 0.0).all():
                truth.known[i] = True
                truth.x[i], truth.y[i], truth.z[i, held] = found[:n, 0], found[n : n + p, 0], found[n + p :, 0]
                truth.gradient[i] = -found[:n, 1]
                break
    return truth


def kkt_residual(programs: Programs, x: FloatArray, y: FloatArray, z: FloatArray, share: float) -> FloatArray:
    """Return (B,) the largest residual of the KKT conditions, every component relative to its own terms.

    ``share`` times the largest terms, in the units of the variables, is added to every component's own. Of the slack
    of an inequality and its multiplier, measured by what it contributes to stationarity, the smaller one counts.
    """
    batch, n = programs.q.shape
    Q = np.zeros((batch, n, n)) if programs.Q is None else programs.Q
    N = np.concatenate([programs.A, programs.G], axis=1).astype(np.longdouble)
    w, limits = np.concatenate([y, z], axis=1), np.concatenate([programs.b, programs.h], axis=1)
    parts = np.concatenate(
        [Q * x[:, None, :], N.swapaxes(1, 2) * w[:, None, :], programs.q[:, :, None].astype(np.longdouble)], axis=2
    )
    force = np.abs(parts).sum(axis=2)
    force = force + share * (force * programs.units).max(axis=1, keepdims=True) / programs.units
    products = N * x[:, None, :]
    gap = products.sum(axis=2) - limits
    length = np.abs(N * programs.units).max(axis=2)
    reach = np.abs(products).sum(axis=2) + np.abs(limits)
    reach = reach + share * np.abs(x / programs.units).max(axis=1, keepdims=True) * length
    pull = np.abs(N * w[:, :, None] / force[:, None, :]).max(axis=2)
    relative = np.abs(gap) / reach
    p = programs.A.shape[1]
    inside = gap[:, p:] <= 0.0
    relative[:, p:] = np.where(inside, np.minimum(relative[:, p:], pull[:, p:]), relative[:, p:])
    relative[:, p:] = np.where(w[:, p:] < 0.0, np.maximum(relative[:, p:], pull[:, p:]), relative[:, p:])
    stationarity = np.abs(parts.sum(axis=2)) / force
    return np.maximum(stationarity.max(axis=1), relative.max(axis=1)).astype(np.float64)


@dataclass(frozen=True)
class Row:
    """One kind of problem in one data type; errors are the worst of the solved items whose answer is known.

    Attributes:
        problem: its name.
        dtype: of the tensors.
        items: in the batch.
        known: items with a known answer.
        solved: items of status SOLVED.
        missed: items of status SOLVED whose `checked` misses the tolerance by more than the rounding of the results.
        own_terms: KKT residual, every component relative to its own terms.
        checked: the same plus 1e-4 of the largest terms.
        x_error: of x, against the answer of the data as given.
        multiplier_error: of all multipliers.
        gradient_error: of dL/dq.
        original_error: of x, against the answer of the float64 data.
        non_unique: solved items that are reported to have other optima too.
        statuses: other statuses and how many items have them.
    """

    problem: str
    dtype: str
    items: int
    known: int
    solved: int
    missed: int
    own_terms: float
    checked: float
    x_error: float
    multiplier_error: float
    gradient_error: float
    original_error: float
    non_unique: int
    statuses: str


def measure(case: Case, size: Size, tolerance: float, seed: int) -> list[Row]:
    """Solve one kind of problem in all data types."""
    original = make(case, size, seed)
    cotangent = np.random.default_rng(seed + 1).standard_normal(original.q.shape).astype(np.float32).astype(np.float64)
    known = find_truth(original, cotangent)
    asked = tolerance if case.tolerance is None else case.tolerance
    return [_measure(case, original, known, cotangent, dtype, asked) for dtype in _DTYPES]


def _measure(
    case: Case, original: Programs, known: Truth, cotangent: FloatArray, dtype: torch.dtype, tolerance: float
) -> Row:
    programs = original.rounded(dtype)
    truth = known if dtype == torch.float64 else find_truth(programs, cotangent)
    Q, q, *rows = programs.tensors(dtype)
    assert q is not None
    q.requires_grad_()
    solution = solve_qp(Q, q, *rows, tolerance=tolerance, on_failure="nan")
    solved = (solution.status == Status.SOLVED).numpy()
    weights = torch.from_numpy(np.where(solved[:, None], cotangent, 0.0)).to(dtype)
    (gradient,) = torch.autograd.grad(solution.primal, q, weights)
    x, y, z = (
        part.detach().double().numpy() for part in (solution.primal, solution.multipliers.eq, solution.multipliers.ineq)
    )
    own, checked = (_residuals(programs, solved, x, y, z, share) for share in (0.0, _SHARE))
    judged = solved & truth.known
    units = programs.units
    multipliers, exact = np.concatenate([y, z], axis=1), np.concatenate([truth.y, truth.z], axis=1)
    # Where the derivative is zero its natural size is that of x over q.
    size = np.abs(truth.x / units).max(axis=1) / np.abs(programs.q * units).max(axis=1)
    none = np.abs(truth.gradient).max(axis=1) == 0.0
    natural = np.where(none, size * np.abs(cotangent).max(axis=1), 0.0)
    failures = Counter(Status(int(code)).name for code in solution.status.numpy()[~solved])
    return Row(
        problem=case.name,
        dtype=str(dtype).removeprefix("torch."),
        items=len(x),
        known=int(truth.known.sum()),
        solved=int(solved.sum()),
        missed=int((checked[solved] > tolerance + _ROUNDING[dtype]).sum()),
        own_terms=_worst(own, solved),
        checked=_worst(checked, solved),
        x_error=_error(x / units, truth.x / units, judged),
        multiplier_error=_error(multipliers, exact, judged),
        gradient_error=_error(gradient.double().numpy() / units, truth.gradient / units, judged, natural),
        original_error=_error(x / units, known.x / units, solved & known.known),
        non_unique=int(solution.non_unique.numpy()[solved].sum()),
        statuses=", ".join(f"{count} {name}" for name, count in sorted(failures.items())),
    )


def _residuals(
    programs: Programs, solved: NDArray[np.bool_], x: FloatArray, y: FloatArray, z: FloatArray, share: float
) -> FloatArray:
    """Return (B,) residuals, NaN for items that are not solved; NaN in a solved item is infinite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = kkt_residual(programs, x, y, z, share)
    return np.where(solved, np.where(np.isnan(found), np.inf, found), np.nan)


def _worst(values: FloatArray, items: NDArray[np.bool_]) -> float:
    return float(values[items].max()) if items.any() else np.nan


def _error(found: FloatArray, exact: FloatArray, items: NDArray[np.bool_], size: FloatArray | None = None) -> float:
    """Return the largest error of some items, relative to the largest component of the item's exact vector."""
    if not items.any():
        return np.nan
    largest = np.abs(exact).max(axis=1)
    largest = largest if size is None else np.maximum(largest, size)
    return float((np.abs(found - exact).max(axis=1)[items] / largest[items]).max())


@dataclass(frozen=True)
class AccuracyReport:
    """Everything the page states."""

    environment: Environment
    size: Size
    rows: list[Row]
    tolerance: float
    seed: int
    command: str


def run_accuracy(*, tolerance: float, seed: int, quick: bool, command: str, progress: Progress) -> AccuracyReport:
    """Measure all cases, one after the other."""
    size = QUICK if quick else FULL
    rows: list[Row] = []
    for case in CASES:
        progress.stage(case.name)
        rows += measure(case, size, tolerance, seed)
        progress.advance(case.name)
    return AccuracyReport(describe_environment(torch.device("cpu")), size, rows, tolerance, seed, command)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0e}"


def _table(rows: Sequence[Row]) -> list[list[str]]:
    lines = [
        ["problem", "dtype", "solved", "known", "KKT, own terms", f"KKT, plus {_SHARE:g}", "x", "multipliers", "dL/dq",
         "x, float64 data", "non-unique", "other statuses"]
    ]  # fmt: skip
    for row in rows:
        numbers = (
            row.own_terms, row.checked, row.x_error, row.multiplier_error, row.gradient_error, row.original_error
        )  # fmt: skip
        shares = (f"{row.solved} of {row.items}", str(row.known))
        lines.append([row.problem, row.dtype, *shares, *map(_number, numbers), str(row.non_unique),
                      row.statuses or "-"])  # fmt: skip
    return lines


def screen_text(report: AccuracyReport) -> str:
    """Return the table as plain text."""
    environment = report.environment
    head = f"{environment.cpu}, torch threads {environment.torch_threads}, {environment.date}"
    missed = sum(row.missed for row in report.rows)
    last = f"items of status SOLVED that miss the tolerance {report.tolerance:g}: {missed}"
    return "\n\n".join((f"{head}\n{environment.versions_text}", align(_table(report.rows)), last)) + "\n"


def markdown_text(report: AccuracyReport) -> str:
    """Return the page."""
    environment, size = report.environment, report.size
    missed = sum(row.missed for row in report.rows)
    parts = [
        "# Numerical accuracy",
        f"Produced by `{report.command}` on {environment.date}; the table is also in [numerics.csv](numerics.csv).",
        _TOLERANCE.strip(),
        "## Measured",
        "\n".join(
            (
                f"- Machine: {environment.cpu}, {environment.cores} cores, torch threads {environment.torch_threads}",
                f"- Commit: {environment.commit}",
                f"- Python {environment.python}; {environment.versions_text}",
                f"- `solve_qp` with tolerance {report.tolerance:g} unless the row says otherwise, seed {report.seed}",
                f"- {size.n} variables, {size.p} equations, {size.m} inequalities of which {size.active} are active "
                f"(more for a linear program and a singular Q), {size.batch} items, all data per item",
            )
        ),
        markdown_table(_table(report.rows)),
        f"Items of status `SOLVED` that miss their tolerance: {missed}. {_LEGEND.strip()}",
        _READING.strip(),
        "## Limitations",
        _LIMITATIONS.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(report: AccuracyReport, folder: Path) -> tuple[Path, Path]:
    """Write `folder/numerics.csv` and `folder/numerics.md` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, markdown_path = folder / "numerics.csv", folder / "numerics.md"
    names = [field.name for field in fields(Row)]
    with csv_path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*names, "date", "versions"])
        for row in report.rows:
            values = [getattr(row, name) for name in names]
            writer.writerow([*values, report.environment.date, report.environment.versions_text])
    markdown_path.write_text(markdown_text(report))
    return csv_path, markdown_path


_TOLERANCE = f"""
## What the tolerance means

`SOLVED` means: the KKT conditions, computed from the data, hold within `tolerance` (1e-9 by default). Anything else is
another status, and the numbers of that item are NaN (`on_failure="nan"`) or an error is raised.

- Every component of stationarity is compared with the sum of the magnitudes of its own terms,
  `|q_j| + sum |Q_jl x_l| + sum |A_ij y_i| + sum |G_ij z_i|`, and every row with `|h_i| + sum |G_ij x_j|`, plus
  {GLOBAL:g} of the largest such sum, in the units of the data or in units in which the columns are comparable: of
  both, what allows less.
- A multiplier is measured by what it contributes to stationarity. Of the slack of an inequality and its multiplier,
  the smaller one counts. A multiplier of the wrong sign counts in full.
- Solvers work in float64 whatever the type of the tensors, and end on a face: a set of rows that hold with equality.
  There the KKT system is solved again for the residual where it is not already far below the tolerance.
- Items that miss the tolerance, or whose failure is unproved, go to the interior-point method in balanced units. What
  it cannot solve either is `NOT_CONVERGED`, unless a certificate from the data proves `INFEASIBLE` or `UNBOUNDED`. A
  Hessian with negative curvature beyond rounding is `NOT_STRICTLY_CONVEX`.
- The tolerance is a backward error, and a problem without a solution may be within 1e-9 of one that has one. Where a
  point keeps the tolerance but cannot be brought down to 1e-3 of it, or where x or the multipliers are so large that
  they vanish in the data, a certificate is looked for. One that holds to rounding (1e-14, in curvature 4e-15)
  overrules the point: `INFEASIBLE` or `UNBOUNDED`. Limits of one variable that cross are `INFEASIBLE` when the middle
  between them misses the tolerance.

A small residual is a statement about the equations, not about x: it says that x is the answer of data that differ by
about that much. How far this is from the answer of the given data is a matter of conditioning, and this is what the
table shows.
"""

_LEGEND = f"""
For float32 this allows for the rounding of the returned numbers, 1.2e-7.

- **solved**: items of status `SOLVED`. **known**: items whose exact answer is known: the KKT system of the active
  rows, solved in integers, with the signs and slacks of an optimum. All errors are the largest of the solved items,
  those of answers only where the answer is known.
- **KKT, own terms**: every component relative to the sum of its own terms and nothing else.
  **KKT, plus {_SHARE:g}**: with {_SHARE:g} of the largest sum added, by which items are judged here.
  The library adds {GLOBAL:g}.
- **x**, **multipliers**, **dL/dq**: largest difference from the exact answer, relative to its largest component (x and
  dL/dq in the units of the variables). dL/dx is random. Where dL/dq is zero, relative to the size of x over that of q.
- float32 rows are judged against the exact answer of the data *after* rounding to float32, which is the problem that
  was posed. **x, float64 data** is the distance from the answer of the data *before* rounding.
- **non-unique**: solved items that are reported as `non_unique`.
"""

_READING = """
## How to read it

- **Well-conditioned float64 problems** are solved to rounding: x, multipliers and gradients to a few times 1e-15. Units
  do not matter: neither a factor for all data nor variables of different size.
- **The condition of Q** costs x and its derivative no more than rounding times the condition, up to 1e12; multipliers
  and residuals do not suffer. At 1e14 x is wrong in its first digit although the residual is far below the tolerance:
  such a curvature is not seen at 1e-9, the status is `SOLVED`, and `non_unique` is a hint in few items only.
- **Nearly dependent active rows** cost multipliers and derivatives digits with the square of their angle. The active
  set calls a row dependent on those it holds when the squared sine of the angle, in the metric of Q, is below 1e-11:
  an angle of about 3e-6. Where such a row is active, the face, whose resolution is that of the data, solves again with
  all active rows. From a difference of about 1e-8 on they are one row all the same: the point is right to the
  difference, multipliers and derivatives are those of one row, and the status says `SOLVED`.
- **float32** adds one rounding to the results: the answers of the data that arrived are as good as the type can say.
  The rounding of the data is another matter: it moves x by 6 per cent at condition 1e8. Of two nearly parallel rows it
  usually releases one, so that the posed problem is a simple one. It also gives a singular or nearly singular Q
  negative eigenvalues: `NOT_STRICTLY_CONVEX`. Form Q in float64, from factors
  in float64; the results have the type of `q`.
- **Feasibility** is decided at 1e-6: a set of that width is solved to rounding, one that is empty by as much is
  `INFEASIBLE`. The same holds for an objective that falls by 1e-6 per unit of length without end: `UNBOUNDED`.
- **`non_unique`** is decided on the same footing: a multiplier below 1e-9 of the costs counts as zero. Where a
  curvature is so small beside the costs that a change of these by 1e-9 moves the optimum by its own size, it is a hint.
"""

_LIMITATIONS = """
- Random dense problems of one size, with strict complementarity. Points with weakly active rows are compared in
  [degenerate.md](degenerate.md).
- One derivative is measured, that with respect to q, by one first-order backward pass.
- Where active rows are nearly dependent and the data were rounded, another active set can be optimal; three are tried,
  and where none of them fits the item is not judged.
"""
