"""The same bits whatever the batch split, the order and the threads; the same numbers in other processes; nothing left.

Sizes: ``SMALL`` is work for one thread unless the pool is told otherwise, ``LARGE`` for several.
"""

from __future__ import annotations

import gc
import linecache
import os
import signal
import subprocess
import sys
import threading
from _thread import interrupt_main
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

from hsbackend import Polyhedron, SolveError, _parallel, nn, plan, project, qp_operators, solve_qp
from hsbackend.solvers import active_set

D = torch.float64
SMALL, LARGE = (20, 12), (60, 40)  # items, coordinates
SEED = 3
STATM = Path("/proc/self/statm")

Function = Callable[..., Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------------------------------


class Draw:
    """Random tensors, one after the other from one seed."""

    def __init__(self, seed: int = SEED) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=D, generator=self._generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, dtype=D, generator=self._generator)

    def positive(self, *front: int, n: int) -> Tensor:
        """Draw positive definite matrices."""
        factor = self.normal(*front, n, n) / n**0.5
        return factor @ factor.mT + torch.eye(n, dtype=D)


def simplex(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    polyhedron = Polyhedron.simplex(n)
    return lambda v, **options: project(v, polyhedron, **options), [draw.normal(batch, n)]


def budget(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    def function(v: Tensor, weight: Tensor, c: Tensor, b: Tensor, l: Tensor, u: Tensor, **options) -> Tensor:
        return project(v, Polyhedron.budget(n, c, at_most=b, lower=l, upper=u), weight=weight, **options)

    data = [draw.normal(batch, n), draw.uniform(0.5, 2, batch, n), draw.uniform(0.5, 2, batch, n)]
    return function, [*data, draw.normal(batch), draw.uniform(-2, -1, batch, n), draw.uniform(0.3, 1, batch, n)]


def l1(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    data = [draw.normal(batch, n), draw.uniform(0.5, 2, batch, n), draw.uniform(0.5, 2, batch)]
    return lambda v, w, r, **options: project(v, Polyhedron.weighted_l1_ball(w, r), **options), data


def monotone(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    polyhedron = Polyhedron.monotone(n, lower=-1.0, upper=1.0)
    return lambda v, w, **options: project(v, polyhedron, weight=w, **options), [
        draw.normal(batch, n),
        draw.uniform(0.5, 2, batch, n),
    ]


def birkhoff(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    k = int(n**0.5) + 1
    polyhedron = Polyhedron.birkhoff(k)
    return lambda v, w, **options: project(v, polyhedron, weight=w, **options), [
        draw.normal(batch, k, k),
        draw.uniform(0.5, 2, batch, k, k),
    ]


def box(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    data = [draw.normal(batch, n), draw.uniform(0.3, 1, batch, n)]
    return lambda v, u, **options: project(v, Polyhedron.box(-u, u), **options), data


def halfspace(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    data = [draw.normal(batch, n), draw.normal(batch, n), draw.uniform(-1, 0, batch)]
    return lambda v, a, b, **options: project(v, Polyhedron.halfspace(a, b), **options), data


def affine(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    normals = draw.normal(3, n)
    return lambda v, b, **options: project(v, Polyhedron.affine(normals, b), **options), [
        draw.normal(batch, n),
        draw.normal(batch, 3),
    ]


def _sectors(n: int) -> Polyhedron:
    """Return fully invested portfolios with caps per asset and per sector."""
    sectors = torch.nn.functional.one_hot(torch.arange(n) % 4).T.to(D)
    one = torch.ones(1, n, dtype=D)
    return Polyhedron(one, torch.ones(1, dtype=D), sectors, torch.full((4,), 0.4, dtype=D), 0.0, max(0.3, 3 / n))


def newton(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    portfolio = _sectors(n)
    return lambda v, **options: project(v, portfolio, **options), [0.1 * draw.normal(batch, n)]


def newton_hard(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    """Far points with a metric per item: some items are left to the active set."""
    portfolio = _sectors(n)
    return lambda v, w, **options: project(v, portfolio, weight=w, **options), [
        draw.normal(batch, n),
        draw.uniform(0.5, 2, batch, n),
    ]


def rows_shared(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    equations = (draw.normal(2, n), torch.zeros(2, dtype=D))
    polyhedron = Polyhedron(*equations, draw.normal(n // 2, n), draw.uniform(0.1, 0.3, n // 2), -0.4, 0.5)
    return lambda v, **options: project(v, polyhedron, **options), [draw.normal(batch, n)]


def qp_shared(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    Q, G, bound = draw.positive(n=n), draw.normal(n // 2, n), torch.full((n,), 0.4, dtype=D)

    def function(q: Tensor, h: Tensor, **options) -> Tensor:
        found = solve_qp(Q, q, G=G, h=h, lower=-bound, upper=bound, **options)
        return torch.cat([found.primal, found.multipliers.ineq, found.multipliers.lower], dim=-1)

    return function, [draw.normal(batch, n), draw.uniform(0.1, 0.3, batch, n // 2)]


def rows_per_item(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    data = [draw.normal(batch, n), draw.normal(batch, n // 2, n), draw.uniform(0.1, 0.3, batch, n // 2)]
    return lambda v, G, h, **options: project(v, Polyhedron(G=G, h=h, lower=-0.4, upper=0.5), **options), data


def qp_per_item(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    bound = torch.full((n,), 0.4, dtype=D)

    def function(Q: Tensor, q: Tensor, G: Tensor, h: Tensor, **options) -> Tensor:
        found = solve_qp(Q, q, G=G, h=h, lower=-bound, upper=bound, **options)
        return torch.cat([found.primal, found.multipliers.ineq, found.multipliers.lower], dim=-1)

    data = [draw.positive(batch, n=n), draw.normal(batch, n), draw.normal(batch, n // 2, n)]
    return function, [*data, draw.uniform(0.1, 0.3, batch, n // 2)]


def qp_semidefinite(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    """Return a route with fewer squares than variables and a linear term in their span: a choice among many optima."""
    F, bound = draw.normal(n // 3, n), torch.ones(n, dtype=D)

    def function(c: Tensor, h: Tensor, **options) -> Tensor:
        q = (c.unsqueeze(-1) * F).sum(-2)  # a matrix product would round differently in another batch
        found = solve_qp(F.mT @ F, q, G=torch.ones(1, n, dtype=D), h=h, lower=-bound, upper=bound, **options)
        return found.primal

    return function, [0.1 * draw.normal(batch, n // 3), draw.uniform(-0.5, 1, batch, 1)]


def linear_program(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    """Return the route of linear programs with rows per item."""
    bound = torch.ones(n, dtype=D)

    def function(q: Tensor, G: Tensor, h: Tensor, **options) -> Tensor:
        found = solve_qp(None, q, G=G, h=h, lower=-bound, upper=bound, **options)
        return torch.cat([found.primal, found.multipliers.ineq], dim=-1)

    return function, [draw.normal(batch, n), draw.normal(batch, n // 3, n), draw.uniform(0.1, 0.3, batch, n // 3)]


def chained_linear_program(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    """Return the route of linear programs with sparse rows per item: each row holds two neighbours."""
    bound, first, second = torch.ones(n, dtype=D), torch.eye(n, dtype=D)[:-1], torch.eye(n, dtype=D)[1:]

    def function(q: Tensor, left: Tensor, h: Tensor, **options) -> Tensor:
        G = left.unsqueeze(-1) * first + second
        found = solve_qp(None, q, G=G, h=h, lower=-bound, upper=bound, **options)
        return torch.cat([found.primal, found.multipliers.ineq], dim=-1)

    return function, [draw.normal(batch, n), draw.normal(batch, n - 1), draw.uniform(0.1, 0.3, batch, n - 1)]


def rows_learnt(draw: Draw, batch: int, n: int) -> tuple[Function, list[Tensor]]:
    """Return a route with one matrix for all items that is trained, not a constant."""
    A, G = draw.normal(2, n).requires_grad_(), draw.normal(n // 2, n).requires_grad_()

    def function(v: Tensor, h: Tensor, **options) -> Tensor:
        return project(v, Polyhedron(A, torch.zeros(2, dtype=D), G, h, -0.4, 0.5), **options)

    return function, [draw.normal(batch, n), draw.uniform(0.1, 0.3, batch, n // 2)]


FAMILIES = (simplex, budget, l1, monotone, birkhoff, box, halfspace)
GENERAL = (newton, newton_hard, rows_shared, rows_learnt, qp_shared, rows_per_item, qp_per_item)
SEMIDEFINITE = (qp_semidefinite, linear_program)
COMPILED = (chained_linear_program,)
ROUTES = (*FAMILIES, affine, *GENERAL, *SEMIDEFINITE, *COMPILED)


def evaluate(function: Function, data: Sequence[Tensor], items: Sequence[int], **options) -> list[Tensor]:
    """Return value and gradients of some items; cotangents belong to the item."""
    leaves = [tensor[list(items)].requires_grad_() for tensor in data]
    out = function(*leaves, **options)
    cotangents = torch.stack([Draw(1000 + item).normal(*out.shape[1:]) for item in items])
    return [out.detach(), *torch.autograd.grad((cotangents * out).sum(), leaves)]


def in_pieces(function: Function, data: Sequence[Tensor], size: int) -> list[Tensor]:
    """Return the same as :func:`evaluate` of everything, in pieces."""
    batch = len(data[0])
    pieces = [evaluate(function, data, range(i, min(i + size, batch))) for i in range(0, batch, size)]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def permuted(function: Function, data: Sequence[Tensor]) -> list[Tensor]:
    """Return the same as :func:`evaluate` of everything, with the items in another order."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(SEED))
    return [tensor[order.argsort()] for tensor in evaluate(function, data, order.tolist())]


def assert_same_bits(found: Sequence[Tensor], wanted: Sequence[Tensor], what: str = "") -> None:
    for index, (value, reference) in enumerate(zip(found, wanted, strict=True)):
        difference = float((value - reference).abs().max())
        assert torch.equal(value, reference), f"{what}: tensor {index} differs by up to {difference:.1e}"


@pytest.fixture
def threads():
    """Restore torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["pool", "no_pool"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Send everything through our thread pool, or only what is large."""
    torch.set_num_threads(2)
    if request.param == "pool":
        monkeypatch.setattr(_parallel, "_SERIAL_WORK", 0)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop the programs of earlier calls, which would be found again by their values."""
    monkeypatch.setattr(qp_operators, "CACHE", type(qp_operators.CACHE)())


def routes(of: Sequence[Callable[..., object]] = ROUTES):
    """Parametrise over routes."""
    return pytest.mark.parametrize("route", [pytest.param(route, id=route.__name__) for route in of])


@pytest.mark.parametrize(
    ("route", "wanted"),
    [
        *((route, set()) for route in (*FAMILIES, affine)),
        (newton, {"semismooth_newton"}),
        (newton_hard, {"semismooth_newton", "active_set"}),
        *((route, {"active_set"}) for route in (*GENERAL[2:], *SEMIDEFINITE)),
        *((route, {"compiled_interior"}) for route in COMPILED),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_routes_are_those_they_are_named_after(route, wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[str] = set()
    for name in ("semismooth_newton", "active_set", "compiled_interior"):
        module = getattr(plan, name)
        solve = module.solve

        def watched(*arguments, name=name, solve=solve, **keywords):
            used.add(name)
            return solve(*arguments, **keywords)

        monkeypatch.setattr(module, "solve", watched)
    function, data = route(Draw(), *LARGE)
    function(*data)
    assert used == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Determinism
# ---------------------------------------------------------------------------------------------------------------------


@routes()
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_repeated_calls_and_thread_counts_give_the_same_bits(route, shape, pool: None) -> None:
    function, data = route(Draw(), *shape)
    wanted = evaluate(function, data, range(shape[0]))
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        assert_same_bits(evaluate(function, data, range(shape[0])), wanted, f"{count} threads")


@routes()
def test_pieces_and_other_orders_give_the_same_bits(route, pool: None) -> None:
    batch, n = SMALL
    function, data = route(Draw(), batch, n)
    wanted = evaluate(function, data, range(batch))
    for size in (10, 7, 3, 2):
        assert_same_bits(in_pieces(function, data, size), wanted, f"pieces of {size}")
    assert_same_bits(permuted(function, data), wanted, "permuted")


@routes()
def test_a_single_item_has_the_bits_it_has_in_a_batch(route, pool: None) -> None:
    function, data = route(Draw(), *SMALL)
    assert_same_bits(in_pieces(function, data, 1), evaluate(function, data, range(SMALL[0])))


@routes()
def test_pieces_of_a_larger_batch_give_the_same_bits(route, threads: None) -> None:
    batch, n = LARGE
    function, data = route(Draw(), batch, n)
    wanted = evaluate(function, data, range(batch))
    assert_same_bits(permuted(function, data), wanted, "permuted")
    for size in (30, 7):
        assert_same_bits(in_pieces(function, data, size), wanted, f"pieces of {size}")


@routes(of=(rows_shared, qp_shared))
def test_pieces_of_a_batch_with_millions_of_operations_give_the_same_bits(route, threads: None) -> None:
    batch, n = 240, 100
    function, data = route(Draw(), batch, n)
    assert_same_bits(in_pieces(function, data, 50), evaluate(function, data, range(batch)))


@routes(of=(*FAMILIES, affine))
def test_long_vectors_have_the_same_bits_for_every_thread_count(route, threads: None) -> None:
    """torch cuts one long sum into as many pieces as there are threads."""
    n = 1500 if route is birkhoff else 40_000
    function, data = route(Draw(), 2, n)
    torch.set_num_threads(1)
    wanted = evaluate(function, data, range(2))
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        assert_same_bits(in_pieces(function, data, 1), wanted, f"{count} threads, pieces of 1")
        assert_same_bits(evaluate(function, data, range(2)), wanted, f"{count} threads")


@routes()
def test_a_failing_neighbour_changes_no_bit(route, pool: None) -> None:
    batch, n = SMALL
    function, data = route(Draw(), batch, n)
    wanted = evaluate(function, data, range(batch))
    spoilt = [tensor.clone() for tensor in data]
    for tensor in spoilt:
        tensor[5] = torch.nan
    with pytest.raises(SolveError, match="item 5"):
        function(*spoilt)
    found = evaluate(function, spoilt, range(batch), on_failure="nan")
    assert bool(found[0][5].isnan().all())
    others = [item for item in range(batch) if item != 5]
    assert_same_bits([tensor[others] for tensor in found], [tensor[others] for tensor in wanted])


def shared_radius(draw: Draw, v: Tensor) -> tuple[Function, Tensor]:
    return lambda r: project(v, Polyhedron.l1_ball(v.shape[-1], r)), draw.uniform(1, 2, 1)


def shared_weight(draw: Draw, v: Tensor) -> tuple[Function, Tensor]:
    return lambda w: project(v, Polyhedron.simplex(v.shape[-1]), weight=w), draw.uniform(0.5, 2, v.shape[-1])


def shared_limits(draw: Draw, v: Tensor) -> tuple[Function, Tensor]:
    G = draw.normal(40, v.shape[-1])
    return lambda h: project(v, Polyhedron(G=G, h=h)), draw.uniform(0.3, 1, 40)


def shared_rows(draw: Draw, v: Tensor) -> tuple[Function, Tensor]:
    return lambda G: project(v, Polyhedron(G=G, h=torch.ones(40, dtype=D))), draw.normal(40, v.shape[-1])


def shared_quadratic(draw: Draw, v: Tensor) -> tuple[Function, Tensor]:
    G = draw.normal(40, v.shape[-1])
    return lambda Q: solve_qp(Q, v, G=G, h=torch.ones(40, dtype=D)).primal, draw.positive(n=v.shape[-1])


@routes(of=(shared_radius, shared_weight, shared_limits, shared_rows, shared_quadratic))
def test_the_gradient_of_a_shared_tensor_does_not_depend_on_the_thread_count(route, threads: None) -> None:
    draw = Draw()
    function, shared = route(draw, 2 * draw.normal(64, 40))
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        leaf = shared.clone().requires_grad_()
        found.append(torch.autograd.grad(function(leaf).square().sum(), leaf)[0])
    for other in found[1:]:
        assert_same_bits([other], found[:1])


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


@routes()
@pytest.mark.parametrize("kind", ["one_set", "one_set_each"])
def test_four_threads_get_what_one_gets(route, kind: str, pool: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set is used for the first time by all four at once."""
    batch, n = SMALL
    callers = 4
    inputs = [route(Draw(20 + i), batch, n)[1] for i in range(callers)]
    wanted = [evaluate(route(Draw(), batch, n)[0], data, range(batch)) for data in inputs]
    functions = [route(Draw(), batch, n)[0] for _ in range(callers)]
    if kind == "one_set":
        functions = functions[:1] * callers
    forget(monkeypatch)
    together = threading.Barrier(callers)

    def work(caller: int) -> list[list[Tensor]]:
        together.wait(timeout=60)
        return [evaluate(functions[caller], inputs[caller], range(batch)) for _ in range(5)]

    with ThreadPoolExecutor(callers) as executor:
        found = list(executor.map(work, range(callers)))
    for caller in range(callers):
        for one in found[caller]:
            assert_same_bits(one, wanted[caller], f"caller {caller}")


def test_one_module_in_four_threads() -> None:
    """Parameters of the module are shared; gradients are asked for, not accumulated."""
    draw = Draw()
    module = nn.Projection(Polyhedron.budget(12, torch.nn.Parameter(draw.uniform(0.5, 2, 12)), at_most=0.5))
    points = draw.normal(4, 50, 12)

    def work(v: Tensor) -> list[Tensor]:
        out = module(v)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), module.parameters())]

    wanted = [work(v) for v in points]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            for found, reference in zip(executor.map(work, points), wanted, strict=True):
                assert_same_bits(found, reference)


# ---------------------------------------------------------------------------------------------------------------------
# Processes: each test in a process of its own, because forking one that has run anything else is not ours to defend.
# ---------------------------------------------------------------------------------------------------------------------


class Projected(torch.utils.data.Dataset):
    """A data set that projects: one item is a batch for a family, for Newton's method and for the active set."""

    def __init__(self) -> None:
        draw = Draw()
        self._points = draw.normal(6, 5, 12)
        rows = Polyhedron(G=draw.normal(6, 12), h=draw.uniform(0.1, 0.3, 6), lower=-0.4, upper=0.5)
        self._sets = (Polyhedron.simplex(12), _sectors(12), rows)

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> Tensor:
        point = self._points[index].clone().requires_grad_()
        found = [project(point, polyhedron) for polyhedron in self._sets]
        return torch.stack([*(x.detach() for x in found), *torch.autograd.grad([x[:, 0].sum() for x in found], point)])


def use_the_pool(worker: int = 0) -> None:
    """Have small work done by two threads; the initialisation of a worker."""
    torch.set_num_threads(2)
    _parallel._SERIAL_WORK = 0


def check_loaders(*methods: str) -> None:
    """Compare loaders with two workers with the data set itself, whose pool runs before the workers start."""
    use_the_pool()
    data = Projected()
    wanted = torch.stack([data[index] for index in range(len(data))])
    for method in methods:
        loader = torch.utils.data.DataLoader(
            data, batch_size=2, num_workers=2, multiprocessing_context=method, worker_init_fn=use_the_pool, timeout=120
        )
        assert_same_bits([torch.cat(list(loader))], [wanted], method)
    print("the workers agree")


def network() -> torch.nn.Module:
    """Return a small network with a projection whose budget is trained."""
    torch.manual_seed(SEED)
    coefficients = torch.nn.Parameter(Draw().uniform(0.5, 2, 6))
    layer = nn.Projection(Polyhedron.budget(6, coefficients, at_most=0.7, lower=-1.0, upper=1.0))
    return torch.nn.Sequential(torch.nn.Linear(3, 6), layer, torch.nn.Linear(6, 2)).to(D)


def train(model: torch.nn.Module, part: slice) -> list[Tensor]:
    """Take a few steps on part of the batch; return the parameters."""
    draw = Draw()
    inputs, targets = draw.normal(16, 3), draw.normal(16, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        optimizer.zero_grad()
        (model(inputs[part]) - targets[part]).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def train_distributed(rank: int, folder: str) -> None:
    """Train on every other item as one of two processes."""
    store = (Path(folder) / "store").as_uri()
    patience = timedelta(seconds=60)  # for a process that died
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    model = torch.nn.parallel.DistributedDataParallel(network())
    torch.save(train(model, slice(rank, None, 2)), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def start(command: str) -> subprocess.Popen[str]:
    """Run a line of this module in a process of its own."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    line = [sys.executable, "-c", f"import test_concurrency as here; here.{command}"]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Return what each printed; after two minutes, fail with the places where their threads are."""
    printed, errors = [], []
    for process in processes:
        with process:
            try:
                out, err = process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                out, err = process.communicate()
        printed.append(out.strip())
        if process.returncode != 0:
            errors.append(f"exit code {process.returncode}\n{err}")
    assert not errors, "\n".join(errors)
    return printed


def test_workers_of_data_loaders() -> None:
    methods = [name for name in ("fork", "spawn") if name in torch.multiprocessing.get_all_start_methods()]
    assert finish(start(f"check_loaders(*{methods!r})")) == ["the workers agree"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    ranks = [start(f"train_distributed({rank}, {str(tmp_path)!r})") for rank in range(2)]
    before = [parameter.detach().clone() for parameter in network().parameters()]
    wanted = train(network(), slice(None))
    finish(*ranks)
    for rank in range(2):
        for value, reference in zip(torch.load(tmp_path / f"{rank}.pt"), wanted, strict=True):
            torch.testing.assert_close(value, reference, rtol=0, atol=1e-12)
    for value, reference in zip(before, wanted, strict=True):  # every parameter was trained
        assert float((value - reference).abs().max()) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

#: What the process may grow by in the best of four rounds: the allocators take a few megabytes for themselves once in
#: a while, a leak takes its share in every round. 2,000 calls that kept 1 kB each, or one object each, are found.
ALLOWED_BYTES = 2**18
ALLOWED_OBJECTS = 50


def footprint() -> tuple[int, int]:
    """Return the resident bytes of this process and the objects Python watches."""
    gc.collect()
    resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(gc.get_objects())


def assert_no_growth(call: Callable[[], object], calls: int, warm: int = 300) -> None:
    for _ in range(warm):
        call()
    sizes = [footprint()]
    for _ in range(4):
        for _ in range(calls // 4):
            call()
        sizes.append(footprint())
    grown, left = (min(after - before for before, after in pairwise(values)) for values in zip(*sizes, strict=True))
    assert grown <= ALLOWED_BYTES, f"{calls // 4} calls take {grown} bytes"
    assert left <= ALLOWED_OBJECTS, f"{calls // 4} calls leave {left} objects"


linux = pytest.mark.skipif(not STATM.exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize(
    ("route", "calls"),
    [
        *((route, 2_000) for route in (budget, qp_per_item)),
        *(pytest.param(route, 10_000, marks=pytest.mark.nightly) for route in ROUTES),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_calls_leave_nothing_behind(route, calls: int) -> None:
    function, data = route(Draw(), 32, 12)
    cotangent = torch.ones_like(function(*data))

    def call() -> None:
        leaves = [tensor.clone().requires_grad_() for tensor in data]
        function(*leaves).backward(cotangent)

    assert_no_growth(call, calls)


@linux
@pytest.mark.parametrize("calls", [500, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_failing_calls_leave_nothing_behind(calls: int) -> None:
    """The error carries a traceback, the traceback frames, the frames data."""
    function, (points,) = rows_shared(Draw(), 32, 12)
    points = points.clone().requires_grad_()
    bad = torch.where(torch.arange(32) == 7, torch.nan, 1.0).to(D)[:, None]

    def call() -> None:
        with pytest.raises(SolveError):
            function(points * bad)

    assert_no_growth(call, calls)


@linux
@pytest.mark.parametrize("calls", [150, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_sets_that_are_made_anew_leave_nothing_behind(calls: int) -> None:
    """Each is analysed and factored; only so many are kept."""
    draw = Draw()
    points = draw.normal(8, 12)

    def call() -> None:
        polyhedron = Polyhedron(G=draw.normal(6, 12), h=draw.uniform(0.1, 0.3, 6), lower=-0.4, upper=0.5)
        project(points.clone().requires_grad_(), polyhedron).sum().backward()

    assert_no_growth(call, calls, warm=100)


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def _enters_or_leaves(frame: FrameType) -> bool:
    """Whether the line is a ``with``: a real interrupt waits until its context is closed, one from here would not."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def interrupt(call: Callable[[], object], line: int | None) -> int:
    """Call, raise KeyboardInterrupt from the n-th line of the library on; return how many lines were run."""
    library = str(Path(plan.__file__).parent)
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(library):
            return None
        if event == "line":
            lines += 1
            if line is not None and lines >= line and not _enters_or_leaves(frame):
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert line is not None
    finally:
        sys.settrace(before)
    return lines


@routes()
@pytest.mark.parametrize("when", ["first_call", "later_call"])
def test_an_interrupt_anywhere_leaves_the_set_usable(route, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the analysis, the solve or the backward pass, line by line as Python sees them."""
    batch, n = 6, 8
    function, data = route(Draw(), batch, n)
    wanted = evaluate(function, data, range(batch))

    def call() -> list[Tensor]:
        return evaluate(function, data, range(batch))

    def start_over() -> None:
        nonlocal function
        if when == "first_call":
            function = route(Draw(), batch, n)[0]
            forget(monkeypatch)

    start_over()
    count, places, interrupted = interrupt(call, None), 25, 0
    for place in range(places):
        start_over()
        line = 1 + place * count // places
        interrupted += interrupt(call, line) >= line
        assert_same_bits(call(), wanted, f"interrupted at line {line} of {count}")
    assert interrupted > places // 2  # which lines are run depends a little on what is found in memory


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_in_a_worker_reaches_the_caller_and_goes_no_further(
    worker: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(_parallel, "_SERIAL_WORK", 0)
    function, data = rows_shared(Draw(), *SMALL)
    wanted = evaluate(function, data, range(SMALL[0]))
    kernel = active_set.solve_items

    def failing(start: int, *arguments):
        if start == worker:
            raise error
        return kernel(start, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(active_set, "solve_items", failing)
        patch.setattr(_parallel, "_USED", {*_parallel._USED, id(failing)})
        with pytest.raises(error):
            function(*data)
    assert_same_bits(evaluate(function, data, range(SMALL[0])), wanted)


def test_an_interrupt_while_the_pool_works(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """The caller gives up, the worker goes on for a while with arrays that nobody else has."""
    torch.set_num_threads(2)
    monkeypatch.setattr(_parallel, "_SERIAL_WORK", 0)
    function, data = rows_shared(Draw(), *SMALL)
    wanted = evaluate(function, data, range(SMALL[0]))
    kernel = active_set.solve_items
    caught, finished = threading.Event(), threading.Event()

    def slow(start: int, *arguments):
        if start == 1:
            interrupt_main()
            caught.wait(timeout=60)
            kernel(start, *arguments)
            finished.set()
        return kernel(start, *arguments)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(active_set, "solve_items", slow)
            patch.setattr(_parallel, "_USED", {*_parallel._USED, id(slow)})
            with pytest.raises(KeyboardInterrupt):
                function(*data)
    finally:
        signal.signal(signal.SIGINT, handler)
    caught.set()
    assert_same_bits(evaluate(function, data, range(SMALL[0])), wanted)
    assert finished.wait(timeout=60)
    assert_same_bits(evaluate(function, data, range(SMALL[0])), wanted)
