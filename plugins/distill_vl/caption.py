"""One text a sample: the caption as it is, or one of its sentences."""

from __future__ import annotations

import numpy as np

from distill_core import GLOBAL, Sample, View
from distill_vl.captions import OneText, TakeConfig


class WholeCaption(OneText):
    """One text per sample."""

    name = "caption"

    @classmethod
    def roles(cls, config: TakeConfig) -> tuple[str, ...]:
        return (GLOBAL,)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        return [View(self.text(sample, rng))]
