"""Several sources in one run: from the recipe to the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_core.errors import DataError, RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

Make = Callable[..., Trainer]


@pytest.fixture
def trainer(tiny_recipe: Path, registry: Registry, tmp_path: Path, write_shards: Callable[..., list[Path]]) -> Make:
    """A run on `one` (12 samples in three shards) and `other` (5 in one)."""
    write_shards(tmp_path / "shards", 1, 5, prefix="other")

    def make(*overrides: str, resume: str | None = None) -> Trainer:
        shards = tmp_path / "shards"
        sources = (
            f"{{one: {{name: webdataset, urls: {shards}/train-*.tar}}, "
            f"other: {{name: webdataset, urls: {shards}/other-*.tar, test: {shards}/test-*.tar}}}}"
        )
        mixture = f"data.source={{name: mixture, of: {sources}}}"
        recipe = load_recipe(tiny_recipe, registry=registry, overrides=[mixture, *overrides])
        folder = tmp_path / "runs" / recipe.name
        made = RunFolder(folder) if resume else RunFolder.create(tmp_path / "runs", recipe)
        return Trainer(recipe, made, resume=resume, quiet=True)

    return make


def by_set(trainer: Trainer) -> dict[str, int]:
    trainer.run()
    report = json.loads((trainer.folder.path / "report.json").read_text())
    return dict(report["samples_by_set"])


def test_without_weights_every_sample_comes_once_a_pass(trainer: Make) -> None:
    """17 samples: two passes are 34."""
    made = trainer("data.batch_size=2", "train.steps=17", "evaluate=null", "data.workers=2")
    assert by_set(made) == {"one": 24, "other": 10}


def test_weights_and_a_stop(trainer: Make) -> None:
    """One to one, though one set has more than twice the samples; counts go on after a stop. Catches shares by size."""
    options = ("data.weights={one: 1, other: 1}", "data.batch_size=10", "evaluate=null", "seed=4")
    assert sum(by_set(trainer(*options, "train.steps=9")).values()) == 90
    whole = by_set(trainer(*options, "train.steps=20", resume="last"))
    assert sum(whole.values()) == 200
    assert abs(whole["one"] - 100) < 25


def test_a_step_of_one_set(trainer: Make) -> None:
    made = trainer("data.batches=one_set", "data.batch_size=3", "train.steps=8", "evaluate=null")
    seen: list[set[str]] = []
    made.loader.start()
    for _ in range(30):
        batch = made.loader.wait(20)
        assert batch is not None
        seen.append({key.split("-")[0] for key in batch.keys})
        assert sum(batch.sets.values()) == 3
    made.loader.close()
    assert all(len(prefixes) == 1 for prefixes in seen)
    assert {"train", "other"} == set.union(*seen)
    made.folder.unlock()


def test_weights_must_name_the_sets(trainer: Make) -> None:
    with pytest.raises(DataError, match=r"data.weights names one, and data.source has the sets one, other"):
        trainer("data.weights={one: 1}")


def test_its_test_split_is_scored_by_source(trainer: Make) -> None:
    made = trainer("train.steps=1")
    result = made.run()
    assert {score.set for score in result.scores if score.set} == {"other"}


def test_errors_of_its_sources_have_their_paths(tiny_recipe: Path, registry: Registry) -> None:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(
            tiny_recipe,
            registry=registry,
            overrides=["data.source={name: mixture, of: {a: {name: webdatset, urls: x.tar}, b: {name: webdataset}}}"],
        )
    text = "\n".join(caught.value.lines)
    assert "of.a" in text
    assert "did you mean 'webdataset'" in text
    assert "of.b" in text
