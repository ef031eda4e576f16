"""Trained networks as one file that runs without fastgan: ONNX, or a torch.export program.

What it holds is the reference path: plain PyTorch operations, none of fastgan's own.
"""

from __future__ import annotations

import abc
import copy
import io
import os
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fastgan
from fastgan.checkpoint import replace_file
from fastgan.images import WriteError
from fastgan.inference import load_recipe, pretrained_checkpoint
from fastgan.models.style_transfer import MIN_SIDE, StyleTransferGAN
from fastgan.ops._dispatch import use_impl
from fastgan.ops.instance_norm import InstanceStats
from fastgan.recipes import Recipe
from fastgan.recipes.style_transfer import StyleTransfer
from fastgan.recipes.two_domains import TwoDomainRecipe, extended

__all__ = ["Format", "export"]

Format: TypeAlias = Literal["onnx", "torch-export"]

_ENDINGS: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}


def export(
    out: str | Path,
    *,
    checkpoint: str | Path | Recipe | None = None,
    format: Format | None = None,
    direction: str | None = None,
) -> Path:
    """Writes the generator of a checkpoint to a file for other programs to run; returns the file.

    Pictures go in and come out as fp32 RGB in [-1, 1]; batch, height and width are free. The
    generator of style_transfer takes

    - ``content`` [B,3,H,W] and ``style`` [B or 1,3,h,w], each with sides of at least 8 pixels,
    - ``alpha`` [B or 1], the strength of the style from 0 to 1,

    and gives ``image`` [B,3,H,W]. That of a recipe with directions takes ``image`` and gives
    ``result``, of the same size.

    Args:
        out: ends in ``.onnx`` or ``.pt2``.
        checkpoint: as in :func:`fastgan.inference.load_recipe`, or a recipe, which stays as it is;
            None for the pretrained checkpoint.
        format: ``"onnx"``, which needs the extra ``[export]``, or ``"torch-export"``, for
            ``torch.export.load`` (``torch.export.passes.move_to_device_pass`` moves it to a GPU);
            by default what `out` ends in.
        direction: "AtoB" or "BtoA" where the recipe has directions.

    Raises:
        ValueError, OSError: an argument does not serve.
        fastgan.images.WriteError: the file could not be written; what was there is still there.
        ImportError: the packages that ONNX needs are not installed.
        fastgan.checkpoint.CheckpointError: the checkpoint cannot be read.
    """
    out = Path(out)
    format = _format(out, format)
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder")
    if format == "onnx":  # torch would say so at the end only, and in many lines
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    if isinstance(checkpoint, Recipe):
        recipe = copy.deepcopy(checkpoint).cpu().float().eval()
    else:
        recipe = load_recipe(pretrained_checkpoint() if checkpoint is None else checkpoint)
    generator = _generator(recipe.to(memory_format=torch.contiguous_format), direction)
    sizes = {  # the batch axis is 0
        name: {i: Dim(size, min=generator.smallest if i > 0 else 1) for i, size in axes.items()}
        for name, axes in generator.axes.items()
    }
    with use_impl("reference"), torch.no_grad():
        program = torch.export.export(generator, generator.example(), dynamic_shapes=sizes)
        program = program.run_decompositions({})  # drops what the ops only looked at, as strides
    metadata = {
        "model": " ".join(filter(None, ("fastgan", recipe.name, direction))),
        "fastgan_version": fastgan.__version__,
        "value_range": "RGB, -1 to 1",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    content = _onnx(program, generator, metadata) if format == "onnx" else _pt2(program, metadata)
    try:
        replace_file(Path(os.path.realpath(out)), content)
    except OSError as error:
        raise WriteError(f"could not write {out}: {error.strerror or error}") from error
    return out


def _format(out: Path, format: Format | None) -> Format:
    if format is not None and format not in _ENDINGS:
        raise ValueError(f"format: must be one of {', '.join(_ENDINGS)}, got {format!r}")
    for name, ending in _ENDINGS.items():
        if out.suffix == ending and format in (None, name):
            return name
    wanted = " or ".join(_ENDINGS.values()) if format is None else _ENDINGS[format]
    raise ValueError(f"out: must end in {wanted}, got {out}")


class _Generator(nn.Module, abc.ABC):
    """What is exported, and how its inputs look."""

    axes: ClassVar[dict[str, dict[int, str]]]
    """By input: the axes of free size and their names."""
    output: ClassVar[str]
    smallest: int
    """The least height and width."""

    @abc.abstractmethod
    def example(self) -> tuple[Tensor, ...]:
        """Inputs of sizes that all differ, because the exporter takes equal ones for the same."""


class _StyleTransfer(_Generator):
    axes: ClassVar = {
        "content": {0: "batch", 2: "height", 3: "width"},
        "style": {0: "style_batch", 2: "style_height", 3: "style_width"},
        "alpha": {0: "alpha_batch"},
    }
    output = "image"
    smallest = MIN_SIDE

    def __init__(self, network: StyleTransferGAN) -> None:
        super().__init__()
        self.network = network

    def example(self) -> tuple[Tensor, ...]:
        return torch.zeros(2, 3, 41, 54), torch.zeros(3, 3, 67, 77), torch.zeros(4)

    def forward(self, content: Tensor, style: Tensor, alpha: Tensor) -> Tensor:
        network, batch = self.network, content.shape[0]
        mean, std = (_rows(x, batch) for x in network.encode_style(style))
        features = network.style_transfer(
            network.content_encoder(content), InstanceStats(mean, std), _rows(alpha, batch)
        )
        return _cropped(network.decoder(features), content)


class _Translation(_Generator):
    axes: ClassVar = {"image": {0: "batch", 2: "height", 3: "width"}}
    output = "result"

    def __init__(self, network: nn.Module, size_multiple: int) -> None:
        super().__init__()
        self.network = network
        self.size_multiple = size_multiple
        self.smallest = 2 * size_multiple

    def example(self) -> tuple[Tensor, ...]:
        return (torch.zeros(2, 3, 5 * self.smallest + 1, 6 * self.smallest + 2),)

    def forward(self, image: Tensor) -> Tensor:
        return _cropped(self.network(extended(image, self.size_multiple)), image)


def _generator(recipe: Recipe, direction: str | None) -> _Generator:
    if isinstance(recipe, TwoDomainRecipe):
        return _Translation(recipe.translator(recipe.checked(direction)), recipe.size_multiple)
    if direction is not None:
        raise ValueError(f"direction: {recipe.name} has none, its style picture decides")
    if not isinstance(recipe, StyleTransfer):
        raise ValueError(f"checkpoint: fastgan cannot export the recipe {recipe.name}")
    return _StyleTransfer(recipe.generator)


# Broadcasting and slicing would tie sizes to those of the example; indices leave them free.


def _rows(x: Tensor, batch: int) -> Tensor:
    """[B or 1, ...] -> [B, ...]."""
    return x[torch.arange(batch, device=x.device).clamp(max=x.shape[0] - 1)]


def _cropped(images: Tensor, like: Tensor) -> Tensor:
    """The upper left part of the size of another picture."""
    height, width = (torch.arange(side, device=images.device) for side in like.shape[2:])
    return images.index_select(2, height).index_select(3, width)


def _pt2(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=metadata)
    return file.getvalue()


def _onnx(program: ExportedProgram, generator: _Generator, metadata: dict[str, str]) -> bytes:
    converted = torch.onnx.export(
        program,
        output_names=[generator.output],
        dynamic_shapes=generator.axes,  # the names, for the file
        verbose=False,
    )
    assert converted is not None  # it is where no file is given
    converted.model.metadata_props.update(metadata)
    content: bytes = converted.model_proto.SerializeToString()
    return content
