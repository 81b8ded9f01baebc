"""Pictures for the tracker: the views of a few training samples, and sheets that lay out pictures and text.

No modality is known here: an augmentation renders its views (`Augmentation.render`), a task its results (`Task.media`).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from distill_core.batch import Sample
from distill_core.contracts.media import Picture, Rendered
from distill_core.errors import BadSample, DataError

if TYPE_CHECKING:
    from PIL import Image

    from distill_core.data.shard import Shard
    from distill_core.recipe.sections import Recipe


class Showcase:
    """A few training samples, always the same ones, with the views that training makes of them in an epoch.

    Views are a function of (seed, epoch, key), so they are computed again here, outside the loader and its workers.
    """

    def __init__(self, recipe: Recipe, shards: Sequence[Shard], count: int) -> None:
        from distill_core.data.batches import SampleViews

        augment, joint = recipe.build_augmentations()
        self.views = SampleViews(augment, recipe.seed, recipe.data.optional, joint)
        self.shards = list(shards)
        self.count = count
        self._samples: list[Sample] | None = None

    def media(self, epoch: int) -> list[Picture]:
        """A sheet for each sample whose views can be rendered."""
        if self._samples is None:
            self._samples = self._read()
        pictures = []
        for sample in self._samples:
            rows: dict[str, list[Rendered]] = {}
            for name, views in self.views(sample, epoch).items():
                for view in views:
                    if (rendered := self.views.augment[name].render(view)) is not None:
                        rows.setdefault(f"{name}, {view.role}", []).append(rendered)
            if rows:
                key = str(sample["__key__"])
                pictures.append(Picture("views", sheet(list(rows.items())), words(key, rows), {"sample": key}))
        return pictures

    def _read(self) -> list[Sample]:
        """The first usable samples of evenly spaced shards."""
        stride = max(1, len(self.shards) // self.count)
        shards = self.shards[::stride][: self.count]
        per_shard = math.ceil(self.count / len(shards))
        return [sample for shard in shards for sample in islice(self._usable(shard), per_shard)][: self.count]

    def _usable(self, shard: Shard, tries: int = 20) -> Iterator[Sample]:
        try:
            for number in range(min(tries, len(shard))):
                sample = shard[number]
                try:
                    self.views(sample, 0)
                except BadSample:
                    continue
                yield sample
        except DataError:  # training reads it too, tries longer, and counts the loss
            return


def words(head: str, rows: Mapping[str, Sequence[Rendered]]) -> str:
    """A picture's caption: the head and all texts of the rows, a line each."""
    lines = [f"{label}: {item}" for label, items in rows.items() for item in items if isinstance(item, str)]
    return "\n".join([head, *lines])


def sheet(rows: Sequence[tuple[str, Sequence[Rendered]]], width: int = 640, side: int = 96) -> Image.Image:
    """Rows of (label, pictures or texts), one below another, on white: `width` pixels wide, as high as needed.

    Pictures keep their sizes relative to one another; the largest is `side` pixels or a little less.
    """
    from PIL import Image, ImageDraw

    sizes = [max(item.size) for _, items in rows for item in items if not isinstance(item, str)]
    largest = max(sizes, default=side)
    factor = side // largest if largest <= side else side / largest
    font, small, gap = font_of(13), font_of(11), 6
    placed: list[tuple[int, int, Any, Any]] = []  # x, y, picture or text, its font
    y = gap
    for label, items in rows:
        placed.append((gap, y, label, small))
        y += 16
        x, row_height = gap, 0
        for item in items:
            if isinstance(item, str):
                for line in textwrap.wrap(item, max(1, (width - 2 * gap) // 7)) or [""]:
                    placed.append((gap, y, line, font))
                    y += 17
                continue
            w, h = (max(1, round(length * factor)) for length in item.size)
            if x + w > width - gap and x > gap:
                x, y, row_height = gap, y + row_height + gap, 0
            scaled = item.convert("RGB").resize((w, h), Image.Resampling.NEAREST if factor > 1 else None)
            placed.append((x, y, scaled, None))
            x, row_height = x + w + gap, max(row_height, h)
        y += row_height + gap
    page = Image.new("RGB", (width, y), "white")
    draw = ImageDraw.Draw(page)
    for left, top, content, content_font in placed:
        if isinstance(content, str):
            draw.text((left, top), content, fill="black" if content_font is font else "grey", font=content_font)
        else:
            page.paste(content, (left, top))
    return page


def font_of(size: int) -> Any:
    """DejaVu, which comes with matplotlib and covers most scripts."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
