"""Attention during training: its entropy as scores, and maps of a few samples, for a tracker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, permutations
from typing import Annotated

from pydantic import Field

from distill_core import (
    BadSample,
    DataError,
    EvaluationSet,
    Media,
    Model,
    Picture,
    Plan,
    Sample,
    Score,
    Task,
    TaskConfig,
    UserError,
    View,
    did_you_mean,
)
from distill_core.tools import words
from distill_explore.attention import ViewedItem, class_readings, cross, readings, see
from distill_explore.drawing import figure, rows_of


class AttentionMapsConfig(TaskConfig):
    """Options of `attention_maps`."""

    modalities: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The modalities that read each other; null takes all."""
    samples: Annotated[int, Field(gt=0)] = 32
    """Number of samples of each set, its first, that scores are averaged over."""


class AttentionMaps(Task):
    """Entropy of attention weights in nats: 0 if one token is read, ln L if all are read equally. Neither direction is
    better: it shows when attention becomes selective, and when it collapses. Its media are maps of a few samples.

    Of the fusion (`text_to_image`: texts read pictures; the student's alone, a teacher has none) and of the class token
    in each backbone's last block, of those that tell their weights.
    """

    name = "attention_maps"
    Config = AttentionMapsConfig

    @classmethod
    def problems(cls, config: AttentionMapsConfig, plan: Plan) -> Iterator[str]:
        """The recipe lacks a modality."""
        for name in config.modalities or ():
            if name not in plan.modalities:
                yield f"{cls.name!r}: modalities: no modality {name!r}{did_you_mean(name, list(plan.modalities))}"

    @classmethod
    def means(cls, config: AttentionMapsConfig) -> tuple[str, ...]:
        """No mean: entropies are of one set each."""
        return ()

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`A_to_B/entropy` and `A/class_entropy` in nats, means over samples and heads; none over sets.

        Raises `DataError` for a set without a readable sample, `UserError` where all of the student is silent.
        """
        scores: list[Score] = []
        for samples in sets:
            entropies: dict[str, list[float]] = defaultdict(list)
            for _, items_of in self._batches(model, samples, self.config.samples):
                for a, b in permutations(items_of, 2):
                    entropies[f"{a}_to_{b}/entropy"] += [
                        reading.entropy for reading in cross(model, items_of[a], items_of[b])
                    ]
                for name, items in items_of.items():
                    entropies[f"{name}/class_entropy"] += [reading.entropy for reading in class_readings(items)]
            for name, values in entropies.items():
                if values:
                    scores.append(Score(samples.name, name, sum(values) / len(values), "nats", None))
        if not scores and not model.teacher:  # a teacher has no fusion, so the student may have more to tell
            raise UserError(
                "no attention to score: no backbone has a `class_attention`, and "
                + (
                    "there is no fusion"
                    if model.fusion is None
                    else f"the fusion {model.fusion.name!r} no `attention` of them"
                )
            )
        return scores

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Media]:
        """The maps of a few samples, a page each."""
        for i, evaluation_set in enumerate(sets):
            share = samples // len(sets) + (i < samples % len(sets))
            if not share:
                continue
            for keys, items_of in self._batches(model, evaluation_set, share):
                for key, *items in zip(keys, *items_of.values(), strict=True):
                    if rows := rows_of(readings(model, items), items):
                        texts = {item.modality: [item.rendered] for item in items}
                        context = {"set": evaluation_set.name, "sample": key}
                        yield Picture("maps", figure(rows, items), words(key, texts), context)

    def _batches(
        self, model: Model, samples: EvaluationSet, count: int
    ) -> Iterator[tuple[list[str], dict[str, list[ViewedItem]]]]:
        """Keys and, by modality, the first item of each, of the first `count` samples that have all."""
        names = self.config.modalities or model.modalities
        keys: list[str] = []
        views: list[list[View]] = []
        for key, sample_views in islice(_usable(model, samples, names), count):
            keys.append(key)
            views.append(sample_views)
        if not keys:
            raise DataError(f"evaluation set {samples.name!r}: no sample with {' and '.join(names)} to look at")
        for start in range(0, len(keys), model.batch_size):
            part = slice(start, start + model.batch_size)
            columns = zip(*views[part], strict=True)
            yield keys[part], {m: see(model, m, column) for m, column in zip(names, columns, strict=True)}


def _usable(model: Model, samples: Iterable[Sample], modalities: Sequence[str]) -> Iterator[tuple[str, list[View]]]:
    """(key, a view of each modality) of the samples that can be read."""
    for sample in samples:
        try:
            items = [(model.augment[m], model.augment[m].decode(sample)) for m in modalities]
            yield str(sample["__key__"]), [augmentation.eval_view(decoded[0]) for augmentation, decoded in items]
        except BadSample:  # scoring reports it
            continue
