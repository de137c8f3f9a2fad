"""The score-model experiment at a tiny size: what its table rests on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from hsbackend.comparisons.experiments import score_model
from hsbackend.comparisons.progress import Progress

# Forward mode makes torch import decompositions of its own, which still use what it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")
CPU = torch.device("cpu")
TINY = replace(
    score_model.QUICK, width=12, batch=24, probes=4, warm_up=3, steps=4, samples=30, langevin=2, seeds=2,
    data_sets=("mixture", "digits"), penalties=(1.0,), shrinks=(0.5,), components=3,
)  # fmt: skip


def test_true_score_is_the_gradient_of_the_log_density() -> None:
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    sigma = torch.linspace(0.1, 1.0, 6, dtype=torch.float64).unsqueeze(1)
    scale = (score_model.SPREAD**2 + sigma**2).sqrt().unsqueeze(1).expand(6, 3, 2)
    centres = torch.tensor(score_model.CENTRES, dtype=torch.float64).expand(6, 3, 2)
    parts = torch.distributions.Independent(torch.distributions.Normal(centres, scale), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(6, 3)), parts)
    (expected,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    torch.testing.assert_close(score_model.true_score(x.detach(), sigma), expected)


def test_asymmetry_against_the_dense_jacobian() -> None:
    torch.manual_seed(0)
    model = score_model.Score(3, 8, potential=False).double()
    x, v = torch.randn(2, 5, 3, dtype=torch.float64)
    sigma = torch.linspace(0.2, 1.0, 5, dtype=torch.float64).unsqueeze(1)
    jacobians = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda p, s=s: model(p[None], s[None])[0], point)
            for point, s in zip(x, sigma, strict=True)
        ]
    )
    skew = sigma.unsqueeze(-1) ** 2 * (jacobians.mT - jacobians)
    found = score_model.asymmetries(lambda points: model(points, sigma), x, sigma, v).detach()
    skew = skew.detach()
    torch.testing.assert_close(found, (skew @ v.unsqueeze(-1)).squeeze(-1))
    assert float((found * v).sum(-1).abs().max()) < 1e-12
    scaled = sigma.unsqueeze(-1) ** 2 * jacobians
    assert score_model.relative_asymmetry(model, x, sigma) == pytest.approx(
        float(skew.norm() / scaled.norm()), rel=1e-9
    )


def test_sliced_wasserstein_of_a_shift_is_the_mean_projected_shift() -> None:
    points = torch.randn(500, 2, dtype=torch.float64)
    assert score_model.sliced_wasserstein(points, points, 0) == 0.0
    shift = torch.tensor([1.0, 0.0], dtype=torch.float64)
    # The mean of |cos| over directions is 2/pi; 128 of them.
    assert score_model.sliced_wasserstein(points, points + shift, 0) == pytest.approx(2.0 / math.pi, abs=0.1)


def test_samples_of_the_true_score_are_close_to_the_data() -> None:
    setting = replace(score_model.QUICK, langevin=30)
    data = score_model.load("mixture", 3000, setting, 1)
    drawn = score_model.sample(score_model.true_score, (3000, 2), setting, 2)
    chance = score_model.sliced_wasserstein(data, score_model.load("mixture", 3000, setting, 3), 0)
    assert score_model.sliced_wasserstein(data, drawn, 0) < max(4.0 * chance, 0.15)


def test_table_is_complete_and_a_potential_is_symmetric() -> None:
    study = score_model.run_score_model(TINY, device=CPU, seed=1, progress=Progress(1))
    cells = study.cells()
    assert cells[0] == ["data", "method", *(column.heading for column in score_model.COLUMNS)]
    names = ["data", *score_model.methods(TINY)]
    assert [tuple(line[:2]) for line in cells[1:]] == [(data, name) for data in TINY.data_sets for name in names]
    for record in study.records:
        assert math.isfinite(record["wasserstein"])
        assert math.isfinite(record["score_error"]) == (record["data"] == "mixture" and record["method"] != "data")
        if record["method"] == "potential":
            assert record["asymmetry"] < 1e-5
        elif record["method"] != "data":
            assert record["asymmetry"] > 1e-4
        if record["method"].startswith("null"):
            assert record["iterations"] > 0.0
            assert record["residual"] < 0.5


def test_null_space_steps_shrink_the_constraint_of_their_probes() -> None:
    torch.manual_seed(1)
    data = score_model.load("mixture", 200, TINY, 0)
    model = score_model.Score(2, 12, potential=False)
    _, reports = score_model.train("null, metric 0.5", model, data, TINY, 4, 0)
    assert len(reports) == 4
    for report in reports:
        assert report.converged
        assert report.gamma == pytest.approx(0.5 / TINY.rate)
        assert report.norm_residual < 0.5 * report.norm_target
