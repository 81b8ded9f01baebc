"""Fusion: each view's embedding takes something from the other modality's tokens, or nothing."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from distill_core import Plan
from distill_vl.token_fusion import AttentionConfig, AttentionFusion, CrossPooler


class CrossAttentionConfig(AttentionConfig):
    """Two modalities, one pre-norm attention in each direction."""

    mask_padding: bool = True
    """Attend to real tokens only. The public code says false: it attends to all 77 text positions."""
    form: Literal["auto", "projected", "absorbed", "reference"] = "auto"
    """`projected` (keys and values stored), `absorbed` (weights folded into query and output), `reference` (the plain
    formula), or `auto`: the cheaper of the first two."""


class CrossAttention(AttentionFusion):
    """COSMOS's fusion (section 3.3): each view's embedding plus what it finds in the other modality's tokens.

    fused[m] = normalise(pooled[m] + attention(LN(pooled[m]), LN(map(tokens of the other's global 0)))).
    """

    name = "cross_attention"
    Config = CrossAttentionConfig

    def __init__(self, config: CrossAttentionConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.pooler = nn.ModuleDict({m: CrossPooler(self.dim, config.heads) for m in config.modalities})

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] plus what they find in `modality`'s tokens [B, L, W]; not normalised."""
        keys = self.token_map[modality](tokens)
        mask = mask if self.config.mask_padding else None
        result: Tensor = self.pooler[modality](queries, keys, mask, backend=self.config.form)
        return result

    def attention(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """As the base; with `mask_padding: false` padding has weights, too."""
        return super().attention(modality, queries, tokens, mask if self.config.mask_padding else None)
