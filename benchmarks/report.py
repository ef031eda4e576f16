"""From stored runs to RESULTS.md, plots and the README's performance section; compares two runs.

python benchmarks/report.py               RESULTS.md and the plots of every stored run
python benchmarks/report.py --readme      and README.md between its two markers
python benchmarks/report.py --base OLD NEW     what became slower, beyond noise; exit code 1
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import plots
import store
from rows import Row, ratio, rows_of, seconds, spread
from step_trace import CATEGORIES
from store import Record
from targets import TARGETS

PARTS = {
    "gram": "Gram matrices and style loss",
    "instance_norm": "Instance norm and AdaIN",
    "gan_loss": "GAN losses",
    "training": "Training steps",
    "inference": "Inference",
    "export": "Exported generators",
}
README_PARTS = tuple(part for part in PARTS if part != "export")  # whose networks inference has
MARKERS = ("<!-- performance -->", "<!-- /performance -->")
REPORT = Path(__file__).resolve().parent / "RESULTS.md"

METHOD = """\
Written by `python benchmarks/report.py` from the files in [results](results), each of which says
on which machine, with which versions and from which sources it was measured. `make bench` measures
a CPU, `make gpu-bench` an NVIDIA GPU (`PART=gram` one part of it; a run that was cut off goes on).

- **Right first.** Every variant's results and gradients are compared with fp64 on the same inputs
  before it is timed; *wrong* instead of a time is a disagreement beyond four times what the tests
  allow fastgan.
- **Eager** is the fastest of several forms: fastgan's reference path, the form public code uses,
  the best that PyTorch's own kernels do. The name in the cell says which. **torch.compile** is the
  faster of its default and max-autotune modes, where both were measured (max-autotune on GPUs, for
  what it can tune); whole training steps are compiled on GPUs only.
- **Peer** is another library on the same inputs, such as onnxruntime with an exported generator.
- **Times** are medians of rounds in which all variants take turns; ± is half the distance between
  the quartiles. On a GPU they are device time, from replaying a CUDA graph whose calls turn through
  inputs twice the size of the L2 cache, unless the column says host: that is time per call with the
  launches, one synchronisation to a block of calls. On a CPU they are time per call on one set of
  inputs, in a process that keeps freed memory (`GLIBC_TUNABLES`, set by `make bench`): page faults
  of large results would be much of the time otherwise, of the fastest variants most of it.
- **Of copy** is the fewest bytes the computation has to move over its time, relative to what a
  plain copy reached in the same run (bytes read and written).
- *(reference)* beside a time of fastgan's means that no kernel of its own covers the case there, so
  its plain PyTorch path ran.
"""

BREAKDOWN = """\
From torch's profiler. On a GPU a category is the time of its kernels and the launch gaps are the
rest of a step that was timed without the profiler; on a CPU a category is the time of its ops and
the gaps are what remains for Python. Data is the way of a ready batch from the host's bytes to
pictures on the device.
"""


# --- RESULTS.md ---------------------------------------------------------------------------------


def results_page(runs: dict[str, dict[str, Record]]) -> str:
    lines = ["# Benchmark results", "", METHOD]
    if not any(_type_of(run) == "cuda" for run in runs.values()):
        lines += ["**No GPU has been measured yet**; every GPU target below is open.", ""]
    for name, run in runs.items():
        lines += [f"## {_device_of(run)}", ""]
        for part, content in run.items():
            if part in PARTS:
                lines += [f"### {PARTS[part]}", "", provenance(content), ""]
                lines += table(rows_of(content))
                lines += [f"![Speed-up](results/{name}/{part}.svg)", ""]
        if "breakdown" in run:
            lines += ["### Where a training step's time goes", "", BREAKDOWN]
            lines += [provenance(run["breakdown"]), "", *breakdown_table(run["breakdown"])]
            lines += [f"![Breakdown](results/{name}/breakdown.svg)", ""]
        if plots.has_roofline(run):
            lines += ["### Against the limits of the machine", ""]
            lines += [f"![Roofline](results/{name}/roofline.svg)", ""]
    lines += ["## Targets", "", *target_table(runs)]
    return "\n".join(lines).rstrip() + "\n"


def provenance(part: Record) -> str:
    """One line: versions, sources, date and the ceilings of this part's run."""
    versions = [f"torch {part['torch']}", f"Triton {part['triton']}"]
    if part["device_type"] == "cuda":
        versions = [f"driver {part['driver']}", f"CUDA {part['cuda']}", *versions]
    ceilings = ", ".join(
        f"{name.removesuffix('_gb_per_s')} {value:g} GB/s"
        if name.endswith("_gb_per_s")
        else f"{name.removesuffix('_tflop_per_s').replace('_', ' ')} {value:g} TFLOP/s"
        for name, value in part["ceilings"].items()
    )
    malloc = f"; GLIBC_TUNABLES={part['malloc']}" if part["malloc"] else ""
    return (
        f"{part['date']}, {', '.join(versions)}, Python {part['python']}, commit "
        f"{part['commit'] or 'unknown'} (sources {part['sources']}); load average at the start "
        f"{part['load_average']:g}; {ceilings}{malloc}."
    )


def table(rows: Sequence[Row]) -> list[str]:
    """All rows of a part, with only the columns that say something there."""
    columns = {
        "op": [f"{row.op}, {row.mode}" for row in rows],
        "case": [row.title for row in rows],
        "eager": [_cell(row, "eager") for row in rows],
        "torch.compile": [_cell(row, "compile") for row in rows],
        "BLAS": [_cell(row, "library") for row in rows],
        "peer": [_cell(row, "peer") for row in rows],
        "fastgan": [_cell(row, "fastgan") for row in rows],
        "over eager": [_times(row.speedup("eager")) for row in rows],
        "over compile": [_times(row.speedup("compile")) for row in rows],
        "over peer": [_times(row.speedup("peer")) for row in rows],
        "of copy": [_percent(row.share_of_copy(row.fastgan)) for row in rows],
        "host, over eager": [_times(_host_speedup(row)) for row in rows],
        "launches (eager)": [_pair(row, "launches", 1) for row in rows],
        "peak MB (eager)": [_pair(row, "peak_memory", 1e6) for row in rows],
        "saved MB (eager)": [_pair(row, "saved_bytes", 1e6) for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return [*lines, "", *_experiments(rows), *_refusals(rows)]


def breakdown_table(part: Record) -> list[str]:
    """Milliseconds of a step and shares of it, per step and variant."""
    records = part["records"]
    used = [name for name in CATEGORIES if any(r["categories"][name] > 0 for r in records)]
    lines = [
        "| step | variant | total | " + " | ".join(used) + " |",
        "|---" * (3 + len(used)) + "|",
    ]
    for record in records:
        shares = [record["categories"][name] / record["seconds"] for name in used]
        start = f"| {record['op']}, {record['shape']} {record['dtype']} | {record['variant']} "
        cells = " | ".join(f"{100 * share:.1f}%" for share in shares)
        lines.append(f"{start}| {_duration(record['seconds'])} | {cells} |")
    return [*lines, ""]


def _cell(row: Row, kind: str) -> str:
    """The fastest right variant of a kind, its time and spread."""
    record = row.fastest(kind)
    if record is None:
        bad = [r for r in row.records.values() if r["kind"] == kind]
        return ("wrong" if "wrong" in bad[0] else "failed") if bad else ""
    name = record["variant"]
    if kind == "compile":
        name = name.removeprefix("torch.compile").strip()
    elif "impl" in record:
        name = record["impl"] if name == "fastgan" else f"{name}, {record['impl']}"
    label = f" ({name})" if name else ""
    return f"{_duration(seconds(record))} ±{100 * spread(record):.0f}%{label}"


def _duration(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def _host_speedup(row: Row) -> float | None:
    on_device = any("device" in record for record in row.timed("eager"))
    return row.speedup("eager", clock="wall") if on_device else None


def _pair(row: Row, field: str, unit: float) -> str:
    """fastgan's figure and, in brackets, that of the fastest eager form."""
    own, other = row.fastgan or {}, row.fastest("eager") or {}
    if field not in own or field not in other:
        return ""
    return f"{own[field] / unit:.3g} ({other[field] / unit:.3g})"


def _experiments(rows: Iterable[Row]) -> list[str]:
    """What no user can choose, beside the engine that it is an experiment with."""
    found = [
        f"- {row.op}, {row.title}: {name}: {_duration(seconds(record))}, "
        f"{_times(row.speedup_over('fastgan graph', name))} as fast"
        for row in rows
        for name, record in row.records.items()
        if record["kind"] == "experiment" and "wall" in record
    ]
    return ["Experiments with *fastgan graph*:", "", *found, ""] if found else []


def _refusals(rows: Iterable[Row]) -> list[str]:
    """Which variants have no time, and why."""
    found = [
        f"- {row.op}, {row.mode}, {row.title}: {name}: {record.get('wrong') or record['failed']}"
        for row in rows
        for name, record in row.records.items()
        if "wall" not in record
    ]
    return ["Without a time:", "", *found, ""] if found else []


def target_table(runs: dict[str, dict[str, Record]]) -> list[str]:
    """Every target, judged by the runs of its kind of device."""
    lines = ["| on | target | figure | bound | found | worst at |", "|---|---|---|---|---|---|"]
    for target in TARGETS:
        verdicts = [
            (run, target.judge({part: rows_of(content) for part, content in run.items()}))
            for run in runs.values()
            if _type_of(run) == target.device_type
        ]
        sign = "≤" if target.at_most else "≥"
        start = f"| {target.what} | {target.figure} | {sign} {target.bound:g} |"
        device = "GPU" if target.device_type == "cuda" else "CPU"
        if not verdicts:
            lines.append(f"| {device} {start} not measured | |")
        for run, verdict in verdicts:
            text = f"**{verdict.text}**" if verdict.text == "missed" else verdict.text
            found = text if verdict.worst is None else f"{text}: {verdict.worst:.2f}"
            lines.append(f"| {_device_of(run)} {start} {found} | {verdict.title} |")
    return lines


def _device_of(run: dict[str, Record]) -> str:
    return next(iter(run.values()))["device"]


def _type_of(run: dict[str, Record]) -> str:
    return next(iter(run.values()))["device_type"]


# --- README -------------------------------------------------------------------------------------


def readme_section(runs: dict[str, dict[str, Record]]) -> str:
    """What fastgan buys per op and mode, over all its cases, for each machine."""
    lines: list[str] = []
    if not any(_type_of(run) == "cuda" for run in runs.values()):
        lines += ["No GPU has been measured yet, so no GPU speed is claimed.", ""]
    for run in runs.values():
        lines += [
            f"**{_device_of(run)}**, speed-ups: median over the cases (lowest to highest).",
            "",
        ]
        lines += ["| | cases | over eager | over torch.compile |", "|---|---|---|---|"]
        uncovered = []
        for part in README_PARTS:
            if part not in run:
                continue
            grouped: dict[tuple[str, str], list[Row]] = {}
            for row in rows_of(run[part]):
                grouped.setdefault((row.op, row.mode), []).append(row)
            for (op, mode), group in grouped.items():
                if not all(row.covered for row in group):
                    uncovered.append(f"{op} {mode}")
                    continue
                eager, compiled = (
                    _range([row.speedup(kind) for row in group]) for kind in ("eager", "compile")
                )
                lines.append(f"| {op}, {mode} | {len(group)} | {eager} | {compiled} |")
        lines.append("")
        if uncovered:
            lines += [f"No kernels there, so plain PyTorch: {', '.join(uncovered)}.", ""]
    lines.append(
        "Every case, the method and the targets: [benchmarks/RESULTS.md](benchmarks/RESULTS.md)."
    )
    return "\n".join(lines)


def _range(values: Iterable[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ""
    middle = f"{statistics.median(present):.1f}x"
    return middle if len(present) == 1 else f"{middle} ({min(present):.1f} to {max(present):.1f})"


def rewrite_between_markers(text: str, section: str) -> str:
    """`text` with `section` between its performance markers."""
    start, end = MARKERS
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md must hold the markers {start} and {end} once each")
    head, tail = text.split(start)[0], text.split(end)[1]
    return f"{head}{start}\n{section}\n{end}{tail}"


# --- Two runs -----------------------------------------------------------------------------------


def regressions(base: dict[str, Record], new: dict[str, Record]) -> Iterator[str]:
    """fastgan's variants that became slower than noise explains, one line each.

    What its competitors of the same row changed by (another clock, a busy neighbour) is divided
    out; the rest counts if it exceeds 10% and three times the spread of both medians and of the
    competitors' changes.
    """
    for part in base.keys() & new.keys():
        before = {(row.op, row.title, row.mode): row for row in rows_of(base[part])}
        for row in rows_of(new[part]):
            old = before.get((row.op, row.title, row.mode))
            if old is not None:
                yield from _slower(old, row)


def _slower(old: Row, new: Row) -> Iterator[str]:
    drift, disagreement = _drift(old, new)
    for name, record in new.records.items():
        former = old.records.get(name, {})
        if record["kind"] != "fastgan" or "wall" not in former:
            continue
        where = f"{new.op}, {new.mode}, {new.title}: {name}"
        slower = ratio(record, former)
        if slower is None:
            yield f"{where} was {_duration(seconds(former))}, is {_state(record)}"
            continue
        slower /= drift
        noise = max(0.1, 3 * math.hypot(spread(former), spread(record), disagreement))
        if slower > 1 + noise:
            yield (
                f"{where} was {_duration(seconds(former))}, is {_duration(seconds(record))}: "
                f"{slower:.2f}x slower than its competitors of the same runs (noise {noise:.0%})"
            )


def _state(record: Record) -> str:
    return f"wrong: {record['wrong']}" if "wrong" in record else f"failed: {record['failed']}"


def _drift(old: Row, new: Row) -> tuple[float, float]:
    """How much slower the competitors of a row became, and how far they disagree, at the median."""
    own = ("fastgan", "experiment")
    theirs = [record for record in new.records.values() if record["kind"] not in own]
    ratios = [ratio(record, old.records.get(record["variant"])) for record in theirs]
    known = [value for value in ratios if value] or [1.0]
    drift = statistics.median(known)
    return drift, statistics.median(abs(value / drift - 1) for value in known)


# --- Command line -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's section as well")
    parser.add_argument(
        "--base", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two runs"
    )
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the runs")
    parser.add_argument("--output", type=Path, default=REPORT, help="the page to write")
    options = parser.parse_args(arguments)
    if options.base:
        found = list(regressions(*(store.load_run(folder) for folder in options.base)))
        print("\n".join(found) or "no regression beyond noise")
        return 1 if found else 0
    runs = store.load_runs(options.results)
    for name, run in runs.items():
        plots.draw(run, options.results / name)
    options.output.write_text(results_page(runs))
    if options.readme:
        readme = store.ROOT / "README.md"
        readme.write_text(rewrite_between_markers(readme.read_text(), readme_section(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
