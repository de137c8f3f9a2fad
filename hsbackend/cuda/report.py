"""What the kernels need of a device: registers, spills and shared memory, read from compiled code, without a device.

    python -m hsbackend.cuda.report            the table of docs/cuda.md
    python -m hsbackend.cuda.report --json     the same for programs

A specialisation is a kernel with its flags and its tile, as the launch functions choose them for a size. ``ptxas``,
which comes with Triton, compiles it to machine code for one architecture; ``cuobjdump`` reads the resources. Local
memory is what does not fit into registers: the kernels have no arrays of their own, so all of it is spilled registers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hsbackend.cuda import budget, monotone, transport
from hsbackend.cuda._budget_kernels import budget_kkt, budget_solve
from hsbackend.cuda._monotone_kernels import monotone_kkt, monotone_solve
from hsbackend.cuda._transport_kernels import transport_kkt, transport_solve

#: Compute capabilities: A100, H100 and H200, B200.
ARCHITECTURES: Final = (80, 90, 100)
_BYTES_OF_INTEGERS: Final = {"statuses": "*i8", "face": "*i8", "faces": "*i8", "begin": "*i32"}
_STACK: Final = ("level", "mass", "size")


@dataclass(frozen=True)
class Specialisation:
    """A kernel as it is launched for one kind of problem.

    Attributes:
        name: of the problem.
        kernel: the Triton function.
        constants: its compile-time arguments.
        num_warps: warps of a program.
        dtype: of the data, ``"fp32"`` or ``"fp64"``.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    dtype: str

    def signature(self) -> dict[str, str]:
        """Return the types of all arguments."""
        found: dict[str, str] = {}
        faces = "*i32" if self.kernel in (monotone_solve, monotone_kkt) else "*i8"
        for parameter in self.kernel.params:
            name = parameter.name
            if parameter.is_constexpr:
                found[name] = "constexpr"
            elif name in ("face", "faces"):
                found[name] = faces
            elif name in _BYTES_OF_INTEGERS:
                found[name] = _BYTES_OF_INTEGERS[name]
            elif name in _STACK:
                found[name] = "*fp64"
            elif name in ("batch", "n") or name.endswith("_stride"):
                found[name] = "i32"
            else:
                found[name] = "fp32" if name == "allowance" else f"*{self.dtype}"
        return found


@dataclass(frozen=True)
class Resources:
    """What one specialisation needs on one architecture.

    Attributes:
        name: the specialisation.
        architecture: compute capability, 90 for 9.0.
        threads: per program.
        registers: per thread.
        spilled_bytes: local memory per thread.
        shared_bytes: per program.
    """

    name: str
    architecture: int
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def _budget(name: str, n: int, dtype: str, kkt: bool = False, **flags: bool) -> Specialisation:
    tile = dict(budget.tile_of(n))
    warps = tile.pop("num_warps")
    usual = {"WEIGHTED": False, "WITH_COEFFICIENTS": False, "L1": False, **flags, **tile}
    if kkt:
        usual = {"WITH_ROWS": False, "WITH_BOUNDS": False, "SINGLE": n <= budget.LONGEST, **usual}
        return Specialisation(f"{name}, kkt", budget_kkt, usual, warps, dtype)
    usual = {"WITH_LOWER": True, "CAPPED": False, "SUPPORT": False, **usual}
    return Specialisation(f"{name}, solve", budget_solve, usual, warps, dtype)


def _transport(shape: tuple[int, int], dtype: str, kkt: bool = False, weighted: bool = False) -> Specialisation:
    tile = dict(transport.tile_of(shape))
    warps = tile.pop("num_warps")
    constants = {**transport.layout_of(shape), **tile, "WEIGHTED": weighted}
    name = f"transport {shape[0]} x {shape[1]}{' weighted' if weighted else ''} {dtype}"
    if kkt:
        constants |= {"WITH_ROWS": False, "WITH_BOUNDS": False}
        return Specialisation(f"{name}, kkt", transport_kkt, constants, warps, dtype)
    ones = not weighted and transport.needs_ones(shape, torch.float64 if dtype == "fp64" else torch.float32)
    constants |= {"WEIGHTED": weighted or ones, "ONES": ones, "SUPPORT": False}
    return Specialisation(f"{name}, solve", transport_solve, constants, warps, dtype)


def specialisations() -> list[Specialisation]:
    """Return the kinds of problems of the table."""
    found: list[Specialisation] = []
    for n in (50, 1000, 4096, 8192):
        found += [_budget(f"simplex n = {n} fp32", n, "fp32"), _budget(f"simplex n = {n} fp32", n, "fp32", kkt=True)]
    general = {"WEIGHTED": True, "WITH_COEFFICIENTS": True}
    for n in (100, 4096):
        name = f"weighted budget n = {n} fp64"
        found += [_budget(name, n, "fp64", CAPPED=True, **general), _budget(name, n, "fp64", kkt=True, **general)]
    found.append(_budget("l1 ball n = 1000 fp64", 1000, "fp64", WITH_LOWER=False, L1=True))
    found.append(_budget("row of any length fp32", 100_000, "fp32", kkt=True))
    chain = {"WEIGHTED": True, "LANES": monotone.LANES}
    found.append(Specialisation("monotone fp64, solve", monotone_solve, {**chain, "SUPPORT": True}, 1, "fp64"))
    found.append(Specialisation("monotone fp64, kkt", monotone_kkt, {**chain, "WITH_ROWS": True}, 1, "fp64"))
    for k in (4, 8, 16, 32, 64):
        found += [_transport((k, k), "fp32"), _transport((k, k), "fp32", kkt=True)]
    found.append(_transport((5, 3), "fp64", weighted=True))
    return found


def compile_for(specialisation: Specialisation, architecture: int) -> Any:
    """Compile, or take from Triton's cache."""
    signature = specialisation.signature()
    # Tensors of torch begin at multiples of 16 bytes or more.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(
        fn=specialisation.kernel, signature=signature, constexprs=specialisation.constants, attrs=aligned
    )
    options = {"num_warps": specialisation.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources_of(specialisation: Specialisation, architecture: int) -> Resources:
    """Compile and read what the machine code says of itself."""
    compiled = compile_for(specialisation, architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(str(triton.__file__)).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([str(tool), "-res-usage", str(path)], check=True, capture_output=True, text=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(
        specialisation.name, architecture, 32 * specialisation.num_warps, numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"], compiled.metadata.shared,
    )  # fmt: skip


def every_resource(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Resources]:
    """Compile everything for some architectures."""
    for specialisation in specialisations():
        for architecture in architectures:
            yield resources_of(specialisation, architecture)


def table(rows: list[Resources]) -> str:
    """Return Markdown: one line per specialisation, one group of columns per architecture."""
    architectures = sorted({row.architecture for row in rows})
    lines = ["| kernel | threads | " + " | ".join(f"sm_{number}" for number in architectures) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(architectures))
    by_name: dict[str, dict[int, Resources]] = {}
    for row in rows:
        by_name.setdefault(row.name, {})[row.architecture] = row
    for name, found in by_name.items():
        cells = [
            f"{found[number].registers} / {found[number].spilled_bytes} / {found[number].shared_bytes}"
            for number in architectures
        ]
        threads = next(iter(found.values())).threads
        lines.append(f"| {name} | {threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    everything = list(every_resource())
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(row) for row in everything]))
    else:
        print("Registers per thread / spilled bytes per thread / shared bytes per program.\n")
        print(table(everything))
