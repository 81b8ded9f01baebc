"""Inputs for `distill check-plugin`, which cannot know what a sample or a view looks like."""

import numpy as np
import torch

from distill_core import GLOBAL, LOCAL, ConformanceCase, View
from my_plugin.joint import SharedGap
from my_plugin.tower import Tower
from my_plugin.views import Noisy, NoisyConfig


def sample(config, rng):
    """A raw sample: bytes by field."""
    return {config.field: rng.standard_normal(config.length, dtype=np.float32).tobytes()}


def views(config, rng):
    """The views of one sample."""
    return [View(torch.from_numpy(rng.standard_normal(config.length, dtype=np.float32)), r) for r in (GLOBAL, LOCAL)]


def parts(config):
    """The modalities' own augmentations."""
    return {name: Noisy(NoisyConfig(field=name)) for name in ("left", "right")}


def both(config, rng):
    """A raw sample of both modalities."""
    return {name: value for part in parts(config).values() for name, value in sample(part.config, rng).items()}


CASES = [
    ConformanceCase(Noisy, sample=sample),
    ConformanceCase(SharedGap, sample=both, parts=parts),
    ConformanceCase(Tower, views=views),
]
