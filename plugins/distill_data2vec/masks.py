"""Inverse block masking (data2vec 2.0, section 3.3): blocks are drawn of what stays, and all else is dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import Mask, Masker, MaskerConfig

Share = Annotated[float, Field(gt=0, lt=1)]


class InverseBlocksConfig(MaskerConfig):
    """Defaults are those for ViT-B, whose public recipe has 16 masks."""

    masks: Annotated[int, Field(gt=0)] = 8
    """Masks M of each view: the student sees it so often, the teacher once."""
    ratio: Share = 0.8
    """Share of the patches that are dropped."""
    block: Annotated[int, Field(gt=0)] = 3
    """Sides of the blocks that stay, in patches."""
    adjust: Annotated[float, Field(ge=0)] = 0.07
    """So many more blocks are drawn as would keep this share of the patches, since they overlap."""


class InverseBlocks(Masker):
    """Squares that stay, at random places, until about a share 1 - ratio is kept; single patches make up the number."""

    name = "inverse_blocks"
    Config = InverseBlocksConfig
    drops = True

    @classmethod
    def times(cls, config: InverseBlocksConfig) -> int:
        """M."""
        return config.masks

    @classmethod
    def grid_problems(cls, config: InverseBlocksConfig, grid: tuple[int, ...]) -> Iterable[str]:
        """Rows and columns."""
        if len(grid) != 2:
            yield f"{cls.name!r} draws blocks of rows and columns; the tokens lie in a grid of {len(grid)} axes"

    def draw(self, grid: tuple[int, ...], rng: np.random.Generator) -> Mask:
        """As the public code's `compute_block_mask_2d`: centres anywhere, and blocks cut off at the edges; then patches
        are drawn to go, or to stay, until the number is right."""
        rows, columns = grid
        config, tokens = self.config, rows * columns
        count = max(1, int((1 - config.ratio) * tokens + 1e-6))
        blocks = max(1, int(tokens * (1 - config.ratio + config.adjust) / config.block**2))
        before, after = config.block // 2, config.block - config.block // 2
        stays = np.zeros((rows, columns), dtype=bool)
        for centre in rng.integers(tokens, size=blocks):
            row, column = divmod(int(centre), columns)
            stays[max(0, row - before) : row + after, max(0, column - before) : column + after] = True
        flat = stays.reshape(-1)
        surplus = int(flat.sum()) - count
        flat[rng.choice(np.flatnonzero(flat == (surplus > 0)), abs(surplus), replace=False)] ^= True
        return Mask(keep=np.flatnonzero(flat))
