"""Large sparse cvxpy problems through the layers: the route, the numbers, the gradients, the failures."""

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cvxpylayers.torch import CvxpyLayer as StockLayer

from hsbackend import SolveError
from hsbackend.adapters.cvxpylayers import CvxpyLayer, HSBackend


def total_variation() -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]:
    x, y, weight = cp.Variable(30), cp.Parameter(30), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y) + weight * cp.norm1(cp.diff(x)))), [y, weight], [x]


def flow() -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]:
    rng = np.random.default_rng(0)
    incidence = np.zeros((8, 20))
    for edge in range(20):
        start, end = rng.choice(8, 2, replace=False)
        incidence[start, edge], incidence[end, edge] = 1.0, -1.0
    x, y, supply = cp.Variable(20), cp.Parameter(20), cp.Parameter(20)
    rows = sp.csr_array(incidence)
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [rows @ x == rows @ supply, x >= -2, x <= 2]),
        [y, supply],
        [x],
    )


def sparse_parameter() -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]:
    """Rows whose non-zeros are a parameter: sum_k values_k x_column(k) over the k of a row."""
    rng = np.random.default_rng(1)
    rows, columns = np.nonzero(rng.random((6, 15)) < 0.3)
    count = len(rows)
    add = sp.csr_array((np.ones(count), (rows, np.arange(count))), (6, count))
    gather = sp.csr_array((np.ones(count), (np.arange(count), columns)), (count, 15))
    x, y, nonzeros = cp.Variable(15), cp.Parameter(15), cp.Parameter(count)
    constraints = [add @ cp.multiply(nonzeros, gather @ x) <= 1, x >= 0]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y, nonzeros], [x]


def regression() -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]:
    x, target, design = cp.Variable(8), cp.Parameter(12), cp.Parameter((12, 8))
    return cp.Problem(cp.Minimize(cp.sum_squares(design @ x - target)), [x >= 0]), [target, design], [x]


FAMILIES = {each.__name__: each for each in (total_variation, flow, sparse_parameter, regression)}


def values(parameters: list[cp.Parameter], seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    found: list[torch.Tensor] = []
    for parameter in parameters:
        value = rng.standard_normal(parameter.shape)
        if parameter.attributes["nonneg"]:
            value = np.abs(value) + 0.1
        found.append(torch.tensor(value, dtype=torch.float64, requires_grad=True))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stock", [False, True])
def test_the_sparse_way_is_the_dense_way(family: str, stock: bool) -> None:
    problem, parameters, variables = FAMILIES[family]()
    layer_class = StockLayer if stock else CvxpyLayer
    found = []
    for solver in ("sparse", None):
        backend = HSBackend(solver=solver, fallback="error")
        layer = layer_class(problem, parameters, variables, solver=backend)
        assert (backend.explain().solver == "sparse") == (solver == "sparse")
        tensors = values(parameters, 3)
        (x,) = layer(*tensors)
        weights = torch.from_numpy(np.random.default_rng(0).standard_normal(x.shape))
        found.append([x.detach(), *torch.autograd.grad((x * weights).sum(), tensors)])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.0, atol=1e-8)
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def big(n: int, m: int) -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable], list[torch.Tensor]]:
    rng = np.random.default_rng(0)
    rows = sp.csr_array((rng.standard_normal(5 * m), (np.repeat(np.arange(m), 5), rng.integers(0, n, 5 * m))), (m, n))
    inside = rng.uniform(0.0, 1.0, n)
    x, y, h = cp.Variable(n), cp.Parameter(n), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [rows @ x <= h, x >= 0, x <= 1])
    limits = rows @ inside + rng.random(m) * (rng.random(m) < 0.5)
    tensors = [torch.tensor(part, requires_grad=True) for part in (inside + rng.standard_normal(n), limits)]
    return problem, [y, h], [x], tensors


def test_size_and_density_choose_the_route_and_explain_says_so() -> None:
    problem, parameters, variables, tensors = big(4000, 1000)
    layer = CvxpyLayer(problem, parameters, variables)
    report = str(layer.explain())
    assert "-> sparse" in report
    assert "4000 variables, 1000 rows" in report
    assert "dual semismooth Newton" in report
    assert "4000 definitional equalities removed" in report
    (x,) = layer(*tensors)
    gradient, _ = torch.autograd.grad(x.sum(), tensors)
    inside = (x > 0.0) & (x < 1.0)
    assert float(gradient[~inside].abs().max()) == 0.0
    assert float(x.detach().min()) >= 0.0


def test_a_warm_start_changes_the_time_only() -> None:
    problem, parameters, variables, tensors = big(2000, 500)
    layer = CvxpyLayer(problem, parameters, variables)
    cold = layer(*tensors)[0]
    layer(*tensors, warm_start=True)
    warm = layer(*tensors, warm_start=True)[0]
    torch.testing.assert_close(warm, cold, rtol=0.0, atol=1e-11)


def test_an_infeasible_item_names_its_rows() -> None:
    problem, parameters, variables, tensors = big(2000, 500)
    layer = CvxpyLayer(problem, parameters, variables)
    limits = tensors[1].detach().clone()
    limits[17] = -1e3
    both = torch.stack([tensors[1].detach(), limits])
    with pytest.raises(SolveError, match=r"item 1: infeasible, .*entry 17"):
        layer(tensors[0], both)
    (x,) = layer(tensors[0], both, solver_args={"on_failure": "nan"})
    assert layer.status.tolist() == [0, 1]
    assert x[1].isnan().all()
    assert not x[0].isnan().any()
