"""The quadratic program: its structure, apart from its values.

Everything in this library solves one problem,

    minimise   1/2 x'Qx + q'x
    subject to A x = b        for the first ``num_equalities`` rows     (multipliers nu, free)
               A x <= b       for the remaining rows                    (multipliers nu >= 0)

with stationarity ``Q x + q + A'nu = 0``. Bounds are rows with one entry; :mod:`hsbackend.reduce` finds them.
Every entry of ``Q, q, A, b`` is an affine function of a parameter vector ``p``: a constant entry has no
parameter in it, so "constant", "shared by the batch" and "given per item" are properties of the maps and of
the tensors that arrive, not special cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from hsbackend._parallel import compile_kernel, for_each_item

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]


@compile_kernel
def _accumulate(start: int, stop: int, step: int, indptr, indices, data, targets, factor, source, out):  # type: ignore[no-untyped-def]
    """Add ``factor M @ source[b]`` to ``out[b, targets]`` for a compressed sparse row matrix M."""
    for b in range(start, stop, step):
        for row in range(targets.shape[0]):
            total = 0.0
            for k in range(indptr[row], indptr[row + 1]):
                total += data[k] * source[b, indices[k]]
            out[b, targets[row]] += factor * total


@compile_kernel
def _gather(start: int, stop: int, step: int, indices, data, targets, factor, source, out):  # type: ignore[no-untyped-def]
    """The same for a matrix with one entry per stored row."""
    for b in range(start, stop, step):
        for k in range(targets.shape[0]):
            out[b, targets[k]] += factor * data[k] * source[b, indices[k]]


@compile_kernel
def _add_straight(start: int, stop: int, step: int, column: int, row: int, count: int, entry, factor, source, out):  # type: ignore[no-untyped-def]
    """The same for a multiple of a piece of the identity, which needs no index."""
    for b in range(start, stop, step):
        s = source[b, column : column + count]
        t = out[b, row : row + count]
        for k in range(count):
            t[k] += factor * entry * s[k]


def as_slice(index: IndexArray) -> slice | IndexArray:
    """Return a slice where the indices are consecutive: a view instead of a gather."""
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return slice(int(index[0]), int(index[0]) + len(index))
    return index


@dataclass(frozen=True)
class SparseOperator:
    """A constant sparse matrix ``M`` (rows, columns) applied to every item of a batch.

    Only rows with an entry are stored, so that adding a few entries to a large array costs a few entries.
    """

    shape: tuple[int, int]
    indptr: IndexArray
    indices: IndexArray
    data: FloatArray
    targets: IndexArray

    @classmethod
    def build(cls, matrix: Any) -> SparseOperator:
        """Compress a scipy sparse matrix."""
        csr = sp.csr_array(matrix, dtype=np.float64)
        csr.sum_duplicates()
        csr.eliminate_zeros()
        counts = np.diff(csr.indptr)
        targets = np.flatnonzero(counts).astype(np.int64)
        indptr = np.concatenate([[0], np.cumsum(counts[targets])]).astype(np.int64)
        shape = (int(csr.shape[0]), int(csr.shape[1]))
        return cls(shape, indptr, csr.indices.astype(np.int64), np.ascontiguousarray(csr.data), targets)

    def add_to(self, source: FloatArray, out: FloatArray) -> None:
        """Compute ``out[b] += M @ source[b]``; ``source`` (B, columns) and ``out`` (B, rows), both contiguous."""
        self._add_to(source, out, 1.0)

    def subtract_from(self, source: FloatArray, out: FloatArray) -> None:
        """Compute ``out[b] -= M @ source[b]``."""
        self._add_to(source, out, -1.0)

    def _add_to(self, source: FloatArray, out: FloatArray, factor: float) -> None:
        if not len(self.targets):
            return
        work = float(len(self.data))
        if self._straight is not None:
            for_each_item(_add_straight, out.shape[0], work, *self._straight, factor, source, out)
        elif len(self.data) == len(self.targets):
            gather = (self.indices, self.data, self.targets, factor, source, out)
            for_each_item(_gather, out.shape[0], work, *gather)
        else:
            arguments = (self.indptr, self.indices, self.data, self.targets, factor, source, out)
            for_each_item(_accumulate, out.shape[0], work, *arguments)

    @cached_property
    def _straight(self) -> tuple[int, int, int, float] | None:
        """First column, first row, length and entry of a multiple of a piece of the identity; None for the rest."""
        k = len(self.targets)
        if len(self.data) != k or not isinstance(as_slice(self.targets), slice):
            return None
        if not isinstance(as_slice(self.indices), slice) or np.ptp(self.data) != 0.0:
            return None
        return int(self.indices[0]), int(self.targets[0]), k, float(self.data[0])

    def apply(self, source: FloatArray) -> FloatArray:
        """Return ``M @ source[b]`` for every item, (B, rows)."""
        out = np.zeros((source.shape[0], self.shape[0]))
        self.add_to(source, out)
        return out


class AffineMap:
    """Values that are affine functions of the parameters: ``values = M p + offset``.

    Args:
        matrix: (k, P + 1) sparse; the last column is the offset.
        parameter_sizes: sizes of the parameter tensors whose flattened entries make up ``p``.
    """

    def __init__(self, matrix: Any, parameter_sizes: Sequence[int]) -> None:
        """Split the map by parameter, so that a call touches only what it was given."""
        total = int(sum(parameter_sizes))
        csc = sp.csc_array(matrix, dtype=np.float64)
        if csc.shape[1] != total + 1:
            raise ValueError(f"the map has {csc.shape[1]} columns, expected {total + 1}: the parameters and an offset")
        csc.sum_duplicates()
        csc.eliminate_zeros()
        self.matrix = csc
        self.size = int(csc.shape[0])
        self.parameter_sizes = tuple(int(size) for size in parameter_sizes)
        self.offset: FloatArray = csc[:, [total]].toarray().ravel()
        #: The parameter whose values these are, unchanged and in order, or None.
        self.identity: int | None = None
        edges = np.concatenate([[0], np.cumsum(self.parameter_sizes)]).astype(int)
        self.blocks: dict[int, SparseOperator] = {}
        for index, (begin, end) in enumerate(pairwise(edges)):
            block = csc[:, begin:end]
            if block.nnz:
                self.blocks[index] = SparseOperator.build(block)
        touched = np.zeros(self.size, dtype=np.int64)
        for block in self.blocks.values():
            touched[block.targets] += 1
        self._summed = bool(np.any(touched > 1))  # some value depends on several parameters
        if len(self.blocks) == 1 and not self.offset.any():
            ((index, block),) = self.blocks.items()
            same = block.shape == (self.size, self.size) and len(block.data) == self.size and np.all(block.data == 1.0)
            if same and np.array_equal(block.indices, np.arange(self.size)):
                self.identity = index

    @property
    def constant(self) -> bool:
        """Whether no parameter enters."""
        return not self.blocks

    @property
    def varying(self) -> NDArray[np.bool_]:
        """(k,) whether an entry depends on a parameter."""
        mask = np.zeros(self.size, dtype=bool)
        for block in self.blocks.values():
            mask[block.targets] = True
        return mask

    def take(self, entries: Any) -> AffineMap:
        """Return the map of a selection of the values."""
        return AffineMap(sp.csr_array(self.matrix)[entries], self.parameter_sizes)

    def evaluate(self, parameters: Sequence[FloatArray], batch: int | None = None) -> FloatArray:
        """Evaluate the map.

        Args:
            parameters: one (B, size) or (1, size) array per parameter.
            batch: number of rows of the result; by default 1 unless a batched parameter enters.

        Returns:
            (batch, k) contiguous; the parameter's own array, not a copy, where the map is the identity.
        """
        if self.identity is not None and parameters[self.identity].shape[0] == (
            batch or parameters[self.identity].shape[0]
        ):
            return parameters[self.identity]
        rows = batch or max((parameters[index].shape[0] for index in self.blocks), default=1)
        shared = self.offset[None].copy()
        left = list(self.blocks)
        for index in self.blocks:
            if parameters[index].shape[0] == 1:
                self.blocks[index].add_to(parameters[index], shared)
                left.remove(index)
            elif self._summed:  # a sum has the order of the parameters, whichever of them are batched
                break
        if rows == 1:
            return shared
        out = np.empty((rows, self.size))
        out[:] = shared
        for index in left:
            source = parameters[index]
            self.blocks[index].add_to(source if source.shape[0] == rows else np.repeat(source, rows, axis=0), out)
        return out


@dataclass(frozen=True)
class MatrixEntries:
    """A sparse matrix whose entries are affine in the parameters.

    Attributes:
        shape: (rows, columns).
        rows: (nnz,) row of each entry.
        columns: (nnz,) column of each entry.
        values: map of the nnz values.
    """

    shape: tuple[int, int]
    rows: IndexArray
    columns: IndexArray
    values: AffineMap

    @property
    def constant(self) -> bool:
        """Whether no parameter enters the matrix."""
        return self.values.constant

    def constant_part(self) -> Any:
        """Return the entries that hold no parameter as a scipy matrix."""
        keep = ~self.values.varying
        data = (self.values.offset[keep], (self.rows[keep], self.columns[keep]))
        return sp.csr_array(sp.coo_array(data, shape=self.shape))

    def pattern(self) -> Any:
        """Return the structural non-zeros: entries that vary or are a non-zero constant, as a boolean matrix."""
        keep = self.values.varying | (self.values.offset != 0.0)
        data = (np.ones(int(keep.sum()), dtype=bool), (self.rows[keep], self.columns[keep]))
        return sp.csr_array(sp.coo_array(data, shape=self.shape))

    def select(
        self, entries: IndexArray, rows: IndexArray, columns: IndexArray, shape: tuple[int, int]
    ) -> MatrixEntries:
        """Keep some entries and give them new places."""
        return MatrixEntries(shape, rows, columns, self.values.take(entries))

    @cached_property
    def _dense_map(self) -> AffineMap:
        coo = sp.coo_array(self.values.matrix)
        flat = (self.rows * self.shape[1] + self.columns)[coo.coords[0]]
        size = self.shape[0] * self.shape[1]
        matrix = sp.csc_array(sp.coo_array((coo.data, (flat, coo.coords[1])), shape=(size, coo.shape[1])))
        return AffineMap(matrix, self.values.parameter_sizes)

    def dense(self, parameters: Sequence[FloatArray]) -> FloatArray:
        """Evaluate as dense matrices, (B, rows, columns) or (1, rows, columns); equal places add up."""
        flat = self._dense_map.evaluate(parameters)
        return flat.reshape(flat.shape[0], *self.shape)


@dataclass(frozen=True)
class Program:
    """Structure of a parametrised quadratic program (the problem at the top of this module).

    Attributes:
        num_variables: n.
        num_equalities: rows ``[0, num_equalities)`` of ``matrix`` are equalities, the others ``<=``.
        quadratic: Q (n, n), both triangles.
        linear: q (n,).
        matrix: A (m, n).
        rhs: b (m,).
        outputs: (n,) variables whose value somebody reads; the others are auxiliary.
        row_names: (m,) names for messages.
    """

    num_variables: int
    num_equalities: int
    quadratic: MatrixEntries
    linear: AffineMap
    matrix: MatrixEntries
    rhs: AffineMap
    outputs: NDArray[np.bool_]
    row_names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows m of A."""
        return self.matrix.shape[0]

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return self.linear.parameter_sizes


@dataclass(frozen=True)
class QPValues:
    """Numbers of one batch of reduced problems, ready for a solver.

        minimise 1/2 x'Hx - a'x   subject to   N x = h (first num_equalities rows), N x <= h, lower <= x_j <= upper

    A leading dimension of 1 means "the same for every item".

    Attributes:
        hessian: (1 or B, n, n), or (1 or B, n) for a diagonal H.
        rhs_primal: (B, n) the vector a = -q.
        rows: (1 or B, m, n) the matrix N.
        num_equalities: number of equality rows.
        rhs_rows: (B, m) the vector h.
        bounded: (nb,) variables with limits.
        lower: (B, nb), may hold -inf.
        upper: (B, nb), may hold inf.
        proximal: (ns,) auxiliary variables without curvature, solved by proximal steps.
        given_once: whether the hessian and the rows were given once for all items, so that one factorisation serves
            them all. A batch of one has a leading dimension of 1 either way, and an item alone must be solved like the
            same item in a batch. None where a leading dimension of 1 has that one meaning.
    """

    hessian: FloatArray
    rhs_primal: FloatArray
    rows: FloatArray
    num_equalities: int
    rhs_rows: FloatArray
    bounded: IndexArray
    lower: FloatArray
    upper: FloatArray
    proximal: IndexArray
    given_once: bool | None = None

    @property
    def shared(self) -> bool:
        """Whether one factorisation serves all items; the answers of a solver may depend on it by rounding."""
        return self.hessian.shape[0] == 1 and self.rows.shape[0] == 1 and self.given_once is not False

    @property
    def batch(self) -> int:
        """Number of items B."""
        return int(self.rhs_primal.shape[0])

    @property
    def num_variables(self) -> int:
        """Number of variables n."""
        return int(self.rhs_primal.shape[1])

    @property
    def diagonal(self) -> bool:
        """Whether the Hessian is given by its diagonal."""
        return self.hessian.ndim == 2

    def take(self, items: IndexArray) -> QPValues:
        """Return the problems of some items."""

        def pick(array: FloatArray) -> FloatArray:
            return array if array.shape[0] == 1 and self.batch != 1 else np.ascontiguousarray(array[items])

        return QPValues(
            pick(self.hessian),
            np.ascontiguousarray(self.rhs_primal[items]),
            pick(self.rows),
            self.num_equalities,
            np.ascontiguousarray(self.rhs_rows[items]),
            self.bounded,
            np.ascontiguousarray(self.lower[items]),
            np.ascontiguousarray(self.upper[items]),
            self.proximal,
            self.shared,
        )
