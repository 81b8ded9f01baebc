"""A contact sheet: search results in a grid of equal cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from distill_core import Rendered
from distill_core.tools import font_of

SIDE = 160
"""Pixels of a cell's width, and of the longer side of its picture; of one found alone, twice as many."""
GAP, LINE, PALE = 12, 15, "#f3f3f3"


@dataclass(frozen=True)
class SearchResult:
    """One cell: similarity, key, and an image or a text, if there is one."""

    similarity: float
    key: str
    text: str = ""
    picture: Image.Image | None = None


def contact_sheet(query: Rendered, summary: str, results: Sequence[SearchResult]) -> Image.Image:
    """The query (None if it cannot be shown) and `summary` above a grid of one or more results, best first."""
    pictures = any(result.picture for result in results)
    rows = math.ceil(len(results) / max(4, round(math.sqrt(len(results)))))
    columns = math.ceil(len(results) / rows) if pictures else 1
    side = SIDE if pictures and columns > 1 else 2 * SIDE if pictures else 4 * SIDE
    scaled = [result.picture and ImageOps.contain(result.picture.convert("RGB"), (side, side)) for result in results]
    box = max((picture.height for picture in scaled if picture), default=0)
    font, small = font_of(12), font_of(11)
    captions = [wrap(result.text, small, side, 2) for result in results]
    cell = LINE + 3 + box + 3 + LINE * (1 + max(map(len, captions))) + GAP
    width = GAP + columns * (side + GAP)

    query_picture = (
        ImageOps.contain(query.convert("RGB"), (SIDE, SIDE // 2)) if isinstance(query, Image.Image) else None
    )
    left = GAP + query_picture.width + GAP if query_picture else GAP
    words = wrap(f"“{query}”", font, width - left - GAP, 3) if isinstance(query, str) else []
    words += wrap(summary, font, width - left - GAP, 3)
    top = GAP + max(query_picture.height if query_picture else 0, len(words) * LINE) + GAP
    page = Image.new("RGB", (width, top + rows * cell if pictures else top + len(results) * cell), "white")
    draw = ImageDraw.Draw(page)
    if query_picture:
        page.paste(query_picture, (GAP, GAP))
    draw.multiline_text((left, GAP), "\n".join(words), fill="black", font=font)
    for i, (result, picture, caption) in enumerate(zip(results, scaled, captions, strict=True)):
        x, y = GAP + i % columns * (side + GAP), top + i // columns * cell
        draw.text((x, y), str(i + 1), fill="black", font=font)
        draw.text((x + side, y), f"{result.similarity:.3f}", fill="black", font=font, anchor="ra")
        y += LINE + 3
        if pictures:
            draw.rectangle((x, y, x + side - 1, y + box - 1), fill=PALE)
        if picture:
            page.paste(picture, (x + (side - picture.width) // 2, y + (box - picture.height) // 2))
        y += box + 3
        draw.text((x, y), _end(result.key, small, side), fill="grey", font=small)
        for number, line in enumerate(caption, 1):
            draw.text((x, y + number * LINE), line, fill="black", font=small)
    return page


def wrap(text: str, font: Any, width: int, most: int) -> list[str]:
    """At most `most` lines of `width` pixels, the last with an ellipsis if more would follow.

    Lines end between words; within one only where it is longer than a line, as scripts without spaces are.
    """
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
            if len(lines) > most:
                last = lines[most - 1]
                while last and font.getlength(f"{last}…") > width:
                    last = last[:-1]
                return [*lines[: most - 1], f"{last.rstrip()}…"]
    return lines


def _end(key: str, font: Any, width: int) -> str:
    """A key, or as much of its end as fits: of a path, the file name matters most."""
    text = key
    while len(text) > 1 and font.getlength(text) > width:
        key = key[1:]
        text = f"…{key}"
    return text
