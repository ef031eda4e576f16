"""Where the time of a training step goes, by category, from torch's profiler.

The steps are those of bench_training.py, fed as the trainer feeds them: from bytes in host memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

import bench_training
import step_trace
from fastgan.images import to_float
from harness import Case, Record, describe, significant, synchronize

STEPS = {"tiny": 1, "cpu": 3, "gpu": 10}


def cases(sizes: str) -> Iterator[Case]:
    for case in bench_training.cases(sizes):
        chosen = tuple(variant for variant in case.variants if variant.kind != "compile")
        yield replace(case, mode="breakdown", variants=chosen)


def test_breakdown(session: Any, case: Case, variant: str, tmp_path: Path) -> None:
    if not session.stored(case, [variant]):
        found = breakdown(case, variant, session.device, STEPS[session.sizes], tmp_path)
        session.add([found])


def breakdown(case: Case, variant: str, device: torch.device, steps: int, folder: Path) -> Record:
    """Seconds by category of one variant's mean step."""
    chosen = next(v for v in case.variants if v.name == variant)
    images = case.inputs(torch.device("cpu"), torch.Generator().manual_seed(0))
    ready = [(127.5 * (image + 1)).byte() for image in images]
    step = chosen.build()

    def call() -> None:
        with record_function(step_trace.STEP):
            with record_function(step_trace.DATA):
                batch = [upload(image, device) for image in ready]
            step(*batch)

    for _ in range(4):
        call()
    seconds = statistics.median(timed(call, device) for _ in range(steps))
    path = folder / "trace.json"
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            call()
        synchronize(device)
    profile.export_chrome_trace(str(path))
    found = step_trace.read(path, seconds if device.type == "cuda" else None)
    return {
        **describe(case, chosen),
        "seconds": significant(found.seconds),
        "categories": {name: significant(value) for name, value in found.categories.items()},
    }


def upload(image: Tensor, device: torch.device) -> Tensor:
    return to_float(image.to(device, non_blocking=True))


def timed(call: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start
