"""Broken schedules, optimisers, sources, evaluations, trackers and initializers."""

from dataclasses import replace

import numpy as np
import torch
from components_to_check.broken import broken
from components_to_check.good import Sgd, Silent, Zeros
from components_to_check.seeded_others import DecaysNorms, IgnoresTheSchedule
from my_plugin.balance import Random
from my_plugin.data import Waves
from my_plugin.hook import Noise
from my_plugin.schedule import Linear
from my_plugin.task import Agreement

from distill_core import TarShard
from distill_core.contracts.weights import LoadReport
from distill_core.errors import UserError
from distill_core.evaluate.score import Score


@broken("values", "at step 6 of 10 the value is nan; it must be a finite number")
class NotFinite(Linear):
    def value(self, progress):
        return float("nan") if progress.step == 6 else 1.0


@broken("values", "depends on earlier calls")
class Stateful(Linear):
    calls = 0

    def value(self, progress):
        self.calls += 1
        return 1 / self.calls


@broken("hooked", "leaves weight elsewhere: the optimiser alone moves weights")
class LeavesThem(Noise):
    def gradients(self, computation, compute):
        losses = super().gradients(computation, compute)
        with torch.no_grad():
            computation.parameters[0][1].add_(0.1)
        return losses


@broken("hooked", "does not continue as it did")
class Counts(Noise):
    calls = 0

    def gradients(self, computation, compute):
        losses = compute()
        self.calls += 1
        computation.parameters[0][1].grad.mul_(self.calls)
        return losses


@broken("hooked", "`state_dict` must hold plain data and tensors")
class SavesAnObject(Noise):
    def state_dict(self):
        return {"generator": np.random.default_rng(0)}


@broken("factors", "a gradient goes through a factor to a loss")
class BalancesByTheGraph(Random):
    def forward(self, losses, outputs):
        return {name: 1 / (1 + value.abs()) for name, value in losses.items()}, {}


@broken("factors", "gives factors of first; the losses: first, second, third")
class BalancesOne(Random):
    def forward(self, losses, outputs):
        return {next(iter(losses)): torch.ones(())}, {}


@broken("balanced", "one that takes the state dict of another gives other factors")
class BalancesByAnAttribute(Random):
    calls = 1.0

    def forward(self, losses, outputs):
        return {name: torch.tensor(self.calls) for name in losses}, {}

    def after_step(self, losses, progress):
        self.calls += 1


@broken("equal_ranks", "two ranks have different factors or state")
class BalancesEachRank(Random):
    def __init__(self, config, losses):
        super().__init__(config, losses)
        self.register_buffer("size", torch.ones(()))

    def forward(self, losses, outputs):
        return dict.fromkeys(losses, self.size), {}

    def after_step(self, losses, progress):
        self.size.copy_(sum(losses.values()).abs())


@broken("steps", "each parameter exactly once")
class Forgets(Sgd):
    def groups(self, parameters):
        return [{"params": [p], "lr": 0.1} for _, p, _ in parameters if p.ndim > 1]


@broken("steps", "times the parameter's factor")
class OneRate(Sgd):
    def groups(self, parameters):
        return [{"params": [p], "lr": 0.1} for _, p, _ in parameters]


class Slowing(torch.optim.SGD):
    done = 0

    def step(self, closure=None):
        self.done += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(group["lr"] / self.done * parameter.grad)


@broken("optimizer_state", "after load_state_dict the next step differs")
class UnsavedSteps(Sgd):
    def build(self, groups):
        return Slowing(groups)


@broken("splits", "KeyError")
class UnknownSplit(Waves):
    def sets(self, split):
        return {"waves": {name: [TarShard(self._path(name))] for name in ("train", "validation", "test")}[split]}


class LongShard(TarShard):
    def __len__(self):
        return super().__len__() + 1


@broken("shards", "its length is 17, and it holds 16")
class Miscounts(Waves):
    def sets(self, split):
        return {name: [LongShard(shard.name) for shard in shards] for name, shards in super().sets(split).items()}


@broken("pickling", "pickle")
class SourceWithLambda(Waves):
    def __init__(self, config):
        super().__init__(config)
        self.open = lambda path: path


@broken("scores", "the score 'cosine' is tensor")
class TensorScore(Agreement):
    def run(self, model, sets):
        return [replace(score, value=torch.tensor(score.value)) for score in super().run(model, sets)]


@broken("scores", "different scores the second time")
class RandomScore(Agreement):
    def run(self, model, sets):
        return [Score(None, "cosine", torch.rand(()).item())]


@broken("scores", r"it gives the mean\(s\) \{'cosine'\}, which `means` does not name")
class NamesAnother(Agreement):
    @classmethod
    def means(cls, config):
        return ("cosines",)


@broken("scores", "must return `Score`s")
class Numbers(Agreement):
    def run(self, model, sets):
        return {score.name: score.value for score in super().run(model, sets)}


@broken("scores", "two scores of one set have the same name: .*cosine")
class OneName(Agreement):
    def run(self, model, sets):
        return 2 * super().run(model, sets)


@broken("scores", "the headline {'cosine'} has no mean over sets")
class HidesItsHeadline(Agreement):
    def run(self, model, sets):
        return [score for score in super().run(model, sets) if score.set is not None]


@broken("scores", "sets that `run` was not given: {'elsewhere'}")
class ScoresAnotherSet(Agreement):
    def run(self, model, sets):
        return [*super().run(model, sets), Score("elsewhere", "cosine", 1.0)]


@broken("nothing_to_score", "raises ZeroDivisionError.*raise DataError")
class Divides(Agreement):
    def run(self, model, sets):
        a, b = (sets[0].embeddings(model, name)[0] for name in model.modalities)
        return [Score(None, "cosine", float((a * b).sum()) / len(a))]


@broken("tracked", "AttributeError")
class NeverStarted(Silent):
    def start(self, folder, name, recipe, resume):
        if not resume:
            self.folder = folder


@broken("refusal", "raises UserError after changing backbone")
class HalfLoaded(Zeros):
    def apply(self, objective):
        super().apply(objective)
        raise UserError("no such file")


@broken("refusal", "which the model does not have")
class Invents(Zeros):
    def apply(self, objective):
        return LoadReport("all", frozenset({"backbone.third.weight"}))


@broken("refusal", "raise FileNotFoundError.*raise UserError")
class Traceback(Zeros):
    def apply(self, objective):
        raise FileNotFoundError("weights.pt")


broken("weight_decay", "1.weight.* decay: in `groups`, give parameters with ndim < 2 weight_decay 0")(DecaysNorms)
broken("scheduled", "the schedule sets it")(IgnoresTheSchedule)
