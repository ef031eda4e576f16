"""Pictures in, pictures out."""

import dataclasses
import itertools
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor

import fastgan
from dummy_recipe import Dummy
from fastgan import checkpoint, inference
from fastgan.checkpoint import CheckpointError
from fastgan.images import ImageError, from_pil, load_image, to_float, to_uint8
from fastgan.inference import keep_color, load_recipe, pretrained_checkpoint, stylize
from fastgan.metrics import gram_distance
from fastgan.models.features import RandomFeatures
from fastgan.recipes import Recipe
from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.style_transfer import StyleTransfer
from fastgan.training import Trainer, preset_config
from fastgan.training.config import Output, Pictures
from pictures import write_pictures
from tiny import save_tiny_recipe, tiny_config, tiny_style_transfer


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


def size_of(path: Path) -> tuple[int, int]:
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
    assert stylize(content, style, out, checkpoint=run, alpha=0.7, device="cpu") == [out]
    assert size_of(out) == (width, height)
    recipe = load_recipe(run)
    with torch.no_grad():
        expected = recipe.stylize(
            to_float(load_image(content)[None]), to_float(load_image(style)[None]), alpha=0.7
        )
    assert torch.equal(load_image(out), to_uint8(expected[0]))


def test_alpha_0_is_the_content(run: Path, folders: Pictures, tmp_path: Path) -> None:
    content = write(tmp_path / "in.png")
    style, out = folders.style / "0.png", tmp_path / "out.png"
    stylize(content, style, out, checkpoint=run, alpha=0.0, device="cpu")
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
            [tmp_path / "in", single], folders.style / "0.png", tmp_path / "out.d", checkpoint=run
        )
    expected = ["a.png", "b/a.jpg", "b/c/odd.png", "b/c/wide.webp", "single.png"]
    assert [str(path.relative_to(tmp_path / "out.d")) for path in written] == expected
    for number, path in enumerate(written[:4]):
        assert size_of(path) == (30, 21 + number)
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped {tmp_path / 'in' / 'broken.png'}: no picture",
        "1 of 6 files are no readable pictures",
    ]


# --- Control over style -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small style_transfer that has learned to draw coloured stripes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        recipe = tiny_style_transfer(weight_adversarial=0.0)
        recipe.begin_training(48)
        smooth = F.interpolate(torch.rand(2, 3, 6, 6), scale_factor=8, mode="bilinear")
    batch = {"content": smooth * 2 - 1, "style": stripes().expand(2, -1, -1, -1)}
    optimizer = torch.optim.Adam(recipe.generator.parameters(), recipe.config.lr)
    for _ in range(50):
        optimizer.zero_grad()
        terms = recipe.losses("generator", batch, recipe.begin_step(batch))
        sum(terms.values()).backward()
        optimizer.step()
    return save_tiny_recipe(recipe, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def recipe(trained: Path) -> StyleTransfer:
    loaded = load_recipe(trained)
    assert isinstance(loaded, StyleTransfer)
    return loaded


def stripes(side: int = 48) -> Tensor:
    values = torch.arange(side).div(3, rounding_mode="floor") % 2 * 2.0 - 1
    return (values * torch.tensor([0.9, 0.4, -0.5]).view(1, 3, 1, 1)).expand(1, 3, side, side)


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """[3,H,W] in [-1, 1]."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def several_styles() -> list[Tensor]:
    return [stripes()[0], noise(30, 41), 0.3 * noise(17, 9, 1) - 0.5]


@pytest.mark.parametrize("size", [(40, 56), (33, 47), (5, 3)])
def test_alpha_0_decodes_the_features_of_the_content(
    recipe: StyleTransfer, size: tuple[int, int]
) -> None:
    content = noise(*size)
    with torch.no_grad():
        decoded = recipe.generator.decoder(recipe.generator.content_encoder(content[None]))
    result = stylize(content, stripes(), checkpoint=recipe, alpha=0.0)
    torch.testing.assert_close(result, decoded[0, :, : size[0], : size[1]], rtol=0, atol=1e-6)


def test_the_gram_distance_falls_as_alpha_grows(recipe: StyleTransfer) -> None:
    content = F.interpolate(noise(6, 6, 3)[None], scale_factor=8, mode="bilinear")
    judge = RandomFeatures(levels=3, seed=7)
    distances = [
        gram_distance(stylize(content, stripes(), checkpoint=recipe, alpha=a), stripes(), judge)
        for a in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert all(after < before for before, after in itertools.pairwise(distances)), distances


@pytest.mark.parametrize("hot", range(3))
def test_one_hot_weights_are_the_single_style(recipe: StyleTransfer, hot: int) -> None:
    content, styles = noise(33, 40, 5), several_styles()
    weights = [3.0 if number == hot else 0 for number in range(3)]
    mixed = stylize(content, styles, checkpoint=recipe, style_weights=weights)
    assert torch.equal(mixed, stylize(content, styles[hot], checkpoint=recipe))


def test_weights_mix_the_maps_that_adain_gives(recipe: StyleTransfer) -> None:
    content, styles, weights = noise(33, 40, 5)[None], several_styles(), [0.7, 0.1, 0.2]
    network = recipe.generator
    with torch.no_grad():
        features = network.content_encoder(content)
        maps = [fastgan.adain(features, network.style_encoder(s[None])) for s in styles]
        mixed = sum(w * x for w, x in zip(weights, maps, strict=True))
        expected = network.decoder(mixed)[..., :33, :40]
    result = stylize(content, styles, checkpoint=recipe, style_weights=weights)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert (result - stylize(content, styles[0], checkpoint=recipe)).abs().max() > 0.01

    order = [2, 0, 1]
    permuted = stylize(
        content,
        [styles[i] for i in order],
        checkpoint=recipe,
        style_weights=[10 * weights[i] for i in order],  # any sum
    )
    torch.testing.assert_close(permuted, result, rtol=0, atol=1e-5)


def test_without_weights_styles_count_alike_and_a_folder_is_one(
    recipe: StyleTransfer, tmp_path: Path
) -> None:
    files = [write(tmp_path / "styles" / f"{name}.png", 20 + name, 30) for name in range(3)]
    other, content = write(tmp_path / "other.png", 40), noise(24, 25)
    equal = stylize(content, files, checkpoint=recipe)
    folder = stylize(content, tmp_path / "styles", checkpoint=recipe)
    torch.testing.assert_close(equal, folder, rtol=0, atol=1e-6)
    halves = stylize(content, [tmp_path / "styles", other], checkpoint=recipe)
    single = stylize(content, [*files, other], checkpoint=recipe, style_weights=[1, 1, 1, 3])
    torch.testing.assert_close(halves, single, rtol=0, atol=1e-6)


def test_a_style_for_each_picture(recipe: StyleTransfer) -> None:
    content, styles = noise(2 * 20, 24).view(2, 3, 20, 24), noise(2 * 30, 17).view(2, 3, 30, 17)
    results = stylize(content, [styles, stripes()], checkpoint=recipe)
    for picture, style, result in zip(content, styles, results, strict=True):
        expected = stylize(picture, [style, stripes()], checkpoint=recipe)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert (stylize(content[:1].expand(2, -1, -1, -1), styles, checkpoint=recipe)).diff(
        dim=0
    ).abs().max() > 0.01
    with pytest.raises(ValueError, match="must hold 1 or 3 pictures, as content has, got 2"):
        stylize(noise(30, 8).view(3, 3, 10, 8), styles, checkpoint=recipe)
    with pytest.raises(ValueError, match="must hold 1 picture, got 2"):
        stylize(content[0], styles, checkpoint=recipe)


def test_recipes_that_cannot_mix_say_so(run: Path) -> None:
    with pytest.raises(ValueError, match="style: dummy takes one style picture, got 2"):
        stylize(noise(9, 9), [noise(9, 9), noise(9, 9)], checkpoint=run)


YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def test_keep_color_takes_y_from_the_result_and_i_and_q_from_the_content() -> None:
    content, result = 0.4 * noise(9, 7)[None], 0.4 * noise(9, 7, 1)[None]
    y, i, q = torch.einsum("yc,bchw->ybhw", YIQ, keep_color(result, content))
    torch.testing.assert_close(y, torch.einsum("c,bchw->bhw", YIQ[0], result))
    for chroma, row in ((i, YIQ[1]), (q, YIQ[2])):
        expected = torch.einsum("c,bchw->bhw", row, content)
        torch.testing.assert_close(chroma, expected, rtol=0, atol=2e-4)  # rounded rows


def test_keep_color_of_a_rendered_picture(recipe: StyleTransfer, tmp_path: Path) -> None:
    content = write(tmp_path / "in.png", 31, 42)
    plain = stylize(content, stripes(), checkpoint=recipe)
    coloured = stylize(content, stripes(), checkpoint=recipe, keep_color=True)
    y, i, q = (YIQ @ (from_pil(coloured).float() / 127.5 - 1).flatten(1)).unbind()
    _, i_content, q_content = (YIQ @ to_float(load_image(content)).flatten(1)).unbind()
    y_plain = (YIQ @ to_float(from_pil(plain)).flatten(1))[0]
    inside = ((from_pil(coloured) > 0) & (from_pil(coloured) < 255)).all(0).flatten()
    assert inside.float().mean() > 0.3
    step = 2 / 255
    for actual, expected in ((y, y_plain), (i, i_content), (q, q_content)):
        assert (actual - expected)[inside].abs().max() <= 1.01 * step
    assert from_pil(coloured).float().sub(from_pil(plain).float()).abs().mean() > 5


# --- One picture --------------------------------------------------------------------------------


def test_pictures_come_back_as_they_are_given(recipe: StyleTransfer, tmp_path: Path) -> None:
    path, style = write(tmp_path / "in.png", 22, 31), write(tmp_path / "style.png", 40, 30)
    with Image.open(path) as content, Image.open(style) as style_image:
        rendered = stylize(content, style_image, checkpoint=recipe)
    assert isinstance(rendered, Image.Image)
    assert (rendered.size, rendered.mode) == ((31, 22), "RGB")
    expected = from_pil(rendered)
    assert torch.equal(from_pil(stylize(str(path), str(style), checkpoint=recipe)), expected)

    pixels = load_image(path)
    for picture in (pixels, pixels[None]):
        result = stylize(picture, load_image(style), checkpoint=recipe)
        assert (result.dtype, result.shape) == (torch.uint8, picture.shape)
        assert torch.equal(result.view_as(expected), expected)
    images = to_float(pixels)[None].expand(2, -1, -1, -1).double()
    result = stylize(images, style, checkpoint=recipe)
    assert (result.dtype, result.shape) == (torch.float64, images.shape)
    assert (to_uint8(result[1]).int() - expected.int()).abs().max() <= 1  # a batch rounds otherwise
    (2 * result.requires_grad_()).sum().backward()  # no inference tensor


def test_a_pillow_image_is_turned_upright(recipe: StyleTransfer) -> None:
    image = Image.fromarray(np.zeros((20, 30, 4), np.uint8))
    image.getexif()[ExifTags.Base.Orientation] = 6
    assert stylize(image, stripes(), checkpoint=recipe).size == (20, 30)


def test_a_picture_of_another_domain(tmp_path: Path) -> None:
    translator = CycleGAN(tiny_config(CycleGAN)).eval()
    path = save_tiny_recipe(translator, tmp_path)
    content = noise(21, 30)[None]
    with torch.no_grad():
        expected = translator.stylize(content, direction="BtoA")
    result = stylize(content, checkpoint=path, direction="BtoA", device="cpu")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    coloured = stylize(content, checkpoint=path, direction="BtoA", device="cpu", keep_color=True)
    torch.testing.assert_close(coloured, keep_color(expected, content), rtol=0, atol=1e-5)
    for wrong in ({}, {"direction": "BtoA", "style": stripes()}):
        with pytest.raises(ValueError, match="direction"):
            stylize(content, checkpoint=path, **wrong)


def test_max_side_reduces_first(recipe: StyleTransfer, tmp_path: Path) -> None:
    path = write(tmp_path / "in.png", 30, 64)
    small = stylize(path, stripes(24), checkpoint=recipe, max_side=32)
    assert small.size == (32, 15)
    with Image.open(path) as image:
        reduced = image.resize((32, 15), Image.Resampling.BILINEAR)
    expected = stylize(reduced, stripes(24), checkpoint=recipe)
    assert (from_pil(small).float() - from_pil(expected).float()).abs().mean() < 2
    for picture in (load_image(path), to_float(load_image(path))[None].half()):
        reduced = stylize(picture, stripes(24), checkpoint=recipe, max_side=32)
        assert (reduced.dtype, reduced.shape[-2:]) == (picture.dtype, (15, 32))
    assert stylize(path, stripes(), checkpoint=recipe, max_side=64).size == (64, 30)
    wide = write(tmp_path / "wide.png", 1, 90)
    assert stylize(wide, stripes(), checkpoint=recipe, max_side=9).size == (9, 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_is_close_to_fp32(trained: Path, precision: str) -> None:
    content, style = noise(37, 44), stripes()
    full = stylize(content, style, checkpoint=trained, device="cpu", precision="fp32")
    half = stylize(content, style, checkpoint=trained, device="cpu", precision=precision)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().mean() < 0.01


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(trained: Path, tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "in" / f"{number}.png", 61 + number // 3, 90)
    results = {}
    for device, precision in (("cpu", None), ("cuda", "fp32"), ("cuda", None)):
        out = tmp_path / f"{device}{precision}"
        written = stylize(
            tmp_path / "in",
            several_styles(),
            out,
            checkpoint=trained,
            device=device,
            precision=precision,
            keep_color=True,
            batch_size=2,
        )
        results[device, precision] = torch.stack([load_image(p)[:, :61].float() for p in written])
    exact = results["cpu", None]
    assert (results["cuda", "fp32"] - exact).abs().max() <= 2  # TF32 convolutions
    assert (results["cuda", None] - exact).abs().mean() < 2  # 16 bits
    image = stylize(noise(40, 40).cuda(), stripes().cuda(), checkpoint=trained, device="cuda")
    assert image.device.type == "cuda"


def test_a_recipe_keeps_its_own_device_and_precision(recipe: StyleTransfer) -> None:
    for option in ({"device": "cpu"}, {"precision": "bf16"}):
        with pytest.raises(ValueError, match="device and precision: the recipe given"):
            stylize(noise(9, 9), stripes(), checkpoint=recipe, **option)


def test_the_pretrained_checkpoint_is_the_default(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "__file__", str(tmp_path / "inference.py"))
    with pytest.raises(FileNotFoundError, match=r"lacks the pretrained one, .*reinstall fastgan"):
        pretrained_checkpoint()
    (tmp_path / "pretrained").mkdir()
    pretrained_checkpoint_path = tmp_path / "pretrained" / "lite.safetensors"
    pretrained_checkpoint_path.write_bytes(trained.read_bytes())
    assert pretrained_checkpoint() == pretrained_checkpoint_path
    content = noise(20, 20)
    expected = stylize(content, stripes(), checkpoint=trained, device="cpu")
    assert torch.equal(stylize(content, stripes(), device="cpu"), expected)


# --- Folders ------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, tuple[int, int]]:
    """Names below ``in/`` and sizes (width, height) of pictures of every kind."""
    root = tmp_path / "in"
    sizes = {f"{number}.png": (30, 24) for number in range(5)}
    sizes |= {f"b/c/{number}.jpg": (24, 30) for number in range(3)}
    sizes |= {"b/wide.webp": (130, 9), "b/Ünïcödé 名.png": (30, 24), "x/1.bmp": (1, 1)}
    for name, (width, height) in sizes.items():
        write(root / name, height, width)
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (24, 30), dtype=np.uint8)
    Image.fromarray(grey).save(root / "grey.png")
    Image.fromarray(grey * np.uint16(257)).save(root / "deep.tif")
    Image.fromarray(rng.integers(0, 255, (24, 30, 4), dtype=np.uint8)).save(root / "alpha.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(grey).save(root / "turned.jpg", exif=exif)
    return sizes | dict.fromkeys(("grey.png", "deep.tif", "alpha.png"), (30, 24)) | {
        "turned.jpg": (24, 30)
    }  # fmt: skip


def test_every_picture_once_with_its_name_and_size(
    recipe: StyleTransfer,
    tree: dict[str, tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[tuple[int, ...]] = []
    render = StyleTransfer.stylize

    def noting(self: Recipe, content: Tensor, *args: object, **options: object) -> Tensor:
        batches.append(tuple(content.shape))
        return render(self, content, *args, **options)

    monkeypatch.setattr(StyleTransfer, "stylize", noting)
    results = {}
    for size in (1, 3):
        out = tmp_path / f"out{size}"
        batches.clear()
        content = [tmp_path / "in", tmp_path / "in" / "0.png"]  # one of them twice
        written = stylize(content, stripes(), out, checkpoint=recipe, batch_size=size)
        assert {str(p.relative_to(out)): size_of(p) for p in written} == tree
        assert sorted(written) == sorted(p for p in out.rglob("*") if p.is_file())
        assert sum(batch[0] for batch in batches) == len(tree)
        results[size] = [load_image(path).int() for path in written if path.suffix != ".jpg"]
    assert sorted(batches) == sorted(
        [(3, 3, 24, 30)] * 3 + [(3, 3, 30, 24), (1, 3, 30, 24), (1, 3, 9, 130), (1, 3, 1, 1)]
    )
    for alone, together in zip(results[1], results[3], strict=True):
        assert (alone - together).abs().max() <= 1


def test_pictures_of_one_name_are_told_apart(
    recipe: StyleTransfer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    sizes = {first / "a.gif": 20, first / "a.jpg": 21, first / "a.png": 22, second / "a.png": 23}
    for path, height in sizes.items():
        write(path, height)
    with caplog.at_level(logging.WARNING, "fastgan"):
        written = stylize([first, second], stripes(), out, checkpoint=recipe)
    names = ["a_3.png", "a.jpg", "a.png", "a_2.png"]
    assert written == [out / name for name in names]
    assert [size_of(path)[1] for path in written] == list(sizes.values())
    assert [record.getMessage() for record in caplog.records] == [
        f"{second / 'a.png'} becomes {out / 'a_2.png'}: {first / 'a.png'} becomes {out / 'a.png'}",
        f"{first / 'a.gif'} becomes {out / 'a_3.png'}: {first / 'a.png'} becomes {out / 'a.png'}",
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_strict_ends_at_the_first_file_that_is_no_picture(
    recipe: StyleTransfer, tmp_path: Path, batch_size: int
) -> None:
    write(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_text("no picture")
    options = {"checkpoint": recipe, "batch_size": batch_size}
    written = stylize(tmp_path / "in", stripes(), tmp_path / "out", **options)
    assert [path.name for path in written] == ["a.png"]
    with pytest.raises(ImageError, match=r"b\.png: no picture"):
        stylize(tmp_path / "in", stripes(), tmp_path / "out", strict=True, **options)


def test_links_in_a_circle_are_skipped_and_counted(
    recipe: StyleTransfer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "a.png").symlink_to("b.png")
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    written = stylize(tmp_path / "in", stripes(), tmp_path / "out", checkpoint=recipe)
    assert [path.name for path in written] == ["good.png"]
    assert f"skipped {tmp_path / 'in' / 'a.png'}: Too many levels of symbolic links" in caplog.text
    assert "2 of 3 files are no readable pictures" in caplog.text


def test_unreadable_pictures_of_a_style_folder_are_skipped(
    recipe: StyleTransfer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write(tmp_path / "styles" / "a.png")
    (tmp_path / "styles" / "b.png").write_text("no picture")
    content = noise(20, 20)
    expected = stylize(content, good, checkpoint=recipe)
    assert torch.equal(stylize(content, tmp_path / "styles", checkpoint=recipe), expected)
    assert "b.png: no picture" in caplog.text
    with pytest.raises(ImageError, match=r"b\.png: no picture"):
        stylize(content, tmp_path / "styles", checkpoint=recipe, strict=True)
    good.write_text("no picture")
    with pytest.raises(ValueError, match="style: none of 2 files is a readable picture"):
        stylize(content, tmp_path / "styles", checkpoint=recipe)


def test_out_of_memory_is_one_line_that_helps(
    recipe: StyleTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")

    for name in "abc":
        write(tmp_path / "in" / f"{name}.png", 24, 20)
    monkeypatch.setattr(StyleTransfer, "stylize", fail)
    with pytest.raises(MemoryError) as caught:
        stylize(tmp_path / "in", stripes(), tmp_path / "out", checkpoint=recipe, batch_size=2)
    assert str(caught.value) == (
        "out of memory: 2 pictures of 20x24 px in float32 on cpu; "
        "a smaller --batch-size or a smaller --max-side will help"
    )

    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(StyleTransfer, "stylize", broken)
    with pytest.raises(RuntimeError, match="something else"):
        stylize(noise(9, 9), stripes(), checkpoint=recipe)


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

    @pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), "1", torch.ones(2)])
    def test_alpha(self, refused: Callable[..., object], alpha: object) -> None:
        caught = refused(ValueError, alpha=alpha)
        assert str(caught.value).startswith("alpha must be a number in [0, 1], got ")

    def test_weights(self, refused: Callable[..., object], folders: Pictures) -> None:
        styles = [folders.style / "0.png", folders.style / "1.png"]
        nan = float("nan")
        for weights in ([1], [1, 1, 1], [], [1, -1], [1, nan], [1, float("inf")], [0, 0]):
            caught = refused(ValueError, style=styles, style_weights=weights)
            assert str(caught.value).startswith("style_weights must be ")
        refused(ValueError, style=None, style_weights=[1.0])
        for weights in (1.0, ["half", "half"]):
            caught = refused(TypeError, style=styles, style_weights=weights)
            assert str(caught.value).startswith("style_weights must be a list of numbers, got ")

    def test_direction(self, refused: Callable[..., object]) -> None:
        caught = refused(ValueError, direction="AtoB")
        assert str(caught.value) == "direction: dummy has none, its style picture decides"

    def test_counts(self, refused: Callable[..., object]) -> None:
        refused(ValueError, batch_size=0)
        refused(ValueError, batch_size=1.5)
        refused(ValueError, max_side=0)
        refused(ValueError, max_side="256")

    def test_what_is_no_picture(self, run: Path, tmp_path: Path) -> None:
        for shape in ((9, 9), (1, 9, 9), (3, 0, 9), (1, 1, 3, 9, 9)):
            with pytest.raises(ValueError, match=r"a picture must be \[3, H, W\] or"):
                stylize(torch.zeros(shape), stripes(), checkpoint=run)
        with pytest.raises(TypeError, match=r"uint8 or float in \[-1, 1\], got torch.int64"):
            stylize(torch.zeros(3, 9, 9).long(), stripes(), checkpoint=run)
        for several in ([tmp_path / "a.png"], tmp_path, str(tmp_path)):
            with pytest.raises(TypeError, match="several pictures need a folder"):
                stylize(several, stripes(), checkpoint=run)
        kinds = "a picture must be a file, a Pillow image or a tensor, got "
        for wrong in (np.zeros((9, 9, 3)), 3, None):
            with pytest.raises(TypeError, match=kinds + type(wrong).__name__):
                stylize(wrong, stripes(), checkpoint=run)
        with pytest.raises(TypeError, match=f"{kinds}int"):
            stylize(noise(9, 9), 3, checkpoint=run)
        with pytest.raises(TypeError, match="with out, expected files and folders, got Tensor"):
            stylize(noise(9, 9), stripes(), tmp_path / "out.png", checkpoint=run)

    def test_no_content(self, refused: Callable[..., object], tmp_path: Path) -> None:
        refused(ValueError, content=[])
        refused(FileNotFoundError, content=tmp_path / "nowhere")
        empty = tmp_path / "empty"
        empty.mkdir()
        caught = refused(ValueError, content=empty)
        assert str(caught.value) == f"content: no pictures in {empty}"
        (empty / "photo.heic").touch()
        endings = ".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp"
        for name in ("content", "style"):
            caught = refused(ValueError, **{name: empty})
            assert str(caught.value) == f"{name}: no pictures in {empty} (looked for {endings})"

    def test_pictures_that_are_none(self, refused: Callable[..., object], tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no picture")
        refused(ImageError, content=tmp_path / "text.png")
        refused(ImageError, style=tmp_path / "text.png")
        refused(ImageError, style=tmp_path / "nowhere.png")

    def test_out(self, refused: Callable[..., object], tmp_path: Path, folders: Pictures) -> None:
        refused(ValueError, out=tmp_path / "out.xyz")
        refused(ValueError, out=tmp_path / "in.png")
        refused(ValueError, out=tmp_path)  # in.png would be overwritten
        out = write(tmp_path / "one" / "a.png").with_name("out.png")
        for several in (folders.content, tmp_path / "one", [tmp_path / "in.png"] * 2):
            caught = refused(ValueError, content=several, out=out)
            assert str(caught.value) == (
                f"out: must be a folder where content is a folder or several files, got {out}"
            )
        refused(ValueError, out=folders.style / "0.png")  # the style itself

    def test_checkpoint(self, refused: Callable[..., object], tmp_path: Path, run: Path) -> None:
        refused(CheckpointError, checkpoint=tmp_path / "nowhere.safetensors")
        refused(ValueError, checkpoint=tmp_path)  # a folder without a run
        state = checkpoint.load(run / "latest.safetensors")
        for name, change in {
            "recipe": {"recipe": "unheard_of"},
            "config": {"config": {"recipe": {"future": 1}}},
            "width": {"config": {"recipe": {"width": 3}}},
            "none": {"networks": None},
            "number": {"recipe": 3},
            "list": {"config": [1]},
            "empty": {"config": {"training": {}}},
            "tuple": {"average": (1,)},
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
        caught = refused(ValueError, checkpoint=tmp_path / "zip.pth")
        assert "it is no pickle, or one of more than tensors" in str(caught.value)
        assert not (tmp_path / "executed").exists()

    def test_device_and_precision(self, refused: Callable[..., object]) -> None:
        refused(ValueError, device="toaster")
        caught = refused(ValueError, precision="fp8")
        assert str(caught.value) == "precision must be one of fp32, bf16, fp16, got 'fp8'"
