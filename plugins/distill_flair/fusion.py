"""Text-conditioned attention pooling (FLAIR, section 3.2): an embedding asks, the other modality's tokens answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from distill_core import ComponentConfig, Features, Fused, FusionHead, Needs, Plan, UserError
from distill_kernels import cross_attention
from distill_vl.token_fusion import head_problems, pair_problems, unit
from distill_vl.transformer import attention_weights


class TextConditionedPoolConfig(ComponentConfig):
    """Two modalities; in FLAIR texts alone ask."""

    modalities: tuple[str, str] = ("image", "text")
    """The two modalities."""
    queries: tuple[str, ...] = ("image", "text")
    """Those whose embeddings pool the other's tokens. FLAIR's is [text]; a loss over fused views needs both."""
    heads: Annotated[int, Field(gt=0)] = 8
    """Attention heads; they divide the embedding width D."""


class ConditionedPooler(nn.Module):
    """attention(LN(query), LN(tokens), LN(tokens)), no residual; parameters as `nn.MultiheadAttention` holds them.

    A token of zeros stands beside the keys and values (`add_zero_attn`), for a query that finds nothing.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(dim)
        self.ln_v = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """queries [V, B, D], tokens [B, L, D], mask [B, L] -> [V, B, D]."""
        q, k, mask = self._asked(queries, tokens, mask)
        weight, bias = self.attn.in_proj_weight.chunk(3)[2], self.attn.in_proj_bias.chunk(3)[2]
        v = rearrange(linear(self.ln_v(tokens), weight, bias), "b l (h k) -> b h l k", h=self.attn.num_heads)
        pooled = cross_attention(q, k, pad(v, (0, 0, 0, 1)), mask=mask)
        out: Tensor = self.attn.out_proj(rearrange(pooled, "b h v k -> v b (h k)"))
        return out

    def weights(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """With which `forward` reads the tokens, [V, B, H, L]; what they lack to one the zero token has."""
        q, k, mask = self._asked(queries, tokens, mask)
        return rearrange(attention_weights(q, k, mask)[..., :-1], "b h v l -> v b h l")

    def _asked(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [B, H, V, K], keys [B, H, L + 1, K] and their mask, with the zero token."""
        heads, weights, biases = self.attn.num_heads, self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        q = rearrange(linear(self.ln_q(queries), weights[0], biases[0]), "v b (h k) -> b h v k", h=heads)
        k = rearrange(linear(self.ln_k(tokens), weights[1], biases[1]), "b l (h k) -> b h l k", h=heads)
        return q, pad(k, (0, 0, 0, 1)), None if mask is None else pad(mask, (0, 1), value=True)


class TextConditionedPool(FusionHead):
    """fused[m] = normalise(attention(LN(pooled[m]), LN(map(tokens of the other's view 0)) and a zero token))."""

    name = "text_conditioned_pool"
    Config = TextConditionedPoolConfig

    def __init__(self, config: TextConditionedPoolConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        first, second = config.modalities
        self.other = {first: second, second: first}
        pooled = {self.other[m]: plan.modalities[self.other[m]] for m in config.queries}
        self.token_map = nn.ModuleDict({m: nn.Linear(p.spec.width, p.spec.dim, bias=False) for m, p in pooled.items()})
        self.pooler = nn.ModuleDict({m: ConditionedPooler(p.spec.dim, config.heads) for m, p in pooled.items()})
        for linear_map in self.token_map.values():
            assert isinstance(linear_map, nn.Linear)
            nn.init.normal_(linear_map.weight, std=linear_map.in_features**-0.5)

    @classmethod
    def needs(cls, config: TextConditionedPoolConfig, plan: Plan) -> Needs:
        """Tokens of the first view of what is pooled."""
        first, second = config.modalities
        tokens = {other: (0,) for m, other in ((first, second), (second, first)) if m in config.queries}
        return Needs(student=config.modalities, tokens=tokens)

    @classmethod
    def problems(cls, config: TextConditionedPoolConfig, plan: Plan) -> Iterable[str]:
        """One width D on both sides, divisible by the heads; queries of the two modalities."""
        yield from pair_problems(cls.name, config.modalities, plan)
        if not config.queries or not set(config.queries) <= set(config.modalities):
            yield f"{cls.name!r} lets {', '.join(config.modalities)} ask; `queries` must name one or both"
        yield from head_problems(cls.name, config.modalities, config.heads, plan)

    def forward(self, features: dict[str, Features]) -> dict[str, Fused]:
        """All views of each modality over the tokens of the other's view 0. Raises `UserError` where one cannot ask."""
        silent = [m for m in self.config.modalities if m not in self.config.queries]
        if silent:
            raise UserError(
                f"fusion.queries: a loss reads fused views, but {', '.join(silent)} does not ask; "
                f"set fusion.queries to [{', '.join(self.config.modalities)}]"
            )
        fused = {}
        for name, other in self.other.items():
            tokens_of = features[other]
            pooled = self.pool(other, features[name].pooled, tokens_of.tokens[0], tokens_of.masks.get(0))
            fused[name] = Fused(unit(pooled))
        return fused

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What queries [V, B, D] find in `modality`'s tokens [B, L, W]: [V, B, D], not normalised, no residual.

        Raises `UserError` where the other modality does not ask.
        """
        if modality not in self.pooler:
            asks = self.other[modality]
            raise UserError(
                f"fusion.queries: {asks!r} is to pool the tokens of {modality!r}, but does not ask; add it to "
                f"fusion.queries"
            )
        pooler: Any = self.pooler[modality]
        pooled: Tensor = pooler(queries, self.token_map[modality](tokens), mask)
        return pooled

    def attention(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The pooler's weights, [V, B, H, L]; none where the other modality does not ask."""
        if modality not in self.pooler:
            return None
        pooler: Any = self.pooler[modality]
        weights: Tensor = pooler.weights(queries, self.token_map[modality](tokens), mask)
        return weights
