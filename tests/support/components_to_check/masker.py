"""Maskers: good ones, and such as are broken in one way each."""

from dataclasses import replace

import numpy as np
import torch
from components_to_check.broken import broken
from my_plugin.mask import Window

from distill_core import PREDICTED, Mask, Masker, Needs


class Attended(Masker):
    """Hides what the teacher attends to most; each of two masks its own number of tokens, drawn in the worker."""

    name = "attended"
    hides = True

    @classmethod
    def times(cls, config):
        return 2

    @classmethod
    def extras(cls, config):
        return ("count",)

    @classmethod
    def reads(cls, config, modality, plan):
        return Needs(attention={"default": {modality: plan.teacher_views("default", modality)}})

    def draw(self, grid, rng):
        return Mask(hidden=np.zeros(np.prod(grid), bool), extra={"count": rng.integers(1, 9)})

    def choose(self, group, teacher):
        seen = torch.stack(list(teacher["default"].attention.values())).mean(2)  # [V, B, L]
        ranks = seen.argsort(-1, descending=True).argsort(-1)
        return replace(group, token_mask=ranks.repeat(2, 1, 1) < group.extra["count"][..., None])


@broken("leaks", "tokens of `predicted` are seen by the student")
class Leaky(Window):
    def draw(self, grid, rng):
        mask = super().draw(grid, rng)
        return replace(mask, keep=np.sort(np.append(mask.keep[:-1], mask.extra[PREDICTED][0, 0])))


@broken("leaks", "a mask has nothing to predict")
class Idle(Window):
    def draw(self, grid, rng):
        mask = super().draw(grid, rng)
        return replace(mask, extra={PREDICTED: np.full_like(mask.extra[PREDICTED], -1)})


@broken("masks", "masks have different shapes")
class Uneven(Window):
    def draw(self, grid, rng):
        mask = super().draw(grid, rng)
        return replace(mask, keep=mask.keep[int(rng.integers(2)) :])


@broken("masks", "ascending, without doubles")
class Unsorted(Window):
    def draw(self, grid, rng):
        mask = super().draw(grid, rng)
        return replace(mask, keep=rng.permutation(mask.keep))


@broken("masks", "all samples have the same masks")
class Constant(Window):
    def draw(self, grid, rng):
        return super().draw(grid, np.random.default_rng(0))


@broken("masks", "`hides` is True, and masks have no `hidden`")
class SaysOtherwise(Window):
    hides = True


@broken("masks", "all 2 masks of a view are the same")
class Repeats(Window):
    @classmethod
    def times(cls, config):
        return 2

    def _drawn(self, group, generators):
        whole = super()._drawn(group, generators)
        half = len(group.x)
        twice = {name: x[:half].repeat(2, *[1] * (x.ndim - 1)) for name, x in whole.extra.items()}
        return replace(whole, keep=whole.keep[:half].repeat(2, 1, 1), extra=twice)


@broken("replayable", "`draw` draws from a global generator")
class Unseeded(Window):
    def draw(self, grid, rng):
        return super().draw(grid, np.random.default_rng(np.random.randint(1000)))


@broken("replayable", "it keeps state")
class Counting(Window):
    calls = 0

    def draw(self, grid, rng):
        self.calls += 1
        rng.random(self.calls % 7)
        return super().draw(grid, rng)


@broken("chosen", "depend on the other samples of its batch: choose for each")
class Mixing(Attended):
    def choose(self, group, teacher):
        features = teacher["default"]
        shifted = {view: x - x.mean(0) for view, x in features.attention.items()}
        return super().choose(group, {"default": replace(features, attention=shifted)})


@broken("chosen", "`choose` draws from a global generator")
class Rolling(Attended):
    def choose(self, group, teacher):
        group = super().choose(group, teacher)
        return replace(group, token_mask=group.token_mask ^ (torch.rand(group.token_mask.shape) < 0.1))


@broken("chosen", "changes the group in place")
class InPlace(Attended):
    def choose(self, group, teacher):
        group.token_mask |= super().choose(group, teacher).token_mask
        return group


@broken("chosen", "KeyError")
class ReadsMore(Attended):
    def choose(self, group, teacher):
        assert teacher["default"].tokens[0].ndim == 3
        return super().choose(group, teacher)
