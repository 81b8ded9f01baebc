"""What losses over pairs of embeddings share: two modalities, a learned scale and its clamp; a softmax or a sigmoid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core import (
    LOCAL,
    ComponentConfig,
    Loss,
    LossConfig,
    Needs,
    Outputs,
    Plan,
    Progress,
    Rows,
    same_dim,
    world_size,
)
from distill_kernels import multi_view_info_nce, multi_view_sigmoid
from distill_vl.ring import ring_info_nce, ring_sigmoid


class ContrastiveConfig(LossConfig):
    """Options of losses with a learned temperature."""

    modalities: tuple[str, str] = ("image", "text")
    """The two modalities that are paired."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """The scale starts at 1 / temperature."""
    max_scale: Annotated[float, Field(ge=1)] | None = 100.0
    """The scale is clamped to 1..max_scale after each step; null leaves it free."""
    exchange: Literal["gather", "ring"] = "gather"
    """How ranks see each other's rows: all at once, or one neighbour's at a time (memory does not grow with the ranks).
    The loss and its gradients are the same."""


class ContrastiveLoss(Loss):
    """Base: pairs of embeddings under a learned scale s = exp(logit_scale)."""

    partial = True
    Config: ClassVar[type[ComponentConfig]] = ContrastiveConfig

    def __init__(self, config: Any, plan: Plan) -> None:
        super().__init__(config, plan)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(student=config.modalities)

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterable[str]:
        """One width D on both sides; round the ring as many rows on each rank."""
        yield from same_dim(cls.name, config.modalities, plan)
        yield from ring_problems(cls.name, config, plan)

    def sides(self, outputs: Outputs) -> Sequence[tuple[Rows, Rows]]:
        """What `pairs` compares, call by call. Here both modalities' first views."""
        a, b = (outputs.student[modality].rows[:1] for modality in self.config.modalities)
        return [(a, b)]

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """Both sides, for both directions; nothing, where columns travel round the ring."""
        return chain.from_iterable(self.sides(outputs)) if self.config.exchange == "gather" else ()

    def pairs(self, a: Rows, b: Rows) -> Tensor:
        """[Va, Vb]: each view pair's InfoNCE of a [Va, B, D] and b [Vb, B, D] over the rows M of all ranks."""
        with torch.autocast(a.embedding.device.type, enabled=False):
            scale = self.logit_scale.exp()
            if world_size() == 1:
                return multi_view_info_nce(a.embedding, b.embedding, scale)
            if self.config.exchange == "ring":
                return ring_info_nce(a.embedding, b.embedding, scale)
            return multi_view_info_nce(
                a.embedding, b.embedding, scale, a_all=a.gathered, b_all=b.gathered, offset=a.offset
            )

    def units(self) -> Sequence[nn.Module]:
        """The loss itself; nothing, where columns travel round the ring, which is not one graph."""
        return (self,) if self.config.exchange == "gather" else ()

    @torch.no_grad()
    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        """Clamp the learned scale."""
        if self.config.max_scale is not None:
            self.logit_scale.clamp_(0.0, math.log(self.config.max_scale))

    def metrics(self) -> dict[str, Tensor]:
        """The scale itself, exp(logit_scale)."""
        return {"scale": self.logit_scale.detach().exp()}


def ring_problems(name: str, config: ContrastiveConfig, plan: Plan) -> Iterable[str]:
    """What is wrong with `exchange: ring` where ranks may have different numbers of rows."""
    optional = [m for m in config.modalities if m in plan.modalities and plan.modalities[m].optional]
    if optional and config.exchange == "ring":
        yield (
            f"{name!r}: exchange: ring passes as many rows from each rank, and {', '.join(optional)} may be absent "
            "(data.optional): take exchange: gather"
        )


class SigmoidConfig(ContrastiveConfig):
    """Defaults are SigLIP's: scale 10 and bias -10 to start from."""

    temperature: Annotated[float, Field(gt=0)] = 0.1
    """The scale starts at 1 / temperature."""
    bias: float = -10.0
    """The learned bias starts here: at first, every pair is taken for a negative."""


class Sigmoid(ContrastiveLoss):
    """Base: as `ContrastiveLoss`, but each pair of rows is a yes or no of its own, with a learned bias (SigLIP, arXiv
    2303.15343, section 3.2)."""  # fmt: skip

    Config: ClassVar[type[ComponentConfig]] = SigmoidConfig

    def __init__(self, config: SigmoidConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.logit_bias = nn.Parameter(torch.tensor(config.bias))

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """The columns: the other direction has the same logits."""
        return [b for _, b in self.sides(outputs)] if self.config.exchange == "gather" else ()

    def pairs(self, a: Rows, b: Rows) -> Tensor:
        """[Va, Vb]: each view pair's sigmoid loss of a [Va, B, D] against b [Vb, M, D] of all ranks.

        The mean over rows of the sum over columns; every entry of the M x M logits counts once.
        """
        with torch.autocast(a.embedding.device.type, enabled=False):
            scale, bias = self.logit_scale.exp(), self.logit_bias
            if world_size() == 1:
                return multi_view_sigmoid(a.embedding, b.embedding, scale, bias)
            if self.config.exchange == "ring":
                return ring_sigmoid(a.embedding, b.embedding, scale, bias)
            return multi_view_sigmoid(a.embedding, b.embedding, scale, bias, b_all=b.gathered, offset=a.offset)

    def metrics(self) -> dict[str, Tensor]:
        """The scale, exp(logit_scale), and the bias."""
        return super().metrics() | {"bias": self.logit_bias.detach().clone()}


class Contrastive(ContrastiveLoss):
    """COSMOS's contrastive loss: InfoNCE of the student's views of both modalities.

    Mean over the first modality's global views x all views of the second of InfoNCE(student, student).
    Local image crops stay out: they make it overfit.
    """

    name = "contrastive"

    def __init__(self, config: ContrastiveConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.global_views = list(plan.modalities[config.modalities[0]].views("global"))

    def sides(self, outputs: Outputs) -> Sequence[tuple[Rows, Rows]]:
        """The first modality's global views, all of the second's."""
        a, b = self.config.modalities
        return [(outputs.student[a].rows[self.global_views], outputs.student[b].rows)]

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ((a, b),) = self.sides(outputs)
        pairs = self.pairs(a, b)
        return {"contrastive": pairs.mean()}, self.metrics()


class PairedConfig(ContrastiveConfig):
    """Which views are pairs."""

    role: str = LOCAL
    """The i-th view of this role of one modality goes with the i-th of the other, as local ones of `region_crops`."""


class PairedContrastive(ContrastiveLoss):
    """Mean over i of InfoNCE(i-th view of a role of the first modality, i-th of the second), over the global batch."""

    name = "paired_contrastive"
    Config = PairedConfig

    def __init__(self, config: PairedConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        a, b = (plan.modalities[modality].views(config.role) for modality in config.modalities)
        self.numbers = list(zip(a, b, strict=True))

    @classmethod
    def needs(cls, config: PairedConfig, plan: Plan) -> Needs:
        return Needs(student=config.modalities, views={modality: {config.role: 1} for modality in config.modalities})

    @classmethod
    def problems(cls, config: PairedConfig, plan: Plan) -> Iterable[str]:
        yield from super().problems(config, plan)
        counts = {m: len(plan.modalities[m].views(config.role)) for m in config.modalities if m in plan.modalities}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} of {modality!r}" for modality, count in counts.items())
            yield f"{cls.name!r} pairs {config.role} views, of which there are {listed}: make them as many"

    def sides(self, outputs: Outputs) -> Sequence[tuple[Rows, Rows]]:
        a, b = (outputs.student[modality].rows for modality in self.config.modalities)
        return [(a[[i]], b[[j]]) for i, j in self.numbers]

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        pairs = [self.pairs(a, b) for a, b in self.sides(outputs)]
        return {"paired_contrastive": torch.cat(pairs).mean()}, self.metrics()
