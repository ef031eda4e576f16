"""Where the time of some steps went, from the trace that torch's profiler writes.

The trace's JSON is read rather than the profiler's objects: its format is older than any torch
that fastgan supports, and a test can write one.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "benchmarked step"
DATA = "benchmarked data"

CONVOLUTION = "convolution and GEMM"
GAPS = "launch gaps"
CATEGORIES = (
    CONVOLUTION,
    "norm",
    "activation",
    "padding",
    "loss",
    "optimizer",
    "data",
    "casts and copies",
    "other",
    GAPS,
)

# Decided by any of the names an op was called under.
_WHEREVER = (
    ("optimizer", r"^Optimizer\.|_fused_adam|_foreach_|_amp_"),
    ("data", rf"^{DATA}$|Memcpy HtoD"),
)
# Decided by the innermost name that a pattern knows: kernel, op, its callers. What Inductor fuses
# is named after the ops inside, a convolution's bias for one, and is none of them.
_INNERMOST = (
    ("norm", r"^triton_.*(norm|var_mean)"),
    ("loss", r"^triton_.*(loss|mean|sum)"),
    ("activation", r"^triton_.*(relu|tanh)"),
    ("padding", r"^triton_.*pad"),
    ("other", r"^triton_"),
    ("casts and copies", r"nchwToNhwc|nhwcToNchw"),
    ("norm", r"_norm|norm_|instance_stats|adain|var_mean|InstanceNorm|BatchNorm"),
    ("padding", r"reflection_pad|reflect_pad|constant_pad|ReflectionPad"),
    (CONVOLUTION, r"conv|gemm|addmm|bmm|::mm$|matmul|cutlass|xmma|wgrad|dgrad|Convolution"),
    ("loss", r"loss|gram|softplus|logsigmoid|log_sigmoid|square|::pow|::abs|::sgn|::mean|Abs|Mean"),
    ("activation", r"relu|tanh|sigmoid|threshold|Relu|Tanh"),
    (
        "casts and copies",
        r"::copy_$|::_to_copy$|::to$|::clone$|::contiguous$|::cat$|::stack$|::zero_$|::fill_$"
        r"|Memcpy|Memset",
    ),
)


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step by category; they add up to `seconds`."""

    seconds: float
    categories: dict[str, float]


def category(names: Sequence[str]) -> str:
    """What a piece of work is for, by its names from the innermost outwards."""
    for found, pattern in _WHEREVER:
        if any(re.search(pattern, name) for name in names):
            return found
    for name in names:
        for found, pattern in _INNERMOST:
            if re.search(pattern, name):
                return found
    return "other"


@dataclass
class _Op:
    """A range on the host: an op, or a label around several."""

    name: str
    start: float
    duration: float
    external_id: Any
    parent: _Op | None = None
    inner: float = 0.0
    """Time of the ranges directly inside."""

    @property
    def names(self) -> list[str]:
        return [self.name, *(self.parent.names if self.parent else [])]


_HOST = ("cpu_op", "user_annotation")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def read(path: Path, seconds: float | None = None) -> Breakdown:
    """The mean step of a trace whose steps are labelled `STEP`, on the GPU if it shows one.

    On a GPU a category's time is that of its kernels (which share the time where they overlap on
    several streams), and launch gaps are the rest of a step. The profiler slows the host and not
    the kernels, so the length of a step is better measured without it and given as `seconds`. On
    a CPU a category's time is that of its ops, and the gaps are what a step spent outside of any.
    """
    events = _ranges(path)
    ops = _nested(e for e in events if e.get("cat") in _HOST)
    steps = [op for op in ops if op.name == STEP]
    if not steps:
        raise ValueError(f"{path} has no range called {STEP!r}")
    kernels = _on_device(events)
    if kernels:
        times = {name: value / len(steps) for name, value in _kernel_times(ops, kernels).items()}
        total = _span(steps, kernels) / len(steps) if seconds is None else 1e6 * seconds
        total = max(total, sum(times.values()))
        times[GAPS] = total - sum(times.values())
    else:
        times = {name: value / len(steps) for name, value in _op_times(ops).items()}
        total = sum(step.duration for step in steps) / len(steps)
    return Breakdown(total * 1e-6, {name: 1e-6 * times.get(name, 0.0) for name in CATEGORIES})


def device_work(path: Path) -> list[str]:
    """Names of the kernels, copies and fills in a trace, in the order they ran."""
    return [event["name"] for event in sorted(_on_device(_ranges(path)), key=lambda e: e["ts"])]


def _ranges(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that have a duration."""
    return [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]


def _on_device(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") in _DEVICE]


def _nested(events: Iterable[dict[str, Any]]) -> list[_Op]:
    """The ranges of every thread, each knowing the one it is inside of."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    ops: list[_Op] = []
    for thread in threads.values():
        open_ops: list[_Op] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            identity = event.get("args", {}).get("External id")
            op = _Op(event["name"], event["ts"], event["dur"], identity)
            while open_ops and open_ops[-1].start + open_ops[-1].duration <= op.start:
                open_ops.pop()
            if open_ops:
                op.parent = open_ops[-1]
                op.parent.inner += op.duration
            open_ops.append(op)
            ops.append(op)
    return ops


def _op_times(ops: list[_Op]) -> dict[str, float]:
    """Microseconds that ops inside of steps took by themselves."""
    times: dict[str, float] = defaultdict(float)
    for op in ops:
        names = op.names
        if STEP in names:
            times[GAPS if op.name == STEP else category(names)] += op.duration - op.inner
    return times


def _kernel_times(ops: list[_Op], kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of kernels; together the time in which any was running."""
    callers = {op.external_id: op for op in ops if op.external_id is not None}
    times: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        caller = callers.get(kernel.get("args", {}).get("External id"))
        names = [kernel["name"], *(caller.names if caller else [])]
        times[category(names)] += kernel["dur"]
    busy = _covered(sorted((k["ts"], k["ts"] + k["dur"]) for k in kernels))
    share = busy / sum(times.values())
    return {name: value * share for name, value in times.items()}


def _span(steps: list[_Op], kernels: list[dict[str, Any]]) -> float:
    """Microseconds from the first step to the end of the last kernel or step."""
    ends = [k["ts"] + k["dur"] for k in kernels] + [s.start + s.duration for s in steps]
    return max(ends) - min(step.start for step in steps)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals sorted by their starts."""
    total, reached = 0.0, float("-inf")
    for start, stop in intervals:
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
