"""Trains the checkpoint that comes with fastgan: the lite preset, for styles it has never seen.

    OMP_NUM_THREADS=1 python scripts/pretrain_lite.py --out runs/pretrained

Content is a few free photographs from scikit-image's wheel in several framings and colours; styles
are free textures from there and pictures drawn by `fastgan.drawing`. Nothing is downloaded. A run
that was stopped goes on where it was; on a CPU with the same number of threads the result is the
same to the bit. `HELD_OUT_PHOTOGRAPHS`, `HELD_OUT_STYLES` and the drawings of the kind `marble` are
never trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image

from fastgan import checkpoint, drawing
from fastgan.recipes.style_transfer import StyleTransfer, StyleTransferRecipeConfig
from fastgan.training import Trainer
from fastgan.training.config import Output, Pictures, TrainConfig, preset_config

SEED = 0
DRAWN_PER_KIND = 22
SHIPPED = Path(__file__).parents[1] / "fastgan" / "pretrained" / "lite.safetensors"

PHOTOGRAPHS = ("astronaut", "camera", "clock", "coins", "hubble_deep_field", "retina", "rocket")
TEXTURES = ("brick", "cell", "grass", "gravel", "hubble_deep_field", "retina")
HELD_OUT_PHOTOGRAPHS = ("chelsea", "coffee")
HELD_OUT_STYLES = ("immunohistochemistry",)
HELD_OUT_KIND = "marble"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training; the next goes on from its last step."""

    until: int
    """Its last step."""
    size: int
    batch_size: int
    ema_decay: float
    losses: StyleTransferRecipeConfig


_PALETTES = StyleTransferRecipeConfig(
    weight_adversarial=0.0,
    weight_identity=5.0,  # what makes the style encoder speak of hues, for many styles
    weight_statistics=2.0,
    beta1=0.9,
    lr_hold=2000,
    lr_decay=0.004,
)
_TEXTURES = dataclasses.replace(
    _PALETTES,
    weight_content=2.0,
    weight_texture=1.0,
    weight_adversarial=0.25,
    weight_strength=5.0,
    weight_variation=1.0,
)
_STRENGTH = dataclasses.replace(_TEXTURES, weight_strength=10.0)
_EVENNESS = dataclasses.replace(
    _STRENGTH,
    weight_texture=2.0,
    weight_reconstruction=15.0,
    weight_strength=20.0,
    lr=5e-4,
    lr_discriminator=2e-4,
    lr_hold=3360,
    lr_decay=0.0015,
)
_SMOOTHNESS = dataclasses.replace(_EVENNESS, weight_reconstruction=30.0, weight_variation=3.0)

STAGES = (
    # Many styles per step and small crops: the palettes, which need steps more than pixels. An
    # adversary that does not know which style is wanted would only pull towards a common tint.
    Stage(2000, size=64, batch_size=8, ema_decay=0.999, losses=_PALETTES),
    # Larger crops: cleaner textures, less of them, and a strength that acts evenly.
    Stage(3061, size=128, batch_size=4, ema_decay=0.999, losses=_TEXTURES),
    # With an average that soon forgets the stages before.
    Stage(3360, size=128, batch_size=4, ema_decay=0.99, losses=_STRENGTH),
    # The learning rate rises again. Strength 0 gives the picture back, every quarter more acts.
    Stage(9000, size=128, batch_size=4, ema_decay=0.999, losses=_EVENNESS),
    # Fewer coloured fringes.
    Stage(11000, size=128, batch_size=4, ema_decay=0.999, losses=_SMOOTHNESS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="the file to write")
    flags = parser.parse_args()
    run = train(flags.out)
    strip(run, flags.checkpoint)
    print(f"{flags.checkpoint}: {flags.checkpoint.stat().st_size / 1e6:.2f} MB")


def train(out: Path) -> Path:
    """Trains in the folder `out`; the last checkpoint."""
    if not (out / "pictures").exists():
        write_pictures(out / "pictures.tmp", np.random.default_rng(SEED))
        (out / "pictures.tmp").rename(out / "pictures")
    for stage in STAGES:
        trainer = Trainer(StyleTransfer, stage_config(stage, out), progress=True)
        trainer.train()
    return trainer.folder.checkpoint(trainer.step)


def stage_config(stage: Stage, out: Path) -> TrainConfig:
    config = preset_config(
        StyleTransfer,
        "lite",
        Pictures(out / "pictures" / "content", out / "pictures" / "style", workers=0, strict=True),
        Output(out / "run", checkpoint_every=250, sample_every=250, keep=2, resume=True),
    )
    return dataclasses.replace(
        config,
        training=dataclasses.replace(
            config.training,
            steps=stage.until,
            batch_size=stage.batch_size,
            ema_decay=stage.ema_decay,
            seed=SEED,
            device="cpu",
        ),
        augmentation=dataclasses.replace(config.augmentation, size=stage.size, jitter=0.2),
        recipe=stage.losses,
    )


def strip(run: Path, path: Path) -> None:
    """Writes what inference needs of the checkpoint `run`: settings, averaged generator, fp16."""
    state = checkpoint.load(run)
    average = {name: value.half() for name, value in state["average"].items()}
    networks = {name: average[name] for name in state["networks"] if name in average}
    config = {"recipe": state["config"]["recipe"]}
    kept = {key: state[key] for key in ("fastgan", "recipe", "step")}
    checkpoint.save(path, {**kept, "config": config, "networks": networks, "average": average})


# --- Pictures -----------------------------------------------------------------------------------


def write_pictures(folder: Path, random: np.random.Generator) -> None:
    """The folders ``content`` and ``style``."""
    content: dict[str, Image.Image] = {}
    for name in PHOTOGRAPHS:
        for number, picture in enumerate(framings(photograph(name), random)):
            for variant, coloured in recoloured(picture, random).items():
                content[f"{name}-{number}-{variant}"] = coloured
    style = {name: photograph(name) for name in TEXTURES}
    style |= {f"{name}-{n}": tinted(photograph(name), random) for name in TEXTURES for n in (1, 2)}
    kinds = [kind for kind in drawing.KINDS if kind != HELD_OUT_KIND]
    for kind, number in itertools.product(kinds, range(DRAWN_PER_KIND)):
        scale = float(np.exp(random.uniform(np.log(0.5), np.log(2))))
        palette = drawing.random_palette(random)
        style[f"{kind}-{number:02}"] = drawing.KINDS[kind](random, palette, scale)
    for domain, pictures in (("content", content), ("style", style)):
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            picture.convert("RGB").save(folder / domain / f"{name}.png")


def photograph(name: str) -> Image.Image:
    picture: Any = getattr(skimage.data, name)()
    return Image.fromarray(picture)


def framings(picture: Image.Image, random: np.random.Generator) -> list[Image.Image]:
    """The picture and two squares out of it, so that things appear at several sizes."""
    result = [picture]
    for share in (0.75, 0.5):
        side = int(share * min(picture.size))
        left, top = (int(random.integers(length - side + 1)) for length in picture.size)
        result.append(picture.crop((left, top, left + side, top + side)))
    return result


def recoloured(picture: Image.Image, random: np.random.Generator) -> dict[str, Image.Image]:
    """The picture and one of other colours: few photographs have to stand for all."""
    if picture.mode == "L":
        return {"grey": picture, "tinted": tinted(picture, random)}
    channels = picture.split()
    return {
        "own": picture,
        "swapped": Image.merge("RGB", [channels[i] for i in random.permutation(3)]),
    }


def tinted(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """Brightness shown in the colours of a random palette."""
    palette = drawing.random_palette(random)
    light = np.asarray(picture.convert("L")) / 255
    places = np.linspace(0, 1, len(palette))
    channels = [np.interp(light, places, palette[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


if __name__ == "__main__":
    main()
