"""Who is asked for gradients at degenerate points: the layers of the speed comparison, and whoever else takes a QP."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hsbackend.comparisons.contestants import Contestant, Kind, QPLayerContestant, Solve, layer_contestants
from hsbackend.comparisons.named_sets import Simplex
from hsbackend.comparisons.problems import BenchmarkProblem, QPData

_JAXOPT_STEPS = 20_000


@dataclass(frozen=True)
class MatrixContestant:
    """A contestant that takes the matrices; `make_solve(problem)` imports its package.

    The only parameter of a problem is the point v, minus the linear term.
    """

    name: str
    description: str
    make_solve: Callable[[BenchmarkProblem], Solve]
    package: str | None = None
    is_ours: bool = False
    is_diffcp: bool = False
    kind: Kind = Kind.GENERAL

    def accepts(self, problem: BenchmarkProblem) -> bool:
        return True

    def setup(self, problem: BenchmarkProblem) -> Solve:
        return self.make_solve(problem)


def degenerate_contestants(accuracy: float) -> tuple[Contestant, ...]:
    """Return everybody, peers first."""
    layers = {c.name: c for c in layer_contestants(accuracy)}
    spelled_out = layers["moreau-2x"]  # the spelling makes no difference without bounds
    moreau = replace(spelled_out, name="moreau", only_with_bounds=False)
    asked = f"accuracy {accuracy:g}"
    return (
        layers["diffcp"],
        layers["diffcp-tight"],
        layers["diffcp-clarabel"],
        moreau,
        layers["moreau-ipm"],
        QPLayerContestant(
            name="qplayer",
            description=f"proxsuite QPLayer (ProxQP), {asked} forward and backward; takes matrices",
            accuracy=accuracy,
        ),
        MatrixContestant(
            name="qpth",
            description="qpth QPFunction, default settings (eps=1e-12); takes matrices. It asks for numpy < 2, so it "
            "is not in the `compare` extra: install it with `pip install --no-deps qpth`",
            make_solve=_qpth,
            package="qpth",
        ),
        MatrixContestant(
            name="jaxopt",
            description="jaxopt: projection_simplex, projection_box, projection_halfspace where they apply, otherwise "
            f"OSQP with implicit differentiation, {asked}, at most {_JAXOPT_STEPS} steps",
            make_solve=lambda problem: _jaxopt(problem, accuracy),
            package="jaxopt",
        ),
        layers["hs-stock"],
        layers["hs-layer"],
        _solve_qp("hs-qp", "active", accuracy),
        _solve_qp("hs-qp-support", "support", accuracy),
    )


def packages_of(contestant: Contestant) -> tuple[str, ...]:
    """Return the optional packages a contestant needs."""
    if isinstance(contestant, MatrixContestant):
        return () if contestant.package is None else (contestant.package,)
    if contestant.name.startswith("moreau"):
        return ("moreau",)
    return ("proxsuite",) if contestant.name == "qplayer" else ()


def is_projection(problem: BenchmarkProblem) -> bool:
    """Say whether the quadratic form is the identity in every item."""
    Q = problem.qp_data(*problem.inputs()).Q
    return torch.equal(Q, torch.eye(Q.shape[-1], dtype=Q.dtype).expand(Q.shape))


def _solve_qp(name: str, jacobian: Literal["active", "support"], accuracy: float) -> MatrixContestant:
    def make_solve(problem: BenchmarkProblem) -> Solve:
        import hsbackend

        def solve(*parameters: Tensor) -> Tensor:
            qp = problem.qp_data(*parameters)
            data = (qp.Q, qp.q, qp.A, qp.b, qp.G, qp.h, qp.lower, qp.upper)
            return hsbackend.solve_qp(*data, tolerance=accuracy, jacobian=jacobian).primal

        return solve

    description = f'hsbackend.solve_qp(..., jacobian="{jacobian}"), accuracy {accuracy:g}'
    return MatrixContestant(name, description, make_solve, is_ours=True)


def inequality_rows(qp: QPData) -> tuple[Tensor, Tensor]:
    """Return (C, d) of C x <= d: the rows G, then the finite lower and upper bounds, which are those of the first item.

    Raises:
        ValueError: if there are none.
    """
    batch, n = qp.q.shape
    eye = torch.eye(n, dtype=qp.q.dtype)
    rows: list[Tensor] = []
    limits: list[Tensor] = []
    if qp.G is not None and qp.h is not None:
        rows.append(qp.G)
        limits.append(qp.h)
    for sign, bound in ((-1.0, qp.lower), (1.0, qp.upper)):
        if bound is not None:
            finite = bound[0].isfinite()
            rows.append((sign * eye[finite]).expand(batch, -1, n))
            limits.append(sign * bound[:, finite])
    if not rows:
        raise ValueError("the problem has no inequality")
    return torch.cat(rows, dim=1), torch.cat(limits, dim=1)


def _qpth(problem: BenchmarkProblem) -> Solve:
    function = importlib.import_module("qpth.qp").QPFunction(verbose=0)

    def solve(*parameters: Tensor) -> Tensor:
        qp = problem.qp_data(*parameters)
        none = qp.q.new_zeros(0)
        C, d = inequality_rows(qp)
        return function(qp.Q, qp.q, C, d, none if qp.A is None else qp.A, none if qp.b is None else qp.b)

    return solve


def _jaxopt(problem: BenchmarkProblem, accuracy: float) -> Solve:
    import jax

    with warnings.catch_warnings():
        # "No longer maintained", on import: stated in the report by its version.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jaxopt import OSQP, projection

    with torch.no_grad():
        qp = problem.qp_data(*problem.inputs())
    first = {name: None if tensor is None else tensor[0].numpy() for name, tensor in vars(qp).items()}
    C, d = (tensor[0].numpy() for tensor in inequality_rows(qp))
    is_euclidean = is_projection(problem)
    solver = OSQP(tol=accuracy, maxiter=_JAXOPT_STEPS, check_primal_dual_infeasability=False)
    equations = None if first["A"] is None else (first["A"], first["b"])

    def project(v: Any) -> Any:
        if is_euclidean and isinstance(problem.named_set, Simplex):
            return projection.projection_simplex(v, problem.named_set.radius)
        if is_euclidean and first["A"] is None and first["G"] is None:
            return projection.projection_box(v, (first["lower"], first["upper"]))
        if is_euclidean and first["A"] is None and len(C) == 1:
            return projection.projection_halfspace(v, (C[0], d[0]))
        found = solver.run(params_obj=(first["Q"], -v), params_eq=equations, params_ineq=(C, d))
        return found.params.primal

    batched = jax.vmap(project)
    forward = jax.jit(lambda v: jax.vjp(batched, v))
    backward = jax.jit(lambda pull_back, g: pull_back(g)[0])
    return lambda v: _JaxFunction.apply(v, jax, forward, backward)


class _JaxFunction(torch.autograd.Function):
    """A compiled jax function of points (B, n) and its pull-back, in float64."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, jax: Any, forward: Callable[[Any], Any], backward: Callable[..., Any]) -> Tensor:
        with jax.enable_x64(True):
            primal, ctx.pull_back = forward(jax.numpy.asarray(v.detach().numpy()))
        ctx.jax, ctx.compiled = jax, backward
        return torch.from_numpy(np.array(primal))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.jax.enable_x64(True):
            gradient = ctx.compiled(ctx.pull_back, ctx.jax.numpy.asarray(cotangents[0].numpy()))
        return torch.from_numpy(np.array(gradient)), None, None, None
