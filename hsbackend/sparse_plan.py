"""A large sparse program prepared for repeated solves: the interface of :mod:`hsbackend.plan`, memory O(nonzeros).

The presolve is the same (:mod:`hsbackend.reduce`), for constant definitions; definitions with parameters stay rows.
What is left is evaluated by its nonzeros; every item of a batch is solved by :mod:`hsbackend.solvers.sparse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from hsbackend import reduce, structure
from hsbackend.plan import Adjoint, Plan, Presolved, Solution, Trail, Turning
from hsbackend.program import AffineMap, FloatArray, IndexArray, MatrixEntries, Program, as_slice
from hsbackend.route import DIAGONAL_CELLS, MODERATE_CELLS, SMALL_CELLS, SPARSE_SHARE, Route, SolverName, describe
from hsbackend.solvers import sparse
from hsbackend.solvers.result import Options
from hsbackend.solvers.warm import WarmStart
from hsbackend.sparse_face import SparseFace, SparseFaces
from hsbackend.sparse_program import SparseValues
from hsbackend.status import Status

#: Definitions of a curved variable by more entries than this stay rows: eliminated they fill the Hessian.
_WIDEST = 30
#: Limits that cross by less, relative to 1 and the limit, cross by rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class _Compressed:
    """A matrix with parametrised entries in compressed row storage; entries of equal places are added in the map.

    Attributes:
        indptr: (rows + 1,) int32.
        indices: (nnz,) int32.
        values: map of the nnz values.
        shape: (rows, columns).
    """

    indptr: IndexArray
    indices: IndexArray
    values: AffineMap
    shape: tuple[int, int]

    @classmethod
    def of(cls, entries: MatrixEntries) -> _Compressed:
        """Sort the structural non-zeros by rows."""
        there = np.flatnonzero(entries.values.varying | (entries.values.offset != 0.0))
        key = entries.rows[there].astype(np.int64) * entries.shape[1] + entries.columns[there]
        places, target = np.unique(key, return_inverse=True)
        add = sp.csr_array((np.ones(len(there)), (target, there)), shape=(len(places), len(entries.rows)))
        rows = places // max(entries.shape[1], 1)
        indptr = np.zeros(entries.shape[0] + 1, dtype=np.int32)
        np.cumsum(np.bincount(rows, minlength=entries.shape[0]), out=indptr[1:])
        values = AffineMap(sp.csc_array(add @ entries.values.matrix), entries.values.parameter_sizes)
        return cls(indptr, (places % max(entries.shape[1], 1)).astype(np.int32), values, entries.shape)  # pyright: ignore[reportArgumentType]

    def matrix(self, values: FloatArray) -> sp.csr_array:
        """Return the matrix with these values."""
        return sp.csr_array((values, self.indices, self.indptr), shape=self.shape)


class SparsePlan:
    """A parametrised program, presolved, for sparse solvers.

    Args:
        program: the program.

    Attributes:
        program: the program.
        route: says ``sparse``, and why.
    """

    route: Route

    def __init__(self, program: Program) -> None:
        """Presolve and compress."""
        self.program = program
        reduced, self._steps = reduce.reduce_constant(program, widest=_WIDEST)
        self._reduced = reduced
        self._bounds = reduce.find_bounds(reduced)
        self._kept_rows = as_slice(self._bounds.kept_rows)
        every = np.arange(reduced.num_variables, dtype=np.int64)
        self._entries = reduce.take_matrix(reduced.matrix, self._bounds.kept_rows, every)
        self._rows = _Compressed.of(self._entries)
        self._quadratic = _Compressed.of(reduced.quadratic)
        self._diagonal = reduce.is_diagonal(reduced.quadratic)
        self._on_diagonal = np.repeat(every, np.diff(self._quadratic.indptr)) if self._diagonal else every[:0]
        #: Whether every variable has curvature of its own.
        self._curved = bool(np.all(np.diff(self._quadratic.indptr) > 0))
        #: The place in the program of the variables of the reduced program.
        self._remaining = np.arange(program.num_variables, dtype=np.int64)
        for step in self._steps:
            self._remaining = self._remaining[step.kept]
        self.route = self._describe()

    def _describe(self) -> Route:
        notes = describe(self.program, self._steps, None, self._bounds, self._reduced)
        nonzeros = len(self._rows.indices)
        cells = max(1, self._rows.shape[0] * self._rows.shape[1])
        size = f"{self._rows.shape[1]} variables, {self._rows.shape[0]} rows"
        density = f"{nonzeros} non-zeros in rows ({100.0 * nonzeros / cells:.2g} %)"
        if self._diagonal and self._curved:
            how = "diagonal Hessian: dual semismooth Newton method, products only"
        else:
            kind = "diagonal Hessian, variables without curvature" if self._diagonal else "sparse Hessian"
            how = f"{kind}: interior-point method with sparse factors"
        return Route("sparse", f"{size}, {density}; {how}", (*notes, "items of a batch are solved one by one"))

    @property
    def cells(self) -> int:
        """Numbers a dense solver would hold per item."""
        return self._rows.shape[1] * (self._rows.shape[0] + self._rows.shape[1])

    @property
    def worthwhile(self) -> bool:
        """Whether the program is better solved by its nonzeros than densely (docs/large-sparse.md)."""
        nonzeros = len(self._rows.indices) + (0 if self._diagonal else len(self._quadratic.indices))
        small = DIAGONAL_CELLS if self._diagonal and self._curved else SMALL_CELLS
        if self.cells <= small or nonzeros > SPARSE_SHARE * self.cells:
            return False
        return self.cells > MODERATE_CELLS or not self._named()

    def _named(self) -> bool:
        """Whether every part of the program is a named polyhedron, which has an algorithm of its own."""
        groups = structure.find_groups(
            self._entries, self._reduced.num_equalities, self._bounds, self._reduced.rhs,
            sp.csr_array(self._reduced.quadratic.pattern()), reduce.free_of_charge(self.program, self._steps),
        )  # fmt: skip
        return bool(groups) and all(group.family != "general" for group in groups)

    def solve(
        self, parameters: Sequence[FloatArray], options: Options, warm: WarmStart | None = None,
        batched: Sequence[bool] | None = None,
    ) -> Solution:  # fmt: skip
        """Solve for a batch of parameter values, as :meth:`hsbackend.plan.Plan.solve` does.

        Args:
            parameters: one contiguous float64 (B, size) or (1, size) array per parameter.
            options: accuracy and what to keep.
            warm: what an earlier solution left; its multipliers are the first guess where the structure fits.
            batched: not used: items never share a factorisation.
        """
        batch = max((values.shape[0] for values in parameters), default=1)
        program, bounds = self.program, self._bounds
        trail, primal_side, row_side = self._presolve(
            -program.linear.evaluate(parameters, batch), program.rhs.evaluate(parameters, batch)
        )
        assert row_side is not None
        lower, upper, lower_slot, upper_slot, crossing = bounds.usable_limits(row_side, _ROUNDING)
        if not self._curved:  # what the eliminations leave of a cost up to rounding is no cost: it may have no limit
            linear = -program.linear.evaluate(parameters, batch)
            largest = np.abs(linear).max(axis=1, keepdims=True, initial=0.0)
            changed = primal_side != linear[:, self._remaining]
            primal_side[changed & (np.abs(primal_side) <= 1e-14 * largest)] = 0.0
        presolved = Presolved(None, None, lower_slot, upper_slot)
        right = np.ascontiguousarray(row_side[:, self._kept_rows])
        quadratic = self._quadratic.values.evaluate(parameters)
        entries = self._rows.values.evaluate(parameters)
        n, m, nb = self._rows.shape[1], self._rows.shape[0], len(bounds.variables)
        primal, rows, signed = np.zeros((batch, n)), np.zeros((batch, m)), np.zeros((batch, nb))
        status, steps = np.zeros(batch, dtype=np.int8), np.zeros(batch, dtype=np.int64)
        faces: list[SparseFace | None] = []
        non_unique = np.zeros(batch, dtype=bool)
        start = None if warm is None or warm.multipliers.shape[1] != m else warm.multipliers
        for b in range(batch):
            values = self._values(quadratic, entries, primal_side[b], right[b], lower[b], upper[b], b)
            guess = None if start is None else start[b if len(start) == batch else 0]
            found = sparse.solve(values, options, start=guess)
            status[b], steps[b] = int(found.status), found.steps
            primal[b], rows[b], signed[b] = found.primal, found.rows, found.bounds[bounds.variables]
            non_unique[b] = found.non_unique and found.status == Status.SOLVED
            solved = found.status == Status.SOLVED
            faces.append(found.face if solved else None)
        conflicts = self._conflicts(status, rows, signed, presolved)
        for b in np.flatnonzero(crossing.any(axis=1)):
            status[b], faces[b] = Status.INFEASIBLE, None
            position = np.flatnonzero(crossing[b])[:1]
            both = (bounds.lower_rows[position, lower_slot[b, position]],
                    bounds.upper_rows[position, upper_slot[b, position]])  # fmt: skip
            conflicts[int(b)] = sorted(self._original_row(int(row[0])) for row in both)
        failed = status != Status.SOLVED
        primal[failed], rows[failed], signed[failed] = 0.0, 0.0, 0.0
        every_row = bounds.spread(
            rows, signed, np.sign(signed).astype(np.int64), lower_slot, upper_slot, self._kept_rows,
            self._reduced.num_rows,
        )  # fmt: skip
        x, nu = self._postsolve(trail, primal, every_row)
        x[failed], nu[failed] = np.nan, np.nan
        sides = np.stack([np.zeros(nb, dtype=np.int64) if face is None else face.bounds[bounds.variables]
                          for face in faces]) if batch else np.zeros((0, nb), dtype=np.int64)  # fmt: skip
        active = np.stack([np.zeros(m, dtype=np.int64) if face is None else face.rows.astype(np.int64)
                           for face in faces]) if batch else np.zeros((0, m), dtype=np.int64)  # fmt: skip
        face = SparseFaces(tuple(faces), active, sides, bounds.variables) if options.keep_face else None
        kept = None
        solved_items = np.flatnonzero(~failed).astype(np.int64)
        if options.keep_warm and len(solved_items):
            kept = WarmStart(
                np.zeros((len(solved_items), 0)), active[solved_items], sides[solved_items], rows[solved_items],
                primal[solved_items], solved_items, batch,
            )  # fmt: skip
        certify = partial(self._certify, tuple(parameters))
        return Solution(x, nu, status, conflicts, steps, face, non_unique, presolved, certify, kept)

    def _values(
        self, quadratic: FloatArray, entries: FloatArray, linear: FloatArray, right: FloatArray, lower: FloatArray,
        upper: FloatArray, item: int,
    ) -> SparseValues:  # fmt: skip
        """Return the numbers of one item of the reduced program."""
        n = self._rows.shape[1]
        own = quadratic[item if len(quadratic) > 1 else 0]
        if self._diagonal:
            hessian = np.zeros(n)
            hessian[self._on_diagonal] = own
        else:
            hessian = self._quadratic.matrix(own)
        low, high = np.full(n, -np.inf), np.full(n, np.inf)
        low[self._bounds.variables], high[self._bounds.variables] = lower, upper
        rows = self._rows.matrix(entries[item if len(entries) > 1 else 0])
        return SparseValues(hessian, linear, rows, self._reduced.num_equalities, right, low, high)

    def adjoint(
        self, solution: Solution, grad_primal: FloatArray, grad_multipliers: FloatArray | None, whole: bool = True
    ) -> Adjoint:
        """Solve the adjoint KKT system on the faces of a solution, as :meth:`hsbackend.plan.Plan.adjoint` does."""
        faces = solution.face
        if not isinstance(faces, SparseFaces):
            raise ValueError("the solution has no face: it was computed with keep_face=False")
        slots = solution.presolved.lower_slot, solution.presolved.upper_slot
        trail, primal_side, row_side = self._presolve(grad_primal, grad_multipliers)
        batch = len(grad_primal)
        rows = np.zeros((batch, self._rows.shape[0]))
        rhs_bounds = np.zeros((batch, len(self._bounds.variables)))
        if row_side is not None:
            rows = np.ascontiguousarray(row_side[:, self._kept_rows])
            rhs_bounds = self._bounds.collect(row_side, faces.active_bounds, *slots)
        kkt = faces.kkt_solve(primal_side, rows, rhs_bounds)
        every_row = self._bounds.spread(
            kkt.rows, kkt.bounds, faces.active_bounds, *slots, self._kept_rows, self._reduced.num_rows
        )
        return Adjoint(*self._postsolve(trail, kkt.primal, every_row))

    def turning(self, solution: Solution, grad_primal: FloatArray) -> Turning | None:
        """Return None: which of several optima is returned is not chosen by norm here (docs/large-sparse.md)."""
        return None

    def _presolve(
        self, rhs_primal: FloatArray, rhs_rows: FloatArray | None
    ) -> tuple[Trail, FloatArray, FloatArray | None]:
        """Carry a right-hand side of the KKT system down to the reduced program; None stands for zeros."""
        trail: Trail = []
        for step in self._steps:
            trail.append((rhs_primal, rhs_rows))
            rhs_primal, rhs_rows = step.presolve(rhs_primal, rhs_rows)
        return trail, np.ascontiguousarray(rhs_primal), rhs_rows

    def _postsolve(self, trail: Trail, primal: FloatArray, multipliers: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Carry a solution of the reduced KKT system back up."""
        for step, (rhs_primal, rhs_rows) in zip(reversed(self._steps), reversed(trail), strict=True):
            primal, found = step.postsolve(primal, multipliers, rhs_primal, rhs_rows)
            assert found is not None
            multipliers = found
        return primal, multipliers

    def _conflicts(
        self, status: NDArray[np.int8], rows: FloatArray, signed: FloatArray, presolved: Presolved
    ) -> dict[int, list[int]]:
        """Name the program rows whose Farkas combination shows an item infeasible."""
        found: dict[int, list[int]] = {}
        slots = presolved.lower_slot, presolved.upper_slot
        for item in np.flatnonzero(status == Status.INFEASIBLE):
            pick = slice(int(item), int(item) + 1)
            combined = self._bounds.spread(
                rows[pick], signed[pick], np.sign(signed[pick]).astype(np.int64), slots[0][pick], slots[1][pick],
                self._kept_rows, self._reduced.num_rows,
            )[0]  # fmt: skip
            index = np.flatnonzero(np.abs(combined) > 1e-9 * max(1.0, float(np.abs(combined).max(initial=0.0))))
            found[int(item)] = [self._original_row(int(row)) for row in index]
        return found

    def _original_row(self, row: int) -> int:
        """Map a row of the reduced program to a row of the program."""
        for step in reversed(self._steps):
            row = int(step.kept_rows[row])
        return row

    def _certify(self, parameters: Sequence[FloatArray], item: int, status: Status) -> FloatArray | None:
        """Solve one item again for its certificate in the rows of the whole program."""
        own = [values[item if len(values) > 1 else 0][None] for values in parameters]
        program = self.program
        matrix, quadratic = _Compressed.of(program.matrix), _Compressed.of(program.quadratic)
        n = program.num_variables
        values = SparseValues(
            quadratic.matrix(quadratic.values.evaluate(own)[0]), -program.linear.evaluate(own, 1)[0],
            matrix.matrix(matrix.values.evaluate(own)[0]), program.num_equalities, program.rhs.evaluate(own, 1)[0],
            np.full(n, -np.inf), np.full(n, np.inf),
        )  # fmt: skip
        found = sparse.solve(values, Options())
        if found.status != status:
            return None
        return found.rows if status == Status.INFEASIBLE else found.ray


def prepare(program: Program, solver: SolverName | None = None) -> Plan | SparsePlan:
    """Prepare a program densely or by its nonzeros, whichever suits its size and density.

    Args:
        program: the program.
        solver: a solver the caller insists on, ``"sparse"`` among them, or None to choose.
    """
    if solver == "sparse":
        return SparsePlan(program)
    if solver is None and program.num_variables * (program.num_variables + program.num_rows) > DIAGONAL_CELLS:
        plan = SparsePlan(program)
        if plan.worthwhile:
            return plan
    return Plan(program, solver)
