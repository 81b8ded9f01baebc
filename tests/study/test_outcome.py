"""What a tracker is told of a study and of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
from score_values import means

from distill_core.contracts.slot import Slot
from distill_core.contracts.tracker import Tracker, TrackerConfig
from distill_core.recipe.document import read_document
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer
from distill_study.grammar import make_study
from distill_study.outcome import publish, study_table, write_files
from distill_study.plan import StudyPlan, check_study

M = "student/retrieval/M"


class Recorder(Tracker):
    """Keeps what it is told."""

    name = "recorder"
    Config = TrackerConfig
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def start(self, folder: str, name: str, recipe: dict[str, Any], resume: bool) -> None:
        self.calls.append(("start", folder, name, recipe["tags"]))

    def log(self, step: int, values: Mapping[str, float], context: Mapping[str, str]) -> None:
        self.calls.append(("log", step, dict(values), dict(context)))

    def describe(self, facts: Mapping[str, Any], tags: Sequence[str]) -> None:
        self.calls.append(("describe", sorted({"versions", "device"} & facts.keys()), list(tags)))

    def image(self, step: int, name: str, picture: Any, caption: str, context: Mapping[str, str]) -> None:
        self.calls.append(("image", name, Path(picture).is_file(), caption, dict(context)))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture
def recorded() -> list[tuple[Any, ...]]:
    Recorder.calls.clear()
    return Recorder.calls


SLOT = Slot(Recorder, TrackerConfig(tags=("mine",), media=0), package="tests", place=("tracking",))


def make(tmp_path: Path, registry: Registry) -> StudyPlan:
    head = f"recipe: tiny.yaml\nseeds: [0, 1]\nscores: [{M}, teacher/retrieval/M]\n"
    text = head + "variants:\n  a: {}\n  b: {fusion.heads: 4}\n"
    plan = check_study(make_study(read_document(text, "s.yaml"), tmp_path, "s"), registry)
    plan.recipes = {name: recipe.model_copy(update={"tracking": SLOT}) for name, recipe in plan.recipes.items()}
    return plan


@pytest.mark.slow
def test_the_study_is_a_run_of_the_tracker(
    tiny_recipe: Path,
    tmp_path: Path,
    registry: Registry,
    recorded: list[tuple[Any, ...]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    plan = make(tmp_path, registry)
    folder = tmp_path / "s"
    for run, value in zip(plan.runs(), (10.0, 13.0, 12.0), strict=False):  # b with seed 1 is missing
        (folder / run.name).mkdir(parents=True)
        rows = [asdict(score) for score in means({M: value}, "M")]
        report = {"scores": rows, "steps": 4, "samples": 16, "seconds": 1.0, "parameters": 1, "split": "test"}
        (folder / run.name / "report.json").write_text(json.dumps(report))
    table = study_table(plan, folder, plan.runs())
    assert "no run has a score 'teacher/retrieval/M', did you mean 'student/retrieval/M'?" in capfd.readouterr().err
    assert [path.name for path in write_files(table, folder)] == ["table.md", "table.tex", "table.json", "study.png"]
    assert "| b | 13.00 (n=1) | +3.00 | 1/2 |" in (folder / "table.md").read_text()
    publish(plan, table, folder)
    assert capfd.readouterr().err == ""
    assert recorded == [
        ("start", str(folder / "summary"), "s", {"study": "s"}),
        ("describe", ["versions"], ["study", "mine"]),
        ("log", 0, {M: 11.0, f"{M}/std": pytest.approx(2**0.5)}, {"study": "s", "variant": "a", "subset": "study"}),
        ("log", 0, {M: 13.0}, {"study": "s", "variant": "b", "subset": "study"}),
        ("image", "study", True, "s", {"study": "s", "subset": "study"}),
        ("finish",),
    ]


@pytest.mark.slow
def test_a_run_of_a_study_is_tracked_with_its_tags_as_context(
    tiny_recipe: Path, tmp_path: Path, registry: Registry, recorded: list[tuple[Any, ...]]
) -> None:
    recipe = make(tmp_path, registry).runs()[3].recipe
    Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True).run()
    tags = {"study": "s", "variant": "b", "seed": 1}
    assert recorded[0] == ("start", str(tmp_path / "runs" / "b-seed1"), "b-seed1", tags)
    contexts = [call[3] for call in recorded if call[0] == "log"]
    words = {"study": "s", "variant": "b", "seed": "1"}
    assert contexts == [{**words, "subset": "train"}] * 4 + [{**words, "subset": "test"}]
