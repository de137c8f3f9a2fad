"""Every benchmark problem says the same thing in cvxpy and in matrices, and is what its description claims."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

from hsbackend.comparisons.problems import SUITES, BenchmarkProblem, make_problem
from hsbackend.comparisons.reference import compute_reference

NAMES = tuple(dict.fromkeys(name for names in SUITES.values() for name in names))


def _cvxpy_solution(problem: BenchmarkProblem, item: int, bound_scale: float) -> np.ndarray:
    """Solve one item of the cvxpy model with Clarabel through cvxpy itself."""
    model = problem.build(bound_scale)
    for parameter, given in zip(model.parameters, problem.parameters, strict=True):
        parameter.value = (given.value[item] if given.batched else given.value).numpy()
    model.problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return np.asarray(model.variables[0].value).reshape(-1)


@pytest.mark.parametrize("name", NAMES)
class TestEveryProblem:
    def test_matrices_and_both_spellings_have_the_same_solution(self, name: str) -> None:
        problem = make_problem(name, quick=True)
        reference = compute_reference(problem)
        item = problem.batch - 1
        for bound_scale in (1.0, 2.0):
            solution = _cvxpy_solution(problem, item, bound_scale)
            np.testing.assert_allclose(solution, reference.primal[item], atol=1e-6)

    def test_spelling_of_bounds_matters_only_where_there_are_bounds(self, name: str) -> None:
        problem = make_problem(name, quick=True)
        plain, scaled = (
            [[type(part).__name__ for part in c.args] for c in problem.build(scale).problem.constraints]
            for scale in (1.0, 2.0)
        )
        assert problem.has_bounds == (plain != scaled)

    def test_shapes_follow_the_declaration(self, name: str) -> None:
        problem = make_problem(name, quick=True)
        model = problem.build(1.0)
        assert model.problem.is_dcp(dpp=True)
        for parameter, given in zip(model.parameters, problem.parameters, strict=True):
            expected = ((problem.batch,) if given.batched else ()) + parameter.shape
            assert given.value.shape == expected
            assert given.value.dtype == torch.float64
        assert problem.cotangent.shape == (problem.batch, model.variables[0].size)

    def test_seed_decides_everything(self, name: str) -> None:
        first, again, other = (make_problem(name, quick=True, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(first.cotangent, again.cotangent)
        assert all(torch.equal(a.value, b.value) for a, b in zip(first.parameters, again.parameters, strict=True))
        assert not torch.equal(first.cotangent, other.cotangent)

    def test_some_rows_are_active_and_some_are_not(self, name: str) -> None:
        reference = compute_reference(make_problem(name, quick=True))
        active = np.concatenate([solution.active_set for solution in reference.solutions])
        assert 0.05 < active.mean() < 0.95


def test_speed_suite_has_the_sizes_of_the_target() -> None:
    sizes = {"qp-n10": (512, 10), "sudoku-4x4": (150, 64), "portfolio-n100": (128, 100), "birkhoff-4x4": (1024, 16)}
    for name, size in sizes.items():
        assert tuple(make_problem(name).cotangent.shape) == size


def test_families_suite_has_the_sizes_of_the_target() -> None:
    sizes = {
        "simplex-n50": (256, 50),
        "simplex-n1000": (64, 1000),
        "birkhoff-4x4": (1024, 16),
        "birkhoff-16x16": (64, 256),
        "birkhoff-32x32": (16, 1024),
        "monotone-n100": (128, 100),
        "l1-n100": (128, 100),
        "budget-n100": (128, 100),
        "portfolio-n100": (128, 100),
    }
    assert {name: tuple(make_problem(name).cotangent.shape) for name in SUITES["families"]} == sizes


def test_head_is_the_first_items_and_refuses_shared_parameters() -> None:
    problem = make_problem("portfolio-n100", quick=True)
    head = problem.head(2)
    assert head.batch == 2
    assert torch.equal(head.cotangent, problem.cotangent[:2])
    np.testing.assert_array_equal(compute_reference(head).primal, compute_reference(problem).primal[:2])
    with pytest.raises(ValueError, match="sudoku-4x4 shares A, b: its items cannot be judged apart"):
        make_problem("sudoku-4x4", quick=True).head(2)


def test_sudoku_shares_one_learnable_matrix() -> None:
    problem = make_problem("sudoku-4x4")
    matrix = next(p for p in problem.parameters if p.name == "A")
    assert matrix.value.shape == (40, 64)
    assert not matrix.batched
    assert matrix.requires_grad


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown problem 'nonesuch', expected one of: qp-n100, qp-n10"):
        make_problem("nonesuch")
