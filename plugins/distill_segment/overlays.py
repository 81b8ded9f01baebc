"""What a segmentation looks like: picture, truth and what was found side by side, and a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from distill_segment.classes import IGNORE

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

BACKGROUND = "background"
"""The class of this name is left unpainted."""
SIDE, GAP, LINE, ALPHA = 240, 8, 20, 0.6


def colour(number: int) -> tuple[int, int, int]:
    """A class's colour: hues a golden ratio apart, so that neighbours differ however many there are."""
    r, g, b = colorsys.hsv_to_rgb(number * 0.61803398875 % 1, 0.85 if number % 2 else 0.6, 0.9)
    return round(255 * r), round(255 * g), round(255 * b)


def overlay(picture: Image.Image, mask: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Classes [H, W] painted over a picture of that size; neither `IGNORE` nor the background is."""
    table = np.zeros((IGNORE + 1, 3), np.float32)
    painted = np.zeros(IGNORE + 1, np.float32)
    for i, name in enumerate(names):
        table[i], painted[i] = colour(i), 0.0 if name == BACKGROUND else ALPHA
    alpha = painted[mask][..., None]
    pixels = np.asarray(picture.convert("RGB"), np.float32) * (1 - alpha) + table[mask] * alpha
    return Image.fromarray(pixels.round().astype(np.uint8))


def panel(picture: Image.Image, found: np.ndarray, truth: np.ndarray | None, names: Sequence[str]) -> Image.Image:
    """The picture, the truth where there is one, what was found; below them the classes that are in either.

    Masks are class numbers [H, W] of the picture's size; the picture's longer side becomes 240 pixels.
    """
    columns = {"picture": picture}
    if truth is not None:
        columns["truth"] = overlay(picture, truth, names)
    columns["found"] = overlay(picture, found, names)
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    font = _font(12)
    total = GAP + len(columns) * (width + GAP)
    shown = set(np.unique(found)) | (set(np.unique(truth)) if truth is not None else set())
    entries = [(colour(i), name) for i, name in enumerate(names) if i in shown and name != BACKGROUND]
    places, bottom = _flow([font.getlength(name) + LINE + GAP for _, name in entries], total, LINE + height + GAP)
    page = Image.new("RGB", (total, bottom + GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, (label, shown_picture) in enumerate(columns.items()):
        left = GAP + i * (width + GAP)
        draw.text((left, 3), label, fill="grey", font=font)
        page.paste(shown_picture.resize((width, height), Image.Resampling.BICUBIC), (left, LINE))
    for (paint, name), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=paint)
        draw.text((x + LINE - 2, y + 1), name, fill="black", font=font)
    return page


def _flow(widths: Sequence[float], total: int, top: int) -> tuple[list[tuple[int, int]], int]:
    """Places (x, y) of entries in lines that fill the width, and where the last line ends."""
    places, x, y = [], float(GAP), top
    for width in widths:
        if x + width > total and x > GAP:
            x, y = float(GAP), y + LINE
        places.append((round(x), y))
        x += width
    return places, y + LINE if widths else y


def _font(size: int) -> FreeTypeFont:
    """DejaVu, which matplotlib brings and which has most scripts' letters."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
