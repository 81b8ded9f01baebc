"""What losses and tasks call beside towers and fusion."""

from typing import Annotated

from pydantic import Field
from torch import nn

from distill_core import ComponentConfig, Head, Needs


class ProjectionConfig(ComponentConfig):
    """Options of `my_plugin_projection`."""

    modality: str = "left"
    """Whose embeddings it takes."""
    width: Annotated[int, Field(gt=0)] = 32
    """Of what it gives."""


class Projection(Head):
    """Two linear maps with a GELU between them. A loss names it in `Needs.heads`, and calls `outputs.heads[NAME]`."""

    name = "my_plugin_projection"
    Config = ProjectionConfig

    def __init__(self, config, plan):
        super().__init__(config, plan)
        dim = plan.modalities[config.modality].spec.dim
        self.layers = nn.Sequential(nn.Linear(dim, config.width), nn.GELU(), nn.Linear(config.width, config.width))

    @classmethod
    def needs(cls, config, plan):
        """What it is called with, for the losses that call it."""
        return Needs(student=(config.modality,))

    def forward(self, x):
        """Embeddings [..., D] -> [..., width]."""
        return self.layers(x)
