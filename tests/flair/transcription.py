"""FLAIR's pooling and losses pair by pair and head by head, from the paper's equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [D]."""
    centred = x - x.sum() / len(x)
    return centred / ((centred * centred).sum() / len(x) + 1e-5).sqrt() * weight + bias


def pool(w: Weights, query: Tensor, tokens: Tensor, heads: int) -> Tensor:
    """What one query [D] finds in tokens [L, W] and a token of zeros; weights of one direction of the fusion."""
    mapped = [w["map"] @ token for token in tokens]
    dim = len(query)
    wq, wk, wv = (w["attn.in_proj_weight"][i * dim : (i + 1) * dim] for i in range(3))
    bq, bk, bv = (w["attn.in_proj_bias"][i * dim : (i + 1) * dim] for i in range(3))
    q = wq @ layer_norm(query, w["ln_q.weight"], w["ln_q.bias"]) + bq
    keys = [wk @ layer_norm(x, w["ln_k.weight"], w["ln_k.bias"]) + bk for x in mapped] + [torch.zeros_like(q)]
    values = [wv @ layer_norm(x, w["ln_v.weight"], w["ln_v.bias"]) + bv for x in mapped] + [torch.zeros_like(q)]
    parts = []
    width = dim // heads
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = [torch.exp((q[own] * key[own]).sum() / math.sqrt(width)) for key in keys]
        whole = sum(scores)
        parts.append(sum(score / whole * value[own] for score, value in zip(scores, values, strict=True)))
    return w["attn.out_proj.weight"] @ torch.cat(parts) + w["attn.out_proj.bias"]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def cost(sign: int, logit: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(-sign * logit))


def losses(
    w: Weights,
    scale: Tensor,
    bias: Tensor,
    images: Tensor,
    tokens: Tensor,
    texts: Tensor,
    heads: int,
    drawn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(conditioned, multi_positive) of images [B, D], tokens [B, L, W], texts [K, B, D].

    `drawn` [B, B - 1] says which text of each other sample (in order) meets picture i; None: all do.
    """
    k, batch, _ = texts.shape
    conditioned = multi = torch.zeros((), dtype=texts.dtype)
    for i in range(batch):
        met = [(1, texts[v, i]) for v in range(k)]
        place = 0
        for j in range(batch):
            if j == i:
                continue
            if drawn is None:
                met += [(-1, texts[v, j]) for v in range(k)]
            else:
                met.append((-1, texts[drawn[i, place], j]))
                place += 1
        for sign, text in met:
            found = pool(w, text, tokens[i], heads)
            conditioned = conditioned + cost(sign, scale * cosine(found, text) + bias) / len(met)
        for j in range(batch):
            for v in range(k):
                logit = scale * cosine(images[i], texts[v, j]) + bias
                multi = multi + cost(1 if i == j else -1, logit) / (batch * k)
    return conditioned, multi
