"""Zero-shot classification: items against prompts made of the classes' names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from distill_core import (
    DataError,
    EvaluationSet,
    Model,
    Plan,
    Score,
    TaskConfig,
    encode_shared,
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
from distill_tasks.prompts import Templates, plain_lines, prompts_of, templates_of
from distill_tasks.retrieval import two_modalities


class ZeroShotConfig(TaskConfig):
    """Options of `zero_shot`."""

    modalities: tuple[str, str] | None = None
    """The classified modality, and that of the prompts; null takes the recipe's first and second."""
    label: str = "class"
    """Field of the sample that names its class in words; the prompts' modality reads it."""
    templates: Templates = ("{}",)
    """Prompts with {} for the class; a class's embedding is the normalised mean of its prompts'. A list; `openai` (the
    80 for ImageNet) or `openai_simple` (7 of them); or a file, a template a line, with {} or {c} for the class."""
    classes: str | None = None
    """A file with the names of all classes to choose from, one a line; null takes those that occur in the sets."""


class ZeroShot(ClassificationTask):
    """Top-1, top-5 and mean-per-class accuracy in percent, with prompt ensembles (Radford et al. 2021, section 3.1.4).
    Ties count against the model. Classes of one name count as one.
    """

    name = "zero_shot"
    Config = ZeroShotConfig

    @classmethod
    def problems(cls, config: ZeroShotConfig, plan: Plan) -> Iterator[str]:
        """The recipe lacks a modality, or has too many to choose from."""
        yield from two_modalities(cls.name, config.modalities, plan)

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        """`top1`, `top5` (of more than 5 classes) and `mean_per_class`, with their means over sets; `classes`."""
        items_of, words_of = self.config.modalities or model.modalities
        labels_of, self._classes, prompts = raise_on_all_ranks(lambda: self._read(model, words_of, sets))
        place = {label: i for i, label in enumerate(self._classes)}
        embedded = encode_shared(model, words_of, prompts)
        centres = normalize(embedded.view(len(self._classes), -1, embedded.shape[1]).mean(1), dim=-1)  # [C, D]
        scores: list[Score] = []
        self._predictions = {}
        for samples in sets:
            name, labels = samples.name, labels_of[samples.name]
            embedded, owners = samples.embeddings(model, items_of)
            is_labelled = torch.isin(owners, torch.tensor(list(labels), dtype=torch.long))
            if not is_labelled.any():
                raise DataError(f"evaluation set {name!r}: no sample with {items_of} and {self.config.label!r}")
            truth = torch.tensor([place[labels[i]] for i in owners[is_labelled].tolist()])
            similarity = embedded[is_labelled] @ centres.T
            values = accuracies(ranks_of_class(similarity, truth), truth, len(self._classes))
            scores += accuracy_scores(name, values)
            scores.append(Score(name, "classes", float(len(self._classes)), "classes", None))
            self._predictions[name] = truth, similarity.argmax(1)
        return [*scores, *mean_over_sets(scores, ACCURACIES)]

    def note(self) -> str:
        """Unit, classes and chance."""
        return f"percent; {chance(len(self._classes))}"

    def _read(
        self, model: Model, words_of: str, sets: Sequence[EvaluationSet]
    ) -> tuple[dict[str, dict[int, str]], list[str], list[str]]:
        """The classes of each set's samples, all classes, and their prompts, class by class."""
        labels_of = {samples.name: dict(samples.items(model, words_of, self.config.label)) for samples in sets}
        classes = self._names({label for labels in labels_of.values() for label in labels.values()})
        return labels_of, classes, prompts_of(classes, templates_of(self.config.templates))

    def _names(self, present: set[str]) -> list[str]:
        if not present:
            raise DataError(f"no sample has a field {self.config.label!r} that names its class")
        if self.config.classes is None:
            return sorted(present)
        listed = sorted({*plain_lines(Path(self.config.classes), "the name of a class a line")} - {""})
        if unknown := sorted(present - set(listed)):
            raise DataError(
                f"{self.config.classes}: does not name {len(unknown)} of the classes that occur, as {unknown[0]!r}"
            )
        return listed
