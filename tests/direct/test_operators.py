"""The two primitives of the families, with every operand at once, and their wrappings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import hsbackend
from hsbackend import operators

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

D = torch.float64
SHAPES = {"budget": (5,), "l1": (5,), "monotone": (5,), "transport": (2, 3)}
every_family = pytest.mark.parametrize("family", SHAPES)


def operands(family: str, batch: int = 2) -> dict[str, Tensor | None]:
    """Return a point and everything the family takes; the weight is shared."""
    generator = torch.Generator().manual_seed(3)
    shape = SHAPES[family]
    n = math.prod(shape)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, dtype=D, generator=generator)

    found: dict[str, Tensor | None] = dict.fromkeys(("point", "weight", "coefficients", "rhs", "lower", "upper"))
    found["point"] = 1.5 * torch.randn(batch, n, dtype=D, generator=generator)
    found["weight"] = uniform(0.5, 2.0, 1, n)
    if family == "budget":
        found["coefficients"] = uniform(0.5, 2.0, batch, n)
        found["rhs"] = torch.tensor([[-0.4, 0.3]], dtype=D)
        found["lower"], found["upper"] = uniform(-1.0, -0.5, 1, n), uniform(0.5, 1.0, batch, n)
    elif family == "l1":
        found["coefficients"], found["rhs"] = uniform(0.5, 2.0, 1, n), uniform(1.0, 2.0, batch, 1)
    elif family == "monotone":
        found["rhs"] = torch.tensor([[-0.5, 0.6], [-0.2, 0.4]], dtype=D)[:batch]
    else:
        r = uniform(1.0, 2.0, 1, shape[0])
        found["rhs"] = torch.cat([r, r.sum() / shape[1] * torch.ones(1, shape[1], dtype=D)], dim=1)
        found["point"] = 0.2 * found["point"]  # every entry free: the marginals are one component
    return found


def feasible(family: str, rhs: Tensor) -> Tensor:
    """Make right-hand sides that are moved one by one consistent: both kinds of marginals have the same sum."""
    if family != "transport":
        return rhs
    k = SHAPES[family][0]
    r, c = rhs[:, :k], rhs[:, k:]
    return torch.cat([r * (c.sum(1, keepdim=True) / r.sum(1, keepdim=True)), c], dim=1)


def solver(family: str, names: list[str], strict: bool = True, choice: str = "active"):
    """Return ``solve`` as a function of the named operands: primal and multipliers."""

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        all_of_them = dict.fromkeys(("point", "weight", "coefficients", "rhs", "lower", "upper"))
        all_of_them |= dict(zip(names, given, strict=True))
        all_of_them["rhs"] = feasible(family, all_of_them["rhs"])
        return operators.solve(family, *all_of_them.values(), SHAPES[family], choice, strict)[:2]

    return function


def arguments(family: str) -> tuple[list[str], tuple[Tensor, ...]]:
    """Return names and values of what is there; all require gradients."""
    given = {name: tensor for name, tensor in operands(family).items() if tensor is not None}
    return list(given), tuple(tensor.requires_grad_() for tensor in given.values())


@every_family
def test_derivatives_of_point_and_multipliers_in_every_operand(family: str) -> None:
    names, given = arguments(family)
    function = solver(family, names)
    check = gradcheck(function, given, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False)
    assert check
    assert gradgradcheck(function, given, check_fwd_over_rev=True, check_rev_over_rev=True, atol=1e-4)


@every_family
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
def test_kkt_is_differentiable_self_adjoint_and_linear(family: str, sides: tuple[bool, bool]) -> None:
    given = operands(family)
    x, nu, face, _ = operators.solve(family, *given.values(), SHAPES[family], "active", True)
    generator = torch.Generator().manual_seed(4)
    shapes = (x.shape, nu.shape, x.shape)
    present = (True, *sides)

    def right() -> list[Tensor | None]:
        return [
            torch.randn(s, dtype=D, generator=generator) if p else None for s, p in zip(shapes, present, strict=True)
        ]

    weight, coefficients = given["weight"], given["coefficients"]

    def function(weight: Tensor, coefficients: Tensor | None, *sides: Tensor | None) -> tuple[Tensor, ...]:
        return operators.kkt(family, face, x, weight, coefficients, *sides, SHAPES[family])

    one, two = right(), right()
    first, second = function(weight, coefficients, *one), function(weight, coefficients, *two)
    # Entries of inactive rows and free coordinates are ignored, and zero in what comes out.
    forward = sum(((a * b).sum() for a, b in zip(first, two, strict=True) if b is not None), torch.zeros((), dtype=D))
    backward = sum(((a * b).sum() for a, b in zip(second, one, strict=True) if b is not None), torch.zeros((), dtype=D))
    torch.testing.assert_close(forward, backward)
    both = function(weight, coefficients, *(None if a is None else a - 2.0 * b for a, b in zip(one, two, strict=True)))
    for a, b, c in zip(both, first, second, strict=True):
        torch.testing.assert_close(a, b - 2.0 * c)

    leaves = [weight, coefficients, *one]
    inputs = tuple(leaf.clone().requires_grad_() for leaf in leaves if leaf is not None)

    def of_leaves(*values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values)
        return function(*(None if leaf is None else next(rest) for leaf in leaves))

    assert gradcheck(
        of_leaves, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False
    )
    assert gradgradcheck(of_leaves, inputs, check_fwd_over_rev=True, atol=1e-4)


@every_family
def test_only_what_is_asked_for_is_computed(family: str) -> None:
    given = operands(family)
    for name, tensor in given.items():
        if tensor is None:
            continue
        alone = given | {name: tensor.clone().requires_grad_()}
        x, nu, face, status = operators.solve(family, *alone.values(), SHAPES[family], "active", True)
        assert x.requires_grad
        assert nu.requires_grad
        assert not face.requires_grad
        assert not status.requires_grad
        leaf = alone[name]
        assert leaf is not None
        (gradient,) = torch.autograd.grad(x.sum() + nu.sum(), leaf)
        assert gradient.shape == leaf.shape
    x, *_ = operators.solve(family, *given.values(), SHAPES[family], "active", True)
    assert x.grad_fn is None


@every_family
def test_shared_operands_are_expanded_ones(family: str) -> None:
    """A (1, n) operand is the same as its copies, and its gradient is their sum."""
    names, given = arguments(family)
    function = solver(family, names)
    copies = tuple(tensor.detach().expand(2, -1).clone().requires_grad_() for tensor in given)
    cotangent = torch.randn(2, math.prod(SHAPES[family]), dtype=D, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(function(*given)[0], given, cotangent),
        torch.autograd.grad(function(*copies)[0], copies, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other.sum(0, keepdim=True) if one.shape != other.shape else other)


@every_family
@pytest.mark.parametrize("mapped", [(0,), (1,), (3,), (0, 1, 3)])
def test_vmap_folds_into_the_batch(family: str, mapped: tuple[int, ...]) -> None:
    names, given = arguments(family)
    positions = [index for index, name in enumerate(("point", "weight", "coefficients", "rhs")) if name in names]
    function = solver(family, names)
    dims: list[int | None] = [None] * len(given)
    stacked = [tensor.detach() for tensor in given]
    for place, position in enumerate(positions):
        if position in mapped:
            dims[place] = 1
            stacked[place] = torch.stack([stacked[place] * scale for scale in (1.0, 1.1, 1.2)], dim=1)
    found = torch.func.vmap(function, in_dims=tuple(dims))(*stacked)
    for index in range(3):
        one = function(*(t if dim is None else t[:, index] for t, dim in zip(stacked, dims, strict=True)))
        for whole, single in zip(found, one, strict=True):
            torch.testing.assert_close(whole[index], single)


def test_vmap_of_a_single_item_keeps_shared_operands_shared() -> None:
    """The point is mapped, the rest is (1, n): one call of the kernel, without copies of what is shared."""
    given = operands("budget", batch=1)
    seen: list[tuple[int, ...]] = []
    family = operators._family("budget")

    class Spy:
        kkt = staticmethod(family.kkt)

        @staticmethod
        def solve(point: np.ndarray, weight: np.ndarray, *rest: object) -> object:
            seen.append((len(point), len(weight)))
            return family.solve(point, weight, *rest)

    operators._modules["budget"] = Spy  # type: ignore[assignment]
    try:
        points = torch.randn(4, 1, 5, dtype=D)
        names = [name for name, tensor in given.items() if tensor is not None and name != "point"]
        rest = [given[name] for name in names]
        torch.func.vmap(lambda point: solver("budget", ["point", *names])(point, *rest)[0])(points)
    finally:
        operators._modules["budget"] = family
    assert seen == [(4, 1)]


@every_family
def test_nested_transforms(family: str) -> None:
    names, given = arguments(family)
    given = tuple(tensor.detach() for tensor in given)
    function = solver(family, names)

    def scalar(*inputs: Tensor) -> Tensor:
        x, nu = function(*inputs)
        return (x**3).sum() + (nu**3).sum()

    every = tuple(range(len(given)))
    wanted = torch.autograd.functional.hessian(scalar, given)
    hessians = [
        torch.func.hessian(scalar, every)(*given),
        torch.func.jacrev(torch.func.jacrev(scalar, every), every)(*given),
        torch.func.jacrev(torch.func.jacfwd(scalar, every), every)(*given),
        torch.func.jacfwd(torch.func.jacfwd(scalar, every), every)(*given),
    ]
    for found in hessians:
        for row, wanted_row in zip(found, wanted, strict=True):
            for block, wanted_block in zip(row, wanted_row, strict=True):
                torch.testing.assert_close(block, wanted_block, rtol=1e-8, atol=1e-8)


@every_family
def test_forward_mode_over_a_plain_backward_pass(family: str) -> None:
    """The tangent of a gradient, with the graph thrown away: the bare kernel would lose it."""
    names, given = arguments(family)
    function = solver(family, names)
    direction = torch.randn_like(given[0])

    def gradient(point: Tensor) -> Tensor:
        point = point if point.requires_grad else point.detach().requires_grad_()
        return torch.autograd.grad((function(point, *given[1:])[0] ** 3).sum(), point)[0]

    with forward_ad.dual_level():
        leaf = given[0].detach().clone().requires_grad_()
        dual = forward_ad.make_dual(leaf, direction)
        found = torch.autograd.grad((function(dual, *given[1:])[0] ** 3).sum(), leaf)[0]
        tangent = forward_ad.unpack_dual(found).tangent
    _, wanted = torch.func.jvp(
        torch.func.grad(lambda point: (function(point, *given[1:])[0] ** 3).sum()), (given[0].detach(),), (direction,)
    )
    torch.testing.assert_close(tangent, wanted)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_contracts(family: str, dtype: torch.dtype) -> None:
    """Schema, fake tensors, autograd registration, tracing with dynamic shapes."""
    given = {
        name: None if tensor is None else tensor.to(dtype).requires_grad_() for name, tensor in operands(family).items()
    }
    shape = SHAPES[family]
    torch.library.opcheck(operators._solve_op, (family, *given.values(), shape, "active"))
    x, nu, face, _ = operators.solve(family, *given.values(), shape, "active", True)
    sides = [torch.randn_like(value).detach().requires_grad_() for value in (x, nu, x)]
    inputs = (family, face, x.detach(), given["weight"], given["coefficients"], *sides, shape)
    torch.library.opcheck(operators._kkt_op, inputs)


@every_family
def test_fake_outputs_are_like_real_ones(family: str) -> None:
    given = operands(family)
    outputs = operators.solve(family, *given.values(), SHAPES[family], "support", True)
    layout = operators.LAYOUTS[family]
    assert outputs[1].shape == (2, layout.rows(SHAPES[family]))
    assert outputs[2].shape == (2, layout.face_width(SHAPES[family]))
    assert outputs[2].dtype == layout.face_dtype
    assert outputs[3].dtype == torch.int8


@every_family
def test_failed_items(family: str) -> None:
    names, given = arguments(family)
    given = tuple(tensor.detach().expand(2, -1).clone().requires_grad_() for tensor in given)
    with torch.no_grad():
        given[0][1, 0] = math.nan
        given[1][1, 1] = math.nan  # the weight
    with pytest.raises(hsbackend.SolveError, match="1 of 2 items failed: item 1") as raised:
        solver(family, names)(*given)
    assert np.array_equal(raised.value.status, [0, hsbackend.Status.INVALID_INPUT])
    x, nu = solver(family, names, strict=False)(*given)
    assert bool(x[1].isnan().all())
    assert bool(nu[1].isnan().all())
    for gradient in torch.autograd.grad(x[0].sum(), given, retain_graph=True):
        assert bool((gradient[1] == 0.0).all())
        assert bool(gradient.isfinite().all())
    for gradient in torch.autograd.grad(x.sum(), given, create_graph=True):
        assert bool(gradient[1].isnan().any())
        assert bool(gradient[0].isfinite().all())


@every_family
def test_empty_batch(family: str) -> None:
    names, given = arguments(family)
    given = tuple(
        tensor.detach()[:0].requires_grad_() if name == "point" or len(tensor) == 2 else tensor
        for name, tensor in zip(names, given, strict=True)
    )
    x, nu = solver(family, names)(*given)
    assert x.shape == (0, math.prod(SHAPES[family]))
    for tensor, gradient in zip(given, torch.autograd.grad(x.sum() + nu.sum(), given), strict=True):
        assert gradient.shape == tensor.shape
        assert float(gradient.abs().sum()) == 0.0
