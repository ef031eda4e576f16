"""ResnetGenerator: weights of the public CycleGAN code give the same pictures."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgan import cli
from fastgan.checkpoint import CheckpointError
from fastgan.images import load_image, save_image, to_float, to_uint8
from fastgan.inference import load_recipe, stylize
from fastgan.models import ResnetGenerator, load_cyclegan_generator
from fastgan.recipes.cyclegan import PUBLIC_GENERATORS, CycleGAN


class PublicBlock(nn.Module):
    def __init__(self, channels: int, dropout: bool) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            *([nn.Dropout(0.5)] if dropout else []),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class PublicGenerator(nn.Module):
    """Its layers have the names that the public code gives them."""

    def __init__(self, width: int, blocks: int, dropout: bool = False) -> None:
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7)]
        for i in (1, 2):
            layers += [nn.InstanceNorm2d(width * i), nn.ReLU(True)]
            layers += [nn.Conv2d(width * i, 2 * width * i, 3, stride=2, padding=1)]
        layers += [nn.InstanceNorm2d(4 * width), nn.ReLU(True)]
        layers += [PublicBlock(4 * width, dropout) for _ in range(blocks)]
        for i in (4, 2):
            layers += [
                nn.ConvTranspose2d(width * i, width * i // 2, 3, 2, padding=1, output_padding=1)
            ]
            layers += [nn.InstanceNorm2d(width * i // 2), nn.ReLU(True)]
        self.model = nn.Sequential(
            *layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def as_it_is(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def from_data_parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def with_running_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **state,
        "model.2.running_mean": torch.randn(6),
        "model.2.running_var": torch.rand(6),
        "model.2.num_batches_tracked": torch.tensor(7),
        "model.10.conv_block.2.running_mean": torch.randn(24),
    }


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("change", [as_it_is, from_data_parallel, with_running_statistics])
@pytest.mark.parametrize("blocks", [2, 6])
def test_the_same_pictures(
    blocks: int, change: Callable[..., dict[str, Tensor]], dropout: bool, tmp_path: Path
) -> None:
    public = PublicGenerator(6, blocks, dropout).eval()
    path = tmp_path / "latest_net_G_A.pth"
    torch.save(change(public.state_dict()), path)
    generator = load_cyclegan_generator(path)
    assert len(generator.blocks) == blocks
    pictures = torch.rand(2, 3, 24, 36, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            generator.double()(pictures), public.double()(pictures), rtol=1e-9, atol=1e-9
        )


def test_a_folder_of_the_public_code_stylizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = {name: PublicGenerator(4, 2).eval() for name in ("A", "B")}
    for module in public["A"].modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)
    photo = tmp_path / "photo.png"
    save_image(torch.rand(3, 24, 32) * 2 - 1, photo)
    flags = ["--checkpoint", str(tmp_path), "--content", str(photo), "--device", "cpu"]
    for direction, name in (("AtoB", "A"), ("BtoA", "B")):
        torch.save(public[name].state_dict(), tmp_path / f"latest_net_G_{name}.pth")
        out = tmp_path / f"{name}.png"
        command = ["stylize", *flags, "--out", str(out), "--direction", direction]
        if name == "A":
            assert cli.main(command) == 2
            assert "latest_net_G_B.pth: No such file" in capsys.readouterr().err
            torch.save(public["B"].state_dict(), tmp_path / "latest_net_G_B.pth")
        assert cli.main(command) == 0
        with torch.no_grad():
            expected = to_uint8(public[name](to_float(load_image(photo)[None])))[0]
        difference = load_image(out).int() - expected.int()
        assert difference.abs().max() <= 1  # fp32 rounding
    assert not torch.equal(load_image(tmp_path / "A.png"), load_image(tmp_path / "B.png"))


@pytest.mark.parametrize(
    ("name", "direction", "other"),
    [
        ("latest_net_G", "AtoB", "BtoA"),
        ("horses", "AtoB", "BtoA"),
        ("latest_net_G_B", "BtoA", "AtoB"),
    ],
)
def test_one_generator_of_the_public_code_translates_its_way(
    tmp_path: Path, name: str, direction: str, other: str
) -> None:
    public = PublicGenerator(4, 2).eval()
    path = tmp_path / f"{name}.pth"
    torch.save(public.state_dict(), path)
    content = torch.rand(1, 3, 24, 32) * 2 - 1
    with torch.no_grad():
        expected = public(content)
    for given in (path, tmp_path) if name == "latest_net_G" else (path,):
        recipe = load_recipe(given)
        assert recipe.directions == (direction,)
        for asked in (direction, None):
            result = stylize(content, checkpoint=recipe, direction=asked)
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
        with pytest.raises(ValueError, match=f"cyclegan needs {direction}, got '{other}'"):
            stylize(content, checkpoint=recipe, direction=other)
    assert CycleGAN.directions == ("AtoB", "BtoA")


def test_a_pickle_of_another_ending_is_refused_and_public_weights_are_asked_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "generator.pt"
    torch.save(PublicGenerator(4, 2).state_dict(), path)
    with pytest.raises(CheckpointError) as refused:
        load_recipe(path)
    asked_for = f"name a .pth file or the folder with {' and '.join(PUBLIC_GENERATORS)}"
    assert str(refused.value).startswith(f"{path}: a pickle")
    assert str(refused.value).endswith(asked_for)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_what_is_no_generator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    state = PublicGenerator(4, 2).state_dict()

    def refused(content: object, complaint: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=complaint) as caught:
            load_cyclegan_generator(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)

    refused([1, 2], "must hold a state dict of tensors alone, holds a list")
    refused({"epoch": 3}, "must hold a state dict of tensors alone, holds other values")
    refused({}, "no resnet generator")
    refused({**state, "model.30.weight": torch.ones(1)}, r"unknown entry model\.30\.weight")
    refused(torch.nn.Conv2d(3, 4, 3).state_dict(), "unknown entry weight")
    del state["model.12.weight"]
    refused(state, r"Missing key.* \"up1\.weight\"")
    refused(PublicGenerator(4, 2).double().requires_grad_(False), "read safely")
    refused(_Payload(), "read safely: it is no pickle, or one of more than tensors$")
    path.write_bytes(pickle.dumps(_Payload(), protocol=2))
    with pytest.raises(ValueError, match="read safely"):
        load_cyclegan_generator(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="read safely"):
        load_cyclegan_generator(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError):
        load_cyclegan_generator(tmp_path / "nowhere.pth")


def test_a_generator_has_blocks() -> None:
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        ResnetGenerator(4, 0)


def test_size_and_range() -> None:
    generator = ResnetGenerator(4, 1)
    for size in ((8, 8), (8, 20), (32, 24)):
        pictures = generator(torch.rand(1, 3, *size) * 2 - 1)
        assert pictures.shape == (1, 3, *size)
        assert pictures.abs().max() <= 1
