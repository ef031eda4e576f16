"""What stops a training run: values that are not finite, signals, no more memory or disk."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from fastgan.device import is_out_of_memory

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


class TrainingInterrupted(TrainingError):
    """A signal ended the training after the step it arrived in, and the state was saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def stack_losses(phase: str, terms: Mapping[str, Tensor]) -> Tensor:
    """The values of `terms` [N], whose sum `phase` minimises."""
    for name, term in terms.items():
        if term.ndim != 0:
            raise ValueError(
                f"losses: the term {name!r} of phase {phase!r} must be a scalar, "
                f"got shape {list(term.shape)}"
            )
    return torch.stack(list(terms.values()))


def _alone(values: Tensor) -> None:
    """Leaves the values of one process as they are."""


class LossLedger:
    """Losses summed and watched on the device; the host waits for it only when it asks.

    Once a loss of a phase has not been finite for more than `patience` steps in a row, `tripped` is
    1 (a float, as optimizers want their `found_inf`), and an optimizer that heeds it no longer
    changes the weights. Some patience is due under a GradScaler, which skips such steps.

    Of several processes each has a ledger, and they agree, for all note the same losses: means over
    the processes, not finite where those of one process are not.
    """

    def __init__(
        self, device: torch.device, patience: int = 0, average: Callable[[Tensor], None] = _alone
    ) -> None:
        """`average` replaces metrics by their means over the processes when they are read."""
        self.tripped = torch.zeros((), device=device)
        self._patience = patience
        self._step = torch.zeros((), dtype=torch.int64, device=device)  # stands still once tripped
        self._losses: dict[str, _Watched] = {}
        self._metrics: dict[tuple[str, ...], Tensor] = {}
        self._average = average
        self._count = 0

    def begin_step(self, step: int) -> None:
        """To be called before the values of `step` are recorded."""
        self._step.copy_(torch.where(self.tripped > 0, self._step, step))
        self._count += 1

    def record_losses(
        self, phase: str, names: Sequence[str], losses: Tensor, own: Tensor | None = None
    ) -> None:
        """Notes the `losses` [N] of `phase`, and this process's `own` where they are a mean."""
        if phase not in self._losses:
            self._losses[phase] = _Watched(tuple(names), losses)
        watched = self._losses[phase]
        watched.sums += losses
        watched.last.copy_(torch.where(self.tripped > 0, watched.last, losses))
        if own is not None:
            if watched.own is None:
                watched.own = torch.zeros_like(own)
            watched.own.copy_(torch.where(self.tripped > 0, watched.own, own))
        finite = losses.sum() * 0 == 0
        watched.streak.add_(1).masked_fill_(finite, 0)
        self.tripped.copy_(torch.maximum(self.tripped, watched.streak > self._patience))

    def record_metrics(self, metrics: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Notes `share` of values that nothing minimises."""
        if metrics:
            values = torch.stack(list(metrics.values())).detach()
            names = tuple(metrics)
            if names not in self._metrics:
                self._metrics[names] = torch.zeros_like(values)
            self._metrics[names].add_(values, alpha=share)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and metrics, means per step since the last reading. Waits for the device.

        Of several processes all have to read at the same step.
        """
        for sums in self._metrics.values():
            self._average(sums)
        losses = {
            f"{phase}/{name}": mean
            for phase, watched in self._losses.items()
            for name, mean in self._means(watched.names, watched.sums)
        }
        metrics = {
            name: mean
            for names, sums in self._metrics.items()
            for name, mean in self._means(names, sums)
        }
        self._count = 0
        return losses, metrics

    def _means(self, names: tuple[str, ...], sums: Tensor) -> list[tuple[str, float]]:
        means = [total / self._count for total in sums.tolist()]
        sums.zero_()
        return list(zip(names, means, strict=True))

    def bad(self) -> tuple[int, list[str]] | None:
        """The step that tripped, and its terms that were not finite. Waits for the device."""
        if not self.tripped.item():
            return None
        names = [
            f"{phase}/{name}"
            for phase, watched in self._losses.items()
            for name, value in zip(watched.names, watched.last.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        return int(self._step), names or ["sum"]  # finite terms can have an infinite sum

    def is_culprit(self) -> bool:
        """Whether it was a loss of this process that tripped. Waits for the device."""
        own = [
            watched.last if watched.own is None else watched.own
            for watched in self._losses.values()
        ]
        return not math.isfinite(sum(losses.sum().item() for losses in own))


class _Watched:
    """The losses of one phase."""

    def __init__(self, names: tuple[str, ...], values: Tensor) -> None:
        self.names = names
        self.sums = torch.zeros_like(values)
        self.last = torch.zeros_like(values)  # of the step that tripped, once one did
        self.own: Tensor | None = None  # of it in this process, where there are several
        self.streak = torch.zeros_like(values[0], dtype=torch.int64)  # steps not finite, in a row


@contextlib.contextmanager
def memory_errors(hint: str) -> Iterator[None]:
    """Turns the ways of PyTorch to say 'out of memory' into a TrainingError that ends in `hint`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise TrainingError(f"out of memory: {hint}") from error
        raise


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError, which need not say what could not be written, into a TrainingError."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"could not write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """While entered, threads of libraries end without a traceback; what uses them raises anyway.

    One of TensorBoard that cannot write: the writer raises the same error at its next use. One of
    PyTorch that cannot fetch what a worker has read: so does the next read, without the reason,
    which is logged.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if _pins_memory(args.thread):
            log.error("the thread that pins memory: %r", args.exc_value)
        elif not (_is_tensorboard(args.thread) and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if _is_tensorboard(thread) and getattr(thread, "exception", None):
                thread.join(1.0)  # about to end, and to call the hook
        threading.excepthook = before


def _is_tensorboard(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.partition(".")[0] == "tensorboard"


def _pins_memory(thread: threading.Thread | None) -> bool:
    return thread is not None and "(_pin_memory_loop)" in thread.name


class StopSignals:
    """While entered, SIGINT and SIGTERM are remembered in `received` instead of acted on.

    A second signal of the kind acts at once. Outside the main thread signals cannot be caught, and
    nothing changes.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._remember)
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signum, self._before[signum])

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
