"""Scores by name, for tests that compare values; and scores made of them, for reports written by hand."""

from collections.abc import Iterable, Mapping
from typing import Any

from distill_core.evaluate.score import Score, TaskScore, read_scores


def values(scores: Iterable[Score]) -> dict[str, float]:
    """`SET/NAME`, and `NAME` of a mean -> value."""
    return {score.name if score.set is None else f"{score.set}/{score.name}": score.value for score in scores}


def reported(scores: Iterable[TaskScore] | Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Address -> value, of a run's scores or of the rows in a report."""
    found = [score if isinstance(score, TaskScore) else read_scores([score])[0] for score in scores]
    return {score.address: score.value for score in found}


def means(values: Mapping[str, float], *headlines: str) -> list[TaskScore]:
    """Means over sets of the tasks and sides in `SIDE/TASK/NAME`."""
    parts = {address: address.split("/", 2) for address in values}
    return [
        TaskScore(None, name, values[address], headline=name in headlines, side=side, task=task)
        for address, (side, task, name) in parts.items()
    ]
