"""Pictures in, pictures out."""

import dataclasses
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dummy_recipe import Dummy
from fastgan import checkpoint
from fastgan.checkpoint import CheckpointError
from fastgan.images import ImageError, load_image, to_float, to_uint8
from fastgan.inference import load_recipe, stylize
from fastgan.training import Trainer, preset_config
from fastgan.training.config import Output, Pictures
from pictures import write_pictures


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(folders: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    config = preset_config(Dummy, None, folders, Output(out))
    training = dataclasses.replace(config.training, steps=3, device="cpu")
    Trainer(Dummy, dataclasses.replace(config, training=training)).train()
    return out


def write(path: Path, height: int = 24, width: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_load_recipe_holds_the_averaged_weights(run: Path) -> None:
    state = checkpoint.load(run / "latest.safetensors")
    for path in (run, run / "latest.safetensors"):
        recipe = load_recipe(path)
        assert not recipe.training
        assert not any(parameter.requires_grad for parameter in recipe.parameters())
        held = recipe.state_dict()
        assert set(held) == set(state["networks"])  # no extractor
        for name, value in {**state["networks"], **state["average"]}.items():
            assert torch.equal(held[name], value), name
    assert not torch.equal(held["generator.0.weight"], state["networks"]["generator.0.weight"])


@pytest.mark.parametrize(("height", "width"), [(24, 20), (33, 47), (9, 130)])
def test_one_picture(run: Path, folders: Pictures, tmp_path: Path, height: int, width: int) -> None:
    content = write(tmp_path / "in.png", height, width)
    style = folders.style / "0.png"
    out = tmp_path / "deep" / "out.png"
    assert stylize(run, content, style, out, alpha=0.7, device="cpu") == [out]
    assert size(out) == (width, height)
    recipe = load_recipe(run)
    with torch.no_grad():
        expected = recipe.stylize(
            to_float(load_image(content)[None]), to_float(load_image(style)[None]), alpha=0.7
        )
    assert torch.equal(load_image(out), to_uint8(expected[0]))


def test_alpha_0_is_the_content(run: Path, folders: Pictures, tmp_path: Path) -> None:
    content = write(tmp_path / "in.png")
    style, out = folders.style / "0.png", tmp_path / "out.png"
    stylize(run, content, style, out, alpha=0.0, device="cpu")
    assert torch.equal(load_image(out), load_image(content))


def test_folders_are_mirrored(
    run: Path, folders: Pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.png", "b/a.jpg", "b/c/odd.gif", "b/c/wide.webp"]
    for number, name in enumerate(names):
        write(tmp_path / "in" / name, 21 + number, 30)
    (tmp_path / "in" / "broken.png").write_text("no picture")
    single = write(tmp_path / "single.png")
    with caplog.at_level(logging.WARNING, "fastgan"):
        written = stylize(
            run, [tmp_path / "in", single], folders.style / "0.png", tmp_path / "out.d"
        )
    expected = ["a.png", "b/a.jpg", "b/c/odd.png", "b/c/wide.webp", "single.png"]
    assert [str(path.relative_to(tmp_path / "out.d")) for path in written] == expected
    for number, path in enumerate(written[:4]):
        assert size(path) == (30, 21 + number)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"skipped {tmp_path / 'in' / 'broken.png'}"
    ]


class TestWrongArguments:
    """Refused before anything is written."""

    @pytest.fixture
    def refused(
        self, run: Path, folders: Pictures, tmp_path: Path
    ) -> Callable[..., pytest.ExceptionInfo[Exception]]:
        good = {
            "checkpoint": run,
            "content": write(tmp_path / "in.png"),
            "style": folders.style / "0.png",
            "out": tmp_path / "out",
        }

        def call(kind: type[Exception], **bad: object) -> pytest.ExceptionInfo[Exception]:
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(kind) as caught:
                stylize(**{**good, **bad})
            assert sorted(tmp_path.rglob("*")) == before
            assert "\n" not in str(caught.value)
            return caught

        return call

    @pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
    def test_alpha(self, refused: Callable[..., object], alpha: float) -> None:
        refused(ValueError, alpha=alpha)

    def test_no_content(self, refused: Callable[..., object], tmp_path: Path) -> None:
        refused(ValueError, content=[])
        refused(FileNotFoundError, content=tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        refused(ValueError, content=tmp_path / "empty")

    def test_pictures_that_are_none(self, refused: Callable[..., object], tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no picture")
        refused(ImageError, content=tmp_path / "text.png")
        refused(ImageError, style=tmp_path / "text.png")
        refused(ImageError, style=tmp_path / "nowhere.png")

    def test_out(self, refused: Callable[..., object], tmp_path: Path, folders: Pictures) -> None:
        refused(ValueError, out=tmp_path / "out.xyz")
        refused(ValueError, out=tmp_path / "in.png")
        refused(ValueError, out=tmp_path)  # in.png would be overwritten
        refused(ValueError, content=folders.content, out=tmp_path / "out.png")
        refused(ValueError, content=[folders.content, folders.style])  # names collide

    def test_checkpoint(self, refused: Callable[..., object], tmp_path: Path, run: Path) -> None:
        refused(CheckpointError, checkpoint=tmp_path / "nowhere.safetensors")
        refused(ValueError, checkpoint=tmp_path)  # a folder without a run
        state = checkpoint.load(run / "latest.safetensors")
        for name, change in {
            "recipe": {"recipe": "unheard_of"},
            "config": {"config": {"recipe": {"future": 1}}},
            "width": {"config": {"recipe": {"width": 3}}},
            "none": {"networks": None},
        }.items():
            path = tmp_path / f"{name}.safetensors"
            changed = {key: value for key, value in {**state, **change}.items() if value}
            checkpoint.save(path, changed)
            refused(ValueError, checkpoint=path)

    def test_a_pickle_is_not_executed(self, refused: Callable[..., object], tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[object, ...]]:
                return (Path.touch, (tmp_path / "executed",))

        for name in ("model.pt", "model.safetensors"):
            (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
            caught = refused(CheckpointError, checkpoint=tmp_path / name)
            assert "a pickle" in str(caught.value)
        torch.save({"bomb": Bomb()}, tmp_path / "zip.pth")
        refused(CheckpointError, checkpoint=tmp_path / "zip.pth")
        assert not (tmp_path / "executed").exists()

    def test_device(self, refused: Callable[..., object]) -> None:
        refused(ValueError, device="toaster")
