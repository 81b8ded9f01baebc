"""Broken augmentations."""

from dataclasses import replace

import numpy as np
import torch
from components_to_check.broken import broken
from components_to_check.seeded_later import HashOfTheKey
from my_plugin.views import Noisy

from distill_core.errors import BadSample


@broken("roles", "`train_views` makes .*, `roles` says")
class WrongRoles(Noisy):
    @classmethod
    def roles(cls, config):
        return ("global",)

    def train_views(self, sample, rng):
        return [*super().train_views(sample, rng), *super().train_views(sample, rng)]


@broken("roles", "global views come first")
class LocalsFirst(Noisy):
    @classmethod
    def roles(cls, config):
        return ("local", "global")


@broken("extras", "the extras of .* views differ")
class ExtraOfOtherShapes(Noisy):
    def train_views(self, sample, rng):
        length = int(rng.integers(1, 1000))
        return [replace(view, extra={"box": np.zeros(length)}) for view in super().train_views(sample, rng)]


@broken("device_work", "`on_device` changes the views")
class NormalizesInPlace(Noisy):
    def on_device(self, views):
        for group in views.groups:
            group.x.add_(1)
        return views


@broken("device_work", "`on_device` makes other views of the same batch")
class DrawsOnTheDevice(Noisy):
    def on_device(self, views):
        return views.map(lambda x: x + torch.randn(()))


@broken("device_work", "`on_device` must leave alone what it made")
class NormalizesTwice(Noisy):
    def on_device(self, views):
        return views.map(lambda x: x + 1)


@broken("determinism", "draw only from `rng`")
class GlobalRandom(Noisy):
    def train_views(self, sample, rng):
        return super().train_views(sample, np.random.default_rng(np.random.randint(1 << 30)))


@broken("determinism", "keep no state between samples")
class Remembers(Noisy):
    seen = 0

    def train_views(self, sample, rng):
        self.seen += 1
        return super().train_views(sample, np.random.default_rng(self.seen))


@broken("pickling", "pickle")
class HoldsLambda(Noisy):
    def __init__(self, config):
        super().__init__(config)
        self.scale = lambda x: x


@broken("sample_untouched", "`train_views` changes the sample")
class Consumes(Noisy):
    def train_views(self, sample, rng):
        made = super().train_views(sample, rng)
        sample.pop("left")
        return made


@broken("evaluation_view", "`eval_view` must return the same view each time")
class NoisyPlain(Noisy):
    def eval_view(self, item):
        view = super().eval_view(item)
        view.data.add_(torch.randn(()))
        return view


@broken("bad_samples", "`train_views` of a sample with no field raises KeyError.*raise BadSample")
class KeyErrors(Noisy):
    def decode(self, sample, field=None):
        return [np.frombuffer(sample[field or self.config.field], dtype=np.float32)]


@broken("bad_samples", "`train_views` of a sample with no field must raise AbsentModality")
class CallsAbsentBad(Noisy):
    def train_views(self, sample, rng):
        try:
            return super().train_views(sample, rng)
        except BadSample as error:
            raise BadSample(str(error)) from error


broken("processes", "another process makes different views of the same sample and seed")(HashOfTheKey)
