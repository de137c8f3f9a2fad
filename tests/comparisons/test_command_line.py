"""The commands themselves, at sizes that take seconds: what is printed, what is written, how requests are refused."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from hsbackend.comparisons.__main__ import main
from hsbackend.comparisons.problems import SUITES


def test_speed_writes_csv_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["diffcp-tight", "hs-stock", "hs-layer"]
    assert main(["speed", "--quick", "--contestants", *names, "--output", str(tmp_path)]) == 0

    with (tmp_path / "speed.csv").open(newline="") as stream:
        records = list(csv.DictReader(stream))
    assert [(r["problem"], r["contestant"]) for r in records] == [(p, c) for p in SUITES["speed"] for c in names]
    for record in records:
        assert record["versions"].startswith("hsbackend ")
        assert record["cpu"]
        assert record["outcome"] == "correct", record
        assert float(record["success_rate"]) == 1.0
        assert float(record["total_q20_ms"]) <= float(record["total_ms"]) <= float(record["total_q80_ms"])
        if record["contestant"].startswith("hs-"):
            assert float(record["kkt_residual"]) < 1e-9
            assert float(record["gradient_error_rel"]) < 1e-7

    markdown = (tmp_path / "speed.md").read_text()
    for heading in (
        "# Speed comparison",
        "## Summary",
        "## Total ms",
        "## qp-n100",
        "## Contestants",
        "## Limitations",
    ):
        assert f"\n{heading}\n" in f"\n{markdown}"
    # Once per problem, in the summary, and in the table of all times.
    assert markdown.count("| diffcp-tight |") == len(SUITES["speed"]) + 2

    captured = capsys.readouterr()
    header = next(line for line in captured.out.splitlines() if line.startswith("contestant "))
    assert header.split()[1] == "success"
    assert "[  0 %] qp-n100" in captured.err


def test_portfolio_writes_losses_summary_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skfolio")
    pytest.importorskip("matplotlib")
    names = ["diffcp-tight", "hs-layer"]
    assert main(["portfolio", "--quick", "--contestants", *names, "--output", str(tmp_path)]) == 0

    with (tmp_path / "portfolio_losses.csv").open(newline="") as stream:
        losses = [r for r in csv.DictReader(stream) if r["backend"] == "diffcp-tight"]
    assert len(losses) == 3
    assert all(np.isfinite(float(r["loss"])) for r in losses)
    elapsed_s = [float(r["elapsed_s"]) for r in losses]
    assert elapsed_s == sorted(elapsed_s)
    with (tmp_path / "portfolio.csv").open(newline="") as stream:
        summary = {r["backend"]: r for r in csv.DictReader(stream)}
    assert list(summary) == names
    for name in names:
        assert summary[name]["error"] == ""
        assert float(summary[name]["worst_violation"]) < 1e-6
        assert float(summary[name]["largest_loss_difference"]) < 1e-4
    assert (tmp_path / "portfolio.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    for words in ("step ms", "validation Sharpe", "worst violation", "largest |loss - "):
        assert words in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is said where there is no GPU")
@pytest.mark.parametrize("command", ["speed", "portfolio"])
def test_missing_gpu_is_said_and_not_replaced(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--quick", "--device", "cuda"]) == 2
    assert "sees no CUDA device; use --device cpu" in capsys.readouterr().err


def test_unknown_problem_and_contestant_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--quick", "--problems", "nonesuch"]) == 2
    assert "unknown problem 'nonesuch'" in capsys.readouterr().err
    assert main(["speed", "--quick", "--contestants", "nonesuch"]) == 2
    assert "unknown contestant nonesuch" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["skfolio", "matplotlib"])
def test_missing_package_names_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setitem(__import__("sys").modules, f"{package}.datasets", None)
    assert main(["portfolio", "--quick"]) == 2
    assert 'pip install "hsbackend[compare]"' in capsys.readouterr().err
