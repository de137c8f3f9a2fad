"""A process in which Triton interprets kernels on the CPU, for tests without a device.

``TRITON_INTERPRET`` is read when Triton is imported and changes every kernel for good; the process of the tests must
stay as it is, because other tests compile, and torch's own compiler uses Triton too. So one child process interprets:
:func:`call` sends a function of this module there.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Start the process; yield a function that calls another one there."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=prepare) as pool:
        pool.submit(int).result()  # the child takes the environment of now
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield lambda function, *arguments, **named: pool.submit(function, *arguments, **named).result(timeout=300)


def prepare() -> None:
    """In the child: interpret, poison output buffers, and give ``fma`` its single rounding."""
    from triton.runtime import interpreter as triton_interpreter

    from hsbackend.cuda import budget, monotone, transport
    from hsbackend.cuda._launch import poison

    torch.set_num_threads(1)
    np.seterr(all="ignore")
    triton_interpreter.InterpreterBuilder.create_fma = _fma
    for module in (budget, monotone, transport):
        module.empty = lambda shape, dtype, like: poison(torch.empty(shape, dtype=dtype))


def _fma(_builder: Any, x: Any, y: Any, z: Any) -> Any:
    """``x y + z`` with one rounding but for a tiny fraction of cases (Dekker's product, Knuth's sum)."""
    from triton.runtime.interpreter import TensorHandle

    a, b, c = x.data, y.data, z.data
    product = a * b
    high_a, high_b = 134217729.0 * a, 134217729.0 * b
    high_a, high_b = high_a - (high_a - a), high_b - (high_b - b)
    low_a, low_b = a - high_a, b - high_b
    error = low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b)
    total = product + c
    other = total - product
    exact = total + (((product - (total - other)) + (c - other)) + error)
    return TensorHandle(np.where(np.isfinite(exact), exact, a * b + c), z.dtype.scalar)


def solve(family: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Project with a kernel."""
    from hsbackend.cuda import dispatch

    return dispatch.solve(family, *arguments)


def kkt(family: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Solve on a face with a kernel."""
    from hsbackend.cuda import dispatch

    return dispatch.kkt(family, *arguments)


def strided(family: str, point: Tensor, *rest: Any) -> list[tuple[Tensor, ...]]:
    """Project a point in three layouts: contiguous, every second row of a larger tensor, transposed."""
    gaps = torch.full((2 * len(point), point.shape[1] + 3), torch.nan, dtype=point.dtype)
    gaps[::2, : point.shape[1]] = point
    layouts = (point, gaps[::2, : point.shape[1]], point.t().contiguous().t())
    return [solve(family, layout, *rest) for layout in layouts]


@contextmanager
def _everything_on_a_device() -> Iterator[None]:
    """Send CPU tensors the way of CUDA tensors, but for the question whether anything failed."""
    from hsbackend import checks, operators, sets

    before = operators.on_device, sets.on_device, checks.check
    operators.on_device = sets.on_device = lambda tensor: True
    checks.check = lambda status: None
    try:
        yield
    finally:
        operators.on_device, sets.on_device, checks.check = before


def derivatives(make: Callable[[Tensor], Any], arguments: tuple[Any, ...], v: Tensor, weight: Tensor | None) -> Any:
    """Project on a set and differentiate twice; the second derivative is of the squared norm of the first."""
    from hsbackend import project

    polyhedron = make(*arguments)
    with _everything_on_a_device():
        return [part.detach() for part in twice_differentiated(project, polyhedron, v, weight)]


def twice_differentiated(project: Any, polyhedron: Any, v: Tensor, weight: Tensor | None) -> list[Tensor]:
    """Return the projection, the gradient of its squares, and the gradient of the squares of that."""
    point = v.clone().requires_grad_()
    wanted = [point]
    if weight is not None:
        weight = weight.clone().requires_grad_()
        wanted.append(weight)
    x = project(point, polyhedron, weight=weight)
    first = torch.autograd.grad((x**2).sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum((part**2).sum() for part in first), wanted)
    return [x, *first, *second]
