"""Families of quadratic and linear programs whose instances are published as formulas.

Every instance is written as

    minimise   1/2 x'Px + q'x
    subject to low <= A x <= high,   lower <= x <= upper

with infinite limits allowed and equalities as rows with low = high. `size` is about the number of variables of this
program, auxiliary ones included; an instance is drawn from (family, size, number), so it is the same everywhere.

Sources:
    OSQP: Stellato, Banjac, Goulart, Bemporad, Boyd, "OSQP: an operator splitting solver for quadratic programs",
        Mathematical Programming Computation 12 (2020), appendix A, and the problem classes of its published benchmark.
    CUTE: Bongartz, Conn, Gould, Toint, "CUTE: constrained and unconstrained testing environment", ACM TOMS 21 (1995);
        the CVXQP problems (Gould, 1995) are also in Maros, Meszaros, "A repository of convex quadratic programming
        problems", Optimization Methods and Software 11 (1999).

Where a formula fixes more data points per feature than a small size has room for, the number of features is at least
two and the data points are what is left; every docstring says so.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIZES = (10, 20, 50, 100, 200, 500, 1_000, 2_000)
# Few large ones: one of them takes the slower contestants as long as all the small ones together.
INSTANCES = {10: 5, 20: 5, 50: 5, 100: 5, 200: 5, 500: 2, 1_000: 1, 2_000: 1}
# Nonzeros of the random matrices of the OSQP paper.
_DENSITY = 0.15


@dataclass(frozen=True)
class QPInstance:
    """One program in two-sided form.

    Attributes:
        P: (n, n), symmetric positive semidefinite, both triangles stored, sorted; nothing stored if it is linear.
        q: (n,).
        A: (m, n), sorted.
        low: (m,), -inf for none.
        high: (m,), +inf for none.
        lower: (n,), -inf for none.
        upper: (n,), +inf for none.
    """

    P: sp.csc_matrix
    q: Array
    A: sp.csc_matrix
    low: Array
    high: Array
    lower: Array
    upper: Array

    def __post_init__(self) -> None:
        # Several solvers take the row indices of a column to be sorted; PIQP returns other points where they are not.
        self.P.sort_indices()
        self.A.sort_indices()

    @property
    def is_linear(self) -> bool:
        """Whether there is no quadratic term."""
        return self.P.nnz == 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and variables."""
        return self.low.size, self.q.size


@dataclass(frozen=True)
class Family:
    """A kind of program.

    Attributes:
        name: used on the command line and in the tables.
        make: `make(size, rng, number)`; `number` counts instances from 0 and only families without randomness use it.
        largest: largest size; larger ones would have too many rows.
        instances: most instances per size, for families that have only so many.
        is_linear: whether its programs are linear.
    """

    name: str
    make: Callable[[int, np.random.Generator, int], QPInstance]
    largest: int = SIZES[-1]
    instances: int = 5
    is_linear: bool = False

    @property
    def description(self) -> str:
        """What it is: the first paragraph of the generator's docstring."""
        return " ".join((self.make.__doc__ or "").split("\n\n")[0].split())


@dataclass(frozen=True, order=True)
class Key:
    """What an instance is drawn from."""

    size: int
    family: str
    number: int

    def make(self) -> QPInstance:
        """Draw the instance; the seed is a checksum of the key, the same on every machine."""
        seed = zlib.crc32(f"{self.family}/{self.size}/{self.number}".encode())
        return FAMILIES[self.family].make(self.size, np.random.default_rng(seed), self.number)


def keys_of(families: list[str], sizes: list[int]) -> list[Key]:
    """Return all instances, from small to large, so that a run that is cut short has all the small ones."""
    return [
        Key(size, name, number)
        for size in sorted(sizes)
        for name in families
        if size <= FAMILIES[name].largest
        for number in range(min(INSTANCES.get(size, 5), FAMILIES[name].instances))
    ]


def _normal(rng: np.random.Generator, rows: int, columns: int, density: float = _DENSITY) -> sp.csc_matrix:
    """Return a sparse matrix with standard normal entries at `density` of the places, at one of them at least."""
    count = max(1, round(density * rows * columns))
    places = rng.choice(rows * columns, count, replace=False)
    values = rng.standard_normal(count)
    return sp.csc_matrix((values, (places // columns, places % columns)), shape=(rows, columns))


def _stack(blocks: list[list[sp.spmatrix | None]]) -> sp.csc_matrix:
    return sp.csc_matrix(sp.bmat(blocks, format="csc"))


def _random_hessian(rng: np.random.Generator, n: int) -> sp.csc_matrix:
    """Return M M' + 0.01 I with M from `_normal`."""
    m = _normal(rng, n, n)
    return sp.csc_matrix(m @ m.T + 0.01 * sp.eye(n))


def _free(n: int) -> tuple[Array, Array]:
    return np.full(n, -np.inf), np.full(n, np.inf)


def random_qp(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Random QP: P = M M' + 0.01 I, 10 n inequality rows A x <= A v + d.

    M (n, n) and A (10 n, n) have 15 % normal entries, q and v are normal, d ~ U(0, 1). Source: OSQP, A.1.
    """
    n, m = size, 10 * size
    quadratic, q, rows = _random_hessian(rng, n), rng.standard_normal(n), _normal(rng, m, n)
    high = rows @ rng.standard_normal(n) + rng.random(m)
    return QPInstance(quadratic, q, rows, np.full(m, -np.inf), high, *_free(n))


def equality_qp(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Equality-constrained QP: P = M M' + 0.01 I, n/2 rows A x = A v.

    M (n, n) and A (n/2, n) have 15 % normal entries, q and v are normal. Source: OSQP, A.2.
    """
    n, m = size, size // 2
    quadratic, q, rows = _random_hessian(rng, n), rng.standard_normal(n), _normal(rng, m, n)
    right = rows @ rng.standard_normal(n)
    return QPInstance(quadratic, q, rows, right, right.copy(), *_free(n))


def portfolio(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Portfolio with a factor model: minimise x'Dx + y'y - mu'x s.t. y = F'x, 1'x = 1, 0 <= x <= 1.

    k factors y and 100 k assets x, one factor and size - 1 assets at the least; F has 50 % normal entries, mu is
    normal, D diagonal ~ U(0, sqrt(k)). The upper bound is that of the published code. Source: OSQP, A.4.
    """
    k = max(1, size // 101)
    n = size - k
    factors = _normal(rng, n, k, 0.5)
    specific = rng.random(n) * np.sqrt(k)
    q = np.concatenate([-rng.standard_normal(n), np.zeros(k)])
    quadratic = sp.csc_matrix(sp.diags(np.concatenate([2.0 * specific, np.full(k, 2.0)])))
    rows = _stack([[sp.csc_matrix(np.ones((1, n))), None], [factors.T, -sp.eye(k)]])
    right = np.concatenate([[1.0], np.zeros(k)])
    lower, upper = np.concatenate([np.zeros(n), np.full(k, -np.inf)]), np.concatenate([np.ones(n), np.full(k, np.inf)])
    return QPInstance(quadratic, q, rows, right, right.copy(), lower, upper)


def lasso(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Lasso: minimise y'y + lambda 1't s.t. y = D x - b, -t <= x <= t.

    n features and 100 n data points (at least two features, the data points are what is left); D has 15 % normal
    entries, b = D v + e, v_i is 0 or N(0, 1/n) with probability 1/2 each, e normal, lambda = |D'b|_inf / 5.
    Source: OSQP, A.5.
    """
    n = max(2, size // 102)
    m = size - 2 * n
    data = _normal(rng, m, n)
    truth = np.where(rng.random(n) < 0.5, 0.0, rng.standard_normal(n) / np.sqrt(n))
    b = data @ truth + rng.standard_normal(m)
    weight = np.abs(data.T @ b).max() / 5.0
    quadratic = sp.csc_matrix(sp.diags(np.concatenate([np.zeros(n), np.full(m, 2.0), np.zeros(n)])))
    quadratic.eliminate_zeros()
    q = np.concatenate([np.zeros(n + m), np.full(n, weight)])
    eye = sp.eye(n)
    rows = _stack([[data, -sp.eye(m), None], [eye, None, -eye], [eye, None, eye]])
    low = np.concatenate([b, np.full(n, -np.inf), np.zeros(n)])
    high = np.concatenate([b, np.zeros(n), np.full(n, np.inf)])
    return QPInstance(quadratic, q, rows, low, high, *_free(2 * n + m))


def svm(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Support vector machine: minimise x'x / 2 + 1't / 2 s.t. t >= diag(b) D x + 1, t >= 0.

    n features and 100 n data points (at least two features, the data points are what is left), b = +1 for one half of
    the points, -1 for the other; D has 15 % entries ~ N(+1/n, 1/n) or N(-1/n, 1/n). Source: OSQP, A.7; the weights are
    those of the published code.
    """
    n = max(2, size // 101)
    m = size - n
    sign = np.where(np.arange(m) < m // 2, 1.0, -1.0)
    data = _normal(rng, m, n)
    pattern = sp.csc_matrix(data != 0.0).astype(np.float64)
    data = data / np.sqrt(n) + sp.diags(sign / n) @ pattern
    quadratic = sp.csc_matrix((np.ones(n), (np.arange(n), np.arange(n))), shape=(n + m, n + m))
    q = np.concatenate([np.zeros(n), np.full(m, 0.5)])
    rows = _stack([[sp.diags(sign) @ data, -sp.eye(m)]])
    lower = np.concatenate([np.full(n, -np.inf), np.zeros(m)])
    return QPInstance(quadratic, q, rows, np.full(m, -np.inf), -np.ones(m), lower, np.full(n + m, np.inf))


def huber(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Huber fitting: minimise u'u / 2 + 1'(r + s) s.t. D x - b - u = r - s, r >= 0, s >= 0.

    n features and 100 n data points (at least one feature, the data points are what is left); D has 15 % normal
    entries, b = D v + e, v ~ N(0, 1/n), e_i ~ N(0, 1/4) with probability 0.95, else U(0, 10). Source: OSQP, A.6.
    """
    n = max(1, size // 301)
    m = (size - n) // 3
    data = _normal(rng, m, n)
    noise = np.where(rng.random(m) < 0.95, 0.5 * rng.standard_normal(m), 10.0 * rng.random(m))
    b = data @ (rng.standard_normal(n) / np.sqrt(n)) + noise
    eye = sp.eye(m)
    total = n + 3 * m
    quadratic = sp.csc_matrix((np.ones(m), (n + np.arange(m), n + np.arange(m))), shape=(total, total))
    q = np.concatenate([np.zeros(n + m), np.ones(2 * m)])
    rows = _stack([[data, -eye, -eye, eye]])
    lower = np.concatenate([np.full(n + m, -np.inf), np.zeros(2 * m)])
    return QPInstance(quadratic, q, rows, b, b.copy(), lower, np.full(total, np.inf))


def control(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Optimal control: minimise x_T'Q_T x_T + sum_t (x_t'Q x_t + u_t'R u_t) s.t. x_t+1 = F x_t + B u_t, box limits.

    nx states, nx / 2 inputs, T = 10 steps, so 16 nx variables (below size 50 two states, one input and fewer steps).
    F = I + 0.1 N with N normal and eigenvalues of modulus above 0.99 divided by their modulus + 0.01, B normal,
    R = 0.1 I, Q diagonal with 70 % entries ~ U(0, 1), Q_T the solution of the discrete Riccati equation,
    |u| <= ubar ~ U(0, 1), |x| <= xbar ~ U(1, 2), x_0 ~ U(-xbar / 2, xbar / 2). Ranges are those of the published code.
    Should the limits exclude the draw, x_0 is halved until u = 0 is feasible. Source: OSQP, A.3.
    """
    nx, nu, steps = (2, 1, max(1, (size - 2) // 3)) if size < 50 else (max(2, round(size / 16)), 0, 10)
    nu = nu or nx // 2
    dynamics = _contracted(np.eye(nx) + 0.1 * rng.standard_normal((nx, nx)))
    inputs = rng.standard_normal((nx, nu))
    q_diagonal = np.where(rng.random(nx) < 0.7, rng.random(nx), 0.0)
    r = 0.1 * np.eye(nu)
    terminal = scipy.linalg.solve_discrete_are(dynamics, inputs, np.diag(q_diagonal), r)
    terminal = 0.5 * (terminal + terminal.T)
    u_limit, x_limit = rng.random(nu), 1.0 + rng.random(nx)
    start = (rng.random(nx) - 0.5) * x_limit
    while not _stays_inside(dynamics, start, x_limit, steps):
        start = 0.5 * start
    quadratic = 2.0 * sp.csc_matrix(
        sp.block_diag([sp.kron(sp.eye(steps), sp.diags(q_diagonal)), terminal, sp.kron(sp.eye(steps), r)], format="csc")
    )
    quadratic.eliminate_zeros()
    states = sp.kron(sp.eye(steps + 1), -sp.eye(nx)) + sp.kron(sp.eye(steps + 1, k=-1), dynamics)
    moves = sp.kron(sp.vstack([sp.csc_matrix((1, steps)), sp.eye(steps)]), inputs)
    rows = _stack([[states, moves]])
    right = np.concatenate([-start, np.zeros(steps * nx)])
    upper = np.concatenate([np.tile(x_limit, steps + 1), np.tile(u_limit, steps)])
    return QPInstance(quadratic, np.zeros(upper.size), rows, right, right.copy(), -upper, upper)


def _contracted(dynamics: Array) -> Array:
    """Divide eigenvalues of modulus above 0.99 by their modulus + 0.01."""
    values, vectors = np.linalg.eig(dynamics)
    modulus = np.abs(values)
    values = np.where(modulus < 0.99, values, values / (modulus + 0.01))
    return np.real(vectors @ np.diag(values) @ np.linalg.inv(vectors))


def _stays_inside(dynamics: Array, start: Array, limit: Array, steps: int) -> bool:
    x = start
    for _ in range(steps):
        x = dynamics @ x
        if (np.abs(x) > limit).any():
            return False
    return True


def cvxqp(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """CVXQP1, 2 and 3 of CUTE: minimise 1/2 sum_i i (x_i + x_j(2) + x_j(3))^2 s.t. 0.1 <= x <= 10 and rows below.

    Rows x_i + 2 x_j(4) + 3 x_j(5) = 6 for i = 1..m with j(k) = mod(k i - 1, n) + 1; m = n/2, n/4 and 3n/4 in the three
    problems, which are the three instances. Nothing is random. Source: CUTE.
    """
    n = size
    m = int(n * (0.5, 0.25, 0.75)[number])
    i = np.arange(1, n + 1)

    def places(factor: int, count: int) -> NDArray[np.intp]:
        return (factor * i[:count] - 1) % n

    def matrix(count: int, terms: tuple[tuple[int, float], ...]) -> sp.csc_matrix:
        # Places that coincide are summed, as in the original.
        columns = np.concatenate([places(factor, count) for factor, _ in terms])
        values = np.concatenate([np.full(count, value) for _, value in terms])
        return sp.csc_matrix((values, (np.tile(np.arange(count), len(terms)), columns)), shape=(count, n))

    squares = matrix(n, ((1, 1.0), (2, 1.0), (3, 1.0)))
    quadratic = sp.csc_matrix(squares.T @ sp.diags(i.astype(np.float64)) @ squares)
    rows = matrix(m, ((1, 1.0), (4, 2.0), (5, 3.0)))
    right = np.full(m, 6.0)
    return QPInstance(quadratic, np.zeros(n), rows, right, right.copy(), np.full(n, 0.1), np.full(n, 10.0))


def transport_lp(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Transportation LP: minimise sum c_ij x_ij s.t. sum_j x_ij = s_i, sum_i x_ij = d_j, x >= 0.

    k sources and k + 1 sinks with k (k + 1) about `size`, c ~ U(0, 1), s and d the sums of a matrix ~ U(0, 1). The rows
    are dependent, as always in this problem. Source: Hitchcock, J. Math. and Physics 20 (1941).
    """
    k = max(2, round(np.sqrt(size + 0.25) - 0.5))
    amounts = rng.random((k, k + 1))
    right = np.concatenate([amounts.sum(axis=1), amounts.sum(axis=0)])
    return _bipartite(rng.random(amounts.size), right, k, k + 1)


def assignment_lp(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Assignment LP: the transportation LP with k sources, k sinks and amounts 1; c_ij uniform integers in 1..100.

    Degenerate, and not always unique. Source: Burkard, Dell'Amico, Martello, "Assignment problems" (2009), 4.10.
    """
    k = max(2, round(np.sqrt(size)))
    cost = rng.integers(1, 101, k * k).astype(np.float64)
    return _bipartite(cost, np.ones(2 * k), k, k)


def _bipartite(cost: Array, right: Array, rows: int, columns: int) -> QPInstance:
    """Return the transportation LP; x is stored row by row."""
    n = rows * columns
    matrix = _stack([[sp.kron(sp.eye(rows), np.ones((1, columns)))], [sp.kron(np.ones((1, rows)), sp.eye(columns))]])
    return QPInstance(sp.csc_matrix((n, n)), cost, matrix, right, right.copy(), np.zeros(n), np.full(n, np.inf))


def random_lp(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Random feasible and bounded LP: n/4 rows A x = A v, n/4 rows A x <= A v + d, x >= 0, q = -A'y + w.

    A has 15 % normal entries; v_i is U(0, 1) or 0 with probability 1/2 each, d likewise; y is normal on equalities and
    U(0, 1) on the inequalities with d = 0, else 0; w is U(0, 1) where v = 0, else 0. So v is optimal with the
    multipliers y and w. The standard construction from a primal-dual pair.
    """
    n, m = size, size // 4
    rows = _normal(rng, 2 * m, n)
    vertex = np.where(rng.random(n) < 0.5, rng.random(n), 0.0)
    slack = np.where(rng.random(m) < 0.5, rng.random(m), 0.0)
    y = np.concatenate([rng.standard_normal(m), np.where(slack > 0.0, 0.0, rng.random(m))])
    w = np.where(vertex > 0.0, 0.0, rng.random(n))
    middle = rows @ vertex
    low = np.concatenate([middle[:m], np.full(m, -np.inf)])
    high = np.concatenate([middle[:m], middle[m:] + slack])
    return QPInstance(sp.csc_matrix((n, n)), w - rows.T @ y, rows, low, high, np.zeros(n), np.full(n, np.inf))


def _repeated(instance: QPInstance) -> QPInstance:
    """Append every other row once more, every other one of those times -2: exactly dependent also in floating point."""
    again = np.arange(0, instance.low.size, 2)
    scale = np.where(np.arange(again.size) % 2 == 0, 1.0, -2.0)
    extra = sp.diags(scale) @ sp.csr_matrix(instance.A)[again]
    low, high = scale * instance.low[again], scale * instance.high[again]
    return QPInstance(
        instance.P,
        instance.q,
        _stack([[instance.A], [extra]]),
        np.concatenate([instance.low, np.minimum(low, high)]),
        np.concatenate([instance.high, np.maximum(low, high)]),
        instance.lower,
        instance.upper,
    )


def equality_repeated(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Equality-constrained QP as above, every other row twice, every other repetition times -2."""
    return _repeated(equality_qp(size, rng, number))


def svm_repeated(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Support vector machine as above, every other row twice, every other repetition times -2."""
    return _repeated(svm(size, rng, number))


def lp_repeated(size: int, rng: np.random.Generator, number: int) -> QPInstance:
    """Random feasible LP as above, every other row twice, every other repetition times -2."""
    return _repeated(random_lp(size, rng, number))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # 10 n rows: at n = 1,000 the dense contestants would need 160 MB for the rows alone.
        Family("random-qp", random_qp, largest=500),
        Family("equality-qp", equality_qp),
        Family("portfolio", portfolio),
        Family("lasso", lasso),
        Family("svm", svm),
        Family("huber", huber),
        Family("control", control),
        Family("cvxqp", cvxqp, instances=3),
        Family("transport-lp", transport_lp, is_linear=True),
        Family("assignment-lp", assignment_lp, is_linear=True),
        Family("random-lp", random_lp, is_linear=True),
        Family("equality-repeated", equality_repeated),
        Family("svm-repeated", svm_repeated),
        Family("lp-repeated", lp_repeated, is_linear=True),
    )
}
