"""What is installed and what would run: the text to paste into a bug report.

``python -m fastgan.env`` or ``fastgan env``; needs nothing but torch.
"""

import importlib.metadata
import os
import platform
import sys

import torch

import fastgan
from fastgan.ops import _dispatch

_PACKAGES = ("triton", "numpy", "torchvision", "pillow", "safetensors", "tyro", "onnxruntime")


def report() -> str:
    """Versions, GPUs, what is built, and for each op family what runs and why not the rest."""
    lines = [
        f"fastgan {fastgan.__version__} at {fastgan.__path__[0]}",
        f"Python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}",
        "packages: " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        *_gpus(),
        f"extension: {_extension()}",
        *_asked_for(),
        "implementations, fastest first:",
    ]
    for family, rows in _dispatch.ORDER.items():
        lines += [f"  {family} on {device}: {_live(rows, device)}" for device in ("cuda", "cpu")]
    return "\n".join(lines)


def _asked_for() -> list[str]:
    try:
        _dispatch.check_environment()
    except ValueError as error:
        return [f"wrong: {error}"]
    asked = os.environ.get("FASTGAN_IMPL")
    return [f"FASTGAN_IMPL={asked}"] if asked else []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU: none visible to torch"]
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        f"GPU {i}: {p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for i, p in enumerate(properties)
    ]


def _extension() -> str:
    if _dispatch.BUILD_INFO is None:
        return _dispatch.missing("native", "cpu") or ""
    return ", ".join(f"{key} {value}" for key, value in _dispatch.BUILD_INFO.items())


def _live(rows: dict[str, tuple[str, ...]], device_type: str) -> str:
    names = rows.get(device_type, ())
    reasons = {name: _dispatch.missing(name, device_type) for name in names}
    live = [name for name in names if reasons[name] is None]
    missing = [f"; not {name}: {reason}" for name, reason in reasons.items() if reason]
    return ", ".join([*live, "reference"]) + "".join(missing)


def main() -> None:
    sys.stdout.write(report() + "\n")


if __name__ == "__main__":
    main()
