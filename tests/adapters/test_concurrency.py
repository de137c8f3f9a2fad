"""Our cvxpylayers layer: the same numbers whatever the split, the threads and the processes; nothing left behind."""

from __future__ import annotations

import gc
import linecache
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
import torch
from program_table import TABLE

from hsbackend import SolveError, _parallel
from hsbackend.adapters.cvxpylayers import CvxpyLayer
from hsbackend.solvers import active_set

STATM = Path("/proc/self/statm")
BATCHES = 5  # of three items each


def _portfolio():
    """Diagonal risk, sectors and caps: Newton's method."""
    x, mu = cp.Variable(12), cp.Parameter(12)
    sectors = np.kron(np.eye(4), np.ones(3))
    risk = cp.sum(cp.multiply(np.linspace(0.5, 1.5, 12), cp.square(x)))
    constraints = [cp.sum(x) == 1, x >= 0, x <= 0.3, sectors @ x <= 0.4]
    draw = lambda rng: [0.1 * rng.standard_normal((3, 12))]  # noqa: E731
    return cp.Problem(cp.Maximize(mu @ x - 0.5 * risk), constraints), [mu], [x], draw


#: Name and solver of what covers every route of the layer.
ROUTES = {
    "sum_squares_simplex": "families",
    "weighted_squares": "families",
    "norm1_ball": "families",
    "monotone": "families",
    "birkhoff": "families",
    "parameter_in_objective_and_constraint": "families",
    "dual_of_bounds": "families",
    "portfolio_diagonal": "semismooth_newton",
    "rows_redundant": "semismooth_newton",
    "portfolio": "active_set",
    "inequality_constant_matrix": "active_set",
    "dual_of_inequality": "active_set",
    "lasso": "active_set",
    "huber_loss": "active_set",
    "quad_form_parameter": "active_set",
    "inequality_parameter_matrix": "active_set",
    "everything_a_parameter": "active_set",
    "definition_with_parameter_coefficient": "families",
    "linear_program": "active_set",
    "cost_on_some_variables": "active_set",
    "median": "active_set",
    "control_with_a_singular_input_cost": "active_set",
}
#: Every item has matrices of its own.
PER_ITEM = ("quad_form_parameter", "inequality_parameter_matrix", "everything_a_parameter")


def build(name):
    """Return a layer and the values of its parameters, a batch of ``3 * BATCHES`` items."""
    problem, parameters, variables, draw = _portfolio() if name == "portfolio_diagonal" else TABLE[name].build()
    drawn = [draw(np.random.default_rng(seed)) for seed in range(BATCHES)]
    values = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*drawn, strict=True)]
    return CvxpyLayer(problem, parameters, variables), values


def evaluate(layer, values, items, **keywords):
    """Return outputs and gradients of some items; cotangents belong to the item."""
    items = list(items)
    leaves = [value[items].requires_grad_() for value in values]
    outputs = layer(*leaves, **keywords)
    loss = 0.0
    for out in outputs:
        cotangents = np.stack([np.random.default_rng(item).standard_normal(out.shape[1:]) for item in items])
        loss = loss + (torch.from_numpy(cotangents) * out).sum()
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, leaves)]


def in_pieces(layer, values, size):
    batch = len(values[0])
    pieces = [evaluate(layer, values, range(i, min(i + size, batch))) for i in range(0, batch, size)]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def assert_same_bits(found, wanted, what=""):
    for index, (value, reference) in enumerate(zip(found, wanted, strict=True)):
        difference = float((value - reference).abs().max())
        assert torch.equal(value, reference), f"{what}: tensor {index} differs by up to {difference:.1e}"


def assert_close(found, wanted, relative):
    for value, reference in zip(found, wanted, strict=True):
        floor = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(value, reference, rtol=0, atol=relative * floor)


routes = pytest.mark.parametrize("name", list(ROUTES))


@pytest.fixture
def threads():
    """Restore torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool(threads, monkeypatch):
    """Send everything through our thread pool."""
    torch.set_num_threads(2)
    monkeypatch.setattr(_parallel, "_SERIAL_WORK", 0)


# --- determinism


@routes
def test_repeated_calls_and_thread_counts_give_the_same_bits(name, pool):
    layer, values = build(name)
    assert layer.explain().solver == ROUTES[name]
    items = range(len(values[0]))
    wanted = evaluate(layer, values, items)
    for count in (1, 2, 4, 2):
        torch.set_num_threads(count)
        assert_same_bits(evaluate(layer, values, items), wanted, f"{count} threads")


@routes
def test_pieces_and_other_orders_give_the_same_bits(name, pool):
    layer, values = build(name)
    batch = len(values[0])
    wanted = evaluate(layer, values, range(batch))
    order = np.random.default_rng(0).permutation(batch)
    found = evaluate(layer, values, order)
    assert_same_bits([tensor[np.argsort(order)] for tensor in found], wanted, "permuted")
    for size in (2, 3, 7):
        assert_same_bits(in_pieces(layer, values, size), wanted, f"pieces of {size}")


@routes
def test_a_single_item_has_the_bits_it_has_in_a_batch(name, pool):
    layer, values = build(name)
    assert_same_bits(in_pieces(layer, values, 1), evaluate(layer, values, range(len(values[0]))))


@pytest.mark.parametrize("name", PER_ITEM)
def test_an_item_without_batch_axes_has_the_bits_it_has_in_a_batch(name, pool):
    layer, values = build(name)
    wanted = evaluate(layer, values, range(len(values[0])))
    for item in range(len(values[0])):
        leaves = [value[item].requires_grad_() for value in values]
        (out,) = layer(*leaves)
        cotangent = torch.from_numpy(np.random.default_rng(item).standard_normal(out.shape))
        found = [out.detach(), *torch.autograd.grad((cotangent * out).sum(), leaves)]
        assert_same_bits(found, [tensor[item] for tensor in wanted], f"item {item}")


@pytest.mark.parametrize("name", PER_ITEM)
def test_matrices_given_once_give_the_same_bits_in_every_piece(name, pool):
    layer, values = build(name)
    matrices = {index: value[0] for index, value in enumerate(values) if value.dim() > 2}

    def solve(items):
        leaves = [matrices.get(index, value[items]).clone().requires_grad_() for index, value in enumerate(values)]
        (out,) = layer(*leaves)
        vectors = [leaf for index, leaf in enumerate(leaves) if index not in matrices]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), vectors)]

    batch = len(values[0])
    wanted = solve(range(batch))
    for size in (1, 2, 7):
        pieces = [solve(range(begin, min(begin + size, batch))) for begin in range(0, batch, size)]
        assert_same_bits([torch.cat(parts) for parts in zip(*pieces, strict=True)], wanted, f"pieces of {size}")


def test_an_entry_with_two_parameters_is_added_up_in_one_order(pool):
    """Whichever of them is batched: the sum of three numbers depends on the order."""
    x, first, second = cp.Variable(4), cp.Parameter(4), cp.Parameter(4)
    shift = np.array([0.1, 0.2, 0.3, 0.7])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x == first + second + shift])
    layer = CvxpyLayer(problem, [first, second], [x])
    rng = np.random.default_rng(0)
    many, one = torch.from_numpy(rng.standard_normal((9, 4))), torch.from_numpy(rng.standard_normal(4))
    for values in ([many, one], [one, many]):
        full = [value.expand(9, 4).contiguous() for value in values]
        (wanted,) = layer(*full)
        assert_same_bits(layer(*values), [wanted])
        for item in range(9):
            assert_same_bits(layer(*(value[item] for value in full)), [wanted[item]], f"item {item}")


def test_the_gradient_of_a_shared_vector_does_not_depend_on_the_thread_count(pool):
    layer, values = build("parameter_in_objective_and_constraint")
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaves = [values[0], *(value[0].clone() for value in values[1:])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        found.append(torch.autograd.grad(layer(*leaves)[0].square().sum(), leaves))
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("name", PER_ITEM)
def test_the_gradient_of_a_shared_matrix_does_not_depend_on_the_thread_count(name, pool):
    layer, values = build(name)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaves = [value[0].clone() if value.dim() > 2 else value.clone() for value in values]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        found.append(torch.autograd.grad(layer(*leaves)[0].square().sum(), leaves))
    assert_same_bits(found[1], found[0])


# --- threads


@routes
@pytest.mark.parametrize("kind", ["one_layer", "one_layer_each"])
def test_four_threads_get_what_one_gets(name, kind, pool):
    """The layers are used for the first time by all four at once."""
    reference, values = build(name)
    parts = [range(i, i + 3) for i in range(0, 12, 3)]
    wanted = [evaluate(reference, values, part) for part in parts]
    layers = [build(name)[0]] * 4 if kind == "one_layer" else [build(name)[0] for _ in parts]
    together = threading.Barrier(4)

    def work(caller):
        together.wait(timeout=60)
        return [evaluate(layers[caller], values, parts[caller]) for _ in range(5)]

    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(work, range(4)))
    for caller in range(4):
        for one in found[caller]:
            assert_same_bits(one, wanted[caller], f"caller {caller}")


@pytest.mark.parametrize("name", ["portfolio", "lasso", "everything_a_parameter"])
def test_warm_starts_of_four_threads_do_not_mix(name, pool):
    """Each starts from what another one found last: other numbers of steps, the same answer."""
    layer, values = build(name)
    parts = [range(i, i + 3) for i in range(0, 12, 3)]
    wanted = [evaluate(layer, values, part) for part in parts]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(10):
            found = executor.map(lambda part: evaluate(layer, values, part, warm_start=True), parts)
            for one, reference in zip(found, wanted, strict=True):
                assert_close(one, reference, 1e-9)


# --- processes


class Projected(torch.utils.data.Dataset):
    """A data set whose items are solutions and gradients of three layers."""

    def __init__(self):
        self._layers = [build(name) for name in ("sum_squares_simplex", "portfolio_diagonal", "portfolio")]

    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        items = range(3 * index, 3 * index + 3)
        found = [tensor for layer, values in self._layers for tensor in evaluate(layer, values, items)]
        return torch.cat([tensor.flatten() for tensor in found])


def use_the_pool(worker=0):
    """Have small work done by two threads; the initialisation of a worker."""
    torch.set_num_threads(2)
    _parallel._SERIAL_WORK = 0


def check_loaders(*methods):
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


class Network(torch.nn.Module):
    """A linear map, a layer, a linear map."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        x, y, limit = cp.Variable(6), cp.Parameter(6), cp.Parameter()
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [np.ones(6) @ x <= limit, cp.abs(x) <= 1])
        self.first, self.last = torch.nn.Linear(3, 6).double(), torch.nn.Linear(6, 2).double()
        self.limit = torch.nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))
        self.layer = CvxpyLayer(problem, [y, limit], [x])

    def forward(self, inputs):
        return self.last(self.layer(self.first(inputs), self.limit)[0])


def train(model, part):
    """Take a few steps on part of the batch; return the parameters."""
    rng = np.random.default_rng(0)
    inputs, targets = (torch.from_numpy(rng.standard_normal((16, size))) for size in (3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        optimizer.zero_grad()
        (model(inputs[part]) - targets[part]).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def train_distributed(rank, folder):
    """Train on every other item as one of two processes."""
    store = (Path(folder) / "store").as_uri()
    patience = timedelta(seconds=60)  # for a process that died
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    model = torch.nn.parallel.DistributedDataParallel(Network())
    torch.save(train(model, slice(rank, None, 2)), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def start(command):
    """Run a line of this module in a process of its own."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    line = [sys.executable, "-c", f"import test_concurrency as here; here.{command}"]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
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


def test_workers_of_data_loaders():
    """Forked and spawned: in a process of its own, because JAX objects to forks."""
    methods = [name for name in ("fork", "spawn") if name in torch.multiprocessing.get_all_start_methods()]
    assert finish(start(f"check_loaders(*{methods!r})")) == ["the workers agree"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_train_what_one_trains(tmp_path):
    ranks = [start(f"train_distributed({rank}, {str(tmp_path)!r})") for rank in range(2)]
    before = [parameter.detach().clone() for parameter in Network().parameters()]
    wanted = train(Network(), slice(None))
    finish(*ranks)
    for rank in range(2):
        for value, reference in zip(torch.load(tmp_path / f"{rank}.pt"), wanted, strict=True):
            torch.testing.assert_close(value, reference, rtol=0, atol=1e-12)
    for value, reference in zip(before, wanted, strict=True):  # every parameter was trained
        assert float((value - reference).abs().max()) > 1e-3


# --- memory

#: What the process may grow by in the best of four rounds: the allocators take a few megabytes for themselves once in
#: a while, a leak takes its share in every round. 2,000 calls that kept 1 kB each, or one object each, are found.
ALLOWED_BYTES = 2**18
ALLOWED_OBJECTS = 50


def footprint():
    """Return the resident bytes of this process and the objects Python watches."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects())


@pytest.mark.skipif(not STATM.exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        *((name, 2_000) for name in ("portfolio_diagonal", "portfolio")),
        *(pytest.param(name, 10_000, marks=pytest.mark.nightly) for name in ROUTES),
    ],
)
@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
def test_calls_leave_nothing_behind(name, calls, warm_start):
    layer, values = build(name)
    values = [torch.cat([value, value]) for value in values]

    def run(times):
        for _ in range(times):
            leaves = [value.clone().requires_grad_() for value in values]
            outputs = layer(*leaves, warm_start=warm_start)
            torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])

    run(300)
    sizes = [footprint()]
    for _ in range(4):
        run(calls // 4)
        sizes.append(footprint())
    grown, left = (np.diff(values).min() for values in zip(*sizes, strict=True))
    assert grown <= ALLOWED_BYTES, f"{calls // 4} calls take {grown} bytes"
    assert left <= ALLOWED_OBJECTS, f"{calls // 4} calls leave {left} objects"


# --- faults


def _enters_or_leaves(frame):
    """Whether the line is a ``with``: a real interrupt waits until its context is closed, one from here would not."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def interrupt(call, line):
    """Call, raise KeyboardInterrupt from the n-th line of the library on; return how many lines were run."""
    library = str(Path(_parallel.__file__).parents[1])
    folders = tuple(os.path.join(library, name) for name in ("hsbackend", "adapters"))
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(folders):
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


@routes
@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
def test_an_interrupt_anywhere_leaves_the_layer_usable(name, warm_start):
    """In the solve or the backward pass, line by line as Python sees them."""
    layer, values = build(name)
    wanted = evaluate(layer, values, range(6))

    def call():
        return evaluate(layer, values, range(6), warm_start=warm_start)

    count, places, interrupted = interrupt(call, None), 25, 0
    for place in range(places):
        line = 1 + place * count // places
        interrupted += interrupt(call, line) >= line
        assert_close(call(), wanted, 1e-9)
        assert_same_bits(evaluate(layer, values, range(6)), wanted, f"interrupted at line {line} of {count}")
        assert layer.status.tolist() == [0] * 6
    assert interrupted > places // 2


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, FloatingPointError])
@pytest.mark.parametrize("worker", [0, 1])
def test_an_error_in_a_worker_reaches_the_caller_and_goes_no_further(worker, error, pool, monkeypatch):
    layer, values = build("portfolio")
    wanted = evaluate(layer, values, range(15))
    kernel = active_set.solve_items

    def failing(start, *arguments):
        if start == worker:
            raise error
        return kernel(start, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(active_set, "solve_items", failing)
        patch.setattr(_parallel, "_USED", {*_parallel._USED, id(failing)})
        with pytest.raises(error):
            layer(*values)
    assert_same_bits(evaluate(layer, values, range(15)), wanted)


@routes
def test_a_failing_call_leaves_the_layer_usable(name):
    layer, values = build(name)
    wanted = evaluate(layer, values, range(6))
    spoilt = [value.clone() for value in values]
    for value in spoilt:
        value[2] = torch.nan
    with pytest.raises(SolveError, match="item 2"):
        evaluate(layer, spoilt, range(6), warm_start=True)
    assert layer.status.tolist()[2] != 0
    found = evaluate(layer, spoilt, range(6), solver_args={"on_failure": "nan"})
    others = [0, 1, 3, 4, 5]
    assert_close([tensor[others] for tensor in found], [tensor[others] for tensor in wanted], 1e-12)
    assert bool(found[0][2].isnan().all())
    assert_same_bits(evaluate(layer, values, range(6)), wanted)
