"""The only place that decides which implementation of an op runs, and why.

``"reference"`` is plain PyTorch, ``"triton"`` the kernels of fastgan.kernels, ``"native"`` the
C++/CUDA extension. What is installed is found out once, at import, without touching a device;
what a call asks for is decided per call from things that torch.compile guards: device, dtype,
shape and strides.
"""

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import forward_ad

IMPLEMENTATIONS = ("reference", "triton", "native")

# Fastest first, for each op family and device type. The reference path closes every row.
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "gram": {"cuda": ("triton",)},
    "instance_norm": {"cuda": ("triton",), "cpu": ("native",)},
    "gan_loss": {"cuda": ("native",), "cpu": ("native",)},
}

_NO_REASONS: Mapping[str, str | None] = {}


class ImplUnavailableError(RuntimeError):
    """The implementation that was explicitly asked for cannot run this call."""


# --- What is installed --------------------------------------------------------------------------


def _load_native() -> tuple[Any, str | None]:
    """The extension's build information, or the reason why there is none."""
    if importlib.util.find_spec("fastgan._C") is None:
        return None, (
            "fastgan._C is not built; reinstall with a C++ compiler on PATH "
            "(pip install --no-build-isolation .)"
        )
    try:
        extension = importlib.import_module("fastgan._C")
    except (ImportError, OSError) as error:
        return None, (
            f"fastgan._C does not load under torch {torch.__version__} "
            f"({str(error).splitlines()[0]}); rebuild it with pip install --no-build-isolation ."
        )
    info = extension.build_info()
    if not {"torch", "cuda"} <= info.keys():
        return None, (
            "fastgan._C was built for another version of fastgan; "
            "rebuild it with pip install --no-build-isolation ."
        )
    if _release(info["torch"]) != _release(torch.__version__):
        return None, (
            f"fastgan._C was built for torch {info['torch']}, this is torch {torch.__version__}; "
            "rebuild it with pip install --no-build-isolation ."
        )
    return info, None


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


BUILD_INFO, _NATIVE_MISSING = _load_native()
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_MISSING = (
    None if importlib.util.find_spec("triton") else "Triton is not installed; pip install triton"
)
_NATIVE_WITHOUT_CUDA = (
    "fastgan._C was built without CUDA; reinstall with FASTGAN_BUILD_CUDA=1 and nvcc on PATH"
    if BUILD_INFO is not None and BUILD_INFO["cuda"] is None
    else None
)


def missing(implementation: str, device_type: str) -> str | None:
    """Why nothing of this implementation can run on such a device in this installation."""
    if implementation == "triton":
        return _TRITON_MISSING
    if implementation == "native":
        return _NATIVE_MISSING or (_NATIVE_WITHOUT_CUDA if device_type == "cuda" else None)
    return None


# --- What is asked for --------------------------------------------------------------------------


def _parse(text: str) -> dict[str, str]:
    """``"triton"`` or ``"gram=triton,gan_loss=native"`` as a choice per family."""
    if not text:
        return {}
    try:
        if "=" not in text:
            return _choices(text, {})
        pairs = [part.strip().split("=", 1) for part in text.split(",")]
        return _choices(None, {pair[0]: pair[-1] for pair in pairs})
    except ValueError as error:
        raise ValueError(f"FASTGAN_IMPL={text}: {error}") from None


def _choices(everywhere: str | None, families: Mapping[str, str]) -> dict[str, str]:
    for family, implementation in families.items():
        if family not in ORDER:
            raise ValueError(f"unknown op family {family!r}, expected one of {', '.join(ORDER)}")
        if implementation not in offered(family):
            raise ValueError(
                f"{family} has no implementation {implementation!r}, "
                f"expected one of {', '.join(offered(family))}"
            )
    if everywhere is None:
        return dict(families)
    if everywhere not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {everywhere!r}, expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    return {family: everywhere for family in ORDER if everywhere in offered(family)}


def offered(family: str) -> tuple[str, ...]:
    """The implementations that a family has on any device."""
    rows = ORDER[family].values()
    return tuple(
        name for name in IMPLEMENTATIONS if name == "reference" or any(name in row for row in rows)
    )


class _ThreadState(threading.local):
    # Set per thread in __init__, not as class attributes: torch.compile guards only the former.
    def __init__(self) -> None:
        self.choices: dict[str, str] = {}
        self.explaining = False


def _read_environment() -> tuple[dict[str, str], str | None]:
    """The choice per family, or what is wrong with it."""
    try:
        return _parse(os.environ.get("FASTGAN_IMPL", "")), None
    except ValueError as error:
        return {}, str(error)


_state = _ThreadState()
_FROM_ENVIRONMENT, _WRONG_ENVIRONMENT = _read_environment()


def check_environment() -> None:
    """Raises ValueError for a FASTGAN_IMPL that cannot be read; `import fastgan` raises nothing."""
    if _WRONG_ENVIRONMENT is not None:
        raise ValueError(_WRONG_ENVIRONMENT)


class use_impl:
    """Choose the implementation of every op called inside the ``with`` block, in this thread.

    ``use_impl("reference")`` applies to each op family that has such an implementation and leaves
    the others alone; ``use_impl(gram="triton", gan_loss="native")`` chooses per family. The
    families are ``gram``, ``instance_norm`` and ``gan_loss``; the implementations
    ``"reference"``, ``"triton"`` and ``"native"``. Blocks nest; an op's own ``impl=`` argument
    wins over the block, the block over the environment variable ``FASTGAN_IMPL``.

    The choice fixes the forward and the first-order backward and never falls back: an op that
    cannot run as chosen raises :class:`ImplUnavailableError`. Second-order gradients follow the
    reference formula.

    Raises:
        ValueError: unknown family or implementation, or both forms mixed.
    """

    def __init__(self, implementation: str | None = None, /, **families: str) -> None:
        if (implementation is None) == (not families):
            raise ValueError('use_impl: expected use_impl("name") or use_impl(family="name", ...)')
        try:
            self._choices = _choices(implementation, families)
        except ValueError as error:
            raise ValueError(f"use_impl: {error}") from None

    def __enter__(self) -> None:
        self._outer = _state.choices
        _state.choices = {**_state.choices, **self._choices}

    def __exit__(self, *exception: object) -> None:
        _state.choices = self._outer


# --- The decision -------------------------------------------------------------------------------


def choose(
    op: str,
    family: str,
    impl: str | None,
    device: torch.device,
    *,
    cannot: Mapping[str, str | None] = _NO_REASONS,
    slower: Mapping[str, str | None] = _NO_REASONS,
    note: Callable[[str], str | None] | None = None,
) -> str:
    """The implementation that runs this call of ``op``.

    ``cannot`` gives, per implementation, why it cannot run a call of this dtype, shape or layout;
    ``slower`` why it should not be the automatic choice although it could; ``note`` says what else
    :func:`explain` should tell of the implementation chosen.
    """
    if _state.explaining:
        explanation = _explanation(op, family, impl, device, cannot, slower)
        if note is not None and explanation.impl is not None:
            explanation = replace(explanation, note=note(explanation.impl))
        raise _Explained(explanation)
    requested = _requested(family, impl)
    if requested is not None:
        reason = _obstacle(op, family, requested, device, cannot)
        if reason is not None:
            raise ImplUnavailableError(f"{op}: {requested}: {reason}")
        return requested
    for name in ORDER[family].get(device.type, ()):
        if _obstacle(op, family, name, device, cannot) is None and slower.get(name) is None:
            return name
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _warn_if_something_is_missing(family)
    return "reference"


def _requested(family: str, impl: str | None) -> str | None:
    check_environment()
    return impl or _state.choices.get(family) or _FROM_ENVIRONMENT.get(family)


def without_autocast(device: torch.device) -> torch.autocast:
    """A block in which autocast casts nothing, for ops own their precision; on meta tensors too."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def _obstacle(
    op: str, family: str, name: str, device: torch.device, cannot: Mapping[str, str | None]
) -> str | None:
    if name not in offered(family):
        raise ValueError(f"{op}: impl must be one of {', '.join(offered(family))}, got {name!r}")
    if name == "reference":
        return None
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "has no rules for forward mode and torch.func's transforms; use impl=None"
    if name == "triton" and device.type == "cpu":
        if not INTERPRETING:
            return "CPU tensors run only in Triton's interpreter; set TRITON_INTERPRET=1"
    elif name not in ORDER[family].get(device.type, ()):
        return f"has no {device.type} kernels for this op; use impl=None"
    return missing(name, device.type) or cannot.get(name)


_warned: set[str] = set()


def _warn_if_something_is_missing(family: str) -> None:
    for name in ORDER[family].get("cuda", ()):
        reason = missing(name, "cuda")
        if reason is not None and reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"fastgan: {family} ops run on the slower reference path: {reason}",
                stacklevel=5,
            )


# --- Explaining it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns: the implementation that would run, and why no other."""

    op: str
    impl: str | None
    """The implementation that would run; None if the call would raise ImplUnavailableError."""
    reasons: dict[str, str]
    """For each other implementation, why it would not run."""
    note: str | None = None
    """What the call would do beside its work, such as a copy of an input."""

    def __str__(self) -> str:
        runs = f"runs {self.impl}" if self.impl else "cannot run"
        lines = [f"{self.op}: {runs}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        if self.note:
            lines.append(f"  note: {self.note}")
        return "\n".join(lines)


class _Explained(Exception):
    """Carries the explanation out of the op; no error."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


def _explanation(
    op: str,
    family: str,
    impl: str | None,
    device: torch.device,
    cannot: Mapping[str, str | None],
    slower: Mapping[str, str | None],
) -> Explanation:
    requested = _requested(family, impl)
    if requested is not None:
        _obstacle(op, family, requested, device, cannot)  # raises for an unknown name
    in_order = (*ORDER[family].get(device.type, ()), "reference", *offered(family))
    reasons: dict[str, str] = {}
    chosen = None
    for name in dict.fromkeys(in_order):
        reason = _obstacle(op, family, name, device, cannot)
        if reason is None and requested is not None and name != requested:
            reason = f"{requested!r} was asked for"
        elif reason is None and requested is None:
            reason = f"{chosen} is preferred here" if chosen else slower.get(name)
        if reason is None:
            chosen = name
        else:
            reasons[name] = reason
    return Explanation(op, chosen, reasons)


def explain(op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Tell which implementation a call would run and why the others would not, without running it.

    ``print(fastgan.explain(fastgan.adain, content, style, alpha=0.5))``: the op and the arguments
    it would be called with. Bad arguments raise as they would in the call itself.

    Returns:
        An :class:`Explanation` with ``impl`` (None where the call would raise
        :class:`ImplUnavailableError`) and ``reasons``, the other implementations' reasons.
    """
    _state.explaining = True
    try:
        op(*args, **kwargs)
    except _Explained as explained:
        return explained.explanation
    finally:
        _state.explaining = False
    return Explanation(getattr(op, "__name__", str(op)), "reference", {})
