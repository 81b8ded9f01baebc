"""The optimiser's contract, what those with a decoupled weight decay share, and AdamW."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from distill_core.contracts.component import Component, ComponentConfig
from distill_core.contracts.schedule import NotNegative, Scheduled
from distill_core.outputs import Progress

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Component, ABC):
    """Builds a torch optimiser."""

    kind = "optimizer"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def groups(self, parameters: Sequence[tuple[str, nn.Parameter, float]]) -> list[dict[str, Any]]:
        """Parameter groups of (name, parameter, learning-rate factor): `lr` goes with the factor.

        Norms, biases and scales (ndim < 2) are not decayed.
        """

    def before_step(self, groups: list[dict[str, Any]], progress: Progress) -> None:
        """Set in the optimiser's groups what moves over the run beside the learning rate; called before each step."""
        return

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser. Each group's `lr` is its peak; the schedule sets it, so `step` must read it anew."""


class DecoupledConfig(ComponentConfig):
    """Options of optimisers with a decoupled weight decay."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: Scheduled[NotNegative] = Scheduled(0.5)
    """Decoupled decay of matrices, also a schedule; parameters with ndim < 2 (norms, biases, scales) have none."""


class DecoupledOptimizer(Optimizer):
    """Base: a group for each (decayed or not, learning-rate factor), and a weight decay that may move."""

    Config: ClassVar[type[ComponentConfig]] = DecoupledConfig

    def options(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Further options of the group that a parameter goes into; those with different ones go into different
        groups."""
        return {}

    def groups(self, parameters: Sequence[tuple[str, nn.Parameter, float]]) -> list[dict[str, Any]]:
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, parameter, factor in parameters:
            decayed, options = parameter.ndim >= 2, dict(self.options(name, parameter))
            group = {"params": [], "lr": self.config.lr * factor, "decayed": decayed, **options}
            groups.setdefault((decayed, factor, *options.items()), group)["params"].append(parameter)
        self._decay([*groups.values()], Progress(0, 1))
        return [*groups.values()]

    def before_step(self, groups: list[dict[str, Any]], progress: Progress) -> None:
        """The weight decay of this step, where it is a schedule."""
        if self.config.weight_decay.moves:
            self._decay(groups, progress)

    def _decay(self, groups: list[dict[str, Any]], progress: Progress) -> None:
        value = self.config.weight_decay.value(progress)
        for group in groups:
            group["weight_decay"] = value if group["decayed"] else 0.0


class AdamWConfig(DecoupledConfig):
    """Defaults are those of contrastive pre-training with large batches."""

    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""


class AdamW(DecoupledOptimizer):
    """AdamW (Loshchilov & Hutter 2019), torch's fused implementation."""

    name = "adamw"
    Config = AdamWConfig

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Over the groups."""
        return torch.optim.AdamW(groups, betas=self.config.betas, eps=self.config.eps, fused=True)
