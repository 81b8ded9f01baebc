"""Inputs for `distill check-plugin`, which cannot know what a sample or a view looks like."""

import numpy as np
import torch

from distill_core import GLOBAL, LOCAL, ConformanceCase, View
from my_plugin.tower import Tower
from my_plugin.views import Noisy


def sample(config, rng):
    """A raw sample: bytes by field."""
    return {config.field: rng.standard_normal(config.length, dtype=np.float32).tobytes()}


def views(config, rng):
    """The views of one sample."""
    return [View(torch.from_numpy(rng.standard_normal(config.length, dtype=np.float32)), r) for r in (GLOBAL, LOCAL)]


CASES = [ConformanceCase(Noisy, sample=sample), ConformanceCase(Tower, views=views)]
