"""Series: one named set at growing size or growing batch, and how fast the time grows with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hsbackend.comparisons.contestants import Contestant, Kind
from hsbackend.comparisons.judge import Grade
from hsbackend.comparisons.problems import (
    BenchmarkProblem,
    birkhoff_projection,
    budget_projection,
    l1_ball_projection,
    monotone_projection,
    simplex_projection,
)
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.results import Row
from hsbackend.comparisons.speed import run_speed, steps_of

_SIZES = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
_BATCHES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
_QUICK_SIZES = (4, 8)
# "B = 1 or small": enough items to occupy the cores of a small machine.
_FEW = 4
# A contestant that takes longer than this for one call, fails or is wrong goes no further along a series.
LONGEST_CALL_MS = 2_000.0


@dataclass(frozen=True)
class Series:
    """Problems of one kind along one axis.

    Attributes:
        name: short name, used on the command line and in front of the names of its problems.
        description: what grows and what stays.
        axis: "n" or "B".
        sizes: along the axis, growing.
        make: `make(size, seed)`.
    """

    name: str
    description: str
    axis: str
    sizes: tuple[int, ...]
    make: Callable[[int, int], BenchmarkProblem]

    def problems(self, *, quick: bool, seed: int) -> list[BenchmarkProblem]:
        """Make the problems, named `<series>-<axis><size>`; tiny ones for `quick`."""
        sizes = _QUICK_SIZES if quick else self.sizes
        return [replace(self.make(size, seed), name=f"{self.name}-{self.axis.lower()}{size}") for size in sizes]

    def size_of(self, problem: BenchmarkProblem) -> int | None:
        """Return where a problem stands on the axis; None for a problem of another series."""
        prefix = f"{self.name}-{self.axis.lower()}"
        rest = problem.name.removeprefix(prefix)
        return int(rest) if problem.name.startswith(prefix) and rest.isdigit() else None


_ALL = (
    Series(
        "grow-simplex",
        f"simplex, B={_FEW}, against n",
        "n",
        _SIZES,
        lambda size, seed: simplex_projection(size, _FEW, seed),
    ),
    Series(
        "grow-budget",
        f"box + weighted budget, B={_FEW}, against n",
        "n",
        _SIZES,
        lambda size, seed: budget_projection(size, _FEW, seed),
    ),
    Series(
        "grow-l1",
        f"l1 ball, B={_FEW}, against n",
        "n",
        _SIZES,
        lambda size, seed: l1_ball_projection(size, _FEW, seed),
    ),
    Series(
        "grow-monotone",
        f"non-decreasing sequences, B={_FEW}, against n",
        "n",
        _SIZES,
        lambda size, seed: monotone_projection(size, _FEW, seed),
    ),
    Series(
        "grow-simplex-batch",
        "simplex, n=10, against B",
        "B",
        _BATCHES,
        lambda size, seed: simplex_projection(10, size, seed),
    ),
    Series(
        "grow-birkhoff-batch",
        "Birkhoff polytope, 4x4, against B",
        "B",
        _BATCHES,
        lambda size, seed: birkhoff_projection(4, size, seed),
    ),
)

# By suite: the suite `speed` has none.
SERIES: dict[str, dict[str, Series]] = {"speed": {}, "families": {series.name: series for series in _ALL}}


def run_series(
    problems: Sequence[BenchmarkProblem],
    contestants: Sequence[Contestant],
    *,
    device: torch.device,
    budget_s: float,
    progress: Progress,
) -> list[Row]:
    """Run the problems of one series, from small to large, see `run_speed`.

    Only contestants for named sets take part: the others need a cvxpy model or matrices with 100,000 columns. One that
    is slow, fails or is wrong drops out.
    """
    rows: list[Row] = []
    running = projecting(contestants)
    for problem in problems:
        dropped = steps_of([problem], projecting(contestants)) - steps_of([problem], running)
        at_this_size = run_speed([problem], running, device=device, budget_s=budget_s, progress=progress)
        progress.advance("left out", dropped)
        rows += at_this_size
        running = [c for c in running if not any(row.contestant == c.name and _is_out(row) for row in at_this_size)]
    return rows


def _is_out(row: Row) -> bool:
    """Say whether a contestant goes no further after this row."""
    is_slow = row.total_ms is not None and row.total_ms > LONGEST_CALL_MS
    return is_slow or row.outcome in ("failed", Grade.WRONG.value)


def projecting(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Return the contestants that take part in series."""
    return [contestant for contestant in contestants if contestant.kind is not Kind.GENERAL]


def growth_exponent(sizes: Sequence[int], times_ms: Sequence[float | None]) -> float | None:
    """Return p of the least-squares fit time = constant * size^p over the upper half of the sizes.

    The lower half is left out because there the fixed costs of a call hide the growth. None with fewer than two times.
    """
    half = (len(sizes) - 1) // 2
    pairs = [(s, t) for s, t in zip(sizes[half:], times_ms[half:], strict=True) if t]
    if len(pairs) < 2:
        return None
    logs = np.array([[math.log(size), math.log(time_ms)] for size, time_ms in pairs])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
