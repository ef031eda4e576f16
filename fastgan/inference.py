"""Pictures in, pictures out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastgan import checkpoint as checkpoints
from fastgan.device import choose_device
from fastgan.images import ImageError, find_images, load_image, save_image, to_float
from fastgan.recipes import Recipe, recipe_class
from fastgan.recipes.cyclegan import PUBLIC_GENERATORS, CycleGAN
from fastgan.recipes.serialize import from_json
from fastgan.run_folder import RunFolder

__all__ = ["load_recipe", "stylize"]

log = logging.getLogger(__name__)

_WRITABLE = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def load_recipe(path: str | Path, device: torch.device | str = "cpu") -> Recipe:
    """The trained networks in the checkpoint `path`, with their averaged weights, ready to use.

    Args:
        path: a checkpoint, or the folder of a run, whose newest checkpoint is taken, or a folder
            with the generators of the public CycleGAN code.

    Raises:
        fastgan.checkpoint.CheckpointError: no checkpoint can be read there.
        ValueError: it is of a recipe or a version that this fastgan does not know.
    """
    path = Path(path)
    if any((path / name).exists() for name in PUBLIC_GENERATORS):
        recipe: Recipe = CycleGAN.from_public_code(path)
    else:
        recipe = _load_checkpoint(path)
    recipe.requires_grad_(False)
    return recipe.to(device).to(memory_format=torch.channels_last).eval()


def _load_checkpoint(path: Path) -> Recipe:
    if path.is_dir():
        newest = RunFolder(path).newest()
        if newest is None:
            raise ValueError(f"checkpoint: no run with a checkpoint in {path}")
        path = newest
    state = checkpoints.load(path)
    if not isinstance(state, dict) or not {"recipe", "config", "networks", "average"} <= set(state):
        raise ValueError(f"{path}: holds no trained networks")
    try:
        kind = recipe_class(state["recipe"])
        recipe = kind(from_json(kind.config_class, state["config"]["recipe"], "config.recipe"))
        recipe.load_state_dict(state["networks"])
        # Apart, because a weight that networks share has one name here and two names there.
        recipe.load_state_dict(state["average"], strict=False)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} (fastgan {state.get('fastgan')}): {reason}") from None
    return recipe


def stylize(
    checkpoint: str | Path,
    content: str | Path | Sequence[str | Path],
    style: str | Path | None,
    out: str | Path,
    *,
    alpha: float = 1.0,
    direction: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[Path]:
    """Renders content pictures in the style of another picture, or as pictures of another domain.

    Each result has the size of its content picture. One content file and an `out` that ends like
    a picture give that file; otherwise `out` is a folder, which mirrors the names of the content
    files and, for content folders, the tree below them. Content that is no readable picture is
    skipped with a warning. Returns the files written.

    Args:
        checkpoint: as in `load_recipe`.
        content: files and folders of pictures; folders are searched at any depth.
        style: one picture; None where the recipe of the checkpoint has directions.
        alpha: strength of the style, 0 (the content, reconstructed) to 1.
        direction: "AtoB" or "BtoA" where the recipe has directions.
        device: cpu, cuda, mps (default: a GPU if there is one).
        progress: show a progress bar on standard error.

    Raises:
        ValueError, OSError: an argument does not serve; raised before anything is written.
        fastgan.checkpoint.CheckpointError: the checkpoint cannot be read.
        fastgan.images.ImageError: the style, or all of the content, is no readable picture.
    """
    given = [content] if isinstance(content, str | Path) else content
    if not given:
        raise ValueError("content: expected at least one file or folder, got none")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    targets = _targets([Path(path) for path in given], Path(out))
    where = choose_device(device)
    recipe = load_recipe(checkpoint, where)
    if direction is not None and not recipe.directions:
        raise ValueError(f"direction: {recipe.name} has none, its style picture decides")
    style_picture = None if style is None else _load(Path(style), where)
    written: list[Path] = []
    for source, target in tqdm(
        targets.items(), disable=not progress or len(targets) == 1, unit="picture"
    ):
        try:
            picture = _load(source, where)
        except ImageError as error:
            if len(targets) == 1:
                raise
            log.warning("skipped %s", error)
            continue
        with torch.inference_mode():
            result = recipe.stylize(picture, style_picture, alpha=alpha, direction=direction)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_image(result[0], target)
        written.append(target)
    if not written:
        raise ValueError(f"content: none of {len(targets)} files is a readable picture")
    return written


def _load(path: Path, device: torch.device) -> Tensor:
    """One picture as float [1,3,H,W]."""
    return to_float(load_image(path).unsqueeze(0).to(device))


def _targets(content: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Content files, each with the file its result goes to."""
    targets: dict[Path, Path] = {}
    for given in content:
        found = find_images(given)
        if not found:
            raise ValueError(f"content: no pictures in {given}")
        root = given if given.is_dir() else given.parent
        for source in found:
            writable = source.suffix.lower() in _WRITABLE
            name = source.relative_to(root)
            targets[source] = out / (name if writable else name.with_suffix(".png"))
    single = len(content) == 1 and not content[0].is_dir()
    if not out.is_dir():
        if out.suffix.lower() in _WRITABLE and not single:
            raise ValueError(f"out: must be a folder for more than one picture, got {out}")
        if out.suffix and single:
            if out.suffix.lower() not in _WRITABLE:
                raise ValueError(f"out: {out} must end in one of {', '.join(sorted(_WRITABLE))}")
            targets = {content[0]: out}
    _refuse_to_overwrite(targets)
    return targets


def _refuse_to_overwrite(targets: Mapping[Path, Path]) -> None:
    """No result may take the place of a content picture or of another result."""
    sources = {source.resolve() for source in targets}
    taken: dict[Path, Path] = {}
    for source, target in targets.items():
        if target.resolve() in sources:
            raise ValueError(f"out: {target} would overwrite a content picture")
        if target in taken:
            raise ValueError(f"out: {taken[target]} and {source} would both become {target}")
        taken[target] = source
