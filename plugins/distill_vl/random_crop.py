"""One random crop: the image view of methods without multi-crop."""

from __future__ import annotations

import numpy as np

from distill_core import GLOBAL, Sample, View
from distill_vl.pictures import Area, Crop, PictureAugmentation, PictureConfig, Probability, crop_box


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
        """uint8; `PictureAugmentation.on_device` normalises it."""
        config = self.config
        return self.train_crops(
            sample,
            lambda width, height: [
                Crop(crop_box(width, height, config.scale, rng), config.size, rng.random() < config.flip)
            ],
        )
