"""Pictures of a retrieval: the nearest targets of a few queries, and the similarities of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from distill_core import BadSample, Distribution, EvaluationSet, Model, Picture, Rendered, Sample
from distill_core.tools import sheet, words

NEAREST = 5
MOST = 2048
"""Items per side whose similarities are computed: all pairs of more would take gigabytes."""
VALUES = 50_000
"""Similarities per kind of pair in a distribution."""


def similarities(
    model: Model, samples: EvaluationSet, pair: tuple[str, ...], fields: Mapping[str, str]
) -> Iterator[Distribution]:
    """Cosines of positive pairs (two items of one sample) and of negative ones, of up to `MOST` items a side."""
    (a, of_a), (b, of_b) = (_spread(*samples.embeddings(model, m, fields.get(m))) for m in pair)
    cosine, is_pair = a @ b.T, of_a[:, None] == of_b[None]
    for pairs, values in (("positive", cosine[is_pair]), ("negative", cosine[~is_pair])):
        sampled = values[:: len(values) // VALUES + 1]
        if len(sampled):
            yield Distribution("similarity", sampled.numpy(), {"set": samples.name, "pairs": pairs})


def _spread(embedded: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    stride = (len(of) - 1) // MOST + 1
    return embedded[::stride], of[::stride]


def nearest(
    model: Model, samples: EvaluationSet, query: str, target: str, fields: Mapping[str, str], count: int
) -> Iterator[Picture]:
    """A sheet for each of `count` evenly spaced queries: the query and its nearest targets; `+` marks correct ones."""
    queries, of_query = samples.embeddings(model, query, fields.get(query))
    targets, of_target = samples.embeddings(model, target, fields.get(target))
    count = min(count, len(queries))
    if not count or not len(targets):
        return
    query_items = torch.linspace(0, len(queries) - 1, count).long()  # all different: count <= len(queries)
    cosine, best = (queries[query_items] @ targets.T).topk(min(NEAREST, len(targets)))
    numbers = {*of_query[query_items].tolist(), *of_target[best].flatten().tolist()}
    raw = samples.samples(sorted(numbers))

    def render(modality: str, item: int, of: Tensor) -> Rendered:
        place = int((of[:item] == of[item]).sum())  # its index among the items of its sample
        return _render(model, raw[int(of[item])], modality, fields.get(modality), place)

    for i, item in enumerate(query_items.tolist()):
        number = int(of_query[item])
        marks = [
            f"{value:.2f}{' +' if int(of_target[j]) == number else ''}"
            for value, j in zip(cosine[i].tolist(), best[i].tolist(), strict=True)
        ]
        targets_shown = [render(target, j, of_target) for j in best[i].tolist()]
        targets_shown = [
            f"{mark}  {x}" if isinstance(x, str) else x for mark, x in zip(marks, targets_shown, strict=True)
        ]
        query_shown = render(query, item, of_query)
        rows = {f"{query}": [query_shown], f"nearest {target}: {', '.join(marks)}": targets_shown}
        rows = {label: [x for x in items if x is not None] for label, items in rows.items()}
        key = str(raw[number]["__key__"])
        context = {"set": samples.name, "sample": key}
        yield Picture(f"{query}_to_{target}", sheet(list(rows.items())), words(key, rows), context)


def _render(model: Model, sample: Sample, modality: str, field: str | None, place: int) -> Rendered:
    augmentation = model.augment[modality]
    try:
        return augmentation.render(augmentation.eval_view(augmentation.decode(sample, field)[place]))
    except BadSample:  # it was read before, when it was embedded
        return None
