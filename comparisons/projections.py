"""Contestants that project on named sets: our direct API, sparsemax, jaxopt, and what any of them must at least do.

They take the point and the set, no cvxpy model; a contestant accepts the problems whose `named_set` it knows.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsbackend.comparisons.closed_forms import pool_adjacent_violators
from hsbackend.comparisons.contestants import Kind, Solve
from hsbackend.comparisons.named_sets import Birkhoff, BoxWithRows, Budget, L1Ball, Monotone, NamedSet, Simplex
from hsbackend.comparisons.problems import BenchmarkProblem
from hsbackend.comparisons.timing import Staged

# jaxopt differentiates isotonic regression through two dense n x n matrices per item.
_LARGEST_JAXOPT_MONOTONE = 1000
# How many of the largest entries sparsemax sorts first: several times the support of normal points of any size here.
_TOP_K = 32


@dataclass(frozen=True)
class ProjectionContestant:
    """A contestant that projects on a named set; `make_solve(named_set)` returns the solve function.

    `sets` are the types of sets it knows; below `smallest` or above `largest` variables it sits out.
    """

    name: str
    description: str
    sets: tuple[type[NamedSet], ...]
    make_solve: Callable[[NamedSet], Solve]
    is_ours: bool = False
    is_diffcp: bool = False
    kind: Kind = Kind.SPECIALISED
    smallest: int = 1
    largest: dict[type[NamedSet], int] | None = None

    def accepts(self, problem: BenchmarkProblem) -> bool:
        size = problem.cotangent.shape[1]
        largest = (self.largest or {}).get(type(problem.named_set), size)
        return isinstance(problem.named_set, self.sets) and self.smallest <= size <= largest

    def setup(self, problem: BenchmarkProblem) -> Solve:
        if not isinstance(problem.named_set, self.sets):
            raise ValueError(f"{self.name} does not know {problem.named_set}")
        return self.make_solve(problem.named_set)


def projection_contestants(accuracy: float) -> tuple[ProjectionContestant, ...]:
    """Return the contestants that project on named sets, peers first."""
    return (
        ProjectionContestant(
            name="sort",
            description="torch.sort of the point (of |point| for the l1 ball) and its gradient: no projection, a floor "
            "for every method that sorts",
            sets=(Simplex, L1Ball),
            make_solve=lambda _: _sort,
            kind=Kind.FLOOR,
        ),
        ProjectionContestant(
            name="pav-loop",
            description="plain compiled loop that pools adjacent violators, one thread, forward only: a floor",
            sets=(Monotone,),
            make_solve=lambda _: _pav_loop,
            kind=Kind.FLOOR,
        ),
        ProjectionContestant(
            name="torch-sort",
            description="projection by torch.sort and cumsum in plain PyTorch, differentiated by autograd",
            sets=(Simplex, L1Ball),
            make_solve=_torch_sort,
        ),
        ProjectionContestant(
            name="sparsemax",
            description="entmax.sparsemax(y, dim=-1), default settings (full sort)",
            sets=(Simplex,),
            make_solve=lambda named_set: _sparsemax(named_set, None),
        ),
        ProjectionContestant(
            name="sparsemax-topk",
            description=f"entmax.sparsemax(y, dim=-1, k={_TOP_K}): partial sort of the largest entries, more if needed",
            sets=(Simplex,),
            make_solve=lambda named_set: _sparsemax(named_set, _TOP_K),
            smallest=_TOP_K + 1,
        ),
        ProjectionContestant(
            name="jaxopt",
            description="jaxopt.projection (_simplex, _l1_ball, _box_section, _birkhoff) and jaxopt.isotonic, default "
            "settings; jax.vmap, jax.jit, float64, gradients by jax.vjp compiled with the forward pass so that "
            "the backward pass repeats nothing; timed on jax arrays",
            sets=(Simplex, L1Ball, Budget, Birkhoff, Monotone),
            make_solve=partial(_jaxopt, None),
            largest={Monotone: _LARGEST_JAXOPT_MONOTONE},
        ),
        ProjectionContestant(
            name="jaxopt-dual",
            description="the same, projection_birkhoff(use_semi_dual=False), otherwise default (L-BFGS to 1e-3): the "
            "default semi-dual has a gradient of zero",
            sets=(Birkhoff,),
            make_solve=partial(_jaxopt, 1e-3),
        ),
        ProjectionContestant(
            name="jaxopt-tight",
            description="the same, projection_birkhoff(use_semi_dual=False, make_solver=L-BFGS with zoom line search, "
            f"at most 500 steps, to {accuracy:g})",
            sets=(Birkhoff,),
            make_solve=partial(_jaxopt, accuracy),
        ),
        ProjectionContestant(
            name="hs-direct",
            description="hsbackend.project(point, polyhedron), the polyhedron made once",
            sets=(Simplex, L1Ball, Budget, Birkhoff, Monotone, BoxWithRows),
            make_solve=_direct,
            is_ours=True,
        ),
    )


def _direct(named_set: NamedSet) -> Solve:
    import hsbackend

    polyhedron = _polyhedron(named_set)
    return lambda point: hsbackend.project(point, polyhedron).flatten(1)


def _polyhedron(named_set: NamedSet) -> Any:
    """Return the set as our own library spells it."""
    from hsbackend import Polyhedron

    tensor = torch.as_tensor
    match named_set:
        case Simplex(n, radius):
            return Polyhedron.simplex(n, radius)
        case L1Ball(n, radius):
            return Polyhedron.l1_ball(n, radius)
        case Budget(coefficients, total, lower, upper):
            return Polyhedron.budget(
                coefficients.size, coefficients=tensor(coefficients), equals=total, lower=lower, upper=upper
            )
        case Birkhoff(side):
            return Polyhedron.birkhoff(side)
        case Monotone(n):
            return Polyhedron.monotone(n)
        case BoxWithRows(A, b, G, h, lower, upper):
            return Polyhedron(
                A=tensor(A), b=tensor(b), G=tensor(G), h=tensor(h), lower=tensor(lower), upper=tensor(upper)
            )


def _sort(point: Tensor) -> Tensor:
    return point.sort(dim=1, descending=True).values


def _pav_loop(point: Tensor) -> Tensor:
    primal = torch.empty_like(point)
    pool_adjacent_violators(point.detach().numpy(), primal.numpy())
    # The identity as derivative: the harness wants one, and this costs next to nothing.
    return point + (primal - point).detach()


def _torch_sort(named_set: NamedSet) -> Solve:
    """Held, Wolfe and Crowder 1974; the l1 ball by signs (Duchi et al. 2008)."""
    radius = float(named_set.radius)  # type: ignore[union-attr]

    def simplex(y: Tensor) -> Tensor:
        ordered = y.sort(dim=1, descending=True).values
        count = torch.arange(1, y.shape[1] + 1, dtype=y.dtype, device=y.device)
        shift = (ordered.cumsum(dim=1) - radius) / count
        support = (ordered > shift).sum(dim=1, keepdim=True)
        return (y - shift.gather(1, support - 1)).clamp_min(0.0)

    def l1_ball(y: Tensor) -> Tensor:
        size = y.abs()
        is_inside = size.sum(dim=1, keepdim=True) <= radius
        return torch.where(is_inside, y, y.sign() * simplex(size))

    return simplex if isinstance(named_set, Simplex) else l1_ball


def _sparsemax(named_set: NamedSet, k: int | None) -> Solve:
    from entmax import sparsemax

    if not isinstance(named_set, Simplex) or named_set.radius != 1.0:
        raise ValueError(f"sparsemax projects on the unit simplex, got {named_set}")
    return lambda point: sparsemax(point, dim=-1, k=k)


def _jaxopt(tolerance: float | None, named_set: NamedSet) -> Solve:
    """Return jaxopt's projection; `tolerance` is for the Birkhoff polytope, None its default method."""
    with warnings.catch_warnings():
        # "No longer maintained", on import: stated in the report by its version.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jaxopt import isotonic, projection
    import jax

    # A callback that fails is logged with its traceback besides being raised; the row tells it.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
    if isinstance(named_set, Birkhoff):
        return _jaxopt_birkhoff(tolerance)
    with jax.enable_x64(True):
        return _JaxSolve(jax, _jaxopt_function(isotonic, projection, named_set))


@cache
def _jaxopt_birkhoff(tolerance: float | None) -> Solve:
    """Return the projection on doubly stochastic matrices; made once, so that jax compiles it once per shape."""
    import jax
    import jaxopt
    from jaxopt import projection

    def make_solver(fun: Callable[..., Any]) -> Any:
        return jaxopt.LBFGS(fun=fun, tol=tolerance, maxiter=500, linesearch="zoom")

    if tolerance is None:
        return _JaxSolve(jax, projection.projection_birkhoff)
    return _JaxSolve(jax, partial(projection.projection_birkhoff, make_solver=make_solver, use_semi_dual=False))


def _jaxopt_function(isotonic: ModuleType, projection: ModuleType, named_set: NamedSet) -> Callable[[Any], Any]:
    """Return jaxopt's function of one point."""
    match named_set:
        case Simplex(_, radius):
            return lambda v: projection.projection_simplex(v, radius)
        case L1Ball(_, radius):
            return lambda v: projection.projection_l1_ball(v, radius)
        case Budget(coefficients, total, lower, upper):
            bounds = (np.full_like(coefficients, lower), np.full_like(coefficients, upper))
            return lambda v: projection.projection_box_section(v, (*bounds, coefficients, total))
        case Monotone():
            return isotonic.isotonic_l2_pav
        case _:
            raise ValueError(f"jaxopt has no projection on {named_set}")


class _JaxSolve:
    """A jax function of one point as a solve function; it is timed on jax arrays, see `timing.Staged`."""

    def __init__(self, jax: ModuleType, project: Callable[[Any], Any]) -> None:
        self._jax = jax
        batched = jax.vmap(project)
        self._forward = jax.jit(lambda v: jax.vjp(batched, v))
        self._backward = jax.jit(lambda pull_back, g: pull_back(g)[0])

    def stage(self, inputs: tuple[Tensor, ...], cotangent: Tensor) -> Staged:
        """Convert the point and the cotangent; the passes then touch jax arrays only."""
        jax = self._jax
        (point,) = inputs
        with jax.enable_x64(True):
            v = jax.numpy.asarray(point.detach().numpy())
            g = jax.numpy.asarray(cotangent.reshape(point.shape).numpy())

        def forward() -> Any:
            with jax.enable_x64(True):
                return jax.block_until_ready(self._forward(v))

        def backward(passed: Any) -> Any:
            with jax.enable_x64(True):
                return jax.block_until_ready(self._backward(passed[1], g))

        def results(passed: Any, gradient: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            return _to_torch(passed[0]).flatten(1), (_to_torch(gradient),)

        return Staged(forward, backward, results)

    def __call__(self, *parameters: Tensor) -> Tensor:
        """Project without gradients."""
        staged = self.stage(parameters, torch.zeros_like(parameters[0]))
        return _to_torch(staged.forward()[0]).flatten(1)


def _to_torch(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))
