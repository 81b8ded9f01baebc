"""Sub-captions (DreamLIP, section 3.2): single sentences out of a picture's long captions."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import GLOBAL, Sample, View
from distill_vl.captions import CaptionAugmentation, CaptionConfig, draw


class SubCaptionsConfig(CaptionConfig):
    """How many sentences a step sees."""

    count: Annotated[int, Field(gt=0)] = 8
    """Sub-captions K a sample: one sentence each, drawn without replacement; a sample with fewer repeats some, which
    then are negatives of each other in `subcaption_grouping`."""
    always: tuple[str, ...] = ()
    """Fields of which a caption, whole and drawn at random, is always among the K, before the others: [raw], as the
    public code has it. Those are drawn of the other fields, and are other texts, where the sample has some."""


class SubCaptions(CaptionAugmentation):
    """K sentences of the sample's pool, each a global view."""

    name = "sub_captions"
    Config = SubCaptionsConfig
    wants_several = True

    @classmethod
    def roles(cls, config: SubCaptionsConfig) -> tuple[str, ...]:
        return (GLOBAL,) * config.count

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        captions = self.captions(sample, rng)
        texts = []
        for field in self.config.always[: self.config.count]:
            if whole := self.of_fields(sample, [field]):
                texts.append(whole[int(rng.integers(len(whole)))])
        every = [(field, sentence) for field, sentences in captions.items() for sentence in sentences]
        taken = {field for name in self.config.always for field in (name, *self.reader.groups.get(name, ()))}
        # a data set may have the caption among the sentences as well, as the emoji's name is
        others = [sentence for field, sentence in every if field not in taken and sentence not in texts]
        pool = others or [sentence for _, sentence in every]
        texts += [pool[i] for i in draw(len(pool), self.config.count - len(texts), rng)]
        return [View(text) for text in texts]
