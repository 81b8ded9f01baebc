"""Attention as pictures: an image under its weights, a text's words on colours, patches by principal component.

Colour shows how much a token is read relative to uniform attention: weight * L, from 0 to the map's largest value, or
to 2 if that is larger. So uniform weights look uniform, and small differences are not exaggerated.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from distill_core.tools import font_of, sheet
from distill_explore.attention import Reading, ViewedItem, entropy, principal
from distill_explore.contact import wrap

SIDE = 140
"""Pixels of a picture's longer side on the page."""
WIDTH = 5 * (SIDE + 6) + 6
"""Of the page: five pictures in a row."""


@dataclass(frozen=True)
class Map:
    """An item under `weights` [L]."""

    name: str
    item: ViewedItem
    weights: Tensor

    @property
    def ratios(self) -> np.ndarray:
        """[L], weights relative to uniform ones."""
        return self.weights.numpy() * len(self.weights)

    @property
    def most(self) -> float:
        """The ratio at the end of the colours."""
        return max(2.0, float(self.ratios.max(initial=0)))

    @property
    def levels(self) -> np.ndarray:
        """[L], 0 to 1."""
        return np.asarray(self.ratios / self.most)

    @property
    def caption(self) -> str:
        """Its name, its entropy, and the largest ratio; the row's facts explain the units."""
        return f"{self.name}: entropy {float(entropy(self.weights)):.2f}, top {self.ratios.max(initial=0):.1f}x"

    @property
    def line(self) -> str:
        """The caption as a complete line, the name last."""
        spread = f"entropy {float(entropy(self.weights)):.2f} of {math.log(max(1, len(self.weights))):.2f} nats"
        return f"{spread}, top token {self.ratios.max(initial=0):.1f}x an even share  {self.name}"


@dataclass(frozen=True)
class Row:
    """One line of the page: what it shows, in words, and its maps, or other pictures by name."""

    label: str
    facts: str = ""
    maps: Sequence[Map] = ()
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)


def rows_of(readings: Sequence[Reading], items: Sequence[ViewedItem], heads: bool = False) -> list[Row]:
    """Everything to draw of some items: the fusion's attention, the class tokens', the patches' components.

    Readings of the same item share a row; with `heads` each has its own row, with a map for each head. The class token
    of an image always has a map for each head.
    """
    rows = []
    groups: dict[tuple[int, str | None], list[Reading]] = {}
    for reading in readings:
        if reading.answer.places is not None:
            groups.setdefault((id(reading.answer), reading.reader.modality if reading.reader else None), []).append(
                reading
            )
    for group in groups.values():
        by_head = heads or (group[0].reader is None and isinstance(group[0].answer.places, tuple))
        rows += [_row([reading], True) for reading in group] if by_head else [_row(group, False)]
    for item in items:
        if isinstance(item.places, tuple) and item.tokens is not None:
            grid = principal(item.tokens[item.mask.to(item.tokens.device)]).reshape(*item.places, 3).numpy()
            picture, squares = plain(item.rendered), Image.fromarray((255 * grid).round().astype(np.uint8))
            patches = squares.resize(picture.size, Image.Resampling.NEAREST)
            panels = {"what the model sees": picture, "components 1 to 3 as red, green, blue": patches}
            rows.append(Row(f"{item.modality}: principal components of the patches' features", pictures=panels))
    return rows


def _row(group: Sequence[Reading], heads: bool) -> Row:
    """A row of readings of one item: each one's mean over heads, and of a single reading also each head."""
    reader, answer, (count, length) = group[0].reader, group[0].answer, group[0].weights.shape
    mean = f"mean of {count} heads" if count > 1 else "one head"
    has_several = len(group) > 1
    maps = [(_words(reading.reader, 60) if has_several else mean, reading.weights.mean(0)) for reading in group]
    if heads and count > 1:
        maps += [(f"head {i + 1}", weights) for i, weights in enumerate(group[0].weights)]
    facts = f"{mean}; " if has_several else ""
    facts += (
        f"colour: times an even share (1/{length}) of the attention; entropy in nats, {math.log(length):.2f} if even"
    )
    if reader is None:
        label = f"{answer.modality}: self-attention of the token that makes the embedding, last block"
    else:
        words = "" if has_several else f" {_words(reader, 70)}".rstrip()
        label = f"{reader.modality}{words} reads {answer.modality}"
    return Row(label, facts, [Map(name, answer, weights) for name, weights in maps])


def _words(reader: ViewedItem | None, most: int) -> str:
    """A text in quotation marks; empty for other items."""
    if reader is None or not isinstance(reader.rendered, str):
        return ""
    return f'"{textwrap.shorten(reader.rendered, most, placeholder=" ...")}"'


def colours(levels: np.ndarray, name: str) -> np.ndarray:
    """0..1 [...] -> bytes [..., 3] of a matplotlib colour map."""
    from matplotlib import colormaps

    return np.asarray(colormaps[name](levels, bytes=True)[..., :3])


def _size(picture: Image.Image, side: int) -> tuple[int, int]:
    width, height = (max(1, round(side * length / max(picture.size))) for length in picture.size)
    return width, height


def overlay(map_: Map, side: int = SIDE) -> Image.Image:
    """The picture in pale grey under the weights, smoothed between patches' middles; its longer side is `side` px."""
    picture, size, places = map_.item.rendered, _size(map_.item.rendered, side), map_.item.places
    assert isinstance(places, tuple)
    grid = Image.fromarray(map_.levels.astype(np.float32).reshape(places))
    level = np.clip(np.asarray(grid.resize(size, Image.Resampling.BILINEAR)), 0, 1)
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None]
    grey = 95 + grey * (160 / 255)  # so that colours look the same on dark pictures
    return Image.fromarray(_painted(level, grey))


def _painted(level: np.ndarray, grey: np.ndarray | float) -> np.ndarray:
    """Levels [...] over greys [..., 1] -> bytes [..., 3]."""
    strength = 0.8 * np.sqrt(level)[..., None]
    mixed = (1 - strength) * grey + strength * colours(level, "YlOrRd")
    return np.asarray(mixed.round().astype(np.uint8))


def scale(map_: Map, width: int = SIDE) -> Image.Image:
    """The colours of a map, as they are over white, from 0 to their end, with a mark at an even share (1x)."""
    level, font, bar = np.linspace(0, 1, width, dtype=np.float32), font_of(9), 6
    page = Image.new("RGB", (width, bar + 14), "white")
    line = shade(level) if isinstance(map_.item.places, list) else _painted(level, 255)
    page.paste(Image.fromarray(np.repeat(line[None], bar, 0)), (0, 2))
    draw = ImageDraw.Draw(page)
    draw.text((0, bar + 3), "0", fill="grey", font=font)
    end, even = f"{map_.most:.1f}x", round(width / map_.most)
    draw.text((width, bar + 3), end, fill="grey", font=font, anchor="ra")
    draw.line((even, 0, even, bar + 3), fill="grey")
    if 14 < even < width - font.getlength(end) - 10:
        draw.text((even, bar + 3), "1x", fill="grey", font=font, anchor="ma")
    return page


def with_scale(map_: Map, side: int = SIDE) -> Image.Image:
    """A map with its scale below: the overlay of a picture, or the words of a text."""
    image = strip(map_) if isinstance(map_.item.places, list) else overlay(map_, side)
    scale_image = scale(map_, min(side, image.width))
    page = Image.new("RGB", (image.width, image.height + 2 + scale_image.height), "white")
    page.paste(image, (0, 0))
    page.paste(scale_image, (0, image.height + 2))
    return page


def plain(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """A picture at the size of the maps."""
    return picture.convert("RGB").resize(_size(picture, side), Image.Resampling.BICUBIC)


def shade(levels: np.ndarray) -> np.ndarray:
    """Colours behind words, light enough for black letters: [L] -> bytes [L, 3]."""
    return colours(0.65 * levels, "YlOrRd") if len(levels) else np.empty((0, 3), np.uint8)


def strip(map_: Map) -> Image.Image:
    """The words of a text, each token on its colour; a word's tokens touch."""
    font, width, line, pad, gap = font_of(14), WIDTH - 12, 24, 3, 5
    placed: list[tuple[int, int, int, str, tuple[int, ...]]] = []
    places: Any = map_.item.places
    x = y = 0
    for piece, colour in zip(places, shade(map_.levels).tolist(), strict=True):
        word = piece.rstrip(" ")
        long = round(font.getlength(word)) + 2 * pad
        if x + long > width and x:
            x, y = 0, y + line + 4
        placed.append((x, y, long, word, tuple(colour)))
        x += long + (gap if piece.endswith(" ") else 1)
    page = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(page)
    for left, top, long, word, colour in placed:
        draw.rectangle((left, top, left + long - 1, top + line - 1), fill=colour)
        draw.text((left + pad, top + 3), word, fill="black", font=font)
    return page


def with_name(name: str, picture: Image.Image) -> Image.Image:
    """A picture with its name below it."""
    font = font_of(10)
    lines = wrap(name, font, picture.width, 6)
    page = Image.new("RGB", (picture.width, picture.height + 14 * len(lines) + 4), "white")
    page.paste(picture, (0, 0))
    ImageDraw.Draw(page).multiline_text((0, picture.height + 2), "\n".join(lines), fill="grey", font=font)
    return page


def figure(rows: Sequence[Row], items: Sequence[ViewedItem]) -> Image.Image:
    """All rows on one page, below the items themselves."""
    lines: list[tuple[str, list[Any]]] = [
        (item.modality, [item.rendered if isinstance(item.rendered, str) else plain(item.rendered)])
        for item in items
        if item.rendered is not None
    ]
    for row in rows:
        lines += [("", [row.label]), (row.facts, list(_images_of(row)))]
    sides = [max(item.size) for _, items in lines for item in items if not isinstance(item, str)]
    return sheet(lines, width=WIDTH, side=max(sides, default=SIDE))  # as large as they are


def _images_of(row: Row) -> Iterator[Image.Image]:
    for map_ in row.maps:
        yield with_name(map_.caption, with_scale(map_))
    for name, picture in row.pictures.items():
        yield with_name(name, picture)
