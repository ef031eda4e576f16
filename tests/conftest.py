"""Which fastgan is tested, with which implementations, on which device."""

import importlib.util
import os
from collections.abc import Sequence

# The kernels are decorated for the interpreter or the compiler when they are imported, so this
# has to be decided before: without a GPU they run in Triton's interpreter.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import fastgan
from fastgan.ops import _dispatch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def _live(implementation: str) -> str | None:
    """Why an implementation is not live in this run; None if it is."""
    return _dispatch.missing(implementation, DEVICE.type)


def pytest_report_header() -> list[str]:
    states = [f"{name} ({_live(name) or 'live'})" for name in ("native", "triton")]
    device = torch.cuda.get_device_name() if GPU else "CPU, Triton in the interpreter"
    return [
        f"fastgan: {fastgan.__file__}",
        f"implementations: {', '.join(states)}; device: {device}; torch {torch.__version__}",
    ]


def pytest_configure() -> None:
    for name in filter(None, os.environ.get("FASTGAN_REQUIRE", "").split(",")):
        if name not in _dispatch.IMPLEMENTATIONS:
            raise pytest.UsageError(f"FASTGAN_REQUIRE names {name!r}, no implementation")
        if (reason := _live(name)) is not None:
            raise pytest.UsageError(f"FASTGAN_REQUIRE={name}, but {reason}")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return DEVICE


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flags are tyro's, which the rest of fastgan does without."""
    if importlib.util.find_spec("tyro") is None:
        reason = "the command line needs the extra [train]"
        monkeypatch.setattr("fastgan.cli.main", lambda *arguments: pytest.skip(reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
