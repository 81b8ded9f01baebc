"""Augmentations, optimizers, schedules, trackers, sources, evaluations and initializers with a bug each."""

import itertools
import threading

import numpy as np
import torch
from components_to_check.good import Sgd, Silent, Zeros
from components_to_check.seeded import seeded
from my_plugin.data import Waves
from my_plugin.schedule import Linear
from my_plugin.task import Agreement
from my_plugin.views import Noisy

from distill_core import TarShard
from distill_core.batch import View
from distill_core.contracts.weights import LoadReport


@seeded("nondeterminism")
class CountsItsViews(Noisy):
    numbers = itertools.count()

    def train_views(self, sample, rng):
        return [View(v.data + next(self.numbers) % 7, v.role) for v in super().train_views(sample, rng)]


@seeded("in-place change")
class PlainWritesTheItem(Noisy):
    def decode(self, sample, field=None):
        return [np.array(super().decode(sample, field)[0])]

    def eval_view(self, item):
        view = super().eval_view(item)
        np.clip(item, -0.1, 0.1, out=item)
        return view


@seeded("in-place change")
class OneBufferForAll(Noisy):
    def __init__(self, config):
        super().__init__(config)
        self.buffer = torch.zeros(3, config.length)

    def train_views(self, sample, rng):
        made = super().train_views(sample, rng)
        for row, view in zip(self.buffer, made, strict=True):
            row.copy_(view.data)
        return [View(row, v.role) for row, v in zip(self.buffer, made, strict=True)]


@seeded("roles not together")
class MixedRoles(Noisy):
    @classmethod
    def roles(cls, config):
        return ("global", "local", "global")


@seeded("non-picklable")
class HoldsAGenerator(Noisy):
    def __init__(self, config):
        super().__init__(config)
        self.offsets = (i for i in range(3))


@seeded("optimizer")
class DecaysNorms(Sgd):
    def build(self, groups):
        return torch.optim.SGD(groups, weight_decay=0.1)


class FixedRate(torch.optim.SGD):
    """Takes the learning rate once."""

    def __init__(self, groups):
        super().__init__(groups)
        self.rates = [group["lr"] for group in self.param_groups]

    def step(self, closure=None):
        for rate, group in zip(self.rates, self.param_groups, strict=True):
            group["lr"] = rate
        super().step(closure)


@seeded("optimizer")
class IgnoresTheSchedule(Sgd):
    def build(self, groups):
        return FixedRate(groups)


@seeded("optimizer")
class NoFactorForMatrices(Sgd):
    def groups(self, parameters):
        return [{"params": [p], "lr": 0.1 * (factor if p.ndim < 2 else 1)} for _, p, factor in parameters]


@seeded("optimizer")
class Climbs(Sgd):
    def build(self, groups):
        return torch.optim.SGD(groups, maximize=True)


@seeded("schedule that is no course")
class RisesFromTheLast(Linear):
    last = 0.0

    def value(self, progress):
        self.last += 1 / progress.steps
        return self.last


@seeded("schedule that is no course")
class NothingInTheMiddle(Linear):
    def value(self, progress):
        gap = progress.step == 2 * progress.steps // 7 and progress.steps > 100
        return float("inf") if gap else super().value(progress)


@seeded("tracker that blocks")
class WaitsForAServer(Silent):
    def log(self, step, values, context):
        threading.Event().wait()


@seeded("in-place change")
class PopsTheLoss(Silent):
    def log(self, step, values, context):
        values.pop("loss", None)


class BackToFront(TarShard):
    def __getitem__(self, number):
        return super().__getitem__(len(self) - 1 - number)


@seeded("source whose shards lie")
class ReadsBackToFront(Waves):
    def sets(self, split):
        return {name: [BackToFront(shard.name) for shard in shards] for name, shards in super().sets(split).items()}


@seeded("source whose shards lie")
class ShardTwice(Waves):
    def sets(self, split):
        return {name: shards * 2 for name, shards in super().sets(split).items()}

    def _write(self, path, samples, rng):
        super()._write(path, samples // 2, rng)


@seeded("task changes the model")
class LeavesEvalMode(Agreement):
    def run(self, model, sets):
        for module in model.backbone.values():
            module.eval()
        return super().run(model, sets)


@seeded("task changes the model")
class FreezesTheModel(Agreement):
    def run(self, model, sets):
        for module in model.backbone.values():
            module.requires_grad_(False)
        return super().run(model, sets)


@seeded("task changes the model")
class TurnsGradientsOff(Agreement):
    def run(self, model, sets):
        torch.set_grad_enabled(False)
        return super().run(model, sets)


@seeded("in-place change")
class CentresEmbeddings(Agreement):
    def run(self, model, sets):
        scores = super().run(model, sets)
        for samples in sets:
            embedded, _ = samples.embeddings(model, model.modalities[0])
            embedded.sub_(embedded.mean(0))
        return scores


@seeded("weights that hides what it loaded")
class NamesTooFew(Zeros):
    def apply(self, objective):
        loaded = super().apply(objective)
        return LoadReport(loaded.line, frozenset(list(loaded.names)[:1]))
