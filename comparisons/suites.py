"""Which contestants meet in which suite."""

from __future__ import annotations

from hsbackend.comparisons.contestants import Contestant, all_contestants
from hsbackend.comparisons.projections import projection_contestants

# What the report of a suite is called, on disk and in its first line.
TITLES: dict[str, str] = {"speed": "Speed comparison", "families": "Speed comparison: named polyhedra"}


def every_contestant(accuracy: float) -> tuple[Contestant, ...]:
    """Return those that can be asked for by name: floors, specialised peers, general peers, ours."""
    everybody = (*projection_contestants(accuracy), *all_contestants(accuracy))
    return (*(c for c in everybody if not c.is_ours), *(c for c in everybody if c.is_ours))


def suite_contestants(suite: str, accuracy: float) -> tuple[Contestant, ...]:
    """Return the contestants of a suite: in `speed` those that solve every problem, in `families` all."""
    return every_contestant(accuracy) if suite == "families" else all_contestants(accuracy)
