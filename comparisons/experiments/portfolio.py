"""Train a portfolio network end to end, once per backend, on real prices.

    features -> forecasts mu (a small network) -> QP layer -> weights w -> minus the Sharpe ratio

    QP layer:  minimise 1/2 ||F w||^2 - mu'w
               subject to sum(w) = 1,  0 <= w <= cap,  S w <= sector cap,  ||w - w_previous||_1 <= turnover

F'F is the risk aversion times the trailing covariance, one per date; S sums sectors; w_previous is what the portfolio
of the month before has drifted to. The turnover row is spelled `cp.norm1`, as users write it. Every backend starts
from the same network and sees the same minibatches, so losses can be compared step for step.

The holdings of every month are remembered from the step before (a portfolio-vector memory), so that w_previous of a
whole minibatch is known without solving month after month. Validation does solve month after month, as one would trade.
"""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cvxpy as cp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hsbackend.comparisons.contestants import Layer, LayerContestant, route_of
from hsbackend.comparisons.environment import Environment
from hsbackend.comparisons.experiments.sp500 import MONTHS_PER_YEAR, Market
from hsbackend.comparisons.problems import Model
from hsbackend.comparisons.progress import Progress
from hsbackend.comparisons.speed import describe_error
from hsbackend.comparisons.tables import align

# Who trains unless the caller names others: what people use today, its accurate setting, and ours.
DEFAULT_CONTESTANTS = ("diffcp", "diffcp-tight", "moreau-2x", "hs-stock", "hs-layer")

# The rules of the fund. A portfolio that obeys the first two can return to them after any month of 1991-2022 with
# turnover 0.25 (measured on portfolios chosen to drift far), so the monthly problem is feasible.
STOCK_CAP = 0.15
SECTOR_CAP = 0.35
MONTHLY_TURNOVER = 0.4
RISK_AVERSION = 10.0
# Charged on validation returns, 5 basis points of everything traded. Not part of the loss: |trade| has a kink exactly
# where the turnover row puts many trades, and rounding would choose the gradient there.
_TRADING_COST = 5e-4

_HIDDEN = 16
# Forecasts are yearly returns within +-20 %.
_FORECAST_LIMIT = 0.2
_LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Schedule:
    """How long to train: `steps` minibatches of `batch` months; None means all months there are.

    The default takes every training month in every step: the Sharpe ratio of a hundred months is mostly noise, and with
    noisy steps two backends that differ in the ninth digit end in different networks.
    """

    steps: int = 30
    batch: int | None = None
    validation_months: int | None = None


QUICK = Schedule(steps=3, batch=8, validation_months=5)


@dataclass(frozen=True)
class TrainingRun:
    """One backend's training.

    Attributes:
        losses: (steps,), minus the annualised Sharpe ratio of each minibatch.
        elapsed_s: (steps,), wall-clock time since the first step began.
        step_s: (steps,), wall-clock time of each step.
        setup_s: building the layer and its first call, which may compile; not part of the training time.
        validation_sharpe: annualised, net of trading costs, on the validation months, solved one after the other.
        validation_s: time those took.
        worst_violation: largest violation of any rule by any portfolio, training and validation.
        route: what a layer of ours says about its choice of solver.
        error: why it ended early, if it did; the arrays then hold the steps before.
    """

    backend: str
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    elapsed_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    step_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    setup_s: float = float("nan")
    validation_sharpe: float = float("nan")
    validation_s: float = float("nan")
    worst_violation: float = 0.0
    route: str | None = None
    error: str | None = None


class Forecaster(nn.Module):
    """Forecast yearly returns (B, n) from features (B, n, f); one small network for every stock."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, 1)).double()

    def forward(self, features: Tensor) -> Tensor:
        return _FORECAST_LIMIT * torch.tanh(self.body(features).squeeze(-1))


def build_model(market: Market, bound_scale: float) -> Model:
    """Build the monthly problem in cvxpy; `bound_scale` other than 1 spells bounds as `bound_scale * w >= 0`.

    Parameters, in order: mu (n,), F (n, n), w_previous (n,). Variable: w (n,).
    """
    n = len(market.tickers)
    w = cp.Variable(n)
    mu, F, w_previous = cp.Parameter(n), cp.Parameter((n, n)), cp.Parameter(n)
    bounded = w if bound_scale == 1.0 else bound_scale * w
    constraints = [
        cp.sum(w) == 1,
        bounded >= 0,
        bounded <= bound_scale * STOCK_CAP,
        market.sector_membership @ w <= SECTOR_CAP,
        cp.norm1(w - w_previous) <= MONTHLY_TURNOVER,
    ]
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(F @ w) - mu @ w), constraints)
    return Model(problem, [mu, F, w_previous], [w])


def worst_violation(market: Market, w: Tensor, w_previous: Tensor) -> float:
    """Return the largest violation of the five rules by portfolios w (B, n), absolute, from their definitions."""
    sectors = w @ torch.from_numpy(market.sector_membership).T
    violations = (
        (w.sum(dim=-1) - 1.0).abs(),
        -w,
        w - STOCK_CAP,
        sectors - SECTOR_CAP,
        (w - w_previous).abs().sum(dim=-1) - MONTHLY_TURNOVER,
    )
    worst = torch.cat([v.reshape(-1) for v in violations]).max()
    return max(float(worst), 0.0) if torch.isfinite(worst) else float("inf")


def sharpe(monthly_returns: Tensor) -> Tensor:
    """Return the annualised Sharpe ratio of monthly returns (B,), without a risk-free rate."""
    return MONTHS_PER_YEAR**0.5 * monthly_returns.mean() / monthly_returns.std()


def make_minibatches(market: Market, schedule: Schedule, seed: int) -> list[NDArray[np.intp]]:
    """Return the training months of every step, the same for every backend."""
    generator = np.random.default_rng(seed)
    batch = schedule.batch or market.train.size
    return [np.sort(generator.choice(market.train, batch, replace=False)) for _ in range(schedule.steps)]


def train(
    contestant: LayerContestant,
    market: Market,
    schedule: Schedule,
    minibatches: Sequence[NDArray[np.intp]],
    seed: int,
    progress: Progress,
) -> TrainingRun:
    """Train and validate one backend; an error ends the run and is kept in the result."""
    torch.manual_seed(seed)
    network = Forecaster(market.features.shape[-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    risk_root = RISK_AVERSION**0.5 * market.covariance_root
    n = len(market.tickers)
    # holdings[t + 1] is the portfolio of month t when it was last solved; equal weights until then, and before month 0.
    holdings = torch.full((len(market.dates) + 1, n), 1.0 / n, dtype=torch.float64)
    run = TrainingRun(contestant.name)
    losses: list[float] = []
    step_s: list[float] = []
    violation = 0.0
    try:
        start_s = time.perf_counter()
        layer = contestant.make_layer(build_model(market, contestant.bound_scale))
        months = minibatches[0]
        first_call = layer(network(market.features[months]), risk_root[months], holdings[months])[0]
        torch.autograd.grad(first_call.sum(), list(network.parameters()))
        run = replace(run, setup_s=time.perf_counter() - start_s, route=route_of(layer))
        for months in minibatches:
            w_previous = _drifted(holdings[months], market.past_returns[months])
            start_s = time.perf_counter()
            (w,) = layer(network(market.features[months]), risk_root[months], w_previous)
            loss = -sharpe((w * market.next_returns[months]).sum(dim=-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step_s.append(time.perf_counter() - start_s)
            losses.append(loss.item())
            holdings[months + 1] = w.detach()
            violation = max(violation, worst_violation(market, w.detach(), w_previous))
            progress.advance(f"{contestant.name}: training")
        months = market.validation[: schedule.validation_months]
        run = _validate(run, layer, network, market, risk_root, months, violation)
    except Exception as error:
        run = replace(run, error=describe_error(error), worst_violation=violation)
    progress.advance(f"{contestant.name}: validation", 1 + len(minibatches) - len(losses))
    return replace(
        run, losses=np.array(losses), step_s=np.array(step_s), elapsed_s=np.cumsum(np.array(step_s, dtype=np.float64))
    )


def _drifted(w: Tensor, returns: Tensor) -> Tensor:
    """Return what portfolios w (B, n) have become after `returns` (B, n)."""
    value = w * (1.0 + returns)
    return value / value.sum(dim=-1, keepdim=True)


def _validate(
    run: TrainingRun,
    layer: Layer,
    network: Forecaster,
    market: Market,
    risk_root: Tensor,
    months: NDArray[np.intp],
    violation: float,
) -> TrainingRun:
    """Trade the validation months in order, starting from equal weights, and fill in the validation fields."""
    n = len(market.tickers)
    w_previous = torch.full((1, n), 1.0 / n, dtype=torch.float64)
    returns: list[float] = []
    start_s = time.perf_counter()
    with torch.no_grad():
        forecasts = network(market.features[months])
        for position, month in enumerate(months):
            (w,) = layer(forecasts[position : position + 1], risk_root[month : month + 1], w_previous)
            violation = max(violation, worst_violation(market, w, w_previous))
            cost = _TRADING_COST * (w - w_previous).abs().sum().item()
            returns.append((w * market.next_returns[month]).sum().item() - cost)
            w_previous = _drifted(w, market.next_returns[month : month + 1])
    return replace(
        run,
        validation_s=time.perf_counter() - start_s,
        validation_sharpe=sharpe(torch.tensor(returns, dtype=torch.float64)).item(),
        worst_violation=violation,
    )


def equal_weight_sharpe(market: Market, schedule: Schedule) -> float:
    """Return the validation Sharpe ratio of equal weights rebalanced monthly, without costs: a yardstick."""
    months = market.validation[: schedule.validation_months]
    return sharpe(market.next_returns[months].mean(dim=-1)).item()


def run_portfolio(
    contestants: Sequence[LayerContestant], market: Market, schedule: Schedule, *, seed: int, progress: Progress
) -> list[TrainingRun]:
    """Train every contestant from the same seed on the same minibatches.

    Args:
        contestants: the backends.
        market: the data.
        schedule: how long.
        seed: of the network and of the minibatches.
        progress: takes `(schedule.steps + 1) * len(contestants)` steps.
    """
    minibatches = make_minibatches(market, schedule, seed)
    runs: list[TrainingRun] = []
    with warnings.catch_warnings():
        # Solvers warn about every inexact item; violations and loss differences are measured below.
        warnings.simplefilter("ignore")
        for contestant in contestants:
            progress.stage(contestant.name)
            runs.append(train(contestant, market, schedule, minibatches, seed, progress))
    return runs


def largest_loss_difference(run: TrainingRun, other: TrainingRun) -> float:
    """Return max over common steps of |loss - other loss|; NaN without common steps."""
    steps = min(run.losses.size, other.losses.size)
    return float(np.abs(run.losses[:steps] - other.losses[:steps]).max()) if steps else float("nan")


def portfolio_text(runs: Sequence[TrainingRun], market: Market, schedule: Schedule, environment: Environment) -> str:
    """Return the result as plain text."""
    reference = _loss_reference(runs)
    cells = [
        [
            "backend",
            "step ms",
            "20%-80%",
            "training s",
            "setup s",
            "x faster",
            "validation Sharpe",
            "worst violation",
            f"largest |loss - {reference.backend}|",
        ]
    ]
    slowest_ms = max((_step_ms(run) for run in runs if run.step_s.size), default=float("nan"))
    for run in runs:
        if not run.step_s.size:
            cells.append([run.backend] + ["-"] * (len(cells[0]) - 1))
            continue
        q20_s, q80_s = np.quantile(run.step_s, [0.2, 0.8])
        cells.append(
            [
                run.backend,
                f"{_step_ms(run):.1f}",
                f"{1e3 * q20_s:.1f}-{1e3 * q80_s:.1f}",
                f"{run.step_s.sum():.1f}",
                f"{run.setup_s:.2f}",
                f"{slowest_ms / _step_ms(run):.1f}",
                f"{run.validation_sharpe:.4f}",
                f"{run.worst_violation:.1e}",
                f"{largest_loss_difference(run, reference):.1e}",
            ]
        )
    validation = market.dates[market.validation[: schedule.validation_months]]
    training = market.dates[market.train]
    lines = [
        f"{environment.cpu}, {environment.cores} cores, torch threads {environment.torch_threads}, {environment.date}",
        environment.versions_text,
        "",
        f"{len(market.tickers)} stocks, trained on monthly decisions {training[0]} to {training[-1]} "
        f"({schedule.steps} steps, {schedule.batch or market.train.size} of {market.train.size} months in each), "
        f"validated on {validation[0]} to {validation[-1]} ({validation.size} months, in order)",
        f"rules: fully invested, 0 <= w <= {STOCK_CAP}, sectors <= {SECTOR_CAP}, "
        f"norm1(w - previous) <= {MONTHLY_TURNOVER} per month",
        "",
        align(cells),
        "",
        f"equal weights, no optimisation: validation Sharpe {equal_weight_sharpe(market, schedule):.4f}",
        "losses are compared step for step, same seed, same months; 'x faster' refers to the slowest backend",
    ]
    if any(run.backend == "moreau-2x" for run in runs):
        lines.append(
            "moreau-2x: bounds rewritten as 2 * w >= 0, because stock cvxpylayers + MOREAU silently drops w >= 0"
        )
    lines += [f"{run.backend} routed: {run.route}" for run in runs if run.route is not None]
    lines += [f"{run.backend} failed: {run.error}" for run in runs if run.error is not None]
    return "\n".join(lines) + "\n"


def _loss_reference(runs: Sequence[TrainingRun]) -> TrainingRun:
    """Return the run the losses are compared with: the last one that finished, ours in the default order."""
    return next((run for run in reversed(runs) if run.error is None), runs[-1])


def _step_ms(run: TrainingRun) -> float:
    """Return the median step time."""
    return 1e3 * float(np.median(run.step_s))


def write_portfolio(runs: Sequence[TrainingRun], environment: Environment, folder: Path) -> tuple[Path, ...]:
    """Write losses and summary as CSV and the plot of loss against wall-clock time; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    losses, summary, plot = folder / "portfolio_losses.csv", folder / "portfolio.csv", folder / "portfolio.png"
    with losses.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["backend", "step", "elapsed_s", "loss"])
        for run in runs:
            rows = zip(run.elapsed_s, run.losses, strict=True)
            writer.writerows([run.backend, step, f"{s:.6f}", repr(float(loss))] for step, (s, loss) in enumerate(rows))
    with summary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            [
                "backend",
                "steps",
                "step_ms",
                "training_s",
                "setup_s",
                "validation_s",
                "validation_sharpe",
                "worst_violation",
                "largest_loss_difference",
                "error",
                "cpu",
                "cores",
                "date",
                "commit",
                "versions",
            ]
        )
        for run in runs:
            writer.writerow(
                [
                    run.backend,
                    run.step_s.size,
                    _step_ms(run) if run.step_s.size else "",
                    run.step_s.sum(),
                    run.setup_s,
                    run.validation_s,
                    run.validation_sharpe,
                    run.worst_violation,
                    largest_loss_difference(run, _loss_reference(runs)),
                    run.error or "",
                    environment.cpu,
                    environment.cores,
                    environment.date,
                    environment.commit,
                    environment.versions_text,
                ]
            )
    _plot(runs, plot)
    return losses, summary, plot


def _plot(runs: Sequence[TrainingRun], path: Path) -> None:
    """Draw the loss against wall-clock time, time on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run in runs:
        if run.losses.size:
            axes.plot(run.elapsed_s, run.losses, marker=".", label=run.backend)
    axes.set_xscale("log")
    axes.set_xlabel("wall-clock training time [s]")
    axes.set_ylabel("loss: minus annualised Sharpe ratio")
    axes.set_title("Portfolio network on S&P 500 prices, same seed and minibatches")
    axes.grid(visible=True, alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=150)
