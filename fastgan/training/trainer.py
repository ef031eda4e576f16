"""The training loop, the same for every recipe."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastgan
from fastgan import checkpoint
from fastgan.device import choose_precision, use_deterministic_algorithms
from fastgan.images import to_float
from fastgan.recipes import Batch, Recipe
from fastgan.recipes.serialize import to_json
from fastgan.run_folder import RunFolder
from fastgan.training.config import (
    TrainConfig,
    changed_fields,
    config_from_json,
    with_absolute_folders,
)
from fastgan.training.data import PictureStream, ReaderError, changed_folders
from fastgan.training.distributed import decode, encode, join_world, own_device
from fastgan.training.engines import make_engine
from fastgan.training.guards import (
    StopSignals,
    TrainingError,
    TrainingInterrupted,
    memory_errors,
    quiet_threads,
    write_errors,
)
from fastgan.training.reporting import Reporter, Silence
from fastgan.training.state import engine_state, restore_engine, restore_rng, rng_state

log = logging.getLogger(__name__)

_SAMPLE_ROWS = 6
_SMALLEST_SCALE = 2.0**-14  # of a GradScaler: gradients that overflow even here are not finite


class Trainer:
    """Trains `recipe` as `config` says and leaves the result in ``config.output.out``.

    The constructor refuses what can be refused and makes the folder, no more; `train` does the
    work. Both set the global random number generators, and for ``training.deterministic`` the
    constructor sets PyTorch's switches, for the rest of the process.

    Where torchrun has started several processes, each makes a trainer of its own with the same
    config, and they train together: each on its part of every batch, with a GPU, random numbers and
    an image pool of its own. The first of them writes the files. All must see the same folders,
    and call `leave_world` when `train` has returned.

    Args:
        progress: show a progress bar on standard error.

    Raises:
        ValueError, OSError: the config, its folders or the checkpoint to resume from do not serve;
            one line that says why.
        fastgan.checkpoint.CheckpointError: the checkpoint to resume from cannot be read.
    """

    def __init__(
        self, recipe: type[Recipe], config: TrainConfig, *, progress: bool = False
    ) -> None:
        training = config.training
        self.config = config
        self.folder = RunFolder(config.output.out)
        self.step = 0
        """Updates done."""
        self._progress = progress
        self._device = own_device(training.device)
        self._world = join_world(self._device)
        self._checkpoint: Path | None = None
        with self._world.together(self._last_good):
            self._checkpoint = self._checkpoint_to_resume()
            self._precision = choose_precision(training.precision, self._device)
            self._stream = PictureStream(
                config.pictures.folders,
                config.augmentation,
                batch_size=training.batch_size * training.accumulate,
                seed=training.seed,
                workers=config.pictures.workers,
                strict=config.pictures.strict,
                rank=self._world.rank,
                world_size=self._world.size,
                pin_memory=self._device.type == "cuda",
            )
            if training.deterministic:
                use_deterministic_algorithms()
            _seed(training.seed)
            self.recipe = recipe(config.recipe)
            self._keys = tuple(self.recipe.state_dict())
            self.recipe.begin_training(config.augmentation.size)
            with memory_errors(self._memory_hint()):
                self.recipe.to(self._device)
                self._world.copy_from_first((*self.recipe.parameters(), *self.recipe.buffers()))
                self.recipe.to(memory_format=torch.channels_last)
                self._engine = make_engine(
                    training.engine,
                    self.recipe,
                    self._device,
                    self._precision,
                    training.ema_decay,
                    world=self._world,
                    accumulate=training.accumulate,
                    activation_checkpointing=training.activation_checkpointing,
                )
            self.steps = training.steps or self.recipe.default_steps(self._stream.steps_per_epoch)
            """Updates in all."""
            self._warn_of_idle_steps()
            if self._world.rank > 0:  # the same weights as the first process, other random numbers
                _seed(_derived_seed(training.seed, self._world.rank))
            if self._checkpoint is not None:
                self._restore(self._checkpoint)
            self._rng = rng_state(self._device)
            self._unwatched: dict[int, list[Path]] = {}  # of the steps since the last check
            self._meet()
            if self._first:
                self.folder.make()

    def train(self) -> None:
        """Runs the steps that are left; returns after the last one is saved.

        Raises:
            TrainingInterrupted: SIGINT or SIGTERM came; the state was saved.
            TrainingError: a loss is not finite, memory is exhausted, the processes that read
                pictures failed, or a file of the run could not be written.
            fastgan.checkpoint.CheckpointError: a checkpoint could not be written.
            fastgan.images.ImageError: a file is no readable picture, under ``strict``.
        """
        if self.step >= self.steps:
            log.info("%s has all of its %d steps", self.folder.path, self.steps)
            return
        log.info(
            "%s on %s in %s%s", self.recipe.name, self._device, self._precision, self._shares()
        )
        log.info("%s", self._stream.summary())
        restore_rng(self._rng, self._device)
        with (
            StopSignals() as signals,
            self._world.together(self._last_good),
            quiet_threads(),
            contextlib.closing(self._reporter()) as reporter,
            memory_errors(self._memory_hint()),
        ):
            self._loop(reporter, signals)
        if self._stream.unreadable:
            log.info("%s", self._stream.summary())

    def _reporter(self) -> Reporter | Silence:
        if not self._first:
            return Silence()
        if self.config.output.overwrite:
            self.folder.clear()
            self.folder.make()
        self._write_settings()
        return Reporter(self.folder, start=self.step, steps=self.steps, progress=self._progress)

    def _loop(self, reporter: Reporter | Silence, signals: StopSignals) -> None:
        output = self.config.output
        sample_batch = self._sample_batch() if self._first else {}
        with contextlib.closing(self._stream.batches(self.step)) as batches:
            while self.step < self.steps:
                try:
                    images, paths = next(batches)
                except ReaderError as error:
                    raise TrainingError(f"{error}; {self._last_good()}") from error
                self._one_step(images, paths)
                reporter.step()
                stopped_by = self._world.highest(signals.received or 0)
                last = self.step == self.steps
                if last or self.step % output.log_every == 0:
                    self._log(reporter)
                with reporter.pause():
                    if self._first and (last or self.step % output.sample_every == 0):
                        self._samples(reporter, sample_batch)
                    if last or stopped_by or self.step % output.checkpoint_every == 0:
                        self.save()
                if stopped_by and not last:
                    raise TrainingInterrupted(
                        stopped_by,
                        f"{signal.Signals(stopped_by).name} after step {self.step}: saved "
                        f"{self._checkpoint}, --resume goes on from there",
                    )

    def save(self) -> Path:
        """Writes a checkpoint, unless what it would hold is not finite.

        Of several processes all have to call it, as each holds a part; the first one writes.

        Raises:
            TrainingError: a loss since the last reading, or a weight, is not finite.
            fastgan.checkpoint.CheckpointError: the file could not be written.
        """
        self._stop_if_tripped()
        self._stop_if_weights_not_finite()
        path = self.folder.checkpoint(self.step)
        rng = rng_state(self._device)
        own = b""  # of the first process, which has no need to pack its own
        if not self._first:
            training_state = dict(self.recipe.training_state())
            own = checkpoint.dumps({"rng": rng, "training_state": training_state})
        others = self._world.gather(own)[1:]
        if self._first:
            state = {
                "fastgan": fastgan.__version__,
                "recipe": self.recipe.name,
                "config": to_json(with_absolute_folders(self.config)),
                "step": self.step,
                "folders": self._stream.folders_state,
                **engine_state(self._engine, self._keys),
                "rng": rng,
                "other_processes": [checkpoint.loads(content) for content in others],
            }
            checkpoint.save(path, state)
            self.folder.saved(path, self.config.output.keep)
        self._checkpoint = path
        self._meet()
        return path

    def _one_step(self, images: dict[str, Tensor], paths: list[Path]) -> None:
        training = self.config.training
        seed = _derived_seed(training.seed, self.step, self._world.rank)
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            self.recipe.draw(self.step, training.batch_size, generator)
            for _ in range(training.accumulate)
        ]
        batch = self._upload(images)
        if training.accumulate == 1:
            small = drawn[0]
        else:  # micro-batches are the first dimension of everything
            micro = (training.accumulate, training.batch_size)
            batch = {domain: pictures.unflatten(0, micro) for domain, pictures in batch.items()}
            small = {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}
        batch |= {name: value.to(self._device, non_blocking=True) for name, value in small.items()}
        self._unwatched[self.step] = paths
        self._engine.step(batch, self.step, self._stream.steps_per_epoch)
        self.step += 1

    def _upload(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            domain: to_float(
                pictures.to(self._device, non_blocking=True).contiguous(
                    memory_format=torch.channels_last
                )
            )
            for domain, pictures in images.items()
        }

    def _log(self, reporter: Reporter | Silence) -> None:
        self._stop_if_tripped()
        losses, others = self._engine.ledger.read()
        for phase, rate in self._engine.learning_rates.items():
            others[f"lr/{phase}"] = rate
        if self._engine.scaler.is_enabled():
            others["loss_scale"] = self._engine.scaler.get_scale()
            if others["loss_scale"] < _SMALLEST_SCALE:
                raise TrainingError(
                    f"step {self.step}: the gradients are not finite at any loss scale; "
                    f"{self._last_good()}; try --precision fp32"
                )
        reporter.log(self.step, losses, others, self._pictures_per_step())

    def _samples(self, reporter: Reporter | Silence, batch: Batch) -> None:
        devices = [self._device] if self._device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            self._engine.autocast(),
            self._engine.average.applied(),
        ):
            self.recipe.eval()
            reporter.samples(self.step, self.recipe.samples(batch))
            self.recipe.train()

    def _sample_batch(self) -> Batch:
        """The first pictures of the stream, the same at every call."""
        training = self.config.training
        count = math.ceil(_SAMPLE_ROWS / (training.batch_size * training.accumulate))
        first = [self._stream.batch(number).images for number in range(count)]
        return self._upload(
            {
                domain: torch.cat([images[domain] for images in first])[:_SAMPLE_ROWS]
                for domain in self.recipe.domains
            }
        )

    def _stop_if_tripped(self) -> None:
        bad = self._engine.ledger.bad()
        if bad is not None:
            step, terms = bad
            own = self._unwatched[step] if self._engine.ledger.is_culprit() else []
            gathered = self._world.gather(encode("\n".join(map(str, own))))
            pictures = ", ".join(decode(paths).replace("\n", ", ") for paths in gathered if paths)
            raise TrainingError(
                self._world.share(
                    f"step {step + 1}: the loss {', '.join(terms)} is not finite; "
                    f"pictures: {pictures}; {self._last_good()}"
                )
            )
        self._unwatched.clear()

    def _stop_if_weights_not_finite(self) -> None:
        named = {
            name: parameter
            for parameters in self._engine.parameters.values()
            for name, parameter in parameters.items()
        }
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in named.values()])
        bad = [name for name, fine in zip(named, finite.tolist(), strict=True) if not fine]
        if bad:
            raise TrainingError(
                f"step {self.step}: the weights {', '.join(bad[:3])} are not finite; "
                f"{self._last_good()}"
            )

    def _last_good(self) -> str:
        return f"last good checkpoint: {self._checkpoint or 'none'}"

    def _memory_hint(self) -> str:
        training = self.config.training
        helps = ["a smaller --batch-size (--accumulate makes up for it) or --size"]
        if not training.activation_checkpointing:
            helps.append("--activation-checkpointing")
        if self._precision == "fp32":
            helps.append("--precision bf16")
        return (
            f"{training.batch_size} pictures of {self.config.augmentation.size} px of each kind in "
            f"{self._precision} on {self._device}; these help: {', '.join(helps)}"
        )

    @property
    def _first(self) -> bool:
        """Whether this process is the one that writes."""
        return self._world.rank == 0

    def _pictures_per_step(self) -> int:
        training = self.config.training
        return training.batch_size * training.accumulate * self._world.size

    def _shares(self) -> str:
        if self._world.size == 1:
            return ""
        return f", {self._world.size} processes, {self._pictures_per_step()} pictures per update"

    def _meet(self) -> None:
        """Waits for the other processes, which must be at the same step."""
        last, first = self._world.highest(self.step), -self._world.highest(-self.step)
        if first != last:
            raise ValueError(
                f"out: the processes found checkpoints of steps {first} to {last} in "
                f"{self.folder.path}; they must all see the same folder"
            )

    def _warn_of_idle_steps(self) -> None:
        """A schedule in epochs may end long before the steps do, where a folder is small."""
        per_epoch = self._stream.steps_per_epoch
        if any(self.recipe.lr_factor(p, self.steps - 1, per_epoch) for p in self.recipe.phases):
            return
        log.warning(
            "the learning rate falls to 0 before step %d: the schedule of %s ends after %d steps "
            "here, of which %d are an epoch; a flag of the recipe stretches it",
            self.steps,
            self.recipe.name,
            self.recipe.default_steps(per_epoch),
            per_epoch,
        )

    def _write_settings(self) -> None:
        config = to_json(with_absolute_folders(self.config))
        settings = {"fastgan": fastgan.__version__, "recipe": self.recipe.name, "config": config}
        text = json.dumps(settings, indent=2)
        with write_errors(self.folder.settings):
            checkpoint.replace_file(self.folder.settings, f"{text}\n".encode())

    def _checkpoint_to_resume(self) -> Path | None:
        """Refuses an output folder that would lose a run, or that resumes nothing."""
        output, folder = self.config.output, self.folder
        if folder.path.exists() and not folder.path.is_dir():
            raise ValueError(f"out: {folder.path} is not a folder")
        for domain, pictures in self.config.pictures.folders.items():
            way = os.path.relpath(os.path.realpath(folder.path), os.path.realpath(pictures))
            if not any(part[0] == "." for part in Path(way).parts):  # neither outside nor hidden
                raise ValueError(
                    f"out: {folder.path} is in {pictures}, the folder of {domain} pictures: the "
                    "run would learn from its own sample grids (a run may be moved)"
                )
        if output.resume:
            newest = folder.newest()
            if newest is None:
                log.warning("%s has no checkpoint yet: training from the start", folder.path)
            return newest
        if folder.holds_run() and not output.overwrite:
            raise ValueError(
                f"out: {folder.path} holds a run; --resume goes on with it, "
                "--overwrite deletes it and starts anew"
            )
        return None

    def _restore(self, path: Path) -> None:
        state = checkpoint.load(path)
        before = training_config(state, type(self.recipe), path)
        others = state.get("other_processes", [])  # older ones knew of none
        if len(others) + 1 != self._world.size:
            raise ValueError(
                f"resume: {path} was trained by {_processes(len(others) + 1)} and cannot be "
                f"resumed by {self._world.size}: each has random numbers and a pool of its own"
            )
        if self._world.rank > 0:
            state |= others[self._world.rank - 1]
        changed = changed_fields(*map(with_absolute_folders, (before, self.config)))
        if changed:
            log.warning("resumed with other settings than before: %s", "; ".join(changed))
        if "folders" in state:  # not in older ones
            for change in changed_folders(state["folders"], self._stream.folders_state):
                log.warning("resumed with other pictures than before: %s", change)
        restore_engine(self._engine, self._keys, state)
        restore_rng(state["rng"], self._device)
        self.step = state["step"]
        log.info("resumed from %s", path)


def config_to_resume(folder: RunFolder, recipe: type[Recipe]) -> TrainConfig | None:
    """The config of the run in `folder`: of its last checkpoint, before the first of ``run.json``.

    None where there is no run. Raises as `training_config`.
    """
    newest = folder.newest()
    if newest is not None:
        return training_config(checkpoint.read_header(newest), recipe, newest)
    if not folder.settings.exists():
        return None
    try:
        settings = dict(json.loads(folder.settings.read_bytes()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.settings}: damaged ({error})") from None
    return _stored_config(settings, recipe, folder.settings)


def training_config(state: Any, recipe: type[Recipe], path: Path) -> TrainConfig:
    """The config in `state`, a training checkpoint of `recipe` (or its header) read from `path`.

    Raises:
        ValueError: it is of another recipe, or of a newer fastgan.
    """
    if not isinstance(state, dict) or "optimizers" not in state:
        raise ValueError(f"{path}: holds no training to resume")
    return _stored_config(state, recipe, path)


def _stored_config(stored: dict[str, Any], recipe: type[Recipe], path: Path) -> TrainConfig:
    if stored.get("recipe") != recipe.name:
        raise ValueError(f"{path}: of the recipe {stored.get('recipe')}, not of {recipe.name}")
    try:
        return config_from_json(recipe, stored.get("config"))
    except ValueError as error:
        written_by = stored.get("fastgan", "unknown")
        raise ValueError(f"{path} (fastgan {written_by}): {error}") from None


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _derived_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global generator is what gets restored)
    torch.manual_seed(seed)
