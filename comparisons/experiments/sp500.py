"""Monthly portfolio data from the daily S&P 500 prices that ship inside the skfolio package.

20 stocks, 1990 to 2022. Everything known at a decision date uses prices up to that date only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DAYS_PER_MONTH = 21
DAYS_PER_YEAR = 252
MONTHS_PER_YEAR = 12

# Decisions before this date train the network, later ones judge it.
VALIDATION_START = np.datetime64("2013-01-01")

# Trailing windows of the momentum features, in trading days: a week, a month, a quarter, half a year, a year.
_MOMENTUM_DAYS = (5, 21, 63, 126, 252)
# Weight of the diagonal in the shrunk covariance; 252 days for 20 stocks make the sample covariance usable but noisy.
_SHRINKAGE = 0.2
# Standardised features beyond this are outliers (crash months) and would dominate the first steps.
_FEATURE_LIMIT = 3.0

# GICS sectors of the 20 stocks. A sector with one stock needs no row: the cap of the stock is smaller.
SECTORS: dict[str, tuple[str, ...]] = {
    "technology": ("AAPL", "AMD", "MSFT"),
    "financials": ("BAC", "JPM"),
    "consumer discretionary": ("BBY", "HD"),
    "consumer staples": ("KO", "PEP", "PG", "WMT"),
    "energy": ("CVX", "RRC", "XOM"),
    "health care": ("JNJ", "LLY", "MRK", "PFE", "UNH"),
}


@dataclass(frozen=True)
class Market:
    """One row per monthly decision; T decisions, n stocks, f features.

    Attributes:
        dates: (T,).
        tickers: the n stocks.
        features: (T, n, f), standardised momentum over several windows and relative volatility.
        next_returns: (T, n), simple return from this decision to the next.
        past_returns: (T, n), simple return from the previous decision to this one.
        covariance_root: (T, n, n), F with F'F the shrunk covariance of trailing yearly returns, annualised.
        sector_membership: (sectors, n), 0 or 1.
        train: positions of training decisions; `validation`: positions of the later ones, in order.
    """

    dates: NDArray[np.datetime64]
    tickers: tuple[str, ...]
    features: Tensor
    next_returns: Tensor
    past_returns: Tensor
    covariance_root: Tensor
    sector_membership: NDArray[np.float64]
    train: NDArray[np.intp]
    validation: NDArray[np.intp]


def load_market() -> Market:
    """Load the prices and derive features, returns and risk.

    Raises:
        ImportError: skfolio is not installed; the message names the extra that brings it.
    """
    try:
        from skfolio.datasets import load_sp500_dataset
    except ImportError as error:
        raise ImportError(
            "the portfolio experiment takes its prices from skfolio, which is not installed; "
            'install it with: pip install "hsbackend[compare]"'
        ) from error
    frame = load_sp500_dataset()
    return market_from_prices(
        frame.index.to_numpy().astype("datetime64[D]"), tuple(frame.columns), frame.to_numpy(dtype=np.float64)
    )


def market_from_prices(dates: NDArray[np.datetime64], tickers: tuple[str, ...], prices: NDArray[np.float64]) -> Market:
    """Derive the monthly market from daily dates (D,) and prices (D, n)."""
    log_returns = np.diff(np.log(prices), axis=0, prepend=np.log(prices[:1]))
    # The first decision has a full trailing year behind it, the last one a full month ahead of it.
    decisions = np.arange(DAYS_PER_YEAR, len(dates) - DAYS_PER_MONTH, DAYS_PER_MONTH)
    is_training = dates[decisions] < VALIDATION_START
    features = np.stack([_features(prices, log_returns, day) for day in decisions])
    roots = np.stack([_covariance_root(log_returns, day) for day in decisions])
    membership = np.array([[float(ticker in members) for ticker in tickers] for members in SECTORS.values()])
    return Market(
        dates=dates[decisions],
        tickers=tickers,
        features=torch.from_numpy(features),
        next_returns=torch.from_numpy(prices[decisions + DAYS_PER_MONTH] / prices[decisions] - 1.0),
        past_returns=torch.from_numpy(prices[decisions] / prices[decisions - DAYS_PER_MONTH] - 1.0),
        covariance_root=torch.from_numpy(roots),
        sector_membership=membership,
        train=np.flatnonzero(is_training),
        validation=np.flatnonzero(~is_training),
    )


def _features(prices: NDArray[np.float64], log_returns: NDArray[np.float64], day: int) -> NDArray[np.float64]:
    """Return (n, f): log price changes in units of their standard deviation, and log volatility minus its average."""
    volatility = log_returns[day - DAYS_PER_YEAR + 1 : day + 1].std(axis=0)
    momentum = [np.log(prices[day] / prices[day - days]) / (volatility * np.sqrt(days)) for days in _MOMENTUM_DAYS]
    relative_volatility = np.log(volatility) - np.log(volatility).mean()
    return np.clip(np.stack([*momentum, relative_volatility], axis=1), -_FEATURE_LIMIT, _FEATURE_LIMIT)


def _covariance_root(log_returns: NDArray[np.float64], day: int) -> NDArray[np.float64]:
    """Return upper triangular F (n, n) with F'F = the shrunk, annualised covariance of the trailing year."""
    window = log_returns[day - DAYS_PER_YEAR + 1 : day + 1]
    covariance = DAYS_PER_YEAR * np.cov(window, rowvar=False)
    shrunk = (1.0 - _SHRINKAGE) * covariance + _SHRINKAGE * np.diag(np.diag(covariance))
    return np.linalg.cholesky(shrunk).T
