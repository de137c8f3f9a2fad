"""Accuracy with known answers: the truth itself, the residual by hand, what float64 attains, and the command."""

from __future__ import annotations

import csv
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from hsbackend.comparisons.__main__ import main
from hsbackend.comparisons.accuracy import (
    CASES,
    QUICK,
    WELL_CONDITIONED,
    Programs,
    find_truth,
    kkt_residual,
    make,
    measure,
    solve_exactly,
)

BY_NAME = {case.name: case for case in CASES}
#: What float32 results may add to a residual.
ROUNDING = {"float64": 0.0, "float32": 2.0**-23}


def test_elimination_in_integers_is_exact() -> None:
    """The Hilbert matrix of floating-point numbers, condition 1e13: one rounding at the end."""
    n = 10
    hilbert = 1.0 / (np.arange(n)[:, None] + np.arange(n) + 1.0)
    found = solve_exactly(hilbert, np.eye(n))
    assert found is not None
    # The first row of matrix times inverse, in rational numbers: only the rounding of the inverse is left.
    for column in range(n):
        product = sum(
            Fraction(float(a)) * Fraction(float(b)) for a, b in zip(hilbert[0], found[:, column], strict=True)
        )
        terms = np.abs(hilbert[0] * found[:, column]).sum()
        assert abs(float(product) - (column == 0)) <= 2.0**-53 * terms
    np.testing.assert_array_equal(solve_exactly(np.array([[0.0, 2.0], [4.0, 0.0]]), np.ones((2, 1))), [[0.25], [0.5]])
    assert solve_exactly(np.ones((2, 2)), np.ones((2, 1))) is None


def _one_row() -> Programs:
    """Minimise |x|^2 / 2 - 3 x_1 subject to x_1 <= 1 and x_1 <= 5, x_2 = 2: x = (1, 2), multipliers -2 and 2."""
    return Programs(
        Q=np.eye(2)[None],
        q=np.array([[-3.0, 0.0]]),
        A=np.array([[[0.0, 1.0]]]),
        b=np.array([[2.0]]),
        G=np.array([[[1.0, 0.0], [1.0, 0.0]]]),
        h=np.array([[1.0, 5.0]]),
        active=1,
        units=np.ones(2),
    )


def test_truth_and_residual_by_hand() -> None:
    program = _one_row()
    truth = find_truth(program, np.array([[7.0, 8.0]]))
    assert truth.known.all()
    np.testing.assert_array_equal(truth.x, [[1.0, 2.0]])
    np.testing.assert_array_equal(truth.y, [[-2.0]])
    np.testing.assert_array_equal(truth.z, [[2.0, 0.0]])
    np.testing.assert_array_equal(truth.gradient, [[0.0, 0.0]])

    def residual(x: tuple[float, float], y: float, z: tuple[float, float]) -> float:
        return float(kkt_residual(program, np.array([x]), np.array([[y]]), np.array([z]), 0.0)[0])

    assert residual((1.0, 2.0), -2.0, (2.0, 0.0)) == 0.0
    # Stationarity of x_1: 1 - 3 + 2.5 of terms 6.5; the row holds, so the multiplier is free to be wrong.
    assert residual((1.0, 2.0), -2.0, (2.5, 0.0)) == pytest.approx(0.5 / 6.5)
    # x_1 = 1.5 violates the row by 0.5 of 2.5, and stationarity is fine with 1.5.
    assert residual((1.5, 2.0), -2.0, (1.5, 0.0)) == pytest.approx(0.5 / 2.5)
    # All of the multiplier at the loose row: slack 4 of 6, pull 2 of 6: the smaller one.
    assert residual((1.0, 2.0), -2.0, (0.0, 2.0)) == pytest.approx(2.0 / 6.0)
    # A multiplier of the wrong sign counts in full, here 2 of 6 + 4.
    assert residual((1.0, 2.0), -2.0, (4.0, -2.0)) == pytest.approx(2.0 / 10.0)


@pytest.mark.parametrize("case", [case for case in CASES if case.gap >= 0.0], ids=lambda case: case.name)
def test_the_truth_satisfies_the_kkt_conditions(case) -> None:  # type: ignore[no-untyped-def]
    programs = make(case, QUICK, 3)
    truth = find_truth(programs, np.ones(programs.q.shape))
    if not case.parallel:
        assert truth.known.all()
    assert (kkt_residual(programs, truth.x, truth.y, truth.z, 0.0)[truth.known] <= 4e-16).all()


@pytest.mark.parametrize("name", ["condition 1e4", "data times 1e8", "Q of half rank"])
def test_the_true_gradient_is_the_derivative(name: str) -> None:
    """x moves linearly while the active rows stay: a difference of exact answers, up to rounding of q."""
    programs = make(BY_NAME[name], QUICK, 5)
    rng = np.random.default_rng(6)
    cotangent, direction = rng.standard_normal((2, *programs.q.shape))
    truth = find_truth(programs, cotangent)
    step = 1e-6 * np.abs(programs.q).max() / np.abs(direction).max()
    moved = find_truth(replace(programs, q=programs.q + step * direction), cotangent)
    both = truth.known & moved.known
    assert both.any()
    difference = ((moved.x - truth.x) * cotangent).sum(axis=1)[both]
    np.testing.assert_allclose(difference, step * (truth.gradient * direction).sum(axis=1)[both], rtol=1e-6)


@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_float64_is_exact_where_nothing_is_ill_conditioned(name: str) -> None:
    double, single = measure(BY_NAME[name], QUICK, 1e-9, 0)
    assert double.solved == double.items == double.known
    errors = (double.own_terms, double.checked, double.x_error, double.multiplier_error, double.gradient_error)
    assert max(errors) <= 1e-12, errors
    assert single.solved == single.items == single.known
    assert max(single.x_error, single.multiplier_error, single.gradient_error) <= 2.0**-23


def test_accuracy_writes_the_page_and_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--quick", "--output", str(tmp_path)]) == 0
    with (tmp_path / "numerics.csv").open(newline="") as stream:
        records = list(csv.DictReader(stream))
    expected = [(case.name, dtype) for case in CASES for dtype in ("float64", "float32")]
    assert [(record["problem"], record["dtype"]) for record in records] == expected
    for record in records:
        case = BY_NAME[record["problem"]]
        tolerance = (case.tolerance or 1e-9) + ROUNDING[record["dtype"]]
        solved, items = int(record["solved"]), int(record["items"])
        # Whatever is not within the tolerance has a failure status, and every failure has a name.
        assert int(record["missed"]) == 0, record
        assert solved == 0 or float(record["checked"]) <= tolerance, record
        failures = [part.split() for part in record["statuses"].split(", ") if part]
        assert sum(int(count) for count, _ in failures) == items - solved, record
        assert all(status not in ("SOLVED", "CLOSEST") for _, status in failures)
        if case.gap < 0.0:
            assert record["statuses"] == f"{items} INFEASIBLE"
        if record["problem"] in WELL_CONDITIONED and record["dtype"] == "float64":
            assert float(record["own_terms"]) <= 1e-12
        assert f"torch {torch.__version__}" in record["versions"]
    page = (tmp_path / "numerics.md").read_text()
    for heading in ("# Numerical accuracy", "## What the tolerance means", "## Measured", "## Limitations"):
        assert f"\n{heading}\n" in f"\n{page}"
    assert "miss the tolerance 1e-09: 0" in capsys.readouterr().out


def test_the_gpu_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["accuracy", "--quick", "--device", "cuda"]) == 2
    assert "runs on the CPU; use --device cpu" in capsys.readouterr().err
