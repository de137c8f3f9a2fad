"""The comparison on a device, as far as it can be checked without one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hsbackend import Polyhedron, project
from hsbackend.comparisons import device_families


def test_sparsemax_by_sorting_is_the_projection() -> None:
    v = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(device_families.sort_sparsemax(v), project(v, Polyhedron.simplex(40)))


def test_sinkhorn_ends_near_the_polytope() -> None:
    x = device_families.sinkhorn(torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.sum(-2), torch.ones(5, 4, dtype=torch.float64))
    torch.testing.assert_close(x.sum(-1), torch.ones(5, 4, dtype=torch.float64), rtol=0, atol=1e-3)


def test_the_floor_counts_four_passes() -> None:
    case = device_families.cases(quick=True)[0]
    assert case.shape == (100, 50)
    assert case.floor_ms(4, 1e9) == pytest.approx(1e3 * 4 * 100 * 50 * 4 / 1e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is said where there is no GPU")
def test_without_a_device_it_says_so(capsys) -> None:
    assert device_families.main(["--quick"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_it_needs_no_cvxpy() -> None:
    code = (
        "import sys; sys.modules['cvxpy'] = None; import hsbackend.comparisons.device_families as d; print(d.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip().endswith("device_families")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_runs(dtype: torch.dtype) -> None:
    lines = device_families.run(quick=True, dtype=dtype)
    assert len(lines) == 4 + len(device_families.cases(quick=True))
