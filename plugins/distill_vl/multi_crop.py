"""Multi-crop (SwAV; DINO; COSMOS, section 3.1): large and small crops of one picture, each recoloured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from distill_core import GLOBAL, LOCAL, Sample, View
from distill_vl.masking import MASKED
from distill_vl.pictures import (
    Area,
    Box,
    Crop,
    PictureAugmentation,
    Probability,
    RecolourConfig,
    crop_box,
    draw_colours,
)


class MultiCropConfig(RecolourConfig):
    """Defaults are the paper's: 2 global crops of 224 px and 6 local crops of 96 px."""

    globals_: Annotated[int, Field(alias="global", gt=0)] = 2
    """Global crops, of `size` pixels."""
    local: Annotated[int, Field(ge=0)] = 6
    """Local crops, of `local_size` pixels."""
    masked: Annotated[int, Field(ge=0)] = 0
    """Copies of the first global crops, of role `masked`: for methods that hide patches from a view of its own."""
    local_size: Annotated[int, Field(gt=0)] = 96
    """Pixels of a local crop's side."""
    global_scale: tuple[Area, Area] = (0.4, 1.0)
    """Share of the picture's area that a global crop covers, uniform between the two."""
    local_scale: tuple[Area, Area] = (0.05, 0.4)
    """Share of the picture's area that a local crop covers."""
    blur: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur on the first global crop, further globals, and locals."""
    solarise: Probability = 0.2
    """Probability of solarising (at 128) a global crop after the first."""
    recolour: bool = True
    """false leaves colours as they are, and draws the same crops: a teacher's own views show what a student's do."""

    @model_validator(mode="after")
    def _fits(self) -> MultiCropConfig:
        if self.masked > self.globals_:
            raise ValueError(f"masked {self.masked} is more than global {self.globals_}, of which they are copies")
        return self


class MultiCrop(PictureAugmentation):
    """One picture -> global and local crops [3, S, S]."""

    name = "multi_crop"
    Config = MultiCropConfig
    examples = ({"size": 16, "local_size": 8}, {"size": 16, "local_size": 8, "masked": 1, "device": "model"})

    @classmethod
    def roles(cls, config: MultiCropConfig) -> tuple[str, ...]:
        """Globals, locals, then the globals' copies."""
        return (GLOBAL,) * config.globals_ + (LOCAL,) * config.local + (MASKED,) * config.masked

    @classmethod
    def shapes(cls, config: MultiCropConfig) -> tuple[tuple[int, ...], ...]:
        """[3, S, S] of each."""
        sides = {LOCAL: config.local_size}
        return tuple((3, *[sides.get(role, config.size)] * 2) for role in cls.roles(config))

    def train_views(
        self, sample: Sample, rng: np.random.Generator, local_boxes: Callable[[int, int], Sequence[Box]] | None = None
    ) -> list[View]:
        """uint8; `PictureAugmentation.on_device` normalises them.

        `local_boxes` returns the boxes of the local crops, `local` of them, for the picture's width and height; None
        draws them. It is called once, before anything is drawn here.
        """
        config = self.config

        def crop(number: int, width: int, height: int, box: Box | None) -> Crop:
            first, large = number == 0, number < config.globals_
            blur = config.blur[0 if first else 1 if large else 2]
            solarise = config.solarise if large and not first else 0.0
            box = box or crop_box(width, height, config.global_scale if large else config.local_scale, rng)
            flip = rng.random() < config.flip
            colours = draw_colours(config, rng, blur=blur, solarise=solarise)
            side = config.size if large else config.local_size
            return Crop(box, side, flip, GLOBAL if large else LOCAL, colours if config.recolour else None)

        def draw(width: int, height: int) -> list[Crop]:
            local = local_boxes(width, height) if local_boxes else [None] * config.local
            boxes = [*[None] * config.globals_, *local]
            return [crop(number, width, height, box) for number, box in enumerate(boxes)]

        views = self.train_crops(sample, draw)
        return views + [View(view.data, MASKED, extra=view.extra) for view in views[: config.masked]]
