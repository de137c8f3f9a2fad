"""Choose a solver for a reduced program and say why, in words.

The decision is taken once, on structure and constants. What depends on parameters may only choose between prepared
ways (an item whose Hessian turns out indefinite gets a status, never another algorithm without a word).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from hsbackend.program import IndexArray, MatrixEntries, Program
from hsbackend.reduce import Bounds, Elimination, VaryingElimination
from hsbackend.structure import Group

SolverName = Literal["families", "semismooth_newton", "active_set", "reference", "sparse", "diffcp"]

#: The dense solvers hold (n + rows)^2 numbers; above this the problem belongs to a sparse solver.
DENSE_LIMIT = 8000
#: Programs of n (n + rows) numbers are solved densely up to the first limit, with a positive diagonal Hessian, or the
#: second one; up to the third one where they are named polyhedra, which have algorithms of their own; and where more
#: than this share of the numbers is not zero. Measured on random rows and flows (docs/large-sparse.md).
DIAGONAL_CELLS, SMALL_CELLS, MODERATE_CELLS, SPARSE_SHARE = 150_000, 2_000_000, 50_000_000, 0.05


@dataclass(frozen=True)
class Route:
    """What was recognised and which solver takes it.

    ``str(route)`` is the report a user reads.

    Attributes:
        solver: the solver's name; ``"diffcp"`` when the problem goes back to the default backend.
        reason: one sentence: why this solver, or the first thing that rules the others out.
        notes: what the presolve did, one entry per finding.
        proximal: auxiliary variables without curvature, which the active set handles by proximal steps.
        groups: the independent blocks and their families, for ``solver == "families"``.
    """

    solver: SolverName
    reason: str
    notes: tuple[str, ...] = ()
    proximal: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()

    @property
    def polyhedral(self) -> bool:
        """Whether one of our solvers takes the problem."""
        return self.solver != "diffcp"

    def __str__(self) -> str:
        """Return the report."""
        head = "polyhedral QP" if self.polyhedral else "not handled by hsbackend"
        lines = [f"hsbackend: {head} -> {self.solver}", f"  reason: {self.reason}"]
        lines += [f"  - {note}" for note in self.notes]
        return "\n".join(lines)


def _newton_density(n: int) -> float:
    """Mean squared column count of N up to which Newton beats the active set (measured: docs/performance.md)."""
    return max(4.0, n / 5.0) ** 2


def newton_wins(pattern: Any) -> bool:
    """Whether the semismooth Newton method beats the active set on rows (m, n) of this pattern, H diagonal."""
    counts = np.diff(sp.csc_array(pattern).indptr).astype(np.float64)
    return not len(counts) or float(np.mean(counts**2)) <= _newton_density(len(counts))


def _plural(count: int, singular: str, plural: str | None = None) -> str:
    return f"{count} {singular if count == 1 else (plural or singular + 's')}"


def describe(
    program: Program, steps: list[Elimination], varying: VaryingElimination | None, bounds: Bounds, reduced: Program
) -> list[str]:
    """Say what the presolve found."""
    notes = [f"canonical form: {_plural(program.num_variables, 'variable')}, {_plural(program.num_rows, 'row')}"]
    fixed = sum(len(step.gone) for step in steps if len(step.mentions.targets))
    if fixed:
        notes.append(f"{_plural(fixed, 'epigraph variable')} fixed at {'its' if fixed == 1 else 'their'} limit")
    eliminated = sum(len(step.gone) for step in steps) - fixed
    if eliminated:
        notes.append(f"{_plural(eliminated, 'definitional equality', 'definitional equalities')} removed")
    if varying is not None:
        notes.append(
            f"{_plural(len(varying.gone), 'definitional equality', 'definitional equalities')} "
            "with parameters removed (the Hessian is formed per call)"
        )
    if len(bounds.rows):
        notes.append(
            f"{_plural(len(bounds.rows), 'singleton row')} became bounds on "
            f"{_plural(len(bounds.variables), 'variable')}"
        )
    inequality = int(np.sum(bounds.kept_rows >= reduced.num_equalities))
    notes.append(
        f"{_plural(reduced.num_equalities, 'equality row')} and {_plural(inequality, 'inequality row')} left, "
        f"{_plural(reduced.num_variables, 'variable')}"
    )
    return notes


def _sizes_fit(groups: tuple[Group, ...]) -> bool:
    """Whether every block that has no family is small enough for a dense solver."""
    return all(
        group.family != "general" or group.variables.shape[1] + group.rows.shape[1] <= DENSE_LIMIT for group in groups
    )


def choose(
    reduced: Program,
    rows: MatrixEntries,
    bounds: Bounds,
    diagonal: bool,
    hessian_pattern: Any,
    notes: list[str],
    requested: SolverName | None,
    groups: tuple[Group, ...],
    read: NDArray[np.bool_],
) -> Route:
    """Choose the solver of a reduced program.

    Args:
        reduced: what is left after the eliminations.
        rows: the rows that are not bounds.
        bounds: the bounds.
        diagonal: whether the reduced Hessian is diagonal.
        hessian_pattern: (n, n) boolean scipy matrix of the reduced Hessian's structure.
        notes: findings of the presolve, for the report.
        requested: a solver the caller insists on.
        groups: independent blocks, empty when the program is best left whole.
        read: (n,) variables that are returned, or that define one that is.

    Returns:
        The route; ``"diffcp"`` with the reason when no solver of ours can take the problem.
    """
    n = reduced.num_variables
    curved = np.diff(sp.csr_array(hessian_pattern).indptr) > 0
    flat: IndexArray = np.flatnonzero(~curved).astype(np.int64)
    total = rows.shape[0] + len(bounds.variables)
    loose = bool(np.any(read[flat]))
    if requested in (None, "families") and groups and not loose and _sizes_fit(groups):
        reason = "recognised " + ", ".join(str(group) for group in groups)
        return Route("families", reason, tuple(notes), tuple(flat.tolist()), groups)
    if loose:
        notes = [*notes, f"{_plural(len(flat), 'variable')} without curvature: proximal steps"]
    elif len(flat):
        notes = [*notes, f"{_plural(len(flat), 'epigraph variable')} without curvature: proximal steps"]
    newton_possible = diagonal and not len(flat) and len(bounds.variables) > 0
    if requested == "families":
        return Route(
            "diffcp", "families was requested but no named polyhedron or independent block was found", tuple(notes)
        )
    if requested == "reference" and len(flat):
        return Route("diffcp", "reference was requested but needs curvature in every variable", tuple(notes))
    if requested == "reference":
        return Route("reference", "requested", tuple(notes), tuple(flat.tolist()))
    if requested == "semismooth_newton" and not newton_possible:
        missing = "a diagonal Hessian" if not diagonal else "bounds"
        return Route("diffcp", f"semismooth_newton was requested but needs {missing}", tuple(notes))
    if newton_possible and requested != "active_set" and (newton_wins(rows.pattern()) or requested is not None):
        reason = f"diagonal Hessian, {_plural(len(bounds.variables), 'bounded variable')}, sparse rows"
        return Route("semismooth_newton", reason, tuple(notes))
    if n + total > DENSE_LIMIT:
        return Route(
            "diffcp", f"{n} variables and {total} rows are too many for the dense active-set solver", tuple(notes)
        )
    kind = "diagonal" if diagonal else "dense"
    return Route(
        "active_set", f"{kind} Hessian, {_plural(total, 'row')} and bounds", tuple(notes), tuple(flat.tolist())
    )
