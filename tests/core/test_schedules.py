"""Options that are schedules: their course, in recipes, and in a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field

from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.schedule import Cosine, Ramp, Schedule, Scheduled, Steps
from distill_core.contracts.slot import Context
from distill_core.errors import RecipeErrors
from distill_core.outputs import Progress
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.load import run_recipe
from distill_core.train import Trainer


def course(schedule: type[Schedule], steps: int, numbers: tuple[int, ...], **options: Any) -> list[float]:
    """Its values at these steps of a run of `steps`."""
    made = schedule(schedule.Config.model_validate_json(json.dumps(options)))
    return [made.value(Progress(step, steps)) for step in numbers]


def test_courses_by_hand() -> None:
    """Catches points in steps that are read as parts of the run, a course outside its points, and steps a step late."""
    line = course(Ramp, 100, (0, 20, 35, 50, 99), start=2.0, end=4.0, after=0.2, until=0.5)
    assert line == pytest.approx([2, 2, 3, 4, 4])
    in_steps = course(Ramp, 1000, (0, 10, 15, 20, 999), start=1.0, end=0.0, after=10, until=20)
    assert in_steps == pytest.approx([1, 1, 0.5, 0, 0])
    half = [1 - 0.1 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (0, 3, 7)]
    assert course(Cosine, 8, (0, 3, 7), start=0.9, end=1.0) == pytest.approx(half)
    assert course(Steps, 10, (0, 4, 5, 7, 8, 9), values=[1, 0.1, 0.01], at=[0.5, 8]) == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert course(Ramp, 10, (4, 5), start=0.0, end=1.0, after=0.5, until=0.5) == [0, 1], "a jump divides by nothing"


class Options(ComponentConfig):
    """An option that may move, as a plugin has it."""

    part: Scheduled[Annotated[float, Field(ge=0, le=1)]] = Scheduled(0.25)


def test_an_option_of_a_plugin(registry: Registry) -> None:
    """Catches defaults without a registry, numbers that ask for one, dumps that do not load, and lost bounds."""
    context, now = Context(registry), Progress(5, 10)
    assert Options().part.value(now) == 0.25
    assert Options(part=1).part == 1.0
    moving = Options.model_validate_json('{"part": {"name": "ramp", "start": 0, "end": 1}}', context=context)
    assert moving.part.value(now) == 0.5
    assert moving != Options()
    assert Options.model_validate_json(moving.model_dump_json(), context=context) == moving
    assert moving.model_dump()["part"] == {"name": "ramp", "start": 0.0, "end": 1.0, "after": 0.0, "until": 1.0}
    for wrong in ('{"name": "ramp", "start": 0, "end": 1.5}', '{"name": "steps", "values": [0, -1], "at": [90000]}'):
        with pytest.raises(ValueError, match=r"takes the value (1\.005|-1); it must be at (most 1|least 0)"):
            Options.model_validate_json(f'{{"part": {wrong}}}', context=context)


def test_in_a_recipe(recipe_text: str, registry: Registry) -> None:
    """Catches short forms that are not read, a schedule that a recipe's dump loses, and errors without their line."""

    def parse(*overrides: str) -> Recipe:
        return parse_recipe(recipe_text.format(folder="x"), "r.yaml", registry=registry, overrides=overrides)

    recipe = parse(
        "loss.1.weight={name: ramp, start: 0, end: 1, until: 0.5}",
        "teacher.momentum={name: cosine, start: 0.9, end: 1}",
        "train.optimizer.weight_decay={name: cosine, start: 0.04, end: 0.4}",
        "train.schedule=constant",
    )
    assert list(recipe.schedules()) == ["loss.1.weight", "teacher.momentum", "train.optimizer.weight_decay"]
    assert [slot.path for slot in recipe.slots() if slot.cls.kind == "schedule"] == [
        "loss.1.weight",
        "teacher.momentum",
        "train.optimizer.weight_decay",
        "train.schedule",
    ]
    again = parse_recipe(recipe.to_yaml(), "again.yaml", registry=registry)
    assert again == recipe
    assert again.loss[1].config.weight.value(Progress(1, 4)) == 0.5
    with pytest.raises(RecipeErrors) as caught:
        parse(
            "loss.0.weight={name: ramp, start: 0, end: -1}",
            "loss.1.weight={name: ramp, strat: 0, end: 1}",
            "teacher.momentum={name: cosine, start: 0.9, end: 1.5}",
            "train.optimizer.weight_decay=ramq",
            "train.schedule=-1",
        )
    first, *rest = caught.value.lines
    assert first.startswith("--set loss.0.weight: the schedule 'ramp' takes the value -0.01; it must be at least 0")
    assert rest[:2] == [
        "--set loss.1.weight: loss.1.weight.start: is required and not given",
        "--set loss.1.weight: loss.1.weight.strat: unknown option 'strat', did you mean 'start'?",
    ]
    assert rest[2].startswith("--set teacher.momentum: the schedule 'cosine' takes the value 1.0")
    assert rest[3].endswith("must be a number or a schedule; there is no schedule named 'ramq', did you mean 'ramp'?")
    assert rest[4].startswith("--set train.schedule: must be at least 0, got -1")


@pytest.mark.slow
def test_a_run_and_the_run_that_is_resumed(
    tmp_path: Path, recipe_text: str, registry: Registry, write_shards: Callable[..., list[Path]]
) -> None:
    """Catches a weight that is read once, biases that decay, a value a step late, and other values when resumed."""
    for prefix in ("train", "validation", "test"):
        write_shards(tmp_path / "shards", 2, 6, prefix=prefix)
    file = tmp_path / "small.yaml"
    file.write_text(recipe_text.format(folder=tmp_path / "shards"), encoding="utf-8")
    options = [
        "train.steps=6",
        "train.checkpoint.every=2",
        "train.checkpoint.keep=9",
        "loss.1.weight={name: steps, values: [0, 2], at: [0.5]}",
        "train.optimizer.weight_decay={name: ramp, start: 0, end: 0.6}",
        "evaluate=null",
    ]
    recipe = load_recipe(file, registry=registry, overrides=options)
    folder = RunFolder.create(tmp_path / "run", recipe)
    trainer = Trainer(recipe, folder, quiet=True)
    decays: list[set[float]] = []
    optimizer = trainer.train_step.optimizer
    optimizer.register_step_pre_hook(lambda *_: decays.append({g["weight_decay"] for g in optimizer.param_groups}))
    trainer.run()
    assert [max(values) for values in decays] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(min(values) == 0 for values in decays), "norms and biases"
    rows = [row for row in folder.rows() if "terms" in row]
    assert [row["schedules"]["loss.1.weight"] for row in rows] == [0, 0, 0, 2, 2, 2]
    for row in rows:
        terms = row["terms"]
        total = terms["contrastive"] + row["schedules"]["loss.1.weight"] * terms["cross_modal_distillation"]
        assert row["loss"] == pytest.approx(total, rel=1e-6)
    whole = Checkpoints(folder.path).read()
    Trainer(run_recipe(folder.path, registry), RunFolder(folder.path), resume="2", quiet=True).run()
    again = Checkpoints(folder.path).read()
    assert again["step"] == 6
    for name, tensor in whole["objective"].items():
        assert torch.equal(tensor, again["objective"][name]), name
