"""The Gaussian-process experiment at a tiny size: predictions and their derivative against factorisations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from hsbackend.comparisons.experiments import gp_hyperparameters as gp
from hsbackend.comparisons.progress import Progress

CPU = torch.device("cpu")
TINY = replace(gp.QUICK, steps=3, left_out=8, features=60, splits=2, restarts=0, most=60)


def models(task: gp.Task) -> list[gp.Model]:
    return [gp.Kernel(task.train_x.shape[1], CPU), gp.Features(task.train_x.shape[1], 60, 0, CPU)]


def dense(model: gp.Model, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return model.between(left, right) if isinstance(model, gp.Kernel) else model.of(left) @ model.of(right).mT


@pytest.mark.parametrize("which", [0, 1], ids=["kernel", "features"])
def test_prediction_and_its_gradient_against_a_factorisation(which: int) -> None:
    task = gp.load("wine", 0, TINY, CPU)
    model = models(task)[which]
    found = model.predict(task.train_x, task.train_y, task.test_x)
    covariance = dense(model, task.train_x, task.train_x) + model.noise**2 * torch.eye(len(task.train_y))
    cross = dense(model, task.test_x, task.train_x)
    mean = cross @ torch.linalg.solve(covariance, task.train_y)
    prior = dense(model, task.test_x, task.test_x).diagonal()
    variance = prior - (cross * torch.linalg.solve(covariance, cross.mT).mT).sum(-1) + model.noise**2
    torch.testing.assert_close(found.mean, mean, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.variance, variance, rtol=1e-7, atol=1e-8)
    gradients = [
        torch.autograd.grad(gp.negative_log_density(task.test_y, *pair), model.logarithms, retain_graph=True)[0]
        for pair in ((found.mean, found.variance), (mean, variance))
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    assert float(gradients[1].norm()) > 1e-3


def test_features_are_the_kernel_in_the_limit() -> None:
    task = gp.load("diabetes", 0, TINY, CPU)
    kernel, many = gp.Kernel(10, CPU), gp.Features(10, 40_000, 0, CPU)
    points = task.train_x[:5]
    torch.testing.assert_close(dense(many, points, points), dense(kernel, points, points), rtol=0, atol=0.03)


def test_negative_log_density() -> None:
    y, mean, variance = torch.tensor([[0.3, -1.0], [0.1, 0.0], [0.5, 2.0]], dtype=torch.float64)
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).mean()
    torch.testing.assert_close(gp.negative_log_density(y, mean, variance), expected)


def test_training_lowers_the_loss_and_the_table_is_complete() -> None:
    study = gp.run_gp_hyperparameters(TINY, device=CPU, seed=0, progress=Progress(1))
    cells = study.cells()
    assert cells[0] == ["data", "method", *(column.heading for column in gp.COLUMNS)]
    assert [tuple(line[:2]) for line in cells[1:]] == [(data, method) for data in gp.DATA_SETS for method in gp.METHODS]
    for record in study.records:
        assert math.isfinite(record["nlpd"])
        assert 0.0 < record["rmse"] < 2.0
        assert record["noise"] > 0.0
        assert math.isnan(record["products"]) == ("likelihood" in record["method"])
    task = gp.load("diabetes", 0, replace(TINY, most=120), CPU)
    model = models(task)[1]
    start = model.logarithms.detach().clone()

    def held_out() -> float:
        with torch.no_grad():
            found = model.predict(*task[:3])
            return float(gp.negative_log_density(task.test_y, found.mean, found.variance))

    before = held_out()
    facts = gp.train(model, task, replace(TINY, steps=15, left_out=20), 0, likelihood=False)
    assert not torch.equal(start, model.logarithms.detach())
    assert facts["products"] > 2 * facts["iterations"]
    assert held_out() < before
