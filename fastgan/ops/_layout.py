"""Memory formats: an op's result has the strides of ``torch.empty_like`` of its input."""

import torch
from torch import Tensor


def like(out: Tensor, x: Tensor) -> Tensor:
    """``out``, of the shape of ``x``, with the strides of ``torch.empty_like(x)``."""
    wanted = torch.empty_like(x, device="meta").stride()
    if out.stride() == wanted:
        return out
    return torch.empty_strided(out.shape, wanted, dtype=out.dtype, device=out.device).copy_(out)


def padded_like(out: Tensor, x: Tensor) -> Tensor:
    """``out``, a padded ``x``, in the memory format of ``torch.empty_like(x)``."""
    if torch.empty_like(x, device="meta").is_contiguous(memory_format=torch.channels_last):
        return out.contiguous(memory_format=torch.channels_last)
    return out.contiguous()
