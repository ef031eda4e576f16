"""Pictures drawn by rule, to serve as styles: brush strokes, glass, ink, mosaics, cloth and more.

Each kind is a function of a random number generator, a palette ([n,3], RGB from 0 to 255, from dark
to light where a kind shades) and a scale (1 is the usual size of its marks, 2 twice that). The same
arguments give the same picture.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.filters import gaussian

SIDE = 512
"""Height and width of every picture, in pixels."""


_NIGHT = np.array(
    [
        (8, 20, 70),
        (20, 50, 130),
        (30, 90, 180),
        (70, 150, 210),
        (160, 205, 215),
        (245, 225, 130),
        (250, 190, 40),
    ]
)
_GLASS = np.array(
    [
        (20, 40, 140),
        (200, 30, 40),
        (245, 180, 30),
        (20, 130, 80),
        (110, 40, 140),
        (240, 230, 190),
        (30, 140, 200),
        (235, 110, 30),
    ]
)
_INK = np.array([(40, 34, 44), (246, 240, 226)])


def night() -> Image.Image:
    """Brush strokes in blues with yellow lights."""
    return strokes(np.random.default_rng(1), _NIGHT)


def glass() -> Image.Image:
    """A church window."""
    return panes(np.random.default_rng(0), _GLASS)


def ink() -> Image.Image:
    """A pen drawing on paper."""
    return hatching(np.random.default_rng(4), _INK)


def random_palette(random: np.random.Generator) -> np.ndarray:
    """3 to 7 colours from dark to light: of one hue, of neighbours or of all, dull or bright."""
    number = int(random.integers(3, 8))
    spread = random.choice([0.05, 0.15, 0.4, 1.0])
    hue = random.random() + spread * (random.random(number) - 0.5)
    saturation = np.clip(random.uniform(0.1, 1.0) + 0.2 * random.standard_normal(number), 0, 1)
    value = np.linspace(random.uniform(0.0, 0.45), random.uniform(0.65, 1.0), number)
    value = np.clip(value + 0.06 * random.standard_normal(number), 0, 1)
    if random.random() < 0.5:  # a bright one that stands out
        accent = int(random.integers(number))
        hue[accent] += 0.5
        saturation[accent] = random.uniform(0.7, 1.0)
    hsv = zip(hue % 1, saturation, value, strict=True)
    rgb = 255 * np.array([colorsys.hsv_to_rgb(*map(float, colour)) for colour in hsv])
    return rgb[rgb.sum(1).argsort()]


def strokes(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Brush strokes that follow a swirling field."""
    down, right = np.gradient(_smooth_noise(random, 60))
    tone = _smooth_noise(random, 30)
    image, draw = _canvas(palette[1])
    for y, x in random.random((int(4000 / scale), 2)) * SIDE:
        light = 0.45 + 0.22 * tone[int(y), int(x)] + 0.16 * random.standard_normal()
        colour = _pick(palette, light)
        path = [(x, y)]
        for _ in range(14):  # along the contours of the field
            at = int(y) % SIDE, int(x) % SIDE
            speed = np.hypot(right[at], down[at]) + 1e-9
            y, x = y - 3 * right[at] / speed, x + 3 * down[at] / speed
            path.append((x, y))
        width = round(int(random.integers(7, 13)) * scale)
        draw.line(path, fill=_shade(random, colour), width=width, joint="curve")
    return image


def panes(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Coloured panes with dark leads between them: the cells nearest to scattered points."""
    number = int(110 / scale**2)
    coordinates = torch.arange(SIDE, dtype=torch.float32)
    pixels = torch.cartesian_prod(coordinates, coordinates)
    points = torch.from_numpy(random.random((number, 2)) * SIDE).float()
    for _ in range(2):  # moved to the middle of their cells, so that panes are of similar size
        owner = torch.cdist(pixels, points).argmin(1)
        count = torch.bincount(owner, minlength=number).clamp(min=1)[:, None]
        points = torch.zeros(number, 2).index_add(0, owner, pixels) / count
    distance, nearest = (t.numpy() for t in torch.cdist(pixels, points).topk(2, largest=False))
    colours = palette[random.integers(len(palette), size=number)] * random.uniform(
        0.8, 1.1, (number, 1)
    )
    lit = colours[nearest[:, 0]].reshape(SIDE, SIDE, 3)
    lit *= 1 + 0.1 * _smooth_noise(random, 3)[..., None]
    between = (distance[:, 1] - distance[:, 0]).reshape(SIDE, SIDE, 1)
    visible = np.clip((between - 7 * scale) / 3, 0, 1)
    return _image(12 + visible * (lit - 12))


def hatching(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Crossed pen strokes, denser where a field is dark. The last colour is the paper."""
    tone = _smooth_noise(random, 36)
    image, draw = _canvas(palette[-1])
    for layer, (angle, threshold) in enumerate(((0.8, -0.6), (-0.8, 0.2), (0.1, 0.9))):
        ink = tuple(int(c) for c in palette[layer % (len(palette) - 1)])
        for y, x in random.random((int(900 / scale), 2)) * SIDE:
            turned = angle + 0.08 * random.standard_normal()
            length = random.uniform(20, 50)
            dx, dy = length * np.cos(turned), length * np.sin(turned)
            if tone[int(y), int(x)] > threshold:
                draw.line((x - dx, y - dy, x + dx, y + dy), fill=ink, width=round(4 * scale))
    return image


def dots(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Round dots side by side, as the pointillists set them."""
    tone = _smooth_noise(random, 40)
    image, draw = _canvas(palette[random.integers(len(palette))])
    for y, x in random.random((int(9000 / scale**2), 2)) * SIDE:
        light = 0.5 + 0.25 * tone[int(y), int(x)] + 0.2 * random.standard_normal()
        radius = scale * random.uniform(3, 6)
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius),
            fill=_shade(random, _pick(palette, light)),
        )
    return image


def daubs(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Short flat daubs of a palette knife, turned one way here and another there."""
    tone, turn = _smooth_noise(random, 35), _smooth_noise(random, 50)
    main = random.uniform(0, np.pi)
    image, draw = _canvas(palette[0])
    for y, x in random.random((int(2600 / scale**2), 2)) * SIDE:
        angle = main + 0.9 * turn[int(y), int(x)] + 0.2 * random.standard_normal()
        length, width = scale * random.uniform(10, 24), scale * random.uniform(4, 9)
        along = length * np.array([np.cos(angle), np.sin(angle)])
        across = width * np.array([-np.sin(angle), np.cos(angle)])
        corners = [(x, y) + a * along + b * across for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
        light = 0.5 + 0.25 * tone[int(y), int(x)] + 0.12 * random.standard_normal()
        fill = _shade(random, _pick(palette, light), by=20)
        draw.polygon([(float(u), float(v)) for u, v in corners], fill=fill)
    return image


def contours(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Flat bands between the height lines of a hilly map."""
    height = _smooth_noise(random, 28 * scale) + 0.3 * _smooth_noise(random, 10 * scale)
    bands = (height * random.uniform(2, 5)).astype(int) % len(palette)
    return _image(palette[bands] + 5 * _smooth_noise(random, 1)[..., None])


def waves(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Ripples along one direction, bent by a slow field, shaded from colour to colour."""
    across = _along(random.uniform(0, np.pi)) + 14 * _smooth_noise(random, 45)
    ripple = np.sin(2 * np.pi * across / (scale * random.uniform(14, 34)))
    return _image(_blend(palette, 0.5 + 0.4 * ripple + 0.08 * _smooth_noise(random, 20)))


def tiles(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Square stones of a mosaic, in rows, with joints between them."""
    stone = scale * random.uniform(14, 30)
    joint = palette[0 if random.random() < 0.5 else -1]
    angle = random.uniform(0, np.pi / 2)
    u = _along(angle) + 4 * _smooth_noise(random, 40)
    v = _along(angle + np.pi / 2) + 4 * _smooth_noise(random, 40)
    column, row = (np.floor(w / stone).astype(int) for w in (u, v))
    rows = int(2 * SIDE / stone) + 8
    tone = gaussian(random.standard_normal((rows, rows)), 1.5, mode="wrap")
    tone = 0.5 + 0.25 * tone / tone.std() + 0.12 * random.standard_normal((rows, rows))
    level = np.clip(tone[column % rows, row % rows], 0, 0.999)
    shade = random.uniform(0.85, 1.15, (rows, rows))[column % rows, row % rows]
    coloured = palette[(level * len(palette)).astype(int)] * shade[..., None]
    edge = np.minimum(np.minimum(u % stone, -u % stone), np.minimum(v % stone, -v % stone))
    visible = np.clip((edge - 0.08 * stone) / 2, 0, 1)[..., None]
    return _image(joint + visible * (coloured - joint))


def scribbles(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Long curling lines of crayon. The last colour is the paper."""
    image, draw = _canvas(palette[-1])
    for _ in range(int(110 / scale)):
        y, x = random.random(2) * SIDE
        heading, bend = random.uniform(0, 2 * np.pi), random.uniform(-0.25, 0.25)
        fill = _shade(random, palette[random.integers(len(palette) - 1)])
        path = [(x, y)]
        for _ in range(60):
            heading += bend + 0.15 * random.standard_normal()
            y, x = y + 6 * scale * np.sin(heading), x + 6 * scale * np.cos(heading)
            path.append((x, y))
        draw.line(path, fill=fill, width=round(scale * random.integers(3, 9)), joint="curve")
    return image


def weave(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Threads over and under each other."""
    thread = scale * random.uniform(9, 20)
    angle = random.uniform(0, np.pi / 2)
    u, v = (_along(angle + turn) + 2 * _smooth_noise(random, 40) for turn in (0, np.pi / 2))
    column, row = (np.floor(w / thread).astype(int) for w in (u, v))
    warp, weft = (palette[random.integers(len(palette), size=997)] for _ in range(2))
    over = ((column + row) % 2 == 0)[..., None]
    roundness = np.where(over[..., 0], np.sin(np.pi * (u / thread)), np.sin(np.pi * (v / thread)))
    light = 0.45 + 0.6 * np.abs(roundness)[..., None] + 0.05 * _smooth_noise(random, 1)[..., None]
    return _image(np.where(over, warp[column % 997], weft[row % 997]) * light)


def splatter(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Paint thrown at a canvas: a few large drops, many small ones, threads between them."""
    image, draw = _canvas(palette[random.choice([0, -1])])
    for y, x in random.random((int(1400 / scale), 2)) * SIDE:
        radius = scale * min(2 + 3 * random.pareto(1.8), 30)
        stretch = random.uniform(0.6, 1.6)
        fill = _shade(random, palette[random.integers(len(palette))])
        draw.ellipse((x - radius, y - radius * stretch, x + radius, y + radius * stretch), fill)
        if random.random() < 0.25:
            dy, dx = 40 * scale * random.standard_normal(2)
            draw.line((x, y, x + dx, y + dy), fill=fill, width=round(3 * scale))
    return image


def wash(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Watercolour: soft pools with darker rims on grained paper."""
    pools = _smooth_noise(random, 40 * scale)
    for strength, blur in ((1 / 2, 18), (1 / 4, 8)):
        pools = pools + strength * _smooth_noise(random, blur * scale)
    rim = np.exp(-((np.abs(pools) % 0.7) ** 2) / 0.004)[..., None]
    grain = _smooth_noise(random, 1.2)[..., None]
    return _image(_blend(palette, 0.5 + 0.25 * pools) * (1 - 0.25 * rim) + 7 * grain)


def marble(random: np.random.Generator, palette: np.ndarray, scale: float = 1) -> Image.Image:
    """Combed ink on water, as on the endpapers of old books."""
    swirl = _smooth_noise(random, 40 * scale) + 0.35 * _smooth_noise(random, 14 * scale)
    comb = 12 * scale * np.abs(((_along(0.0) / (48 * scale)) % 2) - 1)
    bands = (_along(np.pi / 2) + comb + 55 * scale * swirl) / (17 * scale)
    colours = palette[np.floor(bands).astype(int) * 7 % 11 % len(palette)]
    line = np.exp(-(((bands % 1 - 0.5) ** 2 - 0.25) ** 2) / 0.002)[..., None]
    return _image(colours * (1 - 0.35 * line) + 4 * _smooth_noise(random, 1)[..., None])


KINDS: Mapping[str, Callable[[np.random.Generator, np.ndarray, float], Image.Image]] = {
    kind.__name__: kind
    for kind in (
        strokes,
        panes,
        hatching,
        dots,
        daubs,
        contours,
        waves,
        tiles,
        scribbles,
        weave,
        splatter,
        wash,
        marble,
    )
}


def _canvas(colour: np.ndarray) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(c) for c in colour))
    return image, ImageDraw.Draw(image)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _smooth_noise(random: np.random.Generator, blur: float) -> np.ndarray:
    """[SIDE,SIDE] of mean 0 and standard deviation 1."""
    noise = gaussian(random.standard_normal((SIDE, SIDE)), blur, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _along(angle: float) -> np.ndarray:
    """How far each pixel [SIDE,SIDE] lies in a direction."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return x * np.cos(angle) + y * np.sin(angle)


def _pick(palette: np.ndarray, light: float) -> np.ndarray:
    """The palette's colour for a brightness from 0 to 1."""
    return palette[int(np.clip(light, 0, 0.999) * len(palette))]


def _blend(palette: np.ndarray, light: np.ndarray) -> np.ndarray:
    """The same with transitions, for a field [SIDE,SIDE]."""
    place = np.clip(light, 0, 1) * (len(palette) - 1)
    low = np.minimum(place.astype(int), len(palette) - 2)
    return palette[low] + (place - low)[..., None] * (palette[low + 1] - palette[low])


def _shade(random: np.random.Generator, colour: np.ndarray, by: int = 14) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(colour + random.integers(-by, by + 1, 3), 0, 255))
