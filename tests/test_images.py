"""Pictures of every kind come in as upright RGB; files that are none are named."""

import errno
import io
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fastgan.images import (
    ImageError,
    WriteError,
    find_images,
    from_pil,
    image_size,
    load_image,
    save_image,
    to_float,
    to_pil,
    to_uint8,
)


def gradient(height: int = 5, width: int = 7) -> np.ndarray:
    """RGB with a different value in every pixel and channel."""
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def write(path: Path, image: Image.Image | np.ndarray, **options: Any) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def hwc(path: Path) -> np.ndarray:
    tensor = load_image(path)
    assert tensor.dtype == torch.uint8
    assert tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


def png(width: int, height: int, depth: int, scanlines: bytes, colour: int = 2) -> bytes:
    """A file written by hand, RGB by default: Pillow writes neither 16-bit colour nor lies."""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(scanlines)),
        (b"IEND", b""),
    ):
        chunk = kind + data
        content += struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


def test_rgb_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", gradient())
    np.testing.assert_array_equal(hwc(path), gradient())


def test_one_pixel(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", gradient(1, 1))
    np.testing.assert_array_equal(hwc(path), gradient(1, 1))


def test_the_extension_may_lie_about_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", gradient(), format="PNG")
    np.testing.assert_array_equal(hwc(path), gradient())


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "I"])
def test_grey_has_three_equal_channels(tmp_path: Path, mode: str) -> None:
    grey = np.array([[0, 255, 0], [255, 0, 255]], dtype=np.uint8)
    image = Image.fromarray(grey if mode in "L1" else grey * np.uint16(257))
    path = write(tmp_path / "a.tif", image.convert(mode))
    np.testing.assert_array_equal(hwc(path), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, extension: str) -> None:
    samples = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    path = tmp_path / f"a.{extension}"
    if extension == "pgm":  # which older Pillows read, but do not write
        path.write_bytes(b"P5 8 1 65535\n" + samples.astype(">u2").tobytes())
    else:
        write(path, samples)
    assert hwc(path)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_16_bit_colour_is_scaled_not_clipped(tmp_path: Path) -> None:
    samples = np.array([[[0, 32768, 65535], [257, 25700, 51400]]], dtype=">u2")
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, b"\0" + samples.tobytes()))
    assert hwc(tmp_path / "a.png").tolist() == [[[0, 128, 255], [1, 100, 200]]]


def test_float_samples_are_fractions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.array([[0, 0.5, 1]], dtype=np.float32))
    assert hwc(path)[0, :, 0].tolist() == [0, 128, 255]
    for wrong in (1.5, -0.1, np.nan):
        write(path, np.array([[0, wrong]], dtype=np.float32))
        with pytest.raises(ImageError, match=r"float32 beyond \[0, 1\]"):
            load_image(path)


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    for extension in ("png", "gif"):
        path = write(tmp_path / f"a.{extension}", image)
        assert hwc(path).tolist() == [[[200, 100, 50], [10, 20, 30]]]


def test_transparent_pixels_are_laid_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [200, 0, 100, 51]]], dtype=np.uint8)
    expected = [[[255, 255, 255], [0, 0, 0], [244, 204, 224]]]
    assert hwc(write(tmp_path / "a.png", rgba)).tolist() == expected

    grey_alpha = Image.fromarray(np.array([[[0, 0], [9, 255]]], dtype=np.uint8), "LA")
    assert hwc(write(tmp_path / "b.png", grey_alpha))[0, :, 0].tolist() == [255, 9]

    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    path = write(tmp_path / "c.png", image, transparency=0)
    assert hwc(path).tolist() == [[[200, 100, 50], [255, 255, 255]]]


def test_cmyk(tmp_path: Path) -> None:
    solid = np.array([[[0, 0, 0, 0]], [[0, 0, 0, 255]], [[0, 255, 255, 0]]], dtype=np.uint8)
    path = write(tmp_path / "a.tif", Image.fromarray(solid, "CMYK"))
    assert hwc(path).tolist() == [[[255, 255, 255]], [[0, 0, 0]], [[255, 0, 0]]]
    path = write(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)))
    np.testing.assert_allclose(hwc(path), np.full((16, 16, 3), [255, 0, 0]), atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tif", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, extension: str) -> None:
    upright = gradient()
    stored = {  # what a camera stores so that each orientation's rule gives back `upright`
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if extension == "webp" else {}
    path = write(tmp_path / f"a.{extension}", np.ascontiguousarray(stored), exif=exif, **options)
    np.testing.assert_array_equal(hwc(path), upright)


def test_the_stated_size_is_that_before_turning(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = write(tmp_path / "a.jpg", gradient(5, 7), exif=exif)
    assert image_size(path) == (5, 7)
    assert load_image(path).shape == (3, 7, 5)
    path.with_name("b.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"b\.jpg: no picture"):
        image_size(path.with_name("b.jpg"))
    with pytest.raises(ImageError, match=r"absent\.jpg: No such file"):
        image_size(tmp_path / "absent.jpg")


def test_pillow_images_are_read_like_files(tmp_path: Path) -> None:
    grey = Image.fromarray(gradient()[..., 0])
    grey.getexif()[ExifTags.Base.Orientation] = 3
    turned = from_pil(grey)
    assert turned.dtype == torch.uint8
    assert torch.equal(turned, torch.from_numpy(gradient()[::-1, ::-1, 0].copy()).expand(3, -1, -1))
    for image in (Image.fromarray(gradient()), Image.fromarray(gradient()).convert("RGBA")):
        path = write(tmp_path / "a.png", image)
        assert torch.equal(from_pil(image), load_image(path))


def test_tensors_become_pillow_images() -> None:
    pixels = torch.from_numpy(gradient()).permute(2, 0, 1)
    for picture in (pixels, to_float(pixels)):
        image = to_pil(picture)
        assert (image.mode, image.size) == ("RGB", (7, 5))
        np.testing.assert_array_equal(np.asarray(image), gradient())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_spoils_no_picture(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(range(64))
    path = write(tmp_path / "a.jpg", gradient(16, 16), exif=exif)
    assert hwc(path).shape == (16, 16, 3)


def test_an_animation_gives_its_first_picture(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    path = write(tmp_path / "a.gif", red, save_all=True, append_images=[blue])
    assert hwc(path)[0, 0].tolist() == [255, 0, 0]


def test_min_side_reduces_jpegs_only_and_not_below_it(tmp_path: Path) -> None:
    smooth = np.asarray(
        Image.fromarray(gradient(4, 5)).resize((500, 400), Image.Resampling.BICUBIC)
    )
    jpeg, png = write(tmp_path / "a.jpg", smooth, quality=95), write(tmp_path / "a.png", smooth)
    sizes = {side: tuple(load_image(jpeg, min_side=side).shape[1:]) for side in (50, 51, 100, 201)}
    assert sizes == {50: (50, 63), 51: (100, 125), 100: (100, 125), 201: (400, 500)}
    assert load_image(png, min_side=50).shape == (3, 400, 500)
    reduced = load_image(jpeg, min_side=100).permute(1, 2, 0).numpy().astype(float)
    expected = smooth.reshape(100, 4, 125, 4, 3).mean(axis=(1, 3))
    assert np.abs(reduced - expected).mean() < 2


# --- files that are no pictures ---------------------------------------------------------------


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def bomb_bytes() -> bytes:
    """A PNG of a few bytes that says it has 10^10 pixels."""
    return png(100_000, 100_000, 8, bytes(100))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file$"),
        (b"hello, this is text\n", "no picture$"),
        (jpeg_bytes()[:-700], ".*truncated"),
        (jpeg_bytes()[:100], "."),
        (bomb_bytes(), ".*decompression bomb"),
        (png(2, 2, 8, bytes(6), colour=3), "lacks its palette$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no picture$"),
    ],
    ids=["empty", "text", "truncated", "header only", "bomb", "no palette", "PostScript"],
)
def test_a_bad_file_is_named_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"bad\.png: {reason}") as caught:
        load_image(path)
    assert caught.value.path == path


def test_missing_files_and_folders_are_image_errors(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png: No such file"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="Is a directory"):
        load_image(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_ruined_files_never_raise_anything_else(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "a"
    for extension in ("jpg", "png", "gif", "tif", "webp", "bmp", "ppm"):
        whole = write(tmp_path / f"whole.{extension}", gradient(20, 20)).read_bytes()
        for _ in range(60):
            ruined = bytearray(whole[: chance.randrange(len(whole) + 1)])
            for _ in range(chance.randrange(8) if ruined else 0):
                ruined[chance.randrange(len(ruined))] = chance.randrange(256)
            path.write_bytes(ruined)
            try:
                picture = load_image(path)
            except ImageError:
                continue
            assert picture.shape[0] == 3


@pytest.mark.parametrize("kind", [AttributeError, TypeError, NameError])
def test_a_fault_of_the_code_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def old(self: Image.Image) -> bool:
        raise kind("has_transparency_data")

    path = write(tmp_path / "a.png", gradient())
    monkeypatch.setattr(Image.Image, "has_transparency_data", property(old))
    with pytest.raises(kind, match="has_transparency_data"):
        load_image(path)


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a/b.png", "empty file")))
    assert str(error) == "a/b.png: empty file"


# --- finding ----------------------------------------------------------------------------------


def test_find_images(tmp_path: Path) -> None:
    names = ["b.PNG", "a.jpg", "sub/deep/c.Jpeg", "sub/d.webp", "z.tiff"]
    others = ["notes.txt", ".hidden.png", "._a.jpg", ".cache/e.png", "png", "sub/model.safetensors"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "absent.png")
    assert find_images(tmp_path) == sorted(tmp_path / name for name in names)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    data = tmp_path / "data"
    elsewhere = tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.png").touch()
    (data / "one").symlink_to(elsewhere)
    (data / "two").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(data)
    (data / "b.png").symlink_to(elsewhere / "a.png")
    assert [file.name for file in find_images(data)].count("a.png") == 1
    assert data / "b.png" in find_images(data)


def test_what_cannot_be_read_is_found_and_named_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path / "good.png", gradient())
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.png").symlink_to(tmp_path / f"{other}.png")
        (tmp_path / f"{name}.txt").symlink_to(tmp_path / f"{other}.txt")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def scandir(path: Path) -> Any:  # as for one who is not root
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    bad = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "locked"]
    assert find_images(tmp_path) == sorted([good, *bad])
    for path in bad:
        with pytest.raises(ImageError, match=path.name):
            load_image(path)
    with pytest.raises(PermissionError):
        find_images(tmp_path / "locked")


def test_find_one_file_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "picture").touch()
    assert find_images(tmp_path / "picture") == [tmp_path / "picture"]
    assert find_images(str(tmp_path)) == []
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*absent"):
        find_images(tmp_path / "absent")


# --- numbers ----------------------------------------------------------------------------------


def test_uint8_to_float_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_float(every)
    assert floats.dtype == torch.float32
    assert (floats[0].item(), floats[255].item()) == (-1, 1)
    torch.testing.assert_close(floats.double(), every.double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert torch.equal(to_uint8(floats), every)
    assert torch.equal(to_uint8(floats.bfloat16()[::255]), every[::255])
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_conversions_keep_channels_last() -> None:
    images = torch.zeros(2, 3, 4, 5, dtype=torch.uint8).to(memory_format=torch.channels_last)
    assert to_float(images).is_contiguous(memory_format=torch.channels_last)
    assert to_uint8(to_float(images)).is_contiguous(memory_format=torch.channels_last)


def test_saving_over_a_picture_keeps_its_mode_and_links_to_it(tmp_path: Path) -> None:
    picture, link = tmp_path / "private.png", tmp_path / "link.png"
    save_image(torch.zeros(3, 4, 5), picture)
    picture.chmod(0o600)
    link.symlink_to(picture)
    save_image(torch.ones(3, 4, 5), link)
    assert link.is_symlink()
    assert load_image(picture).min() == 255
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_save_and_load(tmp_path: Path, memory_format: torch.memory_format) -> None:
    pixels = torch.from_numpy(gradient()).permute(2, 0, 1)
    image = to_float(pixels)[None].contiguous(memory_format=memory_format)[0]
    for picture in (pixels, image, image.double().requires_grad_()):
        save_image(picture, tmp_path / "a.png")
        assert torch.equal(load_image(tmp_path / "a.png"), pixels)
    save_image(image, tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg").shape == image.shape


def test_save_refuses_what_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image must be \[3, H, W\], got \[1, 3, 4, 4\]"):
        save_image(torch.zeros(1, 3, 4, 4), tmp_path / "a.png")
    with pytest.raises(ValueError, match="unknown file extension"):
        save_image(torch.zeros(3, 4, 4), tmp_path / "a.picture")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_image(torch.zeros(3, 4, 4), path)
    before = path.read_bytes()

    def fail(self: Image.Image, path: Path, **options: Any) -> None:
        path.write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(WriteError) as caught:
        save_image(torch.ones(3, 4, 4), path)
    assert str(caught.value) == f"could not write {path}: No space left on device"
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_without_pillow_one_line_says_what_to_install() -> None:
    script = "import sys; sys.modules['PIL'] = None; import fastgan.images"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: fastgan.images needs Pillow: pip install 'fastgan[train]'"
