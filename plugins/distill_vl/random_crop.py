"""One random crop: the image view of methods without multi-crop."""

from __future__ import annotations

import numpy as np

from distill_core import GLOBAL, Sample, View
from distill_vl.pictures import Area, PictureAugmentation, PictureConfig, Probability, flip, random_resized_crop


class RandomCropConfig(PictureConfig):
    """Defaults are open_clip's."""

    scale: tuple[Area, Area] = (0.9, 1.0)
    """Share of the picture's area that the crop covers."""
    flip: Probability = 0.0
    """Probability of a horizontal flip."""


class RandomCrop(PictureAugmentation):
    """One crop of `size` pixels."""

    name = "random_crop"
    Config = RandomCropConfig

    @classmethod
    def roles(cls, config: RandomCropConfig) -> tuple[str, ...]:
        """One global view."""
        return (GLOBAL,)

    @classmethod
    def shapes(cls, config: RandomCropConfig) -> tuple[tuple[int, ...], ...]:
        """[3, S, S] of each."""
        return ((3, config.size, config.size),) * len(cls.roles(config))

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """[3, S, S], normalised."""
        picture = random_resized_crop(self.decode(sample)[0], self.config.size, self.config.scale, rng)
        return [View(self.normalise(flip(picture, self.config.flip, rng)))]
