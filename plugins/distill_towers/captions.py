"""Reading captions: what every text augmentation shares. A sample's captions are pooled into a list of sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from distill_core.components import Augmentation, ComponentConfig
from distill_core.errors import BadSample
from distill_core.types import Sample, View

DREAMLIP = (
    "raw_caption",
    "shortIB_captions",
    "longIB_captions",
    "shortSV_captions",
    "longSV_captions",
    "shortLLA_captions",
    "longLLA_captions",
)
"""The lists of a DreamLIP shard's json; the pool is their concatenation."""

# a sentence ends at . ! or ? before white space, but not after an initial or a common title
_END = re.compile(r"(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\bvs\.)(?<=[.!?])\s+")


class CaptionConfig(ComponentConfig):
    """Options of every text augmentation."""

    layout: Literal["auto", "dreamlip", "pixelprose", "captions", "txt"] = "auto"
    """Where a sample keeps its captions: json with DreamLIP's lists; json with PixelProse's `original_caption` and
    `caption`; json with a list `captions`; or plain `txt`. `auto` looks at each sample."""


class TakeConfig(CaptionConfig):
    """Which text a step sees."""

    take: Literal["all", "one"] = "all"
    """All sentences joined, or one drawn at random."""


def sentences(text: str) -> list[str]:
    """The sentences of a text, without white space around them or a full stop behind them; none is empty."""
    parts = (part.strip().rstrip(".").rstrip() for part in _END.split(text.strip()))
    return [part for part in parts if part]


def join(parts: Sequence[str]) -> str:
    """Sentences as one text: a full stop behind each but the last, unless it ends in a mark of its own."""
    return " ".join([part if part.endswith(("?", "!")) else f"{part}." for part in parts[:-1]] + list(parts[-1:]))


def draw(population: int, count: int, rng: np.random.Generator) -> Sequence[int]:
    """`count` of 0..population-1 without replacement; one that is too small is repeated whole, then topped up."""
    whole = list(range(population)) * (count // population)
    return whole + [int(i) for i in rng.permutation(population)[: count % population]]


def text_of(pool: Sequence[str], take: Literal["all", "one"], rng: np.random.Generator) -> tuple[str, int]:
    """(all sentences joined, 0), or (one drawn at random, its place in the pool)."""
    if take == "all":
        return join(pool), 0
    chosen = int(rng.integers(len(pool)))
    return pool[chosen], chosen


class CaptionAugmentation(Augmentation):
    """Base of text augmentations: finds the sample's sentences; the evaluation view is the whole caption."""

    config: Any

    @classmethod
    def example_sample(cls, config: CaptionConfig, rng: np.random.Generator) -> Sample:
        """Four sentences, in the layout of the options."""
        words = [" ".join(rng.choice(["a", "red", "old", "bird", "boat", "by", "the", "sea"], 6)) for _ in range(4)]
        if config.layout in ("auto", "txt"):
            return {"txt": ". ".join(words).encode()}
        keys = {"dreamlip": DREAMLIP, "pixelprose": ("original_caption", "caption"), "captions": ("captions",)}
        return {"json": json.dumps(dict.fromkeys(keys[config.layout], words)).encode()}

    def pool(self, sample: Sample) -> list[str]:
        """All sentences of the sample, in order. Raises `BadSample` when there is none."""
        document, layout = _json(sample), self.config.layout
        if layout == "auto":
            layout = _layout(document)
        if layout == "txt":
            found = sentences(_text(sample))
        elif layout == "dreamlip":
            found = [part for key in DREAMLIP for text in _texts(document, key) for part in sentences(text)]
        elif layout == "pixelprose":
            found = [text.strip().rstrip(".") for text in _texts(document, "original_caption")]
            found += [part for text in _texts(document, "caption") for part in sentences(text)]
        else:
            found = [text.strip().rstrip(".") for text in _texts(document, "captions")]
        found = [text for text in found if text.strip()]
        if not found:
            raise BadSample(f"no caption in the {layout} layout")
        return found

    def read(self, sample: Sample, field: str | None = None) -> list[str]:
        """The whole caption (all sentences), or what a field of the json holds: one text, or each of a list.

        Where the json has `references` (an evaluation's captions of the picture, each a whole one), each of them.
        """
        if field is None and "references" in _json(sample):
            field = "references"
        if field is None:
            return [join(self.pool(sample))]
        found = [text for text in _texts(_json(sample), field) if text.strip()]
        if not found:
            raise BadSample(f"no text in the json's field {field!r}")
        return found

    def plain(self, item: Any) -> View:
        """A text as it is."""
        if not isinstance(item, str):
            raise BadSample(f"not a text: {type(item).__name__}")
        return View(item)


def _json(sample: Sample) -> Mapping[str, Any]:
    if "json" not in sample:
        return {}
    try:
        document = json.loads(sample["json"])
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise BadSample(f"not readable json: {error}") from error
    if not isinstance(document, dict):
        raise BadSample("the json is not an object")
    return document


def _layout(document: Mapping[str, Any]) -> str:
    if any(key in document for key in DREAMLIP):
        return "dreamlip"
    if "original_caption" in document:
        return "pixelprose"
    return "captions" if "captions" in document else "txt"


def _text(sample: Sample) -> str:
    try:
        return bytes(sample.get("txt", b"")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"the txt is not UTF-8: {error}") from error


def _texts(document: Mapping[str, Any], key: str) -> list[str]:
    value = document.get(key)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise BadSample(f"the json's field {key!r} holds something other than text")
    return values
