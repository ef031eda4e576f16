"""What is optimised: a recipe turns networks and a batch into named losses."""

from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.recipe import AdamSettings, Batch, Preset, Recipe, RecipeConfig
from fastgan.recipes.style_transfer import StyleTransfer
from fastgan.recipes.unit import UNIT

__all__ = [
    "RECIPES",
    "AdamSettings",
    "Batch",
    "Preset",
    "Recipe",
    "RecipeConfig",
    "recipe_class",
]

_SHIPPED: tuple[type[Recipe], ...] = (StyleTransfer, CycleGAN, UNIT)

RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in _SHIPPED}
"""By name, as checkpoints and the command line call them. Add your own class to train it."""


def recipe_class(name: str) -> type[Recipe]:
    """The recipe of that name (dashes and underscores are one)."""
    try:
        return RECIPES[name.replace("-", "_")]
    except KeyError:
        known = ", ".join(sorted(RECIPES)) or "none"
        raise ValueError(f"unknown recipe {name!r}; known: {known}") from None
