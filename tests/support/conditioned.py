"""A small model whose pooling depends on the text, and the task that scores it: for processes of their own, too."""

from __future__ import annotations

import random
from typing import Any

import torch

from distill_core import EvaluationSet, Model, Sample
from distill_flair.cases import scorable
from distill_tasks.conditioned import ConditionedRetrieval


def task(**options: Any) -> ConditionedRetrieval:
    return ConditionedRetrieval(ConditionedRetrieval.Config(**options))


def trained() -> tuple[Model, list[Sample]]:
    """With weights far from their first ones, so that pooling depends on the text."""
    model, samples = scorable(ConditionedRetrieval.Config())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for module in (*model.backbone.values(), model.fusion):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return model, samples


def scored(pairs: int) -> list[float]:
    """The scores of all ranks' work."""
    model, samples = trained()
    random.Random(1).shuffle(samples)
    return [score.value for score in task(pairs=pairs).run(model, [EvaluationSet("s", samples)])]
