"""Evaluation tasks for any two modalities, or any labelled set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_core import hookimpl

if TYPE_CHECKING:
    from distill_core import ConformanceCase

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Retrieval by embeddings of their own or conditioned ones, zero-shot classification, captioning, probes."""
    from distill_tasks.captioning import Captioning
    from distill_tasks.conditioned import ConditionedRetrieval
    from distill_tasks.probes import Knn, LinearProbe
    from distill_tasks.retrieval import Retrieval
    from distill_tasks.zero_shot import ZeroShot

    return [Retrieval, ConditionedRetrieval, ZeroShot, Captioning, Knn, LinearProbe]


@hookimpl
def distill_conformance_cases() -> list[ConformanceCase]:
    """What `distill check-plugin` feeds the tasks that numbers cannot be scored by."""
    from distill_tasks.cases import CASES

    return CASES
