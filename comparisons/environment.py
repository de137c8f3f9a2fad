"""Where and with what a comparison ran: stated on every report and in every row of the CSV."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

# Everything that can decide a number in a report; a package that is not installed is left out.
_PACKAGES = (
    "hsbackend",
    "torch",
    "numpy",
    "scipy",
    "numba",
    "cvxpy",
    "cvxpylayers",
    "diffcp",
    "scs",
    "clarabel",
    "moreau",
    "proxsuite",
    "entmax",
    "jax",
    "jaxopt",
)


@dataclass(frozen=True)
class Environment:
    """The machine, the software and the moment.

    `cores` is what this process may use, `torch_threads` what PyTorch uses of them.
    """

    date: str
    commit: str
    cpu: str
    cores: int
    torch_threads: int
    device: str
    python: str
    versions: dict[str, str]

    @property
    def versions_text(self) -> str:
        """The versions in one line."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())


def describe_environment(device: torch.device) -> Environment:
    """Collect the environment of this process."""
    return Environment(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        python=platform.python_version(),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    """Return the processor's name; Linux tells it in /proc, elsewhere the platform's word has to do."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the checkout this file is in, "unknown" for an installed package."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
