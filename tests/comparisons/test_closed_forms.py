"""The closed forms that judge large problems are the QP reference's answers where both exist."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hsbackend.comparisons.closed_forms import has_closed_form, pool_adjacent_violators, project
from hsbackend.comparisons.judge import Grade
from hsbackend.comparisons.named_sets import Birkhoff, Budget, L1Ball, Monotone, Simplex
from hsbackend.comparisons.problems import (
    BenchmarkProblem,
    ParameterValue,
    birkhoff_projection,
    budget_projection,
    l1_ball_projection,
    monotone_projection,
    simplex_projection,
)
from hsbackend.comparisons.reference import compute_reference
from hsbackend.comparisons.truth import LARGEST_QP, SAMPLE, find_truth

MAKERS = {
    "simplex": simplex_projection,
    "l1": l1_ball_projection,
    "budget": budget_projection,
    "monotone": monotone_projection,
}


def _scaled(problem: BenchmarkProblem, factor: float) -> BenchmarkProblem:
    (point,) = problem.parameters
    return replace(problem, parameters=(replace(point, value=factor * point.value),))


@pytest.mark.parametrize("scale", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("n", [2, 3, 17, 60])
@pytest.mark.parametrize("family", MAKERS)
def test_primal_and_gradient_are_those_of_the_reference(family: str, n: int, scale: float) -> None:
    """Small points lie inside the l1 ball, large ones project to vertices."""
    problem = _scaled(MAKERS[family](n, 8, seed=n), scale)
    reference = compute_reference(problem)
    assert reference.is_judged.any()
    (point,) = problem.parameters
    for i in range(problem.batch):
        form = project(problem.named_set, point.value[i].numpy())
        np.testing.assert_allclose(form.primal, reference.primal[i], atol=1e-9)
        if reference.is_judged[i]:
            gradient = form.vjp(problem.cotangent[i].numpy())
            np.testing.assert_allclose(gradient, reference.gradients["y"][i], atol=1e-9)


def test_known_answers() -> None:
    v = np.array([2.0, 0.0, 1.5, -1.0])
    np.testing.assert_allclose(project(Simplex(4, 1.0), v).primal, [0.75, 0.0, 0.25, 0.0])
    np.testing.assert_allclose(project(L1Ball(4, 2.0), np.array([-2.0, 0.0, 1.5, 0.5])).primal, [-1.25, 0.0, 0.75, 0.0])
    np.testing.assert_allclose(project(L1Ball(4, 5.0), v).primal, v)
    np.testing.assert_allclose(project(Monotone(4), v).primal, [0.625, 0.625, 0.625, 0.625])
    knapsack = Budget(coefficients=np.array([1.0, 2.0]), total=2.0, lower=0.0, upper=1.0)
    np.testing.assert_allclose(project(knapsack, np.array([1.0, 1.0])).primal, [0.8, 0.6])


def test_set_without_a_formula_is_refused() -> None:
    assert not has_closed_form(Birkhoff(3))
    assert not has_closed_form(None)
    with pytest.raises(ValueError, match="no closed form for Birkhoff"):
        project(Birkhoff(3), np.zeros(9))


def test_pooling_keeps_what_is_in_order_and_averages_what_is_not() -> None:
    points = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, 2.5]])
    primal = np.empty_like(points)
    pool_adjacent_violators(points, primal)
    np.testing.assert_allclose(primal, [[1.0, 2.0, 3.0, 4.0], [2.5, 2.5, 2.5, 2.5], [1.0, 2.5, 2.5, 2.5]])


class TestTruth:
    def test_small_problems_are_judged_whole_with_kkt_residuals(self) -> None:
        problem = simplex_projection(5, 3, seed=0)
        reference = compute_reference(problem)
        verdict = find_truth(problem).verdict(reference.primal, reference.gradients)
        assert verdict.grade is Grade.CORRECT
        assert verdict.kkt_residual is not None
        assert verdict.batch == 3

    def test_large_points_are_judged_by_closed_form(self) -> None:
        problem = simplex_projection(LARGEST_QP + 1, 2, seed=0)
        truth = find_truth(problem)
        forms = [project(problem.named_set, v) for v in problem.parameters[0].value.numpy()]
        primal = np.stack([form.primal for form in forms])
        gradient = np.stack([f.vjp(g) for f, g in zip(forms, truth.cotangent.numpy(), strict=True)])
        verdict = truth.verdict(primal, {"y": gradient})
        assert verdict.grade is Grade.CORRECT
        assert verdict.kkt_residual is None
        assert truth.verdict(primal, {"y": 0.5 * gradient}).grade is Grade.WRONG
        assert truth.verdict(primal + 1e-5, {"y": gradient}).grade is Grade.ROUGH
        assert truth.verdict(np.full_like(primal, np.nan), {"y": gradient}).grade is Grade.WRONG
        with pytest.raises(ValueError, match=r"primal has shape .*, expected"):
            truth.verdict(primal[:1], {"y": gradient})

    def test_large_batches_are_judged_by_their_first_items(self) -> None:
        problem = birkhoff_projection(2, 1025, seed=0)
        truth = find_truth(problem)
        assert torch.equal(truth.cotangent, problem.cotangent)
        head = compute_reference(problem.head(SAMPLE))
        primal = np.zeros((1025, 4))
        primal[:SAMPLE] = head.primal
        gradient = np.zeros((1025, 2, 2))
        gradient[:SAMPLE] = head.gradients["V"]
        verdict = truth.verdict(primal, {"V": gradient})
        assert verdict.grade is Grade.CORRECT
        assert verdict.judged_items == SAMPLE
        primal[SAMPLE - 1] += 0.1
        assert truth.verdict(primal, {"V": gradient}).grade is Grade.WRONG

    def test_large_problem_without_a_formula_is_refused(self) -> None:
        problem = simplex_projection(LARGEST_QP + 1, 2, seed=0)
        with pytest.raises(ValueError, match="has 1025 variables, more than the 1024"):
            find_truth(replace(problem, named_set=None))


def test_point_on_a_bound_of_the_simplex_is_projected_exactly() -> None:
    problem = simplex_projection(3, 1, seed=0)
    value = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    problem = replace(problem, parameters=(ParameterValue("y", value),))
    np.testing.assert_allclose(project(problem.named_set, value[0].numpy()).primal, value[0].numpy(), atol=1e-15)
