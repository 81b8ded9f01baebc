"""Stages: what a recipe may change from a point of the run on, and a run through them, stopped anywhere."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_core.batch import Batch
from distill_core.commands.evaluate import score
from distill_core.errors import RecipeErrors
from distill_core.outputs import Progress
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.load import load_model, run_recipe
from distill_core.step import StepResult, TrainStep
from distill_core.train import Trainer

STAGES = """\
stages:
  - at: 0.5
    set:
      loss.contrastive.weight: 0.25
      augment.image.local: 2
      backbone.image.drop_path: 0.2
      train.optimizer.weight_decay: {name: ramp, start: 0.0, end: 0.6}
  - at: 6
    set:
      teacher: {momentum: 0.8}
      loss.1: {name: cross_modal_distillation}
      loss.2: {name: dino, id: new, prototypes: 8, hidden: 8, bottleneck: 4}
      train.lr_factors: {backbone.text: 0.5}
      freeze: [backbone.image.conv1]
"""


def text_of(recipe_text: str, folder: object = "x") -> str:
    plain = recipe_text.format(folder=folder)
    return plain.replace("  - {name: cross_modal_distillation}\n", "").replace("teacher: {momentum: 0.9}\n", "")


def test_each_stage_is_a_recipe(recipe_text: str, registry: Registry) -> None:
    """Catches overrides that do not add up, a dump that loses them, and a stage that begins a step late."""
    recipe = parse_recipe(
        text_of(recipe_text) + STAGES, "r.yaml", registry=registry, overrides=["train.steps=10", "stages.1.at=8"]
    )
    first, second = recipe.of_stage(1), recipe.of_stage(2)
    assert (recipe.loss[0].config.weight, first.loss[0].config.weight, second.loss[0].config.weight) == (1, 0.25, 0.25)
    assert [slot.id for slot in second.loss] == ["contrastive", "cross_modal_distillation", "new"]
    assert (recipe.teacher, first.teacher, second.plan.teachers != {}, second.stages) == (None, None, True, [])
    assert len(first.plan.modalities["image"].roles) == len(recipe.plan.modalities["image"].roles) + 1
    assert [recipe.stage(Progress(step, 10)) for step in range(10)] == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    again = parse_recipe(recipe.to_yaml(), "again.yaml", registry=registry)
    assert (again, again.of_stage(2)) == (recipe, second)


def test_errors_name_the_stage_and_the_line(recipe_text: str, registry: Registry) -> None:
    """Catches a stage that is checked only when it begins, alone, or without its place."""
    text = text_of(recipe_text) + (
        "stages:\n"  # line 25
        "  - at: 0.5\n"
        "    set:\n"
        "      loss.0.weight: -1\n"
        "      loss.1: {name: cross_modal_distillation}\n"
        "  - at: 0.5\n"
        "    set: {loss.9.weight: 1}\n"
    )
    line = text.splitlines().index("stages:") + 1
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(text, "r.yaml", registry=registry)
    assert caught.value.lines == [
        f"r.yaml:{line + 3}: stages.0: loss.0.weight: must be at least 0, got -1",
        f"r.yaml:{line + 4}: stages.0: loss.1: 'cross_modal_distillation' needs a teacher; this recipe has none",
        f"r.yaml:{line + 6}: stages.1: loss.9.weight: the list has no item 9; it has 2, counted from 0",
    ]

    def lines(*stages: str, steps: str = "train.steps=4") -> list[str]:
        change = f"stages=[{', '.join(stages)}]"
        with pytest.raises(RecipeErrors) as caught:
            parse_recipe(text_of(recipe_text), "r.yaml", registry=registry, overrides=[change, steps])
        return [one.removeprefix("--set stages: ") for one in caught.value.lines]

    (whole,) = lines("{at: 0.5, set: {data.batch_size: 8}}")
    assert whole.startswith("stages.0: data.batch_size holds for the whole run; a stage may change augment, backbone")
    assert lines("{at: 0.5, set: {seed: 1}}")[0].startswith("stages.0: seed holds for the whole run")
    wider = lines("{at: 0.5, set: {backbone.image.width: 24}}")
    expected = "backbone.image.class_embedding would be [24] in place of [16], and a stage keeps the weights"
    assert f"stages.0: {expected}" in wider
    assert lines("{at: 0.5, set: {}}", "{at: 2, set: {}}") == ["stages.1.at: comes no later than the stage before"]
    mixed = lines("{at: 0.5, set: {}}", "{at: 2, set: {}}", steps="train={epochs: 2}")
    assert mixed[0].startswith("stages.1.at: give all points as parts of the run, or all as steps")
    assert lines("{at: 1, set: {}}")[0].startswith("stages.0.at: a part of the run below 1, or a whole number of steps")
    assert lines("{at: 0.5, sit: {}}")[0].startswith("stages.0.s")


def test_warnings_are_of_the_whole_run(recipe_text: str, registry: Registry) -> None:
    """Catches a stage that never begins without a word, and a head or fusion that is said to be of no use, though
    another stage has one."""

    def warnings(*stages: str) -> list[str]:
        overrides = ["train.steps=10", "heads={shared: caption_decoder}", f"stages=[{', '.join(stages)}]"]
        lines = parse_recipe(text_of(recipe_text), "r.yaml", registry=registry, overrides=overrides).warnings
        return [line for line in lines if "fusion" not in line]

    late, called = "{at: 10, set: {loss.0.weight: 2}}", "{at: 0.9, set: {loss.1: {name: captioning, head: shared}}}"
    (line,) = warnings()
    assert line.endswith("no loss of this recipe calls the head 'shared': it is not trained")
    assert warnings(called) == []
    assert warnings(late)[0] == "stages.0: never begins: it is set to step 10, and the run ends after 10"
    with pytest.raises(RecipeErrors, match=r": stages\.0: the teacher 'x': of: 'backbone.image.conv9' names no part"):
        warnings("{at: 0.5, set: {teachers.x: {name: ema, of: [backbone.image.conv9]}}}")


@pytest.fixture(scope="module")
def recipe(
    tmp_path_factory: pytest.TempPathFactory,
    recipe_text: str,
    registry: Registry,
    write_shards: Callable[..., list[Path]],
) -> Recipe:
    folder = tmp_path_factory.mktemp("stages")
    for prefix in ("train", "validation", "test"):
        write_shards(folder / "shards", 2, 7, prefix=prefix)
    file = folder / "small.yaml"
    file.write_text(text_of(recipe_text, folder / "shards") + STAGES, encoding="utf-8")
    overrides = ["train.steps=8", "train.checkpoint={every: 1, keep: 99}", "evaluate.every=3"]
    return load_recipe(file, registry=registry, overrides=overrides)


def trained(recipe: Recipe, base: Path) -> Path:
    return Trainer(recipe, RunFolder.create(base, recipe), quiet=True).run().folder


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_s", "timing")} for row in rows]


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in flat(item, f"{path}.{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, item in enumerate(tree) for k, v in flat(item, f"{path}.{i}").items()}
    return {path: tree}


def assert_same(a: Any, b: Any) -> None:
    one, other = flat(a), flat(b)
    assert one.keys() == other.keys()
    different = [
        path
        for path, value in one.items()
        if not (torch.equal(value, other[path]) if isinstance(value, Tensor) else value == other[path])
    ]
    assert [path for path in different if path != ".seconds"] == []


@pytest.mark.slow
def test_a_run_through_stages_is_exact_wherever_it_stops(
    recipe: Recipe, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, at and after each boundary: with the loader's workers and without. Catches a stage that a resumed run
    misses or enters twice, new weights that are drawn otherwise, lost optimiser state, and batches that are skipped."""
    folder = trained(recipe, tmp_path)
    end = Checkpoints(folder).read()
    rows = without_times(RunFolder(folder).rows())
    assert [Checkpoints(folder).read(str(step))["stage"] for step in range(1, 8)] == [0, 0, 0, 0, 1, 1, 2]
    for step in (3, 4, 5, 6, 7):
        again = run_recipe(folder, registry)
        if step == 4:
            again = load_recipe(folder / "recipe.yaml", registry=registry, overrides=["data.workers=2"], recorded=True)
        Trainer(again, RunFolder(folder), resume=str(step), quiet=True).run()
        finished = Checkpoints(folder).read()
        if step == 4:
            finished["recipe"]["data"]["workers"] = 0
        assert_same(finished, end)
        assert without_times(RunFolder(folder).rows()) == rows
    assert load_model(folder, teacher=True).teacher
    report = json.loads((folder / "report.json").read_text())
    score(str(folder), registry, quiet=True, cache=False, as_json=True)
    assert json.loads(capsys.readouterr().out) == report["scores"], "scored as its stage's recipe has it"
    score(str(folder), registry, checkpoint="4", quiet=True, cache=False, as_json=True)
    assert {scored["side"] for scored in json.loads(capsys.readouterr().out)} == {"student"}


@pytest.mark.slow
def test_what_stages_share_keeps_its_weights(
    recipe: Recipe, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches weights, running means and learned scales that begin anew, a teacher that is not the student when it
    begins, a loss that takes part too early, and options that stay as they were."""
    seen: dict[int, dict[str, Any]] = {}
    step_of = TrainStep.__call__

    def watched(self: TrainStep, batch: Batch, progress: Progress, **options: Any) -> StepResult:
        weights = {name: x.clone() for name, x in self.objective.state_dict().items()}
        optimizer = copy.deepcopy(self.optimizer_state()["state"])
        result = step_of(self, batch, progress, **options)
        views = sum(len(group.x) for group in batch.views["image"].groups)
        after = {name: x.clone() for name, x in self.objective.state_dict().items()}
        rates = {name: group["lr"] for group in self.optimizer.param_groups for name in self.names_of(group)}
        seen[progress.step] = {
            "before": weights, "after": after, "optimizer": optimizer, "terms": result.terms, "loss": result.loss,
            "views": views, "lr": rates,
        }  # fmt: skip
        return result

    def names_of(self: TrainStep, group: dict[str, Any]) -> list[str]:
        names = {id(p): name for name, p, _ in self._named}
        return [names[id(p)] for p in group["params"]]

    monkeypatch.setattr(TrainStep, "__call__", watched)
    monkeypatch.setattr(TrainStep, "names_of", names_of, raising=False)
    trained(recipe, tmp_path)
    assert [seen[step]["views"] for step in range(8)] == [3] * 4 + [4] * 4
    assert [sorted(seen[step]["terms"]) for step in (0, 5, 6)] == [
        ["contrastive"], ["contrastive"], ["contrastive", "cross_modal_distillation", "new"],
    ]  # fmt: skip
    for step in (4, 6):
        for name, tensor in seen[step - 1]["after"].items():
            assert torch.equal(tensor, seen[step]["before"][name]), (step, name)
        optimizer = seen[step]["optimizer"]
        assert float(optimizer["backbone.text.token_embedding.weight"]["step"]) == step
    assert seen[4]["loss"] == pytest.approx(0.25 * seen[4]["terms"]["contrastive"])
    start = seen[6]["before"]
    copies = [name for name in start if name.startswith("teacher.default.backbone.")]
    assert copies
    for name in copies:
        assert torch.equal(start[name], start[name.removeprefix("teacher.default.")]), name
    assert torch.equal(start["backbone.image.conv1.weight"], seen[7]["after"]["backbone.image.conv1.weight"])
    assert not torch.equal(start["backbone.image.proj"], seen[7]["after"]["backbone.image.proj"])
    rates = seen[6]["lr"]
    assert rates["backbone.text.text_projection"] == pytest.approx(rates["backbone.image.proj"] / 2)
