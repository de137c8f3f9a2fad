"""Fast, exact, differentiable quadratic programs and polyhedral projections.

A backend for the ecosystems people already use: ``solver=hsbackend.HSBackend()`` in a cvxpylayers model, or
:class:`hsbackend.adapters.cvxpylayers.CvxpyLayer` as a drop-in replacement. Host packages are imported only when one
of their names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hsbackend.status import HSBackendError, InvalidOptionError, SolveError, Status, UnsupportedProblemError

__version__ = "0.1.0"

#: Names that need a host package, and the adapter that has them.
_LAZY = {
    "HSBackend": "hsbackend.adapters.cvxpylayers",
    "enable": "hsbackend.adapters.cvxpylayers",
    "disable": "hsbackend.adapters.cvxpylayers",
    "enabled": "hsbackend.adapters.cvxpylayers",
}

__all__ = [  # noqa: RUF022 - the lazily imported names come last
    "HSBackendError",
    "InvalidOptionError",
    "SolveError",
    "Status",
    "UnsupportedProblemError",
    "__version__",
    "HSBackend",  # pyright: ignore[reportUnsupportedDunderAll]
    "disable",  # pyright: ignore[reportUnsupportedDunderAll]
    "enable",  # pyright: ignore[reportUnsupportedDunderAll]
    "enabled",  # pyright: ignore[reportUnsupportedDunderAll]
]


def __getattr__(name: str) -> Any:
    """Import an adapter when one of its names is used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hsbackend' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazily imported names too."""
    return sorted({*globals(), *_LAZY})
