"""Hyperparameters of a Gaussian process by what it predicts, differentiated through the solver, against its likelihood.

    y = f(x) + noise,   f ~ GP(0, k),   k(x, x') = s^2 exp(-1/2 sum_d (x_d - x'_d)^2 / l_d^2),   noise ~ N(0, t^2)

Three ways to choose s, t and the length scales l_d, one per coordinate:

    likelihood       scikit-learn's GaussianProcessRegressor with the same kernel: marginal likelihood by L-BFGS with
                     restarts
    kernel           exact kernel, by products with ``K + t^2 I`` alone: mean ``k*' (K + t^2 I)^-1 y`` and variance by
                     :func:`hsbackend.lstsq`
    features         k by random Fourier features Phi (Rahimi and Recht, 2007), and noise is damping: the mean
                     is ``Phi* w`` with ``w = lstsq(Phi, y, damp=t)``, and the variance of f at a point with features
                     p is the least value of ``|p - Phi'z|^2 + t^2 |z|^2``, which is another ``lstsq``
    features, likelihood   the last model with the first one's criterion, to tell the features from the criterion

`kernel` and `features` are trained on a predictive loss: in each step a random part of the training data is left out
and predicted from the rest; the mean negative log density of what was left out goes through the solver to all
hyperparameters, by Adam. No matrix is factored, and no derivative of a solver's step is recorded.

RMSE and NLPD (mean negative log predictive density, in units of the standardised target) are measured on held-out data.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsbackend import lstsq
from hsbackend.comparisons.experiments.runs import Column, Study
from hsbackend.comparisons.progress import Progress

COLUMNS = (
    Column("rmse", "RMSE"),
    Column("nlpd", "NLPD"),
    Column("train_nlpd", "NLPD of left-out parts"),
    Column("noise", "noise t"),
    Column("iterations", "iterations", ".0f"),
    Column("products", "products with A or A' per step", ".0f"),
    Column("seconds", "training s", ".1f"),
)
METHODS = ("likelihood", "kernel", "features", "features, likelihood")
DATA_SETS = ("diabetes", "wine")


@dataclass(frozen=True)
class Setting:
    """Size and length."""

    steps: int
    left_out: int
    features: int
    splits: int
    restarts: int
    rate: float = 0.1
    test_share: float = 0.3
    most: int | None = None
    data_sets: tuple[str, ...] = DATA_SETS


QUICK = Setting(steps=40, left_out=32, features=300, splits=3, restarts=1)
FULL = Setting(steps=300, left_out=64, features=2000, splits=10, restarts=5)


class Task(NamedTuple):
    """Standardised data: inputs (n, d) and targets (n,), by the training part's means and deviations."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(name: str, split: int, setting: Setting, device: torch.device) -> Task:
    """Return a data set of scikit-learn: ``diabetes`` and its progression, or ``wine``: alcohol by all the rest."""
    from sklearn.datasets import load_diabetes, load_wine
    from sklearn.model_selection import train_test_split

    if name == "diabetes":
        data: Any = load_diabetes()
        x, y = data.data, data.target
    else:
        data = load_wine()
        x, y = data.data[:, 1:], data.data[:, 0]
    order = np.random.default_rng(0).permutation(len(y))[: setting.most]
    parts: list[NDArray[Any]] = train_test_split(x[order], y[order], test_size=setting.test_share, random_state=split)
    train_x, test_x, train_y, test_y = parts
    scaled = (
        (train_x - train_x.mean(0)) / train_x.std(0),
        (train_y - train_y.mean()) / train_y.std(),
        (test_x - train_x.mean(0)) / train_x.std(0),
        (test_y - train_y.mean()) / train_y.std(),
    )
    return Task(*(torch.as_tensor(part, dtype=torch.float64, device=device) for part in scaled))


class Prediction(NamedTuple):
    """Of y: mean (n,), variance (n,), and what the solves took."""

    mean: Tensor
    variance: Tensor
    iterations: int
    products: Callable[[], int]


class Model:
    """A Gaussian process with parameters on a logarithmic scale: d length scales, amplitude, noise."""

    def __init__(self, dimension: int, device: torch.device) -> None:
        # A length of sqrt(d) for standardised coordinates: neighbours are about one length apart.
        start = torch.zeros(dimension + 2, dtype=torch.float64, device=device)
        start[:dimension] = 0.5 * math.log(dimension)
        start[-1] = math.log(0.5)
        self.logarithms = start.requires_grad_()

    @property
    def noise(self) -> Tensor:
        """The standard deviation t."""
        return self.logarithms[-1].exp()

    @property
    def amplitude(self) -> Tensor:
        """The standard deviation s."""
        return self.logarithms[-2].exp()

    def scaled(self, x: Tensor) -> Tensor:
        """Return coordinates in units of their length scales."""
        return x / self.logarithms[:-2].exp()

    def predict(self, x: Tensor, y: Tensor, at: Tensor) -> Prediction:
        """Predict y at points (m, d) from data (n, d), (n,)."""
        raise NotImplementedError


class Kernel(Model):
    """Exact kernel, by products with ``K + t^2 I``, all right-hand sides at once."""

    def between(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the kernel, (n, m)."""
        a, b = self.scaled(left), self.scaled(right)
        squared = a.square().sum(-1, keepdim=True) + b.square().sum(-1) - 2.0 * a @ b.mT
        return self.amplitude**2 * torch.exp(-0.5 * squared.clamp_min(0.0))

    def predict(self, x: Tensor, y: Tensor, at: Tensor) -> Prediction:
        """Solve for the data and for the columns of the kernel at the points."""
        cross = self.between(at, x)

        def matvec(z: Tensor, K: Tensor, noise: Tensor) -> Tensor:
            return z @ K + noise**2 * z

        rhs = torch.cat([y.unsqueeze(0), cross])
        # K + t^2 I is its own transpose.
        found = lstsq(
            (matvec, matvec), rhs, self.between(x, x), self.noise, x_like=rhs.detach(), batch_dims=1, max_steps=4000,
        )  # fmt: skip
        mean = cross @ found.x[0]
        # What is explained cannot exceed what is there, but for rounding.
        latent = (self.amplitude**2 - (cross * found.x[1:]).sum(-1)).clamp_min(0.0)
        return Prediction(mean, latent + self.noise**2, int(found.iterations.max()), lambda: _products(found))


class Features(Model):
    """Random Fourier features, and the noise as damping."""

    def __init__(self, dimension: int, features: int, seed: int, device: torch.device) -> None:
        super().__init__(dimension, device)
        generator = torch.Generator().manual_seed(seed)
        frequencies = torch.randn(dimension, features // 2, generator=generator, dtype=torch.float64)
        self._frequencies = frequencies.to(device)

    def of(self, x: Tensor) -> Tensor:
        """Return features (n, p), whose inner products are about k."""
        angle = self.scaled(x) @ self._frequencies
        waves = torch.cat([angle.cos(), angle.sin()], -1)
        return self.amplitude * waves / math.sqrt(self._frequencies.shape[1])

    def predict(self, x: Tensor, y: Tensor, at: Tensor) -> Prediction:
        """Solve for the weights, and for the part of each point's features that the data does not know."""
        phi, points, noise = self.of(x), self.of(at), self.noise
        weights = lstsq(phi, y, damp=noise)
        known = lstsq(phi.mT, points, damp=noise)
        latent = known.residual.square().sum(-1) + (noise * known.x).square().sum(-1)
        steps = max(int(weights.iterations), int(known.iterations.max()))
        return Prediction(points @ weights.x, latent + noise**2, steps, lambda: _products(weights) + _products(known))

    def negative_log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the negative log marginal likelihood per observation, by a factorisation."""
        phi = self.of(x)
        covariance = phi @ phi.mT + self.noise**2 * torch.eye(len(y), dtype=y.dtype, device=y.device)
        zero = torch.zeros_like(y)
        return -torch.distributions.MultivariateNormal(zero, covariance).log_prob(y) / len(y)


def _products(found: Any) -> int:
    """Return products with A and A' so far, derivatives included."""
    log = found.derivatives
    own = int(found.products.max()) + int(found.transposed_products.max())
    return own + log.products + log.transposed_products


def negative_log_density(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the mean of ``-log N(y; mean, variance)``."""
    return 0.5 * ((y - mean).square() / variance + variance.log() + math.log(2.0 * math.pi)).mean()


def train(model: Model, task: Task, setting: Setting, seed: int, likelihood: bool) -> dict[str, float]:
    """Fit the hyperparameters by Adam; return what it took, averages over the last quarter of the steps."""
    optimiser = torch.optim.Adam([model.logarithms], lr=setting.rate)
    # Down to a tenth, so that the last steps average over the random parts.
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, setting.steps)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    iterations: list[int] = []
    products: list[int] = []
    began = time.perf_counter()
    for _ in range(setting.steps):
        optimiser.zero_grad()
        if likelihood:
            assert isinstance(model, Features)
            model.negative_log_likelihood(task.train_x, task.train_y).backward()
        else:
            order = torch.randperm(len(task.train_y), generator=generator)
            out, rest = order[: setting.left_out], order[setting.left_out :]
            found = model.predict(task.train_x[rest], task.train_y[rest], task.train_x[out])
            loss = negative_log_density(task.train_y[out], found.mean, found.variance)
            loss.backward()
            losses.append(float(loss.detach()))
            iterations.append(found.iterations)
            products.append(found.products())
        optimiser.step()
        schedule.step()
    last = max(setting.steps // 4, 1)
    return {
        "seconds": time.perf_counter() - began,
        "train_nlpd": float(np.mean(losses[-last:])) if losses else math.nan,
        "iterations": float(np.mean(iterations[-last:])) if iterations else math.nan,
        "products": float(np.mean(products[-last:])) if products else math.nan,
    }


def by_likelihood(task: Task, setting: Setting, seed: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return scikit-learn's mean and variance of y at the test points, and what the fit took."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    x, y, at = (part.cpu().numpy() for part in (task.train_x, task.train_y, task.test_x))
    d = x.shape[1]
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * RBF(np.full(d, math.sqrt(d)), (1e-1, 1e3))
    kernel = kernel + WhiteKernel(0.25, (1e-4, 1e1))
    gp = GaussianProcessRegressor(kernel, alpha=0.0, n_restarts_optimizer=setting.restarts, random_state=seed)
    began = time.perf_counter()
    with warnings.catch_warnings():
        # A length scale at its bound is a coordinate that does not matter.
        warnings.simplefilter("ignore", ConvergenceWarning)
        gp.fit(x, y)
    seconds = time.perf_counter() - began
    mean, deviation = gp.predict(at, return_std=True)
    noise = math.sqrt(gp.kernel_.k2.noise_level)
    facts = {"seconds": seconds, "noise": noise, "train_nlpd": math.nan, "iterations": math.nan, "products": math.nan}
    return torch.as_tensor(mean), torch.as_tensor(deviation**2), facts


def run_gp_hyperparameters(
    setting: Setting, *, device: torch.device, seed: int, progress: Progress, methods: Sequence[str] = METHODS
) -> Study:
    """Run every method on every split of every data set; `progress` takes one step for each."""
    records: list[dict[str, Any]] = []
    for name in setting.data_sets:
        for split in range(seed, seed + setting.splits):
            progress.stage(f"{name}, split {split}")
            task = load(name, split, setting, device)
            for method in methods:
                if method == "likelihood":
                    mean, variance, facts = by_likelihood(task, setting, split)
                else:
                    dimension = task.train_x.shape[1]
                    model: Model = (
                        Kernel(dimension, device)
                        if method == "kernel"
                        else Features(dimension, setting.features, split, device)
                    )
                    facts = train(model, task, setting, split, method == "features, likelihood")
                    with torch.no_grad():
                        found = model.predict(task.train_x, task.train_y, task.test_x)
                    mean, variance = found.mean, found.variance
                    facts["noise"] = float(model.noise.detach())
                y = task.test_y.to(mean)
                records.append(
                    {
                        "data": name,
                        "method": method,
                        "split": split,
                        "rmse": float((mean - y).square().mean().sqrt()),
                        "nlpd": float(negative_log_density(y, mean, variance)),
                        **facts,
                    }
                )
                progress.advance(method)
    return Study(
        name="gp_hyperparameters",
        title="Hyperparameters of a Gaussian process by predictive performance",
        setting=[
            f"RBF kernel with a length scale per coordinate; splits {seed} to {seed + setting.splits - 1}, "
            f"{100 * setting.test_share:g} % held out, mean ± standard deviation over splits; units of the "
            "standardised target, so that an RMSE of 1 is the mean's.",
            f"kernel, features: Adam, {setting.steps} steps at {setting.rate:g} falling to a tenth, {setting.left_out} "
            f"points left out per step, {setting.features} features; likelihood: L-BFGS, {setting.restarts} "
            "restart(s).",
        ],
        groups=("data", "method"),
        columns=COLUMNS,
        records=records,
        draw=_draw(records, setting.data_sets, methods),
        device=device,
    )  # fmt: skip


def _draw(records: Sequence[dict[str, Any]], names: Sequence[str], methods: Sequence[str]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        for axes, key, heading in zip(figure.subplots(1, 2), ("rmse", "nlpd"), ("RMSE", "NLPD"), strict=True):
            labels: list[str] = []
            for name in names:
                for method in methods:
                    own = [r[key] for r in records if (r["data"], r["method"]) == (name, method)]
                    place = len(labels)
                    labels.append(f"{name}\n{method}".replace(", ", ",\n"))
                    axes.plot([place] * len(own), own, "o", alpha=0.4, color=f"C{methods.index(method)}")
                    axes.plot([place - 0.3, place + 0.3], [np.mean(own)] * 2, color=f"C{methods.index(method)}")
            axes.set_xticks(range(len(labels)), labels, fontsize=6)
            axes.set_ylabel(f"{heading} on held-out data")
            axes.grid(visible=True, alpha=0.3)

    return draw
