"""Matrices with prescribed singular values, and least squares by their decomposition: what LSMR is judged by."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def bases(seed: int, m: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns (m, rank) and (n, rank)."""
    return torch.linalg.qr(randn(seed, m, rank))[0], torch.linalg.qr(randn(seed + 1, n, rank))[0]


def spectrum(rank: int, condition: float) -> Tensor:
    """Return singular values from 1 down to 1/condition."""
    return torch.logspace(0.0, -float(torch.log10(torch.tensor(condition))), rank, dtype=torch.float64)


def matrix(seed: int, m: int, n: int, rank: int, condition: float = 10.0) -> Tensor:
    left, right = bases(seed, m, n, rank)
    return (left * spectrum(rank, condition)) @ right.mT


def dense_solution(A: Tensor, b: Tensor, damp: Tensor | float = 0.0, centre: Tensor | float = 0.0) -> Tensor:
    """Return the minimiser nearest to the centre, by the pseudo-inverse of ``[A; damp I]``."""
    n = A.shape[-1]
    d = torch.as_tensor(damp, dtype=A.dtype).expand(n)
    stacked = torch.cat([A, torch.diag(d)])
    right = torch.cat([b - A @ torch.as_tensor(centre, dtype=A.dtype).expand(n), b.new_zeros(n)])
    return torch.linalg.pinv(stacked, rtol=1e-11) @ right + centre


#: m, n, rank: tall, wide and square, full rank and not.
SHAPES = [(7, 4, 4), (4, 7, 4), (5, 5, 5), (7, 5, 3), (5, 7, 3), (5, 5, 3)]
