"""Quadratic programs through the public function."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hsbackend
from generators import random_case
from hsbackend import Polyhedron, project, qp_operators, qp_program, solve_qp
from hsbackend import pseudo_inverse as inverses
from hsbackend.qp import QPSolution
from hsbackend.status import failure_message

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

D = torch.float64
NAMES = ("Q", "q", "A", "b", "G", "h", "lower", "upper")


def data(n: int = 4, p: int = 1, m: int = 3, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return a program, in parts with a batch axis and in parts shared, that is feasible."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=D, generator=generator)

    root = normal(batch, n, n)
    inside = 0.3 * normal(n)
    rows, general = normal(p, n), normal(batch, m, n)
    quadratic = root @ root.mT / n + 0.3 * torch.eye(n, dtype=D)
    upper = (inside + 0.5).expand(batch, n).clone()
    return {
        "Q": quadratic, "q": 2.0 * normal(batch, n), "A": rows, "b": rows @ inside, "G": general,
        "h": general @ inside + 0.2, "lower": inside - 0.5, "upper": upper,
    }  # fmt: skip


def parts(solution: QPSolution) -> tuple[Tensor, ...]:
    """Return everything differentiable."""
    multipliers = solution.multipliers
    return solution.primal, multipliers.eq, multipliers.ineq, multipliers.lower, multipliers.upper


def symmetric(Q: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Solve with the symmetric part of Q, so that every entry may be moved."""
    return parts(solve_qp(0.5 * (Q + Q.mT), *rest))


def assert_optimal(given: dict[str, Tensor | None], solution: QPSolution, tolerance: float = 1e-9) -> None:
    """Check the KKT conditions from scratch, and that the solution's own residuals say the same."""
    x, z = solution.primal, solution.multipliers
    Q, q, A, b, G, h, lower, upper = (given.get(name) for name in NAMES)
    dual = (Q * x if Q.dim() == 1 else (Q @ x.unsqueeze(-1)).squeeze(-1)) + q - z.lower + z.upper
    primal = [torch.zeros_like(x[..., :1])]
    complementarity = [torch.zeros_like(x[..., :1])]
    if A is not None:
        dual = dual + (A.mT @ z.eq.unsqueeze(-1)).squeeze(-1)
        primal.append(((A @ x.unsqueeze(-1)).squeeze(-1) - b).abs())
    slacks = []
    if G is not None:
        dual = dual + (G.mT @ z.ineq.unsqueeze(-1)).squeeze(-1)
        slacks.append((h - (G @ x.unsqueeze(-1)).squeeze(-1), z.ineq))
    if lower is not None:
        slacks.append((x - lower, z.lower))
    if upper is not None:
        slacks.append((upper - x, z.upper))
    for slack, multiplier in slacks:
        assert bool((multiplier >= 0.0).all())
        primal.append((-slack).clamp(min=0.0))
        complementarity.append(torch.where(slack.isinf(), multiplier, slack * multiplier).abs())
    wanted = (torch.cat(primal, -1).amax(-1), dual.abs().amax(-1), torch.cat(complementarity, -1).amax(-1))
    found = solution.residuals
    for own, residual in zip(wanted, (found.primal, found.dual, found.complementarity), strict=True):
        assert residual.shape == solution.status.shape
        assert float(own.max()) <= tolerance
        torch.testing.assert_close(residual, own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", list(product([False, True], repeat=4)))
@pytest.mark.parametrize("batch", [1, 3])
def test_every_combination_of_constraints_is_optimal(given: tuple[bool, ...], batch: int) -> None:
    everything = data(batch=batch)
    equations, inequalities, below, above = given
    absent = {"A": equations, "b": equations, "G": inequalities, "h": inequalities, "lower": below, "upper": above}
    program = {name: None if not absent.get(name, True) else tensor for name, tensor in everything.items()}
    solution = solve_qp(**program)
    assert_optimal(program, solution)
    assert solution.primal.shape == (batch, 4)
    assert solution.multipliers.eq.shape == (batch, int(equations))
    assert solution.multipliers.ineq.shape == (batch, 3 * int(inequalities))
    assert bool((solution.status == hsbackend.Status.SOLVED).all())


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_with_known_answers(seed: int) -> None:
    """Dependent, duplicated, empty and weakly active rows."""
    case = random_case(seed + 500)
    me = case.equalities
    tensors = [torch.tensor(array) for array in (case.hessian, case.linear, case.rows, case.rhs)]
    hessian, linear, rows, rhs = tensors
    solution = solve_qp(hessian, linear, rows[:, :me], rhs[:, :me], rows[:, me:], rhs[:, me:])
    torch.testing.assert_close(solution.primal, torch.tensor(case.primal), rtol=0, atol=1e-7)
    known = {"Q": hessian, "q": linear, "A": rows[:, :me], "b": rhs[:, :me], "G": rows[:, me:], "h": rhs[:, me:]}
    assert_optimal(known, solution, 1e-7)


def test_unbatched_diagonal_and_shapes() -> None:
    q = torch.tensor([-3.0, 1.0], dtype=D)
    solution = solve_qp(torch.tensor([2.0, 1.0], dtype=D), q, upper=torch.tensor([1.0, math.inf], dtype=D))
    torch.testing.assert_close(solution.primal, torch.tensor([1.0, -1.0], dtype=D))
    torch.testing.assert_close(solution.multipliers.upper, torch.tensor([1.0, 0.0], dtype=D))
    assert solution.status.shape == ()
    assert solution.residuals.dual.shape == ()
    assert solution.active_set.upper.tolist() == [True, False]
    assert solution.active_set.ineq.shape == (0,)
    batched = solve_qp(torch.eye(2, dtype=D), torch.zeros(3, 1, 2, dtype=D), lower=torch.ones(4, 2, dtype=D))
    assert batched.primal.shape == (3, 4, 2)
    empty = solve_qp(
        torch.eye(2, dtype=D), torch.zeros(0, 2, dtype=D, requires_grad=True), lower=torch.ones(2, dtype=D)
    )
    assert empty.primal.shape == (0, 2)
    empty.primal.sum().backward()


def test_infinite_limits_are_no_constraints() -> None:
    given = data()
    given["h"][:, 1] = math.inf
    given["lower"][2] = -math.inf
    given["upper"][0] = math.inf
    solution = solve_qp(**given)
    assert_optimal(given, solution)
    keep = [0, 2]
    other = solve_qp(**{**given, "G": given["G"][:, keep], "h": given["h"][:, keep]})
    torch.testing.assert_close(solution.primal, other.primal)
    assert not bool(solution.active_set.ineq[:, 1].any())


@pytest.mark.parametrize("huge", [1e6, 1e9, 1e10, 1e12, 1e14, 1e20, 1e30])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_huge_limits_do_not_hide_the_others(huge: float, scale: float) -> None:
    """A limit of 1e20 stands for none: it may neither decide the units nor what counts as a contradiction."""
    given = data()
    for name in ("q", "b", "h", "lower", "upper"):
        given[name] = given[name] * scale
    wanted = solve_qp(**given)
    for name in ("lower", "upper"):
        given[name] = given[name].expand(2, 4).clone()
    given["G"] = torch.cat([given["G"], torch.ones(2, 1, 4, dtype=D)], dim=1)
    given["h"] = torch.cat([given["h"], torch.full((2, 1), huge * scale, dtype=D)], dim=1)
    found = solve_qp(**given)
    torch.testing.assert_close(found.primal / scale, wanted.primal / scale, rtol=1e-9, atol=1e-9)
    given["lower"][1] = given["upper"][1] + scale
    found = solve_qp(**given, on_failure="nan")
    assert found.status.tolist() == [0, int(hsbackend.Status.INFEASIBLE)]
    rescued = solve_qp(**given, on_failure="closest")
    wanted = solve_qp(**(given | {"G": given["G"][:, :3], "h": given["h"][:, :3]}), on_failure="closest")
    torch.testing.assert_close(rescued.primal / scale, wanted.primal / scale, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(rescued.shift.upper / scale, wanted.shift.upper / scale, rtol=1e-8, atol=1e-8)


def test_active_set() -> None:
    given = data()
    solution = solve_qp(**given)
    slack = given["h"] - (given["G"] @ solution.primal.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(solution.active_set.ineq, slack.abs() < 1e-9)
    assert torch.equal(solution.active_set.lower, (solution.primal - given["lower"]).abs() < 1e-9)
    assert torch.equal(solution.active_set.upper, (solution.primal - given["upper"]).abs() < 1e-9)
    assert int(solution.active_set.ineq.sum() + solution.active_set.lower.sum() + solution.active_set.upper.sum()) > 0


def test_first_derivatives() -> None:
    given = tuple(tensor.requires_grad_() for tensor in data().values())
    assert gradcheck(symmetric, given, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False)


def test_second_derivatives() -> None:
    given = tuple(tensor.requires_grad_() for tensor in data(n=3, m=2).values())
    assert gradgradcheck(symmetric, given, check_fwd_over_rev=True, check_rev_over_rev=True, atol=1e-4)


def test_a_diagonal_and_infinite_limits_have_derivatives() -> None:
    given = data(batch=1)
    finite = torch.tensor([True, False, True])

    def function(Q: Tensor, q: Tensor, h: Tensor, lower: Tensor) -> tuple[Tensor, ...]:
        limits = torch.where(finite, h, math.inf)
        return parts(solve_qp(Q, q, G=given["G"], h=limits, lower=lower))

    leaves = (torch.rand(4, dtype=D) + 0.5, given["q"], given["h"], given["lower"])
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    assert gradcheck(function, leaves, check_forward_ad=True)
    plain = torch.autograd.grad(function(*leaves)[0].sum(), leaves)
    again = torch.autograd.grad(function(*leaves)[0].sum(), leaves, create_graph=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_both_ways_of_the_backward_pass_agree(scale: float) -> None:
    """The solver's factorisation, and the same system in torch operations; shared tensors get sums; any units."""
    given = data()
    for name in ("q", "b", "h", "lower", "upper"):
        given[name] = given[name] * scale
    leaves = tuple(tensor.requires_grad_() for tensor in given.values())
    outputs = parts(solve_qp(**given))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(output.shape, dtype=D, generator=generator) for output in outputs]
    plain = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    again = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    for leaf, one, other in zip(leaves, plain, again, strict=True):
        assert one.shape == leaf.shape
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.detach().abs().max()))
        assert other.requires_grad


def test_transforms_agree() -> None:
    given = tuple(data().values())
    every = tuple(range(len(NAMES)))
    wanted = torch.autograd.functional.jacobian(symmetric, given)
    for found in (torch.func.jacrev(symmetric, every)(*given), torch.func.jacfwd(symmetric, every)(*given)):
        for row, wanted_row in zip(found, wanted, strict=True):
            for one, other in zip(row, wanted_row, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_vmap_is_a_loop() -> None:
    given = data(batch=3)
    dims = tuple(0 if name in ("Q", "q", "G", "h", "upper") else None for name in NAMES)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return parts(solve_qp(*tensors))

    found = torch.func.vmap(function, in_dims=dims)(*given.values())
    for one, other in zip(found, parts(solve_qp(**given)), strict=True):
        torch.testing.assert_close(one, other)
    gradient = torch.func.vmap(torch.func.grad(lambda *tensors: function(*tensors)[0].sum(), (0, 2)), in_dims=dims)
    leaves = {name: given[name].clone().requires_grad_() for name in ("Q", "A")}
    solve_qp(**(given | leaves)).primal.sum().backward()
    per_item = gradient(*given.values())
    torch.testing.assert_close(per_item[0], leaves["Q"].grad)
    torch.testing.assert_close(per_item[1].sum(0), leaves["A"].grad)


def test_vmap_of_second_derivatives() -> None:
    """Mapped data inside a mapped Jacobian: the matrices have one axis less in front than the right-hand sides."""
    given = data(n=3, m=2, batch=3)

    def scalar(Q: Tensor, q: Tensor) -> Tensor:
        return (symmetric(Q, q, given["A"], given["b"], given["G"][0], given["h"][0])[0] ** 3).sum()

    transforms = torch.func.jacrev, torch.func.jacfwd
    found = [
        torch.func.vmap(outer(inner(scalar, (0, 1)), (0, 1)))(given["Q"], given["q"])
        for outer, inner in product(transforms, repeat=2)
    ]
    for item in range(3):
        wanted = torch.autograd.functional.hessian(scalar, (given["Q"][item], given["q"][item]))
        for hessian in found:
            for row, wanted_row in zip(hessian, wanted, strict=True):
                for one, other in zip(row, wanted_row, strict=True):
                    torch.testing.assert_close(one[item], other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend: str) -> None:
    torch.compiler.reset()
    given = data()
    leaves = tuple(tensor.requires_grad_() for tensor in given.values())
    compiled = torch.compile(lambda *tensors: solve_qp(*tensors), fullgraph=True, backend=backend)
    gradients = []
    for call in (compiled, solve_qp):
        solution = call(*leaves)
        assert isinstance(solution, QPSolution)
        assert float(solution.residuals.dual.max()) < 1e-9
        gradients.append(torch.autograd.grad(sum((part**2).sum() for part in parts(solution)), leaves))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    torch.compiler.reset()


def test_operator_contracts() -> None:
    given = data()
    flat = [tensor if tensor.dim() == (3 if name in "QAG" else 2) else tensor[None] for name, tensor in given.items()]
    leaves = [tensor.requires_grad_() for tensor in flat]
    torch.library.opcheck(qp_operators._solve_op, (1e-9, "active", "", False, *leaves))
    root = torch.randn(3, 5, 5, dtype=D)
    matrix = (root + root.mT).requires_grad_()
    torch.library.opcheck(inverses._pseudo_inverse_op, (matrix,))


def test_pseudo_inverse_of_a_singular_matrix() -> None:
    """The four conditions of Penrose whatever the units of rows; the derivative along changes that keep the rank."""
    root = torch.randn(5, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    units = torch.tensor([1.0, 1e3, 1e-3, 1e2, 1e-2], dtype=D)
    factor = units.unsqueeze(-1) * root
    matrix = factor @ factor.mT
    inverse, null = (found[0] for found in inverses.pseudo_inverse(matrix[None]))
    torch.testing.assert_close(inverse, inverse.mT, rtol=1e-6, atol=0.0)
    torch.testing.assert_close((matrix @ inverse @ matrix) / torch.outer(units, units), root @ root.mT)
    torch.testing.assert_close(null, torch.eye(5, dtype=D) - factor @ torch.linalg.pinv(factor), atol=1e-9, rtol=0.0)
    assert float((null @ inverse).abs().max()) < 1e-12 * float(inverse.abs().max())

    def of_factor(factor: Tensor) -> tuple[Tensor, ...]:
        return inverses.pseudo_inverse((factor @ factor.mT)[None])

    leaf = root.clone().requires_grad_()
    assert gradcheck(of_factor, leaf, check_forward_ad=True)
    assert gradgradcheck(of_factor, leaf, check_fwd_over_rev=True)
    regular = root.mT @ root
    inverse, null = inverses.pseudo_inverse(regular[None])
    torch.testing.assert_close(inverse[0], torch.linalg.inv(regular))
    assert not null.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    given = {name: tensor.to(dtype).requires_grad_() for name, tensor in data().items()}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    solution, wanted = solve_qp(**given), solve_qp(**exact)
    assert all(part.dtype == dtype for part in parts(solution))
    assert solution.residuals.dual.dtype == D
    torch.testing.assert_close(solution.primal.double(), wanted.primal, rtol=0.01, atol=0.01)
    solution.primal.sum().backward()
    for tensor in given.values():
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        assert tensor.grad.shape == tensor.shape


def test_support_and_active_differ_at_a_tie() -> None:
    q = torch.zeros(2, dtype=D, requires_grad=True)
    for choice, wanted in (("active", [[0.0, 0.0], [0.0, -1.0]]), ("support", [[-1.0, 0.0], [0.0, -1.0]])):

        def solve(q: Tensor, choice: str = choice) -> Tensor:
            return solve_qp(torch.ones(2, dtype=D), q, lower=torch.tensor([0.0, -1.0], dtype=D), jacobian=choice).primal

        matrix = torch.tensor(wanted, dtype=D)
        torch.testing.assert_close(torch.autograd.functional.jacobian(solve, q), matrix)
        torch.testing.assert_close(torch.func.jacfwd(solve)(q), matrix)


def test_tolerance_is_passed_on() -> None:
    """Unreachable accuracy is an outcome, not a silent wrong answer."""
    given = data()
    with pytest.raises(hsbackend.SolveError, match="the requested tolerance was not reached"):
        solve_qp(**given, tolerance=1e-30)


def test_no_grad_keeps_nothing() -> None:
    given = {name: tensor.requires_grad_() for name, tensor in data().items()}
    with torch.no_grad():
        solution = solve_qp(**given)
    assert not solution.primal.requires_grad
    assert solve_qp(**{name: tensor.detach() for name, tensor in given.items()}).primal.grad_fn is None


def test_failing_items() -> None:
    given = data()
    given["h"][1] = -100.0
    with pytest.raises(hsbackend.SolveError, match=r"1 of 2 items failed: item 1: infeasible, .*row \d of G"):
        solve_qp(**given)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    solution = solve_qp(**leaves, on_failure="nan")
    assert solution.status.tolist() == [0, int(hsbackend.Status.INFEASIBLE)]
    assert bool(solution.primal[1].isnan().all())
    assert bool(solution.multipliers.ineq[1].isnan().all())
    for create_graph in (False, True):
        gradients = torch.autograd.grad(
            solution.primal[0].sum(), tuple(leaves.values()), retain_graph=True, create_graph=create_graph
        )
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        gradients = torch.autograd.grad(
            solution.primal.sum(), tuple(leaves.values()), retain_graph=True, create_graph=create_graph
        )
        for name, gradient in zip(NAMES, gradients, strict=True):
            assert bool(gradient.isnan().any()), name
            if len(gradient) == 2 and name not in ("A", "b"):
                assert bool(gradient[0].isfinite().all()), name


def assert_certified(given: dict[str, Tensor], solution: QPSolution) -> None:
    """Check the certificates of a batch from scratch; limits are those that are given."""
    found = solution.certificates
    names = ("A", "b", "G", "h", "lower", "upper")
    A, b, G, h, lower, upper = (given.get(name) for name in names)
    zero = torch.zeros_like(solution.primal)
    combination, value, largest = found.upper - found.lower, zero.sum(-1), zero.sum(-1)
    moved = zero[..., :1]
    for matrix, right, part in ((A, b, found.eq), (G, h, found.ineq)):
        if matrix is not None and right is not None:
            combination = combination + (matrix.mT @ part.unsqueeze(-1)).squeeze(-1)
            value = value + torch.where(part != 0.0, right * part, 0.0).sum(-1)
            step = (matrix @ found.ray.unsqueeze(-1)).squeeze(-1)
            moved = torch.cat([moved, step.abs() if right is b else torch.where(right.isinf(), 0.0, step)], -1)
    for limit, part, sign in ((lower, found.lower, -1.0), (upper, found.upper, 1.0)):
        if limit is not None:
            value = value + sign * torch.where(part != 0.0, limit * part, 0.0).sum(-1)
            moved = torch.cat([moved, torch.where(limit.isinf(), 0.0, sign * found.ray)], -1)
    for part in (found.eq, found.ineq, found.lower, found.upper):
        largest = torch.maximum(largest, torch.cat([moved[..., :1] * 0.0, part.abs()], -1).amax(-1))
    assert float(combination.abs().max()) < 1e-8
    assert all(bool((part >= 0.0).all()) for part in (found.ineq, found.lower, found.upper))
    infeasible = solution.status == int(hsbackend.Status.INFEASIBLE)
    unbounded = solution.status == int(hsbackend.Status.UNBOUNDED)
    assert bool(((value < -1e-9) == infeasible).all())
    torch.testing.assert_close(largest, infeasible.double())
    torch.testing.assert_close(found.ray.abs().amax(-1), unbounded.double())
    assert float(moved.max()) < 1e-8
    falls = (given["q"] * found.ray).sum(-1)
    assert bool(((falls < -1e-9) == unbounded).all())
    Q = given.get("Q")
    if Q is not None:
        assert float((Q @ found.ray.unsqueeze(-1)).abs().max()) < 1e-8


@pytest.mark.parametrize("seed", range(20))
def test_certificates(seed: int) -> None:
    """Of a batch with feasible, infeasible and unbounded items."""
    given = data(n=5, m=4, batch=6, seed=seed)
    given["Q"][3:, -2:], given["Q"][3:, :, -2:] = 0.0, 0.0
    given["lower"] = given["lower"].expand(6, 5).clone()
    given["lower"][2, 0] = given["upper"][2, 0] + 1.0
    given["h"][1] = given["h"][1] - 3.0
    given["h"][4:] = math.inf
    given["lower"][4:], given["upper"][4:] = -math.inf, math.inf
    solution = solve_qp(**given, on_failure="nan")
    statuses = solution.status.tolist()
    assert statuses[2] == int(hsbackend.Status.INFEASIBLE)
    assert statuses[4:] == [int(hsbackend.Status.UNBOUNDED)] * 2
    assert_certified(given, solution)


def test_certificates_by_hand() -> None:
    lower, upper = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=D), torch.tensor([1.0, math.inf], dtype=D)
    solution = solve_qp(None, torch.tensor([1.0, -1.0], dtype=D), lower=lower, upper=upper, on_failure="nan")
    assert solution.status.tolist() == [int(hsbackend.Status.INFEASIBLE), int(hsbackend.Status.UNBOUNDED)]
    found = solution.certificates
    torch.testing.assert_close(found.lower, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D))
    torch.testing.assert_close(found.upper, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D))
    torch.testing.assert_close(found.ray, torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=D))
    assert found.eq.shape == (2, 0)
    # Without a batch axis, in other units, and after a rescue.
    alone = solve_qp(
        None, torch.ones(1, dtype=D), lower=1e5 * lower[0, :1], upper=1e5 * upper[:1], on_failure="closest"
    )
    torch.testing.assert_close(alone.certificates.lower, torch.ones(1, dtype=D))
    assert not solve_qp(torch.ones(1, dtype=D), torch.ones(1, dtype=D)).certificates.ray.any()


def test_messages_name_rows_and_variables() -> None:
    q = torch.tensor([1.0, -1.0, 0.0], dtype=D)
    with pytest.raises(hsbackend.SolveError, match=r"item 0: unbounded, x\[1\] runs off to infinity"):
        solve_qp(None, q, lower=torch.zeros(3, dtype=D))
    with pytest.raises(hsbackend.SolveError, match=r"item 0: unbounded, x\[0\] and x\[1\] run off to infinity"):
        solve_qp(None, q[:2], torch.ones(1, 2, dtype=D), torch.zeros(1, dtype=D))
    with pytest.raises(hsbackend.SolveError, match=r"the lower bound of x\[2\] and the upper bound of x\[2\] conflict"):
        solve_qp(None, q, lower=torch.ones(3, dtype=D), upper=torch.tensor([2.0, 2.0, 0.0], dtype=D))


def test_status_of_every_kind_has_a_sentence() -> None:
    codes = np.array([int(status) for status in hsbackend.Status], dtype=np.int8)
    message = failure_message(codes, {})
    assert message.startswith(f"{len(codes) - 2} of {len(codes)} items failed")
    for status in hsbackend.Status:
        assert (status.sentence in message) == (status not in (hsbackend.Status.SOLVED, hsbackend.Status.CLOSEST))


def test_multipliers_of_dependent_rows_satisfy_the_conditions() -> None:
    """Which of them is not promised; the derivative of x is the same whatever they are."""
    Q, q = torch.eye(3, dtype=D), torch.tensor([-3.0, -2.0, 0.5], dtype=D, requires_grad=True)
    row = torch.tensor([1.0, 1.0, 0.0], dtype=D)
    G, h = torch.stack([row, 2.0 * row, row]), torch.tensor([1.0, 2.0, 1.0], dtype=D)
    solution = solve_qp(Q, q, G=G, h=h)
    assert_optimal({"Q": Q, "q": q.detach(), "G": G, "h": h}, solve_qp(Q, q.detach(), G=G, h=h))
    single = solve_qp(Q, q, G=G[:1], h=h[:1])
    torch.testing.assert_close(
        solution.multipliers.ineq @ torch.tensor([1.0, 2.0, 1.0], dtype=D), single.multipliers.ineq[0]
    )
    for x, y in zip(solution.primal, single.primal, strict=True):
        one, other = (torch.autograd.grad(value, q, retain_graph=True)[0] for value in (x, y))
        torch.testing.assert_close(one, other)


def test_curvature_where_the_equations_leave_room_is_enough() -> None:
    Q = torch.diag(torch.tensor([1.0, 0.0], dtype=D))
    rows = torch.tensor([[0.0, 1.0]], dtype=D)
    solution = solve_qp(Q, torch.ones(2, dtype=D), rows, torch.ones(1, dtype=D))
    torch.testing.assert_close(solution.primal, torch.tensor([-1.0, 1.0], dtype=D))


I2, ONES = torch.eye(2), torch.ones(2)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"Q": torch.ones(2, 2).long(), "q": ONES}, TypeError, "`Q` has dtype torch.int64"),
        ({"Q": I2, "q": torch.tensor(1.0)}, ValueError, "`q` has no axes"),
        ({"Q": torch.eye(3), "q": ONES}, ValueError, r"`Q` has shape \(3, 3\), expected \(..., 2, 2\)"),
        ({"Q": torch.ones(3), "q": ONES}, ValueError, r"`Q` has shape \(3,\), expected \(..., 2\)"),
        ({"Q": I2, "q": ONES, "A": torch.ones(1, 2)}, ValueError, "`A` was given without `b`"),
        ({"Q": I2, "q": ONES, "h": torch.ones(1)}, ValueError, "`h` was given without `G`"),
        ({"Q": I2, "q": ONES, "G": torch.ones(1, 2), "h": torch.ones(3)}, ValueError, r"`G` .* expected \(..., 3, 2\)"),
        ({"Q": I2, "q": ONES, "lower": torch.ones(3)}, ValueError, r"`lower` has shape \(3,\), expected \(..., 2\)"),
        ({"Q": I2, "q": torch.ones(3, 2), "lower": torch.ones(4, 2)}, ValueError, r"not broadcast: .*`lower` \(4,\)"),
        ({"Q": I2, "q": ONES, "jacobian": "all"}, hsbackend.InvalidOptionError, "jacobian='all' is unknown"),
        ({"Q": I2, "q": ONES, "on_failure": "x"}, hsbackend.InvalidOptionError, "'raise', 'nan' or 'closest'"),
        ({"Q": None, "q": None}, ValueError, "a program needs `q`"),
    ],
)  # fmt: skip
def test_messages(given: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solve_qp(**given)


def test_programs_are_kept_by_structure_and_constants() -> None:
    entries = qp_program.CACHE._entries
    entries.clear()
    for seed in range(3):
        solve_qp(**data(n=7, m=2, seed=seed))
    assert len(entries) == 1
    given = data()
    for _ in range(3):  # equal constants at another address each time
        project(given["q"], Polyhedron(given["A"].clone(), given["b"].clone()))
    assert len(entries) == 2
    for shift in range(2 * qp_program.KEPT):
        project(given["q"], Polyhedron(given["A"], given["b"] + 0.1 * shift))
    # A constant at the address of an earlier one, freed since, takes its place: the number kept may be smaller.
    assert 2 < len(entries) <= qp_program.KEPT
