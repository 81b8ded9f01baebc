"""What weighs the losses against one another."""

from typing import Annotated

import torch
from pydantic import Field

from distill_core import Balance, ComponentConfig


class RandomConfig(ComponentConfig):
    """Options of `my_plugin_random`."""

    spread: Annotated[float, Field(ge=0)] = 1.0
    """Deviation of the factors' logarithms before they are made to sum to the number of losses."""


class Random(Balance):
    """Factors that are drawn anew each step (Lin et al. 2022)."""

    name = "my_plugin_random"
    Config = RandomConfig

    def forward(self, losses, outputs):
        """By the step alone, so that all ranks and a resumed run draw the same."""
        draw = torch.Generator().manual_seed(outputs.progress.step)
        factors = len(losses) * (self.config.spread * torch.randn(len(losses), generator=draw)).softmax(0)
        return dict(zip(losses, factors.unbind(), strict=True)), {}
