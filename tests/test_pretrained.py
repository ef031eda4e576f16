"""The checkpoint that comes with the package, on a photograph and styles it has not seen."""

import itertools
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("skimage", reason="the pictures come with scikit-image")

from judge_lite import JUDGE_SEED, STRENGTHS, held_out_photographs, held_out_styles, tensor
from pretrain_lite import strip

from fastgan import checkpoint
from fastgan.inference import load_recipe, pretrained_checkpoint, stylize
from fastgan.metrics import gram_distance, structure_correlation
from fastgan.models.features import RandomFeatures, grey
from fastgan.recipes import Recipe
from fastgan.recipes.serialize import to_json
from fastgan.recipes.style_transfer import StyleTransfer, StyleTransferRecipeConfig

# --- Stripping ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the trainer leaves of a small model."""
    config = StyleTransferRecipeConfig(width=4, discriminator_width=4)
    recipe = StyleTransfer(config)
    networks = recipe.state_dict()
    state = {
        "fastgan": "0",
        "recipe": "style_transfer",
        "step": 7,
        "config": {"recipe": to_json(config), "pictures": {"content": "/home/someone"}},
        "networks": networks,
        "average": {k: v + 0.01 for k, v in networks.items() if k.startswith("generator.")},
        "optimizers": {"generator": {"w": torch.ones(3)}},
    }
    checkpoint.save(tmp_path / "run.safetensors", state)
    return tmp_path / "run.safetensors"


def test_stripped_checkpoint_renders_like_the_whole(run: Path, tmp_path: Path):
    small = tmp_path / "small.safetensors"
    strip(run, small)
    assert small.stat().st_size < run.stat().st_size / 3
    held = checkpoint.load(small)
    assert set(held) == {"fastgan", "recipe", "step", "config", "networks", "average"}
    assert set(held["config"]) == {"recipe"}
    assert all(name.startswith("generator.") for name in held["networks"])
    assert all(value.dtype == torch.float16 for value in held["average"].values())
    content, style = torch.rand(2, 1, 3, 21, 30) * 2 - 1
    loaded = load_recipe(small)
    assert all(value.dtype == torch.float32 for value in loaded.parameters())
    expected = load_recipe(run).stylize(content, style)
    torch.testing.assert_close(loaded.stylize(content, style), expected, rtol=0, atol=5e-3)


def test_a_part_of_the_generator_must_not_be_missing(run: Path, tmp_path: Path):
    state = checkpoint.load(run)
    name = next(name for name in state["networks"] if name.startswith("generator."))
    del state["networks"][name]
    checkpoint.save(tmp_path / "less.safetensors", state)
    with pytest.raises(ValueError, match=name):
        load_recipe(tmp_path / "less.safetensors")


# --- The checkpoint that ships ------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Recipe:
    return load_recipe(pretrained_checkpoint())


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    return tensor(held_out_photographs()["chelsea"])


@pytest.fixture(scope="module")
def styles() -> dict[str, Tensor]:
    return {name: tensor(picture) for name, picture in held_out_styles().items()}


@pytest.fixture(scope="module")
def results(model: Recipe, photograph: Tensor, styles: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of full strength."""
    return {name: stylize(photograph, style, checkpoint=model) for name, style in styles.items()}


JUDGE = RandomFeatures(seed=JUDGE_SEED)


def distance(image: Tensor, style: Tensor) -> float:
    return gram_distance(image, style, JUDGE).item()


def test_file_is_small_and_holds_16_bits():
    path = pretrained_checkpoint()
    assert path.stat().st_size <= 3e6
    state = checkpoint.load(path)
    assert state["recipe"] == "style_transfer"
    assert {value.dtype for value in state["average"].values()} == {torch.float16}


def test_no_checkpoint_need_be_named():
    cat = held_out_photographs()["chelsea"].crop((100, 50, 221, 137))
    result = stylize(cat, held_out_styles()["ink"])
    assert isinstance(result, Image.Image)
    assert result.size == cat.size


def test_photograph_comes_nearer_to_every_style(
    photograph: Tensor, styles: dict[str, Tensor], results: dict[str, Tensor]
):
    drops = [
        1 - distance(results[name], style) / distance(photograph, style)
        for name, style in styles.items()
    ]
    assert min(drops) > 0.7  # 0.76 when it was made
    assert statistics.median(drops) > 0.72  # 0.78


def test_grey_photograph_comes_nearer_to_every_grey_style(
    photograph: Tensor, styles: dict[str, Tensor], results: dict[str, Tensor]
):
    """Where colours gain nothing, it is texture that does."""
    for name, style in styles.items():
        before, after = (distance(grey(x), grey(style)) for x in (photograph, results[name]))
        assert after < before, name  # by 12 to 63 %


def test_every_result_is_nearest_to_its_own_style(
    styles: dict[str, Tensor], results: dict[str, Tensor]
):
    for name, style in styles.items():
        nearest = min(results, key=lambda other: distance(results[other], style))
        assert nearest == name


def test_the_stronger_the_nearer(model: Recipe, photograph: Tensor, styles: dict[str, Tensor]):
    coffee = tensor(held_out_photographs()["coffee"].resize((300, 200)))
    for content, (name, style) in itertools.product((photograph, coffee), styles.items()):
        by_alpha = [
            distance(stylize(content, style, checkpoint=model, alpha=alpha), style)
            for alpha in STRENGTHS
        ]
        assert by_alpha == sorted(by_alpha, reverse=True), name
        assert by_alpha[2] < 0.8 * by_alpha[0], name  # at half the strength; 0.53 to 0.71
        assert by_alpha[-1] < 0.4 * by_alpha[0], name  # 0.04 to 0.28


def test_photograph_stays_recognisable(photograph: Tensor, results: dict[str, Tensor]):
    for name, result in results.items():
        assert structure_correlation(result, photograph).item() > 0.8, name  # 0.86


def test_strength_0_is_close_to_the_photograph(
    model: Recipe, photograph: Tensor, styles: dict[str, Tensor]
):
    result = stylize(photograph, styles["night"], checkpoint=model, alpha=0)
    assert (result - photograph).abs().mean() / 2 < 0.04  # of black to white; 0.027
    assert structure_correlation(result, photograph).item() > 0.95


def test_styles_differ(results: dict[str, Tensor]):
    for a, b in itertools.combinations(results, 2):
        assert (results[a] - results[b]).abs().mean() / 2 > 0.04, (a, b)
