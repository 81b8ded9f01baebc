"""FLAVA's views: a picture and a text, each once as it is and once to be masked by the backbone's collator."""

from __future__ import annotations

import numpy as np

from distill_core import GLOBAL, Sample, View
from distill_vl.captions import OneText, TakeConfig
from distill_vl.masking import MASKED
from distill_vl.pictures import Probability
from distill_vl.random_crop import RandomCrop, RandomCropConfig


class FlavaImageConfig(RandomCropConfig):
    """Which crop a step sees."""

    flip: Probability = 0.5
    """Probability of a horizontal flip."""


class FlavaImage(RandomCrop):
    """One crop [3, S, S] twice: a global view, and one of the role `masked`."""

    name = "flava_image"
    Config = FlavaImageConfig

    @classmethod
    def roles(cls, config: RandomCropConfig) -> tuple[str, ...]:
        return (GLOBAL, MASKED)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Both views hold the same pixels."""
        (view,) = super().train_views(sample, rng)
        return [view, View(view.data, MASKED, extra=view.extra)]


class FlavaText(OneText):
    """One text twice: a global view, and one of the role `masked`."""

    name = "flava_text"

    @classmethod
    def roles(cls, config: TakeConfig) -> tuple[str, ...]:
        return (GLOBAL, MASKED)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Both views hold the same text."""
        text = self.text(sample, rng)
        return [View(text, GLOBAL), View(text, MASKED)]
