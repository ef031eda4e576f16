"""What every launcher needs: the size of the device, tile arithmetic, the device to launch on."""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H100's for tensors that are on none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; make that the tensor's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


class Walk(NamedTuple):
    """How a kernel walks over [B, C, positions]: one stride for each, in elements."""

    channels_last: bool  # channels are the contiguous axis, else positions are
    batch: int
    channel: int
    position: int


def walk(x: Tensor) -> Walk | None:
    """Strides of a feature map [B, C, ...] whose planes can be read in one run; None if not.

    Dense tensors of both memory formats and their slices over images or channels qualify. Strides
    of axes of length 1 are what they would be in a dense tensor.
    """
    B, C = x.shape[:2]
    HW = x.shape[2:].numel()
    strides = x.stride()
    batch = strides[0] if B > 1 else C * HW
    if HW == 0:  # nowhere to go
        return Walk(False, 0, 0, 1)
    if HW == 1:
        return Walk(True, batch, 1, C) if strides[1] == 1 else Walk(False, batch, strides[1], 1)
    if x.ndim == 3 or x.shape[2] == 1:
        position = strides[-1]
    elif x.shape[3] == 1 or strides[2] == x.shape[3] * strides[3]:
        position = strides[2] if x.shape[3] == 1 else strides[3]
    else:
        return None
    if position == 1:
        return Walk(False, batch, strides[1] if C > 1 else HW, 1)
    return Walk(True, batch, 1, position) if strides[1] == 1 or C == 1 else None


def readable(x: Tensor) -> tuple[Tensor, Walk]:
    """A tensor as the kernels can walk over it: itself, at worst a copy."""
    strides = walk(x)
    if strides is None:
        x = x.clone()  # of the same memory format
        strides = walk(x)
    if strides is None:
        x = x.contiguous()
        strides = walk(x)
    assert strides is not None
    return x, strides


def is_dense(x: Tensor, channels_last: bool) -> bool:
    """Whether this is how a kernel writes a tensor of this shape."""
    C, HW = x.shape[1], x.shape[2:].numel()
    if channels_last:
        return walk(x) == Walk(True, C * HW, 1, C)
    return walk(x) == Walk(False, C * HW, HW, 1)


def writable(out: Tensor, channels_last: bool) -> Tensor:
    """The tensor if it is dense in the memory format that a kernel writes, else a buffer."""
    if is_dense(out, channels_last):
        return out
    if channels_last:
        return out.new_empty(out.movedim(1, -1).shape).movedim(-1, 1)
    return out.new_empty(out.shape)


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """The tensor if it is dense in this memory format, else a copy that is."""
    out = writable(x, channels_last)
    return x if out is x else out.copy_(x)
