"""`distill profile`: time by part, and the trace."""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from distill_core.objective import Objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_scale.commands import profile
from distill_scale.profile import Parts
from distill_scale.profile import profile as profile_recipe

ORDER = [
    "data wait",
    "upload",
    "views on the device",
    "teacher",
    "image tower",
    "text tower",
    "fusion",
    "losses",
    "backward",
    "EMA",
    "optimizer",
]


@pytest.mark.slow
def test_parts_of_a_step(tiny_recipe: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step's order; what makes one part slow shows there; the parts are no more than the step."""
    fuse = Objective.fuse

    def slow(self: Objective, *arguments: object) -> object:
        time.sleep(0.05)
        return fuse(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "fuse", slow)
    recipe = load_recipe(tiny_recipe, registry=registry)
    for _ in range(5):
        made = profile_recipe(recipe, steps=3, warmup=1, trace=None)
        if sum(made.parts.values()) > 0.8 * made.step:  # else a busy machine has done something else between two parts
            break
    assert [*made.parts] == ORDER
    assert 0.05 <= made.parts["fusion"] < made.step
    assert all(seconds >= 0 for seconds in made.parts.values())
    assert 0.8 * made.step < sum(made.parts.values()) <= made.step
    assert made.batch_size == 4


@pytest.mark.slow
def test_trace_and_table(tiny_recipe: Path, tmp_path: Path) -> None:
    """The trace has every part once a traced step, with the operators inside it; the table a row for each part."""
    file = tmp_path / "traces" / "t.json"
    result = CliRunner().invoke(profile, [str(tiny_recipe), "--steps", "2", "--warmup", "0", "--trace", str(file)])
    assert result.exit_code == 0, result.output
    for part in [*ORDER, "other", "step"]:
        assert f"\n {part} " in result.output
    events = json.loads(file.read_text())["traceEvents"]
    spans = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in ORDER]
    counts = {part: sum(e["name"] == part for e in spans) for part in ORDER}
    assert counts == dict.fromkeys(ORDER, 2) | {"EMA": 4}  # before the optimiser and after it
    (first, *_) = (e for e in spans if e["name"] == "image tower")
    inside = [
        e for e in events if e.get("name") == "aten::addmm" and first["ts"] <= e["ts"] < first["ts"] + first["dur"]
    ]
    assert inside


def test_json(tiny_recipe: Path) -> None:
    result = CliRunner().invoke(
        profile, [str(tiny_recipe), "--steps", "1", "--warmup", "0", "--json", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    made = json.loads(result.output)
    assert made["device"] == "cpu"
    assert {*made["parts"]} == {*ORDER}
    assert made["trace"] is None


def test_a_trace_is_json(tiny_recipe: Path) -> None:
    result = CliRunner().invoke(profile, [str(tiny_recipe), "--trace", "trace.txt"])
    assert "ends in .json" in str(result.exception)


def test_a_part_ends_where_the_next_begins() -> None:
    """What has begun without an end (the backward pass) lasts until the next part."""
    parts = Parts(torch.device("cpu"))
    parts.timed("losses", lambda: None, then="backward")()
    time.sleep(0.02)
    parts.timed("EMA", lambda: time.sleep(0.01))()
    assert [*parts.seconds] == ["losses", "backward", "EMA"]
    assert parts.seconds["backward"][0] >= 0.02
    assert parts.seconds["EMA"][0] >= 0.01
