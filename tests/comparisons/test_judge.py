"""The judge accepts the truth and catches every kind of untruth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hsbackend.comparisons.judge import Grade, Verdict, gradient_errors, judge, primal_residual
from hsbackend.comparisons.problems import BenchmarkProblem, make_problem
from hsbackend.comparisons.reference import Reference, compute_reference

NAMES = ["qp-n10", "sudoku-4x4", "portfolio-n100", "birkhoff-4x4"]


@pytest.fixture(scope="module", params=NAMES)
def judged(request: pytest.FixtureRequest) -> tuple[BenchmarkProblem, Reference]:
    problem = make_problem(request.param, quick=True)
    return problem, compute_reference(problem)


def _verdict(judged: tuple[BenchmarkProblem, Reference], primal=None, gradients=None) -> Verdict:
    problem, reference = judged
    return judge(
        problem,
        reference,
        reference.primal if primal is None else primal,
        reference.gradients if gradients is None else gradients,
    )


class TestPrimal:
    def test_truth_is_correct(self, judged) -> None:
        verdict = _verdict(judged)
        assert verdict.grade is Grade.CORRECT
        assert verdict.success_rate == 1.0
        assert verdict.kkt_residual < 1e-13
        assert verdict.primal_error == 0.0
        assert verdict.worst_gradient_error == 0.0

    def test_one_perturbed_item_is_counted_and_makes_the_whole_wrong(self, judged) -> None:
        problem, reference = judged
        primal = reference.primal.copy()
        primal[1] += 0.1
        verdict = _verdict(judged, primal=primal)
        assert verdict.success_rate == pytest.approx(1 - 1 / problem.batch)
        assert verdict.grade is Grade.WRONG
        assert verdict.kkt_residual > 1e-2
        assert verdict.primal_error == pytest.approx(0.1 / max(1.0, np.abs(reference.primal[1]).max()))

    def test_fewer_digits_are_rough_not_wrong(self, judged) -> None:
        _, reference = judged
        verdict = _verdict(judged, primal=reference.primal + 1e-5)
        assert verdict.success_rate == 0.0
        assert verdict.grade is Grade.ROUGH

    def test_residual_of_dropped_bounds_is_reported(self) -> None:
        problem = make_problem("simplex-n50", quick=True)
        reference = compute_reference(problem)
        points = problem.parameters[0].value.numpy()
        without_bounds = points + (1.0 - points.sum(axis=1, keepdims=True)) / points.shape[1]
        verdict = judge(problem, reference, without_bounds, reference.gradients)
        assert verdict.primal_residual == pytest.approx(max(0.0, -without_bounds.min()))
        assert verdict.grade is Grade.WRONG

    def test_nan_is_not_a_solution(self, judged) -> None:
        _, reference = judged
        primal = reference.primal.copy()
        primal[0, 0] = np.nan
        verdict = _verdict(judged, primal=primal)
        assert verdict.success_rate < 1.0
        assert verdict.kkt_residual == np.inf
        assert verdict.primal_error == np.inf
        assert verdict.grade is Grade.WRONG

    def test_shape_is_checked_before_value(self, judged) -> None:
        _, reference = judged
        with pytest.raises(ValueError, match=r"primal has shape .*, expected"):
            _verdict(judged, primal=reference.primal[:-1])


class TestGradients:
    def test_halved_gradient_is_wrong(self, judged) -> None:
        _, reference = judged
        name = next(iter(reference.gradients))
        gradients = {**reference.gradients, name: 0.5 * reference.gradients[name]}
        verdict = _verdict(judged, gradients=gradients)
        assert verdict.success_rate == 1.0
        assert 0.1 < verdict.gradient_error[name] <= 0.5 + 1e-12
        assert verdict.typical_gradient_error == pytest.approx(0.5)
        assert verdict.grade is Grade.WRONG

    def test_averaged_gradient_of_a_shared_parameter_is_wrong(self) -> None:
        problem = make_problem("sudoku-4x4", quick=True)
        reference = compute_reference(problem)
        gradients = {**reference.gradients, "A": reference.gradients["A"] / problem.batch}
        verdict = judge(problem, reference, reference.primal, gradients)
        assert verdict.gradient_error["A"] == pytest.approx(1 - 1 / problem.batch)
        assert verdict.grade is Grade.WRONG

    def test_nan_gradient_is_infinitely_wrong(self, judged) -> None:
        _, reference = judged
        gradients = {name: np.full_like(g, np.nan) for name, g in reference.gradients.items()}
        verdict = _verdict(judged, gradients=gradients)
        assert verdict.worst_gradient_error == np.inf
        assert verdict.grade is Grade.WRONG

    def test_items_that_are_not_judged_do_not_count(self) -> None:
        problem = make_problem("portfolio-n100", quick=True)
        reference = compute_reference(problem)
        is_judged = np.ones(problem.batch, dtype=bool)
        is_judged[0] = False
        gradient = reference.gradients["y"].copy()
        gradient[0] += 100.0
        verdict = judge(problem, replace(reference, is_judged=is_judged), reference.primal, {"y": gradient})
        assert verdict.grade is Grade.CORRECT
        assert verdict.judged_items == problem.batch - 1

    def test_error_is_relative_to_the_item_and_survives_zero_gradients(self) -> None:
        expected = np.array([[1.0, 0.0], [0.0, 0.0], [100.0, 0.0]])
        errors = gradient_errors(expected + np.array([0.1, 0.0]), expected, batched=True)
        np.testing.assert_allclose(errors, np.array([0.1, 0.1, 0.1]) / np.array([101 / 3, 101 / 3, 100.0]))
        zeros = np.zeros((2, 2))
        assert gradient_errors(zeros, zeros, batched=True).tolist() == [0.0, 0.0]
        assert gradient_errors(zeros + 1.0, zeros, batched=False).tolist() == [np.inf]

    def test_wrong_shape_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"gradient has shape \(2,\), expected \(2, 3\)"):
            gradient_errors(np.zeros(2), np.zeros((2, 3)), batched=True)


def test_primal_residual_by_hand() -> None:
    reference = compute_reference(make_problem("simplex-n50", quick=True))
    x = np.array([0.5, 0.5, 0.25, -0.125, 0.0, 0.0])
    assert primal_residual(reference.items[0], x) == pytest.approx(0.125)
    x[0] = 1.0
    assert primal_residual(reference.items[0], x) == pytest.approx(0.625)
