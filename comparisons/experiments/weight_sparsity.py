"""Train a network in which a pattern of weights vanishes: null-space constraint, magnitude pruning, l1 penalty.

All methods start from the same network, trained without constraint for ``warm_up`` steps, and see the same minibatches
for ``steps`` more. The pattern is the ``sparsity`` share of weights of least magnitude, over all layers, at the end of
the warm-up (biases are not in it). Then

    dense          no constraint
    prune          the weights are set to zero at once and kept there by masking, the rest is fine-tuned
    null, project  c = the weights of the pattern; gradients projected, then Adam
    null, metric   the same with NullSpaceAdam
    l1 W           penalty W |weights|_1 on the weights of the pattern, no masking

Afterwards the violation is the largest weight of the pattern, accuracy is measured as trained and with the pattern set
to zero. For c = (some of the weights) the null space is known: the other weights. So the constraint does what masking
does, in a smooth way and at more cost; the question of this experiment is what it costs, and whether it loses anything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsbackend.comparisons.experiments.runs import Column, Cost, Split, Study, accuracy, digits, minibatches
from hsbackend.comparisons.experiments.runs import peak_rss_mib as peak_rss
from hsbackend.comparisons.progress import Progress
from hsbackend.nullspace import NullSpaceAdam, project_gradient

COLUMNS = (
    Column("accuracy", "test %", ".2f"),
    Column("accuracy_zeroed", "test %, pattern zeroed", ".2f"),
    Column("violation", "largest weight of pattern", ".1e"),
    Column("violation_relative", "norm, relative to start", ".1e"),
    Column("zeros", "weights zero %", ".1f"),
    Column("iterations", "iterations", ".1f"),
    Column("step_ms", "step ms", ".1f"),
    Column("step_mib", "step MiB", ".0f"),
    Column("peak_mib", "peak RSS MiB", ".0f"),
)
#: A weight is called zero below this share of the largest one of its layer.
ZERO = 1e-4


@dataclass(frozen=True)
class Setting:
    """Size and length."""

    width: int
    batch: int
    warm_up: int
    steps: int
    sparsity: float
    seeds: int
    rate: float = 1e-3
    #: lr gamma: the share of the pattern's weights that goes in each step.
    shrink: float = 0.1
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2)

    @property
    def weights(self) -> int:
        """Number of weights without biases."""
        return 64 * self.width + self.width**2 + 10 * self.width


QUICK = Setting(width=960, batch=128, warm_up=60, steps=100, sparsity=0.95, seeds=2)
FULL = Setting(width=7040, batch=128, warm_up=200, steps=400, sparsity=0.95, seeds=1)


def network(width: int, seed: int, device: torch.device) -> nn.Sequential:
    """Return a network for 8 x 8 images with two hidden layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return model.to(device)


def smallest_weights(model: nn.Module, share: float) -> dict[str, Tensor]:
    """Return masks, one where a weight is among the ``share`` of least magnitude of all weight matrices."""
    weights = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.dim() == 2}
    magnitudes = torch.cat([tensor.abs().reshape(-1) for tensor in weights.values()])
    count = round(share * magnitudes.numel())
    # The largest of the smallest; `kthvalue` counts from one.
    threshold = torch.kthvalue(magnitudes, max(count, 1)).values
    return {name: (tensor.abs() <= threshold).to(tensor.dtype) for name, tensor in weights.items()}


def pattern_norms(model: nn.Module, masks: dict[str, Tensor]) -> tuple[float, float]:
    """Return the largest magnitude and the Euclidean norm of the weights of the pattern."""
    named = dict(model.named_parameters())
    parts = [(masks[name] * named[name].detach()).reshape(-1) for name in masks]
    largest = max(float(part.abs().max()) for part in parts)
    return largest, math.sqrt(sum(float(part.double().square().sum()) for part in parts))


@torch.no_grad()
def zeroed(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Return a copy with the pattern set to zero."""
    other = copy.deepcopy(model)
    for name, tensor in other.named_parameters():
        if name in masks:
            tensor.mul_(1.0 - masks[name])
    return other


def zero_share(model: nn.Module) -> float:
    """Return how many weights in percent are at most ``ZERO`` times the largest of their layer."""
    weights = [tensor.detach().abs() for tensor in model.parameters() if tensor.dim() == 2]
    zeros = sum(int((tensor <= ZERO * tensor.max()).sum()) for tensor in weights)
    return 100.0 * zeros / sum(tensor.numel() for tensor in weights)


@dataclass(frozen=True)
class _Trained:
    """A network after its steps, what they cost and what was seen on the way."""

    model: nn.Module
    cost: Cost
    iterations: float
    violations: list[float]


def train(
    method: str, start: nn.Module, masks: dict[str, Tensor], data: Split, batches: Tensor, setting: Setting
) -> _Trained:
    """Continue the training of a copy of ``start`` by one method.

    Args:
        method: ``dense``, ``prune``, ``null, project``, ``null, metric`` or ``l1 W`` with a number W.
        start: the network after the warm-up.
        masks: of the pattern.
        data: images.
        batches: (steps, batch) indices.
        setting: rates.
    """
    device = data.train_x.device
    model = copy.deepcopy(start)
    if method == "prune":
        model = zeroed(model, masks)
    named = dict(model.named_parameters())

    def constraint(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: mask * given[name] for name, mask in masks.items()}

    gamma = setting.shrink / setting.rate
    ours = NullSpaceAdam(model.named_parameters(), constraint, gamma=gamma, lr=setting.rate, equilibrate=1)
    optimiser = ours if method == "null, metric" else torch.optim.Adam(model.parameters(), lr=setting.rate)
    weight = float(method.removeprefix("l1 ")) if method.startswith("l1 ") else 0.0
    iterations: list[int] = []
    violations: list[float] = []
    cost = Cost(device)
    for batch in batches:
        with cost.step():
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            if weight:
                loss = loss + weight * sum((mask * named[name]).abs().sum() for name, mask in masks.items())
            loss.backward()
            if method == "null, project":
                iterations.append(project_gradient(model, constraint, 1.0).iterations)
            if method == "prune":
                for name, mask in masks.items():
                    gradient = named[name].grad
                    assert gradient is not None
                    gradient.mul_(1.0 - mask)
            optimiser.step()
        if method == "null, metric" and ours.report is not None:
            iterations.append(ours.report.iterations)
        violations.append(pattern_norms(model, masks)[1])
    return _Trained(model, cost, sum(iterations) / len(iterations) if iterations else math.nan, violations)


def run_weight_sparsity(
    setting: Setting, *, device: torch.device, seed: int, progress: Progress, test_most: int | None = None
) -> Study:
    """Run every method for every seed.

    Args:
        setting: size and length.
        device: where.
        seed: of the first run.
        progress: takes ``seeds (1 + methods)`` steps.
        test_most: use only so many images.
    """
    records: list[dict[str, Any]] = []
    traces: dict[str, list[float]] = {}
    for run in range(seed, seed + setting.seeds):
        data = digits(run, device, most=test_most)
        batches = minibatches(len(data.train_x), setting.batch, setting.warm_up + setting.steps, run)
        progress.stage(f"seed {run}")
        blank = network(setting.width, run, device)
        none = {name: torch.zeros_like(tensor) for name, tensor in blank.named_parameters() if tensor.dim() == 2}
        start = train("dense", blank, none, data, batches[: setting.warm_up], setting).model
        progress.advance("warm-up")
        masks = smallest_weights(start, setting.sparsity)
        before = pattern_norms(start, masks)[1]
        for method in methods(setting):
            done = train(method, start, masks, data, batches[setting.warm_up :], setting)
            largest, norm = pattern_norms(done.model, masks)
            records.append(
                {
                    "method": method,
                    "seed": run,
                    "accuracy": accuracy(done.model, data.test_x, data.test_y),
                    "accuracy_zeroed": accuracy(zeroed(done.model, masks), data.test_x, data.test_y),
                    "violation": largest,
                    "violation_relative": norm / before,
                    "zeros": zero_share(done.model),
                    "iterations": done.iterations,
                    "step_ms": done.cost.step_ms,
                    "step_mib": done.cost.step_mib,
                    "peak_mib": peak_rss() if device.type == "cpu" else math.nan,
                }
            )
            if run == seed:
                traces[method] = [value / before for value in done.violations]
            progress.advance(method)
    return Study(
        name="weight_sparsity",
        title="Weight sparsity: a pattern of weights that vanishes",
        setting=[
            f"{setting.weights:,} weights (64-{setting.width}-{setting.width}-10), digits, batch {setting.batch}, "
            f"{setting.warm_up} steps of warm-up and {setting.steps} steps of each method, Adam at {setting.rate:g}; "
            f"pattern: {100 * setting.sparsity:g} % of the weights; seeds {seed} to {seed + setting.seeds - 1}, mean ± "
            "standard deviation.",
            f"'zero' means at most {ZERO:g} times the largest weight of the layer; l1 W has the penalty W |.|_1 on the "
            "pattern.",
        ],
        groups=("method",),
        columns=COLUMNS,
        records=records,
        draw=_draw(traces, records),
        device=device,
    )  # fmt: skip


def methods(setting: Setting) -> Sequence[str]:
    """Return the names of the methods, in order."""
    return ("dense", "prune", "null, project", "null, metric", *(f"l1 {weight:g}" for weight in setting.penalties))


def _draw(traces: dict[str, list[float]], records: Sequence[dict[str, Any]]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        colours = {method: f"C{number}" for number, method in enumerate(traces)}
        for method, values in traces.items():
            # Pruning has nothing to draw on a logarithmic axis; its name still explains the other panel.
            left.semilogy(range(1, len(values) + 1), values, color=colours[method], label=method)
        left.set_xlabel("step after warm-up")
        left.set_ylabel("norm of the pattern, relative to its start")
        left.legend(fontsize=8)
        left.grid(visible=True, alpha=0.3)
        for method in traces:
            own = [record for record in records if record["method"] == method]
            right.plot([r["step_ms"] for r in own], [r["accuracy_zeroed"] for r in own], "o", color=colours[method])
        right.set_xlabel("ms per step")
        right.set_ylabel("test accuracy, pattern zeroed [%]")
        right.grid(visible=True, alpha=0.3)

    return draw
