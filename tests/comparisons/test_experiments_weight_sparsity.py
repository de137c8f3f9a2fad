"""The weight-sparsity experiment at a tiny size: what its table rests on."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from hsbackend.comparisons.experiments import weight_sparsity
from hsbackend.comparisons.experiments.runs import digits, minibatches
from hsbackend.comparisons.progress import Progress

# Forward mode makes torch import decompositions of its own, which still use what it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")
CPU = torch.device("cpu")
TINY = replace(weight_sparsity.QUICK, width=24, batch=32, warm_up=4, steps=12, seeds=2, penalties=(1e-3,))


def test_full_size_has_fifty_million_weights_and_quick_one_million() -> None:
    assert 50e6 <= weight_sparsity.FULL.weights < 51e6
    assert 0.95e6 <= weight_sparsity.QUICK.weights < 1.05e6
    model = weight_sparsity.network(TINY.width, 0, CPU)
    assert sum(tensor.numel() for tensor in model.parameters() if tensor.dim() == 2) == TINY.weights


def test_pattern_holds_the_weights_of_least_magnitude() -> None:
    model = weight_sparsity.network(16, 1, CPU)
    masks = weight_sparsity.smallest_weights(model, 0.8)
    weights = torch.cat([dict(model.named_parameters())[name].detach().abs().reshape(-1) for name in masks])
    chosen = torch.cat([mask.reshape(-1) for mask in masks.values()]) > 0
    assert int(chosen.sum()) == round(0.8 * len(weights))
    assert float(weights[chosen].max()) <= float(weights[~chosen].min())


def test_every_method_does_to_the_pattern_what_it_says() -> None:
    study = weight_sparsity.run_weight_sparsity(TINY, device=CPU, seed=3, progress=Progress(1), test_most=300)
    cells = study.cells()
    assert cells[0] == ["method", *(column.heading for column in weight_sparsity.COLUMNS)]
    assert [line[0] for line in cells[1:]] == list(weight_sparsity.methods(TINY))
    assert len(study.records) == 2 * len(weight_sparsity.methods(TINY))
    for record in study.records:
        assert record["step_ms"] > 0.0
        assert 0.0 <= record["accuracy"] <= 100.0
        if record["method"] == "prune":
            assert record["violation"] == 0.0
            assert record["accuracy"] == record["accuracy_zeroed"]
            assert record["zeros"] >= 100.0 * round(0.95 * TINY.weights) / TINY.weights - 1e-9
        if record["method"] == "null, metric":
            # lr gamma = 0.1 is lost in each of the 12 steps, whatever the loss wants.
            assert record["violation_relative"] == pytest.approx(0.9**12, rel=1e-3)
            assert record["iterations"] < 5.0
        if record["method"] in ("dense", "l1 0.001"):
            assert record["violation_relative"] > 0.5


@pytest.mark.parametrize("method", ["prune", "null, metric"])
def test_violation_recomputed(method: str) -> None:
    data = digits(0, CPU, most=200)
    start = weight_sparsity.network(TINY.width, 0, CPU)
    before = copy.deepcopy(start.state_dict())
    masks = weight_sparsity.smallest_weights(start, 0.9)
    done = weight_sparsity.train(method, start, masks, data, minibatches(len(data.train_x), 32, 6, 0), TINY)
    held = torch.cat(
        [(dict(done.model.named_parameters())[name].detach() * mask).reshape(-1) for name, mask in masks.items()]
    )
    largest, norm = weight_sparsity.pattern_norms(done.model, masks)
    assert largest == float(held.abs().max())
    assert norm == pytest.approx(float(held.norm()), rel=1e-5)
    assert done.violations[-1] == norm
    assert len(done.violations) == len(done.cost.seconds) == 6
    # The start is the same for all methods.
    assert all(torch.equal(before[name], tensor) for name, tensor in start.state_dict().items())
    # What is outside of the pattern has been trained.
    assert not torch.equal(done.model[4].weight[masks["4.weight"] == 0], start[4].weight[masks["4.weight"] == 0])
