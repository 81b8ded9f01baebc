"""Two texts a sample: what the web says of a picture, and what a model says that it shows (TIPS, section 3.1)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core.types import GLOBAL, Sample, View
from distill_towers.captions import CaptionAugmentation, CaptionConfig, join


class TwoCaptionsConfig(CaptionConfig):
    """The pool's first sentence is the web's caption (DreamLIP's `raw_caption`, PixelProse's `original_caption`, the
    first of `captions`, or of a `txt`); the rest is the synthetic one."""

    sentences: Annotated[int, Field(gt=0)] | None = None
    """The most sentences of the synthetic caption, drawn at random and left in their order; null takes all."""


class TwoCaptions(CaptionAugmentation):
    """The web's caption, then the synthetic one; a sample of a single sentence gives it as both."""

    name = "two_captions"
    Config = TwoCaptionsConfig

    @classmethod
    def roles(cls, config: TwoCaptionsConfig) -> tuple[str, ...]:
        """Two global views."""
        return (GLOBAL, GLOBAL)

    def views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """View.source is the place in the pool of the (first) sentence."""
        pool = self.pool(sample)
        rest = list(range(1, len(pool))) or [0]
        if self.config.sentences is not None:
            rest = sorted(int(i) for i in rng.permutation(rest)[: self.config.sentences])
        return [View(pool[0]), View(join([pool[i] for i in rest]), source=rest[0])]
