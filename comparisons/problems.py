"""The problems the contestants are compared on: one object each, made from a seed.

Every problem is a batch of quadratic programs in the form of the design document,

    minimise 1/2 x'Qx + q'x   subject to   A x = b,  G x <= h,  l <= x <= u,

told twice: as an ordinary cvxpy model (what users write) and as the matrices above, differentiable in the same
parameters (what matrix-based peers and the reference need). `tests/comparisons/test_problems.py` checks that the two
agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from hsbackend.comparisons.named_sets import Birkhoff, BoxWithRows, Budget, L1Ball, Monotone, NamedSet, Simplex

_DTYPE = torch.float64


@dataclass(frozen=True)
class Model:
    """A cvxpy problem with its parameters and variables, in the order a layer takes them."""

    problem: cp.Problem
    parameters: list[cp.Parameter]
    variables: list[cp.Variable]


@dataclass(frozen=True)
class QPData:
    """The matrices of a batch of QPs; every tensor has the batch B as its first axis, a part that is absent is None.

    `Q` (B, n, n), `q` (B, n), `A` (B, p, n), `b` (B, p), `G` (B, m, n), `h` (B, m), `lower` (B, n), `upper` (B, n).
    """

    Q: Tensor
    q: Tensor
    A: Tensor | None = None
    b: Tensor | None = None
    G: Tensor | None = None
    h: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None


@dataclass(frozen=True)
class ParameterValue:
    """The value of one parameter: (B, *shape) when `batched`, (*shape) when one value is shared by the batch."""

    name: str
    value: Tensor
    batched: bool = True
    requires_grad: bool = True


@dataclass(frozen=True)
class BenchmarkProblem:
    """A batch of parametrised QPs.

    Attributes:
        name: short name, used on the command line and in the tables.
        description: what it is, sizes included.
        batch: B, number of items.
        parameters: values in the order of the cvxpy parameters.
        build: `build(bound_scale)` makes a fresh cvxpy model; bounds are spelled `x >= 0` when `bound_scale` is 1 and
            `bound_scale * x >= 0` otherwise, the same set in words that stock cvxpylayers + MOREAU does not drop.
        qp_data: the same problem as matrices, differentiable in the parameter tensors.
        cotangent: (B, n), fixed random dL/dx; x flattened row by row.
        has_bounds: whether `bound_scale` makes a difference.
        named_set: the set that the only parameter is projected on, where it has a name; None otherwise.
    """

    name: str
    description: str
    batch: int
    parameters: tuple[ParameterValue, ...]
    build: Callable[[float], Model]
    qp_data: Callable[..., QPData]
    cotangent: Tensor
    has_bounds: bool
    named_set: NamedSet | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        """Return fresh leaf tensors of the parameter values, `requires_grad` set where a gradient is wanted."""
        return tuple(p.value.clone().requires_grad_(p.requires_grad) for p in self.parameters)

    def differentiated(self) -> tuple[int, ...]:
        """Return the positions of the parameters whose gradient is wanted."""
        return tuple(i for i, p in enumerate(self.parameters) if p.requires_grad)

    def to(self, device: torch.device) -> BenchmarkProblem:
        """Return the same problem with its tensors on `device`."""
        parameters = tuple(replace(p, value=p.value.to(device)) for p in self.parameters)
        return replace(self, parameters=parameters, cotangent=self.cotangent.to(device))

    def head(self, items: int) -> BenchmarkProblem:
        """Return the problem of the first items alone.

        Raises:
            ValueError: a parameter is shared by the batch, so that its gradient is a sum over all items.
        """
        shared = [p.name for p in self.parameters if not p.batched]
        if shared:
            raise ValueError(f"{self.name} shares {', '.join(shared)}: its items cannot be judged apart")
        parameters = tuple(replace(p, value=p.value[:items]) for p in self.parameters)
        return replace(self, batch=items, parameters=parameters, cotangent=self.cotangent[:items])


class _Draw:
    """Random float64 tensors and arrays from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=_DTYPE, generator=self._generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, dtype=_DTYPE, generator=self._generator)


def _scaled(variable: cp.Variable, bound_scale: float) -> cp.Expression:
    """Return the variable itself for scale 1, so that cvxpy sees a plain bound."""
    return variable if bound_scale == 1.0 else bound_scale * variable


def _repeat(constant: np.ndarray | Tensor, like: Tensor) -> Tensor:
    """Return a constant as a view with the batch of `like` in front, on the same device."""
    tensor = torch.as_tensor(constant, dtype=_DTYPE).to(like.device)
    return tensor.expand(like.shape[0], *tensor.shape)


def all_parameter_qp(n: int, m: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make min 1/2 ||R x||^2 + q'x s.t. G x <= h with R, q, G, h all batched parameters.

    R is a perturbed identity (condition number about 10). h = G x0 + slack with slack >= 0.02, so every item is
    feasible; about a third of the rows is active at the solution.
    """
    draw = _Draw(seed)
    root = torch.eye(n, dtype=_DTYPE) + 0.4 * draw.normal(batch, n, n) / n**0.5
    linear = draw.normal(batch, n)
    rows = draw.normal(batch, m, n) / n**0.5
    inside = 0.1 * draw.normal(batch, n)
    limit = torch.einsum("bmn,bn->bm", rows, inside) + 0.02 + 0.5 * draw.uniform(batch, m)

    def build(bound_scale: float) -> Model:
        x = cp.Variable(n)
        R, q = cp.Parameter((n, n)), cp.Parameter(n)
        G, h = cp.Parameter((m, n)), cp.Parameter(m)
        problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(R @ x) + q @ x), [G @ x <= h])
        return Model(problem, [R, q, G, h], [x])

    def qp_data(R: Tensor, q: Tensor, G: Tensor, h: Tensor) -> QPData:
        return QPData(Q=R.transpose(-1, -2) @ R, q=q, G=G, h=h)

    return BenchmarkProblem(
        name=f"qp-n{n}",
        description=f"QP, n={n}, {m} inequalities, B={batch}; R, q, G, h are parameters, one per item",
        batch=batch,
        parameters=(
            ParameterValue("R", root),
            ParameterValue("q", linear),
            ParameterValue("G", rows),
            ParameterValue("h", limit),
        ),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=False,
    )


def shared_polyhedron(n: int, n_ineq: int, n_eq: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make min ||x - point||^2 s.t. A x = b, G x <= h with constant A, G and batched point, b, h."""
    draw = _Draw(seed)
    A_rows = (draw.normal(n_eq, n) / n**0.5).numpy()
    G_rows = (draw.normal(n_ineq, n) / n**0.5).numpy()
    inside = draw.normal(batch, n)
    b_value = inside @ torch.from_numpy(A_rows).T
    h_value = inside @ torch.from_numpy(G_rows).T + 0.02 + 0.5 * draw.uniform(batch, n_ineq)

    def build(bound_scale: float) -> Model:
        x = cp.Variable(n)
        point, b, h = cp.Parameter(n), cp.Parameter(n_eq), cp.Parameter(n_ineq)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - point)), [A_rows @ x == b, G_rows @ x <= h])
        return Model(problem, [point, b, h], [x])

    def qp_data(point: Tensor, b: Tensor, h: Tensor) -> QPData:
        Q = _repeat(2.0 * np.eye(n), point)
        return QPData(Q=Q, q=-2.0 * point, A=_repeat(A_rows, point), b=b, G=_repeat(G_rows, point), h=h)

    return BenchmarkProblem(
        name=f"shared-n{n}",
        description=(
            f"projection, n={n}, {n_ineq} inequalities and {n_eq} equalities shared, B={batch}; "
            "point, b, h are parameters, one per item"
        ),
        batch=batch,
        parameters=(
            ParameterValue("point", inside + draw.normal(batch, n)),
            ParameterValue("b", b_value),
            ParameterValue("h", h_value),
        ),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=False,
    )


def sudoku_layer(side: int, n_eq: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make the OptNet Sudoku layer: min 0.05 ||x||^2 - puzzle'x s.t. A x = b, x >= 0 with learnable shared A and b.

    x holds side^2 cells times side digits. b = A x0 with x0 = 1/side, so the learnable rows are consistent. `puzzle`
    is the one-hot board with empty cells zero, plus small noise as an earlier layer would produce.
    """
    draw = _Draw(seed)
    n = side**3
    rows = draw.normal(n_eq, n) / n**0.5
    right_side = rows @ torch.full((n,), 1.0 / side, dtype=_DTYPE)
    digits = torch.nn.functional.one_hot((draw.uniform(batch, side**2) * side).long(), side).to(_DTYPE)
    given = (draw.uniform(batch, side**2, 1) < 0.5).to(_DTYPE)
    puzzle_value = (digits * given).reshape(batch, n) + 0.05 * draw.normal(batch, n)

    def build(bound_scale: float) -> Model:
        x = cp.Variable(n)
        puzzle, A, b = cp.Parameter(n), cp.Parameter((n_eq, n)), cp.Parameter(n_eq)
        objective = cp.Minimize(0.05 * cp.sum_squares(x) - puzzle @ x)
        return Model(cp.Problem(objective, [A @ x == b, _scaled(x, bound_scale) >= 0]), [puzzle, A, b], [x])

    def qp_data(puzzle: Tensor, A: Tensor, b: Tensor) -> QPData:
        return QPData(
            Q=_repeat(0.1 * np.eye(n), puzzle),
            q=-puzzle,
            A=A.expand(puzzle.shape[0], n_eq, n),
            b=b.expand(puzzle.shape[0], n_eq),
            lower=torch.zeros_like(puzzle),
        )

    return BenchmarkProblem(
        name=f"sudoku-{side}x{side}",
        description=f"{side}x{side} Sudoku layer, {n} variables >= 0, {n_eq} learnable shared equalities, B={batch}",
        batch=batch,
        parameters=(
            ParameterValue("puzzle", puzzle_value),
            ParameterValue("A", rows, batched=False),
            ParameterValue("b", right_side, batched=False),
        ),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=True,
    )


def portfolio_projection(n: int, sectors: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make min ||w - y||^2 s.t. sum(w) = 1, 0 <= w <= cap, sector sums <= sector cap, with batched y."""
    draw = _Draw(seed)
    cap = min(1.0, 5.0 / n)
    sector_cap = 1.5 / sectors
    membership = np.zeros((sectors, n))
    membership[np.arange(n) % sectors, np.arange(n)] = 1.0

    def build(bound_scale: float) -> Model:
        w, y = cp.Variable(n), cp.Parameter(n)
        bounded = _scaled(w, bound_scale)
        constraints = [cp.sum(w) == 1, bounded >= 0, bounded <= bound_scale * cap, membership @ w <= sector_cap]
        return Model(cp.Problem(cp.Minimize(cp.sum_squares(w - y)), constraints), [y], [w])

    def qp_data(y: Tensor) -> QPData:
        return QPData(
            Q=_repeat(2.0 * np.eye(n), y),
            q=-2.0 * y,
            A=_repeat(np.ones((1, n)), y),
            b=_repeat(np.ones(1), y),
            G=_repeat(membership, y),
            h=_repeat(np.full(sectors, sector_cap), y),
            lower=torch.zeros_like(y),
            upper=torch.full_like(y, cap),
        )

    return BenchmarkProblem(
        name=f"portfolio-n{n}",
        description=f"portfolio projection, n={n}, box, budget, {sectors} sector rows, B={batch}",
        batch=batch,
        parameters=(ParameterValue("y", (1.0 + 3.0 * draw.normal(batch, n)) / n),),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=True,
        named_set=BoxWithRows(
            A=np.ones((1, n)),
            b=np.ones(1),
            G=membership,
            h=np.full(sectors, sector_cap),
            lower=np.zeros(n),
            upper=np.full(n, cap),
        ),
    )


def simplex_projection(n: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make min ||x - y||^2 s.t. sum(x) = 1, x >= 0, with batched y."""
    draw = _Draw(seed)

    def build(bound_scale: float) -> Model:
        x, y = cp.Variable(n), cp.Parameter(n)
        constraints = [cp.sum(x) == 1, _scaled(x, bound_scale) >= 0]
        return Model(cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y], [x])

    def qp_data(y: Tensor) -> QPData:
        return QPData(
            Q=_repeat(2.0 * np.eye(n), y),
            q=-2.0 * y,
            A=_repeat(np.ones((1, n)), y),
            b=_repeat(np.ones(1), y),
            lower=torch.zeros_like(y),
        )

    return BenchmarkProblem(
        name=f"simplex-n{n}",
        description=f"projection on the simplex, n={n}, B={batch}",
        batch=batch,
        parameters=(ParameterValue("y", draw.normal(batch, n)),),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=True,
        named_set=Simplex(n, radius=1.0),
    )


def birkhoff_projection(side: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make min ||X - V||_F^2 s.t. X >= 0, X 1 = 1, X'1 = 1, with batched V (side, side)."""
    draw = _Draw(seed)
    n = side**2
    row_sums = np.kron(np.eye(side), np.ones((1, side)))
    column_sums = np.kron(np.ones((1, side)), np.eye(side))
    sums = np.vstack([row_sums, column_sums])

    def build(bound_scale: float) -> Model:
        X, V = cp.Variable((side, side)), cp.Parameter((side, side))
        constraints = [cp.sum(X, axis=1) == 1, cp.sum(X, axis=0) == 1, _scaled(X, bound_scale) >= 0]
        return Model(cp.Problem(cp.Minimize(cp.sum_squares(X - V)), constraints), [V], [X])

    def qp_data(V: Tensor) -> QPData:
        return QPData(
            Q=_repeat(2.0 * np.eye(n), V),
            q=-2.0 * V.reshape(-1, n),
            A=_repeat(sums, V),
            b=_repeat(np.ones(2 * side), V),
            lower=torch.zeros(V.shape[0], n, dtype=V.dtype, device=V.device),
        )

    return BenchmarkProblem(
        name=f"birkhoff-{side}x{side}",
        description=f"projection on {side}x{side} doubly stochastic matrices, B={batch}",
        batch=batch,
        parameters=(ParameterValue("V", draw.normal(batch, side, side)),),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=True,
        named_set=Birkhoff(side),
    )


def budget_projection(n: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make min ||x - y||^2 s.t. c'x = total, 0 <= x <= 1, with constant c in [0.5, 1.5] and batched y.

    The total is 0.3 sum(c): at every size about a quarter of the coordinates is free, the rest held at a bound.
    """
    draw = _Draw(seed)
    coefficients = (0.5 + draw.uniform(n)).numpy()
    total = float(0.3 * coefficients.sum())

    def build(bound_scale: float) -> Model:
        x, y = cp.Variable(n), cp.Parameter(n)
        bounded = _scaled(x, bound_scale)
        constraints = [coefficients @ x == total, bounded >= 0, bounded <= bound_scale]
        return Model(cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y], [x])

    def qp_data(y: Tensor) -> QPData:
        return QPData(
            Q=_repeat(2.0 * np.eye(n), y),
            q=-2.0 * y,
            A=_repeat(coefficients[None], y),
            b=_repeat(np.array([total]), y),
            lower=torch.zeros_like(y),
            upper=torch.ones_like(y),
        )

    return BenchmarkProblem(
        name=f"budget-n{n}",
        description=f"projection on box + weighted budget, n={n}, 0 <= x <= 1, c'x = total, B={batch}",
        batch=batch,
        parameters=(ParameterValue("y", draw.normal(batch, n)),),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=True,
        named_set=Budget(coefficients, total, lower=0.0, upper=1.0),
    )


def l1_ball_projection(n: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make min ||x - y||^2 s.t. sum(|x|) <= n / 10, with batched y; at every size about a quarter of x is not zero.

    The matrices use that x has the signs s of y: s'x <= radius and s_j x_j >= 0, the same solution and the same
    gradient. Only the reference and contestants that take matrices see this, and it spares the latter n variables.
    """
    draw = _Draw(seed)
    radius = 0.1 * n

    def build(bound_scale: float) -> Model:
        x, y = cp.Variable(n), cp.Parameter(n)
        return Model(cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm1(x) <= radius]), [y], [x])

    def qp_data(y: Tensor) -> QPData:
        signs = torch.where(y.detach() < 0, -1.0, 1.0).to(y.dtype)
        infinite = torch.full_like(signs, torch.inf)
        return QPData(
            Q=_repeat(2.0 * np.eye(n), y),
            q=-2.0 * y,
            G=signs[:, None, :],
            h=_repeat(np.array([radius]), y),
            lower=torch.where(signs > 0, 0.0, -infinite),
            upper=torch.where(signs < 0, 0.0, infinite),
        )

    return BenchmarkProblem(
        name=f"l1-n{n}",
        description=f"projection on the l1 ball, n={n}, radius {radius:g}, B={batch}; matrices know the orthant",
        batch=batch,
        parameters=(ParameterValue("y", draw.normal(batch, n)),),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=False,
        named_set=L1Ball(n, radius),
    )


def monotone_projection(n: int, batch: int, seed: int) -> BenchmarkProblem:
    """Make min ||x - y||^2 s.t. x_1 <= ... <= x_n, with batched y, noise of size 1 around a line from -2 to 2."""
    draw = _Draw(seed)
    trend = torch.linspace(-2.0, 2.0, n, dtype=_DTYPE)

    def build(bound_scale: float) -> Model:
        x, y = cp.Variable(n), cp.Parameter(n)
        return Model(cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.diff(x) >= 0]), [y], [x])

    def qp_data(y: Tensor) -> QPData:
        steps_down = -np.diff(np.eye(n), axis=0)
        return QPData(
            Q=_repeat(2.0 * np.eye(n), y), q=-2.0 * y, G=_repeat(steps_down, y), h=_repeat(np.zeros(n - 1), y)
        )

    return BenchmarkProblem(
        name=f"monotone-n{n}",
        description=f"projection on non-decreasing sequences (isotonic regression), n={n}, B={batch}",
        batch=batch,
        parameters=(ParameterValue("y", trend + draw.normal(batch, n)),),
        build=build,
        qp_data=qp_data,
        cotangent=draw.normal(batch, n),
        has_bounds=False,
        named_set=Monotone(n),
    )


Maker = Callable[[int], BenchmarkProblem]

# The suite `speed` is exactly the problems of the first speed target (issue 2) and two small classics.
_SPEED: dict[str, Maker] = {
    "qp-n100": lambda seed: all_parameter_qp(n=100, m=100, batch=128, seed=seed),
    "qp-n10": lambda seed: all_parameter_qp(n=10, m=10, batch=512, seed=seed),
    "shared-n200": lambda seed: shared_polyhedron(n=200, n_ineq=100, n_eq=20, batch=64, seed=seed),
    "sudoku-4x4": lambda seed: sudoku_layer(side=4, n_eq=40, batch=150, seed=seed),
    "portfolio-n100": lambda seed: portfolio_projection(n=100, sectors=10, batch=128, seed=seed),
    "simplex-n50": lambda seed: simplex_projection(n=50, batch=256, seed=seed),
    "birkhoff-4x4": lambda seed: birkhoff_projection(side=4, batch=1024, seed=seed),
}

# The suite `families` is the head-to-head table of the second speed target (issue 3), and two more families.
_FAMILIES: dict[str, Maker] = {
    "simplex-n50": _SPEED["simplex-n50"],
    "simplex-n1000": lambda seed: simplex_projection(n=1000, batch=64, seed=seed),
    "birkhoff-4x4": _SPEED["birkhoff-4x4"],
    "birkhoff-16x16": lambda seed: birkhoff_projection(side=16, batch=64, seed=seed),
    "birkhoff-32x32": lambda seed: birkhoff_projection(side=32, batch=16, seed=seed),
    "monotone-n100": lambda seed: monotone_projection(n=100, batch=128, seed=seed),
    "l1-n100": lambda seed: l1_ball_projection(n=100, batch=128, seed=seed),
    "budget-n100": lambda seed: budget_projection(n=100, batch=128, seed=seed),
    "portfolio-n100": _SPEED["portfolio-n100"],
}

_FULL: dict[str, Maker] = {**_SPEED, **_FAMILIES}

# The same families at sizes that a smoke test can afford, under the same names.
_QUICK: dict[str, Maker] = {
    "qp-n100": lambda seed: all_parameter_qp(n=8, m=6, batch=4, seed=seed),
    "qp-n10": lambda seed: all_parameter_qp(n=4, m=3, batch=6, seed=seed),
    "shared-n200": lambda seed: shared_polyhedron(n=12, n_ineq=6, n_eq=2, batch=4, seed=seed),
    "sudoku-4x4": lambda seed: sudoku_layer(side=2, n_eq=4, batch=5, seed=seed),
    "portfolio-n100": lambda seed: portfolio_projection(n=12, sectors=3, batch=4, seed=seed),
    "simplex-n50": lambda seed: simplex_projection(n=6, batch=4, seed=seed),
    "simplex-n1000": lambda seed: simplex_projection(n=12, batch=3, seed=seed),
    "birkhoff-4x4": lambda seed: birkhoff_projection(side=3, batch=4, seed=seed),
    # The shapes of the series against B: jax compiles for seconds, and then need not do it again.
    "birkhoff-16x16": lambda seed: birkhoff_projection(side=4, batch=4, seed=seed),
    "birkhoff-32x32": lambda seed: birkhoff_projection(side=4, batch=8, seed=seed),
    "monotone-n100": lambda seed: monotone_projection(n=8, batch=4, seed=seed),
    "l1-n100": lambda seed: l1_ball_projection(n=10, batch=4, seed=seed),
    "budget-n100": lambda seed: budget_projection(n=10, batch=4, seed=seed),
}

SUITES: dict[str, tuple[str, ...]] = {"speed": tuple(_SPEED), "families": tuple(_FAMILIES)}


def make_problem(name: str, *, quick: bool = False, seed: int = 0) -> BenchmarkProblem:
    """Make one problem by name.

    Args:
        name: a member of a suite.
        quick: the same family at a tiny size, keeping the name.
        seed: everything random about the problem follows from it.

    Raises:
        ValueError: the name is not known; the message lists those that are.
    """
    if name not in _FULL:
        raise ValueError(f"unknown problem {name!r}, expected one of: {', '.join(_FULL)}")
    problem = (_QUICK if quick else _FULL)[name](seed)
    return replace(problem, name=name)
