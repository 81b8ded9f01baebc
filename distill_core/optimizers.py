"""The built-in optimiser and schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from distill_core.components import ComponentConfig, Optimizer, Schedule

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(ComponentConfig):
    """Defaults are those of contrastive pre-training with large batches."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.5
    """Decoupled decay of matrices; parameters with ndim < 2 (norms, biases, scales) are not decayed."""


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019), torch's fused implementation."""

    name = "adamw"
    Config = AdamWConfig

    def groups(self, parameters: Sequence[tuple[str, nn.Parameter, float]]) -> list[dict[str, Any]]:
        """A group for each (decayed or not, learning-rate factor)."""
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for _, parameter, factor in parameters:
            groups.setdefault((parameter.ndim >= 2, factor), []).append(parameter)
        return [
            {
                "params": members,
                "lr": self.config.lr * factor,
                "weight_decay": self.config.weight_decay if decayed else 0.0,
            }
            for (decayed, factor), members in groups.items()
        ]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Over the groups."""
        return torch.optim.AdamW(groups, betas=self.config.betas, eps=self.config.eps, fused=True)


class WarmupCosineConfig(ComponentConfig):
    """Linear warm-up, then a cosine."""

    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 2000
    """Warm-up steps, or a part of the run below 1."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The factor at the end."""


class WarmupCosine(Schedule):
    """(step + 1) / warmup up to the peak, then a half cosine to `final`."""

    name = "warmup_cosine"
    Config = WarmupCosineConfig

    def factor(self, step: int, steps: int) -> float:
        """The warm-up takes the peak at its last step, the cosine would reach `final` at `steps`."""
        given = self.config.warmup
        warmup = round(given * steps) if given < 1 else int(given)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(steps - warmup, 1)
        return float(self.config.final + (1 - self.config.final) * (1 + math.cos(math.pi * done)) / 2)


class ConstantConfig(ComponentConfig):
    """Linear warm-up, then flat."""

    warmup: Annotated[int, Field(ge=0)] = 0
    """Warm-up steps."""


class Constant(Schedule):
    """(step + 1) / warmup up to the peak, then the peak."""

    name = "constant"
    Config = ConstantConfig

    def factor(self, step: int, steps: int) -> float:
        """Factor at a step."""
        return min((step + 1) / self.config.warmup, 1.0) if self.config.warmup else 1.0
