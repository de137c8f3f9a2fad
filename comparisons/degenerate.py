"""Gradients at degenerate points: what every contestant returns there, judged against the whole Han-Sun set.

    minimise 1/2 x'Qx - v'x   subject to   A x = b,  G x <= h,  l <= x <= u

At a degenerate point dx/dv is not one matrix. The Han-Sun set holds one for every admissible set K of active rows,

    P_K = Z (Z'QZ)^+ Z',   columns of Z a basis of the null space of [A; rows of K],   supp(z) <= K <= I(x),

for some multiplier z (docs/theory.md). The points are so small that all K are enumerated. The solutions are known by
hand, the admissible K follow from non-negative least squares: nothing here comes from the code under test.
"""

from __future__ import annotations

import csv
import importlib.metadata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from pathlib import Path

import cvxpy as cp
import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from hsbackend.comparisons.contestants import Contestant, choose_contestants
from hsbackend.comparisons.environment import Environment, describe_environment
from hsbackend.comparisons.experiments.degenerate_contestants import degenerate_contestants
from hsbackend.comparisons.experiments.degenerate_training import REACHED, TOYS, Toy, TrainingRow, run_training
from hsbackend.comparisons.judge import GRADIENT_TOLERANCE, ROUGH_TOLERANCE
from hsbackend.comparisons.named_sets import NamedSet, Simplex
from hsbackend.comparisons.problems import BenchmarkProblem, Model, ParameterValue, QPData
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.speed import describe_error
from hsbackend.comparisons.tables import align, markdown_table

Array = NDArray[np.float64]
# What is left of the force v - Qx when K carries it, relative: rounding leaves 1e-16, a missing row 1e-1.
_CARRIED = 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# Points
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A QP at a degenerate point, with its solution known by hand.

    Attributes:
        name: short name.
        description: what is degenerate.
        v: (n,) minus the linear term; the point, for projections.
        primal: (n,) the solution; None where there are several, which are judged by constraints and objective.
        Q: (n, n), the identity for projections.
        A: (p, n).
        b: (p,).
        G: (m, n).
        h: (m,).
        lower: (n,), entries may be -inf.
        upper: (n,), entries may be inf.
        optimum: an optimal point where `primal` is None.
        named_set: the set by name, where it has one.
    """

    name: str
    description: str
    v: Array
    primal: Array | None
    Q: Array
    A: Array
    b: Array
    G: Array
    h: Array
    lower: Array
    upper: Array
    optimum: Array
    named_set: NamedSet | None = None

    @property
    def is_projection(self) -> bool:
        return bool(np.array_equal(self.Q, np.eye(self.v.size)))

    def inequalities(self) -> tuple[Array, Array]:
        """Return (C, d) of C x <= d: general rows, then finite bounds."""
        eye = np.eye(self.v.size)
        below, above = np.isfinite(self.lower), np.isfinite(self.upper)
        return (
            np.vstack([self.G, -eye[below], eye[above]]),
            np.concatenate([self.h, -self.lower[below], self.upper[above]]),
        )

    def problem(self) -> BenchmarkProblem:
        """Return n copies of the point, whose cotangents are the unit vectors: one backward pass is the Jacobian."""
        n = self.v.size
        below, above = np.isfinite(self.lower), np.isfinite(self.upper)

        def build(bound_scale: float) -> Model:
            x, v = cp.Variable(n), cp.Parameter(n)
            scaled = x if bound_scale == 1.0 else bound_scale * x
            constraints: list[cp.Constraint] = []
            if len(self.b):
                constraints.append(self.A @ x == self.b)
            if len(self.h):
                constraints.append(self.G @ x <= self.h)
            if below.any():
                constraints.append(scaled[below] >= bound_scale * self.lower[below])
            if above.any():
                constraints.append(scaled[above] <= bound_scale * self.upper[above])
            curved = 0.5 * cp.quad_form(x, cp.psd_wrap(self.Q)) if self.Q.any() else 0.0
            objective = 0.5 * cp.sum_squares(x - v) if self.is_projection else curved - v @ x
            return Model(cp.Problem(cp.Minimize(objective), constraints), [v], [x])

        def qp_data(v: Tensor) -> QPData:
            def repeated(array: Array, present: bool) -> Tensor | None:
                return torch.from_numpy(array).expand(n, *array.shape) if present else None

            return QPData(
                Q=torch.from_numpy(self.Q).expand(n, n, n),
                q=-v,
                A=repeated(self.A, len(self.b) > 0),
                b=repeated(self.b, len(self.b) > 0),
                G=repeated(self.G, len(self.h) > 0),
                h=repeated(self.h, len(self.h) > 0),
                lower=repeated(self.lower, bool(below.any())),
                upper=repeated(self.upper, bool(above.any())),
            )

        return BenchmarkProblem(
            name=self.name,
            description=self.description,
            batch=n,
            parameters=(ParameterValue("v", torch.from_numpy(self.v).repeat(n, 1)),),
            build=build,
            qp_data=qp_data,
            cotangent=torch.eye(n, dtype=torch.float64),
            has_bounds=bool(below.any() or above.any()),
            named_set=self.named_set,
        )


def _point(
    name: str, description: str, v: Sequence[float], primal: Sequence[float], *,
    Q: Sequence[Sequence[float]] | None = None, A: Sequence[Sequence[float]] = (), b: Sequence[float] = (),
    G: Sequence[Sequence[float]] = (), h: Sequence[float] = (), lower: float | Sequence[float] = -np.inf,
    upper: float | Sequence[float] = np.inf, unique: bool = True, named_set: NamedSet | None = None,
) -> Point:  # fmt: skip
    n = len(v)
    optimum = np.array(primal, dtype=float)
    return Point(
        name=name,
        description=description,
        v=np.array(v, dtype=float),
        primal=optimum if unique else None,
        Q=np.eye(n) if Q is None else np.array(Q, dtype=float),
        A=np.array(A, dtype=float).reshape(-1, n),
        b=np.array(b, dtype=float),
        G=np.array(G, dtype=float).reshape(-1, n),
        h=np.array(h, dtype=float),
        lower=np.broadcast_to(np.array(lower, dtype=float), n).copy(),
        upper=np.broadcast_to(np.array(upper, dtype=float), n).copy(),
        optimum=optimum,
        named_set=named_set,
    )


# Numbers are dyadic, so that what is equal on paper is equal in float64.
POINTS: tuple[Point, ...] = (
    _point(
        "simplex-weak", "projection on the simplex: v_3 = 0 lies on its bound without being pushed, v_4 is pushed",
        v=[0.5, 0.5, 0.0, -1.0], primal=[0.5, 0.5, 0.0, 0.0], A=[[1, 1, 1, 1]], b=[1], lower=0.0,
        named_set=Simplex(4, 1.0),
    ),
    _point(
        "simplex-vertex", "projection on the simplex of one of its vertices: all bounds but one are weakly active",
        v=[1.0, 0.0, 0.0], primal=[1.0, 0.0, 0.0], A=[[1, 1, 1]], b=[1], lower=0.0, named_set=Simplex(3, 1.0),
    ),
    _point(
        "duplicates", "projection on x_1 + x_2 <= 1, written twice and once more multiplied by 2; pushed against it",
        v=[1.0, 1.0], primal=[0.5, 0.5], G=[[1, 1], [1, 1], [2, 2]], h=[1, 1, 2],
    ),
    _point(
        "duplicates-weak", "the same three rows, with v on the boundary",
        v=[0.5, 0.5], primal=[0.5, 0.5], G=[[1, 1], [1, 1], [2, 2]], h=[1, 1, 2],
    ),
    _point(
        "dependent-equations", "projection on three equations of which the third is the sum of the others",
        v=[1.0, 0.25, 0.5], primal=[0.5, 0.25, 0.25], A=[[1, 1, 1], [1, -1, 0], [2, 0, 1]], b=[1.0, 0.25, 1.25],
        lower=0.0,
    ),
    _point(
        "apex", "projection on a pyramid, v above its apex: four rows meet in three dimensions",
        v=[0.0, 0.0, 2.0], primal=[0.0, 0.0, 1.0], G=[[1, 0, 1], [-1, 0, 1], [0, 1, 1], [0, -1, 1]], h=[1, 1, 1, 1],
    ),
    _point(
        "half-space", "projection on x_1 + 2 x_2 + 2 x_3 <= 9 of a point of its boundary",
        v=[1.0, 2.0, 2.0], primal=[1.0, 2.0, 2.0], G=[[1, 2, 2]], h=[9],
    ),
    _point(
        "birkhoff", "projection on the 2x2 doubly stochastic matrices of the identity: dependent equations",
        v=[1.0, 0.0, 0.0, 1.0], primal=[1.0, 0.0, 0.0, 1.0],
        A=[[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]], b=[1, 1, 1, 1], lower=0.0,
    ),
    _point(
        "fixed", "projection on a box with l_2 = u_2",
        v=[0.25, 2.0, 3.0], primal=[0.25, 0.5, 1.0], lower=[0.0, 0.5, 0.0], upper=[1.0, 0.5, 1.0],
    ),
    _point(
        "box-corner", "QP with Q = [[2, 1], [1, 2]] in the unit box, solved by a corner; the multiplier of x_1 is zero",
        v=[3.0, 4.0], primal=[1.0, 1.0], Q=[[2, 1], [1, 2]], lower=0.0, upper=1.0,
    ),
    _point(
        "lp-vertex", "LP, unique optimum at a vertex where three rows meet in two dimensions",
        v=[2.0, 1.0], primal=[1.0, 0.5], Q=[[0, 0], [0, 0]], G=[[1, 1], [1, 2]], h=[1.5, 2.0], lower=0.0, upper=1.0,
    ),
    _point(
        "lp-ties", "LP whose optima are an edge",
        v=[1.0, 1.0], primal=[0.75, 0.75], Q=[[0, 0], [0, 0]], G=[[1, 1]], h=[1.5], lower=0.0, upper=1.0, unique=False,
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The Han-Sun set
# ---------------------------------------------------------------------------------------------------------------------


def han_sun_set(point: Point) -> list[Array]:
    """Return the distinct P_K, (n, n) each, over all admissible K.

    K is admissible when all its rows are active and non-negative multipliers on them carry the force v - Q x: then the
    support of that multiplier is in K. Of an optimum that is not unique the one in the middle of the face is taken:
    the rows active there are active at all of them.
    """
    x = point.optimum
    C, d = point.inequalities()
    active = np.flatnonzero(C @ x == d)
    force = point.v - point.Q @ x
    found: list[Array] = []
    for size in range(len(active) + 1):
        for chosen in combinations(active, size):
            rows = C[list(chosen)]
            if not _carries(point.A, rows, force):
                continue
            P = _projector(point.Q, np.vstack([point.A, rows]))
            if all(np.abs(P - other).max() > 1e-12 for other in found):
                found.append(P)
    return found


def _carries(A: Array, rows: Array, force: Array) -> bool:
    """Say whether force = A'y + rows'z for some y and some z >= 0."""
    columns = np.vstack([A, -A, rows]).T
    if columns.shape[1] == 0:
        return not force.any()
    return bool(nnls(columns, force)[1] <= _CARRIED * max(1.0, np.abs(force).max()))


def _projector(Q: Array, N: Array) -> Array:
    Z = scipy.linalg.null_space(N, rcond=1e-10) if len(N) else np.eye(len(Q))
    if Z.shape[1] == 0:
        return np.zeros_like(Q)
    return Z @ np.linalg.pinv(Z.T @ Q @ Z, rcond=1e-10, hermitian=True) @ Z.T


def distance_to_set(M: Array, elements: Sequence[Array]) -> float:
    """Return the Frobenius distance to the nearest element."""
    return min(float(np.linalg.norm(M - P)) for P in elements)


def distance_to_hull(M: Array, elements: Sequence[Array]) -> float:
    """Return the Frobenius distance to the convex hull.

    The point of least norm in the hull of the p_k is sum_k w_k p_k / sum_k w_k, where w >= 0 minimises
    |sum_k w_k p_k|^2 + (sum_k w_k - 1)^2 (Lawson and Hanson, "Solving Least Squares Problems", chapter 23).
    """
    columns = np.stack([(P - M).ravel() for P in elements], axis=1)
    w = nnls(np.vstack([columns, np.ones(len(elements))]), np.eye(M.size + 1)[-1])[0]
    return float(np.linalg.norm(columns @ (w / w.sum())))


# ---------------------------------------------------------------------------------------------------------------------
# Judging
# ---------------------------------------------------------------------------------------------------------------------


class Outcome(Enum):
    """What a returned Jacobian is."""

    ELEMENT = "element"
    """Of the Han-Sun set."""
    MIXTURE = "mixture"
    """In its convex hull, but not an element."""
    OUTSIDE = "outside"
    """Not in the hull."""
    NOT_FINITE = "NaN"
    """Some entry is NaN or infinite."""
    WRONG_POINT = "wrong point"
    """The solution itself is wrong."""
    FAILED = "failed"
    """An error was raised, or the package is not installed."""


@dataclass(frozen=True)
class JacobianRow:
    """One contestant at one point.

    Attributes:
        point: its name.
        contestant: its name.
        outcome: see there.
        primal_error: largest error of x; where the optimum is not unique, of constraints and objective.
        to_set: Frobenius distance to the nearest element of the Han-Sun set, NaN if there is no finite Jacobian.
        to_hull: the same to the convex hull.
        asymmetry: largest entry of M - M'.
        excess: largest entry of M Q M - M; for projections M M - M, zero if M is idempotent.
        error: why there is nothing to judge.
        jacobian: (n, n) dx/dv.
    """

    point: str
    contestant: str
    outcome: Outcome
    primal_error: float = float("nan")
    to_set: float = float("nan")
    to_hull: float = float("nan")
    asymmetry: float = float("nan")
    excess: float = float("nan")
    error: str | None = None
    jacobian: Array | None = None


def primal_error(point: Point, x: Array) -> float:
    """Return the largest error of a returned solution (n,)."""
    if point.primal is not None:
        return float(np.abs(x - point.primal).max())
    C, d = point.inequalities()
    violation = np.concatenate([np.abs(point.A @ x - point.b), np.maximum(C @ x - d, 0.0)]).max(initial=0.0)

    def objective(at: Array) -> float:
        return float(0.5 * at @ point.Q @ at - point.v @ at)

    return float(np.maximum(violation, abs(objective(x) - objective(point.optimum))))


def judge_jacobian(point: Point, contestant: str, x: Array, M: Array) -> JacobianRow:
    """Judge the solution x (n,) and the Jacobian M (n, n) a contestant returned."""
    error = primal_error(point, x)
    if not np.isfinite(M).all():
        return JacobianRow(point.name, contestant, Outcome.NOT_FINITE, error, jacobian=M)
    elements = han_sun_set(point)
    to_set, to_hull = distance_to_set(M, elements), distance_to_hull(M, elements)
    if not error <= ROUGH_TOLERANCE:
        outcome = Outcome.WRONG_POINT
    elif to_set <= GRADIENT_TOLERANCE:
        outcome = Outcome.ELEMENT
    else:
        outcome = Outcome.MIXTURE if to_hull <= GRADIENT_TOLERANCE else Outcome.OUTSIDE
    asymmetry, excess = float(np.abs(M - M.T).max()), float(np.abs(M @ point.Q @ M - M).max())
    return JacobianRow(point.name, contestant, outcome, error, to_set, to_hull, asymmetry, excess, jacobian=M)


def ask(contestant: Contestant, point: Point) -> JacobianRow:
    """Ask one contestant for the Jacobian at one point; errors are kept in the row."""
    problem = point.problem()
    (v,) = problem.inputs()
    try:
        x = contestant.setup(problem)(v)
        (gradient,) = torch.autograd.grad(x, v, problem.cotangent)
    except Exception as error:
        return JacobianRow(point.name, contestant.name, Outcome.FAILED, error=describe_error(error))
    # Copies of one point need not come out alike: the worst of them is judged.
    copies = x.detach().numpy()
    worst = max(copies, key=lambda item: primal_error(point, item) if np.isfinite(item).all() else np.inf)
    return judge_jacobian(point, contestant.name, worst, gradient.numpy())


def run_points(
    contestants: Sequence[Contestant], points: Sequence[Point] = POINTS, progress: Progress | None = None
) -> list[JacobianRow]:
    """Ask everybody at every point; `progress` takes one step per point and contestant."""
    rows: list[JacobianRow] = []
    default = torch.get_default_dtype()
    # QPLayer allocates gradients in torch's default dtype.
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            # Solvers warn about inexact items; what they return is judged.
            warnings.simplefilter("ignore")
            for point in points:
                if progress is not None:
                    progress.stage(point.name)
                for contestant in contestants:
                    rows.append(ask(contestant, point))
                    if progress is not None:
                        progress.advance(contestant.name)
    finally:
        torch.set_default_dtype(default)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------

_INTRODUCTION = """\
Where a constraint is active without being needed, or needed more than once, the solution of a quadratic program has a
kink, or its multipliers are not unique. Training meets such points all the time: a sparse target on a simplex, a
constraint written twice, a vertex. What comes back there should be finite, and it should be *a* derivative: an element
of the Han-Sun set ([theory.md](theory.md), section 2), which is finite and enumerated here.
"""

_LEGEND = f"""\
- **element**: within {GRADIENT_TOLERANCE:g} (Frobenius norm) of an element of the Han-Sun set. **mixture**: not an
  element, but within {GRADIENT_TOLERANCE:g} of the convex hull, as an interior-point method returns where a slack and
  its multiplier fall to zero together. **outside**: neither; the number is the distance to the hull. **NaN**,
  **failed**: no gradient. **wrong point**: x is off by more than {ROUGH_TOLERANCE:g}.
- A mixture is a legitimate generalised derivative too (the convex hull of a conservative mapping is one). It is not a
  projector in the metric of Q, as elements are: `M Q M` differs from `M`.
- Several elements are possible and none is better: an element other than ours is not an error.
- At a linear program every P_K is zero, and zero is the only element. Where the optimum is not unique, this is the
  derivative along changes that keep the active rows, while other changes make x jump; a large number is the trace of
  the jump. There x is judged by constraints and objective.
"""

_LIMITATIONS = """\
- Points and toys were made by the authors of `hsbackend`, to be as degenerate as possible. They say nothing about
  points in general position, which are compared in [benchmarks.md](benchmarks.md).
- Which element a method returns near a degenerate point can depend on the last digits of its iterate: other tolerances,
  versions or machines may give another row.
- Bounds are given to MOREAU through cvxpylayers as `2 * x >= 0`, because `x >= 0` is dropped there.
- One Jacobian is asked for, that of minus the linear term; gradients of matrices and limits are not compared here.
"""


@dataclass(frozen=True)
class DegenerateReport:
    """Everything the report tells."""

    environment: Environment
    points: Sequence[Point]
    contestants: Sequence[Contestant]
    rows: Sequence[JacobianRow]
    training: Sequence[TrainingRow]
    accuracy: float
    seed: int
    command: str

    def row(self, point: Point, contestant: Contestant) -> JacobianRow:
        return next(r for r in self.rows if (r.point, r.contestant) == (point.name, contestant.name))


def run_degenerate(
    *, names: list[str] | None, accuracy: float, seed: int, quick: bool, command: str
) -> DegenerateReport:
    """Run the whole comparison.

    Args:
        names: only these contestants, None for all; `quick` leaves out jaxopt unless it is named.
        accuracy: asked of every solver.
        seed: of the toys; the points are not random.
        quick: tiny toys and few steps.
        command: what the report says it was made by.

    Raises:
        ValueError: a name is not known; the message lists those that are.
    """
    everybody = degenerate_contestants(accuracy)
    if quick and names is None:
        # It compiles for a minute.
        everybody = tuple(c for c in everybody if c.name != "jaxopt")
    contestants = choose_contestants(everybody, names)
    trained = [c for c in contestants if c.name != "jaxopt"]
    progress = Progress(len(POINTS) * len(contestants) + len(TOYS) * len(trained))
    rows = run_points(contestants, POINTS, progress)
    training = run_training(trained, seed=seed, quick=quick, progress=progress)
    progress.close()
    environment = describe_environment(torch.device("cpu"))
    return DegenerateReport(environment, POINTS, contestants, rows, training, accuracy, seed, command)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1e}"


def _summary(report: DegenerateReport) -> list[list[str]]:
    """One line per point, one column per contestant, then a line of counts."""

    def told(row: JacobianRow) -> str:
        return f"{row.outcome.value} {row.to_hull:.2g}" if row.outcome is Outcome.OUTSIDE else row.outcome.value

    lines = [["point", "elements", *(c.name for c in report.contestants)]]
    for point in report.points:
        cells = [told(report.row(point, contestant)) for contestant in report.contestants]
        lines.append([point.name, str(len(han_sun_set(point))), *cells])
    counts: list[str] = []
    for contestant in report.contestants:
        own = [report.row(point, contestant) for point in report.points]
        counts.append(f"{sum(row.outcome is Outcome.ELEMENT for row in own)} of {len(own)}")
    return [*lines, ["elements returned", "", *counts]]


def _details(report: DegenerateReport, point: Point) -> list[list[str]]:
    lines = [["contestant", "outcome", "x error", "to set", "to hull", "asymmetry", "M Q M - M"]]
    for contestant in report.contestants:
        row = report.row(point, contestant)
        numbers = (row.primal_error, row.to_set, row.to_hull, row.asymmetry, row.excess)
        lines.append([row.contestant, row.outcome.value, *map(_number, numbers)])
    return lines


def _training_table(report: DegenerateReport, toy: Toy) -> list[list[str]]:
    lines = [["contestant", "first loss", "final loss", "reached", "steps", "NaN", "seconds"]]
    for row in report.training:
        if row.toy == toy.name:
            nan = "never" if row.first_nan is None else f"step {row.first_nan}"
            known = row.error is None
            lines.append(
                [
                    row.contestant,
                    _number(row.first_loss),
                    _number(row.final_loss),
                    ("yes" if row.reached else "no") if known else "failed",
                    str(row.steps),
                    nan if known else "-",
                    f"{row.seconds:.1f}",
                ]
            )
    return lines


def _failures(report: DegenerateReport) -> list[str]:
    """Return one line per contestant and error."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.error is not None:
            where.setdefault((row.contestant, row.error), []).append(row.point)
    for row in report.training:
        if row.error is not None:
            where.setdefault((row.contestant, row.error), []).append(row.toy)
    return [f"{name} failed at {', '.join(places)}: {error}" for (name, error), places in where.items()]


def _versions(report: DegenerateReport) -> str:
    """The versions of the environment, and that of qpth, which only this comparison uses."""
    try:
        return f"{report.environment.versions_text}, qpth {importlib.metadata.version('qpth')}"
    except importlib.metadata.PackageNotFoundError:
        return f"{report.environment.versions_text}, qpth not installed"


def screen_text(report: DegenerateReport) -> str:
    """Return the tables as plain text."""
    environment = report.environment
    parts = [f"{environment.cpu}, torch threads {environment.torch_threads}, {environment.date}\n{_versions(report)}"]
    parts.append(align(_summary(report)))
    parts += [f"training, {toy.name}: {toy.description}\n{align(_training_table(report, toy))}" for toy in TOYS]
    parts.append("\n".join(_failures(report)))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_text(report: DegenerateReport) -> str:
    """Return the page."""
    environment = report.environment
    parts = [
        "# Gradients at degenerate points",
        f"Produced by `{report.command}` on {environment.date}; the rows behind the tables are in "
        "[degenerate.csv](degenerate.csv).",
        _INTRODUCTION.strip(),
        "\n".join(
            (
                f"- Machine: {environment.cpu}, {environment.cores} cores, device {environment.device}",
                f"- Threads: torch {environment.torch_threads}",
                f"- Commit: {environment.commit}",
                f"- Python {environment.python}; {_versions(report)}",
                f"- float64, accuracy asked of every solver {report.accuracy:g}, seed {report.seed}",
            )
        ),
        "## Jacobians",
        "What is returned for dx/dv, the Jacobian with respect to minus the linear term. The second column says how "
        "many elements the Han-Sun set has.",
        markdown_table(_summary(report)),
        _LEGEND.strip(),
        "## Training",
        "Both toys have an optimum of known loss zero, at which the layer is at a degenerate point. Plain gradient "
        "descent, the same start for everybody; *reached* means that the loss fell below "
        f"{REACHED:g} of its first value. jaxopt is not in these tables: as called here it takes fixed limits.",
    ]
    for toy in TOYS:
        parts += [f"### {toy.name}", f"{toy.description}.", markdown_table(_training_table(report, toy))]
    parts += ["## Details", "Frobenius distances to the nearest element and to the hull; largest entries of the rest."]
    for point in report.points:
        parts += [f"### {point.name}", f"{point.description}.", markdown_table(_details(report, point))]
    if failures := _failures(report):
        parts += ["### Failures", "\n".join(f"- {failure}" for failure in failures)]
    parts += [
        "## Contestants",
        "\n".join(f"- **{contestant.name}**: {contestant.description}" for contestant in report.contestants),
        "## Limitations",
        _LIMITATIONS.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(report: DegenerateReport, folder: Path) -> tuple[Path, Path]:
    """Write `folder/degenerate.csv` and `folder/degenerate.md` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, markdown_path = folder / "degenerate.csv", folder / "degenerate.md"
    fields = ("point", "contestant", "outcome", "primal_error", "to_set", "to_hull", "asymmetry", "excess", "error")
    with csv_path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*fields, "date", "versions"])
        for row in report.rows:
            values = [getattr(row, field) for field in fields]
            values[2] = row.outcome.value
            writer.writerow([*values, report.environment.date, _versions(report)])
    markdown_path.write_text(markdown_text(report))
    return csv_path, markdown_path
