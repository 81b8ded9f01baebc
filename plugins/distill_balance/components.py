"""Balances: by learned uncertainties, and by the losses' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core import Balance, ComponentConfig, Outputs, Progress, all_gather


class UncertaintyConfig(ComponentConfig):
    """Options of `uncertainty`."""

    limit: Annotated[float, Field(gt=0)] = 5.0
    """Log variances stay within -limit and limit, and factors within exp(-limit) and exp(limit): those of a loss that
    is zero or negative would fall without end."""


class Uncertainty(Balance):
    """exp(-s) * loss + s / 2, with a learned log variance s for each loss (Kendall, Gal & Cipolla, CVPR 2018).

    The form for cross-entropies (equation 10). Its minimum is at a factor of 1 / (2 loss): losses come to weigh the
    same, slowly. s starts at 0 and moves at the learning rate: `train.lr_factors: {balance: 10}` for a short run.
    """

    name = "uncertainty"
    Config = UncertaintyConfig

    def __init__(self, config: UncertaintyConfig, losses: Sequence[str]) -> None:
        super().__init__(config, losses)
        self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in losses})

    def forward(self, losses: Mapping[str, Tensor], outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return (
            {name: (-self.log_variance[name]).exp() for name in losses},
            {name: self.log_variance[name] / 2 for name in losses},
        )

    @torch.no_grad()
    def after_step(self, losses: Mapping[str, Tensor], progress: Progress) -> None:
        """Keep within the limit."""
        for value in self.log_variance.values():
            value.clamp_(-self.config.limit, self.config.limit)


class EqualMagnitudeConfig(ComponentConfig):
    """Options of `equal_magnitude`."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of the running mean of a loss's size."""
    limit: Annotated[float, Field(gt=1)] = 100.0
    """Factors stay within 1 / limit and limit."""


class EqualMagnitude(Balance):
    """Each loss times the mean size of all of them by its own, so that they weigh the same and their sum stays.

    Sizes are running means of the losses' absolute values over all ranks, up to the step before. The first step, and a
    loss that has been zero so far, has a factor of 1.
    """

    name = "equal_magnitude"
    Config = EqualMagnitudeConfig

    def __init__(self, config: EqualMagnitudeConfig, losses: Sequence[str]) -> None:
        super().__init__(config, losses)
        self.size = nn.Module()
        for name in losses:
            self.size.register_buffer(name, torch.zeros(()))

    def forward(self, losses: Mapping[str, Tensor], outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sizes = torch.stack([self.size.get_buffer(name) for name in losses])
        seen = sizes > 0
        mean = sizes.sum() / seen.sum().clamp(min=1)
        factors = torch.where(seen, mean / sizes.clamp(min=1e-30), 1.0).clamp(1 / self.config.limit, self.config.limit)
        return dict(zip(losses, factors.unbind(), strict=True)), {}

    @torch.no_grad()
    def after_step(self, losses: Mapping[str, Tensor], progress: Progress) -> None:
        """Move the means; those of a loss that is zero, as where no sample has what it needs, stay."""
        of_ranks = all_gather(torch.stack([value.float() for value in losses.values()])[None], 0)
        for name, value in zip(losses, of_ranks.mean(0).abs().unbind(), strict=True):
            size = self.size.get_buffer(name)
            moved = torch.where(size > 0, torch.lerp(value, size, self.config.momentum), value)
            size.copy_(torch.where(value > 0, moved, size))
