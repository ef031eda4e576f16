"""Plots of a stored run: speed-ups per part, and achieved rates against the machine's limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from rows import Row, rows_of
from step_trace import CATEGORIES
from store import Record

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "fastgan"  # the same run gives the same file
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["font.size"] = 9
COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#d98c2b",
    "library": "#9a6bb5",
    "peer": "#5a9e6f",
    "fastgan": "#2b7bba",
}
NAMES = {
    "eager": "eager",
    "compile": "torch.compile",
    "library": "BLAS",
    "peer": "another library",
    "fastgan": "fastgan",
}
PARTS = ("gram", "instance_norm", "gan_loss", "training", "inference", "export")


def draw(run: dict[str, Record], folder: Path) -> None:
    """Every plot of a run, as SVG files in its folder."""
    for part in PARTS:
        if part in run:
            _save(speedups(rows_of(run[part])), folder / f"{part}.svg")
    if "breakdown" in run:
        _save(breakdown(run["breakdown"]), folder / "breakdown.svg")
    if has_roofline(run):
        _save(roofline(run), folder / "roofline.svg")


def has_roofline(run: dict[str, Record]) -> bool:
    return bool(_with_bytes(run))


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def speedups(rows: list[Row]) -> Any:
    """One group of bars per case: fastgan over the fastest of each kind of competitor."""
    kinds = [kind for kind in COLOURS if any(row.speedup(kind) for row in rows)]
    kinds.remove("fastgan")
    height = 0.8 / max(len(kinds), 1)
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.16 * len(rows) * (len(kinds) + 1)))
    for offset, kind in enumerate(kinds):
        values = [row.speedup(kind) for row in rows]
        places = [i + (offset - (len(kinds) - 1) / 2) * height for i in range(len(rows))]
        present = [(p, v) for p, v in zip(places, values, strict=True) if v is not None]
        bars = axes.barh(
            [place for place, _ in present],
            [value - 1 for _, value in present],
            left=1,
            height=height,
            color=COLOURS[kind],
            label=f"over {NAMES[kind]}",
        )
        axes.bar_label(bars, [f"{value:.2g}" for _, value in present], padding=2, fontsize=7)
    labels = [f"{row.op}, {row.mode}\n{row.title}{'' if row.covered else ' *'}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("faster than (log scale); * no kernel of fastgan's, its reference path ran")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(kinds), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(rows[0].header["device"], loc="left")
    return figure


def breakdown(part: Record) -> Any:
    """One stacked bar per variant of a step, in milliseconds."""
    records = part["records"]
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.42 * len(records)))
    left = [0.0] * len(records)
    colours = mpl.colormaps["tab10"].colors
    for colour, name in zip(colours, CATEGORIES, strict=True):
        widths = [1e3 * record["categories"][name] for record in records]
        axes.barh(range(len(records)), widths, left=left, height=0.7, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    labels = [f"{r['op']} {r['shape']} {r['dtype']}\n{r['variant']}" for r in records]
    axes.set_yticks(range(len(records)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _with_bytes(run: dict[str, Record]) -> list[Row]:
    rows = [row for part in PARTS if part in run for row in rows_of(run[part])]
    return [row for row in rows if row.fastgan is not None and "gb_per_s" in row.fastgan]


def roofline(run: dict[str, Record]) -> Any:
    """Bandwidth over size for everything, and arithmetic rate over intensity for matrix products.

    Both count the fewest bytes and operations the computation needs, so that a point says how far
    an implementation is from the limit, not how busy it keeps the machine.
    """
    rows = _with_bytes(run)
    products = [row for row in rows if row.fastgan and row.fastgan.get("tflop_per_s")]
    figure, panels = plt.subplots(
        1, 2 if products else 1, figsize=(11 if products else 6.5, 4.2), squeeze=False
    )
    _bandwidths(panels[0][0], rows)
    if products:
        _rates(panels[0][1], products)
    figure.suptitle(rows[0].header["device"])
    return figure


def _bandwidths(axes: Any, rows: list[Row]) -> None:
    copy = rows[0].header["ceilings"]["copy_gb_per_s"]
    for kind in ("eager", "compile", "library", "fastgan"):
        fastest = [record for row in rows if (record := row.fastest(kind)) is not None]
        axes.scatter(
            [record["bytes"] / 1e6 for record in fastest],
            [record["gb_per_s"] for record in fastest],
            s=16,
            alpha=0.8,
            color=COLOURS[kind],
            label=NAMES[kind] if fastest else None,
        )
    axes.axhline(copy, color="black", linewidth=0.8)
    axes.annotate(
        f"copy {copy:.0f} GB/s", (0.02, copy), xycoords=("axes fraction", "data"), va="bottom"
    )
    axes.set(xscale="log", yscale="log", xlabel="fewest MB to move", ylabel="GB/s of those")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _rates(axes: Any, rows: list[Row]) -> None:
    ceilings = rows[0].header["ceilings"]
    copy = ceilings["copy_gb_per_s"] / 1e3
    peaks = {name.split("_")[1]: v for name, v in ceilings.items() if name.startswith("matmul")}
    intensities = [record["flops"] / record["bytes"] for row in rows if (record := row.fastgan)]
    span = [min(intensities) / 2, max(intensities) * 2]
    for dtype, peak in peaks.items():
        knee = peak / copy
        points = sorted({*span, min(max(knee, span[0]), span[1])})
        axes.plot(points, [min(peak, copy * x) for x in points], color="black", linewidth=0.8)
        axes.annotate(
            f"{dtype} matmul", (span[1], min(peak, copy * span[1])), ha="right", va="bottom"
        )
    for kind in ("eager", "compile", "library", "fastgan"):
        fastest = [record for row in rows if (record := row.fastest(kind)) is not None]
        axes.scatter(
            [record["flops"] / record["bytes"] for record in fastest],
            [record["tflop_per_s"] for record in fastest],
            s=16,
            alpha=0.8,
            color=COLOURS[kind],
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.spines[["top", "right"]].set_visible(False)
