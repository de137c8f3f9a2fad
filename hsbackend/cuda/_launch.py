"""What the launch functions share: tensors as rows, output buffers, sizes of tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def next_power(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(tensor: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """Return a tensor whose rows are contiguous and the distance between rows; 0 for one row that all items share.

    None becomes any tensor: a kernel that is told of the absence does not read it.
    """
    if tensor is None:
        return like, 0
    tensor = tensor.detach()
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor, 0 if tensor.shape[0] == 1 else tensor.stride(0)


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return an output buffer; kernels write every entry of it."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def poison(tensor: Tensor) -> Tensor:
    """Return a tensor filled with what no kernel writes by chance: NaN, or the largest integer."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on a grid of one axis."""
    kernel[(programs,)](*arguments, **options)
