"""The data source `emoji_scenes`: a split's emoji put together, so that masks and places are known exactly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from distill_core import ComponentConfig, DataError, DataSource, Sample, Shard
from distill_emoji.concepts import fraction
from distill_emoji.source import EmojiConfig, EmojiSource

BACKGROUND = "background"


class ScenesConfig(ComponentConfig):
    """Options of `emoji_scenes`."""

    scenes: int = Field(60, ge=1)
    """Scenes of each style."""
    concepts: int = Field(20, ge=2, le=254)
    """How many of the split's concepts the scenes are made of: the classes, beside the background."""
    objects: tuple[int, int] = (2, 4)
    """Fewest and most objects of a scene, at most 4: each has a quarter of the scene to itself."""
    size: int = Field(96, ge=16, le=1024)
    """Side of a scene, in pixels."""
    background: bool = True
    """Whether the background is a class, as of VOC's 21; if not, it is not scored, as of VOC's 20."""
    seed: int = Field(0, ge=0)
    """Other concepts and places."""
    emoji: EmojiConfig | None = None
    """Options of the source `emoji`, whose pictures these are; null for its defaults."""

    @model_validator(mode="after")
    def _fits(self) -> ScenesConfig:
        fewest, most = self.objects
        if not 2 <= fewest <= most <= 4:
            raise ValueError(f"objects {fewest} to {most}: a scene has 2 to 4")
        if self.concepts < most:
            raise ValueError(f"{self.concepts} concepts are too few for {most} objects that differ")
        return self


class EmojiScenes(DataSource):
    """Two to four emoji of a split on a background of two colours: for `segmentation` and `composition`.

    Sets are the emoji's styles, all of the same concepts. A sample has the scene (`png`), `mask.png` (a class a pixel:
    where an emoji's alpha is above one half), `classes.txt`, and a json: `captions`, a sentence an object;
    `caption_0`, which says what is left of what, and `caption_1`, which has the two the other way round.
    """

    name = "emoji_scenes"
    Config = ScenesConfig
    trainable = False
    examples = ({"scenes": 4, "concepts": 5, "size": 32, "emoji": {"limit": 200, "shards": 1, "size": 16}},)

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__(config)
        self.config: ScenesConfig = config
        self.emoji = EmojiSource(config.emoji or EmojiConfig.model_validate({}))

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        """All three: a split's scenes are made of its own concepts."""
        return ("train", "validation", "test")

    def prepare(self) -> None:
        """Write the emoji's shards where they are missing. Raises `DataError`."""
        self.emoji.prepare()

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """No shards: scenes are made when they are read."""
        return {}

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """By style. Raises `DataError` where the split has too few concepts that all styles draw."""
        styles = {style: _sprites(samples) for style, samples in self.emoji.samples(split).items()}
        if not styles:
            return {}
        shared = set.intersection(*(set(sprites) for sprites in styles.values()))
        order = sorted(shared, key=lambda code: fraction(f"scenes-{self.config.seed}-{code}"))
        if len(order) < self.config.concepts:
            raise DataError(
                f"emoji scenes: the split {split!r} has {len(order)} concepts in all styles; concepts is "
                f"{self.config.concepts}"
            )
        chosen = order[: self.config.concepts]
        return {
            style: Scenes([sprites[code] for code in chosen], self.config, f"{split}-{style}")
            for style, sprites in styles.items()
        }


@dataclass(frozen=True)
class Sprite:
    """An emoji to be put into scenes: PNG bytes, RGBA."""

    name: str
    sentence: str
    png: bytes


def _sprites(samples: Iterable[Sample]) -> dict[str, Sprite]:
    """By code point."""
    sprites = {}
    for sample in samples:
        record = json.loads(sample["json"])
        sprites[record["codepoints"]] = Sprite(record["name"], record["captions"][1], sample["png"])
    return sprites


class Scenes:
    """The scenes of one style, made anew each time they are read; scene i is a function of the seed and i alone."""

    def __init__(self, sprites: Sequence[Sprite], config: ScenesConfig, name: str) -> None:
        self.sprites, self.config, self.name = sprites, config, name
        self.place = f"{name} {config.model_dump_json()}"
        names = [sprite.name.replace(",", "") for sprite in sprites]
        self.classes = "\n".join([BACKGROUND, *names] if config.background else names).encode()

    def __len__(self) -> int:
        return self.config.scenes

    def fingerprint(self) -> str:
        """Of what the scenes are made of."""
        held = blake2b(self.place.encode())
        for sprite in self.sprites:
            held.update(repr(sprite).encode())
        return held.hexdigest()

    def __iter__(self) -> Iterator[Sample]:
        for i in range(self.config.scenes):
            yield self.scene(i)

    def scene(self, i: int) -> Sample:
        """Places and concepts are the same in all styles."""
        config, half = self.config, self.config.size // 2
        rng = np.random.default_rng((config.seed, i))
        fewest, most = config.objects
        count = int(rng.integers(fewest, most + 1))
        chosen = [int(n) for n in rng.permutation(len(self.sprites))[:count]]
        cells = _cells(count, rng)
        picture = _background(config.size, rng)
        mask = np.full((config.size, config.size), 0 if config.background else 255, np.uint8)
        for number, (column, row) in zip(chosen, cells, strict=True):
            side = int(rng.integers(round(0.7 * half), half + 1))
            left, top = (half * cell + int(rng.integers(0, half - side + 1)) for cell in (column, row))
            sprite = _resized(self.sprites[number].png, side)
            picture.alpha_composite(sprite, (left, top))
            alpha = np.asarray(sprite)[..., 3]
            mask[top : top + side, left : left + side][alpha > 127] = number + config.background
        png = _png(picture.convert("RGB"))
        left_one = self.sprites[chosen[next(k for k, (column, _) in enumerate(cells) if column == 0)]].name
        right_one = self.sprites[chosen[next(k for k, (column, _) in enumerate(cells) if column == 1)]].name
        record = {
            "captions": [self.sprites[number].sentence for number in chosen],
            "objects": [self.sprites[number].name for number in chosen],
            "caption_0": f"{left_one} to the left of {right_one}",
            "caption_1": f"{right_one} to the left of {left_one}",
        }
        return {
            "__key__": f"{self.name}-{i:04d}",
            "__url__": f"emoji_scenes, {self.name}",
            "png": png,
            "image_0": png,
            "mask.png": _png(Image.fromarray(mask)),
            "classes.txt": self.classes,
            "json": json.dumps(record, ensure_ascii=False).encode(),
        }


def _cells(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(column, row) of so many quarters, in a random order; both columns are there."""
    one, other = (0, int(rng.integers(2))), (1, int(rng.integers(2)))
    rest = [cell for cell in ((0, 0), (0, 1), (1, 0), (1, 1)) if cell not in (one, other)]
    cells = [one, other, *(rest[k] for k in rng.permutation(len(rest)))][:count]
    return [cells[k] for k in rng.permutation(count)]


def _background(size: int, rng: np.random.Generator) -> Image.Image:
    """A smooth change from one light colour to another, from top to bottom."""
    upper, lower = rng.uniform(150, 255, (2, 3))
    down = np.linspace(0, 1, size)[:, None, None]
    pixels = np.broadcast_to(upper * (1 - down) + lower * down, (size, size, 3))
    return Image.fromarray(pixels.round().astype(np.uint8)).convert("RGBA")


def _resized(png: bytes, side: int) -> Image.Image:
    """RGBA [side, side], resized with colours multiplied by alpha: transparent pixels must not darken the edge."""
    with Image.open(BytesIO(png)) as picture:
        small = picture.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    return small.convert("RGBA")


def _png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
