"""Large sparse quadratic programs given by tensors, as a differentiable torch operation.

    minimise   1/2 x'(Q + diag d)x + q'x
    subject to A x = b,   G x <= h,   lower <= x <= upper

Q, A and G are given by their nonzeros: torch tensors in coordinate, compressed row or compressed column storage, or
scipy sparse matrices (constants). Nothing here holds more than O(n + nonzeros) numbers per item: programs are solved by
:mod:`hsbackend.solvers.sparse`, item by item, and differentiated on their face (:mod:`hsbackend.sparse_face`) with one
gradient per nonzero,

    dL/dA_ij = -(nu_i u_j + w_i x_j),   dL/dQ_ij = -1/2 (u_i x_j + x_i u_j)        (see :mod:`hsbackend.differentiate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from hsbackend.families.family import Choice
from hsbackend.program import FloatArray, IndexArray
from hsbackend.solvers import sparse
from hsbackend.solvers.result import Options
from hsbackend.sparse_face import SparseFace
from hsbackend.sparse_program import SparseValues, compressed
from hsbackend.status import SolveError, Status, failure_message

#: Storage that counts as sparse.
_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


def is_sparse(value: Any) -> bool:
    """Whether something is a sparse matrix this module takes."""
    return bool(sp.issparse(value)) or (isinstance(value, Tensor) and value.layout in _LAYOUTS)


def _integers(tensor: Tensor) -> IndexArray:
    """Return indices in main memory; function transforms wrap them without need."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    with torch._C._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        return tensor.cpu().numpy()


def as_tensor(matrix: Any) -> Tensor:
    """Return a sparse matrix as a torch tensor: a scipy matrix becomes a float64 constant in coordinate storage."""
    if isinstance(matrix, Tensor):
        return matrix
    coo = sp.coo_array(sp.csr_array(matrix, dtype=np.float64))
    indices = torch.from_numpy(np.stack(coo.coords).astype(np.int64))
    return torch.sparse_coo_tensor(
        indices, torch.from_numpy(coo.data), coo.shape, is_coalesced=False, check_invariants=False
    ).coalesce()


@dataclass(frozen=True)
class Nonzeros:
    """A matrix by its nonzeros in row order: structure in numpy, values in torch.

    Attributes:
        shape: (rows, columns).
        indptr: (rows + 1,) int32, where a row begins.
        indices: (nnz,) int32, columns, ascending in every row.
        values: (nnz,) floating point; differentiable.
    """

    shape: tuple[int, int]
    indptr: NDArray[np.int32]
    indices: NDArray[np.int32]
    values: Tensor

    @classmethod
    def of(cls, name: str, matrix: Any) -> Nonzeros:
        """Read a torch tensor (sparse, or dense as a full pattern) or a scipy matrix.

        Raises:
            TypeError: for something else, or values that are not floating point.
            ValueError: for a matrix with batch axes, or with an entry given twice in compressed storage.
        """
        if sp.issparse(matrix):
            csr = sp.csr_array(matrix, dtype=np.float64, copy=True)
            csr.sum_duplicates()
            pointers, columns = csr.indptr.astype(np.int32), csr.indices.astype(np.int32)
            return cls((int(csr.shape[0]), int(csr.shape[1])), pointers, columns, torch.from_numpy(csr.data))
        if not isinstance(matrix, Tensor):
            raise TypeError(f"`{name}` is a {type(matrix).__name__}, expected a torch tensor or a scipy sparse matrix")
        if not matrix.is_floating_point():
            raise TypeError(f"`{name}` has dtype {matrix.dtype}, expected a floating-point dtype: call `.double()`")
        if matrix.dim() != 2:
            raise ValueError(
                f"`{name}` has shape {tuple(matrix.shape)}, expected two axes: sparse programs share their matrices in "
                "the batch"
            )
        shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        if matrix.layout == torch.sparse_coo:
            matrix = matrix.coalesce()
            rows, columns = _integers(matrix.indices())
            values = matrix.values()
        elif matrix.layout == torch.sparse_csr:
            begin = _integers(matrix.crow_indices())
            rows = np.repeat(np.arange(shape[0]), np.diff(begin))
            columns, values = _integers(matrix.col_indices()), matrix.values()
        elif matrix.layout == torch.sparse_csc:
            begin = _integers(matrix.ccol_indices())
            columns = np.repeat(np.arange(shape[1]), np.diff(begin))
            rows, values = _integers(matrix.row_indices()), matrix.values()
        elif matrix.layout == torch.strided:
            rows, columns = np.repeat(np.arange(shape[0]), shape[1]), np.tile(np.arange(shape[1]), shape[0])
            values = matrix.reshape(-1)
        else:
            raise TypeError(f"`{name}` has layout {matrix.layout}, expected one of {', '.join(map(str, _LAYOUTS))}")
        key = rows.astype(np.int64) * shape[1] + columns
        if np.any(key[1:] <= key[:-1]):
            order = np.argsort(key, kind="stable")
            rows, columns, key = rows[order], columns[order], key[order]
            values = values[torch.from_numpy(order).to(values.device)]
            if np.any(key[1:] == key[:-1]):
                raise ValueError(f"`{name}` has entries given twice, expected each place once: use coalesced storage")
        indptr = np.zeros(shape[0] + 1, dtype=np.int32)
        np.cumsum(np.bincount(rows, minlength=shape[0]), out=indptr[1:])
        return cls(shape, indptr, columns.astype(np.int32), values)

    @cached_property
    def rows(self) -> IndexArray:
        """(nnz,) the row of every entry."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))

    def check_symmetric(self, name: str) -> None:
        """Refuse a pattern that is not symmetric: half a matrix would be another problem.

        Raises:
            ValueError: if there is an entry (i, j) but none (j, i).
        """
        n = self.shape[0]
        own = self.rows * n + self.indices
        if not np.array_equal(own, np.sort(self.indices.astype(np.int64) * n + self.rows)):
            raise ValueError(
                f"`{name}` has entries (i, j) without (j, i), expected both triangles of a symmetric matrix"
            )


@dataclass(frozen=True)
class Structure:
    """What a sparse program is made of, apart from values.

    Attributes:
        n: variables.
        quadratic: pattern of Q, None for none.
        equalities: pattern of A, None for none.
        inequalities: pattern of G, None for none.
    """

    n: int
    quadratic: Nonzeros | None
    equalities: Nonzeros | None
    inequalities: Nonzeros | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return n, p, m."""
        rows = (0 if part is None else part.shape[0] for part in (self.equalities, self.inequalities))
        return (self.n, *rows)  # pyright: ignore[reportReturnType]

    @cached_property
    def row_pattern(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Row pointers and columns of ``[A; G]``."""
        begin, columns = [np.zeros(1, dtype=np.int32)], [np.zeros(0, dtype=np.int32)]
        for part in (self.equalities, self.inequalities):
            if part is not None:
                begin.append(part.indptr[1:] + begin[-1][-1])
                columns.append(part.indices)
        return np.concatenate(begin), np.concatenate(columns)

    @cached_property
    def diagonal(self) -> IndexArray | None:
        """Columns of the entries of a diagonal Q (empty without Q), None if it has entries off the diagonal."""
        part = self.quadratic
        if part is None:
            return np.zeros(0, dtype=np.int64)
        return part.rows if np.array_equal(part.rows, part.indices) else None


@dataclass
class Call:
    """One solve: what goes in beside tensors, and what derivatives need afterwards.

    Attributes:
        structure: the program.
        options: accuracy and which K.
        strict: whether failing items raise.
        items: one face and solution per item, filled in by the solve.
    """

    structure: Structure
    options: Options
    strict: bool
    items: list[_Item] = field(default_factory=list)

    def values(self, tensors: Sequence[FloatArray | None], item: int) -> SparseValues:
        """Return the numbers of one item; ``tensors`` in the order of :func:`solve`, (nnz,), or (1 or B, size)."""
        quadratic, diagonal, q, equal, b, below, h, lower, upper = tensors
        structure = self.structure
        n, p, m = structure.sizes

        def pick(array: FloatArray | None, size: int, fill: float = 0.0) -> FloatArray:
            if array is None:
                return np.full(size, fill)
            return np.ascontiguousarray(array[item if len(array) > 1 else 0])

        indptr, indices = structure.row_pattern
        entries = np.concatenate([np.zeros(0), *(part for part in (equal, below) if part is not None)])
        rows = compressed(sp.csr_array((entries, indices, indptr), shape=(p + m, n)))
        on_diagonal = pick(diagonal, n)
        if structure.diagonal is None and structure.quadratic is not None:
            part = structure.quadratic
            hessian = compressed(sp.csr_array((quadratic, part.indices, part.indptr), shape=(n, n)))
            if diagonal is not None:
                hessian = compressed(hessian + sp.diags_array(on_diagonal))
        else:
            hessian = on_diagonal
            if quadratic is not None:
                hessian[structure.diagonal] += quadratic
        assert q is not None
        return SparseValues(
            hessian, -pick(q, n), rows, p, np.concatenate([pick(b, p), pick(h, m)]), pick(lower, n, -np.inf),
            pick(upper, n, np.inf),
        )  # fmt: skip


@dataclass(frozen=True)
class _Item:
    result: sparse.SparseResult
    values: SparseValues
    face: SparseFace

    @property
    def solved(self) -> bool:
        return self.result.status == Status.SOLVED


def _arrays(tensors: Sequence[Tensor | None]) -> list[FloatArray | None]:
    return [
        None if tensor is None else tensor.detach().to(device="cpu", dtype=torch.float64).contiguous().numpy()
        for tensor in tensors
    ]


def _batch(arrays: Sequence[FloatArray | None]) -> int:
    sizes = [len(array) for array in arrays if array is not None and array.ndim == 2]
    return next((size for size in sizes if size != 1), 1)


def _run(call: Call, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Solve all items; return x, y, z, z_lower, z_upper and the status."""
    arrays = _arrays(tensors)
    batch = _batch(arrays)
    n, p, m = call.structure.sizes
    call.items.clear()
    x, nu, bounds = np.full((batch, n), np.nan), np.full((batch, p + m), np.nan), np.full((batch, n), np.nan)
    status = np.zeros(batch, dtype=np.int8)
    start: FloatArray | None = None
    for item in range(batch):
        values = call.values(arrays, item)
        result = sparse.solve(values, call.options, start=start)
        call.items.append(_Item(result, values, result.face))
        status[item] = int(result.status)
        if result.status == Status.SOLVED:
            x[item], nu[item], bounds[item] = result.primal, result.rows, result.bounds
    if call.strict and np.any(status != Status.SOLVED):
        raise SolveError(failure_message(status, conflicts(call)), status)
    nu[:, p:] = np.maximum(nu[:, p:], 0.0)
    found = (x, nu[:, :p], nu[:, p:], np.maximum(-bounds, 0.0), np.maximum(bounds, 0.0), status)
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in found)


def conflicts(call: Call) -> dict[int, list[str]]:
    """Return the names of the rows and bounds that conflict, or of the variables that run off, by item."""
    _, p, m = call.structure.sizes
    found: dict[int, list[str]] = {}
    for item, each in enumerate(call.items):
        result = each.result
        if result.status == Status.INFEASIBLE:
            rows = [f"row {i} of A" if i < p else f"row {i - p} of G" for i in np.flatnonzero(result.rows)[: p + m]]
            for j in np.flatnonzero(result.bounds):
                rows.append(f"the {'upper' if result.bounds[j] > 0.0 else 'lower'} bound of x[{j}]")
            found[item] = rows
        elif result.status == Status.UNBOUNDED and result.ray is not None:
            size = np.abs(result.ray)
            found[item] = [f"x[{j}]" for j in np.flatnonzero(size > 1e-9 * size.max(initial=0.0))]
    return found


def _sizes(call: Call) -> tuple[int, int, int]:
    return call.structure.sizes


def _pull_back(
    call: Call, cotangents: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...] | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs; None where nothing was given or wanted."""
    n, p, m = _sizes(call)
    arrays = _arrays(cotangents)
    out = [np.zeros(shape) if shape is not None and want else None for shape, want in zip(shapes, wanted, strict=True)]
    structure = call.structure
    for item, each in enumerate(call.items):
        g, gy, gz, gl, gu = (None if array is None else array[item] for array in arrays[:5])
        parts = [part for part in (g, gy, gz, gl, gu) if part is not None]
        if not any(part.any() for part in parts):
            continue
        if not each.solved:
            for array in out:
                if array is not None:
                    array[item if array.ndim == 2 and len(array) > 1 else ...] = np.nan
            continue
        rhs_rows = np.zeros(p + m)
        if gy is not None:
            rhs_rows[:p] = gy
        if gz is not None:
            rhs_rows[p:] = gz
        side = each.face.bounds
        rhs_bounds = np.zeros(n)
        if gu is not None:
            rhs_bounds[side > 0] = gu[side > 0]
        if gl is not None:
            rhs_bounds[side < 0] = -gl[side < 0]
        u, w, pull = each.face.kkt_solve(np.zeros(n) if g is None else np.ascontiguousarray(g), rhs_rows, rhs_bounds)
        x, nu = each.result.primal, each.result.rows
        found = (
            None if structure.quadratic is None else _quadratic(structure.quadratic, u, x),
            -u * x, -u,
            None if structure.equalities is None else _bilinear(structure.equalities, nu[:p], u, w[:p], x),
            w[:p],
            None if structure.inequalities is None else _bilinear(structure.inequalities, nu[p:], u, w[p:], x),
            w[p:], np.where(side < 0, pull, 0.0), np.where(side > 0, pull, 0.0),
        )  # fmt: skip
        for array, part in zip(out, found, strict=True):
            if array is not None and part is not None:
                array[item if array.ndim == 2 and len(array) > 1 else ...] += part
    return tuple(None if array is None else torch.from_numpy(array) for array in out)


def _bilinear(part: Nonzeros, nu: FloatArray, u: FloatArray, w: FloatArray, x: FloatArray) -> FloatArray:
    return -(nu[part.rows] * u[part.indices] + w[part.rows] * x[part.indices])


def _quadratic(part: Nonzeros, u: FloatArray, x: FloatArray) -> FloatArray:
    return -0.5 * (u[part.rows] * x[part.indices] + x[part.rows] * u[part.indices])


def _push_forward(call: Call, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return the tangents of x, y, z, z_lower, z_upper: the KKT system on the face with differentiated data."""
    n, p, m = _sizes(call)
    arrays = _arrays(tangents)
    indptr, indices = call.structure.row_pattern
    none = [np.zeros(n), np.zeros(p + m), np.zeros(n)]
    found: list[list[FloatArray]] = []
    for item, each in enumerate(call.items):
        if not each.solved:
            found.append([np.full_like(part, np.nan) for part in none])
            continue
        quadratic, diagonal, q, equal, b, below, h, lower, upper = (
            None if array is None else array[item if array.ndim == 2 and len(array) > 1 else ...].reshape(-1)
            for array in arrays
        )
        x, nu = each.result.primal, each.result.rows
        rhs, right, limits = (part.copy() for part in none)
        part = call.structure.quadratic
        if quadratic is not None and part is not None:
            rhs -= sp.csr_array((quadratic, part.indices, part.indptr), shape=(n, n)) @ x
        if diagonal is not None:
            rhs -= diagonal * x
        if q is not None:
            rhs -= q
        if equal is not None or below is not None:
            sizes = (part.values.numel() if part is not None else 0
                     for part in (call.structure.equalities, call.structure.inequalities))  # fmt: skip
            entries = np.concatenate([
                np.zeros(size) if tangent is None else tangent
                for size, tangent in zip(sizes, (equal, below), strict=True)
            ])  # fmt: skip
            turned = sp.csr_array((entries, indices, indptr), shape=(p + m, n))
            rhs -= turned.T @ nu
            right -= turned @ x
        for place, tangent in ((slice(0, p), b), (slice(p, p + m), h)):
            if tangent is not None:
                right[place] += tangent
        side = each.face.bounds
        for active, tangent in ((side > 0, upper), (side < 0, lower)):
            if tangent is not None:
                limits[active] = tangent[active]
        u, w, pull = each.face.kkt_solve(rhs, right, limits)
        found.append([u, w, pull])
    x, nu, bounds = (np.stack([each[place] for each in found]) for place in range(3))
    sides = np.stack([each.face.bounds for each in call.items])
    parts = (x, nu[:, :p], nu[:, p:], np.where(sides < 0, -bounds, 0.0), np.where(sides > 0, bounds, 0.0))
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in parts)


_ONCE = "derivatives of sparse programs are of first order: use dense tensors for a second one"


class _Adjoint(torch.autograd.Function):
    """The backward pass as an operation of its own, so that function transforms can unwrap what goes in.

    The tensors of the program go in behind the cotangents: a second derivative finds them, and is refused.
    """

    @staticmethod
    def forward(call: Call, shapes: Any, wanted: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _pull_back(call, cotangents[:5], shapes, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, shapes: Any, wanted: Any, *cotangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve once per direction."""
        found: list[tuple[Tensor | None, ...]] = []
        for k in range(info.batch_size):
            own = [
                part if part is None or axis is None else part.select(axis, k)
                for part, axis in zip(cotangents[:5], in_dims[3:8], strict=True)
            ]
            found.append(_pull_back(call, own, shapes, wanted))
        stacked = tuple(
            None if parts[0] is None else torch.stack([part for part in parts if part is not None])
            for parts in zip(*found, strict=True)
        )
        return stacked, tuple(None if part is None else 0 for part in stacked)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(_ONCE)


class _Tangent(torch.autograd.Function):
    """The forward-mode derivative as an operation of its own."""

    @staticmethod
    def forward(call: Call, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _push_forward(call, tangents)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(_ONCE)


class _Solve(torch.autograd.Function):
    """Tensors in, solution out."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _run(call, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the call, and the tensors so that autograd notices changes in place."""
        call, *tensors = inputs
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[5])
        ctx.save_for_backward(*tensors)
        ctx.like = [
            None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors
        ]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the rule at the top of this module."""
        saved = ctx.saved_tensors
        shapes = [None if like is None else like[0] for like in ctx.like]
        found = _Adjoint.apply(ctx.call, shapes, ctx.needs_input_grad[1:], *cotangents[:5], *saved)
        gradients = [
            None if gradient is None or like is None else gradient.to(dtype=like[1], device=like[2])
            for gradient, like in zip(found, ctx.like, strict=True)
        ]
        return (None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve the differentiated KKT system."""
        return (*_Tangent.apply(ctx.call, *tangents[1:]), None)


@dataclass(frozen=True)
class SparseData:
    """The tensors of a batch of sparse programs.

    Attributes:
        structure: patterns.
        quadratic: (nnz,) values of Q, None without.
        diagonal: (1 or B, n) d, None without.
        q: (1 or B, n).
        equal: (nnz,) values of A, None without.
        b: (1 or B, p).
        below: (nnz,) values of G, None without.
        h: (1 or B, m), may hold inf.
        lower: (1 or B, n), may hold -inf; None for none.
        upper: (1 or B, n), may hold inf; None for none.
    """

    structure: Structure
    quadratic: Tensor | None
    diagonal: Tensor | None
    q: Tensor
    equal: Tensor | None
    b: Tensor | None
    below: Tensor | None
    h: Tensor | None
    lower: Tensor | None
    upper: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of the derivative's arguments."""
        return (
            self.quadratic, self.diagonal, self.q, self.equal, self.b, self.below, self.h, self.lower, self.upper
        )  # fmt: skip


def solve(
    data: SparseData, batch: int, tolerance: float, jacobian: Choice, strict: bool
) -> tuple[tuple[Tensor, ...], Call]:
    """Solve a batch of sparse programs.

    Args:
        data: the programs.
        batch: number of items; data without batch axes are shared.
        tolerance: largest accepted KKT residual, relative to the data.
        jacobian: which K.
        strict: whether failing items raise.

    Returns:
        x (B, n), y (B, p), z (B, m), z_lower (B, n), z_upper (B, n) and the status (B,), differentiable but for the
        last; and the call, which knows faces and certificates.

    Raises:
        SolveError: if an item fails and ``strict``.
    """
    q = data.q if len(data.q) == batch else data.q.expand(batch, -1)
    call = Call(data.structure, Options(tolerance, jacobian), strict)
    tensors = list(data.tensors)
    tensors[2] = q
    return _Solve.apply(call, *tensors), call


def residuals(call: Call, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest violation of a constraint, of stationarity, and product of slack and multiplier, (B,) each."""
    x, y, z, below, above = (tensor.detach().numpy() for tensor in outputs[:5])
    _, p, _ = _sizes(call)
    found = np.zeros((len(x), 3))
    for item, each in enumerate(call.items):
        values = each.values
        nu = np.concatenate([y[item], z[item]])
        bounds = above[item] - below[item]
        gap = values.rows @ x[item] - values.rhs_rows
        dual = values.times_hessian(x[item]) - values.rhs_primal + values.rows.T @ nu + bounds
        outside = np.maximum(values.lower - x[item], x[item] - values.upper)
        primal = np.concatenate([np.abs(gap[:p]), gap[p:], outside, np.zeros(1)])
        slacks = (
            (-gap[p:], z[item]), (x[item] - values.lower, below[item]), (values.upper - x[item], above[item])
        )  # fmt: skip
        products = [np.abs(np.where(np.isinf(slack), 0.0, slack) * held) for slack, held in slacks]
        found[item] = (
            max(0.0, primal.max()), np.abs(dual).max(initial=0.0), np.concatenate(products).max(initial=0.0)
        )  # fmt: skip
        if not each.solved:
            found[item] = np.nan
    primal, dual, complementarity = torch.from_numpy(found).unbind(1)
    return primal, dual, complementarity


def active(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows of G, lower and upper bounds hold with equality, (B, m), (B, n), (B, n) bool."""
    n, p, m = _sizes(call)
    rows, below, above = np.zeros((len(call.items), m), dtype=bool), *np.zeros((2, len(call.items), n), dtype=bool)
    options = replace(call.options, jacobian="active")
    for item, each in enumerate(call.items):
        if each.solved:
            result = each.result
            held, side = sparse.active_sides(each.values, result.primal, result.rows, result.bounds, options)
            rows[item] = held[p:]
            fixed = each.values.lower == each.values.upper
            below[item], above[item] = (side < 0) | fixed, (side > 0) | fixed
    return torch.from_numpy(rows), torch.from_numpy(below), torch.from_numpy(above)


def certificates(call: Call) -> tuple[Tensor, ...]:
    """Return multipliers of A, G, lower and upper of infeasible items and rays of unbounded ones; zero elsewhere."""
    n, p, m = _sizes(call)
    found = [np.zeros((len(call.items), size)) for size in (p, m, n, n, n)]
    for item, each in enumerate(call.items):
        result = each.result
        if result.status == Status.INFEASIBLE:
            rows, bounds = result.rows, result.bounds
            below, above = np.maximum(-bounds, 0.0), np.maximum(bounds, 0.0)
            crossing = (each.values.lower > each.values.upper) & (bounds != 0.0)
            below[crossing] = above[crossing] = 1.0
            size = max(float(np.abs(part).max(initial=0.0)) for part in (rows, below, above))
            for array, part in zip(found[:4], (rows[:p], rows[p:], below, above), strict=True):
                array[item] = part / size if size else 0.0
        elif result.status == Status.UNBOUNDED and result.ray is not None:
            found[4][item] = result.ray / (np.abs(result.ray).max(initial=0.0) or 1.0)
    return tuple(torch.from_numpy(array) for array in found)


def non_unique(call: Call) -> Tensor:
    """Return (B,) bool: whether an item has other optima."""
    return torch.tensor([each.solved and each.result.non_unique for each in call.items], dtype=torch.bool)
