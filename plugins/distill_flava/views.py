"""FLAVA's views: a picture and a text, each once as it is and once to be masked by the backbone's collator."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from distill_core.types import GLOBAL, Sample, View
from distill_towers.captions import CaptionAugmentation, CaptionConfig, join
from distill_towers.pictures import Area, PictureAugmentation, PictureConfig, Probability, random_resized_crop

MASKED = "masked"


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

    def views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Both views hold the same pixels."""
        picture = random_resized_crop(self.read(sample)[0], self.config.size, self.config.scale, rng)
        if rng.random() < self.config.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = self.normalise(picture)
        return [View(pixels, GLOBAL), View(pixels, MASKED)]


class FlavaTextConfig(CaptionConfig):
    """Which text a step sees."""

    take: Literal["all", "one"] = "all"
    """All sentences joined, or one drawn at random."""


class FlavaText(CaptionAugmentation):
    """One text twice: a global view, and one of the role `masked`."""

    name = "flava_text"
    Config = FlavaTextConfig

    @classmethod
    def roles(cls, config: FlavaTextConfig) -> tuple[str, ...]:
        """Global, masked."""
        return (GLOBAL, MASKED)

    def views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """View.source is the sentence's place in the pool; 0 for all."""
        pool = self.pool(sample)
        chosen = int(rng.integers(len(pool))) if self.config.take == "one" else 0
        text = pool[chosen] if self.config.take == "one" else join(pool)
        return [View(text, GLOBAL, chosen), View(text, MASKED, chosen)]
