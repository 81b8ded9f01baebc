"""What every text augmentation shares: a sample's captions, chosen and drawn, are pooled into a list of sentences."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from string import whitespace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from distill_core import AbsentModality, Augmentation, BadSample, ComponentConfig, Sample, Slot, View, default_component
from distill_vl.caption_readers import Auto, CaptionReader

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

    layout: Slot[CaptionReader] = default_component(Auto)
    """Where a sample keeps its captions: a `caption_reader`. `auto` looks at each sample for the layouts that are
    known here: `dreamlip`, `pixelprose`, `captions`, `references`, `img2dataset`, `txt`."""
    fields: Fields | None = None
    """Fields that are read in place of all of the layout's; [raw_caption] trains on the web's captions alone. In json a
    dot leads into an object, as `captions.long`; `raw`, `short` and `long` are DreamLIP's lists of these kinds. With
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

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.reader: CaptionReader = config.layout.build()

    def sentences(self, text: str) -> list[str]:
        """A text's sentences, cut as the option `split` says."""
        return sentences(text, self.config.split)

    def texts(self, sample: Sample, rng: np.random.Generator | None = None) -> dict[str, list[str]]:
        """The captions by their field, in the reader's order: each one text, or several that make it up.

        All of them, unless `rng` draws those of a step. Raises `BadSample` when there is none.
        """
        names = self.config.fields
        by_name = {"": self.reader.captions(sample)} if names is None else self._named(sample, names)
        by_name = {name: texts for name, fields in by_name.items() if (texts := _without_blank(fields))}
        if not by_name:
            where = f"layout {self.reader.name}" if names is None else f"fields {', '.join(names)}"
            raise AbsentModality(f"no caption in the {where}")
        drawn = _drawn(names, by_name, rng) if rng is not None and isinstance(names, Mapping) else by_name
        return {field: texts for name in drawn for field, texts in by_name[name].items()}

    def of_fields(self, sample: Sample, names: Sequence[str]) -> list[str]:
        """The captions of some fields, named as the option `fields` names them, each whole. Raises `BadSample`."""
        by_field = {field: texts for fields in self._named(sample, names).values() for field, texts in fields.items()}
        return [join(parts) for texts in by_field.values() for text in texts if (parts := lines(text))]

    def _named(self, sample: Sample, names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
        """By name, the fields that it stands for: that of this name, or those of the group."""
        groups = {name: self.reader.groups.get(name, ()) for name in names}
        by_field = self.reader.named(sample, [*groups, *(field for group in groups.values() for field in group)])
        return {
            name: {field: by_field[field] for field in ((name,) if name in by_field else group) if field in by_field}
            for name, group in groups.items()
        }

    def captions(self, sample: Sample, rng: np.random.Generator | None = None) -> dict[str, list[str]]:
        """`texts`, each as its sentences. Raises `BadSample` when there is none."""
        return {
            field: [tidy(text) for text in texts]
            if field in self.reader.sentences
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
        """The whole caption, or what a field holds: one text, or each of a list.

        Where the reader has references (an evaluation's captions of the picture, each a whole one), each of them.
        """
        texts = self.reader.references(sample) if field is None else self.reader.named(sample, [field]).get(field, [])
        if texts is None:
            return [self.whole(sample)]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise BadSample(f"no text in the field {field or 'references'!r}")
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


def _without_blank(fields: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The fields that hold a text, without the blank ones."""
    texts = {field: [text for text in parts if lines(text)] for field, parts in fields.items()}
    return {field: parts for field, parts in texts.items() if parts}


def _drawn(chances: Mapping[str, Any], available: Collection[str], rng: np.random.Generator) -> list[str]:
    """The names of a step, in the option's order: each with its probability; one where none is drawn."""
    chance = {name: 1.0 if p == "always" else float(p) for name, p in chances.items()}
    names = [name for name in chance if name in available]
    # a draw for each name, so that those of the others do not depend on what a sample lacks
    draws = dict(zip(chance, rng.random(len(chance)), strict=True))
    drawn = [name for name in names if draws[name] < chance[name]]
    if not drawn:
        weights = np.array([chance[name] for name in names])
        drawn = [names[int(rng.choice(len(names), p=weights / weights.sum()))]]
    return drawn
