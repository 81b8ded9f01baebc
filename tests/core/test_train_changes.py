"""A run that is resumed with another recipe than it was saved under: applied and said, or refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_core.errors import RecipeErrors
from distill_core.recipe.changes import changes
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

PLAIN = ("fusion=null", "teacher=null", "loss=[{name: contrastive}]", "evaluate=null")
Resume = Callable[..., Trainer]


@pytest.fixture
def resume(tiny_recipe: Path, registry: Registry, tmp_path: Path) -> Resume:
    """The trainer of a run of two steps, resumed with these changes to its recipe."""

    def make(*overrides: str) -> Trainer:
        recipe = load_recipe(tiny_recipe, registry=registry, overrides=[*PLAIN, "train.steps=2"])
        folder = RunFolder.create(tmp_path / "runs", recipe)
        Trainer(recipe, folder, quiet=True).run()
        changed = load_recipe(folder.path / "recipe.yaml", registry=registry, overrides=["train.steps=4", *overrides])
        return Trainer(changed, RunFolder(folder.path), resume="last", quiet=True)

    return make


@pytest.mark.slow
def test_what_is_applied(resume: Resume, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches options of the optimiser that the checkpoint's state writes over, a decay that parameters get which are
    to have none, and changes without a word."""
    trainer = resume(
        "train.optimizer.weight_decay=0.25",
        "train.optimizer.betas=[0.8, 0.9]",
        "train.optimizer.eps=1e-4",
        "train.optimizer.lr=0.01",
        "data.workers=1",
    )
    first = {name: value.clone() for name, value in trainer.train_step.optimizer.state_dict()["state"][0].items()}
    trainer.run()
    saved = Checkpoints(trainer.folder.path).read()
    options = [group["options"] for group in saved["optimizer"]["groups"]]
    decays = [group["weight_decay"] for group in options]
    assert sorted(decays) == [0.0, 0.25]
    for group in options:
        assert (list(group["betas"]), group["eps"]) == ([0.8, 0.9], 1e-4)
    # the schedule is at its half after 2 of 4 steps
    rows = [row for row in trainer.folder.rows() if "terms" in row]
    assert rows[-1]["lr"] < 0.01
    assert rows[-1]["lr"] > 10 * 1e-4
    assert float(first["step"]) == 2.0, "its moments are the checkpoint's"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the recipe has changed since step 2" in line]
    for change in (
        "train.steps 2 -> 4",
        "train.optimizer.weight_decay 0.5 -> 0.25",
        "train.optimizer.betas [0.9, 0.98] -> [0.8, 0.9]",
        "train.optimizer.lr 0.001 -> 0.01",
        "data.workers 0 -> 1",
    ):
        assert change in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "data.shuffle=5",
            "data.shuffle is 5, and was 4 in the checkpoint: the order of the samples would change within a pass",
        ),
        ("data.batch_size=2", "data.batch_size is 2, and was 4 in the checkpoint: its steps, schedule and passes"),
        ("freeze=[backbone.text]", "freeze is ['backbone.text'], and was [] in the checkpoint: the optimiser"),
        (
            "train.lr_factors={backbone.text: 0.1}",
            "train.lr_factors.backbone.text is 0.1, and was None in the checkpoint",
        ),
        ("seed=7", "seed is 7, and was 0 in the checkpoint: the order of the samples would change within a pass"),
    ],
)
def test_what_is_refused(resume: Resume, change: str, said: str) -> None:
    """Catches a traceback, an AssertionError of the loader, and a run that is neither the old nor a new one."""
    with pytest.raises(RecipeErrors) as caught:
        resume(change)
    (line,) = caught.value.lines
    assert f"recipe.yaml: {said}" in line
    assert "Set it back, or start a new run: weights: [{name: state_dict, source: " in line


def test_nothing_is_said_where_nothing_changed(resume: Resume, capsys: pytest.CaptureFixture[str]) -> None:
    resume("train.steps=2").run()
    assert "warning" not in capsys.readouterr().err


def test_changes() -> None:
    """By hand: options, components in another's place, lists of another length, and sections that come and go."""
    before: dict[str, Any] = {
        "name": "a",
        "loss": [{"name": "x", "weight": 1.0}, {"name": "y"}],
        "fusion": {"name": "f", "heads": 2},
        "teacher": None,
        "freeze": ["p"],
        "data": {"source": {"name": "s", "urls": ["1", "2"]}, "workers": 1},
    }
    assert changes(before, copy.deepcopy(before)) == {}
    now = copy.deepcopy(before)
    now["name"] = "b"
    now["loss"][0]["weight"] = 2.0
    now["loss"][1] = {"name": "z", "more": 1}
    now["fusion"] = None
    now["teacher"] = {"momentum": 0.9}
    now["freeze"] = ["q"]
    now["data"]["source"]["urls"] = ["1"]
    assert changes(before, now) == {
        "name": ("a", "b"),
        "loss.0.weight": (1.0, 2.0),
        "loss.1.name": ("y", "z"),
        "fusion": ({"name": "f", "heads": 2}, None),
        "teacher": (None, {"momentum": 0.9}),
        "freeze": (["p"], ["q"]),
        "data.source.urls": (["1", "2"], ["1"]),
    }
    now["loss"] = now["loss"][:1]
    assert changes(before, now)["loss"] == (before["loss"], now["loss"])
