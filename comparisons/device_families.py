"""Speed of the named polyhedra on a CUDA device: device events, medians, and the floor of memory traffic.

    python -m hsbackend.comparisons.device_families [--quick]

Wants torch, triton, numpy, scipy and numba, and nothing else, so that it runs on a bare GPU machine. Before anything is
timed, values and gradients are compared with the CPU; a wrong one ends the run. The floor of a row is the time to read
and write the data once, forward and backward (point, projection, cotangent, gradient), at the bandwidth of a
large device-to-device copy that is measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from hsbackend import Polyhedron, project, raise_failures

Contestant = Callable[[Tensor], Tensor]
#: Relative errors against the CPU above this end the run.
_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-10}
_WARM_UP, _REPETITIONS = 10, 50
_SINKHORN_STEPS = 20


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: of the set.
        shape: of the batch of points.
        polyhedron: what our library projects on.
        peers: other ways, by name; those of another map than the projection are named so.
    """

    name: str
    shape: tuple[int, ...]
    polyhedron: Polyhedron
    peers: dict[str, Contestant]

    def floor_ms(self, element_bytes: int, bytes_per_s: float) -> float:
        """Return the time to read v and g and to write x and dv."""
        entries = 1
        for size in self.shape:
            entries *= size
        return 1e3 * 4 * entries * element_bytes / bytes_per_s


def sort_sparsemax(v: Tensor) -> Tensor:
    """Project on the simplex with ``torch.sort`` and ``cumsum``, differentiated by autograd."""
    ordered = v.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    sums = ordered.cumsum(-1) - 1.0
    support = (ordered * ranks > sums).sum(-1, keepdim=True)
    tau = sums.gather(-1, support - 1) / support.to(v.dtype)
    return (v - tau).clamp(min=0.0)


def sinkhorn(v: Tensor) -> Tensor:
    """Twenty rounds of row and column normalisation in the log domain: near the Birkhoff polytope, no projection."""
    logits = v
    for _ in range(_SINKHORN_STEPS):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()


@cache
def _fused() -> Contestant:
    return torch.compile(sinkhorn, dynamic=False)


def fused_sinkhorn(v: Tensor) -> Tensor:
    """The same, compiled by torch when it is first used."""
    return _fused()(v)


def cases(quick: bool) -> list[Case]:
    """Return the rows; ``quick`` for tiny sizes."""
    batch = 100 if quick else 10_000
    found: list[Case] = []
    for n in (50,) if quick else (50, 256, 1024, 4096):
        found.append(Case(f"simplex {n}", (batch, n), Polyhedron.simplex(n), {"torch.sort": sort_sparsemax}))
    found.append(Case("l1 ball 1000", (batch, 1000), Polyhedron.l1_ball(1000), {}))
    found.append(Case("monotone 100", (batch, 100), Polyhedron.monotone(100), {}))
    for k, count in ((4, 1000),) if quick else ((4, 10_000), (4, 1_000_000), (8, 100_000), (32, 1000)):
        name = f"{_SINKHORN_STEPS} Sinkhorn steps (another map)"
        found.append(Case(f"Birkhoff {k} x {k}", (count, k, k), Polyhedron.birkhoff(k), {name: fused_sinkhorn}))
    return found


def times_ms(step: Callable[[], object]) -> float:
    """Return the median time of a step by device events, after warm-up."""
    for _ in range(_WARM_UP):
        step()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPETITIONS)]
    for start, end in pairs:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def bandwidth() -> float:
    """Return bytes per second of a copy of 1 GiB, read plus written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / times_ms(lambda: target.copy_(source))


def step_of(solve: Contestant, v: Tensor, g: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return one forward and backward pass."""
    point = v.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        x = solve(point)
        return x.detach(), torch.autograd.grad(x, point, g)[0]

    return step


def errors(case: Case, v: Tensor, g: Tensor) -> float:
    """Return the largest error of value and gradient against the CPU, relative to the data, on a part of the batch."""
    part = slice(0, min(len(v), 1000))
    ours = partial(project, polyhedron=case.polyhedron)
    mine = step_of(ours, v[part], g[part])()
    wanted = step_of(ours, v[part].cpu(), g[part].cpu())()
    sizes = (float(v[part].abs().max()), float(g[part].abs().max()))
    return max(
        float((one.cpu() - other).abs().max()) / size for one, other, size in zip(mine, wanted, sizes, strict=True)
    )


def run(quick: bool, dtype: torch.dtype) -> list[str]:
    """Compare and time everything; return the lines of a Markdown table.

    Raises:
        ArithmeticError: if a value or a gradient is wrong; nothing is timed then.
    """
    every = cases(quick)
    speed = bandwidth()
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}, copy {speed / 1e12:.2f} TB/s; "
        f"ms for forward + backward, median of {_REPETITIONS}",
        "",
        "| set | batch | floor | hsbackend | over floor | error | peers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for case in every:
        generator = torch.Generator(device="cuda").manual_seed(0)
        v, g = (torch.randn(case.shape, generator=generator, device="cuda", dtype=dtype) for _ in range(2))
        error = errors(case, v, g)
        if not error <= _TOLERANCE[dtype]:
            raise ArithmeticError(f"{case.name}: relative error {error:.1e} against the CPU; nothing is timed")
        ours = times_ms(step_of(partial(project, polyhedron=case.polyhedron), v, g))
        raise_failures()
        floor = case.floor_ms(v.element_size(), speed)
        peers = [f"{name}: {times_ms(step_of(solve, v, g)):.3f}" for name, solve in case.peers.items()]
        lines.append(
            f"| {case.name} | {case.shape[0]} | {floor:.3f} | {ours:.3f} | {ours / floor:.1f} | {error:.0e} | "
            f"{'; '.join(peers)} |"
        )
    return lines


def main(arguments: Sequence[str]) -> int:
    """Run; 2 where there is no device."""
    parser = argparse.ArgumentParser(prog="python -m hsbackend.comparisons.device_families", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device: nothing is measured", file=sys.stderr)
        return 2
    print("\n".join(run(options.quick, getattr(torch, options.dtype))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
