"""Gradients at degenerate points: the judge by hand, the command, our own rows, and training to the optimum."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from hsbackend.comparisons.__main__ import main
from hsbackend.comparisons.degenerate import (
    POINTS,
    Outcome,
    Point,
    ask,
    distance_to_hull,
    distance_to_set,
    han_sun_set,
    judge_jacobian,
    primal_error,
    run_points,
)
from hsbackend.comparisons.experiments.degenerate_contestants import degenerate_contestants, packages_of
from hsbackend.comparisons.experiments.degenerate_training import TOYS, Toy, run_training
from hsbackend.comparisons.judge import GRADIENT_TOLERANCE
from hsbackend.comparisons.reference import compute_reference

CONTESTANTS = {contestant.name: contestant for contestant in degenerate_contestants(1e-9)}
OURS = [name for name, contestant in CONTESTANTS.items() if contestant.is_ours]
PEERS = [name for name, contestant in CONTESTANTS.items() if not contestant.is_ours]
BY_NAME = {point.name: point for point in POINTS}
every_point = pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)


# ---------------------------------------------------------------------------------------------------------------------
# The points and the judge
# ---------------------------------------------------------------------------------------------------------------------


@every_point
def test_the_solutions_known_by_hand_are_those_of_the_reference(point: Point) -> None:
    """Feasible, and as good as an interior-point method finds; its x is no reference where the Hessian is singular."""
    C, d = point.inequalities()
    x = point.optimum
    assert (C @ x <= d).all()
    assert np.array_equal(point.A @ x, point.b)
    assert han_sun_set(point), "no multiplier carries the force: not an optimum"
    if point.Q.any():
        found = compute_reference(point.problem()).primal[0]
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-9)
    assert primal_error(point, x) == 0.0
    assert primal_error(point, x + 0.125) > 0.01


def test_the_problem_of_a_point_is_the_point() -> None:
    """The cvxpy model and the matrices: same optimum by CLARABEL as by hand."""
    for point in POINTS:
        problem = point.problem()
        for scale in (1.0, 2.0):
            model = problem.build(scale)
            model.parameters[0].value = point.v
            model.problem.solve(solver="CLARABEL")
            assert primal_error(point, np.asarray(model.variables[0].value)) < 1e-3
        qp = problem.qp_data(*problem.inputs())
        assert torch.equal(qp.q, -torch.from_numpy(point.v).expand(problem.batch, -1))
        assert torch.equal(qp.Q[0], torch.from_numpy(point.Q))


def test_han_sun_sets_by_hand() -> None:
    weak = [np.eye(3), np.eye(3) - np.outer([1, 2, 2], [1, 2, 2]) / 9.0]
    found = han_sun_set(BY_NAME["half-space"])
    assert len(found) == 2
    assert all(distance_to_set(P, found) < 1e-15 for P in weak)

    # The row is needed, and it does not matter how many of its copies are held.
    (only,) = han_sun_set(BY_NAME["duplicates"])
    np.testing.assert_allclose(only, [[0.5, -0.5], [-0.5, 0.5]], atol=1e-15)

    # The multiplier of x_2 is positive, that of x_1 is zero: x_1 is free, with curvature 2, or held.
    corner = han_sun_set(BY_NAME["box-corner"])
    assert len(corner) == 2
    assert distance_to_set(np.diag([0.5, 0.0]), corner) < 1e-15
    assert distance_to_set(np.zeros((2, 2)), corner) < 1e-15

    # Either pair of opposite rows carries v - x, and so do all four.
    apex = han_sun_set(BY_NAME["apex"])
    assert len(apex) == 3
    for P in (np.zeros((3, 3)), np.diag([1.0, 0.0, 0.0]), np.diag([0.0, 1.0, 0.0])):
        assert distance_to_set(P, apex) < 1e-14


@every_point
def test_elements_are_symmetric_projectors_in_the_metric(point: Point) -> None:
    for P in han_sun_set(point):
        np.testing.assert_allclose(P, P.T, atol=1e-14)
        np.testing.assert_allclose(P @ point.Q @ P, P, atol=1e-14)


def test_distance_to_the_hull() -> None:
    elements = [np.zeros((2, 2)), np.diag([1.0, 0.0]), np.diag([0.0, 1.0])]
    assert distance_to_hull(np.diag([0.25, 0.5]), elements) < 1e-12
    assert distance_to_hull(np.diag([1.0, 1.0]), elements) == pytest.approx(0.5**0.5)
    assert distance_to_hull(np.diag([-3.0, 0.0]), elements) == pytest.approx(3.0)
    assert distance_to_set(np.diag([0.25, 0.5]), elements) == pytest.approx((0.25**2 + 0.5**2) ** 0.5)


def test_outcomes() -> None:
    point = BY_NAME["half-space"]
    x = point.optimum
    projector, other = han_sun_set(point)
    for jacobian, moved, outcome in (
        (projector, 0.0, Outcome.ELEMENT),
        (0.5 * (projector + other), 0.0, Outcome.MIXTURE),
        (2.0 * np.eye(3), 0.0, Outcome.OUTSIDE),
        (np.full((3, 3), np.nan), 0.0, Outcome.NOT_FINITE),
        (projector, 1.0, Outcome.WRONG_POINT),
        (projector, np.nan, Outcome.WRONG_POINT),
    ):
        assert judge_jacobian(point, "somebody", x + moved, jacobian).outcome is outcome
    row = judge_jacobian(point, "somebody", x, np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    assert row.asymmetry == 1.0
    assert row.excess == 2.0


# ---------------------------------------------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@every_point
def test_our_jacobians_are_elements(point: Point, name: str) -> None:
    row = ask(CONTESTANTS[name], point)
    assert row.error is None
    assert row.outcome is Outcome.ELEMENT
    assert row.to_set < 1e-9
    assert row.primal_error < 1e-9
    assert row.asymmetry < 1e-12
    assert row.excess < 1e-12


def test_the_choice_of_the_element_has_an_effect() -> None:
    point = BY_NAME["half-space"]
    held, free = (ask(CONTESTANTS[name], point).jacobian for name in ("hs-qp", "hs-qp-support"))
    np.testing.assert_allclose(held, np.eye(3) - np.outer([1, 2, 2], [1, 2, 2]) / 9.0, atol=1e-14)
    np.testing.assert_allclose(free, np.eye(3), atol=1e-14)


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_that_is_installed_answers_a_point_in_general_position(name: str) -> None:
    """Not degenerate, so there is one right answer: a wrong one is a fault of the harness, not of the peer."""
    contestant = CONTESTANTS[name]
    for package in packages_of(contestant):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    (row,) = run_points([contestant], [_general_point()])
    assert row.error is None
    assert row.outcome is Outcome.ELEMENT
    assert row.to_set < GRADIENT_TOLERANCE


def _general_point() -> Point:
    """Return the corner of the box with both bounds pushed against, and a third variable that is free."""
    corner = BY_NAME["fixed"]
    return Point(
        name="general",
        description="a box, one coordinate inside, two pushed against their bounds",
        v=np.array([0.25, 2.0, -1.0]),
        primal=np.array([0.25, 1.0, 0.0]),
        Q=np.eye(3),
        A=corner.A,
        b=corner.b,
        G=corner.G,
        h=corner.h,
        lower=np.zeros(3),
        upper=np.ones(3),
        optimum=np.array([0.25, 1.0, 0.0]),
    )


@pytest.mark.parametrize("name", OURS)
def test_training_reaches_the_optimum(name: str) -> None:
    for row in run_training([CONTESTANTS[name]], seed=0, quick=True):
        assert row.error is None
        assert row.first_nan is None
        assert row.reached, (row.toy, row.final_loss)
        assert (np.diff(row.losses) <= 1e-12).all()


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_the_optimum_of_a_toy_is_degenerate_and_its_loss_is_zero(toy: Toy) -> None:
    """Some row is active without a multiplier, in the metric of the slack; the contestant's own solve agrees."""
    task = toy.make(0, False)
    v = task.optimum.expand(task.target.shape)
    rest = task.problem.inputs()[1:]
    x = CONTESTANTS["hs-qp"].setup(task.problem)(v, *rest)
    torch.testing.assert_close(x, task.target, rtol=0, atol=1e-9)
    qp = task.problem.qp_data(v, *rest)
    slack = qp.h - (qp.G @ task.target.unsqueeze(-1)).squeeze(-1)
    force = v - (qp.Q @ task.target.unsqueeze(-1)).squeeze(-1)
    # No force, and yet rows at their limits.
    unpushed = force.abs().amax(-1) < 1e-12
    assert bool(unpushed.any())
    assert bool((slack[unpushed].abs() < 1e-12).any())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_degenerate_writes_the_page_and_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["diffcp-tight", "hs-layer", "hs-qp"]
    assert main(["degenerate", "--quick", "--contestants", *names, "--output", str(tmp_path)]) == 0
    with (tmp_path / "degenerate.csv").open(newline="") as stream:
        records = list(csv.DictReader(stream))
    assert [(r["point"], r["contestant"]) for r in records] == [(p.name, name) for p in POINTS for name in names]
    for record in records:
        assert record["versions"].startswith("hsbackend ")
        if record["contestant"].startswith("hs-"):
            assert record["outcome"] == "element", record
            assert float(record["to_set"]) < 1e-9
    page = (tmp_path / "degenerate.md").read_text()
    for heading in ("# Gradients at degenerate points", "## Jacobians", "## Training", "## Limitations"):
        assert f"\n{heading}\n" in f"\n{page}"
    assert "- Threads: torch " in page
    assert "| elements returned |  |" in page
    printed = capsys.readouterr().out
    assert "reached" in printed
    assert "12 of 12" in printed


def test_unknown_contestants_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["degenerate", "--contestants", "nobody"]) == 2
    assert "unknown contestant nobody, expected some of: diffcp" in capsys.readouterr().err
