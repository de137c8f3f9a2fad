"""Random quadratic programs with known answers: choose x, the active rows and the multipliers, then build the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from hsbackend.program import AffineMap, MatrixEntries, Program


@dataclass
class Case:
    """A batch of programs of one structure, with the answers.

    ``hessian`` (1 or B, n, n), ``rows`` (1 or B, m, n), ``linear`` (B, n), ``rhs`` (B, m); the first ``equalities``
    rows are equalities. ``primal`` (B, n) is the unique solution and ``multipliers`` (B, m) one optimal dual solution;
    ``infeasible`` (B,) marks items that were made infeasible on purpose.
    """

    hessian: np.ndarray
    linear: np.ndarray
    rows: np.ndarray
    rhs: np.ndarray
    equalities: int
    primal: np.ndarray
    multipliers: np.ndarray
    infeasible: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (B, n, m)."""
        return (*self.linear.shape, self.rhs.shape[1])

    def item(self, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return H, q, A, b of one item."""
        hessian = self.hessian[b if len(self.hessian) > 1 else 0]
        rows = self.rows[b if len(self.rows) > 1 else 0]
        return hessian, self.linear[b], rows, self.rhs[b]

    def program(self, free: frozenset[str] = frozenset("qb")) -> Program:
        """Write it as a program; the data named in ``free`` ("Q", "q", "A", "b") are parameters, the rest constants."""
        _, n, m = self.shape
        sizes = tuple({"Q": n * n, "q": n, "A": m * n, "b": m}[name] for name in "QqAb" if name in free)
        width = sum(sizes) + 1
        begin = 0

        def entries(name: str, constant: np.ndarray) -> AffineMap:
            nonlocal begin
            size = constant.size
            if name in free:
                matrix = sp.csr_array((np.ones(size), (np.arange(size), begin + np.arange(size))), shape=(size, width))
                begin += size
            else:
                place = (np.arange(size), np.full(size, width - 1))
                matrix = sp.csr_array((constant.ravel(), place), shape=(size, width))
            return AffineMap(matrix, sizes)

        grid = np.indices((n, n)).reshape(2, -1)
        quadratic = MatrixEntries((n, n), grid[0], grid[1], entries("Q", self.hessian[0]))
        linear = entries("q", self.linear[0])
        grid = np.indices((m, n)).reshape(2, -1)
        matrix = MatrixEntries((m, n), grid[0], grid[1], entries("A", self.rows[0]))
        rhs = entries("b", self.rhs[0])
        names = tuple(f"row {i}" for i in range(m))
        return Program(n, self.equalities, quadratic, linear, matrix, rhs, np.ones(n, dtype=bool), names)

    def parameters(self, free: frozenset[str] = frozenset("qb")) -> list[np.ndarray]:
        """Return the values of the parameters of :meth:`program`."""
        data = {"Q": self.hessian, "q": self.linear, "A": self.rows, "b": self.rhs}
        return [np.ascontiguousarray(data[name].reshape(len(data[name]), -1)) for name in "QqAb" if name in free]


def _hessian(rng: np.random.Generator, kind: str, count: int, n: int) -> np.ndarray:
    if kind == "identity":
        return np.broadcast_to(rng.choice([0.1, 1.0, 2.0]) * np.eye(n), (count, n, n)).copy()
    if kind == "diagonal":
        return np.stack([np.diag(rng.uniform(0.2, 3.0, n)) for _ in range(count)])
    root = rng.normal(size=(count, n, n))
    return root.transpose(0, 2, 1) @ root / n + 0.2 * np.eye(n)


def random_case(
    seed: int, *, batch: int = 3, per_item: bool | None = None, infeasible: bool = False, strict: bool = False
) -> Case:
    """Generate a case.

    Args:
        seed: everything else follows from it.
        batch: items.
        per_item: whether H and A differ between items; random by default.
        infeasible: make item 0 infeasible by two contradicting rows.
        strict: every active row has a multiplier of at least 0.1 and every other row a slack of at least 0.1, and
            active rows are independent (for finite differences).
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    count = batch if (rng.random() < 0.4 if per_item is None else per_item) else 1
    hessian = _hessian(rng, str(rng.choice(["identity", "diagonal", "dense"])), count, n)
    lattice = rng.random() < 0.5 and not strict  # small integers: degenerate vertices, dependent rows
    me = int(rng.integers(0, max(1, n // 2) + 1))
    mi = int(rng.integers(0, 2 * n + 1))

    def normals(k: int) -> np.ndarray:
        if lattice:
            return rng.integers(-1, 2, size=(count, k, n)).astype(float)
        return rng.normal(size=(count, k, n)) * (rng.random((1, k, n)) < rng.choice([0.4, 1.0]))

    equal, general = normals(me), normals(mi)
    parts = [general]
    if rng.random() < 0.6:  # bounds as singleton rows, one or both sides, scaled
        scale = rng.choice([1.0, 2.0, -1.0], size=n)
        unit = np.broadcast_to(np.diag(scale), (count, n, n))
        parts.append(unit)
        if rng.random() < 0.5:
            parts.append(-unit)
    if not strict:
        if mi and rng.random() < 0.3:  # duplicates, scaled duplicates, sums of two rows, empty rows
            parts.append(general[:, rng.integers(0, mi, 2)] * np.array([1.0, 3.0])[None, :, None])
            parts.append(general[:, :1] + general[:, -1:])
        if rng.random() < 0.3:
            parts.append(np.zeros((count, 1, n)))
        if me and rng.random() < 0.4:
            equal = np.concatenate([equal, equal[:, :1] * 2.0, equal.sum(axis=1, keepdims=True)], axis=1)
    me = equal.shape[1]
    inequalities = np.concatenate(parts, axis=1)
    mi = inequalities.shape[1]
    rows = np.concatenate([equal, inequalities], axis=1)

    primal = rng.integers(-2, 3, size=(batch, n)).astype(float) if lattice else rng.normal(size=(batch, n))
    multipliers = np.zeros((batch, me + mi))
    multipliers[:, :me] = rng.normal(size=(batch, me))
    slack = np.zeros((batch, me + mi))
    rank_left = max(n - me, 0)
    for b in range(batch):
        wanted = rng.random(mi) < rng.choice([0.1, 0.3, 0.6])
        if strict:
            normal = rows[b if count > 1 else 0]
            chosen: list[int] = []
            for i in np.flatnonzero(wanted)[:rank_left]:
                trial = np.concatenate([normal[:me], normal[me + np.array([*chosen, int(i)], dtype=int)]])
                if np.linalg.svd(trial, compute_uv=False).min() > 0.1:
                    chosen.append(int(i))
            wanted = np.zeros(mi, dtype=bool)
            wanted[chosen] = True
            multipliers[b, me:] = np.where(wanted, rng.uniform(0.1, 1.5, mi), 0.0)
            slack[b, me:] = np.where(wanted, 0.0, rng.uniform(0.1, 1.5, mi))
        else:
            weak = rng.random(mi) < 0.3
            multipliers[b, me:] = np.where(wanted & ~weak, rng.uniform(0.0, 1.5, mi), 0.0)
            slack[b, me:] = np.where(wanted, 0.0, rng.uniform(0.0, 1.5, mi))
    full_rows = np.broadcast_to(rows, (batch, *rows.shape[1:]))
    full_hessian = np.broadcast_to(hessian, (batch, n, n))
    rhs = np.einsum("bij,bj->bi", full_rows, primal) + slack
    linear = -np.einsum("bij,bj->bi", full_hessian, primal) - np.einsum("bij,bi->bj", full_rows, multipliers)
    bad = np.zeros(batch, dtype=bool)
    if infeasible:
        direction = rng.normal(size=(count, 1, n))
        rows = np.concatenate([rows, direction, -direction], axis=1)
        value = np.einsum("bij,bj->bi", np.broadcast_to(direction, (batch, 1, n)), primal)
        gap = np.ones((batch, 1))
        gap[0] = -0.5  # d'x <= v - 0.5 and -d'x <= -v
        rhs = np.concatenate([rhs, value + gap, -value + np.maximum(gap, 0.0)], axis=1)
        multipliers = np.concatenate([multipliers, np.zeros((batch, 2))], axis=1)
        bad[0] = True
    return Case(hessian, linear, rows, rhs, me, primal, multipliers, bad)


@dataclass
class SemidefiniteCase(Case):
    """A batch with a positive semidefinite Hessian: ``primal`` is one of the optima, ``multipliers`` one dual solution.

    ``unbounded`` (B,) marks items whose objective falls without end. A row has a positive entry in ``multipliers``, and
    then at least 0.1, when it is tight at every optimum.
    """

    unbounded: np.ndarray


def semidefinite_case(seed: int, *, batch: int = 3, failing: bool = True) -> SemidefiniteCase:
    """Generate a case: Q of any rank from 0 up, degenerate, redundant, with one or many optima.

    Args:
        seed: everything else follows from it.
        batch: items.
        failing: whether item 0 may be made infeasible or unbounded.
    """
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 11))
    count = batch if rng.random() < 0.3 else 1
    rank = int(rng.integers(0, n + 1)) if rng.random() < 0.7 else 0
    lattice = rng.random() < 0.5
    if lattice:
        root = rng.integers(-1, 2, size=(count, rank, n)).astype(float)
    else:
        root = rng.normal(size=(count, rank, n)) * (rng.random((1, rank, n)) < rng.choice([0.4, 1.0]))
    hessian = root.transpose(0, 2, 1) @ root
    if rng.random() < 0.3:  # diagonal, with zeros
        hessian = np.stack([np.diag(rng.uniform(0.2, 3.0, n) * (np.arange(n) < rank)) for _ in range(count)])
    me, mi = int(rng.integers(0, max(1, n // 2) + 1)), int(rng.integers(0, 3 * n + 1))

    def normals(k: int) -> np.ndarray:
        if lattice:
            return rng.integers(-1, 2, size=(count, k, n)).astype(float)
        return rng.normal(size=(count, k, n)) * (rng.random((1, k, n)) < rng.choice([0.4, 1.0]))

    parts = [normals(me), normals(mi)]
    if rng.random() < 0.6:  # bounds
        parts.append(np.broadcast_to(-np.eye(n), (count, n, n)))
    if rng.random() < 0.3:
        parts.append(np.broadcast_to(np.eye(n), (count, n, n)))
    if mi and rng.random() < 0.3:  # redundant rows
        parts.append(2.0 * parts[1][:, : 1 + mi // 3])
    rows = np.concatenate(parts, axis=1)
    mi = rows.shape[1] - me
    primal = rng.integers(-2, 3, size=(batch, n)).astype(float) if lattice else rng.normal(size=(batch, n))
    multipliers, slack = np.zeros((batch, me + mi)), np.zeros((batch, me + mi))
    multipliers[:, :me] = rng.normal(size=(batch, me))
    for b in range(batch):
        active = rng.random(mi) < rng.choice([0.1, 0.4, 0.8])
        pushing = active & (rng.random(mi) < rng.choice([0.2, 0.7, 1.0]))
        multipliers[b, me:] = np.where(pushing, rng.uniform(0.1, 1.5, mi), 0.0)
        slack[b, me:] = np.where(active, 0.0, rng.uniform(0.1, 1.5, mi))
    full_rows = np.broadcast_to(rows, (batch, *rows.shape[1:]))
    full_hessian = np.broadcast_to(hessian, (batch, n, n))
    rhs = np.einsum("bij,bj->bi", full_rows, primal) + slack
    linear = -np.einsum("bij,bj->bi", full_hessian, primal) - np.einsum("bij,bi->bj", full_rows, multipliers)
    infeasible, unbounded = np.zeros(batch, dtype=bool), np.zeros(batch, dtype=bool)
    fate = rng.random() if failing else 1.0
    if fate < 0.15:
        direction = rng.normal(size=(count, 1, n))
        value = np.einsum("bij,bj->bi", np.broadcast_to(direction, (batch, 1, n)), primal)
        gap = np.ones((batch, 1))
        gap[0] = -0.5  # d'x <= v - 0.5 and -d'x <= -v
        rows = np.concatenate([rows, direction, -direction], axis=1)
        rhs = np.concatenate([rhs, value + gap, -value + np.maximum(gap, 0.0)], axis=1)
        multipliers = np.concatenate([multipliers, np.zeros((batch, 2))], axis=1)
        infeasible[0] = True
    elif fate < 0.3:  # one more variable, which only relaxes rows and in item 0 is paid for
        column = -np.abs(rng.normal(size=(count, mi))) * (rng.random((1, mi)) < 0.5)
        grown = np.zeros((count, me + mi + 1, n + 1))
        grown[:, : me + mi, :n], grown[:, me:-1, n], grown[:, -1, n] = rows, column, -1.0
        rows = grown
        larger = np.zeros((count, n + 1, n + 1))
        larger[:, :n, :n] = hessian
        hessian = larger
        cost = np.ones((batch, 1))
        cost -= np.einsum("bi,bi->b", multipliers[:, me:], np.broadcast_to(column, (batch, mi)))[:, None]
        primal = np.concatenate([primal, np.zeros((batch, 1))], axis=1)
        # The last row -t <= 0 has multiplier 1 where t has its fair price.
        multipliers = np.concatenate([multipliers, np.ones((batch, 1))], axis=1)
        cost[0] = -1.0
        rhs = np.concatenate([rhs, np.zeros((batch, 1))], axis=1)
        linear = np.concatenate([linear, cost], axis=1)
        unbounded[0] = True
    return SemidefiniteCase(hessian, linear, rows, rhs, me, primal, multipliers, infeasible, unbounded)
