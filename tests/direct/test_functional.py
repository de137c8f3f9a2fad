"""Functions of an axis: the same as moving the axis to the end and projecting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hsbackend
from hsbackend import Polyhedron, functional, project

D = torch.float64
GENERATOR = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=GENERATOR)


N = 3
A = _normal(N)
ROWS, RIGHT = _normal(2, N), _normal(2)
UPPER = torch.rand(N, dtype=D, generator=GENERATOR) + 0.2
#: Name: the function with its arguments, and the set it stands for.
VECTORS: dict[str, tuple[Callable[..., Tensor], Polyhedron]] = {
    "simplex": (functional.simplex, Polyhedron.simplex(N)),
    "simplex_radius": (lambda x, **k: functional.simplex(x, torch.tensor(2.0), **k), Polyhedron.simplex(N, 2.0)),
    "capped_simplex": (
        lambda x, **k: functional.capped_simplex(x, 1.0, 0.5, **k), Polyhedron.capped_simplex(N, 1.0, 0.5)
    ),
    "capped_by": (
        lambda x, **k: functional.capped_simplex(x, 0.5, UPPER, **k), Polyhedron.capped_simplex(N, 0.5, UPPER)
    ),
    "budget": (
        lambda x, **k: functional.budget(x, A.abs(), at_most=0.3, lower=-1.0, upper=UPPER, **k),
        Polyhedron.budget(N, A.abs(), at_most=0.3, lower=-1.0, upper=UPPER),
    ),
    "l1_ball": (functional.l1_ball, Polyhedron.l1_ball(N)),
    "l1_ball_radius": (lambda x, **k: functional.l1_ball(x, torch.tensor(0.3), **k), Polyhedron.l1_ball(N, 0.3)),
    "weighted_l1_ball": (lambda x, **k: functional.weighted_l1_ball(x, UPPER, **k), Polyhedron.weighted_l1_ball(UPPER)),
    "linf_ball": (lambda x, **k: functional.linf_ball(x, 0.4, **k), Polyhedron.linf_ball(N, 0.4)),
    "linf_ball_radius": (lambda x, **k: functional.linf_ball(x, torch.tensor(0.4), **k), Polyhedron.linf_ball(N, 0.4)),
    "box": (lambda x, **k: functional.box(x, -0.5, UPPER, **k), Polyhedron.box(-0.5, UPPER)),
    "box_below": (lambda x, **k: functional.box(x, 0.0, None, **k), Polyhedron.box(0.0, None, N)),
    "halfspace": (lambda x, **k: functional.halfspace(x, A, 0.1, **k), Polyhedron.halfspace(A, 0.1)),
    "hyperplane": (lambda x, **k: functional.hyperplane(x, A, 0.1, **k), Polyhedron.hyperplane(A, 0.1)),
    "affine": (lambda x, **k: functional.affine(x, ROWS, RIGHT, **k), Polyhedron.affine(ROWS, RIGHT)),
    "monotone": (functional.monotone, Polyhedron.monotone(N)),
    "decreasing": (
        lambda x, **k: functional.monotone(x, False, upper=0.3, **k), Polyhedron.monotone(N, False, upper=0.3)
    ),
}  # fmt: skip
MATRICES: dict[str, tuple[Callable[..., Tensor], Polyhedron]] = {
    "birkhoff": (functional.birkhoff, Polyhedron.birkhoff(N)),
    "transport": (
        lambda x, **k: functional.transport(x, UPPER, UPPER.flip(0), **k), Polyhedron.transport(UPPER, UPPER.flip(0))
    ),
}  # fmt: skip
#: Axes by how x is laid out: shape of x, dim.
LAYOUTS = [((N,), 0), ((N,), -1), ((4, N), -1), ((4, N), 1), ((N, 4), 0), ((N, 4), -2), ((2, N, 5), 1), ((2, N, 5), -2)]


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
@pytest.mark.parametrize("name", VECTORS)
def test_any_axis(name: str, shape: tuple[int, ...], dim: int) -> None:
    function, polyhedron = VECTORS[name]
    x = _normal(*shape).requires_grad_()
    y = function(x, dim=dim)
    assert y.shape == x.shape
    wanted = project(x.movedim(dim, -1), polyhedron).movedim(-1, dim)
    torch.testing.assert_close(y, wanted)
    cotangent = _normal(*shape)
    (one,), (other,) = (torch.autograd.grad(z, x, cotangent) for z in (y, wanted))
    torch.testing.assert_close(one, other)
    if dim in (-1, len(shape) - 1):
        torch.testing.assert_close(function(x), y)


@pytest.mark.parametrize("name", VECTORS)
def test_strides_do_not_matter(name: str) -> None:
    function, _ = VECTORS[name]
    x = _normal(6, 2 * N, 4)[::2, ::2].transpose(0, 2)
    assert not x.is_contiguous()
    torch.testing.assert_close(function(x, dim=1), function(x.contiguous(), dim=1))


@pytest.mark.parametrize(
    ("shape", "dim"), [((N, N), (-2, -1)), ((2, N, N), (1, 2)), ((N, 2, N), (0, -1)), ((N, N, 2), (1, 0))]
)
@pytest.mark.parametrize("name", MATRICES)
def test_any_pair_of_axes(name: str, shape: tuple[int, ...], dim: tuple[int, int]) -> None:
    function, polyhedron = MATRICES[name]
    x = _normal(*shape)
    y = function(x, dim=dim)
    torch.testing.assert_close(y, project(x.movedim(dim, (-2, -1)), polyhedron).movedim((-2, -1), dim))
    weight = torch.rand(shape, dtype=D, generator=GENERATOR) + 0.5
    weighted = function(x, dim=dim, weight=weight)
    wanted = project(x.movedim(dim, (-2, -1)), polyhedron, weight=weight.movedim(dim, (-2, -1)))
    torch.testing.assert_close(weighted.movedim(dim, (-2, -1)), wanted)


def test_numbers_per_item_broadcast_against_the_other_axes() -> None:
    x = _normal(2, N, 5)
    radius = torch.rand(2, 5, dtype=D, generator=GENERATOR) + 0.5
    torch.testing.assert_close(functional.simplex(x, radius, dim=1).sum(1), radius)
    torch.testing.assert_close(functional.simplex(x, radius[:, :1], dim=1).sum(1), radius[:, :1].expand(2, 5))


def test_numbers_per_coordinate_are_laid_out_like_x() -> None:
    x = _normal(2, N, 5)
    upper = torch.rand(2, N, 5, dtype=D, generator=GENERATOR)
    torch.testing.assert_close(functional.box(x, None, upper, dim=1), torch.minimum(x, upper))
    weight = torch.rand(2, N, 5, dtype=D, generator=GENERATOR) + 0.5
    wanted = project(x.movedim(1, -1), Polyhedron.simplex(N), weight=weight.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(functional.simplex(x, dim=1, weight=weight), wanted)
    torch.testing.assert_close(
        functional.simplex(x, dim=1, weight=weight[0, :, 0]),
        project(x.movedim(1, -1), Polyhedron.simplex(N), weight=weight[0, :, 0]).movedim(-1, 1),
    )


def test_options_are_passed_on() -> None:
    x = torch.tensor([[1.0, 0.0], [float("nan"), 0.0]], dtype=D)
    with pytest.raises(hsbackend.SolveError, match="item 1"):
        functional.simplex(x)
    y = functional.simplex(x, on_failure="nan")
    assert bool(y[1].isnan().all())
    corner = x[:1].clone().requires_grad_()
    gradients = {}
    for choice in ("active", "support"):
        (gradients[choice],) = torch.autograd.grad(functional.simplex(corner, jacobian=choice)[0, 0], corner)
    assert gradients["active"].tolist() == [[0.0, 0.0]]
    assert gradients["support"].tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("name", ["simplex", "capped_simplex", "linf_ball", "monotone", "budget"])
def test_compiled_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    function, _ = VECTORS[name]
    x = _normal(4, N, 2).requires_grad_()
    gradients = []
    for call in (
        torch.compile(lambda x: function(x, dim=1), fullgraph=True, backend="aot_eager"),
        lambda x: function(x, dim=1),
    ):
        gradients.append(torch.autograd.grad((call(x) ** 2).sum(), x)[0])
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()


def test_transforms() -> None:
    x = _normal(4, N)
    found = torch.func.vmap(torch.func.jacrev(functional.simplex))(x)
    torch.testing.assert_close(found, hsbackend.hs_jacobian(x, Polyhedron.simplex(N)))


def test_messages() -> None:
    with pytest.raises(TypeError, match="`v` has dtype torch"):
        functional.simplex(torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        functional.simplex(_normal(3), dim=2)
    with pytest.raises(ValueError, match=r"`v` has shape \(3, 4\), expected \(..., 3, 3\)"):
        functional.birkhoff(_normal(3, 4))
    with pytest.raises(ValueError, match="a budget needs"):
        functional.budget(_normal(3))
