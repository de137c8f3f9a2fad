"""Teach a network what must not change its answer: null-space constraints against augmentation and penalties.

Two tasks on digits, each with the same network, minibatches and number of steps for all methods.

    invariance    c = f(T x) - f(x) on probes x of each step, T a random small shift and rotation, f the logits
                  against: plain training; augmentation (train on T x); penalty W mean |f(T x) - f(x)|^2
    robustness    c = the gradient of the loss with respect to x, on probes of each step
                  against: plain; noise on the inputs; penalty W mean |gradient|^2; adversarial training (FGSM)

    null, project G    gradients projected with gamma = G, then Adam
    null, metric S     NullSpaceAdam, lr gamma = S

A constraint on random probes is another one in each step. So J d = gamma c holds for the probes of the step, and what
is reported is the violation on test images, which no method has seen.

Measured: accuracy on test images as they are, and transformed (invariance) or attacked by FGSM (robustness) and with
Gaussian noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsbackend.comparisons.experiments.runs import Column, Cost, Split, Study, accuracy, digits, minibatches
from hsbackend.comparisons.progress import Progress
from hsbackend.nullspace import NullSpaceAdam, ProjectionReport, project_gradient, ramp

COLUMNS = (
    Column("clean", "test %", ".2f"),
    Column("transformed", "transformed %", ".2f"),
    Column("attacked", "FGSM %", ".2f"),
    Column("noisy", "noise %", ".2f"),
    Column("violation", "violation", ".2e"),
    Column("residual", "residual of J d", ".1e"),
    Column("iterations", "iterations", ".1f"),
    Column("step_ms", "step ms", ".1f"),
)
#: Largest shift in pixels and rotation in degrees; images are 8 x 8.
SHIFT, ROTATION = 1.0, 15.0
#: Size of the attack in each pixel, and standard deviation of the noise; pixels are in [0, 1].
ATTACK, NOISE = 0.1, 0.2
TASKS = ("invariance", "robustness")
#: Relative residual at which a projection may end: the probes of the next step are others anyway.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Setting:
    """Size and length."""

    width: int
    batch: int
    probes: int
    warm_up: int
    steps: int
    seeds: int
    rate: float = 3e-3
    invariance_penalties: tuple[float, ...] = (0.01, 0.1, 1.0)
    robustness_penalties: tuple[float, ...] = (0.1, 1.0, 10.0)
    gammas: tuple[float, ...] = (0.03, 0.3)
    shrinks: tuple[float, ...] = (0.02, 0.05, 0.2)
    most: int | None = None


QUICK = Setting(width=96, batch=64, probes=32, warm_up=50, steps=150, seeds=2)
FULL = Setting(width=512, batch=128, probes=64, warm_up=200, steps=2000, seeds=5)


def network(width: int, seed: int, device: torch.device) -> nn.Sequential:
    """Return a smooth network for 8 x 8 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
    return model.to(device)


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift along both axes, then rotate images (B, 64), each by its own random amount; bilinear, zero outside."""
    uniform = (2.0 * torch.rand(len(x), 3, generator=generator) - 1.0).to(x)
    angle = uniform[:, 0] * math.radians(ROTATION)
    cos, sin = angle.cos(), angle.sin()
    # The grid runs from -1 to 1 over 8 pixels.
    shift = uniform[:, 1:] * SHIFT / 4.0
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], -2)
    grid = nn.functional.affine_grid(affine, [len(x), 1, 8, 8], align_corners=False)
    images = nn.functional.grid_sample(x.reshape(-1, 1, 8, 8), grid, align_corners=False)
    return images.reshape(len(x), 64)


def loss_gradients(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each item's loss with respect to its pixels, (B, 64), differentiable."""
    return torch.func.grad(lambda given: nn.functional.cross_entropy(model(given), y, reduction="sum"))(x)


def attack(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return images moved by ``ATTACK`` in every pixel along the sign of the gradient (FGSM), inside of [0, 1]."""
    return (x + ATTACK * loss_gradients(model, x, y).detach().sign()).clamp(0.0, 1.0)


def constraint_of(task: str, model: nn.Module, x: Tensor, y: Tensor, changed: Tensor) -> Callable[..., Tensor]:
    """Return c as a function of named parameters, for one set of probes."""

    def constraint(given: dict[str, Tensor]) -> Tensor:
        def called(inputs: Tensor) -> Tensor:
            return torch.func.functional_call(model, given, (inputs,))

        if task == "invariance":
            return called(changed) - called(x)
        return loss_gradients(called, x, y)

    return constraint


def violation(task: str, model: nn.Module, data: Split, seed: int) -> float:
    """Return the violation on test images.

    For invariance the root mean square of ``f(T x) - f(x)`` relative to the spread of f; for robustness the root mean
    square norm of the gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = moved(data.test_x, generator)
    named = {name: tensor.detach() for name, tensor in model.named_parameters()}
    c = constraint_of(task, model, data.test_x, data.test_y, changed)(named)
    if task == "robustness":
        return math.sqrt(float(c.square().sum(-1).mean()))
    with torch.no_grad():
        logits = model(data.test_x)
        return float(c.square().mean().sqrt() / (logits - logits.mean(0)).square().mean().sqrt())


def methods(task: str, setting: Setting) -> list[str]:
    """Return the names of the methods of a task, in order."""
    penalties = setting.invariance_penalties if task == "invariance" else setting.robustness_penalties
    rivals = ["augmentation"] if task == "invariance" else ["noise", "FGSM training"]
    return [
        "plain", *rivals, *(f"penalty {weight:g}" for weight in penalties),
        *(f"null, project {gamma:g}" for gamma in setting.gammas),
        *(f"null, metric {shrink:g}" for shrink in setting.shrinks),
    ]  # fmt: skip


def train(
    task: str, method: str, model: nn.Module, data: Split, batches: Tensor, setting: Setting, seed: int
) -> tuple[Cost, list[ProjectionReport]]:
    """Train the model by one method; return the cost and the reports of the projections."""
    generator = torch.Generator().manual_seed(seed)
    probes: list[Tensor] = []

    def constraint(given: dict[str, Tensor]) -> Tensor:
        return constraint_of(task, model, x[: setting.probes], y[: setting.probes], probes[0])(given)

    weight = float(method.removeprefix("penalty ")) if method.startswith("penalty ") else 0.0
    loose: dict[str, Any] = {"mode": "reverse", "atol": TOLERANCE, "btol": TOLERANCE, "max_steps": 200}
    optimiser: torch.optim.Optimizer
    if method.startswith("null, metric "):
        gamma = ramp(float(method.removeprefix("null, metric ")) / setting.rate, start=setting.warm_up)
        # 1e-4: parameters with tiny gradients shall not take the whole correction.
        optimiser = NullSpaceAdam(model.named_parameters(), constraint, gamma=gamma, lr=setting.rate, eps=1e-4, **loose)
    else:
        optimiser = torch.optim.Adam(model.parameters(), lr=setting.rate)
    projects = method.startswith("null, project ")
    schedule = ramp(float(method.removeprefix("null, project ")) if projects else 0.0, start=setting.warm_up)
    reports: list[ProjectionReport] = []
    cost = Cost(data.train_x.device)
    for step, batch in enumerate(batches):
        x, y = data.train_x[batch], data.train_y[batch]
        changed = moved(x, generator)
        noise = torch.randn(x.shape, generator=generator).to(x)
        probes[:] = [changed[: setting.probes]]
        with cost.step():
            optimiser.zero_grad()
            inputs = x
            if method == "augmentation":
                inputs = changed
            elif method == "noise":
                inputs = x + NOISE * noise
            elif method == "FGSM training":
                inputs = attack(model, x, y)
            loss = nn.functional.cross_entropy(model(inputs), y)
            if weight and step >= setting.warm_up:
                # The penalty sees the whole minibatch, at no more cost than a few probes.
                c = constraint_of(task, model, x, y, changed)(dict(model.named_parameters()))
                loss = loss + weight * c.square().sum(-1).mean()
            loss.backward()
            if projects:
                reports.append(project_gradient(model, constraint, schedule, step=step, **loose))
            optimiser.step()
        if isinstance(optimiser, NullSpaceAdam) and optimiser.report is not None:
            reports.append(optimiser.report)
    return cost, [report for report in reports if report.acted]


def run_invariance(setting: Setting, *, device: torch.device, seed: int, progress: Progress) -> Study:
    """Run every method of both tasks for every seed; `progress` takes one step for each."""
    records: list[dict[str, Any]] = []
    for task in TASKS:
        for run in range(seed, seed + setting.seeds):
            progress.stage(f"{task}, seed {run}")
            data = digits(run, device, most=setting.most)
            batches = minibatches(len(data.train_x), setting.batch, setting.steps, run)
            for method in methods(task, setting):
                model = network(setting.width, run, device)
                cost, reports = train(task, method, model, data, batches, setting, run)
                generator = torch.Generator().manual_seed(1000 + run)
                x, y = data.test_x, data.test_y
                noisy = x + NOISE * torch.randn(x.shape, generator=generator).to(x)
                records.append(
                    {
                        "task": task,
                        "method": method,
                        "seed": run,
                        "clean": accuracy(model, x, y),
                        "transformed": accuracy(model, moved(x, generator), y),
                        "attacked": accuracy(model, attack(model, x, y), y),
                        "noisy": accuracy(model, noisy, y),
                        "violation": violation(task, model, data, 2000 + run),
                        "residual": _mean([r.norm_residual / r.norm_target for r in reports if r.norm_target]),
                        "iterations": _mean([r.iterations for r in reports]),
                        "step_ms": cost.step_ms,
                    }
                )
                progress.advance(method)
    return Study(
        name="invariance",
        title="Invariance and robustness as constraints",
        setting=[
            f"Digits, network 64-{setting.width}-{setting.width}-10 (GELU), batch {setting.batch}, {setting.steps} "
            f"steps at {setting.rate:g}, of which {setting.warm_up} without constraint or penalty; {setting.probes} "
            f"probes per step; seeds {seed} to {seed + setting.seeds - 1}, mean ± standard deviation.",
            f"Transformed: shifts up to {SHIFT:g} pixel and rotations up to {ROTATION:g} degrees; FGSM of "
            f"{ATTACK:g}, noise of {NOISE:g}, pixels in [0, 1]. Violation on test images: invariance rms "
            "|f(T x) - f(x)| over the spread of f, robustness rms |gradient of the loss|. Residual of J d: "
            f"|J d - gamma c| / |J g - gamma c|, mean over steps; the solver ran with atol = btol = {TOLERANCE:g}.",
        ],
        groups=("task", "method"),
        columns=COLUMNS,
        records=records,
        draw=_draw(records),
        device=device,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _draw(records: Sequence[dict[str, Any]]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        for axes, task, key, heading in zip(
            figure.subplots(1, 2), TASKS, ("transformed", "attacked"), ("transformed images", "FGSM"), strict=True
        ):
            own = [record for record in records if record["task"] == task]
            for method in dict.fromkeys(record["method"] for record in own):
                points = [record for record in own if record["method"] == method]
                marker = "s" if method.startswith("null") else "o"
                axes.plot([r["violation"] for r in points], [r[key] for r in points], marker, label=method)
            axes.set_xlabel("violation on test images")
            axes.set_ylabel(f"accuracy, {heading} [%]")
            axes.set_title(task)
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
            axes.grid(visible=True, alpha=0.3)

    return draw
