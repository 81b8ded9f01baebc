"""COSMOS's two losses (section 3.4), each over stacked views: no loop over view pairs, one gather an embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.components import Loss, LossConfig, Needs, Plan, same_dim
from distill_core.distributed import rank, world_size
from distill_core.types import Outputs, Progress
from distill_kernels import multi_view_info_nce


class InfoNCEConfig(LossConfig):
    """Options of losses with a learned temperature."""

    modalities: tuple[str, str] = ("image", "text")
    """The two modalities that are paired."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """The scale starts at ln(1 / temperature)."""
    max_scale: Annotated[float, Field(ge=1)] = 100.0
    """The scale is clamped to [0, ln max_scale] after each step."""


class InfoNCE(Loss):
    """Base: InfoNCE with a learned scale s = exp(logit_scale) over all pairs of two stacks of views."""

    Config = InfoNCEConfig

    def __init__(self, config: InfoNCEConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    @classmethod
    def problems(cls, config: InfoNCEConfig, plan: Plan) -> Iterable[str]:
        """One width D on both sides."""
        return same_dim(cls.name, config.modalities, plan)

    def pairs(self, a: Tensor, b: Tensor, a_all: Tensor, b_all: Tensor) -> Tensor:
        """[Va, Vb]: each view pair's InfoNCE of a [Va, B, D] and b [Vb, B, D] over the global batch M."""
        with torch.autocast(a.device.type, enabled=False):
            scale = self.logit_scale.exp()
            if world_size() == 1:
                return multi_view_info_nce(a, b, scale)
            return multi_view_info_nce(a, b, scale, a_all=a_all, b_all=b_all, offset=rank() * a.shape[1])

    @torch.no_grad()
    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        """Clamp the learned scale to [0, ln max_scale]."""
        self.logit_scale.clamp_(0.0, math.log(self.config.max_scale))

    def metrics(self) -> dict[str, Tensor]:
        """The scale itself, exp(logit_scale)."""
        return {"scale": self.logit_scale.detach().exp()}


class Contrastive(InfoNCE):
    """Mean over the first modality's global views x all views of the second of InfoNCE(student, student).

    Local image crops stay out: they make it overfit.
    """

    name = "contrastive"

    @classmethod
    def needs(cls, config: InfoNCEConfig, plan: Plan) -> Needs:
        """Both modalities."""
        return Needs(modalities=config.modalities)

    def __init__(self, config: InfoNCEConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.global_views = plan.modalities[config.modalities[0]].views("global")

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term."""
        a, b = self.config.modalities
        views = list(self.global_views)
        pairs = self.pairs(
            outputs.embedding(f"student.{a}")[views],
            outputs.embedding(f"student.{b}"),
            outputs.gather(f"student.{a}")[views],
            outputs.gather(f"student.{b}"),
        )
        return {"contrastive": pairs.mean()}, self.metrics()


class CrossModalDistillation(InfoNCE):
    """Mean over {fused views of each modality} x {teacher's views of each} of the mean InfoNCE of all view pairs."""

    name = "cross_modal_distillation"

    @classmethod
    def needs(cls, config: InfoNCEConfig, plan: Plan) -> Needs:
        """A teacher of both modalities, and fused views."""
        return Needs(teacher=True, fused=True, modalities=config.modalities)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term: the mean of the four blocks of pairs, each a mean itself; a metric for each block."""
        students = [f"fused.{m}" for m in self.config.modalities]
        teachers = [f"teacher.{m}" for m in self.config.modalities]
        pairs = self.pairs(
            torch.cat([outputs.embedding(key) for key in students]),
            torch.cat([outputs.embedding(key) for key in teachers]),
            torch.cat([outputs.gather(key) for key in students]),
            torch.cat([outputs.gather(key) for key in teachers]),
        )
        rows = torch.split(pairs, [outputs.embedding(key).shape[0] for key in students])
        blocks = {
            f"{student}_to_{teacher}": block.mean()
            for student, row in zip(self.config.modalities, rows, strict=True)
            for teacher, block in zip(
                self.config.modalities,
                torch.split(row, [outputs.embedding(key).shape[0] for key in teachers], dim=1),
                strict=True,
            )
        }
        term = torch.stack(list(blocks.values())).mean()
        return {"cross_modal_distillation": term}, self.metrics() | {name: x.detach() for name, x in blocks.items()}
