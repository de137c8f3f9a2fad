"""Report of the comparison of QP solvers: success rate first, then times in which failures count."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsbackend.comparisons.environment import Environment
from hsbackend.comparisons.qp_contestants import QPContestant
from hsbackend.comparisons.qp_families import FAMILIES, INSTANCES, Key
from hsbackend.comparisons.qp_judge import TOLERANCES
from hsbackend.comparisons.qp_runner import QPRow
from hsbackend.comparisons.tables import align, markdown_table

NAME = "benchmarks-qp"

# (heading, which rows): size classes, then everything.
_CLASSES: tuple[tuple[str, Callable[[QPRow], bool]], ...] = (
    ("Up to 100 variables", lambda row: row.key.size <= 100),
    ("101 to 500 variables", lambda row: 100 < row.key.size <= 500),
    ("501 to 2,000 variables", lambda row: row.key.size > 500),
    ("Total", lambda row: True),
    ("Total, quadratic programs", lambda row: not row.is_linear),
    ("Total, linear programs", lambda row: row.is_linear),
)
_SHIFT_MS = 1.0
_TIGHT, _LOOSE = TOLERANCES
_HEADER = (
    "contestant",
    "instances",
    f"solved at {_TIGHT:g}",
    f"solved at {_LOOSE:g}",
    f"claimed, not at {_LOOSE:g}",
    f"mean ms at {_TIGHT:g}",
    "x of fastest",
    f"mean ms at {_LOOSE:g}",
)

_LEGEND = (
    "Solved at e: relative primal residual, dual residual and duality gap, computed by the judge from the original "
    "data and the returned point and multipliers, are at most e, and the time is within the limit. Claimed, not at "
    f"{_LOOSE:g}: the solver says that it solved the instance, but the judge finds a residual above {_LOOSE:g}. "
    f"Mean: shifted geometric mean of the times, shift {_SHIFT_MS:g} ms; an instance that is not solved counts as the "
    "time limit. A * marks contestants that took part in some instances only; their mean is over those and is not "
    "compared."
)

_METHOD = """\
- The time is the median of repeated calls of one solve, set-up included, from arrays in the format that the solver
  wants (dense, or CSC); converting to that format is outside the clock, and so are importing and compiling. Forward
  solve only: nobody computes derivatives.
- One thread for everybody, in a process of its own. A solve that exceeds the time limit is ended; the contestant is
  then left out of the remaining and larger instances of the family, which count as failures.
- The judge normalises by 1 + the largest of the terms that should cancel. All contestants return multipliers, so nobody
  is judged by the objective. Only the judge's numbers decide, not what the solver says about its answer.
- Instances are drawn by published formulas from (family, size, number); `hsbackend.comparisons.qp_families` has them.
- A contestant's settings are in the table of contestants; where the plain accuracy or a default made a solver miss
  the judge's tolerance or fail, it was changed in the solver's favour.
"""

_LIMITATIONS = """\
- One machine, other processes may have been running. Ratios within one run mean more than milliseconds.
- Random, mostly well scaled instances; the families and sizes were chosen by the authors of `hsbackend`.
- `hsbackend` takes dense matrices, so large sparse instances are not what it is made for.
"""


@dataclass(frozen=True)
class QPReport:
    """Everything the report tells."""

    environment: Environment
    families: Sequence[str]
    contestants: Sequence[QPContestant]
    rows: Sequence[QPRow]
    not_run: Sequence[Key]
    accuracy: float
    limit_s: float
    minutes: float
    command: str


def shifted_geometric_mean(times_ms: Sequence[float], shift_ms: float = _SHIFT_MS) -> float:
    """Return exp(mean(log(t + shift))) - shift."""
    return math.exp(sum(math.log(t + shift_ms) for t in times_ms) / len(times_ms)) - shift_ms


def screen_text(report: QPReport) -> str:
    """Return the summaries as plain text."""
    parts = [f"{heading}\n{align(table)}" for heading, table in _summaries(report)]
    return "\n\n".join([*parts, _LEGEND, *_remarks(report)]) + "\n"


def markdown_text(report: QPReport) -> str:
    """Return the report as Markdown."""
    environment = report.environment
    parts = [
        "# QP solvers on published families",
        f"Produced by `{report.command}` on {environment.date}. The rows behind the tables are in "
        f"[{NAME}.csv]({NAME}.csv).",
        "\n".join(
            (
                f"- Machine: {environment.cpu}, {environment.cores} cores",
                "- Threads: 1 for everybody",
                f"- Commit: {environment.commit}",
                f"- Python {environment.python}; {environment.versions_text}",
                f"- float64, accuracy asked of every solver {report.accuracy:g}, time limit {report.limit_s:g} s "
                "per instance",
            )
        ),
        _LEGEND,
        *_remarks(report),
    ]
    for heading, table in _summaries(report):
        parts += [f"## {heading}", markdown_table(table)]
    parts += [
        "## By family and size",
        f"Mean ms at {_TIGHT:g}. Where not every instance is solved, the shares solved at {_TIGHT:g} and at {_LOOSE:g} "
        f"stand beside it. Instances per size: {_instances_text()}, at most.",
    ]
    for family in report.families:
        table = _family_table(family, report)
        if len(table) > 1:
            parts += [f"### {family}", FAMILIES[family].description, markdown_table(table)]
    contestants = [["contestant", "version", "interface and settings"]]
    contestants += [[c.name, c.version, c.description] for c in report.contestants]
    parts += ["## Contestants", markdown_table(contestants), "## Method", _METHOD.strip()]
    if failures := _failures(report):
        parts += ["## Failures", "\n".join(f"- {failure}" for failure in failures)]
    parts += ["## Limitations", _LIMITATIONS.strip()]
    return "\n\n".join(parts) + "\n"


def write_report(report: QPReport, folder: Path) -> tuple[Path, Path]:
    """Write `folder/benchmarks-qp.csv` and `.md` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, markdown_path = folder / f"{NAME}.csv", folder / f"{NAME}.md"
    records = [_record(row, report) for row in report.rows]
    with csv_path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(records[0]) if records else ["family"])
        writer.writeheader()
        writer.writerows(records)
    markdown_path.write_text(markdown_text(report), encoding="utf-8")
    return csv_path, markdown_path


def _record(row: QPRow, report: QPReport) -> dict[str, object]:
    """Return one CSV record; an empty time was not reached."""
    environment = report.environment
    contestant = next(c for c in report.contestants if c.name == row.contestant)
    return {
        "family": row.key.family,
        "size": row.key.size,
        "number": row.key.number,
        "variables": row.variables,
        "rows": row.rows,
        "contestant": row.contestant,
        "contestant_version": contestant.version,
        "solved_at_1e-9": int(row.is_solved(1e-9)),
        "solved_at_1e-6": int(row.is_solved(1e-6)),
        "claims": int(row.claims),
        "status": row.status,
        "primal_residual": row.accuracy.primal,
        "dual_residual": row.accuracy.dual,
        "gap": row.accuracy.gap,
        "time_ms": row.time_ms,
        "repetitions": row.repetitions,
        "limit_s": report.limit_s,
        "accuracy": report.accuracy,
        "threads": 1,
        "dtype": "float64",
        "cpu": environment.cpu,
        "cores": environment.cores,
        "date": environment.date,
        "commit": environment.commit,
        "python": environment.python,
    }


def _summaries(report: QPReport) -> list[tuple[str, list[list[str]]]]:
    """Return (heading, table) of each class of instances that has any."""
    tables = [(heading, _summary([row for row in report.rows if chosen(row)], report)) for heading, chosen in _CLASSES]
    return [(heading, table) for heading, table in tables if len(table) > 1]


def _summary(rows: Sequence[QPRow], report: QPReport) -> list[list[str]]:
    """Return one line per contestant."""
    everything = {row.key for row in rows}
    by_name = {c.name: [row for row in rows if row.contestant == c.name] for c in report.contestants}
    means = {name: _mean(own, _TIGHT) for name, own in by_name.items() if own}
    fastest = min((means[name] for name in means if len(by_name[name]) == len(everything)), default=None)
    lines = [list(_HEADER)]
    for name, mean_ms in means.items():
        own = by_name[name]
        is_complete = len(own) == len(everything)
        wrong = sum(row.claims and row.time_ms is not None and row.accuracy.worst > _LOOSE for row in own)
        lines.append(
            [
                name if is_complete else f"{name} *",
                str(len(own)),
                _share(own, _TIGHT),
                _share(own, _LOOSE),
                str(wrong),
                _ms(mean_ms),
                f"{mean_ms / fastest:.1f}" if is_complete and fastest else "-",
                _ms(_mean(own, _LOOSE)),
            ]
        )
    return lines


def _family_table(family: str, report: QPReport) -> list[list[str]]:
    """Return sizes down, contestants across."""
    rows = [row for row in report.rows if row.key.family == family]
    names = [c.name for c in report.contestants if any(row.contestant == c.name for row in rows)]
    lines = [["size", "variables", "rows", *names]]
    for size in sorted({row.key.size for row in rows}):
        at_size = [row for row in rows if row.key.size == size]
        cells = [_cell([row for row in at_size if row.contestant == name]) for name in names]
        counts = (_range([row.variables for row in at_size]), _range([row.rows for row in at_size]))
        lines.append([f"{size:,}", *counts, *cells])
    return lines


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"


def _cell(rows: Sequence[QPRow]) -> str:
    """Return the mean, with shares where some instance is not solved."""
    if not rows:
        return "-"
    mean = _ms(_mean(rows, _TIGHT))
    return (
        mean
        if all(row.is_solved(_TIGHT) for row in rows)
        else f"{mean} ({_share(rows, _TIGHT)}, {_share(rows, _LOOSE)})"
    )


def _mean(rows: Sequence[QPRow], tolerance: float) -> float:
    return shifted_geometric_mean([row.counted_ms(tolerance) for row in rows])


def _share(rows: Sequence[QPRow], tolerance: float) -> str:
    return f"{100 * sum(row.is_solved(tolerance) for row in rows) / len(rows):.0f} %"


def _failures(report: QPReport) -> list[str]:
    """Return a line per contestant, family and status of instances not solved at the tighter tolerance."""
    where: dict[tuple[str, str, str], list[QPRow]] = {}
    for row in report.rows:
        if not row.is_solved(_TIGHT):
            where.setdefault((row.contestant, row.key.family, row.status), []).append(row)
    lines: list[str] = []
    for (name, family, status), rows in where.items():
        sizes = ", ".join(f"{size:,}" for size in sorted({row.key.size for row in rows}))
        residuals = [row.accuracy.worst for row in rows if math.isfinite(row.accuracy.worst)]
        told = f", worst residual {max(residuals):.0e}" if residuals else ""
        lines.append(f"{name}, {family}: {len(rows)} of size {sizes}: {status}{told}")
    return lines


def _remarks(report: QPReport) -> list[str]:
    """Say what was not run."""
    if not report.not_run:
        return []
    where = sorted({(key.size, key.family) for key in report.not_run})
    told = ", ".join(f"{family} {size:,}" for size, family in where)
    return [f"Not run, because the {report.minutes:g} minutes of the run were over: {told}."]


def _instances_text() -> str:
    return ", ".join(f"{size:,}: {count}" for size, count in INSTANCES.items())


def _ms(value: float) -> str:
    """Return two or three significant digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
