"""A page of samples: the views that training makes of each in its first pass, with their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from distill_core import Augmentation, BadSample, Rendered, Sample, UserError
from distill_core.tools import Recipe, SampleViews, font_of, sheet
from distill_data.inspection import Inspection

SAMPLES = 12
COLUMN, COLUMNS, GAP, HEAD = 640, 2, 16, 22
"""Pixels, but for the number of columns."""
MOST_TEXT = 400
"""Characters of a text that are shown."""


def write(path: Path, inspection: Inspection, augment: Mapping[str, Augmentation], recipe: Recipe | None) -> int:
    """Write the page. With a recipe, views are drawn as its run draws them; else the items are shown as they are.

    Returns how many samples it shows. Raises `UserError`.
    """
    usable = inspection.usable
    if not usable:
        raise UserError("no sample can be used: there is nothing to show on a sheet")
    chosen = [usable[int(i)] for i in np.unique(np.linspace(0, len(usable) - 1, SAMPLES).round())]
    views = None
    if recipe is not None:
        own, joint = recipe.build_augmentations()
        views = SampleViews(own, recipe.seed, recipe.data.optional, joint)
    blocks = []
    for position in chosen:
        sample = inspection.row.read(position)
        try:
            rows = _views(sample, views) if views is not None else _items(sample, augment)
        except BadSample:  # some show only when views are drawn; training will count them
            continue
        blocks.append(_block(str(sample["__key__"]), rows))
    if not blocks:
        raise UserError("none of the samples that the sheet would show has views: train on it to see why")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _page(blocks).save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return len(blocks)


def _views(sample: Sample, draw: SampleViews) -> dict[str, list[Rendered]]:
    rows: dict[str, list[Rendered]] = {}
    for name, views in draw(sample, 0).items():
        for view in views:
            if (rendered := draw.augment[name].render(view)) is not None:
                rows.setdefault(f"{name}, {view.role}", []).append(rendered)
    return rows


def _items(sample: Sample, augment: Mapping[str, Augmentation]) -> dict[str, list[Rendered]]:
    shown = {name: augmentation.decode(sample) for name, augmentation in augment.items()}
    return {
        name: [item for item in items if isinstance(item, str | Image.Image)] for name, items in shown.items() if items
    }


def _block(key: str, rows: Mapping[str, Sequence[Rendered]]) -> Image.Image:
    body = sheet([(label, [_shown(item, len(items)) for item in items]) for label, items in rows.items()], COLUMN)
    block = Image.new("RGB", (COLUMN, body.height + HEAD), "white")
    block.paste(body, (0, HEAD))
    draw, font = ImageDraw.Draw(block), font_of(13)
    while len(key) > 1 and font.getlength(key) > COLUMN - 2 * GAP:
        key = f"…{key[2:]}"
    draw.rectangle((0, 0, COLUMN, HEAD - 2), fill="#eef1f5")
    draw.text((6, 2), key, fill="black", font=font)
    return block


def _shown(item: Rendered, of: int) -> Rendered:
    """A text that is not too long for a page, told from its neighbours."""
    if not isinstance(item, str):
        return item
    text = item if len(item) <= MOST_TEXT else f"{item[:MOST_TEXT]}…"
    return text if of == 1 else f"• {text}"


def _page(blocks: Sequence[Image.Image]) -> Image.Image:
    """Blocks in columns, each where the shortest column ends."""
    columns = min(COLUMNS, len(blocks))
    heights, places = [GAP] * columns, []
    for block in blocks:
        column = heights.index(min(heights))
        places.append((GAP + column * (COLUMN + GAP), heights[column]))
        heights[column] += block.height + GAP
    page = Image.new("RGB", (GAP + columns * (COLUMN + GAP), max(heights)), "white")
    for block, place in zip(blocks, places, strict=True):
        page.paste(block, place)
    return page
