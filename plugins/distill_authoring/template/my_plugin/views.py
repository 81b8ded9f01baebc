"""Raw samples -> views. An augmentation alone knows how to decode a sample's fields."""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from distill_core import GLOBAL, LOCAL, AbsentModality, Augmentation, BadSample, ComponentConfig, View


class NoisyConfig(ComponentConfig):
    """Options of `my_plugin_noisy`; the docstring below each is what `distill plugins` prints."""

    field: str = "left"
    """Field of a sample that holds the signal, as float32 bytes."""
    length: Annotated[int, Field(gt=0)] = 64
    """Numbers in a signal."""
    noise: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of the noise in each view; the local view has twice as much."""


class Noisy(Augmentation):
    """Two global views and a local one: the signal with noise."""

    name = "my_plugin_noisy"
    Config = NoisyConfig

    @classmethod
    def roles(cls, config):
        """Globals first."""
        return (GLOBAL, GLOBAL, LOCAL)

    def train_views(self, sample, rng):
        """All randomness comes from `rng`: the same sample and seed give the same views."""
        signal = self.decode(sample)[0]
        views = []
        for role in self.roles(self.config):
            strength = self.config.noise * (2 if role == LOCAL else 1)
            noisy = signal + strength * rng.standard_normal(signal.shape, dtype=np.float32)
            views.append(View(torch.from_numpy(noisy.astype(np.float32)), role))
        return views

    def decode(self, sample, field=None):
        """[length], float32; a sample that cannot be used is skipped and counted."""
        name = field or self.config.field
        if name not in sample:
            raise AbsentModality(f"no field {name!r}")
        if len(sample[name]) != 4 * self.config.length:
            raise BadSample(f"{name!r} does not hold {self.config.length} float32 numbers")
        return [np.frombuffer(sample[name], dtype=np.float32)]

    def eval_view(self, item):
        """The view of evaluation: the signal as it is."""
        try:
            signal = np.array(item, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise BadSample(f"not a signal: {error}") from error
        return View(torch.from_numpy(signal))
