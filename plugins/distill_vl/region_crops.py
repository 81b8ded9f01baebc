"""Crops together with the sentences that say them: local views of the regions that a sample has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil, floor
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from distill_core import LOCAL, Augmentation, BadSample, ComponentConfig, JointAugmentation, ModalityPlan, Sample, View
from distill_vl.caption_readers import json_of
from distill_vl.captions import CaptionConfig, draw, tidy
from distill_vl.multi_crop import MultiCrop, MultiCropConfig
from distill_vl.pictures import Box

Margin = Annotated[float, Field(ge=0)]
Edges = tuple[float, float, float, float]
"""Left, top, right and bottom of a region, as shares of the picture's width and height."""
LEAST_ASPECT = 3 / 4
"""Of a crop's shorter side to its longer one, as other crops have it, where the picture has the room."""
ROUNDED = 0.01
"""How far edges may leave the picture, as a share of it."""
NEGLIGIBLE = 1e-6
"""Of a pixel: what shares of whole pixels are wrong by."""


class RegionCropsConfig(ComponentConfig):
    """Where a sample keeps its regions, and how much around them a crop shows."""

    regions: str = "regions"
    """Key of a list in the sample's json, of {"box": [left, top, right, bottom], "text": ...}; or spans of the json's
    `caption`, as GRIT has them under `ref_exps` and `noun_chunks`: [start, end, left, top, right, bottom, score]."""
    text: str = "{text}"
    """What a region's text is made of, its fields in braces, as "a {colour} {name}"; spans have their own."""
    unit: Literal["share", "pixel"] = "share"
    """Of the boxes: shares of the picture's width and height, or pixels, which are wrong once it was resized."""
    margin: tuple[Margin, Margin] = (0.0, 0.5)
    """What a crop adds to the width and height of its region, as a share of them, uniform between the two. The region
    lies anywhere in the crop, and is always whole."""


class RegionCrops(JointAugmentation):
    """Each local crop is of a region of the picture, and the local text of the same number says what is there.

    Number, size and colours of the crops are those of the picture's `multi_crop`, and global views are as without it.
    Regions are drawn without replacement; those of a sample with fewer than crops are repeated. One without any is
    skipped and counted: crops of something else would not go with their texts.
    """

    name = "region_crops"
    Config = RegionCropsConfig
    examples = ({}, {"margin": [0.0, 0.0]})
    config: RegionCropsConfig

    def __init__(self, config: RegionCropsConfig, parts: Mapping[str, Augmentation]) -> None:
        super().__init__(config, parts)
        self._picture, self._text = _sides({name: part.config for name, part in parts.items()})

    @classmethod
    def plans(cls, config: RegionCropsConfig, own: Mapping[str, ModalityPlan]) -> Mapping[str, ModalityPlan]:
        """As many local texts as local crops. Raises ValueError for others than `multi_crop` and captions."""
        picture, text = _sides({name: plan.augment for name, plan in own.items()})
        roles = tuple(role for role in own[text].roles if role != LOCAL)
        return {**own, text: replace(own[text], roles=roles + (LOCAL,) * len(own[picture].views(LOCAL)))}

    def train_views(
        self, sample: Sample, own: Callable[[str], list[View]], rng: np.random.Generator
    ) -> dict[str, list[View]]:
        """All views of the picture are drawn from `rng`, so that it is decoded once."""
        whole = [view for view in own(self._text) if view.role != LOCAL]
        crops = self.parts[self._picture]
        local_texts: list[View] = []
        assert isinstance(crops, MultiCrop)

        def boxes(width: int, height: int) -> list[Box]:
            regions = regions_of(sample, self.config, (width, height))
            regions = [regions[i] for i in draw(len(regions), crops.config.local, rng)]
            local_texts.extend(View(text, LOCAL) for _, text in regions)
            return [around(edges, (width, height), self.config.margin, rng) for edges, _ in regions]

        pictures = crops.train_views(sample, rng, boxes)
        return {self._picture: pictures, self._text: whole + local_texts}


def regions_of(sample: Sample, config: RegionCropsConfig, size: tuple[int, int]) -> list[tuple[Edges, str]]:
    """Edges and text of each region, of a picture of `size` (width, height). Raises `BadSample`, also for none."""
    document, key = json_of(sample), config.regions
    entries, unit = document.get(key), size if config.unit == "pixel" else (1, 1)
    if not isinstance(entries, list) or not entries:
        raise BadSample(f"no regions: the json has no list {key!r}, or an empty one")
    regions = []
    for number, entry in enumerate(entries):
        where = f"the json's {key!r}, entry {number}"
        try:
            if isinstance(entry, list):
                start, end, *box, _ = entry
                text = document["caption"][int(start) : int(end)]
            else:
                box, text = entry["box"], config.text.format_map(entry)
            left, top, right, bottom = (float(edge) / side for edge, side in zip(box, unit * 2, strict=True))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadSample(f"{where} is not a region: {type(error).__name__}: {error}") from error
        edges = (left, top, right, bottom)
        if not (left < right and top < bottom and all(-ROUNDED <= edge <= 1 + ROUNDED for edge in edges)):
            raise BadSample(f"{where}: the box {box} is not within the picture of {size[0]} x {size[1]} pixels")
        if not tidy(text):
            raise BadSample(f"{where} has no text")
        regions.append((edges, tidy(text)))
    return regions


def around(edges: Edges, size: tuple[int, int], margin: tuple[float, float], rng: np.random.Generator) -> Box:
    """A crop that holds the whole region, of a picture of `size` (width, height)."""
    (left, top, right, bottom), (width, height) = edges, size
    across, down = _pixels(left, right, width), _pixels(top, bottom, height)
    grown = 1 + margin[0] + (margin[1] - margin[0]) * rng.random()
    w, h = (grown * (end - start) for start, end in (across, down))
    x, w = _placed(across, max(w, h * LEAST_ASPECT), width, rng)
    y, h = _placed(down, max(h, w * LEAST_ASPECT), height, rng)
    return x, y, w, h


def _pixels(first: float, last: float, side: int) -> tuple[int, int]:
    """The pixels of a side that a region touches: the first, and the one after the last."""
    start = min(max(floor(first * side + NEGLIGIBLE), 0), side - 1)
    return start, max(min(ceil(last * side - NEGLIGIBLE), side), start + 1)


def _placed(span: tuple[int, int], length: float, side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where a crop of this length begins, uniform over the places that hold the span, and its length in pixels."""
    start, end = span
    pixels = min(max(round(length), end - start), side)
    low, high = max(0, end - pixels), min(start, side - pixels)
    return low + int(rng.random() * (high - low + 1)), pixels


def _sides(options: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the pictures and of the captions. Raises ValueError."""
    pictures = [name for name, config in options.items() if isinstance(config, MultiCropConfig) and config.local]
    texts = [name for name, config in options.items() if isinstance(config, CaptionConfig)]
    if len(pictures) == len(texts) == 1 and len(options) == 2:
        return pictures[0], texts[0]
    raise ValueError(
        f"takes pictures of 'multi_crop' with local crops, and captions; of {', '.join(options)}, pictures are "
        f"{', '.join(pictures) or 'none'}, and captions {', '.join(texts) or 'none'}"
    )
