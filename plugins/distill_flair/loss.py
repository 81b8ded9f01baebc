"""FLAIR's loss (section 3.3): text-conditioned and multi-positive sigmoid losses with one scale and bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, softplus
from torch.utils.checkpoint import checkpoint

from distill_core import Needs, Outputs, Plan, Rows, Scheduled, TokenPooling, wide
from distill_vl.contrastive import Sigmoid, SigmoidConfig


class FlairConfig(SigmoidConfig):
    """Defaults are the public code's: it starts from CLIP's scale, 1 / 0.07, and SigLIP's bias, -10."""

    temperature: Annotated[float, Field(gt=0)] = 0.07
    """The scale starts at 1 / temperature, 14.29."""
    weight: Scheduled[Annotated[float, Field(ge=0)]] = Scheduled(0.5)
    """Factor of both terms in the total: the public code takes their mean."""
    modalities: tuple[str, str] = ("image", "text")
    """What is pooled (its first view), and what conditions the pooling (all its views)."""
    exchange: Literal["gather"] = "gather"
    """Pooling takes the texts of all ranks."""
    negatives: Literal["one", "all"] = "one"
    """Texts of other samples that condition the pooling: one a sample, drawn at random (the public code), or all."""
    chunk: Annotated[int, Field(gt=0)] = 64
    """Samples whose tokens are pooled at a time. In a larger batch only one chunk's activations are held: the
    backward pass computes them again."""


class Flair(Sigmoid):
    """K texts per sample, each a positive of its image.

    `conditioned`: <pool(picture i, text), text> over the K texts of i and, as negatives, texts of other samples;
    `multi_positive`: <picture i, text> over all texts. Each is the sum over pairs of -log sigmoid(+-logit), divided by
    the number of texts that a picture meets, as in the public code.
    """

    name = "flair"
    Config = FlairConfig

    @classmethod
    def needs(cls, config: FlairConfig, plan: Plan) -> Needs:
        """Tokens of the first picture."""
        return Needs(student=config.modalities, tokens={config.modalities[0]: (0,)}, pools=True)

    @classmethod
    def problems(cls, config: FlairConfig, plan: Plan) -> Iterable[str]:
        """A fusion to pool with, and one width D."""
        if not plan.fusion:
            yield f"{cls.name!r} pools with the fusion; this recipe has none: add `fusion: text_conditioned_pool`"
        elif not plan.fusion_pools:
            yield f"{cls.name!r} pools with the fusion, and this recipe's has no `pool`: take text_conditioned_pool"
        yield from super().problems(config, plan)

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """Nothing in common with other losses: pooling takes the texts in their own lengths."""
        return ()

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Two terms. Over several ranks, texts are those of all ranks, pictures this rank's."""
        fusion = outputs.fusion
        assert isinstance(fusion, TokenPooling)
        picture, text = self.config.modalities
        captions, features = outputs.student[text], outputs.student[picture]
        own = outputs.rows(wide(captions.pooled))
        texts = own.gathered  # [K, M, D], of their own lengths
        tokens, mask = features.tokens[0], features.masks.get(0)
        (k, m), b, step = texts.shape[:2], len(tokens), self.config.chunk
        chosen = self.choose(k, m, b, own.offset, texts.device)
        total = texts.new_zeros(())
        for rows in (slice(i, i + step) for i in range(0, b, step)):
            part = (fusion, texts, tokens[rows], None if mask is None else mask[rows], chosen[rows])
            if step < b and torch.is_grad_enabled():
                total = total + checkpoint(self.conditioned, *part, use_reentrant=False)
            else:
                total = total + self.conditioned(*part)
        # as the rows of the captions, without gathering them a second time
        pairs = self.pairs(features.rows[:1], Rows(captions.embedding, lambda: normalize(texts, dim=-1)))
        terms = {"conditioned": total / b * m / chosen.shape[1], "multi_positive": pairs.mean()}
        return terms, self.metrics()

    def choose(self, k: int, m: int, b: int, offset: int, device: torch.device) -> Tensor:
        """The texts that each of this rank's b pictures meets: [b, T] places in [k, m] flattened, its own k first.
        `offset`: the place of the first one's own among the m.

        Which one of another sample's, is drawn from torch's generator.
        """
        row = offset + torch.arange(b, device=device)[:, None]
        own = torch.arange(k, device=device) * m + row  # [b, k]
        others = torch.arange(m - 1, device=device)
        others = others + (others >= row)  # [b, m - 1]
        if self.config.negatives == "one":
            return torch.cat([own, torch.randint(k, others.shape, device=device) * m + others], 1)
        every = torch.arange(k, device=device)[:, None] * m + others[:, None]  # [b, k, m - 1]
        return torch.cat([own, every.flatten(1)], 1)

    def conditioned(
        self, fusion: TokenPooling, texts: Tensor, tokens: Tensor, mask: Tensor | None, chosen: Tensor
    ) -> Tensor:
        """Sum over pictures and their texts: texts [K, M, D], tokens [b, L, W], chosen [b, T]."""
        queries = texts.flatten(0, 1)[chosen.T]  # [T, b, D]
        pooled = fusion.pool(self.config.modalities[0], queries, tokens, mask)
        with torch.autocast(pooled.device.type, enabled=False):
            similarity = (normalize(pooled.to(queries.dtype), dim=-1) * normalize(queries, dim=-1)).sum(-1)
            logits = self.logit_scale.exp() * similarity + self.logit_bias
            return softplus(-logits[: len(texts)]).sum() + softplus(logits[len(texts) :]).sum()
