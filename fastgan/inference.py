"""Pictures in, pictures out."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from PIL import Image
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"fastgan.inference needs Pillow and tqdm: pip install 'fastgan[train]' ({error})"
    ) from error

from fastgan import checkpoint as checkpoints
from fastgan.device import Precision, choose_device, choose_precision, is_out_of_memory
from fastgan.images import (
    ImageError,
    WriteError,
    find_images,
    from_pil,
    image_size,
    load_image,
    no_pictures,
    save_image,
    to_float,
    to_pil,
    to_uint8,
)
from fastgan.models.features import brightness
from fastgan.models.resnet import load_cyclegan_generator
from fastgan.recipes import Recipe, recipe_class
from fastgan.recipes.cyclegan import PUBLIC_GENERATORS, CycleGAN, CycleGANConfig
from fastgan.recipes.recipe import Style
from fastgan.recipes.serialize import from_json
from fastgan.reference import widen
from fastgan.run_folder import RunFolder

__all__ = ["keep_color", "load_recipe", "pretrained_checkpoint", "stylize"]

log = logging.getLogger(__name__)

File: TypeAlias = str | Path
Picture: TypeAlias = File | Image.Image | Tensor
"""A file, a Pillow image, or a tensor [3,H,W] or [B,3,H,W], uint8 or float in [-1, 1]."""
Styles: TypeAlias = Picture | Sequence[Picture] | None

_WRITABLE = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_PUBLIC_GENERATOR = "latest_net_G.pth"  # as the public code calls one that it offers alone
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_THREADS = 4  # that decode and encode files beside the networks


def pretrained_checkpoint() -> Path:
    """The lite checkpoint of the style_transfer recipe that comes with fastgan.

    Raises:
        FileNotFoundError: this installation lacks it.
    """
    path = Path(__file__).parent / "pretrained" / "lite.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint: this installation lacks the pretrained one, {path}; reinstall fastgan, "
            "or name a checkpoint of your own"
        )
    return path


def load_recipe(path: File, device: torch.device | str = "cpu") -> Recipe:
    """The trained networks in the checkpoint `path`, with their averaged weights, ready to use.

    Args:
        path: a checkpoint, or the folder of a run, whose newest checkpoint is taken, or a folder
            with the generators of the public CycleGAN code, or one of them, a ``.pth`` file. Of one
            the recipe has one direction, AtoB; that of ``latest_net_G_B.pth`` is BtoA.

    Raises:
        fastgan.checkpoint.CheckpointError: no checkpoint can be read there.
        ValueError: it is of a recipe or a version that this fastgan does not know.
        OSError: a generator of the public code cannot be read.
    """
    path = Path(path)
    if any((path / name).exists() for name in PUBLIC_GENERATORS):
        recipe: Recipe = CycleGAN.from_public_code(path)
    elif (path / _PUBLIC_GENERATOR).exists():
        recipe = _one_way(path / _PUBLIC_GENERATOR)
    elif path.suffix == ".pth" and not path.is_dir():
        recipe = _one_way(path)
    else:
        recipe = _load_checkpoint(path)
    recipe.requires_grad_(False)
    return recipe.to(device).to(memory_format=torch.channels_last).eval()


def _one_way(path: Path) -> CycleGAN:
    """With one generator of the public CycleGAN code, and its direction alone."""
    generator = load_cyclegan_generator(path)
    width, blocks = generator.head.in_channels, len(generator.blocks)
    recipe = CycleGAN(CycleGANConfig(width=width, residual_blocks=blocks))
    direction = "BtoA" if path.name == PUBLIC_GENERATORS[1] else "AtoB"
    recipe.generators = nn.ModuleDict({direction: generator})
    recipe.directions = (direction,)  # type: ignore[misc]  # of this recipe, not of its class
    return recipe


def _load_checkpoint(path: Path) -> Recipe:
    if path.is_dir():
        newest = RunFolder(path).newest()
        if newest is None:
            raise ValueError(f"checkpoint: no run with a checkpoint in {path}")
        path = newest
    state = checkpoints.load(path)
    parts = {"recipe": str, "config": dict, "networks": dict, "average": dict}
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), kind) for name, kind in parts.items()
    ):
        raise ValueError(f"{path}: holds no trained networks")
    try:
        kind = recipe_class(state["recipe"])
        recipe = kind(from_json(kind.config_class, state["config"].get("recipe"), "config.recipe"))
        recipe.load_state_dict({**_of_training_alone(recipe), **state["networks"]})
        # Apart, because a weight that networks share has one name here and two names there.
        recipe.load_state_dict(state["average"], strict=False)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} (fastgan {state.get('fastgan')}): {reason}") from None
    return recipe


def _of_training_alone(recipe: Recipe) -> dict[str, Tensor]:
    """The part of the state dict that a checkpoint for inference may leave out: discriminators."""
    used = {
        id(value)
        for network in recipe.networks("generator")
        for value in network.state_dict(keep_vars=True).values()
    }
    state = recipe.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if id(value) not in used}


@overload
def stylize(content: File | Image.Image, style: Styles = ..., **options: Any) -> Image.Image: ...
@overload
def stylize(content: Tensor, style: Styles = ..., **options: Any) -> Tensor: ...
@overload
def stylize(
    content: File | Sequence[File], style: Styles, out: File, **options: Any
) -> list[Path]: ...
def stylize(  # type: ignore[misc]  # the options of the overloads are the keywords here
    content: Picture | Sequence[File],
    style: Styles = None,
    out: File | None = None,
    *,
    checkpoint: File | Recipe | None = None,
    style_weights: Sequence[float] | None = None,
    alpha: float = 1.0,
    keep_color: bool = False,
    direction: str | None = None,
    max_side: int | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    batch_size: int = 1,
    strict: bool = False,
    progress: bool = False,
) -> Image.Image | Tensor | list[Path]:
    """Renders pictures in the style of others, or as pictures of another domain.

    ``stylize("cat.jpg", "wave.jpg")`` returns a Pillow image, a tensor for a tensor (on its device,
    in its dtype and range). With `out`, files and folders are rendered to files, whose paths are
    returned: one content file and an `out` that ends like a picture give that file; otherwise `out`
    is a folder, which mirrors the names of the content files and, for content folders, the tree
    below them. Where two results would have one name, one of them is numbered, with a warning.

    Each result has the size of its content picture, whatever that is. Content is decoded to upright
    RGB of 8 bits.

    Args:
        content: a picture; with `out` files and folders, which are searched at any depth.
        style: one picture or several; None where the recipe of the checkpoint has directions. A
            folder is one style, the mean of all pictures in it. A tensor [B,3,H,W] has a style for
            each of B pictures in a tensor.
        out: a picture file or a folder.
        checkpoint: as in `load_recipe`, or a recipe that it gave, which saves loading it again;
            None for the pretrained one.
        style_weights: one number per style, not negative; they are divided by their sum. Equal by
            default. What is mixed is the feature maps that AdaIN gives for each style.
        alpha: strength of the style, 0 (the content, reconstructed) to 1.
        keep_color: give the result the colours of the content, as `keep_color` does.
        direction: "AtoB" or "BtoA" where the recipe has directions.
        max_side: reduce pictures with a longer side than this, in pixels, to it first.
        device: cpu, cuda, mps (default: a GPU if there is one).
        precision: fp32, bf16 or fp16 (default: bf16 on GPUs of capability 8.0 and up, fp16 on
            older ones, fp32 elsewhere).
        batch_size: with `out`, so many pictures of one size at a time.
        strict: a file in a folder that is no readable picture is an error; otherwise it is skipped
            with a warning.
        progress: with `out`, show a progress bar on standard error.

    Raises:
        ValueError, TypeError, OSError: an argument does not serve; raised before anything is
            written.
        fastgan.checkpoint.CheckpointError: the checkpoint cannot be read.
        fastgan.images.ImageError: the style, or all of the content, is no readable picture.
        fastgan.images.WriteError: a result could not be written; those before it are.
        MemoryError: memory ran out; says at which sizes, and what helps.

    Source: of the mixing, Huang, Belongie, "Arbitrary Style Transfer in Real-time with Adaptive
    Instance Normalization", 2017.
    """
    if not (isinstance(alpha, Real) and 0.0 <= alpha <= 1.0):
        raise ValueError(f"alpha must be a number in [0, 1], got {alpha!r}")
    for name, count in (("batch_size", batch_size), ("max_side", max_side)):
        if count is not None and not (isinstance(count, Integral) and count >= 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
    styles = [_pictures_of(entry) for entry in _as_list(style)]
    weights = _normalised(style_weights, len(styles))
    targets: dict[Path, Path] = {}
    if out is not None:
        targets = _targets([_as_path(entry) for entry in _as_list(content)], Path(out))
        style_files = [Path(p) for p in itertools.chain(*styles) if isinstance(p, str | Path)]
        _refuse_to_overwrite(targets.values(), [*targets, *style_files])
    elif not isinstance(content, Tensor | Image.Image):
        _refuse_several(content)
    _check_batches(content, itertools.chain(*styles))
    recipe = _recipe(checkpoint, device, precision)
    if direction is not None and not recipe.directions:
        raise ValueError(f"direction: {recipe.name} has none, its style picture decides")
    mixed = _mixed_style(recipe, styles, weights, max_side, strict)

    def render(pictures: Tensor) -> Tensor:
        with _memory_errors(recipe, pictures):
            return _render(recipe, pictures, mixed, alpha, direction, keep_color)

    if out is not None:
        return _render_files(targets, render, max_side, batch_size, strict, progress)
    picture = _load(content, max_side)
    # A copy, because tensors made in inference mode are of no use to autograd.
    result = render(picture if picture.ndim == 4 else picture[None]).clone().view_as(picture)
    return result if isinstance(content, Tensor) else to_pil(result)


@torch.inference_mode()
def _render(
    recipe: Recipe,
    pictures: Tensor,
    style: Style | None,
    alpha: float,
    direction: str | None,
    color: bool,
) -> Tensor:
    """Pictures [B,3,H,W] to results of the same range, dtype and device."""
    images = _prepared(recipe, pictures)
    result = recipe.stylize(images, style, alpha=alpha, direction=direction)
    if color:
        result = keep_color(result, _floats(pictures.to(result.device)))
    if pictures.dtype == torch.uint8:
        result = to_uint8(result)
    return result.to(pictures)


def keep_color(result: Tensor, content: Tensor) -> Tensor:
    """The brightness of one picture with the colours of another, both [B,3,H,W] in [-1, 1].

    In YIQ the result has the Y of `result` and the I and Q of `content`. Since all three of R, G
    and B grow with Y alike, that is ``content + Y(result) - Y(content)``; what leaves [-1, 1] is
    clamped, where alone I and Q differ. At least fp32.

    Source: Gatys, Bethge, Hertzmann, Shechtman, "Preserving Color in Neural Artistic Style
    Transfer", 2016 (luminance-only transfer).
    """
    return (widen(content) + (brightness(result) - brightness(content))).clamp(-1, 1)


# --- Arguments ----------------------------------------------------------------------------------


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    several = isinstance(given, Sequence) and not isinstance(given, str)
    return list(given) if several else [given]


def _as_path(given: Any) -> Path:
    if not isinstance(given, str | Path):
        raise TypeError(
            f"content: with out, expected files and folders, got {type(given).__name__}"
        )
    return Path(given)


def _pictures_of(style: Picture) -> list[Picture]:
    """The pictures of a folder, or the one that is given."""
    if not (isinstance(style, str | Path) and Path(style).is_dir()):
        return [style]
    found = find_images(style)
    if not found:
        raise ValueError(f"style: {no_pictures(style)}")
    return list(found)


def _refuse_several(content: Any) -> None:
    several = isinstance(content, Sequence) and not isinstance(content, str)
    if several or (isinstance(content, str | Path) and Path(content).is_dir()):
        raise TypeError("content: several pictures need a folder for the results, out")


def _check_batches(content: Any, styles: Iterable[Picture]) -> None:
    batch = len(content) if isinstance(content, Tensor) and content.ndim == 4 else 1
    for style in styles:
        if isinstance(style, Tensor) and style.ndim == 4 and len(style) not in (1, batch):
            wanted = "1 picture" if batch == 1 else f"1 or {batch} pictures, as content has"
            raise ValueError(f"style: a tensor must hold {wanted}, got {len(style)}")


def _normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """One weight per style, of sum 1."""
    try:
        given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise TypeError(f"style_weights must be a list of numbers, got {weights!r}") from None
    if len(given) != count:
        raise ValueError(
            f"style_weights must be one number per style, {count} here, got {len(given)}"
        )
    if given and not (all(0 <= weight < math.inf for weight in given) and sum(given) > 0):
        raise ValueError(f"style_weights must be finite, not negative and not all 0, got {given}")
    return [weight / sum(given) for weight in given]


def _recipe(
    checkpoint: File | Recipe | None, device: str | None, precision: Precision | None
) -> Recipe:
    if isinstance(checkpoint, Recipe):
        if device is not None or precision is not None:
            raise ValueError("device and precision: the recipe given as checkpoint has its own")
        return checkpoint
    where = choose_device(device)
    dtype = _DTYPES[choose_precision(precision, where)]
    return load_recipe(pretrained_checkpoint() if checkpoint is None else checkpoint, where).to(
        dtype
    )


def _mixed_style(
    recipe: Recipe,
    styles: Sequence[Sequence[Picture]],
    weights: Sequence[float],
    max_side: int | None,
    strict: bool,
) -> Style | None:
    """All styles as one; None where there are none, which the recipe may or may not accept."""
    if not styles:
        return None
    if recipe.directions:
        raise ValueError(f"style: {recipe.name} takes none, its direction decides")
    encoded: list[Style] = []
    shares: list[float] = []
    for pictures, weight in zip(styles, weights, strict=True):
        must = strict or len(pictures) == 1
        tried = [_encoded(recipe, picture, max_side, must) for picture in pictures]
        found = [style for style in tried if style is not None]
        if not found:
            raise ValueError(f"style: none of {len(pictures)} files is a readable picture")
        encoded += found
        shares += [weight / len(found)] * len(found)
    return recipe.mix_styles(encoded, shares)


def _encoded(recipe: Recipe, picture: Picture, max_side: int | None, strict: bool) -> Style | None:
    """One style picture as the recipe wants it; None for a file that is none."""
    try:
        image = _load(picture, max_side)
    except ImageError as error:
        if strict:
            raise
        log.warning("skipped %s", error)
        return None
    image = image if image.ndim == 4 else image[None]
    with _memory_errors(recipe, image), torch.inference_mode():
        return recipe.encode_style(_prepared(recipe, image))


def _load(picture: Any, max_side: int | None) -> Tensor:
    """[3,H,W] or, of a tensor, [B,3,H,W], no side longer than `max_side`."""
    if isinstance(picture, Tensor):
        if picture.ndim not in (3, 4) or picture.shape[-3] != 3 or picture.numel() == 0:
            raise ValueError(
                f"a picture must be [3, H, W] or [B, 3, H, W], got {list(picture.shape)}"
            )
        if not (picture.is_floating_point() or picture.dtype == torch.uint8):
            raise TypeError(f"a picture must be uint8 or float in [-1, 1], got {picture.dtype}")
        tensor = picture.detach()
    elif isinstance(picture, Image.Image):
        tensor = from_pil(picture)
    elif isinstance(picture, str | Path):
        tensor = load_image(picture)
    else:
        raise TypeError(
            f"a picture must be a file, a Pillow image or a tensor, got {type(picture).__name__}"
        )
    height, width = tensor.shape[-2:]
    size = _reduced(height, width, max_side)
    if size == (height, width):
        return tensor
    batch = tensor if tensor.ndim == 4 else tensor[None]
    floats = batch.float() if batch.dtype == torch.uint8 else widen(batch)  # for every device
    smaller = F.interpolate(floats, size, mode="bilinear", antialias=True)
    smaller = (smaller.round() if batch.dtype == torch.uint8 else smaller).to(batch.dtype)
    return smaller if tensor.ndim == 4 else smaller[0]


def _reduced(height: int, width: int, max_side: int | None) -> tuple[int, int]:
    longest = max(height, width)
    if max_side is None or longest <= max_side:
        return height, width
    return max(1, round(height * max_side / longest)), max(1, round(width * max_side / longest))


def _prepared(recipe: Recipe, pictures: Tensor) -> Tensor:
    """[B,3,H,W] as the networks of `recipe` take it."""
    weight = next(recipe.parameters())
    images = _floats(pictures.to(weight.device)).to(weight.dtype)
    return images.contiguous(memory_format=torch.channels_last)


def _floats(pictures: Tensor) -> Tensor:
    return to_float(pictures) if pictures.dtype == torch.uint8 else pictures


@contextlib.contextmanager
def _memory_errors(recipe: Recipe, pictures: Tensor) -> Iterator[None]:
    """Turns the ways of PyTorch to say 'out of memory' into a MemoryError that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        batch, _, height, width = pictures.shape
        weight = next(recipe.parameters())
        flags = ["a smaller --batch-size"] if batch > 1 else []
        flags += ["a smaller --max-side"]
        if weight.device.type != "cpu":
            flags += ["--precision bf16"] if weight.dtype == torch.float32 else []
            flags += ["--device cpu"]
        raise MemoryError(
            f"out of memory: {batch} {'picture' if batch == 1 else 'pictures'} of {width}x{height} "
            f"px in {str(weight.dtype).removeprefix('torch.')} on {weight.device}; "
            f"{' or '.join(flags)} will help"
        ) from error


# --- Files --------------------------------------------------------------------------------------


def _targets(content: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Content files, each with the file its result goes to."""
    if not content:
        raise ValueError("content: expected at least one file or folder, got none")
    names: dict[Path, Path] = {}
    seen: set[str] = set()
    for given in content:
        found = find_images(given)
        if not found:
            raise ValueError(f"content: {no_pictures(given)}")
        root = given if given.is_dir() else given.parent
        for source in found:
            if os.path.abspath(source) not in seen:
                seen.add(os.path.abspath(source))
                names[source] = source.relative_to(root)
    single = len(content) == 1 and not content[0].is_dir()
    if not out.is_dir():
        if out.suffix.lower() in _WRITABLE and not single:
            raise ValueError(
                f"out: must be a folder where content is a folder or several files, got {out}"
            )
        if out.suffix and single:
            if out.suffix.lower() not in _WRITABLE:
                raise ValueError(f"out: {out} must end in one of {', '.join(sorted(_WRITABLE))}")
            return {content[0]: out}
    return _without_collisions(names, out)


def _without_collisions(names: Mapping[Path, Path], out: Path) -> dict[Path, Path]:
    """The files in `out` for sources with these names, which are kept if they can be."""
    kept = {source: name.suffix.lower() in _WRITABLE for source, name in names.items()}
    taken: dict[Path, Path] = {}
    for source in sorted(names, key=lambda source: not kept[source]):
        wanted = out / (names[source] if kept[source] else names[source].with_suffix(".png"))
        target = wanted
        for number in itertools.count(2):
            if target not in taken:
                break
            target = wanted.with_stem(f"{wanted.stem}_{number}")
        if target != wanted:
            log.warning("%s becomes %s: %s becomes %s", source, target, taken[wanted], wanted)
        taken[target] = source
    target_of = {source: target for target, source in taken.items()}
    return {source: target_of[source] for source in names}


def _refuse_to_overwrite(targets: Iterable[Path], inputs: Iterable[Path]) -> None:
    real = {os.path.realpath(path) for path in inputs}
    for target in targets:
        if os.path.realpath(target) in real:
            raise ValueError(f"out: {target} would overwrite a content or style picture")


def _render_files(
    targets: Mapping[Path, Path],
    render: Callable[[Tensor], Tensor],
    max_side: int | None,
    batch_size: int,
    strict: bool,
    progress: bool,
) -> list[Path]:
    """Decodes and encodes files in threads while the networks work."""
    single = len(targets) == 1
    written: set[Path] = set()
    saves: deque[Future[Path]] = deque()

    def finish_saves(but: int) -> None:
        while len(saves) > but:
            written.add(saves.popleft().result())

    with (
        tqdm(total=len(targets), disable=not progress or single, unit="picture") as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for batch in _batches(pool, list(targets), max_side, batch_size, strict or single):
            results = render(torch.stack([picture for _, picture in batch]))
            for (source, _), result in zip(batch, results, strict=True):
                saves.append(pool.submit(_save, result, targets[source]))
            finish_saves(but=_THREADS)
            bar.update(len(batch))
        finish_saves(but=0)
    unreadable = len(targets) - len(written)
    if not written:
        raise ValueError(f"content: none of {unreadable} files is a readable picture")
    if unreadable:
        log.warning("%d of %d files are no readable pictures", unreadable, len(targets))
    return [target for target in targets.values() if target in written]


def _save(result: Tensor, target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"could not make the folder {target.parent}: {error.strerror}") from error
    save_image(result, target)
    return target


def _batches(
    pool: ThreadPoolExecutor,
    sources: Sequence[Path],
    max_side: int | None,
    batch_size: int,
    strict: bool,
) -> Iterator[list[tuple[Path, Tensor]]]:
    """Pictures of one size, at most `batch_size` at a time, with their files.

    Files are read in the order of the sizes they state, so that few pictures wait for others of
    their size; what counts in the end is the size of the decoded, upright picture.
    """
    stated = {
        source: _stated_size(source, max_side) if batch_size > 1 else () for source in sources
    }
    ordered = sorted(sources, key=stated.__getitem__)
    loading = _ahead(pool, ordered, max_side)
    for _, group in itertools.groupby(loading, lambda item: stated[item[0]]):
        waiting: dict[torch.Size, list[tuple[Path, Tensor]]] = {}
        for source, loaded in group:
            try:
                picture = loaded.result()
            except ImageError as error:
                if strict:
                    raise
                log.warning("skipped %s", error)
                continue
            batch = waiting.setdefault(picture.shape, [])
            batch.append((source, picture))
            if len(batch) == batch_size:
                yield waiting.pop(picture.shape)
        yield from waiting.values()


def _stated_size(source: Path, max_side: int | None) -> tuple[int, ...]:
    """The two sides in ascending order: which is the height, the decoder knows."""
    try:
        return tuple(sorted(_reduced(*image_size(source), max_side)))
    except ImageError:  # which the decoder will say again
        return ()


def _ahead(
    pool: ThreadPoolExecutor, sources: Iterable[Path], max_side: int | None
) -> Iterator[tuple[Path, Future[Tensor]]]:
    """Each file with its picture, while the next ones are being decoded."""
    pending: deque[tuple[Path, Future[Tensor]]] = deque()
    for source in sources:
        pending.append((source, pool.submit(_load, source, max_side)))
        if len(pending) > _THREADS:
            yield pending.popleft()
    yield from pending
