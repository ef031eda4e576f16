"""How recipes are trained: config, data, step engine, trainer."""

from fastgan.training.config import TrainConfig, preset_config
from fastgan.training.guards import TrainingError, TrainingInterrupted
from fastgan.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer", "TrainingError", "TrainingInterrupted", "preset_config"]
