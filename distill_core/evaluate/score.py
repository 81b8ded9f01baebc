"""Scores, which tasks return: each describes itself, so that nothing else needs to know a task's scores."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Score:
    """One number of a task. `name` may contain slashes: nothing is read from it."""

    set: str | None
    """The evaluation set that was scored; None for the mean over sets, which is what summaries show."""
    name: str
    value: float
    unit: str = "percent"
    higher_is_better: bool | None = True
    """None where neither direction is better: a count, an entropy."""
    headline: bool = False
    """Whether it represents its task where space is limited: its mean over sets is in the line that a validation logs,
    and a column of a study's table."""

    @property
    def text(self) -> str:
        """The value: percent with one decimal, anything else with four significant digits or all of its whole part."""
        digits = ".1f" if self.unit == "percent" else ".4g" if abs(self.value) < 1000 else ".0f"
        return f"{self.value:{digits}}"

    def improves_on(self, best: float | None) -> bool:
        """Whether it is better than the `best` value so far (None: there is none). NaN never is, nor is a score of
        which neither direction is better."""
        if self.higher_is_better is None or math.isnan(self.value):
            return False
        return best is None or (self.value > best if self.higher_is_better else self.value < best)


@dataclass(frozen=True)
class TaskScore(Score):
    """A score with its origin: the `side` that was scored (student or teacher) and the id of the `task`."""

    side: str = field(kw_only=True)
    task: str = field(kw_only=True)

    @property
    def address(self) -> str:
        """SIDE/TASK/SET/NAME, or SIDE/TASK/NAME of a mean: its name in recipes, metrics.jsonl and trackers."""
        return "/".join(part for part in (self.side, self.task, self.set, self.name) if part is not None)


def parse_address(address: str) -> tuple[str, str, str]:
    """(side, task, rest) of an address in a recipe; the rest is not parsed further.

    Raises `ValueError`.
    """
    side, task, rest = address.split("/", 2)
    return side, task, rest


def by_address(scores: Iterable[TaskScore]) -> dict[str, TaskScore]:
    """The scores by `TaskScore.address`."""
    return {score.address: score for score in scores}


def read_scores(rows: Iterable[Mapping[str, Any]]) -> list[TaskScore]:
    """From the `scores` of report.json, of RUN/evaluations and of `distill eval --json`."""
    return [TaskScore(**row) for row in rows]


def means(scores: Iterable[TaskScore]) -> list[TaskScore]:
    """The means over sets, which summaries show."""
    return [score for score in scores if score.set is None]


def headlines(scores: Iterable[TaskScore]) -> list[TaskScore]:
    """The means over sets that represent their tasks (`Score.headline`)."""
    return [score for score in means(scores) if score.headline]


def mean_over_sets(scores: Iterable[Score], names: Collection[str] | None = None) -> list[Score]:
    """The mean of each score over the sets that have it, in the order in which they come; only `names`, if given."""
    by_name: dict[str, list[Score]] = {}
    for score in scores:
        if score.set is not None and (names is None or score.name in names):
            by_name.setdefault(score.name, []).append(score)
    return [
        replace(
            of_sets[0],
            set=None,
            value=sum(score.value for score in of_sets) / len(of_sets),
            headline=any(score.headline for score in of_sets),
        )
        for of_sets in by_name.values()
    ]
