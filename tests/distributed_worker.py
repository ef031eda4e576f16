"""Trains every shipped recipe in fp64: in one process, or in those that torchrun starts.

Run as ``torchrun ... distributed_worker.py DATA OUT ONE``, where ONE is what one process left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dummy_recipe import Dummy
from fastgan.recipes import RECIPES, Recipe
from fastgan.training import (
    DomainPictures,
    Output,
    Pictures,
    TrainConfig,
    Trainer,
    TrainingError,
    leave_world,
    preset_config,
)
from fastgan.training.engine import EagerEngine
from fastgan.training.engines import GraphEngine
from recorded_graph import RecordedGraph

STEPS = 5
STOP = 2  # where the training in parts is interrupted
CONFIGS: dict[str, dict[str, Any]] = {
    # A batch is divided by the mean of its targets' norms where the scale is relative.
    "style_transfer": {"width": 4, "discriminator_width": 4, "style_scale": "absolute"},
    "cyclegan": {"width": 4, "residual_blocks": 1, "discriminator_width": 4, "pool_size": 50},
    "unit": {"width": 4, "residual_blocks": 1, "discriminator_width": 4, "latent_noise": 0.0},
}


def pictures_of(recipe: type[Recipe], data: Path) -> Pictures | DomainPictures:
    if not recipe.directions:
        return Pictures(data / "content", data / "style", workers=0)
    return DomainPictures(data, workers=0)


def config_of(
    name: str, data: Path, out: Path, *, resume: bool = False, **training: Any
) -> TrainConfig:
    """A tiny training; `training` are changes to that section."""
    recipe = RECIPES[name]
    output = Output(out / name, log_every=1, sample_every=100, resume=resume)
    config = preset_config(recipe, "lite", pictures_of(recipe, data), output)
    return dataclasses.replace(
        config,
        recipe=dataclasses.replace(config.recipe, **CONFIGS[name]),
        training=dataclasses.replace(
            config.training, **{"steps": STEPS, "device": "cpu", "batch_size": 1, **training}
        ),
        augmentation=dataclasses.replace(config.augmentation, size=32, resize=36),
    )


class Trainer64(Trainer):
    """In fp64, networks and pictures."""

    def __init__(self, recipe: type[Recipe], config: TrainConfig) -> None:
        class Recipe64(recipe):  # type: ignore[valid-type, misc]
            def begin_training(self, size: int) -> None:
                super().begin_training(size)
                self.double()

        super().__init__(Recipe64, config)

    def _upload(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {domain: value.double() for domain, value in super()._upload(images).items()}


def train(name: str, data: Path, out: Path, **changes: Any) -> None:
    Trainer64(RECIPES[name], config_of(name, data, out, **changes)).train()


def recorded_engine(
    _: str, recipe: Recipe, device: torch.device, precision: Any, ema_decay: float, **options: Any
) -> EagerEngine:
    """In place of `make_engine`: a graph where there is no GPU."""
    del options["activation_checkpointing"]
    return GraphEngine(recipe, device, precision, ema_decay, RecordedGraph(), **options)


def main() -> None:
    data, out, one = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    # Who writes nothing needs no folder: whatever another than the first wrote would be seen.
    mine = out / "whole" if rank == 0 else out / "of-another"
    for name in CONFIGS:
        train(name, data, mine)
        train(name, data, out / "parts", steps=STOP)
        train(name, data, out / "parts", resume=True)
    with mock.patch("fastgan.training.trainer.make_engine", recorded_engine):
        for name in CONFIGS:
            train(name, data, out / "graph")
    with pytest.raises(ValueError) as refused:
        train("unit", data, one, resume=True, steps=STEPS + 1)
    with pytest.raises(TrainingError) as ended:
        train_dummy(data, out / "loss", "loss", "fp32")
    train_dummy(data, out / "sound", "none", "fp16")
    weights = train_dummy(data, out / "gradient", "gradient", "fp16")
    found = {"refused": str(refused.value), "fault": str(ended.value), "weights": weights}
    (out / f"{rank}.json").write_text(json.dumps(found))
    leave_world()


def train_dummy(data: Path, out: Path, fault: str, precision: Any) -> str:
    """With `fault` in the process that the environment means; a digest of its weights."""
    config = preset_config(Dummy, None, pictures_of(Dummy, data), Output(out, log_every=4))
    trainer = Trainer(
        Dummy,
        dataclasses.replace(
            config,
            recipe=dataclasses.replace(config.recipe, fault=fault),
            training=dataclasses.replace(
                config.training, steps=10, device="cpu", precision=precision
            ),
        ),
    )
    trainer.train()
    state = trainer.recipe.generator.state_dict()
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


if __name__ == "__main__":
    main()
