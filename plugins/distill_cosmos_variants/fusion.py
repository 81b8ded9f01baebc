"""Fusions that stand in for COSMOS's cross-attention: none, a mean, a gated attention."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core import Features, Fused, FusionHead, Plan, wide
from distill_vl.token_fusion import AttentionConfig, AttentionFusion, CrossPooler, TokenFusion, unit
from distill_vl.transformer import MLP


class Identity(FusionHead):
    """No fusion: fused[m] = normalise(pooled[m]), for every modality of the recipe, one being enough."""

    name = "identity"

    def forward(self, features: dict[str, Features]) -> dict[str, Fused]:
        """No tokens are read."""
        return {m: Fused(unit(f.pooled)) for m, f in features.items()}


class MeanPooling(TokenFusion):
    """fused[m] = normalise(pooled[m] + mean of the other's mapped tokens): what attention adds, without attention."""

    name = "mean_pooling"

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] + mean over the real tokens; a sample without any adds zero."""
        queries = wide(queries)
        if mask is None:
            mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        # the map of the mean is the mean of the maps, for L times fewer products
        total = tokens.masked_fill(~mask[..., None], 0.0).sum(1, dtype=queries.dtype)  # [B, W]
        mean = (total / mask.sum(1, keepdim=True).clamp(min=1)).to(tokens.dtype)
        mapped: Tensor = self.token_map[modality](mean) * mask.any(1, keepdim=True)  # [B, D]
        return queries + mapped


class GatedConfig(AttentionConfig):
    """Options of the gated cross-attention."""

    mlp_ratio: Annotated[float, Field(ge=0)] = 4.0
    """Width of the gated feed-forward layer after the attention, in units of D; 0 leaves it out."""


class GatedPooler(CrossPooler):
    """x = query + tanh(gate) * attention(LN(query), LN(tokens)), then x + tanh(mlp_gate) * MLP(LN(x))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(dim, heads)
        self.gate = nn.Parameter(torch.zeros(()))
        self.mlp = MLP(dim, mlp_ratio) if mlp_ratio else None
        if self.mlp is not None:
            self.ln_mlp = nn.LayerNorm(dim)
            self.mlp_gate = nn.Parameter(torch.zeros(()))

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """queries [V, B, D], tokens [B, L, D], mask [B, L] -> [V, B, D]."""
        x = super().forward(queries, tokens, mask, gate=self.gate.tanh(), **options)
        return x if self.mlp is None else x + self.mlp_gate.tanh() * self.mlp(self.ln_mlp(x))


class GatedCrossAttention(AttentionFusion):
    """Cross-attention with gates that start at zero (Flamingo, arXiv 2204.14198, section 2.2 and figure 4).

    At the first step fused[m] = normalise(pooled[m]), as without a fusion; training opens the gates. The attention
    gets its first gradient when its gate has left zero. Padding is masked.
    """

    name = "gated"
    Config = GatedConfig

    def __init__(self, config: GatedConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.pooler = nn.ModuleDict(
            {m: GatedPooler(self.dim, config.heads, config.mlp_ratio) for m in config.modalities}
        )

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] plus what their gates let in of `modality`'s tokens [B, L, W]; not normalised."""
        result: Tensor = self.pooler[modality](queries, self.token_map[modality](tokens), mask)
        return result
