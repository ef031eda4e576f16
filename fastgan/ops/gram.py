"""Gram matrices, the style loss over them, and the content loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import reference
from fastgan.ops import _checks, _dispatch, _library

NORMALIZATIONS = ("chw", "hw", "none")
REDUCTIONS = ("mean", "channels")


def gram_matrix(features: Tensor, *, normalize: str = "chw", impl: str | None = None) -> Tensor:
    r"""Gram matrix of each feature map: the inner products of its channels.

    .. math:: G_b = \frac{1}{d} F_b F_b^\top, \qquad F_b \in \mathbb{R}^{C \times M}

    with M positions and ``d`` = C·M for ``normalize="chw"``, M for ``"hw"``, 1 for ``"none"``.

    Args:
        features: [B, C, H, W] or [B, C, L]; fp16, bf16, fp32 or fp64, any strides.
        normalize: ``"chw"``, ``"hw"`` or ``"none"``; applied in fp32 before anything is stored,
            so that 16-bit features neither overflow nor underflow.
        impl: ``"reference"``, ``"triton"`` or None for the fastest that supports the call.

    Returns:
        [B, C, C], fp32 (fp64 for fp64 features), also under autocast.

    Differentiable twice with respect to ``features``.

    Raises:
        TypeError: ``features`` is no floating-point tensor.
        ValueError: wrong shape or ``normalize``.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Gatys, Ecker, Bethge, "A Neural Algorithm of Artistic Style", 2015;
    normalised by C·H·W as in Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style
    Transfer and Super-Resolution", 2016.
    """
    op = "gram_matrix"
    _checks.feature_map(op, "features", features, ranks=(3, 4))
    _checks.one_of(op, "normalize", normalize, NORMALIZATIONS)
    if _choose(op, impl, [features]) == "triton":
        return _gram_matrix_op(features, normalize)
    with _dispatch.without_autocast(features.device):
        return reference.gram_matrix(features, normalize)


def style_loss(
    features: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    normalize: str = "chw",
    weights: Sequence[float] | None = None,
    impl: str | None = None,
) -> Tensor:
    r"""Squared distance between the Gram matrices of features and given target matrices.

    .. math:: \sum_l w_l \cdot \frac14 \cdot \frac1B \sum_b \lVert G_{l,b} - T_{l,b} \rVert_F^2

    With ``normalize="chw"`` this is the :math:`\frac{1}{4 N^2 M^2} \lVert G - T \rVert_F^2` of
    unnormalised Gram matrices of N channels and M positions. All C² entries count; a target need
    not be symmetric. An empty batch has loss 0.

    Args:
        features: one feature map [B, C, H, W] (or [B, C, L]), or a list of them (layers).
        targets: Gram matrices, [B, C, C] or [1, C, C] per layer, normalised alike; compute them
            once per style with :func:`gram_matrix` and keep them.
        normalize: as in :func:`gram_matrix`.
        weights: one number per layer; 1 each by default.
        impl: ``"reference"``, ``"triton"`` or None for the fastest that supports the call.

    Returns:
        fp32 scalar (fp64 for fp64 features), also under autocast.

    Differentiable twice with respect to ``features`` and ``targets``.

    Raises:
        TypeError: an argument is no floating-point tensor or list of them, or ``weights`` no list
            of numbers.
        ValueError: shapes, devices or lengths do not fit.
        ImplUnavailableError: the implementation asked for cannot run this call.

    Source: Gatys, Ecker, Bethge, "A Neural Algorithm of Artistic Style", 2015.
    """
    op = "style_loss"
    feature_list = _checks.layers(op, "features", features)
    target_list = _checks.layers(op, "targets", targets)
    _checks.equally_long(op, "targets", target_list, "features", feature_list)
    weight_list = _checks.layer_weights(op, weights, "features", len(feature_list))
    _checks.one_of(op, "normalize", normalize, NORMALIZATIONS)
    for i, (x, target) in enumerate(zip(feature_list, target_list, strict=True)):
        _check_layer(op, i, len(feature_list), x, target)
        _checks.same_device(op, f"features[{i}]", x, "features[0]", feature_list[0])
    if _choose(op, impl, feature_list) == "triton":
        loss, _ = _style_loss_op(feature_list, target_list, normalize, weight_list)
        return loss
    with _dispatch.without_autocast(feature_list[0].device):
        return _style_loss(feature_list, target_list, normalize, weight_list)


def _style_loss(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    normalize: str,
    weights: Sequence[float],
) -> Tensor:
    losses = [
        weight * reference.style_loss(x, target, normalize)
        for x, target, weight in zip(features, targets, weights, strict=True)
    ]
    return _total(losses)


def _check_layer(op: str, index: int, count: int, x: Tensor, target: Tensor) -> None:
    name = _checks.label("features", index, count)
    target_name = _checks.label("targets", index, count)
    _checks.feature_map(op, name, x, ranks=(3, 4))
    _checks.floating(op, target_name, target)
    _checks.same_device(op, target_name, target, name, x)
    batch, channels = x.shape[:2]
    fits = target.ndim == 3 and target.shape[0] in (1, batch)
    if not (fits and target.shape[1:] == (channels, channels)):
        hint = "; pass gram_matrix(style_features)" if target.ndim == 4 else ""
        raise ValueError(
            f"{op}: {target_name} must be [{_checks.or_one(batch)}, {channels}, {channels}] "
            f"to match {name}, got {_checks.shape(target)}{hint}"
        )


def content_loss(
    features: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    reduction: str = "mean",
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Squared distance between feature maps, summed over layers.

    ``reduction="mean"`` is the mean squared error, ``"channels"`` the textbook's sum over feature
    maps divided by their number, :math:`\frac1B \sum_b \frac1C \sum (F - T)^2`. An empty batch
    has loss 0.

    Args:
        features: one feature map [B, C, ...] or a list of them (layers).
        targets: of the same shapes.
        reduction: ``"mean"`` or ``"channels"``.
        weights: one number per layer; 1 each by default.

    Returns:
        fp32 scalar (fp64 for fp64 features), also under autocast. Plain PyTorch, so
        differentiable to any order.

    Raises:
        TypeError: an argument is no floating-point tensor or list of them.
        ValueError: shapes, devices or lengths do not fit.

    Source: Gatys, Ecker, Bethge, "A Neural Algorithm of Artistic Style", 2015.
    """
    op = "content_loss"
    feature_list = _checks.layers(op, "features", features)
    target_list = _checks.layers(op, "targets", targets)
    _checks.equally_long(op, "targets", target_list, "features", feature_list)
    weight_list = _checks.layer_weights(op, weights, "features", len(feature_list))
    _checks.one_of(op, "reduction", reduction, REDUCTIONS)
    for i, (x, target) in enumerate(zip(feature_list, target_list, strict=True)):
        name = _checks.label("features", i, len(feature_list))
        target_name = _checks.label("targets", i, len(feature_list))
        _checks.floating(op, name, x)
        _checks.floating(op, target_name, target)
        if x.ndim < 2 or target.shape != x.shape:
            raise ValueError(
                f"{op}: {target_name} must be [B, C, ...] of the shape of {name}, "
                f"{_checks.shape(x)}, got {_checks.shape(target)}"
            )
        _checks.same_device(op, target_name, target, name, x)
    with _dispatch.without_autocast(feature_list[0].device):
        losses = [
            weight * reference.content_loss(x, target, reduction)
            for x, target, weight in zip(feature_list, target_list, weight_list, strict=True)
        ]
        return _total(losses)


def _total(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


# --- Choice of implementation -------------------------------------------------------------------


def _choose(op: str, impl: str | None, features: Sequence[Tensor]) -> str:
    device = features[0].device
    return _dispatch.choose(
        op,
        "gram",
        impl,
        device,
        cannot={"triton": _why_not(features)},
        slower={"triton": _why_slower(device)},
    )


def _why_not(features: Sequence[Tensor]) -> str | None:
    if any(x.dtype == torch.float64 for x in features):
        return "computes in float32; float64 runs on the reference path"
    if any(x.dtype != features[0].dtype for x in features):
        return "takes layers of one dtype"
    return None


def _why_slower(device: torch.device) -> str | None:
    # get_device_properties is a constant to torch.compile, get_device_capability is not
    if device.type == "cuda" and torch.cuda.get_device_properties(device).major < 8:
        return "has no tensor-core path below compute capability 8.0, unlike torch.bmm"
    return None


# --- Custom ops ---------------------------------------------------------------------------------


def _allocate_gram(features: Tensor, normalize: str) -> Tensor:
    batch, channels = features.shape[:2]
    return features.new_empty((batch, channels, channels), dtype=torch.float32)


def _fill_gram(gram: Tensor, features: Tensor, normalize: str) -> None:
    _kernels().gram_matrix_fwd(features, _scale(features, normalize), gram)


def _save_gram(ctx: Any, inputs: tuple[Any, ...], gram: Tensor) -> None:
    features, ctx.normalize = inputs
    ctx.save_for_backward(features)


def _gram_backward(ctx: Any, grad: Tensor) -> Any:
    (features,) = ctx.saved_tensors
    return _gram_matrix_backward_op(grad, features, ctx.normalize), None


_gram_matrix_op = _library.define(
    "gram_matrix(Tensor features, str normalize) -> Tensor",
    allocate=_allocate_gram,
    fill=_fill_gram,
    setup_context=_save_gram,
    backward=_gram_backward,
)


def _allocate_gram_backward(grad: Tensor, features: Tensor, normalize: str) -> Tensor:
    return torch.empty_like(features)


def _fill_gram_backward(out: Tensor, grad: Tensor, features: Tensor, normalize: str) -> None:
    _kernels().gram_bwd([features], None, grad.contiguous(), [_scale(features, normalize)], [out])


def _save_gram_backward(ctx: Any, inputs: tuple[Any, ...], out: Tensor) -> None:
    grad, features, ctx.normalize = inputs
    ctx.save_for_backward(grad, features)


def _gram_double_backward(ctx: Any, grad_out: Tensor) -> Any:
    grad, features = ctx.saved_tensors

    def formula(features: Tensor) -> Tensor:
        return reference.gram_matrix(features, ctx.normalize)

    (grad_grad,), (grad_features,) = _library.second_order(formula, [features], [grad], [grad_out])
    return grad_grad, grad_features, None


_gram_matrix_backward_op = _library.define(
    "gram_matrix_backward(Tensor grad, Tensor features, str normalize) -> Tensor",
    allocate=_allocate_gram_backward,
    fill=_fill_gram_backward,
    setup_context=_save_gram_backward,
    backward=_gram_double_backward,
)


# The differences of Gram matrices and targets, [B, C, C] layer after layer, are kept for the
# backward; nothing differentiates through them.


def _allocate_style_loss(
    features: list[Tensor], targets: list[Tensor], normalize: str, weights: list[float]
) -> tuple[Tensor, Tensor]:
    size = sum(x.shape[0] * x.shape[1] ** 2 for x in features)
    loss = features[0].new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(size)


def _fill_style_loss(
    outputs: tuple[Tensor, Tensor],
    features: list[Tensor],
    targets: list[Tensor],
    normalize: str,
    weights: list[float],
) -> None:
    _kernels().style_loss_fwd(
        features,
        [target.contiguous() for target in targets],
        [_scale(x, normalize) for x in features],
        [weight / (4 * max(len(x), 1)) for x, weight in zip(features, weights, strict=True)],
        *outputs,
    )


def _save_style_loss(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    features, targets, ctx.normalize, ctx.weights = inputs
    differences = outputs[1]
    ctx.mark_non_differentiable(differences)
    ctx.layers = len(features)
    ctx.save_for_backward(differences, *features, *targets)


def _style_loss_backward(ctx: Any, grad: Tensor, _: None) -> Any:
    differences, *tensors = ctx.saved_tensors
    features, targets = tensors[: ctx.layers], tensors[ctx.layers :]
    of_targets = any(target.requires_grad for target in targets)
    grads = _style_loss_backward_op(
        grad, differences, features, targets, of_targets, ctx.normalize, ctx.weights
    )
    grad_targets = grads[ctx.layers :] or [None] * ctx.layers
    return grads[: ctx.layers], grad_targets, None, None


_style_loss_op = _library.define(
    "style_loss(Tensor[] features, Tensor[] targets, str normalize, float[] weights) "
    "-> (Tensor loss, Tensor differences)",
    allocate=_allocate_style_loss,
    fill=_fill_style_loss,
    setup_context=_save_style_loss,
    backward=_style_loss_backward,
)


def _allocate_style_loss_backward(
    grad: Tensor,
    differences: Tensor,
    features: list[Tensor],
    targets: list[Tensor],
    of_targets: bool,
    normalize: str,
    weights: list[float],
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*features, *(targets if of_targets else ()))]


def _fill_style_loss_backward(
    outputs: list[Tensor],
    grad: Tensor,
    differences: Tensor,
    features: list[Tensor],
    targets: list[Tensor],
    of_targets: bool,
    normalize: str,
    weights: list[float],
) -> None:
    """dL/dG = weight / (2B) * D, and dL/dT is its negative."""
    coefficients = [w / (2 * max(len(x), 1)) for x, w in zip(features, weights, strict=True)]
    scaled = [_scale(x, normalize) * c for x, c in zip(features, coefficients, strict=True)]
    _kernels().gram_bwd(features, grad, differences, scaled, outputs[: len(features)])
    if of_targets:
        sizes = [x.shape[0] * x.shape[1] ** 2 for x in features]
        for x, target, out, coefficient, part in zip(
            features,
            targets,
            outputs[len(features) :],
            coefficients,
            differences.split(sizes),
            strict=True,
        ):
            difference = part.view(*x.shape[:2], x.shape[1])
            torch.mul(difference.sum_to_size(target.shape), grad * -coefficient, out=out)


def _save_style_loss_backward(ctx: Any, inputs: tuple[Any, ...], outputs: list[Tensor]) -> None:
    grad, _, features, targets, ctx.of_targets, ctx.normalize, ctx.weights = inputs
    ctx.layers = len(features)
    ctx.save_for_backward(grad, *features, *targets)


def _style_loss_double_backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
    grad, *tensors = ctx.saved_tensors
    grad_grads = [*grad_outputs, *[None] * (len(tensors) - len(grad_outputs))]

    def formula(*tensors: Tensor) -> Tensor:
        return _style_loss(tensors[: ctx.layers], tensors[ctx.layers :], ctx.normalize, ctx.weights)

    (grad_grad,), grad_tensors = _library.second_order(formula, tensors, [grad], grad_grads)
    features, targets = grad_tensors[: ctx.layers], grad_tensors[ctx.layers :]
    return grad_grad, None, features, targets, None, None, None


_style_loss_backward_op = _library.define(
    "style_loss_backward(Tensor grad, Tensor differences, Tensor[] features, Tensor[] targets, "
    "bool of_targets, str normalize, float[] weights) -> Tensor[]",
    allocate=_allocate_style_loss_backward,
    fill=_fill_style_loss_backward,
    setup_context=_save_style_loss_backward,
    backward=_style_loss_double_backward,
)


def _kernels() -> Any:
    from fastgan.kernels import gram  # imports Triton, so not before the first call

    return gram


def _scale(features: Tensor, normalize: str) -> float:
    positions = features.shape[2:].numel()
    return 1 / reference.gram_divisor(features.shape[1], positions, normalize)
