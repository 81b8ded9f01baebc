"""The data source `icons`: what people drew, named and tagged for npm's icon packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
from pydantic import Field

from distill_core import ComponentConfig, DataError, Diagnostic, stable_hash
from distill_drawn.shards import Drawn
from distill_drawn.source import SAME, SPLITS, DrawnSource, Item, ShardPlan, cached, versions
from distill_drawn.svg import Refused, png_of, rasterize
from distill_icons import colours, packages
from distill_icons.concepts import Concept, fraction, load, split_of
from distill_icons.draw import coverage, on_ground, transparent
from distill_icons.packages import SETS, SetName

FORMAT = 1
"""Raised when the same options and packages would give other shards."""
RENDERER = ("resvg-py", "pillow")


class IconsConfig(ComponentConfig):
    """Options of `icons`."""

    sets: Annotated[tuple[SetName, ...], Field(min_length=1)] = SETS
    """Which sets; all by default. A set is a package in one style."""
    folder: str | None = None
    """The folder in which `npm install --prefix FOLDER` has put the packages; by default `npm` in the cache folder."""
    size: int = Field(72, ge=8, le=1024)
    """Side of the stored pictures, in pixels."""
    grounds: bool = False
    """Lay each icon on a ground of a drawn colour, which small models take long to see through (docs/icons.md). If not,
    the picture is transparent, and the image augmentation's `background` is its ground."""
    cache: str | None = None
    """Where shards are kept; by default `$DISTILL_CACHE`, `$XDG_CACHE_HOME/distill` or `~/.cache/distill`."""
    shards: int = Field(4, ge=1)
    """Training shards a set; validation and test have one each."""
    limit: int | None = Field(None, ge=1)
    """Take only so many icons of each set, for trials."""


class IconsSource(DrawnSource):
    """Some 27,000 icons of 17,000 names from seven npm packages, in named colours, with two to six sentences each.

    Names that differ in a mark, a direction or a frame are one group, in all sets; groups are split 75 / 10 / 15 % by a
    fixed hash, so that validation and test hold what was never trained on in any set. Samples are `png` (RGBA) and
    `json` (captions, name, class, colour, ...).
    """

    name = "icons"
    Config = IconsConfig
    examples = ({"folder": "no-such-folder", "limit": 20, "shards": 1, "size": 24},)

    def __init__(self, config: IconsConfig) -> None:
        super().__init__(config)
        self.config: IconsConfig = config

    @property
    def npm(self) -> Path:
        """The folder of the packages."""
        return Path(self.config.folder).expanduser() if self.config.folder else packages.default_folder()

    def made_from(self) -> dict[str, Any]:
        """Options and versions. Raises `DataError`."""
        options = self.config
        return {
            "format": FORMAT,
            "sets": list(options.sets),
            "options": options.model_dump(include={"size", "shards", "limit", "grounds"}),
            "packages": {package.npm: version for package, (_, version) in packages.installed(self.npm).items()},
            "renderer": versions(RENDERER, "icons"),
        }

    def plan(self) -> dict[str, ShardPlan]:
        """Every set has shards in each split."""
        return {
            f"{split}-{name}-{i:03d}.tar": ShardPlan(split, name, i)
            for split in SPLITS
            for name in self.config.sets
            for i in range(self._count(split))
        }

    def items(self, names: Sequence[str]) -> dict[str, list[Item]]:
        """The icons of each shard: dealt out in the order of a hash, another order in each set."""
        chosen, left_out = self._concepts()
        twins = _twins(chosen)
        drawings: dict[tuple[str, str], list[tuple[float, Item]]] = {}
        for concept in chosen:
            icon = concept.icon
            draw: Callable[[], Drawn] = partial(_drawn, concept, self.config)
            if concept.key in twins:
                draw = partial(_refuse, f"{SAME} {twins[concept.key]}")
            place = split_of(concept.group), icon.set
            drawings.setdefault(place, []).append((fraction("order", concept.key), Item(icon.name, draw)))
        for (which, name), reason in left_out.items():  # not drawn, and counted where the drawings are
            item = Item(name, partial(_refuse, reason))
            drawings.setdefault(("train", which), []).append((fraction("order", name), item))
        plan, shards = self.plan(), {}
        for name in names:
            shard = plan[name]
            members = sorted(
                drawings.get((shard.split, shard.style), ()), key=lambda member: (member[0], member[1].name)
            )
            shards[name] = [item for _, item in members[shard.number :: self._count(shard.split)]]
        return shards

    def _concepts(self) -> tuple[list[Concept], dict[tuple[str, str], str]]:
        """Those of the chosen sets. Words and groups are of all sets: a split must not depend on `sets`."""
        places = packages.installed(self.npm)
        try:
            every, left_out = load(icon for package, (folder, _) in places.items() for icon in package.read(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"icons data: a package in {self.npm} is not as expected ({type(error).__name__}: {error}); these "
                f"versions are: {packages.how_to_get(self.npm)}"
            ) from error
        sets, limit = self.config.sets, self.config.limit
        chosen = [concept for concept in every if concept.icon.set in sets]
        if limit:
            chosen.sort(key=lambda concept: fraction("limit", concept.key))
            chosen = [c for name in sets for c in [c for c in chosen if c.icon.set == name][:limit]]
            return chosen, {}
        return chosen, {place: why for place, why in left_out.items() if place[0] in sets}

    def _count(self, split: str) -> int:
        return self.config.shards if split == "train" else 1


def _twins(concepts: Sequence[Concept]) -> dict[str, str]:
    """Key -> the name of an icon of the same set that comes before it and looks the same in 24 pixels.

    They may be in two splits, and two captions would be right for one picture.
    """
    seen: dict[tuple[str, bytes], str] = {}
    twins: dict[str, str] = {}
    for concept in concepts:
        icon = concept.icon
        try:
            look = icon.set, rasterize(icon.svg, 24, icon.name)
        except Refused:
            continue  # it is counted when it is drawn
        if seen.setdefault(look, icon.name) != icon.name:
            twins[concept.key] = seen[look]
    return twins


def _refuse(reason: str) -> NoReturn:
    raise Refused(reason)


def _drawn(concept: Concept, config: IconsConfig) -> Drawn:
    """A sample; its colours are a function of its set and name. Raises `Refused`."""
    icon = concept.icon
    rng = np.random.default_rng(stable_hash("icons", "colours", concept.key))
    ground = colours.drawn(rng) if config.grounds else colours.PAPER
    colour = colours.on(ground, rng)
    shape = coverage(icon.svg, config.size, concept.key)
    record = {
        "captions": concept.captions,
        "name": icon.name,
        "set": icon.set,
        "group": concept.group,
        "keywords": list(concept.keywords),
        "categories": list(icon.categories),
        "colour": colour.name,
        "rgb": colour.hex,
    }
    if concept.label:
        record["class"] = concept.label
    if config.grounds:
        record |= {"ground": ground.name, "ground_rgb": ground.hex}
    picture = on_ground(shape, colour, ground) if config.grounds else transparent(shape, colour)
    return Drawn(concept.key, {"png": png_of(picture)}, record)


def diagnostics() -> list[Diagnostic]:
    """What `distill doctor` says of the default options."""
    folder = packages.default_folder()
    try:
        text = ", ".join(f"{package.npm} {v}" for package, (_, v) in packages.installed(folder).items())
        first = Diagnostic("data", "icon packages", text)
    except DataError:
        first = Diagnostic("data", "icon packages", f"not all in {folder}; only the source icons needs them")
    return [first, *cached("icons"), *cached("icon-scenes")]
