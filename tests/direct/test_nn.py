"""Modules: tensors in the state, copies, devices and dtypes, training."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

import hsbackend
from direct_cases import CASES
from hsbackend import Polyhedron, project, qp_program, solve_qp
from hsbackend.nn import QP, Projection

D = torch.float64


def _copies(module: torch.nn.Module) -> list[torch.nn.Module]:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_projection_module(name: str, weighted: bool) -> None:
    """The same as the function; the set's tensors are the state; every kind of copy works and shares nothing."""
    case = CASES[name]
    polyhedron, v = case.polyhedron(), case.point(2)
    weight = case.weight() if weighted else None
    module = Projection(polyhedron, weight=weight)
    wanted = project(v, polyhedron, weight=weight)
    torch.testing.assert_close(module(v), wanted)
    assert set(module.state_dict()) == set(polyhedron.tensors) | ({"weight"} if weighted else set())
    assert not list(module.parameters())
    assert polyhedron.kind in repr(module)
    for other in _copies(module):
        torch.testing.assert_close(other(v), wanted)
        for mine, theirs in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
            assert mine.data_ptr() != theirs.data_ptr()
    single = module.float()(v.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=1e-5, atol=1e-5)
    assert all(tensor.dtype == torch.float32 for tensor in module.state_dict().values())


def test_state_is_loaded() -> None:
    first, second = (Projection(Polyhedron.simplex(3, torch.tensor(radius, dtype=D))) for radius in (1.0, 2.0))
    v = torch.randn(3, dtype=D)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(v), first(v))
    rows = Polyhedron(G=torch.eye(2, dtype=D), h=torch.ones(2, dtype=D))
    module = Projection(rows)
    point = torch.full((2,), 5.0, dtype=D)
    torch.testing.assert_close(module(point), torch.ones(2, dtype=D))
    module.load_state_dict({"G": torch.eye(2, dtype=D), "h": torch.full((2,), 3.0, dtype=D)})
    torch.testing.assert_close(module(point), torch.full((2,), 3.0, dtype=D))


def test_parameters_are_trained() -> None:
    """A radius that is a parameter moves to the one the data were made with."""
    radius = torch.nn.Parameter(torch.tensor(1.0, dtype=D))
    module = Projection(Polyhedron.simplex(4, radius))
    assert dict(module.named_parameters()) == {"equals": radius}
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(8, 4, dtype=D, generator=generator)
    target = project(v, Polyhedron.simplex(4, 2.5))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        ((module(v) - target) ** 2).sum().backward()
        optimizer.step()
    torch.testing.assert_close(radius.detach(), torch.tensor(2.5, dtype=D), rtol=1e-6, atol=1e-6)


def test_a_product_of_parameters() -> None:
    parts = [
        Polyhedron.simplex(2, torch.nn.Parameter(torch.ones((), dtype=D))),
        Polyhedron.box(torch.zeros(3).double(), 1.0),
    ]
    module = Projection(Polyhedron.product(*parts))
    assert [name for name, _ in module.named_parameters()] == ["part0_equals"]
    assert [name for name, _ in module.named_buffers()] == ["part1_lower"]
    module(torch.randn(5, dtype=D)).square().sum().backward()
    assert module.get_parameter("part0_equals").grad is not None


@pytest.mark.parametrize("name", ["simplex", "polyhedron_fixed", "box", "affine"])
def test_projection_module_compiles(name: str) -> None:
    torch.compiler.reset()
    case = CASES[name]
    module = Projection(case.polyhedron())
    v = case.point(2).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (one,) = torch.autograd.grad(compiled(v).square().sum(), v)
    (other,) = torch.autograd.grad(module(v).square().sum(), v)
    torch.testing.assert_close(one, other)
    torch.compiler.reset()


def test_options_have_effect() -> None:
    v = torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)
    gradients = [
        torch.autograd.grad(Projection(Polyhedron.simplex(2), jacobian=choice)(v)[0], v)[0].tolist()
        for choice in ("active", "support")
    ]
    assert gradients == [[0.0, 0.0], [0.5, -0.5]]
    empty = Polyhedron.simplex(2, -1.0)
    with pytest.raises(hsbackend.SolveError):
        Projection(empty)(v)
    assert bool(Projection(empty, on_failure="nan")(v).isnan().all())
    with pytest.raises(hsbackend.InvalidOptionError):
        Projection(empty, jacobian="all")
    with pytest.raises(hsbackend.InvalidOptionError):
        QP(on_failure="all")


def test_repr() -> None:
    module = Projection(Polyhedron.capped_simplex(3, torch.ones(2)), jacobian="support")
    shown = "Polyhedron[capped_simplex](shape=(3,), equals=tensor(2,), lower=0, upper=1), jacobian='support'"
    assert shown in repr(module)
    assert "Q(2, 2), h(1,), jacobian='active'" in repr(QP(torch.eye(2), h=torch.ones(1)))


def test_qp_module() -> None:
    """Data of the module and of the call, the call's first; state, copies, compilation."""
    Q, q = torch.eye(2, dtype=D), torch.tensor([-2.0, -3.0], dtype=D)
    lower = torch.nn.Parameter(torch.tensor([0.0, 4.0], dtype=D))
    module = QP(Q, lower=lower, G=torch.ones(1, 2, dtype=D), h=torch.full((1,), 5.0, dtype=D))
    wanted = solve_qp(Q, q, G=module.G, h=module.h, lower=lower)
    torch.testing.assert_close(module(q).primal, wanted.primal)
    assert set(module.state_dict()) == {"Q", "G", "h", "lower"}
    assert [name for name, _ in module.named_parameters()] == ["lower"]
    module(q).primal.sum().backward()
    assert lower.grad is not None
    other = torch.full((1,), 100.0, dtype=D)
    torch.testing.assert_close(module(q, h=other).primal, solve_qp(Q, q, G=module.G, h=other, lower=lower).primal)
    for copied in _copies(module):
        torch.testing.assert_close(copied(q).primal, wanted.primal)
    assert module.float()(q.float()).primal.dtype == torch.float32
    torch.testing.assert_close(QP(Q, q)().primal, -q)
    with pytest.raises(ValueError, match="a program needs `q`"):
        QP(Q)()


def test_qp_module_factors_its_data_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when they change, in place too; what comes with the call is never part of the program."""
    built: list[tuple[str, ...]] = []
    build = qp_program.Prepared.build

    def counted(structure: qp_program.Structure, constants: dict) -> qp_program.Prepared:
        built.append(structure.constants)
        return build(structure, constants)

    monkeypatch.setattr(qp_program.Prepared, "build", counted)
    Q, upper = 2.0 * torch.eye(3, dtype=D), torch.full((3,), 0.75, dtype=D)
    module = QP(Q, upper=upper)
    q = torch.tensor([-1.0, -2.0, 3.0], dtype=D, requires_grad=True)
    for _ in range(3):
        module(q).primal.sum().backward()
    assert built == [("Q", "upper")]
    module.Q.data[0, 0] = 4.0
    torch.testing.assert_close(module(q).primal.detach(), torch.tensor([0.25, 0.75, -1.5], dtype=D))
    assert built == [("Q", "upper")] * 2
    torch.testing.assert_close(module(q, upper=0.1 * upper).primal, solve_qp(module.Q, q, upper=0.1 * upper).primal)
    concave = QP(-torch.eye(2, dtype=D))
    with pytest.raises(hsbackend.UnsupportedProblemError, match="no solver of hsbackend takes this program"):
        concave(torch.zeros(2, dtype=D))
    built.clear()
    linear = QP(lower=torch.zeros(3, dtype=D), smoothing=0.5)  # the smoothed Hessian is a constant as well
    for shift in (0.0, 1.0):
        torch.testing.assert_close(linear(q - shift).primal, 2.0 * (shift - q).clamp(min=0.0))
    assert built == [("Q", "lower")]


def test_qp_module_compiles() -> None:
    torch.compiler.reset()
    module = QP(torch.eye(2, dtype=D), lower=torch.nn.Parameter(torch.zeros(2, dtype=D)))
    q = torch.tensor([[-2.0, 3.0]], dtype=D, requires_grad=True)
    compiled = torch.compile(lambda q: module(q).primal, fullgraph=True, backend="aot_eager")
    leaves: tuple[Tensor, ...] = (q, module.lower)
    for one, other in zip(
        torch.autograd.grad(compiled(q).square().sum(), leaves),
        torch.autograd.grad(module(q).primal.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()
