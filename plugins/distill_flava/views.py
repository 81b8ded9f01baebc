"""FLAVA's views: a picture and a text, each once as it is and once to be masked by the backbone's collator."""

from __future__ import annotations

import numpy as np

from distill_core import GLOBAL, Sample, View
from distill_vl.captions import OneText, TakeConfig
from distill_vl.masking import MASKED
from distill_vl.pictures import Area, PictureAugmentation, PictureConfig, Probability, flip, random_resized_crop


class FlavaImageConfig(PictureConfig):
    """Which crop a step sees."""

    scale: tuple[Area, Area] = (0.9, 1.0)
    """Share of the picture's area that the crop covers."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""


class FlavaImage(PictureAugmentation):
    """One crop [3, S, S] twice: a global view, and one of the role `masked`."""

    name = "flava_image"
    Config = FlavaImageConfig

    @classmethod
    def roles(cls, config: FlavaImageConfig) -> tuple[str, ...]:
        """Global, masked."""
        return (GLOBAL, MASKED)

    @classmethod
    def shapes(cls, config: FlavaImageConfig) -> tuple[tuple[int, ...], ...]:
        """[3, S, S] of each."""
        return ((3, config.size, config.size),) * len(cls.roles(config))

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Both views hold the same pixels."""
        picture = random_resized_crop(self.decode(sample)[0], self.config.size, self.config.scale, rng)
        pixels = self.normalise(flip(picture, self.config.flip, rng))
        return [View(pixels, GLOBAL), View(pixels, MASKED)]


class FlavaText(OneText):
    """One text twice: a global view, and one of the role `masked`."""

    name = "flava_text"

    @classmethod
    def roles(cls, config: TakeConfig) -> tuple[str, ...]:
        """Global, masked."""
        return (GLOBAL, MASKED)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Both views hold the same text."""
        text = self.text(sample, rng)
        return [View(text, GLOBAL), View(text, MASKED)]
