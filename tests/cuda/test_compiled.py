"""Kernels compiled for devices that are not there: that they compile, and what they need."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hsbackend.cuda import report

EVERYTHING = {specialisation.name: specialisation for specialisation in report.specialisations()}
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"

#: Spilled bytes per thread, at most. What is in registers only must stay there; the transport kernels hold a whole
#: Newton method and spill what its rare branches need.
BOUNDS = {
    "simplex n = 50 fp32, solve": 0,
    "simplex n = 50 fp32, kkt": 0,
    "simplex n = 1000 fp32, solve": 0,
    "simplex n = 4096 fp32, solve": 96,
    "simplex n = 4096 fp32, kkt": 0,
    "monotone fp64, solve": 0,
    "monotone fp64, kkt": 0,
    "transport 4 x 4 fp32, solve": 128,
    "transport 4 x 4 fp32, kkt": 0,
}
#: On every architecture; the others on sm_90 here and everywhere in the nightly run.
EVERYWHERE = ("simplex n = 50 fp32, solve", "transport 4 x 4 fp32, kkt", "monotone fp64, kkt")


def check(name: str, architecture: int, bound: int) -> report.Resources:
    found = report.resources_of(EVERYTHING[name], architecture)
    assert found.registers <= 255
    assert found.spilled_bytes <= bound
    assert found.shared_bytes <= 48 * 1024
    assert found.registers * found.threads <= 65536, "a program must fit on a multiprocessor"
    return found


@pytest.mark.parametrize(
    ("name", "architecture"),
    [(name, 90) for name in BOUNDS] + [(name, number) for name in EVERYWHERE for number in (80, 100)],
)
def test_resources(name: str, architecture: int) -> None:
    check(name, architecture, BOUNDS[name])


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", report.ARCHITECTURES)
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_specialisation(name: str, architecture: int) -> None:
    check(name, architecture, BOUNDS.get(name, 1536))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize(
    "shape", [(r, c) for r in (1, 2, 4, 8, 16, 32, 64) for c in (1, 2, 4, 8, 16, 32, 64) if c <= r]
)
def test_every_tile_of_transport(shape: tuple[int, int], support: bool, weighted: bool, dtype: str) -> None:
    """Triton 3.6 fails on some forms of these loops for some tiles (``transport.needs_ones``): try them all."""
    specialisation = report._transport(shape, dtype, weighted=weighted)
    specialisation.constants["SUPPORT"] = support
    assert report.resources_of(specialisation, 90).registers <= 255


def test_no_matrix_instructions_of_lower_precision() -> None:
    """TF32 cannot be used silently where there is no matrix product."""
    for path in Path(report.__file__).parent.glob("_*_kernels.py"):
        assert "tl.dot" not in path.read_text()


def test_the_table_is_documented() -> None:
    text = DOCUMENT.read_text()
    missing = [name for name in EVERYTHING if not re.search(rf"^\| {re.escape(name)} \|", text, re.MULTILINE)]
    assert not missing, "run python -m hsbackend.cuda.report"
