"""The iteration: against SciPy step by step, its two loops against each other, why and when it stops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import lsmr as scipy_lsmr

from hsbackend import StopReason
from hsbackend.lsmr import NOT_CONVERGED, Limits, Outcome, finish_step, lsmr, next_vector
from spectra import SHAPES, matrix, randn


def run(A, b, damp=None, *, atol=0.0, btol=0.0, conlim=math.inf, max_steps=200, in_place=None, check_every=1, **more):
    """Solve with per-item or shared dense A, (..., m, n), (..., m)."""
    limits = Limits(atol, btol, conlim, max_steps, check_every)
    if damp is not None:
        damp = torch.as_tensor(damp, dtype=torch.float64).expand(b.shape[:-1])
    return lsmr(
        lambda x: (A @ x.unsqueeze(-1)).squeeze(-1), lambda y: (A.mT @ y.unsqueeze(-1)).squeeze(-1), b, damp, limits,
        columns=A.shape[-1], in_place=in_place, **more,
    )  # fmt: skip


def figures(found: Outcome) -> torch.Tensor:
    return torch.stack(
        [found.norm_residual, found.norm_normal_residual, found.norm_matrix, found.condition, found.norm_x], -1
    )


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "pure"])
@pytest.mark.parametrize("damp", [0.0, 0.05, 2.0])
@pytest.mark.parametrize(("m", "n", "rank"), [(40, 25, 25), (25, 40, 25), (30, 30, 30), (40, 25, 12)])
def test_every_iterate_and_every_estimate_is_that_of_scipy(m, n, rank, damp, in_place) -> None:
    A, b = matrix(1, m, n, rank, 30.0), randn(2, m)
    for steps in (1, 2, 3, 5, 8):
        theirs = scipy_lsmr(A.numpy(), b.numpy(), damp=damp, atol=0, btol=0, conlim=0, maxiter=steps)
        ours = run(A, b, damp or None, max_steps=steps, in_place=in_place)
        assert int(ours.steps) == theirs[2] == steps
        # The Lanczos process multiplies rounding as singular values converge: two digits in three steps here.
        loss = 1e2 if steps > 5 else 1.0
        np.testing.assert_allclose(ours.x.numpy(), theirs[0], rtol=0, atol=loss * 1e-12 * np.linalg.norm(theirs[0]))
        np.testing.assert_allclose(figures(ours).numpy(), theirs[3:], rtol=loss * 1e-10)


@pytest.mark.parametrize("damp", [0.0, 0.05])
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"atol": 1e-5, "btol": 1e-5}, None),
        ({"atol": 1e-4, "btol": 0.0}, 2),
        ({"conlim": 2.0}, 3),
        ({"max_steps": 4}, 7),
    ],
)
def test_it_stops_where_scipy_stops(options, code, damp) -> None:
    for consistent in (False, True):
        A = matrix(3, 200, 120, 120, 4.0)
        b = A @ randn(4, 120) if consistent else randn(4, 200)
        defaults = {"atol": 0.0, "btol": 0.0, "conlim": 0.0, "max_steps": 200} | options
        theirs = scipy_lsmr(
            A.numpy(), b.numpy(), damp=damp, atol=defaults["atol"], btol=defaults["btol"],
            conlim=defaults["conlim"], maxiter=defaults["max_steps"],
        )  # fmt: skip
        ours = run(A, b, damp or None, **options)
        assert (int(ours.stop_reason), int(ours.steps)) == theirs[1:3]
        if code is not None and not consistent:
            assert theirs[1] == code


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damp", [None, 0.1])
def test_the_two_loops_agree(damp, dtype) -> None:
    """Items of different difficulty, one of them zero, one not finite."""
    A = torch.stack([matrix(seed, 12, 8, rank) for seed, rank in enumerate((3, 8, 8, 8))])
    b = randn(9, 4, 12)
    b[2] = 0.0
    A[3, 0, 0] = math.nan
    A, b = A.to(dtype), b.to(dtype)
    limits = {"atol": 1e-5, "btol": 1e-5}
    one, other = (run(A, b, damp, in_place=in_place, **limits) for in_place in (True, False))
    assert one.stop_reason.tolist() == other.stop_reason.tolist() == [2, 2, 0, 8]
    assert one.steps.tolist() == other.steps.tolist()
    assert one.steps[0] < one.steps[1]
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(one.x[:3], other.x[:3], rtol=tight, atol=tight)
    assert one.x[3].isnan().all()
    assert other.x[3].isnan().all()
    torch.testing.assert_close(figures(one)[:3], figures(other)[:3], rtol=1e-3 if tight > 1e-9 else 1e-6, atol=tight)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "pure"])
def test_an_item_in_a_batch_is_the_item_alone_bit_for_bit(in_place) -> None:
    A = torch.stack([matrix(seed, 12, 8, rank) for seed, rank in enumerate((2, 8, 5))])
    b = randn(9, 3, 12)
    together = run(A, b, 0.1, atol=1e-8, in_place=in_place)
    assert len(set(together.steps.tolist())) == 3
    for item in range(3):
        alone = run(A[item : item + 1], b[item : item + 1], 0.1, atol=1e-8, in_place=in_place)
        assert torch.equal(alone.x[0], together.x[item])
        assert torch.equal(figures(alone)[0], figures(together)[item])
        assert alone.steps[0] == together.steps[item]


def test_asking_rarely_changes_the_cost_and_nothing_else() -> None:
    A, b = matrix(1, 12, 8, 8), randn(2, 12)
    often, rarely = (run(A, b, atol=1e-8, in_place=False, check_every=k) for k in (1, 16))
    assert torch.equal(often.x, rarely.x)
    assert often.steps == rarely.steps
    assert often.products == int(often.steps)
    assert often.products < rarely.products <= often.products + 16


def test_batch_axes_of_any_number_and_length() -> None:
    A, b = matrix(1, 6, 4, 4), randn(2, 2, 3, 6)
    found = run(A, b, atol=1e-12)
    torch.testing.assert_close(found.x, b @ torch.linalg.pinv(A).mT, rtol=1e-10, atol=1e-10)
    assert found.stop_reason.shape == (2, 3)
    assert run(A, b[:0]).x.shape == (0, 3, 4)
    assert run(A[:0], b[..., :0]).x.tolist() == torch.zeros(2, 3, 4).tolist()


def test_zero_right_hand_sides_cost_nothing() -> None:
    found = run(matrix(1, 6, 4, 4), torch.zeros(6, dtype=torch.float64))
    assert StopReason(int(found.stop_reason)) is StopReason.ZERO
    assert found.x.tolist() == [0.0] * 4
    assert (found.products, found.transposed_products, int(found.steps)) == (0, 0, 0)


def test_a_right_hand_side_orthogonal_to_the_range_gives_zero() -> None:
    found = run(torch.eye(4, dtype=torch.float64)[:, :2], torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    assert StopReason(int(found.stop_reason)) is StopReason.ZERO
    assert found.x.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "pure"])
@pytest.mark.parametrize("where", ["b", "A", "damp", "overflow"])
def test_what_is_not_finite_is_the_fault_of_the_input_of_that_item(where, in_place) -> None:
    A = torch.stack([matrix(1, 6, 4, 4), matrix(1, 6, 4, 4)])
    b, damp = randn(2, 2, 6), torch.tensor([0.1, 0.1], dtype=torch.float64)
    clean = run(A, b, damp, atol=1e-10, in_place=in_place)
    if where == "b":
        b[0, 3] = math.nan
    elif where == "A":
        A[0, 2, 2] = math.inf
    elif where == "damp":
        damp[0] = math.nan
    else:
        A[0] *= 1e200
        b[0] *= 1e200
    found = run(A, b, damp, atol=1e-10, in_place=in_place)
    assert StopReason(int(found.stop_reason[0])) is StopReason.INVALID_INPUT
    assert found.x[0].isnan().all()
    assert torch.equal(found.x[1], clean.x[1])
    assert int(found.stop_reason[1]) == 2


def test_a_start_is_where_it_starts_and_the_limits_stay_those_of_the_whole_problem() -> None:
    A, b = matrix(1, 12, 8, 8, 100.0), randn(2, 12)
    cold = run(A, b, atol=1e-10)
    near = cold.x + 1e-9 * randn(3, 8)
    norm = torch.linalg.vector_norm(b)
    warm = run(A, b - A @ near, start=near, norm_rhs=norm, atol=1e-6)
    assert int(warm.steps) < int(run(A, b, atol=1e-6).steps)
    torch.testing.assert_close(warm.x, cold.x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_without_tolerances_it_goes_as_far_as_the_dtype_allows(m, n, rank, dtype) -> None:
    A, b = matrix(1, m, n, rank), randn(2, m)
    found = run(A.to(dtype), b.to(dtype))
    assert StopReason(int(found.stop_reason)).converged
    exact = torch.linalg.pinv(A, rtol=1e-10) @ b
    assert (found.x.double() - exact).norm() < 1e3 * torch.finfo(dtype).eps * exact.norm()


def test_every_code_says_whether_it_converged_and_what_it_means() -> None:
    table = StopReason.__doc__
    for code in StopReason:
        line = next(line for line in table.splitlines() if f"``{code.name}``" in line)
        assert line.split()[0] == str(int(code))
        assert (" yes " in line) == code.converged == (code not in NOT_CONVERGED)
        assert len(code.sentence) > 10


def test_the_pure_halves_of_a_step_are_one_graph_each() -> None:
    """``torch.compile`` takes them whole: fullgraph makes a break an error. Eager values, so no compiler is needed."""
    from hsbackend import lsmr as module

    A, b = matrix(1, 12, 8, 8, 50.0), randn(2, 12)
    compiled = {
        function: torch.compile(function, fullgraph=True, backend="eager") for function in (next_vector, finish_step)
    }
    before = dict(module._compiled)
    module._compiled.update(compiled)
    try:
        limits = Limits(1e-8, 1e-8, math.inf, 60, 4, compiled=True)
        damp = torch.tensor(0.1, dtype=torch.float64)
        found = lsmr(lambda x: A @ x, lambda y: A.mT @ y, b, damp, limits, columns=8)
    finally:
        module._compiled.clear()
        module._compiled.update(before)
    plain = run(A, b, 0.1, atol=1e-8, btol=1e-8, in_place=False)
    assert torch.equal(found.x, plain.x)
    assert int(found.steps) == int(plain.steps) > 4
