"""Scores: addresses, means over sets, what is better; and what the runner makes of those that a task returns."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from distill_core.contracts.task import Task, TaskConfig
from distill_core.evaluate.run import evaluate
from distill_core.evaluate.score import (
    Score,
    TaskScore,
    headlines,
    mean_over_sets,
    means,
    parse_address,
    read_scores,
)
from distill_core.evaluate.sets import EvaluationSet
from distill_core.model import Model
from distill_core.recipe.build import build_objective, models_of
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry


def test_a_mean_keeps_what_its_scores_say() -> None:
    """Would catch a mean of a set that lacks the score, of scores that are means already, or a lost unit."""
    scores = [
        Score("a", "x", 1.0, "nats", higher_is_better=False, headline=True),
        Score("a", "y", 5.0),
        Score("b", "x", 3.0, "nats", higher_is_better=False, headline=True),
        Score("b", "count", 2.0, "samples", None),
        Score(None, "y", 100.0),
    ]
    mean = Score(None, "x", 2.0, "nats", higher_is_better=False, headline=True)
    assert mean_over_sets(scores, ("y", "x")) == [mean, Score(None, "y", 5.0)]
    assert [score.name for score in mean_over_sets(scores)] == ["x", "y", "count"]


def test_an_address_is_read_as_it_is_built() -> None:
    """Would catch a task's name with slashes that is taken apart, and a row of a report that does not come back."""
    of_set = TaskScore("a", "x_to_y/R@1", 3.0, side="teacher", task="r")
    mean = TaskScore(None, "x_to_y/R@1", 3.0, "rank", False, True, side="teacher", task="r")
    assert (of_set.address, mean.address) == ("teacher/r/a/x_to_y/R@1", "teacher/r/x_to_y/R@1")
    assert parse_address(mean.address) == ("teacher", "r", "x_to_y/R@1")
    assert read_scores([asdict(of_set), asdict(mean)]) == [of_set, mean]
    assert means([of_set, mean]) == headlines([of_set, mean]) == [mean]
    for address in ("M", "student/M"):
        with pytest.raises(ValueError, match="not enough values"):
            parse_address(address)


@pytest.mark.parametrize(
    ("value", "best", "higher", "lower"),
    [(2.0, None, True, True), (2.0, 1.0, True, False), (1.0, 2.0, False, True), (1.0, 1.0, False, False),
     (float("nan"), None, False, False), (float("nan"), 1.0, False, False)],
)  # fmt: skip
def test_better(value: float, best: float | None, higher: bool, lower: bool) -> None:
    assert Score(None, "x", value, higher_is_better=True).improves_on(best) is higher
    assert Score(None, "x", value, higher_is_better=False).improves_on(best) is lower
    assert not Score(None, "x", value, higher_is_better=None).improves_on(best)


def test_text() -> None:
    """Would catch a small loss that is shown as 0.0, and a count as 1e+04 or with decimals."""
    shown = [("percent", 12.345), ("nats", 0.0123456), ("nats", -2.5), ("samples", 25000.0), ("samples", 12.0)]
    assert [Score(None, "x", value, unit).text for unit, value in shown] == ["12.3", "0.01235", "-2.5", "25000", "12"]


class Fixed(Task):
    """Returns the scores that a test asks for."""

    name = "fixed"
    Config = TaskConfig
    scores: ClassVar[list[Score]]

    def run(self, model: Model, sets: Sequence[EvaluationSet]) -> list[Score]:
        return self.scores


@pytest.mark.parametrize(
    ("scores", "names"),
    [([Score("a", "x", 1.0), Score("a", "x", 1.0)], "a/x"), ([Score("a", "x", 1.0), Score(None, "a/x", 2.0)], "a/x")],
)
def test_two_scores_of_one_address_are_refused(
    tiny_recipe: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, scores: list[Score], names: str
) -> None:
    """Would catch one score that silently takes the place of another in metrics.jsonl; other tasks are scored."""
    monkeypatch.setattr(Fixed, "scores", scores, raising=False)
    more = Registry([*registry.entries.values(), Entry(Fixed, "mine", "mine")])
    overrides = ["evaluate.tasks=[fixed, retrieval]"]
    recipe = load_recipe(tiny_recipe, registry=more, overrides=overrides)
    models: Any = models_of(recipe, build_objective(recipe), torch.device("cpu"))
    evaluated = evaluate(recipe, models, recipe.data.source.build(), "test")
    assert evaluated.failed == [f"evaluate.tasks.0 (fixed): two scores have one name: {names}; rename one, or the set"]
    assert {score.task for score in evaluated.scores} == {"retrieval"}
