"""The task `composition`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import takewhile
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distill_core import (
    DataError,
    EvaluationSet,
    Model,
    Plan,
    Sample,
    Score,
    Task,
    TaskConfig,
    mean_over_sets,
    raise_on_all_ranks,
)
from distill_tasks.retrieval import two_modalities

SCORES = ("text", "image", "group", "match")
Fields = Annotated[tuple[str, ...], Field(min_length=1)]


class CompositionConfig(TaskConfig):
    """What belongs together in a sample."""

    modalities: tuple[str, str] | None = None
    """That of the pictures, and that of the captions; null takes the recipe's first and second."""
    images: Fields = ("image_0", "image_1")
    """Fields of a sample that hold pictures; a set none of whose samples has the last ones has fewer, and a
    sample that lacks one of the others is skipped."""
    captions: Fields = ("caption_0", "caption_1")
    """Fields of its json that hold captions; the first belongs to the first picture, and so on. What is over on either
    side belongs to none."""
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Cosine above which a picture and a caption match, for SVO-Probes' published `match`; null for no such score."""


class Composition(Task):
    """Accuracies in percent; a tie, or a similarity that is not a number, counts against the model.

    `text`: each picture is nearer to its caption than to any other of its sample (SugarCrepe's accuracy, Winoground's
    text score). `image`: each caption is nearer to its picture than to any other (Winoground's image score, MMVP-VLM's
    accuracy of pairs; SVO-Probes by comparison). `group`: both (Thrush et al. 2022).
    """

    name = "composition"
    Config = CompositionConfig
    examples = ({}, {"threshold": 0.2})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config: CompositionConfig = config

    @classmethod
    def problems(cls, config: CompositionConfig, plan: Plan) -> Iterator[str]:
        """Two modalities that the recipe has."""
        yield from two_modalities(cls.name, config.modalities, plan)

    @classmethod
    def means(cls, config: CompositionConfig) -> tuple[str, ...]:
        """Those that the samples' pairs may define; `match` with a threshold alone."""
        return tuple(name for name in SCORES if name != "match" or config.threshold is not None)

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`text`, `image`, `group` and `match`, where they are defined, with their means over sets; `samples`.

        The headline is `group`, or the one of `text` and `image` that is defined.
        """
        scores = [score for samples in sets for score in self._scores(model, samples)]
        return [*scores, *mean_over_sets(scores, SCORES)]

    def note(self) -> str:
        """Unit, and what each score is."""
        return "percent; text: each picture is nearest to its own caption; image: each caption to its own picture"

    def _scores(self, model: Model, samples: EvaluationSet) -> list[Score]:
        pictures, words = self.config.modalities or model.modalities
        images, captions = raise_on_all_ranks(partial(self._present, samples))
        sides = [samples.embeddings(model, pictures, field) for field in images]
        sides += [samples.embeddings(model, words, field) for field in captions]
        for (_, owners), field in zip(sides, (*images, *captions), strict=True):
            if len(torch.unique(owners)) < len(owners):
                raise DataError(f"evaluation set {samples.name!r}: {field!r} holds several items in one sample")
        common = sides[0][1]
        for _, owners in sides[1:]:
            common = common[torch.isin(common, owners)]
        if not len(common):
            raise DataError(f"evaluation set {samples.name!r}: no sample with all of {', '.join((*images, *captions))}")
        common_embeddings = [embedded[torch.isin(owners, common)] for embedded, owners in sides]
        a, b = torch.stack(common_embeddings[: len(images)], 1), torch.stack(common_embeddings[len(images) :], 1)
        similarity = a @ b.mT  # [N, images, captions]
        scores = [Score(samples.name, "samples", float(len(common)), "samples", None)]
        hits = accuracies(similarity)
        for name, hit in hits.items():
            headline = name == "group" or len(hits) == 1
            scores.append(Score(samples.name, name, 100 * hit.double().mean().item(), headline=headline))
        if self.config.threshold is not None:
            pairs = raise_on_all_ranks(partial(self._pairs, samples, images, captions, set(common.tolist())))
            match = 100 * matched(similarity, pairs, self.config.threshold)
            scores.append(Score(samples.name, "match", match))
        return scores

    def _present(self, samples: EvaluationSet) -> tuple[Sequence[str], Sequence[str]]:
        """The fields that some sample has, up to the first that none has: field i stays one of pair i. Samples that
        lack one of them are left out. Raises `DataError` where nothing can be told apart."""  # fmt: skip
        known_keys: set[str] = set()
        empty = True
        for sample in samples:
            empty = False
            known_keys |= {field for field in self.config.images if field in sample}
            known_keys |= {field for field in self.config.captions if field in _record(sample)}
            if known_keys.issuperset((*self.config.images, *self.config.captions)):
                break
        if empty:
            raise DataError(f"evaluation set {samples.name!r}: no sample")
        images = list(takewhile(known_keys.__contains__, self.config.images))
        captions = list(takewhile(known_keys.__contains__, self.config.captions))
        if not images or not captions or len(images) + len(captions) < 3:
            raise DataError(
                f"evaluation set {samples.name!r}: nothing to tell apart: its samples have the pictures "
                f"{', '.join(images) or '(none)'} and the captions {', '.join(captions) or '(none)'}"
            )
        return images, captions

    def _pairs(
        self, samples: EvaluationSet, images: Sequence[str], captions: Sequence[str], numbers: set[int]
    ) -> list[list[list[bytes]]]:
        """What each (picture, caption) of the kept samples is, by their contents: pairs that come again are one."""

        def mark(data: Any) -> bytes:
            return blake2b(data if isinstance(data, bytes) else str(data).encode(), digest_size=16).digest()

        pairs = []
        for i, sample in enumerate(samples):
            if i in numbers:
                ours = [mark(_record(sample)[field]) for field in captions]
                pairs.append([[mark(sample[field]) + own for own in ours] for field in images])
        return pairs


def accuracies(similarity: Tensor) -> dict[str, Tensor]:
    """`text`, `image` and `group`, [N] bool each where it is defined, of similarities [N, images, captions].

    Picture i and caption i belong together; `text` needs two captions, `image` two pictures, `group` both.
    """
    own = torch.arange(min(similarity.shape[1:]))
    own_scores = similarity[:, own, own]  # [N, pairs]
    others = torch.eye(*similarity.shape[1:], dtype=torch.bool)
    rest = similarity.masked_fill(others, -torch.inf)
    hits = {}
    if similarity.shape[2] > 1:
        hits["text"] = (own_scores[..., None] > rest[:, own]).all(2).all(1)
    if similarity.shape[1] > 1:
        hits["image"] = (own_scores[:, None] > rest[:, :, own]).all(1).all(1)
    if len(hits) == 2:
        hits["group"] = hits["text"] & hits["image"]
    return hits


def matched(similarity: Tensor, pairs: Sequence[Sequence[Sequence[bytes]]], threshold: float) -> float:
    """The mean of two accuracies: of pairs that belong together (above the threshold) and of the others (not above it).

    Similarities [N, images, captions], and what each is: one that comes again counts once (SVO-Probes' notebook).
    """
    right: dict[bool, dict[bytes, bool]] = {True: {}, False: {}}
    for row, names in zip(similarity.tolist(), pairs, strict=True):
        for i, of_image in enumerate(names):
            for j, name in enumerate(of_image):
                together = i == j
                right[together][name] = row[i][j] > threshold if together else row[i][j] <= threshold
    return sum(sum(hits.values()) / len(hits) for hits in right.values()) / 2


def _record(sample: Sample) -> dict[str, Any]:
    try:
        record = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
