"""Faster ways to execute a step than operation by operation, and the choice among them."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgan.device import Precision
from fastgan.recipes import Batch, Recipe
from fastgan.training.distributed import World
from fastgan.training.engine import EagerEngine
from fastgan.training.guards import TrainingError

log = logging.getLogger(__name__)

EngineName: TypeAlias = Literal["eager", "compile", "graph"]
ResultT = TypeVar("ResultT")

_REHEARSALS = 3  # steps before the capture: libraries set themselves up, optimizers their state


def make_engine(
    name: EngineName,
    recipe: Recipe,
    device: torch.device,
    precision: Precision,
    ema_decay: float,
    *,
    world: World | None = None,
    accumulate: int = 1,
    activation_checkpointing: bool = False,
) -> EagerEngine:
    """The engine of that name, or the eager one, with a warning that says why.

    Only a CUDA device has graphs, and none of them restores the states of random number generators
    that activation checkpointing notes. Everything else goes together with everything.
    """
    if activation_checkpointing:
        checkpoint_activations(recipe)
    options: dict[str, Any] = {"world": world, "accumulate": accumulate}
    if name == "compile":
        return CompileEngine(recipe, device, precision, ema_decay, **options)
    if name == "graph" and device.type != "cuda":
        log.warning("engine graph needs a CUDA device and this is %s: using eager", device.type)
    elif name == "graph" and activation_checkpointing:
        log.warning("engine graph cannot capture activation checkpointing: using eager")
    elif name == "graph":
        return GraphEngine(recipe, device, precision, ema_decay, CudaGraph(device), **options)
    return EagerEngine(recipe, device, precision, ema_decay, **options)


def checkpoint_activations(recipe: Recipe) -> None:
    """Lets each network of the generator keep nothing of its activations but its input.

    The backward computes them again, one call of one network at a time, which costs another forward
    of the generator. Random numbers inside a network are drawn again as they were.
    """
    for network in recipe.networks("generator"):
        for part in network.children():
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)


class CompileEngine(EagerEngine):
    """Forward and backward of each phase by ``torch.compile``, which fuses what fastgan does not.

    A forward that cannot be compiled (no compiler, a recipe that TorchDynamo cannot follow as a
    whole) runs as in the eager engine, after a warning that says why. Its backward is compiled when
    it is first needed; an error there ends the training.
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
    """Records the work of one step, piece after piece, and does it again; a recorded step depends
    on its tensors' storages and what they hold, on nothing else."""

    def rehearse(self, work: Callable[[], None]) -> str | None:
        """Do `work` as it will be recorded; the reason why it cannot be, None if it can."""

    def capture(self, work: Callable[[], ResultT]) -> ResultT:
        """Record `work`, the next piece; its result. No tensor that exists is changed."""

    def replay(self, piece: int = 0) -> None:
        """Do what was recorded as number `piece`; pieces come in their order."""


class GraphEngine(EagerEngine):
    """The whole step captured once and replayed, which spares the host every single launch.

    Of several processes each captures its pieces of the step; what they exchange between two pieces
    is no part of a graph.

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
        **options: Any,
    ) -> None:
        super().__init__(recipe, device, precision, ema_decay, **options)
        self._graph: Graph | None = graph
        self._rehearsals = 0
        self._shared: list[Tensor] = []
        self._inputs: dict[str, Tensor] = {}

    def _execute(self, batch: Batch) -> None:
        if self._graph is None:
            super()._execute(batch)
            return
        self._copy_in(batch)
        if self._rehearsals == _REHEARSALS:
            self._replay(self._graph)
            return
        self._rehearsals += 1
        reason = self._graph.rehearse(lambda: super(GraphEngine, self)._execute(self._inputs))
        if self._rehearsals < _REHEARSALS:
            return
        if reason is None:
            self._capture(self._graph)
        else:
            log.warning("engine graph: the step cannot be captured (%s): using eager", reason)
            self._graph, self._inputs = None, {}

    def _capture(self, graph: Graph) -> None:
        pieces = self._pieces(self._inputs)
        while (shared := graph.capture(lambda: next(pieces, None))) is not None:
            self._shared.append(shared)

    def _replay(self, graph: Graph) -> None:
        graph.replay()
        for piece, shared in enumerate(self._shared, 1):
            self.world.average(shared)
            graph.replay(piece)

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

    Each piece is a CUDA graph; they share their memory.

    Random numbers of the device's default generator are drawn anew at each replay, the same ones
    as without a graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._pieces: list[torch.cuda.CUDAGraph] = []
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, work: Callable[[], None]) -> str | None:
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(self._stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            caught.clear()  # of PyTorch's word that this mode is a prototype
            try:
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

    def capture(self, work: Callable[[], ResultT]) -> ResultT:
        """As in `Graph`.

        Raises:
            TrainingError: something else than a wait cannot be captured; PyTorch does not recover
                from that, so neither does the training.
        """
        piece = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as the one that pins the next batch, may go on meanwhile.
            with torch.cuda.graph(
                piece, self._memory, self._stream, capture_error_mode="thread_local"
            ):
                result = work()
        except RuntimeError as error:
            cause = error.__context__ or error  # what ended the capture; its end then fails as well
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).partition("\n")[0]
            raise TrainingError(
                f"the step cannot be captured in a CUDA graph ({reason}); --engine eager trains it"
            ) from error
        self._pieces.append(piece)
        return result

    def replay(self, piece: int = 0) -> None:
        self._pieces[piece].replay()
