"""Overlays: what they show, and what they never overwrite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from colours import COLOURS, painted, sample

from distill_core.errors import UserError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.registry import Registry
from distill_core.resolve import load_recipe
from distill_segment.commands import _free, segment
from distill_segment.task import Segmentation, SegmentationConfig
from distill_towers.example import model


def test_an_overlay_shows_what_was_found(sees_colours: Any) -> None:
    """Blue where the truth says green: the third picture is painted as class 2, the second as class 1."""
    from distill_segment.overlays import ALPHA, GAP, LINE, SIDE, colour

    here = EvaluationSet("set", [sample(painted([["blue"]], 12), np.ones((12, 12)))])
    task = Segmentation(SegmentationConfig())
    task.run(sees_colours, [here])
    (made,) = task.media(sees_colours, [here], 3)
    assert (made.name, made.caption, made.context) == ("overlay", "one", {"set": "set", "sample": "one"})
    for column, number in ((1, 1), (2, 2)):
        seen = made.picture.getpixel((GAP + column * (SIDE + GAP) + SIDE // 2, LINE + SIDE // 2))
        mixed = [(1 - ALPHA) * a + ALPHA * b for a, b in zip(COLOURS["blue"], colour(number), strict=True)]
        assert seen == pytest.approx(mixed, abs=1)
    assert made.picture.getpixel((GAP + SIDE // 2, LINE + SIDE // 2)) == COLOURS["blue"]


def test_overlays_of_pictures_replace_nothing(
    tiny_recipe: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Same names in two folders, keys that differ in / and _, a folder that holds the pictures themselves."""

    def recipe(run: Path, registry: Registry, changes: Sequence[tuple[str, str]]) -> Any:
        return load_recipe(tiny_recipe, registry=registry, overrides=[change for change, _ in changes])

    monkeypatch.setattr("distill_core.model.run_recipe", recipe)
    monkeypatch.setattr("distill_core.model.load_model", lambda *_, **__: model())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("red\ngreen\n")
    inputs = ["1.png", "a/1.png", "b/1.png", "1-classes-2.png"]
    for name in inputs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(painted([["red"]], 20))

    def call(*given: str) -> list[str]:
        arguments = ["run", *given, "--task", "{name: segmentation, classes: c.txt}"]
        return CliRunner().invoke(segment, arguments, catch_exceptions=False).output.split()

    assert call("1.png", "--out", ".") == ["1-classes.png"]
    written = call("a/1.png", "b/1.png", "1-classes-2.png", "--out", "out")
    assert written == ["out/1-classes.png", "out/1-classes-2.png", "out/1-classes-2-classes.png"]
    assert all((tmp_path / name).is_file() for name in written)
    with pytest.raises(UserError, match=r"1-classes-2\.png: is one of the pictures to paint; give another folder"):
        call("a/1.png", "b/1.png", "1-classes-2.png", "--out", ".")
    for name in inputs:
        assert (tmp_path / name).read_bytes() == painted([["red"]], 20)
    taken: set[str] = set()
    assert [_free(tmp_path, key, taken).name for key in ("a/b", "a_b")] == ["a_b-classes.png", "a_b-classes-2.png"]
