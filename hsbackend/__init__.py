"""Fast, exact, differentiable quadratic programs and polyhedral projections.

For PyTorch: :func:`project` on a :class:`Polyhedron`, :func:`solve_qp`, :mod:`hsbackend.functional` and
:mod:`hsbackend.nn`. A backend for the ecosystems people already use: ``solver=hsbackend.HSBackend()`` in a cvxpylayers
model, or :class:`hsbackend.adapters.cvxpylayers.CvxpyLayer` as a drop-in replacement. PyTorch and host packages are
imported only when one of the names that need them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hsbackend.status import HSBackendError, InvalidOptionError, SolveError, Status, UnsupportedProblemError

if TYPE_CHECKING:
    from hsbackend import functional, nn, nullspace
    from hsbackend.checks import checking, raise_failures
    from hsbackend.least_squares import AdjointNotConvergedWarning, LstsqSolution, StopReason, lstsq
    from hsbackend.polyhedron import Polyhedron, hs_jacobian, hs_jvp, hs_vjp, project
    from hsbackend.qp import QPSolution, solve_qp

__version__ = "0.1.0"

#: Names that need PyTorch or a host package, and the module that has them.
_LAZY = {
    "checking": "hsbackend.checks",
    "raise_failures": "hsbackend.checks",
    "Polyhedron": "hsbackend.polyhedron",
    "hs_jacobian": "hsbackend.polyhedron",
    "hs_jvp": "hsbackend.polyhedron",
    "hs_vjp": "hsbackend.polyhedron",
    "project": "hsbackend.polyhedron",
    "QPSolution": "hsbackend.qp",
    "solve_qp": "hsbackend.qp",
    "AdjointNotConvergedWarning": "hsbackend.least_squares",
    "LstsqSolution": "hsbackend.least_squares",
    "StopReason": "hsbackend.least_squares",
    "lstsq": "hsbackend.least_squares",
    "HSBackend": "hsbackend.adapters.cvxpylayers",
    "enable": "hsbackend.adapters.cvxpylayers",
    "disable": "hsbackend.adapters.cvxpylayers",
    "enabled": "hsbackend.adapters.cvxpylayers",
}
_MODULES = ("functional", "nn", "nullspace")

__all__ = [  # noqa: RUF022 - the lazily imported names come last
    "HSBackendError",
    "InvalidOptionError",
    "SolveError",
    "Status",
    "UnsupportedProblemError",
    "__version__",
    "AdjointNotConvergedWarning",
    "LstsqSolution",
    "Polyhedron",
    "QPSolution",
    "StopReason",
    "checking",
    "functional",
    "hs_jacobian",
    "hs_jvp",
    "hs_vjp",
    "lstsq",
    "nn",
    "nullspace",
    "project",
    "raise_failures",
    "solve_qp",
    "HSBackend",  # pyright: ignore[reportUnsupportedDunderAll]
    "disable",  # pyright: ignore[reportUnsupportedDunderAll]
    "enable",  # pyright: ignore[reportUnsupportedDunderAll]
    "enabled",  # pyright: ignore[reportUnsupportedDunderAll]
]


def __getattr__(name: str) -> Any:
    """Import a module when it or one of its names is used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"hsbackend.{name}")
    raise AttributeError(f"module 'hsbackend' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazily imported names too."""
    return sorted({*globals(), *_LAZY, *_MODULES})
