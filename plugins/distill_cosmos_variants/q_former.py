"""Q-Former-style fusion (BLIP-2, arXiv 2301.12597, section 3.1): learned queries read the other modality's tokens.

A Q-Former's queries attend to each other, to the tokens of one picture, and, in the same self-attention, to a text that
conditions them (as InstructBLIP, arXiv 2305.06500, does with an instruction). A fusion has V views a sample and wants
one embedding for each, so here

- the condition is the view's pooled embedding: one more key and value of the queries' self-attention, itself unchanged;
- each view has its own copy of the N learned queries, since its condition differs: V * N queries a sample, over ONE set
  of keys and values made from the other modality's tokens, which are never repeated;
- the N answers are averaged, projected, and added to the view's embedding. (BLIP-2 keeps all N and lets its contrastive
  loss take the best; a fused view is one embedding.)
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from distill_core import Plan, wide
from distill_vl.token_fusion import AttentionConfig, AttentionFusion, CrossPooler
from distill_vl.transformer import MLP, Attention, Sequences


class QFormerConfig(AttentionConfig):
    """Options of the learned queries."""

    queries: Annotated[int, Field(gt=0)] = 8
    """N, learned queries a view (BLIP-2 has 32)."""
    layers: Annotated[int, Field(gt=0)] = 1
    """Blocks of self-attention, cross-attention and feed-forward."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Width of the feed-forward layers, in D."""


class QFormerBlock(nn.Module):
    """x + self-attention(LN([x, view])), then + cross-attention(LN(x), LN(tokens)), then + MLP(LN(x))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.cross = CrossPooler(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x: Tensor, view: Tensor, tokens: Tensor, mask: Tensor | None, views: int) -> Tensor:
        """x [V B, N, D], view [V B, 1, D], tokens [B, L, D], mask [B, L], V -> [V B, N, D]."""
        x, rows = self.ask(x, view, views)
        x = rearrange(self.cross(rows, tokens, mask), "(v n) b d -> (v b) n d", v=views)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]

    def ask(self, x: Tensor, view: Tensor, views: int) -> tuple[Tensor, Tensor]:
        """x after the self-attention, and as what the cross-attention is asked: a sample's V N queries side by side,
        [V N, B, D]."""  # fmt: skip
        both = torch.cat([x, view], 1)
        answers = self.attn(both.flatten(0, 1), Sequences.of((both.shape[0], both.shape[1])), norm=self.ln_1)
        x = x + answers.view(both.shape)[:, : x.shape[1]]
        return x, rearrange(x, "(v b) n d -> (v n) b d", v=views)


class QueryFormer(nn.Module):
    """view + Linear(mean over N of LN(queries after all blocks)), for one modality's tokens."""

    def __init__(self, dim: int, config: QFormerConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(config.queries, dim))
        self.blocks = nn.ModuleList([QFormerBlock(dim, config.heads, config.mlp_ratio) for _ in range(config.layers)])
        self.ln_post = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, views: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """views [V, B, D], tokens [B, L, D], mask [B, L] -> [V, B, D]."""
        view = views.flatten(0, 1)[:, None].to(self.queries.dtype)
        x = self.queries.expand(view.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, view, tokens, mask, views.shape[0])
        answer: Tensor = self.proj(self.ln_post(x).mean(1))
        return wide(views) + answer.view(views.shape)

    def weights(self, views: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """With which the last block reads the tokens, the mean of the N queries: [V, B, H, L]."""
        view = views.flatten(0, 1)[:, None].to(self.queries.dtype)
        x = self.queries.expand(view.shape[0], -1, -1)
        *body, last = self.blocks
        for block in body:
            x = block(x, view, tokens, mask, views.shape[0])
        assert isinstance(last, QFormerBlock)
        weights = last.cross.weights(last.ask(x, view, views.shape[0])[1], tokens, mask)  # [V N, B, H, L]
        mean: Tensor = weights.view(views.shape[0], -1, *weights.shape[1:]).mean(1)
        return mean


class QFormer(AttentionFusion):
    """fused[m] = normalise(pooled[m] + what N learned queries, conditioned by it, find in the other's tokens).

    Q-Former-style (BLIP-2, section 3.1); `distill_cosmos_variants.q_former` says how for V views. Padding is masked.
    """

    name = "q_former"
    Config = QFormerConfig

    def __init__(self, config: QFormerConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.former = nn.ModuleDict({m: QueryFormer(self.dim, config) for m in config.modalities})

    def pool(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [V, B, D], the views that condition, plus what is found in `modality`'s tokens; not normalised."""
        result: Tensor = self.former[modality](queries, self.token_map[modality](tokens), mask)
        return result

    def attention(self, modality: str, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Of the last block, the mean of the N queries: [V, B, H, L]."""
        if modality not in self.former:
            return None
        former: Any = self.former[modality]
        weights: Tensor = former.weights(queries, self.token_map[modality](tokens), mask)
        return weights
