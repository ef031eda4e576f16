"""What a person sees of a training run: progress bar, losses, sample grids, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

try:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"fastgan.training needs tensorboard and tqdm: pip install 'fastgan[train]' ({error})"
    ) from error

from fastgan.checkpoint import replace_file
from fastgan.images import to_uint8
from fastgan.run_folder import RunFolder
from fastgan.training.guards import write_errors

log = logging.getLogger(__name__)

_TITLE_HEIGHT = 16  # pixels; PIL's built-in font is 11 high


class Reporter:
    """Writes losses, sample grids and TensorBoard events of a run; moves its progress bar.

    Pictures are encoded and written by a thread of its own, so that training does not wait.
    """

    def __init__(self, run: RunFolder, *, start: int, steps: int, progress: bool) -> None:
        self._run = run
        _keep_lines_until(run.losses, start)
        with write_errors(run.tensorboard):
            self._board = SummaryWriter(str(run.tensorboard), purge_step=start + 1)
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file keeps every line
            disable=not progress,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._writing: Future[None] | None = None
        self._clock = Clock(start)

    def step(self) -> None:
        """One step was started."""
        self._bar.update()

    def log(
        self,
        step: int,
        losses: Mapping[str, float],
        others: Mapping[str, float],
        pictures_per_step: int,
    ) -> None:
        """Both are means over the steps since the last call; the bar shows the losses alone."""
        speed = self._clock.lap(step) * pictures_per_step
        values = {**losses, **others, "images_per_second": speed}
        numbers = {n: v if math.isfinite(v) else None for n, v in values.items()}
        with write_errors(self._run.losses), self._run.losses.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        with write_errors(self._run.tensorboard):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        shown = " ".join(f"{name.partition('/')[2]} {loss:.3g}" for name, loss in losses.items())
        self._bar.set_postfix_str(f"{speed:.1f} images/s, {shown}", refresh=False)

    def samples(self, step: int, columns: Mapping[str, Tensor]) -> None:
        """Writes the grid of `columns` to the folder and to TensorBoard."""
        on_host = {title: pictures.float().cpu() for title, pictures in columns.items()}
        self._wait()
        self._writing = self._thread.submit(self._write_samples, step, on_host)

    def _write_samples(self, step: int, columns: Mapping[str, Tensor]) -> None:
        picture = grid(columns)
        with write_errors(self._run.sample(step)):
            picture.save(self._run.sample(step))
        with write_errors(self._run.tensorboard):
            self._board.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def pause(self) -> Clock:
        """A context whose time does not count in images per second."""
        return self._clock

    def close(self) -> None:
        """Waits for the pictures; raises what their writing raised."""
        try:
            self._wait()
        finally:
            self._thread.shutdown()
            self._bar.close()
            self._close_board()

    def _close_board(self) -> None:
        try:
            self._board.close()
        except OSError as error:  # a warning, as it must not hide what else ended the training
            reason = error.strerror or error
            log.warning("could not write all of %s: %s", self._run.tensorboard, reason)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


class Silence:
    """In place of a `Reporter` in all processes but the first."""

    def step(self) -> None: ...

    def log(self, *values: object) -> None: ...

    def samples(self, *values: object) -> None: ...

    def pause(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def close(self) -> None: ...


class Clock:
    """Steps per second between laps; entered as a context, it stands still."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._since = time.perf_counter()
        self._entered = 0.0

    def lap(self, step: int) -> float:
        now = time.perf_counter()
        speed = (step - self._step) / max(now - self._since, 1e-9)
        self._step, self._since = step, now
        return speed

    def __enter__(self) -> Clock:
        self._entered = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._since += time.perf_counter() - self._entered


def grid(columns: Mapping[str, Tensor]) -> Image.Image:
    """Pictures [B,3,H,W] in [-1, 1] side by side, one column per title, one row per picture."""
    images = torch.stack(list(columns.values()), 1)  # [B,columns,3,H,W]
    rows, count, _, height, width = images.shape
    table = (
        to_uint8(images.nan_to_num())
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * height, count * width, 3)
    )
    picture = Image.new("RGB", (count * width, rows * height + _TITLE_HEIGHT), "white")
    picture.paste(Image.fromarray(table.numpy()), (0, _TITLE_HEIGHT))
    draw: Any = ImageDraw.Draw(picture)
    for column, title in enumerate(columns):
        draw.text((column * width + 2, 2), title, fill="black")
    return picture


def _keep_lines_until(path: Path, step: int) -> None:
    """Drops the losses of steps that a resumed run will do again, and a half-written line."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
    with write_errors(path):
        replace_file(path, kept.encode())
