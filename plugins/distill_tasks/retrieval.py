"""Zero-shot retrieval between two modalities, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distill_core import (
    DataError,
    EvaluationSet,
    Media,
    MissingModality,
    Model,
    Plan,
    Score,
    Task,
    TaskConfig,
    did_you_mean,
    mean_over_sets,
)
from distill_tasks import matches


class RetrievalConfig(TaskConfig):
    """Options of `retrieval`."""

    modalities: tuple[str, str] | None = None
    """The two sides; null takes the recipe's two."""
    fields: dict[str, str] = {}  # noqa: RUF012
    """Read a modality from another field of the sample than training does, as {NAME: FIELD}."""
    ks: tuple[Annotated[int, Field(gt=0)], ...] = (1, 5, 10)
    """The k of each R@k."""


@dataclass(frozen=True)
class Compared:
    """The items of both sides of a set, without those whose sample has none on the other side."""

    owners: Mapping[str, Tensor]
    """Modality -> the samples' numbers of its items, [N]."""
    rows: Callable[[str, slice], Tensor]
    """(modality of the queries, a chunk of n of them) -> their similarities with all M items of the other side, [n, M].
    """


class Retrieval(Task):
    """R@k in percent: a query counts if a target of its sample is among the k nearest; `M` is the mean of R@1 and R@5,
    both directions; the median rank counts from 1. Ties count against the model. A sample may have several items on a
    side (several captions of an image).
    """

    name = "retrieval"
    Config = RetrievalConfig

    @classmethod
    def problems(cls, config: RetrievalConfig, plan: Plan) -> Iterator[str]:
        """The recipe lacks a modality, or has too many to choose from."""
        yield from two_modalities(cls.name, config.modalities, plan)
        for name in config.fields:
            if name not in plan.modalities:
                yield f"{cls.name!r}: fields: no modality {name!r}{did_you_mean(name, list(plan.modalities))}"

    @classmethod
    def means(cls, config: RetrievalConfig) -> tuple[str, ...]:
        """`R@k` of both directions, and `M`."""
        return (*(f"R@{k}" for k in config.ks), "M")

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`A_to_B/R@k`, `A_to_B/median_rank`, `candidates` and `M`; over sets `R@k` (of both directions) and `M`."""
        a, b = self.config.modalities or model.modalities
        scores: list[Score] = []
        chances: list[float] = []
        of_k: dict[int, list[float]] = {k: [] for k in self.config.ks}
        self._candidates: set[int] = set()
        for samples in sets:
            name = samples.name
            compared = self.compared(model, samples)
            owners = compared.owners
            if not len(owners[a]):
                raise DataError(f"evaluation set {name!r}: no sample with both {a} and {b}")
            recalls = []
            for query, target in ((a, b), (b, a)):
                ranks = ranks_in(partial(compared.rows, query), owners[query], owners[target])
                matches_per_query = torch.bincount(owners[target])[owners[query]].double().mean().item()
                chances.append(100 * matches_per_query / len(owners[target]))
                self._candidates.add(len(owners[target]))
                for k in sorted({*self.config.ks, 1, 5}):
                    recall = 100 * (ranks < k).double().mean().item()
                    if k in (1, 5):
                        recalls.append(recall)
                    if k in self.config.ks:
                        of_k[k].append(recall)
                        scores.append(Score(name, f"{query}_to_{target}/R@{k}", recall))
                median = 1 + ranks.double().quantile(0.5).item()
                scores.append(Score(name, f"{query}_to_{target}/median_rank", median, "rank", higher_is_better=False))
            scores.append(Score(name, "candidates", float(len(owners[b])), "candidates", None))
            scores.append(Score(name, "M", sum(recalls) / len(recalls), headline=True))
        self._chance = sum(chances) / len(chances)
        over_sets = [Score(None, f"R@{k}", sum(recalls) / len(recalls)) for k, recalls in of_k.items()]
        return [*scores, *over_sets, *mean_over_sets(scores, ("M",))]

    def compared(self, model: Model, samples: EvaluationSet) -> Compared:
        """By the cosines of the towers' own embeddings. Every rank must call this."""
        a, b = self.config.modalities or model.modalities
        embedded, owners = {}, {}
        for modality in (a, b):
            embedded[modality], owners[modality] = samples.embeddings(model, modality, self.config.fields.get(modality))
        for modality, other in ((a, b), (b, a)):
            paired = torch.isin(owners[modality], owners[other])
            embedded[modality], owners[modality] = embedded[modality][paired], owners[modality][paired]
        others = {a: b, b: a}
        return Compared(owners, lambda query, rows: embedded[query][rows] @ embedded[others[query]].T)

    def note(self) -> str:
        """Unit, candidates, chance, and what `M` is."""
        candidates = " to ".join(map(str, sorted({min(self._candidates), max(self._candidates)})))
        chance = f"{candidates} candidates, chance R@1 {self._chance:.3g}"
        return f"percent, both directions; {chance}; M: mean of R@1 and R@5"

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Media]:
        """The five nearest targets of a few queries, and the similarities of matching and other pairs."""
        pair = self.config.modalities or model.modalities
        for i, evaluation_set in enumerate(sets):
            share = samples // len(sets) + (i < samples % len(sets))
            yield from matches.similarities(model, evaluation_set, pair, self.config.fields)
            for query, target in (pair, pair[::-1]):
                yield from matches.nearest(model, evaluation_set, query, target, self.config.fields, share)


def ranks_in(rows: Callable[[slice], Tensor], query_of: Tensor, target_of: Tensor, chunk: int = 1024) -> Tensor:
    """The rank (0 is best) of each query's best own target: owners [N] of queries and [M] of targets -> [N].

    `rows`: a chunk of n queries -> their similarities with all targets, [n, M].

    Another sample's target that is as near as the best own one ranks before it, and so does every target if a
    similarity is NaN.
    """
    by_owner = torch.argsort(target_of)
    owners = target_of[by_owner]
    first = torch.searchsorted(owners, query_of)
    counts = torch.searchsorted(owners, query_of, right=True) - first
    ranks = []
    for start in range(0, len(query_of), chunk):
        similarity = rows(slice(start, start + chunk))
        count = counts[start : start + chunk]
        # the own targets of the chunk's queries, concatenated: the query of each, and its similarity
        row = torch.arange(len(similarity)).repeat_interleave(count)
        nth = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        own = similarity[row, by_owner[first[start : start + chunk][row] + nth]]
        best = similarity.new_full((len(similarity),), -torch.inf).scatter_reduce(0, row, own, "amax")
        below = (similarity < best[:, None]).count_nonzero(1)
        own_below = torch.zeros_like(count).scatter_add(0, row, (own < best[row]).long())
        ranks.append((len(target_of) - below) - (count - own_below))
    return torch.cat(ranks)


def two_modalities(name: str, modalities: tuple[str, str] | None, plan: Plan) -> Iterator[str]:
    """Problems with a task's choice of two modalities."""
    for modality in modalities or ():
        if modality not in plan.modalities:
            raise MissingModality(modality)
    single = [modality for modality, known in plan.modalities.items() if not known.parts]
    if modalities is None and len(single) > 2:
        yield f"{name!r} needs `modalities`: the recipe has {', '.join(plan.modalities)}"
    if modalities is None and len(single) == 1 and plan.complete:
        yield f"{name!r} compares two modalities; the recipe has {single[0]!r} alone"
    if modalities is not None and modalities[0] == modalities[1]:
        yield f"{name!r} compares two modalities; `modalities` names {modalities[0]!r} twice"
