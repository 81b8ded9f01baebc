"""Maskers of any method: which tokens the student sees."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import Mask, Masker, MaskerConfig


class RandomDropConfig(MaskerConfig):
    """How many tokens are dropped."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of each view's tokens that the student never sees; one stays at least."""


class RandomDrop(Masker):
    """Tokens drawn one by one are dropped before the first block: a step takes less time (FLIP, Li et al. 2023)."""

    name = "random_drop"
    Config = RandomDropConfig
    drops = True

    def draw(self, grid: tuple[int, ...], rng: np.random.Generator) -> Mask:
        """The tokens that stay, ascending."""
        tokens = int(np.prod(grid))
        count = max(1, round((1 - self.config.share) * tokens))
        return Mask(keep=np.sort(rng.permutation(tokens)[:count]))
