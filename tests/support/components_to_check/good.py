"""Components that conform, one of each kind or more."""

import my_plugin.cases
import torch
from my_plugin.balance import Random
from my_plugin.data import Waves
from my_plugin.fusion import MeanFusion
from my_plugin.hook import Noise
from my_plugin.joint import SharedGap
from my_plugin.loss import Match
from my_plugin.schedule import Linear
from my_plugin.task import Agreement
from my_plugin.tower import Tower, stack
from my_plugin.views import Noisy
from torch import nn
from wrapping_losses import Ramped

from distill_core.batch import Group, View, Views
from distill_core.contracts.cases import ConformanceCase, ConformanceCases
from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.optimizer import Optimizer
from distill_core.contracts.tracker import Tracker, TrackerConfig
from distill_core.contracts.weights import LoadReport, WeightLoader
from distill_core.interfaces import Backbone, Loss, TowerInput
from distill_core.outputs import Encoded
from distill_core.plan import BackboneSpec, Needs, same_dim
from distill_core.system.distributed import all_gather, rank


class Sgd(Optimizer):
    """Plain gradient descent."""

    name = "sgd"

    def groups(self, parameters):
        return [{"params": [p], "lr": 0.1 * factor} for _, p, factor in parameters]

    def build(self, groups):
        return torch.optim.SGD(groups)


class Silent(Tracker):
    """Keeps nothing."""

    name = "silent"
    Config = TrackerConfig

    def start(self, folder, name, recipe, resume):
        self.folder = folder

    def log(self, step, values, context):
        assert self.folder

    def finish(self):
        self.folder = None


class Zeros(WeightLoader):
    """Starts the first backbone at zero."""

    name = "zeros"

    def apply(self, objective):
        names = [name for name in objective.state_dict() if name.startswith("backbone.first.")]
        state = objective.state_dict()
        objective.load_state_dict({name: torch.zeros_like(state[name]) for name in names}, strict=False)
        return LoadReport("zeros", frozenset(names))


class MaskingTower(Tower):
    """A tower that can hide tokens."""

    name = "masking"

    def __init__(self, config):
        super().__init__(config)
        self.hidden = nn.Parameter(torch.randn(config.width))

    @classmethod
    def spec(cls, config):
        return BackboneSpec(config.width, config.dim, can_mask=True)

    @classmethod
    def collator(cls, config):
        return masking_stack

    def encode(self, x, *, tokens, token_mask):
        patches = self.embed(x.unflatten(1, (-1, self.config.patch)))
        if token_mask is not None:
            patches = torch.where(token_mask[..., None], self.hidden.to(patches.dtype), patches)
        sequence = patches + self.position
        return Encoded(self.project((sequence + self.mlp(sequence)).flatten(1)), sequence if tokens else None)


def masking_stack(samples, seeds=()):
    views = stack(samples)
    for group in views.groups:
        draws = [torch.rand(len(group.x), 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        group.token_mask = torch.stack(draws, 1) < 0.5
    return views


class DeepTower(Tower):
    """Hands on two layers, and drops tokens."""

    name = "deep"

    def __init__(self, config):
        super().__init__(config)
        self.second = nn.Linear(config.width, config.width)
        self.project = nn.Linear(config.width, config.dim)

    @classmethod
    def spec(cls, config):
        return BackboneSpec(config.width, config.dim, layers=2, can_drop=True)

    def encode(self, x, *, tokens, token_mask):
        return self.encode_together([TowerInput(x, tokens, token_mask)])[0]

    def encode_together(self, inputs):
        return [self.encode_one(one) for one in inputs]

    def encode_one(self, one):
        patches = self.embed(one.x.unflatten(1, (-1, self.config.patch))) + self.position
        if one.keep is not None:
            patches = patches.take_along_dim(one.keep[..., None], 1)
        first = patches + self.mlp(patches)
        last = first + self.second(first)
        layers = {layer: (first, last)[layer] for layer in one.layers}
        return Encoded(self.project(last.mean(1)), last if one.tokens else None, layers=layers)


class Fill(Loss):
    """Masked tokens predict their targets; a teacher's head judges the embedding."""

    name = "fill"
    teacher_modules = ("head",)
    across_ranks = False

    def __init__(self, config, plan):
        super().__init__(config, plan)
        modality = plan.modalities["signal"]
        self.predict = nn.Linear(modality.spec.width, 5)
        self.head = nn.Linear(modality.spec.dim, 6)

    @classmethod
    def needs(cls, config, plan):
        return Needs(
            teacher={"default": {"signal": ()}}, masked=("signal",), tokens={"signal": (0,)},
            views={"signal": {"global": 2}},
        )  # fmt: skip

    def forward(self, outputs):
        group = outputs.views["signal"].groups[0]
        mask, targets = group.token_mask[0], group.targets[0]
        scores = self.predict(outputs.student["signal"].tokens[0].float())
        errors = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
        with torch.no_grad():
            goal = outputs.ema(self.head)(outputs.teacher["default"]["signal"].pooled[0].float()).float().softmax(-1)
        mine = self.head(outputs.student["signal"].pooled[1].float()).float().log_softmax(-1)
        return {"fill": self.mean(errors, mask.flatten()), "head": -(goal * mine).sum(-1).mean()}, {}

    def mean(self, errors, mask):
        return (errors * mask).sum() / mask.sum().clamp(min=1)


class Telling(Tower):
    """A tower that tells how it reads its tokens, and embeds each."""

    name = "telling"

    def token_layout(self, view):
        return 1, len(view.data) // self.config.patch

    def class_attention(self, x):
        count = x.shape[-1] // self.config.patch
        return x.new_full((len(x), 2, count), 1 / count)

    @classmethod
    def spec(cls, config):
        return BackboneSpec(config.width, config.dim, dense=("plain",))

    def dense(self, x, *, attention):
        found = self.encode(x, tokens=True, token_mask=None)
        part = self.project.weight.unflatten(1, (-1, self.config.width))
        return found.pooled, torch.einsum("nlw,dlw->nld", found.tokens, part)


class WordsConfig(ComponentConfig):
    """Options of `words`."""

    width: int = 12
    """Width W of the tokens."""
    dim: int = 8
    """Width D of the embedding."""


class Words(Backbone):
    """Token ids of any length, padded with 0 -> tokens; their mean, projected."""

    name = "words"
    Config = WordsConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(20, config.width)
        self.mlp = nn.Sequential(nn.Linear(config.width, config.width), nn.GELU())
        self.project = nn.Linear(config.width, config.dim)

    @classmethod
    def spec(cls, config):
        return BackboneSpec(config.width, config.dim)

    @classmethod
    def collator(cls, config):
        return pad

    def encode(self, x, *, tokens, token_mask):
        real = x > 0
        sequence = self.mlp(self.embed(x))
        pooled = self.project(self.mean(sequence, real))
        return Encoded(pooled, sequence, real) if tokens else Encoded(pooled)

    def mean(self, sequence, real):
        return (sequence * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def pad(samples, seeds=()):
    groups = []
    for i, view in enumerate(samples[0]):
        x = nn.utils.rnn.pad_sequence([views[i].data for views in samples], batch_first=True)
        groups.append(Group(x[None], view.role))
    return Views(groups)


class TokenMatch(Loss):
    """Mean token of each modality, mapped: cross-entropy of the first side against all ranks' of each other one."""

    name = "token_match"

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.map = nn.ModuleDict({name: nn.Linear(m.spec.width, 7) for name, m in plan.modalities.items()})

    @classmethod
    def needs(cls, config, plan):
        names = tuple(dict.fromkeys(("left", "right", *plan.modalities)))
        return Needs(student=names, tokens=dict.fromkeys(names, (0,)), embeddings=())

    def mean(self, tokens, mask):
        real = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
        return (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def gather(self, x):
        return all_gather(x)

    def forward(self, outputs):
        a, *others = (
            nn.functional.normalize(self.map[name](self.mean(f.tokens[0], f.masks.get(0))).float(), dim=-1)
            for name, f in outputs.student.items()
        )
        own = rank() * len(a) + torch.arange(len(a))
        return {"tokens": sum(nn.functional.cross_entropy(a @ self.gather(b).T, own) for b in others)}, {}


class Centred(Loss):
    """Distance of the student's first view to the teacher's, less a running mean of the teacher's over all ranks."""

    name = "centred"

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.register_buffer("centre", torch.zeros(plan.modalities["left"].spec.dim))

    @classmethod
    def needs(cls, config, plan):
        return Needs(teacher={"default": {"left": ()}})

    @classmethod
    def problems(cls, config, plan):
        return same_dim(cls.name, ("left",), plan, "default")

    def forward(self, outputs):
        goal = outputs.teacher["default"]["left"].embedding[0] - self.centre
        return {"distance": (outputs.student["left"].embedding[0] - goal).square().sum(-1).mean()}, {}

    def move(self, mean):
        self.centre.lerp_(all_gather(mean[None]).mean(0), 0.1)

    @torch.no_grad()
    def after_step(self, outputs, progress):
        self.move(outputs.teacher["default"]["left"].embedding[0].mean(0))


class ReadsIds(Loss):
    """Each token predicts the next id of its text: the targets are the views themselves."""

    name = "reads_ids"

    def __init__(self, config, plan):
        super().__init__(config, plan)
        self.predict = nn.Linear(plan.modalities["left"].spec.width, 20)

    @classmethod
    def needs(cls, config, plan):
        return Needs(student=("left",), tokens={"left": (0,)}, embeddings=())

    def forward(self, outputs):
        features, ids = outputs.student["left"], outputs.views["left"].groups[0].x[0]
        scores = self.predict(features.tokens[0][:, :-1]).float()
        errors = nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        real = features.masks.get(0, torch.ones(ids.shape, dtype=torch.bool))[:, 1:]
        errors = (errors.view_as(real) * real).sum(1) / real.sum(1).clamp(min=1)
        return {"next": errors.mean()}, {}


class TwoRates(Optimizer):
    """Gradient descent, vectors a tenth as fast as matrices."""

    name = "two_rates"

    def groups(self, parameters):
        return [{"params": [p], "lr": (0.1 if p.ndim > 1 else 0.01) * factor} for _, p, factor in parameters]

    def build(self, groups):
        return torch.optim.SGD(groups)


def counted_targets(config, modality, token_mask):
    return torch.arange(token_mask.numel()).reshape(token_mask.shape) % 5


def ids(config, rng):
    lengths = rng.integers(2, 7, 2)
    return [
        View(torch.from_numpy(rng.permutation(19)[:n] + 1), r)
        for n, r in zip(lengths, ("global", "local"), strict=True)
    ]


CASES = ConformanceCases(
    [*my_plugin.cases.CASES, ConformanceCase(Fill, targets=counted_targets), ConformanceCase(Words, views=ids)]
)
"""What the components here, and those that are broken in one way, are checked with."""


GOOD = (
    Noisy, SharedGap, Tower, MaskingTower, DeepTower, Telling, Words, MeanFusion, Match, Fill, TokenMatch, Centred,
    ReadsIds, Ramped, Waves, Agreement, Linear, Noise, Random, Sgd, TwoRates, Silent, Zeros,
)  # fmt: skip
