"""How near a result is to its style, and how much is left of its content."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.features import grey
from fastgan.ops.gram import gram_matrix


@torch.no_grad()
def gram_distance(images: Tensor, styles: Tensor, extractor: nn.Module) -> Tensor:
    r"""Relative distance between the Gram matrices of pictures and of their styles, [B].

    .. math:: \frac1L \sum_l \frac{\lVert G_l - T_l \rVert_F^2}{\lVert T_l \rVert_F^2}

    with :math:`G_l` of the pictures [B,3,H,W] and :math:`T_l` of the styles [B or 1,3,h,w] over the
    L maps of `extractor`. 0 is the style itself. Judge a result with an extractor that it was not
    trained against, such as ``RandomFeatures`` of another seed; of ``grey`` pictures the distance
    sees texture alone.
    """
    distances = []
    for features, style_features in zip(extractor(images), extractor(styles), strict=True):
        gram, target = gram_matrix(features), gram_matrix(style_features)
        distances.append((gram - target).square().sum((1, 2)) / target.square().sum((1, 2)))
    return torch.stack(distances).mean(0)


@torch.no_grad()
def structure_correlation(images: Tensor, others: Tensor, *, cell: int = 4) -> Tensor:
    """Correlation of brightness between two pictures [B,3,H,W] as seen from afar, [B].

    1 is the same up to brightness, contrast and tint; unrelated pictures are near 0. Averages over
    cells of `cell` x `cell` pixels are compared, so that brush strokes do not count.
    """
    near = [F.avg_pool2d(grey(pictures)[:, :1], cell).flatten(1) for pictures in (images, others)]
    a, b = (values - values.mean(1, keepdim=True) for values in near)
    return F.cosine_similarity(a, b, dim=1)
