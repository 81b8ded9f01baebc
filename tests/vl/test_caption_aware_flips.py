"""Which texts name a side, and what becomes of the words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distill_core import View
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_vl.caption import WholeCaption
from distill_vl.caption_aware_flips import CaptionAwareFlips, CaptionAwareFlipsConfig
from distill_vl.random_crop import RandomCrop


def make(**options: Any) -> CaptionAwareFlips:
    parts = {
        "text": WholeCaption(WholeCaption.Config()),
        "image": RandomCrop(RandomCrop.Config(size=4, flip=1.0)),
    }
    return CaptionAwareFlips(CaptionAwareFlipsConfig(**options), parts)


def drawn(joint: CaptionAwareFlips, *texts: str) -> tuple[list[bool], list[str]]:
    """The flips and texts of a sample with two mirrored pictures."""
    import torch

    picture = View(torch.arange(12).view(3, 2, 2), extra={"flip": True})
    own = {"image": [picture, picture], "text": [View(text) for text in texts]}
    views = joint.train_views({}, own.__getitem__, np.random.default_rng(0))
    columns = [view.data[0, 0, 0].item() == 0 for view in views["image"]]  # as it was made, which is mirrored
    assert columns == [bool(view.extra["flip"]) for view in views["image"]]
    return columns, [str(view.data) for view in views["text"]]


@pytest.mark.parametrize(
    "text",
    ["a cup left of a plate", "Right: a dog", "on the LEFT.", "the leftmost of three", "in its left-hand corner",
     "it looks leftwards", "righthand", "he left"],
)  # fmt: skip
def test_what_names_a_side(text: str) -> None:
    """One text of several is enough. Would catch a capital or an ending that hides the word."""
    assert drawn(make(), "a cup", text) == ([False, False], ["a cup", text])


@pytest.mark.parametrize("text", ["a bright cup", "leftovers", "copyright", "rights of way", "rightly so", "a cleft"])
def test_what_names_none(text: str) -> None:
    """Would catch words that hold the letters, where mirroring would be lost for nothing."""
    assert drawn(make(), text) == ([True, True], [text])


def test_words_that_are_exchanged() -> None:
    texts = ["A cup LEFT of a plate, right of it the leftmost", "Right-hand drive", "a leftover cup"]
    expected = ["A cup RIGHT of a plate, left of it the rightmost", "Left-hand drive", "a leftover cup"]
    assert drawn(make(exchange=True), *texts) == ([True, True], expected)


def test_words_of_another_language() -> None:
    """Would catch English ones that are still looked for, and a form that is taken for a shorter one."""
    words = (("links", "rechts"), ("linke", "rechte"))
    own = make(words=words, exchange=True)
    assert drawn(own, "Links der Tasse, die rechte Hand") == ([True, True], ["Rechts der Tasse, die linke Hand"])
    assert drawn(make(words=words), "links der Tasse")[0] == [False, False]
    assert drawn(make(words=words), "left of the cup")[0] == [True, True]


def test_it_takes_pictures_and_captions(registry: Registry) -> None:
    """Refused before anything is read."""
    options = ["augment.text={name: random_crop}", "augment.image+text=caption_aware_flips"]
    with pytest.raises(RecipeErrors, match=r"'caption_aware_flips': takes pictures .* and captions") as caught:
        load_recipe("clip_tiny", registry=registry, overrides=options)
    assert any("augment.image+text" in line for line in caught.value.lines)
    assert load_recipe("cosmos_tiny", registry=registry, overrides=options[1:]).joint
