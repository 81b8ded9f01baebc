"""CLIP's loss and its plain views."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from distill_core.types import GLOBAL, Outputs, Sample, View
from distill_towers.captions import OneText, TakeConfig
from distill_towers.contrastive import ContrastiveLoss
from distill_towers.pictures import Area, PictureAugmentation, PictureConfig, Probability, flip, random_resized_crop


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

    def views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """[3, S, S], normalised."""
        picture = random_resized_crop(self.read(sample)[0], self.config.size, self.config.scale, rng)
        return [View(self.normalise(flip(picture, self.config.flip, rng)))]


class WholeCaption(OneText):
    """One text a sample."""

    name = "caption"

    @classmethod
    def roles(cls, config: TakeConfig) -> tuple[str, ...]:
        """One global view."""
        return (GLOBAL,)

    def views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """View.source is the sentence's place in the pool; 0 for all."""
        text, source = self.text(sample, rng)
        return [View(text, source=source)]


class Clip(ContrastiveLoss):
    """Mean of the two cross-entropies of exp(logit_scale) * image @ text.T over the global batch, first views only."""

    name = "clip"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term."""
        keys = [f"student.{modality}" for modality in self.config.modalities]
        pairs = self.pairs(*(outputs.embedding(key)[:1] for key in keys), *(outputs.gather(key)[:1] for key in keys))
        return {"clip": pairs.mean()}, self.metrics()
