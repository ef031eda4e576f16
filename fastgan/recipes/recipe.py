"""The contract between a recipe (what is optimised) and the trainer (how).

One training step, as the trainer runs it for every recipe::

    batch = {**pictures, **recipe.draw(step, generator)}
    scratch = recipe.begin_step(batch)                 # fakes, once, with their graph
    for phase in recipe.phases:                        # e.g. discriminator, then generator
        terms = recipe.losses(phase, batch, scratch)   # the other phases' networks are frozen
        sum(terms.values()).backward()
        optimizer[phase].step()

Autocast, loss scaling, gradient synchronisation, accumulation and capture into a CUDA graph are the
trainer's; a recipe is written as if none of them existed and keeps three promises for them:

- `begin_step` and `losses` never synchronise with the host (no ``.item()``, no branch on a tensor's
  value) and take every tensor that differs between steps from `batch`, so that a step can be
  captured once and replayed; what chance decides on the host comes from `draw`.
- `begin_step` changes no state: it may run once per phase when gradients are accumulated.
- state beyond the networks' weights (an image pool) lives in the tensors of `training_state` and
  changes in place.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from fastgan.ops.instance_norm import InstanceStats

Batch: TypeAlias = Mapping[str, Tensor]
"""Domain name -> pictures [B,3,H,W], RGB float in [-1, 1]; besides, what `Recipe.draw` returned."""


Style: TypeAlias = Tensor | InstanceStats
"""Style pictures [B or 1,3,h,w], or the statistics of their features."""


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Base of a recipe's config: sizes of its networks, weights of its losses, learning rates.

    Fields hold int, float, bool, str, `Literal` or tuples of them (the checkpoint stores them as
    JSON); each is a command-line flag of the same name, and the string below a field is its help.

    Raises:
        ValueError: a field whose name begins with ``weight_`` or ``lr`` is negative, one is none of
            its `Literal`, or one that a subclass looks at does not serve; names it.
        TypeError: one that is to be a number is none; names it.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(kind)
            if name.startswith(("weight_", "lr")):
                self._require(0, name)
            if get_origin(kind) is Literal and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

    def _require(self, least: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class Preset:
    """What `--preset NAME` stands for; flags given beside it win."""

    config: RecipeConfig
    size: int
    """Side of the square training crops, in pixels."""
    batch_size: int
    resize: int | None = None
    """Shorter side of a picture before the crop is taken; None crops at `size`."""


@dataclasses.dataclass(frozen=True)
class AdamSettings:
    """Settings of one phase's optimizer: Adam with an L2 weight decay (0 is plain Adam)."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


class Recipe(nn.Module, abc.ABC):
    """Networks and the losses that train them.

    A subclass is constructed from its config alone, on the CPU, with weights drawn from torch's
    default generator, and registers its networks as submodules. What only training needs is added
    by `begin_training`: what a checkpoint does not hold (a frozen feature extractor, whose
    parameters have ``requires_grad=False``), and what it holds as `training_state`.
    """

    name: ClassVar[str]
    """Registered name, in snake_case; the command line shows it with dashes."""
    domains: ClassVar[tuple[str, str]]
    """Keys of the two kinds of pictures in a batch: ("content", "style") or ("A", "B")."""
    directions: ClassVar[tuple[str, ...]] = ()
    """Directions `stylize` can translate in, ("AtoB", "BtoA"); () where a style picture decides."""
    phases: ClassVar[tuple[str, ...]]
    """The updates of one step in order, one optimizer each; one is called "generator"."""
    config_class: ClassVar[type[RecipeConfig]]
    presets: ClassVar[Mapping[str, Preset]]
    """By name; the first is the default."""

    config: RecipeConfig

    def __init__(self, config: RecipeConfig) -> None:
        super().__init__()
        self.config = config

    def begin_training(self, size: int) -> None:
        """Add frozen extractors, an image pool and the like; called once, on the CPU, before the
        first step.

        Args:
            size: height and width of the training crops, in pixels.
        """

    def training_state(self) -> Mapping[str, Tensor]:
        """Tensors that decide how a training goes on, besides weights: those of an image pool.

        A checkpoint holds them and a resumed training copies them back, into a recipe that
        `begin_training` has seen.
        """
        return {}

    @abc.abstractmethod
    def networks(self, phase: str) -> Sequence[nn.Module]:
        """The submodules `phase` updates. Those of "generator" are averaged (EMA) for inference."""

    @abc.abstractmethod
    def optimizer(self, phase: str) -> AdamSettings:
        """Optimizer settings of `phase`; `lr` is the rate at a factor of 1."""

    def lr_factor(self, phase: str, step: int, steps_per_epoch: int) -> float:
        """Factor on the learning rate of the update number `step` (from 0): constant by default."""
        return 1.0

    @abc.abstractmethod
    def default_steps(self, steps_per_epoch: int) -> int:
        """Length of a training whose user gave no `--steps`."""

    def draw(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Small CPU tensors that chance on the host decides for `step`; they join the batch.

        `generator` depends on the seed, the step and the process only, and so must the result, its
        shapes not even on those: a resumed training draws the same.
        """
        return {}

    def begin_step(self, batch: Batch) -> Any:
        """Forward work that the phases share, with its graph; handed to `losses` as `scratch`.

        Only the phase "generator" differentiates it; discriminators use its fakes detached.
        """
        return None

    @abc.abstractmethod
    def losses(self, phase: str, batch: Batch, scratch: Any) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; `phase` minimises their sum.

        The names are the same at every step and differ between phases.
        """

    def metrics(self, batch: Batch, scratch: Any) -> dict[str, Tensor]:
        """Detached scalars to log beside the losses, such as a discriminator's accuracy."""
        return {}

    @abc.abstractmethod
    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """Columns of the sample grid by title, each [B,3,H,W]; called without gradients.

        Networks of the generator hold their averaged weights during the call.
        """

    def encode_style(self, style: Tensor) -> Style:
        """What `stylize` needs of a style picture [1,3,h,w], computed once for many contents."""
        return style

    def mix_styles(self, styles: Sequence[Style], weights: Sequence[float]) -> Style:
        """Several encoded styles as one; the weights sum to 1.

        Raises:
            ValueError: there are several, and the recipe cannot mix.
        """
        if len(styles) > 1:
            raise ValueError(f"style: {self.name} takes one style picture, got {len(styles)}")
        return styles[0]

    @abc.abstractmethod
    def stylize(
        self,
        content: Tensor,
        style: Style | None = None,
        *,
        alpha: float = 1.0,
        direction: str | None = None,
    ) -> Tensor:
        """Pictures [B,3,H,W] of any size in, pictures of the same size out.

        `style` ([B or 1,3,h,w], or what `encode_style` and `mix_styles` gave) and `alpha`
        (strength, 0 to 1) are for recipes without `directions`; `direction` is for those that have
        some. What is missing or too much is a ValueError.
        """
