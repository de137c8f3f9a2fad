"""Train score models whose Jacobian is symmetric: null-space constraint, penalty, a potential by construction.

A score ``s(x, sigma)`` of data blurred by noise of size sigma is a gradient, so ``J = ds/dx`` is symmetric; a network
trained by denoising,

    min  E |sigma s(x + sigma e, sigma) + e|^2,       e ~ N(0, I), sigma from a geometric sequence

is not exactly one. The constraint is ``c = sigma^2 (J'v - J v) = 0`` at random probes: points of the minibatch and
random signs v, new ones in each step; one vector-Jacobian and one Jacobian-vector product each. (c is orthogonal to v:
one row in d depends on the others, and the solver takes that as it comes.)

All methods but the last continue one network that was trained without constraint.

    plain             no constraint                             penalty W         W mean |c|^2 added to the loss
    null, project G   gradients projected with gamma = G,       null, metric S    NullSpaceAdam, lr gamma = S
                      then Adam
    potential         s is the gradient of a network with one output: symmetric by construction, more per step

On 2-D densities (a Gaussian mixture, whose score is known; two moons; a pinwheel) and on digits in the space of their
leading principal components. Measured on points no method has trained on: asymmetry ``|J - J'| / |J|`` (Frobenius, root
mean squares), the error of the score where it is known, and the sliced Wasserstein distance between held-out data and
samples by annealed Langevin dynamics. The line ``data`` is the distance of two halves of real data: what chance leaves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsbackend.comparisons.experiments.runs import Column, Cost, Study
from hsbackend.comparisons.progress import Progress
from hsbackend.nullspace import NullSpaceAdam, ProjectionReport, project_gradient

COLUMNS = (
    Column("asymmetry", "asymmetry", ".2e"),
    Column("score_error", "score error", ".3f"),
    Column("wasserstein", "sliced Wasserstein", ".3f"),
    Column("loss", "held-out loss", ".3f"),
    Column("residual", "residual of J d", ".1e"),
    Column("iterations", "iterations", ".1f"),
    Column("step_ms", "step ms", ".1f"),
)
DATA_SETS = ("mixture", "moons", "pinwheel", "digits")
#: Relative residual at which a projection may end: the probes of the next step are others anyway.
TOLERANCE = 1e-2
#: Means, standard deviation and weights of the mixture.
CENTRES = ((-1.2, -0.6), (1.2, -0.6), (0.0, 1.2))
SPREAD = 0.35


@dataclass(frozen=True)
class Setting:
    """Size and length."""

    width: int
    batch: int
    probes: int
    warm_up: int
    steps: int
    samples: int
    langevin: int
    seeds: int
    data_sets: tuple[str, ...]
    rate: float = 3e-3
    levels: tuple[float, ...] = (1.0, 0.6, 0.35, 0.2, 0.12)
    components: int = 8
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0)
    gammas: tuple[float, ...] = (0.03,)
    shrinks: tuple[float, ...] = (0.05, 0.5)


QUICK = Setting(
    width=64, batch=128, probes=16, warm_up=1500, steps=40, samples=400, langevin=12, seeds=2,
    data_sets=("mixture", "moons", "digits"),
)  # fmt: skip
FULL = Setting(
    width=256, batch=256, probes=64, warm_up=8000, steps=2000, samples=4000, langevin=100, seeds=5,
    data_sets=DATA_SETS, gammas=(0.003, 0.03),
)  # fmt: skip


def load(name: str, count: int, setting: Setting, seed: int) -> Tensor:
    """Return (count, d) points; fewer for digits, of which there are 1,797. Coordinates are of the order of one."""
    generator = torch.Generator().manual_seed(seed)
    if name == "mixture":
        which = torch.randint(len(CENTRES), (count,), generator=generator)
        return torch.tensor(CENTRES)[which] + SPREAD * torch.randn(count, 2, generator=generator)
    if name == "moons":
        from sklearn.datasets import make_moons

        points: Any = make_moons(count, noise=0.08, random_state=seed)[0]
        return torch.as_tensor(1.3 * (points - np.array([0.5, 0.25])), dtype=torch.float32)
    if name == "pinwheel":
        along, across = torch.randn(2, count, generator=generator) * torch.tensor([[0.25], [0.1]])
        arm = torch.randint(5, (count,), generator=generator)
        angle = 2.0 * math.pi / 5.0 * arm + 0.4 * (1.0 + along).exp()
        cos, sin = angle.cos(), angle.sin()
        radius = 1.0 + along
        return 1.2 * torch.stack([cos * radius - sin * across, sin * radius + cos * across], -1)
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    data: Any = load_digits()
    coordinates = PCA(setting.components, svd_solver="full").fit_transform(data.data)
    order = torch.randperm(len(coordinates), generator=generator)[:count]
    return torch.as_tensor(coordinates / coordinates.std(), dtype=torch.float32)[order]


class Score(nn.Module):
    """``s(x, sigma)`` by a network of x and log sigma, or as the gradient of one."""

    def __init__(self, dimension: int, width: int, potential: bool) -> None:
        super().__init__()
        self.potential = potential
        outputs = 1 if potential else dimension
        self.network = nn.Sequential(
            nn.Linear(dimension + 1, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the score (B, d) at points (B, d) for noise (B, 1)."""
        if self.potential:
            return torch.func.grad(lambda given: self._outputs(given, sigma).sum())(x) / sigma
        return self._outputs(x, sigma) / sigma

    def _outputs(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.network(torch.cat([x, sigma.log()], -1))


def true_score(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the score of the mixture blurred by ``sigma`` (B, 1), at (B, 2)."""
    centres = torch.tensor(CENTRES, dtype=x.dtype, device=x.device)
    variance = SPREAD**2 + sigma**2
    differences = centres - x.unsqueeze(1)
    weights = torch.softmax(-differences.square().sum(-1) / (2.0 * variance), -1)
    return (weights.unsqueeze(-1) * differences).sum(1) / variance


def asymmetries(model: Callable[[Tensor], Tensor], x: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """Return ``sigma^2 (J'v - J v)`` for each item, (B, d)."""
    pushed = torch.func.jvp(model, (x,), (v,))[1]
    pulled = torch.func.vjp(model, x)[1](v)[0]
    return sigma**2 * (pulled - pushed)


def relative_asymmetry(model: nn.Module, x: Tensor, sigma: Tensor) -> float:
    """Return the root mean square of ``sigma^2 |J - J'|`` over that of ``sigma^2 |J|``, Frobenius."""

    def one(point: Tensor, level: Tensor) -> Tensor:
        return level**2 * model(point.unsqueeze(0), level.unsqueeze(0)).squeeze(0)

    jacobians = torch.func.vmap(torch.func.jacrev(one))(x, sigma).detach()
    return float((jacobians - jacobians.mT).norm() / jacobians.norm())


@torch.no_grad()
def sample(model: Callable[..., Tensor], shape: tuple[int, int], setting: Setting, seed: int) -> Tensor:
    """Return samples by annealed Langevin dynamics (Song and Ermon, 2019), and one denoising step at the end."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
    x = math.sqrt(2.0) * torch.randn(shape, generator=generator).to(device)
    for level in setting.levels:
        sigma = torch.full((shape[0], 1), level, device=device)
        length = 0.2 * level**2
        for _ in range(setting.langevin):
            x = x + length * model(x, sigma) + math.sqrt(2.0 * length) * torch.randn(shape, generator=generator).to(x)
    last = torch.full((shape[0], 1), setting.levels[-1], device=device)
    return x + last**2 * model(x, last)


def sliced_wasserstein(left: Tensor, right: Tensor, seed: int, directions: int = 128) -> float:
    """Return the mean over random directions of the 1-D Wasserstein-1 distance of the projected points."""
    generator = torch.Generator().manual_seed(seed)
    axes = nn.functional.normalize(torch.randn(left.shape[1], directions, generator=generator), dim=0).to(left)
    levels = (torch.arange(200, device=left.device) + 0.5).to(left) / 200
    a, b = (torch.quantile(points @ axes, levels, dim=0) for points in (left, right))
    return float((a - b).abs().mean())


def methods(setting: Setting) -> list[str]:
    """Return the names of the methods, in order."""
    return [
        "plain", *(f"penalty {weight:g}" for weight in setting.penalties),
        *(f"null, project {gamma:g}" for gamma in setting.gammas),
        *(f"null, metric {shrink:g}" for shrink in setting.shrinks), "potential",
    ]  # fmt: skip


def train(
    method: str, model: Score, data: Tensor, setting: Setting, steps: int, seed: int
) -> tuple[Cost, list[ProjectionReport]]:
    """Train for some steps by one method, with a new optimiser; return the cost and the reports of the projections."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(setting.levels)
    count, dimension = data.shape
    now: list[tuple[Tensor, Tensor, Tensor]] = []

    def constraint(given: dict[str, Tensor]) -> Tensor:
        x, sigma, v = now[0]
        return asymmetries(lambda points: torch.func.functional_call(model, given, (points, sigma)), x, sigma, v)

    number = float(method.rsplit(" ", 1)[1]) if " " in method else 0.0
    loose: dict[str, Any] = {"mode": "reverse", "atol": TOLERANCE, "btol": TOLERANCE, "max_steps": 300}
    optimiser: torch.optim.Optimizer
    if method.startswith("null, metric"):
        gamma = number / setting.rate
        # 1e-4: parameters with tiny gradients shall not take the whole correction.
        optimiser = NullSpaceAdam(model.named_parameters(), constraint, gamma=gamma, lr=setting.rate, eps=1e-4, **loose)
    else:
        optimiser = torch.optim.Adam(model.parameters(), lr=setting.rate)
    reports: list[ProjectionReport] = []
    cost = Cost(data.device)
    for _ in range(steps):
        chosen = torch.randint(count, (setting.batch,), generator=generator)
        sigma = levels[torch.randint(len(levels), (setting.batch, 1), generator=generator)].to(data)
        noise = torch.randn(setting.batch, dimension, generator=generator).to(data)
        signs = (2.0 * torch.randint(2, (setting.batch, dimension), generator=generator) - 1.0).to(data)
        x = data[chosen] + sigma * noise
        probes = setting.probes
        now[:] = [(x[:probes], sigma[:probes], signs[:probes])]
        with cost.step():
            optimiser.zero_grad()
            loss = (sigma * model(x, sigma) + noise).square().sum(-1).mean()
            if method.startswith("penalty"):
                # The penalty sees the whole minibatch, which costs it little.
                c = asymmetries(lambda points, sigma=sigma: model(points, sigma), x, sigma, signs)
                loss = loss + number * c.square().sum(-1).mean()
            loss.backward()
            if method.startswith("null, project"):
                reports.append(project_gradient(model, constraint, number, **loose))
            optimiser.step()
        if isinstance(optimiser, NullSpaceAdam) and optimiser.report is not None:
            reports.append(optimiser.report)
    return cost, reports


def started(potential: bool, data: Tensor, setting: Setting, seed: int) -> Score:
    """Return a network after the warm-up, trained without constraint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Score(data.shape[1], setting.width, potential).to(data.device)
    train("plain", model, data, setting, setting.warm_up, seed)
    return model


def run_score_model(setting: Setting, *, device: torch.device, seed: int, progress: Progress) -> Study:
    """Run every method on every data set for every seed; `progress` takes one step for each."""
    records: list[dict[str, Any]] = []
    pictures: dict[str, Tensor] = {}
    for name in setting.data_sets:
        for run in range(seed, seed + setting.seeds):
            progress.stage(f"{name}, seed {run}")
            points = load(name, 4 * setting.samples, setting, run).to(device)
            data, first, second = points[: len(points) // 2], *points[len(points) // 2 :].chunk(2)
            generator = torch.Generator().manual_seed(10_000 + run)
            at = torch.tensor(setting.levels)[
                torch.randint(len(setting.levels), (len(first), 1), generator=generator)
            ].to(data)
            noise = torch.randn(first.shape, generator=generator).to(data)
            floor = sliced_wasserstein(first, second, run)
            records.append(_record(name, "data", run, wasserstein=floor))
            if run == seed and points.shape[1] == 2:
                pictures[f"{name}: data"] = first
            start = started(False, data, setting, run)
            for method in methods(setting):
                model = started(True, data, setting, run) if method == "potential" else copy.deepcopy(start)
                cost, reports = train(method, model, data, setting, setting.steps, run + 1000)
                drawn = sample(model, tuple(first.shape), setting, run)
                blurred = first + at * noise
                with torch.no_grad():
                    scores = model(blurred, at)
                error = math.nan
                if name == "mixture":
                    true = true_score(blurred, at)
                    error = float((at * (scores - true)).norm() / (at * true).norm())
                records.append(
                    _record(
                        name,
                        method,
                        run,
                        asymmetry=relative_asymmetry(model, blurred, at),
                        score_error=error,
                        wasserstein=sliced_wasserstein(drawn, first, run),
                        loss=float((at * scores + noise).square().sum(-1).mean()),
                        residual=_mean([r.norm_residual / r.norm_target for r in reports if r.norm_target]),
                        iterations=_mean([r.iterations for r in reports]),
                        step_ms=cost.step_ms,
                    )
                )
                if run == seed and points.shape[1] == 2 and method in ("plain", methods(setting)[-2]):
                    pictures[f"{name}: {method}"] = drawn
                progress.advance(method)
    return Study(
        name="score_model",
        title="Score models with a symmetric Jacobian",
        setting=[
            f"Network of {setting.width}, {setting.width} (GELU), batch {setting.batch}, Adam at {setting.rate:g}: "
            f"{setting.warm_up} steps without constraint or penalty, the same for all but potential, and "
            f"{setting.steps} of each method with a new optimiser; {setting.probes} probes per step; noise "
            f"{', '.join(f'{level:g}' for level in setting.levels)}; digits in {setting.components} principal "
            f"components; seeds {seed} to {seed + setting.seeds - 1}, mean ± standard deviation.",
            f"Step ms: after the warm-up. Residual of J d: |J d - gamma c| / |J g - gamma c|, mean over "
            f"steps; the solver ran with atol = btol = {TOLERANCE:g}. data: distance of two held-out halves.",
        ],
        groups=("data", "method"),
        columns=COLUMNS,
        records=records,
        draw=_draw(pictures, records),
        device=device,
    )  # fmt: skip


def _record(name: str, method: str, seed: int, **measured: float) -> dict[str, Any]:
    return {
        "data": name,
        "method": method,
        "seed": seed,
        **{column.key: measured.get(column.key, math.nan) for column in COLUMNS},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _draw(pictures: dict[str, Tensor], records: Sequence[dict[str, Any]]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1.0))
        across = 3
        axes = left.subplots(max(math.ceil(len(pictures) / across), 1), across, squeeze=False).reshape(-1)
        for place in axes:
            place.set_axis_off()
        for place, (title, points) in zip(axes, pictures.items(), strict=False):
            place.scatter(*points[:400].cpu().numpy().T, s=2)
            place.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal")
            place.set_title(title, fontsize=7)
        axis = right.subplots()
        for name in dict.fromkeys(record["data"] for record in records):
            own = [record for record in records if record["data"] == name and record["asymmetry"] > 1e-6]
            colour = None
            for prefix, marker in (("plain", "x"), ("penalty", "o"), ("null", "s")):
                some = [record for record in own if record["method"].startswith(prefix)]
                drawn = axis.plot(
                    [r["asymmetry"] for r in some], [r["wasserstein"] for r in some], marker, color=colour,
                    label=f"{name}: {prefix}", markersize=5,
                )  # fmt: skip
                colour = drawn[0].get_color()
        axis.set_xlabel("asymmetry")
        axis.set_ylabel("sliced Wasserstein distance")
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axis.grid(visible=True, alpha=0.3)

    return draw
