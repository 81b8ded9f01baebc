"""What `distill check-plugin` feeds the towers."""

from __future__ import annotations

import numpy as np

from distill_core import GLOBAL, LOCAL, ConformanceCase, View
from distill_pretrained.hf_text import HfText
from distill_pretrained.timm_tower import TimmTower, TimmTowerConfig
from distill_vl.cases import noise, texts


def crops(config: TimmTowerConfig, rng: np.random.Generator) -> list[View]:
    """Two global crops of noise, and a local one of half their side."""
    sides = ((GLOBAL, config.image_size), (GLOBAL, config.image_size), (LOCAL, config.image_size // 2))
    return [noise(side, role, rng) for role, side in sides]


CASES = [ConformanceCase(TimmTower, views=crops), ConformanceCase(HfText, views=texts)]
