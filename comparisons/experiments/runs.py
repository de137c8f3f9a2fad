"""What the null-space experiments share: runs as records, mean and spread over seeds, cost of a step, files."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import importlib.metadata
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsbackend.comparisons.environment import Environment, describe_environment
from hsbackend.comparisons.tables import align, markdown_table

#: One run of one method with one seed: names and numbers.
Record = Mapping[str, Any]
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Column:
    """One measured number of a table."""

    key: str
    heading: str
    form: str = ".3f"


@dataclass(frozen=True)
class Study:
    """An experiment that has been run: what is printed and written.

    Attributes:
        name: of the command, and of the files.
        title: heading.
        setting: what was run, in sentences.
        groups: keys of a record that name a line of the table, all but the seed.
        columns: what was measured.
        records: one per line and seed, in order.
        draw: draws the figure; None for none.
        device: where it ran.
    """

    name: str
    title: str
    setting: Sequence[str]
    groups: Sequence[str]
    columns: Sequence[Column]
    records: Sequence[Record]
    draw: Callable[[Any], None] | None
    device: torch.device
    command: str = field(default_factory=lambda: "python -m hsbackend.comparisons " + " ".join(sys.argv[1:]))

    def lines(self) -> list[tuple[tuple[str, ...], list[Record]]]:
        """Return the records of each line of the table, in the order of their first."""
        found: dict[tuple[str, ...], list[Record]] = {}
        for record in self.records:
            found.setdefault(tuple(str(record[key]) for key in self.groups), []).append(record)
        return list(found.items())

    def cells(self) -> list[list[str]]:
        """Return the table: mean over seeds, and the standard deviation where there are several."""
        cells = [[*self.groups, *(column.heading for column in self.columns)]]
        for names, records in self.lines():
            cells.append([*names, *(_cell([record[c.key] for record in records], c.form) for c in self.columns)])
        return cells

    def text(self) -> str:
        """Return everything as plain text."""
        environment = describe_environment(self.device)
        lines = [self.title, "", *self.setting, "", align(self.cells()), "", _machine(environment)]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> tuple[Path, ...]:
        """Write ``experiments-NAME.csv`` and ``.md``, and ``figures/NAME.png``; return the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.name.replace("_", "-")
        table, report = folder / f"experiments-{stem}.csv", folder / f"experiments-{stem}.md"
        environment = describe_environment(self.device)
        keys = list(dict.fromkeys(key for record in self.records for key in record))
        with table.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow([*keys, "cpu", "cores", "device", "date", "commit", "versions"])
            where = [
                environment.cpu, environment.cores, environment.device, environment.date, environment.commit,
                _versions(environment),
            ]  # fmt: skip
            writer.writerows([*(record.get(key, "") for key in keys), *where] for record in self.records)
        lines = [f"# {self.title}", "", *self.setting, "", markdown_table(self.cells()), ""]
        paths: tuple[Path, ...] = (table, report)
        if self.draw is not None:
            figure = folder / "figures" / f"{stem}.png"
            figure.parent.mkdir(exist_ok=True)
            _save(self.draw, figure)
            lines += [f"![{self.title}](figures/{stem}.png)", ""]
            paths = (*paths, figure)
        lines += [f"`{self.command}`", "", _machine(environment)]
        report.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return paths


def _cell(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation; a dash for what was not measured."""
    finite = [value for value in values if not math.isnan(value)]
    if not finite:
        return "-"
    mean = format(float(np.mean(finite)), form)
    return mean if len(finite) == 1 else f"{mean} ± {format(float(np.std(finite, ddof=1)), form)}"


def _machine(environment: Environment) -> str:
    return (
        f"{environment.cpu}, {environment.cores} cores, {environment.device}, torch threads "
        f"{environment.torch_threads}, {environment.date}, commit {environment.commit}; {_versions(environment)}"
    )


def _versions(environment: Environment) -> str:
    """Return what a comparison states, and scikit-learn, which has the data and a contestant."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{environment.versions_text}, scikit-learn {importlib.metadata.version('scikit-learn')}"
    return environment.versions_text


def _save(draw: Callable[[Any], None], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path, dpi=90)


class Cost:
    """Seconds of every step, and the memory the steps took above what was held before the first.

    On CUDA memory is the allocator's peak. On Linux it is the peak resident set, which the system is asked to forget at
    the beginning; elsewhere, or where it may not be reset, NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._before = math.nan
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = float(torch.cuda.memory_allocated(device))
        else:
            _return_memory()
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
                self._before = _status("VmRSS")

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time what is inside."""
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds.append(time.perf_counter() - began)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def step_ms(self) -> float:
        """Median; without the first step, which allocates, if there are more."""
        return 1e3 * float(np.median(self.seconds[1:] or self.seconds or [math.nan]))

    @property
    def step_mib(self) -> float:
        """Peak since the beginning, above the beginning."""
        if self._device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self._device) - self._before) / MEBIBYTE
        return (_status("VmHWM") - self._before) / MEBIBYTE if not math.isnan(self._before) else math.nan


def _return_memory() -> None:
    """Give freed memory back to the system, where the C library can: what is used again would not show in a peak."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_rss_mib() -> float:
    """Return the peak resident set of this process so far (since the last :class:`Cost` on the CPU); NaN if unknown."""
    try:
        return _status("VmHWM") / MEBIBYTE
    except OSError:
        return math.nan


def _status(key: str) -> float:
    """Return a size of this process in bytes, as Linux keeps it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024.0 * float(line.split()[1])
    return math.nan


@dataclass(frozen=True)
class Split:
    """Images (n, 64) in [0, 1] and labels (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(seed: int, device: torch.device, *, most: int | None = None, test_share: float = 0.3) -> Split:
    """Return scikit-learn's digits, 8 x 8 pixels, split at random and stratified.

    Args:
        seed: of the split.
        device: of the tensors.
        most: use only so many images.
        test_share: of all images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    x, y = data.data[:most] / 16.0, data.target[:most]
    parts: list[NDArray[Any]] = train_test_split(x, y, test_size=test_share, random_state=seed, stratify=y)
    train_x, test_x = (torch.as_tensor(part, dtype=torch.float32, device=device) for part in parts[:2])
    train_y, test_y = (torch.as_tensor(part, dtype=torch.int64, device=device) for part in parts[2:])
    return Split(train_x, train_y, test_x, test_y)


def minibatches(size: int, batch: int, steps: int, seed: int) -> Tensor:
    """Return (steps, batch) indices, without replacement inside of a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size, generator=generator)[:batch] for _ in range(steps)])


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Return the share of right answers in percent."""
    return 100.0 * float((model(x).argmax(-1) == y).double().mean())
