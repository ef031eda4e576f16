"""The shipped recipes, small enough to be trained in a test."""

import dataclasses
from pathlib import Path
from typing import Any

import fastgan
from fastgan import checkpoint
from fastgan.recipes import Recipe, RecipeConfig
from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.serialize import to_json
from fastgan.recipes.style_transfer import StyleTransfer, StyleTransferRecipeConfig
from fastgan.recipes.two_domains import TwoDomainRecipe
from fastgan.recipes.unit import UNIT

TWO_DOMAIN_RECIPES: tuple[type[TwoDomainRecipe], ...] = (CycleGAN, UNIT)

_CHANGES: dict[str, dict[str, Any]] = {
    "cyclegan": {"width": 4, "residual_blocks": 2, "discriminator_width": 4, "pool_size": 5},
    "style_transfer": {
        "width": 8,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "discriminator_width": 4,
        "extractor_levels": 3,
    },
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


def tiny_style_transfer(**options: Any) -> StyleTransfer:
    config = StyleTransferRecipeConfig(**_CHANGES[StyleTransfer.name])
    return StyleTransfer(dataclasses.replace(config, **options))


def save_tiny_recipe(recipe: Recipe, folder: Path) -> Path:
    """A checkpoint with what inference reads of one."""
    path = folder / f"{recipe.name}.safetensors"
    networks = type(recipe)(recipe.config).state_dict()  # without what only training needs
    state = {name: value for name, value in recipe.state_dict().items() if name in networks}
    checkpoint.save(
        path,
        {
            "fastgan": fastgan.__version__,
            "recipe": recipe.name,
            "config": {"recipe": to_json(recipe.config)},
            "networks": state,
            "average": {},
        },
    )
    return path
