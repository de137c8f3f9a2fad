"""Null-space training against dense Jacobians and problems whose KKT points are known."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsbackend import nullspace
from hsbackend.least_squares import StopReason
from hsbackend.nullspace import NullSpaceAdam, ProjectionWarning, project_gradient, ramp
from hsbackend.status import InvalidOptionError, SolveError

# Forward mode makes torch import decompositions of its own, which still use what it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")

EPS = 1e-9


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def curved(leaves: Any) -> dict[str, Tensor]:
    """Three curved constraints, as a tree with a scalar in it, of a tuple of a matrix and a vector."""
    matrix, vector = leaves
    return {"pair": torch.stack([(matrix**2).sum() - 1.0, matrix[0, 0] * vector[1]]), "scalar": vector.sin().sum()}


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in torch.utils._pytree.tree_leaves(tree)])


def dense(constraint: Callable[[Any], Any], tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return c and J by reverse differentiation, row by row."""
    sizes = [tensor.numel() for tensor in tensors]

    def of_vector(vector: Tensor) -> Tensor:
        parts = [part.reshape(t.shape) for part, t in zip(vector.split(sizes), tensors, strict=True)]
        return flat(constraint(tuple(parts)))

    theta = flat([tensor.detach() for tensor in tensors])
    return of_vector(theta), torch.autograd.functional.jacobian(of_vector, theta)


def leaves_with_gradients(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    tensors = torch.randn(3, 4, dtype=dtype, requires_grad=True), torch.randn(6, dtype=dtype, requires_grad=True)
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    return tensors


# The projection.


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize(("seed", "gamma"), [(0, 0.0), (1, 0.7), (2, 3.0)])
def test_direction_is_the_projection_and_a_step_towards_the_constraint(seed: int, gamma: float, mode: Any) -> None:
    tensors = leaves_with_gradients(seed)
    g = flat([tensor.grad for tensor in tensors])
    c, J = dense(curved, tensors)
    report = project_gradient(tensors, curved, gamma, mode=mode)
    d = flat([tensor.grad for tensor in tensors])
    pinv = torch.linalg.pinv(J)
    torch.testing.assert_close(J @ d, gamma * c, rtol=0, atol=EPS)
    torch.testing.assert_close(d - gamma * pinv @ c, g - pinv @ J @ g, rtol=0, atol=EPS)
    assert torch.linalg.vector_norm(J @ (d - gamma * pinv @ c)) < EPS
    assert report.converged
    assert report.acted
    assert report.stop_reason in (StopReason.RESIDUAL, StopReason.RESIDUAL_LIMIT)
    # What is reported, from scratch.
    assert report.gamma == gamma
    assert report.norm_constraint == pytest.approx(float(c.norm()), rel=1e-12)
    assert report.norm_gradient == pytest.approx(float(g.norm()), rel=1e-12)
    assert report.norm_projected == pytest.approx(float(d.norm()), rel=1e-12)
    assert report.norm_target == pytest.approx(float((J @ g - gamma * c).norm()), rel=1e-9)
    assert report.norm_residual < 1e-9 * report.norm_target
    assert report.iterations <= 4
    assert report.condition <= float(torch.linalg.cond(J)) * (1 + 1e-6)
    # J of the target, of the check, and one per iteration (and one to see that it is linear).
    assert report.iterations + 2 <= report.products <= report.iterations + 4
    assert report.transposed_products >= report.iterations


def test_float32() -> None:
    tensors = leaves_with_gradients(dtype=torch.float32)
    c, J = dense(curved, tensors)
    report = project_gradient(tensors, curved, 1.0)
    assert report.converged
    torch.testing.assert_close(J @ flat([tensor.grad for tensor in tensors]), c, rtol=0, atol=1e-4)
    assert report.norm_residual < 1e-4


def test_a_single_tensor_and_a_mapping() -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    x.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    project_gradient(x, lambda x: (x**2).sum(), 0.0)
    # What is orthogonal to (3, 4).
    torch.testing.assert_close(x.grad, torch.tensor([0.64, -0.48], dtype=torch.float64))
    x.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    project_gradient({"x": x}, lambda given: (given["x"] ** 2).sum(), 0.0)
    torch.testing.assert_close(x.grad, torch.tensor([0.64, -0.48], dtype=torch.float64))


def test_a_module_with_frozen_parameters_and_missing_gradients() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    probe = torch.randn(4, 3, dtype=torch.float64)

    def constraint(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (probe,)).sum(0)

    # The loss does not know the first layer: the gradient of its bias is None, and the constraint may move it.
    (model[2].weight ** 2).sum().backward()
    assert model[0].bias.grad is None
    trained = [model[0].bias, model[2].weight, model[2].bias]
    before = flat([torch.zeros(5, dtype=torch.float64), model[2].weight.grad, torch.zeros(2, dtype=torch.float64)])

    def of_trained(parts: tuple[Tensor, ...]) -> Tensor:
        return constraint({"0.weight": model[0].weight, "0.bias": parts[0], "2.weight": parts[1], "2.bias": parts[2]})

    c, J = dense(of_trained, tuple(trained))
    report = project_gradient(model, constraint, 0.5)
    d = flat([tensor.grad for tensor in trained])
    pinv = torch.linalg.pinv(J)
    torch.testing.assert_close(d, before - pinv @ (J @ before - 0.5 * c), rtol=0, atol=EPS)
    assert model[0].weight.grad is None
    assert report.norm_constraint == pytest.approx(float(c.norm()))


def test_sgd_shrinks_a_linear_constraint_by_a_constant_factor() -> None:
    torch.manual_seed(1)
    A, b = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([x], lr=0.1)
    violation = float((A @ x - b).detach().norm())
    for _ in range(20):
        x.grad = torch.randn_like(x)  # Whatever the loss wants.
        report = project_gradient([x], lambda given: A @ given[0] - b, 2.0)
        assert report.norm_constraint == pytest.approx(violation, rel=1e-9)
        optimiser.step()
        violation *= 1.0 - 0.1 * 2.0
    assert float((A @ x - b).detach().norm()) == pytest.approx(violation, rel=1e-8)


@pytest.mark.parametrize("metric", [False, True])
def test_dependent_rows_that_agree_change_nothing(metric: bool) -> None:
    A = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    b = A.sum(1)
    repeated, repeated_b = torch.cat([A, A[:2] + A[1:]]), torch.cat([b, b[:2] + b[1:]])
    found = []
    for rows, right in ((A, b), (repeated, repeated_b)):
        x = torch.arange(8.0, dtype=torch.float64).requires_grad_()
        x.grad = torch.ones_like(x).cumsum(0)
        constraint = lambda given, rows=rows, right=right: rows @ given[0] - right  # noqa: E731
        if metric:
            optimiser = NullSpaceAdam([x], constraint, gamma=1.0, lr=0.5)
            optimiser.step()
            report = optimiser.report
        else:
            report = project_gradient([x], constraint, 1.0)
        assert report is not None
        assert report.converged
        assert report.norm_residual < 1e-8 * report.norm_target
        found.append((x if metric else x.grad).detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def test_inconsistent_constraints_are_a_compromise_and_the_report_shows_it() -> None:
    A = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([0.0, 3.0], dtype=torch.float64)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    x.grad = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    g, c = x.grad.clone(), (A @ x - b).detach()
    report = project_gradient([x], lambda given: A @ given[0] - b, 1.0)
    torch.testing.assert_close(x.grad, g - torch.linalg.pinv(A) @ (A @ g - c))
    assert report.converged
    assert report.stop_reason in (StopReason.NORMAL_RESIDUAL, StopReason.NORMAL_LIMIT)
    # The part of c that no direction changes: half the difference in each row.
    assert report.norm_residual == pytest.approx(3.0 / math.sqrt(2.0))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_constant_constraint_leaves_the_gradient(mode: Any) -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    x.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    report = project_gradient([x], lambda given: torch.ones(2, dtype=torch.float64), 1.0, mode=mode)
    assert x.grad.tolist() == [1.0, 2.0, 3.0]
    assert report.norm_residual == pytest.approx(math.sqrt(2.0))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_constraint_on_derivatives_of_the_network(mode: Any) -> None:
    """J'v - J v of the network's own Jacobian: derivatives inside of the constraint."""
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    points, signs = torch.randn(2, 4, 3, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def constraint(given: dict[str, Tensor]) -> Tensor:
        called = lambda inputs: torch.func.functional_call(model, given, (inputs,))  # noqa: E731
        return torch.func.vjp(called, points)[1](signs)[0] - torch.func.jvp(called, (points,), (signs,))[1]

    model(points).square().sum().backward()
    g = flat([tensor.grad for tensor in model.parameters()])
    c, J = dense(lambda parts: constraint(dict(zip(names, parts, strict=True))), tuple(model.parameters()))
    report = project_gradient(model, constraint, 0.5, mode=mode)
    # Rows of one point are orthogonal to its v, and translations do not count: J has not full rank, c is consistent.
    assert torch.linalg.matrix_rank(J) < len(J)
    d = flat([tensor.grad for tensor in model.parameters()])
    torch.testing.assert_close(d, g - torch.linalg.pinv(J, rtol=1e-10) @ (J @ g - 0.5 * c), rtol=0, atol=1e-7)
    assert report.norm_residual < 1e-8 * report.norm_target


def test_a_vanishing_jacobian_leaves_the_gradient() -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    report = project_gradient([x], lambda given: (given[0] ** 2).sum() - 1.0, 2.0)
    assert x.grad.tolist() == [1.0, 2.0, 3.0]
    assert report.stop_reason == StopReason.ZERO
    assert report.norm_residual == pytest.approx(2.0)  # Of -gamma c, nothing is met, and that is said.


def test_damping_solves_the_damped_problem() -> None:
    tensors = leaves_with_gradients(3)
    g = flat([tensor.grad for tensor in tensors])
    c, J = dense(curved, tensors)
    project_gradient(tensors, curved, 1.0, damp=0.5)
    step = torch.linalg.solve(J.mT @ J + 0.25 * torch.eye(len(g), dtype=torch.float64), J.mT @ (J @ g - c))
    torch.testing.assert_close(flat([tensor.grad for tensor in tensors]), g - step, rtol=0, atol=1e-8)


def test_equilibration_changes_the_iterations_and_not_the_step() -> None:
    sizes = 10.0 ** torch.linspace(-2, 2, 40, dtype=torch.float64)
    counts, found = [], []
    for probes in (0, 1):
        x = torch.ones(80, dtype=torch.float64, requires_grad=True)
        x.grad = torch.linspace(-1, 1, 80, dtype=torch.float64)
        report = project_gradient([x], lambda given: sizes * given[0][::2], 1.0, equilibrate=probes)
        counts.append(report.iterations)
        found.append(x.grad.clone())
    # One entry per row: one probe gives the exact norms, and one step solves.
    assert counts[1] <= 2 < 20 < counts[0]
    expected = torch.linspace(-1, 1, 80, dtype=torch.float64)
    expected[::2] = 1.0
    torch.testing.assert_close(found[1], expected, rtol=1e-12, atol=1e-12)
    # Without probes: as far as btol 1e-10 goes, relative to rows of up to 100, in rows of 0.01.
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)


def test_a_million_sparse_constraints() -> None:
    mask = torch.rand(1000, 1500, generator=torch.Generator().manual_seed(0)) < 0.7
    weight = torch.randn(1000, 1500, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    g = weight.grad.clone()
    report = project_gradient(weight, lambda weight: mask * weight, 0.25)
    assert report.iterations <= 2
    torch.testing.assert_close(weight.grad[~mask], g[~mask])
    torch.testing.assert_close(weight.grad[mask], 0.25 * weight.detach()[mask], rtol=1e-4, atol=1e-5)


# Convergence to KKT points.

H = torch.tensor([[3.0, 0.5, 0.0], [0.5, 2.0, -0.4], [0.0, -0.4, 5.0]], dtype=torch.float64)
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
ROW = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
RIGHT = torch.tensor([1.0], dtype=torch.float64)


def kkt_point() -> Tensor:
    """min 1/2 (x - t)'H(x - t) subject to ROW x = RIGHT, by its KKT system."""
    matrix = torch.cat([torch.cat([H, ROW.mT], 1), torch.cat([ROW, torch.zeros(1, 1, dtype=torch.float64)], 1)])
    return torch.linalg.solve(matrix, torch.cat([H @ TARGET, RIGHT]))[:3]


def linear(given: Any) -> Tensor:
    return ROW @ given[0] - RIGHT


def loss_of(x: Tensor) -> Tensor:
    return 0.5 * (x - TARGET) @ H @ (x - TARGET)


@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam", "nullspace-adam"])
def test_optimisers_reach_the_kkt_point(optimiser: str) -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    made = {
        "sgd": lambda: torch.optim.SGD([x], lr=0.1),
        "momentum": lambda: torch.optim.SGD([x], lr=0.03, momentum=0.8),
        "adam": lambda: torch.optim.Adam([x], lr=0.05),
        "nullspace-adam": lambda: NullSpaceAdam([x], linear, gamma=5.0, lr=0.05),
    }[optimiser]()
    for step in range(600):
        if step >= 200 and step % 50 == 0:  # Adam's steps are as long as lr: less to come closer.
            made.param_groups[0]["lr"] *= 1.0 if optimiser in ("sgd", "momentum") else 0.5
        made.zero_grad()
        loss_of(x).backward()
        if optimiser != "nullspace-adam":
            project_gradient([x], linear, 1.0)
        made.step()
    torch.testing.assert_close(x.detach(), kkt_point(), rtol=0, atol=1e-6)


def test_what_is_not_offered_goes_wrong() -> None:
    """Adam's step of the plain gradient, projected without the metric: feasible, at another point."""
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 4001):
        (g,) = torch.autograd.grad(loss_of(x), x)
        v = 0.999 * v + 0.001 * g**2
        with torch.no_grad():
            adam = g / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            pinv = torch.linalg.pinv(ROW)
            x -= (0.02 if step < 2000 else 0.001) * (adam - pinv @ (ROW @ adam - linear([x])))
    assert float(linear([x]).detach().abs()) < 1e-3
    assert float((x.detach() - kkt_point()).norm()) > 0.1


def test_curved_constraint_reaches_the_sphere_where_the_loss_is_least() -> None:
    t = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    x = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimiser = NullSpaceAdam([x], lambda given: (given[0] ** 2).sum() - 1.0, gamma=4.0, lr=0.05)
    for step in range(400):
        if step in (150, 250):
            optimiser.param_groups[0]["lr"] *= 0.1
        optimiser.zero_grad()
        (t @ x).backward()
        optimiser.step()
    torch.testing.assert_close(x.detach(), -t / 3.0, rtol=0, atol=1e-5)


# NullSpaceAdam.


def test_metric_rule_against_the_dense_formula() -> None:
    tensors = leaves_with_gradients(5)
    optimiser = NullSpaceAdam(tensors, curved, gamma=2.0, lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    m = v = torch.zeros(18, dtype=torch.float64)
    for step in range(1, 5):
        g, theta = flat([tensor.grad for tensor in tensors]), flat([tensor.detach() for tensor in tensors])
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        metric = 1.0 / ((v / (1 - 0.9**step)).sqrt() + 1e-3)
        t = metric * m / (1 - 0.8**step) + 0.3 * theta
        c, J = dense(curved, tensors)
        multiplier = torch.linalg.solve((J * metric) @ J.mT, J @ t - 2.0 * c)
        d = t - metric * (J.mT @ multiplier)
        optimiser.step()
        torch.testing.assert_close(flat([tensor.detach() for tensor in tensors]), theta - 0.01 * d, rtol=0, atol=1e-9)
        report = optimiser.report
        assert report is not None
        assert report.norm_constraint == pytest.approx(float(c.norm()), rel=1e-10)
        assert report.norm_gradient == pytest.approx(float(t.norm()), rel=1e-10)
        assert report.norm_projected == pytest.approx(float(d.norm()), rel=1e-8)
        assert report.norm_residual < 1e-8 * report.norm_target
        for tensor in tensors:
            tensor.grad = torch.randn_like(tensor)


def test_a_linear_constraint_shrinks_by_one_minus_lr_gamma_whatever_the_groups() -> None:
    torch.manual_seed(7)
    A = torch.randn(2, 9, dtype=torch.float64)
    x, y = torch.randn(4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    groups = [{"params": [x.requires_grad_()], "lr": 0.003}, {"params": [y.requires_grad_()], "weight_decay": 0.1}]
    optimiser = NullSpaceAdam(groups, lambda given: A @ torch.cat(given), gamma=20.0, lr=0.02)
    violation = float((A @ torch.cat([x, y]).detach()).norm())
    for _ in range(10):
        x.grad, y.grad = torch.randn_like(x), torch.randn_like(y)
        optimiser.step()
        violation *= 1.0 - 0.02 * 20.0
        assert float((A @ torch.cat([x, y]).detach()).norm()) == pytest.approx(violation, rel=1e-6)


def test_without_an_acting_constraint_it_is_adamw() -> None:
    model = network(1)
    other = copy.deepcopy(model)
    ours = NullSpaceAdam(model, lambda given: given["0.bias"], gamma=None, lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    inputs = torch.randn(8, 3, dtype=torch.float64)
    for _ in range(5):
        for net, optimiser in ((model, ours), (other, theirs)):
            optimiser.zero_grad()
            net(inputs).square().sum().backward()
            optimiser.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
    report = ours.report
    assert report is not None
    assert not report.acted
    assert report.converged
    assert math.isnan(report.norm_residual)
    assert report.norm_projected == report.norm_gradient > 0.0
    assert report.norm_constraint > 0.0


def test_warm_up_and_ramp() -> None:
    schedule = ramp(3.0, start=2, length=2)
    assert [schedule(step) for step in range(6)] == [None, None, 1.0, 2.0, 3.0, 3.0]
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimiser = NullSpaceAdam([x], lambda given: given[0].sum(), gamma=schedule, lr=0.1)
    seen = []
    for _ in range(5):
        x.grad = torch.ones_like(x)
        optimiser.step()
        assert optimiser.report is not None
        seen.append(optimiser.report.gamma)
    assert seen == [None, None, 1.0, 2.0, 3.0]
    x.grad = torch.ones_like(x)
    assert project_gradient([x], lambda given: given[0].sum(), schedule, step=3).gamma == 2.0
    assert project_gradient([x], lambda given: given[0].sum(), schedule, step=0).gamma is None
    with pytest.raises(ValueError, match="`step` is missing"):
        project_gradient([x], lambda given: given[0].sum(), schedule)


@pytest.mark.parametrize("named", [True, False])
def test_state_dict_round_trip(named: bool) -> None:
    inputs = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def make(model: nn.Module) -> NullSpaceAdam:
        if named:
            return NullSpaceAdam(model.named_parameters(), lambda given: given["2.bias"], gamma=ramp(2.0, start=4))
        return NullSpaceAdam(model.parameters(), lambda given: given[3], gamma=ramp(2.0, start=4))

    def train(model: nn.Module, optimiser: NullSpaceAdam, steps: int) -> None:
        for _ in range(steps):
            optimiser.zero_grad()
            model(inputs).square().sum().backward()
            optimiser.step()

    model = network(4)
    optimiser = make(model)
    train(model, optimiser, 3)
    twin = network(5)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    restored = make(twin)
    restored.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    assert restored.steps == optimiser.steps == 3
    # Across the end of the warm-up: the schedule has to know the step.
    train(model, optimiser, 4)
    train(twin, restored, 4)
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)
    assert restored.report == optimiser.report


def test_closure_and_frozen_parameters() -> None:
    model = network(6)
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    inputs = torch.randn(4, 3, dtype=torch.float64)
    optimiser = NullSpaceAdam(
        model.named_parameters(),
        lambda given: torch.func.functional_call(model, given, (inputs,)).mean(0),
        gamma=50.0,
        lr=0.01,
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (model(inputs) - 1.0).square().sum()
        loss.backward()
        return loss

    first = optimiser.step(closure)
    for _ in range(30):
        last = optimiser.step(closure)
    assert isinstance(first, Tensor)
    assert isinstance(last, Tensor)
    assert torch.equal(model[2].weight, frozen)
    assert float(model(inputs).mean(0).detach().norm()) < 1e-3
    assert optimiser.report is not None
    assert optimiser.report.norm_residual < 1e-6


# Failures.


def hard(given: Any) -> Tensor:
    return 10.0 ** torch.linspace(-3, 3, 30, dtype=torch.float64) * given[0][:30]


def test_an_early_stop_is_never_silent() -> None:
    x = torch.ones(40, dtype=torch.float64, requires_grad=True)
    x.grad = torch.arange(40.0, dtype=torch.float64)
    with pytest.raises(SolveError, match="MAX_STEPS"):
        project_gradient([x], hard, 1.0, max_steps=2, on_failure="raise")
    assert torch.equal(x.grad, torch.arange(40.0, dtype=torch.float64))
    with pytest.warns(ProjectionWarning, match="stopped after 2 iterations: MAX_STEPS"):
        report = project_gradient([x], hard, 1.0, max_steps=2)
    assert not report.converged
    jd = hard([x.grad])
    assert report.norm_residual == pytest.approx(float((jd - hard([x.detach()])).norm()), rel=1e-9)
    assert report.norm_residual > 1e-3 * report.norm_target

    optimiser = NullSpaceAdam([x], hard, max_steps=2, on_failure="raise")
    with pytest.raises(SolveError, match="MAX_STEPS"):
        optimiser.step()
    assert torch.equal(x.detach(), torch.ones_like(x))


@pytest.mark.parametrize("where", ["gradient", "constraint", "product"])
def test_nan_is_named_and_changes_nothing(where: str) -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    x.grad = torch.tensor([1.0, math.nan if where == "gradient" else 1.0, 1.0], dtype=torch.float64)
    before = x.grad.clone()

    def constraint(given: Any) -> Tensor:
        if where == "constraint":
            return given[0] * math.nan
        return given[0].sub(1.0).abs().sqrt() if where == "product" else given[0]

    with pytest.raises(SolveError, match=f"{where} .*holds NaN"):
        project_gradient([x], constraint, 1.0)
    assert torch.equal(x.grad.nan_to_num(9.0), before.nan_to_num(9.0))
    optimiser = NullSpaceAdam([x], constraint)
    with pytest.raises(SolveError, match=f"{where} .*holds NaN"):
        optimiser.step()
    assert torch.equal(x.detach(), torch.ones(3, dtype=torch.float64))
    assert optimiser.steps == (1 if where == "product" else 0)


def test_refusals() -> None:
    x = torch.ones(3, requires_grad=True)
    x.grad = torch.ones(3)
    same = lambda given: given[0]  # noqa: E731
    for message, error, call in (
        ("gamma=-1.0, expected", ValueError, lambda: project_gradient([x], same, -1.0)),
        ("damp=-1.0, expected", ValueError, lambda: project_gradient([x], same, 1.0, damp=-1.0)),
        ("max_steps=0, expected", ValueError, lambda: project_gradient([x], same, 1.0, max_steps=0)),
        ("equilibrate=-1, expected", ValueError, lambda: project_gradient([x], same, 1.0, equilibrate=-1)),
        ("mode='both' is", InvalidOptionError, lambda: project_gradient([x], same, 1.0, mode="both")),
        ("on_failure='nan' is", InvalidOptionError, lambda: project_gradient([x], same, 1.0, on_failure="nan")),
        ("no parameter requires", ValueError, lambda: project_gradient([x.detach()], same, 1.0)),
        ("holds a float", TypeError, lambda: project_gradient([1.0], same, 1.0)),
        ("expected a function", TypeError, lambda: project_gradient([x], 3.0, 1.0)),
        ("returned a float", TypeError, lambda: project_gradient([x], lambda given: 1.0, 1.0)),
        ("returned no tensor", TypeError, lambda: project_gradient([x], lambda given: (), 1.0)),
        ("float64 on cpu, expected", TypeError, lambda: project_gradient([x], lambda g: g[0].double(), 1.0)),
        ("float16, expected", TypeError, lambda: project_gradient([x.detach().half().requires_grad_()], same, 1.0)),
        ("one dtype", TypeError, lambda: project_gradient([x, x.detach().double().requires_grad_()], same, 1.0)),
        ("lr=-1", ValueError, lambda: NullSpaceAdam([x], same, lr=-1)),
        ("betas=", ValueError, lambda: NullSpaceAdam([x], same, betas=(0.9, 1.0))),
        ("is a tensor", TypeError, lambda: NullSpaceAdam(x, same)),
        ("expected below 2", ValueError, lambda: NullSpaceAdam([x], same, lr=0.1, gamma=20.0).step()),
        ("start=-1", ValueError, lambda: ramp(1.0, start=-1)),
        ("gamma=nan", ValueError, lambda: ramp(math.nan)),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="dense one: set sparse=False"):
        project_gradient(table, lambda given: given["weight"], 1.0)
    assert torch.equal(x.grad, torch.ones(3))


def test_nothing_is_kept_alive_or_recorded() -> None:
    model = network(8)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    model(inputs).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project_gradient(model, lambda given: torch.func.functional_call(model, given, (inputs,)), 1.0)
    for tensor in model.parameters():
        assert tensor.grad is not None
        assert not tensor.grad.requires_grad
        assert tensor.grad_fn is None


@pytest.mark.parametrize("name", ["project_gradient", "ramp", "NullSpaceAdam"])
def test_every_argument_is_documented(name: str) -> None:
    value = getattr(nullspace, name)
    text = inspect.getdoc(value) or ""
    for parameter in inspect.signature(value).parameters:
        assert re.search(rf"^ +{parameter}: ", text, re.M), parameter


def test_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "nullspace.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name} block {number}", "exec"), namespace)
    # 80 steps that each halve c.
    assert float(capsys.readouterr().out) < 1e-4
    assert namespace["report"].converged
