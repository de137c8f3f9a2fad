"""The optimum of least norm turns with Q, A and G: gradients at optima that are not unique, against differences.

Every family keeps the dimension of its set of optima, whatever its leaves do: no cost, ``Q = F F'`` with q in its
range, or a linear cost made of the rows that hold the face of the optima. What is returned is in a mask; only that
counts in the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from generators import Case
from hsbackend.differentiate import Call, Layer, Output, SolveFunction
from hsbackend.plan import Plan
from hsbackend.program import IndexArray
from hsbackend.solvers.result import Options

D = torch.float64
#: Q, q, A, b of a batch; the rows are those of A, then those of G.
Data = tuple[Tensor, Tensor, Tensor, Tensor]
#: Number of equations, the data as a function of the leaves (each (B, ...)), and the leaves.
Family = tuple[int, Callable[..., Data], tuple[Tensor, ...]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def zeros(b: Tensor, *shape: int) -> Tensor:
    return b.new_zeros(len(b), *shape)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def equations() -> Family:
    """No cost: x = A^+ b."""

    def build(A: Tensor, b: Tensor) -> Data:
        return zeros(b, 5, 5), zeros(b, 5), A, b

    return 2, build, (normal(2, 2, 5, seed=1), normal(2, 2, seed=2))


def low_rank() -> Family:
    """Q = F F', q = F c + A'y, with an equation: the optima are F'x = -c, A x = b."""

    def build(F: Tensor, c: Tensor, A: Tensor, y: Tensor, b: Tensor) -> Data:
        return F @ F.mT, times(F, c) + times(A.mT, y), A, b

    leaves = normal(2, 6, 2, seed=3), normal(2, 2, seed=4), normal(2, 1, 6, seed=5)
    return 1, build, (*leaves, normal(2, 1, seed=6), normal(2, 1, seed=7))


def optimal_face() -> Family:
    """A linear program: the optima are A x = b, g'x = h with the first row of G; the second is inactive."""

    def build(A: Tensor, b: Tensor, G: Tensor, h: Tensor, y: Tensor, z: Tensor) -> Data:
        q = -times(A.mT, y) - G[:, 0] * (z.square() + 0.5)
        limits = torch.cat([h[:, :1], h[:, 1:] + 50.0], dim=1)
        return zeros(b, 6, 6), q, torch.cat([A, G], dim=1), torch.cat([b, limits], dim=1)

    leaves = normal(2, 2, 6, seed=8), normal(2, 2, seed=9), normal(2, 2, 6, seed=10), normal(2, 2, seed=11)
    return 2, build, (*leaves, normal(2, 2, seed=12), normal(2, 1, seed=13))


def pushed() -> Family:
    """No cost: the first row of G holds the point of least norm, which would like to be smaller."""

    def build(A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Data:
        return zeros(b, 5, 5), zeros(b, 5), torch.cat([A, G], dim=1), torch.cat([b, h], dim=1)

    A, G = 1.0 + 0.2 * normal(2, 1, 5, seed=14), 0.2 * normal(2, 2, 5, seed=15)
    G[:, 0, 1] -= 1.0
    return 1, build, (A, torch.ones(2, 1, dtype=D), G, torch.tensor([[-1.0, 9.0], [-2.0, 9.0]], dtype=D))


def curved_face() -> Family:
    """Curvature in some directions, an equation, and a row with a multiplier."""

    def build(F: Tensor, c: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, z: Tensor) -> Data:
        q = times(F, c) - G[:, 0] * (z.square() + 0.5)
        return F @ F.mT, q, torch.cat([A, G], dim=1), torch.cat([b, h], dim=1)

    leaves = normal(2, 6, 2, seed=16), normal(2, 2, seed=17), normal(2, 1, 6, seed=18), normal(2, 1, seed=19)
    return 1, build, (*leaves, normal(2, 1, 6, seed=20), normal(2, 1, seed=21), normal(2, 1, seed=22))


def unique() -> Family:
    """A vertex, as a control: nothing turns."""

    def build(A: Tensor, b: Tensor, q: Tensor) -> Data:
        rows = torch.cat([A, -torch.eye(4, dtype=D).expand(len(b), 4, 4)], dim=1)
        return zeros(b, 4, 4), q, rows, torch.cat([b, zeros(b, 4)], dim=1)

    return 1, build, (normal(2, 1, 4, seed=23).abs() + 0.5, torch.ones(2, 1, dtype=D), normal(2, 4, seed=24) + 3.0)


SEVERAL = (equations, low_rank, optimal_face, pushed, curved_face)
FAMILIES = (*SEVERAL, unique)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_mask = pytest.mark.parametrize("hidden", [(), (1,), (0, 3)], ids=["all", "without one", "without two"])


def make_layer(data: Data, equalities: int, hidden: Sequence[int] = ()) -> tuple[Layer, IndexArray]:
    """Return a layer with all data as parameters, and the variables it returns."""
    arrays = [part.detach().numpy() for part in data]
    batch, n, m = len(arrays[1]), arrays[1].shape[1], arrays[3].shape[1]
    case = Case(*arrays, equalities, np.zeros((batch, n)), np.zeros((batch, m)), np.zeros(batch, dtype=bool))  # type: ignore[arg-type]
    outputs = ~np.isin(np.arange(n), hidden)
    plan = Plan(replace(case.program(frozenset("QqAb")), outputs=outputs))
    assert plan.route.polyhedral
    columns = np.flatnonzero(outputs).astype(np.int64)
    return Layer(plan, [Output("primal", columns, (len(columns),))]), columns


def apply(
    layer: Layer, data: Sequence[Tensor], choice: str = "active", shared: Sequence[bool] = (False,) * 4
) -> Tensor:
    call = Call(Options(jacobian=choice), "raise")  # type: ignore[arg-type]
    batched = tuple(not each for each in shared)
    (x,) = SolveFunction.apply(layer, call, batched, D, *data)  # type: ignore[misc]
    return x


def non_unique(layer: Layer, data: Data) -> list[bool]:
    parameters = [part.detach().numpy().reshape(len(part), -1) for part in data]
    return layer.plan.solve(parameters, Options()).non_unique.tolist()


@every_family
@every_mask
@pytest.mark.parametrize("choice", ["active", "support"])
def test_against_differences(family: Callable[[], Family], hidden: tuple[int, ...], choice: str) -> None:
    """With respect to every entry of every leaf, items of a batch on their own."""
    equalities, build, leaves = family()
    data = build(*leaves)
    layer, _ = make_layer(data, equalities, hidden)
    assert non_unique(layer, data) == [family in SEVERAL] * 2
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    assert gradcheck(lambda *own: apply(layer, build(*own), choice), leaves, eps=1e-5, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_without_cost_it_is_the_derivative_of_the_pseudo_inverse(seed: int) -> None:
    """Hidden variables s in P x + S s = b take what they can: x = ((I - S S^+) P)^+ (I - S S^+) b."""
    A, b, g = normal(3, 3, 6, seed=seed), normal(3, 3, seed=seed + 10), normal(3, 5, seed=seed + 20)
    data = torch.zeros(3, 6, 6, dtype=D), torch.zeros(3, 6, dtype=D), A.requires_grad_(), b.requires_grad_()
    layer, _ = make_layer(data, 3, hidden=[5])  # type: ignore[arg-type]
    x = apply(layer, data)
    seen, unseen = A[:, :, :5], A[:, :, 5:]
    left = torch.eye(3, dtype=D) - unseen @ torch.linalg.pinv(unseen)
    exact = times(torch.linalg.pinv(left @ seen, rtol=1e-10), times(left, b))
    torch.testing.assert_close(x, exact, rtol=1e-9, atol=1e-10)
    for one, other in zip(torch.autograd.grad(x, (A, b), g), torch.autograd.grad(exact, (A, b), g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_dependent_rows(hidden: tuple[int, ...]) -> None:
    """An equation, twice it, another one and the sum of both, and they stay so."""

    def build(A: Tensor, b: Tensor) -> Data:
        rows = torch.stack([A[:, 0], 2.0 * A[:, 0], A[:, 1], A[:, 0] + A[:, 1]], dim=1)
        limits = torch.stack([b[:, 0], 2.0 * b[:, 0], b[:, 1], b[:, 0] + b[:, 1]], dim=1)
        return zeros(b, 5, 5), zeros(b, 5), rows, limits

    leaves = normal(2, 2, 5, seed=30), normal(2, 2, seed=31)
    layer, _ = make_layer(build(*leaves), 4, hidden)
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    assert gradcheck(lambda *own: apply(layer, build(*own)), leaves, eps=1e-5, atol=1e-7, rtol=1e-5)


@every_family
def test_an_item_alone_and_in_a_batch(family: Callable[[], Family]) -> None:
    """The same bits; beside items with one optimum and a failing one too."""
    equalities, build, leaves = family()
    data = build(*leaves)
    _, n = data[1].shape
    # An item with a strictly convex Hessian, and one with contradicting equations.
    failing = torch.zeros_like(data[2][:1]), torch.ones_like(data[3][:1])
    mixed = [
        torch.cat([part, other, last])
        for part, other, last in zip(
            data,
            (torch.eye(n, dtype=D)[None], data[1][:1], data[2][:1], data[3][:1]),
            (data[0][:1], data[1][:1], *failing),
            strict=True,
        )
    ]
    layer, _ = make_layer(data, equalities)
    g = normal(4, n, seed=40).numpy()
    g[3] = 0.0

    def gradients(items: slice) -> list[np.ndarray]:
        parameters = [np.ascontiguousarray(part[items].numpy().reshape(len(part[items]), -1)) for part in mixed]
        solution = layer.solve(parameters, Options(), "nan", None)
        found = layer.pullback(solution, [np.ascontiguousarray(g[items])], [True] * 4, [False] * 4)
        return [value for value in found if value is not None]

    together = gradients(slice(0, 4))
    assert len(together) == 4
    for item in range(4):
        for one, whole in zip(gradients(slice(item, item + 1)), together, strict=True):
            np.testing.assert_array_equal(one[0], whole[item])
    assert all((whole[3] == 0.0).all() for whole in together)


@every_family
def test_a_shared_parameter_gets_the_sum(family: Callable[[], Family]) -> None:
    equalities, build, leaves = family()
    data = [part[:1].expand(3, *part.shape[1:]).clone() for part in build(*leaves)]
    data[3] = data[3] + 0.01 * torch.tensor([0.0, 1.0, 2.0], dtype=D).unsqueeze(-1)
    layer, _ = make_layer((data[0], data[1], data[2], data[3]), equalities)
    g = normal(3, data[1].shape[1], seed=50)
    each = [part.clone().requires_grad_() for part in data]
    once = [*(part[0].clone().requires_grad_() for part in data[:3]), data[3].clone().requires_grad_()]
    single = torch.autograd.grad(apply(layer, each), each, g)
    shared = torch.autograd.grad(apply(layer, once, shared=(True, True, True, False)), once, g)
    for one, many in zip(shared[:3], single[:3], strict=True):
        torch.testing.assert_close(one, many.sum(0), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(shared[3], single[3], rtol=1e-11, atol=1e-12)


def test_only_what_turns_is_touched() -> None:
    """No turning without several optima, without a cotangent, or for items that failed."""
    equalities, build, leaves = equations()
    data = build(*leaves)
    layer, _ = make_layer(data, equalities)
    parameters = [part.numpy().reshape(2, -1).copy() for part in data]
    parameters[0][1] = np.eye(5).ravel()  # strictly convex
    solution = layer.solve(parameters, Options(), "raise", None)
    turning = layer.plan.turning(solution, np.ones((2, 5)))
    assert turning is not None
    assert turning.items.tolist() == [0]
    rows = data[2][0].numpy()
    np.testing.assert_allclose(turning.along[0], np.ones(5) - np.linalg.pinv(rows) @ rows @ np.ones(5), atol=1e-13)
    assert layer.plan.turning(solution, np.array([[0.0] * 5, [1.0] * 5])) is None
    with pytest.raises(ValueError, match="keep_face=False"):
        layer.plan.turning(layer.plan.solve(parameters, Options(keep_face=False)), np.ones((2, 5)))
