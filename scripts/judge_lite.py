"""Scores the checkpoint that comes with fastgan on photographs and styles it was not trained on.

    python scripts/judge_lite.py [--checkpoint FILE] [--grid grid.png]

Prints the table of ``fastgan/pretrained/README.md``: what is gone of the Gram distance to the
style, in colour and of grey pictures (texture alone), and what is left of the photograph's
structure. Then the distance to the style at five strengths.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pretrain_lite import HELD_OUT_KIND, HELD_OUT_PHOTOGRAPHS, HELD_OUT_STYLES, SHIPPED, photograph
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fastgan import drawing
from fastgan.images import from_pil, save_image, to_float
from fastgan.inference import load_recipe
from fastgan.metrics import gram_distance, structure_correlation
from fastgan.models.features import RandomFeatures, grey
from fastgan.recipes import Recipe

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
JUDGE_SEED = 1  # of the features that judge; training uses seed 0


def held_out_photographs() -> dict[str, Image.Image]:
    return {name: photograph(name) for name in HELD_OUT_PHOTOGRAPHS}


def held_out_styles() -> dict[str, Image.Image]:
    """A micrograph, drawings in palettes of their own, and a kind of drawing never trained on."""
    random = np.random.default_rng(11)
    marbled = drawing.KINDS[HELD_OUT_KIND](random, drawing.random_palette(random), 1)
    drawn = {"night": drawing.night(), "glass": drawing.glass(), "ink": drawing.ink()}
    return {name: photograph(name) for name in HELD_OUT_STYLES} | drawn | {HELD_OUT_KIND: marbled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--grid", type=Path, help="picture to write: styles over their results")
    flags = parser.parse_args()
    recipe = load_recipe(flags.checkpoint)
    judge = RandomFeatures(seed=JUDGE_SEED)
    contents = {name: tensor(picture) for name, picture in held_out_photographs().items()}
    styles = {name: tensor(picture) for name, picture in held_out_styles().items()}
    rows, table, by_strength = [], [], {}
    for photo, content in contents.items():
        results = []
        for name, style in styles.items():
            renderings = at_strengths(recipe, content, style)
            plain, result = renderings[0], renderings[-1]
            results.append(result)
            in_colour = 1 - distance(result, style, judge) / distance(content, style, judge)
            texture = 1 - distance(grey(result), grey(style), judge) / distance(
                grey(content), grey(style), judge
            )
            structure = structure_correlation(result, content).item()
            error = (plain - content).abs().mean().item() / 2
            table.append((in_colour, texture, structure, error))
            print(f"| {photo} | {name} | {in_colour:.2f} | {texture:.2f} | {structure:.2f} |")
            by_strength[photo, name] = [
                distance(rendering, style, judge) for rendering in renderings
            ]
        rows.append(columns(content, list(styles.values()), results))
    names = ("colour", "texture", "structure", "error at alpha 0")
    for name, values in zip(names, zip(*table, strict=True), strict=True):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name}: {low:.3f} to {high:.3f}, median {middle:.3f}")
    for (photo, name), distances in by_strength.items():
        print(photo, name, "at", *STRENGTHS, ":", *(f"{value:.3f}" for value in distances))
    if flags.grid:
        width = rows[0].shape[3]
        save_image(
            torch.cat([TF.resize(row, [row.shape[2], width]) for row in rows], 2)[0], flags.grid
        )


def at_strengths(recipe: Recipe, content: Tensor, style: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [recipe.stylize(content, style, alpha=alpha) for alpha in STRENGTHS]


def distance(images: Tensor, styles: Tensor, judge: RandomFeatures) -> float:
    return gram_distance(images, styles, judge).item()


def tensor(picture: Image.Image) -> Tensor:
    """[1,3,H,W] in [-1, 1]."""
    return to_float(from_pil(picture)[None])


def columns(content: Tensor, styles: list[Tensor], results: list[Tensor]) -> Tensor:
    """The photograph and, beside it, each style over its result."""
    height, width = content.shape[2:]
    pairs = [
        torch.cat([TF.center_crop(TF.resize(style, [width]), [height, width]), result], 2)
        for style, result in zip(styles, results, strict=True)
    ]
    return torch.cat([TF.pad(content, [0, height // 2], fill=1.0), *pairs], 3)


if __name__ == "__main__":
    main()
