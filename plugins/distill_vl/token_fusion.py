"""Fusion over tokens: what fusions of two modalities that read each other's tokens share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from distill_core import ComponentConfig, Features, Fused, FusionHead, Needs, Plan, same_dim, wide
from distill_kernels import cross_attention_pool
from distill_vl.transformer import attention_weights


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, in at least fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return normalize(wide(x), dim=-1)


def pair_problems(name: str, modalities: tuple[str, str], plan: Plan) -> Iterable[str]:
    """What keeps the component `name` from fusing two modalities: that they are one, or have two widths D."""
    if modalities[0] == modalities[1]:
        yield f"{name!r} needs two different modalities"
    yield from same_dim(name, modalities, plan)


def head_problems(name: str, modalities: tuple[str, str], heads: int, plan: Plan) -> Iterable[str]:
    """Attention heads of the component `name` that do not divide the embedding width D."""
    for dim in sorted({plan.modalities[m].spec.dim for m in modalities if m in plan.modalities}):
        if dim % heads:
            yield f"{name!r} has {heads} heads, which do not divide the embedding width {dim}"


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
        specs = {m: plan.modalities[m].spec for m in config.modalities}
        self.dim = specs[config.modalities[0]].dim
        self.token_map = nn.ModuleDict({m: nn.Linear(spec.width, self.dim) for m, spec in specs.items()})

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        """Tokens of the first view of both modalities."""
        return Needs(student=config.modalities, tokens=dict.fromkeys(config.modalities, (0,)))

    @classmethod
    def problems(cls, config: Any, plan: Plan) -> Iterable[str]:
        """Two modalities, of one width D."""
        yield from pair_problems(cls.name, config.modalities, plan)

    def forward(self, features: dict[str, Features]) -> dict[str, Fused]:
        """All views of each modality with the tokens of the other's view 0."""
        first, second = self.config.modalities
        fused = {}
        for modality, other in ((first, second), (second, first)):
            theirs = features[other]
            fused[modality] = Fused(
                unit(self.pool(other, features[modality].pooled, theirs.tokens[0], theirs.masks.get(0)))
            )
        return fused

    @abstractmethod
    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D] plus what they take of `modality`'s tokens [B, L, W]; not normalised."""


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
        yield from head_problems(cls.name, config.modalities, config.heads, plan)


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
        backend: str = "auto",
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
            backend=backend,
            normalize=False,
        )

    def weights(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """With which `forward` reads the tokens: [V, B, H, L]."""
        (to_q, to_k, _), (q_bias, k_bias, _) = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        heads = self.attn.num_heads
        q = rearrange(linear(self.ln_q(queries), to_q, q_bias), "v b (h k) -> b h v k", h=heads)
        k = rearrange(linear(self.ln_k(tokens), to_k, k_bias), "b l (h k) -> b h l k", h=heads)
        return rearrange(attention_weights(q, k, mask), "b h v l -> v b h l")
