"""Random spellings of named polyhedra: the routed answer is the general solver's, value and derivative."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from family_programs import FamilyCase, family_case
from hsbackend.plan import Plan
from hsbackend.solvers.result import Options
from hsbackend.status import Status

#: Every run covers this many programs, each a batch; `pytest -m nightly` the ten thousand of the promise.
EVERY_RUN, NIGHTLY, PER_TEST = 1000, 10_000, 250


def check(case: FamilyCase, seed: int) -> tuple[str, ...]:
    """Compare the routed plan with the active set on the whole program; return what was recognised."""
    program, parameters = case.program, case.parameters
    routed, general = Plan(program), Plan(program, "active_set")
    assert routed.route.polyhedral, f"seed {seed}: {routed.route}"
    ours, theirs = routed.solve(parameters, Options()), general.solve(parameters, Options())
    label = f"seed {seed}, {routed.route.reason}"
    np.testing.assert_array_equal(ours.status, theirs.status, label)
    solved = ours.status == Status.SOLVED
    assert np.isnan(ours.primal[~solved]).all(), label
    seen = program.outputs
    size = 1.0 + np.abs(theirs.primal[solved][:, seen]).max(initial=0.0)
    np.testing.assert_allclose(ours.primal[solved][:, seen], theirs.primal[solved][:, seen], rtol=0.0, atol=1e-9 * size,
                               err_msg=label)  # fmt: skip

    # The multipliers need not be unique: check the KKT conditions against the data.
    hessian, rows = program.quadratic.dense(parameters)[0], program.matrix.dense(parameters)[0]
    linear, rhs = program.linear.evaluate(parameters, len(solved)), program.rhs.evaluate(parameters, len(solved))
    x, nu = ours.primal[solved], ours.multipliers[solved]
    size = 1.0 + np.abs(nu).max(initial=0.0)
    stationarity = x @ hessian + linear[solved] + nu @ rows
    inequality = slice(program.num_equalities, None)
    slack = (rhs[solved] - x @ rows.T)[:, inequality]
    np.testing.assert_allclose(stationarity, 0.0, atol=1e-8 * size, err_msg=label)
    assert slack.min(initial=0.0) >= -1e-8 * size, label
    assert nu[:, inequality].min(initial=0.0) >= -1e-8 * size, label
    np.testing.assert_allclose(nu[:, inequality] * slack, 0.0, atol=1e-8 * size, err_msg=label)

    cotangent = np.random.default_rng(seed).normal(size=ours.primal.shape) * seen
    adjoint, truth = routed.adjoint(ours, cotangent, None), general.adjoint(theirs, cotangent, None)
    np.testing.assert_allclose(adjoint.primal[solved][:, seen], truth.primal[solved][:, seen], rtol=1e-6, atol=1e-6,
                               err_msg=label)  # fmt: skip
    u, w = adjoint.primal[solved], adjoint.rows[solved]
    size = 1.0 + np.abs(w).max(initial=0.0)
    np.testing.assert_allclose(u @ hessian + w @ rows, cotangent[solved], atol=1e-7 * size, err_msg=label)
    return tuple(group.label for group in routed.route.groups)


def _run(first: int, count: int) -> None:
    recognised: Counter[str] = Counter()
    for seed in range(first, first + count):
        recognised.update(check(family_case(seed), seed))
    assert {"simplex", "box with a budget", "l1 ball", "monotone chain", "transport polytope"} <= set(recognised)


@pytest.mark.parametrize("first", range(0, EVERY_RUN, PER_TEST))
def test_routed_answers_are_the_general_solvers(first: int) -> None:
    _run(first, PER_TEST)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(EVERY_RUN, EVERY_RUN + NIGHTLY, PER_TEST))
def test_ten_thousand_routings(first: int) -> None:
    _run(first, PER_TEST)
