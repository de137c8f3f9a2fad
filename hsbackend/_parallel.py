"""Run a compiled kernel over the items of a batch, on as many threads as torch uses.

Kernels release the GIL and take ``(start, stop, step)`` first: worker ``t`` of ``T`` handles the items
``t, t + T, t + 2T, ...``, which balances easy and hard items without a queue. Our own pool, and not
Numba's, because Numba's threading layers either end the process when two Python threads launch at once
(workqueue) or kill a forked child (OpenMP).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, cast

import numba  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import torch

_LOGGER = logging.getLogger("hsbackend")
#: Below this many multiply-adds a second thread costs more than it saves (a dispatch is about 30 microseconds).
_SERIAL_WORK = 250_000
#: Kernels that have run in this process; kernels are module-level and live as long as it does.
_USED: set[int] = set()


class Kernel(Protocol):
    """A compiled function."""

    def __call__(self, *arguments: Any) -> Any:
        """Run the compiled code."""
        ...


def compile_kernel(function: Callable[..., Any]) -> Kernel:
    """Compile a function at its first call, without the GIL, cached on disk."""
    # IEEE semantics stay (no fastmath beyond contraction): NaN in the data must come out as NaN.
    decorate = cast("Callable[[Callable[..., Any]], Any]", numba.njit(cache=True, nogil=True, fastmath={"contract"}))
    return cast("Kernel", decorate(function))


def inline_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a helper that is only called from other kernels."""
    decorate = cast(
        "Callable[[Callable[..., Any]], Any]",
        numba.njit(cache=True, nogil=True, inline="never", fastmath={"contract", "reassoc"}),
    )
    return cast("Callable[..., Any]", decorate(function))


class _Pool:
    """A thread pool that grows on demand and is rebuilt in a forked child, where its threads do not exist."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._owner = -1
        self._size = 0

    def of(self, size: int) -> ThreadPoolExecutor:
        if os.getpid() != self._owner:
            self._lock = threading.Lock()  # the parent's may have been held by a thread that is gone
        with self._lock:
            if self._executor is None or os.getpid() != self._owner or size > self._size:
                self._executor = ThreadPoolExecutor(max_workers=size, thread_name_prefix="hsbackend")
                self._owner, self._size = os.getpid(), size
            return self._executor


_POOL = _Pool()


def for_each_item(kernel: Kernel, batch: int, work_per_item: float, *arguments: Any) -> list[Any]:
    """Call ``kernel(start, stop, step, *arguments)`` so that every item is handled once.

    Args:
        kernel: compiled with :func:`compile_kernel`.
        batch: number of items B.
        work_per_item: rough count of multiply-adds per item, to decide whether threads pay.
        arguments: passed on unchanged; the kernel writes its results into them.

    Returns:
        What the kernel returned, one entry per worker, worker ``t`` first.
    """
    threads = min(torch.get_num_threads(), batch)
    if threads <= 1 or batch * work_per_item < _SERIAL_WORK:
        call = kernel if id(kernel) in _USED else partial(_first_call, kernel)
        return [call(0, batch, 1, *arguments)]
    if id(kernel) not in _USED:  # compile once, not once per thread
        return [_first_call(kernel, 0, batch, 1, *arguments)]
    pool = _POOL.of(threads - 1)
    futures = [pool.submit(kernel, worker, batch, threads, *arguments) for worker in range(1, threads)]
    first = kernel(0, batch, threads, *arguments)
    return [first, *(future.result() for future in futures)]


def _first_call(kernel: Kernel, *arguments: Any) -> Any:
    """Call a kernel that may have to be compiled, and say so when that takes long."""
    began = time.perf_counter()
    result = kernel(*arguments)
    elapsed_s = time.perf_counter() - began
    _USED.add(id(kernel))
    if elapsed_s > 1.0:
        name = getattr(kernel, "__name__", "kernel")
        _LOGGER.warning("hsbackend prepared %s in %.1f s; later processes load it from Numba's cache", name, elapsed_s)
    return result


def gather(stores: list[Any], offset: Any) -> Any:
    """Join the storage of the workers; worker t of T owns the items t, t + T, ...; shift ``offset`` to match."""
    if len(stores) == 1:
        return stores[0]
    begin = 0
    for worker, store in enumerate(stores):
        offset[worker :: len(stores)] += begin
        begin += len(store)
    return np.concatenate(stores)
