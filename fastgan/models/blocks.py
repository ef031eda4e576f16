"""Layers that the style transfer networks and their discriminator are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastgan.nn import ReflectionPad2d
from fastgan.ops.instance_norm import instance_norm


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    bias: bool = True,
    gain: float = 2**0.5,
) -> nn.Conv2d:
    """Convolution whose outputs begin with `gain` times the deviation of its inputs.

    sqrt(2) makes up for a ReLU that follows (He et al., "Delving Deep into Rectifiers", 2015). From
    torch's default, which is sqrt(6) times smaller, the networks learn markedly slower.
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=bias)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(in_channels * kernel_size**2))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ConvNorm(nn.Module):
    """Convolution of a padded map, then instance norm, activation and the next one's padding.

    Everything after the convolution is one pass (:func:`fastgan.instance_norm`). The convolution
    has no bias, which the norm would take away again.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        activation: str | None = "relu",
        negative_slope: float = 0.2,
        reflect_pad: int = 0,
    ) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, kernel_size, stride=stride, bias=False)
        self.weight = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.activation = activation
        self.negative_slope = negative_slope
        self.reflect_pad = reflect_pad

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return instance_norm(
            self.conv(x),
            weight=self.weight,
            bias=self.bias,
            residual=residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            reflect_pad=self.reflect_pad,
        )


class NormedResidual(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), at constant size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pad = ReflectionPad2d(1)
        self.first = ConvNorm(channels, channels, 3, reflect_pad=1)
        self.second = ConvNorm(channels, channels, 3, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.pad(x)), residual=x)
