"""What the kernels are to reach, and whether a run shows it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rows import Row, ratio, seconds
from step_trace import CONVOLUTION, GAPS

Condition = Callable[[Row], bool]
Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class Target:
    """A bound on one figure; the worst of the rows it applies to decides."""

    what: str
    figure: str
    device_type: str
    part: str
    applies: Condition
    value: Value
    bound: float
    at_most: bool = False

    def judge(self, run: Mapping[str, Sequence[Row]]) -> Verdict:
        measured = []
        for row in run.get(self.part, ()):
            if row.header["device_type"] == self.device_type and self.applies(row) and row.covered:
                value = self.value(row)
                if row.broken:
                    return Verdict("missed", None, row.title)
                if value is not None:
                    measured.append((value, row.title))
        if not measured:
            return Verdict("not measured")
        worst, title = (max if self.at_most else min)(measured)
        met = worst <= self.bound if self.at_most else worst >= self.bound
        return Verdict("met" if met else "missed", worst, title)


@dataclass(frozen=True)
class Verdict:
    text: str
    worst: float | None = None
    title: str = ""
    """The row that decided."""


# --- Which rows ---------------------------------------------------------------------------------


def op(name: str, mode: str, *more: Condition) -> Condition:
    """Rows of an op, whatever follows its name ("+relu", " bce"), in one mode, on conditions."""
    return lambda row: (
        re.split(r"[+ ]", row.op)[0] == name
        and row.mode == mode
        and all(condition(row) for condition in more)
    )


def large(row: Row) -> bool:
    """Features of 64 MB and more, whose time is that of moving them."""
    return math.prod(row.sizes) * (4 if row.dtype == "float32" else 2) >= 64e6


def narrow(row: Row) -> bool:
    return row.sizes[1] <= 128


def wide(row: Row) -> bool:
    return row.sizes[1] == 512


def small_batch(row: Row) -> bool:
    return row.sizes[0] <= 4


def channels_last(row: Row) -> bool:
    return row.layout == "channels_last"


def nchw(row: Row) -> bool:
    return row.layout == "nchw"


def few_planes_or_channels_last(row: Row) -> bool:
    return channels_last(row) or row.sizes[0] * row.sizes[1] < 264


def one_layer(row: Row) -> bool:
    return "," not in row.shape


def scales(row: Row) -> bool:
    return "3 scales" in row.shape


def shape(text: str) -> Condition:
    return lambda row: row.shape == text


def batch(size: int) -> Condition:
    return lambda row: row.sizes[0] == size


# --- Which figure -------------------------------------------------------------------------------


def over(*kinds: str, clock: str = "") -> Value:
    return lambda row: row.speedup(*kinds, clock=clock)


def over_variant(slow: str, fast: str = "fastgan") -> Value:
    return lambda row: row.speedup_over(slow, fast)


def share_of_copy(row: Row) -> float | None:
    return row.share_of_copy(row.fastgan)


def own(field: str) -> Value:
    return lambda row: None if row.fastgan is None else row.fastgan.get(field)


def microseconds(row: Row) -> float | None:
    return None if row.fastgan is None else seconds(row.fastgan) * 1e6


def over_fastest_eager(variant: str) -> Value:
    return lambda row: ratio(row.fastest("eager"), row.records.get(variant))


def memory_over_eager(variant: str) -> Value:
    """Peak memory of a variant over that of the fastest eager form."""

    def quotient(row: Row) -> float | None:
        own_peak = row.records.get(variant, {}).get("peak_memory")
        other_peak = (row.fastest("eager") or {}).get("peak_memory")
        return own_peak / other_peak if own_peak and other_peak else None

    return quotient


def convolution_share(variant: str) -> Value:
    """Of the time in which kernels run."""

    def share(row: Row) -> float | None:
        categories = row.records.get(variant, {}).get("categories")
        if categories is None:
            return None
        return categories[CONVOLUTION] / (sum(categories.values()) - categories[GAPS])

    return share


def over_nchw_form(row: Row) -> float | None:
    """Against PyTorch's norm in its own best layout, from the row beside this one."""
    other = row.in_layout("nchw")
    return None if other is None else ratio(other.records.get("public"), row.fastgan)


# --- The targets --------------------------------------------------------------------------------

FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
EAGER, COMPILE, CUBLAS = "over eager", "over torch.compile", "over cuBLAS"
COPY = "of copy bandwidth"


def _targets(
    device_type: str, part: str, what: str, applies: Condition, *figures: tuple[str, Value, float]
) -> list[Target]:
    return [Target(what, name, device_type, part, applies, *rest) for name, *rest in figures]


TARGETS = [
    *_targets(
        "cuda",
        "gram",
        "Gram forward, C <= 128",
        op("gram_matrix", FORWARD, narrow),
        (EAGER, over("eager"), 1.5),
        (COMPILE, over("compile"), 1.5),
        (CUBLAS, over("library"), 1.0),
    ),
    *_targets(
        "cuda",
        "gram",
        "Gram forward, C <= 128, batch <= 4",
        op("gram_matrix", FORWARD, narrow, small_batch),
        (EAGER, over("eager"), 2.0),
        (CUBLAS, over("library"), 1.5),
    ),
    *_targets(
        "cuda",
        "gram",
        "Gram forward, C <= 128, 64 MB and more",
        op("gram_matrix", FORWARD, narrow, large),
        (COPY, share_of_copy, 0.85),
    ),
    *_targets(
        "cuda",
        "gram",
        "Gram forward, C = 512",
        op("gram_matrix", FORWARD, wide),
        (EAGER, over("eager"), 1.3),
        (COMPILE, over("compile"), 1.2),
        (CUBLAS, over("library"), 1.1),
    ),
    *_targets(
        "cuda",
        "gram",
        "Gram forward, C = 512, 64 MB and more",
        op("gram_matrix", FORWARD, wide, large),
        (COPY, share_of_copy, 0.55),
    ),
    *_targets(
        "cuda",
        "gram",
        "style loss forward+backward",
        op("style_loss", BOTH),
        (EAGER, over("eager"), 2.5),
        (COMPILE, over("compile"), 2.0),
    ),
    *_targets(
        "cuda",
        "gram",
        "style loss forward+backward, 64 MB and more",
        op("style_loss", BOTH, one_layer, large),
        (COPY, share_of_copy, 0.8),
    ),
    *_targets(
        "cuda",
        "instance_norm",
        "AdaIN forward+backward",
        op("adain", BOTH),
        (EAGER, over("eager"), 2.5),
        ("over the public form", over_variant("public"), 5.0),
        (COMPILE, over("compile"), 1.3),
    ),
    *_targets(
        "cuda",
        "instance_norm",
        "AdaIN forward+backward, channels_last or B·C < 264",
        op("adain", BOTH, few_planes_or_channels_last),
        (COMPILE, over("compile"), 2.0),
    ),
    *_targets(
        "cuda",
        "instance_norm",
        "AdaIN forward+backward, 64 MB and more",
        op("adain", BOTH, large),
        (COPY, share_of_copy, 0.9),
    ),
    *_targets(
        "cuda",
        "instance_norm",
        "instance norm forward+backward, channels_last",
        op("instance_norm", BOTH, channels_last),
        (EAGER, over("eager"), 4.0),
        (COMPILE, over("compile"), 1.3),
    ),
    *_targets(
        "cuda",
        "instance_norm",
        "instance norm forward+backward, channels_last, 64 MB and more",
        op("instance_norm", BOTH, channels_last, large),
        (COPY, share_of_copy, 0.9),
    ),
    *_targets(
        "cuda",
        "gan_loss",
        "discriminator loss forward+backward, 3 scales",
        op("discriminator_loss", BOTH, scales),
        ("host time over eager", over("eager", clock="wall"), 8.0),
        ("device time over eager", over("eager"), 5.0),
        (COMPILE, over("compile"), 2.0),
    ),
    *_targets(
        "cuda",
        "gan_loss",
        "discriminator loss forward+backward, 3 scales within 64K logits",
        op("discriminator_loss", BOTH, shape("3 scales from 8x1x30x30")),
        ("launches", own("launches"), 2.0, True),
        ("microseconds on the device", microseconds, 6.0, True),
    ),
    *_targets(
        "cpu",
        "gan_loss",
        "discriminator loss forward+backward, 3 scales",
        op("discriminator_loss", BOTH, scales),
        (EAGER, over("eager"), 2.5),
    ),
    *_targets(
        "cpu",
        "gan_loss",
        "discriminator loss forward+backward, 2M elements",
        op("discriminator_loss", BOTH, shape("8x1x512x512")),
        (EAGER, over("eager"), 1.5),
        (COMPILE, over("compile"), 1.0),
    ),
    *_targets(
        "cpu",
        "instance_norm",
        "AdaIN forward",
        op("adain", FORWARD, shape("4x64x256x256")),
        ("over the public form", over_variant("public"), 5.0),
        (COMPILE, over("compile"), 1.1),
    ),
    *_targets(
        "cpu",
        "instance_norm",
        "AdaIN forward",
        op("adain", FORWARD, shape("4x512x32x32")),
        ("over the public form", over_variant("public"), 12.0),
        (COMPILE, over("compile"), 4.0),
    ),
    *_targets(
        "cpu",
        "instance_norm",
        "instance norm forward, channels_last",
        op("instance_norm", FORWARD, channels_last),
        ("over F.instance_norm channels_last", over_variant("public"), 5.0),
        ("over F.instance_norm NCHW", over_nchw_form, 1.0),
    ),
    *_targets(
        "cpu",
        "instance_norm",
        "AdaIN forward+backward",
        op("adain", BOTH),
        (EAGER, over("eager"), 2.5),
    ),
    *_targets(
        "cpu",
        "instance_norm",
        "instance norm forward+backward, channels_last",
        op("instance_norm", BOTH, channels_last),
        (EAGER, over("eager"), 2.5),
    ),
    *_targets(
        "cpu",
        "instance_norm",
        "instance norm forward+backward, NCHW",
        op("instance_norm", BOTH, nchw),
        (EAGER, over("eager"), 2.5),
    ),
    *_targets(
        "cuda",
        "training",
        "CycleGAN step, batch 8: one line of convert()",
        op("cyclegan", STEP, batch(8)),
        (EAGER, over_fastest_eager("convert()"), 1.3),
    ),
    *_targets(
        "cuda",
        "training",
        "CycleGAN step, batch 1",
        op("cyclegan", STEP, batch(1)),
        (EAGER, over_fastest_eager("fastgan graph"), 2.5),
        (
            "over torch.compile reduce-overhead",
            over_variant("torch.compile reduce-overhead", "fastgan graph"),
            1.15,
        ),
        ("over the public fp32 step", over_variant("public fp32", "fastgan graph"), 5.0),
    ),
    *_targets(
        "cuda",
        "training",
        "CycleGAN step, batch 8: peak memory",
        op("cyclegan", STEP, batch(8)),
        ("of the fastest eager form", memory_over_eager("fastgan"), 0.75, True),
    ),
    *_targets(
        "cuda",
        "breakdown",
        "CycleGAN step, batch 8: kernels that are convolutions and GEMMs",
        op("cyclegan", "breakdown", batch(8)),
        ("of device time", convolution_share("fastgan"), 0.8),
    ),
]
