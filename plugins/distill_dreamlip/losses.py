"""DreamLIP's two losses: every sub-caption with the picture, and each with the patches that it is about.

Shape letters besides the project's: K sub-captions, L patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from distill_core import Needs, Outputs, Plan, Rows
from distill_vl.contrastive import ContrastiveConfig, ContrastiveLoss, ring_problems


class MultiPositive(ContrastiveLoss):
    """Mean over the second modality's views k of InfoNCE(first modality's view 0, view k), over the global batch."""

    name = "multi_positive"

    def sides(self, outputs: Outputs) -> Sequence[tuple[Rows, Rows]]:
        """The first modality's view 0, all views of the second."""
        a, b = (outputs.student[modality].rows for modality in self.config.modalities)
        return [(a[:1], b)]

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ((a, b),) = self.sides(outputs)
        pairs = self.pairs(a, b)  # [1, K]
        return {"multi_positive": pairs.mean()}, self.metrics()


class SubcaptionGroupingConfig(ContrastiveConfig):
    """Options of the grouping loss."""

    modalities: tuple[str, str] = ("image", "text")
    """The modality whose tokens (of view 0) are grouped, and the one whose views group them."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Patches whose min-max-normalised similarity is below it do not count; null is 1 / L."""
    negatives: Literal["batch", "sample"] = "batch"
    """What a sub-caption's patches must not match: all other sub-captions of all ranks (the public code), or the other
    sub-captions of the same sample alone."""


class SubcaptionGrouping(ContrastiveLoss):
    """InfoNCE of each sub-caption with the mean of the patches that resemble it, weighted by how much they do.

    Tokens reach the embedding width D by a linear map that the loss owns.
    """

    name = "subcaption_grouping"
    Config = SubcaptionGroupingConfig

    def __init__(self, config: SubcaptionGroupingConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        tokens, texts = (plan.modalities[modality].spec for modality in config.modalities)
        self.token_map = nn.Linear(tokens.width, texts.dim, bias=False)

    @classmethod
    def needs(cls, config: SubcaptionGroupingConfig, plan: Plan) -> Needs:
        """Both modalities, and the tokens of the first one's view 0, whose embedding it does not train."""
        a, b = config.modalities
        return Needs(student=config.modalities, tokens={a: (0,)}, embeddings=(b,))

    @classmethod
    def problems(cls, config: SubcaptionGroupingConfig, plan: Plan) -> Iterable[str]:
        """Negatives of the same sample need a second view; widths may differ, since tokens are mapped."""
        texts = plan.modalities.get(config.modalities[1])
        if config.negatives == "sample" and texts is not None and len(texts.roles) < 2:
            yield f"{cls.name!r} with negatives: sample needs 2 views of {config.modalities[1]!r}; it has 1"
        yield from ring_problems(cls.name, config, plan)

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """The sub-captions, where those of other samples are negatives; what they are compared with is made later."""
        return [outputs.student[self.config.modalities[1]].rows] if self.config.negatives == "batch" else []

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term, and the mean share of patches that count."""
        grouping, grouper = self.config.modalities
        features, captions = outputs.student[grouping], outputs.student[grouper]
        texts = captions.embedding.transpose(0, 1)  # [B, K, D]
        patches = self.token_map(features.tokens[0])
        with torch.autocast(texts.device.type, enabled=False):
            patches = normalize(patches.to(texts.dtype), dim=-1)
            weights = group_weights(
                torch.einsum("bkd,bld->bkl", texts, patches), features.masks.get(0), self.config.threshold
            )
            grouped = normalize(weights @ patches, dim=-1)  # [B, K, D]
            if self.config.negatives == "sample":
                logits = self.logit_scale.exp() * grouped @ texts.transpose(1, 2)  # [B, K, K]
                truth = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
                loss = (cross_entropy(logits.mT, truth) + cross_entropy(logits, truth)) / 2
            else:
                # [1, BK, D] and [1, MK, D], a rank's rows together
                every = Rows(texts.flatten(0, 1)[None], lambda: captions.gathered.transpose(0, 1).flatten(0, 1)[None])
                loss = self.pairs(outputs.rows(grouped.flatten(0, 1)[None], each=texts.shape[1]), every).mean()
        return {"subcaption_grouping": loss}, self.metrics() | {"patches": (weights.detach() > 0).float().mean()}


def group_weights(similarity: Tensor, mask: Tensor | None, threshold: float | None) -> Tensor:
    """How much each token counts for each text: [B, K, L] of cosines -> [B, K, L], summing to 1 over L.

    Cosines are min-max-normalised over the tokens, those below `threshold` (None is 1 / L) are dropped, and the rest
    is divided by its sum. Tokens where `mask` [B, L] is False count for nothing. Where all cosines are equal, all
    tokens count alike.
    """
    real = torch.ones_like(similarity[:, :1], dtype=torch.bool) if mask is None else mask[:, None]
    least = similarity.masked_fill(~real, float("inf")).amin(-1, keepdim=True)
    span = similarity.masked_fill(~real, float("-inf")).amax(-1, keepdim=True) - least
    flat = span == 0
    # masked before the division: a gradient through 0 / 0 is nan even where its value is not taken
    normalised = torch.where(flat, 1.0, (similarity - least) / span.masked_fill(flat, 1.0))
    limit = 1 / real.sum(-1, keepdim=True) if threshold is None else threshold
    above_limit = normalised.masked_fill(~real | (normalised < limit), 0.0)
    return above_limit / above_limit.sum(-1, keepdim=True)
