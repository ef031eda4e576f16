"""Statistics of each image's channels, and the ops built on them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import reference
from fastgan.kernels._common import walk
from fastgan.ops import _checks, _dispatch, _instance_norm, _layout

ACTIVATIONS = (None, "relu", "leaky_relu")


class InstanceStats(NamedTuple):
    """Mean and standard deviation of each (image, channel) plane, both [B, C] (or [1, C])."""

    mean: Tensor
    std: Tensor


def instance_stats(
    x: Tensor, *, eps: float = 1e-5, correction: int = 1, impl: str | None = None
) -> InstanceStats:
    r"""Mean and standard deviation over the positions of each (image, channel) plane.

    .. math::
        \mu = \frac1M \sum_i x_i, \qquad
        \sigma = \sqrt{\frac{1}{M - \mathrm{correction}} \sum_i (x_i - \mu)^2 + \epsilon}

    Args:
        x: [B, C, H, W] or [B, C, L] with M = H·W or L positions; fp16, bf16, fp32 or fp64, any
            strides.
        eps: added to the variance, so that planes of one value have finite gradients.
        correction: 1 for the unbiased variance, 0 for the biased one, as in ``torch.var``.
        impl: ``"reference"``, ``"triton"``, ``"native"`` or None for the fastest that supports the
            call.

    Returns:
        :class:`InstanceStats` of fp32 tensors [B, C] (fp64 for fp64 input), also under autocast.

    Differentiable twice with respect to ``x``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or an option of the wrong type.
        ValueError: wrong shape, or not more positions than ``correction``.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Huang, Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization", 2017.
    """
    op = "instance_stats"
    _checks.feature_map(op, "x", x, ranks=(3, 4))
    _check_variance(op, "x", x, eps, correction)
    impl = _dispatch.choose(op, "instance_norm", impl, x.device, cannot=_cannot(x), note=_copied(x))
    if impl != "reference":
        return InstanceStats(*_instance_norm.stats(x, eps, correction, impl))
    with _dispatch.without_autocast(x.device):
        return InstanceStats(*reference.instance_stats(x, eps, correction))


def instance_norm(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    reflect_pad: int = 0,
    eps: float = 1e-5,
    impl: str | None = None,
) -> Tensor:
    r"""Instance normalisation with what usually follows it, in one pass.

    .. math::
        y = \mathrm{pad}\Bigl(\mathrm{act}\Bigl(\frac{x - \mu}{\sqrt{\mathrm{var} + \epsilon}}
        \cdot \mathrm{weight} + \mathrm{bias}\Bigr) + \mathrm{residual}\Bigr)

    with mean and biased variance over the positions of each plane. Unlike torch's, a plane of one
    position is no error: its result is act(bias) + residual, with finite gradients.

    Args:
        x: [B, C, H, W]; fp16, bf16, fp32 or fp64, any strides.
        weight, bias: [C], or [B, C] for conditional normalisation; fp32 beside 16-bit ``x`` is
            fine.
        residual: of the shape, dtype and device of ``x``.
        activation: None, ``"relu"`` or ``"leaky_relu"`` (with ``negative_slope``).
        reflect_pad: pads H and W of the result by reflection, for the convolution that follows.
        eps: added to the variance.
        impl: ``"reference"``, ``"triton"``, ``"native"`` or None for the fastest that supports the
            call.

    Returns:
        [B, C, H + 2·reflect_pad, W + 2·reflect_pad] in the dtype and memory format of ``x``.

    Differentiable twice with respect to ``x``, ``weight``, ``bias`` and ``residual``.

    Raises:
        TypeError: an argument is no floating-point tensor, ``residual`` of another dtype, or an
            option of the wrong type.
        ValueError: shapes, devices or options do not fit.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", 2016; conditional: Dumoulin, Shlens, Kudlur, "A Learned Representation For
    Artistic Style", 2017.
    """
    op = "instance_norm"
    _checks.feature_map(op, "x", x)
    _checks.one_of(op, "activation", activation, ACTIVATIONS)
    _checks.number(op, "negative_slope", negative_slope)
    _checks.non_negative(op, "eps", eps)
    _check_affine(op, "weight", weight, x)
    _check_affine(op, "bias", bias, x)
    _check_residual(op, residual, x)
    _check_reflect_pad(op, reflect_pad, x)
    _checks.positions(op, "x", x, 0)
    impl = _dispatch.choose(op, "instance_norm", impl, x.device, cannot=_cannot(x), note=_copied(x))
    if impl != "reference":
        slope = {None: 1.0, "relu": 0.0, "leaky_relu": negative_slope}[activation]
        return _instance_norm.norm(
            x, weight, bias, residual, None, 1.0, slope, reflect_pad, eps, 0, impl
        )[0]
    with _dispatch.without_autocast(x.device):
        out = reference.instance_norm(
            x, weight, bias, residual, activation, negative_slope, reflect_pad, eps
        )
    return _layout.padded_like(out, x) if reflect_pad else _layout.like(out, x)


def adain(
    content: Tensor,
    style: Tensor | InstanceStats,
    *,
    alpha: float | Tensor = 1.0,
    eps: float = 1e-5,
    correction: int = 1,
    impl: str | None = None,
) -> Tensor:
    r"""Adaptive instance normalisation: give content features the statistics of style features.

    .. math::
        y = \alpha \Bigl(\sigma_s \frac{x - \mu_c}{\sigma_c} + \mu_s\Bigr) + (1 - \alpha) x

    with the mean and the standard deviation of :func:`instance_stats` for content and style.

    Args:
        content: [B, C, H, W]; fp16, bf16, fp32 or fp64, any strides.
        style: a feature map [B, C, h, w] or [1, C, h, w], or its :class:`InstanceStats`, computed
            once and kept.
        alpha: strength of the style, a float or a tensor [B]; it takes no gradient.
        eps, correction: as in :func:`instance_stats`.
        impl: ``"reference"``, ``"triton"``, ``"native"`` or None for the fastest that supports the
            call.

    Returns:
        [B, C, H, W] in the dtype and memory format of ``content``.

    Differentiable twice with respect to ``content`` and ``style``.

    Raises:
        TypeError: an argument is no floating-point tensor, or an option of the wrong type.
        ValueError: shapes or devices do not fit, not more positions than ``correction``, or an
            ``alpha`` that requires grad.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Huang, Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization", 2017.
    """
    op = "adain"
    _checks.feature_map(op, "content", content)
    _check_variance(op, "content", content, eps, correction)
    if isinstance(style, Tensor):
        _checks.feature_map(op, "style", style)
        _check_batch_and_channels(op, "style", style, "[{}, {}, h, w]", "content", content)
        _check_variance(op, "style", style, eps, correction)
    else:
        _check_stats(op, "style", style, "content", content)
    _check_alpha(op, alpha, content)
    maps = (content, style) if isinstance(style, Tensor) else (content,)
    impl = _dispatch.choose(
        op,
        "instance_norm",
        impl,
        content.device,
        cannot=_cannot(*maps),
        note=_copied(content, style),
    )
    if impl != "reference":
        alphas, alpha = (alpha, 1.0) if isinstance(alpha, Tensor) else (None, float(alpha))
        if isinstance(style, Tensor):
            return _instance_norm.adain(content, style, alphas, alpha, eps, correction, impl)[0]
        return _instance_norm.norm(
            content, style[1], style[0], None, alphas, alpha, 1.0, 0, eps, correction, impl
        )[0]
    with _dispatch.without_autocast(content.device):
        if isinstance(style, Tensor):
            style = InstanceStats(*reference.instance_stats(style, eps, correction))
        out = reference.adain(content, *style, alpha, eps, correction)
    return _layout.like(out, content)


def adain_style_loss(
    features: Tensor | Sequence[Tensor],
    target_stats: InstanceStats | Sequence[InstanceStats],
    *,
    eps: float = 1e-5,
    correction: int = 1,
    weights: Sequence[float] | None = None,
    impl: str | None = None,
) -> Tensor:
    r"""Squared distance between the statistics of features and given target statistics.

    .. math::
        \sum_l w_l \Bigl(\mathrm{mean} (\mu(F_l) - \mu_l)^2
        + \mathrm{mean} (\sigma(F_l) - \sigma_l)^2\Bigr)

    with the means over images and channels. An empty batch has loss 0.

    Args:
        features: one feature map [B, C, H, W] (or [B, C, L]), or a list of them (layers).
        target_stats: :class:`InstanceStats` [B, C] or [1, C] per layer; compute them once per
            style with :func:`instance_stats` and keep them.
        eps, correction: as in :func:`instance_stats`.
        weights: one number per layer; 1 each by default.
        impl: ``"reference"``, ``"triton"``, ``"native"`` or None for the fastest that supports the
            call.

    Returns:
        fp32 scalar (fp64 for fp64 features), also under autocast.

    Differentiable twice with respect to ``features`` and ``target_stats``.

    Raises:
        TypeError: an argument is no floating-point tensor or list of them.
        ValueError: shapes, devices or lengths do not fit.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Huang, Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization", 2017.
    """
    op = "adain_style_loss"
    feature_list = _checks.layers(op, "features", features)
    one_layer = _is_stats(target_stats)
    target_list = [target_stats] if one_layer else _checks.layers(op, "target_stats", target_stats)
    _checks.equally_long(op, "target_stats", target_list, "features", feature_list)
    weight_list = _checks.layer_weights(op, weights, "features", len(feature_list))
    for i, (x, stats) in enumerate(zip(feature_list, target_list, strict=True)):
        name = _checks.label("features", i, len(feature_list))
        _checks.feature_map(op, name, x, ranks=(3, 4))
        _check_variance(op, name, x, eps, correction)
        _check_stats(op, _checks.label("target_stats", i, len(target_list)), stats, name, x)
        _checks.same_device(op, name, x, "features[0]", feature_list[0])
    device = feature_list[0].device
    impl = _dispatch.choose(
        op,
        "instance_norm",
        impl,
        device,
        cannot=_cannot(*feature_list),
        note=_copied(*feature_list),
    )
    if impl != "reference":
        total: Any = None
        for x, target, weight in zip(feature_list, target_list, weight_list, strict=True):
            stats = _instance_norm.stats(x, eps, correction, impl)
            weight /= max(stats[0].numel(), 1)
            total = _instance_norm.distance(total, *stats, *target, weight, impl)
        return total
    with _dispatch.without_autocast(device):
        losses = [
            weight * reference.adain_style_loss(x, stats[0], stats[1], eps, correction)
            for x, stats, weight in zip(feature_list, target_list, weight_list, strict=True)
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def reflection_pad2d(
    x: Tensor, padding: tuple[int, int, int, int], *, impl: str | None = None
) -> Tensor:
    r"""Pad H and W by reflection at their edges, as ``torch.nn.ReflectionPad2d`` does.

    Unlike torch's CUDA kernels it keeps channels_last, adds the gradients of a pixel's images in
    fixed order, without atomics, and saves nothing for its backward.

    Args:
        x: [B, C, H, W]; fp16, bf16, fp32 or fp64, any strides.
        padding: (left, right, top, bottom), each non-negative and less than the width or height.
        impl: ``"reference"``, ``"triton"``, ``"native"`` or None for the fastest that supports the
            call.

    Returns:
        [B, C, H + top + bottom, W + left + right] in the dtype and memory format of ``x``.

    Differentiable to any order.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``padding`` not four integers.
        ValueError: wrong shape or padding.
        ImplUnavailableError: the implementation asked for cannot run this call.
    """
    op = "reflection_pad2d"
    _checks.feature_map(op, "x", x)
    if not isinstance(padding, tuple | list) or len(padding) != 4:
        raise TypeError(f"{op}: padding must be (left, right, top, bottom), got {padding!r}")
    for side, count in zip(("left", "right", "top", "bottom"), padding, strict=True):
        _checks.integer(op, f"padding {side}", count)
    left, right, top, bottom = padding
    height, width = x.shape[2:]
    if not (
        min(padding) >= 0 and max(left, right) < max(width, 1) and max(top, bottom) < max(height, 1)
    ):
        raise ValueError(
            f"{op}: padding must be at least 0 and less than width (left, right) and height "
            f"(top, bottom) of x, {_checks.shape(x)}, got {tuple(padding)}"
        )
    impl = _dispatch.choose(op, "instance_norm", impl, x.device, cannot=_cannot(x), note=_copied(x))
    if impl != "reference":
        return _instance_norm.reflection_pad2d(x, *padding, impl)
    return _layout.padded_like(reference.reflection_pad2d(x, padding), x)


# --- Checks -------------------------------------------------------------------------------------


def _cannot(*features: Tensor) -> dict[str, str | None]:
    reasons: dict[str, str | None] = {}
    for x in features:
        if x.dtype == torch.float64:
            reasons["triton"] = "computes in float32; float64 runs on the reference path"
        if x.dtype != torch.float32:
            reasons["native"] = f"its CPU kernels take float32, got {x.dtype}"
    return reasons


def _copied(*inputs: Any) -> Callable[[str], str | None]:
    """For explain(): which inputs a kernel copies before it can walk over their planes."""

    def note(impl: str) -> str | None:
        if impl != "triton":
            return None
        maps = [x for x in inputs if isinstance(x, Tensor)]
        copied = [f"{_checks.shape(x)}, strides {x.stride()}" for x in maps if walk(x) is None]
        return f"copies an input once: {'; '.join(copied)}" if copied else None

    return note


def _check_variance(op: str, name: str, x: Tensor, eps: float, correction: int) -> None:
    _checks.non_negative(op, "eps", eps)
    _checks.integer(op, "correction", correction)
    _checks.non_negative(op, "correction", correction)
    _checks.positions(op, name, x, correction)


def _check_affine(op: str, name: str, value: Tensor | None, x: Tensor) -> None:
    if value is None:
        return
    _checks.floating(op, name, value)
    _checks.same_device(op, name, value, "x", x)
    batch, channels = x.shape[:2]
    if value.shape != ((channels,) if value.ndim == 1 else (batch, channels)):
        raise ValueError(
            f"{op}: {name} must be [{channels}] or [{batch}, {channels}] to match x, "
            f"got {_checks.shape(value)}"
        )


def _check_residual(op: str, residual: Tensor | None, x: Tensor) -> None:
    if residual is None:
        return
    _checks.floating(op, "residual", residual)
    _checks.same_device(op, "residual", residual, "x", x)
    if residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have the shape of x, {_checks.shape(x)}, "
            f"got {_checks.shape(residual)}"
        )


def _check_reflect_pad(op: str, pad: int, x: Tensor) -> None:
    _checks.integer(op, "reflect_pad", pad)
    smallest = min(x.shape[2], x.shape[3])
    if not 0 <= pad < max(smallest, 1):
        raise ValueError(
            f"{op}: reflect_pad must be at least 0 and less than height and width of x, "
            f"{_checks.shape(x)}, got {pad}"
        )


def _is_stats(value: object) -> bool:
    """InstanceStats, or a plain (mean, std) pair of tensors."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor)


def _check_stats(op: str, name: str, stats: Any, first_name: str, x: Tensor) -> None:
    if not _is_stats(stats):
        raise TypeError(
            f"{op}: {name} must be InstanceStats (fastgan.instance_stats(style_features)), "
            f"got {type(stats).__name__}"
        )
    for part, value in zip(("mean", "std"), stats, strict=True):
        _checks.floating(op, f"{name}.{part}", value)
        _check_batch_and_channels(op, f"{name}.{part}", value, "[{}, {}]", first_name, x)


def _check_batch_and_channels(
    op: str, name: str, value: Tensor, pattern: str, first_name: str, x: Tensor
) -> None:
    _checks.same_device(op, name, value, first_name, x)
    batch, channels = x.shape[:2]
    rank = pattern.count(",") + 1
    if value.ndim != rank or value.shape[0] not in (1, batch) or value.shape[1] != channels:
        expected = pattern.format(_checks.or_one(batch), channels)
        raise ValueError(
            f"{op}: {name} must be {expected} to match {first_name}, got {_checks.shape(value)}"
        )


def _check_alpha(op: str, alpha: float | Tensor, content: Tensor) -> None:
    if not isinstance(alpha, Tensor):
        _checks.number(op, "alpha", alpha)
        return
    if alpha.requires_grad:
        raise ValueError(f"{op}: alpha takes no gradient; pass alpha.detach()")
    if alpha.ndim != 1 or alpha.shape[0] != content.shape[0]:
        raise ValueError(
            f"{op}: alpha must be a number or a tensor [{content.shape[0]}], "
            f"got {_checks.shape(alpha)}"
        )
    _checks.same_device(op, "alpha", alpha, "content", content)
