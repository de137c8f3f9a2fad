"""Solve independent blocks apart: families by their own algorithms, the rest by the general solvers.

Items a family cannot solve (infeasible ones, first of all) are solved again as a whole by the active set, which can say
why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from hsbackend.face import BlockFace, FacePart, KKTSolution
from hsbackend.program import FloatArray, IndexArray, QPValues
from hsbackend.route import newton_wins
from hsbackend.solvers import active_set, least_norm, semismooth_newton
from hsbackend.solvers._places import Columns, Structure, merge_status
from hsbackend.solvers.family_blocks import BudgetBlocks, L1Blocks, MonotoneBlocks, TransportBlocks
from hsbackend.solvers.result import Options, Result
from hsbackend.status import Status
from hsbackend.structure import Group


class _Part(Protocol):
    """A group prepared for repeated solves."""

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        """Fill in the group's places of a result (status: where the group fails) and return its part of the face."""
        ...


class _General:
    """Alike blocks without a family: a batch for one of the general solvers."""

    def __init__(self, group: Group, structure: Structure) -> None:
        self.columns = Columns(group, structure.num_variables, structure.bounded, structure.limits)
        self.rows = group.rows[:, :, 0]
        self.num_equalities = int(np.sum(self.rows[0] < structure.num_equalities)) if self.rows.size else 0
        local = {int(j): i for i, j in enumerate(group.variables[0])}
        self.bounded = np.array([local[int(j)] for j in structure.bounded if int(j) in local], dtype=np.int64)
        self._bounded_at = np.array(
            [
                [int(np.searchsorted(structure.bounded, j)) for j in variables[self.bounded]]
                for variables in group.variables
            ],
            dtype=np.int64,
        ).reshape(group.count, -1)
        self.proximal = np.array([i for i, j in enumerate(group.variables[0]) if structure.flat[j]], dtype=np.int64)
        self.variables = group.variables
        pattern = structure.pattern[self.rows[0]][:, group.variables[0]]
        diagonal = structure.diagonal and not len(self.proximal)
        self.newton: semismooth_newton.NewtonSetup | None = None
        if diagonal and len(self.bounded) and newton_wins(pattern):
            self.newton = semismooth_newton.NewtonSetup(pattern, self.bounded)
        self._constant = structure.constant_matrices
        self._gram: active_set.GramSetup | None = None

    def _values(self, values: QPValues) -> QPValues:
        count, n = self.variables.shape
        m = self.rows.shape[1]

        def fold(picked: FloatArray, trailing: tuple[int, ...]) -> FloatArray:
            """Fold (1 or B, G, ...) into (1 or B G, ...)."""
            if picked.shape[0] == 1 and (values.batch != 1 or values.shared):
                if count == 1 or bool(np.all(picked[0] == picked[0, 0])):
                    return np.ascontiguousarray(picked[:, 0])
                picked = np.broadcast_to(picked, (values.batch, *picked.shape[1:]))
            return np.ascontiguousarray(picked).reshape(picked.shape[0] * count, *trailing)

        variables = self.variables
        if values.diagonal:
            hessian = fold(values.hessian[:, variables], (n,))
        else:
            hessian = fold(values.hessian[:, variables[:, :, None], variables[:, None, :]], (n, n))
        rows = fold(values.rows[:, self.rows[:, :, None], variables[:, None, :]], (m, n))
        batch = values.batch * count
        return QPValues(
            hessian, self.columns.take(values.rhs_primal), rows, self.num_equalities,
            np.ascontiguousarray(values.rhs_rows[:, self.rows.ravel()]).reshape(batch, m), self.bounded,
            np.ascontiguousarray(values.lower[:, self._bounded_at.ravel()]).reshape(batch, -1),
            np.ascontiguousarray(values.upper[:, self._bounded_at.ravel()]).reshape(batch, -1), self.proximal,
            values.shared,
        )  # fmt: skip

    def solve(self, values: QPValues, options: Options, result: Result) -> FacePart:
        own = self._values(values)

        def gram() -> active_set.GramSetup | None:
            if not (self._constant and own.shared):
                return None
            if self._gram is None:
                self._gram = active_set.GramSetup(
                    own.hessian, own.rows, self.num_equalities, self.bounded, self.proximal
                )
            return self._gram

        if self.newton is not None:
            found = semismooth_newton.solve(own, options, self.newton, False, gram)
        else:
            found = active_set.verify(own, options, active_set.solve(own, options, gram()))
        found = least_norm.refine(own, options, found)
        count = self.columns.count
        merge_status(found.status, result)
        at = self._bounded_at.ravel()
        self.columns.put(found.primal, result.primal)
        result.rows[:, self.rows.ravel()] = found.rows.reshape(values.batch, -1)
        result.bounds[:, at] = found.bounds.reshape(values.batch, -1)
        face = found.face

        def kkt(g: FloatArray, r: FloatArray, r_bounds: FloatArray, out: KKTSolution) -> None:
            batch = g.shape[0]
            assert face is not None
            solved = face.kkt_solve(
                self.columns.take(g),
                np.ascontiguousarray(r[:, self.rows.ravel()]).reshape(batch * count, -1),
                np.ascontiguousarray(r_bounds[:, at]).reshape(batch * count, -1),
            )
            self.columns.put(solved.primal, out.primal)
            out.rows[:, self.rows.ravel()] = solved.rows.reshape(batch, -1)
            out.bounds[:, at] = solved.bounds.reshape(batch, -1)

        def sides(row_sides: IndexArray, bound_sides: IndexArray) -> None:
            assert face is not None
            row_sides[:, self.rows.ravel()] = face.active_rows.reshape(values.batch, -1)
            bound_sides[:, at] = face.active_bounds.reshape(values.batch, -1)

        return FacePart(kkt, sides)


_ADAPTORS: dict[str, Callable[[Group, Structure], _Part]] = {
    "budget": BudgetBlocks,
    "monotone": MonotoneBlocks,
    "transport": TransportBlocks,
    "l1": L1Blocks,
    "general": _General,
}


class BlockSetup:
    """The groups of a program, prepared for repeated solves.

    Args:
        groups: from :func:`hsbackend.structure.find_groups`.
        structure: the reduced program's constants.
    """

    def __init__(self, groups: tuple[Group, ...], structure: Structure) -> None:
        """Prepare every group."""
        self.parts: list[_Part] = [_ADAPTORS[group.family](group, structure) for group in groups]


def solve(
    values: QPValues,
    options: Options,
    setup: BlockSetup,
    gram_setup: Callable[[], active_set.GramSetup | None],
) -> Result:
    """Solve a batch block by block.

    Args:
        values: the problems.
        options: tolerances and what to keep.
        setup: the prepared groups.
        gram_setup: gives the active set's constant data when an item has to be solved as a whole.
    """
    batch, n = values.batch, values.num_variables
    m = values.rhs_rows.shape[1]
    result = Result(
        np.empty((batch, n)), np.zeros((batch, m)), np.zeros((batch, len(values.bounded))),
        np.zeros(batch, dtype=np.int8), np.ones(batch, dtype=np.int64), None,
    )  # fmt: skip
    parts = [part.solve(values, options, result) for part in setup.parts]
    # A family may take -inf for "not this one"; in a program it is a cost without an optimum.
    result.status[~np.isfinite(values.rhs_primal).all(axis=1)] = Status.INVALID_INPUT
    if options.keep_face:
        result = replace(result, face=BlockFace((batch, n, m, len(values.bounded)), parts))
    return active_set.finish(values, options, result, gram_setup)
