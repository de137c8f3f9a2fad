"""A program prepared for repeated solves: presolve, route, solver state, postsolve.

``Plan`` is the whole way of the data, once: parameters -> program values -> reduced values -> solver -> postsolve.
The adjoint goes the same way with another right-hand side, because the solution and the adjoint solve the same KKT
system (:mod:`hsbackend.face`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from hsbackend import certificates, reduce, structure
from hsbackend.batched import matvec, vecmat, weighted_gram
from hsbackend.face import Face, LeastNormFace, MixedFace
from hsbackend.program import FloatArray, IndexArray, Program, QPValues, as_slice
from hsbackend.route import DENSE_LIMIT, Route, SolverName, choose, describe
from hsbackend.solvers import (
    active_set,
    blocks,
    compiled_interior,
    interior_point,
    least_norm,
    reference,
    semidefinite,
    semismooth_newton,
)  # fmt: skip
from hsbackend.solvers._places import Limits, Structure
from hsbackend.solvers.result import Options, Result
from hsbackend.solvers.warm import WarmStart
from hsbackend.sparse_face import SparseFaces
from hsbackend.status import Status

#: Multiply-adds of a Gram matrix from which on the interior-point method is faster, without and with proximal steps
#: (docs/performance.md).
_GRAM_WORK = 5e9, 3e8
#: Seconds of a step of the dense interior-point method: of itself, and per multiply-add.
_DENSE_STEP = 1e-4, 1e-10
#: Seconds per multiply-add of the Gram matrix, and steps of the compiled interior-point method that it is weighed
#: against.
_GRAM_SECONDS, _STEPS = 3e-10, 20
#: Proximal steps of the active set cost seconds of themselves, and this many times the Gram matrix.
_PROXIMAL = 1.5e-4, 3.0
#: Residual, relative to the tolerance, above which a solved item is asked whether it has no optimum; and what counts as
#: zero in a certificate that overrules a point that keeps the tolerance.
_POOR, _STRICT = 1e-3, 1e-14


@dataclass
class Solution:
    """Solutions of a batch of programs.

    Attributes:
        primal: (B, n) x, NaN where an item is not solved.
        multipliers: (B, m) nu with ``Q x + q + A'nu = 0``, NaN where an item is not solved; (B, 0) when they were not
            asked for.
        status: (B,) int8 codes of :class:`~hsbackend.status.Status`.
        conflicts: for infeasible items, the rows that cannot hold together.
        steps: (B,) iterations of the solver.
        face: None when no derivative was asked for.
        non_unique: (B,) whether the item has other optima; the one of least norm is returned (docs/theory.md).
        warm: what the next solve may start from, if ``options.keep_warm``.
    """

    primal: FloatArray
    multipliers: FloatArray
    status: NDArray[np.int8]
    conflicts: dict[int, list[int]]
    steps: IndexArray
    face: Face | SparseFaces | None
    non_unique: NDArray[np.bool_]
    presolved: Presolved = field(repr=False)
    certify: Callable[[int, Status], FloatArray | None] = field(repr=False)
    warm: WarmStart | None = field(repr=False, default=None)

    @cached_property
    def certificates(self) -> dict[int, FloatArray]:
        """Why items have no solution, found when asked for (:mod:`hsbackend.certificates`).

        For an INFEASIBLE item (m,) multipliers on the rows of the program, for an UNBOUNDED one (n,) a ray in its
        variables. Items without an entry have another status, or no certificate that passes the check.
        """
        found: dict[int, FloatArray] = {}
        for item in np.flatnonzero(np.isin(self.status, [Status.INFEASIBLE, Status.UNBOUNDED])):
            certificate = self.certify(int(item), Status(int(self.status[item])))
            if certificate is not None:
                found[int(item)] = certificate
        return found


#: Right-hand sides of the KKT system at every level of the presolve; None stands for zeros.
Trail = list[tuple[FloatArray, "FloatArray | None"]]


@dataclass(frozen=True)
class Presolved:
    """What the adjoint needs again: values of the last elimination and which row set each bound."""

    definitions: FloatArray | None
    curvature: FloatArray | None
    lower_slot: IndexArray
    upper_slot: IndexArray


@dataclass(frozen=True)
class Adjoint:
    """Solution (u, w) of the adjoint KKT system in the variables and rows of the program.

    Attributes:
        primal: (B, n) u.
        rows: (B, m) w.
    """

    primal: FloatArray
    rows: FloatArray


@dataclass(frozen=True)
class Turning:
    """How the optimum of least norm moves along the set of optima when Q and A change (docs/theory.md, section 10).

    With O the projector onto the directions in which nothing holds the optimum, orthogonal in the variables whose norm
    selects, M the mask of these and ``(c_x, c_w)`` the solution of the KKT system on the face with right-hand side
    ``(M x, 0)``, the movement is ``O (Q'c_x + A''c_w)``.

    Attributes:
        items: (k,) the items whose solution turns.
        along: (k, n) ``O g`` for a cotangent g of the primal.
        primal: (k, n) c_x.
        rows: (k, m) c_w.
    """

    items: IndexArray
    along: FloatArray
    primal: FloatArray
    rows: FloatArray


class Plan:
    """A parametrised program, presolved and routed, with everything constant already factored.

    Args:
        program: the program.
        solver: a solver the caller insists on, or None to choose by structure.

    Attributes:
        route: what was recognised and which solver takes it; ``route.polyhedral`` is False when none can.
    """

    route: Route

    def __init__(self, program: Program, solver: SolverName | None = None) -> None:
        """Presolve, route, factor."""
        self.program = program
        self._requested: SolverName | None = solver
        self._set_up()
        if self._semidefinite and np.count_nonzero(self._reduced.outputs) < np.count_nonzero(program.outputs):
            # The selection among several optima is by the norm of what is returned: all of it has to be there.
            self._set_up(keep_outputs=True)

    def _set_up(self, keep_outputs: bool = False) -> None:
        program, solver = self.program, self._requested
        reduced, self._steps = reduce.reduce_constant(program, keep_outputs)
        self._varying = reduce.eliminate_varying(reduced, keep_outputs)
        if self._varying is not None:
            reduced = self._varying.remaining
        self._reduced = reduced
        self._bounds = reduce.find_bounds(reduced)
        every = np.arange(reduced.num_variables, dtype=np.int64)
        self._rows = reduce.take_matrix(reduced.matrix, self._bounds.kept_rows, every)
        pattern = sp.csr_array(reduced.quadratic.pattern())
        if self._varying is None:
            self._diagonal = reduce.is_diagonal(reduced.quadratic)
        else:
            self._diagonal = self._varying.diagonal
            definitions = sp.csr_array(self._varying.definitions.pattern()).astype(np.float64)
            flat = self._varying.curvature.varying | (self._varying.curvature.offset != 0.0)
            pattern = sp.csr_array(pattern.astype(np.float64) + definitions[flat].T @ definitions[flat])
        notes = describe(program, self._steps, self._varying, self._bounds, reduced)
        groups = structure.find_groups(
            self._rows,
            reduced.num_equalities,
            self._bounds,
            reduced.rhs,
            pattern,
            reduce.free_of_charge(program, self._steps, self._varying),
        )
        self._seen = reduce.read_variables(program, self._steps, self._varying)
        self._remaining = self._left()
        self._selecting = self._remaining[self._seen]
        self.route = choose(
            reduced, self._rows, self._bounds, self._diagonal, pattern, notes, solver, groups, self._seen
        )
        self._proximal = np.array(self.route.proximal, dtype=np.int64)
        self._constant_hessian = self._varying is None and reduced.quadratic.constant
        if self._varying is not None:
            self._constant_hessian = (
                reduced.quadratic.constant and self._varying.definitions.constant and self._varying.curvature.constant
            )
        self._constant_rows = self._rows.constant
        matrices = [reduced.quadratic.values, self._rows.values]
        if self._varying is not None:
            matrices += [self._varying.definitions.values, self._varying.curvature]
        #: Parameters that enter the Hessian or the rows.
        self._matrix_parameters = frozenset(index for part in matrices for index in part.blocks)
        self._gram: active_set.GramSetup | None = None
        self._semidefinite = self.route.polyhedral and bool(np.any(self._seen[self._proximal]))
        self._flat = self._proximal
        self._semidefinite_setup: semidefinite.SemidefiniteSetup | None = None
        self._newton: semismooth_newton.NewtonSetup | None = None
        self._blocks: blocks.BlockSetup | None = None
        self._patterns = compiled_interior.Setups()
        self._fixed_limits: tuple[FloatArray, FloatArray, IndexArray, IndexArray] | None = None
        self._kept_rows = as_slice(self._bounds.kept_rows)
        fixed = any(len(step.mentions.targets) for step in self._steps)
        self._bounds_move = fixed or bool(reduced.rhs.varying[self._bounds.rows].any())
        self._fixed_hessian: FloatArray | None = None
        self._fixed_rows: FloatArray | None = None
        if self.route.polyhedral:
            self._prepare()

    def _prepare(self) -> None:
        """Evaluate and factor what is constant; find a Hessian that is singular for good."""
        none: list[FloatArray] = [np.zeros((1, size)) for size in self.program.parameter_sizes]
        if self._constant_rows:
            self._fixed_rows = self._rows.dense(none)
        if self._constant_hessian:
            self._fixed_hessian = self._hessian(none)
            curved = np.setdiff1d(np.arange(self._reduced.num_variables), self._proximal)
            if self._diagonal and np.any(self._fixed_hessian < 0.0):
                self._refuse("the Hessian has a negative diagonal entry")
                return
            if self._diagonal and not np.all(self._fixed_hessian[:, curved] > 0.0):
                self._semidefinite = True
        if self._semidefinite:
            self._prepare_semidefinite()
        elif self.route.solver == "semismooth_newton":
            self._newton = semismooth_newton.NewtonSetup(self._rows.pattern(), self._bounds.variables)
        elif self.route.groups and all(group.family != "general" for group in self.route.groups):
            self._blocks = self._block_setup()
        elif (
            self._constant_hessian
            and self._constant_rows
            and (self._gram_setup() is None or not self._curved_beside_the_flat())
        ):
            self._prepare_semidefinite()
        elif self.route.groups:
            self._blocks = self._block_setup()

    def _left(self) -> IndexArray:
        """Return the place in the program of the variables of the reduced program."""
        left = np.arange(self.program.num_variables, dtype=np.int64)
        for step in self._steps:
            left = left[step.kept]
        return left if self._varying is None else left[self._varying.kept]

    def _curved_beside_the_flat(self) -> bool:
        """Whether a constant Hessian is positive definite on the variables without proximal steps, if there are any."""
        if not len(self._proximal) or self._diagonal or self._fixed_hessian is None:
            return True
        curved = np.setdiff1d(np.arange(self._reduced.num_variables), self._proximal)
        block = self._fixed_hessian[0][np.ix_(curved, curved)]
        return bool(np.linalg.eigvalsh(block)[0] > 1e-12 * np.abs(np.diag(block)).max())

    def _prepare_semidefinite(self) -> None:
        """Take the way of linear programs and semidefinite Hessians."""
        route = self.route
        if route.solver == "reference":
            return self._refuse("reference was requested but needs a positive definite Hessian")
        if route.solver == "semismooth_newton" and self._requested is not None:
            return self._refuse("semismooth_newton was requested but needs curvature in every variable")
        if self._too_large:
            return self._refuse("the Hessian is singular and the problem too large for the dense active-set solver")
        if self._fixed_hessian is not None and self._fixed_rows is not None:
            setup = semidefinite.SemidefiniteSetup(
                self._fixed_hessian, self._fixed_rows, self._reduced.num_equalities, self._bounds.variables, self._flat
            )
            if not setup.convex:
                return self._refuse("the Hessian has negative curvature")
            self._semidefinite_setup = setup
        self._semidefinite = True
        zero = len(self._flat) == self._reduced.num_variables
        kind = "linear program" if zero else "semidefinite Hessian"
        notes = [note for note in route.notes if "epigraph variable" not in note or "fixed" in note]
        notes.append("proximal steps; where the optimum is not unique, the one of least norm")
        reason = f"{kind}, {self._rows.shape[0] + len(self._bounds.variables)} rows and bounds"
        self.route = Route("active_set", reason, tuple(notes), route.proximal)

    def _block_setup(self) -> blocks.BlockSetup:
        """Collect what the independent blocks share between calls."""
        rhs = self._reduced.rhs
        found = self._bounds.limits(rhs.offset[None])
        lower, upper = found[:2]

        def varies(rows: IndexArray) -> NDArray[np.bool_]:
            return np.any((rows >= 0) & rhs.varying[np.maximum(rows, 0)], axis=1)

        limits = Limits(lower[0], upper[0], varies(self._bounds.lower_rows), varies(self._bounds.upper_rows))
        if not limits.lower_varies.any() and not limits.upper_varies.any() and np.all(lower <= upper):
            self._fixed_limits = found
        flat = np.zeros(self._reduced.num_variables, dtype=bool)
        flat[self._proximal] = True
        kept = self._bounds.kept_rows
        return blocks.BlockSetup(
            self.route.groups,
            Structure(
                self._reduced.num_variables, self._reduced.num_equalities, self._bounds.variables, limits,
                rhs.varying[kept], rhs.offset[kept], sp.csr_array(self._rows.pattern()), self._diagonal, flat,
                self._constant_hessian and self._constant_rows,
            ),
        )  # fmt: skip

    def _refuse(self, reason: str) -> None:
        self.route = Route("diffcp", reason, self.route.notes)

    def _gram_setup(self) -> active_set.GramSetup | None:
        """Return the constant data of the active set, made when first needed; None where data vary or H is singular."""
        if self._gram is None and self._fixed_hessian is not None and self._fixed_rows is not None:
            self._gram = active_set.GramSetup(
                self._fixed_hessian, self._fixed_rows, self._reduced.num_equalities, self._bounds.variables,
                self._proximal,
            )  # fmt: skip
        return self._gram if self._gram is not None and self._gram.metric.convex else None

    def _hessian(
        self, parameters: Sequence[FloatArray], definitions: FloatArray | None = None,
        curvature: FloatArray | None = None,
    ) -> FloatArray:  # fmt: skip
        """Evaluate the reduced Hessian, (1 or B, n, n) or its diagonal (1 or B, n)."""
        base = self._reduced.quadratic.dense(parameters)
        if self._varying is None:
            return np.ascontiguousarray(np.einsum("bii->bi", base)) if self._diagonal else base
        if definitions is None or curvature is None:
            definitions = self._varying.definitions.dense(parameters)
            curvature = self._varying.curvature.evaluate(parameters)
        if self._diagonal:
            diagonal = np.einsum("bii->bi", base) + np.einsum("bk,bkn->bn", curvature, definitions**2)
            return np.ascontiguousarray(diagonal)
        return weighted_gram(definitions, curvature, base)

    def _given_once(self, batched: Sequence[bool]) -> bool:
        """Whether one Hessian and one set of rows were given for all items; nothing batched is an item alone."""
        return not self._matrix_parameters or (
            any(batched) and not any(batched[index] for index in self._matrix_parameters)
        )

    def solve(
        self, parameters: Sequence[FloatArray], options: Options, warm: WarmStart | None = None,
        batched: Sequence[bool] | None = None,
    ) -> Solution:  # fmt: skip
        """Solve for a batch of parameter values.

        Args:
            parameters: one contiguous float64 (B, size) or (1, size) array per parameter.
            options: accuracy and what to keep.
            warm: what an earlier solution left; ignored where its structure does not fit.
            batched: which parameters are given per item, by default all with B rows. In a batch of one only the caller
                can tell; the item has the bits it has in a larger batch when it is the same parameters.
        """
        batch = max((values.shape[0] for values in parameters), default=1)
        program = self.program
        rhs_primal = -program.linear.evaluate(parameters, batch)
        rhs_rows = program.rhs.evaluate(parameters, batch)
        definitions = curvature = None
        if self._varying is not None:
            definitions = self._varying.definitions.dense(parameters)
            curvature = self._varying.curvature.evaluate(parameters)
        trail, primal_side, row_side = self._presolve(rhs_primal, rhs_rows, definitions, curvature)
        assert row_side is not None
        if self._semidefinite:  # what the eliminations leave of a cost up to rounding is no cost: it may have no limit
            largest = np.abs(rhs_primal).max(axis=1, keepdims=True, initial=0.0)
            changed = primal_side != rhs_primal[:, self._remaining]
            primal_side[changed & (np.abs(primal_side) <= 1e-14 * largest)] = 0.0
        hessian = self._fixed_hessian
        if hessian is None:
            hessian = self._hessian(parameters, definitions, curvature)
        rows = self._fixed_rows if self._fixed_rows is not None else self._rows.dense(parameters)
        lower, upper, lower_slot, upper_slot, crossing = self._limits(row_side)
        values = QPValues(
            hessian, primal_side, rows, self._reduced.num_equalities,
            np.ascontiguousarray(row_side[:, self._kept_rows]), self._bounds.variables, lower, upper, self._proximal,
            self._given_once([len(each) == batch and (not batched or batched[i]) for i, each in enumerate(parameters)]),
        )  # fmt: skip
        asked, merged = options.multipliers, self._merged(row_side, lower, upper)
        if merged.any():  # the check of these items needs them
            options = replace(options, multipliers=True)
        result = self._run(values, options, warm)
        if not self._semidefinite:
            result = self._run_again(values, options, result)
        if self.route.solver != "reference":
            result = least_norm.refine(values, options, result, self._seen)
        warm = WarmStart.of(values, result) if options.keep_warm else None
        presolved = Presolved(definitions, curvature, lower_slot, upper_slot)
        conflicts = self._conflicts(result, presolved)
        for item in np.flatnonzero(crossing.any(axis=1)):
            result.status[item] = Status.INFEASIBLE
            position = np.flatnonzero(crossing[item])[:1]
            both = (self._bounds.lower_rows[position, lower_slot[item, position]],
                    self._bounds.upper_rows[position, upper_slot[item, position]])  # fmt: skip
            conflicts[int(item)] = sorted(self._original_row(int(row[0])) for row in both)
        failed = result.status != Status.SOLVED
        if failed.any():
            result.primal[failed] = 0.0
            result.rows[failed] = 0.0
            result.bounds[failed] = 0.0
        delicate = merged & ~failed
        if result.delicate is not None:
            delicate |= result.delicate & ~failed
        row_multipliers = None
        if options.multipliers or delicate.any():
            side = np.sign(result.bounds).astype(np.int64)
            row_multipliers = self._spread_bounds(result.rows, result.bounds, side, presolved)
        primal, multipliers = self._postsolve(trail, result.primal, row_multipliers, definitions, curvature)
        multipliers = np.zeros((batch, 0)) if multipliers is None else multipliers
        suspects = self._review(parameters, options, np.flatnonzero(delicate), primal, multipliers, result.status)
        for item in np.flatnonzero(result.status == Status.NOT_CONVERGED):
            self._explain(parameters, int(item), result.status, conflicts)
        for item in suspects:
            self._explain(parameters, int(item), result.status, conflicts, _STRICT)
        if not asked:
            multipliers = np.zeros((batch, 0))
        failed = result.status != Status.SOLVED
        if failed.any():
            primal[failed] = np.nan
            multipliers[failed] = np.nan
        non_unique = np.zeros(batch, dtype=bool)
        if result.non_unique is not None:
            non_unique = result.non_unique & (result.status == Status.SOLVED)
        return Solution(
            primal, multipliers, result.status, conflicts, result.steps, result.face, non_unique, presolved,
            partial(self._certify, tuple(parameters)), warm,
        )  # fmt: skip

    def _merged(self, row_side: FloatArray, lower: FloatArray, upper: FloatArray) -> NDArray[np.bool_]:
        """Return (B,) which items have limits that cross by so little that it may be rounding."""
        if self._fixed_limits is not None or not (lower == upper).any():
            return np.zeros(len(lower), dtype=bool)
        low, high = self._bounds.limits(row_side)[:2]
        return np.asarray((low > high).any(axis=1))

    def _review(
        self, parameters: Sequence[FloatArray], options: Options, items: IndexArray, primal: FloatArray,
        multipliers: FloatArray, status: NDArray[np.int8],
    ) -> IndexArray:  # fmt: skip
        """Check some solved items in the data of the whole program, in their own units.

        Those that miss the tolerance become NOT_CONVERGED.

        Returns:
            The items that keep it, but might do so although there is no optimum: those that a solver cannot bring down
            to rounding, or whose numbers are large beside what they do to the data.
        """
        if not len(items):
            return items
        program = self.program
        own = [values if len(values) == 1 else np.ascontiguousarray(values[items]) for values in parameters]
        count, bounds = len(items), np.zeros((len(items), 0))
        values = QPValues(
            program.quadratic.dense(own), -program.linear.evaluate(own, count), program.matrix.dense(own),
            program.num_equalities, program.rhs.evaluate(own, count), np.zeros(0, dtype=np.int64), bounds, bounds,
            np.zeros(0, dtype=np.int64),
        )  # fmt: skip
        point, rows = np.ascontiguousarray(primal[items]), np.ascontiguousarray(multipliers[items])
        residual = active_set.residuals(values, point, rows, bounds)[2]
        kept = residual <= options.tolerance
        status[items[~kept]] = Status.NOT_CONVERGED
        doubtful = residual > _POOR * options.tolerance
        doubtful |= semidefinite.runs_away(values, point, rows, bounds)
        return items[kept & doubtful]

    def _explain(
        self, parameters: Sequence[FloatArray], item: int, status: NDArray[np.int8], conflicts: dict[int, list[int]],
        zero: float | None = None,
    ) -> None:  # fmt: skip
        """Look for a certificate where the solvers found neither a solution nor a reason why there is none.

        Args:
            parameters: of the program.
            item: which item.
            status: of all items, overwritten where there is a certificate.
            conflicts: the rows that cannot hold together, filled where there is one.
            zero: what counts as zero in a certificate, relative to the terms of a sum.
        """
        if self._requested == "reference":
            return
        for reason in (Status.INFEASIBLE, Status.UNBOUNDED):
            found = self._certify(parameters, item, reason, zero)
            if found is not None:
                status[item] = reason
                if reason == Status.INFEASIBLE:
                    conflicts[item] = [int(row) for row in np.flatnonzero(found)]
                return

    def _certify(
        self, parameters: Sequence[FloatArray], item: int, status: Status, zero: float | None = None
    ) -> FloatArray | None:
        """Find a certificate of one item from the data of the whole program."""
        exact = {} if zero is None else {"zero": zero}
        own = [values[item if len(values) > 1 else 0][None] for values in parameters]
        program = self.program
        matrix, rhs = program.matrix.dense(own)[0], program.rhs.evaluate(own, 1)[0]
        if status == Status.INFEASIBLE:
            return certificates.farkas(matrix, rhs, program.num_equalities, **exact)
        quadratic, linear = program.quadratic.dense(own)[0], program.linear.evaluate(own, 1)[0]
        return certificates.ray(quadratic, linear, matrix, rhs, program.num_equalities, **exact)

    def _limits(self, row_side: FloatArray) -> tuple[FloatArray, FloatArray, IndexArray, IndexArray, NDArray[np.bool_]]:
        """Return lower and upper limits (B, nb), the candidates that set them, and where they cross for good."""
        if self._fixed_limits is not None:
            shape = (row_side.shape[0], len(self._bounds.variables))
            lower, upper, lower_slot, upper_slot = self._fixed_limits
            limits = np.broadcast_to(lower, shape), np.broadcast_to(upper, shape)
            slots = np.broadcast_to(lower_slot, shape), np.broadcast_to(upper_slot, shape)
            return *limits, *slots, np.zeros((shape[0], 0), dtype=bool)
        return self._bounds.usable_limits(row_side)

    def _run(self, values: QPValues, options: Options, warm: WarmStart | None) -> Result:
        if self.route.solver == "reference":
            return active_set.verify(values, options, reference.solve(values, options))
        start = None if warm is None else warm.match(values)
        if self._requested is None and start is None:
            items = self._for_interior(values)
            if items is None or len(items):
                return self._by_compiled_interior(values, options, items)
        return self._run_route(values, options, start)

    def _run_route(self, values: QPValues, options: Options, start: WarmStart | None) -> Result:
        """Solve with the solver of the route."""
        if self._requested is None and self._prefers_interior(values):
            return self._by_interior_point(values, options)
        if self._semidefinite:
            return semidefinite.solve(values, options, self._seen, self._semidefinite_setup, start)
        if self._blocks is not None:
            return blocks.solve(values, options, self._blocks, self._gram_setup)
        if self._newton is not None:
            return semismooth_newton.solve(values, options, self._newton, self._constant_rows, self._gram_setup, start)
        result = active_set.solve(values, options, self._gram_setup(), start)
        return active_set.verify(values, options, result)

    def _for_interior(self, values: QPValues) -> IndexArray | None:
        """Return the items for which interior-point steps are considered: None for all of them.

        All where the route has no method of its own for the structure; otherwise those with a zero on the diagonal of
        the Hessian, for which it would have to take proximal steps.
        """
        if self._semidefinite:
            return None
        if self._constant_hessian and self._constant_rows:
            return np.zeros(0, dtype=np.int64)
        if self._blocks is None and self._newton is None:
            return None
        flat = np.asarray((_diagonal(values) <= 0.0).any(axis=1))
        if len(flat) == 1:
            return None if flat[0] else np.zeros(0, dtype=np.int64)
        return None if flat.all() else np.flatnonzero(flat).astype(np.int64)

    def _by_compiled_interior(self, values: QPValues, options: Options, items: IndexArray | None) -> Result:
        """Solve those of some items that are sparse enough for the compiled interior-point method; others by the route.

        To the route goes as well what does not come out, or comes out with an optimum that may not be the only one,
        unless it is a linear program whose optimum of least norm was found.
        """
        collected: compiled_interior.Collected | None = None
        result: Result | None = None
        done, non_unique = np.zeros(values.batch, dtype=bool), np.zeros(values.batch, dtype=bool)
        for own, setup in self._patterns.of(values if items is None else values.take(items)):
            chosen = own if items is None or own is None else items[own]
            chosen = items if own is None else chosen
            part = values if chosen is None else values.take(chosen)
            pays = self._pays(part, setup)
            if not pays.all():
                if not pays.any():
                    continue
                chosen = np.flatnonzero(pays).astype(np.int64) if chosen is None else chosen[pays]
                part = values.take(chosen)
            found, unique = compiled_interior.solve(part, options, self._seen, setup)
            linear = np.flatnonzero((found.status == Status.SOLVED) & ~unique & _is_linear(part)).astype(np.int64)
            several = None
            if len(linear):
                several = compiled_interior.select(part, options, self._seen, setup, found, linear)
                unique |= several
            if chosen is None:
                result, done = found, unique
                non_unique = non_unique if several is None else several
            else:
                collected = compiled_interior.Collected(values, self._seen) if collected is None else collected
                collected.put(chosen, found, setup)
                done[chosen] = unique
                if several is not None:
                    non_unique[chosen] = several
        if collected is not None:
            result = collected.result
        left = np.flatnonzero(~done).astype(np.int64)
        if result is None or len(left) == values.batch:
            return self._run_route(values, options, None)
        if not len(left):
            return replace(result, non_unique=non_unique)
        rest = self._run_route(values.take(left), options, None)
        non_unique[left] = False if rest.non_unique is None else rest.non_unique
        delicate = np.zeros(values.batch, dtype=bool)
        delicate[left] = False if rest.delicate is None else rest.delicate
        result.put(left, rest)
        face = result.face
        if rest.face is not None:
            face = rest.face if face is None else MixedFace(face, rest.face, left)
        return replace(result, face=face, non_unique=non_unique, delicate=delicate)

    def _pays(self, values: QPValues, setup: compiled_interior.Setup) -> NDArray[np.bool_]:
        """Return (B,) which items interior-point steps on their pattern solve faster than the solver of the route.

        By sizes, and by zeros on the diagonal of the Hessian, for which the route would need proximal steps.
        """
        n, m = values.num_variables, values.rows.shape[1]
        if setup.seconds > _DENSE_STEP[0] + _DENSE_STEP[1] * n * n * (m + n / 3.0):
            return np.zeros(values.batch, dtype=bool)
        steps, gram = _STEPS * setup.seconds, _GRAM_SECONDS * n * ((m + len(values.bounded)) ** 2 + n * n)
        # What proximal steps take: several solves, and a face to be factored.
        singular = steps < _PROXIMAL[0] + _PROXIMAL[1] * gram
        own_method = self._blocks is not None or self._newton is not None
        if (self._semidefinite and singular) or (not self._semidefinite and not own_method and steps < gram):
            return np.ones(values.batch, dtype=bool)
        if self._semidefinite or not singular:
            return np.zeros(values.batch, dtype=bool)
        return np.broadcast_to((_diagonal(values) <= 0.0).any(axis=1), (values.batch,))

    def _prefers_interior(self, values: QPValues) -> bool:
        """Whether the Gram matrix of all rows costs more than an interior-point solve."""
        total = values.rows.shape[1] + len(values.bounded)
        constant = self._fixed_hessian is not None and self._fixed_rows is not None
        general = self._blocks is None and self._newton is None
        limit = _GRAM_WORK[bool(self._semidefinite or len(self._proximal))]
        return general and not constant and values.num_variables * total**2 > limit

    def _by_interior_point(self, values: QPValues, options: Options) -> Result:
        """Solve large items one by one; what fails goes the other way."""
        result = semidefinite.solve(values, options, self._seen, start=Result.failed(values, Status.NOT_CONVERGED))
        failed = np.isin(result.status, [Status.NOT_CONVERGED, Status.NOT_STRICTLY_CONVEX])
        left = np.flatnonzero(failed).astype(np.int64)
        if not len(left):
            return replace(result, delicate=None)
        part = values.take(left)
        again = active_set.verify(part, options, active_set.solve(part, options))
        result.put(left, again)
        face = result.face
        if again.face is not None:
            face = again.face if face is None else MixedFace(face, again.face, left)
        return replace(result, face=face)

    def _run_again(self, values: QPValues, options: Options, result: Result) -> Result:
        """Give the items that failed to the solver of semidefinite Hessians, and to the interior-point method."""
        if self._requested == "reference" or self._too_large or (result.status == Status.SOLVED).all():
            return result
        wanted = [Status.NOT_STRICTLY_CONVEX]
        if len(self._proximal):
            wanted += [Status.NOT_CONVERGED, Status.UNBOUNDED]
        singular = np.isin(result.status, wanted)
        failed = np.isin(result.status, [Status.NOT_CONVERGED, Status.UNBOUNDED, Status.INFEASIBLE])
        doubtful = np.flatnonzero(failed & ~singular)
        if len(doubtful) and not values.diagonal:
            hessian = values.hessian if values.hessian.shape[0] == 1 else values.hessian[doubtful]
            singular[doubtful] |= semidefinite.nearly_singular(hessian)
        unproved = failed & ~singular
        for item in np.flatnonzero(unproved & (result.status == Status.INFEASIBLE)):
            unproved[item] = not self._decided and not interior_point.proves_infeasible(values, result, int(item))
        result = self._replace(values, options, result, np.flatnonzero(singular), None)
        items = np.flatnonzero(unproved)
        return self._replace(values, options, result, items, result.take(items) if len(items) else None)

    @property
    def _decided(self) -> bool:
        """Whether the solver decides infeasibility in closed form."""
        return self._blocks is not None and all(group.family != "general" for group in self.route.groups)

    def _replace(
        self, values: QPValues, options: Options, result: Result, items: IndexArray, start: Result | None
    ) -> Result:
        """Solve some items with :mod:`hsbackend.solvers.semidefinite` and put them in the place of what was found."""
        if not len(items):
            return result
        again = semidefinite.solve(values.take(items), options, self._seen, start=start)
        if start is not None:  # curvature on the null space of the equalities may have been enough
            again.status[again.status == Status.NOT_STRICTLY_CONVEX] = Status.NOT_CONVERGED
        result.put(items, again)
        face = result.face
        if again.face is not None:
            face = again.face if face is None else MixedFace(face, again.face, items)
        non_unique = np.zeros(values.batch, dtype=bool) if result.non_unique is None else result.non_unique
        if again.non_unique is not None:
            non_unique[items] = again.non_unique
        delicate = np.zeros(values.batch, dtype=bool) if result.delicate is None else result.delicate
        delicate[items] = start is not None if again.delicate is None else again.delicate
        return replace(result, face=face, non_unique=non_unique, delicate=delicate)

    @property
    def _too_large(self) -> bool:
        """Whether the reduced program is too large for a dense solver."""
        return self._reduced.num_variables + self._rows.shape[0] + len(self._bounds.variables) > DENSE_LIMIT

    def adjoint(
        self, solution: Solution, grad_primal: FloatArray, grad_multipliers: FloatArray | None, whole: bool = True
    ) -> Adjoint:
        """Solve the adjoint KKT system on the face of a solution.

        Args:
            solution: from :meth:`solve` with ``options.keep_face``.
            grad_primal: (B, n) cotangent of the primal.
            grad_multipliers: (B, m) cotangent of the multipliers, None for zero.
            whole: whether w is wanted on every row; otherwise it is left zero on bounds that no parameter moves.

        Returns:
            (u, w), from which every gradient follows: ``dq = -u``, ``db = w``, ``dA = -(nu u' + w x')``,
            ``dQ = -1/2 (u x' + x u')``.
        """
        face = solution.face
        if face is None:
            raise ValueError("the solution has no face: it was computed with keep_face=False")
        batch = grad_primal.shape[0]
        presolved = solution.presolved
        trail, primal_side, row_side = self._presolve(
            grad_primal, grad_multipliers, presolved.definitions, presolved.curvature
        )
        if row_side is None:
            rows = np.zeros((batch, len(self._bounds.kept_rows)))
            rhs_bounds = np.zeros((batch, len(self._bounds.variables)))
        else:
            rows = np.ascontiguousarray(row_side[:, self._kept_rows])
            rhs_bounds = self._collect_bounds(row_side, face.active_bounds, presolved)
        kkt = face.kkt_solve(primal_side, rows, rhs_bounds)
        if whole or self._bounds_move:
            row_multipliers = self._spread_bounds(kkt.rows, kkt.bounds, face.active_bounds, presolved)
        else:
            row_multipliers = np.zeros((batch, self._reduced.num_rows))
            row_multipliers[:, self._kept_rows] = kkt.rows
        primal, multipliers = self._postsolve(
            trail, kkt.primal, row_multipliers, presolved.definitions, presolved.curvature
        )
        assert multipliers is not None
        return Adjoint(primal, multipliers)

    def turning(self, solution: Solution, grad_primal: FloatArray) -> Turning | None:
        """Return the part of the derivative that the adjoint system on a fixed set of directions does not hold.

        Costs nothing where the face leaves the optimum nowhere to go, two KKT solves on it otherwise.

        Args:
            solution: from :meth:`solve` with ``options.keep_face``.
            grad_primal: (B, n) cotangent of the primal.

        Returns:
            What to add for the items that turn, and have a cotangent; None when there are none.
        """
        face = solution.face
        if face is None:
            raise ValueError("the solution has no face: it was computed with keep_face=False")
        turns = _turns(face, grad_primal.shape[0]) & (solution.status == Status.SOLVED)
        turns &= (grad_primal != 0.0).any(axis=1)
        items = np.flatnonzero(turns).astype(np.int64)
        if not len(items):
            return None
        presolved = solution.presolved
        trail, reduced, _ = self._presolve(grad_primal, None, presolved.definitions, presolved.curvature)
        # A cotangent of what is returned lives on the variables that select: O g is O M g.
        moves = _moves(face, reduced)
        along, _ = self._postsolve(trail, moves, None, presolved.definitions, presolved.curvature)
        selecting = np.zeros(grad_primal.shape)
        places = np.ix_(items, self._selecting)
        selecting[places] = solution.primal[places]
        found = self.adjoint(solution, selecting, None, whole=False)
        return Turning(items, along[items], found.primal[items], found.rows[items])

    def _presolve(
        self, rhs_primal: FloatArray, rhs_rows: FloatArray | None, definitions: FloatArray | None,
        curvature: FloatArray | None,
    ) -> tuple[Trail, FloatArray, FloatArray | None]:  # fmt: skip
        """Carry a right-hand side of the KKT system down to the reduced program; None stands for zeros."""
        trail: Trail = []
        for step in self._steps:
            trail.append((rhs_primal, rhs_rows))
            rhs_primal, rhs_rows = step.presolve(rhs_primal, rhs_rows)
        if self._varying is not None and definitions is not None and curvature is not None:
            trail.append((rhs_primal, rhs_rows))
            varying = self._varying
            pushed = rhs_primal[:, varying.gone]
            if rhs_rows is not None:
                pushed = pushed - curvature * (rhs_rows[:, varying.rows] / varying.coefficient)
                rhs_rows = np.ascontiguousarray(rhs_rows[:, varying.kept_rows])
            rhs_primal = rhs_primal[:, varying.kept] - vecmat(pushed, definitions)
        return trail, np.ascontiguousarray(rhs_primal), rhs_rows

    def _postsolve(
        self, trail: Trail, primal: FloatArray, multipliers: FloatArray | None,
        definitions: FloatArray | None, curvature: FloatArray | None,
    ) -> tuple[FloatArray, FloatArray | None]:  # fmt: skip
        """Carry a solution of the reduced KKT system back up; without its multipliers if they are None."""
        levels = list(trail)
        if self._varying is not None and definitions is not None and curvature is not None:
            varying = self._varying
            rhs_primal, rhs_rows = levels.pop()
            value = -matvec(definitions, primal)
            if rhs_rows is not None:
                value += rhs_rows[:, varying.rows] / varying.coefficient
            batch = primal.shape[0]
            x = np.empty((batch, len(varying.kept) + len(varying.gone)))
            x[:, varying.kept] = primal
            x[:, varying.gone] = value
            primal = x
            if multipliers is not None:
                nu = np.empty((batch, len(varying.kept_rows) + len(varying.rows)))
                nu[:, varying.kept_rows] = multipliers
                nu[:, varying.rows] = (rhs_primal[:, varying.gone] - curvature * value) / varying.coefficient
                multipliers = nu
        for step, (rhs_primal, rhs_rows) in zip(reversed(self._steps), reversed(levels), strict=True):
            primal, multipliers = step.postsolve(primal, multipliers, rhs_primal, rhs_rows)
        return primal, multipliers

    def _bound_rows(self, side: IndexArray, presolved: Presolved) -> tuple[IndexArray, FloatArray]:
        """Return for every bounded variable the row of its active limit (B, nb), or -1, and that row's entry."""
        return self._bounds.rows_of(side, presolved.lower_slot, presolved.upper_slot)

    def _spread_bounds(
        self, rows: FloatArray, bounds: FloatArray, side: IndexArray, presolved: Presolved
    ) -> FloatArray:
        """Give the signed multipliers of the bounds back to the rows they came from."""
        slots = presolved.lower_slot, presolved.upper_slot
        return self._bounds.spread(rows, bounds, side, *slots, self._kept_rows, self._reduced.num_rows)

    def _collect_bounds(self, rows: FloatArray, side: IndexArray, presolved: Presolved) -> FloatArray:
        """Gather a right-hand side on the rows of the active bounds, in units of the variable."""
        return self._bounds.collect(rows, side, presolved.lower_slot, presolved.upper_slot)

    def _conflicts(self, result: Result, presolved: Presolved) -> dict[int, list[int]]:
        """Name the program rows whose Farkas combination shows an item infeasible."""
        found: dict[int, list[int]] = {}
        for item in np.flatnonzero(result.status == Status.INFEASIBLE):
            rows, bounds = result.rows[item], result.bounds[item]
            pick = slice(int(item), int(item) + 1)
            side = np.sign(np.nan_to_num(bounds)).astype(np.int64)[None]
            slots = replace(presolved, lower_slot=presolved.lower_slot[pick], upper_slot=presolved.upper_slot[pick])
            combined = self._spread_bounds(np.nan_to_num(rows)[None], np.nan_to_num(bounds)[None], side, slots)[0]
            index = np.flatnonzero(np.abs(combined) > 1e-9 * max(1.0, float(np.abs(combined).max(initial=0.0))))
            found[int(item)] = [self._original_row(int(row)) for row in index]
        return found

    def _original_row(self, row: int) -> int:
        """Map a row of the reduced program to a row of the program."""
        if self._varying is not None:
            row = int(self._varying.kept_rows[row])
        for step in reversed(self._steps):
            row = int(step.kept_rows[row])
        return row


def _diagonal(values: QPValues) -> FloatArray:
    """Return (1 or B, n) the diagonal of the Hessian."""
    return values.hessian if values.diagonal else np.einsum("bii->bi", values.hessian)


def _is_linear(values: QPValues) -> NDArray[np.bool_]:
    """Return (B,) which items have no curvature."""
    zero = ~values.hessian.any(axis=tuple(range(1, values.hessian.ndim)))
    return np.broadcast_to(zero, (values.batch,))


def _turns(face: Face | SparseFaces, batch: int) -> NDArray[np.bool_]:
    """Return (B,) whether a face leaves the optimum directions in which only the least norm holds it."""
    if isinstance(face, MixedFace):
        found = _turns(face.first, batch)
        found[face.items] = _turns(face.second, len(face.items))
        return found
    return face.free_directions() > 0 if isinstance(face, LeastNormFace) else np.zeros(batch, dtype=bool)


def _moves(face: Face | SparseFaces, point: FloatArray) -> FloatArray:
    """Return (B, n) ``O M v``, the movement along the optima from the selected one to v; zero where there are none.

    ``(v, 0)`` solves the KKT system with right-hand side ``(H v, N v)``; the face answers with ``R v = v - O M v``.
    """
    if isinstance(face, MixedFace):
        found = _moves(face.first, point)
        found[face.items] = _moves(face.second, np.ascontiguousarray(point[face.items]))
        return found
    if not isinstance(face, LeastNormFace):
        return np.zeros(point.shape)
    values = face.values
    curved = values.hessian * point if values.diagonal else matvec(values.hessian, point)
    at_bounds = np.ascontiguousarray(point[:, values.bounded])
    return point - face.kkt_solve(curved, matvec(values.rows, point), at_bounds).primal
