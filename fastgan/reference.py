"""Every formula of fastgan once, in plain PyTorch, written to be read.

The public ops fall back to these functions, the tests compare the kernels with them, the
benchmarks use them as a baseline. They check nothing and choose nothing: shapes are what the
public op of the same name documents. 16-bit inputs are computed in fp32, fp32 and fp64 in their
own precision; every function is differentiable to any order that PyTorch itself reaches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """The tensor in the precision it is computed in: fp32 for 16-bit types, else its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --- Gram matrices ------------------------------------------------------------------------------


def gram_divisor(channels: int, positions: int, normalize: str) -> int:
    """What a Gram matrix is divided by; 1 instead of 0 for feature maps without elements."""
    divisor = {"chw": channels * positions, "hw": positions, "none": 1}[normalize]
    return max(divisor, 1)


def gram_matrix(features: Tensor, normalize: str = "chw") -> Tensor:
    """``G_b = F_b F_b^T / divisor`` with ``F_b`` of shape [C, positions]. [B,C,...] -> [B,C,C]."""
    flat = widen(features).flatten(2)
    _, channels, positions = flat.shape
    return torch.bmm(flat, flat.mT) / gram_divisor(channels, positions, normalize)


def style_loss(features: Tensor, targets: Tensor, normalize: str = "chw") -> Tensor:
    """``1/4 mean_b ||G_b - T_b||_F^2`` for one layer; 0 for an empty batch."""
    difference = gram_matrix(features, normalize) - widen(targets)
    return difference.square().sum() / (4 * max(len(features), 1))


def content_loss(features: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """``mean (F - T)^2``, or ``mean_b 1/C sum (F - T)^2`` with ``reduction="channels"``."""
    squares = (widen(features) - widen(targets)).square()
    if reduction == "channels":
        batch, channels = features.shape[:2]
        return squares.sum() / max(batch * channels, 1)
    return squares.sum() / max(squares.numel(), 1)


# --- Instance statistics ------------------------------------------------------------------------


def instance_stats(x: Tensor, eps: float = 1e-5, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(var + eps)`` of each plane. [B,C,...] -> two tensors [B,C]."""
    flat = widen(x).flatten(2)
    if flat.numel() == 0:  # torch warns about the degrees of freedom of no planes at all
        return flat.sum(2), flat.sum(2)
    variance, mean = torch.var_mean(flat, dim=2, correction=correction)
    return mean, (variance + eps).sqrt()


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    reflect_pad: int = 0,
    eps: float = 1e-5,
) -> Tensor:
    """``pad(act((x - mean) / sqrt(var + eps) * weight + bias) + residual)``, biased variance."""
    mean, std = instance_stats(x, eps, correction=0)
    out = (widen(x) - per_plane(mean)) / per_plane(std)
    if weight is not None:
        out = out * per_plane(weight)
    if bias is not None:
        out = out + per_plane(bias)
    if activation == "relu":
        out = out.relu()
    elif activation == "leaky_relu":
        out = F.leaky_relu(out, negative_slope)
    if residual is not None:
        out = out + residual
    return reflection_pad2d(out.to(x.dtype), (reflect_pad,) * 4)


def reflection_pad2d(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Reflection of H and W at their edges; padding is (left, right, top, bottom)."""
    if not any(padding):
        return x
    if x.numel() == 0:  # torch's own refuses an empty batch
        left, right, top, bottom = padding
        return F.pad(x, (left, right, top, bottom))
    return F.pad(x, padding, mode="reflect")


def adain(
    content: Tensor,
    style_mean: Tensor,
    style_std: Tensor,
    alpha: float | Tensor = 1.0,
    eps: float = 1e-5,
    correction: int = 1,
) -> Tensor:
    """``alpha (style_std (x - mean) / std + style_mean) + (1 - alpha) x`` for each plane."""
    mean, std = instance_stats(content, eps, correction)
    x = widen(content)
    stylised = per_plane(style_std) * (x - per_plane(mean)) / per_plane(std) + per_plane(style_mean)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(x.dtype)[:, None, None, None]
    return (alpha * stylised + (1 - alpha) * x).to(content.dtype)


def adain_style_loss(
    features: Tensor, mean: Tensor, std: Tensor, eps: float = 1e-5, correction: int = 1
) -> Tensor:
    """``mean (mean(F) - mean)^2 + mean (std(F) - std)^2`` for one layer."""
    own_mean, own_std = instance_stats(features, eps, correction)
    count = max(own_mean.numel(), 1)
    return ((own_mean - mean).square().sum() + (own_std - std).square().sum()) / count


def per_plane(values: Tensor) -> Tensor:
    """[C] or [B,C] -> a tensor that broadcasts over the positions of [B,C,H,W]."""
    return widen(values)[..., None, None]


# --- GAN losses ---------------------------------------------------------------------------------


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, exact to rounding for every x (torch's turns linear at 20)."""
    return -F.logsigmoid(-x)


def discriminator_loss(
    real: Tensor, fake: Tensor, mode: str = "bce", label_smoothing: float = 0.0
) -> Tensor:
    """The loss of one scale: the mean over the real logits plus the mean over the fake ones."""
    r, f = widen(real), widen(fake)
    if mode == "bce":
        return (softplus(-r) + label_smoothing * r).mean() + softplus(f).mean()
    if mode == "lsgan":
        return (r - 1).square().mean() + f.square().mean()
    if mode == "hinge":
        return (1 - r).relu().mean() + (1 + f).relu().mean()
    return f.mean() - r.mean()  # wgan


def generator_loss(fake: Tensor, mode: str = "bce", saturating: bool = False) -> Tensor:
    """The loss of one scale: the mean over the fake logits."""
    f = widen(fake)
    if mode == "bce":
        return -softplus(f).mean() if saturating else softplus(-f).mean()
    if mode == "lsgan":
        return (f - 1).square().mean()
    return -f.mean()  # hinge, wgan


def label_loss(
    logits: Tensor, label: float, is_real: bool, mode: str, for_discriminator: bool
) -> Tensor:
    """The loss of one scale whose images all carry one label; the mean over its logits."""
    x = widen(logits)
    if mode == "bce":
        return (label * softplus(-x) + (1 - label) * softplus(x)).mean()
    if mode == "lsgan":
        return (x - label).square().mean()
    signed = -x if is_real else x
    if mode == "hinge" and for_discriminator:
        return (1 + signed).relu().mean()
    return signed.mean()  # wgan, and a generator's hinge


def discriminator_stats(
    real: list[Tensor], fake: list[Tensor], mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean logits and shares on the right side of the decision point, over all scales."""
    threshold = 0.5 if mode == "lsgan" else 0.0
    r = torch.cat([widen(x).flatten() for x in real])
    f = torch.cat([widen(x).flatten() for x in fake])
    real_accuracy = (r > threshold).to(r.dtype).mean()
    fake_accuracy = (f < threshold).to(f.dtype).mean()
    return r.mean(), f.mean(), real_accuracy, fake_accuracy
