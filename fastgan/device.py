"""Which device, and which precision on it, when the user leaves the choice open."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias, get_args

import torch

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]


def choose_device(requested: str | None = None) -> torch.device:
    """The device asked for, or the accelerator of this machine, or the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if requested is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(requested)
        torch.empty((), device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {requested!r} cannot be used here: {reason}") from None
    return device


def choose_precision(requested: Precision | None, device: torch.device) -> Precision:
    """The precision asked for; else bf16 on GPUs of capability 8.0 on, fp16 below, fp32 elsewhere.

    `torch.cuda.is_bf16_supported` would count emulation, so the capability is what is asked.

    Raises:
        ValueError: there is no such precision.
    """
    if requested is not None:
        if requested not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ValueError(f"precision must be one of {known}, got {requested!r}")
        return requested
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


_NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is one of PyTorch's ways to say that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


def use_deterministic_algorithms() -> None:
    """The same bits on every run on the same GPU, for the rest of the process.

    To be called before the first matrix product of the process, for cuBLAS then sets itself up.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
