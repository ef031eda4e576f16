"""What stops a training run: values that are not finite, signals, too little memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType

import torch
from torch import Tensor


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


class TrainingInterrupted(TrainingError):
    """A signal ended the training after the step it arrived in, and the state was saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class LossLedger:
    """Losses summed and watched on the device; the host waits for it only when it asks.

    Once a loss term has not been finite for more than `patience` steps in a row, `tripped` is 1
    (a float, as optimizers want their `found_inf`), and an optimizer that heeds it no longer
    changes the weights. Some patience is due under a GradScaler, which skips such steps.
    """

    def __init__(self, device: torch.device, patience: int = 0) -> None:
        self.tripped = torch.zeros((), device=device)
        self._patience = patience
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._streak: dict[tuple[str, ...], Tensor] = {}  # bad steps in a row
        self._bad_step: dict[tuple[str, ...], Tensor] = {}  # by term; -1 while all is well
        self._count = 0

    def begin_step(self, step: int) -> None:
        """Steps must be announced before their values are recorded."""
        self._step.fill_(step)
        self._count += 1

    def record_losses(self, phase: str, terms: Mapping[str, Tensor]) -> Tensor:
        """Sum of `terms` with its graph, which `phase` minimises; notes each of them."""
        for name, term in terms.items():
            if term.ndim != 0:
                raise ValueError(
                    f"losses: the term {name!r} of phase {phase!r} must be a scalar, "
                    f"got shape {list(term.shape)}"
                )
        names = tuple(f"{phase}/{name}" for name in terms)
        stacked = torch.stack(list(terms.values()))
        values = stacked.detach()
        self._add(names, values)
        self._watch(names, ~values.isfinite())
        return stacked.sum()

    def _watch(self, names: tuple[str, ...], bad: Tensor) -> None:
        if names not in self._streak:
            self._streak[names] = torch.zeros_like(self._step)
            self._bad_step[names] = torch.full_like(bad, -1, dtype=torch.int64)
        streak, bad_step = self._streak[names], self._bad_step[names]
        streak.add_(1).mul_(bad.any())
        trip = (streak > self._patience) & (self.tripped == 0)
        bad_step.copy_(torch.where(bad & trip, self._step, bad_step))
        self.tripped.copy_(torch.maximum(self.tripped, trip))

    def record_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Notes values that nothing minimises."""
        if metrics:
            self._add(tuple(metrics), torch.stack(list(metrics.values())).detach())

    def _add(self, names: tuple[str, ...], values: Tensor) -> None:
        if names not in self._sums:
            self._sums[names] = torch.zeros_like(values)
        self._sums[names] += values

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and metrics, means per step since the last reading. Waits for the device."""
        losses: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for names, sums in self._sums.items():
            into = losses if names in self._streak else metrics
            into.update((n, s / self._count) for n, s in zip(names, sums.tolist(), strict=True))
            sums.zero_()
        self._count = 0
        return losses, metrics

    def bad(self) -> tuple[int, list[str]] | None:
        """The step that tripped, and its terms that were not finite. Waits for the device."""
        if not self.tripped.item():
            return None
        steps = {
            name: step
            for names, steps in self._bad_step.items()
            for name, step in zip(names, steps.tolist(), strict=True)
            if step >= 0
        }
        return min(steps.values()), list(steps)


@contextlib.contextmanager
def memory_errors(hint: str) -> Iterator[None]:
    """Turns the ways of PyTorch to say 'out of memory' into a TrainingError that ends in `hint`."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in text:
            raise TrainingError(f"out of memory: {hint}") from error
        raise


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
