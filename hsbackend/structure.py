"""Recognise independent blocks of a reduced program and the named polyhedra among them.

Variables are linked by a row or by an off-diagonal entry of the Hessian; what is not linked is an independent block.
A block with a diagonal Hessian whose rows have one of these shapes is a family with an exact algorithm of its own
(:mod:`hsbackend.families`), however it was spelled, scaled or permuted:

- *budget*: bounds and parallel rows only, ``lower <= x <= upper, low <= c'x <= high`` (box, simplex, half-space, ...);
- *monotone*: rows ``x_i - x_k <= d`` that form one path, with bounds that amount to one at each end;
- *transport*: equality rows of equal entries, two for each variable, a complete bipartite graph, and ``x >= lower``;
- *l1*: ``sum_j w_j t_j <= r`` with ``x_j - y_j <= k_j t_j`` and ``y_j - x_j <= k_j t_j``, t without any cost.

Blocks that are alike become further items of the batch. Everything here looks at structure and constants only; what
does not fit exactly stays *general*: the next more general solver is always right, only slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from hsbackend.program import AffineMap, FloatArray, IndexArray, MatrixEntries
from hsbackend.reduce import Bounds

FamilyName = Literal["budget", "l1", "monotone", "transport", "general"]

#: More kinds of blocks than this cost more in dispatch than their algorithms save.
_MOST_GROUPS = 8
#: Two rows are parallel when their entries agree to this fraction of the largest: a few roundings.
_PARALLEL = 1e-15


@dataclass(frozen=True)
class Group:
    """Alike blocks, G of them, solved as further batch items.

    Attributes:
        family: algorithm of the blocks.
        label: what a user would call them.
        shape: ``(n,)``, or ``(k1, k2)`` for transport.
        variables: (G, n) in the order of the family.
        auxiliary: (G, n) epigraph variables of the l1 ball; (G, 0) otherwise.
        rows: (G, C, R) for each of the C rows of the family the parallel rows of the program that express it, -1 where
            there are fewer than R. Rows of a family: budget 1 or 0; monotone n - 1, in chain order; transport k1 + k2;
            l1 1 + n + n: the sum, the rows above, the rows below. A general block has its rows in order, R = 1.
        scale: (G, C, R) row of the program = scale * row of the family.
        coefficients: (G, n) entries c of the family's row where they are constant and not all one; None otherwise. For
            l1 the weights ``w_j k_j``.
        factor: (G, n) k of the l1 ball; (G, 0) otherwise.
        varying: whether the entries of the budget row depend on parameters.
        ends: for monotone, whether there is a lower limit on the first and an upper limit on the last variable.
    """

    family: FamilyName
    label: str
    shape: tuple[int, ...]
    variables: IndexArray
    auxiliary: IndexArray
    rows: IndexArray
    scale: FloatArray
    coefficients: FloatArray | None = None
    factor: FloatArray | None = None
    varying: bool = False
    ends: tuple[bool, bool] = (False, False)

    @property
    def count(self) -> int:
        """Number of blocks G."""
        return int(self.variables.shape[0])

    def __str__(self) -> str:
        """Say what it is, for the report."""
        size = " x ".join(str(k) for k in self.shape)
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{times}{self.label} ({size})"


@dataclass(frozen=True)
class _Parallel:
    """Parallel constant rows (or one varying row): ``row = scale * entries``."""

    rows: list[int]
    scale: list[float]
    columns: IndexArray
    entries: FloatArray | None


@dataclass(frozen=True)
class _Block:
    family: FamilyName
    label: str
    shape: tuple[int, ...]
    variables: IndexArray
    classes: tuple[_Parallel, ...]
    auxiliary: IndexArray
    coefficients: FloatArray | None = None
    factor: FloatArray | None = None
    varying: bool = False
    ends: tuple[bool, bool] = (False, False)
    pattern: bytes = b""


class _Reader:
    """The reduced program as the recognisers look at it."""

    def __init__(
        self, rows: MatrixEntries, num_equalities: int, bounds: Bounds, rhs: AffineMap, hessian_pattern: Any,
        free_of_charge: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        self.num_rows, self.num_variables = rows.shape
        self.num_equalities = num_equalities
        self.pattern = sp.csr_array(rows.pattern())
        self.pattern.sort_indices()
        self.constant = sp.csr_array(rows.constant_part())
        self.constant.sum_duplicates()
        self.constant.eliminate_zeros()
        self.constant.sort_indices()
        self.varying = np.zeros(self.num_rows, dtype=bool)
        self.varying[rows.rows[rows.values.varying]] = True
        self.bounds = bounds
        self.bounded_at: IndexArray = np.full(self.num_variables, -1, dtype=np.int64)
        self.bounded_at[bounds.variables] = np.arange(len(bounds.variables))
        self.rhs = sp.csr_array(rhs.matrix)
        self.rhs_varying = rhs.varying
        self.offset = rhs.offset
        self.hessian = sp.csr_array(hessian_pattern)
        self.flat = np.diff(self.hessian.indptr) == 0
        self.free_of_charge = free_of_charge

    def columns(self, row: int) -> IndexArray:
        """Return the variables of a row."""
        return self.pattern.indices[self.pattern.indptr[row] : self.pattern.indptr[row + 1]].astype(np.int64)

    def entries(self, row: int) -> FloatArray:
        """Return the entries of a constant row, in the order of :meth:`columns`."""
        return self.constant.data[self.constant.indptr[row] : self.constant.indptr[row + 1]]

    def equality(self, row: int) -> bool:
        """Whether a row is an equality."""
        return row < self.num_equalities

    def parallel(self, rows: Sequence[int]) -> list[_Parallel] | None:
        """Sort rows into classes of parallel ones; None when a varying row is not alone."""
        if any(self.varying[row] for row in rows):
            if len(rows) > 1:
                return None
            return [_Parallel([rows[0]], [1.0], self.columns(rows[0]), None)]
        found: dict[bytes, list[_Parallel]] = {}
        classes: list[_Parallel] = []
        for row in rows:
            columns, entries = self.columns(row), self.entries(row)
            same = found.setdefault(columns.tobytes(), [])
            for candidate in same:
                assert candidate.entries is not None
                scale = entries[0] / candidate.entries[0]
                difference = np.abs(entries - scale * candidate.entries).max()
                if difference <= _PARALLEL * np.abs(entries).max():
                    candidate.rows.append(row)
                    candidate.scale.append(float(scale))
                    break
            else:
                new = _Parallel([row], [1.0], columns, entries)
                same.append(new)
                classes.append(new)
        return classes

    def rhs_zero(self, rows: Sequence[int], kept_rows: IndexArray) -> bool:
        """Whether the right-hand sides of kept rows are zero for every parameter value."""
        at = kept_rows[np.asarray(rows, dtype=np.int64)]
        return not self.rhs_varying[at].any() and not self.offset[at].any()

    def limit_rows(self, variable: int, upper: bool) -> list[tuple[int, float]]:
        """Return the (row of the program, entry) pairs that limit a variable on one side."""
        position = self.bounded_at[variable]
        if position < 0:
            return []
        table, entries = (
            (self.bounds.upper_rows, self.bounds.upper_coefficient)
            if upper
            else (self.bounds.lower_rows, self.bounds.lower_coefficient)
        )
        return [(int(r), float(a)) for r, a in zip(table[position], entries[position], strict=True) if r >= 0]

    def same_limit(self, variables: IndexArray, upper: bool) -> bool:
        """Whether the variables have one limit each on this side, and the same one for every parameter value."""
        first: tuple[bytes, bytes] | None = None
        for variable in variables:
            limits = self.limit_rows(int(variable), upper)
            if len(limits) != 1:
                return False
            row, entry = limits[0]
            begin, end = self.rhs.indptr[row], self.rhs.indptr[row + 1]
            key = (self.rhs.indices[begin:end].tobytes(), (self.rhs.data[begin:end] / entry).tobytes())
            if first is None:
                first = key
            elif key != first:
                return False
        return True


_NOTHING: IndexArray = np.zeros(0, dtype=np.int64)


def _budget(reader: _Reader, variables: IndexArray, classes: list[_Parallel]) -> _Block | None:
    if len(classes) != 1:
        return None
    (row,) = classes
    coefficients: FloatArray | None = None
    if row.entries is not None:
        # Divide by the first entry, so that the plain sum is recognised in every scaling.
        first = float(row.entries[0])
        row = _Parallel(row.rows, [first * s for s in row.scale], row.columns, row.entries / first)
        assert row.entries is not None
        coefficients = None if np.all(row.entries == 1.0) else row.entries
    equality = any(reader.equality(r) for r in row.rows)
    label = _budget_label(reader, row.columns, coefficients, equality, row.entries is None)
    return _Block(
        "budget", label, (len(row.columns),), row.columns, (row,), _NOTHING, coefficients, None, row.entries is None
    )


def _budget_label(
    reader: _Reader, variables: IndexArray, coefficients: FloatArray | None, equality: bool, varying: bool
) -> str:
    lower = [reader.limit_rows(int(j), False) for j in variables]
    upper = [reader.limit_rows(int(j), True) for j in variables]
    if not any(lower) and not any(upper):
        return "hyperplane" if equality else "half-space"
    at_zero = all(lower) and not any(
        reader.rhs_varying[row] or reader.offset[row] != 0.0 for limits in lower for row, _ in limits
    )
    if equality and coefficients is None and not varying and at_zero:
        if not any(upper):
            return "simplex"
        if all(upper):
            return "capped simplex"
    return "box with a budget"


def _monotone(reader: _Reader, variables: IndexArray, classes: list[_Parallel], kept_rows: IndexArray) -> _Block | None:
    n = len(variables)
    if n < 2 or len(classes) != n - 1:
        return None
    after: dict[int, tuple[int, _Parallel]] = {}
    heads: set[int] = set()
    for row in classes:
        if row.entries is None or len(row.columns) != 2 or row.entries[0] != -row.entries[1]:
            return None
        if any(reader.equality(r) for r in row.rows):
            return None
        positive = [s * row.entries[0] > 0 for s in row.scale]
        if any(p != positive[0] for p in positive):
            return None
        below, above = (0, 1) if positive[0] else (1, 0)
        tail, head = int(row.columns[below]), int(row.columns[above])
        if tail in after or head in heads:
            return None
        scale = [abs(s * row.entries[0]) for s in row.scale]
        order = np.array([tail, head], dtype=np.int64)
        after[tail] = (head, _Parallel(row.rows, scale, order, np.array([1.0, -1.0])))
        heads.add(head)
    starts = [int(j) for j in variables if int(j) not in heads]
    if len(starts) != 1:
        return None
    chain, steps = [starts[0]], []
    while chain[-1] in after:
        head, row = after[chain[-1]]
        chain.append(head)
        steps.append(row)
    if len(chain) != n:
        return None
    path = np.array(chain, dtype=np.int64)
    level = reader.rhs_zero([r for row in steps for r in row.rows], kept_rows)
    ends: list[bool] = []
    for upper, end, others in ((False, path[0], path[1:]), (True, path[-1], path[:-1])):
        elsewhere = [bool(reader.limit_rows(int(j), upper)) for j in others]
        at_end = reader.limit_rows(int(end), upper)
        if any(elsewhere) and not (level and reader.same_limit(path, upper)):
            return None
        if len(at_end) > 1:
            return None
        ends.append(bool(at_end))
    return _Block(
        "monotone", "monotone chain", (n,), path, tuple(steps), _NOTHING, ends=(ends[0], ends[1])
    )  # fmt: skip


def _transport(
    reader: _Reader, variables: IndexArray, classes: list[_Parallel], kept_rows: IndexArray
) -> _Block | None:
    n = len(variables)
    if any(not reader.equality(r) for row in classes for r in row.rows):
        return None
    if any(row.entries is None or np.any(row.entries != row.entries[0]) for row in classes):
        return None
    member: dict[int, list[int]] = {int(j): [] for j in variables}
    for index, row in enumerate(classes):
        for j in row.columns:
            member[int(j)].append(index)
    if any(len(found) != 2 for found in member.values()):
        return None
    # Every row of one kind meets every row of the other kind in one variable.
    columns_side = sorted({other for j in classes[0].columns for other in member[int(j)] if other != 0})
    rows_side = sorted(set(range(len(classes))) - set(columns_side))
    k1, k2 = len(rows_side), len(columns_side)
    if k1 < 2 or k2 < 2 or k1 * k2 != n:
        return None
    place_row = {index: i for i, index in enumerate(rows_side)}
    place_column = {index: i for i, index in enumerate(columns_side)}
    table = np.full((k1, k2), -1, dtype=np.int64)
    for j, (a, b) in member.items():
        if a in place_column:
            a, b = b, a
        if a not in place_row or b not in place_column or table[place_row[a], place_column[b]] >= 0:
            return None
        table[place_row[a], place_column[b]] = j
    for j in variables:
        if not reader.limit_rows(int(j), False):
            return None
    if not _uppers_redundant(reader, table, [classes[i] for i in (*rows_side, *columns_side)], kept_rows):
        return None
    ordered: list[_Parallel] = []
    for index in (*rows_side, *columns_side):
        row = classes[index]
        assert row.entries is not None
        entry = float(row.entries[0])
        ordered.append(_Parallel(row.rows, [entry * s for s in row.scale], row.columns, np.ones(len(row.columns))))
    return _Block("transport", "transport polytope", (k1, k2), table.ravel(), tuple(ordered), _NOTHING)


def _uppers_redundant(reader: _Reader, table: IndexArray, rows: list[_Parallel], kept_rows: IndexArray) -> bool:
    """Whether no variable has an upper limit that non-negativity and the sums do not imply already."""
    if not any(reader.limit_rows(int(j), True) for j in table.ravel()):
        return True
    sums: list[float] = []
    for row in rows:
        at = int(kept_rows[row.rows[0]])
        assert row.entries is not None
        if reader.rhs_varying[at]:
            return False
        sums.append(float(reader.offset[at] / (row.entries[0] * row.scale[0])))
    k1 = table.shape[0]
    for (i, k), j in np.ndenumerate(table):
        for row, _ in reader.limit_rows(int(j), False):
            if reader.rhs_varying[row] or reader.offset[row] != 0.0:
                return False
        for row, entry in reader.limit_rows(int(j), True):
            if reader.rhs_varying[row] or reader.offset[row] / entry < min(sums[i], sums[k1 + k]):
                return False
    return True


def _l1(reader: _Reader, variables: IndexArray, classes: list[_Parallel], kept_rows: IndexArray) -> _Block | None:
    epigraph = variables[reader.flat[variables]]
    points = variables[~reader.flat[variables]]
    n = len(points)
    if not n or len(epigraph) != n or not np.all(reader.free_of_charge[epigraph]):
        return None
    if len(classes) != 2 * n + 1 or np.any(reader.bounded_at[variables] >= 0):
        return None
    total: _Parallel | None = None
    above: dict[int, tuple[int, float, _Parallel]] = {}
    below: dict[int, tuple[int, float, _Parallel]] = {}
    for row in classes:
        if row.entries is None or len(row.rows) != 1 or reader.equality(row.rows[0]):
            return None
        flat = reader.flat[row.columns]
        if np.all(flat):
            if total is not None or len(row.columns) != n or np.any(row.entries <= 0.0):
                return None
            total = row
            continue
        if len(row.columns) != 2 or flat.sum() != 1:
            return None
        (x,), (t,) = row.columns[~flat], row.columns[flat]
        (p,), (q,) = row.entries[~flat], row.entries[flat]
        if q >= 0.0:
            return None
        side = above if p > 0 else below
        if int(x) in side:
            return None
        side[int(x)] = (int(t), float(-q / abs(p)), _Parallel(row.rows, [float(abs(p))], row.columns, row.entries))
    if total is None or total.entries is None or len(above) != n or len(below) != n:
        return None
    auxiliary, factor = np.zeros(n, dtype=np.int64), np.zeros(n)
    for position, x in enumerate(points):
        (t, k, up), (t_below, k_below, down) = above[int(x)], below[int(x)]
        if t != t_below or k != k_below:
            return None
        auxiliary[position], factor[position] = t, k
        # x - y <= k t and y - x <= k t: the two right-hand sides are opposite for every parameter value.
        first, second = kept_rows[up.rows[0]], kept_rows[down.rows[0]]
        opposite = reader.rhs[[first]] / up.scale[0] + reader.rhs[[second]] / down.scale[0]
        if opposite.nnz and np.abs(opposite.data).max() > 0.0:
            return None
    if len(set(auxiliary.tolist())) != n:
        return None
    at = {int(t): float(w) for t, w in zip(total.columns, total.entries, strict=True)}
    weights = np.array([at[int(t)] for t in auxiliary]) / factor
    rows = (total, *(above[int(x)][2] for x in points), *(below[int(x)][2] for x in points))
    return _Block("l1", "l1 ball", (n,), points, rows, auxiliary, weights, factor)


def _general(reader: _Reader, variables: IndexArray, rows: Sequence[int]) -> _Block:
    local = {int(j): i for i, j in enumerate(variables)}
    classes = tuple(_Parallel([row], [1.0], reader.columns(row), None) for row in rows)
    parts = [np.array([local[int(j)] for j in reader.columns(row)], dtype=np.int64).tobytes() for row in rows]
    equal = np.array([reader.equality(row) for row in rows])
    bounded = reader.bounded_at[variables] >= 0
    hessian = sp.csr_array(reader.hessian[variables][:, variables])
    hessian.sort_indices()
    pattern = b"|".join(
        [*parts, equal.tobytes(), bounded.tobytes(), hessian.indices.tobytes(), hessian.indptr.tobytes()]
    )
    return _Block("general", "general block", (len(variables),), variables, classes, _NOTHING, pattern=pattern)


def _recognise(reader: _Reader, variables: IndexArray, rows: list[int], kept_rows: IndexArray) -> _Block:
    hessian = reader.hessian[variables]
    coupled = bool(np.any(np.diff(hessian.indptr) > 1)) or not _on_diagonal(hessian, variables)
    if rows and not coupled:
        classes = reader.parallel(rows)
        if classes is not None:
            if reader.flat[variables].any():
                found = _l1(reader, variables, classes, kept_rows)
            else:
                found = _budget(reader, variables, classes)
                found = found or _monotone(reader, variables, classes, kept_rows)
                found = found or _transport(reader, variables, classes, kept_rows)
            if found is not None:
                return found
    return _general(reader, variables, rows)


def _on_diagonal(hessian: Any, variables: IndexArray) -> bool:
    coo = sp.coo_array(hessian)
    return bool(np.all(variables[coo.coords[0]] == coo.coords[1]))


def _stack(blocks: list[_Block]) -> Group:
    first = blocks[0]
    width = max([1, *(len(row.rows) for block in blocks for row in block.classes)])
    rows = np.full((len(blocks), len(first.classes), width), -1, dtype=np.int64)
    scale = np.ones(rows.shape)
    for g, block in enumerate(blocks):
        for c, row in enumerate(block.classes):
            rows[g, c, : len(row.rows)] = row.rows
            scale[g, c, : len(row.rows)] = row.scale

    def stacked(values: list[FloatArray | None]) -> FloatArray | None:
        return (
            None
            if all(v is None for v in values)
            else np.stack([np.ones(first.shape) if v is None else v for v in values])
        )

    return Group(
        first.family, first.label, first.shape, np.stack([block.variables for block in blocks]),
        np.stack([block.auxiliary for block in blocks]), rows, scale,
        stacked([block.coefficients for block in blocks]), stacked([block.factor for block in blocks]),
        first.varying, first.ends,
    )  # fmt: skip


def find_groups(
    rows: MatrixEntries, num_equalities: int, bounds: Bounds, rhs: AffineMap, hessian_pattern: Any,
    free_of_charge: NDArray[np.bool_],
) -> tuple[Group, ...]:  # fmt: skip
    """Split a reduced program into groups of alike independent blocks.

    Args:
        rows: the rows that are not bounds, equalities first.
        num_equalities: number of equality rows.
        bounds: the bounds.
        rhs: right-hand sides of all rows of the reduced program.
        hessian_pattern: (n, n) boolean scipy matrix of its structure.
        free_of_charge: (n,) variables whose linear cost is zero for every parameter value and that nobody reads.

    Returns:
        The groups, which together hold every variable and every row once; empty when the program is best left whole.
    """
    reader = _Reader(rows, num_equalities, bounds, rhs, hessian_pattern, free_of_charge)
    n = reader.num_variables
    if n == 0 or np.any(np.diff(reader.pattern.indptr) == 0):
        return ()
    links = sp.block_array(
        [[reader.hessian.astype(bool), reader.pattern.astype(bool).T], [reader.pattern.astype(bool), None]]
    )
    _, labels = connected_components(links, directed=False)
    by_label = np.argsort(labels, kind="stable")
    edges = np.flatnonzero(np.diff(labels[by_label], prepend=-1, append=-1))
    blocks: dict[tuple[object, ...], list[_Block]] = {}
    loose: list[int] = []
    for begin, end in pairwise(edges):
        nodes = by_label[begin:end]
        variables = np.sort(nodes[nodes < n]).astype(np.int64)
        own_rows = [int(i) for i in np.sort(nodes[nodes >= n] - n)]
        if not own_rows and len(variables) == 1 and not reader.flat[variables[0]]:
            loose.append(int(variables[0]))
            continue
        block = _recognise(reader, variables, own_rows, bounds.kept_rows)
        sides = tuple(tuple(reader.equality(r) for r in row.rows) for row in block.classes)
        key = (block.family, block.label, block.shape, sides, block.varying, block.ends, block.pattern)
        blocks.setdefault(key, []).append(block)
    groups = [_stack(alike) for alike in blocks.values()]
    if loose:
        bounded = bool(np.any(reader.bounded_at[loose] >= 0))
        variables = np.array([loose], dtype=np.int64)
        empty = np.zeros((1, 0, 1), dtype=np.int64)
        groups.append(
            Group("budget", "box" if bounded else "free variables", (len(loose),), variables,
                  np.zeros((1, 0), dtype=np.int64), empty, np.ones(empty.shape))
        )  # fmt: skip
    whole = len(groups) == 1 and groups[0].family == "general" and groups[0].count == 1
    return () if whole or len(groups) > _MOST_GROUPS else tuple(groups)
