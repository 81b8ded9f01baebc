"""Text cropping (COSMOS, section 3.2): global texts of several sentences, local texts of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import GLOBAL, LOCAL, Sample, View
from distill_vl.captions import CaptionAugmentation, CaptionConfig, draw, join


class TextCropConfig(CaptionConfig):
    """Defaults are the paper's: 2 global texts of 1 to 5 sentences and 6 local texts of one sentence."""

    globals_: Annotated[int, Field(alias="global", gt=0)] = 2
    """Global texts: 1 to `sentences` sentences each, drawn without replacement, joined in the order drawn."""
    local: Annotated[int, Field(ge=0)] = 6
    """Local texts: one sentence each, drawn without replacement."""
    sentences: Annotated[int, Field(gt=0)] = 5
    """The most sentences of a global text; the number is uniform."""


class TextCrop(CaptionAugmentation):
    """A sample's pool of sentences -> global and local texts."""

    name = "text_crop"
    Config = TextCropConfig
    wants_several = True

    @classmethod
    def roles(cls, config: TextCropConfig) -> tuple[str, ...]:
        return (GLOBAL,) * config.globals_ + (LOCAL,) * config.local

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        pool = self.pool(sample, rng)
        views = self.global_views(pool, rng)
        return views + [View(pool[i], LOCAL) for i in draw(len(pool), self.config.local, rng)]

    def global_views(self, pool: Sequence[str], rng: np.random.Generator) -> list[View]:
        """The global texts alone."""
        views = []
        for _ in range(self.config.globals_):
            chosen = draw(len(pool), int(rng.integers(1, self.config.sentences + 1)), rng)
            views.append(View(join([pool[i] for i in chosen]), GLOBAL))
        return views
