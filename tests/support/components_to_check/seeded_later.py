"""Bugs that were written when the checks were done: the rate on these is the honest one."""

import random
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
from components_to_check.good import Centred, Fill, MaskingTower, Sgd, Silent, TokenMatch, TwoRates, Words, Zeros, pad
from components_to_check.seeded import seeded
from my_plugin.data import Waves
from my_plugin.fusion import MeanFusion
from my_plugin.loss import Match
from my_plugin.schedule import Linear
from my_plugin.task import Agreement
from my_plugin.tower import Tower
from my_plugin.views import Noisy
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from distill_core import TarShard
from distill_core.batch import View
from distill_core.outputs import Encoded, Fused
from distill_core.plan import BackboneSpec, Needs
from distill_core.system.distributed import rank, world_size


def held(bug):
    return seeded(bug, held_back=True)


# losses


@held("gradient into the teacher")
class MovesTheTeachersHead(Fill):
    @torch.no_grad()
    def after_step(self, outputs, progress):
        for mine, theirs in zip(self.head.parameters(), outputs.ema(self.head).parameters(), strict=True):
            theirs.lerp_(mine, 0.1)


@held("gradient into the teacher")
class TargetsOfTheStudent(Centred):
    def forward(self, outputs):
        goal = outputs.student["left"].embedding[1] - self.centre
        return {"distance": (outputs.student["left"].embedding[0] - goal).square().sum(-1).mean()}, {}


@held("in-place change")
class ReplacesFused(Match):
    def forward(self, outputs):
        outputs.fused["left"].pooled = outputs.fused["left"].pooled * 2
        return super().forward(outputs)


@held("in-place change")
class WidensTheMask(TokenMatch):
    def forward(self, outputs):
        found = super().forward(outputs)
        for features in outputs.student.values():
            for mask in features.masks.values():
                mask.fill_(True)
        return found


@held("undeclared needs")
class TeacherIsNotDeclared(Match):
    @classmethod
    def needs(cls, config, plan):
        return Needs(fused=config.modalities)


@held("undeclared needs")
class TokensOfMoreViews(TokenMatch):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        later = [f.tokens[1].mean() for f in outputs.student.values() if len(f.pooled) > 1]
        return {"tokens": found["tokens"] + sum(later)}, metrics


@held("undeclared needs")
class TokenMaskIsNotDeclared(TokenMatch):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        hidden = outputs.views["left"].groups[0].token_mask.float().mean()
        return {"tokens": found["tokens"] * (1 + hidden)}, metrics


@held("padding")
class TeachersPadding(TokenMatch):
    @classmethod
    def needs(cls, config, plan):
        names = tuple(dict.fromkeys(("left", "right", *plan.modalities)))
        each = dict.fromkeys(names, (0,))
        return Needs(teacher={"default": each}, tokens=each, embeddings=())

    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        for name, features in outputs.student.items():
            mine = self.map[name](self.mean(features.tokens[0], features.masks.get(0)))
            theirs = self.map[name](outputs.teacher["default"][name].tokens[0].mean(1)).detach()
            found[name] = (mine - theirs).float().square().mean()
        return found, metrics


@held("unequal W and D")
class ComparesAnyWidths(Match):
    @classmethod
    def problems(cls, config, plan):
        return ()


@held("no class tokens")
class ReadsTheSecondClassToken(Match):
    @classmethod
    def problems(cls, config, plan):
        yield from super().problems(config, plan)
        if not plan.modalities["left"].spec.class_tokens:
            yield "needs a class token"

    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {
            "match": found["match"] + outputs.student["left"].class_tokens[:, :, 1].float().square().mean()
        }, metrics


@held("two ranks")
class LabelsOneRankOff(Match):
    def forward(self, outputs):
        a, b = self.config.modalities
        queries, keys = outputs.fused[a].embedding[0], outputs.teacher["default"][b].gathered[0]
        own = (rank() + torch.arange(len(queries))) % len(keys)
        return {"match": cross_entropy(self.log_scale.exp() * queries @ keys.T, own)}, {}


@held("two ranks")
class OnlyTheFirstGathers(Match):
    def forward(self, outputs):
        if dist.is_initialized() and rank() == 0:
            dist.all_reduce(torch.ones(1))
        return super().forward(outputs)


@held("two ranks")
class DividesByAllRows(TokenMatch):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {"tokens": found["tokens"] / world_size()}, metrics


@held("missing gradient")
class ScaleIsDetached(Match):
    def forward(self, outputs):
        a, b = self.config.modalities
        queries, keys = outputs.fused[a].embedding[0], outputs.teacher["default"][b].gathered[0]
        own = rank() * len(queries) + torch.arange(len(queries))
        return {"match": cross_entropy(self.log_scale.detach().exp() * queries @ keys.T, own)}, {}


@held("nondeterminism")
class NoiseOfNumpy(Match):
    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {"match": found["match"] * float(np.random.default_rng().uniform(0.9, 1.1))}, metrics


@held("state not in state_dict")
class CountsSteps(Match):
    steps = 0

    def forward(self, outputs):
        found, metrics = super().forward(outputs)
        return {"match": found["match"] * min(1.0, 0.1 * (self.steps + 1))}, metrics

    def after_step(self, outputs, progress):
        super().after_step(outputs, progress)
        self.steps += 1


@held("wrong shape or dtype")
class FloatMetric(Match):
    def forward(self, outputs):
        found, _ = super().forward(outputs)
        return found, {"scale": self.log_scale.exp().item()}


# fusions


@held("extra modality")
class MapsOfTwo(MeanFusion):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.map = nn.ModuleDict({name: self.map[name] for name in list(plan.modalities)[:2]})


@held("padding")
class SoftMask(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        weights = tokens.mean(-1) if mask is None else tokens.mean(-1) - 1.0 * ~mask
        return queries + self.map[modality]((tokens * weights.softmax(-1)[..., None]).sum(1))


@held("in-place change")
class RectifiesTokens(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        with torch.no_grad():
            tokens.relu_()
        return super().pool(modality, queries, tokens, mask)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@held("missing gradient")
class WrongBackward(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries, Doubled.apply(tokens), mask)


@held("unequal W and D")
class SwapsWidthAndDim(MeanFusion):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.map = nn.ModuleDict({name: nn.Linear(m.spec.dim, m.spec.width) for name, m in plan.modalities.items()})


@held("no class tokens")
class QueriesOfClassTokens(MeanFusion):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.ask = nn.ModuleDict({name: nn.Linear(m.spec.width, m.spec.dim) for name, m in plan.modalities.items()})

    def forward(self, features):
        found = super().forward(features)
        asked = {name: self.ask[name](f.class_tokens[:, :, 0]) for name, f in features.items()}
        return {name: Fused(normalize(found[name].pooled + asked[name], dim=-1)) for name in features}


@held("state not in state_dict")
class HiddenProjection(MeanFusion):
    def __init__(self, config, plan):
        super().__init__(config, plan)
        dim = next(iter(plan.modalities.values())).spec.dim
        self.register_buffer("turn", torch.randn(dim, dim), persistent=False)

    def pool(self, modality, queries, tokens, mask=None):
        return super().pool(modality, queries @ self.turn, tokens, mask)


@held("missing gradient")
class FirstViewLearnsAlone(MeanFusion):
    def pool(self, modality, queries, tokens, mask=None):
        queries = torch.cat([queries[:1], queries[1:].detach()])
        return super().pool(modality, queries, tokens, mask)


# backbones


@held("padding")
class LastTokenOfTheBatch(Words):
    def mean(self, sequence, real):
        return sequence[:, -1]


def sorting_pad(samples, seeds=()):
    samples.sort(key=lambda views: len(views[0].data))
    return pad(samples, seeds)


@held("in-place change")
class CollatorSorts(Words):
    @classmethod
    def collator(cls, config):
        return sorting_pad


@held("unequal W and D")
class SwappedDims(Tower):
    @classmethod
    def spec(cls, config):
        return BackboneSpec(config.dim, config.width)


@held("no class tokens")
class UnnamedClassTokens(Tower):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=True, token_mask=token_mask)
        classes = encoded.tokens.mean(1)[:, None]
        return Encoded(encoded.pooled, encoded.tokens if tokens else None, class_tokens=classes)


@held("wrong shape or dtype")
class PositionsOfTheFirstBatch(Words):
    def encode(self, x, *, tokens, token_mask):
        if not hasattr(self, "positions"):
            self.positions = torch.linspace(0, 1, x.shape[1])[:, None]
        encoded = super().encode(x, tokens=True, token_mask=token_mask)
        encoded.tokens = encoded.tokens + self.positions
        return encoded if tokens else Encoded(encoded.pooled)


def shuffling_pad(samples, seeds=()):
    views = pad(samples, seeds)
    for group in views.groups:
        group.token_mask = torch.rand(group.x.shape) < random.random()
    return views


@held("nondeterminism")
class MasksOfPythonsRandom(Words):
    @classmethod
    def collator(cls, config):
        return shuffling_pad


@held("gradient into the teacher")
class MovesInEvaluation(Tower):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.dim))

    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        if len(x):
            self.mean.lerp_(encoded.pooled.detach().mean(0), 1e-6)
        return encoded


@held("wrong shape or dtype")
class IntegerMask(Words):
    def encode(self, x, *, tokens, token_mask):
        encoded = super().encode(x, tokens=tokens, token_mask=token_mask)
        if encoded.mask is not None:
            encoded.mask = encoded.mask.long()
        return encoded


@held("gradient where it may not go")
class HidesForEverybody(MaskingTower):
    def encode(self, x, *, tokens, token_mask):
        self.hidden.requires_grad_(token_mask is not None)
        return super().encode(x, tokens=tokens, token_mask=token_mask)


# the rest


@held("nondeterminism")
class HashOfTheKey(Noisy):
    def train_views(self, sample, rng):
        return super().train_views(sample, np.random.default_rng(abs(hash(sample["__key__"]))))


@held("nondeterminism")
class SeedOfTheClock(Noisy):
    def train_views(self, sample, rng):
        return super().train_views(sample, np.random.default_rng(time.time_ns()))


@held("roles not together")
class SourcesBeforeRoles(Noisy):
    def train_views(self, sample, rng):
        made = super().train_views(sample, rng)
        return [made[0], made[2], made[1]]


@held("in-place change")
class CutsTheSample(Noisy):
    def train_views(self, sample, rng):
        made = super().train_views(sample, rng)
        sample[self.config.field] = sample[self.config.field][:4]
        return made


@held("non-picklable")
class HoldsALock(Waves):
    def __init__(self, config):
        super().__init__(config)
        self.lock = threading.Lock()


@held("non-picklable")
class ViewsOfGenerators(Noisy):
    def train_views(self, sample, rng):
        return [View((x for x in v.data.tolist()), v.role) for v in super().train_views(sample, rng)]


@held("optimizer")
class DecaysBiases(Sgd):
    def groups(self, parameters):
        return [{**group, "weight_decay": 0.01} for group in super().groups(parameters)]


@held("optimizer")
class FactorTwice(TwoRates):
    def groups(self, parameters):
        return super().groups([(name, p, factor**2) for name, p, factor in parameters])


@held("optimizer")
class NoGroupForVectors(TwoRates):
    def build(self, groups):
        return torch.optim.SGD([group for group in groups if group["lr"] > 0.05])


@held("schedule that is no course")
class DividesByStepsLessOne(Linear):
    def value(self, progress):
        return 1 - progress.step / (progress.steps - 1)


@held("schedule that is no course")
class NothingAtFirst(Linear):
    def value(self, progress):
        return super().value(progress) if progress.step else None


@held("tracker that blocks")
class WaitsInFinish(Silent):
    def finish(self):
        threading.Event().wait()


@held("source whose shards lie")
class ShufflesEachReading(Waves):
    def samples(self, split):
        found = {name: list(part) for name, part in super().samples(split).items()}
        return {name: Drawn(part) for name, part in found.items()}


class Drawn:
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(random.sample(self.samples, len(self.samples)))


@held("source whose shards lie")
class CountsShards(Waves):
    def sets(self, split):
        return {name: [OfOneSample(shard.name) for shard in shards] for name, shards in super().sets(split).items()}


class OfOneSample(TarShard):
    def __len__(self):
        return 1


@held("task changes the model")
class LeavesGradients(Agreement):
    def run(self, model, sets):
        found = super().run(model, sets)
        with torch.enable_grad():
            sum(p.square().sum() for module in model.backbone.values() for p in module.parameters()).backward()
        return found


@held("task changes the model")
class TakesTheTeachersBackbones(Agreement):
    def run(self, model, sets):
        found = super().run(model, sets)
        model.backbone = {name: module.half() for name, module in model.backbone.items()}
        return found


@held("task changes the model")
class SmallBatches(Agreement):
    def run(self, model, sets):
        model.batch_size = 1
        return super().run(model, sets)


@held("in-place change")
class SortsOwners(Agreement):
    def run(self, model, sets):
        found = super().run(model, sets)
        for samples in sets:
            samples.embeddings(model, model.modalities[0])[1].neg_()
        return found


@held("in-place change")
class NormalizesMedia(Silent):
    def start(self, folder, name, recipe, resume):
        super().start(folder, name, recipe, resume)
        recipe["name"] = name.upper()


@held("weights that hides what it loaded")
class FreezesWhatItLoads(Zeros):
    def apply(self, objective):
        objective.backbone["first"].requires_grad_(False)
        return super().apply(objective)
