"""A recipe that trains in milliseconds.

Run as a script: the command line that knows it, and that sends itself a signal in a given step of
any recipe's training.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fastgan import cli
from fastgan.recipes import RECIPES, AdamSettings, Batch, Preset, Recipe, RecipeConfig

for _needed in ("PIL", "safetensors", "tensorboard", "torchvision", "tqdm"):
    pytest.importorskip(_needed, reason="needs the extra [train]")


@dataclasses.dataclass(frozen=True)
class DummyConfig(RecipeConfig):
    width: int = 8
    """Channels."""
    weight_content: float = 1.0
    """Weight of the content loss."""
    objective: Literal["default", "other"] = "default"
    """What is minimised."""
    fault: Literal["none", "loss", "gradient", "memory"] = "none"
    """What goes wrong."""
    fault_step: int = 5
    """The step (from 0) it goes wrong at."""
    fault_steps: int = 1
    """For so many steps."""


class _Broken(torch.autograd.Function):
    """The identity, with a gradient that is not finite where `fault` is true."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Tensor) -> Tensor:
        ctx.save_for_backward(fault)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (fault,) = ctx.saved_tensors
        return gradient.masked_fill(fault, float("nan")), None


class Dummy(Recipe):
    """A recipe for tests."""

    name = "dummy"
    domains = ("content", "style")
    phases = ("discriminator", "generator")
    config_class = DummyConfig
    presets: ClassVar = {
        "small": Preset(DummyConfig(), size=32, batch_size=2, resize=40),
        "large": Preset(DummyConfig(width=16), size=48, batch_size=3),
    }
    config: DummyConfig

    def __init__(self, config: DummyConfig) -> None:
        super().__init__(config)
        width = config.width
        self.generator = nn.Sequential(
            nn.Conv2d(6, width, 3, padding=1, bias=False),  # a bias is lost in the norm
            nn.InstanceNorm2d(width, affine=True),
            nn.ReLU(),
            nn.Dropout(0.1),  # draws from the device's random number generator
            nn.Conv2d(width, 3, 3, padding=1),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 4)
        )

    def begin_training(self, size: int) -> None:
        self.pool = torch.nn.Buffer(torch.zeros(4, 3, size // 4, size // 4))
        self.extractor = nn.Conv2d(3, 4, 3).requires_grad_(False)

    def training_state(self) -> dict[str, Tensor]:
        return {"pool": self.pool}

    def networks(self, phase: str) -> Sequence[nn.Module]:
        return [self.get_submodule(phase)]

    def optimizer(self, phase: str) -> AdamSettings:
        return AdamSettings(lr=1e-2 if phase == "generator" else 2e-2, betas=(0.5, 0.999))

    def lr_factor(self, phase: str, step: int, steps_per_epoch: int) -> float:
        return 1.0 / (1 + 0.1 * step) if phase == "generator" else 1.0

    def default_steps(self, steps_per_epoch: int) -> int:
        return 2 * steps_per_epoch

    def draw(self, step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        _signal_in(step)
        return {
            "slot": torch.randint(4, (1,), generator=generator),
            "fault": torch.full(
                (),
                0 <= step - self.config.fault_step < self.config.fault_steps
                and _meant("FAULT_RANK"),
            ),
        }

    def begin_step(self, batch: Batch) -> Tensor:
        if self.config.fault == "memory" and batch["fault"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.generator(torch.cat([batch["content"], batch["style"]], 1))

    def losses(self, phase: str, batch: Batch, scratch: Tensor) -> dict[str, Tensor]:
        if phase == "discriminator":
            with torch.no_grad():
                small = nn.functional.adaptive_avg_pool2d(scratch[:1], self.pool.shape[2])
                self.pool.index_copy_(0, batch["slot"], small.to(self.pool.dtype))
            real = self.discriminator(batch["style"]).float()
            fake = self.discriminator(scratch.detach()).float()
            return {"real": softplus(-real).mean(), "fake": softplus(fake).mean()}
        content = (self.extractor(scratch) - self.extractor(batch["content"])).square().mean()
        adversarial = softplus(-self.discriminator(scratch).float()).mean()
        if self.config.fault == "loss":
            content = content / (~batch["fault"])
        if self.config.fault == "gradient":
            content = _Broken.apply(content, batch["fault"])
        return {"content": self.config.weight_content * content.float(), "adversarial": adversarial}

    def metrics(self, batch: Batch, scratch: Tensor) -> dict[str, Tensor]:
        return {"metric/brightness": scratch.detach().float().mean()}

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        torch.rand(3)  # a recipe may draw here
        pair = torch.cat([batch["content"], batch["style"]], 1)
        return {
            "content": batch["content"],
            "style": batch["style"],
            "result": self.generator(pair),
        }

    def stylize(
        self,
        content: Tensor,
        style: Tensor | None = None,
        *,
        alpha: float = 1.0,
        direction: str | None = None,
    ) -> Tensor:
        assert style is not None
        colour = style.mean((2, 3), keepdim=True).expand_as(content)
        return content.lerp(self.generator(torch.cat([content, colour], 1)), alpha)


RECIPES[Dummy.name] = Dummy


def _signal_in(step: int) -> None:
    """The signal that the environment asks for in this step, sent to this process.

    Not again to a process that torchrun has started in place of a killed one.
    """
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and step == int(os.environ.get("SIGNAL_STEP", "-1")) and _meant("SIGNAL_RANK"):
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))


def _meant(variable: str) -> bool:
    """Whether the environment means this process; where it says nothing, all are meant."""
    rank = os.environ.get("RANK")
    return os.environ.get(variable, rank) == rank


def _signalling(recipe: type[Recipe]) -> None:
    draw = recipe.draw

    def signal_and_draw(
        self: Recipe, step: int, batch_size: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        _signal_in(step)
        return draw(self, step, batch_size, generator)

    recipe.draw = signal_and_draw


if __name__ == "__main__":
    for shipped in RECIPES.values():
        if shipped is not Dummy:
            _signalling(shipped)
    sys.exit(cli.main())
