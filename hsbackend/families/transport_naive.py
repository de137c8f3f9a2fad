"""Twin of :mod:`hsbackend.families.transport` in plain PyTorch, float64: slow and obviously right.

With the affine projection ``X_0`` of V onto the marginals, an orthonormal basis Z of the directions that keep them and
``X = X_0 + H^-1/2 Z y`` the projection is the least-distance problem

    minimise  |y|   subject to   G y >= k,      G = H^-1/2 Z,  k = -X_0,

which is solved as a nonnegative least-squares problem (Lawson and Hanson, "Solving Least Squares Problems", 1974,
chapter 23): finite, and it tells infeasible items apart. The entries it holds at zero define a linear system that gives
X and the multipliers to the last digits. The KKT solve on a face writes the system out and takes a pseudo-inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hsbackend.families.family import Choice
from hsbackend.status import Status

#: What counts as zero, relative to the data of an item: far above rounding, far below what random data decides.
_TOLERANCE = 1e-11


def solve(
    point: Tensor, weight: Tensor | None, coefficients: Tensor | None, rhs: Tensor,
    lower: Tensor | None, upper: Tensor | None, shape: tuple[int, ...], choice: Choice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Project item by item; return primal, multipliers, face and status as :func:`transport.solve` does."""
    batch, n = point.shape
    m = shape[0] + shape[1]
    v = point.double()
    h = torch.ones_like(v) if weight is None else weight.double().expand(batch, n)
    marginals = rhs.double().expand(batch, m)
    primal = torch.full((batch, n), torch.nan, dtype=torch.float64)
    multipliers = torch.full((batch, m), torch.nan, dtype=torch.float64)
    face = torch.zeros((batch, n), dtype=torch.int8)
    status = torch.empty(batch, dtype=torch.int8)
    for b in range(batch):
        valid = (v[b] < torch.inf).all() and h[b].isfinite().all() and (h[b] > 0).all()
        if not (valid and marginals[b].isfinite().all()):
            status[b] = Status.INVALID_INPUT
            continue
        allowed = v[b] > -torch.inf
        found = _project(v[b][allowed], h[b][allowed], _rows(shape)[:, allowed], marginals[b])
        if found is None:
            status[b] = Status.INFEASIBLE
            continue
        status[b] = Status.SOLVED
        primal[b] = torch.zeros(n, dtype=torch.float64).masked_scatter(allowed, found[0])
        multipliers[b] = found[1]
        z = h[b] * (primal[b] - v[b]) + _rows(shape).T @ found[1]
        z = torch.where(allowed, z, torch.inf)
        size = _TOLERANCE * (v[b][allowed].abs().max() + marginals[b].max())
        face[b] = (z <= size * h[b].max()) if choice == "support" else (primal[b] > size)
    return primal, multipliers, face, status


def kkt(
    face: Tensor, primal: Tensor, weight: Tensor | None, coefficients: Tensor | None,
    rhs_primal: Tensor, rhs_rows: Tensor | None, rhs_bounds: Tensor | None, shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Build and pseudo-invert the KKT matrix of every item; return u, w and wb as :func:`transport.kkt` does.

    Held entries are known, so the matrix is that of the free ones: its solution of least norm has the (a, b) of least
    norm, and its null space is that of the components.
    """
    batch, n = rhs_primal.shape
    rows = _rows(shape)
    h = torch.ones(batch, n) if weight is None else weight.expand(batch, n)
    u, wb = torch.zeros(batch, n, dtype=torch.float64), torch.zeros(batch, n, dtype=torch.float64)
    w = torch.zeros(batch, len(rows), dtype=torch.float64)
    for b in range(batch):
        free = face[b] != 0
        g = rhs_primal[b].double()
        r = torch.zeros(len(rows), dtype=torch.float64) if rhs_rows is None else rhs_rows[b].double()
        if rhs_bounds is not None:
            u[b][~free] = rhs_bounds[b].double()[~free]
        u[b][free], w[b] = _saddle(h[b].double()[free], rows[:, free], g[free], r - rows @ u[b])
        wb[b][~free] = (g - h[b].double() * u[b] - rows.T @ w[b])[~free]
    return u, w, wb


def _rows(shape: tuple[int, ...]) -> Tensor:
    """Write the rows of the marginals out, (k1 + k2, k1 k2)."""
    k1, k2 = shape
    one, other = torch.eye(k1, dtype=torch.float64), torch.eye(k2, dtype=torch.float64)
    return torch.cat([torch.kron(one, torch.ones(1, k2)), torch.kron(torch.ones(1, k1), other)])


def _saddle(h: Tensor, rows: Tensor, g: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``[H N'; N 0] (u, w) = (g, r)`` by the pseudo-inverse."""
    zero = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    system = torch.cat([torch.cat([h.diag(), rows.T], 1), torch.cat([rows, zero], 1)])
    solution = torch.linalg.pinv(system) @ torch.cat([g, r])
    return solution[: len(h)], solution[len(h) :]


def _project(v: Tensor, h: Tensor, rows: Tensor, marginals: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return X and (a, b), or None where no X >= 0 has these marginals."""
    affine, _ = _saddle(h, rows, h * v, marginals)
    affine += _saddle(h, rows, torch.zeros_like(v), marginals - rows @ affine)[0]  # V may be far larger than marginals
    size = v.abs().max() + marginals.abs().max()
    if (rows @ affine - marginals).abs().max() > 1e-9 * size:
        return None
    basis = torch.linalg.svd(rows / h.sqrt())[2][torch.linalg.matrix_rank(rows) :].T
    # X >= 0 is relaxed by a rounding: sets without an interior are as good as others.
    held = _held_by_least_distance(basis / h.sqrt()[:, None], -(affine / size + 1e-13))
    if held is None:
        return None
    fixed = torch.cat([rows, torch.eye(len(v), dtype=torch.float64)[held]])
    right = torch.cat([marginals, torch.zeros(int(held.sum()))])
    x, multipliers = _saddle(h, fixed, h * v, right)
    x += _saddle(h, fixed, torch.zeros_like(v), right - fixed @ x)[0]
    return x.clamp(min=0.0), multipliers[: len(rows)]


def _held_by_least_distance(matrix: Tensor, bound: Tensor) -> Tensor | None:
    """Return the rows of ``G y >= k`` that hold the shortest y, or None where there is no y."""
    stacked = torch.cat([matrix.T, bound[None]])
    target = torch.zeros(len(stacked), dtype=torch.float64)
    target[-1] = 1.0
    u = _nonnegative_least_squares(stacked, target)
    return None if (stacked @ u - target).norm() <= 1e-9 else u > 0.0


def _nonnegative_least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """Minimise ``|E u - f|`` over u >= 0 (Lawson and Hanson, algorithm NNLS)."""
    n = matrix.shape[1]
    u, chosen = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool)
    scale = matrix.norm(dim=0) + 1e-300
    while True:
        gradient = (matrix.T @ (target - matrix @ u) / scale).masked_fill(chosen, -torch.inf)
        best = int(gradient.argmax()) if n else 0
        if not n or gradient[best] <= 1e-13:
            return u
        chosen[best] = True
        while True:
            trial = torch.zeros_like(u)
            trial[chosen] = torch.linalg.lstsq(matrix[:, chosen], target, driver="gelsd").solution
            if (trial[chosen] > 0.0).all():
                u = trial
                break
            # Walk until the first chosen entry is zero, and let it go.
            blocking = chosen & (trial <= 0.0)
            steps = torch.where(blocking, u / (u - trial).clamp(min=1e-300), torch.inf)
            step = steps.min()
            u = u + step * (trial - u)
            chosen &= ~(blocking & (steps <= step))
            u = torch.where(chosen, u.clamp(min=0.0), 0.0)
