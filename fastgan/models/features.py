"""Frozen feature extractors for content and style losses: pictures in, lists of maps out."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.ops.instance_norm import instance_norm
from fastgan.reference import widen

VGG19_WEIGHTS = "vgg19-dcbb9e9d.pth"
"""torchvision's name for VGG19 trained on ImageNet (IMAGENET1K_V1)."""
VGG19_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")
"""The layers whose maps `VGG19Features` gives by default."""

_VGG19_BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions
_BRIGHTNESS = (0.299, 0.587, 0.114)
_VGG19_MEAN = (0.485, 0.456, 0.406)
_VGG19_STD = (0.229, 0.224, 0.225)


class RandomFeatures(nn.Module):
    r"""Random filters over an image pyramid: texture statistics with nothing to download.

    .. math::
        F_l = \frac{\mathrm{relu}(w * x_l) - \mu_l}{\sigma_l}, \qquad
        x_0 = x, \quad x_{l+1} = \mathrm{halve}(x_l)

    One set of Gaussian filters w sees the picture at every scale: at level 3 a filter of 5 pixels
    spans 40 pixels of the picture. A quarter of the filters see brightness and colour; the
    others have zero mean in each colour channel and see only what changes from place to place.
    Mean and deviation of each channel were taken once from noise with the 1/f spectrum of natural
    pictures. They keep the average colour from outweighing the texture in a Gram matrix.

    Args:
        levels: scales of the pyramid; the longest structure seen is kernel_size · 2^(levels - 1).
        channels: filters.
        kernel_size: side of a filter in pixels, odd.
        seed: decides the filters. They do not depend on torch's default generator.

    Call with RGB pictures [B,3,H,W] in [-1, 1]; gives ``levels`` maps [B, channels, H/2^l, W/2^l].
    Nothing in it is trained.

    Source: Ustyuzhaninov, Brendel, Gatys, Bethge, "What does it take to generate natural
    textures?", 2017; there each scale has filters of its own size instead of a smaller picture.
    """

    filters: Tensor
    offset: Tensor

    def __init__(
        self, *, levels: int = 4, channels: int = 48, kernel_size: int = 5, seed: int = 0
    ) -> None:
        super().__init__()
        if levels < 1 or channels < 1:
            raise ValueError(f"levels and channels must be at least 1, got {levels}, {channels}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.levels = levels
        generator = torch.Generator().manual_seed(seed)
        filters = torch.randn(channels, 3, kernel_size, kernel_size, generator=generator)
        texture = slice(channels // 4, None)
        filters[texture] -= filters[texture].mean((2, 3), keepdim=True)
        filters /= filters.flatten(1).norm(dim=1)[:, None, None, None]
        self.register_buffer("filters", filters.repeat(levels, 1, 1, 1))
        self.register_buffer("offset", torch.zeros(levels * channels))
        self._normalise(_natural_noise(256, generator))

    def _normalise(self, picture: Tensor) -> None:
        # The division goes into the filters: relu(w·x) / s = relu((w / s)·x) for positive s.
        moments = [torch.std_mean(features, dim=(0, 2, 3)) for features in self(picture)]
        std, mean = (torch.cat(values) for values in zip(*moments, strict=True))
        self.filters /= std[:, None, None, None]
        self.offset.copy_(mean / std)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        padding = self.filters.shape[-1] // 2
        levels = zip(self.filters.chunk(self.levels), self.offset.chunk(self.levels), strict=True)
        for filters, offset in levels:
            if maps:
                images = F.avg_pool2d(images, 2, ceil_mode=True)
            padded = _pad(images, padding)
            responses = F.relu(F.conv2d(padded, filters))
            maps.append(responses - offset[:, None, None].to(responses.dtype))
        return maps


def _pad(images: Tensor, padding: int) -> Tensor:
    """Replicates the border, as ``F.pad`` does, whose backward Inductor cannot run on a CPU."""
    if not torch.compiler.is_compiling():
        return F.pad(images, [padding] * 4, mode="replicate")
    top, bottom = images[:, :, :1], images[:, :, -1:]
    images = torch.cat([top] * padding + [images] + [bottom] * padding, 2)
    left, right = images[..., :1], images[..., -1:]
    return torch.cat([left] * padding + [images] + [right] * padding, 3)


class VGG19Features(nn.Module):
    """Feature maps of VGG19 as trained on ImageNet, for GPUs: the field's usual choice.

    Args:
        layers: ReLU outputs by the paper's names, from ``relu1_1`` to ``relu5_4``; the network ends
            at the deepest of them.
        weights: torchvision's ``vgg19-dcbb9e9d.pth``; by default looked for in torch hub's cache,
            where torchvision leaves it. Nothing is downloaded.

    Call with RGB pictures [B,3,H,W] in [-1, 1]; they are normalised inside as torchvision's weights
    expect. Gives one map per layer, in the network's order. The weights take no gradient.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get it.
        ValueError: a layer is unknown, or the file holds no VGG19 weights.

    Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", 2015.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        layers: Sequence[str] = VGG19_LAYERS,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        network, positions = _vgg19()
        if not layers or not set(layers) <= positions.keys():
            raise ValueError(f"layers must be among {', '.join(positions)}, got {layers!r}")
        self._wanted = sorted(positions[name] for name in layers)
        self.features = network[: self._wanted[-1] + 1]
        self.register_buffer("mean", torch.tensor(_VGG19_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_VGG19_STD)[:, None, None], persistent=False)
        self._load(_hub_cache() if weights is None else Path(weights))
        self.requires_grad_(False)

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"VGG19Features: no weights at {path}; download "
                f"https://download.pytorch.org/models/{VGG19_WEIGHTS} to that place, pass "
                "weights=FILE (--extractor-weights FILE), or use RandomFeatures (--extractor "
                "random), which needs none"
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.load_state_dict({name: state[name] for name in self.state_dict()})
        except (pickle.UnpicklingError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"VGG19Features: no VGG19 weights of torchvision in {path}") from error

    def forward(self, images: Tensor) -> list[Tensor]:
        x = ((images + 1) / 2 - self.mean) / self.std
        features = []
        for position, layer in enumerate(self.features):
            x = layer(x)
            if position in self._wanted:
                features.append(x)
        return features


def grey(images: Tensor) -> Tensor:
    """Pictures [B,3,H,W] without colour, each of mean 0 and standard deviation 0.5.

    Brightness after ITU-R BT.601, in three equal channels. Two pictures that differ in nothing but
    brightness, contrast or tint become the same. fp32, also for 16-bit pictures.
    """
    return (0.5 * instance_norm(brightness(images))).expand(-1, 3, -1, -1)


def brightness(images: Tensor) -> Tensor:
    """Luma of RGB pictures [B,3,H,W] after ITU-R BT.601, the Y of YIQ: [B,1,H,W], at least fp32."""
    red, green, blue = widen(images).split(1, 1)
    # Numbers, not a tensor of them: bringing that to a GPU would make the host wait for it.
    return _BRIGHTNESS[0] * red + _BRIGHTNESS[1] * green + _BRIGHTNESS[2] * blue


def _natural_noise(size: int, generator: torch.Generator) -> Tensor:
    """[1,3,size,size]: noise of amplitude 1/f, mean 0, standard deviation 0.5."""
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    frequency = torch.hypot(fy, fx)
    frequency[0, 0] = torch.inf
    spectrum = torch.randn(3, size, size // 2 + 1, 2, generator=generator)
    noise = torch.fft.irfft2(torch.view_as_complex(spectrum) / frequency, s=(size, size))
    return (noise * (0.5 / noise.std()))[None]


def _vgg19() -> tuple[nn.Sequential, dict[str, int]]:
    """torchvision's ``vgg19().features`` with its indices, and where each ReLU is in it."""
    layers: list[nn.Module] = []
    positions: dict[str, int] = {}
    channels = 3
    for block, (width, count) in enumerate(_VGG19_BLOCKS, 1):
        for index in range(1, count + 1):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            positions[f"relu{block}_{index}"] = len(layers) - 1
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers), positions


def _hub_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG19_WEIGHTS
