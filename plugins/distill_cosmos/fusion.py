"""Fusion: each view's embedding takes something from the other modality's tokens, or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core.components import ComponentConfig, FusionHead, Needs, Plan, same_dim
from distill_core.types import Features, Fused
from distill_kernels import cross_attention_pool


class Identity(FusionHead):
    """No fusion: fused[m] = normalise(pooled[m]), for every modality of the recipe, one being enough."""

    name = "identity"

    def forward(self, features: dict[str, Features]) -> Fused:
        """No tokens are read."""
        return Fused({m: unit(f.pooled) for m, f in features.items()})

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] as they are."""
        return queries


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, in at least fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class CrossAttentionConfig(ComponentConfig):
    """Two modalities, one pre-norm attention in each direction."""

    modalities: tuple[str, str] = ("image", "text")
    """The two modalities; each attends to the other's tokens."""
    heads: Annotated[int, Field(gt=0)] = 8
    """Attention heads; they divide the embedding width D."""
    mask_padding: bool = True
    """Attend to real tokens only. The public code says false: it attends to all 77 text positions."""
    form: Literal["auto", "projected", "absorbed", "reference"] = "auto"
    """`projected` (keys and values stored), `absorbed` (weights folded into query and output), `reference` (the plain
    formula), or `auto`: the cheaper of the first two."""


class CrossPooler(nn.Module):
    """normalise(query + attention(LN(query), LN(tokens))); parameters as `nn.LayerNorm` and `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None, form: str, normalize: bool) -> Tensor:
        """queries [V, B, D], tokens [B, L, D], mask [B, L] -> [V, B, D]. V queries share one set of keys and values."""
        attention = self.attn
        return cross_attention_pool(
            queries,
            tokens,
            ln_q_weight=self.ln_q.weight,
            ln_q_bias=self.ln_q.bias,
            ln_k_weight=self.ln_k.weight,
            ln_k_bias=self.ln_k.bias,
            in_proj_weight=attention.in_proj_weight,
            in_proj_bias=attention.in_proj_bias,
            out_proj_weight=attention.out_proj.weight,
            out_proj_bias=attention.out_proj.bias,
            heads=attention.num_heads,
            mask=mask,
            eps=self.ln_q.eps,
            form=form,
            normalize=normalize,
        )


class CrossAttention(FusionHead):
    """fused[m] = normalise(pooled[m] + attention(LN(pooled[m]), LN(map(tokens of the other's global 0)))).

    COSMOS, section 3.3.
    """

    name = "cross_attention"
    Config = CrossAttentionConfig

    def __init__(self, config: CrossAttentionConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        dims = {m: plan.modalities[m] for m in config.modalities}
        dim = dims[config.modalities[0]].dim
        self.token_map = nn.ModuleDict({m: nn.Linear(d.width, dim) for m, d in dims.items()})
        self.pooler = nn.ModuleDict({m: CrossPooler(dim, config.heads) for m in config.modalities})

    @classmethod
    def needs(cls, config: CrossAttentionConfig, plan: Plan) -> Needs:
        """Tokens of the first view of both modalities."""
        return Needs(modalities=config.modalities, tokens=dict.fromkeys(config.modalities, (0,)))

    @classmethod
    def problems(cls, config: CrossAttentionConfig, plan: Plan) -> Iterable[str]:
        """One width D on both sides, divisible by the heads."""
        if config.modalities[0] == config.modalities[1]:
            yield "'cross_attention' needs two different modalities"
        dims = {m: plan.modalities[m].dim for m in config.modalities if m in plan.modalities}
        yield from same_dim(cls.name, config.modalities, plan)
        for dim in sorted(set(dims.values())):
            if dim % config.heads:
                yield f"'cross_attention' has {config.heads} heads, which do not divide the embedding width {dim}"

    def forward(self, features: dict[str, Features]) -> Fused:
        """All views of each modality over the tokens of the other's view 0."""
        first, second = self.config.modalities
        fused = {}
        for mine, other in ((first, second), (second, first)):
            theirs = features[other]
            fused[mine] = self._pool(
                other, features[mine].pooled, theirs.tokens[0], theirs.masks.get(0), normalize=True
            )
        return Fused(fused)

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] plus what they find in `modality`'s tokens [B, L, W]; not normalised."""
        return self._pool(modality, queries, tokens, mask, normalize=False)

    def _pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None, *, normalize: bool) -> Tensor:
        if not self.config.mask_padding:
            mask = None
        pooler: Any = self.pooler[modality]
        result: Tensor = pooler(queries, self.token_map[modality](tokens), mask, self.config.form, normalize)
        return result
