"""Sequences written token by token: greedy, or the best of several that are continued side by side (beam search)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def write(follow: Callable[[Tensor], Tensor], start: Tensor, *, end: int, longest: int, beams: int = 1) -> Tensor:
    """Ids [N, L] that begin with `start` [N, L0]; after the first `end` of a row there are only `end`s.

    `follow`: ids [N * beams, L], the beams of a sequence one after the other -> logits [N * beams, S] of the next id.
    At each step the `beams` likeliest continuations of each sequence are kept, those that have ended among them; of the
    last ones that is returned whose tokens have the highest mean log-probability. With one beam each token is the
    likeliest there is.
    """
    n, first = start.shape
    ids = start.repeat_interleave(beams, 0)
    scores = ids.new_zeros((n, beams), dtype=torch.float32)
    scores[:, 1:] = -torch.inf  # all beams are the same yet: one of them is continued
    lengths = ids.new_zeros((n, beams))
    ended = ids.new_zeros((n, beams), dtype=torch.bool)
    for _ in range(first, longest):
        log_probabilities = follow(ids).float().log_softmax(-1).view(n, beams, -1)
        # what has ended is continued by `end` alone, at no cost
        log_probabilities = log_probabilities.masked_fill(ended[..., None], -torch.inf)
        log_probabilities[..., end].masked_fill_(ended, 0.0)
        size = log_probabilities.shape[-1]
        scores, chosen = (scores[..., None] + log_probabilities).flatten(1).topk(beams)
        beam, token = chosen // size, chosen % size
        rows = (torch.arange(n, device=ids.device)[:, None] * beams + beam).flatten()
        ids = torch.cat([ids[rows], token.reshape(-1, 1)], 1)
        ended = ended.gather(1, beam)
        lengths = lengths.gather(1, beam) + (~ended).long()
        ended = ended | (token == end)
        if bool(ended.all()):
            break
    best = (scores / lengths.clamp(min=1)).argmax(1)
    return ids.view(n, beams, -1)[torch.arange(n, device=ids.device), best]
