"""Quadratic programs as PyTorch operators, for any combination of given data.

    minimise   1/2 x'Qx + q'x
    subject to A x  = b                 multipliers y (``eq``), free
               G x <= h                 multipliers z >= 0 (``ineq``)
               lower <= x <= upper      multipliers z_l, z_u >= 0

with stationarity ``Q x + q + A'y + G'z - z_l + z_u = 0``. The solvers of the library do the work
(:mod:`hsbackend.plan`); this module builds the program around tensors and differentiates it. At a solution, with N the
equality rows, the rows of the face K and the held coordinates (:mod:`hsbackend.differentiate`),

    [Q  N'] [u]   [g]         cotangents:  q: -u,  rhs: w,  N: -(nu u' + w x'),  Q: -1/2 (u x' + x u')
    [N  0 ] [w] = [r]         tangent:     g = -(q' + Q'x + N''nu),  r = rhs' - N'x

A plain backward pass uses the factorisation that the solver ended with. Everything else (double backward, forward mode,
``torch.func`` transforms, ``torch.compile``) solves the same system, written in torch operations, with one primitive
that is closed under differentiation: ``z = M^+ r`` for a symmetric matrix M, ``z' = M^+ (r' - M'z)``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from hsbackend.differentiate import Layer, Output
from hsbackend.families.family import Choice
from hsbackend.operators import fold, outer_tangents, primals, transforms_active, unfold, values_only
from hsbackend.plan import Plan, Solution
from hsbackend.program import AffineMap, FloatArray, IndexArray, MatrixEntries, Program
from hsbackend.solvers.result import Options
from hsbackend.status import UnsupportedProblemError

#: The data of a program, in the order of every argument list here.
NAMES: tuple[str, ...] = ("Q", "q", "A", "b", "G", "h", "lower", "upper")
#: Those of them that scale with the solution.
_LIMITS = ("q", "b", "h", "lower", "upper")
#: A row or bound is active when its slack is below this, relative to the data: the default of the solvers.
ACTIVE = 1e-10
#: Eigenvalues of an equilibrated KKT matrix below this fraction of the largest belong to dependent rows: the squared
#: sine at which the solvers call a row dependent.
_RANK = 1e-11
#: Data between this and its inverse are solved as they are.
_SMALL = 1e-2
#: Programs kept ready.
_KEPT = 64


# ----------------------------------------------------------------------------------------------------------------------
# Programs
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Structure:
    """What a program is made of, apart from values.

    Attributes:
        n: variables.
        equalities: rows of A.
        inequalities: rows of G.
        quadratic: how Q is given; ``"identity"`` when it is not.
        given: names of the data that are there.
        constants: those of them whose values are part of the program.
    """

    n: int
    equalities: int
    inequalities: int
    quadratic: Literal["identity", "diagonal", "dense"]
    given: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the data that arrive with every call."""
        return tuple(name for name in self.given if name not in self.constants)

    def size(self, name: str) -> int:
        """Number of entries of one item."""
        n = self.n
        rows = {"A": self.equalities, "b": self.equalities, "G": self.inequalities, "h": self.inequalities}
        if name == "Q":
            return n * n if self.quadratic == "dense" else n
        return rows[name] * n if name in "AG" else rows.get(name, n)


class _Builder:
    """Writes affine maps of the parameters of a structure."""

    def __init__(self, structure: _Structure, constants: Mapping[str, FloatArray]) -> None:
        """Lay the parameters out one after the other."""
        self.sizes = tuple(structure.size(name) for name in structure.parameters)
        edges = np.concatenate([[0], np.cumsum(self.sizes)]).astype(int)
        self._begin = dict(zip(structure.parameters, edges, strict=False))
        self._constants = constants
        self._columns = int(edges[-1]) + 1

    def values(self, name: str, entries: IndexArray, factor: float = 1.0) -> Any:
        """Return ``factor`` times some entries of one of the data as rows of a map."""
        count = len(entries)
        if name in self._constants:
            data, column = factor * self._constants[name].ravel()[entries], np.full(count, self._columns - 1)
        else:
            data, column = np.full(count, factor), self._begin[name] + entries
        return sp.coo_array((data, (np.arange(count), column)), shape=(count, self._columns))

    def ones(self, count: int, factor: float) -> Any:
        """Return constant rows of a map."""
        place = (np.arange(count), np.full(count, self._columns - 1))
        return sp.coo_array((np.full(count, factor), place), shape=(count, self._columns))

    def map(self, parts: Sequence[Any]) -> AffineMap:
        """Stack rows of a map."""
        stacked = sp.vstack([sp.coo_array((0, self._columns)), *parts])
        return AffineMap(sp.csc_array(stacked), self.sizes)


@dataclass(frozen=True)
class _Prepared:
    """A routed program and where its rows come from.

    Attributes:
        layer: the program and its gradients; outputs are x, then the multipliers of A, G, lower and upper.
        structure: what it is made of.
        kept: indices of the rows of G, lower and upper that are in the program; constant infinite ones are not.
    """

    layer: Layer
    structure: _Structure
    kept: tuple[IndexArray, IndexArray, IndexArray]

    @classmethod
    def build(cls, structure: _Structure, constants: Mapping[str, FloatArray]) -> _Prepared:
        """Write the program, presolve and route it."""
        n, p = structure.n, structure.equalities
        builder = _Builder(structure, constants)
        every = np.arange(n)

        def limited(name: str, count: int) -> IndexArray:
            if name not in structure.given:
                return np.zeros(0, dtype=np.int64)
            known = constants.get(name)
            return np.arange(count) if known is None else np.flatnonzero(~np.isinf(known.ravel()))

        general, below, above = limited("h", structure.inequalities), limited("lower", n), limited("upper", n)
        rows: list[IndexArray] = []
        columns: list[IndexArray] = []
        entries: list[Any] = []
        rhs: list[Any] = []
        names: list[str] = []
        begin = 0
        for name, right, kept in (("A", "b", np.arange(p)), ("G", "h", general)):
            if name in structure.given:
                place = np.repeat(kept, n) * n + np.tile(every, len(kept))
                known = constants.get(name)
                filled = np.ones(len(place), dtype=bool) if known is None else known.ravel()[place] != 0.0
                rows.append(begin + np.repeat(np.arange(len(kept)), n)[filled])
                columns.append(np.tile(every, len(kept))[filled])
                entries.append(builder.values(name, place[filled]))
                rhs.append(builder.values(right, kept))
                names += [f"row {i} of {name}" for i in kept]
                begin += len(kept)
        for name, kept, sign in (("lower", below, -1.0), ("upper", above, 1.0)):
            if name in structure.given:
                rows.append(begin + np.arange(len(kept)))
                columns.append(kept)
                entries.append(builder.ones(len(kept), sign))
                rhs.append(builder.values(name, kept, sign))
                names += [f"the {name} bound of x[{j}]" for j in kept]
                begin += len(kept)
        if structure.quadratic == "dense":
            grid = np.indices((n, n)).reshape(2, -1)
            quadratic = MatrixEntries((n, n), grid[0], grid[1], builder.map([builder.values("Q", np.arange(n * n))]))
        else:
            part = builder.ones(n, 1.0) if structure.quadratic == "identity" else builder.values("Q", every)
            quadratic = MatrixEntries((n, n), every, every, builder.map([part]))
        none = np.zeros(0, dtype=np.int64)
        matrix = MatrixEntries(
            (begin, n), np.concatenate([none, *rows]), np.concatenate([none, *columns]), builder.map(entries)
        )
        linear = builder.map([builder.values("q", every)])
        program = Program(n, p, quadratic, linear, matrix, builder.map(rhs), np.ones(n, dtype=bool), tuple(names))
        plan = Plan(program)
        if not plan.route.polyhedral:
            raise UnsupportedProblemError(f"no solver of hsbackend takes this program: {plan.route.reason}")
        outputs = [Output("primal", every, (n,))]
        begin = 0
        for count in (p, len(general), len(below), len(above)):
            outputs.append(Output("multipliers", begin + np.arange(count), (count,)))
            begin += count
        return cls(Layer(plan, outputs), structure, (general, below, above))

    def outputs(self, solution: Solution) -> list[FloatArray]:
        """Return x and the multipliers of A, G, lower and upper, zero where a row was left out."""
        x, y, *rest = self.layer.select(solution)
        sizes = (self.structure.inequalities, self.structure.n, self.structure.n)
        found = [x, y]
        for values, kept, size in zip(rest, self.kept, sizes, strict=True):
            full = values
            if len(kept) != size:
                full = np.zeros((len(x), size))
                full[:, kept] = values
            found.append(np.maximum(full, 0.0))
        return found

    def pullback(
        self, solution: Solution, cotangents: Sequence[FloatArray | None], wanted: Mapping[str, bool],
        shared: Mapping[str, bool],
    ) -> dict[str, FloatArray | None]:  # fmt: skip
        """Return the gradients of the parameters by name."""
        x, y, *rest = cotangents
        picked = [
            None if g is None else np.ascontiguousarray(g[:, kept]) for g, kept in zip(rest, self.kept, strict=True)
        ]
        names = self.structure.parameters
        gradients = self.layer.pullback(
            solution, [x, y, *picked], [wanted[name] for name in names], [shared[name] for name in names]
        )
        return dict(zip(names, gradients, strict=True))


@dataclass
class _Entry:
    prepared: _Prepared
    constants: dict[str, FloatArray]

    def holds(self, structure: _Structure, constants: Mapping[str, FloatArray]) -> bool:
        """Whether this is the program with these constants, bit by bit (NaN included)."""
        return self.prepared.structure == structure and all(
            np.array_equal(self.constants[name].view(np.int64), values.view(np.int64))
            for name, values in constants.items()
        )


class _Cache:
    """Programs by structure and constant values.

    A constant is found again by its address, and then compared: the values decide, so a tensor that was changed in
    place, in whatever way, is a new program and never an old answer.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._lock = Lock()

    def get(self, structure: _Structure, places: tuple[int, ...], values: Mapping[str, FloatArray]) -> _Prepared:
        """Return the program, made when it is new; ``places`` are the addresses of the constants."""
        key = (structure, places)
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None or not entry.holds(structure, values):
                known = (other for other, kept in self._entries.items() if kept.holds(structure, values))
                moved = next(known, None)  # the same values at another address
                entry = None if moved is None else self._entries.pop(moved)
        if entry is None:
            copies = {name: array.copy() for name, array in values.items()}
            entry = _Entry(_Prepared.build(structure, copies), copies)
        with self._lock:
            self._entries[key] = entry
            while len(self._entries) > _KEPT:
                self._entries.popitem(last=False)
        return entry.prepared


_CACHE = _Cache()


def _array(tensor: Tensor) -> FloatArray:
    """Return the values as contiguous float64 in main memory."""
    return tensor.detach().to(device="cpu", dtype=torch.float64).contiguous().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How a program is to be solved.

    Attributes:
        tolerance: largest accepted KKT residual, relative to the data.
        jacobian: which K of the Han-Sun set the derivative uses.
        strict: raise for failing items.
        constants: names of the data whose values do not change from call to call; they must not be batched.
    """

    tolerance: float = 1e-9
    jacobian: Choice = "active"
    strict: bool = True
    constants: tuple[str, ...] = ()


def constant(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may become part of a program: one value for every item, nobody asks for its derivative."""
    if tuple(tensor.shape) != shape or tensor.requires_grad:
        return False
    return torch.compiler.is_compiling() or not is_functorch_wrapped_tensor(tensor)


@dataclass(frozen=True)
class Data:
    """The tensors of a batch of programs, float64 apart from constants; a leading dimension of 1 means shared.

    Attributes:
        Q: (B, n, n), or (B, n) for a diagonal, None for the identity.
        q: (B, n).
        A: (B, p, n), None without equalities.
        b: (B, p).
        G: (B, m, n), None without inequalities.
        h: (B, m), may hold inf.
        lower: (B, n), may hold -inf; None for none.
        upper: (B, n), may hold inf; None for none.
    """

    Q: Tensor | None
    q: Tensor
    A: Tensor | None
    b: Tensor | None
    G: Tensor | None
    h: Tensor | None
    lower: Tensor | None
    upper: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order of ``NAMES``."""
        return (self.Q, self.q, self.A, self.b, self.G, self.h, self.lower, self.upper)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return n, p, m."""
        return (self.q.shape[1], 0 if self.b is None else self.b.shape[1], 0 if self.h is None else self.h.shape[1])

    @property
    def batch(self) -> int:
        """Number of items."""
        lengths = [tensor.shape[0] for tensor in self.tensors if tensor is not None]
        return next((length for length in lengths if length != 1), 1)

    def structure(self, constants: tuple[str, ...]) -> _Structure:
        """Describe the program."""
        kind = "identity" if self.Q is None else "diagonal" if self.Q.dim() == 2 else "dense"
        given = tuple(name for name, tensor in zip(NAMES, self.tensors, strict=True) if tensor is not None)
        return _Structure(*self.sizes, kind, given, tuple(name for name in constants if name in given))


def _largest(array: FloatArray) -> FloatArray:
    """Return the largest finite magnitude of each item, (B, 1)."""
    size = np.abs(array)
    finite = np.isfinite(size)
    return np.max(size if finite.all() else np.where(finite, size, 0.0), axis=1, initial=0.0, keepdims=True)


def _unit(limits: Sequence[FloatArray], q: FloatArray) -> FloatArray:
    """Return the size of the limits of each item, or of q where all of them are zero, (B, 1) or (1, 1).

    It is a power of two, and 1 for data around 1. Solvers know absolute tolerances; with limits t b and linear term t q
    the solution is t x, so data of another size are brought to size 1 first, without a rounding error.
    """
    found = limits[0] if limits else np.zeros((1, 1))
    for limit in limits[1:]:
        found = np.maximum(found, limit)
    if not found.all():
        found = np.where(found > 0.0, found, _largest(q))
    unusual = (found > 0.0) & ((found < _SMALL) | (found > 1.0 / _SMALL))
    if not unusual.any():
        return np.ones((1, 1))
    return np.where(unusual, np.exp2(np.floor(np.log2(np.where(unusual, found, 1.0)))), 1.0)


@dataclass
class _Solved:
    """What a plain backward pass needs.

    Attributes:
        prepared: the program.
        solution: its solution.
        scale: (B, 1) or (1, 1) what limits and q were divided by, None for 1.
    """

    prepared: _Prepared
    solution: Solution
    scale: FloatArray | None

    def pullback(
        self, cotangents: Sequence[Tensor | None], wanted: Mapping[str, bool], shared: Mapping[str, bool]
    ) -> dict[str, FloatArray | None]:
        """Return the gradients of the parameters by name."""
        arrays = [None if cotangent is None else _array(cotangent) for cotangent in cotangents]
        if self.scale is None:
            return self.prepared.pullback(self.solution, arrays, wanted, shared)
        arrays = [None if array is None else array * self.scale for array in arrays]
        whole = len(self.scale) > 1
        single = {name: shared[name] and not (whole and name in _LIMITS) for name in NAMES}
        found = self.prepared.pullback(self.solution, arrays, wanted, single)
        for name in _LIMITS:
            gradient = found.get(name)
            if gradient is not None:
                gradient = gradient / (self.scale if gradient.ndim == 2 else self.scale[0])
                found[name] = gradient.sum(axis=0) if shared[name] and not single[name] else gradient
        return found


def _solve_values(settings: Settings, data: Data) -> tuple[tuple[Tensor, ...], _Solved | None]:
    """Solve; return x, the multipliers of A, G, lower and upper, the status and the unit."""
    n, p, m = data.sizes
    batch = data.batch
    if batch == 0:
        new = data.q.new_empty
        empty = (new(0, n), new(0, p), new(0, m), new(0, n), new(0, n), new(0, dtype=torch.int8), new(0, 1))
        return empty, None
    tensors = {name: tensor for name, tensor in zip(NAMES, data.tensors, strict=True) if tensor is not None}
    arrays = {name: _array(tensor) for name, tensor in tensors.items()}
    unit = _unit([_largest(arrays[name]) for name in _LIMITS[1:] if name in arrays], arrays["q"])
    scaled = bool((unit != 1.0).any())
    constants = settings.constants
    if scaled:
        constants = tuple(name for name in constants if name not in _LIMITS)
        arrays |= {name: arrays[name] / unit for name in _LIMITS if name in arrays}
    structure = data.structure(constants)
    places = tuple(tensors[name].data_ptr() for name in structure.constants)
    prepared = _CACHE.get(structure, places, {name: arrays[name] for name in structure.constants})
    parameters = [arrays[name].reshape(len(arrays[name]), structure.size(name)) for name in structure.parameters]
    options = Options(settings.tolerance, settings.jacobian)
    solution = prepared.layer.solve(parameters, options, "raise" if settings.strict else "nan", None)
    found = prepared.outputs(solution)
    if scaled:
        found = [array * unit for array in found]
    outputs = [torch.from_numpy(array) for array in (*found, solution.status, unit.repeat(batch // len(unit), 0))]
    if data.q.device.type != "cpu":
        outputs = [output.to(data.q.device) for output in outputs]
    return tuple(outputs), _Solved(prepared, solution, unit if scaled else None)


# ----------------------------------------------------------------------------------------------------------------------
# The derivative in torch operations
# ----------------------------------------------------------------------------------------------------------------------


def _pseudo_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Apply a symmetric generalised inverse (..., k, k): the pseudo-inverse of the equilibrated matrix."""
    scale = matrix.new_ones(matrix.shape[:-1])
    for _ in range(3):  # Ruiz (2001): the largest entry of every row tends to one
        largest = (scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2)).abs().amax(-1)
        scale = scale / torch.where(largest > 0.0, largest, 1.0).sqrt()
    values, vectors = torch.linalg.eigh(scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2))
    size = values.abs()
    kept = size > _RANK * size.amax(-1, keepdim=True)
    inverse = kept / torch.where(kept, values, 1.0)
    inner = vectors.mT @ (scale * rhs).unsqueeze(-1)
    return scale * (vectors @ (inverse.unsqueeze(-1) * inner)).squeeze(-1)


def _pseudo_pullback(solve: Callable[..., Tensor], ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """``p = M^+ g;  r: p,  M: -p z'``."""
    matrix, z = ctx.saved_tensors
    p = solve(matrix, cotangent)
    return (-p.unsqueeze(-1) * z.unsqueeze(-2)).sum_to_size(matrix.shape), p


def _pseudo_mapped(size: int, dims: Sequence[int | None], matrix: Tensor, rhs: Tensor) -> tuple[Tensor, int]:
    """Add the mapped axis in front; a matrix that is not mapped is factored once."""
    rhs = rhs.expand(size, *rhs.shape) if dims[1] is None else rhs.movedim(dims[1], 0)
    if dims[0] is not None:
        matrix = matrix.movedim(dims[0], 0)
        further = [1] * (rhs.dim() + 1 - matrix.dim())  # the axes that only the right-hand side has
        matrix = matrix.reshape(size, *further, *matrix.shape[1:])
    return pseudo_solve(matrix, rhs), 0


class _PseudoSolve(torch.autograd.Function):
    """``z = M^+ r`` for a symmetric M; its derivative is itself."""

    @staticmethod
    def forward(matrix: Tensor, rhs: Tensor) -> Tensor:
        """(..., k, k) and (..., k); the right-hand side may have more axes in front."""
        return _pseudo_solve(matrix, rhs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Save for both modes."""
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the rule of :func:`_pseudo_pullback`."""
        return _pseudo_pullback(pseudo_solve, ctx, cotangents[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """``z' = M^+ (r' - M'z)``."""
        with outer_tangents():
            matrix, z = primals(ctx.saved_tensors)
            d_matrix, d_rhs = tangents
            right = torch.zeros_like(z) if d_rhs is None else d_rhs
            if d_matrix is not None:
                right = right - (d_matrix @ z.unsqueeze(-1)).squeeze(-1)
            return pseudo_solve(matrix, right)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        """Map over the axes in front."""
        return _pseudo_mapped(info.batch_size, in_dims, *inputs)


@torch.library.custom_op("hsbackend::pseudo_solve", mutates_args=())
def _pseudo_solve_op(matrix: Tensor, rhs: Tensor) -> Tensor:
    return _pseudo_solve(matrix, rhs)


@_pseudo_solve_op.register_fake
def _(matrix: Tensor, rhs: Tensor) -> Tensor:
    return torch.empty_like(rhs, memory_format=torch.contiguous_format)


def _pseudo_solve_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _pseudo_solve_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    return _pseudo_pullback(_pseudo_solve_op, ctx, cotangent)


_pseudo_solve_op.register_autograd(_pseudo_solve_backward, setup_context=_pseudo_solve_setup)


@_pseudo_solve_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], matrix: Tensor, rhs: Tensor) -> tuple[Tensor, int]:
    return _pseudo_mapped(info.batch_size, in_dims, matrix, rhs)


def pseudo_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Apply the generalised inverse of symmetric matrices (B, k, k) to (B, k); differentiable to any order.

    The derivative keeps the rank: directions in which dependent rows would become independent do not count.
    """
    if torch.compiler.is_compiling() or is_legacy_batchedtensor(rhs):
        return _pseudo_solve_op(matrix, rhs)
    return _PseudoSolve.apply(matrix, rhs)


def _finite(tensor: Tensor) -> Tensor:
    """Replace what failed items and absent limits hold, NaN and infinity, by zero."""
    return torch.nan_to_num(tensor.to(torch.float64), 0.0, 0.0, 0.0)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix-vector products of a batch; a diagonal has one dimension less."""
    return matrix * vector if matrix.dim() == vector.dim() else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def find_active(data: Data, outputs: Sequence[Tensor], choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows of G, lower and upper bounds are in K: masks (B, m), (B, n), (B, n).

    A row is active where its slack is zero to rounding, or smaller than its multiplier; for ``"support"`` the
    multiplier must not be zero to rounding either.
    """
    x, _, z, z_lower, z_upper = (tensor.detach() for tensor in outputs[:5])
    unit = outputs[6]
    least = ACTIVE * _finite(data.q.detach()).abs().amax(1, keepdim=True)

    def member(slack: Tensor, limit: Tensor, multiplier: Tensor) -> Tensor:
        held = multiplier > slack
        if choice == "support":
            return held & (multiplier > least)
        return held | (slack <= ACTIVE * (unit + torch.where(limit.isinf(), 0.0, limit).abs()))

    rows = torch.zeros_like(z, dtype=torch.bool)
    if data.G is not None and data.h is not None:
        normals, h = data.G.detach().to(torch.float64), data.h.detach().to(torch.float64)
        length = torch.linalg.vector_norm(normals, dim=-1)
        length = torch.where(length > 0.0, length, 1.0)
        rows = member((h - times(normals, x)) / length, h / length, z * length)
    below = above = torch.zeros_like(x, dtype=torch.bool)
    if data.lower is not None:
        lower = data.lower.detach().to(torch.float64)
        below = member(x - lower, lower, z_lower)
    if data.upper is not None:
        upper = data.upper.detach().to(torch.float64)
        above = member(upper - x, upper, z_upper)
    return rows, below, above


def _side(data: Data, outputs: Sequence[Tensor], choice: Choice) -> tuple[Tensor, Tensor]:
    """Return which rows of G are in K, (B, m) 0 or 1, and the side at which coordinates are held, (B, n) -1, 0 or 1."""
    rows, below, above = find_active(data, outputs, choice)
    x, z_lower, z_upper = outputs[0].detach(), outputs[3].detach(), outputs[4].detach()
    if data.lower is not None and data.upper is not None:
        # It cannot move, whatever the multiplier.
        above = above | ((data.lower.detach() == data.upper.detach()) & (x == x))
    side = torch.where(below & ~(above & (z_upper > z_lower)), -1.0, torch.where(above, 1.0, 0.0))
    return rows.to(x.dtype), side.to(x.dtype)


@dataclass(frozen=True)
class _Face:
    """A solution and its face: what every derivative starts from; NaN and infinities are zero."""

    hessian: Tensor
    normals: Tensor
    equalities: int
    x: Tensor
    multipliers: Sequence[Tensor]
    rows: Tensor
    side: Tensor
    failed: Tensor

    @classmethod
    def of(cls, data: Data, outputs: Sequence[Tensor], choice: Choice) -> _Face:
        """Find the face of a solution."""
        n, p, _ = data.sizes
        x = outputs[0]
        rows, side = _side(data, outputs, choice)
        batch = x.shape[0]
        parts = [rows.unsqueeze(-1) * _finite(data.G)] if data.G is not None else []
        if data.A is not None:
            parts.insert(0, _finite(data.A).expand(batch, p, n))
        normals = torch.cat([x.new_zeros(batch, 0, n), *parts], dim=1)
        if data.Q is None:
            hessian = torch.eye(n, dtype=x.dtype, device=x.device).expand(batch, n, n)
        else:
            hessian = _finite(data.Q)
            hessian = torch.diag_embed(hessian) if hessian.dim() == 2 else hessian
        multipliers = [_finite(value) for value in outputs[1:5]]
        return cls(hessian, normals, p, _finite(x), multipliers, rows, side, x[:, 0].isnan())

    def solve(
        self, g: Tensor, r_eq: Tensor | None, r_ineq: Tensor | None, r_bound: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Solve the KKT system of the module docstring; held coordinates are taken out of it first."""
        n = g.shape[1]
        held = self.side.abs()
        free = 1.0 - held
        zero = torch.zeros_like(self.multipliers[0])
        right = torch.cat(
            [
                zero if r_eq is None else r_eq.expand(zero.shape),
                torch.zeros_like(self.rows) if r_ineq is None else self.rows * r_ineq,
            ],
            dim=1,
        )
        fixed = torch.zeros_like(g) if r_bound is None else held * r_bound
        inner = free.unsqueeze(-1) * self.hessian * free.unsqueeze(-2) + torch.diag_embed(held)
        outer = self.normals * free.unsqueeze(-2)
        corner = g.new_zeros(g.shape[0], outer.shape[1], outer.shape[1])
        matrix = torch.cat([torch.cat([inner, outer.mT], dim=2), torch.cat([outer, corner], dim=2)], dim=1)
        rhs = torch.cat([free * (g - times(self.hessian, fixed)), right - times(self.normals, fixed)], dim=1)
        z = pseudo_solve(matrix, rhs)
        # A failed item has no derivative: zero where nobody asks for it, NaN where somebody does.
        asked = ((g != 0.0).any(1) | (right != 0.0).any(1) | (fixed != 0.0).any(1)) & self.failed
        z = z + torch.where(asked, torch.nan, 0.0).to(z.dtype).unsqueeze(-1)
        u, w = free * z[:, :n] + fixed, z[:, n:]
        bounds = held * (g - times(self.hessian, u) - times(self.normals.mT, w))
        return u, w[:, : self.equalities], self.rows * w[:, self.equalities :], bounds


def _tangent(
    settings: Settings, data: Data, outputs: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the tangents of x and of the multipliers of A, G, lower and upper."""
    d_quadratic, d_linear, d_a, d_b, d_g, d_h, d_lower, d_upper = tangents
    face = _Face.of(data, outputs, settings.jacobian)
    x, (y, z, _, _) = face.x, face.multipliers
    g = torch.zeros_like(x)
    if d_quadratic is not None:
        g = g - times(d_quadratic, x)
    if d_linear is not None:
        g = g - d_linear
    right: list[Tensor | None] = [d_b, d_h]
    for index, (d_rows, multiplier) in enumerate(((d_a, y), (d_g, z))):
        if d_rows is not None:
            g = g - times(d_rows.mT, multiplier)
            known, moved = right[index], times(d_rows, x)
            right[index] = -moved if known is None else known - moved
    below, above = (face.side < 0.0).to(x.dtype), (face.side > 0.0).to(x.dtype)
    bound = None
    for d_limit, mask in ((d_lower, below), (d_upper, above)):
        if d_limit is not None:
            bound = mask * d_limit if bound is None else bound + mask * d_limit
    u, w_eq, w_ineq, w_bound = face.solve(g, right[0], right[1], bound)
    return u, w_eq, w_ineq, -below * w_bound, above * w_bound


def _cotangent(
    settings: Settings,
    data: Data,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the cotangents of the data."""
    if all(cotangent is None for cotangent in cotangents):
        return [None] * len(NAMES)
    g, g_y, g_z, g_lower, g_upper = cotangents
    face = _Face.of(data, outputs, settings.jacobian)
    x, (y, z, _, _) = face.x, face.multipliers
    below, above = (face.side < 0.0).to(x.dtype), (face.side > 0.0).to(x.dtype)
    bound = None
    for g_limit, mask in ((g_lower, -below), (g_upper, above)):
        if g_limit is not None:
            bound = mask * g_limit if bound is None else bound + mask * g_limit
    u, w_eq, w_ineq, w_bound = face.solve(torch.zeros_like(x) if g is None else g, g_y, g_z, bound)

    def outer(a: Tensor, b: Tensor) -> Tensor:
        return a.unsqueeze(-1) * b.unsqueeze(-2)

    def quadratic() -> Tensor:
        if data.Q is not None and data.Q.dim() == 2:
            return -u * x
        return -0.5 * (outer(u, x) + outer(x, u))

    rules = (
        quadratic, lambda: -u, lambda: -(outer(y, u) + outer(w_eq, x)), lambda: w_eq,
        lambda: -(outer(z, u) + outer(w_ineq, x)), lambda: w_ineq, lambda: below * w_bound, lambda: above * w_bound,
    )  # fmt: skip
    found: list[Tensor | None] = []
    for rule, tensor, need in zip(rules, data.tensors, needs, strict=True):
        value = rule() if need and tensor is not None else None
        if value is not None and tensor is not None and tensor.shape[0] == 1 and value.shape[0] != 1:
            value = value.sum(0, keepdim=True)
        found.append(value)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Wrappings: as in hsbackend.operators
# ----------------------------------------------------------------------------------------------------------------------


def _save(ctx: Any, settings: Settings, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(*outputs[5:])
    ctx.set_materialize_grads(False)
    ctx.settings = settings
    ctx.save_for_backward(*tensors, *outputs)
    ctx.save_for_forward(*tensors, *outputs)


def _saved(ctx: Any, tensors: Sequence[Any] | None = None) -> tuple[Settings, Data, Sequence[Tensor]]:
    saved = ctx.saved_tensors if tensors is None else tensors
    return ctx.settings, Data(*saved[:8]), saved[8:]


class _Solve(torch.autograd.Function):
    """The program outside of transforms."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Tensors in the order of ``NAMES``."""
        outputs, ctx.solved = _solve_values(settings, Data(*tensors))  # pyright: ignore[reportArgumentType]
        _save(ctx, settings, tensors, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Use the solver's own factorisation unless somebody differentiates again."""
        settings, data, outputs = _saved(ctx)  # raises if a tensor was changed in place since the forward pass
        given, needs = cotangents[:5], ctx.needs_input_grad[1:]
        batched = any(cotangent is not None and is_legacy_batchedtensor(cotangent) for cotangent in given)
        if ctx.solved is None or batched or not values_only():
            return (None, *_cotangent(settings, data, outputs, needs, given))
        shared = {
            name: tensor is not None and tensor.shape[0] == 1 for name, tensor in zip(NAMES, data.tensors, strict=True)
        }
        gradients = ctx.solved.pullback(given, dict(zip(NAMES, needs, strict=True)), shared)
        found: list[Tensor | None] = []
        for name, tensor in zip(NAMES, data.tensors, strict=True):
            gradient = gradients.get(name)
            found.append(
                None
                if gradient is None or tensor is None
                else torch.from_numpy(gradient).reshape(tensor.shape).to(tensor.device)
            )
        return (None, *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        return (*_tangent(*_saved(ctx), tangents[1:]), None, None)


class _SolveTransformed(torch.autograd.Function):
    """The program inside of ``torch.func`` transforms."""

    @staticmethod
    def forward(
        settings: Settings, Q: Tensor | None, q: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None,
        h: Tensor | None, lower: Tensor | None, upper: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Tensors in the order of ``NAMES``."""
        return _solve_values(settings, Data(Q, q, A, b, G, h, lower, upper))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save for both modes: a transform may ask for either."""
        _save(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        with outer_tangents():
            return (*_tangent(*_saved(ctx, primals(ctx.saved_tensors)), tangents[1:]), None, None)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Apply the rule of the module docstring."""
        return (None, *_cotangent(*_saved(ctx), ctx.needs_input_grad[1:], cotangents[:5]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped axis into the batch; a mapped constant becomes a parameter, failing items are NaN."""
        return _mapped(inputs[0], info.batch_size, in_dims[1:], inputs[1:]), (0,) * 7


def _mapped(settings: Settings, size: int, dims: Sequence[Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Solve with the mapped axis folded into the batch; what is mapped is no constant."""
    constants = tuple(name for name, dim in zip(NAMES, dims, strict=True) if dim is None and name in settings.constants)
    tensors = [
        tensor if tensor is None or name in constants else tensor.to(torch.float64)
        for name, tensor in zip(NAMES, fold(size, inputs, dims), strict=True)
    ]
    outputs = solve(replace(settings, strict=False, constants=constants), Data(*tensors))  # pyright: ignore[reportArgumentType]
    return unfold(size, outputs)


@torch.library.custom_op("hsbackend::qp_solve", mutates_args=())
def _solve_op(
    tolerance: float, jacobian: str, constants: str, Q: Tensor | None, q: Tensor, A: Tensor | None, b: Tensor | None,
    G: Tensor | None, h: Tensor | None, lower: Tensor | None, upper: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    data = Data(Q, q, A, b, G, h, lower, upper)
    x, y, z, z_lower, z_upper, status, unit = _solve_values(_settings(tolerance, jacobian, constants), data)[0]
    return x, y, z, z_lower, z_upper, status, unit


def _settings(tolerance: float, jacobian: str, constants: str) -> Settings:
    """Return the settings from what an operator can be given; it cannot raise."""
    return Settings(tolerance, "support" if jacobian == "support" else "active", False, tuple(constants.split()))


@_solve_op.register_fake
def _(
    tolerance: float, jacobian: str, constants: str, Q: Tensor | None, q: Tensor, A: Tensor | None, b: Tensor | None,
    G: Tensor | None, h: Tensor | None, lower: Tensor | None, upper: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    data = Data(Q, q, A, b, G, h, lower, upper)
    n, p, m = data.sizes
    batch = data.batch
    return (
        q.new_empty(batch, n), q.new_empty(batch, p), q.new_empty(batch, m), q.new_empty(batch, n),
        q.new_empty(batch, n), q.new_empty(batch, dtype=torch.int8), q.new_empty(batch, 1),
    )  # fmt: skip


def _solve_op_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tolerance, jacobian, constants, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.settings = _settings(tolerance, jacobian, constants)
    ctx.save_for_backward(*tensors, *output)


def _solve_op_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    return (None, None, None, *_cotangent(*_saved(ctx), ctx.needs_input_grad[3:], cotangents[:5]))


_solve_op.register_autograd(_solve_op_backward, setup_context=_solve_op_setup)


@_solve_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return _mapped(_settings(*inputs[:3]), info.batch_size, in_dims[3:], inputs[3:]), (0,) * 7


def solve(settings: Settings, data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve a batch of programs; differentiable in every tensor that is not a constant.

    Returns:
        x (B, n), the multipliers of A (B, p), G (B, m), lower (B, n) and upper (B, n), the status (B,), and the unit
        (B, 1) in which tolerances are measured.

    Raises:
        SolveError: if ``settings.strict`` and an item has no solution; under ``vmap`` and ``torch.compile`` it is NaN.
        UnsupportedProblemError: if no solver of the library takes the program.
    """
    if torch.compiler.is_compiling():
        constants = " ".join(settings.constants)
        return _solve_op(settings.tolerance, settings.jacobian, constants, *data.tensors)
    if transforms_active():
        return _SolveTransformed.apply(settings, *data.tensors)
    if values_only():
        x, y, z, z_lower, z_upper, status, unit = _solve_values(settings, data)[0]
        return x, y, z, z_lower, z_upper, status, unit
    return _Solve.apply(settings, *data.tensors)
