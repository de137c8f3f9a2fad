"""The invariance experiment at a tiny size, and the command line of all experiments."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from hsbackend.comparisons.__main__ import main
from hsbackend.comparisons.experiments import invariance, studies
from hsbackend.comparisons.experiments.runs import Column, Cost, Study, digits
from hsbackend.comparisons.progress import Progress

# Forward mode makes torch import decompositions of its own, which still use what it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")
CPU = torch.device("cpu")
TINY = replace(
    invariance.QUICK, width=12, batch=24, probes=3, warm_up=3, steps=7, most=200,
    invariance_penalties=(0.1,), robustness_penalties=(1.0,), gammas=(0.01,), shrinks=(0.1,),
)  # fmt: skip


def test_moved_images_are_moved_by_what_is_allowed() -> None:
    image = torch.zeros(200, 8, 8)
    image[:, 3:5, 3:5] = 1.0
    found = invariance.moved(image.reshape(200, 64), torch.Generator().manual_seed(0)).reshape(200, 8, 8)
    assert float(found.sum((1, 2)).sub(4.0).abs().max()) < 0.6
    rows = torch.arange(8.0)
    centre = torch.stack([(found.sum(2) * rows).sum(1), (found.sum(1) * rows).sum(1)]) / found.sum((1, 2))
    # A shift along both axes, turned.
    furthest = invariance.SHIFT * (math.cos(0.262) + math.sin(0.262))
    assert 0.7 < float((centre - 3.5).abs().max()) <= furthest + 0.02
    assert invariance.moved(image[:1].reshape(1, 64), torch.Generator().manual_seed(1)).shape == (1, 64)


def test_loss_gradients_and_the_attack() -> None:
    model = invariance.network(12, 0, CPU)
    data = digits(0, CPU, most=100)
    x, y = data.test_x[:4].clone().requires_grad_(), data.test_y[:4]
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(invariance.loss_gradients(model, x.detach(), y), expected)
    attacked = invariance.attack(model, x.detach(), y)
    assert float((attacked - x.detach()).abs().max()) <= invariance.ATTACK + 1e-6
    assert float(attacked.min()) >= 0.0
    assert float(attacked.max()) <= 1.0
    assert bool(torch.nn.functional.cross_entropy(model(attacked), y) > losses.mean())


@pytest.mark.parametrize("task", invariance.TASKS)
def test_violation_recomputed(task: str) -> None:
    model = invariance.network(12, 1, CPU)
    data = digits(1, CPU, most=100)
    found = invariance.violation(task, model, data, 5)
    x, y = data.test_x.clone().requires_grad_(), data.test_y
    logits = model(x)
    if task == "invariance":
        changed = invariance.moved(data.test_x, torch.Generator().manual_seed(5))
        spread = (logits - logits.mean(0)).square().mean().sqrt()
        expected = (model(changed) - logits).square().mean().sqrt() / spread
    else:
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        expected = torch.autograd.grad(losses, x)[0].square().sum(-1).mean().sqrt()
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)


def test_table_is_complete() -> None:
    study = invariance.run_invariance(TINY, device=CPU, seed=0, progress=Progress(1))
    assert study.cells()[0] == ["task", "method", *(column.heading for column in invariance.COLUMNS)]
    names = [(task, method) for task in invariance.TASKS for method in invariance.methods(task, TINY)]
    assert [tuple(line[:2]) for line in study.cells()[1:]] == names
    for record in study.records:
        assert all(0.0 <= record[key] <= 100.0 for key in ("clean", "transformed", "attacked", "noisy"))
        assert record["violation"] > 0.0
        assert math.isnan(record["residual"]) != record["method"].startswith("null")
        if record["method"].startswith("null"):
            assert record["residual"] < 0.5


def test_constraint_acts_after_the_warm_up_and_on_the_probes_of_the_step() -> None:
    data = digits(0, CPU, most=TINY.most)
    batches = torch.arange(24).expand(TINY.steps, 24)
    cost, reports = invariance.train(
        "invariance", "null, metric 0.1", invariance.network(12, 0, CPU), data, batches, TINY, 0
    )
    assert len(cost.seconds) == TINY.steps
    assert len(reports) == TINY.steps - TINY.warm_up
    assert all(report.gamma == pytest.approx(0.1 / TINY.rate) for report in reports)
    assert all(report.converged for report in reports)


# What all experiments share.


def test_mean_spread_and_files(tmp_path: Path) -> None:
    records = [{"method": "a", "seed": seed, "x": value, "y": math.nan} for seed, value in ((0, 1.0), (1, 3.0))]
    study = Study(
        "toy_study", "Toy", ["As it is."], ("method",), (Column("x", "x", ".2f"), Column("y", "y")), records,
        lambda figure: figure.subplots().plot([1, 2]), CPU, command="toy",
    )  # fmt: skip
    assert study.cells() == [["method", "x", "y"], ["a", "2.00 ± 1.41", "-"]]
    table, report, figure = study.write(tmp_path)
    with table.open(newline="") as stream:
        assert [float(row["x"]) for row in csv.DictReader(stream)] == [1.0, 3.0]
    assert "| a | 2.00 ± 1.41 | - |" in report.read_text()
    assert figure == tmp_path / "figures" / "toy-study.png"
    assert 0 < figure.stat().st_size < 100_000


def test_cost_sees_memory_and_time() -> None:
    cost = Cost(CPU)
    if math.isnan(cost.step_mib):
        pytest.skip("this system does not tell the peak resident set, or does not let it be reset")
    with cost.step():
        block = torch.ones(60 * 2**18)  # 60 MiB.
    assert 50.0 < cost.step_mib < 200.0
    del block
    assert Cost(CPU).step_mib < 30.0
    assert len(cost.seconds) == 1
    assert cost.step_ms > 0.0


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(studies.EXPERIMENTS["invariance"], quick=TINY)
    monkeypatch.setitem(studies.EXPERIMENTS, "invariance", tiny)
    arguments = ["invariance", "--quick", "--repeats", "1", "--steps", "4", "--output", str(tmp_path)]
    assert main(arguments) == 0
    with (tmp_path / "experiments-invariance.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["seed"] for row in rows} == {"0"}
    assert rows[0]["versions"].startswith("hsbackend ")
    assert "Invariance and robustness" in capsys.readouterr().out
    assert (tmp_path / "figures" / "invariance.png").stat().st_size < 100_000
    assert main(["score_model", "--steps", "0"]) == 2
    assert "--steps 0 was given" in capsys.readouterr().err


@pytest.mark.parametrize("name", studies.EXPERIMENTS)
def test_sizes(name: str) -> None:
    experiment = studies.EXPERIMENTS[name]
    setting = studies.setting_of(name, quick=False, steps=5, repeats=1)
    assert setting.steps == 5
    assert getattr(setting, experiment.repeats) == 1
    assert getattr(setting, "warm_up", 0) <= 2
    assert experiment.progress_steps(experiment.quick) > experiment.quick.__dict__[experiment.repeats]
