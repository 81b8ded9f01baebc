"""Probes of frozen features: a weighted kNN and a linear classifier, both learned from labelled samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from distill_core import (
    DataError,
    EvaluationSet,
    FeatureKind,
    Model,
    Needs,
    Plan,
    Score,
    TaskConfig,
    counted,
    mean_over_sets,
    raise_on_all_ranks,
)
from distill_tasks.classes import (
    ACCURACIES,
    ClassificationTask,
    accuracies,
    accuracy_scores,
    chance,
    ranks_of_class,
)
from distill_tasks.logistic import choose_c, fit, logits

Positive = Annotated[int, Field(gt=0)]


class ProbeConfig(TaskConfig):
    """Options of both probes."""

    modality: str | None = None
    """The modality whose features are classified; null takes the recipe's first."""
    features: FeatureKind | None = None
    """`embedding`, as the other tasks compare it; `class_token`, what the backbone projects it from (of texts their
    end), which published linear probes read; or `mean_token`, the mean of the tokens (I-JEPA, data2vec). null takes the
    embedding, or the class token where no loss of the recipe trains the embedding (DINO, iBOT)."""
    label: str = "class"
    """Field of the sample, or of its json, that names its class."""
    learn: str | None = "train"
    """The split of the same data to learn from, all its sets together; null splits each scored set into `folds`, and
    classifies each fold by a probe that learned from the others."""
    folds: Annotated[int, Field(gt=1)] = 5
    """Number of parts of a scored set if `learn` is null, stratified by class."""
    shots: Positive | None = None
    """Few-shot: learn from this many random samples per class; null learns from all."""
    draws: Positive = 3
    """Random draws that few-shot scores are averaged over."""


@dataclass(frozen=True)
class TrainSet:
    """Features [N, D] of items to learn from, their class numbers [N], and their samples' numbers [N]."""

    x: Tensor
    y: Tensor
    owners: Tensor


@dataclass(frozen=True)
class Labelled:
    """Features [N, D] of items, their N classes, and their samples' numbers [N]: a sample may have several items."""

    features: Tensor
    classes: Sequence[str]
    owners: Tensor


class Probe(ClassificationTask):
    """Base of both probes: gathers labelled features, and scores the predictions of `predict`."""

    Config = ProbeConfig

    @classmethod
    def needs(cls, config: ProbeConfig, plan: Plan) -> Needs:
        """The student of the classified modality."""
        modality = config.modality or next(iter(plan.modalities), None)
        return Needs(student=(modality,) if modality is not None else ())

    @classmethod
    def problems(cls, config: ProbeConfig, plan: Plan) -> Iterator[str]:
        """The backbone lacks the requested features."""
        modality = config.modality or next(iter(plan.modalities), None)
        if modality is None:  # the plan is not complete
            return
        class_tokens = plan.modalities[modality].spec.class_tokens
        if config.features == "class_token" and not class_tokens:
            yield f"'features: class_token': the backbone of {modality!r} gives none; use 'embedding'"
        if config.features == "mean_token" and not plan.modalities[modality].spec.has_tokens:
            yield f"'features: mean_token': the backbone of {modality!r} gives no tokens; use 'embedding'"

    @classmethod
    def reads(cls, config: ProbeConfig) -> tuple[str, ...]:
        """The split to learn from."""
        return (config.learn,) if config.learn is not None else ()

    watch: Callable[[Sequence[float]], Iterable[float]] = staticmethod(iter)
    """Reports the steps of `predict` to a progress bar."""

    @abstractmethod
    def predict(self, train: TrainSet, classes: int, features: Tensor, device: torch.device) -> Tensor:
        """Scores [M, C] of features [M, D]."""

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`top1`, `top5` (of more than 5 classes) and `mean_per_class`, with their means over sets; `learned_from`.

        With `shots`, means over draws; `top1_std` is the spread among them. Warns of scored samples that the
        probe learns from, and of classes with fewer samples than `shots`.
        """
        config: ProbeConfig = self.config
        modality = config.modality or model.modalities[0]
        self._features = config.features or model.default_features(modality)
        train_sets = sets[0].of_split(config.learn) if config.learn is not None else []
        train_items = self._labelled(model, train_sets, modality) if config.learn is not None else None
        scored_items = [self._labelled(model, [samples], modality) for samples in sets]
        self._classes = sorted(
            {label for part in (train_items, *scored_items) if part is not None for label in part.classes}
        )
        train_identities = {identity for samples in train_sets for identity in samples.identities.values()}
        scores: list[Score] = []
        self._predictions = {}
        for samples, items in zip(sets, scored_items, strict=True):
            self._warn_of_overlap(samples, train_identities)
            self.watch = partial(samples.watch, what=f"fits for {samples.name}")
            self._fewest = len(items.classes) + (len(train_items.classes) if train_items is not None else 0)
            truth = self._numbers(items.classes)
            results, learned_from = [], []
            for draw in range(config.draws if config.shots else 1):
                ranks, predictions, counts = torch.empty_like(truth), torch.empty_like(truth), []
                for train, part in self._parts(items, truth, train_items, draw):
                    predicted = self.predict(train, len(self._classes), items.features[part], model.device)
                    ranks[part], predictions[part] = ranks_of_class(predicted, truth[part]), predicted.argmax(1)
                    counts.append(len(torch.unique(train.owners)))
                results.append(accuracies(ranks, truth, len(self._classes)))
                learned_from.append(sum(counts) / len(counts))
                self._predictions.setdefault(samples.name, (truth, predictions))  # the first draw's
            if config.shots is not None and self._fewest < config.shots:
                fewest = f"the smallest class has {counted(self._fewest, 'sample')} to learn from"
                samples.warn(f"{self.name!r}: `shots: {config.shots}`, but {fewest}; such classes use all they have")
            averages = {score: sum(result[score] for result in results) / len(results) for score in results[0]}
            scores += accuracy_scores(samples.name, averages)
            if len(results) > 1:
                spread = torch.tensor([result["top1"] for result in results], dtype=torch.float64).std().item()
                scores.append(Score(samples.name, "top1_std", spread, higher_is_better=None))
            size = sum(learned_from) / len(learned_from)
            scores.append(Score(samples.name, "learned_from", size, "samples", None))
        return [*scores, *mean_over_sets(scores, ACCURACIES)]

    def note(self) -> str:
        """Unit, classes and chance level; the draws of few-shot; the features, if the recipe leaves them open."""
        draws = f"; means of {counted(self.config.draws, 'draw')}" if self.config.shots else ""
        chosen = self.config.features is None and self._features == "class_token"
        read = "; on class tokens, since no loss trains the embedding" if chosen else ""
        return f"percent; {chance(len(self._classes))}{draws}{read}"

    def _warn_of_overlap(self, samples: EvaluationSet, train_identities: Collection[tuple[str, str]]) -> None:
        overlap = sum(identity in train_identities for identity in samples.identities.values())
        if overlap:
            scored = counted(len(samples.identities), "scored sample")
            samples.warn(
                f"evaluation set {samples.name!r}: {overlap} of {scored} are in the split {self.config.learn!r} too, "
                "which the probe learns from: such a score says nothing about new samples"
            )

    def _labelled(self, model: Model, sets: Sequence[EvaluationSet], modality: str) -> Labelled:
        """The items of the sets' labelled samples."""
        parts, classes, owner_parts, offset = [], [], [], 0
        for samples in sets:
            labels = raise_on_all_ranks(partial(samples.labels, self.config.label))
            embedded, owners = samples.embeddings(model, modality, features=self._features)
            is_labelled = torch.isin(owners, torch.tensor(list(labels), dtype=torch.long))
            parts.append(embedded[is_labelled])
            classes += [labels[i] for i in owners[is_labelled].tolist()]
            owner_parts.append(owners[is_labelled] + offset)
            offset = (
                int(owner_parts[-1].max()) + 1 if len(owner_parts[-1]) else offset
            )  # so that sample numbers of different sets differ
        if not classes:
            names = ", ".join(repr(samples.name) for samples in sets)
            raise DataError(f"evaluation set {names}: no sample with {modality} and {self.config.label!r}")
        return Labelled(torch.cat(parts), classes, torch.cat(owner_parts))

    def _numbers(self, labels: Sequence[str]) -> Tensor:
        place = {label: i for i, label in enumerate(self._classes)}
        return torch.tensor([place[label] for label in labels])

    def _parts(
        self, scored: Labelled, truth: Tensor, train_items: Labelled | None, draw: int
    ) -> Iterator[tuple[TrainSet, Tensor]]:
        """What to learn from, and the indices of the items to classify.

        All items of a sample are on the same side: either learned from or classified.
        """
        if train_items is not None:
            y = self._numbers(train_items.classes)
            shots = self._shots(y, train_items.owners, draw)
            yield TrainSet(train_items.features[shots], y[shots], train_items.owners[shots]), torch.arange(len(truth))
            return
        owner, of_owner = _by_owner(truth, scored.owners)
        folds = torch.empty_like(of_owner)
        folds[by_class(of_owner, seed=0)] = torch.arange(len(of_owner)) % self.config.folds
        fold = folds[owner]
        for i in range(self.config.folds):
            part, rest = (fold == i).nonzero()[:, 0], (fold != i).nonzero()[:, 0]
            if not len(part):
                continue
            if not len(rest):
                raise DataError(f"{self.name!r} with `learn: null` needs at least two labelled samples")
            rest = rest[self._shots(truth[rest], scored.owners[rest], draw)]
            yield TrainSet(scored.features[rest], truth[rest], scored.owners[rest]), part

    def _shots(self, y: Tensor, owners: Tensor, draw: int) -> Tensor:
        """Indices of the items of `shots` samples per class; of all items without `shots`."""
        if self.config.shots is None:
            return torch.arange(len(y))
        owner, of_owner = _by_owner(y, owners)
        self._fewest = min(self._fewest, int(torch.bincount(of_owner)[of_owner].min()))
        chosen: Tensor = ranks_within_class(of_owner, seed=draw)[owner] < self.config.shots
        return chosen.nonzero()[:, 0]


def _by_owner(y: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Each item's index [N] into the M distinct samples, and these samples' classes [M]."""
    samples, place = torch.unique(owners, return_inverse=True)
    of_owner = y.new_empty(len(samples))
    of_owner[place] = y  # a sample has one class
    return place, of_owner


def by_class(y: Tensor, seed: int) -> Tensor:
    """Indices of the samples sorted by class, in random order within each class: classes [N] -> [N]."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return order[torch.argsort(y[order], stable=True)]


def ranks_within_class(y: Tensor, seed: int) -> Tensor:
    """Each sample's rank (from 0) in a random order of its class: classes [N] -> [N]."""
    order = by_class(y, seed)
    first = torch.searchsorted(y[order].contiguous(), y[order].contiguous())
    result = torch.empty_like(y)
    result[order] = torch.arange(len(y)) - first
    return result


class KnnConfig(ProbeConfig):
    """Options of the kNN probe."""

    k: Positive = 20
    """Number of neighbours that vote; all samples if there are fewer."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """A neighbour's vote weighs exp(cosine / temperature)."""


class Knn(Probe):
    """Weighted kNN classification of frozen features (Wu et al. 2018, section 3.4), accuracies in percent."""

    name = "knn"
    Config = KnnConfig
    examples = ({"label": "number", "learn": None},)

    def predict(self, train: TrainSet, classes: int, features: Tensor, device: torch.device) -> Tensor:
        """The votes for each class."""
        x, y = train.x.to(device), train.y.to(device)
        parts = []
        for chunk in torch.split(features, 1024):
            cosine, nearest = (chunk.to(device) @ x.T).topk(min(self.config.k, len(x)))
            # relative to the nearest: no overflow, and no vote of 0 for all
            weight = ((cosine - cosine[:, :1]) / self.config.temperature).exp()
            votes = torch.zeros(len(chunk), classes, device=device)
            parts.append(votes.scatter_add_(1, y[nearest], weight).cpu())
        return torch.cat(parts)


class LinearConfig(ProbeConfig):
    """Options of the linear probe."""

    cs: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
    """Inverse strengths of the L2 penalty to choose from (scikit-learn's C), by accuracy on a fifth of each class's
    samples, held out of what is learned from; the middle one where nothing can be held out (one shot)."""
    iterations: Positive = 300
    """The most iterations of L-BFGS."""


class LinearProbe(Probe):
    """Multinomial logistic regression on frozen, L2-normalised features, by L-BFGS; accuracies in percent.

    With `features: class_token` as in Radford et al. 2021, appendix A.3, but for the normalisation.
    """

    name = "linear_probe"
    Config = LinearConfig
    examples = ({"label": "number", "learn": None},)

    def predict(self, train: TrainSet, classes: int, features: Tensor, device: torch.device) -> Tensor:
        """Log-probabilities; -inf for classes without training samples. Raises `DataError` for training features that
        are not finite."""
        if not train.x.isfinite().all():
            raise DataError(f"{self.name!r}: training features are not finite (NaN or infinite): has the run diverged?")
        classes_present, y = torch.unique(train.y, return_inverse=True)
        owner, of_owner = _by_owner(y, train.owners)
        counts, turn = torch.bincount(of_owner)[of_owner], ranks_within_class(of_owner, seed=0)
        held_out = ((counts > 1) & (turn % 5 == counts.clamp(max=5) - 1))[owner]  # a sample's items together
        x, y, held_out = train.x.to(device), y.to(device), held_out.to(device)
        c = choose_c(x, y, held_out, self.config.cs, self.config.iterations, self.watch)
        weights = fit(x, y, c, self.config.iterations)
        log_probabilities = torch.full((len(features), classes), -torch.inf)
        log_probabilities[:, classes_present] = logits(features.to(device), weights).log_softmax(1).cpu()
        return log_probabilities
