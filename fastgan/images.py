"""Picture files to upright RGB tensors and back."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

try:
    from PIL import ExifTags, Image, UnidentifiedImageError
except ImportError as error:
    raise ImportError("fastgan.images needs Pillow: pip install 'fastgan[train]'") from error

__all__ = [
    "ImageError",
    "WriteError",
    "find_images",
    "from_pil",
    "image_size",
    "load_image",
    "no_pictures",
    "save_image",
    "to_float",
    "to_pil",
    "to_uint8",
]

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's that start no program

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """A file is no readable picture. `path` says which, `reason` why."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class WriteError(OSError):
    """A result could not be written; says which and why."""


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """Files under the folder `path`, at any depth, whose extension is a picture's; sorted.

    Hidden files and folders are left out; links are followed, each real folder once. A `path` that
    is a file gives that file. A link in a circle and a folder that cannot be read are given as if
    they were pictures, so that who reads the pictures names, skips and counts them.

    Raises:
        FileNotFoundError: there is no `path`.
        OSError: it is a folder that cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    found: list[Path] = []
    visited: set[str] = set()
    folders = [path]
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        try:
            with os.scandir(folder) as entries:
                visible = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        except OSError:
            if folder == path:
                raise
            found.append(folder)
            continue
        for entry in visible:
            named = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
            try:
                if entry.is_dir():
                    folders.append(Path(entry))
                elif named and entry.is_file():
                    found.append(Path(entry))
            except OSError:  # a link in a circle, or to where one may not look
                if named:
                    found.append(Path(entry))
    return sorted(found)


def no_pictures(path: str | os.PathLike[str]) -> str:
    """What to say of a folder in which `find_images` found nothing."""
    said = f"no pictures in {path}"
    if any(files for _, _, files in os.walk(path)):
        said += f" (looked for {' '.join(sorted(EXTENSIONS))})"
    return said


def load_image(path: str | os.PathLike[str], *, min_side: int | None = None) -> Tensor:
    """Upright RGB uint8 [3,H,W] (interleaved in memory) of a picture of any common kind.

    The EXIF orientation is applied. Transparent pictures are laid over white, 16-bit samples are
    scaled to 8 bits, float samples are read as [0, 1], animations give their first picture. Colour
    profiles are not applied.

    Args:
        path: a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file, whatever its name.
        min_side: allow a JPEG to be decoded at a half, a quarter or an eighth of its size, which is
            several times faster, as long as neither side falls below this.

    Raises:
        ImageError: there is no such file, or it holds no complete picture, or one larger than
            Pillow's limit against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`, twice).
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            turn = _load(image)
    except MemoryError:  # the machine's fault, not the file's
        raise
    except Exception as error:  # on damaged files decoders raise all there is
        raise ImageError(path, _reason(path, error)) from error
    try:
        return _upright_rgb(image, turn)
    except (AttributeError, MemoryError, NameError, TypeError):  # a fault of the code
        raise
    except Exception as error:
        raise ImageError(path, _reason(path, error)) from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width that the file states, before it is decoded and turned upright.

    Raises:
        ImageError: the file is missing or its header is no picture's.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.height, image.width
    except Exception as error:
        raise ImageError(path, _reason(path, error)) from error


def from_pil(image: Image.Image) -> Tensor:
    """Upright RGB uint8 [3,H,W] of a Pillow image, as `load_image` gives it of a file."""
    return _upright_rgb(image, _load(image))


def to_pil(image: Tensor) -> Image.Image:
    """One picture [3,H,W], uint8 or float in [-1, 1], as a Pillow image."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be [3, H, W], got {list(image.shape)}")
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_image(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Write one picture [3,H,W], uint8 or float in [-1, 1], in the format `path` ends in.

    It is written beside `path`, or beside what that links to, and takes its name and its mode when
    it is complete.

    Raises:
        ValueError: `image` is no picture, or `path` ends in no known format.
        WriteError: the file could not be written; what was at `path` is still there.
    """
    picture = to_pil(image)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        try:
            picture.save(temporary, quality=95)
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"could not write {path}: {error.strerror or error}") from error


def to_float(images: Tensor) -> Tensor:
    """uint8 to fp32 in [-1, 1], on the same device, in the same memory format."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] to uint8, rounded; what lies beyond is clamped."""
    return images.detach().float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def _load(image: Image.Image) -> Image.Transpose | None:
    """Decodes `image` in place; gives what turns it upright, if it is not."""
    image.load()
    if image.mode == "P" and image.palette is None:
        raise ValueError("lacks its palette")
    return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))


def _upright_rgb(image: Image.Image, turn: Image.Transpose | None) -> Tensor:
    rgb = _to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(samples: np.ndarray) -> np.ndarray:
    top = 1 if samples.dtype.kind == "f" else 65535
    if not (samples.min() >= 0 and samples.max() <= top):
        raise ValueError(f"samples of {samples.dtype} beyond [0, {top}] have no defined brightness")
    return np.rint(samples * (255 / top)).astype(np.uint8)


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no picture" if os.path.getsize(path) else "empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
