"""Draws the README's gallery with the checkpoint that comes with fastgan.

    python scripts/gallery.py [--out docs]

Photographs and styles are those that the checkpoint was not trained on, but for the large picture;
everything is rendered by ``fastgan.inference.stylize``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from judge_lite import held_out_photographs, held_out_styles
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pretrain_lite import photograph

from fastgan.inference import load_recipe, pretrained_checkpoint, stylize

GAP = 8
CAPTION = 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    out: Path = parser.parse_args().out
    model = load_recipe(pretrained_checkpoint())
    photos, styles = held_out_photographs(), held_out_styles()
    cat, coffee = photos["chelsea"], photos["coffee"]

    rows = [[None, *(ImageOps.fit(style, (240, 160)) for style in styles.values())]]
    rows += [
        [photo, *(stylize(photo, style, checkpoint=model) for style in styles.values())]
        for photo in photos.values()
    ]
    save(rows, out / "gallery-styles.jpg", height=160)

    strengths = (0.0, 0.25, 0.5, 0.75, 1.0)
    row = [stylize(cat, styles["night"], checkpoint=model, alpha=alpha) for alpha in strengths]
    save(
        [[cat, *row]],
        out / "gallery-alpha.jpg",
        height=180,
        captions=["photograph", *(f"alpha {alpha:g}" for alpha in strengths)],
    )

    pair = [styles["night"], styles["immunohistochemistry"]]
    shares = (1.0, 0.75, 0.5, 0.25, 0.0)
    row = [
        stylize(coffee, pair, checkpoint=model, style_weights=(share, 1 - share))
        for share in shares
    ]
    ends = [ImageOps.fit(style, (180, 180)) for style in pair]
    save(
        [[ends[0], *row, ends[1]]],
        out / "gallery-mix.jpg",
        height=180,
        captions=["", *(f"{share:g} + {1 - share:g}" for share in shares), ""],
    )

    plain = stylize(coffee, styles["glass"], checkpoint=model)
    kept = stylize(coffee, styles["glass"], checkpoint=model, keep_color=True)
    style = ImageOps.fit(styles["glass"], coffee.size)
    save(
        [[coffee, style, plain, kept]],
        out / "gallery-keep-color.jpg",
        height=240,
        captions=["photograph", "style", "result", "with keep_color"],
    )

    large = photograph("retina")
    result = stylize(large, styles["glass"], checkpoint=model)
    detail = (520, 560, 880, 800)
    row = [large, result, large.crop(detail), result.crop(detail)]
    width, height = large.size
    save(
        [row],
        out / "gallery-large.jpg",
        height=240,
        captions=[f"{width} x {height} pixels", "result", "a part of it, full size", ""],
    )


def save(
    rows: Sequence[Sequence[Image.Image | None]],
    path: Path,
    *,
    height: int,
    captions: Sequence[str] = (),
) -> None:
    """Rows of pictures of one height on white, each column below its caption."""
    rows = [[p and ImageOps.contain(p, (10_000, height)) for p in row] for row in rows]
    widths = [max(p.width for p in column if p) for column in zip(*rows, strict=True)]
    top = CAPTION if captions else 0
    size = (sum(widths) + GAP * (len(widths) - 1), top + (height + GAP) * len(rows) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    left = 0
    for column, width in enumerate(widths):
        if captions:
            draw.text((left, 2), captions[column], "black", ImageFont.load_default(14))
        for number, row in enumerate(rows):
            if (picture := row[column]) is not None:
                sheet.paste(picture, (left, top + number * (height + GAP)))
        left += width + GAP
    sheet.save(path, quality=85, optimize=True)


if __name__ == "__main__":
    main()
