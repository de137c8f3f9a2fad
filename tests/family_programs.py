"""Random programs made of named polyhedra, spelled at random: what detection has to see through.

A program is a set of independent blocks (or blocks tied together by a further row: a near-miss). Variables and rows are
permuted, rows scaled, duplicated or weakened; the linear term and some right-hand sides are parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import scipy.sparse as sp

from hsbackend.program import AffineMap, MatrixEntries, Program

KINDS = ("box", "free", "hyperplane", "halfspace", "simplex", "capped", "slab", "budget", "l1", "monotone", "chain",
         "transport", "birkhoff", "general")  # fmt: skip


@dataclass
class _Row:
    entries: dict[int, float]
    rhs: np.ndarray  # (B,)
    equality: bool = False
    varies: bool = False


@dataclass
class _Draft:
    """Blocks added so far; variables are numbered as they come."""

    rng: np.random.Generator
    batch: int
    integers: bool
    curvature: list[float] = field(default_factory=list)
    inside: list[np.ndarray] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)
    generic: list[int] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    pairs: list[tuple[int, int, float]] = field(default_factory=list)

    def numbers(self, *shape: int) -> np.ndarray:
        """Draw from the normal distribution, or small integers: points on faces of faces."""
        drawn = self.rng.normal(size=shape)
        return np.round(2 * drawn) / 2 if self.integers else drawn

    def variables(self, inside: np.ndarray, curved: bool = True) -> list[int]:
        """Add variables with a feasible value (B, n)."""
        first = len(self.curvature)
        n = inside.shape[1]
        same = self.rng.random() < 0.5
        weights = np.full(n, self.rng.choice([1.0, 2.0, 0.5])) if same else self.rng.uniform(0.3, 3.0, n)
        self.curvature.extend(weights if curved else np.zeros(n))
        self.inside.extend(inside.T)
        new = list(range(first, first + n))
        if not curved:
            self.hidden.extend(new)
        return new

    def value(self, entries: dict[int, float]) -> np.ndarray:
        return sum((a * self.inside[j] for j, a in entries.items()), np.zeros(self.batch))

    def row(self, entries: dict[int, float], slack: float = 0.0, equality: bool = False, rhs: object = None,
            varies: bool | None = None) -> None:  # fmt: skip
        """Add ``entries'x <= rhs``; by default the right-hand side leaves the feasible point this much slack."""
        values = self.value(entries) + slack if rhs is None else np.broadcast_to(np.asarray(rhs, float), (self.batch,))
        scale = self.rng.choice([1.0, 1.0, 2.0, 0.5, -1.0 if equality else 4.0])
        spelled = {j: scale * a for j, a in entries.items()}
        moves = bool(np.ptp(values)) or rhs is None if varies is None else varies
        self.rows.append(_Row(spelled, scale * values, equality, moves))
        if self.rng.random() < 0.1:  # redundant: the same again, or weaker
            again = 2.0 * scale
            weaker = 0.0 if equality else float(self.rng.choice([0.0, 0.7]))
            self.rows.append(_Row({j: 2.0 * a for j, a in spelled.items()}, again * values + weaker, equality, moves))

    def bound(self, variables: list[int], lower: object = None, upper: object = None) -> None:
        for j in variables:
            if lower is not None:
                self.row({j: -1.0}, rhs=-np.asarray(lower, float))
            if upper is not None:
                self.row({j: 1.0}, rhs=upper)


def _add(draft: _Draft, kind: str, n: int) -> None:
    rng, batch = draft.rng, draft.batch
    slack = float(rng.choice([0.0, 0.3]))
    if kind == "box":
        x = draft.variables(rng.uniform(0.0, 1.0, (batch, n)))
        draft.bound(x, 0.0, 1.0)
    elif kind == "free":
        draft.variables(draft.numbers(batch, n))
    elif kind in ("hyperplane", "halfspace"):
        x = draft.variables(draft.numbers(batch, n))
        draft.row(dict(zip(x, rng.normal(size=n), strict=True)), slack, kind == "hyperplane")
    elif kind in ("simplex", "capped"):
        x = draft.variables(rng.dirichlet(np.ones(n), batch) * 0.9)
        draft.bound(x, 0.0, 1.0 if kind == "capped" else None)
        draft.row(dict.fromkeys(x, 1.0), equality=True)
    elif kind == "slab":
        x = draft.variables(rng.uniform(0.0, 1.0, (batch, n)))
        draft.bound(x, 0.0)
        draft.row(dict.fromkeys(x, 1.0), 0.2)
        draft.row(dict.fromkeys(x, -1.0), 0.2)
    elif kind == "budget":
        x = draft.variables(rng.uniform(-1.0, 1.0, (batch, n)))
        draft.bound(x, -1.0 if rng.random() < 0.7 else None, 1.0 if rng.random() < 0.7 else None)
        draft.row(dict(zip(x, rng.normal(size=n), strict=True)), slack, rng.random() < 0.5)
    elif kind == "l1":
        centre = draft.numbers(batch, n) if rng.random() < 0.5 else np.zeros((batch, n))
        x = draft.variables(centre.copy())
        # Inside the ball at x_j = y_j the lifted form holds x_j by its two rows, the ball itself does not.
        draft.generic.extend(x)
        t = draft.variables(np.full((batch, n), 0.1), curved=False)
        k = np.ones(n) if rng.random() < 0.5 else rng.choice([0.5, 1.0, 2.0], n)
        for i in range(n):
            draft.rows.append(_Row({x[i]: 1.0, t[i]: -k[i]}, centre[:, i], False, bool(centre.any())))
            draft.rows.append(_Row({x[i]: -2.0, t[i]: -2.0 * k[i]}, -2.0 * centre[:, i], False, bool(centre.any())))
            if centre.any():  # one parameter in both rows, or they would not be opposite for every value
                draft.pairs.append((len(draft.rows) - 2, len(draft.rows) - 1, -2.0))
        weights = np.ones(n) if rng.random() < 0.5 else rng.uniform(0.5, 2.0, n)
        draft.rows.append(_Row(dict(zip(t, weights, strict=True)), rng.uniform(0.2, 2.0, batch), False, True))
    elif kind in ("monotone", "chain"):
        x = draft.variables(np.sort(rng.uniform(0.0, 1.0, (batch, n)), axis=1))
        order = x
        if rng.random() < 0.5:
            order = x[::-1]
            draft.inside[x[0] :] = draft.inside[x[0] :][::-1]
        for below, above in pairwise(order):
            draft.row({below: 1.0, above: -1.0}, rhs=0.0 if kind == "monotone" else 0.1)
        if kind == "monotone" and rng.random() < 0.6:
            draft.bound(x, 0.0, 1.0 if rng.random() < 0.5 else None)
        elif rng.random() < 0.5:
            draft.bound([order[0]], 0.0)
            draft.bound([order[-1]], None, 1.0)
    elif kind in ("transport", "birkhoff"):
        k1 = int(rng.integers(2, 4))
        k2 = k1 if kind == "birkhoff" else int(rng.integers(2, 5))
        if kind == "birkhoff":
            inside = np.full((batch, k1, k2), 1.0 / k1)
        else:
            inside = rng.uniform(0.0, 1.0, (batch, k1, k2)) * (rng.random((batch, k1, k2)) < 0.6)
        x = np.array(draft.variables(inside.reshape(batch, -1))).reshape(k1, k2)
        draft.bound(list(x.ravel()), 0.0, 1.0 if kind == "birkhoff" and rng.random() < 0.3 else None)
        for line in (*x, *x.T):
            draft.row(dict.fromkeys(line, 1.0), equality=True, rhs=1.0 if kind == "birkhoff" else None)
    else:
        x = draft.variables(rng.uniform(0.0, 1.0, (batch, n)))
        draft.bound(x[: n // 2 + 1], 0.0)
        for _ in range(2):
            draft.row(dict(zip(x, rng.normal(size=n), strict=True)), slack)


@dataclass(frozen=True)
class FamilyCase:
    """A program of blocks and parameter values of its batch."""

    program: Program
    parameters: list[np.ndarray]
    kinds: tuple[str, ...]
    tied: bool


def family_case(seed: int, batch: int = 4) -> FamilyCase:
    """Draw a program and a batch of parameters; about one item in fifteen is made infeasible."""
    rng = np.random.default_rng(seed)
    draft = _Draft(rng, batch, bool(rng.random() < 0.3))
    kinds: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        kind = str(rng.choice(KINDS))
        n = int(rng.integers(2, 6))
        for _ in range(int(rng.choice([1, 1, 2]))):
            kinds.append(kind)
            _add(draft, kind, n)
    tied = bool(rng.random() < 0.2)
    if tied:
        visible = [j for j in range(len(draft.curvature)) if j not in draft.hidden]
        picked = rng.choice(visible, size=min(3, len(visible)), replace=False)
        draft.row({int(j): float(a) for j, a in zip(picked, rng.normal(size=len(picked)), strict=True)}, 0.05)
    return FamilyCase(*_assemble(draft), tuple(kinds), tied)


def _assemble(draft: _Draft) -> tuple[Program, list[np.ndarray]]:
    rng, batch = draft.rng, draft.batch
    n, m = len(draft.curvature), len(draft.rows)
    place = rng.permutation(n)
    equal = [i for i, row in enumerate(draft.rows) if row.equality]
    other = [i for i, row in enumerate(draft.rows) if not row.equality]
    order = [*rng.permutation(equal).astype(int), *rng.permutation(other).astype(int)]
    position = {index: new for new, index in enumerate(order)}

    linear = -3.0 * draft.numbers(batch, n)
    linear[:, draft.generic] = -3.0 * rng.normal(size=(batch, len(draft.generic)))
    linear[:, draft.hidden] = 0.0
    shared = {second: (first, factor) for first, second, factor in draft.pairs}
    moving = [i for i in range(m) if draft.rows[i].varies and i not in shared]
    slot = {index: k for k, index in enumerate(moving)}
    values = np.array([draft.rows[i].rhs for i in moving]).reshape(len(moving), batch).T
    for item in np.flatnonzero(rng.random(batch) < 0.07):
        if len(moving):
            values[item, rng.integers(len(moving))] -= 50.0
    curved = [j for j in range(n) if j not in draft.hidden]
    sizes = (len(curved), len(moving))
    width = sum(sizes) + 1
    into = sp.lil_array((n, width))
    for k, j in enumerate(curved):
        into[place[j], k] = 1.0
    rhs = sp.lil_array((m, width))
    rows, columns, data = [], [], []
    for index, row in enumerate(draft.rows):
        at = position[index]
        for j, a in row.entries.items():
            rows.append(at)
            columns.append(place[j])
            data.append(a)
        if index in slot:
            rhs[at, len(curved) + slot[index]] = 1.0
        elif index in shared:
            first, factor = shared[index]
            rhs[at, len(curved) + slot[first]] = factor
        elif row.rhs[0]:
            rhs[at, width - 1] = row.rhs[0]

    def constant(numbers: np.ndarray) -> AffineMap:
        at = (np.arange(len(numbers)), np.full(len(numbers), width - 1))
        return AffineMap(sp.csr_array((numbers, at), shape=(len(numbers), width)), sizes)

    diagonal = np.zeros(n)
    diagonal[place] = draft.curvature
    at = np.flatnonzero(diagonal)
    outputs = np.ones(n, dtype=bool)
    outputs[place[draft.hidden]] = False
    program = Program(
        n, len(equal), MatrixEntries((n, n), at, at, constant(diagonal[at])), AffineMap(into, sizes),
        MatrixEntries((m, n), np.array(rows, int), np.array(columns, int), constant(np.array(data))),
        AffineMap(rhs, sizes), outputs, tuple(f"row {i}" for i in range(m)),
    )  # fmt: skip
    return program, [np.ascontiguousarray(linear[:, curved]), np.ascontiguousarray(values)]
