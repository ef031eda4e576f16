"""What stands in for a CUDA graph where there is no GPU: operations recorded and done again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ResultT = TypeVar("ResultT")

# The last makes a tensor of numbers in Python: on a GPU, a copy that the host waits for.
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::lift_fresh")


class SyncWatch(TorchDispatchMode):
    """Notes the operations that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in _WAITS:
            self.waits.append(func.name())
        return func(*args, **(kwargs or {}))


class RecordedGraph:
    """Behaves as a CUDA graph does, on a CPU (see `fastgan.training.engines.Graph`).

    A capture leaves no trace, but for tensors that it made: those hold NaN. A replay knows nothing
    of Python, only the storages that the recorded operations read and wrote.
    """

    def __init__(self) -> None:
        self._pieces: list[list[tuple[Any, Any, Any, list[Tensor | None]]]] = []
        self.replays = 0

    def rehearse(self, work: Callable[[], None]) -> str | None:
        with SyncWatch() as watch:
            work()
        return f"{watch.waits[0]} waits for the device" if watch.waits else None

    def capture(self, work: Callable[[], ResultT]) -> ResultT:
        random = torch.get_rng_state()
        with _Recorder() as recorder:
            result = work()
        torch.set_rng_state(random)
        for storage, content in recorder.found.values():
            storage.copy_(content)
        self._pieces.append(recorder.calls)
        for *_, made in recorder.calls:
            for tensor in made:
                if tensor is not None and tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        return result

    @torch.no_grad()
    def replay(self, piece: int = 0) -> None:
        self.replays += 1
        for func, args, kwargs, made in self._pieces[piece]:
            for result, recorded in zip(tree_leaves(func(*args, **kwargs)), made, strict=True):
                if recorded is not None:
                    recorded.copy_(result)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        """Operation, its arguments, and its results where they are in storages of their own."""
        self.found: dict[int, tuple[Any, Any]] = {}
        """Storages that were there before, with what they held."""
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in _WAITS:
            raise RuntimeError(f"{func.name()} during the capture")
        # Aliases, so that what Python does to a tensor later (its requires_grad) matters no more.
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        given = {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                given[storage.data_ptr()] = storage
        for pointer in given.keys() - self._made - self.found.keys():
            self.found[pointer] = (given[pointer], given[pointer].clone())
        results = func(*args, **kwargs)
        made: list[Tensor | None] = []
        for result in tree_leaves(results):
            own = isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given
            made.append(result.detach() if own else None)
            if own:
                self._made.add(result.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs, made))
        return results
