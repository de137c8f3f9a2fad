"""Options have effect, and what should have none has none."""

import copy
import io
import pickle
import threading

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer as StockLayer
from layer_harness import LAYERS, assert_close, make_layer, run, tensors
from program_table import TABLE, truth

from hsbackend import HSBackend
from hsbackend.adapters.cvxpylayers import CvxpyLayer, IgnoredOptionWarning


def _simplex(n=3):
    x, y = cp.Variable(n), cp.Parameter(n)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0]), [y], [x]


# --- which Jacobian

# The third coordinate is zero and its multiplier is zero: it belongs to the active set, not to the support.
DEGENERATE = np.array([0.5, 0.5, 0.0])
JACOBIANS = {
    "active": np.array([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]]),
    "support": np.eye(3) - np.ones((3, 3)) / 3,
}


def _jacobian(layer, **keywords):
    y = torch.tensor(DEGENERATE, requires_grad=True)
    (out,) = layer(y, **keywords)
    return np.stack([torch.autograd.grad(out[i], y, retain_graph=True)[0].numpy() for i in range(3)])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("choice", JACOBIANS)
def test_jacobian_at_a_degenerate_point(kind, choice):
    assert_close(_jacobian(make_layer(kind, *_simplex(), jacobian=choice)), JACOBIANS[choice], 1e-10, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_active_is_the_default(kind):
    assert_close(_jacobian(make_layer(kind, *_simplex())), JACOBIANS["active"], 1e-10, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_call_may_choose_the_jacobian(kind):
    layer = make_layer(kind, *_simplex())
    assert_close(_jacobian(layer, solver_args={"jacobian": "support"}), JACOBIANS["support"], 1e-10, 1.0)
    assert_close(_jacobian(layer), JACOBIANS["active"], 1e-10, 1.0)


@pytest.mark.parametrize("name", ["sum_squares_simplex", "inequality_constant_matrix", "birkhoff", "portfolio"])
def test_the_choice_makes_no_difference_where_strict_complementarity_holds(name):
    point = truth(name)
    gradients = []
    for choice in JACOBIANS:
        problem, parameters, variables, _ = TABLE[name].build()
        layer = make_layer("ours", problem, parameters, variables, jacobian=choice)
        gradients.append(run(layer, point.values, point.cotangents)[1])
    for active, support in zip(*gradients, strict=True):
        assert_close(active, support, 1e-12, 1e-2)


# --- options given to the constructor, and to a call


def test_constructor_solver_args():
    """The layer's own `solver_args` are defaults of its calls."""
    x, h = cp.Variable(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x)), [x >= 1, x <= h])
    layer = CvxpyLayer(problem, [h], [x], solver_args={"on_failure": "nan"})
    (out,) = layer(torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert_close(out[0], np.array(1.0), 1e-10, 1.0)
    assert out[1].isnan()
    with pytest.raises(RuntimeError, match="item 1: infeasible"):
        layer(torch.tensor([2.0, 0.0], dtype=torch.float64), solver_args={"on_failure": "raise"})


def test_constructor_solver_args_are_checked():
    with pytest.raises(ValueError, match="tolerence"):
        CvxpyLayer(*_simplex(), solver_args={"tolerence": 1e-6})


@pytest.mark.parametrize("tolerance", [1e-4, 1e-9, 1e-12])
def test_every_tolerance_is_kept(tolerance):
    point = truth("everything_a_parameter")
    problem, parameters, variables, _ = TABLE["everything_a_parameter"].build()
    layer = make_layer("ours", problem, parameters, variables, tolerance=tolerance)
    (out,) = layer(*tensors(point.values))
    assert_close(out, point.outputs[0], 10 * max(tolerance, 1e-12), 1.0, f"seed {point.seed}")


def test_an_unreachable_tolerance_is_reported():
    """Nobody computes to 1e-40: the item is NaN with a status, or an error; `tolerance` has effect."""
    point = truth("everything_a_parameter")
    problem, parameters, variables, _ = TABLE["everything_a_parameter"].build()
    layer = make_layer("ours", problem, parameters, variables)
    with pytest.raises(RuntimeError, match="tolerance"):
        layer(*tensors(point.values), solver_args={"tolerance": 1e-40})


def test_a_solver_asked_for_by_name_is_never_replaced():
    layer = CvxpyLayer(*_simplex(), solver="DIFFCP")
    assert not layer.explain().polyhedral
    assert "DIFFCP" in str(layer.explain())
    assert_close(layer(torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64))[0], np.array([0.7, 0.3, 0.0]), 1e-4, 1.0)
    with pytest.raises((cp.error.SolverError, RuntimeError), match="NONSENSE"):
        CvxpyLayer(*_simplex(), solver="NONSENSE")


@pytest.mark.parametrize("kind", LAYERS)
def test_arguments_of_the_default_solver_are_named_as_ignored(kind):
    """Existing code passes them; they must neither break it nor be swallowed in silence."""
    layer = make_layer(kind, *_simplex())
    with pytest.warns(IgnoredOptionWarning, match="solve_method"):
        (out,) = layer(torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64), solver_args={"solve_method": "Clarabel"})
    assert_close(out, np.array([0.7, 0.3, 0.0]), 1e-10, 1.0)


def test_arguments_of_the_default_solver_reach_it():
    """A cone program and one iteration of SCS: visibly not the answer."""
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm(x) <= 1])
    layer = make_layer("ours", problem, [y], [x])
    point = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
    exact = point / point.norm()
    errors = []
    for arguments in ({"solve_method": "SCS", "eps": 1e-9}, {"solve_method": "SCS", "eps": 0.3}):
        (out,) = layer(point, solver_args=arguments)
        errors.append((out - exact).abs().max().item())
    assert errors[0] < 1e-6 < errors[1]


# --- warm start


@pytest.mark.parametrize("name", ["sum_squares_simplex", "everything_a_parameter", "birkhoff", "portfolio"])
def test_warm_start_gives_the_same_answer(name):
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    layer = make_layer("ours", problem, parameters, variables)
    rng = np.random.default_rng(point.seed)
    layer(*tensors([v + 0.01 * rng.standard_normal(v.shape) for v in point.values]), warm_start=True)
    outputs, gradients = run(layer, point.values, point.cotangents, warm_start=True)
    for out, expected in zip(outputs, point.outputs, strict=True):
        assert_close(out, expected, 1e-8, 1e-2, f"seed {point.seed}")
    for gradient, expected in zip(gradients, point.gradients, strict=True):
        assert_close(gradient, expected, 1e-6, 1e-2, f"seed {point.seed}")


def test_warm_start_after_another_batch_size_and_after_a_failure():
    x, y, cap = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0, x <= cap])
    layer = make_layer("ours", problem, [y, cap], [x], on_failure="nan")
    points = np.random.default_rng(0).standard_normal((5, 3))
    layer(*tensors([points, np.full(5, 0.6)]), warm_start=True)
    layer(*tensors([points[:2], np.array([0.6, 0.1])]), warm_start=True)
    (warm,) = layer(*tensors([points[:2], np.full(2, 0.6)]), warm_start=True)
    (cold,) = layer(*tensors([points[:2], np.full(2, 0.6)]))
    assert_close(warm, cold, 1e-10, 1.0)


# --- one backend, several layers; one layer, several calls


@pytest.mark.parametrize("layer_class", [CvxpyLayer, StockLayer], ids=LAYERS)
def test_one_backend_serves_several_layers(layer_class):
    """Also layers of equal shape, in turn, with the backward passes after all forward passes."""
    backend = HSBackend()
    names = ["sum_squares_simplex", "bound_two_sided", "everything_a_parameter", "half_sum_squares_minus_linear"]
    layers, results = {}, {}
    for name in names:
        problem, parameters, variables, _ = TABLE[name].build()
        layers[name] = layer_class(problem, parameters, variables, solver=backend)
    for name in names:
        params = tensors(truth(name).values)
        results[name] = params, layers[name](*params)
    for name in reversed(names):
        point, (params, outputs) = truth(name), results[name]
        loss = sum((torch.tensor(c) * out).sum() for c, out in zip(point.cotangents, outputs, strict=True))
        gradients = torch.autograd.grad(loss, params)
        for out, expected in zip(outputs, point.outputs, strict=True):
            assert_close(out, expected, 1e-8, 1e-2, name)
        for gradient, expected in zip(gradients, point.gradients, strict=True):
            assert_close(gradient, expected, 1e-6, 1e-2, name)


@pytest.mark.parametrize("kind", LAYERS)
def test_backward_after_another_forward(kind):
    """The second call must not overwrite what the first one's backward needs; batch sizes differ on purpose."""
    layer = make_layer(kind, *_simplex())
    first, second = tensors([np.array([[0.8, 0.4, -1.0], [2.0, 0, 0]]), np.array([0.1, 0.2, 0.9])])
    (out_first,), (out_second,) = layer(first), layer(second)
    out_first[0, 0].backward()
    out_second[0].backward()
    assert_close(first.grad, np.array([[0.5, -0.5, 0], [0, 0, 0]]), 1e-10, 1.0)
    assert_close(second.grad, np.array([2.0, -1.0, -1.0]) / 3, 1e-10, 1.0)


def test_backward_twice_with_retain_graph():
    layer = make_layer("ours", *_simplex())
    (y,) = tensors([np.array([0.8, 0.4, -1.0])])
    (out,) = layer(y)
    once, twice = (torch.autograd.grad(out[0], y, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


def test_second_derivative_is_an_error():
    """As in the stock layer: asking twice is refused, never answered with what is missing left out."""
    layer = make_layer("ours", *_simplex())
    (y,) = tensors([np.array([0.8, 0.4, -1.0])])
    (gradient,) = torch.autograd.grad(layer(y)[0].square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient.square().sum() + y.square().sum()).backward()


def test_same_input_same_bits():
    point = truth("everything_a_parameter")
    problem, parameters, variables, _ = TABLE["everything_a_parameter"].build()
    layer = make_layer("ours", problem, parameters, variables)
    (first,), (second,) = (layer(*tensors(point.values)) for _ in range(2))
    assert torch.equal(first, second)


def test_threads_share_a_layer():
    """Two Python threads in one layer at once: same results as one after the other."""
    layer = make_layer("ours", *_simplex())
    batches = np.random.default_rng(0).standard_normal((4, 200, 3))
    expected = [layer(torch.tensor(b))[0] for b in batches]
    found = [None] * len(batches)

    def work(i):
        for _ in range(10):
            found[i] = layer(torch.tensor(batches[i]))[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for out, value in zip(found, expected, strict=True):
        assert_close(out, value, 1e-12, 1.0)


# --- copies


def _copied(how, layer):
    if how == "deepcopy":
        return copy.deepcopy(layer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_works_like_the_original(how):
    point = truth("portfolio")
    problem, parameters, variables, _ = TABLE["portfolio"].build()
    layer = make_layer("ours", problem, parameters, variables)
    run(layer, point.values, point.cotangents)
    outputs, gradients = run(_copied(how, layer), point.values, point.cotangents)
    assert_close(outputs[0], point.outputs[0], 1e-8, 1e-2)
    assert_close(gradients[0], point.gradients[0], 1e-6, 1e-2)


def test_backend_survives_pickling():
    backend = pickle.loads(pickle.dumps(HSBackend(jacobian="support")))
    assert_close(_jacobian(CvxpyLayer(*_simplex(), solver=backend)), JACOBIANS["support"], 1e-10, 1.0)


def test_checkpoint_of_the_stock_layer_loads():
    """A model saved with the stock layer inside, which keeps its matrices as buffers, loads with ours inside."""
    stock = torch.nn.Sequential(torch.nn.Linear(2, 3), StockLayer(*_simplex()))
    ours = torch.nn.Sequential(torch.nn.Linear(2, 3), CvxpyLayer(*_simplex()))
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours[0].weight, stock[0].weight)
    ours.load_state_dict(ours.state_dict())


# --- the user's problem, and torch's switches


@pytest.mark.parametrize("name", ["sum_squares_simplex", "birkhoff", "bound_several_on_one", "portfolio", "lasso"])
def test_the_problem_is_left_as_it_was(name):
    """After using a layer the parameters keep their values, and `problem.solve()` finds the right point."""
    point = truth(name)
    problem, parameters, variables, _ = TABLE[name].build()
    values = [v[0] for v in point.values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value
    layer = make_layer("ours", problem, parameters, variables)
    layer(*tensors([v[1:] for v in point.values]))
    for parameter, value in zip(parameters, values, strict=True):
        assert np.array_equal(parameter.value, value)
    problem.solve(solver=cp.CLARABEL)
    for variable, expected in zip(variables, point.outputs, strict=True):
        assert_close(variable.value, expected[0], 1e-3, 1.0, f"seed {point.seed}")


def test_two_layers_from_one_problem():
    problem, parameters, variables, _ = TABLE["portfolio"].build()
    point = truth("portfolio")
    for kind in ("ours", "ours"):
        outputs, gradients = run(make_layer(kind, problem, parameters, variables), point.values, point.cotangents)
        assert_close(outputs[0], point.outputs[0], 1e-8, 1e-2)
        assert_close(gradients[0], point.gradients[0], 1e-6, 1e-2)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_grad(kind):
    layer = make_layer(kind, *_simplex())
    y = torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        (out,) = layer(y)
    assert not out.requires_grad
    assert_close(out, np.array([0.7, 0.3, 0.0]), 1e-10, 1.0)


def test_inference_mode():
    layer = make_layer("ours", *_simplex())
    with torch.inference_mode():
        (out,) = layer(torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64))
    assert_close(out, np.array([0.7, 0.3, 0.0]), 1e-10, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_that_require_no_gradient(kind):
    """Only some do: those get their gradient, the others stay without, and without any the output needs none."""
    point = truth("bound_parameters")
    problem, parameters, variables, _ = TABLE["bound_parameters"].build()
    layer = make_layer(kind, problem, parameters, variables)
    y, lower, upper = tensors(point.values, requires_grad=False)
    upper.requires_grad_()
    (out,) = layer(y, lower, upper)
    (torch.tensor(point.cotangents[0]) * out).sum().backward()
    assert_close(upper.grad, point.gradients[2], 1e-6, 1e-2, f"seed {point.seed}")
    assert y.grad is None
    assert lower.grad is None
    (out,) = layer(y, lower, upper.detach())
    assert not out.requires_grad


@pytest.mark.parametrize("kind", LAYERS)
def test_strided_and_expanded_inputs(kind):
    """A transposed and an expanded tensor: same numbers, other strides."""
    layer = make_layer(kind, *_simplex())
    points = np.random.default_rng(0).standard_normal((3, 4))
    transposed = torch.tensor(points).T.detach().requires_grad_()
    (out,) = layer(transposed)
    (expected,) = layer(torch.tensor(np.ascontiguousarray(points.T)))
    assert_close(out, expected, 1e-14, 1.0)
    out[:, 0].sum().backward()
    assert transposed.grad.shape == (4, 3)
    (out,) = layer(torch.tensor(points[0, :3]).expand(5, 3))
    assert_close(out, layer(torch.tensor(points[0, :3]))[0].expand(5, 3), 1e-12, 1.0)


def test_non_leaf_inputs_inside_a_network():
    """End to end: a linear layer learns to make the projection hit a target."""
    torch.manual_seed(0)
    layer = make_layer("ours", *_simplex(4))
    network = torch.nn.Linear(2, 4).double()
    features, target = torch.randn(16, 2, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        (out,) = layer(network(features))
        loss = (out - target).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_gradcheck():
    """torch's own check, every parameter at once, at a point with a margin."""
    point = truth("everything_a_parameter")
    problem, parameters, variables, _ = TABLE["everything_a_parameter"].build()
    layer = make_layer("ours", problem, parameters, variables)
    params = tensors([v[:1] for v in point.values])
    assert torch.autograd.gradcheck(lambda *p: layer(*p)[0], params, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_default_dtype_is_ignored():
    """The type of the input decides, not torch's default."""
    layer = make_layer("ours", *_simplex())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        (single,) = layer(torch.tensor([0.8, 0.4, -1.0], dtype=torch.float32))
        torch.set_default_dtype(torch.float32)
        (double,) = layer(torch.tensor([0.8, 0.4, -1.0], dtype=torch.float64))
    finally:
        torch.set_default_dtype(before)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
