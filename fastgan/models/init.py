"""Initial weights, for `nn.Module.apply`."""

from __future__ import annotations

from torch import nn


def normal_init(module: nn.Module) -> None:
    """Of a convolution: weights N(0, 0.02²), biases 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        _zero_bias(module)


def kaiming_init(module: nn.Module) -> None:
    """Of a convolution: weights N(0, 2 / fan-in), biases 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight)
        _zero_bias(module)


def _zero_bias(module: nn.Conv2d | nn.ConvTranspose2d) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
