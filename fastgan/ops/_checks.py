"""Checks of user input, before any launch and without a synchronisation.

Each names the op, the argument, what was expected and what came.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = (int, float, Real)  # the abstract class alone would do, but takes longer to ask
_INTEGERS = (int, Integral)


def shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def one_of(op: str, name: str, value: object, valid: Sequence[object]) -> None:
    if value not in valid:
        names = ", ".join(repr(v) for v in valid)
        raise ValueError(f"{op}: {name} must be one of {names}, got {value!r}")


def floating(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {x.layout}")


def feature_map(op: str, name: str, x: object, *, ranks: tuple[int, ...] = (4,)) -> None:
    """[B,C,H,W] and, where ``ranks`` admits 3, [B,C,L]; every image has positions."""
    floating(op, name, x)
    assert isinstance(x, Tensor)
    if x.ndim not in ranks:
        expected = "[B, C, H, W] or [B, C, L]" if 3 in ranks else "[B, C, H, W]"
        raise ValueError(f"{op}: {name} must be {expected}, got {shape(x)}")


def same_device(op: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    if x.device != first.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {first_name}, {first.device}, got {x.device}"
        )


def positions(op: str, name: str, x: Tensor, correction: int) -> None:
    """A variance with this correction needs more positions than it subtracts."""
    count = x[0, 0].numel() if x.numel() else x.shape[2:].numel()
    if count <= correction:
        raise ValueError(
            f"{op}: {name} must have more than {correction} positions for correction={correction}, "
            f"got {shape(x)}"
        )


def number(op: str, name: str, value: object) -> None:
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def integer(op: str, name: str, value: object) -> None:
    if not isinstance(value, _INTEGERS):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")


def non_negative(op: str, name: str, value: Any) -> None:
    number(op, name, value)
    if not value >= 0:
        raise ValueError(f"{op}: {name} must be non-negative, got {value!r}")


def layers(op: str, name: str, value: Any) -> list[Any]:
    """One layer or a list of layers, as a list with at least one entry."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, list | tuple):
        raise TypeError(f"{op}: {name} must be a tensor or a list, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{op}: {name} must not be an empty list")
    return list(value)


def equally_long(op: str, name: str, value: list[Any], first_name: str, first: list[Any]) -> None:
    if len(value) != len(first):
        raise ValueError(
            f"{op}: {name} must be as many as {first_name}, {len(first)}, got {len(value)}"
        )


def layer_weights(
    op: str, weights: Sequence[float] | None, first_name: str, count: int
) -> list[float]:
    """One weight per layer; 1 each where none are given."""
    if weights is None:
        return [1.0] * count
    if isinstance(weights, (*_NUMBERS, Tensor)):
        raise TypeError(f"{op}: weights must be a list, one number per layer, got {weights!r}")
    if len(weights) != count:
        raise ValueError(
            f"{op}: weights must be as many as {first_name}, {count}, got {len(weights)}"
        )
    for i, weight in enumerate(weights):
        number(op, f"weights[{i}]", weight)
    return [float(weight) for weight in weights]


def or_one(batch: int) -> str:
    """The sizes a batch may have that is to match another, or one picture for all of it."""
    return "1" if batch == 1 else f"{batch} or 1"


def label(name: str, index: int, count: int) -> str:
    """``features[2]`` in a list of several layers, ``features`` alone."""
    return f"{name}[{index}]" if count > 1 else name
