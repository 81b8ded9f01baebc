"""Two texts a sample: what the web says of a picture, and what a model says that it shows (TIPS, section 3.1)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import GLOBAL, BadSample, Sample, View
from distill_vl.captions import CaptionAugmentation, CaptionConfig, join, lines

WEB = ("raw_caption", "original_caption")
"""The web's caption in the layouts that have one, DreamLIP's and PixelProse's."""


class TwoCaptionsConfig(CaptionConfig):
    """Which caption is the web's, and how much of the others a step sees."""

    web: str | None = None
    """The json's field that holds the web's caption; null takes DreamLIP's `raw_caption` or PixelProse's
    `original_caption`. The synthetic caption is all others. A sample that lacks one of the two is bad, and skipped: a
    synthetic text in the web's place would teach its class token the other's task."""
    sentences: Annotated[int, Field(gt=0)] | None = None
    """The most sentences of the synthetic caption, drawn at random and left in their order; null takes all."""


class TwoCaptions(CaptionAugmentation):
    """The web's caption, whole, then the synthetic one."""

    name = "two_captions"
    Config = TwoCaptionsConfig

    @classmethod
    def roles(cls, config: TwoCaptionsConfig) -> tuple[str, ...]:
        return (GLOBAL, GLOBAL)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """The web's caption, then the synthetic one."""
        every = self.captions(sample)
        web = self.web(sample)
        own = (self.config.web,) if self.config.web is not None else WEB
        captions = {field: caption for field, caption in every.items() if field not in own}
        drawn = self.texts(sample, rng).keys() & captions.keys() or captions.keys()
        # a data set may have the web's caption among the sentences as well, as the emoji's name is
        rest = [text for field in captions if field in drawn for text in captions[field] if text != web]
        if not rest:
            raise BadSample("no synthetic caption beside the web's")
        chosen = list(range(len(rest)))
        if self.config.sentences is not None:
            chosen = sorted(int(i) for i in rng.permutation(chosen)[: self.config.sentences])
        return [View(web), View(join([rest[i] for i in chosen]))]

    def web(self, sample: Sample) -> str:
        """The web's caption. Raises `BadSample` when there is none."""
        if self.config.web is not None:
            texts = self.decode(sample, self.config.web)
        else:
            by_field = self.texts(sample)
            texts = next((by_field[field] for field in WEB if field in by_field), [])
        if not texts:
            raise BadSample(
                f"no caption of the web: neither {' nor '.join(WEB)}; name the json's field that holds it by the "
                "option `web`"
            )
        return join([line for text in texts for line in lines(text)])
