"""Unpaired pictures for training: an endless stream of batches, each a function of its number.

Which picture is read, how it is cropped and what replaces a file that cannot be read depend on the
seed and on the position in the stream alone. So a batch is the same whatever the number of workers,
a resumed run sees the batches it would have seen, and N processes share the batch of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import multiprocessing.connection
import os
import sys
import traceback
from collections.abc import Generator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, get_worker_info

try:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F
except ImportError as error:
    raise ImportError("fastgan.training needs torchvision: pip install 'fastgan[train]'") from error

from fastgan.images import ImageError, find_images, load_image, no_pictures

__all__ = ["Augmentation", "PictureStream", "ReaderError"]

log = logging.getLogger(__name__)

_MAX_ASPECT = 8  # a longer strip is cut to its middle, lest scaling it up fill the memory
_PREFETCH = 4  # batches per worker
_SHARED_FILE = "</torch_"  # how PyTorch's errors name a file in /dev/shm

_ORDER, _AUGMENT = range(2)  # what the random numbers of a stream are drawn for


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What becomes of a picture on its way into a batch."""

    size: int = 256
    """Side of the square crop, in pixels."""
    resize: int | None = None
    """Shorter side before the random crop, in pixels; None: size."""
    flip: bool = True
    """Mirror half of the pictures."""
    rotate: float = 0.0
    """Turn by up to so many degrees either way; zooms in where corners would stay empty."""
    jitter: float = 0.0
    """Change brightness, contrast and saturation by random factors in [1 - jitter, 1 + jitter]."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(
                f"resize must be at least the size {self.size}, got {self.resize}; give both"
            )
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate must be in [0, 180] degrees, got {self.rotate}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be in [0, 1], got {self.jitter}")

    @property
    def shorter_side(self) -> int:
        return self.resize or self.size

    def __call__(self, picture: Tensor, random: np.random.Generator) -> Tensor:
        """Random square of `picture` (uint8 [3,H,W], both sides at least `size`).

        Takes the same numbers from `random` whatever is switched on, so that one setting does not
        change the effect of the others.
        """
        turn, top, left, mirror, *factors = random.random(7)
        angle = self.rotate * (2 * turn - 1)
        side = self.size
        if self.rotate:
            radians = math.radians(angle)
            side = math.ceil(side * (abs(math.cos(radians)) + abs(math.sin(radians))))
            side += 2  # what is interpolated at the corners
            if min(picture.shape[1:]) < side:
                picture = _resize(picture, side)
        _, height, width = picture.shape
        top, left = int(top * (height - side + 1)), int(left * (width - side + 1))
        picture = F.crop(picture, top, left, side, side)
        if self.rotate:
            picture = F.rotate(picture, angle, interpolation=InterpolationMode.BILINEAR)
            picture = F.center_crop(picture, [self.size, self.size])
        if self.flip and mirror < 0.5:
            picture = F.horizontal_flip(picture)
        if self.jitter:
            brightness, contrast, saturation = (1 + self.jitter * (2 * f - 1) for f in factors)
            picture = F.adjust_brightness(picture, brightness)
            picture = F.adjust_contrast(picture, contrast)
            picture = F.adjust_saturation(picture, saturation)
        return picture


class ReadBatch(NamedTuple):
    """The pictures of one step."""

    images: dict[str, Tensor]
    """By domain: uint8 [B,3,size,size], channels_last."""
    paths: list[Path]
    """The files they were read from, domain after domain."""


class PictureStream:
    """Batches of random crops from one folder per domain, unpaired, without end.

    Each domain runs through its own shuffled files, each epoch in another order. A file that is no
    readable picture is named in a warning and replaced by the one after it in the folder.

    Args:
        folders: by domain; read with everything below them. A file stands for a folder of one.
        augmentation: how crops are made.
        batch_size: pictures of each domain per batch and process.
        seed: decides order and crops; at least 0.
        workers: processes that read pictures; with 0 this process does.
        strict: raise at a file that is no readable picture.
        rank, world_size: this process's share: part number `rank` of each global batch of
            ``world_size * batch_size``.
        pin_memory: put batches in page-locked memory, for copies to a GPU that nobody waits for.
        cache_mb: memory for decoded pictures, in megabytes for all workers together.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: a folder holds no readable picture.
        ImageError: a file of the first batch is no readable picture, under `strict`.
    """

    def __init__(
        self,
        folders: Mapping[str, str | os.PathLike[str]],
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        strict: bool = False,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        cache_mb: int = 512,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.unreadable: dict[Path, str] = {}
        """Files that were skipped so far, with the reason."""
        self._said_small = False
        self._strict = strict
        self._workers = workers
        self._pin_memory = pin_memory
        self._folders = {domain: Path(folder) for domain, folder in folders.items()}
        loader = _Loader(augmentation, cache_mb * 2**20 // max(1, workers))
        self._domains = {
            domain: _Domain(folder, (seed, number), augmentation, loader)
            for number, (domain, folder) in enumerate(self._folders.items())
        }
        self.folders_state = {
            domain: {"pictures": len(own.paths), "names": _hash(own.paths, self._folders[domain])}
            for domain, own in self._domains.items()
        }
        """By domain: how many pictures its folder holds, and a hash of their names in order."""
        self._reader = _Reader(self._domains, loader, batch_size, rank, world_size)
        self.batch(0)  # what nobody can train on is found here, not in a worker

    @property
    def steps_per_epoch(self) -> int:
        """Batches until every picture of the largest domain has been seen."""
        largest = max(len(domain.paths) for domain in self._domains.values())
        return math.ceil(largest / self._reader.global_batch)

    def batches(self, start: int = 0) -> Generator[ReadBatch]:
        """The batches from number `start` on, without end.

        Workers live from the first batch until the generator is closed or raises. Draws nothing
        from torch's global random numbers.

        Raises:
            ImageError: a file is no readable picture, under `strict`.
            ValueError: a folder no longer holds a readable picture.
            ReaderError: a worker was killed, or could not be started or pass on what it read.
        """
        loader = DataLoader(
            self._reader,
            batch_size=None,  # items are batches already
            sampler=itertools.count(start),
            num_workers=self._workers,
            # Whatever Python prefers: other ways import PyTorch anew in every worker.
            multiprocessing_context="fork" if self._workers and sys.platform == "linux" else None,
            prefetch_factor=_PREFETCH if self._workers else None,
            pin_memory=self._pin_memory,
            worker_init_fn=_shield_from_signals,
            generator=torch.Generator(),
        )
        with contextlib.closing(_reads(loader)) as reads:
            for read in reads:
                yield self._checked(read)

    def batch(self, number: int) -> ReadBatch:
        """One batch, read by this process. Raises as `batches` does."""
        return self._checked(self._reader[number])

    def summary(self) -> str:
        """One line: how many files there are, and how many of them were skipped as unreadable."""
        counts = [
            f"{domain}: {len(self._domains[domain].paths)} pictures in {folder}"
            for domain, folder in self._folders.items()
        ]
        if self.unreadable:
            counts.append(f"{len(self.unreadable)} unreadable files skipped")
        return "; ".join(counts)

    def _checked(self, read: _Read) -> ReadBatch:
        for path, reason in read.unreadable.items():
            if self._strict:
                raise ImageError(path, reason)
            if path not in self.unreadable:
                log.warning("skipped, no readable picture: %s: %s", path, reason)
                self.unreadable[path] = reason
        if read.small and not self._said_small:
            log.warning("%s; pictures like it are scaled up (said once)", read.small)
            self._said_small = True
        if read.exhausted:
            folder = self._folders[read.exhausted]
            if not find_images(folder):
                raise ValueError(f"{read.exhausted}: {no_pictures(folder)}")
            raise ValueError(f"{read.exhausted}: no readable picture in {folder}")
        paths = [
            self._domains[domain].paths[index]
            for domain, indices in read.indices.items()
            for index in indices
        ]
        return ReadBatch(read.images, paths)


class ReaderError(RuntimeError):
    """A process that reads pictures was killed, or could not be started or pass on what it read."""


def _reads(loader: DataLoader[_Read]) -> Generator[_Read]:
    """What `loader` reads. Its workers end with the generator and interrupt nothing before.

    By itself PyTorch raises wherever the main thread happens to be when a worker dies, even after
    the last read; here the read that misses it raises, 5 seconds after the last batch arrived. And
    PyTorch ends workers with the last reference to them, which a traceback can hold for long.
    """
    if not loader.num_workers:
        yield from loader
        return
    iterator: Any = None
    try:
        iterator = iter(loader)
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        while True:
            yield next(iterator)
    except (RuntimeError, OSError, EOFError) as error:
        if iterator is None:
            traceback.clear_frames(error.__traceback__)  # which hold the workers that did start
        if _is_of_reader(error):
            raise
        workers = [] if iterator is None else iterator._workers
        raise ReaderError(
            f"{_failure(error, workers)}; these help: fewer workers (0 reads in the training "
            "process), more shared memory (docker run --shm-size=1g), more open files (ulimit -n)"
        ) from error
    finally:
        if iterator is not None:
            iterator._shutdown_workers()


def _is_of_reader(error: Exception) -> bool:
    """Whether the code in a worker raised it, or the GPU, not the machinery between processes."""
    text = str(error)
    raised = text.startswith("Caught ") and _SHARED_FILE not in text
    return raised or isinstance(error, torch.AcceleratorError)


def _failure(error: Exception, workers: Sequence[BaseProcess]) -> str:
    lines = str(error).strip(" .\n").splitlines() or [type(error).__name__]
    if _SHARED_FILE in lines[-1]:
        return f"shared memory could not take the pictures that were read ({lines[-1]})"
    # The connection to one just killed can break before its end is seen, and that before its code.
    sentinels = [worker.sentinel for worker in workers]
    ended = multiprocessing.connection.wait(sentinels, timeout=1)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(timeout=1)
        if code := worker.exitcode:
            how = f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})"
            return f"a process that reads pictures {how}"
    return f"the processes that read pictures failed ({lines[0]})"


class _Read(NamedTuple):
    """What a worker has to say; only the training process warns and raises.

    Small when pickled, with indices instead of paths: a worker killed between two writes to the
    pipe would leave the training process waiting for the second. One takes hundreds of pictures.
    """

    images: dict[str, Tensor]
    indices: dict[str, list[int]]
    """By domain: which of its `paths` the images are from."""
    unreadable: dict[Path, str]
    small: str | None
    """The first picture smaller than the crop, if there was one."""
    exhausted: str | None
    """Domain that has no readable picture; its images are missing from the batch."""


class _Reader(Dataset[_Read]):
    """Batch number -> this process's part of it. Runs in the workers."""

    def __init__(
        self,
        domains: Mapping[str, _Domain],
        loader: _Loader,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.global_batch = batch_size * world_size
        self._domains = domains
        self._loader = loader
        self._part = range(rank * batch_size, (rank + 1) * batch_size)

    def __getitem__(self, number: int) -> _Read:
        images: dict[str, Tensor] = {}
        indices: dict[str, list[int]] = {}
        exhausted = None
        for name, domain in self._domains.items():
            crops = []
            indices[name] = []
            for offset in self._part:
                sample = domain.sample(number * self.global_batch + offset)
                if sample is None:
                    exhausted = name
                    break
                crop, index = sample
                crops.append(crop.permute(1, 2, 0))
                indices[name].append(index)
            else:
                images[name] = torch.stack(crops).permute(0, 3, 1, 2)
                if get_worker_info() is not None:
                    images[name].share_memory_()  # raises; left to the queue, all would hang
        return _Read(images, indices, *self._loader.take_notes(), exhausted)


class _Domain:
    """Position in the stream -> crop, for the files of one folder."""

    def __init__(
        self, folder: Path, key: tuple[int, ...], augmentation: Augmentation, loader: _Loader
    ) -> None:
        self.paths = find_images(folder)
        self._key = key
        self._augmentation = augmentation
        self._loader = loader
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def sample(self, position: int) -> tuple[Tensor, int] | None:
        """Crop, uint8 [3,size,size], and its index in `paths`; None if no file is readable."""
        if not self.paths:
            return None
        epoch, place = divmod(position, len(self.paths))
        if self._order[0] != epoch:
            order = np.random.default_rng((*self._key, _ORDER, epoch)).permutation(len(self.paths))
            self._order = (epoch, order)
        first = int(self._order[1][place])
        for step in range(len(self.paths)):
            index = (first + step) % len(self.paths)
            picture = self._loader(self.paths[index])
            if picture is not None:
                random = np.random.default_rng((*self._key, _AUGMENT, position))
                return self._augmentation(picture, random), index
        return None


class _Loader:
    """File -> scaled picture; keeps the first pictures that fit in `cache_bytes`, and the errors.

    Nothing is ever evicted: shuffled epochs visit every file equally often, so what is in the cache
    is as good as what is not.
    """

    def __init__(self, augmentation: Augmentation, cache_bytes: int) -> None:
        self._augmentation = augmentation
        self._room = cache_bytes
        self._pictures: dict[Path, Tensor] = {}
        self._unreadable: dict[Path, str] = {}
        self._small: str | None = None
        self._noted = 0

    def __call__(self, path: Path) -> Tensor | None:
        if path in self._pictures:
            return self._pictures[path]
        if path in self._unreadable:
            return None
        try:
            picture = load_image(path, min_side=self._augmentation.shorter_side)
        except ImageError as error:
            self._unreadable[path] = error.reason
            return None
        _, height, width = picture.shape
        if self._small is None and min(height, width) < self._augmentation.size:
            size = self._augmentation.size
            self._small = f"{path} ({width} x {height}) is smaller than the crop of {size} px"
        picture = _resize(_cut(picture), self._augmentation.shorter_side)
        if picture.nbytes <= self._room:
            self._room -= picture.nbytes
            self._pictures[path] = picture
        return picture

    def take_notes(self) -> tuple[dict[Path, str], str | None]:
        """The files found unreadable since the last call; the first picture that was small."""
        new = dict(itertools.islice(self._unreadable.items(), self._noted, None))
        self._noted = len(self._unreadable)
        return new, self._small


def changed_folders(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``domain: how its pictures differ; what that changes``, of two `folders_state`."""
    changed = []
    for domain, folder in now.items():
        old, new = before[domain]["pictures"], folder["pictures"]
        if old != new:
            changed.append(f"{domain}: {old} -> {new} pictures; order and schedule change")
        elif before[domain]["names"] != folder["names"]:
            changed.append(f"{domain}: as many pictures, not the same ones; their order changes")
    return changed


def _hash(paths: Sequence[Path], folder: Path) -> str:
    names = (os.fsencode(path.relative_to(folder)) for path in paths)
    return hashlib.sha256(b"\0".join(names)).hexdigest()


def _cut(picture: Tensor) -> Tensor:
    _, height, width = picture.shape
    longest = _MAX_ASPECT * min(height, width)
    return F.center_crop(picture, [min(height, longest), min(width, longest)])


def _resize(picture: Tensor, shorter_side: int) -> Tensor:
    return F.resize(
        picture, [shorter_side], interpolation=InterpolationMode.BICUBIC, antialias=True
    )


def _shield_from_signals(worker: int) -> None:
    """Ctrl-C and signals to the process group concern training, which still needs its batches."""
    os.setpgid(0, 0)
