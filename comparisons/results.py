"""Rows of a comparison, and the ratios between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hsbackend.comparisons.contestants import Kind
from hsbackend.comparisons.judge import Grade, Verdict
from hsbackend.comparisons.timing import Timing


@dataclass(frozen=True)
class Row:
    """One contestant on one problem.

    A contestant that failed keeps its row: `error` says why, and whatever was not reached is None. `setup_ms` is
    building the layer, `first_call_ms` the first forward and backward, with everything that happens lazily or is
    compiled then. `notes` are the warnings it raised, `route` is what a layer of ours says about its choice of solver.
    A floor has a time but no verdict.
    """

    problem: str
    contestant: str
    is_ours: bool
    is_diffcp: bool
    kind: Kind = Kind.GENERAL
    verdict: Verdict | None = None
    timing: Timing | None = None
    setup_ms: float | None = None
    first_call_ms: float | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()
    route: str | None = None

    @property
    def outcome(self) -> str:
        """The grade, "failed", or "floor"."""
        if self.error is not None:
            return "failed"
        if self.kind is Kind.FLOOR:
            return "floor"
        return "failed" if self.verdict is None else self.verdict.grade.value

    @property
    def total_ms(self) -> float | None:
        """Median of forward plus backward."""
        return None if self.timing is None else self.timing.total.median_ms

    @property
    def counts(self) -> bool:
        """Whether its time may be compared: a wrong answer has no speed.

        Peers may be rough, which can only favour them; ours must be correct.
        """
        if self.verdict is None or self.timing is None or self.error is not None:
            return False
        allowed = (Grade.CORRECT,) if self.is_ours else (Grade.CORRECT, Grade.ROUGH)
        return self.verdict.grade in allowed


def best_peer(rows: Sequence[Row]) -> Row | None:
    """Return the fastest peer that counts among rows of one problem."""
    return fastest([row for row in rows if not row.is_ours])


def diffcp_yardstick(rows: Sequence[Row]) -> Row | None:
    """Return stock DIFFCP as shipped if it counts, else the fastest DIFFCP setting that does."""
    candidates = [row for row in rows if row.is_diffcp]
    as_shipped = [row for row in candidates if row.contestant == "diffcp"]
    return fastest(as_shipped) or fastest(candidates)


def fastest(rows: Sequence[Row]) -> Row | None:
    """Return the fastest row that counts."""
    return min((row for row in rows if row.counts), key=lambda row: row.total_ms or 0.0, default=None)


def speed_up(row: Row, yardstick: Row | None) -> float | None:
    """Return how many times faster `row` is than `yardstick`; None when either does not count."""
    if yardstick is None or not row.counts or not row.total_ms or not yardstick.total_ms:
        return None
    return yardstick.total_ms / row.total_ms
