"""The drawn styles: each kind fills the picture with its palette, and the seed decides it."""

import numpy as np
import pytest

pytest.importorskip("skimage")

from fastgan import drawing


def draw(kind: str, seed: int, scale: float = 1) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.asarray(drawing.KINDS[kind](random, drawing.random_palette(random), scale), dtype=int)


@pytest.mark.parametrize("kind", drawing.KINDS)
def test_the_seed_decides_the_picture(kind: str):
    picture = draw(kind, 3, 1.7)
    assert picture.shape == (drawing.SIDE, drawing.SIDE, 3)
    assert picture.std() > 8
    assert np.array_equal(draw(kind, 3, 1.7), picture)
    assert np.abs(draw(kind, 4, 1.7) - picture).mean() > 8


@pytest.mark.parametrize("kind", ["dots", "tiles", "weave"])
def test_larger_scale_draws_larger_marks(kind: str):
    edges = [np.abs(np.diff(draw(kind, 5, scale), axis=1)).mean() for scale in (0.5, 2)]
    assert edges[0] > 1.3 * edges[1]


def test_palettes_go_from_dark_to_light():
    for seed in range(50):
        palette = drawing.random_palette(np.random.default_rng(seed))
        assert 3 <= len(palette) <= 7
        assert palette.min() >= 0
        assert palette.max() <= 255
        assert (np.diff(palette.sum(1)) >= 0).all()
