"""Components that conform, one of each kind or more."""

import torch
from my_plugin.data import Waves
from my_plugin.evaluation import Agreement
from my_plugin.fusion import MeanFusion
from my_plugin.loss import Match
from my_plugin.schedule import Linear
from my_plugin.tower import Tower, stack
from my_plugin.views import Noisy
from torch import nn

from distill_core.components import (
    Dims,
    Initializer,
    Loaded,
    Loss,
    Needs,
    Optimizer,
    Tracker,
)
from distill_core.types import Features


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

    def start(self, folder, name, recipe, resume):
        self.folder = folder

    def log(self, step, values, context):
        assert self.folder

    def finish(self):
        self.folder = None


class Zeros(Initializer):
    """Starts the first backbone at zero."""

    name = "zeros"

    def apply(self, objective):
        names = [name for name in objective.state_dict() if name.startswith("backbone.first.")]
        state = objective.state_dict()
        objective.load_state_dict({name: torch.zeros_like(state[name]) for name in names}, strict=False)
        return Loaded("zeros", frozenset(names))


class MaskingTower(Tower):
    """A tower that can hide tokens."""

    name = "masking"

    def __init__(self, config):
        super().__init__(config)
        self.hidden = nn.Parameter(torch.randn(config.width))

    @classmethod
    def dims(cls, config):
        return Dims(config.width, config.dim, can_mask=True)

    @classmethod
    def collator(cls, config):
        return masking_stack

    def encode(self, x, *, tokens, token_mask):
        patches = self.embed(x.unflatten(1, (-1, self.config.patch)))
        if token_mask is not None:
            patches = torch.where(token_mask[..., None], self.hidden.to(patches.dtype), patches)
        sequence = patches + self.position
        return Features(self.project((sequence + self.mlp(sequence)).flatten(1))[None], {0: sequence} if tokens else {})


def masking_stack(samples, seeds=()):
    views = stack(samples)
    for group in views.groups:
        draws = [torch.rand(len(group.x), 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        group.token_mask = torch.stack(draws, 1) < 0.5
    return views


class Fill(Loss):
    """Masked tokens predict their targets; a teacher's head judges the embedding."""

    name = "fill"
    teacher_modules = ("head",)

    def __init__(self, config, plan):
        super().__init__(config, plan)
        modality = plan.modalities["signal"]
        self.predict = nn.Linear(modality.width, 5)
        self.head = nn.Linear(modality.dim, 6)

    @classmethod
    def needs(cls, config, plan):
        return Needs(
            teacher=True, modalities=("signal",), masked=("signal",), tokens={"signal": (0,)},
            views={"signal": {"global": 2}},
        )  # fmt: skip

    @classmethod
    def example_targets(cls, config, modality, token_mask):
        return torch.arange(token_mask.numel()).reshape(token_mask.shape) % 5

    def forward(self, outputs):
        group = outputs.views["signal"].groups[0]
        mask, targets = group.token_mask[0], group.targets[0]
        scores = self.predict(outputs.student["signal"].tokens[0].float())
        errors = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
        with torch.no_grad():
            goal = outputs.ema(self.head)(outputs.teacher["signal"].pooled[0].float()).softmax(-1)
        mine = self.head(outputs.student["signal"].pooled[1].float()).log_softmax(-1)
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
    def dims(cls, config):
        return Dims(config.width, config.dim, dense=("plain",))

    def dense(self, x, *, attention):
        found = self.encode(x, tokens=True, token_mask=None)
        part = self.project.weight.unflatten(1, (-1, self.config.width))
        return found.pooled[0], torch.einsum("nlw,dlw->nld", found.tokens[0], part)


GOOD = (
    Noisy, Tower, MaskingTower, Telling, MeanFusion, Match, Fill, Waves, Agreement, Linear, Sgd, Silent, Zeros,
)  # fmt: skip
