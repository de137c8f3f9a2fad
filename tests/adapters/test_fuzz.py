"""Random cvxpy programs, put together from the spellings of the table: both layers against the oracle.

The seed is in the test's id. Draws the oracle cannot vouch for (degenerate, infeasible, multipliers not unique) are
replaced by the next seed of the same chain, so that every test compares something.
"""

import cvxpy as cp
import numpy as np
import pytest
from layer_harness import LAYERS, assert_close, make_layer, run

from oracles import OracleError, TightSolver

BATCH = 3
OBJECTIVES = ("distance", "distance", "half", "weighted", "metric", "matrix", "quad_form", "ridge")
VARIABLES = ("vector", "vector", "matrix", "symmetric", "nonneg", "nonpos", "bounds", "upper", "scalar")
CONSTRAINTS = (
    *("rows", "rows_parameter", "reversed", "equality", "equality_matrix", "bound", "bounds_parameter", "sum", "empty"),
    *("rows_matrix", "norm1", "norm_inf", "max", "abs", "twice"),
)


class _Random:
    """Draws parameters (batched or shared by the toss of a coin) and everything else from one seed."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.parameters, self.values = [], []

    def parameter(self, shape, scale=1.0, shift=0.0, nonneg=False):
        parameter = cp.Parameter(shape, nonneg=nonneg)
        batch = (BATCH,) if self.rng.random() < 0.6 else ()
        value = scale * self.rng.standard_normal((*batch, *shape)) + shift
        self.parameters.append(parameter)
        self.values.append(np.abs(value) + 0.3 if nonneg else value)
        return parameter

    def variable(self, n):
        kind = self.rng.choice(VARIABLES)
        if kind == "vector":
            return cp.Variable(n)
        if kind == "matrix":
            return cp.Variable((2, int(self.rng.integers(1, 4))))
        if kind == "symmetric":
            return cp.Variable((3, 3), symmetric=True)
        if kind == "nonneg":
            return cp.Variable(n, nonneg=True)
        if kind == "nonpos":
            return cp.Variable((n, 2), nonpos=True)
        if kind == "bounds":
            return cp.Variable(n, bounds=[-0.5, self.rng.uniform(0, 1, n)])
        if kind == "upper":
            return cp.Variable(n, bounds=[None, 0.3])
        return cp.Variable()

    def objective(self, x):
        rng, flat, size = self.rng, cp.vec(x, order="F"), x.size
        kind = rng.choice(OBJECTIVES)
        if kind == "distance":
            return rng.choice([0.5, 1.0, 3.0]) * cp.sum_squares(x - self.parameter(x.shape))
        if kind == "half":
            return 0.5 * cp.sum_squares(x) - cp.sum(cp.multiply(self.parameter(x.shape), x))
        if kind == "weighted":
            return cp.sum(cp.multiply(rng.uniform(0.3, 2.0, x.shape), cp.square(x - self.parameter(x.shape))))
        if kind == "metric":
            matrix = rng.standard_normal((size + 1, size))
            return cp.sum_squares(matrix @ flat - self.parameter((size + 1,))) + 0.1 * cp.sum_squares(x)
        if kind == "matrix":
            return cp.sum_squares(self.parameter((size + 2, size)) @ flat - self.parameter((size + 2,)))
        if kind == "quad_form":
            root = rng.standard_normal((size, size))
            linear = cp.sum(cp.multiply(self.parameter(x.shape), x))
            return cp.quad_form(flat, root @ root.T / size + 0.3 * np.eye(size)) + linear
        weight = self.parameter((), nonneg=True)
        return weight * cp.sum_squares(x) + cp.sum(cp.multiply(self.parameter(x.shape), x))

    def constraints(self, z, before):
        """Rows that the point 0 satisfies with room, except for the equalities, which are small."""
        rng, n = self.rng, z.size
        m = int(rng.integers(1, 4))
        G = rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.7)
        kind = rng.choice(CONSTRAINTS)
        if kind == "twice":
            return [c.copy() for c in before[-1:] if not isinstance(c, cp.constraints.Zero)]
        if kind in ("equality", "equality_matrix") and n < 3:
            return []
        if kind == "equality_matrix":
            return [self.parameter((1, n)) @ z == 0.1 * self.parameter((1,))]
        if kind == "bounds_parameter":
            return [z >= self.parameter((n,), 0.1, -0.9), z[0] <= 0.4]
        if kind == "rows_parameter":
            return [G @ z <= self.parameter((m,), 0.1, 1.2)]
        if kind == "reversed":
            return [self.parameter((m,), 0.1, -1.2) <= 2 * (G @ z)]
        if kind == "rows_matrix":
            return [self.parameter((m, n)) @ z <= 1.0]
        return [
            {
                "rows": G @ z <= rng.uniform(0.1, 1.0, m) + 1.0,
                "equality": G[:1] @ z == 0.05,
                "bound": rng.choice([1.0, -1.0, 2.0]) * z <= 0.8,
                "norm1": cp.norm1(z) <= 0.3 * n + 0.4,
                "norm_inf": cp.norm_inf(z) <= 0.8,
                "max": cp.max(z) <= 0.7,
                "abs": cp.abs(z) <= 0.9,
                "sum": cp.sum(z) <= 0.3,
                "empty": np.zeros((1, n)) @ z <= 1.0,
            }[kind]
        ]


def _program(seed, with_duals):
    """Build a program; the same seed gives the same program, with fresh cvxpy objects."""
    draw = _Random(seed)
    rng = draw.rng
    variables = [draw.variable(int(rng.integers(1, 6))) for _ in range(rng.integers(1, 3))]
    objective = sum(draw.objective(x) for x in variables)
    z = cp.hstack([cp.vec(x, order="F") for x in variables])
    constraints = []
    for _ in range(rng.integers(0, 5)):
        constraints += draw.constraints(z, constraints)
    sense = cp.Minimize(objective) if rng.random() < 0.7 else cp.Maximize(-objective)
    chosen = [c.dual_variables[0] for c in constraints if rng.random() < 0.4]
    order = rng.permutation(len(draw.parameters))
    problem = cp.Problem(sense, constraints)
    returned = [*variables[::-1], *(chosen if with_duals else [])]
    return problem, [draw.parameters[i] for i in order], returned, [draw.values[i] for i in order]


def _judged(seed):
    """Return (with duals or without, items) for the first way the oracle can vouch for, or None."""
    for with_duals in (True, False):
        problem, parameters, returned, values = _program(seed, with_duals)
        count = BATCH if any(v.ndim > p.ndim for v, p in zip(values, parameters, strict=True)) else 1
        solver = TightSolver(problem, parameters, returned)
        try:
            return with_duals, [
                solver.solve([v[i] if v.ndim > p.ndim else v for v, p in zip(values, parameters, strict=True)])
                for i in range(count)
            ]
        except OracleError:
            continue
    return None


def _check(seed):
    while (judged := _judged(seed)) is None:
        seed += 1_000_000
    with_duals, items = judged
    for kind in LAYERS:
        problem, parameters, returned, values = _program(seed, with_duals)
        rng = np.random.default_rng(seed)
        batched = [v.ndim > p.ndim for v, p in zip(values, parameters, strict=True)]
        expected = [np.stack(column) for column in zip(*(item.outputs for item in items), strict=True)]
        cotangents = [rng.standard_normal(value.shape) for value in expected]
        per_item = [item.vjp([c[i] for c in cotangents]) for i, item in enumerate(items)]
        gradients = [
            np.stack(g) if is_batched else sum(g)
            for g, is_batched in zip(zip(*per_item, strict=True), batched, strict=True)
        ]
        if not any(batched):
            expected, cotangents = [e[0] for e in expected], [c[0] for c in cotangents]
        layer = make_layer(kind, problem, parameters, returned)
        report = layer.explain() if kind == "ours" else layer.ctx.solver.explain()
        assert report.polyhedral, f"seed {seed}: {report}"
        outputs, found = run(layer, values, cotangents)
        for out, value in zip(outputs, expected, strict=True):
            assert_close(out, value, 1e-8, 0.1, f"seed {seed}, {kind}: {problem}")
        for gradient, value in zip(found, gradients, strict=True):
            assert_close(gradient, value, 1e-6, 0.1, f"seed {seed}, {kind}: {problem}")


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_ten_random_programs(seed):
    for offset in range(10):
        _check(seed + offset)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1_000, 3_000, 50))
def test_fifty_random_programs(seed):
    for offset in range(50):
        _check(seed + offset)
