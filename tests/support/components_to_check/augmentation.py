"""Broken augmentations."""

import numpy as np
import torch
from components_to_check.broken import broken
from components_to_check.seeded_later import HashOfTheKey
from my_plugin.views import Noisy


@broken("roles", "`views` makes .*, `roles` says")
class WrongRoles(Noisy):
    @classmethod
    def roles(cls, config):
        return ("global",)

    def views(self, sample, rng):
        return [*super().views(sample, rng), *super().views(sample, rng)]


@broken("roles", "global views come first")
class LocalsFirst(Noisy):
    @classmethod
    def roles(cls, config):
        return ("local", "global")


@broken("determinism", "draw from `rng` alone")
class GlobalRandom(Noisy):
    def views(self, sample, rng):
        return super().views(sample, np.random.default_rng(np.random.randint(1 << 30)))


@broken("determinism", "keep nothing between samples")
class Remembers(Noisy):
    seen = 0

    def views(self, sample, rng):
        self.seen += 1
        return super().views(sample, np.random.default_rng(self.seen))


@broken("pickling", "pickle")
class HoldsLambda(Noisy):
    def __init__(self, config):
        super().__init__(config)
        self.scale = lambda x: x


@broken("sample_untouched", "`views` changes the sample")
class Consumes(Noisy):
    def views(self, sample, rng):
        made = super().views(sample, rng)
        sample.pop("left")
        return made


@broken("evaluation_view", "`plain` must give the same view each time")
class NoisyPlain(Noisy):
    def plain(self, item):
        view = super().plain(item)
        view.data.add_(torch.randn(()))
        return view


@broken("bad_samples", "`views` of a sample with no field raises KeyError.*raise BadSample")
class KeyErrors(Noisy):
    def read(self, sample, field=None):
        return [np.frombuffer(sample[field or self.config.field], dtype=np.float32)]


broken("processes", "another process makes other views of the same sample and seed")(HashOfTheKey)
