"""Every named polyhedron x dtype x batch shape x kind of point x property, from one table of each.

The sets are in ``named_polyhedra.ENTRIES``, with every row written out; points in ``KINDS``; properties are the
functions below. Values are judged by the KKT conditions and by laws of projections, derivatives by the dense formula
with a pseudo-inverse on the rows that are active at the solution. Combinations that do not exist are left out by
:func:`absent`, which gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from hsbackend.polyhedron import project
from named_polyhedra import BY_NAME, ENTRIES, Entry, Params, Rows, active_rows, explicit, flatten, multipliers, on_face

# Forward mode makes torch import decompositions of its own, which still use what it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")

# ----------------------------------------------------------------------------------------------------------------------
# The tables
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of point: where the point and the set come from.

    Attributes:
        name: readable id.
        lattice: small integers, for ties.
        point_scale: factor of the point.
        set_scale: factor of the set.
        wanted: what must be true of (entry, params, v, x, weight), drawn again until it is.
    """

    name: str
    lattice: bool = False
    point_scale: float = 1.0
    set_scale: float = 1.0
    wanted: Callable[[Entry, Rows, np.ndarray, np.ndarray, np.ndarray | None], bool] = lambda *_: True


def _is_degenerate(entry: Entry, rows: Rows, v: np.ndarray, x: np.ndarray, weight: np.ndarray | None) -> bool:
    """Some active row has no multiplier, and holding it or not makes a difference."""
    return explicit(rows, v, x, weight, 1e-9).degenerate


def _is_dyadic_boundary(entry: Entry, rows: Rows, v: np.ndarray, x: np.ndarray, weight: np.ndarray | None) -> bool:
    """The projection is a multiple of 1/8 on the boundary, so that it lies in the set without any rounding."""
    point = torch.tensor(np.round(8.0 * x) / 8.0)
    gap = rows.d - (rows.N @ point.unsqueeze(-1)).squeeze(-1)
    equal, room = gap[: rows.equalities], gap[rows.equalities :]
    on = bool((room == 0.0).any()) or len(room) == 0
    return on and bool((equal == 0.0).all() and (room >= 0.0).all()) and np.abs(point.numpy() - x).max() < 1e-9


KINDS = (
    Kind("generic"),
    Kind("boundary", lattice=True, wanted=_is_dyadic_boundary),
    Kind("degenerate", lattice=True, wanted=_is_degenerate),
    Kind("huge", point_scale=1e9),
    Kind("tiny", point_scale=1e-9, set_scale=1e-9),
    Kind("masked"),
)
#: Batch axes of the point; whether parameters have them too; whether there is a weight.
BATCHES = {
    "single": ((), False, False),
    "batch": ((3,), True, True),
    "grid": ((2, 3), False, False),
    "none": ((0,), False, True),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def absent(entry: Entry, kind: Kind, batch: str) -> str:
    """Return why a combination does not exist, empty if it does."""
    if kind.name == "masked" and isinstance(entry.masked, str):
        return entry.masked
    if kind.name == "degenerate" and entry.smooth:
        return entry.smooth
    if batch == "none" and kind.name != "generic":
        return "an empty batch has no points of any kind"
    return ""


def cases(dtypes: Sequence[str] = tuple(DTYPES), batches: Sequence[str] = tuple(BATCHES)) -> list[object]:
    """Return what exists, with ids."""
    return [
        pytest.param(entry.name, kind.name, batch, DTYPES[dtype], id=f"{entry.name}-{kind.name}-{batch}-{dtype}")
        for entry in ENTRIES
        for kind in KINDS
        for batch in batches
        for dtype in dtypes
        if not absent(entry, kind, batch)
    ]


def derivative_cases(*batches: str) -> list[object]:
    """Return every batch shape in float64, and one of them in float32: flattening batch axes knows no dtype."""
    return cases(["float64"], batches) + cases(["float32"], ["batch"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from spreading 5 x 5 matrices over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_combinations_are_absent_for_a_reason() -> None:
    """Every entry has points that are not masked, and nothing is left out but what the rule names."""
    everything = len(ENTRIES) * len(KINDS) * len(BATCHES)
    reasons = [absent(entry, kind, batch) for entry in ENTRIES for kind in KINDS for batch in BATCHES]
    assert everything - len(cases(dtypes=["float64"])) == sum(map(bool, reasons))
    for entry in ENTRIES:
        assert not absent(entry, KINDS[0], "single")


# ----------------------------------------------------------------------------------------------------------------------
# Drawing points
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A set, points and perhaps a weight."""

    entry: Entry
    kind: Kind
    v: Tensor
    params: Params
    weight: Tensor | None

    @property
    def operands(self) -> list[Tensor]:
        """The tensors a derivative may be asked for: point, weight, parameters."""
        return [self.v, *([] if self.weight is None else [self.weight]), *self.params.values()]

    def rebuilt(self, operands: Sequence[Tensor]) -> Problem:
        """Return the problem with other operands."""
        weighted = self.weight is not None
        params = dict(zip(self.params, operands[1 + weighted :], strict=True))
        return replace(self, v=operands[0], weight=operands[1] if weighted else None, params=params)

    def project(self) -> Tensor:
        """Call the library."""
        return project(self.v, self.entry.make(self.params), weight=self.weight)

    def doubled(self) -> Problem:
        """Return the same data in float64, with finite points: far below the bound instead of -inf."""
        operands = [tensor.detach().double() for tensor in self.operands]
        operands[0] = torch.where(operands[0].isneginf(), -50.0, operands[0])
        return self.rebuilt(operands)

    def flat(self) -> tuple[Tensor, Tensor | None]:
        """Return point and weight (..., n)."""
        return flatten(self.entry, self.v), None if self.weight is None else flatten(self.entry, self.weight)

    def size(self) -> float:
        """Return the size of the set: its largest bound or right-hand side; a cone is as large as its points."""
        numbers = [value.detach() for name, value in self.params.items() if self.entry.degree[name] == 1]
        if not numbers:
            numbers = [torch.ones(1) if self.entry.name == "birkhoff" else self.v.detach()]
        return max(float(torch.where(value.isinf(), 0.0, value).abs().amax()) for value in numbers if value.numel())

    def face(self, x: Tensor) -> Tensor:
        """Return the mask of active rows at a solution."""
        rows, x = self.entry.rows(self.params), x.detach()
        if not x.numel():
            return active_rows(rows, flatten(self.entry, x.double()), 0.0)
        scale = self.size() + float(x.abs().max())
        # The general solvers promise a residual relative to all data, the point included.
        reach = float(self.v.abs().max()) if self.entry.general else 0.0
        tolerance = 64.0 * torch.finfo(x.dtype).eps * (scale + reach) + 1e-6 * scale
        return active_rows(rows, flatten(self.entry, x.double()), tolerance)

    def on_face(self, mask: Tensor) -> Tensor:
        """Project on the affine hull of a face, by the dense formula."""
        v, weight = self.flat()
        return on_face(self.entry.rows(self.params), mask, v, weight).reshape(self.v.shape)


def _point(entry: Entry, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    v = rng.integers(-2, 3, size=entry.event).astype(float) if kind.lattice else 1.5 * rng.normal(size=entry.event)
    v = v * kind.point_scale
    if kind.name == "masked":
        masked = [j for j in entry.masked if rng.random() < 0.5] or [entry.masked[0]]
        v.reshape(-1)[masked] = -np.inf
    return v


@cache
def _drawn(entry_name: str, kind_name: str, batch_name: str) -> Problem:
    """Draw a problem in float64."""
    entry = BY_NAME[entry_name]
    kind = next(kind for kind in KINDS if kind.name == kind_name)
    batch, own_params, weighted = BATCHES[batch_name]
    rng = np.random.default_rng([sum(map(ord, entry_name)), sum(map(ord, kind_name)), prod(batch)])
    points: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    items: list[Params] = []
    shared = entry.scaled(entry.params(rng, kind.lattice), kind.set_scale)
    tries = 0
    while len(points) < max(1, prod(batch)):
        tries += 1
        assert tries < 3000, f"no {kind_name} point found"
        if tries % 60 == 0 and not own_params and not points:  # this set may have none
            shared = entry.scaled(entry.params(rng, kind.lattice), kind.set_scale)
        params = entry.scaled(entry.params(rng, kind.lattice), kind.set_scale) if own_params else shared
        v = _point(entry, kind, rng)
        weight = rng.choice([0.5, 1.0, 2.0], size=entry.event) if kind.lattice else rng.uniform(0.4, 2.5, entry.event)
        given = torch.tensor(weight) if weighted else None
        if kind.wanted is not KINDS[0].wanted:
            x = project(torch.tensor(v), entry.make(params), weight=given)
            flat = [flatten(entry, torch.as_tensor(value)).numpy() for value in (v, x, weight)]
            if not kind.wanted(entry, entry.rows(params), flat[0], flat[1], flat[2] if weighted else None):
                continue
            if kind.name == "boundary":
                v = np.round(8.0 * x.numpy()) / 8.0
        points.append(v)
        weights.append(weight)
        items.append(params)
    shape = (*batch, *entry.event)

    def stacked(values: Sequence[np.ndarray]) -> Tensor:
        return torch.tensor(np.stack(values)[: prod(batch)]).reshape(shape)

    if own_params:
        shared = {name: torch.stack([item[name] for item in items]) for name in shared}
    return Problem(entry, kind, stacked(points), shared, stacked(weights) if weighted else None)


def draw(entry: str, kind: str, batch: str, dtype: torch.dtype) -> Problem:
    """Return a problem in a dtype, in tensors of its own."""
    drawn = _drawn(entry, kind, batch)
    return drawn.rebuilt([tensor.to(dtype).clone() for tensor in drawn.operands])


def tangents(problem: Problem, mask: Tensor, seed: int) -> list[Tensor]:
    """Return a random direction of every operand along which the active rows can all stay active.

    Where they are dependent most directions of the parameters are not such: the parameters stay where they are then.
    """
    generator = torch.Generator().manual_seed(seed)
    double = problem.doubled()
    found = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in double.operands]
    moved = double.entry.tangent(double.params, generator)
    if moved:
        names = list(double.params)

        def rows_of(*values: Tensor) -> tuple[Tensor, Tensor]:
            rows = double.entry.rows(dict(zip(names, values, strict=True)))
            return rows.N, rows.d

        (N, _), (d_N, d_d) = torch.func.jvp(rows_of, tuple(double.params.values()), tuple(moved.values()))
        keep = mask.to(N.dtype)
        x = flatten(double.entry, double.on_face(mask)).unsqueeze(-1)
        change = keep * (torch.where(mask, d_d, 0.0) - (d_N @ x).squeeze(-1))
        N = N * keep.unsqueeze(-1)
        reached = (N @ torch.linalg.pinv(N, rtol=1e-9) @ change.unsqueeze(-1)).squeeze(-1)
        if (reached - change).abs().max() > 1e-7 * (1.0 + change.abs().max()):
            moved = {name: torch.zeros_like(value) for name, value in moved.items()}
        found[len(found) - len(moved) :] = list(moved.values())
    return found


def seed_of(*parts: object) -> int:
    """Return a seed that does not change between runs."""
    return sum(ord(letter) * (place + 1) for place, letter in enumerate("-".join(map(str, parts))))


def normal(like: Tensor, seed: int) -> Tensor:
    """Return random numbers of a tensor's shape and dtype."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(like.dtype)


def accuracy(problem: Problem, dtype: torch.dtype) -> float:
    """Return the accuracy of derivatives relative to their size, honest for the solver: dozens of roundings."""
    if dtype == torch.float32:
        return 5e-5
    return 1e-8 if problem.entry.general else 1e-9


def gradients_of(output: Tensor, leaves: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Return the gradients, zero where nothing depends on a leaf (the weight of a box)."""
    found = torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(leaf) if value is None else value for leaf, value in zip(leaves, found, strict=True)]


def assert_near(found: Tensor, wanted: Tensor, relative: float, scale: float, what: str) -> None:
    """Compare shapes, then values, relative to a scale and to the largest wanted number."""
    assert found.shape == wanted.shape, what
    if found.numel():
        error = float((found.double() - wanted.double()).abs().max())
        bound = relative * (scale + float(wanted.abs().max()))
        assert error <= bound, f"{what}: error {error:.1e} exceeds {bound:.1e}"


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "kind", "batch", "dtype"), cases())
def test_value(entry: str, kind: str, batch: str, dtype: torch.dtype) -> None:
    """Feasible, and ``h (v - x)`` in the cone of the active rows."""
    problem = draw(entry, kind, batch, dtype)
    x = problem.project()
    assert x.shape == problem.v.shape
    assert x.dtype == dtype
    double = problem.doubled()
    rows = double.entry.rows(double.params)
    flat = flatten(double.entry, x.double())
    eps = torch.finfo(dtype).eps
    reach = double.v.abs().amax() if double.entry.general and x.numel() else torch.zeros(())
    room = (rows.d - (rows.N @ flat.unsqueeze(-1)).squeeze(-1)).clone()
    room[..., : rows.equalities] = -room[..., : rows.equalities].abs()
    size = (rows.N.abs() @ flat.abs().unsqueeze(-1)).squeeze(-1) + rows.d.abs() + reach
    assert (room >= -16.0 * eps * size).all(), f"infeasible by {float((-room / size).max() / eps):.0f} eps"

    v, weight = double.flat()
    force = (v - flat) * (1.0 if weight is None else weight)
    reach = (flat.abs() + v.abs()) * (1.0 if weight is None else weight)
    mask = double.face(x)
    normals = rows.N.expand(*mask.shape, flat.shape[-1])
    for item in np.ndindex(*flat.shape[:-1]):
        _, left = multipliers(normals[item][mask[item]].numpy(), rows.equalities, force[item].numpy())
        bound = 64.0 * eps * float(reach[item].max())
        assert left <= bound, f"item {item}: {left:.1e} is left of the force, expected at most {bound:.1e}"


@pytest.mark.parametrize(("entry", "kind", "batch", "dtype"), cases(batches=["batch", "grid"]))
def test_laws_of_a_projection(entry: str, kind: str, batch: str, dtype: torch.dtype) -> None:
    """Idempotent, nonexpansive, variational inequality, homogeneous; items do not depend on their neighbours."""
    problem = draw(entry, kind, batch, dtype)
    x = problem.project()
    eps = torch.finfo(dtype).eps
    axes = tuple(range(-len(problem.entry.event), 0))
    h = torch.ones_like(x).double() if problem.weight is None else problem.weight.double()
    size = problem.size() + float(x.abs().max())
    finite = problem.doubled().v

    again = problem.rebuilt([x, *problem.operands[1:]]).project()
    exact = max(64.0 * eps, 1e-11) if problem.entry.general else 64.0 * eps
    assert_near(again, x, exact, size, "the projection of a projection")

    moved = problem.v + normal(problem.v, 1) * float(finite.abs().max())
    other = problem.rebuilt([moved, *problem.operands[1:]]).project().double()
    step = torch.where(problem.v.isinf(), 0.0, moved - problem.v).double()
    before = (h * step.square()).sum(axes).sqrt()
    after = (h * (other - x.double()).square()).sum(axes).sqrt()
    reach = float(finite.abs().max())
    assert (after <= before + 64.0 * eps * (size + reach)).all(), "projections came apart"

    force = h * (finite - x.double())
    work = (force * (other - x.double())).sum(axes)
    rounding = 64.0 * eps * float((h * (finite.abs() + size)).max()) * (size + float(other.abs().max()))
    assert (work <= rounding).all(), "another point is nearer"

    for factor in () if problem.entry.name == "birkhoff" else (2.0**30, 2.0**-30):
        params = problem.entry.scaled(problem.params, factor)
        scaled = replace(problem, v=problem.v * factor, params=params).project()
        assert_near(scaled / factor, x, exact, size, f"{factor:g} times the problem")

    if batch == "batch":
        for b in range(3):
            alone = problem.rebuilt([tensor[b] for tensor in problem.operands]).project()
            slack = max(64.0 * eps, 1e-11) if problem.entry.general else 0.0
            assert_near(alone, x[b], slack, size, f"item {b} alone")


_ORDERED = "the coordinates of an order are not exchangeable"
#: Sets whose coordinates may be exchanged together with those of their parameters, or why not.
PERMUTABLE = {
    **dict.fromkeys((entry.name for entry in ENTRIES), ""),
    **dict.fromkeys(("monotone", "monotone_bounded", "order_chains", "order_tree", "product"), _ORDERED),
    **dict.fromkeys(("affine_fixed", "polyhedron_fixed"), "the rows are fixed"),
    **dict.fromkeys(("transport", "birkhoff"), "rows and columns are permuted, in the next test"),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("entry", [name for name, reason in PERMUTABLE.items() if not reason])
def test_permutation(entry: str, dtype: torch.dtype) -> None:
    """Exchanging coordinates of the point and of the set exchanges those of the projection."""
    problem = draw(entry, "generic", "batch", dtype)
    order = torch.randperm(problem.entry.n, generator=torch.Generator().manual_seed(2))
    n = problem.entry.n

    def exchanged(name: str, value: Tensor) -> Tensor:
        vector = name in "AG" or value.dim() == 2
        return value[..., order] if vector and value.shape[-1] == n and name not in ("b", "h") else value

    params = {name: exchanged(name, value) for name, value in problem.params.items()}
    assert problem.weight is not None
    other = replace(problem, v=problem.v[..., order], weight=problem.weight[..., order], params=params).project()
    wanted = problem.project()[..., order]
    assert_near(other, wanted, 64.0 * torch.finfo(dtype).eps, problem.size(), "exchanged")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("entry", ["transport", "birkhoff"])
def test_permutation_of_rows_and_columns(entry: str, dtype: torch.dtype) -> None:
    """Exchanging rows or columns, and transposing, commute with the projection."""
    problem = draw(entry, "generic", "batch", dtype)
    rows, columns = (torch.randperm(k, generator=torch.Generator().manual_seed(3)) for k in problem.entry.event)
    assert problem.weight is not None

    def exchanged(value: Tensor) -> Tensor:
        return value[..., rows, :][..., columns]

    params = {name: value[..., rows if name == "r" else columns] for name, value in problem.params.items()}
    wanted = problem.project()
    eps = torch.finfo(dtype).eps
    other = replace(problem, v=exchanged(problem.v), weight=exchanged(problem.weight), params=params)
    assert_near(other.project(), exchanged(wanted), 64.0 * eps, problem.size(), "exchanged")
    turned = {"r": problem.params["c"], "c": problem.params["r"]} if problem.params else {}
    other = replace(problem, v=problem.v.mT, weight=problem.weight.mT, params=turned)
    assert_near(other.project(), wanted.mT, 64.0 * eps, problem.size(), "transposed")


#: Directions in which a point may be moved with no effect on its projection: multiples of the normals of the equations.
NORMALS = {
    "simplex": lambda n: torch.ones(n),
    "capped_simplex": lambda n: torch.ones(n),
    "transport": lambda n: torch.arange(1.0, 4.0).unsqueeze(1) + torch.arange(4.0),
    "birkhoff": lambda n: torch.arange(1.0, 4.0).unsqueeze(1) - torch.arange(3.0),
}


@pytest.mark.parametrize("entry", NORMALS)
def test_a_shift_along_normals_costs_no_digits(entry: str) -> None:
    """Points with 20 binary digits behind the point stay exact when 2^29 is added, and so does the projection."""
    problem = draw(entry, "generic", "grid", torch.float64)
    v = torch.round(problem.v * 2.0**20) / 2.0**20
    shift = NORMALS[entry](problem.entry.n).double() * 2.0**29
    assert torch.equal((v + shift) - shift, v)
    near, far = (replace(problem, v=point).project() for point in (v, v + shift))
    assert_near(far, near, 8.0 * torch.finfo(torch.float64).eps, problem.size(), "shifted")


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives
# ----------------------------------------------------------------------------------------------------------------------


def scales(problem: Problem) -> list[float]:
    """Return how large the derivative for each operand may be: those for matrices and weights contain forces."""
    v = problem.doubled().v
    force = 1.0 + float(v.abs().max()) if v.numel() else 1.0
    found = [1.0]
    if problem.weight is not None:
        found.append(force)
    return [*found, *(1.0 if problem.entry.degree[name] else force for name in problem.params)]


def assert_same_gradients(
    problem: Problem, found: Sequence[Tensor], wanted: Sequence[Tensor], directions: Sequence[Tensor],
    relative: float, sizes: Sequence[float],
) -> None:  # fmt: skip
    """Compare gradients for the point and the weight by entries, those for parameters along one direction.

    Entries of the gradient for dependent parameters are not unique: they share it in one way or another.
    """
    own = len(problem.operands) - len(problem.params)
    total, total_wanted, total_size = 0.0, 0.0, 0.0
    for place, (one, two, direction, size) in enumerate(zip(found, wanted, directions, sizes, strict=True)):
        if place < own:
            assert_near(one, two, relative, size, ("point", "weight")[place])
        elif bool(direction.any()):
            total += float((one.double() * direction).sum())
            total_wanted += float((two.double() * direction).sum())
            total_size += float((two.double() * direction).abs().sum()) + size * float(direction.abs().sum())
    assert abs(total - total_wanted) <= relative * total_size, f"parameters: {total} instead of {total_wanted}"


@pytest.mark.parametrize(("entry", "kind", "batch", "dtype"), derivative_cases(*BATCHES))
def test_vjp(entry: str, kind: str, batch: str, dtype: torch.dtype) -> None:
    """Gradients of everything, shared parameters included, against the dense formula on the active face."""
    problem = draw(entry, kind, batch, dtype)
    leaves = [tensor.requires_grad_() for tensor in problem.operands]
    x = problem.project()
    g = normal(x, 5)
    found = gradients_of(x, leaves, g)
    for leaf, gradient in zip(leaves, found, strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == leaf.shape
        assert gradient.isfinite().all()
    if not x.numel():
        return
    double = problem.doubled()
    mask = double.face(x)
    directions = tangents(problem, mask, seed_of(entry, kind, batch))
    exact = [tensor.requires_grad_() for tensor in double.operands]
    wanted = gradients_of(double.on_face(mask), exact, g.double())
    assert_same_gradients(problem, found, wanted, directions, accuracy(problem, dtype), scales(problem))


@pytest.mark.parametrize(("entry", "kind", "batch", "dtype"), derivative_cases("single", "batch", "grid"))
def test_jvp(entry: str, kind: str, batch: str, dtype: torch.dtype) -> None:
    """Tangents along all operands at once, against the dense formula; and forward mode is the transpose of reverse."""
    problem = draw(entry, kind, batch, dtype)
    x = problem.project()
    double = problem.doubled()
    mask = double.face(x)
    directions = tangents(problem, mask, seed_of(entry, kind, batch))
    rounded = [direction.to(dtype) for direction in directions]

    def function(*operands: Tensor) -> Tensor:
        return problem.rebuilt(operands).project()

    primal, found = torch.func.jvp(function, tuple(problem.operands), tuple(rounded))
    assert_near(primal, x, 64.0 * torch.finfo(dtype).eps if problem.entry.general else 0.0, problem.size(), "primal")
    assert found.dtype == dtype
    _, wanted = torch.func.jvp(
        lambda *operands: double.rebuilt(operands).on_face(mask),
        tuple(double.operands),
        tuple(direction.double() for direction in rounded),
    )
    scale = max(scales(problem))
    assert_near(found, wanted, accuracy(problem, dtype), scale, "tangent")

    g = normal(x, 6)
    leaves = [tensor.clone().requires_grad_() for tensor in problem.operands]
    gradients = gradients_of(function(*leaves), leaves, g)
    pairs = [float((one.double() * two.double()).sum()) for one, two in zip(gradients, rounded, strict=True)]
    left = float((g.double() * found.double()).sum())
    bound = accuracy(problem, dtype) * (1.0 + abs(left) + sum(map(abs, pairs)) + scale)
    assert abs(left - sum(pairs)) <= bound * x.numel()


@pytest.mark.parametrize(("entry", "kind", "batch", "dtype"), derivative_cases("batch", "grid"))
def test_vmap(entry: str, kind: str, batch: str, dtype: torch.dtype) -> None:
    """Mapping over any batch axis, of the projection and of its gradient, is the batch."""
    problem = draw(entry, kind, batch, dtype)
    x = problem.project()
    g = normal(x, 7)
    eps = torch.finfo(dtype).eps
    slack = max(64.0 * eps, 1e-11) if problem.entry.general else 0.0
    leaves = [tensor.clone().requires_grad_() for tensor in problem.operands]
    wanted = torch.autograd.grad(problem.rebuilt(leaves).project(), leaves[0], g)[0]

    def function(*operands: Tensor) -> Tensor:
        return problem.rebuilt(operands).project()

    def pullback(cotangent: Tensor, *operands: Tensor) -> Tensor:
        return torch.func.vjp(function, *operands)[1](cotangent)[0]

    shared = [0 if batch == "batch" else None] * (len(problem.operands) - 1)
    for axis in range(len(BATCHES[batch][0])):
        dims = (axis, *shared)
        mapped = torch.func.vmap(function, in_dims=dims, out_dims=axis)(*problem.operands)
        assert_near(mapped, x, slack, problem.size(), f"mapped over axis {axis}")
        mapped = torch.func.vmap(pullback, in_dims=(axis, *dims), out_dims=axis)(g, *problem.operands)
        same = accuracy(problem, dtype) if problem.entry.general else 4.0 * eps
        assert_near(mapped, wanted, same, 1.0, f"gradient mapped over axis {axis}")


@pytest.mark.parametrize(("entry", "kind", "batch", "dtype"), derivative_cases("single", "batch", "grid"))
def test_double_backward(entry: str, kind: str, batch: str, dtype: torch.dtype) -> None:
    """Gradients of gradients, all operands at once, against the dense formula differentiated twice."""
    problem = draw(entry, kind, batch, dtype)
    with torch.no_grad():
        x = problem.project()
    double = problem.doubled()
    mask = double.face(x)
    seed = seed_of(entry, kind, batch)
    first, second = (tangents(problem, mask, seed + shift) for shift in (0, 1))
    g, curvature = normal(x, 8), normal(x, 9).abs()
    size = max(1.0, problem.size() + float(x.abs().max()))

    def second_order(leaves: list[Tensor], solve: Callable[[], Tensor]) -> list[Tensor]:
        """Return the gradient of <first, gradient of g'x + curvature'x^2/(2 size)>."""
        found = solve()
        like = found.dtype
        loss = (g.to(like) * found).sum() + 0.5 / size * (curvature.to(like) * found.square()).sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        inner = sum(
            (gradient * direction.to(like)).sum()
            for gradient, direction in zip(gradients, first, strict=True)
            if gradient is not None
        )
        if not inner.requires_grad:  # nothing depends on anything: every derivative is constant
            return [torch.zeros_like(leaf) for leaf in leaves]
        again = torch.autograd.grad(inner, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if value is None else value for leaf, value in zip(leaves, again, strict=True)]

    leaves = [tensor.requires_grad_() for tensor in problem.operands]
    found = second_order(leaves, problem.project)
    exact = [tensor.requires_grad_() for tensor in double.operands]
    wanted = second_order(exact, lambda: double.on_face(mask))
    relative = 10.0 * accuracy(problem, dtype)
    force = max(scales(problem)) ** 2
    assert_same_gradients(problem, found, wanted, second, relative, [force] * len(found))


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile
# ----------------------------------------------------------------------------------------------------------------------


def _compare_compiled(entry: str, backend: str, dtypes: Sequence[torch.dtype]) -> None:
    """Compile the projection with fullgraph=True once, and compare values and gradients at every kind of point."""
    shape = draw(entry, "generic", "batch", torch.float64)
    names = list(shape.params)

    def function(v: Tensor, weight: Tensor, *params: Tensor) -> Tensor:
        return project(v, shape.entry.make(dict(zip(names, params, strict=True))), weight=weight)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=False)
    for dtype in dtypes:
        for kind in KINDS:
            if absent(shape.entry, kind, "batch"):
                continue
            problem = draw(entry, kind.name, "batch", dtype)
            values: list[Tensor] = []
            gradients: list[list[Tensor]] = []
            for call in (function, compiled):
                leaves = [tensor.clone().requires_grad_() for tensor in problem.operands]
                x = call(*leaves)
                values.append(x.detach())
                gradients.append(gradients_of(x, leaves, normal(x, 10)))
            eps = torch.finfo(dtype).eps
            assert_near(values[1], values[0], 64.0 * eps, problem.size(), f"{kind.name} {dtype}")
            double = problem.doubled()
            directions = tangents(problem, double.face(values[0]), seed_of(entry, kind.name))
            relative = accuracy(problem, dtype)
            assert_same_gradients(problem, gradients[1], gradients[0], directions, relative, scales(problem))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what was compiled before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("entry", [entry.name for entry in ENTRIES])
def test_compile(entry: str) -> None:
    """One graph without breaks, at every kind of point."""
    _compare_compiled(entry, "aot_eager", [torch.float64])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("entry", ["simplex", "box"])
def test_compile_with_inductor(entry: str) -> None:
    """The default compiler: one set with an algorithm of its own, one in torch operations."""
    _compare_compiled(entry, "inductor", [torch.float64])
