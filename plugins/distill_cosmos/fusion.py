"""Fusion: each view's embedding takes something from the other modality's tokens, or nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from distill_core.components import ComponentConfig, FusionHead, Needs, Plan, same_dim
from distill_core.types import Features, Fused
from distill_kernels import cross_attention_pool
from distill_towers.transformer import MLP, attention_weights


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


class TokenFusionConfig(ComponentConfig):
    """Options of every fusion over tokens."""

    modalities: tuple[str, str] = ("image", "text")
    """The two modalities; each takes from the other's tokens."""


class TokenFusion(FusionHead):
    """Base: fused[m] = normalise(pool(other, pooled[m], tokens of the other's view 0)); a subclass writes `pool`.

    View 0 is the first global view. All V views of a sample read one set of tokens, which is mapped to width D by a
    linear layer a modality, `token_map`.
    """

    Config = TokenFusionConfig

    def __init__(self, config: TokenFusionConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        dims = {m: plan.modalities[m] for m in config.modalities}
        self.dim = dims[config.modalities[0]].dim
        self.token_map = nn.ModuleDict({m: nn.Linear(d.width, self.dim) for m, d in dims.items()})

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        """Tokens of the first view of both modalities."""
        return Needs(modalities=config.modalities, tokens=dict.fromkeys(config.modalities, (0,)))

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterable[str]:
        """Two modalities, of one width D."""
        if config.modalities[0] == config.modalities[1]:
            yield f"{cls.name!r} needs two different modalities"
        yield from same_dim(cls.name, config.modalities, plan)

    def forward(self, features: dict[str, Features]) -> Fused:
        """All views of each modality with the tokens of the other's view 0."""
        first, second = self.config.modalities
        fused = {}
        for mine, other in ((first, second), (second, first)):
            theirs = features[other]
            fused[mine] = unit(self.pool(other, features[mine].pooled, theirs.tokens[0], theirs.masks.get(0)))
        return Fused(fused)

    @abstractmethod
    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] plus what they take of `modality`'s tokens [B, L, W]; not normalised."""


class MeanPooling(TokenFusion):
    """fused[m] = normalise(pooled[m] + mean of the other's mapped tokens): what attention adds, without attention."""

    name = "mean_pooling"

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] + mean over the real tokens; a sample without any adds zero."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        if mask is None:
            mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        # the map of the mean is the mean of the maps, for L times fewer products
        total = tokens.masked_fill(~mask[..., None], 0.0).sum(1, dtype=wide)  # [B, W]
        mean = (total / mask.sum(1, keepdim=True).clamp(min=1)).to(tokens.dtype)
        mapped: Tensor = self.token_map[modality](mean) * mask.any(1, keepdim=True)  # [B, D]
        return queries.to(wide) + mapped


class AttentionConfig(TokenFusionConfig):
    """Options of every fusion with attention."""

    heads: Annotated[int, Field(gt=0)] = 8
    """Attention heads; they divide the embedding width D."""


class AttentionFusion(TokenFusion):
    """Base of fusions with attention."""

    Config = AttentionConfig
    pooler: nn.ModuleDict
    """A `CrossPooler` for each modality that is read."""

    def attention(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The pooler's weights, [V, B, H, L], before any gate."""
        if modality not in self.pooler:
            return None
        pooler: Any = self.pooler[modality]
        weights: Tensor = pooler.weights(queries, self.token_map[modality](tokens), mask)
        return weights

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterable[str]:
        """One width D on both sides, divisible by the heads."""
        yield from super().problems(config, plan)
        for dim in sorted({plan.modalities[m].dim for m in config.modalities if m in plan.modalities}):
            if dim % config.heads:
                yield f"{cls.name!r} has {config.heads} heads, which do not divide the embedding width {dim}"


class CrossPooler(nn.Module):
    """query + gate * attention(LN(query), LN(tokens)); parameters as `nn.LayerNorm` and `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads)

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        form: str = "auto",
        gate: Tensor | None = None,
    ) -> Tensor:
        """queries [V, B, D], tokens [B, L, D], mask [B, L], gate 0-dim or none (1) -> [V, B, D].

        V queries share one set of keys and values.
        """
        attention = self.attn
        weight: Tensor = attention.out_proj.weight
        bias: Tensor = attention.out_proj.bias
        if gate is not None:
            weight, bias = gate * weight, gate * bias
        return cross_attention_pool(
            queries,
            tokens,
            ln_q_weight=self.ln_q.weight,
            ln_q_bias=self.ln_q.bias,
            ln_k_weight=self.ln_k.weight,
            ln_k_bias=self.ln_k.bias,
            in_proj_weight=attention.in_proj_weight,
            in_proj_bias=attention.in_proj_bias,
            out_proj_weight=weight,
            out_proj_bias=bias,
            heads=attention.num_heads,
            mask=mask,
            eps=self.ln_q.eps,
            form=form,
            normalize=False,
        )

    def weights(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """With which `forward` reads the tokens: [V, B, H, L]."""
        (to_q, to_k, _), (q_bias, k_bias, _) = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        heads = self.attn.num_heads
        q = rearrange(linear(self.ln_q(queries), to_q, q_bias), "v b (h k) -> b h v k", h=heads)
        k = rearrange(linear(self.ln_k(tokens), to_k, k_bias), "b l (h k) -> b h l k", h=heads)
        return rearrange(attention_weights(q, k, mask), "b h v l -> v b h l")


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
        result: Tensor = self.pooler[modality](queries, keys, mask, form=self.config.form)
        return result

    def attention(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """As the base; with `mask_padding: false` padding has weights, too."""
        return super().attention(modality, queries, tokens, mask if self.config.mask_padding else None)


class GatedConfig(AttentionConfig):
    """Options of the gated cross-attention."""

    mlp_ratio: Annotated[float, Field(ge=0)] = 4.0
    """Width of the gated feed-forward layer behind the attention, in D; 0 leaves it out."""


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
    """Cross-attention behind gates that start at zero (Flamingo, arXiv 2204.14198, section 2.2 and figure 4).

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
