"""Items without a solution, malformed input, empty and large batches: a word about each, no effect on the others."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from layer_harness import LAYERS, assert_close, make_layer, run, tensors

import hsbackend
from hsbackend import SolveError, Status
from oracles import TightSolver

N = 4


def _capped():
    """Distance to y over {sum(x) = 1, 0 <= x <= cap}, which is empty when cap < 1/4."""
    x, y, cap = cp.Variable(N), cp.Parameter(N), cp.Parameter()
    constraints = [x >= 0, cp.sum(x) == 1, x <= cap]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), [y, cap], [x]


POINTS = np.array([[0.9, 0.3, -0.2, 0.15], [0.1, 0.7, 0.4, -0.9], [-0.3, 0.2, 1.5, 0.3], [0.5, 0.6, 0.7, -0.8]])
CAPS = np.array([0.5, 0.1, 0.6, 0.2])
GOOD, BAD = [0, 2], [1, 3]
COTANGENT = np.random.default_rng(0).standard_normal((4, N))


def _good_truth():
    solver = TightSolver(*_capped())
    items = [solver.solve([POINTS[i], CAPS[i]]) for i in GOOD]
    gradients = [item.vjp([COTANGENT[i]]) for item, i in zip(items, GOOD, strict=True)]
    return np.stack([item.outputs[0] for item in items]), [np.stack(g) for g in zip(*gradients, strict=True)]


# --- infeasible items


@pytest.mark.parametrize("kind", LAYERS)
def test_infeasible_items_raise_by_default(kind):
    layer = make_layer(kind, *_capped())
    with pytest.raises(SolveError, match=r"item 1: infeasible.*item 3: infeasible") as caught:
        layer(*tensors([POINTS, CAPS]))
    status = [Status(int(s)) for s in caught.value.status]
    assert status == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED, Status.INFEASIBLE]


@pytest.mark.parametrize("kind", LAYERS)
def test_message_names_the_rows_in_conflict(kind):
    """Two rows of a constraint cannot hold together; the others have nothing to do with it."""
    x, h = cp.Variable(3), cp.Parameter(4)
    G = np.array([[0.0, 1, 0], [1, 1, 0], [0, 0, 1], [-1, -1, 0]])
    # An objective without auxiliary variables, so that the canonical rows are the rows of G.
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) - cp.sum(x)), [G @ x <= h])
    layer = make_layer(kind, problem, [h], [x])
    with pytest.raises(SolveError, match=r"item 1: infeasible, .*\b1\b.* and .*\b3\b.* conflict"):
        layer(torch.tensor([[5.0, 1, 5, 1], [5.0, 1, 5, -2]], dtype=torch.float64))


@pytest.mark.parametrize("kind", LAYERS)
def test_infeasible_items_become_nan_on_request(kind):
    """The good items have the right values and gradients; the bad ones have neither."""
    expected, expected_gradients = _good_truth()
    (out,), gradients = run(make_layer(kind, *_capped(), on_failure="nan"), [POINTS, CAPS], [COTANGENT])
    assert_close(out[GOOD], expected, 1e-8, 1.0)
    assert out[BAD].isnan().all()
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient[GOOD], value, 1e-6, 1.0)
        assert gradient[BAD].isnan().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_shared_gradient_of_a_loss_over_the_good_items(kind):
    """A loss that leaves the bad items out has a gradient for what all items share."""
    x, y, shift, cap = cp.Variable(N), cp.Parameter(N), cp.Parameter(N), cp.Parameter()
    constraints = [x >= 0, cp.sum(x) == 1, x <= cap]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y - shift)), constraints)
    layer = make_layer(kind, problem, [y, shift, cap], [x], on_failure="nan")
    y_t, shift_t, cap_t = tensors([POINTS, np.zeros(N), CAPS])
    (out,) = layer(y_t, shift_t, cap_t)
    (out[GOOD] * torch.tensor(COTANGENT[GOOD])).sum().backward()
    _, (of_points, of_caps) = _good_truth()
    assert_close(y_t.grad[GOOD], of_points, 1e-6, 1.0)
    assert_close(cap_t.grad[GOOD], of_caps, 1e-6, 1.0)
    assert_close(shift_t.grad, of_points.sum(0), 1e-6, 1.0)


def test_status_of_the_last_call():
    layer = make_layer("ours", *_capped(), on_failure="nan")
    layer(*tensors([POINTS, CAPS]))
    assert layer.status.shape == (4,)
    assert not layer.status.dtype.is_floating_point
    assert layer.status.tolist() == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED, Status.INFEASIBLE]
    layer(*tensors([POINTS[GOOD], CAPS[GOOD]]))
    assert layer.status.tolist() == [Status.SOLVED, Status.SOLVED]
    layer(*tensors([POINTS[0], CAPS[0]]))
    assert layer.status.tolist() == [Status.SOLVED]


def test_status_is_known_after_an_error():
    layer = make_layer("ours", *_capped())
    with pytest.raises(SolveError):
        layer(*tensors([POINTS, CAPS]))
    assert layer.status.tolist() == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED, Status.INFEASIBLE]


@pytest.mark.parametrize("kind", LAYERS)
def test_infeasible_without_a_batch(kind):
    with pytest.raises(SolveError, match="item 0: infeasible"):
        make_layer(kind, *_capped())(*tensors([POINTS[1], CAPS[1]]))
    (out,) = make_layer(kind, *_capped(), on_failure="nan")(*tensors([POINTS[1], CAPS[1]]))
    assert out.shape == (N,)
    assert out.isnan().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_call_may_choose_what_failure_does(kind):
    layer = make_layer(kind, *_capped())
    (out,) = layer(*tensors([POINTS, CAPS]), solver_args={"on_failure": "nan"})
    assert out[BAD].isnan().all()
    assert not out[GOOD].isnan().any()
    with pytest.raises(SolveError, match="infeasible"):
        layer(*tensors([POINTS, CAPS]))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("rows", "right"),
    [
        pytest.param(np.array([[0.0, 0, 0]]), np.array([-1.0]), id="empty-row"),
        pytest.param(np.array([[1.0, 1, 1], [1, 1, 1]]), np.array([1.0, 2.0]), id="dependent-equalities"),
    ],
)
def test_infeasible_for_every_value_of_the_parameter(kind, rows, right):
    """0'x <= -1, and two equalities that contradict each other: found at the first solve at the latest."""
    x, y = cp.Variable(3), cp.Parameter(3)
    constraint = rows @ x <= right if len(rows) == 1 else rows @ x == right
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [constraint, x >= 0])
    with pytest.raises(SolveError, match="item 0: infeasible"):
        make_layer(kind, problem, [y], [x])(torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", LAYERS)
def test_crossed_bounds_are_infeasible(kind):
    x, y, upper = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0, x <= upper])
    layer = make_layer(kind, problem, [y, upper], [x], on_failure="nan")
    uppers = torch.tensor([[1.0, 1, 1], [1, -0.5, 1]], dtype=torch.float64)
    (out,) = layer(torch.full((2, 3), 2.0, dtype=torch.float64), uppers)
    assert_close(out[0], np.ones(3), 1e-10, 1.0)
    assert out[1].isnan().all()
    with pytest.raises(SolveError, match="item 1: infeasible"):
        layer(torch.zeros(2, 3, dtype=torch.float64), uppers, solver_args={"on_failure": "raise"})


@pytest.mark.parametrize("kind", LAYERS)
def test_unbounded_is_an_error(kind):
    """A variable without curvature or bound, and a price on it."""
    x, t, y = cp.Variable(2), cp.Variable(), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + t), [x >= 0, t <= 1])
    with pytest.raises(SolveError, match=r"item 0: .*(unbounded|not positive definite)"):
        make_layer(kind, problem, [y], [x])(torch.ones(3, 2, dtype=torch.float64))


# --- NaN and infinity


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("where", "poison"),
    [
        pytest.param("objective", np.nan, id="objective-nan"),
        pytest.param("objective", np.inf, id="objective-plus-inf"),
        pytest.param("objective", -np.inf, id="objective-minus-inf"),
        pytest.param("constraint", np.nan, id="constraint-nan"),
    ],
)
def test_poisoned_item(kind, where, poison):
    """Reported as the input's fault; the other items are what they are without it."""
    points, caps = POINTS[[0, 2, 0]].copy(), CAPS[[0, 2, 0]].copy()
    if where == "objective":
        points[1, 2] = poison
    else:
        caps[1] = poison
    with pytest.raises(SolveError, match=r"item 1: .*(NaN|infinit)") as caught:
        make_layer(kind, *_capped())(*tensors([points, caps]))
    assert [int(s) for s in caught.value.status] == [Status.SOLVED, Status.INVALID_INPUT, Status.SOLVED]

    cotangent = COTANGENT[[0, 2, 0]]
    layer = make_layer(kind, *_capped(), on_failure="nan")
    (out,), gradients = run(layer, [points, caps], [cotangent])
    (alone,), gradients_alone = run(layer, [points[[0, 2]], caps[[0, 2]]], [cotangent[[0, 2]]])
    assert out[1].isnan().all()
    assert_close(out[[0, 2]], alone, 1e-12, 1.0)
    for gradient, expected in zip(gradients, gradients_alone, strict=True):
        assert gradient[1].isnan().all()
        assert_close(gradient[[0, 2]], expected, 1e-12, 1.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_poisoned_shared_parameter(kind):
    """What all items share spoils all items, and none is blamed on the solver."""
    x, y, a = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [a @ x == 1, x >= 0])
    values = tensors([np.ones((2, 3)), np.array([1.0, np.nan, 1.0])])
    with pytest.raises(SolveError, match="NaN") as caught:
        make_layer(kind, problem, [y, a], [x])(*values)
    assert [int(s) for s in caught.value.status] == [Status.INVALID_INPUT] * 2


@pytest.mark.parametrize("kind", LAYERS)
def test_infinite_bound(kind):
    """x <= +inf is no bound: the right answer, or the input's fault, never another number. Likewise x <= -inf."""
    layer = make_layer(kind, *_capped(), on_failure="nan")
    (out,) = layer(*tensors([POINTS[[0, 2]], np.array([np.inf, 0.6])]))
    (expected,) = layer(*tensors([POINTS[[0, 2]], np.array([1e3, 0.6])]))
    assert_close(out[1], expected[1], 1e-12, 1.0)
    assert out[0].isnan().all() or torch.allclose(out[0], expected[0], rtol=0.0, atol=1e-8)
    with pytest.raises(SolveError, match=r"item 0: (infeasible|.*infinit)"):
        layer(*tensors([POINTS[[0, 2]], np.array([-np.inf, 0.6])]), solver_args={"on_failure": "raise"})


# --- shapes, types, numbers of things


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("shapes", "pattern"),
    [
        pytest.param([(3, 5), (3,)], r"(?i)parameter 0.*expected.*4.*got.*5", id="last-axis"),
        pytest.param([(3, 4), (3, 1, 1)], r"(?i)parameter 1.*expected.*got", id="too-many-axes"),
        pytest.param([(5,), ()], r"(?i)parameter 0.*expected.*4.*got.*5", id="unbatched"),
        pytest.param([(), ()], r"(?i)parameter 0.*expected.*got", id="scalar-for-a-vector"),
        pytest.param([(3, 4), (2,)], r"(?i)batch.*(3, 2|3.*2)", id="different-batches"),
    ],
)
def test_wrong_shape(kind, shapes, pattern):
    layer = make_layer(kind, *_capped())
    with pytest.raises(ValueError, match=pattern):
        layer(*(torch.ones(s, dtype=torch.float64) for s in shapes))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_parameters(kind, count):
    layer = make_layer(kind, *_capped())
    with pytest.raises(ValueError, match=rf"(?i)(received|got) {count}.*expected 2|expected 2.*(received|got) {count}"):
        layer(*(torch.ones(4, dtype=torch.float64) for _ in range(count)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128], ids=str)
def test_wrong_dtype(dtype):
    """Integers have no gradient and no NaN: refused, naming the parameter and its type."""
    layer = make_layer("ours", *_capped())
    with pytest.raises((TypeError, ValueError), match=rf"(?i)parameter 0.*{str(dtype).split('.')[-1]}"):
        layer(torch.ones(3, N).to(dtype), torch.tensor(0.5, dtype=torch.float64))


def test_integers_through_the_stock_layer_are_numbers():
    """The host turns them into float64 before any solver sees them."""
    (out,) = make_layer("stock", *_capped())(torch.tensor([3, 0, 0, 0]), torch.tensor(1))
    assert_close(out, np.array([1.0, 0, 0, 0]), 1e-8, 1.0)


def test_mixed_precision():
    """One float32 and one float64 parameter: promoted as torch promotes, each gradient in its parameter's type."""
    layer = make_layer("ours", *_capped())
    y = torch.tensor(POINTS[GOOD], dtype=torch.float32, requires_grad=True)
    cap = torch.tensor(CAPS[GOOD], dtype=torch.float64, requires_grad=True)
    (out,) = layer(y, cap)
    out.sum().backward()
    assert out.dtype == torch.float64
    assert (y.grad.dtype, cap.grad.dtype) == (torch.float32, torch.float64)
    assert_close(out, _good_truth()[0], 1e-6, 1.0)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
def test_half_precision(dtype, digits):
    """Solved in double precision and rounded once: the answer in the type that came in."""
    layer = make_layer("ours", *_capped())
    y, cap = (torch.tensor(v[GOOD]).to(dtype).requires_grad_() for v in (POINTS, CAPS))
    (out,) = layer(y, cap)
    (exact,) = layer(y.detach().double(), cap.detach().double())
    assert out.dtype == dtype
    assert_close(out.double(), exact, digits, 1.0)
    out.sum().backward()
    assert (y.grad.dtype, cap.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize("name", ["all-batched", "one-shared"])
def test_empty_batch(name):
    """No items: outputs of length zero, a gradient of length zero, and zero for what is shared."""
    layer = make_layer("ours", *_capped())
    y = torch.zeros(0, N, dtype=torch.float64, requires_grad=True)
    cap = torch.tensor(0.5, dtype=torch.float64) if name == "one-shared" else torch.zeros(0, dtype=torch.float64)
    cap.requires_grad_()
    (out,) = layer(y, cap)
    assert out.shape == (0, N)
    assert layer.status.shape == (0,)
    out.sum().backward()
    assert y.grad.shape == (0, N)
    assert cap.grad.shape == cap.shape
    assert (cap.grad == 0).all()


def test_empty_batch_through_the_fallback():
    x, y = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.norm(x) <= 1])
    (out,) = make_layer("ours", problem, [y], [x])(torch.zeros(0, 3, dtype=torch.float64))
    assert out.shape == (0, 3)


def _project_on_simplex(points):
    """Sort-based projection, rows of `points`."""
    descending = -np.sort(-points, axis=1)
    excess = (np.cumsum(descending, axis=1) - 1.0) / np.arange(1, points.shape[1] + 1)
    count = (descending > excess).sum(1)
    return np.maximum(points - excess[np.arange(len(points)), count - 1][:, None], 0.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_ten_thousand_items(kind):
    """Against the closed form, and the derivative of the closed form, of every item."""
    x, y = cp.Variable(5), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0, cp.sum(x) == 1])
    rng = np.random.default_rng(0)
    points, cotangent = rng.standard_normal((10_000, 5)), rng.standard_normal((10_000, 5))
    (out,), (gradient,) = run(make_layer(kind, problem, [y], [x]), [points], [cotangent])
    expected = _project_on_simplex(points)
    assert_close(out, expected, 1e-9, 1.0)
    support = expected > 0
    mean = (support * cotangent).sum(1, keepdims=True) / support.sum(1, keepdims=True)
    assert_close(gradient, support * (cotangent - mean), 1e-9, 1.0)


def test_one_bad_item_among_ten_thousand():
    layer = make_layer("ours", *_capped(), on_failure="nan")
    points = np.random.default_rng(0).standard_normal((10_000, N))
    caps = np.full(10_000, 0.5)
    caps[7_777] = 0.2
    (out,) = layer(*tensors([points, caps]))
    assert layer.status.nonzero().flatten().tolist() == [7_777]
    assert out.isnan().any(1).nonzero().flatten().tolist() == [7_777]
    with pytest.raises(SolveError, match="1 of 10000 items failed: item 7777: infeasible"):
        layer(*tensors([points, caps]), solver_args={"on_failure": "raise"})


# --- options


@pytest.mark.parametrize("kind", LAYERS)
def test_unknown_solver_argument(kind):
    """The message repeats what was given and lists what is known."""
    layer = make_layer(kind, *_capped())
    with pytest.raises(ValueError, match="tolerence") as caught:
        layer(*tensors([POINTS[GOOD], CAPS[GOOD]]), solver_args={"tolerence": 1e-6})
    for known in ("tolerance", "on_failure", "jacobian"):
        assert known in str(caught.value).replace("tolerence", "")


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        pytest.param("jacobian", "full", ["active", "support"], id="jacobian"),
        pytest.param("fallback", "osqp", ["diffcp", "error"], id="fallback"),
        pytest.param("on_failure", "ignore", ["raise", "nan"], id="on_failure"),
        pytest.param("tolerance", -1.0, ["tolerance"], id="tolerance"),
    ],
)
def test_option_outside_its_range(option, value, known):
    with pytest.raises(hsbackend.InvalidOptionError, match=option) as caught:
        hsbackend.HSBackend(**{option: value})
    for word in (*known, str(value)):
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", LAYERS)
def test_solver_argument_outside_its_range(kind):
    layer = make_layer(kind, *_capped())
    with pytest.raises(ValueError, match=r"(?s)jacobian.*(active.*support)"):
        layer(*tensors([POINTS[GOOD], CAPS[GOOD]]), solver_args={"jacobian": "full"})


def test_errors_have_one_base_class():
    for error in (SolveError, hsbackend.UnsupportedProblemError, hsbackend.InvalidOptionError):
        assert issubclass(error, hsbackend.HSBackendError)
    assert issubclass(SolveError, RuntimeError)
    assert issubclass(hsbackend.InvalidOptionError, ValueError)


def test_wrong_parameters_at_construction():
    """What the stock class refuses at construction, ours refuses with the same exception."""
    problem, parameters, variables = _capped()
    with pytest.raises(ValueError, match="parameters must exactly match"):
        make_layer("ours", problem, parameters[:1], variables)
    with pytest.raises(ValueError, match=r"subset of problem\.variables"):
        make_layer("ours", problem, parameters, [cp.Variable(2)])


def test_not_dpp_at_construction():
    x, a, b = cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x)), [a * b * x >= 1])
    with pytest.raises(ValueError, match="DPP"):
        make_layer("ours", problem, [a, b], [x])


def test_conflicting_rows_are_named_after_the_constraints_of_the_user():
    z, h = cp.Variable(3), cp.Parameter(4, name="h")
    matrix = np.array([[0.0, 1, 0], [1, 1, 0], [0, 0, 1], [-1, -1, 0]])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(z - 1)), [z <= 9, matrix @ z <= h])
    with pytest.raises(SolveError, match=r"\(constraint 1, entry 1\) and row \d+ \(constraint 1, entry 3\) conflict"):
        make_layer("ours", problem, [h], [z])(torch.tensor([5.0, 1, 5, -2], dtype=torch.float64))


def test_a_variable_the_host_cannot_recover_is_refused_with_advice():
    x, y = cp.Variable((3, 3), diag=True), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0])
    with pytest.raises(hsbackend.UnsupportedProblemError, match="attribute diag or sparsity"):
        make_layer("ours", problem, [y], [x])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_bad_matrix_of_one_item_leaves_the_epigraph_route_of_the_others_alone(bad):
    """The proximal weight belongs to an item: one item's NaN or huge Hessian must not change its neighbours."""
    x, factor, point = cp.Variable(3), cp.Parameter((3, 3)), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(factor @ x - point)), [cp.norm1(x) <= 1.0])
    layer = make_layer("ours", problem, [factor, point], [x], on_failure="nan")
    factors = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1) + 0.1
    points = torch.tensor([[2.0, 0.1, 0.3], [1.0, 1.0, 1.0], [0.3, -0.1, 0.2]], dtype=torch.float64)
    (wanted,) = layer(factors, points)
    spoiled = factors.clone()
    spoiled[1, 0, 0] = bad
    (found,) = layer(spoiled, points)
    assert_close(found[[0, 2]], wanted[[0, 2]], 1e-12, 1.0)
    assert np.isfinite(bad) or found[1].isnan().all()
