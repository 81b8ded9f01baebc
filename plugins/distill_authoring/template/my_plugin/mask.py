"""Which tokens of a view the student sees."""

from typing import Annotated

import numpy as np
from pydantic import Field

from distill_core import PREDICTED, Mask, Masker, MaskerConfig


class WindowConfig(MaskerConfig):
    """Options of `my_plugin_window`."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the tokens that the window holds."""


class Window(Masker):
    """The student does not see a window of tokens, which a loss may have it predict."""

    name = "my_plugin_window"
    Config = WindowConfig
    drops = True

    @classmethod
    def extras(cls, config):
        """The tokens to predict: a loss that reads them names this in `Needs.extra`."""
        return (PREDICTED,)

    def draw(self, grid, rng):
        """All randomness comes from `rng`; L' is the same for all views of this grid."""
        tokens = int(np.prod(grid))
        count = max(1, round(self.config.share * tokens))
        first = int(rng.integers(tokens - count + 1))
        window = np.arange(first, first + count)
        return Mask(keep=np.delete(np.arange(tokens), window), extra={PREDICTED: window[None]})
