"""Train through degenerate points: two toys whose optimum is known and lies at one.

Both learn a batch of vectors v by gradient descent on 1/2 |x(v) - target|^2, averaged over the batch, where x(v) solves
a quadratic program whose constraints are all written twice. The target is x(v*) for a v* at which constraints are
active without a multiplier, so the least loss is zero and every path to it ends at a degenerate point.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsbackend.comparisons.contestants import Contestant
from hsbackend.comparisons.problems import BenchmarkProblem, Model, ParameterValue, QPData
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.speed import describe_error

Array = NDArray[np.float64]
# The loss at which the optimum counts as reached, relative to the loss at the start: three digits of x.
REACHED = 1e-6


@dataclass(frozen=True)
class Task:
    """What is trained: the layer, the start, the target; `shared` says that one vector v serves the whole batch."""

    problem: BenchmarkProblem
    start: Tensor
    target: Tensor
    optimum: Tensor
    rate: float
    shared: bool


@dataclass(frozen=True)
class Toy:
    """A training problem; `make(seed, quick)` draws it."""

    name: str
    description: str
    make: Callable[[int, bool], Task]
    steps: int
    quick_steps: int


@dataclass(frozen=True)
class TrainingRow:
    """One contestant's training.

    Attributes:
        toy: its name.
        contestant: its name.
        losses: (steps + 1,) loss before each step and after the last; up to the first NaN.
        first_nan: the step at which x, the loss or the gradient was first not finite; None if never.
        seconds: the whole training without set-up.
        error: why it ended early.
    """

    toy: str
    contestant: str
    losses: Array
    first_nan: int | None = None
    seconds: float = float("nan")
    error: str | None = None

    @property
    def steps(self) -> int:
        return max(self.losses.size - 1, 0)

    @property
    def first_loss(self) -> float:
        return float(self.losses[0]) if self.losses.size else float("nan")

    @property
    def final_loss(self) -> float:
        return float(self.losses[-1]) if self.losses.size else float("nan")

    @property
    def reached(self) -> bool:
        """Whether the optimum was reached."""
        finite = self.error is None and self.first_nan is None
        return finite and self.final_loss <= REACHED * self.first_loss


def _twice(array: Array) -> Array:
    return np.concatenate([array, array])


def make_problem(
    name: str, Q: Array, A: Array, b: Array, G: Array, h: Tensor, v: Tensor, *, h_is_parameter: bool
) -> BenchmarkProblem:
    """Make min 1/2 x'Qx - v'x s.t. A x = b, G x <= h for a batch of v (B, n) and of h (B, m)."""
    batch, n = v.shape
    root = np.linalg.cholesky(Q).T
    no_equations = len(b) == 0

    def build(bound_scale: float) -> Model:
        x, point, limit = cp.Variable(n), cp.Parameter(n), cp.Parameter(len(G))
        right = limit if h_is_parameter else h[0].numpy()
        constraints = [G @ x <= right]
        if not no_equations:
            constraints.append(A @ x == b)
        objective = 0.5 * cp.sum_squares(root @ x) - point @ x
        return Model(cp.Problem(cp.Minimize(objective), constraints), [point, limit][: 1 + h_is_parameter], [x])

    def qp_data(point: Tensor, limit: Tensor | None = None) -> QPData:
        def repeated(array: Array) -> Tensor:
            return torch.from_numpy(array).expand(batch, *array.shape)

        return QPData(
            Q=repeated(Q),
            q=-point,
            A=None if no_equations else repeated(A),
            b=None if no_equations else repeated(b),
            G=repeated(G),
            h=h if limit is None else limit,
        )

    parameters = [ParameterValue("v", v)]
    if h_is_parameter:
        parameters.append(ParameterValue("h", h, requires_grad=False))
    return BenchmarkProblem(
        name=name,
        description=name,
        batch=batch,
        parameters=tuple(parameters),
        build=build,
        qp_data=qp_data,
        cotangent=torch.ones(batch, n, dtype=torch.float64),
        has_bounds=False,
    )


def sparse_simplex(seed: int, quick: bool) -> Task:
    """Learn v so that the projection on the simplex is a sparse target; sum and signs are written twice.

    Targets have two to four entries that are not zero. The start is positive where the target is, and there some other
    entries are zero already: exactly on their bound, without a multiplier.
    """
    n, batch = (5, 4) if quick else (8, 16)
    generator = np.random.default_rng(seed)
    target, start = np.zeros((batch, n)), np.zeros((batch, n))
    for item in range(batch):
        order = generator.permutation(n)
        support = int(generator.integers(2, 5))
        target[item, order[:support]] = generator.integers(1, 8, size=support)
        start[item, order[:-1]] = generator.integers(1, 8, size=n - 1)
    target /= target.sum(axis=1, keepdims=True)
    start /= start.sum(axis=1, keepdims=True)
    problem = make_problem(
        "sparse-simplex",
        np.eye(n),
        _twice(np.ones((1, n))),
        np.ones(2),
        _twice(-np.eye(n)),
        torch.zeros(batch, 2 * n, dtype=torch.float64),
        torch.from_numpy(start),
        h_is_parameter=False,
    )
    points = torch.from_numpy(target)
    return Task(problem, torch.from_numpy(start), points, optimum=points, rate=0.5, shared=False)


def optnet(seed: int, quick: bool) -> Task:
    """Learn one v for a batch of limits h, as in OptNet; every row comes twice.

    With x* = Q^-1 v* the unconstrained optimum, about a third of the rows of an item passes exactly through x*: active
    without a multiplier. Half of the items have, besides, a row that cuts x* off. The loss is not convex; rows are
    turned so that the start is on the feasible side of those through x*, from where there is a way to the optimum.
    """
    n, m, batch = (3, 3, 4) if quick else (5, 6, 12)
    generator = np.random.default_rng(seed)
    root = np.eye(n) + 0.3 * generator.normal(size=(n, n)) / n**0.5
    Q = root.T @ root
    optimum = generator.normal(size=n)
    step = generator.normal(size=n)
    G = generator.normal(size=(m, n))
    G *= -np.sign(G @ np.linalg.solve(Q, step))[:, None]
    slack = np.where(generator.uniform(size=(batch, m)) < 1 / 3, 0.0, generator.uniform(0.5, 1.5, size=(batch, m)))
    slack[: batch // 2, 0] = -0.25
    h = G @ np.linalg.solve(Q, optimum) + slack
    start = optimum + step
    limits = torch.from_numpy(np.concatenate([h, h], axis=1))
    vectors = torch.from_numpy(np.tile(start, (batch, 1)))
    problem = make_problem("optnet", Q, np.zeros((0, n)), np.zeros(0), _twice(G), limits, vectors, h_is_parameter=True)
    target = torch.from_numpy(np.stack([_reference(Q, -optimum, G, row) for row in h]))
    return Task(problem, torch.from_numpy(start), target, torch.from_numpy(optimum), rate=0.25, shared=True)


def _reference(Q: Array, q: Array, G: Array, h: Array) -> Array:
    """Solve min 1/2 x'Qx + q'x s.t. G x <= h by trying active sets: exact, and independent of every contestant."""
    m = len(h)
    for chosen in range(2**m):
        rows = [i for i in range(m) if chosen >> i & 1]
        N = G[rows]
        system = np.block([[Q, N.T], [N, np.zeros((len(rows), len(rows)))]])
        found = np.linalg.lstsq(system, np.concatenate([-q, h[rows]]), rcond=1e-12)[0]
        x, z = found[: len(q)], found[len(q) :]
        held = np.allclose(N @ x, h[rows], rtol=0, atol=1e-10)
        if held and (G @ x <= h + 1e-10).all() and (z >= -1e-10).all():
            return x
    raise ValueError("the constraints have no solution")


TOYS: tuple[Toy, ...] = (
    Toy(
        "sparse-simplex",
        "learn v so that its projection on the simplex is a sparse target; all constraints are written twice",
        sparse_simplex,
        steps=100,
        quick_steps=30,
    ),
    Toy(
        "optnet",
        "learn the linear term of a QP that is shared by items with different limits; all rows are written twice, and "
        "at the optimum a third of them passes through the unconstrained solution",
        optnet,
        steps=150,
        quick_steps=80,
    ),
)


def train(contestant: Contestant, toy: Toy, task: Task, steps: int) -> TrainingRow:
    """Train one contestant; an error or a NaN ends it and is kept in the row."""
    losses: list[float] = []
    v = task.start.clone().requires_grad_()
    rest = task.problem.inputs()[1:]
    first_nan: int | None = None
    began = time.perf_counter()

    def row(error: str | None = None) -> TrainingRow:
        seconds = time.perf_counter() - began
        return TrainingRow(toy.name, contestant.name, np.array(losses), first_nan, seconds, error)

    try:
        solve = contestant.setup(task.problem)
        began = time.perf_counter()
        for step in range(steps + 1):
            x = solve(v.expand(task.target.shape) if task.shared else v, *rest)
            loss = 0.5 * (x - task.target).square().sum(dim=-1)
            # Items that have a vector of their own are trained side by side: their gradients do not share the mean.
            (gradient,) = torch.autograd.grad(loss.mean() if task.shared else loss.sum(), v)
            if not (torch.isfinite(loss).all() and torch.isfinite(gradient).all()):
                first_nan = step
                break
            losses.append(loss.mean().item())
            with torch.no_grad():
                v -= task.rate * gradient
    except Exception as error:
        return row(describe_error(error))
    return row()


def run_training(
    contestants: Sequence[Contestant], *, seed: int, quick: bool, progress: Progress | None = None
) -> list[TrainingRow]:
    """Train everybody on both toys; `progress` takes one step per toy and contestant."""
    rows: list[TrainingRow] = []
    default = torch.get_default_dtype()
    # QPLayer allocates gradients in torch's default dtype.
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            # Solvers warn about every inexact item; the losses say what came of it.
            warnings.simplefilter("ignore")
            for toy in TOYS:
                if progress is not None:
                    progress.stage(f"training {toy.name}")
                task = toy.make(seed, quick)
                for contestant in contestants:
                    rows.append(train(contestant, toy, task, toy.quick_steps if quick else toy.steps))
                    if progress is not None:
                        progress.advance(contestant.name)
    finally:
        torch.set_default_dtype(default)
    return rows
