"""Reading captions: what every text augmentation shares. A sample's captions are pooled into a list of sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from string import whitespace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from distill_core import Augmentation, BadSample, ComponentConfig, Sample, View

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
LAYOUTS = {
    "dreamlip": DREAMLIP,
    "pixelprose": ("original_caption", "caption"),
    "captions": ("captions",),
    "references": ("references",),
    "img2dataset": ("caption",),
}
"""The json's fields of each layout, in the pool's order."""
KINDS = {
    "raw": ("raw_caption", "original_caption"),
    "short": ("shortIB_captions", "shortSV_captions", "shortLLA_captions"),
    "long": ("longIB_captions", "longSV_captions", "longLLA_captions"),
}
"""Names that stand for lists of DreamLIP's and PixelProse's json."""
AS_THEY_ARE = ("original_caption", "captions")
"""Fields whose texts are sentences already: COSMOS's public code does not split PixelProse's original caption."""

STOPS = ".\u3002\uff0e\uff61"
"""Full stops: the Latin one, the ideographic one, and the two in other widths."""
_BREAK = r"\n|</s>"
_FULL_STOPS = re.compile(rf"{_BREAK}|[{STOPS}]")
# a sentence ends at . ! or ? before white space, but not after an initial or a title; ideographic marks need no space
_SENTENCES = re.compile(
    rf"{_BREAK}|(?<=[\u3002\uff0e\uff61\uff01\uff1f])|(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)"
    r"(?<!\bMrs\.)(?<!\bvs\.)(?<=[.!?])\s+"
)

FEWEST = 1.5
"""Sentences a sample, by the mean: with fewer, most texts that are drawn of them are the same."""

Split = Literal["full_stops", "sentences"]
Chance = Annotated[float, Field(gt=0, le=1)] | Literal["always"]
Fields = Annotated[tuple[str, ...], Field(min_length=1)] | Annotated[dict[str, Chance], Field(min_length=1)]


class CaptionConfig(ComponentConfig):
    """Options of every text augmentation."""

    layout: Literal["auto", "dreamlip", "pixelprose", "captions", "references", "img2dataset", "txt"] = "auto"
    """Where a sample keeps its captions: json with DreamLIP's lists; json with PixelProse's `original_caption` and
    `caption`; json with a list `captions` of sentences; json with `references`, whole captions; json with a `caption`,
    as img2dataset writes it; or plain `txt`. `auto` looks at each sample."""
    fields: Fields | None = None
    """Fields of the json that are read in place of the layout's; [raw_caption] trains on the web's captions alone. A
    dot leads into an object, as `captions.long`. `raw`, `short` and `long` are DreamLIP's lists of these kinds. With
    probabilities, {raw: always, short: 0.5}, a step draws which of them a sample has, each by itself and at least one;
    evaluations read all."""
    split: Split = "full_stops"
    """Where a caption is cut into sentences. `full_stops`: at every full stop, line break and `</s>`, as the public
    codes of COSMOS, FLAIR and DreamLIP do, and at a Chinese or Japanese full stop; "3.5 m" is cut, too. `sentences`: at
    line breaks, `</s>`, and marks (. ! ?) that end a word, but not after initials and titles."""


class TakeConfig(CaptionConfig):
    """Which text a step sees."""

    take: Literal["all", "one"] = "all"
    """The whole caption, or one of its sentences drawn at random."""


def sentences(text: str, split: Split = "full_stops") -> list[str]:
    """The sentences of a text, without white space around them or a full stop after them; none is empty."""
    cut = _FULL_STOPS if split == "full_stops" else _SENTENCES
    return [part for part in (tidy(part) for part in cut.split(text)) if part]


def tidy(text: str) -> str:
    """Without white space around it, and without full stops after it."""
    return text.strip().rstrip(STOPS + whitespace)


def lines(text: str) -> list[str]:
    """A text cut at line breaks and `</s>` alone; none is empty."""
    return [line for line in (tidy(part) for part in re.split(_BREAK, text)) if line]


def join(parts: Sequence[str]) -> str:
    """Sentences as one text: a full stop after each but the last, unless it ends in a mark of its own."""
    marks = ("?", "!", "\uff1f", "\uff01")
    return " ".join([part if part.endswith(marks) else f"{part}." for part in parts[:-1]] + list(parts[-1:]))


def draw(population: int, count: int, rng: np.random.Generator) -> Sequence[int]:
    """`count` of 0..population-1 without replacement; one that is too small is repeated whole, then topped up."""
    whole = list(range(population)) * (count // population)
    return whole + [int(i) for i in rng.permutation(population)[: count % population]]


class CaptionAugmentation(Augmentation):
    """Base of text augmentations: finds the sample's sentences; the evaluation view is the whole caption."""

    config: Any
    wants_several: ClassVar[bool] = False
    """Whether the views are cut out of several sentences, and are all alike where a sample has one."""

    def sentences(self, text: str) -> list[str]:
        """A text's sentences, cut as the option `split` says."""
        return sentences(text, self.config.split)

    def texts(self, sample: Sample, rng: np.random.Generator | None = None) -> dict[str, list[str]]:
        """The captions by their field, in the layout's order: each one text, or several that make it up.

        All of them, unless `rng` draws those of a step. Raises `BadSample` when there is none.
        """
        document, layout, fields = _json(sample), self.config.layout, self.config.fields
        if layout == "auto":
            layout = _layout(document, sample)
        if fields is None and layout == "txt":
            texts = {"txt": [_text(sample)]}
        else:
            texts = {field: _texts(document, field) for field in _named(document, fields or LAYOUTS[layout])}
        texts = {field: [text for text in parts if lines(text)] for field, parts in texts.items()}
        texts = {field: parts for field, parts in texts.items() if parts}
        if not texts:
            where = f"the {layout} layout" if fields is None else f"the json's fields {', '.join(fields)}"
            raise BadSample(f"no caption in {where}")
        if rng is None or not isinstance(fields, Mapping):
            return texts
        return {field: texts[field] for field in _drawn(document, fields, texts, rng)}

    def of_fields(self, sample: Sample, names: Sequence[str]) -> list[str]:
        """The captions of some fields, named as the option `fields` names them, each whole. Raises `BadSample`."""
        document = _json(sample)
        texts = (text for field in _named(document, names) for text in _texts(document, field))
        return [join(parts) for text in texts if (parts := lines(text))]

    def captions(self, sample: Sample, rng: np.random.Generator | None = None) -> dict[str, list[str]]:
        """`texts`, each as its sentences. Raises `BadSample` when there is none."""
        return {
            field: [tidy(text) for text in texts]
            if field in AS_THEY_ARE
            else [sentence for text in texts for sentence in self.sentences(text)]
            for field, texts in self.texts(sample, rng).items()
        }

    def pool(self, sample: Sample, rng: np.random.Generator | None = None) -> list[str]:
        """The sentences of the captions, in order. Raises `BadSample` when there is none."""
        return [sentence for caption in self.captions(sample, rng).values() for sentence in caption]

    def whole(self, sample: Sample, rng: np.random.Generator | None = None) -> str:
        """The captions as one text, not cut but at line breaks and `</s>`. Raises `BadSample` when there is none."""
        return join([line for texts in self.texts(sample, rng).values() for text in texts for line in lines(text)])

    def decode(self, sample: Sample, field: str | None = None) -> list[str]:
        """The whole caption, or what a field of the json holds: one text, or each of a list.

        Where the json has `references` (an evaluation's captions of the picture, each a whole one), each of them.
        """
        if field is None and "references" in _json(sample):
            field = "references"
        if field is None:
            return [self.whole(sample)]
        texts = [text for text in _texts(_json(sample), field) if text.strip()]
        if not texts:
            raise BadSample(f"no text in the json's field {field!r}")
        return texts

    def measure(self, sample: Sample) -> Mapping[str, float]:
        """Captions and sentences. Raises `BadSample` when there is none."""
        captions = self.captions(sample).values()
        return {"captions": len(captions), "sentences": sum(len(caption) for caption in captions)}

    @classmethod
    def remarks(cls, config: CaptionConfig, means: Mapping[str, float]) -> tuple[str, str | None]:
        """Captions a sample and sentences a caption; a warning where there are too few sentences to cut views from."""
        captions, sentences = means["captions"], means["sentences"]
        line = f"{captions:.1f} captions a sample, {sentences / captions:.1f} sentences a caption"
        if not cls.wants_several or sentences >= FEWEST:
            return line, None
        return line, (
            f"{cls.name} cuts its texts out of a sample's sentences, and there are {sentences:.1f} a sample: its texts "
            "are much the same. Give longer captions, or more of them; docs/methods.md says what each method wants."
        )

    def eval_view(self, item: Any) -> View:
        """A text as it is."""
        if not isinstance(item, str):
            raise BadSample(f"not a text: {type(item).__name__}")
        return View(item)


class OneText(CaptionAugmentation):
    """Base of text augmentations whose views are all of one text; options `TakeConfig`."""

    Config = TakeConfig

    def text(self, sample: Sample, rng: np.random.Generator) -> str:
        """The whole caption, or a sentence drawn at random. Raises `BadSample`."""
        if self.config.take == "all":
            return self.whole(sample, rng)
        pool = self.pool(sample, rng)
        return pool[int(rng.integers(len(pool)))]


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


def _layout(document: Mapping[str, Any], sample: Sample) -> str:
    if any(key in document for key in DREAMLIP):
        return "dreamlip"
    if "original_caption" in document:
        return "pixelprose"
    if "captions" in document:
        return "captions"
    if "txt" not in sample:
        return next((layout for layout in ("references", "img2dataset") if LAYOUTS[layout][0] in document), "txt")
    return "txt"


def _named(document: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The fields that an option's names stand for in this json, each once."""
    fields = (field for name in names for field in (KINDS[name] if name in KINDS and name not in document else (name,)))
    return list(dict.fromkeys(fields))


def _drawn(
    document: Mapping[str, Any], chances: Mapping[str, Any], texts: Mapping[str, Any], rng: np.random.Generator
) -> list[str]:
    """The fields of a step, in the option's order: of each name with its probability; of one where none is drawn."""
    chance = {name: 1.0 if p == "always" else float(p) for name, p in chances.items()}
    have = [name for name in chance if any(field in texts for field in _named(document, [name]))]
    # a draw for each name, so that those of the others do not depend on what a sample lacks
    draws = dict(zip(chance, rng.random(len(chance)), strict=True))
    chosen = [name for name in have if draws[name] < chance[name]]
    if not chosen:
        weights = np.array([chance[name] for name in have])
        chosen = [have[int(rng.choice(len(have), p=weights / weights.sum()))]]
    return [field for field in _named(document, chosen) if field in texts]


def _text(sample: Sample) -> str:
    try:
        return bytes(sample.get("txt", b"")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"the txt is not UTF-8: {error}") from error


def _texts(document: Mapping[str, Any], key: str) -> list[str]:
    value = document.get(key)
    if value is None and "." in key:
        value = document
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise BadSample(f"the json's field {key!r} holds something other than text")
    return values
