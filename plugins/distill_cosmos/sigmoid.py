"""COSMOS's two losses with SigLIP's sigmoid (arXiv 2303.15343, equation 1) in InfoNCE's place."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.components import ComponentConfig, Plan
from distill_core.distributed import rank, world_size
from distill_cosmos.losses import Contrastive, CrossModalDistillation
from distill_kernels import multi_view_sigmoid
from distill_towers.contrastive import ContrastiveConfig, ContrastiveLoss


class SigmoidConfig(ContrastiveConfig):
    """Defaults are SigLIP's: scale 10 and bias -10 to start from."""

    temperature: Annotated[float, Field(gt=0)] = 0.1
    """The scale starts at 1 / temperature."""
    bias: float = -10.0
    """The learned bias starts here: at first, every pair is taken for a negative."""


class Sigmoid(ContrastiveLoss):
    """Base: as `ContrastiveLoss`, but each pair of rows is a yes or no of its own, with a learned bias."""

    Config: ClassVar[type[ComponentConfig]] = SigmoidConfig

    def __init__(self, config: SigmoidConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.logit_bias = nn.Parameter(torch.tensor(config.bias))

    def pairs(self, a: Tensor, b: Tensor, a_all: Tensor, b_all: Tensor) -> Tensor:
        """[Va, Vb]: each view pair's sigmoid loss of a [Va, B, D] against b [Vb, M, D] of all ranks.

        The mean over rows of the sum over columns; every entry of the M x M logits counts once.
        """
        with torch.autocast(a.device.type, enabled=False):
            scale, bias = self.logit_scale.exp(), self.logit_bias
            if world_size() == 1:
                return multi_view_sigmoid(a, b, scale, bias)
            offset = rank() * a.shape[1]
            return multi_view_sigmoid(a, b, scale, bias, a_all=a_all, b_all=b_all, offset=offset)

    def metrics(self) -> dict[str, Tensor]:
        """The scale, exp(logit_scale), and the bias."""
        return super().metrics() | {"bias": self.logit_bias.detach().clone()}


class SigmoidContrastive(Sigmoid, Contrastive):
    """`contrastive` with the sigmoid loss: the first modality's global views x all views of the second."""

    name = "sigmoid_contrastive"


class SigmoidDistillationConfig(SigmoidConfig):
    """Options of the distillation; its targets are always hard, since soft ones are a softmax's."""

    pairs: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The blocks STUDENT_to_TEACHER that enter, as [image_to_image, text_to_image]; null is all four."""
    targets: ClassVar[str] = "hard"


class SigmoidDistillation(Sigmoid, CrossModalDistillation):
    """`cross_modal_distillation` with the sigmoid loss: {fused views of each modality} x {teacher's views of each}."""

    name = "sigmoid_distillation"
    Config: ClassVar[type[ComponentConfig]] = SigmoidDistillationConfig
