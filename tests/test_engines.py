"""The engines do the same step: operation by operation, compiled, captured and replayed."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import logging
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dummy_recipe import Dummy, DummyConfig
from fastgan.device import use_deterministic_algorithms
from fastgan.models import RandomFeatures
from fastgan.recipes import RECIPES, Batch, Recipe, RecipeConfig
from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.style_transfer import StyleTransfer
from fastgan.recipes.unit import UNIT
from fastgan.training import Trainer, preset_config
from fastgan.training.config import DomainPictures, Output, Pictures
from fastgan.training.data import Augmentation
from fastgan.training.distributed import World
from fastgan.training.engine import EagerEngine
from fastgan.training.engines import (
    CompileEngine,
    CudaGraph,
    GraphEngine,
    checkpoint_activations,
    make_engine,
)
from fastgan.training.state import engine_state, restore_engine, restore_rng, rng_state
from pictures import write_folders, write_pictures
from recorded_graph import RecordedGraph, SyncWatch
from tiny import TWO_DOMAIN_RECIPES, tiny_config

CPU = torch.device("cpu")
SIZE = 32


CONFIGS: dict[type[Recipe], RecipeConfig] = {
    Dummy: Dummy.presets["small"].config,
    StyleTransfer: dataclasses.replace(StyleTransfer.presets["lite"].config, width=8),
    **{recipe: tiny_config(recipe) for recipe in TWO_DOMAIN_RECIPES},
}
every_recipe = pytest.mark.parametrize("recipe", CONFIGS, ids=lambda recipe: recipe.name)


def build(recipe: type[Recipe] = Dummy, device: torch.device = CPU, **config: Any) -> Recipe:
    """A small recipe with the weights of seed 0."""
    torch.manual_seed(0)
    built = recipe(dataclasses.replace(CONFIGS.get(recipe, DummyConfig()), **config))
    built.begin_training(size=SIZE)
    return built.to(device).to(memory_format=torch.channels_last)


def batch_of(recipe: Recipe, step: int, device: torch.device = CPU) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    pictures = {
        domain: torch.rand(2, 3, SIZE, SIZE, generator=generator)
        .mul(2)
        .sub(1)
        .contiguous(memory_format=torch.channels_last)
        for domain in recipe.domains
    }
    dtype = next(recipe.parameters()).dtype
    batch = {name: value.to(dtype) for name, value in pictures.items()}
    batch |= recipe.draw(step, 2, generator)
    return {name: value.to(device) for name, value in batch.items()}


def train(engine: EagerEngine, steps: range, device: torch.device = CPU) -> None:
    for step in steps:
        engine.step(batch_of(engine.recipe, step, device), step, steps_per_epoch=5)


def everything(engine: EagerEngine, device: torch.device = CPU) -> dict[str, Any]:
    """All that a checkpoint would hold, and what would be logged."""
    state = engine_state(engine, engine.recipe.state_dict())
    return {**state, "rng": rng_state(device), "logged": engine.ledger.read()}


def assert_same_bits(actual: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), path
        for key, value in expected.items():
            assert_same_bits(actual[key], value, f"{path}/{key}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=path)
    else:
        assert str(actual) == str(expected), path


def test_no_recipe_is_left_out() -> None:
    assert {recipe for recipe in RECIPES.values() if "fastgan" in recipe.__module__} < set(CONFIGS)


# --- Captured and replayed ----------------------------------------------------------------------


class CountsItself(Dummy):
    """Weighs a loss by a number that the host keeps, which a captured step cannot know."""

    steps = 0

    def losses(self, phase: str, batch: Batch, scratch: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        terms = super().losses(phase, batch, scratch)
        return {name: term * self.steps for name, term in terms.items()}


class Waits(Dummy):
    """Looks at a value on the device."""

    def losses(self, phase: str, batch: Batch, scratch: Tensor) -> dict[str, Tensor]:
        weight = 0.5 if scratch.mean().item() > 0 else 0.6
        terms = super().losses(phase, batch, scratch)
        return {name: weight * term for name, term in terms.items()}


def eager_and_graph(
    recipe: type[Recipe] = Dummy, precision: Any = "fp32", steps: int = 14, **config: Any
) -> tuple[dict[str, Any], dict[str, Any], RecordedGraph]:
    graph = RecordedGraph()
    eager = EagerEngine(build(recipe, **config), CPU, precision, 0.9)
    train(eager, range(steps))
    expected = everything(eager)
    captured = GraphEngine(build(recipe, **config), CPU, precision, 0.9, graph)
    train(captured, range(steps))
    return everything(captured), expected, graph


class TestGraph:
    """With an object in place of the CUDA graph that records operations and does them again."""

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_equals_eager_to_the_bit(self, precision: str) -> None:
        """Over learning rate schedule, average's start, image pool, dropout and loss scale."""
        graph, eager, recorded = eager_and_graph(precision=precision)
        assert recorded.replays == 14 - 3
        assert_same_bits(graph, eager)

    @every_recipe
    def test_equals_eager_to_the_bit_in_every_recipe(self, recipe: type[Recipe]) -> None:
        graph, eager, _ = eager_and_graph(recipe)
        assert_same_bits(graph, eager)

    @pytest.mark.parametrize("fault", ["loss", "gradient"])
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_a_fault_is_met_alike(self, fault: str, precision: str) -> None:
        graph, eager, _ = eager_and_graph(
            precision=precision, fault=fault, fault_step=8, fault_steps=2
        )
        assert_same_bits(graph, eager)

    def test_the_bad_step_is_known(self) -> None:
        engine = GraphEngine(build(fault="loss", fault_step=8), CPU, "fp32", 0.9, RecordedGraph())
        train(engine, range(12))
        assert engine.ledger.bad() == (8, ["generator/content"])

    def test_numbers_of_the_host_are_baked_in(self) -> None:
        """What these tests rely on: a step that depends on the host does differ."""
        graph, eager, _ = eager_and_graph(CountsItself)
        weight = "generator.0.weight"
        assert not torch.equal(graph["networks"][weight], eager["networks"][weight])

    def test_a_step_that_waits_is_left_to_the_eager_engine(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "fastgan"):
            graph, eager, recorded = eager_and_graph(Waits)
        assert_same_bits(graph, eager)
        assert recorded.replays == 0
        assert [record.getMessage() for record in caplog.records] == [
            "engine graph: the step cannot be captured (aten::_local_scalar_dense waits for the "
            "device): using eager"
        ]

    @pytest.mark.parametrize("first", ["eager", "graph"])
    @pytest.mark.parametrize("then", ["eager", "graph"])
    def test_resume_in_either_engine(self, first: str, then: str) -> None:
        def engine(name: str) -> EagerEngine:
            if name == "eager":
                return EagerEngine(build(), CPU, "fp16", 0.9)
            return GraphEngine(build(), CPU, "fp16", 0.9, RecordedGraph())

        whole = engine("eager")
        train(whole, range(15))
        expected = everything(whole)
        begun = engine(first)
        train(begun, range(7))
        state = everything(begun)
        resumed = engine(then)
        restore_engine(resumed, resumed.recipe.state_dict(), state)
        restore_rng(state["rng"], CPU)
        train(resumed, range(7, 15))
        actual = everything(resumed)
        del actual["logged"], expected["logged"]  # sums since the start and since the resume
        assert_same_bits(actual, expected)

    @pytest.mark.parametrize("change", ["shape", "dtype"])
    def test_another_batch_is_refused(self, change: str) -> None:
        engine = GraphEngine(build(), CPU, "fp32", 0.9, RecordedGraph())
        train(engine, range(5))
        batch = batch_of(engine.recipe, 5)
        content = batch["content"]
        batch["content"] = content[:1] if change == "shape" else content.double()
        with pytest.raises(ValueError, match=r"batch\['content'\] must be torch.float32 \[2, 3, "):
            engine.step(batch, 5, 5)

    def test_needs_a_gpu(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "fastgan"):
            engine = make_engine("graph", build(), CPU, "fp32", 0.9)
        assert type(engine) is EagerEngine
        assert caplog.messages == ["engine graph needs a CUDA device and this is cpu: using eager"]


class Twin(World):
    """Two processes, of which the other always finds the same."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=2)

    def average(self, values: Tensor) -> None:
        """Of equal values."""


@every_recipe
def test_a_step_in_pieces_is_the_whole_step(recipe: type[Recipe]) -> None:
    whole = EagerEngine(build(recipe), CPU, "fp32", 0.9)
    train(whole, range(8))
    expected = everything(whole)
    pieces = EagerEngine(build(recipe), CPU, "fp32", 0.9, world=Twin())
    train(pieces, range(8))
    assert_same_bits(everything(pieces), expected)
    graph = RecordedGraph()
    captured = GraphEngine(build(recipe), CPU, "fp32", 0.9, graph, world=Twin())
    train(captured, range(8))
    assert_same_bits(everything(captured), expected)
    assert graph.replays == (8 - 3) * (1 + len(recipe.phases))


def train_accumulating(engine: EagerEngine, steps: range) -> None:
    """Three micro-batches a step."""
    for step in steps:
        batches = [batch_of(engine.recipe, 3 * step + i) for i in range(3)]
        stacked = {name: torch.stack([b[name] for b in batches]) for name in batches[0]}
        engine.step(stacked, step, steps_per_epoch=5)


@every_recipe
def test_accumulation_in_a_graph(recipe: type[Recipe]) -> None:
    eager = EagerEngine(build(recipe), CPU, "fp16", 0.9, accumulate=3)
    train_accumulating(eager, range(6))
    expected = everything(eager)
    graph = GraphEngine(build(recipe), CPU, "fp16", 0.9, RecordedGraph(), accumulate=3)
    train_accumulating(graph, range(6))
    assert_same_bits(everything(graph), expected)


# --- Activation checkpointing -------------------------------------------------------------------


@every_recipe
def test_checkpointed_activations_change_no_bit(recipe: type[Recipe]) -> None:
    """Of weights, losses and random numbers, with dropout and noise on latents."""
    states = []
    for checkpointing in (False, True):
        engine = make_engine(
            "eager", build(recipe), CPU, "fp32", 0.9, activation_checkpointing=checkpointing
        )
        train(engine, range(3))
        states.append(everything(engine))
    assert_same_bits(*states)


def bytes_for_backward(recipe: Recipe) -> int:
    """What the generator's phase keeps for its backward, but for the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in recipe.parameters()}
    kept: dict[int, Tensor] = {}  # by their memory, which stays theirs while they are held

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = batch_of(recipe, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scratch = recipe.begin_step(batch)
        recipe.losses("generator", batch, scratch)
    return sum(kept[address].untyped_storage().nbytes() for address in kept.keys() - weights)


@pytest.mark.parametrize(
    ("recipe", "share"), [(StyleTransfer, 0.7), *((recipe, 0.2) for recipe in TWO_DOMAIN_RECIPES)]
)
def test_checkpointed_activations_are_not_kept(recipe: type[Recipe], share: float) -> None:
    """Of style transfer what the extractor and the discriminator keep remains."""
    plain, checkpointed = build(recipe), build(recipe)
    checkpoint_activations(checkpointed)
    assert bytes_for_backward(checkpointed) < share * bytes_for_backward(plain)


@pytest.mark.slow
def test_checkpointed_activations_of_several_processes_compile(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    gradients = []
    with caplog.at_level(logging.WARNING, "fastgan"):
        for kind, checkpointing in (("eager", False), ("compile", True)):
            engine = make_engine(
                kind, build(UNIT).double(), CPU, "fp32", 0.9,
                world=Twin() if checkpointing else None, activation_checkpointing=checkpointing,
            )  # fmt: skip
            gradients.append(first_gradients(engine))
    assert "engine compile" not in caplog.text
    for name, expected in gradients[0].items():
        size = expected.abs().max().item()
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-9, atol=1e-9 * size, msg=name
        )


# --- Compiled -----------------------------------------------------------------------------------


def first_gradients(engine: EagerEngine) -> dict[str, Tensor]:
    """Adam's first moment after one step is (1 - beta1) times the gradient."""
    train(engine, range(1))
    return {
        f"{phase}/{name}": optimizer.state[parameter]["exp_avg"]
        for phase, optimizer in engine.optimizers.items()
        for name, parameter in engine.parameters[phase].items()
    }


@pytest.mark.slow
def test_compiled_step_agrees_with_eager(caplog: pytest.LogCaptureFixture) -> None:
    engines = []
    for kind in (EagerEngine, CompileEngine):
        recipe = build()
        recipe.generator[3].p = 0.0  # compiled dropout draws other numbers
        engines.append(kind(recipe, CPU, "fp32", 0.9))
    with caplog.at_level(logging.WARNING, "fastgan"):
        expected, actual = map(first_gradients, engines)
    assert "engine compile" not in caplog.text  # nothing was left to the eager engine
    (terms, _), (compiled_terms, _) = (engine.ledger.read() for engine in engines)
    assert compiled_terms == pytest.approx(terms, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@every_recipe
def test_every_recipe_compiles_as_a_whole(
    recipe: type[Recipe], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    losses, gradients = [], []
    with caplog.at_level(logging.WARNING, "fastgan"):
        for kind in (EagerEngine, CompileEngine):
            engine = kind(build(recipe).double(), CPU, "fp32", 0.9)
            gradients.append(first_gradients(engine))
            losses.append(engine.ledger.read())
    assert "engine compile" not in caplog.text
    for kind_of_loss in range(2):
        assert losses[1][kind_of_loss] == pytest.approx(losses[0][kind_of_loss], rel=1e-9)
    for name, expected in gradients[0].items():
        size = expected.abs().max().item()
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-9, atol=1e-9 * size, msg=name
        )


@pytest.mark.slow
def test_random_features_compile() -> None:
    """On a CPU, in channels_last, with a gradient: what Inductor gets wrong in ``F.pad``."""
    images = torch.rand(2, 3, 12, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    extractor = RandomFeatures(levels=2, channels=4)

    def loss(images: Tensor) -> Tensor:
        return torch.stack([features.square().mean() for features in extractor(images)]).sum()

    expected = torch.autograd.grad(loss(images), images)[0]
    actual = torch.autograd.grad(torch.compile(loss)(images), images)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_without_a_compiler_steps_are_eager(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager = EagerEngine(build(), CPU, "fp32", 0.9)
    train(eager, range(2))
    expected = everything(eager)
    engine = make_engine("compile", build(), CPU, "fp32", 0.9)
    without = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, caplog.at_level(logging.WARNING, "fastgan"):
        train(engine, range(2))
    assert_same_bits(everything(engine), expected)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fastgan")]
    for name, message in zip(("begin_step", "losses"), said, strict=True):
        assert message.startswith(f"engine compile: {name} is not compiled: ")
        assert "no-such-compiler" in message


# --- What every step promises -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every_recipe
def test_a_step_does_not_wait_for_the_device(recipe: type[Recipe], precision: Any) -> None:
    engine = EagerEngine(build(recipe), CPU, precision, 0.9)
    batches = [batch_of(engine.recipe, step) for step in range(2)]
    engine.step(batches[0], 0, 5)
    with SyncWatch() as watch:
        engine.step(batches[1], 1, 5)
        assert watch.waits == []
        torch.ones(()).item()
        assert watch.waits == ["aten::_local_scalar_dense"]


@every_recipe
def test_a_step_of_the_trainer_does_not_wait_either(recipe: type[Recipe], tmp_path: Path) -> None:
    """What it draws and uploads before the engine's step included."""
    write_folders(tmp_path, ("content", "style", "trainA", "trainB"))
    two_domains = DomainPictures(tmp_path, workers=0)
    pictures = Pictures(tmp_path / "content", tmp_path / "style", workers=0)
    config = preset_config(
        recipe, None, two_domains if recipe.directions else pictures, Output(tmp_path / "run")
    )
    trainer = Trainer(
        recipe,
        dataclasses.replace(
            config,
            recipe=CONFIGS[recipe],
            training=dataclasses.replace(config.training, batch_size=2, accumulate=2, device="cpu"),
            augmentation=Augmentation(size=SIZE),
        ),
    )
    batches = trainer._stream.batches(0)
    trainer._one_step(*next(batches))
    batch = next(batches)
    with SyncWatch() as watch:
        trainer._one_step(*batch)
    assert watch.waits == []
    assert trainer.step == 2


def held_megabytes() -> float:
    """Memory of this process that no file backs, without what it could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return sum(map(int, re.findall(r"(?:RssAnon|VmSwap):\s+(\d+) kB", status))) / 2**10


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("recipe", "narrower"),
    [
        (Dummy, {}),
        (CycleGAN, {"residual_blocks": 1, "discriminator_layers": 2}),
        (
            StyleTransfer,
            {
                "width": 4,
                "encoder_blocks": 1,
                "decoder_blocks": 1,
                "discriminator_width": 4,
                "discriminator_scales": 1,
                "extractor_levels": 3,
            },
        ),
    ],
    ids=("dummy", "cyclegan", "style_transfer"),
)
def test_memory_does_not_grow(recipe: type[Recipe], narrower: dict[str, int]) -> None:
    """Over 2,000 steps, less than half a picture is kept of each but the first 500."""
    engine = EagerEngine(build(recipe, **narrower), CPU, "fp32", 0.9)
    batches = [batch_of(engine.recipe, step) for step in range(4)]

    def run(steps: range) -> float:
        for step in steps:
            engine.step(batches[step % 4], step, steps_per_epoch=5)
            if step % 50 == 0:
                engine.ledger.read()
        return held_megabytes()

    before = run(range(500))
    picture = batches[0][recipe.domains[0]].nbytes / 2 / 2**20
    grown = run(range(500, 2000)) - before
    print(f"{grown:.2f} MiB more")
    assert grown < 1500 * picture / 2


@every_recipe
def test_an_engine_goes_with_its_last_reference(recipe: type[Recipe]) -> None:
    """Without waiting for the garbage collector, which does not know how full a GPU is."""
    engine = EagerEngine(build(recipe), CPU, "fp32", 0.9)
    train(engine, range(2))
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_bf16_stays_close_to_fp32() -> None:
    """Every term of style transfer over 300 steps, on pictures that can be learned."""
    curves: dict[str, Tensor] = {}
    for precision in ("fp32", "bf16"):
        recipe = build(StyleTransfer, width=4, discriminator_width=4, extractor_levels=3)
        engine = EagerEngine(recipe, CPU, precision, 0.9)
        batches = [batch_of(recipe, step) for step in range(4)]
        for batch in batches:
            for domain in recipe.domains:
                coarse = F.avg_pool2d(batch[domain], 8)
                batch[domain] = 2 * F.interpolate(coarse, size=SIZE, mode="bilinear")
        windows = []
        for step in range(300):
            engine.step(batches[step % 4], step, steps_per_epoch=5)
            if step % 60 == 59:
                windows.append(engine.ledger.read()[0])
        curves[precision] = torch.tensor([list(window.values()) for window in windows])
    assert not torch.equal(curves["bf16"], curves["fp32"])
    torch.testing.assert_close(curves["bf16"], curves["fp32"], rtol=0.3, atol=0.0)


# --- On a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def _deterministic() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    use_deterministic_algorithms()
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@every_recipe
def test_cuda_graph_equals_eager_to_the_bit(
    recipe: type[Recipe], precision: Any, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda")
    eager = make_engine("eager", build(recipe, device), device, precision, 0.9)
    train(eager, range(14), device)
    expected = everything(eager, device)
    with caplog.at_level(logging.WARNING, "fastgan"):
        graph = make_engine("graph", build(recipe, device), device, precision, 0.9)
        train(graph, range(14), device)
    assert not caplog.records
    assert_same_bits(everything(graph, device), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@every_recipe
def test_cuda_graphs_of_pieces_are_the_whole_step(
    recipe: type[Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda")
    eager = make_engine("eager", build(recipe, device), device, "bf16", 0.9)
    train(eager, range(14), device)
    expected = everything(eager, device)
    with caplog.at_level(logging.WARNING, "fastgan"):
        graph = make_engine("graph", build(recipe, device), device, "bf16", 0.9, world=Twin())
        train(graph, range(14), device)
    assert not caplog.records
    assert_same_bits(everything(graph, device), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", TWO_DOMAIN_RECIPES)
def test_checkpointed_activations_spare_memory(recipe: type[Recipe]) -> None:
    device, peaks = torch.device("cuda"), []
    for checkpointing in (False, True):
        built = build(recipe, device, width=32)
        engine = make_engine(
            "eager", built, device, "bf16", 0.0, activation_checkpointing=checkpointing
        )
        batch = batch_of(built, 0, device)
        for domain in built.domains:
            batch[domain] = batch[domain].repeat(8, 1, 1, 1)
        batch |= {name: v.to(device) for name, v in built.draw(0, 16, torch.Generator()).items()}
        for step in range(2):
            torch.cuda.reset_peak_memory_stats()
            engine.step(batch, step, steps_per_epoch=5)
        peaks.append(torch.cuda.max_memory_allocated())
        del engine, built
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.gpu
def test_a_graph_cannot_hold_checkpointed_activations(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    with caplog.at_level(logging.WARNING, "fastgan"):
        engine = make_engine(
            "graph", build(Dummy, device), device, "fp32", 0.9, activation_checkpointing=True
        )
    assert type(engine) is EagerEngine
    assert "cannot capture activation checkpointing: using eager" in caplog.text


@pytest.mark.gpu
def test_a_step_that_waits_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    engine = make_engine("graph", build(Waits, device), device, "fp32", 0.9)
    with caplog.at_level(logging.WARNING, "fastgan"):
        train(engine, range(6), device)
    assert len(caplog.records) == 1
    assert "test_engines.py" in caplog.text
    assert "waits for the device" in caplog.text


@pytest.mark.gpu
def test_cuda_graph_leaves_no_trace_until_replayed() -> None:
    values = torch.zeros(4, device="cuda")
    graph = CudaGraph(values.device)

    def work() -> None:
        values.add_(torch.rand_like(values) + 1)

    assert graph.rehearse(work) is None
    before = values.clone()
    graph.capture(work)
    assert torch.equal(values, before)
    graph.replay()
    once = values.clone()
    graph.replay()
    assert (once > before).all()
    assert not torch.equal(values - once, once - before)  # drawn anew


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_in_a_cuda_graph(tmp_path: Path, precision: Any) -> None:
    """Eager in one go, in graphs with a break between: the same checkpoint."""
    from fastgan import checkpoint

    pictures = write_pictures(tmp_path)

    def run(name: str, engine: Any, steps: int, resume: bool = False) -> Any:
        output = Output(tmp_path / name, checkpoint_every=6, log_every=4, resume=resume)
        config = preset_config(Dummy, None, pictures, output)
        training = dataclasses.replace(
            config.training, steps=steps, engine=engine, precision=precision, deterministic=True
        )
        Trainer(Dummy, dataclasses.replace(config, training=training)).train()
        return checkpoint.load(tmp_path / name / "latest.safetensors")

    expected = run("eager", "eager", 20)
    run("graph", "graph", 9)
    actual = run("graph", "graph", 20, resume=True)
    for state in (actual, expected):
        del state["config"]
    assert_same_bits(actual, expected)


# --- The switch ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("_deterministic")
def test_the_trainer_takes_engine_and_determinism(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.use_deterministic_algorithms(False)
    config = preset_config(
        Dummy, None, write_pictures(tmp_path), Output(tmp_path / "run", checkpoint_every=2)
    )
    training = dataclasses.replace(
        config.training, steps=2, device="cpu", engine="graph", deterministic=True
    )
    with caplog.at_level(logging.WARNING, "fastgan"):
        Trainer(Dummy, dataclasses.replace(config, training=training)).train()
    assert "engine graph needs a CUDA device" in caplog.text
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
