"""Attention as a self-contained HTML page: images are embedded, and there are no scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from distill_explore.attention import ViewedItem
from distill_explore.drawing import Map, Row, plain, scale, shade, with_scale

SIDE = 176
"""Pixels of a picture's longer side."""
STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; margin: 2rem 0 .2rem }} p {{ color: #555; margin: 0 0 .6rem }}
.row {{ display: flex; flex-wrap: wrap; gap: .8rem }} figure {{ margin: 0 }} .picture {{ width: {SIDE}px }}
.words {{ flex-basis: 100% }} img {{ display: block }}
figcaption {{ color: #666; font-size: .8rem; overflow-wrap: anywhere }}
.text {{ line-height: 2.1; overflow-wrap: anywhere }} .text span {{ padding: .2rem .25rem; border-radius: .15rem }}
"""


def html(title: str, note: str, rows: Sequence[Row], items: Sequence[ViewedItem]) -> str:
    """The page. All text from outside is escaped."""
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(note)}</p>"]
    figures = [
        figure(item.modality, escape(item.rendered) if isinstance(item.rendered, str) else plain(item.rendered, SIDE))
        for item in items
        if item.rendered is not None
    ]
    parts += ['<div class="row">', *figures, "</div>"]
    for row in rows:
        row_figures = [
            figure(
                item.caption,
                text(item) + image(scale(item, SIDE), "its colours")
                if isinstance(item.item.places, list)
                else with_scale(item, SIDE),
            )
            for item in row.maps
        ]
        row_figures += [figure(name, picture) for name, picture in row.pictures.items()]
        facts = [f"<p>{escape(row.facts)}</p>"] if row.facts else []
        parts += [f"<h2>{escape(row.label)}</h2>", *facts, '<div class="row">', *row_figures, "</div>"]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def figure(caption: str, content: Image.Image | str) -> str:
    """A picture, or HTML, with its caption."""
    body, kind = (content, "words") if isinstance(content, str) else (image(content, caption), "picture")
    return f'<figure class="{kind}">{body}<figcaption>{escape(caption)}</figcaption></figure>'


def image(picture: Image.Image, words: str) -> str:
    """An <img> that holds its PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(words)}" width="{picture.width}" src="data:image/png;base64,{data}">'


def text(map_: Map) -> str:
    """The words on their colours; hovering over a token shows its weight."""
    spans = []
    places: Any = map_.item.places
    for piece, weight, colour in zip(places, map_.weights.tolist(), shade(map_.levels).tolist(), strict=True):
        ratio = weight * len(places)
        attributes = f'title="{weight:.4f}, {ratio:.2f}x" style="background: rgb({", ".join(map(str, colour))})"'
        spans.append(f"<span {attributes}>{escape(piece.rstrip(' '))}</span>{' ' if piece.endswith(' ') else ''}")
    return f'<div class="text">{"".join(spans)}</div>'
