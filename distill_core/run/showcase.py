"""What there is to look at beside numbers: pictures and distributions that components give and a tracker takes.

Nothing here knows a modality: an augmentation says what its views look like (`Augmentation.render`), an evaluation what
it found (`Task.media`), and a sheet lays out pictures and words.
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

    from distill_core.interfaces import Augmentation
    from distill_core.recipe.sections import Recipe


class Showcase:
    """A few training samples, always the same ones, with the views that training makes of them in an epoch.

    Views are a function of (seed, epoch, key), so they are made here again, away from the loader and its workers.
    """

    def __init__(self, recipe: Recipe, shards: Sequence[str], count: int) -> None:
        from distill_core.data.stream import SampleViews

        self.augment: dict[str, Augmentation] = {name: node.build() for name, node in recipe.augment.items()}
        self.views = SampleViews(self.augment, recipe.seed)
        self.shards = list(shards)
        self.count = count
        self._samples: list[Sample] | None = None

    def media(self, epoch: int) -> list[Picture]:
        """A sheet for each sample that has anything to show."""
        if self._samples is None:
            self._samples = self._read()
        made = []
        for sample in self._samples:
            rows: dict[str, list[Rendered]] = {}
            for name, views in self.views(sample, epoch).items():
                for view in views:
                    if (shown := self.augment[name].render(view)) is not None:
                        rows.setdefault(f"{name}, {view.role}", []).append(shown)
            if rows:
                key = str(sample["__key__"])
                made.append(Picture("views", sheet(list(rows.items())), words(key, rows), {"sample": key}))
        return made

    def _read(self) -> list[Sample]:
        """The first usable samples of shards that lie evenly among all."""
        stride = max(1, len(self.shards) // self.count)
        chosen = self.shards[::stride][: self.count]
        each = math.ceil(self.count / len(chosen))
        return [sample for shard in chosen for sample in islice(self._usable(shard), each)][: self.count]

    def _usable(self, shard: str, tries: int = 20) -> Iterator[Sample]:
        from distill_core.data.shards import Patience, read_shard

        try:
            for sample in islice(read_shard(shard, Patience(retries=0)), tries):
                try:
                    self.views(sample, 0)
                except BadSample:
                    continue
                yield sample
        except DataError:  # training reads it too, tries longer, and counts the loss
            return


def words(head: str, rows: Mapping[str, Sequence[Rendered]]) -> str:
    """The head and all texts of the rows, a line each: a picture's caption."""
    lines = [f"{label}: {shown}" for label, items in rows.items() for shown in items if isinstance(shown, str)]
    return "\n".join([head, *lines])


def sheet(rows: Sequence[tuple[str, Sequence[Rendered]]], width: int = 640, side: int = 96) -> Image.Image:
    """Rows of (label, pictures or texts), one below another, on white; a `width` of pixels, whatever height it takes.

    Pictures keep their sizes relative to one another; the largest is `side` pixels or a little less.
    """
    from PIL import Image, ImageDraw

    sizes = [max(shown.size) for _, items in rows for shown in items if not isinstance(shown, str)]
    largest = max(sizes, default=side)
    factor = side // largest if largest <= side else side / largest
    font, small, gap = font_of(13), font_of(11), 6
    placed: list[tuple[int, int, Any, Any]] = []  # x, y, picture or text, its font
    y = gap
    for label, items in rows:
        placed.append((gap, y, label, small))
        y += 16
        x, below = gap, 0
        for shown in items:
            if isinstance(shown, str):
                for line in textwrap.wrap(shown, max(1, (width - 2 * gap) // 7)) or [""]:
                    placed.append((gap, y, line, font))
                    y += 17
                continue
            w, h = (max(1, round(length * factor)) for length in shown.size)
            if x + w > width - gap and x > gap:
                x, y, below = gap, y + below + gap, 0
            scaled = shown.convert("RGB").resize((w, h), Image.Resampling.NEAREST if factor > 1 else None)
            placed.append((x, y, scaled, None))
            x, below = x + w + gap, max(below, h)
        y += below + gap
    page = Image.new("RGB", (width, y), "white")
    draw = ImageDraw.Draw(page)
    for left, top, what, how in placed:
        if isinstance(what, str):
            draw.text((left, top), what, fill="black" if how is font else "grey", font=how)
        else:
            page.paste(what, (left, top))
    return page


def font_of(size: int) -> Any:
    """DejaVu, which matplotlib brings and which has most scripts' letters."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
