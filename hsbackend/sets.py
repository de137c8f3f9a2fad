"""What :class:`hsbackend.Polyhedron` is made of: one class per kind of set, each with its own way to project.

A set is described by values, floats or tensors. Every value has the shape of one item at its end and batch axes in
front. What is made of floats alone is kept; what is made of tensors is made again with every call, because tensors may
be trained, replaced or changed in place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from hsbackend import closest, operators, qp_operators, qp_program, sparse_qp
from hsbackend.closed_forms import Asked, clip, pseudo_inverse, settle, step_to_affine, step_to_row
from hsbackend.operators import dual_level_open, on_device, transforms_active
from hsbackend.qp import flatten, solve_sparse
from hsbackend.status import UnsupportedProblemError

Value = float | Tensor
Shape = tuple[int, ...]


class Rows(NamedTuple):
    """A set written as ``A x = b, G x <= h, lower <= x <= upper`` on flattened coordinates, None for what is not there.

    Attributes:
        A: (..., p, n).
        b: (..., p).
        G: (..., m, n).
        h: (..., m).
        lower: (..., n).
        upper: (..., n).
    """

    A: Tensor | None = None
    b: Tensor | None = None
    G: Tensor | None = None
    h: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None


def checked_size(name: str, value: Any) -> int:
    """Return a number of coordinates."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}, expected a positive integer: the number of coordinates")
    return value


def event_of(name: str, value: Any, axes: int) -> Shape:
    """Return the last axes of what the caller gave."""
    shape = tuple(torch.as_tensor(value).shape)
    if len(shape) < axes:
        wanted = ", ".join(["...", *("p", "n")[2 - axes :]])
        raise ValueError(f"`{name}` has shape {shape}, expected ({wanted})")
    return shape[len(shape) - axes :]


def _checked(name: str, value: Any, event: Shape) -> Value | None:
    """Check a number or a tensor whose items have shape ``event``."""
    if value is None or isinstance(value, (bool, int, float)):
        return value if value is None else float(value)
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` has dtype {tensor.dtype}, expected a floating-point dtype: call `.double()` on it")
    if tensor.dim() and tuple(tensor.shape[tensor.dim() - len(event) :]) != event:
        wanted = ", ".join(["...", *map(str, event)])
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, expected a float or a tensor ({wanted})")
    return tensor


class Set:
    """A polyhedron.

    Args:
        kind: its name.
        event_shape: shape of a point, (n,) or (k1, k2).
        values: what describes it: floats, tensors, None.
        events: shape of one item of each value; a number if it is not named here.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if a shape does not fit.
    """

    def __init__(
        self, kind: str, event_shape: Shape, values: Mapping[str, Any], events: Mapping[str, Shape] | None = None
    ) -> None:
        """Check and keep the description."""
        self.kind = kind
        self.event_shape = event_shape
        self._events: dict[str, Shape] = dict.fromkeys(values, ()) | dict(events or {})
        self._values = {name: _checked(name, value, self._events[name]) for name, value in values.items()}
        self._ready: dict[Any, Any] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that describe the set, by name."""
        return {name: value for name, value in self._values.items() if isinstance(value, Tensor)}

    def replace(self, tensors: Mapping[str, Tensor]) -> Set:
        """Return the same set with other tensors, of the same names and shapes."""
        new = copy.copy(self)
        new._values = {**self._values, **tensors}
        return new

    @property
    def batch_shape(self) -> torch.Size:
        """The batch axes of the tensors, broadcast."""
        front = (
            tensor.shape[: max(tensor.dim() - len(self._events[name]), 0)] for name, tensor in self.tensors.items()
        )
        return torch.broadcast_shapes(*front)

    def describe(self) -> str:
        """Say what describes the set; tensors by their shape."""
        parts = [f"shape={self.event_shape}"]
        for name, value in self._values.items():
            if value is not None:
                shown = f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else f"{value:g}"
                parts.append(f"{name}={shown}")
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was prepared; it is made again when needed."""
        return {**self.__dict__, "_ready": {}}

    def general(self) -> Rows:
        """Return the set as rows."""
        return Rows(**{name: self.tensor(name) for name in Rows._fields})

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Project v (..., *event_shape), float32 or float64; the weight has its dtype and device."""
        return project_rows(v, weight, asked, self.general(), self.event_shape)

    def tensor(self, name: str, like: Tensor | None = None) -> Tensor | None:
        """Return a value as a tensor that ends in its item's shape, in the dtype and on the device of ``like``.

        Without ``like`` a tensor stays as it is, and a number becomes float64 in main memory.
        """
        value = self._values.get(name)
        if value is None:
            return None
        event = self._events[name]
        if not isinstance(value, Tensor):
            dtype, device = (torch.float64, torch.device("cpu")) if like is None else (like.dtype, like.device)
            return self.kept((name, dtype, device), lambda: torch.full(event, value, dtype=dtype, device=device))
        if like is not None:
            value = value.to(dtype=like.dtype, device=like.device)
        return value.expand(event) if value.dim() < len(event) else value

    def given(self, name: str, like: Tensor | None = None) -> Tensor:
        """Return a value that is never None."""
        value = self.tensor(name, like)
        if value is None:
            raise ValueError(f"a {self.kind} needs `{name}`, got None")
        return value

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what is made of the description: made once if that is numbers alone, with every call otherwise."""
        return make() if self.tensors else self.kept(key, make)

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what is made of numbers alone, made once."""
        if torch.compiler.is_compiling():
            return make()
        found = self._ready.get(key)
        if found is None:
            if transforms_active():  # a tensor made inside a transform dies with it
                return make()
            with torch.inference_mode(False):  # a tensor made in inference mode can never take part in autograd
                found = self._ready[key] = make()
        return found


def project_rows(
    v: Tensor, weight: Tensor | None, asked: Asked, rows: Rows, event: Shape, rescue: bool = False
) -> Tensor:
    """Project on rows with the general solvers, in float64; with ``rescue``, on the closest set where it is empty."""
    n = math.prod(event)
    point, scale = (tensor.flatten(-2) if tensor is not None and len(event) == 2 else tensor for tensor in (v, weight))
    p, m = (0 if right is None else right.shape[-1] for right in (rows.b, rows.h))
    shapes = {
        "point": (n,),
        "weight": (n,),
        "A": (p, n),
        "b": (p,),
        "G": (m, n),
        "h": (m,),
        "lower": (n,),
        "upper": (n,),
    }
    own = {name: None if tensor is None else tensor.to(v.device) for name, tensor in rows._asdict().items()}
    constants = tuple(
        name for name, tensor in own.items() if tensor is not None and qp_program.constant(tensor, shapes[name])
    )
    everything = {"point": point, "weight": scale, **own}
    once = tuple(
        {"point": "q", "weight": "Q"}.get(name, name)
        for name, tensor in everything.items()
        if tensor is not None and tensor.dim() == len(shapes[name])
    )
    flat, batch = flatten(everything, shapes)
    point, scale, *data = (
        tensor if tensor is None or name in constants else tensor.to(torch.float64) for name, tensor in flat.items()
    )
    assert point is not None
    linear = -point if scale is None else -scale * point
    if linear.shape[0] != batch.numel():
        linear = linear.expand(batch.numel(), n)
    settings = qp_program.Settings(
        jacobian=asked.jacobian, strict=asked.strict, constants=constants, identity=True, once=once
    )
    program = qp_program.Data(scale, linear, *data)
    x = closest.solve(settings, program)[0][0] if rescue else qp_operators.solve(settings, program)[0]
    if scale is not None:  # a program may be convex although its Hessian is not positive
        nowhere = torch.zeros((), dtype=torch.bool, device=x.device)
        x = settle(x, point, ~(scale > 0.0).all(-1), nowhere, asked)
    return x.to(dtype=v.dtype).reshape(*batch, *event)


class General(Set):
    """Rows and bounds."""

    def __init__(self, A: Any, b: Any, G: Any, h: Any, lower: Any, upper: Any) -> None:
        """Find n and check the shapes."""
        given = {"A": A, "b": b, "G": G, "h": h, "lower": lower, "upper": upper}
        values = {
            name: sparse_qp.as_tensor(part) if sparse_qp.is_sparse(part) else part for name, part in given.items()
        }
        for one, left, other, right in (("A", A, "b", b), ("G", G, "h", h)):
            if (left is None) != (right is None):
                there, missing = (one, other) if right is None else (other, one)
                raise ValueError(f"`{there}` was given without `{missing}`: give both or neither")
        events: dict[str, Shape] = {}
        for one, other in (("A", "b"), ("G", "h")):
            if values[one] is not None:
                events[one] = event_of(one, values[one], 2)
                events[other] = events[one][:1]
        sizes = [events[name][1] for name in "AG" if name in events]
        for bound in (lower, upper):
            if bound is not None and torch.as_tensor(bound).dim():
                sizes.append(torch.as_tensor(bound).shape[-1])
        if not sizes:
            raise ValueError("nothing tells the number of coordinates: give `A`, `G`, or a bound of shape (n,)")
        event = (sizes[0],)
        rest = {name: (0, *event)[: 2 if name in "AG" else 1] for name in "AbGh" if name not in events}
        super().__init__("polyhedron", event, values, events | rest | {"lower": event, "upper": event})
        for name in "AG":
            if name in events and events[name][1:] != event:
                raise ValueError(f"`{name}` has {events[name][1]} columns, expected {event[0]} as in the other data")

    @property
    def sparse(self) -> bool:
        """Whether rows are given by their nonzeros."""
        return any(sparse_qp.is_sparse(self._values[name]) for name in "AG")

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Use the general solvers, or those for sparse rows."""
        if not self.sparse:
            return super().project(v, weight, asked)
        point = v.to(torch.float64)
        ones = torch.ones(self.event_shape, dtype=torch.float64, device=v.device)
        scale = ones if weight is None else weight.to(torch.float64)
        given = {"Q": None, "q": -scale * point, **self.general()._asdict()}
        found = solve_sparse(given, 1e-9, asked.jacobian, "raise" if asked.strict else "nan", diagonal=scale)
        x = found.primal
        if weight is not None:
            nowhere = torch.zeros((), dtype=torch.bool, device=x.device)
            x = settle(x, point, ~(scale > 0.0).all(-1), nowhere, asked)
        return x.to(v.dtype)


class Box(Set):
    """Bounds."""

    def __init__(self, lower: Any, upper: Any, n: int | None) -> None:
        """Find n."""
        for bound in (lower, upper):
            if n is None and bound is not None and torch.as_tensor(bound).dim():
                n = torch.as_tensor(bound).shape[-1]
        if n is None:
            raise ValueError("nothing tells the number of coordinates: give `n`, or a bound of shape (n,)")
        event = (checked_size("n", n),)
        super().__init__("box", event, {"lower": lower, "upper": upper}, {"lower": event, "upper": event})

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Clip; the weight makes no difference. One kernel on a device: a budget without a row."""
        if on_device(v):
            budget = self.once("budget", lambda: Budget(self.kind, self.event_shape[0], _no_row | self._values))
            return budget.project(v, None, asked)
        return clip(v, self.tensor("lower", v), self.tensor("upper", v), asked)


#: The row of a budget that has bounds only.
_no_row = {"coefficients": None, "equals": None, "at_most": None, "at_least": None}


class LinfBall(Set):
    """A cube around the origin."""

    def __init__(self, n: int, radius: Any) -> None:
        """Keep the radius."""
        super().__init__("linf_ball", (checked_size("n", n),), {"radius": radius})

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Clip; the weight makes no difference. One kernel on a device: a budget without a row."""
        if on_device(v):
            return self.once("budget", self._budget).project(v, None, asked)
        radius = self.given("radius", v).unsqueeze(-1)
        return clip(v, -radius, radius, asked)

    def _budget(self) -> Budget:
        radius = self._values["radius"]
        assert radius is not None
        bounds: dict[str, Value] = {"lower": -radius, "upper": radius}
        if isinstance(radius, Tensor):
            whole = radius.unsqueeze(-1).expand(*radius.shape, *self.event_shape)
            bounds = {"lower": -whole, "upper": whole}
        return Budget(self.kind, self.event_shape[0], _no_row | bounds)

    def general(self) -> Rows:
        """Return the bounds."""
        radius = self.given("radius")
        bound = radius.unsqueeze(-1).expand(*radius.shape, *self.event_shape)
        return Rows(lower=-bound, upper=bound)


class OneRow(Set):
    """A half-space or a hyperplane."""

    def __init__(self, a: Any, b: Any, equation: bool) -> None:
        """Find n."""
        event = event_of("a", a, 1)
        super().__init__("hyperplane" if equation else "halfspace", event, {"a": a, "b": b}, {"a": event})
        self._equation = equation

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Step along the normal. One kernel on a device: a budget without bounds."""
        if on_device(v):
            side = "equals" if self._equation else "at_most"
            values = {"coefficients": self._values["a"], side: self._values["b"], "lower": None, "upper": None}
            return Budget(self.kind, self.event_shape[0], values).project(v, weight, asked)
        return step_to_row(v, self.given("a", v), self.given("b", v), weight, self._equation, asked)

    def general(self) -> Rows:
        """Return the row."""
        row, limit = self.given("a").unsqueeze(-2), self.given("b").unsqueeze(-1)
        return Rows(row, limit) if self._equation else Rows(None, None, row, limit)


class Affine(Set):
    """Equations."""

    def __init__(self, A: Any, b: Any) -> None:
        """Find the sizes."""
        p, n = event_of("A", A, 2)
        super().__init__("affine", (n,), {"A": A, "b": b}, {"A": (p, n), "b": (p,)})

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Use the pseudo-inverse where it can be kept, the general solvers otherwise."""
        normals, b = self.given("A"), self.given("b", v)
        if weight is not None or normals.requires_grad or normals.dim() > 2:
            return super().project(v, weight, asked)
        parts = (normals, *self._inverse(normals))
        if on_device(v) and not normals.is_cuda:  # copied once: every copy to a device is waited for
            parts = self._copies(parts, v)
        normals, pseudo, outside = (part.to(dtype=v.dtype, device=v.device) for part in parts)
        return step_to_affine(v, normals, b, pseudo, outside, asked)

    def _copies(self, parts: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, ...]:
        """Return copies in the dtype and on the device of v, kept as long as the inverse is."""
        copies = self._ready.get(("copies", v.dtype, v.device))
        if copies is None or copies[0] is not parts[1]:
            found = tuple(part.detach().to(dtype=v.dtype, device=v.device) for part in parts)
            copies = self._ready["copies", v.dtype, v.device] = (parts[1], found)
        return copies[1]

    def _inverse(self, normals: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :func:`pseudo_inverse` does, kept as long as the values are the same."""
        if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(normals) or dual_level_open():
            return pseudo_inverse(normals)
        kept = self._ready.get("inverse")
        if kept is None or kept[0].device != normals.device or not torch.equal(kept[0], normals):
            with torch.inference_mode(False), torch.no_grad():
                own = normals.detach().clone()
                kept = self._ready["inverse"] = (own, *pseudo_inverse(own))
        return kept[1], kept[2]


class Operands(NamedTuple):
    """What a family wants besides the point and the weight; batch axes in front."""

    coefficients: Tensor | None
    rhs: Tensor
    lower: Tensor | None
    upper: Tensor | None


class FamilySet(Set):
    """A set that one of the families of :mod:`hsbackend.families` projects on."""

    family: str

    def operands(self, like: Tensor) -> Operands:
        """Return what the family wants, in the dtype and on the device of ``like``."""
        raise NotImplementedError

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Flatten the batch axes and call the family."""
        shape = self.event_shape
        n = math.prod(shape)
        if weight is None and not self.tensors:
            coefficients, rhs, lower, upper = self.kept((v.dtype, v.device), lambda: _as_batch(self.operands(v)))
            point = v.reshape(v.shape[: v.dim() - len(shape)].numel(), n)
            found = operators.solve(self.family, point, None, coefficients, rhs, lower, upper, shape, *asked)
            return found[0].reshape(v.shape)
        point, scale = (
            tensor.flatten(-2) if tensor is not None and len(shape) == 2 else tensor for tensor in (v, weight)
        )
        operands = self.operands(v)
        tensors = {"point": point, "weight": scale, **operands._asdict()}
        flat, batch = flatten(tensors, dict.fromkeys(tensors, (n,)) | {"rhs": (operands.rhs.shape[-1],)})
        point, scale, coefficients, rhs, lower, upper = flat.values()
        assert point is not None
        assert rhs is not None
        if point.shape[0] != batch.numel():
            point = point.expand(batch.numel(), n)
        found = operators.solve(self.family, point, scale, coefficients, rhs, lower, upper, shape, *asked)
        return found[0].reshape(*batch, *shape)

    def _like(self) -> Tensor:
        """Return a tensor of the dtype and device of the description."""
        return next(iter(self.tensors.values()), torch.empty(0, dtype=torch.float64))


def _as_batch(operands: Operands) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.unsqueeze(0) for tensor in operands)


def _stack(values: Sequence[Value], like: Tensor) -> Tensor:
    """Stack numbers and (...,) tensors along a new last axis."""
    tensors = [
        value.to(dtype=like.dtype, device=like.device)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=like.dtype, device=like.device)
        for value in values
    ]
    return torch.stack(torch.broadcast_tensors(*tensors), dim=-1)


class Budget(FamilySet):
    """A box with one two-sided row."""

    family = "budget"

    def __init__(self, kind: str, n: int, values: Mapping[str, Any]) -> None:
        """Values are ``coefficients``, ``equals`` or ``at_most`` and ``at_least``, ``lower``, ``upper``."""
        event = (checked_size("n", n),)
        vectors = [name for name in values if name in ("coefficients", "lower", "upper")]
        super().__init__(kind, event, values, dict.fromkeys(vectors, event))

    def operands(self, like: Tensor) -> Operands:
        """The right-hand side is (low, high)."""
        equals = self._values.get("equals")
        low, high = (self._values.get("at_least"), self._values.get("at_most")) if equals is None else (equals, equals)
        rhs = _stack((-math.inf if low is None else low, math.inf if high is None else high), like)
        coefficients, lower, upper = (self.tensor(name, like) for name in ("coefficients", "lower", "upper"))
        return Operands(coefficients, rhs, lower, upper)

    def general(self) -> Rows:
        """Return one row, or one per side."""
        coefficients, rhs, lower, upper = self.operands(self._like())
        row = (rhs.new_ones(self.event_shape) if coefficients is None else coefficients).unsqueeze(-2)
        if self._values.get("equals") is not None:
            return Rows(row, rhs[..., :1], None, None, lower, upper)
        h = torch.stack([rhs[..., 1], -rhs[..., 0]], dim=-1)
        return Rows(None, None, torch.cat([row, -row], dim=-2), h, lower, upper)


class L1Ball(FamilySet):
    """A weighted l1 ball."""

    family = "l1"

    def __init__(self, n: int, weights: Any, radius: Any) -> None:
        """Keep weights and radius."""
        event = (checked_size("n", n),)
        kind = "l1_ball" if weights is None else "weighted_l1_ball"
        super().__init__(kind, event, {"weights": weights, "radius": radius}, {"weights": event})

    def operands(self, like: Tensor) -> Operands:
        """The right-hand side is the radius."""
        return Operands(self.tensor("weights", like), self.given("radius", like).unsqueeze(-1), None, None)

    def general(self) -> Rows:
        """Refuse."""
        n = self.event_shape[0]
        raise UnsupportedProblemError(f"an l1 ball in {n} coordinates has 2^{n} rows: project on the named set")


class Transport(FamilySet):
    """Matrices with given row and column sums."""

    family = "transport"

    def __init__(self, kind: str, shape: Shape, r: Any, c: Any) -> None:
        """Keep the sums."""
        super().__init__(kind, shape, {"r": r, "c": c}, {"r": shape[:1], "c": shape[1:]})

    def operands(self, like: Tensor) -> Operands:
        """The right-hand side is (r, c)."""
        return Operands(None, _join((self.given("r", like), self.given("c", like)), -1), None, None)

    def general(self) -> Rows:
        """Return both kinds of sums."""
        k1, k2 = self.event_shape
        rhs = self.operands(self._like()).rhs
        sums = torch.eye(k1).repeat_interleave(k2, dim=1), torch.eye(k2).repeat(1, k1)
        return Rows(torch.cat(sums).to(rhs), rhs, lower=rhs.new_zeros(k1 * k2))


class Monotone(FamilySet):
    """One chain."""

    family = "monotone"

    def __init__(self, n: int, increasing: bool, lower: Any, upper: Any) -> None:
        """Keep the bounds."""
        super().__init__("monotone", (checked_size("n", n),), {"lower": lower, "upper": upper})
        self._increasing = bool(increasing)

    def operands(self, like: Tensor) -> Operands:
        """The right-hand side is (low, high)."""
        lower, upper = self._values["lower"], self._values["upper"]
        sides = (-math.inf if lower is None else lower, math.inf if upper is None else upper)
        return Operands(None, _stack(sides, like), None, None)

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Turn a decreasing chain around."""
        if self._increasing:
            return super().project(v, weight, asked)
        return super().project(v.flip(-1), None if weight is None else weight.flip(-1), asked).flip(-1)

    def general(self) -> Rows:
        """Return the differences of neighbours, and bounds on every coordinate."""
        n = self.event_shape[0]
        rows = torch.eye(n, dtype=torch.float64)[:-1] - torch.eye(n, dtype=torch.float64)[1:]
        bounds: list[Tensor | None] = []
        for name in ("lower", "upper"):
            bound = self.tensor(name)
            bounds.append(None if bound is None else bound.unsqueeze(-1).expand(*bound.shape, n))
        return Rows(None, None, rows if self._increasing else -rows, rows.new_zeros(n - 1), *bounds)

    def describe(self) -> str:
        """Say the direction too."""
        return f"{super().describe()}, {'increasing' if self._increasing else 'decreasing'}"


class Order(Set):
    """A partial order; disjoint chains are found."""

    def __init__(self, n: int, edges: Iterable[tuple[int, int]]) -> None:
        """Look for chains."""
        super().__init__("order", (checked_size("n", n),), {})
        self._edges = tuple(sorted({(int(i), int(j)) for i, j in edges if i != j}))
        for edge in self._edges:
            if not all(0 <= index < n for index in edge):
                raise ValueError(f"edge {edge} has an index outside of 0, ..., {n - 1}")
        chains = find_chains(n, self._edges)
        self._groups: dict[int, list[int]] = {}
        self._found = None if chains is None else len(chains)
        for chain in chains or ():
            self._groups.setdefault(len(chain), []).extend(chain)
        places = [place for group in self._groups.values() for place in group]
        self._back = sorted(range(len(places)), key=places.__getitem__)
        self._sets = {length: Monotone(length, True, None, None) for length in self._groups}

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Project chains of equal length together."""
        if self._found is None:
            return super().project(v, weight, asked)
        parts: list[Tensor] = []
        for length, group in self._groups.items():
            point, scale = (
                None if tensor is None else tensor[..., group].unflatten(-1, (-1, length)) for tensor in (v, weight)
            )
            assert point is not None
            parts.append(self._sets[length].project(point, scale, asked).flatten(-2))
        return _all_or_nothing(torch.cat(parts, dim=-1)[..., self._back], v, asked)

    def general(self) -> Rows:
        """Return one row per edge."""
        return self.kept("rows", self._rows)

    def _rows(self) -> Rows:
        rows = torch.zeros(len(self._edges), self.event_shape[0], dtype=torch.float64)
        for row, (i, j) in enumerate(self._edges):
            rows[row, i], rows[row, j] = 1.0, -1.0
        return Rows(None, None, rows, rows.new_zeros(len(self._edges)))

    def describe(self) -> str:
        """Count the edges."""
        chains = "" if self._found is None else f" in {self._found} chains"
        return f"{super().describe()}, {len(self._edges)} edges{chains}"


def find_chains(n: int, edges: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...] | None:
    """Return the chains of a graph of disjoint paths, single nodes included; None for another graph."""
    after, before = dict(edges), {j: i for i, j in edges}
    if len(after) < len(edges) or len(before) < len(edges):
        return None
    chains: list[tuple[int, ...]] = []
    for start in range(n):
        if start not in before:
            chain = [start]
            while chain[-1] in after:
                chain.append(after[chain[-1]])
            chains.append(tuple(chain))
    return tuple(chains) if sum(map(len, chains)) == n else None  # what is left over is a cycle


class BoxAffine(Set):
    """Bounds and equations."""

    def __init__(self, lower: Any, upper: Any, A: Any, b: Any) -> None:
        """Find the sizes."""
        p, n = event_of("A", A, 2)
        events = {"A": (p, n), "b": (p,), "lower": (n,), "upper": (n,)}
        values = {"A": A, "b": b, "lower": lower, "upper": upper}
        super().__init__("box_intersect_affine", (n,), values, events)

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """One row is a budget."""
        normals, b = self.given("A"), self.given("b")
        if normals.shape[-2] != 1:
            return super().project(v, weight, asked)
        values = {"coefficients": normals[..., 0, :], "equals": b[..., 0]}
        bounds = {name: self._values[name] for name in ("lower", "upper")}
        return Budget("budget", self.event_shape[0], values | bounds).project(v, weight, asked)


class Product(Set):
    """Sets side by side."""

    def __init__(self, parts: Sequence[Set]) -> None:
        """Add the sizes."""
        if not parts:
            raise ValueError("a product needs at least one polyhedron")
        for part in parts:
            if len(part.event_shape) != 1:
                raise ValueError(f"a product takes sets of vectors, got a {part.kind} of shape {part.event_shape}")
        super().__init__("product", (sum(part.event_shape[0] for part in parts),), {})
        self._parts = tuple(parts)

    @property
    def _sizes(self) -> list[int]:
        return [part.event_shape[0] for part in self._parts]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the parts, ``part0_radius`` and so on."""
        return {
            f"part{index}_{name}": tensor
            for index, part in enumerate(self._parts)
            for name, tensor in part.tensors.items()
        }

    def replace(self, tensors: Mapping[str, Tensor]) -> Set:
        """Replace tensors of the parts."""
        parts: list[Set] = []
        for index, part in enumerate(self._parts):
            prefix = f"part{index}_"
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            parts.append(part.replace(own))
        return Product(parts)

    @property
    def batch_shape(self) -> torch.Size:
        """The batch axes of the parts, broadcast."""
        return torch.broadcast_shapes(*(part.batch_shape for part in self._parts))

    def project(self, v: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
        """Project on the parts; an item that one of them fails is NaN as a whole."""
        weights = [None] * len(self._parts) if weight is None else weight.split(self._sizes, dim=-1)
        pieces = zip(self._parts, v.split(self._sizes, dim=-1), weights, strict=True)
        return _all_or_nothing(_join([part.project(piece, own, asked) for part, piece, own in pieces], -1), v, asked)

    def general(self) -> Rows:
        """Put the rows of the parts side by side."""
        found: dict[str, list[Tensor]] = {name: [] for name in Rows._fields}
        begin = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            rows = part.general()
            for name, matrix, right, limit in (("A", rows.A, "b", rows.b), ("G", rows.G, "h", rows.h)):
                if matrix is not None and limit is not None:
                    after = self.event_shape[0] - begin - size
                    found[name].append(torch.nn.functional.pad(matrix, (begin, after)))
                    found[right].append(limit)
            for name, bound, none in (("lower", rows.lower, -math.inf), ("upper", rows.upper, math.inf)):
                found[name].append(torch.full((size,), none, dtype=torch.float64) if bound is None else bound)
            begin += size
        return Rows(**{name: _join(pieces, -2 if name in "AG" else -1) for name, pieces in found.items() if pieces})

    def describe(self) -> str:
        """Describe the parts."""
        return ", ".join([super().describe(), *(f"{part.kind}({part.describe()})" for part in self._parts)])


def _all_or_nothing(x: Tensor, v: Tensor, asked: Asked) -> Tensor:
    """Make an item that was projected in parts NaN as a whole if one of them failed."""
    if asked.strict and not (torch.compiler.is_compiling() or transforms_active()):
        return x  # it would have raised
    nowhere = torch.zeros((), dtype=torch.bool, device=x.device)
    return settle(x, v, x.isnan().any(-1), nowhere, asked._replace(strict=False))


def _join(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate after broadcasting the axes before ``dim``."""
    batch = torch.broadcast_shapes(*(piece.shape[: piece.dim() + dim] for piece in pieces))
    return torch.cat([piece.expand(*batch, *piece.shape[piece.dim() + dim :]) for piece in pieces], dim=dim)
