"""Evaluation tasks with a data source of their own, and sources without shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from score_values import reported

from distill_core.data.shard import Shard
from distill_core.data.tar_samples import read_shard
from distill_core.data.webdataset_source import WebDatasetSource
from distill_core.errors import RecipeErrors
from distill_core.evaluate.run import evaluate
from distill_core.recipe.build import build_objective, models_of
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Entry, Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer


class Listed(WebDatasetSource):
    """Samples without shards, of the split `test` alone."""

    trainable = False

    name = "listed"

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        return ("test",)

    def prepare(self) -> None:
        pass

    def sets(self, split: str) -> dict[str, list[Shard]]:
        return {}

    def samples(self, split: str) -> dict[str, list[dict[str, Any]]]:  # type: ignore[override]
        mine = list(read_shard(self.config.urls))
        return {"mine": mine} if split == "test" else {}


@pytest.mark.slow
def test_a_task_may_have_data_of_its_own(tiny_recipe: Path, registry: Registry, tmp_path: Path) -> None:
    """The same samples through shards and through a source without them give the same scores; and it is left out of
    the evaluations on a split that it has not.
    """
    shard = tiny_recipe.parent / "shards" / "test-000.tar"
    more = Registry([*registry.entries.values(), Entry(Listed, "mine", "mine")])
    own = f"{{name: retrieval, id: own, source: {{name: listed, urls: {shard}}}}}"
    overrides = [f"evaluate.tasks=[retrieval, {own}]", "train.steps=2", "evaluate.every=1", "name=own"]
    overrides += [f"data.source.validation={shard}", f"data.source.test={shard}"]
    recipe = load_recipe(tiny_recipe, registry=more, overrides=overrides)
    assert recipe.to_dict()["evaluate"]["tasks"][1]["source"]["name"] == "listed"
    folder = RunFolder.create(tmp_path / "runs", recipe)
    result = Trainer(recipe, folder, quiet=True).run()
    assert result.failed == []
    for side in ("student", "teacher"):
        scores = reported(result.scores)
        assert scores[f"{side}/own/mine/M"] == scores[f"{side}/retrieval/data/M"]
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    while_training = [name for row in rows if row.get("split") == "validation" for name in row["scores"]]
    assert while_training
    assert not any("/own/" in name for name in while_training)


def test_what_is_wrong_with_a_task_s_own_source(tiny_recipe: Path, registry: Registry) -> None:
    more = Registry([*registry.entries.values(), Entry(Listed, "mine", "mine")])
    for source, said in (
        ("{name: lsted, urls: x}", r"evaluate.tasks.0.source: no source named 'lsted', did you mean 'listed'\?"),
        ("{name: listed, url: x}", r"evaluate.tasks.0.source.url: unknown option 'url', did you mean 'urls'\?"),
        ("3", r"evaluate.tasks.0.source: must be a mapping, got 3"),
    ):
        with pytest.raises(RecipeErrors, match=said):
            load_recipe(
                tiny_recipe, registry=more, overrides=[f"evaluate.tasks=[{{name: retrieval, source: {source}}}]"]
            )
    own = "evaluate.tasks=[{name: retrieval, source: {name: listed, urls: x}}]"
    with pytest.raises(RecipeErrors, match=r"evaluate.tasks.0.source has no split 'train' \(it has test\)"):
        load_recipe(tiny_recipe, registry=more, overrides=[own, "evaluate.split=train"])


def test_the_means_say_of_which_sets_they_are(tiny_recipe: Path, registry: Registry) -> None:
    """Would catch scores of two styles where another machine has three, without a word: both are called the mean."""
    train = str(tiny_recipe.parent / "shards" / "train-*.tar")
    test = str(tiny_recipe.parent / "shards" / "test-*.tar")
    for sets, note in (({"a": test}, False), ({"one": test, "other": train}, True)):
        recipe = load_recipe(tiny_recipe, registry=registry, overrides=[f"data.source.test={json.dumps(sets)}"])
        objective = build_objective(recipe)
        scored = evaluate(recipe, models_of(recipe, objective, torch.device("cpu")), recipe.data.source.build(), "test")
        assert scored.failed == []
        assert scored.notes["retrieval"].endswith("; means of 2 sets: one, other") == note
        assert ("means of" in scored.notes["retrieval"]) == note
