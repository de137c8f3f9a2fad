"""A least-squares problem as it is given, read into flat vectors: which kind of A it is, shapes, dtypes, trees.

The only place that knows the kinds of A that :func:`hsbackend.lstsq` takes, and refuses what does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from hsbackend.linear_maps import DenseMap, FunctionMap, HostMap, LinearMap, SparseMap, Tree, function_map
from hsbackend.operators import dual_level_open, transforms_active


class Problem(NamedTuple):
    """A problem on flat vectors.

    Attributes:
        map: A.
        parameters: of A.
        b: (*batch, m).
        x_tree: how x lies flat.
        y_tree: how b lies flat.
        products: with A that were spent to check it.
    """

    map: LinearMap
    parameters: list[Tensor]
    b: Tensor
    x_tree: Tree
    y_tree: Tree
    products: int = 0

    @property
    def batch(self) -> torch.Size:
        """Batch axes."""
        return self.b.shape[:-1]

    def vector(self, value: Any, name: str) -> Tensor:
        """Return something like x, or that broadcasts against it, as a flat vector (*batch, n)."""
        for leaf in pytree.tree_leaves(value):
            _check_like(name, leaf, self.b)
        return self.x_tree.spread(value, f"`{name}`", self.batch)


def read_damping(damp: Any, problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Return damping by one number per item, (*batch,), or by one per coordinate, (*batch, n), or neither."""
    batch, b = problem.batch, problem.b
    if isinstance(damp, (int, float)):
        if not 0.0 <= damp < math.inf:
            raise ValueError(f"damp={damp!r}, expected a finite number that is not negative")
        return (b.new_full(batch, float(damp)) if damp else None), None
    if not isinstance(damp, Tensor):
        return None, problem.vector(damp, "damp")
    _check_like("damp", damp, b)
    shapes = problem.x_tree.shapes
    axes = len(shapes[0]) if len(shapes) == 1 else 0
    per_item = damp.dim() == 0 or (
        damp.dim() >= axes and all(length == 1 for length in damp.shape[damp.dim() - axes :])
    )
    if not per_item:
        return None, problem.vector(damp, "damp")
    number = damp if damp.dim() == 0 else damp.reshape(damp.shape[: damp.dim() - axes])
    try:
        return number.expand(batch), None
    except RuntimeError:
        wanted = (*batch, *(1,) * axes)
        raise ValueError(f"`damp` has shape {tuple(damp.shape)}, expected {wanted}: one number per item") from None


def read_preconditioner(
    preconditioner: Any, problem: Problem
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the products with P and P' on flat vectors."""
    apply, transpose = preconditioner, None
    if isinstance(preconditioner, tuple) and len(preconditioner) == 2 and all(map(callable, preconditioner)):
        apply, transpose = preconditioner
    elif not callable(preconditioner):
        diagonal = problem.vector(preconditioner, "preconditioner").detach()
        return (lambda x: diagonal * x), (lambda x: diagonal * x)
    found, parameters = function_map(apply, transpose, problem.x_tree, problem.x_tree, ())
    return (lambda x: found.matvec(x, parameters)), (lambda x: found.vecmat(x, parameters))


def read_problem(A: Any, b: Any, params: Sequence[Any], x_like: Any, batch_dims: int) -> Problem:
    """Read what :func:`hsbackend.lstsq` is given.

    Raises:
        TypeError: for an A of a kind that is not known, or dtypes that do not fit.
        ValueError: for shapes that do not fit.
    """
    if isinstance(A, tuple) and len(A) == 2 and callable(A[0]) and callable(A[1]):
        return _read_functions(A[0], A[1], b, params, x_like, batch_dims)
    shaped = hasattr(A, "shape")
    if callable(A) and not shaped:
        return _read_functions(A, None, b, params, x_like, batch_dims)
    if not shaped or not hasattr(A, "dot"):
        raise TypeError(
            f"`A` is a {type(A).__name__}, expected a tensor, a scipy sparse matrix or LinearOperator, a function "
            "matvec(x, *params) or a pair of functions (matvec, vecmat)"
        )
    for name, given in (("params", len(params) > 0), ("x_like", x_like is not None), ("batch_dims", batch_dims != 0)):
        if given:
            raise ValueError(f"`{name}` was given with a matrix: it belongs to functions, leave it out")
    _check_leaf("b", b)
    if b.dim() == 0:
        raise ValueError("`b` has no axes, expected shape (..., m), one entry per row of `A`")
    matrix: Any = A
    shape = tuple(matrix.shape)
    if len(shape) < 2 or shape[-2] != b.shape[-1]:
        raise ValueError(
            f"`A` has shape {shape}, expected (..., {b.shape[-1]}, n): as many rows as `b` of shape {tuple(b.shape)} "
            "has entries"
        )
    return _read_tensor(matrix, b) if isinstance(matrix, Tensor) else _read_host(matrix, b)


def _read_tensor(matrix: Tensor, b: Tensor) -> Problem:
    """Read a problem with a dense or sparse tensor."""
    _check_like("A", matrix, b)
    shape = tuple(matrix.shape)
    m, n = shape[-2:]
    if matrix.layout != torch.strided:
        if len(shape) != 2 or matrix.dense_dim():
            raise ValueError(f"the sparse `A` has shape {shape}, expected (m, n): one matrix, shared by the batch")
        row, column, values = _entries(matrix)
        return Problem(SparseMap(m, n, row, column), [values], b, Tree.vector(n), Tree.vector(m))
    try:
        batch = torch.broadcast_shapes(shape[:-2], b.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"the batch axes of `A` of shape {shape} and `b` of shape {tuple(b.shape)} do not broadcast"
        ) from None
    if len(shape) > 2:
        matrix = matrix.reshape(*(1,) * (len(batch) + 2 - len(shape)), *shape)
    return Problem(DenseMap(m, n), [matrix], b.expand(*batch, m), Tree.vector(n), Tree.vector(m))


def _read_host(matrix: Any, b: Tensor) -> Problem:
    """Read a problem with a matrix or an operator of scipy."""
    m, n = matrix.shape
    dtype = np.dtype(float if matrix.dtype is None else matrix.dtype)
    if dtype.kind == "c":
        raise TypeError(f"`A` has dtype {dtype}, expected real numbers: split them in real and imaginary")
    if not sparse.issparse(matrix):
        if not hasattr(matrix, "rmatvec"):
            raise TypeError(f"`A` is a {type(matrix).__name__}: give a tensor, for instance torch.as_tensor(A)")
        if b.device.type != "cpu":
            raise ValueError(
                f"`A` is a {type(matrix).__name__} of the CPU, and `b` is on {b.device}: move `b`, or give functions "
                "of torch operations"
            )
        return Problem(HostMap(m, n, matrix), [], b, Tree.vector(n), Tree.vector(m))
    entries = sparse.coo_array(matrix)
    row, column = (torch.as_tensor(np.asarray(index, dtype=np.int64), device=b.device) for index in entries.coords)
    values = torch.as_tensor(np.asarray(entries.data)).to(b)
    return Problem(SparseMap(m, n, row, column), [values], b, Tree.vector(n), Tree.vector(m))


def _entries(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, columns and values of a sparse tensor; the values are differentiable."""
    if matrix.layout == torch.sparse_coo:
        matrix = matrix.coalesce()
        row, column = matrix.indices()
        return row, column, matrix.values()
    if matrix.layout == torch.sparse_csr:
        compressed, plain = matrix.crow_indices(), matrix.col_indices()
    elif matrix.layout == torch.sparse_csc:
        compressed, plain = matrix.ccol_indices(), matrix.row_indices()
    else:
        raise TypeError(f"`A` has layout {matrix.layout}, expected strided, sparse_coo, sparse_csr or sparse_csc")
    plain = plain.to(torch.int64)
    line = torch.arange(len(compressed) - 1, device=matrix.device)
    expanded = torch.repeat_interleave(line, compressed.diff().to(torch.int64))
    if matrix.layout == torch.sparse_csr:
        return expanded, plain, matrix.values()
    return plain, expanded, matrix.values()


def _read_functions(
    matvec: Callable[..., Any], vecmat: Callable[..., Any] | None, b: Any, params: Sequence[Any], x_like: Any,
    batch_dims: int,
) -> Problem:  # fmt: skip
    """Read a problem given by functions."""
    if batch_dims != int(batch_dims) or batch_dims < 0:
        raise ValueError(f"batch_dims={batch_dims!r}, expected the number of batch axes, 0 or more")
    _check_tree("b", b, batch_dims)
    products = 1
    if x_like is None:
        if vecmat is None:
            raise ValueError("`A` is a function and `x_like` is missing: give a tensor or a tree of tensors like x")
        with torch.no_grad():
            x_like = vecmat(b, *params)
    _check_tree("x_like", x_like, batch_dims)
    x_tree, y_tree = Tree.of(x_like, batch_dims), Tree.of(b, batch_dims)
    first = pytree.tree_leaves(b)[0]
    batch = first.shape[:batch_dims]
    for name, tree in (("b", b), ("x_like", x_like)):
        for leaf in pytree.tree_leaves(tree):
            _check_like(name, leaf, first)
            if leaf.shape[:batch_dims] != batch:
                raise ValueError(
                    f"a leaf of `{name}` has shape {tuple(leaf.shape)}, expected the batch axes {tuple(batch)} in "
                    f"front, as batch_dims={batch_dims} says"
                )
    found, parameters = function_map(matvec, vecmat, x_tree, y_tree, params)
    for parameter in parameters:
        if parameter.is_complex():
            raise TypeError(f"a parameter has dtype {parameter.dtype}, expected real numbers: use torch.view_as_real")
    _check_function(found, parameters, first, batch)
    return Problem(found, parameters, y_tree.flatten(b, "`b`", batch), x_tree, y_tree, products)


def _check_tree(name: str, tree: Any, batch_dims: int) -> None:
    """Refuse a tree without tensors, or with one that cannot have the batch axes."""
    leaves = pytree.tree_leaves(tree)
    if not leaves:
        raise ValueError(f"`{name}` holds no tensor")
    for leaf in leaves:
        _check_leaf(name, leaf)
        if leaf.dim() < batch_dims:
            raise ValueError(f"a leaf of `{name}` has shape {tuple(leaf.shape)}, expected {batch_dims} batch axes")


def _check_leaf(name: str, leaf: Any) -> None:
    """Refuse what is not a tensor of real numbers that the iteration can take."""
    if not isinstance(leaf, Tensor):
        raise TypeError(f"`{name}` holds a {type(leaf).__name__}, expected a tensor")
    if leaf.is_complex():
        raise TypeError(
            f"`{name}` has dtype {leaf.dtype}, expected float32 or float64: write the problem in real and imaginary "
            "parts"
        )
    if leaf.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`{name}` has dtype {leaf.dtype}, expected float32 or float64: call `.double()` on it")


def _check_like(name: str, leaf: Any, b: Tensor) -> None:
    """Refuse another dtype or device than that of b."""
    _check_leaf(name, leaf)
    if leaf.dtype != b.dtype or leaf.device != b.device:
        raise TypeError(
            f"`{name}` is {leaf.dtype} on {leaf.device}, expected {b.dtype} on {b.device} as `b`: call `.to(b)` on it"
        )


def _check_function(found: FunctionMap, parameters: Sequence[Tensor], like: Tensor, batch: Sequence[int]) -> None:
    """Call the function at zero: it must be linear, and must not hide tensors that need a gradient.

    Raises:
        ValueError: if the result is not zero, or depends on such a tensor.
    """
    zeros = torch.zeros(*batch, found.columns, dtype=like.dtype, device=like.device)
    result = found.matvec(zeros, [tensor.detach() for tensor in parameters])
    hidden = result.requires_grad
    if transforms_active() or dual_level_open():
        hidden = hidden or forward_ad.unpack_dual(result).tangent is not None
        hidden = hidden or (is_batchedtensor(result) and not any(is_batchedtensor(tensor) for tensor in parameters))
    if hidden:
        raise ValueError(
            "`matvec` uses tensors that are differentiated or mapped and are not among its arguments, and their "
            "gradient would be lost: give them as *params, or detach them"
        )
    if not transforms_active() and bool((result != 0.0).any()):
        if bool(result.isnan().any()):
            raise ValueError(
                "`matvec` gives NaN at x = 0: its parameters hold NaN or infinite numbers, expected finite ones"
            )
        raise ValueError("`matvec` is not linear in x: its value at x = 0 is not zero")
