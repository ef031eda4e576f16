"""The demo: trains a small model on pictures that come along and shows what it has learned.

Content pictures are photographs from scikit-image. One style is a micrograph from there, the others
are drawn here: nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fastgan import drawing
from fastgan.images import find_images, load_image, save_image, to_float
from fastgan.inference import load_recipe
from fastgan.metrics import gram_distance, structure_correlation
from fastgan.models.features import RandomFeatures, grey
from fastgan.recipes import Recipe
from fastgan.recipes.style_transfer import StyleTransfer, StyleTransferRecipeConfig
from fastgan.training import Trainer
from fastgan.training.config import Output, Pictures, preset_config

__all__ = ["Demo", "Scores", "run_demo"]

_SIDE = 256  # shorter side of the pictures that are shown and judged, in pixels
_METRICS = "metrics.json"  # marks the folder of a demo
_JUDGE_SEED = 1  # of the random features that judge; training uses seed 0


@dataclasses.dataclass(frozen=True)
class Scores:
    """How the held-out photograph took on one style. Distances are relative, 0 is the style."""

    gram_content: float
    """`gram_distance` of the photograph to the style."""
    gram_result: float
    """`gram_distance` of the result to the style."""
    grey_gram_content: float
    """The same of grey, standardised pictures, where only texture counts."""
    grey_gram_result: float
    structure: float
    """`structure_correlation` of the result with the photograph."""
    structure_of_others: float
    """The highest with any other photograph, cut to the same shape."""

    @property
    def gram_drop(self) -> float:
        """Part of the distance to the style that is gone, at most 1."""
        return 1 - self.gram_result / self.gram_content

    @property
    def grey_gram_drop(self) -> float:
        """The same for texture alone."""
        return 1 - self.grey_gram_result / self.grey_gram_content


@dataclasses.dataclass(frozen=True)
class Demo:
    """What a demo left behind."""

    grid: Path
    alpha: Path
    curves: Path
    checkpoint: Path
    content: Path
    """The held-out photograph."""
    styles: Path
    """Folder of the style pictures."""
    scores: dict[str, Scores]
    """By style; ``metrics.json`` holds them too."""
    seconds: float
    """That training took."""


def run_demo(out: str | Path, *, steps: int, seed: int = 0, progress: bool = False) -> Demo:
    """Trains the lite preset for `steps` and stylizes a photograph that training has not seen.

    A demo that the folder `out` holds already is replaced; a folder that holds anything else is
    left alone. On a CPU the same seed gives the same pictures.

    Args:
        progress: show a progress bar on standard error.

    Raises:
        ValueError: `steps` is no positive number, or `out` cannot be written or holds other things.
        fastgan.training.TrainingError: as `Trainer.train`.
    """
    out = Path(out)
    config = preset_config(
        StyleTransfer,
        "lite",
        Pictures(content=out / "content", style=out / "style", workers=0),
        Output(out=out / "run", log_every=10, sample_every=100, keep=1, overwrite=True),
    )
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, steps=steps, seed=seed, ema_decay=0.99),
        recipe=StyleTransferRecipeConfig(lr_hold=steps // 2, lr_decay=12 / steps),
    )
    if out.is_dir() and any(out.iterdir()) and not _holds_demo(out):
        raise ValueError(
            f"out: {out} holds other things than a demo; name a new or an empty folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_metrics(out, 0, {})  # until the demo is finished
    _write_pictures(out)
    trainer = Trainer(StyleTransfer, config, progress=progress)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started

    checkpoint = trainer.folder.checkpoint(trainer.step)
    recipe = load_recipe(checkpoint)
    content = _load(out / "cat.png")
    styles = {path.stem: _load(path) for path in find_images(out / "style")}
    with torch.inference_mode():
        results = {name: recipe.stylize(content, style) for name, style in styles.items()}
    others = [_load(path) for path in find_images(out / "content")]
    scores = {
        name: _score(content, styles[name], result, others) for name, result in results.items()
    }
    _save_grid(out / "grid.png", content, styles, results)
    _save_alpha(out / "alpha.png", recipe, content, styles)
    _save_curves(out / "curves.png", config.output.out / "losses.jsonl")
    _write_metrics(out, steps, scores)
    return Demo(
        grid=out / "grid.png",
        alpha=out / "alpha.png",
        curves=out / "curves.png",
        checkpoint=checkpoint,
        content=out / "cat.png",
        styles=out / "style",
        scores=scores,
        seconds=seconds,
    )


# --- Pictures -----------------------------------------------------------------------------------


def _write_pictures(out: Path) -> None:
    """``content/``, ``style/`` and the held-out ``cat.png``."""
    content: dict[str, Callable[[], np.ndarray]] = {
        "astronaut": skimage.data.astronaut,
        "camera": skimage.data.camera,
        "coffee": skimage.data.coffee,
        "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
        "rocket": skimage.data.rocket,
    }
    style: dict[str, Callable[[], np.ndarray | Image.Image]] = {
        "glass": drawing.glass,
        "ink": drawing.ink,
        "night": drawing.night,
        "tissue": skimage.data.immunohistochemistry,
    }
    for folder, pictures in (("content", content), ("style", style)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for name, make in pictures.items():
            picture = make()
            if isinstance(picture, np.ndarray):
                picture = Image.fromarray(picture)
            picture.convert("RGB").save(out / folder / f"{name}.png")
    Image.fromarray(skimage.data.chelsea()).save(out / "cat.png")


def _load(path: Path) -> Tensor:
    """[1,3,H,W] with a shorter side of 256 pixels."""
    return to_float(TF.resize(load_image(path)[None], [_SIDE], antialias=True))


# --- Results ------------------------------------------------------------------------------------


def _score(content: Tensor, style: Tensor, result: Tensor, others: list[Tensor]) -> Scores:
    judge = RandomFeatures(seed=_JUDGE_SEED)
    shape = list(content.shape[2:])
    return Scores(
        gram_content=gram_distance(content, style, judge).item(),
        gram_result=gram_distance(result, style, judge).item(),
        grey_gram_content=gram_distance(grey(content), grey(style), judge).item(),
        grey_gram_result=gram_distance(grey(result), grey(style), judge).item(),
        structure=structure_correlation(result, content).item(),
        structure_of_others=max(
            structure_correlation(TF.resize(other, shape), content).item() for other in others
        ),
    )


def _holds_demo(out: Path) -> bool:
    try:
        numbers = json.loads((out / _METRICS).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(numbers, dict) and numbers.keys() == {"steps", "styles"}


def _write_metrics(out: Path, steps: int, scores: dict[str, Scores]) -> None:
    numbers = {
        "steps": steps,
        "styles": {name: dataclasses.asdict(score) for name, score in scores.items()},
    }
    (out / _METRICS).write_text(json.dumps(numbers, indent=2) + "\n")


def _save_grid(
    path: Path, content: Tensor, styles: dict[str, Tensor], results: dict[str, Tensor]
) -> None:
    """The content and, beside it, each style over its result."""
    height, width = content.shape[2:]
    middle = TF.pad(content, [0, height // 2], fill=1.0)
    columns = [middle] + [
        torch.cat([TF.center_crop(TF.resize(styles[name], [width]), [height, width]), result], 2)
        for name, result in results.items()
    ]
    save_image(torch.cat(columns, 3)[0], path)


def _save_alpha(path: Path, recipe: Recipe, content: Tensor, styles: dict[str, Tensor]) -> None:
    """Strength 0 to 1 from left to right, one row per style."""
    with torch.inference_mode():
        rows = [
            torch.cat([recipe.stylize(content, style, alpha=step / 4) for step in range(5)], 3)
            for style in styles.values()
        ]
    table = TF.resize(torch.cat(rows, 2), [_SIDE * len(rows) // 2], antialias=True)
    save_image(table[0], path)


def _save_curves(path: Path, losses: Path) -> None:
    """Losses by step: one panel per term of the generator, the discriminator in the last."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in losses.read_text().splitlines()]
    names = [name for name in lines[0] if name.startswith("generator/")]
    panels = [*names, "discriminator/discriminator"]
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot([line["step"] for line in lines], [line[name] for line in lines])
        axes.set(title=name.partition("/")[2], xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
