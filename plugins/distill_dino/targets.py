"""From the teacher's logits to what the student should say: centred or balanced, then sharpened, so that neither one
prototype nor all of them alike can be the answer to everything (DINO, section 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill_core import world_size

ITERATIONS = 3
"""Of Sinkhorn-Knopp (SwAV; DINOv2, section 4)."""


class Targets(nn.Module):
    """Teacher logits [N, K] -> probabilities [N, K]; holds the centre [K] of the teacher's logits."""

    center: Tensor

    def __init__(self, prototypes: int, centring: Literal["ema", "sinkhorn_knopp"], momentum: float) -> None:
        super().__init__()
        self.centring = centring
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self._seen: tuple[Tensor, Tensor | int] | None = None

    @torch.no_grad()
    def forward(
        self, logits: Tensor, temperature: float, *, filler: bool = False, real: Tensor | None = None
    ) -> Tensor:
        """Each row sums to 1. With `ema`, these logits are what `move` moves the centre by.

        Rows that are a `filler`, or where `real` [N] is False, count for nothing, here and on other ranks.
        """
        if filler:
            self(logits[:0], temperature)  # every rank must reach the collectives
            return torch.full_like(logits, 1 / logits.shape[-1])
        if self.centring == "sinkhorn_knopp":
            return sinkhorn_knopp(logits, temperature, real)
        if real is None:
            self._seen = logits.sum(0), len(logits)
        else:
            self._seen = logits.masked_fill(~real[:, None], 0).sum(0), real.sum()
        return ((logits - self.center) / temperature).softmax(-1)

    @torch.no_grad()
    def move(self) -> None:
        """centre = momentum * centre + (1 - momentum) * mean over the rows of all ranks (DINO, equation 4)."""
        if self._seen is None:
            return
        total, count = self._seen
        self._seen = None
        flat = torch.cat([total, total.new_zeros(1) + count])
        if world_size() > 1:
            dist.all_reduce(flat)
        mean = flat[:-1] / flat[-1].clamp(min=1)
        moves = (flat[-1] > 0).to(flat.dtype) * (1 - self.momentum)  # only the device knows whether there was a row
        self.center.lerp_(mean.to(self.center.dtype), moves.to(self.center.dtype))


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, real: Tensor | None = None) -> Tensor:
    """exp(logits / temperature) [N, K] scaled until the prototypes share the rows of all ranks alike; rows sum to 1.

    Ranks may have different numbers of rows, none included. Rows where `real` [N] is False have no share.
    """
    # in logarithms: at a low temperature a whole row of exponentials may be 0
    log_q = logits / temperature
    for _ in range(ITERATIONS):
        shared = log_q if real is None else log_q.masked_fill(~real[:, None], -torch.inf)
        top = shared.amax(0) if len(shared) else shared.new_full(shared.shape[1:], -torch.inf)
        _reduce(top, dist.ReduceOp.MAX)
        column = (shared - top).exp().sum(0)
        _reduce(column, dist.ReduceOp.SUM)
        log_q = (log_q - top - column.log()).log_softmax(1)
    return log_q.exp()


def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    if world_size() > 1:
        dist.all_reduce(x, op=op)


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, in nats; 0 ln 0 is 0."""
    summands: Tensor = torch.special.entr(p)
    return summands.sum(-1)
