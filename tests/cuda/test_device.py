"""The families on a real device, against the CPU: run with ``pytest -m cuda`` where there is one.

These tests want torch, triton, numpy, scipy and numba, and no cvxpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hsbackend import Polyhedron, checking, project, raise_failures
from hsbackend.status import SolveError

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETS: dict[str, tuple[Callable[[], Polyhedron], tuple[int, ...]]] = {
    "simplex": (lambda: Polyhedron.simplex(50), (100, 50)),
    "long simplex": (lambda: Polyhedron.simplex(4096), (7, 4096)),
    "beyond the kernels": (lambda: Polyhedron.simplex(20_000), (3, 20_000)),
    "capped simplex": (lambda: Polyhedron.capped_simplex(63, 0.2), (5, 63)),
    "box": (lambda: Polyhedron.box(-0.5, 0.5, 63), (5, 63)),
    "l1 ball": (lambda: Polyhedron.l1_ball(100), (9, 100)),
    "monotone": (lambda: Polyhedron.monotone(100), (40, 100)),
    "Birkhoff 4": (lambda: Polyhedron.birkhoff(4), (1000, 4, 4)),
    "Birkhoff 8": (lambda: Polyhedron.birkhoff(8), (100, 8, 8)),
    "Birkhoff 32": (lambda: Polyhedron.birkhoff(32), (5, 32, 32)),
    "Birkhoff 64": (lambda: Polyhedron.birkhoff(64), (3, 64, 64)),
    "Birkhoff 80": (lambda: Polyhedron.birkhoff(80), (2, 80, 80)),
}


def run(polyhedron: Polyhedron, v: Tensor) -> tuple[Tensor, Tensor]:
    """Project and pull a fixed cotangent back."""
    point = v.clone().requires_grad_()
    x = project(point, polyhedron)
    g = torch.linspace(-1.0, 1.0, v.numel(), dtype=v.dtype, device=v.device).reshape(v.shape)
    return x.detach(), torch.autograd.grad(x, point, g)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETS)
def test_values_and_gradients_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    make, shape = SETS[name]
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    mine, wanted = run(make(), v.cuda()), run(make(), v)
    tolerance = {"rtol": 0.0, "atol": 1e-10 if dtype == torch.float64 else 2e-6}
    for one, other in zip(mine, wanted, strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other, **tolerance)
    raise_failures()


@pytest.mark.parametrize("name", SETS)
def test_nothing_waits_for_the_device(name: str) -> None:
    make, shape = SETS[name]
    polyhedron, v = make(), torch.randn(shape, device="cuda")
    run(polyhedron, v)  # compiles, and makes what is kept
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(polyhedron, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SETS)
def test_a_training_step_is_captured_in_a_graph(name: str) -> None:
    make, shape = SETS[name]
    polyhedron, v = make(), torch.randn(shape, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run(polyhedron, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(polyhedron, v)
    v.normal_()
    graph.replay()
    for one, other in zip(captured, run(polyhedron, v), strict=True):
        torch.testing.assert_close(one, other)


def launches(step: Callable[[], Any]) -> int:
    """Count the kernels of a warm step."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum("memcpy" not in name.lower() and "memset" not in name.lower() for name in events)


@pytest.mark.parametrize("make", [Polyhedron.simplex, Polyhedron.l1_ball, Polyhedron.monotone])
def test_small_problems_need_few_launches(make: Any) -> None:
    polyhedron, g = make(10), torch.ones(1, 10, device="cuda")
    v = torch.randn(1, 10, device="cuda", requires_grad=True)
    assert launches(lambda: torch.autograd.grad(project(v, polyhedron), v, g)) <= 5


def test_failures_come_when_they_are_asked_for() -> None:
    polyhedron = Polyhedron.simplex(3)
    v = torch.tensor([[0.0, 1.0, 2.0], [torch.nan, 0.0, 0.0]], device="cuda")
    assert project(v, polyhedron)[1].isnan().all()
    with pytest.raises(SolveError, match="an earlier call on the device: 1 of 2 items failed: item 1"):
        raise_failures()
    with checking("sync"), pytest.raises(SolveError, match="item 1"):
        project(v, polyhedron)
    with checking("never"):
        project(v, polyhedron)
    raise_failures()


@pytest.mark.parametrize("name", ["simplex", "Birkhoff 4", "monotone"])
def test_batches_of_any_size_give_the_same_bits(name: str) -> None:
    make, shape = SETS[name]
    polyhedron, v = make(), torch.randn(shape, device="cuda")
    whole = run(polyhedron, v)[0]
    assert torch.equal(torch.cat([project(part, polyhedron) for part in v.split(7)]), whole)


def test_a_batch_beyond_32_bits_of_address_is_its_pieces() -> None:
    """2^31 entries and some: an offset of 32 bits would wrap around."""
    polyhedron, batch = Polyhedron.birkhoff(4), 2**27 + 5
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GB of device memory")
    v = torch.randn(batch, 4, 4, device="cuda")
    x = project(v, polyhedron)
    assert torch.equal(x[-100:], project(v[-100:], polyhedron))


def test_autocast_and_half_precision() -> None:
    v = torch.randn(8, 16, device="cuda")
    polyhedron = Polyhedron.simplex(16)
    with torch.autocast("cuda"):
        x = project(v.half(), polyhedron)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, project(v.half().float(), polyhedron))
