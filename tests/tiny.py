"""Recipes that translate between two domains, small enough to be trained in a test."""

import dataclasses

from fastgan.recipes import RecipeConfig
from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.two_domains import TwoDomainRecipe
from fastgan.recipes.unit import UNIT

TWO_DOMAIN_RECIPES: tuple[type[TwoDomainRecipe], ...] = (CycleGAN, UNIT)

_CHANGES = {
    "cyclegan": {"width": 4, "residual_blocks": 2, "discriminator_width": 4, "pool_size": 5},
    "unit": {"width": 4, "residual_blocks": 1, "discriminator_width": 4},
}
"""By recipe: what makes its lite preset tiny."""


def tiny_config(recipe: type[TwoDomainRecipe]) -> RecipeConfig:
    return dataclasses.replace(recipe.presets["lite"].config, **_CHANGES[recipe.name])


def tiny_flags(recipe: str) -> list[str]:
    """The same for the command line, and crops of 32 px."""
    given = {"preset": "lite", "size": 32, "resize": 36, "batch_size": 2, **_CHANGES[recipe]}
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return [part for flag in flags for part in flag]
