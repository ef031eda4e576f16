"""The Triton kernels for image planes, behind the same functions as _native."""

from fastgan.kernels.adain import adain_fwd
from fastgan.kernels.instance_norm import instance_norm_bwd, instance_norm_fwd
from fastgan.kernels.instance_stats import (
    instance_stats_bwd,
    instance_stats_fwd,
    stats_distance_bwd,
    stats_distance_fwd,
)
from fastgan.kernels.reflection_pad import reflection_pad2d_bwd, reflection_pad2d_fwd

__all__ = [
    "adain_fwd",
    "instance_norm_bwd",
    "instance_norm_fwd",
    "instance_stats_bwd",
    "instance_stats_fwd",
    "reflection_pad2d_bwd",
    "reflection_pad2d_fwd",
    "stats_distance_bwd",
    "stats_distance_fwd",
]
