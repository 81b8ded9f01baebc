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
    Media,
    Model,
    Needs,
    Plan,
    Score,
    Task,
    TaskConfig,
    counted,
    mean_over_sets,
    raise_on_all_ranks,
)
from distill_tasks.classes import (
    ACCURACIES,
    accuracies,
    accuracy_scores,
    chance,
    confusion,
    confusion_picture,
    ranks_of_class,
)
from distill_tasks.logistic import choose_c, fit, logits

Positive = Annotated[int, Field(gt=0)]


class ProbeConfig(TaskConfig):
    """What is classified, and what it is learned from."""

    modality: str | None = None
    """The modality whose features are classified; null takes the recipe's first."""
    features: FeatureKind | None = None
    """`embedding`, as the other tasks compare it; or `class_token`, what the backbone projects it from (of texts their
    end), which published linear probes read. null takes the embedding, or the class token where no loss of the recipe
    trains the embedding (DINO, iBOT)."""
    label: str = "class"
    """Field of the sample, or of its json, that names its class."""
    learn: str | None = "train"
    """The split of the same data that is learned from, all its sets together; null splits each scored set itself into
    `folds`, and each is classified by what the others teach."""
    folds: Annotated[int, Field(gt=1)] = 5
    """Parts of a scored set where `learn` is null; each has its share of every class."""
    shots: Positive | None = None
    """Few-shot: learn from so many samples a class, drawn at random; null learns from all."""
    draws: Positive = 3
    """Draws that few-shot scores are means of."""


@dataclass(frozen=True)
class TrainSet:
    """What is learned from: features [N, D] of items, the numbers of their classes [N], and of their samples [N]."""

    x: Tensor
    y: Tensor
    owners: Tensor


@dataclass(frozen=True)
class Labelled:
    """Features [N, D] of items, their N classes, and their samples' numbers [N]: a sample may have several items."""

    features: Tensor
    classes: Sequence[str]
    owners: Tensor


class Probe(Task):
    """Base of both: gathers labelled embeddings, and scores what `predict` makes of them."""

    Config = ProbeConfig

    @classmethod
    def needs(cls, config: ProbeConfig, plan: Plan) -> Needs:
        """Its modality."""
        modality = config.modality or next(iter(plan.modalities), None)
        return Needs(student=(modality,) if modality is not None else ())

    @classmethod
    def problems(cls, config: ProbeConfig, plan: Plan) -> Iterator[str]:
        """The modality is there, and gives such features."""
        modality = config.modality or next(iter(plan.modalities), None)
        if modality is None:  # the plan is not complete
            return
        class_tokens = plan.modalities[modality].spec.class_tokens
        if config.features == "class_token" and not class_tokens:
            yield f"'features: class_token': the backbone of {modality!r} gives none; use 'embedding'"

    @classmethod
    def reads(cls, config: ProbeConfig) -> tuple[str, ...]:
        """What is learned from."""
        return (config.learn,) if config.learn is not None else ()

    watch: Callable[[Sequence[float]], Iterable[float]] = staticmethod(iter)
    """Shows whoever waits the steps of `predict` as they are taken."""

    @abstractmethod
    def predict(self, taught: TrainSet, classes: int, asked: Tensor, device: torch.device) -> Tensor:
        """Scores [M, C] of features asked [M, D]."""

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`top1`, `top5` (of more than 5 classes) and `mean_per_class`, with their means over sets; `learned_from`.

        With `shots`, means over draws; `top1_std` is the spread among them. Warns of scored samples that are
        learned from, and of fewer samples a class than `shots`.
        """
        config: ProbeConfig = self.config
        modality = config.modality or model.modalities[0]
        self._features = config.features or model.default_features(modality)
        teaching = sets[0].of_split(config.learn) if config.learn is not None else []
        learned = self._labelled(model, teaching, modality) if config.learn is not None else None
        asked = [self._labelled(model, [samples], modality) for samples in sets]
        self._classes = sorted({label for part in (learned, *asked) if part is not None for label in part.classes})
        taught_from = {one for samples in teaching for one in samples.identities.values()}
        scores: list[Score] = []
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for samples, here in zip(sets, asked, strict=True):
            self._warn_of_both(samples, taught_from)
            self.watch = partial(samples.watch, what=f"fits for {samples.name}")
            self._fewest = len(here.classes) + (len(learned.classes) if learned is not None else 0)
            truth = self._numbers(here.classes)
            found, learned_from = [], []
            for draw in range(config.draws if config.shots else 1):
                ranks, chosen, counts = torch.empty_like(truth), torch.empty_like(truth), []
                for taught, part in self._parts(here, truth, learned, draw):
                    predicted = self.predict(taught, len(self._classes), here.features[part], model.device)
                    ranks[part], chosen[part] = ranks_of_class(predicted, truth[part]), predicted.argmax(1)
                    counts.append(len(torch.unique(taught.owners)))
                found.append(accuracies(ranks, truth, len(self._classes)))
                learned_from.append(sum(counts) / len(counts))
                self._chosen.setdefault(samples.name, (truth, chosen))
            if config.shots is not None and self._fewest < config.shots:
                fewest = f"the smallest class has {counted(self._fewest, 'sample')} to learn from"
                samples.warn(f"{self.name!r}: `shots: {config.shots}`, but {fewest}; such classes give all they have")
            averages = {score: sum(one[score] for one in found) / len(found) for score in found[0]}
            scores += accuracy_scores(samples.name, averages)
            if len(found) > 1:
                spread = torch.tensor([one["top1"] for one in found], dtype=torch.float64).std().item()
                scores.append(Score(samples.name, "top1_std", spread, higher_is_better=None))
            size = sum(learned_from) / len(learned_from)
            scores.append(Score(samples.name, "learned_from", size, "samples", None))
        return [*scores, *mean_over_sets(scores, ACCURACIES)]

    def note(self) -> str:
        """Unit, classes and chance; of few-shot, draws; what is read where the recipe does not say."""
        draws = f"; means of {counted(self.config.draws, 'draw')}" if self.config.shots else ""
        chosen = self.config.features is None and self._features == "class_token"
        read = "; of class tokens, for no loss trains the embedding" if chosen else ""
        return f"percent; {chance(len(self._classes))}{draws}{read}"

    def media(self, model: Model, sets: Sequence[EvaluationSet], samples: int) -> Iterator[Media]:
        """What is taken for what, in each set (of few-shot, the first draw's)."""
        whose = f"{self.name} of the {model.side}"
        for name, (truth, chosen) in self._chosen.items():
            yield from confusion_picture(confusion(truth, chosen, len(self._classes)), self._classes, name, whose)

    def _warn_of_both(self, samples: EvaluationSet, taught_from: Collection[tuple[str, str]]) -> None:
        both = sum(one in taught_from for one in samples.identities.values())
        if both:
            scored = counted(len(samples.identities), "scored sample")
            samples.warn(
                f"evaluation set {samples.name!r}: {both} of {scored} are in the split {self.config.learn!r} too, "
                "which is learned from: such a score says nothing of new samples"
            )

    def _labelled(self, model: Model, sets: Sequence[EvaluationSet], modality: str) -> Labelled:
        """The items of the sets' labelled samples."""
        parts, classes, of, before = [], [], [], 0
        for samples in sets:
            labels = raise_on_all_ranks(partial(samples.labels, self.config.label))
            embedded, owners = samples.embeddings(model, modality, features=self._features)
            known = torch.isin(owners, torch.tensor(list(labels), dtype=torch.long))
            parts.append(embedded[known])
            classes += [labels[i] for i in owners[known].tolist()]
            of.append(owners[known] + before)
            before = int(of[-1].max()) + 1 if len(of[-1]) else before  # so that no two sets share a number
        if not classes:
            names = ", ".join(repr(samples.name) for samples in sets)
            raise DataError(f"evaluation set {names}: no sample with {modality} and {self.config.label!r}")
        return Labelled(torch.cat(parts), classes, torch.cat(of))

    def _numbers(self, labels: Sequence[str]) -> Tensor:
        place = {label: i for i, label in enumerate(self._classes)}
        return torch.tensor([place[label] for label in labels])

    def _parts(
        self, asked: Labelled, truth: Tensor, learned: Labelled | None, draw: int
    ) -> Iterator[tuple[TrainSet, Tensor]]:
        """What to learn from, and the places of the items that are asked.

        A sample's items stay together: none is asked where another was learned from.
        """
        if learned is not None:
            y = self._numbers(learned.classes)
            chosen = self._shots(y, learned.owners, draw)
            yield TrainSet(learned.features[chosen], y[chosen], learned.owners[chosen]), torch.arange(len(truth))
            return
        owner, of_owner = _by_owner(truth, asked.owners)
        folds = torch.empty_like(of_owner)
        folds[by_class(of_owner, seed=0)] = torch.arange(len(of_owner)) % self.config.folds
        fold = folds[owner]
        for i in range(self.config.folds):
            part, rest = (fold == i).nonzero()[:, 0], (fold != i).nonzero()[:, 0]
            if not len(part):
                continue
            if not len(rest):
                raise DataError(f"{self.name!r} with `learn: null` needs at least two labelled samples")
            rest = rest[self._shots(truth[rest], asked.owners[rest], draw)]
            yield TrainSet(asked.features[rest], truth[rest], asked.owners[rest]), part

    def _shots(self, y: Tensor, owners: Tensor, draw: int) -> Tensor:
        """Places of the items of so many samples a class."""
        if self.config.shots is None:
            return torch.arange(len(y))
        owner, of_owner = _by_owner(y, owners)
        self._fewest = min(self._fewest, int(torch.bincount(of_owner)[of_owner].min()))
        chosen: Tensor = turns(of_owner, seed=draw)[owner] < self.config.shots
        return chosen.nonzero()[:, 0]


def _by_owner(y: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Each item's place [N] among the M samples there are, and these samples' classes [M]."""
    samples, place = torch.unique(owners, return_inverse=True)
    of_owner = y.new_empty(len(samples))
    of_owner[place] = y  # a sample has one class
    return place, of_owner


def by_class(y: Tensor, seed: int) -> Tensor:
    """The samples' numbers class by class, each class in an order drawn from `seed`: classes [N] -> [N]."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return order[torch.argsort(y[order], stable=True)]


def turns(y: Tensor, seed: int) -> Tensor:
    """Each sample's turn (from 0) among those of its class, in an order drawn from `seed`: classes [N] -> [N]."""
    order = by_class(y, seed)
    first = torch.searchsorted(y[order].contiguous(), y[order].contiguous())
    found = torch.empty_like(y)
    found[order] = torch.arange(len(y)) - first
    return found


class KnnConfig(ProbeConfig):
    """The neighbours."""

    k: Positive = 20
    """Neighbours that vote; all there are, where there are fewer."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """A neighbour's vote weighs exp(cosine / temperature)."""


class Knn(Probe):
    """Weighted kNN classification of frozen features (Wu et al. 2018, section 3.4), accuracies in percent."""

    name = "knn"
    Config = KnnConfig
    examples = ({"label": "number", "learn": None},)

    def predict(self, taught: TrainSet, classes: int, asked: Tensor, device: torch.device) -> Tensor:
        """The votes for each class."""
        x, y = taught.x.to(device), taught.y.to(device)
        parts = []
        for some in torch.split(asked, 1024):
            cosine, nearest = (some.to(device) @ x.T).topk(min(self.config.k, len(x)))
            # relative to the nearest: no overflow, and no vote of 0 for all
            weight = ((cosine - cosine[:, :1]) / self.config.temperature).exp()
            votes = torch.zeros(len(some), classes, device=device)
            parts.append(votes.scatter_add_(1, y[nearest], weight).cpu())
        return torch.cat(parts)


class LinearConfig(ProbeConfig):
    """The classifier."""

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

    def predict(self, taught: TrainSet, classes: int, asked: Tensor, device: torch.device) -> Tensor:
        """Log-probabilities; a class that nothing was learned of has none. Raises `DataError` for features to learn
        from that are no numbers."""
        if not taught.x.isfinite().all():
            raise DataError(
                f"{self.name!r}: features to learn from are no numbers (NaN or infinite): has the run diverged?"
            )
        known, y = torch.unique(taught.y, return_inverse=True)
        owner, of_owner = _by_owner(y, taught.owners)
        counts, turn = torch.bincount(of_owner)[of_owner], turns(of_owner, seed=0)
        held = ((counts > 1) & (turn % 5 == counts.clamp(max=5) - 1))[owner]  # a sample's items together
        x, y, held = taught.x.to(device), y.to(device), held.to(device)
        c = choose_c(x, y, held, self.config.cs, self.config.iterations, self.watch)
        weights = fit(x, y, c, self.config.iterations)
        found = torch.full((len(asked), classes), -torch.inf)
        found[:, known] = logits(asked.to(device), weights).log_softmax(1).cpu()
        return found
