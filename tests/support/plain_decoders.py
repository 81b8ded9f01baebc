"""Decoders written out from the papers' text, one sample and one head at a time; weights are those of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def norm(x: Tensor, by: Any) -> Tensor:
    mean, spread = x.mean(-1, keepdim=True), ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(spread + by.eps) * by.weight + by.bias


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, sees: Callable[[int, int], bool]) -> Tensor:
    """q [L, W], k and v [P, W]; query i sees key j."""
    size = q.shape[1] // heads
    rows = []
    for i in range(len(q)):
        keys = [j for j in range(len(k)) if sees(i, j)]
        parts = []
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            scores = torch.stack([(q[i, own] * k[j, own]).sum() for j in keys]) / size**0.5
            weights = torch.exp(scores - scores.max())
            parts.append(sum(w / weights.sum() * v[j, own] for w, j in zip(weights, keys, strict=True)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def self_attention(x: Tensor, by: Any, sees: Callable[[int, int], bool]) -> Tensor:
    q, k, v = (x @ by.in_proj_weight.T + by.in_proj_bias).split(x.shape[1], 1)
    return attend(q, k, v, by.heads, sees) @ by.out_proj.weight.T + by.out_proj.bias


def cross_attention(x: Tensor, tokens: Tensor, by: Any, real: Tensor | None) -> Tensor:
    k, v = (tokens @ by.kv.weight.T + by.kv.bias).split(x.shape[1], 1)
    q = x @ by.q.weight.T + by.q.bias
    return attend(q, k, v, by.heads, lambda i, j: real is None or bool(real[j])) @ by.out.weight.T + by.out.bias


def mlp(x: Tensor, by: Any) -> Tensor:
    hidden = x @ by.c_fc.weight.T + by.c_fc.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ by.c_proj.weight.T + by.c_proj.bias


def block(x: Tensor, tokens: Tensor, by: Any, real: Tensor | None, causal: bool = True) -> Tensor:
    """Self-attention, cross-attention, MLP; each with its LayerNorm before it and x beside it."""
    x = x + self_attention(norm(x, by.ln_1), by.attn, lambda i, j: j <= i or not causal)
    x = x + cross_attention(norm(x, by.ln_2), tokens, by.cross, real)
    return x + mlp(norm(x, by.ln_3), by.mlp)


def logits(x: Tensor, by: Any) -> Tensor:
    return norm(x, by.norm) @ by.ids.T


def surprise(scores: Tensor, target: int) -> Tensor:
    """-log softmax(scores)[target]."""
    return torch.log(torch.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
