"""The comparison of QP solvers: generators, judge, adapters of the contestants, runner, report and command."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
from collections.abc import Sequence
from pathlib import Path

import clarabel
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import linprog

from hsbackend.comparisons.__main__ import main
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.qp_contestants import (
    CONTESTANTS,
    Prepared,
    QPContestant,
    Request,
    RowSplit,
    bounds_as_rows,
    contestants_named,
    layout,
)
from hsbackend.comparisons.qp_families import FAMILIES, Key, QPInstance, keys_of
from hsbackend.comparisons.qp_judge import NO_ANSWER, Accuracy, Answer, judge_answer
from hsbackend.comparisons.qp_report import shifted_geometric_mean
from hsbackend.comparisons.qp_runner import (
    LEFT_OUT,
    TIME_LIMIT,
    Failure,
    Measured,
    QPRow,
    Worker,
    repetitions_of,
    run_families,
    steps_of_families,
)

_REQUEST = Request(accuracy=1e-9, limit_s=20.0)


def _box_qp() -> tuple[QPInstance, Answer]:
    """Return a program with its solution, by hand.

    minimise 1/2 |x - (2, -1, 3)|^2 s.t. x1 + x2 + x3 = 1, x1 - x2 <= 0, x2 >= 0, x3 <= 1 has x = (0, 0, 1); the
    gradient (-2, 1, -2) is balanced by y1 (1, 1, 1) + y2 (1, -1, 0) + (0, w2, w3) with y = (1, 1), w2 = -1, w3 = 1.
    """
    instance = QPInstance(
        P=sp.csc_matrix(np.eye(3)),
        q=np.array([-2.0, 1.0, -3.0]),
        A=sp.csc_matrix([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]]),
        low=np.array([1.0, -np.inf]),
        high=np.array([1.0, 0.0]),
        lower=np.array([-np.inf, 0.0, -np.inf]),
        upper=np.array([np.inf, np.inf, 1.0]),
    )
    return instance, _answer(x=[0.0, 0.0, 1.0], y=[1.0, 1.0], w=[0.0, -1.0, 1.0])


def _answer(x: Sequence[float], y: Sequence[float], w: Sequence[float]) -> Answer:
    return Answer(np.array(x), np.array(y), np.array(w), "solved", True)


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("size", [10, 50])
    def test_shapes_limits_and_convexity(self, name: str, size: int) -> None:
        instance = Key(size, name, 0).make()
        m, n = instance.shape
        assert abs(n - size) <= 0.2 * size
        assert instance.P.shape == (n, n)
        assert instance.A.shape == (m, n)
        assert (instance.low.shape, instance.high.shape) == ((m,), (m,))
        assert (instance.lower.shape, instance.upper.shape) == ((n,), (n,))
        assert (instance.low <= instance.high).all()
        assert (instance.lower <= instance.upper).all()
        for numbers in (instance.P.data, instance.q, instance.A.data):
            assert np.isfinite(numbers).all()
        dense = instance.P.toarray()
        np.testing.assert_array_equal(dense, dense.T)
        eigenvalues = np.linalg.eigvalsh(dense)
        assert eigenvalues.min() >= -1e-12 * max(1.0, eigenvalues.max())
        assert instance.is_linear == FAMILIES[name].is_linear == (not dense.any())

    @pytest.mark.parametrize("name", FAMILIES)
    def test_same_key_same_instance_other_number_another(self, name: str) -> None:
        first, again, other = (Key(20, name, number).make() for number in (0, 0, 1))
        for field in dataclasses.fields(QPInstance):
            ours, theirs = (getattr(instance, field.name) for instance in (first, again))
            if sp.issparse(ours):
                ours, theirs = ours.toarray(), theirs.toarray()
            np.testing.assert_array_equal(ours, theirs)
        same_rows = first.A.shape == other.A.shape and not (first.A != other.A).nnz
        assert not (same_rows and np.array_equal(first.q, other.q) and not (first.P != other.P).nnz)

    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("size", [10, 20, 100])
    def test_feasible(self, name: str, size: int) -> None:
        for number in range(FAMILIES[name].instances):
            instance = Key(size, name, number).make()
            split = RowSplit(instance)
            result = linprog(
                np.zeros(instance.q.size),
                A_ub=split.G if split.h.size else None,
                b_ub=split.h if split.h.size else None,
                A_eq=split.A if split.b.size else None,
                b_eq=split.b if split.b.size else None,
                bounds=np.column_stack([instance.lower, instance.upper]),
            )
            assert result.status == 0, (name, size, number, result.message)

    # Maros and Meszaros (1999), problems CVXQP1_S, CVXQP2_S, CVXQP3_S: eight digits of the optimum.
    @pytest.mark.parametrize(("number", "optimum"), [(0, 1.1590718e4), (1, 8.1209405e3), (2, 1.1943432e4)])
    def test_cvxqp_has_the_published_optimum(self, number: int, optimum: float) -> None:
        instance = Key(100, "cvxqp", number).make()
        rows, low, high, _ = bounds_as_rows(instance)
        split = RowSplit(QPInstance(instance.P, instance.q, rows, low, high, instance.lower, instance.upper))
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        cones = [clarabel.ZeroConeT(split.b.size), clarabel.NonnegativeConeT(split.h.size)]
        solution = clarabel.DefaultSolver(
            sp.csc_matrix(sp.triu(instance.P)),
            instance.q,
            sp.csc_matrix(sp.vstack([split.A, split.G])),
            np.concatenate([split.b, split.h]),
            cones,
            settings,
        ).solve()
        assert solution.obj_val == pytest.approx(optimum, rel=1e-7)

    def test_random_lp_is_optimal_where_the_formula_says(self) -> None:
        instance = Key(50, "random-lp", 0).make()
        split = RowSplit(instance)
        result = linprog(
            instance.q, split.G, split.h, split.A, split.b, np.column_stack([instance.lower, instance.upper])
        )
        dual_objective = float(result.eqlin.marginals @ split.b + result.ineqlin.marginals @ split.h)
        assert result.status == 0
        assert result.fun == pytest.approx(dual_objective, abs=1e-9)

    @pytest.mark.parametrize("name", ["equality-repeated", "svm-repeated", "lp-repeated"])
    def test_repeated_rows_are_dependent_exactly(self, name: str) -> None:
        instance = Key(20, name, 0).make()
        rows = instance.A.toarray()
        repeated = rows.shape[0] // 3
        first = rows[: rows.shape[0] - repeated][::2]
        last = rows[rows.shape[0] - repeated :]
        scale = np.where(np.arange(repeated) % 2 == 0, 1.0, -2.0)
        assert repeated > 1
        np.testing.assert_array_equal(last, scale[:, None] * first)

    def test_keys_go_from_small_to_large_and_obey_the_largest_size(self) -> None:
        keys = keys_of(["random-qp", "cvxqp"], [1000, 10, 500])
        assert [key.size for key in keys] == sorted(key.size for key in keys)
        assert {key.size for key in keys if key.family == "random-qp"} == {10, 500}
        assert sum(key.family == "cvxqp" and key.size == 10 for key in keys) == 3


class TestJudge:
    def test_accepts_the_solution(self) -> None:
        instance, answer = _box_qp()
        assert judge_answer(instance, answer).worst < 1e-15

    @pytest.mark.parametrize(
        ("part", "place", "change", "residual"),
        [
            ("x", 0, 1e-6, "primal"),
            ("x", 2, 1e-6, "primal"),
            ("y", 0, 1e-6, "dual"),
            ("y", 1, -1e-6, "dual"),
            ("w", 1, 1e-6, "dual"),
            # Against an infinite limit: does not count as a multiplier, so what it should balance shows.
            ("w", 0, 1e-6, "none"),
        ],
    )
    def test_refuses_what_is_perturbed(self, part: str, place: int, change: float, residual: str) -> None:
        instance, answer = _box_qp()
        values = getattr(answer, part).copy()
        values[place] += change
        accuracy = judge_answer(instance, dataclasses.replace(answer, **{part: values}))
        if residual == "none":
            assert accuracy.worst < 1e-15
        else:
            assert getattr(accuracy, residual) == pytest.approx(1e-6, rel=0.9)
            assert accuracy.worst > 1e-9

    def test_refuses_multipliers_of_the_wrong_sign(self) -> None:
        instance, answer = _box_qp()
        flipped = judge_answer(instance, dataclasses.replace(answer, y=-answer.y, w=-answer.w))
        assert flipped.primal < 1e-15
        assert flipped.dual > 0.1

    def test_refuses_multipliers_of_inactive_rows_by_the_gap(self) -> None:
        # min x^2/2 on [-1, 1] has x = 0; at x = 0.5 the gradient is balanced by w = -0.5 at the inactive lower limit.
        one = np.ones(1)
        rows = sp.csc_matrix((0, 1))
        instance = QPInstance(sp.csc_matrix([[1.0]]), 0.0 * one, rows, np.zeros(0), np.zeros(0), -one, one)
        accuracy = judge_answer(instance, _answer(x=[0.5], y=[], w=[-0.5]))
        assert accuracy.primal == 0.0
        assert accuracy.dual == 0.0
        assert accuracy.gap == pytest.approx((0.25 + 0.5) / 1.5)

    def test_residuals_are_relative_to_their_terms(self) -> None:
        # x = 1e6 (1 + 1e-8) where x = 1e6 is asked: 1e-2 absolute, 1e-8 relative.
        rows = sp.csc_matrix([[1.0]])
        limit, free = np.array([1e6]), np.array([np.inf])
        instance = QPInstance(sp.csc_matrix((1, 1)), np.zeros(1), rows, limit, limit, -free, free)
        accuracy = judge_answer(instance, _answer(x=[1e6 * (1.0 + 1e-8)], y=[0.0], w=[0.0]))
        assert accuracy.primal == pytest.approx(1e-8, rel=1e-3)

    def test_no_number_is_no_answer(self) -> None:
        instance, answer = _box_qp()
        for part in ("x", "y", "w"):
            values = getattr(answer, part).copy()
            values[0] = np.nan
            assert judge_answer(instance, dataclasses.replace(answer, **{part: values})) == NO_ANSWER

    def test_wrong_shape_is_refused(self) -> None:
        instance, answer = _box_qp()
        with pytest.raises(ValueError, match=r"y has shape \(3,\), expected \(2,\)"):
            judge_answer(instance, dataclasses.replace(answer, y=np.zeros(3)))


def _installed(contestant: QPContestant) -> None:
    try:
        importlib.metadata.version(contestant.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {contestant.package} of the extra [compare]")


def _run(contestant: QPContestant, instances: list[QPInstance]) -> list[Accuracy]:
    prepared = contestant.prepare(instances, _REQUEST)
    answers = prepared.answers(prepared.solve())
    assert all(answer.claims for answer in answers)
    return [judge_answer(instance, answer) for instance, answer in zip(instances, answers, strict=True)]


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda c: c.name)
class TestContestants:
    @pytest.mark.parametrize("family", ["portfolio", "control", "svm", "transport-lp", "lp-repeated"])
    def test_solves_small_instances(self, contestant: QPContestant, family: str) -> None:
        _installed(contestant)
        if contestant.linear_only and not FAMILIES[family].is_linear:
            family = "assignment-lp"
        instances = [Key(10, family, number).make() for number in range(2 if contestant.is_batched else 1)]
        assert len({layout(instance) for instance in instances}) == 1
        assert max(accuracy.worst for accuracy in _run(contestant, instances)) <= 1e-9

    def test_solves_equalities_two_sided_rows_and_both_kinds_of_bounds(self, contestant: QPContestant) -> None:
        _installed(contestant)
        instance, _ = _box_qp()
        # A row with two different limits, the upper one holding, and one with a lower limit only.
        rows = sp.csc_matrix(sp.vstack([instance.A, [[0.0, -1.0, 1.0], [1.0, 0.0, 0.0]]]))
        instance = dataclasses.replace(
            instance,
            A=rows,
            low=np.append(instance.low, [-5.0, 0.1]),
            high=np.append(instance.high, [0.6, np.inf]),
            lower=np.array([-np.inf, 0.0, 0.2]),
        )
        if contestant.linear_only:
            instance = dataclasses.replace(instance, P=sp.csc_matrix((3, 3)))
        assert max(accuracy.worst for accuracy in _run(contestant, [instance])) <= 1e-9


def test_split_rows_find_their_way_back() -> None:
    instance = dataclasses.replace(
        _box_qp()[0],
        A=sp.csc_matrix(np.arange(12.0).reshape(4, 3)),
        low=np.array([-1.0, 2.0, -np.inf, 0.0]),
        high=np.array([1.0, 2.0, 3.0, np.inf]),
    )
    split = RowSplit(instance)
    rows = instance.A.toarray()
    np.testing.assert_array_equal(split.A.toarray(), rows[[1]])
    np.testing.assert_array_equal(split.G.toarray(), np.vstack([rows[[0, 2]], -rows[[0, 3]]]))
    np.testing.assert_array_equal(split.h, [1.0, 3.0, 1.0, 0.0])
    np.testing.assert_array_equal(
        split.multipliers(np.array([7.0]), np.array([1.0, 2.0, 3.0, 4.0])), [1.0 - 3.0, 7.0, 2.0, -4.0]
    )


def test_unknown_contestant_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown contestant nonesuch, expected some of: hsbackend, .*linprog"):
        contestants_named(["nonesuch"])


def _never(instances: Sequence[QPInstance], request: Request) -> Prepared:
    raise AssertionError("the fake measure does not prepare anybody")


_QUICK, _SLOW, _BATCHED = (
    QPContestant("quick", "numpy", "", _never),
    QPContestant("slow", "numpy", "", _never),
    QPContestant("batched", "numpy", "", _never, is_batched=True),
)


class TestRunner:
    def test_slow_contestant_is_left_out_of_the_rest_of_the_family(self) -> None:
        calls: list[tuple[str, Key]] = []

        def measure(contestant: QPContestant, keys: Sequence[Key]) -> Measured:
            calls.append((contestant.name, keys[0]))
            if contestant is _SLOW and keys[0].family == "portfolio":
                raise Failure(TIME_LIMIT)
            return Measured([_zeros(key) for key in keys], 0.004, 3)

        keys = [key for key in keys_of(["portfolio", "control"], [10, 20]) if key.number < 2]
        rows, not_run = _run_fake(keys, [_QUICK, _SLOW], measure)
        assert not not_run
        assert sum(name == "slow" and key.family == "portfolio" for name, key in calls) == 1
        assert sum(name == "slow" and key.family == "control" for name, key in calls) == 4
        slow = [row for row in rows if row.contestant == "slow" and row.key.family == "portfolio"]
        assert [row.status for row in slow] == [TIME_LIMIT, *[LEFT_OUT] * 3]
        assert all(row.time_ms is None and row.counted_ms(1e-6) == 1000.0 for row in slow)
        assert {row.time_ms for row in rows if row.contestant == "quick"} == {4.0}

    def test_batch_is_one_call_and_its_time_is_shared(self) -> None:
        calls: list[int] = []

        def measure(contestant: QPContestant, keys: Sequence[Key]) -> Measured:
            calls.append(len(keys))
            return Measured([_zeros(key) for key in keys], 0.01 * len(keys), 3)

        keys = keys_of(["lasso", "cvxqp"], [10])
        rows, _ = _run_fake(keys, [_BATCHED], measure)
        # The three problems of CVXQP differ in the number of rows.
        assert calls == [5]
        assert {row.key.family for row in rows} == {"lasso"}
        assert all(row.time_ms == pytest.approx(10.0) for row in rows)

    def test_failure_is_a_row_that_counts_the_limit(self) -> None:
        def measure(contestant: QPContestant, keys: Sequence[Key]) -> Measured:
            raise Failure("ImportError: no such package")

        rows, _ = _run_fake(keys_of(["lasso"], [10]), [_QUICK], measure)
        assert [row.status for row in rows] == ["ImportError: no such package"] * 5
        assert not any(row.is_solved(1e-6) for row in rows)

    def test_deadline_names_what_was_not_run(self) -> None:
        keys = keys_of(["lasso"], [10, 20])
        rows, not_run = _run_fake(keys, [_QUICK], lambda *_: pytest.fail("measured"), deadline_s=-1.0)
        assert not rows
        assert not_run == keys

    def test_late_solve_is_not_solved(self) -> None:
        row = QPRow(Key(10, "lasso", 0), "a", 1, 1, False, Accuracy(0.0, 0.0, 0.0), 1001.0, 1, "solved", True, 1000.0)
        assert not row.is_solved(1e-6)
        assert dataclasses.replace(row, time_ms=999.0).is_solved(1e-9)
        assert not dataclasses.replace(row, time_ms=999.0, accuracy=Accuracy(0.0, 1e-8, 0.0)).is_solved(1e-9)

    def test_process_that_takes_too_long_is_ended_and_replaced(self) -> None:
        (ours,) = contestants_named(["hsbackend"])
        worker = Worker(Request(1e-9, 1e-5), 0.0, grace_s=0.0, compilation_s=0.0)
        with worker:
            with pytest.raises(Failure, match=TIME_LIMIT):
                worker.measure(ours, [Key(200, "random-qp", 0)])
            worker.request, worker.grace_s = _REQUEST, 300.0
            measured = worker.measure(ours, [Key(10, "portfolio", 0)])
        assert judge_answer(Key(10, "portfolio", 0).make(), measured.answers[0]).worst <= 1e-9
        assert 0.0 < measured.seconds < 20.0


def test_long_calls_are_timed_once_unless_they_compiled_something() -> None:
    assert repetitions_of(first_s=0.01, budget_s=0.05, has_compiled=False) == 5
    assert repetitions_of(first_s=0.5, budget_s=0.05, has_compiled=False) == 1
    assert repetitions_of(first_s=3.0, budget_s=0.05, has_compiled=False) == 0
    assert repetitions_of(first_s=30.0, budget_s=0.05, has_compiled=True) == 1


def _zeros(key: Key) -> Answer:
    m, n = key.make().shape
    return Answer(np.zeros(n), np.zeros(m), np.zeros(n), "solved", True)


def _run_fake(
    keys: list[Key], contestants: list[QPContestant], measure: object, deadline_s: float = 1e9
) -> tuple[list[QPRow], list[Key]]:
    progress = Progress(steps_of_families(keys), io.StringIO())
    return run_families(keys, contestants, measure, limit_s=1.0, deadline_s=deadline_s, progress=progress)  # pyright: ignore


def test_shifted_geometric_mean_by_hand() -> None:
    assert shifted_geometric_mean([1.0, 7.0], shift_ms=1.0) == pytest.approx(3.0)
    assert shifted_geometric_mean([5.0]) == pytest.approx(5.0)


def test_command_writes_csv_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["hsbackend", "hsbackend-batched", "clarabel", "linprog"]
    assert main(["qp", "--quick", "--contestants", *names, "--output", str(tmp_path)]) == 0
    with (tmp_path / "benchmarks-qp.csv").open(newline="") as stream:
        records = list(csv.DictReader(stream))
    for name in ("hsbackend", "clarabel"):
        assert {r["family"] for r in records if r["contestant"] == name} == set(FAMILIES)
    assert {r["family"] for r in records if r["contestant"] == "linprog"} == {
        f for f in FAMILIES if f.endswith("lp")
    } | {"lp-repeated"}
    for record in records:
        assert record["solved_at_1e-9"] == "1", record
        assert float(record["time_ms"]) > 0.0
        assert record["threads"] == "1"
        assert record["contestant_version"] != "not installed"
    markdown = (tmp_path / "benchmarks-qp.md").read_text()
    for heading in ("# QP solvers on published families", "## Up to 100 variables", "## Total", "### svm", "## Method"):
        assert f"\n{heading}\n" in f"\n{markdown}"
    assert "## Failures" not in markdown
    captured = capsys.readouterr()
    assert "solved at 1e-09" in captured.out
    assert "random-qp, size 10" in captured.err


def test_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qp", "--contestants", "nonesuch"]) == 2
    assert "unknown contestant nonesuch" in capsys.readouterr().err
    assert main(["qp", "--families", "nonesuch"]) == 2
    assert "unknown family nonesuch, expected some of: random-qp" in capsys.readouterr().err
    assert main(["qp", "--sizes", "5"]) == 2
    assert "--sizes 5 was given, the families begin at 10 variables" in capsys.readouterr().err
