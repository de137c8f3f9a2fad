"""The contestants: what is compared, each behind the same two calls, none of them knowing how it is judged.

`contestant.setup(problem)` builds the layer and returns `solve(*parameters) -> primal (B, n)`, differentiable by
autograd. Imports of optional packages happen inside, so that a missing package costs one row and not the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hsbackend.comparisons.problems import BenchmarkProblem, Model, QPData

# Asked of every solver that can be asked; HSBackend's own default, three orders below the tolerance of the judge.
DEFAULT_ACCURACY = 1e-9

Solve = Callable[..., Tensor]
# A layer as cvxpylayers makes them: tensors in, tuple of tensors out.
Layer = Callable[..., tuple[Tensor, ...]]

# `2 * x >= 0` is what a user has to write to keep stock MOREAU from dropping bounds; any factor other than 1 does it.
_SPELLED_OUT = 2.0
# What QPLayer itself writes for "no bound".
_PROXQP_INFINITY = 1e20
# ProxQP's QPLayer is dense: 16 items of 1,024 variables took it 15 s per call, six times the next slowest.
_LARGEST_QPLAYER = 300


class Kind(Enum):
    """What a contestant can do."""

    GENERAL = "general"
    """Solves any QP of the suite."""
    SPECIALISED = "specialised"
    """Projects on the named sets it knows."""
    FLOOR = "floor"
    """Does only a part of the work; shown for its time, never judged as an answer."""


class Contestant(Protocol):
    """One way to solve a benchmark problem.

    Attributes:
        name: short name, used on the command line and in the tables.
        description: what it is and with which settings it runs.
        is_ours: ours are compared with peers, peers among themselves.
        is_diffcp: stock cvxpylayers with its default backend, the yardstick of the ratio "vs stock DIFFCP".
        kind: what it can do.
    """

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def is_ours(self) -> bool: ...
    @property
    def is_diffcp(self) -> bool: ...
    @property
    def kind(self) -> Kind: ...

    def accepts(self, problem: BenchmarkProblem) -> bool:
        """Say whether the contestant differs from the others on this problem; if not it gets no row."""
        ...

    def setup(self, problem: BenchmarkProblem) -> Solve:
        """Build everything that is built once; the result maps parameter tensors to the primal (B, n)."""
        ...


class LayerSolve:
    """A layer with one variable as a solve function: parameter tensors in, primal (B, n) out."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, *parameters: Tensor) -> Tensor:
        return self.layer(*parameters)[0].flatten(1)


AnyContestant = TypeVar("AnyContestant", bound=Contestant)


@dataclass(frozen=True)
class LayerContestant:
    """A contestant with the interface of a cvxpylayers layer; `make_layer(model)` builds the layer.

    `bound_scale` is the spelling of bounds it is given; with `only_with_bounds` it sits out problems without bounds,
    where it would repeat another contestant.
    """

    name: str
    description: str
    make_layer: Callable[[Model], Layer]
    is_ours: bool = False
    is_diffcp: bool = False
    kind: Kind = Kind.GENERAL
    bound_scale: float = 1.0
    only_with_bounds: bool = False

    def accepts(self, problem: BenchmarkProblem) -> bool:
        return problem.has_bounds or not self.only_with_bounds

    def setup(self, problem: BenchmarkProblem) -> Solve:
        return LayerSolve(self.make_layer(problem.build(self.bound_scale)))


@dataclass(frozen=True)
class QPLayerContestant:
    """ProxQP's QPLayer; it takes matrices, so the problem's matrices are formed from the parameters in every call.

    Shared parameters are expanded over the batch before the call: autograd then sums their gradients, as cvxpylayers
    does. QPLayer allocates gradients in torch's default dtype, so the caller sets that to float64 (see
    `speed.run_speed`).
    """

    name: str
    description: str
    accuracy: float
    is_ours: bool = False
    is_diffcp: bool = False
    kind: Kind = Kind.GENERAL

    def accepts(self, problem: BenchmarkProblem) -> bool:
        return problem.cotangent.shape[1] <= _LARGEST_QPLAYER

    def setup(self, problem: BenchmarkProblem) -> Solve:
        from proxsuite.torch.qplayer import QPFunction

        function = QPFunction(**solver_options("qplayer", self.accuracy))

        def solve(*parameters: Tensor) -> Tensor:
            qp = problem.qp_data(*parameters)
            empty = qp.q.new_zeros(0)
            A = empty if qp.A is None else qp.A
            b = empty if qp.b is None else qp.b
            return function(qp.Q, qp.q, A, b, *_two_sided_rows(qp))[0]

        return solve


def _two_sided_rows(qp: QPData) -> tuple[Tensor, Tensor, Tensor]:
    """Return (C, low, high) of low <= C x <= high: the rows G, then the identity if there are bounds."""
    batch, n = qp.q.shape
    rows: list[Tensor] = []
    low: list[Tensor] = []
    high: list[Tensor] = []
    infinite = qp.q.new_full((batch, n), _PROXQP_INFINITY)
    if qp.G is not None and qp.h is not None:
        rows.append(qp.G)
        low.append(torch.full_like(qp.h, -_PROXQP_INFINITY))
        high.append(qp.h)
    if qp.lower is not None or qp.upper is not None:
        rows.append(torch.eye(n, dtype=qp.q.dtype, device=qp.q.device).expand(batch, n, n))
        low.append(-infinite if qp.lower is None else qp.lower.clamp_min(-_PROXQP_INFINITY))
        high.append(infinite if qp.upper is None else qp.upper.clamp_max(_PROXQP_INFINITY))
    return torch.cat(rows, dim=1), torch.cat(low, dim=1), torch.cat(high, dim=1)


def solver_options(solver: str, accuracy: float) -> dict[str, Any]:
    """Map one requested accuracy to each solver's own option names; the only place that does.

    Args:
        solver: "scs", "clarabel" (both through diffcp), "moreau", "qplayer" or "hsbackend".
        accuracy: absolute and relative tolerance asked for.

    Raises:
        ValueError: the solver is not known.
    """
    match solver:
        case "scs":
            # Residuals and gap of the conic form. The default limit of 1e5 iterations stays: diffcp warns when it is
            # reached.
            return {"solve_method": "SCS", "eps_abs": accuracy, "eps_rel": accuracy}
        case "clarabel":
            # An interior-point method leaves x off by about the square root of the gap tolerance: expect fewer digits.
            return {"solve_method": "Clarabel", "tol_gap_abs": accuracy, "tol_gap_rel": accuracy, "tol_feas": accuracy}
        case "moreau":
            import moreau

            # MOREAU picks its active-set method for small QPs and its interior point otherwise; both are told. The
            # active set's other tolerances (1e-11 and below) are tighter than any accuracy asked for here.
            return {
                "ipm_settings": {"tol_gap_abs": accuracy, "tol_gap_rel": accuracy, "tol_feas": accuracy},
                "active_set_settings": moreau.ActiveSetSettings(primal_tol=accuracy),
            }
        case "qplayer":
            # The backward pass has a tolerance of its own, 1e-4 by default.
            return {"eps": accuracy, "eps_backward": accuracy}
        case "hsbackend":
            return {"tolerance": accuracy}
        case _:
            raise ValueError(f"unknown solver {solver!r}, expected scs, clarabel, moreau, qplayer or hsbackend")


def _stock_layer(solver: str | None, solver_args: Callable[[], dict[str, Any]]) -> Callable[[Model], Layer]:
    """Return a builder of stock layers; `solver_args` is called late because MOREAU's need the package."""

    def make_layer(model: Model) -> Layer:
        from cvxpylayers.torch import CvxpyLayer

        return CvxpyLayer(model.problem, model.parameters, model.variables, solver=solver, solver_args=solver_args())

    return make_layer


def _stock_layer_with_hs(accuracy: float) -> Callable[[Model], Layer]:
    """Return a builder of stock layers with our solver."""

    def make_layer(model: Model) -> Layer:
        from cvxpylayers.torch import CvxpyLayer

        import hsbackend

        solver = hsbackend.HSBackend(**solver_options("hsbackend", accuracy))
        return CvxpyLayer(model.problem, model.parameters, model.variables, solver=solver)

    return make_layer


def _hs_layer(accuracy: float) -> Callable[[Model], Layer]:
    """Return a builder of our own layers."""

    def make_layer(model: Model) -> Layer:
        import hsbackend
        from hsbackend.adapters.cvxpylayers import CvxpyLayer

        solver = hsbackend.HSBackend(**solver_options("hsbackend", accuracy))
        return CvxpyLayer(model.problem, model.parameters, model.variables, solver=solver)

    return make_layer


def route_of(layer: object) -> str | None:
    """Return how a layer of ours says it routes its problem, in one line; None for layers that do not say."""
    explain = getattr(layer, "explain", None)
    if explain is None:
        return None
    return "; ".join(line.strip(" -") for line in str(explain()).splitlines())


def layer_contestants(accuracy: float = DEFAULT_ACCURACY) -> tuple[LayerContestant, ...]:
    """Return the contestants that are cvxpylayers layers, peers first."""
    asked = f"accuracy {accuracy:g}"
    return (
        LayerContestant(
            name="diffcp",
            description="stock cvxpylayers, default backend DIFFCP with SCS, default settings (accuracy 1e-4)",
            make_layer=_stock_layer(None, dict),
            is_diffcp=True,
        ),
        LayerContestant(
            name="diffcp-tight",
            description=f"stock cvxpylayers, DIFFCP with SCS, {asked}",
            make_layer=_stock_layer(None, lambda: solver_options("scs", accuracy)),
            is_diffcp=True,
        ),
        LayerContestant(
            name="diffcp-clarabel",
            description=f"stock cvxpylayers, DIFFCP with Clarabel, {asked}",
            make_layer=_stock_layer(None, lambda: solver_options("clarabel", accuracy)),
            is_diffcp=True,
        ),
        LayerContestant(
            name="moreau",
            description=f"stock cvxpylayers, MOREAU, {asked}; bounds as the user writes them, x >= 0",
            make_layer=_stock_layer("MOREAU", lambda: solver_options("moreau", accuracy)),
        ),
        LayerContestant(
            name="moreau-2x",
            description=f"stock cvxpylayers, MOREAU, {asked}; bounds rewritten as 2 * x >= 0, which it does not drop",
            make_layer=_stock_layer("MOREAU", lambda: solver_options("moreau", accuracy)),
            bound_scale=_SPELLED_OUT,
            only_with_bounds=True,
        ),
        LayerContestant(
            name="moreau-ipm",
            description=f"stock cvxpylayers, MOREAU, solver='ipm' (interior point), {asked}; bounds as 2 * x >= 0",
            make_layer=_stock_layer("MOREAU", lambda: {**solver_options("moreau", accuracy), "solver": "ipm"}),
            bound_scale=_SPELLED_OUT,
        ),
        LayerContestant(
            name="hs-stock",
            description=f"stock cvxpylayers with solver=HSBackend(), {asked}",
            make_layer=_stock_layer_with_hs(accuracy),
            is_ours=True,
        ),
        LayerContestant(
            name="hs-layer",
            description=f"hsbackend.adapters.cvxpylayers.CvxpyLayer, {asked}",
            make_layer=_hs_layer(accuracy),
            is_ours=True,
        ),
    )


def all_contestants(accuracy: float = DEFAULT_ACCURACY) -> tuple[Contestant, ...]:
    """Return every contestant, peers first."""
    layers = layer_contestants(accuracy)
    qplayer = QPLayerContestant(
        name="qplayer",
        description=f"proxsuite QPLayer (ProxQP), accuracy {accuracy:g} forward and backward; takes matrices; dense, "
        f"so it sits out above {_LARGEST_QPLAYER} variables",
        accuracy=accuracy,
    )
    peers = [c for c in layers if not c.is_ours]
    return (*peers, qplayer, *(c for c in layers if c.is_ours))


def choose_contestants(contestants: tuple[AnyContestant, ...], names: list[str] | None) -> tuple[AnyContestant, ...]:
    """Return the contestants named, in the order of the table; all for None.

    Raises:
        ValueError: a name is not known; the message lists those that are.
    """
    if names is None:
        return contestants
    known = [c.name for c in contestants]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown contestant {', '.join(unknown)}, expected some of: {', '.join(known)}")
    return tuple(c for c in contestants if c.name in names)
