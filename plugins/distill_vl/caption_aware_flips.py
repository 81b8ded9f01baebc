"""Flips that a caption allows: a mirrored picture does not go with a text that says left or right of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import Augmentation, ComponentConfig, JointAugmentation, ModalityPlan, Sample, View
from distill_vl.captions import CaptionAugmentation, CaptionConfig

Word = Annotated[str, Field(pattern=r"^\w+$")]
ENDINGS = r"(?:most|wards?|hand(?:ed)?)?"
"""What "left" may end in and still be a side: leftmost, leftwards, lefthand; "left-hand" is two words."""


class CaptionAwareFlipsConfig(ComponentConfig):
    """Which words a mirror makes false, and what is done about them."""

    words: Annotated[tuple[tuple[Word, Word], ...], Field(min_length=1)] = (("left", "right"),)
    """Pairs of words that a mirror exchanges, in any case, also as leftmost, leftwards or left-hand; for other
    languages theirs, as [[links, rechts], [linke, rechte]]."""
    exchange: bool = False
    """What happens to a sample with such a word in one of its texts. False: none of its pictures is mirrored. True: all
    are, or none, as its first was drawn, and in its texts the words are exchanged; for captions in which they always
    mean sides ("he left the room")."""


class CaptionAwareFlips(JointAugmentation):
    """The views of both modalities' own augmentations, but where a text of the sample says left or right: there no
    picture is mirrored, or all are, with the words exchanged."""

    name = "caption_aware_flips"
    Config = CaptionAwareFlipsConfig
    examples = ({}, {"exchange": True})
    config: CaptionAwareFlipsConfig

    def __init__(self, config: CaptionAwareFlipsConfig, parts: Mapping[str, Augmentation]) -> None:
        super().__init__(config, parts)
        texts = [name for name, part in parts.items() if isinstance(part, CaptionAugmentation)]
        flipped = [name for name, part in parts.items() if "flip" in part.extras(part.config)]
        self._texts, self._pictures = _only_both(texts, flipped, list(parts))
        self._other = {a.lower(): b for pair in config.words for a, b in (pair, pair[::-1])}
        self._word = re.compile(rf"\b({'|'.join(map(re.escape, self._other))})(?={ENDINGS}\b)", re.IGNORECASE)

    @classmethod
    def plans(cls, config: CaptionAwareFlipsConfig, own: Mapping[str, ModalityPlan]) -> Mapping[str, ModalityPlan]:
        """Their own. Raises ValueError for others than captions and pictures that may be mirrored."""
        texts = [name for name, plan in own.items() if isinstance(plan.augment, CaptionConfig)]
        _only_both(texts, [name for name, plan in own.items() if "flip" in plan.extras], list(own))
        return own

    def train_views(
        self, sample: Sample, own: Callable[[str], list[View]], rng: np.random.Generator
    ) -> dict[str, list[View]]:
        """Their own draws, with less mirroring."""
        views = {name: own(name) for name in self.parts}
        if not any(self._word.search(view.data) for name in self._texts for view in views[name]):
            return views
        pictures = [view for name in self._pictures for view in views[name]]
        flip = self.config.exchange and bool(pictures[0].extra["flip"])
        views |= {name: [_mirrored(view, flip) for view in views[name]] for name in self._pictures}
        if flip:
            views |= {name: [replace(v, data=self.exchanged(v.data)) for v in views[name]] for name in self._texts}
        return views

    def exchanged(self, text: str) -> str:
        """The text with the words of each pair exchanged, capitals kept."""

        def other(match: re.Match[str]) -> str:
            word, exchange = match[0], self._other[match[0].lower()]
            return exchange.upper() if word.isupper() else exchange.title() if word.istitle() else exchange

        return self._word.sub(other, text)


def _only_both(texts: list[str], pictures: list[str], names: list[str]) -> tuple[list[str], list[str]]:
    """Raises ValueError."""
    if texts and pictures and {*texts, *pictures} == {*names}:
        return texts, pictures
    raise ValueError(
        f"takes pictures whose views have the extra 'flip', and captions; of {', '.join(names)}, pictures are "
        f"{', '.join(pictures) or 'none'}, and captions {', '.join(texts) or 'none'}"
    )


def _mirrored(view: View, flip: bool) -> View:
    """The view [3, S, S] mirrored, or not; recolouring and blur are the same on either side."""
    if bool(view.extra["flip"]) == flip:
        return view
    return View(view.data.flip(-1), view.role, extra={**view.extra, "flip": flip})
