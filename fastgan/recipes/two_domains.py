"""What recipes that translate between two sets of pictures, unpaired, have in common."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.ops.gan_loss import DiscriminatorStats
from fastgan.recipes.recipe import Batch, Recipe, Style


class TwoDomainRecipe(Recipe):
    """A recipe that learns to translate pictures of A into pictures of B and back."""

    domains: ClassVar[tuple[str, str]] = ("A", "B")
    directions: ClassVar[tuple[str, ...]] = ("AtoB", "BtoA")

    size_multiple: int
    """Translators take heights and widths that are multiples of this, at least two of it."""
    smallest: int
    """Height and width of the smallest pictures that the discriminators can judge."""

    def begin_training(self, size: int) -> None:
        if size % self.size_multiple or size < self.smallest:
            raise ValueError(
                f"size: {self.name} needs a multiple of {self.size_multiple}, at least "
                f"{self.smallest} for these discriminators, got {size}"
            )

    @abc.abstractmethod
    def translator(self, direction: str) -> nn.Module:
        """Gives pictures [B,3,H,W] of one domain as pictures of the other; holds nothing else."""

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        a, b = batch["A"], batch["B"]
        to_b, to_a = (self.translator(direction) for direction in self.directions)
        fake_b, fake_a = to_b(a), to_a(b)
        return {
            "A": a,
            "A to B": fake_b,
            "A to B to A": to_a(fake_b),
            "B": b,
            "B to A": fake_a,
            "B to A to B": to_b(fake_a),
        }

    def stylize(
        self,
        content: Tensor,
        style: Style | None = None,
        *,
        alpha: float = 1.0,
        direction: str | None = None,
    ) -> Tensor:
        direction = self.checked(direction)
        if style is not None:
            raise ValueError(f"style: {self.name} takes none, its direction decides")
        if alpha != 1.0:
            raise ValueError(f"alpha: {self.name} has no strength to set, got {alpha}")
        height, width = content.shape[2:]
        translated: Tensor = self.translator(direction)(extended(content, self.size_multiple))
        return translated[:, :, :height, :width]

    def checked(self, direction: str | None) -> str:
        """`direction` if it is one, the only one if None; else raises ValueError."""
        if direction is None and len(self.directions) == 1:
            return self.directions[0]
        if direction not in self.directions:
            known = " or ".join(self.directions)
            raise ValueError(f"direction: {self.name} needs {known}, got {direction!r}")
        return direction


def extended(pictures: Tensor, multiple: int) -> Tensor:
    """Repeats the border until both sides are multiples of `multiple`, at least two of it."""
    smallest = 2 * multiple
    to_bottom, to_right = (
        -side % multiple if side >= smallest else smallest - side for side in pictures.shape[2:]
    )
    return F.pad(pictures, (0, to_right, 0, to_bottom), mode="replicate")


def judge(
    discriminator: nn.Module, real: Tensor, fake: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits on real and on fake pictures, by scale, from one call of the discriminator."""
    logits: Tensor | Sequence[Tensor] = discriminator(torch.cat([real, fake]))
    scales = [logits] if isinstance(logits, Tensor) else logits
    halves = [scale.split([len(real), len(fake)]) for scale in scales]
    return [scale[0] for scale in halves], [scale[1] for scale in halves]


def discriminator_metrics(stats: Mapping[str, DiscriminatorStats]) -> dict[str, Tensor]:
    """Statistics by domain as a recipe's metrics."""
    return {
        f"discriminator_{domain}/{name}": value
        for domain, of_domain in stats.items()
        for name, value in of_domain._asdict().items()
    }
