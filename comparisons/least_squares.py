"""Least squares by products: what a gradient costs, in products and in time, and how exact it is.

Random matrices with prescribed singular values, so that x and its gradients are known from the factors. Contestants:

- ``lstsq``: :func:`hsbackend.lstsq`, dense A;
- ``lstsq, functions``: the same through ``matvec(x, A)`` and its pullback;
- ``unrolled LSMR``: the same iteration, the same number of steps, differentiated by autograd step by step;
- ``torch.linalg.lstsq``: on A, or on ``[A; damp I]``;
- ``normal equations``: ``(A'A + damp^2 I) x = A'b`` by Cholesky, differentiated by autograd: what a dense problem of
  moderate condition allows.

The report is `benchmarks-lstsq.md` with a CSV.
"""

from __future__ import annotations

import csv
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from hsbackend import lstsq
from hsbackend.comparisons.environment import Environment, describe_environment
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.tables import align, markdown_table
from hsbackend.comparisons.timing import Spread, summarise, take_turns
from hsbackend.lsmr import Limits, lsmr

#: m, n, condition, damping; ``--quick`` divides the sizes.
CASES = [
    (2000, 500, 10.0, 0.0),
    (2000, 500, 10.0, 0.1),
    (2000, 500, 1e3, 0.1),
    (4000, 1000, 10.0, 0.0),
    (4000, 1000, 10.0, 0.1),
    (500, 2000, 10.0, 0.0),
    (500, 2000, 10.0, 0.1),
    (2000, 500, 1e3, 0.0),
]
_QUICK_DIVISOR = 20
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Problem:
    """``L = <g, x>`` for the damped least-squares solution x, and its exact gradients."""

    A: Tensor
    b: Tensor
    g: Tensor
    damp: float
    condition: float
    x: Tensor
    to_A: Tensor
    to_b: Tensor

    @property
    def name(self) -> str:
        """Sizes and spectrum in words."""
        m, n = self.A.shape
        return f"{m} x {n}, condition {self.condition:g}, damp {self.damp:g}"


def make_problem(m: int, n: int, condition: float, damp: float, seed: int) -> Problem:
    """Return a random problem of full rank with singular values from 1 to 1/condition, solved by its factors."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0] for size in (m, n)
    )
    s = torch.logspace(0.0, -math.log10(condition), rank, dtype=torch.float64)
    b, g = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (m, n))
    ub, vg, size = left.mT @ b, right.mT @ g, s**2 + damp**2
    x, p = right @ (s / size * ub), left @ (s / size * vg)
    r_out = b - left @ ub if m > n else torch.zeros_like(b)
    g_out = g - right @ vg if n > m else torch.zeros_like(g)
    if damp:
        r, w = r_out + left @ (damp**2 / size * ub), right @ (vg / size) + g_out / damp**2
        to_A = torch.outer(r, w) - torch.outer(p, x)
    else:
        w, y = right @ (vg / size), left @ (ub / size)
        to_A = torch.outer(r_out, w) + torch.outer(y, g_out) - torch.outer(p, x)
    return Problem((left * s) @ right.mT, b, g, damp, condition, x, to_A, p)


@dataclass(frozen=True)
class Products:
    """Products with A and A' together."""

    forward: int
    backward: int


Solve = Callable[[Problem, Tensor, Tensor], tuple[Tensor, Callable[[], Products | None]]]


def _ours(problem: Problem, A: Tensor, b: Tensor) -> tuple[Tensor, Callable[[], Products]]:
    found = lstsq(A, b, damp=problem.damp, atol=_TOLERANCE, btol=_TOLERANCE, max_steps=20_000)
    return found.x, _counted(found)


def _ours_by_functions(problem: Problem, A: Tensor, b: Tensor) -> tuple[Tensor, Callable[[], Products]]:
    found = lstsq(
        lambda x, A: A @ x, b, A, x_like=problem.g, damp=problem.damp, atol=_TOLERANCE, btol=_TOLERANCE,
        max_steps=20_000,
    )  # fmt: skip
    return found.x, _counted(found)


def _counted(found) -> Callable[[], Products]:
    def count() -> Products:
        log = found.derivatives
        forward = int(found.products) + int(found.transposed_products)
        return Products(forward, log.products + log.transposed_products)

    return count


def _unrolled(problem: Problem, A: Tensor, b: Tensor) -> tuple[Tensor, Callable[[], Products]]:
    limits = Limits(_TOLERANCE, _TOLERANCE, math.inf, 20_000, 1)
    damp = b.new_full((), problem.damp) if problem.damp else None
    found = lsmr(lambda x: A @ x, lambda y: A.mT @ y, b, damp, limits, columns=A.shape[1], in_place=False)
    forward = found.products + found.transposed_products
    # Of every product, autograd takes the outer product for A and the transposed product for the vector.
    return found.x, lambda: Products(forward, 2 * forward)


def _torch_lstsq(problem: Problem, A: Tensor, b: Tensor) -> tuple[Tensor, Callable[[], None]]:
    if problem.damp:
        n = A.shape[1]
        A = torch.cat([A, problem.damp * torch.eye(n, dtype=A.dtype)])
        b = torch.cat([b, b.new_zeros(n)])
    return torch.linalg.lstsq(A, b.unsqueeze(-1)).solution.squeeze(-1), lambda: None


def _normal_equations(problem: Problem, A: Tensor, b: Tensor) -> tuple[Tensor, Callable[[], None]]:
    m, n = A.shape
    square = problem.damp**2
    if m >= n:
        gram = A.mT @ A + square * torch.eye(n, dtype=A.dtype)
        right = (A.mT @ b).unsqueeze(-1)
        return torch.cholesky_solve(right, torch.linalg.cholesky(gram)).squeeze(-1), lambda: None
    gram = A @ A.mT + square * torch.eye(m, dtype=A.dtype)
    dual = torch.cholesky_solve(b.unsqueeze(-1), torch.linalg.cholesky(gram)).squeeze(-1)
    return A.mT @ dual, lambda: None


CONTESTANTS: dict[str, Solve] = {
    "lstsq": _ours,
    "lstsq, functions": _ours_by_functions,
    "unrolled LSMR": _unrolled,
    "torch.linalg.lstsq": _torch_lstsq,
    "normal equations": _normal_equations,
}


@dataclass(frozen=True)
class Row:
    """One contestant on one problem.

    Times are medians of ``repetitions``; errors are relative, in the Euclidean norm.
    """

    problem: str
    m: int
    n: int
    condition: float
    damp: float
    contestant: str
    forward_ms: float
    backward_ms: float
    backward_q20_ms: float
    backward_q80_ms: float
    repetitions: int
    forward_products: int | None
    backward_products: int | None
    error_x: float
    error_to_A: float
    error_to_b: float


def _call(solve: Solve, problem: Problem) -> tuple[float, float, Products | None, tuple[Tensor, ...]]:
    """Return milliseconds forward and backward, products and (x, dL/dA, dL/db)."""
    A, b = problem.A.clone().requires_grad_(), problem.b.clone().requires_grad_()
    gc.disable()
    try:
        start_s = time.perf_counter()
        x, count = solve(problem, A, b)
        middle_s = time.perf_counter()
        to_A, to_b = torch.autograd.grad(x, (A, b), problem.g)
        end_s = time.perf_counter()
    finally:
        gc.enable()
    return 1e3 * (middle_s - start_s), 1e3 * (end_s - middle_s), count(), (x.detach(), to_A, to_b)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def measure(problem: Problem, contestants: Sequence[str], repetitions: int, progress: Progress) -> list[Row]:
    """Let the contestants take turns on a problem."""
    progress.stage(problem.name)
    firsts = {}
    for name in contestants:
        firsts[name] = _call(CONTESTANTS[name], problem)
        progress.advance(name)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for name in take_turns(dict.fromkeys(contestants, repetitions)):
        times[name].append(_call(CONTESTANTS[name], problem)[:2])
    rows = []
    for name in contestants:
        timing = summarise(times[name])
        backward: Spread = timing.backward
        products, (x, to_A, to_b) = firsts[name][2:]
        rows.append(
            Row(
                problem.name, *problem.A.shape, problem.condition, problem.damp, name, timing.forward.median_ms,
                backward.median_ms, backward.q20_ms, backward.q80_ms, timing.repetitions,
                products and products.forward, products and products.backward, _error(x, problem.x),
                _error(to_A, problem.to_A), _error(to_b, problem.to_b),
            )
        )  # fmt: skip
    return rows


@dataclass(frozen=True)
class LstsqReport:
    environment: Environment
    rows: list[Row]
    command: str


def run_lstsq(
    *, contestants: Sequence[str] | None, quick: bool, seed: int, repetitions: int, command: str, progress: Progress
) -> LstsqReport:
    """Measure every problem.

    Raises:
        ValueError: a contestant is unknown.
    """
    names = list(CONTESTANTS) if contestants is None else list(contestants)
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise ValueError(f"unknown contestant {unknown[0]!r}, expected one of: {', '.join(CONTESTANTS)}")
    rows: list[Row] = []
    for m, n, condition, damp in CASES:
        divisor = _QUICK_DIVISOR if quick else 1
        problem = make_problem(m // divisor, n // divisor, condition, damp, seed)
        rows += measure(problem, names, 1 if quick else repetitions, progress)
    return LstsqReport(describe_environment(torch.device("cpu")), rows, command)


def _table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of a table; factors are backward times over that of ``lstsq`` on the same problem."""
    own = {row.problem: row.backward_ms for row in rows if row.contestant == "lstsq"}
    cells = [
        ["problem", "contestant", "forward ms", "backward ms", "backward / lstsq", "products forward",
         "products backward", "error x", "error dL/dA", "error dL/db"]
    ]  # fmt: skip
    for row in rows:
        factor = f"{row.backward_ms / own[row.problem]:.2g}" if row.problem in own else ""
        counts = ["" if count is None else str(count) for count in (row.forward_products, row.backward_products)]
        cells.append(
            [row.problem, row.contestant, f"{row.forward_ms:.3g}", f"{row.backward_ms:.3g}", factor, *counts]
            + [f"{value:.1e}" for value in (row.error_x, row.error_to_A, row.error_to_b)]
        )
    return cells


def screen_text(report: LstsqReport) -> str:
    """Return the table for a terminal."""
    return align(_table(report.rows))


def markdown_text(report: LstsqReport) -> str:
    """Return the report."""
    environment = report.environment
    return "\n\n".join(
        [
            "# Least squares: what a gradient costs",
            f"`{report.command}`, {environment.date}, commit {environment.commit}. {environment.cpu}, "
            f"{environment.cores} cores, {environment.torch_threads} torch threads. {environment.versions_text}.",
            f"Float64, one problem at a time, `atol = btol = {_TOLERANCE:g}` for the iterations; the gradient is that "
            "of `<g, x>` for A and b together. Errors are relative to the exact answer, which is known because the "
            "singular vectors are. Times are medians; `backward / lstsq` is how much longer the backward pass takes "
            "than that of `hsbackend.lstsq`: above 1 we win, below 1 we lose.",
            markdown_table(_table(report.rows)),
            _READING.strip(),
        ]
    ) + "\n"  # fmt: skip


_READING = """
## How to read it

- Products are with A and with A', each counted as one, those of the rule itself included. The products of
  *unrolled LSMR* backward are those autograd does: two for each of the forward pass.
- *unrolled LSMR* makes the same steps as `lstsq` and stores them all: its memory grows with their number.
- *lstsq, functions* shows the rule without knowledge of A: with damping a backward pass is one solve for A', without
  damping two. *lstsq* knows that A is one dense matrix and starts these solves from a Cholesky factor of the smaller
  Gram matrix, which is not counted as products, where the forward pass took more steps than that costs.
- The number of steps of the forward pass grows with the condition, the cost of factorisations does not: dense problems
  of moderate size are faster by *normal equations* as long as their condition allows it (about 1e6 in float64), or by
  `lstsq` with a factor as preconditioner.
"""


def write_report(report: LstsqReport, folder: Path) -> tuple[Path, Path]:
    """Write `folder/benchmarks-lstsq.csv` and `.md` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, markdown_path = folder / "benchmarks-lstsq.csv", folder / "benchmarks-lstsq.md"
    names = [field.name for field in fields(Row)]
    with csv_path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*names, "date", "versions"])
        for row in report.rows:
            values = [getattr(row, name) for name in names]
            writer.writerow([*values, report.environment.date, report.environment.versions_text])
    markdown_path.write_text(markdown_text(report))
    return csv_path, markdown_path
