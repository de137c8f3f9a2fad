"""Reports: a table for the screen, CSV and Markdown for the disk. Success rate first, failures keep their row."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hsbackend.comparisons.contestants import Contestant, Kind
from hsbackend.comparisons.environment import Environment
from hsbackend.comparisons.judge import (
    GRADIENT_TOLERANCE,
    ROUGH_GRADIENT_TOLERANCE,
    ROUGH_TOLERANCE,
    SUCCESS_TOLERANCE,
    Grade,
)
from hsbackend.comparisons.problems import BenchmarkProblem
from hsbackend.comparisons.reference import MARGIN_TOLERANCE
from hsbackend.comparisons.results import Row, best_peer, diffcp_yardstick, fastest, speed_up
from hsbackend.comparisons.scaling import LONGEST_CALL_MS, Series, growth_exponent
from hsbackend.comparisons.tables import align, markdown_table

_HEADER = (
    "contestant",
    "success",
    "outcome",
    "KKT res.",
    "x error",
    "grad error",
    "setup ms",
    "1st call",
    "forward",
    "backward",
    "total ms",
    "20%-80%",
    "x vs best peer",
    "x vs DIFFCP",
)

_LEGEND = (
    f"success: items feasible and within {SUCCESS_TOLERANCE:g} of the reference. outcome: correct (all items, all "
    f"gradients within {GRADIENT_TOLERANCE:g}), rough (all items within {ROUGH_TOLERANCE:g}, typical gradient within "
    f"{ROUGH_GRADIENT_TOLERANCE:g}), wrong, or failed. KKT res.: worst residual at the returned point with the "
    "reference's multipliers. grad error: worst parameter and item. Times in ms for the whole batch, medians. "
    "x vs: how many times faster; only rows whose answer counts have a ratio (peers: correct or rough, ours: correct)."
)

_LIMITATIONS = """\
- One machine, few cores, float64; other processes may have been running. Ratios within one run mean more than
  milliseconds.
- Synthetic data of a few families, most of them well conditioned and not degenerate. The suite was chosen by the
  authors of `hsbackend`; it is the published target of the project, not a neutral collection.
- Every solver is asked for the same accuracy by its own tolerance, but tolerances mean different things: an
  interior-point method stops on the duality gap and leaves x off by about the square root of it. Less accurate peers
  are graded "rough" and keep their time, which favours them.
- The KKT residual uses the reference's multipliers, since layers return the primal only; it bounds the true one from
  above.
- Gradients are compared where the strict-complementarity margin exceeds {margin:g}, and for learned or varying rows
  only where the active rows are independent; the other items are counted but not compared.
- Gradients of shared parameters are sums over the batch for everybody.
- Time to compile or to set up lazily is in "1st call", not in the medians. Memory is not measured.
- jaxopt works on jax arrays; copying tensors to them and back is not in its time. Everybody else takes tensors.
- QPLayer gets matrices; forming them from the parameters is part of its time, as it would be in a user's model.
"""


@dataclass(frozen=True)
class SpeedReport:
    """Everything a report tells; `grown` are the problems of the series, whose rows are among the others."""

    title: str
    environment: Environment
    problems: Sequence[BenchmarkProblem]
    series: Sequence[Series]
    grown: Sequence[BenchmarkProblem]
    contestants: Sequence[Contestant]
    rows: Sequence[Row]
    accuracy: float
    seed: int
    command: str

    def rows_of(self, problem: BenchmarkProblem) -> list[Row]:
        """Return the rows of one problem."""
        return [row for row in self.rows if row.problem == problem.name]


def screen_text(report: SpeedReport) -> str:
    """Return the tables as plain text."""
    parts = [_environment_line(report.environment)]
    for problem in report.problems:
        rows = report.rows_of(problem)
        cells = [list(_HEADER), *(_cells(row, rows) for row in rows)]
        parts.append(f"{problem.name}: {problem.description}\n{align(cells)}\n{_yardsticks(rows)}{_failures(rows)}")
    for one in report.series:
        failures = "".join(f"\n  {failure}" for failure in _growth_failures(one, report))
        parts.append(f"{one.name}: {one.description}\n{align(_growth_table(one, report))}{failures}")
    for heading, table in _overviews(report):
        parts.append(f"{heading}\n{align(table)}")
    parts.append(_LEGEND)
    return "\n\n".join(parts) + "\n"


def markdown_text(report: SpeedReport) -> str:
    """Return the report as Markdown."""
    environment = report.environment
    parts = [
        f"# {report.title}",
        f"Produced by `{report.command}` on {environment.date}.",
        "\n".join(
            (
                f"- Machine: {environment.cpu}, {environment.cores} cores, device {environment.device}",
                f"- Threads: torch {environment.torch_threads}",
                f"- Commit: {environment.commit}",
                f"- Python {environment.python}; {environment.versions_text}",
                f"- float64, accuracy asked of every solver {report.accuracy:g}, seed {report.seed}",
            )
        ),
        _LEGEND,
    ]
    for heading, table in _overviews(report):
        parts += [f"## {heading}", markdown_table(table)]
    for problem in report.problems:
        rows = report.rows_of(problem)
        cells = [list(_HEADER), *(_cells(row, rows) for row in rows)]
        parts += [f"## {problem.name}", problem.description + ".", markdown_table(cells), _yardsticks(rows).strip()]
        remarks = [f"- {row.contestant} failed: {row.error}" for row in rows if row.error is not None]
        remarks += [f"- {row.contestant} warned: {note}" for row in rows for note in row.notes]
        remarks += [f"- {row.contestant} routed: {row.route}" for row in rows if row.route is not None]
        if remarks:
            parts.append("\n".join(remarks))
    for one in report.series:
        parts += [f"## {one.name}", f"{one.description}. {_GROWTH_LEGEND}", markdown_table(_growth_table(one, report))]
        if failures := _growth_failures(one, report):
            parts.append("\n".join(f"- {failure}" for failure in failures))
    parts += [
        "## Contestants",
        "\n".join(f"- **{contestant.name}**: {contestant.description}" for contestant in report.contestants),
        "## Limitations",
        _LIMITATIONS.format(margin=MARGIN_TOLERANCE).strip(),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(report: SpeedReport, folder: Path, name: str = "speed") -> tuple[Path, Path]:
    """Write `folder/name.csv` and `folder/name.md` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, markdown_path = folder / f"{name}.csv", folder / f"{name}.md"
    records = [_record(row, report) for row in report.rows]
    with csv_path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(records[0]) if records else ["problem"])
        writer.writeheader()
        writer.writerows(records)
    markdown_path.write_text(markdown_text(report), encoding="utf-8")
    return csv_path, markdown_path


def _record(row: Row, report: SpeedReport) -> dict[str, object]:
    """Return one CSV record; an empty field was not reached."""
    problem = next(p for p in (*report.problems, *report.grown) if p.name == row.problem)
    rows = report.rows_of(problem)
    verdict, timing, environment = row.verdict, row.timing, report.environment
    return {
        "problem": row.problem,
        "contestant": row.contestant,
        "outcome": row.outcome,
        "success_rate": verdict and verdict.success_rate,
        "primal_residual": verdict and verdict.primal_residual,
        "kkt_residual": verdict and verdict.kkt_residual,
        "primal_error_rel": verdict and verdict.primal_error,
        "gradient_error_rel": verdict and verdict.worst_gradient_error,
        "gradient_error_by_parameter": verdict and " ".join(f"{k}={v:.3e}" for k, v in verdict.gradient_error.items()),
        "typical_gradient_error_rel": verdict and verdict.typical_gradient_error,
        "judged_gradient_items": verdict and verdict.judged_items,
        "batch": problem.batch,
        "setup_ms": row.setup_ms,
        "first_call_ms": row.first_call_ms,
        "forward_ms": timing and timing.forward.median_ms,
        "backward_ms": timing and timing.backward.median_ms,
        "total_ms": timing and timing.total.median_ms,
        "total_q20_ms": timing and timing.total.q20_ms,
        "total_q80_ms": timing and timing.total.q80_ms,
        "repetitions": timing and timing.repetitions,
        "times_faster_than_best_peer": speed_up(row, best_peer(rows)),
        "times_faster_than_diffcp": speed_up(row, diffcp_yardstick(rows)),
        "error": row.error,
        "notes": " | ".join(row.notes),
        "route": row.route,
        "accuracy": report.accuracy,
        "seed": report.seed,
        "dtype": "float64",
        "device": environment.device,
        "cpu": environment.cpu,
        "cores": environment.cores,
        "torch_threads": environment.torch_threads,
        "date": environment.date,
        "commit": environment.commit,
        "python": environment.python,
        "versions": environment.versions_text,
    }


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """Return one table line."""
    verdict, timing = row.verdict, row.timing
    return [
        row.contestant,
        "-" if verdict is None else f"{100 * verdict.success_rate:.1f} %",
        row.outcome,
        "-" if verdict is None or verdict.kkt_residual is None else f"{verdict.kkt_residual:.1e}",
        "-" if verdict is None else f"{verdict.primal_error:.1e}",
        "-" if verdict is None else f"{verdict.worst_gradient_error:.1e}",
        _ms(row.setup_ms),
        _ms(row.first_call_ms),
        _ms(timing.forward.median_ms if timing else None),
        _ms(timing.backward.median_ms if timing else None),
        _ms(timing.total.median_ms if timing else None),
        "-" if timing is None else f"{_ms(timing.total.q20_ms)}-{_ms(timing.total.q80_ms)}",
        _ratio(speed_up(row, best_peer(rows))),
        _ratio(speed_up(row, diffcp_yardstick(rows))),
    ]


_SUMMARY_HEADER = ("contestant", "problems", "correct", "rough", "wrong", "failed", "geo. mean of time / fastest")


def _overviews(report: SpeedReport) -> list[tuple[str, list[list[str]]]]:
    """Return (heading, table) of what is told about all problems at once."""
    if not report.problems:
        return []
    tables = [("Summary", [list(_SUMMARY_HEADER), *_summary(report)]), ("Total ms", _totals(report))]
    if any(row.is_ours and row.kind is Kind.SPECIALISED for row in report.rows):
        tables.insert(1, ("Direct API against peers", _direct_against_peers(report)))
    return tables


def _summary(report: SpeedReport) -> list[list[str]]:
    """Return, per contestant, how often it was right, and how slow it typically was where it was.

    The mean is geometric, over the problems where the row counts, of its total over the fastest total that counts.
    """
    lines: list[list[str]] = []
    by_problem = [report.rows_of(problem) for problem in report.problems]
    for contestant in report.contestants:
        rows = [row for rows in by_problem for row in rows if row.contestant == contestant.name]
        if not rows or contestant.kind is Kind.FLOOR:
            continue
        outcomes = [row.outcome for row in rows]
        logs: list[float] = []
        for row in rows:
            peers = [r.total_ms for r in report.rows if r.problem == row.problem and r.counts and r.total_ms]
            if row.counts and row.total_ms:
                logs.append(math.log(row.total_ms / min(peers)))
        lines.append(
            [
                contestant.name,
                str(len(rows)),
                *(str(outcomes.count(word)) for word in (*(grade.value for grade in Grade), "failed")),
                f"{math.exp(sum(logs) / len(logs)):.1f}" if logs else "-",
            ]
        )
    return lines


def _totals(report: SpeedReport) -> list[list[str]]:
    """Return total times, contestants down, problems across; an outcome other than correct stands beside the time."""
    lines = [["contestant", *(problem.name for problem in report.problems)]]
    for contestant in report.contestants:
        cells = [
            _total_and_outcome([row for row in report.rows_of(problem) if row.contestant == contestant.name])
            for problem in report.problems
        ]
        if any(cells):
            lines.append([contestant.name, *cells])
    return lines


def _total_and_outcome(rows: Sequence[Row]) -> str:
    """Return the cell of one row, or of none for a contestant that does not know the problem."""
    if not rows:
        return ""
    (row,) = rows
    if row.outcome in (Grade.CORRECT.value, "floor"):
        return _ms(row.total_ms)
    return row.outcome if row.total_ms is None else f"{_ms(row.total_ms)} {row.outcome}"


_PEER_COLUMNS = ("specialised peer", "MOREAU", "other QP peer", "DIFFCP")


def _direct_against_peers(report: SpeedReport) -> list[list[str]]:
    """Return, per problem, our direct API beside our layers and the fastest of each kind of peer that counts."""
    lines = [["problem", "direct ms", "layers, ms on top", "floor", *_PEER_COLUMNS]]
    for problem in report.problems:
        rows = report.rows_of(problem)
        ours = [row for row in rows if row.is_ours]
        direct = next((row for row in ours if row.kind is Kind.SPECIALISED), None)
        if direct is None:
            continue
        layers = [row for row in ours if row.kind is Kind.GENERAL]
        on_top = [
            f"{row.contestant} {row.total_ms - direct.total_ms:+.1f}"
            for row in layers
            if row.total_ms is not None and direct.total_ms is not None
        ]
        floors = [f"{row.contestant} {_ms(row.total_ms)}" for row in rows if row.kind is Kind.FLOOR]
        general = [row for row in rows if row.kind is Kind.GENERAL and not row.is_ours]
        moreau = [row for row in general if row.contestant.startswith("moreau")]
        others = [row for row in general if row not in moreau and not row.is_diffcp]
        peers = (
            fastest([row for row in rows if row.kind is Kind.SPECIALISED and not row.is_ours]),
            fastest(moreau),
            fastest(others),
            diffcp_yardstick(rows),
        )
        lines.append(
            [
                problem.name,
                _total_and_outcome([direct]),
                ", ".join(on_top) or "-",
                ", ".join(floors) or "-",
                *(_peer_and_ratio(direct, peer) for peer in peers),
            ]
        )
    return lines


def _peer_and_ratio(direct: Row, peer: Row | None) -> str:
    """Return the peer, its time, and how many times faster the direct API is."""
    if peer is None:
        return "-"
    told = f"{peer.contestant} {_total_and_outcome([peer])}"
    ratio = speed_up(direct, peer)
    return told if ratio is None else f"{told}: {_ratio(ratio)}x"


_GROWTH_LEGEND = (
    "Forward + backward, ms, medians; an outcome other than correct stands beside the time. A contestant that fails, "
    f"is wrong or needs more than {LONGEST_CALL_MS / 1e3:g} s goes no further. Last line: exponent p of the fit "
    "time ~ size^p over the upper half of the sizes, where the fixed costs of a call no longer hide it."
)


def _growth_table(series: Series, report: SpeedReport) -> list[list[str]]:
    """Return sizes down, contestants across, the growth exponent as the last line."""
    sizes = {problem.name: size for problem in report.grown if (size := series.size_of(problem)) is not None}
    rows = {(row.problem, row.contestant): row for row in report.rows if row.problem in sizes}
    present = {contestant for _, contestant in rows}
    names = [contestant.name for contestant in report.contestants if contestant.name in present]
    lines = [[series.axis, *names]]
    for problem, size in sizes.items():
        cells = [rows.get((problem, name)) for name in names]
        lines.append([f"{size:,}", *(_total_and_outcome([row] if row else []) for row in cells)])
    exponents = ["exponent"]
    for name in names:
        of_name = [rows.get((problem, name)) for problem in sizes]
        times_ms = [row.total_ms if row and (row.counts or row.kind is Kind.FLOOR) else None for row in of_name]
        exponent = growth_exponent(list(sizes.values()), times_ms)
        exponents.append("-" if exponent is None else f"{exponent:.2f}")
    lines.append(exponents)
    return lines


def _growth_failures(series: Series, report: SpeedReport) -> list[str]:
    """Return a line for each contestant and error, which is usually the same at every size."""
    names = {problem.name for problem in report.grown if series.size_of(problem) is not None}
    where: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.problem in names and row.error is not None:
            where.setdefault((row.contestant, row.error), []).append(row.problem.removeprefix(f"{series.name}-"))
    return [f"{name} failed at {', '.join(sizes)}: {error}" for (name, error), sizes in where.items()]


def _yardsticks(rows: Sequence[Row]) -> str:
    """Say what the ratios of one problem refer to, and how many gradients were compared."""
    peer, diffcp = best_peer(rows), diffcp_yardstick(rows)
    judged = next((row.verdict for row in rows if row.verdict is not None), None)

    def told(row: Row | None) -> str:
        return f"{row.contestant} ({_ms(row.total_ms)} ms, {row.outcome})" if row else "none counts"

    parts = [f"best peer: {told(peer)}", f"DIFFCP: {told(diffcp)}"]
    if judged is not None:
        parts.append(f"gradients compared in {judged.judged_items} of {judged.batch} items")
    return "; ".join(parts)


def _failures(rows: Sequence[Row]) -> str:
    """Return a line for each error."""
    return "".join(f"\n  {row.contestant} failed: {row.error}" for row in rows if row.error is not None)


def _environment_line(environment: Environment) -> str:
    return (
        f"{environment.cpu}, {environment.cores} cores, torch threads {environment.torch_threads}, "
        f"device {environment.device}, commit {environment.commit}, {environment.date}\n{environment.versions_text}"
    )


def _ms(value: float | None) -> str:
    """Return three significant digits, no exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
