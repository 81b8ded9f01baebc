"""CLIPSelf's views: a picture, and cells of a grid drawn over it, each cut out of the picture as it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import GLOBAL, Sample, View
from distill_vl.pictures import Area, Crop, PictureAugmentation, PictureConfig, crop_box

REGION = "region"
"""Role of the cells' views."""
Positive = Annotated[int, Field(gt=0)]


class GridRegionsConfig(PictureConfig):
    """Defaults are the public code's, but for sizes."""

    size: Positive = 224
    """Pixels of the picture's side, in training and in evaluation."""
    region_size: Positive = 224
    """Pixels of a cell's side: what the teacher was trained on."""
    regions: Positive = 20
    """Views of cells of each picture: a grid of more cells has so many of them, drawn; one of fewer repeats some, which
    do not count (`counted`)."""
    split: Positive = 6
    """Most rows and most columns of a grid; neither is more than twice the other."""
    scale: tuple[Area, Area] = (1.0, 1.0)
    """Share of the picture's area over which the grid is laid: below 1 a random crop of it, the student's view."""


class GridRegions(PictureAugmentation):
    """The picture [3, S, S], then the cells of a grid drawn over it [3, s, s]; nothing is mirrored or recoloured."""

    name = "grid_regions"
    Config = GridRegionsConfig
    examples = ({"size": 16, "region_size": 8, "regions": 3, "split": 3},)

    @classmethod
    def roles(cls, config: GridRegionsConfig) -> tuple[str, ...]:
        """The picture, then the cells."""
        return (GLOBAL,) + (REGION,) * config.regions

    @classmethod
    def shapes(cls, config: GridRegionsConfig) -> tuple[tuple[int, ...], ...]:
        """[3, S, S] of the picture, [3, s, s] of each cell."""
        return ((3, config.size, config.size),) + ((3, config.region_size, config.region_size),) * config.regions

    @classmethod
    def extras(cls, config: GridRegionsConfig) -> tuple[str, ...]:
        """A crop's, and whether the view counts."""
        return (*super().extras(config), "counted")

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        """uint8; `PictureAugmentation.on_device` normalises them."""
        config, counted = self.config, [True]

        def draw(width: int, height: int) -> list[Crop]:
            whole = crop_box(width, height, config.scale, rng)
            rows, columns = (int(n) for n in grids(config.split)[int(rng.integers(len(grids(config.split))))])
            cells = list(cells_of(whole, rows, columns))
            order = [int(i) for i in rng.permutation(len(cells))]
            counted.extend(i < len(cells) for i in range(config.regions))
            drawn = [cells[order[i % len(cells)]] for i in range(config.regions)]
            return [Crop(whole, config.size), *(Crop(cell, config.region_size, role=REGION) for cell in drawn)]

        views = self.train_crops(sample, draw)
        return [View(v.data, v.role, extra={**v.extra, "counted": c}) for v, c in zip(views, counted, strict=True)]


def grids(split: int) -> list[tuple[int, int]]:
    """(rows, columns) of all grids of at most `split` each, of which neither is more than twice the other."""
    sides = range(1, split + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows <= 2 * columns and columns <= 2 * rows]


def cells_of(box: tuple[int, int, int, int], rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """The cells of a grid over a box (left, top, width, height), row by row, in whole pixels, at least one each."""
    left, top, width, height = box
    for row in range(rows):
        for column in range(columns):
            x, right = (left + round(width * edge / columns) for edge in (column, column + 1))
            y, bottom = (top + round(height * edge / rows) for edge in (row, row + 1))
            x, y = min(x, left + width - 1), min(y, top + height - 1)
            yield x, y, max(right - x, 1), max(bottom - y, 1)
