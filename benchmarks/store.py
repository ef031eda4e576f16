"""Where results come from and where they go: a run is a folder with one JSON file per part.

A part's file says on which machine, with which versions and from which sources its records were
measured. It is rewritten after every case, so that a run that was cut off can be resumed.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
CASE = ("op", "shape", "dtype", "layout", "mode")


def case_of(record: Record) -> tuple[str, ...]:
    """The row that a record belongs to."""
    return tuple(record[field] for field in CASE)


def identity(record: Record) -> tuple[str, ...]:
    """What a record measures, the same in every run."""
    return (*case_of(record), record["variant"])


def significant(value: float) -> float:
    """Four digits, which is more than any timing deserves."""
    return float(f"{value:.4g}")


# --- The machine --------------------------------------------------------------------------------


def environment(device: torch.device) -> Record:
    """Everything that a reader needs to judge or repeat the numbers."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        **(_gpu(device) if device.type == "cuda" else {"threads": torch.get_num_threads()}),
        "cpu": _cpu_name(),
        "malloc": os.environ.get("GLIBC_TUNABLES"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "pytest_benchmark": _version("pytest-benchmark"),
        "commit": _commit(),
        "sources": source_digest(),
        "load_average": round(os.getloadavg()[0], 1),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def run_folder(device: torch.device) -> Path:
    """Where the results of this machine are stored."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _gpu(device: torch.device) -> Record:
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line a command prints; None where it does not exist or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _commit() -> str | None:
    """The commit, with a plus sign if files differ from it; FASTGAN_COMMIT outside a checkout."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return os.environ.get("FASTGAN_COMMIT")
    sources = (*_SOURCE_FOLDERS, ":!benchmarks/results")
    changed = _output("git", "status", "--porcelain", "--", *sources)
    return commit + ("+" if changed else "")


_SOURCE_FOLDERS = ("fastgan", "kernels", "csrc", "benchmarks")


def source_digest() -> str:
    """Of the code that the numbers depend on: equal digests, comparable numbers."""
    digest = hashlib.sha256()
    for folder in _SOURCE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cuh", ".cu") and path.name != "report.py":
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# --- What the machine can do at best ------------------------------------------------------------


def ceilings(device: torch.device, *, quick: bool = False) -> Record:
    """Copy bandwidth in GB/s, read and written bytes counted, and matrix products in TFLOP/s."""
    megabytes, side = (1024, 8192) if device.type == "cuda" else (256, 2048)
    if quick:
        megabytes, side = 1, 64
    source = torch.rand(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best_median(lambda: target.copy_(source), device)
    found: Record = {"copy_gb_per_s": significant(2 * source.nbytes / seconds / 1e9)}
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        left, right = torch.randn(2, side, side, device=device).to(dtype)
        seconds = _best_median(lambda a=left, b=right: a @ b, device)
        found[f"matmul_{dtype}_tflop_per_s".replace("torch.", "")] = significant(
            2 * side**3 / seconds / 1e12
        )
    return found


def _best_median(call: Any, device: torch.device) -> float:
    """Median seconds of one call, ten to a synchronisation."""

    def block() -> float:
        start = time.perf_counter()
        for _ in range(10):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / 10

    block()
    return statistics.median(block() for _ in range(9))


# --- Files --------------------------------------------------------------------------------------


class Part:
    """The file of one part of a run, written after every case."""

    def __init__(self, path: Path, header: Record, *, resume: bool) -> None:
        self.path = path
        self.header = header
        self._records: dict[tuple[str, ...], Record] = {}
        if resume and path.exists():
            stored = json.loads(path.read_text())
            if all(stored[field] == header[field] for field in ("device", "sources", "torch")):
                self.header = {field: stored[field] for field in stored if field != "records"}
                self._records = {identity(record): record for record in stored["records"]}

    def has(self, case: Iterable[str], variants: Iterable[str]) -> bool:
        """Whether all these variants of a case were measured, well or not."""
        return all((*case, variant) in self._records for variant in variants)

    def record(self, case: Iterable[str], variant: str) -> Record:
        return self._records[(*case, variant)]

    def add(self, records: Iterable[Record]) -> None:
        for record in records:
            self._records[identity(record)] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(_as_text(self.header, list(self._records.values())))
        partial.replace(self.path)


def _as_text(header: Record, records: list[Record]) -> str:
    """JSON with one record to a line, so that two runs can be compared by eye."""
    head = json.dumps(header, indent=1)
    body = ",\n".join("  " + json.dumps(record) for record in records)
    return head[: head.rindex("}")].rstrip() + ',\n "records": [\n' + body + "\n ]\n}\n"


def load_runs(folder: Path) -> dict[str, dict[str, Record]]:
    """Every run in a folder of runs by name, GPUs first."""
    runs = {path.name: load_run(path) for path in sorted(folder.glob("*")) if path.is_dir()}
    found = {name: run for name, run in runs.items() if run}
    return dict(sorted(found.items(), key=lambda item: "cpu" in _device_types(item[1])))


def _device_types(run: dict[str, Record]) -> set[str]:
    return {part["device_type"] for part in run.values()}


def load_run(folder: Path) -> dict[str, Record]:
    """The parts of a run by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
