"""A teacher that conforms, and broken ones."""

from dataclasses import dataclass, replace

import torch
from components_to_check.broken import broken
from my_plugin.teacher import Average

from distill_core import BackboneSpec, Features, Group, Teacher, View, Views


def stack(samples, seeds):
    return Views([Group(torch.stack([torch.stack([view.data for view in views]) for views in samples], 1))])


@dataclass(frozen=True)
class Doubled:
    """Twice what the student sees."""

    collators: dict

    def __call__(self, sample, views, visit):
        return {name: [View(2 * view.data) for view in views[name]] for name in self.collators}


class Fixed(Teacher):
    """A fixed projection of views of its own."""

    name = "fixed"

    def __init__(self, config, name, plan, student):
        super().__init__(config, name, plan, student)
        self.register_buffer("map", torch.eye(48)[:7])

    @classmethod
    def specs(cls, config, student):
        return {name: BackboneSpec(48, 7) for name in student}

    @classmethod
    def cacheable(cls, config):
        return True

    @classmethod
    def reader(cls, config, name, plan, collators):
        return Doubled(dict.fromkeys(plan.views, stack))

    def encode(self, batch, tokens_of):
        return {m: Features(views.groups[0].x @ self.map.T) for m, views in batch.teacher[self.id].items()}


@broken("features", r"pooled is \[1, 3, 7\], not \[1, 3, 9\]")
class OtherWidth(Fixed):
    @classmethod
    def specs(cls, config, student):
        return {name: BackboneSpec(48, 9) for name in student}


@broken("features", "a sample's features depend on the other samples")
class Centred(Fixed):
    def encode(self, batch, tokens_of):
        return {m: Features(f.pooled - f.pooled.mean(1)) for m, f in super().encode(batch, tokens_of).items()}


@broken("inputs_untouched", "`encode` changes batch")
class ScalesItsViews(Fixed):
    def encode(self, batch, tokens_of):
        for views in batch.views.values():
            views.groups[0].x.mul_(0.5)
        return super().encode(batch, tokens_of)


class Noise:
    def __init__(self, collators):
        self.collators = collators

    def __call__(self, sample, views, visit):
        return {name: [View(torch.randn(48)) for _ in views[name]] for name in self.collators}


@broken("reading", "what is read differs the second time")
class DrawsAnew(Fixed):
    @classmethod
    def reader(cls, config, name, plan, collators):
        return Noise(dict.fromkeys(plan.views, stack))


@broken("not_finite", "a step that is not finite moves it")
class MovesAnyway(Average):
    def after_step(self, progress, finite=None):
        self.follow(0.5)


@broken("resumed", "hold what moves in buffers")
class CountsOnItsOwn(Average):
    def __init__(self, config, name, plan, student):
        super().__init__(config, name, plan, student)
        self.steps = 0

    def after_step(self, progress, finite=None):
        self.steps += 1
        self.follow(1 / self.steps, finite)


@broken("frozen", "it is `cacheable`, and what it says moves")
class NotFrozen(Average):
    @classmethod
    def cacheable(cls, config):
        return True


@broken("copied_parts", "is the student's own tensor, which trains")
class Shares(Average):
    def __init__(self, config, name, plan, student):
        super().__init__(config, name, plan, student)
        self.shared = next(student.parameters())


@broken("layers", "does not hand on the layer 0")
class DropsLayers(Average):
    def encode(self, batch, tokens_of):
        return {name: replace(features, layers={}) for name, features in super().encode(batch, tokens_of).items()}
