"""Overlays: what they show, and what they never overwrite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from colours import COLOURS, painted, sample
from PIL import Image

from distill_core.errors import UserError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_segment.commands import _free, segment
from distill_segment.task import Segmentation, SegmentationConfig
from distill_vl.example import model


def test_an_overlay_shows_what_was_found(sees_colours: Any) -> None:
    """Blue where the truth says green: each is painted as its own entry of the legend."""
    from distill_segment.overlays import ALPHA, GAP, LINE, SIDE, colour

    here = EvaluationSet("set", [sample(painted([["blue"]], 12), np.ones((12, 12)))])
    task = Segmentation(SegmentationConfig())
    task.run(sees_colours, [here])
    (made,) = task.media(sees_colours, [here], 3)
    assert (made.name, made.caption, made.context) == ("overlay", "one", {"set": "set", "sample": "one"})
    grey = 255 - (255 - Image.new("RGB", (1, 1), COLOURS["blue"]).convert("L").getpixel((0, 0))) / 2  # type: ignore[operator]
    for column, place in ((1, 0), (2, 1)):
        seen = made.picture.getpixel((GAP + column * (SIDE + GAP) + SIDE // 2, LINE + SIDE // 2))
        assert seen == pytest.approx([(1 - ALPHA) * grey + ALPHA * part for part in colour(place)], abs=1)
    assert made.picture.getpixel((GAP + SIDE // 2, LINE + SIDE // 2)) == COLOURS["blue"]


def test_colours_are_those_of_the_legend_and_can_be_told_apart() -> None:
    """Of 40 classes: the truth's and the largest found have colours, the others are one grey, the background none.

    Would catch hues that the picture shifts into another's, and a legend of all that was found.
    """
    from distill_segment.overlays import FEW, choose_colours, on_grey, overlay

    names = ["background", *(f"c{i}" for i in range(1, 40))]
    found = np.repeat(np.arange(40), np.arange(40) + 1).reshape(20, 41)  # class i has i + 1 pixels
    truth = np.full_like(found, 255)
    truth[0], truth[1, :2] = 0, 3
    colours, others = choose_colours(found, truth, names)
    assert list(colours) == [*range(39, 39 - FEW, -1), 3], "by size"
    assert others == 40 - 1 - FEW - 1
    assert choose_colours(found, None, names)[1] == 40 - 1 - FEW
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 41, 3), dtype=np.uint8))
    drawn = np.asarray(overlay(picture, found, names, colours)).astype(int)
    entries = np.array([on_grey(paint) for paint in colours.values()])
    for i, place in zip(colours, range(len(colours)), strict=True):
        nearest = np.abs(drawn[found == i][:, None] - entries).sum(-1).argmin(1)
        assert (nearest == place).all()
    for i in (0, 1, 20):
        assert np.ptp(drawn[found == i], axis=1).max() == 0, "no hue"
    assert drawn[found == 0].min() > 120 > drawn[found == 20].max()
    first = np.array(list(colours.values())[:FEW])
    apart = np.abs(first[:, None] - first).sum(-1) + np.eye(FEW, dtype=int) * 999
    assert apart.min() > 100


def test_overlays_of_pictures_replace_nothing(
    tiny_recipe: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Same names in two folders, keys that differ in / and _, a folder that holds the pictures themselves."""

    def recipe(run: Path, registry: Registry, changes: Sequence[tuple[str, str]]) -> Any:
        return load_recipe(tiny_recipe, registry=registry, overrides=[change for change, _ in changes])

    monkeypatch.setattr("distill_core.run.load.run_recipe", recipe)
    monkeypatch.setattr("distill_core.run.load.load_model", lambda *_, **__: model())
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
