"""Views -> features. V views, B samples, N = V * B, L tokens of width W, embeddings of width D."""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import nn

from distill_core import Backbone, BackboneSpec, ComponentConfig, Encoded, Group, Views

Positive = Annotated[int, Field(gt=0)]


class TowerConfig(ComponentConfig):
    """Options of `my_plugin_tower`."""

    length: Positive = 64
    """Numbers in a signal."""
    patch: Positive = 8
    """Numbers in a token."""
    width: Positive = 64
    """Width W of the tokens."""
    dim: Positive = 32
    """Width D of the embedding."""

    @model_validator(mode="after")
    def _fits(self):
        if self.length % self.patch:
            raise ValueError(f"length {self.length} is not a multiple of patch {self.patch}")
        return self


class Tower(Backbone):
    """Patches of a signal, with positions, through an MLP -> tokens; their mean, projected -> the embedding."""

    name = "my_plugin_tower"
    Config = TowerConfig
    examples = ({"length": 16, "patch": 4, "width": 16, "dim": 8},)  # small options for check-plugin

    def __init__(self, config):
        super().__init__(config)
        width = config.width
        self.embed = nn.Linear(config.patch, width)
        self.position = nn.Parameter(0.02 * torch.randn(config.length // config.patch, width))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.project = nn.Linear(config.length // config.patch * width, config.dim)

    @classmethod
    def spec(cls, config):
        """Known before anything is built."""
        return BackboneSpec(config.width, config.dim)

    @classmethod
    def collator(cls, config):
        """A function of this module: it goes to the loader's workers."""
        return stack

    def units(self):
        """Parts that `train.parallel` compiles, each as one graph; a transformer would name its blocks."""
        return [self.mlp]

    def encode(self, x, *, tokens, token_mask):
        """x [N, length] -> pooled [N, D], tokens [N, L, W]."""
        patches = self.embed(x.unflatten(1, (-1, self.config.patch))) + self.position
        sequence = patches + self.mlp(patches)
        pooled = self.project(sequence.flatten(1))
        return Encoded(pooled, sequence if tokens else None)


def stack(samples, seeds=()):
    """The views of B samples -> groups [V, B, length] by role."""
    groups = []
    for role in dict.fromkeys(view.role for view in samples[0]):
        members = [i for i, view in enumerate(samples[0]) if view.role == role]
        x = torch.stack([torch.stack([sample[i].data for sample in samples]) for i in members])
        groups.append(Group(x, role))
    return Views(groups)
