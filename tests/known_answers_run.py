"""Run problems with known answers through the library and collect what the judge says.

    python tests/known_answers_run.py 1000000 1100000

runs those seeds on all cores and prints the seeds of complaints as they come. The tests are in
``tests/core/test_known_answers.py``; this is a module of its own so that worker processes can import it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import hsbackend
from hsbackend.plan import Plan, Solution
from hsbackend.route import SolverName
from hsbackend.solvers.result import Options
from hsbackend.status import Status
from known_answers import Array, KnownCase, Verdict, judge, known_case

#: Solvers that strictly convex problems are also asked for by name.
SOLVERS: dict[str, SolverName] = {
    "active_set": "active_set", "semismooth_newton": "semismooth_newton", "reference": "reference",
}  # fmt: skip


@dataclass
class Tally:
    """What a run over many seeds found.

    Attributes:
        wrong: one text per wrong item.
        given_up: one text per item that ended as NOT_CONVERGED.
        counts: items by what happened to them.
    """

    wrong: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, case: KnownCase, way: str, b: int, verdict: Verdict) -> None:
        label = f"seed {case.seed} item {b} ({way})"
        self.wrong += [f"{label}: {complaint}" for complaint in verdict.complaints]
        self.counts["items"] += 1
        self.counts["extreme items"] += int(case.knobs.extreme)
        if verdict.not_converged and way == "reference":
            self.counts["reference gave up"] += 1  # the twin of the fast solvers: for data of ordinary size
        elif verdict.not_converged:
            self.given_up.append(f"{label}: NOT_CONVERGED, {'extreme' if case.knobs.extreme else 'ordinary'}")
        elif case.fate[b] == Status.SOLVED:
            self.counts[f"unique {verdict.unique}"] += 1
        else:
            self.counts[Status(int(case.fate[b])).name] += 1

    def merge(self, other: Tally) -> None:
        """Add what another run found."""
        self.wrong += other.wrong
        self.given_up += other.given_up
        self.counts += other.counts


def _through_plan(case: KnownCase, way: str, tally: Tally) -> None:
    """Run one case through a plan; a solver asked for may decline, when it needs bounds or a diagonal Hessian."""
    plan = Plan(case.program(), SOLVERS.get(way))
    if not plan.route.polyhedral:
        if way not in ("semismooth_newton", "reference"):
            tally.wrong.append(f"seed {case.seed} ({way}): declined, {plan.route.reason}")
        return
    solution: Solution = plan.solve(case.parameters(), Options())
    for b in range(case.shape[0]):
        non_unique = bool(solution.non_unique[b]) if solution.status[b] == Status.SOLVED else None
        verdict = judge(case, b, int(solution.status[b]), solution.primal[b], solution.multipliers[b], non_unique)
        tally.add(case, way, b, verdict)


def _through_solve_qp(case: KnownCase, tally: Tally) -> None:
    """Run one strictly convex case through the function for tensors."""
    batch, n, m = case.shape
    me, general = case.equalities, m - case.num_bounds
    lower, upper = np.full((batch, n), -np.inf), np.full((batch, n), np.inf)
    row_of = {"lower": np.full(n, -1), "upper": np.full(n, -1)}
    for row in range(general, m):
        (j,) = np.flatnonzero(case.rows[0, row])
        entry = case.rows[0, row, j]
        side, limits = ("upper", upper) if entry > 0.0 else ("lower", lower)
        limits[:, j] = case.rhs[:, row] / entry
        row_of[side][j] = row

    def tensor(array: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array if len(array) > 1 else array[0]))

    rows = case.rows
    solution = hsbackend.solve_qp(
        tensor(case.hessian), torch.from_numpy(np.ascontiguousarray(case.linear)),
        tensor(rows[:, :me]), torch.from_numpy(np.ascontiguousarray(case.rhs[:, :me])),
        tensor(rows[:, me:general]), torch.from_numpy(np.ascontiguousarray(case.rhs[:, me:general])),
        torch.from_numpy(lower), torch.from_numpy(upper), on_failure="nan",
    )  # fmt: skip
    found = solution.multipliers
    multipliers = np.zeros((batch, m))
    multipliers[:, :me], multipliers[:, me:general] = found.eq.numpy(), found.ineq.numpy()
    for side, values in (("lower", found.lower.numpy()), ("upper", found.upper.numpy())):
        for j in np.flatnonzero(row_of[side] >= 0):
            row = row_of[side][j]
            multipliers[:, row] = values[:, j] / abs(case.rows[0, row, j])
    for b in range(batch):
        x, status = solution.primal[b].numpy(), int(solution.status[b])
        tally.add(case, "solve_qp", b, judge(case, b, status, x, multipliers[b]))


def run(seeds: Iterable[int]) -> Tally:
    """Run many seeds: all as a plan chooses, strictly convex ones now and then in the other ways too."""
    tally = Tally()
    for seed in seeds:
        case = known_case(seed)
        ways: list[str] = ["chosen"]
        if case.strictly_convex and seed % 20 == 0:
            ways.append("solve_qp")
        if case.strictly_convex and seed % 8 == 1:
            ways += SOLVERS
        for way in ways:
            try:
                if way == "solve_qp":
                    _through_solve_qp(case, tally)
                else:
                    _through_plan(case, way, tally)
            except Exception as error:  # a warning, too; the other seeds are still of interest
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                tally.wrong.append(f"seed {seed} ({way}): raised {type(error).__name__} in {where}, {error}")
    return tally


#: Seeds that a process takes at a time.
_BLOCK = 250


def _start() -> None:
    """Prepare a worker: one thread each, and warnings are mistakes as they are under pytest."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")


def run_on_all_cores(seeds: range) -> Tally:
    """Run many seeds, a process per core; print complaints as they come, and the progress.

    Args:
        seeds: consecutive.

    Returns:
        The tally of all, in the order of the seeds.
    """
    blocks = [seeds[i : i + _BLOCK] for i in range(0, len(seeds), _BLOCK)]
    total, began = Tally(), time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_start) as pool:
        for block, tally in zip(blocks, pool.map(run, blocks), strict=True):
            total.merge(tally)
            for text in [f"WRONG {text}" for text in tally.wrong] + [f"GIVEN UP {text}" for text in tally.given_up]:
                print(text, flush=True)
            minutes = (time.monotonic() - began) / 60.0
            done = f"seeds {seeds[0]} to {block[-1]} in {minutes:.1f} minutes"
            print(f"{done}: {len(total.wrong)} wrong, {len(total.given_up)} given up", flush=True)
    return total


if __name__ == "__main__":
    found = run_on_all_cores(range(int(sys.argv[1]), int(sys.argv[2])))
    print(dict(found.counts))
    sys.exit(bool(found.wrong))
