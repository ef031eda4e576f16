"""The checkpoint that comes with the package, on a photograph and styles it has not seen."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("skimage", reason="the pictures come with scikit-image")

from pretrain_lite import strip

from fastgan import checkpoint
from fastgan.inference import load_recipe
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
