"""The closest feasible problem of an infeasible one: shift, solution, derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, nnls
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hsbackend
from hsbackend import Polyhedron, functional, nn, project, solve_qp
from hsbackend.qp import QPSolution

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

D = torch.float64
CLOSEST, SOLVED = int(hsbackend.Status.CLOSEST), int(hsbackend.Status.SOLVED)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=D)


def shifts(solution: QPSolution) -> tuple[Tensor, ...]:
    shift = solution.shift
    return shift.eq, shift.ineq, shift.lower, shift.upper


def assert_zero(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert not tensor.any()


def random_program(seed: int, feasible: bool = False) -> dict[str, Tensor]:
    """Draw a program of which, as a rule, neither the rows nor the bounds leave room; some limits are infinite."""
    rng = np.random.default_rng(seed)
    n, p, m = int(rng.integers(2, 7)), int(rng.integers(0, 3)), int(rng.integers(1, 9))
    root = rng.normal(size=(n, n))
    A, G = rng.normal(size=(p, n)), rng.normal(size=(m, n))
    if seed % 3 == 0:  # dependent, duplicated and empty rows
        A, G = np.round(A), np.round(G)
    inside = rng.normal(size=n)
    gap = 1.0 if feasible else -1.0
    b, h = A @ inside + (0.0 if feasible else rng.normal(size=p)), G @ inside + gap * rng.random(m)
    lower, upper = inside - gap * rng.random(n), inside + gap * rng.random(n)
    h[rng.random(m) < 0.2] = np.inf
    lower[rng.random(n) < 0.4] = -np.inf
    upper[rng.random(n) < 0.4] = np.inf
    arrays = {"Q": root @ root.T + np.eye(n), "q": rng.normal(size=n), "A": A, "b": b, "G": G, "h": h}
    return {name: torch.tensor(array) for name, array in (arrays | {"lower": lower, "upper": upper}).items()}


def least_shift(A: np.ndarray, b: np.ndarray, G: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Minimise ``|A x - b|^2 + |max(G x - h, 0)|^2`` by bounded least squares; return both residuals."""
    n, m = A.shape[1], len(h)
    system = np.block([[A, np.zeros((len(b), m))], [G, np.eye(m)]])
    bounds = np.concatenate([np.full(n, -np.inf), np.zeros(m)]), np.full(n + m, np.inf)
    found = lsq_linear(system, np.concatenate([b, h]), bounds, method="bvls", tol=1e-15, max_iter=1000)
    return system @ found.x - np.concatenate([b, h])


def as_rows(given: dict[str, Tensor]) -> tuple[np.ndarray, ...]:
    """Return ``A, b, G, h`` with the finite limits of all kinds among the last two, and where they come from."""
    unit = np.eye(len(given["q"]))
    G = np.concatenate([given["G"].numpy(), -unit, unit])
    h = torch.cat([given["h"], -given["lower"], given["upper"]]).numpy()
    there = np.isfinite(h)
    return given["A"].numpy(), given["b"].numpy(), G[there], h[there], np.flatnonzero(there)


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed: int) -> None:
    """The shift against least squares; the solution against the optimality conditions of the shifted program."""
    given = random_program(seed)
    solution = solve_qp(**given, on_failure="closest")
    A, b, G, h, there = as_rows(given)
    wanted = least_shift(A, b, G, h)
    eq, *inequalities = (part.numpy() for part in shifts(solution))
    found = np.concatenate([eq, np.concatenate(inequalities)[there]])
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    assert not np.delete(np.concatenate(inequalities), there).any()
    s = found[len(b) :]
    assert (s >= 0.0).all()
    infeasible = np.linalg.norm(wanted) > 1e-6
    assert int(solution.status) == (CLOSEST if infeasible else SOLVED)
    if not infeasible:
        assert not found.any()
        plain = solve_qp(**given)
        assert torch.equal(solution.primal, plain.primal)
    x = solution.primal.numpy()
    slack = h + s - G @ x
    np.testing.assert_allclose(A @ x, b + eq, atol=1e-9)
    assert slack.min(initial=0.0) > -1e-9
    np.testing.assert_allclose(slack[s > 0.0], 0.0, atol=1e-9)
    # -(Q x + q) is a combination of equations and shifted rows, and a non-negative one of the other active rows.
    lines = np.concatenate([A, G[s > 0.0]])
    cone = np.concatenate([lines, -lines, G[(s == 0.0) & (slack < 1e-8)]])
    force = -(given["Q"].numpy() @ x + given["q"].numpy())
    distance = nnls(cone.T, force, maxiter=1000)[1] if len(cone) else np.linalg.norm(force)
    assert distance < 1e-7
    residuals = solution.residuals
    assert max(float(residuals.primal), float(residuals.dual), float(residuals.complementarity)) < 1e-8


def test_shifts_by_hand() -> None:
    """Opposite bounds meet in the middle, in proportion to the length of their rows."""
    Q, q = torch.eye(1, dtype=D), vector(0.0)
    crossed = solve_qp(Q, q, lower=vector(3.0), upper=vector(1.0), on_failure="closest")
    assert int(crossed.status) == CLOSEST
    torch.testing.assert_close(crossed.primal, vector(2.0))
    torch.testing.assert_close(crossed.shift.lower, vector(1.0))
    torch.testing.assert_close(crossed.shift.upper, vector(1.0))
    # 2x <= -2 and x >= 1: minimise s^2 + t^2 with 2x = -2 + s, x = 1 - t.
    rows = solve_qp(Q, q, G=torch.tensor([[2.0]], dtype=D), h=vector(-2.0), lower=vector(1.0), on_failure="closest")
    torch.testing.assert_close(rows.primal, vector(-0.6))
    torch.testing.assert_close(rows.shift.ineq, vector(0.8))
    torch.testing.assert_close(rows.shift.lower, vector(1.6))
    # x_0 + x_1 = 4 in the unit box: with x = 1 + u, minimise (2 u - 2)^2 + 2 u^2.
    budget = solve_qp(
        torch.eye(2, dtype=D), vector(0.0, 0.0), torch.ones(1, 2, dtype=D), vector(4.0), lower=vector(0.0, 0.0),
        upper=vector(1.0, 1.0), on_failure="closest",
    )  # fmt: skip
    torch.testing.assert_close(budget.shift.eq, vector(-2.0 / 3.0))
    torch.testing.assert_close(budget.shift.upper, vector(2.0 / 3.0, 2.0 / 3.0))
    torch.testing.assert_close(budget.primal, vector(5.0 / 3.0, 5.0 / 3.0))
    assert_zero(budget.shift.lower, budget.shift.ineq)


def test_the_objective_decides_where_the_shifted_limits_leave_room() -> None:
    """x_0 <= -1 and x_0 >= 1 meet at 0; x_1 is free to follow its cost; x_2 as a linear program does."""
    Q, q = torch.diag(vector(1.0, 1.0, 0.0)), vector(-5.0, -3.0, 1.0)
    G, h = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=D), vector(-1.0, -1.0)
    lower, upper = vector(-10.0, -10.0, -2.0), vector(10.0, 10.0, 2.0)
    solution = solve_qp(Q, q, G=G, h=h, lower=lower, upper=upper, on_failure="closest")
    torch.testing.assert_close(solution.primal, vector(0.0, 3.0, -2.0))
    assert solution.active_set.ineq.tolist() == [True, True]
    torch.testing.assert_close(solution.multipliers.lower, vector(0.0, 0.0, 1.0))
    # Multipliers of the shifted rows are those of equations: their difference is determined.
    torch.testing.assert_close(solution.multipliers.ineq @ vector(1.0, -1.0), torch.tensor(5.0, dtype=D))


def mixed(on_failure: str, requires_grad: bool = True) -> tuple[dict[str, Tensor], QPSolution]:
    """Two feasible items around an infeasible one."""
    given = random_program(4, feasible=True)
    batch = {name: torch.stack([tensor, tensor, 1.1 * tensor]) for name, tensor in given.items()}
    batch["upper"][1] = batch["lower"][1].nan_to_num(neginf=0.0) - 1.0
    leaves = {name: tensor.requires_grad_(requires_grad) for name, tensor in batch.items()}
    return leaves, solve_qp(**leaves, on_failure=on_failure)


def test_feasible_items_are_the_same_bit_for_bit() -> None:
    leaves, ordinary = mixed("nan")
    others, rescued = mixed("closest")
    assert rescued.status.tolist() == [SOLVED, CLOSEST, SOLVED]
    assert ordinary.status.tolist() == [SOLVED, int(hsbackend.Status.INFEASIBLE), SOLVED]
    feasible = [0, 2]
    for one, two in zip(
        (ordinary.primal, *vars(ordinary.multipliers).values()),
        (rescued.primal, *vars(rescued.multipliers).values()),
        strict=True,
    ):
        assert torch.equal(one[feasible], two[feasible])
        assert bool(two[1].isfinite().all())
    for part in shifts(rescued):
        assert_zero(part[feasible])
    assert bool(rescued.shift.upper[1].any())
    ordinary.primal[feasible].square().sum().backward()
    rescued.primal.square().sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad[feasible], others[name].grad[feasible]), name
        assert bool(others[name].grad[1].isfinite().all()), name


def test_nothing_is_shifted_where_nobody_asks() -> None:
    given = random_program(4, feasible=True)
    for solution in (solve_qp(**given), solve_qp(**given, on_failure="closest")):
        assert_zero(*shifts(solution))
        assert solution.shift.ineq.shape == given["h"].shape
        assert solution.shift.eq.shape == given["b"].shape


#: Data of which all limits take part: opposite rows, an equation out of reach of the box, a general row.
def contradiction() -> dict[str, Tensor]:
    root = torch.randn(2, 4, 4, dtype=D, generator=torch.Generator().manual_seed(3))
    G = torch.tensor([[1.0, 0.2, 0.0, 0.0], [-1.0, 0.1, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]], dtype=D)
    return {
        "Q": root @ root.mT + torch.eye(4, dtype=D),
        "q": torch.tensor([[1.0, -2.0, 0.3, 0.5], [0.0, 3.0, -1.0, 2.0]], dtype=D),
        "A": torch.tensor([[0.0, 0.0, 1.0, -0.5]], dtype=D), "b": vector(4.0), "G": G,
        "h": torch.tensor([[-1.0, -1.5, 7.0], [-2.0, -0.5, 9.0]], dtype=D), "lower": vector(-3.0, -2.0, -1.0, -1.0),
        "upper": vector(3.0, 2.0, 1.0, 1.0),
    }  # fmt: skip


def test_derivatives_of_the_composed_map() -> None:
    """Of the solution and of the shift, in all data, by differences of both steps together."""
    given = contradiction()
    solution = solve_qp(**given, on_failure="closest")
    assert solution.status.tolist() == [CLOSEST, CLOSEST]
    assert all(bool(part.any()) for part in shifts(solution))

    def both(Q: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        found = solve_qp(0.5 * (Q + Q.mT), *rest, on_failure="closest")
        return found.primal, *shifts(found)

    leaves = tuple(tensor.clone().requires_grad_() for tensor in given.values())
    assert gradcheck(both, leaves, check_forward_ad=True, atol=1e-6)
    fixed = leaves[:1]

    def primal(*limits: Tensor) -> Tensor:
        return both(fixed[0].detach(), leaves[1].detach(), *limits)[0]

    assert gradgradcheck(primal, leaves[2:], atol=1e-4)


def test_transforms_agree() -> None:
    given = contradiction()

    def function(h: Tensor, upper: Tensor) -> Tensor:
        return solve_qp(**(given | {"h": h, "upper": upper}), on_failure="closest").primal

    arguments = given["h"], given["upper"]
    wanted = torch.autograd.functional.jacobian(function, arguments)
    for found in (torch.func.jacrev(function, (0, 1))(*arguments), torch.func.jacfwd(function, (0, 1))(*arguments)):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_vmap_chooses_item_by_item() -> None:
    leaves, rescued = mixed("closest", requires_grad=False)

    def one(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        found = solve_qp(*tensors, on_failure="closest")
        return found.primal, found.status

    primal, status = torch.func.vmap(one)(*leaves.values())
    torch.testing.assert_close(primal, rescued.primal)
    assert torch.equal(status, rescued.status)


def test_compiled_in_one_graph() -> None:
    torch.compiler.reset()
    leaves, rescued = mixed("closest")

    def primal(*tensors: Tensor) -> Tensor:
        return solve_qp(*tensors, on_failure="closest").primal

    compiled = torch.compile(primal, fullgraph=True, backend="aot_eager")(*leaves.values())
    torch.testing.assert_close(compiled, rescued.primal)
    for one, other in zip(
        torch.autograd.grad(compiled.square().sum(), tuple(leaves.values())),
        torch.autograd.grad(rescued.primal.square().sum(), tuple(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
    torch.compiler.reset()


def test_training_becomes_feasible() -> None:
    """x >= 1 and x <= h with h = -1 at first; x should be 2, and is min(3, h) once there is room."""
    module = nn.QP(
        torch.eye(1, dtype=D), vector(-3.0), G=torch.ones(1, 1, dtype=D), h=torch.nn.Parameter(vector(-1.0)),
        lower=vector(1.0), on_failure="closest",
    )  # fmt: skip
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    statuses = []
    for _ in range(60):
        optimizer.zero_grad()
        solution = module()
        statuses.append(int(solution.status))
        (solution.primal - 2.0).square().sum().backward()
        optimizer.step()
    assert statuses[0] == CLOSEST
    assert statuses[-1] == SOLVED
    assert statuses == sorted(statuses, reverse=True)
    torch.testing.assert_close(module().primal, vector(2.0))
    torch.testing.assert_close(module.h.detach(), vector(2.0))


def test_the_penalty_on_the_shift_makes_a_problem_feasible() -> None:
    """The shift has a derivative of its own."""
    limits = vector(-1.0, -2.0).requires_grad_()
    optimizer = torch.optim.SGD([limits], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        solution = solve_qp(
            torch.eye(1, dtype=D), vector(0.0), G=torch.tensor([[1.0], [-1.0]], dtype=D), h=limits, on_failure="closest"
        )
        sum(part.square().sum() for part in shifts(solution)).backward()
        optimizer.step()
    assert float(limits.detach().sum()) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(limits.detach()[0] - limits.detach()[1], torch.tensor(1.0, dtype=D))


def test_other_failures_are_not_rescued() -> None:
    q = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=D)
    with pytest.raises(
        hsbackend.SolveError, match=r"1 of 2 items failed: item 0: unbounded, x\[1\] runs off"
    ) as raised:
        solve_qp(None, q, lower=vector(0.0, 0.0), on_failure="closest")
    assert raised.value.status.tolist() == [int(hsbackend.Status.UNBOUNDED), SOLVED]
    # Unbounded once the limits are shifted.
    with pytest.raises(hsbackend.SolveError, match=r"item 1: unbounded, x\[1\] runs off"):
        solve_qp(
            None, q[[1, 0]], lower=torch.tensor([[0.0, 0.0], [3.0, 0.0]], dtype=D), upper=vector(1.0, math.inf),
            on_failure="closest",
        )  # fmt: skip
    with pytest.raises(hsbackend.SolveError, match="item 0: the parameters hold NaN"):
        solve_qp(torch.eye(2, dtype=D), vector(math.nan, 0.0), upper=vector(1.0, 1.0), on_failure="closest")


def test_very_different_units() -> None:
    """The shift scales with the limits."""
    given = contradiction()
    wanted = solve_qp(**given, on_failure="closest")
    for scale in (1e-6, 1e6):
        scaled = {name: given[name] * scale for name in ("q", "b", "h", "lower", "upper")}
        found = solve_qp(**(given | scaled), on_failure="closest")
        assert found.status.tolist() == [CLOSEST, CLOSEST]
        torch.testing.assert_close(found.primal / scale, wanted.primal, rtol=1e-8, atol=1e-8)
        for one, other in zip(shifts(found), shifts(wanted), strict=True):
            torch.testing.assert_close(one / scale, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    given = {name: tensor.to(dtype) for name, tensor in contradiction().items()}
    module = nn.QP(**{name: given[name] for name in ("Q", "A", "G", "lower")}, on_failure="closest")
    module.A = torch.nn.Parameter(given["A"])
    rest = {name: given[name].requires_grad_() for name in ("q", "b", "h", "upper")}
    solution = module(**rest)
    exact = solve_qp(**{name: tensor.detach().double() for name, tensor in given.items()}, on_failure="closest")
    assert solution.status.tolist() == [CLOSEST, CLOSEST]
    for one, two in zip((solution.primal, *shifts(solution)), (exact.primal, *shifts(exact)), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), two, rtol=2e-3, atol=2e-3)
    solution.primal.sum().backward()
    for tensor in (*rest.values(), module.A):
        assert tensor.grad.dtype == dtype
        assert bool(tensor.grad.isfinite().all())


def test_barely_infeasible() -> None:
    """Limits that miss each other by little meet in the middle of the gap."""
    for gap in (1e-3, 1e-5, 1e-7):
        solution = solve_qp(
            torch.eye(1, dtype=D), vector(5.0), lower=vector(1.0 + gap), upper=vector(1.0), on_failure="closest"
        )
        assert int(solution.status) == CLOSEST
        assert float(solution.primal[0]) == pytest.approx(1.0 + 0.5 * gap, abs=1e-12)
        assert float(solution.shift.lower[0]) == pytest.approx(0.5 * gap, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Projections
# ----------------------------------------------------------------------------------------------------------------------


def test_projection_on_the_closest_set() -> None:
    """x_0 >= 1 and x_0 <= -1: the line x_0 = 0; with a weight too, and as a module."""
    G, h = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=D), torch.nn.Parameter(vector(-1.0, -1.0))
    v = torch.tensor([[2.0, 3.0], [-1.0, 0.5]], dtype=D, requires_grad=True)
    line = Polyhedron(G=G, h=h)
    for weight in (None, vector(1.0, 4.0)):
        x = project(v, line, weight=weight, on_failure="closest")
        torch.testing.assert_close(x, torch.tensor([[0.0, 3.0], [0.0, 0.5]], dtype=D))
    x = nn.Projection(line, on_failure="closest")(v)
    in_v, in_h = torch.autograd.grad(x.sum(), (v, h))
    torch.testing.assert_close(in_v, torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=D))
    torch.testing.assert_close(in_h, vector(1.0, -1.0))  # x_0 = (h_0 - h_1) / 2, twice
    room = Polyhedron(G=G, h=vector(1.0, 1.0))
    assert torch.equal(project(v, room, on_failure="closest"), project(v, room))


def test_named_sets_say_what_to_do() -> None:
    v = torch.zeros(3, dtype=D)
    simplex = Polyhedron.simplex(3, -1.0)
    with pytest.raises(hsbackend.InvalidOptionError, match=r"kind 'simplex': Polyhedron\(\*polyhedron.general\(\)\)"):
        project(v, simplex, on_failure="closest")
    with pytest.raises(hsbackend.InvalidOptionError, match="kind 'simplex'"):
        functional.simplex(v, -1.0, on_failure="closest")
    with pytest.raises(hsbackend.InvalidOptionError, match="clamp the radius"):
        nn.Projection(Polyhedron.l1_ball(3), on_failure="closest")
    # x >= 0 and sum x = -1: the bounds and the sum meet at sum x = -3/4.
    found = project(v, Polyhedron(*simplex.general()), on_failure="closest")
    torch.testing.assert_close(found, torch.full((3,), -0.25, dtype=D))
