"""Linear programs and semidefinite Q through the public function: the selection, its derivatives, smoothing.

The families of programs below move along parameters that keep the set of optima consistent: there the optimum of least
norm is a smooth function of all of them, and differences of it are the judge of every derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hsbackend
from generators import semidefinite_case
from hsbackend import nn, solve_qp
from hsbackend.qp import QPSolution

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

D = torch.float64
Family = tuple[Callable[..., QPSolution], tuple[Tensor, ...], bool]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def least_norm(choice: str) -> Family:
    """No cost at all: x = A^+ b."""

    def solve(A: Tensor, b: Tensor) -> QPSolution:
        return solve_qp(None, torch.zeros(5, dtype=D), A, b, jacobian=choice)

    return solve, (normal(2, 2, 5, seed=1), normal(2, 2, seed=2)), True


def low_rank(choice: str) -> Family:
    """Q = F F', q = F c: the optima are F'x = -c."""

    def solve(F: Tensor, c: Tensor) -> QPSolution:
        return solve_qp(F @ F.mT, (F @ c.unsqueeze(-1)).squeeze(-1), jacobian=choice)

    return solve, (normal(4, 2, seed=3), normal(3, 2, seed=4)), True


def low_rank_with_rows(choice: str) -> Family:
    """The same with an equation, and a bound that has a multiplier."""

    def solve(F: Tensor, c: Tensor, A: Tensor, b: Tensor, y: Tensor, z: Tensor, lower: Tensor) -> QPSolution:
        held = torch.tensor([True, False, False, False, False, False])
        q = F @ c - A.mT @ y + torch.where(held, z.square() + 0.5, 0.0)
        return solve_qp(F @ F.mT, q, A, b, lower=torch.where(held, lower, -math.inf), jacobian=choice)

    leaves = (normal(6, 2, seed=5), normal(2, seed=6), normal(1, 6, seed=7), normal(1, seed=8), normal(1, seed=9))
    # The bound is in the way of F'x = -c and A x = b by nothing: all of them can hold at once.
    return solve, (*leaves, normal(6, seed=10), normal(6, seed=11)), True


def optimal_face(choice: str) -> Family:
    """A linear program whose optima are a face {A x = b, g'x = h, x_0 = lower_0}."""

    def solve(A: Tensor, b: Tensor, G: Tensor, h: Tensor, y: Tensor, z: Tensor, lower: Tensor) -> QPSolution:
        held = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=D)
        q = -A.mT @ y - G[0] * (z[0].square() + 0.5) + held * (z[1].square() + 0.5)
        limits = torch.cat([h[:1], h[1:] + 50.0])
        return solve_qp(None, q, A, b, G, limits, lower - 50.0 * (1.0 - held), jacobian=choice)

    leaves = (normal(1, 6, seed=12), normal(1, seed=13), normal(2, 6, seed=14), normal(2, seed=15), normal(1, seed=16))
    return solve, (*leaves, normal(2, seed=17), normal(6, seed=18)), True


def pushed(choice: str) -> Family:
    """Rows without a multiplier hold the optimum of least norm: it would like to be smaller."""

    def solve(A: Tensor, b: Tensor, G: Tensor, h: Tensor, lower: Tensor) -> QPSolution:
        return solve_qp(None, torch.zeros(5, dtype=D), A, b, G, h, lower, jacobian=choice)

    A, G = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]], dtype=D), torch.tensor([[0.0, -1.0, 0.3, 0.0, 0.0]], dtype=D)
    lower = torch.tensor([2.0, -9.0, -9.0, -9.0, -9.0], dtype=D)
    leaves = A + 0.1 * normal(1, 5, seed=19), torch.ones(1, dtype=D), G, torch.tensor([-1.0], dtype=D), lower
    return solve, leaves, True


def vertex(choice: str) -> Family:
    """A unique optimum."""

    def solve(q: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> QPSolution:
        return solve_qp(None, q, A, b, G, h, torch.zeros(4, dtype=D), jacobian=choice)

    leaves = (normal(4, seed=20) + 2.0, normal(1, 4, seed=21).abs() + 0.5, torch.ones(1, dtype=D))
    return solve, (*leaves, normal(2, 4, seed=22), normal(2, seed=23).abs() + 1.0), False


def half_curved(choice: str) -> Family:
    """A singular Q, given by its diagonal, with a unique optimum."""

    def solve(d: Tensor, q: Tensor, lower: Tensor, A: Tensor, b: Tensor) -> QPSolution:
        diagonal = torch.cat([d.square() + 0.5, torch.zeros(2, dtype=D)])
        return solve_qp(diagonal, q, A, b, lower=lower, jacobian=choice)

    q = torch.tensor([1.0, -2.0, 0.5, 1.0], dtype=D)
    leaves = (normal(2, seed=24), q, -torch.ones(4, dtype=D), torch.ones(1, 4, dtype=D), torch.ones(1, dtype=D))
    return solve, leaves, False


FAMILIES = (least_norm, low_rank, low_rank_with_rows, optimal_face, pushed, vertex, half_curved)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_choice = pytest.mark.parametrize("choice", ["active", "support"])


@every_family
@every_choice
def test_every_derivative_is_that_of_the_selection(family: Callable[[str], Family], choice: str) -> None:
    """Backward pass, forward mode, functional and compiled-style rules against differences, at first order."""
    solve, leaves, several = family(choice)
    solution = solve(*leaves)
    assert bool((solution.non_unique == several).all())
    assert float(solution.residuals.dual.max()) < 1e-9
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)

    def primal(*tensors: Tensor) -> Tensor:
        return solve(*tensors).primal

    assert gradcheck(primal, leaves, check_forward_ad=True, check_batched_grad=True, atol=2e-6)
    out = primal(*leaves)
    g = normal(*out.shape, seed=30)
    eager = torch.autograd.grad(out, leaves, g, retain_graph=True)
    graph = torch.autograd.grad(out, leaves, g, create_graph=True)
    values = tuple(leaf.detach() for leaf in leaves)
    functional = torch.func.vjp(primal, *values)[1](g)
    tangents = tuple(normal(*leaf.shape, seed=31 + k) for k, leaf in enumerate(values))
    forward = torch.func.jvp(primal, values, tangents)[1]
    for one, two, three in zip(eager, graph, functional, strict=True):
        torch.testing.assert_close(one, two.detach(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(one, three, rtol=1e-8, atol=1e-9)
    inner = sum(float((one * two).sum()) for one, two in zip(eager, tangents, strict=True))
    assert inner == pytest.approx(float((g * forward).sum()), rel=1e-8, abs=1e-9)


@every_choice
@pytest.mark.parametrize("seed", range(40))
def test_both_ways_of_the_backward_pass_agree(seed: int, choice: str) -> None:
    """On degenerate programs of any rank; gradients of rows and limits where the active ones are independent."""
    case = semidefinite_case(seed)
    me = case.equalities
    hessian, linear, rows, rhs = (torch.tensor(array) for array in (case.hessian, case.linear, case.rows, case.rhs))
    parts = hessian, linear, rows[:, :me], rhs[:, :me], rows[:, me:], rhs[:, me:]
    leaves = tuple(part.clone().requires_grad_() for part in parts)
    solution = solve_qp(*leaves, jacobian=choice, on_failure="nan")
    solved = solution.status == int(hsbackend.Status.SOLVED)
    g = torch.where(solved.unsqueeze(1), normal(*solution.primal.shape, seed=seed), 0.0)
    eager = torch.autograd.grad(solution.primal, leaves, g, retain_graph=True)
    graph = torch.autograd.grad(solution.primal, leaves, g, create_graph=True)
    independent = True
    for item in torch.nonzero(solved)[:, 0]:
        own = rows[item if len(rows) > 1 else 0]
        tight = torch.cat([torch.ones(me, dtype=torch.bool), solution.active_set.ineq[item]])
        independent &= int(torch.linalg.matrix_rank(own[tight])) == int(tight.sum())
    compared = range(6) if independent else range(2)
    for place in compared:
        one, other = eager[place], graph[place].detach()
        size = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * (1.0 + size))


def test_derivatives_along_dependent_rows() -> None:
    """Rows that are multiples and sums of others, and stay so; with the limits of a flat direction."""

    def primal(g: Tensor, t: Tensor, q: Tensor) -> Tensor:
        G = torch.stack([g[0], 2.0 * g[0], g[1], g[0] + g[1]])
        h = torch.stack([t[0], 2.0 * t[0], t[1], t[0] + t[1]])
        Q = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=D))
        return solve_qp(
            Q, torch.cat([q, torch.zeros(2, dtype=D)]), G=G, h=h, lower=torch.full((4,), -9.0).double()
        ).primal

    leaves = (normal(2, 4, seed=50), -2.0 * torch.ones(2, dtype=D), normal(2, seed=51))
    assert gradcheck(primal, tuple(leaf.requires_grad_() for leaf in leaves), check_forward_ad=True)


@every_family
def test_second_derivatives(family: Callable[[str], Family]) -> None:
    solve, leaves, _ = family("active")
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    assert gradgradcheck(lambda *tensors: solve(*tensors).primal, leaves, check_fwd_over_rev=True, atol=1e-4)


@every_family
def test_vmap_is_a_loop(family: Callable[[str], Family]) -> None:
    solve, leaves, _ = family("active")
    copies = tuple(torch.stack([leaf, 1.01 * leaf]) for leaf in leaves)
    found = torch.func.vmap(lambda *tensors: solve(*tensors).primal)(*copies)
    gradient = torch.func.vmap(torch.func.grad(lambda *tensors: solve(*tensors).primal.square().sum()))(*copies)
    for item in range(2):
        own = tuple(copy[item].clone().requires_grad_() for copy in copies)
        x = solve(*own).primal
        torch.testing.assert_close(found[item], x.detach())
        torch.testing.assert_close(gradient[item], torch.autograd.grad(x.square().sum(), own[0])[0])


def test_compiled() -> None:
    torch.compiler.reset()
    A, b = normal(2, 5, seed=1).requires_grad_(), normal(2, seed=2).requires_grad_()

    def loss(A: Tensor, b: Tensor) -> Tensor:
        return solve_qp(None, torch.zeros(5, dtype=D), A, b, smoothing=torch.zeros((), dtype=D)).primal[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(compiled(A, b), (A, b)), torch.autograd.grad(loss(A, b), (A, b)), strict=True
    ):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


@pytest.mark.parametrize("seed", range(20))
def test_linear_programs_against_highs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, p, m = 6, 2, 4
    inside = rng.random(n)
    A, G = rng.integers(-2, 3, size=(p, n)).astype(float), rng.integers(-2, 3, size=(m, n)).astype(float)
    b, h, q = A @ inside, G @ inside + rng.random(m), rng.integers(-2, 3, size=n).astype(float)
    judge = linprog(q, G, h, A, b, bounds=[(0.0, 2.0)] * n)
    tensors = [torch.tensor(array) for array in (q, A, b, G, h)]
    solution = solve_qp(None, *tensors, torch.zeros(n, dtype=D), torch.full((n,), 2.0, dtype=D))
    x = solution.primal.numpy()
    assert q @ x == pytest.approx(judge.fun, abs=1e-9)
    residuals = solution.residuals
    assert max(float(residuals.primal), float(residuals.dual), float(residuals.complementarity)) < 1e-9
    # No optimum is shorter: the least-norm point of the optimal face, by a quadratic program of its own.
    face = solve_qp(
        torch.eye(n, dtype=D), torch.zeros(n, dtype=D), torch.cat([tensors[1], tensors[0][None]]),
        torch.cat([tensors[2], torch.tensor([judge.fun], dtype=D)]), tensors[3], tensors[4],
        torch.zeros(n, dtype=D), torch.full((n,), 2.0, dtype=D),
    )  # fmt: skip
    np.testing.assert_allclose(x, face.primal.numpy(), atol=1e-7)


@pytest.mark.parametrize("batched", [False, True])
def test_zero_and_none_are_the_same(batched: bool) -> None:
    q = normal(3, 4, seed=5) if batched else normal(4, seed=5)
    box = {"lower": torch.zeros(4, dtype=D), "upper": torch.ones(4, dtype=D)}
    none = solve_qp(None, q, **box)
    for zero in (torch.zeros(4, dtype=D), torch.zeros(4, 4, dtype=D)):
        torch.testing.assert_close(solve_qp(zero, q, **box).primal, none.primal)
    torch.testing.assert_close(none.primal, (q < 0.0).double())
    module = nn.QP(**box)
    torch.testing.assert_close(module(q).primal, none.primal)


def test_a_module_with_constants_selects_in_every_variable() -> None:
    """The presolve may not take away what the equation defines: its norm counts."""
    A, b = torch.tensor([[1.0, -2.0, 0.0]], dtype=D), torch.tensor([5.0], dtype=D)
    q = torch.zeros(3, dtype=D)
    for Q in (torch.zeros(3, dtype=D), torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=D))):
        solution = nn.QP(A=A, b=b)(q, Q=Q)
        torch.testing.assert_close(solution.primal, torch.tensor([1.0, -2.0, 0.0], dtype=D))
        assert bool(solution.non_unique)


def test_negative_curvature_is_refused() -> None:
    Q = torch.diag(torch.tensor([1.0, -1.0], dtype=D))
    solution = solve_qp(Q, torch.ones(2, dtype=D), lower=-torch.ones(2, dtype=D), on_failure="nan")
    assert int(solution.status) == hsbackend.Status.NOT_STRICTLY_CONVEX
    assert bool(solution.primal.isnan().all())


def test_multipliers_have_derivatives_where_they_are_unique() -> None:
    """Of a linear program at a vertex and of a semidefinite program, in all data."""
    for family in (vertex, half_curved):
        solve, leaves, _ = family("active")

        def dual(*tensors: Tensor, solve: Callable[..., QPSolution] = solve) -> tuple[Tensor, ...]:
            found = solve(*tensors).multipliers
            return found.eq, found.ineq, found.lower, found.upper

        leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
        assert gradcheck(dual, leaves, check_forward_ad=True)


# ----------------------------------------------------------------------------------------------------------------------
# Smoothing
# ----------------------------------------------------------------------------------------------------------------------


def program() -> tuple[Tensor, Tensor]:
    """Costs of six items and the budget of two that are chosen."""
    return torch.tensor([1.0, 1.1, 1.2, 1.4, 0.9, 2.0], dtype=D), torch.full((1,), 2.0, dtype=D)


def choose_two(q: Tensor, smoothing: float | Tensor, centre: Tensor | None = None) -> Tensor:
    n = q.shape[-1]
    return solve_qp(
        None, q, torch.ones(1, n, dtype=D), torch.full((1,), 2.0, dtype=D), lower=torch.zeros(n, dtype=D),
        upper=torch.ones(n, dtype=D), smoothing=smoothing, smoothing_centre=centre,
    ).primal  # fmt: skip


def test_smoothing_is_the_regularised_problem() -> None:
    q, _ = program()
    centre = normal(6, seed=40)
    for Q in (None, torch.full((6,), 0.3, dtype=D), 0.3 * torch.eye(6, dtype=D)):
        found = solve_qp(Q, q, lower=torch.zeros(6, dtype=D), smoothing=0.7, smoothing_centre=centre)
        exact = (0.7 * centre - q).clamp(min=0.0) / (0.7 if Q is None else 1.0)
        torch.testing.assert_close(found.primal, exact)
        assert float(found.residuals.dual) < 1e-12
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=D)
    each = torch.stack([choose_two(q, float(weight)) for weight in weights])
    torch.testing.assert_close(choose_two(q, weights), each)
    torch.testing.assert_close(choose_two(q, 0.0), torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=D))
    module = nn.QP(lower=torch.zeros(6, dtype=D), smoothing=0.7, smoothing_centre=torch.nn.Parameter(centre))
    torch.testing.assert_close(module(q).primal, (centre - q / 0.7).clamp(min=0.0))
    assert [name for name, _ in module.named_parameters()] == ["smoothing_centre"]
    assert "smoothing=0.7" in repr(module)


def test_smoothing_has_exact_derivatives() -> None:
    q, _ = program()
    leaves = (q, torch.tensor([0.5, 1.0], dtype=D), normal(2, 6, seed=41))
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    assert gradcheck(choose_two, leaves, check_forward_ad=True)
    assert gradgradcheck(choose_two, leaves)
    dense = lambda Q, s: solve_qp(Q @ Q.mT, q, upper=torch.ones(6, dtype=D), smoothing=s).primal  # noqa: E731
    assert gradcheck(dense, (normal(6, 2, seed=42).requires_grad_(), leaves[1]), check_forward_ad=True)


def test_the_bias_of_smoothing() -> None:
    """O(s) where the constraints leave room, none at a vertex once s is small: and then no derivative either."""
    F, c = normal(4, 2, seed=3), normal(2, seed=4)
    exact = solve_qp(F @ F.mT, F @ c).primal
    bias = [float((solve_qp(F @ F.mT, F @ c, smoothing=s).primal - exact).norm()) for s in (1e-2, 1e-3, 1e-4)]
    assert 8.0 < bias[0] / bias[1] < 12.0
    assert 9.0 < bias[1] / bias[2] < 11.0
    q = program()[0].requires_grad_()
    for s, moved in ((0.0, False), (1e-3, False), (1.0, True)):
        x = choose_two(q, s)
        gradient = torch.autograd.grad(x[0], q)[0]
        assert bool(gradient.any()) == moved
        assert bool((x - choose_two(q, 0.0)).abs().max() > 1e-6) == moved


def test_a_choice_trains_with_smoothing_and_not_without() -> None:
    """Learn costs that make the program choose items 1 and 3."""
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0], dtype=D)
    for s, trained in ((0.0, False), (1.0, True)):
        q = program()[0].requires_grad_()
        optimizer = torch.optim.SGD([q], lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            (choose_two(q, s) - target).square().sum().backward()
            optimizer.step()
        assert torch.equal(choose_two(q.detach(), 0.0).round(), target) == trained
        assert torch.equal(q.detach(), program()[0]) != trained


def test_smoothing_is_checked() -> None:
    q, _ = program()
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a finite number that is not negative"):
            choose_two(q, wrong)
    with pytest.raises(ValueError, match="expected a finite number that is not negative"):
        nn.QP(smoothing=-1.0)
    with pytest.raises(ValueError, match=r"`smoothing_centre` has shape \(5,\), expected \(..., 6\)"):
        choose_two(q, 1.0, torch.zeros(5, dtype=D))
    with pytest.raises(TypeError, match=r"`smoothing` has dtype torch.int64"):
        choose_two(q, torch.ones((), dtype=torch.int64))
