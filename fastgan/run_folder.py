"""The folder of a run: what lies where, and what may be written over."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

_LATEST = "latest.safetensors"
_CHECKPOINT = re.compile(r"step_(\d+)\.safetensors")


class RunFolder:
    """What training writes and inference finds.

    ``run.json`` (recipe and settings), ``checkpoints/step_<N>.safetensors``, ``latest.safetensors``
    (a link), ``losses.jsonl``, ``samples/step_<N>.png``, ``tensorboard/``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "run.json"
        self.losses = path / "losses.jsonl"
        self.tensorboard = path / "tensorboard"
        self._checkpoints = path / "checkpoints"
        self._samples = path / "samples"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` updates goes."""
        return self._checkpoints / f"step_{step:08d}.safetensors"

    def sample(self, step: int) -> Path:
        """Where the sample grid after `step` updates goes."""
        return self._samples / f"step_{step:08d}.png"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, the oldest first."""
        if not self._checkpoints.is_dir():
            return []
        steps = {
            int(match[1]): path
            for path in self._checkpoints.iterdir()
            if (match := _CHECKPOINT.fullmatch(path.name))
        }
        return [steps[step] for step in sorted(steps)]

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        return next(reversed(self.checkpoints()), None)

    def holds_run(self) -> bool:
        return self.settings.exists() or bool(self.checkpoints())

    def make(self) -> None:
        """Makes what is missing of the folder, which must be writable.

        Raises:
            ValueError: it cannot be made or written to, or not by TensorBoard.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"out: TensorBoard needs a name in UTF-8, got {self.path}") from None
        try:
            for folder in (self._checkpoints, self._samples):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise ValueError(
                f"out: cannot write to {self.path}: {error.strerror or error}"
            ) from None

    def clear(self) -> None:
        """Deletes the run that the folder holds, and nothing else."""
        for path in (
            self.settings,
            self.losses,
            self.path / _LATEST,
            *self._checkpoints.glob("step_*.safetensors*"),
            *self._samples.glob("step_*.png"),
            *self.tensorboard.glob("events.out.tfevents.*"),
        ):
            path.unlink(missing_ok=True)

    def saved(self, checkpoint: Path, keep: int) -> None:
        """Links ``latest.safetensors`` to `checkpoint`, deletes all but the newest `keep`."""
        link = self.path / (_LATEST + ".tmp")
        with contextlib.suppress(OSError):  # some file systems have no links
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(checkpoint, self.path))
            link.replace(self.path / _LATEST)
        if keep:
            for old in self.checkpoints()[:-keep]:
                old.unlink()
