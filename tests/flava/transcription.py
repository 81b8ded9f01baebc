"""FLAVA's losses token by token, from the paper's equations (pixel targets: MAE's)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def predict(w: Weights, token: Tensor) -> Tensor:
    """token [W] through dense, GELU, LayerNorm, decoder."""
    x = gelu(w["dense.weight"] @ token + w["dense.bias"])
    centred = x - x.mean()
    x = centred / ((centred**2).mean() + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]
    return w["decoder.weight"] @ x + w["decoder.bias"]


def places(mask: Tensor) -> Iterator[tuple[int, int]]:
    for b in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            if mask[b, i]:
                yield b, i


def language(w: Weights, tokens: list[Tensor], mask: Tensor, ids: Tensor) -> tuple[Tensor, float]:
    """(loss, accuracy); tokens of each view [B, L, W], mask and ids [V, B, L]."""
    costs, right = [], 0
    for v, x in enumerate(tokens):
        for b, i in places(mask[v]):
            logits = predict(w, x[b, i])
            costs.append(torch.log(torch.exp(logits).sum()) - logits[ids[v, b, i]])
            right += int(logits.argmax()) == int(ids[v, b, i])
    return sum(costs) / len(costs), right / len(costs)


def pixels(w: Weights, tokens: Tensor, mask: Tensor, pictures: Tensor, patch: int) -> Tensor:
    """tokens [B, L, W], mask [B, L], pictures [B, 3, S, S]: mean squared error over hidden patches' pixels."""
    columns = pictures.shape[-1] // patch
    costs = []
    for b, i in places(mask):
        top, left = i // columns * patch, i % columns * patch
        values = pictures[b, :, top : top + patch, left : left + patch].flatten()
        centred = values - values.sum() / len(values)
        target = centred / ((centred**2).sum() / (len(values) - 1) + 1e-6).sqrt()
        costs.append(((predict(w, tokens[b, i]) - target) ** 2).sum() / len(values))
    return sum(costs) / len(costs)


def matching(w: Weights, matched: Tensor, mismatched: Tensor) -> tuple[Tensor, float]:
    """(loss, accuracy) of class tokens [B, D] of pairs that match and that do not; w: a two-layer head."""
    costs, right = [], 0
    for truth, tokens in ((1, matched), (0, mismatched)):
        for token in tokens:
            x = token / (token @ token).sqrt() * math.sqrt(len(token))
            logits = w["2.weight"] @ torch.tanh(w["0.weight"] @ x + w["0.bias"]) + w["2.bias"]
            costs.append(torch.log(torch.exp(logits[0]) + torch.exp(logits[1])) - logits[truth])
            right += int(logits[1] > logits[0]) == truth
    return sum(costs) / len(costs), right / len(costs)
