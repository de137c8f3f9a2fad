"""One interpreting process for all tests of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are in Triton")

from device_interpreter import interpreter


@pytest.fixture(scope="session")
def call() -> Iterator[Callable[..., Any]]:
    with interpreter() as function:
        yield function
