"""The folder of a run: what lies where, and what may be written over."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

_CHECKPOINT = re.compile(r"step_(\d+)\.safetensors")


class RunFolder:
    """``config.json``, ``checkpoints/step_<N>.safetensors``, ``latest.safetensors`` and reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.latest = path / "latest.safetensors"
        self._checkpoints = path / "checkpoints"

    def holds_run(self) -> bool:
        return self.config.exists() or bool(self.checkpoints())

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

    def make(self) -> None:
        """Makes what is missing of the folder, which must be writable.

        Raises:
            ValueError: it cannot be made or written to.
        """
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise ValueError(
                f"out: cannot write to {self.path}: {error.strerror or error}"
            ) from None

    def clear(self) -> None:
        """Deletes the run that the folder holds, and nothing else."""
        for path in (self._checkpoints, self.path / "samples"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (
            self.config,
            self.latest,
            self.path / "losses.jsonl",
            *self.path.glob("events.out.tfevents.*"),
        ):
            path.unlink(missing_ok=True)

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        return next(reversed(self.checkpoints()), None)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` updates goes."""
        return self._checkpoints / f"step_{step:08d}.safetensors"

    def point_to(self, checkpoint: Path, keep: int) -> None:
        """Makes ``latest.safetensors`` a link to `checkpoint`; all but the newest `keep` go."""
        link = self.path / "latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(checkpoint, self.path))
        link.replace(self.latest)
        if keep:
            for old in self.checkpoints()[:-keep]:
                old.unlink()
