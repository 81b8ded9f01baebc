"""Evaluation tasks for any two modalities, or any labelled set."""

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_components() -> list[type]:
    """Retrieval by embeddings of their own or conditioned ones, zero-shot classification, kNN and linear probes."""
    from distill_tasks.conditioned import ConditionedRetrieval
    from distill_tasks.probes import Knn, LinearProbe
    from distill_tasks.retrieval import Retrieval
    from distill_tasks.zero_shot import ZeroShot

    return [Retrieval, ConditionedRetrieval, ZeroShot, Knn, LinearProbe]
