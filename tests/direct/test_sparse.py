"""Sparse tensors and scipy matrices in ``solve_qp`` and ``Polyhedron``: the numbers of the dense way, by nonzeros."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from hsbackend import (
    InvalidOptionError,
    Polyhedron,
    SolveError,
    Status,
    hs_jacobian,
    hs_jvp,
    hs_vjp,
    project,
    solve_qp,
    sparse_qp,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # forward mode in torch imports it
]

STORAGE: dict[str, Callable[[Tensor], Any]] = {
    "coordinate": lambda dense: dense.to_sparse(),
    "rows": lambda dense: dense.to_sparse_csr(),
    "columns": lambda dense: dense.to_sparse_csc(),
    "scipy": lambda dense: sp.csr_array(dense.numpy()),
}
N, P, M = 14, 3, 7


def data(seed: int) -> dict[str, Tensor]:
    """Return a program with a point inside, sparse where it can be."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((N, N)) * (rng.random((N, N)) < 0.15)
    equal = rng.standard_normal((P, N)) * (rng.random((P, N)) < 0.4)
    below = rng.standard_normal((M, N)) * (rng.random((M, N)) < 0.4)
    inside = rng.uniform(0.0, 1.0, N)
    found = {
        "Q": root @ root.T + 0.3 * np.eye(N), "q": rng.standard_normal(N) * 2.0, "A": equal, "b": equal @ inside,
        "G": below, "h": below @ inside + rng.random(M) * (rng.random(M) < 0.5), "lower": np.zeros(N),
        "upper": np.ones(N),
    }  # fmt: skip
    return {name: torch.from_numpy(values) for name, values in found.items()}


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_are_those_of_dense_tensors(seed: int, storage: str, diagonal: bool) -> None:
    dense, own = data(seed), data(seed)
    if diagonal:
        dense["Q"] = own["Q"] = dense["Q"].diagonal().clone()
    names = [name for name in ("Q", "A", "G") if dense[name].dim() == 2]
    given: dict[str, Any] = {
        name: STORAGE[storage](tensor) if name in names else tensor for name, tensor in own.items()
    }
    for name in dense:
        dense[name].requires_grad_()
        if isinstance(given[name], Tensor):
            given[name].requires_grad_()
    ours, theirs = solve_qp(**given), solve_qp(**dense)
    torch.testing.assert_close(ours.primal, theirs.primal, rtol=0.0, atol=1e-9)
    assert ours.status == Status.SOLVED
    assert float(ours.residuals.dual) < 1e-9
    assert torch.equal(ours.active_set.ineq, theirs.active_set.ineq)
    for part in ("eq", "ineq", "lower", "upper"):
        torch.testing.assert_close(
            getattr(ours.multipliers, part), getattr(theirs.multipliers, part), atol=1e-7, rtol=0.0
        )
    weights = torch.from_numpy(np.random.default_rng(seed).standard_normal(N))
    inputs = [name for name, tensor in given.items() if isinstance(tensor, Tensor)]
    gradients = [
        torch.autograd.grad(each.primal @ weights + (each.multipliers.ineq**2).sum(), [of[name] for name in inputs])
        for each, of in ((ours, given), (theirs, dense))
    ]
    for name, found, wanted in zip(inputs, *gradients, strict=True):
        if name in names:
            assert found.layout == given[name].layout
            wanted = torch.where(dense[name] != 0.0, wanted, 0.0)
            found = found.to_dense()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("forward", [False, True])
def test_gradients_are_those_of_differences(forward: bool) -> None:
    """In both modes; entries of matrices as plain tensors, because torch has no tangents of sparse ones."""
    given = data(11)
    equal, below = (sparse_qp.Nonzeros.of(name, sp.csr_array(given[name].numpy())) for name in "AG")
    structure = sparse_qp.Structure(N, None, equal, below)

    def solution(d: Tensor, q: Tensor, entries: Tensor, b: Tensor, more: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        limits = given["lower"][None], given["upper"][None]
        parts = sparse_qp.SparseData(structure, None, d[None], q[None], entries, b[None], more, h[None], *limits)
        found, _ = sparse_qp.solve(parts, 1, 1e-9, "active", True)
        return found[0], found[2]

    inputs = [given["Q"].diagonal(), given["q"], equal.values, given["b"], below.values, given["h"]]
    inputs = [value.clone().requires_grad_() for value in inputs]
    modes = {"check_forward_ad": forward, "check_backward_ad": not forward}
    assert torch.autograd.gradcheck(solution, inputs, atol=1e-6, **modes)


def test_a_batch_is_its_items_and_shared_gradients_add_up() -> None:
    given = data(5)
    below = given["G"].to_sparse().requires_grad_()
    q = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, N))).requires_grad_()

    def run(linear: Tensor) -> Tensor:
        return solve_qp(
            given["Q"].diagonal(), linear, None, None, below, given["h"], given["lower"], given["upper"]
        ).primal

    together = run(q)
    assert together.shape == (2, 3, N)
    gradients = torch.autograd.grad(together.sin().sum(), [q, below])
    total = torch.zeros(M, N, dtype=torch.float64)
    for place in np.ndindex(2, 3):
        alone = run(q[place])
        assert torch.equal(alone, together[place])
        own = torch.autograd.grad(alone.sin().sum(), [q, below])
        torch.testing.assert_close(own[0][place], gradients[0][place], rtol=0.0, atol=0.0)
        total += own[1].to_dense()
    torch.testing.assert_close(gradients[1].to_dense(), total)


@pytest.mark.parametrize("storage", ["coordinate", "scipy"])
def test_projections_and_their_jacobians(storage: str) -> None:
    given = data(7)
    rows = STORAGE[storage](given["G"])
    sparse = Polyhedron(G=rows, h=given["h"], lower=0.0, upper=1.0)
    dense = Polyhedron(G=given["G"], h=given["h"], lower=0.0, upper=1.0)
    rng = np.random.default_rng(0)
    v, g = (torch.from_numpy(rng.standard_normal((2, N))) for _ in range(2))
    weight = torch.from_numpy(rng.random((2, N)) + 0.2)
    for w in (None, weight):
        torch.testing.assert_close(project(v, sparse, weight=w), project(v, dense, weight=w), atol=1e-10, rtol=0.0)
        for product in (hs_vjp, hs_jvp):
            ours, theirs = (product(v, each, g, weight=w) for each in (sparse, dense))
            torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0.0)
        ours, theirs = (hs_jacobian(v, each, weight=w) for each in (sparse, dense))
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0.0)
    assert "G=tensor(7, 14)" in repr(sparse)
    assert project(v.float(), sparse).dtype == torch.float32


def test_failures_name_rows_and_come_with_certificates() -> None:
    given = data(9)
    below = torch.cat([given["G"], given["G"][2:3], -given["G"][2:3]]).to_sparse()
    h = torch.cat([given["h"], torch.tensor([0.25, -0.5], dtype=torch.float64)])
    q = torch.stack([given["q"], torch.full((N,), torch.nan, dtype=torch.float64)]).requires_grad_()
    with pytest.raises(SolveError, match=r"item 0: infeasible, .*row \d+ of G"):
        solve_qp(given["Q"].diagonal(), q[:1], None, None, below, h)
    found = solve_qp(given["Q"].diagonal(), q, None, None, below, h, on_failure="nan")
    assert found.status.tolist() == [Status.INFEASIBLE, Status.INVALID_INPUT]
    assert found.primal.isnan().all()
    proof = found.certificates.ineq[0]
    assert (proof >= 0.0).all()
    assert float((below.to_dense().mT @ proof).abs().max()) < 1e-9
    assert float(h @ proof) < 0.0
    (gradient,) = torch.autograd.grad(found.primal[0].sum(), q)
    assert gradient[0].isnan().all()
    assert not gradient[1].any()


def test_linear_programs_take_smoothing_and_say_when_optima_are_many() -> None:
    ones = torch.ones(1, 3, dtype=torch.float64).to_sparse()
    q = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    b, zero = torch.ones(1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    found = solve_qp(None, q, ones, b, lower=zero)
    assert bool(found.non_unique)
    torch.testing.assert_close(
        found.primal.detach(), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), atol=1e-8, rtol=0.0
    )
    smooth = solve_qp(None, q, ones, b, lower=zero, smoothing=0.5, smoothing_centre=zero)
    dense = solve_qp(None, q, ones.to_dense(), b, lower=zero, smoothing=0.5, smoothing_centre=zero)
    torch.testing.assert_close(smooth.primal, dense.primal, atol=1e-9, rtol=0.0)
    for primal in (smooth.primal, dense.primal):
        (gradient,) = torch.autograd.grad(primal[0], q)
        torch.testing.assert_close(gradient, torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64), atol=1e-8, rtol=0.0)


def test_what_is_not_there_is_refused_in_words() -> None:
    given = data(1)
    below = given["G"].to_sparse()
    with pytest.raises(InvalidOptionError, match="closest"):
        solve_qp(None, given["q"], None, None, below, given["h"], on_failure="closest")
    with pytest.raises(InvalidOptionError, match="closest"):
        project(given["q"], Polyhedron(G=below, h=given["h"]), on_failure="closest")
    with pytest.raises(ValueError, match=r"`G` has shape \(7, 14\), expected \(rows, 15\)"):
        solve_qp(None, torch.zeros(15), None, None, below, given["h"])
    with pytest.raises(ValueError, match="both triangles"):
        solve_qp(given["Q"].triu().to_sparse(), given["q"])
    with pytest.raises(ValueError, match="`A` was given without `b`"):
        solve_qp(None, given["q"], given["A"].to_sparse(), None, below, given["h"])
    with pytest.raises(TypeError, match="floating-point"):
        solve_qp(None, given["q"], None, None, below.long(), given["h"])
    q = given["q"].clone().requires_grad_()
    x = solve_qp(given["Q"].diagonal(), q, None, None, below, given["h"], given["lower"], given["upper"]).primal
    (gradient,) = torch.autograd.grad(x.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first order"):
        gradient.sum().backward()


def test_twenty_thousand_variables_without_a_dense_array() -> None:
    """Point and gradient satisfy their conditions to rounding; memory is O(nonzeros)."""
    rng = np.random.default_rng(0)
    n, m, k = 20_000, 5_000, 5
    rows = sp.csr_array((rng.standard_normal(m * k), (np.repeat(np.arange(m), k), rng.integers(0, n, m * k))), (m, n))
    inside = rng.uniform(0.0, 1.0, n)
    h = torch.from_numpy(rows @ inside + rng.random(m) * (rng.random(m) < 0.5))
    q = torch.from_numpy(-inside - rng.standard_normal(n)).requires_grad_()
    ones = torch.ones(n, dtype=torch.float64)
    found = solve_qp(ones, q, None, None, rows, h, 0.0 * ones, ones)
    for residual in (found.residuals.primal, found.residuals.dual, found.residuals.complementarity):
        assert float(residual) < 1e-11
    g = torch.from_numpy(rng.standard_normal(n))
    (u,) = torch.autograd.grad(found.primal, q, g)
    u = -u.numpy()
    held, free = found.active_set.ineq.numpy(), ~(found.active_set.lower | found.active_set.upper).numpy()
    assert np.abs(u[~free]).max() == 0.0
    assert np.abs((rows @ u)[held]).max() < 1e-11
    assert u @ g.numpy() == pytest.approx(u @ u, rel=1e-11)  # an orthogonal projection
