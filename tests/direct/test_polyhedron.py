"""Projections through the public function: values, derivatives of every kind, batches, dtypes, failures."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hsbackend
from direct_cases import CASES, NO_ROWS, Case, N
from hsbackend import Polyhedron, hs_jacobian, hs_jvp, hs_vjp, project

# torch itself scripts its forward-mode formulas, and inductor loads what is scripted.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

D = torch.float64
WEIGHTED = [(name, weighted) for name, case in CASES.items() for weighted in (False, case.weight_matters)]
every_case = pytest.mark.parametrize("name", CASES)
every_metric = pytest.mark.parametrize(("name", "weighted"), dict.fromkeys(WEIGHTED))


def function_of(case: Case, weighted: bool):
    """Return the projection as a function of everything, and its arguments, which require gradients."""

    def function(v: Tensor, *rest: Tensor) -> Tensor:
        weight, tensors = (rest[0], rest[1:]) if weighted else (None, rest)
        return project(v, case.make(*tensors), weight=weight)

    given = [case.point(2), *([case.weight()] if weighted else []), *case.tensors]
    return function, tuple(tensor.clone().requires_grad_() for tensor in given)


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@every_metric
def test_a_named_set_is_what_its_rows_say(name: str, weighted: bool) -> None:
    case = CASES[name]
    polyhedron = case.polyhedron()
    if name in NO_ROWS:
        with pytest.raises(hsbackend.UnsupportedProblemError, match="2\\^5 rows"):
            polyhedron.general()
        return
    weight = case.weight() if weighted else None
    v = case.point(7, 2)
    wanted = project(
        v.flatten(2), Polyhedron(*polyhedron.general()), weight=None if weight is None else weight.flatten()
    )
    torch.testing.assert_close(project(v, polyhedron, weight=weight).flatten(2), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NO_ROWS)
def test_l1_ball_is_its_lifted_form(name: str, weighted: bool) -> None:
    """x = p - n with p, n >= 0 and w'(p + n) <= r: optimality of the projection on the ball, checked from scratch."""
    case = CASES[name]
    w = torch.ones(N, dtype=D) if name == "l1_ball" else case.tensors[0]
    radius = case.tensors[-1]
    h = case.weight() if weighted else torch.ones(N, dtype=D)
    v = case.point(7, 2)
    x = project(v, case.polyhedron(), weight=h if weighted else None)
    assert bool(((w * x.abs()).sum(-1) <= radius + 1e-12).all())
    # h (v - x) = tau w s with s in the subdifferential of |x|, tau >= 0 and zero inside.
    pull = h * (v - x)
    tau = (pull.abs() / w).amax(-1, keepdim=True)
    torch.testing.assert_close(torch.where(x != 0.0, pull, 0.0), torch.where(x != 0.0, tau * w * x.sign(), 0.0))
    inside = (w * x.abs()).sum(-1) < radius - 1e-9
    assert bool((tau[inside] == 0.0).all())


@every_case
def test_feasible_and_idempotent_and_nonexpansive(name: str) -> None:
    case = CASES[name]
    polyhedron = case.polyhedron()
    v, other = case.point(20, 2), case.point(20, 2, seed=1)
    x, y = project(v, polyhedron), project(other, polyhedron)
    torch.testing.assert_close(project(x, polyhedron), x, rtol=0, atol=1e-10)
    axes = tuple(range(2, v.dim()))
    assert bool(((x - y).norm(dim=axes) <= (v - other).norm(dim=axes) * (1.0 + 1e-12)).all())
    assert bool((((v - x) * (y - x)).sum(axes) <= 1e-9).all())  # variational inequality against a feasible point


def test_known_answers() -> None:
    v = torch.tensor([0.5, -1.0, 2.0], dtype=D)
    a = torch.tensor([1.0, 1.0, 0.0], dtype=D)
    expected = {
        Polyhedron.simplex(3): [0.0, 0.0, 1.0],
        Polyhedron.box(0.0, 1.0, 3): [0.5, 0.0, 1.0],
        Polyhedron.linf_ball(3, 0.75): [0.5, -0.75, 0.75],
        Polyhedron.halfspace(a, -1.5): [0.0, -1.5, 2.0],
        Polyhedron.hyperplane(a, 1.0): [1.25, -0.25, 2.0],
        Polyhedron.l1_ball(3, 1.0): [0.0, 0.0, 1.0],
        Polyhedron.monotone(3): [-0.25, -0.25, 2.0],
        Polyhedron.order(3, [(2, 0)]): [1.25, -1.0, 1.25],
        Polyhedron.affine(a[None], torch.ones(1, dtype=D)): [1.25, -0.25, 2.0],
    }
    for polyhedron, values in expected.items():
        torch.testing.assert_close(project(v, polyhedron), torch.tensor(values, dtype=D), msg=repr(polyhedron))


@pytest.mark.parametrize("edges", [[(0, 1), (1, 2), (0, 2)], [(0, 1), (1, 0)], [(2, 0), (2, 1)], [(0, 2), (1, 2)]])
def test_orders_that_are_not_chains_go_to_the_general_solver(edges: list[tuple[int, int]]) -> None:
    polyhedron = Polyhedron.order(4, edges)
    v = torch.randn(10, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    x = project(v, polyhedron)
    for i, j in edges:
        assert bool((x[:, i] <= x[:, j] + 1e-12).all())
    torch.testing.assert_close(x[:, 3], v[:, 3])
    assert "chains" not in repr(polyhedron)


def test_dependent_equations_are_fine_and_contradicting_ones_are_not() -> None:
    rows = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]], dtype=D)
    v = torch.zeros(3, dtype=D)
    x = project(v, Polyhedron.affine(rows, torch.tensor([1.0, 2.0], dtype=D)))
    torch.testing.assert_close(x, torch.tensor([0.5, 0.5, 0.0], dtype=D))
    with pytest.raises(hsbackend.SolveError, match="infeasible"):
        project(v, Polyhedron.affine(rows, torch.tensor([1.0, 1.0], dtype=D)))


def test_infinite_limits_are_none() -> None:
    v = torch.tensor([3.0, -4.0], dtype=D)
    limits = torch.tensor([math.inf, 1.0], dtype=D)
    torch.testing.assert_close(project(v, Polyhedron.box(-limits, limits)), torch.tensor([3.0, -1.0], dtype=D))
    rows = torch.eye(2, dtype=D)
    torch.testing.assert_close(project(v, Polyhedron(G=rows, h=limits)), v)
    torch.testing.assert_close(project(v, Polyhedron.halfspace(rows[0], math.inf)), v)


def test_masked_entries() -> None:
    masked = torch.tensor([[0.2, -math.inf, 1.0]], dtype=D)
    x = project(masked, Polyhedron.simplex(3))
    torch.testing.assert_close(x[:, [0, 2]], project(masked[:, [0, 2]], Polyhedron.simplex(2)))
    assert float(x[0, 1]) == 0.0
    v = masked.clone().requires_grad_()
    weight = torch.ones(3, dtype=D, requires_grad=True)
    project(v, Polyhedron.simplex(3), weight=weight)[0, 0].backward()
    torch.testing.assert_close(v.grad, torch.tensor([[0.5, 0.0, -0.5]], dtype=D))
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------


@every_metric
def test_first_derivatives(name: str, weighted: bool) -> None:
    function, given = function_of(CASES[name], weighted)
    # The old vmap behind is_grads_batched is tested in test_operators.
    assert gradcheck(function, given, check_forward_ad=True)


@every_metric
def test_second_derivatives(name: str, weighted: bool) -> None:
    function, given = function_of(CASES[name], weighted)
    assert gradgradcheck(function, given, check_fwd_over_rev=True, atol=1e-4)


@every_metric
def test_transforms_agree(name: str, weighted: bool) -> None:
    function, given = function_of(CASES[name], weighted)
    given = tuple(tensor.detach() for tensor in given)
    every = tuple(range(len(given)))
    wanted = torch.autograd.functional.jacobian(function, given)
    for found in (torch.func.jacrev(function, every)(*given), torch.func.jacfwd(function, every)(*given)):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    tangents = tuple(torch.ones_like(tensor) for tensor in given)
    _, pushed = torch.func.jvp(function, given, tangents)
    _, pull = torch.func.vjp(function, *given)
    cotangent = CASES[name].point(2, seed=5)
    pulled = sum((g * t).sum() for g, t in zip(pull(cotangent), tangents, strict=True))
    torch.testing.assert_close((pushed * cotangent).sum(), pulled, rtol=1e-9, atol=1e-9)


@every_metric
def test_nested_transforms_agree(name: str, weighted: bool) -> None:
    """Forward over forward, too: torch drops the outer tangent of a Function unless it is asked not to."""
    function, given = function_of(CASES[name], weighted)
    given = tuple(tensor.detach() for tensor in given)
    every = tuple(range(len(given)))

    def scalar(*inputs: Tensor) -> Tensor:
        return (function(*inputs) ** 3).sum()

    wanted = torch.autograd.functional.hessian(scalar, given)
    jacrev, jacfwd = torch.func.jacrev, torch.func.jacfwd
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd), (jacrev, jacrev)):
        found = outer(inner(scalar, every), every)(*given)
        for row, wanted_row in zip(found, wanted, strict=True):
            for one, other in zip(row, wanted_row, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@every_case
def test_vmap_is_a_loop(name: str) -> None:
    """Over the point, over everything, and of a gradient."""
    case = CASES[name]
    function, given = function_of(case, False)
    given = tuple(tensor.detach() for tensor in given)
    points = torch.stack([case.point(2, seed=seed) for seed in range(3)], dim=1)
    dims = (1, *[None] * (len(given) - 1))
    found = torch.func.vmap(function, in_dims=dims)(points, *given[1:])
    loop = torch.stack([function(points[:, i], *given[1:]) for i in range(3)])
    torch.testing.assert_close(found, loop)

    scales = torch.tensor([1.0, 1.02, 1.05], dtype=D)
    found = torch.func.vmap(lambda s: function(given[0], *(s * tensor for tensor in given[1:])))(scales)
    loop = torch.stack([function(given[0], *(s * tensor for tensor in given[1:])) for s in scales])
    torch.testing.assert_close(found, loop)

    every = tuple(range(len(given)))
    cotangent = case.point(2, seed=9)
    gradient = torch.func.grad(lambda *inputs: (cotangent * function(*inputs)).sum(), every)
    mapped = torch.func.vmap(gradient, in_dims=dims)(points, *given[1:])
    looped = [gradient(points[:, i], *given[1:]) for i in range(3)]
    for index, one in enumerate(mapped):
        torch.testing.assert_close(one, torch.stack([gradients[index] for gradients in looped]))


@every_metric
def test_hs_jacobian_is_a_projector(name: str, weighted: bool) -> None:
    case = CASES[name]
    polyhedron, v = case.polyhedron(), case.point(3, 2)
    weight = case.weight() if weighted else None
    found = hs_jacobian(v, polyhedron, weight=weight)
    n = math.prod(case.event)
    assert found.shape == (3, 2, n, n)
    torch.testing.assert_close(found @ found, found, rtol=0, atol=1e-9)
    scaled = found if weight is None else weight.flatten().unsqueeze(-1) * found
    torch.testing.assert_close(scaled.mT, scaled, rtol=0, atol=1e-9)
    g = case.point(3, 2, seed=3)
    flat = g.flatten(2).unsqueeze(-1)
    torch.testing.assert_close(hs_vjp(v, polyhedron, g, weight=weight).flatten(2), (found.mT @ flat).squeeze(-1))
    torch.testing.assert_close(hs_jvp(v, polyhedron, g, weight=weight).flatten(2), (found @ flat).squeeze(-1))
    # It annihilates the active normals: moving along the projection's own step changes nothing.
    x = project(v, polyhedron, weight=weight)
    stay = (found @ (v - x).flatten(2).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(stay, torch.zeros_like(stay), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("polyhedron", "v", "active", "support"),
    [
        (Polyhedron.box(0.0, 1.0, 2), [0.0, 0.5], [[0, 0], [0, 1]], [[1, 0], [0, 1]]),
        (Polyhedron.linf_ball(2), [1.0, 0.5], [[0, 0], [0, 1]], [[1, 0], [0, 1]]),
        (Polyhedron.halfspace(torch.tensor([1.0, 0.0]), 1.0), [1.0, 0.0], [[0, 0], [0, 1]], [[1, 0], [0, 1]]),
        (Polyhedron.simplex(2), [1.0, 0.0], [[0, 0], [0, 0]], [[0.5, -0.5], [-0.5, 0.5]]),
        (Polyhedron.l1_ball(2), [1.0, 0.0], [[0, 0], [0, 0]], [[1, 0], [0, 1]]),
        (Polyhedron.monotone(2), [1.0, 1.0], [[0.5, 0.5], [0.5, 0.5]], [[1, 0], [0, 1]]),
        (Polyhedron(lower=torch.zeros(2)), [0.0, 1.0], [[0, 0], [0, 1]], [[1, 0], [0, 1]]),
        (Polyhedron.box(1.0, 1.0, 2), [1.0, 1.0], [[0, 0], [0, 0]], [[0, 0], [0, 0]]),
    ],
    ids=lambda value: value.kind if isinstance(value, Polyhedron) else "",
)
def test_both_choices_at_a_tie(polyhedron: Polyhedron, v: list, active: list, support: list) -> None:
    point = torch.tensor(v, dtype=D)
    for choice, wanted in (("active", active), ("support", support)):
        found = hs_jacobian(point, polyhedron, jacobian=choice)
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=D), msg=f"{choice}: {found}")


@every_case
def test_a_shared_tensor_gets_the_sum(name: str) -> None:
    """Tensors with a batch axis and without: the gradient has the tensor's shape and is the sum over the items."""
    function, given = function_of(CASES[name], CASES[name].weight_matters)
    cotangent = CASES[name].point(2, seed=2)
    shared = torch.autograd.grad(function(*given), given, cotangent, materialize_grads=True)
    expanded = [tensor.detach().expand(2, *tensor.shape[tensor.dim() - dims :]).clone().requires_grad_()
                for tensor, dims in zip(given, _item_dims(name), strict=True)]  # fmt: skip
    single = torch.autograd.grad(function(*expanded), expanded, cotangent, materialize_grads=True)
    for tensor, one, other in zip(given, shared, single, strict=True):
        assert one.shape == tensor.shape
        torch.testing.assert_close(one, other.sum(0) if tensor.shape != other.shape else other, rtol=1e-7, atol=1e-9)


def _item_dims(name: str) -> list[int]:
    """Return the axes of one item of v, the weight and each tensor of a case."""
    case = CASES[name]
    event = len(case.event)
    own = {
        "halfspace": [1, 0], "hyperplane": [1, 0], "affine": [1], "affine_rows": [2, 1], "box": [1, 1],
        "capped_simplex": [0, 1], "budget": [1, 0, 1, 1], "weighted_l1_ball": [1, 0], "transport": [1, 1],
        "box_intersect_affine": [1, 1], "box_intersect_row": [2, 1], "product": [0, 1], "polyhedron": [2, 1, 1],
        "polyhedron_fixed": [1],
    }  # fmt: skip
    return [event, *([event] if case.weight_matters else []), *own.get(name, [0] * len(case.tensors))]


# ---------------------------------------------------------------------------------------------------------------------
# Batches, strides, dtypes, modes
# ---------------------------------------------------------------------------------------------------------------------


@every_case
def test_batch_axes(name: str) -> None:
    case = CASES[name]
    polyhedron = case.polyhedron()
    v = case.point(3, 4, 2)
    whole = project(v, polyhedron)
    assert whole.shape == v.shape
    torch.testing.assert_close(torch.stack([project(part, polyhedron) for part in v]), whole)
    strided = v.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(project(strided, polyhedron), whole)
    single = polyhedron.batch_shape == ()
    one = project(case.point(), polyhedron)
    assert one.shape == ((*case.event,) if single else (2, *case.event))
    empty = case.point(0, 2).requires_grad_()
    x = project(empty, polyhedron)
    assert x.shape == (0, 2, *case.event)
    x.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape


def test_batch_axes_broadcast() -> None:
    radius = torch.tensor([[1.0], [2.0]], dtype=D)
    x = project(torch.randn(3, 4, dtype=D), Polyhedron.simplex(4, radius))
    assert x.shape == (2, 3, 4)
    torch.testing.assert_close(x.sum(-1), radius.expand(2, 3))
    with pytest.raises(ValueError, match=r"do not broadcast: `point` \(3,\), `rhs` \(2,\)"):
        project(torch.randn(3, 4, dtype=D), Polyhedron.simplex(4, radius[:, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_case
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    v = case.point(2).to(dtype)
    reference = v.double().requires_grad_()
    v = v.requires_grad_()
    x, wanted = project(v, case.polyhedron()), project(reference, case.polyhedron())
    assert x.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=tolerance)
    x.sum().backward()
    wanted.sum().backward()
    assert v.grad is not None
    assert reference.grad is not None
    assert v.grad.dtype == dtype
    torch.testing.assert_close(v.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["simplex", "affine", "halfspace", "polyhedron_fixed"])
def test_autocast_computes_in_float32(name: str) -> None:
    case = CASES[name]
    v = case.point(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full, half = project(v.float(), case.polyhedron()), project(v.bfloat16(), case.polyhedron())
        exact = project(v, case.polyhedron())
    assert (full.dtype, half.dtype, exact.dtype) == (torch.float32, torch.float32, torch.float64)
    torch.testing.assert_close(full.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half, project(v.bfloat16().float(), case.polyhedron()))


@every_case
def test_no_grad_and_inference_mode(name: str) -> None:
    case = CASES[name]
    polyhedron, v = case.polyhedron(), case.point(2)
    with torch.inference_mode():  # the first call prepares constants
        first = project(v, polyhedron)
    with torch.no_grad():
        x = project(v.requires_grad_(), polyhedron)
    assert not x.requires_grad
    torch.testing.assert_close(x, first.clone())
    project(v, polyhedron).sum().backward()
    assert v.grad is not None


def test_a_set_first_used_inside_a_transform_can_be_used_outside() -> None:
    polyhedron = Polyhedron.capped_simplex(3, 1.0, 0.5)
    v = torch.tensor([0.1, 0.2, 0.9], dtype=D)
    inside = torch.func.vmap(torch.func.grad(lambda point: project(point, polyhedron)[0]))(v[None])
    torch.testing.assert_close(inside[0], hs_vjp(v, polyhedron, torch.tensor([1.0, 0.0, 0.0], dtype=D)))
    assert project(v, polyhedron).shape == (3,)


def test_the_point_may_change_in_place_after_the_forward_pass() -> None:
    v = torch.randn(2, 4, dtype=D, requires_grad=True)
    x = project(v, Polyhedron.simplex(4))
    with torch.no_grad():
        v.add_(1.0)
    x[:, 0].sum().backward()
    assert v.grad is not None


def test_changed_constants_are_noticed() -> None:
    rows, limits = torch.eye(2, dtype=D), torch.ones(2, dtype=D)
    general, affine = Polyhedron(G=rows, h=limits), Polyhedron.affine(rows, limits)
    v = torch.full((2,), 3.0, dtype=D)
    torch.testing.assert_close(project(v, general), torch.ones(2, dtype=D))
    torch.testing.assert_close(project(v, affine), torch.ones(2, dtype=D))
    rows.data.mul_(2.0)  # not even counted as a new version by torch
    torch.testing.assert_close(project(v, general), torch.full((2,), 0.5, dtype=D))
    torch.testing.assert_close(project(v, affine), torch.full((2,), 0.5, dtype=D))
    limits.numpy()[:] = 4.0
    torch.testing.assert_close(project(v, general), torch.full((2,), 2.0, dtype=D))


# ---------------------------------------------------------------------------------------------------------------------
# Compiled code
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiles(function, given: tuple[Tensor, ...], backend: str) -> None:
    """Compare value and gradients of compiled and eager code."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for call in (compiled, function):
        x = call(*given)
        results.append((x, *torch.autograd.grad((x**2).sum(), given)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@every_metric
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_in_one_graph(name: str, weighted: bool) -> None:
    function, given = function_of(CASES[name], weighted)
    assert_compiles(function, given, "aot_eager")


@pytest.mark.parametrize("name", ["budget", "polyhedron"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_by_inductor(name: str) -> None:
    function, given = function_of(CASES[name], True)
    assert_compiles(function, given, "inductor")


@pytest.mark.parametrize("name", ["simplex", "polyhedron_fixed"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_one_graph_for_every_batch_size(name: str) -> None:
    case = CASES[name]
    polyhedron = case.polyhedron()
    compiled = torch.compile(lambda v: project(v, polyhedron), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        v = case.point(batch, 2)
        torch.testing.assert_close(compiled(v), project(v, polyhedron))


@pytest.mark.parametrize("name", ["simplex", "box", "polyhedron_fixed"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_failing_items_are_nan_in_compiled_code(name: str) -> None:
    case = CASES[name]
    polyhedron = case.polyhedron()
    v = case.point(2)
    v[0, 0] = math.nan
    x = torch.compile(lambda point: project(point, polyhedron), fullgraph=True, backend="aot_eager")(v)
    assert bool(x[0].isnan().all())
    torch.testing.assert_close(x[1], project(v, polyhedron, on_failure="nan")[1])


@pytest.mark.usefixtures("_fresh_compiler")
def test_vmap_inside_compiled_code() -> None:
    polyhedron, case = Polyhedron.simplex(N), CASES["polyhedron_fixed"]
    rows = case.make(torch.zeros(2, dtype=D))
    v = case.point(3, 2)

    def function(points: Tensor) -> Tensor:
        return torch.func.vmap(lambda v: project(v, polyhedron) + project(v, rows))(points)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(v), function(v))


# ---------------------------------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------------------------------

EMPTY = {
    "box": Polyhedron.box(1.0, torch.tensor([[2.0, 2.0], [0.0, 2.0]], dtype=D)),
    "linf_ball": Polyhedron.linf_ball(2, torch.tensor([1.0, -1.0], dtype=D)),
    "halfspace": Polyhedron.halfspace(torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D), -1.0),
    "hyperplane": Polyhedron.hyperplane(torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D), 1.0),
    "affine": Polyhedron.affine(torch.ones(2, 2, dtype=D), torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=D)),
    "simplex": Polyhedron.simplex(2, torch.tensor([1.0, -1.0], dtype=D)),
    "capped_simplex": Polyhedron.capped_simplex(2, torch.tensor([1.0, 3.0], dtype=D)),
    "l1_ball": Polyhedron.l1_ball(2, torch.tensor([1.0, -1.0], dtype=D)),
    "monotone": Polyhedron.monotone(2, lower=0.0, upper=torch.tensor([1.0, -1.0], dtype=D)),
    "polyhedron": Polyhedron(
        G=torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=D), h=torch.tensor([[1.0, 1.0], [1.0, -2.0]], dtype=D)
    ),
    "product": Polyhedron.product(Polyhedron.simplex(1, torch.tensor([1.0, -1.0], dtype=D)), Polyhedron.monotone(1)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_set_fails_for_its_items_only(name: str) -> None:
    polyhedron = EMPTY[name]
    v = torch.tensor([[0.3, 0.6], [0.2, 0.1]], dtype=D, requires_grad=True)
    with pytest.raises(hsbackend.SolveError, match="1 of 2 items failed: item 1: infeasible") as raised:
        project(v, polyhedron)
    assert np.array_equal(raised.value.status, [0, hsbackend.Status.INFEASIBLE])
    x = project(v, polyhedron, on_failure="nan")
    assert bool(x[1].isnan().all())
    assert bool(x[0].isfinite().all())
    (gradient,) = torch.autograd.grad(x[0].sum(), v, retain_graph=True)
    assert bool(gradient.isfinite().all())
    assert float(gradient[1].abs().max()) == 0.0
    (gradient,) = torch.autograd.grad(x.sum(), v)
    assert bool(gradient[0].isfinite().all())
    assert bool(gradient[1].isnan().any())
    mapped = torch.func.vmap(lambda point: project(point, polyhedron))(v.detach()[None])[0]
    torch.testing.assert_close(mapped, x.detach(), equal_nan=True)


@every_case
def test_nan_is_the_fault_of_the_input(name: str) -> None:
    case = CASES[name]
    v = case.point(2)
    v[(1, *[0] * len(case.event))] = math.nan
    with pytest.raises(hsbackend.SolveError, match="item 1: the parameters hold NaN or infinity"):
        project(v, case.polyhedron())
    x = project(v, case.polyhedron(), on_failure="nan")
    assert bool(x[1].isnan().all())
    torch.testing.assert_close(x[0], project(case.point(2), case.polyhedron())[0])


@every_case
def test_weights_must_be_positive(name: str) -> None:
    case = CASES[name]
    if not case.weight_matters:
        return
    weight = case.weight().expand(2, *case.event).clone()
    weight[(0, *[0] * len(case.event))] = -1.0
    with pytest.raises(hsbackend.SolveError, match="1 of 2 items failed: item 0"):
        project(case.point(2), case.polyhedron(), weight=weight)


_POINT, _ROW = torch.ones(3), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: project(torch.ones(3).long(), Polyhedron.simplex(3)), TypeError, "`v` has dtype torch.int64"),
        (lambda: project(_POINT, Polyhedron.simplex(3), weight=_POINT.long()), TypeError, "`weight` has dtype"),
        (lambda: project(torch.ones(3), "simplex"), TypeError, "expected a hsbackend.Polyhedron, got str"),
        (lambda: project(torch.ones(2, 4), Polyhedron.simplex(3)), ValueError, r"shape \(2, 4\), expected \(..., 3\)"),
        (lambda: project(torch.ones(3), Polyhedron.birkhoff(3)), ValueError, r"expected \(..., 3, 3\)"),
        (lambda: project(_POINT, Polyhedron.simplex(3), jacobian="all"), hsbackend.InvalidOptionError, "'active' or"),
        (lambda: project(_POINT, Polyhedron.simplex(3), on_failure="x"), hsbackend.InvalidOptionError, "or 'closest'"),
        (lambda: Polyhedron.simplex(0), ValueError, "n=0, expected a positive integer"),
        (lambda: Polyhedron.simplex(3, torch.tensor(1)), TypeError, "`equals` has dtype torch.int64"),
        (lambda: Polyhedron.budget(3), ValueError, "a budget needs `equals`, or"),
        (lambda: Polyhedron.budget(3, equals=1.0, at_most=1.0), ValueError, "a budget needs `equals`, or"),
        (lambda: Polyhedron.budget(3, torch.ones(4), equals=1.0), ValueError, r"`coefficients` has shape \(4,\)"),
        (lambda: Polyhedron.box(0.0, 1.0), ValueError, "nothing tells the number of coordinates"),
        (lambda: Polyhedron(), ValueError, "nothing tells the number of coordinates"),
        (lambda: Polyhedron(A=torch.ones(1, 3)), ValueError, "`A` was given without `b`"),
        (lambda: Polyhedron(h=torch.ones(1)), ValueError, "`h` was given without `G`"),
        (lambda: Polyhedron(A=_POINT, b=torch.ones(1)), ValueError, r"`A` has shape \(3,\), expected \(..., p, n\)"),
        (lambda: Polyhedron(_ROW, torch.ones(1), torch.ones(1, 4), torch.ones(1)), ValueError, "`G` has 4 columns"),
        (lambda: Polyhedron.halfspace(1.0, 1.0), ValueError, "`a` has shape"),
        (lambda: Polyhedron.order(3, [(0, 3)]), ValueError, r"edge \(0, 3\) has an index outside of 0, ..., 2"),
        (lambda: Polyhedron.product(), ValueError, "at least one"),
        (lambda: Polyhedron.product(Polyhedron.birkhoff(2)), ValueError, "takes sets of vectors, got a birkhoff"),
    ],
)  # fmt: skip
def test_messages(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# Another device
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_metric
def test_tensors_of_another_device(name: str, weighted: bool) -> None:
    """Computed where they are, or in main memory and returned there."""
    function, given = function_of(CASES[name], weighted)
    there = tuple(tensor.detach().cuda().requires_grad_() for tensor in given)
    x, wanted = function(*there), function(*given)
    assert x.device.type == "cuda"
    torch.testing.assert_close(x.cpu(), wanted)
    one, other = (torch.autograd.grad((z**2).sum(), inputs) for z, inputs in ((x, there), (wanted, given)))
    for mine, theirs in zip(one, other, strict=True):
        assert mine.device.type == "cuda"
        torch.testing.assert_close(mine.cpu(), theirs)
    torch.testing.assert_close(torch.func.jacfwd(function)(*there).cpu(), torch.func.jacfwd(function)(*given))


# ---------------------------------------------------------------------------------------------------------------------
# Objects
# ---------------------------------------------------------------------------------------------------------------------


@every_case
def test_copies(name: str) -> None:
    case = CASES[name]
    polyhedron, v = case.polyhedron(), case.point(2)
    x = project(v, polyhedron)
    for other in (
        copy.deepcopy(polyhedron),
        pickle.loads(pickle.dumps(polyhedron)),
        polyhedron.replace(polyhedron.tensors),
    ):
        torch.testing.assert_close(project(v, other), x)
        assert repr(other) == repr(polyhedron)
        assert other.tensors.keys() == polyhedron.tensors.keys()


@every_case
def test_repr_says_what_it_is(name: str) -> None:
    polyhedron = CASES[name].polyhedron()
    assert repr(polyhedron).startswith(f"Polyhedron[{polyhedron.kind}](shape={CASES[name].event}")
    for tensor in polyhedron.tensors.values():
        assert f"tensor{tuple(tensor.shape)}" in repr(polyhedron)
    assert polyhedron.event_shape == CASES[name].event
