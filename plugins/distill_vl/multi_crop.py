"""Multi-crop (SwAV; DINO; COSMOS, section 3.1): large and small crops of one picture, each recoloured."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from pydantic import Field, model_validator

from distill_core import GLOBAL, LOCAL, Sample, View
from distill_vl.masking import MASKED
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


class MultiCropConfig(PictureConfig):
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
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Jitter = (0.4, 0.4, 0.2, 0.1)
    """Strengths of brightness, contrast, saturation and hue, in random order."""
    jitter_p: Probability = 0.8
    """Probability of the colour jitter."""
    grey: Probability = 0.2
    """Probability of a grey picture."""
    blur: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur (radius 0.1 to 2 px) on the first global crop, further globals, and locals."""
    solarise: Probability = 0.2
    """Probability of solarising (at 128) a global crop after the first."""

    @model_validator(mode="after")
    def _fits(self) -> MultiCropConfig:
        if self.masked > self.globals_:
            raise ValueError(f"masked {self.masked} is more than global {self.globals_}, of which they are copies")
        return self


class MultiCrop(PictureAugmentation):
    """One picture -> global and local crops [3, S, S], normalised."""

    name = "multi_crop"
    Config = MultiCropConfig
    examples = ({"size": 16, "local_size": 8},)

    @classmethod
    def roles(cls, config: MultiCropConfig) -> tuple[str, ...]:
        """Globals, locals, then the globals' copies."""
        return (GLOBAL,) * config.globals_ + (LOCAL,) * config.local + (MASKED,) * config.masked

    @classmethod
    def shapes(cls, config: MultiCropConfig) -> tuple[tuple[int, ...], ...]:
        """[3, S, S] of each."""
        sides = {LOCAL: config.local_size}
        return tuple((3, *[sides.get(role, config.size)] * 2) for role in cls.roles(config))

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """Crops [3, S, S], normalised."""
        picture, config = self.decode(sample)[0], self.config
        views = []
        for i in range(config.globals_):
            crop = random_resized_crop(picture, config.size, config.global_scale, rng)
            crop = self._recolour(crop, config.blur[0 if i == 0 else 1], 0.0 if i == 0 else config.solarise, rng)
            views.append(View(self.normalise(crop), GLOBAL))
        for _ in range(config.local):
            crop = random_resized_crop(picture, config.local_size, config.local_scale, rng)
            crop = self._recolour(crop, config.blur[2], 0.0, rng)
            views.append(View(self.normalise(crop), LOCAL))
        views += [View(view.data, MASKED) for view in views[: config.masked]]
        return views

    def _recolour(self, picture: Image.Image, blur: float, solarise: float, rng: np.random.Generator) -> Image.Image:
        config = self.config
        picture = flip(picture, config.flip, rng)
        if rng.random() < config.jitter_p:
            picture = colour_jitter(picture, config.jitter, rng)
        if rng.random() < config.grey:
            picture = picture.convert("L").convert("RGB")
        if rng.random() < blur:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
        if rng.random() < solarise:
            picture = ImageOps.solarize(picture, 128)
        return picture
