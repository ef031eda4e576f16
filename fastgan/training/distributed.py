"""Several processes that share one training, one per GPU, as torchrun starts them.

Each process has its part of every batch; after the backward of a phase the gradients are replaced
by their mean over all processes, so that every process makes the same update to the same weights.

That exchange is explicit, one all-reduce of one flat tensor per phase, and not
``DistributedDataParallel``: a recipe calls several networks, some of them more than once and some
frozen, before one backward, where that wrapper expects one forward of one module. What is explicit
also works unchanged under accumulation, ``torch.compile`` and captured graphs (it happens between
them), and the losses travel along, so that all processes see the same mean and stop together where
it is not finite. What is given up is the overlap of the exchange with the backward:
``docs/scaling.md`` says what it can cost.

Tensors on GPUs go through NCCL. What concerns the host (signals, checkpoints, messages) goes
through gloo, whose connections break as soon as a process dies.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastgan.device import choose_device
from fastgan.training.guards import TrainingError

_TIMEOUT = datetime.timedelta(minutes=10)  # for a machine that vanished; a dead process is noticed
_LAST_WORDS = 5.0  # seconds that the others have to say that they are alive, or why not


class LostContact(TrainingError):
    """An exchange failed, most likely because another process has ended."""


class World:
    """The processes that share a training; without arguments, this process alone.

    Every method but `gather` returns the same in all processes and has to be called by all.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank = rank
        self.size = size
        self._store = store

    def average(self, values: Tensor) -> None:
        """Replaces `values` by their mean over the processes, on the device and without waiting."""
        if self.size == 1:
            return
        with _contact():
            dist.all_reduce(values)
        values.div_(self.size)

    def highest(self, value: int) -> int:
        """The highest `value` of any process."""
        if self.size == 1:
            return value
        highest = torch.tensor(value)
        with _contact():
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives `tensors`, contiguous, the values that they have in the first process."""
        if self.size == 1:
            return
        with _contact(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def share(self, text: str) -> str:
        """The `text` of the first process."""
        if self.size == 1:
            return text
        data = _to_tensor(encode(text))
        length = torch.tensor(len(data))
        with _contact():
            dist.broadcast(length, 0)
            if self.rank != 0:
                data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, 0)
        return decode(data.numpy().tobytes())

    def gather(self, data: bytes) -> list[bytes]:
        """In the first process the `data` of each, in their order; nothing in the others."""
        if self.size == 1:
            return [data]
        with _contact():
            if self.rank != 0:
                dist.send(torch.tensor(len(data)), 0)
                dist.send(_to_tensor(data), 0)
                return []
            gathered = [data]
            for rank in range(1, self.size):
                length = torch.tensor(0)
                dist.recv(length, rank)
                received = torch.empty(int(length), dtype=torch.uint8)
                dist.recv(received, rank)
                gathered.append(received.numpy().tobytes())
        return gathered

    @contextlib.contextmanager
    def together(self, what_is_left: Callable[[], str]) -> Iterator[None]:
        """Ends with the others: says why when this process ends, finds out why another one did.

        Raises:
            TrainingError: another process ended; its reason or, where it had no time to give one,
                its rank and `what_is_left`.
        """
        try:
            yield
        except LostContact as error:
            raise TrainingError(self._reason(error, what_is_left())) from None
        except BaseException as error:
            if self._store is not None:
                reason = cast(str, encode(str(error) or repr(error)))  # a store takes bytes as well
                with contextlib.suppress(RuntimeError):
                    self._store.set(f"ended/{self.rank}", reason)
            raise

    def _reason(self, error: LostContact, left: str) -> str:
        """Why contact was lost, as far as the others have said."""
        assert self._store is not None
        silent = set(range(self.size)) - {self.rank}
        until = time.monotonic() + _LAST_WORDS
        with contextlib.suppress(RuntimeError):  # torchrun may be gone as well
            self._store.set(f"alive/{self.rank}", "")
            while silent and time.monotonic() < until:
                for rank in sorted(silent):
                    if self._store.check([f"ended/{rank}"]):
                        return decode(self._store.get(f"ended/{rank}"))
                    if self._store.check([f"alive/{rank}"]):
                        silent.remove(rank)
                time.sleep(0.05)
        if not silent:
            return f"{error}; {left}"
        ranks = ", ".join(map(str, sorted(silent)))
        return (
            f"rank {ranks} of {self.size} processes ended without a word, as when killed; {left}, "
            "--resume goes on from there"
        )


class Exchange:
    """A flat tensor of gradients and losses, which travel together.

    Args:
        parameters: those with a gradient.
        losses: of the length that all later ones have.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], losses: Tensor) -> None:
        dtype = functools.reduce(torch.promote_types, {p.dtype for p in parameters}, losses.dtype)
        count = sum(parameter.numel() for parameter in parameters)
        self._parameters = list(parameters)
        self._flat = losses.new_empty(count + losses.numel(), dtype=dtype)
        *parts, self._losses = self._flat.split([*(p.numel() for p in parameters), losses.numel()])
        self._gradients = [  # in the layout of their parameters
            part.as_strided(parameter.shape, parameter.stride())
            for part, parameter in zip(parts, parameters, strict=True)
        ]

    @torch.no_grad()
    def pack(self, losses: Tensor) -> Tensor:
        """The parameters' gradients and `losses`, flat."""
        torch._foreach_copy_(self._gradients, self._own_gradients())
        self._losses.copy_(losses)
        return self._flat

    @torch.no_grad()
    def unpack(self) -> Tensor:
        """Puts the gradients back where they came from; the losses."""
        torch._foreach_copy_(self._own_gradients(), self._gradients)
        return self._losses

    def _own_gradients(self) -> list[Tensor]:
        return [cast(Tensor, parameter.grad) for parameter in self._parameters]


def join_world(device: torch.device) -> World:
    """The processes that torchrun has started with this one; alone where it was not torchrun's.

    Begins a process group, unless there is one, and leaves it be: `leave_world` ends it.

    Args:
        device: this process's own, see `own_device`.
    """
    if _size() == 1:
        return World()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store(),
            rank=launched_rank(),
            world_size=_size(),
            timeout=_TIMEOUT,
        )
    return World(dist.get_rank(), dist.get_world_size(), _store())


def leave_world() -> None:
    """Ends the process group at the end of a training that went well."""
    if _size() > 1 and dist.is_initialized():
        dist.destroy_process_group()


def launched_rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if _size() > 1 else 0


def own_device(requested: str | None) -> torch.device:
    """`choose_device`, with a GPU for each of the processes of this machine.

    Raises:
        ValueError: there is no such device, or there are not enough of them.
    """
    if _size() == 1:
        return choose_device(requested)
    kind = requested or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise ValueError(
            f"device: {_size()} processes train on cuda, each on a GPU of its own, or on cpu; "
            f"got {requested!r}"
        )
    if kind == "cuda" and torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"device: no GPU is left for process {local} of this machine, which has {gpus}: "
                f"torchrun --nproc_per_node={gpus}"
            )
        kind = f"cuda:{local}"
    return choose_device(kind)


def say_once(message: str, say: Callable[[str], None]) -> None:
    """Lets one of the processes that have this `message` say it; the others wait until it has.

    The first process to end would take the others with it, silent as they were.
    """
    if _size() == 1:
        say(message)
        return
    key = f"said/{hashlib.sha256(encode(message)).hexdigest()}"
    try:
        first = _store().add(key, 1) == 1
        if not first:
            _store().wait([f"{key}/done"], datetime.timedelta(seconds=_LAST_WORDS))
    except RuntimeError:  # nobody answers any more
        first = True
    if first:
        say(message)
        with contextlib.suppress(RuntimeError):
            _store().set(f"{key}/done", "")


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """What is printed here the first process prints, and what ends it here ends it first."""
    if _size() == 1:
        yield
    elif launched_rank() == 0:
        try:
            yield
        finally:
            _store().set("spoken", "")
    else:
        nowhere = io.StringIO()
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        except SystemExit:
            with contextlib.suppress(RuntimeError):
                _store().wait(["spoken"], datetime.timedelta(seconds=_LAST_WORDS))
            raise


def encode(text: str) -> bytes:
    """`text` to be sent; it may name files, and a file's name need not be UTF-8."""
    return text.encode(errors="surrogateescape")


def decode(data: bytes) -> str:
    """Inverse of `encode`."""
    return data.decode(errors="surrogateescape")


def _size() -> int:
    """The number of processes that torchrun started; 1 without it, whatever else a cluster sets."""
    launched = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ.get("WORLD_SIZE", "1")) if launched else 1


@functools.cache
def _store() -> Store:
    """What all processes can write to and read from, kept by torchrun.

    It outlives processes that torchrun starts anew, who must not find the addresses of the dead.
    """
    store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
    return PrefixStore(f"fastgan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Not every error here is one of the exchange: PyTorch raises where it happens to be when
        # one of the processes that read pictures dies.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise LostContact(f"the processes lost contact ({reason})") from error
