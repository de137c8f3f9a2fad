"""The judge's reference is itself checked: known answers, KKT conditions, finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hsbackend.comparisons.problems import (
    BenchmarkProblem,
    ParameterValue,
    QPData,
    birkhoff_projection,
    make_problem,
    simplex_projection,
)
from hsbackend.comparisons.reference import compute_reference, items_of, kkt_residual, solve_item, solve_kkt


def _with_value(problem: BenchmarkProblem, position: int, value: torch.Tensor) -> BenchmarkProblem:
    parameters = list(problem.parameters)
    parameters[position] = replace(parameters[position], value=value)
    return replace(problem, parameters=tuple(parameters))


def test_box_has_the_known_answer() -> None:
    point = torch.tensor([[2.0, -3.0, 0.25]], dtype=torch.float64)
    lower, upper = -torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    (item,) = items_of(QPData(Q=torch.eye(3, dtype=torch.float64)[None], q=-point, lower=lower, upper=upper))
    solution = solve_item(item)
    np.testing.assert_allclose(solution.x, [1.0, -1.0, 0.25], atol=1e-15)
    np.testing.assert_allclose(solution.z, [0.0, 2.0, 0.0, 1.0, 0.0, 0.0], atol=1e-14)
    assert solution.strict_complementarity_margin == pytest.approx(0.75)


def test_infinite_bounds_make_no_rows() -> None:
    lower = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    (item,) = items_of(QPData(Q=torch.eye(2, dtype=torch.float64)[None], q=torch.ones(1, 2).double(), lower=lower))
    assert item.C.shape == (1, 2)
    np.testing.assert_allclose(solve_item(item).x, [0.0, -1.0], atol=1e-15)


KKT_NAMES = ["qp-n10", "shared-n200", "sudoku-4x4", "portfolio-n100", "birkhoff-4x4", "monotone-n100", "l1-n100"]


@pytest.mark.parametrize("name", KKT_NAMES)
def test_reference_satisfies_kkt_to_machine_precision(name: str) -> None:
    problem = make_problem(name, quick=True)
    reference = compute_reference(problem)
    for item, solution in zip(reference.items, reference.solutions, strict=True):
        assert kkt_residual(item, solution.x, solution.y, solution.z) < 1e-13
    assert reference.is_judged.all()


@pytest.mark.parametrize(
    "name", ["qp-n10", "shared-n200", "sudoku-4x4", "portfolio-n100", "monotone-n100", "l1-n100", "budget-n100"]
)
def test_reference_gradient_is_the_finite_difference(name: str) -> None:
    """Directional derivative of sum(cotangent * x), one random direction per parameter; the step stays on the face."""
    problem = make_problem(name, quick=True, seed=1)
    reference = compute_reference(problem)
    step = 1e-2 * min(1e-3, reference.strict_complementarity_margin.min())
    generator = torch.Generator().manual_seed(0)
    for position in problem.differentiated():
        parameter = problem.parameters[position]
        direction = torch.randn(parameter.value.shape, dtype=torch.float64, generator=generator)
        values = [
            float((reference.cotangent.numpy() * compute_reference(moved).primal).sum())
            for sign in (1.0, -1.0)
            for moved in [_with_value(problem, position, parameter.value + sign * step * direction)]
        ]
        difference = (values[0] - values[1]) / (2 * step)
        expected = float((reference.gradients[parameter.name] * direction.numpy()).sum())
        assert difference == pytest.approx(expected, rel=1e-5), parameter.name


def test_gradient_of_a_shared_parameter_is_the_sum_over_items() -> None:
    problem = make_problem("sudoku-4x4", quick=True)
    whole = compute_reference(problem).gradients["A"]
    parts = []
    for item in range(problem.batch):
        parameters = tuple(replace(p, value=p.value[item : item + 1]) if p.batched else p for p in problem.parameters)
        alone = replace(problem, batch=1, parameters=parameters, cotangent=problem.cotangent[item : item + 1])
        parts.append(compute_reference(alone).gradients["A"])
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-10, atol=1e-10)


def test_degenerate_item_is_solved_but_its_gradient_is_not_judged() -> None:
    """(1, 0, 0) + c is on the border of the normal cone of the simplex at its vertex: margin zero."""
    problem = simplex_projection(n=3, batch=2, seed=0)
    value = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.2, 0.1]], dtype=torch.float64)
    reference = compute_reference(replace(problem, parameters=(ParameterValue("y", value),)))
    np.testing.assert_allclose(reference.primal[0], [1.0, 0.0, 0.0], atol=1e-6)
    assert reference.is_judged.tolist() == [False, True]
    assert torch.count_nonzero(reference.cotangent[0]) == 0
    assert torch.equal(reference.cotangent[1], problem.cotangent[1])


def test_dependent_active_rows_are_no_obstacle_where_rows_are_constant() -> None:
    """Birkhoff: one row or column sum follows from the others, and at a vertex more bounds are active than free."""
    problem = birkhoff_projection(side=3, batch=1, seed=0)
    vertex = torch.eye(3, dtype=torch.float64)[None] * 5.0
    reference = compute_reference(replace(problem, parameters=(ParameterValue("V", vertex),)))
    np.testing.assert_allclose(reference.primal[0], np.eye(3).reshape(-1), atol=1e-12)
    assert not reference.solutions[0].rows_independent
    assert reference.is_judged.all()
    np.testing.assert_allclose(reference.gradients["V"], 0.0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_elimination_of_bounds_is_the_kkt_system_solved_whole(seed: int) -> None:
    """General rows, lower and upper bounds, a dense Hessian, right-hand sides everywhere."""
    draw = np.random.default_rng(seed)
    n, p, m = 9, 2, 3
    root = draw.normal(size=(n, n))
    qp = QPData(
        Q=torch.from_numpy(root @ root.T)[None],
        q=torch.from_numpy(draw.normal(size=n))[None],
        A=torch.from_numpy(draw.normal(size=(p, n)))[None],
        b=torch.zeros(1, p, dtype=torch.float64),
        G=torch.from_numpy(draw.normal(size=(m, n)))[None],
        h=torch.ones(1, m, dtype=torch.float64),
        lower=-torch.ones(1, n, dtype=torch.float64),
        upper=torch.ones(1, n, dtype=torch.float64),
    )
    (item,) = items_of(qp)
    active = np.zeros(item.d.size, dtype=bool)
    active[[1, m + 0, m + 4, m + n + 2]] = True
    g, r = draw.normal(size=n), draw.normal(size=p + 4)
    solution, independent = solve_kkt(item, active, g, r)
    rows = np.vstack([item.A, item.C[active]])
    matrix = np.block([[item.Q, rows.T], [rows, np.zeros((p + 4, p + 4))]])
    np.testing.assert_allclose(matrix @ solution, np.concatenate([g, r]), atol=1e-10)
    assert independent
    active[m + 2] = True
    _, independent = solve_kkt(item, active, g, draw.normal(size=p + 5))
    assert not independent
