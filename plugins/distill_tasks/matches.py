"""What a retrieval looks like: the nearest targets of a few queries, and how similar pairs are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from distill_core import BadSample, Distribution, EvaluationSet, Model, Picture, Rendered, Sample
from distill_core.tools import sheet, words

NEAREST = 5
MOST = 2048
"""Items a side whose similarities are looked at: all pairs of more would be a matter of gigabytes."""
VALUES = 50_000
"""Similarities of a kind that are kept."""


def similarities(
    model: Model, samples: EvaluationSet, pair: tuple[str, ...], fields: Mapping[str, str]
) -> Iterator[Distribution]:
    """Cosines of positive pairs (two items of one sample) and of negative ones, of up to `MOST` items a side."""
    (a, of_a), (b, of_b) = (_spread(*samples.embeddings(model, m, fields.get(m))) for m in pair)
    cosine, own = a @ b.T, of_a[:, None] == of_b[None]
    for pairs, values in (("positive", cosine[own]), ("negative", cosine[~own])):
        kept = values[:: len(values) // VALUES + 1]
        if len(kept):
            yield Distribution("similarity", kept.numpy(), {"set": samples.name, "pairs": pairs})


def _spread(embedded: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    stride = (len(of) - 1) // MOST + 1
    return embedded[::stride], of[::stride]


def nearest(
    model: Model, samples: EvaluationSet, query: str, target: str, fields: Mapping[str, str], count: int
) -> Iterator[Picture]:
    """A sheet for each of `count` queries, evenly spread: the query, its nearest targets; `+` marks its own."""
    queries, of_query = samples.embeddings(model, query, fields.get(query))
    targets, of_target = samples.embeddings(model, target, fields.get(target))
    count = min(count, len(queries))
    if not count or not len(targets):
        return
    chosen = torch.linspace(0, len(queries) - 1, count).long()  # all different: count <= len(queries)
    cosine, best = (queries[chosen] @ targets.T).topk(min(NEAREST, len(targets)))
    wanted = {*of_query[chosen].tolist(), *of_target[best].flatten().tolist()}
    raw = samples.samples(sorted(wanted))

    def shown(modality: str, item: int, of: Tensor) -> Rendered:
        place = int((of[:item] == of[item]).sum())  # which of its sample's items
        return _shown(model, raw[int(of[item])], modality, fields.get(modality), place)

    for i, item in enumerate(chosen.tolist()):
        own = int(of_query[item])
        marks = [
            f"{value:.2f}{' +' if int(of_target[j]) == own else ''}"
            for value, j in zip(cosine[i].tolist(), best[i].tolist(), strict=True)
        ]
        found = [shown(target, j, of_target) for j in best[i].tolist()]
        found = [f"{mark}  {x}" if isinstance(x, str) else x for mark, x in zip(marks, found, strict=True)]
        asked = shown(query, item, of_query)
        rows = {f"{query}": [asked], f"nearest {target}: {', '.join(marks)}": found}
        rows = {label: [x for x in items if x is not None] for label, items in rows.items()}
        key = str(raw[own]["__key__"])
        context = {"set": samples.name, "sample": key}
        yield Picture(f"{query}_to_{target}", sheet(list(rows.items())), words(key, rows), context)


def _shown(model: Model, sample: Sample, modality: str, field: str | None, place: int) -> Rendered:
    augmentation = model.augment[modality]
    try:
        return augmentation.render(augmentation.eval_view(augmentation.decode(sample, field)[place]))
    except BadSample:  # it was read before, when it was embedded
        return None
