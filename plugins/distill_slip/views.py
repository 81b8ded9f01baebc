"""SLIP's views (section 3.2): a mild crop that is paired with the text, and two strong ones for SimCLR."""

from __future__ import annotations

import numpy as np

from distill_core import GLOBAL, Sample, View
from distill_vl.pictures import Area, Crop, PictureAugmentation, Probability, RecolourConfig, crop_box, draw_colours
from distill_vl.recolouring import Jitter

SIMCLR = "simclr"
"""The role of the two strong views."""


class SlipViewsConfig(RecolourConfig):
    """Defaults are SLIP's public code's; all views have `size` pixels."""

    clip_scale: tuple[Area, Area] = (0.5, 1.0)
    """Share of the picture's area that the global view covers."""
    scale: tuple[Area, Area] = (0.08, 1.0)
    """Share of the picture's area that a SimCLR view covers."""
    jitter: Jitter = (0.4, 0.4, 0.4, 0.1)
    """Strengths of brightness, contrast, saturation and hue, in random order, on SimCLR views."""
    blur: Probability = 0.5
    """Probability of Gaussian blur on a SimCLR view."""


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
        """uint8; `PictureAugmentation.on_device` normalises them."""
        config = self.config

        def strong(width: int, height: int) -> Crop:
            box, flipped = crop_box(width, height, config.scale, rng), rng.random() < config.flip
            return Crop(box, config.size, flipped, SIMCLR, draw_colours(config, rng, blur=config.blur))

        def draw(width: int, height: int) -> list[Crop]:
            mild = Crop(crop_box(width, height, config.clip_scale, rng), config.size)
            return [mild, strong(width, height), strong(width, height)]

        return self.train_crops(sample, draw)
