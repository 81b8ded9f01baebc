"""Pre-norm residual blocks in the CLIP layout; parameters are named as CLIP checkpoints name them.

N sequences, L tokens, T tokens of all sequences one after the other (packed), W width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from distill_kernels import attend_to_tokens, packed_attention, self_attention, split_heads

DENSE = ("plain", "value", "value_value", "correlative")
"""What a last layer's tokens may attend by, for dense embeddings: see `Attention.dense`."""


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)), for pictures: q [N, H, Q, K], k [N, H, L, K], mask [N, L] -> [N, H, Q, L].

    At least fp32. Zeros where a sequence has no real token, as the kernels have it.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.zeros((), dtype=torch.bool, device=q.device) if mask is None else ~mask[:, None, None]
    weights: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    return weights


class Attention(nn.Module):
    """Multi-head self-attention with one packed input projection (as `nn.MultiheadAttention` stores and starts it)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        """x [N, L, W] -> [N, L, W]."""
        out: Tensor = self.out_proj(rearrange(self_attention(*self._project(x), causal=causal), "n h l k -> n l (h k)"))
        return out

    def dense(self, x: Tensor, attention: str) -> Tensor:
        """As `forward`, not causal, where each token gathers the values of those that are like it.

        `plain`: softmax(QK') V. `value`: V, its own (MaskCLIP, Zhou et al. 2022). `value_value`: softmax(VV') V,
        the attention of CLIP Surgery (Li et al. 2023), which has it in several last layers, on a second path without
        the MLP; here it is the last block's, with the MLP. `correlative`: (softmax(QQ') + softmax(KK')) V (Wang et al.
        2023, SCLIP). Raises ValueError for any other.
        """
        q, k, v = self._project(x)
        pairs = {"plain": [(q, k)], "value": [], "value_value": [(v, v)], "correlative": [(q, q), (k, k)]}
        if attention not in pairs:
            raise ValueError(f"no attention {attention!r} (there are: {', '.join(DENSE)})")
        parts = [self_attention(a, b, v, causal=False) for a, b in pairs[attention]]
        mixed = torch.stack(parts or [v]).sum(0)
        out: Tensor = self.out_proj(rearrange(mixed, "n h l k -> n l (h k)"))
        return out

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, L, W] -> q, k, v [N, H, L, K]."""
        n, length, _ = x.shape
        (q,), (k,), (v,) = split_heads(self._rows(x.flatten(0, 1)), [(n, length)])
        return q, k, v

    def _rows(self, x: Tensor) -> Tensor:
        """x [T, W] -> [T, 3, H, K]."""
        return rearrange(linear(x, self.in_proj_weight, self.in_proj_bias), "t (j h k) -> t j h k", j=3, h=self.heads)

    def packed(self, x: Tensor, starts: Tensor, *, causal: bool) -> Tensor:
        """x [T, W] -> [T, W]; `starts` [N + 1] are the sequences' first rows, then T. Before `out_proj`."""
        return rearrange(packed_attention(self._rows(x), starts, causal=causal), "t h k -> t (h k)")

    def weights(self, row: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """With which `Block.at` reads x [N, L, W] for one query a sequence, row [N, W]: [N, H, L]; mask [N, L]."""
        width = x.shape[-1]
        q = linear(row[:, None], self.in_proj_weight[:width], self.in_proj_bias[:width])
        k = linear(x, self.in_proj_weight[width : 2 * width], self.in_proj_bias[width : 2 * width])
        q, k = (rearrange(t, "n l (h k) -> n h l k", h=self.heads) for t in (q, k))
        return attention_weights(q, k, mask)[:, :, 0]


Activation = Literal["gelu", "quick_gelu"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), with which OpenAI's CLIP was trained."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., W] -> [..., W]."""
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """W -> ratio * W -> W with erf GELU, or the sigmoid's approximation of it."""

    def __init__(self, width: int, ratio: float, activation: Activation = "gelu") -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, int(width * ratio))
        self.gelu = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.c_proj = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., W] -> [..., W]."""
        return self.c_proj(self.gelu(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, activation: Activation = "gelu", eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_ratio, activation)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        """x [N, L, W] -> [N, L, W]."""
        x = x + self.attn(self.ln_1(x), causal=causal)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]

    def dense(self, x: Tensor, attention: str) -> Tensor:
        """x [N, L, W] -> [N, L, W], with another attention (`Attention.dense`)."""
        x = x + self.attn.dense(self.ln_1(x), attention)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]

    def packed(self, x: Tensor, starts: Tensor, rows: Tensor | None, *, causal: bool) -> Tensor:
        """x [T, W] -> [T, W], or only `rows` [R] of it, [R, W]: behind the attention the rest is not computed."""
        mixed = self.attn.packed(self.ln_1(x), starts, causal=causal)
        if rows is not None:
            x, mixed = x.index_select(0, rows), mixed.index_select(0, rows)
        x = x + self.attn.out_proj(mixed)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]

    def at(self, x: Tensor, index: Tensor, lengths: Tensor | None) -> Tensor:
        """The output at few positions a sequence, `index` [N] or [N, Q], of x [N, L, W], of which the first `lengths`
        [N] count -> [N, W] or [N, Q, W]; the rest is not computed."""  # fmt: skip
        places = index if index.ndim == 2 else index[:, None]
        rows = x[torch.arange(x.shape[0], device=x.device)[:, None], places]  # [N, Q, W]
        values = attend_to_tokens(
            self.ln_1(rows).transpose(0, 1),
            x,
            ln_weight=self.ln_1.weight,
            ln_bias=self.ln_1.bias,
            in_proj_weight=self.attn.in_proj_weight,
            in_proj_bias=self.attn.in_proj_bias,
            heads=self.attn.heads,
            lengths=lengths,
            eps=self.ln_1.eps,
        )
        rows = (rows + self.attn.out_proj(values).transpose(0, 1)).reshape(*index.shape, x.shape[-1])
        return rows + self.mlp(self.ln_2(rows))  # type: ignore[no-any-return]

    def weights(self, x: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """With which position `index` [N] reads x [N, L, W]: [N, H, L]; mask [N, L]."""
        normed = self.ln_1(x)
        return self.attn.weights(normed[torch.arange(len(x), device=x.device), index], normed, mask)


class Transformer(nn.Module):
    """A stack of blocks; the last may be computed at few positions a sequence only."""

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, activation: Activation = "gelu", eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, mlp_ratio, activation, eps) for _ in range(layers)])

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        """x [N, L, W] -> [N, L, W]."""
        for block in self.resblocks:
            x = block(x, causal=causal)
        return x

    def dense(self, x: Tensor, attention: str) -> Tensor:
        """x [N, L, W] -> [N, L, W], not causal, with another attention (`Attention.dense`) in the last block."""
        for block in self.resblocks[:-1]:
            x = block(x, causal=False)
        last = self.resblocks[-1]
        assert isinstance(last, Block)
        return last.dense(x, attention)

    def at(self, x: Tensor, index: Tensor, *, causal: bool) -> Tensor:
        """The output at `index` [N] alone, [N, W]; not causal, [N, Q] as well. Causal stacks see tokens 0..index."""
        for block in self.resblocks[:-1]:
            x = block(x, causal=causal)
        last = self.resblocks[-1]
        assert isinstance(last, Block)
        return last.at(x, index, index + 1 if causal else None)

    def weights(self, x: Tensor, index: Tensor, *, causal: bool) -> Tensor:
        """With which position `index` [N] reads x [N, L, W] in the last block: [N, H, L]."""
        *body, last = self.resblocks
        for block in body:
            x = block(x, causal=causal)
        assert isinstance(last, Block)
        seen = torch.arange(x.shape[1], device=x.device) <= index[:, None]
        return last.weights(x, index, seen if causal else None)

    def packed(self, x: Tensor, starts: Tensor, rows: Tensor | None, *, causal: bool) -> Tensor:
        """The output of packed sequences x [T, W]: at `rows` [N] alone, [N, W], or [T, W]."""
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            assert isinstance(block, Block)
            x = block.packed(x, starts, rows if i == last else None, causal=causal)
        return x

    def together(self, sequences: Sequence[Tensor], index: Sequence[Tensor | None]) -> list[Tensor]:
        """Several [N, L, W], not causal: whole, or where an index is given as `at` has it.

        All but the last block run on one packed sequence, so that each weight is read once, and its gradient is one
        product instead of a sum of several.
        """
        *body, last = self.resblocks
        # by length: sequences that attention takes together then stand together, and nothing is copied
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].shape[1])
        shapes = [sequences[i].shape for i in order]
        x = torch.cat([sequences[i].flatten(0, 1) for i in order])
        lengths = [shape[1] for shape in shapes for _ in range(shape[0])]
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)  # stays on the CPU, where it is read
        for block in body:
            x = block.packed(x, starts, None, causal=False)  # type: ignore[operator]
        rows = torch.split(x, [shape[:2].numel() for shape in shapes])
        outs: list[Tensor] = [x] * len(rows)
        for i, part, shape in zip(order, rows, shapes, strict=True):
            part, at = part.view(shape), index[i]
            outs[i] = last(part, causal=False) if at is None else last.at(part, at, None)  # type: ignore[operator]
        return outs
