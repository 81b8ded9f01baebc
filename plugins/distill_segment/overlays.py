"""Pictures of a segmentation: image, truth and prediction side by side, with a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from distill_core.tools import font_of
from distill_segment.classes import IGNORE

Colour = tuple[int, int, int]

BACKGROUND = "background"
"""The class of this name is left unpainted."""
SIDE, GAP, LINE, ALPHA = 240, 8, 20, 0.75
FEW = 8
"""Number of predicted classes, the largest, that get a colour, in addition to all classes of the truth."""
HUES = ["#e6194b", "#0a64e6", "#ffdd00", "#2ca02c", "#f032e6", "#2bc8e8", "#ff6f00", "#7a28c8"]
REST = (60, 60, 60)


def colour(place: int) -> Colour:
    """The colour of a picture's class number `place` by size: 8 hues, then the same darker, then lighter."""
    r, g, b = ImageColor.getrgb(HUES[place % len(HUES)])[:3]
    toward, much = ((0, 0), (0, 0.5), (255, 0.55))[place // len(HUES) % 3]
    return round(r + (toward - r) * much), round(g + (toward - g) * much), round(b + (toward - b) * much)


def choose_colours(
    predicted: np.ndarray, truth: np.ndarray | None, names: Sequence[str]
) -> tuple[dict[int, Colour], int]:
    """Colours of the truth's classes and of the largest predicted ones, the largest first; the number of other classes.

    Masks are class numbers; the background and pixels without a class have no colour.
    """
    classes = [i for i, name in enumerate(names) if name != BACKGROUND]
    size = np.bincount(predicted.ravel(), minlength=IGNORE + 1)
    true_size = np.zeros_like(size) if truth is None else np.bincount(truth.ravel(), minlength=IGNORE + 1)
    largest = sorted((i for i in classes if size[i]), key=lambda i: -size[i])
    coloured = {i for i in classes if true_size[i]} | set(largest[:FEW])
    order = sorted(coloured, key=lambda i: (-(true_size[i] + size[i]), i))
    return {i: colour(place) for place, i in enumerate(order)}, len(set(largest) - coloured)


def overlay(picture: Image.Image, mask: np.ndarray, names: Sequence[str], colours: Mapping[int, Colour]) -> Image.Image:
    """Classes [H, W] painted over a picture of that size in pale grey, so that no colour of its own shifts theirs.

    Classes without a colour are dark grey; neither `IGNORE` nor the background is painted.
    """
    table, painted = np.zeros((IGNORE + 1, 3), np.float32), np.zeros(IGNORE + 1, np.float32)
    for i, name in enumerate(names):
        table[i], painted[i] = colours.get(i, REST), 0.0 if name == BACKGROUND else ALPHA
    alpha = painted[mask][..., None]
    grey = 255 - (255 - np.asarray(picture.convert("L"), np.float32)[..., None]) * 0.5
    return Image.fromarray((grey * (1 - alpha) + table[mask] * alpha).round().astype(np.uint8))


def panel(picture: Image.Image, predicted: np.ndarray, truth: np.ndarray | None, names: Sequence[str]) -> Image.Image:
    """The picture, the truth if there is one, and the prediction; below them a legend of the classes, by size.

    Masks are class numbers [H, W] of the picture's size; the picture's longer side becomes 240 pixels.
    """
    colours, other_count = choose_colours(predicted, truth, names)
    columns = {"picture": picture}
    if truth is not None:
        columns["truth"] = overlay(picture, truth, names, colours)
    columns["predicted"] = overlay(picture, predicted, names, colours)
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    font = font_of(12)
    total = GAP + len(columns) * (width + GAP)
    entries = [(paint, names[i]) for i, paint in colours.items()] + (
        [(REST, f"and {other_count} more")] if other_count else []
    )
    places, bottom = _flow([font.getlength(name) + LINE + GAP for _, name in entries], total, LINE + height + GAP)
    page = Image.new("RGB", (total, bottom + GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, (label, image) in enumerate(columns.items()):
        left = GAP + i * (width + GAP)
        draw.text((left, 3), label, fill="grey", font=font)
        page.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, LINE))
    for (paint, name), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=on_grey(paint))
        draw.text((x + LINE - 2, y + 1), name, fill="black", font=font)
    return page


def on_grey(paint: Colour) -> Colour:
    """A colour as it looks over the middle of the greys."""
    r, g, b = (round(191 + (part - 191) * ALPHA) for part in paint)
    return r, g, b


def _flow(widths: Sequence[float], total: int, top: int) -> tuple[list[tuple[int, int]], int]:
    """Places (x, y) of entries in lines that fill the width, and where the last line ends."""
    places, x, y = [], float(GAP), top
    for width in widths:
        if x + width > total and x > GAP:
            x, y = float(GAP), y + LINE
        places.append((round(x), y))
        x += width
    return places, y + LINE if widths else y
