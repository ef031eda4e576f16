"""Folders of small pictures for tests, and the processes that read them."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image

from fastgan.training.config import Pictures


def write_pictures(root: Path, count: int = 5, workers: int = 0) -> Pictures:
    """`count` noisy gradients of different sizes below ``root/content`` and ``root/style``."""
    write_folders(root, ("content", "style"), count)
    return Pictures(root / "content", root / "style", workers=workers)


def write_folders(root: Path, names: Sequence[str], count: int = 5) -> None:
    """`count` noisy gradients of different sizes in each of the folders below `root`."""
    rng = np.random.default_rng(0)
    for domain in names:
        (root / domain).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            height, width = 50 + number, 60 - number
            ramp = np.linspace(0, 200, width)[None, :, None] * rng.random((1, 1, 3))
            pixels = ramp + rng.integers(0, 55, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / domain / f"{number}.png")


@contextlib.contextmanager
def all_workers_end() -> Iterator[Callable[[], set[BaseProcess]]]:
    """Gives the workers there are; afterwards there are none."""
    others = set(multiprocessing.active_children())
    yield lambda: set(multiprocessing.active_children()) - others
    assert set(multiprocessing.active_children()) <= others
