"""Outside judges: matfree and lineax (JAX). Where they are right we agree; where they differ, we say who is right, why.

The truth is the pseudo-inverse and its finite differences along changes that keep the rank.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsbackend import lstsq
from spectra import dense_solution, matrix, randn

jax = pytest.importorskip("jax", reason="the judges are JAX libraries (extra `test`)")
matfree_lstsq = pytest.importorskip("matfree.lstsq", reason="matfree is in the extra `test`")
lineax = pytest.importorskip("lineax", reason="lineax is in the extra `test`")
jnp = jax.numpy

# JAX compiles, or dispatches, for a minute: SciPy and the pseudo-inverse judge every change, these every night.
pytestmark = pytest.mark.nightly

FULL = {"atol": 0.0, "btol": 0.0}
RANKS = [(7, 4, 4), (4, 7, 4)]


@pytest.fixture(autouse=True)
def _double_precision():
    """jax works in float32 unless told otherwise; leave it as it was for whoever comes next."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    with jax.disable_jit():  # a few dozen small steps: compiling them takes a minute, doing them does not
        yield
    jax.config.update("jax_enable_x64", before)


def by_matfree(A, b, damp=0.0, x0=None):
    solve = matfree_lstsq.lsmr(atol=1e-14, btol=1e-14, ctol=0.0, maxiter=500)
    return solve(lambda y, A: A.T @ y, b, A, damp=damp, x0=x0)[0]


def by_lineax(A, b, y0=None):
    solver = lineax.LSMR(rtol=1e-14, atol=1e-14)
    options = {} if y0 is None else {"y0": y0}
    return lineax.linear_solve(lineax.MatrixLinearOperator(A), b, solver, options=options, throw=False).value


def judge(solve, A, b, g, **more):
    """Return a judge's x and its gradients of ``<g, x>`` for A and b."""

    def loss(A, b):
        x = solve(A, b, **more)
        return x @ jnp.asarray(g.numpy()), x

    given = jnp.asarray(A.numpy()), jnp.asarray(b.numpy())
    gradients, x = jax.grad(loss, argnums=(0, 1), has_aux=True)(*given)
    return [torch.from_numpy(np.array(value)) for value in (x, *gradients)]


def ours(A, b, g, **more):
    A, b = A.clone().requires_grad_(), b.clone().requires_grad_()
    x = lstsq(A, b, **more, **FULL).x
    return [x.detach(), *torch.autograd.grad(x, (A, b), g)]


def error(found, expected) -> float:
    return float((found - expected).norm() / (1.0 + expected.norm()))


@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize(("m", "n", "rank"), RANKS)
def test_matfree_agrees_on_full_rank(m, n, rank, damp) -> None:
    A, b, g = matrix(1, m, n, rank), randn(2, m), randn(3, n)
    for found, expected in zip(judge(by_matfree, A, b, g, damp=damp), ours(A, b, g, damp=damp), strict=True):
        assert error(found, expected) < 1e-9


@pytest.mark.parametrize(("m", "n", "rank"), [*RANKS, (7, 5, 3)])
def test_lineax_agrees_without_damping_which_it_has_not(m, n, rank) -> None:
    A, b, g = matrix(1, m, n, rank), randn(2, m), randn(3, n)
    for found, expected in zip(judge(by_lineax, A, b, g), ours(A, b, g), strict=True):
        assert error(found, expected) < 1e-9


def rank_keeping_slope(A, b, g, left, right) -> tuple[torch.Tensor, float]:
    """Return a direction ``(left A + A right)`` and the slope of ``<g, A^+ b>`` along ``e^(h left) A e^(h right)``."""

    def at(h):
        return dense_solution(torch.matrix_exp(h * left) @ A @ torch.matrix_exp(h * right), b) @ g

    h = 1e-4
    slope = (8.0 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12.0 * h)
    return left @ A + A @ right, float(slope)


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 3), (5, 7, 3)])
def test_matfree_has_not_the_whole_gradient_of_a_deficient_problem(m, n, rank) -> None:
    """It takes the rule of full rank from the shape: two of the three terms of ``<r, A w> + <y, A u> - <p, A x>``."""
    A, b, g = matrix(1, m, n, rank), randn(2, m), randn(3, n)
    direction, slope = rank_keeping_slope(A, b, g, randn(4, m, m), randn(5, n, n))
    found, theirs = ours(A, b, g), judge(by_matfree, A, b, g)
    assert error(theirs[0], found[0]) < 1e-9
    assert error(theirs[2], found[2]) < 1e-9
    assert abs(float((found[1] * direction).sum()) - slope) < 1e-6 * (1.0 + abs(slope))
    assert abs(float((theirs[1] * direction).sum()) - slope) > 1e-2


def test_matfree_solves_another_problem_when_warm_and_damped() -> None:
    """It shifts b by A x0 and not the damping, as SciPy does, whose code it follows."""
    A, b, x0 = matrix(1, 7, 4, 4), randn(2, 7), randn(3, 4)
    theirs = torch.from_numpy(np.array(by_matfree(*(jnp.asarray(t.numpy()) for t in (A, b)), 0.5, jnp.asarray(x0))))
    assert error(theirs, x0 + dense_solution(A, b - A @ x0, 0.5)) < 1e-9
    assert error(theirs, dense_solution(A, b, 0.5)) > 1e-2
    assert error(lstsq(A, b, damp=0.5, x0=x0, **FULL).x, dense_solution(A, b, 0.5)) < 1e-12


@pytest.mark.parametrize("solve", [by_matfree, by_lineax])
def test_a_start_outside_of_the_row_space_stays_in_the_solutions_of_others(solve) -> None:
    """Both promise the minimum norm; what x0 has in the null space of A stays in their result."""
    A, b, x0 = matrix(1, 4, 7, 4), randn(2, 4), randn(3, 7)
    start = {"x0": jnp.asarray(x0.numpy())} if solve is by_matfree else {"y0": jnp.asarray(x0.numpy())}
    theirs = torch.from_numpy(np.array(solve(*(jnp.asarray(t.numpy()) for t in (A, b)), **start)))
    shortest = dense_solution(A, b)
    assert error(A @ theirs, b) < 1e-9
    assert error(theirs, x0 + dense_solution(A, b - A @ x0)) < 1e-9
    assert theirs.norm() > 1.05 * shortest.norm()
    assert error(lstsq(A, b, x0=x0, **FULL).x, shortest) < 1e-12


def test_the_gradient_of_damping_in_matfree() -> None:
    """It documents this one as undefined, and returns a number, which is right here."""
    A, b, g, damp = matrix(1, 7, 4, 4), randn(2, 7), randn(3, 4), 0.5
    d = torch.tensor(damp, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(lstsq(A, b, damp=d, **FULL).x @ g, d)
    given = [jnp.asarray(tensor.numpy()) for tensor in (A, b, g)]
    theirs = float(jax.grad(lambda d: by_matfree(given[0], given[1], d) @ given[2])(damp))
    h = 1e-5
    slope = float((dense_solution(A, b, damp + h) - dense_solution(A, b, damp - h)) @ g) / (2 * h)
    assert abs(float(found) - slope) < 1e-8
    assert abs(theirs - slope) < 1e-8
