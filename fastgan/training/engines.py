"""Faster ways to execute a step than operation by operation, and the choice among them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastgan.device import Precision
from fastgan.recipes import Batch, Recipe
from fastgan.training.engine import EagerEngine
from fastgan.training.guards import TrainingError

log = logging.getLogger(__name__)

EngineName: TypeAlias = Literal["eager", "compile", "graph"]
ResultT = TypeVar("ResultT")

_REHEARSALS = 3  # steps before the capture: libraries set themselves up, optimizers their state


def make_engine(
    name: EngineName, recipe: Recipe, device: torch.device, precision: Precision, ema_decay: float
) -> EagerEngine:
    """The engine of that name, or the eager one, with a warning that says why, on other devices."""
    if name == "compile":
        return CompileEngine(recipe, device, precision, ema_decay)
    if name == "graph" and device.type == "cuda":
        return GraphEngine(recipe, device, precision, ema_decay, CudaGraph(device))
    if name == "graph":
        log.warning("engine graph needs a CUDA device and this is %s: using eager", device.type)
    return EagerEngine(recipe, device, precision, ema_decay)


class CompileEngine(EagerEngine):
    """Forward and backward of each phase by ``torch.compile``, which fuses what fastgan does not.

    What cannot be compiled (no compiler, a recipe that TorchDynamo cannot follow as a whole) runs
    as in the eager engine, after a warning that says why.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._begin_step = _compiled(self._begin_step)
        self._losses = _compiled(self._losses)


def _compiled(function: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """`function`, compiled at its first call if that is possible."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    chosen: Callable[..., ResultT] = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*arguments: Any) -> ResultT:
        nonlocal chosen
        try:
            return chosen(*arguments)
        except TorchDynamoException as error:
            if chosen is function:
                raise
            reason = str(error).strip().partition("\n")[0]
            log.warning("engine compile: %s is not compiled: %s", function.__name__, reason)
            chosen = function
            return chosen(*arguments)

    return call


class Graph(Protocol):
    """Records the work of one step and does it again; a recorded step depends on its tensors'
    storages and what they hold, on nothing else."""

    def rehearse(self, work: Callable[[], None]) -> str | None:
        """Do `work` as it will be recorded; the reason why it cannot be, None if it can."""

    def capture(self, work: Callable[[], None]) -> None:
        """Record `work`. No tensor that exists is changed."""

    def replay(self) -> None:
        """Do what was recorded."""


class GraphEngine(EagerEngine):
    """The whole step captured once and replayed, which spares the host every single launch.

    The first steps are rehearsals, steps like any other; the one after them is a replay already.
    A step that waits for the device cannot be captured: a warning says so, and where, and the
    steps go on as in the eager engine.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        precision: Precision,
        ema_decay: float,
        graph: Graph,
    ) -> None:
        super().__init__(recipe, device, precision, ema_decay)
        self._graph: Graph | None = graph
        self._rehearsals = 0
        self._inputs: dict[str, Tensor] = {}

    def _execute(self, batch: Batch) -> None:
        if self._graph is None:
            super()._execute(batch)
            return
        self._copy_in(batch)
        if self._rehearsals == _REHEARSALS:
            self._graph.replay()
            return
        self._rehearsals += 1
        reason = self._graph.rehearse(self._work)
        if self._rehearsals < _REHEARSALS:
            return
        if reason is None:
            self._graph.capture(self._work)
        else:
            log.warning("engine graph: the step cannot be captured (%s): using eager", reason)
            self._graph, self._inputs = None, {}

    def _work(self) -> None:
        super()._execute(self._inputs)

    def _copy_in(self, batch: Batch) -> None:
        if not self._inputs:
            self._inputs = {name: torch.empty_like(value) for name, value in batch.items()}
        for name, into in self._inputs.items():
            value = batch[name]
            if value.shape != into.shape or value.dtype != into.dtype:
                raise ValueError(
                    f"batch[{name!r}] must be {into.dtype} {list(into.shape)} at every step, "
                    f"got {value.dtype} {list(value.shape)}"
                )
            into.copy_(value, non_blocking=True)


class CudaGraph:
    """A `Graph` of CUDA kernels, captured on a stream of its own and replayed on the caller's.

    Random numbers of the device's default generator are drawn anew at each replay, the same ones
    as without a graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, work: Callable[[], None]) -> str | None:
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with torch.cuda.stream(self._stream), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        caller.wait_stream(self._stream)
        reason = None
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                reason = f"{warning.filename}:{warning.lineno} waits for the device"
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        return reason

    def capture(self, work: Callable[[], None]) -> None:
        """As in `Graph`.

        Raises:
            TrainingError: something else than a wait cannot be captured; PyTorch does not recover
                from that, so neither does the training.
        """
        try:
            # Other threads, such as the one that pins the next batch, may go on meanwhile.
            with torch.cuda.graph(
                self._graph, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except RuntimeError as error:
            cause = error.__context__ or error  # what ended the capture; its end then fails as well
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).partition("\n")[0]
            raise TrainingError(
                f"the step cannot be captured in a CUDA graph ({reason}); --engine eager trains it"
            ) from error

    def replay(self) -> None:
        self._graph.replay()
