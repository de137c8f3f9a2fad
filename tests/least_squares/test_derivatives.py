"""The derivative: against finite differences, dense factorisations and itself in another mode, and what it costs."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from hsbackend import AdjointNotConvergedWarning, lstsq
from spectra import SHAPES, bases, dense_solution, matrix, randn, spectrum

# Forward mode in torch imports it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")

FULL = {"atol": 0.0, "btol": 0.0}
DAMPINGS = ["none", "number", "coordinates", "some coordinates"]


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * (1.0 + expected.norm())


class Family:
    """``A(t, s) = U(t) diag(s) V(t)'``: the rank stays when t and s change."""

    def __init__(self, m: int, n: int, rank: int) -> None:
        self.bases = bases(1, m, n, rank)
        self.turns = tuple(0.5 * (skew - skew.mT) for skew in (randn(3, m, m), randn(4, n, n)))
        self.t, self.s = randn(5, 2) * 0.3, spectrum(rank, 4.0)

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        def turned(t: Tensor, skew: Tensor, basis: Tensor) -> Tensor:  # Cayley
            one = torch.eye(len(skew), dtype=basis.dtype)
            return torch.linalg.solve(one + t * skew, (one - t * skew) @ basis)

        left, right = (turned(t[k], self.turns[k], self.bases[k]) for k in range(2))
        return (left * s) @ right.mT


def damping(kind: str, n: int) -> Tensor | None:
    coordinates = randn(6, n).abs() + 0.2
    coordinates[::2] *= 0.0 if kind == "some coordinates" else 1.0
    return {"none": None, "number": torch.tensor(0.4, dtype=torch.float64)}.get(kind, coordinates)


@pytest.mark.parametrize(
    ("m", "n", "rank", "kind"),
    [
        (*shape, kind)
        for shape in SHAPES
        for kind in DAMPINGS
        if kind != "coordinates" or shape in (SHAPES[0], SHAPES[4])
    ],
)
def test_first_and_second_derivatives_in_both_modes(m, n, rank, kind) -> None:
    """With respect to everything at once; zeros among damped coordinates stay zero, and so does the rank."""
    family, damp = Family(m, n, rank), damping(kind, n)
    mask = None if damp is None else (damp != 0.0).to(damp)
    inputs = [family.t, family.s, randn(7, m), randn(8, n)] + ([] if damp is None else [damp])
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def solve(t, s, b, centre, d=None):
        d = 0.0 if d is None else d * mask
        return lstsq(family(t, s), b, damp=d, centre=centre, **FULL).x

    assert torch.autograd.gradcheck(
        solve, inputs, eps=1e-5, atol=1e-7, rtol=1e-6, check_forward_ad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(solve, inputs, eps=1e-5, atol=1e-6, rtol=1e-5, fast_mode=True)
    tangents = tuple(randn(20 + k, *tensor.shape) for k, tensor in enumerate(inputs))
    found = jvp(solve, tuple(inputs), tangents)[1]
    cotangent = randn(30, n)
    pulled = torch.autograd.grad(solve(*inputs), inputs, cotangent)
    expected = sum((one * d).sum() for one, d in zip(pulled, tangents, strict=True))
    same((found * cotangent).sum(), expected, 1e-8)


@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize(("m", "n"), [(7, 4), (4, 7), (5, 5)])
def test_the_hessian_of_a_loss_in_every_order_of_modes(m, n, damp) -> None:
    b = randn(2, m)

    def loss(A, solve=lstsq):
        return (solve(A, b, damp=damp, **FULL).x ** 3).sum()

    def dense(A, b, damp, **_):
        stacked = torch.cat([A, damp * torch.eye(n, dtype=A.dtype)]) if damp else A
        right = torch.cat([b, b.new_zeros(n)]) if damp else b
        gram = stacked.mT @ stacked if m >= n or damp else stacked @ stacked.mT
        x = torch.linalg.solve(gram, stacked.mT @ right) if m >= n or damp else A.mT @ torch.linalg.solve(gram, b)
        return type("Solution", (), {"x": x})

    A = matrix(1, m, n, min(m, n), 4.0)
    expected = hessian(lambda A: loss(A, dense))(A)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        same(outer(inner(loss))(A), expected, 1e-8)


def test_a_loss_whose_gradient_is_in_the_row_space_has_the_right_second_derivative() -> None:
    """There u = 0 at the point and not around it: leaving its term out would be right once and wrong twice."""
    A, b, target = matrix(1, 4, 7, 4), randn(2, 4), randn(3, 4)
    A.requires_grad_()
    x = lstsq(A, b, **FULL).x
    loss = 0.5 * (A @ x - target).square().sum() + (x**2).sum()
    (first,) = torch.autograd.grad(loss, A, create_graph=True)
    direction = randn(4, 4, 7)
    (second,) = torch.autograd.grad((first * direction).sum(), A)

    def dense(A):
        x = A.mT @ torch.linalg.solve(A @ A.mT, b)
        return 0.5 * (A @ x - target).square().sum() + (x**2).sum()

    same(first, grad(dense)(A))
    same(second, jvp(grad(dense), (A,), (direction,))[1])


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta:UserWarning")
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_every_kind_of_a_has_the_gradient_of_the_dense_one(damp) -> None:
    A = matrix(1, 7, 5, 5) * (randn(2, 7, 5) > -0.3)
    b, cotangent = randn(3, 7), randn(4, 5)
    like = torch.zeros(5, dtype=A.dtype)

    def gradients(make, leaf):
        leaf, right = leaf.clone().requires_grad_(), b.clone().requires_grad_()
        given, params, more = make(leaf)
        x = lstsq(given, right, *params, damp=damp, **more, **FULL).x
        return torch.autograd.grad(x, (leaf, right), cotangent)

    expected = gradients(lambda A: (A, (), {}), A)
    pattern = A != 0.0
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        found = gradients(lambda A: (A, (), {}), A.to_sparse(layout=layout))
        assert found[0].layout == layout
        same(found[0].to_dense(), expected[0] * pattern)
        same(found[1], expected[1])
    functions = {
        "by pullback": (lambda A: (lambda x, A: A @ x, (A,), {"x_like": like})),
        "pair": (lambda A: ((lambda x, A: A @ x, lambda y, A: A.mT @ y), (A,), {})),
    }
    for make in functions.values():
        found = gradients(make, A)
        same(found[0], expected[0])
        same(found[1], expected[1])
    right = b.clone().requires_grad_()
    lstsq(aslinearoperator(A.numpy()), right, damp=damp, **FULL).x.backward(cotangent)
    same(right.grad, expected[1])


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "function"])
def test_preconditioned_gradients(preconditioner) -> None:
    for (m, n, rank), damp in zip(SHAPES * 2, (0.0, 0.3) * len(SHAPES), strict=True):
        family, P = Family(m, n, rank), randn(5, n).abs() + 0.5
        if rank < n and not damp:
            continue  # another minimum norm, see test_values
        given = {None: None, "diagonal": P, "function": lambda x, P=P: P * x}[preconditioner]
        b = randn(6, m).requires_grad_()
        t, s = family.t.clone().requires_grad_(), family.s.clone().requires_grad_()
        d = torch.tensor(damp, dtype=torch.float64, requires_grad=True)
        x = lstsq(family(t, s), b, damp=d if damp else 0.0, preconditioner=given, **FULL).x
        found = torch.autograd.grad((x**3).sum(), (t, s, b, d), allow_unused=True)
        x = lstsq(family(t, s), b, damp=d if damp else 0.0, **FULL).x
        expected = torch.autograd.grad((x**3).sum(), (t, s, b, d), allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            if other is not None:
                same(one, other, 1e-8)


def test_transforms_and_batches_agree() -> None:
    A, b, cotangent = torch.stack([matrix(k, 7, 4, 4) for k in range(3)]), randn(3, 3, 7), randn(4, 3, 4)
    shared, damp = A[0], torch.tensor([[0.0], [0.1], [1.0]], dtype=torch.float64)
    like = torch.zeros(4, dtype=A.dtype)

    def loss(A, b, c, d):
        return (lstsq(A, b, damp=d, **FULL).x * c).sum()

    leaves = [A.clone().requires_grad_(), b.clone().requires_grad_(), damp.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(leaves[0], leaves[1], cotangent, leaves[2]), leaves)
    found = vmap(grad(loss, (0, 1, 3)))(A, b, cotangent, damp)
    for one, other in zip(found, expected, strict=True):
        same(one, other)

    def by_function(A, b, c, d):
        return (lstsq(lambda x, A: A @ x, b, A, x_like=like, damp=d, **FULL).x * c).sum()

    for one, other in zip(vmap(grad(by_function, (0, 1, 3)))(A, b, cotangent, damp), expected, strict=True):
        same(one, other)
    vector = damp.expand(3, 4) + 0.1
    one = vmap(jacfwd(lambda A, b, d: lstsq(A, b, damp=d, **FULL).x, (0, 1, 2)))(A, b, vector)
    other = vmap(jacrev(lambda A, b, d: lstsq(A, b, damp=d, **FULL).x, (0, 1, 2)))(A, b, vector)
    for left, right in zip(one, other, strict=True):
        same(left, right)
    # The gradient of a matrix that items share is the sum of theirs.
    leaf = shared.clone().requires_grad_()
    (total,) = torch.autograd.grad(loss(leaf, b, cotangent, damp), leaf)
    parts = vmap(grad(loss), in_dims=(None, 0, 0, 0))(shared, b, cotangent, damp)
    same(total, parts.sum(0))
    operator = aslinearoperator(shared.numpy())
    found = vmap(lambda b: lstsq(operator, b).x)(b)
    same(found, lstsq(shared, b).x, 1e-8)


def test_model_parameters_as_x_and_as_what_a_depends_on() -> None:
    """``J d`` for the Jacobian of a network, at and in its parameters: the constraint of null-space training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()
    at = {name: value.detach() for name, value in model.named_parameters()}
    data, direction = randn(1, 4, 3), {name: randn(2, *value.shape) for name, value in at.items()}

    def jacobian(d, at):
        return torch.func.jvp(lambda at: functional_call(model, at, (data,)), (at,), (d,))[1]

    def loss(at):
        step = lstsq(jacobian, data[:, :2], at, x_like=at, **FULL).x
        return sum((value**3).sum() for value in step.values())

    step = lstsq(jacobian, data[:, :2], at, x_like=at, **FULL)
    same(jacobian(step.x, at), data[:, :2])
    same(torch.stack(list(step.residual)), torch.zeros(4, 2, dtype=torch.float64))
    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    loss(leaves).backward()
    found = sum((leaves[name].grad * direction[name]).sum() for name in at)
    moved = [loss({k: v + h * direction[k] for k, v in at.items()}) for h in (1e-4, -1e-4, 2e-4, -2e-4)]
    slope = (8.0 * (moved[0] - moved[1]) - (moved[2] - moved[3])) / 12e-4
    assert abs(float(found - slope)) < 1e-7 * (1.0 + abs(float(slope)))
    assert abs(float(jvp(loss, (at,), (direction,))[1] - found)) < 1e-8 * (1.0 + abs(float(found)))


@pytest.mark.parametrize("transform", ["none", "grad", "jvp", "vmap"])
def test_parameters_hidden_in_a_closure_are_refused(transform) -> None:
    A, b = matrix(1, 7, 5, 5), randn(2, 7)

    def hidden(A):
        return lstsq(lambda x: A @ x, b, x_like=b[:5]).x.sum()

    call = {
        "none": lambda: hidden(A.clone().requires_grad_()),
        "grad": lambda: grad(hidden)(A),
        "jvp": lambda: jvp(hidden, (A,), (A,)),
        "vmap": lambda: vmap(hidden)(A.expand(2, 7, 5)),
    }[transform]
    with pytest.raises(ValueError, match="`matvec` uses tensors that are differentiated or mapped"):
        call()
    assert hidden(A).isfinite()


def exact(m: int, n: int, rank: int, condition: float, damp: float):
    """Return A, b, g and by their singular vectors, without cancellation, dL/dA and dL/ddamp for ``L = <g, x>``."""
    left, right = bases(1, m, n, rank)
    s, b, g = spectrum(rank, condition), randn(3, m), randn(4, n)
    ub, vg = left.mT @ b, right.mT @ g
    b_rest = b - left @ ub if rank < m else torch.zeros_like(b)
    g_rest = g - right @ vg if rank < n else torch.zeros_like(g)
    size = s**2 + damp**2
    r, w = damp**2 * (left @ (ub / size)) + b_rest, right @ (vg / size) + g_rest / damp**2
    to_A = torch.outer(r, w) - torch.outer(left @ (s / size * vg), right @ (s / size * ub))
    scale = 2.0 * damp * (vg / size).norm() * (s / size * ub).norm()
    return (left * s) @ right.mT, b, g, to_A, -2.0 * damp * (vg / size) @ (s / size * ub), scale


@pytest.mark.parametrize("damp", [1.0, 1e-1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("m", "n", "rank"), [(60, 30, 30), (30, 60, 30), (30, 30, 30), (60, 30, 20)])
def test_damping_far_below_the_singular_values_costs_a_solve_and_no_digits(m, n, rank, damp) -> None:
    A, b, g, to_A, to_damp, scale = exact(m, n, rank, 10.0, damp)
    A, d = A.requires_grad_(), torch.tensor(damp, dtype=torch.float64)
    solution = lstsq(A, b, damp=d, **FULL)
    solution.x.backward(g)
    assert (A.grad - to_A).norm() < 1e-13 * to_A.norm()
    (regime,) = solution.derivatives.regimes
    further = [bool(regime.w_by_solve), bool(regime.y_by_solve)]
    if damp >= 0.1 or rank < min(m, n) or m == n:
        assert further == [False, False]
        assert [solve.solves_for for solve in solution.derivatives.solves] == ["p"]
    else:  # w is lost where A is tall, r where it is wide
        assert further == [m > n, m < n]
    if rank == min(m, n) or damp >= 1e-2:
        d = d.requires_grad_()
        lstsq(A.detach(), b, damp=d, **FULL).x.backward(g)
        assert abs(d.grad - to_damp) < 1e-12 * scale


def test_what_a_backward_pass_costs_is_counted_and_little() -> None:
    A, b, g = matrix(1, 300, 200, 200, 30.0), randn(2, 300), randn(3, 200)
    calls = [0, 0]

    def matvec(x, A):
        calls[0] += 1
        return A @ x

    def vecmat(y, A):
        calls[1] += 1
        return A.mT @ y

    for damp, most in ((0.1, 1.1), (0.0, 2.2)):
        leaf = A.clone().requires_grad_()
        calls[:] = 0, 0
        solution = lstsq((matvec, vecmat), b, leaf, x_like=g, damp=damp)
        forward = int(solution.products) + int(solution.transposed_products)
        assert sum(calls) == forward
        calls[:] = 0, 0
        solution.x.backward(g)
        log = solution.derivatives
        assert [log.products, log.transposed_products] == calls
        assert sum(calls) <= most * forward
        assert log.converged
        log.clear()
        assert (log.products, log.transposed_products, log.solves, log.regimes) == (0, 0, [], [])
        right = b.clone().requires_grad_()
        solution = lstsq((matvec, vecmat), right, A, x_like=g, damp=damp)
        solution.x.backward(g)
        assert [solve.solves_for for solve in solution.derivatives.solves] == ["p"]


@pytest.mark.parametrize("damp", [0.0, 0.05])
@pytest.mark.parametrize(
    ("m", "n", "rank", "condition", "factored"),
    [(60, 30, 30, 10.0, True), (30, 60, 30, 1e3, True), (60, 30, 20, 10.0, False), (60, 30, 30, 1e7, False)],
)
def test_one_dense_matrix_is_factored_for_its_derivatives_where_it_has_full_rank(
    m, n, rank, condition, factored, damp
) -> None:
    A, b, g = matrix(1, m, n, rank, condition), randn(2, m), randn(3, n)
    like = torch.zeros(n, dtype=A.dtype)
    results = []
    for given, more in ((A, {}), (lambda x, A: A @ x, {"x_like": like})):
        leaf, right = A.clone().requires_grad_(), b.clone().requires_grad_()
        params = (leaf,) if more else ()
        solution = lstsq(given if more else leaf, right, *params, damp=damp, max_steps=9000, on_failure="keep", **more)
        with warnings.catch_warnings():
            if condition > 1e6:  # which is more than the solves can do without a factor, here and there
                warnings.simplefilter("ignore", AdjointNotConvergedWarning)
            results.append(torch.autograd.grad(solution.x, (leaf, right), g))
        solves = solution.derivatives.solves
        assert [solve.factored for solve in solves] == [not more and (factored or damp > 0.0)] * len(solves)
        if solves[0].factored and condition < 1e6:
            assert max(int(solve.iterations) for solve in solves) <= 3
    if condition < 1e6:
        for one, other in zip(*results, strict=True):
            same(one, other, 1e-6 if condition > 100.0 else 1e-8)
    # A factor that is kept is not used for another matrix.
    log = solution.derivatives
    log.clear()
    assert log.factor is None


@pytest.mark.parametrize(
    ("m", "n", "rank", "expected"), [(7, 4, 4, ["p", "w"]), (4, 7, 4, ["p", "y"]), (5, 5, 5, ["p"]), (7, 5, 3, None)]
)
def test_full_rank_saves_solves_without_damping(m, n, rank, expected) -> None:
    A = matrix(1, m, n, rank).requires_grad_()
    solution = lstsq(A, randn(2, m))
    solution.x.backward(randn(3, n))
    assert [solve.solves_for for solve in solution.derivatives.solves] == (expected or ["p", "w", "y"])


def test_an_adjoint_solve_that_does_not_converge_warns_in_its_own_category() -> None:
    A, b = matrix(1, 40, 30, 30, 1e3).requires_grad_(), torch.zeros(40, dtype=torch.float64)
    solution = lstsq(A, b, max_steps=4)  # b = 0 is solved at once, its adjoint is not
    with pytest.warns(AdjointNotConvergedWarning, match="the solve for p in a derivative of lstsq did not converge"):
        solution.x.backward(randn(2, 30))
    (solve,) = (solve for solve in solution.derivatives.solves if solve.solves_for == "p")
    assert int(solve.stop_reason) == 7
    assert not solve.converged
    assert not solution.derivatives.converged


def test_failed_items_poison_only_themselves() -> None:
    A, b = torch.stack([matrix(1, 7, 5, 5), matrix(2, 7, 5, 5)]), randn(3, 2, 7)
    b[0, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for on_failure in ("nan", "keep"):
            leaves = [A.clone().requires_grad_(), b.clone().requires_grad_()]
            x = lstsq(*leaves, damp=0.1, on_failure=on_failure, **FULL).x
            found = torch.autograd.grad(x[1].sum(), leaves, retain_graph=True)
            assert all((tensor[0] == 0.0).all() for tensor in found)
            alone = [A[1].clone().requires_grad_(), b[1].clone().requires_grad_()]
            expected = torch.autograd.grad(lstsq(*alone, damp=0.1, **FULL).x.sum(), alone)
            for one, other in zip(found, expected, strict=True):
                same(one[1], other)
            found = torch.autograd.grad(x.sum(), leaves)
            for one, other in zip(found, expected, strict=True):
                assert one[0].isnan().all()
                same(one[1], other)


def test_the_start_gets_no_gradient_and_changes_none() -> None:
    A, b, x0 = matrix(1, 7, 5, 5).requires_grad_(), randn(2, 7), randn(3, 5).requires_grad_()
    (found,) = torch.autograd.grad((lstsq(A, b, damp=0.2, x0=x0, **FULL).x ** 3).sum(), A)
    (expected,) = torch.autograd.grad((lstsq(A, b, damp=0.2, **FULL).x ** 3).sum(), A)
    same(found, expected)
    assert not lstsq(A.detach(), b, damp=0.2, x0=x0).x.requires_grad


def test_old_batched_cotangents_are_refused_in_words() -> None:
    b = randn(2, 7).requires_grad_()
    x = lstsq(matrix(1, 7, 5, 5), b).x
    with pytest.raises(RuntimeError, match=r"use torch\.func\.jacrev or torch\.func\.vmap"):
        torch.autograd.grad(x, b, torch.eye(5, dtype=x.dtype), is_grads_batched=True)


@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_single_precision_gradients(damp) -> None:
    A, b, g = matrix(1, 7, 5, 5), randn(2, 7), randn(3, 5)

    def gradient(dtype):
        leaf = A.to(dtype).requires_grad_()
        lstsq(leaf, b.to(dtype), damp=damp).x.backward(g.to(dtype))
        assert leaf.grad.dtype == dtype
        return leaf.grad.double()

    same(gradient(torch.float32), gradient(torch.float64), 1e-4)


def test_dense_gradients_that_torch_lstsq_has_not() -> None:
    """Rank-deficient, where torch's own gradient is that of the formula for full rank."""
    family = Family(7, 5, 3)
    b, g = randn(2, 7), randn(3, 5)
    t = family.t.clone().requires_grad_()
    lstsq(family(t, family.s), b, **FULL).x.backward(g)
    h = 1e-5

    def loss(t):
        return dense_solution(family(t, family.s), b) @ g

    for k in range(2):
        e = h * torch.eye(2, dtype=t.dtype)[k]
        assert abs((loss(family.t + e) - loss(family.t - e)) / (2 * h) - t.grad[k]) < 1e-7
