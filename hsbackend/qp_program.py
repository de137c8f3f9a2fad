"""Quadratic programs given by tensors, as programs of the library.

    minimise   1/2 x'Qx + q'x
    subject to A x  = b                 multipliers y (``eq``), free
               G x <= h                 multipliers z >= 0 (``ineq``)
               lower <= x <= upper      multipliers z_l, z_u >= 0

with stationarity ``Q x + q + A'y + G'z - z_l + z_u = 0``. Any of the data may be there or not, with a batch axis or
without, constant or given with every call. A program is written, presolved and routed once for each such combination.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from hsbackend.differentiate import Layer, Output
from hsbackend.families.family import Choice
from hsbackend.plan import Plan, Solution
from hsbackend.program import AffineMap, FloatArray, IndexArray, MatrixEntries, Program
from hsbackend.status import NAMED_ITEMS, Status, UnsupportedProblemError

#: The data of a program, in the order of every argument list here.
NAMES: tuple[str, ...] = ("Q", "q", "A", "b", "G", "h", "lower", "upper")
#: Programs kept ready.
KEPT = 64
#: Entries of a ray below this, relative to the largest, are rounding.
_RUNNING = 1e-9


@dataclass(frozen=True)
class Structure:
    """What a program is made of, apart from values.

    Attributes:
        n: variables.
        equalities: rows of A.
        inequalities: rows of G.
        quadratic: how Q is given; ``"identity"`` or ``"zero"`` when it is not.
        given: names of the data that are there.
        constants: those of them whose values are part of the program.
    """

    n: int
    equalities: int
    inequalities: int
    quadratic: Literal["zero", "identity", "diagonal", "dense"]
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

    def __init__(self, structure: Structure, constants: Mapping[str, FloatArray]) -> None:
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
class Prepared:
    """A routed program and where its rows come from.

    Attributes:
        layer: the program and its gradients; outputs are x, then the multipliers of A, G, lower and upper.
        structure: what it is made of.
        kept: indices of the rows of G, lower and upper that are in the program; constant infinite ones are not.
    """

    layer: Layer
    structure: Structure
    kept: tuple[IndexArray, IndexArray, IndexArray]

    @classmethod
    def build(cls, structure: Structure, constants: Mapping[str, FloatArray]) -> Prepared:
        """Write the program, presolve and route it."""
        n, p = structure.n, structure.equalities
        builder = _Builder(structure, constants)
        every, none = np.arange(n), np.zeros(0, dtype=np.int64)

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
        elif structure.quadratic == "zero":
            quadratic = MatrixEntries((n, n), none, none, builder.map([]))
        else:
            part = builder.ones(n, 1.0) if structure.quadratic == "identity" else builder.values("Q", every)
            quadratic = MatrixEntries((n, n), every, every, builder.map([part]))
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

    @cached_property
    def _originals(self) -> IndexArray:
        """The row of the program that each row of the presolved program comes from."""
        plan = self.layer.plan
        count = plan._reduced.num_rows  # pyright: ignore[reportPrivateUsage]
        return np.array([plan._original_row(row) for row in range(count)], dtype=np.int64)  # pyright: ignore[reportPrivateUsage]

    def active(self, solution: Solution) -> NDArray[np.bool_]:
        """Return the rows of G, lower and upper in the K of the solver's face, (B, m + 2n)."""
        plan, face = self.layer.plan, solution.face
        assert isinstance(plan, Plan)
        batch = len(solution.status)
        sizes = (self.structure.inequalities, self.structure.n, self.structure.n)
        if face is None:
            return np.zeros((batch, sum(sizes)), dtype=bool)
        held = np.zeros((batch, plan.program.num_rows), dtype=bool)
        held[:, np.setdiff1d(np.arange(held.shape[1]), self._originals)] = True  # what presolve took away holds
        bounds = plan._bounds  # pyright: ignore[reportPrivateUsage]
        held[:, self._originals[bounds.kept_rows]] = face.active_rows != 0
        if len(bounds.variables):
            target, _ = plan._bound_rows(face.active_bounds, solution.presolved)  # pyright: ignore[reportPrivateUsage]
            item, position = np.nonzero(target >= 0)
            held[item, self._originals[target[item, position]]] = True
        parts: list[NDArray[np.bool_]] = []
        begin = self.structure.equalities
        for kept, size in zip(self.kept, sizes, strict=True):
            full = np.zeros((batch, size), dtype=bool)
            full[:, kept] = held[:, begin : begin + len(kept)]
            parts.append(full)
            begin += len(kept)
        return np.concatenate(parts, axis=1)

    def ray_names(self, solution: Solution) -> dict[int, list[str]]:
        """Return the names of the variables that run off, for those unbounded items that a message names."""
        found: dict[int, list[str]] = {}
        failing = np.flatnonzero(solution.status != Status.SOLVED)[:NAMED_ITEMS]
        for item in failing[solution.status[failing] == Status.UNBOUNDED]:
            ray = solution.certify(int(item), Status.UNBOUNDED)
            if ray is not None:
                size = np.abs(ray)
                found[int(item)] = [f"x[{j}]" for j in np.flatnonzero(size > _RUNNING * size.max(initial=0.0))]
        return found

    def certificate(self, solution: Solution, item: int) -> list[FloatArray] | None:
        """Return what shows that an item has no optimum, of infinity norm 1; None if nothing is known.

        The multipliers of A, G, lower and upper for an infeasible one, a ray for an unbounded one.
        """
        found = solution.certificates.get(item)
        size = 0.0 if found is None else float(np.abs(found).max(initial=0.0))
        if found is None or not size:
            return None
        if solution.status[item] == Status.UNBOUNDED:
            return [found / size]
        structure = self.structure
        counts = (structure.inequalities, structure.n, structure.n)
        parts = [found[: structure.equalities] / size]
        begin = structure.equalities
        for kept, count in zip(self.kept, counts, strict=True):
            full = np.zeros(count)
            full[kept] = np.maximum(found[begin : begin + len(kept)] / size, 0.0)
            parts.append(full)
            begin += len(kept)
        return parts

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
    prepared: Prepared
    constants: dict[str, FloatArray]

    def holds(self, structure: Structure, constants: Mapping[str, FloatArray]) -> bool:
        """Whether this is the program with these constants, bit by bit (NaN included)."""
        return self.prepared.structure == structure and all(
            np.array_equal(self.constants[name].view(np.int64), values.view(np.int64))
            for name, values in constants.items()
        )


class Cache:
    """Programs by structure and constant values.

    A constant is found again by its address, and then compared: the values decide, so a tensor that was changed in
    place, in whatever way, is a new program and never an old answer.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._lock = Lock()

    def get(self, structure: Structure, places: tuple[int, ...], values: Mapping[str, FloatArray]) -> Prepared:
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
            entry = _Entry(Prepared.build(structure, copies), copies)
        with self._lock:
            self._entries[key] = entry
            while len(self._entries) > KEPT:
                self._entries.popitem(last=False)
        return entry.prepared


CACHE = Cache()


def as_array(tensor: Tensor) -> FloatArray:
    """Return the values as contiguous float64 in main memory."""
    return tensor.detach().to(device="cpu", dtype=torch.float64).contiguous().numpy()


@dataclass(frozen=True)
class Settings:
    """How a program is to be solved.

    Attributes:
        tolerance: largest accepted KKT residual, relative to the data.
        jacobian: which K of the Han-Sun set the derivative uses.
        strict: raise for failing items.
        constants: names of the data whose values do not change from call to call; they must not be batched.
        identity: whether Q is the identity where it is not given (a projection); else it is zero (a linear program).
        once: names of the data without batch axes. In a batch of one the shapes do not tell, and an item alone is to
            have the bits it has in a larger batch.
    """

    tolerance: float = 1e-9
    jacobian: Choice = "active"
    strict: bool = True
    constants: tuple[str, ...] = ()
    identity: bool = False
    once: tuple[str, ...] = ()


def constant(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may become part of a program: one value for every item, nobody asks for its derivative."""
    if tuple(tensor.shape) != shape or tensor.requires_grad:
        return False
    return torch.compiler.is_compiling() or not is_functorch_wrapped_tensor(tensor)


@dataclass(frozen=True)
class Data:
    """The tensors of a batch of programs, float64 apart from constants; a leading dimension of 1 means shared.

    Attributes:
        Q: (B, n, n), or (B, n) for a diagonal, None for what the settings say.
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

    def take(self, items: Tensor) -> Data:
        """Return the programs of some items; what is shared stays as it is."""
        items = items.to(self.q.device)
        return Data(
            *(tensor if tensor is None or tensor.shape[0] == 1 else tensor[items] for tensor in self.tensors)  # pyright: ignore[reportArgumentType]
        )

    @property
    def diagonal(self) -> bool:
        """Whether Q is given by its diagonal."""
        return self.Q is not None and self.Q.dim() == 2

    def hessian(self, settings: Settings) -> Tensor:
        """Return Q in float64, (B, n, n), or (B, n) for a diagonal."""
        if self.Q is not None:
            return self.Q.to(torch.float64)
        shape, make = (1, self.q.shape[1]), torch.ones if settings.identity else torch.zeros
        return make(shape, dtype=torch.float64, device=self.q.device)

    def structure(self, settings: Settings, constants: tuple[str, ...]) -> Structure:
        """Describe the program."""
        kind = "identity" if settings.identity else "zero"
        if self.Q is not None:
            kind = "diagonal" if self.diagonal else "dense"
        given = tuple(name for name, tensor in zip(NAMES, self.tensors, strict=True) if tensor is not None)
        return Structure(*self.sizes, kind, given, tuple(name for name in constants if name in given))
