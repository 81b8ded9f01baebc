"""Zero-shot classification: items against prompts made of the classes' names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch.nn.functional import normalize

from distill_core.components import ComponentConfig, Evaluation, Plan
from distill_core.errors import DataError
from distill_core.evaluate.retrieval import two_modalities
from distill_core.evaluate.sets import EvaluationSet
from distill_core.model import Model


class ZeroShotConfig(ComponentConfig):
    """What is classified, and how classes are put into words."""

    modalities: tuple[str, str] | None = None
    """The classified modality, and that of the prompts; null takes the recipe's first and second."""
    label: str = "class"
    """Field of the sample that names its class in words; the prompts' modality reads it."""
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("{}",)
    """Prompts with {} for the class; a class's embedding is the normalised mean of its prompts'."""

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"the template {template!r} has no {{}} for the class")
        return templates


class ZeroShot(Evaluation):
    """Top-1, top-5 and mean-per-class accuracy in percent, with prompt ensembles (Radford et al. 2021, section 3.1.4).
    Ties count against the model.
    """

    name = "zero_shot"
    Config = ZeroShotConfig

    @classmethod
    def problems(cls, config: ZeroShotConfig, plan: Plan) -> Iterator[str]:
        """Two modalities that the recipe has."""
        yield from two_modalities(cls.name, config.modalities, plan)

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> dict[str, float]:
        """`SET/top1`, `SET/top5`, `SET/mean_per_class`, `SET/classes`, and each score's mean over sets."""
        items_of, words_of = self.config.modalities or model.modalities
        labels_of: dict[str, dict[int, str]] = {}
        for samples in sets:
            labels_of[samples.name] = dict(samples.items(model, words_of, self.config.label))
        classes = sorted({label for labels in labels_of.values() for label in labels.values()})
        if not classes:
            raise DataError(f"no sample has a field {self.config.label!r} that names its class")
        prompts = [template.replace("{}", label) for label in classes for template in self.config.templates]
        embedded = model.encode(words_of, prompts).view(len(classes), len(self.config.templates), -1)
        centres = normalize(embedded.mean(1), dim=-1)
        scores: dict[str, float] = {}
        for samples in sets:
            name, labels = samples.name, labels_of[samples.name]
            embedded, owners = samples.embeddings(model, items_of)
            known = torch.isin(owners, torch.tensor(list(labels), dtype=torch.long))
            if not known.any():
                raise DataError(f"evaluation set {name!r}: no sample with {items_of} and {self.config.label!r}")
            truth = torch.tensor([classes.index(labels[i]) for i in owners[known].tolist()])
            similarity = embedded[known] @ centres.T
            own = similarity.gather(1, truth[:, None])
            rank = (~(similarity < own)).sum(1) - 1  # NaN counts against the model too
            hit = (rank == 0).double()
            per_class = torch.stack([hit[truth == c].mean() for c in torch.unique(truth)])
            scores |= {
                f"{name}/top1": 100 * hit.mean().item(),
                f"{name}/top5": 100 * (rank < 5).double().mean().item(),
                f"{name}/mean_per_class": 100 * per_class.mean().item(),
                f"{name}/classes": float(len(classes)),
            }
        for score in ("top1", "top5", "mean_per_class"):
            scores[score] = sum(scores[f"{samples.name}/{score}"] for samples in sets) / len(sets)
        return scores
