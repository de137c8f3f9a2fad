"""The portfolio experiment: no look-ahead in the data, rules measured from their definitions, errors kept."""

from __future__ import annotations

import io
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch

from hsbackend.comparisons.contestants import LayerContestant
from hsbackend.comparisons.experiments.portfolio import (
    QUICK,
    TrainingRun,
    build_model,
    largest_loss_difference,
    make_minibatches,
    run_portfolio,
    sharpe,
    worst_violation,
)
from hsbackend.comparisons.experiments.sp500 import (
    DAYS_PER_MONTH,
    SECTORS,
    VALIDATION_START,
    Market,
    market_from_prices,
)
from hsbackend.comparisons.progress import Progress

TICKERS = ("AAPL", "AMD", "BAC", "BBY", "CVX", "GE", "HD", "JNJ", "JPM", "KO")
TICKERS += ("LLY", "MRK", "MSFT", "PEP", "PFE", "PG", "RRC", "UNH", "WMT", "XOM")


def _prices() -> tuple[np.ndarray, np.ndarray]:
    """Return 800 invented days around the validation start, dates (D,) and prices (D, 20)."""
    generator = np.random.default_rng(0)
    dates = VALIDATION_START + np.arange(-600, 200)
    return dates, 100.0 * np.exp(np.cumsum(0.01 * generator.standard_normal((dates.size, 20)), axis=0))


@pytest.fixture(scope="module")
def market() -> Market:
    dates, prices = _prices()
    return market_from_prices(dates, TICKERS, prices)


class TestMarket:
    def test_decisions_do_not_see_the_future(self, market: Market) -> None:
        dates, prices = _prices()
        day = int(np.flatnonzero(dates == market.dates[5])[0])
        changed = prices.copy()
        changed[day + 1 :] *= np.random.default_rng(1).uniform(0.5, 2.0, changed[day + 1 :].shape)
        other = market_from_prices(dates, TICKERS, changed)
        for known in ("features", "covariance_root", "past_returns"):
            assert torch.equal(getattr(market, known)[:6], getattr(other, known)[:6])
        assert not torch.equal(market.next_returns[5], other.next_returns[5])

    def test_returns_chain(self, market: Market) -> None:
        torch.testing.assert_close(market.next_returns[:-1], market.past_returns[1:])
        dates, prices = _prices()
        day = int(np.flatnonzero(dates == market.dates[0])[0])
        expected = prices[day + DAYS_PER_MONTH] / prices[day] - 1.0
        np.testing.assert_allclose(market.next_returns[0].numpy(), expected, rtol=1e-14)

    def test_training_ends_before_validation_begins(self, market: Market) -> None:
        assert market.dates[market.train].max() < VALIDATION_START <= market.dates[market.validation].min()
        assert market.train.size + market.validation.size == market.dates.size

    def test_every_sector_has_its_stocks(self, market: Market) -> None:
        assert market.sector_membership.sum(axis=1).tolist() == [len(members) for members in SECTORS.values()]
        assert market.sector_membership.sum(axis=0).max() == 1.0

    def test_covariance_root_is_positive_definite(self, market: Market) -> None:
        root = market.covariance_root
        covariance = root.transpose(-1, -2) @ root
        assert torch.linalg.eigvalsh(covariance).min() > 1e-4
        torch.testing.assert_close(root, root.triu())


class TestRules:
    def test_violations_are_measured_one_by_one(self, market: Market) -> None:
        equal = torch.full((1, 20), 0.05, dtype=torch.float64)
        assert worst_violation(market, equal, equal) < 1e-15
        short = equal.clone()
        short[0, 0], short[0, 1] = -0.01, 0.11
        assert worst_violation(market, short, short) == pytest.approx(0.01)
        capped = equal.clone()
        capped[0, 5], capped[0, 0] = 0.2, -0.1 + 1e-9
        assert worst_violation(market, capped, capped) == pytest.approx(0.1)
        assert worst_violation(market, 1.1 * equal, 1.1 * equal) == pytest.approx(0.1)
        traded = equal.clone()
        traded[0, :4] += 0.1
        traded[0, 4:8] -= 0.05
        traded[0, 8:12] -= 0.05
        assert worst_violation(market, traded, equal) == pytest.approx(0.4, abs=1e-12)
        assert worst_violation(market, torch.full_like(equal, torch.nan), equal) == float("inf")

    @pytest.mark.parametrize("bound_scale", [1.0, 2.0])
    def test_model_obeys_the_rules_in_both_spellings(self, market: Market, bound_scale: float) -> None:
        model = build_model(market, bound_scale)
        generator = np.random.default_rng(0)
        previous = np.full(20, 0.05)
        values = (generator.standard_normal(20), 3.0 * market.covariance_root[0].numpy(), previous)
        for parameter, value in zip(model.parameters, values, strict=True):
            parameter.value = value
        model.problem.solve(solver=cp.CLARABEL)
        w = torch.from_numpy(model.variables[0].value)[None]
        assert worst_violation(market, w, torch.from_numpy(previous)[None]) < 1e-6
        assert (w - 0.05).abs().sum() > 0.1


def test_sharpe_by_hand() -> None:
    assert sharpe(torch.tensor([0.01, 0.03], dtype=torch.float64)).item() == pytest.approx(
        12**0.5 * 0.02 / 0.02**0.5 / 0.1
    )


def test_minibatches_are_training_months_and_follow_the_seed(market: Market) -> None:
    schedule = replace(QUICK, batch=4)
    first, again, other = (make_minibatches(market, schedule, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert set(np.concatenate(first)) <= set(market.train)
    (everything,) = make_minibatches(market, replace(QUICK, steps=1, batch=None), 0)
    assert np.array_equal(everything, market.train)


def _keep_previous(model: object) -> object:
    """Make a layer that never trades but depends on the forecast, so that it has a gradient."""
    return lambda mu, F, w_previous: (w_previous + 0.0 * mu,)


def _fail(model: object) -> object:
    raise RuntimeError("no such solver")


def test_backends_start_alike_and_a_failure_keeps_its_run(market: Market) -> None:
    contestants = [
        LayerContestant("a", "", _keep_previous),
        LayerContestant("fails", "", _fail),
        LayerContestant("b", "", _keep_previous),
    ]
    schedule = replace(QUICK, batch=4)
    progress = Progress(12, io.StringIO())
    first, failed, second = run_portfolio(contestants, market, schedule, seed=0, progress=progress)
    assert first.losses.size == 3
    assert np.array_equal(first.losses, second.losses)
    assert largest_loss_difference(first, second) == 0.0
    assert failed.error == "RuntimeError: no such solver"
    assert failed.losses.size == 0
    assert np.isnan(largest_loss_difference(failed, first))


def test_largest_loss_difference_uses_common_steps() -> None:
    one = TrainingRun("one", losses=np.array([1.0, 2.0, 3.0]))
    other = TrainingRun("other", losses=np.array([1.5, 2.0]))
    assert largest_loss_difference(one, other) == 0.5
