"""The examples of docs/least-squares.md run, and its comparison too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "least-squares.md").read_text(), re.S)
    assert blocks
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), namespace)
    assert "products for the gradient" in capsys.readouterr().out


def test_the_comparison_runs_and_everybody_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hsbackend.comparisons import least_squares

    monkeypatch.setattr(least_squares, "CASES", [(400, 200, 10.0, 0.1), (200, 400, 10.0, 0.0)])
    from hsbackend.comparisons.progress import Progress

    report = least_squares.run_lstsq(
        contestants=None, quick=True, seed=0, repetitions=1, command="test", progress=Progress(10)
    )
    assert len(report.rows) == 2 * len(least_squares.CONTESTANTS)
    for row in report.rows:
        assert max(row.error_x, row.error_to_A, row.error_to_b) < 1e-6, row
    counted = [row for row in report.rows if row.contestant == "lstsq, functions"]
    assert all(row.forward_products and row.backward_products for row in counted)
    for path in least_squares.write_report(report, tmp_path):
        assert path.read_text().count("lstsq, functions") >= 2
    with pytest.raises(ValueError, match="unknown contestant 'nobody'"):
        least_squares.run_lstsq(
            contestants=["nobody"], quick=True, seed=0, repetitions=1, command="test", progress=Progress(1)
        )
