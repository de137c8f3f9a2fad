"""The derivative rule: against the pseudo-inverse written down literally, against finite differences, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from generators import Case, random_case
from hsbackend.differentiate import Call, Layer, Output, SolveFunction
from hsbackend.plan import Plan
from hsbackend.solvers.result import Options
from hsbackend.status import Status

ALL = frozenset("QqAb")


def active_projector(case: Case, b: int, choice: str, multipliers: np.ndarray, bounds: bool) -> np.ndarray:
    """``P_K = H^-1 - H^-1 N'(N H^-1 N')^+ N H^-1`` from the known answer, by a dense pseudo-inverse."""
    hessian, _, rows, rhs = case.item(b)
    slack = rhs - rows @ case.primal[b]
    if choice == "active":
        member = slack <= 1e-9
    else:
        # A variable whose bounds coincide cannot move: where the rows were recognised as bounds it counts as fixed
        # whatever its multiplier (every set between the support and the active rows is a valid choice).
        single = (np.count_nonzero(rows, axis=1) == 1) & (slack <= 1e-9)
        above = bounds & (rows[single] > 0).any(axis=0) & (rows[single] < 0).any(axis=0)
        member = (np.abs(multipliers) > 1e-9) | (single & (rows[:, above] != 0).any(axis=1))
    member[: case.equalities] = True
    normals = rows[member]
    inverse = np.linalg.inv(hessian)
    return (
        inverse - inverse @ normals.T @ np.linalg.pinv(normals @ inverse @ normals.T, rcond=1e-10) @ normals @ inverse
    )


@pytest.mark.parametrize("choice", ["active", "support"])
@pytest.mark.parametrize("block", range(3))
def test_adjoint_is_the_projector_on_the_face(block: int, choice: str) -> None:
    """u = P_K g for both choices of K, at degenerate points too, and u has no component along active rows."""
    compared = 0
    for seed in range(block * 100, block * 100 + 100):
        case = random_case(seed + 70_000)
        free = ALL if len(case.hessian) > 1 else frozenset("qb")
        plan = Plan(case.program(free))
        solution = plan.solve(case.parameters(free), Options(jacobian=choice))  # type: ignore[arg-type]
        g = np.random.default_rng(seed).normal(size=case.primal.shape)
        adjoint = plan.adjoint(solution, g, None)
        for b in range(case.shape[0]):
            assert solution.status[b] == Status.SOLVED
            projector = active_projector(case, b, choice, solution.multipliers[b], "A" not in free)
            wanted = projector @ g[b]
            error = np.abs(adjoint.primal[b] - wanted).max()
            assert error <= 1e-7 * (1.0 + np.abs(wanted).max()), f"seed {seed} item {b}: {error:.1e}"
            equal = case.item(b)[2][: case.equalities] @ adjoint.primal[b]
            assert np.abs(equal).max(initial=0.0) <= 1e-8 * (1.0 + np.abs(g[b]).max())
            compared += 1
    assert compared == 300


@pytest.mark.parametrize("solver", [None, "active_set", "reference"])
def test_inner_product_identity(solver: str | None) -> None:
    """<P g, f> = <g, P f>: the face's operator is symmetric, for every solver."""
    for seed in range(40):
        case = random_case(seed + 80_000)
        plan = Plan(case.program(ALL), solver)  # type: ignore[arg-type]
        solution = plan.solve(case.parameters(ALL), Options())
        rng = np.random.default_rng(seed)
        g, f = rng.normal(size=(2, *case.primal.shape))
        left = (plan.adjoint(solution, g, None).primal * f).sum(axis=1)
        right = (plan.adjoint(solution, f, None).primal * g).sum(axis=1)
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9, err_msg=f"seed {seed}")


def layer_function(case: Case, duals: bool, solver: str | None):
    """Return f(Q, q, A, b) as a torch function; Q enters symmetrised so that differences stay in the class."""
    _, n, m = case.shape
    outputs = [Output("primal", np.arange(n), (n,))]
    if duals:
        outputs.append(Output("multipliers", np.arange(m), (m,)))
    layer = Layer(Plan(case.program(ALL), solver), outputs)  # type: ignore[arg-type]

    def f(*data: torch.Tensor) -> torch.Tensor:
        symmetric = 0.5 * (data[0] + data[0].transpose(-1, -2))
        call = Call(Options(), "raise")
        batched = tuple(value.shape[0] > 1 for value in data)
        given = [value if many else value[0] for value, many in zip((symmetric, *data[1:]), batched, strict=True)]
        found = SolveFunction.apply(layer, call, batched, torch.float64, *given)
        return torch.cat([value.reshape(value.shape[0], -1) for value in found], dim=1)

    return f


@pytest.mark.parametrize("solver", [None, "active_set", "reference"])
@pytest.mark.parametrize("seed", range(12))
def test_gradcheck_at_strictly_complementary_points(seed: int, solver: str | None) -> None:
    """Primal and multipliers, with respect to Q, q, A and b, each per item."""
    case = random_case(seed + 90_000, batch=2, per_item=True, strict=True)
    data = [torch.tensor(value, requires_grad=True) for value in (case.hessian, case.linear, case.rows, case.rhs)]
    assert torch.autograd.gradcheck(layer_function(case, True, solver), data, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_a_shared_parameter_gets_the_sum(seed: int) -> None:
    """The gradient of data shared by the batch is the sum over the items of the gradient of per-item data."""
    case = random_case(seed + 95_000, batch=4, per_item=False, strict=True)
    f = layer_function(case, False, None)
    weight = torch.randn(4, case.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shared = [torch.tensor(value, requires_grad=True) for value in (case.hessian, case.linear, case.rows, case.rhs)]
    each = [value.detach().expand(4, *value.shape[1:]).clone().requires_grad_() for value in shared]
    (f(*shared) * weight).sum().backward()
    (f(*each) * weight).sum().backward()
    for one, many in zip(shared, each, strict=True):
        assert one.grad is not None
        assert many.grad is not None
        wanted = many.grad if one.shape[0] == 4 else many.grad.sum(0, keepdim=True)
        torch.testing.assert_close(one.grad, wanted, rtol=1e-9, atol=1e-10)


def test_failed_items_pass_no_gradient_and_poison_only_themselves() -> None:
    """Zero cotangent on a failed item: zero gradient. Non-zero cotangent: NaN there, the others are right."""
    case = random_case(99_000, batch=3, per_item=False, infeasible=True)
    _, n, _ = case.shape
    layer = Layer(Plan(case.program()), [Output("primal", np.arange(n), (n,))])
    q, b = (torch.tensor(value, requires_grad=True) for value in (case.linear, case.rhs))
    (x,) = SolveFunction.apply(layer, Call(Options(), "nan"), (True, True), torch.float64, q, b)
    assert torch.isnan(x[0]).all()
    gradient = torch.autograd.grad(x[1:].sum(), [q, b], retain_graph=True)
    assert all(torch.isfinite(value).all() for value in gradient)
    assert all((value[0] == 0).all() for value in gradient)
    poisoned = torch.autograd.grad(x.sum(), [q, b])
    for clean, value in zip(gradient, poisoned, strict=True):
        assert torch.isnan(value[0]).all()
        torch.testing.assert_close(value[1:], clean[1:])


def test_directional_identity_at_a_degenerate_point() -> None:
    """On the simplex with two weakly active coordinates, proj(v') = proj(v) + P(v' - v) along the face (design)."""
    n = 5
    v = np.array([0.6, 0.4, 0.0, 0.0, -1.0])
    rows = np.concatenate([np.ones((1, n)), -np.eye(n)])
    rhs = np.concatenate([[1.0], np.zeros(n)])
    case = Case(
        np.eye(n)[None], -v[None], rows[None], rhs[None], 1, np.array([[0.6, 0.4, 0, 0, 0]]), np.zeros((1, n + 1)),
        np.zeros(1, dtype=bool),
    )  # fmt: skip
    plan = Plan(case.program())
    solution = plan.solve(case.parameters(), Options())
    np.testing.assert_allclose(solution.primal[0], case.primal[0], atol=1e-15)
    step = np.array([0.02, -0.01, 0.0, 0.0, 0.0])  # lifts the threshold: the weak coordinates stay at zero
    moved = plan.solve([-(v + step)[None], rhs[None]], Options())
    pushed = plan.adjoint(solution, step[None], None).primal[0]
    np.testing.assert_allclose(moved.primal[0], solution.primal[0] + pushed, atol=1e-14)


def test_only_what_the_face_needs_is_kept() -> None:
    """Without a derivative there is no face, and asking for one says why."""
    case = random_case(3)
    plan = Plan(case.program())
    solution = plan.solve(case.parameters(), Options(keep_face=False))
    assert solution.face is None
    with pytest.raises(ValueError, match="keep_face=False"):
        plan.adjoint(solution, np.zeros(case.primal.shape), None)


@pytest.mark.parametrize("solver", [None, "active_set"])
def test_nan_data_of_one_item_stay_out_of_a_shared_gradient(solver: str | None) -> None:
    """A is shared and learnable, one item of q is NaN: its cotangent is zero, the sum over the others is right."""
    case = random_case(7, batch=4, per_item=False, strict=True)
    _, n, m = case.shape
    layer = Layer(Plan(case.program(ALL), solver), [Output("primal", np.arange(n), (n,))])  # type: ignore[arg-type]
    linear = case.linear.copy()
    linear[2, 0] = np.nan

    def gradients(q: np.ndarray, rhs: np.ndarray, keep: list[int]) -> list[torch.Tensor]:
        data = [torch.tensor(v, requires_grad=True) for v in (case.hessian[0], q, case.rows[0], rhs)]
        call = Call(Options(), "nan")
        (x,) = SolveFunction.apply(layer, call, (False, True, False, True), torch.float64, *data)
        return list(torch.autograd.grad(x[keep].square().sum(), data))

    found = gradients(linear, case.rhs, [0, 1, 3])
    good = [0, 1, 3]
    wanted = gradients(case.linear[good], case.rhs[good], [0, 1, 2])
    for one, other, index in zip(found, wanted, range(4), strict=True):
        torch.testing.assert_close(one if index in (0, 2) else one[good], other, rtol=1e-10, atol=1e-12)
    assert (found[1][2] == 0).all()
    assert (found[3][2] == 0).all()
    assert m == case.rhs.shape[1]
