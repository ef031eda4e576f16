"""Exported generators give what the networks give, in every size that they say is free."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

import fastgan
from dummy_recipe import Dummy, DummyConfig
from fastgan import cli, export, inference
from fastgan.inference import load_recipe, pretrained_checkpoint
from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.two_domains import TwoDomainRecipe
from fastgan.recipes.unit import UNIT
from tiny import save_tiny_recipe, tiny_config, tiny_style_transfer

FORMATS = ("onnx", "torch-export")
ALLOWED = 1e-3
Run = Callable[..., Tensor]


def runner(path: Path) -> Run:
    """The exported function, in the runtime that its file is for."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = session_of(path)
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


def session_of(path: Path) -> Any:
    return needs("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])


def needs(module: str) -> Any:
    return pytest.importorskip(module, reason="needs the extra [export]")


def ending(format: str) -> str:
    """Of a file in a format that this installation can write."""
    if format == "onnx":
        needs("onnx")
        needs("onnxscript")
    return {"onnx": ".onnx", "torch-export": ".pt2"}[format]


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 - 1


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= ALLOWED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return save_tiny_recipe(tiny_style_transfer(), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module", params=FORMATS)
def exported(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("exported") / f"model{ending(request.param)}"
    assert export.export(out, checkpoint=checkpoint) == out
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # no weights beside it
    return out


class TestStyleTransfer:
    @pytest.mark.parametrize(
        ("content", "style", "strengths"),
        [
            ((1, 64, 64), (1, 64, 64), 1),
            ((1, 33, 47), (1, 50, 29), 1),
            ((2, 45, 130), (2, 8, 8), 2),
            ((2, 8, 9), (1, 31, 35), 1),
            ((3, 57, 64), (1, 40, 40), 3),
            ((3, 30, 31), (3, 41, 26), 1),
        ],
    )
    def test_parity(
        self,
        exported: Path,
        checkpoint: Path,
        content: tuple[int, int, int],
        style: tuple[int, int, int],
        strengths: int,
    ) -> None:
        generator = load_recipe(checkpoint).generator
        content_pictures = pictures(content[0], 3, *content[1:])
        style_pictures = pictures(style[0], 3, *style[1:])
        alpha = torch.rand(strengths)
        expected = generator(content_pictures, style_pictures, alpha.expand(content[0]))
        result = runner(exported)(content_pictures, style_pictures, alpha)
        close(result, expected)
        moved = runner(exported)(content_pictures, style_pictures, 1 - alpha)
        assert (moved - result).abs().max() > 10 * ALLOWED  # alpha and style count

    def test_what_the_file_says(self, exported: Path) -> None:
        expected = {
            "model": "fastgan style_transfer",
            "fastgan_version": fastgan.__version__,
            "value_range": "RGB, -1 to 1",
        }
        if exported.suffix == ".pt2":
            found = dict.fromkeys(expected, "")
            torch.export.load(exported, extra_files=found)
            assert found == expected
            return
        session = session_of(exported)
        assert {given.name: given.shape for given in session.get_inputs()} == {
            "content": ["batch", 3, "height", "width"],
            "style": ["style_batch", 3, "style_height", "style_width"],
            "alpha": ["alpha_batch"],
        }
        (image,) = session.get_outputs()
        assert (image.name, image.shape) == ("image", ["batch", 3, "height", "width"])
        assert session.get_modelmeta().custom_metadata_map == expected
        needs("onnx").checker.check_model(str(exported), full_check=True)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_program_moves_to_another_device(checkpoint: Path, tmp_path: Path, device: str) -> None:
    path = export.export(tmp_path / "model.pt2", checkpoint=checkpoint)
    program = move_to_device_pass(torch.export.load(path), device)
    inputs = (pictures(2, 3, 20, 21), pictures(1, 3, 30, 22), torch.ones(1))
    result = program.module()(*(x.to(device) for x in inputs))
    assert (result.device.type, result.shape) == (device, inputs[0].shape)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("fastgan" in target or "empty" in target for target in targets)
    if device != "meta":
        expected = load_recipe(checkpoint).generator(*inputs[:2])
        assert (result.cpu() - expected).abs().max() <= 10 * ALLOWED  # TF32 convolutions


@pytest.mark.parametrize(
    ("kind", "format"), [(CycleGAN, "onnx"), (UNIT, "onnx"), (UNIT, "torch-export")]
)
def test_translation_parity(kind: type[TwoDomainRecipe], format: str, tmp_path: Path) -> None:
    recipe = kind(tiny_config(kind)).eval().requires_grad_(False)
    path = save_tiny_recipe(recipe, tmp_path)
    out = tmp_path / f"model{ending(format)}"
    export.export(out, checkpoint=path, direction="BtoA")
    run = runner(out)
    least = 2 * recipe.size_multiple
    for shape in ((1, least, 4 * least), (2, 33, 47), (3, 50, 41)):
        images = pictures(shape[0], 3, *shape[1:])
        close(run(images), recipe.stylize(images, direction="BtoA"))
    if format == "torch-export":  # nothing of the other direction, nor of discriminators
        held = torch.export.load(out).state_dict.values()
        used = recipe.translator("BtoA").state_dict().values()
        assert sum(x.numel() for x in held) == sum(x.numel() for x in used)


def test_a_recipe_is_exported_in_fp32_and_stays_as_it_is(tmp_path: Path) -> None:
    recipe = tiny_style_transfer().bfloat16().to(memory_format=torch.channels_last).train()
    out = export.export(tmp_path / "model.pt2", checkpoint=recipe)
    assert recipe.training
    assert {parameter.dtype for parameter in recipe.parameters()} == {torch.bfloat16}
    content, style = pictures(1, 3, 20, 21), pictures(1, 3, 30, 22)
    close(runner(out)(content, style, torch.ones(1)), recipe.float().generator(content, style))


@pytest.mark.parametrize("format", FORMATS)
def test_parity_of_the_pretrained_checkpoint(format: str, tmp_path: Path) -> None:
    run = runner(export.export(tmp_path / f"model{ending(format)}"))
    generator = load_recipe(pretrained_checkpoint()).generator
    for shape in ((1, 3, 64, 64), (2, 3, 97, 131), (2, 3, 150, 55)):
        content, style, alpha = pictures(*shape), pictures(1, 3, 50, 77), torch.rand(shape[0])
        close(run(content, style, alpha), generator(content, style, alpha))


class TestCommandLine:
    def test_the_pretrained_checkpoint_is_the_default(
        self,
        checkpoint: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(inference, "__file__", str(tmp_path / "inference.py"))
        out = tmp_path / "deep" / "model.pt2"
        assert cli.main(["export", "--out", str(out)]) == 2
        assert "lacks the pretrained one" in capsys.readouterr().err
        (tmp_path / "pretrained").mkdir()
        (tmp_path / "pretrained" / "lite.safetensors").write_bytes(checkpoint.read_bytes())
        assert cli.main(["export", "--out", str(out), "--format", "torch-export"]) == 0
        assert capsys.readouterr().out.startswith(f"wrote {out}, ")
        assert out.exists()

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (("--out", "model"), "out: must end in .onnx or .pt2, got model"),
            (("--out", "m.pt2", "--format", "onnx"), "out: must end in .onnx, got m.pt2"),
            (("--out", "m.pt2", "--checkpoint", "nowhere.safetensors"), "nowhere.safetensors"),
            (("--out", "m.pt2", "--direction", "AtoB"), "direction: style_transfer has none"),
        ],
    )
    def test_wrong_arguments(
        self,
        checkpoint: Path,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        flags: tuple[str, ...],
        complaint: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["export", "--checkpoint", str(checkpoint), *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fastgan: ")
        assert complaint in said
        assert said.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_unknown_format(self) -> None:
        with pytest.raises(ValueError, match=r"^format: must be one of onnx, .* got 'tflite'"):
            export.export("model.onnx", format="tflite")  # type: ignore[arg-type]

    @pytest.mark.parametrize("format", FORMATS)
    def test_out_that_cannot_be_written(
        self, checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, format: str
    ) -> None:
        out = tmp_path / f"folder{ending(format)}"
        out.mkdir()
        assert cli.main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"fastgan: out: {out} is a folder\n"

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_full_disk(
        self,
        checkpoint: Path,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        format: str,
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        out = tmp_path / f"model{ending(format)}"
        monkeypatch.setattr(os, "fsync", full)
        assert cli.main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 1
        assert f"could not write {out}: No space left on device" in capsys.readouterr().err
        assert not list(tmp_path.glob("model*"))

    def test_recipes_with_directions_need_one(self, tmp_path: Path) -> None:
        path = save_tiny_recipe(CycleGAN(tiny_config(CycleGAN)), tmp_path)
        with pytest.raises(ValueError, match="needs AtoB or BtoA, got None"):
            export.export(tmp_path / "m.pt2", checkpoint=path)

    def test_a_recipe_that_it_does_not_know(self, tmp_path: Path) -> None:
        path = save_tiny_recipe(Dummy(DummyConfig()), tmp_path)
        with pytest.raises(ValueError, match="cannot export the recipe dummy"):
            export.export(tmp_path / "m.pt2", checkpoint=path)

    @pytest.mark.parametrize("module", ["onnx", "onnxscript"])
    def test_missing_extra(self, checkpoint: Path, tmp_path: Path, module: str) -> None:
        needs("onnx")
        code = (
            "import sys\n"
            f"sys.modules[{module!r}] = None\n"
            "from fastgan import cli\n"
            "sys.exit(cli.main(sys.argv[1:]))\n"
        )
        flags: list[Any] = ["--checkpoint", checkpoint, "--out", tmp_path / "model.onnx"]
        ended = subprocess.run(
            [sys.executable, "-c", code, "export", *map(str, flags)],
            capture_output=True, text=True, timeout=60, check=False,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr == f"fastgan: export needs {module}: pip install 'fastgan[export]'\n"
