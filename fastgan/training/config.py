"""The config tree of a training run. Every field is a command-line flag of the same name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

from fastgan.device import Precision
from fastgan.recipes import Recipe, RecipeConfig
from fastgan.recipes.serialize import from_json, to_json
from fastgan.training.data import Augmentation
from fastgan.training.engines import EngineName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How pictures are read. A subclass says from where; its docstring heads the flags' help."""

    workers: int = 4
    """Processes that read pictures; 0 reads them in the training process."""
    strict: bool = False
    """Stop at a file that is no readable picture instead of skipping it."""

    def __post_init__(self) -> None:
        _require("workers", self.workers, at_least=0)

    @property
    def folders(self) -> dict[str, Path]:
        """By domain."""
        return {}


@dataclasses.dataclass(frozen=True)
class Pictures(Reading):
    """Pictures to learn from; folders are searched at any depth."""

    content: Path
    """Folder of content pictures."""
    style: Path
    """Folder of style pictures."""

    @property
    def folders(self) -> dict[str, Path]:
        return {"content": self.content, "style": self.style}


@dataclasses.dataclass(frozen=True)
class DomainPictures(Reading):
    """Pictures of two domains, A and B, to learn from; folders are searched at any depth."""

    data: Path
    """Folder that holds the folders of pictures trainA and trainB."""

    @property
    def folders(self) -> dict[str, Path]:
        return {"A": self.data / "trainA", "B": self.data / "trainB"}


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and how."""

    steps: int | None = None
    """Updates in all, those before a resume included; None: as many as the recipe wants."""
    batch_size: int = 8
    """Pictures of each kind per pass and process; an update sees this many times accumulate times
    the number of processes."""
    accumulate: int = 1
    """Passes per update, whose gradients add up: a large batch in the memory of a small one."""
    activation_checkpointing: bool = False
    """Compute the generator's activations again in the backward instead of keeping them: less
    memory, slower steps, the same result."""
    ema_decay: float = 0.999
    """Decay of the running average of the generator's weights, which inference uses; 0 is none."""
    seed: int = 0
    """Decides the initial weights, the order of the pictures and their crops."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; None: a GPU if there is one, of several processes each its own."""
    precision: Precision | None = None
    """Autocast dtype; None: bf16 on GPUs since Ampere, fp16 on older ones, fp32 elsewhere."""
    engine: EngineName = "eager"
    """Execute a step operation by operation, by torch.compile or as one CUDA graph."""
    deterministic: bool = False
    """The same bits on every run on the same GPU, at some cost in speed."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            _require("steps", self.steps, at_least=1)
        _require("batch_size", self.batch_size, at_least=1)
        _require("accumulate", self.accumulate, at_least=1)
        _require("seed", self.seed, at_least=0)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be less than 2**64, got {self.seed}")
        if self.engine not in get_args(EngineName):
            engines = ", ".join(get_args(EngineName))
            raise ValueError(f"engine must be one of {engines}, got {self.engine!r}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclasses.dataclass(frozen=True)
class Output:
    """What is written, where and when."""

    out: Path
    """Folder of the run: checkpoints, sample grids, losses, TensorBoard events."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is saved as well."""
    keep: int = 3
    """Checkpoints to keep; the oldest are deleted. 0 keeps all."""
    sample_every: int = 500
    """Steps between sample grids."""
    log_every: int = 50
    """Steps between readings of the losses."""
    resume: bool = False
    """Go on from the run's last checkpoint, with its settings where no flag says otherwise."""
    overwrite: bool = False
    """Delete the run that the folder holds and start anew."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "sample_every", "log_every"):
            _require(name, getattr(self, name), at_least=1)
        _require("keep", self.keep, at_least=0)
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a training run, next to the choice of its recipe."""

    preset: str | None = None
    """Settings to begin with; the flags below show its values and win over them."""
    pictures: Reading
    output: Output
    training: Training = dataclasses.field(default_factory=Training)
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    recipe: RecipeConfig
    """Networks, losses and learning rates."""


def pictures_class(recipe: type[Recipe]) -> type[Pictures] | type[DomainPictures]:
    """Where `recipe` takes its pictures from."""
    return DomainPictures if recipe.directions else Pictures


def preset_config(
    recipe: type[Recipe], preset: str | None, pictures: Reading, output: Output
) -> TrainConfig:
    """The config that `preset` (default: the recipe's first) stands for."""
    name = next(iter(recipe.presets)) if preset is None else preset
    if name not in recipe.presets:
        raise ValueError(
            f"unknown preset {name!r} of {recipe.name}; known: {', '.join(recipe.presets)}"
        )
    chosen = recipe.presets[name]
    return TrainConfig(
        pictures=pictures,
        output=output,
        recipe=chosen.config,
        training=Training(batch_size=chosen.batch_size),
        augmentation=Augmentation(size=chosen.size, resize=chosen.resize),
        preset=name,
    )


def config_from_json(recipe: type[Recipe], values: Any) -> TrainConfig:
    """The config of a training of `recipe` that `to_json` turned into `values`.

    Raises:
        ValueError: a field is unknown (a newer fastgan wrote it), missing or of another type.
    """
    if not isinstance(values, dict) or not {"recipe", "pictures"} <= set(values):
        raise ValueError(f"config: expected an object with recipe and pictures, got {values!r}")
    return dataclasses.replace(
        from_json(TrainConfig, {**values, "recipe": {}, "pictures": {}}, "config"),
        recipe=from_json(recipe.config_class, values["recipe"], "config.recipe"),
        pictures=from_json(pictures_class(recipe), values["pictures"], "config.pictures"),
    )


def with_absolute_folders(config: TrainConfig) -> TrainConfig:
    """`config` with folders of pictures that are found from any working directory."""
    absolute: dict[str, Any] = {
        name: value.absolute()
        for name, value in vars(config.pictures).items()
        if isinstance(value, Path)
    }
    return dataclasses.replace(config, pictures=dataclasses.replace(config.pictures, **absolute))


def changed_fields(before: TrainConfig, now: TrainConfig) -> list[str]:
    """``section.field: old -> new`` of every field that decides what is learned and differs."""
    old, new = _flat(to_json(before)), _flat(to_json(now))
    return [
        f"{name}: {old.get(name)} -> {value}"
        for name, value in new.items()
        if value != old.get(name) and name not in _NO_MATTER and not name.startswith("output.")
    ]


_NO_MATTER = {
    "training.steps",
    "training.activation_checkpointing",
    "pictures.workers",
    "pictures.strict",
    "preset",
}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{section}.{name}": field for name, field in value.items()}
        else:
            flat[section] = value
    return flat


def _require(name: str, value: int, *, at_least: int) -> None:
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
