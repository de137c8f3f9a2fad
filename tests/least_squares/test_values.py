"""The solution: every kind of A and every option, against the pseudo-inverse."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import aslinearoperator
from scipy.sparse.linalg import lsmr as scipy_lsmr

import hsbackend
from hsbackend import SolveError, Status, StopReason, lstsq
from spectra import SHAPES, dense_solution, matrix, randn

TIGHT = {"atol": 1e-14, "btol": 1e-14}


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * (1.0 + expected.norm())


@pytest.mark.parametrize("damp", ["none", "number", "zero", "coordinates", "some coordinates"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_the_solution_is_that_of_the_pseudo_inverse(m, n, rank, centred, damp) -> None:
    A, b = matrix(1, m, n, rank, 100.0), randn(3, m)
    centre = randn(4, n) if centred else None
    coordinates = randn(5, n).abs() + 0.1
    some = coordinates.clone()
    some[::2] = 0.0
    value = {
        "none": 0.0, "number": 0.3, "zero": torch.zeros((), dtype=torch.float64), "coordinates": coordinates,
        "some coordinates": some,
    }[damp]  # fmt: skip
    found = lstsq(A, b, damp=value, centre=centre, **TIGHT)
    expected = dense_solution(A, b, value, 0.0 if centre is None else centre)
    same(found.x, expected)
    same(found.residual, b - A @ expected)
    assert bool(found.converged)
    shift = expected if centre is None else expected - centre
    d = torch.as_tensor(value, dtype=A.dtype).expand(n)
    size = torch.linalg.vector_norm(torch.cat([b - A @ expected, d * shift]))
    assert math.isclose(float(found.norms.residual), float(size), rel_tol=1e-8, abs_tol=1e-8)
    assert math.isclose(float(found.norms.x), float(shift.norm()), rel_tol=1e-8)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize(("m", "n", "rank"), [(60, 40, 40), (40, 60, 40), (60, 40, 25)])
def test_prescribed_spectra_up_to_a_condition_of_1e5(m, n, rank, condition) -> None:
    A, b = matrix(1, m, n, rank, condition), randn(3, m)
    found = lstsq(A, b, max_steps=5000, **TIGHT)
    assert bool(found.converged)
    same(found.x, dense_solution(A, b), 1e-13 * condition**2 + 1e-11)
    assert 0.02 * condition < float(found.condition) < 2.0 * condition  # an estimate, from below but for rounding


KINDS = [
    "dense", "coo", "csr", "csc", "scipy sparse", "scipy sparse array", "scipy operator", "function",
    "function of nothing", "pair", "pair without a template",
]  # fmt: skip


def kinds(A: torch.Tensor) -> dict[str, tuple]:
    """Return (A, params, more options) for every kind of A there is."""
    like = {"x_like": torch.zeros(A.shape[1], dtype=A.dtype)}
    return {
        "dense": (A, (), {}),
        "coo": (A.to_sparse_coo(), (), {}),
        "csr": (A.to_sparse_csr(), (), {}),
        "csc": (A.to_sparse_csc(), (), {}),
        "scipy sparse": (sparse.csc_matrix(A.numpy()), (), {}),
        "scipy sparse array": (sparse.coo_array(A.numpy()), (), {}),
        "scipy operator": (aslinearoperator(A.numpy()), (), {}),
        "function": (lambda x, A: A @ x, (A,), like),
        "function of nothing": (lambda x: A @ x, (), like),
        "pair": ((lambda x, A: A @ x, lambda y, A: A.mT @ y), (A,), like),
        "pair without a template": ((lambda x, A: A @ x, lambda y, A: A.mT @ y), (A,), {}),
    }


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_a_is_the_same_problem(kind) -> None:
    dense = matrix(1, 7, 5, 5) * (randn(2, 7, 5) > -0.3)
    b = randn(3, 7)
    A, params, more = kinds(dense)[kind]
    for damp in (0.0, 0.2):
        found = lstsq(A, b, *params, damp=damp, **more, **TIGHT)
        same(found.x, dense_solution(dense, b, damp))
        same(found.residual, b - dense @ found.x)
    batch = randn(4, 2, 3, 7)
    if "pair" not in kind and "function" not in kind:
        same(lstsq(A, batch, **TIGHT).x, batch @ torch.linalg.pinv(dense).mT)


def test_products_are_counted() -> None:
    A, b, calls = matrix(1, 7, 5, 5), randn(3, 7), [0, 0]

    def matvec(x):
        calls[0] += 1
        return A @ x

    def vecmat(y):
        calls[1] += 1
        return A.mT @ y

    found = lstsq((matvec, vecmat), b, x_like=b[:5], centre=randn(4, 5))
    assert [int(found.products), int(found.transposed_products)] == calls
    found = lstsq(A, b)
    assert int(found.products) == int(found.iterations) == int(found.transposed_products) - 1


def test_a_batch_is_its_items() -> None:
    A, b = torch.stack([matrix(seed, 7, 4, 4) for seed in range(3)]), randn(3, 3, 7)
    together = lstsq(A, b, damp=torch.tensor([[0.0], [0.1], [1.0]], dtype=torch.float64))
    for item, damp in enumerate((0.0, 0.1, 1.0)):
        alone = lstsq(A[item], b[item], damp=damp)
        same(together.x[item], alone.x, 1e-9)
        same(alone.x, dense_solution(A[item], b[item], damp), 1e-8)
    shared = lstsq(A[0], b, **TIGHT)
    other = lstsq(A[0].expand(3, 7, 4), b, **TIGHT)
    same(shared.x, other.x, 1e-12)
    assert lstsq(A[:, None], randn(4, 5, 7)).x.shape == (3, 5, 4)
    assert lstsq(A, randn(4, 7)).x.shape == (3, 4)
    assert lstsq(A[:0], b[:0]).x.shape == (0, 4)


def test_batch_axes_of_functions_stop_item_by_item() -> None:
    A, b = torch.stack([matrix(1, 7, 5, 2), matrix(2, 7, 5, 5)]), randn(3, 2, 7)
    found = lstsq(
        lambda x, A: torch.einsum("bmn,bn->bm", A, x), b, A, x_like=torch.zeros(2, 5, dtype=b.dtype), batch_dims=1
    )
    same(found.x, torch.stack([dense_solution(*both) for both in zip(A, b, strict=True)]), 1e-8)
    assert found.iterations[0] < found.iterations[1]


def test_trees_in_and_trees_out() -> None:
    """x is a dictionary, b a tuple; A x convolves a picture and adds up a table."""
    kernel, b = randn(1, 1, 1, 3, 3), (randn(2, 1, 1, 6, 6), randn(3, 4))
    like = {"picture": torch.zeros(1, 1, 6, 6, dtype=torch.float64), "table": torch.zeros(4, 2, dtype=torch.float64)}

    def matvec(x, kernel):
        return torch.nn.functional.conv2d(x["picture"], kernel, padding=1), x["table"].sum(1)

    damp = {name: torch.full_like(leaf, value) for (name, leaf), value in zip(like.items(), (0.1, 0.2), strict=True)}
    found = lstsq(matvec, b, kernel, x_like=like, damp=damp, **TIGHT)
    assert set(found.x) == {"picture", "table"}
    columns = torch.eye(36, dtype=torch.float64).reshape(36, 1, 6, 6)
    dense = torch.nn.functional.conv2d(columns, kernel, padding=1).reshape(36, 36).mT
    same(found.x["picture"].reshape(-1), dense_solution(dense, b[0].reshape(-1), 0.1))
    same(found.x["table"], (b[1] / (2 + 0.04)).unsqueeze(-1).expand(4, 2))
    assert isinstance(found.residual, tuple)
    same(found.residual[1], b[1] - found.x["table"].sum(1))


def test_a_warm_start_saves_steps_and_never_changes_the_problem() -> None:
    for m, n, rank in SHAPES:
        A, b = matrix(1, m, n, rank, 50.0), randn(3, m)
        start, centre, d = 10.0 * randn(5, n), randn(6, n), randn(7, n).abs() + 0.1
        some = torch.cat([torch.zeros(1, dtype=d.dtype), d[1:]])
        for damp in (0.0, 0.3, d, some):
            found = lstsq(A, b, damp=damp, centre=centre, x0=start, **TIGHT)
            same(found.x, dense_solution(A, b, damp, centre), 1e-9)
        near = lstsq(A, b, damp=0.3, **TIGHT).x + 1e-8 * randn(8, n)
        warm, cold = (lstsq(A, b, damp=0.3, x0=x0, atol=1e-5, btol=1e-5) for x0 in (near, None))
        assert warm.iterations < cold.iterations
        same(warm.x, dense_solution(A, b, 0.3), 1e-7)
        # A solution for another right-hand side is in the row space, and may be a start without damping.
        other = lstsq(A, b + 1e-9 * randn(9, m), **TIGHT).x
        warm = lstsq(A, b, x0=other, x0_in_row_space=True, atol=1e-6, btol=1e-6)
        assert warm.iterations < lstsq(A, b, atol=1e-6, btol=1e-6).iterations
        same(warm.x, dense_solution(A, b), 1e-6)


def test_scipy_solves_another_problem_when_warm_and_damped() -> None:
    """SciPy 1.17 shifts b by A x0 and forgets that the damping has to be shifted too."""
    A, b, start = matrix(1, 7, 4, 4), randn(3, 7), randn(4, 4)
    theirs = scipy_lsmr(A.numpy(), b.numpy(), damp=1.0, x0=start.numpy(), atol=1e-14, btol=1e-14)[0]
    wrong = start + dense_solution(A, b - A @ start, 1.0)
    same(torch.from_numpy(theirs), wrong)
    assert (wrong - dense_solution(A, b, 1.0)).norm() > 0.1
    same(lstsq(A, b, damp=1.0, x0=start, **TIGHT).x, dense_solution(A, b, 1.0))


@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_a_preconditioner_saves_steps(damp) -> None:
    A = matrix(1, 60, 40, 40, 10.0) * torch.logspace(-4, 0, 40, dtype=torch.float64)
    b, n = randn(3, 60), 40
    stacked = torch.cat([A, damp * torch.eye(n, dtype=A.dtype)])
    R = torch.linalg.qr(stacked)[1]
    plain = lstsq(A, b, damp=damp, max_steps=4000)

    def solve(matrix, upper):
        return lambda x: torch.linalg.solve_triangular(matrix, x.unsqueeze(-1), upper=upper).squeeze(-1)

    scale = 1.0 / torch.linalg.vector_norm(stacked, dim=0)
    for preconditioner, steps in ((scale, 120), (solve(R, True), 4), ((solve(R, True), solve(R.mT, False)), 4)):
        found = lstsq(A, b, damp=damp, preconditioner=preconditioner, **TIGHT)
        same(found.x, dense_solution(A, b, damp), 1e-8)
        assert int(found.iterations) <= steps
        if damp == 0.0:
            assert int(found.iterations) < int(plain.iterations)
    centre, start = randn(5, n), randn(6, n)
    found = lstsq(A, b, damp=damp, preconditioner=scale, centre=centre, x0=start, **TIGHT)
    same(found.x, dense_solution(A, b, damp, centre), 1e-8)


def test_minimum_norm_with_a_preconditioner_is_minimum_norm_of_what_is_iterated() -> None:
    A, b = matrix(1, 4, 7, 4), randn(3, 4)
    P = randn(5, 7).abs() + 0.5
    found = lstsq(A, b, preconditioner=P, **TIGHT).x
    same(A @ found, b)
    same(found, P * (torch.linalg.pinv(A * P) @ b))
    assert (found - dense_solution(A, b)).norm() > 1e-2


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_single_precision(m, n, rank) -> None:
    A, b = matrix(1, m, n, rank), randn(3, m)
    found = lstsq(A.float(), b.float())
    assert found.x.dtype == torch.float32
    same(found.x.double(), dense_solution(A, b), 1e-4)


def test_early_stopping_is_reported_as_asked() -> None:
    A, b = torch.stack([matrix(1, 7, 5, 1), matrix(2, 7, 5, 5)]), randn(3, 2, 7)
    with pytest.raises(
        SolveError, match=r"1 of 2 items failed: item 1: MAX_STEPS, max_steps were not enough"
    ) as caught:
        lstsq(A, b, max_steps=3)
    assert caught.value.status.tolist() == [Status.SOLVED, Status.NOT_CONVERGED]
    kept = lstsq(A, b, max_steps=3, on_failure="keep")
    assert kept.stop_reason.tolist() == [StopReason.NORMAL_RESIDUAL, StopReason.MAX_STEPS]
    assert kept.converged.tolist() == [True, False]
    assert kept.iterations.tolist()[1] == 3
    marked = lstsq(A, b, max_steps=3, on_failure="nan")
    assert torch.equal(marked.x[0], kept.x[0])
    assert marked.x[1].isnan().all()
    assert kept.x[1].isfinite().all()
    with pytest.raises(SolveError, match="CONDITION, the condition estimate exceeds conlim"):
        lstsq(A, b, conlim=1.5)
    b[0, 0] = math.nan
    with pytest.raises(SolveError, match="item 0: INVALID_INPUT, b, damp, or a product with A holds NaN") as caught:
        lstsq(A, b)
    assert caught.value.status.tolist() == [Status.INVALID_INPUT, Status.SOLVED]


def test_zeros_give_zeros() -> None:
    A = matrix(1, 7, 5, 5)
    found = lstsq(A, torch.zeros(7, dtype=A.dtype), damp=0.1)
    assert found.x.tolist() == [0.0] * 5
    assert int(found.products) == 0
    assert lstsq(torch.zeros_like(A), randn(2, 7)).x.tolist() == [0.0] * 5
    poisoned = torch.full_like(A, math.nan)
    assert lstsq(poisoned, torch.zeros(7, dtype=A.dtype)).x.tolist() == [0.0] * 5
    assert lstsq(A[:0], A[:0, 0]).x.tolist() == [0.0] * 5
    assert lstsq(A[:, :0], A[:, 0]).x.shape == (0,)


def test_inside_of_torch_compile_the_graph_ends_and_goes_on() -> None:
    A, b = matrix(1, 7, 5, 5), randn(3, 7)
    compiled = torch.compile(lambda A, b: 2.0 * lstsq(A * 3.0, b, damp=0.1).x, backend="eager")
    same(compiled(A, b), 2.0 * lstsq(A * 3.0, b, damp=0.1).x, 1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A, b: lstsq(A, b[:6]), ValueError, r"`A` has shape \(7, 5\), expected \(..., 6, n\)"),
        (lambda A, b: lstsq(A, b.sum()), ValueError, "`b` has no axes"),
        (lambda A, b: lstsq(A.expand(2, 7, 5), b.expand(3, 7)), ValueError, "do not broadcast"),
        (lambda A, b: lstsq(A.float(), b), TypeError, "`A` is torch.float32 on cpu, expected torch.float64"),
        (lambda A, b: lstsq(A.int(), b), TypeError, "`A` has dtype torch.int32, expected float32 or float64"),
        (lambda A, b: lstsq(A, b.half()), TypeError, "`b` has dtype torch.float16"),
        (lambda A, b: lstsq(A.cfloat(), b), TypeError, "`A` has dtype torch.complex64, expected float32 or float64"),
        (lambda A, b: lstsq(A, b.cdouble()), TypeError, "`b` has dtype torch.complex128"),
        (lambda A, b: lstsq(sparse.csr_array(A.numpy() * 1j), b), TypeError, "`A` has dtype complex128"),
        (lambda A, b: lstsq(A.numpy(), b), TypeError, "`A` is a ndarray: give a tensor"),
        (lambda A, b: lstsq(3.0, b), TypeError, "`A` is a float, expected a tensor"),
        (lambda A, b: lstsq(A, b.numpy()), TypeError, "`b` holds a ndarray, expected a tensor"),
        (lambda A, b: lstsq(A.expand(2, 7, 5).to_sparse(), b), ValueError, r"the sparse `A` has shape \(2, 7, 5\)"),
        (lambda A, b: lstsq(A, b, b), ValueError, "`params` was given with a matrix"),
        (lambda A, b: lstsq(A, b, x_like=b), ValueError, "`x_like` was given with a matrix"),
        (lambda A, b: lstsq(A, b, batch_dims=1), ValueError, "`batch_dims` was given with a matrix"),
        (lambda A, b: lstsq(lambda x: A @ x, b), ValueError, "`x_like` is missing"),
        (lambda A, b: lstsq(lambda x: A @ x, b, x_like=b.float()), TypeError, "`x_like` is torch.float32"),
        (lambda A, b: lstsq(lambda x: A @ x, b, x_like={}), ValueError, "`x_like` holds no tensor"),
        (lambda A, b: lstsq(lambda x: A @ x, b, x_like=b[:5], batch_dims=2), ValueError, "expected 2 batch axes"),
        (lambda A, b: lstsq(lambda x: A @ x, b, x_like=b[:5], batch_dims=-1), ValueError, "batch_dims=-1, expected"),
        (
            lambda A, b: lstsq(lambda x: A @ x, b, x_like=b[:5], batch_dims=1),
            ValueError,
            r"a leaf of `x_like` has shape \(5,\), expected the batch axes \(7,\)",
        ),
        (
            lambda A, b: lstsq(lambda x: A[:3] @ x, b, x_like=b[:5]),
            ValueError,
            r"the result of `matvec` has shape \(3,\), expected \(7,\)",
        ),
        (
            lambda A, b: lstsq((lambda x: A @ x, lambda y: y), b, x_like=b[:5]),
            ValueError,
            r"the result of `vecmat` has shape \(7,\), expected \(5,\)",
        ),
        (
            lambda A, b: lstsq(lambda x: (A @ x, x), b, x_like=b[:5]),
            ValueError,
            r"the result of `matvec` has the structure \(\*, \*\), expected a tensor",
        ),
        (lambda A, b: lstsq(lambda x: A @ x + 1.0, b, x_like=b[:5]), ValueError, "`matvec` is not linear in x"),
        (lambda A, b: lstsq(lambda x: torch.nan * (A @ x), b, x_like=b[:5]), ValueError, "`matvec` gives NaN"),
        (
            lambda A, b: lstsq(lambda x, c: A @ x, b, A.cdouble(), x_like=b[:5]),
            TypeError,
            "a parameter has dtype torch.complex128",
        ),
        (lambda A, b: lstsq(A, b, damp=-1.0), ValueError, "damp=-1.0, expected a finite number"),
        (lambda A, b: lstsq(A, b, damp=math.nan), ValueError, "damp=nan, expected a finite number"),
        (lambda A, b: lstsq(A, b, damp=b), ValueError, r"`damp` has shape \(7,\), expected \(5,\)"),
        (lambda A, b: lstsq(A, b, damp=b[:2, None]), ValueError, r"`damp` has shape \(2, 1\), expected \(1,\)"),
        (lambda A, b: lstsq(A, b, damp=b[:5].float()), TypeError, "`damp` is torch.float32"),
        (lambda A, b: lstsq(A, b, centre=b), ValueError, r"`centre` has shape \(7,\), expected \(5,\)"),
        (lambda A, b: lstsq(A, b, x0={"x": b}), ValueError, "`x0` has the structure {'x': \\*}, expected a tensor"),
        (lambda A, b: lstsq(A, b, preconditioner=b), ValueError, r"`preconditioner` has shape \(7,\)"),
        (lambda A, b: lstsq(A, b, atol=-1.0), ValueError, "atol=-1.0, expected"),
        (lambda A, b: lstsq(A, b, btol=math.inf), ValueError, "btol=inf, expected"),
        (lambda A, b: lstsq(A, b, conlim=0.5), ValueError, "conlim=0.5, expected a number above 1"),
        (lambda A, b: lstsq(A, b, max_steps=0), ValueError, "max_steps=0, expected a positive integer"),
        (lambda A, b: lstsq(A, b, check_every=1.5), ValueError, "check_every=1.5, expected a positive integer"),
        (lambda A, b: lstsq(A, b, on_failure="warn"), hsbackend.InvalidOptionError, "on_failure='warn' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(matrix(1, 7, 5, 5), randn(3, 7))


def test_a_tree_with_leaves_without_axes() -> None:
    """Diagonal A over a dict: x = b / A in every leaf, the scalar one too."""
    b = {"a": torch.tensor([2.0, 6.0], dtype=torch.float64), "s": torch.tensor(5.0, dtype=torch.float64)}

    def double(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: 2.0 * part for name, part in x.items()}

    found = lstsq((double, double), b, x_like=b)
    torch.testing.assert_close(found.x["a"], torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(found.x["s"], torch.tensor(2.5, dtype=torch.float64))
