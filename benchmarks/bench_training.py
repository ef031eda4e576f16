"""Whole training steps: CycleGAN in plain torch.nn and with fastgan, and fastgan's recipes.

A variant is a set of networks with their optimizers, its call is one update on the batch. What is
compared with fp64 is the losses of the first update, from the same initial weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fastgan
from fastgan.device import Precision
from fastgan.recipes import Recipe, recipe_class
from fastgan.training.engine import EagerEngine
from fastgan.training.engines import (
    CompileEngine,
    CudaGraph,
    EngineName,
    GraphEngine,
    make_engine,
)
from harness import Case, Report, Variant
from plain_cyclegan import CycleGAN
from step_experiments import TwoStreamCycleGAN, pad_convolutions


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, on which batches, in which precision."""

    recipe: str
    config: dict[str, Any]
    """What differs from the recipe's first preset."""
    batch: int
    size: int
    precision: Precision = "fp32"

    @property
    def autocast(self) -> torch.dtype | None:
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


TINY_STYLE = {"width": 4, "discriminator_width": 4, "extractor_levels": 3}
BASE_STYLE = dataclasses.asdict(recipe_class("style_transfer").presets["base"].config)
WITHOUT_NOISE = {"latent_noise": 0.0}  # which no two dtypes would draw alike
TINY_UNIT = {"width": 4, "residual_blocks": 2, "discriminator_scales": 1, **WITHOUT_NOISE}
SETTINGS = {
    "tiny": [
        Setting("style_transfer", TINY_STYLE, 2, 32),
        Setting("unit", TINY_UNIT, 1, 64),
    ],
    "cpu": [Setting("style_transfer", {}, 4, 128)],
    "gpu": [
        Setting("style_transfer", BASE_STYLE, 8, 256, "bf16"),
        Setting("unit", WITHOUT_NOISE, 1, 256, "bf16"),
    ],
}
TINY_CYCLEGAN = {"width": 4, "blocks": 1}
CYCLEGAN_SETTINGS = {
    "tiny": [Setting("cyclegan", TINY_CYCLEGAN, 1, 24)],
    "cpu": [Setting("cyclegan", {}, 1, 64)],
    "gpu": [
        Setting("cyclegan", {}, 1, 256, "bf16"),
        Setting("cyclegan", {}, 8, 256, "bf16"),
    ],
}


def cases(sizes: str) -> Iterator[Case]:
    for setting in CYCLEGAN_SETTINGS[sizes]:
        variants = chain(plain_variants(setting), engine_variants(setting))
        yield step_case(setting, lambda s=setting: PlainStep(s), variants)
    for setting in SETTINGS[sizes]:
        yield step_case(
            setting, lambda s=setting: RecipeStep(s, reference=True), recipe_variants(setting)
        )


def test_training(record: Report, case: Case, variant: str) -> None:
    record(case, variant)


def step_case(
    setting: Setting, exact: Callable[[], Callable[..., Any]], variants: Iterator[Variant]
) -> Case:
    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (2, setting.batch, 3, setting.size, setting.size)
        return tuple(2 * torch.rand(shape, device=device, generator=generator) - 1)

    return Case(
        op=f"{setting.recipe} step",
        shape=f"{setting.batch}x3x{setting.size}x{setting.size}",
        dtype="float32" if setting.autocast is None else f"{setting.precision} autocast",
        layout="",
        mode="step",
        inputs=inputs,
        exact=lambda *images: exact()(*images),
        variants=tuple(variants),
        rotate=False,
        precision=setting.autocast or torch.float32,
    )


# --- CycleGAN in plain torch.nn -----------------------------------------------------------------


def plain_variants(setting: Setting) -> Iterator[Variant]:
    """The public code's step, what one can do to it without fastgan, and with."""
    mixed = setting.precision
    yield Variant("public fp32", "eager", lambda: PlainStep(setting, autocast=None))
    if setting.autocast is not None:
        yield Variant(f"public {mixed}", "eager", lambda: PlainStep(setting))
    yield Variant(f"public {mixed} channels_last", "eager", lambda: PlainStep(setting, tuned=True))
    if setting.autocast is not None:  # minutes of compilation, for CUDA graphs
        yield Variant(
            "torch.compile reduce-overhead",
            "compile",
            lambda: PlainStep(setting, tuned=True, compiled=True),
            replays=True,
        )
    yield Variant("convert()", "fastgan", lambda: PlainStep(setting, tuned=True, converted=True))


class PlainStep:
    """An update of the plain CycleGAN.

    Args:
        tuned: channels_last and fused Adam, what a careful user of plain PyTorch would do.
        converted: with fastgan's modules in place of the norms and pads.
        compiled: each network by torch.compile with CUDA graphs.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        autocast: torch.dtype | str | None = "of the setting",
        tuned: bool = False,
        converted: bool = False,
        compiled: bool = False,
    ) -> None:
        with seeded():
            self._model = CycleGAN(**setting.config)
        self._autocast = setting.autocast if autocast == "of the setting" else autocast
        self._tuned, self._converted, self._compiled = tuned, converted, compiled
        self._ready = False

    def __call__(self, *images: Tensor) -> list[Tensor]:
        if not self._ready:
            self._prepare(images[0])
        if self._tuned:
            images = tuple(x.contiguous(memory_format=torch.channels_last) for x in images)
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return self._model.step(*images)

    def _prepare(self, images: Tensor) -> None:
        model = self._model.to(images.device, images.dtype)
        if self._converted:
            model = fastgan.nn.convert(model)
        if self._tuned:
            model = model.to(memory_format=torch.channels_last)
        model.prepare(self._autocast if images.dtype == torch.float32 else None, fused=self._tuned)
        if self._compiled:
            for network in plain_networks(model):
                network.compile(mode="reduce-overhead", dynamic=False)
        self._model, self._ready = model, True


# --- Recipes ------------------------------------------------------------------------------------


def recipe_variants(setting: Setting) -> Iterator[Variant]:
    yield Variant("reference path", "eager", lambda: RecipeStep(setting, reference=True))
    yield from engine_variants(setting)


def engine_variants(setting: Setting) -> Iterator[Variant]:
    """Every engine and experiment where the setting is one for a GPU, else the eager engine."""
    yield Variant("fastgan", "fastgan", lambda: RecipeStep(setting))
    if setting.autocast is not None:
        yield Variant("fastgan compile", "fastgan", lambda: RecipeStep(setting, "compile"))
        yield Variant(
            "fastgan graph", "fastgan", lambda: RecipeStep(setting, "graph"), replays=True
        )
        yield Variant(
            "fastgan graph, cudnn.benchmark",
            "experiment",
            lambda: RecipeStep(setting, "graph", tune=True),
            replays=True,
        )
    if setting.autocast is not None and setting.recipe == "cyclegan":
        yield Variant(
            "fastgan graph of compiled phases",
            "experiment",
            lambda: RecipeStep(setting, "compiled graph"),
            replays=True,
        )
        yield Variant(
            "fastgan graph, two streams",
            "experiment",
            lambda: RecipeStep(setting, "graph", kind=TwoStreamCycleGAN),
            replays=True,
        )
        yield Variant(
            "fastgan graph, padded channels",
            "experiment",
            lambda: RecipeStep(setting, "graph", padded=True),
            replays=True,
        )


class CompiledGraphEngine(CompileEngine, GraphEngine):
    """Compiled phases, captured in one graph."""


class RecipeStep:
    """An update of a recipe by a training engine.

    Args:
        tune: let cuDNN choose its algorithms by trial.
        kind: instead of the recipe that the setting names.
        padded: convolutions of pictures, or to them, with 8 channels.
    """

    def __init__(
        self,
        setting: Setting,
        engine: EngineName | Literal["compiled graph"] = "eager",
        *,
        reference: bool = False,
        tune: bool = False,
        kind: type[Recipe] | None = None,
        padded: bool = False,
    ) -> None:
        kind = kind or recipe_class(setting.recipe)
        first = next(iter(kind.presets.values())).config
        config = recipe_config(setting) if setting.recipe == "cyclegan" else setting.config
        with seeded():
            self._recipe = kind(dataclasses.replace(first, **config))
            self._recipe.begin_training(setting.size)
        if setting.recipe == "cyclegan":
            with seeded():
                copy_weights(
                    plain_networks(CycleGAN(**setting.config)), recipe_networks(self._recipe)
                )
        if padded:
            pad_convolutions(self._recipe)
        self._setting = setting
        self._reference = reference
        self._tune = tune
        self._name = engine
        self._engine: EagerEngine | None = None
        self._step = 0

    def __call__(self, *images: Tensor) -> list[Tensor]:
        """The first call returns its losses, phase by phase; later ones do not wait for theirs."""
        recipe = self._recipe
        if self._engine is None:
            self._engine = self._prepare(images[0])
        images = tuple(x.contiguous(memory_format=torch.channels_last) for x in images)
        drawn = recipe.draw(self._step, self._setting.batch, torch.Generator().manual_seed(0))
        batch = dict(zip(recipe.domains, images, strict=True))
        device = images[0].device
        batch |= {name: value.to(device, non_blocking=True) for name, value in drawn.items()}
        choice = fastgan.use_impl("reference") if self._reference else contextlib.nullcontext()
        with choice, warnings_as_errors(), cudnn_by_trial(self._tune):
            self._engine.step(batch, self._step, steps_per_epoch=1000)
        self._step += 1
        if self._step > 1:
            return []
        losses, _ = self._engine.ledger.read()
        return [
            torch.tensor(sum(value for name, value in losses.items() if name.startswith(phase)))
            for phase in recipe.phases
        ]

    def _prepare(self, images: Tensor) -> EagerEngine:
        recipe, device = self._recipe, images.device
        recipe.to(device, images.dtype).to(memory_format=torch.channels_last)
        precision = self._setting.precision if images.dtype == torch.float32 else "fp32"
        if self._name == "compiled graph":
            return CompiledGraphEngine(recipe, device, precision, 0.999, CudaGraph(device))
        with warnings_as_errors():
            return make_engine(self._name, recipe, device, precision, ema_decay=0.999)


def recipe_config(setting: Setting) -> dict[str, Any]:
    """The sizes of a plain CycleGAN as the recipe calls them."""
    names = {"width": ("width", "discriminator_width"), "blocks": ("residual_blocks",)}
    return {name: value for key, value in setting.config.items() for name in names[key]}


def plain_networks(model: CycleGAN) -> list[nn.Module]:
    return [model.a_to_b, model.b_to_a, model.judge_a, model.judge_b]


def recipe_networks(recipe: Recipe) -> list[nn.Module]:
    """The same networks in a CycleGAN recipe."""
    generators, judges = (recipe.get_submodule(x) for x in ("generators", "discriminators"))
    return [
        *(generators.get_submodule(direction) for direction in ("AtoB", "BtoA")),
        *(judges.get_submodule(domain) for domain in ("A", "B")),
    ]


@torch.no_grad()
def copy_weights(sources: list[nn.Module], targets: list[nn.Module]) -> None:
    """Between networks of the same convolutions in the same order; idle biases may be missing."""
    for source, target in zip(sources, targets, strict=True):
        for layer, into in zip(convolutions(source), convolutions(target), strict=True):
            into.weight.copy_(layer.weight)
            if into.bias is not None:
                into.bias.copy_(layer.bias)


def convolutions(network: nn.Module) -> list[nn.Module]:
    kinds = nn.Conv2d | nn.ConvTranspose2d
    return [module for module in network.modules() if isinstance(module, kinds)]


@contextlib.contextmanager
def cudnn_by_trial(on: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Raises(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(record.getMessage())


@contextlib.contextmanager
def warnings_as_errors() -> Iterator[None]:
    """An engine that falls back to eager says so in a warning, and must not be timed as itself."""
    logger, handler = logging.getLogger("fastgan.training"), _Raises(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Weights drawn inside are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
