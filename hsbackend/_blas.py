# pyright: reportMissingParameterType=false
"""Two vector operations for compiled kernels.

Numba's disk cache knows a kernel's own file only, not the files of the helpers it calls: a kernel and its helpers
therefore share a file, and what is shared more widely stays as small and as settled as this.
"""

from __future__ import annotations

from hsbackend._parallel import inline_kernel


@inline_kernel
def dot(a, b, n):
    """Return ``a[:n]'b[:n]``."""
    total = 0.0
    for i in range(n):
        total += a[i] * b[i]
    return total


@inline_kernel
def axpy(alpha, x, y, n):
    """Add ``alpha * x[:n]`` to ``y[:n]``."""
    for i in range(n):
        y[i] += alpha * x[i]
