"""Recipes that translate between two sets of pictures: what is the same for each of them."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import cli
from fastgan.images import load_image, to_float, to_uint8
from fastgan.inference import load_recipe, stylize
from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.two_domains import TwoDomainRecipe
from fastgan.recipes.unit import UNIT
from fastgan.run_folder import RunFolder
from fastgan.training import Trainer, preset_config
from fastgan.training.config import DomainPictures, Output
from fastgan.training.engine import EagerEngine
from tiny import TWO_DOMAIN_RECIPES, tiny_config, tiny_flags

EVERY = [pytest.param(recipe, id=recipe.name) for recipe in TWO_DOMAIN_RECIPES]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trainA: photographs of nothing in reds; trainB: stripes in blues."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for domain, channel in (("trainA", 0), ("trainB", 2)):
        (root / domain).mkdir()
        for number in range(3):
            pixels = rng.integers(0, 60, (40 + number, 44, 3))
            pixels[..., channel] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(root / domain / f"{number}.png")
    return root


def train(recipe: str, data: Path, out: Path, *more: str) -> int:
    return cli.main(
        [
            "train", recipe, "--data", str(data), "--out", str(out), "--steps", "2",
            "--workers", "0", "--device", "cpu", *tiny_flags(recipe), *more,
        ]
    )  # fmt: skip


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("size", [(16, 24), (1, 1), (9, 13), (2, 40)])
def test_pictures_keep_their_size(kind: type[TwoDomainRecipe], size: tuple[int, int]) -> None:
    recipe = kind(tiny_config(kind)).eval()
    pictures = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        for direction in recipe.directions:
            result = recipe.stylize(pictures, direction=direction)
            assert result.shape == pictures.shape
            assert result.abs().max() <= 1
            if size == (16, 24):
                assert torch.equal(result, recipe.translator(direction)(pictures))


@pytest.mark.parametrize("kind", EVERY)
def test_directions_are_two_networks(kind: type[TwoDomainRecipe]) -> None:
    recipe = kind(tiny_config(kind)).eval()
    a, b = torch.rand(2, 1, 3, 16, 16)
    with torch.no_grad():
        columns = recipe.samples({"A": a, "B": b})
        assert torch.equal(columns["A to B"], recipe.stylize(a, direction="AtoB"))
        assert torch.equal(columns["B to A"], recipe.stylize(b, direction="BtoA"))
        there = recipe.stylize(a, direction="AtoB")
        assert torch.equal(columns["A to B to A"], recipe.stylize(there, direction="BtoA"))
        assert not torch.equal(there, recipe.stylize(a, direction="BtoA"))


@pytest.mark.parametrize("kind", EVERY)
def test_stylize_says_what_is_missing_or_too_much(kind: type[TwoDomainRecipe]) -> None:
    recipe, picture = kind(tiny_config(kind)), torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"direction: .* needs AtoB or BtoA, got None"):
        recipe.stylize(picture)
    with pytest.raises(ValueError, match=r"direction: .* needs AtoB or BtoA, got 'A'"):
        recipe.stylize(picture, direction="A")
    with pytest.raises(ValueError, match=r"style: .* takes none"):
        recipe.stylize(picture, picture, direction="AtoB")
    with pytest.raises(ValueError, match=r"alpha: .* has no strength to set, got 0.5"):
        recipe.stylize(picture, alpha=0.5, direction="AtoB")


@pytest.mark.parametrize("kind", EVERY)
def test_command_line(
    kind: type[TwoDomainRecipe], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.png"
    assert train(kind.name, data, run) == 0
    assert "--direction AtoB" in capsys.readouterr().out
    photo = data / "trainA" / "1.png"
    command = ["stylize", "--checkpoint", str(run), "--content", str(photo), "--out", str(out)]
    command += ["--device", "cpu"]
    assert cli.main([*command, "--direction", "BtoA"]) == 0
    recipe = load_recipe(run)
    with torch.no_grad():
        expected = recipe.stylize(to_float(load_image(photo)[None]), direction="BtoA")
    assert torch.equal(load_image(out), to_uint8(expected)[0])
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "needs AtoB or BtoA, got None" in capsys.readouterr().err
    assert cli.main([*command, "--direction", "AtoB", "--style", str(photo)]) == 2
    assert "takes none" in capsys.readouterr().err


@pytest.mark.parametrize("kind", EVERY)
def test_arguments_that_do_not_serve(
    kind: type[TwoDomainRecipe], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trainA").mkdir()
    for where, more, complaint in (
        (tmp_path / "nowhere", [], "nowhere/trainA"),
        (tmp_path, [], "trainB"),
        (data, ["--size", "30"], f"size: {kind.name} needs a multiple of 4, at least"),
        (data, ["--size", "12"], "for these discriminators, got 12"),
        (data, ["--content", str(data)], "--content"),
    ):
        assert train(kind.name, where, tmp_path / "run", *more) == 2
        assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("kind", EVERY)
def test_resume_takes_the_settings_of_the_run(
    kind: type[TwoDomainRecipe], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(kind.name, data, tmp_path, "--weight-cycle", "7.5") == 0
    assert cli.main(["train", kind.name, "--out", str(tmp_path), "--resume", "--steps", "3"]) == 0
    held = json.loads(RunFolder(tmp_path).settings.read_text())["config"]
    assert held["recipe"]["weight_cycle"] == 7.5
    assert held["pictures"]["data"] == str(data)
    assert "other settings" not in caplog.text


@pytest.mark.parametrize("kind", EVERY)
def test_autocast_leaves_losses_in_fp32(kind: type[TwoDomainRecipe]) -> None:
    recipe = kind(tiny_config(kind))
    recipe.begin_training(32)
    recipe.to(memory_format=torch.channels_last)
    batch = {domain: torch.rand(2, 3, 32, 32) * 2 - 1 for domain in recipe.domains}
    batch |= recipe.draw(0, 2, torch.Generator())
    values: dict[torch.dtype | None, dict[str, float]] = {}
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            scratch = recipe.begin_step(batch)
            terms = {
                f"{phase}/{name}": term
                for phase in recipe.phases
                for name, term in recipe.losses(phase, batch, scratch).items()
            }
        assert all(term.dtype == torch.float32 for term in terms.values())
        values[dtype] = {name: term.item() for name, term in terms.items()}
    assert values[torch.bfloat16] == pytest.approx(values[None], rel=0.05)
    assert values[torch.bfloat16] != values[None]


def test_a_schedule_that_ends_before_the_steps_do_is_said(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps, said in ((6, False), (7, True)):  # three epochs of two steps
        flags = ["--epochs", "2", "--epochs-decay", "1", "--steps", str(steps)]
        assert train("cyclegan", data, tmp_path / str(steps), *flags) == 0
        assert ("cyclegan ends after 6 steps here, of which 2 are" in caplog.text) == said


@pytest.mark.parametrize("kind", EVERY)
def test_a_training_does_not_grow(kind: type[TwoDomainRecipe]) -> None:
    recipe = kind(tiny_config(kind))
    recipe.begin_training(24)
    engine = EagerEngine(recipe, torch.device("cpu"), "fp32", ema_decay=0.9)

    def tensors_after(steps: range) -> int:
        for step in steps:
            batch = {domain: torch.rand(1, 3, 24, 24) for domain in recipe.domains}
            engine.step(batch | recipe.draw(step, 1, torch.Generator()), step, 10)
            del batch
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors_after(range(3))
    assert tensors_after(range(3, 12)) <= before  # fewer where other tests' garbage went meanwhile


def run(
    kind: type[TwoDomainRecipe],
    data: Path,
    out: Path,
    steps: int,
    size: int = 32,
    **training: Any,
) -> list[dict[str, float]]:
    """What a tiny training logs, every ten steps."""
    config = preset_config(kind, "lite", DomainPictures(data, workers=0), Output(out, log_every=10))
    config = dataclasses.replace(
        config,
        recipe=dataclasses.replace(tiny_config(kind), lr=2e-3),
        training=dataclasses.replace(config.training, steps=steps, batch_size=2, **training),
        augmentation=dataclasses.replace(config.augmentation, size=size, resize=None),
    )
    Trainer(kind, config).train()
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [(CycleGAN, 300), (UNIT, 60)])
def test_losses_fall_and_bf16_stays_close_to_fp32(
    kind: type[TwoDomainRecipe], steps: int, data: Path, tmp_path: Path
) -> None:
    full = run(kind, data, tmp_path / "fp32", steps)
    half = run(kind, data, tmp_path / "bf16", steps, precision="bf16")
    terms = ["generator/cycle_A", "generator/cycle_B"]
    if kind is CycleGAN:
        terms += ["generator/identity_A", "generator/identity_B"]
    for term in terms:
        assert full[-1][term] < 0.6 * full[0][term]
        curves = torch.tensor([[line[term] for line in lines] for lines in (full, half)])
        smooth = curves.unfold(1, 3, 3).mean(2)
        torch.testing.assert_close(smooth[1], smooth[0], rtol=0.15, atol=0.0)
        assert not torch.equal(curves[0], curves[1])
    photo, out = data / "trainA" / "0.png", tmp_path / "out.png"
    stylize(photo, None, out, checkpoint=tmp_path / "fp32", direction="AtoB")
    red, _, blue = load_image(out).float().mean((1, 2))
    assert blue > red  # the reds of A have become the blues of B


@pytest.mark.slow
def test_cyclegan_learns_from_photographs(tmp_path: Path) -> None:
    """Three photographs of things, three of tissue and sky, at half the lite preset's size."""
    photographs = pytest.importorskip("skimage.data", reason="they come with scikit-image")
    for domain, names in (
        ("trainA", ("astronaut", "coffee", "rocket")),
        ("trainB", ("immunohistochemistry", "retina", "hubble_deep_field")),
    ):
        (tmp_path / domain).mkdir()
        for name in names:
            picture = Image.fromarray(getattr(photographs, name)())
            picture.save(tmp_path / domain / f"{name}.png")
    lines = run(CycleGAN, tmp_path, tmp_path / "run", 150, size=64)
    for name in ("cycle_A", "cycle_B", "identity_A", "identity_B"):
        term = torch.tensor([line[f"generator/{name}"] for line in lines])
        assert term[-3:].mean() < 0.75 * term[:3].mean(), name
