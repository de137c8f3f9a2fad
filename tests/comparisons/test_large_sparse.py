"""The comparison of large sparse programs: its problems, its judge, its command."""

from pathlib import Path

import numpy as np
import pytest

from hsbackend.comparisons import large_sparse
from hsbackend.comparisons.__main__ import main


@pytest.mark.parametrize("family", large_sparse.FAMILIES)
def test_the_judge_accepts_the_solution_and_nothing_beside_it(family: str) -> None:
    problem = large_sparse.make(family, 200, 0)
    assert large_sparse.make(family, 200, 0).point.tobytes() == problem.point.tobytes()
    x, gradient, forward_s, backward_s, known = large_sparse.CONTESTANTS["solve_qp"][1](problem)()
    assert min(forward_s, backward_s) > 0.0
    nu, bounds = known["multipliers"], known["bounds"]
    assert large_sparse.violation(problem, x) < 1e-12
    assert large_sparse.kkt_residual(problem, x, nu, bounds) < 1e-12
    assert large_sparse.adjoint_residual(problem, gradient, known) < 1e-8
    assert large_sparse.kkt_residual(problem, x + 1e-6, nu, bounds) > 1e-8
    assert large_sparse.kkt_residual(problem, x, nu * (1.0 + 1e-6), bounds) > 1e-8
    assert large_sparse.adjoint_residual(problem, gradient + 1e-6, known) > 1e-8


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--families", "random", "--contestants", "solve_qp", "--sizes", "1000"]
    assert main(["sparse", "--quick", "--time-limit", "120", *names, "--output", str(tmp_path)]) == 0
    report = (tmp_path / "benchmarks-sparse.md").read_text()
    assert "random n=1,000 rows=250 nnz=1,25" in report
    assert "solve_qp" in capsys.readouterr().out
    assert len((tmp_path / "benchmarks-sparse.csv").read_text().splitlines()) == 2


def test_a_contestant_that_does_not_end_keeps_its_row(tmp_path: Path) -> None:
    row = large_sparse.measure("random", 1000, 0, "solve_qp", True, 0.01, tmp_path)
    assert row.outcome == "not finished in 0.01 s"
    assert np.isnan(row.forward_s)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown family 'nothing', expected one of: random"):
        large_sparse.run_large(
            families=["nothing"], sizes=[1000], contestants=["solve_qp"], seed=0, quick=True, limit_s=1.0, command="",
            folder=Path("nowhere"),
        )  # fmt: skip
    assert main(["sparse", "--sizes", "10"]) == 2
