"""Broken joint augmentations."""

from dataclasses import replace

import numpy as np
from components_to_check.broken import broken
from my_plugin.joint import SharedGap

from distill_core.batch import View
from distill_core.errors import AbsentModality


@broken("joint_views", "`train_views` must return views of each of left, right")
class ForgetsOne(SharedGap):
    def train_views(self, sample, own, rng):
        return {"left": super().train_views(sample, own, rng)["left"]}


@broken("joint_views", "`train_views` makes .* of 'left', `plans` says")
class MakesMoreThanPlanned(SharedGap):
    def train_views(self, sample, own, rng):
        views = super().train_views(sample, own, rng)
        return {name: [*of_modality, of_modality[-1]] for name, of_modality in views.items()}


@broken("joint_views", "of 'right' they are .*local.*global")
class PlansGlobalsLast(SharedGap):
    @classmethod
    def plans(cls, config, own):
        return {**own, "right": replace(own["right"], roles=own["right"].roles[::-1])}

    def train_views(self, sample, own, rng):
        views = super().train_views(sample, own, rng)
        return {**views, "right": views["right"][::-1]}


@broken("joint_views", "`plans` names the extras gap of 'left', which are not there")
class PlansAnExtra(SharedGap):
    @classmethod
    def plans(cls, config, own):
        return {name: replace(plan, extras=("gap",)) for name, plan in own.items()}


@broken("joint_views", "`plans` must return a plan of each modality")
class PlansOne(SharedGap):
    @classmethod
    def plans(cls, config, own):
        return {"left": own["left"]}


@broken("determinism", "draw only from `rng`")
class GlobalRandom(SharedGap):
    def train_views(self, sample, own, rng):
        return super().train_views(sample, own, np.random.default_rng(np.random.randint(1 << 30)))


@broken("processes", "pickle")
class HoldsLambda(SharedGap):
    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.scale = lambda x: x


@broken("inputs_untouched", "`train_views` changes the views that `own` made")
class SilencesInPlace(SharedGap):
    def silenced(self, view, start):
        view.data[:3] = 0
        return view


@broken("inputs_untouched", "`train_views` changes the sample")
class Consumes(SharedGap):
    def train_views(self, sample, own, rng):
        made = super().train_views(sample, own, rng)
        sample.pop("left")
        return made


@broken("bad_samples", "of a sample with no field must raise AbsentModality")
class FillsIn(SharedGap):
    def train_views(self, sample, own, rng):
        try:
            return super().train_views(sample, own, rng)
        except AbsentModality:
            return {name: [View(np.zeros(4))] for name in self.parts}
