"""The runner: right answers get times, wrong ones get no ratio, failures keep their row."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hsbackend.comparisons.contestants import Kind, all_contestants, choose_contestants, solver_options
from hsbackend.comparisons.judge import Grade
from hsbackend.comparisons.problems import BenchmarkProblem, make_problem
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.results import Row, best_peer, diffcp_yardstick, speed_up
from hsbackend.comparisons.speed import describe_error, run_speed, steps_of


@dataclass(frozen=True)
class FakeContestant:
    """A contestant made of one function."""

    name: str
    solve: Callable[..., Tensor]
    description: str = "fake"
    is_ours: bool = False
    is_diffcp: bool = False
    kind: Kind = Kind.GENERAL

    def accepts(self, problem: BenchmarkProblem) -> bool:
        return True

    def setup(self, problem: BenchmarkProblem) -> Callable[..., Tensor]:
        return self.solve


def _sort_based_simplex_projection(y: Tensor) -> Tensor:
    """Project on the simplex by sorting (Held, Wolfe and Crowder 1974); autograd differentiates it rightly."""
    ordered = y.sort(dim=1, descending=True).values
    count = torch.arange(1, y.shape[1] + 1, dtype=y.dtype)
    shift = (ordered.cumsum(dim=1) - 1.0) / count
    support = (ordered > shift).sum(dim=1, keepdim=True)
    return (y - shift.gather(1, support - 1)).clamp_min(0.0)


def _raise(y: Tensor) -> Tensor:
    raise RuntimeError("item 3:\n  infeasible")


def _run(*contestants: FakeContestant) -> dict[str, Row]:
    problems = [make_problem("simplex-n50", quick=True)]
    progress = Progress(steps_of(problems, contestants), io.StringIO())
    rows = run_speed(problems, contestants, device=torch.device("cpu"), budget_s=0.0, progress=progress)
    return {row.contestant: row for row in rows}


def test_right_answer_is_correct_and_timed() -> None:
    row = _run(FakeContestant("right", _sort_based_simplex_projection))["right"]
    assert row.verdict is not None
    assert row.verdict.grade is Grade.CORRECT
    assert row.timing is not None
    assert row.timing.repetitions == 3
    assert row.counts


def test_wrong_answer_is_timed_but_has_no_ratio() -> None:
    rows = _run(
        FakeContestant("right", _sort_based_simplex_projection, is_ours=True),
        FakeContestant("drops bounds", lambda y: y + (1.0 - y.sum(dim=1, keepdim=True)) / y.shape[1]),
    )
    wrong = rows["drops bounds"]
    assert wrong.outcome == "wrong"
    assert wrong.timing is not None
    assert speed_up(wrong, rows["right"]) is None
    assert best_peer(list(rows.values())) is None


def test_wrong_gradient_is_caught_behind_a_right_primal() -> None:
    def halved(y: Tensor) -> Tensor:
        x = _sort_based_simplex_projection(y)
        return 0.5 * x + 0.5 * x.detach()

    row = _run(FakeContestant("halved", halved))["halved"]
    assert row.verdict is not None
    assert row.verdict.success_rate == 1.0
    assert row.verdict.gradient_error["y"] == pytest.approx(0.5)
    assert row.outcome == "wrong"


def test_detached_answer_is_a_failure_and_not_a_crash() -> None:
    row = _run(FakeContestant("detached", lambda y: _sort_based_simplex_projection(y.detach())))["detached"]
    assert row.outcome == "failed"
    assert row.error is not None
    assert "does not require grad" in row.error


def test_failing_contestant_keeps_its_row_and_disturbs_nobody() -> None:
    rows = _run(FakeContestant("raises", _raise), FakeContestant("right", _sort_based_simplex_projection))
    assert list(rows) == ["raises", "right"]
    assert rows["raises"].error == "RuntimeError: item 3: infeasible"
    assert rows["raises"].outcome == "failed"
    assert rows["right"].outcome == "correct"


def test_failure_while_timing_keeps_the_verdict_and_loses_the_ratio() -> None:
    calls = {"n": 0}

    def tires(y: Tensor) -> Tensor:
        calls["n"] += 1
        if calls["n"] > 3:
            raise RuntimeError("tired")
        return _sort_based_simplex_projection(y)

    row = _run(FakeContestant("tires", tires))["tires"]
    assert row.verdict is not None
    assert row.error == "RuntimeError: tired"
    assert row.timing is None
    assert not row.counts


def test_floor_has_a_time_and_neither_verdict_nor_ratio() -> None:
    rows = _run(
        FakeContestant("ours", _sort_based_simplex_projection, is_ours=True),
        FakeContestant("sorts", lambda y: y.sort(dim=1).values, kind=Kind.FLOOR),
    )
    assert rows["sorts"].outcome == "floor"
    assert rows["sorts"].verdict is None
    assert rows["sorts"].timing is not None
    assert best_peer(list(rows.values())) is None


def test_traceback_in_an_error_is_told_by_its_last_error() -> None:
    message = """callback failed: Traceback (most recent call last):
  File "/somewhere/a.py", line 1, in <module>
ValueError: first

During handling of the above exception:
package.TypingError: Failed in nopython mode
Unknown attribute 'shape'

File "/somewhere/b.py", line 2
"""
    expected = "RuntimeError: package.TypingError: Failed in nopython mode Unknown attribute 'shape'"
    assert describe_error(RuntimeError(message)) == expected


def test_warnings_of_a_contestant_become_notes() -> None:
    def warns(y: Tensor) -> Tensor:
        warnings.warn("Solved/Inaccurate.", stacklevel=1)
        return _sort_based_simplex_projection(y)

    assert _run(FakeContestant("warns", warns))["warns"].notes == ("Solved/Inaccurate.",)


def test_default_dtype_is_float64_inside_and_restored_outside() -> None:
    seen: list[torch.dtype] = []

    def look(y: Tensor) -> Tensor:
        seen.append(torch.get_default_dtype())
        return _sort_based_simplex_projection(y)

    before = torch.get_default_dtype()
    _run(FakeContestant("looks", look))
    assert set(seen) == {torch.float64}
    assert torch.get_default_dtype() == before


class TestRatios:
    def test_yardstick_is_diffcp_as_shipped_while_it_counts(self) -> None:
        right, wrong = _sort_based_simplex_projection, lambda y: 0.0 * y
        for shipped, expected in ((right, "diffcp"), (wrong, "diffcp-tight")):
            rows = _run(
                FakeContestant("diffcp", shipped, is_diffcp=True),
                FakeContestant("diffcp-tight", right, is_diffcp=True),
            )
            yardstick = diffcp_yardstick(list(rows.values()))
            assert yardstick is not None
            assert yardstick.contestant == expected

    def test_speed_up_divides_medians(self) -> None:
        rows = _run(
            FakeContestant("ours", _sort_based_simplex_projection, is_ours=True),
            FakeContestant("peer", _sort_based_simplex_projection),
        )
        ratio = speed_up(rows["ours"], rows["peer"])
        assert ratio == pytest.approx((rows["peer"].total_ms or 0.0) / (rows["ours"].total_ms or 1.0))

    def test_rough_peer_counts_and_rough_own_does_not(self) -> None:
        def rough(y: Tensor) -> Tensor:
            return _sort_based_simplex_projection(y) + 1e-5

        rows = _run(FakeContestant("peer", rough), FakeContestant("ours", rough, is_ours=True))
        assert [row.outcome for row in rows.values()] == ["rough", "rough"]
        assert rows["peer"].counts
        assert not rows["ours"].counts


class TestContestants:
    def test_stock_peers_solve_where_they_should_and_moreau_drops_bounds(self) -> None:
        pytest.importorskip("moreau")
        names = ["diffcp-tight", "moreau", "moreau-2x"]
        contestants = choose_contestants(all_contestants(), names)
        problems = [make_problem("simplex-n50", quick=True)]
        progress = Progress(steps_of(problems, contestants), io.StringIO())
        rows = run_speed(problems, contestants, device=torch.device("cpu"), budget_s=0.0, progress=progress)
        assert [row.outcome for row in rows] == ["correct", "wrong", "correct"]

    def test_qplayer_sums_gradients_of_shared_parameters(self) -> None:
        pytest.importorskip("proxsuite")
        contestants = choose_contestants(all_contestants(), ["qplayer"])
        problems = [make_problem("sudoku-4x4", quick=True)]
        progress = Progress(steps_of(problems, contestants), io.StringIO())
        (row,) = run_speed(problems, contestants, device=torch.device("cpu"), budget_s=0.0, progress=progress)
        assert row.verdict is not None
        assert row.verdict.gradient_error["A"] < 1e-3

    def test_spelled_out_bounds_sit_out_problems_without_bounds(self) -> None:
        (spelled,) = choose_contestants(all_contestants(), ["moreau-2x"])
        assert not spelled.accepts(make_problem("qp-n10", quick=True))
        assert spelled.accepts(make_problem("simplex-n50", quick=True))

    def test_missing_package_is_a_row_that_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "proxsuite.torch.qplayer", None)
        contestants = choose_contestants(all_contestants(), ["qplayer"])
        problems = [make_problem("simplex-n50", quick=True)]
        progress = Progress(steps_of(problems, contestants), io.StringIO())
        (row,) = run_speed(problems, contestants, device=torch.device("cpu"), budget_s=0.0, progress=progress)
        assert row.outcome == "failed"
        assert row.error is not None
        assert 'pip install "hsbackend[compare]"' in row.error

    def test_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"unknown contestant nonesuch, expected some of: diffcp, .*hs-layer"):
            choose_contestants(all_contestants(), ["nonesuch"])

    def test_accuracy_reaches_every_solver_under_its_own_names(self) -> None:
        pytest.importorskip("moreau")
        for solver in ("scs", "clarabel", "moreau", "qplayer", "hsbackend"):
            assert "1e-07" in str(solver_options(solver, 1e-7)), solver
        with pytest.raises(ValueError, match="unknown solver 'ecos'"):
            solver_options("ecos", 1e-7)
