"""Diverse caption sampling (FLAIR, section 3.1): short and long texts, of neighbouring or of scattered sentences."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import GLOBAL, Sample, View
from distill_vl.captions import CaptionAugmentation, CaptionConfig, join


class SampledCaptionsConfig(CaptionConfig):
    """Defaults are the paper's: 8 texts of 1 to 3 sentences."""

    captions: Annotated[int, Field(gt=0)] = 8
    """Texts a sample, K."""
    sentences: Annotated[int, Field(gt=0)] = 3
    """The most sentences of a text; the number is uniform."""


class SampledCaptions(CaptionAugmentation):
    """K texts of 1 to `sentences` sentences each, with equal odds neighbours or drawn from anywhere."""

    name = "sampled_captions"
    Config = SampledCaptionsConfig
    wants_several = True

    @classmethod
    def roles(cls, config: SampledCaptionsConfig) -> tuple[str, ...]:
        return (GLOBAL,) * config.captions

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Texts of the sample's sentences. A pool that is too small is taken whole."""
        pool = self.pool(sample, rng)
        views = []
        for _ in range(self.config.captions):
            count = min(int(rng.integers(1, self.config.sentences + 1)), len(pool))
            if rng.random() < 0.5:
                first = int(rng.integers(len(pool) - count + 1))
                chosen = list(range(first, first + count))
            else:
                chosen = [int(i) for i in rng.permutation(len(pool))[:count]]
            views.append(View(join([pool[i] for i in chosen])))
        return views
