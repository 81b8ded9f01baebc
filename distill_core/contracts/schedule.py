"""The schedule's contract, and the built-in schedules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any

from pydantic import Field

from distill_core.contracts.component import Component, ComponentConfig


class Schedule(Component, ABC):
    """The factor of the learning rate at each optimiser step."""

    kind = "schedule"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor, from 0 to 1, for optimiser step `step` (from 0) of `steps`."""


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
        warmup_option = self.config.warmup
        warmup = round(warmup_option * steps) if warmup_option < 1 else int(warmup_option)
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
