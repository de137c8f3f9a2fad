"""Every kernel under Triton's interpreter against the twin in plain PyTorch and against the CPU kernel.

Output buffers are filled with NaN and the largest integers before each launch (``device_interpreter``), so an entry
that no kernel writes shows.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import device_interpreter
from hsbackend import Polyhedron, project
from hsbackend.status import Status

INF = torch.inf
FAMILIES = ("budget", "l1", "monotone", "transport")


def shape_of(family: str, n: int) -> tuple[int, ...]:
    """A matrix of about n entries for transport."""
    return {1: (1, 1), 3: (3, 2), 63: (7, 9), 100: (10, 10)}.get(n, (n,)) if family == "transport" else (n,)


def problem(family: str, n: int, batch: int, kind: str, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """Return the arguments of ``solve`` but for the choice."""
    rng = np.random.default_rng([seed, n, batch])
    shape = shape_of(family, n)
    n = int(np.prod(shape))
    scale = {"huge": 1e9, "tiny": 1e-9}.get(kind, 1.0)
    v = 2.0 * rng.normal(size=(batch, n)) * scale
    if kind == "ties":
        v = rng.integers(-3, 4, size=(batch, n)) / 2.0
    weight = np.exp(rng.normal(size=(batch, n))) if kind in ("weighted", "huge") else None
    coefficients = lower = upper = None
    if family == "budget":
        lower = np.zeros((1, n))
        value = 1.0 * scale
        if kind in ("weighted", "ties"):
            coefficients = rng.choice([-1.0, 0.0, 1.0, 2.0], size=(1, n))
            coefficients[0, 0] = 1.0
            lower, upper = -np.ones((1, n)), np.where(rng.random((1, n)) < 0.3, INF, 1.5)
            value = 0.5
        rhs = np.array([[value, value]])
    elif family == "l1":
        rhs = np.full((1, 1), 1.5 * scale)
    elif family == "monotone":
        rhs = np.array([[-1.0, 1.0]]) * scale if kind != "weighted" else np.array([[-INF, INF]])
    else:
        rhs = np.concatenate([np.full((1, shape[0]), shape[1]), np.full((1, shape[1]), shape[0])], 1) * scale
    if kind == "masked" and family in ("budget", "transport"):
        v[:, ::10] = -INF  # no line of the 7 x 9 matrix as a whole
    parts = (v, weight, coefficients, rhs, lower, upper)
    return (
        *(None if part is None else torch.tensor(part, dtype=dtype) for part in parts),
        shape,
    )


def on_cpu(family: str, name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Call the compiled CPU kernel."""
    function = getattr(import_module(f"hsbackend.families.{family}"), name)
    found = function(*(part.numpy() if isinstance(part, Tensor) else part for part in arguments))
    return tuple(torch.from_numpy(part) for part in vars(found).values())


def twin(family: str, name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Call the plain one."""
    return tuple(getattr(import_module(f"hsbackend.families.{family}_naive"), name)(*arguments))


def close(mine: Tensor, wanted: Tensor, size: float, dtype: torch.dtype, digits: float = 1e-10) -> None:
    """Compare relative to the data: 1e-10 in float64, 1e-6 in float32."""
    assert mine.dtype == dtype
    assert mine.shape == wanted.shape
    torch.testing.assert_close(
        mine.double(), wanted.double(), rtol=0.0, atol=size * (digits if dtype == torch.float64 else 1e-6)
    )


CASES = [
    (1, 3, "plain", "active"), (3, 2, "plain", "support"), (63, 2, "plain", "active"), (100, 1, "plain", "active"),
    (1000, 2, "plain", "active"), (63, 1, "weighted", "support"), (3, 5, "ties", "active"), (63, 2, "ties", "active"),
    (63, 2, "ties", "support"), (63, 2, "masked", "active"), (63, 2, "huge", "active"), (63, 2, "tiny", "active"),
]  # fmt: skip


@pytest.mark.parametrize(("n", "batch", "kind", "choice"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels(call: Any, family: str, n: int, batch: int, kind: str, choice: str) -> None:
    """Values, multipliers, faces and statuses; then u, w and wb on the face."""
    if n == 1000 and family in ("monotone", "transport"):
        pytest.skip("slow under the interpreter, and covered at 100")
    dtype = torch.float32 if (n + batch) % 2 else torch.float64
    given = problem(family, n, batch, kind, dtype)
    found = call(device_interpreter.solve, family, *given, choice)
    wanted = on_cpu(family, "solve", *given, choice)
    size = float(given[0][given[0].isfinite()].abs().max()) + 1e-300
    assert (found[3] == Status.SOLVED).all()
    torch.testing.assert_close(found[2], wanted[2])
    torch.testing.assert_close(found[3], wanted[3])
    heaviest = 1.0 if given[1] is None else float(given[1].max())
    close(found[0], wanted[0], size, dtype)
    close(found[1], wanted[1], size * heaviest * (n if family == "monotone" else 1), dtype)
    if n <= 63 and kind not in ("huge", "tiny"):
        close(found[0], twin(family, "solve", *given, choice)[0], size, dtype)

    rng = torch.Generator().manual_seed(1)
    g, r, rb = (torch.randn(part.shape, generator=rng, dtype=dtype) for part in (given[0], found[1], given[0]))
    for rows, bounds in ((r, rb), (None, None)):
        arguments = (found[2], found[0], given[1], given[2], g, rows, bounds, given[6])
        mine = call(device_interpreter.kkt, family, *arguments)
        for part, other in zip(mine, on_cpu(family, "kkt", *arguments), strict=True):
            close(part, other, float(other.abs().max()) + heaviest + n**0.5, dtype)
        if n <= 63 and family != "transport":
            for part, other in zip(mine, twin(family, "kkt", *arguments), strict=True):
                close(part, other, float(other.abs().max()) + heaviest + n**0.5, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_any_size_give_the_same_bits(call: Any, family: str) -> None:
    given = problem(family, 63, 5, "weighted", torch.float64)
    whole = call(device_interpreter.solve, family, *given, "active")
    for part in (slice(0, 1), slice(1, 5), slice(2, 2)):
        cut = (given[0][part], given[1][part], *given[2:])
        for mine, wanted in zip(call(device_interpreter.solve, family, *cut, "active"), whole, strict=True):
            assert torch.equal(mine, wanted[part])


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_give_the_same_bits(call: Any, family: str) -> None:
    given = problem(family, 63, 3, "plain", torch.float32)
    first, *others = call(device_interpreter.strided, family, *given, "active")
    for other in others:
        for mine, wanted in zip(other, first, strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_failures_stay_with_their_item(call: Any, family: str) -> None:
    """The neighbours are what they are alone; a failed item is zero in the KKT solve, NaN where it is asked for."""
    given = list(problem(family, 3, 4, "plain", torch.float64))
    alone = call(device_interpreter.solve, family, *given, "active")
    given[0] = given[0].clone()
    given[0][1, 0] = torch.nan
    given[3] = given[3].expand(4, -1).clone()
    given[3][2, -1] = -5.0 if family != "monotone" else -INF
    found = call(device_interpreter.solve, family, *given, "active")
    assert found[3].tolist() == [0, Status.INVALID_INPUT, Status.INFEASIBLE, 0]
    assert found[0][1:3].isnan().all()
    assert found[1][1:3].isnan().all()
    assert (found[2][1:3] == 0).all()
    for mine, wanted in zip(found, alone, strict=True):
        assert torch.equal(mine[[0, 3]], wanted[[0, 3]])
    g = torch.ones_like(given[0])
    g[2] = 0.0
    for part in call(device_interpreter.kkt, family, found[2], found[0], None, None, g, None, None, given[6]):
        assert part[1].isnan().all()
        assert (part[2] == 0.0).all()
        assert part[[0, 3]].isfinite().all()


def ones(k: int) -> Tensor:
    return torch.ones(k, dtype=torch.float64)


SETS: dict[str, tuple[Any, tuple[Any, ...], tuple[int, ...]]] = {
    "simplex": (Polyhedron.simplex, (7,), (3, 7)),
    "box": (Polyhedron.box, (-0.5, 0.5, 5), (3, 5)),
    "linf ball": (Polyhedron.linf_ball, (4, 0.5), (3, 4)),
    "half-space": (Polyhedron.halfspace, (torch.tensor([1.0, -2.0, 0.5]).double(), 0.1), (4, 3)),
    "hyperplane": (Polyhedron.hyperplane, (torch.tensor([1.0, -2.0, 0.5]).double(), 0.1), (4, 3)),
    "l1 ball": (Polyhedron.l1_ball, (6,), (3, 6)),
    "monotone": (Polyhedron.monotone, (6,), (3, 6)),
    "Birkhoff": (Polyhedron.birkhoff, (4,), (3, 4, 4)),
    "transport 4 x 5": (Polyhedron.transport, (5.0 * ones(4), 4.0 * ones(5)), (2, 4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_sets_differentiate_twice(call: Any, name: str, weighted: bool) -> None:
    """The differentiable operations on the device's side of the families: value, gradient, gradient of the gradient."""
    make, arguments, shape = SETS[name]
    if weighted and name in ("box", "linf ball"):
        pytest.skip("a weight makes no difference there, and has no gradient on a device")
    rng = torch.Generator().manual_seed(3)
    v = torch.randn(shape, generator=rng, dtype=torch.float64)
    weight = torch.rand(shape, generator=rng, dtype=torch.float64) + 0.5 if weighted else None
    mine = call(device_interpreter.derivatives, make, arguments, v, weight)
    wanted = device_interpreter.twice_differentiated(project, make(*arguments), v, weight)
    for part, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(part, other.detach(), rtol=1e-9, atol=1e-11)


def test_this_process_compiles() -> None:
    import triton

    from hsbackend.cuda._budget_kernels import budget_solve

    assert isinstance(budget_solve, triton.JITFunction)
