"""The suite `families`: sets and models agree, specialised contestants are judged like everybody, series grow."""

from __future__ import annotations

import csv
import importlib.util
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
import torch

from hsbackend.comparisons.__main__ import main
from hsbackend.comparisons.contestants import Contestant, Kind, choose_contestants
from hsbackend.comparisons.named_sets import (
    Birkhoff,
    BoxWithRows,
    Budget,
    L1Ball,
    Monotone,
    NamedSet,
    Simplex,
)
from hsbackend.comparisons.problems import SUITES, BenchmarkProblem, l1_ball_projection, make_problem
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.reference import compute_reference
from hsbackend.comparisons.results import Row
from hsbackend.comparisons.scaling import SERIES, growth_exponent, run_series
from hsbackend.comparisons.speed import run_speed, steps_of
from hsbackend.comparisons.suites import every_contestant, suite_contestants

NAMES = SUITES["families"]

needs_entmax = pytest.mark.skipif(
    importlib.util.find_spec("entmax") is None,
    reason="sparsemax needs entmax, an optional dependency (extra `compare`)",
)
needs_jaxopt = pytest.mark.skipif(
    importlib.util.find_spec("jaxopt") is None,
    reason="the jaxopt contestants need jaxopt, an optional dependency (extra `compare`)",
)


def _run(problems: Sequence[BenchmarkProblem], *names: str) -> dict[tuple[str, str], Row]:
    contestants: Sequence[Contestant] = choose_contestants(every_contestant(1e-9), list(names))
    progress = Progress(steps_of(problems, contestants), io.StringIO())
    rows = run_speed(problems, contestants, device=torch.device("cpu"), budget_s=0.0, progress=progress)
    return {(row.problem, row.contestant): row for row in rows}


def _constraints(named_set: NamedSet, x: cp.Variable) -> list[cp.Constraint]:
    """Write a set down from its definition; x is flat."""
    match named_set:
        case Simplex(_, radius):
            return [x >= 0, cp.sum(x) == radius]
        case L1Ball(_, radius):
            return [cp.sum(cp.abs(x)) <= radius]
        case Budget(coefficients, total, lower, upper):
            return [x >= lower, x <= upper, coefficients @ x == total]
        case Birkhoff(side):
            X = cp.reshape(x, (side, side), order="C")
            return [X >= 0, cp.sum(X, axis=0) == 1, cp.sum(X, axis=1) == 1]
        case Monotone():
            return [x[:-1] <= x[1:]]
        case BoxWithRows(A, b, G, h, lower, upper):
            return [A @ x == b, G @ x <= h, x >= lower, x <= upper]


class TestProblems:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("name", NAMES)
    def test_named_set_and_matrices_are_the_same_problem(self, name: str, seed: int) -> None:
        """`test_problems` compares the matrices with the cvxpy model."""
        problem = make_problem(name, quick=True, seed=seed)
        reference = compute_reference(problem)
        (point,) = problem.parameters
        for i in range(problem.batch):
            x = cp.Variable(problem.cotangent.shape[1])
            distance = cp.sum_squares(x - point.value[i].flatten().numpy())
            model = cp.Problem(cp.Minimize(distance), _constraints(problem.named_set, x))
            model.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
            np.testing.assert_allclose(x.value, reference.primal[i], atol=1e-6)

    @pytest.mark.parametrize("factor", [0.02, -1.0])
    def test_orthant_of_the_l1_matrices_follows_the_point(self, factor: float) -> None:
        """Inside the ball nothing is active, and the other orthant is as good."""
        problem = l1_ball_projection(6, 4, seed=0)
        point = problem.parameters[0]
        moved = replace(problem, parameters=(replace(point, value=factor * point.value),))
        reference = compute_reference(moved)
        if factor > 0:
            np.testing.assert_allclose(reference.primal, moved.parameters[0].value.numpy(), atol=1e-12)
            np.testing.assert_allclose(reference.gradients["y"], problem.cotangent.numpy(), atol=1e-10)
        else:
            np.testing.assert_allclose(reference.primal, -compute_reference(problem).primal, atol=1e-12)

    def test_general_problems_name_no_set(self) -> None:
        named = {name for name in SUITES["speed"] if make_problem(name, quick=True).named_set is not None}
        assert named == {"portfolio-n100", "simplex-n50", "birkhoff-4x4"}


class TestContestants:
    @pytest.mark.parametrize("name", NAMES)
    def test_direct_api_is_correct_on_every_family(self, name: str) -> None:
        ((_, row),) = _run([make_problem(name, quick=True)], "hs-direct").items()
        assert row.error is None
        assert row.outcome == "correct"
        assert row.verdict is not None
        assert row.verdict.kkt_residual is not None
        assert row.verdict.kkt_residual < 1e-9
        assert row.verdict.worst_gradient_error < 1e-7

    def test_plain_torch_is_correct_and_floors_are_not_judged(self) -> None:
        problems = [make_problem(name, quick=True) for name in ("simplex-n50", "l1-n100", "monotone-n100")]
        rows = _run(problems, "sort", "torch-sort", "pav-loop")
        assert {key: row.outcome for key, row in rows.items()} == {
            ("simplex-n50", "sort"): "floor",
            ("simplex-n50", "torch-sort"): "correct",
            ("l1-n100", "sort"): "floor",
            ("l1-n100", "torch-sort"): "correct",
            ("monotone-n100", "pav-loop"): "floor",
        }
        assert all(row.timing is not None for row in rows.values())

    def test_pav_loop_pools_even_though_it_is_not_judged(self) -> None:
        problem = make_problem("monotone-n100", quick=True)
        (contestant,) = choose_contestants(every_contestant(1e-9), ["pav-loop"])
        primal = contestant.setup(problem)(*problem.inputs()).detach().numpy()
        np.testing.assert_allclose(primal, compute_reference(problem).primal, atol=1e-12)

    @needs_entmax
    def test_sparsemax_is_correct_with_full_and_partial_sort(self) -> None:
        problem = replace(SERIES["families"]["grow-simplex"].make(40, 0), name="simplex-n40")
        rows = _run([problem, make_problem("simplex-n50", quick=True)], "sparsemax", "sparsemax-topk")
        assert {key: row.outcome for key, row in rows.items()} == {
            ("simplex-n40", "sparsemax"): "correct",
            ("simplex-n40", "sparsemax-topk"): "correct",
            # Six entries are no more than the partial sort would take.
            ("simplex-n50", "sparsemax"): "correct",
        }

    @needs_jaxopt
    def test_jaxopt_is_judged_in_float64_and_leaves_jax_as_it_was(self) -> None:
        import jax

        before = jax.config.jax_enable_x64
        problems = [make_problem(name, quick=True) for name in ("simplex-n50", "l1-n100", "budget-n100")]
        rows = _run(problems, "jaxopt")
        # The box section bisects to a fixed tolerance.
        assert [row.outcome for row in rows.values()] == ["correct", "correct", "rough"]
        simplex = rows["simplex-n50", "jaxopt"].verdict
        assert simplex is not None
        assert simplex.primal_error < 1e-14
        assert jax.config.jax_enable_x64 == before

    @needs_jaxopt
    def test_jaxopt_dual_has_the_gradient_that_the_default_lacks(self) -> None:
        rows = _run([make_problem("birkhoff-4x4", quick=True)], "jaxopt", "jaxopt-tight")
        assert [row.outcome for row in rows.values()] == ["wrong", "correct"]
        default = rows["birkhoff-4x4", "jaxopt"].verdict
        assert default is not None
        assert default.typical_gradient_error == pytest.approx(1.0)

    @pytest.mark.parametrize(("contestant", "package"), [("sparsemax", "entmax"), ("jaxopt", "jaxopt")])
    def test_missing_package_is_a_row_that_names_the_extra(
        self, contestant: str, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        (row,) = _run([make_problem("simplex-n50", quick=True)], contestant).values()
        assert row.outcome == "failed"
        assert row.error is not None
        assert 'pip install "hsbackend[compare]"' in row.error

    def test_contestants_take_only_sets_they_know(self) -> None:
        by_name = {c.name: c for c in every_contestant(1e-9)}
        monotone, general = make_problem("monotone-n100", quick=True), make_problem("qp-n10", quick=True)
        assert not by_name["sparsemax"].accepts(monotone)
        assert not by_name["hs-direct"].accepts(general)
        with pytest.raises(ValueError, match="sparsemax does not know Monotone"):
            by_name["sparsemax"].setup(monotone)

    @needs_entmax
    def test_sparsemax_refuses_other_radii(self) -> None:
        (sparsemax,) = choose_contestants(every_contestant(1e-9), ["sparsemax"])
        doubled = replace(make_problem("simplex-n50", quick=True), named_set=Simplex(6, 2.0))
        with pytest.raises(ValueError, match="sparsemax projects on the unit simplex, got Simplex"):
            sparsemax.setup(doubled)

    def test_large_dense_problems_are_not_for_qplayer(self) -> None:
        by_name = {c.name: c for c in every_contestant(1e-9)}
        assert by_name["qplayer"].accepts(make_problem("birkhoff-16x16"))
        assert not by_name["qplayer"].accepts(make_problem("birkhoff-32x32"))

    def test_suites_differ_by_the_contestants_for_named_sets(self) -> None:
        general = {c.name for c in suite_contestants("speed", 1e-9)}
        everybody = suite_contestants("families", 1e-9)
        assert {c.name for c in everybody if c.kind is Kind.GENERAL} == general
        assert not everybody[0].is_ours
        assert everybody[-1].is_ours


class TestSeries:
    @pytest.mark.parametrize("name", SERIES["families"])
    def test_problems_know_their_place(self, name: str) -> None:
        series = SERIES["families"][name]
        problems = series.problems(quick=True, seed=0)
        sizes = [series.size_of(problem) for problem in problems]
        assert sizes == [p.cotangent.shape[1] if series.axis == "n" else p.batch for p in problems]
        others = [other for other in SERIES["families"].values() if other is not series]
        assert all(other.size_of(problem) is None for other in others for problem in problems)

    @pytest.mark.parametrize("name", SERIES["families"])
    def test_axis_ends_at_a_hundred_thousand(self, name: str) -> None:
        assert SERIES["families"][name].sizes[-1] == 100_000

    def test_largest_point_is_made_without_matrices(self) -> None:
        series = SERIES["families"]["grow-monotone"]
        assert series.make(100_000, 0).cotangent.shape == (4, 100_000)

    def test_contestant_that_fails_or_is_slow_goes_no_further(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("too large")

        problems = SERIES["families"]["grow-simplex"].problems(quick=True, seed=0)
        steady, failing = choose_contestants(every_contestant(1e-9), ["sort", "torch-sort"])
        failing = replace(failing, make_solve=fail)
        general = choose_contestants(every_contestant(1e-9), ["diffcp"])
        settings = {"device": torch.device("cpu"), "budget_s": 0.0, "progress": Progress(9, io.StringIO())}
        rows = run_series(problems, [steady, failing, *general], **settings)
        told = [(row.problem, row.contestant, row.outcome) for row in rows]
        first, second = (problem.name for problem in problems)
        assert told == [(first, "sort", "floor"), (first, "torch-sort", "failed"), (second, "sort", "floor")]

        monkeypatch.setattr("hsbackend.comparisons.scaling.LONGEST_CALL_MS", 0.0)
        assert [row.problem for row in run_series(problems, [steady], **settings)] == [first]

    def test_exponent_of_a_power_is_the_power(self) -> None:
        sizes = [10, 100, 1_000, 10_000, 100_000]
        assert growth_exponent(sizes, [3e-3 * size**1.5 for size in sizes]) == pytest.approx(1.5)

    def test_exponent_is_read_off_the_upper_half(self) -> None:
        sizes = [10, 100, 1_000, 10_000, 100_000]
        assert growth_exponent(sizes, [7.0, 7.0, 1.0, 10.0, 100.0]) == pytest.approx(1.0)

    def test_exponent_needs_two_times(self) -> None:
        assert growth_exponent([10, 100, 1_000], [1.0, None, 2.0]) is None
        assert growth_exponent([10, 100, 1_000], [None, 1.0, 10.0]) == pytest.approx(1.0)


class TestCommandLine:
    def test_families_report_has_rows_overviews_and_series(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        problems = ["simplex-n50", "birkhoff-4x4", "portfolio-n100", "grow-simplex", "grow-birkhoff-batch"]
        contestants = ["sort", "torch-sort", "diffcp-tight", "hs-direct", "hs-layer"]
        arguments = ["--suite", "families", "--quick", "--problems", *problems, "--contestants", *contestants]
        assert main(["speed", *arguments, "--output", str(tmp_path)]) == 0

        with (tmp_path / "families.csv").open(newline="") as stream:
            records = {(r["problem"], r["contestant"]): r for r in csv.DictReader(stream)}
        assert records["simplex-n50", "sort"]["outcome"] == "floor"
        assert records["birkhoff-4x4", "hs-direct"]["outcome"] == "correct"
        assert records["grow-simplex-n8", "hs-direct"]["outcome"] == "correct"
        assert records["grow-birkhoff-batch-b8", "hs-direct"]["batch"] == "8"
        assert ("birkhoff-4x4", "torch-sort") not in records
        assert ("grow-simplex-n8", "diffcp-tight") not in records
        for (_, contestant), record in records.items():
            assert record["error"] == ""
            assert float(record["total_ms"]) > 0
            if contestant != "sort":
                assert record["outcome"] == "correct"

        markdown = (tmp_path / "families.md").read_text()
        for heading in (
            "# Speed comparison: named polyhedra",
            "## Summary",
            "## Direct API against peers",
            "## Total ms",
            "## portfolio-n100",
            "## grow-simplex",
            "## grow-birkhoff-batch",
        ):
            assert f"\n{heading}\n" in f"\n{markdown}"
        exponents = [line for line in markdown.splitlines() if line.startswith("| exponent |")]
        assert [line.count("|") for line in exponents] == [5, 3]
        assert "hs-layer +" in markdown or "hs-layer -" in markdown
        assert "grow-simplex: simplex, B=4, against n" in capsys.readouterr().out

    def test_speed_suite_is_as_before(self, tmp_path: Path) -> None:
        arguments = ["speed", "--quick", "--problems", "simplex-n50", "--contestants", "diffcp-tight"]
        assert main([*arguments, "--output", str(tmp_path)]) == 0
        assert (tmp_path / "speed.md").read_text().startswith("# Speed comparison\n")
        assert not (tmp_path / "families.md").exists()

    def test_unknown_problem_lists_problems_and_series(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["speed", "--quick", "--suite", "families", "--problems", "qp-n100"]) == 2
        told = capsys.readouterr().err
        assert "unknown problem 'qp-n100' in suite families, expected one of: simplex-n50" in told
        assert "grow-monotone" in told
