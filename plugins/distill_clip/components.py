"""CLIP's loss and its plain views."""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from distill_core.types import GLOBAL, Outputs, Sample, View
from distill_towers.captions import CaptionAugmentation, CaptionConfig, join
from distill_towers.contrastive import ContrastiveLoss
from distill_towers.pictures import Area, PictureAugmentation, PictureConfig, Probability, random_resized_crop


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

    def views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """[3, S, S], normalised."""
        from PIL import Image

        picture = random_resized_crop(self.read(sample)[0], self.config.size, self.config.scale, rng)
        if rng.random() < self.config.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return [View(self.normalise(picture))]


class WholeCaptionConfig(CaptionConfig):
    """Which text a step sees."""

    take: Literal["all", "one"] = "all"
    """All sentences joined, or one drawn at random."""


class WholeCaption(CaptionAugmentation):
    """One text a sample."""

    name = "caption"
    Config = WholeCaptionConfig

    @classmethod
    def roles(cls, config: WholeCaptionConfig) -> tuple[str, ...]:
        """One global view."""
        return (GLOBAL,)

    def views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """View.source is the sentence's place in the pool; 0 for all."""
        pool = self.pool(sample)
        if self.config.take == "all":
            return [View(join(pool))]
        chosen = int(rng.integers(len(pool)))
        return [View(pool[chosen], source=chosen)]


class Clip(ContrastiveLoss):
    """Mean of the two cross-entropies of exp(logit_scale) * image @ text.T over the global batch, first views only."""

    name = "clip"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term."""
        keys = [f"student.{modality}" for modality in self.config.modalities]
        pairs = self.pairs(*(outputs.embedding(key)[:1] for key in keys), *(outputs.gather(key)[:1] for key in keys))
        return {"clip": pairs.mean()}, self.metrics()
