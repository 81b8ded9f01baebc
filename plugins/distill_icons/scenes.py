"""The data source `icon_scenes`: several icons on one ground, with sentences about colours and places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from distill_core import ComponentConfig, DataError, stable_hash
from distill_drawn.shards import Drawn
from distill_drawn.source import SPLITS, DrawnSource, Item, ShardPlan
from distill_drawn.svg import png_of
from distill_icons import colours
from distill_icons.colours import Colour
from distill_icons.source import IconsConfig, IconsSource

FORMAT = 1
"""Raised when the same options would give other scenes."""
THINGS = Path(__file__).with_name("things.txt")
"""Names that "a red ..." makes good English of, and that mean one thing in every set; chosen by hand."""
A_SHARD = 2000
"""Scenes of a full shard."""
SET = "scenes"
FEWEST = 4
"""Fewest names that a split must have, to make scenes of."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are the first pixels outside, as Pillow's boxes."""


class ScenesConfig(ComponentConfig):
    """Options of `icon_scenes`."""

    scenes: int = Field(100_000, ge=1)
    """Training scenes."""
    held_out: int = Field(2000, ge=1)
    """Scenes of validation, and as many of test."""
    objects: tuple[int, int] = (2, 4)
    """Fewest and most icons of a scene, at most 5."""
    size: int = Field(96, ge=32, le=1024)
    """Side of a scene, in pixels."""
    seed: int = Field(0, ge=0)
    """Other scenes."""
    cache: str | None = None
    """Where shards are kept; by default `$DISTILL_CACHE`, `$XDG_CACHE_HOME/distill` or `~/.cache/distill`."""
    icons: IconsConfig | None = None
    """Options of the source `icons`, of which the scenes are made; null for its defaults."""

    @model_validator(mode="after")
    def _fits(self) -> ScenesConfig:
        fewest, most = self.objects
        if not 2 <= fewest <= most <= 5:
            raise ValueError(f"objects {fewest} to {most}: a scene has 2 to 5")
        if self.icons and self.icons.grounds:
            raise ValueError("icons.grounds: a scene has a ground of its own, and needs transparent icons")
        return self


class IconScenes(DrawnSource):
    """Two to five icons of a split's names, no two of which overlap, on a ground of one colour.

    A sample has the scene (`png`) and a json: `objects`, each with name, colour, exact box and place; `ground`;
    `captions`, of what is left of or above what, of the places, and of all together; `caption_0`, which is true,
    `caption_1`, which has the two objects the other way round, and `caption_2`, which has their colours exchanged.
    """

    name = "icon_scenes"
    Config = ScenesConfig
    examples = ({"scenes": 4, "held_out": 2, "size": 48, "icons": {"folder": "no-such-folder", "size": 24}},)

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__(config)
        self.config: ScenesConfig = config
        self.icons = IconsSource(config.icons or IconsConfig.model_validate({}))

    def prepare(self) -> None:
        """Write the icons' shards where they are missing, and then the scenes'. Raises `DataError`."""
        self.icons.prepare()
        super().prepare()

    def made_from(self) -> dict[str, Any]:
        """Options, the list of things, and what the icons are made from. Raises `DataError`."""
        options = self.config.model_dump(include={"scenes", "held_out", "objects", "size", "seed"}, mode="json")
        things = stable_hash(THINGS.read_text(encoding="utf-8"))
        return {"format": FORMAT, "options": options, "things": things, "icons": self.icons.made_from()}

    def plan(self) -> dict[str, ShardPlan]:
        """Shards of at most `A_SHARD` scenes."""
        return {
            f"{split}-{i:03d}.tar": ShardPlan(split, SET, i)
            for split in SPLITS
            for i in range(-(-self._count(split) // A_SHARD))
        }

    def items(self, names: Sequence[str]) -> dict[str, list[Item]]:
        """Scene i of a split is a function of the seed, the split and i alone."""
        plan = self.plan()
        sprites = {split: self._sprites(split) for split in dict.fromkeys(plan[name].split for name in names)}
        shards = {}
        for name in names:
            split, first = plan[name].split, plan[name].number * A_SHARD
            numbers = range(first, min(first + A_SHARD, self._count(split)))
            shards[name] = [
                Item(f"{split}-{i:06d}", partial(scene, split, i, sprites[split], self.config)) for i in numbers
            ]
        return shards

    def _count(self, split: str) -> int:
        return self.config.scenes if split == "train" else self.config.held_out

    def _sprites(self, split: str) -> dict[str, list[Image.Image]]:
        """Name -> its shapes in all sets, cropped to what is drawn. Raises `DataError` where names are too few."""
        things = set(THINGS.read_text(encoding="utf-8").splitlines())
        shapes: dict[str, list[Image.Image]] = {}
        for samples in self.icons.samples(split).values():
            for sample in samples:
                name = json.loads(sample["json"])["name"]
                if name in things:
                    with Image.open(BytesIO(sample["png"])) as picture:
                        shape = picture.getchannel("A")
                    shapes.setdefault(name, []).append(shape.crop(shape.getbbox()))
        if len(shapes) < FEWEST or len(shapes) < self.config.objects[1]:
            raise DataError(
                f"icon scenes: the split {split!r} has {len(shapes)} icons of things that scenes are made of, too few; "
                "a larger `icons.limit` or more `icons.sets` has more"
            )
        return dict(sorted(shapes.items()))


@dataclass(frozen=True)
class Placed:
    """An icon in a scene."""

    name: str
    colour: Colour
    box: Box

    @property
    def phrase(self) -> str:
        """`a red apple`, `an orange apple`."""
        article = "an" if self.colour.name[0] in "aeiou" else "a"
        return f"{article} {self.colour.name} {self.name}"

    @property
    def centre(self) -> tuple[float, float]:
        """x, y."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def scene(split: str, number: int, sprites: dict[str, list[Image.Image]], config: ScenesConfig) -> Drawn:
    """A scene and all that is known of it."""
    rng = np.random.default_rng(stable_hash("icon_scenes", config.seed, split, number))
    ground = colours.drawn(rng)
    fewest, most = config.objects
    count = int(rng.integers(fewest, most + 1))
    names = [list(sprites)[int(i)] for i in rng.permutation(len(sprites))[:count]]
    shapes = [sprites[name][int(rng.integers(len(sprites[name])))] for name in names]
    picture = Image.new("RGB", (config.size, config.size), ground.rgb)
    placed = []
    for name, shape, box in zip(names, *_laid_out(shapes, config.size, rng), strict=True):
        colour = colours.on(ground, rng)
        picture.paste(colour.rgb, box[:2], shape)
        placed.append(Placed(name, colour, box))
    record = {
        "captions": _captions(placed, ground, config.size, rng),
        "objects": [
            {"name": one.name, "colour": one.colour.name, "rgb": one.colour.hex, "box": list(one.box),
             "place": place(one.centre, config.size)}
            for one in placed
        ],
        "ground": {"colour": ground.name, "rgb": ground.hex},
        **_opposed(placed),
    }  # fmt: skip
    return Drawn(f"{split}-{number:06d}", {"png": png_of(picture)}, record)


def _laid_out(
    shapes: Sequence[Image.Image], size: int, rng: np.random.Generator
) -> tuple[list[Image.Image], list[Box]]:
    """The shapes in random sizes, and boxes for them, at least two pixels apart. Each side of a box is drawn on."""
    while True:
        resized: list[Image.Image] = []
        boxes: list[Box] = []
        for shape in shapes:
            longer = size * float(rng.uniform(0.28, 0.46))
            scale = longer / max(shape.size)
            small = shape.resize((max(1, round(shape.width * scale)), max(1, round(shape.height * scale))))
            visible = small.point([0] * 32 + list(range(32, 256)))  # without the faint rim that nobody sees
            small = visible.crop(visible.getbbox())
            for _ in range(20):
                left = int(rng.integers(1, size - small.width))
                top = int(rng.integers(1, size - small.height))
                box = (left, top, left + small.width, top + small.height)
                if all(_apart(box, other) for other in boxes):
                    resized.append(small)
                    boxes.append(box)
                    break
            else:
                break  # no room: all anew
        if len(boxes) == len(shapes):
            return resized, boxes


def _apart(one: Box, other: Box) -> bool:
    return one[2] + 2 <= other[0] or other[2] + 2 <= one[0] or one[3] + 2 <= other[1] or other[3] + 2 <= one[1]


def place(centre: tuple[float, float], size: int) -> str:
    """Which ninth of the scene the centre is in, in words."""
    column, row = (min(2, int(3 * v / size)) for v in centre)
    if (column, row) == (1, 1):
        return "in the middle"
    if column == 1:
        return ("at the top", "", "at the bottom")[row]
    side = ("left", "", "right")[column]
    return f"on the {side}" if row == 1 else f"in the {('upper', '', 'lower')[row]} {side}"


def relation(one: Placed, other: Placed) -> str | None:
    """`left of`, `right of`, `above` or `below`: what `one` is of `other`; None where their boxes leave it open.

    True along an axis on which the boxes do not overlap, and along which their centres are further apart.
    """
    (x, y), (other_x, other_y) = one.centre, other.centre
    along = abs(x - other_x), abs(y - other_y)
    if along[0] > along[1] and (one.box[2] <= other.box[0] or other.box[2] <= one.box[0]):
        return "left of" if x < other_x else "right of"
    if along[1] > along[0] and (one.box[3] <= other.box[1] or other.box[3] <= one.box[1]):
        return "above" if y < other_y else "below"
    return None


def _captions(placed: Sequence[Placed], ground: Colour, size: int, rng: np.random.Generator) -> list[str]:
    """Two relations at most, each said from one side; a place each; and the whole."""
    pairs = [(a, b) for i, a in enumerate(placed) for b in placed[i + 1 :]]
    related = []
    for i in rng.permutation(len(pairs)):
        one, other = pairs[int(i)] if rng.integers(2) else pairs[int(i)][::-1]
        if words := relation(one, other):
            related.append(f"{one.phrase} {words} {other.phrase}")
    phrases = [one.phrase for one in placed]
    article = "an" if ground.name[0] in "aeiou" else "a"
    whole = f"{', '.join(phrases[:-1])} and {phrases[-1]} on {article} {ground.name} ground"
    return [*related[:2], *(f"{one.phrase} {place(one.centre, size)}" for one in placed), whole]


def _opposed(placed: Sequence[Placed]) -> dict[str, str]:
    """A true sentence and two false ones of the first pair that has a relation and two colours; {} where none has."""
    for i, one in enumerate(placed):
        for other in placed[i + 1 :]:
            words = relation(one, other)
            if words and one.colour.name != other.colour.name:
                exchanged = Placed(one.name, other.colour, one.box), Placed(other.name, one.colour, other.box)
                return {
                    "caption_0": f"{one.phrase} {words} {other.phrase}",
                    "caption_1": f"{other.phrase} {words} {one.phrase}",
                    "caption_2": f"{exchanged[0].phrase} {words} {exchanged[1].phrase}",
                }
    return {}
