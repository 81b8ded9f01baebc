"""Lion and Muon as timm implements them (the extra `timm`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from distill_core import DecoupledConfig, DecoupledOptimizer, Scheduled, require_extra

Beta = Annotated[float, Field(ge=0, lt=1)]


def _timm(name: str) -> Any:
    return getattr(require_extra("timm.optim", "timm"), name)


class LionConfig(DecoupledConfig):
    """Options of Lion. Its paper takes a rate 3 to 10 times smaller than AdamW's, and as much more decay."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: Scheduled[Annotated[float, Field(ge=0)]] = Scheduled(1.0)
    """Decoupled decay of matrices, also a schedule; parameters with ndim < 2 (norms, biases, scales) have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Of the update, and of the running mean of the gradient."""


class Lion(DecoupledOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of a momentum; half of AdamW's memory."""

    name = "lion"
    Config = LionConfig

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Over the groups. Raises `UserError` without timm."""
        optimizer: torch.optim.Optimizer = _timm("Lion")(groups, betas=self.config.betas)
        return optimizer


class MuonConfig(DecoupledConfig):
    """Options of Muon. Rate and decay are AdamW's: updates are scaled to its size (Moonlight, arXiv 2502.16982)."""

    weight_decay: Scheduled[Annotated[float, Field(ge=0)]] = Scheduled(0.1)
    """Decoupled decay of matrices, also a schedule; parameters with ndim < 2 (norms, biases, scales) have none."""
    momentum: Beta = 0.95
    """Of the matrices' gradients."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Of AdamW, for the rest."""
    adamw: tuple[str, ...] = ("embedding", "last_layer")
    """Parameters that AdamW updates, beside those with ndim < 2: those with one of these in their name. Tables and
    prototypes are rows that have nothing to do with one another."""


class Muon(DecoupledOptimizer):
    """Muon (Jordan et al. 2024) for matrices: a momentum, orthogonalised by Newton-Schulz steps; AdamW for the rest.

    A convolution's kernel is a matrix, too: outputs by all that each reads.
    """  # fmt: skip

    name = "muon"
    Config = MuonConfig

    def options(self, name: str, parameter: nn.Parameter) -> Mapping[str, Any]:
        """Which of both updates it."""
        return {"use_fallback": parameter.ndim < 2 or any(part in name for part in self.config.adamw)}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Over the groups. Raises `UserError` without timm."""
        optimizer: torch.optim.Optimizer = _timm("Muon")(
            groups, momentum=self.config.momentum, betas=self.config.betas, adjust_lr_fn="match_rms_adamw"
        )
        return optimizer
