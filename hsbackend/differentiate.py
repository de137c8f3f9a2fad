"""The one derivative rule, for every solver.

At a solution ``(x, nu)`` with face K, and for cotangents ``g`` of x and ``r`` of nu, the adjoint system

    [Q  N'] [u]   [g]
    [N  0 ] [w] = [r]        N the rows of K

gives the derivative of the loss with respect to everything the program is made of (implicit differentiation of the
KKT conditions on K; the solution operator of the system is the HS-Jacobian):

    dL/dq = -u,   dL/db_i = w_i,   dL/dA_ij = -(nu_i u_j + w_i x_j),   dL/dQ_ij = -1/2 (u_i x_j + x_i u_j).

Where the optimum is not unique, the one of least norm turns with the null space of Q and N, and the matrices get a
further part, with a and c from :meth:`hsbackend.plan.Plan.turning` (docs/theory.md, section 10):

    dL/dA_ij: + c_i a_j,   dL/dQ_ij: + 1/2 (a_i c_j + c_i a_j).

Only entries that depend on a parameter are formed, one by one: a gather, never an outer product. Both choices of K give
a conservative derivative for (q, b); with Q and A given by parameters the multipliers enter, and the claim holds where
the active rows are independent (docs/theory.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch.autograd.function import once_differentiable

from hsbackend._blas import dot
from hsbackend._parallel import compile_kernel, for_each_item
from hsbackend.plan import Plan, Solution, Turning
from hsbackend.program import FloatArray, IndexArray, MatrixEntries, Program, SparseOperator, as_slice
from hsbackend.solvers.result import Options
from hsbackend.sparse_plan import SparsePlan
from hsbackend.status import SolveError, Status, failure_message


@compile_kernel
def _bilinear(start, stop, step, targets, rows, columns, factors, a, b, c, d, out):  # type: ignore[no-untyped-def]
    """Add ``factor (a_row b_column + c_row d_column)`` to ``out[item, target]``."""
    for item in range(start, stop, step):
        row_out = out[item]
        for k in range(targets.shape[0]):
            i = rows[k]
            j = columns[k]
            row_out[targets[k]] += factors[k] * (a[item, i] * b[item, j] + c[item, i] * d[item, j])


@compile_kernel
def _bilinear_total(start, stop, step, edges, rows, columns, factors, a, b, c, d, out):  # type: ignore[no-untyped-def]
    """Add the sum over the items to ``out[target]``, with a, b, c, d (., B) and the entries ``edges`` of a target."""
    batch = a.shape[1]
    for target in range(start, stop, step):
        for k in range(edges[target], edges[target + 1]):
            i = rows[k]
            j = columns[k]
            out[target] += factors[k] * (dot(a[i], b[j], batch) + dot(c[i], d[j], batch))


@compile_kernel
def _outer(start, stop, step, rows, columns, factor, a, b, c, d, out):  # type: ignore[no-untyped-def]
    """The same as ``_bilinear`` where the parameter is a whole block of the matrix, row by row, with one factor."""
    n = columns.shape[0]
    for item in range(start, stop, step):
        block = out[item]
        left = b[item]
        right = d[item]
        for i in range(rows.shape[0]):
            s = factor * a[item, rows[i]]
            t = factor * c[item, rows[i]]
            line = block[i * n : (i + 1) * n]
            for j in range(n):
                line[j] += s * left[columns[j]] + t * right[columns[j]]


@compile_kernel
def _outer_total(start, stop, step, rows, columns, factor, a, b, c, d, out):  # type: ignore[no-untyped-def]
    """Add the sum over the items to ``out``, a row of the block after the other; all arguments by item."""
    n = columns.shape[0]
    for i in range(start, stop, step):
        line = out[i * n : (i + 1) * n]
        for item in range(a.shape[0]):
            s = factor * a[item, rows[i]]
            t = factor * c[item, rows[i]]
            left = b[item]
            right = d[item]
            for j in range(n):
                line[j] += s * left[columns[j]] + t * right[columns[j]]


@dataclass(frozen=True)
class _Bilinear:
    """Entries of a matrix that depend on one parameter: where they are and what multiplies them.

    ``targets`` ascend; those of target t are ``edges[t] : edges[t + 1]``. ``block`` has the rows and columns when the
    parameter is a whole block of the matrix, row by row, with one factor.
    """

    targets: IndexArray
    edges: IndexArray
    rows: IndexArray
    columns: IndexArray
    factors: FloatArray
    block: tuple[IndexArray, IndexArray] | None

    @classmethod
    def build(cls, entries: MatrixEntries, parameter: int) -> _Bilinear | None:
        block = entries.values.blocks.get(parameter)
        if block is None:
            return None
        entry = np.repeat(block.targets, np.diff(block.indptr))
        # In the order of the parameter, so that results are written one after the other.
        order = np.argsort(block.indices, kind="stable")
        entry = entry[order]
        rows, columns = entries.rows[entry], entries.columns[entry]
        whole = _whole_block(rows, columns)
        if not np.array_equal(block.indices[order], np.arange(block.shape[1])) or np.ptp(block.data) != 0.0:
            whole = None
        targets = block.indices[order]
        edges = np.searchsorted(targets, np.arange(block.shape[1] + 1)).astype(np.int64)
        return cls(targets, edges, rows, columns, block.data[order], whole)

    def add_to(self, sign: float, a: FloatArray, b: FloatArray, c: FloatArray, d: FloatArray, out: FloatArray) -> None:
        """Add ``sign factor (a_row b_column + c_row d_column)`` to the entries of the parameter, (B, size)."""
        work = 4.0 * len(self.targets)
        if self.block is not None:
            factor = sign * float(self.factors[0])
            for_each_item(_outer, a.shape[0], work, *self.block, factor, a, b, c, d, out)
        else:
            lists = (self.targets, self.rows, self.columns, sign * self.factors)
            for_each_item(_bilinear, a.shape[0], work, *lists, a, b, c, d, out)

    def add_total_to(
        self, sign: float, a: FloatArray, b: FloatArray, c: FloatArray, d: FloatArray, out: FloatArray
    ) -> None:
        """Add the same, summed over the items, to (size,).

        Threads share the entries, not the items: the order of a sum must not depend on how many threads there are.
        """
        if self.block is not None:
            factor = sign * float(self.factors[0])
            rows, columns = self.block
            for_each_item(
                _outer_total, len(rows), 4.0 * a.shape[0] * len(columns), *self.block, factor, a, b, c, d, out
            )
        else:
            lists = (self.edges, self.rows, self.columns, sign * self.factors)
            by_entry = [np.ascontiguousarray(part.T) for part in (a, b, c, d)]
            work = 4.0 * a.shape[0] * len(self.targets) / max(len(out), 1)
            for_each_item(_bilinear_total, len(out), work, *lists, *by_entry, out)


def _whole_block(rows: IndexArray, columns: IndexArray) -> tuple[IndexArray, IndexArray] | None:
    """Return the rows and columns of a block listed row by row, or None."""
    width = int(np.argmax(rows != rows[0])) or len(rows)
    first, across = rows[::width].copy(), columns[:width].copy()
    if len(rows) != len(first) * width:
        return None
    same = np.array_equal(rows, np.repeat(first, width)) and np.array_equal(columns, np.tile(across, len(first)))
    return (first, across) if same else None


class _ParameterGradient:
    """Gradient with respect to one parameter, compiled from the maps of the program."""

    def __init__(self, program: Program, parameter: int) -> None:
        self.size = program.parameter_sizes[parameter]
        self._linear = _transposed(program.linear.blocks.get(parameter), -1.0)
        self._rhs = _transposed(program.rhs.blocks.get(parameter), 1.0)
        self._matrix = _Bilinear.build(program.matrix, parameter)
        self._quadratic = _Bilinear.build(program.quadratic, parameter)

    @property
    def needs_solution(self) -> bool:
        """Whether the primal and the multipliers enter (the parameter is in Q or A)."""
        return self._matrix is not None or self._quadratic is not None

    def evaluate(
        self, primal: FloatArray, multipliers: FloatArray, u: FloatArray, w: FloatArray, summed: bool
    ) -> FloatArray:
        """Return the gradient, (B, size), or (size,) summed over the batch."""
        batch = u.shape[0]
        total = summed and batch != 1  # one item: the bits it has in a batch
        out = np.zeros((1 if total else batch, self.size))
        if total:
            self._add_linear(u.sum(axis=0, keepdims=True), w.sum(axis=0, keepdims=True), out)
        else:
            self._add_linear(u, w, out)
        for part, sign, left in ((self._matrix, -1.0, multipliers), (self._quadratic, -0.5, primal)):
            if part is not None and batch:
                arguments = (sign, left, u, w if part is self._matrix else u, primal)
                if total:
                    part.add_total_to(*arguments, out[0])
                else:
                    part.add_to(*arguments, out)
        return out[0] if summed else out

    def add_turning(self, turning: Turning, summed: bool, out: FloatArray) -> None:
        """Add the further part of the items that turn to what :meth:`evaluate` returned."""
        rows, primal, along = turning.rows, turning.primal, turning.along
        total = summed and len(turning.items) != 1
        for part, arguments in (
            (self._matrix, (0.5, rows, along, rows, along)),
            (self._quadratic, (0.5, along, primal, primal, along)),
        ):
            if part is None:
                continue
            if total:
                part.add_total_to(*arguments, out)
                continue
            further = np.zeros((len(turning.items), self.size))
            part.add_to(*arguments, further)
            out[... if summed else turning.items] += further[0] if summed else further

    def _add_linear(self, u: FloatArray, w: FloatArray, out: FloatArray) -> None:
        if self._linear is not None:
            self._linear.add_to(u, out)
        if self._rhs is not None:
            self._rhs.add_to(w, out)


def _transposed(block: SparseOperator | None, sign: float) -> SparseOperator | None:
    if block is None:
        return None
    rows = np.repeat(block.targets, np.diff(block.indptr))
    matrix = sp.coo_array((sign * block.data, (block.indices, rows)), shape=(block.shape[1], block.shape[0]))
    return SparseOperator.build(matrix)


@dataclass(frozen=True)
class Output:
    """One tensor a layer returns: entries of the primal or of the multipliers.

    Attributes:
        source: ``"primal"`` or ``"multipliers"``.
        columns: entries in row-major order of ``shape``.
        shape: shape of one item.
    """

    source: Literal["primal", "multipliers"]
    columns: IndexArray
    shape: tuple[int, ...]


class Layer:
    """A plan with named outputs: the differentiable function of the parameters that every host calls.

    Args:
        plan: the prepared program.
        outputs: what to return.
    """

    def __init__(self, plan: Plan | SparsePlan, outputs: Sequence[Output]) -> None:
        """Compile the gradients."""
        self.plan = plan
        self.outputs = tuple(outputs)
        count = len(plan.program.parameter_sizes)
        self._gradients = [_ParameterGradient(plan.program, index) for index in range(count)]
        self._repeated = [len(np.unique(output.columns)) < len(output.columns) for output in outputs]
        self._views = [as_slice(output.columns) for output in outputs]
        self._dual_wanted = any(output.source == "multipliers" for output in outputs)
        self._multipliers_wanted = self._dual_wanted or any(gradient.needs_solution for gradient in self._gradients)

    def solve(
        self, parameters: Sequence[FloatArray], options: Options, on_failure: str, warm: Any,
        batched: Sequence[bool] | None = None,
    ) -> Solution:  # fmt: skip
        """Solve and raise for failing items unless ``on_failure`` is ``"nan"``; arguments as in :meth:`Plan.solve`."""
        solution = self.plan.solve(parameters, replace(options, multipliers=self._multipliers_wanted), warm, batched)
        if on_failure == "raise" and np.any(solution.status != Status.SOLVED):
            raise SolveError(failure_message(solution.status, self.conflicts(solution)), solution.status)
        return solution

    def conflicts(self, solution: Solution) -> dict[int, list[str]]:
        """Return the names of the rows that cannot hold together, for each infeasible item."""
        names = self.plan.program.row_names
        return {item: [names[row] for row in rows] for item, rows in solution.conflicts.items()}

    def select(self, solution: Solution) -> list[FloatArray]:
        """Return the outputs of a solution, each (B, *shape), as fresh arrays."""
        batch = solution.primal.shape[0]
        found: list[FloatArray] = []
        for output, view in zip(self.outputs, self._views, strict=True):
            source = solution.primal if output.source == "primal" else solution.multipliers
            found.append(np.array(source[:, view], order="C").reshape(batch, *output.shape))
        return found

    def pullback(
        self,
        solution: Solution,
        cotangents: Sequence[FloatArray | None],
        wanted: Sequence[bool],
        summed: Sequence[bool],
    ) -> list[FloatArray | None]:
        """Return the gradients of the parameters.

        Args:
            solution: from :meth:`solve`.
            cotangents: one (B, *shape) array per output, None for zero.
            wanted: which parameters need a gradient.
            summed: which parameters are shared by the batch; their gradient is the sum over the items.

        Returns:
            (B, size) or (size,) arrays. An item that has no solution contributes zero where its cotangents are zero,
            and NaN where they are not.
        """
        batch, n = solution.primal.shape
        grad_primal = np.zeros((batch, n))
        grad_multipliers = np.zeros(solution.multipliers.shape) if self._dual_wanted else None
        for output, view, repeated, cotangent in zip(
            self.outputs, self._views, self._repeated, cotangents, strict=True
        ):
            if cotangent is None:
                continue
            target = grad_primal if output.source == "primal" else grad_multipliers
            assert target is not None
            flat = cotangent.reshape(batch, -1)
            if repeated:
                np.add.at(target.T, output.columns, flat.T)
            else:
                target[:, view] += flat
        primal, multipliers = solution.primal, solution.multipliers
        failed = solution.status != Status.SOLVED
        poisoned = np.zeros(batch, dtype=bool)
        if failed.any():
            poisoned = failed & (grad_primal != 0.0).any(axis=1)
            if grad_multipliers is not None:
                poisoned |= failed & (grad_multipliers != 0.0).any(axis=1)
                grad_multipliers[failed] = 0.0
            grad_primal[failed] = 0.0
            primal, multipliers = primal.copy(), multipliers.copy()
            primal[failed] = 0.0
            multipliers[failed] = 0.0
        if solution.face is None:  # every item failed before there was a face
            u, w = np.zeros((batch, n)), np.zeros((batch, self.plan.program.num_rows))
        else:
            adjoint = self.plan.adjoint(solution, grad_primal, grad_multipliers, whole=False)
            u, w = adjoint.primal, adjoint.rows
            u[failed] = 0.0  # NaN data of a failed item must not reach the sum of a shared parameter
            w[failed] = 0.0
        turning = None
        matrices = any(need and gradient.needs_solution for gradient, need in zip(self._gradients, wanted, strict=True))
        if solution.face is not None and matrices:
            turning = self.plan.turning(solution, grad_primal)
        found: list[FloatArray | None] = []
        for gradient, need, shared in zip(self._gradients, wanted, summed, strict=True):
            if not need:
                found.append(None)
                continue
            value = gradient.evaluate(primal, multipliers, u, w, shared)
            if turning is not None:
                gradient.add_turning(turning, shared, value)
            if poisoned.any():
                value[... if shared else poisoned] = np.nan
            found.append(value)
        return found


@dataclass
class Call:
    """Options of one call and what it leaves behind.

    Attributes:
        options: accuracy and what to keep.
        on_failure: ``"raise"`` or ``"nan"``.
        warm: face of an earlier solution, or None.
        solution: filled in by the call.
    """

    options: Options
    on_failure: str
    warm: Any = None
    solution: Solution | None = None


def as_parameter(tensor: torch.Tensor, size: int, batched: bool) -> FloatArray:
    """Return a parameter as contiguous float64 (B, size) or (1, size)."""
    array = tensor.detach().to(device="cpu", dtype=torch.float64).contiguous().numpy()
    return array.reshape(array.shape[0] if batched else 1, size)


class SolveFunction(torch.autograd.Function):
    """The layer as a torch function: parameters in, outputs out."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, call: Call, batched: tuple[bool, ...], dtype: torch.dtype, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Solve; outputs are (B, *shape) in ``dtype`` on the device of the first parameter."""
        sizes = layer.plan.program.parameter_sizes
        arrays = [as_parameter(p, size, b) for p, size, b in zip(parameters, sizes, batched, strict=True)]
        solution = layer.solve(arrays, call.options, call.on_failure, call.warm, batched)
        call.solution = solution
        if call.options.keep_face:
            ctx.layer, ctx.solution, ctx.batched = layer, solution, batched
            # The solution may refer to the parameters' memory; autograd then refuses a backward pass after they were
            # changed in place.
            ctx.save_for_backward(*parameters)
            ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        device = parameters[0].device if parameters else torch.device("cpu")
        return tuple(torch.from_numpy(array).to(device=device, dtype=dtype) for array in layer.select(solution))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the rule at the top of this module."""
        _ = ctx.saved_tensors  # raises if a parameter was changed in place since the forward pass
        arrays = [None if g is None else g.to(device="cpu", dtype=torch.float64).numpy() for g in cotangents]
        summed = [not batched for batched in ctx.batched]
        found = ctx.layer.pullback(ctx.solution, arrays, ctx.needs_input_grad[4:], summed)
        gradients = [
            None if value is None else torch.from_numpy(value).reshape(shape).to(device=device, dtype=dtype)
            for value, (shape, dtype, device) in zip(found, ctx.like, strict=True)
        ]
        return (None, None, None, None, *gradients)
