"""Every GPU test and the compute-sanitizer passes; what `make gpu-test` runs.

Writes one JSON file with the machine, the commit, and per step the counts, the time and the
verdict; exits with 1 if any step failed.
"""

import argparse
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


def steps() -> dict[str, list[str]]:
    """Name of each step and its command."""
    commands = {"tests": [*PYTEST, "-m", "not slow", "tests"]}
    for tool in SANITIZERS:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        commands[tool] = [*sanitizer, *PYTEST, "-m", "sanitize", "tests"]
    return commands


def run(name: str, command: list[str], limit: float) -> dict[str, Any]:
    environment = {
        **os.environ,
        "FASTGAN_REQUIRE": "native,triton",
        # One allocation per tensor, so that the sanitizer sees where each one ends.
        **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name in SANITIZERS else {}),
    }
    begin = time.monotonic()
    if shutil.which(command[0]) is None:
        return {"ok": False, "reason": f"{command[0]} is not on PATH"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        sys.stdout.write(output.decode() if isinstance(output, bytes) else output)
        return {"ok": False, "reason": f"not done after {limit:.0f} s"}
    sys.stdout.write(done.stdout[-20000:] + done.stderr[-5000:])
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    return {
        "ok": done.returncode == 0 and counts.get("passed", 0) > 0,
        "returncode": done.returncode,
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
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-test.json")
    parser.add_argument("--limit", type=float, default=520, help="seconds for all steps together")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.limit
    results: dict[str, Any] = {}
    for name, command in steps().items():
        print(f"--- {name}: {' '.join(command)}", flush=True)
        results[name] = run(name, command, max(end - time.monotonic(), 1))
        arguments.out.write_text(json.dumps({**machine(), "steps": results}, indent=1))
    for name, result in results.items():
        print(f"{name}: {'ok' if result['ok'] else 'FAILED'} {result}")
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
