"""`distill data inspect`: what a data set holds, and what of it training could not use."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from distill_core import (
    AbsentModality,
    Augmentation,
    BadSample,
    DataError,
    Patience,
    Sample,
    Unusable,
    progress_bar,
    stable_hash,
)
from distill_data.row import Named, Row, in_order
from distill_data.writing import grouped
from distill_vl.caption import WholeCaption
from distill_vl.random_crop import RandomCrop
from distill_vl.tokenizer import ClipTokenizer

LONGEST = 1024
"""Tokens of a text that are counted."""
ABSENT = 1000
"""A modality that none of so many samples has is not looked for any more."""
SIDES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
WORDS = (1, 3, 5, 10, 15, 20, 30, 50, 75, 100, 150, 250, 500)
TOKENS = (3, 8, 16, 24, 32, 48, 64, 78, 128, 192, 256, 512, 1024)
"""The first that is longer than CLIP's context of 77 is an edge."""
SENTENCES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 30)


@dataclass(slots=True)
class Facts:
    """What was seen of one sample."""

    key: str
    url: str
    fields: tuple[str, ...] = ()
    bytes: int = 0
    sizes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By modality, width and height of its pictures."""
    texts: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By modality, words and tokens of its texts."""
    measures: dict[str, Mapping[str, float]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    """Modalities that it lacks, as it may (`data.optional`)."""
    problems: dict[str, str] = field(default_factory=dict)
    """By modality, why it cannot be used; "" for what no modality is to blame for."""


class Look:
    """Position -> facts. Reads each modality as the augmentation of the recipe, or a plain one, does."""

    def __init__(self, row: Row, augment: Mapping[str, Augmentation], optional: Collection[str] = ()) -> None:
        """`optional`: modalities that a sample may lack, but not all of them."""
        self.row, self.augment, self.optional = row, dict(augment), frozenset(optional)
        self._tokenizer = ClipTokenizer(LONGEST)

    def __call__(self, position: int) -> Facts:
        try:
            sample = self.row.read(position)
        except DataError as error:
            shard = self.row.shards[self.row.shard(position)].name
            return Facts(f"(sample {position})", shard, problems={"": str(error)})
        facts = Facts(str(sample["__key__"]), str(sample["__url__"]))
        try:
            self._fields(sample, facts)
        except BadSample as error:
            facts.problems[""] = str(error)
            return facts
        absent: dict[str, str] = {}
        for name, augmentation in self.augment.items():
            try:
                self._decode(name, augmentation, sample, facts)
            except BadSample as error:
                may_lack = isinstance(error, AbsentModality) and name in self.optional
                (absent if may_lack else facts.problems)[name] = str(error)
        if absent and len(absent) == len(self.augment):
            why = "; ".join(f"{name}: {error}" for name, error in absent.items())
            facts.problems[""] = f"it has no modality at all ({why})"
        else:
            facts.absent = tuple(absent)
        return facts

    def _fields(self, sample: Sample, facts: Facts) -> None:
        facts.fields = tuple(name for name in sample if not name.startswith("__"))
        if not facts.fields:
            if isinstance(sample, Unusable):
                sample["any field"]  # raises why
            raise BadSample("it has no field")
        facts.bytes = sum(len(value) for name in facts.fields if isinstance(value := sample[name], bytes))

    def _decode(self, name: str, augmentation: Augmentation, sample: Sample, facts: Facts) -> None:
        for item in augmentation.decode(sample):
            if isinstance(item, Image.Image):
                facts.sizes.setdefault(name, []).append(item.size)
            elif isinstance(item, str):
                tokens = int(self._tokenizer([item])[0].argmax()) + 1
                facts.texts.setdefault(name, []).append((len(item.split()), tokens))
        facts.measures[name] = augmentation.measure(sample)


@dataclass
class Bad:
    """A sample that cannot be used."""

    shard: str
    key: str
    modality: str
    reason: str


class Inspection:
    """Facts, summed."""

    def __init__(self, row: Row, modalities: Sequence[str]) -> None:
        self.row = row
        self.looked = self.bytes = 0
        self.fields: Counter[str] = Counter()
        self.sides = {name: (array("I"), array("I")) for name in modalities}  # widths, heights
        self.lengths = {name: (array("I"), array("I")) for name in modalities}  # words, tokens
        self.measures: dict[str, dict[str, array[float]]] = {name: {} for name in modalities}
        self.good = dict.fromkeys(modalities, 0)
        """Samples of which a modality can be used."""
        self.absences: Counter[str] = Counter()
        """Samples that lack a modality, as they may."""
        self.bad: list[Bad] = []
        self.usable = array("Q")
        """Positions of the samples that training can use."""
        self._bad_positions = array("Q")
        self._hashes = array("Q")
        self._positions = array("Q")

    def add(self, position: int, facts: Facts) -> None:
        """One sample more."""
        self.looked += 1
        self.bytes += facts.bytes
        self.fields.update(facts.fields)
        self.absences.update(facts.absent)
        self._hashes.append(stable_hash(self.row.sets[self.row.shard(position)], facts.key))
        self._positions.append(position)
        for name, sizes in facts.sizes.items():
            for size in sizes:
                for values, value in zip(self.sides[name], size, strict=True):
                    values.append(value)
        for name, lengths in facts.texts.items():
            for length in lengths:
                for values, value in zip(self.lengths[name], length, strict=True):
                    values.append(value)
        for name, measures in facts.measures.items():
            self.good[name] += 1
            for measure, number in measures.items():
                self.measures[name].setdefault(measure, array("d")).append(number)
        for name, reason in facts.problems.items():
            self.bad.append(Bad(facts.url, facts.key, name, reason))
            self._bad_positions.append(position)
        if not facts.problems:
            self.usable.append(position)

    def absent(self) -> list[str]:
        """Modalities that no sample has."""
        return [name for name, count in self.good.items() if not count]

    def forget(self, modality: str) -> None:
        """A modality that the data does not have is nobody's fault."""
        others = [i for i, bad in enumerate(self.bad) if bad.modality != modality]
        remaining = {self._bad_positions[i] for i in others}
        self.usable = array("Q", sorted({*self.usable, *(p for p in self._bad_positions if p not in remaining)}))
        self.bad = [self.bad[i] for i in others]
        self._bad_positions = array("Q", [self._bad_positions[i] for i in others])

    def report(self, title: str) -> dict[str, Any]:
        """All of it, as json."""
        return {
            "source": title,
            "samples": len(self.row),
            "looked_at": self.looked,
            "shards": len(self.row.shards),
            "sets": _by_set(self.row),
            "bytes_a_sample": round(self.bytes / max(1, self.looked)),
            "fields": dict(self.fields.most_common()),
            "pictures": {
                name: {"width": _spread(widths), "height": _spread(heights)}
                | {"shorter side": _spread(np.minimum(widths, heights), SIDES)}
                for name, (widths, heights) in self.sides.items()
                if widths
            },
            "texts": {
                name: {"words": _spread(words, WORDS), "tokens": _spread(tokens, TOKENS)}
                for name, (words, tokens) in self.lengths.items()
                if words
            },
            "measures": {name: self._measures(measures) for name, measures in self.measures.items() if measures},
            "absent": dict(self.absences),
            "lost_shards": self.row.lost,
            "bad": len(set(self._bad_positions)),
            "bad_by_reason": self._reasons(),
            "bad_samples": [vars(bad) for bad in self.bad],
            "repeated_keys": self._repeated(),
        }

    def _measures(self, measures: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        spreads = {name: _spread(values) for name, values in measures.items()}
        if {"captions", "sentences"} <= measures.keys():
            rate = np.asarray(measures["sentences"]) / np.maximum(1, np.asarray(measures["captions"]))
            spreads["sentences a caption"] = _spread(rate, SENTENCES)
        return spreads

    def _reasons(self) -> list[dict[str, Any]]:
        reasons: dict[tuple[str, str], list[Bad]] = {}
        for bad in self.bad:
            reasons.setdefault((bad.modality, grouped(bad.reason, bad.shard)), []).append(bad)
        return [
            {"modality": name, "reason": reason, "samples": len(bads), "first": vars(bads[0])}
            for (name, reason), bads in sorted(reasons.items(), key=lambda item: -len(item[1]))
        ]

    def _repeated(self) -> dict[str, Any]:
        """Keys that stand more than once in a set, by a hash of 63 bits."""
        hashes, counts = np.unique(np.asarray(self._hashes, np.uint64), return_counts=True)
        several = hashes[counts > 1]
        first = np.flatnonzero(np.isin(np.asarray(self._hashes, np.uint64), several[:5]))
        examples = []
        for i in first[:20]:
            sample = self.row.read(self._positions[int(i)])
            examples.append({"key": str(sample["__key__"]), "shard": str(sample["__url__"])})
        return {"keys": len(several), "samples": int(counts[counts > 1].sum()), "examples": examples}


def inspect(source: Named, samples: int | None, jobs: int) -> tuple[Inspection, dict[str, Augmentation]]:
    """Look at all samples, or at `samples` of them, evenly spread. Raises `DataError` where no shard can be read."""
    augment: dict[str, Augmentation]
    if source.recipe is not None:
        augment = {name: node.build() for name, node in source.recipe.augment.items()}
    else:
        augment = {"image": RandomCrop(RandomCrop.Config()), "text": WholeCaption(WholeCaption.Config())}
    row = Row(source.sets, Patience(retries=0), tolerant=True)
    positions = range(len(row))
    if samples is not None and samples < len(row):
        positions = [int(p) for p in np.unique(np.linspace(0, len(row) - 1, samples).round())]  # type: ignore[assignment]
    look = Look(row, augment, source.recipe.data.optional if source.recipe is not None else ())
    inspection = Inspection(row, list(augment))
    with progress_bar(len(positions), "looking at samples") as advance:
        for position, facts in zip(positions, in_order(look, positions, jobs), strict=True):
            inspection.add(position, facts)
            advance()
            if inspection.looked == ABSENT and source.recipe is None:
                for name in inspection.absent():
                    look.augment.pop(name, None)
                    inspection.forget(name)
    if source.recipe is None:
        for name in inspection.absent():
            augment.pop(name)
            inspection.forget(name)
    return inspection, augment


def _by_set(row: Row) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, length in zip(row.sets, row.lengths, strict=True):
        counts[name] += length
    return dict(counts)


def _spread(values: Any, edges: Sequence[int] | None = None) -> dict[str, Any]:
    """Least, median, mean, largest; with `edges` the counts of the bins between them, without empty ones at both ends:
    `from` inclusive, `to` exclusive, None for no bound."""
    numbers = np.asarray(values, dtype=np.float64)
    low, middle, high = (float(np.quantile(numbers, q)) for q in (0, 0.5, 1))
    spread: dict[str, Any] = {"min": low, "median": middle, "mean": round(float(numbers.mean()), 2), "max": high}
    if edges is not None:
        counts = np.histogram(numbers, [-np.inf, *edges, np.inf])[0]
        used = np.flatnonzero(counts)
        bounds = [None, *edges, None]
        spread["histogram"] = [
            {"from": bounds[i], "to": bounds[i + 1], "count": int(counts[i])} for i in range(used[0], used[-1] + 1)
        ]
    return spread
