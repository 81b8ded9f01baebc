"""CLIP's loss and its plain views."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.components import Loss, LossConfig, Needs, Plan, same_dim
from distill_core.distributed import rank, world_size
from distill_core.types import GLOBAL, Outputs, Progress, Sample, View
from distill_kernels import multi_view_info_nce
from distill_towers.captions import CaptionAugmentation, CaptionConfig, join
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


class ClipConfig(LossConfig):
    """Options of CLIP's loss."""

    modalities: tuple[str, str] = ("image", "text")
    """The two modalities that are paired."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """The scale starts at ln(1 / temperature)."""
    max_scale: Annotated[float, Field(ge=1)] = 100.0
    """The scale is clamped to [0, ln max_scale] after each step."""


class Clip(Loss):
    """Mean of the two cross-entropies of exp(logit_scale) * image @ text.T over the global batch, first views only."""

    name = "clip"
    Config = ClipConfig

    def __init__(self, config: ClipConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    @classmethod
    def needs(cls, config: ClipConfig, plan: Plan) -> Needs:
        """Both modalities."""
        return Needs(modalities=config.modalities)

    @classmethod
    def problems(cls, config: ClipConfig, plan: Plan) -> Iterable[str]:
        """One width D on both sides."""
        return same_dim(cls.name, config.modalities, plan)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term."""
        a, b = (outputs.embedding(f"student.{m}")[:1] for m in self.config.modalities)
        a_all, b_all = (outputs.gather(f"student.{m}")[:1] for m in self.config.modalities)
        with torch.autocast(a.device.type, enabled=False):
            scale = self.logit_scale.exp()
            if world_size() == 1:
                pairs = multi_view_info_nce(a, b, scale)
            else:
                pairs = multi_view_info_nce(a, b, scale, a_all=a_all, b_all=b_all, offset=rank() * a.shape[1])
        return {"clip": pairs.mean()}, {"scale": scale.detach()}

    @torch.no_grad()
    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        """Clamp the learned scale to [0, ln max_scale]."""
        self.logit_scale.clamp_(0.0, math.log(self.config.max_scale))
