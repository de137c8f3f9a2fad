"""Every kind of A as one thing: products with A and A' on flat vectors.

A :class:`LinearMap` takes vectors (..., n) to (..., m); every leading axis is batch, one problem each. The tensors A is
made of, its *parameters*, are arguments of every product and not part of the map, so that one differentiates with
respect to them. For fixed vectors the products are all a derivative needs:

    pull(parameters, [(l, r), ...])    cotangent of the parameters of  sum_k <l_k, A r_k>
    push(x, parameters, tangents)      A'x, with A' the tangent of A

A pytree is one flat vector: its leaves, batch axes in front, side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Product = Callable[[Tensor], Tensor]
Parameters = Sequence[Tensor]
#: A left and a right vector of a bilinear form ``<l, A r>``.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LinearMap:
    """A matrix given by its products.

    Attributes:
        rows: m.
        columns: n.
    """

    rows: int
    columns: int

    def matvec(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Return ``A x``, (..., m), in differentiable operations."""
        raise NotImplementedError

    def vecmat(self, y: Tensor, parameters: Parameters) -> Tensor:
        """Return ``A'y``, (..., n), in differentiable operations."""
        x = y.new_zeros(*y.shape[:-1], self.columns)
        pull = _pullback(lambda vector: self.matvec(vector, parameters), x)
        return pull(y)[0]

    @property
    def pulls_back(self) -> bool:
        """Whether A' comes by reverse differentiation of A."""
        return False

    def products(self, parameters: Parameters, x: Tensor) -> tuple[Product, Product]:
        """Return both products for many calls, whose derivatives nobody wants, with vectors of the shape of x."""
        if not self.pulls_back:
            return lambda x: self.matvec(x, parameters), lambda y: self.vecmat(y, parameters)
        pull = _pullback(lambda vector: self.matvec(vector, parameters), torch.zeros_like(x))
        return lambda x: self.matvec(x, parameters), lambda y: pull(y)[0].detach()

    def pull(self, parameters: Parameters, pairs: Sequence[Pair], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return the cotangents of the wanted parameters of ``sum_k <l_k, A r_k>``."""
        places = [place for place, want in enumerate(wanted) if want]

        def value(*chosen: Tensor) -> Tensor:
            given = list(parameters)
            for place, tensor in zip(places, chosen, strict=True):
                given[place] = tensor
            return torch.stack([(left * self.matvec(right, given)).sum() for left, right in pairs]).sum()

        pull = _pullback(value, *(parameters[place] for place in places))
        found: list[Tensor | None] = [None] * len(wanted)
        for place, cotangent in zip(places, pull(pairs[0][0].new_ones(())), strict=True):
            found[place] = cotangent
        return found

    def push(self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """Return ``A'x`` for the tangent A' of A."""
        return _directional(lambda given: self.matvec(x, given), parameters, tangents)

    def push_transposed(self, y: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """Return the transpose of the tangent of A times y."""
        return _directional(lambda given: self.vecmat(y, given), parameters, tangents)

    def mapped(
        self, parameters: Parameters, dims: Sequence[int | None], size: int, batch_dims: int
    ) -> tuple[LinearMap, list[Tensor]]:
        """Return the map whose vectors have one more batch axis, in front, and its parameters.

        Args:
            parameters: of this map; those that are mapped have the new axis too.
            dims: where they have it.
            size: its length.
            batch_dims: batch axes the vectors had so far.
        """
        moved = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(parameters, dims, strict=True)]
        return MappedMap(self.rows, self.columns, self, tuple(None if dim is None else 0 for dim in dims)), moved


def _pullback(function: Callable[..., Tensor], *at: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return the transpose of the derivative of a function of tensors."""
    return torch.func.vjp(function, *at)[1]


def _directional(
    function: Callable[[list[Tensor]], Tensor], parameters: Parameters, tangents: Sequence[Tensor | None]
) -> Tensor:
    """Return the derivative of a function of the parameters in the direction of the tangents."""
    places = [place for place, tangent in enumerate(tangents) if tangent is not None]

    def value(*chosen: Tensor) -> Tensor:
        given = list(parameters)
        for place, tensor in zip(places, chosen, strict=True):
            given[place] = tensor
        return function(given)

    primals = tuple(parameters[place] for place in places)
    return torch.func.jvp(value, primals, tuple(tangents[place] for place in places))[1]  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class MappedMap(LinearMap):
    """A map under ``torch.func.vmap``: one more batch axis in front."""

    base: LinearMap
    dims: tuple[int | None, ...]

    @property
    def pulls_back(self) -> bool:
        """As the base."""
        return self.base.pulls_back

    def matvec(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Map the product of the base."""
        return torch.func.vmap(self.base.matvec, in_dims=(0, self.dims))(x, tuple(parameters))

    def vecmat(self, y: Tensor, parameters: Parameters) -> Tensor:
        """Map the product of the base."""
        return torch.func.vmap(self.base.vecmat, in_dims=(0, self.dims))(y, tuple(parameters))


@dataclass(frozen=True)
class DenseMap(LinearMap):
    """One parameter: A, (m, n) for all items or (..., m, n) with one batch axis, maybe of length 1, per batch axis."""

    def matvec(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Multiply."""
        matrix = parameters[0]
        return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)

    def vecmat(self, y: Tensor, parameters: Parameters) -> Tensor:
        """Multiply."""
        matrix = parameters[0]
        return y @ matrix if matrix.dim() == 2 else (matrix.mT @ y.unsqueeze(-1)).squeeze(-1)

    def products(self, parameters: Parameters, x: Tensor) -> tuple[Product, Product]:
        """One vector alone is faster as a vector than as a batch of one."""
        matrix = parameters[0]
        if x.dim() < 2 or x.shape[:-1].numel() != 1 or matrix.shape[:-2].numel() != 1:
            return super().products(parameters, x)
        matrix = matrix.reshape(self.rows, self.columns)
        front = x.shape[:-1]
        return (
            lambda x: torch.mv(matrix, x.reshape(-1)).reshape((*front, self.rows)),
            lambda y: torch.mv(matrix.mT, y.reshape(-1)).reshape((*front, self.columns)),
        )

    def pull(self, parameters: Parameters, pairs: Sequence[Pair], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return the sum of outer products."""
        if not wanted[0]:
            return [None]
        left = torch.stack([pair[0] for pair in pairs], -2)
        right = torch.stack([pair[1] for pair in pairs], -2)
        shape = parameters[0].shape
        if len(shape) == 2:
            return [left.flatten(0, -2).mT @ right.flatten(0, -2)]
        return [(left.mT @ right).sum_to_size(shape)]

    def push(self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """A is its own parameter."""
        assert tangents[0] is not None
        return self.matvec(x, [tangents[0]])

    def push_transposed(self, y: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """A is its own parameter."""
        assert tangents[0] is not None
        return self.vecmat(y, [tangents[0]])

    def mapped(
        self, parameters: Parameters, dims: Sequence[int | None], size: int, batch_dims: int
    ) -> tuple[LinearMap, list[Tensor]]:
        """Put the new axis in front of A's batch axes."""
        matrix, dim = parameters[0], dims[0]
        if dim is None:
            return self, [matrix if matrix.dim() == 2 else matrix.unsqueeze(0)]
        matrix = matrix.movedim(dim, 0)
        if matrix.dim() == 3:
            matrix = matrix.reshape(size, *(1,) * batch_dims, *matrix.shape[1:])
        return self, [matrix]


@dataclass(frozen=True)
class SparseMap(LinearMap):
    """One parameter: the values of a sparse matrix, (nnz,), whose pattern is constant.

    Attributes:
        row: (nnz,) int64.
        column: (nnz,) int64.
    """

    row: Tensor = field(repr=False)
    column: Tensor = field(repr=False)

    def matvec(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Gather, multiply, add up."""
        terms = parameters[0] * x.index_select(-1, self.column)
        return terms.new_zeros(*terms.shape[:-1], self.rows).index_add(-1, self.row, terms)

    def vecmat(self, y: Tensor, parameters: Parameters) -> Tensor:
        """Gather, multiply, add up."""
        terms = parameters[0] * y.index_select(-1, self.row)
        return terms.new_zeros(*terms.shape[:-1], self.columns).index_add(-1, self.column, terms)

    def products(self, parameters: Parameters, x: Tensor) -> tuple[Product, Product]:
        """Build the compressed matrix once, and that of the transpose."""
        values = parameters[0].detach()
        if values.dim() != 1:
            return super().products(parameters, x)
        shape = (self.rows, self.columns)
        if values.device.type == "cpu":
            from scipy import sparse

            pattern = (self.row.numpy(), self.column.numpy())
            matrix = sparse.csr_array((values.numpy(), pattern), shape=shape)
            return _array_product(matrix), _array_product(sparse.csr_array(matrix.T))
        return _compressed(values, self.row, self.column, shape), _compressed(
            values, self.column, self.row, (self.columns, self.rows)
        )

    def pull(self, parameters: Parameters, pairs: Sequence[Pair], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return the products at the entries of the pattern."""
        if not wanted[0]:
            return [None]
        total: Tensor | None = None
        for left, right in pairs:
            term = left.index_select(-1, self.row) * right.index_select(-1, self.column)
            total = term if total is None else total + term
        assert total is not None
        return [total.sum_to_size(parameters[0].shape)]

    def push(self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """The product is linear in the values."""
        assert tangents[0] is not None
        return self.matvec(x, [tangents[0]])

    def push_transposed(self, y: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """The product is linear in the values."""
        assert tangents[0] is not None
        return self.vecmat(y, [tangents[0]])


def _array_product(matrix: Any) -> Product:
    """Return the product of a scipy matrix or operator with vectors (..., n) in main memory."""

    def product(x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], matrix.shape[0])
        flat = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]).numpy()
        if flat.shape[0] == 1:
            return torch.from_numpy(np.ascontiguousarray(matrix @ flat[0])).reshape(shape)
        return torch.from_numpy(np.ascontiguousarray((matrix @ flat.T).T)).reshape(shape)

    return product


def _compressed(values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int]) -> Product:
    """Return the product with a compressed sparse row matrix on the device of the values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
        order = torch.argsort(row * shape[1] + column)
        counts = torch.bincount(row, minlength=shape[0])
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        matrix = torch.sparse_csr_tensor(start, column[order], values[order], shape)

    def product(x: Tensor) -> Tensor:
        return (matrix @ x.reshape(x.shape[:-1].numel(), x.shape[-1]).T).T.reshape(*x.shape[:-1], shape[0])

    return product


class _HostProduct(torch.autograd.Function):
    """A constant operator of the host's: its derivative is itself, its transpose is that of the host."""

    @staticmethod
    def forward(x: Tensor, operator: Any, transposed: bool) -> Tensor:
        """(..., n) to (..., m)."""
        return _array_product(operator.T if transposed else operator)(x).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the operator."""
        ctx.operator = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        """Apply the transpose."""
        operator, transposed = ctx.operator
        return _HostProduct.apply(cotangents[0], operator, not transposed), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Apply the operator."""
        return _HostProduct.apply(tangents[0], *ctx.operator)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Every leading axis is batch."""
        return _HostProduct.apply(inputs[0].movedim(in_dims[0], 0), *inputs[1:]), 0


@dataclass(frozen=True)
class HostMap(LinearMap):
    """No parameters: a ``scipy.sparse.linalg.LinearOperator`` of real numbers."""

    operator: Any = field(repr=False)

    def matvec(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Ask the host."""
        return _HostProduct.apply(x, self.operator, False)

    def vecmat(self, y: Tensor, parameters: Parameters) -> Tensor:
        """Ask the host."""
        return _HostProduct.apply(y, self.operator, True)

    def pull(self, parameters: Parameters, pairs: Sequence[Pair], wanted: Sequence[bool]) -> list[Tensor | None]:
        """There is nothing to differentiate."""
        return []

    def mapped(
        self, parameters: Parameters, dims: Sequence[int | None], size: int, batch_dims: int
    ) -> tuple[LinearMap, list[Tensor]]:
        """Every leading axis is batch."""
        return self, []


def _words(spec: Any) -> str:
    """Write a tree with a star for each leaf."""
    return (
        "a tensor" if spec.is_leaf() else str(pytree.tree_unflatten(["*"] * spec.num_leaves, spec)).replace("'*'", "*")
    )


@dataclass(frozen=True)
class Tree:
    """How a pytree of tensors lies in one flat vector.

    Attributes:
        spec: its structure.
        shapes: of the leaves, without batch axes.
    """

    spec: Any
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Length of each leaf."""
        return [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes]

    @staticmethod
    def vector(n: int) -> Tree:
        """Return the structure of one tensor (n,)."""
        return Tree(pytree.tree_structure(0), ((n,),))

    @staticmethod
    def of(tree: Any, batch_dims: int) -> Tree:
        """Read the structure of a tree of tensors whose first axes are batch."""
        leaves, spec = pytree.tree_flatten(tree)
        return Tree(spec, tuple(tuple(leaf.shape[batch_dims:]) for leaf in leaves))

    def leaves(self, tree: Any, name: str) -> list[Any]:
        """Return the leaves of a tree of this structure.

        Raises:
            ValueError: if it has another.
        """
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise ValueError(f"{name} has the structure {_words(spec)}, expected {_words(self.spec)}")
        return leaves

    def flatten(self, tree: Any, name: str, batch: Sequence[int]) -> Tensor:
        """Lay the leaves side by side, (*batch, size).

        Raises:
            ValueError: if the tree has another structure or other shapes.
        """
        parts: list[Tensor] = []
        for leaf, shape, size in zip(self.leaves(tree, name), self.shapes, self.sizes, strict=True):
            wanted = (*batch, *shape)
            if tuple(leaf.shape) != wanted:
                raise ValueError(f"{name} has shape {tuple(leaf.shape)}, expected {wanted}")
            parts.append(leaf.reshape((*batch, size)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def spread(self, tree: Any, name: str, batch: Sequence[int]) -> Tensor:
        """Do what :meth:`flatten` does with leaves that only broadcast against the shapes.

        Raises:
            ValueError: if the tree has another structure or shapes that do not broadcast.
        """
        parts: list[Tensor] = []
        for leaf, shape, size in zip(self.leaves(tree, name), self.shapes, self.sizes, strict=True):
            wanted = (*batch, *shape)
            try:
                parts.append(leaf.expand(wanted).reshape((*batch, size)))
            except RuntimeError:
                raise ValueError(
                    f"{name} has shape {tuple(leaf.shape)}, expected {wanted} or one that broadcasts to it"
                ) from None
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def unflatten(self, vector: Tensor) -> Any:
        """Return views of the parts of a flat vector, as a tree."""
        if len(self.shapes) == 1:
            whole = vector if len(self.shapes[0]) == 1 else vector.reshape((*vector.shape[:-1], *self.shapes[0]))
            return pytree.tree_unflatten([whole], self.spec)
        parts = vector.split(self.sizes, -1)
        leaves = [part.reshape((*vector.shape[:-1], *shape)) for part, shape in zip(parts, self.shapes, strict=True)]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class FunctionMap(LinearMap):
    """``A x = function(x, *arguments)``, with a function for ``A'`` or without.

    The parameters are the tensors in the arguments.

    Attributes:
        function: of a tree like x and the arguments; linear in x.
        transpose: of a tree like ``A x`` and the arguments; None for the transpose by ``torch.func.vjp``.
        x_tree: how x lies flat.
        y_tree: how ``A x`` lies flat.
        arguments_spec: structure of the arguments.
        constants: their leaves; None where a parameter goes.
    """

    function: Callable[..., Any] = field(repr=False)
    transpose: Callable[..., Any] | None = field(repr=False)
    x_tree: Tree = field(repr=False)
    y_tree: Tree = field(repr=False)
    arguments_spec: Any = field(repr=False)
    constants: tuple[Any, ...] = field(repr=False)

    @property
    def pulls_back(self) -> bool:
        """Without a function for A'."""
        return self.transpose is None

    def _arguments(self, parameters: Parameters) -> Any:
        rest = iter(parameters)
        leaves = [next(rest) if constant is None else constant[0] for constant in self.constants]
        return pytree.tree_unflatten(leaves, self.arguments_spec)

    def matvec(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Call the function."""
        found = self.function(self.x_tree.unflatten(x), *self._arguments(parameters))
        return self.y_tree.flatten(found, "the result of `matvec`", x.shape[:-1])

    def vecmat(self, y: Tensor, parameters: Parameters) -> Tensor:
        """Call the function of the transpose, or pull back."""
        if self.transpose is None:
            return super().vecmat(y, parameters)
        found = self.transpose(self.y_tree.unflatten(y), *self._arguments(parameters))
        return self.x_tree.flatten(found, "the result of `vecmat`", y.shape[:-1])


def function_map(
    function: Callable[..., Any], transpose: Callable[..., Any] | None, x_tree: Tree, y_tree: Tree,
    arguments: Sequence[Any],
) -> tuple[FunctionMap, list[Tensor]]:  # fmt: skip
    """Return the map of a function and its parameters, the tensors among the arguments."""
    leaves, spec = pytree.tree_flatten(tuple(arguments))
    constants = tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves)
    parameters = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    found = FunctionMap(y_tree.size, x_tree.size, function, transpose, x_tree, y_tree, spec, constants)
    return found, parameters


@dataclass(frozen=True)
class StackedMap(LinearMap):
    """``K = [A; diag(d)]``; the first parameter is d, (..., n), with all batch axes of the vectors."""

    base: LinearMap

    def matvec(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Return ``(A x, d x)``."""
        return torch.cat([self.base.matvec(x, parameters[1:]), parameters[0] * x], -1)

    def vecmat(self, y: Tensor, parameters: Parameters) -> Tensor:
        """Return ``A'y_1 + d y_2``."""
        top, bottom = y.split([self.base.rows, self.base.columns], -1)
        return self.base.vecmat(top, parameters[1:]) + parameters[0] * bottom

    def products(self, parameters: Parameters, x: Tensor) -> tuple[Product, Product]:
        """Use the products of A."""
        matvec, vecmat = self.base.products(parameters[1:], x)
        d, rows = parameters[0], self.base.rows
        return (
            lambda x: torch.cat([matvec(x), d * x], -1),
            lambda y: vecmat(y[..., :rows]).addcmul(d, y[..., rows:]),
        )

    def pull(self, parameters: Parameters, pairs: Sequence[Pair], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return the cotangents of d and of the parameters of A."""
        rows = self.base.rows
        found: list[Tensor | None] = [None]
        if wanted[0]:
            terms = [left[..., rows:] * right for left, right in pairs]
            found = [torch.stack(terms).sum(0).sum_to_size(parameters[0].shape)]
        if not any(wanted[1:]):
            return [*found, *(None for _ in wanted[1:])]
        return [
            *found,
            *self.base.pull(parameters[1:], [(left[..., :rows], right) for left, right in pairs], wanted[1:]),
        ]

    def push(self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """Stack the tangents."""
        top = x.new_zeros(*x.shape[:-1], self.base.rows)
        if any(tangent is not None for tangent in tangents[1:]):
            top = self.base.push(x, parameters[1:], tangents[1:])
        return torch.cat([top, torch.zeros_like(x) if tangents[0] is None else tangents[0] * x], -1)

    def push_transposed(self, y: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """Add the tangents."""
        top, bottom = y.split([self.base.rows, self.base.columns], -1)
        found = torch.zeros_like(bottom) if tangents[0] is None else tangents[0] * bottom
        if any(tangent is not None for tangent in tangents[1:]):
            found = found + self.base.push_transposed(top, parameters[1:], tangents[1:])
        return found

    def mapped(
        self, parameters: Parameters, dims: Sequence[int | None], size: int, batch_dims: int
    ) -> tuple[LinearMap, list[Tensor]]:
        """Map A, and put the axis in front of those of d."""
        base, moved = self.base.mapped(parameters[1:], dims[1:], size, batch_dims)
        d = parameters[0].unsqueeze(0) if dims[0] is None else parameters[0].movedim(dims[0], 0)
        return StackedMap(self.rows, self.columns, base), [d, *moved]


@dataclass(frozen=True)
class PreconditionedMap(LinearMap):
    """``A P`` with a constant P.

    Attributes:
        base: A.
        apply: P on (..., n).
        apply_transposed: P' on (..., n).
    """

    base: LinearMap
    apply: Product = field(repr=False)
    apply_transposed: Product = field(repr=False)

    def matvec(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Return ``A P x``."""
        return self.base.matvec(self.apply(x), parameters)

    def vecmat(self, y: Tensor, parameters: Parameters) -> Tensor:
        """Return ``P'A'y``."""
        return self.apply_transposed(self.base.vecmat(y, parameters))

    def products(self, parameters: Parameters, x: Tensor) -> tuple[Product, Product]:
        """Use the products of A."""
        matvec, vecmat = self.base.products(parameters, x)
        return lambda x: matvec(self.apply(x)), lambda y: self.apply_transposed(vecmat(y))

    def pull(self, parameters: Parameters, pairs: Sequence[Pair], wanted: Sequence[bool]) -> list[Tensor | None]:
        """P is constant."""
        return self.base.pull(parameters, [(left, self.apply(right)) for left, right in pairs], wanted)

    def push(self, x: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """P is constant."""
        return self.base.push(self.apply(x), parameters, tangents)

    def push_transposed(self, y: Tensor, parameters: Parameters, tangents: Sequence[Tensor | None]) -> Tensor:
        """P is constant."""
        return self.apply_transposed(self.base.push_transposed(y, parameters, tangents))
