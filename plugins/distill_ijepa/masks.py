"""Multi-block masking (I-JEPA, section 3): blocks of the image to be predicted, and a context without them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from distill_core import PREDICTED, Mask, Masker, MaskerConfig

Share = Annotated[float, Field(gt=0, le=1)]
ATTEMPTS = 30
"""Most draws of blocks leave enough context; after so many that did not, the blocks are one and the same."""


class MultiBlockConfig(MaskerConfig):
    """Defaults are the paper's but for `keep`, which the public code takes from the batch."""

    targets: Annotated[int, Field(gt=0)] = 4
    """Blocks N to be predicted; they may overlap."""
    target_scale: tuple[Share, Share] = (0.15, 0.2)
    """A block's share of the patches, uniform between the two; it never has more than the second."""
    aspect: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.75, 1.5)
    """A block's height by its width, uniform between the two."""
    context_scale: tuple[Share, Share] = (0.85, 1.0)
    """The context block's share of the patches, of the image's own aspect, before the targets are taken out of it."""
    keep: Share = 0.25
    """Share of the patches that the student sees: so many of the context, drawn one by one, so that all of a batch are
    as many."""

    @model_validator(mode="after")
    def _fits(self) -> MultiBlockConfig:
        for name in ("target_scale", "aspect", "context_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} [{low}, {high}] does not go from low to high")
        return self


class MultiBlock(Masker):
    """The student sees some patches of a large block, less several small ones, which are to be predicted.

    Where the small ones leave too little, they are drawn again; at last they all stand at one place.
    """

    name = "multi_block"
    Config = MultiBlockConfig
    drops = True

    @classmethod
    def extras(cls, config: MultiBlockConfig) -> tuple[str, ...]:
        """The blocks [N, T]."""
        return (PREDICTED,)

    @classmethod
    def grid_problems(cls, config: MultiBlockConfig, grid: tuple[int, ...]) -> Iterable[str]:
        """Rows and columns; a context that is left beside one block."""
        if len(grid) != 2:
            yield f"{cls.name!r} draws blocks of rows and columns; the tokens lie in a grid of {len(grid)} axes"
            return
        tokens = grid[0] * grid[1]
        largest, context = _largest(config, tokens), _context_size(config, tokens)
        if context + largest > tokens:
            yield (
                f"{cls.name!r}: keep: {context} of {tokens} patches are not left beside a block of {largest}; lower "
                "keep or target_scale"
            )

    def draw(self, grid: tuple[int, ...], rng: np.random.Generator) -> Mask:
        """The context's patches, and those of each block."""
        tokens, config = grid[0] * grid[1], self.config
        count = _context_size(config, tokens)
        for _ in range(ATTEMPTS):
            blocks = [self._block(grid, rng) for _ in range(config.targets)]
            share = rng.uniform(*config.context_scale)
            sides = [max(1, round(math.sqrt(share) * side)) for side in grid]
            context = _placed(grid, (sides[0], sides[1]), rng)
            context &= ~np.logical_or.reduce(blocks)
            if context.sum() >= count:
                break
        else:
            blocks = blocks[:1] * config.targets
            context = ~blocks[0]
        predicted = np.full((config.targets, _largest(config, tokens)), -1, dtype=np.int64)
        for row, block in zip(predicted, blocks, strict=True):
            row[: block.sum()] = np.flatnonzero(block)
        keep = np.sort(rng.choice(np.flatnonzero(context), count, replace=False))
        return Mask(keep=keep, extra={PREDICTED: predicted})

    def _block(self, grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """[rows, columns] bool, a rectangle of at most `_largest` patches."""
        largest = _largest(self.config, grid[0] * grid[1])
        area = min(rng.uniform(*self.config.target_scale) * grid[0] * grid[1], largest)
        aspect = rng.uniform(*self.config.aspect)
        height = min(max(1, round(math.sqrt(area * aspect))), grid[0], largest)
        width = min(max(1, round(math.sqrt(area / aspect))), grid[1], largest // height)
        return _placed(grid, (height, width), rng)


def _largest(config: MultiBlockConfig, tokens: int) -> int:
    """T."""
    return max(1, int(config.target_scale[1] * tokens))


def _context_size(config: MultiBlockConfig, tokens: int) -> int:
    """L'."""
    return max(1, round(config.keep * tokens))


def _placed(grid: tuple[int, ...], size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """[rows, columns] bool, True in a rectangle of this size at a random place."""
    (rows, columns), (height, width) = grid, size
    top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
    mask = np.zeros((rows, columns), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask
