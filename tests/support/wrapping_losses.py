"""Losses around losses, as a stranger's package would write them, where other processes can import them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core import Loss, LossConfig, Needs, Outputs, Plan, Progress, Rows, Scheduled, Slot


class RampedConfig(LossConfig):
    """Options of `ramped`."""

    inner: Slot[Loss]
    """The loss."""
    power: Scheduled[Annotated[float, Field(gt=0)]] = Scheduled(1.0)
    """Of each term."""


class Ramped(Loss):
    """Another loss's terms, each to a power that may move."""

    name = "ramped"
    Config = RampedConfig
    partial = True
    examples = ({"inner": {"name": "contrastive"}}, {"inner": {"name": "ibot", "prototypes": 8, "hidden": 8}})

    def __init__(self, config: RampedConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.inner = config.inner.build(plan)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As the inner loss names them."""
        terms, metrics = self.inner.weighted(outputs)
        power = self.config.power.value(outputs.progress)
        return {name: term**power for name, term in terms.items()}, metrics


class MeanConfig(LossConfig):
    """Options of `mean_of`."""

    of: Annotated[list[Slot[Loss]], Field(min_length=1)]
    """The losses."""
    more: dict[str, Slot[Loss]] = {}  # noqa: RUF012
    """Further ones, by name."""


class Mean(Loss):
    """The mean of several losses' terms."""

    name = "mean_of"
    Config = MeanConfig
    partial = True
    examples = (
        {"of": ["contrastive", {"name": "ramped", "inner": "cross_modal_distillation"}], "more": {"third": "siglip"}},
    )

    def __init__(self, config: MeanConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.of = nn.ModuleList(slot.build(plan) for slot in config.of)
        self.more = nn.ModuleDict({name: slot.build(plan) for name, slot in config.more.items()})

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term; the parts' metrics by their path."""
        parts, metrics = [], {}
        for path, loss in self.nested().items():
            terms, own = loss.weighted(outputs)
            parts += terms.values()
            metrics |= {f"{path}/{name}": value for name, value in own.items()}
        return {"mean": torch.stack([*parts]).mean()}, metrics


class ChosenConfig(LossConfig):
    """Options of `chosen`."""

    inner: Slot[Loss]
    """The loss."""
    field: str = "score"
    """What is known of each sample."""
    least: float = 0.5
    """The samples that count have at least this much of it."""


class Chosen(Loss):
    """Another loss over the samples that a field chooses."""

    name = "chosen"
    Config = ChosenConfig
    partial = True
    examples = ({"inner": "clip"}, {"inner": "cross_modal_distillation"})

    def __init__(self, config: ChosenConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.inner = config.inner.build(plan)

    @classmethod
    def needs(cls, config: ChosenConfig, plan: Plan) -> Needs:
        return Needs(fields=(config.field,))

    def chosen(self, outputs: Outputs) -> Outputs:
        """Of the samples that count, on each rank."""
        return outputs.only((outputs.fields[self.config.field] >= self.config.least).cpu().numpy())

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """The inner loss's."""
        return self.inner.gathers(self.chosen(outputs))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As the inner loss names them."""
        some = self.chosen(outputs)
        share = some.weight / outputs.weight if outputs.weight else 0.0
        terms, metrics = self.inner.weighted(some)
        return {name: share * term for name, term in terms.items()}, metrics

    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        """The inner loss's."""
        self.inner.after_step(self.chosen(outputs), progress)


class Whole(Ramped):
    """Cannot do without samples that lack a modality."""

    name = "whole"
    partial = False
