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

    Dense tensors of both memory formats and their slices over images or channels qualify.
    """
    channels, positions = x.shape[1], x.shape[2:].numel()
    strides = x.stride()
    if x.ndim == 3 or x.shape[2] == 1:
        position = strides[-1]
    elif x.shape[3] == 1 or strides[2] == x.shape[3] * strides[3]:
        position = strides[2] if x.shape[3] == 1 else strides[3]
    else:
        return None
    if position == 1 or positions == 1:
        # A single position is contiguous with its neighbours of the other channels, if any.
        channels_last = positions == 1 and strides[1] == 1 and channels > 1
        return Walk(channels_last, strides[0], strides[1], 1)
    if strides[1] == 1 or channels == 1:
        return Walk(True, strides[0], 1, position)
    return None


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


def writable(out: Tensor, channels_last: bool) -> Tensor:
    """The tensor, if it is dense in the memory format a kernel writes; else a buffer that is."""
    B, C, *size = out.shape
    HW = out.shape[2:].numel()
    shape = (B, *size, C) if channels_last else (B, C, *size)
    dense = Walk(channels_last, C * HW, 1, C) if channels_last else Walk(False, C * HW, HW, 1)
    if walk(out) == dense:
        return out
    buffer = out.new_empty(shape)
    return buffer.movedim(-1, 1) if channels_last else buffer
