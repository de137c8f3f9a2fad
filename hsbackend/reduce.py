"""Presolve with exact postsolve.

Three reductions, all exact, all found once from the structure of a :class:`~hsbackend.program.Program`:

*Fixing* of an epigraph variable ``t`` without any cost that every other row wants as large as its one limit allows
(``x_j <= t, -x_j <= t, t <= r``, the canonical form of a norm-inf ball): ``t = r``, and the other rows become bounds.

*Elimination* of a variable ``t`` that one equality row defines and no other row mentions,

    e'x + c t = b_i,  c constant:     t = (b_i - e'x) / c,

so that ``x_full = K x + o`` with ``K = [I; -e'/c]`` and the reduced problem is

    Q_red = K'Q K,     q_red = K'(q + Q o).

This is how a square of an affine expression comes back from its canonical form as a quadratic in x.
*Bounds*: inequality rows with one constant entry become limits of the variable.

The solution ``(x, nu)`` and the adjoint ``(u, w)`` solve the same KKT system with another right-hand side
``(rhs_primal, rhs_rows)``: ``(-q, b)`` or ``(g, r)``. Hence one postsolve for both:

    t    = (rhs_rows_i - e'x) / c,          nu_i = (rhs_primal_t - (Q x_full)_t - sum_k A_kt nu_k) / c,

k the other rows that mention t: none for an elimination; for a fixing their right-hand sides lose ``A_kt t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from hsbackend.program import AffineMap, FloatArray, IndexArray, MatrixEntries, Program, SparseOperator, as_slice


@dataclass(frozen=True)
class Elimination:
    """One round of eliminations with constant definitions; turns a program into a smaller one.

    Attributes:
        kept: variables that stay.
        gone: (k,) eliminated variables.
        rows: (k,) the equality row that defines each.
        kept_rows: rows that stay.
        coefficient: (k,) c.
        definitions: (k, n_kept) the rows e' divided by c.
        definitions_transposed: its transpose.
        hessian_columns: (n_full, k) the constant columns ``Q[:, gone]``.
        hessian_rows: (k, n_full) the same rows of Q.
        mentions: (kept rows, k) the entries of fixed variables in the rows that stay; empty for an elimination.
        mentions_transposed: its transpose.
    """

    kept: IndexArray
    gone: IndexArray
    rows: IndexArray
    kept_rows: IndexArray
    coefficient: FloatArray
    definitions: SparseOperator
    definitions_transposed: SparseOperator
    hessian_columns: SparseOperator
    hessian_rows: SparseOperator
    mentions: SparseOperator
    mentions_transposed: SparseOperator

    @cached_property
    def _views(self) -> tuple[slice | IndexArray, ...]:
        return as_slice(self.kept), as_slice(self.gone), as_slice(self.kept_rows), as_slice(self.rows)

    def presolve(self, rhs_primal: FloatArray, rhs_rows: FloatArray | None) -> tuple[FloatArray, FloatArray | None]:
        """Reduce a right-hand side of the KKT system: ``K'(rhs_primal - Q o)`` and the rows that stay.

        None stands for a right-hand side of zeros on the rows.
        """
        kept, gone, kept_rows, rows = self._views
        if rhs_rows is None:
            reduced = np.array(rhs_primal[:, kept], order="C")
            self.definitions_transposed.subtract_from(np.ascontiguousarray(rhs_primal[:, gone]), reduced)
            return reduced, None
        offset = rhs_rows[:, rows] / self.coefficient
        full = rhs_primal.copy()
        self.hessian_columns.subtract_from(offset, full)
        reduced = np.array(full[:, kept], order="C")
        self.definitions_transposed.subtract_from(np.ascontiguousarray(full[:, gone]), reduced)
        left = np.array(rhs_rows[:, kept_rows], order="C")
        self.mentions.subtract_from(offset, left)
        return reduced, left

    def postsolve(
        self, primal: FloatArray, multipliers: FloatArray | None, rhs_primal: FloatArray, rhs_rows: FloatArray | None
    ) -> tuple[FloatArray, FloatArray | None]:
        """Recover the eliminated variables and, unless None, the multipliers of their rows (module docstring)."""
        batch = primal.shape[0]
        kept, gone, kept_rows, rows = self._views
        value = np.zeros((batch, len(self.gone))) if rhs_rows is None else rhs_rows[:, rows] / self.coefficient
        self.definitions.subtract_from(primal, value)
        x = np.empty((batch, len(self.kept) + len(self.gone)))
        x[:, kept] = primal
        x[:, gone] = value
        if multipliers is None:
            return x, None
        nu = np.empty((batch, len(self.kept_rows) + len(self.rows)))
        nu[:, kept_rows] = multipliers
        gradient = np.array(rhs_primal[:, gone], order="C")
        self.hessian_rows.subtract_from(x, gradient)
        self.mentions_transposed.subtract_from(multipliers, gradient)
        gradient /= self.coefficient
        nu[:, rows] = gradient
        return x, nu


def _column_counts(pattern: Any) -> IndexArray:
    return np.diff(sp.csc_array(pattern).indptr).astype(np.int64)


def _choose(program: Program, allowed: NDArray[np.bool_], widest: int | None = None) -> list[tuple[int, int]]:
    """Choose (row, variable) pairs: the variable is defined by the row and appears in no other row.

    A pair is worth taking when the variable has no curvature of its own, or when nothing else in its row has:
    otherwise eliminating would fill a diagonal Hessian (``1'x = 1`` with no bounds) without need.

    Args:
        program: the program.
        allowed: (n,) variables that may go.
        widest: with a limit, no curved variable goes that is defined by more entries: the Hessian gets their square.
    """
    matrix = program.matrix
    pattern = sp.csr_array(matrix.pattern())
    pattern.sort_indices()
    counts = _column_counts(pattern)
    quadratic = sp.csr_array(program.quadratic.pattern())
    curved = np.diff(quadratic.indptr) > 0
    me = program.num_equalities
    columns = pattern.indices[: pattern.indptr[me]]
    lengths = np.diff(pattern.indptr[: me + 1])
    rows = np.repeat(np.arange(me), lengths)
    candidate = (counts[columns] == 1) & allowed[columns]
    mask = matrix.values.varying
    if mask.any():
        places = matrix.rows[mask] * matrix.shape[1] + matrix.columns[mask]
        candidate &= ~np.isin(rows.astype(np.int64) * matrix.shape[1] + columns, places)
    how_many = np.bincount(rows[candidate], minlength=me)
    curved_in_row = np.bincount(rows[curved[columns]], minlength=me)
    others_curved = curved_in_row[rows] - curved[columns] > 0
    output = program.outputs[columns]
    candidate &= ~(curved[columns] & others_curved & ((how_many[rows] > 1) | output))
    if widest is not None:
        candidate &= ~(curved[columns] & (lengths[rows] > widest))
    # A curved variable before a flat one, and above all one that nobody reads; the first of equals.
    rank = np.where(curved[columns], 2, 1) + np.where(output, 0, 2)
    chosen = np.flatnonzero(candidate)
    order = np.lexsort((np.arange(len(chosen)), -rank[chosen], rows[chosen]))
    chosen = chosen[order]
    _, first = np.unique(rows[chosen], return_index=True)
    # A variable has one row, so that none is taken twice. Eliminated variables must not couple through Q with each
    # other's rows in ways that need an order: they do not, because each appears in its own row only and K'QK is formed
    # at once.
    return [(int(rows[entry]), int(columns[entry])) for entry in chosen[first]]


def _entry_lookup(matrix: Any, rows: IndexArray, columns: IndexArray) -> FloatArray:
    if not len(rows):
        return np.zeros(0)
    return np.asarray(sp.csr_array(matrix)[rows, columns]).ravel()


def eliminate_once(
    program: Program, keep_outputs: bool = False, widest: int | None = None
) -> tuple[Program, Elimination] | None:
    """Eliminate variables whose definition and curvature are constant; None when there are none."""
    matrix = program.matrix
    varying = matrix.values.varying
    varying_rows = np.zeros(program.num_rows, dtype=bool)
    varying_rows[matrix.rows[varying]] = True
    curvature_varies = np.zeros(program.num_variables, dtype=bool)
    moving = program.quadratic.values.varying
    curvature_varies[program.quadratic.rows[moving]] = True
    curvature_varies[program.quadratic.columns[moving]] = True
    allowed = ~(curvature_varies | (program.outputs & keep_outputs))
    pairs = [(row, t) for row, t in _choose(program, allowed, widest) if not varying_rows[row]]
    if not pairs:
        return None
    return _eliminate(program, pairs)


def fix_dominated(program: Program) -> tuple[Program, Elimination] | None:
    """Fix the variables that may sit at their limit (module docstring); None when there are none."""
    matrix = program.matrix
    curved = np.zeros(program.num_variables, dtype=bool)
    curved[program.quadratic.rows] = curved[program.quadratic.columns] = True
    linear = program.linear
    candidates = ~(curved | program.outputs | linear.varying | (linear.offset != 0.0))
    candidates[matrix.columns[matrix.values.varying]] = False
    if not candidates.any():
        return None
    constant = sp.csc_array(matrix.constant_part())
    counts = np.diff(sp.csr_array(matrix.pattern()).indptr)
    pairs: list[tuple[int, int]] = []
    for t in np.flatnonzero(candidates):
        rows = constant.indices[constant.indptr[t] : constant.indptr[t + 1]]
        entries = constant.data[constant.indptr[t] : constant.indptr[t + 1]]
        if len(rows) < 2 or np.any(rows < program.num_equalities):
            continue
        for limiting in (entries > 0.0, entries < 0.0):
            if limiting.sum() == 1 and counts[rows[limiting][0]] == 1:
                pairs.append((int(rows[limiting][0]), int(t)))
                break
    return _eliminate(program, pairs) if pairs else None


def _eliminate(program: Program, pairs: list[tuple[int, int]]) -> tuple[Program, Elimination]:
    """Remove (row, variable) pairs, where the constant row defines the variable."""
    matrix = program.matrix
    moving = program.quadratic.values.varying
    rows = np.array([row for row, _ in pairs], dtype=np.int64)
    gone = np.array([t for _, t in pairs], dtype=np.int64)
    n, m = program.num_variables, program.num_rows
    stays = np.ones(n, dtype=bool)
    stays[gone] = False
    kept = np.flatnonzero(stays).astype(np.int64)
    row_stays = np.ones(m, dtype=bool)
    row_stays[rows] = False
    kept_rows = np.flatnonzero(row_stays).astype(np.int64)

    constant = sp.csr_array(matrix.constant_part())
    coefficient = _entry_lookup(constant, rows, gone)
    definitions = sp.csr_array(sp.diags_array(1.0 / coefficient) @ constant[rows][:, kept])
    quadratic = sp.csr_array(program.quadratic.constant_part())
    mentions = sp.csr_array(constant[kept_rows][:, gone])
    step = Elimination(
        kept,
        gone,
        rows,
        kept_rows,
        coefficient,
        SparseOperator.build(definitions),
        SparseOperator.build(definitions.T),
        SparseOperator.build(quadratic[:, gone]),
        SparseOperator.build(quadratic[gone]),
        SparseOperator.build(mentions),
        SparseOperator.build(mentions.T),
    )

    # K'QK: the constant part in full, the varying entries only among the kept variables.
    expand = sp.csr_array(sp.coo_array((np.ones(len(kept)), (kept, np.arange(len(kept)))), shape=(n, len(kept))))
    scatter = sp.csr_array(sp.coo_array((np.ones(len(gone)), (gone, np.arange(len(gone)))), shape=(n, len(gone))))
    expand = sp.csr_array(expand - scatter @ definitions)
    reduced_constant = sp.coo_array(expand.T @ quadratic @ expand)
    place = np.full(n, -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))
    row_place = np.full(m, -1, dtype=np.int64)
    row_place[kept_rows] = np.arange(len(kept_rows))
    size = len(kept)
    parameters = program.parameter_sizes
    moving_entries = np.flatnonzero(moving)
    offset_column = sp.csr_array(
        sp.coo_array(
            (
                reduced_constant.data,
                (np.arange(reduced_constant.nnz), np.full(reduced_constant.nnz, int(sum(parameters)))),
            ),
            shape=(reduced_constant.nnz, int(sum(parameters)) + 1),
        )
    )
    moving_map = sp.csr_array(program.quadratic.values.matrix)[moving_entries]
    new_quadratic = MatrixEntries(
        (size, size),
        np.concatenate([reduced_constant.coords[0], place[program.quadratic.rows[moving_entries]]]).astype(np.int64),
        np.concatenate([reduced_constant.coords[1], place[program.quadratic.columns[moving_entries]]]).astype(np.int64),
        AffineMap(sp.vstack([offset_column, moving_map]), parameters),
    )
    in_rows = np.flatnonzero(row_stays[matrix.rows] & stays[matrix.columns])
    new_matrix = matrix.select(
        in_rows, row_place[matrix.rows[in_rows]], place[matrix.columns[in_rows]], (len(kept_rows), size)
    )
    rhs = sp.csr_array(program.rhs.matrix)
    # The linear term depends on the right-hand side through o; presolve() computes it, the map is unused below.
    reduced = Program(
        size,
        program.num_equalities - int(np.sum(rows < program.num_equalities)),
        new_quadratic,
        program.linear.take(kept),
        new_matrix,
        AffineMap(rhs[kept_rows] - mentions @ sp.diags_array(1.0 / coefficient) @ rhs[rows], parameters),
        program.outputs[kept],
        tuple(program.row_names[row] for row in kept_rows),
    )
    return reduced, step


def reduce_constant(
    program: Program, keep_outputs: bool = False, widest: int | None = None
) -> tuple[Program, list[Elimination]]:
    """Fix what is dominated, then repeat :func:`eliminate_once` until nothing more can go.

    With ``keep_outputs`` no variable that is returned goes: the norm of the others would not be theirs. With ``widest``
    no curved variable goes that is defined by more entries than that, which would fill the Hessian.
    """
    steps: list[Elimination] = []
    fixed = fix_dominated(program)
    if fixed is not None:
        program, step = fixed
        steps.append(step)
    while True:
        found = eliminate_once(program, keep_outputs, widest)
        if found is None:
            return program, steps
        program, step = found
        steps.append(step)


@dataclass(frozen=True)
class VaryingElimination:
    """The last round: definitions or curvatures that depend on parameters, as in ``||R x - y||^2`` with R given.

    The eliminated variables have diagonal curvature ``W`` and no coupling to others, so with ``t = o - E x``

        Q_red = Q_kk + E'W E,      reduced rhs = g_k - E'(g_t - W o).
    """

    kept: IndexArray
    gone: IndexArray
    rows: IndexArray
    kept_rows: IndexArray
    coefficient: FloatArray
    definitions: MatrixEntries
    curvature: AffineMap
    remaining: Program
    diagonal: bool


def take_matrix(matrix: MatrixEntries, rows: IndexArray, columns: IndexArray) -> MatrixEntries:
    """Restrict to some rows and columns, renumbered."""
    row_place = np.full(matrix.shape[0], -1, dtype=np.int64)
    row_place[rows] = np.arange(len(rows))
    column_place = np.full(matrix.shape[1], -1, dtype=np.int64)
    column_place[columns] = np.arange(len(columns))
    keep = np.flatnonzero((row_place[matrix.rows] >= 0) & (column_place[matrix.columns] >= 0))
    return matrix.select(
        keep.astype(np.int64),
        row_place[matrix.rows[keep]],
        column_place[matrix.columns[keep]],
        (len(rows), len(columns)),
    )


def is_diagonal(quadratic: MatrixEntries) -> bool:
    """Whether every structural non-zero of Q lies on the diagonal."""
    pattern = sp.coo_array(quadratic.pattern())
    return bool(np.all(pattern.coords[0] == pattern.coords[1]))


def eliminate_varying(program: Program, keep_outputs: bool = False) -> VaryingElimination | None:
    """Find the last round of eliminations; None when there are none."""
    pattern = sp.coo_array(program.quadratic.pattern())
    coupled = np.zeros(program.num_variables, dtype=bool)
    off = pattern.coords[0] != pattern.coords[1]
    coupled[pattern.coords[0][off]] = True
    pairs = _choose(program, ~(coupled | (program.outputs & keep_outputs)))
    if not pairs:
        return None
    rows = np.array([row for row, _ in pairs], dtype=np.int64)
    gone = np.array([t for _, t in pairs], dtype=np.int64)
    kept = np.setdiff1d(np.arange(program.num_variables), gone).astype(np.int64)
    kept_rows = np.setdiff1d(np.arange(program.num_rows), rows).astype(np.int64)
    coefficient = _entry_lookup(program.matrix.constant_part(), rows, gone)
    definitions = take_matrix(program.matrix, rows, kept)
    scale = sp.diags_array(1.0 / coefficient[definitions.rows])
    definitions = MatrixEntries(
        definitions.shape,
        definitions.rows,
        definitions.columns,
        AffineMap(sp.csc_array(scale @ definitions.values.matrix), program.parameter_sizes),
    )
    quadratic = program.quadratic
    place = np.full(program.num_variables, -1, dtype=np.int64)
    place[gone] = np.arange(len(gone))
    on_diagonal = np.flatnonzero((quadratic.rows == quadratic.columns) & (place[quadratic.rows] >= 0))
    gather = sp.csr_array(
        sp.coo_array(
            (np.ones(len(on_diagonal)), (place[quadratic.rows[on_diagonal]], on_diagonal)),
            shape=(len(gone), len(quadratic.rows)),
        )
    )
    curvature = AffineMap(sp.csc_array(gather @ sp.csr_array(quadratic.values.matrix)), program.parameter_sizes)
    remaining = Program(
        len(kept),
        program.num_equalities - len(rows),
        take_matrix(quadratic, kept, kept),
        program.linear.take(kept),
        take_matrix(program.matrix, kept_rows, kept),
        program.rhs.take(kept_rows),
        program.outputs[kept],
        tuple(program.row_names[row] for row in kept_rows),
    )
    single = bool(np.all(np.diff(sp.csr_array(definitions.pattern()).indptr) <= 1))
    diagonal = single and is_diagonal(remaining.quadratic)
    return VaryingElimination(kept, gone, rows, kept_rows, coefficient, definitions, curvature, remaining, diagonal)


def read_variables(
    program: Program, steps: Sequence[Elimination], varying: VaryingElimination | None = None
) -> NDArray[np.bool_]:
    """Find the variables (n of the reduced program) that are returned, or that define one that is."""
    read = program.outputs
    for step in steps:
        definitions = step.definitions
        defined = np.repeat(definitions.targets, np.diff(definitions.indptr))
        defining = definitions.indices[read[step.gone][defined]]
        read = read[step.kept]
        read[defining] = True
    if varying is not None:
        definitions = varying.definitions
        defining = definitions.columns[read[varying.gone][definitions.rows]]
        read = read[varying.kept]
        read[defining] = True
    return read


def free_of_charge(
    program: Program, steps: Sequence[Elimination], varying: VaryingElimination | None = None
) -> NDArray[np.bool_]:
    """Find the variables (n of the reduced program) without linear cost in any call, which nobody reads."""
    linear = program.linear
    costly = linear.varying | (linear.offset != 0.0) | program.outputs
    for step in steps:
        costly = costly[step.kept]
        costly[step.definitions.indices] = True
    if varying is not None:
        costly = costly[varying.kept]
        costly[varying.definitions.columns] = True
    return ~costly


@dataclass(frozen=True)
class Bounds:
    """Inequality rows with one constant entry, grouped by variable and side.

    A row ``a x_j <= b`` is ``x_j <= b / a`` for a > 0 and ``x_j >= b / a`` for a < 0. Several rows may limit the
    same side: the tightest counts, and its row receives the multiplier.

    Attributes:
        variables: (nb,) variables with at least one limit.
        rows: rows that became limits.
        kept_rows: the other rows.
        upper_rows, lower_rows: (nb, width) candidate rows per variable, -1 where there is none.
        upper_coefficient, lower_coefficient: (nb, width) the entries a, 1 where there is none.
    """

    variables: IndexArray
    rows: IndexArray
    kept_rows: IndexArray
    upper_rows: IndexArray
    upper_coefficient: FloatArray
    lower_rows: IndexArray
    lower_coefficient: FloatArray

    @property
    def plain(self) -> bool:
        """Whether every side has at most one candidate row."""
        return self.upper_rows.shape[1] <= 1 and self.lower_rows.shape[1] <= 1

    def _limits(self, rhs: FloatArray, rows: IndexArray, coefficient: FloatArray, fill: float) -> FloatArray:
        gathered = rhs[:, np.maximum(rows, 0).ravel()].reshape(rhs.shape[0], *rows.shape)
        return np.where(rows >= 0, gathered / coefficient, fill)

    def limits(self, rhs: FloatArray) -> tuple[FloatArray, FloatArray, IndexArray, IndexArray]:
        """Return lower and upper limits (B, nb) and, for each, the row that sets it (B, nb)."""
        upper = self._limits(rhs, self.upper_rows, self.upper_coefficient, np.inf)
        lower = self._limits(rhs, self.lower_rows, self.lower_coefficient, -np.inf)
        if self.plain:
            shape = (rhs.shape[0], len(self.variables))
            return (
                np.ascontiguousarray(lower[:, :, 0]),
                np.ascontiguousarray(upper[:, :, 0]),
                np.zeros(shape, dtype=np.int64),
                np.zeros(shape, dtype=np.int64),
            )
        at_upper = np.argmin(upper, axis=2)
        at_lower = np.argmax(lower, axis=2)
        return (
            np.ascontiguousarray(np.take_along_axis(lower, at_lower[:, :, None], 2)[:, :, 0]),
            np.ascontiguousarray(np.take_along_axis(upper, at_upper[:, :, None], 2)[:, :, 0]),
            at_lower.astype(np.int64),
            at_upper.astype(np.int64),
        )

    def usable_limits(
        self, rhs: FloatArray, rounding: float = 1e-9
    ) -> tuple[FloatArray, FloatArray, IndexArray, IndexArray, NDArray[np.bool_]]:
        """Return what :meth:`limits` does and where limits cross for good (B, nb); there both are in the middle.

        A variable whose bounds cross has no value; the solvers take bounds for granted. Rounding may cross them too: by
        up to ``rounding``, relative to 1 and the limit, they do not cross for good.
        """
        lower, upper, lower_slot, upper_slot = self.limits(rhs)
        crossing = lower > upper
        if crossing.any():
            low, high = lower[crossing], upper[crossing]
            finite = np.isfinite(low) & np.isfinite(high)
            middle, gap = np.zeros(len(low)), np.full(len(low), np.inf)
            middle[finite] = 0.5 * (low[finite] + high[finite])
            gap[finite] = low[finite] - high[finite]
            lower[crossing] = upper[crossing] = middle
            crossing[crossing] = ~(gap <= rounding * (1.0 + np.abs(middle)))
        return lower, upper, lower_slot, upper_slot, crossing

    def rows_of(
        self, side: IndexArray, lower_slot: IndexArray, upper_slot: IndexArray
    ) -> tuple[IndexArray, FloatArray]:
        """Return for every bounded variable the row of its active limit (B, nb), or -1, and that row's entry."""
        position = np.arange(len(self.variables))[None, :]
        upper = self.upper_rows[position, upper_slot]
        lower = self.lower_rows[position, lower_slot]
        rows = np.where(side > 0, upper, np.where(side < 0, lower, -1))
        upper_entry = self.upper_coefficient[position, upper_slot]
        lower_entry = self.lower_coefficient[position, lower_slot]
        return rows, np.where(side > 0, upper_entry, lower_entry)

    def spread(
        self, rows: FloatArray, bounds: FloatArray, side: IndexArray, lower_slot: IndexArray, upper_slot: IndexArray,
        kept_rows: slice | IndexArray, num_rows: int,
    ) -> FloatArray:  # fmt: skip
        """Return multipliers of all rows (B, num_rows) from those of the kept rows and, signed, of the bounds."""
        out = np.zeros((rows.shape[0], num_rows))
        out[:, kept_rows] = rows
        if not len(self.variables):
            return out
        if self.plain:
            for table, entries, active in (
                (self.upper_rows, self.upper_coefficient, side > 0),
                (self.lower_rows, self.lower_coefficient, side < 0),
            ):
                has = table[:, 0] >= 0
                if has.all():
                    out[:, table[:, 0]] = np.where(active, bounds, 0.0) / entries[:, 0]
                else:
                    out[:, table[has, 0]] = np.where(active, bounds, 0.0)[:, has] / entries[has, 0]
            return out
        target, entry = self.rows_of(side, lower_slot, upper_slot)
        item, position = np.nonzero(target >= 0)
        out[item, target[item, position]] = bounds[item, position] / entry[item, position]
        return out

    def collect(self, rows: FloatArray, side: IndexArray, lower_slot: IndexArray, upper_slot: IndexArray) -> FloatArray:
        """Gather a right-hand side on the rows of the active bounds (B, nb), in units of the variable."""
        out = np.zeros(side.shape)
        if rows.any():
            target, entry = self.rows_of(side, lower_slot, upper_slot)
            item, position = np.nonzero(target >= 0)
            out[item, position] = rows[item, target[item, position]] / entry[item, position]
        return out


def find_bounds(program: Program) -> Bounds:
    """Find the inequality rows with exactly one structural entry, constant and non-zero."""
    matrix = program.matrix
    pattern = sp.csr_array(matrix.pattern())
    counts = np.diff(pattern.indptr)
    varying_rows = np.zeros(program.num_rows, dtype=bool)
    varying_rows[matrix.rows[matrix.values.varying]] = True
    single = (counts == 1) & ~varying_rows
    single[: program.num_equalities] = False
    rows = np.flatnonzero(single).astype(np.int64)
    columns = pattern.indices[pattern.indptr[rows]].astype(np.int64)
    entries = _entry_lookup(matrix.constant_part(), rows, columns)
    variables = np.unique(columns)

    def table(side: NDArray[np.bool_]) -> tuple[IndexArray, FloatArray]:
        """List the rows of one side by variable, in their order."""
        found = np.flatnonzero(side)
        position = np.searchsorted(variables, columns[found])
        order = np.argsort(position, kind="stable")
        found, position = found[order], position[order]
        count = np.bincount(position, minlength=len(variables))
        slot = np.arange(len(found)) - (np.cumsum(count) - count)[position]
        shape = (len(variables), max(1, int(count.max(initial=1))))
        index, coefficient = np.full(shape, -1, dtype=np.int64), np.ones(shape)
        index[position, slot] = rows[found]
        coefficient[position, slot] = entries[found]
        return index, coefficient

    kept_rows = np.flatnonzero(~single).astype(np.int64)
    return Bounds(variables, rows, kept_rows, *table(entries > 0.0), *table(entries <= 0.0))
