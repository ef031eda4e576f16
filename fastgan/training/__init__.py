"""How recipes are trained: config, data, step engine, trainer."""

from fastgan.training.config import (
    DomainPictures,
    Output,
    Pictures,
    TrainConfig,
    Training,
    preset_config,
)
from fastgan.training.data import Augmentation
from fastgan.training.distributed import leave_world
from fastgan.training.guards import TrainingError, TrainingInterrupted
from fastgan.training.trainer import Trainer

__all__ = [
    "Augmentation",
    "DomainPictures",
    "Output",
    "Pictures",
    "TrainConfig",
    "Trainer",
    "Training",
    "TrainingError",
    "TrainingInterrupted",
    "leave_world",
    "preset_config",
]
