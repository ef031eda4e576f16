"""The residual generator of CycleGAN, and its weights as the public code saves them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgan.models.init import normal_init
from fastgan.nn import ReflectionPad2d
from fastgan.ops.instance_norm import instance_norm


class ResidualBlock(nn.Module):
    """``x + norm(conv(relu(norm(conv(x)))))`` with 3x3 convolutions and instance norm.

    Takes x padded by 1, [B,C,H+2,W+2], as its convolution wants it, and returns the result padded
    by `reflect_pad`, as whatever follows wants it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, bias=False)

    def forward(self, padded: Tensor, reflect_pad: int) -> Tensor:
        x = self.conv2(instance_norm(self.conv1(padded), activation="relu", reflect_pad=1))
        residual = padded[..., 1:-1, 1:-1].to(x.dtype)  # may be fp32 under autocast
        return instance_norm(x, residual=residual, reflect_pad=reflect_pad)


class ResidualBlocks(nn.ModuleList):
    """Blocks in a row, at least one: from x padded by 1 to the result without padding."""

    def __init__(self, channels: int, blocks: int) -> None:
        if blocks < 1:  # which would leave the padding where it is
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        super().__init__(ResidualBlock(channels) for _ in range(blocks))

    def forward(self, padded: Tensor) -> Tensor:
        last = len(self) - 1
        for index, block in enumerate(self):
            padded = block(padded, 0 if index == last else 1)
        return padded


class ResnetGenerator(nn.Module):
    """Pictures to pictures: [B,3,H,W] -> [B,3,H,W] in [-1, 1]; H and W multiples of 4, at least 8.

    A 7x7 convolution, two that halve the size, residual blocks, two that double it, a 7x7
    convolution and tanh; instance norm without affine, ReLU, reflection padding where nothing is
    halved or doubled. Norm, activation, residual and padding are one pass each
    (:func:`fastgan.instance_norm`); a convolution before a norm has no bias. Initial weights are
    N(0, 0.02²).

    Args:
        width: channels at full resolution.
        blocks: residual blocks, at least 1.

    Source: Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and
    Super-Resolution", 2016; as in Zhu et al., "Unpaired Image-to-Image Translation using
    Cycle-Consistent Adversarial Networks", 2017.
    """

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        self.pad = ReflectionPad2d(3)
        self.stem = nn.Conv2d(3, width, 7, bias=False)
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.down2 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False)
        self.blocks = ResidualBlocks(4 * width, blocks)
        self.up1 = _up(4 * width, 2 * width)
        self.up2 = _up(2 * width, width)
        self.head = nn.Conv2d(width, 3, 7)
        self.apply(normal_init)

    def forward(self, pictures: Tensor) -> Tensor:
        x = instance_norm(self.stem(self.pad(pictures)), activation="relu")
        x = instance_norm(self.down1(x), activation="relu")
        x = self.blocks(instance_norm(self.down2(x), activation="relu", reflect_pad=1))
        x = instance_norm(self.up1(x), activation="relu")
        x = instance_norm(self.up2(x), activation="relu", reflect_pad=3)
        return torch.tanh(self.head(x))


def _up(channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Twice the size."""
    return nn.ConvTranspose2d(
        channels, out_channels, 3, stride=2, padding=1, output_padding=1, bias=False
    )


def load_cyclegan_generator(path: str | os.PathLike[str]) -> ResnetGenerator:
    """A generator that the public CycleGAN code saved (``latest_net_G_A.pth``).

    That code's ``resnet_<n>blocks`` generator is one `nn.Sequential`, whose layers become

    ====================================== ============================
    ``model.1``, ``model.4``, ``model.7``  ``stem``, ``down1``, ``down2``
    ``model.<10+i>.conv_block.1``          ``blocks.<i>.conv1``
    ``model.<10+i>.conv_block.5`` (or 6)   ``blocks.<i>.conv2``
    ``model.<10+n>``, ``model.<13+n>``     ``up1``, ``up2``
    ``model.<17+n>``                       ``head``
    ====================================== ============================

    Biases in front of an instance norm, which takes them away again, and the running statistics of
    old files, which were never used, are left out. Reads no pickled code (``weights_only=True``).

    Raises:
        ValueError: the file holds something else; says what.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if isinstance(error, pickle.UnpicklingError):  # torch advises to unpickle it all the same
            reason = "it is no pickle, or one of more than tensors"
        else:
            reason = str(error).partition("\n")[0] or "it is empty or cut short"
        raise ValueError(f"{path}: holds no weights that can be read safely: {reason}") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        found = "other values" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ValueError(f"{path}: must hold a state dict of tensors alone, holds {found}")
    return _from_cyclegan(state, Path(path))


_IDLE = {"bias", "running_mean", "running_var", "num_batches_tracked"}


def _from_cyclegan(state: Mapping[str, Tensor], path: Path) -> ResnetGenerator:
    theirs = {name.removeprefix("module."): value for name, value in state.items()}
    blocks = sum(name.endswith("conv_block.1.weight") for name in theirs)
    second = 6 if "model.10.conv_block.6.weight" in theirs else 5  # with dropout, without
    layers = {"model.1": "stem", "model.4": "down1", "model.7": "down2"}
    for i in range(blocks):
        layers[f"model.{10 + i}.conv_block.1"] = f"blocks.{i}.conv1"
        layers[f"model.{10 + i}.conv_block.{second}"] = f"blocks.{i}.conv2"
    layers[f"model.{10 + blocks}"] = "up1"
    layers[f"model.{13 + blocks}"] = "up2"
    layers[f"model.{17 + blocks}"] = "head"
    ours: dict[str, Tensor] = {}
    for name, value in theirs.items():
        layer, _, entry = name.rpartition(".")
        if layer in layers and (entry == "weight" or layers[layer] == "head"):
            ours[f"{layers[layer]}.{entry}"] = value
        elif entry not in _IDLE:
            raise ValueError(f"{path}: no resnet generator of CycleGAN: unknown entry {name}")
    if "stem.weight" not in ours or blocks == 0:
        raise ValueError(f"{path}: no resnet generator of CycleGAN")
    generator = ResnetGenerator(ours["stem.weight"].shape[0], blocks)
    try:
        generator.load_state_dict(ours)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: no resnet generator of CycleGAN: {reason}") from None
    return generator
