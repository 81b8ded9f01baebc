"""SLIP's views (section 3.2): a mild crop that is paired with the text, and two strong ones for SimCLR."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field

from distill_core import GLOBAL, Sample, View
from distill_vl.pictures import (
    Area,
    Jitter,
    PictureAugmentation,
    PictureConfig,
    Probability,
    colour_jitter,
    flip,
    random_resized_crop,
)

SIMCLR = "simclr"
"""The role of the two strong views."""


class SlipViewsConfig(PictureConfig):
    """Defaults are SLIP's public code's; all views have `size` pixels."""

    clip_scale: tuple[Area, Area] = (0.5, 1.0)
    """Share of the picture's area that the global view covers."""
    scale: tuple[Area, Area] = (0.08, 1.0)
    """Share of the picture's area that a SimCLR view covers."""
    flip: Probability = 0.5
    """Probability of a horizontal flip of a SimCLR view."""
    jitter: Jitter = (0.4, 0.4, 0.4, 0.1)
    """Strengths of brightness, contrast, saturation and hue, in random order, on SimCLR views."""
    jitter_p: Probability = 0.8
    """Probability of the colour jitter."""
    grey: Probability = 0.2
    """Probability of a grey SimCLR view."""
    blur: Probability = 0.5
    """Probability of Gaussian blur on a SimCLR view."""
    blur_radius: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.1, 2.0)
    """Radius of the blur in pixels, uniform between the two."""


class SlipViews(PictureAugmentation):
    """One global view, cropped only, and two of the role `simclr`, cropped, recoloured, blurred and flipped."""

    name = "slip_views"
    Config = SlipViewsConfig

    @classmethod
    def roles(cls, config: SlipViewsConfig) -> tuple[str, ...]:
        """The global view, then SimCLR's two."""
        return (GLOBAL, SIMCLR, SIMCLR)

    @classmethod
    def shapes(cls, config: SlipViewsConfig) -> tuple[tuple[int, ...], ...]:
        """[3, S, S] of each."""
        return ((3, config.size, config.size),) * len(cls.roles(config))

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """[3, S, S] each, normalised."""
        picture, config = self.decode(sample)[0], self.config
        views = [View(self.normalise(random_resized_crop(picture, config.size, config.clip_scale, rng)))]
        return views + [View(self.normalise(self._strong(picture, rng)), SIMCLR) for _ in range(2)]

    def _strong(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        config = self.config
        picture = random_resized_crop(picture, config.size, config.scale, rng)
        if rng.random() < config.jitter_p:
            picture = colour_jitter(picture, config.jitter, rng)
        if rng.random() < config.grey:
            picture = picture.convert("L").convert("RGB")
        if rng.random() < config.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*config.blur_radius)))
        return flip(picture, config.flip, rng)
