"""Every GPU test and the compute-sanitizer passes; what `make gpu-test` runs.

Fills a folder: a log of each step, and report.json with the machine, the commit, and per step the
counts, the time and the verdict. Exits with 1 if any step failed.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TAIL = 4000  # characters of each log that are shown


def steps() -> dict[str, list[str]]:
    """Name of each step and its command."""
    commands = {"tests": [*PYTEST, "-m", "not slow or gpu", "tests"]}
    if importlib.util.find_spec("xdist"):  # or hundreds of kernels would be compiled one by one
        commands["tests"] += ["--numprocesses=auto"]
    for tool in SANITIZERS:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        commands[tool] = [*sanitizer, *PYTEST, "-m", "sanitize", "tests"]
    return commands


def run(name: str, command: list[str], log: Path, limit: float) -> dict[str, Any]:
    environment = {
        **os.environ,
        "FASTGAN_REQUIRE": "native,triton",
        # One allocation per tensor, so that the sanitizer sees where each one ends.
        **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name in SANITIZERS else {}),
    }
    begin = time.monotonic()
    if shutil.which(command[0]) is None:
        return {"ok": False, "reason": f"{command[0]} is not on PATH"}
    with log.open("w") as file:
        try:
            returncode = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"ok": False, "reason": f"not done after {limit:.0f} s"}
    said = log.read_text(errors="replace")
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", said)}
    return {
        "ok": returncode == 0 and counts.get("passed", 0) > 0,
        "returncode": returncode,
        "seconds": round(time.monotonic() - begin, 1),
        **counts,
    }


def machine() -> dict[str, str]:
    code = "import fastgan.env; print(fastgan.env.report())"
    report = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {"environment": report.stdout, "commit": commit.stdout.strip()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-test")
    parser.add_argument("--limit", type=float, default=460, help="seconds for all steps together")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for log in arguments.out.glob("*.log"):
        log.unlink()
    end = time.monotonic() + arguments.limit
    report: dict[str, Any] = {**machine(), "steps": {}}

    def step(name: str) -> dict[str, Any]:
        print(f"--- {name}: {' '.join(commands[name])}", flush=True)
        log = arguments.out / f"{name}.log"
        return run(name, commands[name], log, max(end - time.monotonic(), 1))

    def note(name: str, result: dict[str, Any]) -> None:
        report["steps"][name] = result
        (arguments.out / "report.json").write_text(json.dumps(report, indent=1))

    commands = steps()
    note("tests", step("tests"))  # first: the sanitizers then find the kernels in Triton's cache
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, result in zip(SANITIZERS, pool.map(step, SANITIZERS), strict=True):
            note(name, result)
    for name in commands:
        log = arguments.out / f"{name}.log"
        if log.exists():
            print(f"--- {name}\n{log.read_text(errors='replace')[-TAIL:]}")
    print(report["environment"])
    for name, result in report["steps"].items():
        print(f"{name}: {'ok' if result['ok'] else 'FAILED'} {result}")
    return 0 if all(result["ok"] for result in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
