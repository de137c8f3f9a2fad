"""Threads and processes: the same numbers whatever the split, and no deadlock after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from core_programs import box_program
from hsbackend import _parallel
from hsbackend.plan import Plan
from hsbackend.solvers.result import Options


def problem(batch: int) -> tuple[Plan, list[np.ndarray]]:
    """Return a projection that is large enough for the pool."""
    n = 30
    rows = np.random.default_rng(0).normal(size=(12, n))
    limits = np.concatenate([np.ones(12), np.full(n, 0.3), np.full(n, 0.3)])
    points = np.random.default_rng(1).normal(size=(batch, n))
    return Plan(box_program(rows, equalities=0), "active_set"), [-points, np.tile(limits, (batch, 1))]


@pytest.fixture
def threads():
    """Restore torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_thread_and_three_give_the_same_bits(threads: None) -> None:
    plan, data = problem(50)
    torch.set_num_threads(1)
    alone = plan.solve(data, Options())
    torch.set_num_threads(3)
    together = plan.solve(data, Options())
    np.testing.assert_array_equal(alone.primal, together.primal)
    g = np.ones(alone.primal.shape)
    np.testing.assert_array_equal(plan.adjoint(alone, g, None).primal, plan.adjoint(together, g, None).primal)


def test_a_batch_equals_its_pieces() -> None:
    plan, data = problem(41)
    whole = plan.solve(data, Options()).primal
    pieces = [plan.solve([value[i : i + 10] for value in data], Options()).primal for i in range(0, 41, 10)]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-14)


def test_many_callers_at_once() -> None:
    plan, data = problem(40)
    wanted = plan.solve(data, Options()).primal
    found: list[np.ndarray] = []
    callers = [threading.Thread(target=lambda: found.append(plan.solve(data, Options()).primal)) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 6
    for value in found:
        np.testing.assert_array_equal(value, wanted)


FORK = """
import multiprocessing
import numpy as np
from test_parallel import problem
from hsbackend.solvers.result import Options

def solve(queue=None):
    plan, data = problem(40)
    found = plan.solve(data, Options()).primal
    if queue is not None:
        queue.put(found)
    return found

wanted = solve()
context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=solve, args=(queue,))
child.start()
found = queue.get(timeout=120)
child.join(timeout=60)
assert child.exitcode == 0
assert np.array_equal(found, wanted)
print("the child agrees")
"""


def test_a_forked_child_builds_its_own_pool() -> None:
    """A DataLoader worker is a fork of a process whose pool has run. In a process of its own: JAX objects to forks."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the child agrees"


def test_a_slow_first_call_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter([0.0, 3.5])
    monkeypatch.setattr(_parallel.time, "perf_counter", lambda: next(clock))

    def kernel(start: int, stop: int, step: int) -> int:
        return stop

    assert _parallel.for_each_item(kernel, 7, 1.0) == [7]
    assert "prepared kernel in 3.5 s" in caplog.text
